"""Where runs lie and how their files are written and read."""

from __future__ import annotations

import hashlib
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

import sbn_tf
from sbn_tf.core.files import check_archive, write_atomically

__all__ = ["repository"]

FORMAT = 3  # of a run's files: raise it when their meaning changes, so that old runs are not taken for new ones


def repository() -> Path:
    """The checkout that contains the working folder, such as that of a notebook in `nbs/`; else the working folder."""
    here = Path.cwd()
    ours = (path for path in (here, *here.parents) if (path / "pyproject.toml").exists() and (path / "sbn_tf").is_dir())
    return next(ours, here)


def run_folder(runs: str | os.PathLike | None, dataset: str, method: str, seed: int, settings: dict) -> Path:
    """`runs/<dataset>/<method>/seed<k>/<hash of the settings>`."""
    runs = repository() / "runs" if runs is None else runs
    return Path(runs) / dataset / method / f"seed{seed}" / digest(settings)


def digest(settings: dict) -> str:
    """A short hash of settings, of the files' format, of Keras's dtype policy and of a backend that is not TensorFlow.

    Each backend has noise and initial weights of its own, so none goes on with another's run.
    """
    import keras

    settings = {**settings, "format": FORMAT, "dtype": keras.config.dtype_policy().name}
    if keras.backend.backend() != "tensorflow":
        settings["backend"] = keras.backend.backend()
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:10]


def check_method(method: Any) -> str:
    """A name for a folder, or a clear error."""
    if not isinstance(method, str) or not re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9_.-]*", method):
        raise ValueError(f"Expected method, a name of letters, digits and . _ - for a folder. Received: {method!r}")
    return method


def write_checked(path: str | os.PathLike, content: Mapping) -> None:
    """Write JSON with a checksum of its content; `read_json` compares it."""
    text = json.dumps({**content, _CHECKSUM: _checksum(content)}, indent=1)
    write_atomically(path, lambda file: file.write(text.encode()))


def read_json(path: str | os.PathLike) -> dict:
    """What `write_checked` or `write_json` wrote. A file of an older version has no checksum, and passes.

    Raises:
        ValueError: not JSON, no dict, or a content that was changed. The message is for the `Received:` of another.
        FileNotFoundError: no such file.
    """
    path = Path(path)
    try:
        content = json.loads(path.read_text("utf-8"))
    except ValueError as error:  # of JSON, and of text that is not UTF-8
        raise ValueError(f"{path.name} is not JSON: {error}") from None
    if not isinstance(content, dict):
        raise ValueError(f"{path.name} has a {type(content).__name__} instead of fields")
    written = content.pop(_CHECKSUM, None)
    if written not in (None, _checksum(content)):
        raise ValueError(f"{path.name} was changed: its checksum is another")
    return content


_CHECKSUM = "sha256"  # the field's name


def _checksum(content):
    plain = json.loads(json.dumps(content))  # lists for tuples and texts for keys, as they are read
    return hashlib.sha256(json.dumps(plain, sort_keys=True).encode()).hexdigest()


def threads() -> int:
    """Threads of one of the backend's operations: another number adds in another order, and rounds otherwise."""
    import keras

    asked: Any = 0  # JAX takes all cores
    if keras.backend.backend() == "tensorflow":
        import tensorflow as tf

        asked = tf.config.threading.get_intra_op_parallelism_threads() or os.environ.get("TF_NUM_INTRAOP_THREADS")
    elif keras.backend.backend() == "torch":
        import torch

        asked = torch.get_num_threads()
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return int(asked or 0) or cores or 1


def write_json(path: str | os.PathLike, content: Mapping) -> None:
    """Write JSON together with the versions, the commit and the number of threads that made it, and a checksum."""
    import keras

    backend = keras.backend.backend()
    versions = {one.__name__: one.__version__ for one in (sbn_tf, keras, sys.modules[backend])}
    if backend == "tensorflow":
        versions["tensorflow_probability"] = version("tensorflow_probability")
    write_checked(path, {**content, "versions": versions, "commit": _commit(), "threads": threads()})


def _commit() -> str | None:
    """This package's commit, "-dirty" if files have changed since; None outside its own repository."""
    package = Path(__file__).resolve().parents[1]

    def git(*arguments):
        return subprocess.run(
            ["git", *arguments], cwd=package, capture_output=True, text=True, check=True
        ).stdout.strip()

    try:
        if Path(git("rev-parse", "--show-toplevel")).resolve() != package.parent:
            return None
        return git("describe", "--always", "--dirty", "--abbrev=40", "--exclude=*")
    except (OSError, subprocess.CalledProcessError):
        return None


def make_writable(path: Path) -> None:
    """Make a folder for `--out`, if it is not there.

    Raises:
        ValueError: nothing can be written there.
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=path).close()
    except OSError as error:
        raise ValueError(
            f"Expected --out, a folder that can be written. Received: {path} ({error.strerror}).\nTake another --out."
        ) from None


def begin(out: Path, name: str, settings: dict) -> None:
    """Make a folder for `--out` with its settings in a file, or see that it was begun with these.

    Raises:
        ValueError: other settings, other files, or nothing can be written there.
    """
    path = out / name
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        make_writable(out)
        write_checked(path, settings)
        return
    try:
        begun = read_json(path)
    except (OSError, ValueError):
        raise ValueError(f"Expected --out, an empty folder or a new one. Received: {out}, with other files.") from None
    if begun != (settings := json.loads(json.dumps(settings))):
        differ = sorted(key for key in begun | settings if begun.get(key) != settings.get(key))
        was, now = ({key: one.get(key) for key in differ} for one in (begun, settings))
        raise ValueError(
            f"Expected what {out} was begun with, {was}. Received: {now}.\nTake another --out, or delete this one."
        )


def read_arrays(path: Path) -> dict[str, np.ndarray]:
    """The arrays of an npz file that an earlier step wrote.

    Raises:
        ValueError: the file is missing or damaged.
    """
    try:
        check_archive(path)
        with np.load(path, allow_pickle=False) as file:
            return {key: file[key] for key in file.files}
    except (OSError, ValueError) as error:
        raise ValueError(
            f"Expected a whole npz file. Received: {path} ({error}). Delete it: it will be made again."
        ) from None
