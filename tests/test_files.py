"""Files that are whole or not there: kills, crashes of the machine, and flipped bits."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from sbn_tf.core import files


def names(folder):
    return sorted(path.name for path in folder.iterdir())


KILLED = """
import os, signal, sys
from sbn_tf.core.files import replacing
with replacing(sys.argv[1]) as temporary:
    temporary.write_bytes(b"half")
    os.kill(os.getpid(), signal.SIGKILL)
"""


def test_what_a_killed_process_left_is_removed_by_the_next_write(tmp_path):
    done = subprocess.run([sys.executable, "-c", KILLED, str(tmp_path / "model.keras")], check=False)
    assert done.returncode == -signal.SIGKILL
    (left,) = names(tmp_path)
    assert left.startswith("model.") and left.endswith(".tmp.keras")  # the ending that Keras asks for
    (tmp_path / "metrics.0123abcd.tmp").write_bytes(b"half")  # of a file without an ending
    mine = ("notes.tmp", "saving.keras", "a.0123abcd.npz")
    for name in mine:
        (tmp_path / name).write_bytes(b"whole")
    files.write_atomically(tmp_path / "other.json", lambda file: file.write(b"{}"))
    assert names(tmp_path) == sorted(("other.json", *mine))


def test_the_temporary_file_of_a_running_process_stays(tmp_path):
    with files.replacing(tmp_path / "a.npz") as temporary:
        temporary.write_bytes(b"first")
        files.write_atomically(tmp_path / "b.npz", lambda file: file.write(b"second"))
        files.remove_leftovers(tmp_path)
        assert temporary.exists()
    assert names(tmp_path) == ["a.npz", "b.npz"] and (tmp_path / "a.npz").read_bytes() == b"first"


def test_a_file_is_on_the_disk_before_it_gets_its_name(tmp_path, monkeypatch):
    calls = []
    synced, replaced = os.fsync, os.replace

    def fsync(descriptor):
        calls.append(("fsync", os.fstat(descriptor).st_ino, os.fstat(descriptor).st_size))
        synced(descriptor)

    def replace(source, target):
        calls.append(("replace", os.stat(source).st_ino, os.stat(source).st_size))
        replaced(source, target)

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(os, "replace", replace)
    files.write_atomically(tmp_path / "a.json", lambda file: file.write(b"12345"))
    number = (tmp_path / "a.json").stat().st_ino
    assert calls == [("fsync", number, 5), ("replace", number, 5)]


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()])
def test_a_write_that_fails_leaves_the_old_file_alone(tmp_path, error):
    path = tmp_path / "a.json"
    path.write_bytes(b"old")

    def write(file):
        file.write(b"half")
        raise error

    with pytest.raises(type(error)):
        files.write_atomically(path, write)
    assert names(tmp_path) == ["a.json"] and path.read_bytes() == b"old"


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_a_flipped_bit_of_an_archive_is_refused_or_changes_nothing(save, tmp_path):
    path, arrays = tmp_path / "a.npz", {"a": np.arange(20), "b": np.ones((2, 3), "float32")}
    save(path, **arrays)
    whole, refused = path.read_bytes(), 0
    for place in range(len(whole)):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 1 << place % 8]) + whole[place + 1 :])
        try:
            files.check_archive(path)
        except ValueError as error:
            refused += 1
            assert str(error).startswith("a.npz is ") and "\n" not in str(error)
            continue
        with np.load(path) as found:  # a date, say
            for name in set(found.files) & set(arrays):
                np.testing.assert_array_equal(found[name], arrays[name])
    assert refused > len(whole) / 2
    path.write_bytes(whole)
    files.check_archive(path)


def test_what_is_no_archive_or_not_there(tmp_path):
    for content in (b"", b"PK\x03\x04", b"text"):
        (tmp_path / "a.npz").write_bytes(content)
        with pytest.raises(ValueError, match=r"a\.npz is cut short or damaged"):
            files.check_archive(tmp_path / "a.npz")
    with pytest.raises(FileNotFoundError):
        files.check_archive(Path(tmp_path, "b.npz"))
