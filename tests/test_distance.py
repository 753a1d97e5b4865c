"""Tests of the distance of features from those of training images."""

import keras
import numpy as np
import pytest
import sklearn.metrics as sk
from scipy.spatial.distance import cdist
from sklearn.covariance import ledoit_wolf

from sbn_tf.core.context import posterior_mean
from sbn_tf.datasets.base import Split
from sbn_tf.experiments import networks
from sbn_tf.experiments.distance import FeatureDistance, Features, detection
from sbn_tf.partial_bayes import to_partial_bayes

RNG = np.random.default_rng(0)
TRAIN = RNG.normal(size=(80, 6)) @ RNG.normal(size=(6, 6))
CLASSES = RNG.integers(3, size=80)
NEW = RNG.normal(size=(15, 6)) * 2


@pytest.mark.parametrize("classes", [None, CLASSES])
def test_mahalanobis_is_that_of_scipy(classes):
    index = np.zeros(80, int) if classes is None else classes
    means = np.stack([TRAIN[index == k].mean(0) for k in np.unique(index)])
    covariance = ledoit_wolf(TRAIN - means[index], assume_centered=True)[0]
    expected = cdist(NEW, means, "mahalanobis", VI=np.linalg.inv(covariance)).min(1)
    np.testing.assert_allclose(FeatureDistance(TRAIN, classes)(NEW), expected)


def test_neighbours_are_those_of_a_sorted_table():
    unit, other = (one / np.linalg.norm(one, axis=1, keepdims=True) for one in (TRAIN, NEW))
    expected = np.sort(np.linalg.norm(other[:, None] - unit, axis=2), 1)[:, 4]
    np.testing.assert_allclose(FeatureDistance(TRAIN, kind="neighbours", k=5)(NEW), expected)


def test_what_cannot_be_is_refused():
    with pytest.raises(ValueError, match="kind to be one of"):
        FeatureDistance(TRAIN, kind="cosine")
    with pytest.raises(ValueError, match="k, an integer from 1 to 80"):
        FeatureDistance(TRAIN, kind="neighbours", k=81)


def test_features_are_those_before_the_last_layer():
    images = RNG.normal(size=(60, 16, 16, 1)).astype("float32")
    network = networks.build("unet_small", (16, 16, 1), 1, seed=0)
    deepest = keras.Model(network.inputs, network.get_layer("encoder3_relu2").output)
    expected = deepest.predict(images, verbose=0).mean((1, 2))
    np.testing.assert_allclose(Features(network)(images), expected, rtol=1e-4, atol=1e-6)
    labels = keras.Sequential([keras.Input((16, 16, 1)), keras.layers.Flatten(), keras.layers.Dense(4, "relu")])
    labels.add(keras.layers.Dense(2, "softmax"))
    hidden = np.maximum(images.reshape(60, -1) @ labels.layers[1].get_weights()[0], 0)
    np.testing.assert_allclose(Features(labels)(images), hidden, rtol=1e-4, atol=1e-5)


def test_a_bayesian_network_is_taken_at_its_mean():
    images = RNG.normal(size=(4, 8, 8, 1)).astype("float32")
    network = keras.Sequential([keras.Input((8, 8, 1)), keras.layers.Flatten(), keras.layers.Dense(4, "relu")])
    network.add(keras.layers.Dense(1, "sigmoid"))
    network.compile("adam", "binary_crossentropy")
    expected = Features(network)(images)
    bayesian = to_partial_bayes(network, data=(images, np.ones((4, 1))), r_bayes=0.5, initial_scale=0.5)
    features = Features(bayesian)
    np.testing.assert_allclose(features(images), expected, rtol=1e-5)
    with posterior_mean():
        np.testing.assert_allclose(bayesian.network(images), network(images), rtol=1e-5)


def test_aurocs_are_those_of_scikit_learn():
    network = networks.build("unet_small", (8, 8, 1), 1, seed=0)
    images = RNG.integers(0, 256, (30, 8, 8, 1), "uint8")
    train, clean, other = (
        Split(name, "segmentation", part, part[..., :1] // 128, mean=np.float32([0.5]), sd=np.float32([0.3]))
        for name, part in (("train", images), ("test", images[:12]), ("test", 255 - images[12:]))
    )
    table = detection(lambda x: network(x)[None], network, train, clean, {"blur": (1.0,), "jpeg": (1, 5)}, {"b": other})
    assert table["kind"].tolist() == ["blur", "jpeg", "jpeg", "b"] and table["mutual_information"].isna().all()
    features = Features(network)
    distance = FeatureDistance(features(train.normalised()))
    scores = [distance(features(one.normalised())) for one in (clean, other)]
    expected = sk.roc_auc_score(np.repeat([0, 1], [12, 18]), np.concatenate(scores))
    assert table["mahalanobis"].iloc[-1] == pytest.approx(expected)
