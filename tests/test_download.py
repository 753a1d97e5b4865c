"""Downloads, from a server on this machine: whole or not there, resumed, checked; servers and disks that misbehave."""

import errno
import hashlib
import importlib
import os
import resource
import shutil
import socket
import subprocess
import sys
import textwrap
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import SimpleNamespace

import numpy as np
import pytest

from sbn_tf import datasets
from sbn_tf.datasets import medmnist
from sbn_tf.datasets.download import fetch

module = importlib.import_module("sbn_tf.datasets.download")  # the package's attribute is the function
BODY = np.random.default_rng(0).bytes(300_000)
MD5 = hashlib.md5(BODY).hexdigest()
PAGE = "https://official.example/page"


class Handler(BaseHTTPRequestHandler):
    """Sends `server.body`, with the faults that `server` is told."""

    protocol_version = "HTTP/1.1"

    def do_GET(self):
        server = self.server
        header = self.headers.get("Range")
        server.ranges.append(header)
        start = int(header.removeprefix("bytes=").removesuffix("-")) if header and server.knows_ranges else 0
        if server.statuses:
            self.answer(server.statuses.pop(0), 0)
        elif start >= len(server.body):
            self.answer(416, 0, {"Content-Range": f"bytes */{len(server.body)}"} if server.tells_length else {})
        else:
            rest = server.body[start:]
            if header and server.knows_ranges:
                shown = start + server.shift
                end = len(server.body) - 1
                self.answer(206, len(rest), {"Content-Range": f"bytes {shown}-{end}/{len(server.body)}"})
            elif server.chunked:
                self.answer(200, None, {"Transfer-Encoding": "chunked"})
                rest = b"%x\r\n%b\r\n0\r\n\r\n" % (len(rest), rest)
            else:
                self.answer(200, len(rest) if server.length is None else server.length)
            stop = server.stops.pop(0) if server.stops else None
            self.wfile.write(rest[:stop])
            if stop == 0 and server.stalls:
                server.released.wait(10)
            self.close_connection = True

    def answer(self, status, length, headers=()):
        self.send_response(status)
        if length is not None:
            self.send_header("Content-Length", str(length))
        for key, value in dict(headers).items():
            self.send_header(key, value)
        self.end_headers()

    def log_message(self, *arguments):
        pass


@pytest.fixture
def server(monkeypatch):
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.setattr(module, "BACKOFF", 0.0)
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.body, server.ranges, server.statuses, server.stops = BODY, [], [], []
    server.knows_ranges, server.tells_length, server.chunked, server.stalls, server.shift = True, True, False, False, 0
    server.length, server.released = None, threading.Event()
    server.url = f"http://127.0.0.1:{server.server_port}/file.npz?download=1"
    thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    yield server
    server.released.set()
    server.shutdown()
    server.server_close()
    thread.join()


@pytest.fixture
def place(tmp_path):
    path = tmp_path / "data" / "file.npz"
    return SimpleNamespace(path=path, part=path.with_name("file.npz.part"))


def left(place):
    """Names in the folder but for the lock, which stays."""
    return sorted(p.name for p in place.path.parent.iterdir() if p.suffix != ".lock")


def test_a_file_comes_whole(server, place):
    assert fetch(server.url, place.path, MD5, PAGE) == place.path
    assert place.path.read_bytes() == BODY and left(place) == ["file.npz"]
    assert server.ranges == [None]


def test_nothing_is_asked_for_a_file_that_is_there(server, place):
    fetch(server.url, place.path, MD5, PAGE)
    fetch(server.url, place.path, MD5, PAGE)
    assert server.ranges == [None]


def test_without_a_length(server, place):
    server.chunked = True
    fetch(server.url, place.path, MD5, PAGE)
    assert place.path.read_bytes() == BODY


@pytest.mark.parametrize("length", ["many", "-5", "3e5", ""])
def test_a_length_that_is_no_number_is_none(server, place, length):
    server.length = length
    fetch(server.url, place.path, MD5, PAGE)
    assert place.path.read_bytes() == BODY and left(place) == ["file.npz"]


@pytest.mark.parametrize("told", [True, False])
def test_more_than_any_official_file_is_not_taken(server, place, monkeypatch, told):
    monkeypatch.setattr(module, "PIECE_BYTES", 10_000)
    monkeypatch.setattr(module, "MAX_BYTES", 100_000)
    server.chunked = not told
    with pytest.raises(
        ValueError, match=r"at most 100,000 bytes for file.npz. Received: .*deleted.\nThe server"
    ) as error:
        fetch(server.url, place.path, MD5, PAGE)
    assert ("300,000" if told else "110,000") in str(error.value) and left(place) == [] and len(server.ranges) == 1


@pytest.mark.parametrize("have", [1, 1000, len(BODY) - 1])
def test_a_part_is_gone_on_with(server, place, have):
    place.path.parent.mkdir()
    place.part.write_bytes(BODY[:have])
    fetch(server.url, place.path, MD5, PAGE)
    assert place.path.read_bytes() == BODY and left(place) == ["file.npz"]
    assert server.ranges == [f"bytes={have}-"]


def test_dropped_connections_are_made_again(server, place):
    server.stops = [1000, 0, 5000, 100_000]
    fetch(server.url, place.path, MD5, PAGE)
    assert place.path.read_bytes() == BODY
    assert server.ranges == [None, "bytes=1000-", "bytes=1000-", "bytes=6000-", "bytes=106000-"]


def test_a_stalled_connection_is_made_again(server, place, monkeypatch):
    monkeypatch.setattr(module, "TIMEOUT", 0.3)
    server.stops, server.stalls = [0], True
    fetch(server.url, place.path, MD5, PAGE)
    assert place.path.read_bytes() == BODY and server.ranges == [None, None]


@pytest.mark.parametrize("statuses", [[503, 500, 429, 502]])
def test_a_busy_server_is_asked_again(server, place, statuses):
    server.statuses = list(statuses)
    fetch(server.url, place.path, MD5, PAGE)
    assert place.path.read_bytes() == BODY and len(server.ranges) == len(statuses) + 1


def test_it_gives_up_says_what_it_has_and_goes_on_when_called_again(server, place):
    server.stops = [1234] + [0] * 50
    with pytest.raises(ConnectionError, match="1,234 bytes") as error:
        fetch(server.url, place.path, MD5, PAGE)
    first, second = str(error.value).split("\n")
    assert f"{module.RETRIES + 1} times" in first and str(place.part) in second and "same call" in second
    assert len(server.ranges) == module.RETRIES + 2  # one that brought something, and those that did not
    assert left(place) == ["file.npz.part"] and place.part.read_bytes() == BODY[:1234]
    server.stops, server.ranges = [], []
    fetch(server.url, place.path, MD5, PAGE)
    assert place.path.read_bytes() == BODY and server.ranges == ["bytes=1234-"]


def test_a_server_that_always_starts_anew(server, place):
    server.knows_ranges, server.stops = False, [5000, 2000]
    fetch(server.url, place.path, MD5, PAGE)
    assert place.path.read_bytes() == BODY and server.ranges == [None, "bytes=5000-", "bytes=2000-"]
    place.path.unlink()
    server.stops = [5000] * 50  # always at the same byte: no progress
    with pytest.raises(ConnectionError, match="5,000 bytes"):
        fetch(server.url, place.path, MD5, PAGE)


@pytest.mark.parametrize(("have", "tells_length", "requests"), [(BODY, True, 1), (BODY, False, 2), (BODY * 2, True, 2)])
def test_a_part_that_is_whole_or_too_long(server, place, have, tells_length, requests):
    server.tells_length = tells_length
    place.path.parent.mkdir()
    place.part.write_bytes(have)
    fetch(server.url, place.path, MD5, PAGE)
    assert place.path.read_bytes() == BODY and len(server.ranges) == requests


def test_another_range_than_asked_for_is_not_appended(server, place):
    server.shift = 7
    place.path.parent.mkdir()
    place.part.write_bytes(BODY[:1000])
    fetch(server.url, place.path, MD5, PAGE)
    assert place.path.read_bytes() == BODY and server.ranges == ["bytes=1000-", None]


@pytest.mark.parametrize("part", [b"", b"of another file"])
def test_a_wrong_md5_leaves_nothing(server, place, part):
    if not part:
        server.body = BODY[:77] + b"?" + BODY[78:]
    place.path.parent.mkdir()
    place.part.write_bytes(part)
    with pytest.raises(ValueError, match=f"Expected md5 {MD5} .*deleted.\nDownload it again.*{PAGE}"):
        fetch(server.url, place.path, MD5, PAGE)
    assert left(place) == []
    server.body = BODY
    assert fetch(server.url, place.path, MD5, PAGE).read_bytes() == BODY


def test_a_sha256_is_compared_where_one_is_known(server, place, monkeypatch):
    monkeypatch.setitem(module.SHA256, MD5, "0" * 64)  # as if the md5 were forged
    with pytest.raises(ValueError, match=f"Expected sha256 0{{64}} .*deleted.\nDownload it again.*{PAGE}"):
        fetch(server.url, place.path, MD5, PAGE)
    assert left(place) == []
    monkeypatch.setitem(module.SHA256, MD5, hashlib.sha256(BODY).hexdigest())
    assert fetch(server.url, place.path, MD5, PAGE).read_bytes() == BODY
    monkeypatch.setitem(module.SHA256, MD5, "0" * 64)
    with pytest.raises(ValueError, match=r"sha256 .*\nIt is not the official file"):
        fetch(server.url, place.path, MD5, PAGE)


def test_each_sha256_is_of_an_official_file():
    official = {md5 for name in medmnist.NAMES for _, md5 in datasets.card(name).checksums}
    assert official > set(module.SHA256) and {len(value) for value in module.SHA256.values()} == {64}


def test_a_file_that_is_not_official_is_not_replaced(server, place):
    place.path.parent.mkdir()
    place.path.write_bytes(b"mine")
    with pytest.raises(ValueError, match=f"{place.path}.*\nIt is not the official file"):
        fetch(server.url, place.path, MD5, PAGE)
    assert place.path.read_bytes() == b"mine" and server.ranges == []


@pytest.mark.parametrize("status", [404, 403, 410])
def test_a_file_that_the_server_has_not(server, place, status):
    server.statuses = [status]
    with pytest.raises(ConnectionError, match=f"HTTP {status}.*\nGet it from {PAGE} and put it there: {place.path}."):
        fetch(server.url, place.path, MD5, PAGE)
    assert len(server.ranges) == 1 and left(place) == []


def test_offline(place):
    with socket.socket() as taken:  # a port that nobody listens on
        taken.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{taken.getsockname()[1]}/file.npz"
        with pytest.raises(ConnectionError, match=r"connection to download file\.npz") as error:
            fetch(url, place.path, MD5, PAGE)
    first, second = str(error.value).split("\n")
    assert "refused" in first and PAGE in second and str(place.path) in second
    assert left(place) == []


# ---- disks


def test_a_disk_that_is_too_small_is_seen_before(server, place, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=200_000))
    with pytest.raises(OSError, match=r"room for .*0.00 GB needed, 0.00 GB free\).\nFree some") as error:
        fetch(server.url, place.path, MD5, PAGE)
    assert error.value.errno == errno.ENOSPC
    place.part.write_bytes(BODY[:150_000])
    fetch(server.url, place.path, MD5, PAGE)  # for the rest there is room
    assert place.path.read_bytes() == BODY


def test_a_stream_without_a_length_does_not_fill_the_disk(server, place, monkeypatch):
    """By hand: pieces of 10,000 bytes as long as one of them leaves what is to stay free."""
    monkeypatch.setattr(module, "PIECE_BYTES", 10_000)
    server.chunked = True
    free = module.SPARE_BYTES + 155_000

    def disk_usage(path):
        return SimpleNamespace(free=free - (place.part.stat().st_size if place.part.exists() else 0))

    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", disk_usage)
        with pytest.raises(OSError, match=r"room for .*GB free\).\nFree some") as error:
            fetch(server.url, place.path, MD5, PAGE)
    assert error.value.errno == errno.ENOSPC
    assert 100_000 < place.part.stat().st_size <= 160_000  # what is not flushed yet is not seen
    fetch(server.url, place.path, MD5, PAGE)
    assert place.path.read_bytes() == BODY


def test_a_disk_that_fills_up_keeps_the_part(server, place, monkeypatch):
    monkeypatch.setattr(module, "PIECE_BYTES", 10_000)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))
    try:
        with pytest.raises(OSError, match="a full disk") as error:
            fetch(server.url, place.path, MD5, PAGE)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert error.value.errno == errno.EFBIG and str(error.value).count("\n") == 1
    assert left(place) == ["file.npz.part"] and place.part.read_bytes() == BODY[:100_000]
    fetch(server.url, place.path, MD5, PAGE)
    assert place.path.read_bytes() == BODY and server.ranges == [None, "bytes=100000-"]


def test_a_folder_that_cannot_be_made(server, tmp_path):
    (tmp_path / "data").write_text("a file")
    with pytest.raises(OSError, match=r"a folder for .* that can be written to.*\nSet SBN_TF_DATA"):
        fetch(server.url, tmp_path / "data" / "file.npz", MD5, PAGE)
    assert server.ranges == []


def test_stopped_by_hand_it_goes_on(server, place, monkeypatch):
    monkeypatch.setattr(module, "PIECE_BYTES", 10_000)
    pieces = []

    class Bar(module.tqdm):
        def update(self, n=1):
            pieces.append(n)
            if len(pieces) == 3:
                raise KeyboardInterrupt
            return super().update(n)

    monkeypatch.setattr(module, "tqdm", Bar)
    with pytest.raises(KeyboardInterrupt):
        fetch(server.url, place.path, MD5, PAGE)
    assert place.part.read_bytes() == BODY[:30_000]
    fetch(server.url, place.path, MD5, PAGE)
    assert place.path.read_bytes() == BODY and server.ranges == [None, "bytes=30000-"]


def test_two_at_once_download_once(server, place, caplog):
    found = []
    threads = [
        threading.Thread(target=lambda: found.append(fetch(server.url, place.path, MD5, PAGE))) for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [place.path] * 4 and server.ranges == [None] and place.path.read_bytes() == BODY


def test_another_process_is_waited_for(server, place, caplog):
    code = """
        import sys, filelock
        with filelock.FileLock(sys.argv[1]):
            print("locked", flush=True)
            sys.stdin.readline()
    """
    place.path.parent.mkdir()
    other = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(code), f"{place.path}.lock"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert other.stdout.readline() == "locked\n"
    threading.Timer(0.3, lambda: other.communicate("\n")).start()
    fetch(server.url, place.path, MD5, PAGE)
    assert "another process downloads" in caplog.text and place.path.read_bytes() == BODY


# ---- by name


@pytest.fixture
def breast(server, tmp_path, monkeypatch):
    """The server has `breastmnist.npz`, small, and its md5 is the official one."""
    rng, arrays = np.random.default_rng(0), {}
    for part in ("train", "val", "test"):
        arrays[f"{part}_images"] = rng.integers(0, 256, (4, 28, 28)).astype("uint8")
        arrays[f"{part}_labels"] = np.array([[0], [1], [0], [1]], "uint8")
    np.savez(tmp_path / "made.npz", **arrays)
    server.body = (tmp_path / "made.npz").read_bytes()
    table = medmnist._table()
    ours = table["breastmnist"] | {"url": server.url, "MD5": hashlib.md5(server.body).hexdigest()}
    monkeypatch.setattr(medmnist, "_table", lambda: table | {"breastmnist": ours})
    medmnist._cards.cache_clear()
    yield arrays
    medmnist._cards.cache_clear()


def test_download_by_name(server, breast, tmp_path, monkeypatch):
    monkeypatch.setenv("SBN_TF_DATA", str(tmp_path / "root"))
    path = datasets.download("breastmnist", 28)
    assert path == tmp_path / "root" / "breastmnist.npz" and path.read_bytes() == server.body
    assert datasets.download("breastmnist", 20) == path  # there: nothing is asked for
    (tmp_path / "root" / "breastmnist").mkdir()
    path.rename(tmp_path / "root" / "breastmnist" / path.name)
    assert datasets.download("breastmnist", 28) == tmp_path / "root" / "breastmnist" / path.name
    assert len(server.ranges) == 1
    other = datasets.download("breastmnist", 28, root=tmp_path / "other")
    assert other == tmp_path / "other" / "breastmnist.npz" and len(server.ranges) == 2
    other.write_bytes(b"cut short")
    with pytest.raises(ValueError, match="md5"):
        datasets.download("breastmnist", 28, root=tmp_path / "other")


def test_load_downloads_what_is_not_there(server, breast, tmp_path):
    with pytest.raises(FileNotFoundError, match="download=True"):
        datasets.load("breastmnist", root=tmp_path / "root", size=28)
    options = dict(root=tmp_path / "root", size=28, download=True)
    data = datasets.load("breastmnist", verify=True, **options)
    np.testing.assert_array_equal(data.train.images[..., 0], breast["train_images"])
    np.testing.assert_array_equal(data.test.targets, breast["test_labels"])
    assert datasets.load("breastmnist", **options).digest() == data.digest()
    assert len(server.ranges) == 1


def test_load_downloads_the_file_of_the_size_though_a_larger_one_is_there(server, breast, tmp_path):
    (tmp_path / "root").mkdir()
    os.symlink(tmp_path / "made.npz", tmp_path / "root" / "breastmnist_64.npz")
    datasets.load("breastmnist", root=tmp_path / "root", size=28, download=True)
    assert (tmp_path / "root" / "breastmnist.npz").exists()


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (dict(name="isic2018"), "can be downloaded, among pathmnist.*Received: name='isic2018'\n"),
        (dict(name="phantom_chest"), "can be downloaded"),
        (dict(name="chestmnits"), "Received: name='chestmnits'"),
        (dict(name="chestmnist", size=300), "size <= 224"),
        (dict(name="chestmnist", size=0), "size of 1 to 224. Received: size=0"),
        (dict(name="chestmnist", size="28"), "integer size"),
        (dict(name="chestmnist", size=28.0), "integer size"),
    ],
)
def test_wrong_arguments(arguments, says):
    with pytest.raises(ValueError, match=says):
        datasets.download(**arguments)


def test_other_datasets_are_not_downloaded():
    with pytest.raises(ValueError, match=r"options of 'isic2018' among .*download=True"):
        datasets.load("isic2018", download=True)
