"""LIDC-IDRI: lung nodules on CT, each outlined by up to four radiologists."""

from pathlib import Path

import numpy as np

from . import files
from .base import SEGMENTATION, Card, Parts, Split

__all__ = ["LIDC", "centre", "load_lidc"]

WINDOW = (-1000.0, 400.0)  # Hounsfield units: air to soft tissue, the customary lung window
RATERS = ("all", "drew")

LIDC = Card(
    name="lidc",
    title="LIDC-IDRI: 2,072 lung nodules on one CT slice each, masks of 4 radiologists",
    task=SEGMENTATION,
    classes=("nodule",),
    channels=1,
    num_raters=4,
    licence="CC BY 3.0 (TCIA)",
    citation="Armato III, S. G., et al. (2015). Data From LIDC-IDRI. The Cancer Imaging Archive, "
    "doi:10.7937/K9/TCIA.2015.LO9QL9SX; Armato III, S. G., et al. (2011). Medical Physics 38(2), 915-931.",
    source="https://doi.org/10.7937/K9/TCIA.2015.LO9QL9SX (TCIA)",
    files=("lidc_idri/lidc_idri_maxslice_71.npz",),
    default_size=64,
    network="unet",
    notes="Split by patient. Native in-plane pixels of 0.46 to 0.98 mm; 0..1 is -1000 to 400 HU. Not the "
    "customary 15,096 patches: numbers are not comparable with results on those. Mask slot k is not the "
    "same radiologist in two scans. An empty mask is a radiologist who outlined nothing.",
)


def load_lidc(root, size, seed, *, raters="all"):
    """Three splits: images `(N, size, size, 1)` float32 0..1, targets `(N, size, size, 4)` uint8, patients.

    Args:
        root: see `load`.
        size: side of the centre crop in native pixels; more than 71 pads with air and empty mask.
        seed: unused, the split is in the file.
        raters: "all": all four masks count, an empty one says that a rater outlined nothing (customary
            with LIDC); "drew": only raters who marked a pixel on this slice count in `rater_valid`.
    """
    if raters not in RATERS:
        raise ValueError(f"Expected raters one of {RATERS}. Received: raters={raters!r}")
    folder, name = LIDC.files[0].split("/")
    path = files.find(LIDC, root, [Path(folder) / name, Path(name)])
    arrays = files.read_npz(path, {"image": 3, "masks": 4, "patient_id": 1, "split": 1}, ["nodule_id"])
    image, masks, patients, part = (arrays[key] for key in ("image", "masks", "patient_id", "split"))
    n, height, width = image.shape
    if masks.shape != (n, 4, height, width) or len(patients) != n or len(part) != n:
        raise ValueError(
            f"Expected image (N, H, W), masks (N, 4, H, W), patient_id and split (N,) in {path}. "
            f"Received: {image.shape}, {masks.shape}, {patients.shape}, {part.shape}"
        )
    strange = sorted(set(part.tolist()) - {"train", "val", "test"})
    if strange:
        raise ValueError(f"Expected split train, val or test in {path}. Received: {strange[0]!r}")
    masks = files.check_binary(masks, f"masks of {path}").transpose(0, 2, 3, 1)  # (N, H, W, 4)
    drew = masks.any(axis=(1, 2))  # before the crop: who drew outside it drew all the same
    low, high = WINDOW
    image = ((np.clip(image, low, high) - low) / (high - low)).astype("float32")[..., None]
    image, masks = centre(image, size), centre(masks, size)
    nodules = arrays.get("nodule_id")
    splits = []
    for name in ("train", "val", "test"):
        index = np.flatnonzero(part == name)
        splits.append(
            Split(
                name=name,
                task=SEGMENTATION,
                images=image[index],
                targets=np.ascontiguousarray(masks[index]),
                groups=patients[index],
                ids=None if nodules is None else nodules[index],
                rater_valid=drew[index] if raters == "drew" else None,
            )
        )
    return Parts(*splits)


def centre(images, size):
    """Centre crop, or centre pad with zeros, of `(N, H, W, C)` to `(N, size, size, C)`."""
    for axis in (1, 2):
        side = images.shape[axis]
        if side > size:
            start = (side - size) // 2
            images = np.take(images, np.arange(start, start + size), axis=axis)
        elif side < size:
            before = (size - side) // 2
            pads = [(0, 0)] * images.ndim
            pads[axis] = (before, size - side - before)
            images = np.pad(images, pads)
    return images
