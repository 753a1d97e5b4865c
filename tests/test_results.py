"""Results: what is written is read, what is wrong is refused, and the table says what the files say."""

import json
import math

import numpy as np
import pytest
from helpers import METRICS_OF_MASKS
from helpers import mask_result as result

from sbn_tf.datasets.base import BINARY, MULTI_CLASS, MULTI_LABEL, ORDINAL, SEGMENTATION
from sbn_tf.experiments import results, scoring
from sbn_tf.experiments.results import METRICS, Result, cost_table, describe_metrics, find, group, read, table, write

RNG = np.random.default_rng(0)


def of_task(task, metrics, undefined, method="partial"):
    """A result of `evaluation`'s numbers."""
    return Result(**{**vars(result(method)), "task": task, "metrics": metrics, "undefined": undefined})


def whole_result():
    """A result with something in every field."""
    return result(
        r_bayes=0.01,
        settings={"epochs": 3, "betas": [0.2, 0.01], "augment": None},
        options={"fold": 2},
        limit=100,
        leak="slices of one patient in two splits",
        num_groups=3,
        num_samples=5,
        threshold=0.4,
        selection={"temperature": 1.31},
        intervals={"dice": [0.75, 0.85]},
        shift={"noise": {"severity": 2.0, "entropy": 0.7, "mutual_information": None}},
        cost={"num_trainable": 1000, "train_flops_ratio": 2.5, "train_seconds": None},
    )


def record_of(probs, targets):
    evaluator = scoring.Evaluator(MULTI_LABEL)
    evaluator.update(probs, targets)
    return evaluator.record()


# ---- files


def test_what_is_written_is_read(tmp_path):
    written = whole_result()
    path = write(written, tmp_path / "seed0" / "abc")
    assert path == tmp_path / "seed0" / "abc" / "metrics.json"
    for place in (path, path.parent, str(path)):
        found = read(place)
        assert found == written and found.folder == path.parent
    assert set(found.versions) >= {"sbn_tf", "keras", "tensorflow"}
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
    "nan": ({"metrics": {"dice": math.nan}}, r"a finite number in 0..1 as metrics\['dice'\]"),
    "infinite": ({"metrics": {"nll": math.inf}}, r"a finite number >= 0 as metrics\['nll'\]"),
    "none": ({"metrics": {"nll": None}}, r"metrics\['nll'\]"),
    "text": ({"metrics": {"nll": "0.1"}}, r"metrics\['nll'\]"),
    "bool": ({"metrics": {"dice": True}}, r"metrics\['dice'\]"),
    "too high": ({"metrics": {"dice": 1.1}}, r"in 0..1 as metrics\['dice'\]"),
    "too low": ({"metrics": {"nll": -0.1}}, r"metrics\['nll'\]"),
    "skill above 1": ({"metrics": {"brier_skill": 1.2}}, r"a finite number <= 1 as metrics\['brier_skill'\]"),
    "unknown metric": ({"metrics": {"f2": 0.1}}, "a key of METRICS as metrics"),
    "interval turned round": ({"intervals": {"dice": [0.9, 0.7]}}, r"low <= high.*intervals\['dice'\]"),
    "interval of one": ({"intervals": {"dice": [0.9]}}, r"intervals\['dice'\]"),
    "interval nan": ({"intervals": {"dice": [math.nan, 0.9]}}, r"intervals\['dice'\]"),
    "interval out of range": ({"intervals": {"dice": [0.9, 1.2]}}, r"intervals\['dice'\]"),
    "interval of nothing": ({"intervals": {"ged": [0.1, 0.2]}}, "a key of the metrics as intervals"),
    "no reason": ({"undefined": {"ged": ""}}, r"a reason as undefined\['ged'\]"),
    "value and reason": ({"undefined": {"dice": "why"}}, r"not both, as undefined\['dice'\]"),
    "cost unknown": ({"cost": {"euros": 1}}, "a key of COSTS as cost"),
    "cost negative": ({"cost": {"train_flops": -1.0}}, r"cost\['train_flops'\]"),
    "cost nan": ({"cost": {"train_flops": math.nan}}, r"cost\['train_flops'\]"),
    "shift": ({"shift": {"noise": {"entropy": 1.2}}}, r"an AUROC in 0..1, or none, as shift\['noise'\]\['entropy'\]"),
    "shift flat": ({"shift": {"noise": 0.7}}, r"a dict as shift\['noise'\]"),
    "setting nan": ({"settings": {"a": [1, {"b": math.nan}]}}, r"settings\['a'\]\[1\]\['b'\]"),
    "selection": ({"selection": {"temperature": math.inf}}, r"selection\['temperature'\]"),
    "task": ({"task": "regression"}, "one of .* as task"),
    "seed negative": ({"seed": -1}, "an integer >= 0, or none as seed"),
    "seed bool": ({"seed": True}, "as seed"),
    "r_bayes": ({"r_bayes": 1.3}, "a number in 0..1, or none as r_bayes"),
    "no images": ({"num_test": 0}, "an integer >= 1 as num_test"),
    "size float": ({"size": 32.0}, "as size"),
    "no name": ({"method": ""}, "text as method"),
    "metrics a list": ({"undefined": []}, "a dict as undefined"),
}


@pytest.mark.parametrize("name", BAD)
def test_refused_on_write_and_on_read(name, tmp_path):
    changes, message = BAD[name]
    made = result(**changes)
    with pytest.raises(ValueError, match=message) as raised:
        write(made, tmp_path / "new")
    assert str(raised.value).count("\n") <= 1 and "Received: " in str(raised.value)
    assert not (tmp_path / "new").exists()
    path = write(result(), tmp_path)
    content = json.loads(path.read_text())
    metrics = content["metrics"] | changes.get("metrics", {})
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
        write(result(metrics={"dice": np.float32(0.5)}), tmp_path)
    write(result(metrics={"dice": np.float64(0.5)}), tmp_path)  # is a float
    assert read(tmp_path).metrics["dice"] == 0.5


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "Expected JSON"),
        ('{"format": 1', "Expected JSON"),
        ("[1]", "Expected the fields of a result .* Received: list"),
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
    with pytest.raises(ValueError, match="Expected JSON"):
        read(tmp_path)
    with pytest.raises(FileNotFoundError):
        read(tmp_path / "nowhere.json")


def test_an_unknown_field_is_refused(tmp_path):
    path = write(result(), tmp_path)
    path.write_text(json.dumps({**json.loads(path.read_text()), "colour": "red"}))
    with pytest.raises(ValueError, match=r"with unknown \['colour'\]"):
        read(path)


def test_find(tmp_path):
    for method, seed in (("partial", 0), ("partial", 1), ("ensemble", 0)):
        write(result(method, seed), tmp_path / "phantom_nodule" / method / f"seed{seed}" / "abc")
    write(result(dataset="lidc"), tmp_path / "lidc" / "partial" / "seed0" / "abc")

    def found(**filters):
        return [(one.method, one.seed) for one in find(tmp_path, "phantom_nodule", **filters)]

    assert found() == [("ensemble", 0), ("partial", 0), ("partial", 1)]
    assert found(method="partial", seed=1) == [("partial", 1)]
    assert found(method=("partial", "laplace")) == [("partial", 0), ("partial", 1)]
    assert found(seed={0}) == [("ensemble", 0), ("partial", 0)]
    assert found(seed=7) == [] and find(tmp_path, "nothing") == []
    with pytest.raises(ValueError, match=r"Expected filters among .* Received: \['colour'\]"):
        found(colour="red")


def test_find_leaves_out_other_formats_with_one_warning_and_refuses_broken_files(tmp_path):
    folder = tmp_path / "phantom_nodule" / "partial"
    for seed in range(3):
        write(result(seed=seed), folder / f"seed{seed}" / "abc")
    for seed in range(2):
        (folder / f"seed{seed}" / "abc" / "metrics.json").write_text('{"format": 0}')
    with pytest.warns(UserWarning, match="Left out 2 result") as caught:
        assert [one.seed for one in find(tmp_path, "phantom_nodule")] == [2]
    assert len(caught) == 1
    (folder / "seed2" / "abc" / "metrics.json").write_text("{")
    with pytest.raises(ValueError, match="Expected JSON"):
        find(tmp_path, "phantom_nodule")


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
    assert set(results.KEYS[task]) <= set(METRICS)


def test_metrics_are_described():
    assert describe_metrics(["nll", "entropy"]).splitlines() == [
        f"- `nll`: {METRICS['nll'].meaning} (lower is better)",
        f"- `entropy`: {METRICS['entropy'].meaning} (neither way is better)",
    ]
    with pytest.raises(ValueError, match=r"Received: \['f2'\]"):
        describe_metrics(["f2"])


# ---- rows


def test_seeds_of_one_setting_are_one_row():
    rows = group([result(seed=0), result("ensemble"), result(seed=1, metrics={"dice": 0.6})])
    assert [(row.label, [one.seed for one in row.results]) for row in rows] == [("partial", [0, 1]), ("ensemble", [0])]
    assert rows[0].values("dice") == {0: 0.8, 1: 0.6}
    assert rows[0].value("dice") == pytest.approx(0.7)
    spread = 0.1 * math.sqrt(2)  # of 0.8 and 0.6 about 0.7, divided by n - 1
    np.testing.assert_allclose(rows[0].interval("dice"), [0.7 - spread, 0.7 + spread])
    assert rows[1].interval("dice") is None and rows[1].value("ged") is None


def test_rows_of_one_method_are_told_apart_by_what_differs():
    changed = [{"r_bayes": 0.01}, {"r_bayes": 0.2}, {"r_bayes": 0.2, "settings": {"name": "a", "epochs": 5}}]
    rows = group([result(**{"settings": {"name": "a", "epochs": 3}, **one}) for one in changed] + [result("other")])
    assert [row.label for row in rows] == [
        "partial, r_bayes=0.01, epochs=3",
        "partial, r_bayes=0.2, epochs=3",
        "partial, r_bayes=0.2, epochs=5",
        "other",
    ]
    rows = group([result(options={}), result(options={"fold": 2})])
    assert [row.label for row in rows] == ["partial, fold=None", "partial, fold=2"]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ([], "Expected one result or more"),
        ([result(), result(dataset="lidc")], "Expected results of one dataset"),
        ([result(), result()], "two of 'partial', seed=0"),
    ],
)
def test_results_that_make_no_table(given, message):
    for function in (group, table, cost_table):
        with pytest.raises(ValueError, match=message):
            function(given)


# ---- the table


def lines_of(text):
    """Row name -> cells, and the notes below the table."""
    rows, notes = text.split("\n\n")
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in rows.splitlines()]
    return {line[0]: line[1:] for line in cells}, [note.strip() for note in notes.splitlines()]


def test_table_by_hand():
    rows = [
        result("trivial_prevalence", None, {"dice": 0.1, "nll": 0.05}, num_groups=3),
        result("deterministic", 0, {"dice": 0.61234}, num_groups=3, intervals={"dice": [0.58, 0.641]}),
        result("partial", 0, {"dice": 0.7, "nll": 0.09}, num_groups=3, intervals={"dice": [0.66, 0.72]}, r_bayes=0.01),
    ]
    assert table(rows, ["dice", "nll", "entropy", "ged"]) == "\n".join(
        [
            "|                    |                  dice |    nll | entropy |",
            "| :----------------- | --------------------: | -----: | ------: |",
            "| trivial_prevalence |                 0.100 |  0.050 |   0.200 |",
            "| deterministic      |  0.612 [0.580, 0.641] |  0.100 |   0.200 |",
            "| partial            | 0.700* [0.660, 0.720] | 0.090* |   0.200 |",
            "",
            "Not defined here: ged (no image has two or more valid raters)  ",
            "Higher is better: dice. Lower is better: nll. Neither way is better: entropy.  ",
            "Marked *: the best method, and those a paired test does not tell from it at 5 %, corrected for the rows. "
            "Which is best is picked on the same images.  ",
            "Not tested against the best (no record, other test images, or no common seed): deterministic.  ",
            "Trivial rows better than every method: trivial_prevalence in nll.  ",
            "No interval, as more than 5 % of the resamples leave it undefined: nll of deterministic; nll of partial; "
            "entropy of deterministic; entropy of partial.  ",
            "phantom_nodule: 5 test images of 3 patients; seed 0; recipe quick; network unet_small; r_bayes 0.01; "
            "size 32; [95 % interval] over patients, 1000 resamples.",
        ]
    )


def test_table_without_intervals_and_of_the_task():
    cells, notes = lines_of(table([result(intervals={"dice": [0.7, 0.9]}, leak="twins.")], intervals=False))
    assert cells[""] == [key for key in results.KEYS[SEGMENTATION] if key in result().metrics]
    assert cells["partial"][0] == "0.800"  # alone it is no best
    assert "interval" not in notes[-1] and notes[-1].endswith("network unet_small; size 32. Leak: twins.")
    with pytest.raises(ValueError, match=r"Expected keys among .* Received: \['f2'\]"):
        table([result()], ["f2"])


def test_table_gives_every_reason_once():
    reasons = {"ged": "one rater", "error_auroc": "no errors"}
    rows = [result(undefined=reasons), result("a", undefined={"ged": "one rater"}), result("b", metrics={"ged": 0.2})]
    rows[2].num_samples, rows[2].undefined = 5, {}
    cells, notes = lines_of(table(rows, ["ged", "error_auroc"]))
    assert cells["partial"] == ["- (1)"] and cells["a"] == ["- (1)"] and cells["b"] == ["0.200"]
    assert notes[0] == "(1) one rater" and notes[1].startswith("Not defined here: error_auroc (")
    rows[2].metrics["error_auroc"] = 0.7
    cells, notes = lines_of(table(rows, ["ged", "error_auroc"]))
    assert cells["partial"] == ["- (1)", "- (2)"] and cells["a"] == ["- (1)", "- (3)"]
    assert notes[:3] == ["(1) one rater", "(2) no errors", "(3) not measured for this row"]


def test_the_line_below_tells_what_a_recipes_name_does_not():
    changed = {"epochs": 1, "bayes_epochs": 2, "num_samples": 7, "keep": "best", "momentum": 0.0}
    row = result(settings=changed, options={"fold": 2}, threshold=0.3, normalisation="paper")
    last = lines_of(table([row], ["dice"]))[1][-1]
    told = "normalisation paper; threshold 0.3; epochs 1; bayes_epochs 2; num_samples 7; keep best; fold 2"
    assert told in last and "momentum" not in last


def test_table_of_several_seeds():
    dice = {"partial": (0.80, 0.82, 0.84), "worse": (0.70, 0.721, 0.739), "alike": (0.83, 0.80, 0.82)}
    rows = [result(name, seed, {"dice": value}) for name, values in dice.items() for seed, value in enumerate(values)]
    cells, notes = lines_of(table(rows, ["dice"]))
    # Paired differences of worse: .100, .099, .101, t = 173; of alike: -.03, .02, .02, t = 0.2.
    assert cells["partial"] == ["0.820* +- 0.020 (n=3)"]
    assert cells["worse"] == ["0.720 +- 0.020 (n=3)"]
    assert cells["alike"] == ["0.817* +- 0.015 (n=3)"]
    assert not any("Not tested" in note for note in notes)
    assert notes[-1].endswith("+- standard deviation over seeds.") and "seeds 0, 1, 2;" in notes[-1]
    cells, notes = lines_of(table([*rows, result("other seed", 7, {"dice": 0.9})], ["dice"]))
    assert cells["other seed"] == ["0.900*"] and cells["partial"] == ["0.820 +- 0.020 (n=3)"]
    assert any(note.endswith("or no common seed): alike; partial; worse.") for note in notes)


def test_seeds_that_differ_by_the_same_amount():
    assert results._seeds_test([0.1, 0.2], [0.1, 0.2]) == 1
    assert results._seeds_test([0.5, 0.75], [0.25, 0.5]) == 0
    differences = np.array([0.1, 0.3, 0.2])  # t = mean / (sd / sqrt(n)) = 0.2 / (0.1 / sqrt(3)) = 3.46 with 2 degrees
    t = 0.2 * math.sqrt(3) / 0.1
    expected = 1 - t / math.sqrt(2 + t**2)  # Student's distribution with two degrees of freedom, both sides
    assert results._seeds_test(differences, [0, 0, 0]) == pytest.approx(expected)


def test_holm_by_hand():
    # 0.01 * 3; then max(0.03, 0.02 * 2); then max(0.04, 0.03 * 1).
    adjusted = results.holm({"a": 0.02, "b": 0.01, "c": 0.03})
    assert adjusted == pytest.approx({"b": 0.03, "a": 0.04, "c": 0.04})
    assert results.holm({"a": 0.6, "b": 0.7}) == {"a": 1.0, "b": 1.0} and results.holm({}) == {}


def test_table_marks_what_a_paired_test_cannot_tell_from_the_best(tmp_path):
    targets = (RNG.random((200, 2)) < 0.4).astype("uint8")
    good = np.where(targets == 1, 0.8, 0.2) + RNG.normal(0, 0.05, targets.shape)
    probs = {"best": good, "alike": good + RNG.choice([-1e-4, 1e-4], good.shape), "worse": 0.5 + 0.2 * (good - 0.5)}
    rows = []
    for name, mean_probs in probs.items():
        record = record_of(mean_probs[None], targets)
        metrics = record.metrics()
        undefined = metrics.pop("undefined")
        rows.append(of_task(MULTI_LABEL, metrics, undefined, name))
        write(rows[-1], tmp_path / name, record)
    metrics = rows[2].metrics | {"brier": rows[2].metrics["brier"] + 1e-3}
    other = of_task(MULTI_LABEL, metrics, rows[2].undefined, "elsewhere")  # its record is of other images
    write(other, tmp_path / "elsewhere", record_of(RNG.random((1, 50, 2)), targets[:50]))
    cells, notes = lines_of(table([*rows, other], ["brier"], num_resamples=200))
    assert cells["best"][0].endswith("*") and cells["alike"][0].endswith("*")
    assert not cells["worse"][0].endswith("*") and not cells["elsewhere"][0].endswith("*")
    assert any(note.endswith("no common seed): elsewhere.") for note in notes)


@pytest.mark.parametrize("key", ["ged", "hungarian_iou", "paper_iou"])
def test_rows_of_other_numbers_of_samples_are_not_compared(key):
    better = 1 if METRICS[key].better == "higher" else -1
    counts = {
        "trivial_level_sets": 5,
        "trivial_prevalence": 1,
        "one": 1,
        "two": 1,
        "ensemble": 5,
        "partial": 5,
        "ten": 10,
    }
    rows = [
        result(name, metrics={key: 0.5 + 0.01 * better * place}, num_samples=number, undefined={})
        for place, (name, number) in enumerate(counts.items())
    ]
    rows.append(result("old", metrics={key: 0.5 + better * 0.4}, undefined={}))
    rows[0].metrics[key] = 0.5 + better * 0.3
    cells, notes = lines_of(table(rows, [key]))
    assert [label for label, row in cells.items() if row[0].endswith("*")] == ["partial"]  # not "ten", not "old"
    note = next(note for note in notes if note.startswith("Depends"))
    assert note == (
        f"Depends on the number of samples: {key}. Samples: unknown in old; 1 in trivial_prevalence, one, two; "
        "5 in trivial_level_sets, ensemble, partial; 10 in ten. Compared and marked there: rows with 5."
    )
    assert "Trivial rows better than every method: trivial_level_sets in " + key + "." in notes
    cells, notes = lines_of(table(rows, ["dice"]))
    assert not any(note.startswith("Depends") for note in notes) and cells["ten"] == ["0.800*"]


def test_of_single_samples_alone_the_marks_are_among_them():
    rows = [result(name, metrics={"ged": ged}, num_samples=1, undefined={}) for name, ged in (("a", 0.4), ("b", 0.5))]
    cells, notes = lines_of(table(rows, ["ged"]))
    assert cells["a"] == ["0.400*"] and any(note.endswith("rows with 1.") for note in notes)


def test_the_record_tells_the_samples_of_a_trivial_row(tmp_path):
    record = record_of(RNG.random((3, 8, 2)), np.eye(2, dtype="uint8")[np.arange(8) % 2])
    one = result("trivial_level_sets", None)
    write(one, tmp_path, record)
    assert group([one])[0].num_samples == 3 and group([result()])[0].num_samples is None


def test_a_bound_is_one_for_proper_scores_alone():
    rows = [result("bound_scene", None), result(metrics={"dice": 0.9})]
    _, notes = lines_of(table(rows, ["nll", "brier", "entropy", "dice", "ece"]))
    assert "bound_scene is a bound for nll, brier and brier_skill alone; not for dice, ece." in notes
    for shown, keys in ((rows, ["nll", "brier"]), (rows[1:], ["nll", "dice"])):
        assert not any("bound" in note for note in lines_of(table(shown, keys))[1])


def test_too_few_resamples_are_said(tmp_path, monkeypatch):
    targets = (RNG.random((40, 2)) < 0.4).astype("uint8")
    rows = []
    for name, noise in (("a", 0.0), ("b", 0.2), ("c", 0.3)):
        record = record_of(np.abs(targets - 0.1 - noise * RNG.random(targets.shape))[None], targets)
        metrics = record.metrics()
        rows.append(of_task(MULTI_LABEL, metrics, metrics.pop("undefined"), name))
        rows[-1].evaluation = {"num_resamples": 30}
        write(rows[-1], tmp_path / name, record)
    # The smallest p is 1/31, times the two tests 0.065.
    cells, notes = lines_of(table(rows, ["brier"]))
    assert all(cells[name][0].endswith("*") for name in "abc")
    assert any(note.startswith("30 resamples are too few") and note.endswith("from the best: brier.") for note in notes)
    cells, notes = lines_of(table(rows, ["brier"], num_resamples=300))
    assert not cells["b"][0].endswith("*") and not any("too few" in note for note in notes)


def test_two_seeds_can_hardly_tell_and_a_missing_value_is_said():
    dice = {"a": (0.8, 0.82), "b": (0.7, 0.73)}
    rows = [result(name, seed, {"dice": value}) for name, values in dice.items() for seed, value in enumerate(values)]
    cells, notes = lines_of(table(rows, ["dice"]))
    assert cells["a"] == ["0.810* +- 0.014 (n=2)"]
    assert "Two seeds can hardly tell rows apart: their test has one degree of freedom." in notes
    del rows[1].metrics["dice"]
    rows[1].undefined = {"dice": "it diverged"}
    cells, notes = lines_of(table(rows, ["dice"]))
    assert cells["a"] == ["0.800* (n=1 of 2) (1)"] and notes[0] == "(1) it diverged"
    three = [result("c", seed, {"nll": 0.1 + 0.1 * seed}) for seed in range(3)]
    del three[2].metrics["nll"]
    three[2].undefined = {"nll": "it diverged"}
    assert lines_of(table(three, ["nll"]))[0]["c"] == ["0.150 +- 0.071 (n=2 of 3) (1)"]


@pytest.mark.parametrize(
    ("value", "bounds", "text"),
    [
        (0.6123, [0.58, 0.64], "0.612 [0.580, 0.640]"),
        (0.09712, [0.0951, 0.0991], "0.0971 [0.0951, 0.0991]"),
        (12.345, [11.5, 13.1], "12.35 [11.50, 13.10]"),
        (123.45, [114, 132], "123.5 [114.0, 132.0]"),
        (0.5, [0.5, 0.5], "0.500 [0.500, 0.500]"),
    ],
)
def test_decimals_follow_the_interval(value, bounds, text):
    cells, _ = lines_of(table([result(metrics={"nll": value}, intervals={"nll": bounds})], ["nll"]))
    assert cells["partial"] == [text]


def test_counts_are_shown_as_integers():
    cells, _ = lines_of(table([result(metrics={"num_images": 5.0})], ["num_images"]))
    assert cells["partial"] == ["5"]


def test_cost_table_by_hand():
    cost = {"num_trainable": 1234567, "weight_bytes": 2.5e6, "train_flops_ratio": 2.0, "train_seconds": 3.0}
    rows = [
        result("trivial_prevalence", None),
        result("partial", 0, cost=cost),
        result("partial", 1, cost=cost | {"train_seconds": 4.0, "train_grown_bytes": None}),
    ]
    cells, notes = lines_of(cost_table(rows))
    shown = dict(zip(cells[""], cells["partial"], strict=True))
    assert set(cells) == {"", "partial", next(name for name in cells if name.startswith(":"))}
    assert shown["trainable"] == "1,234,567" and shown["weights, MB"] == "2.50" and shown["train, x"] == "2.00"
    assert shown["train, s"] == "3.5" and shown["memory, MB"] == "-"
    assert "paper's, x: the paper's formula" in notes[0]


# ---------------------------------------------------------------------------
# CSV tables
# ---------------------------------------------------------------------------


def test_a_csv_gives_back_what_was_written_but_for_records(tmp_path):
    written = [whole_result(), result("ensemble", seed=1), result("trivial_prevalence", seed=None, split="val")]
    for one in written:
        write(one, tmp_path / one.method)
    path = results.write_csv(written, tmp_path / "table.csv")
    found = {one.method: one for one in results.read_csv(path)}
    assert len(found) == 3
    for one in written:
        for name, value in vars(one).items():
            if name not in ("folder", "cost"):
                assert getattr(found[one.method], name) == value, name
        assert found[one.method].folder is None and found[one.method].record() is None
        known = {key: value for key, value in one.cost.items() if value is not None}
        assert {key: value for key, value in found[one.method].cost.items() if value is not None} == known
    assert table(list(found.values())[:2], ["nll", "dice"]) == table(
        [one for name in list(found)[:2] for one in written if one.method == name], ["nll", "dice"]
    )


def test_a_csv_keeps_other_rows_and_replaces_the_same(tmp_path):
    path = tmp_path / "table.csv"
    results.write_csv([result(seed=0), result(seed=1)], path)
    results.write_csv([result(seed=1, metrics={"nll": 0.3}, commit="later"), result(seed=0, r_bayes=0.2)], path)
    found = results.read_csv(path)
    assert sorted((one.seed, one.r_bayes or 0, one.metrics["nll"]) for one in found) == [
        (0, 0, 0.1),
        (0, 0.2, 0.1),
        (1, 0, 0.3),
    ]
    results.write_csv([result(cost={"num_weights": 1093734400, "train_seconds": 1.25})], path)
    found, before = results.read_csv(path), path.read_bytes()
    assert b",1093734400," in before
    results.write_csv(found[::-1], path)
    assert path.read_bytes() == before  # the order of the rows is theirs
    results.write_csv([result(seed=5)], path, merge=False)
    assert [one.seed for one in results.read_csv(path)] == [5]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda text: text.replace("0.1", "nan"), "a finite number"),
        (lambda text: text.replace("0.1", "much"), "line 2 .*could not convert"),
        (lambda text: text.replace("segmentation", "guessing"), "task of line 2"),
        (lambda text: text.replace("nll", "nil", 1), "metrics\\['nll'\\] of line 2"),
        (lambda text: text.replace("seed", "sead", 1), "line 2 .*KeyError: 'seed'"),
        (lambda text: "a,b\n1\n", "line 2"),
    ],
)
def test_a_csv_that_is_none_is_refused_with_its_line(tmp_path, change, message):
    path = results.write_csv([result()], tmp_path / "table.csv")
    path.write_text(change(path.read_text()))
    with pytest.raises(ValueError, match=message) as error:
        results.read_csv(path)
    assert len(str(error.value).splitlines()) <= 2


def test_a_csv_that_cannot_be_written_stays_as_it_was(tmp_path, monkeypatch):
    path = results.write_csv([result()], tmp_path / "table.csv")
    before = path.read_bytes()
    monkeypatch.setattr("os.replace", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    with pytest.raises(OSError, match="No space"):
        results.write_csv([result(seed=3)], path)
    assert path.read_bytes() == before and sorted(tmp_path.iterdir()) == [path, tmp_path / "table.csv.lock"]


def test_results_of_the_validation_split_are_found_when_asked_for(tmp_path):
    for split, place in (("test", ""), ("val", "val")):
        write(result(split=split), tmp_path / "phantom_nodule/partial/seed0/0123456789" / place)
    assert [one.split for one in find(tmp_path, "phantom_nodule")] == ["test"]
    assert [one.split for one in find(tmp_path, "phantom_nodule", split="val")] == ["val"]
    assert len(find(tmp_path, "phantom_nodule", split=["val", "test"])) == 2


def test_a_row_is_known_again_by_what_was_asked_for(tmp_path):
    path = tmp_path / "table.csv"
    for rate in (0.7 / 100, 0.007, 33.3 / 100):  # the first two differ in the last bit alone
        results.write_csv([result(r_bayes=rate)], path)
    assert len(results.read_csv(path)) == 2
    old = result(r_bayes=0.007, title="in other words", settings={"epochs": 3}, num_groups=4)
    results.write_csv([old], path, merge=False)
    results.write_csv([result(r_bayes=0.007, settings={"epochs": 3, "scope": "global"})], path)
    assert [one.title for one in results.read_csv(path)] == ["one line"]  # a field at its default, a new title
    results.write_csv([result(r_bayes=0.007, settings={"epochs": 3, "scope": "layer"})], path)
    assert len(results.read_csv(path)) == 2
