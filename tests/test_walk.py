"""The way of a batch, from image files to its uncertainty: a tree of at most ten modules, none entered twice.

A module is on the way if a function of it is given pixels, or what was made of them, and hands something on; checks,
which hand nothing on, are not. It is entered from one other module alone, so the batch goes down a tree and back up: it
never comes back to a branch that it left. Repetitions (of files, draws, layers) are entered at the same door.
"""

import sys

import keras
import numpy as np
import pytest
from helpers import NETWORK_CARD, tiny_network
from PIL import Image

from sbn_tf.experiments.predictor import NetworkCard, Predictor
from sbn_tf.partial_bayes import to_partial_bayes
from sbn_tf.saliency import saliency, top_k

MOST = 10
BATCH, SIDE, WIDTH, HEIGHT = 7, 16, 37, 29  # no weight has an axis of these sizes


def is_data(value, depth=0):
    """Whether this is an image, a batch, samples of one, or a container of these."""
    if isinstance(value, dict | list | tuple):
        return depth < 2 and any(is_data(one, depth + 1) for one in getattr(value, "values", lambda: value)())
    if isinstance(value, Image.Image):
        return True
    if isinstance(value, keras.KerasTensor) or not hasattr(value, "dtype"):
        return False
    first = tuple(getattr(value, "shape", ()))[:2]
    return BATCH in first or None in first or first in ((SIDE, SIDE), (HEIGHT, WIDTH))


def doors(call):
    """Module that data pass through -> the modules from which they enter it, while `call` runs."""
    found, stack = {}, []

    def watch(frame, event, result):
        name = frame.f_globals.get("__name__", "")
        if not name.startswith("sbn_tf.") or event not in ("call", "return"):
            return
        code = frame.f_code
        if event == "call":
            arguments = code.co_varnames[: code.co_argcount + code.co_kwonlyargcount + 2]
            taken = any(is_data(frame.f_locals.get(one)) for one in arguments)
            stack.append((name, taken))
            return
        _, taken = stack.pop()
        if is_data(result) or (taken and result is not None and not isinstance(result, bool)):
            entered = found.setdefault(name, set())
            if stack and stack[-1][0] != name:  # else it was inside already
                entered.add(stack[-1][0])

    sys.setprofile(watch)
    try:
        call()
    finally:
        sys.setprofile(None)
    return found


@pytest.fixture(scope="module")
def model():
    network = tiny_network((SIDE, SIDE, 1), 1, masks=True, seed=0)
    return to_partial_bayes(network, top_k(saliency(network, score="magnitude"), 0.2), num_train=10, num_samples=3)


def test_from_image_files_to_their_uncertainty(model, tmp_path):
    rng = np.random.default_rng(0)
    for i in range(BATCH):
        Image.fromarray(rng.integers(0, 255, (HEIGHT, WIDTH), "uint8")).save(tmp_path / f"{i}.png")
    card = NetworkCard.model_validate({**NETWORK_CARD, "size": SIDE, "num_samples": 3, "temperature": 1.1})
    predictor = Predictor(model, card)
    found = doors(lambda: predictor.predict(tmp_path))
    assert {"sbn_tf.datasets.decoding", "sbn_tf.layers", "sbn_tf.metrics"} < set(found) and len(found) <= MOST
    assert {name: entered for name, entered in found.items() if len(entered) > 1} == {}


def test_from_an_array_to_its_uncertainty(model):
    x = np.random.default_rng(0).normal(size=(BATCH, SIDE, SIDE, 1)).astype("float32")
    found = doors(lambda: model.predict_uncertainty(x))
    assert {"sbn_tf.core.sampled", "sbn_tf.layers", "sbn_tf.core.outputs"} < set(found) and len(found) <= MOST
    assert {name: entered for name, entered in found.items() if len(entered) > 1} == {}
