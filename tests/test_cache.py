"""The array cache: built once, whole or not at all: interrupted, killed, damaged, full, read-only, built twice."""

import errno
import json
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import textwrap
import threading
import time
from pathlib import Path

import numpy as np
import pytest

from sbn_tf.datasets import cache as array_cache
from sbn_tf.datasets.cache import cache_folder, cached, fingerprint

IMAGES = np.random.default_rng(0).integers(0, 256, (1000, 8, 8, 1)).astype("uint8")
LABELS = np.random.default_rng(1).integers(0, 2, (1000, 3)).astype("uint8")
NAMES = np.array([f"image {k}" for k in range(1000)], "<U12")
ARRAYS = {"images": ((8, 8, 1), "uint8"), "labels": ((3,), "uint8"), "names": ((), "<U12")}


class Source:
    """Yields the rows in pieces of 30, and remembers where it was started."""

    def __init__(self, fail_at=None, error=KeyboardInterrupt):
        self.starts, self.fail_at, self.error = [], fail_at, error

    def __call__(self, start):
        self.starts.append(start)
        for k in range(start, 1000, 30):
            if self.fail_at is not None and k >= self.fail_at:
                raise self.error("stopped")
            part = slice(k, k + 30)
            yield {"images": IMAGES[part], "labels": LABELS[part], "names": NAMES[part]}


def build(folder, source=None, key=("v1",), total=1000):
    return cached("test", list(key), ARRAYS, source or Source(), total=total, cache=folder)


def assert_whole(found):
    for name, expected in (("images", IMAGES), ("labels", LABELS), ("names", NAMES)):
        np.testing.assert_array_equal(found[name], expected)


def finished(folder):
    return sorted(path.name for path in folder.iterdir() if path.is_dir())


def test_it_is_built_once_and_named_by_its_source(tmp_path):
    source = Source()
    assert_whole(build(tmp_path, source))
    assert_whole(build(tmp_path, source))
    assert source.starts == [0]
    build(tmp_path, source, key=("v2",))
    assert source.starts == [0, 0] and len(finished(tmp_path)) == 2
    np.testing.assert_array_equal(np.load(tmp_path / finished(tmp_path)[0] / "images.npy"), IMAGES)


@pytest.mark.parametrize("error", [KeyboardInterrupt, ValueError])
def test_interrupted_it_goes_on_and_is_not_taken_for_whole(tmp_path, error):
    with pytest.raises(error, match="stopped"):
        build(tmp_path, Source(fail_at=300, error=error))
    assert [name.endswith(".partial") for name in finished(tmp_path)] == [True]
    source = Source()
    assert_whole(build(tmp_path, source))
    assert source.starts == [300]
    assert [name.endswith(".partial") for name in finished(tmp_path)] == [False]


@pytest.mark.parametrize("array", ["images", "labels", "names_crc32", "images_sums"])
def test_what_a_crash_spoilt_is_made_anew(tmp_path, array):
    with pytest.raises(KeyboardInterrupt):
        build(tmp_path, Source(fail_at=300))
    path = tmp_path / finished(tmp_path)[0] / f"{array}.npy"
    data = bytearray(path.read_bytes())
    row_bytes = (len(data) - 128) // 300
    data[128 + 200 * row_bytes :] = bytes(len(data) - 128 - 200 * row_bytes)  # zeros, as a power cut leaves them
    path.write_bytes(data)
    source = Source()
    assert_whole(build(tmp_path, source))
    zeros = 0 if array != "labels" else int(np.argmax(LABELS[200:].any(axis=1)))  # labels that are zeros are whole
    assert source.starts == [200 + zeros]
    path = tmp_path / finished(tmp_path)[0] / "images_sums.npy"
    np.testing.assert_array_equal(np.load(path)[:, 0, 0], IMAGES.sum((1, 2, 3)))


@pytest.mark.parametrize("damage", ["cut", "absent", "nonsense", "manifest", "rows", "sums"])
def test_a_damaged_cache_is_made_anew_and_says_so(tmp_path, caplog, damage):
    build(tmp_path)
    folder = tmp_path / finished(tmp_path)[0]
    path = folder / "labels.npy"
    if damage == "cut":
        os.truncate(path, 700)
    elif damage == "absent":
        path.unlink()
    elif damage == "nonsense":
        path.write_bytes(b"nonsense")
    elif damage == "sums":  # a flipped bit there would change the normalisation
        data = bytearray((folder / "images_sums.npy").read_bytes())
        data[-3] ^= 1
        (folder / "images_sums.npy").write_bytes(data)
    elif damage == "manifest":
        (folder / "manifest.json").write_text("{")
    else:
        (folder / "manifest.json").write_text(json.dumps({"rows": 7}))
    assert_whole(build(tmp_path))
    assert caplog.text.count("is damaged") == 1 and "made again" in caplog.text
    assert finished(tmp_path) == [folder.name]


def test_a_crash_just_before_the_end_loses_nothing(tmp_path, monkeypatch):
    def crash(*paths):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(array_cache.os, "replace", crash)
        with pytest.raises(KeyboardInterrupt):
            build(tmp_path)
    source = Source()
    assert_whole(build(tmp_path, source))
    assert source.starts == [1000]


def test_a_source_of_another_length_makes_no_cache(tmp_path):
    with pytest.raises(ValueError, match=r"Expected 1200 images .*Received: 1000"):
        build(tmp_path, total=1200)
    assert [name.endswith(".partial") for name in finished(tmp_path)] == [True]


def test_a_disk_that_fills_up_keeps_what_is_written(tmp_path):
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (30_000, hard))  # the kernel refuses to write on, as on a full disk
    try:
        with pytest.raises(OSError, match=r"(?s)Expected room for the array cache .*SBN_TF_CACHE") as error:
            build(tmp_path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert error.value.errno == errno.EFBIG and str(error.value).count("\n") == 1
    source = Source()
    assert_whole(build(tmp_path, source))
    assert 300 < source.starts[0] < 500


def test_too_little_room_is_said_before_anything_is_written(tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**9, 10**9 - 1000, 1000))
    source = Source()
    with pytest.raises(OSError, match=r"a full disk \(0\.00 GB needed, 0\.00 GB free\)"):
        build(tmp_path, source)
    assert source.starts == []


def test_a_folder_that_cannot_be_made_is_said_in_two_lines(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="can be written to") as error:
        build(tmp_path / "file" / "cache")
    assert str(error.value).count("\n") == 1 and str(tmp_path / "file" / "cache") in str(error.value)


def test_a_read_only_cache_serves_and_refuses_to_grow(tmp_path, monkeypatch):
    build(tmp_path)
    real_open = os.open

    def read_only(path, flags, *rest, **options):
        if str(path).startswith(str(tmp_path)) and flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT):
            raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(path))
        return real_open(path, flags, *rest, **options)

    monkeypatch.setattr(os, "open", read_only)  # permissions do not bind root
    assert_whole(build(tmp_path))
    with pytest.raises(OSError, match=r"(?s)can be written to. Received: .*Read-only.*SBN_TF_CACHE"):
        build(tmp_path, key=("v2",))


def test_threads_that_ask_at_once_build_it_once(tmp_path):
    started = threading.Event()

    class Slow(Source):
        def __call__(self, start):
            started.set()
            time.sleep(0.3)
            yield from super().__call__(start)

    source, results = Slow(), []
    threads = [threading.Thread(target=lambda: results.append(build(tmp_path, source))) for _ in range(3)]
    threads[0].start()
    started.wait()
    for thread in threads[1:]:
        thread.start()
    for thread in threads:
        thread.join()
    assert source.starts == [0] and len(results) == 3
    for found in results:
        assert_whole(found)


@pytest.fixture
def other_process(tmp_path):
    """A process that builds this cache slowly, stopped after 480 rows until a file is there."""
    script = textwrap.dedent(
        f"""
        import pathlib, sys, time
        sys.path.insert(0, {str(Path(__file__).parent)!r})
        import test_cache as t

        class Slow(t.Source):
            def __call__(self, start):
                for k, piece in enumerate(super().__call__(start)):
                    if k == 16:
                        (t.Path({str(tmp_path)!r}) / "half").touch()
                        while not (t.Path({str(tmp_path)!r}) / "go").exists():
                            time.sleep(0.02)
                    yield piece

        t.build(t.Path({str(tmp_path)!r}) / "cache", Slow())
        """
    )
    process = subprocess.Popen([sys.executable, "-c", script], stderr=subprocess.DEVNULL)
    try:
        for _ in range(3000):
            if (tmp_path / "half").exists():
                break
            assert process.poll() is None
            time.sleep(0.02)
        yield process
    finally:
        process.kill()
        process.wait()


def test_killed_it_goes_on_to_the_same_bytes(tmp_path, other_process):
    other_process.send_signal(signal.SIGKILL)
    other_process.wait()
    source = Source()
    assert_whole(build(tmp_path / "cache", source))
    assert source.starts == [480]
    one = tmp_path / "cache" / finished(tmp_path / "cache")[0]
    build(tmp_path / "uninterrupted")
    two = tmp_path / "uninterrupted" / one.name
    for path in one.glob("*.npy"):
        assert path.read_bytes() == (two / path.name).read_bytes()


def test_a_second_process_waits_and_reads_what_the_first_built(tmp_path, other_process, caplog):
    source = Source()
    threading.Timer(0.5, (tmp_path / "go").touch).start()
    assert_whole(build(tmp_path / "cache", source))
    assert source.starts == [] and "waiting for it" in caplog.text
    assert other_process.wait(30) == 0


def test_where_caches_go(tmp_path, monkeypatch):
    assert cache_folder(tmp_path / "a") == tmp_path / "a"
    monkeypatch.setenv("SBN_TF_CACHE", str(tmp_path / "b"))
    assert cache_folder() == tmp_path / "b"
    monkeypatch.delenv("SBN_TF_CACHE")
    assert re.search(r"data.cache$|sbn_tf$", str(cache_folder()))
    monkeypatch.setattr(array_cache, "__file__", str(tmp_path / "site-packages" / "sbn_tf" / "datasets" / "cache.py"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert cache_folder() == tmp_path / "xdg" / "sbn_tf"


def test_fingerprint_tells_changed_files(tmp_path):
    path = tmp_path / "a"
    path.write_bytes(b"one")
    first = fingerprint([path])
    assert fingerprint([path]) == first
    path.write_bytes(b"two more")
    assert fingerprint([path]) != first
