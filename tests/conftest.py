"""What every test shares: quiet start-up and one seed."""

import atexit
import gc
import os
import tempfile
from pathlib import Path

os.environ["TF_CPP_MIN_LOG_LEVEL"] = "3"  # read when TensorFlow is first imported, hence above the imports

import keras
import pytest

GC = (200_000, 50, 1000)  # tracing makes millions of objects: the default spends 8 % of the suite here
gc.set_threshold(*GC)

LONGEST = ("test_training.py", "test_grid.py", "test_methods.py", "test_partial_bayes.py")


def pytest_collection_modifyitems(items):
    """The longest files first: two processes then end at about the same time."""
    items.sort(key=lambda item: LONGEST.index(item.path.name) if item.path.name in LONGEST else len(LONGEST))


def pytest_configure():
    """Kernels of notebooks, of nbval and of papermill, run the files of this folder when they start."""
    folder = tempfile.TemporaryDirectory()
    atexit.register(folder.cleanup)
    startup = Path(folder.name, "profile_default", "startup")
    startup.mkdir(parents=True)
    (startup / "gc.py").write_text(f"__import__('gc').set_threshold(*{GC})\n")  # leaves no name behind
    os.environ["IPYTHONDIR"] = folder.name


@pytest.fixture(autouse=True)
def seed():
    keras.utils.set_random_seed(0)


@pytest.fixture(autouse=True, scope="session")
def array_cache(tmp_path_factory):
    """Decoded images go to a folder of this run, not to the checkout's."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SBN_TF_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield
