"""Laws of conversion: what comes out equals the original without noise, counts exactly, and finds the way back."""

import subprocess
import sys

import keras
import numpy as np
import pytest
import tensorflow_probability as tfp
from keras import layers as kl
from keras import ops

from sbn_tf import layers
from sbn_tf.core.conversion import convert, copied, to_deterministic
from sbn_tf.core.wrapper import MaskedWrapper
from sbn_tf.partial_bayes import to_partial_bayes
from sbn_tf.saliency import Masks, named_weights, saliency, top_k

tfd = tfp.distributions


@keras.saving.register_keras_serializable(package="test_conversion")
class Block(kl.Layer):
    """A custom layer with a weight and a sublayer of its own, made in `build`."""

    def __init__(self, units, **kwargs):
        super().__init__(**kwargs)
        self.units = units

    def build(self, shape):
        self.gain = self.add_weight(name="gain", shape=(shape[-1],), initializer="uniform")
        self.inner = kl.Dense(self.units)
        self.inner.build(shape)

    def call(self, x):
        return self.inner(x * self.gain)

    def get_config(self):
        return {**super().get_config(), "units": self.units}


@keras.saving.register_keras_serializable(package="test_conversion")
class Wide(kl.Dense):
    """A subclass of a layer that has a masked twin: what it does with the weights is its own."""

    def call(self, x):
        return super().call(x) * 2.0


@keras.saving.register_keras_serializable(package="test_conversion")
class Own(keras.Model):
    """A subclassed model on a dict of inputs, tokens among them."""

    def __init__(self, units=3, words=7, **kwargs):
        super().__init__(**kwargs)
        self.units, self.words = units, words
        self.table, self.mix, self.norm = kl.Embedding(words, units), kl.Dense(units), kl.BatchNormalization()
        self.head = kl.Dense(1, activation="sigmoid")

    def call(self, inputs, training=None):
        hidden = ops.mean(self.table(inputs["tokens"]), axis=1) + self.mix(inputs["image"])
        return self.head(self.norm(hidden, training=training))

    def get_config(self):
        return {**super().get_config(), "units": self.units, "words": self.words}


def full(model, keys=None):
    keys = [k for k, w in named_weights(model).items() if w.variable.trainable] if keys is None else keys
    return Masks({k: np.ones(w.variable.shape, bool) for k, w in named_weights(model).items() if k in keys})


def some(model, share=0.3):
    return top_k(saliency(model, score="random"), share)


def network_of(model, masks=None, **options):
    options = {"kl_weight": 0.1, "initial_scale": 0.5, **options}
    return convert(model, some(model) if masks is None else masks, options, seed=0)


def outputs_of(model, x, **kwargs):
    return [np.asarray(t) for t in keras.tree.flatten(model(x, **kwargs))]


def check(model, x, network=None):
    """Equal to the original at the mean and with scales of 0, noisy with others; the original is as it was."""
    before = [np.array(v) for v in model.variables]
    network = network_of(model) if network is None else network
    assert isinstance(network, keras.Model) and network.outputs and network.name == model.name
    expected = outputs_of(model, x)
    noisy = outputs_of(network, x)
    assert any(not np.array_equal(a, b) for a, b in zip(noisy, expected, strict=True))
    with layers.posterior_mean():
        for a, b in zip(outputs_of(network, x), expected, strict=True):
            np.testing.assert_array_equal(a, b)
    for layer in layers.masked_layers(network):
        for name in layer.posteriors:
            scale = layer.posteriors[name].untransformed_scale
            scale.assign(np.full(scale.shape, -2000.0))
    for a, b in zip(outputs_of(network, x), expected, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-7)
    for a, b in zip(before, model.variables, strict=True):
        np.testing.assert_array_equal(a, b)
    return network


def randomized(model):
    random = np.random.default_rng(0)
    model.set_weights([random.uniform(0.1, 0.9, w.shape).astype(w.dtype) for w in model.get_weights()])
    return model


@pytest.fixture(scope="module")
def mixed():
    """Layers with a twin, layers without one, custom ones, a Lambda and operations of keras.ops; its inputs."""
    x = keras.Input((5, 6), name="x")
    h = kl.MultiHeadAttention(2, 3, name="attention")(x, x)
    h = kl.LayerNormalization(name="norm")(h + x)
    h = kl.Bidirectional(kl.GRU(2, return_sequences=True, name="gru"), name="both")(h)
    h = kl.TimeDistributed(kl.Dense(4, name="each"), name="times")(h)
    h = Block(4, name="block")(kl.Lambda(lambda t: t * 2.0, name="double")(h))
    h = Wide(3, name="wide")(ops.relu(h) - ops.mean(h, axis=1, keepdims=True))
    h = kl.Conv1D(2, 3, name="conv")(h)
    model = keras.Model(x, kl.Dense(1, activation="sigmoid", name="head")(kl.Flatten()(h)), name="mixed")
    return randomized(model), np.random.default_rng(1).normal(size=(4, 5, 6)).astype("float32")


# ---- any model ----


def test_layers_become_twins_or_are_wrapped(mixed):
    model, x = mixed
    keys = [k for k in named_weights(model) if not k.startswith("norm")]
    network = check(model, x, network_of(model, full(model, keys)))
    kinds = {layer.name: type(layer) for layer in layers.masked_layers(network)}
    wrapped = dict.fromkeys(["attention", "both", "times", "block", "wide"], MaskedWrapper)
    assert kinds == {**wrapped, "conv": layers.Conv1D, "head": layers.Dense}
    assert [o.name for o in network.operations] == [o.name for o in model.operations]
    assert type(network.get_layer("norm")) is kl.LayerNormalization
    counts = {f"{x.name}/{k}": n for x in layers.masked_layers(network) for k, n in x.num_bayesian.items()}
    assert counts == {k: int(np.prod(w.variable.shape)) for k, w in named_weights(model).items() if k in keys}


def test_a_prior_at_the_trained_weights_is_centred_there_in_wrapped_layers_too(mixed, tmp_path):
    model, _ = mixed
    keys = [k for k in named_weights(model) if not k.startswith("norm")]
    partial = to_partial_bayes(model, full(model, keys), num_train=10, prior_at_loc=True, initial_scale=0.5)
    size = sum(int(np.prod(named_weights(model)[key].variable.shape)) for key in keys)
    expected = size * float(tfd.kl_divergence(tfd.Normal(0.0, 0.5), tfd.Normal(0.0, 1.0)))
    assert float(partial.kl_divergence()) == pytest.approx(expected, rel=1e-5)
    for layer in layers.masked_layers(partial.network):
        for name in layer.posteriors:
            layer.loc(name).assign_add(keras.ops.ones_like(layer.loc(name)))
    partial.save(tmp_path / "moved.keras")
    moved = keras.saving.load_model(tmp_path / "moved.keras", safe_mode=False).kl_divergence()
    assert float(moved) == pytest.approx(expected + 0.5 * size, rel=1e-5)  # each loc is one away from its centre


def test_masks_reach_the_weights_that_they_name(mixed):
    model, _ = mixed
    masks = some(model)
    network = network_of(model, masks)
    found = {
        f"{layer.name}/{name}": layer.mask(name) for layer in layers.masked_layers(network) for name in layer.posteriors
    }
    chosen = {key: mask for key, mask in dict(masks).items() if mask.any()}
    assert set(found) == set(chosen) and {"attention/query/kernel", "both/forward_gru/gru_cell/kernel"} <= set(found)
    for key, mask in chosen.items():
        np.testing.assert_array_equal(found[key], mask)


def test_it_trains_saves_and_returns(mixed, tmp_path):
    model, x = mixed
    masks = some(model)
    bnn = to_partial_bayes(model, masks, num_train=40, num_samples=1, seed=0)
    bnn.compile(keras.optimizers.SGD(0.1), "binary_crossentropy")
    before = [np.array(v) for v in bnn.trainable_variables]
    bnn.fit(x, np.ones((4, 1)), verbose=0)
    moved = [not np.array_equal(a, b) for a, b in zip(before, bnn.trainable_variables, strict=True)]
    assert np.mean(moved) > 0.8 and bnn.num_bayesian == masks.num_bayesian
    bnn.save(tmp_path / "bnn.keras")
    loaded = keras.models.load_model(tmp_path / "bnn.keras", safe_mode=False)  # for the Lambda, as ever in Keras
    plain = to_deterministic(loaded)
    with layers.posterior_mean():
        expected = outputs_of(bnn.network, x)[0]
        np.testing.assert_array_equal(outputs_of(loaded.network, x)[0], expected)
    np.testing.assert_array_equal(outputs_of(plain, x)[0], expected)
    np.testing.assert_array_equal(loaded.scales(), bnn.scales())


def test_a_subclassed_model_is_wrapped_whole(tmp_path):
    model = Own(4, name="own")
    random = np.random.default_rng(0)
    x = {"tokens": random.integers(7, size=(6, 3)), "image": random.normal(size=(6, 5)).astype("float32")}
    model(x)
    randomized(model)
    masks = some(model)
    network = check(model, x, network_of(model, masks))
    assert [type(layer) for layer in layers.masked_layers(network)] == [MaskedWrapper]
    assert set(network.input) == {"tokens", "image"} and network.output_shape == (None, 1)
    bnn = to_partial_bayes(
        model, masks, num_train=6, num_samples=2, probabilities="sigmoid", batch_norm="train", seed=0
    )
    bnn.compile(keras.optimizers.SGD(0.1), "binary_crossentropy")
    statistics = bnn.network.layers[-1].layer.norm.moving_mean
    before = np.array(statistics)
    bnn.fit(x, np.ones((6, 1)), verbose=0)
    assert np.abs(np.asarray(statistics) - before).max() > 0
    bnn.save(tmp_path / "own.keras")
    loaded = keras.models.load_model(tmp_path / "own.keras")
    with layers.posterior_mean():
        expected = outputs_of(bnn.network, x)[0]
        np.testing.assert_array_equal(outputs_of(loaded.network, x)[0], expected)
    assert loaded.num_bayesian == masks.num_bayesian
    np.testing.assert_array_equal(outputs_of(to_deterministic(loaded), x)[0], expected)


class Net(keras.Model):
    """A Functional subclass, as KerasHub's backbones are: its own constructor around a graph."""

    def __init__(self, units=3, **kwargs):
        x = keras.Input((4,))
        dense = kl.Dense(units, name="dense")
        super().__init__(inputs=x, outputs=kl.Dense(2, name="head")(dense(x)), **kwargs)
        self.dense = dense

    def get_config(self):
        return {"units": 3, "name": self.name}


class Twice(Net):
    """And one whose call is more than its graph."""

    def call(self, x, training=None):
        return 2.0 * super().call(x, training=training)


@pytest.mark.parametrize(("cls", "kinds"), [(Net, [layers.Dense] * 2), (Twice, [MaskedWrapper])])
def test_functional_subclasses(cls, kinds):
    x = np.random.default_rng(0).normal(size=(3, 4)).astype("float32")
    model = randomized(cls(name="net"))
    network = check(model, x, network_of(model, full(model)))
    assert [type(layer) for layer in layers.masked_layers(network)] == kinds


def test_nested_shared_and_structured():
    a, b = keras.Input((4, 3), name="a"), keras.Input((4, 3), name="b")
    shared = kl.LSTM(2, name="shared")
    tower = keras.Sequential([kl.LayerNormalization(name="norm"), kl.Dense(2, name="dense")], name="tower")
    inner_x = keras.Input((2,))
    inner = keras.Model(inner_x, [tower(inner_x), kl.Dense(1, name="dense")(inner_x)], name="inner")
    first, second = inner(shared(a) + shared(b))
    again = tower(shared(b))
    outputs = {"one": kl.Dense(1, name="one")(first + again), "two": second}
    model = randomized(keras.Model({"a": a, "b": b}, outputs, name="whole"))
    random = np.random.default_rng(0)
    x = {k: random.normal(size=(3, 4, 3)).astype("float32") for k in ("a", "b")}
    network = network_of(model, full(model))
    assert [type(layer).__name__ for layer in layers.masked_layers(network)].count("MaskedWrapper") == 2
    assert set(network.output) == {"one", "two"} and len(named_weights(model)) == len(full(model))
    with layers.posterior_sample():
        drawn = outputs_of(network.get_layer("shared"), x["a"])
        np.testing.assert_array_equal(drawn, outputs_of(network.get_layer("shared"), x["a"]))
    check(model, x, network)
    assert set(to_deterministic(network).output) == {"one", "two"}


def test_frozen_stays_frozen():
    x = keras.Input((3, 4))
    h = kl.LSTM(2, name="cold")(x)
    tower = keras.Sequential([kl.Dense(3, name="a"), kl.BatchNormalization(name="norm")], name="tower")
    model = keras.Model(x, kl.Dense(1, name="head")(kl.Dense(2, name="half")(tower(h))))
    model.get_layer("cold").trainable = False
    tower.trainable = False
    model.get_layer("half").bias.trainable = False
    masks = some(model)
    assert {k.split("/")[0] for k, m in dict(masks).items() if m.any()} <= {"half", "head"}
    for copy in (network := network_of(model, masks), to_deterministic(network)):
        assert not copy.get_layer("cold").trainable and not copy.get_layer("tower").trainable
        assert not copy.get_layer("tower").get_layer("norm").trainable
        paths = sorted(v.path for v in copy.trainable_variables if "posterior" not in v.path)
        assert paths == ["half/kernel", "head/bias", "head/kernel"]
    network = network_of(model, full(model, ["cold/lstm_cell/kernel", "head/kernel"]))
    assert sorted(v.path for v in network.trainable_variables if "posterior" in v.path) == [
        "head/kernel_posterior/untransformed_scale"
    ]


def test_regularizers_constraints_and_precision_are_kept():
    options = {"kernel_regularizer": "l2", "kernel_constraint": "non_neg", "activity_regularizer": "l1"}
    x = keras.Input((3, 4), dtype="float64")
    h = kl.LSTM(2, name="lstm", dtype="float64", **options)(x)
    model = randomized(keras.Model(x, kl.Dense(1, name="head", dtype="float64", **options)(h)))
    data = np.random.default_rng(0).normal(size=(5, 3, 4))
    network = network_of(model, full(model, ["lstm/lstm_cell/kernel", "head/kernel"]), kl_weight=0.0)
    check(model, data, network)
    assert {v.dtype for v in network.trainable_variables} == {"float64"}
    for layer in layers.masked_layers(network):
        for name in layer.posteriors:  # a small scale, not 0: a KL of infinity times its weight of 0 is NaN
            scale = layer.posteriors[name].untransformed_scale
            scale.assign(np.full(scale.shape, -40.0))
    model(data)
    network(data)
    np.testing.assert_allclose(float(sum(network.losses)), float(sum(model.losses)), rtol=1e-9)
    bnn = to_partial_bayes(model, full(model, ["lstm/lstm_cell/kernel", "head/kernel"]), num_train=5, num_samples=2)
    bnn.compile(keras.optimizers.SGD(100.0), "mse")
    bnn.fit(data, np.zeros((5, 1)), verbose=0)
    for key in ("lstm/lstm_cell/kernel", "head/kernel"):
        layer = bnn.network.get_layer(key.split("/")[0])
        assert float(np.min(layer.loc(key.split("/", 1)[1]))) == 0.0  # the step went far below


@pytest.mark.tensorflow  # on JAX Keras leaves such a model without the shapes of its inputs
@pytest.mark.parametrize("policy", ["mixed_bfloat16", "mixed_float16", "bfloat16"])
def test_tokens_are_not_rounded_in_half_precision(policy, tmp_path):
    """bfloat16 tells 256 integers apart, float16 2,048."""
    tokens = np.array([[257, 2049, 1001], [2999, 258, 2050]])
    x = {"tokens": tokens, "image": np.full((2, 5), 0.75, "float32")}
    keras.config.set_dtype_policy(policy)
    try:
        model = Own(4, words=3000, name="own")
        model(x)
        model.table.embeddings.assign(np.random.default_rng(0).normal(size=(3000, 4)))
        network = network_of(model)
        assert {t.name: t.dtype for t in network.inputs}["tokens"] == "int32"
        network.save(tmp_path / "own.keras")
        for one in (network, keras.models.load_model(tmp_path / "own.keras")):
            with layers.posterior_mean():
                np.testing.assert_array_equal(outputs_of(one, x)[0], outputs_of(model, x)[0])
    finally:
        keras.config.set_dtype_policy("float32")


@pytest.mark.tensorflow
def test_tokens_that_are_a_part_of_an_input_are_refused_in_half_precision():
    class Columns(keras.Model):
        def __init__(self, **kwargs):
            super().__init__(**kwargs)
            self.table, self.head = kl.Embedding(3000, 2, name="table"), kl.Dense(1)

        def call(self, x):
            return self.head(self.table(x[:, 0]) + x[:, 1:])

    keras.config.set_dtype_policy("mixed_bfloat16")
    try:
        model = Columns(name="columns")
        model(np.ones((2, 3), "float32"))
        with pytest.raises(ValueError, match=r"bfloat16 rounds large ones. Received: .*table"):
            network_of(model)
    finally:
        keras.config.set_dtype_policy("float32")
    model = Columns(name="columns")
    model(np.ones((2, 3), "float32"))
    check(model, np.array([[2999.0, 0.5, 0.25]], "float32"))


def test_adapted_statistics_are_copied():
    scale = kl.Normalization(name="scale")
    scale.adapt(np.random.default_rng(0).normal(3.0, 2.0, size=(50, 4)))
    x = keras.Input((4,))
    model = keras.Model(x, kl.Dense(1, name="head")(scale(x)))
    check(model, np.full((2, 4), 5.0, "float32"))


@pytest.mark.tensorflow  # JAX has no strings
def test_adapted_vocabularies_are_copied():
    words = kl.StringLookup(name="words")
    words.adapt(np.array(["liver", "lung", "lung"]))
    given = keras.Input((1,), dtype="string")
    looked = keras.Model(given, kl.Flatten()(kl.Embedding(4, 2, name="table")(words(given))))
    network = network_of(looked)
    with layers.posterior_mean():
        tokens = np.array([["lung"], ["heart"]])
        np.testing.assert_array_equal(
            network(keras.ops.convert_to_tensor(tokens)), looked(ops.convert_to_tensor(tokens))
        )


@pytest.mark.tensorflow
@pytest.mark.parametrize("pad", [False, True])
def test_adapted_document_frequencies_are_copied(pad):
    words = kl.TextVectorization(output_mode="tf_idf", max_tokens=6, pad_to_max_tokens=pad)
    words.adapt(["liver lung", "lung", "lung heart"])
    model = keras.Sequential([keras.Input((), dtype="string"), words, kl.Dense(1)])
    text = ops.convert_to_tensor(["lung liver", "heart heart", "spleen"])
    check(model, text)
    assert len(np.unique(np.asarray(words(text)))) > 3


@pytest.mark.tensorflow  # JAX has no ragged tensors
def test_ragged_inputs_stay_ragged():
    x = keras.Input((None,), dtype="int32", ragged=True)
    model = keras.Model(x, kl.Dense(1)(kl.GlobalAveragePooling1D()(kl.Embedding(5, 3)(x))))
    assert [t.ragged for t in network_of(model).inputs] == [True]


@pytest.mark.tensorflow
@pytest.mark.parametrize("kind", ["functional", "sequential", "nested"])
def test_sparse_inputs_stay_sparse(kind, tmp_path):
    import tensorflow as tf

    x, dense = keras.Input((4,), sparse=True, name="words"), kl.Dense(3, name="dense")
    model = keras.Model(x, dense(x)) if kind == "functional" else keras.Sequential([x, dense])
    if kind == "nested":
        model = keras.Sequential([x, model])
    bayes = network_of(model)
    bayes.save(tmp_path / "model.keras")
    data = np.eye(4, dtype="float32")[:2] * 3
    for one in (bayes, copied(model), to_deterministic(bayes), keras.saving.load_model(tmp_path / "model.keras")):
        assert one.inputs[0].sparse and one.inputs[0].name == "words"
        with layers.posterior_mean():
            np.testing.assert_allclose(one(tf.sparse.from_dense(data)), model(data), rtol=1e-6)


@pytest.mark.tensorflow
@pytest.mark.parametrize("estimator", ["all", "split", "flipout", "local"])
def test_sparse_inputs_are_trained_on_by_every_estimator(estimator):
    import tensorflow as tf

    model = keras.Sequential([keras.Input((4,), sparse=True), kl.Dense(3), kl.Dense(2)])
    mask = Masks({next(iter(named_weights(model))): np.ones((4, 3), bool)})
    options = {"num_train": 4, "initial_scale": 1e-6, "beta": 1e-9, "terms_per_example": 1}
    bnn = to_partial_bayes(model, mask, estimator=estimator, seed=0, **options)
    bnn.compile("sgd", "mse")
    x = np.eye(4, dtype="float32")
    loss = bnn.fit(tf.sparse.from_dense(x), np.zeros((4, 2)), batch_size=4, verbose=0).history["loss"][0]
    assert loss == pytest.approx(np.mean(np.square(model(x))), rel=1e-3)


def test_optional_inputs_stay_optional():
    x, y = keras.Input((3,), name="x"), keras.Input((3,), name="y", optional=True)

    class Plus(kl.Layer):
        def call(self, x, y=None):
            return x if y is None else x + y

    model = keras.Model([x, y], kl.Dense(1)(Plus()(x, y)))
    data = np.ones((2, 3), "float32")
    network = check(model, [data, data])
    with layers.posterior_mean():
        np.testing.assert_array_equal(network([data, None]), model([data, None]))
    assert [t.name for t in network.inputs] == ["x", "y"]


# ---- back again ----


def test_to_deterministic_needs_this_package_no_more(tmp_path):
    x = keras.Input((5, 4))
    h = kl.MultiHeadAttention(1, 2, name="attention")(x, x)
    h = kl.TimeDistributed(layers.Dense(3, num_bayesian=4, kl_weight=0.1, name="each"), name="times")(h)
    h = kl.BatchNormalization(name="norm")(layers.Conv1D(2, 2, num_bayesian=3, kl_weight=0.1, name="conv")(h))
    network = randomized(keras.Model(x, kl.Dense(1, name="head")(h), name="net"))
    network.get_layer("norm").trainable = False
    plain = to_deterministic(network)
    assert [layer.name for layer in plain.layers] == [layer.name for layer in network.layers]
    assert type(plain.get_layer("conv")) is kl.Conv1D and type(plain.get_layer("times").layer) is kl.Dense
    assert "sbn_tf" not in plain.to_json() and not plain.compiled and not plain.get_layer("norm").trainable
    data = np.random.default_rng(0).normal(size=(2, 5, 4)).astype("float32")
    with layers.posterior_mean():
        expected = np.asarray(network(data))
    np.testing.assert_array_equal(plain(data), expected)
    plain.save(tmp_path / "plain.keras")
    np.savez(tmp_path / "data.npz", data=data, expected=expected)
    code = (
        "import sys, keras, numpy as np\n"
        "model = keras.models.load_model(sys.argv[1] + '/plain.keras')\n"
        "data = np.load(sys.argv[1] + '/data.npz')\n"
        "np.testing.assert_allclose(model(data['data']), data['expected'], atol=1e-6)\n"
        "assert not [name for name in sys.modules if name.startswith('sbn_tf')]\n"
        "print('equal')"
    )
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, timeout=300)
    assert done.stdout.strip() == "equal", done.stderr[-2000:]


def test_classes_derived_from_ours():
    """One that adds a method is its stock layer; one with a call of its own is not."""

    @keras.saving.register_keras_serializable(package="test_conversion")
    class Named(layers.Dense):
        pass

    class Doubled(layers.Dense):
        def call(self, x):
            return 2.0 * super().call(x)

    x, data = keras.Input((3,)), np.ones((2, 3), "float32")
    model = keras.Model(x, Named(2, num_bayesian=1, kl_weight=0.1)(x))
    plain = to_deterministic(model)
    assert type(plain.layers[-1]) is kl.Dense
    with layers.posterior_mean():
        np.testing.assert_array_equal(plain(data), model(data))
    with pytest.raises(ValueError, match=r"the call of `keras.layers.Dense`. Received: 'twice', whose class Doubled"):
        to_deterministic(keras.Model(x, Doubled(2, num_bayesian=1, kl_weight=0.1, name="twice")(x)))


def test_masked_layers_that_a_custom_layer_makes_are_named():
    class Maker(kl.Layer):
        def __init__(self, **kwargs):
            super().__init__(**kwargs)
            self.inner = layers.Dense(2, num_bayesian=2, kl_weight=0.1, name="deep")

        def build(self, shape):
            self.inner.build(shape)

        def call(self, x):
            return self.inner(x)

    x = keras.Input((3,))
    with pytest.raises(ValueError, match=r"'maker' \(Maker\) makes the masked layers \['deep'\]"):
        to_deterministic(keras.Model(x, Maker(name="maker")(x)))


# ---- the wrong call ----


def test_what_cannot_be_copied_is_named():
    class Closed(kl.Layer):
        def __init__(self, function, **kwargs):
            super().__init__(**kwargs)
            self.function = function

        def build(self, shape):
            self.gain = self.add_weight(name="gain", shape=(shape[-1],), initializer="ones")

        def call(self, x):
            return self.function(x) * self.gain

    x = keras.Input((3,))
    model = keras.Model(x, kl.Dense(1, name="head")(Closed(lambda t: t, name="closed")(x)))
    with pytest.raises(ValueError, match=r"'closed' \(Closed\) cannot be made again") as error:
        network_of(model)
    assert len(str(error.value).splitlines()) == 2


def test_a_config_that_leaves_arguments_out_is_named():
    class Forgetful(kl.Layer):
        def __init__(self, units=2, **kwargs):
            super().__init__(**kwargs)
            self.units = units

        def build(self, shape):
            self.kernel = self.add_weight(name="kernel", shape=(shape[-1], self.units))

        def call(self, x):
            return x @ self.kernel

        def get_config(self):
            return super().get_config()

    x = keras.Input((3,))
    model = keras.Model(x, ops.sum(kl.Dense(2, name="head")(Forgetful(2, name="f")(x)), axis=-1))
    check(model, np.ones((2, 3), "float32"))
    model = keras.Model(x, ops.sum(Forgetful(5, name="f")(kl.Dense(3, name="first")(x)), axis=-1))
    with pytest.raises(ValueError, match=r"'f' \(Forgetful\) has other weights"):
        network_of(model, full(model, ["first/kernel"]))


def test_weights_that_the_outputs_do_not_see_are_named():
    model = Net()
    model.aside = kl.Dense(2, name="aside")
    model.aside.build((None, 3))
    with pytest.raises(ValueError, match="do not depend on: aside/kernel"):
        network_of(model, full(model, ["aside/kernel", "dense/kernel"]))
    network_of(model, full(model, ["dense/kernel"]))


def test_a_weight_shared_behind_keras_s_back_is_named():
    class Tied(kl.Layer):
        def __init__(self, other=None, **kwargs):
            super().__init__(**kwargs)
            self.other = other

        def call(self, x):
            return x @ ops.transpose(self.other.kernel)

        def get_config(self):
            return {**super().get_config(), "other": keras.saving.serialize_keras_object(self.other)}

        @classmethod
        def from_config(cls, config):
            return cls(**{**config, "other": keras.saving.deserialize_keras_object(config["other"])})

        def build(self, shape):
            if not self.other.built:
                self.other.build((None, 3))

    x, dense = keras.Input((3,)), kl.Dense(2, name="dense")
    model = keras.Model(x, Tied(dense, name="tied")(dense(x)))
    with pytest.raises(ValueError, match="share the weight 'dense/kernel'"):
        network_of(model, full(model, ["dense/kernel"]))


def test_bayesian_and_unbuilt_models_are_refused():
    model = Net()
    network = network_of(model)
    with pytest.raises(ValueError, match="Bayesian entries already"):
        network_of(network, full(model))
    with pytest.raises(ValueError, match="Expected a built"):
        convert(keras.Sequential([kl.Dense(1)]), {}, {})


@pytest.mark.tensorflow  # on JAX Keras leaves such a model without the shapes of its inputs, and that is said instead
def test_a_subclassed_model_must_be_symbolic():
    class Eager(keras.Model):
        def __init__(self):
            super().__init__()
            self.dense = kl.Dense(2)

        def call(self, x):
            return self.dense(x) * float(np.asarray(x).max())

        def get_config(self):
            return {}

    model = Eager()
    model(np.ones((1, 3), "float32"))
    with pytest.raises(ValueError, match="cannot be called on symbolic inputs") as error:
        network_of(model)
    assert len(str(error.value).splitlines()) == 2


# ---- KerasHub ----


def test_backbones_of_keras_hub(tmp_path):
    hub = pytest.importorskip("keras_hub", reason="keras_hub, an optional extra, is not installed")
    random = np.random.default_rng(0)
    image = hub.models.ViTBackbone((8, 8, 3), patch_size=4, num_layers=1, num_heads=2, hidden_dim=4, mlp_dim=6)
    text = hub.models.BertBackbone(
        vocabulary_size=11, num_layers=1, num_heads=2, hidden_dim=4, intermediate_dim=6, max_sequence_length=5
    )
    pixels = random.normal(size=(2, 8, 8, 3)).astype("float32")
    tokens = {
        "token_ids": random.integers(11, size=(2, 5)),
        "segment_ids": np.zeros((2, 5), int),
        "padding_mask": np.ones((2, 5), int),
    }
    for model, x in ((image, pixels), (text, tokens)):
        masks = some(model, 0.1)
        check(model, x, network_of(model, masks))
        bnn = to_partial_bayes(model, masks, num_train=2, num_samples=1, seed=0)
        loss = None if model is image else {"sequence_output": None, "pooled_output": "mse"}
        bnn.compile(keras.optimizers.SGD(0.1), loss or "mse")
        y = keras.tree.map_structure(np.zeros_like, keras.tree.map_structure(np.asarray, model(x)))
        before = bnn.scales()
        bnn.fit(x, y, verbose=0)
        assert np.isfinite(bnn.scales()).all() and (bnn.scales() != before).any()
        assert bnn.num_bayesian == masks.num_bayesian
        bnn.save(tmp_path / "bnn.keras")
        loaded = keras.models.load_model(tmp_path / "bnn.keras")
        plain = to_deterministic(loaded)
        with layers.posterior_mean():
            expected = outputs_of(bnn.network, x)
            for a, b, c in zip(outputs_of(loaded.network, x), outputs_of(plain, x), expected, strict=True):
                np.testing.assert_array_equal(a, c)
                np.testing.assert_array_equal(b, c)


# ---- the one copier: each kind of state ----


def states():
    """Kind of state -> (inputs, model that has it)."""
    rng = np.random.default_rng(0)
    numbers, words = rng.normal(3.0, 2.0, (8, 2)).astype("float32"), np.array(["a b", "b c", "a a"])

    def sequential(layer, x, **options):
        return keras.Sequential([keras.Input(x.shape[1:], **options), layer])

    normalization, boundaries = kl.Normalization(), kl.Discretization(num_bins=3)
    lookup, text = kl.StringLookup(), kl.TextVectorization(output_sequence_length=3)
    for layer, data in ((normalization, numbers), (boundaries, numbers), (lookup, words), (text, words)):
        layer.adapt(data)
    norm = kl.BatchNormalization()
    trained = sequential(norm, numbers)
    norm.moving_mean.assign([1.0, 2.0])
    return {
        "weights": (numbers, sequential(kl.Dense(3, bias_initializer="uniform"), numbers)),
        "running statistics": (numbers, trained),
        "normalization": (numbers, sequential(normalization, numbers)),
        "boundaries": (numbers, sequential(boundaries, numbers)),
        "lookup": (words[:, None], sequential(lookup, words[:, None], dtype="string")),
        "text": (words[:, None], sequential(text, words[:, None], dtype="string")),
        "nested": (numbers, keras.Sequential([keras.Input((2,)), trained])),
    }


@pytest.mark.tensorflow  # JAX has no strings
@pytest.mark.parametrize(
    "kind", ["weights", "running statistics", "normalization", "boundaries", "lookup", "text", "nested"]
)
def test_a_copy_has_every_state_and_shares_none(kind):
    x, model = states()[kind]
    x, new = ops.convert_to_tensor(x), copied(model)
    before = np.array(model(x))
    np.testing.assert_array_equal(new(x), before)
    assert not {id(v) for v in new.variables} & {id(v) for v in model.variables}
    for variable in new.weights:
        variable.assign(ops.zeros_like(variable))
    np.testing.assert_array_equal(model(x), before)


def test_a_copy_has_the_seeds_and_what_trains():
    """With what `make` gives in a layer's place."""
    x = keras.Input((50,))
    model = keras.Model(x, kl.Dense(1, name="last")(kl.Dropout(0.5, seed=3)(kl.Dense(50, name="first")(x))))
    model.get_layer("first").trainable = False
    model.compile("sgd", "mse")
    new, data = copied(model), np.ones((1, 50), "float32")
    np.testing.assert_array_equal(new(data, training=True), model(data, training=True))
    assert [v.path for v in new.trainable_variables] == [v.path for v in model.trainable_variables]
    assert not new.compiled and model.compiled
    other = copied(model, lambda layer: type(layer).from_config({**layer.get_config(), "name": f"new_{layer.name}"}))
    assert [layer.name for layer in other.layers][1::2] == ["new_first", "new_last"]
    np.testing.assert_array_equal(other(data), model(data))
