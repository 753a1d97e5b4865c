"""LIDC-IDRI: lung nodules on CT, each outlined by up to four radiologists."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike
from scipy import ndimage

from . import files, npz
from .base import SEGMENTATION, Card, Parts
from .base import SPLITS as PARTS

WINDOW = (-1000.0, 400.0)  # Hounsfield units: air to soft tissue, the customary lung window
_PIXEL_SPACINGS = (0.1, 5.0)  # mm; what a CT slice can have, with room on both sides
RATERS = ("all", "drew")
SPLITS = ("file", "patient")
FOLDS = 4

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
    source="https://doi.org/10.7937/K9/TCIA.2015.LO9QL9SX (TCIA, as DICOMs: data/README.md has the keys of the file to "
    "make from them; lidc_patches has a script)",
    files=("lidc_idri/lidc_idri_maxslice_71.npz",),
    default_size=64,
    network="unet",
    splits="by patient: the file's 1,260 / 319 / 493 nodules, or split='patient': 4 folds",
    notes="Native in-plane pixels of 0.46 to 0.98 mm, or spacing= mm; 0..1 is -1000 to 400 HU. Not the "
    "customary 15,096 patches (lidc_patches): numbers are not comparable with results on those. Mask slot k is not the "
    "same radiologist in two scans. An empty mask is a radiologist who outlined nothing.",
)


def load_lidc(
    root: files.Folder,
    size: int,
    seed: int,
    *,
    split: str = "file",
    fold: int = 0,
    spacing: float | None = None,
    window: tuple[float, float] = WINDOW,
    raters: str = "all",
) -> Parts:
    """Three splits: images `(N, size, size, 1)` float32 0..1, targets `(N, size, size, 4)` uint8, patients.

    Args:
        root, size, seed: see `load`. Outside the file's 71 native pixels there is air and empty mask.
        split: "file": by patient, as the file says; "patient": a quarter of the patients is tested, a tenth of
            the others validates.
        fold: 0 to 3: which quarter is tested; 0 with `split="file"`.
        spacing: side of a pixel in mm, the same for all: patches are resampled about their centre, images linearly,
            masks to the nearest pixel. None: native pixels, 0.46 to 0.98 mm.
        window: (low, high) in Hounsfield units, which become 0 and 1; values beyond are cut off.
        raters: "all": all four masks count, an empty one says that a rater outlined nothing (customary
            with LIDC); "drew": only raters who marked a pixel on this slice count in `rater_valid`.
    """
    files.check_option("split", split, SPLITS)
    check_fold(fold)
    if split == "file" and fold != 0:
        raise ValueError(f"Expected split='patient' for a fold: the file has one split. Received: fold={fold}")
    files.check_option("raters", raters, RATERS)
    low, high = _checked_window(window)
    if spacing is not None:
        _check_spacing(spacing)
    path = files.find(LIDC, root, [LIDC.files[0], LIDC.files[0].split("/")[1]])
    forms: dict[str, npz.Form] = {
        "image": (("N", "H", "W"), "numbers"),
        "masks": (("N", 4, "H", "W"), "numbers or booleans"),
        "patient_id": (("N",), "integers or text"),
    }
    if split == "file":
        forms["split"] = (("N",), "text")
    if spacing is not None:
        forms["pixel_spacing"] = (("N",), "numbers")
    arrays = npz.read_npz(path, forms, {"nodule_id": (("N",), "integers or text")})
    image, masks, patients = (arrays[key] for key in ("image", "masks", "patient_id"))
    index = split_by_group(patients, fold, seed) if split == "patient" else _split_of_file(arrays["split"], path)
    masks = files.check_binary(masks, f"masks of {path}").transpose(0, 2, 3, 1)  # (N, H, W, 4)
    drew = np.asarray(masks.any(axis=(1, 2)))  # before the crop: a rater may have drawn only outside it
    if spacing is not None:
        image, masks = _resampled(image, masks, arrays["pixel_spacing"], size, spacing, low, path)
    image = ((np.clip(image, low, high) - low) / (high - low)).astype("float32")
    image, masks = centre(image if image.ndim == 4 else image[..., None], size), centre(masks, size)
    return Parts.of(
        SEGMENTATION,
        index,
        images=image,
        targets=np.ascontiguousarray(masks),
        groups=patients,
        ids=arrays.get("nodule_id"),
        rater_valid=drew if raters == "drew" else None,
    )


def _split_of_file(part, path):
    strange = sorted(set(part.tolist()) - {*PARTS})
    if strange:
        raise ValueError(f"Expected split train, val or test in {path}. Received: {strange[0]!r}")
    return {name: np.flatnonzero(part == name) for name in PARTS}


def check_fold(fold: int) -> None:
    """Raises a ValueError unless the fold is 0 to 3."""
    if not files.is_integer(fold, 0) or fold >= FOLDS:
        raise ValueError(f"Expected fold 0 to {FOLDS - 1}. Received: fold={fold!r}")


def _check_spacing(spacing):
    if isinstance(spacing, bool) or not np.isscalar(spacing) or isinstance(spacing, str) or not 0 < spacing < np.inf:
        raise ValueError(f"Expected spacing > 0 in mm. Received: spacing={spacing!r}")


def _checked_window(window):
    """(low, high) as floats; a ValueError unless they are such a pair."""
    try:
        low, high = (float(value) for value in window)
    except (TypeError, ValueError):
        low, high = 1.0, 0.0
    if not -np.inf < low < high < np.inf:
        raise ValueError(f"Expected window (low, high) in Hounsfield units, low < high. Received: window={window!r}")
    return low, high


def split_by_group(groups: ArrayLike, fold: int, seed: int) -> dict[str, np.ndarray]:
    """Rows of train, val and test such that no group is in two of them.

    A quarter of the groups is tested, each in one of the four folds; the next tenth of the others validates. The split
    depends on seed and groups, not on the order of the rows.

    Args:
        groups: `(N,)`, the patient of each row.
        fold: 0 to 3.
        seed: of the assignment.
    """
    names = np.unique(groups)
    if len(names) < FOLDS:
        raise ValueError(f"Expected {FOLDS} patients or more for {FOLDS} folds. Received: {len(names)}")
    order = np.random.default_rng([seed, 1018]).permutation(len(names))
    quarters = np.array_split(names[order], FOLDS)
    others = np.concatenate(quarters[fold + 1 :] + quarters[:fold])
    num_val = max(1, round(len(others) / 10))
    parts = {"train": others[num_val:], "val": others[:num_val], "test": quarters[fold]}
    return {part: np.flatnonzero(np.isin(groups, chosen)) for part, chosen in parts.items()}


def _resampled(images, masks, native, size, spacing, air, path):
    """Images `(N, H, W)` and masks `(N, H, W, R)` at one spacing, `(N, size, size, 1)` and `(N, size, size, R)`."""
    low, high = _PIXEL_SPACINGS
    wrong = np.flatnonzero((native < low) | (native > high))
    if len(wrong):
        raise ValueError(
            f"Expected pixel_spacing of {low:g} to {high:g} mm in {path}. Received: {native[wrong[0]]:g} for nodule "
            f"{wrong[0]}; {len(wrong)} such value(s).\nGive it in mm, or leave spacing=None: native pixels."
        )
    out_images = np.empty((len(images), size, size, 1), "float32")
    out_masks = np.zeros((len(images), size, size, masks.shape[-1]), "uint8")
    for k, scale in enumerate((spacing / native.astype("float64")).round(6)):  # 0.7 of a float32 is 0.7
        out_images[k, ..., 0] = resample(images[k].astype("float32"), size, scale, order=1, outside=air)
        for r in np.flatnonzero(masks[k].any(axis=(0, 1))):
            out_masks[k, ..., r] = resample(masks[k, ..., r], size, scale, order=0)
    return out_images, out_masks


def resample(
    image: np.ndarray,
    size: int,
    scale: float,
    middle: tuple[float, float] | None = None,
    order: int = 1,
    outside: float = 0.0,
) -> np.ndarray:
    """A square of `size` pixels, each `scale` pixels of `image` wide, about its middle; a scale of 1 crops or pads.

    Args:
        image: `(H, W)`.
        size: side in pixels.
        scale: wanted spacing / native spacing.
        middle: (row, column) of the image in the middle of the square. Default: its middle pixel, which goes where
            `centre` puts it.
        order: 1: linear; 0: nearest pixel.
        outside: the value beyond the image.
    """
    if middle is None:
        sides = np.array(image.shape)
        about = sides // 2
        target = about + np.where(sides > size, -((sides - size) // 2), (size - sides) // 2)
    else:
        about, target = np.asarray(middle), np.full(2, (size - 1) / 2)
    offset = about - scale * target
    return ndimage.affine_transform(
        image, np.diag([scale, scale]), offset, (size, size), order=order, mode="constant", cval=outside
    )


def centre(images: np.ndarray, size: int) -> np.ndarray:
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
