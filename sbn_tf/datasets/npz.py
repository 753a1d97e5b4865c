"""Arrays of npz archives, whole or piece by piece; what is broken, or not plain numbers, is refused in two lines."""

import contextlib
import math
import os
import struct
import tokenize
import zipfile
import zlib
from collections.abc import Iterator, Mapping
from typing import IO

import numpy as np

__all__ = ["member", "read_array", "read_exactly", "read_npz", "whole"]

PIECE_BYTES = 2**20  # decompressed at a time
MAX_RATIO = 1032  # of deflate: two bits stand for 258 bytes at most
KINDS = {  # of dtypes
    "numbers": "fiu",
    "numbers or booleans": "bfiu",
    "whole numbers or text": "iuSU",
    "text": "U",
}

# What a broken file makes zipfile, zlib and numpy raise.
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


@contextlib.contextmanager
def whole(path: str | os.PathLike) -> Iterator[zipfile.ZipFile]:
    """The archive at `path`; what a broken one raises becomes a ValueError that says so, in two lines.

    A file that is not there, or may not be read, stays a FileNotFoundError or PermissionError. An array's CRC-32 is
    compared by zipfile when its last byte is read.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            yield archive
    except (FileNotFoundError, PermissionError) as error:
        raise type(error)(
            error.errno,
            f"Expected a file that can be read. Received: {path} ({error.strerror}).\n"
            "Check that it is there, and its permissions and those of its folder.",
        ) from error
    except _BROKEN as error:
        if "\n" in str(error):  # said already
            raise
        raise ValueError(
            f"Expected a whole npz file of plain arrays. Received: {path} ({str(error) or type(error).__name__}).\n"
            "It is truncated, corrupt or not what it says: get it again."
        ) from error


@contextlib.contextmanager
def member(archive: zipfile.ZipFile, key: str) -> Iterator[tuple[IO[bytes], tuple[tuple[int, ...], bool, np.dtype]]]:
    """An array of an archive: its bytes as a file, and (shape, fortran_order, dtype), which tell how many they are."""
    info = archive.getinfo(f"{key}.npy")
    if info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        raise ValueError(f"{key} is compressed by another method than deflate")
    with archive.open(info) as file:
        version = np.lib.format.read_magic(file)
        read = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}[version]
        shape, fortran_order, dtype = read(file)
        if dtype.hasobject or not dtype.itemsize or min(shape, default=0) < 0:
            raise ValueError(f"{key} holds {dtype}, shape {shape}")
        expected = file.tell() + math.prod(shape) * dtype.itemsize
        if info.file_size != expected:
            raise ValueError(f"{key} has {info.file_size} bytes, not {expected}")
        ratio = 1 if info.compress_type == zipfile.ZIP_STORED else MAX_RATIO
        if info.file_size > ratio * os.path.getsize(str(archive.filename)):
            raise ValueError(f"{key} is said to have {info.file_size} bytes, more than the file can hold")
        yield file, (shape, fortran_order, dtype)


def read_exactly(file: IO[bytes], num_bytes: int, key: str) -> bytes:
    """So many bytes; an EOFError that names the array where there are fewer."""
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
            piece[:] = read_exactly(file, len(piece), key)
        return array


def read_npz(
    path: str | os.PathLike,
    keys: Mapping[str, tuple[tuple[int | str, ...], str]],
    optional: Mapping[str, tuple[tuple[int | str, ...], str]] | None = None,
) -> dict[str, np.ndarray]:
    """Arrays of an archive, by key; all headers are compared before the first array is read.

    Args:
        path: the file.
        keys: key -> (shape, kind), of arrays that must be there. A shape has numbers, and names of lengths, as "N",
            which are the same in all arrays; a kind is one of `KINDS`.
        optional: key -> (shape, kind), of arrays that are read where they are there.

    Raises:
        ValueError: the file is truncated, corrupt, holds objects, or lacks a key; an array is empty, not finite, or
            of another shape or kind.
        FileNotFoundError, PermissionError: the file cannot be read.
    """
    wanted = {**keys, **(optional or {})}
    with whole(path) as archive:
        found = [name.removesuffix(".npy") for name in archive.namelist()]
        missing = [key for key in keys if key not in found]
        if missing:
            raise ValueError(
                f"Expected the arrays {sorted(keys)} in {path}. Received: {found}, without {missing}.\n"
                "Make the file anew, or get it again."
            )
        lengths = {}
        for key in wanted:
            if key in found:
                with member(archive, key) as (_, (shape, _, dtype)):
                    _check_form(key, shape, dtype, *wanted[key], lengths, path)
        arrays = {key: read_array(archive, key) for key in wanted if key in found}
    for key, array in arrays.items():
        if array.dtype.kind == "f" and not np.isfinite(array).all():
            raise ValueError(
                f"Expected finite numbers in {key} of {path}. Received: NaN or infinity.\n"
                "Mend them, or get the file again."
            )
    return arrays


def _check_form(key, shape, dtype, expected, kind, lengths, path):
    """Raises a ValueError unless an array is of that shape and kind; `lengths` learns what a name stands for."""
    known = dict(lengths)
    fits = len(shape) == len(expected) and dtype.kind in KINDS[kind] and 0 not in shape
    for name, n in zip(expected, shape, strict=True) if fits else ():
        fits &= n == (known.setdefault(name, n) if isinstance(name, str) else name)
    if not fits:
        form = ", ".join(map(str, expected)) + ("," if len(expected) == 1 else "")
        of = ", ".join(f"{name} = {lengths[name]}" for name in expected if name in lengths)
        raise ValueError(
            f"Expected {key} ({form}), {kind}, not empty{f', with {of},' if of else ''} in {path}. "
            f"Received: shape {shape}, {dtype}.\nMake the file anew, or get it again."
        )
    lengths |= known
