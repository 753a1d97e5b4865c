"""Datasets behind one contract: `load(name)` gives a `Data` of three `Split`s, with its `Card`.

    from sbn_tf import datasets

    print(datasets.names())
    data = datasets.load("phantom_lesion")
    stream = data.train.batches(50, seed=0, epochs=10)  # each epoch has its own order, raters and turns
    model.fit(stream, epochs=10, steps_per_epoch=data.train.steps(50), shuffle=False)

The phantoms are made on the spot; the others are read from `root`, SBN_TF_DATA or `data/`. Files that are slow to
decode are decoded once, into an array cache, and data that do not fit in memory are read from there batch by batch. For
research, not for clinical use.
"""

import inspect
import os
from collections.abc import Callable

import numpy as np

from . import folder, lidc_dicom
from .base import MULTI_LABEL, SEGMENTATION, Card, Data, Parts, Split, first_in_seeded_order, read_if_small
from .check import check
from .files import check_option, is_integer
from .medmnist import download
from .registry import names, register, registered
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

_MIN_SIZE = 8


def card(name: str | os.PathLike) -> Card:
    """The card of a dataset. Only for a folder of your own files are read: its images.csv and the images' headers.

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
        root: folder with the data. Default: SBN_TF_DATA, else `data/` of the working directory, else `data/` beside
            the package. Phantoms need none.
        size: side of the square images in pixels, 8 or more. Default: the card's.
            Photographs and radiographs are resized (antialiased; masks: nearest), LIDC is cropped or padded
            about its centre (at native pixels, or lidc's `spacing`), phantoms are drawn at that size.
        limit: at most that many images of each split: the first of a seeded order, kept in file order.
            The same seed gives the same images, a smaller limit a subset of them. Patients stay apart.
        seed: integer >= 0, for `limit`, for a phantom, and for a split that has to be drawn (isic2018). It is
            the data's seed: keep it while the seed of training varies.
        normalisation: "train": the training split's pixel mean and standard deviation, per channel
            (after `limit`); "paper": the paper's constants, where it has them (chest).
        cache: folder of the array cache. Default: SBN_TF_CACHE, else `data/cache` of a checkout, else
            `~/.cache/sbn_tf`.
        in_memory: keep images and targets in memory, or read them from the array cache as they are needed
            (datasets that are cached). Default: in memory up to 512 MiB. Batches are the same either way.
        **options: of one dataset.
            MedMNIST: `download=True` gets the official file if it is missing; `verify=True` compares its md5.
            isic2018, folders: `fit`, how an image becomes a square: "crop", its centre (isic2018's default, as in the
            paper; a warning says what masks lose); "pad", the whole with black around (a folder's default); "stretch".
            lidc: `split`, "file" (default) or "patient" with `fold` 0 to 3; `spacing` in mm, for equal pixels;
            `window` in Hounsfield units; `raters`, "all" (default: an empty mask counts) or "drew".
            lidc_patches: `split`, "patient" (default) or "paper" (leaks); `fold` 0 (default) to 3; `raters`.
            phantoms: `num_train`, `num_val`, `num_test`.

    Raises:
        ValueError: an argument out of range, an unknown name or option, or a file that is not as expected.
        FileNotFoundError: the data are not there; the message says where to get them and where to put them.
        OSError: the cache's folder cannot be written to, or the disk is full; nothing is lost or half written.
    """
    info, reader = _registered(name)
    size = info.default_size if size is None else size
    for what, value, least in (("size", size, _MIN_SIZE), ("seed", seed, 0), ("limit", limit, 1)):
        if not is_integer(value, least) and not (what == "limit" and value is None):
            raise ValueError(f"Expected an integer {what} >= {least}. Received: {what}={value!r}")
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
    *splits, leak = reader(root, size, seed, **options)
    if limit is not None:
        splits = [
            s if s.num_examples <= limit else s.subset(first_in_seeded_order(s.num_examples, limit, seed))
            for s in splits
        ]
    train, val, test = read_if_small(splits, in_memory)
    return Data(info, train, val, test, mean, sd, leak)


def _registered(name) -> tuple[Card, Callable[..., Parts]]:
    found = registered(name)
    if found is None:
        if folder.is_folder(name):
            return folder.folder_dataset(name)
        raise ValueError(
            f"Expected a dataset among {', '.join(names())}. Received: name={name!r}"
            f"{', a folder without images.csv' if isinstance(name, str) and os.path.isdir(name) else ''}.\n"
            "For images of your own give the path of a folder with an images.csv (data/README.md)."
        )
    return found


def _moments(info: Card, normalisation: str) -> tuple[np.ndarray, np.ndarray] | tuple[None, None]:
    check_option("normalisation", normalisation, ("train", "paper"))
    if normalisation == "train":
        return None, None
    if info.paper_normalisation is None:
        raise ValueError(
            f"Expected normalisation='train' for {info.name!r}, for which the paper has no constants. "
            "Received: normalisation='paper'"
        )
    mean, sd = (np.full(info.channels, value, "float32") for value in info.paper_normalisation)
    return mean, sd
