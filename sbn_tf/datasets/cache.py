"""The array cache: what is slow to decode is decoded once, to files that are read row by row.

A cache is a folder of `.npy` files of equal length and a `manifest.json`. It is named by a hash of its source
and settings, so another file, size or crop makes another one; it is built under a lock in a folder beside it,
goes on where it was interrupted, and gets its name when it is whole. It can be deleted at any time.
"""

import contextlib
import hashlib
import io
import json
import logging
import os
import shutil
import zlib
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

import numpy as np
from tqdm import tqdm

from . import files
from .arrays import DiskArray, NpyWriter, row_crc32, row_sums, stored_rows

__all__ = ["cache_folder", "cached", "fingerprint"]

logger = logging.getLogger(__name__)

FORMAT = 1  # raised when what a cache holds changes its meaning
CRC32, SUMS = "_crc32", "_sums"
CHUNK = 64  # rows checked at a time


def cache_folder(cache: str | os.PathLike | None = None) -> Path:
    """Where caches go: `cache`; else SBN_TF_CACHE; else `data/cache` of the checkout; else `~/.cache/sbn_tf`."""
    if cache is not None or os.environ.get("SBN_TF_CACHE"):
        return Path(cache or os.environ["SBN_TF_CACHE"]).expanduser()
    checkout = Path(__file__).resolve().parents[2]
    if (checkout / "pyproject.toml").exists():
        return checkout / "data" / "cache"
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache").expanduser() / "sbn_tf"


def fingerprint(paths: Iterable[Path]) -> list:
    """Name, size and time of change of each file: other contents, another fingerprint."""
    found = []
    for path in paths:
        status = os.stat(path)
        found.append([os.path.realpath(path), status.st_size, status.st_mtime_ns])
    return found


def cached(
    name: str,
    source: object,
    arrays: Mapping[str, tuple[tuple[int, ...], str]],
    produce: Callable[[int], Iterable[dict[str, np.ndarray]]],
    *,
    total: int | Callable[[], int] | None = None,
    images: tuple[str, ...] = ("images",),
    cache: str | os.PathLike | None = None,
    unit: str = "image",
) -> dict[str, DiskArray]:
    """The arrays of a cache; it is built first where it is not there, and anew where a file is cut short or missing.

    A flipped bit is found when its row is read (see `DiskArray`).

    Args:
        name: how the folder's name begins.
        source: JSON-able; all that decides the contents.
        arrays: name -> (shape of a row, dtype).
        produce: `produce(start)` yields pieces, name -> rows, from row `start` on, the same on every call.
        total: number of rows, for the progress bar and the check of free space, or a function that finds it, called
            only before a build; None: not known before.
        images: arrays `(N, H, W, C)` whose sums are kept, for their mean and standard deviation.
        cache: see `cache_folder`.
        unit: of the progress bar.

    Returns:
        name -> `DiskArray`.

    Raises:
        OSError: a folder that cannot be written to, or a full disk. What was written stays, and is gone on with.
    """
    digest = hashlib.sha256(json.dumps([FORMAT, source, arrays], sort_keys=True).encode()).hexdigest()[:12]
    folder = cache_folder(cache) / f"{name}-{digest}"
    found = _open(folder, arrays, images, tell=False)
    if found is not None:
        return found
    with files.locked(folder, _writable(folder), f"builds {folder}"):
        found = _open(folder, arrays, images)  # another process may have built it
        if found is None:
            _build(folder, source, arrays, produce, total, images, unit)
            found = _open(folder, arrays, images)
        return found


def _columns(arrays, images):
    """All arrays of a cache: those asked for, and the CRC-32 and sums of each of their rows."""
    columns = {name: (tuple(shape), np.dtype(dtype)) for name, (shape, dtype) in arrays.items()}
    columns |= {name + CRC32: ((), np.dtype("uint32")) for name in arrays}
    return columns | {name + SUMS: ((arrays[name][0][-1], 2), np.dtype("float64")) for name in images}


def _sides(arrays, images):
    """Names of the arrays that are kept beside those asked for."""
    return [name + CRC32 for name in arrays] + [name + SUMS for name in images]


def _open(folder, arrays, images, tell=True):
    """The arrays of a finished cache; None where there is none, or not a whole one."""
    if not folder.is_dir():
        return None
    try:
        manifest, side = json.loads((folder / "manifest.json").read_text("utf-8")), {}
        rows = manifest["rows"]
        for name in _sides(arrays, images):
            data = (folder / f"{name}.npy").read_bytes()
            if zlib.crc32(data) != manifest["crc32"][name]:
                raise ValueError(f"{name} is not what was written")
            side[name] = np.load(io.BytesIO(data), allow_pickle=False)
        found = {
            name: DiskArray(folder / f"{name}.npy", None, side[name + CRC32], side.get(name + SUMS)) for name in arrays
        }
        wrong = [name for name, values in (found | side).items() if len(values) != rows]
        if wrong:
            raise ValueError(f"{wrong[0]} has not {rows} rows")
    except (OSError, ValueError, KeyError, TypeError, EOFError) as error:
        if tell:
            logger.warning("the array cache %s is damaged (%s); it is made anew", folder, str(error).splitlines()[0])
        return None
    return found


def _build(folder, source, arrays, produce, total, images, unit):
    partial = folder.with_name(folder.name + ".partial")
    columns = _columns(arrays, images)
    total = total() if callable(total) else total
    writers = {}
    try:
        with _writable(folder):
            partial.mkdir(exist_ok=True)
            start = _resumable_rows(partial, columns, arrays, images)
            if total is not None:
                row_bytes = sum(int(np.prod(shape)) * dtype.itemsize for shape, dtype in columns.values())
                files.check_room(partial, (total - start) * row_bytes)
            for name, (shape, dtype) in columns.items():
                writers[name] = NpyWriter(partial / f"{name}.npy", shape, dtype, start)
        rows = _append_all(folder, writers, arrays, images, produce, start, total, unit)
        with _writable(folder):
            for writer in writers.values():
                writer.close(finish=True)
            sides = {name: zlib.crc32((partial / f"{name}.npy").read_bytes()) for name in _sides(arrays, images)}
            manifest = {"rows": rows, "crc32": sides, "format": FORMAT, "source": source}
            _write_json(partial / "manifest.json", manifest)
            if folder.exists():  # damaged
                shutil.rmtree(folder)
            os.replace(partial, folder)
    finally:  # interrupted, a broken source, a full disk: the next call goes on from what is written
        for writer in writers.values():
            with contextlib.suppress(OSError):  # the reason is on its way already
                writer.close()


def _append_all(folder, writers, arrays, images, produce, start, total, unit):
    rows = start
    options = {"unit": unit, "mininterval": 1.0, "leave": False, "delay": 1.0}
    bar = tqdm(desc=f"caching {folder.name}", initial=start, total=total, **options)
    try:
        for piece in produce(start):
            sides = {name + CRC32: row_crc32(piece[name]) for name in arrays}
            sides |= {name + SUMS: row_sums(piece[name]) for name in images}
            with _writable(folder):
                for name, values in (piece | sides).items():
                    writers[name].append(values)
            rows += len(piece[next(iter(arrays))])
            bar.update(rows - bar.n)
        if total is not None and rows != total:
            raise ValueError(f"Expected {total} {unit}s for {folder.name}. Received: {rows}")
    finally:
        bar.close()
    return rows


def _resumable_rows(partial, columns, arrays, images):
    """How many rows an interrupted build left: those that are whole, and that their CRC-32 and sums confirm.

    So nothing need be forced to the disk in between, and what a power cut spoilt is found and made anew.
    """
    stored = {name: stored_rows(partial / f"{name}.npy", *column) for name, column in columns.items()}
    count = min(map(len, stored.values()))
    for start in range(0, count, CHUNK):
        part = slice(start, min(start + CHUNK, count))
        good = np.ones(part.stop - start, bool)
        for name in arrays:
            good &= row_crc32(stored[name][part]) == stored[name + CRC32][part]
        for name in images:
            good &= (row_sums(stored[name][part]) == stored[name + SUMS][part]).all(axis=(1, 2))
        if not good.all():
            return start + int(np.argmin(good))
    return count


def _write_json(path, content):
    temporary = path.with_name(path.name + ".tmp")
    with open(temporary, "w", encoding="utf-8") as file:
        json.dump(content, file)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def _writable(folder):
    kept = "what is written is kept and gone on with"
    return files.writable(f"the array cache {folder.name}", folder.parent, kept, "SBN_TF_CACHE (or cache=)")
