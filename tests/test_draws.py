"""One pass for several draws: each estimator against closed forms, stock Keras on squares, and separate calls."""

import keras
import numpy as np
import pytest
import tensorflow as tf
from keras import ops
from scipy import stats

from sbn_tf import layers
from sbn_tf.core import batch as parts_of
from sbn_tf.core import draws
from sbn_tf.core.context import computed_once
from sbn_tf.core.optimizers import others_stay
from sbn_tf.partial_bayes import to_partial_bayes

HOW = ("split", "flipout", "local")


def built(kind, shape, mask=None, initial_scale=0.5, **arguments):
    """A built masked layer with a seed; its mask is random where none is given."""
    ours = {"kl_weight": 0.1, "initial_scale": initial_scale, "seed": 3}
    layer = getattr(layers, kind)(**arguments, **ours)
    layer.build((None, *shape))
    layer.posterior_options.kl_weight = 0.1
    random = np.random.default_rng(0)
    names = [n for n in layer.posterior_weights if getattr(layer, n) is not None]
    layer.set_mask(mask or {n: random.random(layer.loc(n).shape) < 0.6 for n in names})
    return layer


def repeated(layer, x, how, num_samples=3, repeats=600):
    """`repeats` outputs under new contexts: (repeats, *outputs)."""

    @tf.function
    def draw():
        def one(_):
            with layers.batch_draws(how, num_samples):
                return layer(x)

        return tf.map_fn(one, tf.range(repeats), fn_output_signature=layer.compute_dtype)

    return draw().numpy()


def moments(layer, x):
    """Mean and variance of the outputs of a layer without activation, by its stock layer on squares."""
    stock = type(layer).stock_class
    config = {k: v for k, v in layer.get_config().items() if k in stock(**KINDS[type(layer).__name__][1]).get_config()}
    mean, variance = stock.from_config(config), stock.from_config(config)
    for one in (mean, variance):
        one.build((None, *x.shape[1:]))
    for a, b in zip(mean.weights, variance.weights, strict=True):
        a.assign(getattr(layer, a.name))
        b.assign(layer.scale(b.name) ** 2)
    squares = x if type(layer).__name__ == "Embedding" else x**2
    return ops.convert_to_numpy(mean(x)), ops.convert_to_numpy(variance(squares))


@pytest.mark.parametrize("how", ["split", "flipout", "local"])
def test_what_stands_between_the_mixin_and_the_stock_layer_is_called(how):
    """The oracle: a point layer of the same class, since the draws have next to no scale."""

    class Doubled(keras.layers.Layer):
        def call(self, inputs):
            return 2 * super().call(inputs)

    class Between(layers.MaskedGaussian, Doubled, keras.layers.Dense):
        posterior_weights = ("bias",)

    class Derived(layers.Dense):
        def call(self, inputs):
            return 2 * super().call(inputs)

    x = np.random.default_rng(0).normal(size=(6, 4)).astype("float32")
    for cls in (Between, Derived):
        layer = cls(3, num_bayesian={"bias": 2}, kl_weight=1.0, initial_scale=1e-6)
        layer.build(x.shape)
        expected = 2 * (x @ ops.convert_to_numpy(layer.kernel) + ops.convert_to_numpy(layer.bias))
        with layers.batch_draws(how, num_samples=3):
            np.testing.assert_allclose(ops.convert_to_numpy(layer(x)), expected, rtol=1e-4, atol=1e-4)


# ---- parts of a batch ----


@pytest.mark.parametrize(("batch", "samples", "sizes"), [(50, 5, [10] * 5), (7, 3, [2, 2, 3]), (2, 5, [0, 0, 1, 0, 1])])
def test_parts_are_contiguous(batch, samples, sizes):
    assert parts_of.part_sizes(batch, samples) == sizes
    x = np.arange(2 * batch).reshape(batch, 2)
    parts = parts_of.split_batch(x, samples)
    assert [s for s, _ in parts] == [s for s, size in enumerate(sizes) if size]
    assert [len(part) for _, part in parts] == [size for size in sizes if size]
    np.testing.assert_array_equal(parts_of.join_batch([part for _, part in parts], batch, samples), x)
    numbers = np.repeat(np.arange(samples), sizes)
    np.testing.assert_array_equal(parts_of.part_of_example(batch, samples), numbers)
    traced = tf.function(lambda rows: parts_of.part_of_example(tf.shape(rows)[0], samples))
    np.testing.assert_array_equal(traced(tf.ones(batch)), numbers)


@pytest.mark.parametrize("kind", ["Conv2D", "SeparableConv2D"])
@pytest.mark.parametrize("batch", [2, 7])
def test_an_open_batch_size_gives_the_same(kind, batch):
    layer = built(kind, (5, 5, 2), filters=3, kernel_size=3)
    x = np.random.normal(size=(batch, 5, 5, 2)).astype("float32")
    state, found = layer.posteriors.noise_seed.state.numpy(), []

    def step(x):
        with tf.GradientTape() as tape, layers.batch_draws("split", num_samples=5):
            loss = ops.sum(ops.tanh(layer(x)))
        return [loss, *tape.gradient(loss, layer.trainable_weights)]

    for signature in ([tf.TensorSpec((None, 5, 5, 2))], [tf.TensorSpec(x.shape)]):
        layer.posteriors.noise_seed.state.assign(state)
        found.append(tf.function(step, input_signature=signature)(x))
    for a, b in zip(*found, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)


# ---- few touched channels ----

# class: (input shape, arguments, which entries of the two last axes of the kernel)
FEW = {
    "Dense": ((6,), {"units": 8}, ([1, 4], [0, 5])),
    "Conv1D": ((5, 6), {"filters": 8, "kernel_size": 3, "padding": "causal"}, ([2], slice(None))),
    "Conv2D": ((4, 4, 6), {"filters": 8, "kernel_size": 3, "padding": "same"}, (slice(None), [6])),
    "Conv2DTranspose": ((3, 3, 6), {"filters": 8, "kernel_size": 2, "strides": 2}, ([1, 7], [0, 2, 3])),
}


def few(kind):
    shape, arguments, (rows, columns) = FEW[kind]
    stock = getattr(keras.layers, kind)(**arguments)
    stock.build((None, *shape))
    mask = np.zeros(stock.kernel.shape, bool)
    mask[..., np.arange(mask.shape[-2])[rows][:, None], np.arange(mask.shape[-1])[columns]] = True
    mask &= np.random.default_rng(1).random(mask.shape) < 0.8
    return built(kind, shape, {"kernel": mask}, **arguments), np.random.normal(size=(7, *shape)).astype("float32")


@pytest.mark.parametrize("kind", FEW)
def test_noise_apart_from_the_loc_gives_what_whole_draws_give(monkeypatch, kind):
    layer, x = few(kind)
    assert layer.posteriors["kernel"].touched() == tuple(
        int(layer.mask("kernel").any(axis=tuple(i for i in range(layer.mask("kernel").ndim) if i != axis)).sum())
        for axis in (layer.mask("kernel").ndim - 2, layer.mask("kernel").ndim - 1)
    )
    state, found = layer.posteriors.noise_seed.state.numpy(), []
    for apart in (True, False):
        monkeypatch.setattr(draws, "_decomposes", lambda *_, apart=apart: apart)
        layer.posteriors.noise_seed.state.assign(state)
        with tf.GradientTape() as tape, layers.batch_draws("split", num_samples=3):
            y = layer(x)
            loss = ops.sum(ops.tanh(y))
        found.append([y, *tape.gradient(loss, layer.trainable_weights)])
    for a, b in zip(*found, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)
        assert np.any(ops.convert_to_numpy(a) != 0)


@pytest.fixture
def double():
    """Keras's default precision is double. Its policy follows floatx only until it has been set once."""
    before, policy = keras.config.floatx(), keras.config.dtype_policy()
    keras.config.set_floatx("float64")
    keras.config.set_dtype_policy("float64")
    yield
    keras.config.set_floatx(before)
    keras.config.set_dtype_policy(policy)


@pytest.mark.parametrize("apart", [False, True])
@pytest.mark.parametrize("how", HOW)
@pytest.mark.parametrize("kind", ["Dense", "Conv2D", "Embedding"])
def test_in_double_precision_every_way_is_the_stock_layer_without_noise(double, monkeypatch, kind, how, apart):
    monkeypatch.setattr(draws, "_decomposes", lambda *_: apart)
    shape, arguments = ((4,), {"input_dim": 6, "output_dim": 3}) if kind == "Embedding" else FEW[kind][:2]
    stock = getattr(keras.layers, kind)(**arguments)
    stock.build((None, *shape))
    name = "embeddings" if kind == "Embedding" else "kernel"
    mask = np.zeros(getattr(stock, name).shape, bool)
    mask[..., :2, :2] = True
    layer = built(kind, shape, {name: mask}, initial_scale=1e-12, **arguments)
    x = np.random.default_rng(0).integers(0, 6, (7, *shape)).astype("int32" if kind == "Embedding" else "float64")
    with layers.batch_draws(how, num_samples=3):
        y = layer(x)
    stock.set_weights([layer.loc(n) for n in ("kernel", "bias") if kind != "Embedding"] or [layer.loc(name)])
    assert keras.backend.standardize_dtype(y.dtype) == "float64"
    np.testing.assert_allclose(y, stock(x), atol=1e-9)


def test_members_take_turns_in_double_precision(double):
    before, after = [ops.zeros((3, 2))], [ops.ones((3, 2))]
    (kept,) = others_stay(before, after, ["member_offsets"], ops.convert_to_tensor(4, dtype="int32"))
    np.testing.assert_array_equal(kept, [[0, 0], [1, 1], [0, 0]])


@pytest.mark.parametrize(
    ("units", "touched", "apart"),
    [(64, (8, 64), True), (64, (9, 64), False), (64, (64, 8), True), (64, (16, 16), True), (64, (64, 64), False)],
)
def test_which_way_is_settled_by_touched_channels(monkeypatch, units, touched, apart):
    """64 inputs: up to 1/8 of the pairs. 64 entries for each output: more than 32."""
    mask = np.zeros((64, units), bool)
    mask[: touched[0], : touched[1]] = True
    layer, kernels = built("Dense", (64,), {"kernel": mask}, units=units), []
    whole = layer.posteriors.draw

    def counted(name, offsets):
        kernels.extend([1] if name == "kernel" else [])
        return whole(name, offsets)

    monkeypatch.setattr(layer.posteriors, "draw", counted)
    with layers.batch_draws("split", num_samples=3):
        layer(np.ones((6, 64), "float32"))
    assert len(kernels) == (0 if apart else 3)


def test_an_image_too_large_for_its_kernel_takes_whole_draws(monkeypatch):
    mask = np.zeros((3, 3, 8, 8), bool)
    mask[..., 0] = True
    layer = built("Conv2D", (8, 8, 8), {"kernel": mask}, filters=8, kernel_size=3, padding="same")
    taken = []
    monkeypatch.setattr(draws.TouchedChannels, "take", lambda self, x: taken.append(x) or x)
    with layers.batch_draws("split", num_samples=2):
        layer(np.ones((4, 8, 8, 8), "float32"))
    assert not taken  # 576 entries of the kernel, 512 outputs


def test_loaded_masks_count(tmp_path):
    """A new trace follows the mask that was loaded; an old one that has no room for it says so by NaN."""

    def model(columns):
        mask = np.zeros((64, 16), bool)
        mask[:, columns] = True
        layer = built("Dense", (64,), {"kernel": mask}, units=16)
        return keras.Sequential([keras.Input((64,)), layer])

    one, other, x = model([3]), model([5]), np.ones((4, 64), "float32")
    mask = np.zeros((64, 16), bool)
    mask[:32, [7, 8]] = True
    two = model([3])
    two.layers[0].set_mask({"kernel": mask})

    @tf.function
    def call():
        with layers.batch_draws("split", num_samples=2):
            return one(x)

    def noisy():
        with layers.posterior_mean():
            at_mean = one(x).numpy()
        return np.flatnonzero(np.any(np.abs(call().numpy() - at_mean) > 1e-4, axis=0)), call().numpy()

    np.testing.assert_array_equal(noisy()[0], [3])
    for given, columns in ((other, [5]), (two, [7, 8])):
        given.save_weights(tmp_path / "given.weights.h5")
        one.load_weights(tmp_path / "given.weights.h5")
        if given is two:
            assert np.isnan(noisy()[1]).any()
            call = tf.function(call.python_function)
        np.testing.assert_array_equal(noisy()[0], columns)


@pytest.mark.parametrize("way", ["layer", "model", "assign", "beneath"])
def test_masks_set_by_hand_count(way):
    """64 entries of one column become 64 of two: calls that are traced after it have room for both."""

    def model(rows, columns):
        mask = np.zeros((64, 16), bool)
        mask[np.ix_(rows, columns)] = True
        return keras.Sequential([keras.Input((64,)), built("Dense", (64,), {"kernel": mask}, units=16)])

    one, two, x = model(range(64), [3]), model(range(32), [7, 8]), np.ones((4, 64), "float32")
    (layer,), (given,) = one.layers, two.layers
    if way in ("layer", "model"):
        target, source = (layer, given) if way == "layer" else (one, two)
        target.set_weights(source.get_weights())
    elif way == "assign":
        layer.posteriors["kernel"].index.assign(given.posteriors["kernel"].index)
    else:
        layer.posteriors["kernel"].index.value.assign(given.posteriors["kernel"].index.value)
    for how in HOW:
        noise = repeated(layer, x, how, num_samples=2, repeats=3) - (x @ layer.kernel.numpy() + layer.bias.numpy())
        np.testing.assert_array_equal(np.flatnonzero(np.abs(noise).max(axis=(0, 1)) > 1e-4), [7, 8])


def test_rows_of_an_embedding_that_are_points_have_no_noise():
    mask = np.zeros((6, 3), bool)
    mask[[1, 4]] = True
    layer = built("Embedding", (4,), {"embeddings": mask}, input_dim=6, output_dim=3)
    ids = np.tile(np.arange(6), (5, 1))
    for how in HOW:
        noise = repeated(layer, ids, how, repeats=3) - layer.embeddings.numpy()
        assert np.all((np.abs(noise) > 1e-6).any(axis=(0, 1, 3)) == mask.any(axis=1))


# ---- closed forms ----

# class: (input shape, arguments)
KINDS = {
    "Dense": ((2, 4), {"units": 3}),
    "EinsumDense": ((3, 4), {"equation": "abc,cde->abde", "output_shape": (3, 2, 2), "bias_axes": "de"}),
    "Embedding": ((4,), {"input_dim": 5, "output_dim": 3}),
    "Conv1D": ((6, 2), {"filters": 3, "kernel_size": 3, "dilation_rate": 2}),
    "Conv2D": ((4, 4, 4), {"filters": 4, "kernel_size": 3, "groups": 2}),
    "Conv3DTranspose": ((2, 2, 2, 2), {"filters": 2, "kernel_size": 2, "strides": 2}),
    "DepthwiseConv1D": ((2, 5), {"kernel_size": 3, "depth_multiplier": 2, "data_format": "channels_first"}),
}


def inputs(kind, batch=3):
    shape, _ = KINDS[kind]
    if kind == "Embedding":
        return np.random.randint(0, 5, (batch, *shape))
    return np.random.normal(size=(batch, *shape)).astype("float32")


@pytest.mark.parametrize("kind", KINDS)
def test_flipout_has_the_exact_marginals_and_independent_examples(kind):
    layer, x = built(kind, KINDS[kind][0], **KINDS[kind][1]), inputs(kind)
    x[1] = x[0]
    repeats = 600
    values = repeated(layer, x, "flipout", repeats=repeats)
    mean, variance = moments(layer, x)
    noise = values - mean
    # Five standard errors; flipout's noise of one example is Gaussian, as its weights are.
    np.testing.assert_array_less(np.abs(noise.mean(0)), 5 * np.sqrt(variance / repeats) + 1e-5)
    np.testing.assert_array_less(np.abs(noise.var(0) - variance), 5 * variance * np.sqrt(2 / repeats) + 1e-5)
    # The same input twice: separate draws would have uncorrelated noise, one shared draw a covariance of `variance`.
    products = noise[:, 0] * noise[:, 1]
    error = products.std(0) / np.sqrt(repeats)
    np.testing.assert_array_less(np.abs(products.mean(0)), 5 * error + 1e-5)


@pytest.mark.parametrize(
    ("equation", "shape"),
    [("ab...,bc->ac...", (2,)), ("abx...,bc->acx...", (2, 5)), ("abxd,bc->acxd", (2, 5, 6)), ("...b,bc->...c", None)],
)
def test_flipout_gives_every_position_one_draw(equation, shape):
    """Variance of the sum over positions p of sum_b x_bp delta_bc: sum_b (sum_p x_bp)^2 sigma_bc^2."""
    channels = -1 if shape is None else 1
    layer = built("EinsumDense", (3, 5, 6), equation=equation, output_shape=shape or 2)
    x, repeats = np.random.normal(size=(2, 3, 5, 6)).astype("float32"), 600
    values = repeated(layer, x, "flipout", repeats=repeats)
    sums = np.moveaxis(values, channels + (channels > 0), -1).sum(axis=(2, 3))  # (repeats, batch, channels)
    totals = np.moveaxis(x, channels, -1).sum(axis=(1, 2))  # (batch, channels)
    variance = totals**2 @ layer.scale("kernel") ** 2
    np.testing.assert_array_less(np.abs(sums.var(0) - variance), 5 * variance * np.sqrt(2 / repeats))


@pytest.mark.parametrize("touched", [[0, 1, 2], [1]])
def test_local_noise_has_the_exact_marginals(touched):
    mask = np.zeros((4, 3), bool)
    mask[1:, touched] = True
    bias = np.array([False, True, False])
    layer = built("Dense", (4,), {"kernel": mask, "bias": bias}, units=3)
    x = np.random.normal(size=(2, 4)).astype("float32")
    x[1] = x[0]
    repeats = 2000
    noise = repeated(layer, x, "local", repeats=repeats) - (x @ layer.kernel.numpy() + layer.bias.numpy())
    variance = x**2 @ layer.scale("kernel") ** 2 + layer.scale("bias") ** 2
    np.testing.assert_array_less(np.abs(noise.mean(0)), 5 * np.sqrt(variance / repeats) + 1e-5)
    np.testing.assert_array_less(np.abs(noise.var(0) - variance), 5 * variance * np.sqrt(2 / repeats) + 1e-5)
    products = noise[:, 0] * noise[:, 1]
    np.testing.assert_array_less(np.abs(products.mean(0)), 5 * products.std(0) / np.sqrt(repeats) + 1e-5)
    assert np.all((noise.std(0) > 1e-4) == np.isin(np.arange(3), touched))


@pytest.mark.parametrize("how", HOW)
def test_loss_and_gradients_are_unbiased_on_a_linear_model(how):
    """E[loss] = (x mu + b - t)^2 + x^2 sigma^2 + sigma_b^2, and its derivatives by mu and sigma, averaged over x."""
    mask = np.array([[True], [False], [True]])
    layer = built("Dense", (3,), {"kernel": mask, "bias": np.array([True])}, units=1)
    x = np.random.normal(size=(6, 3)).astype("float32")
    target = np.random.normal(size=(6, 1)).astype("float32")
    repeats = 4000
    weights = [layer.kernel, layer.bias, *(w for w in layer.trainable_weights if "scale" in w.name)]

    @tf.function
    def draw():
        def one(_):
            with tf.GradientTape() as tape, layers.batch_draws(how, num_samples=3):
                loss = ops.mean((layer(x) - target) ** 2)
            return [loss, *tape.gradient(loss, weights)]

        return tf.map_fn(one, tf.range(repeats), fn_output_signature=[tf.float32] * (1 + len(weights)))

    found = [values.numpy().reshape(repeats, -1) for values in draw()]
    residual = x @ layer.kernel.numpy() + layer.bias.numpy() - target
    scale, scale_of_bias = layer.scale("kernel")[mask[:, 0]], layer.scale("bias")
    squares = x[:, mask[:, 0]] ** 2
    expected = [
        np.mean(residual**2 + squares @ scale**2 + scale_of_bias**2),
        np.mean(2 * residual * x, axis=0),
        np.mean(2 * residual),
        # d sigma / d rho of sigma = softplus(rho) is 1 - exp(-sigma)
        np.mean(2 * squares, axis=0) * scale[:, 0] * -np.expm1(-scale[:, 0]),
        2 * scale_of_bias * -np.expm1(-scale_of_bias),
    ]
    for values, value in zip(found, expected, strict=True):
        error = values.std(0) / np.sqrt(repeats)
        np.testing.assert_array_less(np.abs(values.mean(0) - np.ravel(value)), 4 * error)


def test_local_gradients_are_finite_where_there_is_no_variance():
    mask = np.zeros((3, 2), bool)
    mask[0] = True
    layer = built("Dense", (3,), {"kernel": mask}, units=2)
    x = tf.constant([[0.0, 1.0, 2.0], [1.0, 0.0, 0.0]])  # the first example has no Bayesian input
    with tf.GradientTape() as tape, layers.batch_draws("local"):
        tape.watch(x)
        loss = ops.sum(layer(x) ** 2)
    for gradient in tape.gradient(loss, [x, *layer.trainable_weights]):
        assert np.all(np.isfinite(ops.convert_to_numpy(gradient)))


# ---- a layer used twice ----


@pytest.mark.parametrize("how", HOW)
@pytest.mark.parametrize("kind", ["Conv2D", "SeparableConv2D"])
def test_a_layer_used_twice_has_the_same_draws(kind, how):
    layer = built(kind, (4, 4, 2), filters=3, kernel_size=2)
    x = np.random.normal(size=(4, 4, 4, 2)).astype("float32")
    with layers.batch_draws(how, num_samples=2):
        first, second = layer(x), layer(x)
    with layers.batch_draws(how, num_samples=2):
        third = layer(x)
    np.testing.assert_array_equal(first, second)
    assert np.max(np.abs(first - third)) > 1e-3


def test_local_noise_is_for_layers_that_are_used_once():
    layer, x = built("Dense", (4,), units=3), np.ones((2, 4), "float32")
    with layers.batch_draws("local"), pytest.raises(ValueError, match=r"used twice.*shared=\[layer\]"):
        layer(x)
        layer(x)
    with layers.batch_draws("local", shared=[layer]):
        np.testing.assert_array_equal(layer(x), layer(x))
    for ranks in ((2, 3), (3, 2)):  # noise on the outputs fits one of the two uses
        with layers.batch_draws("local"), pytest.raises(ValueError, match=r"used twice.*shared=\[layer\]"):
            for rank in ranks:
                layer(np.ones((2, 1, 4) if rank == 3 else (2, 4), "float32"))


def test_a_sequential_model_that_was_built_twice_keeps_noise_on_its_outputs(tmp_path):
    """Keras then counts two uses of each layer. Flipout's noise of a unit with one Bayesian entry has one size."""
    model = keras.Sequential([keras.Input((2,))])
    for units in (2, 1):  # each `add` builds the model anew, and so does loading it
        model.add(layers.Dense(units, use_bias=False, num_bayesian=units, kl_weight=0.1, initial_scale=0.5, seed=3))
    model.save(tmp_path / "model.keras")
    for one in (model, keras.saving.load_model(tmp_path / "model.keras")):
        layer = one.layers[0]
        layer.set_mask(np.array([[True, False], [False, False]]))
        assert len(layer._inbound_nodes) > 1
        with layers.batch_draws("local"):
            noise = layer(np.ones((20, 2), "float32")) - np.ones((20, 2)) @ layer.kernel.numpy()
        assert len(np.unique(np.round(np.abs(noise[:, 0]), 4))) > 15  # flipout: one number times a sign
        assert np.all(noise[:, 1] == 0)


@pytest.mark.parametrize(("kind", "how"), [("Dense", "flipout"), ("Embedding", "flipout"), ("Dense", "split")])
def test_a_layer_used_at_two_ranks_has_the_same_draws(kind, how):
    """(B, ...) and (B, T, ...), T = B among them: at every position what the layer gives it alone."""
    arguments = {"units": 3} if kind == "Dense" else {"input_dim": 5, "output_dim": 3}
    layer = built(kind, (4,) if kind == "Dense" else (), **arguments)
    for batch, length in ((4, 4), (4, 3)):
        shape = (batch, length, 4) if kind == "Dense" else (batch, length)
        x = np.random.normal(size=shape).astype("float32") if kind == "Dense" else np.random.randint(0, 5, shape)
        for first in (0, 1):
            with layers.batch_draws(how, num_samples=2):
                found = [layer(x)] if first else []
                found.append(ops.stack([layer(x[:, t]) for t in range(length)], axis=1))
                found.append(found[0] if first else layer(x))
            np.testing.assert_allclose(found[-2], found[-1], rtol=1e-5, atol=1e-6)


def test_contexts_within_contexts():
    layer, x = built("Dense", (4,), units=3), np.ones((4, 4), "float32")
    with layers.batch_draws("flipout"):
        with layers.posterior_mean():
            np.testing.assert_allclose(layer(x), x @ layer.kernel.numpy() + layer.bias.numpy(), rtol=1e-6)
        with layers.posterior_sample():
            y = layer(x).numpy()
            np.testing.assert_array_equal(y, np.tile(y[:1], (4, 1)))  # one draw for all
        assert np.max(np.ptp(layer(x).numpy(), axis=0)) > 1e-3


# ---- precision, errors ----


@pytest.mark.parametrize("how", HOW)
@pytest.mark.parametrize("kind", ["Dense", "Conv2DTranspose", "Embedding"])
def test_mixed_precision(how, kind):
    if kind == "Embedding":
        layer, x = built(kind, (4,), input_dim=5, output_dim=3, dtype="mixed_bfloat16"), np.zeros((5, 4), int)
    else:
        shape, arguments, _ = FEW[kind]
        layer = built(kind, shape, **arguments, dtype="mixed_bfloat16")
        x = np.random.normal(size=(5, *shape)).astype("float32")
    with tf.GradientTape() as tape, layers.batch_draws(how, num_samples=2):
        y = layer(x)
        loss = ops.sum(ops.cast(y, "float32") ** 2)
    assert y.dtype == "bfloat16" and np.all(np.isfinite(ops.convert_to_numpy(ops.cast(y, "float32"))))
    assert all(np.any(ops.convert_to_numpy(g) != 0) for g in tape.gradient(loss, layer.trainable_weights))


@pytest.mark.parametrize("entries", [[0, 1, 2], [1]])
@pytest.mark.parametrize(("size", "scale"), [(300.0, 0.01), (1.0, 1e-4)])
def test_local_noise_in_half_precision(size, scale, entries):
    """The standard deviation of four outputs x_i w_i is |x| scale, where squares are too large or small for float16."""
    mask = np.zeros((4, 3), bool)
    mask[:, entries] = True
    layer = built("Dense", (4,), {"kernel": mask}, initial_scale=scale, units=3, use_bias=False, dtype="mixed_float16")
    layer.kernel.assign(ops.zeros((4, 3)))
    x = np.full((4000, 4), size, "float32")
    with layers.batch_draws("local"):
        y = np.asarray(layer(x), "float64")
    assert layer(x).dtype == "float16"
    np.testing.assert_allclose(y[:, entries].std(0), 2 * size * scale, rtol=5 / np.sqrt(2 * len(x)))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("halves",), r"one of \('split', 'flipout', 'local'\). Received: how='halves'"),
        (("split", 0), "num_samples, an integer >= 1. Received: num_samples=0"),
        (("split", 2.0), "Received: num_samples=2.0"),
    ],
)
def test_errors_say_what_was_expected_and_received(arguments, message):
    with pytest.raises(ValueError, match=message), layers.batch_draws(*arguments):
        pass


# ---- the noise of a training step


def test_the_draws_of_a_step_are_normal_uncorrelated_and_share_their_noise():
    layer = built("Dense", (64,), mask={"kernel": np.ones((64, 128), bool)}, units=128)
    for compiled in (False, True):

        def five(layer=layer):
            with computed_once():
                return ops.stack([layer.posteriors.offsets("kernel", s) for s in range(5)])

        drawn = (tf.function(five) if compiled else five)().numpy() / layer.scale("kernel").ravel()
        assert min(stats.kstest(one, "norm").pvalue for one in drawn) > 1e-3
        correlations = np.corrcoef(drawn)[np.triu_indices(5, 1)]
        assert np.abs(correlations).max() < 4.5 / np.sqrt(8192) and np.abs(correlations).min() > 0
        np.testing.assert_allclose(*np.sort(np.abs(drawn[:2]), axis=1), rtol=1e-5)
    apart = np.sort(np.abs([ops.convert_to_numpy(layer.posteriors.offsets("kernel", s)) for s in range(2)]), axis=1)
    assert np.abs(apart[0] - apart[1]).max() > 1e-3  # outside a step nothing is shared


@pytest.mark.parametrize("features", ["normal", "relu", "ones"])
def test_a_step_of_shared_noise_has_the_mean_and_the_variance_of_independent_draws(features):
    """`(c @ w)**2` of five draws w ~ N(loc, scale): the mean is `m**2 + v`, the variance `(2 v**2 + 4 m**2 v) / 5`."""
    layer = built("Dense", (64,), mask={"kernel": np.ones((64, 64), bool)}, units=64)
    c = np.random.default_rng(1).normal(size=4096) / 64
    c = {"normal": c, "relu": np.maximum(c, 0), "ones": np.full(4096, 1 / 64)}[features]
    scale, m = layer.scale("kernel").ravel(), 0.3
    v = (c**2) @ scale**2

    @tf.function
    def steps():
        def one(_):
            with computed_once():
                drawn = ops.stack([layer.posteriors.offsets("kernel", s) for s in range(5)])
            return ops.mean((drawn @ ops.convert_to_tensor(c[:, None], "float32") + m) ** 2)

        return tf.map_fn(one, tf.range(4000), fn_output_signature="float32")

    found, variance = steps().numpy().astype("float64"), (2 * v**2 + 4 * m**2 * v) / 5
    assert abs(found.mean() - (m**2 + v)) < 4 * np.sqrt(variance / 4000)
    spread = np.sqrt(np.mean((found - found.mean()) ** 4) - found.var() ** 2) / np.sqrt(4000)
    assert abs(found.var() - variance) < 4 * spread


@pytest.mark.parametrize("dtype", ["float32", "float64", "mixed_bfloat16"])
@pytest.mark.parametrize("posterior", ["gaussian", "mixture"])
@pytest.mark.parametrize("estimator", ["all", "split"])
def test_a_step_of_shared_noise_is_the_same_compiled_and_eager_and_runs_by_xla(dtype, posterior, estimator):
    x, y = np.random.default_rng(0).normal(size=(8, 64)), np.ones((8, 1))
    losses = {}
    for name, how in {"graph": {}, "eager": {"run_eagerly": True}, "xla": {"jit_compile": True}}.items():
        keras.utils.set_random_seed(0)
        once = keras.layers.Dense(64, "tanh", name="shared", dtype=dtype)
        inputs = keras.Input((64,), dtype="float64" if dtype == "float64" else None)
        outputs = keras.layers.Dense(1, dtype=dtype)(once(once(inputs)))
        options = {"num_train": 8, "posterior": posterior, "estimator": estimator, "seed": 0}
        model = to_partial_bayes(keras.Model(inputs, outputs), {"shared/kernel": np.ones((64, 64), bool)}, **options)
        model.compile("adam", "mse", **how)
        losses[name] = model.fit(x, y, epochs=3, verbose=0, shuffle=False).history["nll"]
    tolerance = 0.02 if dtype == "mixed_bfloat16" else 1e-4
    np.testing.assert_allclose(losses["eager"], losses["graph"], rtol=tolerance)
    assert np.isfinite(losses["xla"]).all()  # XLA has random numbers of its own
