"""One honest table: every method on one dataset, trained alike, scored by the same code, with its intervals and costs.

    python -m sbn_tf.experiments.compare phantom_nodule --recipe quick

Each row is a run of a method and a `results.Result` beside it. What is finished is read, not made again: the test
split is predicted once for each trained method.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import logging
import os
import warnings
import zlib
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from sbn_tf import datasets
from sbn_tf.datasets.base import BINARY, EXCLUSIVE, MULTI_LABEL, SEGMENTATION
from sbn_tf.experiments import folders, plots, recipes, results, scoring
from sbn_tf.experiments.methods import METHODS, Method, make
from sbn_tf.saliency import check_r_bayes

__all__ = [
    "Experiment",
    "all_rows",
    "check_methods",
    "experiment",
    "fitted",
    "main",
    "paired_table",
    "parse_seeds",
    "recipe_of",
    "row",
    "shift_table",
    "tables",
    "trivial_rows",
]

SHIFTS = {"noise": 2.0, "blur": 1.5, "contrast": 0.5}  # kind -> severity, of `evaluation.shifted`


@dataclass(frozen=True, eq=False)
class Experiment:
    """What all rows of one table share.

    Args:
        data: `datasets.Data`.
        recipe: a `recipes.Recipe`.
        network: a name of `networks.NETWORKS`.
        r_bayes: fraction of the eligible weights that is Bayesian, where a method takes one, 0..1.
        seed: of initial weights, shuffling and noise.
        runs: folder of all runs; None: `runs/` of the repository or the working directory.
        limit: the limit the data were loaded with, or None.
        options: the dataset's own options that were given, such as `fold`.
        normalisation: "train" or "paper".
        threshold: where probabilities are cut into decisions, 0..1, or "validation": chosen there, see
            `evaluation.select_threshold`.
        num_resamples: of the bootstrap.
        shifts: kind -> severity of the shifted copies of the images; {} for none.
        swapped: name of a dataset of the same task and channels, whose test images stand in for images from another
            source: told as a shift; None: none.
        data_root: folder of the real data, for `swapped`; None: the variable SBN_TF_DATA, or data/.
        split: what is scored: "test", or "val", on which anything may be chosen.
        num_samples: posterior samples of a prediction, where a method samples; None: the recipe's.
        verbose: show progress bars.
    """

    data: datasets.base.Data
    recipe: recipes.Recipe
    network: str
    r_bayes: float = 0.01
    seed: int = 0
    runs: str | os.PathLike | None = None
    limit: int | None = None
    options: dict = field(default_factory=dict)
    normalisation: str = "train"
    threshold: float | str = 0.5
    num_resamples: int = 1000
    shifts: dict = field(default_factory=lambda: dict(SHIFTS))
    swapped: str | None = None
    data_root: str | os.PathLike | None = None
    split: str = "test"
    num_samples: int | None = None
    verbose: bool = True

    def __post_init__(self):
        chosen = self.threshold == "validation"
        if not chosen and not (isinstance(self.threshold, int | float) and 0 < self.threshold < 1):
            raise ValueError(
                f'Expected threshold between 0 and 1, or "validation". Received: threshold={self.threshold!r}'
            )
        if self.swapped is not None:
            mine, other = self.data.card, datasets.card(self.swapped)
            if (other.task, other.channels) != (mine.task, mine.channels):
                raise ValueError(
                    f"Expected swapped, a dataset of {mine.task} with {mine.channels} channels. "
                    f"Received: {self.swapped!r}, of {other.task} with {other.channels}"
                )
        if self.split not in ("test", "val"):
            raise ValueError(f'Expected split "test" or "val". Received: split={self.split!r}')
        if self.num_resamples < 1:
            raise ValueError(f"Expected num_resamples >= 1. Received: num_resamples={self.num_resamples!r}")

    @property
    def task(self) -> str:
        """The dataset's task."""
        return self.data.card.task

    @property
    def scored(self) -> datasets.base.Split:
        """The split that is scored."""
        return getattr(self.data, self.split)

    def prevalence(self) -> np.ndarray:
        """Training frequency of 1, of each label, class or pixel."""
        train = self.data.train
        return scoring.prevalence(self.task, train.targets, train.rater_valid)


def experiment(
    dataset: str,
    recipe: str = "quick",
    *,
    network: str | None = None,
    epochs: int | None = None,
    bayes_epochs: int | None = None,
    num_samples: int | None = None,
    keep: str | None = None,
    changes: str | dict = "",
    limit: int | None = None,
    size: int | None = None,
    normalisation: str | None = None,
    data_root: str | os.PathLike | None = None,
    options: dict | None = None,
    **shared,
) -> Experiment:
    """Load a dataset and settle everything that the rows of a table share, from plain numbers and names.

    Args:
        dataset: a name of `datasets.names()`, or a folder of images.
        recipe: a name of `recipes.RECIPES`.
        network: a name of `networks.NETWORKS`; None: a small one for "quick", the paper's own for its recipes.
        epochs, bayes_epochs, num_samples, keep: changes of the recipe; None: as it is.
        changes: of any other field of the recipe: a dict, or a text as `recipes.parse_changes` reads it.
        limit: at most so many images a split; None: all.
        size: image side in pixels; None: the dataset's default.
        normalisation: "train" or "paper"; None: the paper's constants for its recipes, where it has some.
        data_root: folder of the real data; None: the variable SBN_TF_DATA, or data/.
        options: the dataset's own options, such as `{"fold": 2}`.
        shared: other fields of `Experiment`.

    Raises:
        ValueError: an unknown name, or a number out of its range.
        FileNotFoundError: data that are not there; the message says where to get them.
    """
    card = datasets.card(dataset)
    normalisation = normalisation or recipes.normalisation_for(recipe, card)
    settings = recipe_of(
        dataset, recipe, epochs=epochs, bayes_epochs=bayes_epochs, num_samples=num_samples, keep=keep, changes=changes
    )
    data = datasets.load(
        dataset, root=data_root, size=size, limit=limit, normalisation=normalisation, **(options or {})
    )
    return Experiment(
        data,
        settings,
        network or recipes.network_for(recipe, card),
        limit=limit,
        options=options or {},
        normalisation=normalisation,
        data_root=data_root,
        **shared,
    )


def recipe_of(dataset: str, recipe: str = "quick", *, changes: str | dict = "", **others) -> recipes.Recipe:
    """The recipe that `experiment` of the same arguments has; of `others` those count that are the recipe's."""
    changes = recipes.parse_changes(changes) if isinstance(changes, str) else dict(changes)
    named = {key: value for key, value in others.items() if key in _NAMED and value is not None}
    if twice := sorted(key for key in named if key in changes and changes[key] != named[key]):
        raise ValueError(f"Expected each field once. Received: {', '.join(twice)} in changes, and as a parameter.")
    named = {key: value for key, value in named.items() if key not in changes}
    return dataclasses.replace(recipes.recipe_for(recipe, datasets.card(dataset)), **changes, **named)


_NAMED = ("epochs", "bayes_epochs", "num_samples", "keep")  # parameters of their own, in notebooks and shells


def row(settings: Experiment, method: str) -> results.Result:
    """Train one method and score it on the test split, or read what was scored before.

    Writes `metrics.json` and `record.npz` into the method's run folder.
    """
    made = fitted(settings, method)
    wanted = _evaluation_settings(settings, made)
    folder = _folder(settings, made)
    if (stored := _stored(settings, folder, wanted, made.recipe_used)) is not None:
        return stored
    val, selection = settings.data.val, dict(made.selection)
    threshold = _cut(settings, lambda part: made.predict_samples(val.normalised(part)).mean(0))
    if settings.threshold == "validation":
        selection["threshold"] = threshold
    record, shift = _score(made, settings, threshold)
    result = _result(
        settings,
        record,
        method=method,
        title=METHODS[method].title,
        seed=settings.seed,
        r_bayes=settings.r_bayes if made.takes_r_bayes else None,
        num_samples=made.num_samples,
        threshold=threshold,
        selection=selection,
        shift=shift,
        cost=made.cost(),
        settings=dataclasses.asdict(made.recipe_used),
        evaluation=wanted,
    )
    results.write(result, folder, record)
    return result


def _stored(settings, folder, wanted, recipe=None) -> results.Result | None:
    """The result in a folder, if it is whole and its score depended on the same; None: it is to be made."""
    if not (folder / "metrics.json").exists():
        return None
    try:
        stored = results.read(folder)
        record = stored.record()
    except (ValueError, FileNotFoundError) as error:  # not found: another process is just writing it
        warnings.warn(f"{error} It is scored anew.", stacklevel=3)
        return None
    if stored.evaluation != wanted or record is None:
        return None
    # A run of step 1 alone is shared by recipes of other steps 3: told under the one that asks.
    used = dataclasses.asdict(settings.recipe if recipe is None else recipe)
    # Two shares of a small network may choose the same weights: told under the one that asks, too.
    rate = None if stored.r_bayes is None else settings.r_bayes
    return dataclasses.replace(stored, recipe=settings.recipe.name, settings=used, r_bayes=rate)


def _folder(settings, made) -> Path:
    """Where a method's result lies: beside its weights, and of another split or number of samples below them."""
    parts = [settings.split] if settings.split != "test" else []
    if settings.num_samples not in (None, settings.recipe.num_samples):
        parts.append(f"samples{made.num_samples}")
    return Path(made.folder, "_".join(parts))


def fitted(settings: Experiment, method: str) -> Method:
    """A method, trained on the experiment's data or loaded."""
    made = make(
        method,
        settings.recipe,
        r_bayes=settings.r_bayes,
        seed=settings.seed,
        network=settings.network,
        runs=settings.runs,
        limit=settings.limit,
        num_samples=settings.num_samples,
        verbose=settings.verbose,
    )
    return made.fit(settings.data)


def trivial_rows(settings: Experiment) -> dict[str, results.Result]:
    """Rows of predictors that never look at an image, and of what is known of phantoms: name -> Result.

    "level_sets", where several raters marked the test images: masks where the probability map of `deterministic`
    exceeds 0.1, 0.3, 0.5, 0.7, 0.9. What was scored before is read.
    """
    rated = settings.task == SEGMENTATION and settings.scored.num_raters > 1
    step1 = fitted(settings, "deterministic") if rated else None
    places = {name: _trivial_place(settings, name, step1) for name in _trivial_names(settings)}
    stored = {name: _stored(settings, folder, shaping) for name, (_, folder, shaping) in places.items()}
    found = {name: one for name, one in stored.items() if one is not None}
    if len(found) == len(places):
        return found
    for name, record in _trivial_records(settings, step1).items():
        seed, folder, shaping = places[name]
        found[name] = _result(
            settings,
            record,
            method=name,
            title=TRIVIAL[name],
            seed=seed,
            num_samples=record.num_samples,
            threshold=record.threshold,
            settings=dataclasses.asdict(settings.recipe),
            evaluation=shaping,
        )
        results.write(found[name], folder, record)
    return {name: found[name] for name in places}


def _trivial_names(settings) -> list[str]:
    """Of the rows that a dataset's split has."""
    constant = {SEGMENTATION: "all_background", **dict.fromkeys(EXCLUSIVE, "most_frequent")}
    names = [f"trivial_{constant.get(settings.task, 'all_negative')}", "trivial_prevalence"]
    names += ["trivial_level_sets"] if settings.task == SEGMENTATION and settings.scored.num_raters > 1 else []
    return names + (["bound_scene"] if settings.scored.truth_probs is not None else [])


def _trivial_place(settings, name, step1):
    """Seed, folder, and what the score depends on."""
    made = step1 if name == "trivial_level_sets" else None
    seed, shaping = None if made is None else settings.seed, _evaluation_settings(settings, made)
    return seed, folders.run_folder(settings.runs, settings.data.card.name, name, seed or 0, shaping), shaping


def _trivial_records(settings, step1):
    data = settings.data
    if settings.split == "val":
        data = dataclasses.replace(data, val=data.test, test=data.val)
    records = scoring.trivial_records(
        data,
        threshold=_constant_threshold(settings),
        deterministic=None if step1 is None else step1.predict_samples,
        batch_size=settings.recipe.batch_size,
    )
    records = {f"trivial_{name}": record for name, record in records.items()}
    return records | ({"bound_scene": _record_of_scene(settings)} if data.test.truth_probs is not None else {})


TRIVIAL = {
    "trivial_all_negative": "never anything, for anyone",
    "trivial_all_background": "no foreground, anywhere",
    "trivial_most_frequent": "the most frequent class of training",
    "trivial_prevalence": "the frequency of each label, class or pixel in training",
    "trivial_level_sets": "five level sets of the deterministic network's map, as masks",
    "bound_scene": "the probabilities that generated this phantom",
}


def all_rows(settings: Experiment, methods: Iterable[str] | None = None) -> list[results.Result]:
    """Every method's row, trivial ones first.

    Args:
        settings: the experiment.
        methods: names of `methods.METHODS`; None: all, in their order.
    """
    methods = list(METHODS) if methods is None else list(methods)
    check_methods(methods)
    rows = list(trivial_rows(settings).values())
    return rows + [row(settings, name) for name in methods]


def check_methods(methods: Collection[str]) -> None:
    """Raise ValueError where a name is unknown or given twice."""
    if len(set(methods)) < len(methods):
        raise ValueError(f"Expected each method once. Received: {', '.join(methods)}")
    if unknown := [name for name in methods if name not in METHODS]:
        raise ValueError(f"Expected methods among {', '.join(METHODS)}. Received: {unknown}")


def tables(rows: list[results.Result], task: str) -> dict[str, str]:
    """The table in parts that fit a page: title -> Markdown."""
    parts = {
        "How good are the probabilities?": results.KEYS[task],
        "Does the uncertainty help?": ("entropy", "mutual_information", *USE[task]),
        "Calibration": _CALIBRATION_OF_MASKS if task == SEGMENTATION else _CALIBRATION,
    }
    if task in PAPER:
        parts["The paper's metrics, as it defines them"] = PAPER[task]
    made = {title: results.table(rows, keys) for title, keys in parts.items()}
    if any(one.shift for one in rows):
        made["Does it notice shifted images? AUROC against clean ones"] = shift_table(rows)
    made["What does it cost?"] = results.cost_table(rows)
    return made


def paired_table(rows: list[results.Result], rival: results.Result, key: str = "nll", num_resamples: int = 1000) -> str:
    """Each method's metric less a rival's, on the same images and of the same seed: Markdown, a row a method.

    Intervals and p-values are of the paired bootstrap, the p-values adjusted for the number of methods (Holm). They
    speak of other test images, not of other trainings: of several seeds only the rival's is compared. A method whose
    metric is undefined in more than 5 % of the resamples (the AUC of a rare label) has no row.

    Raises:
        ValueError: a rival without a record or without this metric.
    """
    ours, found = rival.record(), {}
    if ours is None or key not in rival.metrics:
        raise ValueError(f"Expected a rival with a record and {key!r}. Received: {rival.method!r} in {rival.folder}")
    for one in rows:
        same = one.seed == rival.seed and (one.method != rival.method or one.r_bayes != rival.r_bayes)
        if not one.is_trivial and same and key in one.metrics and (record := one.record()) is not None:
            label = one.method if one.r_bayes is None else f"{one.method} r={one.r_bayes:g}"
            paired = scoring.compare(record, ours, keys=[key], num_resamples=num_resamples)
            if key in paired:  # else it is undefined in too many resamples
                found[label] = paired[key]
    adjusted = results.holm({name: one["p_value"] for name, one in found.items()})
    shown = {
        name: {
            f"{key} less {rival.method}'s": f"{one['difference']:+.4f}",
            "95 % interval": f"[{one['low']:+.4f}, {one['high']:+.4f}]",
            "p, adjusted": adjusted[name],
        }
        for name, one in found.items()
    }
    return plots.format_table(shown, [f"{key} less {rival.method}'s", "95 % interval", "p, adjusted"])


def shift_table(rows: list[results.Result]) -> str:
    """AUROC of each image's uncertainty for its being shifted, against its clean self: Markdown, a row a method.

    0.5: the uncertainty does not tell them apart; below: it is *lower* on shifted images. Of several seeds the mean and
    the standard deviation. "-": one sample has no mutual information.
    """
    parts = {"entropy": "entropy", "mutual_information": "mutual information"}
    table, columns = {}, {}
    for group in results.group([one for one in rows if one.shift]):
        cells = table.setdefault(group.label, {})
        for kind, key in itertools.product(group.results[0].shift, parts):
            columns[column := f"{kind}: {parts[key]}"] = None
            values = [v for one in group.results if (v := one.shift.get(kind, {}).get(key)) is not None]
            if len(values) == 1:
                cells[column] = values[0]
            elif values:
                cells[column] = f"{np.mean(values):.3f} +- {np.std(values, ddof=1):.3f}"
    severities = ", ".join(f"{kind} {found['severity']:g}" for kind, found in rows[-1].shift.items())
    note = f"0.5: blind to the shift; below 0.5: surer of shifted images; -: one sample. Severities: {severities}."
    return f"{plots.format_table(table, list(columns))}\n\n{note}"


_CALIBRATION = ("ece", "ece_mass", "ece_label")
_CALIBRATION_OF_MASKS = ("ece", "ece_mass", "ece_region")
_USE = ("aurc", "excess_aurc", "error_auroc", "error_auroc_mi")
USE = {
    SEGMENTATION: (*_USE, "pixel_error_auroc", "pixel_error_auroc_mi", "entropy_disagreement_pearson"),
    MULTI_LABEL: (*_USE, "label_error_auroc"),
    BINARY: (*_USE, "label_error_auroc"),
    EXCLUSIVE[0]: _USE,
    EXCLUSIVE[1]: _USE,
}
PAPER = {
    SEGMENTATION: ("paper_dice", "paper_iou", "paper_brier", "paper_brier_softmax_twice", "paper_entropy", "paper_ece"),
    MULTI_LABEL: ("paper_accuracy", "paper_brier", "paper_entropy", "paper_ece"),
}


def _cut(settings, probs_of: Callable[[slice], np.ndarray]) -> float:
    """The threshold, chosen on the validation split where it is to be: `probs_of` gives probabilities of its slices."""
    if settings.threshold != "validation":
        return float(settings.threshold)
    val, size = settings.data.val, settings.recipe.batch_size
    parts = [slice(start, start + size) for start in range(0, val.num_examples, size)]
    probs = np.concatenate([probs_of(part) for part in parts])
    return scoring.select_threshold(probs, val.targets, settings.task, val.rater_valid)


def _constant_threshold(settings) -> float:
    """The cut of the prevalence; that of a map of zeros makes no difference."""
    frequency, num = settings.prevalence(), settings.data.val.num_examples
    return _cut(settings, lambda part: np.broadcast_to(frequency, (len(range(num)[part]), *frequency.shape)))


def _without_channel(probs):
    return probs[..., 0] if probs.ndim == 4 else probs


def _evaluation_settings(settings, made=None):
    """What a score depends on: the test images and patients, how they are scored, and the weights of a method."""
    groups = settings.scored.groups
    found = {
        "data": settings.data.digest(),
        "groups": None if groups is None else zlib.crc32("\n".join(map(str, groups)).encode()),
        "threshold": settings.threshold,
        "num_resamples": settings.num_resamples,
        "shifts": dict(settings.shifts),
        "split": settings.split,
    }
    if settings.swapped is not None:
        found["swapped"] = [settings.swapped, _swapped(settings).num_examples, "normalised as the others"]
    if made is not None:
        found["num_samples"] = made.num_samples
        found["weights"] = [zlib.crc32((run.folder / "model.keras").read_bytes()) for run in made.trained]
    return found


def _score(made, settings, threshold):
    split = settings.scored
    options = {
        "batch_size": settings.recipe.batch_size,
        "train_prevalence": settings.prevalence(),
        "threshold": threshold,
        "verbose": settings.verbose,
    }
    record = scoring.score(made.predict_samples, split, settings.task, **options)
    shift = {}
    for kind, severity in settings.shifts.items():
        moved = scoring.score(
            made.predict_samples, split, settings.task, boundary=False, shift=(kind, severity), **options
        )
        shift[kind] = {"severity": severity, **scoring.shift_auroc(record, moved)}
    if settings.swapped is not None:
        moved = scoring.score(made.predict_samples, _swapped(settings), settings.task, boundary=False, **options)
        shift[f"{settings.swapped} instead"] = {"severity": 1.0, **scoring.shift_auroc(record, moved)}
    return record, shift


def _swapped(settings):
    """The test split of the other dataset, of this one's size, normalised as this one's images are."""
    key = (settings.swapped, settings.data.input_shape[0], settings.data_root, settings.limit)
    if key not in _SWAPPED:
        _SWAPPED[key] = datasets.load(key[0], size=key[1], root=key[2], limit=key[3]).test
    mine = settings.data.test
    return dataclasses.replace(_SWAPPED[key], mean=mine.mean, sd=mine.sd)


_SWAPPED = {}  # loaded once in a process


def _record_of_scene(settings):
    """The record of the probabilities that generated a phantom's images."""
    threshold = _cut(settings, lambda part: _without_channel(settings.data.val.truth_probs[part]))
    split, size = settings.scored, settings.recipe.batch_size
    evaluator = scoring.Evaluator(settings.task, train_prevalence=settings.prevalence(), threshold=threshold)
    for start in range(0, split.num_examples, size):
        part = slice(start, start + size)
        extra = {key: None if (value := getattr(split, key)) is None else value[part] for key in _OF_IMAGES}
        evaluator.update(split.truth_probs[part][None], split.targets[part], **extra)
    return evaluator.record()


_OF_IMAGES = ("rater_valid", "groups", "ids")


def _result(experiment, record, **given):
    metrics = record.metrics()
    undefined = metrics.pop("undefined")
    intervals = record.bootstrap(num_resamples=experiment.num_resamples)
    intervals.pop("undefined")  # of intervals: the table says so
    data, groups = experiment.data, experiment.scored.groups
    return results.Result(
        dataset=data.card.name,
        task=experiment.task,
        recipe=experiment.recipe.name,
        network=experiment.network,
        options=dict(experiment.options),
        limit=experiment.limit,
        size=data.input_shape[0],
        normalisation=experiment.normalisation,
        leak=data.leak,
        num_train=data.train.num_examples,
        num_val=data.val.num_examples,
        num_test=data.test.num_examples,
        num_groups=None if groups is None else len(np.unique(groups)),
        split=experiment.split,
        metrics=metrics,
        intervals={key: list(bounds) for key, bounds in intervals.items() if key in metrics},
        undefined=undefined,
        **given,
    )


def main(arguments: Sequence[str] | None = None) -> None:
    """Command line: make or read every row, print the tables."""
    parser = argparse.ArgumentParser(
        prog="python -m sbn_tf.experiments.compare",
        description="Train every method on one dataset, or read what is trained, and print one table with intervals.",
    )
    parser.add_argument("dataset", help="a name of sbn_tf.datasets.names(), or a folder of images")
    parser.add_argument("--methods", help="comma-separated; default: all of " + ", ".join(METHODS))
    parser.add_argument("--r-bayes", type=float, default=0.01, help="fraction of the weights that is Bayesian, 0..1")
    parser.add_argument("--seeds", default="0", help="comma-separated, such as 0,1,2")
    parser.add_argument("--recipe", default="quick", help=f"one of {', '.join(recipes.RECIPES)}")
    parser.add_argument("--network", help="a name of sbn_tf.experiments.networks.NETWORKS; default: the recipe's")
    parser.add_argument("--epochs", type=int, help="of step 1; default: the recipe's")
    parser.add_argument("--bayes-epochs", type=int, help="of step 3; default: the recipe's")
    parser.add_argument("--num-samples", type=int, help="posterior samples; default: the recipe's")
    parser.add_argument("--keep", choices=("last", "best"), help="weights of the last or of the best validation epoch")
    parser.add_argument("--limit", type=int, help="at most so many images a split")
    parser.add_argument("--size", type=int, help="image side in pixels")
    parser.add_argument("--fold", type=int, help="of lidc and lidc_patches")
    parser.add_argument("--split", help="of lidc and lidc_patches: patient or paper")
    parser.add_argument("--normalisation", choices=("train", "paper"))
    parser.add_argument("--threshold", default="0.5", help='where probabilities are cut: 0..1, or "validation"')
    parser.add_argument("--num-resamples", type=int, default=1000, help="of the bootstrap")
    parser.add_argument("--data-root", help="folder of the real data; default: SBN_TF_DATA, or data/")
    parser.add_argument("--runs", help="folder of finished runs; default: runs/ of the repository")
    given = parser.parse_args(arguments)
    logging.getLogger("tensorflow").setLevel("ERROR")  # each network is traced anew: no news
    try:
        methods = None if given.methods is None else [name.strip() for name in given.methods.split(",")]
        check_methods(methods or ())
        seeds = parse_seeds(given.seeds)
        check_r_bayes(given.r_bayes)
        threshold = _threshold(given.threshold)
        options = {key: getattr(given, key) for key in ("fold", "split") if getattr(given, key) is not None}
        keys = ("network", "epochs", "bayes_epochs", "num_samples", "keep", "limit", "size", "normalisation")
        shared = experiment(
            given.dataset,
            given.recipe,
            **{key: getattr(given, key) for key in keys},
            data_root=given.data_root,
            options=options,
            r_bayes=given.r_bayes,
            runs=given.runs,
            threshold=threshold,
            num_resamples=given.num_resamples,
        )
        print(shared.data.card, shared.data, shared.recipe, f"network: {shared.network}", sep="\n")
        rows = []
        for index, seed in enumerate(seeds):
            settings = dataclasses.replace(shared, seed=seed)
            made = all_rows(settings, methods)
            rows += made if index == 0 else [one for one in made if one.seed is not None]
        parts = tables(rows, shared.task)
    except (ValueError, FileNotFoundError) as error:
        raise SystemExit(str(error)) from None
    for title, text in parts.items():
        print(f"\n## {title}\n\n{text}")
    print("\n## What the rows and columns are\n")
    print("\n".join(f"- {name}: {title}" for name, title in {one.method: one.title for one in rows}.items()))
    calibration = _CALIBRATION_OF_MASKS if shared.task == SEGMENTATION else _CALIBRATION
    shown = dict.fromkeys((*results.KEYS[shared.task], *calibration, *USE[shared.task], *PAPER.get(shared.task, ())))
    print(f"\n{results.describe_metrics(shown)}")
    folders = [one.folder for one in rows if one.folder is not None]
    print(f"\nEach row is a metrics.json with its settings in {folders[-1].parents[2]}")


def parse_seeds(text: str) -> list[int]:
    """Seeds from `"0,1,2"`; ValueError where one is no integer >= 0, or given twice."""
    try:
        seeds = [int(seed) for seed in text.split(",")]
    except ValueError:
        raise ValueError(f"Expected --seeds, integers >= 0 with commas between, as 0,1,2. Received: {text}") from None
    if len(set(seeds)) < len(seeds):
        raise ValueError(f"Expected each of --seeds once. Received: {text}")
    return [folders.check_seed(seed) for seed in seeds]


def _threshold(text):
    try:
        return text if text == "validation" else float(text)
    except ValueError:
        raise ValueError(f'Expected --threshold, between 0 and 1, or "validation". Received: {text}') from None


if __name__ == "__main__":
    main()
