"""Files that are written whole or not at all, and what is left of them after a kill or damage."""

from __future__ import annotations

import contextlib
import os
import re
import uuid
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO

try:
    import fcntl
except ImportError:  # Windows, which refuses by itself to delete a file that is open
    fcntl = None  # type: ignore[assignment]

__all__ = ["check_archive", "remove_leftovers", "replacing", "write_atomically"]

_LEFTOVER = re.compile(r".+\.[0-9a-f]{8}\.tmp(\..+)?")  # of `replacing`


@contextlib.contextmanager
def replacing(path: str | os.PathLike) -> Iterator[Path]:
    """Give a temporary path with the ending of `path`; it takes the place of `path` when the block ends.

    It is on the disk before it is renamed: after a crash of the machine there is the old file or the new one. What
    killed processes left in the folder is removed.

    Args:
        path: where the file goes; missing folders are made.

    Raises:
        OSError: a full disk, or no permission. The file that was there before is untouched.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    remove_leftovers(path.parent)
    # Not tempfile's: only their owner may read those. Not the process's number: two machines may share it.
    temporary = path.with_name(f"{path.stem}.{uuid.uuid4().hex[:8]}.tmp{path.suffix}")
    try:
        with open(temporary, "wb") as file:
            with contextlib.suppress(OSError):  # a file system without locks: its leftovers stay
                _lock(file)
            yield temporary
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def write_atomically(path: str | os.PathLike, write: Callable[[IO[bytes]], object]) -> None:
    """Call `write(file)` on a temporary file and put it in place only when it is whole.

    Args:
        path: where the file goes; missing folders are made.
        write: writes the content to the binary file that it is given.

    Raises:
        OSError: a full disk, or no permission. The file that was there before is untouched.
    """
    with replacing(path) as temporary, open(temporary, "wb") as file:
        write(file)


def remove_leftovers(folder: str | os.PathLike) -> None:
    """Remove the temporary files that killed processes left in a folder. Those of running processes stay."""
    for name in os.listdir(folder):
        if _LEFTOVER.fullmatch(name):
            # Another process may have removed it, or this one may not: what matters is the file that comes next.
            with contextlib.suppress(OSError), open(Path(folder, name), "rb") as file:
                _lock(file)
                os.unlink(file.name)


def _lock(file):
    """Lock a file for as long as it is open. BlockingIOError: another process writes it."""
    if fcntl is not None:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)


def check_archive(path: str | os.PathLike) -> None:
    """Refuse a `.keras` or `.npz` file that is damaged: every member is read, and its checksum compared.

    Raises:
        ValueError: it is cut short or was changed.
        FileNotFoundError: no such file.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            bad = archive.testzip()
    except FileNotFoundError:
        raise
    except Exception as error:  # damaged headers raise a dozen kinds
        raise ValueError(f"{Path(path).name} is cut short or damaged: {error}") from None
    if bad is not None:
        raise ValueError(f"{Path(path).name} is damaged: the checksum of {bad} is another")
