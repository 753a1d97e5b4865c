"""Chest radiographs with 14 labels: ChestMNIST's official files, and a small subset of its source."""

import logging
from pathlib import Path

import numpy as np

from . import files
from .base import MULTI_LABEL, Card, Parts, Split

__all__ = ["CHESTMNIST", "LABELS", "NIH_CHEST", "load_chestmnist", "load_nih_chest"]

logger = logging.getLogger(__name__)

LABELS = (
    "atelectasis",
    "cardiomegaly",
    "effusion",
    "infiltration",
    "mass",
    "nodule",
    "pneumonia",
    "pneumothorax",
    "consolidation",
    "edema",
    "emphysema",
    "fibrosis",
    "pleural",
    "hernia",
)
PARTS = ("train", "val", "test")
SIZES = (28, 64, 128, 224)
PAPER_NORMALISATION = (0.498, 0.247)

CHESTMNIST = Card(
    name="chestmnist",
    title="ChestMNIST: 112,120 chest radiographs, 14 findings",
    task=MULTI_LABEL,
    classes=LABELS,
    channels=1,
    num_raters=1,
    licence="CC BY 4.0 (MedMNIST v2)",
    citation="Yang, J., et al. (2023). MedMNIST v2. Scientific Data 10:41; "
    "Wang, X., et al. (2017). ChestX-ray8. CVPR, 3462-3471.",
    source="https://zenodo.org/records/10519652 (MedMNIST)",
    files=("chestmnist.npz", "chestmnist_64.npz", "chestmnist_128.npz", "chestmnist_224.npz"),
    default_size=64,
    network="resnet18",
    notes="Official split, 78,468 / 11,219 / 22,433. Held in memory: 3.9 GB for training at 224 pixels. "
    "Labels were mined from reports and are noisy.",
    paper_normalisation=PAPER_NORMALISATION,
    checksums=(
        ("chestmnist.npz", "02c8a6516a18b556561a56cbdd36c4a8"),
        ("chestmnist_64.npz", "9de6cd0b934ebb5b7426cfba5efbae16"),
        ("chestmnist_128.npz", "db107e5590b27930b62dbaf558aebee3"),
        ("chestmnist_224.npz", "45bd33e6f06c3e8cdb481c74a89152aa"),
    ),
)

NIH_CHEST = Card(
    name="nih_chest",
    title="NIH ChestX-ray14 subset: 755 chest radiographs, 14 findings",
    task=MULTI_LABEL,
    classes=LABELS,
    channels=1,
    num_raters=1,
    licence="no restriction on use; NIH asks for attribution and the citation",
    citation="Wang, X., et al. (2017). ChestX-ray8. CVPR, 3462-3471.",
    source="https://nihcc.app.box.com/v/ChestXray-NIHCC (NIH Clinical Center)",
    files=("nih_chestxray14_64/nih_chestxray14_64.npz",),
    default_size=64,
    network="resnet18",
    notes="Split by patient. For tests and smoke runs, not for claims: some labels have no positive image "
    "in val or test. About half of the images are abnormal, on purpose.",
    paper_normalisation=PAPER_NORMALISATION,
)


def load_nih_chest(root, size, seed):
    """The NIH subset: three splits, images `(N, size, size, 1)` uint8, targets `(N, 14)` uint8, patients."""
    folder, name = NIH_CHEST.files[0].split("/")
    if size != 64:
        logger.warning("nih_chest: images are resized from 64 to %d pixels", size)
    path = files.find(NIH_CHEST, root, [Path(folder) / name, Path(name)])
    return read_chest_npz(path, size)


def load_chestmnist(root, size, seed, *, verify=False):
    """ChestMNIST: the smallest official file of at least `size` pixels, resized down if it is larger.

    Args:
        root, size: see `load`.
        seed: unused, the split is official.
        verify: compare the file's md5 with the official one first (seconds).
    """
    names = {s: "chestmnist.npz" if s == 28 else f"chestmnist_{s}.npz" for s in SIZES if s >= size}
    if not names:
        raise ValueError(f"Expected size <= {max(SIZES)}, the largest official file. Received: size={size}")
    places = [p for name in names.values() for p in (Path(name), Path("chestmnist") / name)]
    path = files.find(CHESTMNIST, root, places)
    side = next(s for s, name in names.items() if name == path.name)
    if side != size:
        logger.warning("chestmnist: %s is resized from %d to %d pixels", path.name, side, size)
    if verify and files.md5(path) != dict(CHESTMNIST.checksums)[path.name]:
        raise ValueError(
            f"Expected md5 {dict(CHESTMNIST.checksums)[path.name]} for {path}. Received: {files.md5(path)}.\n"
            "It is not the official file, or it was cut short: get it again."
        )
    return read_chest_npz(path, size, side)


def read_chest_npz(path, size, side=None):
    """Three splits from an npz with ChestMNIST's keys; `*_patients` and `*_names` are read where present."""
    axes = {f"{part}_images": 3 for part in PARTS} | {f"{part}_labels": 2 for part in PARTS}
    extras = [f"{part}_{key}" for part in PARTS for key in ("patients", "names")]
    arrays = files.read_npz(path, axes, extras)
    splits = []
    for part in PARTS:
        images, labels = arrays[f"{part}_images"], arrays[f"{part}_labels"]
        square = side or images.shape[1]
        if images.dtype != np.uint8 or images.shape[1:] != (square, square):
            raise ValueError(
                f"Expected {part}_images (N, {square}, {square}) uint8 in {path}. "
                f"Received: shape {images.shape}, {images.dtype}"
            )
        if labels.shape != (len(images), len(LABELS)):
            raise ValueError(
                f"Expected {part}_labels ({len(images)}, {len(LABELS)}) in {path}. Received: shape {labels.shape}"
            )
        splits.append(
            Split(
                name=part,
                task=MULTI_LABEL,
                images=files.resize_images(images[..., None], size),
                targets=files.check_binary(labels, f"{part}_labels of {path}"),
                groups=arrays.get(f"{part}_patients"),
                ids=arrays.get(f"{part}_names"),
            )
        )
    return Parts(*splits)
