"""Arrays that stay on disk: rows of a `.npy` file, read when they are asked for and checked as they are read."""

import io
import itertools
import os
import threading
import tokenize
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO

import numpy as np
from numpy.typing import DTypeLike

__all__ = ["DiskArray"]

Index = slice | Sequence[int] | np.ndarray  # of rows: integers, or a bool for each

_ONE_AT_A_TIME = threading.Lock()


def row_crc32(rows: np.ndarray) -> np.ndarray:
    """CRC-32 of the bytes of each row, `(N,)` uint32."""
    rows = np.ascontiguousarray(rows)
    if not rows.size:
        return np.full(len(rows), zlib.crc32(b""), "uint32")
    views = rows.reshape(len(rows), -1).view("uint8")
    return np.fromiter((zlib.crc32(row.data) for row in views), "uint32", len(rows))


def row_sums(images: np.ndarray) -> np.ndarray:
    """Sum and sum of squares of each image's channels, `(N, C, 2)` float64; exact for uint8."""
    flat = images.reshape(len(images), -1, images.shape[-1])
    if images.dtype == np.uint8:
        parts = (flat.sum(1, dtype="uint64"), np.square(flat, dtype="uint16").sum(1, dtype="uint64"))
    else:
        parts = (flat.sum(1, dtype="float64"), np.square(flat, dtype="float64").sum(1))
    return np.stack(parts, -1).astype("float64")


class DiskArray:
    """A `.npy` file as an array of its shape and dtype; only the rows that are indexed are read into memory.

    `images[3]`, `images[10:20]` and `images[[5, 2]]` read just those rows into an ordinary array; `select` gives other
    rows without reading any; `np.asarray(images)` reads all. Each row that is read is compared with its CRC-32, so a
    flipped bit is an error.

    Reads are plain file reads, not a memory map: pages of a map count as memory of the process (an epoch of
    ChestMNIST at 224 pixels would show as 4 GB), and a map of a file that is cut short kills the process.

    Args:
        path: `.npy` file in C order.
        rows: `(N,)` integers, which of its rows, in which order; None: all.
        crc32: `(rows of the file,)` uint32, of `row_crc32`; None: not checked.
        sums: `(rows of the file, C, 2)`, of `row_sums`; None: not known.

    Raises:
        ValueError: a file that is not a whole `.npy` array; in reading, rows that are cut short or changed.
    """

    def __init__(
        self,
        path: str | os.PathLike,
        rows: np.ndarray | None = None,
        crc32: np.ndarray | None = None,
        sums: np.ndarray | None = None,
    ):
        self.path, self._rows, self._crc32, self._sums = Path(path), rows, crc32, sums
        self.dtype, whole, self._offset = _read_header(self.path)
        if rows is not None and len(rows) and not (rows.min() >= 0 and rows.max() < whole[0]):
            raise IndexError(f"Expected rows of 0 to {whole[0] - 1} in {path}. Received: {rows.min()} to {rows.max()}")
        self.shape = (whole[0] if rows is None else len(rows), *whole[1:])
        self._row_bytes = int(np.prod(whole[1:])) * self.dtype.itemsize
        self._file = None

    keeps: object = None  # what has to live as long as these rows or others selected from them, as a temporary folder
    ndim = property(lambda self: len(self.shape))
    size = property(lambda self: int(np.prod(self.shape)))
    nbytes = property(lambda self: self.size * self.dtype.itemsize)

    def __del__(self):
        if getattr(self, "_file", None) is not None:
            self._file.close()

    def __len__(self):
        return self.shape[0]

    def __repr__(self):
        return f"DiskArray(shape={self.shape}, dtype={self.dtype}, path={str(self.path)!r})"

    def __copy__(self):
        return self  # rows never change

    def __deepcopy__(self, memo):
        return self

    def __reduce__(self):  # a pickle names the file, and does not contain or keep it
        return type(self), (self.path, self._rows, self._crc32, self._sums)

    def __getitem__(self, key) -> np.ndarray:
        first, *rest = key if isinstance(key, tuple) else (key,)
        if first is None or first is Ellipsis:
            return self[:][key]
        index = np.arange(len(self))[first]
        found = self._read(index.ravel()).reshape(*index.shape, *self.shape[1:])
        return found[(*[slice(None)] * np.ndim(index), *rest)] if rest else found

    def __iter__(self):
        return (self[k] for k in range(len(self)))

    def __array__(self, dtype=None, copy=None):
        if copy is False:
            raise ValueError("Expected copy=None or True: a DiskArray has to be read. Received: copy=False")
        return self[:] if dtype is None else self[:].astype(dtype)

    def select(self, index: Index) -> "DiskArray":
        """The rows of `index` (integers, a slice or a bool per row), not read yet."""
        rows = np.arange(len(self)) if self._rows is None else self._rows
        found = DiskArray(self.path, rows[index], self._crc32, self._sums)
        found.keeps = self.keeps
        return found

    def crc32(self) -> np.ndarray:
        """CRC-32 of each row, `(N,)` uint32; if they are known, nothing is read."""
        if self._crc32 is not None:
            return self._crc32 if self._rows is None else self._crc32[self._rows]
        return np.concatenate([row_crc32(part) for part in self.pieces()])

    def sums(self) -> np.ndarray:
        """`row_sums` of the images; if they are known, nothing is read."""
        if self._sums is not None:
            return self._sums if self._rows is None else self._sums[self._rows]
        return np.concatenate([row_sums(part) for part in self.pieces()])

    def pieces(self, num_bytes: int = 2**24) -> Iterator[np.ndarray]:
        """All rows in order, as arrays of about `num_bytes`."""
        step = max(1, num_bytes // max(self._row_bytes, 1))
        return (self[start : start + step] for start in range(0, len(self), step))

    def _read(self, index):
        rows = index if self._rows is None else self._rows[index]
        out = np.empty((len(rows), *self.shape[1:]), self.dtype)
        if not out.size:
            return out
        file = self._opened()
        view = memoryview(out.reshape(len(rows), -1).view("uint8")).cast("B")
        starts = np.flatnonzero(np.diff(rows, prepend=rows[0] - 2) != 1)  # runs of rows that follow one another
        for start, stop in itertools.pairwise([*starts.tolist(), len(rows)]):
            place = self._offset + int(rows[start]) * self._row_bytes
            part = view[start * self._row_bytes : stop * self._row_bytes]
            while len(part):
                count = _read_at(file, part, place)
                if not count:
                    raise self._damaged(f"it ends before row {rows[stop - 1]}")
                part, place = part[count:], place + count
        if self._crc32 is not None:
            wrong = rows[row_crc32(out) != self._crc32[rows]]
            if len(wrong):
                raise self._damaged(f"row {wrong[0]} is not what was written")
        return out

    def _opened(self):
        if self._file is None:
            try:
                self._file = open(self.path, "rb", buffering=0)  # noqa: SIM115 - closed with this array
            except FileNotFoundError:
                raise self._damaged("it is gone") from None
        return self._file

    def _damaged(self, why):
        return ValueError(
            f"Expected {self.path} as it was written. Received: {why}.\n"
            f"Delete the folder {self.path.parent}: it is made again from the source."
        )


def _read_at(file, part, place):
    """Read some or all bytes of `part` from `place` on; safe with threads and forked processes."""
    if hasattr(os, "preadv"):
        return os.preadv(file.fileno(), [part], place)
    with _ONE_AT_A_TIME:  # Windows
        file.seek(place)
        return file.readinto(part)


def read_npy_header(file: IO[bytes]) -> tuple[tuple[int, ...], bool, np.dtype]:
    """Shape, whether in Fortran order, and dtype, from where a `.npy` array begins."""
    version = np.lib.format.read_magic(file)
    if version != (1, 0):  # others are for records; their headers may be said to have 4 GB
        raise ValueError(f"version {version} of the format")
    return np.lib.format.read_array_header_1_0(file)


def _read_header(path):
    try:
        with open(path, "rb") as file:
            shape, fortran_order, dtype = read_npy_header(file)
            offset = file.tell()
        expected = offset + int(np.prod(shape)) * dtype.itemsize
        if fortran_order or dtype.hasobject or not shape:
            raise ValueError(f"{dtype}, shape {shape}, fortran_order={fortran_order}")
        if os.path.getsize(path) != expected:
            raise ValueError(f"{os.path.getsize(path)} bytes, not {expected}")
    except (OSError, ValueError, KeyError, EOFError, SyntaxError, tokenize.TokenError) as error:
        raise ValueError(
            f"Expected a whole .npy file of plain numbers in C order. Received: {path} ({error}).\n"
            "It is truncated, corrupt or missing: delete its folder, and it is made again."
        ) from error
    return dtype, shape, offset


def stored_rows(path: str | os.PathLike, row_shape: tuple[int, ...], dtype: DTypeLike) -> np.ndarray:
    """The whole rows of a file that an `NpyWriter` left, mapped; none if it is missing or of another kind."""
    dtype = np.dtype(dtype)
    header = _header(0, row_shape, dtype)
    try:
        with open(path, "rb") as file:
            row_bytes = max(1, int(np.prod(row_shape)) * dtype.itemsize)
            count = max(0, os.path.getsize(path) - len(header)) // row_bytes
            if file.read(len(header)) in (header, _header(count, row_shape, dtype)) and count:
                return np.memmap(path, dtype, "r", len(header), (count, *row_shape))
    except OSError:
        pass
    return np.empty((0, *row_shape), dtype)


def _header(rows, row_shape, dtype):
    """A `.npy` header; numpy leaves room in it for any number of rows."""
    file = io.BytesIO()
    header = {"descr": np.lib.format.dtype_to_descr(dtype), "fortran_order": False, "shape": (rows, *row_shape)}
    np.lib.format.write_array_header_1_0(file, header)
    return file.getvalue()


class NpyWriter:
    """A `.npy` file that grows by rows; `np.load` reads it once it is finished.

    Args:
        path: the file; if it exists, it is continued.
        row_shape, dtype: of one row.
        rows: how many of its rows to keep; those behind are cut off.
    """

    def __init__(self, path: str | os.PathLike, row_shape: tuple[int, ...], dtype: DTypeLike, rows: int = 0):
        self.row_shape, self.dtype, self.rows = tuple(row_shape), np.dtype(dtype), rows
        self._file = open(path, "r+b" if Path(path).exists() else "w+b")  # noqa: SIM115 - closed by close()
        header = _header(0, self.row_shape, self.dtype)
        self._file.write(header)
        self._file.truncate(len(header) + rows * int(np.prod(row_shape)) * self.dtype.itemsize)
        self._file.seek(0, os.SEEK_END)

    def append(self, rows: np.ndarray) -> None:
        """Write rows behind the others; raises ValueError if their shape or dtype is another."""
        if rows.shape[1:] != self.row_shape or rows.dtype != self.dtype:
            raise ValueError(f"Expected rows {self.row_shape} {self.dtype}. Received: {rows.shape[1:]} {rows.dtype}")
        self._file.write(np.ascontiguousarray(rows).data.cast("B") if rows.size else b"")
        self._file.flush()  # a killed process loses no more than it was writing
        self.rows += len(rows)

    def close(self, finish: bool = False) -> None:
        """Close the file; `finish` first writes its length into its header, and waits until all is on the disk."""
        try:
            if finish and not self._file.closed:
                self._file.seek(0)
                self._file.write(_header(self.rows, self.row_shape, self.dtype))
                self._file.flush()
                os.fsync(self._file.fileno())
        finally:
            self._file.close()
