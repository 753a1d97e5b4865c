"""One table: rows are made once, read afterwards, and say what they are."""

import dataclasses
import json
import re

import numpy as np
import pytest
from helpers import tiny_networks

from sbn_tf.__main__ import main
from sbn_tf.experiments import compare, report, scoring
from sbn_tf.experiments.result import KEYS, read
from sbn_tf.experiments.results import frame
from sbn_tf.experiments.rows import paired
from sbn_tf.metrics import METRICS

# Two trainings of one epoch, shared by all tests.
METHODS = ("deterministic", "partial")


@pytest.fixture(scope="module", autouse=True)
def _tiny():
    with tiny_networks():
        yield


def made(runs, **changes):
    options = {"epochs": 1, "bayes_epochs": 1, "limit": 12, "size": 16, "network": "tiny_masks", "r_bayes": 0.05}
    options |= {"runs": str(runs), "num_resamples": 50, "verbose": False}
    return compare.experiment("phantom_nodule", "quick", **options, **changes)


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    return tmp_path_factory.mktemp("runs")


@pytest.fixture(scope="module")
def settings(runs):
    return made(runs)


@pytest.fixture(scope="module")
def rows(settings):
    return compare.all_rows(settings, METHODS)


def test_trivial_rows_and_the_bound_come_first(rows):
    names = ["trivial_all_background", "trivial_prevalence", "trivial_level_sets", "bound_scene", *METHODS]
    assert [row.method for row in rows] == names
    by_name = {row.method: row for row in rows}
    assert by_name["trivial_prevalence"].metrics["brier_skill"] == pytest.approx(0, abs=1e-12)
    assert by_name["bound_scene"].metrics["nll"] < min(by_name[name].metrics["nll"] for name in METHODS)
    assert set(by_name["trivial_level_sets"].metrics) <= {"ged", "hungarian_iou", "num_images"}


def test_a_row_scores_the_test_split_of_its_own_method(settings, rows):
    row = rows[-1]
    test = settings.data.test
    method = compare.fitted(settings, "partial")
    probs = method.predict_samples(test.normalised())
    expected = scoring.evaluate(
        probs,
        test.targets,
        "segmentation",
        rater_valid=test.rater_valid,
        train_prevalence=settings.prevalence(),
        boundary=True,
    )
    undefined = expected.pop("undefined")
    assert row.metrics == pytest.approx(expected, rel=1e-5) and set(row.undefined) == set(undefined)
    assert (row.seed, row.r_bayes, row.num_test, row.num_samples) == (0, 0.05, 12, 5)
    assert row.cost["num_bayesian"] == round(0.05 * method.masks.num_weights)
    for key, (low, high) in row.intervals.items():
        assert low <= high, key


def test_what_is_scored_is_read_and_the_test_split_predicted_once(settings, rows, monkeypatch):
    stored = json.loads((rows[-1].folder / "metrics.json").read_text())
    monkeypatch.setattr(compare.scoring, "score", lambda *_, **__: pytest.fail("the test split was predicted again"))
    again = compare.row(settings, "partial")
    assert again == rows[-1]
    assert json.loads((again.folder / "metrics.json").read_text()) == stored


@pytest.mark.parametrize("content", ["{", '{"format": 1}', '{"deterministic (step 1)": {"nll": 0.1}}'])
def test_a_file_that_is_no_result_is_made_again(settings, rows, content):
    path = rows[-1].folder / "metrics.json"
    path.write_text(content)
    with pytest.warns(UserWarning, match="scored again"):
        again = compare.row(settings, "partial")
    assert again.metrics == rows[-1].metrics == read(path).metrics


def test_a_score_without_its_record_or_of_other_weights_is_made_again(settings, rows):
    row = compare.row(settings, "deterministic")
    (row.folder / "record.npz").unlink()
    assert compare.row(settings, "deterministic").record().num_images == 12
    path = row.folder / "metrics.json"
    content = json.loads(path.read_text())
    changed = {**content, "metrics": {**row.metrics, "nll": 0.123}}
    path.write_text(json.dumps(changed))
    with pytest.warns(UserWarning, match=r"metrics\.json was changed: .*scored again"):
        assert compare.row(settings, "deterministic").metrics == row.metrics
    del changed["sha256"]  # as of a file that was made by hand
    path.write_text(json.dumps(changed))
    assert compare.row(settings, "deterministic").metrics["nll"] == 0.123  # what is stored is read
    (row.folder / "model.keras").unlink()  # and trained again
    assert compare.row(settings, "deterministic").metrics["nll"] == pytest.approx(row.metrics["nll"])


def test_a_shared_step_1_is_told_under_the_recipe_that_asks(settings, rows):
    recipe = dataclasses.replace(settings.recipe, bayes_epochs=7)
    row = compare.row(dataclasses.replace(settings, recipe=recipe), "deterministic")
    assert row.settings["bayes_epochs"] == 7 and row.metrics == compare.row(settings, "deterministic").metrics
    assert read(row.folder).settings["bayes_epochs"] == 1


def test_several_seeds_are_shown_with_their_spread_and_compared_within_one(settings, rows):
    other = [compare.row(dataclasses.replace(settings, seed=1), name) for name in METHODS]
    both = frame([*rows, *other])
    values = [one.shift["noise"]["entropy"] for one in (rows[-1], other[-1])]
    shifts = report.shift_table(both).loc["partial"]
    assert shifts["noise: entropy"] == f"{np.mean(values):.3f} +- {np.std(values, ddof=1):.3f}"
    (test,) = paired(both[both["method"].isin(METHODS)], "deterministic", "nll").to_dict("records")
    gaps = [one[-1].metrics["nll"] - one[-2].metrics["nll"] for one in (rows, other)]
    assert (test["n"], test["over"]) == (2, "seeds") and test["difference"] == pytest.approx(np.mean(gaps))


def test_other_settings_of_the_score_are_another_score(settings, rows):
    other = dataclasses.replace(settings, threshold="validation", shifts={"noise": 2.0})
    row = compare.row(other, "deterministic")
    val = settings.data.val
    probs = compare.fitted(settings, "deterministic").predict_samples(val.normalised()).mean(0)
    best = scoring.select_threshold(probs, val.targets, "segmentation", val.rater_valid)
    assert row.threshold == row.selection["threshold"] == best
    assert set(row.shift) == {"noise"} and row.metrics["nll"] == rows[-2].metrics["nll"]
    assert compare.row(settings, "deterministic").threshold == 0.5
    trivial = compare.trivial_rows(other)
    frequency = np.broadcast_to(settings.prevalence(), val.targets.shape[:3])
    expected = scoring.select_threshold(frequency, val.targets, "segmentation", val.rater_valid)
    assert trivial["trivial_prevalence"].threshold == expected
    truth = scoring.select_threshold(val.truth_probs[..., 0], val.targets, "segmentation", val.rater_valid)
    assert trivial["bound_scene"].threshold == truth


def test_shifted_images_are_scored_against_clean_ones(rows):
    assert rows[0].shift == {}
    assert set(rows[-1].shift) == {"noise", "blur", "contrast"}
    for found in rows[-1].shift.values():
        assert 0 <= found["entropy"] <= 1 and 0 <= found["mutual_information"] <= 1
    assert list(report.shift_table(frame(rows)).index) == list(METHODS)


def test_a_metric_that_is_undefined_in_too_many_resamples_has_no_test(rows, monkeypatch):
    monkeypatch.setattr(scoring, "compare", lambda *records, **options: {})  # what it then gives
    (test,) = paired(frame(rows[-2:]), "deterministic", "nll").to_dict("records")
    assert test["label"] == "partial" and np.isnan(test["p_value"]) and not np.isnan(test["difference"])


def test_of_one_seed_the_paired_test_is_over_images(rows):
    found = scoring.compare(rows[-1].record(), rows[-2].record(), keys=["nll"], num_resamples=50)["nll"]
    (test,) = paired(frame(rows[-2:]), "deterministic", "nll", num_resamples=50).to_dict("records")
    assert (test["over"], test["low"], test["p_value"]) == ("images", found["low"], found["p_value"])
    assert found["difference"] == pytest.approx(rows[-1].metrics["nll"] - rows[-2].metrics["nll"])


@pytest.mark.parametrize("dataset", ["phantom_chest", "phantom_lesion"])
def test_the_command_prints_every_table(dataset, tmp_path, capsys):
    arguments = ["--methods", "deterministic,partial", "--epochs", "1", "--bayes-epochs", "1"]
    arguments += ["--limit", "12", "--num-resamples", "20", "--num-samples", "2"]
    arguments += ["--size", "16", "--network", "tiny_masks" if dataset == "phantom_lesion" else "tiny"]
    assert main(["compare", dataset, *arguments, "--runs", str(tmp_path)]) == 0
    text = capsys.readouterr().out
    task = "segmentation" if dataset == "phantom_lesion" else "multi-label"
    for key in (*KEYS[task], *report.USE[task], *report.PAPER[task]):
        assert f" {key} |" in text or f"Not defined here: {key} (" in text
    assert "What does it cost?" in text and "nan" not in text.lower().replace("nanograms", "")
    for name in (*METHODS, "trivial_prevalence", "bound_scene"):
        assert f"| {name} " in text


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["no_such_set"], "no_such_set"),
        (["phantom_nodule", "--methods", "partial,best"], r"Received: \['best'\]"),
        (["phantom_nodule", "--recipe", "mine"], "recipe='mine'"),
        (["phantom_nodule", "--r-bayes", "1.3"], "1.3"),
        (["phantom_nodule", "--threshold", "1.5"], "threshold=1.5"),
        (["phantom_nodule", "--threshold", "half"], "Expected --threshold.*half"),
        (["phantom_nodule", "--methods", "partial,partial"], "each method once"),
        (["phantom_nodule", "--seeds", "0,0"], "each of --seeds once"),
        (["phantom_nodule", "--num-resamples", "0"], "num_resamples=0"),
        (["phantom_nodule", "--seeds", "0,-1"], "-1"),
        (["phantom_nodule", "--seeds", "0,one"], "Expected --seeds.*one"),
    ],
)
def test_bad_arguments_are_explained_in_two_lines(arguments, message, tmp_path, capsys):
    assert main(["compare", *arguments, "--limit", "6", "--size", "16", "--runs", str(tmp_path)]) == 2
    error = capsys.readouterr().err.strip()
    assert re.search(message, error) and error.count("\n") <= 1 and not list(tmp_path.iterdir())


def test_every_number_of_a_result_has_a_meaning(rows):
    for row in rows:
        assert set(row.metrics) <= set(METRICS)
        assert np.isfinite(list(row.metrics.values())).all()
        assert all(reason for reason in row.undefined.values())


def test_the_validation_split_is_scored_beside_the_test_split(settings, rows, runs):
    val = dataclasses.replace(settings, split="val", shifts={})
    row = compare.row(val, "partial")
    assert row.split == "val" and row.folder == rows[-1].folder / "val" and not row.shift
    probs = compare.fitted(val, "partial").predict_samples(settings.data.val.normalised())
    expected = scoring.evaluate(
        probs, settings.data.val.targets, "segmentation", rater_valid=settings.data.val.rater_valid
    )
    assert row.metrics["nll"] == pytest.approx(expected["nll"])
    assert compare.row(settings, "partial").metrics == rows[-1].metrics  # the test split's is where it was
    trivial = compare.trivial_rows(val)["trivial_prevalence"]
    assert trivial.split == "val" and trivial.metrics["nll"] != rows[1].metrics["nll"]


def test_more_samples_are_a_row_of_their_own(settings, rows):
    row = compare.row(dataclasses.replace(settings, num_samples=7, shifts={}), "partial")
    assert row.num_samples == 7 and row.folder == rows[-1].folder / "samples7"
    assert row.metrics["nll"] != rows[-1].metrics["nll"]
    same = compare.row(dataclasses.replace(settings, num_samples=5), "partial")
    assert same.folder == rows[-1].folder


def test_changes_of_the_recipe_are_told_in_the_row(runs):
    changed = made(runs, changes="score=magnitude, initial_scale=0.05")
    assert (changed.recipe.score, changed.recipe.initial_scale, changed.recipe.epochs) == ("magnitude", 0.05, 1)
    again = compare.recipe_of("phantom_nodule", "quick", epochs=1, bayes_epochs=1, changes={"score": "magnitude"})
    assert dataclasses.replace(changed.recipe, initial_scale=again.initial_scale) == again


def test_a_dataset_of_another_task_stands_in_for_none(settings):
    with pytest.raises(ValueError, match=r"swapped, a dataset of segmentation with 1 channels\. Received: 'phantom_c"):
        dataclasses.replace(settings, swapped="phantom_chest")
