"""Saliency scores against formulas and finite differences, exact selections, and what must not change."""

import keras
import numpy as np
import pytest
import tensorflow as tf

from sbn_tf.saliency import (
    Masks,
    biases_before_batch_norm,
    eligible_weights,
    named_weights,
    overlap,
    saliency,
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
    with pytest.raises(ValueError, match=r"fit the outputs \(\d+, 1\). Received: labels \(\d+, 3\)"):
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
    assert "m/a/kernel" in masks.table()
    assert masks.table().splitlines()[-1].split() == ["all", "9", "4", "44.4%", "100.0%"]
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
        ([x], r"\(x, y, sample_weight\)\. Received: .*ndarray.* in batch 0"),
        ([(x, y), (x, y[:3])], r"one label for each example.*\(10, 3\), \(3, 1\).*in batch 1"),
        (tf.data.Dataset.from_tensor_slices((x, y)).batch(5).repeat(), "endless dataset"),
        (None, "Expected data and a loss"),
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


def test_masks_of_another_model():
    model, _, _ = linear()
    top_k(saliency(model, None, None, score="random"), 0.5).check(model)
    with pytest.raises(ValueError, match="are not weights"):
        Masks({"other/kernel": np.ones((3, 1), bool)}).check(model)
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
