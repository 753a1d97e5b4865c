"""The table of a dataset, by hand: its cells, its stars and its notes."""

import numpy as np
import pytest
from helpers import mask_result as result
from helpers import of_task, record_of

from sbn_tf.datasets.base import MULTI_LABEL, SEGMENTATION
from sbn_tf.experiments.report import to_markdown
from sbn_tf.experiments.result import KEYS, write
from sbn_tf.experiments.results import frame
from sbn_tf.experiments.rows import labelled
from sbn_tf.experiments.table import table
from sbn_tf.metrics import METRICS

RNG = np.random.default_rng(0)


def cells_of(given, *arguments, **options):
    """Row name -> cells of its table, and the notes below it."""
    shown = table(frame(given), *arguments, **options)
    return {"": list(shown.columns), **{label: list(cells) for label, *cells in shown.itertuples()}}, shown.attrs[
        "notes"
    ]


def test_table_by_hand():
    rows = [
        result("trivial_prevalence", None, {"dice": 0.1, "nll": 0.05}, num_groups=3),
        result("deterministic", 0, {"dice": 0.61234}, num_groups=3, intervals={"dice": [0.58, 0.641]}),
        result("partial", 0, {"dice": 0.7, "nll": 0.09}, num_groups=3, intervals={"dice": [0.66, 0.72]}, r_bayes=0.01),
    ]
    assert to_markdown(table(frame(rows), ["dice", "nll", "entropy", "ged"])) == "\n".join(
        [
            "|                    |                  dice |    nll | entropy |",
            "| :----------------- | --------------------: | -----: | ------: |",
            "| trivial_prevalence |                 0.100 |  0.050 |   0.200 |",
            "| deterministic      |  0.612 [0.580, 0.641] |  0.100 |   0.200 |",
            "| partial            | 0.700* [0.660, 0.720] | 0.090* |   0.200 |",
            "",
            "Not defined here: ged (no image has two or more valid raters)  ",
            "Higher is better: dice. Lower is better: nll. Neither way is better: entropy.  ",
            "Marked *: the best method, and those that a paired test does not set apart at 5 %, corrected for rows. "
            "The best is picked on the same images.  ",
            "Not tested against the best (no record, other test images, undefined in many "
            "resamples, or no common seed): deterministic.  ",
            "Trivial rows better than every method: trivial_prevalence in nll.  ",
            "No interval, as more than 5 % of the resamples leave it undefined: nll of deterministic; nll of partial; "
            "entropy of deterministic; entropy of partial.  ",
            "phantom_nodule: 5 test images of 3 patients; seed 0; recipe quick; network unet_small; r_bayes 0.01; "
            "size 32; [95 % interval] over patients, 1000 resamples.",
        ]
    )


def test_table_without_intervals_and_of_the_task():
    cells, notes = cells_of([result(intervals={"dice": [0.7, 0.9]}, leak="twins.")], intervals=False)
    assert cells[""] == [key for key in KEYS[SEGMENTATION] if key in result().metrics]
    assert cells["partial"][0] == "0.800"  # alone it is no best
    assert "interval" not in notes[-1] and notes[-1].endswith("network unet_small; size 32. Leak: twins.")
    with pytest.raises(ValueError, match=r"Expected keys among .* Received: \['f2'\]"):
        table(frame([result()]), ["f2"])


def test_table_gives_every_reason_once():
    reasons = {"ged": "one rater", "error_auroc": "no errors"}
    rows = [result(undefined=reasons), result("a", undefined={"ged": "one rater"})]
    rows.append(result("b", metrics={"ged": 0.2}, undefined={}, num_samples=5))
    cells, notes = cells_of(rows, ["ged", "error_auroc"])
    assert cells["partial"] == ["- (1)"] and cells["a"] == ["- (1)"] and cells["b"] == ["0.200"]
    assert notes[0] == "(1) one rater" and notes[1].startswith("Not defined here: error_auroc (")
    rows[2].metrics["error_auroc"] = 0.7
    cells, notes = cells_of(rows, ["ged", "error_auroc"])
    assert cells["partial"] == ["- (1)", "- (2)"] and cells["a"] == ["- (1)", "- (3)"]
    assert notes[:3] == ["(1) one rater", "(2) no errors", "(3) not measured for this row"]


def test_the_line_below_tells_what_a_recipes_name_does_not():
    changed = {"epochs": 1, "bayes_epochs": 2, "num_samples": 7, "keep": "best", "momentum": 0.0}
    row = result(settings=changed, options={"fold": 2}, threshold=0.3, normalisation="paper")
    last = cells_of([row], ["dice"])[1][-1]
    told = "normalisation paper; threshold 0.3; epochs 1; bayes_epochs 2; num_samples 7; keep best."
    assert told in last and "; fold 2;" in last and "momentum" not in last


def test_table_of_several_seeds():
    dice = {"partial": (0.80, 0.82, 0.84), "worse": (0.70, 0.721, 0.739), "alike": (0.83, 0.80, 0.82)}
    rows = [result(name, seed, {"dice": value}) for name, values in dice.items() for seed, value in enumerate(values)]
    cells, notes = cells_of(rows, ["dice"])
    # Paired differences of worse: .100, .099, .101, t = 173; of alike: -.03, .02, .02, t = 0.2.
    assert cells["partial"] == ["0.820* +- 0.020"]
    assert cells["worse"] == ["0.720 +- 0.020"]
    assert cells["alike"] == ["0.817* +- 0.015"]
    assert not any("Not tested" in note for note in notes)
    assert notes[-1].endswith("+- standard deviation over 3 trainings.") and "seeds 0, 1, 2;" in notes[-1]
    cells, notes = cells_of([*rows, result("other seed", 7, {"dice": 0.9})], ["dice"])
    assert cells["other seed"] == ["0.900* (n=1)"] and cells["partial"] == ["0.820 +- 0.020"]
    assert any(note.endswith("or no common seed): alike; partial; worse.") for note in notes)


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
    cells, notes = cells_of([*rows, other], ["brier"], num_resamples=200)
    assert cells["best"][0].endswith("*") and cells["alike"][0].endswith("*")
    assert not cells["worse"][0].endswith("*") and not cells["elsewhere"][0].endswith("*")
    assert any(note.endswith("no common seed): elsewhere.") for note in notes)


@pytest.mark.parametrize("key", ["ged", "hungarian_iou", "paper_iou"])
def test_rows_of_other_numbers_of_samples_are_not_compared(key):
    better = 1 if METRICS[key].higher_is_better else -1
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
    cells, notes = cells_of(rows, [key])
    assert [label for label, row in cells.items() if row[0].endswith("*")] == ["partial"]  # not "ten", not "old"
    note = next(note for note in notes if note.startswith("Depends"))
    assert note == (
        f"Depends on the number of samples: {key}. Samples: unknown in old; 1 in trivial_prevalence, one, two; "
        "5 in trivial_level_sets, ensemble, partial; 10 in ten. Compared and marked there: rows with 5."
    )
    assert "Trivial rows better than every method: trivial_level_sets in " + key + "." in notes
    cells, notes = cells_of(rows, ["dice"])
    assert not any(note.startswith("Depends") for note in notes) and cells["ten"] == ["0.800*"]


def test_of_single_samples_alone_the_marks_are_among_them():
    rows = [result(name, metrics={"ged": ged}, num_samples=1, undefined={}) for name, ged in (("a", 0.4), ("b", 0.5))]
    cells, notes = cells_of(rows, ["ged"])
    assert cells["a"] == ["0.400*"] and any(note.endswith("rows with 1.") for note in notes)


def test_a_bound_is_one_for_proper_scores_alone():
    rows = [result("bound_scene", None), result(metrics={"dice": 0.9})]
    _, notes = cells_of(rows, ["nll", "brier", "entropy", "dice", "ece"])
    assert "bound_scene is a bound for nll, brier and brier_skill alone; not for dice, ece." in notes
    for shown, keys in ((rows, ["nll", "brier"]), (rows[1:], ["nll", "dice"])):
        assert not any("bound" in note for note in cells_of(shown, keys)[1])


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
    cells, notes = cells_of(rows, ["brier"])
    assert all(cells[name][0].endswith("*") for name in "abc")
    assert any(note.startswith("30 resamples are too few") and note.endswith("from the best: brier.") for note in notes)
    cells, notes = cells_of(rows, ["brier"], num_resamples=300)
    assert not cells["b"][0].endswith("*") and not any("too few" in note for note in notes)


def test_two_seeds_can_hardly_tell_and_a_missing_value_is_said():
    dice = {"a": (0.8, 0.82), "b": (0.7, 0.73)}
    rows = [result(name, seed, {"dice": value}) for name, values in dice.items() for seed, value in enumerate(values)]
    cells, notes = cells_of(rows, ["dice"])
    assert cells["a"] == ["0.810* +- 0.014"]
    assert "Two trainings hardly distinguish rows: their test has one degree of freedom." in notes
    del rows[1].metrics["dice"]
    rows[1].undefined = {"dice": "it diverged"}
    cells, notes = cells_of(rows, ["dice"])
    assert cells["a"] == ["0.800* (n=1 of 2) (1)"] and notes[0] == "(1) it diverged"
    three = [result("c", seed, {"nll": 0.1 + 0.1 * seed}) for seed in range(3)]
    del three[2].metrics["nll"]
    three[2].undefined = {"nll": "it diverged"}
    assert cells_of(three, ["nll"])[0]["c"] == ["0.150 +- 0.071 (n=2 of 3) (1)"]


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
    cells, _ = cells_of([result(metrics={"nll": value}, intervals={"nll": bounds})], ["nll"])
    assert cells["partial"] == [text]


def test_counts_are_shown_as_integers():
    cells, _ = cells_of([result(metrics={"num_images": 5.0})], ["num_images"])
    assert cells["partial"] == ["5"]


# ---- rows that were asked for

NLL = {("partial", 0.01): [0.10, 0.12, 0.11], ("partial", 0.05): [0.2, 0.3], ("ensemble", None): [0.08, 0.09, 0.10]}
FOUND = [
    result(method, seed=seed, metrics={"nll": value}, r_bayes=rate, cost={"train_flops_ratio": 2.0 + seed})
    for (method, rate), numbers in NLL.items()
    for seed, value in enumerate(numbers)
]
LINES = {
    "1 %": {"method": "partial", "r_bayes": 0.01},
    "5 %": {"method": "partial", "r_bayes": [0.05]},
    "ensemble": {"method": "ensemble"},
    "none": {"method": "temperature"},
}


def test_what_is_missing_is_said_to_be_and_never_a_number():
    cells = table(labelled(frame(FOUND), LINES), ["nll", "ged", "train_flops_ratio"], digits=3)
    assert list(cells.index) == list(LINES)
    spread = np.std([0.10, 0.12, 0.11], ddof=1)
    assert cells.loc["1 %"].tolist() == [f"0.110* +- {spread:.3f}", "- (1)", "3.00"]
    assert cells.loc["5 %", "nll"] == "0.250* +- 0.071 (n=2)"  # 0.05 * sqrt(2)
    assert cells.loc["none"].tolist() == ["missing"] * 3
    no_seed = result("trivial_prevalence", seed=None, metrics={"nll": 0.5})  # one is all there can be
    lines = {**LINES, "p": {"method": "trivial_prevalence"}}
    assert table(labelled(frame([*FOUND, no_seed]), lines), ["nll"]).loc["p", "nll"] == "0.500"
    nothing = table(labelled(frame([]), LINES), ["nll", "dice"])
    assert (nothing == "missing").all().all() and nothing.shape == (4, 2)


def test_with_a_reference_the_difference_comes_first():
    cells = table(labelled(frame(FOUND), LINES), ["nll"], reference="ensemble")
    assert list(cells.columns) == ["nll minus ensemble's", "nll"]
    assert cells.attrs["best"] == {"nll": ["ensemble"]}
    assert cells.loc["1 %", "nll minus ensemble's"].startswith("+0.0200 [")
    assert cells.loc["ensemble"].tolist() == ["-", "0.090 +- 0.010"]
    assert (
        cells.loc["none"].tolist() == ["missing", "missing"] and not cells["nll"].str.contains("*", regex=False).any()
    )


def test_the_best_rows_are_those_that_read_the_same_trivial_ones_aside():
    values = {"deterministic": 0.0281, "ensemble": 0.0279, "temperature": 0.0301, "trivial_prevalence": 0.0100}
    shown = table(
        frame([result(name, 0, {"nll": value}) for name, value in values.items()]), ["nll", "entropy"], digits=3
    )
    assert shown.attrs["best"] == {"nll": ["deterministic", "ensemble"], "entropy": []}
