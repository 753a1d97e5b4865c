"""Stand-ins for what a pickle says: names, long strings, dtypes and arrays. None of them runs code of the file."""

import codecs
import math
import re
from typing import IO, Any

import numpy as np

_MAX_AXES = 32
_MAX_SIDE = 2**31

_PLAIN_DTYPE = re.compile(r"b1|[iu][1248]|f[248]|c8|c16|[SU][1-9]\d{0,5}")
ATOMS = (str, bytes, int, float, complex, bool, type(None))


class RefusedError(Exception):
    """The file contains something other than plain data."""


class Name:
    """Stands for a name in the file; an inert value, which is never called."""

    __slots__ = ("kind", "name")

    def __init__(self, name, kind):
        self.name, self.kind = name, kind


class Stored:
    """A long string that is still in the file.

    Args:
        position, size: where it lies.
        kind: how it is written there, see `decode`.
        wanted: None: it is read as it is; bytes or bytearray: it is their Latin-1 text.
    """

    __slots__ = ("kind", "position", "size", "wanted")
    num_bytes = property(lambda self: self.size)

    def __init__(self, position, size, kind, wanted=None):
        self.position, self.size, self.kind, self.wanted = position, size, kind, wanted

    def to(self, wanted):
        """The same string, to be read as another type."""
        return Stored(self.position, self.size, self.kind, wanted)

    def read(self, file):
        """The string itself."""
        file.seek(self.position)
        found = decode(exactly(file, self.size), self.kind)
        if self.wanted is None:
            return found
        return self.wanted(found.encode("latin-1") if type(found) is str else found)


class Dtype:
    """A dtype as the file describes it; only a plain one passes."""

    __slots__ = ("dtype", "final")

    def __init__(self, name, *flags):
        if type(name) is not str or not _PLAIN_DTYPE.fullmatch(name):
            raise RefusedError(f"an array of dtype {shown(name)}")
        if len(flags) > 2 or not all(flag in (0, 1) for flag in flags):
            raise ValueError("a dtype of unknown form")
        self.dtype, self.final = np.dtype(name), False

    def build(self, state):
        """Take the byte order from the state; the rest must be what NumPy itself writes for such a dtype."""
        orders = ("|",) if self.dtype.byteorder == "|" else ("<", ">")
        if self.final or type(state) is not tuple or len(state) != 8 or state[1] not in orders:
            raise ValueError("a dtype of unknown form")
        if _tokens(state[2:]) != _tokens(self.dtype.__reduce__()[2][2:]):
            raise RefusedError(f"a forged dtype {self.dtype.str!r}")
        self.dtype, self.final = self.dtype.newbyteorder(state[1]), True


class PickledArray:
    """An array that is still in its file; only `shape` and `dtype` are known."""

    __slots__ = ("_axes", "_data", "_order", "_scalar", "_stored_shape", "dtype", "shape")
    num_bytes = property(lambda self: 0 if self.dtype is None else math.prod(self.shape) * self.dtype.itemsize)

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
        """Take what a file says of an array, if it fits together; axes are permuted as by NumPy 2's `_frombuffer`."""
        if type(dtype) is not Dtype or type(shape) is not tuple or order not in ("C", "F", "K"):
            raise ValueError("an array of unknown form")
        if (order == "K") != (axes is not None) or (axes is not None and type(axes) is not tuple):
            raise ValueError("an array of unknown form")
        if len(shape) > _MAX_AXES or not all(type(n) is int and 0 <= n < _MAX_SIDE for n in shape):
            raise ValueError(f"an array of shape {shown(shape)}")
        size = math.prod(shape) * dtype.dtype.itemsize
        if type(data) is Stored:
            least = most = data.size
            if data.kind not in ("bytes", "bytearray"):  # text of as many letters: protocols 0 to 2
                least = -(-data.size // (4 if data.kind == "quoted" else 6))
        elif type(data) in (bytes, bytearray, str):
            least = most = len(data)
        else:
            raise ValueError("an array without bytes")
        if not least <= size <= most:
            raise ValueError(f"an array of {most} bytes for shape {shown(shape)} of {dtype.dtype}")
        if axes is not None:
            if not all(type(k) is int for k in axes) or sorted(axes) != list(range(len(shape))):
                raise ValueError("an array of unknown form")
            self.shape, self._axes, order = tuple(shape[k] for k in axes), axes, "C"
        else:
            self.shape = shape
        self._stored_shape, self.dtype, self._data, self._order = shape, dtype.dtype, data, order

    def read(self, file: IO[bytes]) -> np.ndarray:
        """The array itself: writable, in native byte order, with memory of its own."""
        if self._data is None:
            raise ValueError("an array without data")
        data = self._data.read(file) if type(self._data) is Stored else self._data
        data = data.encode("latin-1") if type(data) is str else data
        if len(data) != self.num_bytes:
            raise ValueError(f"an array of {len(data)} bytes for shape {shown(self.shape)} of {self.dtype}")
        native = self.dtype.newbyteorder("=")
        values = np.frombuffer(data, self.dtype).astype(native)
        if native.kind == "b" and (values.view("uint8") > 1).any():
            raise ValueError("a bool that is neither 0 nor 1")
        if native.kind == "U" and values.size and values.view("uint32").max() > 0x10FFFF:
            raise ValueError("text with invalid letters")
        values = values.reshape(self._stored_shape, order=self._order)
        values = values if self._axes is None else values.transpose(self._axes)
        return values[()] if self._scalar else values


def _tokens(state):
    """A state's types and integers, for a comparison in which True differs from 1."""
    return [(type(value), value if type(value) is int else None) for value in state]


def exactly(file: IO[bytes], size: int) -> bytes:
    """So many bytes of a file; an error if there are fewer."""
    if size < 0:
        raise ValueError(f"a length of {size}")
    data = file.read(size)
    if len(data) < size:
        raise EOFError("it ends before its end")
    return data


def decode(data: bytes, kind: str) -> Any:
    """The value that bytes of a file stand for."""
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
    return data.decode(kind, "surrogatepass" if kind == "utf-8" else "strict")


def shown(value: Any) -> str:
    """A short text for a message, whatever the value is."""
    if type(value) is Name:
        return repr(value.name)
    if type(value) is Dtype:
        return f"dtype {value.dtype.str!r}"
    if type(value) in (str, bytes):
        return repr(value[:80])
    if type(value) is int and abs(value) < 10**20:
        return str(value)
    if type(value) is tuple and len(value) < 5 and all(type(n) is int and abs(n) < 10**20 for n in value):
        return str(value)
    return f"a {type(value).__name__}"
