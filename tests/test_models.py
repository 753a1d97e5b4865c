"""Networks: parameter counts against published figures, shapes, seeds, saving, precision; dropout."""

import keras
import numpy as np
import pytest
import tensorflow as tf

from sbn_tf.experiments import dropout, networks

SMALL = [
    ("resnet18", (16, 16, 3), 4, {"width": 4}, (4,)),
    ("resnet18", (33, 47, 1), 4, {"width": 4, "stem": 7}, (4,)),
    ("resnet18_small", (16, 16, 1), 3, {"activation": "softmax"}, (3,)),
    ("unet", (16, 24, 1), 1, {"widths": (4, 8), "upsampling": "transpose"}, (16, 24, 1)),
    ("unet_small", (16, 8, 3), 2, {"activation": "softmax", "pooling": "average"}, (16, 8, 2)),
]


def num_trainable(model):
    return sum(int(np.prod(weight.shape)) for weight in model.trainable_weights)


@pytest.mark.parametrize(
    ("function", "arguments", "expected"),
    [
        # torchvision's resnet18 (its documentation's num_params), and the usual CIFAR-10 variant.
        (networks.resnet18, {"input_shape": (224, 224, 3), "num_outputs": 1000, "stem": 7}, 11_689_512),
        (networks.resnet18, {"input_shape": (32, 32, 3), "num_outputs": 10, "stem": 3}, 11_173_962),
        (networks.resnet18_paper, {}, 5_354_406),
        (networks.unet_paper, {"dataset": "lidc", "num_outputs": 2}, 2_264_034),
        (networks.unet_paper, {"dataset": "isic", "num_outputs": 2}, 8_801_544),
    ],
)
def test_parameter_counts(function, arguments, expected):
    assert num_trainable(function(**arguments)) == expected


@pytest.mark.parametrize(
    ("network", "millions"), [("resnet18_paper", 5.35), ("unet_paper_lidc", 2.26), ("unet_paper_isic", 8.80)]
)
def test_the_papers_printed_counts(network, millions):
    channels = 3 if network.endswith("isic") else 1
    outputs = 14 if network.startswith("resnet") else 1
    model = networks.build(network, (32, 32, channels), outputs)
    assert round(num_trainable(model) / 1e6, 2) == millions


def test_counts_by_hand():
    # One level has no skip: 3x3x1x2 kernel, gamma and beta, 1x1x2x1 head and its bias.
    assert num_trainable(networks.unet((8, 8, 1), widths=(2,), convs_per_level=1)) == 18 + 4 + 2 + 1
    # The decoder's convolution sees the up-sampled 3 channels and the skip's 2.
    expected = (18 + 4) + (9 * 2 * 3 + 6) + (9 * (3 + 2) * 2 + 4) + 3
    assert num_trainable(networks.unet((8, 8, 1), widths=(2, 3), convs_per_level=1)) == expected


@pytest.mark.parametrize("network", networks.NETWORKS)
@pytest.mark.parametrize("activation", ["sigmoid", "softmax"])
def test_every_network_takes_the_activation_of_its_head(network, activation):
    model = networks.build(network, (16, 16, 1), 3, activation=activation)
    assert model.layers[-1].activation.__name__ == activation


def test_the_papers_unet_has_a_softmax_over_two_outputs_and_a_sigmoid_for_one():
    heads = [networks.unet_paper("lidc", (16, 16, 1), n).layers[-1].activation.__name__ for n in (1, 2)]
    assert heads == ["sigmoid", "softmax"]


@pytest.mark.parametrize(("network", "input_shape", "num_outputs", "options", "output_shape"), SMALL)
def test_shapes_ranges_one_step_and_a_round_trip(tmp_path, network, input_shape, num_outputs, options, output_shape):
    model = networks.build(network, input_shape, num_outputs, seed=0, **options)
    images = np.random.default_rng(0).normal(size=(4, *input_shape)).astype("float32")
    probs = model.predict(images, verbose=0)
    assert probs.shape == (4, *output_shape)
    assert probs.dtype == np.float32
    assert probs.min() >= 0 and probs.max() <= 1
    if options.get("activation") == "softmax":
        np.testing.assert_allclose(probs.sum(-1), 1, rtol=1e-5)
    model.compile("sgd", loss="binary_crossentropy", run_eagerly=True)
    before = model.get_weights()
    history = model.fit(images, (probs > 0.5).astype("float32"), verbose=0)
    assert np.isfinite(history.history["loss"][0])
    assert any((old != new).any() for old, new in zip(before, model.get_weights(), strict=True))
    model.save(tmp_path / "model.keras")
    again = keras.models.load_model(tmp_path / "model.keras")
    assert [layer.name for layer in again.layers] == [layer.name for layer in model.layers]
    np.testing.assert_array_equal(again.predict(images, verbose=0), model.predict(images, verbose=0))


def test_every_layer_has_a_stable_name():
    names = [[layer.name for layer in networks.build("unet_small", (8, 8, 1), 1).layers] for _ in range(2)]
    assert names[0] == names[1]
    assert len(set(names[0])) == len(names[0])
    assert {"encoder1_conv1", "encoder3_bn2", "decoder1_conv2", "head"} <= set(names[0])
    names = [layer.name for layer in networks.build("resnet18_small", (8, 8, 1), 1).layers]
    assert {"stem_conv", "stage1_block1_conv1", "stage4_block1_shortcut_conv", "head"} <= set(names)


def test_one_seed_gives_the_same_weights_whatever_came_before():
    first = networks.build("unet_small", (8, 8, 1), 1, seed=3)
    networks.build("resnet18_small", (8, 8, 1), 1, seed=3)
    keras.random.normal((2,))
    second = networks.build("unet_small", (8, 8, 1), 1, seed=3)
    other = networks.build("unet_small", (8, 8, 1), 1, seed=4)
    for old, new in zip(first.get_weights(), second.get_weights(), strict=True):
        np.testing.assert_array_equal(old, new)
    kernels = [model.get_layer("encoder1_conv1").kernel for model in (first, other)]
    assert not np.array_equal(*kernels)


def test_layers_of_one_shape_get_different_weights():
    model = networks.build("resnet18_small", (8, 8, 1), 1, seed=0)
    kernels = [model.get_layer(f"stage1_block{index}_conv2").kernel for index in (1, 2)]
    assert not np.array_equal(*kernels)


def test_no_seed_follows_keras():
    weights = []
    for _ in range(2):
        keras.utils.set_random_seed(5)
        weights.append(networks.build("unet_small", (8, 8, 1), 1).get_weights())
    for old, new in zip(*weights, strict=True):
        np.testing.assert_array_equal(old, new)


@pytest.mark.parametrize("network", ["resnet18_small", "unet_small"])
def test_mixed_precision_computes_in_half_and_answers_in_single(network):
    keras.config.set_dtype_policy("mixed_bfloat16")
    try:
        model = networks.build(network, (8, 8, 1), 1, seed=0)
    finally:
        keras.config.set_dtype_policy("float32")
    assert model.layers[1].compute_dtype == "bfloat16"
    assert model.output.dtype == "float32"
    assert model.predict(np.ones((1, 8, 8, 1), "float32"), verbose=0).dtype == np.float32


def test_convolutions_before_a_batch_norm_have_no_bias_by_default():
    for network in ("resnet18_small", "unet_small"):
        layers = networks.build(network, (8, 8, 1), 1).layers
        biased = [layer.name for layer in layers if getattr(layer, "use_bias", False)]
        assert biased == ["head"]


def test_strided_convolutions_pad_both_sides():
    # A 7x7 kernel of ones, stride 2, on a 4x4 image of ones, padded by 3: hand count of the covered pixels.
    model = networks.resnet18((4, 4, 1), 1, width=1, stem=7)
    model.get_layer("stem_conv").kernel.assign(np.ones((7, 7, 1, 1)))
    stem = keras.Model(model.input, model.get_layer("stem_conv").output)
    np.testing.assert_array_equal(stem(np.ones((1, 4, 4, 1)))[0, :, :, 0], [[16, 16], [16, 16]])
    stem = keras.Model(model.input, model.get_layer("stage2_block1_conv1").output)
    assert stem.output.shape == (None, 1, 1, 2)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: networks.unet((30, 32, 1)), "divisible by 8"),
        (lambda: networks.unet((32, 32, 1), pooling="mean"), "pooling='mean'"),
        (lambda: networks.unet((32, 32)), "input_shape"),
        (lambda: networks.resnet18((32, 32, 3), 10, stem=5), "stem=5"),
        (lambda: networks.resnet18((32, 32, 3), 0), "num_outputs=0"),
        (lambda: networks.unet_paper("lits"), "'lits'"),
        (lambda: networks.build("resnet50", (32, 32, 3), 10), r"resnet18_small.*'resnet50'"),
    ],
)
def test_errors_say_what_was_expected(call, message):
    with pytest.raises(ValueError, match=message) as error:
        call()
    assert len(str(error.value).splitlines()) <= 2


def shared_dense():
    """A network that calls one of its layers twice."""
    inputs, again = keras.Input((4,), name="in"), keras.layers.Dense(4, name="again")
    x = keras.layers.Dense(4, name="first")(inputs)
    return keras.Model(
        inputs, keras.layers.Dense(2, name="last")(keras.layers.Add(name="add")([again(x), again(again(x))]))
    )


def perceptron():
    return keras.Sequential(
        [keras.Input((4,)), keras.layers.Dense(3, "relu", name="first"), keras.layers.Dense(2, name="last")]
    )


@pytest.mark.parametrize(
    ("model", "input_shape", "first", "num_dropouts"),
    [
        (lambda: networks.build("resnet18_small", (8, 8, 1), 3, seed=0, width=4), (8, 8, 1), "stem_conv", 20),
        (
            lambda: networks.build("unet", (8, 8, 1), 1, widths=(2, 3), upsampling="transpose"),
            (8, 8, 1),
            "encoder1_conv1",
            7,
        ),
        (shared_dense, (4,), "first", 2),
        (perceptron, (4,), "first", 1),
    ],
)
def test_dropout_stands_before_every_layer_of_weights_but_the_first(tmp_path, model, input_shape, first, num_dropouts):
    model = model()
    model.compile("adam", "mse", run_eagerly=True)
    x = np.random.default_rng(0).normal(size=(4, *input_shape)).astype("float32")
    model.fit(x, np.zeros((4, *model.output_shape[1:])), verbose=0)  # moves batch norm's statistics too
    before, names = model.get_weights(), [layer.name for layer in model.layers]
    copy = dropout.with_dropout(model, 0.25, seed=0)
    weighted = [layer.name for layer in model.layers if hasattr(layer, "kernel")]
    dropouts = {layer.name: layer for layer in copy.layers if isinstance(layer, keras.layers.Dropout)}
    assert set(dropouts) == {f"{name}_dropout" for name in weighted if name != first}
    assert len(dropouts) == num_dropouts and {layer.rate for layer in dropouts.values()} == {0.25}
    for name in dropouts:
        calls = copy.get_layer(name.removesuffix("_dropout"))._inbound_nodes
        dropped = {id(node.output_tensors[0]) for node in dropouts[name]._inbound_nodes}
        assert {id(node.input_tensors[0]) for node in calls} == dropped and len(calls) == len(dropped)
    expected = model.predict(x, verbose=0)
    np.testing.assert_allclose(copy(x), expected, atol=1e-6)
    copy.save(tmp_path / "model.keras")
    again = keras.models.load_model(tmp_path / "model.keras")
    np.testing.assert_array_equal(dropout.sample_dropout(again, x, 1), dropout.sample_dropout(copy, x, 1))

    copy.compile("sgd", "mse", run_eagerly=True)
    copy.fit(x, np.ones((4, *model.output_shape[1:])), verbose=0)
    assert [layer.name for layer in model.layers] == names
    for a, b in zip(before, model.get_weights(), strict=True):
        np.testing.assert_array_equal(a, b)
    np.testing.assert_array_equal(model.predict(x, verbose=0), expected)


def test_a_rate_of_0_is_a_plain_copy():
    model = networks.build("unet_small", (8, 8, 1), 1, seed=0)
    model.get_layer("encoder1_bn1").trainable = False
    copy = dropout.with_dropout(model, 0)
    assert [(x.name, type(x), x.trainable) for x in copy.layers] == [
        (x.name, type(x), x.trainable) for x in model.layers
    ]
    for a, b in zip(model.get_weights(), copy.get_weights(), strict=True):
        np.testing.assert_array_equal(a, b)
    assert not copy.compiled and not {id(w) for w in copy.weights} & {id(w) for w in model.weights}


def test_a_copy_with_dropout_has_what_normalisation_has_learnt():
    x = np.random.default_rng(0).normal(3.0, 2.0, size=(200, 4)).astype("float32")
    normalise = keras.layers.Normalization()
    normalise.adapt(x)
    inputs = keras.Input((4,))
    model = keras.Model(inputs, keras.layers.Dense(2)(keras.layers.Dense(3)(normalise(inputs))))
    copy = dropout.with_dropout(model, 0.25, seed=0)
    np.testing.assert_allclose(copy.predict(x, verbose=0), model.predict(x, verbose=0), atol=1e-6)
    np.testing.assert_allclose(copy.layers[1](x), (x - x.mean(0)) / x.std(0), atol=1e-4)
    assert len(normalise._inbound_nodes) == 1  # the network itself is not called again


@pytest.mark.parametrize("kind", ["StringLookup", "IntegerLookup", "TextVectorization", "Discretization"])
def test_a_copy_with_dropout_has_the_vocabulary(kind):
    strings, x = kind in ("StringLookup", "TextVectorization"), [["a"], ["b"], ["c"], ["b"]]
    x = tf.constant(x if strings else [[1], [5], [9], [5]])
    table = getattr(keras.layers, kind)(**({"num_bins": 3} if kind == "Discretization" else {}))
    table.adapt(x)
    inputs = keras.Input((1,), dtype="string" if strings else "int32")
    hidden = keras.layers.GlobalAveragePooling1D()(keras.layers.Embedding(9, 3)(table(inputs)))
    model = keras.Model(inputs, keras.layers.Dense(2)(keras.layers.Dense(3)(hidden)))
    copy = dropout.with_dropout(model, 0.25, seed=0)
    np.testing.assert_allclose(copy(x), model(x), atol=1e-6)
    assert len(np.unique(copy(x), axis=0)) > 1


def test_copies_with_dropout_take_sparse_inputs():
    dense = keras.layers.Dense
    model = keras.Sequential([keras.Input((4,), sparse=True), dense(3), dense(2)])
    copy, x = dropout.with_dropout(model, 0.25, seed=0), np.eye(4, dtype="float32")
    assert copy.inputs[0].sparse
    np.testing.assert_allclose(copy(tf.sparse.from_dense(x)), model(x), atol=1e-6)
    samples = dropout.sample_dropout(copy, tf.sparse.from_dense(x), 3)
    np.testing.assert_array_equal(samples.shape, (3, 4, 2))


def test_samples_of_dropout_have_the_closed_form_s_mean_and_variance():
    # The output is sum_i w_i x_i keep_i / (1 - rate): its variance sum_i (w_i x_i)^2 * rate / (1 - rate).
    model = keras.Sequential([keras.Input((3,)), keras.layers.Dense(3), keras.layers.Dense(1)])
    model.set_weights([np.eye(3), np.zeros(3), np.array([[1.0], [-2.0], [0.5]]), np.zeros(1)])
    model, rate, draws = dropout.with_dropout(model, 0.2, seed=0), 0.2, 4000
    x = np.tile(np.float32([[1.0, 2.0, 3.0]]), (draws // 20, 1))
    samples = dropout.sample_dropout(model, x, 20).ravel()
    terms = np.array([1.0, -4.0, 1.5])
    variance = (terms**2).sum() * rate / (1 - rate)
    assert abs(samples.mean() - terms.sum()) < 4 * np.sqrt(variance / draws)
    assert samples.var() == pytest.approx(variance, rel=0.1)
    assert len(np.unique(samples.round(4))) == 8  # every subset of three


def test_samples_of_dropout_are_reproducible_and_traced_once(monkeypatch):
    model = dropout.with_dropout(networks.build("unet_small", (8, 8, 1), 1, seed=0), 0.3, seed=0)
    traced, call = [], dropout._DropoutSampler.call

    def counted(self, inputs):
        traced.append(inputs.shape)
        return call(self, inputs)

    monkeypatch.setattr(dropout._DropoutSampler, "call", counted)
    images = np.random.default_rng(0).normal(size=(7, 8, 8, 1)).astype("float32")
    first = dropout.sample_dropout(model, images, 3)
    assert first.shape == (3, 7, 8, 8, 1) and first.min() >= 0 and first.max() <= 1
    assert all((first[i] != first[j]).any(axis=(1, 2, 3)).all() for i in range(3) for j in range(i))
    np.testing.assert_array_equal(first, dropout.sample_dropout(model, images, 3))
    other, goes_on = (
        dropout.sample_dropout(model, images, 3, seed=1),
        dropout.sample_dropout(model, images, 3, seed=None),
    )
    assert not np.array_equal(first, other) and not np.array_equal(other, goes_on)
    for size in (1, 5, 6, 7):
        assert dropout.sample_dropout(model, images[:size], 3, batch_size=size).shape[1] == size
    assert len(traced) <= 2  # one image, and any number of them

    model.get_layer("head").bias.assign([100.0])  # weights as they are now
    np.testing.assert_array_equal(dropout.sample_dropout(model, images, 3), np.ones_like(first))
    assert len(traced) <= 2


def test_only_dropout_is_as_in_training():
    layers = [
        keras.layers.Dense(3),
        keras.layers.BatchNormalization(),
        keras.layers.Dropout(0.0),
        keras.layers.Dense(1),
    ]
    model = keras.Sequential([keras.Input((3,)), *layers])
    x = np.random.default_rng(0).normal(5, 2, size=(16, 3)).astype("float32")
    batch_statistics = model(x, training=True)  # moves the running ones a little
    expected = model.predict(x, verbose=0)
    assert not np.allclose(batch_statistics, expected, atol=0.1)
    np.testing.assert_allclose(dropout.sample_dropout(model, x, 1)[0], expected, atol=1e-6)
    assert model.layers[1].trainable


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: dropout.with_dropout(perceptron(), 1.0), "0 <= rate < 1. Received: rate=1.0"),
        (lambda: dropout.with_dropout(perceptron(), -0.1), "rate=-0.1"),
        (lambda: dropout.with_dropout(perceptron(), "half"), "rate='half'"),
        (lambda: dropout.with_dropout(keras.Sequential([keras.layers.Dense(2)]), 0.1), "Expected a built Functional"),
        (
            lambda: dropout.with_dropout(keras.Sequential([perceptron(), keras.layers.Dense(2)]), 0.1),
            "without models among",
        ),
        (lambda: dropout.sample_dropout(perceptron(), np.ones((2, 4))), "Expected a network with dropout layers"),
        (
            lambda: dropout.sample_dropout(dropout.with_dropout(perceptron(), 0.1), np.ones((2, 4)), 0),
            "num_samples=0",
        ),
    ],
)
def test_dropout_that_is_none_is_refused(call, message):
    with pytest.raises(ValueError, match=message) as error:
        call()
    assert len(str(error.value).splitlines()) <= 2
