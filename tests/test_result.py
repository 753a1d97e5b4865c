"""The result of one run: what is written is read, and what is wrong is refused."""

import hashlib
import json
import math

import numpy as np
import pytest
from helpers import METRICS_OF_MASKS, of_task, record_of, whole_result
from helpers import mask_result as result

from sbn_tf.datasets.base import BINARY, MULTI_CLASS, MULTI_LABEL, ORDINAL, SEGMENTATION
from sbn_tf.experiments import folders, scoring
from sbn_tf.experiments.result import KEYS, read, write
from sbn_tf.metrics import METRICS

RNG = np.random.default_rng(0)


def test_what_is_written_is_read(tmp_path):
    written = whole_result()
    path = write(written, tmp_path / "seed0" / "abc")
    assert path == tmp_path / "seed0" / "abc" / "metrics.json"
    for place in (path, path.parent, str(path)):
        found = read(place)
        assert found == written and found.folder == path.parent
    assert set(found.versions) >= {"sbn_tf", "keras", "tensorflow"} and found.threads == folders.threads()
    assert [one.name for one in path.parent.iterdir()] == ["metrics.json"]
    assert found.record() is None


def test_the_record_lies_beside_it(tmp_path):
    probs, targets = RNG.random((2, 20, 3)), RNG.random((20, 3)) > 0.5
    made = result()
    write(made, tmp_path, record_of(probs, targets))
    assert sorted(one.name for one in tmp_path.iterdir()) == ["metrics.json", "record.npz"]
    assert read(tmp_path).record().metrics()["brier"] == pytest.approx(np.square(probs.mean(0) - targets).mean())
    write(result(), tmp_path)  # another result without a record: the old one is not left beside it
    assert [one.name for one in tmp_path.iterdir()] == ["metrics.json"]


def test_interrupted_there_is_no_result(tmp_path):
    class Interrupted:
        def save(self, path):
            raise KeyboardInterrupt

    write(result(), tmp_path)
    with pytest.raises(KeyboardInterrupt):
        write(result(metrics={"dice": 0.9}), tmp_path, Interrupted())
    assert not (tmp_path / "metrics.json").exists()


BAD = {
    "nan": ({"metrics": {"dice": math.nan}}, r"a finite number as metrics\['dice'\]"),
    "infinite": ({"metrics": {"nll": math.inf}}, r"a finite number as metrics\['nll'\]"),
    "none": ({"metrics": {"nll": None}}, r"metrics\['nll'\]"),
    "text": ({"metrics": {"nll": "0.1"}}, r"metrics\['nll'\]"),
    "bool": ({"metrics": {"dice": True}}, r"metrics\['dice'\]"),
    "too high": ({"metrics": {"dice": 1.1}}, r"in 0..1 as metrics\['dice'\]"),
    "too low": ({"metrics": {"nll": -0.1}}, r"metrics\['nll'\]"),
    "skill above 1": ({"metrics": {"brier_skill": 1.2}}, r"a finite number <= 1 as metrics\['brier_skill'\]"),
    "unknown metric": ({"metrics": {"f2": 0.1}}, "a key of METRICS as metrics"),
    "interval turned round": ({"intervals": {"dice": [0.9, 0.7]}}, r"low <= high as intervals\['dice'\]"),
    "interval of one": ({"intervals": {"dice": [0.9]}}, r"intervals\['dice'\]"),
    "interval nan": ({"intervals": {"dice": [math.nan, 0.9]}}, r"intervals\['dice'\]"),
    "interval out of range": ({"intervals": {"dice": [0.9, 1.2]}}, r"intervals\['dice'\]"),
    "interval of nothing": ({"intervals": {"ged": [0.1, 0.2]}}, "a key of the metrics as intervals"),
    "no reason": ({"undefined": {"ged": ""}}, r"a text that is not empty as undefined\['ged'\]"),
    "value and reason": ({"undefined": {"dice": "why"}}, r"not both, as undefined\['dice'\]"),
    "cost unknown": ({"cost": {"euros": 1}}, "a key of COSTS as cost"),
    "cost negative": ({"cost": {"train_flops": -1.0}}, r"cost\['train_flops'\]"),
    "cost nan": ({"cost": {"train_flops": math.nan}}, r"cost\['train_flops'\]"),
    "shift": ({"shift": {"noise": {"entropy": 1.2}}}, r"an AUROC in 0..1, or None, as shift\['noise'\]\['entropy'\]"),
    "shift flat": ({"shift": {"noise": 0.7}}, r"a dict as shift\['noise'\]"),
    "setting nan": ({"settings": {"a": [1, {"b": math.nan}]}}, r"settings\['a'\]\[1\]\['b'\]"),
    "selection": ({"selection": {"temperature": math.inf}}, r"selection\['temperature'\]"),
    "task": ({"task": "regression"}, "one of .* as task"),
    "seed negative": ({"seed": -1}, "greater than or equal to 0 as seed"),
    "seed bool": ({"seed": True}, "as seed"),
    "r_bayes": ({"r_bayes": 1.3}, "less than or equal to 1 as r_bayes"),
    "no images": ({"num_test": 0}, "greater than or equal to 1 as num_test"),
    "size float": ({"size": 32.0}, "as size"),
    "no name": ({"method": ""}, "a text that is not empty as method"),
    "metrics a list": ({"undefined": []}, "a dict as undefined"),
}


@pytest.mark.parametrize("name", BAD)
def test_refused_on_write_and_on_read(name, tmp_path):
    changes, message = BAD[name]
    with pytest.raises(ValueError, match=message) as raised:
        write(result(**changes), tmp_path / "new")
    assert str(raised.value).count("\n") <= 1 and "Received: " in str(raised.value)
    assert not (tmp_path / "new").exists()
    made = result()
    for field, value in changes.items():  # changed after it was made
        setattr(made, field, METRICS_OF_MASKS | value if field == "metrics" else value)
    with pytest.raises(ValueError, match=message):
        write(made, tmp_path / "new")
    path = write(result(), tmp_path)
    content = json.loads(path.read_text())
    metrics = content["metrics"] | changes.get("metrics", {})
    del content["sha256"]  # as of a file that was made by hand
    path.write_text(json.dumps({**content, **changes, "metrics": metrics}))
    with pytest.raises(ValueError, match=message) as raised:
        read(path)
    assert str(path) in str(raised.value) and "Delete it" in str(raised.value)


@pytest.mark.parametrize(("task", "key"), [(SEGMENTATION, "dice"), (MULTI_LABEL, "auc"), (ORDINAL, "accuracy")])
def test_a_metric_that_the_task_needs_has_a_value_or_a_reason(task, key, tmp_path):
    metrics = {"auc": 0.7, "accuracy": 0.8, **METRICS_OF_MASKS}
    del metrics[key]
    with pytest.raises(ValueError, match=rf"a value, or a reason in undefined, as metrics\['{key}'\]"):
        write(of_task(task, metrics, {}), tmp_path)
    undefined = {key: "no label occurs as both 0 and 1"}
    write(of_task(task, metrics, undefined), tmp_path)
    assert read(tmp_path).undefined == undefined


def test_numbers_that_json_does_not_know_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"Expected plain numbers.*float32"):
        write(result(settings={"rate": np.float32(0.5)}), tmp_path)
    write(result(metrics={"dice": np.float64(0.5)}), tmp_path)
    assert read(tmp_path).metrics["dice"] == 0.5


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "Received: metrics.json is not JSON"),
        ('{"format": 1', "Received: metrics.json is not JSON"),
        ("[1]", "Received: metrics.json has a list instead of fields"),
        ("{}", "Expected format 3 .* Received: 'none'"),
        ('{"format": 99}', "Expected format 3 .* Received: 99"),
        ('{"format": 3, "task": "binary"}', "Received: without .*'dataset'"),
    ],
)
def test_files_that_are_no_results(text, message, tmp_path):
    path = tmp_path / "metrics.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=message) as raised:
        read(path)
    assert str(path) in str(raised.value) and str(raised.value).count("\n") <= 1


def test_a_file_that_is_not_text_or_not_there(tmp_path):
    (tmp_path / "metrics.json").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ValueError, match=r"metrics\.json is not JSON"):
        read(tmp_path)
    with pytest.raises(FileNotFoundError):
        read(tmp_path / "nowhere.json")


def test_a_number_that_was_changed_is_refused(tmp_path):
    path = write(whole_result(), tmp_path)
    whole = path.read_text()
    fields = json.loads(whole)
    plain = json.dumps({key: value for key, value in fields.items() if key != "sha256"}, sort_keys=True)
    assert fields["sha256"] == hashlib.sha256(plain.encode()).hexdigest()  # by its definition
    name = whole.index('"sha256"')
    digits = [place for place, letter in enumerate(whole) if letter.isdigit() and not name < place < name + 8]
    for place in digits[:: len(digits) // 40]:
        path.write_text(whole[:place] + str((int(whole[place]) + 1) % 10) + whole[place + 1 :])
        with pytest.raises(
            ValueError, match=r"Expected a whole result in .*metrics\.json (was changed|is not JSON).*Delete it"
        ):
            read(path)
    path.write_text(json.dumps(fields))  # other spaces are no other numbers
    assert read(path).metrics == fields["metrics"]


def test_an_unknown_field_is_refused(tmp_path):
    path = write(result(), tmp_path)
    content = json.loads(path.read_text())
    del content["sha256"]
    path.write_text(json.dumps({**content, "colour": "red"}))
    with pytest.raises(ValueError, match=r"with unknown \['colour'\]"):
        read(path)


# ---- definitions


def small(task, num_samples=3):
    if task == SEGMENTATION:
        return RNG.random((num_samples, 4, 6, 6)), (RNG.random((4, 6, 6, 2)) > 0.5).astype("uint8")
    probs, targets = RNG.random((num_samples, 12, 3)), (RNG.random((12, 3)) > 0.5).astype("uint8")
    if task in (MULTI_CLASS, ORDINAL):
        return probs / probs.sum(-1, keepdims=True), np.eye(3, dtype="uint8")[np.arange(12) % 3]
    return (probs[..., :1], targets[:, :1]) if task == BINARY else (probs, targets)


@pytest.mark.parametrize("num_samples", [1, 3])
@pytest.mark.parametrize("task", [BINARY, MULTI_LABEL, MULTI_CLASS, ORDINAL, SEGMENTATION])
def test_every_number_of_the_evaluation_is_known_and_in_its_range(task, num_samples, tmp_path):
    probs, targets = small(task, num_samples)
    metrics = scoring.evaluate(probs, targets, task, train_prevalence=0.3)
    undefined = metrics.pop("undefined")
    assert set(metrics) | set(undefined) <= set(METRICS)
    write(of_task(task, metrics, undefined), tmp_path)
    assert read(tmp_path).metrics == metrics
    assert set(KEYS[task]) <= set(METRICS)
