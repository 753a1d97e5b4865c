"""Finding and writing files, and checks that several readers share. Errors say what to do."""

import contextlib
import errno
import fnmatch
import hashlib
import logging
import math
import os
import shutil
import stat
import unicodedata
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from io import BufferedReader
from pathlib import Path

import filelock
import numpy as np
from PIL import Image

from .base import Card

__all__ = ["find", "resize_images"]

logger = logging.getLogger(__name__)

Folder = str | os.PathLike | None  # None: the default
_IGNORED = ("thumbs.db", "desktop.ini")  # what Windows leaves in a folder of images


def roots(root: str | os.PathLike | None = None) -> list[Path]:
    """Folders to look in: `root`; else SBN_TF_DATA; else `data/` here, then `data/` beside the package."""
    if root is not None:
        return [Path(root).expanduser()]
    if os.environ.get("SBN_TF_DATA"):
        return [Path(os.environ["SBN_TF_DATA"]).expanduser()]
    return list(dict.fromkeys([Path.cwd() / "data", Path(__file__).resolve().parents[2] / "data"]))


def find(card: Card, root: str | os.PathLike | None, places: Sequence[str | os.PathLike]) -> Path:
    """First of `places` (paths under a data root) that is there.

    Raises:
        FileNotFoundError: none is; it says where it looked, where to get the data and where to put them.
    """
    folders = roots(root)
    for folder in folders:
        for place in places:
            if (folder / place).exists():
                return folder / place
    looked = " and ".join(str(folder) for folder in folders)
    raise FileNotFoundError(
        f"Expected {card.name!r} as {' or '.join(map(str, places))} in {looked}. Received: nothing there.\n"
        f"Get it from {card.source}, put it there, or set SBN_TF_DATA (or root=) to the folder that it is in."
    )


def same_text(text: str) -> str:
    """`text` in Unicode's composed form (NFC): an e with an accent may be one letter in a csv and two on a disk."""
    return unicodedata.normalize("NFC", text)


def listed(folder: Path, pattern: str = "*", deep: bool = False) -> dict[str, Path]:
    """The files of a folder that count, of a pattern: name below it, with slashes and as `same_text`, -> path; sorted.

    Hidden files do not count: on a disk that is not its own, macOS writes a `._a.png` beside each a.png. Nor do hidden
    folders, where it looks into folders (`deep`), and what Windows leaves.

    Raises:
        ValueError: two files with names that look the same.
    """
    found: dict[str, Path] = {}
    for place, folders, names in os.walk(folder):
        below = Path(place).relative_to(folder).as_posix() + "/"
        folders[:] = sorted(name for name in folders if deep and not name.startswith("."))
        for file in sorted(fnmatch.filter(names, pattern)):
            if file.startswith(".") or file.lower() in _IGNORED:
                continue
            name = same_text(f"{below}{file}".removeprefix("./"))
            if name in found:
                raise ValueError(
                    f"Expected one file of each name in {folder}. Received: {name} twice, in two forms of Unicode.\n"
                    "Remove or rename one of them."
                )
            found[name] = Path(place, file)
    return found


def status(path: str | os.PathLike) -> os.stat_result:
    """Of a regular file. A ValueError for others: a named pipe may make its reader wait for ever, a device not end."""
    found = os.stat(path)
    if not stat.S_ISREG(found.st_mode):
        raise ValueError(
            f"Expected a regular file. Received: {path}, a folder, a pipe or a device.\nPut the file itself there."
        )
    return found


def open_file(path: str | os.PathLike) -> BufferedReader:
    """A regular file, opened to be read; raises as `status`."""
    status(path)
    return open(path, "rb")


def check_digest(path: str | os.PathLike, algorithm: str, digest: str, what: object, advice: str) -> None:
    """Raises a ValueError about `what`, with `advice` at its end, unless the file has that "md5" or "sha256"."""
    with open_file(path) as file:
        found = hashlib.file_digest(file, algorithm).hexdigest()
    if found != digest:
        raise ValueError(f"Expected {algorithm} {digest} for {what}. Received: {found}{advice}")


def is_integer(value: object, least: float = -math.inf) -> bool:
    """Whether it is a whole number of `least` or more; True and False are none."""
    return not isinstance(value, bool) and hasattr(value, "__index__") and int(value) >= least


def check_option(name: str, value: object, options: Sequence[str]) -> None:
    """Raises a ValueError unless the value is one of the options."""
    if value not in options:
        raise ValueError(f"Expected {name} one of {tuple(options)}. Received: {name}={value!r}")


@contextlib.contextmanager
def writable(what: str, folder: str | os.PathLike, kept: str, instead: str) -> Iterator[None]:
    """Rewrites an OSError's message: it says what was expected, room or a writable folder, and what to do.

    Args:
        what: what is being written.
        folder: where it is written.
        kept: what happens, if the disk is full, to what has been written.
        instead: how to name another folder.
    """
    try:
        yield
    except OSError as error:
        reason = error.strerror or str(error)
        if error.errno in {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}:
            expected, received = f"room for {what}", f"a full disk ({reason})"
            advice = f"Free some, or set {instead} to another disk; {kept}."
        else:
            expected, received = f"a folder for {what} that can be written to", f"{folder} ({reason})"
            advice = f"Set {instead} to another folder."
        raise OSError(error.errno, f"Expected {expected}. Received: {received}.\n{advice}") from error


@contextlib.contextmanager
def locked(path: Path, writing: AbstractContextManager, does: str) -> Iterator[None]:
    """Lets one process at a time write `path`; another one waits, with a warning.

    Args:
        path: of a file or folder; its folder is made, and the lock lies beside it.
        writing: a `writable`, for errors in making the lock.
        does: what the other process is doing, for the warning.
    """
    with writing:
        path.parent.mkdir(parents=True, exist_ok=True)
        lock = filelock.FileLock(f"{path}.lock")
        try:
            lock.acquire(timeout=0)
        except filelock.Timeout:
            logger.warning("another process %s; waiting for it", does)
            lock.acquire()
    try:
        yield
    finally:
        lock.release()


def check_room(folder: str | os.PathLike, needed: int) -> None:
    """Raises an OSError of a full disk if `needed` bytes are more than are free where `folder` is."""
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise OSError(errno.ENOSPC, f"{needed / 1e9:.2f} GB needed, {free / 1e9:.2f} GB free")


def check_binary(values: np.ndarray, what: str) -> np.ndarray:
    """`values` as uint8 if they are all 0 or 1, else a ValueError that names `what`."""
    strange = values[(values != 0) & (values != 1)]
    if strange.size:
        raise ValueError(f"Expected 0 or 1 in {what}. Received: {strange.size} other values, as {strange.flat[0]}")
    return values.astype("uint8")


def resize_images(images: np.ndarray, size: int) -> np.ndarray:
    """Square uint8 images `(N, H, W, C)` at `size` pixels: Pillow's bilinear filter, antialiased."""
    if images.shape[1] == images.shape[2] == size:
        return images
    out = np.empty((len(images), size, size, images.shape[3]), "uint8")
    for image, place in zip(images, out, strict=True):
        small = Image.fromarray(image[..., 0] if image.shape[2] == 1 else image)
        small = small.resize((size, size), Image.Resampling.BILINEAR)
        place[...] = np.asarray(small).reshape(place.shape)
    return out
