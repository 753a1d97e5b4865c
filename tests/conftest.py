"""What every test shares: quiet start-up and one seed."""

import gc
import os

os.environ["TF_CPP_MIN_LOG_LEVEL"] = "3"  # read when TensorFlow is first imported, hence above the imports

import keras
import pytest

gc.set_threshold(200_000, 50, 1000)  # tracing makes millions of objects: the default spends 8 % of the suite here


@pytest.fixture(autouse=True)
def seed():
    keras.utils.set_random_seed(0)


@pytest.fixture(autouse=True, scope="session")
def array_cache(tmp_path_factory):
    """Decoded images go to a folder of this run, not to the checkout's."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SBN_TF_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield
