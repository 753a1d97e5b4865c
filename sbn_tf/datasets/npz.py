"""Arrays of npz archives, whole or piece by piece; a broken file, or one with other than plain arrays, is refused."""

import contextlib
import io
import math
import os
import struct
import tokenize
import zipfile
import zlib
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from typing import IO

import numpy as np

from . import files
from .arrays import read_npy_header

PIECE_BYTES = 2**20  # decompressed at a time
MAX_BYTES = 2**28  # of arrays of one archive that are held whole
_MAX_ROW_BYTES = 2**26
_MAX_RATIO = 1032  # of deflate: two bits stand for 258 bytes at most
KINDS = {  # of dtypes; "uint8" is one too
    "numbers": "fiu",
    "numbers or booleans": "bfiu",
    "integers": "biu",
    "integers or text": "iuSU",
    "text": "U",
}
Form = tuple[tuple[int | str, ...], str]  # shape, kind

# Errors of zipfile, zlib and numpy on a broken file.
_BROKEN = (
    ValueError,
    OSError,
    EOFError,
    MemoryError,
    KeyError,
    RuntimeError,  # encrypted, or an unknown method of compression
    OverflowError,
    SyntaxError,  # of an array's header, as the next
    tokenize.TokenError,
    struct.error,
    zipfile.BadZipFile,
    zlib.error,
)


class _InPieces(io.BufferedReader):
    """Gives a few MB at most: zipfile reads a directory at once, however large the file says that it is."""

    def read(self, size=-1):
        return super().read(min(size, 4 * PIECE_BYTES) if size >= 0 else 2**17)  # all: from a directory's end on


@contextlib.contextmanager
def whole(path: str | os.PathLike) -> Iterator[zipfile.ZipFile]:
    """The archive at `path`; the errors of a broken one become a ValueError of two lines.

    A FileNotFoundError or PermissionError stays one. zipfile compares an array's CRC-32 when its last byte is read.
    """
    try:
        files.status(path)  # raises unless it is a regular file
        with _InPieces(io.FileIO(path)) as file, zipfile.ZipFile(file) as archive:
            yield archive
    except (FileNotFoundError, PermissionError) as error:
        raise type(error)(
            error.errno,
            f"Expected a file that can be read. Received: {path} ({error.strerror}).\n"
            "Check that it is there, and its permissions and those of its folder.",
        ) from error
    except _BROKEN as error:
        if "\n" in str(error):  # explained already
            raise
        raise ValueError(
            f"Expected a whole npz file of plain arrays. Received: {path} ({str(error) or type(error).__name__}).\n"
            "It is truncated, corrupt or not what it says: get it again."
        ) from error


@contextlib.contextmanager
def member(archive: zipfile.ZipFile, key: str) -> Iterator[tuple[IO[bytes], tuple[tuple[int, ...], bool, np.dtype]]]:
    """An array of an archive: its bytes as a file, and (shape, fortran_order, dtype), which say how many they are."""
    info = archive.getinfo(f"{key}.npy")
    if info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        raise ValueError(f"{key} is compressed by another method than deflate")
    with archive.open(info) as file:
        shape, fortran_order, dtype = read_npy_header(file)
        if dtype.hasobject or not dtype.itemsize or min(shape, default=0) < 0:
            raise ValueError(f"{key} is of {dtype}, shape {shape}")
        expected = file.tell() + math.prod(shape) * dtype.itemsize
        if info.file_size != expected:
            raise ValueError(f"{key} has {info.file_size} bytes, not {expected}")
        ratio = 1 if info.compress_type == zipfile.ZIP_STORED else _MAX_RATIO
        if info.file_size > ratio * os.path.getsize(str(archive.filename)):
            raise ValueError(f"{key} is said to have {info.file_size} bytes, more than the file can hold")
        yield file, (shape, fortran_order, dtype)


def _read_exactly(file: IO[bytes], num_bytes: int, key: str) -> bytes:
    """So many bytes; an EOFError that names the array if there are fewer."""
    data = file.read(num_bytes)
    if len(data) != num_bytes:
        raise EOFError(f"{key} ends early")
    return data


def read_array(archive: zipfile.ZipFile, key: str) -> np.ndarray:
    """A whole array of an archive; its bytes are held once."""
    with member(archive, key) as (file, (shape, fortran_order, dtype)):
        array = np.empty(shape, dtype, order="F" if fortran_order else "C")
        data = array.reshape(-1, order="A").view("uint8").data  # in the order of memory, which is that of the file
        for first in range(0, len(data), PIECE_BYTES):
            piece = data[first : first + PIECE_BYTES]
            piece[:] = _read_exactly(file, len(piece), key)
        return array


def read_arrays(archive: zipfile.ZipFile, keys: Iterable[str]) -> dict[str, np.ndarray]:
    """Whole arrays, by key; a ValueError, before one is read, if they are more than `MAX_BYTES` together."""
    num_bytes = {key: archive.getinfo(f"{key}.npy").file_size for key in keys}
    if sum(num_bytes.values()) > MAX_BYTES:
        largest = max(num_bytes, key=lambda key: num_bytes[key])
        raise ValueError(
            f"Expected arrays of at most {MAX_BYTES:,} bytes in {archive.filename}. Received: "
            f"{sum(num_bytes.values()):,}, most of them in {largest}.\nIt is another file, or text in it is padded: "
            "make it again."
        )
    return {key: read_array(archive, key) for key in num_bytes}


def read_rows(archive: zipfile.ZipFile, key: str, num_bytes: int = PIECE_BYTES) -> Iterator[np.ndarray]:
    """An array of an archive, in C order: some of its rows at a time, about `num_bytes` of them."""
    with member(archive, key) as (file, (shape, _, dtype)):
        row_bytes = math.prod(shape[1:]) * dtype.itemsize
        if row_bytes > _MAX_ROW_BYTES:
            raise ValueError(f"a row of {key} has {row_bytes:,} bytes, more than {_MAX_ROW_BYTES:,}")
        step = max(1, num_bytes // row_bytes)
        for first in range(0, shape[0], step):
            count = min(step, shape[0] - first)
            rows = np.frombuffer(_read_exactly(file, count * row_bytes, key), dtype)
            yield rows.reshape(count, *shape[1:])


def check_keys(archive: zipfile.ZipFile, keys: Iterable[str], path: str | os.PathLike) -> list[str]:
    """The names of an archive's arrays; a ValueError if one is there twice, or one of `keys` is missing."""
    found = [name.removesuffix(".npy") for name in archive.namelist()]
    often = [key for key, count in Counter(found).items() if count > 1]
    if often:
        raise ValueError(
            f"Expected each array once in {path}. Received: {often[0]} twice or more.\nMake the file again."
        )
    missing = [key for key in keys if key not in found]
    if missing:
        raise ValueError(
            f"Expected the arrays {sorted(keys)} in {path}. Received: {found}, without {missing}.\n"
            "It is another file, or not a whole one: make it again, or get it again."
        )
    return found


def check_forms(
    archive: zipfile.ZipFile, forms: Mapping[str, Form], path: str | os.PathLike, lengths: dict[str, int] | None = None
) -> dict[str, tuple[int, ...]]:
    """The shapes of arrays, from their headers; a ValueError unless each is of its form and not empty.

    Args:
        archive: of the arrays.
        forms: key -> (shape, kind). A shape has numbers, and names of lengths, as "N", which are the same in all
            arrays; a kind is one of `KINDS`, " in C order" or not.
        path: of the archive, for messages.
        lengths: what the names stand for, where it is known; it learns the others.
    """
    lengths, shapes = {} if lengths is None else lengths, {}
    for key, (expected, kind) in forms.items():
        with member(archive, key) as (_, (shape, fortran_order, dtype)):
            pass
        known, plain = dict(lengths), kind.removesuffix(" in C order")
        fits = len(shape) == len(expected) and 0 not in shape and (plain == kind or not fortran_order)
        fits &= dtype == np.uint8 if plain == "uint8" else dtype.kind in KINDS[plain]
        for name, n in zip(expected, shape, strict=True) if fits else ():
            fits &= n == (known.setdefault(name, n) if isinstance(name, str) else name)
        if not fits:
            form = ", ".join(map(str, expected)) + ("," if len(expected) == 1 else "")
            of = ", ".join(f"{name} = {lengths[name]}" for name in expected if name in lengths)
            order = ", Fortran order" if fortran_order else ""
            raise ValueError(
                f"Expected {key} ({form}), {kind}, not empty{f', with {of},' if of else ''} in {path}. "
                f"Received: shape {shape}, {dtype}{order}.\nMake the file again, or get it again."
            )
        lengths |= known
        shapes[key] = shape
    return shapes


def read_npz(
    path: str | os.PathLike, forms: Mapping[str, Form], optional: Mapping[str, Form] | None = None
) -> dict[str, np.ndarray]:
    """Arrays of an archive, by key; all headers are compared before the first array is read.

    Args:
        path: the file.
        forms: of arrays that must be there, see `check_forms`.
        optional: of arrays that are read if they are there.

    Raises:
        ValueError: the file is truncated, corrupt, contains objects, or lacks a key; an array is empty, not finite, or
            of another shape or kind.
        FileNotFoundError, PermissionError: the file cannot be read.
    """
    with whole(path) as archive:
        found = check_keys(archive, forms, path)
        wanted = {**forms, **{key: form for key, form in (optional or {}).items() if key in found}}
        check_forms(archive, wanted, path)
        arrays = read_arrays(archive, wanted)
    for key, array in arrays.items():
        if array.dtype.kind == "f" and not np.isfinite(array).all():
            raise ValueError(
                f"Expected finite numbers in {key} of {path}. Received: NaN or infinity.\n"
                "Mend them, or get the file again."
            )
    return arrays
