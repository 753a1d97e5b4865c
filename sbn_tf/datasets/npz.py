"""Arrays of npz archives, whole or piece by piece; what is broken, or not plain numbers, is refused in two lines."""

import contextlib
import math
import struct
import tokenize
import zipfile
import zlib

import numpy as np

__all__ = ["member", "read_array", "read_exactly", "read_npz", "whole"]

# What a broken file makes zipfile, zlib and numpy raise.
_BROKEN = (
    ValueError,
    OSError,
    EOFError,
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
def whole(path):
    """The archive at `path`; what a broken one raises becomes a ValueError that says so.

    An array's CRC-32 is compared by zipfile when its last byte is read.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            yield archive
    except _BROKEN as error:
        if "\n" in str(error):  # said already
            raise
        raise ValueError(
            f"Expected a whole npz file of plain arrays. Received: {path} ({str(error) or type(error).__name__}).\n"
            "It is truncated, corrupt or not what it says: get it again."
        ) from error


@contextlib.contextmanager
def member(archive, key: str):
    """An array of an archive: its bytes as a file, and (shape, fortran_order, dtype), which tell how many they are."""
    info = archive.getinfo(f"{key}.npy")
    if info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        raise ValueError(f"{key} is compressed by another method than deflate")
    with archive.open(info) as file:
        version = np.lib.format.read_magic(file)
        read = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}[version]
        shape, fortran_order, dtype = read(file)
        if dtype.hasobject or min(shape, default=0) < 0:
            raise ValueError(f"{key} holds {dtype}, shape {shape}")
        expected = file.tell() + math.prod(shape) * dtype.itemsize
        if info.file_size != expected:
            raise ValueError(f"{key} has {info.file_size} bytes, not {expected}")
        yield file, (shape, fortran_order, dtype)


def read_exactly(file, num_bytes: int, key: str) -> bytes:
    """So many bytes; an EOFError that names the array where there are fewer."""
    data = file.read(num_bytes)
    if len(data) != num_bytes:
        raise EOFError(f"{key} ends early")
    return data


def read_array(archive, key: str) -> np.ndarray:
    """A whole array of an archive."""
    with member(archive, key) as (file, (shape, fortran_order, dtype)):
        data = read_exactly(file, math.prod(shape) * dtype.itemsize, key)
        return np.ndarray(shape, dtype, bytearray(data), order="F" if fortran_order else "C")


def read_npz(path, keys: dict[str, int | None], optional=()) -> dict[str, np.ndarray]:
    """Arrays of an archive, by key.

    Args:
        path: the file.
        keys: key -> number of axes, of arrays that must be there; None for any number.
        optional: keys that are read where they are there.

    Raises:
        ValueError: the file is truncated, corrupt, holds objects, or lacks a key or an axis; an array of `keys` is
            empty or not finite.
    """
    arrays = {}
    with whole(path) as archive:
        found = [name.removesuffix(".npy") for name in archive.namelist()]
        missing = [key for key in keys if key not in found]
        if not missing:
            arrays = {key: read_array(archive, key) for key in found if key in keys or key in optional}
    if missing:
        raise ValueError(f"Expected the arrays {sorted(keys)} in {path}. Received: {found}, without {missing}")
    for key, axes in keys.items():
        if axes is not None and arrays[key].ndim != axes:
            raise ValueError(f"Expected {key} with {axes} axes in {path}. Received: shape {arrays[key].shape}")
        if not len(arrays[key]):
            raise ValueError(f"Expected a {key} that is not empty in {path}. Received: shape {arrays[key].shape}")
        if arrays[key].dtype.kind == "f" and not np.isfinite(arrays[key]).all():
            raise ValueError(f"Expected finite numbers in {key} of {path}. Received: NaN or infinity.")
    return arrays
