"""Methods: one contract, the same step 1, costs that add up, and what temperature and Laplace compute."""

import dataclasses
import functools
import json

import keras
import numpy as np
import pytest
import tensorflow as tf
from helpers import tiny_networks
from scipy import special
from sklearn.metrics import log_loss

from sbn_tf import cost, datasets
from sbn_tf.core.graph import Graph
from sbn_tf.experiments import recipes, training
from sbn_tf.experiments.methods import METHODS, Sizes, describe, laplace, make
from sbn_tf.experiments.predictor import tempered
from sbn_tf.experiments.temperature import fit_temperature
from sbn_tf.layers import masked_layers
from sbn_tf.saliency import named_weights, saliency

TASKS = ("segmentation", "multi-label", "multi-class")
COST_KEYS = {
    *("num_weights", "num_trainable", "num_bayesian", "weight_bytes", "optimizer_bytes"),
    *("predict_flops_per_sample", "num_samples", "predict_flops", "train_step_flops_per_image", "train_flops"),
    *(
        "train_flops_ratio",
        "predict_flops_ratio",
        "paper_flops",
        "train_seconds",
        "train_peak_bytes",
        "train_grown_bytes",
    ),
}


class Untouched(datasets.Split):
    """A test split that nobody may predict, and whose targets nobody may ask for in any form."""

    def normalised(self, index=slice(None)):
        raise AssertionError("test images were read")

    batches = mean_mask = majority = subset = normalised


@pytest.fixture(scope="module", autouse=True)
def _tiny():
    with tiny_networks():
        yield


def made_data(task):
    """8 x 8 images of three noisy colours: which is strongest, which are strong, or where the first one is."""
    random = np.random.default_rng(3)
    raters = 3 if task == "segmentation" else 1
    card = datasets.Card("colours", "made", task, ("r", "g", "b"), 3, raters, "", "", "", (), 8, "tiny")
    parts = []
    for name, count in (("train", 22), ("val", 12), ("test", 7)):
        images = random.integers(0, 150, (count, 8, 8, 3))
        labels = random.integers(0, 2, (count, 3))
        labels[np.arange(3), np.arange(3)] = 1
        if task == "multi-class":
            labels = np.eye(3, dtype=int)[np.arange(count) % 3]
        images += 60 * labels[:, None, None]
        targets = labels.astype("uint8")
        if task == "segmentation":
            targets = (images[..., :1] + random.normal(0, 30, (count, 8, 8, raters)) > 110).astype("uint8")
        kind = Untouched if name == "test" else datasets.Split
        parts.append(kind(name, task, images.astype("uint8"), targets))
    return datasets.Data(card, *parts)


@pytest.fixture(scope="module")
def data():
    return {task: made_data(task) for task in TASKS}


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """One folder for all tests, so that step 1 is trained once."""
    return tmp_path_factory.mktemp("runs")


def recipe_of(data, **changes):
    changes = {"epochs": 2, "bayes_epochs": 1, "batch_size": 5, "num_samples": 2, **changes}
    return recipes.recipe_for("quick", data.card, **changes)


def made(name, data, runs, recipe=None, **options):
    options = {"r_bayes": 0.05, "runs": runs, "num_members": 2, "verbose": False, **options}
    options.setdefault("network", "tiny_masks" if data.card.task == "segmentation" else "tiny")
    return make(name, recipe or recipe_of(data), **options)


@pytest.fixture(scope="module")
def fitted(data, runs):
    """Each method on masks, fitted for the first test that asks; none is changed."""

    def one(name):
        return made(name, data["segmentation"], runs, **share_of(name)).fit(data["segmentation"])

    return functools.cache(one)


@pytest.fixture(scope="module")
def spent(fitted):
    return functools.cache(lambda name: fitted(name).cost())


def share_of(name):
    return {"r_bayes": 0.01} if name == "partial_late" else {}  # the head alone is late enough, and has 7 weights


def images_of(data):
    return datasets.Split.normalised(data.test)


@pytest.mark.parametrize("name", METHODS)
def test_every_method_fits_predicts_and_is_the_same_when_loaded(name, data, runs, fitted, monkeypatch):
    masks, images = data["segmentation"], images_of(data["segmentation"])
    method = fitted(name)
    samples = method.predict_samples(images)
    deterministic = name in ("deterministic", "deterministic_longer", "temperature")
    several = {"budget_3": 3, "budget_5": 5, "turned": 8}.get(name, 2)
    assert method.num_samples == (1 if deterministic or name == "snapshot" else several)
    assert samples.shape == (method.num_samples, 7, 8, 8) and samples.dtype == np.float32
    assert samples.min() >= 0 and samples.max() <= 1
    if method.num_samples > 1:
        assert not np.array_equal(samples[0], samples[1])
    assert len(method.history["loss"]) >= 1
    dataset, folder, seed, settings = method.folder.relative_to(runs).parts
    assert (dataset, seed, len(settings)) == ("colours", "seed0", 10)
    assert folder == (f"partial_r{method.masks.r_bayes:.2g}" if name == "partial" else name)
    assert method.title == describe(name) and "\n" not in method.title
    asked, used = dataclasses.asdict(method.recipe), dataclasses.asdict(method.recipe_used)
    assert {key for key in asked if used[key] != asked[key]} <= set(method.sets) <= set(asked)

    def trained_again(*args, **kwargs):
        raise AssertionError("trained again")

    monkeypatch.setattr(keras.Model, "fit", trained_again)
    again = made(name, masks, runs, **share_of(name))
    assert again.fit(masks) is again
    assert again.folder == method.folder and again.selection == method.selection and again.history == method.history
    np.testing.assert_array_equal(again.predict_samples(images), samples)
    # Neither what was predicted before nor the size of a call changes the samples (one pass: up to rounding).
    if name != "mc_dropout":
        parts = [method.predict_samples(images[i : i + 3]) for i in (0, 3, 6)]
        np.testing.assert_allclose(np.concatenate(parts, axis=1), samples, atol=2e-6)


@pytest.mark.parametrize("name", ["deterministic", "temperature", "ensemble", "mc_dropout", "partial"])
def test_predictions_are_not_traced_in_each_call(name, data, fitted, monkeypatch):
    method = fitted(name)
    images = images_of(data["segmentation"])
    first = method.predict_samples(images)  # a whole batch and a smaller one: Keras traces for each, and no more

    def traced(*args, **kwargs):
        raise AssertionError("traced again")

    for layer in (keras.layers.Conv2D, keras.layers.BatchNormalization):
        monkeypatch.setattr(layer, "call", traced)
    np.testing.assert_array_equal(method.predict_samples(images), first)
    assert method.predict_samples(images[:3]).shape[1] == 3


@pytest.mark.parametrize("task", ["multi-label", "multi-class"])
@pytest.mark.parametrize("name", ["deterministic", "temperature", "laplace", "partial", "bayes_normal"])
def test_labels_and_classes(name, task, data, runs):
    method = made(name, data[task], runs).fit(data[task])
    samples = method.predict_samples(images_of(data[task]))
    assert samples.shape == (method.num_samples, 7, 3)
    sums = samples.sum(axis=-1)
    assert np.allclose(sums, 1, atol=1e-5) == (task == "multi-class")
    assert np.isfinite(samples).all() and samples.min() >= 0 and samples.max() <= 1


def test_costs_add_up(fitted, spent):
    # As partial, partial_random and last_layer.
    alike = ("partial_magnitude", "partial_channel", "partial_late", "first_layer", "first_last")
    names = [name for name in METHODS if name not in alike]
    methods = {name: fitted(name) for name in names}
    spent = {name: spent(name) for name in names}
    for name, found in spent.items():
        assert set(found) == COST_KEYS and json.loads(json.dumps(found)) == found
        assert all(found[key] > 0 for key in COST_KEYS - {"num_bayesian", "paper_flops", "train_grown_bytes"})
        assert (found["num_bayesian"] > 0) == (methods[name].masks is not None)
        assert found["predict_flops"] == methods[name].num_samples * found["predict_flops_per_sample"]
    step1 = methods["deterministic"].model
    step = cost.training_flops(step1, 5)
    pass_of_saliency = cost.saliency_flops(step1, step1.loss, 5)

    alone = spent["deterministic"]
    assert alone["train_flops"] == pytest.approx(22 * 2 * step)
    assert alone["train_flops_ratio"] == alone["predict_flops_ratio"] == alone["paper_flops"] == 1
    assert spent["temperature"] == {**alone, "paper_flops": None}
    assert spent["laplace"]["num_trainable"] == alone["num_trainable"]  # nothing more is trained
    assert spent["ensemble"]["train_flops_ratio"] == spent["ensemble"]["predict_flops_ratio"] == 2
    assert spent["ensemble"]["paper_flops"] == 2  # members; the paper has 5
    longer = 2 * spent["deterministic_longer"]["train_flops_ratio"]
    assert spent["ensemble_longer"]["train_flops_ratio"] == pytest.approx(longer)
    for key in ("num_weights", "num_trainable", "weight_bytes"):
        assert spent["ensemble"][key] == 2 * alone[key]
    for name in ("deterministic_longer", "snapshot"):  # 3 epochs, of which one without batch norm's own
        assert 1 + 0.5 * 0.8 < spent[name]["train_flops_ratio"] <= 1.5
    bayes = methods["partial"].trained[-1].model
    by_hand = 22 * (2 * step + pass_of_saliency + cost.training_flops(bayes, 5))
    assert spent["partial"]["train_flops"] == pytest.approx(by_hand)
    assert spent["laplace"]["train_flops"] == pytest.approx(22 * (2 * step + pass_of_saliency))
    assert spent["partial_random"]["train_flops"] == pytest.approx(by_hand - 22 * pass_of_saliency, rel=0.01)
    assert 2 <= spent["mc_dropout"]["predict_flops_ratio"] < 3
    graph = Graph(step1)
    for name in ("laplace", "partial", "bayes"):  # two samples; what no Bayesian weight precedes runs once for both
        passes = 1 + graph.fan_out([key for key, mask in methods[name].masks.items() if mask.any()])
        assert passes <= spent[name]["predict_flops_ratio"] < 1.02 * passes

    k = round(0.05 * methods["partial"].masks.num_weights)
    for name in ("partial", "partial_random", "laplace"):
        assert spent[name]["num_bayesian"] == k
        assert spent[name]["paper_flops"] == pytest.approx(
            None if name == "laplace" else 1 + 7 / 3 * (1 + methods[name].masks.r_bayes)
        )
    assert spent["bayes"]["num_trainable"] > spent["partial"]["num_trainable"]
    assert spent["bayes"]["num_bayesian"] == methods["partial"].masks.num_weights
    assert spent["bayes_normal"]["paper_flops"] == 15
    assert spent["bayes_normal"]["train_flops_ratio"] > spent["bayes"]["train_flops_ratio"]  # whole batches, no step 1
    seconds = [run.seconds for run in methods["partial"].trained]
    assert spent["partial"]["train_seconds"] == pytest.approx(sum(seconds)) and len(seconds) == 2


@pytest.mark.parametrize("name", ["partial", "last_layer", "mc_dropout"])
def test_more_samples_cost_what_they_run_anew(name, data, runs, fitted, spent):
    """S samples cost 1 + (S - 1) f passes, f the share of the operations after the first Bayesian weight."""
    masks = data["segmentation"]
    method = made(name, masks, runs, num_samples=6).fit(masks)
    costs = [spent(name), method.cost()]
    for one, found, num_samples in zip((fitted(name), method), costs, (2, 6), strict=True):
        assert found["num_samples"] == one.predict_samples(images_of(masks)).shape[0] == num_samples
    graph = Graph(method.step1.model)
    anew = [key for key, mask in method.masks.items() if mask.any()] if name != "mc_dropout" else ["first/kernel"]
    passes = 1 + 5 * graph.fan_out(anew)
    assert passes <= costs[1]["predict_flops_ratio"] < 1.05 * passes
    assert costs[0]["train_step_flops_per_image"] == costs[1]["train_step_flops_per_image"]


def test_which_weights_are_bayesian(data, runs, fitted):
    masks = data["segmentation"]
    rules = ("partial", "partial_random", "partial_magnitude", "first_layer", "last_layer", "first_last", "bayes")
    chosen = {name: fitted(name).masks for name in rules}
    layers = {
        name: {key.split("/")[0]: float(np.mean(mask)) for key, mask in found.items() if mask.any()}
        for name, found in chosen.items()
    }
    assert layers["first_layer"] == {"first": 1.0}
    assert layers["last_layer"] == {"head": 1.0}
    assert layers["first_last"] == {"first": 1.0, "head": 1.0}
    assert layers["bayes"] == {"first": 1.0, "second": 1.0, "head": 1.0}
    assert len({chosen[name].digest() for name in rules}) == len(rules)

    step1 = fitted("deterministic")
    size = {key: np.abs(np.array(w.variable)) for key, w in named_weights(step1.model).items()}
    largest, others = ([], [])
    for key, mask in chosen["partial_magnitude"].items():
        largest.append(size[key][mask])
        others.append(size[key][~mask])
    assert np.concatenate(largest).min() >= np.concatenate(others).max()
    assert made("partial_random", masks, runs, seed=0).fit(masks).masks == chosen["partial_random"]


def test_channels_are_whole_and_late_weights_late(data, runs, fitted):
    masks = data["segmentation"]
    channels = made("partial_channel", masks, runs, r_bayes=0.2).fit(masks).masks
    assert 0 < channels.num_bayesian <= round(0.2 * channels.num_weights)
    for key, mask in channels.items():
        whole = mask.reshape(-1, mask.shape[-1])
        assert (whole == whole[0]).all(), key
    late = fitted("partial_late").masks
    assert late.num_bayesian == round(0.01 * late.num_weights)
    assert {key for key, mask in late.items() if mask.any()} <= {"head/kernel", "head/bias"}
    with pytest.raises(ValueError, match=r"a fan-out of 0\.5 or less. Received: weights with 7"):
        made("partial_late", masks, runs, r_bayes=0.05).fit(masks)


def test_random_weights_are_others_for_another_seed(data, runs):
    first, second = (made("partial_random", data["multi-label"], runs, seed=seed) for seed in (0, 1))
    a, b = (method.fit(data["multi-label"]).masks for method in (first, second))
    assert a.num_bayesian == b.num_bayesian and a != b


def test_the_fully_bayesian_baseline_starts_from_normal_means(data, runs):
    recipe = recipe_of(data["multi-label"], learning_rate=1e-12, scale_learning_rate=1e-12)
    method = made("bayes_normal", data["multi-label"], runs, recipe).fit(data["multi-label"])
    layer = method.model.network.get_layer("first")
    values = np.array(layer.kernel)
    assert values.size == 162 and abs(values.mean()) < 0.3 and 0.8 < values.std() < 1.2  # HeNormal's is 0.27
    assert not (runs / "colours" / "deterministic" / "untrained_tiny").exists()
    assert len(method.history["loss"]) == 3  # the epochs of both steps


@pytest.mark.parametrize("task", ["multi-label", "multi-class"])
def test_temperature_finds_the_factor_of_calibrated_logits(task):
    random = np.random.default_rng(0)
    logits = random.normal(0, 2, (4000, 4))
    if task == "multi-label":
        targets = (random.random(logits.shape) < special.expit(logits)).astype("float32")
    else:
        cumulative = special.softmax(logits, axis=-1).cumsum(axis=-1)
        targets = np.eye(4)[(random.random((4000, 1)) > cumulative[:, :-1]).sum(axis=-1)]
    for factor in (0.3, 1.0, 4.0):
        found = fit_temperature(factor * logits, targets, task)
        assert found == pytest.approx(factor, rel=0.08)

        def nll(temperature, factor=factor):
            if task == "multi-label":
                return log_loss(targets.ravel(), special.expit(factor * logits / temperature).ravel())
            return log_loss(targets.argmax(-1), special.softmax(factor * logits / temperature, axis=-1))

        grid = found * np.linspace(0.9, 1.1, 21)
        assert np.argmin([nll(t) for t in grid]) == 10  # the middle: none of the others is better


@pytest.mark.parametrize("task", TASKS)
def test_tempered_probabilities(task):
    probs = np.float32([[0.0, 0.2, 0.8], [1.0, 0.0, 0.0]])
    np.testing.assert_allclose(tempered(probs, 1.0, task), probs, atol=1e-6)
    softer, sharper = (tempered(probs, t, task) for t in (2.0, 0.5))
    assert np.isfinite(softer).all() and np.isfinite(sharper).all()
    if task == "multi-class":
        np.testing.assert_allclose(softer[0], np.sqrt(probs[0]) / np.sqrt(probs[0]).sum(), atol=1e-6)
    else:
        assert softer[0, 2] == pytest.approx(2 / 3) and sharper[0, 2] == pytest.approx(16 / 17)  # odds 4, 2 and 16


@pytest.mark.parametrize(("spread", "expected"), [(0.0, 0.05), (1.0, 20.0)])
def test_temperature_stays_in_its_bounds(spread, expected):
    logits = np.array([[0.2], [-0.2]] * 20)
    targets = logits > 0 if spread == 0 else logits < 0  # always right; always wrong
    assert fit_temperature(logits, targets, "binary") == pytest.approx(expected, rel=1e-3)


def test_soft_targets_of_masks_weigh_as_their_raters():
    random = np.random.default_rng(1)
    logits, raters = random.normal(0, 3, (6, 4, 4)), random.integers(0, 2, (5, 6, 4, 4))
    soft = fit_temperature(logits, raters.mean(0), "segmentation")
    hard = fit_temperature(np.tile(logits, (5, 1, 1)), raters.reshape(30, 4, 4), "segmentation")
    assert soft == pytest.approx(hard, rel=1e-4)


def test_temperature_of_logits_that_are_not_finite():
    with pytest.raises(ValueError, match="Expected finite logits"):
        fit_temperature(np.array([[np.nan, 1.0]]), np.ones((1, 2)), "multi-label")


@pytest.fixture(scope="module")
def logistic():
    """Two logistic regressions on the same 4003 examples at the weights that drew their labels."""
    random = np.random.default_rng(2)
    x = random.normal(0, [1.0, 0.5, 2.0], (4003, 3)).astype("float32")
    model = keras.Sequential([keras.Input((3,)), keras.layers.Dense(2, "sigmoid", use_bias=False, name="d")])
    model.set_weights([np.float32([[1.0, -0.5], [0.3, 0.8], [-0.4, 0.2]])])
    probs = model.predict(x, verbose=0)
    return model, x, (random.random(probs.shape) < probs).astype("float32"), probs


@pytest.mark.parametrize(("score", "tolerance"), [("per_example", 0.06), ("fisher", 0.25)])
def test_empirical_fisher_is_near_the_hessian_of_a_logistic_regression(logistic, score, tolerance):
    model, x, y, probs = logistic
    scores = saliency(model, (x, y), "binary_crossentropy", score=score, batch_size=10, verbose=False)
    found = training.empirical_fisher(scores, score, terms=2, num_examples=4003, batch_size=10)["d/kernel"]
    hessian = np.einsum("ni,nl->il", x**2, probs * (1 - probs)) / 4003
    np.testing.assert_allclose(found, hessian, rtol=tolerance)
    if score == "per_example":  # gradient of -ln p of one example: (p - y) x
        by_hand = np.einsum("ni,nl->il", x.astype("float64") ** 2, (probs - y).astype("float64") ** 2) / 4003
        np.testing.assert_allclose(found, by_hand, rtol=1e-4)


def test_empirical_fisher_of_batches_of_one_is_exact_and_of_other_scores_refused(logistic):
    model, x, y, _ = logistic
    options = {"terms": 2, "num_examples": 60, "batch_size": 1}
    found = [
        training.empirical_fisher(
            saliency(model, (x[:60], y[:60]), "binary_crossentropy", score=s, batch_size=1, verbose=False), s, **options
        )["d/kernel"]
        for s in ("per_example", "fisher")
    ]
    np.testing.assert_allclose(*found, rtol=1e-5)
    with pytest.raises(ValueError, match=r"Expected score.*Received: score='paper'"):
        training.empirical_fisher({}, "paper", **options)


@pytest.mark.parametrize("score", ["fisher", "per_example"])
def test_laplace_has_the_scales_of_its_precision_and_chooses_the_prior_on_validation(score, data, runs):
    labels = data["multi-label"]
    recipe = dataclasses.replace(recipe_of(labels), score=score)
    method = made("laplace", labels, runs, recipe, r_bayes=0.2, num_samples=3).fit(labels)
    step1 = made("deterministic", labels, runs, recipe).fit(labels).model

    # By hand: gradients of the summed NLL of single images, or of batches of 5 (the last of 2), 4.4 on average.
    x, y = next(iter(labels.train.batches(22, seed=0)))
    size = 1 if score == "per_example" else 5
    loss = keras.losses.BinaryCrossentropy(reduction="sum")
    squares = {key: 0.0 for key in method.masks}
    for start in range(0, 22, size):
        part = slice(start, start + size)
        with tf.GradientTape() as tape:
            total = 3 * loss(y[part], step1(x[part], training=False))
        weights = [named_weights(step1)[key].variable.value for key in method.masks]
        count = len(x[part])
        for key, gradient in zip(squares, tape.gradient(total, weights), strict=True):
            squares[key] += count * (np.array(gradient) / count) ** 2 * (1 if score == "per_example" else 4.4) / 22
    prior = method.selection["prior_precision"]
    expected = [(22 * squares[key][mask] + prior) ** -0.5 for key, mask in method.masks.items() if mask.any()]
    np.testing.assert_allclose(np.sort(method.model.scales()), np.sort(np.concatenate(expected)), rtol=1e-3)

    truth, val = np.asarray(labels.val.targets), labels.val.normalised()
    found = {}
    for precision in laplace.PRIOR_PRECISIONS:
        method._set_scales(precision)
        assert method.model.scales().max() <= precision**-0.5 * 1.001
        found[precision] = log_loss(truth.ravel(), method.predict_samples(val).mean(0).ravel())
    assert found[prior] == pytest.approx(min(found.values()))
    for layer in masked_layers(method.model.network):  # locs are step 1's
        np.testing.assert_array_equal(layer.kernel, step1.get_layer(layer.name).kernel)


def test_a_laplace_posterior_of_a_huge_precision_is_the_deterministic_network(data, runs):
    labels = data["multi-label"]
    method = made("laplace", labels, runs).fit(labels)
    method._set_scales(1e16)
    np.testing.assert_allclose(method.model.scales(), 1e-8, rtol=1e-3)
    images = images_of(labels)
    expected = made("deterministic", labels, runs).fit(labels).predict_samples(images)
    np.testing.assert_allclose(method.predict_samples(images), expected.repeat(2, axis=0), atol=1e-6)


def test_members_and_continued_runs_start_from_the_same_step_1(data, runs):
    labels, images = data["multi-label"], images_of(data["multi-label"])
    ensemble = made("ensemble", labels, runs, num_members=3).fit(labels)
    alone = made("deterministic", labels, runs).fit(labels)
    np.testing.assert_array_equal(ensemble.predict_samples(images)[0], alone.predict_samples(images)[0])
    names = json.loads((ensemble.folder / "members.json").read_text())["members"]
    assert names[0] == alone.folder.relative_to(runs / "colours").as_posix()
    assert len(names) == 3 and all((runs / "colours" / name / "model.keras").exists() for name in names)
    # A member is the network of its seed.
    seed = int(names[1].split("/")[1].removeprefix("seed"))
    member = made("deterministic", labels, runs, seed=seed).fit(labels)
    np.testing.assert_array_equal(ensemble.predict_samples(images)[1], member.predict_samples(images)[0])


def test_the_longer_ensemble_is_of_longer_trained_members(data, runs):
    labels, images = data["multi-label"], images_of(data["multi-label"])
    ensemble = made("ensemble_longer", labels, runs).fit(labels)
    names = json.loads((ensemble.folder / "members.json").read_text())["members"]
    for index, name in enumerate(names):
        seed = int(name.split("/")[1].removeprefix("seed"))
        alone = made("deterministic_longer", labels, runs, seed=seed).fit(labels)
        assert alone.folder.name == name.split("/")[2]
        np.testing.assert_array_equal(ensemble.predict_samples(images)[index], alone.predict_samples(images)[0])
    assert len(names) == 2 and len(ensemble.trained) == 4


def test_members_that_part_early_cost_one_training(data, runs):
    masks = data["segmentation"]
    recipe = recipe_of(masks, epochs=5, branch_at=0.4)
    method = made("branched", masks, runs, recipe, r_bayes=0.1).fit(masks)
    stem, members = method.trained
    assert [len(run.history["loss"]) for run in (stem, members)] == [2, 3]
    alone = dataclasses.replace(recipe, epochs=2, decay="none")  # one network at a constant rate
    again = training.deterministic_run(masks, alone, network="tiny_masks", runs=runs, verbose=False)
    assert again.folder == stem.folder
    assert method.masks.digest() == training.masks_run(again, masks, alone, 0.1).digest()
    rates = members.model.optimizer.loc_optimizer.get_config()["learning_rate"]["config"]
    assert rates["initial_learning_rate"] == pytest.approx(recipe.learning_rate)
    assert rates["decay_steps"] == 3 * masks.train.steps(5)
    steps = [cost.training_flops(run.model, 5) for run in (stem, members)]
    spent = 2 * steps[0] + 3 * steps[1] + cost.saliency_flops(stem.model, recipes.loss_for(recipe, masks), 5)
    assert method.cost()["train_flops"] == pytest.approx(masks.train.num_examples * spent)


@pytest.mark.parametrize(("name", "number"), [("budget_2", 2), ("budget_3", 3), ("budget_5", 5)])
def test_networks_of_one_budget_are_deterministic_runs_of_fewer_epochs(name, number, data, runs):
    masks = data["segmentation"]
    method = made(name, masks, runs, recipe_of(masks, epochs=6)).fit(masks)
    short = recipe_of(masks, epochs=round(6 / number))
    for index, run in enumerate(method.trained):
        seed = training.member_seed(0, index)
        alone = training.deterministic_run(masks, short, seed=seed, network="tiny_masks", runs=runs, verbose=False)
        assert alone.folder == run.folder
    assert method.cost()["train_flops_ratio"] == pytest.approx(number * round(6 / number) / 6)
    assert method.cost()["num_weights"] == number * cost.parameters(alone.model)["num_weights"]


def test_the_papers_recipe_as_coded(data, tmp_path):
    labels = data["multi-label"]
    recipe = recipes.recipe_for("paper_as_coded", labels.card, epochs=1, bayes_epochs=1, batch_size=8, num_samples=2)
    for method in ("laplace", "bayes_normal"):
        one = made(method, labels, tmp_path, recipe).fit(labels)
        assert one.predict_samples(images_of(labels)).shape == (2, 7, 3)


def test_the_best_epoch_is_kept_but_not_by_snapshots(data, tmp_path):
    labels = data["multi-label"]
    recipe = recipe_of(labels, keep="best", bayes_epochs=2)
    for name in ("snapshot", "deterministic_longer"):
        assert made(name, labels, tmp_path, recipe).fit(labels).folder.exists()


@pytest.mark.parametrize("content", ["{", '{"temperature": -1}', '{"temperature": null}', "{}"])
def test_a_broken_choice_is_named(content, data, runs):
    labels = data["multi-label"]
    folder = made("temperature", labels, runs).fit(labels).folder
    whole = (folder / "temperature.json").read_text()
    (folder / "temperature.json").write_text(content)
    with pytest.raises(ValueError, match=r"Expected a whole file with temperature.*\nDelete it"):
        made("temperature", labels, runs).fit(labels)
    (folder / "temperature.json").write_text(whole)


def test_cycles_end_at_different_weights_and_are_read_again(data, runs):
    labels, images = data["multi-label"], images_of(data["multi-label"])
    recipe = dataclasses.replace(recipe_of(labels, bayes_epochs=3), keep="best")
    method = made("snapshot", labels, runs, recipe=recipe).fit(labels)
    samples = method.predict_samples(images)
    assert len(samples) == 3 and not np.array_equal(samples[0], samples[1])
    assert "kept_epoch" not in method.history and method.recipe_used.keep == "last"
    assert "kept_epoch" in made("deterministic_longer", labels, runs, recipe=recipe).fit(labels).history
    again = made("snapshot", labels, runs, recipe=recipe).fit(labels)
    np.testing.assert_array_equal(again.predict_samples(images), samples)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("ensembel", {}, r"Expected a method among deterministic, .*\nReceived: 'ensembel'"),
        ("partial", {"r_bayes": 1.3}, "Received: r_bayes=1.3"),
        ("deterministic", {"r_bayes": "1 %"}, "Expected r_bayes"),
        ("mc_dropout", {"num_samples": 0}, "Expected num_samples, an integer >= 1. Received: num_samples=0"),
        ("ensemble", {"num_members": 0}, "Expected num_members, an integer >= 1. Received: num_members=0"),
        ("ensemble", {"num_members": True}, "Received: num_members=True"),
    ],
)
def test_options_that_are_none(name, options, message, data):
    with pytest.raises(ValueError, match=message):
        make(name, recipe_of(data["segmentation"]), **options)


def test_what_is_no_recipe_not_fitted_or_no_image(data, runs):
    with pytest.raises(TypeError, match="Expected a Recipe"):
        make("partial", "quick")
    method = made("deterministic", data["segmentation"], runs)
    for call in (method.cost, lambda: method.predict_samples(np.zeros((1, 8, 8, 3)))):
        with pytest.raises(ValueError, match=r"Expected a fitted method: call fit\(data\) first"):
            call()
    method.fit(data["segmentation"])
    for shape in ((8, 8, 3), (2, 8, 8, 1), (0, 8, 8, 3)):
        with pytest.raises(ValueError, match=r"Expected normalised images \(batch, 8, 8, 3\)"):
            method.predict_samples(np.zeros(shape))


def test_a_run_is_shared_with_the_three_steps(data, runs):
    labels = data["multi-label"]
    recipe = recipe_of(labels)
    method = made("partial", labels, runs, recipe).fit(labels)
    options = {"runs": runs, "verbose": False}
    step1 = training.deterministic_run(labels, recipe, network="tiny", **options)
    masks = training.masks_run(step1, labels, recipe, 0.05, verbose=False)
    assert training.partial_run(step1, masks, labels, recipe, **options).folder == method.folder


@pytest.mark.parametrize("name", METHODS)
def test_an_estimate_before_anything_runs_covers_the_cost(name, data, runs, fitted, spent):
    masks, share = data["segmentation"], share_of(name)
    sizes = Sizes(masks.card, masks.input_shape, masks.num_outputs, masks.train.num_examples, masks.val.num_examples)
    before = made(name, masks, runs, **share).estimate(sizes)
    assert before == made(name, masks, runs, **share).estimate(masks)
    method = fitted(name)
    found, epochs = spent(name), [len(run.history["loss"]) for run in method.trained]
    one_pass = cost.prediction_flops(method.step1.model, 5)
    validation = one_pass * masks.val.num_examples
    trained = sum(before.trainings.values()) - sum(epochs) * validation
    if name in ("deterministic", "ensemble"):  # the same steps; others freeze batch norm or have fewer Bayesian weights
        assert trained == pytest.approx(found["train_flops"])
    assert 0.99 * found["train_flops"] <= trained <= 2 * found["train_flops"]
    assert 0.9 * found["predict_flops"] <= before.predict_flops <= 2.5 * found["predict_flops"]
    assert before.num_bytes >= 3 * found["weight_bytes"] / method.num_networks / 2


@pytest.mark.parametrize("name", ["turned", "ensemble_turned", "members_turned", "branched_turned"])
def test_a_turned_method_takes_the_trained_networks_of_its_namesake(name, data, fitted):
    """Sample s of the plain method, of the images under symmetry s, turned back."""
    images = images_of(data["segmentation"])
    turned, plain_one = fitted(name), fitted({"turned": "deterministic"}.get(name, name.removesuffix("_turned")))
    assert [run.folder for run in turned.trained] == [run.folder for run in plain_one.trained]
    assert turned.folder != plain_one.folder
    samples, plain_samples = turned.predict_samples(images), plain_one.predict_samples(images)
    np.testing.assert_allclose(samples[0], plain_samples[0], atol=2e-6)
    mirrored = plain_one.predict_samples(images[:, :, ::-1])[-1 if len(plain_samples) == 1 else 1]
    np.testing.assert_allclose(samples[1], mirrored[:, :, ::-1], atol=2e-6)
    assert not np.allclose(samples[1], plain_samples[-1 if len(plain_samples) == 1 else 1], atol=1e-4)


def test_methods_name_the_trainings_that_they_share(data):
    masks = data["segmentation"]
    found = {name: made(name, masks, None).estimate(masks).trainings for name in METHODS}
    assert {name for name in METHODS if "step1" not in found[name]} == {
        *("bayes_normal", "branched", "branched_turned", "budget_2", "budget_3", "budget_5")
    }
    assert set(found["budget_2"]) == {"budget_2_member0", "budget_2_member1"}
    assert set(found["branched"]) == set(found["branched_turned"]) == {"stem", "saliency_of_stem", "branched"}
    assert set(found["deterministic_longer"]) == {"step1", "longer0"} < set(found["ensemble_longer"])
    assert set(found["ensemble"]) == {"step1", "member1"} < set(found["ensemble_longer"])
    assert set(found["partial"]) == {"step1", "saliency_fisher", "partial"}
    assert set(found["partial_random"]) == {"step1", "partial_random"}
