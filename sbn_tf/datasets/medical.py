"""DICOM images and slices of NIfTI volumes: pixels on the 0..1 scale, and how many millimetres a pixel is wide.

A file of several frames or slices is several images: `scan.nii.gz#7` is the slice at index 7 of its last axis. Pixels
lie as they are stored: a NIfTI volume is not turned, its first axis runs to the right and its second one down.

What becomes 0 and 1: the ends of `window`, if one is given (after DICOM's rescale slope and intercept: Hounsfield units
of a CT); else those of the file's window (DICOM: window centre and width; NIfTI: cal_min and cal_max); else all that
DICOM's stored bits can hold, or the least and the largest value of the NIfTI volume.
"""

import functools
import os
import re
import warnings
from pathlib import Path

import numpy as np

from . import files

ENDINGS = (".dcm", ".nii", ".nii.gz")
NAME = re.compile(r"(.+(?:\.dcm|\.nii|\.nii\.gz))(?:#([0-9]{1,6}))?", re.IGNORECASE | re.DOTALL)
KINDS = ("MONOCHROME1", "MONOCHROME2", "RGB", "YBR_FULL", "YBR_FULL_422")
_MAX_VALUES = 125_000_000  # of a file, as floats with a copy 1 GB
_MILLIMETRES = {"mm": 1.0, "unknown": 1.0, "meter": 1e3, "micron": 1e-3}

Window = tuple[float, float] | None


def is_medical(path: str | os.PathLike) -> bool:
    """Whether a file, or a slice of one, is DICOM or NIfTI, by its ending."""
    return NAME.fullmatch(os.fspath(path)) is not None


def file_of(path: str | os.PathLike) -> Path:
    """The file that an image is in: `path`, without the number of a slice."""
    found = NAME.fullmatch(os.fspath(path))
    return Path(found[1] if found else path)


def slices(path: str | os.PathLike) -> list[str]:
    """What is added to a file's name for each image in it: "" of one image, else "#0", "#1", ...; raises as `read`."""
    count = _opened(path)[1]
    return [f"#{k}" for k in range(count)] if count > 1 else [""]


def is_grey(path: str | os.PathLike) -> bool:
    """Whether an image has one channel, by its header; raises as `read`."""
    _number(path)
    return not _is_dicom(path) or _opened(path)[0].PhotometricInterpretation.startswith("MONOCHROME")


def _is_dicom(path: str | os.PathLike) -> bool:
    """Whether a file is DICOM, by its ending."""
    return file_of(path).suffix.lower() == ".dcm"


def read(path: str | os.PathLike, window: Window = None) -> np.ndarray:
    """An image, (height, width), or (height, width, 3) of colours: float32, 0..1.

    Args:
        path: a file of one image, or a slice, `name#number`.
        window: what becomes 0 and 1, in the file's units; None: see the module's docstring.

    Raises:
        ValueError: a file that is corrupt or of another kind; no such slice; pydicom or nibabel is not installed.
    """
    if window is not None and not (len(window) == 2 and -np.inf < window[0] < window[1] < np.inf):
        raise ValueError(f"Expected window (low, high), low < high. Received: window={window!r}")
    number = _number(path)
    if _is_dicom(path):
        values, low, high, turned = _dicom(path, number, window)
    else:
        volume, low, high = _volume(*_state(path))
        values, turned = volume[..., number].T, False
        low, high = window or (low, high)
    if not np.isfinite(values).all():
        raise ValueError(f"Expected finite pixels. Received: NaN or infinity in {path}.\nReplace them.")
    pixels = np.clip((values - low) / max(high - low, 1e-30), 0, 1).astype("float32")
    return 1 - pixels if turned else pixels


def mask(path: str | os.PathLike) -> np.ndarray:
    """A mask, (height, width) uint8, of a slice of a NIfTI volume of 0 and 1, or 0 and 255; raises as `read`."""
    if _is_dicom(path):
        raise ValueError(f"Expected a mask as png, tif, bmp or NIfTI. Received: {path}.\nConvert it.")
    number = _number(path)
    values = _volume(*_state(path))[0][..., number].T
    if not np.isin(values, (0, 1, 255)).all():
        strange = values[~np.isin(values, (0, 1, 255))][0]
        raise ValueError(
            f"Expected a mask of 0 and 1 or of 0 and 255. Received: a value of {strange:g} in {path}.\n"
            "Cut it at the value that means foreground."
        )
    return values.astype("uint8")


def pixel_spacing(path: str | os.PathLike) -> tuple[float, float] | None:
    """Height and width of a pixel in millimetres; None where it does not say. No unit is millimetres."""
    if not is_medical(path):
        return None
    header = _opened(path)[0]
    if _is_dicom(path):
        found = header.get("PixelSpacing")
        found = [float(value) for value in found] if found else [0.0, 0.0]
    else:
        unit = _MILLIMETRES.get(header.header.get_xyzt_units()[0], 0.0)
        found = [unit * float(value) for value in header.header.get_zooms()[1::-1]]
    return (found[0], found[1]) if len(found) == 2 and min(found) > 0 else None


def _number(path):
    found, count = NAME.fullmatch(os.fspath(path)), _opened(path)[1]
    number = 0 if found[2] is None else int(found[2])
    if number >= count or (found[2] is None and count > 1):
        raise ValueError(
            f"Expected the name of one of the {count} images in {file_of(path)}. Received: {path}.\n"
            f"Add the number of a slice, #0 to #{count - 1}."
        )
    return number


def _opened(path):
    """A file without its pixels, of pydicom or nibabel, and how many images it has."""
    return _header(*_state(path))


def _state(path):
    """A file's name, and what changes with its contents."""
    found = files.status(file_of(path))
    return str(file_of(path)), found.st_size, found.st_mtime_ns


@functools.lru_cache(maxsize=64)
def _header(path, size, changed):
    if _is_dicom(path):
        pydicom = _library("pydicom", "dicom", path)
        found = _safely(path, lambda: pydicom.dcmread(path, stop_before_pixels=True))
        if found.get("PhotometricInterpretation") not in KINDS or "SharedFunctionalGroupsSequence" in found:
            kind = found.get("PhotometricInterpretation", "no image")
            kind += ", an enhanced file" if "SharedFunctionalGroupsSequence" in found else ""
            raise ValueError(f"Expected a DICOM image, one of {KINDS}. Received: {kind} in {path}.\nConvert it.")
        count = int(found.get("NumberOfFrames") or 1)
        shape = (found.get("Rows") or 0, found.get("Columns") or 0, count)
    else:
        nibabel = _library("nibabel", "nifti", path)
        found = _safely(path, lambda: nibabel.load(path))
        shape = found.shape
        while len(shape) > 2 and shape[-1] == 1:
            shape = shape[:-1]
        if len(shape) not in (2, 3):
            raise ValueError(f"Expected a volume of 2 or 3 dimensions. Received: {shape} in {path}.\nSplit it.")
        count = shape[2] if len(shape) == 3 else 1
    if not 0 < np.prod(shape, dtype="float64") <= _MAX_VALUES:
        raise ValueError(f"Expected 1 to {_MAX_VALUES:,} values. Received: {shape} in {path}.\nSplit it.")
    return found, count


@functools.lru_cache(maxsize=2)  # an image's and its mask's, in turn
def _volume(path, size, changed):
    """A NIfTI volume, float32 (width, height, slices), and the ends of its window: two files stay in memory."""
    opened, count = _header(path, size, changed)
    if not np.issubdtype(opened.get_data_dtype(), np.number) or np.issubdtype(
        opened.get_data_dtype(), np.complexfloating
    ):
        raise ValueError(f"Expected real numbers. Received: {opened.get_data_dtype()} in {path}.\nConvert it.")
    volume = _safely(path, lambda: np.asarray(opened.dataobj, "float32")).reshape(*opened.shape[:2], count)
    low, high = float(opened.header["cal_min"]), float(opened.header["cal_max"])
    return (volume, low, high) if low < high else (volume, float(np.nanmin(volume)), float(np.nanmax(volume)))


def _dicom(path, number, window):
    """Values of a frame, what becomes 0 and 1, and whether that is turned round."""
    pydicom = _library("pydicom", "dicom", path)
    from pydicom.pixels import apply_modality_lut, apply_windowing, pixel_array

    def values():
        file = pydicom.dcmread(file_of(path))
        stored = pixel_array(file, index=number)
        bits, signed = int(file.BitsStored), bool(file.PixelRepresentation)
        ends = np.array([-(2 ** (bits - 1)), 2 ** (bits - 1) - 1] if signed else [0, 2**bits - 1], "float64")
        if stored.ndim == 3:  # colours
            return stored.astype("float32"), *ends, False
        found, ends = (apply_modality_lut(array, file).astype("float64") for array in (stored, ends))
        if window is None and None not in (file.get("WindowCenter"), file.get("WindowWidth")):
            found, ends = apply_windowing(found, file), apply_windowing(np.array([-1e9, 1e9]), file)
            if ends[1] < ends[0]:  # of a RescaleSlope below 0
                found, ends = -found, -ends
        low, high = window or sorted(ends)
        return found, low, high, file.PhotometricInterpretation == "MONOCHROME1"

    return _safely(path, values)


def _library(name, extra, path):
    try:
        return __import__(name)
    except ImportError:
        raise ValueError(
            f'Expected {name}, which reads {path}. Received: it is not installed.\npip install "sbn_tf[{extra}]"'
        ) from None


def _safely(path, call):
    """`call()`; whatever its library raises of a broken file is a ValueError."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return call()
    except Exception as error:
        reason = (str(error) or type(error).__name__).splitlines()[0][:200]
        raise ValueError(
            f"Expected a whole DICOM or NIfTI file. Received: {path} ({reason}).\nGet it again or convert it."
        ) from error
