"""The graph of a network: counts against traced graphs and by hand, what runs once against running everything anew."""

import contextlib
import re

import keras
import numpy as np
import pytest
import tensorflow as tf
from keras import layers as kl

from sbn_tf.core.graph import Graph
from sbn_tf.core.sampler import one_draw
from sbn_tf.cost import count_flops
from sbn_tf.experiments import networks
from sbn_tf.partial_bayes import to_partial_bayes
from sbn_tf.saliency import Masks, named_weights

S = 3


class Counted(kl.Layer):
    """The identity, which counts its calls."""

    calls = 0

    def call(self, x):
        """Count."""
        self.calls += 1
        return x

    def compute_output_shape(self, shape):
        """Unchanged."""
        return shape


def bayesian(model, keys, **options):
    """Every entry of the weights `keys` becomes Bayesian."""
    weights = named_weights(model)
    masks = Masks({key: np.ones(weights[key].variable.shape, bool) for key in keys})
    options = {"num_train": 10, "num_samples": S, "initial_scale": 0.1, "seed": 0, "probabilities": None, **options}
    return to_partial_bayes(model, masks, **options)


def dense(name, units=4):
    return kl.Dense(units, "tanh", name=name)


# ---- networks: each with the weights that become Bayesian and the layers that then run once ----


def chain():
    x = keras.Input((3,))
    y = dense("b")(Counted(name="count")(dense("a")(x)))
    return keras.Model(x, dense("c")(y)), ["b/kernel"], {"a", "count"}


def skips():
    x = keras.Input((3,))
    a = dense("a")(x)
    b = dense("b")(a)
    c = dense("c")(a)
    y = dense("d")(kl.Add(name="sum")([kl.Concatenate(name="both")([a, c]), kl.Concatenate(name="twice")([b, b])]))
    return keras.Model(x, y), ["b/bias"], {"a", "c", "both"}


def two_inputs():
    x, z = keras.Input((3,), name="x"), keras.Input((2,), name="z")
    y = kl.Concatenate(name="both")([dense("a")(x), dense("b")(Counted(name="count")(dense("c")(z)))])
    model = keras.Model({"x": x, "z": z}, {"one": dense("d")(y), "two": dense("e")(dense("f")(x))})
    return model, ["a/kernel"], {"b", "c", "count", "e", "f"}


def nested():
    """The nested model is entered: of its two inputs one depends on the draw."""
    x, z = keras.Input((4,)), keras.Input((4,))
    inner = keras.Model([x, z], kl.Add(name="sum")([dense("p")(x), dense("q")(Counted(name="count")(z))]), name="inner")
    x = keras.Input((3,))
    before = keras.Sequential([keras.Input((3,)), dense("r"), dense("s")], name="before")(x)
    return (
        keras.Model(x, inner([dense("a")(before), before])),
        ["a/kernel"],
        {
            *("before/r", "before/s", "inner/count", "inner/q"),
        },
    )


def shared():
    """A layer and a nested model that are used twice: before the draw, and after it."""
    again, twice = (
        dense("again"),
        keras.Sequential([keras.Input((4,)), dense("in"), Counted(name="count")], name="twice"),
    )
    x = keras.Input((4,))
    y = dense("b")(twice(again(x)))
    return keras.Model(x, twice(again(y))), ["b/kernel"], {"again", "twice/in", "twice/count"}


def masked():
    """Keras's masks go with what is shared."""
    x = keras.Input((6,), dtype="int32")
    y = dense("a")(kl.Embedding(5, 4, mask_zero=True, name="words")(x))
    z = kl.GlobalAveragePooling1D(name="mean")(kl.Dense(4, name="b")(y))
    return keras.Model(x, kl.Concatenate()([z, kl.LSTM(3, name="lstm")(y)])), ["b/kernel"], {"words", "a", "lstm"}


def functions():
    """Operations of keras.ops and keyword arguments."""
    x = keras.Input((5, 4))
    y = kl.MultiHeadAttention(2, 3, name="attention")(x, value=x, use_causal_mask=True)
    y = keras.ops.relu(y + 1.0) * x
    y, z = keras.ops.split(dense("b")(y), 2, axis=-1)
    return keras.Model(x, [y, z]), ["b/bias"], {"attention", "add", "relu", "multiply"}


NETWORKS = [chain, skips, two_inputs, nested, shared, masked, functions]


def inputs_of(model, batch=4):
    """Random inputs in the model's structure."""
    rng = np.random.default_rng(0)

    def one(x):
        shape = (batch, *x.shape[1:])
        return rng.integers(0, 5, shape) if x.dtype == "int32" else rng.normal(size=shape).astype("float32")

    return keras.tree.map_structure(one, model._inputs_struct)


def unshared(monkeypatch):
    monkeypatch.setattr(Graph, "sharing", lambda *a, **k: contextlib.nullcontext(set()))


def everything(make):
    """Samples, mean, evaluation and the weights after two training steps."""
    keras.utils.set_random_seed(0)
    model, keys, _ = make()
    x = inputs_of(model)
    y = keras.tree.map_structure(lambda a: np.zeros_like(a), model.predict(x, verbose=0))
    terms = {"terms_per_example": 1} if len(keras.tree.flatten(y)) > 1 else {}
    bnn = bayesian(model, keys, num_samples=2, **terms)  # a step traces each; in predictions they are a loop
    bnn.compile(keras.optimizers.SGD(0.1), "mse")
    found = [bnn.predict_samples(x, S), bnn.predict(x, verbose=0), bnn.evaluate(x, y, verbose=0)]
    found += [bnn.train_on_batch(x, y) for _ in range(2)]
    return [np.array(a) for a in keras.tree.flatten(found)] + [np.array(w) for w in bnn.weights]


@pytest.mark.parametrize("make", NETWORKS)
def test_running_the_trunk_once_changes_nothing(make, monkeypatch):
    once = everything(make)
    unshared(monkeypatch)
    for a, b in zip(once, everything(make), strict=True):
        np.testing.assert_allclose(a, b, rtol=2e-5, atol=1e-6)


@pytest.mark.parametrize("make", NETWORKS)
def test_what_runs_once(make):
    model, keys, expected = make()
    bnn = bayesian(model, keys)
    for training in (False, True):
        found = {re.sub(r"_\d+$", "", name) for name in Graph(bnn.network).runs_once(training)}  # Keras numbers its own
        assert expected == found - {"not_equal"}
    counters = [x for x in bnn.network._flatten_layers() if isinstance(x, Counted)]
    uses = [sum(step.layer is x for step in Graph(bnn.network).steps) for x in counters]
    for training in (True, False):
        for layer in counters:
            layer.calls = 0
        bnn(inputs_of(model), training=training)
        for layer, used in zip(counters, uses, strict=True):
            assert layer.calls == (1 if used == 1 else 1 + S)  # used twice: once in the trunk, once a sample after it


@pytest.mark.parametrize("build", ["resnet", "unet"])
def test_the_papers_networks_with_and_without(build, monkeypatch):
    def make():
        if build == "resnet":
            model = networks.resnet18((16, 16, 1), 2, width=4)
            return model, [k for k in named_weights(model) if "stage4" in k and "conv" in k], None
        model = networks.unet((16, 16, 1), 1, widths=(4, 6, 8))
        return model, [k for k in named_weights(model) if "encoder3" in k and "conv" in k], None

    model, keys, _ = make()
    assert keys, list(named_weights(model))
    ran = Graph(bayesian(model, keys).network).runs_once()
    assert 0.3 < len(ran) / len(Graph(model).steps) < 0.95
    once = everything(make)
    unshared(monkeypatch)
    for a, b in zip(once, everything(make), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)


# ---- what may differ is not shared ----


def noisy(rate):
    x = keras.Input((3,))
    y = dense("c")(kl.Dropout(rate, name="drop")(dense("a")(x)))
    return keras.Model(x, kl.Dense(1, name="b")(y))


def test_dropout_differs_between_samples_in_training_alone():
    bnn = bayesian(noisy(0.5), ["b/bias"], initial_scale=1e-8)
    graph = Graph(bnn.network)
    assert graph.runs_once(training=True) == ["a"] and graph.runs_once() == ["a", "drop", "c"]
    x = np.ones((4, 3), "float32")
    samples = [np.array(s) for s in bnn(x, training=True)["samples"]]
    assert not np.allclose(samples[0], samples[1]) and not np.allclose(samples[1], samples[2])
    np.testing.assert_allclose(*bnn.predict_samples(x)[:2], atol=1e-6)


class Restless(kl.Dropout):
    """Dropout in prediction too."""

    def call(self, x, training=None):
        """Always in training mode."""
        return super().call(x, training=True)


def test_dropout_that_always_drops_is_never_shared():
    x = keras.Input((30,))
    model = keras.Model(x, kl.Dense(1, name="b")(Restless(0.5)(x)))
    samples = bayesian(model, ["b/bias"], initial_scale=1e-8).predict_samples(np.ones((1, 30), "float32"))
    assert len(np.unique(samples)) == S


class Noisy(kl.Layer):
    """Noise without a seed generator, from Keras or from TensorFlow; in training alone, or always."""

    def __init__(self, draw, always, **kwargs):
        super().__init__(**kwargs)
        self.draw, self.always = draw, always

    def call(self, x, training=None):
        """Add it."""
        return x + self.draw(keras.ops.shape(x)) if training or self.always else x

    def get_config(self):
        """The two arguments."""
        return {**super().get_config(), "draw": self.draw, "always": self.always}


@pytest.mark.parametrize("draw", [keras.random.normal, tf.random.normal], ids=["keras", "tensorflow"])
@pytest.mark.parametrize("always", [False, True])
def test_noise_without_a_seed_is_never_shared(draw, always):
    x = keras.Input((4,))
    hidden = kl.Lambda(lambda t: 2.0 * t, name="double")(Counted(name="count")(dense("a")(x)))
    model = keras.Model(x, kl.Dense(1, name="b")(dense("c")(Noisy(draw, always, name="noisy")(hidden))))
    bnn = bayesian(model, ["b/bias"], initial_scale=1e-8)
    trunk = ["a", "count", "double"]
    assert Graph(bnn.network).runs_once(training=True) == trunk
    assert Graph(bnn.network).runs_once() == trunk + ([] if always else ["noisy", "c"])
    samples = [np.array(s) for s in bnn(np.ones((2, 4), "float32"), training=True)["samples"]]
    assert np.min(np.abs(samples[0] - samples[1])) > 1e-5
    samples = bnn.predict_samples(np.ones((2, 4), "float32"))
    assert (np.min(np.ptp(samples, axis=0)) > 1e-5) == always


@keras.saving.register_keras_serializable(package="test_graph")
def plus_noise(x):
    """Of the global seed."""
    return x + keras.random.normal((4,))


@pytest.mark.parametrize("draws", [False, True])
def test_a_lambda_that_draws_is_never_shared(draws):
    x = keras.Input((4,))
    y = kl.Lambda(plus_noise if draws else keras.ops.relu, name="lambda")(dense("a")(x))
    bnn = bayesian(keras.Model(x, kl.Dense(1, name="b")(y)), ["b/bias"], initial_scale=1e-8)
    assert Graph(bnn.network).runs_once() == (["a"] if draws else ["a", "lambda"])
    samples = bnn.predict_samples(np.ones((2, 4), "float32"))
    assert (np.min(np.ptp(samples, axis=0)) > 1e-5) == draws


def test_batch_norm_of_the_trunk_moves_once_a_step():
    x = keras.Input((3,))
    y = kl.BatchNormalization(momentum=0.9, name="norm")(x)
    bnn = bayesian(keras.Model(x, kl.Dense(1, name="b")(y)), ["b/kernel"], batch_norm="train")
    bnn.compile("sgd", "mse")
    bnn.train_on_batch(np.full((4, 3), 2.0, "float32"), np.zeros((4, 1), "float32"))
    np.testing.assert_allclose(bnn.network.get_layer("norm").moving_mean, 0.1 * 2.0 * np.ones(3), rtol=1e-6)


@pytest.mark.parametrize("estimator", ["all", "split", "flipout"])
def test_added_losses_count_once_or_as_the_mean_over_samples(estimator):
    """0.1 * sum of squares an example, of a layer in the trunk, of one after it and of one that is both."""
    both = kl.ActivityRegularization(l2=0.3, name="both")
    x = keras.Input((4,))
    y = dense("b")(both(kl.ActivityRegularization(l2=0.1)(dense("a")(x))))
    model = keras.Model(x, both(kl.ActivityRegularization(l2=0.2)(y)))
    bnn = bayesian(model, ["b/kernel"], estimator=estimator, initial_scale=1e-8, beta=0.0)
    bnn.compile(keras.optimizers.SGD(0.0), "mse")
    x, y = inputs_of(model, 8), np.zeros((8, 4), "float32")
    a, b = np.array(keras.Model(model.input, model.get_layer("a").output)(x)), model.predict(x, verbose=0)
    expected = np.mean(b**2) + 0.4 * np.mean(np.sum(a**2, 1)) + 0.5 * np.mean(np.sum(b**2, 1))
    np.testing.assert_allclose(bnn.train_on_batch(x, y, return_dict=True)["loss"], expected, rtol=1e-5)
    np.testing.assert_allclose(bnn.evaluate(x, y, verbose=0, return_dict=True)["loss"], expected, rtol=1e-5)


# ---- one sample after another ----


def test_the_samples_of_one_compiled_call_are_those_of_single_calls():
    model, keys, _ = chain()
    x = inputs_of(model)
    bnn, again = bayesian(model, keys), bayesian(model, keys)
    samples = bnn.predict_samples(x, num_samples=6)
    np.testing.assert_allclose(
        samples, [one_draw(again.network, x, False, None) for _ in range(6)], rtol=1e-5, atol=1e-6
    )
    assert len(np.unique(samples[:, 0, 0])) == 6


def test_the_compiled_call_holds_two_copies_of_the_network_however_many_samples():
    """The first draw and the loop's body: so memory does not grow with the samples."""
    bnn = bayesian(chain()[0], ["b/kernel"], probabilities="sigmoid")

    def products(num_samples):
        sampler = bnn._sampler("uncertainty", num_samples)
        graph = tf.function(sampler).get_concrete_function(tf.TensorSpec((4, 3))).graph.as_graph_def()
        nodes = [*graph.node, *(node for function in graph.library.function for node in function.node_def)]
        return sum(node.op == "MatMul" for node in nodes)

    assert products(5) == products(20) == 3 + 2  # the trunk's layer is not in the loop


# ---- counts ----


def every_kind():
    x = keras.Input((12, 12, 4))
    y = kl.Conv2D(6, 3, strides=2, padding="same", groups=2, name="conv")(x)
    y = kl.DepthwiseConv2D(3, depth_multiplier=2, name="depthwise")(y)
    y = kl.SeparableConv2D(5, 3, name="separable", padding="same")(y)
    y = kl.Conv2DTranspose(4, 3, strides=2, padding="same", name="transposed")(y)
    y = kl.EinsumDense("...hwc,cd->...hwd", (8, 8, 7), name="einsum")(y)
    return keras.Model(x, kl.Dense(3, name="dense")(y))


def test_multiply_adds_against_the_traced_graph():
    model = every_kind()
    counted = Graph(model).operations
    kinds = ("Conv2D", "Conv2DBackpropInput", "DepthwiseConv2dNative", "MatMul", "Einsum", "BatchMatMulV2")
    traced = count_flops(lambda x: model(x, training=False), tf.TensorSpec((1, 12, 12, 4))).by_op
    assert sum(counted.values()) == sum(traced.get(kind, 0) for kind in kinds) / 2
    assert counted["conv"] == 6 * 6 * 3 * 3 * 2 * 6  # windows, window, input channels of a group, filters


def test_open_sizes_count_as_the_size_given():
    def make(size):
        x = keras.Input((size, size, 1))
        return keras.Model(x, kl.Conv2D(3, 3, name="b")(kl.Conv2D(2, 3, strides=2, name="a")(x)))

    assert Graph(make(None), open_size=32).operations == Graph(make(32)).operations


def test_an_open_size_that_the_size_given_does_not_fit():
    """A window of 80 on an invented length of 64; a sum with a fixed length of 100."""
    signal, words, image = keras.Input((None, 1)), keras.Input((None,), dtype="int32"), keras.Input((100, 4))
    y = kl.MaxPooling1D(4)(kl.Conv1D(4, 80, strides=4, name="conv")(signal))
    long = keras.Model(signal, kl.Dense(1, name="b")(kl.GlobalAveragePooling1D()(y)))
    y = kl.Embedding(5, 4)(words) + image
    text = keras.Model([words, image], kl.Dense(1, name="b")(kl.GlobalAveragePooling1D()(y)))
    for model, x in (
        (long, np.ones((2, 400, 1), "float32")),
        (text, [np.ones((2, 100), int), np.ones((2, 100, 4), "float32")]),
    ):
        assert 0 < Graph(model).fan_out(["b/kernel"]) < 0.1
        bnn = bayesian(model, ["b/kernel"], initial_scale=1e-8)
        np.testing.assert_allclose(bnn.predict(x, verbose=0), model.predict(x, verbose=0), rtol=1e-5, atol=1e-6)
    assert Graph(long, open_size=400).operations["conv"] == 81 * 80 * 4  # where it fits: (400 - 80) / 4 + 1 windows


def test_a_nested_model_picks_its_inputs_by_name():
    """From a dict that holds more than it takes, as Keras does."""
    p, q = keras.Input((4,), name="p"), keras.Input((4,), name="q")
    inner = keras.Model({"q": q, "p": p}, kl.Add(name="sum")([dense("one")(p), dense("two")(q)]), name="inner")
    x, y, z = (keras.Input((2,), name=name) for name in "xyz")
    given = {"extra": dense("c")(z), "p": dense("a")(x), "q": dense("b")(y)}
    model = keras.Model([x, y, z], kl.Dense(1, name="last")(inner(given)))
    graph = Graph(model)
    names = [step.name for step in graph.steps]
    sources = {step.name: {names[i] for i in step.sources} for step in graph.steps}
    assert (sources["inner/one"], sources["inner/two"]) == ({"a"}, {"b"})
    bnn, data = bayesian(model, ["a/kernel"], initial_scale=1e-8), [np.ones((3, 2), "float32") * i for i in range(3)]
    np.testing.assert_allclose(bnn.predict(data, verbose=0), model.predict(data, verbose=0), rtol=1e-5, atol=1e-6)


def test_fan_out_by_hand():
    x = keras.Input((3,))
    a = kl.Dense(10, name="a")(x)  # 30
    b = kl.Dense(5, name="b")(a)  # 50
    c = kl.Dense(2, name="c")(a)  # 20
    graph = Graph(keras.Model(x, [b, c]))
    assert graph.fan_out([]) == 0.0 and graph.fan_out(["a/kernel"]) == 1.0
    assert graph.fan_out(["b/bias"]) == pytest.approx(0.5) and graph.fan_out("c/kernel") == pytest.approx(0.2)
    assert graph.fan_out(["b/bias", "c/kernel", "b/kernel"]) == pytest.approx(0.7)
    with pytest.raises(ValueError, match="No weight is called 'd/kernel'"):
        graph.fan_out(["d/kernel"])


@pytest.mark.parametrize("make", NETWORKS)
def test_fan_out_is_the_cost_of_what_does_not_run_once(make):
    model, keys, _ = make()
    graph = Graph(model)
    anew = 1 - sum(graph.operations[name] for name in Graph(bayesian(model, keys).network).runs_once()) / sum(
        graph.operations.values()
    )
    assert graph.fan_out(keys) == pytest.approx(anew) and set(graph._steps_of) == set(named_weights(model))


class Subclassed(keras.Model):
    """Not Functional."""

    def __init__(self):
        super().__init__()
        self.d = kl.Dense(2, name="d")

    def call(self, x):
        """One layer."""
        return self.d(x)


def test_another_model_is_one_operation():
    model = Subclassed()
    model(np.zeros((1, 3), "float32"))
    graph = Graph(model)
    assert graph.fan_out(["d/bias"]) == 1.0 and graph.mixes_batch() == model.name
    with pytest.raises(ValueError, match="Expected a built"):
        Graph(Subclassed())


# ---- axis 0 ----


@pytest.mark.parametrize(
    ("operation", "keeps"),
    [
        (kl.Conv1D(2, 3), True),
        (kl.Flatten(), True),
        (kl.Permute((2, 1)), True),
        (kl.LSTM(3), True),
        (kl.TimeDistributed(kl.Dense(2)), True),
        (lambda x: kl.Concatenate()([x, x]), True),
        (lambda x: x * 2.0 + 1.0, True),
        (lambda x: keras.ops.mean(x, axis=(1, -1)), True),
        (lambda x: x[:, 0], True),
        (lambda x: keras.ops.get_item(x, key=(slice(None), slice(1, None), None)), True),
        (kl.Lambda(lambda x: x), False),
        (Counted(), False),
        (lambda x: kl.Concatenate(axis=0)([x, x]), False),
        (lambda x: x - keras.ops.mean(x, axis=-3, keepdims=True), False),
        (lambda x: keras.ops.mean(x), False),
        (lambda x: keras.ops.reshape(x, (-1, 3)), False),
        (lambda x: x[(slice(None, None, 2),)], False),
        (lambda x: x[0], False),
        (lambda x: keras.ops.flip(x, axis=0), False),
    ],
)
def test_which_operations_keep_the_batch(operation, keeps):
    x = keras.Input((6, 3))
    assert (Graph(keras.Model(x, operation(x))).mixes_batch() is None) == keeps


def test_a_slice_keeps_the_batch_in_a_loaded_model_too(tmp_path):
    x = keras.Input((6, 3))
    keras.Model(x, x[:, 0]).save(tmp_path / "model.keras")
    assert Graph(keras.models.load_model(tmp_path / "model.keras")).mixes_batch() is None
