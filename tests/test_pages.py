"""The pages of `sbn-tf train` and `sbn-tf predict`: their numbers, their words, and what a page must not let in."""

import base64
import errno
import io
import re
from html.parser import HTMLParser
from types import SimpleNamespace

import keras
import numpy as np
import pandas as pd
import pytest
from PIL import Image

from sbn_tf import datasets
from sbn_tf.core import files
from sbn_tf.datasets.image_files import image_files
from sbn_tf.experiments import pages, prediction_page, recipes, results, scoring, training_page
from sbn_tf.experiments.experiment import Experiment
from sbn_tf.experiments.guarantees import Calibration
from sbn_tf.experiments.predictor import NetworkCard, Predictor
from sbn_tf.experiments.result import Result, write

CLASSES = ("a", "b", "c")
EVIL = "<script>alert(1)</script>.png"


class Page(HTMLParser):
    """Texts of a page's tables, by the id above them, and its other texts, tags and pictures."""

    def __init__(self, text):
        super().__init__()
        self.tables, self.pictures, self.tags, self.text, self._id, self._open = {}, [], [], "", "", False
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        attrs = dict(attrs)
        self.tags.append(tag)
        self._id = attrs.get("id", self._id)
        if tag == "img":
            self.pictures.append(attrs["src"])
        if tag == "tr":
            self.tables.setdefault(self._id, []).append([])
        self._open = tag in ("td", "th")
        if self._open:
            self.tables[self._id][-1].append("")

    def handle_endtag(self, tag):
        self._open = self._open and tag not in ("td", "th")

    def handle_data(self, data):
        self.text += data
        if self._open:
            self.tables[self._id][-1][-1] += data


def page_of(path):
    text = path.read_text("utf-8")
    assert not re.search(r'(src|href|url)\s*[=(]\s*"?(http|//|/)', text)  # nothing is fetched
    return Page(text)


def opened(source):
    return Image.open(io.BytesIO(base64.b64decode(source.removeprefix("data:image/png;base64,"))))


# ---- training


def probabilities(targets, weight, seed):
    """Probabilities of classes (1, images, classes) that know the targets by so much."""
    logits = np.random.default_rng(seed).normal(size=targets.shape) + weight * targets
    return keras.ops.convert_to_numpy(keras.ops.softmax(logits.astype("float32")))[None]


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Settings, predictor and frame of three classes with patients, as a training gives them; nothing is trained."""
    rng, place = np.random.default_rng(0), tmp_path_factory.mktemp("runs")
    arrays, patients = [], []
    for part, number in enumerate((60, 30, 90)):
        labels = np.eye(3, dtype="uint8")[rng.integers(0, 3, number)]
        arrays.append((rng.integers(0, 256, (number, 8, 8, 1), "uint8"), labels))
        patients.append(np.array([f"p{part}_{i // 3}" for i in range(number)]))
    data = datasets.from_arrays(*arrays, task="multi-class", classes=CLASSES, patients=patients)
    settings = Experiment(data, recipes.recipe_for("quick", data.card), "mlp", runs=place, shifts={})
    test, rows = data.test, []
    known = {"members": 2.5, "deterministic_longer": 0.8, "budget_2": 2.5, "trivial_prevalence": 0.0}
    for seed, (method, weight) in enumerate(known.items()):
        evaluator = scoring.Evaluator("multi-class", train_prevalence=settings.prevalence())
        evaluator.update(probabilities(test.targets, weight, seed % 3), test.targets, groups=test.groups)
        record = evaluator.record()
        metrics = record.metrics()
        undefined, intervals = metrics.pop("undefined"), record.bootstrap(200)
        row = Result(
            dataset=data.card.name,
            task="multi-class",
            method=method,
            title=f"title of {method}",
            seed=None if method.startswith("trivial") else 0,
            recipe="quick",
            network="mlp",
            size=8,
            normalisation="train",
            num_train=60,
            num_val=30,
            num_test=90,
            metrics=metrics,
            undefined=undefined,
            intervals={key: list(bounds) for key, bounds in intervals.items() if key in metrics},
            evaluation={"num_resamples": 200},
        )
        write(row, place / method, record)
        rows.append(row)
    keras.utils.set_random_seed(0)
    model = keras.Sequential([keras.Input((8, 8, 1)), keras.layers.Flatten(), keras.layers.Dense(3, "softmax")])
    quantiles = dict.fromkeys(("quantiles", "aleatoric_quantiles", "epistemic_quantiles"), np.linspace(0, 1, 101))
    card = {"dataset": "d", "method": "m", "task": "multi-class", "classes": CLASSES, "size": 8, "channels": 1}
    card |= {"fit": "pad", "mean": data.mean.tolist(), "sd": data.sd.tolist(), "threshold": 0.5, "num_samples": 1}
    card |= {"temperature": 2.0, **{key: value.tolist() for key, value in quantiles.items()}}
    return SimpleNamespace(
        settings=settings,
        predictor=Predictor(model, NetworkCard.model_validate(card)),
        frame=results.frame(rows),
        records={method: row.record() for method, row in zip(known, rows, strict=True)},
    )


@pytest.fixture(scope="module")
def training(trained, tmp_path_factory):
    path = tmp_path_factory.mktemp("page") / "report.html"
    training_page.write_training_page(path, trained.settings, trained.predictor, trained.frame, "members")
    return page_of(path)


def test_the_page_has_the_numbers_of_the_frame(trained, training):
    header, *rows = training.tables["scores"]
    assert header == ["method", "auc", "accuracy", "nll", "brier", "ece"]
    names = [
        "ours (members)",
        "plain network, the epochs of both steps",
        "title of budget_2",
        "title of trivial_prevalence",
    ]
    assert [row[0] for row in rows] == names
    for row, method in zip(rows, trained.records, strict=True):
        for key, cell in zip(header[1:], row[1:], strict=True):
            of = trained.frame[(trained.frame["method"] == method) & (trained.frame["metric"] == key)].iloc[0]
            value, low, high = (float(number) for number in re.findall(r"\d+\.\d+", cell))
            np.testing.assert_allclose([value, low, high], [of["value"], of["low"], of["high"]], atol=6e-3)


def test_differences_are_those_of_the_paired_test(trained, training):
    header, *rows = training.tables["against"]
    ours = trained.records["members"]
    for row, method in zip(rows, ("deterministic_longer", "budget_2", "trivial_prevalence"), strict=True):
        test = scoring.compare(ours, trained.records[method], num_resamples=200)
        for key, cell in zip(header[1:], row[1:], strict=True):
            numbers = [float(number) for number in re.findall(r"[+-]\d+\.\d+", cell)]
            expected = [test[key]["difference"], test[key]["low"], test[key]["high"]]
            np.testing.assert_allclose(numbers, expected, atol=6e-4)


def test_the_verdict_says_what_the_tests_say(trained, training):
    assert "Better than a plain network trained for as many epochs in auc, accuracy, nll, brier" in training.text
    assert "Against title of budget_2: auc" in training.text  # rows of the same budget, where there are some
    assert "better than every predictor that ignores the image in auc, accuracy, nll, brier" in training.text
    worse = training_page.titled(trained.frame, "deterministic_longer")
    worse["method"] = worse["method"].replace({"members": "deterministic_longer", "deterministic_longer": "members"})
    ours = training_page.label_of(worse, "members")
    found = training_page.verdict(worse, ours, training_page.against(worse, ours, ("accuracy", "nll")))
    assert found["kind"] == "worse" and "Worse than a plain network trained for as many epochs" in found["headline"]


def test_the_verdict_compares_with_the_plain_network_s_own_turns(trained):
    frame = training_page.titled(trained.frame, "members")
    frame["label"] = frame["label"].astype(str)

    def found(method):
        """The verdict where the plain network's turns predict as another method does."""
        turned = frame[frame["method"] == method].assign(method="turned", label="its turns")
        both = pd.concat([frame, turned], ignore_index=True)
        both["label"] = both["label"].astype("category")
        ours = training_page.label_of(both, "members")
        return training_page.verdict(both, ours, training_page.against(both, ours, ("accuracy", "nll")))

    alike, worse = found("members"), found("deterministic_longer")
    assert alike["kind"] == "" and alike["headline"].startswith("Better than a plain network")
    assert alike["headline"].endswith(
        "No difference can be seen from the plain network of step 1 in eight flips and turns."
    )
    assert worse["kind"] == "better" and "flips and turns" not in worse["headline"]
    assert any(sentence.startswith("Against its turns: accuracy") for sentence in worse["sentences"])


def test_a_network_no_better_than_the_training_frequencies_is_not_to_be_used(trained):
    frame = training_page.titled(trained.frame, "members")
    frame["method"] = frame["method"].replace({"members": "trivial_x", "trivial_prevalence": "members"})
    ours = training_page.label_of(frame, "members")
    found = training_page.verdict(frame, ours, training_page.against(frame, ours, ("accuracy", "nll", "ece")))
    assert found["kind"] == "worse" and found["headline"].startswith("Do not use it")


def test_patients_pictures_and_the_temperature(trained, training):
    split, predictor = trained.settings.data.test, trained.predictor
    probs = predictor.samples(split.normalised())[0]
    wrong = probs.argmax(1) != split.targets.argmax(1)
    _, *rows = training.tables["patients"]
    assert len(rows) == 30
    for patient, images, error, _ in rows:
        of = split.groups == patient
        assert int(images) == of.sum() and np.isclose(float(error), wrong[of].mean(), atol=6e-4)
    assert [float(row[2]) for row in rows] == sorted([float(row[2]) for row in rows], reverse=True)
    assert "by a temperature of 2.000" in training.text and len(training.pictures) == 2 + 6 + 6
    entropy = -(probs * np.log(probs)).sum(1)
    shown = [float(number) for number in re.findall(r"uncertainty (\d\.\d+) nats", training.text)]
    np.testing.assert_allclose(shown[:6], np.sort(entropy)[::-1][:6], atol=6e-4)
    assert opened(training.pictures[2]).size == (8, 8)


# ---- prediction


def predicted(folder, names, **columns):
    """A folder of images and the table that `predict` would write of them."""
    for number, name in enumerate(names):
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.full((400, 300, 3), 5 * number, "uint8")).save(path, "PNG")
    total = np.linspace(0.01, 0.99, len(names))
    content = {"image": names, "prediction": "a", "confidence": 0.5, "total": total, "aleatoric": total / 4}
    return pd.DataFrame(content | {"epistemic": 3 * total / 4, "flag": total > 0.9} | columns)


def test_the_prediction_page_says_what_is_flagged_and_why(trained, tmp_path):
    names = [f"{i:02}.png" for i in range(40)]
    table = predicted(tmp_path / "in", names)
    card = trained.predictor.card.model_copy(update={"num_samples": 5, "aleatoric_quantiles": tuple(np.arange(101.0))})
    skipped = pd.DataFrame([("x.png", "truncated")], columns=["image", "reason"])
    path = tmp_path / "report.html"
    network = Predictor(trained.predictor.model, card)
    prediction_page.write_prediction_page(path, network, image_files(tmp_path / "in"), tmp_path, table, skipped, 0.1)
    page = page_of(path)
    assert "40 images: 4 flagged, 1 skipped." in page.text and "10 % are flagged" in page.text
    _, *rows = page.tables["flagged"]
    assert [row[0] for row in rows] == names[:-5:-1]  # the least certain first
    # 0.99 is between the 98 % and the 99 % quantile of 0, 0.01, ... 1, and 0.74 above 74 of them.
    assert rows[0][2:] == ["0.990 nats, above 98 %", "epistemic, above 74 %; aleatoric above 0 %"]
    assert page.tables["skipped"][1:] == [["x.png", "truncated"]]
    assert "how far these views disagree" not in page.text and "too few for flags" not in page.text
    few = Calibration(unit="images", num=5, owners=range(5), total=[0.1] * 5, error=[False] * 5)
    turned = Predictor(trained.predictor.model, card.model_copy(update={"turned": True, "calibration": few}))
    other = tmp_path / "turned.html"
    prediction_page.write_prediction_page(other, turned, image_files(tmp_path / "in"), tmp_path, table, skipped, 0.1)
    assert "how far these views disagree" in page_of(other).text
    assert "5 validation images: too few for flags" in page_of(other).text
    assert len(page.pictures) == 12 and max(opened(page.pictures[0]).size) == pages.SIDE


def test_shares_of_validation_by_hand():
    quantiles = tuple(np.linspace(0, 1, 101))
    assert [prediction_page.share_below(quantiles, value) for value in (-1.0, 0.0, 0.505, 1.0, 2.0)] == [
        0,
        0,
        50,
        99,
        100,
    ]


def test_names_cannot_break_the_page(trained, tmp_path):
    table = predicted(tmp_path / "in", ["\u00e9 1.png", "two \"'&.png"])  # the first composed, as `listed` gives it
    (tmp_path / "in" / "\u00e9 1.png").rename(tmp_path / "in" / "e\u0301 1.png")  # and decomposed on the disk
    table.loc[2] = [EVIL, *table.loc[1].tolist()[1:]]
    table["flag"] = True
    skipped = pd.DataFrame([("not utf-8 \udcff.png", "<b>bad</b>")], columns=["image", "reason"])
    path = tmp_path / "report.html"
    prediction_page.write_prediction_page(
        path, trained.predictor, image_files(tmp_path / "in"), tmp_path, table, skipped, 0.1
    )
    page = page_of(path)
    assert "script" not in page.tags and "b" not in page.tags
    assert EVIL in [row[0] for row in page.tables["flagged"]]
    assert page.tables["skipped"][1][1] == "<b>bad</b>" and len(page.pictures) == 2


def test_nothing_predicted_is_a_page_too(trained, tmp_path):
    predicted(tmp_path / "in", ["a.png"])
    skipped = pd.DataFrame([("a.png", "broken")], columns=["image", "reason"])
    path = tmp_path / "report.html"
    prediction_page.write_prediction_page(
        path, trained.predictor, image_files(tmp_path / "in"), tmp_path, pd.DataFrame(), skipped, 0.1
    )
    page = page_of(path)
    assert "0 images: 0 flagged, 1 skipped." in page.text and "flagged" not in page.tables


@pytest.mark.parametrize("failure", [KeyboardInterrupt(), OSError(errno.ENOSPC, "No space left on device")])
def test_a_full_disk_or_an_interruption_leaves_no_half_page(failure, tmp_path, monkeypatch):
    content = {"title": "t", "headline": "first", "sentences": [], "limit": "", "unsure": [], "legend": ""}
    content |= {name: {"columns": [], "rows": [], "notes": []} for name in ("flagged", "skipped", "settings")}
    path = tmp_path / "report.html"
    pages.write_page(path, "prediction.html", **content)
    before = path.read_text()

    def failing(file):
        raise failure

    monkeypatch.setattr(files.os, "fsync", failing)
    with pytest.raises(type(failure)):
        pages.write_page(path, "prediction.html", **content | {"headline": "second"})
    assert path.read_text() == before and [one.name for one in tmp_path.iterdir()] == ["report.html"]


def test_colours_of_masks_and_maps():
    image = np.full((1, 4, 1), 100, "uint8")
    mask, truth = np.array([[1, 1, 0, 0]]) > 0, np.array([[1, 0, 1, 0]]) > 0
    hit, alarm, miss, none = pages.marked(image, mask, truth)[0].astype(int)
    assert hit.argmax() == 1 and alarm.argmax() == 2 and miss.argmax() == 0 and none.tolist() == [100] * 3
    low, high = pages.heat(np.array([[0, np.log(2)]]))[0].tolist()
    assert low == [68, 1, 84] and high == [253, 231, 37]  # the ends of viridis


@pytest.mark.parametrize("mode", ["I;16", "L"])
def test_a_picture_of_16_bits_is_as_bright_as_one_of_8(mode, tmp_path):
    eight = np.arange(256, dtype="uint8").reshape(16, 16)
    pixels = eight if mode == "L" else eight.astype("uint16") * 257
    Image.fromarray(pixels).save(tmp_path / "a.png")
    np.testing.assert_array_equal(prediction_page._small(tmp_path / "a.png", "L"), eight)
