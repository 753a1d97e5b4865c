"""Studies: the questions of a plan, each a table of variants of the method and its rivals, on one dataset.

A variant is a method of `baselines` and changes of a recipe. Each is trained, scored on the validation split, and added
to a CSV table as soon as it is done. A study that was stopped goes on, and reads what is finished. `nbs/09_what_works`
reads the tables.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import sys
import traceback
from collections.abc import Collection, Sequence
from pathlib import Path

import numpy as np
import pandas as pd

from sbn_tf.core.files import write_atomically
from sbn_tf.experiments import compare, folders, networks, plan, recipes, results, training
from sbn_tf.experiments.methods import METHODS
from sbn_tf.experiments.plan import Dataset, Plan, Question, Variant
from sbn_tf.saliency import overlap, saliency, top_k

__all__ = ["read", "rows_of"]


def read(path: str | os.PathLike) -> Plan:
    """Read the plan of a study: questions about one dataset, whose names are all known; else a ValueError."""
    found = plan.read(path)
    if not found.questions:
        raise ValueError(f"Expected questions in {path}, one or more. Received: none")
    _dataset(found)
    check_names(found)
    return found


def _dataset(study: Plan) -> tuple[str, Dataset]:
    """The one dataset of a study, of which it may have several folds."""
    ((name, data), *others) = study.datasets.items()
    if others:
        raise ValueError(f"Expected one dataset in a study. Received: {len(others) + 1}")
    return name, data


def check_names(study: Plan) -> None:
    """Raise ValueError where a plan's recipe, or a network, method or change of the recipe, is none."""

    def check(what, names, known):
        if unknown := sorted(set(names) - set(known)):
            raise ValueError(f"Expected {what} among {', '.join(known)}.\nReceived: {', '.join(unknown)}")

    variants = [variant for question in study.questions.values() for variant in question.variants]
    parts = list(study.datasets.values())
    check("a recipe", [study.recipe], recipes.RECIPES)
    check("networks", [one.network for one in parts if one.network], networks.NETWORKS)
    asked = [method for one in parts for method in one.methods] + [variant.method for variant in variants]
    check("methods", asked, METHODS)
    for changes in [one.changes or "" for one in parts] + [variant.changes for variant in variants]:
        recipes.parse_changes(changes)


def _experiment(study: Plan, fold: int, **options) -> compare.Experiment:
    name, data = _dataset(study)
    return compare.experiment(name, study.recipe, **{**options, **data.arguments(fold)})


def run_study(
    study: Plan,
    *,
    runs: str | os.PathLike | None = None,
    table: str | os.PathLike | None = None,
    seeds: Sequence[int] | None = None,
    folds: Sequence[int] | None = None,
    names: Collection[str] | None = None,
    split: str = "val",
    verbose: bool = False,
) -> list[str]:
    """Train and score every variant, or read what is finished, and keep the table up to date.

    Args:
        study: from `read`.
        runs: folder of all runs; None: `runs/` of the repository or the working directory.
        table: path of the CSV; None: the plan's, or `results/<name>.csv`.
        seeds, folds, names: of these seeds, folds and questions only; None: all of the study.
        split: what is scored: "val", or "test" once all is chosen.
        verbose: show the progress of each training.

    Returns:
        One line for each variant that failed, with its error; [] where none did.
    """
    if unknown := [name for name in names or () if name not in study.questions]:
        raise ValueError(f"Expected questions among {', '.join(study.questions)}. Received: {unknown}")
    place = folders.repository() / (study.table or f"results/{study.name}.csv") if table is None else Path(table)
    data = _dataset(study)[1]
    seeds, folds = data.seeds if seeds is None else seeds, data.folds if folds is None else folds
    asked = [variant for name in names or study.questions for variant in study.questions[name].variants]
    variants = list({one.model_copy(update={"label": ""}): one for one in reversed(asked)}.values())[::-1]
    failed = []
    for fold in folds:
        base = _experiment(study, fold, runs=runs, split=split, num_resamples=200, verbose=verbose)
        if split == "val":
            base = dataclasses.replace(base, shifts={}, swapped=None)  # nothing is chosen by these
        for settings in [dataclasses.replace(base, seed=seed) for seed in seeds]:
            # Predictors that ignore the image, and level sets of one map.
            results.write_csv(results.frame(compare.trivial_rows(settings).values()), place)
            failed += [found for variant in variants if (found := _add_row(settings, variant, fold, place))]
    return failed


def _add_row(settings, variant, fold, place) -> str:
    """Add a variant's row to the table; what failed, or ""."""
    where = f"{variant.label}, seed {settings.seed}" + (f", fold {fold}" if fold >= 0 else "")
    try:
        row = compare.row(settings_of(settings, variant), variant.method)
    except Exception as error:  # of one variant: the others go on
        traceback.print_exc()
        return f"{where}: {str(error).splitlines()[0] if str(error) else type(error).__name__}"
    results.write_csv(results.frame([row]), place)
    print(f"NLL {row.metrics['nll']:.5f}  {where}", flush=True)
    return ""


def settings_of(base: compare.Experiment, variant: Variant) -> compare.Experiment:
    """The experiment of a variant, from that of its plan."""
    recipe = dataclasses.replace(base.recipe, **recipes.parse_changes(variant.changes))
    return dataclasses.replace(base, recipe=recipe, r_bayes=variant.r_bayes, num_samples=variant.num_samples)


def stability(
    study: Plan,
    *,
    runs: str | os.PathLike | None = None,
    seeds: Sequence[int] | None = None,
    r_bayes: float = 0.01,
    early: int = 20,
) -> pd.DataFrame:
    """How far the choice of weights repeats itself: shares that two masks have in common, for each score.

    Two random choices of a fraction `r_bayes` have this share in common. A row for each score and seed: "score",
    "seed", "halves" (scores from the two halves of the training images), "other_seed" (from the network of the next
    seed) and "early" (from the network of `early` epochs).
    """
    fold = _dataset(study)[1].folds[0]
    base = dataclasses.replace(_experiment(study, fold, runs=runs, verbose=False), swapped=None)
    seeds = list(_dataset(study)[1].seeds if seeds is None else seeds)
    loss, data, found = recipes.loss_for(base.recipe, base.data), base.data, []
    middle = data.train.num_examples // 2
    halves = [data.train.subset(np.arange(middle)), data.train.subset(np.arange(middle, data.train.num_examples))]

    def masks_of(step1, split, score):
        stream = split.batches(base.recipe.batch_size, seed=0)
        return top_k(saliency(step1.model, stream, loss, score=score), r_bayes)

    def step_1(seed, epochs):
        recipe = dataclasses.replace(base.recipe, epochs=epochs)
        return training.deterministic_run(data, recipe, seed=seed, network=base.network, runs=runs, verbose=False)

    trained = {seed: step_1(seed, base.recipe.epochs) for seed in seeds}
    young = {seed: step_1(seed, early) for seed in seeds}
    for score in ("fisher", "paper", "per_example", "taylor", "magnitude"):
        whole = {seed: masks_of(trained[seed], data.train, score) for seed in seeds}
        for seed, following in zip(seeds, [*seeds[1:], seeds[0]], strict=True):
            shares = {
                "halves": overlap(*(masks_of(trained[seed], half, score) for half in halves)),
                "other_seed": overlap(whole[seed], whole[following]) if len(seeds) > 1 else None,
                "early": overlap(whole[seed], masks_of(young[seed], data.train, score)),
            }
            found.append({"score": score, "seed": seed, **shares})
    return pd.DataFrame(found)


def rows_of(question: Question, study: Plan, found: pd.DataFrame) -> pd.DataFrame:
    """The results of a question's variants, with the variant's label in the column `label`.

    `found` are results of one split, from the study's table.
    """
    name, data = _dataset(study)
    base = dataclasses.asdict(compare.recipe_of(name, study.recipe, **data.parameters))
    given = {"dataset": name, **{key: getattr(data, key) for key in ("network", "size", "limit") if getattr(data, key)}}
    parts = [
        found[_is_of(found, variant, base | recipes.parse_changes(variant.changes), given)].assign(label=variant.label)
        for variant in question.variants
    ]
    labels = [variant.label for variant in question.variants]
    return pd.concat(parts).assign(label=lambda rows: pd.Categorical(rows["label"], labels))


def _is_of(found: pd.DataFrame, variant: Variant, settings: dict, data: dict) -> pd.Series:
    """Which rows of a frame are a variant's."""
    alike = {
        text: is_of_recipe(variant.method, {**results.recipe_settings(text), "name": settings["name"]}, settings)
        for text in found["settings"].unique()
    }
    match = (found["method"] == variant.method) & (found["recipe"] == settings["name"])
    match &= found["settings"].map(alike).astype(bool)
    match &= found["r_bayes"].isna() | np.isclose(found["r_bayes"], variant.r_bayes, rtol=0, atol=1e-9)
    for key, value in data.items():
        match &= found[key] == value
    if METHODS[variant.method].takes_samples:
        match &= found["num_samples"] == (variant.num_samples or settings["num_samples"])
    return match


def is_of_recipe(method: str, settings: dict, recipe: dict) -> bool:
    """Whether a result's settings are a recipe's, apart from what its method sets for itself.

    Both are fields of `recipes.Recipe`; a trivial row fits any recipe.
    """
    if method not in METHODS:
        return True
    own = METHODS[method].sets
    return all(settings.get(key) == value for key, value in recipe.items() if key not in own)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `sbn-tf study`."""
    parser.add_argument("plan", help="a YAML file with questions")
    parser.add_argument("--questions", help="names with commas between; default: all")
    parser.add_argument("--seeds", help="integers with commas between; default: those of the plan")
    parser.add_argument("--folds", help="integers with commas between; default: those of the plan")
    parser.add_argument("--split", choices=("val", "test"), default="val", help="what is scored")
    parser.add_argument("--masks", action="store_true", help="only: how far the choice of weights repeats itself")
    parser.add_argument("--runs", help="folder of finished runs; default: runs/ of the repository")
    parser.add_argument("--table", help="CSV that the rows are added to; default: results/<name>.csv")


def run(given: argparse.Namespace) -> int:
    """Run a study, or parts of it; 1 where a variant failed."""
    study = read(given.plan)
    seeds = None if given.seeds is None else compare.parse_seeds(given.seeds)
    if given.masks:
        rows, place = stability(study, runs=given.runs, seeds=seeds), f"results/{study.name}_masks.csv"
        text = rows.to_csv(index=False, float_format="%.4f").encode()
        write_atomically(folders.repository() / place, lambda file: file.write(text))
        print(f"{len(rows)} rows in {place}")
        return 0
    names = None if given.questions is None else [name.strip() for name in given.questions.split(",")]
    folds = None if given.folds is None else compare.parse_seeds(given.folds)
    failed = run_study(
        study, runs=given.runs, table=given.table, seeds=seeds, folds=folds, names=names, split=given.split
    )
    for line in [f"{len(failed)} failed:", *failed] if failed else ():
        print(line, file=sys.stderr)
    return 1 if failed else 0
