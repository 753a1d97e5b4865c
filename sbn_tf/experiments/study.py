"""Studies: many variants of the method beside its rivals, on one dataset, chosen by the validation split.

    python -m sbn_tf.experiments.study profiles/study.yaml --seeds 0,1,2

A variant is a method and changes of a recipe. Each is trained, scored on the validation split, and added
to a CSV table as soon as it is done: what is finished is read, a study that was stopped goes on. `nbs/09_what_works`
reads the tables.
"""

from __future__ import annotations

import argparse
import csv
import dataclasses
import inspect
import io
import itertools
import logging
import os
import traceback
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from sbn_tf.core.files import write_atomically
from sbn_tf.experiments import compare, folders, recipes, results, training
from sbn_tf.experiments.methods import METHODS
from sbn_tf.saliency import check_r_bayes, overlap, saliency, top_k

__all__ = ["Question", "Study", "Variant", "main", "read", "rows_of", "run", "stability"]


@dataclass(frozen=True)
class Variant:
    """One row of a question's table.

    Args:
        label: what the table calls it.
        method: of `methods.METHODS`.
        r_bayes: fraction of the eligible weights that is Bayesian, 0..1.
        changes: of the recipe, as `recipes.parse_changes` reads them.
        num_samples: of a prediction; None: the recipe's.
    """

    label: str
    method: str = "partial"
    r_bayes: float = 0.01
    changes: str = ""
    num_samples: int | None = None

    def __post_init__(self):
        compare.check_methods([self.method])
        check_r_bayes(self.r_bayes)
        recipes.parse_changes(self.changes)


@dataclass(frozen=True)
class Question:
    """A question of the study: `text`, and the variants whose rows answer it."""

    name: str
    text: str
    variants: tuple[Variant, ...]


@dataclass(frozen=True)
class Study:
    """A study as its file describes it.

    Args:
        name: of its table, `results/<name>.csv`.
        data: arguments of `compare.experiment`: dataset, recipe, network, ...; `swapped` counts on the test split.
        seeds: of all trainings.
        questions: in the order of the file.
    """

    name: str
    data: dict
    seeds: tuple[int, ...]
    questions: tuple[Question, ...] = field(default=())


def read(path: str | os.PathLike) -> Study:
    """Read a study's file.

    Raises:
        ValueError: not such a file, an unknown key, method or field of a recipe, or two variants of one label.
        FileNotFoundError: no such file.
    """
    import yaml

    try:
        content = yaml.safe_load(Path(path).read_text())
    except yaml.YAMLError as error:
        raise ValueError(f"Expected YAML in {path}. Received: {' '.join(str(error).split())}") from None
    content = _keys(content, {"name", "data", "seeds", "questions"}, path)
    known = set(inspect.signature(compare.experiment).parameters) - {"shared"} | {"swapped"}
    if not isinstance(content["data"], dict) or (unknown := sorted(set(content["data"]) - known)):
        received = unknown if isinstance(content["data"], dict) else content["data"]
        raise ValueError(f"Expected data in {path} with keys among {', '.join(sorted(known))}. Received: {received}")
    for key, kind in (("seeds", list), ("questions", dict)):
        if not isinstance(content[key], kind) or not content[key]:
            raise ValueError(f"Expected {key} in {path}, one or more. Received: {content[key]!r}")
    questions = []
    for name, one in content["questions"].items():
        one = _keys(one, {"text", "variants"}, f"{path}, question {name}")
        try:
            variants = tuple(Variant(**variant) for variant in one["variants"])
        except (TypeError, ValueError) as error:
            raise ValueError(f"Expected variants in {path}, question {name}. Received: {error}") from None
        if len({variant.label for variant in variants}) < len(variants):
            raise ValueError(f"Expected each label once in {path}, question {name}. Received: one twice")
        questions.append(Question(name, one["text"], variants))
    return Study(content["name"], content["data"], tuple(content["seeds"]), tuple(questions))


def _keys(content, wanted, where):
    if not isinstance(content, dict) or set(content) != wanted:
        received = sorted(content) if isinstance(content, dict) else type(content).__name__
        raise ValueError(f"Expected the keys {sorted(wanted)} in {where}. Received: {received}")
    return content


def run(
    study: Study,
    *,
    runs: str | os.PathLike | None = None,
    table: str | os.PathLike | None = None,
    seeds: Sequence[int] | None = None,
    names: Collection[str] | None = None,
    split: str = "val",
    verbose: bool = False,
) -> list[str]:
    """Train and score every variant, or read what is finished, and keep the table up to date.

    Args:
        study: from `read`.
        runs: folder of all runs; None: `runs/` of the repository or the working directory.
        table: path of the CSV; None: `results/<name>.csv`.
        seeds: of these only; None: all of the study.
        names: questions of these names only; None: all.
        split: what is scored: "val", or "test" once all is chosen.
        verbose: show the progress of each training.

    Returns:
        One line for each variant that failed, with its error; [] where none did.

    Raises:
        ValueError: an unknown question.
    """
    known = [question.name for question in study.questions]
    if unknown := [name for name in names or () if name not in known]:
        raise ValueError(f"Expected questions among {', '.join(known)}. Received: {unknown}")
    table = folders.repository() / "results" / f"{study.name}.csv" if table is None else Path(table)
    base = compare.experiment(**study.data, runs=runs, split=split, num_resamples=200, verbose=verbose)
    if split == "val":
        base = dataclasses.replace(base, shifts={}, swapped=None)  # what nothing is chosen by
    failed, done = [], set()
    asked = [question for question in study.questions if not names or question.name in names]
    for seed in study.seeds if seeds is None else seeds:  # what knows nothing, and level sets of one map
        results.write_csv(list(compare.trivial_rows(dataclasses.replace(base, seed=seed)).values()), table)
    for question, seed in itertools.product(asked, study.seeds if seeds is None else seeds):
        for variant in question.variants:
            if (same := (dataclasses.replace(variant, label=""), seed)) in done:
                continue
            done.add(same)
            try:
                recipe = dataclasses.replace(base.recipe, **recipes.parse_changes(variant.changes))
                changes: dict[str, Any]
                changes = {"recipe": recipe, "r_bayes": float(variant.r_bayes), "num_samples": variant.num_samples}
                row = compare.row(dataclasses.replace(base, seed=seed, **changes), variant.method)
            except Exception as error:  # of one variant: the others go on
                traceback.print_exc()
                reason = str(error).splitlines()[0] if str(error) else type(error).__name__
                failed.append(f"{question.name}: {variant.label}, seed {seed}: {reason}")
                continue
            results.write_csv([row], table)
            print(f"{question.name:<10} seed {seed}  {variant.label:<44} NLL {row.metrics['nll']:.5f}", flush=True)
    return failed


def stability(
    study: Study,
    *,
    runs: str | os.PathLike | None = None,
    seeds: Sequence[int] | None = None,
    r_bayes: float = 0.01,
    early: int = 20,
) -> list[dict]:
    """How far the choice of weights repeats itself: shares that two masks have in common, of each score.

    Args:
        study: from `read`.
        runs: folder of all runs.
        seeds: None: all of the study.
        r_bayes: fraction that is chosen; two choices by chance share as much.
        early: epochs of the step 1 that is compared with the recipe's.

    Returns:
        One dict for each score and seed: "score", "seed", "halves" (scores from the two halves of the training images),
        "other_seed" (from the network of the next seed) and "early" (from the network of fewer epochs).
    """
    base = compare.experiment(**{**study.data, "swapped": None}, runs=runs, verbose=False)
    seeds = list(study.seeds if seeds is None else seeds)
    loss, data, found = recipes.loss_for(base.recipe, base.data), base.data, []
    middle = data.train.num_examples // 2
    halves = [data.train.subset(np.arange(middle)), data.train.subset(np.arange(middle, data.train.num_examples))]

    def masks_of(step1, split, score):
        stream = split.batches(base.recipe.batch_size, seed=0)
        return top_k(saliency(step1.model, stream, loss, score=score), r_bayes)

    def step_1(seed, epochs):
        recipe = dataclasses.replace(base.recipe, epochs=epochs)
        return training.deterministic_run(data, recipe, seed=seed, network=base.network, runs=runs, verbose=False)

    networks = {seed: step_1(seed, base.recipe.epochs) for seed in seeds}
    young = {seed: step_1(seed, early) for seed in seeds}
    for score in ("fisher", "paper", "per_example", "taylor", "magnitude"):
        whole = {seed: masks_of(networks[seed], data.train, score) for seed in seeds}
        for place, seed in enumerate(seeds):
            first, second = (masks_of(networks[seed], half, score) for half in halves)
            other = whole[seeds[(place + 1) % len(seeds)]]
            found.append(
                {
                    "score": score,
                    "seed": seed,
                    "halves": overlap(first, second),
                    "other_seed": overlap(whole[seed], other) if len(seeds) > 1 else None,
                    "early": overlap(whole[seed], masks_of(young[seed], data.train, score)),
                }
            )
    return found


def rows_of(question: Question, study: Study, found: list[results.Result]) -> dict[str, list[results.Result]]:
    """Label -> the results of that variant, one a seed; an empty list where there is none yet.

    Args:
        question: of the study.
        study: the study itself.
        found: results of one split, from its table.
    """
    base = dataclasses.asdict(compare.recipe_of(**study.data))
    data = {key: study.data[key] for key in ("dataset", "network", "size", "limit", "options") if key in study.data}
    changes = {variant.label: recipes.parse_changes(variant.changes) for variant in question.variants}
    return {
        variant.label: [one for one in found if _is_of(one, variant, base | changes[variant.label], data)]
        for variant in question.variants
    }


def _is_of(result, variant, settings, data):
    if result.method != variant.method or any(getattr(result, key) != value for key, value in data.items()):
        return False
    alike = is_of_recipe(variant.method, result.settings, settings)
    rate = result.r_bayes is None or abs(result.r_bayes - variant.r_bayes) < 1e-9
    wanted = variant.num_samples or settings["num_samples"]
    samples = not METHODS[variant.method].takes_samples or result.num_samples == wanted
    return alike and rate and samples


def is_of_recipe(method: str, settings: dict, recipe: dict) -> bool:
    """Whether a result's settings are a recipe's, but for what its method sets for itself; new fields at their default.

    Args:
        method: of `methods.METHODS`; a trivial row is of any.
        settings, recipe: fields of `recipes.Recipe`.
    """
    if method not in METHODS:
        return True
    given = settings
    own = METHODS[method].sets
    return all(given.get(key) == value for key, value in recipe.items() if key not in own)


def _write_stability(study, rows):
    path, text = folders.repository() / "results" / f"{study.name}_masks.csv", io.StringIO()
    writer = csv.DictWriter(text, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(
        {key: f"{value:.4f}" if isinstance(value, float) else value for key, value in row.items()} for row in rows
    )
    write_atomically(path, lambda file: file.write(text.getvalue().encode()))
    return f"{len(rows)} rows in {path}"


def main(arguments: Sequence[str] | None = None) -> None:
    """Command line: run a study, or parts of it."""
    parser = argparse.ArgumentParser(
        prog="python -m sbn_tf.experiments.study", description="Train and score every variant."
    )
    parser.add_argument("study", help="a YAML file")
    parser.add_argument("--questions", help="names with commas between; default: all")
    parser.add_argument("--seeds", help="integers with commas between; default: those of the file")
    parser.add_argument("--split", choices=("val", "test"), default="val", help="what is scored")
    parser.add_argument("--masks", action="store_true", help="only: how far the choice of weights repeats itself")
    parser.add_argument("--runs", help="folder of finished runs; default: runs/ of the repository")
    parser.add_argument("--table", help="CSV that the rows are added to; default: results/<name>.csv")
    given = parser.parse_args(arguments)
    logging.getLogger("tensorflow").setLevel("ERROR")  # each network is traced anew: no news
    try:
        study = read(given.study)
        seeds = None if given.seeds is None else compare.parse_seeds(given.seeds)
        names = None if given.questions is None else [name.strip() for name in given.questions.split(",")]
        if given.masks:
            print(_write_stability(study, stability(study, runs=given.runs, seeds=seeds)))
            return
        failed = run(study, runs=given.runs, table=given.table, seeds=seeds, names=names, split=given.split)
    except (ValueError, FileNotFoundError) as error:
        raise SystemExit(str(error)) from None
    if failed:
        raise SystemExit("\n".join([f"{len(failed)} failed:", *failed]))


if __name__ == "__main__":
    main()
