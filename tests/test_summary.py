"""Summaries over trainings, against numbers by hand and scipy."""

import numpy as np
import pytest
from helpers import mask_result as result
from scipy import stats

from sbn_tf.experiments import summary
from sbn_tf.experiments.summary import Line

NLL = {("partial", 0.01): [0.10, 0.12, 0.11], ("partial", 0.05): [0.2, 0.3], ("ensemble", None): [0.08, 0.09, 0.10]}
FOUND = [
    result(method, seed=seed, metrics={"nll": value}, r_bayes=rate, cost={"train_flops_ratio": 2.0 + seed})
    for (method, rate), numbers in NLL.items()
    for seed, value in enumerate(numbers)
]


def test_values_are_those_of_the_line_by_seed_and_fold():
    assert summary.values(FOUND, Line("partial", 0.01), "nll") == {(0, -1): 0.10, (1, -1): 0.12, (2, -1): 0.11}
    assert summary.values(FOUND, Line("ensemble"), "train_flops_ratio") == {(0, -1): 2, (1, -1): 3, (2, -1): 4}
    folds = [result(seed=0, metrics={"nll": 0.1 + fold}, options={"fold": fold}) for fold in (0, 1)]
    assert summary.values(folds, Line("partial"), "nll") == {(0, 0): 0.1, (0, 1): 1.1}
    assert summary.values(FOUND, Line("temperature"), "nll") == {}


def test_what_is_missing_is_said_to_be_and_never_a_number():
    lines = {"1 %": Line("partial", 0.01), "5 %": Line("partial", 0.05), "none": Line("temperature")}
    cells = summary.cells(FOUND, lines, ["nll", "ged"])
    assert cells["1 %"] == {"nll": f"0.110 +- {np.std([0.10, 0.12, 0.11], ddof=1):.3f}", "ged": "-"}
    assert cells["5 %"]["nll"] == "0.250 +- 0.071 (n=2)"  # 0.05 * sqrt(2)
    assert cells["none"] == {"nll": "missing", "ged": "missing"}
    no_seed = result("trivial_prevalence", seed=None, metrics={"nll": 0.5})  # one is all there can be
    assert summary.cells([*FOUND, no_seed], {**lines, "p": Line("trivial_prevalence")}, ["nll"])["p"]["nll"] == "0.500"
    table = summary.summary_table({"a": FOUND, "b": []}, lines, {"a": ["nll"], "b": ["nll"]})
    assert table.count("missing") == 3 + 1 and "a: nll" in table and "b: nll" in table


def test_two_results_of_one_training_are_refused():
    with pytest.raises(ValueError, match="one result of 'partial' for each seed and fold"):
        summary.values([*FOUND, result(seed=0, r_bayes=0.01)], Line("partial", 0.01), "nll")
    with pytest.raises(ValueError, match="results of one dataset"):
        summary.values([*FOUND, result(dataset="lidc")], Line("partial", 0.01), "nll")
    with pytest.raises(ValueError, match="'nnl'"):
        summary.values(FOUND, Line("partial"), "nnl")


def test_a_sweep_goes_from_few_weights_to_many():
    assert summary.sweep(FOUND[::-1], "nll") == {0.01: [0.11, 0.12, 0.10], 0.05: [0.3, 0.2]}


def test_paired_differences_are_the_t_interval():
    found = summary.differences(FOUND, Line("partial", 0.01), Line("ensemble"), "nll")
    ours, theirs = NLL["partial", 0.01], NLL["ensemble", None]
    expected = stats.ttest_rel(ours, theirs).confidence_interval(0.95)
    assert (found["low"], found["high"]) == pytest.approx((expected.low, expected.high))
    assert found["difference"] == pytest.approx(0.02) and found["n"] == 3
    common = summary.differences(FOUND, Line("partial", 0.05), Line("ensemble"), "nll")
    assert common["n"] == 2 and common["difference"] == pytest.approx((0.12 + 0.21) / 2)
    assert summary.differences(FOUND, Line("bayes"), Line("ensemble"), "nll") is None
    table = summary.differences_table(
        FOUND, {"1 %": Line("partial", 0.01), "none": Line("bayes")}, {"ensemble": Line("ensemble")}, "nll"
    )
    assert "+0.0200 [" in table and "missing" in table
    assert ("*" in table) == (expected.low > 0)


def test_keys_go_with_the_task():
    assert summary.paper_keys("multi-label", 1)[0] == "paper_accuracy"
    assert summary.paper_keys("segmentation", 4)[0] == "paper_dice"
    assert summary.paper_keys("segmentation", 1)[0] == "paper_iou"
    assert summary.correct_keys("segmentation", 4)[:2] == ("dice", "ged")
    assert "ged" not in summary.correct_keys("segmentation", 1)
