"""Types: the hints of the package are what mypy, as pyproject.toml sets it, can believe."""

import importlib
import inspect
import pkgutil
from pathlib import Path

import pytest

import sbn_tf

ROOT = Path(__file__).resolve().parents[1]


def test_mypy_finds_nothing(monkeypatch):
    api = pytest.importorskip("mypy.api", reason="mypy is not installed: pip install -e '.[test]'")
    monkeypatch.chdir(ROOT)
    found, errors, status = api.run(["sbn_tf", "--config-file", "pyproject.toml"])
    assert status == 0, found + errors


# Tensors of any backend, which have no type of their own, and what only TensorFlow could name.
UNHINTED = {"sbn_tf.experiments.dropout.sample_dropout"}
UNHINTED |= {
    f"sbn_tf.core.{name}"
    for name in (
        *("batch", "context", "draws", "estimators", "histograms", "linear", "losses", "optimizers", "outputs"),
        *("overlap", "posterior", "prior", "sampled", "sharing"),
    )
}
FREE = {
    "data",
    "loss",
    "targets",
    "untransformed_scale_initializer",
    "prior",
}  # of many kinds: their docstrings say which


def public_functions():
    for module in pkgutil.walk_packages(sbn_tf.__path__, "sbn_tf."):
        if module.name not in UNHINTED and not module.name.endswith("lidc_dicom"):  # needs another Python
            members = importlib.import_module(module.name)
            for name in getattr(members, "__all__", vars(members)):  # without `__all__`: what has no underscore
                function = getattr(members, name)
                if inspect.isfunction(function) and function.__module__ == module.name and not name.startswith("_"):
                    yield f"{module.name}.{name}", inspect.signature(function)


def test_public_functions_have_hints():
    missing, count = [], 0
    for name, signature in public_functions():
        count += 1
        named = [one for one in signature.parameters.values() if one.kind not in (one.VAR_KEYWORD, one.VAR_POSITIONAL)]
        bare = [one.name for one in named if one.annotation is one.empty and one.name not in FREE]
        if bare or signature.return_annotation is signature.empty:
            missing.append((name, bare))
    assert count > 100 and [one for one in missing if one[0] not in UNHINTED] == []
