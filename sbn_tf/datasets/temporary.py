"""Folders of arrays on disk that are removed when nobody uses them any more."""

import contextlib
import hashlib
import os
import platform
import re
import shutil
import uuid
import weakref


class TemporaryFolder:
    """A folder that is removed when nothing refers to this object, at the latest when the process ends.

    A fork removes nothing. What a killed process left is removed when the next folder is made beside it.
    """

    def __init__(self, parent):
        owner = f"{os.getpid()}-{_machine()}"
        _sweep(parent)
        self.path = parent / f"temporary-{owner}-{uuid.uuid4().hex[:12]}"
        self.remove = weakref.finalize(self, _remove, self.path, os.getpid())


def _remove(folder, process):
    if os.getpid() == process:
        shutil.rmtree(folder, ignore_errors=True)


def _sweep(parent):
    """Remove the temporary folders of processes of this machine that have ended."""
    if os.name != "posix":  # elsewhere os.kill(process, 0) is not a question
        return
    with contextlib.suppress(OSError):
        for folder in parent.glob(f"temporary-*-{_machine()}-*"):
            process = re.fullmatch(r"temporary-([1-9]\d{0,8})-\w+-\w+", folder.name)
            if process and _has_ended(int(process[1])):
                shutil.rmtree(folder, ignore_errors=True)


def _has_ended(process):
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return True
    except OSError:  # another user's
        return False
    return False


def _machine():
    """Eight digits for this machine and container; others may share the cache, and have processes of the same ids."""
    try:
        container = os.stat("/proc/self/ns/pid").st_ino
    except OSError:
        container = 0
    return hashlib.sha256(f"{platform.node()} {container}".encode()).hexdigest()[:8]
