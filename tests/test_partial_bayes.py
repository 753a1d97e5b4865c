"""Conversion, the ELBO against NumPy, the traps and their guards, predictions, saving."""

import functools
import subprocess
import sys
import warnings

import keras
import numpy as np
import pytest
import tensorflow as tf
from keras import layers as kl
from scipy import special, stats

from sbn_tf import layers
from sbn_tf.core import noise, sampler
from sbn_tf.core.conversion import to_deterministic
from sbn_tf.core.losses import loss_terms
from sbn_tf.core.outputs import entropy
from sbn_tf.partial_bayes import BetaSchedule, LocScaleOptimizer, PartialBayes, to_partial_bayes
from sbn_tf.saliency import Masks, biases_before_batch_norm, named_weights, saliency, top_k


def network(activation="sigmoid", inputs=3, outputs=1):
    keras.utils.set_random_seed(0)
    x = keras.Input((inputs,))
    y = kl.Dense(4, activation="tanh", name="hidden")(x)
    return keras.Model(x, kl.Dense(outputs, activation=activation, name="head")(y))


def data(n=16, inputs=3, seed=0):
    rng = np.random.default_rng(seed)
    return rng.normal(size=(n, inputs)).astype("float32"), rng.integers(0, 2, (n, 1)).astype("float32")


def full(model, value=True, keys=None):
    """Masks of all trainable weights (or of `keys`)."""
    found = {k: w for k, w in named_weights(model).items() if w.variable.trainable}
    return Masks({k: np.full(w.variable.shape, value) for k, w in found.items() if keys is None or k in keys})


def bayesian(model, masks=None, **options):
    """Of two samples, unless told otherwise: each is traced, and five take twice as long."""
    options = {"num_train": 16, "seed": 0, "num_samples": 2} | options
    return to_partial_bayes(model, full(model) if masks is None else masks, **options)


def numbers(model):
    return [np.array(v) for v in model.variables]


# ---- conversion ----


def test_a_wrong_share_is_refused_before_any_example_is_read():
    def batches():
        raise AssertionError("read")
        yield

    with pytest.raises(ValueError, match=r"Expected r_bayes.*Received: r_bayes=1.5"):
        to_partial_bayes(network(), r_bayes=1.5, data=batches(), num_train=16, loss="binary_crossentropy")


def test_a_shared_layer_is_drawn_once_a_sample():
    x = keras.Input((3,))
    shared = kl.Dense(2, name="shared")
    model = keras.Model(x, shared(x) - shared(x))  # 0 for every weight
    bnn = bayesian(model, initial_scale=1.0, beta=0.0, terms_per_example=1)
    np.testing.assert_array_equal(bnn.predict(data()[0], verbose=0), 0)
    np.testing.assert_array_equal(bnn.predict_samples(data()[0]), 0)
    bnn.compile("sgd", "mse", jit_compile=True)
    assert bnn.train_on_batch(data()[0], np.zeros((16, 2)))[0] == 0
    with pytest.raises(ValueError, match="posterior_mean"), layers.posterior_mean():
        bnn.predict(data()[0], verbose=0)


def test_samples_differ_from_each_other():
    bnn = bayesian(network(), initial_scale=1.0)
    samples = bnn.predict_samples(data()[0], num_samples=5)
    assert len(np.unique(samples[:, 0, 0])) == 5


def test_a_bayesian_model_is_not_converted_again():
    bnn = bayesian(network(), full(network(), keys=["head/kernel"]))
    for model in (bnn, bnn.network):
        with pytest.raises(ValueError, match="has Bayesian entries already"):
            bayesian(model, full(network(), keys=["hidden/kernel"]))


def test_as_a_part_of_another_model_it_predicts_and_refuses_to_train():
    model, (x, y) = network(), data()
    bnn = bayesian(model, initial_scale=1e-8)
    whole = keras.Sequential([keras.Input((3,)), bnn])
    np.testing.assert_allclose(whole.predict(x, verbose=0), model.predict(x, verbose=0), atol=1e-6)
    whole.compile("sgd", "binary_crossentropy")
    with pytest.raises(ValueError, match="cannot be trained as a part"):
        whole.fit(x, y, verbose=0)


def test_scales_of_the_papers_initializer_differ_between_weights():
    rho = keras.initializers.RandomNormal(-3.0, 1.0, seed=0)
    bnn = bayesian(network(inputs=50), untransformed_scale_initializer=rho)
    values = np.log(np.expm1(bnn.scales().astype("float64")))
    assert len(np.unique(values)) == len(values) == 209
    assert stats.kstest(values, stats.norm(-3, 1).cdf).pvalue > 0.01
    again = bayesian(network(inputs=50), untransformed_scale_initializer=rho)
    np.testing.assert_array_equal(bnn.scales(), again.scales())


def test_zero_masks_equal_the_original():
    model, (x, _) = network(), data()
    bnn = bayesian(model, full(model, False), num_samples=1)
    np.testing.assert_array_equal(bnn.predict(x, verbose=0), model.predict(x, verbose=0))
    assert bnn.num_bayesian == 0 and float(bnn.kl_divergence()) == 0
    bnn.compile("sgd", "binary_crossentropy")
    bnn.fit(x, data()[1], verbose=0)


def test_tiny_scales_nearly_equal_the_original_and_it_is_untouched():
    model, (x, y) = network(), data()
    before, settings = numbers(model), [w.trainable for w in model.weights]
    bnn = bayesian(model, initial_scale=1e-8)
    np.testing.assert_allclose(bnn.predict(x, verbose=0), model.predict(x, verbose=0), atol=1e-6)
    assert [layer.name for layer in bnn.network.layers[1:]] == ["hidden", "head"]
    bnn.compile("sgd", "binary_crossentropy")
    bnn.fit(x, y, verbose=0)
    for a, b in zip(before, numbers(model), strict=True):
        np.testing.assert_array_equal(a, b)
    assert settings == [w.trainable for w in model.weights]
    assert not any(isinstance(layer, layers.MaskedGaussian) for layer in model.layers)


def test_nested_shared_many_inputs_and_outputs():
    keras.utils.set_random_seed(0)
    inner_in = keras.Input((3,))
    inner = keras.Model(inner_in, kl.Dense(4, activation="relu", name="dense")(inner_in), name="inner")
    shared = kl.Dense(4, name="shared")
    a, b = keras.Input((3,), name="a"), keras.Input((3,), name="b")
    joined = kl.Concatenate()([shared(inner(a)), shared(inner(b))])
    one = kl.Dense(1, activation="sigmoid", name="one")(joined)
    three = kl.Dense(3, activation="softmax", name="three")(joined)
    model = keras.Model([a, b], [one, three])
    bnn = bayesian(model, terms_per_example=1, num_samples=2)
    assert bnn.num_bayesian == model.count_params()
    assert bnn.probabilities == ["sigmoid", "softmax"]
    assert len(layers.masked_layers(bnn.network)) == 4
    x, y = data()
    bnn.compile("adam", ["binary_crossentropy", "categorical_crossentropy"])
    labels = [y, np.eye(3, dtype="float32")[np.arange(16) % 3]]
    assert np.isfinite(bnn.fit([x, -x], labels, verbose=0).history["loss"]).all()
    outputs = bnn.predict([x, -x], verbose=0)
    assert [o.shape for o in outputs] == [(16, 1), (16, 3)]
    np.testing.assert_allclose(outputs[1].sum(-1), 1, rtol=1e-5)
    parts = bnn.predict_uncertainty([x, -x])
    assert parts[0]["mean"].shape == (16, 1) and parts[1]["mutual_information"].shape == (16,)


def test_many_outputs_demand_terms():
    x = keras.Input((3,))
    model = keras.Model(x, [kl.Dense(1, name="a")(x), kl.Dense(2, name="b")(x)])
    with pytest.raises(ValueError, match="terms_per_example"):
        bayesian(model).compile("sgd", ["mse", "mse"])


@pytest.mark.parametrize("loss", ["mse", ["mse", "mse"], {"a": "mse", "b": "mse"}, {"a": "mse"}])
def test_outputs_that_average_over_as_many_terms_need_none(loss):
    x = keras.Input((3,))
    bnn = bayesian(keras.Model(x, [kl.Dense(2, name="a")(x), kl.Dense(2, name="b")(x)]))
    bnn.compile("sgd", loss)
    assert float(bnn.kl.weight) == pytest.approx(1 / 32)


@pytest.mark.parametrize("loss", [["binary_crossentropy"], {"head": "binary_crossentropy"}])
def test_a_loss_in_a_list_or_dict_is_the_loss(loss):
    bnn = bayesian(network())
    bnn.compile("sgd", loss)
    assert float(bnn.kl.weight) == pytest.approx(1 / 16)


def test_sequential_and_nested_sequential():
    keras.utils.set_random_seed(0)
    model = keras.Sequential([keras.Input((3,)), keras.Sequential([kl.Dense(2, name="d")], name="in"), kl.Dense(1)])
    x, _ = data()
    model(x)
    bnn = bayesian(model, initial_scale=1e-8)
    np.testing.assert_allclose(bnn.predict(x, verbose=0), model.predict(x, verbose=0), atol=1e-6)
    assert bnn.num_bayesian == model.count_params()


def test_masks_of_another_model():
    with pytest.raises(ValueError, match="another model"):
        bayesian(network(), full(network(inputs=5)))


@pytest.mark.parametrize("kind", ["LSTM", "TimeDistributed"])
def test_layer_without_a_twin_that_is_not_salient_stays(kind):
    x = keras.Input((5, 3))
    y = kl.LSTM(2, name="odd")(x) if kind == "LSTM" else kl.TimeDistributed(kl.Dense(2, name="odd"))(x)
    model = keras.Model(x, kl.Dense(1)(y))
    keys = {k for k in named_weights(model) if k.startswith("dense")}
    bnn = bayesian(model, full(model, keys=keys))  # not salient: the layer stays as it was
    inputs = np.ones((2, 5, 3), "float32")
    with layers.posterior_mean():
        np.testing.assert_allclose(bnn.network(inputs), model(inputs), atol=1e-6)


def test_subclassed_and_unbuilt_models_are_refused():
    class Own(keras.Model):
        def __init__(self):
            super().__init__()
            self.d = kl.Dense(1)

        def call(self, x):
            return self.d(x)

    own = Own()
    own(np.ones((1, 3), "float32"))
    with pytest.raises(ValueError, match=r"from_config\(get_config\(\)\)"):
        bayesian(own)
    with pytest.raises(ValueError, match="built"):
        bayesian(keras.Sequential([kl.Dense(1)]), {})


@pytest.mark.parametrize(
    ("option", "value"),
    [
        *(("num_samples", 0), ("num_samples", 1.5), ("num_train", 0), ("num_train", True)),
        *(("estimator", "some"), ("batch_norm", "off"), ("kl_reduction", "max")),
        *(("beta", -1.0), ("beta", float("nan")), ("initial_scale", 0.0)),
    ],
)
def test_options_out_of_range_are_named(option, value):
    with pytest.raises(ValueError, match=option):
        bayesian(network(), **{option: value})


# ---- the ELBO ----


def elbo_in_numpy(x, y, w, b, rho, mask, eps, weight):
    """Loss and gradients (w, rho) of a linear model under mean squared error, noise `eps` in every entry."""
    sigma = np.log1p(np.exp(rho))
    drawn = w.copy()
    drawn[mask] += sigma * eps
    residual = x @ drawn + b - y
    mu = w[mask]
    loss = np.mean(residual**2) + weight * np.sum(0.5 * (mu**2 + sigma**2 - 1) - np.log(sigma))
    grad_w = np.mean(2 * residual[:, None] * x, axis=0)
    grad_rho = (grad_w[mask] * eps + weight * (sigma - 1 / sigma)) / (1 + np.exp(-rho))
    grad_b = np.mean(2 * residual)
    grad_w[mask] += weight * mu
    return loss, grad_w, grad_rho, grad_b


@pytest.mark.parametrize("estimator", ["all", "split"])
@pytest.mark.parametrize(
    ("activation", "loss", "outputs"),
    [("sigmoid", "binary_crossentropy", 1), ("softmax", "categorical_crossentropy", 2)],
)
def test_sure_and_wrong_costs_its_logit_and_learns(estimator, activation, loss, outputs):
    """At a logit of 40 for the wrong answer the loss is softplus(40), its slope 1: not the log of a clipped p."""
    x = keras.Input((1,))
    model = keras.Model(x, kl.Dense(outputs, activation, use_bias=False, name="head")(x))
    model.get_layer("head").kernel.assign(np.array([[40.0, 0.0][:outputs]]))
    bnn = bayesian(model, full(model, False), estimator=estimator, num_samples=2)
    bnn.compile(keras.optimizers.SGD(1.0), loss)
    wrong = np.repeat([[0.0, 1.0][:outputs]], 4, 0)
    assert bnn.train_on_batch(np.ones((4, 1)), wrong)[0] == pytest.approx(np.logaddexp(0, 40))
    assert np.array(bnn.network.get_layer("head").kernel)[0, 0] == pytest.approx(39, abs=1e-3)


@pytest.mark.parametrize(("estimator", "num_samples"), [("all", 1), ("all", 5), ("split", 4)])
def test_one_step_against_numpy(monkeypatch, estimator, num_samples):
    """The KL counts once however many samples are drawn."""
    monkeypatch.setattr(
        noise, "standard_normal", lambda n, generator, dtype="float32": keras.ops.full((n,), 0.5, dtype)
    )
    x, y = data()
    model = keras.Sequential([keras.Input((3,)), kl.Dense(1, name="d")])
    model.set_weights([np.array([[1.0], [-2.0], [0.5]]), np.array([0.3])])
    mask = np.array([True, False, True])
    options = {"initial_scale": 0.2, "beta": 0.7, "num_train": 40, "estimator": estimator, "num_samples": num_samples}
    bnn = bayesian(model, {"d/kernel": mask[:, None]}, **options)
    bnn.compile(keras.optimizers.SGD(0.1), "mse")
    dense = bnn.network.get_layer("d")
    w, rho = np.array([1.0, -2.0, 0.5]), np.log(np.expm1(0.2)) * np.ones(2)
    loss, grad_w, grad_rho, grad_b = elbo_in_numpy(x, y[:, 0], w, 0.3, rho, mask, 0.5, 0.7 / 40)
    logs = bnn.train_on_batch(x, y, return_dict=True)
    np.testing.assert_allclose(logs["loss"], loss, rtol=1e-5)
    np.testing.assert_allclose(np.array(dense.kernel)[:, 0], w - 0.1 * grad_w, rtol=1e-5)
    np.testing.assert_allclose(dense.posteriors["kernel"].untransformed_scale, rho - 0.1 * grad_rho, rtol=1e-5)
    np.testing.assert_allclose(dense.bias, [0.3 - 0.1 * grad_b], rtol=1e-5)


def test_kl_once_with_five_samples():
    x, y = data()
    bnn = bayesian(network(), num_samples=5, initial_scale=1e-6)
    bnn.compile("sgd", "binary_crossentropy")
    loss = bnn.compute_loss(x, y, bnn(x, training=True))
    with layers.posterior_mean():
        alone = keras.ops.mean(keras.losses.binary_crossentropy(y, bnn.network(x)))
    np.testing.assert_allclose(loss - alone, bnn.kl_divergence() / 16, rtol=1e-4)


def test_sample_weight_and_validation_loss():
    x, y = data()
    for estimator in ("all", "split"):
        bnn = bayesian(network(), num_samples=4, initial_scale=1e-6, estimator=estimator, beta=0.0)
        bnn.compile("sgd", "binary_crossentropy")
        weight = np.arange(16, dtype="float32")
        loss = bnn.compute_loss(x, y, bnn(x, training=True), weight)
        with layers.posterior_mean():
            each = np.array(keras.losses.binary_crossentropy(y, bnn.network(x)))
        np.testing.assert_allclose(loss, np.mean(each * weight), rtol=1e-4)
        np.testing.assert_allclose(bnn.evaluate(x, y, verbose=0, return_dict=True)["loss"], each.mean(), rtol=1e-4)


@pytest.mark.parametrize(("size", "mixing"), [(1, True), (2, False), (3, True)])
def test_a_batch_of_fewer_examples_than_samples_under_split(size, mixing):
    x, y = np.random.default_rng(0).normal(size=(10 + size, 4, 4, 1)).astype("float32"), np.zeros((10 + size, 4, 4, 1))
    model = conv("sigmoid", 1)
    if mixing:  # then each draw is one call on a part of the batch
        model = keras.Model(model.input, kl.Lambda(lambda t: t, name="any")(model.output))
    bnn = bayesian(model, num_samples=4, initial_scale=1e-6, estimator="split", beta=0.0, probabilities="sigmoid")
    bnn.compile(keras.optimizers.SGD(0.0), "binary_crossentropy")
    with layers.posterior_mean():
        each = np.array(keras.losses.binary_crossentropy(y, bnn.network(x))).mean(axis=(1, 2))
    loss = bnn.compute_loss(x[-size:], y[-size:], bnn(x[-size:], training=True))
    np.testing.assert_allclose(loss, each[-size:].mean(), rtol=1e-4)
    history = bnn.fit(x, y, batch_size=10, shuffle=False, verbose=0).history
    np.testing.assert_allclose(history["loss"], [each.mean()], rtol=1e-4)


def conv(activation, channels, size=4):
    x = keras.Input((size, size, 1))
    return keras.Model(x, kl.Conv2D(channels, 3, padding="same", activation=activation, name="c")(x))


def test_kl_weight_counts_the_terms_of_the_loss():
    model = conv("sigmoid", 1)
    bnn = bayesian(model, num_train=10, beta=0.5)
    bnn.compile("sgd", keras.losses.BinaryCrossentropy())
    assert float(bnn.kl.weight) == pytest.approx(0.5 / (10 * 16))
    bnn.beta = 1.0
    assert float(bnn.kl.weight) == pytest.approx(1 / 160)
    per_image = bayesian(network("softmax", outputs=7), num_train=10)
    per_image.compile("sgd", "sparse_categorical_crossentropy")
    assert float(per_image.kl.weight) == pytest.approx(1 / 10)
    mean = bayesian(model, num_train=10, beta=0.5, kl_reduction="mean")
    mean.compile("sgd", "binary_crossentropy")
    assert float(mean.kl.weight) == 0.5


@pytest.mark.parametrize(
    ("loss", "shape", "terms"),
    [
        ("binary_crossentropy", (None, 14), 14),
        ("bce", (None, 4, 4, 1), 16),
        ("mse", (None, 1), 1),
        (keras.losses.SparseCategoricalCrossentropy(), (None, 4, 4, 3), 16),
        ("categorical_crossentropy", (None, 4, 4, 3), 16),
        (keras.losses.CategoricalCrossentropy(), (None, 9), 1),
        (keras.losses.SparseCategoricalCrossentropy(axis=1), (None, 3, 4, 5), 20),
        (keras.losses.BinaryCrossentropy(reduction="mean_with_sample_weight"), (None, 9), 9),
        (lambda y, p: 0.0, (None, 9), None),
    ],
)
def test_loss_terms(loss, shape, terms):
    assert loss_terms(loss, shape) == terms


def test_loss_terms_refuses_sums_and_open_sizes():
    with pytest.raises(ValueError, match="averages"):
        loss_terms(keras.losses.BinaryCrossentropy(reduction="sum"), (None, 2))
    with pytest.raises(ValueError, match="open"):
        loss_terms("binary_crossentropy", (None, None, None, 1))


def test_unknown_loss_demands_terms_and_a_mismatch_warns():
    def own(y, p):
        return keras.ops.mean((y - p) ** 2, axis=-1)

    with pytest.raises(ValueError, match="terms_per_example"):
        bayesian(network()).compile("sgd", own)
    given = bayesian(network(), terms_per_example=2)
    given.compile("sgd", own)
    assert float(given.kl.weight) == pytest.approx(1 / 32)
    own.terms_per_example = lambda shape: 4
    known = bayesian(network())
    known.compile("sgd", own)
    assert float(known.kl.weight) == pytest.approx(1 / 64)
    with pytest.warns(UserWarning, match="16 times"):
        bayesian(conv("sigmoid", 1), terms_per_example=1).compile("sgd", "binary_crossentropy")


def padded(steps=4):
    x = keras.Input((steps,), dtype="int32")
    return keras.Model(x, kl.Dense(1, "sigmoid", name="c")(kl.Embedding(5, 3, mask_zero=True)(x)))


WORDS, VOID = np.array([[1, 0, 0, 0], [2, 1, 3, 0]]), np.array([[[255, 1], [0, 255]]] * 3)
PIXELS = np.linspace(-1, 1, 48, dtype="float32").reshape(3, 4, 4, 1)


@pytest.mark.parametrize(
    ("make", "loss", "x", "y", "weight", "terms"),
    [
        (padded, "BinaryCrossentropy", WORDS, np.ones((2, 4, 1)), None, 2.0),
        (lambda: padded(None), "BinaryCrossentropy", WORDS, np.ones((2, 4, 1)), None, 2.0),
        (lambda: conv("softmax", 3, size=2), "SparseCategoricalCrossentropy", PIXELS[:, :2, :2], VOID, None, 2.0),
        (lambda: conv("sigmoid", 1), "BinaryCrossentropy", PIXELS, PIXELS > 0, np.full((3, 4, 4), 0.25), 4.0),
        (lambda: conv("sigmoid", 1), "BinaryCrossentropy", PIXELS, PIXELS > 0, np.full((3, 1, 1), 2.0), 2.0),
        (padded, "MeanSquaredError", WORDS, np.ones((2, 4, 1)), np.full((2, 4, 1), 3.0), 6.0),
    ],
    ids=["masked", "of open length", "void", "weighted", "weighted by image", "masked and weighted"],
)
def test_the_kl_is_divided_by_what_keras_divides_the_batch_by(make, loss, x, y, weight, terms):
    """Keras's own divisor is its summed loss over its mean."""
    arguments = {"ignore_class": 255} if loss.startswith("Sparse") else {}
    arguments["reduction"] = "sum_over_batch_size" if weight is None else "mean_with_sample_weight"
    mean = getattr(keras.losses, loss)(**arguments)
    total = getattr(keras.losses, loss)(**{**arguments, "reduction": "sum"})
    model = make()
    outputs = model(x)
    assert float(total(y, outputs, weight) / mean(y, outputs, weight)) == pytest.approx(terms * len(x), rel=1e-5)
    bnn = bayesian(model, full(model, keys=["c/kernel"]), num_train=10, beta=0.5)
    bnn.compile("sgd", mean)
    bnn.train_on_batch(x, y, sample_weight=weight)
    assert float(bnn.kl.weight) == pytest.approx(0.5 / (10 * terms), rel=1e-6)


def test_the_terms_of_all_batches_that_were_trained_on_count(tmp_path):
    bnn = bayesian(padded(), full(padded(), keys=["c/kernel"]), num_train=10)
    targets = np.ones((2, 4, 1))
    bnn.compile("sgd", "binary_crossentropy")
    assert float(bnn.kl.weight) == pytest.approx(1 / 40)  # before any batch: all steps
    bnn.evaluate(WORDS[:1], targets[:1], verbose=0)
    assert float(bnn.kl.weight) == pytest.approx(1 / 10)  # of that batch, and forgotten
    bnn.fit(WORDS, targets, batch_size=1, verbose=0)
    bnn.evaluate(WORDS[:1], targets[:1], verbose=0)
    assert float(bnn.kl.weight) == pytest.approx(1 / 20) and bnn.kl.terms == 2
    bnn.beta = 0.5
    assert float(bnn.kl.weight) == pytest.approx(0.5 / 20)
    bnn.save(tmp_path / "model.keras")
    loaded = keras.models.load_model(tmp_path / "model.keras")
    assert loaded.kl.terms == 2 and float(loaded.kl.weight) == pytest.approx(0.5 / 20)
    bnn.train_on_batch(np.zeros((1, 4)), targets[:1])
    assert bnn.kl.terms == pytest.approx(4 / 3)  # a batch of padding alone
    bnn.compile("sgd", "binary_crossentropy")
    assert bnn.kl.terms == 4


def test_right_terms_of_masked_outputs_do_not_warn_and_stay(recwarn):
    bnn = bayesian(padded(), full(padded(), keys=["c/kernel"]), num_train=10, terms_per_example=2)
    bnn.compile("sgd", "binary_crossentropy")
    bnn.train_on_batch(WORDS[1:], np.ones((1, 4, 1)))
    assert float(bnn.kl.weight) == pytest.approx(1 / 20) and not [w for w in recwarn if "terms_per" in str(w.message)]


def test_terms_of_two_masked_outputs_are_counted():
    x = keras.Input((4,), dtype="int32")
    y = kl.Embedding(5, 3, mask_zero=True)(x)
    model = keras.Model(x, {name: kl.Dense(1, "sigmoid", name=name)(y) for name in ("b", "a")})
    bnn = bayesian(model, full(model, keys=["a/kernel"]), num_train=10)
    bnn.compile("sgd", {"a": "mse", "b": "mse"})
    bnn.train_on_batch(WORDS, {name: np.ones((2, 4, 1)) for name in ("a", "b")})
    assert float(bnn.kl.weight) == pytest.approx(1 / 20)


def test_kl_reduction_mean_by_hand():
    """Each weight's KL is averaged over its entries and not divided by num_train."""
    model = keras.Sequential([keras.Input((2,)), kl.Dense(1, name="d")])
    model.set_weights([np.array([[0.5], [1.0]]), np.array([0.0])])
    bnn = bayesian(model, initial_scale=0.1, kl_reduction="mean", beta=2.0)
    bnn.compile("sgd", "mse")
    one = lambda mu: 0.5 * (mu**2 + 0.01 - 1) - np.log(0.1)  # noqa: E731
    expected = 2.0 * ((one(0.5) + one(1.0)) / 2 + one(0.0))
    np.testing.assert_allclose(sum(float(v) for v in bnn.losses), expected, rtol=1e-5)


# ---- batch norm ----


def normed(use_bias=True):
    keras.utils.set_random_seed(0)
    x = keras.Input((3,))
    y = kl.Dense(4, use_bias=use_bias, name="before")(x)
    y = kl.Activation("relu")(kl.BatchNormalization(name="norm")(y))
    return keras.Model(x, kl.Dense(1, activation="sigmoid", name="head")(y))


def weights_of(model):
    return full(model, keys={k for k in named_weights(model) if "norm" not in k})


def test_batch_norm_traps_are_refused():
    model = normed()
    assert biases_before_batch_norm(model) == ["before/bias"]
    for batch_norm in ("train", "statistics"):
        with pytest.raises(ValueError, match="before/bias"):
            bayesian(model, weights_of(model), batch_norm=batch_norm)
        free = normed(use_bias=False)
        bayesian(free, weights_of(free), batch_norm=batch_norm)
        for estimator in ("split", "flipout", "local"):
            with pytest.raises(ValueError, match=r"Expected no batch norm in training mode after .*'norm'"):
                bayesian(free, weights_of(free), batch_norm=batch_norm, estimator=estimator)
            bayesian(model, full(model, keys=["head/kernel"]), batch_norm=batch_norm, estimator=estimator)
        mixing = keras.Model(free.input, kl.Lambda(lambda t: t, name="any")(free.output))
        with pytest.raises(ValueError, match="'any' is not known to keep axis 0"):
            bayesian(mixing, weights_of(mixing), batch_norm=batch_norm, estimator="split")
    bayesian(model, weights_of(model), estimator="split")


def test_what_cannot_be_converted_is_refused_before_its_saliency_is_taken():
    bnn, (x, y) = bayesian(network()), data()
    bnn.compile("sgd", "binary_crossentropy")
    with pytest.raises(ValueError, match="Expected a deterministic network"):
        to_partial_bayes(bnn, num_train=16, r_bayes=0.1, data=(x, y))
    for other in (kl.Dense(3), "model.keras", keras.Sequential([kl.Dense(1)])):
        with pytest.raises(ValueError, match=r"Expected a built keras\.Model"):
            to_partial_bayes(other, num_train=16, r_bayes=0.1, data=(x, y))
    with pytest.raises(ValueError, match=r"Expected a keras\.Model. Received: None"):
        to_deterministic(None)


def test_batch_norm_within_a_wrapped_layer_is_refused_on_parts():
    """It would see the part of the batch that its draw sees, though no Bayesian weight comes before it."""
    x = keras.Input((5, 3))
    inner = keras.Sequential([keras.Input((3,)), kl.BatchNormalization(name="norm"), kl.Dense(2, name="d")])
    model = keras.Model(x, kl.TimeDistributed(inner, name="steps")(x))
    masks = full(model, keys=[key for key in named_weights(model) if key.endswith("d/kernel")])
    assert masks.num_bayesian == 6
    bayesian(model, masks, batch_norm="train")
    bayesian(model, masks, batch_norm="frozen", estimator="split")
    with pytest.raises(ValueError, match='batch_norm="frozen"'):
        bayesian(model, masks, batch_norm="train", estimator="split")


def test_a_frozen_layer_before_a_batch_norm_in_training_mode():
    model = normed()
    model.get_layer("before").trainable = False
    model.compile("sgd", "binary_crossentropy")
    bnn = to_partial_bayes(model, r_bayes=0.5, data=data(), num_train=16, batch_norm="train")
    assert bnn.num_bayesian == round(0.5 * 5)  # of the head's four and one


@pytest.mark.parametrize("batch_norm", ["frozen", "statistics", "train"])
def test_what_of_batch_norm_moves(batch_norm):
    model, (x, y) = normed(use_bias=False), data()
    bnn = bayesian(model, weights_of(model), batch_norm=batch_norm)
    bnn.compile(keras.optimizers.SGD(0.5), "binary_crossentropy")
    norm = bnn.network.get_layer("norm")
    read = lambda: [np.array(v) for v in (norm.moving_mean, norm.gamma)]  # noqa: E731
    before = read()
    bnn.fit(x + 1, y, epochs=2, verbose=0)
    moved = [not np.array_equal(a, b) for a, b in zip(before, read(), strict=True)]
    assert moved == {"frozen": [False, False], "statistics": [True, False], "train": [True, True]}[batch_norm]
    assert model.get_layer("norm").trainable


# ---- training ----


def test_frozen_batch_norm_stays_frozen_when_the_model_is_thawed():
    x = keras.Input((3,))
    model = keras.Model(x, kl.Dense(1, name="head")(kl.BatchNormalization()(x)))
    for kind in ("frozen", "statistics"):
        bnn = bayesian(model, full(model, keys=["head/kernel"]), batch_norm=kind)
        before = [v.path for v in bnn.trainable_variables]
        bnn.trainable = False
        assert not bnn.trainable_variables
        bnn.trainable = True
        assert [v.path for v in bnn.trainable_variables] == before


def test_scales_that_do_not_move_warn():
    x, y = data(64)
    bnn = bayesian(network(), num_samples=1)
    bnn.compile(keras.optimizers.SGD(1e-6), "binary_crossentropy")
    with pytest.warns(UserWarning, match="did not learn"):
        bnn.fit(x, y, batch_size=1, verbose=0)
    bnn.compile(LocScaleOptimizer(keras.optimizers.SGD(1e-6)), "binary_crossentropy")
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        bnn.fit(x, y, batch_size=1, verbose=0)


def test_loc_scale_optimizer_equals_the_two_alone():
    def variables():
        return keras.Variable([1.0, 2.0], name="kernel"), keras.Variable(
            [3.0], name="kernel_posterior_untransformed_scale"
        )

    together, alone = variables(), variables()
    both = LocScaleOptimizer(keras.optimizers.SGD(0.1, momentum=0.9), keras.optimizers.Adam(0.3))
    sgd, adam = keras.optimizers.SGD(0.1, momentum=0.9), keras.optimizers.Adam(0.3)
    for step in range(3):
        gradients = [keras.ops.array([1.0, -step]), keras.ops.array([0.5 + step])]
        both.apply(gradients, together)
        sgd.apply(gradients[:1], alone[:1])
        adam.apply(gradients[1:], alone[1:])
    for a, b in zip(together, alone, strict=True):
        np.testing.assert_array_equal(a, b)
    assert int(both.iterations) == 3
    both.learning_rate = 0.25
    assert float(both.loc_optimizer.learning_rate) == float(both.learning_rate) == 0.25
    again = LocScaleOptimizer.from_config(both.get_config())
    assert float(again.scale_optimizer.learning_rate) == pytest.approx(0.3)


@pytest.mark.parametrize("both", [keras.optimizers.SGD(0.1), keras.optimizers.Adam()])
def test_one_optimiser_for_both_is_refused(both):
    with pytest.raises(ValueError, match="Expected two optimisers"):
        LocScaleOptimizer(both, both)
    with pytest.raises(TypeError):
        LocScaleOptimizer("adam", learning_rate=0.1)


def test_moving_averages_become_the_weights_at_the_end_of_fit():
    x, y = data()
    bnn = bayesian(network(), num_samples=1)
    bnn.compile(LocScaleOptimizer(keras.optimizers.SGD(0.1, use_ema=True, ema_momentum=0.9)), "binary_crossentropy")
    bnn.fit(x, y, batch_size=4, verbose=0)
    averages = [v for v in bnn.optimizer.variables if "average" in v.path]
    locs = [v for v in bnn.trainable_variables if "untransformed" not in v.name]
    for average, loc in zip(averages, locs, strict=True):
        np.testing.assert_array_equal(average, loc)


class Watch(keras.callbacks.Callback):
    """Weights after each batch, and when validation begins."""

    def __init__(self):
        super().__init__()
        self.batches, self.tests = [], []

    def now(self):
        """Trainable weights."""
        return [np.array(v) for v in self.model.trainable_variables]

    def on_train_batch_end(self, batch, logs=None):
        """A step is done."""
        self.batches.append(self.now())

    def on_test_begin(self, logs=None):
        """The averages are swapped in."""
        self.tests.append(self.now())


@pytest.mark.parametrize(("averaged", "scaled"), [("both", True), ("locs", False), ("scales", True)])
def test_swap_ema_weights_validates_the_averages_and_gives_the_weights_back(averaged, scaled):
    """The averages by hand: Keras starts them at the first step's weights."""
    (x, y), bnn, watch = data(8), bayesian(network(), num_samples=1), Watch()
    ema = [averaged in ("both", "locs"), averaged in ("both", "scales")]
    pair = [
        keras.optimizers.SGD(rate, use_ema=use, ema_momentum=0.5) for rate, use in zip((0.5, 2.0), ema, strict=True)
    ]
    optimizer = LocScaleOptimizer(*pair)
    bnn.compile(keras.optimizers.LossScaleOptimizer(optimizer) if scaled else optimizer, "binary_crossentropy")
    swap = keras.callbacks.SwapEMAWeights()
    bnn.fit(x, y, batch_size=4, epochs=1, verbose=0, validation_data=(x, y), callbacks=[swap, watch])
    (first, second), (seen,) = watch.batches, watch.tests
    for variable, a, b, one in zip(bnn.trainable_variables, first, second, seen, strict=True):
        kept = ema[variable.name.endswith("untransformed_scale")]
        np.testing.assert_allclose(one, (a + b) / 2 if kept else b, rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(variable, one, rtol=1e-5, atol=1e-6)  # fit ends with the averages


def test_swap_ema_weights_says_where_nothing_keeps_averages():
    x, y = data(8)
    bnn = bayesian(network(), num_samples=1)
    bnn.compile(LocScaleOptimizer("sgd"), "binary_crossentropy")
    with pytest.raises(ValueError, match="use_ema=True"):
        bnn.fit(x, y, verbose=0, validation_data=(x, y), callbacks=[keras.callbacks.SwapEMAWeights()])


@pytest.mark.parametrize("scaled", [False, True])
def test_keras_s_callbacks_reach_the_locs_rate_and_restore_both_optimisers(scaled, tmp_path):
    x, y = data(8)
    models = []
    for _ in range(2):  # the second finds the backup of two epochs, and has nothing left to do
        bnn = bayesian(network(), num_samples=1)
        optimizer = LocScaleOptimizer(keras.optimizers.Adam(0.4), keras.optimizers.Adam(0.3))
        bnn.compile(keras.optimizers.LossScaleOptimizer(optimizer) if scaled else optimizer, "binary_crossentropy")
        halve = keras.callbacks.LearningRateScheduler(lambda epoch, rate: rate / 2)
        plateau = keras.callbacks.ReduceLROnPlateau(monitor="loss", mode="max", min_delta=1e9, factor=0.5, patience=1)
        backup = keras.callbacks.BackupAndRestore(tmp_path / "backup", delete_checkpoint=False)
        bnn.fit(x, y, epochs=2, verbose=0, callbacks=[halve, plateau, backup])
        models.append((bnn, optimizer))
    (first, one), (second, two) = models
    assert float(one.learning_rate) == pytest.approx(0.4 / 8) and float(
        one.scale_optimizer.learning_rate
    ) == pytest.approx(0.3)
    assert int(one.iterations) == int(two.iterations) == 2
    for a, b in zip([*first.weights, *one.variables], [*second.weights, *two.variables], strict=True):
        np.testing.assert_array_equal(a, b)


def test_weight_decay_leaves_the_scales_alone():
    bnn = bayesian(network(), beta=0.0)
    bnn.compile(keras.optimizers.SGD(0.1, weight_decay=0.5), "binary_crossentropy")
    before, locs = bnn.scales(), np.array(bnn.network.get_layer("head").kernel)
    zero = [np.zeros(v.shape, "float32") for v in bnn.trainable_variables]
    bnn.optimizer.apply([keras.ops.convert_to_tensor(g) for g in zero], bnn.trainable_variables)
    np.testing.assert_array_equal(bnn.scales(), before)
    np.testing.assert_allclose(bnn.network.get_layer("head").kernel, locs * (1 - 0.1 * 0.5), rtol=1e-5)


def test_beta_schedule_needs_a_beta():
    model, (x, y) = network(), data()
    model.compile("sgd", "binary_crossentropy")
    with pytest.raises(ValueError, match="PartialBayes"):
        model.fit(x, y, callbacks=[BetaSchedule(1, 0, 2)], verbose=0)
    assert BetaSchedule(0.2, 0.01, 1).at(0) == 0.01


def test_beta_schedule_and_the_kl_in_nats_per_example():
    seen = []
    x, y = data()
    bnn = bayesian(network(), beta=1.0)
    bnn.compile(keras.optimizers.SGD(0.0), "binary_crossentropy", metrics=["accuracy"])
    look = keras.callbacks.LambdaCallback(
        on_epoch_end=lambda epoch, logs: seen.append((bnn.beta, float(bnn.kl.weight)))
    )
    callbacks = [BetaSchedule(0.2, 0.01, 3), look]
    history = bnn.fit(x, y, epochs=3, validation_data=(x, y), callbacks=callbacks, verbose=0).history
    np.testing.assert_allclose([b for b, _ in seen], [0.2, 0.105, 0.01])
    np.testing.assert_allclose([w * 16 for _, w in seen], [0.2, 0.105, 0.01], rtol=1e-5)
    np.testing.assert_allclose(history["kl"], float(bnn.kl_divergence()) / 16, rtol=1e-5)
    assert {"loss", "accuracy", "val_loss", "val_accuracy", "val_kl"} <= set(history)


def test_masks_of_saliency_train():
    model, (x, y) = network(), data()
    masks = top_k(saliency(model, (x, y), "binary_crossentropy", verbose=False), 0.3)
    bnn = bayesian(model, masks)
    assert bnn.num_bayesian == masks.num_bayesian == round(0.3 * model.count_params())
    bnn.compile(LocScaleOptimizer(), "binary_crossentropy")
    losses = bnn.fit(x, y, epochs=20, verbose=0).history["loss"]
    assert losses[-1] < losses[0]


# ---- predictions ----


def test_losses_of_calls_are_averaged_over_the_samples():
    x = keras.Input((3,))
    plain = keras.Model(x, kl.Dense(2, activity_regularizer="l2", kernel_regularizer="l2", name="d")(x))
    bnn = bayesian(plain, initial_scale=1e-8, beta=0.0, num_samples=4)
    for model in (plain, bnn):
        model.compile("sgd", "mse")
    inputs, targets = data()[0], np.zeros((16, 2))
    expected = plain.evaluate(inputs, targets, verbose=0)
    assert bnn.train_on_batch(inputs, targets)[0] == pytest.approx(expected, rel=1e-5)


class MeanSquare(kl.Layer):
    """Adds the mean square of its inputs to the loss."""

    def call(self, inputs):
        self.add_loss(keras.ops.mean(inputs**2))
        return inputs


@pytest.mark.parametrize(("estimator", "num_samples", "size"), [("all", 3, 7), ("split", 3, 7), ("split", 4, 2)])
def test_losses_of_parts_count_by_their_share_of_the_batch(estimator, num_samples, size):
    """As in the stock model; a part that is empty counts nothing."""
    x = keras.Input((3,))
    y = MeanSquare()(kl.Dense(2, activity_regularizer="l2", name="d")(x))
    plain = keras.Model(x, kl.Lambda(lambda t: t)(y))  # may mix the batch: "split" calls once a part
    masks = {"d/kernel": np.ones((3, 2), bool)}
    bnn = bayesian(plain, masks, initial_scale=1e-8, beta=0.0, num_samples=num_samples, estimator=estimator)
    inputs, targets = data(size)[0], np.zeros((size, 2))
    for model in (plain, bnn):
        model.compile(keras.optimizers.SGD(0.0), "mse")
    expected = plain.evaluate(inputs, targets, verbose=0)
    assert bnn.train_on_batch(inputs, targets)[0] == pytest.approx(expected, rel=1e-5)
    assert bnn.fit(inputs, targets, verbose=0).history["loss"][0] == pytest.approx(expected, rel=1e-5)
    assert float(bnn.compute_loss(inputs, targets, bnn(inputs, training=True))) == pytest.approx(expected, rel=1e-5)


def test_another_models_call_in_between_changes_no_loss():
    x = keras.Input((3,))
    model = keras.Model(x, kl.Dense(2, activity_regularizer="l2", name="d")(x))
    first, second = (bayesian(model, initial_scale=1e-8, beta=0.0, num_samples=number) for number in (4, 1))
    for bnn in (model, first, second):
        bnn.compile("sgd", "mse")
    inputs, targets = data()[0], np.zeros((16, 2))
    outputs = first(inputs, training=True)
    second(inputs, training=True)
    expected = model.evaluate(inputs, targets, verbose=0)
    assert float(first.compute_loss(inputs, targets, outputs)) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize(
    ("policy", "estimator"), [("mixed_float16", "split"), ("mixed_bfloat16", "all"), ("float64", "split")]
)
def test_other_precisions_train_and_predict(policy, estimator):
    with_policy, (x, y) = keras.config.dtype_policy(), data()
    keras.config.set_dtype_policy(policy)
    try:
        model = network()
    finally:
        keras.config.set_dtype_policy(with_policy)
    model.get_layer("head").bias.assign([20.0])  # sure: 1 - p underflows in half precision
    bnn = bayesian(model, estimator=estimator, num_samples=2)
    bnn.compile("sgd", "binary_crossentropy")
    assert np.isfinite(bnn.fit(x, y, verbose=0).history["loss"]).all()
    wide = "float64" if policy == "float64" else "float32"
    for part in bnn.predict_uncertainty(x).values():
        assert part.dtype == wide and np.isfinite(part).all()
    assert type(bnn.optimizer).__name__ == ("LossScaleOptimizer" if policy == "mixed_float16" else "SGD")


@pytest.mark.parametrize("kind", ["samples", "uncertainty"])
def test_a_long_prediction_slice_by_slice_equals_keras_predict(kind, capsys, monkeypatch):
    monkeypatch.setattr(sampler, "SLICE", 7)  # four batches of 2
    model, x = network(), np.random.default_rng(0).normal(size=(21, 3)).astype("float32")
    ours, keras_own = (bayesian(model, num_samples=2, seed=3) for _ in range(2))
    if kind == "samples":
        found = {"samples": ours.predict_samples(x, batch_size=2, verbose=1)}
        expected = {"samples": np.moveaxis(keras_own._sampler(kind, 2).predict(x, batch_size=2, verbose=0), 1, 0)}
    else:
        found = ours.predict_uncertainty(x, batch_size=2, verbose=1)
        expected = keras_own._sampler(kind, 2).predict(x, batch_size=2, verbose=0)
    assert "21/21" in capsys.readouterr().out
    for key, values in expected.items():
        np.testing.assert_array_equal(found[key], values)


def test_a_training_step_is_traced_once():
    # TensorFlow keeps the graph of every step that was ever traced; plain Keras traces two where the optimiser is new
    bnn, (x, y), calls = bayesian(network(), num_samples=2), data(), []
    bnn.compile(LocScaleOptimizer("adam"), "binary_crossentropy", metrics=[keras.metrics.BinaryAccuracy()])
    original = bnn.train_step
    bnn.train_step = lambda *args: calls.append(1) or original(*args)
    bnn.fit(x, y, verbose=0)
    assert len(calls) == 1


def test_sure_logits_stay_finite_and_right():
    model, (x, _) = network(activation=None), data()
    model.get_layer("head").bias.assign([40.0])
    bnn = bayesian(model, from_logits=True, probabilities="sigmoid", initial_scale=1e-8)
    np.testing.assert_allclose(bnn.predict(x, verbose=0), model.predict(x, verbose=0), rtol=1e-5)


def test_mean_logit_against_scipy():
    bnn = bayesian(network(activation=None), from_logits=True, probabilities="sigmoid")
    logits = np.random.default_rng(0).normal(size=(3, 16, 1)).astype("float32")
    expected = special.logit(special.expit(logits.astype("float64")).mean(axis=0))
    bnn.num_samples = 3
    state = [bnn.outputs_of_samples.to_average(sample) for sample in logits]
    mean = bnn.outputs_of_samples.averaged(functools.reduce(bnn.outputs_of_samples.plus, state), logits[0], len(logits))
    np.testing.assert_allclose(mean, expected, atol=1e-5)


def test_dict_outputs_keep_their_names():
    x = keras.Input((3,))
    z = kl.Dense(3, name="d")(x)
    model = keras.Model(x, {"b": kl.Softmax()(z), "a": kl.Activation("sigmoid")(z)})
    bnn = bayesian(model, terms_per_example=1)
    found = bnn.predict_uncertainty(data()[0])
    assert found["a"]["total_entropy"].shape == (16, 3) and found["b"]["total_entropy"].shape == (16,)
    assert set(bnn.predict(data()[0], verbose=0)) == {"a", "b"}


def test_an_output_called_samples_is_an_output():
    x = keras.Input((3,))
    model = keras.Model(x, {"samples": kl.Dense(1, "sigmoid", name="d")(x)})
    inputs, targets = data()
    bnn = bayesian(model, initial_scale=1e-8, beta=0.0, num_samples=2)
    for one in (model, bnn):
        one.compile(keras.optimizers.SGD(0.0), "binary_crossentropy", metrics=["accuracy"])
    expected = model.evaluate(inputs, {"samples": targets}, verbose=0, return_dict=True)
    assert bnn.predict(inputs, verbose=0)["samples"].shape == (16, 1)
    for found in (
        bnn.evaluate(inputs, {"samples": targets}, verbose=0, return_dict=True),
        bnn.train_on_batch(inputs, {"samples": targets}, return_dict=True),
    ):
        assert {key: found[key] for key in expected} == pytest.approx(expected, rel=1e-5)


def test_the_kind_of_each_head_of_a_nested_model():
    x, z = keras.Input((3,)), keras.Input((3,))
    heads = [kl.Dense(2, "sigmoid", name="s")(z), kl.Dense(3, "softmax", name="c")(z)]
    bnn = bayesian(keras.Model(x, keras.Model(z, heads, name="heads")(x)), terms_per_example=1)
    assert bnn.probabilities == ["sigmoid", "softmax"]


@pytest.mark.parametrize("last", ["operation", "layer", "given", "loss"])
def test_the_entropy_is_over_the_axis_of_the_classes(last, tmp_path):
    """SciPy's entropy of the mean over three classes on axis 1."""
    x = keras.Input((3,))
    z = kl.Reshape((3, 4))(kl.Dense(12, name="d")(x))
    finish = {"operation": lambda t: keras.ops.softmax(t, axis=1), "layer": kl.Softmax(axis=1)}.get(last)
    logits = {"from_logits": True, "probabilities": "softmax"} if finish is None else {}
    options = {**logits, "initial_scale": 0.5, **({"class_axis": 1} if last == "given" else {})}
    bnn = bayesian(keras.Model(x, finish(z) if finish else z), **options)
    bnn.compile("sgd", keras.losses.CategoricalCrossentropy(axis=-1 if last == "given" else 1, from_logits=not finish))
    bnn.save(tmp_path / "model.keras")
    for model in (bnn, keras.models.load_model(tmp_path / "model.keras")):
        parts = model.predict_uncertainty(data()[0])
        np.testing.assert_allclose(parts["mean"].sum(1), 1, rtol=1e-5)
        np.testing.assert_allclose(parts["total_entropy"], stats.entropy(parts["mean"], axis=1), rtol=1e-4)
        assert parts["total_entropy"].shape == (16, 4) and parts["mutual_information"].max() > 0.01
    if not finish:  # the logit of the mean probability is one of a softmax over axis 1
        np.testing.assert_allclose(special.logsumexp(bnn.predict(data()[0], verbose=0), axis=1), 0, atol=1e-5)


@pytest.mark.parametrize("axis", [0, -3, 3.0, True])
def test_a_class_axis_that_is_none(axis):
    x = keras.Input((3, 2))
    with pytest.raises(ValueError, match="class_axis"):
        bayesian(keras.Model(x, kl.Dense(3, "softmax", name="d")(x)), class_axis=axis)


class Scaled(kl.Dense):
    """A Dense of its own kind, which is wrapped."""

    def call(self, inputs):
        """The Dense of twice the inputs."""
        return super().call(2.0 * inputs)


@pytest.mark.parametrize("kind", ["softmax", "sigmoid"])
def test_the_kind_of_a_wrapped_last_layer_is_the_original_s(kind):
    x = keras.Input((3,))
    bnn = bayesian(keras.Model(x, Scaled(3, kind, name="own")(x)), terms_per_example=1)
    assert bnn.probabilities == kind
    assert bnn.predict_uncertainty(data()[0])["total_entropy"].shape == ((16,) if kind == "softmax" else (16, 3))
    gated = bayesian(keras.Model(*(lambda t: (t, kl.LSTM(2, activation=kind, name="d")(t)))(keras.Input((4, 3)))))
    assert gated.probabilities is None  # an output gate times the activation is no probability


def test_more_samples_after_a_prediction_are_more_samples():
    x, _ = data()
    bnn = bayesian(network(), initial_scale=1.0, num_samples=1)
    few = np.std([bnn.predict(x, verbose=0) for _ in range(20)], axis=0).mean()
    bnn.num_samples = 100
    many = np.std([bnn.predict(x, verbose=0) for _ in range(20)], axis=0).mean()
    assert many < few / 5  # a tenth, within the error of 20 draws


def test_points_again_after_set_mask():
    x, _ = data()
    bnn = bayesian(network(), initial_scale=1.0)
    assert bnn.predict_samples(x).std(axis=0).max() > 0
    for layer in layers.masked_layers(bnn.network):
        layer.set_mask({"kernel": np.zeros(layer.kernel.shape, bool)})
    bnn.compile("sgd", "binary_crossentropy")
    assert np.ptp(bnn.predict_samples(x), axis=0).max() == 0


def test_predict_is_the_mean_of_samples():
    model, (x, _) = network(), data()
    bnn = bayesian(model, initial_scale=0.5, num_samples=5)
    samples = bnn.predict_samples(x, num_samples=50)
    assert samples.shape == (50, 16, 1) and samples.min() >= 0 and samples.max() <= 1
    assert samples.std(axis=0).min() > 1e-3
    means = np.mean([bnn.predict(x, verbose=0) for _ in range(20)], axis=0)
    np.testing.assert_allclose(means, samples.mean(axis=0), atol=0.12)
    assert bnn.predict(x, verbose=0).shape == (16, 1)
    assert bnn.predict_samples(x, batch_size=4).shape == (5, 16, 1)
    with pytest.raises(ValueError, match="num_samples"):
        bnn.predict_samples(x, num_samples=0)


@pytest.mark.parametrize(("activation", "outputs"), [("sigmoid", 2), ("softmax", 3)])
def test_uncertainty_splits_in_two(activation, outputs):
    x, _ = data()
    bnn = bayesian(network(activation, outputs=outputs), initial_scale=1.0, num_samples=8)
    parts = bnn.predict_uncertainty(x)
    assert parts["mean"].shape == (16, outputs)
    np.testing.assert_allclose(
        parts["total_entropy"], parts["expected_entropy"] + parts["mutual_information"], atol=1e-5
    )
    np.testing.assert_allclose(parts["total_entropy"], entropy(parts["mean"], activation), atol=1e-5)
    assert parts["mutual_information"].shape == ((16, 2) if activation == "sigmoid" else (16,))
    assert (parts["mutual_information"] >= 0).all() and parts["mutual_information"].max() > 1e-3


@pytest.mark.parametrize(
    ("two", "expected"), [((-40.0, 40.0), (np.log(2), 0, np.log(2))), ((0, 0), (np.log(2),) * 2 + (0,))]
)
def test_uncertainty_by_hand(monkeypatch, two, expected):
    """Samples that say 0 and 1: all epistemic. Samples that both say 0.5: all aleatoric."""
    calls = iter(two * 20)
    monkeypatch.setattr(
        noise, "standard_normal", lambda n, g, dtype="float32": keras.ops.full((n,), next(calls), dtype)
    )
    model = keras.Sequential([keras.Input((1,)), kl.Dense(1, "sigmoid", use_bias=False, name="d")])
    model.set_weights([np.zeros((1, 1))])
    bnn = bayesian(model, initial_scale=1.0, num_samples=2)
    parts = bnn.predict_uncertainty(np.ones((1, 1), "float32"))
    names = ("total_entropy", "expected_entropy", "mutual_information")
    np.testing.assert_allclose([parts[n].item() for n in names], expected, atol=1e-5)
    assert parts["mean"].item() == pytest.approx(0.5)


def test_regression_has_no_entropy():
    with pytest.raises(ValueError, match="probabilities"):
        bayesian(network("linear")).predict_uncertainty(data()[0])


@pytest.mark.parametrize(("kind", "outputs"), [("sigmoid", 1), ("softmax", 3)])
def test_from_logits(kind, outputs):
    x, _ = data()
    with pytest.raises(ValueError, match="from_logits"):
        bayesian(network("linear"), from_logits=True)
    model = network("linear", outputs=outputs)
    bnn = bayesian(model, from_logits=True, probabilities=kind, initial_scale=1e-6)
    np.testing.assert_allclose(
        getattr(keras.ops, kind)(bnn.predict(x, verbose=0)), getattr(keras.ops, kind)(model(x)), atol=1e-4
    )
    samples = bnn.predict_samples(x)
    np.testing.assert_allclose(samples[0], getattr(keras.ops, kind)(model(x)), atol=1e-4)
    np.testing.assert_allclose(bnn.predict_uncertainty(x)["mean"], samples[0], atol=1e-4)


# ---- saving ----

READ = """
import sys, numpy as np
import sbn_tf
from sbn_tf.core.conversion import to_deterministic
from sbn_tf.layers import posterior_mean
bnn = sbn_tf.load(sys.argv[1] + "/bnn.keras")
x = np.load(sys.argv[1] + "/x.npy")
with posterior_mean():
    mean = np.array(bnn.network(x))
state = np.concatenate([np.ravel(v) for v in bnn.optimizer.variables])
np.savez(sys.argv[1] + "/read.npz", mean=mean, beta=bnn.beta, kl_weight=np.array(bnn.kl.weight),
         state=state, scales=bnn.scales(), samples=bnn.predict(x, verbose=0))
"""


def test_it_loads_in_a_new_process_and_trains_on(tmp_path):
    model, (x, y) = network(), data()
    masks = top_k(saliency(model, (x, y), "binary_crossentropy", score="magnitude"), 0.5)
    bnn = bayesian(model, masks, beta=0.3, num_samples=2, estimator="split")
    bnn.compile(LocScaleOptimizer(keras.optimizers.Adam(0.01)), "binary_crossentropy")
    bnn.fit(x, y, verbose=0)
    bnn.save(tmp_path / "bnn.keras")
    np.save(tmp_path / "x.npy", x)
    subprocess.run([sys.executable, "-c", READ, str(tmp_path)], check=True, timeout=120)
    read = np.load(tmp_path / "read.npz")
    with layers.posterior_mean():
        np.testing.assert_allclose(read["mean"], bnn.network(x), rtol=1e-6)
    state = np.concatenate([np.ravel(v) for v in bnn.optimizer.variables])
    np.testing.assert_array_equal(read["state"], state)
    np.testing.assert_array_equal(read["scales"], bnn.scales())
    assert read["beta"] == 0.3 and read["kl_weight"] == pytest.approx(0.3 / 16)
    assert read["samples"].shape == (16, 1)
    again = keras.models.load_model(tmp_path / "bnn.keras")
    assert isinstance(again, PartialBayes) and again.estimator == "split"
    first = int(again.optimizer.iterations)
    again.fit(x, y, verbose=0)
    assert first == 1 and int(again.optimizer.iterations) == 2


def test_frozen_weights_stay_frozen_after_loading(tmp_path):
    model, (x, y) = network(), data()
    model.get_layer("hidden").kernel.trainable = False
    bnn = bayesian(model, full(network(), keys=["head/kernel"]))
    bnn.compile("adam", "binary_crossentropy")
    bnn.fit(x, y, verbose=0)
    bnn.save(tmp_path / "bnn.keras")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        again = keras.models.load_model(tmp_path / "bnn.keras")
    assert [v.path for v in again.trainable_variables] == [v.path for v in bnn.trainable_variables]
    for a, b in zip(bnn.optimizer.variables, again.optimizer.variables, strict=True):
        np.testing.assert_array_equal(a, b)


def test_beta_is_no_state_of_a_weights_file(tmp_path):
    x, y = data()
    first, second = (bayesian(network(), beta=beta, num_samples=1) for beta in (0.01, 1.0))
    for bnn in (first, second):
        bnn.compile("sgd", "binary_crossentropy")
    first.save_weights(tmp_path / "a.weights.h5")
    second.load_weights(tmp_path / "a.weights.h5")
    assert second.beta == 1.0 and float(second.kl.weight) == pytest.approx(1 / 16)
    stop = keras.callbacks.EarlyStopping("kl", patience=0, mode="max", restore_best_weights=True)
    second.fit(x, y, epochs=3, verbose=0, callbacks=[BetaSchedule(0.5, 0.1, 3), stop])
    assert float(second.kl.weight) == pytest.approx(second.beta / 16)
    second.save(tmp_path / "b.keras")
    again = keras.models.load_model(tmp_path / "b.keras", compile=False)
    assert float(again.kl.weight) == float(second.kl.weight)


def test_a_stock_checkpoint_loads_into_the_whole_model(tmp_path):
    model, (x, _) = network(), data()
    model.save_weights(tmp_path / "stock.weights.h5")
    model.load_weights(tmp_path / "stock.weights.h5")
    bnn = bayesian(network(), initial_scale=1e-8)
    bnn.network.get_layer("head").kernel.assign(np.zeros((4, 1)))
    bnn.load_weights(tmp_path / "stock.weights.h5")
    np.testing.assert_allclose(bnn.predict(x, verbose=0), model.predict(x, verbose=0), atol=1e-6)


def test_exported_model_serves_the_predictive_mean(tmp_path):
    model, (x, _) = network(), data()
    bnn = bayesian(model, initial_scale=1e-8)
    bnn.export(tmp_path / "served", verbose=False)
    served = tf.saved_model.load(tmp_path / "served")
    np.testing.assert_allclose(served.serve(x), model.predict(x, verbose=0), atol=1e-6)


def test_the_copy_of_a_compiled_model_holds_no_optimiser(tmp_path):
    def loss(y, y_pred):  # known here alone: a compiled copy would have to look it up by its name
        return keras.ops.mean((y - y_pred) ** 2)

    model, (x, y) = network(), data()
    optimizer = keras.optimizers.Adam(0.01)
    model.compile(optimizer, loss)
    model.fit(x, y, verbose=0)
    bnn = bayesian(model, num_samples=1)
    assert not bnn.network.compiled and getattr(bnn.network, "optimizer", None) is None
    assert model.compiled and model.optimizer is optimizer
    bnn.compile("adam", "binary_crossentropy")
    bnn.fit(x, y, verbose=0)
    bnn.save(tmp_path / "bnn.keras")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        keras.models.load_model(tmp_path / "bnn.keras")


def test_stock_weights_load_into_the_network(tmp_path):
    model, (x, _) = network(), data()
    model.save_weights(tmp_path / "stock.weights.h5")
    bnn = bayesian(network(), initial_scale=1e-8)
    for layer in layers.masked_layers(bnn.network):
        layer.kernel.assign(keras.ops.zeros_like(layer.kernel))
    bnn.network.load_weights(tmp_path / "stock.weights.h5")
    np.testing.assert_allclose(bnn.predict(x, verbose=0), model.predict(x, verbose=0), atol=1e-6)


# ---- estimators in one call ----


def imaging(norm=False):
    """Two convolutions and a dense layer; images of 4 x 4."""
    keras.utils.set_random_seed(0)
    x = keras.Input((4, 4, 1))
    y = kl.Conv2D(3, 3, padding="same", name="first")(x)
    y = kl.BatchNormalization(name="norm")(y) if norm else y
    y = kl.Conv2D(3, 3, padding="same", activation="relu", name="second")(y)
    return keras.Model(x, kl.Dense(2, activation="softmax", name="head")(kl.Flatten()(y)))


def images(n=10):
    rng = np.random.default_rng(0)
    return rng.normal(size=(n, 4, 4, 1)).astype("float32"), rng.integers(0, 2, n)


def test_split_in_one_call_equals_calls_on_its_parts():
    size = 7  # parts of 3, 2 and 2
    x, y = images(size)
    steps = []
    for whole in (True, False):
        model = imaging()
        if not whole:  # an operation that may mix the batch
            model = keras.Model(model.input, kl.Lambda(lambda t: t)(model.output))
        bnn = bayesian(model, num_samples=3, initial_scale=0.3, estimator="split", probabilities="softmax")
        bnn.compile(keras.optimizers.SGD(0.1), "sparse_categorical_crossentropy", metrics=["accuracy"])
        logs = [bnn.train_on_batch(x, y, sample_weight=np.arange(size), return_dict=True) for _ in range(2)]
        steps.append([*(log[key] for log in logs for key in ("loss", "accuracy", "kl")), *numbers(bnn.network)])
    for a, b in zip(*steps, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("estimator", ["all", "split", "flipout"])
def test_a_step_computes_each_scale_once(estimator):
    """The draws and the KL share one softplus a weight; the eager step, which computes each again, gives the same."""
    x, y = data()
    options = {"num_samples": 4, "initial_scale": 0.3, "estimator": estimator}
    counted, *trained = (bayesian(network(), **options) for _ in range(3))
    for bnn, eagerly in zip((counted, *trained), (False, False, True), strict=True):
        bnn.compile(keras.optimizers.SGD(0.1), "binary_crossentropy", run_eagerly=eagerly)
    graph = tf.function(counted.train_step).get_concrete_function((x, y)).graph
    kinds = [operation.type for operation in graph.get_operations()]
    assert kinds.count("Softplus") == 4 == len(named_weights(network()))
    for bnn in trained:
        bnn.train_on_batch(x, y)
    for compiled, eager in zip(*(bnn.trainable_variables for bnn in trained), strict=True):
        np.testing.assert_allclose(compiled, eager, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("estimator", ["split", "flipout", "local"])
def test_one_call_with_vanishing_scales_is_a_deterministic_step(estimator):
    """Loss, metric, class weights, batch norm before the first draw, regularizers: as in stock Keras."""
    x, y = images()
    options = {"loss": "sparse_categorical_crossentropy", "metrics": ["accuracy"]}
    model = imaging(norm=True)
    model.get_layer("head").kernel_regularizer = None
    model.get_layer("second").activity_regularizer = keras.regularizers.L2(0.1)
    masks = full(model, keys={"second/kernel", "head/kernel"})
    bnn = bayesian(model, masks, estimator=estimator, initial_scale=1e-8, beta=0.0, batch_norm="train")
    bnn.compile(keras.optimizers.SGD(0.1), **options)
    model.compile(keras.optimizers.SGD(0.1), **options)
    for _ in range(2):
        found = bnn.train_on_batch(x, y, class_weight={0: 1.0, 1: 3.0}, return_dict=True)
        expected = model.train_on_batch(x, y, class_weight={0: 1.0, 1: 3.0}, return_dict=True)
        np.testing.assert_allclose([found["loss"], found["accuracy"]], [*expected.values()][::-1], rtol=1e-4)
    stock = {key: weight.variable for key, weight in named_weights(model).items()}
    for key, weight in named_weights(bnn.network).items():
        if key in stock:
            np.testing.assert_allclose(weight.variable, stock[key], rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("estimator", ["all", "split", "flipout", "local"])
def test_estimators_against_the_closed_form(estimator):
    """Squared loss of a linear network: E (x (mu + sigma eps) - t)^2 = (x mu - t)^2 + x^2 sigma^2."""
    rng, scale = np.random.default_rng(0), 0.5
    x, t = rng.normal(size=(12, 3)).astype("float32"), rng.normal(size=(12, 1)).astype("float32")
    model = keras.Sequential([keras.Input((3,)), kl.Dense(1, use_bias=False, name="d")])
    bnn = bayesian(model, num_samples=4, initial_scale=scale, estimator=estimator, beta=0.0)
    bnn.compile(keras.optimizers.SGD(0.0), "mse")
    expected = np.mean((x @ np.array(model.layers[0].kernel) - t) ** 2 + scale**2 * np.sum(x**2, 1, keepdims=True))
    step = tf.function(lambda: bnn.compute_loss(x, t, bnn(x, training=True)))
    losses = np.array([step() for _ in range(400)])
    assert abs(losses.mean() - expected) < 4 * losses.std() / np.sqrt(len(losses))


def test_flipout_is_refused_where_the_batch_may_be_mixed():
    model = imaging()
    model = keras.Model(model.input, kl.Lambda(lambda t: t, name="any")(model.output))
    for estimator in ("flipout", "local"):
        with pytest.raises(ValueError, match="'any', which is not known to"):
            bayesian(model, estimator=estimator)


# ---- one call, and serving ----


def test_one_call_from_a_trained_model(capsys):
    model, (x, y) = network(), data()
    model.compile("sgd", "binary_crossentropy")
    bnn = to_partial_bayes(model, r_bayes=0.25, data=(x, y), num_train=16)
    assert "saliency" in capsys.readouterr().err
    to_partial_bayes(model, r_bayes=0.25, data=(x, y), num_train=16, verbose=False)
    assert "saliency" not in capsys.readouterr().err
    expected = top_k(saliency(model, (x, y), "binary_crossentropy", verbose=False), 0.25)
    found = {w.key: w.layer.mask(w.name) for w in named_weights(bnn.network).values() if w.key in expected}
    for key, mask in expected.items():
        np.testing.assert_array_equal(found[key], mask)
    assert bnn.num_bayesian == round(0.25 * model.count_params())
    named = to_partial_bayes(model, r_bayes=0.25, data=tf.data.Dataset.from_tensors((x, y)), loss="mse", num_train=16)
    assert named.num_bayesian == bnn.num_bayesian


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "Expected masks, or r_bayes and data"),
        ({"masks": {}, "r_bayes": 0.1}, "Expected masks, or r_bayes and data"),
        ({"r_bayes": 0.1}, "Received: no data"),
        ({"r_bayes": 0.1, "data": data()}, "the model is not compiled"),
    ],
)
def test_one_call_says_what_is_missing(options, message):
    with pytest.raises(ValueError, match=message):
        to_partial_bayes(network(), num_train=16, **options)


def two_heads():
    x = keras.Input((3,))
    y = kl.Dense(4, name="hidden")(x)
    one, three = kl.Dense(1, "sigmoid", name="one")(y), kl.Dense(3, "softmax", name="three")(y)
    return keras.Model(x, {"lesion": one, "grade": three})


def one_head_twice():
    x = keras.Input((3,))
    first, second, head = kl.Dense(4, name="a")(x), kl.Dense(4, name="b")(x), kl.Dense(1, "sigmoid", name="head")
    return keras.Model(x, [head(first), head(second)])


@pytest.mark.parametrize("make", [network, two_heads, one_head_twice])
def test_exported_uncertainty_is_that_of_python(make, tmp_path):
    x = data()[0]
    bnn = bayesian(make(), initial_scale=0.3, terms_per_example=1)
    bnn.predict(x, verbose=0)  # the seeds have moved on
    bnn.export(tmp_path / "served", verbose=False, outputs="uncertainty")
    served = [tf.saved_model.load(tmp_path / "served") for _ in range(2)]
    first, second = served[0].serve(x), served[0].serve(x)
    here = [bnn.predict_uncertainty(x) for _ in range(2)]
    if make is one_head_twice:
        here = [dict(zip(("head", "head_1"), found, strict=True)) for found in here]
    if make is not network:
        here = [{f"{name}_{key}": a[name][key] for name in a for key in a[name]} for a in here]
    assert set(first) == set(here[0])
    for one, other in ((first, here[0]), (second, here[1]), (served[1].serve(x), first)):
        keras.tree.map_structure(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), one, other)
    flat = [np.array(keras.tree.flatten(one)[0]) for one in (first, second)]
    assert not np.allclose(*flat)


def test_export_says_what_it_cannot(tmp_path):
    with pytest.raises(ValueError, match="Expected outputs to be one of"):
        bayesian(network()).export(tmp_path / "served", outputs="samples")
    with pytest.raises(ValueError, match="Expected outputs that are probabilities"):
        bayesian(network(activation=None)).export(tmp_path / "served", outputs="uncertainty")


@pytest.mark.parametrize(("estimator", "from_logits"), [("all", False), ("split", True), ("flipout", False)])
def test_masked_outputs_are_left_out_of_evaluate_and_of_metrics(estimator, from_logits):
    x = keras.Input((4,), dtype="int32")
    y = kl.Embedding(5, 3, mask_zero=True)(x)
    model = keras.Model(x, kl.Dense(1, None if from_logits else "sigmoid", name="d")(y))
    words, targets = np.array([[1, 2, 0, 0], [3, 0, 0, 0], [1, 1, 2, 4]] * 2), np.arange(24).reshape(6, 4, 1) % 2
    options = {"beta": 0.0, "initial_scale": 1e-7, "num_samples": 3, "estimator": estimator}
    options |= {"probabilities": "sigmoid", "from_logits": from_logits}
    bnn = bayesian(model, {"d/kernel": np.ones((3, 1), bool)}, **options)
    for one in (model, bnn):
        loss = keras.losses.BinaryCrossentropy(from_logits=from_logits)
        one.compile(keras.optimizers.SGD(0.0), loss, metrics=["mse"])
    stock = [model.evaluate(words, targets, verbose=0), model.train_on_batch(words, targets)]
    assert bnn.evaluate(words, targets, verbose=0)[:2] == pytest.approx(stock[0], rel=1e-5)
    assert bnn.train_on_batch(words, targets)[:2] == pytest.approx(stock[1], rel=1e-5)


def test_a_stateful_layer_that_each_draw_would_move_on_is_refused():
    """Before the first Bayesian weight it runs once: two calls go on as the stock model's do."""
    x = keras.Input(batch_shape=(2, 4, 3))
    y = kl.GRU(2, stateful=True, name="rnn")(kl.Dense(3, name="before")(x))
    model = keras.Model(x, kl.Dense(1, "sigmoid", name="after")(y))
    for key in ("rnn/gru_cell/kernel", "before/kernel"):
        with pytest.raises(ValueError, match=r"Expected no stateful=True .* 'rnn'"):
            bayesian(model, full(model, keys=[key]))
    bnn, inputs = bayesian(model, full(model, keys=["after/kernel"]), initial_scale=1e-8), np.ones((2, 4, 3))
    before = [np.array(model(inputs)) for _ in range(2)]
    assert not np.allclose(*before)
    for expected in before:
        np.testing.assert_allclose(bnn(inputs), expected, atol=1e-6)


def test_the_loss_of_masked_outputs_is_the_stock_models_also_by_separate_calls():
    x = keras.Input((4,), dtype="int32")
    y = kl.Lambda(lambda t: t)(x)  # may mix the batch, for all that is known: "split" calls once a part
    y = kl.Embedding(5, 3, mask_zero=True)(y)
    model = keras.Model(x, kl.Dense(1, "sigmoid", name="d")(y))
    model.compile("sgd", "binary_crossentropy")
    words, targets = np.array([[1, 2, 0, 0], [3, 0, 0, 0], [1, 1, 2, 4]] * 2), np.arange(24).reshape(6, 4, 1) % 2
    options = {"beta": 0.0, "initial_scale": 1e-7, "num_samples": 3, "estimator": "split"}
    bnn = bayesian(model, {"d/kernel": np.ones((3, 1), bool)}, **options)
    bnn.compile("sgd", "binary_crossentropy")
    expected = model.evaluate(words, targets, verbose=0)
    assert bnn.train_on_batch(words, targets, return_dict=True)["loss"] == pytest.approx(expected, rel=1e-5)
