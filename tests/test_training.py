"""Recipes and runs: published settings, the weighted loss against TensorFlow's, resumption after a kill, NaN."""

import dataclasses
import json
import signal
import subprocess
import sys

import keras
import numpy as np
import pytest
import tensorflow as tf

from sbn_tf import datasets, training
from sbn_tf.partial_bayes import LocScaleOptimizer, to_partial_bayes
from sbn_tf.saliency import saliency, top_k


@pytest.fixture(scope="module")
def data():
    return datasets.load("phantom_lesion", size=16, limit=24)


def test_the_papers_recipe_is_section_3():
    chest = training.recipe_for("paper", datasets.card("chestmnist"))
    assert (chest.epochs, chest.bayes_epochs, chest.batch_size) == (50, 50, 50)
    assert (chest.optimizer, chest.learning_rate, chest.weight_decay, chest.momentum) == ("sgd", 0.01, 1e-5, 0.0)
    assert (chest.beta_start, chest.beta_stop, chest.num_samples) == (0.01, 0.01, 5)
    lesions = training.recipe_for("paper", datasets.card("isic2018"))
    assert (lesions.batch_size, lesions.beta_start, lesions.beta_stop) == (10, 0.2, 0.01)
    assert lesions.augment == "flips_and_quarter_turns" and lesions.class_weights == "none"
    coded = training.recipe_for("paper_as_coded", datasets.card("lidc"))
    assert (coded.score, coded.momentum, coded.weight_decay) == ("paper", 0.9, None)


def test_unknown_recipe_and_field():
    with pytest.raises(ValueError, match="Expected a recipe among"):
        training.recipe_for("best", datasets.card("lidc"))
    with pytest.raises(ValueError, match="Unknown recipe fields"):
        training.recipe_for("quick", datasets.card("lidc"), epoch=3)


@pytest.mark.parametrize("pos_weight", [1.0, 10.0, [1.0, 4.0, 9.0]])
def test_weighted_cross_entropy_is_tensorflows(pos_weight):
    random = np.random.default_rng(0)
    logits = random.normal(size=(5, 3)).astype("float32")
    labels = random.integers(0, 2, size=(5, 3)).astype("float32")
    expected = tf.nn.weighted_cross_entropy_with_logits(labels, logits, np.float32(pos_weight))
    loss = training.WeightedBinaryCrossentropy(pos_weight)
    assert float(loss(labels, tf.sigmoid(logits))) == pytest.approx(float(tf.reduce_mean(expected)), rel=1e-5)
    again = training.WeightedBinaryCrossentropy.from_config(loss.get_config())
    assert float(again(labels, tf.sigmoid(logits))) == float(loss(labels, tf.sigmoid(logits)))
    assert loss.terms_per_example((None, 8, 8, 1)) == 64
    with pytest.raises(ValueError, match="pos_weight > 0"):
        training.WeightedBinaryCrossentropy(-1.0)


SCRIPT = """
import os, signal, sys
os.environ["TF_CPP_MIN_LOG_LEVEL"] = "3"
import keras, numpy as np
from sbn_tf import datasets, models, training
from sbn_tf.partial_bayes import LocScaleOptimizer, to_partial_bayes
from sbn_tf.saliency import saliency, top_k

class Kill(keras.callbacks.Callback):
    def on_train_batch_end(self, batch, logs=None):
        if self.model.optimizer.iterations == int(sys.argv[2]):
            os.kill(os.getpid(), signal.SIGKILL)

keras.utils.set_random_seed(1)
data = datasets.load("phantom_lesion", size=16, limit=24)
model = models.build("unet", data.input_shape, 1, seed=1, widths=(4, 8))
masks = top_k(saliency(model, None, None, score="magnitude"), 0.1)
bnn = to_partial_bayes(model, masks, num_train=24, num_samples=2, seed=1)
rate = keras.optimizers.schedules.CosineDecay(1e-2, 12)
bnn.compile(LocScaleOptimizer(keras.optimizers.Adam(rate)), "binary_crossentropy")
training.fit(bnn, data.train, data.val, epochs=4, batch_size=8, seed=3, folder=sys.argv[1],
             augment="flips_and_quarter_turns", callbacks=[Kill()])
np.savez(sys.argv[3], *[v.numpy() for v in bnn.weights])
"""


def test_training_killed_in_the_third_epoch_resumes_to_the_same_weights(tmp_path):
    def run(folder, kill_at, result):
        arguments = [sys.executable, "-c", SCRIPT, str(tmp_path / folder), str(kill_at), str(tmp_path / result)]
        return subprocess.run(arguments, capture_output=True, text=True, check=False)

    assert run("whole", -1, "whole.npz").returncode == 0
    assert run("broken", 8, "broken.npz").returncode == -signal.SIGKILL
    assert (tmp_path / "broken" / "checkpoint.npz").exists() and not (tmp_path / "broken.npz").exists()
    assert run("broken", -1, "broken.npz").returncode == 0
    with np.load(tmp_path / "whole.npz") as whole, np.load(tmp_path / "broken.npz") as broken:
        assert whole.files == broken.files
        for name in whole.files:
            np.testing.assert_array_equal(whole[name], broken[name])


def test_corrupt_checkpoint_is_named(data, tmp_path):
    model = keras.Sequential([keras.Input(data.input_shape), keras.layers.Conv2D(1, 3, padding="same")])
    model.compile("sgd", "mse")
    (tmp_path / "checkpoint.npz").write_bytes(b"PK\x03\x04 not whole")
    with pytest.raises(ValueError, match=r"Checkpoint .* corrupt"):
        training.fit(model, data.train, None, epochs=1, batch_size=8, seed=0, folder=tmp_path)


def test_nan_loss_stops_and_keeps_the_last_good_weights(data, tmp_path):
    model = keras.Sequential([keras.Input(data.input_shape), keras.layers.Conv2D(1, 3, padding="same")])
    model.compile(keras.optimizers.SGD(1e30), "mse")
    before = [w.copy() for w in model.get_weights()]
    with pytest.warns(UserWarning, match="training stopped"):
        history = training.fit(model, data.train, None, epochs=3, batch_size=8, seed=0, folder=tmp_path)
    assert history["nan_in_epoch"] == [0]
    for a, b in zip(before, model.get_weights(), strict=True):
        np.testing.assert_array_equal(a, b)
    assert not (tmp_path / "checkpoint.npz").exists()


def test_the_three_steps_are_made_once_and_then_loaded(data, tmp_path):
    recipe = training.recipe_for("quick", data.card, epochs=1, bayes_epochs=1, num_samples=2)
    step1 = training.deterministic_run(data, recipe, network="unet_small", runs=tmp_path)
    masks = training.masks_run(step1, data, recipe, 0.05)
    first = training.partial_run(step1, masks, data, recipe, runs=tmp_path)
    again = training.partial_run(step1, masks, data, recipe, runs=tmp_path)
    assert masks.num_bayesian == round(0.05 * masks.num_weights) == first.model.num_bayesian
    assert again.history == first.history and again.folder == first.folder
    for a, b in zip(first.model.weights, again.model.weights, strict=True):
        np.testing.assert_array_equal(a, b)
    assert training.deterministic_run(data, recipe, network="unet_small", runs=tmp_path).history == step1.history
    assert json.loads((first.folder / "config.json").read_text())["recipe"]["num_samples"] == 2


def test_a_run_that_met_nan_says_so_again_when_it_is_loaded(data, tmp_path):
    recipe = training.recipe_for("quick", data.card, epochs=2, optimizer="sgd", learning_rate=1e30)
    with pytest.warns(UserWarning, match="training stopped"):
        first = training.deterministic_run(data, recipe, network="unet_small", runs=tmp_path)
    with pytest.warns(UserWarning, match="stopped at a loss that is not finite"):
        again = training.deterministic_run(data, recipe, network="unet_small", runs=tmp_path)
    for a, b in zip(first.model.weights, again.model.weights, strict=True):
        np.testing.assert_array_equal(a, b)
        assert np.isfinite(b).all()


def test_other_data_or_other_masks_are_another_run(data, tmp_path):
    recipe = training.recipe_for("quick", data.card, epochs=1, bayes_epochs=1, num_samples=1)
    step1 = training.deterministic_run(data, recipe, network="unet_small", runs=tmp_path)
    other = datasets.load("phantom_lesion", size=16, limit=24, seed=1)  # as many images, of the same size
    assert training.deterministic_run(other, recipe, network="unet_small", runs=tmp_path).folder != step1.folder
    counts = []
    for score in ("magnitude", "random"):  # as many entries, elsewhere
        masks = top_k(saliency(step1.model, None, None, score=score), 0.05)
        run = training.partial_run(step1, masks, data, recipe, runs=tmp_path)
        assert run.model.num_bayesian == masks.num_bayesian
        counts.append((masks.num_bayesian, run.folder))
    assert counts[0][0] == counts[1][0] and counts[0][1] != counts[1][1]


def test_corrupt_scores_are_named(data, tmp_path):
    recipe = training.recipe_for("quick", data.card, epochs=1)
    step1 = training.deterministic_run(data, recipe, network="unet_small", runs=tmp_path)
    masks = training.masks_run(step1, data, recipe, 0.05)
    path = step1.folder / "saliency_fisher.npz"
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match=r"saliency_fisher.npz .*Delete it"):
        training.masks_run(step1, data, recipe, 0.05)
    path.unlink()
    assert training.masks_run(step1, data, recipe, 0.05) == masks


def test_biases_before_a_batch_norm_in_training_mode_are_left_out_of_the_masks_only_there(data, tmp_path):
    layers = [keras.layers.Conv2D(4, 3, padding="same", name="first"), keras.layers.BatchNormalization()]
    layers += [keras.layers.Conv2D(1, 1, activation="sigmoid", name="last")]
    step1 = training.Run(keras.Sequential([keras.Input(data.input_shape), *layers]), {}, tmp_path)
    recipe = training.recipe_for("quick", data.card)
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
