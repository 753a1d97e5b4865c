"""Laws of the wrapper, against the layer that it wraps: its outputs, updates, losses, files and gradients."""

import keras
import numpy as np
import pytest
from keras import layers as kl

from sbn_tf import layers
from sbn_tf.core import noise
from sbn_tf.core.conversion import convert
from sbn_tf.core.wrapper import MaskedWrapper
from sbn_tf.saliency import named_weights

tensorflow = pytest.mark.tensorflow


@keras.saving.register_keras_serializable(package="test_wrapper")
class Own(keras.Model):
    """A subclassed model: sublayers of Keras's numbering, batch norm, dropout, and a loss of its own."""

    def __init__(self, units=4, **kwargs):
        super().__init__(**kwargs)
        self.units = units
        self.first = kl.Dense(units, activity_regularizer="l2", kernel_regularizer="l2")
        self.norm, self.drop, self.last = kl.BatchNormalization(), kl.Dropout(0.5, seed=3), kl.Dense(2)

    def call(self, x, training=None):
        hidden = self.drop(self.norm(self.first(x)))
        self.add_loss(keras.ops.mean(hidden**2))
        return self.last(hidden)

    def get_config(self):
        return {**super().get_config(), "units": self.units}


@keras.saving.register_keras_serializable(package="test_wrapper")
class Shift(kl.Layer):
    """A layer whose output Keras finds by tracing its call, with a weight of its own."""

    def build(self, input_shape):
        self.shift = self.add_weight(shape=input_shape[1:], initializer="normal", name="shift")

    def call(self, x):
        return x + keras.ops.convert_to_tensor(self.shift)


# name: (layer, weights of it that become Bayesian, call)
KINDS = {
    "MultiHeadAttention": (lambda: kl.MultiHeadAttention(2, 3), ["query/kernel", "attention_output/bias"], "twice"),
    "GroupQueryAttention": (lambda: kl.GroupQueryAttention(2, 4, 2), ["value/kernel"], "twice"),
    "LSTM": (lambda: kl.LSTM(3, return_sequences=True, return_state=True), ["lstm_cell/recurrent_kernel"], "once"),
    "GRU": (lambda: kl.GRU(3), ["gru_cell/kernel", "gru_cell/bias"], "once"),
    "Bidirectional": (lambda: kl.Bidirectional(kl.LSTM(2, name="rnn")), ["backward_rnn/lstm_cell/kernel"], "once"),
    "LayerNormalization": (kl.LayerNormalization, ["gamma", "beta"], "once"),
    "BatchNormalization": (kl.BatchNormalization, ["gamma"], "once"),
    "TimeDistributed": (lambda: kl.TimeDistributed(kl.Dense(2, name="each")), ["each/kernel"], "once"),
    "Sequential": (lambda: keras.Sequential([kl.Dense(2, name="a"), kl.LSTM(2)]), ["a/kernel"], "once"),
    "Own": (lambda: Own(name="own"), ["first/kernel"], "once"),
}


def inputs(batch=4, seed=0, dtype="float32"):
    return np.random.default_rng(seed).normal(size=(batch, 5, 4)).astype(dtype)


def called(kind, layer, x, **kwargs):
    outputs = layer(x, x, **kwargs) if KINDS[kind][2] == "twice" else layer(x, **kwargs)
    return [np.asarray(t) for t in keras.tree.flatten(outputs)]


def build(kind, x=None, **ours):
    """A stock layer with random weights, and a wrapper of another one with the same weights."""
    x = inputs() if x is None else x
    stock, inner = KINDS[kind][0](), KINDS[kind][0]()
    called(kind, stock, x)
    called(kind, inner, x)
    if kind == "Own":
        for layer in (stock, inner):
            layer.first.name = "first"
    random = np.random.default_rng(1)
    stock.set_weights([random.uniform(0.1, 0.9, w.shape) for w in stock.get_weights()])
    inner.set_weights(stock.get_weights())
    if not {"mask", "num_bayesian"} & set(ours):
        ours["num_bayesian"] = dict.fromkeys(KINDS[kind][1], 2)
    wrapper = MaskedWrapper(inner, **{"kl_weight": 0.1, "initial_scale": 0.5, "seed": 0, **ours})
    wrapper.build()
    return stock, wrapper


def without_noise(wrapper, untransformed=-200.0):
    for name in wrapper.posteriors:
        variable = wrapper.posteriors[name].untransformed_scale
        variable.assign(np.full(variable.shape, untransformed))


# ---- what it computes ----


@pytest.mark.parametrize("kind", KINDS)
def test_without_noise_it_is_the_wrapped_layer(kind):
    x = inputs()
    stock, wrapper = build(kind)
    expected = called(kind, stock, x)
    noisy = called(kind, wrapper, x)
    with layers.posterior_mean():
        for found, right in zip(called(kind, wrapper, x), expected, strict=True):
            np.testing.assert_array_equal(found, right)
    without_noise(wrapper)
    for found, right in zip(called(kind, wrapper, x), expected, strict=True):
        np.testing.assert_array_equal(found, right)
    assert any(np.abs(a - b).max() > 1e-4 for a, b in zip(noisy, expected, strict=True))


@pytest.mark.parametrize("kind", KINDS)
def test_a_draw_is_the_layer_with_the_drawn_weights(kind):
    x = inputs()
    stock, wrapper = build(kind)
    weights = named_weights(stock)
    with layers.posterior_sample():
        draws = {name: np.asarray(wrapper.posteriors.draws()[name]) for name in wrapper.posteriors}
        found = called(kind, wrapper, x)
    for name, draw in draws.items():
        mask = np.asarray(weights[name].variable) != draw
        np.testing.assert_array_equal(mask, wrapper.mask(name))  # and only there
        assert mask.sum() == 2
        weights[name].variable.assign(draw)
    for a, b in zip(found, called(kind, stock, x), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-6)
    for before, after in zip(stock.weights, wrapper.layer.weights, strict=True):  # the locs did not move
        if before.path not in {weights[n].variable.path for n in draws}:
            np.testing.assert_array_equal(before, after)


def test_arguments_masks_and_states_pass_through():
    x = inputs()
    stock, wrapper = build("MultiHeadAttention")
    without_noise(wrapper)
    allowed = np.tril(np.ones((4, 5, 5), bool))
    arguments = {"key": x[:, ::-1], "attention_mask": allowed, "return_attention_scores": True}
    for found, right in zip(wrapper(x, x, **arguments), stock(x, x, **arguments), strict=True):
        np.testing.assert_array_equal(found, right)
    stock, wrapper = build("LSTM")
    without_noise(wrapper)
    states = [np.ones((4, 3), "float32"), np.zeros((4, 3), "float32")]
    for found, right in zip(wrapper(x, initial_state=states), stock(x, initial_state=states), strict=True):
        np.testing.assert_array_equal(found, right)


def test_masks_of_an_embedding_reach_the_layer_and_go_on():
    tokens = np.array([[1, 2, 0, 0], [3, 0, 0, 0]])
    embedding = kl.Embedding(4, 4, mask_zero=True)
    stock, wrapper = build("LSTM")
    without_noise(wrapper)
    x = embedding(tokens)
    np.testing.assert_array_equal(wrapper(x)[0], stock(x)[0])
    np.testing.assert_array_equal(np.asarray(wrapper(x)[0])[0, 2], np.asarray(wrapper(x)[0])[0, 1])
    _, norm = build("LayerNormalization")
    np.testing.assert_array_equal(norm(x)._keras_mask, tokens > 0)
    symbolic = norm(embedding(keras.Input((4,), dtype="int32")))
    assert symbolic.shape == (None, 4, 4) and symbolic._keras_mask is not None


@pytest.mark.parametrize("kind", ["BatchNormalization", "Own"])
def test_statistics_and_seeds_move_as_in_the_layer(kind):
    x = inputs(8)
    stock, wrapper = build(kind)
    without_noise(wrapper)
    for _ in range(2):
        for found, right in zip(
            called(kind, wrapper, x, training=True), called(kind, stock, x, training=True), strict=True
        ):
            np.testing.assert_allclose(found, right, atol=1e-6)
    assert len(stock.variables) > len(stock.trainable_variables)
    for before, after in zip(stock.variables, wrapper.layer.variables, strict=True):
        np.testing.assert_allclose(before, after, atol=1e-6, err_msg=before.path)


def test_losses_are_counted_once():
    x = inputs(8)
    stock, wrapper = build("Own", kl_weight=0.0)
    without_noise(wrapper, -20.0)
    called("Own", stock, x)
    called("Own", wrapper, x)
    assert len(stock.losses) == 3 and len(wrapper.losses) == 4  # the KL, of weight 0, is the fourth
    np.testing.assert_allclose(sum(map(float, wrapper.losses)), sum(map(float, stock.losses)), rtol=1e-6)


def test_an_outer_scope_is_heard():
    x = inputs()
    stock, wrapper = build("LayerNormalization", mask={"gamma": np.array([True, False, False, False])})
    without_noise(wrapper)
    gamma, beta = wrapper.layer.gamma, wrapper.layer.beta
    new = [np.arange(4.0, dtype="float32"), np.ones(4, "float32")]
    with keras.StatelessScope([(gamma, new[0]), (beta, new[1])]):
        found = np.asarray(wrapper(x))
    stock.set_weights(new)
    np.testing.assert_allclose(found, stock(x), atol=1e-6)
    assert np.all(np.asarray(gamma) < 1)
    stock, wrapper = build("BatchNormalization")
    mean = wrapper.layer.moving_mean
    before = np.asarray(mean)
    with keras.StatelessScope() as scope:
        wrapper(x, training=True)
        updated = scope.get_current_value(mean)
    np.testing.assert_array_equal(mean, before)
    stock(x, training=True)
    np.testing.assert_allclose(updated, stock.moving_mean, atol=1e-6)


# ---- gradients ----


@tensorflow
@pytest.mark.parametrize("kind", ["MultiHeadAttention", "GRU"])
def test_gradients_equal_finite_differences(monkeypatch, kind):
    import tensorflow as tf

    monkeypatch.setattr(noise, "standard_normal", lambda size, seed, dtype="float32": tf.ones((size,), dtype) * 0.7)
    keras.config.set_dtype_policy("float64")
    try:
        x = inputs(dtype="float64")
        _, wrapper = build(kind, x=x)
        name = KINDS[kind][1][0]
        loc, rho = wrapper.loc(name), wrapper.posteriors[name].untransformed_scale

        def loss():
            outputs = wrapper(x, x) if kind == "MultiHeadAttention" else wrapper(x)
            return tf.reduce_sum(outputs**2)

        with tf.GradientTape() as tape:
            value = loss()
        step = 1e-6
        for variable, gradient in zip((loc, rho), tape.gradient(value, [loc.value, rho.value]), strict=True):
            base = np.array(variable)
            for place in [(0,) * base.ndim, tuple(n - 1 for n in base.shape)]:
                values = []
                for sign in (1, -1):
                    moved = base.copy()
                    moved[place] += sign * step
                    variable.assign(moved)
                    values.append(float(loss()))
                variable.assign(base)
                np.testing.assert_allclose(gradient[place], (values[0] - values[1]) / (2 * step), rtol=1e-6, atol=1e-8)
    finally:
        keras.config.set_dtype_policy("float32")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_custom_layer_of_mixed_precision_has_the_dtype_of_the_layer_in_a_graph(dtype):
    def graph(layer):
        entry = keras.Input((5, 4), dtype=dtype)
        return keras.Model(entry, layer(entry))

    stock = graph(Shift(dtype="mixed_bfloat16", name="shift"))
    ours = convert(stock, {"shift/shift": np.ones((5, 4), bool)}, {"kl_weight": 0.0, "initial_scale": 1e-6})
    assert isinstance(ours.layers[-1], MaskedWrapper) and ours.output.dtype == stock.output.dtype == "bfloat16"
    np.testing.assert_array_equal(ours(inputs()), stock(inputs()))


@pytest.mark.parametrize("policy", ["mixed_float16", "mixed_bfloat16"])
def test_the_layers_precision_is_kept(policy):
    inner = kl.MultiHeadAttention(2, 3, dtype=policy)
    wrapper = MaskedWrapper(inner, num_bayesian={"query/kernel": 2}, kl_weight=0.1)
    outputs = wrapper(inputs(), inputs())
    assert keras.backend.standardize_dtype(outputs.dtype) == policy.removeprefix("mixed_")
    draw = wrapper.posteriors.draws()["query/kernel"]
    assert keras.backend.standardize_dtype(draw.dtype) == "float32"
    assert {v.dtype for v in wrapper.trainable_variables} == {"float32"}


def test_fit_moves_locs_and_scales_of_a_plain_model():
    x = inputs(16)
    given = keras.Input((5, 4))
    hidden = MaskedWrapper(kl.LSTM(3), num_bayesian={"lstm_cell/kernel": 3}, kl_weight=0.01)(given)
    own = Own()
    outputs = MaskedWrapper(own, num_bayesian={f"{own.first.name}/kernel": 2}, kl_weight=0.01)(hidden)
    model = keras.Model(given, outputs)
    names = [v.path for v in model.trainable_variables]
    before = [np.array(v) for v in model.trainable_variables]
    model.compile(keras.optimizers.SGD(0.1), "mse")
    model.fit(x, np.ones((16, 2)), epochs=2, verbose=0)
    after = [np.array(v) for v in model.trainable_variables]
    still = [n for n, a, b in zip(names, before, after, strict=True) if np.array_equal(a, b)]
    assert not still and all(np.isfinite(a).all() for a in after)


# ---- several draws in one call ----


@pytest.mark.parametrize(
    ("how", "kind", "batch"),
    [
        *(("split", "MultiHeadAttention", 7), ("split", "LSTM", 7), ("split", "Own", 7)),
        *(("split", "GRU", 2), ("flipout", "GRU", 2), ("local", "GRU", 2)),
    ],
)
def test_parts_of_a_batch_see_what_separate_calls_see(how, kind, batch):
    x = inputs(batch)
    _, wrapper = build(kind)
    first = np.array(wrapper.posteriors.noise_seed.state)
    with layers.batch_draws(how, num_samples=3):
        whole, again = called(kind, wrapper, x), called(kind, wrapper, x)
    for a, b in zip(whole, again, strict=True):
        np.testing.assert_array_equal(a, b)  # one context, one draw of the network
    losses = [float(loss) for loss in wrapper.losses]
    wrapper.posteriors.noise_seed.state.assign(first)
    parts, added = [], 0.0
    for s in range(3):
        rows = slice(s * batch // 3, (s + 1) * batch // 3)
        with layers.posterior_sample():
            parts.append(called(kind, wrapper, x[rows] if len(x[rows]) else x[:1]))
        parts[-1] = [p[: len(x[rows])] for p in parts[-1]]
        added += sum(map(float, wrapper._losses)) * len(x[rows]) / batch
    for found, *right in zip(whole, *parts, strict=True):
        np.testing.assert_allclose(found, np.concatenate(right), atol=1e-6)
    if kind == "Own":
        regularizers = sum(map(float, wrapper.losses)) - sum(map(float, wrapper._losses))
        np.testing.assert_allclose(sum(losses), added + regularizers, rtol=1e-5)


@keras.saving.register_keras_serializable(package="test_wrapper")
class Table(kl.Layer):
    """Rows of a table of T rows, added at each of T positions."""

    def build(self, shape, *args):
        self.gain = self.add_weight(name="gain", shape=(shape[-1],), initializer="ones")

    def call(self, x, table=None):
        return x * self.gain + table


@pytest.mark.parametrize("graph", ["none", "open", "static"])
@pytest.mark.parametrize("size", [3, 5])
def test_a_mask_of_as_many_rows_as_the_batch_is_not_cut(graph, size):
    """attention_mask (T, T) holds for every example, also where T is the size of the batch."""
    stock, wrapper = build("MultiHeadAttention")
    without_noise(wrapper)
    x = np.random.default_rng(2).normal(size=(size, size, 4)).astype("float32")
    allowed = np.tril(np.ones((size, size), bool))
    right = np.asarray(stock(x, x, attention_mask=allowed))
    batched = np.stack([allowed] * size)
    for mask in (allowed, batched):
        if graph == "none":
            found = lambda mask=mask: wrapper(x, x, attention_mask=mask)  # noqa: E731
        else:
            given = keras.Input((size, 4), batch_size=size if graph == "static" else None)
            model = keras.Model(given, wrapper(given, given, attention_mask=allowed))
            found = lambda model=model: model(x)  # noqa: E731
        with layers.batch_draws("split", num_samples=2):
            np.testing.assert_allclose(found(), right, atol=1e-5)


def test_a_constant_of_as_many_rows_as_the_batch_is_not_cut(tmp_path):
    """In a Functional model of open batch size: what is no input has no rows of examples."""
    table = np.arange(20.0, dtype="float32").reshape(5, 4)
    wrapper = MaskedWrapper(Table(name="table"), num_bayesian={"gain": 2}, kl_weight=0.1, initial_scale=1e-8)
    given = keras.Input((5, 4))
    model = keras.Model(given, wrapper(given, table=table))
    x = inputs(5)
    with layers.batch_draws("split", num_samples=2):
        np.testing.assert_allclose(model(x), x + table, atol=1e-5)


def test_parts_of_a_batch_of_unknown_size_are_never_empty():
    given = keras.Input((5, 4))
    _, wrapper = build("Own")
    model = keras.Model(given, wrapper(given))

    class Split(keras.Model):
        def call(self, x, training=None):
            with layers.batch_draws("split", num_samples=3):
                return model(x, training=training)

    split = Split()
    split.compile("sgd", "mse")
    for batch in (2, 7):
        x = inputs(batch)
        outputs = split.predict(x, verbose=0)
        assert outputs.shape == (batch, 5, 2) and np.isfinite(outputs).all()
    split.fit(inputs(2), np.ones((2, 5, 2)), verbose=0)
    assert all(np.isfinite(np.asarray(v)).all() for v in split.variables)


# ---- files ----


@pytest.mark.parametrize("kind", ["MultiHeadAttention", "Bidirectional", "Own"])
def test_round_trip(tmp_path, kind):
    x = inputs()
    _, wrapper = build(kind)
    given = keras.Input((5, 4))
    model = keras.Model(given, called_symbolically(kind, wrapper, given))
    model.save(tmp_path / "m.keras")
    loaded = keras.models.load_model(tmp_path / "m.keras")  # here Keras numbers the sublayers of Own anew
    again = next(x for x in layers.masked_layers(loaded))
    assert again.num_bayesian == wrapper.num_bayesian and again.get_config()["seed"] == 0
    for name in wrapper.posteriors:
        np.testing.assert_array_equal(again.mask(name), wrapper.mask(name))
        np.testing.assert_array_equal(again.scale(name), wrapper.scale(name))
    with layers.posterior_mean():
        np.testing.assert_array_equal(loaded(x), model(x))
    model.save_weights(tmp_path / "m.weights.h5")
    loaded.set_weights([np.zeros_like(w) for w in loaded.get_weights()])
    loaded.load_weights(tmp_path / "m.weights.h5")
    with layers.posterior_mean():
        np.testing.assert_array_equal(loaded(x), model(x))


def called_symbolically(kind, layer, x):
    return layer(x, x) if KINDS[kind][2] == "twice" else layer(x)


# name: (layer, its inputs)
WITH_LORA = {
    "Dense": (lambda: kl.Dense(3), (2, 4)),
    "EinsumDense": (lambda: kl.EinsumDense("ab,bc->ac", 3, bias_axes="c"), (2, 4)),
    "Embedding": (lambda: kl.Embedding(5, 3), (2, 4)),
    "Conv1D": (lambda: kl.Conv1D(3, 2), (2, 4, 3)),
}


@pytest.mark.parametrize("kind", WITH_LORA)
@pytest.mark.parametrize("file", ["model.keras", "checkpoint.weights.h5"])
def test_lora_factors_come_back_from_a_file_as_they_were(kind, file, tmp_path):
    """Keras itself saves them merged into the kernel and as zeros, by which draws of them would have no effect."""
    make, shape = WITH_LORA[kind]
    layer, rng = make(), np.random.default_rng(0)
    x = rng.integers(0, 5, shape) if kind == "Embedding" else rng.normal(size=shape).astype("float32")
    y = keras.Input(shape[1:], dtype=x.dtype.name)
    stock = keras.Model(y, layer(y))
    layer.enable_lora(2)
    factors = {key: weight.variable for key, weight in named_weights(stock).items() if "lora" in key}
    for variable in factors.values():
        variable.assign(rng.normal(size=variable.shape))
    model = convert(stock, {key: np.ones(v.shape, bool) for key, v in factors.items()}, {"kl_weight": 0.1}, seed=0)
    assert sum(model.layers[-1].num_bayesian.values()) == sum(int(np.prod(v.shape)) for v in factors.values())
    values = [np.array(v) for v in model.weights]
    (model.save if file.endswith(".keras") else model.save_weights)(tmp_path / file)
    if file.endswith(".keras"):
        again = keras.saving.load_model(tmp_path / file)
    else:
        again = keras.models.clone_model(model)
        again.load_weights(tmp_path / file)
    for name, before, after in zip([v.path for v in model.weights], values, again.weights, strict=True):
        np.testing.assert_array_equal(after, before, err_msg=name)
    with layers.posterior_mean():
        np.testing.assert_array_equal(again(x), model(x))


def test_a_file_holds_the_weights_once_where_keras_saves_them_as_they_are():
    for kind in ("LSTM", "Own"):
        store = {}
        _, wrapped = build(kind)
        wrapped.posteriors.save_own_variables(store)
        assert set(store) == {name.replace("/", ".") for name in wrapped.num_bayesian}


def test_a_wrapped_layer_is_not_quantized_as_long_as_it_is_bayesian(tmp_path):
    """The other layers are; Keras warns, as of each layer that it leaves as it is."""
    x, rng = keras.Input((4, 3)), np.random.default_rng(0)
    attention = MaskedWrapper(kl.MultiHeadAttention(2, 3), num_bayesian={"query/kernel": 5}, kl_weight=0.1, seed=0)
    model, data = keras.Model(x, kl.Dense(2, name="head")(attention(x, x))), rng.normal(size=(2, 4, 3))
    with pytest.warns(UserWarning, match="'multi_head_attention.*' is Bayesian: it cannot be quantized"):
        model.quantize("int8")
    assert {v.dtype for v in attention.weights} == {"float32", "int64"}
    assert model.get_layer("head").kernel.dtype == "int8"
    model.save(tmp_path / "model.keras")
    again = keras.saving.load_model(tmp_path / "model.keras")
    with layers.posterior_mean():
        np.testing.assert_array_equal(again(data), model(data))
    with pytest.raises(NotImplementedError, match="LoRA cannot be enabled"):
        attention.layer.query_dense.enable_lora(2)


def test_a_wrapped_layer_of_points_is_quantized(tmp_path):
    wrapper = MaskedWrapper(kl.Dense(3), num_bayesian={"kernel": 5}, kl_weight=0.1, seed=0)
    model, x = keras.Sequential([keras.Input((4,)), wrapper]), np.ones((2, 4), "float32")
    wrapper.set_mask({"kernel": np.zeros((4, 3), bool)})
    model.quantize("int8")
    assert wrapper.layer.kernel.dtype == "int8"
    model.save(tmp_path / "model.keras")
    np.testing.assert_array_equal(keras.saving.load_model(tmp_path / "model.keras")(x), model(x))


def test_it_builds_the_layer_at_its_first_call():
    wrapper = MaskedWrapper(kl.LSTM(3), num_bayesian={"lstm_cell/kernel": 5}, kl_weight=0.1)
    assert not wrapper.built and wrapper(inputs()).shape == (4, 3)
    assert wrapper.mask("lstm_cell/kernel").sum() == 5 and wrapper.name.startswith("lstm")
    names = ["kernel", "bias", "gamma", "beta", "mean", "variance", "last_kernel", "last_bias"]
    own = MaskedWrapper(Own(), num_bayesian={"last_kernel": 3}, kl_weight=0.1, weight_names=names)
    assert own(inputs()).shape == (4, 5, 2) and own.loc("last_kernel") is own.layer.last.kernel
    with pytest.raises(ValueError, match=r"Expected 7 weights.*Received: 8"):
        MaskedWrapper(Own(), num_bayesian={"bias": 3}, kl_weight=0.1, weight_names=names[1:])(inputs())


def test_set_mask_chooses_anew():
    _, wrapper = build("GRU")
    mask = np.zeros(wrapper.loc("gru_cell/recurrent_kernel").shape, bool)
    mask[0, :3] = True
    wrapper.set_mask({"gru_cell/recurrent_kernel": mask})
    assert wrapper.num_bayesian == {"gru_cell/recurrent_kernel": 3}
    np.testing.assert_array_equal(wrapper.mask("gru_cell/recurrent_kernel"), mask)
    assert not wrapper.mask("gru_cell/kernel").any()
    assert np.abs(np.asarray(wrapper(inputs())) - np.asarray(wrapper(inputs()))).max() > 0


def test_kl_is_that_of_its_entries():
    _, wrapper = build("LSTM", kl_weight=0.25)
    name = "lstm_cell/recurrent_kernel"
    loc = np.asarray(wrapper.loc(name))[wrapper.mask(name)].astype("float64")
    by_hand = np.sum(0.5 * (loc**2 + 0.5**2 - 1) - np.log(0.5))
    np.testing.assert_allclose(float(wrapper.kl_divergence()), by_hand, rtol=1e-5)
    np.testing.assert_allclose(float(sum(wrapper.losses)), 0.25 * by_hand, rtol=1e-5)


# ---- the wrong call ----


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_bayesian": 3}, "as a dict by weight"),
        ({"num_bayesian": {"kernel": 3}}, "among .*gamma.*Received: .*kernel"),
        ({"mask": {"gamma": np.ones(3, bool)}}, "boolean mask of shape"),
        ({"num_bayesian": {"gamma": 5}}, "at most 4 Bayesian"),
        ({"num_bayesian": {"gamma": 1}, "kl_weight": None}, "no kl_weight"),
    ],
)
def test_errors_say_what_was_expected(arguments, message):
    with pytest.raises(ValueError, match=message):
        build("LayerNormalization", **arguments)


def test_only_layers_are_wrapped():
    with pytest.raises(ValueError, match="Received: layer=3"):
        MaskedWrapper(3)


def test_a_weight_that_the_layer_assigns_to_is_refused():
    layer = kl.SpectralNormalization(kl.Dense(2))
    layer(inputs())
    wrapper = MaskedWrapper(layer, num_bayesian={"kernel": 2}, kl_weight=0.1)
    assert wrapper(inputs()).shape == (4, 5, 2)
    with pytest.raises(ValueError, match="assigns to its weight 'kernel'"):
        wrapper(inputs(), training=True)


def test_a_stateful_layer_is_not_called_on_parts():
    wrapper = MaskedWrapper(kl.GRU(2, stateful=True), num_bayesian={"gru_cell/kernel": 2}, kl_weight=0.1)
    first, second = (np.asarray(wrapper(inputs())) for _ in range(2))
    assert np.abs(first - second).max() > 0
    with layers.batch_draws("split", num_samples=2), pytest.raises(ValueError, match="stateful"):
        wrapper(inputs())
