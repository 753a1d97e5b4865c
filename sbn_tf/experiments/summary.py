"""Many results in few numbers: the paper's Table 1 and its sweep over r_bayes, with what is missing shown as missing.

A *unit* is one training: a seed, of one fold. Spread is over units, and says nothing about other test images;
`results.table` has intervals over these.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from sbn_tf.datasets.base import SEGMENTATION
from sbn_tf.experiments.plots import format_table
from sbn_tf.experiments.results import COSTS, LEVEL, METRICS, Result, holm

__all__ = [
    "TABLE_1",
    "Line",
    "by_unit",
    "cells",
    "correct_keys",
    "differences",
    "differences_table",
    "labelled_table",
    "paired",
    "paper_keys",
    "summary_table",
    "sweep",
    "values",
]

MISSING = "missing"


class Line(NamedTuple):
    """A line of a summary: a method of `methods.METHODS`, and its share of Bayesian weights, 0..1, if it has one."""

    method: str
    r_bayes: float | None = None


# The paper's rows, in its order.
TABLE_1 = {
    "Deterministic": Line("deterministic"),
    "Ensemble": Line("ensemble"),
    "Partial 1 %": Line("partial", 0.01),
    "Partial 5 %": Line("partial", 0.05),
    "Partial 20 %": Line("partial", 0.2),
    "Bayesian": Line("partial", 1.0),
}


def paper_keys(task: str, num_raters: int) -> tuple[str, ...]:
    """The paper's three metrics of a dataset, as its code defines them."""
    quality = "paper_accuracy" if task != SEGMENTATION else "paper_dice" if num_raters > 1 else "paper_iou"
    return (quality, "paper_brier", "paper_entropy")


def correct_keys(task: str, num_raters: int) -> tuple[str, ...]:
    """Metrics that say what the paper's are meant to say."""
    of_masks = ("dice", "ged") if num_raters > 1 else ("iou",)
    quality = of_masks if task == SEGMENTATION else ("auc", "average_precision")
    return (*quality, "nll", "brier", "ece", "error_auroc")


def values(found: list[Result], line: Line, key: str) -> dict[tuple, float]:
    """(seed, fold) -> the value of a metric or cost, of the results of one dataset that a line names.

    Raises:
        ValueError: an unknown key, or results of several datasets or settings of one line, seed and fold.
    """
    if key not in METRICS and key not in COSTS:
        raise ValueError(f"Expected a key of results.METRICS or COSTS. Received: {key!r}")
    if len(names := {one.dataset for one in found}) > 1:
        raise ValueError(f"Expected results of one dataset. Received: {sorted(names)}")
    return by_unit([one for one in found if one.method == line.method and _of_rate(one, line)], key)


def by_unit(results_of_one: Iterable[Result], key: str) -> dict[tuple, float]:
    """(seed, fold) -> a metric or cost, of results that differ in seed and fold alone."""
    units = {}
    for one in results_of_one:
        unit = (one.seed, one.options.get("fold", -1))
        if unit in units:
            raise ValueError(
                f"Expected one result of {one.method!r} for each seed and fold. Received: two of seed={unit[0]}, "
                f"fold={unit[1]}: choose one recipe, split and set of options first."
            )
        units[unit] = one.metrics.get(key, one.cost.get(key))
    return {unit: value for unit, value in units.items() if value is not None}


def labelled_table(
    rows: Mapping[str, Sequence[Result]],
    keys: Collection[str],
    rival: Sequence[Result] = (),
    rival_key: str = "nll",
    rival_name: str = "the rival",
    digits: int = 4,
) -> str:
    """Markdown: a row a label, "mean +- sd" over its trainings, and its metric less a rival's in the same trainings.

    Args:
        rows: label -> results that differ in seed and fold alone; an empty list is "missing".
        keys: metrics or costs; costs have two digits.
        rival: what to compare with, or ().
        rival_key: the metric compared.
        rival_name: for the column.
        digits: after the decimal point, of metrics.
    """
    most = max((len(found) for found in rows.values()), default=0)
    shown = {}
    for label, found in rows.items():
        shown[label] = {key: _cell(key, by_unit(found, key), bool(found), most, digits) for key in keys}
    if rival:
        theirs, column = by_unit(rival, rival_key), f"{rival_key} less {rival_name}'s"
        gaps = {label: paired(by_unit(found, rival_key), theirs) for label, found in rows.items()}
        for label, text in _differences(gaps).items():
            shown[label][column] = text
    return format_table(shown, [*keys, *([column] if rival else [])])


def _differences(found):
    """Label -> text of a difference; those that a test tells from 0, corrected for their number, have a star."""
    tested = {label: one["p_value"] for label, one in found.items() if one is not None and one["p_value"] >= 0}
    starred = {label for label, p_value in holm(tested).items() if p_value < LEVEL}
    texts = {}
    for label, one in found.items():
        if one is None:
            texts[label] = MISSING
            continue
        bounds = f"[{one['low']:+.4f}, {one['high']:+.4f}]" if one["n"] > 1 else "(n=1)"
        same = one["difference"] == 0 and np.isnan(one["low"])
        texts[label] = "-" if same else f"{one['difference']:+.4f} {bounds}" + "*" * (label in starred)
    return texts


def _close(rate, wanted):
    return rate is not None and abs(rate - wanted) <= 1e-9 + 1e-6 * wanted


def cells(
    found: list[Result], lines: dict[str, Line], keys: Collection[str], digits: int = 3
) -> dict[str, dict[str, str]]:
    """Label -> key -> "mean +- sd", of one unit the value alone; "(n=2)" where it has fewer units than the most.

    What was not run is "missing"; what is undefined in all runs is "-".
    """
    rows = {label: {key: values(found, line, key) for key in keys} for label, line in lines.items()}
    most = max((len(units) for row in rows.values() for units in row.values()), default=0)
    shown = {}
    for label, row in rows.items():
        ran = any(one.method == lines[label].method and _of_rate(one, lines[label]) for one in found)
        shown[label] = {key: _cell(key, units, ran, most, digits) for key, units in row.items()}
    return shown


def _of_rate(one, line):
    return line.r_bayes is None or _close(one.r_bayes, line.r_bayes)


def _cell(key, units, ran, most, digits):
    if not units:
        return "-" if ran else MISSING
    numbers, digits = list(units.values()), 2 if key in COSTS else digits
    if all(seed is None for seed, _ in units):  # what needs no seed has one unit
        most = len(units)
    text = f"{np.mean(numbers):.{digits}f}"
    if len(numbers) > 1:
        text += f" +- {np.std(numbers, ddof=1):.{digits}f}"
    return text + f" (n={len(numbers)})" * (len(numbers) < most)


def summary_table(by_dataset: dict[str, list[Result]], lines: dict[str, Line], keys: dict, digits: int = 3) -> str:
    """A Markdown table over several datasets: a row for each line, columns `dataset: key`.

    Args:
        by_dataset: name -> its results; an empty list: nothing was run, all of its cells are "missing".
        lines: label -> line.
        keys: name -> keys of that dataset.
        digits: after the decimal point.
    """
    rows = {label: {} for label in lines}
    for name, found in by_dataset.items():
        for label, row in cells(found, lines, keys[name], digits).items():
            rows[label] |= {f"{name}: {key}": text for key, text in row.items()}
    columns = [f"{name}: {key}" for name in by_dataset for key in keys[name]]
    return format_table(rows, columns)


def sweep(found: list[Result], key: str, method: str = "partial") -> dict[float, list[float]]:
    """r_bayes -> the values of all units, of one dataset, from the smallest share to the largest."""
    rates = sorted({one.r_bayes for one in found if one.method == method and one.r_bayes is not None})
    shares = {rate: list(values(found, Line(method, rate), key).values()) for rate in rates}
    return {rate: numbers for rate, numbers in shares.items() if numbers}


def differences(found: list[Result], line: Line, rival: Line, key: str) -> dict | None:
    """Paired difference of two lines over their common units: its mean, 95 % interval (Student's t) and number.

    Returns:
        {"difference", "low", "high", "p_value", "n"}; all but the first and last are NaN of fewer than two units. Seeds
        of one fold share its images: of several folds, each counts once, by the mean over its seeds. None where there
        is no common unit.
    """
    return paired(values(found, line, key), values(found, rival, key))


def paired(ours: dict[tuple, float], theirs: dict[tuple, float]) -> dict | None:
    """The same of two dicts, unit -> value."""
    from scipy import stats

    by_fold = {}
    for unit in sorted(set(ours) & set(theirs), key=str):
        by_fold.setdefault(unit[1], []).append(ours[unit] - theirs[unit])
    if not by_fold:
        return None
    # Seeds of one fold share its images: where there are folds, a fold counts once.
    gaps = [np.mean(one) for one in by_fold.values()] if len(by_fold) > 1 else next(iter(by_fold.values()))
    found = {"difference": float(np.mean(gaps)), "low": np.nan, "high": np.nan, "p_value": np.nan, "n": len(gaps)}
    if len(gaps) > 1 and np.ptp(gaps) > 0:
        test = stats.ttest_1samp(gaps, 0.0)
        interval = test.confidence_interval(0.95)
        found |= {"low": float(interval.low), "high": float(interval.high), "p_value": float(test.pvalue)}
    return found


def differences_table(found: list[Result], lines: dict[str, Line], rivals: dict[str, Line], key: str) -> str:
    """Markdown: each line's metric less each rival's, over the same trainings, with its 95 % interval.

    "*": a paired t-test tells the two apart at 5 %, corrected for the number of rows (Holm).
    """
    columns = {
        name: _differences({label: differences(found, line, rival, key) for label, line in lines.items()})
        for name, rival in rivals.items()
    }
    return format_table({label: {name: columns[name][label] for name in rivals} for label in lines}, list(rivals))
