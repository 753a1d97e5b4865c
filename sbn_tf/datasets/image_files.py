"""The image files of a folder that is no dataset: new images, to be predicted."""

from __future__ import annotations

import os
from pathlib import Path

from .decoding import FORMATS
from .files import listed
from .medical import ENDINGS as MEDICAL
from .medical import is_medical, slices

ENDINGS = (".png", ".jpg", ".jpeg", ".tif", ".tiff", ".bmp")  # of `decoding.FORMATS`


def image_files(folder: str | os.PathLike) -> dict[str, Path]:
    """The images of a folder and of those in it: name below it -> path. Hidden files do not count.

    Of a file of several frames or slices each is one, `name#number`.

    Raises:
        ValueError: no such folder, or no image in it.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise ValueError(f"Expected a folder of images. Received: {folder}, which is not there.")
    files = {name: path for name, path in listed(folder, deep=True).items() if name.lower().endswith(ENDINGS + MEDICAL)}
    if not files:
        raise ValueError(f"Expected images ({', '.join((*FORMATS, 'DICOM', 'NIfTI'))}) in {folder}. Received: none.")
    return {f"{name}{at}": Path(f"{path}{at}") for name, path in files.items() for at in _slices(path)}


def _slices(path):
    """What is added to a file's name for each image in it; where it cannot be read, reading says why."""
    try:
        return slices(path) if is_medical(path) else [""]
    except (ValueError, OSError):
        return [""]
