"""Tests of `sbn-tf train` and `sbn-tf predict`: from image files to masks, labels and their uncertainty."""

import csv
import json
import re
import shutil
from types import SimpleNamespace

import keras
import numpy as np
import pandas as pd
import pytest
from helpers import NETWORK_CARD, QUANTILES, tiny_network, tiny_networks
from PIL import Image
from scipy.special import entr, expit, log_softmax, logit
from sklearn.covariance import LedoitWolf

import sbn_tf
from sbn_tf import datasets
from sbn_tf.__main__ import main
from sbn_tf.datasets import image_files
from sbn_tf.experiments import predict, scoring
from sbn_tf.experiments.distance import Features
from sbn_tf.experiments.guarantees import CUTS
from sbn_tf.experiments.predictor import NetworkCard, Prediction, Predictor, tempered
from sbn_tf.experiments.train import predictor_of
from sbn_tf.partial_bayes import to_partial_bayes
from sbn_tf.saliency import saliency, top_k

SIZES = [(40, 30), (30, 44), (33, 33)]  # width, height
CARD = {**NETWORK_CARD, **dict.fromkeys(QUANTILES, np.linspace(0, 0.7, 101).tolist())}


def write_image(path, width, height, seed):
    """A disc on noise; gives its mask."""
    rng = np.random.default_rng(seed)
    up, across = np.mgrid[:height, :width]
    disc = (up - height * rng.uniform(0.3, 0.7)) ** 2 + (across - width * rng.uniform(0.3, 0.7)) ** 2 < 60
    pixels = np.clip(60 + 120 * disc + rng.normal(0, 20, disc.shape), 0, 255).astype("uint8")
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)
    return disc


@pytest.fixture(scope="module")
def places(tmp_path_factory):
    """A folder with masks, one of new images, and the network of `sbn-tf train`."""
    folder = tmp_path_factory.mktemp("predict")
    (folder / "data" / "masks").mkdir(parents=True)
    with open(folder / "data" / "images.csv", "w", newline="") as file:
        lines = csv.writer(file)
        lines.writerow(["image", "mask"])
        for i in range(30):
            disc = write_image(folder / "data" / "images" / f"{i}.png", *SIZES[i % 3], seed=i)
            Image.fromarray((255 * disc).astype("uint8")).save(folder / "data" / "masks" / f"{i}.png")
            lines.writerow([f"{i}.png", f"{i}.png"])
    for i in range(5):
        write_image(folder / "new" / f"né w {i}.png", *SIZES[i % 3], seed=100 + i)
    arguments = ["--recipe", "quick", "--size", "16", "--epochs", "1", "--bayes-epochs", "1", "--network", "tiny_masks"]
    with tiny_networks():
        assert main(["train", str(folder / "data"), "--out", str(folder / "network"), *arguments]) == 0
    return folder


@pytest.fixture(scope="module")
def network(places):
    return sbn_tf.load(places / "network")


def plain(task="segmentation", outputs=1, **changes):
    """A predictor of an untrained network, without draws."""
    card = NetworkCard.model_validate({**CARD, "task": task, "classes": [f"c{i}" for i in range(outputs)], **changes})
    shape = (card.size, card.size, card.channels)
    keras.utils.set_random_seed(0)
    if task == "segmentation":
        layers = [keras.layers.Conv2D(1, 1, activation="sigmoid")]
    else:
        last = "softmax" if task in ("multi-class", "ordinal") else "sigmoid"
        layers = [keras.layers.Flatten(), keras.layers.Dense(outputs, last)]
    return Predictor(keras.Sequential([keras.Input(shape), *layers]), card)


def seen_as(one, values, whole):
    """A map of the network's square at the image's own size."""
    return Prediction(one.card, whole, {}, None).at_own_size(values)


def test_a_network_reads_files_as_its_training_did(places, network):
    data = datasets.load(str(places / "data"), size=16)
    by_id = dict(zip(data.test.ids, data.test.normalised(), strict=True))
    assert len(by_id) == 3
    for name, expected in by_id.items():
        found, whole = network.read(places / "data" / "images" / name)
        np.testing.assert_array_equal(found, expected)
        assert whole == SIZES[int(name.split(".")[0]) % 3]
        pixels = np.asarray(Image.open(places / "data" / "images" / name))
        np.testing.assert_array_equal(network.read(pixels)[0], expected)


def tiled_and_whole(path, size, scale, shape, seed=1):
    """Maps of an image by tiles, and by one pass of the same two layers over all of it."""
    keras.utils.set_random_seed(seed)
    layers = [
        keras.layers.Conv2D(3, 3, padding="same", activation="tanh"),
        keras.layers.Conv2D(1, 1, activation="sigmoid"),
    ]
    network = keras.Sequential([keras.Input((size, size, 1)), *layers])
    card = NetworkCard.model_validate({**CARD, "size": size})
    whole = keras.Sequential([keras.Input((*shape, 1)), *layers])
    pixels = Image.open(path).resize(shape[::-1], Image.Resampling.BILINEAR)
    x = (np.asarray(pixels, "float32") / 255 - 0.4) / 0.2
    return Predictor(network, card).predict_tiled(path, scale), whole.predict(x[None, ..., None], verbose=0)[0, ..., 0]


def test_tiles_give_what_one_pass_over_the_image_gives(tmp_path):
    """The network sees one pixel to each side; two of each tile's 16 do not count."""
    write_image(tmp_path / "a.png", 61, 47, seed=3)
    found, expected = tiled_and_whole(tmp_path / "a.png", 16, 1.0, (47, 61))
    np.testing.assert_allclose(found.probabilities, expected, atol=1e-6)
    np.testing.assert_allclose(found.entropy(), entr(expected) + entr(1 - expected), atol=1e-6)
    half, expected = tiled_and_whole(tmp_path / "a.png", 16, 0.5, (24, 30))
    np.testing.assert_allclose(half.values["probabilities"], expected, atol=1e-6)
    assert half.probabilities.shape == (47, 61)


def test_all_tiles_of_an_image_meet_the_same_draws(network, tmp_path):
    Image.fromarray(np.full((40, 56), 90, "uint8")).save(tmp_path / "grey.png")
    found = network.predict_tiled(tmp_path / "grey.png", 1.0)
    one = network.predict_batch(np.broadcast_to(network.read(np.full((16, 16), 90, "uint8"))[0], (1, 16, 16, 1)))[0]
    assert found.samples.shape == (network.card.num_samples, 40, 56)
    spread = found.samples.std(0).mean() / one.samples.std(0).mean()
    assert 0.5 < spread < 2  # of independent draws for each tile the mean would vary less
    np.testing.assert_allclose(
        found.samples[:, 16:24, 24:32].mean((1, 2)), one.samples[:, 6:10, 6:10].mean((1, 2)), atol=0.05
    )


def test_a_folder_by_tiles(places, network, tmp_path):
    arguments = ["predict", str(places / "network"), str(places / "new"), "--out", str(tmp_path / "out")]
    assert main([*arguments, "--tile-scale", "0.5"]) == 0
    table = pd.read_csv(tmp_path / "out" / "predictions.csv")
    path = sorted((places / "new").iterdir())[0]
    one = network.predict_tiled(path, 0.5)
    assert table.set_index("image").loc[path.name, "total"] == pytest.approx(one.means["total"], rel=1e-4)
    mask = np.asarray(Image.open(tmp_path / "out" / "masks" / f"{path.name}.png"))
    np.testing.assert_array_equal(mask > 0, one.probabilities > network.card.threshold)


@pytest.mark.parametrize(
    ("task", "options", "message"),
    [
        ("binary", {"tile_scale": 1.0}, "network of a segmentation"),
        ("segmentation", {"tile_scale": 0.0}, "tile_scale"),
        ("segmentation", {"tile_scale": 1.0, "refer": 0.1}, "without alpha and refer"),
    ],
)
def test_tiles_that_make_no_sense_are_refused(task, options, message, places, tmp_path):
    with pytest.raises(ValueError, match=message):
        predict.predict_folder(plain(task), places / "new", tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()


def test_predictions_are_those_of_the_model(places, network):
    files = sorted((places / "new").iterdir())
    found = network.predict(places / "new")
    x = np.stack([network.read(path)[0] for path in files])
    samples = sbn_tf.load(places / "network").model.predict_samples(x, batch_size=len(x))[..., 0]
    inside = network.predict_batch(x)
    for i, one in enumerate(inside):
        samples[:, i] = expit(logit(samples[:, i].astype("float64")) / network.card.temperature)
        mean = samples[:, i].mean(0)
        np.testing.assert_allclose(one.probabilities, mean, rtol=1e-5)
        np.testing.assert_allclose(one.entropy(), entr(mean) + entr(1 - mean), rtol=1e-4)
        aleatoric = (entr(samples[:, i]) + entr(1 - samples[:, i])).mean(0)
        np.testing.assert_allclose(one.entropy("expected_entropy"), aleatoric, rtol=1e-4)
        assert found[i].probabilities.shape == Image.open(files[i]).size[::-1]
    alone = network.predict(files[3])[0]  # the draws are the same, however images are grouped
    np.testing.assert_allclose(alone.probabilities, found[3].probabilities, rtol=1e-5)


def test_the_card_has_the_quantiles_of_validation(places, network):
    val = datasets.load(str(places / "data"), size=16).val
    files = [places / "data" / "images" / name for name in val.ids]
    scores = [one.means["total"] for one in network.predict(files)]  # of the files, at their own sizes
    np.testing.assert_allclose(network.card.quantiles[50], np.median(scores), rtol=1e-4)
    np.testing.assert_allclose(network.card.quantiles[100], np.max(scores), rtol=1e-4)
    images = [network.read(path)[0] for path in sorted((places / "new").iterdir())]
    train, features = datasets.load(str(places / "data"), size=16).train, Features(network.model)
    seen = features(train.normalised())
    covariance = LedoitWolf(assume_centered=True).fit(seen - seen.mean(0))
    far = [one.distance for one in network.predict_batch(np.stack(images))]
    np.testing.assert_allclose(
        far, np.sqrt(covariance.mahalanobis(features(np.stack(images)) - seen.mean(0))), rtol=1e-4
    )
    found = network.predict(files)
    np.testing.assert_allclose(
        network.card.distance_quantiles[50], np.median([one.distance for one in found]), rtol=1e-3
    )
    for part in ("aleatoric", "epistemic"):
        scores = [one.means[part] for one in found]
        np.testing.assert_allclose(getattr(network.card, f"{part}_quantiles")[100], np.max(scores), rtol=1e-3)


@pytest.mark.parametrize("fit", ["pad", "crop", "stretch"])
def test_maps_go_back_to_where_the_image_was(fit):
    seen = np.arange(16, dtype="float32").reshape(4, 4)
    found = seen_as(plain(size=4, fit=fit), seen, (4, 2) if fit == "pad" else (8, 4))
    if fit == "pad":  # black above and below
        np.testing.assert_array_equal(found, seen[1:3])
    elif fit == "crop":
        np.testing.assert_array_equal(found, np.pad(seen, ((0, 0), (2, 2))))
    else:
        np.testing.assert_allclose(found[:, [0, -1]], seen[:, [0, -1]])
        assert found.shape == (4, 8)


@pytest.mark.parametrize("fit", ["pad", "crop", "stretch"])
@pytest.mark.parametrize("whole", [(33, 20), (20, 33)])
def test_a_spot_comes_back_at_its_place(fit, whole):
    image = np.zeros(whole[::-1], "uint8")
    image[9:13, 9:13] = 255
    one = plain(size=64, fit=fit)
    seen = one.read(image)[0][..., 0] * 0.2 + 0.4  # of 0..1 again
    back = seen_as(one, seen, whole)
    up, across = np.indices(back.shape)
    centre = (back * up).sum() / back.sum(), (back * across).sum() / back.sum()
    np.testing.assert_allclose(centre, (10.5, 10.5), atol=0.5)


def test_a_folder_becomes_masks_maps_and_a_table(places, network, tmp_path, capsys):
    shutil.copytree(places / "new", tmp_path / "in")
    shutil.copy(tmp_path / "in" / "né w 0.png", tmp_path / "in" / "._né w 0.png")
    (tmp_path / "in" / "notes.txt").write_text("no image")
    (tmp_path / "in" / "deeper").mkdir()
    (tmp_path / "in" / "deeper" / "né w 0.png").write_bytes((places / "new" / "né w 1.png").read_bytes()[:200])
    (tmp_path / "in" / "deeper" / "circle").symlink_to(tmp_path / "in")
    arguments = ["predict", str(places / "network"), str(tmp_path / "in"), "--out", str(tmp_path / "out")]
    assert main([*arguments, "--masks", "2", "--flag", "1"]) == 1
    said = capsys.readouterr()
    assert "5 images, 5 flagged, 1 skipped" in said.out and "truncated" in said.err
    page = (tmp_path / "out" / "report.html").read_text("utf-8")
    assert page.count("data:image/png;base64,") == 5 * 3 and "deeper/né w 0.png" in page
    table = pd.read_csv(tmp_path / "out" / "predictions.csv").set_index("image")
    assert sorted(table.index) == sorted(path.name for path in (places / "new").iterdir())
    assert pd.read_csv(tmp_path / "out" / "skipped.csv")["image"].tolist() == ["deeper/né w 0.png"]
    for name, row in table.iterrows():
        (one,) = network.predict(places / "new" / name)
        mask = np.asarray(Image.open(tmp_path / "out" / "masks" / f"{name}.png"))
        np.testing.assert_array_equal(mask > 0, one.probabilities > 0.5)
        assert row["area_pixels"] == (mask > 0).sum() and np.isclose(row["area"], (mask > 0).mean())
        assert np.isclose(row["total"], row["aleatoric"] + row["epistemic"], atol=1e-5)
        entropy = np.asarray(Image.open(tmp_path / "out" / "entropy" / f"{name}.png")) / 255 * np.log(2)
        np.testing.assert_allclose(entropy, one.entropy(), atol=2e-3)
        (square,) = network.predict_batch(network.read(places / "new" / name)[0][None])
        assert np.isclose(row["total"], square.entropy().mean(), rtol=1e-4)
        assert np.isclose(row["distance"], square.distance, rtol=1e-4) and row["unlike"]  # --flag 1 flags all
        sampled = np.asarray(Image.open(tmp_path / "out" / "samples_2" / f"{name}.png"))
        np.testing.assert_array_equal(sampled > 0, one.sample(1) > 0.5)


def test_decisions_with_a_guarantee(places, network, tmp_path, capsys):
    """Three validation images are enough for a risk of 1/4."""
    found = network.card.calibration
    val = datasets.load(str(places / "data"), size=16).val
    assert (found.unit, found.num) == ("images", 3) == ("images", val.num_examples)
    inside = network.predict_batch(val.normalised())
    missed = [
        (one.probabilities[mask > 0] < network.card.threshold).mean()
        for one, mask in zip(inside, val.majority()[..., 0], strict=True)
    ]
    assert np.isclose(np.interp(network.card.threshold, CUTS, found.missed), np.mean(missed), atol=0.05)
    arguments = ["predict", str(places / "network"), str(places / "new"), "--out", str(tmp_path / "out")]
    assert main([*arguments, "--alpha", "0.25", "--refer", "0.6"]) == 0
    said = capsys.readouterr().out
    assert "masks_fnr: 0.25 of the true pixels missed at most, in the mean over new images drawn as the 3" in said
    table = pd.read_csv(tmp_path / "out" / "predictions.csv")
    number, page = table["refer"].sum(), (tmp_path / "out" / "report.html").read_text("utf-8")
    assert f" {number} to refer, " in said and f"To refer: {number} of 5 images" in page
    assert table["refer"].dtype == bool and len(list((tmp_path / "out" / "masks_fnr").iterdir())) == len(table) == 5
    assert main([*arguments[:-1], str(tmp_path / "o"), "--alpha", "0.1"]) == 2
    assert "Expected 9 or more calibration images" in capsys.readouterr().err


def test_an_interrupted_prediction_goes_on_to_the_same_table(places, network, tmp_path, monkeypatch):
    monkeypatch.setattr(predict, "BATCH", 2)
    whole = predict.predict_folder(network, places / "new", tmp_path / "whole")
    original, calls = network.predict_batch, []

    def interrupted(*args):
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return original(*args)

    monkeypatch.setattr(network, "predict_batch", interrupted)
    with pytest.raises(KeyboardInterrupt):
        predict.predict_folder(network, places / "new", tmp_path / "out")
    assert len(pd.read_csv(tmp_path / "out" / "predictions.csv")) == 2
    predict.predict_folder(network, places / "new", tmp_path / "out")
    assert len(calls) == 4
    first, second = ((tmp_path / at / "predictions.csv").read_text() for at in ("whole", "out"))
    assert first == second and len(whole) == 5


@pytest.mark.parametrize(
    ("error", "code", "says"),
    [(KeyboardInterrupt(), 130, "Stopped."), (OSError(28, "No space left on device"), 2, "Free some space.")],
)
def test_what_was_done_stays(error, code, says, tmp_path, monkeypatch, capsys):
    for i in range(3):
        write_image(tmp_path / "in" / f"{i}.png", 9, 9, i)
    plain().save(tmp_path / "network")
    arguments = ["predict", str(tmp_path / "network"), str(tmp_path / "in"), "--out", str(tmp_path / "out")]
    monkeypatch.setattr(predict, "BATCH", 2)
    original = predict._write_pictures

    def failing(out, name, *others):
        if name == "2.png":
            raise error
        original(out, name, *others)

    with monkeypatch.context() as patch:
        patch.setattr(predict, "_write_pictures", failing)
        assert main(arguments) == code
    said = capsys.readouterr().err
    assert f"{says} What was done stays" in said and "Traceback" not in said
    assert len(pd.read_csv(tmp_path / "out" / "predictions.csv")) == 2
    assert main(arguments) == 0 and len(pd.read_csv(tmp_path / "out" / "predictions.csv")) == 3


def test_what_is_left_of_a_killed_prediction_is_whole(tmp_path):
    for i in range(3):
        write_image(tmp_path / "in" / f"{i}.png", 9, 9, i)
    one = plain("multi-class", 3, classes=["007", "1e3", "1.0"])
    whole = predict.predict_folder(one, tmp_path / "in", tmp_path / "out")
    path = tmp_path / "out" / "predictions.csv"
    text = path.read_bytes()
    path.write_bytes(text[:-20])  # in the middle of the last line
    again = predict.predict_folder(one, tmp_path / "in", tmp_path / "out")
    assert path.read_bytes() == text
    pd.testing.assert_frame_equal(again, whole)
    assert set(whole["prediction"]) <= {"007", "1e3", "1.0"}


def test_a_folder_of_broken_files_can_be_tried_again(tmp_path):
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.png").write_bytes(b"no image")
    for _ in range(2):
        assert len(predict.predict_folder(plain(), tmp_path / "in", tmp_path / "out")) == 0
        assert len(pd.read_csv(tmp_path / "out" / "skipped.csv")) == 1
    write_image(tmp_path / "in" / "a.png", 9, 9, 0)
    assert len(predict.predict_folder(plain(), tmp_path / "in", tmp_path / "out")) == 1


def test_another_folder_does_not_get_the_answers_of_the_first(tmp_path):
    for name in ("monday", "tuesday"):
        write_image(tmp_path / name / "1.png", 9, 9, 0)
    predict.predict_folder(plain(), tmp_path / "monday", tmp_path / "out")
    with pytest.raises(ValueError, match="begun with"):
        predict.predict_folder(plain(), tmp_path / "tuesday", tmp_path / "out")


def test_card_and_weights_of_two_trainings_are_refused(tmp_path):
    plain().save(tmp_path / "a")
    other = plain()
    other.model.set_weights([w + 1 for w in other.model.get_weights()])
    other.save(tmp_path / "b")
    shutil.copy(tmp_path / "b" / "network.json", tmp_path / "a" / "network.json")
    with pytest.raises(ValueError, match="of one training"):
        sbn_tf.load(tmp_path / "a")


def test_the_temperature_divides_the_logits_of_every_draw(places, network):
    files = sorted((places / "new").iterdir())[:2]
    x = np.stack([network.read(path)[0] for path in files])
    raw = Predictor(network.model, network.card.model_copy(update={"temperature": 1.0})).samples(x)
    warm = Predictor(network.model, network.card.model_copy(update={"temperature": 2.0}))
    by_hand = expit(logit(raw.astype("float64")) / 2)  # of each draw, then their mean
    assert len(raw) > 1
    for i, one in enumerate(warm.predict_batch(x)):
        mean = by_hand[:, i].mean(0)
        np.testing.assert_allclose(one.samples, by_hand[:, i], rtol=1e-4)
        np.testing.assert_allclose(one.values["probabilities"], mean, rtol=1e-4)
        np.testing.assert_allclose(one.values["entropy"], entr(mean) + entr(1 - mean), rtol=1e-4)
        expected = (entr(by_hand[:, i]) + entr(1 - by_hand[:, i])).mean(0)
        np.testing.assert_allclose(one.values["expected_entropy"], expected, rtol=1e-4)


def settings_of(images, targets, task):
    """As much of an experiment as `predictor_of` reads; every split has the same images."""
    data = datasets.from_arrays(*[(images, targets)] * 3, task=task)
    return SimpleNamespace(data=data, threshold=0.5, recipe=SimpleNamespace(batch_size=64))


@pytest.mark.parametrize("task", ["binary", "multi-class"])
def test_the_temperature_has_the_lowest_nll_on_validation(task):
    rng, one = np.random.default_rng(0), plain(task, 1 if task == "binary" else 3)
    images = rng.integers(0, 256, (400, 8, 8, 1), "uint8")
    kernel = one.model.get_weights()[0]
    x = datasets.split.normalise(images, np.float32(images.mean() / 255), np.float32(images.std() / 255))
    logits = (x.reshape(400, -1) @ kernel).astype("float64")
    noisy = logits / 4 + rng.logistic(size=logits.shape)  # so the network is overconfident
    targets = (noisy > 0).astype("uint8") if task == "binary" else np.eye(3, dtype="uint8")[noisy.argmax(1)]
    made = SimpleNamespace(turned=False, model=one.model, title="made", num_samples=1)
    found = predictor_of(settings_of(images, targets, task), made, "pad").card.temperature
    grid = np.geomspace(0.5, 20, 2000)
    if task == "binary":
        nll = [np.logaddexp(0, (1 - 2.0 * targets) * logits / t).mean() for t in grid]
    else:
        nll = [-log_softmax(logits / t, -1)[targets == 1].mean() for t in grid]
    np.testing.assert_allclose(found, grid[np.argmin(nll)], rtol=0.01)
    assert found > 2


def test_a_temperature_that_raises_the_nll_of_the_draws_is_not_kept(monkeypatch):
    """Two draws say 0.3 and 0.9, the truth is 0.9: a T of 0.18 makes 0.9 of their mean, but 0.5 of sharper draws."""
    one, draws = plain("binary", 1), np.array([0.3, 0.9], "float32")[:, None, None]
    monkeypatch.setattr(
        Predictor, "samples", lambda self, x: tempered(draws.repeat(len(x), 1), self.card.temperature, "binary")
    )
    images = np.random.default_rng(0).integers(0, 256, (100, 8, 8, 1), "uint8")
    targets = (np.arange(100) % 10 > 0).astype("uint8")[:, None]
    made = SimpleNamespace(turned=False, model=one.model, title="made", num_samples=2)
    assert predictor_of(settings_of(images, targets, "binary"), made, "pad").card.temperature == 1


def test_validation_meets_the_draws_of_every_later_prediction(tmp_path):
    network = tiny_network((8, 8, 1), 1, seed=0)
    masks = top_k(saliency(network, score="magnitude"), 0.5)
    bnn = to_partial_bayes(network, masks, num_train=10, num_samples=3, initial_scale=0.5, seed=0)
    images = np.random.default_rng(0).integers(0, 256, (20, 8, 8, 1), "uint8")
    settings = settings_of(images, (np.arange(20) % 2).astype("uint8")[:, None], "binary")
    made = SimpleNamespace(turned=False, model=bnn, title="made", num_samples=3)
    predictor_of(settings, made, "pad").save(tmp_path)
    loaded = Predictor.load(tmp_path)
    total = [one.means["total"] for one in loaded.predict(images)]
    np.testing.assert_allclose(np.quantile(total, [0, 0.5, 1]), [loaded.card.quantiles[k] for k in (0, 50, 100)])


def test_flags_are_those_less_sure_than_validation(tmp_path):
    for i in range(4):
        write_image(tmp_path / "in" / f"{i}.png", 9, 9, i)
    one = plain()
    scores = np.array([found.means["total"] for found in one.predict(tmp_path / "in")])
    quantiles = np.linspace(scores.min() - 1e-6, scores.max() + 1e-6, 101)
    one = Predictor(one.model, one.card.model_copy(update={"quantiles": tuple(quantiles)}))
    table = predict.predict_folder(one, tmp_path / "in", tmp_path / "out", flag=0.5)
    np.testing.assert_array_equal(table["flag"], scores > quantiles[50])
    assert "distance" not in table


@pytest.mark.parametrize(("task", "outputs"), [("multi-class", 3), ("segmentation", 1)])
def test_images_far_from_the_training_images_are_unlike(task, outputs, tmp_path):
    for i in range(4):
        write_image(tmp_path / "in" / f"{i}.png", 9, 9, i)
    one = plain(task, outputs, distance_quantiles=[2.0] * 101)
    features = Features(one.model)(np.stack([one.read(tmp_path / "in" / f"{i}.png")[0] for i in range(4)]))
    means = np.stack([features[0], features[0] + 9])
    training = {"means": means, "precision": np.eye(features.shape[1]) * 4}
    one = Predictor(one.model, one.card, training)
    one.save(tmp_path / "network")
    table = predict.predict_folder(sbn_tf.load(tmp_path / "network"), tmp_path / "in", tmp_path / "out")
    expected = np.minimum(*(2 * np.linalg.norm(features - mean, axis=1) for mean in means))
    np.testing.assert_allclose(table["distance"], expected, rtol=1e-4, atol=1e-5)
    np.testing.assert_array_equal(table["unlike"], expected > 2)
    (tmp_path / "network" / "training_features.npz").unlink()
    with pytest.raises(ValueError, match="Run `sbn-tf train` again"):
        sbn_tf.load(tmp_path / "network")


@pytest.mark.parametrize(("task", "outputs"), [("multi-label", 3), ("binary", 1), ("multi-class", 3), ("ordinal", 3)])
def test_labels(task, outputs, tmp_path):
    write_image(tmp_path / "in" / "a.png", 9, 12, 0)
    one = plain(task, outputs)
    probs = one.model.predict(one.read(tmp_path / "in" / "a.png")[0][None], verbose=0)[0]
    row = predict.predict_folder(one, tmp_path / "in", tmp_path / "out").iloc[0]
    np.testing.assert_allclose([row[f"p_c{i}"] for i in range(outputs)], probs, rtol=1e-5)
    exclusive = task in ("multi-class", "ordinal")
    above = [f"c{i}" for i in range(outputs) if probs[i] > 0.5]
    nothing = "not c0" if task == "binary" else "none"
    assert row["prediction"] == (f"c{np.argmax(probs)}" if exclusive else ";".join(above) or nothing)
    entropy = entr(probs).sum() if exclusive else np.mean(entr(probs) + entr(1 - probs))
    np.testing.assert_allclose([row["total"], row["aleatoric"], row["epistemic"]], [entropy, entropy, 0], atol=1e-6)


def test_compare_of_a_trained_folder_reads_what_was_trained_there(places, capsys, monkeypatch):
    monkeypatch.setattr(scoring, "score", lambda *args, **options: pytest.fail("scored again"))
    monkeypatch.setattr(keras.Model, "fit", lambda *args, **options: pytest.fail("trained again"))
    before = {path: path.stat().st_mtime_ns for path in places.rglob("*.json")}
    with tiny_networks():
        assert main(["compare", str(places / "network")]) == 0
    assert {path: path.stat().st_mtime_ns for path in places.rglob("*.json")} == before
    frame = pd.read_csv(places / "network" / "results.csv")
    (dice,) = frame.loc[(frame["method"] == "members") & (frame["metric"] == "dice"), "value"]
    row = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("| members"))
    assert f" {dice:.3f}" in row


def test_what_cannot_be_done_is_said(places, network, tmp_path, capsys):
    net, new = str(places / "network"), str(places / "new")

    def refused(arguments, *says):
        assert main(arguments) == 2
        said = capsys.readouterr().err
        assert all(text in said for text in says) and said.count("\n") <= 2, said

    (tmp_path / "empty").mkdir()
    refused(["predict", net, str(tmp_path / "empty"), "--out", str(tmp_path / "o")], "Expected images", "none")
    refused(["predict", net, str(tmp_path / "gone"), "--out", str(tmp_path / "o")], "not there")
    refused(["predict", new, new, "--out", str(tmp_path / "o")], "Expected a folder of `sbn-tf train`")
    refused(["predict", net, new, "--out", str(places / "data")], "Expected --out, an empty folder")
    refused(["predict", net, new, "--out", "/proc/o"], "a folder that can be written")
    refused(["train", str(places / "data"), "--size", "16", "--out", "/proc/o"], "a folder that can be written")
    refused(["predict", net, new, "--out", str(places / "new" / "results")], "outside of the images")
    refused(["train", "phantom_nodule", "--out", str(tmp_path / "o")], "a folder with images.csv")
    refused(["predict", net, new, "--out", str(tmp_path / "o"), "--flag", "2"], "flag")
    refused(["predict", net, new, "--out", str(tmp_path / "o"), "--masks", "9"], "masks")
    refused(["train", new, "--out", str(tmp_path / "o")], "images.csv")
    refused(["train", str(places / "data"), "--out", str(places / "data" / "images.csv")], "--out, a folder")
    refused(["train", str(places / "data"), "--size", "16", "--out", net], "begun with", "'quick'", "'sbn'")
    refused(["train", str(places / "data"), "--size", "16", "--out", new], "Expected --out, an empty folder")
    refused(["compare", net, "--recipe", "quick"], "the settings of", "--recipe")
    for wrong in (["--network", "unet_smal"], ["--seed", "-1"], ["--rivals", "bogus"]):  # a typo locks no folder
        assert main(["train", str(places / "data"), "--size", "16", "--out", str(tmp_path / "typo"), *wrong]) == 2
        assert not (tmp_path / "typo").exists() and capsys.readouterr().err
    (tmp_path / "theirs").mkdir()
    for text in ("[1]", '{"a": 1}', "{"):
        (tmp_path / "theirs" / "training.json").write_text(text)
        refused(["compare", str(tmp_path / "theirs")], "training.json", "another file")
        refused(["train", str(places / "data"), "--size", "16", "--out", str(tmp_path / "theirs")], "--out")
    assert main(["predict", net, new, "--out", str(tmp_path / "o")]) == 0
    refused(["predict", net, new, "--out", str(tmp_path / "o"), "--flag", "0.2"], "begun with")
    for broken, says in ((np.zeros((4, 4), "float32"), "uint8"), (np.zeros((4, 4, 2), "uint8"), "1 or 3")):
        with pytest.raises(ValueError, match=says):
            network.predict([broken])
    with pytest.raises(ValueError, match=r"image\[None\]"):  # one colour image, or four grey ones of width 3?
        network.predict(np.zeros((4, 4, 3), "uint8"))
    with pytest.raises(ValueError, match="no options"):
        sbn_tf.load(net, compile=True)


def test_a_recipe_with_flips_predicts_from_eight_turns(places, tmp_path):
    out, arguments = tmp_path / "network", ["--size", "16", "--network", "tiny_masks", "--epochs", "1"]
    with tiny_networks():
        assert main(["train", str(places / "data"), "--out", str(out), *arguments, "--bayes-epochs", "1"]) == 0
    begun = json.loads((out / "training.json").read_text())
    assert begun["method"] == "turned" and begun["fields"]["augment"] == "flips_and_quarter_turns"
    network = sbn_tf.load(out)
    assert network.card.turned and network.card.num_samples == 8
    x = np.random.default_rng(0).normal(size=(2, 16, 16, 1)).astype("float32")
    drawn = network.model.predict(x[:, :, ::-1], verbose=0)[..., 0][:, :, ::-1]  # sample 1 sees a mirror image
    plain_card = network.with_card(temperature=1.0)
    np.testing.assert_allclose(plain_card.samples(x)[1], drawn, atol=1e-6)


@pytest.mark.parametrize("name", ["model.keras", "network.json"])
def test_a_damaged_network_is_refused(places, tmp_path, name):
    shutil.copytree(places / "network", tmp_path / "network", ignore=shutil.ignore_patterns("runs"))
    path = tmp_path / "network" / name
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(bytes(content))
    with pytest.raises(ValueError, match="Expected a folder of `sbn-tf train`"):
        sbn_tf.load(tmp_path / "network")


def test_a_card_of_another_network_is_refused():
    with pytest.raises(ValueError, match="as its card says"):
        Predictor(plain().model, NetworkCard.model_validate({**CARD, "size": 9}))


def test_the_endings_are_those_of_the_formats():
    registered = Image.registered_extensions()
    assert {registered[ending] for ending in image_files.ENDINGS} == set(image_files.FORMATS)


def test_results_are_those_of_compare(places):
    table = pd.read_csv(places / "network" / "results.csv")
    run = next((places / "network" / "runs").rglob("members/*/*/metrics.json"))
    stored = json.loads(run.read_text())["metrics"]["nll"]
    found = table[(table["method"] == "members") & (table["metric"] == "nll")]["value"]
    np.testing.assert_allclose(found, [stored])


def test_the_report_has_the_numbers_of_the_test_images(places, network):
    """The page's Dice and NLL are those of the network without its temperature, found from the files by hand."""
    test = datasets.load(str(places / "data"), size=16).test
    probs = Predictor(network.model, network.card.model_copy(update={"temperature": 1.0})).samples(test.normalised())
    mean, truth = probs.astype("float64").mean(0), test.targets[..., 0] > 0
    marked = mean > 0.5
    dice = 2 * (marked & truth).sum((1, 2)) / (marked.sum((1, 2)) + truth.sum((1, 2)))
    nll = -np.log(np.where(truth, mean, 1 - mean)).mean()
    page = (places / "network" / "report.html").read_text("utf-8")
    row = page.split("<td>ours (members)</td>")[1].split("</tr>")[0]
    shown = [float(number) for number in re.findall(r"<td>(\d+\.\d+)", row)]
    np.testing.assert_allclose(shown[:2], [dice.mean(), nll], atol=6e-3)
    assert (
        page.count("data:image/png;base64,") == 2 + 2 * 3 * 4
    )  # two charts, and four pictures of each of three images
