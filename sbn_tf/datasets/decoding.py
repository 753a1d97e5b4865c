"""Image files and their masks, decoded and resized to squares once, into the array cache."""

import contextlib
import logging
import os
import struct
import zlib
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from PIL import Image, UnidentifiedImageError

from . import cache as array_cache
from .arrays import DiskArray

__all__ = ["decoded"]

logger = logging.getLogger(__name__)

FITS = ("crop", "pad", "stretch")
FORMATS = ("PNG", "JPEG", "TIFF", "BMP")  # others may start programs, as an EPS does
DEEP = ("I", "F", "I;16", "I;16B", "I;16L", "I;16N")
ORIENTATION = 274  # the EXIF tag
BROKEN = (
    OSError,
    SyntaxError,
    ValueError,
    EOFError,
    struct.error,
    zlib.error,
    UnidentifiedImageError,
    Image.DecompressionBombError,
)
CHUNK = 16  # images decoded at a time; an interruption costs no more than these
MODES = {1: "L", 3: "RGB"}


def decoded(
    name: str,
    pairs: Sequence[tuple[Path | None, ...]],
    size: int,
    fit: str,
    channels: int,
    cache: str | os.PathLike | None = None,
) -> dict[str, DiskArray]:
    """Images `(N, size, size, C)` and masks `(N, size, size, R)`, uint8, of files, through the array cache.

    Args:
        name: of the cache.
        pairs: for each image its file and its masks' files, the same number for each; None for a missing mask.
        size: side in pixels.
        fit: one of `FITS`.
        channels: 1 (grey) or 3 (RGB).
        cache: see `cache.cache_folder`.

    Raises:
        ValueError: a file that is corrupt, a mask that is not of its image's size or not of two values.
    """
    raters = len(pairs[0]) - 1
    present = [path for pair in pairs for path in pair if path is not None]
    missing = [[k, r] for k, pair in enumerate(pairs) for r, path in enumerate(pair) if path is None]
    source = {"files": array_cache.fingerprint(present), "size": size, "fit": fit, "channels": channels}
    source["missing"] = missing

    def one(pair):
        image, whole = read_image(pair[0], size, fit, channels)
        empty = np.zeros((size, size), "uint8"), 0.0
        found = [empty if path is None else read_mask(path, size, fit, whole) for path in pair[1:]]
        masks, lost = zip(*found, strict=True) if found else ((), ())
        return image, np.stack(masks, -1) if masks else None, np.array(lost, "float32")

    def produce(start):
        with ThreadPoolExecutor() as pool:
            for first in range(start, len(pairs), CHUNK):
                images, masks, lost = zip(*pool.map(one, pairs[first : first + CHUNK]), strict=True)
                yield {"images": np.stack(images)} | (
                    {"masks": np.stack(masks), "lost": np.stack(lost)} if raters else {}
                )

    arrays: dict[str, tuple[tuple[int, ...], str]] = {"images": ((size, size, channels), "uint8")}
    if raters:
        arrays |= {"masks": ((size, size, raters), "uint8"), "lost": ((raters,), "float32")}
    found = array_cache.cached(f"{name}-{size}px", source, arrays, produce, total=len(pairs), cache=cache)
    lost = np.asarray(found["lost"]) if raters else np.zeros(0)
    if lost.any():
        cut, wholly, masks = (lost > 0).sum(), (lost == 1).sum(), lost.size - len(missing)
        message = "%s: the crop to the centre square cuts %d of %d masks, %d of them wholly; fit='pad' keeps them"
        logger.warning(message, name, cut, masks, wholly)
    return found


def read_image(path: str | os.PathLike, size: int, fit: str, channels: int) -> tuple[np.ndarray, tuple[int, int]]:
    """A file as `(size, size, C)` uint8, bilinear and antialiased, and its own (width, height)."""
    with _opened(path) as image:
        whole = image.size
        image.draft(MODES[channels], (2 * size, 2 * size))  # a JPEG of 6,000 pixels need not be decoded in full
        return _square(image.convert(MODES[channels]), size, fit, Image.Resampling.BILINEAR, channels), whole


def read_mask(path: str | os.PathLike, size: int, fit: str, whole: tuple[int, int]) -> tuple[np.ndarray, float]:
    """A mask file as `(size, size)` uint8 of 0 and 1, nearest pixel; and the share of it that a crop cuts off.

    Args:
        path: the file; 0 is background and one other value, 1 or 255, foreground.
        size, fit: as for its image.
        whole: (width, height) of its image.
    """
    with _opened(path) as mask:
        if mask.size != whole:
            raise ValueError(
                f"Expected a mask of {whole[0]} x {whole[1]} pixels like its image. "
                f"Received: {mask.size[0]} x {mask.size[1]} in {path}.\nMake it of its image's size."
            )
        values = _grey_values(mask, path)
    high = values.max()
    strange = values[(values != 0) & (values != high)]
    if strange.size or high not in (0, 1, 255):
        value = strange[0] if strange.size else high
        raise ValueError(
            f"Expected a mask of 0 and 1 or of 0 and 255. Received: a value of {value} in {path}.\n"
            "Cut it at the value that means foreground, and save it as png: jpg blurs it."
        )
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


def check_header(image: Image.Image, path: str | os.PathLike) -> None:
    """Refuses an image that would not be read as it looks: several frames, turned, more than 8 bits a channel."""
    # A camera's JPEG may hold its preview too: Pillow calls that MPO.
    frames = 1 if image.format == "MPO" else getattr(image, "n_frames", 1)
    turned = 1 if image.format == "PNG" else image.getexif().get(ORIENTATION, 1)  # a PNG would be decoded for it
    if image.mode in DEEP:
        raise ValueError(
            f"Expected an image of 8 bits a channel. Received: mode {image.mode!r} in {path}.\n"
            "Window it to 0..255 and save it again."
        )
    if frames > 1:
        raise ValueError(f"Expected one image in a file. Received: {frames} in {path}.\nSave each as its own file.")
    if turned not in (0, 1):
        raise ValueError(
            f"Expected an image that is stored upright. Received: EXIF orientation {turned} in {path}.\n"
            "Turn it (PIL.ImageOps.exif_transpose) and save it again, and its masks likewise."
        )


@contextlib.contextmanager
def readable(path: str | os.PathLike) -> Iterator[None]:
    """Turns what a broken image file raises into a ValueError of two lines."""
    try:
        yield
    except BROKEN as error:
        if "\n" in str(error):  # explained already
            raise
        raise ValueError(
            f"Expected a png, jpg, tif or bmp image. Received: {path}, which is truncated or corrupt, or another."
            "\nGet it again or convert it."
        ) from error


@contextlib.contextmanager
def _opened(path):
    with readable(path):
        with Image.open(path, formats=FORMATS) as image:
            if image.format != "PNG":
                check_header(image, path)
                yield image
                return
            image.verify()  # its checksums, which decoding ignores; other formats have none
        with Image.open(path, formats=FORMATS) as image:
            check_header(image, path)
            yield image


def _grey_values(mask, path):
    """A mask's values; refuses a mask that a viewer would show otherwise: colours, transparency, a palette."""
    pixels = np.asarray(mask)
    if mask.mode in ("LA", "RGBA") and (pixels[..., -1] == 255).all():
        pixels = pixels[..., :-1]
    pixels = pixels[..., None] if pixels.ndim == 2 else pixels
    plain = mask.mode in ("1", "L") or pixels.shape[-1] in (1, 3)
    if mask.mode == "P":
        plain = (np.asarray(mask.convert("L")) == pixels[..., 0]).all()
    if not plain or (pixels != pixels[..., :1]).any():
        raise ValueError(
            f"Expected a grey mask. Received: colours, transparency or a palette, mode {mask.mode!r}, in {path}.\n"
            "Save it in grey, background 0 and foreground 255."
        )
    return pixels[..., 0].astype("uint8")
