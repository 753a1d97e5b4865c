"""The result of one run: a checked `metrics.json`, with the statistics of each test image beside it in `record.npz`."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator
from pydantic_core import PydanticCustomError

from sbn_tf.datasets.base import BINARY, MULTI_CLASS, MULTI_LABEL, ORDINAL, SEGMENTATION, TASKS
from sbn_tf.experiments import folders
from sbn_tf.experiments.scoring import Record
from sbn_tf.metrics import METRICS

__all__ = ["KEYS"]

FORMAT = 3  # of metrics.json: raised when a field changes its meaning

_LABELS = ("auc", "average_precision", "accuracy", "nll", "brier", "brier_skill", "ece")
# What a table shows by default: task -> keys.
KEYS = {
    BINARY: _LABELS,
    MULTI_LABEL: _LABELS,
    MULTI_CLASS: _LABELS,
    ORDINAL: (*_LABELS, "mean_absolute_error", "quadratic_kappa"),
    SEGMENTATION: ("dice", "iou", "hausdorff95", "nll", "brier", "brier_skill", "ece", "ged", "hungarian_iou"),
}
# Each result has a value for these, or the reason why not.
REQUIRED = {
    **dict.fromkeys(TASKS, ("nll", "brier", "ece", "entropy", "auc", "accuracy")),
    SEGMENTATION: ("nll", "brier", "ece", "entropy", "dice", "iou"),
}
# What a method costs: key -> meaning.
COSTS = {
    "num_weights": "weights of the network, all members together",
    "num_trainable": "numbers that the last training changes, scales included; step 3 may freeze batch norm",
    "num_bayesian": "weights with a distribution, or with a value for each member",
    "weight_bytes": "bytes of all variables",
    "optimizer_bytes": "bytes of the optimiser's state",
    "num_samples": "passes behind one prediction",
    "predict_flops_per_sample": "operations of one pass over one image, counted",
    "predict_flops": "operations of one prediction of one image, all samples",
    "predict_flops_ratio": "operations of one prediction, each sample a whole pass, relative to one pass",
    "train_step_flops_per_image": "operations of a training step, per image, every backward pass included",
    "train_flops": "operations of the whole training, all steps and members",
    "train_flops_ratio": "operations of the training, relative to the deterministic network's",
    "paper_flops": "the paper's formula for the operations of training, or the number it prints",
    "train_seconds": "wall time of all its trainings, tracing included; a first run in a process takes more",
    "train_peak_bytes": "largest memory of the process, or of the GPU, while training",
    "train_grown_bytes": "largest memory while training, above what the process held: earlier work matters",
}

_Text = Annotated[str, Field(min_length=1)]
_Count = Annotated[int, Field(ge=1)]
_Share = Annotated[float, Field(ge=0, le=1)]
_OF_WRITE = ("versions", "commit", "threads")  # fields that `write` sets
_TO_READ = "Delete it, and it is made again."
_TO_WRITE = "Leave out a value that is not known and give its reason in undefined."


class Result(BaseModel):
    """One run: its method and data, its metrics and its costs.

    Args:
        dataset, task, network, recipe: names.
        method: of `METHODS`; "trivial_..." for a predictor that ignores the image or needs only the
            deterministic network; "bound_..." for a bound that no method can expect to beat in nll and Brier.
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
        selection: choices made on validation.
        metrics: key of `METRICS` -> value.
        intervals: key -> [low, high].
        undefined: key -> the reason why it has no value.
        shift: kind of shift -> its severity and AUROCs.
        cost: key of `COSTS` -> number, or None where unknown; {} for trivial rows.
        evaluation: other settings of the score: digest of the data, resamples, severities.
        versions, commit, threads: set by `write`; see `folders.threads`.
        format: of the file.
        folder: where it lies; set by `write` and `read`, not part of the file.

    Raises:
        ValueError: a field of another type, or a number that is not finite or out of its range.
    """

    model_config = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False)

    dataset: _Text
    task: _Text
    method: _Text
    title: _Text
    recipe: _Text
    network: _Text
    size: _Count
    normalisation: _Text
    num_train: _Count
    num_val: _Count
    num_test: _Count
    metrics: dict[str, float]
    seed: Annotated[int, Field(ge=0)] | None = None
    r_bayes: _Share | None = None
    settings: dict[str, Any] = {}
    options: dict[str, Any] = {}
    limit: _Count | None = None
    leak: str = ""
    num_groups: _Count | None = None
    split: Literal["test", "val"] = "test"
    num_samples: _Count | None = None
    threshold: _Share | None = None
    selection: dict[str, Any] = {}
    intervals: dict[str, Annotated[list[float], Field(min_length=2, max_length=2)]] = {}
    undefined: dict[str, _Text] = {}
    shift: dict[str, dict[str, Any]] = {}
    cost: dict[str, Annotated[float, Field(ge=0)] | None] = {}
    evaluation: dict[str, Any] = {}
    versions: dict[str, Any] = {}
    commit: str | None = None
    threads: _Count | None = None
    format: _Count = FORMAT
    folder: Path | None = Field(default=None, exclude=True)

    def __init__(self, _where: str | None = None, _advice: str = _TO_WRITE, /, **fields: Any):
        try:
            super().__init__(**fields)
        except ValidationError as error:
            where = f"the result of {fields.get('method')!r}" if _where is None else _where
            raise ValueError(f"{_in_one_line(error, where)} {_advice}") from None

    @model_validator(mode="after")
    def _check_values(self):
        if self.task not in TASKS:
            _refuse(f"one of {TASKS}", "task", self.task)
        for what, known, place in (("METRICS", METRICS, "metrics"), ("COSTS", COSTS, "cost")):
            for key in getattr(self, place):
                if key not in known:
                    _refuse(f"a key of {what}", place, key)
        for key, value in self.metrics.items():
            _check_range(value, key, f"metrics[{key!r}]", "a finite number")
        for field in ("settings", "options", "selection", "shift", "evaluation", "versions"):
            for place, value in _leaves(getattr(self, field), field):
                if isinstance(value, float) and not math.isfinite(value):
                    _refuse("a finite number", place, value)
        for kind, scores in self.shift.items():
            for key in ("entropy", "mutual_information"):
                value = scores.get(key)
                if value is not None and not 0 <= value <= 1:
                    _refuse("an AUROC in 0..1, or None,", f"shift[{kind!r}][{key!r}]", value)
        return self

    @model_validator(mode="after")
    def _check_keys(self):
        for key, bounds in self.intervals.items():
            if key not in self.metrics:
                _refuse("a key of the metrics", "intervals", key)
            for bound in bounds:
                _check_range(bound, key, f"intervals[{key!r}]", "bounds")
            if bounds[0] > bounds[1]:
                _refuse("[low, high] with low <= high", f"intervals[{key!r}]", bounds)
        for key, reason in self.undefined.items():
            if key in self.metrics:
                _refuse("a value or a reason, not both,", f"undefined[{key!r}]", reason)
        for key in REQUIRED[self.task]:
            if key not in self.metrics and key not in self.undefined:
                _refuse("a value, or a reason in undefined,", f"metrics[{key!r}]", None)
        return self

    @property
    def is_trivial(self) -> bool:
        """Whether this row is no method but a trivial predictor or a bound."""
        return self.method.startswith(("trivial_", "bound_"))

    def record(self) -> Record | None:
        """The `scoring.Record` beside it; None where there is none."""
        path = None if self.folder is None else self.folder / "record.npz"
        return Record.load(path) if path is not None and path.exists() else None


def _refuse(expected, place, received):
    raise PydanticCustomError("refused", "refused", {"expected": expected, "place": place, "received": received})


def _check_range(value, key, place, what):
    low, high = METRICS[key].low, METRICS[key].high
    if low - 1e-6 <= value <= high + 1e-6:  # rounding may leave a distance of 0 a little below it
        return
    span = f"<= {high:g}" if math.isinf(low) else f">= {low:g}" if math.isinf(high) else f"in {low:g}..{high:g}"
    _refuse(f"{what} {span}", place, value)


def _in_one_line(error: ValidationError, where: str) -> str:
    """The first fault that pydantic found, in one line."""
    faults = error.errors(include_url=False)
    missing = sorted(str(one["loc"][0]) for one in faults if one["type"] == "missing")
    unknown = sorted(str(one["loc"][0]) for one in faults if one["type"] == "extra_forbidden")
    if missing or unknown:
        return f"Expected the fields of a result in {where}. Received: without {missing}, with unknown {unknown}."
    first = faults[0]
    expected = _EXPECTED.get(first["type"], first["msg"].removeprefix("Input should be "))
    names = [str(first["loc"][0]), *(f"[{name!r}]" for name in first["loc"][1:])] if first["loc"] else []
    found = {"expected": expected, "place": "".join(names), "received": first["input"]} | first.get("ctx", {})
    return f"Expected {found['expected']} as {found['place']} of {where}. Received: {found['received']!r}."


_EXPECTED = {  # type of pydantic's error -> what was expected, where its own words are no noun
    "string_too_short": "a text that is not empty",
    "string_type": "a text",
    "dict_type": "a dict",
    "too_short": "[low, high]",
    "too_long": "[low, high]",
    "int_type": "an integer",
    "float_type": "a number",
}


def _leaves(value, place):
    """(place, value) of everything in nested dicts and lists that is neither."""
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from _leaves(inner, f"{place}[{key!r}]")
    elif isinstance(value, list | tuple):
        for index, inner in enumerate(value):
            yield from _leaves(inner, f"{place}[{index}]")
    else:
        yield place, value


def write(result: Result, folder: str | os.PathLike, record: Record | None = None) -> Path:
    """Check a result and write it: `record.npz`, then `metrics.json`, each whole or not at all.

    It sets the result's `versions`, `commit` and `folder`. An older result in the folder is replaced; without a record
    there is no file of it, and no paired test later.

    Returns:
        The path of `metrics.json`.

    Raises:
        ValueError: as of `Result`, which was changed.
    """
    folder = Path(folder)
    try:
        content = json.loads(json.dumps(result.model_dump(warnings=False)))
    except TypeError as error:
        raise ValueError(
            f"Expected plain numbers, texts, lists and dicts in the result of {result.method!r}. Received: {error}. "
            "Use float(...) or .tolist()."
        ) from None
    Result(**content)
    for key in _OF_WRITE:
        del content[key]
    path, beside = folder / "metrics.json", folder / "record.npz"
    folder.mkdir(parents=True, exist_ok=True)
    path.unlink(missing_ok=True)  # if the write is interrupted, no metrics.json lies beside another result's record
    if record is None:
        beside.unlink(missing_ok=True)
    else:
        record.save(beside)
    folders.write_json(path, content)
    written = folders.read_json(path)
    for key in _OF_WRITE:
        setattr(result, key, written[key])
    result.folder = folder
    return path


def read(path: str | os.PathLike) -> Result:
    """Read and check a result, by the path of `metrics.json` or of its folder.

    Raises:
        ValueError: another format, or content that was changed or is no result. It names the file and the field.
        FileNotFoundError: no such file.
    """
    path = Path(path)
    path = path / "metrics.json" if path.is_dir() else path
    try:
        content = folders.read_json(path)
    except ValueError as error:
        raise ValueError(f"Expected a whole result in {path}. Received: {error}. {_TO_READ}") from None
    if content.get("format") != FORMAT:
        received = content.get("format", "none")
        raise ValueError(f"Expected format {FORMAT} in {path}. Received: {received!r}. {_TO_READ}")
    made = Result(str(path), _TO_READ, **content)
    made.folder = path.parent
    return made
