"""The start of step 3: scales, optimiser, loss and N of the trained network itself, and the guard."""

import warnings

import keras
import numpy as np
import pytest
import tensorflow as tf
from sklearn.metrics import log_loss

from sbn_tf.core.start import Start, is_far_worse
from sbn_tf.layers import masked_layers
from sbn_tf.partial_bayes import to_partial_bayes

RNG = np.random.default_rng(0)
X = RNG.normal(size=(50, 4)).astype("float32")
Y = (X[:, :1] + X[:, 1:2] > 0).astype("float32")


@pytest.fixture(scope="module")
def trained():
    keras.utils.set_random_seed(0)
    model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(8, "relu"), keras.layers.Dense(1, "sigmoid")])
    model.compile(keras.optimizers.Adam(0.05), "binary_crossentropy", metrics=["accuracy"])
    model.fit(X, Y, epochs=60, batch_size=10, verbose=0)
    assert model.evaluate(X, Y, verbose=0)[0] < 0.05
    return model


def bayes(model, **options):
    """Of two samples, unless told otherwise: each is traced."""
    options = {"r_bayes": 0.5, "data": (X, Y), "seed": 0, "verbose": False, "num_samples": 2} | options
    return to_partial_bayes(model, **options)


@pytest.mark.parametrize(
    ("drawn", "own", "worse"),
    [(0.44, 0.2, False), (0.46, 0.2, True), (0.04, 0.0, False), (0.06, 0.0, True), (-1.0, -1.0, False)],
)
def test_far_worse_is_above_twice_the_own_loss_and_a_little(drawn, own, worse):
    assert is_far_worse(drawn, own) == worse and is_far_worse(float("nan"), own)


def test_scales_start_at_a_tenth_of_each_weight_or_of_all_together(trained):
    for layer in masked_layers(bayes(trained).network):
        stock = trained.get_layer(layer.name)
        for name, posterior in layer.posteriors.items():
            whole = np.array(getattr(stock, name), "float64")
            expected = 0.1 * np.maximum(abs(whole), max(np.sqrt((whole**2).mean()), 1e-3))
            np.testing.assert_allclose(posterior.scale_of_entries(), expected[layer.mask(name)], rtol=1e-4)


def test_a_scale_that_is_given_is_in_the_weights_own_unit(trained):
    np.testing.assert_allclose(bayes(trained, initial_scale=0.02).scales(), 0.02, rtol=1e-5)
    relative = bayes(trained, initial_scale=0.2, relative=True).scales()
    np.testing.assert_allclose(relative, 2 * bayes(trained).scales(), rtol=1e-4)


def test_scales_that_would_ruin_a_network_start_narrower(trained):
    """Inputs 30 from 0, so that noise in the first kernel is 30 times as strong in the same function."""
    moved = keras.models.clone_model(trained)
    kernel, bias, *others = trained.get_weights()
    moved.set_weights([kernel, bias - 30 * kernel.sum(axis=0), *others])
    moved.compile("adam", "binary_crossentropy")
    x = X + 30.0
    own = log_loss(Y, moved.predict(x, verbose=0).astype("float64"))

    def loss_of_draws(**options):
        bnn = bayes(moved, data=(x, Y), r_bayes=1.0, num_samples=50, **options)
        return np.mean([log_loss(Y, p.astype("float64")) for p in bnn.predict_samples(x)]), bnn

    wide, _ = loss_of_draws(initial_scale=0.1, relative=True)
    gentle, bnn = loss_of_draws()
    assert wide > own + 0.5 and gentle < own + 0.1  # of 12
    first = masked_layers(bnn.network)[0]
    chosen = first.posterior_options.initial_scale
    assert np.log2(0.1 / chosen) == pytest.approx(round(np.log2(0.1 / chosen))) and chosen > 1e-4
    rms = np.sqrt((kernel.astype("float64") ** 2).mean())
    scales = np.reshape(first.posteriors["kernel"].scale_of_entries(), kernel.shape)
    np.testing.assert_allclose(scales, chosen * np.maximum(abs(kernel), rms), rtol=1e-3)
    assert first.get_config()["initial_scale"] == chosen  # what a file says of it
    masks = {f"{layer.name}/kernel": np.ones(layer.kernel.shape, bool) for layer in moved.layers}
    unknown = to_partial_bayes(moved, masks, num_train=50)  # no data: nothing to compare with
    assert masked_layers(unknown.network)[0].posterior_options.initial_scale == 0.1


@pytest.mark.parametrize(
    ("optimizer", "taken", "rate"),
    [
        (keras.optimizers.Adam(0.02, beta_1=0.8), 0, 0.002),
        (keras.optimizers.SGD(0.1, momentum=0.9, nesterov=True), 0, 0.01),
        (keras.optimizers.Adam(keras.optimizers.schedules.CosineDecay(0.03, 100)), 100, 0.003),  # ends at 0
        (keras.optimizers.Adam(keras.optimizers.schedules.CosineDecay(0.0, 100, 0.0, "d", 0.04, 50)), 50, 0.004),
        (keras.optimizers.LossScaleOptimizer(keras.optimizers.Adam(0.02)), 0, 0.002),
    ],
)
def test_the_locs_train_at_a_tenth_of_the_networks_own_rate(trained, optimizer, taken, rate):
    model = keras.models.clone_model(trained)
    model.compile(optimizer, "binary_crossentropy")
    inner = getattr(optimizer, "inner_optimizer", optimizer)
    inner.iterations.assign(taken)
    bnn = bayes(model)
    bnn.compile()
    own, scales = bnn.optimizer.loc_optimizer, bnn.optimizer.scale_optimizer
    assert type(own) is type(inner) and own is not inner
    assert float(own.learning_rate) == pytest.approx(rate, rel=1e-5)
    config = {key: value for key, value in inner.get_config().items() if key not in ("learning_rate", "name")}
    assert config.items() <= own.get_config().items()
    assert isinstance(scales, keras.optimizers.Adam) and float(scales.learning_rate) == pytest.approx(0.01)


def test_fit_compiles_as_the_network_was_trained_and_by_default_ruins_nothing(trained):
    before = log_loss(Y, trained.predict(X, verbose=0).astype("float64"))
    bnn = bayes(trained, num_samples=5)
    assert not bnn.compiled
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="The posterior's NLL")  # the guard is silent
        history = bnn.fit(X, Y, epochs=2, validation_data=(X, Y), verbose=0).history
    assert history["val_nll"][0] < 2 * before + 0.05 and history["val_accuracy"][0] >= 0.98
    assert set(history) == {f"{part}{key}" for part in ("", "val_") for key in ("loss", "nll", "kl", "accuracy")}
    bnn.compile(loss="mse")
    assert bnn.start.filled(None, "mse", {})[1:] == ("mse", {})  # metrics come with their own loss
    assert bnn.loss == "mse" and float(bnn.optimizer.loc_optimizer.learning_rate) == pytest.approx(0.005)
    plain = keras.Sequential([keras.Input((4,)), keras.layers.Dense(1, "sigmoid")])  # nothing is known of its training
    with pytest.raises(ValueError, match="Expected a loss: compile"):
        bayes(plain, loss="binary_crossentropy").fit(X, Y, verbose=0)


def test_evaluate_compiles_as_fit_does(trained):
    fresh = bayes(trained)
    loss, accuracy = (fresh.evaluate(X, Y, return_dict=True, verbose=0)[key] for key in ("loss", "accuracy"))
    assert np.isfinite(loss) and accuracy == np.mean((fresh.predict(X, verbose=0) > 0.5) == Y)
    assert isinstance(fresh.optimizer, keras.optimizers.Optimizer)


@pytest.mark.parametrize("labels", ["sparse", "logits"])
def test_a_network_whose_running_statistics_lag_behind_warns(labels):
    """Few steps at batch norm's usual momentum of .99: right in training mode, at chance in inference mode."""
    keras.utils.set_random_seed(0)
    x = 100 + 3 * np.random.default_rng(0).normal(size=(64, 4)).astype("float32")
    y = (x[:, 0] > 100).astype("int32")
    head = keras.layers.Dense(2, None if labels == "logits" else "softmax")
    layers = [keras.layers.Dense(8, "relu"), keras.layers.BatchNormalization(), head]
    model = keras.Sequential([keras.Input((4,)), *layers])
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=labels == "logits")
    model.compile(keras.optimizers.Adam(0.02), loss, metrics=["accuracy"])
    model.fit(x, y, epochs=10, batch_size=32, verbose=0)
    assert loss(y, model(x, training=True)) < 0.5 < np.log(2) < model.evaluate(x, y, verbose=0)[0]
    share, before = {"r_bayes": 0.5, "data": (x, y), "verbose": False, "num_samples": 2}, model.get_weights()
    with pytest.warns(UserWarning, match=r"on the first 32 examples .* inference mode .* lag behind"):
        to_partial_bayes(model, **share)
    for weights, value in zip(before, model.get_weights(), strict=True):
        np.testing.assert_array_equal(weights, value)
    for _ in range(500):
        model(x, training=True)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        to_partial_bayes(model, **share)


def test_nll_is_the_loss_without_the_kl(trained):
    bnn = bayes(trained, posterior="members", num_samples=3)  # the members are the same in each call
    bnn.compile(keras.optimizers.SGD(0.0))
    logs = bnn.fit(X, Y, batch_size=20, epochs=1, validation_data=(X, Y), validation_batch_size=20, verbose=0).history
    each = [log_loss(Y, p.astype("float64")) for p in bnn.predict_samples(X)]
    assert logs["nll"][0] == pytest.approx(np.mean(each), rel=1e-4)
    assert logs["val_nll"][0] == pytest.approx(log_loss(Y, bnn.predict(X, verbose=0).astype("float64")), rel=1e-4)
    gaussian = bayes(trained)
    logs = gaussian.fit(X, Y, batch_size=50, verbose=0).history
    assert logs["loss"][0] == pytest.approx(logs["nll"][0] + logs["kl"][0], rel=1e-4)  # beta 1, one term an example


def test_early_stopping_can_watch_the_nll(trained):
    stop = keras.callbacks.EarlyStopping("val_nll", patience=0, mode="min")
    bnn = bayes(trained)
    bnn.compile(keras.optimizers.SGD(5.0))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        history = bnn.fit(X, Y, epochs=9, validation_data=(X, Y), callbacks=[stop], verbose=0).history
    assert len(history["val_nll"]) < 9


@pytest.mark.parametrize(
    "data",
    [
        (X, Y),
        ({"a": X}, Y),
        tf.data.Dataset.from_tensor_slices((X, Y)).batch(20),
        [(X[:20], Y[:20]), (X[20:], Y[20:])],
        (batch for batch in [(X[:49], Y[:49]), (X[49:], Y[49:])]),
    ],
    ids=["arrays", "dictionary", "dataset", "list", "generator"],
)
def test_num_train_is_the_number_of_examples(trained, data):
    model = trained
    if isinstance(data, tuple) and isinstance(data[0], dict):
        inputs = {"a": keras.Input((4,), name="a")}
        model = keras.Model(inputs, trained(inputs["a"]))
        model.compile("adam", "binary_crossentropy")
    assert bayes(model, data=data).kl.num_train == 50


def test_another_num_train_warns_and_none_is_an_error(trained):
    with pytest.warns(UserWarning, match="num_train=5, but data has 50 examples: the KL is 10 times"):
        assert bayes(trained, num_train=5).kl.num_train == 5
    masks = {"dense/kernel": np.ones((4, 8), bool)}
    masks = {f"{trained.layers[0].name}/kernel": masks["dense/kernel"]}
    assert bayes(trained, masks=masks, r_bayes=None).kl.num_train == 50
    with pytest.raises(ValueError, match=r"Expected num_train=.*no data"):
        bayes(trained, masks=masks, r_bayes=None, data=None)


def test_the_guard_warns_of_a_ruined_start(trained):
    bnn = bayes(trained, initial_scale=5.0)
    with pytest.warns(UserWarning, match="before training; the trained network's is .* smaller initial_scale") as said:
        bnn.fit(X, Y, epochs=3, verbose=0)
    assert len([one for one in said if "trained network's" in str(one.message)]) == 1  # once


@pytest.mark.parametrize("batches", [True, False], ids=["dataset", "masks and arrays"])
def test_the_guard_warns_of_a_ruined_epoch(trained, batches):
    if batches:
        bnn = bayes(trained, data=tf.data.Dataset.from_tensor_slices((X, Y)).batch(20))
    else:
        masks = {f"{trained.layers[0].name}/kernel": np.ones((4, 8), bool)}
        bnn = bayes(trained, masks=masks, r_bayes=None, data=None, num_train=50)
    bnn.compile(keras.optimizers.Adam(10.0))
    with pytest.warns(UserWarning, match="after epoch 1; the trained network's is .* learning rate"):
        bnn.fit(X, Y, verbose=0)


def test_training_is_the_same_without_the_guard(trained):
    found = []
    for guarded in (True, False):
        bnn = bayes(trained, num_samples=2)
        bnn.compile("sgd", "binary_crossentropy")
        if not guarded:
            bnn.start = Start()
            bnn.start.guarded = lambda *arguments: arguments[-1]
        found.append(bnn.fit(X, Y, epochs=2, shuffle=False, verbose=0).history)
    assert found[0] == found[1]


def test_labels_of_two_outputs_as_fit_takes_them():
    inputs = keras.Input((4,))
    hidden = keras.layers.Dense(6, "relu")(inputs)
    model = keras.Model(inputs, [keras.layers.Dense(1, "sigmoid", name=name)(hidden) for name in ("p", "q")])
    for loss, weights in (("binary_crossentropy", None), (["binary_crossentropy", "mse"], [1.0, 0.1])):
        model.compile("sgd", loss, loss_weights=weights)
        bnn = bayes(model, data=(X, [Y, 1 - Y]), posterior="members", num_samples=2)
        bnn.compile(keras.optimizers.SGD(0.0))
        found = bnn.fit(X, [Y, 1 - Y], batch_size=50, verbose=0).history["nll"][0]
        draws = bnn.predict_samples(X)
        first = np.mean([log_loss(Y, p.astype("float64")) for p in draws[0]])
        second = np.mean([log_loss(1 - Y, p.astype("float64")) for p in draws[1]])
        second = second if weights is None else 0.1 * np.mean((draws[1] - (1 - Y)) ** 2)
        assert found == pytest.approx(first + second, rel=1e-4)


def test_own_loss_weights_stay_where_a_metric_cannot_be_copied():
    inputs = keras.Input((4,))
    model = keras.Model(inputs, [keras.layers.Dense(1, "sigmoid")(inputs) for _ in range(2)])

    class Own(keras.metrics.Mean):  # not registered
        pass

    losses = ["binary_crossentropy", "binary_crossentropy"]
    model.compile("sgd", losses, loss_weights=[1.0, 0.25], metrics=[[Own()], [Own()]])
    with pytest.warns(UserWarning, match="The network's metrics cannot be copied"):
        bnn = bayes(model, data=(X, [Y, Y]))
    assert bnn.start.filled(None, None, {})[2] == {"loss_weights": [1.0, 0.25]}


def test_an_optimiser_whose_rate_cannot_be_read_is_asked_for(trained):
    class Own(keras.optimizers.schedules.LearningRateSchedule):  # no get_config
        def __call__(self, step):
            return 0.01

    model = keras.models.clone_model(trained)
    model.compile(keras.optimizers.Adam(Own()), "binary_crossentropy", metrics=["accuracy"])
    bnn = bayes(model)
    with pytest.raises(ValueError, match=r"Expected compile\(optimizer\). Received: none.*Adam, whose learning rate"):
        bnn.compile()
    bnn.compile("adam")
    assert np.isfinite(bnn.fit(X, Y, verbose=0).history["nll"]).all()


def test_a_guard_takes_losses_below_zero_and_a_new_loss(trained):
    bnn = bayes(trained, terms_per_example=1)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="The posterior's NLL")
        bnn.compile(keras.optimizers.SGD(1e-4), lambda y, p: keras.losses.binary_crossentropy(y, p) - 5.0)
        bnn.fit(X, Y, verbose=0)
        bnn.compile(keras.optimizers.SGD(1e-4), "mse")
        bnn.fit(X, Y, verbose=0)
    own = np.mean((trained.predict(X[:32], verbose=0) - Y[:32]) ** 2)
    assert bnn.start.guard.own == pytest.approx(own, abs=0.01)


@pytest.mark.parametrize("kind", ["sparse", "labels of another form"])
def test_data_that_the_guard_cannot_compare_train_all_the_same(trained, kind):
    if kind == "sparse":
        bnn = bayes(trained)
        bnn.fit(tf.sparse.from_dense(X), Y, batch_size=10, verbose=0)
        assert bnn.start.guard is not None  # by the examples of `data`
    else:
        inputs = keras.Input((4,))
        model = keras.Model(inputs, keras.layers.Dense(2, "softmax")(inputs))
        model.compile("sgd", "sparse_categorical_crossentropy")
        bnn = bayes(model, data=(X, Y[:, 0].astype("int32")))
        bnn.compile("sgd", "categorical_crossentropy")
        hot = tf.data.Dataset.from_tensor_slices((X, np.eye(2)[Y[:, 0].astype(int)])).batch(10)
        assert np.isfinite(bnn.fit(hot, verbose=0).history["nll"]).all()


def test_the_guard_keeps_few_examples_of_its_own(trained):
    bnn = bayes(trained)
    bnn.fit(X, Y, batch_size=5, verbose=0)
    x, y = bnn.start.guard.examples
    np.testing.assert_array_equal(x, X[:5])
    assert x.base is None and len(y) == 5


@pytest.mark.parametrize("kind", ["texts", "numbers", "NumPy numbers"])
def test_a_list_of_labels_is_refused_in_one_line(trained, kind):
    y = {"texts": ["a", "b"] * 25, "numbers": [0, 1] * 25, "NumPy numbers": list(Y[:, 0])}[kind]
    says = "of texts give np.unique" if kind == "texts" else r"give np.array\(y\). Received: a list of numbers"
    with pytest.raises(ValueError, match=says):
        bayes(trained, data=(X, y))
    fresh = bayes(trained)
    for method in (fresh.fit, fresh.evaluate):
        with pytest.raises(ValueError, match=says):
            method(X, y, verbose=0)


def test_inputs_of_another_shape_are_refused_in_one_line(trained):
    fresh = bayes(trained)
    for call in (lambda x: fresh.fit(x, Y), lambda x: fresh.evaluate(x, Y), fresh.predict, fresh.predict_uncertainty):
        with pytest.raises(ValueError, match=r"Expected inputs of shape \(batch, 4\). Received: shape \(50, 3\)"):
            call(X[:, :3])
        with pytest.raises(ValueError, match=r"give np.stack\(x\). Received: a list of 50"):
            call(list(X))
