"""What an images.csv says: its columns, checked. `datasets.folder` tells what they mean."""

import difflib
import logging
import re
from collections import Counter
from decimal import Decimal
from pathlib import Path, PurePosixPath

import numpy as np

from .base import BINARY, MULTI_CLASS, MULTI_LABEL, ORDINAL, SEGMENTATION, SPLITS
from .faults import Faults
from .tables import read_table

logger = logging.getLogger(__name__)

_NUMBER = re.compile(r"[+-]?\d+(\.\d*)?")
CSV, IMAGES, MASKS = "images.csv", "images", "masks"
_HELP = "from sbn_tf import datasets; help(datasets.folder) shows all columns."
Columns = dict[str, list[str]]  # name of a column -> its cells
_KNOWN = ("image", "split", "patient", "mask", "label", "grade")


def csv_of(folder: Path) -> Path:
    """The path of a folder's images.csv; a FileNotFoundError where there is none."""
    path = folder / CSV
    if not path.is_file():
        received, advice = f"no such folder (from {Path.cwd()})", "Check the path."
        if folder.is_dir():
            received = f"no {CSV} in it"
            advice = "Write one with a row for each image: image,split,label, or with mask for segmentation."
        raise FileNotFoundError(f"Expected a folder with an {CSV}. Received: {folder}, {received}.\n{advice}")
    return path


def columns_of(header: list[str], rows: list[tuple[str, ...]]) -> Columns:
    """Name of a column -> its cells."""
    return {name: [row[k] for row in rows] for k, name in enumerate(header)}


def names_of(column: Columns, path: Path) -> list[str]:
    """File name of each row's image; refuses one outside the folder and one that comes twice."""
    names = [_inside(name, "image", path) for name in column["image"]]
    _check_unique(names, "row for each image", path)
    return names


def splits_of(column: Columns, path: Path) -> list[str] | None:
    """Split of each row, checked; None: to be drawn."""
    splits = column.get("split")
    if splits is not None:
        _check_cells(splits, SPLITS.__contains__, "split train, val or test", path)
        for part in SPLITS:
            if part not in splits:
                raise wrong(path, "images of train, val and test", f"none of {part}")
    return splits


def patients_of(column: Columns, path: Path) -> np.ndarray | None:
    """Patient of each row, checked: none is in two splits; None: not known."""
    patients = column.get("patient")
    if patients is None:
        return None
    _check_cells(patients, bool, "a patient in every row, or no column patient", path)
    _check_spelling(patients, lambda name: re.sub(r"\.0+$", "", name), "patient", path)
    first = {}
    for patient, part in zip(patients, column.get("split", [""] * len(patients)), strict=True):
        if first.setdefault(patient, part) != part:
            received = f"{patient!r} in {first[patient]} and {part}"
            advice = "Move them into one, or leave the column split out: one by patient is then drawn."
            raise wrong(path, "all images of a patient in one split", received, advice)
    return np.array(patients)


def check_masks_folder(column: Columns, path: Path) -> None:
    """Refuses a folder of masks that no column names."""
    if not any(name.lower().startswith("mask") for name in column) and (path.parent / MASKS).exists():
        advice = f"Name each image's mask there, or move the folder {MASKS} elsewhere."
        raise wrong(path, "a column mask", f"columns {', '.join(column)}, and a folder {MASKS}", advice)


def read_csv(path: Path) -> tuple[list[str], list[tuple[str, ...]]]:
    """Header and rows of an images.csv; refuses names of columns that are probably others."""
    header, rows = read_table(path)
    for name in header:
        if name not in _KNOWN and name.lower() in _KNOWN:
            raise wrong(path, f"the column {name.lower()!r} in small letters", repr(name), "Rename it.")
    if "image" not in header:
        advice = "Rename the column of the images' file names."
        raise wrong(path, "a column image", f"columns {', '.join(header)}", advice)
    return header, rows


def _check_patient_column(column, path):
    """Asks about a column that looks like patients under another name: without it a patient is in several splits."""
    for name, cells in column.items():
        plain = re.sub("[^a-z]", "", name.lower())
        alike = difflib.get_close_matches(plain, ("patient", "patientid", "subjectid"), 1, 0.85)
        is_label = {"0", "1", "0.0", "1.0"} >= set(cells)
        if alike and not is_label and name not in _KNOWN and "patient" not in column:
            advice = f"Did you mean `patient`? Rename {name!r}: without it one patient's images are in several splits."
            raise wrong(path, "the patients in a column patient", repr(name), advice)


def targets_of(
    column: Columns, path: Path
) -> tuple[str, tuple[str, ...], np.ndarray | None, list[tuple[str | None, ...]] | None, str]:
    """Task, classes, targets `(N, L)` uint8 or None, masks or None, and a note for the card."""
    _check_patient_column(column, path)
    others = [name for name in column if name not in ("image", "split", "patient")]
    named = [name for name in others if name.lower().startswith("mask")]
    raters = ["mask"] if named == ["mask"] else [f"mask_{k + 1}" for k in range(len(named))]
    if named and set(named) != set(raters):
        expected = "the columns mask, or mask_1, mask_2, ... without a gap"
        raise wrong(path, expected, f"columns {', '.join(named)}", "Rename the columns of the masks' file names.")
    single = [name for name in ("label", "grade") if name in others]
    kinds = bool(named) + len(single) + bool(set(others) - set(named) - set(single))
    if kinds > 1:
        expected = "either mask columns, or label, or grade, or columns of 0 and 1"
        raise wrong(path, expected, f"columns {', '.join(others)}", "Leave out columns that are not to be learnt.")
    if kinds == 0:
        raise wrong(path, "mask columns, or label, or grade, or columns of 0 and 1", f"columns {', '.join(column)}")
    if named:
        return SEGMENTATION, ("foreground",), None, _masks(column, raters, path), ""
    if single == ["label"]:
        return _labels(column["label"], path)
    if single == ["grade"]:
        return _grades(column["grade"], path)
    values = {"0": 0, "1": 1, "0.0": 0, "1.0": 1}  # pandas writes 1.0 in a column that had an empty cell
    advice = f"A column that is none of {', '.join(_KNOWN)} is a label; leave out all others."
    for name in others:
        texts = [cell for cell in column[name] if cell and not _NUMBER.fullmatch(cell)]
        if len(texts) > len(column[name]) / 2:
            expected = "class names in a column label, or 0 and 1 in a column for each label"
            better = f"Rename {name!r} to label if it has the classes, else leave it out."
            raise wrong(path, expected, f"texts such as {texts[0]!r} in column {name!r}", better)
        _check_cells(column[name], values.__contains__, f"0 or 1 in column {name!r}", path, advice)
    targets = np.array([[values[cell] for cell in column[name]] for name in others], "uint8").T
    return (MULTI_LABEL if len(others) > 1 else BINARY), tuple(others), np.ascontiguousarray(targets), None, ""


def _masks(column, raters, path):
    rows = []
    for row, cells in enumerate(zip(*(column[name] for name in raters), strict=True)):
        if not any(cells):
            raise wrong(path, "one mask or more in each row", f"none in row {row + 1} below the header")
        rows.append(tuple(_inside(cell, "mask", path) if cell else None for cell in cells))
    _check_unique([mask for row in rows for mask in row if mask is not None], "cell for each mask", path)
    return rows


def _labels(cells, path):
    _check_cells(cells, lambda cell: cell.lower() not in ("", "nan"), "a class name in each cell of label", path)
    classes = sorted(set(cells))
    _check_spelling(classes, lambda name: Decimal(name) if _NUMBER.fullmatch(name) else name.lower(), "class", path)
    if len(classes) < 2:
        raise wrong(path, "two classes or more in column label", f"{classes[0]!r} alone")
    if all(map(_NUMBER.fullmatch, classes)):
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
        raise wrong(path, "grades from 0 to K-1 in column grade", f"{sorted(set(numbers.tolist()))[:5]} alone")
    if absent:
        logger.warning("%s: no image is of grade %s", path, ", ".join(map(str, absent)))
    return ORDINAL, tuple(map(str, range(count))), np.eye(count, dtype="uint8")[numbers], None, ""


def is_inside(name: str) -> bool:
    """Whether it is the name of a file below a folder."""
    parts = PurePosixPath(name).parts
    return bool(parts) and not (name.startswith("/") or ".." in parts or "\\" in name or ":" in parts[0])


def _inside(name, what, path):
    """The file's name with single slashes; refuses one outside the folder."""
    if not is_inside(name):
        advice = "Write it with / and without .. or a drive, as in a/b.png."
        raise wrong(path, f"the name of a file below the folder {what}s/ in column {what}", repr(name), advice)
    return str(PurePosixPath(name))


def _check_unique(names, what, path):
    name, count = Counter(names).most_common(1)[0]
    if count > 1:
        raise wrong(path, f"one {what}", f"{name} in {count} of them")


def _check_spelling(names, plain, what, path):
    """Refuses two names of one thing, of the same `plain` name, such as 0 and 0.0 where csv files were joined."""
    first = {}
    for name in names:
        same = first.setdefault(plain(name), name)
        if same != name:
            raise wrong(path, f"one spelling of each {what}", f"{same!r} and {name!r}", "Write all of them one way.")


def _check_cells(cells, right, expected, path, *advice):
    """Refuses the cells of a column that are not right, by their rows."""
    received = [f"{cell!r} in row {row + 1} below the header" for row, cell in enumerate(cells) if not right(cell)]
    if received:
        raise Faults([wrong(path, expected, one, *advice) for one in received])


def wrong(path: Path, expected: str, received: str, advice: str = _HELP) -> ValueError:
    """An error about an images.csv: what was expected in it, what was received, what to do."""
    return ValueError(f"Expected {expected} in {path}. Received: {received}.\n{advice}")


CHECKS = (names_of, targets_of, splits_of, patients_of, check_masks_folder)
