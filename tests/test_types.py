"""Types: the hints of the package are what mypy, as pyproject.toml sets it, can believe."""

from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


def test_mypy_finds_nothing(monkeypatch):
    api = pytest.importorskip("mypy.api", reason="mypy is not installed: pip install -e '.[test]'")
    monkeypatch.chdir(ROOT)
    found, errors, status = api.run(["sbn_tf", "--config-file", "pyproject.toml"])
    assert status == 0, found + errors
