"""Image files and their masks, decoded and resized to squares once, into the array cache.

Pixels of 8 bits stay uint8. Those of 16 bits are float32 on the 0..1 scale, divided by 65535, whatever the largest is;
those of DICOM and NIfTI are float32 too, see `medical`.
"""

import contextlib
import logging
import os
import struct
import zlib
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from PIL import Image, ImageChops, UnidentifiedImageError

from . import cache as array_cache
from . import files, medical
from .arrays import DiskArray

logger = logging.getLogger(__name__)

FITS = ("crop", "pad", "stretch")
FORMATS = ("PNG", "JPEG", "TIFF", "BMP")  # others may start programs, as an EPS does
BITS, PHOTOMETRIC, ORIENTATION, SAMPLES = 258, 262, 274, 339  # tags of TIFF, the third of EXIF too
_BROKEN = (OSError, SyntaxError, ValueError, EOFError, struct.error, zlib.error, UnidentifiedImageError)
CHUNK = 16  # images decoded at a time; an interruption costs no more than these
MODES = {1: "L", 3: "RGB"}
GREY = ("1", "L", "LA")
DEEP = ("I;16", "I;16B", "I;16L")  # Pillow reads 16 bits in full where there is one channel
MAX_BYTES = 1_500_000_000  # that decoding one image may take; half of it for several at a time
_MAX_FILE_BYTES = 2**29
MAX_PIXELS = 2**26  # of an image that is not made a square


def decoded(
    name: str,
    pairs: Sequence[tuple[Path | None, ...]],
    size: int,
    fit: str,
    channels: int,
    cache: str | os.PathLike | None = None,
    threshold: int | None = None,
    deep: bool = False,
    window: tuple[float, float] | None = None,
) -> dict[str, DiskArray]:
    """Images `(N, size, size, C)` and masks `(N, size, size, R)` of files, through the array cache: uint8.

    Args:
        name: of the cache.
        pairs: for each image its file and its masks' files, the same number for each; None for a missing mask.
        size: side in pixels.
        fit: one of `FITS`.
        channels: 1 (grey) or 3 (RGB).
        cache: see `cache.cache_folder`.
        threshold: as for `read_mask`.
        deep: whether `grey_and_deep` says so of any image; all are then float32 on the 0..1 scale.
        window: what becomes 0 and 1, of DICOM and NIfTI; None: as `medical` says.

    Raises:
        ValueError: a file that is corrupt, too large or deeper than can be read in full; a mask that is not of its
            image's size or not of two values.
    """
    raters = len(pairs[0]) - 1
    missing = [[k, r] for k, pair in enumerate(pairs) for r, path in enumerate(pair) if path is None]
    source = {"size": size, "fit": fit, "channels": channels, "missing": missing}
    source |= _source([path for pair in pairs for path in pair if path is not None], threshold, deep, window)

    def one(pair):
        image, whole = read_image(pair[0], size, fit, channels, window)
        image = _of_depth(image, deep, pair[0])
        empty = np.zeros((size, size), "uint8"), 0.0
        found = [empty if path is None else read_mask(path, size, fit, whole, threshold) for path in pair[1:]]
        masks, lost = zip(*found, strict=True) if found else ((), ())
        return image, np.stack(masks, -1) if masks else None, np.array(lost, "float32")

    def together(part):  # by as many threads as there is memory for
        threads = _threads(part)
        if threads < 2:  # not in a thread of its own: that would keep some of its memory
            return map(one, part)
        with ThreadPoolExecutor(threads) as pool:
            return pool.map(one, part)

    def produce(start):
        for first in range(start, len(pairs), CHUNK):
            images, masks, lost = zip(*together(pairs[first : first + CHUNK]), strict=True)
            yield {"images": np.stack(images)} | ({"masks": np.stack(masks), "lost": np.stack(lost)} if raters else {})

    dtype = "float32" if deep else "uint8"
    arrays: dict[str, tuple[tuple[int, ...], str]] = {"images": ((size, size, channels), dtype)}
    if raters:
        arrays |= {"masks": ((size, size, raters), "uint8"), "lost": ((raters,), "float32")}
    found = array_cache.cached(f"{name}-{size}px", source, arrays, produce, total=len(pairs), cache=cache)
    _warn_of_lost(name, np.asarray(found["lost"]) if raters else np.zeros(0), len(missing))
    return found


def _source(paths, threshold, deep, window):
    """What the decoded arrays depend on, beside size and fit: another of these, another cache."""
    source = {"files": array_cache.fingerprint(map(medical.file_of, paths))}
    slices = [os.path.basename(path) for path in paths if medical.is_medical(path)]
    if deep or slices:
        source["deep"] = slices, window
    return source | ({} if threshold is None else {"threshold": threshold})


def _warn_of_lost(name, lost, missing):
    """Say how many masks the crop to the centre square cuts."""
    if lost.any():
        cut, wholly, masks = (lost > 0).sum(), (lost == 1).sum(), lost.size - missing
        message = "%s: the crop to the centre square cuts %d of %d masks, %d of them wholly; fit='pad' keeps them"
        logger.warning(message, name, cut, masks, wholly)


def read_image(
    path: str | os.PathLike, size: int, fit: str, channels: int, window: tuple[float, float] | None = None
) -> tuple[np.ndarray, tuple[int, int]]:
    """A file as `(size, size, C)`, bilinear and antialiased, and its own (width, height).

    uint8 of 0 to 255, or float32 of 0 to 1 where `grey_and_deep` says that it is deep. `window`: see `medical.read`.
    """
    if medical.is_medical(path):
        pixels = medical.read(path, window)
        return _floats_square(pixels, size, fit, channels), pixels.shape[1::-1]
    mode = MODES[channels]
    with _verified(path) as image:
        whole = image.size
        if image.mode in DEEP:
            return _floats_square(_of_16_bits(image), size, fit, channels), whole
        image.draft(mode, (2 * size, 2 * size))  # a JPEG of 6,000 pixels need not be decoded in full
        grey_or_rgb = image if image.mode == mode else image.convert(mode)
        return square(grey_or_rgb, size, fit, Image.Resampling.BILINEAR, channels), whole


def read_scaled(
    path: str | os.PathLike, scale: float, channels: int, window: tuple[float, float] | None = None
) -> tuple[np.ndarray, tuple[int, int]]:
    """A file as `(height, width, C)`, `scale` times its own size, and its own (width, height); values as `read_image`.

    Raises:
        ValueError: a file that cannot be read, or more than MAX_PIXELS.
    """
    if medical.is_medical(path):
        planes = _planes(medical.read(path, window), channels)
    else:
        with _verified(path) as image:
            if image.mode in DEEP:
                planes = _planes(_of_16_bits(image), channels)
            else:
                planes = list(np.moveaxis(np.atleast_3d(np.asarray(image.convert(MODES[channels]))), -1, 0))
    whole = planes[0].shape[::-1]
    size = [max(1, round(scale * side)) for side in whole]
    if size[0] * size[1] > MAX_PIXELS:
        raise _too_large(path, f"{size[0]} x {size[1]} pixels at {scale:g} times its size, of {MAX_PIXELS:,} at most")
    found = [np.asarray(Image.fromarray(plane).resize(size, Image.Resampling.BILINEAR)) for plane in planes]
    return np.stack(found * (channels // len(found)), -1), whole


def read_mask(
    path: str | os.PathLike, size: int, fit: str, whole: tuple[int, int], threshold: int | None = None
) -> tuple[np.ndarray, float]:
    """A mask file as `(size, size)` uint8 of 0 and 1, nearest pixel; and the share of it that a crop cuts off.

    Args:
        path: the file; 0 is background and one other value, 1 or 255, foreground.
        size, fit: as for its image.
        whole: (width, height) of its image.
        threshold: foreground is what is at least so bright, 1 to 255; None: other values than two are refused.
    """
    with _mask_image(path) as mask:
        if mask.size != whole:
            raise ValueError(
                f"Expected a mask of {whole[0]} x {whole[1]} pixels like its image. "
                f"Received: {mask.size[0]} x {mask.size[1]} in {path}.\nMake it of its image's size."
            )
        if mask.mode in DEEP:
            raise _too_deep(path, "16 bits")
        marks = _marks(_grey(mask, path), path, threshold)
    lost, total = 0.0, marks.histogram()[1]
    if fit == "crop" and total:
        side = min(whole)
        left, top = (whole[0] - side) // 2, (whole[1] - side) // 2
        lost = 1 - marks.crop((left, top, left + side, top + side)).histogram()[1] / total
    return square(marks, size, fit, Image.Resampling.NEAREST, 1)[..., 0], lost


def _floats_square(pixels, size, fit, channels):
    """`square` of floats (height, width), or (height, width, 3) of colours."""
    planes = map(Image.fromarray, _planes(pixels, channels))
    squares = [square(plane, size, fit, Image.Resampling.BILINEAR, 1) for plane in planes]
    return np.concatenate(squares * (channels // len(squares)), -1)


def _of_16_bits(image):
    """A grey image of 16 bits as floats, 0..1."""
    return np.asarray(image).astype("float32") / np.float32(65535)


def _planes(pixels, channels):
    """Each channel of floats by itself, one of grey; grey of colours as Pillow weighs them."""
    if pixels.ndim == 3 and channels == 1:
        pixels = pixels @ np.array([0.299, 0.587, 0.114], "float32")
    return list(np.moveaxis(pixels, -1, 0)) if pixels.ndim == 3 else [pixels]


def square(image: Image.Image, size: int, fit: str, resample: Image.Resampling, channels: int) -> np.ndarray:
    """A Pillow image as a square array (size, size, channels), by one of `FITS`."""
    width, height = image.size
    if fit == "pad":
        scale = size / max(width, height)
        inner = max(1, round(width * scale)), max(1, round(height * scale))
        out = Image.new(image.mode, (size, size))
        out.paste(image.resize(inner, resample), ((size - inner[0]) // 2, (size - inner[1]) // 2))
    else:
        side = min(width, height)
        left, top = (width - side) / 2, (height - side) / 2
        box = (left, top, left + side, top + side) if fit == "crop" else None
        out = image.resize((size, size), resample, box=box)
    return np.asarray(out).reshape(size, size, channels)


def grey_and_deep(path: str | os.PathLike) -> tuple[bool, bool]:
    """Whether an image file is grey, and whether it is read as floats; raises as `opened` and `medical.read`."""
    if medical.is_medical(path):
        return medical.is_grey(path), True
    with opened(path) as image:
        return image.mode in GREY + DEEP, image.mode in DEEP


def _of_depth(image, deep, path):
    """An image in the depth of all of its dataset."""
    if deep and image.dtype == np.uint8:
        return image.astype("float32") / np.float32(255)
    if image.dtype != (np.float32 if deep else np.uint8):
        raise _too_deep(path, "16 bits")
    return image


def _check_header(image, file, path):
    """Refuses an image that would not be read as it looks: several frames, turned, deeper than Pillow reads it."""
    # A camera's JPEG may hold its preview too: Pillow calls that MPO.
    frames = 1 if image.format == "MPO" else getattr(image, "n_frames", 1)
    turned = 1 if image.format == "PNG" else image.getexif().get(ORIENTATION, 1)  # a PNG would be decoded for it
    depth = _depth(image, file)
    if depth and not (depth == "16 bits" and image.mode in DEEP):
        raise _too_deep(path, depth)
    if frames > 1:
        raise ValueError(f"Expected one image in a file. Received: {frames} in {path}.\nSave each as its own file.")
    if turned not in (0, 1):
        raise ValueError(
            f"Expected an image that is stored upright. Received: EXIF orientation {turned} in {path}.\n"
            "Turn it (PIL.ImageOps.exif_transpose) and save it again, and its masks likewise."
        )
    if _memory(image) > MAX_BYTES:
        raise _too_large(path, f"{image.width} x {image.height} pixels, decoded {_memory(image):,} bytes")


def _too_deep(path, depth):
    return ValueError(
        f"Expected an image of 8 bits a channel, or a grey one of 16. Received: {depth} in {path}.\n"
        "Window it to 0..255 and save it again; a mask needs 8 bits."
    )


def _depth(image, file):
    """What the file says of its depth, if it is not 8 bits; Pillow's mode may be RGB, without the lower ones of 16."""
    bits, signs = (8,), (1,)
    if image.format == "PNG":
        place = file.tell()
        file.seek(24)  # in its first chunk, IHDR
        bits = file.read(1)
        file.seek(place)
    elif image.format == "TIFF":
        bits, signs = image.tag_v2.get(BITS, (1,)), image.tag_v2.get(SAMPLES, (1,))
        if image.mode in DEEP and image.tag_v2.get(PHOTOMETRIC) == 0:  # Pillow turns it round in 8 bits alone
            return f"{max(bits)} bits of which 0 is white"
    kind = "" if {1, 4} >= set(signs) else " with a sign or a fraction"  # 4: not said
    return f"{max(bits)} bits{kind}" if max(bits) > 8 or kind else ""


def _memory(image):
    """Bytes that decoding and converting an image take at most: twice four a pixel; a JPEG's coefficients too.

    One of 16 bits also becomes numbers of 32.
    """
    return image.width * image.height * (16 if image.format in ("JPEG", "MPO") or image.mode in DEEP else 8)


def _too_large(path, received):
    return ValueError(
        f"Expected an image that decodes to at most {MAX_BYTES:,} bytes. Received: {received}, in {path}.\n"
        "Make it smaller: an image is resized to a few hundred pixels in any case."
    )


@contextlib.contextmanager
def opened(path: str | os.PathLike) -> Iterator[Image.Image]:
    """An image file, not decoded yet, whose header has been checked.

    Raises:
        ValueError: no regular file, or one that is corrupt, too large, or would not be read as it looks.
    """
    try:
        if files.status(path).st_size > _MAX_FILE_BYTES:
            raise _too_large(path, f"a file of more than {_MAX_FILE_BYTES:,}")
        with files.open_file(path) as file, Image.open(file, formats=FORMATS) as image:
            _check_header(image, file, path)
            yield image
    except Image.DecompressionBombError as error:
        raise _too_large(path, str(error).split(",")[0]) from error
    except _BROKEN as error:
        if "\n" in str(error):  # explained already
            raise
        raise ValueError(
            f"Expected a png, jpg, tif or bmp image of 8 bits a channel, or a grey one of 16. Received: {path}, "
            f"which is truncated or corrupt, or no image.\nGet it again or convert it."
        ) from error


def _mask_image(path):
    if medical.is_medical(path):
        return contextlib.nullcontext(Image.fromarray(medical.mask(path)))
    return _verified(path)


@contextlib.contextmanager
def _verified(path):
    with opened(path) as image:
        if image.format != "PNG":
            yield image
            return
        image.verify()  # its checksums, which decoding ignores; other formats have none
    with opened(path) as image:
        yield image


def _threads(pairs):
    """How many of these can be read at the same time."""
    needed = max(_needed(path) for pair in pairs for path in pair if path is not None)
    return min(len(pairs), (os.cpu_count() or 1) + 4, MAX_BYTES // 2 // needed)


def _needed(path):
    """Bytes that reading an image file takes at most: a PNG's chunk, joined from pieces, or its pixels."""
    if medical.is_medical(path):
        return MAX_BYTES // 2  # one at a time: a volume is read as a whole
    with opened(path) as image:
        return max(_memory(image), 2 * os.path.getsize(path))


def _grey(mask, path):
    """A mask in grey; refuses a mask that a viewer would show otherwise: colours, transparency, a palette."""
    bands = mask.getbands()
    if bands[-1] == "A" and mask.getchannel("A").getextrema() == (255, 255):
        bands = bands[:-1]
    if mask.mode in ("1", "P"):
        grey = mask.convert("L")
        plain = mask.mode == "1" or np.array_equal(np.asarray(grey), np.asarray(mask))
    else:
        grey, others = mask.getchannel(0), range(1, len(bands))
        plain = bands in (("L",), ("R", "G", "B"))
        plain &= not any(ImageChops.difference(grey, mask.getchannel(k)).getbbox() for k in others)
    if not plain:
        raise ValueError(
            f"Expected a grey mask. Received: colours, transparency or a palette, mode {mask.mode!r}, in {path}.\n"
            "Save it in grey, background 0 and foreground 255."
        )
    return grey


def _marks(grey, path, threshold):
    """A grey mask's pixels as 0 and 1; refuses other values than two where there is no threshold."""
    *others, high = np.flatnonzero(grey.histogram()).tolist()
    if threshold is not None and high > 1:
        return grey.point([0] * threshold + [1] * (256 - threshold))
    strange = [value for value in others if value] or [high] * (high not in (0, 1, 255))
    if strange:
        raise ValueError(
            f"Expected a mask of 0 and 1 or of 0 and 255. Received: a value of {strange[0]} in {path}.\n"
            "Cut it at the value that means foreground (128: --threshold 128), and save it as png: jpg blurs it."
        )
    return grey.point([0] + [1] * 255)
