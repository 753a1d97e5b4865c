"""ISIC 2018 Task 1: dermoscopic images, each with a mask of the lesion, in the challenge's folders."""

import collections
import logging
from pathlib import Path

import numpy as np

from . import files
from .base import SEGMENTATION, Card, Parts, first_in_seeded_order
from .decoding import FITS, decoded
from .tables import read_table

logger = logging.getLogger(__name__)

IMAGES = "ISIC2018_Task1-2_{}_Input"
MASKS = "ISIC2018_Task1_{}_GroundTruth"
_OFFICIAL = {"train": "Training", "val": "Validation", "test": "Test"}

ISIC2018 = Card(
    name="isic2018",
    title="ISIC 2018 Task 1: dermoscopic images with the lesion's boundary",
    task=SEGMENTATION,
    classes=("lesion",),
    channels=3,
    num_raters=1,
    licence="CC0 by most accounts, HAM10000 part CC BY-NC: treat as non-commercial research data",
    citation="Codella, N., et al. (2019). arXiv:1902.03368; Tschandl, P., et al. (2018). Scientific Data 5:180161.",
    source="https://challenge.isic-archive.com/data/#2018 (ISIC Challenge 2018)",
    files=("isic2018_task1", IMAGES.format("Training"), MASKS.format("Training")),
    default_size=64,
    network="unet",
    splits="split.csv where present; else the official 2,594 / 100 / 1,000, where the Validation and Test folders "
    "are there; else a seeded 80/10/10 of the training images",
    notes="Patients are not known, so they may be in two splits. The paper: 224 pixels, the official split.",
)


def load_isic2018(
    root: files.Folder, size: int, seed: int, limit: int | None = None, cache: files.Folder = None, *, fit: str = "crop"
) -> Parts:
    """Three splits: images `(N, size, size, 3)` uint8, targets `(N, size, size, 1)` uint8.

    Args:
        root, size, seed, limit, cache: see `load`. At most `limit` images of each split are decoded.
        fit: how an image becomes a square: "crop" cuts the centre square out, as the paper does; "pad" keeps
            the whole image and its aspect and fills the rest with black, no lesion; "stretch" keeps the whole
            image and not its aspect.
    """
    files.check_option("fit", fit, FITS)
    official = Path(IMAGES.format("Training"))
    folder = files.find(ISIC2018, root, [Path("isic2018_task1") / official, official]).parent
    pairs = _split(folder, seed)
    if limit is not None:
        pairs = {
            part: [names[k] for k in first_in_seeded_order(len(names), limit, seed)] for part, names in pairs.items()
        }
    for part, names in pairs.items():
        if not names:
            raise ValueError(f"Expected images of split {part!r} in {folder}. Received: none. Check split.csv.")
    every = sorted({pair for names in pairs.values() for pair in names})  # whatever the split: it may change
    arrays = decoded("isic2018", every, size, fit, 3, cache)
    row = {pair: k for k, pair in enumerate(every)}
    index = {part: np.array([row[pair] for pair in names]) for part, names in pairs.items()}
    ids = np.array([image.stem for image, _ in every])
    return Parts.of(SEGMENTATION, index, images=arrays["images"], targets=arrays["masks"], ids=ids)


def _split(folder, seed):
    training = _pairs(folder, "Training")
    if (folder / "split.csv").exists():
        return _split_from_csv(folder / "split.csv", training)
    if all((folder / IMAGES.format(_OFFICIAL[p])).exists() for p in ("val", "test")):
        return {"train": list(training.values())} | {
            part: list(_pairs(folder, _OFFICIAL[part]).values()) for part in ("val", "test")
        }
    official = [_OFFICIAL[p] for p in ("val", "test") if (folder / IMAGES.format(_OFFICIAL[p])).exists()]
    if official:
        logger.warning(
            "isic2018: the %s folder is not used: without the other one there is no official split", *official
        )
    pairs = list(training.values())
    if len(pairs) < 10:
        expected = "10 training images or more for a random split, or a split.csv"
        raise ValueError(f"Expected {expected}. Received: {len(pairs)} in {folder}")
    order = np.random.default_rng([seed, 18]).permutation(len(pairs))
    tenth = len(pairs) // 10
    index = {"train": order[2 * tenth :], "val": order[:tenth], "test": order[tenth : 2 * tenth]}
    message = (
        "isic2018: no split.csv and no official Validation and Test folders in %s; made a random 80/10/10 split of the "
        "%d training images with seed %d"
    )
    logger.warning(message, folder, len(pairs), seed)
    return {part: [pairs[k] for k in np.sort(chosen)] for part, chosen in index.items()}


def _split_from_csv(path, training):
    header, rows = read_table(path, ("image_id", "split"))
    rows = [dict(zip(header, row, strict=True)) for row in rows]
    part_of = {row["image_id"]: row["split"] for row in rows}
    if len(part_of) < len(rows):
        (often, _), *_ = collections.Counter(row["image_id"] for row in rows).most_common(1)
        raise ValueError(f"Expected one row for each image in {path}. Received: {often} twice or more")
    strange = sorted(set(part_of.values()) - set(_OFFICIAL), key=str)
    if strange:
        raise ValueError(f"Expected split train, val or test in {path}. Received: {strange[0]!r}")
    for what, names in (
        ("an image for every row", set(part_of) - set(training)),
        ("a row for every image", set(training) - set(part_of)),
    ):
        if names:
            raise ValueError(f"Expected {what} of {path}. Received: none for {len(names)}, as {min(names)}")
    return {part: [training[i] for i in sorted(training) if part_of[i] == part] for part in _OFFICIAL}


def _pairs(folder, part):
    """{image id: (image file, mask file)} of one official folder, in the order of their names."""
    images, masks = folder / IMAGES.format(part), folder / MASKS.format(part)
    if not masks.is_dir():
        raise FileNotFoundError(
            f"Expected the masks in {masks}. Received: no such folder.\n"
            f"Get {masks.name} from {ISIC2018.source} and put it beside {images.name}."
        )
    pairs = {p.stem: (p, masks / f"{p.stem}_segmentation.png") for p in files.listed(images, "ISIC_*.jpg").values()}
    if not pairs:
        raise FileNotFoundError(
            f"Expected ISIC_*.jpg in {images}. Received: none.\nGet {images.name} from {ISIC2018.source}."
        )
    there = files.listed(masks, "*_segmentation.png")
    strange = sorted(set(there) - {mask.name for _, mask in pairs.values()})
    if strange:
        raise FileNotFoundError(
            f"Expected an image for every mask in {masks}. Received: {len(strange)} mask(s) without one, "
            f"as {strange[0]}.\nAdd the images to {images} or remove the masks."
        )
    without = [stem for stem, (_, mask) in pairs.items() if mask.name not in there]
    if without:
        raise FileNotFoundError(
            f"Expected a mask {without[0]}_segmentation.png in {masks}. Received: {len(without)} image(s) "
            "without one.\nAdd the masks or remove the images."
        )
    return pairs
