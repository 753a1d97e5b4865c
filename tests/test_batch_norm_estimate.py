"""Running statistics of batch norm that are estimated again, against NumPy's means and variances."""

import keras
import numpy as np
import pytest

import sbn_tf
from sbn_tf.core.batch_norm import estimate_batch_norm

X = np.random.default_rng(0).normal(3.0, 2.0, (64, 4)).astype("float32")


def network(momentum=0.999):
    keras.utils.set_random_seed(0)
    norms = [keras.layers.BatchNormalization(momentum=momentum) for _ in range(2)]
    layers = [norms[0], keras.layers.Dense(3), norms[1], keras.layers.Dense(1, "sigmoid")]
    return keras.Sequential([keras.Input((4,)), *layers]), norms


@pytest.mark.parametrize("momentum", [0.999, 0.9])
def test_statistics_are_the_mean_over_the_batches(momentum):
    model, (first, second) = network(momentum)
    for _ in range(3):
        model(10 + X, training=True)  # whatever was there before counts no more
    estimate_batch_norm(model, (X, np.ones(64)), batch_size=16)
    parts = X.reshape(4, 16, 4)
    np.testing.assert_allclose(first.moving_mean, parts.mean(1).mean(0), rtol=1e-4)
    np.testing.assert_allclose(first.moving_variance, parts.var(1).mean(0), rtol=1e-3)
    normalised = (parts - parts.mean(1, keepdims=True)) / np.sqrt(parts.var(1, keepdims=True) + first.epsilon)
    hidden = normalised @ np.asarray(model.layers[1].kernel) + np.asarray(model.layers[1].bias)
    np.testing.assert_allclose(second.moving_variance, hidden.var(1).mean(0), rtol=1e-3)
    assert first.momentum == second.momentum == momentum


def test_a_network_that_was_at_chance_is_mended_and_no_longer_warned_of(recwarn):
    model, _ = network()
    x, y = 100 + 10 * X, (X[:, :1] > 3).astype("float32")
    model.compile(keras.optimizers.Adam(0.05), "binary_crossentropy")
    model.fit(x, y, epochs=30, batch_size=32, verbose=0)
    options = {"r_bayes": 0.5, "data": (x, y), "num_samples": 2, "verbose": False}
    with pytest.warns(UserWarning, match="sbn_tf.estimate_batch_norm"):
        sbn_tf.to_partial_bayes(model, **options)
    before = model.evaluate(x, y, verbose=0)
    sbn_tf.estimate_batch_norm(model, (x, y))
    assert model.evaluate(x, y, verbose=0) < 0.2 < before
    recwarn.clear()
    sbn_tf.to_partial_bayes(model, **options)
    assert not [one for one in recwarn if "lag behind" in str(one.message)]


def test_four_classes_near_chance_are_warned_of():
    """Half-trained: .94 in training mode and 1.97 in inference mode, where chance is 1.39."""
    random = np.random.default_rng(0)
    x, y = 100 + 30 * random.normal(size=(64, 6)), random.integers(4, size=64)
    x[np.arange(64), y] += 25
    keras.utils.set_random_seed(0)
    first, second = keras.layers.BatchNormalization(momentum=0.999), keras.layers.BatchNormalization(momentum=0.999)
    model = keras.Sequential([keras.Input((6,)), first, keras.layers.Dense(4), second, keras.layers.Softmax()])
    model.compile(keras.optimizers.Adam(0.02), "sparse_categorical_crossentropy")
    model.fit(x, y, epochs=40, verbose=0)
    with pytest.warns(UserWarning, match="lag behind"):
        sbn_tf.to_partial_bayes(model, r_bayes=0.5, data=(x, y), num_samples=2, verbose=False)


def test_a_smaller_last_batch_counts_by_its_size():
    model, (first, _) = network()
    estimate_batch_norm(model, (X[:40], np.ones(40)), batch_size=32)
    np.testing.assert_allclose(first.moving_mean, X[:40].mean(0), rtol=1e-4)
    variances = 0.8 * X[:32].var(0) + 0.2 * X[32:40].var(0)
    np.testing.assert_allclose(first.moving_variance, variances, rtol=1e-3)


def test_a_loss_below_zero_is_compared_by_its_size(recwarn):
    model, _ = network()
    estimate_batch_norm(model, (X, np.ones(64)))
    model.compile("sgd", lambda y, p: keras.ops.mean((y - p) ** 2, -1) - 5)
    sbn_tf.to_partial_bayes(model, r_bayes=0.5, data=(X, np.ones((64, 1), "float32")), num_samples=2, verbose=False)
    assert not [one for one in recwarn if "lag behind" in str(one.message)]


def test_frozen_batch_norm_stays_and_no_data_is_an_error():
    model, (first, second) = network()
    first.trainable = False
    estimate_batch_norm(model, (X, np.ones(64)), max_batches=1)
    np.testing.assert_array_equal(first.moving_mean, 0)
    assert abs(np.asarray(second.moving_variance) - 1).max() > 0.01
    with pytest.raises(ValueError, match="one batch or more"):
        estimate_batch_norm(model, [])
    with pytest.raises(ValueError, match="without y"):
        estimate_batch_norm(model, X)
    second.trainable = False
    with pytest.raises(ValueError, match="batch norm that trains"):
        estimate_batch_norm(model, (X, np.ones(64)))
