"""Results of many runs: one tidy pandas DataFrame.

A *frame* has a row for each run and metric: the columns `RUN` (what was run), `metric`, `value`, `low` and `high` (its
interval) and `note` (why a value is missing). Costs and shifts are metrics like the others. `result` has the one run,
`rows` and `report` the tests and tables that are made of a frame.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pandas as pd
from filelock import FileLock

from sbn_tf.core.files import write_atomically
from sbn_tf.datasets.base import TASKS
from sbn_tf.experiments import folders
from sbn_tf.experiments.recipes import Recipe
from sbn_tf.experiments.result import COSTS, REQUIRED, Result, read
from sbn_tf.metrics import METRICS

__all__ = ["collect", "frame", "read_csv", "wide"]

_COUNTS = ("seed", "fold", "num_samples", "size", "limit", "num_train", "num_val", "num_test", "num_groups")
# Columns of a frame that say what was run. `settings` and `options` are JSON: the recipe's fields that differ from
# their defaults, and the dataset's options other than the fold.
RUN = (
    *("dataset", "task", "split", "fold", "seed", "method", "r_bayes", "recipe", "network", "num_samples", "size"),
    *("limit", "normalisation", "threshold", "num_train", "num_val", "num_test", "num_groups", "leak", "num_resamples"),
    *("options", "settings", "title", "versions", "commit", "folder"),
)
# Two runs that differ in none of these are the same run.
_IDENTITY = (
    *("dataset", "split", "recipe", "network", "method", "r_bayes", "seed", "fold", "num_samples", "size", "limit"),
    *("options", "normalisation", "settings", "threshold"),
)
_MEASURED = ("metric", "value", "low", "high", "note")
_DIGITS = 7  # significant ones of a number in a CSV
_DEFAULTS = {one.name: one.default for one in dataclasses.fields(Recipe) if one.name != "name"}


def frame(results: Iterable[Result]) -> pd.DataFrame:
    """The tidy DataFrame of results: a row for each run and metric.

    A metric that is undefined has the value NaN, and `note` gives the reason; a cost that is unknown has no row. The
    AUROCs of shifted images are the metrics `shift: <kind>: <uncertainty>`.
    """
    rows = []
    for one in results:
        run = _run(one)
        for key, value in _values(one):
            low, high = one.intervals.get(key, (None, None))
            rows.append({**run, "metric": key, "value": value, "low": low, "high": high, "note": ""})
        rows += [{**run, "metric": key, "note": why} for key, why in one.undefined.items()]
    return _typed(pd.DataFrame(rows, columns=[*RUN, *_MEASURED]))


def _run(one):
    run = {key: getattr(one, key) for key in RUN if key in Result.model_fields}
    settings = {key: value for key, value in one.settings.items() if key != "name" and _DEFAULTS.get(key, ...) != value}
    run["fold"] = one.options.get("fold")
    run["num_samples"] = one.num_samples or one.cost.get("num_samples")
    run["options"] = json.dumps({key: value for key, value in one.options.items() if key != "fold"}, sort_keys=True)
    run["settings"] = json.dumps(settings, sort_keys=True)
    run["versions"] = json.dumps(one.versions, sort_keys=True)
    cut = one.evaluation.get("threshold", one.threshold)
    run["threshold"] = "" if cut is None else str(cut)
    run["num_resamples"] = one.evaluation.get("num_resamples")
    run["r_bayes"] = None if one.r_bayes is None else float(f"{one.r_bayes:.{_DIGITS}g}")
    run["folder"] = "" if one.folder is None else str(one.folder)
    return run


def _values(one):
    """(key, value) of everything that was measured and is known: metrics, costs and shifts."""
    found = one.metrics | {key: value for key, value in one.cost.items() if key != "num_samples"}  # a column of `RUN`
    for kind, scores in one.shift.items():
        found |= {f"shift: {kind}: {key}": scores.get(key) for key in ("severity", "entropy", "mutual_information")}
    return [(key, value) for key, value in found.items() if value is not None]


def _typed(content):
    whole = dict.fromkeys((*_COUNTS, "num_resamples"), "Int64")
    real = dict.fromkeys(("r_bayes", "value", "low", "high"), "float64")
    text = {key: "str" for key in content.columns if key not in whole and key not in real}
    content = content.fillna(dict.fromkeys(text, ""))
    return content.astype({key: kind for key, kind in (whole | real | text).items() if key in content.columns})


def recipe_settings(settings: str) -> dict[str, Any]:
    """All fields of a recipe but its name, from the `settings` column of a frame."""
    return _DEFAULTS | json.loads(settings)


def collect(
    folder: str | os.PathLike | None, dataset: str | None = None, split: str | None = "test", damaged: str = "refuse"
) -> pd.DataFrame:
    """The tidy DataFrame of all results below a folder, in the order of their paths.

    Args:
        folder: searched for files `metrics.json`, at any depth; None: `runs/` of the repository.
        dataset: its results only; None: all.
        split: "test" or "val"; None: both.
        damaged: "refuse", or "skip" files that are no result of this format, with one warning.

    Raises:
        ValueError: a file that is no result, unless it is skipped.
    """
    root = folders.repository() / "runs" if folder is None else Path(folder)
    found, skipped = [], []
    for path in sorted(root.glob("**/metrics.json")):
        try:
            found.append(read(path))
        except ValueError as error:
            if damaged != "skip":
                raise
            skipped.append(str(error))
    if skipped:
        warnings.warn(f"Left out {len(skipped)} file(s) that are no result. {skipped[0]}", stacklevel=2)
    chosen = [one for one in found if dataset in (None, one.dataset) and split in (None, one.split)]
    return frame(chosen)


def wide(frame: pd.DataFrame) -> pd.DataFrame:
    """One row for each run, in the frame's order: the columns of `RUN`, and a column of values for each metric."""
    return _by_run(frame)[0]


def _by_run(frame):
    """The wide table; low, high and note of each run and metric in tables of the same rows."""
    keys = [key for key in frame.columns if key not in _MEASURED]
    number = frame.groupby(keys, dropna=False, sort=False, observed=True).ngroup().rename("_run")
    order = list(dict.fromkeys(frame["metric"]))
    tables = {}
    for part in ("value", "low", "high", "note"):
        table = frame.assign(_run=number).pivot(index="_run", columns="metric", values=part)
        tables[part] = table.reindex(columns=order).reset_index(drop=True).rename_axis(columns=None)
    runs = frame.assign(_run=number).drop_duplicates("_run").sort_values("_run")[keys].reset_index(drop=True)
    return runs.join(tables["value"]), tables["low"], tables["high"], tables["note"]


def write_csv(frame: pd.DataFrame, path: str | os.PathLike, merge: bool = True) -> Path:
    """Write a frame as CSV with a row for each run, whole or not at all. `read_csv` gives the frame back.

    Metrics are columns of their own names, intervals `<metric>_low` and `<metric>_high`; `undefined` is JSON. Rows are
    sorted, so that the same results give the same file. Folders are not written. `merge` keeps the runs that the file
    has and `frame` has not: so a grid that runs in parts ends in one table.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{path}.lock"):  # two processes may add their rows
        frame = frame.assign(folder="")
        if merge and path.exists():
            old = read_csv(path)
            ours = set(as_key(frame, _IDENTITY))
            frame = pd.concat([old[[key not in ours for key in as_key(old, _IDENTITY)]], frame])
        text = _csv_of(frame)
        write_atomically(path, lambda file: file.write(text.encode()))
    return path


def as_key(frame: pd.DataFrame, columns: Iterable[str]) -> list[str]:
    """One text for each row of a frame: its values in these columns."""
    return ["|".join(map(str, values)) for values in zip(*(frame[key] for key in columns), strict=True)]


def _csv_of(frame):
    frame = frame.assign(_run=as_key(frame, _IDENTITY)).drop_duplicates(["_run", "metric"], keep="last")
    table, low, high, note = _by_run(frame[[*RUN, *_MEASURED]])
    known = [*METRICS, *COSTS]
    keys = [key for key in known if key in low] + sorted(key for key in low if key not in known)
    columns = {key: table[key].astype("object").where(table[key].notna(), "") for key in RUN if key != "folder"}
    for key in keys:
        for end, part in (("", table), ("_low", low), ("_high", high)):
            if end == "" or part[key].notna().any():
                columns[key + end] = part[key].map(_as_text)
    columns["undefined"] = [
        json.dumps({key: why for key, why in row.items() if isinstance(why, str) and why}) for _, row in note.iterrows()
    ]
    return pd.DataFrame(columns).sort_values(list(_IDENTITY), key=_order, kind="stable").to_csv(index=False)


def _order(column):
    return column if column.name not in (*_COUNTS, "r_bayes") else pd.to_numeric(column).fillna(-1)


def _as_text(value):
    if pd.isna(value):
        return ""
    if float(value).is_integer():
        return str(int(value))
    text = f"{value:.{_DIGITS}g}"
    return str(int(float(text))) if float(text).is_integer() else text  # as what is read will be written again


def read_csv(path: str | os.PathLike) -> pd.DataFrame:
    """The tidy DataFrame of a table that `write_csv` wrote. No result has a folder.

    Raises:
        ValueError: no such table, or a value that is no number or out of its range; the message names its line.
        FileNotFoundError: no such file.
    """
    try:
        table = pd.read_csv(path, dtype="str", keep_default_na=False)
    except (ValueError, pd.errors.ParserError, pd.errors.EmptyDataError) as error:
        raise ValueError(f"Expected a CSV table of results in {path}. Received: {error}") from None
    ends = [key + end for key in (*METRICS, *COSTS) for end in ("", "_low", "_high")]
    missing = sorted({*RUN, "undefined"} - {"folder"} - set(table.columns))
    unknown = [key for key in table if key not in (*RUN, "undefined", *ends) and not key.startswith("shift: ")]
    if missing or unknown:
        raise ValueError(
            f"Expected the columns of results in {path}. Received: without {missing}, with unknown {unknown}."
        )
    texts = {"undefined", *RUN} - {"folder", *_COUNTS, "num_resamples", "r_bayes"}
    numbers = pd.DataFrame({key: _numbers(table[key], path) for key in table if key not in texts})
    table = pd.concat([table[list(texts)], numbers], axis=1).assign(folder="")
    if len(wrong := table.index[~table["task"].isin(TASKS)]):
        raise ValueError(_at(path, wrong[0], f"one of {TASKS}", "task", table["task"][wrong[0]]))
    runs, parts = table[list(RUN)], []
    for key in [key for key in numbers if key not in RUN and not key.endswith(("_low", "_high"))]:
        low, high = table.get(f"{key}_low", math.nan), table.get(f"{key}_high", math.nan)
        part = runs.assign(metric=key, value=table[key], low=low, high=high, note="")
        parts.append(part.dropna(subset="value"))
    for line, text in table["undefined"].items():
        reasons = _parsed(text, path, line)
        nothing = {"value": math.nan, "low": math.nan, "high": math.nan}
        parts += [runs.loc[[line]].assign(metric=key, **nothing, note=why) for key, why in reasons.items()]
    found = pd.concat(parts) if parts else frame([])
    _check_frame(found, table, path)
    return _typed(found.sort_index(kind="stable").reset_index(drop=True)[[*RUN, *_MEASURED]])


def _at(path, line, expected, place, received):
    return f"Expected {expected} as {place} of line {line + 2} of {path}. Received: {received!r}."


def _numbers(column, path):
    numbers = pd.to_numeric(column, errors="coerce")
    wrong = column.index[(numbers.isna() | numbers.abs().eq(math.inf)) & (column != "")]
    if len(wrong):
        raise ValueError(_at(path, wrong[0], "a finite number", column.name, column[wrong[0]]))
    return numbers


def _parsed(text, path, line):
    try:
        return dict(json.loads(text))
    except (ValueError, TypeError):
        raise ValueError(_at(path, line, "JSON", "undefined", text)) from None


def _check_frame(found, table, path):
    """Raise where a metric is out of its range, or one that its task requires has neither value nor reason."""
    low, high = (
        found["metric"].map({key: getattr(one, end) for key, one in METRICS.items()}) for end in ("low", "high")
    )
    for column in ("value", "low", "high"):
        for line, one in found[(found[column] < low - 1e-6) | (found[column] > high + 1e-6)].iterrows():
            expected = f"a number in {METRICS[one['metric']].low:g}..{METRICS[one['metric']].high:g}"
            raise ValueError(_at(path, line, expected, one["metric"], one[column]))
    present = found.groupby(level=0)["metric"].agg(set)
    for line, task in table["task"].items():
        for key in REQUIRED[task]:
            if key not in present.get(line, ()):
                raise ValueError(_at(path, line, "a value, or a reason in undefined,", key, ""))
