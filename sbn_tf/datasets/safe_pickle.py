"""Pickles read as data: NumPy arrays, numbers, text and built-in containers. No code of a file ever runs.

    patches = SafePickle("data_lidc.pickle")  # a dict of thousands of arrays: none of them is read yet
    patches.peek(key)["image"].shape
    patches[key]["image"]  # this one is read now

A pickle is a program: it names functions, in modules of its choice, and calls them, and `numpy.load` and
`pickle.load` obey. Here a small interpreter of our own follows the program. What a name stands for is looked up in
one table of stand-ins, which are plain values (`_KNOWN`); any other name is refused, and told. Nothing of NumPy
interprets what the file says of an array (its type, shape and flags can be forged to read foreign memory): the
stand-in takes plain numbers, booleans and text of a length that fits the shape, and makes the array itself.

Long strings of bytes, which is what arrays are stored as, are not read while the program is followed: only where
they lie in the file is kept. So a file of gigabytes costs a few kilobytes per array until an array is asked for, and
a file that changed in between is told by its size, time of change and inode.
"""

import codecs
import math
import os
import pickletools
import re
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any

import numpy as np

__all__ = ["PickledArray", "SafePickle", "load"]

LONG = 1024  # bytes from which on a string stays in the file
MAX_AXES = 32
MAX_SIDE = 2**31

# Operations with a length in front: (its format, what the bytes are).
_SIZED = {
    "BINSTRING": ("<i", "latin-1"),
    "SHORT_BINSTRING": ("<B", "latin-1"),
    "BINBYTES": ("<I", "bytes"),
    "SHORT_BINBYTES": ("<B", "bytes"),
    "BINBYTES8": ("<Q", "bytes"),
    "BYTEARRAY8": ("<Q", "bytearray"),
    "BINUNICODE": ("<I", "utf-8"),
    "SHORT_BINUNICODE": ("<B", "utf-8"),
    "BINUNICODE8": ("<Q", "utf-8"),
    "LONG1": ("<B", "integer"),
    "LONG4": ("<i", "integer"),
}
_LINES = {"STRING": "quoted", "UNICODE": "raw-unicode-escape"}  # those that end with their line

# Names that a pickle of plain data contains, as Python 2 and 3, NumPy 1 and 2 write them, and what each is here.
_KNOWN = {
    ("numpy.core.multiarray", "_reconstruct"): "array",
    ("numpy._core.multiarray", "_reconstruct"): "array",
    ("numpy.core.multiarray", "scalar"): "scalar",
    ("numpy._core.multiarray", "scalar"): "scalar",
    ("numpy.core.numeric", "_frombuffer"): "frombuffer",
    ("numpy._core.numeric", "_frombuffer"): "frombuffer",
    ("numpy", "ndarray"): "ndarray",
    ("numpy", "dtype"): "dtype",
    ("_codecs", "encode"): "encode",
    ("collections", "OrderedDict"): "dict",
} | {
    (module, name): name
    for module in ("builtins", "__builtin__")
    for name in ("set", "frozenset", "bytearray", "bytes", "complex")
}

_PLAIN_DTYPE = re.compile(r"b1|[iu][1248]|f[248]|c8|c16|[SU][1-9]\d{0,5}")
_ATOMS = (str, bytes, int, float, complex, bool, type(None))


class _RefusedError(Exception):
    """What the file holds beside plain data."""


class _Name:
    """Stands for a name of `_KNOWN`; an inert value, of which nothing is ever called."""

    __slots__ = ("kind", "name")

    def __init__(self, name, kind):
        self.name, self.kind = name, kind


class _Stored:
    """A long string that is still in the file.

    Args:
        position, size: where it lies.
        kind: how it is written there, see `_decode`.
        wanted: what it is to be: None, as it is; bytes or bytearray, of which it is the Latin-1 text.
    """

    __slots__ = ("kind", "position", "size", "wanted")

    def __init__(self, position, size, kind, wanted=None):
        self.position, self.size, self.kind, self.wanted = position, size, kind, wanted

    def to(self, wanted):
        return _Stored(self.position, self.size, self.kind, wanted)

    def read(self, file):
        file.seek(self.position)
        found = _decode(_exactly(file, self.size), self.kind)
        if self.wanted is None:
            return found
        return self.wanted(found.encode("latin-1") if type(found) is str else found)


class _Dtype:
    """A dtype as the file describes it; only a plain one passes."""

    __slots__ = ("dtype", "final")

    def __init__(self, name, *flags):
        if type(name) is not str or not _PLAIN_DTYPE.fullmatch(name):
            raise _RefusedError(f"an array of dtype {_shown(name)}")
        if len(flags) > 2 or not all(flag in (0, 1) for flag in flags):
            raise ValueError("a dtype of unknown form")
        self.dtype, self.final = np.dtype(name), False

    def build(self, state):
        """The state says the byte order; all else has to be what NumPy itself writes of such a dtype."""
        orders = ("|",) if self.dtype.byteorder == "|" else ("<", ">")
        if self.final or type(state) is not tuple or len(state) != 8 or state[1] not in orders:
            raise ValueError("a dtype of unknown form")
        if _tokens(state[2:]) != _tokens(self.dtype.__reduce__()[2][2:]):
            raise _RefusedError(f"a forged dtype {self.dtype.str!r}")
        self.dtype, self.final = self.dtype.newbyteorder(state[1]), True


class PickledArray:
    """An array that is still in its file: `shape`, `dtype`, and nothing else to be had of it."""

    __slots__ = ("_axes", "_data", "_order", "_scalar", "_stored_shape", "dtype", "shape")

    def __init__(self, scalar: bool = False):
        self.shape = self.dtype = self._data = self._axes = None
        self._scalar = scalar

    def build(self, state):
        """`ndarray.__setstate__`: (version, shape, dtype, whether in Fortran order, bytes)."""
        if self._data is not None or type(state) is not tuple or len(state) != 5 or state[0] not in (0, 1):
            raise ValueError("an array of unknown form")
        if state[3] not in (0, 1):
            raise ValueError("an array of unknown order")
        self.fill(state[4], state[2], state[1], "F" if state[3] else "C")

    def fill(self, data, dtype, shape, order, axes=None):
        """Take what a file says of an array, if it fits together; of the axes as `_frombuffer` of NumPy 2 does."""
        if type(dtype) is not _Dtype or type(shape) is not tuple or order not in ("C", "F", "K"):
            raise ValueError("an array of unknown form")
        if (order == "K") != (axes is not None) or (axes is not None and type(axes) is not tuple):
            raise ValueError("an array of unknown form")
        if len(shape) > MAX_AXES or not all(type(n) is int and 0 <= n < MAX_SIDE for n in shape):
            raise ValueError(f"an array of shape {_shown(shape)}")
        size = math.prod(shape) * dtype.dtype.itemsize
        if type(data) is _Stored:
            least = most = data.size
            if data.kind not in ("bytes", "bytearray"):  # text of as many letters: protocols 0 to 2
                least = -(-data.size // (4 if data.kind == "quoted" else 6))
        elif type(data) in (bytes, bytearray, str):
            least = most = len(data)
        else:
            raise ValueError("an array without bytes")
        if not least <= size <= most:
            raise ValueError(f"an array of {most} bytes for shape {_shown(shape)} of {dtype.dtype}")
        if axes is not None:
            if not all(type(k) is int for k in axes) or sorted(axes) != list(range(len(shape))):
                raise ValueError("an array of unknown form")
            self.shape, self._axes, order = tuple(shape[k] for k in axes), axes, "C"
        else:
            self.shape = shape
        self._stored_shape, self.dtype, self._data, self._order = shape, dtype.dtype, data, order

    def read(self, file: IO[bytes]) -> np.ndarray:
        """The array itself: writable, in native byte order, and owner of its memory."""
        if self._data is None:
            raise ValueError("an array without data")
        data = self._data.read(file) if type(self._data) is _Stored else self._data
        data = data.encode("latin-1") if type(data) is str else data
        if len(data) != math.prod(self.shape) * self.dtype.itemsize:
            raise ValueError(f"an array of {len(data)} bytes for shape {_shown(self.shape)} of {self.dtype}")
        native = self.dtype.newbyteorder("=")
        values = np.frombuffer(data, self.dtype).astype(native)
        if native.kind == "b" and (values.view("uint8") > 1).any():
            raise ValueError("a bool that is neither 0 nor 1")
        if native.kind == "U" and values.size and values.view("uint32").max() > 0x10FFFF:
            raise ValueError("text that is none")
        values = values.reshape(self._stored_shape, order=self._order)
        values = values if self._axes is None else values.transpose(self._axes)
        return values[()] if self._scalar else values


class SafePickle(Mapping):
    """The dict that a pickle holds; an item's arrays are read when it is asked for, and not kept.

    Args:
        path: the file.

    Raises:
        ValueError: a file that is truncated or corrupt, holds anything but plain data, or holds no dict; of an item:
            the file is not the one that was opened.
    """

    def __init__(self, path: str | os.PathLike):
        self.path = Path(path)
        self._items, self._status = _follow(self.path)
        if type(self._items) is not dict:
            raise ValueError(f"Expected a pickled dict in {path}. Received: {_shown(self._items)}")

    def __len__(self):
        return len(self._items)

    def __iter__(self):
        return iter(self._items)

    def __getitem__(self, key):
        return _plain(self.path, self._items[key], self._status)

    def __contains__(self, key):  # Mapping's would read the item
        return key in self._items

    def peek(self, key: object) -> Any:
        """An item with a `PickledArray` for each array; long text and bytes are not readable in it either."""
        return self._items[key]


def load(path: str | os.PathLike) -> Any:
    """All that a pickle holds, arrays included.

    Args:
        path: the file.

    Raises:
        ValueError: a file that is truncated or corrupt, or holds anything but plain data.
    """
    return _plain(path, *_follow(path))


# ---- reading operations


def _operations(file):
    """(position, name, argument) of each operation of a pickle, up to and with STOP."""
    while True:
        position = file.tell()
        code = _exactly(file, 1)
        opcode = pickletools.code2op.get(code.decode("latin-1"))
        if opcode is None:
            raise ValueError(f"an unknown operation {code!r}")
        name = opcode.name
        if name in _SIZED:
            form, kind = _SIZED[name]
            (size,) = struct.unpack(form, _exactly(file, struct.calcsize(form)))
            argument = _string(file, size, kind)
        elif name in _LINES:
            start = file.tell()
            line = file.readline()
            if not line.endswith(b"\n"):
                raise EOFError("it ends within a line")
            argument = (
                _Stored(start, len(line) - 1, _LINES[name]) if len(line) > LONG else _decode(line[:-1], _LINES[name])
            )
        else:
            argument = None if opcode.arg is None else opcode.arg.reader(file)
        yield position, name, argument
        if name == "STOP":
            return


def _string(file, size, kind):
    if size < LONG:
        return _decode(_exactly(file, size), kind)
    position = file.tell()
    if position + size > os.fstat(file.fileno()).st_size:
        raise EOFError(f"it ends within {size} bytes")
    stored = _Stored(position, size, kind)
    if kind == "integer":
        return stored.read(file)
    file.seek(size, os.SEEK_CUR)
    return stored


def _exactly(file, size):
    if size < 0:
        raise ValueError(f"a length of {size}")
    data = file.read(size)
    if len(data) < size:
        raise EOFError("it ends before its end")
    return data


def _decode(data, kind):
    if kind == "bytes":
        return data
    if kind == "bytearray":
        return bytearray(data)
    if kind == "integer":
        return int.from_bytes(data, "little", signed=True)
    if kind == "quoted":
        if len(data) < 2 or data[:1] != data[-1:] or data[:1] not in b"'\"":
            raise ValueError("text without quotes")
        return codecs.escape_decode(data[1:-1])[0].decode("latin-1")
    if kind == "encoded":
        return data.decode("utf-8").encode("latin-1")
    if kind == "raw-encoded":
        return data.decode("raw-unicode-escape").encode("latin-1")
    return data.decode(kind, "surrogatepass" if kind == "utf-8" else "strict")


# ---- following them


def _follow(path):
    """The value of a pickle, with `PickledArray` and `_Stored` where the file was not read, and the file's status."""
    with open(path, "rb") as file, _Told(path):
        status, last_use = _status(file), {}
        for position, name, argument in _operations(file):
            if name in ("GET", "BINGET", "LONG_BINGET"):
                if not 0 <= argument < 2**63:
                    raise ValueError("a memo index out of range")
                last_use[argument] = position
        if file.read(1):
            raise ValueError("something follows its end")
        file.seek(0)
        machine = _Machine(last_use)
        for position, name, argument in _operations(file):
            machine.step(position, name, argument)
        value = machine.result()
        _check_whole(value)
        return value, status


def _check_whole(value):
    """Refuses what stands for no value of its own: a name, a dtype, an array that was never filled."""
    left, seen = [value], set()
    while left:
        part = left.pop()
        if type(part) in (_Name, _Dtype):
            raise _RefusedError(_shown(part))
        if type(part) is PickledArray and part.dtype is None:
            raise ValueError("an array without data")
        if type(part) in (list, tuple, dict) and id(part) not in seen:
            seen.add(id(part))
            left.extend(part.values() if type(part) is dict else part)


def _status(file):
    """What tells whether a file is the one that it was."""
    found = os.fstat(file.fileno())
    return found.st_size, found.st_mtime_ns, found.st_ino


class _Machine:
    """Follows a pickle's operations on a stack of plain values and stand-ins.

    Args:
        last_use: memo index -> position of the last operation that asks for it: nothing is kept for longer.
    """

    def __init__(self, last_use):
        self.last_use = last_use
        self.memo, self.memoized = {}, 0
        self.stack, self.below = [], []

    def result(self):
        if len(self.stack) != 1 or self.below:
            raise ValueError("something is left over at its end")
        return self.stack[0]

    def step(self, position, name, argument):
        stack = self.stack
        if name in _PUSHED:
            stack.append(argument)
        elif name in _CONSTANTS:
            stack.append(_CONSTANTS[name]())
        elif name in ("MEMOIZE", "PUT", "BINPUT", "LONG_BINPUT"):
            index = self.memoized if name == "MEMOIZE" else argument
            self.memoized += 1
            if self.last_use.get(index, -1) > position:
                self.memo[index] = stack[-1]
        elif name in ("GET", "BINGET", "LONG_BINGET"):
            if argument not in self.memo:
                raise IndexError(f"nothing at memo index {argument}")
            stack.append(self.memo[argument])
            if self.last_use[argument] == position:
                del self.memo[argument]
        elif name in ("GLOBAL", "STACK_GLOBAL"):
            if name == "GLOBAL":
                module, _, attribute = argument.partition(" ")
            else:
                attribute, module = stack.pop(), stack.pop()
            stack.append(_name(module, attribute))
        elif name in _STEPS:
            _STEPS[name](self)
        elif name not in ("PROTO", "FRAME", "STOP"):
            raise _RefusedError(f"the operation {name}" + (f" of {_shown(argument)}" if argument is not None else ""))

    def take(self):
        """What lies above the topmost mark."""
        above, self.stack = self.stack, self.below.pop()
        return above

    def mark(self):
        self.below.append(self.stack)
        self.stack = []

    def pop(self):
        if self.stack:
            self.stack.pop()
        else:
            self.take()

    def tuple_of(self, count):
        stack = self.stack
        stack[-count:] = [tuple(_last(stack, count))]

    def append(self):
        value = self.stack.pop()
        _of(list, self.stack[-1]).append(value)

    def appends(self):
        values = self.take()
        _of(list, self.stack[-1]).extend(values)

    def set_item(self):
        key, value = _last(self.stack, 2)
        del self.stack[-2:]
        _insert(self.stack[-1], (key, value))

    def set_items(self):
        items = self.take()
        _insert(self.stack[-1], items)

    def add_items(self):
        items = self.take()
        _of(set, self.stack[-1]).update(map(_key, items))

    def reduce(self):
        function, arguments = _last(self.stack, 2)
        self.stack[-2:] = [_call(function, arguments)]

    def build(self):
        target, state = _last(self.stack, 2)
        if type(target) not in (_Dtype, PickledArray):
            raise _RefusedError(f"a state for {_shown(target)}")
        del self.stack[-1]
        target.build(state)


_PUSHED = {*_SIZED, *_LINES, "INT", "BININT", "BININT1", "BININT2", "LONG", "FLOAT", "BINFLOAT"}
_CONSTANTS = {
    "NONE": lambda: None,
    "NEWTRUE": lambda: True,
    "NEWFALSE": lambda: False,
    "EMPTY_TUPLE": tuple,
    "EMPTY_LIST": list,
    "EMPTY_DICT": dict,
    "EMPTY_SET": set,
}
_STEPS = {
    "MARK": _Machine.mark,
    "POP": _Machine.pop,
    "POP_MARK": _Machine.take,
    "DUP": lambda machine: machine.stack.append(machine.stack[-1]),
    "TUPLE": lambda machine: _push(machine, tuple(machine.take())),
    "TUPLE1": lambda machine: machine.tuple_of(1),
    "TUPLE2": lambda machine: machine.tuple_of(2),
    "TUPLE3": lambda machine: machine.tuple_of(3),
    "LIST": lambda machine: _push(machine, machine.take()),
    "DICT": lambda machine: _push(machine, _insert({}, machine.take())),
    "FROZENSET": lambda machine: _push(machine, frozenset(map(_key, machine.take()))),
    "APPEND": _Machine.append,
    "APPENDS": _Machine.appends,
    "SETITEM": _Machine.set_item,
    "SETITEMS": _Machine.set_items,
    "ADDITEMS": _Machine.add_items,
    "REDUCE": _Machine.reduce,
    "BUILD": _Machine.build,
}


def _push(machine, value):  # the stack is another one once the values above a mark were taken
    machine.stack.append(value)


def _name(module, attribute):
    if type(module) is not str or type(attribute) is not str:
        raise ValueError("a name that is no text")
    kind = _KNOWN.get((module, attribute))
    if kind is None:
        raise _RefusedError(_shown(f"{module}.{attribute}"))
    return _Name(f"{module}.{attribute}", kind)


def _call(function, arguments):
    """What a call in the file amounts to; the only calls that there are."""
    if type(function) is not _Name:
        raise _RefusedError(f"a call of {_shown(function)}")
    kind, values = function.kind, _of(tuple, arguments)
    first, types = values[0] if values else None, tuple(type(value) for value in values)
    if kind == "dtype" and values:
        return _Dtype(*values)
    if kind == "array" and types[:1] == (_Name,) and first.kind == "ndarray":
        if values[1:] in (((0,), b"b"), ((0,), "b")):
            return PickledArray()
    elif kind == "frombuffer" and len(values) in (4, 5):
        array = PickledArray()
        array.fill(*values)
        return array
    elif kind == "scalar" and len(values) == 2:
        array = PickledArray(scalar=True)
        array.fill(values[1], first, (), "C")
        return array if types[1] is _Stored else array.read(None)
    elif kind in ("encode", "bytearray") and len(values) == 2 and values[1] in ("latin1", "latin-1"):
        wanted = bytes if kind == "encode" else bytearray
        if types[0] is str:
            return wanted(first.encode("latin-1"))
        if types[0] is _Stored and first.kind not in ("bytes", "bytearray"):
            return first.to(wanted)
    elif kind == "bytearray" and types == (_Stored,):
        return first.to(bytearray)
    elif kind == "bytearray" and types in ((), (bytes,)):
        return bytearray(*values)
    elif kind == "bytes" and not values:
        return b""
    elif kind == "complex" and types == (float, float):
        return complex(*values)
    elif kind in ("set", "frozenset") and types in ((), (list,)):
        return (set if kind == "set" else frozenset)(_key(value) for value in first or ())
    elif kind == "dict" and types in ((), (list,)):
        return _insert({}, [part for pair in first or () for part in _pair(pair)])
    raise _RefusedError(f"a call of {function.name!r} with other arguments than plain data has")


def _insert(target, items):
    """Put keys and values, one behind the other, into a dict; each key once."""
    if len(items) % 2:
        raise ValueError("a key without a value")
    for key, value in zip(items[::2], items[1::2], strict=True):
        if _key(key) in _of(dict, target):
            raise _RefusedError(f"the key {_shown(key)} twice in one dict")
        target[key] = value
    return target


def _pair(value):
    if type(value) not in (list, tuple) or len(value) != 2:
        raise ValueError("a pair that is none")
    return value


def _key(value):
    """A value that may be a key or in a set: plain, so that its hash is of Python's own making.

    Whole numbers beyond 64 bits and complex numbers are none: any number of them can be written that have one hash,
    and each would be compared with all before it. Tuples of numbers can be made so too, which costs time alone.
    """
    for part in value if type(value) is tuple else (value,):
        if isinstance(part, complex | np.complexfloating):
            raise _RefusedError(f"a complex number as a key ({_shown(value)})")
        if type(part) is int and not -(2**63) <= part < 2**64:
            raise _RefusedError(f"a whole number beyond 64 bits as a key ({_shown(value)})")
        if type(part) not in _ATOMS and not isinstance(part, np.generic):
            raise _RefusedError(f"a key that is no number and no short text ({_shown(value)})")
    return value


def _of(kind, value):
    if type(value) is not kind:
        raise ValueError(f"{_shown(value)} where a {kind.__name__} should be")
    return value


def _last(stack, count):
    if len(stack) < count:
        raise IndexError("it takes more from its stack than there is")
    return stack[-count:]


def _tokens(state):
    """A state to be compared by value and type: True is no 1 here."""
    return [(type(value), value if type(value) is int else None) for value in state]


# ---- what is handed out


def _plain(path, value, status):
    """The value with its arrays and long strings read from the file, whose status is the one it had."""
    with open(path, "rb") as file:
        _check_unchanged(path, file, status)
        with _Told(path):
            found = _read(value, file, {})
        _check_unchanged(path, file, status)  # written to meanwhile
        return found


def _check_unchanged(path, file, status):
    found = _status(file)
    if found != status:
        names = [n for n, a, b in zip(("size", "time of change", "inode"), found, status, strict=True) if a != b]
        raise ValueError(
            f"Expected {path} as it was when it was opened. Received: another {' and '.join(names)}.\n"
            "Open it anew, once nobody writes to it."
        )


def _read(value, file, done):
    """What is in several places is read once and is one object, as in the pickle."""
    if type(value) in (*_ATOMS, frozenset) or isinstance(value, np.generic):
        return value
    if id(value) in done:
        return done[id(value)]
    if type(value) in (PickledArray, _Stored):
        done[id(value)] = value.read(file)
    elif type(value) in (set, bytearray):
        done[id(value)] = value.copy()
    elif type(value) is list:
        out = done[id(value)] = []
        out.extend(_read(part, file, done) for part in value)
    elif type(value) is dict:
        out = done[id(value)] = {}
        out.update((key, _read(part, file, done)) for key, part in value.items())
    elif type(value) is tuple:
        done[id(value)] = tuple(_read(part, file, done) for part in value)
    else:
        raise _RefusedError(_shown(value))
    return done[id(value)]


def _shown(value):
    """A short text for a message, whatever the value is."""
    if type(value) is _Name:
        return repr(value.name)
    if type(value) is _Dtype:
        return f"dtype {value.dtype.str!r}"
    if type(value) in (str, bytes):
        return repr(value[:80])
    if type(value) is int and abs(value) < 10**20:
        return str(value)
    if type(value) is tuple and len(value) < 5 and all(type(n) is int and abs(n) < 10**20 for n in value):
        return str(value)
    return f"a {type(value).__name__}"


class _Told:
    """Turns whatever a broken or hostile file raises into one of two messages."""

    def __init__(self, path):
        self.path = path

    def __enter__(self):
        return self

    def __exit__(self, kind, error, trace):
        if isinstance(error, _RefusedError):
            raise ValueError(
                f"Expected NumPy arrays, numbers, text and built-in containers alone in {self.path}. "
                f"Received: {error}.\nNothing in the file was run. Do not open it with pickle.load; get it again."
            ) from None
        if isinstance(error, Exception) and not isinstance(error, OSError):
            reason = str(error).splitlines()[0][:120] if str(error) else kind.__name__
            raise ValueError(
                f"Expected a whole pickle of plain data. Received: {self.path} ({reason}).\n"
                "It is truncated or corrupt: get it again."
            ) from error
