"""Rows of a table and the one paired test between them, against numbers by hand and scipy."""

import math

import numpy as np
import pytest
from helpers import mask_result as result
from helpers import of_task, record_of
from scipy import stats

from sbn_tf.datasets.base import MULTI_LABEL
from sbn_tf.experiments import scoring
from sbn_tf.experiments.report import correct_keys, paper_keys
from sbn_tf.experiments.result import write
from sbn_tf.experiments.results import frame
from sbn_tf.experiments.rows import holm, labelled, paired, rows, sweep
from sbn_tf.experiments.table import differences

RNG = np.random.default_rng(0)
NLL = {("partial", 0.01): [0.10, 0.12, 0.11], ("partial", 0.05): [0.2, 0.3], ("ensemble", None): [0.08, 0.09, 0.10]}
FOUND = frame(
    result(method, seed=seed, metrics={"nll": value}, r_bayes=rate, cost={"train_flops_ratio": 2.0 + seed})
    for (method, rate), numbers in NLL.items()
    for seed, value in enumerate(numbers)
)
ONE, FIVE = {"method": "partial", "r_bayes": 0.01}, {"method": "partial", "r_bayes": 0.05}
LINES = {"1 %": ONE, "5 %": FIVE, "ensemble": {"method": "ensemble"}, "none": {"method": "temperature"}}


def of_seeds(numbers, key="nll", **changes):
    """A frame of several methods: name -> one value a seed."""
    return frame(
        result(name, seed, {key: value}, **changes)
        for name, values in numbers.items()
        for seed, value in enumerate(values)
    )


# ---- rows


def test_seeds_of_one_setting_are_one_row():
    found = rows(frame([result(seed=0), result("ensemble"), result(seed=1, metrics={"dice": 0.6})]))
    assert [(row.label, row.units) for row in found] == [
        ("partial", [(None, 0), (None, 1)]),
        ("ensemble", [(None, 0)]),
    ]
    assert found[0].values("dice") == {(None, 0): 0.8, (None, 1): 0.6}
    assert found[0].value("dice") == pytest.approx(0.7)
    spread = 0.1 * math.sqrt(2)  # of 0.8 and 0.6 about 0.7, divided by n - 1
    np.testing.assert_allclose(found[0].interval("dice"), [0.7 - spread, 0.7 + spread])
    assert found[1].interval("dice") is None and found[1].value("ged") is None


def test_rows_of_one_method_are_told_apart_by_what_differs():
    changed = [{"r_bayes": 0.01}, {"r_bayes": 0.2}, {"r_bayes": 0.2, "settings": {"name": "a", "epochs": 5}}]
    found = rows(
        frame([result(**{"settings": {"name": "a", "epochs": 3}, **one}) for one in changed] + [result("other")])
    )
    assert [row.label for row in found] == [
        "partial, r_bayes=0.01, epochs=3",
        "partial, r_bayes=0.2, epochs=3",
        "partial, r_bayes=0.2, epochs=5",
        "other",
    ]
    found = rows(frame([result(options={}), result(options={"split": "paper"})]))
    assert [row.label for row in found] == ["partial, data split=None", "partial, data split=paper"]


def test_values_are_those_of_the_line_by_fold_and_seed():
    by_label = {row.label: row for row in rows(labelled(FOUND, LINES))}
    assert by_label["1 %"].values("nll") == {(None, 0): 0.10, (None, 1): 0.12, (None, 2): 0.11}
    assert by_label["ensemble"].values("train_flops_ratio") == {(None, 0): 2, (None, 1): 3, (None, 2): 4}
    assert by_label["none"].is_missing and by_label["none"].values("nll") == {}
    folds = frame(result(seed=0, metrics={"nll": 0.1 + fold}, options={"fold": fold}) for fold in (0, 1))
    assert rows(folds)[0].values("nll") == {(0, 0): 0.1, (1, 0): 1.1}  # folds are units of one row


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ([], "Expected one result or more"),
        ([result(), result(dataset="lidc")], "Expected results of one dataset"),
        ([result(), result(title="again")], "one result of 'partial' for each seed and fold"),
    ],
)
def test_results_that_make_no_table(given, message):
    with pytest.raises(ValueError, match=message):
        rows(frame(given))


def test_two_results_of_one_training_are_refused():
    with pytest.raises(ValueError, match=r"one result of 'all' for each seed and fold. Received: two of seed=0"):
        rows(labelled(FOUND, {"all": {"method": "partial"}}))
    with pytest.raises(ValueError, match="'nnl'"):
        paired(FOUND, "ensemble", "nnl")
    with pytest.raises(ValueError, match=r"Expected a reference among .*ensemble.*Received: 'nobody'"):
        paired(FOUND, "nobody", "nll")


def test_a_sweep_goes_from_few_weights_to_many():
    assert sweep(FOUND[::-1], "nll") == {0.01: [0.11, 0.12, 0.10], 0.05: [0.3, 0.2]}


def test_keys_go_with_the_task():
    assert paper_keys("multi-label", 1)[0] == "paper_accuracy"
    assert paper_keys("segmentation", 4)[0] == "paper_dice"
    assert paper_keys("segmentation", 1)[0] == "paper_iou"
    assert correct_keys("segmentation", 4)[:2] == ("dice", "ged")
    assert "ged" not in correct_keys("segmentation", 1)


# ---- the paired test


def test_paired_differences_are_the_t_interval():
    tests = paired(labelled(FOUND, LINES), "ensemble", "nll").set_index("label")
    found, test = tests.loc["1 %"], stats.ttest_rel(NLL["partial", 0.01], NLL["ensemble", None])
    expected = test.confidence_interval(0.95)
    assert (found["low"], found["high"]) == pytest.approx((expected.low, expected.high))
    assert found["difference"] == pytest.approx(0.02) and (found["n"], found["over"]) == (3, "seeds")
    assert found["p_value"] == pytest.approx(test.pvalue)
    common = tests.loc["5 %"]
    assert common["n"] == 2 and common["difference"] == pytest.approx((0.12 + 0.21) / 2)
    assert tests.loc["none", "n"] == 0 and np.isnan(tests.loc["none", "difference"])
    adjusted = holm({label: tests.loc[label, "p_value"] for label in ("1 %", "5 %")})
    assert tests.loc["1 %", "p_adjusted"] == pytest.approx(adjusted["1 %"])
    table = differences(labelled(FOUND, LINES), ["ensemble"])["ensemble"]
    assert table["1 %"].startswith("+0.0200 [") and table["none"] == "missing" and table["ensemble"] == "-"
    assert ("*" in table["1 %"]) == (adjusted["1 %"] < 0.05)


def test_a_fold_counts_once():
    rng = np.random.default_rng(1)
    units = [(fold, seed) for fold in range(3) for seed in range(2)]
    numbers = {name: dict(zip(units, rng.random(6), strict=True)) for name in ("ours", "theirs")}
    found = frame(
        result(name, seed, {"nll": value}, options={"fold": fold})
        for name, values in numbers.items()
        for (fold, seed), value in values.items()
    )
    (one,) = paired(found, "theirs", "nll").to_dict("records")
    gaps = [np.mean([numbers["ours"][fold, k] - numbers["theirs"][fold, k] for k in range(2)]) for fold in range(3)]
    expected = stats.ttest_1samp(gaps, 0.0)
    assert (one["n"], one["over"]) == (3, "folds") and one["difference"] == pytest.approx(np.mean(gaps))
    assert one["p_value"] == pytest.approx(expected.pvalue)
    of_fold = paired(found[found["fold"] == 0], "theirs", "nll").to_dict("records")[0]
    assert (of_fold["n"], of_fold["over"]) == (2, "seeds")


def test_by_compares_within_each_group_and_corrects_there():
    both = frame(
        result(name, seed, {"nll": base + 0.01 * seed + noise}, dataset=dataset)
        for dataset, base in (("a", 0.1), ("b", 0.5))
        for name, shift in (("rival", 0.0), ("ours", 0.02), ("other", 0.03))
        for seed, noise in enumerate(shift * np.array([1, 1.1, 0.9]))
    )
    found = paired(both, "rival", "nll")
    assert list(zip(found["dataset"], found["label"], strict=True)) == [
        *(("a", name) for name in ("ours", "other")),
        *(("b", name) for name in ("ours", "other")),
    ]
    alone = paired(both[both["dataset"] == "b"], "rival", "nll")
    np.testing.assert_allclose(found[found["dataset"] == "b"]["p_adjusted"], alone["p_adjusted"])


def test_one_training_is_tested_over_its_images(tmp_path):
    targets = (RNG.random((60, 2)) < 0.4).astype("uint8")
    made, records = [], {}
    for name, noise in (("rival", 0.0), ("ours", 0.3)):
        records[name] = record_of(np.abs(targets - 0.1 - noise * RNG.random(targets.shape))[None], targets)
        metrics = records[name].metrics()
        made.append(of_task(MULTI_LABEL, metrics, metrics.pop("undefined"), name))
        write(made[-1], tmp_path / name, records[name])
    (one,) = paired(frame(made), "rival", "nll", num_resamples=100).to_dict("records")
    expected = scoring.compare(records["ours"], records["rival"], keys=["nll"], num_resamples=100)["nll"]
    assert one | expected == one and (one["n"], one["over"]) == (1, "images")
    (without,) = paired(frame(made).assign(folder=""), "rival", "nll").to_dict("records")
    assert without["difference"] == pytest.approx(one["difference"]) and np.isnan(without["p_value"])


@pytest.mark.parametrize(
    ("ours", "theirs", "p_value"),
    [
        ([0.1, 0.2], [0.1, 0.2], 1.0),
        ([0.5, 0.75], [0.25, 0.5], 0.0),
        # t = mean / (sd / sqrt(n)) = 0.2 / (0.1 / sqrt(3)) = 3.46; Student's t with two degrees of freedom, both sides.
        ([0.2, 0.4, 0.3], [0.1, 0.1, 0.1], 1 - 12**0.5 / math.sqrt(2 + 12)),
        ([0.3], [0.3], 1.0),
    ],
)
def test_p_values_by_hand(ours, theirs, p_value):
    found = paired(of_seeds({"ours": ours, "theirs": theirs}), "theirs", "nll")
    assert found["p_value"].tolist() == pytest.approx([p_value], abs=1e-12)


def test_holm_by_hand():
    # 0.01 * 3; then max(0.03, 0.02 * 2); then max(0.04, 0.03 * 1).
    adjusted = holm({"a": 0.02, "b": 0.01, "c": 0.03})
    assert adjusted == pytest.approx({"b": 0.03, "a": 0.04, "c": 0.04})
    assert holm({"a": 0.6, "b": 0.7}) == {"a": 1.0, "b": 1.0} and holm({}) == {}
