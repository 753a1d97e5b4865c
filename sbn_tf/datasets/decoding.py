"""Image files and their masks, decoded and resized to squares once, into the array cache."""

import logging
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from PIL import Image, UnidentifiedImageError

from . import cache as array_cache
from .arrays import DiskArray

__all__ = ["FITS", "decoded", "read_image", "read_mask"]

logger = logging.getLogger(__name__)

FITS = ("crop", "pad", "stretch")
CHUNK = 16  # images decoded at a time: what an interruption can cost
MODES = {1: "L", 3: "RGB"}


def decoded(
    name: str, pairs: list[tuple[Path, ...]], size: int, fit: str, channels: int, cache=None
) -> dict[str, DiskArray]:
    """Images `(N, size, size, C)` and masks `(N, size, size, R)`, uint8, of files, through the array cache.

    Args:
        name: of the cache.
        pairs: for each image its file and those of its masks, as many for each; None for a mask that is missing.
        size: side in pixels.
        fit: one of `FITS`.
        channels: 1 (grey) or 3 (RGB).
        cache: see `cache.cache_folder`.

    Raises:
        ValueError: a file that is corrupt, a mask that is not of its image's size or not of two values.
    """
    raters = len(pairs[0]) - 1
    present = [path for pair in pairs for path in pair if path is not None]
    source = {"files": array_cache.fingerprint(present), "size": size, "fit": fit, "channels": channels}
    source["missing"] = [[k, r] for k, pair in enumerate(pairs) for r, path in enumerate(pair) if path is None]

    def one(pair):
        image, whole = read_image(pair[0], size, fit, channels)
        missing = np.zeros((size, size), "uint8"), 0.0
        found = [missing if path is None else read_mask(path, size, fit, whole) for path in pair[1:]]
        masks, lost = zip(*found, strict=True) if found else ((), ())
        return image, np.stack(masks, -1) if masks else None, np.array(lost, "float32")

    def produce(start):
        with ThreadPoolExecutor() as pool:
            for first in range(start, len(pairs), CHUNK):
                images, masks, lost = zip(*pool.map(one, pairs[first : first + CHUNK]), strict=True)
                yield {"images": np.stack(images)} | (
                    {"masks": np.stack(masks), "lost": np.stack(lost)} if raters else {}
                )

    arrays = {"images": ((size, size, channels), "uint8")}
    if raters:
        arrays |= {"masks": ((size, size, raters), "uint8"), "lost": ((raters,), "float32")}
    found = array_cache.cached(f"{name}-{size}px", source, arrays, produce, total=len(pairs), cache=cache)
    lost = np.asarray(found["lost"]) if raters else np.zeros(0)
    if lost.any():
        logger.warning(
            "%s: the crop to the centre square cuts %d of %d masks, %d of them wholly; fit='pad' keeps them",
            name,
            (lost > 0).sum(),
            lost.size - len(source["missing"]),
            (lost == 1).sum(),
        )
    return found


def read_image(path, size: int, fit: str, channels: int) -> tuple[np.ndarray, tuple[int, int]]:
    """A file as `(size, size, C)` uint8, bilinear and antialiased, and its own (width, height)."""
    try:
        with Image.open(path) as image:
            whole = image.size
            if image.mode in ("I", "I;16", "I;16B", "F"):
                raise ValueError(
                    f"Expected an image of 8 bits a channel. Received: mode {image.mode!r} in {path}.\n"
                    "Window it to 0..255 and save it again."
                )
            image.draft(MODES[channels], (2 * size, 2 * size))  # a JPEG of 6,000 pixels need not be decoded in full
            return _square(image.convert(MODES[channels]), size, fit, Image.Resampling.BILINEAR, channels), whole
    except (OSError, UnidentifiedImageError, SyntaxError, Image.DecompressionBombError) as error:
        raise _corrupt(path) from error


def read_mask(path, size: int, fit: str, whole: tuple[int, int]) -> tuple[np.ndarray, float]:
    """A mask file as `(size, size)` uint8 of 0 and 1, nearest pixel; and the share of it that a crop cuts off.

    Args:
        path: the file; 0 is background and one other value, 1 or 255, foreground.
        size, fit: as for its image.
        whole: (width, height) of its image.
    """
    try:
        with Image.open(path) as mask:
            if mask.size != whole:
                raise ValueError(
                    f"Expected a mask of {whole[0]} x {whole[1]} pixels like its image. "
                    f"Received: {mask.size[0]} x {mask.size[1]} in {path}"
                )
            values = np.asarray(mask if mask.mode in ("1", "L", "P") else mask.convert("L")).astype("uint8")
    except (OSError, UnidentifiedImageError, SyntaxError, Image.DecompressionBombError) as error:
        raise _corrupt(path) from error
    high = values.max()
    strange = values[(values != 0) & (values != high)]
    if strange.size or high not in (0, 1, 255):
        value = strange[0] if strange.size else high
        raise ValueError(f"Expected a mask of 0 and 1 or of 0 and 255. Received: a value of {value} in {path}")
    marks = (values > 0).astype("uint8")
    lost = 0.0
    if fit == "crop" and high:
        height, width = marks.shape
        side = min(height, width)
        top, left = (height - side) // 2, (width - side) // 2
        lost = 1 - marks[top : top + side, left : left + side].sum() / marks.sum(dtype="int64")
    return _square(Image.fromarray(marks), size, fit, Image.Resampling.NEAREST, 1)[..., 0], float(lost)


def _square(image, size, fit, resample, channels):
    width, height = image.size
    if fit == "pad":
        scale = size / max(width, height)
        inner = tuple(max(1, round(side * scale)) for side in (width, height))
        out = Image.new(image.mode, (size, size))
        out.paste(image.resize(inner, resample), tuple((size - side) // 2 for side in inner))
    else:
        side = min(width, height)
        left, top = (width - side) / 2, (height - side) / 2
        box = (left, top, left + side, top + side) if fit == "crop" else None
        out = image.resize((size, size), resample, box=box)
    return np.asarray(out).reshape(size, size, channels)


def _corrupt(path):
    return ValueError(f"Expected a whole image file. Received: {path}, which is truncated or corrupt.\nGet it again.")
