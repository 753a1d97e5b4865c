"""Faults of the files of a dataset, each with its remedy."""

import os
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

from tqdm import tqdm

from .decoding import read_image, read_mask
from .medical import file_of


class Fault(NamedTuple):
    """What is wrong with a file, and what to do, a sentence each."""

    file: str
    fault: str
    remedy: str


class Faults(ValueError):
    """Several faults; its text is that of the first one."""

    def __init__(self, errors: list[ValueError | OSError]):
        super().__init__(str(errors[0]))
        self.errors = errors


def fault_of(error: ValueError | OSError, file: str, folder: str | os.PathLike) -> Fault:
    """An error of the readers as a fault: its first line, and the others as the remedy."""
    fault, _, remedy = str(error).replace(f"{folder}{os.sep}", "").partition("\n")
    return Fault(file, fault, remedy.replace("\n", " "))


def unreadable(
    pairs: Iterable[tuple[Path | None, ...]], folder: Path, threshold: int | None, total: int
) -> dict[int, list[Fault]]:
    """Row -> faults of its image and masks, where a file is missing or cannot be read. Every file is decoded.

    Args:
        pairs: of each row the paths of its image and its masks; None: no such mask.
        folder: that the files' names begin below.
        threshold: as for `decoding.read_mask`.
        total: number of rows.
    """
    found: dict[int, list[Fault]] = {}
    for row, (image, *masks) in enumerate(tqdm(pairs, "reading files", total, leave=False, delay=2, unit="image")):
        whole = None
        for path in (image, *masks):
            if path is None:
                continue
            try:
                if not file_of(path).exists():
                    raise FileNotFoundError(
                        "Expected the file. Received: it is not there.\nPut it there, or take out its row."
                    )
                if path is image:
                    whole = read_image(path, 8, "pad", 1)[1]
                elif whole is not None:
                    read_mask(path, 8, "pad", whole, threshold)
            except (ValueError, OSError) as error:
                name = path.relative_to(folder).as_posix()
                found.setdefault(row, []).append(fault_of(error, name, folder))
    return found
