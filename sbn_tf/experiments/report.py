"""Reports: tables and words made of a frame of results. A table is a DataFrame, its notes are in `attrs["notes"]`."""

from __future__ import annotations

import html
import math
from collections.abc import Collection, Mapping

import numpy as np
import pandas as pd

from sbn_tf.datasets.base import BINARY, EXCLUSIVE, MULTI_LABEL, SEGMENTATION
from sbn_tf.experiments.result import COSTS, KEYS
from sbn_tf.experiments.rows import rows
from sbn_tf.experiments.table import table
from sbn_tf.metrics import METRICS

__all__ = [
    "PAPER",
    "TABLE_1",
    "USE",
    "correct_keys",
    "cost_table",
    "describe_metrics",
    "paper_keys",
    "shift_table",
    "show",
]

# The paper's rows, in its order: label -> what its runs have.
TABLE_1 = {
    "Deterministic": {"method": "deterministic"},
    "Ensemble": {"method": "ensemble"},
    "Partial 1 %": {"method": "partial", "r_bayes": 0.01},
    "Partial 5 %": {"method": "partial", "r_bayes": 0.05},
    "Partial 20 %": {"method": "partial", "r_bayes": 0.2},
    "Bayesian": {"method": "partial", "r_bayes": 1.0},
}
_CALIBRATION = {SEGMENTATION: ("ece", "ece_mass", "ece_region")}
_USE = ("aurc", "excess_aurc", "error_auroc", "error_auroc_mi")
# Metrics of how useful the uncertainty is: task -> keys.
USE = {
    SEGMENTATION: (*_USE, "pixel_error_auroc", "pixel_error_auroc_mi", "entropy_disagreement_pearson"),
    MULTI_LABEL: (*_USE, "label_error_auroc"),
    BINARY: (*_USE, "label_error_auroc"),
    EXCLUSIVE[0]: _USE,
    EXCLUSIVE[1]: _USE,
}
# The paper's metrics as its code defines them: task -> keys.
PAPER = {
    SEGMENTATION: ("paper_dice", "paper_iou", "paper_brier", "paper_brier_softmax_twice", "paper_entropy", "paper_ece"),
    MULTI_LABEL: ("paper_accuracy", "paper_brier", "paper_entropy", "paper_ece"),
}


def paper_keys(task: str, num_raters: int) -> tuple[str, ...]:
    """The paper's three metrics of a dataset, as its code defines them."""
    quality = "paper_accuracy" if task != SEGMENTATION else "paper_dice" if num_raters > 1 else "paper_iou"
    return (quality, "paper_brier", "paper_entropy")


def correct_keys(task: str, num_raters: int) -> tuple[str, ...]:
    """Metrics that measure what the paper's are meant to measure."""
    of_masks = ("dice", "ged") if num_raters > 1 else ("iou",)
    quality = of_masks if task == SEGMENTATION else ("auc", "average_precision")
    return (*quality, "nll", "brier", "ece", "error_auroc")


# Columns of `cost_table`: key -> (name, what the number is divided by).
_COST_COLUMNS = {
    "train_flops_ratio": ("train, x", 1),
    "predict_flops_ratio": ("predict, x", 1),
    "paper_flops": ("paper's, x", 1),
    "num_bayesian": ("Bayesian", 1),
    "weight_bytes": ("weights, MB", 1e6),
    "train_seconds": ("train, s", 1),
    "num_trainable": ("trainable", 1),
    "train_grown_bytes": ("memory, MB", 1e6),
}


def cost_table(frame: pd.DataFrame, keys: Collection[str] = tuple(_COST_COLUMNS)) -> pd.DataFrame:
    """The cost of each method, means over its units, and notes on the columns. Trivial rows are left out.

    Ratios are to the deterministic network of the same recipe; "-" is unknown.

    Args:
        frame: tidy results of one dataset.
        keys: columns, keys of `COSTS`.

    Raises:
        ValueError: no results, or results that do not belong in one table.
    """
    cells = {}
    for row in [row for row in rows(frame) if not row.is_trivial]:
        cells[row.label] = {}
        for key in keys:
            (name, unit), value = _COST_COLUMNS[key], row.value(key)
            count = unit == 1 and value is not None and float(value).is_integer() and key.startswith("num_")
            digits = 0 if count else 1 if key == "train_seconds" else 2
            absent = "missing" if row.is_missing else "-"
            cells[row.label][name] = absent if value is None else f"{value / unit:,.{digits}f}"
    made = pd.DataFrame.from_dict(cells, orient="index", columns=[_COST_COLUMNS[key][0] for key in keys])
    made.attrs["notes"] = [f"{_COST_COLUMNS[key][0]}: {COSTS[key]}." for key in keys]
    return made


def shift_table(frame: pd.DataFrame) -> pd.DataFrame:
    """AUROC of each image's uncertainty for its being shifted, against its clean self: a row a method.

    Of several units the mean and the standard deviation. "-": one sample has no mutual information.
    """
    metrics = [key for key in dict.fromkeys(frame["metric"]) if key.startswith("shift: ")]
    kinds = list(dict.fromkeys(key.split(": ")[1] for key in metrics))
    made = {}
    for row in rows(frame[frame["metric"].isin(metrics)]):
        cells = made.setdefault(row.label, {})
        for kind in kinds:
            for key in ("entropy", "mutual_information"):
                values = list(row.values(f"shift: {kind}: {key}").values())
                spread = f" +- {np.std(values, ddof=1):.3f}" if len(values) > 1 else ""
                cells[f"{kind}: {key.replace('_', ' ')}"] = f"{np.mean(values):.3f}{spread}" if values else "-"
    found = pd.DataFrame.from_dict(made, orient="index")
    severities = {kind: frame.loc[frame["metric"] == f"shift: {kind}: severity", "value"] for kind in kinds}
    text = ", ".join(f"{kind} {values.iloc[-1]:g}" for kind, values in severities.items() if len(values))
    note = "0.5: the uncertainty does not notice the shift; below 0.5: it is lower on shifted images; -: one sample."
    found.attrs["notes"] = [f"{note} Severities: {text}."]
    return found


def tables(frame: pd.DataFrame, task: str) -> dict[str, pd.DataFrame]:
    """The results of one dataset in tables that fit a page: title -> table."""
    parts = {
        "How good are the probabilities?": KEYS[task],
        "Does the uncertainty help?": ("entropy", "mutual_information", *USE[task]),
        "Calibration": _CALIBRATION.get(task, ("ece", "ece_mass", "ece_label")),
    }
    if task in PAPER:
        parts["The paper's metrics, as it defines them"] = PAPER[task]
    made = {title: table(frame, keys) for title, keys in parts.items()}
    if frame["metric"].str.startswith("shift: ").any():
        made["Does it notice shifted images? AUROC against clean ones"] = shift_table(frame)
    made["What does it cost?"] = cost_table(frame)
    return made


def describe_metrics(keys: Collection[str]) -> str:
    """A line for each metric, in Markdown: its meaning, and which way is better.

    Raises:
        ValueError: an unknown key.
    """
    if unknown := [key for key in keys if key not in METRICS]:
        raise ValueError(f"Expected keys among {list(METRICS)}. Received: {unknown}")
    ways = {None: "neither way is better", True: "higher is better", False: "lower is better"}
    return "\n".join(f"- `{key}`: {METRICS[key].meaning} ({ways[METRICS[key].higher_is_better]})" for key in keys)


def to_markdown(table: pd.DataFrame, digits: int = 3) -> str:
    """A table as Markdown that also reads well as plain text, and its notes below it.

    Args:
        table: of any kind; its index, with its name, is the first column.
        digits: of floats, after the decimal point; a number that this would show as 0 keeps two significant ones.

    Returns:
        The text, without a final line break.
    """

    def text(value):
        if value is None or value is pd.NA or (isinstance(value, float) and math.isnan(value)):
            return "-"
        if not isinstance(value, float | np.floating):
            return str(value)
        return f"{value:.1e}" if 1e-9 < abs(value) < 0.5 * 10**-digits else f"{value:.{digits}f}"

    columns = [list(map(text, table[key])) for key in table.columns]
    lines = [
        [str(table.index.name or ""), *map(str, table.columns)],
        *([str(name), *cells] for name, *cells in zip(table.index, *columns, strict=True)),
    ]
    widths = [max(3, *(len(line[place]) for line in lines)) for place in range(len(lines[0]))]
    written = [
        "| " + " | ".join([line[0].ljust(widths[0]), *map(str.rjust, line[1:], widths[1:])]) + " |" for line in lines
    ]
    rule = [":" + "-" * (widths[0] - 1), *("-" * (width - 1) + ":" for width in widths[1:])]
    whole = "\n".join([written[0], "| " + " | ".join(rule) + " |", *written[1:]])
    notes = "  \n".join(table.attrs.get("notes", ()))
    return f"{whole}\n\n{notes}" if notes else whole


def show(table: pd.DataFrame, best: Mapping[str, float] | None = None, *, digits: int = 3) -> None:
    """Show a table in a notebook, the best values of each column bold, and its notes below it.

    Args:
        table: of any kind; `attrs["best"]` and `attrs["notes"]` are those of `table.table`.
        best: column of numbers -> the number that would be best: the nearest values are bold. Infinity: the highest.
        digits: of floats, after the decimal point.

    Raises:
        ValueError: a column that the table does not have.
    """
    from IPython.display import HTML, Markdown, display

    if unknown := [key for key in best or {} if key not in table]:
        raise ValueError(f"Expected columns among {list(table)}. Received: {unknown}")
    bold, notes = {**table.attrs.get("best", {})}, [*table.attrs.get("notes", ())]
    if any(bold.values()):
        notes.insert(
            0,
            "Bold: the best of a column (of rows with as many samples, where they count), trivial rows aside, "
            "even where it differs by no more than noise.",
        )
    for key, goal in (best or {}).items():
        numbers = table[key].astype(float).round(digits)
        far = abs(numbers - goal) if math.isfinite(goal) else -math.copysign(1, goal) * numbers
        bold[key] = list(table.index[far == far.min()])
    shown = pd.DataFrame({key: [_as_html(cell, digits) for cell in table[key]] for key in table})
    for key, labels in bold.items():
        shown[key] = shown[key].where(~table.index.isin(labels), "<b>" + shown[key].astype(str) + "</b>")
    shown = shown.set_axis([html.escape(str(label)) for label in table.index])
    shown = shown.set_axis([html.escape(str(key)) for key in table], axis=1)
    display(HTML(shown.to_html(escape=False)))
    if notes:
        display(Markdown("  \n".join(notes).replace("+-", "\u00b1")))


def _as_html(cell, digits):
    """A cell for HTML: a number and its deviation stay on one line."""
    if isinstance(cell, float | np.floating):
        return "-" if math.isnan(cell) else f"{round(cell, digits) + 0.0:.{digits}f}"  # no -0.0
    if not isinstance(cell, str):
        return cell
    return html.escape(cell).replace(" +- ", "&nbsp;&plusmn;&nbsp;").replace(", ", ",&nbsp;")
