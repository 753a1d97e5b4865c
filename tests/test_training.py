"""Runs: resumption after a kill, divergence, and what each is keyed by."""

import dataclasses
import json
import os
import shutil
import signal
import subprocess
import sys
import warnings
from pathlib import Path

import keras
import matplotlib
import numpy as np
import pytest
import tensorflow_probability as tfp
from scipy.stats import kstest

from sbn_tf import datasets
from sbn_tf.core import memory
from sbn_tf.datasets.arrays import DiskArray, row_crc32, row_sums
from sbn_tf.experiments import dropout, fitting, folders, networks, recipes, run_folder, scoring, training, trivial
from sbn_tf.partial_bayes import BetaSchedule, LocScaleOptimizer, to_partial_bayes
from sbn_tf.saliency import named_weights, saliency, top_k

tfd = tfp.distributions


@pytest.fixture(scope="module")
def data():
    return datasets.load("phantom_lesion", size=16, limit=24)


class Kill(keras.callbacks.Callback):
    """SIGKILL at an optimiser step."""

    def __init__(self, at):
        super().__init__()
        self.at = at

    def on_train_batch_end(self, batch, logs=None):
        if self.model.optimizer.iterations == self.at:
            os.kill(os.getpid(), signal.SIGKILL)


def four_epochs(folder, *callbacks):
    """The weights of a sparse Bayesian network after four epochs of three steps."""
    keras.utils.set_random_seed(1)
    data = datasets.load("phantom_lesion", size=16, limit=24)
    layers = [keras.layers.Conv2D(4, 3, padding="same"), keras.layers.BatchNormalization(), keras.layers.ReLU()]
    layers += [keras.layers.Conv2D(1, 3, padding="same", activation="sigmoid")]
    model = keras.Sequential([keras.Input(data.input_shape), *layers])
    masks = top_k(saliency(model, None, None, score="magnitude"), 0.1)
    bnn = to_partial_bayes(model, masks, num_train=24, num_samples=2, seed=1)
    rate = keras.optimizers.schedules.CosineDecay(1e-2, 12)
    bnn.compile(LocScaleOptimizer(keras.optimizers.Adam(rate)), "binary_crossentropy")
    options = {"epochs": 4, "batch_size": 8, "seed": 3, "augment": "flips_and_quarter_turns", "folder": folder}
    fitting.fit(bnn, data.train, data.val, callbacks=callbacks, **options)
    return bnn.get_weights()


def test_training_killed_in_the_third_epoch_resumes_to_the_same_weights(tmp_path):
    code = f"import test_training as t; t.four_epochs({str(tmp_path / 'broken')!r}, t.Kill(8))"
    killed = subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parent, capture_output=True, check=False)
    assert killed.returncode == -signal.SIGKILL, killed.stderr[-2000:]
    with np.load(tmp_path / "broken" / "checkpoint.npz") as file:
        assert int(file["epochs"]) == 2
    assert_equal_weights(four_epochs(tmp_path / "whole"), four_epochs(tmp_path / "broken"))


def test_corrupt_checkpoint_is_named(data, tmp_path):
    model = keras.Sequential([keras.Input(data.input_shape), keras.layers.Conv2D(1, 3, padding="same")])
    model.compile("sgd", "mse")
    (tmp_path / "checkpoint.npz").write_bytes(b"PK\x03\x04 not whole")
    with pytest.raises(ValueError, match=r"whole npz file. Received: .*checkpoint.npz .*Delete it"):
        fitting.fit(model, data.train, None, epochs=1, batch_size=8, seed=0, folder=tmp_path)


def told(history):
    """A history without what is measured anew in each process."""
    return {key: values for key, values in history.items() if key not in ("seconds", "peak_bytes", "grown_bytes")}


def linear(data, learning_rate, **options):
    model = keras.Sequential([keras.Input(data.input_shape), keras.layers.Conv2D(1, 3, padding="same")])
    model.compile(keras.optimizers.SGD(learning_rate, **options), "mse")
    return model


@pytest.mark.parametrize("batch_size", [8, 24])  # 24: one batch an epoch, told by the next epoch's alone
@pytest.mark.parametrize("validated", [False, True])
def test_nan_loss_stops_and_keeps_the_last_good_weights(data, tmp_path, batch_size, validated):
    model = linear(data, 1e30, momentum=0.9)
    before = [w.copy() for w in model.get_weights()]
    with pytest.warns(UserWarning, match="training stopped"):
        history = fitting.fit(
            model,
            data.train,
            data.val if validated else None,
            epochs=3,
            batch_size=batch_size,
            seed=0,
            folder=tmp_path,
        )
    assert told(history) == {"nan_in_epoch": [0]}
    assert "seconds" not in history
    for a, b in zip(before, model.get_weights(), strict=True):
        np.testing.assert_array_equal(a, b)
    assert all(np.isfinite(v).all() for v in model.optimizer.variables)
    assert not (tmp_path / "checkpoint.npz").exists()


def test_nan_in_a_later_epoch_goes_back_to_the_good_one(data, tmp_path):
    class Spoil(keras.callbacks.Callback):
        def on_epoch_begin(self, epoch, logs=None):
            self.model.optimizer.learning_rate = 1e-3 if epoch < 2 else 1e30

    options = {"batch_size": 8, "seed": 0}
    good, model = linear(data, 1e-3), linear(data, 1e-3)
    model.set_weights(good.get_weights())
    fitting.fit(good, data.train, None, epochs=2, folder=tmp_path / "good", **options)
    with pytest.warns(UserWarning, match="In epoch 3"):
        history = fitting.fit(
            model, data.train, None, epochs=5, folder=tmp_path / "bad", callbacks=[Spoil()], **options
        )
    assert history["nan_in_epoch"] == [2] and len(history["loss"]) == 2
    for a, b in zip(good.get_weights(), model.get_weights(), strict=True):
        np.testing.assert_array_equal(a, b)
    with np.load(tmp_path / "bad" / "checkpoint.npz") as file:
        assert int(file["epochs"]) == 2


def test_a_learning_rate_of_nan_in_the_last_batch_is_seen(data, tmp_path):
    model = linear(data, float("nan"))
    with pytest.warns(UserWarning, match="a weight became NaN"):
        fitting.fit(model, data.train, None, epochs=1, batch_size=24, seed=0, folder=tmp_path)
    assert all(np.isfinite(w).all() for w in model.get_weights())


def test_checkpoints_of_others_are_refused(data, tmp_path):
    options = {"batch_size": 8, "seed": 0, "folder": tmp_path}
    fitting.fit(linear(data, 1e-3, momentum=0.9), data.train, None, epochs=2, **options)
    with pytest.raises(ValueError, match="of this model and optimiser"):
        fitting.fit(linear(data, 1e-3), data.train, None, epochs=3, **options)
    with pytest.raises(ValueError, match="Expected epochs >= 2"):
        fitting.fit(linear(data, 1e-3, momentum=0.9), data.train, None, epochs=1, **options)


def test_training_that_was_ended_on_purpose_stays_ended(data, tmp_path):
    model = linear(data, 1e-3)
    options = {"epochs": 9, "batch_size": 8, "seed": 0, "folder": tmp_path}
    stop = keras.callbacks.EarlyStopping("loss", patience=0, min_delta=1e3)
    first = fitting.fit(model, data.train, None, callbacks=[stop], **options)
    again = linear(data, 1e-3)
    second = fitting.fit(again, data.train, None, callbacks=[stop], **options)
    assert told(second) == told(first) and second["seconds"] == first["seconds"]
    for a, b in zip(model.get_weights(), again.get_weights(), strict=True):
        np.testing.assert_array_equal(a, b)


def test_the_bar_counts_batches_of_all_epochs_and_can_be_left_out(data, tmp_path, capsys):
    options = {"batch_size": 8, "seed": 0, "folder": tmp_path}
    fitting.fit(linear(data, 1e-3), data.train, None, epochs=2, **options)
    assert "6/6" in capsys.readouterr().err
    fitting.fit(linear(data, 1e-3), data.train, None, epochs=3, **options)
    assert "9/9" in capsys.readouterr().err
    fitting.fit(linear(data, 1e-3), data.train, None, epochs=4, verbose=False, **options)
    assert "/12" not in capsys.readouterr().err


def test_beta_after_resuming_is_the_schedule_s(data, tmp_path):
    def run(epochs):
        keras.utils.set_random_seed(0)
        model = linear(data, 1e-3)
        bnn = to_partial_bayes(model, top_k(saliency(model, None, None, score="magnitude"), 0.5), num_train=24, seed=0)
        bnn.compile("sgd", "mse")
        schedule = BetaSchedule(0.2, 0.01, 2)
        fitting.fit(bnn, data.train, None, epochs=epochs, batch_size=8, seed=0, folder=tmp_path, callbacks=[schedule])
        return bnn.beta

    assert run(2) == run(2) == 0.01


def test_the_validation_loss_of_several_raters_is_the_mean_of_theirs(tmp_path):
    data = datasets.load("phantom_nodule", size=16, limit=12)
    keras.utils.set_random_seed(0)
    model = keras.Sequential(
        [keras.Input(data.input_shape), keras.layers.Conv2D(1, 3, padding="same", activation="sigmoid")]
    )
    loss = recipes.WeightedBinaryCrossentropy(10.0)
    model.compile(keras.optimizers.SGD(1e-9), loss)
    history = fitting.fit(model, data.train, data.val, epochs=1, batch_size=12, seed=0, folder=tmp_path)
    images = model.predict(data.val.normalised(), verbose=0)
    raters = range(data.val.num_raters)
    assert data.val.rater_valid.all()
    expected = np.mean([float(loss(data.val.targets[..., r : r + 1].astype("float32"), images)) for r in raters])
    assert history["val_loss"][0] == pytest.approx(expected, rel=1e-4)


def test_the_three_steps_are_made_once_and_then_loaded(data, tmp_path, masked):
    recipe = recipes.recipe_for("quick", data.card, epochs=1, bayes_epochs=1, num_samples=2)
    step1 = training.deterministic_run(data, recipe, network=masked, runs=tmp_path)
    masks = training.masks_run(step1, data, recipe, 0.05)
    first = training.partial_run(step1, masks, data, recipe, runs=tmp_path)
    again = training.partial_run(step1, masks, data, recipe, runs=tmp_path)
    assert masks.num_bayesian == round(0.05 * masks.num_weights) == first.model.num_bayesian
    assert again.history == first.history and again.folder == first.folder
    images = data.test.normalised()
    np.testing.assert_array_equal(first.model.predict_samples(images), again.model.predict_samples(images))
    for a, b in zip(first.model.weights, again.model.weights, strict=True):
        np.testing.assert_array_equal(a, b)
    assert training.deterministic_run(data, recipe, network=masked, runs=tmp_path).history == step1.history
    written = json.loads((first.folder / "config.json").read_text())
    assert written["recipe"]["num_samples"] == 2 and written["r_bayes"] == masks.r_bayes
    settings = json.loads((step1.folder / "config.json").read_text())["settings"]
    assert "activation" not in settings  # the folders of masks and labels have the names that they had


class BreakOff(keras.callbacks.Callback):
    """Interrupts a training at the start of its second epoch, if it began with the first."""

    def on_train_begin(self, logs=None):
        self.epochs = []

    def on_epoch_begin(self, epoch, logs=None):
        self.epochs.append(epoch)
        if self.epochs == [0, 1]:
            raise Interrupted


def test_callbacks_of_one_s_own_watch_and_change_neither_the_run_nor_its_resumption(data, tmp_path, masked):
    recipe, seen = quick(data, num_samples=2), []
    note = keras.callbacks.LambdaCallback(on_epoch_end=lambda epoch, logs: seen.append((epoch, sorted(logs))))
    options = {"data": data, "recipe": recipe, "verbose": False}

    def steps(runs, *callbacks):
        keras.utils.clear_session()  # masks name layers, and Keras numbers these
        given = {**options, "runs": runs, "callbacks": callbacks}
        step1 = training.deterministic_run(network=masked, **given)
        masks = training.masks_run(step1, data, recipe, 0.05, verbose=False)
        more = training.continued_run(step1, method="more", **given)
        return step1, more, training.partial_run(step1, masks, **given)

    plain, runs = steps(tmp_path / "plain"), tmp_path / "watched"
    for _ in range(3):  # each of the three is interrupted once, after its first epoch
        with pytest.raises(Interrupted):
            steps(runs, note, BreakOff())
    watched = steps(runs, note)
    assert [epoch for epoch, _ in seen] == [0, 1] * 3  # each epoch was seen once
    assert all("val_loss" in names for _, names in seen) and "val_nll" in seen[-1][1]
    for one, other in zip(plain, watched, strict=True):
        assert one.folder.relative_to(tmp_path / "plain") == other.folder.relative_to(runs)
        assert_equal_weights(one.model.get_weights(), other.model.get_weights())
    steps(runs, note)
    assert len(seen) == 6  # finished runs call none


@pytest.fixture(scope="module")
def shared(tmp_path_factory):
    """A folder of runs that several tests start from: the first to ask trains, the others load. None is changed."""
    return tmp_path_factory.mktemp("shared")


@pytest.fixture
def tiny(monkeypatch):
    """A network of one convolution, which is traced in a second."""

    def build(input_shape, num_outputs, activation="sigmoid", seed=None):
        inputs = keras.Input(input_shape)
        x = keras.layers.Conv2D(8, 3, activation="relu", kernel_initializer=keras.initializers.HeNormal(seed))(inputs)
        x = keras.layers.BatchNormalization()(keras.layers.GlobalAveragePooling2D()(x))
        return keras.Model(inputs, keras.layers.Dense(num_outputs, activation=activation, name="head")(x))

    monkeypatch.setitem(networks.NETWORKS, "tiny", (build, {}))
    return "tiny"


@pytest.fixture
def straight(monkeypatch):
    """A network of masks with one convolution."""

    def build(input_shape, num_outputs, activation="sigmoid", seed=None):
        last = keras.layers.Conv2D(num_outputs, 1, activation=activation, name="head")
        return keras.Sequential([keras.Input(input_shape), last])

    monkeypatch.setitem(networks.NETWORKS, "straight", (build, {}))
    return "straight"


@pytest.fixture
def masked(monkeypatch):
    """A network of masks with two convolutions."""

    def build(input_shape, num_outputs, activation="sigmoid", seed=None):
        kernels = keras.initializers.HeNormal(seed)
        first = keras.layers.Conv2D(8, 3, padding="same", kernel_initializer=kernels)
        last = keras.layers.Conv2D(num_outputs, 3, padding="same", activation=activation, name="head")
        return keras.Sequential(
            [keras.Input(input_shape), first, keras.layers.BatchNormalization(), keras.layers.ReLU(), last]
        )

    monkeypatch.setitem(networks.NETWORKS, "masked", (build, {}))
    return "masked"


def in_colours(task, classes=3, train=48, test=18):
    """Noisy 8 x 8 images whose strongest colour is their class; the label of "binary" is class 1 of 2."""
    random = np.random.default_rng(0)
    names = ("red", "green", "blue")[:classes]
    if task == "binary":
        names = ("green",)
    card = datasets.Card("colours", "made", task, names, 3, 1, "", "", "", (), 8, "resnet18")
    parts = []
    for name, count in (("train", train), ("val", test), ("test", test)):
        label = np.arange(count) % classes
        images = random.integers(0, 120, (count, 8, 8, 3))
        images[np.arange(count), :, :, label] += 100
        targets = np.eye(classes, dtype="uint8")[label]
        parts.append(
            datasets.Split(name, task, images.astype("uint8"), targets[:, 1:2] if task == "binary" else targets)
        )
    return datasets.Data(card, *parts)


def on_disk(data, folder):
    """The same data, images and targets in files."""
    parts = []
    for split in (data.train, data.val, data.test):
        arrays = {}
        for key in ("images", "targets"):
            rows, path = getattr(split, key), folder / f"{split.name}_{key}.npy"
            np.save(path, rows)
            arrays[key] = DiskArray(path, None, row_crc32(rows), row_sums(rows) if key == "images" else None)
        parts.append(dataclasses.replace(split, **arrays))
    return datasets.Data(data.card, *parts)


@pytest.mark.parametrize(
    ("task", "class_weights", "loss", "head"),
    [
        ("multi-class", "none", "CategoricalCrossentropy", "softmax"),
        ("ordinal", "paper", "WeightedCategoricalCrossentropy", "softmax"),
        ("binary", "paper", "WeightedBinaryCrossentropy", "sigmoid"),
    ],
)
def test_the_three_steps_of_labels_and_classes(tmp_path, tiny, task, class_weights, loss, head):
    data = in_colours(task, classes=2 if task == "binary" else 3)
    recipe = recipes.recipe_for(
        "quick", data.card, epochs=30, bayes_epochs=2, batch_size=12, num_samples=2, class_weights=class_weights
    )
    options = {"runs": tmp_path, "verbose": False}
    step1 = training.deterministic_run(data, recipe, network=tiny, **options)
    assert type(step1.model.loss).__name__ == loss
    assert step1.model.layers[-1].activation.__name__ == head
    masks = training.masks_run(step1, data, recipe, 0.2, verbose=False)
    bayes = training.partial_run(step1, masks, data, recipe, **options)
    again = training.partial_run(step1, masks, data, recipe, **options)
    assert bayes.model.num_bayesian == round(0.2 * masks.num_weights) > 0
    assert bayes.model.probabilities == again.model.probabilities == head

    # The KL of one term an image, by hand: beta times all nats over the training images.
    assert bayes.history["kl"][-1] == pytest.approx(float(bayes.model.kl_divergence()) / 48, rel=0.05)

    prevalence = scoring.prevalence(task, data.train.targets)
    rows = trivial.trivial(task, data.train.targets, data.test.targets)
    for name, probs in {
        "deterministic": step1.model.predict(data.test.batches(12), verbose=0)[None],
        "partial": again.model.predict_samples(data.test.batches(12), num_samples=3),
    }.items():
        assert probs.shape == (3 if name == "partial" else 1, 18, data.num_outputs)
        rows[name] = scoring.evaluate(probs, data.test.targets, task, train_prevalence=prevalence)
        assert rows[name]["accuracy"] == rows[name]["auc"] == 1  # colour decides
        assert rows[name]["nll"] < 0.5 * rows["prevalence"]["nll"]
        assert set(rows[name]["undefined"]) <= {
            "error_auroc",
            "error_auroc_mi",
            "label_error_auroc",
        }  # no error to rank
    assert rows["partial"]["mutual_information"] > 0


def test_data_on_disk_are_read_a_batch_at_a_time_and_train_to_the_same_weights(tmp_path, tiny, monkeypatch):
    data = in_colours("multi-class")
    stored = on_disk(data, tmp_path)
    recipe = recipes.recipe_for("quick", data.card, epochs=1, bayes_epochs=1, batch_size=12, num_samples=2)
    rows_read, read = [], DiskArray._read

    def counted(self, index):
        if self.ndim == 4:
            rows_read.append(len(index))
        return read(self, index)

    monkeypatch.setattr(DiskArray, "_read", counted)
    found = []
    for name, source in (("memory", data), ("disk", stored)):
        options = {"runs": tmp_path / name, "verbose": False}
        step1 = training.deterministic_run(source, recipe, network=tiny, **options)
        masks = training.masks_run(step1, source, recipe, 0.2, verbose=False)
        found.append(training.partial_run(step1, masks, source, recipe, **options).model)
        assert bool(rows_read) == (name == "disk")
    for a, b in zip(*(model.weights for model in found), strict=True):
        np.testing.assert_array_equal(a, b)

    # Samples are those of the array in batches of the same size: noise belongs to the batch.
    streamed = found[0].predict_samples(stored.test.batches(12), num_samples=3)
    whole = found[1].predict_samples(data.test.normalised(), num_samples=3, batch_size=12)
    np.testing.assert_array_equal(streamed, whole)
    assert max(rows_read) <= 12
    assert len(rows_read) == (48 + 18) // 12 * 2 + 2 + 48 // 12 + 2  # two fits with validation, saliency, prediction


def cells_of(notebook):
    path = Path(__file__).resolve().parents[1] / "nbs" / f"{notebook}.ipynb"
    return ["".join(c["source"]) for c in json.loads(path.read_text("utf-8"))["cells"] if c["cell_type"] == "code"]


@pytest.mark.parametrize("notebook", ["01_deterministic", "02_saliency", "03_partial_bayes"])
@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, {}),
        ({"fold": 0}, {"fold": 0}),
        ({"split": "paper", "fold": 3}, {"split": "paper", "fold": 3}),
    ],
)
def test_notebooks_pass_options_to_the_dataset_only_where_they_are_set(monkeypatch, notebook, changes, expected):
    class Loaded(Exception):
        pass

    def load(name, **options):
        raise Loaded(options)

    monkeypatch.setattr(datasets, "load", load)
    parameters, *setup = cells_of(notebook)[:3]
    names = {}
    exec(parameters, names)
    names |= changes
    with matplotlib.rc_context(), pytest.raises(Loaded) as caught:
        for cell in setup:
            exec(cell, names)
    common = {"root": None, "size": None, "limit": None, "normalisation": "train"}
    assert caught.value.args[0] == {**common, **expected}


@pytest.mark.parametrize("notebook", ["01_deterministic", "02_saliency", "03_partial_bayes"])
def test_notebooks_do_not_ask_for_all_images_at_once(notebook):
    assert "normalised()" not in "".join(cells_of(notebook))


@pytest.mark.parametrize("network", ["unet_small", "unet_paper_lidc"])
def test_a_network_of_another_task_is_named(tmp_path, network):
    data = in_colours("multi-class")
    recipe = recipes.recipe_for("quick", data.card)
    with pytest.raises(ValueError, match=rf"Expected a network for multi-class.*network='{network}'"):
        training.deterministic_run(data, recipe, network=network, runs=tmp_path)


def test_a_run_that_met_nan_says_so_again_when_it_is_loaded(data, tmp_path, masked):
    recipe = recipes.recipe_for("quick", data.card, epochs=2, optimizer="sgd", learning_rate=1e30)
    with pytest.warns(UserWarning, match="training stopped"):
        first = training.deterministic_run(data, recipe, network=masked, runs=tmp_path)
    with pytest.warns(UserWarning, match="This run diverged in epoch 1"):
        again = training.deterministic_run(data, recipe, network=masked, runs=tmp_path)
    for a, b in zip(first.model.weights, again.model.weights, strict=True):
        np.testing.assert_array_equal(a, b)
        assert np.isfinite(b).all()


def test_other_data_changed_labels_or_other_masks_are_another_run(data, shared, masked):
    recipe = recipes.recipe_for("quick", data.card, epochs=1, bayes_epochs=1, num_samples=1)
    options = {"runs": shared, "verbose": False}
    step1 = training.deterministic_run(data, recipe, network=masked, **options)
    other = datasets.load("phantom_lesion", size=16, limit=24, seed=1)  # as many images, of the same size
    changed = datasets.load("phantom_lesion", size=16, limit=24)
    changed.train.targets[:] = 0
    found = [training.deterministic_run(one, recipe, network=masked, **options).folder for one in (other, changed)]
    assert len({step1.folder, *found}) == 3
    counts = []
    for score in ("magnitude", "random"):  # as many entries, elsewhere
        masks = top_k(saliency(step1.model, None, None, score=score), 0.05)
        run = training.partial_run(step1, masks, data, recipe, **options)
        assert run.model.num_bayesian == masks.num_bayesian
        counts.append((masks.num_bayesian, run.folder))
    assert counts[0][0] == counts[1][0] and counts[0][1] != counts[1][1]


def test_scores_are_of_the_data_and_batches_they_were_made_from(data, tmp_path, shared, masked):
    recipe = recipes.recipe_for("quick", data.card, epochs=1)
    step1 = training.deterministic_run(data, recipe, network=masked, runs=shared)
    step1 = dataclasses.replace(step1, folder=tmp_path)  # where scores are kept
    other = datasets.load("phantom_lesion", size=16, limit=24, seed=1)

    def found(data, recipe):
        return np.concatenate([values.ravel() for values in training.scores_run(step1, data, recipe).values()])

    first = found(data, recipe)
    assert not np.array_equal(found(other, recipe), first)
    assert not np.array_equal(found(data, dataclasses.replace(recipe, batch_size=2)), first)
    np.testing.assert_array_equal(found(data, recipe), first)


def test_random_scores_are_of_the_seed_and_no_others(data, tmp_path, shared, masked):
    recipe = recipes.recipe_for("quick", data.card, epochs=1)
    step1 = training.deterministic_run(data, recipe, network=masked, runs=shared)
    step1 = dataclasses.replace(step1, folder=tmp_path)
    by_chance = dataclasses.replace(recipe, score="random")
    for seed in (0, 3, 0):  # made, made, read
        expected = top_k(saliency(step1.model, score="random", seed=seed), 0.05)
        assert training.masks_run(step1, data, by_chance, 0.05, seed=seed) == expected
    assert training.masks_run(step1, data, recipe, 0.05, seed=3) == training.masks_run(step1, data, recipe, 0.05)
    with pytest.raises(ValueError, match="Expected seed"):
        training.scores_run(step1, data, by_chance, seed=-1)


@pytest.mark.parametrize("name", ["model.keras", "history.json"])
def test_a_finished_run_that_is_corrupt_is_named(data, tmp_path, straight, name):
    recipe, options = recipes.recipe_for("quick", data.card, epochs=1), {"network": straight, "runs": tmp_path}
    folder = training.deterministic_run(data, recipe, **options).folder
    whole = (folder / name).read_bytes()
    (folder / name).write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match=r"Expected a whole run in .*Delete it"):
        training.deterministic_run(data, recipe, **options)


def test_a_changed_bit_of_a_finished_run_is_named_in_one_line_and_nothing_else_changes(data, tmp_path, straight):
    recipe, options = recipes.recipe_for("quick", data.card, epochs=1), {"network": straight, "runs": tmp_path}
    run = training.deterministic_run(data, recipe, **options)
    for name in ("model.keras", "history.json"):
        path = run.folder / name
        whole, random = path.read_bytes(), np.random.default_rng(0)
        for place in [*random.integers(0, len(whole), 25), len(whole) - 1]:
            path.write_bytes(whole[:place] + bytes([whole[place] ^ 1 << place % 8]) + whole[place + 1 :])
            try:
                again = training.deterministic_run(data, recipe, **options)
            except ValueError as error:
                assert str(error).startswith(f"Expected a whole run in {run.folder}. Received: {name} ")
                assert "Delete it" in str(error) and "\n" not in str(error)
            else:  # a date in the archive, say
                assert again.history == run.history
                assert_equal_weights(again.model.weights, run.model.weights)
        path.write_bytes(whole)
    number = repr(run.history["loss"][0])
    path.write_text(path.read_text().replace(number, number[:-1] + str((int(number[-1]) + 1) % 10)))
    with pytest.raises(ValueError, match=r"Received: history\.json was changed: its checksum is another\. Delete it"):
        training.deterministic_run(data, recipe, **options)


def test_what_a_killed_process_left_is_removed_by_the_next_run(data, tmp_path, straight, monkeypatch):
    recipe, options = recipes.recipe_for("quick", data.card, epochs=1), {"network": straight, "runs": tmp_path}
    save, unlink = keras.Model.save, Path.unlink
    with monkeypatch.context() as patch:  # the process ends as the model is half written, and removes nothing
        patch.setattr(keras.Model, "save", lambda self, path: (save(self, path), (_ for _ in ()).throw(Interrupted)))
        patch.setattr(Path, "unlink", lambda self, missing_ok=False: None)
        with pytest.raises(Interrupted):
            training.deterministic_run(data, recipe, **options)
    (folder,) = tmp_path.glob("*/*/*/*")
    (left,) = folder.glob("model.*.tmp.keras")
    assert (folder / "checkpoint.npz").exists() and not (folder / "model.keras").exists()
    with monkeypatch.context() as patch:  # and as the checkpoint has still to go
        patch.setattr(Path, "unlink", lambda self, missing_ok=False: None if "check" in self.name else unlink(self))
        training.deterministic_run(data, recipe, **options)
    assert not left.exists() and (folder / "checkpoint.npz").exists()
    training.deterministic_run(data, recipe, **options)
    assert sorted(path.name for path in folder.iterdir()) == ["config.json", "history.json", "model.keras"]


@pytest.mark.parametrize("seed", ["1", 1.0, -1, True])
def test_seeds_that_are_none(data, tmp_path, seed):
    with pytest.raises(ValueError, match="Expected seed, an integer >= 0"):
        training.deterministic_run(data, recipes.recipe_for("quick", data.card), seed=seed, runs=tmp_path)


def test_without_git_there_is_no_commit(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    folders.write_json(tmp_path / "a.json", {"x": np.int64(1).item()})
    assert json.loads((tmp_path / "a.json").read_text())["commit"] is None


def test_a_file_of_a_run_names_the_number_of_threads(tmp_path, monkeypatch):
    assert folders.threads() == len(os.sched_getaffinity(0))  # TensorFlow's default
    monkeypatch.setenv("TF_NUM_INTRAOP_THREADS", "3")
    folders.write_json(tmp_path / "a.json", {})
    assert folders.read_json(tmp_path / "a.json")["threads"] == 3


def test_corrupt_scores_are_named(data, tmp_path, shared, masked):
    recipe = recipes.recipe_for("quick", data.card, epochs=1)
    step1 = training.deterministic_run(data, recipe, network=masked, runs=shared)
    step1 = dataclasses.replace(step1, folder=tmp_path)
    masks = training.masks_run(step1, data, recipe, 0.05)
    (path,) = step1.folder.glob("saliency_fisher_*.npz")
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match=r"saliency_fisher_.*Delete it"):
        training.masks_run(step1, data, recipe, 0.05)
    path.unlink()
    assert training.masks_run(step1, data, recipe, 0.05) == masks


def test_biases_before_a_batch_norm_in_training_mode_are_left_out_of_the_masks_only_there(data, tmp_path):
    layers = [keras.layers.Conv2D(4, 3, padding="same", name="first"), keras.layers.BatchNormalization()]
    layers += [keras.layers.Conv2D(1, 1, activation="sigmoid", name="last")]
    step1 = run_folder.Run(keras.Sequential([keras.Input(data.input_shape), *layers]), {}, tmp_path)
    recipe = recipes.recipe_for("quick", data.card)
    frozen = training.masks_run(step1, data, recipe, 1.0)
    train = training.masks_run(step1, data, dataclasses.replace(recipe, batch_norm="train"), 1.0)
    assert set(frozen) - set(train) == {"first/bias"}


def test_each_optimiser_updates_its_own(data):
    model = keras.Sequential([keras.Input((3,)), keras.layers.Dense(2, name="d")])
    masks = top_k(saliency(model, None, None, score="magnitude"), 0.5)
    bnn = to_partial_bayes(model, masks, num_train=4)
    bnn.compile(LocScaleOptimizer(keras.optimizers.SGD(0.0), keras.optimizers.SGD(1.0)), "mse")
    before = {v.path: np.array(v) for v in bnn.trainable_weights}
    bnn.fit(np.ones((4, 3)), np.zeros((4, 2)), verbose=0)
    for variable in bnn.trainable_weights:
        moved = not np.array_equal(before[variable.path], variable)
        assert moved == variable.name.endswith("untransformed_scale")


@pytest.fixture
def noisy(monkeypatch):
    """A network with a batch norm, and with noise that follows Keras's global seed."""

    def build(input_shape, num_outputs, activation="sigmoid", seed=None):
        inputs = keras.Input(input_shape)
        x = keras.layers.Conv2D(4, 3, kernel_initializer=keras.initializers.HeNormal(seed), name="first")(inputs)
        x = keras.layers.ReLU(name="relu")(keras.layers.BatchNormalization(name="norm")(x))
        x = keras.layers.Dropout(0.3, name="drop")(keras.layers.GlobalAveragePooling2D(name="average")(x))
        return keras.Model(inputs, keras.layers.Dense(num_outputs, activation=activation, name="head")(x))

    monkeypatch.setitem(networks.NETWORKS, "noisy", (build, {}))
    return "noisy"


class Interrupted(Exception):
    pass


def interrupt_after(monkeypatch, writes):
    """The process ends after so many epochs were written."""
    write, count = fitting.Checkpoint._write, []

    def counted(self, epochs):
        write(self, epochs)
        count.append(epochs)
        if len(count) == writes:
            raise Interrupted

    monkeypatch.setattr(fitting.Checkpoint, "_write", counted)


def count_traces(monkeypatch):
    traced, step = [], keras.Model.train_step

    def counted(self, data):
        traced.append(self)
        return step(self, data)

    monkeypatch.setattr(keras.Model, "train_step", counted)
    return traced


def assert_equal_weights(first, second):
    for a, b in zip(first, second, strict=True):
        np.testing.assert_array_equal(a, b)


def quick(data, **changes):
    return recipes.recipe_for("quick", data.card, **{"epochs": 2, "bayes_epochs": 2, "batch_size": 20, **changes})


def test_seeds_of_members_meet_no_other_ensemble():
    seeds = [training.member_seed(seed, member) for seed in range(50) for member in range(1000)]
    assert len(set(seeds)) == len(seeds)
    assert [training.member_seed(3, member) for member in (0, 1, 2)] == [3, 4001, 4002]


def test_members_are_deterministic_runs_bit_for_bit_of_one_trace(tmp_path, shared, noisy, monkeypatch):
    data = in_colours("multi-class")
    recipe, options = quick(data), {"network": noisy, "verbose": False}  # batches of 20, 20 and 8
    alone = [training.deterministic_run(data, recipe, seed=seed, runs=shared, **options) for seed in (0, 1001, 1002)]
    folder = shutil.copytree(alone[0].folder, tmp_path / alone[0].folder.relative_to(shared))
    traced = count_traces(monkeypatch)
    members = training.ensemble_runs(data, recipe, num_members=3, runs=tmp_path, **options)
    assert len(traced) == 1  # two networks were trained
    assert members[0].folder == folder
    for one, member in zip(alone, members, strict=True):
        assert one.folder.relative_to(shared) == member.folder.relative_to(tmp_path)
        assert_equal_weights(one.model.get_weights(), member.model.get_weights())
        assert_equal_weights(one.model.optimizer.variables, member.model.optimizer.variables)
        assert told(one.history) == told(member.history)
    assert not np.array_equal(members[1].model.get_weights()[0], members[2].model.get_weights()[0])

    again = training.ensemble_runs(data, recipe, num_members=3, runs=tmp_path, **options)
    assert len(traced) == 1 and [run.history for run in again] == [run.history for run in members]


def test_an_ensemble_interrupted_in_a_member_goes_on(tmp_path, shared, noisy, monkeypatch):
    data = in_colours("multi-class")
    recipe, options = quick(data), {"network": noisy, "verbose": False, "num_members": 3}
    whole = training.ensemble_runs(data, recipe, runs=shared, **options)
    with monkeypatch.context() as patch, pytest.raises(Interrupted):
        interrupt_after(patch, 3)
        training.ensemble_runs(data, recipe, runs=tmp_path, **options)
    found = [(path.parts[-3], path.name) for path in tmp_path.rglob("*") if path.is_file()]
    assert ("seed0", "model.keras") in found and ("seed1001", "checkpoint.npz") in found
    members = training.ensemble_runs(data, recipe, runs=tmp_path, **options)
    for one, member in zip(whole, members, strict=True):
        assert_equal_weights(one.model.get_weights(), member.model.get_weights())
        assert told(one.history) == told(member.history) and len(member.history["seconds"]) == 2


def test_a_continued_run_is_keras_s_fit_on_the_same_stream(tmp_path, shared, noisy):
    data = in_colours("multi-class")
    recipe = quick(data)
    step1 = training.deterministic_run(data, recipe, network=noisy, runs=shared, verbose=False)
    before = step1.model.get_weights()
    run = training.continued_run(step1, data, recipe, method="longer", seed=3, runs=tmp_path, verbose=False)
    assert_equal_weights(before, step1.model.get_weights())
    assert run.folder.parent == tmp_path / "colours" / "longer" / "seed3"

    keras.utils.set_random_seed(3)
    model = keras.models.clone_model(keras.Model(step1.model.inputs[0], step1.model.outputs[0]))
    model.set_weights(before)
    model.get_layer("norm").trainable = False
    rate = keras.optimizers.schedules.CosineDecay(recipe.bayes_learning_rate, 2 * 3)
    model.compile(keras.optimizers.Adam(rate), "categorical_crossentropy")
    model.fit(data.train.batches(20, seed=3, epochs=2), epochs=2, steps_per_epoch=3, shuffle=False, verbose=0)
    assert_equal_weights(model.get_weights(), run.model.get_weights())
    assert_equal_weights(run.snapshots[0], run.model.get_weights())
    again = training.continued_run(step1, data, recipe, method="longer", seed=3, runs=tmp_path, verbose=False)
    assert again.history == run.history and again.model.get_layer("norm").trainable is False


@pytest.mark.parametrize(
    ("batch_norm", "moved", "num_trainable"),
    [("frozen", [], 4), ("statistics", ["moving"], 4), ("train", ["moving", "affine"], 6)],
)
def test_batch_norm_of_a_continued_run_is_as_the_recipe_says(
    tmp_path, shared, noisy, batch_norm, moved, num_trainable, recwarn
):
    data = in_colours("multi-class")
    recipe = quick(data, batch_norm=batch_norm, estimator="all")
    step1 = training.deterministic_run(data, recipe, network=noisy, runs=shared, verbose=False)
    for _ in range(2):  # trained, then loaded
        run = training.continued_run(step1, data, recipe, method="longer", runs=tmp_path, verbose=False)
        old, new = (model.get_layer("norm") for model in (step1.model, run.model))
        found = [] if np.array_equal(old.moving_mean, new.moving_mean) else ["moving"]
        found += [] if np.array_equal(old.gamma, new.gamma) else ["affine"]
        assert found == moved and len(run.model.trainable_variables) == num_trainable
    assert not [w for w in recwarn if "Skipping variable" in str(w.message)]


def test_a_continued_run_is_step_3_with_empty_masks_but_for_rounding(tmp_path, shared, tiny):
    data = in_colours("multi-class")
    recipe = quick(data, num_samples=2)
    step1 = training.deterministic_run(data, recipe, network=tiny, runs=shared, verbose=False)
    empty = top_k(saliency(step1.model, None, None, score="magnitude"), 0.0)
    control = training.partial_run(step1, empty, data, recipe, runs=tmp_path, verbose=False)
    run = training.continued_run(step1, data, recipe, method="longer", runs=tmp_path, verbose=False)
    for a, b in zip(control.model.network.get_weights(), run.model.get_weights(), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5)
    assert not np.allclose(step1.model.get_weights()[0], run.model.get_weights()[0], atol=1e-3)


@pytest.mark.parametrize("estimator", ["flipout", "local"])
def test_step_3_trains_by_every_estimator(shared, tiny, estimator):
    data = in_colours("multi-class")
    recipe = quick(data, estimator=estimator)
    options = {"runs": shared, "verbose": False}
    step1 = training.deterministic_run(data, recipe, network=tiny, **options)
    masks = top_k(saliency(step1.model, None, None, score="magnitude"), 0.5)
    run = training.partial_run(step1, masks, data, recipe, **options)
    assert run.model.estimator == estimator and run.history["loss"][-1] < run.history["loss"][0]
    assert np.median(np.abs(np.log(run.model.scales() / 0.01))) > 1e-3  # they have moved
    again = training.partial_run(step1, masks, data, recipe, **options)
    assert again.folder == run.folder and again.model.estimator == estimator
    other = training.partial_run(step1, masks, data, dataclasses.replace(recipe, estimator="split"), **options)
    assert other.folder != run.folder


def test_snapshots_are_the_weights_at_the_end_of_each_cycle(tmp_path, shared, noisy, monkeypatch):
    data = in_colours("multi-class")
    recipe = quick(data)
    step1 = training.deterministic_run(data, recipe, network=noisy, runs=shared, verbose=False)

    def run(folder):
        options = {"method": "snapshot", "epochs": 5, "cycles": 2, "runs": tmp_path / folder, "verbose": False}
        return training.continued_run(step1, data, recipe, **options)

    whole = run("whole")
    assert len(whole.snapshots) == 2
    assert_equal_weights(whole.snapshots[1], whole.model.get_weights())
    rate = whole.model.optimizer._learning_rate
    assert (rate.cycle_steps, rate.learning_rate) == ([2 * 3, 3 * 3], pytest.approx(recipe.bayes_learning_rate))

    # The first cycle alone: two epochs whose rate falls to 0.
    first = training.continued_run(
        step1, data, recipe, method="one", epochs=2, cycles=1, runs=tmp_path / "one", verbose=False
    )
    for a, b in zip(first.model.get_weights(), whole.snapshots[0], strict=True):
        np.testing.assert_allclose(a, b, atol=1e-6)

    with monkeypatch.context() as patch, pytest.raises(Interrupted):
        interrupt_after(patch, 3)
        run("broken")
    broken = run("broken")
    for a, b in zip(whole.snapshots, broken.snapshots, strict=True):
        assert_equal_weights(a, b)
    assert told(whole.history) == told(broken.history)
    for a, b in zip(whole.snapshots, run("whole").snapshots, strict=True):  # loaded
        assert_equal_weights(a, b)


def test_a_cut_a_missing_and_another_s_snapshot_are_named(tmp_path, shared, tiny):
    data = in_colours("multi-class")
    recipe, options = quick(data), {"method": "snapshot", "cycles": 2, "runs": tmp_path, "verbose": False}
    step1 = training.deterministic_run(data, recipe, network=tiny, runs=shared, verbose=False)
    path = training.continued_run(step1, data, recipe, **options).folder / "snapshot1.npz"
    whole = path.read_bytes()
    for damage in (
        lambda: path.write_bytes(whole[:100]),
        path.unlink,
        lambda: np.savez(path, w0=np.zeros(3)),
    ):
        damage()
        with pytest.raises(ValueError, match=r"Expected a whole run in .*snapshot1.npz.*Delete it") as error:
            training.continued_run(step1, data, recipe, **options)
        assert len(str(error.value).splitlines()) <= 2


def test_snapshots_of_a_run_that_diverged_are_those_of_whole_cycles(tmp_path, shared, tiny):
    data = in_colours("multi-class")
    recipe = quick(data, optimizer="sgd", bayes_learning_rate=1e30)
    step1 = training.deterministic_run(data, recipe, network=tiny, runs=shared, verbose=False)
    options = {"method": "snapshot", "cycles": 2, "runs": tmp_path, "verbose": False}
    with pytest.warns(UserWarning, match="training stopped"):
        run = training.continued_run(step1, data, recipe, **options)
    assert len(run.snapshots) == 1
    assert_equal_weights(run.snapshots[0], step1.model.get_weights())


def test_dropout_goes_on_from_step_1_and_is_the_same_when_loaded(tmp_path, shared, noisy, monkeypatch):
    data = in_colours("multi-class")
    recipe, images = quick(data), data.val.normalised()
    step1 = training.deterministic_run(data, recipe, network=noisy, runs=shared, verbose=False)

    def run(folder):
        options = {"method": "mc_dropout", "dropout": 0.2, "runs": tmp_path / folder, "verbose": False}
        return training.continued_run(step1, data, recipe, **options)

    whole = run("whole")
    rates = [layer.rate for layer in whole.model.layers if isinstance(layer, keras.layers.Dropout)]
    assert rates == [0.3, 0.2] and whole.model.get_layer("head_dropout").rate == 0.2
    samples = dropout.sample_dropout(whole.model, images, 4)
    assert samples.shape == (4, 18, 3) and samples.std(0).min() > 0
    np.testing.assert_array_equal(samples, dropout.sample_dropout(run("whole").model, images, 4))
    with monkeypatch.context() as patch, pytest.raises(Interrupted):
        interrupt_after(patch, 1)
        run("broken")
    assert_equal_weights(whole.model.get_weights(), run("broken").model.get_weights())


def shaken(data, folder, epochs, keep, rates=(1e-3, 1e-3, 0.3, 0.3, 0.3)):
    """A linear network whose first two epochs are good; later ones move away."""

    class Rates(keras.callbacks.Callback):
        def on_epoch_begin(self, epoch, logs=None):
            self.model.optimizer.learning_rate = rates[epoch]

    keras.utils.set_random_seed(0)
    model = linear(data, 1e-3)
    options = {"batch_size": 8, "seed": 0, "folder": folder, "keep": keep, "callbacks": [Rates()], "verbose": False}
    return model, fitting.fit(model, data.train, data.val, epochs=epochs, **options)


def test_the_best_epoch_is_kept_also_after_an_interruption(data, tmp_path, monkeypatch):
    model, history = shaken(data, tmp_path / "whole", 5, "best")
    best = int(np.argmin(history["val_loss"]))
    assert history["kept_epoch"] == [best] and best < 4
    until, _ = shaken(data, tmp_path / "until", best + 1, "last")
    assert_equal_weights(model.get_weights(), until.get_weights())
    last, told_last = shaken(data, tmp_path / "last", 5, "last")
    assert told_last["val_loss"] == history["val_loss"] and "kept_epoch" not in told_last
    assert not np.array_equal(model.get_weights()[0], last.get_weights()[0])
    for epoch in (1, 4):
        with monkeypatch.context() as patch, pytest.raises(Interrupted):
            interrupt_after(patch, epoch)
            shaken(data, tmp_path / str(epoch), 5, "best")
        again, resumed = shaken(data, tmp_path / str(epoch), 5, "best")
        assert_equal_weights(model.get_weights(), again.get_weights())
        assert told(resumed) == told(history)
        assert len(resumed["seconds"]) == 5 and min(resumed["seconds"]) > 0


def test_long_trainings_that_keep_the_last_epoch_validate_every_few(data, tmp_path, monkeypatch):
    rates = [1e-3] * 41
    assert None not in shaken(data, tmp_path / "short", 39, "last", rates)[1]["val_loss"]
    model, history = shaken(data, tmp_path / "last", 41, "last", rates)
    each, often = shaken(data, tmp_path / "best", 41, "best", rates)
    assert_equal_weights(model.get_weights(), each.get_weights())  # the loss falls to the end: both keep the last epoch
    validated = [epoch for epoch, value in enumerate(history["val_loss"], 1) if value is not None]
    assert validated == [*range(2, 41, 2), 41]
    assert [history["val_loss"][epoch - 1] for epoch in validated] == [often["val_loss"][e - 1] for e in validated]
    assert len(history["loss"]) == len(history["val_loss"]) == len(history["seconds"]) == 41
    with monkeypatch.context() as patch, pytest.raises(Interrupted):
        interrupt_after(patch, 7)  # after an epoch without validation
        shaken(data, tmp_path / "again", 41, "last", rates)
    again, resumed = shaken(data, tmp_path / "again", 41, "last", rates)
    assert_equal_weights(again.get_weights(), model.get_weights())
    assert resumed["val_loss"] == history["val_loss"]


def test_each_epoch_is_validated_where_something_depends_on_it(data):
    def validated(model, *callbacks, keep="last"):
        return len(fitting.validated_epochs(model, 200, keep, callbacks))

    plain = linear(data, 1e-3)
    gaussian = to_partial_bayes(plain, r_bayes=0.5, data=(data.train.normalised(), data.train.targets), verbose=False)
    assert validated(plain) == 20 and validated(plain, keras.callbacks.TerminateOnNaN()) == 20
    assert validated(plain, keep="best") == validated(gaussian) == 200
    assert validated(plain, keras.callbacks.EarlyStopping(monitor="val_loss")) == 200
    assert validated(plain, keras.callbacks.EarlyStopping(monitor="loss")) == 20


def test_of_equal_epochs_the_first_is_kept(data, tmp_path):
    _, history = shaken(data, tmp_path, 3, "best", rates=(0.0, 0.0, 0.0))
    assert len(set(history["val_loss"])) == 1 and history["kept_epoch"] == [0]


def test_an_epoch_that_the_next_batch_shows_to_be_bad_is_not_the_best(data, tmp_path):
    model = linear(data, 1e-3)
    before = fitting.Checkpoint(tmp_path / "checkpoint.npz", fitting.StopAtNaN(), "best")
    before.set_model(model)
    before.guard.stopped = False
    for epoch, loss in enumerate([2.0, 1.0]):
        before.on_epoch_begin(epoch)
        model.set_weights([np.full_like(w, epoch) for w in model.get_weights()])
        before.on_epoch_end(epoch, {"loss": loss, "val_loss": loss})
    before.guard.stopped, before.guard.nan_in_epoch = True, 1  # told by the third epoch's first batch
    before.on_train_end()
    again = fitting.Checkpoint(tmp_path / "checkpoint.npz", keep="best")
    assert again.resume(model) == 1
    assert again.best[0] == 0 and all((w == 0).all() for w in again.best[1])


def test_a_checkpoint_without_a_best_epoch_and_runs_without_validation_keep_none(data, tmp_path):
    shaken(data, tmp_path, 1, "last")
    with pytest.raises(ValueError, match=r"has no best epoch.*Delete it"):
        shaken(data, tmp_path, 2, "best")
    with pytest.raises(ValueError, match='"best" with a validation split'):
        fitting.fit(linear(data, 1e-3), data.train, None, epochs=1, batch_size=8, seed=0, folder=tmp_path, keep="best")


def test_every_step_keeps_its_best_epoch_in_a_folder_of_its_own(tmp_path, tiny):
    data = in_colours("multi-class")
    last = quick(data, epochs=3, bayes_epochs=3, num_samples=2, learning_rate=0.3, decay="none")
    best, options = dataclasses.replace(last, keep="best"), {"runs": tmp_path, "verbose": False}
    step1 = training.deterministic_run(data, last, network=tiny, **options)
    masks = training.masks_run(step1, data, last, 0.2, verbose=False)
    deterministic = training.deterministic_run(data, best, network=tiny, **options)
    runs = [(step1, deterministic)]
    runs.append([training.partial_run(step1, masks, data, recipe, **options) for recipe in (last, best)])
    options["method"] = "longer"
    runs.append([training.continued_run(step1, data, recipe, **options) for recipe in (last, best)])
    for a, b in runs:
        assert a.folder.parent == b.folder.parent and a.folder != b.folder
        assert a.history["val_loss"] == b.history["val_loss"] and "kept_epoch" not in a.history
        assert b.history["kept_epoch"] == [int(np.argmin(b.history["val_loss"]))]
        settings = [json.loads((run.folder / "config.json").read_text())["settings"] for run in (a, b)]
        assert [one["keep"] for one in settings] == ["last", "best"]
    found = deterministic.model.evaluate(data.val.batches(20), verbose=0)
    assert found == pytest.approx(min(deterministic.history["val_loss"]), rel=1e-5)


def test_time_and_memory_of_a_run(tmp_path, tiny):
    data = in_colours("multi-class")
    run = training.deterministic_run(data, quick(data), network=tiny, runs=tmp_path, verbose=False)
    assert len(run.history["seconds"]) == 2 and min(run.history["seconds"]) > 0
    assert run.seconds == pytest.approx(sum(run.history["seconds"]))
    assert run.peak_bytes == run.history["peak_bytes"][0] > sum(w.nbytes for w in run.model.get_weights())
    assert 0 <= run.grown_bytes < run.peak_bytes
    (run.folder / "history.json").write_text(json.dumps(told(run.history)))  # as of a run made before
    old = training.deterministic_run(data, quick(data), network=tiny, runs=tmp_path, verbose=False)
    assert old.seconds is None and old.peak_bytes is None and old.grown_bytes is None


def test_a_system_that_does_not_tell_its_memory(data, tmp_path, monkeypatch):
    monkeypatch.setattr(memory, "_peak_bytes", lambda: None)
    history = fitting.fit(linear(data, 1e-3), data.train, None, epochs=1, batch_size=24, seed=0, folder=tmp_path)
    assert set(history) == {"loss", "seconds"}
    assert run_folder.Run(None, history, tmp_path).peak_bytes is None


def test_bayesian_locs_from_the_standard_normal(tmp_path, tiny):
    data = in_colours("multi-class")
    recipe = quick(data, num_samples=1, optimizer="sgd", bayes_learning_rate=1e-30)
    options = {"runs": tmp_path, "verbose": False}
    step1 = training.deterministic_run(data, recipe, network=tiny, **options)
    scores = saliency(step1.model, None, None, score="random", include=["conv2d*/kernel"])
    masks = top_k(scores, 0.9)
    runs = {
        (seed, method): training.partial_run(
            step1, masks, data, recipe, seed=seed, method=method, locs="normal", **options
        )
        for seed, method in ((0, "bayes_normal"), (0, "again"), (1, "bayes_normal"))
    }
    run = runs[0, "bayes_normal"]
    assert run.folder.parent == tmp_path / "colours" / "bayes_normal" / "seed0"
    assert run.folder.name == runs[0, "again"].folder.name
    (key,) = (key for key in masks if masks[key].any())
    kernel, mask = np.array(run.model.network.layers[1].kernel), masks[key]
    drawn = kernel[mask]
    assert drawn.size == round(0.9 * 3 * 3 * 3 * 8) and kstest(drawn, "norm").pvalue > 1e-3
    np.testing.assert_array_equal(kernel[~mask], np.array(step1.model.layers[1].kernel)[~mask])
    assert_equal_weights(run.model.network.get_weights(), runs[0, "again"].model.network.get_weights())
    assert not np.array_equal(drawn, np.array(runs[1, "bayes_normal"].model.network.layers[1].kernel)[mask])
    trained = training.partial_run(step1, masks, data, recipe, method="bayes_normal", **options)
    assert trained.folder != run.folder
    np.testing.assert_array_equal(trained.model.network.layers[1].kernel, step1.model.layers[1].kernel)


def test_only_training_and_validation_images_are_read(tmp_path, tiny, monkeypatch):
    data, read, batches = in_colours("multi-class"), [], datasets.Split.batches

    def told_batches(self, *arguments, **options):
        read.append(self.name)
        return batches(self, *arguments, **options)

    monkeypatch.setattr(datasets.Split, "batches", told_batches)
    recipe, options = quick(data, num_samples=1, keep="best"), {"runs": tmp_path, "verbose": False}
    step1, _ = training.ensemble_runs(data, recipe, network=tiny, num_members=2, **options)
    masks = training.masks_run(step1, data, recipe, 0.1, verbose=False)
    training.partial_run(step1, masks, data, recipe, **options)
    training.continued_run(step1, data, recipe, method="longer", **options)
    assert set(read) == {"train", "val"}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"cycles": 3}, "Expected cycles, an integer from 1 to epochs=2"),
        ({"cycles": 0}, "Expected cycles"),
        ({"cycles": True}, "Expected cycles"),
        ({"epochs": 0}, "Expected epochs, an integer >= 1"),
        ({"epochs": 1.5}, "Expected epochs"),
        ({"dropout": 1.0}, "Expected a dropout rate, 0 <= rate < 1. Received: rate=1.0"),
        ({"dropout": -0.1}, "Expected a dropout rate"),
        ({"dropout": float("nan")}, "Expected a dropout rate"),
        ({"method": "../up"}, "Expected method"),
        ({"method": ""}, "Expected method"),
        ({"seed": -1}, "Expected seed"),
        ({"cycles": 2, "keep": "best"}, 'Expected keep="last" with more than one cycle'),
    ],
)
def test_settings_of_a_continued_run_that_are_none(tmp_path, tiny, change, message):
    data = in_colours("multi-class")
    model = networks.build(tiny, data.input_shape, 3)
    recipe = quick(data, keep=change.pop("keep", "last"))
    with pytest.raises(ValueError, match=message) as error:
        training.continued_run(
            run_folder.Run(model, {}, tmp_path), data, recipe, **{"method": "longer", "runs": tmp_path, **change}
        )
    assert len(str(error.value).splitlines()) <= 2 and not list(tmp_path.iterdir())


@pytest.mark.parametrize("num_members", [0, -1, 1001, 2.0, True])
def test_numbers_of_members_that_are_none(tmp_path, num_members):
    data = in_colours("multi-class")
    with pytest.raises(ValueError, match="Expected num_members, an integer from 1 to 1000"):
        training.ensemble_runs(data, quick(data), num_members=num_members, runs=tmp_path)


@pytest.mark.parametrize(("options", "message"), [({"locs": "zero"}, "Expected locs"), ({"method": "a/b"}, "method")])
def test_settings_of_step_3_that_are_none(tmp_path, tiny, options, message):
    data = in_colours("multi-class")
    step1 = run_folder.Run(networks.build(tiny, data.input_shape, 3), {}, tmp_path)
    masks = top_k(saliency(step1.model, None, None, score="magnitude"), 0.1)
    with pytest.raises(ValueError, match=message):
        training.partial_run(step1, masks, data, quick(data), runs=tmp_path, **options)


@pytest.mark.parametrize(("initial_scale", "ruined"), [(0.01, False), (100.0, True)])
def test_step_3_says_when_it_has_ruined_the_network(tmp_path, data, masked, initial_scale, ruined):
    recipe = quick(data, bayes_epochs=1, initial_scale=initial_scale, bayes_learning_rate=1e-6)
    options = {"runs": tmp_path, "verbose": False}
    step1 = training.deterministic_run(data, recipe, network=masked, **options)
    masks = top_k(saliency(step1.model, None, None, score="magnitude"), 1.0)
    for _ in ("trained", "loaded"):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            run = training.partial_run(step1, masks, data, recipe, **options)
        own, drawn = step1.history["loss"][-1], run.history["nll"][-1]
        assert (drawn > 2 * own + 0.05) == ruined
        found = [str(one.message) for one in caught if "Step 3" in str(one.message)]
        assert len(found) == ruined and all(f"NLL {drawn:.3g} on" in message for message in found)


def test_the_warning_compares_the_epochs_that_are_kept(tmp_path):
    """Step 1 ended at .02 but kept an epoch of .10: step 3 at .10 has ruined nothing."""

    def run(**history):
        return run_folder.Run(None, history, tmp_path)

    step1 = run(loss=[0.3, 0.10, 0.02], kept_epoch=[1])
    for history, ruined in (
        ({"nll": [0.10, 0.12]}, False),
        ({"nll": [0.5, 0.1], "kept_epoch": [0]}, True),
        ({}, False),
    ):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            training._warn_if_far_worse(run(**history), step1)
        assert len(caught) == ruined


def untransformed_scale_of(key):
    """The key in `named_weights` of the untransformed scales of a weight with Bayesian entries."""
    layer, name = key.rsplit("/", 1)
    return f"{layer}/{layer.split('/')[-1]}_posteriors/{name}_posterior/untransformed_scale"


def of_masks(shared, network, **changes):
    """Data, step 1, masks and a recipe of step 3 that starts its scales at 0.05."""
    data = datasets.load("phantom_nodule", size=16, limit=24)
    recipe = quick(data, initial_scale=0.05, **changes)
    step1 = training.deterministic_run(data, recipe, seed=1, network=network, runs=shared, verbose=False)
    return data, recipe, step1, training.masks_run(step1, data, recipe, 0.2, verbose=False)


@pytest.mark.parametrize("trains", ["bayesian", "scales"])
def test_step_3_can_leave_other_weights_where_step_1_left_them(tmp_path, shared, masked, trains):
    data, recipe, step1, masks = of_masks(shared, masked, trains=trains)
    run = training.partial_run(step1, masks, data, recipe, seed=1, runs=shared, verbose=False)
    before, after = named_weights(step1.model), named_weights(run.model.network)
    moved = 0
    for key, weight in before.items():
        old, new = (keras.ops.convert_to_numpy(one.variable) for one in (weight, after[key]))
        if trains == "bayesian" and key in masks:
            np.testing.assert_array_equal(old[~masks[key]], new[~masks[key]])
            moved += int((old != new).sum())
        else:
            np.testing.assert_array_equal(old, new)
    assert (moved == masks.num_bayesian) == (trains == "bayesian")
    assert np.abs(run.model.scales() - 0.05).min() > 0  # every scale has moved
    whole = dataclasses.replace(recipe, trains="all")
    assert training.partial_run(step1, masks, data, whole, seed=1, runs=shared, verbose=False).folder != run.folder


def test_scales_start_at_a_multiple_of_the_loc_or_of_laplace_s(tmp_path, shared, masked, monkeypatch):
    data, recipe, step1, masks = of_masks(shared, masked)
    locs = np.concatenate([saliency(step1.model, score="magnitude")[key][mask] for key, mask in masks.items()])
    scores = training.scores_run(step1, data, recipe, verbose=False)
    fisher = training.empirical_fisher(scores, "fisher", terms=16 * 16, num_examples=24, batch_size=recipe.batch_size)
    curvature = np.concatenate([fisher[key][mask] for key, mask in masks.items()])
    starts = []

    def trained(folder, make, *_):
        starts.append(make())
        return run_folder.Run(starts[-1], {}, folder.path)

    monkeypatch.setattr(run_folder.RunFolder, "trained", trained)
    expected = {
        "relative": 0.3 * np.maximum(np.abs(locs), 1e-3),
        "fisher": 0.3 * (24 * curvature + 1.0) ** -0.5,
        "absolute": np.full(len(locs), 0.3),
    }
    for start, wanted in expected.items():
        changed = dataclasses.replace(recipe, scale_start=start, initial_scale=0.3)
        training.partial_run(step1, masks, data, changed, seed=1, runs=tmp_path, verbose=False)
        np.testing.assert_allclose(np.sort(starts[-1].scales()), np.sort(wanted), rtol=1e-4)


def test_the_prior_s_width_is_in_the_kl(tmp_path, shared, masked):
    data, recipe, step1, masks = of_masks(shared, masked)
    kls = {}
    for width in (1.0, 0.1):
        changed = dataclasses.replace(recipe, prior_scale=width, bayes_epochs=1, bayes_learning_rate=1e-12)
        changed = dataclasses.replace(changed, scale_learning_rate=1e-12)
        run = training.partial_run(step1, masks, data, changed, seed=1, runs=tmp_path, verbose=False)
        kls[width] = float(run.model.kl_divergence())
        locs = np.concatenate([saliency(step1.model, score="magnitude")[key][mask] for key, mask in masks.items()])
        scale = run.model.scales().astype("float64")
        ratio = np.sort(scale) / width
        expected = (0.5 * (ratio**2 - 1) - np.log(ratio)).sum() + 0.5 * np.square(locs / width).sum()
        assert kls[width] == pytest.approx(expected, rel=1e-4)


def test_a_prior_at_the_trained_weights_charges_scales_and_what_locs_have_moved(tmp_path, shared, masked):
    data, recipe, step1, masks = of_masks(shared, masked)
    changed = dataclasses.replace(recipe, prior_at="weight", prior_scale=0.1)
    run = training.partial_run(step1, masks, data, changed, seed=1, runs=shared, verbose=False)
    start, end = named_weights(step1.model), named_weights(run.model.network)
    expected = 0.0
    for key, mask in masks.items():
        if mask.any():
            at, now = (keras.ops.convert_to_numpy(weights[key].variable)[mask] for weights in (start, end))
            scale = np.logaddexp(0, end[untransformed_scale_of(key)].variable.numpy().astype("float64"))
            expected += float(np.sum(tfd.kl_divergence(tfd.Normal(now, scale.astype("float32")), tfd.Normal(at, 0.1))))
            assert not np.array_equal(at, now)
    assert float(run.model.kl_divergence()) == pytest.approx(expected, rel=1e-4)
    assert training.partial_run(step1, masks, data, recipe, seed=1, runs=shared, verbose=False).folder != run.folder


@pytest.mark.parametrize(
    ("changes", "check"),
    [
        ({"eligible": "biases"}, lambda key, mask: key.endswith("bias")),
        ({"eligible": "kernels"}, lambda key, mask: not key.endswith("bias")),
    ],
)
def test_kernels_or_biases_alone_are_eligible(tmp_path, shared, masked, changes, check):
    *_, masks = of_masks(shared, masked, **changes)
    assert masks.num_bayesian == round(0.2 * masks.num_weights) and all(check(*item) for item in masks.items())
