"""Finding and writing files: data roots, checks, square resizing. Errors say what to do."""

import contextlib
import errno
import hashlib
import logging
import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from pathlib import Path

import filelock
import numpy as np
from PIL import Image

from .base import Card

__all__ = ["check_binary", "check_room", "find", "locked", "md5", "resize_images", "roots", "writable"]

logger = logging.getLogger(__name__)


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
        FileNotFoundError: two lines: where it was looked for; where to get it and where to put it.
    """
    folders = roots(root)
    for folder in folders:
        for place in places:
            if (folder / place).exists():
                return folder / place
    looked = " and ".join(str(folder) for folder in folders)
    raise FileNotFoundError(
        f"Expected {card.name!r} as {' or '.join(map(str, places))} in {looked}. Received: nothing there.\n"
        f"Get it from {card.source}, put it there, or set SBN_TF_DATA (or root=) to the folder that holds it."
    )


def md5(path: str | os.PathLike) -> str:
    """md5 of a file, read in pieces."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "md5").hexdigest()


@contextlib.contextmanager
def writable(what: str, folder: str | os.PathLike, kept: str, instead: str) -> Iterator[None]:
    """Says in an OSError's message what was expected, in two lines: room, or a folder that can be written to.

    Args:
        what: is written.
        folder: to which.
        kept: what becomes of what is written already, should the disk be full.
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
    """Alone in writing `path`: another process that does so is waited for, with a warning.

    Args:
        path: of a file or folder; its folder is made, and the lock lies beside it.
        writing: a `writable`, for what goes wrong with that.
        does: what another process then does.
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
