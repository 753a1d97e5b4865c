"""One honest table: every method on one dataset, trained alike, scored by the same code, with its intervals and costs.

    sbn-tf compare phantom_nodule --recipe quick

Each row is a run of `baselines` with a `Result` beside it. A finished row is read, not made again, so the test split
is predicted once for each trained method.
"""

from __future__ import annotations

import argparse
import dataclasses
import warnings
import zlib
from collections.abc import Callable, Collection, Iterable
from pathlib import Path

import numpy as np

from sbn_tf import datasets
from sbn_tf.core.checks import check_fraction, check_seed
from sbn_tf.datasets.base import EXCLUSIVE, SEGMENTATION
from sbn_tf.experiments import folders, recipes, report, results, scoring, trivial
from sbn_tf.experiments.experiment import TRAINING, Experiment, experiment, trained_in
from sbn_tf.experiments.experiment import recipe_of as recipe_of  # notebooks take it from here
from sbn_tf.experiments.methods import METHODS, Method, make
from sbn_tf.experiments.records import shift_auroc
from sbn_tf.experiments.result import Result
from sbn_tf.experiments.result import read as read_result
from sbn_tf.experiments.result import write as write_result
from sbn_tf.metrics import METRICS

__all__ = ["fitted", "row", "trivial_rows"]

CONTROLS = ("deterministic", "deterministic_longer")  # the plain network, and trained as long as ours


def row(settings: Experiment, method: str) -> Result:
    """Train one method and score it on the test split, or read the finished result.

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
    write_result(result, folder, record)
    return result


def _stored(settings, folder, wanted, recipe=None) -> Result | None:
    """The result in a folder, if it is whole and was scored on the same data in the same way; else None."""
    if not (folder / "metrics.json").exists():
        return None
    try:
        stored = read_result(folder)
        record = stored.record()
    except (ValueError, FileNotFoundError) as error:  # not found: another process is just writing it
        warnings.warn(f"{error} It is scored again.", stacklevel=3)
        return None
    if stored.evaluation != wanted or record is None:
        return None
    # Recipes that differ in step 3 share a run of step 1: the result names the recipe that asked for it.
    used = dataclasses.asdict(settings.recipe if recipe is None else recipe)
    # Two shares of a small network may choose the same weights: the result has the share that was asked for.
    rate = None if stored.r_bayes is None else settings.r_bayes
    return stored.model_copy(update={"recipe": settings.recipe.name, "settings": used, "r_bayes": rate})


def _folder(settings, made) -> Path:
    """Where a method's result lies: beside its weights, and of another split or number of samples below them."""
    parts = [settings.split] if settings.split != "test" else []
    if settings.num_samples not in (None, settings.recipe.num_samples):
        parts.append(f"samples{made.num_samples}")
    return Path(made.folder, "_".join(parts))


def fitted(settings: Experiment, method: str) -> Method:
    """A method of `baselines`, trained on the experiment's data or loaded."""
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


def trivial_rows(settings: Experiment) -> dict[str, Result]:
    """Rows of predictors that ignore the image, and the bound that is known of phantoms: name -> Result.

    "level_sets", where several raters marked the test images: masks where the probability map of `deterministic`
    exceeds 0.1, 0.3, 0.5, 0.7, 0.9. Finished results are read.
    """
    rated = settings.task == SEGMENTATION and settings.scored.num_raters > 1
    step1 = fitted(settings, "deterministic") if rated else None
    places, found = {}, {}
    for name in _trivial_names(settings):
        made = step1 if name == "trivial_level_sets" else None
        seed, shaping = None if made is None else settings.seed, _evaluation_settings(settings, made)
        folder = folders.run_folder(settings.runs, settings.data.card.name, name, seed or 0, shaping)
        places[name] = seed, folder, shaping
        if (stored := _stored(settings, folder, shaping)) is not None:
            found[name] = stored
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
        write_result(found[name], folder, record)
    return {name: found[name] for name in places}


def _trivial_names(settings) -> list[str]:
    """Of the rows that a dataset's split has."""
    constant = {SEGMENTATION: "all_background", **dict.fromkeys(EXCLUSIVE, "most_frequent")}
    names = [f"trivial_{constant.get(settings.task, 'all_negative')}", "trivial_prevalence"]
    names += ["trivial_level_sets"] if settings.task == SEGMENTATION and settings.scored.num_raters > 1 else []
    return names + (["bound_scene"] if settings.scored.truth_probs is not None else [])


def _trivial_records(settings, step1):
    data = settings.data
    if settings.split == "val":
        data = dataclasses.replace(data, val=data.test, test=data.val)
    records = trivial.trivial_records(
        data,
        threshold=_constant_threshold(settings),
        deterministic=None if step1 is None else step1.predict_samples,
        batch_size=settings.recipe.batch_size,
    )
    records = {f"trivial_{name}": record for name, record in records.items()}
    if settings.scored.truth_probs is not None:
        records["bound_scene"] = _record_of_scene(settings)
    return records


TRIVIAL = {
    "trivial_all_negative": "never anything, for anyone",
    "trivial_all_background": "no foreground, anywhere",
    "trivial_most_frequent": "the most frequent class of training",
    "trivial_prevalence": "the frequency of each label, class or pixel in training",
    "trivial_level_sets": "five level sets of the deterministic network's map, as masks",
    "bound_scene": "the probabilities that generated this phantom",
}


def all_rows(settings: Experiment, methods: Iterable[str] | None = None) -> list[Result]:
    """Every method's row, trivial ones first.

    Args:
        settings: the experiment.
        methods: names of `METHODS`; None: all, in their order.
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


def _cut(settings, probs_of: Callable[[slice], np.ndarray]) -> float:
    """The threshold; "validation" chooses it there, where `probs_of` gives the probabilities of a slice."""
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
        shift[kind] = {"severity": severity, **shift_auroc(record, moved)}
    if settings.swapped is not None:
        moved = scoring.score(made.predict_samples, _swapped(settings), settings.task, boundary=False, **options)
        shift[f"{settings.swapped} instead"] = {"severity": 1.0, **shift_auroc(record, moved)}
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
    threshold = _cut(settings, lambda part: settings.data.val.truth_probs[part])
    split, size = settings.scored, settings.recipe.batch_size
    evaluator = scoring.Evaluator(settings.task, train_prevalence=settings.prevalence(), threshold=threshold)
    about = scoring.about_images(split)
    return scoring.record_of(evaluator, size, lambda part: split.truth_probs[part][None], split.targets, **about)


def _result(experiment, record, **given):
    metrics = record.metrics()
    undefined = metrics.pop("undefined")
    intervals = record.bootstrap(num_resamples=experiment.num_resamples)
    intervals.pop("undefined")  # of intervals: the table says so
    data, groups = experiment.data, experiment.scored.groups
    return Result(
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


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `sbn-tf compare`."""
    parser.add_argument(
        "dataset",
        help="a name of sbn_tf.datasets.names(), a folder of images, or one that sbn-tf train wrote: then its settings",
    )
    parser.add_argument("--methods", help="comma-separated; default: all of " + ", ".join(METHODS))
    parser.add_argument("--r-bayes", type=float, help="fraction of the weights that is Bayesian, 0..1; default: 0.01")
    parser.add_argument("--seeds", help="comma-separated, such as 0,1,2; default: 0")
    parser.add_argument("--recipe", help=f"one of {', '.join(recipes.RECIPES)}; default: quick")
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


def run(given: argparse.Namespace) -> None:
    """Make or read every row, and print the tables."""
    methods = None if given.methods is None else [name.strip() for name in given.methods.split(",")]
    check_methods(methods or ())
    seeds = parse_seeds(given.seeds or "0")
    if Path(given.dataset, TRAINING).is_file():
        shared, trained = _as_trained(given)
        methods, seeds = methods or list(dict.fromkeys((*CONTROLS, trained))), seeds if given.seeds else [shared.seed]
    else:
        shared = _as_given(given)
    print(shared.data.card, shared.data, shared.recipe, f"network: {shared.network}", sep="\n")
    rows = []
    for index, seed in enumerate(seeds):
        settings = dataclasses.replace(shared, seed=seed)
        made = all_rows(settings, methods)
        rows += made if index == 0 else [one for one in made if one.seed is not None]
    parts = report.tables(results.frame(rows), shared.task)
    for title, table in parts.items():
        print(f"\n## {title}\n\n{report.to_markdown(table)}")
    print("\n## What the rows and columns are\n")
    print("\n".join(f"- {name}: {title}" for name, title in {one.method: one.title for one in rows}.items()))
    shown = dict.fromkeys(key for table in parts.values() for key in table.columns if key in METRICS)
    print(f"\n{report.describe_metrics(shown)}")
    folders = [one.folder for one in rows if one.folder is not None]
    print(f"\nEach row is a metrics.json with its settings in {folders[-1].parents[2]}")


_NUMBERS = ("network", "epochs", "bayes_epochs", "num_samples", "keep", "limit", "size", "normalisation")


def _as_given(given):
    rate = 0.01 if given.r_bayes is None else check_fraction("r_bayes", given.r_bayes)
    return experiment(
        given.dataset,
        given.recipe or "quick",
        **{key: getattr(given, key) for key in _NUMBERS},
        data_root=given.data_root,
        options={key: getattr(given, key) for key in ("fold", "split") if getattr(given, key) is not None},
        r_bayes=rate,
        runs=given.runs,
        threshold=_threshold(given.threshold),
        num_resamples=given.num_resamples,
    )


def _as_trained(given):
    """The experiment of a folder that `sbn-tf train` wrote, and its method."""
    own = (*_NUMBERS, "recipe", "r_bayes", "fold", "split", "runs", "data_root")
    if said := [f"--{key.replace('_', '-')}" for key in own if getattr(given, key) is not None]:
        raise ValueError(
            f"Expected the settings of {given.dataset} alone, a trained network. Received: {' '.join(said)}"
        )
    shared, asked = trained_in(Path(given.dataset))
    changes = {"threshold": _threshold(given.threshold), "num_resamples": given.num_resamples}
    return dataclasses.replace(shared, **changes), asked["method"]


def parse_seeds(text: str) -> list[int]:
    """Seeds from `"0,1,2"`; ValueError where one is no integer >= 0, or given twice."""
    try:
        seeds = [int(seed) for seed in text.split(",")]
    except ValueError:
        raise ValueError(f"Expected --seeds, integers >= 0 with commas between, as 0,1,2. Received: {text}") from None
    if len(set(seeds)) < len(seeds):
        raise ValueError(f"Expected each of --seeds once. Received: {text}")
    return [check_seed(seed) for seed in seeds]


def _threshold(text):
    try:
        return text if text == "validation" else float(text)
    except ValueError:
        raise ValueError(f'Expected --threshold, between 0 and 1, or "validation". Received: {text}') from None
