"""Members and mixtures: each draw is the stock network with that member's weights; KLs against TFP."""

import keras
import numpy as np
import pytest
import tensorflow as tf
import tensorflow_probability as tfp

from sbn_tf import layers
from sbn_tf.core.conversion import to_deterministic
from sbn_tf.layers import masked_layers
from sbn_tf.partial_bayes import LocScaleOptimizer, to_partial_bayes
from sbn_tf.saliency import Masks, named_weights

RNG = np.random.default_rng(0)
X = RNG.normal(size=(11, 3)).astype("float32")
Y = RNG.integers(0, 2, size=(11, 2)).astype("float32")


@pytest.fixture(scope="module")
def model():
    """Trained once: nothing below changes it, which one test asserts."""
    keras.utils.set_random_seed(0)
    inputs = keras.Input((3,))
    x = keras.layers.BatchNormalization(name="bn")(keras.layers.Dense(4, "relu", name="a")(inputs))
    network = keras.Model(inputs, keras.layers.Dense(2, "sigmoid", name="b")(x))
    network.compile("sgd", "binary_crossentropy")
    network.fit(X, Y, verbose=0)
    return network


@pytest.fixture(scope="module")
def masks(model):
    return Masks(
        {key: RNG.random(w.variable.shape) < 0.4 for key, w in named_weights(model).items() if "bn" not in key}
    )


def members(model, masks, num_samples=3, posterior="members", **options):
    options = {"estimator": "split", "initial_scale": 0.5, "seed": 1, "num_train": 11, **options}
    return to_partial_bayes(model, masks, posterior=posterior, num_samples=num_samples, **options)


def posteriors_of(bnn):
    return {one.key: one for layer in masked_layers(bnn.network) for _, one in layer.posteriors.items()}


def by_hand(model, bnn, m):
    """The stock network with the weights of member m."""
    network = type(model).from_config(model.get_config())
    network.set_weights(model.get_weights())
    trained, weights = named_weights(bnn.network), named_weights(network)
    for key, weight in weights.items():
        weight.variable.assign(trained[key].variable)
    for key, one in posteriors_of(bnn).items():
        offsets = np.array(one.member_offsets)[m]
        weights[key].variable.assign(np.array(weights[key].variable) + one.dense(offsets, "float32"))
    return network


def test_each_sample_is_the_stock_network_with_that_member_s_weights(model, masks):
    bnn = members(model, masks)
    samples = bnn.predict_samples(X)
    assert samples.shape == (3, 11, 2)
    for m in range(3):
        np.testing.assert_allclose(samples[m], by_hand(model, bnn, m)(X), rtol=1e-5)
    np.testing.assert_allclose(bnn.predict(X, verbose=0), samples.mean(0), rtol=1e-5)
    assert np.abs(samples[0] - samples[1]).max() > 1e-3
    more = bnn.predict_samples(X, num_samples=7, batch_size=4)  # draw s is member s modulo M, in every batch
    np.testing.assert_allclose(more, samples[np.arange(7) % 3], rtol=1e-5)


@pytest.mark.parametrize(("size", "num"), [(11, 3), (2, 3), (1, 3), (6, 1)])
def test_by_split_each_part_of_a_batch_sees_its_member(model, masks, size, num):
    bnn = members(model, masks, num)
    outputs = bnn(X[:size], training=True)
    bounds = [m * size // num for m in range(num + 1)]
    expected = [by_hand(model, bnn, m)(X[bounds[m] : bounds[m + 1]]) for m in range(num)]
    np.testing.assert_allclose(outputs, np.concatenate(expected), rtol=1e-5)


def test_by_all_every_member_sees_the_batch(model, masks):
    bnn = members(model, masks, estimator="all")
    outputs = bnn(X, training=True)["samples"]
    for m, output in enumerate(outputs):
        np.testing.assert_allclose(output, by_hand(model, bnn, m)(X), rtol=1e-5)


def rows(bnn):
    """Offsets of every member and its optimiser's slots, by path: (M, k)."""
    variables = [*bnn.trainable_variables, *bnn.optimizer.variables]
    return {v.path: np.array(v) for v in variables if "member_offsets" in v.path}


@pytest.mark.parametrize("optimizer", ["adam", "loc_scale", "momentum"])
def test_by_turns_one_member_a_step_trains_and_the_others_stay_with_their_slots(model, masks, optimizer):
    bnn = members(model, masks, estimator="turns")
    adam = keras.optimizers.Adam(0.1)
    chosen = {"adam": adam, "loc_scale": LocScaleOptimizer(adam), "momentum": keras.optimizers.SGD(0.1, momentum=0.9)}
    bnn.compile(chosen[optimizer], "binary_crossentropy")
    bnn.optimizer.build(bnn.trainable_variables)
    outputs = [by_hand(model, bnn, m)(X) for m in range(3)]
    np.testing.assert_allclose(bnn(X, training=True), outputs[0], rtol=1e-5)
    bnn.turn.assign(0)
    for step in range(5):
        before = rows(bnn)
        bnn.train_on_batch(X, Y)
        after = rows(bnn)
        assert len(after) >= 2 * len(posteriors_of(bnn))
        for path, values in after.items():
            moved = np.any(values != before[path], axis=1)
            assert list(np.flatnonzero(moved)) == [step % 3], (step, path)
    assert int(bnn.turn) == 5


def test_by_turns_a_step_is_one_of_the_member_alone(model, masks):
    """Of SGD: the member's offsets and the shared weights move by the gradients of the stock network."""
    bnn = members(model, masks, estimator="turns")
    bnn.compile(keras.optimizers.SGD(0.1), "binary_crossentropy")
    alone = by_hand(model, bnn, 0)
    alone.get_layer("bn").trainable = False
    with tf.GradientTape() as tape:
        loss = tf.reduce_mean(keras.losses.binary_crossentropy(Y, alone(X)))
    gradients = dict(
        zip([v.path for v in alone.trainable_variables], tape.gradient(loss, alone.trainable_variables), strict=True)
    )
    before = {key: np.array(one.member_offsets)[0] for key, one in posteriors_of(bnn).items()}
    bnn.train_on_batch(X, Y)
    for key, one in posteriors_of(bnn).items():
        expected = before[key] - 0.1 * np.array(gradients[key]).ravel()[one.dense(True, bool).ravel()]
        np.testing.assert_allclose(np.array(one.member_offsets)[0], expected, rtol=1e-4, atol=1e-6)


def test_training_moves_shared_weights_and_offsets_but_not_the_original_nor_batch_norm(model, masks):
    before = [np.array(w) for w in model.get_weights()]
    bnn = members(model, masks)
    start = {key: np.array(one.member_offsets) for key, one in posteriors_of(bnn).items()}
    bnn.compile(keras.optimizers.SGD(0.5), "binary_crossentropy")
    bnn.fit(X, Y, batch_size=4, epochs=3, verbose=0)  # a last batch of 3
    for old, new in zip(before, model.get_weights(), strict=True):
        np.testing.assert_array_equal(old, new)
    for key, one in posteriors_of(bnn).items():
        assert np.abs(np.array(one.member_offsets) - start[key]).min() > 0
    named, moved = named_weights(model), named_weights(bnn.network)
    for key in named:
        same = np.array_equal(np.array(named[key].variable), np.array(moved[key].variable))
        assert same == key.startswith("bn/"), key


def test_members_have_no_kl_and_need_no_weight_of_it(model, masks):
    bnn = members(model, masks)
    bnn.compile("sgd", "binary_crossentropy")
    assert float(bnn.kl_divergence()) == 0.0 and sum(bnn.losses) == 0
    assert layers.Dense(2, num_bayesian=3, posterior="members").posterior_options.kl_weight == 0.0


def test_the_kl_of_a_mixture_is_the_mean_of_tfp_s(model, masks):
    bnn = members(model, masks, posterior="mixture", beta=0.25 * 11, terms_per_example=1)
    total, tfd = 0.0, tfp.distributions
    for key, one in posteriors_of(bnn).items():
        locs = np.array(named_weights(model)[key].variable)[one.dense(True, bool)] + np.array(one.member_offsets)
        scale = np.log1p(np.exp(np.array(one.untransformed_scale)))
        total += float(tfd.kl_divergence(tfd.Normal(locs, scale), tfd.Normal(0.0, 1.0)).numpy().sum()) / 3
    assert float(bnn.kl_divergence()) == pytest.approx(total, rel=1e-5)
    bnn(X, training=True)
    assert float(sum(bnn.losses)) == pytest.approx(0.25 * total, rel=1e-5)
    draws = bnn.predict_samples(X, num_samples=6)
    assert draws.shape == (6, 11, 2) and np.abs(draws[:3] - draws[3:]).max() > 0


def test_the_scale_of_a_mixture_is_its_standard_deviation():
    layer = layers.Dense(1, num_bayesian=1, posterior="mixture", num_members=2, kl_weight=0.0, use_bias=False)
    layer.build((None, 1))
    one = layer.posteriors["kernel"]
    one.member_offsets.assign([[-1.0], [1.0]])
    one.untransformed_scale.assign(np.log(np.expm1([[0.5], [0.5]])))
    both = tf.function(lambda: [one.offsets(s, layer.posteriors.noise) for s in range(2)])
    draws = np.array([both() for _ in range(2000)])
    assert layer.scale("kernel").item() == pytest.approx(np.sqrt(1 + 0.25), rel=1e-5)
    assert draws.std() == pytest.approx(np.sqrt(1.25), rel=0.05)


@pytest.mark.parametrize(("posterior", "estimator"), [("members", "split"), ("members", "turns"), ("mixture", "turns")])
def test_saved_and_loaded_members_predict_the_same(model, masks, tmp_path, posterior, estimator):
    bnn = members(model, masks, 2, posterior, relative=False, estimator=estimator)
    bnn.compile("adam", "binary_crossentropy")
    bnn.fit(X, Y, verbose=0)
    bnn.save(tmp_path / "p.keras")
    loaded = keras.models.load_model(tmp_path / "p.keras")
    for old, new in zip(bnn.weights, loaded.weights, strict=True):
        np.testing.assert_array_equal(old, new)
    if posterior == "members":
        np.testing.assert_array_equal(bnn.predict_samples(X), loaded.predict_samples(X))
    again = [one.fit(X, Y, verbose=0, shuffle=False).history["loss"] for one in (bnn, loaded)]
    if posterior == "members":
        assert again[0] == again[1]


def test_where_offsets_start(model, masks):
    many = members(model, masks, 20_000, initial_scale=0.3)
    for key, one in posteriors_of(many).items():
        whole = np.array(named_weights(model)[key].variable)
        expected = 0.3 * np.maximum(abs(whole), max(1e-3, np.sqrt((whole**2).mean())))
        np.testing.assert_allclose(np.array(one.member_offsets).std(0), expected[one.dense(True, bool)], rtol=0.03)


def test_gaussians_may_start_relative_to_the_trained_weights(model, masks):
    bnn = to_partial_bayes(model, masks, num_train=11, initial_scale=0.1, relative="entry")
    for key, one in posteriors_of(bnn).items():
        locs = np.abs(np.array(named_weights(model)[key].variable)[one.dense(True, bool)])
        np.testing.assert_allclose(one.scale_of_entries(), 0.1 * np.maximum(locs, 1e-3), rtol=1e-4)


def test_the_posterior_mean_of_members_is_their_mean(model, masks):
    bnn = members(model, masks)
    mean = type(model).from_config(model.get_config())
    networks = [by_hand(model, bnn, m).get_weights() for m in range(3)]
    mean.set_weights([np.mean(values, axis=0) for values in zip(*networks, strict=True)])
    with layers.posterior_mean():
        np.testing.assert_allclose(bnn.network(X), mean(X), rtol=1e-5)
    np.testing.assert_allclose(to_deterministic(bnn)(X), mean(X), rtol=1e-5)


def test_members_with_two_inputs_a_dictionary_of_outputs_and_dropout():
    one, two = keras.Input((3,), name="one"), keras.Input((2,), name="two")
    hidden = keras.layers.Dense(6, "relu", name="h")(keras.layers.Concatenate()([one, two]))
    hidden = keras.layers.GaussianNoise(0.1)(keras.layers.Dropout(0.5)(hidden))
    outputs = {"a": keras.layers.Dense(1, "sigmoid", name="a")(hidden), "b": keras.layers.Dense(2, name="b")(hidden)}
    model = keras.Model({"one": one, "two": two}, outputs)
    x = {"one": X, "two": X[:, :2]}
    y = {"a": Y[:, :1], "b": Y}
    masks = Masks({"h/kernel": RNG.random((5, 6)) < 0.5})
    for estimator in ("all", "split", "turns"):
        bnn = members(model, masks, 2, estimator=estimator, probabilities=None, terms_per_example=1)
        bnn.compile("adam", {"a": "binary_crossentropy", "b": "mse"})
        assert np.isfinite(bnn.fit(x, y, epochs=2, verbose=0).history["loss"]).all()
        samples = bnn.predict_samples(x)
        assert samples["a"].shape == (2, 11, 1) and samples["b"].shape == (2, 11, 2)
        expected = by_hand(model, bnn, 1)(x)
        np.testing.assert_allclose(samples["b"][1], expected["b"], rtol=1e-4, atol=1e-5)


def test_members_have_the_vocabulary_the_boundaries_and_the_statistics(tmp_path):
    words, numbers = np.array(["a b", "b c", "a a"]), RNG.normal(3.0, 2.0, (3, 2)).astype("float32")
    text, bins, scale = (
        keras.layers.TextVectorization(output_mode="multi_hot"),
        keras.layers.Discretization(num_bins=3),
        keras.layers.Normalization(),
    )
    for layer, data in ((text, words), (bins, numbers), (scale, numbers)):
        layer.adapt(data)
    one, two = keras.Input((), dtype="string", name="one"), keras.Input((2,), name="two")
    hidden = keras.layers.Concatenate()([text(one), keras.ops.cast(bins(two), "float32"), scale(two)])
    model = keras.Model({"one": one, "two": two}, keras.layers.Dense(2, name="head")(hidden))
    x = {"one": keras.ops.convert_to_tensor(words), "two": keras.ops.convert_to_tensor(numbers)}
    bnn = members(model, Masks({"head/kernel": np.ones(model.get_layer("head").kernel.shape, bool)}))
    for variable in posteriors_of(bnn)["head/kernel"].variables:
        variable.assign(0 * variable)
    np.testing.assert_allclose(bnn(x), model(x), rtol=1e-5)
    bnn.save(tmp_path / "model.keras")
    np.testing.assert_allclose(keras.saving.load_model(tmp_path / "model.keras")(x), model(x), rtol=1e-5)


def test_members_in_a_wrapper_draw_their_own_weights():
    inputs = keras.Input((4, 3))
    model = keras.Model(inputs, keras.layers.Dense(1, "sigmoid")(keras.layers.LSTM(3, name="lstm")(inputs)))
    x = RNG.normal(size=(6, 4, 3)).astype("float32")
    key = next(key for key in named_weights(model) if "recurrent_kernel" in key)
    bnn = members(model, Masks({key: np.ones((3, 12), bool)}))
    samples = bnn.predict_samples(x)
    assert np.abs(samples[0] - samples[1]).max() > 1e-4
    outputs = bnn(x, training=True)
    np.testing.assert_allclose(outputs, np.concatenate([samples[s][2 * s : 2 * s + 2] for s in range(3)]), rtol=1e-5)


def test_mixed_precision_keeps_members_in_float32(model, masks):
    keras.config.set_dtype_policy("mixed_bfloat16")
    try:
        network = keras.Sequential([keras.Input((3,)), keras.layers.Dense(4, "relu"), keras.layers.Dense(2, "sigmoid")])
        key = next(iter(named_weights(network)))
        bnn = members(network, Masks({key: np.ones((3, 4), bool)}))
    finally:
        keras.config.set_dtype_policy("float32")
    assert {one.member_offsets.dtype for one in posteriors_of(bnn).values()} == {"float32"}
    bnn.compile("adam", "binary_crossentropy")
    assert np.isfinite(bnn.fit(X, Y, verbose=0).history["loss"]).all()


def test_export_of_members(model, masks, tmp_path):
    bnn = members(model, masks)
    expected = bnn.predict_uncertainty(X)
    bnn.export(tmp_path / "served", outputs="uncertainty", verbose=False)
    loaded = tf.saved_model.load(tmp_path / "served")
    served = loaded.serve(X)
    for name, values in expected.items():
        np.testing.assert_allclose(served[name], values, rtol=1e-4, atol=1e-6, err_msg=name)


def test_layers_before_the_first_member_run_once(model):
    bnn = members(model, Masks({"b/kernel": np.ones((4, 2), bool)}))
    assert [name.split("/")[-1] for name in bnn.graph.runs_once()] == ["a", "bn"]


@pytest.mark.parametrize("estimator", ["flipout", "local"])
def test_noise_for_each_example_needs_gaussians(model, masks, estimator):
    with pytest.raises(ValueError, match="Gaussian posteriors"):
        members(model, masks, estimator=estimator)


def test_what_is_refused(model, masks):
    for num in (0, 1.5, True):
        with pytest.raises(ValueError, match="an integer >= 1"):
            members(model, masks, num_samples=num)
    with pytest.raises(ValueError, match=r"'gaussian', 'members', 'mixture'.*'particles'"):
        members(model, masks, posterior="particles")
    with pytest.raises(ValueError, match="nowhere/kernel"):
        members(model, {"nowhere/kernel": np.ones((3, 4), bool)})
    with pytest.raises(ValueError, match=r"Expected options among.*momentum=1"):
        members(model, masks, momentum=1)
