"""The table of a dataset: a row for each method, the best values marked by one paired test, and notes below it."""

from __future__ import annotations

import json
import math
from collections.abc import Collection, Iterable, Mapping
from typing import NamedTuple

import numpy as np
import pandas as pd

from sbn_tf.datasets.base import SEGMENTATION
from sbn_tf.experiments.result import COSTS, KEYS
from sbn_tf.experiments.rows import LEVEL, check_keys, compare_rows, holm, labelled, paired, rows
from sbn_tf.metrics import METRICS

__all__ = ["differences", "table"]

MISSING = "missing"
_COUNTS = ("num_images", "auc_num_labels")
# These depend on the number of samples, whatever distribution they are drawn from.
_OF_SAMPLES = ("ged", "ged_spread", "hungarian_iou", "paper_iou")
_BOUNDED = ("nll", "brier", "brier_skill")  # only here no method can expect to beat the "bound_..." rows


def table(
    frame: pd.DataFrame,
    metrics: Iterable[str] | None = None,
    *,
    reference: str | None = None,
    reference_metric: str = "nll",
    marks: bool = True,
    intervals: bool = True,
    digits: int | None = None,
    num_resamples: int | None = None,
) -> pd.DataFrame:
    """The table of all rows: a column of texts for each metric, the best values marked, and notes below it.

    A cell is a value with its interval; of several units mean +- standard deviation. "*" marks the best row of a
    column, and the rows that the paired test (`rows.paired`) does not set apart from it at 5 %, corrected for the
    number of rows (Holm 1979). Trivial rows are never marked; a note says where one of them is better than all. "ged",
    "hungarian_iou" and "paper_iou" depend on the number of samples: there only rows of one number are compared, the
    most frequent above 1, and a note says which.

    Args:
        frame: tidy results of one dataset; with a column `label` its values are the rows, else see `rows.labelled`.
        metrics: columns: metrics or costs; None: `KEYS` of the task.
        reference: label of a row: nothing is marked, and the first column is each row's `reference_metric` minus that
            row's, with its interval and a star where the paired test distinguishes the two.
        reference_metric: of that column.
        marks: mark the best rows.
        intervals: show intervals and standard deviations.
        digits: after the decimal point; None: as the intervals need. Costs have two.
        num_resamples: of the paired bootstrap; None: as many as the intervals were made with.

    Returns:
        A DataFrame of texts, its index the labels; `attrs["notes"]` is a list of sentences, `attrs["best"]` the labels
        of each column's best rows: several where they read the same.

    Raises:
        ValueError: an unknown metric, no results, or results that do not belong in one table.
    """
    found = rows(frame)
    tasks = [*frame["task"].unique(), SEGMENTATION]
    keys = list(KEYS[tasks[0]] if metrics is None else metrics)
    check_keys(keys)
    empty = [key for key in keys if all(row.value(key) is None for row in found)]
    if len(empty) < len(keys) and not any(row.is_missing for row in found):
        keys = [key for key in keys if key not in empty]
    if num_resamples is None:
        num_resamples = int(frame["num_resamples"].max()) if frame["num_resamples"].notna().any() else 1000
    tests = _marks(found, keys, num_resamples) if marks and reference is None else _Marks({}, [], [], False)
    reasons: dict[str, int] = {}  # reason -> its number
    cells = {key: _column(found, key, tests, reasons, intervals, digits) for key in keys}
    if reference is not None:
        name = f"{reference_metric} minus {reference}'s"
        cells = {name: differences(frame, {name: reference}, reference_metric)[name].to_dict(), **cells}
    made = pd.DataFrame(cells, index=[row.label for row in found])
    notes = [f"({number}) {reason}" for reason, number in reasons.items()]
    notes += [f"Not defined here: {key} ({found[-1].reason(key)})" for key in empty if key not in keys]
    notes += _notes(found, keys, tests, num_resamples)
    bare = [f"{key} of {row.label}" for key in keys for row in found if _is_bare(row, key)]
    if intervals and bare:
        notes.append(f"No interval, as more than 5 % of the resamples leave it undefined: {'; '.join(bare)}.")
    if not frame.empty:
        notes.append(_origin(found, frame, intervals, reference is not None))
    made.attrs["notes"] = notes
    made.attrs["best"] = {key: _shown_best(found, key, cells[key]) for key in keys}
    return made


def _column(found, key, tests, reasons, intervals, digits):
    digits, cells = _digits(found, key) if digits is None or key in COSTS else digits, {}
    most = max(len(row.values(key)) for row in found)
    for row in found:
        if row.is_missing:
            cells[row.label] = MISSING
            continue
        star = "*" if row.label in tests.labels.get(key, ()) else ""
        text = "-" if row.value(key) is None else _cell(row, key, digits, star, intervals, most)
        if len(row.values(key)) < len(row.units) and key in METRICS:
            text += f" ({reasons.setdefault(row.reason(key), len(reasons) + 1)})"
        cells[row.label] = text
    return cells


def _digits(found, key):
    """Decimals of a column: two figures of its typical half-width, three or more where values are near 1."""
    if key in _COUNTS:
        return 0
    if key not in METRICS:
        return 2
    bounds = [row.interval(key) for row in found if not row.is_trivial]
    widths = [(high - low) / 2 for low, high in (pair for pair in bounds if pair is not None) if high > low]
    if not widths:
        return 3
    return int(np.clip(1 - math.floor(math.log10(np.median(widths))), 3 if METRICS[key].high <= 2 else 1, 5))


def _cell(row, key, digits, star, intervals, most):
    number = len(row.values(key))
    text, bounds = f"{row.value(key):.{digits}f}{star}", row.interval(key)
    if intervals and key not in _COUNTS and bounds is not None:
        if number > 1 and key in METRICS:
            text += f" +- {(bounds[1] - bounds[0]) / 2:.{digits}f}"
        elif number == 1:
            text += f" [{bounds[0]:.{digits}f}, {bounds[1]:.{digits}f}]"
    alone = row.units == [(None, None)]  # a row without a seed has one unit at most
    ran = len(row.units)
    if number < ran:
        return f"{text} (n={number} of {ran})"
    return text + f" (n={number})" * (number < most and not alone)


def _is_bare(row, key):
    """Whether the row has intervals, but none for this value."""
    if key in _COUNTS or key not in METRICS or len(row.values(key)) != 1 or row.interval(key) is not None:
        return False
    return bool(row.runs["low"].notna().any())


def _best(found, key):
    """The best row that is not trivial, and the trivial ones that are better; (None, []) where nothing is better."""
    higher = METRICS[key].higher_is_better if key in METRICS else None
    scored = [row for row in _comparable(found, key) if row.value(key) is not None]
    methods = [row for row in scored if not row.is_trivial]
    if higher is None or not methods:
        return None, []
    sign = 1 if higher else -1
    best = max(methods, key=lambda row: sign * row.value(key))
    trivial = [row for row in scored if row.is_trivial and not row.is_bound]
    above = [row for row in trivial if sign * row.value(key) > sign * best.value(key)]
    return best if len(methods) > 1 else None, above  # one method is no comparison


def _shown_best(found, key, cells):
    """Labels of the rows that read as the best one."""
    best, _ = _best(found, key)
    rivals = [row.label for row in _comparable(found, key) if not row.is_trivial] if best is not None else []
    numbers = {label: cells[label].split()[0].rstrip("*") for label in rivals}
    return [label for label in rivals if numbers[label] == numbers[best.label]]


def _comparable(found, key):
    """The rows whose values of a metric may be compared."""
    return [row for row in found if row.num_samples == _usual_samples(found)] if key in _OF_SAMPLES else found


def _usual_samples(found):
    """The number of samples most frequent among the methods, above 1 if there is one; 0 if none is known."""
    known = [row.num_samples for row in found if not row.is_trivial and row.num_samples is not None]
    return max(known, key=lambda number: (number > 1, known.count(number), number), default=0)


class _Marks(NamedTuple):
    """The findings of the tests between rows."""

    labels: dict[str, set[str]]  # key -> rows to mark
    untested: list[str]  # rows that no test could compare with a best one
    too_few_resamples: list[str]  # keys for which no difference could have reached 5 %
    of_two: bool  # whether a test had one degree of freedom


def _marks(found, keys, num_resamples):
    pairs, marked = {}, {}
    for key in keys:
        best, _ = _best(found, key)
        if best is None:
            continue
        marked[key] = {best.label}
        for row in _comparable(found, key):
            if row is not best and not row.is_trivial and row.value(key) is not None:
                pairs.setdefault((best.label, row.label), []).append(key)
    by_label, records = {row.label: row for row in found}, {}
    p_values, untested, resampled, of_two = {key: {} for key in marked}, set(), set(), False
    for (best, other), columns in pairs.items():
        tests = compare_rows(by_label[best], by_label[other], columns, num_resamples, records)
        for key, one in tests.items():
            if math.isnan(one["p_value"]):
                untested.add(other)
            else:
                p_values[key][other] = one["p_value"]
                of_two |= one["n"] == 2
                if one["over"] == "images":
                    resampled.add(key)
    for key, tests in p_values.items():
        marked[key] |= {label for label, p_value in holm(tests).items() if p_value >= LEVEL}
    too_few = [key for key in keys if key in resampled and len(p_values[key]) / (num_resamples + 1) >= LEVEL]
    return _Marks(marked, sorted(untested), too_few, of_two)


# ---------------------------------------------------------------------------
# Its notes
# ---------------------------------------------------------------------------


def _notes(found, keys, marks, num_resamples):
    known = [key for key in keys if key in METRICS]
    ways = {True: "Higher is better", False: "Lower is better", None: "Neither way is better"}
    by_way = {text: [key for key in known if METRICS[key].higher_is_better is way] for way, text in ways.items()}
    notes = [". ".join(f"{text}: {', '.join(those)}" for text, those in by_way.items() if those) + "."] if known else []
    if marks.labels:
        notes.append(
            "Marked *: the best method, and those that a paired test does not set apart at 5 %, corrected for rows. "
            "The best is picked on the same images."
        )
    if marks.too_few_resamples:
        notes.append(
            f"{num_resamples} resamples are too few for a test of so many rows to reach 5 %, so none differs from the "
            f"best: {', '.join(marks.too_few_resamples)}."
        )
    if marks.of_two:
        notes.append("Two trainings hardly distinguish rows: their test has one degree of freedom.")
    notes += _notes_of_samples(found, keys, marks)
    bounds = [row.label for row in found if row.is_bound]
    others = [key for key in known if METRICS[key].higher_is_better is not None and key not in _BOUNDED]
    if bounds and others:
        notes.append(
            f"{', '.join(bounds)} is a bound for nll, brier and brier_skill alone; not for {', '.join(others)}."
        )
    if marks.untested:
        notes.append(
            "Not tested against the best (no record, other test images, undefined in many resamples, or no common "
            f"seed): {'; '.join(marks.untested)}."
        )
    above = {}
    for key in known:
        for row in _best(found, key)[1]:
            above.setdefault(row.label, []).append(key)
    if above:
        beaten = "; ".join(f"{label} in {', '.join(those)}" for label, those in above.items())
        notes.append(f"Trivial rows better than every method: {beaten}.")
    return notes


def _notes_of_samples(found, keys, marks):
    """How many samples each row has, where a number of the table depends on it."""
    shown = [key for key in keys if key in _OF_SAMPLES and any(row.value(key) is not None for row in found)]
    if not shown:
        return []
    labels = {}
    for row in found:
        if any(row.value(key) is not None for key in shown):
            labels.setdefault(row.num_samples, []).append(row.label)
    texts = [
        f"{'unknown' if number is None else number} in {', '.join(labels[number])}"
        for number in sorted(labels, key=lambda number: number or 0)
    ]
    note = f"Depends on the number of samples: {', '.join(shown)}. Samples: {'; '.join(texts)}."
    if any(key in marks.labels for key in shown):
        note += f" Compared and marked there: rows with {_usual_samples(found)}."
    elif len(labels) > 1:
        note += " So no row has a star there."
    return [note]


# Fields of a recipe that may have been changed, which its name does not say.
_CHANGED = ("epochs", "bayes_epochs", "num_samples", "keep")


def _origin(found, frame, intervals, differ):
    """One line: data, seeds, recipe and network, and the kind of the intervals."""

    def all_of(column, content=frame):
        return ", ".join(f"{value:g}" if isinstance(value, float) else str(value) for value in _unique(content[column]))

    number, name = ("num_test", "test") if frame["split"].iloc[0] == "test" else ("num_val", "validation")
    patients = all_of("num_groups")
    parts = [f"{all_of('dataset')}: {all_of(number)} {name} images" + (f" of {patients} patients" * bool(patients))]
    for unit in ("fold", "seed"):
        if values := all_of(unit):
            parts.append(f"{unit}{'s' * (', ' in values)} {values}")
    parts += [
        f"{name} {values}" for name in ("recipe", "network", "r_bayes", "limit", "size") if (values := all_of(name))
    ]
    for column, usual in (("normalisation", "train"), ("threshold", "0.5")):
        parts += [f"{column} {values}" for values in [all_of(column)] if values not in (usual, "")]
    methods = frame[~frame["method"].str.startswith(("trivial_", "bound_"))]
    settings = [json.loads(text) for text in _unique(methods["settings"])]
    changed = {key: [one[key] for one in settings if key in one] for key in _CHANGED}
    options = [json.loads(text) for text in _unique(methods["options"])]
    changed |= {key: [one[key] for one in options if key in one] for one in options for key in one}
    parts += [f"{key} {', '.join(map(str, dict.fromkeys(values)))}" for key, values in changed.items() if values]
    trainings = [len(row.units) for row in found]
    if intervals and frame["low"].notna().any() and 1 in trainings:
        over, resamples = "patients" if patients else "images", all_of("num_resamples")
        parts.append(f"[95 % interval] over {over}" + (f", {resamples} resamples" * bool(resamples)))
    if intervals and max(trainings) > 1:
        parts.append(f"+- standard deviation over {max(trainings)} trainings")
    if differ and max(trainings) > 1:
        parts.append("differences with [95 % interval] over trainings, by Student's t")
    leak = all_of("leak")
    return "; ".join(parts) + "." + (f" Leak: {leak}" if leak else "")


def _unique(column):
    return [value for value in column.dropna().unique() if value != ""]


def differences(
    frame: pd.DataFrame, references: Mapping[str, str] | Collection[str], metric: str = "nll", digits: int = 4
) -> pd.DataFrame:
    """A column of texts for each reference: the difference of each row from it, its interval, and a star.

    "*": the adjusted p-value is below 5 %. "-": the reference itself.

    Args:
        frame: tidy results of one dataset.
        references: labels; or column name -> label.
        metric: a metric or cost.
        digits: after the decimal point.
    """
    frame = frame if "label" in frame else labelled(frame)
    named = dict(references) if isinstance(references, Mapping) else {label: label for label in references}
    columns = {}
    for name, reference in named.items():
        tests = paired(frame, reference, metric).set_index("label")
        columns[name] = {label: _difference(one, digits) for label, one in tests.iterrows()} | {reference: "-"}
    order = [row.label for row in rows(frame)]
    return pd.DataFrame(columns).reindex(order)


def _difference(one, digits):
    if one["n"] == 0:
        return MISSING
    bounds = "(n=1)" if math.isnan(one["low"]) else f"[{one['low']:+.{digits}f}, {one['high']:+.{digits}f}]"
    return f"{one['difference']:+.{digits}f} {bounds}" + "*" * (one["p_adjusted"] < LEVEL)
