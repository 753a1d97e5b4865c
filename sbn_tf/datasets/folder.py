"""Your own images: a folder with an `images.csv` is a dataset.

    my_data/
      images.csv         one row an image
      images/            the files: png, jpg, tif or bmp, grey or RGB, of 8 bits a channel, or grey of 16, which are
                         divided by 65535; dcm, nii, nii.gz, see `sbn_tf.datasets.medical`; hidden files do not count
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
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from decimal import Decimal
from pathlib import Path, PurePosixPath

import numpy as np

from .base import (
    BINARY,
    EXCLUSIVE,
    MULTI_CLASS,
    MULTI_LABEL,
    ORDINAL,
    SEGMENTATION,
    SPLITS,
    Card,
    Parts,
    first_in_seeded_order,
)
from .decoding import FITS, decoded, grey_and_deep
from .files import check_option, listed
from .medical import file_of
from .registry import names
from .tables import read_table

__all__ = ["folder_dataset", "is_folder"]

logger = logging.getLogger(__name__)

NUMBER = re.compile(r"[+-]?\d+(\.\d*)?")
CSV, IMAGES, MASKS = "images.csv", "images", "masks"
KNOWN = ("image", "split", "patient", "mask", "label", "grade")


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
    table = _read_table(Path(name).expanduser())
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

    `window`: what becomes 0 and 1 of DICOM and NIfTI, (low, high).
    """
    check_option("fit", fit, FITS)
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
    arrays = decoded(table.card().name, pairs, size, fit, table.channels, cache, table.deep, window)
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


# ---- the csv


def _read_table(folder):
    path = folder / CSV
    if not path.is_file():
        received = f"no {CSV} in it" if folder.is_dir() else f"no such folder (from {Path.cwd()})"
        raise FileNotFoundError(
            f"Expected a folder with an {CSV}. Received: {folder}, {received}.\n"
            "Write one with a row for each image: image,split,label, or with mask for segmentation."
        )
    header, rows = _read_csv(path)
    column = {name: [row[k] for row in rows] for k, name in enumerate(header)}
    names = [_inside(name, "image", path) for name in column["image"]]
    _check_unique(names, "row for each image", path)
    task, classes, targets, masks, note = _targets(column, path)
    splits, patients = column.get("split"), column.get("patient")
    if splits is not None:
        _check_splits(splits, path)
    if patients is not None:
        _check_cells(patients, bool, "a patient in every row, or no column patient", path)
        patients = np.array(patients)
        _check_patients(splits, patients, path)
    images = _found(folder / IMAGES, names, "image")
    if masks is not None:
        there = _found(folder / MASKS, [mask for row in masks for mask in row if mask is not None], "mask")
        masks = [tuple(there.get(mask) for mask in row) for row in masks]
    elif (folder / MASKS).exists():
        advice = f"Name each image's mask there, or move the folder {MASKS} elsewhere."
        raise _wrong(path, "a column mask", f"columns {', '.join(header)}, and a folder {MASKS}", advice)
    grey, deep = zip(*map(grey_and_deep, images.values()), strict=True)
    channels = 1 if all(grey) else 3
    return _Table(folder, images, task, classes, targets, masks, splits, patients, channels, any(deep), note)


def _read_csv(path):
    header, rows = read_table(path)
    for name in header:
        if name not in KNOWN and name.lower() in KNOWN:
            raise _wrong(path, f"the column {name.lower()!r} in small letters", repr(name), "Rename it.")
    if "image" not in header:
        advice = "Rename the column of the images' file names."
        raise _wrong(path, "a column image", f"columns {', '.join(header)}", advice)
    return header, rows


def _targets(column, path):
    """Task, classes, targets `(N, L)` uint8 or None, masks or None, and a note for the card."""
    others = [name for name in column if name not in ("image", "split", "patient")]
    named = [name for name in others if name.lower().startswith("mask")]
    raters = ["mask"] if named == ["mask"] else [f"mask_{k + 1}" for k in range(len(named))]
    if named and set(named) != set(raters):
        expected = "the columns mask, or mask_1, mask_2, ... without a gap"
        raise _wrong(path, expected, f"columns {', '.join(named)}", "Rename the columns of the masks' file names.")
    single = [name for name in ("label", "grade") if name in others]
    kinds = bool(named) + len(single) + bool(set(others) - set(named) - set(single))
    if kinds > 1:
        expected = "either mask columns, or label, or grade, or columns of 0 and 1"
        raise _wrong(path, expected, f"columns {', '.join(others)}", "Leave out columns that are not to be learnt.")
    if kinds == 0:
        raise _wrong(path, "mask columns, or label, or grade, or columns of 0 and 1", f"columns {', '.join(column)}")
    if named:
        return SEGMENTATION, ("foreground",), None, _masks(column, raters, path), ""
    if single == ["label"]:
        return _labels(column["label"], path)
    if single == ["grade"]:
        return _grades(column["grade"], path)
    values = {"0": 0, "1": 1, "0.0": 0, "1.0": 1}  # pandas writes 1.0 in a column that had an empty cell
    advice = f"A column that is none of {', '.join(KNOWN)} is a label; leave out all others."
    for name in others:
        _check_cells(column[name], values.__contains__, f"0 or 1 in column {name!r}", path, advice)
    targets = np.array([[values[cell] for cell in column[name]] for name in others], "uint8").T
    return (MULTI_LABEL if len(others) > 1 else BINARY), tuple(others), np.ascontiguousarray(targets), None, ""


def _masks(column, raters, path):
    rows = []
    for row, cells in enumerate(zip(*(column[name] for name in raters), strict=True)):
        if not any(cells):
            raise _wrong(path, "one mask or more in each row", f"none in row {row + 1} below the header")
        rows.append(tuple(_inside(cell, "mask", path) if cell else None for cell in cells))
    _check_unique([mask for row in rows for mask in row if mask is not None], "cell for each mask", path)
    return rows


def _labels(cells, path):
    _check_cells(cells, lambda cell: cell.lower() not in ("", "nan"), "a class name in each cell of label", path)
    classes = sorted(set(cells))
    _check_spelling(classes, lambda name: Decimal(name) if NUMBER.fullmatch(name) else name.lower(), "class", path)
    if len(classes) < 2:
        raise _wrong(path, "two classes or more in column label", f"{classes[0]!r} alone")
    if all(map(NUMBER.fullmatch, classes)):
        classes.sort(key=Decimal)
    number = {name: k for k, name in enumerate(classes)}
    numbers = np.array([number[cell] for cell in cells])
    if len(classes) == 2:
        note = f"1 is {classes[1]!r}, 0 is {classes[0]!r}."
        return BINARY, (classes[1],), numbers[:, None].astype("uint8"), None, note
    return MULTI_CLASS, tuple(classes), np.eye(len(classes), dtype="uint8")[numbers], None, ""


def _grades(cells, path):
    grade = re.compile(r"[0-9]{1,4}(\.0)?")
    _check_cells(cells, grade.fullmatch, "a grade 0, 1, 2, ... in each cell of grade", path)
    numbers = np.array([int(float(cell)) for cell in cells])
    count = int(numbers.max()) + 1
    absent = sorted(set(range(count)) - set(numbers.tolist()))
    if count < 2 or 2 * len(absent) > count:
        raise _wrong(path, "grades from 0 to K-1 in column grade", f"{sorted(set(numbers.tolist()))[:5]} alone")
    if absent:
        logger.warning("%s: no image is of grade %s", path, ", ".join(map(str, absent)))
    return ORDINAL, tuple(map(str, range(count))), np.eye(count, dtype="uint8")[numbers], None, ""


def _inside(name, what, path):
    """The file's name with single slashes; refuses one outside the folder."""
    parts = PurePosixPath(name).parts
    if not parts or name.startswith("/") or ".." in parts or "\\" in name or ":" in parts[0]:
        advice = "Write it with / and without .. or a drive, as in a/b.png."
        raise _wrong(path, f"the name of a file below the folder {what}s/ in column {what}", repr(name), advice)
    return str(PurePosixPath(name))


def _check_unique(names, what, path):
    name, count = Counter(names).most_common(1)[0]
    if count > 1:
        raise _wrong(path, f"one {what}", f"{name} in {count} of them")


def _check_spelling(names, plain, what, path):
    """Refuses two names of one thing, of the same `plain` name, such as 0 and 0.0 where csv files were joined."""
    first = {}
    for name in names:
        same = first.setdefault(plain(name), name)
        if same != name:
            raise _wrong(path, f"one spelling of each {what}", f"{same!r} and {name!r}", "Write all of them one way.")


def _check_splits(splits, path):
    _check_cells(splits, SPLITS.__contains__, "split train, val or test", path)
    for part in SPLITS:
        if part not in splits:
            raise _wrong(path, "images of train, val and test", f"none of {part}")


def _check_patients(splits, patients, path):
    _check_spelling(patients.tolist(), lambda name: re.sub(r"\.0+$", "", name), "patient", path)
    first = {}
    for patient, part in zip(patients.tolist(), splits or [""] * len(patients), strict=True):
        if first.setdefault(patient, part) != part:
            received = f"{patient!r} in {first[patient]} and {part}"
            advice = "Move them into one, or leave the column split out: one by patient is then drawn."
            raise _wrong(path, "all images of a patient in one split", received, advice)


def _check_cells(cells, right, expected, path, *advice):
    """Refuses the first cell of a column that is not right, by its row."""
    for row, cell in enumerate(cells):
        if not right(cell):
            raise _wrong(path, expected, f"{cell!r} in row {row + 1} below the header", *advice)


def _wrong(path, expected, received, advice="from sbn_tf import datasets; help(datasets.folder) shows all columns."):
    return ValueError(f"Expected {expected} in {path}. Received: {received}.\n{advice}")


# ---- the files


def _found(folder, names, what):
    """The path of each name; refuses a row without its file and a file without its row."""
    there = listed(folder, deep=True)
    files = {name: file_of(name).as_posix() for name in names}  # of a slice, a.nii#3, the volume
    missing = [name for name in names if files[name] not in there]
    if missing:
        raise FileNotFoundError(
            f"Expected the {what}s that {CSV} names in {folder}. "
            f"Received: {len(missing)} of {len(names)} are not there, as {missing[0]}.\n"
            "Put them there, or correct the names: below that folder, with ending; small and capital letters count."
        )
    strange = sorted(set(there) - set(files.values()))
    if strange:
        raise ValueError(
            f"Expected a row of {CSV} for every file in {folder}. Received: {len(strange)} without one, as "
            f"{strange[0]}.\nAdd the rows, or move the files elsewhere."
        )
    return {name: Path(f"{there[files[name]]}{name.removeprefix(files[name])}") for name in names}


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
