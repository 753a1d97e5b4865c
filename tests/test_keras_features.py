"""Keras's own training options: as the scales go to 0 each acts as on the stock model, or by a hand computation."""

import copy
import csv
import pickle

import keras
import numpy as np
import pytest
import tensorflow as tf
from keras import layers as kl

from sbn_tf.layers import posterior_mean
from sbn_tf.partial_bayes import LocScaleOptimizer, to_partial_bayes
from sbn_tf.saliency import Masks, named_weights

ESTIMATORS = ["all", "split", "flipout", "local"]
SGD = keras.optimizers.SGD
BCE = "binary_crossentropy"
WEIGHTS = np.arange(16.0)
SCALES = "untransformed_scale"

RANDOM = np.random.default_rng(0)
X = RANDOM.normal(size=(16, 3)).astype("float32")
Y = RANDOM.integers(0, 2, (16, 1)).astype("float32")
IMAGES = RANDOM.normal(size=(16, 4, 4, 1)).astype("float32")
MAPS = RANDOM.integers(0, 2, (16, 4, 4, 1)).astype("float32")


def network(heads=("head",), norm=False, dropout=0.0, as_dict=False):
    keras.utils.set_random_seed(0)
    x = keras.Input((3,))
    y = kl.Dense(4, use_bias=not norm, name="hidden")(x)
    if norm:
        y = kl.BatchNormalization(momentum=0.5, name="norm")(y)
    y = kl.Activation("tanh")(y)
    if dropout:
        y = kl.Dropout(dropout, name="dropout")(y)
    outputs = {name: kl.Dense(1, activation="sigmoid", name=name)(y) for name in heads}
    return keras.Model(x, outputs if as_dict else list(outputs.values()) if len(heads) > 1 else outputs[heads[0]])


def segmenter():
    keras.utils.set_random_seed(0)
    x = keras.Input((4, 4, 1))
    return keras.Model(x, kl.Conv2D(1, 3, padding="same", activation="sigmoid", name="head")(x))


def full(model):
    found = named_weights(model).items()
    return Masks({k: np.full(w.variable.shape, True) for k, w in found if w.variable.trainable and "norm" not in k})


def bayesian(model, **options):
    """Nearly the stock model: scales of 1e-8 and no KL, unless told otherwise."""
    defaults = {"num_train": 16, "num_samples": 2, "initial_scale": 1e-8, "beta": 0.0, "seed": 0}
    return to_partial_bayes(model, full(model), **{**defaults, **options})


def learning(policy=None, **options):
    """A model with scales that are felt, and a KL."""
    return bayesian(in_policy(policy, network), **{"initial_scale": 0.05, "beta": 1.0, **options})


def in_policy(policy, make):
    before = keras.config.dtype_policy()
    keras.config.set_dtype_policy(policy or before)
    try:
        return make()
    finally:
        keras.config.set_dtype_policy(before)


def both_optimisers(loc=None, scale=None):
    return LocScaleOptimizer(loc or SGD(0.1), scale or SGD(0.5))


def locs(model):
    network = getattr(model, "network", model)
    return {k: np.array(w.variable) for k, w in named_weights(network).items() if SCALES not in k}


def assert_same(bnn, stock, seen, expected):
    """Same logs (but for the KL) and same locs."""
    seen = {key: values for key, values in seen.items() if key.removeprefix("val_") not in ("kl", "nll")}
    assert seen.keys() == expected.keys()
    for key, values in expected.items():
        np.testing.assert_allclose(seen[key], values, rtol=1e-4, err_msg=key)
    theirs = locs(stock)
    assert locs(bnn).keys() == theirs.keys()
    for key, value in locs(bnn).items():
        np.testing.assert_allclose(value, theirs[key], rtol=1e-4, atol=1e-6, err_msg=key)


def compare(make=network, x=X, y=Y, optimizers=None, compiling=None, options=None, **fitting):
    """Train a stock model and its Bayesian copy with the same Keras options; return the histories."""
    stock = make()
    bnn = bayesian(make(), **(options or {}))
    optimizers = optimizers or (SGD(0.1), SGD(0.1))
    fitting = {"epochs": 2, "shuffle": False, "verbose": 0, **fitting}
    if not isinstance(x, tf.data.Dataset):
        fitting = {"batch_size": 8, **fitting}
    histories = []
    for model, optimizer in zip((stock, bnn), optimizers, strict=True):
        model.compile(optimizer, **{"loss": BCE, "run_eagerly": True, **(compiling or dict)()})
        histories.append(model.fit(x, y, **fitting).history)
    assert_same(bnn, stock, histories[1], histories[0])
    return histories


# ---- what the loss and the metrics are made of ----

WEIGHTED = {
    "class_weight": ({}, {"class_weight": {0: 1.0, 1: 3.0}}),
    "sample_weight": ({}, {"sample_weight": WEIGHTS}),
    "dataset": ({"x": tf.data.Dataset.from_tensor_slices((X, Y, WEIGHTS)).batch(8), "y": None}, {}),
    "per_pixel": ({"make": segmenter, "x": IMAGES, "y": MAPS}, {"sample_weight": np.arange(256.0).reshape(16, 4, 4)}),
}


@pytest.mark.parametrize(
    ("kind", "estimator"),
    [
        *(("sample_weight", estimator) for estimator in ESTIMATORS),  # Keras makes one of the next two
        *(("class_weight", "split"), ("dataset", "local")),
        *(("per_pixel", "all"), ("per_pixel", "split")),
    ],
)
def test_weights_of_classes_examples_and_pixels(kind, estimator):
    model, fitting = WEIGHTED[kind]
    compare(**model, options={"estimator": estimator}, **fitting)


@pytest.mark.parametrize("estimator", ["all", "split"])  # many calls, one call
def test_metrics_and_weighted_metrics(estimator):
    def compiling():
        mse = keras.metrics.MeanSquaredError(name="weighted_mse")
        return {"metrics": ["accuracy", keras.metrics.AUC(name="auc")], "weighted_metrics": [mse]}

    compare(compiling=compiling, options={"estimator": estimator}, sample_weight=WEIGHTS, validation_split=0.25)


def test_validation_data_with_weights():
    compare(validation_data=(X, 1 - Y, WEIGHTS))


HEADS = {
    "lists": ({}, [Y, 1 - Y], {"loss": [BCE, BCE], "loss_weights": [1.0, 3.0], "metrics": [["accuracy"], ["mse"]]}),
    "names": (
        {},
        [Y, 1 - Y],
        {"loss": {"a": BCE, "b": BCE}, "loss_weights": {"a": 1.0, "b": 3.0}, "metrics": {"b": ["mse"]}},
    ),
    "dicts": (
        {"as_dict": True},
        {"a": Y, "b": 1 - Y},
        {"loss": {"a": BCE, "b": BCE}, "loss_weights": {"a": 1.0, "b": 3.0}, "metrics": {"b": ["mse"]}},
    ),
}


@pytest.mark.parametrize(
    ("how", "estimator"),
    [("lists", "all"), ("lists", "local"), ("names", "split"), ("dicts", "all"), ("dicts", "flipout")],
)
def test_several_outputs_with_weights_of_their_losses(how, estimator):
    """Also the names in the logs are the stock model's."""
    options, targets, compiling = HEADS[how]
    compare(
        make=lambda: network(("a", "b"), **options),
        y=targets,
        compiling=lambda: copy.deepcopy(compiling),
        options={"estimator": estimator},
    )


# ---- how the steps run ----

RUNS = {
    "several_steps": {"run_eagerly": False, "steps_per_execution": 2},
    "jit": {"run_eagerly": False, "jit_compile": True},
}


@pytest.mark.parametrize("kind", RUNS)
def test_ways_to_run_a_step(kind):
    compare(compiling=lambda: RUNS[kind])


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_steps_of_one_execution_draw_as_single_steps_do(estimator):
    """With noise that is felt: the draws of each step are new ones, and the same ones either way."""
    kinds = [{"run_eagerly": True}, {"steps_per_execution": 2}]
    if estimator == "all":
        kinds.append({"steps_per_execution": 1})
    found = []
    for kind in kinds:
        bnn = learning(estimator=estimator, initial_scale=0.5)
        bnn.compile(both_optimisers(), BCE, **kind)
        bnn.fit(X, Y, batch_size=8, shuffle=False, verbose=0)
        found.append(bnn.get_weights())
    for other in found[1:]:
        for a, b in zip(found[0], other, strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6)


def test_single_batches():
    stock, bnn = network(), bayesian(network())
    for model in (stock, bnn):
        model.compile(SGD(0.1), BCE, metrics=["accuracy"], run_eagerly=True)
    weights = [{}, {"sample_weight": WEIGHTS}, {"class_weight": {0: 1.0, 1: 3.0}}]
    for weight in weights:
        assert_same(bnn, stock, *(m.train_on_batch(X, Y, return_dict=True, **weight) for m in (bnn, stock)))
    for weight in weights[:2]:
        assert_same(bnn, stock, *(m.test_on_batch(X, Y, return_dict=True, **weight) for m in (bnn, stock)))
    np.testing.assert_allclose(bnn.predict_on_batch(X), stock.predict_on_batch(X), rtol=1e-5)


@pytest.mark.parametrize(
    "method", ["fit", "evaluate", "predict", "train_on_batch", "test_on_batch", "predict_on_batch"]
)
def test_what_would_be_traced_at_the_mean_is_refused(method):
    bnn = learning()
    bnn.compile("sgd", BCE)
    arguments = (X,) if "predict" in method else (X, Y)
    with pytest.raises(ValueError, match="outside posterior_mean"), posterior_mean():
        getattr(bnn, method)(*arguments)


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_a_loop_of_ones_own(estimator):
    """GradientTape, compute_loss and apply: the step of fit."""
    fitted, own = (learning(estimator=estimator) for _ in range(2))
    for bnn in (fitted, own):
        bnn.compile(both_optimisers(), BCE, run_eagerly=True)
    logged = fitted.train_on_batch(X, Y)[0]
    with tf.GradientTape() as tape:
        loss = own.compute_loss(X, Y, own(X, training=True))
    own.optimizer.apply(tape.gradient(loss, own.trainable_variables), own.trainable_variables)
    assert float(loss) == pytest.approx(logged, rel=1e-6)
    for a, b in zip(fitted.get_weights(), own.get_weights(), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-6)


# ---- optimisers ----

SETTINGS = {
    "clipnorm": {"clipnorm": 0.01},
    "clipvalue": {"clipvalue": 0.01},
    "global_clipnorm": {"global_clipnorm": 0.01},
    "moving_average": {"use_ema": True, "ema_momentum": 0.8},
    "moving_average_at_once": {"use_ema": True, "ema_momentum": 0.8, "ema_overwrite_frequency": 2},
    "accumulation": {"gradient_accumulation_steps": 2},
    "weight_decay": {"weight_decay": 0.1},
}


@pytest.mark.parametrize(
    ("name", "both"),
    [(name, True) for name in SETTINGS]
    + [(name, False) for name in ("moving_average", "accumulation", "weight_decay")],
)
def test_settings_of_an_optimiser(name, both):
    """Of the locs' one in the pair, and of one alone."""
    settings = SETTINGS[name]
    ours = LocScaleOptimizer(SGD(0.1, **settings), SGD(0.0)) if both else SGD(0.1, **settings)
    compare(optimizers=(SGD(0.1, **settings), ours))


def steps(optimizer, gradients, start=1.0):
    """A scale of two entries, moved by these gradients; a loc with a gradient of 0 beside it."""
    loc, scale = keras.Variable([1.0], name="kernel"), keras.Variable([start, start], name=f"kernel_{SCALES}")
    found = []
    for gradient in gradients:
        optimizer.apply([keras.ops.zeros(1), keras.ops.array(gradient)], [loc, scale])
        found.append(np.array(scale))
    optimizer.finalize_variable_values([loc, scale])
    return [*found, np.array(scale)]


BY_HAND = {
    "clipnorm": ({"clipnorm": 1.0}, [[3.0, 4.0]], [[0.4, 0.2], [0.4, 0.2]]),  # the norm is 5
    "clipvalue": ({"clipvalue": 0.5}, [[3.0, -4.0]], [[0.5, 1.5], [0.5, 1.5]]),
    "global_clipnorm": ({"global_clipnorm": 1.0}, [[3.0, 4.0]], [[0.4, 0.2], [0.4, 0.2]]),
    # average 1, then 0.9 * 1 + 0.1 * 0 = 0.9
    "moving_average": ({"use_ema": True, "ema_momentum": 0.9}, [[0.0, 0.0], [1.0, 1.0]], [[1, 1], [0, 0], [0.9, 0.9]]),
    "accumulation": ({"gradient_accumulation_steps": 2}, [[1.0, 2.0], [0.0, 1.0]], [[1, 1], [0.5, -0.5], [0.5, -0.5]]),
}


@pytest.mark.parametrize("name", BY_HAND)
def test_settings_of_the_scales_optimiser_by_hand(name):
    settings, gradients, expected = BY_HAND[name]
    found = steps(LocScaleOptimizer(SGD(1.0), SGD(1.0, **settings)), gradients)
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)


def test_weight_decay_of_the_scales_own_optimiser_leaves_them_alone():
    bnn = learning()
    bnn.compile(both_optimisers(scale=keras.optimizers.AdamW(0.01, weight_decay=0.5)), BCE)
    before = bnn.scales()
    bnn.optimizer.apply([keras.ops.zeros(v.shape) for v in bnn.trainable_variables], bnn.trainable_variables)
    np.testing.assert_array_equal(bnn.scales(), before)


@pytest.mark.parametrize(
    "inner", [lambda: SGD(0.1, loss_scale_factor=8.0), lambda: keras.optimizers.LossScaleOptimizer(SGD(0.1))]
)
def test_loss_scaling_inside_the_two_is_refused(inner):
    for pair in ((inner(), SGD(0.1)), (SGD(0.1), inner())):
        with pytest.raises(ValueError, match=r"LossScaleOptimizer\(LocScaleOptimizer"):
            LocScaleOptimizer(*pair)


# ---- float16 ----


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_a_step_that_overflows_changes_nothing_but_the_loss_scale(estimator, tmp_path):
    bnn = learning("mixed_float16", estimator=estimator)
    bnn.compile(both_optimisers(), BCE, run_eagerly=estimator != "all")
    optimizer = bnn.optimizer
    assert isinstance(optimizer, keras.optimizers.LossScaleOptimizer)
    assert isinstance(optimizer.inner_optimizer, LocScaleOptimizer)
    before, first = bnn.get_weights(), float(optimizer.initial_scale)
    broken = X.copy()
    broken[0] = np.inf
    bnn.train_on_batch(broken, Y)
    for a, b in zip(before, bnn.get_weights(), strict=True):
        np.testing.assert_array_equal(a, b)
    assert float(optimizer.dynamic_scale) == first / 2 and int(optimizer.iterations) == 0
    bnn.train_on_batch(X, Y)
    assert float(optimizer.dynamic_scale) == first / 2 and int(optimizer.iterations) == 1
    moved = [v.name for v, a in zip(bnn.weights, before, strict=True) if not np.array_equal(v, a)]
    assert sorted(moved) == sorted(v.name for v in bnn.trainable_variables)
    bnn.save(tmp_path / "model.keras")
    again = keras.models.load_model(tmp_path / "model.keras")
    for a, b in zip(optimizer.variables, again.optimizer.variables, strict=True):
        np.testing.assert_array_equal(a, b)
    assert np.isfinite(again.train_on_batch(X, Y)).all()


def test_the_loss_scale_scales_the_kl_too():
    """Without data (weights of 0) a step is the KL's alone: rho by kl_weight (sigma - 1 / sigma) sigmoid(rho)."""
    loss_scale = keras.optimizers.LossScaleOptimizer
    optimizers = {
        "2^0": loss_scale(both_optimisers(), initial_scale=1.0),
        "2^15": loss_scale(both_optimisers(), initial_scale=2.0**15),
        "none": both_optimisers(),
    }
    sigma = 0.05
    rho = np.log(np.expm1(sigma))
    expected = rho - 0.5 * (sigma - 1 / sigma) / (1 + np.exp(-rho))
    for name, optimizer in optimizers.items():
        bnn = learning("mixed_float16", num_train=1)
        before = locs(bnn)
        bnn.compile(optimizer, BCE, auto_scale_loss=False, run_eagerly=True)
        bnn.train_on_batch(X, Y, sample_weight=np.zeros(16))
        for variable in bnn.trainable_variables:
            if SCALES in variable.name:
                np.testing.assert_allclose(variable, np.full(variable.shape, expected), rtol=1e-5, err_msg=name)
        for key, loc in locs(bnn).items():  # the KL's gradient is loc itself
            np.testing.assert_allclose(loc, 0.9 * before[key], rtol=1e-5, err_msg=name)


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_bfloat16_is_near_float32(estimator):
    losses = []
    for policy in (None, "mixed_bfloat16"):
        bnn = bayesian(in_policy(policy, network), estimator=estimator)
        bnn.compile(both_optimisers(), BCE, run_eagerly=True)
        losses.append(bnn.fit(X, Y, epochs=2, shuffle=False, verbose=0).history["loss"])
        assert all(v.dtype == "float32" for v in bnn.trainable_variables)
    np.testing.assert_allclose(*losses, rtol=2**-7)  # 8 bits of mantissa


# ---- layers that act otherwise in training ----


@pytest.mark.parametrize("batch_norm", ["frozen", "statistics", "train"])
def test_batch_norm(batch_norm):
    def make():
        model = network(norm=True)
        norm = model.get_layer("norm")
        norm.trainable = batch_norm != "frozen"
        if batch_norm == "statistics":
            norm.gamma.trainable = norm.beta.trainable = False
        return model

    stock, bnn = make(), bayesian(network(norm=True), num_samples=1, batch_norm=batch_norm)
    histories = []
    for model in (stock, bnn):
        model.compile(SGD(0.1), BCE)
        histories.append(model.fit(X + 1, Y, batch_size=8, epochs=2, shuffle=False, verbose=0).history)
    assert_same(bnn, stock, histories[1], histories[0])
    norms = [model.get_layer("norm") for model in (stock, bnn.network)]
    for a, b in zip(*(norm.weights for norm in norms), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5)


def test_dropout_drops_in_training_alone():
    """A hidden unit is 0 or 1 / (1 - rate) of itself, anew in each sample; a prediction drops none."""
    x = keras.Input((64,))
    model = keras.Model(x, kl.Dense(64, use_bias=False, name="head")(kl.Dropout(0.25, seed=0)(x)))
    model.get_layer("head").kernel.assign(np.eye(64))
    bnn = bayesian(model, terms_per_example=1, num_samples=3)
    ones = np.ones((32, 64), "float32")
    samples = [np.array(sample) for sample in bnn(ones, training=True)["samples"]]
    for sample in samples:
        np.testing.assert_allclose(np.where(sample > 0.5, sample * 0.75, 1.0), 1, atol=1e-5)
        kept = (sample > 0.5).mean()
        assert abs(kept - 0.75) < 4 * np.sqrt(0.25 * 0.75 / sample.size)
    assert not np.array_equal(samples[0] > 0.5, samples[1] > 0.5)
    np.testing.assert_allclose(bnn.predict(ones, verbose=0), ones, atol=1e-5)


# ---- callbacks ----


def test_early_stopping_goes_back_to_the_best_weights():
    """KL falls from epoch to epoch, so the first is the best where the largest is wanted."""
    bnn, seen = learning(), []
    bnn.compile(both_optimisers(), BCE, run_eagerly=True)
    look = keras.callbacks.LambdaCallback(on_epoch_end=lambda epoch, logs: seen.append(bnn.get_weights()))
    stop = keras.callbacks.EarlyStopping("kl", mode="max", patience=1, restore_best_weights=True)
    bnn.fit(X, Y, epochs=4, callbacks=[look, stop], verbose=0)
    assert len(seen) == 2 and stop.best_epoch == 0
    for a, b in zip(seen[0], bnn.get_weights(), strict=True):
        np.testing.assert_array_equal(a, b)
    assert any(not np.array_equal(a, b) for a, b in zip(seen[1], bnn.get_weights(), strict=True))


def test_a_plateau_lowers_the_rate_of_the_locs():
    bnn = learning()
    bnn.compile(both_optimisers(), BCE, run_eagerly=True)
    plateau = keras.callbacks.ReduceLROnPlateau("loss", factor=0.1, patience=1, min_delta=100.0)
    bnn.fit(X, Y, epochs=2, callbacks=[plateau], verbose=0)
    assert float(bnn.optimizer.loc_optimizer.learning_rate) == pytest.approx(0.01)
    assert float(bnn.optimizer.scale_optimizer.learning_rate) == pytest.approx(0.5)


def test_checkpoints_and_a_log(tmp_path):
    callbacks = keras.callbacks
    bnn = learning()
    bnn.compile(both_optimisers(SGD(0.1, momentum=0.9), keras.optimizers.Adam(0.1)), BCE, run_eagerly=True)
    whole = callbacks.ModelCheckpoint(tmp_path / "whole.keras")
    weights = callbacks.ModelCheckpoint(tmp_path / "only.weights.h5", save_weights_only=True)
    log = callbacks.CSVLogger(tmp_path / "log.csv")
    history = bnn.fit(X, Y, epochs=2, callbacks=[whole, weights, log], verbose=0).history
    loaded, filled = keras.models.load_model(tmp_path / "whole.keras"), learning()
    filled.load_weights(tmp_path / "only.weights.h5")
    for other in (loaded, filled):
        for a, b in zip(bnn.get_weights(), other.get_weights(), strict=True):
            np.testing.assert_array_equal(a, b)
    for a, b in zip(bnn.optimizer.variables, loaded.optimizer.variables, strict=True):
        np.testing.assert_array_equal(a, b)
    with open(tmp_path / "log.csv") as file:
        rows = list(csv.DictReader(file))
    np.testing.assert_allclose([float(row["kl"]) for row in rows], history["kl"])


def test_an_interrupted_fit_goes_on(tmp_path):
    """BackupAndRestore. As the scales go to 0: a restart draws its noise anew."""

    def trained(callbacks):
        bnn = bayesian(network())
        bnn.compile(both_optimisers(SGD(0.1, momentum=0.9)), BCE, run_eagerly=True)
        bnn.fit(X, Y, epochs=2, batch_size=8, shuffle=False, callbacks=callbacks, verbose=0)
        return bnn

    def break_off(epoch, logs):
        if epoch == 1:
            raise InterruptedError

    whole = trained([])
    backup = keras.callbacks.BackupAndRestore(tmp_path / "backup")
    with pytest.raises(InterruptedError):
        trained([backup, keras.callbacks.LambdaCallback(on_epoch_begin=break_off)])
    resumed = trained([keras.callbacks.BackupAndRestore(tmp_path / "backup")])
    assert len(resumed.history.history["loss"]) == 1
    for a, b in zip(whole.get_weights(), resumed.get_weights(), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5)


def test_a_loss_that_is_not_a_number_stops(capsys):
    bnn = learning()
    bnn.compile(both_optimisers(), BCE, run_eagerly=True)
    history = bnn.fit(
        np.full_like(X, np.nan), Y, batch_size=4, epochs=3, callbacks=[keras.callbacks.TerminateOnNaN()], verbose=0
    ).history
    assert len(history["loss"]) == 1 and int(bnn.optimizer.iterations) == 1


# ---- copies ----


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_a_copy_is_equal_and_of_its_own(copied):
    bnn = learning()
    bnn.compile(both_optimisers(), BCE, run_eagerly=True)
    bnn.fit(X, Y, verbose=0)
    other = copied(bnn)
    before = bnn.get_weights()
    for a, b in zip(before, other.get_weights(), strict=True):
        np.testing.assert_array_equal(a, b)
    other.beta = 0.5
    assert bnn.beta == 1.0 and float(other.network.get_layer("head").posterior_options.kl_weight) == pytest.approx(
        0.5 / 16
    )
    other.fit(X, Y, verbose=0)
    for a, b in zip(before, bnn.get_weights(), strict=True):
        np.testing.assert_array_equal(a, b)
    assert not np.array_equal(other.scales(), bnn.scales())


def test_the_summary_counts_a_loc_and_a_scale_for_each_entry():
    bnn, lines = learning(), []
    bnn.summary(print_fn=lines.append, expand_nested=True)
    text = "\n".join(lines)
    assert bnn.num_bayesian == network().count_params() == 21
    assert "hidden" in text and "Trainable params: 42 " in text
