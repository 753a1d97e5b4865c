"""Pickles read as data: NumPy arrays, numbers, text and built-in containers. No code of a file ever runs.

    patches = SafePickle("data_lidc.pickle")  # a dict of thousands of arrays: none of them is read yet
    patches.peek(key)["image"].shape
    patches[key]["image"]  # this one is read now

A pickle is a program: it names functions, in modules of its choice, and calls them, and `numpy.load` and
`pickle.load` obey. Here a small interpreter of our own follows the program (`pickle_machine`). It looks each name up
in one table of stand-ins, which are plain values; an error names any other. NumPy never interprets what the file says
of an array (its type, shape and flags can be forged to read foreign memory): the stand-in takes plain numbers,
booleans and text of a length that fits the shape, and makes the array itself.

Arrays are stored as long strings of bytes. These are not read while the program is followed; only their place in the
file is kept. So a file of gigabytes costs a few kilobytes per array until an array is asked for. If the file's size,
time of change or inode has changed by then, that is an error.
"""

import contextlib
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from .files import open_file
from .pickle_machine import follow
from .pickle_values import ATOMS, PickledArray, RefusedError, Stored, shown


class SafePickle(Mapping):
    """The dict that a pickle contains; an item's arrays are read when it is asked for, and not kept.

    Args:
        path: the file.

    Raises:
        ValueError: a file that is truncated or corrupt, contains anything but plain data, or no dict; in reading an
            item: the file is not the one that was opened.
    """

    def __init__(self, path: str | os.PathLike):
        self.path = Path(path)
        self._items, self._status = _follow(self.path)
        if type(self._items) is not dict:
            raise ValueError(f"Expected a pickled dict in {path}. Received: {shown(self._items)}")

    def __len__(self):
        return len(self._items)

    def __iter__(self):
        return iter(self._items)

    def __getitem__(self, key):
        return _plain(self.path, self._items[key], self._status)

    def read(self, key: object, names: Sequence[object]) -> dict:
        """Of an item that is a dict these entries alone."""
        item = self._items[key]
        return _plain(self.path, {name: item[name] for name in names}, self._status)

    def __contains__(self, key):  # Mapping's would read the item
        return key in self._items

    def peek(self, key: object) -> Any:
        """An item that is not read: a `PickledArray` for each array, stand-ins for long text and bytes."""
        return self._items[key]


def load(path: str | os.PathLike) -> Any:
    """All that a pickle contains, arrays included; a ValueError as from `SafePickle`."""
    return _plain(path, *_follow(path))


def _follow(path):
    """The value of a pickle, with stand-ins for what was not read, and the file's status."""
    with open_file(path) as file, _explained(path):
        status = _status(file)
        return follow(file), status


def _status(file):
    found = os.fstat(file.fileno())
    return found.st_size, found.st_mtime_ns, found.st_ino


def _plain(path, value, status):
    """The value with its arrays and long strings read from the file, if its status has not changed."""
    with open_file(path) as file:
        _check_unchanged(path, file, status)
        with _explained(path):
            found = _Reader(file, status[0]).read(value)
        _check_unchanged(path, file, status)  # written to meanwhile
        return found


def _check_unchanged(path, file, status):
    found = _status(file)
    if found != status:
        names = [n for n, a, b in zip(("size", "time of change", "inode"), found, status, strict=True) if a != b]
        raise ValueError(
            f"Expected {path} as it was when it was opened. Received: another {' and '.join(names)}.\n"
            "Open it again, once nobody writes to it."
        )


class _Reader:
    """Reads values with all that they contain from a file.

    What is in several places is read once and is one object, as in the pickle.

    Args:
        left: bytes that may be read: as many as the file has. Any number of arrays can name the same ones.
    """

    def __init__(self, file, left):
        self.file, self.left, self.done = file, left, {}

    def read(self, value):
        if type(value) in (*ATOMS, frozenset) or isinstance(value, np.generic):
            return value
        done = self.done
        if id(value) in done:
            return done[id(value)]
        if type(value) in (PickledArray, Stored):
            self.left -= value.num_bytes
            if self.left < 0:
                raise ValueError("its arrays have more bytes than it")
            done[id(value)] = value.read(self.file)
        elif type(value) in (set, bytearray):
            done[id(value)] = value.copy()
        elif type(value) is list:
            out = done[id(value)] = []
            out.extend(self.read(part) for part in value)
        elif type(value) is dict:
            out = done[id(value)] = {}
            out.update((key, self.read(part)) for key, part in value.items())
        elif type(value) is tuple:
            done[id(value)] = tuple(self.read(part) for part in value)
        else:
            raise RefusedError(shown(value))
        return done[id(value)]


@contextlib.contextmanager
def _explained(path) -> Iterator[None]:
    """Turns whatever a broken or hostile file raises into one of two messages."""
    try:
        yield
    except RefusedError as error:
        raise ValueError(
            f"Expected NumPy arrays, numbers, text and built-in containers alone in {path}. "
            f"Received: {error}.\nNothing in the file was run. Do not open it with pickle.load; get it again."
        ) from None
    except OSError:
        raise
    except Exception as error:
        reason = str(error).splitlines()[0][:120] if str(error) else type(error).__name__
        raise ValueError(
            f"Expected a whole pickle of plain data. Received: {path} ({reason}).\n"
            "It is truncated or corrupt: get it again."
        ) from error
