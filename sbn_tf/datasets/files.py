"""Finding and reading files: data roots, npz archives, square resizing. Errors say what to do."""

import hashlib
import os
import zipfile
import zlib
from pathlib import Path

import numpy as np
from PIL import Image

__all__ = ["check_binary", "find", "md5", "read_npz", "resize_images", "roots"]


def roots(root=None):
    """Folders to look in: `root`; else SBN_TF_DATA; else `data/` here, then `data/` beside the package."""
    if root is not None:
        return [Path(root).expanduser()]
    if os.environ.get("SBN_TF_DATA"):
        return [Path(os.environ["SBN_TF_DATA"]).expanduser()]
    return list(dict.fromkeys([Path.cwd() / "data", Path(__file__).resolve().parents[2] / "data"]))


def find(card, root, places):
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


def md5(path):
    """md5 of a file, read in pieces."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "md5").hexdigest()


def read_npz(path, keys, optional=()):
    """Arrays of an npz archive, by key; pickled objects are refused.

    Args:
        path: the file.
        keys: {key: number of axes} that must be there, None for any number.
        optional: keys that are read where they are there.

    Raises:
        ValueError: the file is truncated, corrupt, holds objects, or lacks a key or an axis.
    """
    arrays = {}
    try:
        with np.load(path, allow_pickle=False) as archive:
            if not hasattr(archive, "files"):
                raise ValueError("a single array, not an archive")
            missing = [key for key in keys if key not in archive.files]
            if not missing:
                arrays = {k: archive[k] for k in archive.files if k in keys or k in optional}
            found = archive.files
    except (ValueError, OSError, EOFError, KeyError, zipfile.BadZipFile, zlib.error) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ValueError(
            f"Expected a whole npz file of plain arrays. Received: {path} ({reason}).\n"
            "It is truncated, corrupt or not what it says: get it again."
        ) from error
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


def check_binary(values, what):
    """`values` as uint8 if they are all 0 or 1, else a ValueError that names `what`."""
    strange = values[(values != 0) & (values != 1)]
    if strange.size:
        raise ValueError(f"Expected 0 or 1 in {what}. Received: {strange.size} other values, as {strange.flat[0]}")
    return values.astype("uint8")


def resize_images(images, size):
    """Square uint8 images `(N, H, W, C)` at `size` pixels: Pillow's bilinear filter, antialiased."""
    if images.shape[1] == images.shape[2] == size:
        return images
    out = np.empty((len(images), size, size, images.shape[3]), "uint8")
    for image, place in zip(images, out, strict=True):
        small = Image.fromarray(image[..., 0] if image.shape[2] == 1 else image)
        small = small.resize((size, size), Image.Resampling.BILINEAR)
        place[...] = np.asarray(small).reshape(place.shape)
    return out
