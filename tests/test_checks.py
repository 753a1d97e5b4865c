"""Arguments and arrays that are nonsense: each is refused by its own name, in one or two lines."""

import sys

import keras
import numpy as np
import pytest

from sbn_tf import datasets, top_k
from sbn_tf.experiments import fitting
from sbn_tf.experiments.recipes import parse_changes
from sbn_tf.layers import Dense
from sbn_tf.metrics import uncertainty
from sbn_tf.partial_bayes import to_partial_bayes

RNG = np.random.default_rng(0)
X = RNG.normal(size=(20, 4)).astype("float32")
Y = RNG.integers(3, size=20)
THIRDS = np.full((2, 4, 3), 1 / 3)


@pytest.fixture(scope="module")
def model():
    network = keras.Sequential([keras.Input((4,)), keras.layers.Dense(3, "softmax")])
    network.compile("adam", "sparse_categorical_crossentropy")
    return network


@pytest.fixture(scope="module")
def bnn(model):
    found = to_partial_bayes(model, r_bayes=0.5, data=(X, Y), verbose=False)
    found.compile()
    return found


def refused(call, message):
    with pytest.raises(ValueError) as error:
        call()
    text = str(error.value)
    assert message in text and "Received" in text and len(text.splitlines()) <= 2 and len(text) < 300


@pytest.mark.parametrize(
    ("options", "message"),
    [
        *(({"beta": value}, "Expected a finite number beta >= 0") for value in (None, True, "x", -1, np.nan, np.inf)),
        *(({"seed": value}, "Expected seed, an integer >= 0") for value in (True, 1.5, "a", -1)),
        *(({"num_samples": value}, "num_samples, an integer from 1 to 100000") for value in (0, True, 2.0, 10**9)),
        *(({"initial_scale": value}, "finite number initial_scale") for value in (True, "all", np.inf, [0.1])),
        *(({"initial_scale": value}, "Expected initial_scale > 1.2e-38 and < 1.8e+19") for value in (0, -1, 1e30)),
        ({"from_logits": True}, "the network's softmax gives probabilities"),
        ({"from_logits": "yes"}, "from_logits to be True or False"),
        *(({"r_bayes": value}, "r_bayes to be a fraction in [0, 1]") for value in (True, "all", np.nan, 1.1, [], -1)),
        *(({"num_train": value}, "num_train, an integer >= 1") for value in (True, 0, 2.5)),
        ({"data": (X, Y + 5)}, "Expected labels from 0 to 2. Received: 5 to 7"),
        ({"data": (X, Y - 7)}, "Expected labels from 0 to 2"),
        ({"data": (X, Y[:10])}, "as many targets as inputs. Received: 20 inputs and 10 targets"),
        ({"data": (X, Y.astype(str))}, "np.unique(y, return_inverse=True)[1]"),
        ({"data": 5}, "Expected data as (x, y) or as batches of it. Received: int"),
        ({"data": lambda: (X, Y)}, "Received: function; call it"),
        ({"data": (X[:, :3], Y)}, "Expected inputs of shape (batch, 4). Received: shape (20, 3)"),
        ({"data": (X[0], Y[:4])}, "of one example give x[None]"),
        (
            {"loss": "binary_crossentropy", "data": (X, np.full((20, 3), 2))},
            "targets in 0..1 of a binary cross-entropy",
        ),
    ],
)
def test_arguments_of_a_conversion(model, options, message):
    refused(lambda: to_partial_bayes(model, **{"r_bayes": 0.5, "data": (X, Y), "verbose": False} | options), message)


@pytest.mark.parametrize(
    ("x", "message"),
    [
        (None, "Expected inputs x. Received: None"),
        (X[0], "of one example give x[None]"),
        (X[:, :3], "Expected inputs of shape (batch, 4). Received: shape (20, 3)"),
        (X[:0], "Expected inputs of one example or more, (batch, 4). Received: shape (0, 4)"),
    ],
)
def test_inputs_of_a_prediction(bnn, x, message):
    refused(lambda: bnn.predict_uncertainty(x), message)
    refused(lambda: bnn.predict_samples(x), message)


@pytest.mark.parametrize(
    ("y", "message"),
    [
        (Y + 5, "Expected labels from 0 to 2. Received: 5 to 7"),
        (Y.astype(str), "Expected targets as numbers"),
        (Y[:5], "as many targets as inputs"),
    ],
)
def test_targets_of_fit(bnn, y, message):
    refused(lambda: bnn.fit(X, y, verbose=0), message)


def test_what_keras_takes_passes():
    """A last axis of 1 comes and goes, and a class may be ignored."""
    network = keras.Sequential([keras.Input((4, 1)), keras.layers.Flatten(), keras.layers.Dense(3, "softmax")])
    network.compile("sgd", keras.losses.SparseCategoricalCrossentropy(ignore_class=255))
    found = to_partial_bayes(network, r_bayes=0.5, data=(X, np.r_[Y[:-1], 255]), verbose=False)
    assert found.predict_uncertainty(X)["mean"].shape == (20, 3)
    assert found.predict_samples(X[..., None]).shape == (5, 20, 3)


@pytest.mark.parametrize(
    ("scores", "r_bayes", "message"),
    [
        (1.5, 0.5, "from saliency(...). Received: scores=1.5"),
        (None, 0.5, "from saliency(...). Received: scores=None"),
        ({}, 0.5, "Received: empty scores"),
        ({"a": np.ones(3) * 1j}, 0.5, "scores that are real numbers. Received: complex128 in 'a'"),
        ({"a": np.array(["x"])}, 0.5, "scores that are real numbers"),
        ({"a": np.array([np.nan])}, 0.5, "finite scores"),
        ({"a": np.ones(3)}, True, "r_bayes to be a fraction in [0, 1]"),
    ],
)
def test_scores(scores, r_bayes, message):
    refused(lambda: top_k(scores, r_bayes), message)


@pytest.mark.parametrize("text", [None, 5, ["epochs=3"], "epochs==3", "epochs=", "=3", "epochs=3,epochs=4", "no=3"])
def test_changes_of_a_recipe(text):
    with pytest.raises(ValueError, match="Expected changes"):
        parse_changes(text)


@pytest.mark.parametrize(
    ("probs", "task", "message"),
    [
        (THIRDS, "nope", "Expected task to be one of"),
        (THIRDS, None, "Expected task to be one of"),
        (THIRDS * 2 / 3, "multi-class", "Received: sums from 0.666667 to 0.666667"),
        (THIRDS * 1j, "multi-label", "Expected real numbers. Received: an array of complex128"),
        ("x", "multi-label", "Expected real numbers"),
        (THIRDS * np.nan, "multi-label", "in 0..1, none of them NaN"),
    ],
)
def test_probabilities_of_an_uncertainty(probs, task, message):
    refused(lambda: uncertainty(probs, task), message)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        *(({"num_bayesian": value}, "Expected whole counts num_bayesian >= 0") for value in (True, "all", 1.5, np.inf)),
        ({"num_bayesian": 0, "mask": np.inf}, "Expected a boolean mask of shape (4, 3)"),
        *(({"kl_weight": value}, "Expected a finite number kl_weight >= 0") for value in (True, "x", -1, np.nan)),
        *(({"initial_scale": value}, "Expected a finite number initial_scale") for value in (True, "all", np.nan)),
        *(({"seed": value}, "Expected seed, an integer >= 0") for value in (True, 1.5, -1)),
    ],
)
def test_arguments_of_a_layer(options, message):
    refused(lambda: Dense(3, **{"num_bayesian": 2, "kl_weight": 0.0} | options).build((None, 4)), message)


def test_a_regression_beside_a_classifier_has_a_variance():
    """Members are the same in each call, so NumPy's mean and variance over their outputs are exact."""
    inputs = keras.Input((4,))
    hidden = keras.layers.Dense(8, "relu")(inputs)
    outputs = {"kind": keras.layers.Dense(3, "softmax")(hidden), "size": keras.layers.Dense(2)(hidden)}
    network = keras.Model(inputs, outputs)
    network.compile("sgd", {"kind": "sparse_categorical_crossentropy", "size": "mse"})
    data = (X, {"kind": Y, "size": X[:, :2]})
    found = to_partial_bayes(network, r_bayes=0.5, data=data, posterior="members", num_samples=3, verbose=False)
    samples, parts = found.predict_samples(X), found.predict_uncertainty(X)
    assert set(parts["size"]) == {"mean", "variance"}
    assert set(parts["kind"]) == {"mean", "total_entropy", "expected_entropy", "mutual_information"}
    for name in ("kind", "size"):
        np.testing.assert_allclose(parts[name]["mean"], samples[name].mean(0), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(parts["size"]["variance"], samples["size"].var(0), rtol=1e-3, atol=1e-7)
    wanted = uncertainty(samples["kind"], "multi-class")
    np.testing.assert_allclose(parts["kind"]["mutual_information"], wanted["mutual_information"], atol=1e-6)


def test_a_tensorboard_callback_without_tensorboard_names_the_extra(model, bnn, monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "tensorboard", None)
    data = datasets.load("phantom_chest", size=16, limit=24)
    board = keras.callbacks.TensorBoard(tmp_path)
    for fit in (
        lambda: bnn.fit(X, Y, verbose=0, callbacks=board),
        lambda: fitting.fit(
            model, data.train, None, epochs=1, batch_size=8, seed=0, folder=tmp_path / "run", callbacks=[board]
        ),
    ):
        with pytest.raises(ModuleNotFoundError, match=r'pip install "sbn_tf\[tensorboard\]"'):
            fit()
    assert not any(tmp_path.iterdir())  # refused before the first step


def test_tensorboard_gets_the_losses_and_weights_of_a_bayesian_network(bnn, tmp_path):
    pytest.importorskip("tensorboard")
    import tensorflow as tf
    from tensorboard.backend.event_processing import event_accumulator

    board = keras.callbacks.TensorBoard(tmp_path, histogram_freq=1)
    history = bnn.fit(X, Y, epochs=2, verbose=0, validation_data=(X, Y), callbacks=[board]).history
    found = event_accumulator.EventAccumulator(str(tmp_path / "train"), {"tensors": 0}).Reload()
    written = [float(tf.make_ndarray(one.tensor_proto)) for one in found.Tensors("epoch_nll")]
    np.testing.assert_allclose(written, history["nll"], rtol=1e-6)
    assert any("untransformed_scale" in tag for tag in found.Tags()["tensors"])
