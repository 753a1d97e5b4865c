"""Datasets behind one contract: `load(name)` gives a `Data` of three `Split`s, with its `Card`.

    from sbn_tf import datasets

    print(datasets.names())
    data = datasets.load("phantom_lesion")
    stream = data.train.batches(50, seed=0, epochs=10)  # each epoch has its own order, raters and turns
    model.fit(stream, epochs=10, steps_per_epoch=data.train.steps(50), shuffle=False)

The phantoms are made on the spot; the others are read from `root`, SBN_TF_DATA or `data/`. What is slow to decode
goes to an array cache once, and what does not fit in memory is read from there batch by batch. For research, not
for clinical use.
"""

import inspect
import os
from collections.abc import Callable

import numpy as np

from . import chest, folder, isic, lidc, lidc_dicom, lidc_patches, medmnist, phantoms
from .base import MULTI_LABEL, SEGMENTATION, TASKS, Card, Data, Parts, Split, first_in_seeded_order
from .check import check
from .download import download
from .tensors import from_arrays, from_tf_data

__all__ = [
    "MULTI_LABEL",
    "SEGMENTATION",
    "Card",
    "Data",
    "Split",
    "card",
    "check",
    "download",
    "folder",
    "from_arrays",
    "from_tf_data",
    "lidc_dicom",
    "load",
    "names",
    "register",
]

MIN_SIZE = 8
NORMALISATIONS = ("train", "paper")

# Splits of which images and targets take more are left on the disk.
MEMORY_BYTES = 512 * 2**20

# name: (card, reader). A reader takes (root, size, seed[, limit][, cache]) and its own options by keyword, and gives
# `Parts`.
_REGISTRY: dict[str, tuple[Card, Callable[..., Parts]]] = {
    "phantom_chest": (phantoms.PHANTOM_CHEST, phantoms.load_phantom_chest),
    "phantom_lesion": (phantoms.PHANTOM_LESION, phantoms.load_phantom_lesion),
    "phantom_nodule": (phantoms.PHANTOM_NODULE, phantoms.load_phantom_nodule),
    "nih_chest": (chest.NIH_CHEST, chest.load_nih_chest),
    "isic2018": (isic.ISIC2018, isic.load_isic2018),
    "lidc": (lidc.LIDC, lidc.load_lidc),
    "lidc_patches": (lidc_patches.LIDC_PATCHES, lidc_patches.load_lidc_patches),
}


def names() -> tuple[str, ...]:
    """Names that `load` and `card` take."""
    return (*_REGISTRY, *medmnist.NAMES)


def register(card: Card, reader: Callable[..., Parts]) -> None:
    """Make a dataset known to `load`, `card` and `compare` under its card's name, in this process.

    Args:
        card: what it is; every reader of a table sees it.
        reader: takes (root, size, seed) and options of its own by keyword, and gives `Parts`; it is given `limit` and
            `cache` where it asks for them. `docs/extending.md` has one of twenty lines.

    Raises:
        ValueError: no `Card`, no function, a name that is taken by another dataset, or a task that is none.
    """
    if not isinstance(card, Card) or card.task not in TASKS:
        raise ValueError(f"Expected a Card with a task among {', '.join(TASKS)}. Received: {card!r}")
    if not callable(reader):
        raise ValueError(f"Expected a reader, a function of (root, size, seed). Received: {reader!r}")
    if card.name in names() and _REGISTRY.get(card.name, (None,))[0] != card:
        raise ValueError(f"Expected a name that no dataset has. Received: {card.name!r}, of a dataset that is known.")
    _REGISTRY[card.name] = (card, reader)


def card(name: str | os.PathLike) -> Card:
    """The card of a dataset; reads no file, save for a folder of your own: its images.csv and the images' headers.

    Raises:
        ValueError: an unknown name.
    """
    return _registered(name)[0]


def load(
    name: str | os.PathLike,
    root: str | os.PathLike | None = None,
    size: int | None = None,
    limit: int | None = None,
    seed: int = 0,
    normalisation: str = "train",
    cache: str | os.PathLike | None = None,
    in_memory: bool | None = None,
    **options,
) -> Data:
    """Load a dataset, or make it.

    Args:
        name: one of `names()`, or the path of a folder of your own images (see `folder`).
        root: folder that holds the data. Default: SBN_TF_DATA, else `data/` of the working directory,
            else `data/` beside the package. Phantoms need none.
        size: side of the square images in pixels, 8 or more. Default: the card's.
            Photographs and radiographs are resized (antialiased; masks: nearest), LIDC is cropped or padded
            about its centre (at native pixels, or lidc's `spacing`), phantoms are drawn at that size.
        limit: at most that many images of each split: the first of a seeded order, kept in file order.
            The same seed gives the same images, a smaller limit a subset of them. Patients stay apart.
        seed: integer >= 0: of `limit`, of a phantom, and of a split that has to be drawn (isic2018). It is
            the data's seed: keep it while the seed of training varies.
        normalisation: "train": the training split's pixel mean and standard deviation, per channel
            (after `limit`); "paper": the paper's constants, where it has them (chest).
        cache: folder of the array cache. Default: SBN_TF_CACHE, else `data/cache` of a checkout, else
            `~/.cache/sbn_tf`.
        in_memory: hold images and targets in memory, or read them from the array cache as they are needed
            (datasets that are cached). Default: in memory up to 512 MiB. Batches are the same either way.
        **options: of one dataset.
            MedMNIST: `download=True` gets the official file where it is not there; `verify=True` compares its md5.
            isic2018, folders: `fit`, how an image becomes a square: "crop", its centre (isic2018's default, as in the
            paper; what a mask loses is told); "pad", the whole with black around (a folder's default); "stretch".
            lidc: `split`, "file" (default) or "patient" with `fold` 0 to 3; `spacing` in mm, for equal pixels;
            `window` in Hounsfield units; `raters`, "all" (default: an empty mask counts) or "drew".
            lidc_patches: `split`, "patient" (default) or "paper" (leaks); `fold` 0 (default) to 3; `raters`.
            phantoms: `num_train`, `num_val`, `num_test`.

    Returns:
        `Data`.

    Raises:
        ValueError: an argument out of range, an unknown name or option, or a file that is not as expected.
        FileNotFoundError: the data are not there; says where to get them and where to put them.
        OSError: the cache's folder cannot be written to, or the disk is full; nothing is lost or half written.
    """
    info, reader = _registered(name)
    size = info.default_size if size is None else size
    _check_integer("size", size, MIN_SIZE)
    _check_integer("seed", seed, 0)
    if limit is not None:
        _check_integer("limit", limit, 1)
    mean, sd = _moments(info, normalisation)

    arguments = inspect.signature(reader).parameters
    known = [key for key, value in arguments.items() if value.kind is value.KEYWORD_ONLY]
    unknown = sorted(set(options) - set(known))
    if unknown:
        raise ValueError(
            f"Expected options of {name!r} among {known}. Received: {unknown[0]}={options[unknown[0]]!r}.\n"
            "help(datasets.load) says what each of them means."
        )
    options |= {key: value for key, value in (("limit", limit), ("cache", cache)) if key in arguments}
    parts = reader(root, size, seed, **options)
    splits = list(parts[:3])
    if limit is not None:
        splits = [
            s if s.num_examples <= limit else s.subset(first_in_seeded_order(s.num_examples, limit, seed))
            for s in splits
        ]
    if in_memory or (in_memory is None and sum(s.nbytes for s in splits) <= MEMORY_BYTES):
        splits = [s.in_memory() for s in splits]
    train, val, test = splits
    return Data(info, train, val, test, mean, sd, parts.leak)


def _registered(name) -> tuple[Card, Callable[..., Parts]]:
    if name in medmnist.NAMES:
        return medmnist.registered(name)
    if name not in _REGISTRY:
        if folder.is_folder(name):
            return folder.folder_dataset(name)
        raise ValueError(
            f"Expected a dataset among {', '.join(names())}. Received: name={name!r}.\n"
            "For images of your own give the path of a folder with an images.csv (see help(datasets.folder))."
        )
    return _REGISTRY[name]


def _check_integer(what, value, least):
    if isinstance(value, bool) or not hasattr(value, "__index__") or value < least:
        raise ValueError(f"Expected an integer {what} >= {least}. Received: {what}={value!r}")


def _moments(info: Card, normalisation: str) -> tuple[np.ndarray, np.ndarray] | tuple[None, None]:
    if normalisation not in NORMALISATIONS:
        raise ValueError(f"Expected normalisation one of {NORMALISATIONS}. Received: {normalisation!r}")
    if normalisation == "train":
        return None, None
    if info.paper_normalisation is None:
        raise ValueError(
            f"Expected normalisation='train' for {info.name!r}, for which the paper has no constants. "
            "Received: normalisation='paper'"
        )
    mean, sd = (np.full(info.channels, value, "float32") for value in info.paper_normalisation)
    return mean, sd
