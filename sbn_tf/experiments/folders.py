"""Where runs lie and how their files are written and read."""

from __future__ import annotations

import hashlib
import json
import operator
import os
import re
import subprocess
import zipfile
import zlib
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import keras
import numpy as np

import sbn_tf
from sbn_tf.core.files import write_atomically

__all__ = ["FORMAT", "check_method", "check_seed", "digest", "read_arrays", "repository", "run_folder", "write_json"]

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
    """A short hash of settings, of the files' format and of Keras's dtype policy."""
    settings = {**settings, "format": FORMAT, "dtype": keras.config.dtype_policy().name}
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:10]


def check_method(method: Any) -> str:
    """A name for a folder, or a clear error."""
    if not isinstance(method, str) or not re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9_.-]*", method):
        raise ValueError(f"Expected method, a name of letters, digits and . _ - for a folder. Received: {method!r}")
    return method


def check_seed(seed: Any) -> int:
    """A seed as an integer, or a clear error."""
    if isinstance(seed, bool) or not hasattr(seed, "__index__") or operator.index(seed) < 0:
        raise ValueError(f"Expected seed, an integer >= 0. Received: seed={seed!r}")
    return operator.index(seed)


def write_json(path: str | os.PathLike, content: Mapping) -> None:
    """Write JSON together with the versions and the commit that made it."""
    import tensorflow as tf

    versions = {"sbn_tf": sbn_tf.__version__, "keras": keras.__version__, "tensorflow": tf.__version__}
    versions["tensorflow_probability"] = version("tensorflow_probability")
    text = json.dumps({**content, "versions": versions, "commit": _commit()}, indent=1)
    write_atomically(path, lambda file: file.write(text.encode()))


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


def read_arrays(path: Path) -> dict[str, np.ndarray]:
    """The arrays of an npz file that an earlier step wrote.

    Raises:
        ValueError: the file is missing or damaged.
    """
    try:
        with np.load(path, allow_pickle=False) as file:
            return {key: file[key] for key in file.files}
    except (OSError, KeyError, ValueError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        raise ValueError(
            f"Expected a whole npz file. Received: {path} ({error}). Delete it: it will be made again."
        ) from None
