"""The calibration error over batches is that of all at once."""

import keras
import numpy as np
import pytest

from sbn_tf import CalibrationError
from sbn_tf.metrics import ece
from sbn_tf.partial_bayes import to_partial_bayes

RNG = np.random.default_rng(0)
P = RNG.random((60, 4)).astype("float32")
Y = (RNG.random((60, 4)) < P**2).astype("float32")


def over_batches(y, p, weights=None, **options):
    metric = CalibrationError(**options)
    for part in (slice(0, 7), slice(7, 40), slice(40, 60)):
        metric.update_state(y[part], p[part], None if weights is None else weights[part])
    return float(metric.result())


def by_hand(y, p, w, num_bins):
    bins = np.minimum((p * num_bins).astype(int), num_bins - 1)
    gaps = [(w * (p - y))[bins == b].sum() for b in range(num_bins)]
    return np.abs(gaps).sum() / w.sum()


@pytest.mark.parametrize("num_bins", [1, 10, 15])
def test_it_is_a_sum_over_bins(num_bins):
    found = over_batches(Y, P, num_bins=num_bins)
    assert found == pytest.approx(by_hand(Y, P, np.ones_like(P), num_bins), rel=1e-5)
    assert found == pytest.approx(ece(Y, P, num_bins), rel=1e-5)


def test_weights_of_examples_count():
    weights = RNG.random(60).astype("float32")
    wanted = by_hand(Y, P, np.broadcast_to(weights[:, None], P.shape), 15)
    assert over_batches(Y, P, weights) == pytest.approx(wanted, rel=1e-5)


def test_classes_may_be_integers():
    probs, classes = P / P.sum(1, keepdims=True), RNG.integers(4, size=60)
    wanted = over_batches(np.eye(4, dtype="float32")[classes], probs)
    assert over_batches(classes, probs) == over_batches(classes[:, None], probs) == pytest.approx(wanted)


def test_one_label_and_maps_are_not_classes():
    wanted = by_hand(Y[:, :1], P[:, :1], np.ones((60, 1)), 15)
    assert over_batches(Y[:, :1], P[:, :1]) == pytest.approx(wanted, rel=1e-5)
    assert over_batches(Y[:, 0], P[:, :1]) == pytest.approx(wanted, rel=1e-5)  # as Keras's losses take them
    maps, masks = P.reshape(60, 2, 2, 1), Y.reshape(60, 2, 2, 1)
    assert over_batches(masks[..., 0], maps) == pytest.approx(over_batches(Y, P))
    assert over_batches(masks, maps) == pytest.approx(over_batches(Y, P))


def test_fit_logs_that_of_the_predictive_mean_and_a_file_has_it(tmp_path):
    x = RNG.normal(size=(60, 3)).astype("float32")
    model = keras.Sequential([keras.Input((3,)), keras.layers.Dense(4, "sigmoid")])
    model.compile("sgd", "binary_crossentropy", metrics=[CalibrationError(num_bins=5)])
    options = {"r_bayes": 0.5, "data": (x, Y), "verbose": False, "posterior": "members", "num_samples": 2}
    bnn = to_partial_bayes(model, **options)  # members are the same in each call
    bnn.fit(x, Y, verbose=0)
    logged = bnn.evaluate(x, Y, verbose=0, return_dict=True)["ece"]
    assert logged == pytest.approx(ece(Y, bnn.predict(x, verbose=0), num_bins=5), rel=1e-4)
    bnn.save(tmp_path / "bayes.keras")
    again = keras.models.load_model(tmp_path / "bayes.keras")
    assert again.evaluate(x, Y, verbose=0, return_dict=True)["ece"] == pytest.approx(logged, rel=1e-5)


@pytest.mark.parametrize("num_bins", [0, 1.5, True, "all"])
def test_bins_that_are_none(num_bins):
    with pytest.raises(ValueError, match="Expected num_bins, an integer >= 1"):
        CalibrationError(num_bins=num_bins)
