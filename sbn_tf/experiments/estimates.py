"""What the jobs of a grid will take, before anything runs: operations, hours and memory.

Nothing is trained and no data are read: operations are counted from traced steps.
"""

from __future__ import annotations

import argparse
import json
from typing import Any

import pandas as pd

from sbn_tf import datasets
from sbn_tf.experiments import compare, methods, recipes, report
from sbn_tf.experiments.grid import before, jobs
from sbn_tf.experiments.methods.estimates import Sizes, parts_of
from sbn_tf.experiments.plan import Plan, read

SHIFTED_COPIES = 3  # of the test images, predicted beside them
SCORES_SHOWN = 2  # that notebook 02 shows beside the recipe's


def estimates(plan: Plan) -> dict[str, dict[str, Any]]:
    """Job's path -> {"flops", "hours", "mb"}; "hours" is None where the plan has no `tflops`.

    A training that jobs share counts once, in the job that makes it.

    Raises:
        ValueError: a dataset whose number of images is neither known nor given.
    """
    sizes = {name: _sizes(plan, name) for name in plan.datasets}
    found: dict[str, dict[str, Any]] = {job.path: {} for job in jobs(plan)}
    made: dict[str, set[str]] = {job.unit: set() for job in jobs(plan)}
    for job in sorted(jobs(plan), key=lambda job: len(before(job))):  # a job that continues others comes after them
        recipe, network, size, (images, copies) = sizes[job.dataset]
        one = methods.make(job.method or "deterministic", recipe, network=network).estimate(size)
        work, predicted = one.trainings, one.predict_flops * images * (1 if job.kind == "step1" else copies)
        if job.kind == "saliency":
            scores = parts_of(recipe, size, network).saliency
            work, predicted = {f"saliency_{recipe.score}": scores}, SCORES_SHOWN * scores
        flops = float(predicted + sum(value for name, value in work.items() if name not in made[job.unit]))
        made[job.unit] |= set(work) - {job.method}  # a training of the method's own name is not shared
        hours = None if plan.tflops is None else flops / plan.tflops / 1e12 / 3600
        found[job.path] = {"flops": flops, "hours": hours, "mb": one.num_bytes / 1e6}
    return found


def _sizes(plan: Plan, name: str):
    """Recipe, network and sizes of a dataset, and the test images with the number of their copies."""
    card, data = datasets.card(name), plan.datasets[name]
    images = data.images or card.counts
    if images is None:
        raise ValueError(
            f"Expected the number of images of {name!r}, whose files are not here. Received: none.\n"
            "Add to this dataset in the plan its training, validation and test images, as images: [1300, 300, 400]"
        )
    recipe = compare.recipe_of(name, plan.recipe, **data.parameters)
    network = data.network or recipes.network_for(plan.recipe, card)
    side = data.size or card.default_size
    sizes = Sizes(card, (side, side, card.channels), max(1, len(card.classes)), *images[:2])
    return recipe, network, sizes, (images[2], 1 + SHIFTED_COPIES + (data.swapped is not None))


def kept_estimates(plan: Plan, new: bool = True) -> dict:
    """The estimates that a grid's folder has of the same plan, else new ones; {} without `tflops`, or if not `new`.

    Nothing is written: `grid_results.claim` keeps them, so that the jobs of a cluster need not count again.
    """
    if plan.tflops is None:
        return {}
    settings = plan.model_dump_json() + repr(recipes.RECIPES.get(plan.recipe))
    try:
        kept = json.loads((plan.folder / "estimates.json").read_text())
    except (OSError, ValueError):
        kept = {}
    if kept.get("plan") == settings:
        return kept
    return {"plan": settings, "jobs": estimates(plan)} if new else {}


def needs(plan: Plan, kept: dict) -> dict[tuple[str, str], dict[str, int]]:
    """(dataset, kind of job) -> {"mem_mb", "runtime" in minutes}, the most of its jobs.

    Twice what is counted, and what a process with TensorFlow takes. Without estimates it is 4,000 MB and 120 minutes.
    """
    found = {}
    for job in jobs(plan):
        most = found.setdefault((job.dataset, job.kind), {"mem_mb": 0, "runtime": 0})
        one = kept["jobs"][job.path] if kept else None
        most["mem_mb"] = max(most["mem_mb"], 4000 if one is None else round(2 * one["mb"]) + 3000)
        most["runtime"] = max(most["runtime"], 120 if one is None else round(2 * 60 * one["hours"]) + 10)
    return found


def table(plan: Plan, found: dict) -> pd.DataFrame:
    """The estimates by dataset and kind of job: of one job the most, and of all jobs together."""
    rows = pd.DataFrame([{"dataset": job.dataset, "jobs": job.kind, **found[job.path]} for job in jobs(plan)])
    rows = rows.assign(hours=rows["hours"].astype(float), pflop=rows["flops"] / 1e15)
    kinds = rows.groupby(["dataset", "jobs"], sort=False)
    columns = {"number": kinds.size(), "PFLOP each": kinds["pflop"].max(), "hours each": kinds["hours"].max()}
    columns |= {"hours in all": kinds["hours"].sum(min_count=1), "memory, MB": kinds["mb"].max().round()}
    return pd.DataFrame(columns)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the argument of `sbn-tf grid estimate`."""
    parser.add_argument("plan", help="a folder of profiles/, or a YAML file")


def run(given: argparse.Namespace) -> None:
    """Print the estimates."""
    plan = read(given.plan)
    found = estimates(plan)
    shown = table(plan, found)
    print(report.to_markdown(shown.set_axis([f"{name}: {kind}" for name, kind in shown.index])))
    total = sum(one["flops"] for one in found.values())
    end = f"In all {total / 1e15:,.4g} PFLOP"
    if plan.tflops is not None:
        end += f", {total / plan.tflops / 1e12 / 3600:,.3g} hours of one device of {plan.tflops:g} TFLOP/s"
    print(f"\n{end}. Memory is without the framework's own.")
