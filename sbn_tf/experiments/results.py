"""Results: the one record that every method writes, and the one table that is made of them.

A result is `metrics.json` in the folder of its run, with the statistics of each test image beside it in `record.npz`
(`evaluation.Record`), from which intervals and paired tests are made. Both are checked when they are written and when
they are read, so a number of the table is finite, within the range that its definition allows, and of known origin.
"""

from __future__ import annotations

import csv
import dataclasses
import io
import json
import math
import numbers
import os
import warnings
from collections.abc import Collection, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import numpy as np
from filelock import FileLock

from sbn_tf.core.files import write_atomically
from sbn_tf.datasets.base import BINARY, MULTI_CLASS, MULTI_LABEL, ORDINAL, SEGMENTATION, TASKS
from sbn_tf.experiments import folders, scoring
from sbn_tf.experiments.plots import format_table
from sbn_tf.experiments.recipes import Recipe
from sbn_tf.experiments.scoring import Record

__all__ = [
    "COSTS",
    "KEYS",
    "METRICS",
    "Metric",
    "Result",
    "Row",
    "cost_table",
    "describe_metrics",
    "find",
    "group",
    "holm",
    "read",
    "read_csv",
    "table",
    "write",
    "write_csv",
]

FORMAT = 3  # of metrics.json: raised when a field changes its meaning
LEVEL = 0.05  # of the tests behind the marks of a table; its notes say 5 %


class Metric(NamedTuple):
    """What a number of the table is: which way is better, what values it can take, what it says."""

    better: str | None  # "higher", "lower", or None where neither is
    low: float
    high: float
    meaning: str


_INFINITY = math.inf
METRICS = {
    # All tasks.
    "nll": Metric("lower", 0, _INFINITY, "negative log likelihood of the truth, nats per label, pixel or image"),
    "brier": Metric("lower", 0, 2, "squared error of the probabilities, mean; of classes summed, 0 to 2"),
    "brier_skill": Metric("higher", -_INFINITY, 1, "1 - Brier / Brier of the training prevalence: 0 is no skill"),
    "ece": Metric("lower", 0, 1, "expected calibration error, 15 bins of equal width, pooled"),
    "ece_mass": Metric("lower", 0, 1, "expected calibration error, 15 bins of equal count, pooled"),
    "ece_region": Metric(
        "lower", 0, 1, "expected calibration error of the pixels that any rater or the prediction marks"
    ),
    "entropy": Metric(None, 0, _INFINITY, "entropy of the mean prediction, nats: how unsure it is in all"),
    "expected_entropy": Metric(None, 0, _INFINITY, "mean entropy of the samples, nats: what each is unsure of"),
    "mutual_information": Metric(None, 0, _INFINITY, "entropy less expected_entropy, nats: how far samples disagree"),
    "risk": Metric("lower", 0, 1, "mean error of an image: share of wrong labels, wrong class, or 1 - Dice"),
    "aurc": Metric("lower", 0, 1, "area under the risk-coverage curve: mean error if unsure images are refused"),
    "excess_aurc": Metric("lower", 0, 1, "that area less the oracle's, which refuses the worst images first"),
    "error_auroc": Metric("higher", 0, 1, "AUROC of an image's entropy for its prediction being wrong"),
    "error_auroc_mi": Metric("higher", 0, 1, "AUROC of an image's mutual information for its being wrong"),
    "num_images": Metric(None, 1, _INFINITY, "test images scored"),
    # Labels and classes.
    "auc": Metric("higher", 0, 1, "area under the ROC curve, mean over the labels that have both 0 and 1"),
    "auc_num_labels": Metric(None, 0, _INFINITY, "how many labels these are"),
    "average_precision": Metric("higher", 0, 1, "average precision, mean over the same labels"),
    "accuracy": Metric("higher", 0, 1, "share of right decisions; with rare labels, 1 - prevalence is free"),
    "ece_label": Metric("lower", 0, 1, "expected calibration error of each label or class, mean, equal width"),
    "ece_label_mass": Metric("lower", 0, 1, "the same in bins of equal count"),
    "label_error_auroc": Metric("higher", 0, 1, "AUROC of a label's entropy for that label being wrong"),
    "mean_absolute_error": Metric("lower", 0, _INFINITY, "distance of the predicted from the true grade, in grades"),
    "quadratic_kappa": Metric("higher", -1, 1, "agreement of the grades beyond chance, quadratic weights"),
    # Masks.
    "dice": Metric("higher", 0, 1, "Dice of the foreground with the majority mask, mean over images"),
    "iou": Metric("higher", 0, 1, "intersection over union with the majority mask, mean over images"),
    "hausdorff95": Metric("lower", 0, _INFINITY, "95th percentile of the distance between the outlines, pixels"),
    "ged": Metric("lower", 0, 2, "generalised energy distance of the sampled masks to the raters' masks"),
    "hungarian_iou": Metric("higher", 0, 1, "IoU of sampled masks and raters' masks, best matched one to one"),
    "dice_raters": Metric("higher", 0, 1, "Dice with each rater's mask, mean over raters and images"),
    "entropy_disagreement_pearson": Metric("higher", -1, 1, "correlation over pixels of entropy and raters' variance"),
    "pixel_error_auroc": Metric("higher", 0, 1, "AUROC of a pixel's entropy for that pixel being wrong"),
    "pixel_error_auroc_mi": Metric("higher", 0, 1, "AUROC of a pixel's mutual information for its being wrong"),
    # The paper's, with the directions that it reads them in.
    "paper_accuracy": Metric("higher", 0, 1, "mostly the share of absent labels: never any finding scores high"),
    "paper_brier": Metric("lower", 0, 1, "Brier score of one random sample, not of the mean prediction"),
    "paper_brier_softmax_twice": Metric("lower", 0, 1, "the same after a second softmax: 0.0723 is the least"),
    "paper_entropy": Metric(None, 0, _INFINITY, "of labels -p ln p without the 1 - p term; of masks the entropy"),
    "paper_dice": Metric("higher", 0, 1, "mostly how near to exactly 0 background is: an empty mask scores its share"),
    "paper_iou": Metric("higher", 0, 1, "IoU of a typical sample, not of the mean prediction"),
    "paper_ece": Metric("lower", 0, 1, "calibration error of the decisions: mostly whether a sure no is right"),
}

_LABELS = ("auc", "average_precision", "accuracy", "nll", "brier", "brier_skill", "ece")
# What a table shows unless it is told: task -> keys.
KEYS = {
    BINARY: _LABELS,
    MULTI_LABEL: _LABELS,
    MULTI_CLASS: _LABELS,
    ORDINAL: (*_LABELS, "mean_absolute_error", "quadratic_kappa"),
    SEGMENTATION: ("dice", "iou", "hausdorff95", "nll", "brier", "brier_skill", "ece", "ged", "hungarian_iou"),
}
# These depend on the number of samples, whatever distribution they are drawn from.
_OF_SAMPLES = ("ged", "hungarian_iou", "paper_iou")
_BOUNDED = ("nll", "brier", "brier_skill")  # what no method can expect to beat the "bound_..." rows in
# Each result has them, or the reason why not.
_REQUIRED = {
    **dict.fromkeys(TASKS, ("nll", "brier", "ece", "entropy", "auc", "accuracy")),
    SEGMENTATION: ("nll", "brier", "ece", "entropy", "dice", "iou"),
}

# What a method costs: key -> (column of `cost_table`, what the number is divided by there, meaning).
COSTS = {
    "num_weights": ("weights", 1, "weights of the network, all members together"),
    "num_trainable": (
        "trainable",
        1,
        "numbers that the last training changes, scales included; step 3 may freeze batch norm",
    ),
    "num_bayesian": ("Bayesian", 1, "weights that have a scale"),
    "weight_bytes": ("weights, MB", 1e6, "bytes of all variables"),
    "optimizer_bytes": ("optimiser, MB", 1e6, "bytes of the optimiser's state"),
    "num_samples": ("samples", 1, "passes behind one prediction"),
    "predict_flops_per_sample": ("GFLOPs a sample", 1e9, "operations of one pass over one image, counted"),
    "predict_flops": ("GFLOPs to predict", 1e9, "operations of one prediction of one image, all samples"),
    "predict_flops_ratio": (
        "predict, x",
        1,
        "operations of one prediction, each sample a whole pass, relative to one deterministic pass",
    ),
    "train_step_flops_per_image": ("GFLOPs a step", 1e9, "operations of a training step, per image, every backward"),
    "train_flops": ("GFLOPs to train", 1e9, "operations of the whole training, all steps and members"),
    "train_flops_ratio": ("train, x", 1, "operations of the training, relative to the deterministic network's"),
    "paper_flops": ("paper's, x", 1, "the paper's formula for it, or the number it prints"),
    "train_seconds": (
        "train, s",
        1,
        "wall time of all its trainings, tracing included; a first run in a process takes more",
    ),
    "train_peak_bytes": ("peak, MB", 1e6, "largest memory of the process, or of the GPU, while training"),
    "train_grown_bytes": (
        "memory, MB",
        1e6,
        "largest memory while training, above what the process held: what ran before matters",
    ),
}
_COST_COLUMNS = (
    "num_trainable",
    "num_bayesian",
    "weight_bytes",
    "num_samples",
    "predict_flops_ratio",
    "train_flops_ratio",
    "paper_flops",
    "train_seconds",
    "train_grown_bytes",
)


@dataclass(kw_only=True)
class Result:
    """One row of the table: what was run, on what, how good it was and what it cost.

    Args:
        dataset, task, network, recipe: names.
        method: of `methods.METHODS`; "trivial_..." for a row that looks at no image, or needs no training beyond
            the deterministic one; "bound_..." for what no method can beat in "nll", "brier" and "brier_skill", but by
            chance. It is no bound for other metrics.
        title: one line for people.
        seed: of the run; None where nothing is random.
        r_bayes: fraction of the weights that is Bayesian, 0..1; None where the method has none.
        settings: the recipe's numbers.
        options: the dataset's own options, such as the fold.
        limit, size, normalisation, leak: as the data were loaded; `leak` is "" where no patient is in two splits.
        num_train, num_val, num_test: images of each split.
        split: which of them was scored, "test" or "val".
        num_groups: patients of that split, or None where unknown.
        num_samples: of the posterior, in one prediction.
        threshold: where probabilities were cut into decisions, 0..1.
        selection: what was chosen on validation.
        metrics: key of `METRICS` -> value.
        intervals: key -> [low, high].
        undefined: key -> the reason why it has no value.
        shift: kind of shift -> its severity and AUROCs.
        cost: key of `COSTS` -> number, or None where unknown; {} for trivial rows.
        evaluation: what else shaped the score: digest of the data, resamples, severities.
        versions, commit: set by `write`.
        format: of the file.
        folder: where it lies; set by `write` and `read`, not part of the file.
    """

    dataset: str
    task: str
    method: str
    title: str
    recipe: str
    network: str
    size: int
    normalisation: str
    num_train: int
    num_val: int
    num_test: int
    metrics: dict[str, float]
    seed: int | None = None
    r_bayes: float | None = None
    settings: dict = field(default_factory=dict)
    options: dict = field(default_factory=dict)
    limit: int | None = None
    leak: str = ""
    num_groups: int | None = None
    split: str = "test"
    num_samples: int | None = None
    threshold: float | None = None
    selection: dict = field(default_factory=dict)
    intervals: dict[str, list[float]] = field(default_factory=dict)
    undefined: dict[str, str] = field(default_factory=dict)
    shift: dict = field(default_factory=dict)
    cost: dict = field(default_factory=dict)
    evaluation: dict = field(default_factory=dict)
    versions: dict = field(default_factory=dict)
    commit: str | None = None
    format: int = FORMAT
    folder: Path | None = field(default=None, compare=False)

    @property
    def is_trivial(self) -> bool:
        """Whether this row is no method but a trivial predictor or a bound."""
        return self.method.startswith(("trivial_", "bound_"))

    def record(self) -> Record | None:
        """The `evaluation.Record` beside it; None where there is none."""
        path = None if self.folder is None else Path(self.folder) / "record.npz"
        return Record.load(path) if path is not None and path.exists() else None


# ---------------------------------------------------------------------------
# Files
# ---------------------------------------------------------------------------


def write(result: Result, folder: str | os.PathLike, record: Record | None = None) -> Path:
    """Check a result and write it: `record.npz`, then `metrics.json`, each whole or not at all.

    Args:
        result: its `versions`, `commit` and `folder` are set to those of now.
        folder: of the run; what another result left there is replaced.
        record: `evaluation.Record` of the test images; None: no file, and no paired test later.

    Returns:
        The path of `metrics.json`.

    Raises:
        ValueError: a field of another type, a number that is not finite or out of its range.
    """
    folder = Path(folder)
    content = _plain(result)
    del content["versions"], content["commit"]
    _check({**content, "versions": {}, "commit": None}, f"the result of {result.method!r}", _TO_WRITE)
    path, beside = folder / "metrics.json", folder / "record.npz"
    folder.mkdir(parents=True, exist_ok=True)
    # Interrupted between the two, there is no metrics.json beside another result's record.
    path.unlink(missing_ok=True)
    if record is None:
        beside.unlink(missing_ok=True)
    else:
        record.save(beside)
    folders.write_json(path, content)
    written = json.loads(path.read_text())
    result.versions, result.commit, result.folder = written["versions"], written["commit"], folder
    return path


def read(path: str | os.PathLike) -> Result:
    """Read and check a result.

    Args:
        path: of `metrics.json`, or its folder.

    Raises:
        ValueError: not a result, one of another format, a field that is missing, unknown or of another type, a number
            that is not finite or out of its range. The message names the file and the field.
        FileNotFoundError: no such file.
    """
    path = Path(path)
    path = path / "metrics.json" if path.is_dir() else path
    try:
        content = json.loads(path.read_text())
    except ValueError as error:  # of JSON, and of text that is not UTF-8
        raise ValueError(f"Expected JSON in {path}. Received: {error}. {_TO_READ}") from None
    if not isinstance(content, dict):
        raise ValueError(f"Expected the fields of a result in {path}. Received: {type(content).__name__}. {_TO_READ}")
    if content.get("format") != FORMAT:
        received = content.get("format", "none")
        raise _OtherFormat(f"Expected format {FORMAT} in {path}. Received: {received!r}. {_TO_READ}")
    _check(content, path, _TO_READ)
    return Result(**content, folder=path.parent)


def find(runs: str | os.PathLike | None, dataset: str, **filters) -> list[Result]:
    """All results of one dataset below a folder of runs, in the order of their paths.

    Args:
        runs: folder of all runs; None: `runs/` of the repository or the working directory.
        dataset: its name.
        filters: field of `Result` -> the value wanted, or a list, tuple or set of such values, as
            `find("runs", "lidc", method=["partial", "ensemble"], seed=0)`; `split` is "test" unless it is given.

    Returns:
        Results that pass all filters; [] where there are none. Files of another format are left out, with one warning.

    Raises:
        ValueError: a filter that is no field, or a file that is not a result.
    """
    names = {one.name for one in dataclasses.fields(Result)} - {"folder"}
    if unknown := sorted(set(filters) - names):
        raise ValueError(f"Expected filters among {sorted(names)}. Received: {unknown}")
    root = folders.run_folder(runs, dataset, "any", 0, {}).parents[2]
    found, skipped = [], []
    filters.setdefault("split", "test")
    for path in sorted(root.glob("*/seed*/**/metrics.json")):
        try:
            result = read(path)
        except _OtherFormat:
            skipped.append(path)
            continue
        passes = (
            getattr(result, key) in value if isinstance(value, list | tuple | set) else getattr(result, key) == value
            for key, value in filters.items()
        )
        if all(passes):
            found.append(result)
    if skipped:
        warnings.warn(
            f"Left out {len(skipped)} result(s) that are not of format {FORMAT}, as {skipped[0]}. "
            "Score these methods anew.",
            stacklevel=2,
        )
    return found


class _OtherFormat(ValueError):
    pass


_JSON = ("settings", "options", "selection", "undefined", "shift", "evaluation", "versions")  # columns that hold JSON
_DIGITS = 7  # significant ones of a number in a CSV


def write_csv(results: Iterable[Result], path: str | os.PathLike, merge: bool = True) -> Path:
    """Write results as a CSV table, whole or not at all: a row each; `read_csv` gives all back but their records.

    Metrics are columns of their own names, intervals `<metric>_low` and `<metric>_high`, costs `cost_<key>`, dicts
    JSON. Rows are sorted, so that the same results give the same file.

    Args:
        results: of any datasets, splits and seeds.
        path: of the file.
        merge: keep the rows that the file has of other methods, settings and seeds: so a grid that runs in parts, on
            other days, ends in one table. A row of the same ones is replaced.

    Raises:
        ValueError: a file there that is no such table.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{path}.lock"):  # two processes may add their rows
        _write_csv(results, path, merge)
    return path


def _write_csv(results, path, merge):
    rows = {}
    for result in [*(read_csv(path) if merge and path.exists() else ()), *results]:
        rows[_identity(result)] = result
    metrics = [key for key in METRICS if any(key in result.metrics for result in rows.values())]
    costs = [key for key in COSTS if any(key in result.cost for result in rows.values())]
    fields = [f for f in _KINDS if f not in (*_JSON, "metrics", "intervals", "cost")]
    columns = [*fields, *(f"{key}{end}" for key in metrics for end in ("", "_low", "_high"))]
    columns += [*(f"cost_{key}" for key in costs), *_JSON]
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, lineterminator="\n")
    writer.writeheader()
    for _, result in sorted(rows.items()):
        content = _plain(result)
        row = {field: content[field] for field in fields}
        row |= {f"cost_{key}": value for key, value in result.cost.items()} | dict(result.metrics)
        for key, (low, high) in result.intervals.items():
            row |= {f"{key}_low": low, f"{key}_high": high}
        row = {key: f"{value:.{_DIGITS}g}" if isinstance(value, float) else value for key, value in row.items()}
        row |= {key: json.dumps(content[key], sort_keys=True) for key in _JSON}
        writer.writerow(row)
    write_atomically(path, lambda file: file.write(text.getvalue().encode()))


def read_csv(path: str | os.PathLike) -> list[Result]:
    """The results of a table that `write_csv` wrote; each is checked as those of `read` are, and has no folder.

    Raises:
        ValueError: not such a table, or a row that is no result: the message names its line.
        FileNotFoundError: no such file.
    """
    path, found = Path(path), []
    try:
        with open(path, newline="", encoding="utf-8") as file:
            lines = list(csv.DictReader(file, strict=True))
    except (csv.Error, UnicodeDecodeError) as error:
        raise ValueError(f"Expected a CSV table of results in {path}. Received: {error}. Make it anew.") from None
    for number, line in enumerate(lines, start=2):
        where = f"line {number} of {path}"
        try:
            content = {key: json.loads(line[key]) for key in _JSON}
            content |= {key: _parsed(line[key], kind) for key, kind in _KINDS.items() if kind != "a dict"}
            content["metrics"] = {key: float(line[key]) for key in METRICS if line.get(key)}
            content["intervals"] = {
                key: [float(line[f"{key}_low"]), float(line[f"{key}_high"])]
                for key in METRICS
                if line.get(f"{key}_low")
            }
            costs = ((key, line.get(f"cost_{key}")) for key in COSTS)
            content["cost"] = {key: _number(value) for key, value in costs if value is not None}
            if not any(value is not None for value in content["cost"].values()):
                content["cost"] = {}
        except (KeyError, ValueError, TypeError) as error:
            raise ValueError(
                f"Expected a result in {where}. Received: {type(error).__name__}: {error}. Make it anew."
            ) from None
        if content["format"] != FORMAT:
            raise _OtherFormat(f"Expected format {FORMAT} in {where}. Received: {content['format']!r}. {_TO_READ}")
        _check(content, where, _TO_READ)
        found.append(Result(**content))
    return found


def _number(text):
    """Of a cost: a count stays one."""
    return None if text == "" else int(text) if text.isdigit() else float(text)


def _parsed(text, kind):
    if "text" in kind:
        return None if text == "" and "none" in kind else text
    if text == "":
        return None
    return int(text) if "integer" in kind else float(text)


def _identity(result) -> str:
    """What tells a row from others: what was asked for, not what came of it, nor when, nor how it is described."""
    content = _plain(result)
    first = [content[key] for key in ("dataset", "split", "recipe", "network", "method")]
    rate = -1.0 if result.r_bayes is None else float(f"{result.r_bayes:.{_DIGITS}g}")
    order = [rate, -1 if result.seed is None else result.seed, result.num_samples or 0]
    rest = {key: content[key] for key in ("size", "limit", "options", "normalisation")}
    rest["threshold"] = content["evaluation"].get("threshold")
    # A field that a recipe did not have then has its default.
    return json.dumps([*first, *order, rest, _RECIPE_DEFAULTS | content["settings"]], sort_keys=True)


_RECIPE_DEFAULTS = {one.name: one.default for one in dataclasses.fields(Recipe) if one.name != "name"}


_TO_READ = "Delete it: it is made anew."
_TO_WRITE = "A value that is not known is left out, with its reason in undefined."

# Field -> what it has to be.
_KINDS = {
    **dict.fromkeys(("dataset", "task", "method", "title", "recipe", "network", "normalisation", "split"), "text"),
    **dict.fromkeys(("size", "num_train", "num_val", "num_test", "format"), "an integer >= 1"),
    **dict.fromkeys(("limit", "num_groups", "num_samples"), "an integer >= 1, or none"),
    "seed": "an integer >= 0, or none",
    **dict.fromkeys(("r_bayes", "threshold"), "a number in 0..1, or none"),
    "leak": "text, or empty",
    "commit": "text, or none",
    **dict.fromkeys(("settings", "options", "selection", "shift", "cost", "evaluation", "versions"), "a dict"),
    **dict.fromkeys(("metrics", "intervals", "undefined"), "a dict"),
}


def _is_number(value) -> bool:
    return isinstance(value, numbers.Real) and not isinstance(value, bool) and math.isfinite(value)


def _is_count(value, least) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= least


_TESTS = {
    "text": lambda value: isinstance(value, str) and value != "",
    "text, or empty": lambda value: isinstance(value, str),
    "text, or none": lambda value: value is None or (isinstance(value, str) and value != ""),
    "a dict": lambda value: isinstance(value, dict),
    "an integer >= 1": lambda value: _is_count(value, 1),
    "an integer >= 1, or none": lambda value: value is None or _is_count(value, 1),
    "an integer >= 0, or none": lambda value: value is None or _is_count(value, 0),
    "a number in 0..1, or none": lambda value: value is None or (_is_number(value) and 0 <= value <= 1),
}


def _plain(result):
    """The fields as JSON gives them back: tuples become lists."""
    content = {one.name: getattr(result, one.name) for one in dataclasses.fields(result) if one.name != "folder"}
    try:
        return json.loads(json.dumps(content))
    except TypeError as error:
        raise ValueError(
            f"Expected plain numbers, texts, lists and dicts in the result of {result.method!r}. Received: {error}. "
            "Use float(...) or .tolist()."
        ) from None


def _check(content, where, advice):
    """Raise where the fields of a result are not what `Result` says."""

    def refuse(expected, key, received):
        raise ValueError(f"Expected {expected} as {key} of {where}. Received: {received!r}. {advice}")

    missing, unknown = sorted(set(_KINDS) - set(content)), sorted(set(content) - set(_KINDS))
    if missing or unknown:
        raise ValueError(
            f"Expected the fields of a result in {where}. Received: without {missing}, with unknown {unknown}. {advice}"
        )
    for key, kind in _KINDS.items():
        if not _TESTS[kind](content[key]):
            refuse(kind, key, content[key])
    if content["split"] not in ("test", "val"):
        refuse('"test" or "val"', "split", content["split"])
    if content["task"] not in TASKS:
        refuse(f"one of {TASKS}", "task", content["task"])
    metrics, undefined = content["metrics"], content["undefined"]
    for key, value in metrics.items():
        if key not in METRICS:
            refuse("a key of METRICS", "metrics", key)
        if not _in_range(value, key):
            refuse(f"a finite number {_range(key)}", f"metrics[{key!r}]", value)
    for key, bounds in content["intervals"].items():
        if key not in metrics:
            refuse("a key of the metrics", "intervals", key)
        pair = isinstance(bounds, list) and len(bounds) == 2 and all(_in_range(bound, key) for bound in bounds)
        if not pair or bounds[0] > bounds[1]:
            refuse(f"[low, high] with low <= high, {_range(key)},", f"intervals[{key!r}]", bounds)
    for key, reason in undefined.items():
        if not isinstance(reason, str) or not reason:
            refuse("a reason", f"undefined[{key!r}]", reason)
        if key in metrics:
            refuse("a value or a reason, not both,", f"undefined[{key!r}]", reason)
    for key in _REQUIRED[content["task"]]:
        if key not in metrics and key not in undefined:
            refuse("a value, or a reason in undefined,", f"metrics[{key!r}]", None)
    for key, value in content["cost"].items():
        if key not in COSTS:
            refuse("a key of COSTS", "cost", key)
        if value is not None and not (_is_number(value) and value >= 0):
            refuse("a finite number >= 0, or none,", f"cost[{key!r}]", value)
    for key in ("settings", "options", "selection", "shift", "evaluation", "versions"):
        for place, value in _leaves(content[key], key):
            if isinstance(value, float) and not math.isfinite(value):
                refuse("a finite number", place, value)
    for kind, scores in content["shift"].items():
        if not isinstance(scores, dict):
            refuse("a dict", f"shift[{kind!r}]", scores)
        for key in ("entropy", "mutual_information"):
            value = scores.get(key)
            if value is not None and not (_is_number(value) and 0 <= value <= 1):
                refuse("an AUROC in 0..1, or none,", f"shift[{kind!r}][{key!r}]", value)


def _leaves(value, place):
    """(place, value) of everything in nested dicts and lists that is neither."""
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from _leaves(inner, f"{place}[{key!r}]")
    elif isinstance(value, list):
        for index, inner in enumerate(value):
            yield from _leaves(inner, f"{place}[{index}]")
    else:
        yield place, value


def _in_range(value, key):
    # Rounding may leave a distance of 0 a little below it.
    return _is_number(value) and METRICS[key].low - 1e-6 <= value <= METRICS[key].high + 1e-6


def _range(key):
    low, high = METRICS[key].low, METRICS[key].high
    if math.isinf(low):
        return f"<= {high:g}"
    return f">= {low:g}" if math.isinf(high) else f"in {low:g}..{high:g}"


# ---------------------------------------------------------------------------
# Rows
# ---------------------------------------------------------------------------


@dataclass
class Row:
    """The results of one method and setting, one for each seed.

    Args:
        label: what tells it from the other rows.
        results: of different seeds.
    """

    label: str
    results: list[Result]

    @property
    def is_trivial(self) -> bool:
        """Whether it never looked at an image."""
        return self.results[0].is_trivial

    def values(self, key: str) -> dict[int | None, float]:
        """Seed -> value, of those where it is defined; of the metrics, else of the cost."""
        found = {}
        for result in self.results:
            value = result.metrics.get(key, result.cost.get(key))
            if value is not None:
                found[result.seed] = value
        return found

    def value(self, key: str) -> float | None:
        """Mean over seeds; None where it is undefined in all."""
        values = list(self.values(key).values())
        return float(np.mean(values)) if values else None

    def interval(self, key: str) -> tuple[float, float] | None:
        """Of one seed its interval over images or patients, of several mean -+ standard deviation; None: unknown."""
        values = list(self.values(key).values())
        if len(values) > 1:
            middle, spread = float(np.mean(values)), float(np.std(values, ddof=1))
            return middle - spread, middle + spread
        for result in self.results:
            if key in result.intervals:
                low, high = result.intervals[key]
                return low, high
        return None

    @property
    def num_samples(self) -> int | None:
        """Samples behind one prediction; None where unknown."""
        first = self.results[0]
        if first.num_samples is None and (record := first.record()) is not None:
            return record.num_samples
        return first.num_samples

    def reason(self, key: str) -> str:
        """Why it is undefined."""
        return next((r.undefined[key] for r in self.results if key in r.undefined), "not measured for this row")


# What differs between runs of one row.
_OF_A_SEED = {"seed", "selection", "threshold", "metrics", "intervals", "undefined", "shift", "cost"}
_OF_A_SEED |= {"versions", "commit", "folder"}


def group(results: list[Result]) -> list[Row]:
    """Put the seeds of one method and setting together, in the order given.

    A row's label is its method, and where several rows share one, the settings in which they differ.

    Raises:
        ValueError: no result, results of several datasets, or two of one method, setting and seed.
    """
    if not results:
        raise ValueError("Expected one result or more. Received: none. Run a method first.")
    if len(kinds := {(result.dataset, result.task) for result in results}) > 1:
        raise ValueError(f"Expected results of one dataset: a table for each. Received: {sorted(kinds)}")
    contents, found = {}, {}
    for result in results:
        content = {key: value for key, value in _plain(result).items() if key not in _OF_A_SEED}
        content["evaluation"] = {key: value for key, value in content["evaluation"].items() if key != "weights"}
        name = json.dumps(content, sort_keys=True)
        contents[name] = dict(_leaves(content, ""))
        seeds = found.setdefault(name, {})
        if result.seed in seeds:
            raise ValueError(
                f"Expected one result for each method, setting and seed. Received: two of {result.method!r}, "
                f"seed={result.seed}, in {seeds[result.seed].folder} and {result.folder}"
            )
        seeds[result.seed] = result
    rows = []
    for name, content in contents.items():
        method = content["['method']"]
        alike = [other for other in contents.values() if other["['method']"] == method]
        # The innermost name of a place is a field or a key: "['settings']['epochs']" is epochs.
        differ = [f"{place.split('[')[-1][1:-2]}={content.get(place)}" for place in _telling(alike)]
        rows.append(Row(", ".join([method, *differ]), list(found[name].values())))
    return rows


def _telling(contents):
    """Few places by whose values all contents are told apart: names and numbers before nested settings."""
    places = sorted(dict.fromkeys(place for content in contents for place in content), key=lambda p: p.count("["))
    chosen, kinds = [], 1
    for place in places:
        number = len({tuple(content.get(p) for p in [*chosen, place]) for content in contents})
        if number > kinds and place != "['title']":
            chosen, kinds = [*chosen, place], number
    return chosen


# ---------------------------------------------------------------------------
# The table
# ---------------------------------------------------------------------------


def table(
    results: list[Result], keys: Iterable[str] | None = None, intervals: bool = True, num_resamples: int | None = None
) -> str:
    """The table of all methods, in Markdown: a row for each, its best values marked, and below it what they are.

    A cell is a value with its interval; of several seeds mean +- standard deviation and their number. "*" marks the
    best row of a column, and the rows that a paired test cannot tell from it at 5 %, corrected for the number of rows
    (Holm 1979): of one common seed by a bootstrap of images or patients (`evaluation.compare`), of several by a paired
    t-test over seeds. Trivial rows are never marked; where one of them is better than all, a line says so. "ged",
    "hungarian_iou" and "paper_iou" depend on the number of samples: there only rows of one number are compared, the
    most frequent above 1, and a line says which.

    Args:
        results: of one dataset, in the order of the rows.
        keys: columns, keys of `METRICS`; None: `KEYS` of the task.
        intervals: show intervals.
        num_resamples: of the paired bootstrap; None: as many as the intervals were made with.

    Returns:
        The table and its notes, without a final line break.

    Raises:
        ValueError: an unknown key, no results, or results that do not belong in one table.
    """
    rows = group(results)
    keys = list(KEYS[results[0].task] if keys is None else keys)
    if unknown := [key for key in keys if key not in METRICS]:
        raise ValueError(f"Expected keys among {list(METRICS)}. Received: {unknown}")
    empty = [key for key in keys if all(row.value(key) is None for row in rows)]
    if len(empty) < len(keys):
        keys = [key for key in keys if key not in empty]
    if num_resamples is None:
        num_resamples = max((one.evaluation.get("num_resamples", 0) for one in results), default=0) or 1000
    counts = {row.label: row.num_samples for row in rows} if set(keys) & set(_OF_SAMPLES) else {}
    marks = _marks(rows, keys, num_resamples, counts)
    notes: list[str] = []
    reasons: dict[str, int] = {}  # reason -> its number
    cells = {row.label: {} for row in rows}
    for key in keys:
        digits = _digits(rows, key)
        for row in rows:
            star = "*" if row.label in marks.labels.get(key, ()) else ""
            text = "-" if row.value(key) is None else _cell(row, key, digits, star, intervals)
            if len(row.values(key)) < len(row.results):
                text += f" ({reasons.setdefault(row.reason(key), len(reasons) + 1)})"
            cells[row.label][key] = text
    notes += [f"({number}) {reason}" for reason, number in reasons.items()]
    notes += [f"Not defined here: {key} ({rows[-1].reason(key)})" for key in empty if key not in keys]
    notes += _notes(rows, keys, marks, num_resamples, counts)
    bare = [f"{key} of {row.label}" for key in keys for row in rows if key not in _COUNTS and _is_bare(row, key)]
    if intervals and bare:
        notes.append(f"No interval, as more than 5 % of the resamples leave it undefined: {'; '.join(bare)}.")
    notes.append(_origin(rows, intervals))
    return format_table(cells, keys) + "\n\n" + "  \n".join(notes)


def cost_table(results: list[Result]) -> str:
    """What each method costs, in Markdown, and below it what the columns are; trivial rows cost nothing.

    Of several seeds the mean. Ratios are to the deterministic network of the same recipe; "-" is unknown.

    Raises:
        ValueError: no results, or results that do not belong in one table.
    """
    rows = [row for row in group(results) if not row.is_trivial]
    cells = {}
    for row in rows:
        cells[row.label] = {}
        for key in _COST_COLUMNS:
            name, unit, _ = COSTS[key]
            value = row.value(key)
            count = unit == 1 and value is not None and float(value).is_integer() and not key.endswith("ratio")
            digits = 1 if key == "train_seconds" else 2
            if value is not None:
                cells[row.label][name] = f"{value:,.0f}" if count else f"{value / unit:,.{digits}f}"
    notes = ". ".join(f"{COSTS[key][0]}: {COSTS[key][2]}" for key in _COST_COLUMNS)
    return format_table(cells, [COSTS[key][0] for key in _COST_COLUMNS]) + f"\n\n{notes}."


def describe_metrics(keys: Collection[str]) -> str:
    """A line for each metric, in Markdown: what it says, and which way is better.

    Raises:
        ValueError: an unknown key.
    """
    if unknown := [key for key in keys if key not in METRICS]:
        raise ValueError(f"Expected keys among {list(METRICS)}. Received: {unknown}")
    ways = {None: "neither way is better", "higher": "higher is better", "lower": "lower is better"}
    return "\n".join(f"- `{key}`: {METRICS[key].meaning} ({ways[METRICS[key].better]})" for key in keys)


_COUNTS = ("num_images", "auc_num_labels")


def _digits(rows, key):
    """Decimals of a column: two figures of its typical half-width, three or more where values are near 1."""
    if key in _COUNTS:
        return 0
    bounds = [row.interval(key) for row in rows if not row.is_trivial]
    widths = [(high - low) / 2 for low, high in (pair for pair in bounds if pair is not None) if high > low]
    if not widths:
        return 3
    return int(np.clip(1 - math.floor(math.log10(np.median(widths))), 3 if METRICS[key].high <= 2 else 1, 5))


def _cell(row, key, digits, star, intervals):
    number, of = len(row.values(key)), len(row.results)
    text = f"{row.value(key):.{digits}f}{star}"
    bounds = row.interval(key)
    if intervals and key not in _COUNTS and bounds is not None:
        if number > 1:
            text += f" +- {(bounds[1] - bounds[0]) / 2:.{digits}f}"
        else:
            text += f" [{bounds[0]:.{digits}f}, {bounds[1]:.{digits}f}]"
        text += f" (n={number})" * (1 < number == of)
    return text + f" (n={number} of {of})" * (number < of)


def _is_bare(row, key):
    """Whether the row has intervals, but none for this value."""
    return row.value(key) is not None and row.interval(key) is None and any(r.intervals for r in row.results)


def _best(rows, key, counts):
    """The best row that is not trivial, and the trivial ones that are better; (None, []) where nothing is better."""
    better = METRICS[key].better
    scored = [row for row in _comparable(rows, key, counts) if row.value(key) is not None]
    methods = [row for row in scored if not row.is_trivial]
    if better is None or not methods:
        return None, []
    sign = 1 if better == "higher" else -1
    best = max(methods, key=lambda row: sign * row.value(key))
    trivial = [row for row in scored if row.results[0].method.startswith("trivial_")]
    above = [row for row in trivial if sign * row.value(key) > sign * best.value(key)]
    return best if len(methods) > 1 else None, above  # one method is no comparison


def _comparable(rows, key, counts):
    """The rows whose values of a metric may be compared."""
    return [row for row in rows if counts[row.label] == _count(rows, counts)] if key in _OF_SAMPLES else rows


def _count(rows, counts):
    """The number of samples most frequent among the methods, above 1 if there is one; 0 if none is known."""
    known = [counts[row.label] for row in rows if not row.is_trivial and counts[row.label] is not None]
    return max(known, key=lambda number: (number > 1, known.count(number), number), default=0)


class _Marks(NamedTuple):
    """What the tests between rows say."""

    labels: dict[str, set[str]]  # key -> rows to mark
    untested: list[str]  # rows that no test could compare with a best one
    too_few_resamples: list[str]  # keys for which no difference could have reached 5 %
    of_two_seeds: bool  # whether a test had one degree of freedom


def _marks(rows, keys, num_resamples, counts):
    pairs, marked = {}, {}
    for key in keys:
        best, _ = _best(rows, key, counts)
        if best is None:
            continue
        marked[key] = {best.label}
        for row in _comparable(rows, key, counts):
            if row is not best and not row.is_trivial and row.value(key) is not None:
                pairs.setdefault((best.label, row.label), []).append(key)
    by_label, records = {row.label: row for row in rows}, {}
    p_values, untested, resampled, of_two_seeds = {key: {} for key in marked}, set(), set(), False
    for (best, other), columns in pairs.items():
        tests = _compare(by_label[best], by_label[other], columns, num_resamples, records)
        for key, (p_value, num_seeds) in tests.items():
            if p_value is None:
                untested.add(other)
            else:
                p_values[key][other] = p_value
                of_two_seeds |= num_seeds == 2
                if num_seeds == 1:
                    resampled.add(key)
    for key, found in p_values.items():
        marked[key] |= {label for label, p_value in holm(found).items() if p_value >= LEVEL}
    too_few = [key for key in keys if key in resampled and len(p_values[key]) / (num_resamples + 1) >= LEVEL]
    return _Marks(marked, sorted(untested), too_few, of_two_seeds)


def _compare(row, other, keys, num_resamples, records):
    """Key -> (two-sided p of the paired test between two rows, number of seeds); p is None where there is none."""
    found = {key: (1.0 if row.value(key) == other.value(key) else None, 0) for key in keys}
    single = []
    for key in (key for key in keys if found[key][0] is None):
        ours, theirs = row.values(key), other.values(key)
        common = [seed for seed in ours if seed in theirs]
        if len(common) > 1:
            p_value = _seeds_test([ours[seed] for seed in common], [theirs[seed] for seed in common])
            found[key] = p_value, len(common)
        elif common:
            single.append((key, common[0]))
    for seed in {seed for _, seed in single}:
        ours, theirs = (_record(one, seed, records) for one in (row, other))
        if ours is None or theirs is None:
            continue
        wanted = [key for key, its in single if its == seed]
        try:
            tests = scoring.compare(ours, theirs, keys=wanted, num_resamples=num_resamples)
        except ValueError:  # of other images, such as another fold's
            continue
        found |= {key: (tests[key]["p_value"], 1) for key in wanted if key in tests}
    return found


def _record(row, seed, records):
    if (row.label, seed) not in records:
        records[row.label, seed] = next(one for one in row.results if one.seed == seed).record()
    return records[row.label, seed]


def _seeds_test(ours, theirs):
    from scipy.stats import ttest_rel

    differences = np.subtract(ours, theirs)
    if np.ptp(differences) == 0:  # t is 0/0 or infinite
        return 1.0 if differences[0] == 0 else 0.0
    return float(ttest_rel(ours, theirs).pvalue)


def holm(p_values: dict[str, float]) -> dict[str, float]:
    """Label -> p adjusted for their number (Holm 1979): the smallest times n, the next times n - 1, never falling."""
    adjusted, least = {}, 0.0
    for rank, (label, p_value) in enumerate(sorted(p_values.items(), key=lambda item: item[1])):
        least = max(least, min(1.0, (len(p_values) - rank) * p_value))
        adjusted[label] = least
    return adjusted


def _notes(rows, keys, marks, num_resamples, counts):
    ways = {way: [key for key in keys if METRICS[key].better == way] for way in ("higher", "lower", None)}
    names = {"higher": "Higher is better", "lower": "Lower is better", None: "Neither way is better"}
    notes = [". ".join(f"{names[way]}: {', '.join(found)}" for way, found in ways.items() if found) + "."]
    if marks.labels:
        notes.append(
            "Marked *: the best method, and those a paired test does not tell from it at 5 %, corrected for the rows. "
            "Which is best is picked on the same images."
        )
    if marks.too_few_resamples:
        notes.append(
            f"{num_resamples} resamples are too few for a test of so many rows to reach 5 %, so none is told from the "
            f"best: {', '.join(marks.too_few_resamples)}."
        )
    if marks.of_two_seeds:
        notes.append("Two seeds can hardly tell rows apart: their test has one degree of freedom.")
    notes += _notes_of_samples(rows, keys, marks, counts)
    bounds = [row.label for row in rows if row.results[0].method.startswith("bound_")]
    if bounds and (others := [key for key in keys if METRICS[key].better and key not in _BOUNDED]):
        beatable = ", ".join(others)
        notes.append(f"{', '.join(bounds)} is a bound for nll, brier and brier_skill alone; not for {beatable}.")
    if marks.untested:
        notes.append(
            "Not tested against the best (no record, other test images, or no common seed): "
            + "; ".join(marks.untested)
            + "."
        )
    above = {}
    for key in keys:
        for row in _best(rows, key, counts)[1]:
            above.setdefault(row.label, []).append(key)
    if above:
        beaten = "; ".join(f"{label} in {', '.join(found)}" for label, found in above.items())
        notes.append(f"Trivial rows better than every method: {beaten}.")
    return notes


def _notes_of_samples(rows, keys, marks, counts):
    """How many samples each row has, where a number of the table depends on it."""
    shown = [key for key in keys if key in _OF_SAMPLES and any(row.value(key) is not None for row in rows)]
    if not shown:
        return []
    labels = {}
    for row in rows:
        if any(row.value(key) is not None for key in shown):
            labels.setdefault(counts[row.label], []).append(row.label)
    texts = [
        f"{'unknown' if number is None else number} in {', '.join(labels[number])}"
        for number in sorted(labels, key=lambda number: number or 0)
    ]
    note = f"Depends on the number of samples: {', '.join(shown)}. Samples: {'; '.join(texts)}."
    if any(key in marks.labels for key in shown):
        note += f" Compared and marked there: rows with {_count(rows, counts)}."
    elif len(labels) > 1:
        note += " So no row is marked there."
    return [note]


# What a recipe's name does not tell: these may have been changed.
_TOLD = ("epochs", "bayes_epochs", "num_samples", "keep")


def _origin(rows, intervals):
    """One line: what was run, on what, and what the intervals are over."""
    results = [result for row in rows for result in row.results]

    def all_of(key, values=None):
        values = [getattr(result, key) for result in results] if values is None else values
        return ", ".join(dict.fromkeys(str(value) for value in values if value not in (None, "")))

    first = results[0]
    patients = all_of("num_groups")
    number, name = ("num_test", "test") if first.split == "test" else ("num_val", "validation")
    parts = [f"{first.dataset}: {all_of(number)} {name} images" + (f" of {patients} patients" * bool(patients))]
    if seeds := all_of("seed"):
        parts.append(f"seed{'s' * (', ' in seeds)} {seeds}")
    parts += [f"recipe {all_of('recipe')}", f"network {all_of('network')}"]
    parts += [f"{name} {found}" for name in ("r_bayes", "limit", "size") if (found := all_of(name))]
    parts += [f"normalisation {found}" for found in [all_of("normalisation")] if found != "train"]
    parts += [f"threshold {found}" for found in [all_of("threshold")] if found not in ("0.5", "")]
    methods = [result for result in results if not result.is_trivial]
    told = [(key, [one.settings.get(key) for one in methods]) for key in _TOLD]
    told += [(key, [one.options.get(key) for one in methods]) for key in first.options]
    parts += [f"{key} {found}" for key, values in told if (found := all_of("", values))]
    if intervals and any(result.intervals for result in results):
        over = "patients" if first.num_groups is not None else "images"
        resamples = all_of("", [result.evaluation.get("num_resamples") for result in results])
        parts.append(f"[95 % interval] over {over}" + (f", {resamples} resamples" * bool(resamples)))
    if intervals and any(len(row.results) > 1 for row in rows):
        parts.append("+- standard deviation over seeds")
    line = "; ".join(parts) + "."
    if leaks := all_of("leak"):
        line += f" Leak: {leaks}"
    return line
