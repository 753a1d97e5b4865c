"""csv files that people write by hand or in a spreadsheet, read strictly."""

import csv
import os
from collections import Counter

__all__ = ["read_table"]


def read_table(path: str | os.PathLike, columns: tuple[str, ...] = ()) -> tuple[list[str], list[list[str]]]:
    """Header and rows of a csv file, each cell without blanks around it, without blank lines.

    Args:
        path: the file: UTF-8, with or without a byte order mark, commas between the cells.
        columns: that must be there.

    Raises:
        ValueError: another encoding or separator, no row, a row of another length, a column twice or missing.
    """
    try:
        with open(path, newline="", encoding="utf-8-sig") as file:
            reader = csv.reader(file, strict=True)
            lines = [(reader.line_num, [cell.strip() for cell in row]) for row in reader]
    except UnicodeDecodeError as error:
        raise ValueError(
            f"Expected {path} in UTF-8. Received: byte {error.object[error.start]:#04x} at {error.start}.\n"
            "Save it again as 'CSV UTF-8'."
        ) from error
    except csv.Error as error:
        raise ValueError(
            f"Expected a table with commas in {path}. Received: {error}.\nSave it again as CSV."
        ) from error
    lines = [(number, row) for number, row in lines if any(row)]
    if not lines:
        raise ValueError(f"Expected a header and rows in {path}. Received: an empty file.\nWrite it again.")
    header = lines[0][1]
    separators = [s for s in (";", "\t", "|") if s in header[0]]
    if separators and len(header) == 1:
        raise ValueError(
            f"Expected commas between the columns of {path}. Received: {separators[0]!r}.\n"
            "Save it again with the comma as separator."
        )
    twice = [name for name, count in Counter(header).items() if count > 1]
    if twice or "" in header:
        received = f"{twice[0]!r} twice" if twice else "one without"
        raise ValueError(
            f"Expected columns each with a name of its own in {path}. Received: {received}.\nRename or remove it."
        )
    missing = [name for name in columns if name not in header]
    if missing:
        raise ValueError(
            f"Expected columns {' and '.join(columns)} in {path}. Received: {', '.join(header)}.\nRename or add them."
        )
    if len(lines) == 1:
        raise ValueError(f"Expected rows below the header in {path}. Received: a header alone.\nAdd the rows.")
    for number, row in lines[1:]:
        if len(row) != len(header):
            raise ValueError(
                f"Expected {len(header)} cells in line {number} of {path}. Received: {len(row)}.\n"
                'Put a cell with a comma in quotes: "a, b".'
            )
    return header, [row for _, row in lines[1:]]
