"""Saliency scores against formulas and finite differences, exact selections, and what must not change."""

import functools
import itertools
import subprocess
import sys

import keras
import numpy as np
import pytest
import tensorflow as tf

from sbn_tf.core.graph import Graph
from sbn_tf.saliency import (
    Masks,
    SaliencyRecorder,
    biases_before_batch_norm,
    captured,
    eligible_weights,
    named_weights,
    one_per_channel,
    overlap,
    saliency,
    saliency_against_cost,
    top_k,
)

BATCH = 4


def linear(dtype="float64", size=10):
    rng = np.random.default_rng(0)
    model = keras.Sequential([keras.Input((3,), dtype=dtype), keras.layers.Dense(1, name="out", dtype=dtype)])
    model.get_layer("out").set_weights([rng.normal(size=(3, 1)), rng.normal(size=1)])
    return model, rng.normal(size=(size, 3)), rng.normal(size=(size, 1))


def squared(y, y_pred):
    return tf.reduce_mean(tf.square(y - y_pred))


def batches(x, y, size):
    return [(x[i : i + size], y[i : i + size]) for i in range(0, len(x), size)]


def from_gradients(score, per_batch, per_example, w):
    """The definitions, on batches of 4, 4 and a smaller last one: each weighs as many examples as it has."""
    sizes = [min(BATCH, len(per_example) - i) for i in range(0, len(per_example), BATCH)]
    return {
        "fisher": np.average(per_batch**2, axis=0, weights=sizes),
        "paper": np.sum(per_batch, 0) ** 2,
        "per_example": np.mean(per_example**2, 0),
        "taylor": np.average((w * per_batch) ** 2, axis=0, weights=sizes),
    }[score]


GRADIENT_SCORES = ("fisher", "paper", "per_example", "taylor")


@pytest.mark.parametrize("score", GRADIENT_SCORES)
def test_linear_regression_formula(score):
    model, x, y = linear()
    kernel, bias = model.get_layer("out").get_weights()
    found = saliency(model, (x, y), squared, score=score, batch_size=BATCH, verbose=False)
    residual = 2 * (x @ kernel + bias - y)
    each_kernel, each_bias = (residual * x)[:, :, None], residual
    for key, each, w in (("out/kernel", each_kernel, kernel), ("out/bias", each_bias, bias)):
        per_batch = np.array([each[i : i + BATCH].mean(0) for i in range(0, len(x), BATCH)])
        np.testing.assert_allclose(found[key], from_gradients(score, per_batch, each, w), rtol=1e-5)
        assert found[key].dtype == np.float32
        assert found[key].shape == w.shape


@pytest.mark.parametrize("score", GRADIENT_SCORES)
def test_finite_differences(score):
    rng = np.random.default_rng(1)
    model = keras.Sequential(
        [
            keras.Input((2,), dtype="float64"),
            keras.layers.Dense(3, "tanh", dtype="float64", name="a"),
            keras.layers.Dense(1, dtype="float64", name="b"),
        ]
    )
    model.set_weights([rng.normal(size=w.shape) for w in model.get_weights()])
    x, y = rng.normal(size=(6, 2)), rng.normal(size=(6, 1))

    def numeric(variable, xs, ys, step=1e-5):
        start, slope = np.array(variable.numpy()), np.zeros(variable.shape)
        for at in np.ndindex(start.shape):
            ends = []
            for sign in (1, -1):
                moved = start.copy()
                moved[at] += sign * step
                variable.assign(moved)
                ends.append(float(squared(ys, model(xs))))
            slope[at] = (ends[0] - ends[1]) / (2 * step)
        variable.assign(start)
        return slope

    found = saliency(model, (x, y), squared, score=score, batch_size=BATCH, verbose=False)
    for key, weight in eligible_weights(model).items():
        v = weight.variable
        per_batch = np.array([numeric(v, *b) for b in batches(x, y, BATCH)])
        per_example = np.array([numeric(v, *b) for b in batches(x, y, 1)])
        np.testing.assert_allclose(
            found[key], from_gradients(score, per_batch, per_example, v.numpy()), rtol=1e-4, atol=1e-9
        )


def test_keras_losses_and_sample_weights():
    model, x, y = linear("float32")
    x, y = x.astype("float32"), y.astype("float32")
    want = saliency(model, (x, y), squared, batch_size=5, verbose=False)
    for loss in ("mse", keras.losses.MeanSquaredError()):
        got = saliency(model, (x, y), loss, batch_size=5, verbose=False)
        np.testing.assert_allclose(got["out/kernel"], want["out/kernel"], rtol=1e-4)
        doubled = [(*b, np.full(5, 2, "float32")) for b in batches(x, y, 5)]
        got = saliency(model, doubled, loss, verbose=False)
        np.testing.assert_allclose(got["out/kernel"], 4 * want["out/kernel"], rtol=1e-4)


@pytest.mark.parametrize("loss", ["mse", keras.losses.MeanSquaredError(), lambda a, b: (a - b) ** 2])
def test_sample_weights_belong_to_their_examples(loss):
    model, x, y = linear("float32")
    x, y, chosen = x.astype("float32"), y.astype("float32"), np.arange(len(x)) % 2
    got = saliency(model, (x, y, chosen.astype("float32")), loss, batch_size=len(x), verbose=False)
    half = saliency(model, (x[chosen == 1], y[chosen == 1]), loss, batch_size=len(x), verbose=False)
    np.testing.assert_allclose(got["out/kernel"], half["out/kernel"] / 4, rtol=1e-4)


def test_a_loss_that_hides_the_examples_takes_no_sample_weights():
    model, x, y = linear()
    with pytest.raises(ValueError, match="Received: a scalar loss"):
        saliency(model, (x, y, np.ones(len(x))), squared, verbose=False)


@pytest.mark.parametrize("loss", ["mse", "binary_crossentropy", keras.losses.MeanSquaredError()])
def test_labels_are_fitted_to_the_outputs_and_never_broadcast(loss):
    model, x, y = linear("float32")
    flat = saliency(model, (x, y[:, 0]), loss, verbose=False)
    np.testing.assert_array_equal(flat["out/kernel"], saliency(model, (x, y), loss, verbose=False)["out/kernel"])
    with pytest.raises(ValueError, match=r"fit the outputs \(batch, 1\). Received: labels \(batch, 3\)"):
        saliency(model, (x, x), loss, verbose=False)


def test_class_labels():
    keras.utils.set_random_seed(0)
    model = keras.Sequential([keras.Input((3,)), keras.layers.Dense(4, "softmax", name="out")])
    _, x, _ = linear("float32")
    y = np.arange(len(x)) % 4
    want = saliency(model, (x, np.eye(4)[y]), "categorical_crossentropy", verbose=False)["out/kernel"]
    for labels in (y, y[:, None]):
        for loss in ("sparse_categorical_crossentropy", keras.losses.SparseCategoricalCrossentropy()):
            got = saliency(model, (x, labels), loss, verbose=False)["out/kernel"]
            np.testing.assert_allclose(got, want, rtol=1e-4)


def test_embedding_sums_a_row_before_it_is_squared():
    model = keras.Sequential(
        [keras.Input((2,), dtype="int32"), keras.layers.Embedding(5, 1, name="emb"), keras.layers.Flatten()]
    )
    x, y = np.array([[1, 1], [1, 3]]), np.zeros((2, 2), "float32")
    each = np.array([[0, 2, 0, 0, 0], [0, 1, 0, 1, 0]])  # gradients of the two examples
    for score, want in (("fisher", each.mean(0) ** 2), ("per_example", (each**2).mean(0))):
        found = saliency(model, (x, y), lambda a, b: tf.reduce_sum(b, 1), score=score, verbose=False)
        np.testing.assert_allclose(found["emb/embeddings"][:, 0], want)


def test_mixed_precision_scores_are_float32_and_near():
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(8, 4)).astype("float32"), rng.normal(size=(8, 1)).astype("float32")
    found = []
    for policy in ("float32", "mixed_bfloat16"):
        keras.utils.set_random_seed(0)
        stack = [keras.layers.Dense(8, "tanh", dtype=policy, name="a"), keras.layers.Dense(1, dtype=policy, name="b")]
        model = keras.Sequential([keras.Input((4,)), *stack])
        found.append(saliency(model, (x, y), lambda a, b: (a - b) ** 2, verbose=False)["a/kernel"])
    assert found[1].dtype == np.float32
    np.testing.assert_allclose(found[1], found[0], rtol=0.1, atol=0.02 * found[0].max())


def test_keras_data_of_every_kind():
    model, x, y = linear()

    class Pairs(keras.utils.PyDataset):
        def __len__(self):
            return 2

        def __getitem__(self, index):
            return x[index * 5 : index * 5 + 5], y[index * 5 : index * 5 + 5]

    want = saliency(model, (x, y), squared, batch_size=5, verbose=False)["out/kernel"]
    generator = (batch for batch in batches(x, y, 5))
    for data in (Pairs(), generator, tuple(batches(x, y, 5)), [[*batch, None] for batch in batches(x, y, 5)]):
        np.testing.assert_allclose(saliency(model, data, squared, verbose=False)["out/kernel"], want, rtol=1e-6)
    one = saliency(model, Pairs(), squared, max_batches=1, verbose=False)["out/kernel"]
    np.testing.assert_allclose(one, saliency(model, (x[:5], y[:5]), squared, verbose=False)["out/kernel"], rtol=1e-6)


def test_data_of_unknown_length_and_max_batches():
    model, x, y = linear()
    data = tf.data.Dataset.from_tensor_slices((x, y)).batch(BATCH)
    unknown = data.filter(lambda a, b: True)
    want = saliency(model, (x, y), squared, batch_size=BATCH, verbose=False)
    got = saliency(model, unknown, squared, verbose=False)
    np.testing.assert_allclose(got["out/kernel"], want["out/kernel"], rtol=1e-6)
    first = saliency(model, (x[:BATCH], y[:BATCH]), squared, batch_size=BATCH, verbose=False)
    for endless in (data.repeat(), iter(data)):
        got = saliency(model, endless, squared, max_batches=1, verbose=False)
        np.testing.assert_allclose(got["out/kernel"], first["out/kernel"], rtol=1e-6)


def test_magnitude_and_random():
    model, x, y = linear()
    kernel = model.get_layer("out").get_weights()[0]
    np.testing.assert_allclose(
        saliency(model, (x, y), "mse", score="magnitude")["out/kernel"], np.abs(kernel), rtol=1e-6
    )
    one, same, other = (saliency(model, None, "mse", score="random", seed=s)["out/kernel"] for s in (1, 1, 2))
    assert np.array_equal(one, same)
    assert not np.array_equal(one, other)


# Selection

SHAPES = ([(1,)], [(3, 5), (5,)], [(7,), (1,), (2, 2, 3)], [(3, 3, 4, 8), (8,), (8, 3), (3,)])


@pytest.mark.parametrize("scope", ["global", "layer"])
@pytest.mark.parametrize("shapes", SHAPES)
@pytest.mark.parametrize("ties", ["none", "some", "all"])
def test_exact_counts(scope, shapes, ties):
    rng = np.random.default_rng(0)
    draw = {
        "none": lambda s: rng.normal(size=s),
        "some": lambda s: rng.integers(0, 3, size=s).astype(float),
        "all": np.zeros,
    }[ties]
    scores = {f"w{i}": draw(s) for i, s in enumerate(shapes)}
    n = sum(s.size for s in scores.values())
    for r in [*np.linspace(0, 1, 41), 0.001, 0.29, 0.57, 1 / 3, 0.999, 0, 1, np.float32(0.1)]:
        masks = top_k(scores, r, scope=scope)
        assert masks.num_bayesian == round(float(r) * n)
        assert masks.num_weights == n
        assert [m.shape for m in masks.values()] == shapes
        assert masks == top_k({k: s.copy() for k, s in scores.items()}, r, scope=scope)
        if scope == "layer":
            assert all(abs(m.sum() - float(r) * m.size) < 1 + 1e-4 for m in masks.values())
        else:
            flat = np.concatenate([s.ravel() for s in scores.values()])
            chosen = np.concatenate([m.ravel() for m in masks.values()])
            want = np.zeros(n, bool)
            want[np.argsort(-flat, kind="stable")[: masks.num_bayesian]] = True
            assert np.array_equal(chosen, want)


def test_ties_go_to_the_earlier():
    masks = top_k({"a": np.zeros(3), "b": np.zeros((2, 2))}, 4 / 7)
    assert masks["a"].tolist() == [True] * 3
    assert masks["b"].tolist() == [[True, False], [False, False]]


def test_overlap():
    a = Masks({"w": np.array([True, True, False])})
    assert overlap(a, a) == 1
    assert overlap(a, Masks({"w": np.array([True, False, True])})) == 0.5
    assert overlap(a, Masks({"v": np.array([True])})) == 0
    assert overlap(Masks({"w": np.zeros(3, bool)}), a) == 0


def test_masks_round_trip_and_corrupt_file(tmp_path):
    masks = top_k({"m/a/kernel": np.arange(6.0).reshape(2, 3), "b/bias": np.arange(3.0)}, 0.5)
    masks.save(tmp_path / "m.npz")
    assert Masks.load(tmp_path / "m.npz") == masks
    assert list(tmp_path.iterdir()) == [tmp_path / "m.npz"]
    table = masks.table()
    assert list(table.index) == ["m/a/kernel", "b/bias", "all"]
    assert table.loc["all"].tolist() == ["", 9, 4, 44.4, 100.0]
    other = Masks({"file": np.ones(2, bool)})  # a name that np.savez keeps for itself
    other.save(tmp_path / "m.npz")
    assert Masks.load(tmp_path / "m.npz") == other
    masks.save(tmp_path / "m.npz")
    whole = (tmp_path / "m.npz").read_bytes()
    np.save(tmp_path / "array.npy", np.ones(2))
    np.savez(tmp_path / "floats.npz", w=np.ones(2))
    (tmp_path / "cut.npz").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "text.npz").write_text("nonsense")
    (tmp_path / "empty.npz").write_bytes(b"")
    for name in ("cut.npz", "text.npz", "empty.npz", "array.npy", "floats.npz"):
        with pytest.raises(ValueError, match=r"Expected masks written by Masks\.save"):
            Masks.load(tmp_path / name)
    with pytest.raises(FileNotFoundError):
        Masks.load(tmp_path / "none.npz")
    with pytest.raises(ValueError, match="boolean"):
        Masks({"w": np.ones(2)})


# Which weights


def test_frozen_and_normalisation_layers_are_out():
    layers = keras.layers
    model = keras.Sequential(
        [
            keras.Input((8, 8, 2)),
            layers.Conv2D(4, 3, name="conv"),
            layers.BatchNormalization(name="bn"),
            layers.LayerNormalization(name="ln"),
            layers.GroupNormalization(2, name="gn"),
            layers.Flatten(),
            layers.Dense(3, name="frozen"),
            layers.Dense(2, name="out"),
        ]
    )
    model.get_layer("frozen").trainable = False
    assert list(eligible_weights(model)) == ["conv/kernel", "conv/bias", "out/kernel", "out/bias"]
    assert list(eligible_weights(model, include="*/kernel", exclude=["out*"])) == ["conv/kernel"]
    assert {"bn/gamma", "bn/moving_mean", "frozen/kernel"} <= set(named_weights(model))
    with pytest.raises(ValueError, match="matches 'decoder"):
        eligible_weights(model, include="decoder*")
    with pytest.raises(ValueError, match="matches 'nothing"):
        eligible_weights(model, exclude=["conv*", "nothing*"])
    with pytest.raises(ValueError, match="No eligible weight"):
        eligible_weights(model, exclude="*")
    model.trainable = False
    with pytest.raises(ValueError, match="No eligible weight"):
        eligible_weights(model)


def test_shared_layer_counts_every_use():
    inputs = keras.Input((2,), dtype="float64")
    shared = keras.layers.Dense(2, use_bias=False, dtype="float64", name="shared")
    model = keras.Model(inputs, shared(shared(inputs)))
    w = np.array([[0.5, -0.2], [0.3, 0.8]])
    shared.set_weights([w])
    x, y = np.array([[1.0, -2.0]]), np.array([[0.3, 0.1]])
    found = saliency(model, (x, y), squared, verbose=False)
    assert list(found) == ["shared/kernel"]
    residual = x @ w @ w - y  # the mean of two squares: the factor 2 cancels
    gradient = (x @ w).T @ residual + x.T @ residual @ w.T
    np.testing.assert_allclose(found["shared/kernel"], gradient**2, rtol=1e-5)


def test_nested_models_keys_are_unique():
    def block(name):
        inputs = keras.Input((2,))
        return keras.Model(inputs, keras.layers.Dense(2, name="dense")(inputs), name=name)

    model = keras.Sequential([keras.Input((2,)), block("one"), block("two")])
    paths = [v.path for v in model.trainable_variables]
    assert len(set(paths)) < len(paths)  # why keys are not paths
    assert list(named_weights(model)) == ["one/dense/kernel", "one/dense/bias", "two/dense/kernel", "two/dense/bias"]
    assert len({id(w.variable) for w in named_weights(model).values()}) == 4


def test_every_variable_unchanged():
    layers = keras.layers
    model = keras.Sequential(
        [
            keras.Input((5,)),
            layers.Dense(4),
            layers.BatchNormalization(),
            layers.Dropout(0.5, seed=1),
            layers.SpectralNormalization(layers.Dense(3)),
            layers.Dense(1),
        ]
    )
    rng = np.random.default_rng(0)
    x, y = rng.normal(3, 2, (12, 5)).astype("float32"), rng.normal(size=(12, 1)).astype("float32")
    before = [v.numpy().copy() for v in model.variables]
    assert any("seed" in v.path for v in model.variables)
    for score in ("paper", "fisher", "per_example", "taylor", "magnitude", "random"):
        saliency(model, (x, y), "mse", score=score, batch_size=6, verbose=False)
        saliency(model, (x, y), "mse", score=score, batch_size=6, batch_statistics=True, verbose=False)
    with pytest.raises(ValueError, match="finite loss"):
        saliency(model, (x * np.nan, y), "mse", score="paper", verbose=False)
    for variable, value in zip(model.variables, before, strict=True):
        assert np.array_equal(variable.numpy(), value), variable.path


def test_every_batch_is_dropped_out_by_a_mask_of_its_own():
    model = keras.Sequential([keras.Input((64,)), keras.layers.Dropout(0.5, seed=1), keras.layers.Dense(1, name="out")])
    x, y = np.ones((1, 64), "float32"), np.zeros((1, 1), "float32")
    once, twice = (
        saliency(model, [(x, y)] * n, lambda a, b: b, batch_statistics=True, score="paper", verbose=False)["out/kernel"]
        for n in (1, 2)
    )
    assert set(np.unique(once)) == {0, 4}  # an input that is kept is doubled
    assert {0, 4, 16} == set(np.unique(twice))


def test_biases_before_batch_norm():
    layers = keras.layers

    def found(*stack):
        return biases_before_batch_norm(keras.Sequential([keras.Input((8, 8, 2)), *stack]))

    def conv(**options):
        return layers.Conv2D(2, 3, name="conv", **options)

    bn = layers.BatchNormalization
    assert found(conv(), bn()) == ["conv/bias"]
    assert found(conv(), layers.Cropping2D(1), bn()) == ["conv/bias"]
    assert found(conv(use_bias=False), bn()) == []
    assert found(conv(activation="relu"), bn()) == []
    assert found(conv(), layers.ReLU(), bn()) == []
    assert found(conv()) == []
    # Padded or dropped entries lack the bias, and so the mean does not take it away.
    assert found(conv(), layers.ZeroPadding2D(1), bn()) == []
    assert found(conv(), layers.Dropout(0.5), bn()) == []
    assert found(conv(), bn(trainable=False)) == []
    assert found(conv(), bn(axis=1)) == []  # the mean of a row is not the bias of a channel
    inner = keras.Sequential([keras.Input((8, 8, 2)), conv(), bn()], name="inner")
    assert found(inner) == ["inner/conv/bias"]
    inputs = keras.Input((3,))
    hidden = layers.Dense(3, name="used_twice")(inputs)
    assert biases_before_batch_norm(keras.Model(inputs, layers.Add()([bn()(hidden), hidden]))) == []
    hidden = layers.Dense(3, name="an_output")(inputs)
    assert biases_before_batch_norm(keras.Model(inputs, [bn()(hidden), hidden])) == []


def test_bias_before_batch_norm_has_no_gradient():
    model = keras.Sequential([keras.Input((3,)), keras.layers.Dense(4, name="a"), keras.layers.BatchNormalization()])
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(16, 3)).astype("float32"), rng.normal(size=(16, 4)).astype("float32")
    found = saliency(model, (x, y), "mse", batch_statistics=True, verbose=False)
    assert found["a/bias"].max() < 1e-10 * found["a/kernel"].max()


# Errors


@pytest.mark.parametrize("r_bayes", [1.3, -0.1, float("nan"), True, "a", None, float("inf")])
def test_r_bayes_is_checked(r_bayes):
    with pytest.raises(ValueError, match="r_bayes"):
        top_k({"w": np.ones(3)}, r_bayes)


def test_scores_and_scope_are_checked():
    for empty in ({}, {"w": np.zeros(0)}):
        with pytest.raises(ValueError, match="empty scores"):
            top_k(empty, 0.5)
    for bad in (np.nan, np.inf):
        with pytest.raises(ValueError, match="infinity in 'w'"):
            top_k({"w": np.array([1.0, bad])}, 0.5)
    with pytest.raises(ValueError, match="scope"):
        top_k({"w": np.ones(3)}, 0.5, scope="model")


def test_saliency_errors():
    model, x, y = linear()
    with pytest.raises(ValueError, match="score='hessian'"):
        saliency(model, (x, y), squared, score="hessian")
    for score in ("fisher", "per_example"):
        with pytest.raises(ValueError, match="no data"):
            saliency(model, [], squared, score=score, verbose=False)
    for data, message in (
        ([x], r"\(x, y, sample_weight\), or batches.*Received: .*ndarray.* in batch 0"),
        ([(x, y), (x, y[:3])], r"one label for each example.*\(10, 3\), \(3, 1\).*in batch 1"),
        (tf.data.Dataset.from_tensor_slices((x, y)).batch(5).repeat(), "endless dataset"),
        (None, "Expected data and a loss"),
        (tf.data.Dataset.from_tensor_slices((x[:, 0], y)), r"dataset\.batch"),
    ):
        with pytest.raises(ValueError, match=message):
            saliency(model, data, squared, verbose=False)
    with pytest.raises(ValueError, match="max_batches=0"):
        saliency(model, (x, y), squared, max_batches=0)
    with pytest.raises(ValueError, match="built model"):
        saliency(keras.Sequential([keras.layers.Dense(1)]), (x, y), squared)
    with pytest.raises(ValueError, match=r"finite loss.*batch 1"):
        saliency(model, [(x, y), (x * np.nan, y)], squared, verbose=False)
    with pytest.raises(ValueError, match=r"'out/kernel', 'out/bias'\] are not finite in batch 1"):
        # The root of the last batch's zeros is finite and its slope is not.
        data = [(x, y), (x, y * 0)]
        saliency(model, data, lambda a, b: tf.reduce_sum(tf.sqrt(b * b * a * a)), verbose=False)


def test_the_compiled_loss_is_the_default():
    model, x, y = linear()
    with pytest.raises(ValueError, match="not compiled"):
        saliency(model, (x, y), verbose=False)
    model.compile("sgd", squared)
    found, expected = (saliency(model, (x, y), *loss, verbose=False) for loss in ((), (squared,)))
    for key in expected:
        np.testing.assert_array_equal(found[key], expected[key])


def test_one_hot_labels_of_a_sparse_loss_are_told():
    model = keras.Sequential([keras.Input((2,)), keras.layers.Dense(3, "softmax")])
    with pytest.raises(ValueError, match=r"class numbers, without a class axis.* pass y.argmax\(-1\)"):
        saliency(model, (np.ones((4, 2)), np.eye(3)[[0, 1, 2, 0]]), "sparse_categorical_crossentropy", verbose=False)


def test_class_numbers_for_categorical_crossentropy_are_told():
    model = keras.Sequential([keras.Input((2,)), keras.layers.Dense(3, "softmax")])
    with pytest.raises(ValueError, match=r"labels \(batch,\). For class numbers compile with sparse_categorical_cross"):
        saliency(model, (np.ones((4, 2)), np.array([0, 1, 2, 0])), "categorical_crossentropy", verbose=False)


def test_a_share_that_rounds_to_nothing_warns():
    with pytest.warns(UserWarning, match="No entry is Bayesian: r_bayes=0.01 of 3 entries rounds to 0"):
        assert top_k({"w": np.ones(3)}, 0.01).num_bayesian == 0


def test_masks_of_another_model():
    model, _, _ = linear()
    top_k(saliency(model, None, None, score="random"), 0.5).check(model)
    with pytest.raises(ValueError, match="are not weights"):
        Masks({"other/kernel": np.ones((3, 1), bool)}).check(model)
    with pytest.raises(ValueError, match=r"weight key -> boolean array.*Received: 0\.05.*r_bayes"):
        Masks(0.05)
    with pytest.raises(ValueError, match="another shape"):
        Masks({"out/kernel": np.ones((1, 3), bool)}).check(model)


@pytest.mark.parametrize("score", GRADIENT_SCORES)
def test_weight_without_gradient_warns_and_scores_zero(score):
    inputs = keras.Input((3,), dtype="float64")
    used, unused = (keras.layers.Dense(1, dtype="float64", name=n)(inputs) for n in ("used", "unused"))
    model = keras.Model(inputs, [used, unused])
    _, x, y = linear()
    with pytest.warns(UserWarning, match="unused/kernel"):
        found = saliency(model, (x, y), lambda a, b: squared(a, b[0]), score=score, verbose=False)
    assert found["used/kernel"].min() > 0
    assert found["unused/kernel"].max() == 0


# The recorder


def recorded_network(dtype=None, regularizer=None):
    keras.utils.set_random_seed(0)
    layers = [
        keras.layers.Conv2D(3, 3, name="conv", dtype=dtype, kernel_regularizer=regularizer, use_bias=False),
        keras.layers.BatchNormalization(dtype=dtype),
        keras.layers.Activation("tanh", dtype=dtype),
        keras.layers.Flatten(dtype=dtype),
        keras.layers.Dense(2, name="out", dtype=dtype),
    ]
    return keras.Sequential([keras.Input((4, 4, 2)), *layers])


@pytest.fixture(scope="module")
def images():
    rng = np.random.default_rng(0)
    return rng.normal(size=(10, 4, 4, 2)).astype("float32"), rng.normal(size=(10, 2)).astype("float32")


@pytest.fixture(scope="module")
def own_pass(images):
    """The scores of a pass of its own, over batches of 4, 4 and 2, in training mode."""

    @functools.cache
    def scores(score="fisher", dtype=None):
        options = {"batch_size": BATCH, "batch_statistics": True, "verbose": False}
        return saliency(recorded_network(dtype), images, "mse", score=score, **options)

    return scores


def recorded(images, optimizer, score="fisher", epochs=1, model=None, **options):
    """A recorder after `fit` on the batches of `own_pass`, its model, and that all but training is as it was."""
    model = recorded_network() if model is None else model
    model.compile(optimizer, "mse", **options)
    recorder = SaliencyRecorder(score)
    model.fit(*images, batch_size=BATCH, epochs=epochs, shuffle=False, verbose=0, callbacks=[recorder])
    return recorder, model


def equal(scores, want):
    assert list(scores) == list(want)
    for key, values in want.items():
        assert scores[key].dtype == np.float32
        np.testing.assert_allclose(scores[key], values, rtol=1e-4, atol=1e-6 * values.max(), err_msg=key)


SGD = keras.optimizers.SGD


@pytest.mark.parametrize("score", ["fisher", "paper", "taylor"])
def test_recorder_equals_a_pass_of_its_own(score, images, own_pass):
    recorder, _ = recorded(images, SGD(0.0), score, epochs=2)
    equal(recorder.scores(), own_pass(score))


@pytest.mark.parametrize(
    ("optimizer", "options"),
    [
        (lambda: keras.optimizers.Adam(0.0, global_clipnorm=1e-3), {}),
        (lambda: SGD(0.0, clipvalue=1e-4, weight_decay=0.1, momentum=0.9), {"steps_per_execution": 2}),
        (lambda: SGD(0.0, loss_scale_factor=64.0), {"run_eagerly": True}),
        (lambda: SGD(0.0, gradient_accumulation_steps=2), {}),
        (lambda: SGD(0.0), {"jit_compile": True}),
    ],
)
def test_recorder_takes_gradients_before_what_the_optimiser_does_to_them(optimizer, options, images, own_pass):
    recorder, _ = recorded(images, optimizer(), **options)
    equal(recorder.scores(), own_pass())


def test_recorder_leaves_regularisers_out(images, own_pass):
    recorder, _ = recorded(images, SGD(0.0), model=recorded_network(regularizer=keras.regularizers.L1L2(0.1, 1.0)))
    equal(recorder.scores(), own_pass())


def test_recorder_unscales_and_leaves_skipped_steps_out(images):
    x, y = images
    # The first batch overflows under this scale, is skipped, and halves it: its gradient is in no score.
    optimizer = keras.optimizers.LossScaleOptimizer(SGD(0.0), initial_scale=2.0**15)
    model = recorded_network("mixed_float16")
    model.compile(optimizer, "mse")
    recorder = SaliencyRecorder()
    weight = np.ones(10, "float32")
    weight[:BATCH] = 1e4
    model.fit(x, y, sample_weight=weight, batch_size=BATCH, shuffle=False, verbose=0, callbacks=[recorder])
    assert int(optimizer.inner_optimizer.iterations) == 2 and float(optimizer.dynamic_scale) == 2.0**14
    options = {"batch_size": BATCH, "batch_statistics": True, "verbose": False}
    want = saliency(recorded_network("mixed_float16"), (x[BATCH:], y[BATCH:]), "mse", **options)
    equal(recorder.scores(), want)


def test_recorder_with_sparse_gradients_and_an_unused_weight():
    x, y = np.array([[1, 1], [1, 3]]), np.zeros((2, 2, 1), "float32")
    inputs = keras.Input((2,), dtype="int32")
    model = keras.Model(inputs, keras.layers.Embedding(5, 1, name="emb")(inputs))
    model.compile(SGD(0.0), lambda a, b: tf.reduce_sum(b, axis=(1, 2)))
    recorder = SaliencyRecorder()
    model.fit(x, y, batch_size=2, verbose=0, callbacks=[recorder])
    np.testing.assert_allclose(recorder.scores()["emb/embeddings"][:, 0], np.array([0, 1.5, 0, 0.5, 0]) ** 2)


def test_recorder_over_replicas_counts_the_global_batch():
    """In a process of its own: two logical processors must be asked for before TensorFlow starts."""
    code = """
import keras, numpy as np, tensorflow as tf
halves = [tf.config.LogicalDeviceConfiguration()] * 2
tf.config.set_logical_device_configuration(tf.config.list_physical_devices("CPU")[0], halves)
from sbn_tf.saliency import SaliencyRecorder, saliency
rng = np.random.default_rng(0)
x, y = rng.normal(size=(12, 3)).astype("float32"), rng.normal(size=(12, 1)).astype("float32")
def network():
    keras.utils.set_random_seed(0)
    return keras.Sequential([keras.Input((3,)), keras.layers.Dense(1, name="out", kernel_regularizer="l2")])
want = saliency(network(), (x, y), "mse", batch_size=4, verbose=False)
inner = lambda: keras.optimizers.SGD(0.0, clipnorm=1e-3)
for optimizer in (inner, lambda: keras.optimizers.LossScaleOptimizer(inner(), initial_scale=8.0)):
    with tf.distribute.MirroredStrategy(["CPU:0", "CPU:1"]).scope():
        model = network()
        model.compile(optimizer(), "mse", jit_compile=False)
    recorder = SaliencyRecorder()
    model.fit(x, y, batch_size=4, shuffle=False, verbose=0, callbacks=[recorder])
    for key, values in recorder.scores().items():
        np.testing.assert_allclose(values, want[key], rtol=1e-5)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]


def untouched(model, function):
    own = {"train_step", "apply"} & (set(vars(model)) | set(vars(model.optimizer)))
    return not own and model.train_function is function


def test_recorder_costs_nothing_in_other_epochs_and_trains_alike(images):
    seen = []
    look = keras.callbacks.LambdaCallback(on_train_batch_begin=lambda b, logs: seen.append(model.train_function))
    recorder, weights = SaliencyRecorder(), []
    for callbacks in ([recorder, look], []):
        model = recorded_network()
        model.compile(keras.optimizers.Adam(0.01), "mse")
        model.fit(*images, batch_size=5, epochs=3, verbose=0, shuffle=False, callbacks=callbacks)
        weights.append(model.get_weights())
        if callbacks:
            assert len(set(seen[:4])) == 1 and set(seen[4:]) != set(seen[:4])
            assert untouched(model, seen[0])
            scores = recorder.scores()
    for a, b in zip(*weights, strict=True):
        np.testing.assert_array_equal(a, b)
    assert all(values.max() > 0 for values in scores.values())


class Raise(keras.callbacks.Callback):
    def __init__(self, at):
        super().__init__()
        self.at = at

    def on_train_batch_end(self, batch, logs=None):
        if batch == self.at:
            raise KeyboardInterrupt


def test_recorder_counts_whole_epochs_only_and_cleans_up(images):
    recorder = SaliencyRecorder()
    with pytest.raises(ValueError, match="Received: no fit with this callback"):
        recorder.scores()
    model = recorded_network()
    model.compile(SGD(0.0), "mse")
    options = {"batch_size": 5, "shuffle": False, "verbose": 0}
    model.fit(*images, **options)
    function = model.train_function

    class Stop(keras.callbacks.Callback):
        def on_train_batch_end(self, batch, logs=None):
            model.stop_training = True

    model.fit(*images, **options, callbacks=[recorder, Stop()])  # after one batch of two
    with pytest.raises(ValueError, match="epoch 0, counted from 0, did not run to its end"):
        recorder.scores()
    assert untouched(model, function)
    early = keras.callbacks.LambdaCallback(on_epoch_end=lambda e, logs: setattr(model, "stop_training", True))
    model.fit(*images, **options, epochs=3, callbacks=[recorder, early])
    with pytest.raises(ValueError, match="ended before epoch 2, counted from 0"):
        recorder.scores()
    every = SaliencyRecorder(epoch="every")
    model.fit(*images, **options, epochs=3, callbacks=[every, early])
    model.fit(*images, **options, epochs=3, initial_epoch=2, callbacks=[recorder])  # as a resumed one does
    equal(every.scores(), recorder.scores())
    assert untouched(model, function)
    with pytest.raises(KeyboardInterrupt):
        model.fit(*images, **options, callbacks=[recorder, Raise(0)])
    with pytest.raises(ValueError, match="did not run to its end"):
        recorder.scores()
    model.fit(*images, **options)
    assert untouched(model, function)
    with pytest.raises(ValueError, match="Dimensions must be equal"):  # while the step is traced
        model.fit(images[0], images[1][:, :1].repeat(3, 1), **options, callbacks=[recorder])
    assert untouched(model, function)


def test_recorder_with_data_of_unknown_length(images):
    def stream():
        yield from batches(*images, 5)

    spec = tuple(tf.TensorSpec((None, *part.shape[1:]), "float32") for part in images)
    model = recorded_network()
    model.compile(SGD(0.0), "mse")
    unknown, known = SaliencyRecorder(), SaliencyRecorder()
    model.fit(tf.data.Dataset.from_generator(stream, output_signature=spec), verbose=0, callbacks=[unknown])
    model.fit(*images, batch_size=5, shuffle=False, verbose=0, callbacks=[known])
    equal(unknown.scores(), known.scores())


def test_recorder_errors(images):
    with pytest.raises(ValueError, match="score='per_example'"):
        SaliencyRecorder("per_example")
    for epoch in ("first", -1, True, 1.5):
        with pytest.raises(ValueError, match="Expected epoch"):
            SaliencyRecorder(epoch=epoch)
    x, y = images
    model = recorded_network()
    model.compile(SGD(0.0), "mse")
    recorder = SaliencyRecorder()
    model.fit(x * np.nan, y, verbose=0, callbacks=[recorder])
    with pytest.raises(ValueError, match=r"NaN or infinity in \['conv/kernel'"):
        recorder.scores()


# Channels


def channel_network():
    layers = keras.layers
    inputs = keras.Input((8, 8, 2))
    x = layers.Conv2D(4, 3, name="conv")(inputs)
    x = layers.DepthwiseConv2D(3, depth_multiplier=2, name="depthwise")(x)
    x = layers.SeparableConv2D(3, 3, name="separable")(x)
    x = layers.Conv2DTranspose(5, 2, name="transposed")(x)
    x = layers.EinsumDense("bhwc,cde->bhwde", (3, 3, 2, 3), bias_axes="de", name="einsum")(x)
    return keras.Model(inputs, layers.Dense(6, name="dense")(layers.Flatten()(x)))


CHANNELS = {  # where a channel's entries lie: for kernel and bias the index of the channel of a flat number
    "conv": lambda c: {"kernel": np.s_[..., c], "bias": c},
    "depthwise": lambda c: {"kernel": np.s_[:, :, c // 2, c % 2], "bias": c},
    "separable": lambda c: {"pointwise_kernel": np.s_[..., c], "bias": c},
    "transposed": lambda c: {"kernel": np.s_[:, :, c, :], "bias": c},
    "einsum": lambda c: {"kernel": np.s_[:, c // 3, c % 3], "bias": (c // 3, c % 3)},
    "dense": lambda c: {"kernel": np.s_[:, c], "bias": c},
}


@pytest.mark.parametrize("layer", CHANNELS)
def test_a_channel_is_what_changes_one_output_channel(layer):
    model = channel_network()
    scores = {key: np.zeros(w.variable.shape, "float32") for key, w in named_weights(model).items()}
    wanted = {f"{layer}/{name}": at for name, at in CHANNELS[layer](2).items()}
    for key, at in wanted.items():
        scores[key][at] = 1.0
    k = sum(int((scores[key] > 0).sum()) for key in wanted)
    masks = top_k(scores, k / sum(s.size for s in scores.values()), scope="channel", model=model)
    assert captured(scores, masks) == 1 and masks.num_bayesian == k
    if layer == "separable":
        return  # in between comes the depthwise part
    part = keras.Model(model.input, model.get_layer(layer).output)  # outside truth: what an entry moves
    x = np.random.default_rng(0).normal(size=(1, 8, 8, 2))
    before = np.array(part(x))
    for key, mask in masks.items():
        if mask.any():
            variable = named_weights(model)[key].variable
            variable.assign(variable + np.where(mask, 0.5, 0.0))
    moved = np.array(part(x)) != before
    channels = moved.reshape(-1, 6) if layer == "einsum" else moved.reshape(-1, moved.shape[-1])
    assert np.flatnonzero(channels.any(0)).tolist() == [2]


@pytest.mark.parametrize(
    ("equation", "shape", "bias_axes", "bias_at"),
    [
        ("abc,cde->abed", (None, 3, 2), "ed", np.s_[2, 1]),
        ("abc,cde->abed", (4, 3, 2), "bed", np.s_[:, 2, 1]),
        ("abc,cde->aedb", (3, 2, None), "ed", np.s_[2, 1]),
        ("...c,cde->...ed", (3, 2), "ed", np.s_[2, 1]),
    ],
)
def test_a_channel_of_outputs_whose_axes_change_places(equation, shape, bias_axes, bias_at):
    """The channel e = 2, d = 1: its kernel entries move it alone, and so must its bias entries."""
    inputs = keras.Input((4, 5))
    layer = keras.layers.EinsumDense(equation, shape, bias_axes=bias_axes, name="einsum")
    model = keras.Model(inputs, layer(inputs))
    scores = {key: np.zeros(w.variable.shape, "float32") for key, w in named_weights(model).items()}
    scores["einsum/kernel"][:, 1, 2] = 1.0
    scores["einsum/bias"][bias_at] = 1.0
    k = sum(int(s.sum()) for s in scores.values())
    masks = top_k(scores, k / sum(s.size for s in scores.values()), scope="channel", model=model)
    assert captured(scores, masks) == 1 and masks.num_bayesian == k
    x = np.random.default_rng(0).normal(size=(1, 4, 5)).astype("float32")
    outputs = equation.split("->")[1].replace("...", "ab")
    moved = []
    for key, mask in masks.items():  # outside truth: what each weight's entries move
        before, variable = np.array(model(x)), named_weights(model)[key].variable
        variable.assign(variable + np.where(mask, 0.5, 0.0))
        change = np.moveaxis(np.array(model(x)) != before, (outputs.index("e"), outputs.index("d")), (0, 1))
        moved.append(np.argwhere(change.reshape(3, 2, -1).any(-1)).tolist())
    assert moved == [[[2, 1]], [[2, 1]]]


def test_channels_by_hand():
    model = keras.Sequential([keras.Input((2,)), keras.layers.Dense(3, name="a"), keras.layers.Dense(2, name="b")])
    scores = {
        "a/kernel": np.array([[1.0, 5.0, 0.0], [1.0, 0.0, 2.0]]),  # channels of 3 entries: 3, 6 and 2
        "a/bias": np.array([1.0, 1.0, 0.0]),
        "b/kernel": np.array([[4.0, 0.0], [3.0, 0.0], [0.0, 0.0]]),  # of 4 entries: 7 and 0
        "b/bias": np.zeros(2),
    }
    chosen = {k: top_k(scores, k / 17, scope="channel", model=model) for k in (0, 3, 6, 7, 8, 17)}
    sums = {k: round(18 * captured(scores, masks)) for k, masks in chosen.items()}
    assert {k: m.num_bayesian for k, m in chosen.items()} == {0: 0, 3: 3, 6: 6, 7: 7, 8: 7, 17: 17}
    assert sums == {0: 0, 3: 6, 6: 9, 7: 13, 8: 13, 17: 18}
    assert chosen[7]["b/kernel"].tolist() == [[True, False]] * 3 and chosen[7]["b/bias"].tolist() == [True, False]
    with pytest.raises(ValueError, match=r"3 entries\. Received: an r_bayes of 2 entries"):
        top_k(scores, 2 / 17, scope="channel", model=model)
    with pytest.raises(ValueError, match="model=None"):
        top_k(scores, 0.5, scope="channel")
    with pytest.raises(ValueError, match=r"scores of this model. Received: \['c/kernel'\]"):
        top_k({"c/kernel": np.ones(3)}, 0.5, scope="channel", model=model)


def test_captured():
    scores = {"a": np.array([1.0, 2.0]), "b": np.array([5.0])}
    assert captured(scores, {"a": np.array([False, True]), "b": np.array([True])}) == 7 / 8
    assert captured({"a": np.zeros(2)}, {"a": np.ones(2, bool)}) == 0


# Cost-aware selections


def chain(widths=(4, 4, 4, 2)):
    stack = [keras.layers.Dense(n, use_bias=False, name=f"d{i}") for i, n in enumerate(widths)]
    return keras.Sequential([keras.Input((4,)), *stack])  # 16, 16, 16 and 8 multiply-adds


def best_by_trying_all(scores, k, model, most):
    """The most saliency of k entries whose weights keep the fan-out, over all sets of weights."""
    graph, best = Graph(model), 0.0
    for number in range(1, len(scores) + 1):
        for keys in itertools.combinations(scores, number):
            values = np.sort(np.concatenate([scores[key].ravel() for key in keys]))[::-1]
            if len(values) >= k and graph.fan_out(keys) <= most:
                best = max(best, values[:k].sum())
    return best / sum(s.sum() for s in scores.values())


@pytest.mark.parametrize("scope", ["global", "layer"])
@pytest.mark.parametrize("cost_aware", [8 / 56, 24 / 56, 0.6, 1.0])
def test_cost_aware_is_exact_in_chains(cost_aware, scope):
    model = chain()
    scores = {k: np.random.default_rng(1).random(w.variable.shape) for k, w in named_weights(model).items()}
    masks = top_k(scores, 5 / 56, scope=scope, model=model, cost_aware=cost_aware)
    assert masks.num_bayesian == 5 and list(masks) == list(scores)
    assert Graph(model).fan_out([key for key, mask in masks.items() if mask.any()]) <= cost_aware
    if scope == "global":
        assert captured(scores, masks) == pytest.approx(best_by_trying_all(scores, 5, model, cost_aware))
    if cost_aware == 1:
        assert masks == top_k(scores, 5 / 56, scope=scope)


def test_cost_aware_over_branches_takes_the_better_set():
    inputs = keras.Input((4,))
    dense = functools.partial(keras.layers.Dense, 4, use_bias=False)
    left = dense(name="left_late")(dense(name="left_early")(inputs))
    right = dense(name="right_late")(dense(name="right_early")(inputs))
    model = keras.Model(inputs, keras.layers.Add()([left, right]))
    scores = {key: np.full((4, 4), 0.1) for key in named_weights(model)}
    scores["left_early/kernel"][0] = 9.0
    bound = Graph(model).fan_out(["left_early/kernel"])
    assert bound < Graph(model).fan_out(["left_early/kernel", "right_late/kernel"])
    masks = top_k(scores, 4 / 64, model=model, cost_aware=bound)
    assert masks["left_early/kernel"][0].all() and masks.num_bayesian == 4
    assert captured(scores, masks) == pytest.approx(best_by_trying_all(scores, 4, model, bound))


def test_cost_aware_over_branches_finds_a_late_weight_that_is_large_enough():
    """A convolution of one entry is the latest and the most salient: with it the 100 entries are too dear."""
    images, features = keras.Input((8, 8, 1)), keras.Input((10,))
    left = keras.layers.Conv2D(1, 1, use_bias=False, name="conv")(images)  # 64 multiply-adds
    right = keras.layers.Dense(10, use_bias=False, name="dense")(features)  # 100
    model = keras.Model([images, features], [left, right])
    scores = {"conv/kernel": np.full((1, 1, 1, 1), 1e3), "dense/kernel": np.random.default_rng(0).random((10, 10))}
    masks = top_k(scores, 50 / 101, model=model, cost_aware=0.61)
    assert Graph(model).fan_out(["dense/kernel"]) == pytest.approx(100 / 164) and masks.num_bayesian == 50
    assert captured(scores, masks) == pytest.approx(best_by_trying_all(scores, 50, model, 0.61))
    with pytest.raises(ValueError, match=r"Received: weights with 1\. Take cost_aware=1"):
        top_k(scores, 50 / 101, model=model, cost_aware=0.5)


def test_cost_aware_errors_and_none():
    model = chain()
    scores = {k: np.random.default_rng(1).random(w.variable.shape) for k, w in named_weights(model).items()}
    for cost_aware in (-0.1, 1.1, float("nan"), True, "0.5"):
        with pytest.raises(ValueError, match="Expected cost_aware"):
            top_k(scores, 0.1, model=model, cost_aware=cost_aware)
    with pytest.raises(ValueError, match=r"Expected 28 entries .* of 0\.43 or less.*with 24\. Take cost_aware=0\.715"):
        top_k(scores, 0.5, model=model, cost_aware=0.43)
    with pytest.raises(ValueError, match=r"with 0\. Take cost_aware=0\.143"):
        top_k(scores, 0.1, model=model, cost_aware=0.1)
    assert top_k(scores, 0.0, model=model, cost_aware=0.0).num_bayesian == 0
    channels = top_k(scores, 0.2, model=model, cost_aware=0.45, scope="channel")
    assert channels.num_bayesian == 8 and not channels["d0/kernel"].any() and not channels["d1/kernel"].any()


def test_saliency_against_cost_by_hand():
    model = chain()
    scores = {key: np.zeros(w.variable.shape) for key, w in named_weights(model).items()}
    for key, value in zip(scores, (5.0, 0.0, 2.0, 1.0), strict=True):
        scores[key][0, 0] = value
    costs, kept = saliency_against_cost(scores, 1 / 56, model, num_samples=5)
    np.testing.assert_allclose(costs, 1 + 4 * np.array([8, 24, 56]) / 56)
    np.testing.assert_allclose(kept, np.array([1, 2, 5]) / 8)


def test_one_weight_of_each_channel_is_its_most_salient():
    inputs = keras.Input((6, 6, 2))
    x = keras.layers.Conv2D(3, 3, name="a")(inputs)
    x = keras.layers.Conv2DTranspose(4, 2, name="b")(x)
    x = keras.layers.GlobalAveragePooling2D()(x)
    model = keras.Model(inputs, keras.layers.Dense(5, name="c")(x))
    scores = saliency(model, score="random", seed=3)
    masks = one_per_channel(scores, model)
    assert {key: int(mask.sum()) for key, mask in masks.items()} == {
        **{"a/kernel": 3, "a/bias": 0, "b/kernel": 4, "b/bias": 0, "c/kernel": 5, "c/bias": 0}
    }
    for key, channels in (("a/kernel", 3), ("b/kernel", 2), ("c/kernel", 1)):  # a transposed kernel's are before last
        rows = np.moveaxis(scores[key], channels, 0).reshape(scores[key].shape[channels], -1)
        chosen = np.moveaxis(masks[key], channels, 0).reshape(rows.shape)
        np.testing.assert_array_equal(rows[chosen], rows.max(axis=1))
