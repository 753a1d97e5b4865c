"""The array cache: what is slow to decode is decoded once, to files that are read row by row.

A cache is a folder of `.npy` files of equal length and a `manifest.json`. Its name is a hash of its source and
settings, so another file, size or crop makes another one. It is built under a lock in a folder beside it; an
interrupted build is continued; the folder gets its name when it is whole. It can be deleted at any time.
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

from sbn_tf.core.files import write_atomically

from . import files
from .arrays import DiskArray, NpyWriter, row_crc32, row_sums, stored_rows

logger = logging.getLogger(__name__)

FORMAT = 1  # raised when the meaning of a cache's contents changes
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
    """Name, size and time of change of each regular file: other contents, another fingerprint."""
    found = []
    for path in paths:
        status = files.status(path)
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
    """The arrays of a cache, which is built first if it is missing, or if a file of it is cut short or missing.

    A flipped bit is found when its row is read (see `DiskArray`).

    Args:
        name: how the folder's name begins.
        source: JSON-able; everything that the contents depend on.
        arrays: name -> (shape of a row, dtype).
        produce: `produce(start)` yields pieces, name -> rows, from row `start` on, the same on every call.
        total: number of rows, for the progress bar and the check of free space, or a function that finds it, called
            only before a build; None: not known in advance.
        images: arrays `(N, H, W, C)` whose sums are kept, for their mean and standard deviation.
        cache: see `cache_folder`.
        unit: of the progress bar.

    Returns:
        name -> `DiskArray`.

    Raises:
        OSError: a folder that cannot be written to, or a full disk. The next call continues what was written.
    """
    digest = hashlib.sha256(json.dumps([FORMAT, source, arrays], sort_keys=True).encode()).hexdigest()[:12]
    folder = cache_folder(cache) / f"{name}-{digest}"
    columns = {name: (tuple(shape), np.dtype(dtype)) for name, (shape, dtype) in arrays.items()}
    sides: dict[str, tuple[tuple[int, ...], np.dtype]] = {name + CRC32: ((), np.dtype("uint32")) for name in arrays}
    sides |= {name + SUMS: ((arrays[name][0][-1], 2), np.dtype("float64")) for name in images}
    found = _open(folder, columns, sides, warn=False)
    if found is not None:
        return found
    with files.locked(folder, _writable(folder), f"builds {folder}"):
        found = _open(folder, columns, sides)  # another process may have built it
        if found is None:
            manifest = {"format": FORMAT, "source": source}
            _build(folder, columns, sides, manifest, produce, total, unit)
            found = _open(folder, columns, sides)
        return found


def _sides_of(rows, sides):
    """The CRC-32 of each row, and the sums of each image."""
    return {
        name: row_sums(rows[name.removesuffix(SUMS)]) if name.endswith(SUMS) else row_crc32(rows[name[: -len(CRC32)]])
        for name in sides
    }


def _open(folder, columns, sides, warn=True):
    """The arrays of a finished cache; None if there is none, or not a whole one."""
    if not folder.is_dir():
        return None
    try:
        manifest, side = json.loads((folder / "manifest.json").read_text("utf-8")), {}
        for name in sides:
            data = (folder / f"{name}.npy").read_bytes()
            if zlib.crc32(data) != manifest["crc32"][name]:
                raise ValueError(f"{name} is not what was written")
            side[name] = np.load(io.BytesIO(data), allow_pickle=False)
        found = {
            name: DiskArray(folder / f"{name}.npy", None, side[name + CRC32], side.get(name + SUMS)) for name in columns
        }
        wrong = [name for name, values in (found | side).items() if len(values) != manifest["rows"]]
        if wrong:
            raise ValueError(f"{wrong[0]} has not {manifest['rows']} rows")
    except (OSError, ValueError, KeyError, TypeError, EOFError) as error:
        if warn:
            logger.warning("the array cache %s is damaged (%s); it is made again", folder, str(error).splitlines()[0])
        return None
    return found


def _build(folder, columns, sides, manifest, produce, total, unit):
    partial = folder.with_name(folder.name + ".partial")
    every = columns | sides
    total = total() if callable(total) else total
    writers = {}
    try:
        with _writable(folder):
            partial.mkdir(exist_ok=True)
            start = _resumable_rows(partial, columns, sides)
            if total is not None:
                row_bytes = sum(int(np.prod(shape)) * dtype.itemsize for shape, dtype in every.values())
                files.check_room(partial, (total - start) * row_bytes)
            for name, (shape, dtype) in every.items():
                writers[name] = NpyWriter(partial / f"{name}.npy", shape, dtype, start)
        rows = _append_all(folder, writers, sides, produce, start, total, unit)
        with _writable(folder):
            for writer in writers.values():
                writer.close(finish=True)
            crc32 = {name: zlib.crc32((partial / f"{name}.npy").read_bytes()) for name in sides}
            content = json.dumps(manifest | {"rows": rows, "crc32": crc32}).encode()
            write_atomically(partial / "manifest.json", lambda file: file.write(content))
            if folder.exists():  # damaged
                shutil.rmtree(folder)
            os.replace(partial, folder)
    finally:  # interrupted, a broken source, a full disk: the next call continues what is written
        for writer in writers.values():
            with contextlib.suppress(OSError):  # the reason is on its way already
                writer.close()


def _append_all(folder, writers, sides, produce, start, total, unit):
    rows = start
    options = {"unit": unit, "mininterval": 1.0, "leave": False, "delay": 1.0}
    with tqdm(desc=f"caching {folder.name}", initial=start, total=total, **options) as bar:
        for piece in produce(start):
            found = piece | _sides_of(piece, sides)
            with _writable(folder):
                for name, values in found.items():
                    writers[name].append(values)
            rows = writers[name].rows
            bar.update(rows - bar.n)
    if total is not None and rows != total:
        raise ValueError(f"Expected {total} {unit}s for {folder.name}. Received: {rows}")
    return rows


def _resumable_rows(partial, columns, sides):
    """How many rows an interrupted build left: those that are whole, and that their CRC-32 and sums confirm.

    So nothing has to be forced to the disk in between; rows that a power cut spoilt are found and made again.
    """
    stored = {name: stored_rows(partial / f"{name}.npy", *column) for name, column in (columns | sides).items()}
    count = min(map(len, stored.values()))
    for start in range(0, count, CHUNK):
        part = {name: rows[start : min(start + CHUNK, count)] for name, rows in stored.items()}
        good = [
            (found == part[name]).reshape(len(found), -1).all(axis=1) for name, found in _sides_of(part, sides).items()
        ]
        if not np.all(good):
            return start + int(np.argmin(np.all(good, axis=0)))
    return count


def _writable(folder):
    kept = "the next call continues what is written"
    return files.writable(f"the array cache {folder.name}", folder.parent, kept, "SBN_TF_CACHE (or cache=)")
