"""A small interpreter that follows a pickle's operations on a stack of plain values and stand-ins."""

import io
import os
import pickletools
import struct
import sys
from collections.abc import Callable
from typing import IO, Any

import numpy as np

from .pickle_values import ATOMS, Dtype, Name, PickledArray, RefusedError, Stored, decode, exactly, shown

_LONG = 1024  # bytes from which on a string stays in the file
MAX_BYTES = 1_500_000_000  # that a pickle may take while it is followed
_OPERATION_BYTES = 160  # what one takes at most, besides its argument
MAX_CALLS_BYTES = 2**28  # of what calls make: a short one may copy a long value

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
    ("numpy", "ndarray"): "ndarray",
    ("numpy", "dtype"): "dtype",
    ("_codecs", "encode"): "encode",
    ("collections", "OrderedDict"): "dict",
}
for _core in ("numpy.core", "numpy._core"):
    _KNOWN[f"{_core}.multiarray", "_reconstruct"] = "array"
    _KNOWN[f"{_core}.multiarray", "scalar"] = "scalar"
    _KNOWN[f"{_core}.numeric", "_frombuffer"] = "frombuffer"
_KNOWN |= {
    (module, name): name
    for module in ("builtins", "__builtin__")
    for name in ("set", "frozenset", "bytearray", "bytes", "complex")
}


def follow(file: IO[bytes]) -> Any:
    """The value of a pickle, with `PickledArray` and `Stored` where the file was not read."""
    last_use = {}
    for position, name, argument in _operations(file):
        if name in _GETS:
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
    return value


def _check_whole(value):
    """Refuses stand-ins that are no value: a name, a dtype, an array that was never filled."""
    left, seen = [value], set()
    while left:
        part = left.pop()
        if type(part) in (Name, Dtype):
            raise RefusedError(shown(part))
        if type(part) is PickledArray and part.dtype is None:
            raise ValueError("an array without data")
        if type(part) in (list, tuple, dict) and id(part) not in seen:
            seen.add(id(part))
            left.extend(part.values() if type(part) is dict else part)


def _operations(file):
    """(position, name, argument) of each operation of a pickle, up to and with STOP."""
    left = MAX_BYTES
    while True:
        position = file.tell()
        code = exactly(file, 1)
        opcode = pickletools.code2op.get(code.decode("latin-1"))
        if opcode is None:
            raise ValueError(f"an unknown operation {code!r}")
        name = opcode.name
        if name in _SIZED:
            form, kind = _SIZED[name]
            (size,) = struct.unpack(form, exactly(file, struct.calcsize(form)))
            argument = _string(file, size, kind)
        elif name in _LINES:
            argument = _line(file, _LINES[name])
        elif opcode.arg is not None and opcode.arg.n == pickletools.UP_TO_NEWLINE:
            lines = [file.readline(_LONG) for _ in range(2 if name in ("GLOBAL", "INST") else 1)]
            if not all(line.endswith(b"\n") for line in lines):
                raise EOFError(f"it ends within a line, or {name} has one of {_LONG} bytes or more")
            argument = opcode.arg.reader(io.BytesIO(b"".join(lines)))
        else:
            argument = None if opcode.arg is None else opcode.arg.reader(file)
        left -= _OPERATION_BYTES + sys.getsizeof(argument)
        if left < 0:
            raise ValueError(f"more than {MAX_BYTES:,} bytes of small values")
        yield position, name, argument
        if name == "STOP":
            return


def _line(file, kind):
    """A string that ends with its line, of any length."""
    start = file.tell()
    line = file.readline(_LONG)
    size, piece = len(line), line
    while not piece.endswith(b"\n"):
        piece = file.readline(2**20)
        size += len(piece)
        if not piece:
            raise EOFError("it ends within a line")
    return decode(line[:-1], kind) if size < _LONG else Stored(start, size - 1, kind)


def _string(file, size, kind):
    if size < _LONG:
        return decode(exactly(file, size), kind)
    position = file.tell()
    if position + size > os.fstat(file.fileno()).st_size:
        raise EOFError(f"it ends within {size} bytes")
    if kind == "integer":
        raise RefusedError(f"a whole number of {size} bytes")
    file.seek(size, os.SEEK_CUR)
    return Stored(position, size, kind)


class _Machine:
    """Follows a pickle's operations on a stack of plain values and stand-ins.

    Args:
        last_use: memo index -> position of the last operation that asks for it; nothing is kept longer than that.
    """

    def __init__(self, last_use):
        self.last_use = last_use
        self.memo, self.memoized = {}, 0
        self.stack, self.below = [], []
        self.left = MAX_CALLS_BYTES

    def result(self):
        if len(self.stack) != 1 or self.below:
            raise ValueError("something is left over at its end")
        return self.stack[0]

    def step(self, position, name, argument):
        stack = self.stack
        if name in _PUSHED:
            stack.append(argument)
        elif name in _EMPTY:
            stack.append(_EMPTY[name]())
        elif name in ("MEMOIZE", "PUT", "BINPUT", "LONG_BINPUT"):
            index = self.memoized if name == "MEMOIZE" else argument
            self.memoized += 1
            if self.last_use.get(index, -1) > position:
                self.memo[index] = stack[-1]
        elif name in _GETS:
            if argument not in self.memo:
                raise IndexError(f"nothing at memo index {argument}")
            stack.append(self.memo[argument])
            if self.last_use[argument] == position:
                del self.memo[argument]
        elif name in ("GLOBAL", "STACK_GLOBAL"):
            module, attribute = argument.split(" ", 1) if name == "GLOBAL" else self._popped(2)
            stack.append(_name(module, attribute))
        elif name == "MARK":
            self.below.append(stack)
            self.stack = []
        elif name == "POP" and stack:
            stack.pop()
        elif name in ("POP", "POP_MARK"):
            self._taken()
        elif name == "DUP":
            stack.append(stack[-1])
        elif name in ("TUPLE1", "TUPLE2", "TUPLE3"):
            stack.append(tuple(self._popped(int(name[-1]))))
        elif name in _MADE:
            values = self._taken()
            self.stack.append(_MADE[name](values))
        elif name in _FILLED:
            count, fill = _FILLED[name]
            values = self._popped(count) if count else self._taken()
            fill(self.stack[-1], values)
        elif name == "REDUCE":
            stack.append(_call(*self._popped(2)))
            self.left -= sys.getsizeof(stack[-1])
            if self.left < 0:
                raise ValueError(f"calls that make more than {MAX_CALLS_BYTES:,} bytes")
        elif name == "BUILD":
            (state,) = self._popped(1)
            if type(stack[-1]) not in (Dtype, PickledArray):
                raise RefusedError(f"a state for {shown(stack[-1])}")
            stack[-1].build(state)
        elif name not in ("PROTO", "FRAME", "STOP"):
            raise RefusedError(f"the operation {name}" + (f" of {shown(argument)}" if argument is not None else ""))

    def _taken(self):
        """The values above the topmost mark."""
        above, self.stack = self.stack, self.below.pop()
        return above

    def _popped(self, count):
        if len(self.stack) < count:
            raise IndexError("it takes more from its stack than there is")
        values = self.stack[-count:]
        del self.stack[-count:]
        return values


def _name(module, attribute):
    if type(module) is not str or type(attribute) is not str:
        raise ValueError("a name that is no text")
    kind = _KNOWN.get((module, attribute))
    if kind is None:
        raise RefusedError(shown(f"{module}.{attribute}"))
    return Name(f"{module}.{attribute}", kind)


def _call(function, arguments):
    """The value of a call in the file; no other calls are possible."""
    if type(function) is not Name:
        raise RefusedError(f"a call of {shown(function)}")
    kind, values = function.kind, _of(tuple, arguments)
    first, types = values[0] if values else None, tuple(type(value) for value in values)
    if kind == "dtype" and values:
        return Dtype(*values)
    if kind == "array" and types[:1] == (Name,) and first.kind == "ndarray":
        if values[1:] in (((0,), b"b"), ((0,), "b")):
            return PickledArray()
    elif kind == "frombuffer" and len(values) in (4, 5):
        array = PickledArray()
        array.fill(*values)
        return array
    elif kind == "scalar" and len(values) == 2:
        array = PickledArray(scalar=True)
        array.fill(values[1], first, (), "C")
        return array if types[1] is Stored else array.read(None)
    elif kind in ("encode", "bytearray") and len(values) == 2 and values[1] in ("latin1", "latin-1"):
        wanted = bytes if kind == "encode" else bytearray
        if types[0] is str:
            return wanted(first.encode("latin-1"))
        if types[0] is Stored and first.kind not in ("bytes", "bytearray"):
            return first.to(wanted)
    elif kind == "bytearray" and types == (Stored,):
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
    raise RefusedError(f"a call of {function.name!r} with other arguments than plain data has")


def _insert(target, items):
    """Put alternating keys and values into a dict; refuses a key that is there."""
    if len(items) % 2:
        raise ValueError("a key without a value")
    for key, value in zip(items[::2], items[1::2], strict=True):
        if _key(key) in _of(dict, target):
            raise RefusedError(f"the key {shown(key)} twice in one dict")
        target[key] = value
    return target


def _pair(value):
    if type(value) not in (list, tuple) or len(value) != 2:
        raise ValueError("something else than a pair")
    return value


def _key(value):
    """The value, if it may be a key or in a set: plain, so that its hash is Python's own.

    A file can contain any number of tuples, complex numbers and whole numbers beyond 64 bits with the same hash, and
    each would be compared with all before it: these are refused.
    """
    if isinstance(value, complex | np.complexfloating):
        raise RefusedError(f"a complex number as a key ({shown(value)})")
    if type(value) is int and not -(2**63) <= value < 2**64:
        raise RefusedError(f"a whole number beyond 64 bits as a key ({shown(value)})")
    if type(value) not in ATOMS and not isinstance(value, np.generic):
        raise RefusedError(f"a key that is no number and no short text ({shown(value)})")
    return value


def _of(kind, value):
    if type(value) is not kind:
        raise ValueError(f"{shown(value)} where a {kind.__name__} should be")
    return value


_GETS = ("GET", "BINGET", "LONG_BINGET")
_PUSHED = {*_SIZED, *_LINES, "INT", "BININT", "BININT1", "BININT2", "LONG", "FLOAT", "BINFLOAT"}
_EMPTY: dict[str, Callable[[], Any]] = {f"EMPTY_{kind.__name__.upper()}": kind for kind in (tuple, list, dict, set)}
_EMPTY |= {"NONE": lambda: None, "NEWTRUE": lambda: True, "NEWFALSE": lambda: False}
# Operations that make a value of what lies above the mark.
_MADE = {
    "TUPLE": tuple,
    "LIST": list,
    "DICT": lambda items: _insert({}, items),
    "FROZENSET": lambda items: frozenset(map(_key, items)),
}
# Operations that put values into the container below them: as many values, 0: those above the mark.
_FILLED = {
    "APPEND": (1, lambda target, values: _of(list, target).extend(values)),
    "APPENDS": (0, lambda target, values: _of(list, target).extend(values)),
    "SETITEM": (2, lambda target, values: _insert(target, values)),
    "SETITEMS": (0, lambda target, values: _insert(target, values)),
    "ADDITEMS": (0, lambda target, values: _of(set, target).update(map(_key, values))),
}
