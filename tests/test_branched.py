"""Members that part early, of anyone's model: the same steps as by hand, and what is refused."""

import math
import warnings

import keras
import numpy as np
import pytest

import sbn_tf
from sbn_tf.layers import masked_layers
from sbn_tf.saliency import saliency, top_k

X = np.random.default_rng(0).normal(size=(40, 6)).astype("float32")
Y = (X[:, :1] * X[:, 1:2] > 0).astype("float32")


def network(rate=0.01):
    keras.utils.set_random_seed(0)
    parts = [keras.layers.Dense(8, "relu", name="a"), keras.layers.BatchNormalization(name="norm")]
    model = keras.Sequential([keras.Input((6,)), *parts, keras.layers.Dense(1, "sigmoid", name="b")])
    model.compile(keras.optimizers.Adam(rate), "binary_crossentropy", metrics=["accuracy"])
    return model


def test_it_is_fit_saliency_and_fit_by_hand():
    options = {"epochs": 5, "batch_size": 10, "r_bayes": 0.3, "branch_at": 0.4, "seed": 1, "verbose": 0}
    model = network()
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)  # of members that start far from the trained weights nothing warns
        members = sbn_tf.fit_branched(model, X, Y, validation_data=(X, Y), **options)
    keras.utils.set_random_seed(0)
    by_hand = network()
    by_hand.fit(X, Y, epochs=2, batch_size=10, verbose=0, validation_data=(X, Y))
    for ours, theirs in zip(model.get_weights(), by_hand.get_weights(), strict=True):
        np.testing.assert_array_equal(ours, theirs)  # one network for two epochs
    masks = top_k(saliency(by_hand, (X, Y), verbose=False), 0.3)
    found = {
        f"{layer.name}/{key}": layer.mask(key) for layer in masked_layers(members.network) for key in layer.posteriors
    }
    assert found and all(np.array_equal(found[key], masks[key]) for key in found)
    assert members.num_bayesian == masks.num_bayesian
    rates = [0.005 * (1 + math.cos(math.pi * t / 3)) for t in range(3)]
    np.testing.assert_allclose(members.history.history["learning_rate"], rates, rtol=1e-6)
    assert members.history.epoch == [2, 3, 4] and "val_nll" in members.history.history
    samples = members.predict_samples(X)
    assert samples.shape == (5, 40, 1) and samples.std(0).mean() > 1e-3


@pytest.mark.parametrize("batches", ["dataset", "arrays"])
def test_members_learn_what_one_network_learns(batches):
    import tensorflow as tf

    size = {"batch_size": 10} if batches == "arrays" else {}
    data = (X, Y) if batches == "arrays" else (tf.data.Dataset.from_tensor_slices((X, Y)).batch(10),)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "`shuffle=True` was passed")  # Keras's, of any dataset
        members = sbn_tf.fit_branched(network(0.03), *data, epochs=30, num_members=2, seed=0, verbose=0, **size)
    assert members.history.history["nll"][-1] < 0.5 < math.log(2)


def scheduled():
    model = network()
    model.compile(keras.optimizers.Adam(keras.optimizers.schedules.CosineDecay(0.01, 10)), "mse")
    return model


@pytest.mark.parametrize(
    ("model", "options", "message"),
    [
        (lambda: keras.Sequential([keras.Input((6,)), keras.layers.Dense(1)]), {}, "built and compiled"),
        (scheduled, {}, "number as its learning rate"),
        (network, {"epochs": 1}, "epochs >= 2"),
        (network, {"num_members": 1}, "num_members >= 2"),
        (network, {"branch_at": 1.5}, "branch_at"),
        (network, {"r_bayes": -0.1}, "r_bayes"),
        (network, {"initial_epoch": 0}, "no initial_epoch"),
    ],
)
def test_what_is_refused_before_anything_is_trained(model, options, message):
    model = model()
    before = model.get_weights()
    with pytest.raises(ValueError, match=message):
        sbn_tf.fit_branched(model, X, Y, verbose=0, **{"epochs": 3, **options})
    for now, then in zip(model.get_weights(), before, strict=True):
        np.testing.assert_array_equal(now, then)


class Batches(keras.utils.PyDataset):
    def __len__(self):
        return 4

    def __getitem__(self, i):
        return X[10 * i : 10 * i + 10], Y[10 * i : 10 * i + 10]


def test_a_py_dataset_and_an_optimizer_that_scales_the_loss():
    model = network()
    model.compile(keras.optimizers.LossScaleOptimizer(keras.optimizers.Adam(0.01)), "binary_crossentropy")
    with pytest.raises(ValueError, match="num_train= for a PyDataset"):
        sbn_tf.fit_branched(model, Batches(), epochs=2, verbose=0)
    members = sbn_tf.fit_branched(model, Batches(), epochs=2, num_train=40, verbose=0)
    assert members.history.history["learning_rate"] == [pytest.approx(0.01)]


def test_masks_are_cut_at_every_level_and_only_of_sigmoids():
    members = sbn_tf.fit_branched(network(), X, Y, epochs=2, num_members=3, seed=0, verbose=0)
    samples = members.predict_samples(X)
    cuts = [1 / 6, 3 / 6, 5 / 6]
    for masks in (members.predict_masks(X), members.predict_masks(X, num_masks=3)):
        assert masks.dtype == bool
        np.testing.assert_array_equal(masks, [sample > cut for sample, cut in zip(samples, cuts, strict=True)])
    assert members.predict_masks(X, num_masks=7).shape == (7, 40, 1)
    classes = keras.Sequential([keras.Input((6,)), keras.layers.Dense(2, "softmax", name="d")])
    softmax = sbn_tf.to_partial_bayes(classes, {"d/kernel": np.ones((6, 2), bool)}, num_train=40)
    with pytest.raises(ValueError, match="sigmoid"):
        softmax.predict_masks(X)
