"""Your own images: a folder with an `images.csv` is a dataset.

    my_data/
      images.csv         one row an image
      images/            the files: png, jpg, tif or bmp, grey or RGB, of 8 bits a channel, or grey of 16, which are
                         divided by 65535; dcm, nii, nii.gz (see `sbn_tf.datasets.medical`); hidden files do not count
      masks/             for segmentation alone

Columns of images.csv, with commas between them, in UTF-8:

    image                file name below images/
    split                optional: train, val or test. Without it 80/10/10 are drawn, by patient where these are known.
    patient              optional: any name; all images of a patient have to be in one split

and one of

    mask                 file name below masks/: segmentation, of 0 and 1 or 0 and 255
    mask_1 .. mask_R     the same by R raters; an empty cell where that rater's mask is missing
    label                a class name: multi-class; binary where there are two, of which the last in the alphabet is 1
    grade                0, 1, .. K-1: ordinal
    any other columns    0 or 1, one column for each label: multi-label; binary where there is one

`datasets.load("path/to/my_data")` and `datasets.card("path/to/my_data")` take it like the name of a dataset.
"""

import functools
import logging
import os
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from . import columns
from .base import EXCLUSIVE, SEGMENTATION, SPLITS, Card, Parts, first_in_seeded_order
from .columns import CSV, IMAGES, MASKS, wrong
from .decoding import FITS, decoded, grey_and_deep
from .faults import Fault, Faults, fault_of, unreadable
from .files import check_option, is_integer, listed
from .medical import file_of
from .registry import names

__all__ = ["Folder"]

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Folder(os.PathLike):
    """A folder of images, and how its files are read; taken wherever its path is.

    Args:
        path: of the folder.
        threshold: pixels of a mask at least so bright are foreground, 1 to 255, for masks with soft edges; None: masks
            of other values than two are refused.
        skip_broken: leave out the rows whose files are missing or cannot be read, with a warning for each; every file
            is decoded first.

    Raises:
        ValueError: a threshold out of its range.
    """

    path: str | os.PathLike
    threshold: int | None = None
    skip_broken: bool = False

    def __post_init__(self):
        if self.threshold is not None and not (is_integer(self.threshold, 1) and self.threshold <= 255):
            raise ValueError(f"Expected threshold, a grey value 1 to 255, or None. Received: {self.threshold!r}")

    def __fspath__(self):
        return os.fspath(self.path)

    @property
    def root(self) -> Path:
        """The folder."""
        return Path(self.path).expanduser()

    @functools.cached_property
    def broken(self) -> dict[int, list[Fault]]:
        """Row of images.csv, from 0 -> what is wrong with its files."""
        header, rows = columns.read_csv(self.root / CSV)
        raters = [name for name in header if name.lower().startswith("mask")]
        there = {part: listed(self.root / part, deep=True) for part in (IMAGES, MASKS)}

        def path(part, name):
            if not name or not columns.is_inside(name):
                return None
            return _at(there[part].get(_file(name), self.root / part / _file(name)), name)

        cells = (dict(zip(header, row, strict=True)) for row in rows)
        pairs = ((path(IMAGES, row["image"]), *(path(MASKS, row[name]) for name in raters)) for row in cells)
        return unreadable(pairs, self.root, self.threshold, len(rows))


def faults(name: str | os.PathLike) -> list[Fault]:
    """Everything that is wrong with a folder's images.csv and files, not the first of it alone; [] where nothing is.

    Args:
        name: of the folder, or a `Folder`.
    """
    given = name if isinstance(name, Folder) else Folder(name)
    folder, path = given.root, given.root / CSV
    try:
        column = columns.columns_of(*columns.read_csv(columns.csv_of(folder)))
        found = [fault for those in given.broken.values() for fault in those]
        there = {part: listed(folder / part, deep=True) for part in (IMAGES, MASKS)}
    except (ValueError, OSError) as error:
        return [fault_of(error, CSV, folder)]
    for check in columns.CHECKS:
        try:
            check(column, path)
        except Faults as error:
            found += [fault_of(one, CSV, folder) for one in error.errors]
        except ValueError as error:
            found.append(fault_of(error, CSV, folder))
    masks = [cells for name, cells in column.items() if name.lower().startswith("mask")]
    for part, named in ((IMAGES, [column["image"]]), (MASKS, masks)):
        strange = sorted(set(there[part]) - {_file(name) for cells in named for name in cells}) if named else []
        says = f"Expected a row of {CSV} for it. Received: none.", "Add a row, or move the file elsewhere."
        found += [Fault(f"{part}/{one}", *says) for one in strange]
    return found


def is_folder(name: str | os.PathLike) -> bool:
    """Whether a dataset's name is that of a folder: it has a path separator, or an images.csv is in it."""
    text = os.fspath(name) if isinstance(name, str | os.PathLike) else ""
    return bool(text) and ("/" in text or os.sep in text or not isinstance(name, str) or (Path(text) / CSV).is_file())


def folder_dataset(name: str | os.PathLike) -> tuple[Card, Callable[..., Parts]]:
    """Card and reader of a folder, as in the registry; reads the csv and the files' headers.

    Raises:
        FileNotFoundError: the folder, its images.csv or a file that it names is not there.
        ValueError: an images.csv that is not as the module's docstring says, or a file that no row names.
    """
    table = _read_table(name if isinstance(name, Folder) else Folder(name))
    return table.card(), functools.partial(_load, table)


@dataclass(frozen=True, eq=False)
class _Table:
    """What an images.csv says, a row for each image."""

    folder: Path
    images: dict[str, Path]
    task: str
    classes: tuple[str, ...]
    targets: np.ndarray | None
    masks: list[tuple[Path | None, ...]] | None
    splits: list[str] | None
    patients: np.ndarray | None
    channels: int
    deep: bool
    note: str
    threshold: int | None
    broken: dict[int, list[Fault]]

    def card(self):
        base = self.folder.resolve().name
        name = re.sub(r"[^A-Za-z0-9_-]+", "_", base).strip("_") or "folder"
        raters = 1 if self.masks is None else len(self.masks[0])
        counts, splits = None, "80/10/10, drawn by the seed"
        if self.splits is not None:
            counts, splits = tuple(self.splits.count(part) for part in SPLITS), "the column split of images.csv"
        elif self.patients is not None:
            splits += ", whole patients"
        return Card(
            name=f"{name}_folder" if name in names() else name,
            title=f"{len(self.images):,} images of the folder {base}",
            task=self.task,
            classes=self.classes,
            channels=self.channels,
            num_raters=raters,
            licence="yours",
            citation="none",
            source=f"the folder {base}",
            files=(CSV, IMAGES) if self.masks is None else (CSV, IMAGES, MASKS),
            default_size=64,
            network="unet" if self.task == SEGMENTATION else "resnet18",
            counts=counts,
            splits=splits,
            notes=self.note,
        )


def _load(table, root, size, seed, limit=None, cache=None, *, fit="pad", window=None):
    """Three splits of a folder; `fit` as for isic2018, but by default nothing is cut off. `root` is not used.

    `window` (low, high) is what becomes 0 and 1 of DICOM and NIfTI, else see `medical`.
    """
    check_option("fit", fit, FITS)
    for fault in (fault for those in table.broken.values() for fault in those):
        logger.warning("%s: row left out: %s: %s", table.folder / CSV, fault.file, fault.fault)
    if table.splits is None:
        rows_of = _drawn(table, seed)
    else:
        rows_of = {part: np.flatnonzero(np.array(table.splits) == part) for part in SPLITS}
    _check_classes(table, rows_of)
    if limit is not None:
        rows_of = {part: rows[first_in_seeded_order(len(rows), limit, seed)] for part, rows in rows_of.items()}
    every = np.sort(np.concatenate(list(rows_of.values())))
    names, paths = np.array(list(table.images)), list(table.images.values())
    pairs = [(paths[row], *(() if table.masks is None else table.masks[row])) for row in every]
    arrays = decoded(table.card().name, pairs, size, fit, table.channels, cache, table.threshold, table.deep, window)
    masks = None if table.masks is None else np.array([[m is not None for m in table.masks[row]] for row in every])
    return Parts.of(
        table.task,
        {part: np.searchsorted(every, rows) for part, rows in rows_of.items()},
        images=arrays["images"],
        targets=table.targets[every] if masks is None else arrays["masks"],
        groups=None if table.patients is None else table.patients[every],
        ids=names[every],
        rater_valid=masks,
    )


def _read_table(given):
    folder = given.root
    path = columns.csv_of(folder)
    header, rows = columns.read_csv(path)
    broken = given.broken if given.skip_broken else {}
    column = columns.columns_of(header, [row for number, row in enumerate(rows) if number not in broken])
    if len(broken) == len(rows):
        raise wrong(path, "a row whose files can be read", "none", "`sbn-tf check` says what is wrong with each.")
    names = columns.names_of(column, path)
    task, classes, targets, masks, note = columns.targets_of(column, path)
    splits, patients = columns.splits_of(column, path), columns.patients_of(column, path)
    left_out = set().union(*(rows[number] for number in broken))
    images = _found(folder / IMAGES, names, "image", left_out)
    if masks is not None:
        cells = [mask for row in masks for mask in row if mask is not None]
        there = _found(folder / MASKS, cells, "mask", left_out)
        masks = [tuple(there.get(mask) for mask in row) for row in masks]
    columns.check_masks_folder(column, path)
    grey, deep = zip(*map(grey_and_deep, images.values()), strict=True)
    channels, cut = 1 if all(grey) else 3, given.threshold
    return _Table(
        folder, images, task, classes, targets, masks, splits, patients, channels, any(deep), note, cut, broken
    )


# ---- the files


def _found(folder, names, what, left_out):
    """The path of each name; refuses a row without its file and a file without its row, but for those left out."""
    there = listed(folder, deep=True)
    missing = [name for name in names if _file(name) not in there]
    if missing:
        raise FileNotFoundError(
            f"Expected the {what}s that {CSV} names in {folder}. "
            f"Received: {len(missing)} of {len(names)} are not there, as {missing[0]}.\n"
            "Put them there, or correct the names: below that folder, with ending; small and capital letters count."
        )
    strange = sorted(set(there) - {_file(name) for name in [*names, *left_out] if name})
    if strange:
        raise ValueError(
            f"Expected a row of {CSV} for every file in {folder}. Received: {len(strange)} without one, as "
            f"{strange[0]}.\nAdd the rows, or move the files elsewhere."
        )
    return {name: _at(there[_file(name)], name) for name in names}


def _file(name):
    """The name of the file that an image is in: of the slice a.nii#3 it is a.nii."""
    return file_of(name).as_posix()


def _at(path, name):
    """The path of a file with the number of the slice that an image's name has."""
    return path.with_name(path.name + Path(name).as_posix().removeprefix(_file(name)))


# ---- the splits


def _drawn(table, seed):
    """A random 80/10/10 by patient if patients are known, else by image; a warning says so."""
    n, rng = len(table.images), np.random.default_rng([seed, 80])
    by = "image" if table.patients is None else "patient"
    units, unit_of = np.unique(np.arange(n) if table.patients is None else table.patients, return_inverse=True)
    if len(units) < 10:
        raise ValueError(
            f"Expected a column split, or 10 {by}s or more to draw one from, in {table.folder / CSV}. "
            f"Received: {len(units)}.\nAdd a column split: train, val or test."
        )
    sizes, left = np.bincount(unit_of), rng.permutation(len(units)).tolist()
    part_of = np.full(len(units), "train")
    for part in ("val", "test"):
        count = 0
        for unit in left.copy():  # a patient of very many images stays in training
            if count < n // 10 and count + sizes[unit] <= max(n // 8, 1):
                part_of[unit] = part
                count += sizes[unit]
                left.remove(unit)
        if not count:
            unit = min(left, key=lambda unit: sizes[unit])
            part_of[unit] = part
            left.remove(unit)
    rows_of = {part: np.flatnonzero(part_of[unit_of] == part) for part in SPLITS}
    sizes_of = " / ".join(str(len(rows)) for rows in rows_of.values())
    message = "%s has no column split: made a random split by %s, %s images, with seed %d"
    logger.warning(message, table.folder / CSV, by, sizes_of, seed)
    return rows_of


def _check_classes(table, rows_of):
    """Warns of a class that a split lacks."""
    if table.masks is not None:
        return
    for part, rows in rows_of.items():
        counts = table.targets[rows].sum(0, dtype="int64")
        absent = [name for name, count in zip(table.classes, counts, strict=True) if count == 0]
        if table.task not in EXCLUSIVE:
            absent += [f"not {n}" for n, count in zip(table.classes, counts, strict=True) if count == len(rows)]
        if absent:
            logger.warning("%s: split %s has no image of %s", table.folder / CSV, part, ", ".join(absent))
