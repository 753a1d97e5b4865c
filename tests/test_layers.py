"""Masked layers: each law against an outside truth (stock Keras, TFP, closed forms, finite differences)."""

import json
import os
import subprocess
import sys
import textwrap

import keras
import numpy as np
import pytest
import tensorflow as tf
import tensorflow_probability as tfp
from keras import ops

from sbn_tf import layers
from sbn_tf.core import noise
from sbn_tf.core.prior import make_prior

tfd = tfp.distributions

# class: (arguments of the stock layer, input shape)
KINDS = {
    "Dense": ({"units": 3}, (2, 4)),
    "EinsumDense": ({"equation": "abc,cd->abd", "output_shape": (None, 3), "bias_axes": "d"}, (2, 3, 4)),
    "Embedding": ({"input_dim": 5, "output_dim": 3}, (2, 4)),
    "Conv1D": ({"filters": 3, "kernel_size": 3, "padding": "causal"}, (2, 6, 2)),
    "Conv2D": ({"filters": 3, "kernel_size": 3, "strides": 2, "activation": "relu"}, (2, 6, 6, 2)),
    "Conv3D": ({"filters": 2, "kernel_size": 2}, (2, 3, 3, 3, 2)),
    "Conv1DTranspose": ({"filters": 3, "kernel_size": 2, "strides": 2}, (2, 4, 2)),
    "Conv2DTranspose": ({"filters": 3, "kernel_size": 2, "strides": 2}, (2, 3, 3, 2)),
    "Conv3DTranspose": ({"filters": 2, "kernel_size": 2}, (1, 3, 3, 3, 2)),
    "DepthwiseConv1D": ({"kernel_size": 3, "depth_multiplier": 2}, (2, 6, 2)),
    "DepthwiseConv2D": ({"kernel_size": 3, "depth_multiplier": 2}, (2, 5, 5, 2)),
    "SeparableConv1D": ({"filters": 3, "kernel_size": 3}, (2, 6, 2)),
    "SeparableConv2D": ({"filters": 3, "kernel_size": 3}, (2, 5, 5, 2)),
}
WITH_BIAS = [kind for kind in KINDS if kind != "Embedding"]


def inputs(kind, dtype="float32"):
    shape = KINDS[kind][1]
    if kind == "Embedding":
        return np.random.randint(0, 5, shape)
    return np.random.normal(size=shape).astype(dtype)


def build(kind, stock=None, **ours):
    """A built masked layer, with the weights of `stock` where given."""
    arguments, shape = KINDS[kind]
    layer = getattr(layers, kind)(**arguments, **ours)
    layer.build((None, *shape[1:]))
    if stock is not None:
        store = {}
        stock.save_own_variables(store)
        layer.load_own_variables(store)
    return layer


def build_stock(kind):
    arguments, shape = KINDS[kind]
    layer = getattr(keras.layers, kind)(**arguments, bias_initializer="normal") if kind in WITH_BIAS else None
    layer = layer or getattr(keras.layers, kind)(**arguments)
    layer.build((None, *shape[1:]))
    return layer


def half_of_each(kind):
    """How many entries: one or more in every weight, not all of them."""
    layer = build(kind)
    sizes = {name: int(np.prod(getattr(layer, name).shape)) for name in layer.posterior_weights}
    return {name: max(1, size // 2) for name, size in sizes.items()}


def dense(units=3, num_inputs=4, **ours):
    layer = layers.Dense(units, **{"kl_weight": 0.1, **ours})
    layer.build((None, num_inputs))
    return layer


def in_new_process(code, *arguments):
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "-1"}
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code), *map(str, arguments)],
        capture_output=True,
        text=True,
        env=environment,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout.strip().splitlines()[-1])


# ---- against the stock layers ----


def test_table_is_complete():
    found = {name for name in layers.__all__ if isinstance(getattr(layers, name), type)}
    assert found - {"MaskedGaussian"} == set(KINDS)


@pytest.mark.parametrize("kind", KINDS)
def test_no_bayesian_entry_is_the_stock_layer(kind):
    stock, x = build_stock(kind), inputs(kind)
    layer = build(kind, stock, num_bayesian=0)
    assert [w.shape for w in layer.weights] == [w.shape for w in stock.weights]
    np.testing.assert_array_equal(layer(x), stock(x))
    assert layer.losses == []
    assert layer.compute_output_shape(x.shape) == stock.compute_output_shape(x.shape)
    assert layer(x).shape == stock(x).shape
    assert set(stock.get_config()) <= set(layer.get_config())
    config = {**stock.get_config(), "name": "from_stock"}
    from_stock = getattr(layers, kind).from_config(config)
    assert {k: from_stock.get_config()[k] for k in config} == config


@pytest.mark.parametrize("kind", KINDS)
def test_without_noise_it_is_the_stock_layer(kind):
    stock, x = build_stock(kind), inputs(kind)
    counts = half_of_each(kind)
    tiny = build(kind, stock, num_bayesian=counts, initial_scale=1e-12, kl_weight=0.1)
    np.testing.assert_allclose(tiny(x), stock(x), atol=1e-6)
    wide = build(kind, stock, num_bayesian=counts, initial_scale=1.0, kl_weight=0.1)
    with layers.posterior_mean():
        np.testing.assert_array_equal(wide(x), stock(x))
    assert np.max(np.abs(wide(x) - stock(x))) > 1e-3
    assert np.max(np.abs(wide(x) - wide(x))) > 1e-3  # each call draws anew


# Options beyond those of KINDS, one line each: class, arguments, input shape. Batches of 5 in 3 parts are uneven.
OPTIONS = {
    "dense, three axes, no bias": ("Dense", {"units": 3, "use_bias": False}, (5, 2, 4)),
    "dense, float64": ("Dense", {"units": 3, "activation": "tanh", "dtype": "float64"}, (5, 4)),
    "einsum, two outputs": (
        "EinsumDense",
        {"equation": "abc,cde->abde", "output_shape": (3, 2, 2), "bias_axes": "de"},
        (5, 3, 4),
    ),
    "einsum, ellipsis": ("EinsumDense", {"equation": "...x,xy->...y", "output_shape": 3, "bias_axes": "y"}, (5, 2, 4)),
    "einsum, a weight for each position": (
        "EinsumDense",
        {"equation": "abh,bhd->abd", "output_shape": (2, 3)},
        (5, 2, 4),
    ),
    "embedding, masked": ("Embedding", {"input_dim": 5, "output_dim": 3, "mask_zero": True}, (5, 4)),
    "conv1d, dilated": ("Conv1D", {"filters": 3, "kernel_size": 3, "padding": "same", "dilation_rate": 2}, (5, 8, 2)),
    "conv1d, causal and strided": (
        "Conv1D",
        {"filters": 3, "kernel_size": 3, "padding": "causal", "strides": 2},
        (5, 8, 2),
    ),
    "conv2d, groups": ("Conv2D", {"filters": 4, "kernel_size": 3, "groups": 2}, (5, 6, 6, 4)),
    "conv2d, float64": (
        "Conv2D",
        {"filters": 3, "kernel_size": 3, "padding": "same", "dtype": "float64"},
        (5, 6, 6, 2),
    ),
    "conv3d, dilated": ("Conv3D", {"filters": 2, "kernel_size": 2, "dilation_rate": 2}, (5, 4, 4, 4, 2)),
    "conv1d transpose, output padding": (
        "Conv1DTranspose",
        {"filters": 3, "kernel_size": 3, "strides": 2, "padding": "same", "output_padding": 1},
        (5, 4, 2),
    ),
    "conv2d transpose, output padding": (
        "Conv2DTranspose",
        {"filters": 3, "kernel_size": 3, "strides": 2, "padding": "same", "output_padding": 1},
        (5, 3, 3, 2),
    ),
    "conv3d transpose, strided": ("Conv3DTranspose", {"filters": 2, "kernel_size": 2, "strides": 2}, (5, 2, 2, 2, 2)),
    "depthwise1d, channels first": ("DepthwiseConv1D", {"kernel_size": 3, "data_format": "channels_first"}, (5, 2, 6)),
    "depthwise2d, strided": ("DepthwiseConv2D", {"kernel_size": 3, "strides": 2, "padding": "same"}, (5, 5, 5, 2)),
    "depthwise2d, dilated": ("DepthwiseConv2D", {"kernel_size": 2, "dilation_rate": 2}, (5, 5, 5, 2)),
    "separable1d, multiplied": ("SeparableConv1D", {"filters": 3, "kernel_size": 3, "depth_multiplier": 2}, (5, 6, 2)),
    "separable2d, same": ("SeparableConv2D", {"filters": 3, "kernel_size": 3, "padding": "same"}, (5, 5, 5, 2)),
}


def of_option(option, **ours):
    """A stock layer, the masked layer of half its entries with the same weights, and inputs."""
    kind, arguments, shape = OPTIONS[option]
    x = np.random.normal(size=shape).astype(arguments.get("dtype", "float32"))
    x = np.random.randint(0, 5, shape) if kind == "Embedding" else x
    stock = getattr(keras.layers, kind)(**arguments)
    stock.build((None, *shape[1:]))
    names = [n for n in getattr(layers, kind).posterior_weights if getattr(stock, n, None) is not None]
    half = {n: max(1, int(np.prod(getattr(stock, n).shape)) // 2) for n in names}
    layer = getattr(layers, kind)(**arguments, **{"num_bayesian": half, "kl_weight": 0.1, "seed": 0, **ours})
    layer.build((None, *shape[1:]))
    for value in stock.weights:
        getattr(layer, value.name).assign(value)
    return stock, layer, x


@pytest.mark.parametrize("option", OPTIONS)
def test_options_against_the_stock_layer(option):
    stock, points, x = of_option(option, num_bayesian=0)
    np.testing.assert_array_equal(points(x), stock(x))
    stock, tiny, x = of_option(option, initial_scale=1e-12)
    np.testing.assert_allclose(tiny(x), stock(x), atol=1e-6)
    for how in ("split", "flipout", "local"):
        with layers.batch_draws(how, num_samples=3):
            np.testing.assert_allclose(tiny(x), stock(x), atol=1e-6)
        assert tiny(x).shape == stock(x).shape and tiny(x).dtype == stock(x).dtype


@pytest.mark.parametrize("option", OPTIONS)
def test_one_split_call_is_separate_calls_on_the_parts(option):
    """Outputs and the gradients of every loc and scale, with the same seeds."""
    _, layer, x = of_option(option, initial_scale=0.5)
    state, found = layer.posteriors.noise_seed.state.numpy(), []
    weights = np.random.normal(size=layer.compute_output_shape(x.shape))
    for at_once in (True, False):
        layer.posteriors.noise_seed.state.assign(state)
        with tf.GradientTape() as tape:
            if at_once:
                with layers.batch_draws("split", num_samples=3):
                    y = layer(x)
            else:
                parts = []
                for rows in (slice(0, 1), slice(1, 3), slice(3, 5)):
                    with layers.posterior_sample():
                        parts.append(layer(x[rows]))
                y = ops.concatenate(parts)
            loss = ops.sum(y * ops.cast(weights, y.dtype))
        found.append([y, *tape.gradient(loss, layer.trainable_weights)])
    for name, once, parts in zip(["y"] + [w.name for w in layer.trainable_weights], *found, strict=True):
        once, parts = ops.convert_to_numpy(once), ops.convert_to_numpy(parts)
        np.testing.assert_allclose(once, parts, rtol=1e-5, atol=1e-5, err_msg=name)
        assert np.any(once != 0), name


def test_regularizers_act_on_the_loc_and_constraints_after_the_step():
    options = {"kernel_regularizer": "l2", "activity_regularizer": "l1", "kernel_constraint": "non_neg"}
    stock, layer = keras.layers.Dense(3, **options), dense(num_bayesian=5, initial_scale=0.5, kl_weight=0.0, **options)
    stock.build((None, 4))
    stock.set_weights([layer.kernel, layer.bias])
    x = np.random.normal(size=(6, 4)).astype("float32")
    with layers.posterior_mean():
        layer(x)
    stock(x)
    np.testing.assert_allclose(sum(layer.losses), sum(stock.losses), rtol=1e-6)  # both regularizers, and a KL of 0
    model = keras.Sequential([layer])
    model.compile(keras.optimizers.SGD(1.0), "mse")
    model.fit(x, np.full((6, 3), -9.0), verbose=0)
    assert np.min(layer.kernel) == 0  # the loc is projected
    assert np.min(layer.posteriors.draw("kernel")) < 0  # its draws may leave the set


@pytest.mark.parametrize("kind", KINDS)
def test_partial_class(kind):
    stock = getattr(keras.layers, kind)
    assert layers.partial_class(stock) is getattr(layers, kind)
    assert layers.partial_class(stock(**KINDS[kind][0])) is getattr(layers, kind)
    assert layers.partial_class(keras.layers.LayerNormalization) is None
    assert layers.partial_class(getattr(layers, kind)) is getattr(layers, kind)


# ---- which entries ----


@pytest.mark.parametrize("kind", KINDS)
def test_counts_are_exact(kind):
    counts = half_of_each(kind)
    layer = build(kind, num_bayesian=counts, kl_weight=0.1)
    for name, count in counts.items():
        assert layer.mask(name).sum() == count
        assert layer.posteriors[name].distribution.batch_shape == (count,)
        assert layer.posteriors[name].untransformed_scale.shape == (count,)


@pytest.mark.parametrize("kind", KINDS)
def test_draws_differ_only_at_the_given_mask(kind):
    plain = build(kind)
    masks = {name: np.random.random(getattr(plain, name).shape) < 0.5 for name in plain.posterior_weights}
    for mask in masks.values():
        mask.flat[0], mask.flat[-1] = True, False
    layer = build(kind, mask=masks, initial_scale=0.5, kl_weight=0.1)
    for name, mask in masks.items():
        np.testing.assert_array_equal(layer.mask(name), mask)
        np.testing.assert_allclose(layer.scale(name), 0.5 * mask, rtol=1e-5)
        loc = ops.convert_to_numpy(getattr(layer, name))
        np.testing.assert_array_equal(ops.convert_to_numpy(layer.posteriors.draw(name)) != loc, mask)


def test_mask_holds_where_the_scale_underflows():
    layer = dense(num_bayesian=5)
    layer.posteriors["kernel"].untransformed_scale.assign(np.full(5, -200.0))
    assert layer.mask("kernel").sum() == 5


@pytest.mark.parametrize("name", ["kernel", "bias"])
def test_all_entries_need_no_index(name):
    layer = dense(num_bayesian={name: 12 if name == "kernel" else 3}, initial_scale=0.5)
    assert [w.name for w in layer.non_trainable_weights if "index" in w.name] == []
    assert layer.mask(name).all()
    assert np.all(ops.convert_to_numpy(layer.posteriors.draw(name)) != ops.convert_to_numpy(getattr(layer, name)))


def test_the_seed_fixes_mask_and_draws():
    x = np.ones((1, 4), "float32")
    first, second, other = (dense(num_bayesian=6, initial_scale=1.0, seed=s) for s in (7, 7, 8))
    second.kernel.assign(first.kernel)
    np.testing.assert_array_equal(first.mask("kernel"), second.mask("kernel"))
    assert np.any(first.mask("kernel") != other.mask("kernel"))
    for _ in range(2):
        np.testing.assert_array_equal(first(x), second(x))


# ---- KL ----


def test_kl_equals_tfp_and_a_hand_sum():
    layer = dense(num_bayesian={"kernel": 5, "bias": 2}, initial_scale=0.3)
    loc = np.concatenate([layer.kernel.numpy()[layer.mask("kernel")], layer.bias.numpy()[layer.mask("bias")]])
    by_hand = np.sum(0.5 * (loc**2 + 0.3**2 - 1) - np.log(0.3))
    by_tfp = tfd.kl_divergence(tfd.Normal(loc, np.float32(0.3)), tfd.Normal(0.0, 1.0)).numpy().sum()
    np.testing.assert_allclose(layer.kl_divergence(), by_hand, rtol=1e-5)
    np.testing.assert_allclose(layer.kl_divergence(), by_tfp, rtol=1e-5)
    np.testing.assert_allclose(sum(layer.losses), 0.1 * by_hand, rtol=1e-5)


def test_mean_reduction_divides_by_the_entries():
    layer = dense(num_bayesian=5, kl_reduction="mean")
    np.testing.assert_allclose(sum(layer.losses), 0.1 * float(layer.kl_divergence()) / 5, rtol=1e-5)


def test_kl_is_counted_once_when_called_five_times():
    layer = dense(num_bayesian=5)
    x = keras.Input((4,))
    model = keras.Model(x, keras.layers.average([layer(x) for _ in range(5)]))
    model(np.ones((2, 4), "float32"))
    assert len(model.losses) == 1
    np.testing.assert_allclose(model.losses[0], 0.1 * float(layer.kl_divergence()), rtol=1e-6)


@pytest.mark.parametrize("as_config", [False, True])
def test_normal_prior_of_other_width(as_config):
    prior = tfd.Normal(0.0, 0.5)
    given = {"class_name": "Normal", "config": {"loc": 0.0, "scale": 0.5}} if as_config else prior
    layer = dense(num_bayesian=5, prior=given)
    expected = tfd.kl_divergence(layer.posteriors["kernel"].distribution, prior).numpy().sum()
    np.testing.assert_allclose(layer.kl_divergence(), expected, rtol=1e-6)
    again = layers.Dense.from_config(layer.get_config())
    assert again.posterior_options.prior == layer.posterior_options.prior
    assert float(make_prior(again.posterior_options.prior).scale) == 0.5


def moved(layer, by=0.25):
    """Where each Bayesian entry of the layer was, before all its weights are moved."""
    starts = {name: one.distribution.loc.numpy() for name, one in layer.posteriors.items()}
    for name in starts:
        layer.loc(name).assign(layer.loc(name) + by)
    return starts


def kl_from(layer, starts, scale):
    """By TFP, the KL of a layer's posterior from priors around these values."""
    terms = [
        tfd.kl_divergence(one.distribution, tfd.Normal(starts[name], scale)) for name, one in layer.posteriors.items()
    ]
    return sum(float(np.sum(term)) for term in terms)


@pytest.mark.parametrize("counts", [{"kernel": 5, "bias": 2}, {"kernel": 12}])
def test_a_prior_around_the_weights_themselves(counts):
    layer = dense(num_bayesian=counts, prior_at_loc=True, prior=tfd.Normal(0.0, 0.5), bias_initializer="normal")
    starts = moved(layer)
    expected = kl_from(layer, starts, 0.5)
    np.testing.assert_allclose(layer.kl_divergence(), expected, rtol=1e-6)
    np.testing.assert_allclose(sum(layer.losses), 0.1 * expected, rtol=1e-6)
    layer.posteriors.centre()
    np.testing.assert_allclose(layer.kl_divergence(), kl_from(layer, moved(layer, 0.0), 0.5), rtol=1e-6)
    moved(layer)
    layer.set_mask(layer.mask("kernel"))  # chosen anew, it starts where the weights are now
    np.testing.assert_allclose(layer.kl_divergence(), kl_from(layer, moved(layer, 0.0), 0.5), rtol=1e-6)
    assert [one.path for one in layer.weights if one.name == "prior_loc"] == ["kernel_posterior/prior_loc"]


def test_a_prior_around_the_weights_starts_at_a_stock_checkpoint_and_is_saved(tmp_path):
    stock = keras.Sequential([keras.Input((4,)), keras.layers.Dense(3)])
    stock.save_weights(tmp_path / "stock.weights.h5")
    layer = layers.Dense(3, num_bayesian=7, kl_weight=0.1, prior_at_loc=True)
    model = keras.Sequential([keras.Input((4,)), layer])
    model.load_weights(tmp_path / "stock.weights.h5")
    starts = moved(layer)
    np.testing.assert_array_equal(starts["kernel"], stock.layers[0].kernel.numpy()[layer.mask("kernel")])
    model.save(tmp_path / "model.keras")
    again = keras.saving.load_model(tmp_path / "model.keras").layers[0]
    assert again.posterior_options.prior_at_loc
    np.testing.assert_allclose(again.kl_divergence(), kl_from(layer, starts, 1.0), rtol=1e-6)


@pytest.mark.parametrize("saved", [False, True])
def test_weights_of_a_layer_with_another_kind_of_prior_are_refused(tmp_path, saved):
    options = {"num_bayesian": 7, "kl_weight": 0.1}
    one, other = (
        keras.Sequential([keras.Input((4,)), layers.Dense(3, prior_at_loc=at_loc, **options)])
        for at_loc in (saved, not saved)
    )
    one.save_weights(tmp_path / "saved.weights.h5")
    with pytest.raises(ValueError, match="with the num_bayesian and prior_at_loc that it had"):
        other.load_weights(tmp_path / "saved.weights.h5")


def test_a_prior_around_the_weights_in_mixed_precision():
    layer = layers.Dense(3, num_bayesian=7, kl_weight=0.1, prior_at_loc=True, dtype="mixed_float16")
    model = keras.Sequential([keras.Input((4,)), layer])
    starts = moved(layer)
    model(np.ones((2, 4), "float32"))
    np.testing.assert_allclose(sum(model.losses), 0.1 * kl_from(layer, starts, 1.0), rtol=1e-6)


def test_a_layer_built_by_fit_keeps_the_prior_where_its_weights_began():
    layer = layers.Dense(1, num_bayesian=4, kl_weight=0.0, prior_at_loc=True, kernel_initializer="ones")
    model = keras.Sequential([layer])
    model.compile(keras.optimizers.SGD(0.1), "mse")
    model.fit(np.ones((8, 4), "float32"), np.zeros((8, 1), "float32"), epochs=3, verbose=0)
    assert np.abs(layer.kernel.numpy() - 1.0).min() > 0.1
    np.testing.assert_allclose(layer.kl_divergence(), kl_from(layer, {"kernel": np.ones(4, "float32")}, 1.0), rtol=1e-5)


def test_prior_without_a_registered_kl_is_refused():
    with pytest.raises(ValueError, match=r"KL from tfd.Normal registered.*Laplace"):
        layers.Dense(3, prior=tfd.Laplace(0.0, 1.0))
    with pytest.raises(ValueError, match="scalar parameters"):
        layers.Dense(3, prior=tfd.Normal([0.0, 1.0], 1.0))
    with pytest.raises(ValueError, match="Received: prior='normal'"):
        layers.Dense(3, prior="normal")


def test_kl_weight_as_a_variable_changes_the_loss():
    weight = keras.Variable(0.1, trainable=False)
    layer = dense(num_bayesian=5, kl_weight=weight)
    assert not any(w is weight for w in layer.weights)
    model = keras.Sequential([layer])
    model.compile("sgd", "mse")
    x, y = np.zeros((4, 4), "float32"), np.zeros((4, 3), "float32")
    nats = float(layer.kl_divergence())
    np.testing.assert_allclose(model.evaluate(x, y, verbose=0), 0.1 * nats, rtol=1e-5)
    weight.assign(0.3)  # the compiled step reads the variable
    np.testing.assert_allclose(model.evaluate(x, y, verbose=0), 0.3 * nats, rtol=1e-5)
    assert layer.get_config()["kl_weight"] == pytest.approx(0.3)


# ---- draws and gradients ----


def test_moments_of_an_output_against_the_closed_form():
    draws, x = 4000, np.float32([[0.5, -1.0, 2.0, 0.3]])
    layer = dense(units=2, num_bayesian={"kernel": 5, "bias": 1}, initial_scale=0.4)
    sample = tf.function(lambda: tf.map_fn(lambda _: layer(x)[0], tf.range(draws), fn_output_signature=tf.float32))
    values = sample().numpy()
    mean = (x @ layer.kernel.numpy() + layer.bias.numpy())[0]
    variance = (x**2 @ layer.scale("kernel") ** 2 + layer.scale("bias") ** 2)[0]
    # Five standard errors: sd / sqrt(draws) of the mean, variance * sqrt(2 / draws) of a Gaussian's variance.
    np.testing.assert_array_less(np.abs(values.mean(0) - mean), 5 * np.sqrt(variance / draws) + 1e-6)
    np.testing.assert_array_less(np.abs(values.var(0) - variance), 5 * variance * np.sqrt(2 / draws) + 1e-6)


@pytest.mark.parametrize("num_bayesian", [{"kernel": 5, "bias": 2}, {"kernel": 12, "bias": 3}])
def test_gradients_equal_finite_differences(monkeypatch, num_bayesian):
    monkeypatch.setattr(
        noise, "standard_normal", lambda size, generator, dtype: ops.cast(np.linspace(-1.5, 2.0, size), dtype)
    )
    layer = dense(num_bayesian=num_bayesian, initial_scale=0.5, dtype="float64")
    assert {w.dtype for w in layer.trainable_weights} == {"float64"}
    x = np.random.normal(size=(2, 4))

    def loss():
        return ops.sum(ops.tanh(layer(x)) ** 2) + sum(layer.losses)

    with tf.GradientTape() as tape:
        value = loss()
    for variable, gradient in zip(layer.trainable_weights, tape.gradient(value, layer.trainable_weights), strict=True):
        start, step, estimate = variable.numpy(), 1e-6, np.zeros(variable.shape)
        for i in np.ndindex(*start.shape):
            moved = [start.copy(), start.copy()]
            moved[0][i] += step
            moved[1][i] -= step
            values = []
            for point in moved:
                variable.assign(point)
                values.append(float(loss()))
            estimate[i] = (values[0] - values[1]) / (2 * step)
        variable.assign(start)
        np.testing.assert_allclose(ops.convert_to_numpy(gradient), estimate, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_reach_every_loc_and_k_scales(kind):
    counts = half_of_each(kind)
    layer = build(kind, num_bayesian=counts, kl_weight=0.0, initial_scale=0.5)
    if kind == "Conv2D":
        layer.activation = keras.activations.linear
    x = np.arange(5)[None] if kind == "Embedding" else inputs(kind)
    with tf.GradientTape() as tape:
        y = layer(x)
        loss = ops.sum(y * np.random.normal(size=y.shape))
    gradients = tape.gradient(loss, layer.trainable_weights)
    for variable, gradient in zip(layer.trainable_weights, gradients, strict=True):
        values = ops.convert_to_numpy(gradient)
        assert values.shape == variable.shape, variable.name
        assert np.all(values != 0), variable.name
    scales = [w for w in layer.trainable_weights if "untransformed_scale" in w.name]
    assert [w.shape for w in scales] == [(count,) for count in counts.values()]


@pytest.mark.parametrize("jit_compile", [False, True])
def test_fit(jit_compile):
    model = keras.Sequential([dense(num_bayesian={"kernel": 5, "bias": 2}), dense(1, 3, num_bayesian=3)])
    model.compile(keras.optimizers.Adam(0.05), "mse", jit_compile=jit_compile)
    x = np.random.normal(size=(32, 4)).astype("float32")
    history = model.fit(x, x[:, :1], epochs=3, verbose=0).history["loss"]
    assert np.all(np.isfinite(history)) and history[-1] < history[0]
    assert np.max(np.abs(model.layers[0].scale("kernel")[model.layers[0].mask("kernel")] - 0.01)) > 1e-5


@pytest.mark.parametrize("kind", ["Dense", "Conv2D", "Conv2DTranspose", "SeparableConv2D", "Embedding"])
@pytest.mark.parametrize("policy", ["mixed_bfloat16", "mixed_float16"])
def test_mixed_precision_keeps_the_posterior_in_float32(policy, kind):
    layer = build(kind, num_bayesian=half_of_each(kind), kl_weight=0.1, dtype=policy)
    y = layer(inputs(kind))
    assert y.dtype == layer.compute_dtype and np.all(np.isfinite(ops.convert_to_numpy(ops.cast(y, "float32"))))
    assert {w.dtype for w in layer.trainable_weights} == {"float32"}
    assert {one.distribution.dtype for _, one in layer.posteriors.items()} == {tf.float32}
    assert layer.losses[0].dtype == tf.float32


# ---- saving ----


@pytest.mark.parametrize("kind", KINDS)
def test_the_saved_weight_is_the_loc(kind):
    layer = build(kind, num_bayesian=half_of_each(kind), initial_scale=1.0, kl_weight=0.1)
    before = {name: getattr(layer, name).numpy().copy() for name in layer.posterior_weights}
    layer(inputs(kind))
    store = {}
    layer.save_own_variables(store)
    saved = [np.asarray(store[key]) for key in sorted(store) if key.isdigit()]
    assert len(saved) == len(before)
    for name, loc in before.items():
        assert any(loc.shape == s.shape and np.array_equal(loc, s) for s in saved), name


def test_round_trip_in_a_new_process_and_what_the_import_brings(tmp_path):
    expected, given = {}, {}
    for kind, (_, shape) in KINDS.items():
        layer = build(kind, num_bayesian=half_of_each(kind), kl_weight=0.1, prior=tfd.Normal(0.0, 0.5))
        model = keras.Sequential([keras.Input(shape[1:], dtype="int32" if kind == "Embedding" else None), layer])
        x = inputs(kind)
        with layers.posterior_mean():
            expected[kind] = model(x).numpy()
        given[kind] = x
        model.save(tmp_path / f"{kind}.keras")
        expected[f"{kind} kl"] = np.float32(model.losses).sum()
    np.savez(tmp_path / "inputs.npz", **given)
    brought = in_new_process(
        """
        import json, sys
        from pathlib import Path
        import keras, numpy as np, tensorflow_probability as tfp
        tfp.distributions
        before = set(sys.modules)
        from sbn_tf.layers import posterior_mean
        brought = sorted({"matplotlib", "sklearn", "pandas"} & (set(sys.modules) - before))
        folder, found = Path(sys.argv[1]), {}
        with np.load(folder / "inputs.npz") as given, posterior_mean():
            for kind in given.files:
                model = keras.saving.load_model(folder / f"{kind}.keras")
                found[kind] = model(given[kind]).numpy()
                found[f"{kind} kl"] = np.float32(model.losses).sum()
        np.savez(folder / "found.npz", **found)
        print(json.dumps(brought))
        """,
        tmp_path,
    )
    assert brought == []
    with np.load(tmp_path / "found.npz") as found:
        assert set(found.files) == set(expected)
        for kind, values in expected.items():
            np.testing.assert_allclose(found[kind], values, rtol=1e-6, atol=1e-7, err_msg=kind)


def two_layers(module, **ours):
    return keras.Sequential(
        [
            keras.Input((6, 6, 2)),
            module.Conv2D(3, 3, name="conv", **ours),
            keras.layers.GlobalAveragePooling2D(),
            module.Dense(2, name="head", **ours),
        ]
    )


def test_a_stock_checkpoint_loads_as_locs(tmp_path):
    stock, x = two_layers(keras.layers), np.random.normal(size=(2, 6, 6, 2)).astype("float32")
    stock.save_weights(tmp_path / "stock.weights.h5")
    model = two_layers(layers, num_bayesian={"kernel": 5, "bias": 1}, kl_weight=0.1)
    model.load_weights(tmp_path / "stock.weights.h5")
    with layers.posterior_mean():
        np.testing.assert_array_equal(model(x), stock(x))
    assert [layer.name for layer in layers.masked_layers(model)] == ["conv", "head"]


def test_wrong_counts_are_named_when_loading(tmp_path):
    two_layers(layers, num_bayesian=4, kl_weight=0.1).save_weights(tmp_path / "four.weights.h5")
    with pytest.raises(ValueError, match=r"conv.*'kernel': 5}.*'kernel': 4}.*num_bayesian and prior_at_loc that it"):
        two_layers(layers, num_bayesian=5, kl_weight=0.1).load_weights(tmp_path / "four.weights.h5")
    with pytest.raises(ValueError, match=r"conv.*num_bayesian and prior_at_loc that it had"):
        two_layers(layers, num_bayesian={"bias": 1}, kl_weight=0.1).load_weights(tmp_path / "four.weights.h5")
    with pytest.raises(ValueError, match=r"conv.*num_bayesian and prior_at_loc that it had"):
        two_layers(layers).load_weights(tmp_path / "four.weights.h5")


# ---- set_mask ----


def test_set_mask_then_compile_and_fit():
    layer = dense(num_bayesian=5, initial_scale=0.5)
    model = keras.Sequential([layer])
    x = np.random.normal(size=(8, 4)).astype("float32")
    model.compile("adam", "mse")
    model.fit(x, x[:, :3], verbose=0)
    loc = layer.kernel.numpy()
    mask = np.zeros((4, 3), bool)
    mask[1] = True
    layer.set_mask({"kernel": mask, "bias": np.array([True, False, False])})
    np.testing.assert_array_equal(layer.mask("kernel"), mask)
    np.testing.assert_array_equal(layer.kernel, loc)
    assert layer.num_bayesian == {"kernel": 3, "bias": 1}
    assert len(layer.trainable_weights) == 4 and len(layer.losses) == 2
    model.compile("adam", "mse")
    assert np.isfinite(model.fit(x, x[:, :3], verbose=0).history["loss"]).all()
    np.testing.assert_array_equal(layer.mask("kernel"), mask)
    layer.set_mask(np.zeros((4, 3), bool))  # and back to the stock layer
    assert len(layer.trainable_weights) == 2 and layer.losses == []
    np.testing.assert_array_equal(layer(x), layer(x))


def test_set_mask_of_a_stock_like_layer(tmp_path):
    layer = layers.Dense(3)
    with pytest.raises(ValueError, match="before set_mask"):
        layer.set_mask(np.ones((4, 3), bool))
    layer.build((None, 4))
    with pytest.raises(ValueError, match="with a kl_weight of 0"):
        layer.set_mask(np.ones((4, 3), bool))
    layer.posterior_options.kl_weight = 0.1
    layer.set_mask(np.eye(4, 3, dtype=bool))
    model = keras.Sequential([keras.Input((4,)), layer])
    model.save(tmp_path / "model.keras")
    again = keras.saving.load_model(tmp_path / "model.keras")
    np.testing.assert_array_equal(again.layers[0].mask("kernel"), np.eye(4, 3, dtype=bool))


# ---- errors ----


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_bayesian": 2}, r"no kl_weight. Pass kl_weight=1/num_train"),
        ({"mask": np.ones((4, 3), bool)}, r"no kl_weight"),
        ({"num_bayesian": 13, "kl_weight": 1}, r"at most 12 Bayesian entries in `kernel`.*Received: 13"),
        ({"num_bayesian": -1, "kl_weight": 1}, r"whole counts num_bayesian >= 0 .*Received: num_bayesian=-1"),
        ({"num_bayesian": {"bias": 0.1}, "kl_weight": 1}, r"Received: num_bayesian={'bias': 0.1}"),
        ({"num_bayesian": {"gamma": 1}, "kl_weight": 1}, r"among \('kernel', 'bias'\).*Received: \['gamma'\]"),
        ({"mask": {"gamma": np.ones(3, bool)}, "kl_weight": 1}, r"among .*Received: \['gamma'\]"),
        ({"mask": {"bias": np.ones(3, bool)}, "kl_weight": 1, "use_bias": False}, r"no weight `bias`"),
        ({"num_bayesian": {"bias": 1}, "kl_weight": 1, "use_bias": False}, r"no weight `bias`"),
        ({"mask": np.ones((4, 3)), "kl_weight": 1}, r"boolean mask of shape \(4, 3\).*Received: float64"),
        ({"mask": np.ones((3, 4), bool), "kl_weight": 1}, r"Received: bool of shape \(3, 4\)"),
        ({"initial_scale": 0.0}, r"initial_scale > 1.2e-38 .*Received: initial_scale=0.0"),
        ({"initial_scale": 1e-45}, r"Received: initial_scale=1e-45"),
        ({"initial_scale": float("nan")}, r"initial_scale=nan"),
        ({"kl_reduction": "max"}, r"Received: kl_reduction='max'"),
        ({"kl_weight": -1.0}, r"kl_weight >= 0.* Received: kl_weight=-1.0"),
        ({"kl_weight": float("nan")}, r"Received: kl_weight=nan"),
        ({"kl_weight": "1"}, r"Received: kl_weight='1'"),
        ({"num_bayesian": float("nan"), "kl_weight": 1}, r"whole counts"),
        ({"num_bayesian": 1, "mask": np.ones((4, 3), bool), "kl_weight": 1}, r"num_bayesian or mask. Received: both"),
        ({"prior": tfd.Normal(0.0, -1.0)}, r"scale > 0"),
        ({"prior": {"class_name": "Gaussian", "config": {}}}, r"tfd.Normal\(loc, scale\). Received: Gaussian"),
        ({"prior": {"class_name": "Normal"}}, r"Expected a prior as"),
        ({"prior_at_loc": "trained"}, r"True or False. Received: prior_at_loc='trained'"),
    ],
)
def test_errors_say_what_was_expected_and_received(arguments, message):
    with pytest.raises(ValueError, match=message):
        layers.Dense(3, **arguments).build((None, 4))


def test_lora_and_quantization_are_refused():
    layer = dense(num_bayesian=2)
    with pytest.raises(ValueError, match="LoRA"):
        layer.enable_lora(2)
    with pytest.raises(ValueError, match="cannot be quantized"):
        layer.quantize("int8")


@pytest.mark.parametrize("kind", ["Dense", "EinsumDense", "Embedding", "Conv2D"])
def test_lora_of_a_layer_of_points_is_keras_s(kind):
    stock, x, saved = build_stock(kind), inputs(kind), ({}, {})
    layer = build(kind, stock)
    for one, store in zip((stock, layer), saved, strict=True):
        one.enable_lora(2)
        for i, variable in enumerate(one.trainable_variables):
            variable.assign(np.random.default_rng(i).normal(size=variable.shape))
        one.save_own_variables(store)
    np.testing.assert_array_equal(layer(x), stock(x))
    assert list(saved[1]) == list(saved[0])  # merged
    for mine, theirs in zip(saved[1].values(), saved[0].values(), strict=True):
        np.testing.assert_array_equal(mine, theirs)


@pytest.mark.parametrize("kind", ["Dense", "EinsumDense", "Embedding"])
def test_a_model_quantizes_a_layer_of_points_as_the_stock_layer(kind, tmp_path):
    stock, x = build_stock(kind), inputs(kind)
    layer = build(kind, stock, num_bayesian=2, kl_weight=0.1)
    layer.set_mask({name: np.zeros(layer.loc(name).shape, bool) for name in layer.posterior_weights})
    for one in (stock, layer):
        model = keras.Sequential([keras.Input(x.shape[1:], dtype=x.dtype.name), one])
        model.quantize("int8")
    assert [v.dtype for v in layer.weights] == [v.dtype for v in stock.weights]
    assert "int8" in [v.dtype for v in layer.weights]
    np.testing.assert_array_equal(model(x), stock(x))
    model.save(tmp_path / "model.keras")
    np.testing.assert_array_equal(keras.saving.load_model(tmp_path / "model.keras")(x), model(x))


@pytest.mark.parametrize("kind", ["Dense", "EinsumDense"])
def test_eight_bits_of_floating_point_learn_their_scales_as_in_the_stock_layer(kind):
    stock, x = build_stock(kind), inputs(kind)
    layer, y = build(kind, stock), np.array(stock(x)) + 1
    for one in (stock, layer):
        one.quantize("float8")
        model = keras.Sequential([keras.Input(x.shape[1:]), one])
        model.compile("sgd", "mse")
        model.fit(x, y, epochs=2, verbose=0)
    assert np.any(layer.inputs_scale) and float(layer.inputs_scale) != 1
    for mine, theirs in zip(layer.weights, stock.weights, strict=True):
        np.testing.assert_allclose(mine, theirs, rtol=1e-5, err_msg=mine.name)


def test_a_layer_of_points_that_has_its_own_call_is_not_quantized():
    class Mine(layers.Dense):
        def call(self, inputs):
            return 2 * super().call(inputs)

    layer = Mine(3)
    layer.build((None, 4))
    with pytest.raises(NotImplementedError):
        layer.quantize("int8")


@pytest.mark.parametrize("change", [lambda layer: layer.enable_lora(2), lambda layer: layer.quantize("int8")])
def test_a_quantized_kernel_or_one_with_lora_factors_does_not_become_bayesian(change):
    layer, x = dense(), np.ones((2, 4), "float32")
    change(layer)
    before = np.array(layer(x))
    with pytest.raises(ValueError, match=r"floating point without LoRA factors.*Received: `kernel` of layer"):
        layer.set_mask(np.ones((4, 3), bool))
    assert not any(layer.num_bayesian.values())
    np.testing.assert_array_equal(layer(x), before)
    with pytest.raises(ValueError, match="without LoRA factors"):
        dense(num_bayesian=4, lora_rank=2)


@pytest.mark.parametrize("ours", [{}, {"num_bayesian": 6, "kl_weight": 0.1, "prior_at_loc": True, "relative": True}])
@pytest.mark.parametrize("as_list", [False, True])
def test_an_embedding_that_starts_at_given_weights(ours, as_list):
    """The stock layer builds itself in its `__init__`."""
    given = np.arange(15, dtype="float32").reshape(5, 3)
    stock = keras.layers.Embedding(5, 3, weights=given)
    layer = layers.Embedding(5, 3, weights=[given] if as_list else given, **ours)
    with layers.posterior_mean():
        np.testing.assert_array_equal(layer(np.arange(5)), stock(np.arange(5)))
    np.testing.assert_array_equal(layer.loc("embeddings"), given)
    if ours:
        mask = layer.mask("embeddings")
        assert mask.sum() == 6 and layer.num_bayesian == {"embeddings": 6}
        np.testing.assert_array_equal(layer.posteriors["embeddings"].prior_loc, given[mask])
        scales = 0.1 * np.maximum(given[mask], np.sqrt(np.mean(given**2)))
        np.testing.assert_allclose(layer.scale("embeddings")[mask], scales, rtol=1e-5)
        assert not np.array_equal(layer(np.arange(5)), given)


def test_one_draw_within_posterior_sample():
    layer, x = dense(num_bayesian={"kernel": 12, "bias": 3}, initial_scale=1.0), np.ones((2, 4), "float32")
    assert not np.array_equal(layer(x), layer(x))
    with layers.posterior_sample():
        first = layer(x)
        np.testing.assert_array_equal(first, layer(x))
    with layers.posterior_sample():
        assert not np.array_equal(first, layer(x))


def test_a_shared_draw_in_a_traced_loop():
    layer, x = dense(num_bayesian=12, initial_scale=1.0), tf.ones((2, 4))

    @tf.function
    def calls():
        with layers.posterior_sample():
            first = layer(x)
            loop = tf.while_loop(lambda i, y: i < 3, lambda i, y: (i + 1, layer(x)), (0, first))[1]
            return first, loop, layer(x)

    first, loop, last = calls()
    np.testing.assert_array_equal(first, last)
    assert loop.shape == first.shape


def test_a_weight_is_not_read_before_build():
    with pytest.raises(AttributeError, match="Build"):
        _ = layers.SeparableConv2D(2, 3).pointwise_kernel


# ---- replicas ----


def test_two_replicas_draw_different_noise():
    found = in_new_process(
        """
        import json
        import tensorflow as tf
        cpu = tf.config.list_physical_devices("CPU")[0]
        tf.config.set_logical_device_configuration(cpu, [tf.config.LogicalDeviceConfiguration()] * 2)
        import keras, numpy as np
        from sbn_tf import layers
        strategy = tf.distribute.MirroredStrategy(["CPU:0", "CPU:1"])
        with strategy.scope():
            layer = layers.Dense(3, num_bayesian=5, initial_scale=1.0, kl_weight=0.1)
            model = keras.Sequential([keras.Input((4,)), layer])
            model.compile("sgd", "mse", jit_compile=False)
        draw = tf.function(lambda: strategy.run(lambda: model(tf.ones((1, 4)))))
        draws = [x.numpy().tolist() for _ in range(2) for x in strategy.experimental_local_results(draw())]
        loss = model.fit(np.ones((8, 4)), np.ones((8, 3)), verbose=0).history["loss"]
        print(json.dumps({"draws": draws, "finite": bool(np.isfinite(loss).all())}))
        """
    )
    assert found["finite"]
    draws = np.array(found["draws"])
    assert draws.shape == (4, 1, 3)
    assert len(np.unique(draws[:, 0], axis=0)) == 4
