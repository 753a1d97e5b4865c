"""A small subset of NIH ChestX-ray14, the source of ChestMNIST, in ChestMNIST's keys and label order."""

import logging

from . import files
from .base import MULTI_LABEL, Card, Parts
from .medmnist import CHEST_NORMALISATION, load_npz

logger = logging.getLogger(__name__)

_FIRST = ("atelectasis", "cardiomegaly", "effusion", "infiltration", "mass", "nodule", "pneumonia", "pneumothorax")
LABELS = (*_FIRST, "consolidation", "edema", "emphysema", "fibrosis", "pleural", "hernia")

NIH_CHEST = Card(
    name="nih_chest",
    title="NIH ChestX-ray14 subset: 755 chest radiographs, 14 findings",
    task=MULTI_LABEL,
    classes=LABELS,
    channels=1,
    num_raters=1,
    licence="no restriction on use; NIH asks for attribution and the citation",
    citation="Wang, X., et al. (2017). ChestX-ray8. CVPR, 3462-3471.",
    source="https://nihcc.app.box.com/v/ChestXray-NIHCC (NIH Clinical Center, as PNGs: data/README.md has the keys "
    "of the file to make from them)",
    files=("nih_chestxray14_64/nih_chestxray14_64.npz",),
    default_size=64,
    network="resnet18",
    notes="Split by patient. For tests and smoke runs, not for claims: some labels have no positive image "
    "in val or test. About half of the images are abnormal, on purpose.",
    paper_normalisation=CHEST_NORMALISATION,
)


def load_nih_chest(root: files.Folder, size: int, seed: int, cache: files.Folder = None) -> Parts:
    """Three splits: images `(N, size, size, 1)` uint8, targets `(N, 14)` uint8, patients."""
    place = NIH_CHEST.files[0]
    if size != 64:
        logger.warning("nih_chest: images are resized from 64 to %d pixels", size)
    path = files.find(NIH_CHEST, root, [place, place.split("/")[1]])
    return load_npz(NIH_CHEST, path, size, cache=cache)
