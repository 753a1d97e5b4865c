"""Particles: a network each, of which only masked entries differ; against the network by hand, and TFP."""

import keras
import numpy as np
import pytest
import tensorflow_probability as tfp

from sbn_tf.particles import Particles, to_particles
from sbn_tf.saliency import Masks, named_weights

RNG = np.random.default_rng(0)
X = RNG.normal(size=(11, 3)).astype("float32")
Y = RNG.integers(0, 2, size=(11, 2)).astype("float32")


@pytest.fixture
def model():
    inputs = keras.Input((3,))
    x = keras.layers.BatchNormalization(name="bn")(keras.layers.Dense(4, "relu", name="a")(inputs))
    network = keras.Model(inputs, keras.layers.Dense(2, "sigmoid", name="b")(x))
    network.compile("sgd", "binary_crossentropy")
    network.fit(X, Y, verbose=0)
    return network


@pytest.fixture
def masks(model):
    return Masks(
        {key: RNG.random(w.variable.shape) < 0.4 for key, w in named_weights(model).items() if "bn" not in key}
    )


def by_hand(model, particles, m):
    """The stock network with the weights of particle m."""
    network = type(model).from_config(model.get_config())
    network.set_weights(particles.network.get_weights())
    weights = named_weights(network)
    for key, places in particles.index.items():
        values = keras.ops.convert_to_numpy(weights[key].variable).copy()
        values.ravel()[keras.ops.convert_to_numpy(places)] += keras.ops.convert_to_numpy(particles._offsets[key])[m]
        weights[key].variable.assign(values)
    return network


def test_each_sample_is_the_stock_network_with_that_particle_s_weights(model, masks):
    particles = to_particles(model, masks, num_particles=3, initial_scale=0.5, seed=1)
    samples = particles.predict_samples(X)
    assert samples.shape == (3, 11, 2)
    for m in range(3):
        np.testing.assert_allclose(samples[m], by_hand(model, particles, m)(X), rtol=1e-5)
    np.testing.assert_allclose(particles.predict(X, verbose=0), samples.mean(0), rtol=1e-5)
    assert np.abs(samples[0] - samples[1]).max() > 1e-3


@pytest.mark.parametrize(("size", "num"), [(11, 3), (2, 3), (1, 3), (6, 1)])
def test_in_training_each_part_of_a_batch_sees_its_particle(model, masks, size, num):
    particles = to_particles(model, masks, num_particles=num, seed=1)
    outputs = particles(X[:size], training=True)
    bounds = [m * size // num for m in range(num + 1)]
    expected = [by_hand(model, particles, m)(X[bounds[m] : bounds[m + 1]]) for m in range(num)]
    np.testing.assert_allclose(outputs, np.concatenate(expected), rtol=1e-5)


def test_training_moves_shared_weights_and_offsets_but_not_the_original_nor_batch_norm(model, masks):
    before = [np.array(w) for w in model.get_weights()]
    particles = to_particles(model, masks, num_particles=3, seed=1)
    start = {key: np.array(value) for key, value in particles._offsets.items()}
    particles.compile(keras.optimizers.SGD(0.5), "binary_crossentropy")
    particles.fit(X, Y, batch_size=4, epochs=3, verbose=0)  # a last batch of 3
    for old, new in zip(before, model.get_weights(), strict=True):
        np.testing.assert_array_equal(old, new)
    assert all(np.abs(np.array(particles._offsets[key]) - value).min() > 0 for key, value in start.items())
    named, moved = named_weights(model), named_weights(particles.network)
    for key in named:
        same = np.array_equal(np.array(named[key].variable), np.array(moved[key].variable))
        assert same == key.startswith("bn/"), key


def test_the_kl_of_gaussians_is_the_mean_of_tfp_s(model, masks):
    particles = to_particles(model, masks, num_particles=3, gaussian=True, kl_weight=0.25, initial_scale=0.5, seed=1)
    total, tfd = 0.0, tfp.distributions
    for key, places in particles.index.items():
        locs = np.array(named_weights(model)[key].variable).ravel()[np.array(places)] + np.array(
            particles._offsets[key]
        )
        scale = np.log1p(np.exp(np.array(particles._rhos[key])))
        total += float(tfd.kl_divergence(tfd.Normal(locs, scale), tfd.Normal(0.0, 1.0)).numpy().sum()) / 3
    assert float(particles.kl_divergence()) == pytest.approx(total, rel=1e-5)
    particles(X, training=True)
    assert float(sum(particles.losses)) == pytest.approx(0.25 * total, rel=1e-5)
    draws = particles.predict_samples(X, draws=2)
    assert draws.shape == (6, 11, 2) and np.abs(draws[:3] - draws[3:]).max() > 0


@pytest.mark.parametrize("gaussian", [False, True])
def test_saved_and_loaded_particles_predict_the_same(model, masks, tmp_path, gaussian):
    particles = to_particles(model, masks, num_particles=2, gaussian=gaussian, relative=False, seed=1)
    particles.compile("adam", "binary_crossentropy")
    particles.fit(X, Y, verbose=0)
    particles.save(tmp_path / "p.keras")
    loaded = keras.models.load_model(tmp_path / "p.keras")
    for old, new in zip(particles.weights, loaded.weights, strict=True):
        if "seed" not in old.path:
            np.testing.assert_array_equal(old, new)
    if not gaussian:
        np.testing.assert_array_equal(particles.predict_samples(X), loaded.predict_samples(X))
    assert len(loaded.trainable_variables) == len(particles.trainable_variables)


def test_where_offsets_start(model, masks):
    many = to_particles(model, masks, num_particles=20_000, initial_scale=0.3, seed=1)
    for key, places in many.index.items():
        locs = np.abs(np.array(named_weights(model)[key].variable).ravel()[np.array(places)])
        np.testing.assert_allclose(np.array(many._offsets[key]).std(0), 0.3 * np.maximum(locs, 1e-3), rtol=0.03)


def test_what_is_refused(model, masks):
    for num in (0, 1.5, True):
        with pytest.raises(ValueError, match="num_particles, an integer >= 1"):
            to_particles(model, masks, num_particles=num)
    with pytest.raises(ValueError, match=r"Expected masks of .*nowhere/kernel"):
        Particles(model, {"nowhere/kernel": [0]})
