"""csv files that people write by hand or in a spreadsheet, read strictly."""

import csv
import io
import os
from collections import Counter

from .files import open_file, same_text

MAX_BYTES = 2**25  # 300,000 rows and more; a table in memory is many times as large as its file


def read_table(path: str | os.PathLike, columns: tuple[str, ...] = ()) -> tuple[list[str], list[tuple[str, ...]]]:
    """Header and rows of a csv file, each cell as `files.same_text` without blanks around it, without blank lines.

    Args:
        path: the file: UTF-8, with or without a byte order mark, commas between the cells.
        columns: that must be there.

    Raises:
        ValueError: no regular file, or one of more than `MAX_BYTES`; another encoding or separator; no row, a row of
            another length, a column twice or missing.
    """
    with open_file(path) as file:
        content = file.read(MAX_BYTES + 1)
    if len(content) > MAX_BYTES:
        raise ValueError(
            f"Expected a table of at most {MAX_BYTES:,} bytes. Received: {path}, which is larger.\n"
            "Leave out columns and rows that are not needed, or divide the data."
        )
    header, rows = [], []
    try:
        reader = csv.reader(io.StringIO(content.decode("utf-8-sig"), newline=""), strict=True)
        for cells in reader:
            row = tuple(same_text(cell.strip()) for cell in cells)
            if not any(row):
                continue
            if not header:
                header = list(row)
                _check_header(header, columns, path)
            elif len(row) == len(header):
                rows.append(row)
            else:
                raise ValueError(
                    f"Expected {len(header)} cells in line {reader.line_num} of {path}. Received: {len(row)}.\n"
                    'Put a cell with a comma in quotes: "a, b".'
                )
    except UnicodeDecodeError as error:
        raise ValueError(
            f"Expected {path} in UTF-8. Received: byte {error.object[error.start]:#04x} at {error.start}.\n"
            "Save it again as 'CSV UTF-8'."
        ) from error
    except csv.Error as error:
        raise ValueError(
            f"Expected a table with commas in {path}. Received: {error}.\nSave it again as CSV."
        ) from error
    if not header:
        raise ValueError(f"Expected a header and rows in {path}. Received: an empty file.\nWrite it again.")
    if not rows:
        raise ValueError(f"Expected rows below the header in {path}. Received: a header alone.\nAdd the rows.")
    return header, rows


def _check_header(header, columns, path):
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
