"""Rows of a table of results: the units of one method and setting, and the one paired test between two rows.

A *unit* is one training: a seed, of one fold. A row has a label and all units of one method and setting. Two rows are
compared over the units that both have: by a paired t-test, where a fold counts once; of one unit, by a bootstrap of its
images or patients.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from sbn_tf.experiments import scoring
from sbn_tf.experiments.result import COSTS
from sbn_tf.experiments.results import as_key, recipe_settings
from sbn_tf.metrics import METRICS

__all__ = ["labelled", "paired", "rows", "sweep"]

LEVEL = 0.05  # of all tests: what a star says


@dataclass
class Row:
    """All units of one method and setting.

    Args:
        label: its name in a table.
        runs: its part of a frame; empty where nothing was run.
    """

    label: str
    runs: pd.DataFrame

    @cached_property
    def _cells(self):
        kinds = self.runs[["fold", "seed"]].astype("object").where(self.runs[["fold", "seed"]].notna(), None)
        units = list(zip(kinds["fold"], kinds["seed"], strict=True))
        columns = (self.runs[key] for key in ("metric", "value", "low", "high", "note", "folder"))
        found = {}
        for unit, metric, *cell in zip(units, *columns, strict=True):
            if unit in found.setdefault(metric, {}):
                raise ValueError(
                    f"Expected one result of {self.label!r} for each seed and fold. Received: two of seed={unit[1]}, "
                    f"fold={unit[0]}: choose one recipe, split and set of options first."
                )
            found[metric][unit] = cell
        return found

    @property
    def is_missing(self) -> bool:
        """Whether nothing was run."""
        return self.runs.empty

    @property
    def is_bound(self) -> bool:
        """Whether it is a bound, which no method can expect to beat in `nll`, `brier` and `brier_skill`."""
        return self.runs["method"].str.startswith("bound_").any()

    @property
    def is_trivial(self) -> bool:
        """Whether it is a bound or a predictor that ignores the image."""
        return self.is_bound or self.runs["method"].str.startswith("trivial_").any()

    @property
    def units(self) -> list[tuple[int | None, int | None]]:
        """(fold, seed) of each training."""
        return list(dict.fromkeys(unit for cells in self._cells.values() for unit in cells))

    @property
    def num_samples(self) -> int | None:
        """Samples behind one prediction; None where unknown."""
        known = self.runs["num_samples"].dropna()
        return int(known.iloc[0]) if len(known) else None

    def values(self, key: str) -> dict[tuple[int | None, int | None], float]:
        """(fold, seed) -> value of a metric or cost, where it is defined."""
        return {unit: float(cell[0]) for unit, cell in self._cells.get(key, {}).items() if not math.isnan(cell[0])}

    def value(self, key: str) -> float | None:
        """Mean over units; None where it is undefined in all."""
        values = list(self.values(key).values())
        return float(np.mean(values)) if values else None

    def interval(self, key: str) -> tuple[float, float] | None:
        """Of one unit its interval over images or patients; of several the mean -+ the standard deviation."""
        values = self.values(key)
        if len(values) > 1:
            middle, spread = float(np.mean(list(values.values()))), float(np.std(list(values.values()), ddof=1))
            return middle - spread, middle + spread
        for unit in values:
            low, high = self._cells[key][unit][1:3]
            return None if math.isnan(low) else (low, high)
        return None

    def reason(self, key: str) -> str:
        """Why the metric is undefined."""
        return next((cell[3] for cell in self._cells.get(key, {}).values() if cell[3]), "not measured for this row")

    def record(self, unit: tuple[int | None, int | None]) -> scoring.Record | None:
        """The `scoring.Record` of a unit; None where there is none."""
        folders = [cells[unit][4] for cells in self._cells.values() if unit in cells and cells[unit][4]]
        path = Path(folders[0]) / "record.npz" if folders else None
        return scoring.Record.load(path) if path is not None and path.exists() else None


def labelled(frame: pd.DataFrame, lines: Mapping[str, Mapping[str, Any]] | None = None) -> pd.DataFrame:
    """The frame with a column `label`, which says what row of a table each result belongs to.

    Args:
        frame: tidy results.
        lines: label -> {column: value, or list of values}: results that match no line are left out, and a line without
            results is shown as "missing". None: the label is the method, with the settings in which its rows differ.
    """
    if lines is not None:
        parts = [frame[_matches(frame, line)].assign(label=label) for label, line in lines.items()]
        found = pd.concat(parts) if parts else frame.assign(label="")
        return found.assign(label=pd.Categorical(found["label"], list(lines)))
    frame = frame.assign(_row=as_key(frame, ("method", *_SETTINGS)))
    runs = frame.drop_duplicates("_row").set_index("_row")
    labels = dict.fromkeys(runs.index, "")
    for method, alike in runs.groupby("method", sort=False):
        contents = {key: _content(run) for key, run in alike.iterrows()}
        places = _telling(list(contents.values()))
        for key, content in contents.items():
            labels[key] = ", ".join([method, *(f"{place}={content.get(place)}" for place in places)])
    return frame.assign(label=pd.Categorical(frame.pop("_row").map(labels), list(dict.fromkeys(labels.values()))))


# Columns in which two rows of one method may differ, simple ones first.
_SIMPLE = ("split", "r_bayes", "recipe", "network", "size", "limit", "normalisation", "threshold", "num_samples")
_SETTINGS = (*_SIMPLE, "options", "settings")


def _content(run):
    simple = {key: None if pd.isna(run[key]) else run[key] for key in _SIMPLE}
    options = {f"data {key}": value for key, value in json.loads(run["options"]).items()}
    return simple | options | recipe_settings(run["settings"])


def _telling(contents):
    """Few settings by whose values all contents differ."""
    places = list(dict.fromkeys(place for content in contents for place in content))
    chosen, kinds = [], 1
    for place in places:
        number = len({json.dumps([content.get(p) for p in [*chosen, place]]) for content in contents})
        if number > kinds:
            chosen, kinds = [*chosen, place], number
    return chosen


def _matches(frame, line):
    found = pd.Series(True, frame.index)
    for column, wanted in line.items():
        wanted = wanted if isinstance(wanted, list | tuple | set) else [wanted]
        if column == "r_bayes":
            found &= np.isclose(frame[column].to_numpy()[:, None], list(wanted), rtol=1e-6, atol=1e-9).any(axis=1)
        else:
            found &= frame[column].isin(list(wanted))
    return found


def rows(frame: pd.DataFrame) -> list[Row]:
    """The rows of a table, in the order of their labels: see `labelled`, which gives the labels where they lack.

    Raises:
        ValueError: no result, results of several datasets, or two of one label, seed and fold.
    """
    if frame.empty and "label" not in frame:
        raise ValueError("Expected one result or more. Received: none. Run a method first.")
    if len(kinds := sorted(set(frame["dataset"]))) > 1:
        raise ValueError(f"Expected results of one dataset: a table for each. Received: {kinds}")
    frame = frame if "label" in frame else labelled(frame)
    labels = frame["label"].cat.categories if hasattr(frame["label"], "cat") else frame["label"].unique()
    found = [Row(label, frame[frame["label"] == label]) for label in labels]
    for row in found:
        _ = row.units  # two of one seed and fold are refused here
    return found


def sweep(frame: pd.DataFrame, metric: str, method: str = "partial") -> dict[float, list[float]]:
    """r_bayes -> the metric's values of all units of one dataset, from the smallest share to the largest."""
    chosen = frame[(frame["method"] == method) & (frame["metric"] == metric)].dropna(subset=["r_bayes", "value"])
    found = {rate: part.assign(label=method) for rate, part in chosen.groupby("r_bayes")}
    return {float(rate): list(row.values(metric).values()) for rate, part in found.items() for row in rows(part)}


# ---------------------------------------------------------------------------
# Two rows
# ---------------------------------------------------------------------------


def paired(
    frame: pd.DataFrame,
    reference: str,
    metric: str,
    by: Sequence[str] = ("dataset",),
    num_resamples: int = 1000,
) -> pd.DataFrame:
    """Each row's metric minus that of a reference row, over the units that both have.

    Of several units: mean difference, 95 % interval and p-value of a paired t-test. Seeds of one fold share its
    images, so where there are several folds each counts once, by the mean over its seeds. Of one unit: the paired
    bootstrap over images or patients (`scoring.compare`), where both records are there. p-values are adjusted for the
    number of rows (Holm 1979).

    Args:
        frame: tidy results.
        reference: label of the row to compare with, as `labelled` gives it.
        metric: a metric or cost.
        by: columns: rows are compared within each of their values.
        num_resamples: of the bootstrap.

    Returns:
        One row for each label but the reference: the columns of `by`, label, difference, low, high, p_value,
        p_adjusted, n (units, or folds where there are several) and over ("seeds", "folds", "images", or "" where there
        is no common unit). Numbers that are unknown are NaN.

    Raises:
        ValueError: an unknown metric, or a reference that no results have.
    """
    check_keys([metric])
    frame = frame if "label" in frame else labelled(frame)
    parts = [(group, part) for group, part in frame.groupby(list(by), observed=True)] or [((None,) * len(by), frame)]
    found = []
    for group, part in parts:
        by_label = {row.label: row for row in rows(part)}
        if reference not in by_label:
            raise ValueError(f"Expected a reference among {', '.join(by_label)}. Received: {reference!r}")
        rival, records = by_label.pop(reference), {}
        tests = {
            label: compare_rows(row, rival, [metric], num_resamples, records)[metric] for label, row in by_label.items()
        }
        adjusted = holm({label: one["p_value"] for label, one in tests.items() if one["p_value"] >= 0})
        found += [
            {**dict(zip(by, group, strict=True)), "label": label, **one, "p_adjusted": adjusted.get(label, np.nan)}
            for label, one in tests.items()
        ]
    numbers = ["difference", "low", "high", "p_value", "p_adjusted", "n", "over"]
    return pd.DataFrame(found, columns=[*by, "label", *numbers])


_NO_TEST = {"difference": np.nan, "low": np.nan, "high": np.nan, "p_value": np.nan, "n": 0, "over": ""}


def compare_rows(row: Row, other: Row, metrics: Iterable[str], num_resamples: int, records: dict) -> dict[str, dict]:
    """Metric -> the paired test of two rows, as in `paired`; `records` keeps the records read so far."""
    found, single = {}, {}
    for key in metrics:
        ours, theirs = row.values(key), other.values(key)
        gaps = {unit: ours[unit] - theirs[unit] for unit in ours if unit in theirs}
        found[key] = _over_units(gaps) if gaps else dict(_NO_TEST)
        if len(gaps) == 1 and found[key]["difference"] != 0:
            single.setdefault(next(iter(gaps)), []).append(key)
    for unit, keys in single.items():
        for one in (row, other):
            if (one.label, unit) not in records:
                records[one.label, unit] = one.record(unit)
        mine, its = records[row.label, unit], records[other.label, unit]
        if mine is None or its is None:
            continue
        try:
            tests = scoring.compare(mine, its, keys=keys, num_resamples=num_resamples)
        except ValueError:  # of other images, such as another fold's
            continue
        found |= {key: {**tests[key], "n": 1, "over": "images"} for key in keys if key in tests}
    return found


def _over_units(gaps: dict) -> dict:
    from scipy import stats

    by_fold = {}
    for (fold, _), gap in sorted(gaps.items(), key=str):
        by_fold.setdefault(fold, []).append(gap)
    folds = len(by_fold) > 1
    numbers = [float(np.mean(one)) for one in by_fold.values()] if folds else next(iter(by_fold.values()))
    difference = float(np.mean(numbers))
    found = {**_NO_TEST, "difference": difference, "n": len(numbers), "over": "folds" if folds else "seeds"}
    if np.ptp(numbers) == 0:  # t is 0/0 or infinite; of one unit only equality is known
        if difference == 0 or len(numbers) > 1:
            found |= {"low": difference, "high": difference, "p_value": float(difference == 0)}
        return found
    test = stats.ttest_1samp(numbers, 0.0)
    low, high = test.confidence_interval(0.95)
    return found | {"low": float(low), "high": float(high), "p_value": float(test.pvalue)}


def holm(p_values: Mapping[str, float]) -> dict[str, float]:
    """Label -> p adjusted for their number (Holm 1979): the smallest times n, the next times n - 1, never falling."""
    adjusted, least = {}, 0.0
    for rank, (label, p_value) in enumerate(sorted(p_values.items(), key=lambda item: item[1])):
        least = max(least, min(1.0, (len(p_values) - rank) * p_value))
        adjusted[label] = least
    return adjusted


def check_keys(keys: Iterable[str]) -> None:
    """Raise ValueError where a key is neither a metric nor a cost."""
    if unknown := [key for key in keys if key not in METRICS and key not in COSTS and not key.startswith("shift: ")]:
        raise ValueError(f"Expected keys among {[*METRICS, *COSTS]}. Received: {unknown}")
