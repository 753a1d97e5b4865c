"""The examples of `docs/extending.md`: each runs as it stands there, and does what the text says."""

import dataclasses
import re
from pathlib import Path

import keras
import numpy as np
import pytest
from helpers import tiny_networks

from sbn_tf import cost as costs
from sbn_tf import datasets, layers
from sbn_tf.core import registry
from sbn_tf.core.conversion import to_deterministic
from sbn_tf.experiments import compare, methods, recipes
from sbn_tf.partial_bayes import to_partial_bayes
from sbn_tf.saliency import saliency, top_k

PAGE = Path(__file__).parents[1] / "docs" / "extending.md"
EXAMPLES = re.findall(r"^```python\n(.*?)^```", PAGE.read_text("utf-8"), re.M | re.S)


def run(place):
    """The names that an example defines."""
    names = {"__name__": "extending"}
    exec(compile(EXAMPLES[place], PAGE.name, "exec"), names)
    return names


@pytest.fixture
def registries():
    """Each test leaves them as they were."""
    tables = (datasets.registry.REGISTRY, methods.METHODS, registry._PARTIAL)
    before = [dict(known) for known in tables]
    yield
    for known, items in zip(tables, before, strict=True):
        known.clear()
        known.update(items)


def test_three_examples_of_about_twenty_lines():
    lines = [sum(bool(line.strip()) for line in example.splitlines()) for example in EXAMPLES]
    assert len(lines) == 3 and max(lines) <= 22, lines


def scans(folder):
    random = np.random.default_rng(0)
    arrays = {}
    for name, size in (("train", 12), ("val", 4), ("test", 5)):
        arrays[f"{name}_images"] = random.integers(0, 256, (size, 16, 16), "uint8")
        arrays[f"{name}_labels"] = random.integers(0, 2, (size, 2))
    np.savez(folder / "scans.npz", **arrays)
    return arrays


def test_a_dataset(registries, tmp_path):
    names = run(0)
    given = scans(tmp_path)
    data = datasets.load("scans", root=tmp_path, size=16)
    assert datasets.card("scans") is names["SCANS"] and "scans" in datasets.names()
    for split in (data.train, data.val, data.test):
        np.testing.assert_array_equal(split.images[..., 0], given[f"{split.name}_images"])
        np.testing.assert_array_equal(split.targets, given[f"{split.name}_labels"])
    np.testing.assert_allclose(data.train.mean, given["train_images"].mean() / 255, rtol=1e-5)
    assert datasets.load("scans", root=tmp_path).train.images.shape == (12, 28, 28, 1)
    with pytest.raises(FileNotFoundError, match="the clinic's archive"):
        datasets.load("scans", root=tmp_path / "elsewhere")


def test_a_dataset_s_name_is_its_own(registries):
    names = run(0)
    datasets.register(names["SCANS"], names["load_scans"])  # a cell that is run twice
    for other in ("lidc", "chestmnist", "scans"):
        card = dataclasses.replace(names["SCANS"], name=other, title="another")
        with pytest.raises(ValueError, match=f"no dataset has. Received: '{other}'"):
            datasets.register(card, names["load_scans"])
    with pytest.raises(ValueError, match="Expected a Card with a task among"):
        datasets.register(dataclasses.replace(names["SCANS"], task="regression"), names["load_scans"])
    with pytest.raises(ValueError, match="Expected a reader"):
        datasets.register(dataclasses.replace(names["SCANS"], name="others"), "scans.npz")


def test_a_layer(registries, tmp_path):
    names = run(1)
    keras.utils.set_random_seed(0)
    parts = [keras.Input((5,)), names["Gain"](name="gain"), keras.layers.Dense(2, activation="softmax", name="head")]
    model = keras.Sequential(parts)
    x, y = np.random.default_rng(0).normal(size=(8, 5)).astype("float32"), np.eye(2, dtype="float32")[[0, 1] * 4]
    masks = top_k(saliency(model, [(x, y)], keras.losses.CategoricalCrossentropy(), verbose=False), 1.0)
    bayes = to_partial_bayes(model, masks, num_train=8)
    made = bayes.network.get_layer("gain")
    assert type(made) is names["MaskedGain"] and made.num_bayesian == {"gain": 5}
    with layers.posterior_mean():
        np.testing.assert_allclose(bayes.network(x), model(x), rtol=1e-6)
    assert not np.allclose(bayes.network(x), bayes.network(x))
    bayes.save(tmp_path / "bayes.keras")
    again = keras.saving.load_model(tmp_path / "bayes.keras")
    np.testing.assert_allclose(again.kl_divergence(), bayes.kl_divergence(), rtol=1e-6)
    plain = to_deterministic(bayes)
    assert type(plain.get_layer("gain")) is names["Gain"]
    np.testing.assert_allclose(plain(x), model(x), rtol=1e-6)


def test_a_layer_comes_out_of_another_that_holds_it(registries):
    names = run(1)
    names["Gain"].compute_output_shape = lambda self, shape: shape  # `TimeDistributed` asks for it
    masked = names["MaskedGain"](num_bayesian=5, kl_weight=0.1)
    model = keras.Sequential([keras.Input((3, 5)), keras.layers.TimeDistributed(masked, name="each")])
    masked.gain.assign(np.arange(5.0))
    plain, x = to_deterministic(model), np.ones((2, 3, 5), "float32")
    assert type(plain.get_layer("each").layer) is names["Gain"]
    np.testing.assert_allclose(plain(x), np.broadcast_to(np.arange(5.0), x.shape), rtol=1e-6)


class Nameless(layers.MaskedGaussian, keras.layers.Rescaling):
    pass


@pytest.mark.parametrize("wrong", [keras.layers.Dense, layers.MaskedGaussian, "Dense", Nameless])
def test_what_is_no_masked_layer_is_not_registered(registries, wrong):
    with pytest.raises(ValueError, match="Expected a class Mine"):
        layers.register(wrong)


def test_a_layer_with_more_arguments_is_left_to_the_wrapper(registries):
    class Noisy(keras.layers.Layer):
        def call(self, inputs, training=None):
            return inputs

    with pytest.raises(ValueError, match=r"Noisy.call with \['inputs', 'training'\]. It needs"):
        layers.register(type("MaskedNoisy", (layers.MaskedGaussian, Noisy), {"posterior_weights": ("gain",)}))


def test_a_stock_class_has_one_masked_class(registries):
    names = run(1)
    assert layers.register(names["MaskedGain"]) is names["MaskedGain"]  # a cell that is run twice
    with pytest.raises(ValueError, match="Expected a stock class without a masked one"):
        layers.register(type("Mine", (layers.MaskedGaussian, keras.layers.Dense), {"posterior_weights": ("kernel",)}))


@pytest.fixture(scope="module", autouse=True)
def _tiny():
    with tiny_networks():
        yield


@pytest.mark.parametrize(("dataset", "network"), [("phantom_lesion", "tiny_masks"), ("phantom_chest", "tiny")])
def test_a_baseline(registries, tmp_path, dataset, network):
    run(2)
    data = datasets.load(dataset, size=16, num_train=20, num_val=10, num_test=12)
    recipe = dataclasses.replace(recipes.recipe_for("quick", data.card), epochs=1)
    method = methods.make("mirrors", recipe, network=network, runs=tmp_path, verbose=False).fit(data)
    images = data.test.normalised(slice(0, 12))
    found, plain = method.predict_samples(images), method.step1.model
    for sample, (up, left) in zip(found, ((1, 1), (-1, 1), (1, -1), (-1, -1)), strict=True):
        seen = plain.predict(np.ascontiguousarray(images[:, ::up, ::left]), verbose=0)
        seen = seen[..., 0][:, ::up, ::left] if dataset == "phantom_lesion" else seen
        np.testing.assert_allclose(sample, seen, atol=1e-5)
    one_pass = costs.prediction_flops(plain, 12)
    assert method.cost()["predict_flops"] == pytest.approx(4 * one_pass, rel=0.01)
    options = {"num_train": 20, "num_val": 10, "num_test": 12}
    settings = compare.experiment(
        dataset, network=network, size=16, changes="epochs=1", options=options, runs=tmp_path, verbose=False
    )
    row = compare.row(settings, "mirrors")
    assert row.num_samples == 4 and 0 < row.metrics["nll"] < 5
