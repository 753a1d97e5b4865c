"""The grid: which jobs a profile asks for, what they will take, what became of them. `Snakefile` runs them.

    python -m sbn_tf.experiments.grid status profiles/small     # what is done, what failed, what remains
    python -m sbn_tf.experiments.grid table profiles/small      # results/small.csv from what is there
    python -m sbn_tf.experiments.grid estimate profiles/paper   # operations, hours and memory, before anything runs

A profile is one YAML file: Snakemake's own options, and under `grid:` what `read` explains. Run as a file
(`python sbn_tf/experiments/grid.py status profiles/small`), this module starts without TensorFlow.
"""

from __future__ import annotations

import argparse
import csv
import dataclasses
import json
import os
import re
import shlex
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sbn_tf.core.files import write_atomically

__all__ = [
    "Dataset",
    "Job",
    "Plan",
    "Status",
    "check_folder",
    "check_names",
    "estimates",
    "estimates_for_scheduler",
    "forget_damaged",
    "gather",
    "jobs",
    "main",
    "papermill_options",
    "plan_of",
    "read",
    "report",
    "status",
]

FORMAT = 1  # of a folder of jobs: raised when notebooks of older ones would not fit
STEPS = ("step1", "saliency", "partial", "baseline")


@dataclass(frozen=True)
class Dataset:
    """One dataset of a grid.

    Args:
        name: as `datasets.load` takes it.
        folds: its folds; (-1,): the dataset's own split.
        seeds, r_bayes, methods: of the plan, unless the profile gives this dataset its own.
        parameters: of the notebooks, such as `{"size": 32, "network": "unet_small"}`.
        images: training, validation and test images, for estimates of a dataset that is not at hand.
    """

    name: str
    folds: tuple[int, ...]
    seeds: tuple[int, ...]
    r_bayes: tuple[float, ...]
    methods: tuple[str, ...]
    parameters: dict = field(default_factory=dict)
    images: tuple[int, int, int] | None = None


@dataclass(frozen=True)
class Plan:
    """What a profile asks for.

    Args:
        name: of the folder of its runs, `runs/grid/<name>`, and of its table.
        recipe: of `recipes.RECIPES`.
        datasets: with their folds, seeds, shares in % and methods.
        threads: of one job.
        gpus: of one job, asked for as Snakemake's resource `gpu`.
        tflops: what the device computes, in 10^12 operations a second, for estimates; None: they are in operations.
        table: path of the CSV that is kept in the repository; None: one in the folder of the runs.
    """

    name: str
    recipe: str
    datasets: tuple[Dataset, ...]
    threads: int = 1
    gpus: int = 0
    tflops: float | None = None
    table: str | None = None

    @property
    def folder(self) -> Path:
        """Where its jobs and runs lie."""
        return Path("runs") / "grid" / self.name


@dataclass(frozen=True)
class Job:
    """One notebook to be executed.

    Args:
        kind: of `STEPS`.
        name: of its notebook: "step1", "saliency", "partial_r1" (1 % of the weights), or a method.
        dataset, fold, seed: what of.
        method, percent: of notebook 04.
    """

    kind: str
    name: str
    dataset: Dataset
    fold: int
    seed: int
    method: str = ""
    percent: float | None = None

    @property
    def path(self) -> str:
        """Of its notebook, below the plan's folder."""
        return f"{self.dataset.name}/fold{self.fold}/seed{self.seed}/{self.name}.ipynb"


_PLAN = {"name", "recipe", "datasets", "threads", "gpus", "tflops", "table", "seeds", "r_bayes", "methods"}
_PARAMETERS = {"size", "network", "limit", "epochs", "bayes_epochs", "num_samples", "split", "normalisation"}
_PARAMETERS |= {"changes", "threshold", "num_resamples", "swapped"}
_OF_BASELINES = ("bayes_epochs", "num_samples", "threshold", "num_resamples", "swapped")  # not of notebooks 01 and 02
_DATASET = {"folds", "seeds", "r_bayes", "methods", "images"} | _PARAMETERS


def read(profile: str | os.PathLike) -> Plan:
    """Read a profile: its folder, or the YAML file in it.

    Raises:
        ValueError: not such a file, an unknown key, a value out of its range.
        FileNotFoundError: no such file.
    """
    import yaml

    path = Path(profile)
    path = path / "config.yaml" if path.is_dir() else path
    try:
        content = yaml.safe_load(path.read_text())
    except yaml.YAMLError as error:
        raise ValueError(f"Expected YAML in {path}. Received: {' '.join(str(error).split())}") from None
    if not isinstance(content, dict) or not isinstance(content.get("grid"), dict):
        raise ValueError(f"Expected a key `grid` in {path}, with the datasets and methods of a grid. Received: none")
    return plan_of(content["grid"], path)


def plan_of(content: dict, where: str | os.PathLike = "the profile") -> Plan:
    """Check what stands under `grid:` of a profile.

    Raises:
        ValueError: an unknown key or a value out of its range.
    """

    def refuse(expected, received):
        raise ValueError(f"Expected {expected} in {where}. Received: {received!r}")

    def keys_of(given, known, what):
        if not isinstance(given, dict):
            refuse(f"{what} as keys and values", given)
        if unknown := sorted(set(given) - known):
            refuse(f"{what} with keys among {', '.join(sorted(known))}", ", ".join(map(str, unknown)))

    def listed(given, key, test, expected):
        values = given.get(key)
        whole = isinstance(values, list) and values and all(test(value) for value in values)
        if not whole or len(set(values)) < len(values):
            refuse(f"{key}, a list of {expected}, each once,", values)
        return tuple(values)

    def is_count(value):
        return isinstance(value, int) and not isinstance(value, bool) and value >= 0

    def is_percent(value):
        return isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value <= 100

    keys_of(content, _PLAN, "a grid")
    if not isinstance(content.get("name"), str) or not re.fullmatch(r"[A-Za-z0-9_-]+", content["name"]):
        refuse("name, of letters, digits, _ and -,", content.get("name"))
    if not isinstance(content.get("datasets"), dict) or not content["datasets"]:
        refuse("datasets, one or more,", content.get("datasets"))
    found = []
    for name, own in content["datasets"].items():
        own = own or {}
        if not isinstance(name, str) or not re.fullmatch(r"[A-Za-z0-9_.-]+", name):
            refuse("names of datasets, of letters, digits and . _ - (no folders),", name)
        keys_of(own, _DATASET, f"the dataset {name!r}")
        given = {"folds": [-1], **{key: content.get(key) for key in ("seeds", "r_bayes", "methods")}, **own}
        images = given.get("images")
        if images is not None and not (
            isinstance(images, list) and len(images) == 3 and all(is_count(value) for value in images)
        ):
            refuse("images, three numbers,", images)
        shares = given.get("r_bayes")
        if isinstance(shares, list) and len({_share(value) for value in shares}) < len(shares):
            refuse("r_bayes, percentages that differ in six digits,", shares)
        if "partial" in (given.get("methods") or ()):
            refuse("methods without 'partial', which r_bayes asks for,", given["methods"])
        found.append(
            Dataset(
                name,
                listed(given, "folds", lambda value: value == -1 or is_count(value), "integers >= 0, or -1"),
                listed(given, "seeds", is_count, "integers >= 0"),
                listed(given, "r_bayes", is_percent, "percentages, 0..100"),
                listed(given, "methods", lambda value: isinstance(value, str), "methods"),
                {key: value for key, value in own.items() if key in _PARAMETERS},
                None if images is None else tuple(images),
            )
        )
    threads, gpus, tflops = content.get("threads", 1), content.get("gpus", 0), content.get("tflops")
    if not is_count(threads) or threads < 1:
        refuse("threads, an integer >= 1,", threads)
    if not is_count(gpus):
        refuse("gpus, an integer >= 0,", gpus)
    for key in ("recipe", "table"):
        if content.get(key) is not None and not (isinstance(content[key], str) and content[key]):
            refuse(f"{key}, a text,", content[key])
    if tflops is not None and not (isinstance(tflops, int | float) and tflops > 0):
        refuse("tflops, a number > 0,", tflops)
    recipe = content.get("recipe") or "sbn"
    return Plan(content["name"], recipe, tuple(found), threads, gpus, tflops, content.get("table"))


def _share(percent) -> str:
    return f"{percent:g}" if isinstance(percent, int | float) else str(percent)


def jobs(plan: Plan) -> list[Job]:
    """Every job, step 1 first: of each dataset, fold and seed."""
    found = []
    for data in plan.datasets:
        for fold in data.folds:
            for seed in data.seeds:
                of: dict[str, Any] = {"dataset": data, "fold": fold, "seed": seed}
                found += [Job("step1", "step1", **of), Job("saliency", "saliency", **of)]
                found += [
                    Job("partial", f"partial_r{_share(r)}", **of, method="partial", percent=r) for r in data.r_bayes
                ]
                found += [Job("baseline", method, **of, method=method) for method in data.methods]
    return found


def papermill_options(
    plan: Plan, dataset: str, fold: int, seed: int, percent: float | None = None, method: str | None = None
) -> str:
    """Parameters of one job's notebook, as papermill's command line takes them.

    Args:
        plan: the grid.
        dataset, fold, seed: what of.
        percent: share of Bayesian weights in %; None: the notebook has no such parameter.
        method: of notebook 04; None: another notebook.
    """
    own = next(data for data in plan.datasets if data.name == dataset)
    given = {"dataset": dataset, "recipe": plan.recipe, "seed": seed, "fold": fold, **own.parameters}
    given["runs"] = (plan.folder / "models").resolve().as_posix()
    if method is None:
        given = {key: value for key, value in given.items() if key not in _OF_BASELINES}
    elif percent is None:
        raise ValueError(f"Expected percent with a method. Received: percent=None, method={method!r}")
    else:
        given |= {"method": method, "r_bayes": percent / 100}
    flags = {key: "-r" if isinstance(value, str) else "-p" for key, value in given.items()}
    return " ".join(f"{flags[key]} {key} {shlex.quote(str(value))}" for key, value in given.items())


def check_folder(plan: Plan) -> None:
    """Write what shapes the grid's results into its folder, or refuse a folder of other ones.

    Raises:
        ValueError: there are notebooks of another recipe (of this name or not), of other parameters of a dataset, or
            whose results have another format.
    """

    path = plan.folder / "grid.json"
    mine = {"formats": _formats(), "datasets": {one.name: _shaping(plan, one) for one in plan.datasets}}
    if path.exists() and any(plan.folder.glob("*/fold*/seed*/*.ipynb")):
        try:
            there = json.loads(path.read_text())
            known = there["datasets"]
            same = there["formats"] == mine["formats"] and all(
                name not in known or known[name] == own for name, own in mine["datasets"].items()
            )
        except (ValueError, KeyError, TypeError):
            same, known = False, {}
        if not same:
            raise ValueError(
                f"Expected a folder of this grid. Received: {plan.folder}, of another recipe, other parameters of a "
                f"dataset or another version ({path}).\nGive this grid another name, or delete that folder."
            )
        mine["datasets"] = known | mine["datasets"]
    write_atomically(path, lambda file: file.write(json.dumps(mine, indent=1).encode()))


def _formats():
    from sbn_tf.experiments import folders, results, scoring

    return [FORMAT, results.FORMAT, folders.FORMAT, scoring.RECORD_FORMAT]


def _shaping(plan, data):
    """All that shapes a dataset's results, as JSON gives it back."""
    from sbn_tf.experiments import compare

    recipe = compare.recipe_of(data.name, plan.recipe, **data.parameters)
    return json.loads(json.dumps({"parameters": data.parameters, "recipe": dataclasses.asdict(recipe)}))


def forget_damaged(plan: Plan) -> list[str]:
    """Remove the notebooks of jobs whose result is gone or damaged, so that they, and nothing else, are made again.

    Returns:
        The paths of these notebooks, below the plan's folder.
    """
    from sbn_tf.experiments import results

    removed = []
    for job in jobs(plan):
        notebook = plan.folder / job.path
        if job.kind not in ("partial", "baseline") or not notebook.exists():
            continue
        place = _result_of(notebook)
        try:
            if place is None:
                raise ValueError("the notebook names no result")
            results.read(place)
        except (ValueError, OSError, TypeError):
            notebook.unlink()
            removed.append(job.path)
    return removed


def _result_of(notebook) -> Path | None:
    """The metrics.json that an executed notebook 04 of one method names."""
    try:
        cells = json.loads(notebook.read_text())["cells"]
        texts = ["".join(out.get("text", "")) for cell in cells for out in cell.get("outputs", ())]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    found = re.findall(r"^result: (.*metrics\.json)$", "\n".join(texts), re.M)
    return Path(found[-1]) if found else None


def check_names(plan: Plan) -> None:
    """Raise ValueError where the plan's recipe or a method is none. Not part of `plan_of`: it loads TensorFlow."""
    from sbn_tf.experiments import networks, recipes
    from sbn_tf.experiments.methods import METHODS

    if plan.recipe not in recipes.RECIPES:
        raise ValueError(f"Expected a recipe among {', '.join(recipes.RECIPES)}. Received: {plan.recipe!r}")
    asked = {method for data in plan.datasets for method in data.methods}
    for data in plan.datasets:
        if (network := data.parameters.get("network")) not in (None, *networks.NETWORKS):
            raise ValueError(f"Expected a network among {', '.join(networks.NETWORKS)}. Received: {network!r}")
    if unknown := sorted(asked - set(METHODS)):
        raise ValueError(f"Expected methods among {', '.join(METHODS)}.\nReceived: {', '.join(unknown)}")


# ---------------------------------------------------------------------------
# What became of it
# ---------------------------------------------------------------------------


@dataclass(frozen=True)
class Status:
    """Jobs by what became of them: paths below the plan's folder; `seconds` of those that are done."""

    done: dict[str, float | None]
    failed: dict[str, str]
    missing: list[str]
    remaining_seconds: float | None

    def __str__(self):
        number = len(self.done) + len(self.failed) + len(self.missing)
        left = "" if self.remaining_seconds is None or not self.missing else f", about {_time(self.remaining_seconds)}"
        line = f"{len(self.done)} of {number} jobs done, {len(self.failed)} failed, {len(self.missing)} to do{left}"
        return "\n".join([line, *(f"  failed: {path}: {reason}" for path, reason in self.failed.items())])


def status(plan: Plan, cores: int = 1) -> Status:
    """What is done, what failed, what remains, and how long that will take on so many cores.

    A job that is not done takes as long as those of its dataset and name did, or of its dataset and kind.
    """
    at_once = max(1, cores // plan.threads)
    done, failed, missing, taken = {}, {}, [], {}
    for job in jobs(plan):
        path = plan.folder / job.path
        broken = path.with_suffix(".failed.ipynb")
        if path.exists():
            seconds = _seconds(path)
            done[job.path] = seconds
            if seconds is not None:
                for key in ((job.dataset.name, job.name), (job.dataset.name, job.kind), job.kind):
                    taken.setdefault(key, []).append(seconds)
        elif broken.exists():
            failed[job.path] = _error_of(broken)
        else:
            missing.append(job)
    remaining: float | None = 0.0
    for job in missing:
        keys = ((job.dataset.name, job.name), (job.dataset.name, job.kind), job.kind)
        times = next((taken[key] for key in keys if key in taken), None)
        remaining = None if times is None or remaining is None else remaining + sum(times) / len(times)
    return Status(done, failed, [job.path for job in missing], None if remaining is None else remaining / at_once)


def _seconds(path):
    try:
        with open(path.with_suffix(".tsv"), newline="") as file:
            return float(next(csv.DictReader(file, delimiter="\t"))["s"])
    except (OSError, StopIteration, KeyError, ValueError, TypeError):
        return None


def _error_of(path) -> str:
    """The last error that a notebook shows, in one line."""
    try:
        cells = json.loads(path.read_text())["cells"]
        errors = [out for cell in cells for out in cell.get("outputs", ()) if out.get("output_type") == "error"]
        text = f"{errors[-1]['ename']}: {errors[-1]['evalue']}" if errors else "stopped without an error"
    except (OSError, ValueError, KeyError):
        text = "its notebook cannot be read"
    return f"{' '.join(text.split())[:200]} ({path})"


def _time(seconds):
    hours, minutes = divmod(round(seconds / 60), 60)
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min"


def report(plan: Plan) -> str:
    """What ran and for how long, what failed, what is missing: Markdown."""
    found = status(plan)
    kinds = {job.path: (job.dataset.name, job.kind) for job in jobs(plan)}
    rows = {}
    for path, key in kinds.items():
        row = rows.setdefault(key, {"done": 0, "failed": 0, "missing": 0, "seconds": 0.0})
        row["done"] += path in found.done
        row["seconds"] += found.done.get(path) or 0.0
        row["failed"] += path in found.failed
        row["missing"] += path in found.missing
    lines = [f"# Grid {plan.name}", "", str(found).splitlines()[0] + f" ({time.strftime('%Y-%m-%d %H:%M')}).", ""]
    lines += ["| dataset | jobs | done | failed | missing | core time |", "|---|---|---|---|---|---|"]
    for (name, kind), row in rows.items():
        cells = (name, kind, row["done"], row["failed"], row["missing"], _time(row["seconds"]))
        lines.append(f"| {' | '.join(map(str, cells))} |")
    lines += ["", *(f"- failed: {path}: {reason}" for path, reason in found.failed.items())]
    return "\n".join(lines).rstrip() + "\n"


def gather(plan: Plan) -> list:
    """Every result of test images in the plan's folder: `results.Result`; a damaged one is left out with a warning."""
    import warnings

    from sbn_tf.experiments import results

    found = []
    for path in sorted(plan.folder.glob("models/*/*/seed*/*/metrics.json")):
        try:
            found.append(results.read(path))
        except ValueError as error:
            warnings.warn(f"Left out: {error}", stacklevel=2)
    return found


# ---------------------------------------------------------------------------
# What it will take
# ---------------------------------------------------------------------------


def estimates(plan: Plan) -> dict[str, dict[str, float | None]]:
    """Job's path -> {"flops", "hours", "mb"}: operations counted from traced steps, time at the plan's speed, memory.

    Nothing is trained and no data are read. Memory is that of weights, gradients, optimiser state and of every layer's
    output of one batch, kept for the backward pass: of all samples under the estimator "all". "hours" is None where the
    plan has no `tflops`. Trainings that other jobs share are counted once, where they are made: step 1 in "step1", an
    ensemble's other members in "ensemble", their further epochs in "ensemble_longer".

    Raises:
        ValueError: a dataset whose number of images is neither known nor given.
    """
    found, traced = {}, {}
    for job in jobs(plan):
        key = job.dataset.name
        if key not in traced:
            traced[key] = _traced(plan, job.dataset)
        one = traced[key]
        flops, mb = _of_job(job, one)
        hours = None if plan.tflops is None else flops / plan.tflops / 1e12 / 3600
        found[job.path] = {"flops": flops, "hours": hours, "mb": mb}
    return found


def estimates_for_scheduler(plan: Plan) -> dict[tuple[str, str], dict[str, int]]:
    """(dataset, kind of job) -> {"mem_mb", "runtime" in minutes}, the most of its jobs.

    Twice what is counted, and what a process with TensorFlow takes; kept in the plan's folder. Without `tflops` the
    same for all: 4,000 MB, and 120 minutes.
    """
    if plan.tflops is None:
        return {(job.dataset.name, job.kind): {"mem_mb": 4000, "runtime": 120} for job in jobs(plan)}
    path = plan.folder / "estimates.json"
    settings = repr(plan) + json.dumps([_shaping(plan, one) for one in plan.datasets])
    try:
        kept = json.loads(path.read_text())
    except (OSError, ValueError):
        kept = {}
    if kept.get("plan") != settings:
        kept = {"plan": settings, "jobs": estimates(plan)}
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(kept))
    found = {}
    for job in jobs(plan):
        one, most = kept["jobs"][job.path], found.setdefault((job.dataset.name, job.kind), {"mem_mb": 0, "runtime": 0})
        most["mem_mb"] = max(most["mem_mb"], round(2 * one["mb"]) + 3000)
        most["runtime"] = max(most["runtime"], round(2 * 60 * one["hours"]) + 10)
    return found


def _traced(plan, data):
    """What the estimates of a dataset need: operations of a step and of a pass for one image, images, bytes."""
    import keras
    import numpy as np

    from sbn_tf import cost, datasets
    from sbn_tf.experiments import compare, networks, recipes
    from sbn_tf.partial_bayes import to_partial_bayes
    from sbn_tf.saliency import Masks, eligible_weights

    card = datasets.card(data.name)
    images = data.images or card.counts
    if images is None:
        raise ValueError(f"Expected images: [train, val, test] of {data.name!r} in the profile. Received: none")
    parameters = dict(data.parameters)
    recipe = compare.recipe_of(data.name, plan.recipe, **parameters)
    side = parameters.get("size") or card.default_size
    head = {"activation": "softmax"} if card.task in datasets.base.EXCLUSIVE else {}
    name = parameters.get("network") or recipes.network_for(plan.recipe, card)
    network = networks.build(name, (side, side, card.channels), max(1, len(card.classes)), seed=0, **head)
    network.compile("sgd", "binary_crossentropy")
    masks = Masks({key: np.ones(one.variable.shape, bool) for key, one in eligible_weights(network).items()})
    model = to_partial_bayes(
        network, masks, num_train=images[0], num_samples=recipe.num_samples, estimator=recipe.estimator
    )
    model.compile("sgd", "binary_crossentropy")
    outputs = sum(int(np.prod(layer.output.shape[1:])) for layer in network.layers)
    return {
        "recipe": recipe,
        "images": images,
        "step": cost.training_flops(network, recipe.batch_size),
        "partial_step": cost.training_flops(model, recipe.batch_size),
        "saliency": cost.saliency_flops(network, keras.losses.BinaryCrossentropy(), recipe.batch_size),
        "pass": cost.prediction_flops(network, recipe.batch_size),
        "weights": network.count_params(),
        "outputs": outputs,
    }


SHIFTED_COPIES = 3  # of the test images, predicted beside them


def _of_job(job, one):
    recipe, (train, val, test) = one["recipe"], one["images"]
    first, third = recipe.epochs, recipe.bayes_epochs
    step, bayes = one["step"] * train, one["partial_step"] * train
    samples = recipe.num_samples
    validation = one["pass"] * val  # an epoch
    scored = one["pass"] * test * (1 + SHIFTED_COPIES + ("swapped" in job.dataset.parameters))
    part = samples if recipe.estimator == "all" else 1
    longer, members = third * (step + validation), 4 * first * (step + validation)
    alone, continued = "ensemble" not in job.dataset.methods, "deterministic_longer" in job.dataset.methods
    work = {
        "step1": first * (step + validation) + one["pass"] * test,
        "saliency": 3 * one["saliency"] * train,  # notebook 02 shows other scores beside
        "deterministic": scored,
        "temperature": scored + validation,
        "ensemble": members + 5 * scored,
        "ensemble_longer": (members if alone else 0) + (4 if continued else 5) * longer + 5 * scored,
        "snapshot": longer + 5 * scored,
        "mc_dropout": longer + samples * scored,
        "deterministic_longer": longer + scored,
        "laplace": one["saliency"] * train + samples * (scored + 6 * validation),
        "bayes_normal": (first + third) * (samples * step + validation) + samples * scored,
    }
    bayesian = third * (bayes + validation) + samples * scored
    flops = work.get(job.name, bayesian)
    passes = part if job.name not in work else samples if job.name == "bayes_normal" else 1
    weights = one["weights"] * (3 + 2 * (job.name not in work))  # with gradients and slots, and scales, at most
    return float(flops), 4e-6 * (weights + passes * recipe.batch_size * one["outputs"])


def _estimate_table(plan, found):
    rows = {}
    for job in jobs(plan):
        row = rows.setdefault((job.dataset.name, job.kind), [])
        row.append(found[job.path])
    lines = ["| dataset | jobs | number | PFLOP each, most | hours each, most | hours in all | memory, MB |"]
    lines += ["|---|---|---|---|---|---|---|"]
    for (name, kind), row in rows.items():
        hours = [one["hours"] for one in row]
        known = None not in hours
        cells = [name, kind, len(row), f"{max(one['flops'] for one in row) / 1e15:,.3g}"]
        cells += [f"{max(hours):,.2g}" if known else "-", f"{sum(hours):,.3g}" if known else "-"]
        cells.append(f"{max(one['mb'] for one in row):,.0f}")
        lines.append(f"| {' | '.join(map(str, cells))} |")
    total = sum(one["flops"] for one in found.values())
    end = f"In all {total / 1e15:,.4g} PFLOP"
    if plan.tflops is not None:
        end += f", {total / plan.tflops / 1e12 / 3600:,.3g} hours of one device of {plan.tflops:g} TFLOP/s"
    return "\n".join([*lines, "", end + ". Memory is without the framework's own."])


def _write_table(plan, found):
    from sbn_tf.experiments import results

    table = Path(plan.table) if plan.table else plan.folder / "results.csv"
    there = results.read_csv(table) if table.exists() else []
    if old := _of_other_recipes(plan, there):  # a table of two recipes would be one of neither
        results.write_csv([one for one in there if one not in old], table, merge=False)
    results.write_csv(found, table)
    dropped = f", {len(old)} of another recipe dropped" if old else ""
    return f"{len(found)} results in {table}{dropped}"


def _of_other_recipes(plan, rows):
    """Rows of the plan's datasets that were trained by other numbers than the plan's recipe has now."""
    from sbn_tf.experiments import study

    now = {one.name: _shaping(plan, one)["recipe"] for one in plan.datasets}
    return [
        one for one in rows if one.dataset in now and not study.is_of_recipe(one.method, one.settings, now[one.dataset])
    ]


def main(arguments: Sequence[str] | None = None) -> None:
    """Command line: `status`, `table`, `report` or `estimate` of a profile."""
    parser = argparse.ArgumentParser(prog="python -m sbn_tf.experiments.grid", description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=("status", "table", "report", "finish", "estimate"))
    parser.add_argument("profile", help="a folder of profiles/, or its config.yaml")
    parser.add_argument("--cores", type=int, default=1, help="that the grid has, for the remaining time")
    parser.add_argument("--brief", action="store_true", help="one line")
    given = parser.parse_args(arguments)
    try:
        plan = read(given.profile)
        if given.what == "status":
            text = str(status(plan, given.cores))
            print(text.splitlines()[0] if given.brief else text)
        elif given.what == "estimate":
            print(_estimate_table(plan, estimates(plan)))
        if given.what in ("report", "finish"):
            text = report(plan)
            plan.folder.mkdir(parents=True, exist_ok=True)
            (plan.folder / "report.md").write_text(text)
            print(text)
        if given.what in ("table", "finish"):
            if found := gather(plan):
                print(_write_table(plan, found))
            elif given.what == "finish":
                print("No result yet.")
            else:
                raise ValueError(f"Expected results in {plan.folder}. Received: none. Run the grid first.")
    except (ValueError, OSError) as error:
        raise SystemExit(str(error)) from None


if __name__ == "__main__":
    main()
