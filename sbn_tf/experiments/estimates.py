"""What the jobs of a grid will take, before anything runs: operations, hours and memory.

Nothing is trained and no data are read: operations are counted from traced steps.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import dataclass
from typing import Any

import keras
import numpy as np
import pandas as pd

from sbn_tf import cost, datasets
from sbn_tf.experiments import compare, networks, recipes, report
from sbn_tf.experiments.grid import Job, jobs
from sbn_tf.experiments.plan import Dataset, Plan, read
from sbn_tf.partial_bayes import to_partial_bayes
from sbn_tf.saliency import Masks, eligible_weights

__all__ = ["estimates", "kept_estimates", "needs", "table"]

SHIFTED_COPIES = 3  # of the test images, predicted beside them


@dataclass(frozen=True)
class Parts:
    """Operations of the parts that the jobs of a dataset are made of; validation is included."""

    recipe: recipes.Recipe
    first: float  # step 1
    longer: float  # the epochs of step 3 without a posterior
    bayesian: float  # step 3
    from_nothing: float  # both steps' epochs of a network whose weights are all Bayesian from the start
    saliency: float  # one pass over the training images
    tested: float  # one pass over the test images
    validated: float
    scored: float  # one pass over the test images and their shifted copies
    num_weights: int
    num_outputs: int  # of all layers, for one image


def _parts(plan: Plan, name: str, data: Dataset) -> Parts:
    """Trace the steps of a dataset's network."""
    card = datasets.card(name)
    images = data.images or card.counts
    if images is None:
        raise ValueError(f"Expected images: [train, val, test] of {name!r} in the plan. Received: none")
    recipe = compare.recipe_of(name, plan.recipe, **data.parameters)
    side = data.size or card.default_size
    head = {"activation": "softmax"} if card.task in datasets.base.EXCLUSIVE else {}
    architecture = data.network or recipes.network_for(plan.recipe, card)
    network = networks.build(architecture, (side, side, card.channels), max(1, len(card.classes)), seed=0, **head)
    network.compile("sgd", "binary_crossentropy")
    masks = Masks({key: np.ones(one.variable.shape, bool) for key, one in eligible_weights(network).items()})
    model = to_partial_bayes(
        network, masks, num_train=images[0], num_samples=recipe.num_samples, estimator=recipe.estimator
    )
    model.compile("sgd", "binary_crossentropy")
    train, val, test = images
    size, loss = recipe.batch_size, keras.losses.BinaryCrossentropy()
    step, bayes = cost.training_flops(network, size) * train, cost.training_flops(model, size) * train
    one_pass = cost.prediction_flops(network, size)
    validated = one_pass * val
    return Parts(
        recipe,
        first=recipe.epochs * (step + validated),
        longer=recipe.bayes_epochs * (step + validated),
        bayesian=recipe.bayes_epochs * (bayes + validated),
        from_nothing=(recipe.epochs + recipe.bayes_epochs) * (recipe.num_samples * step + validated),
        saliency=cost.saliency_flops(network, loss, size) * train,
        tested=one_pass * test,
        validated=validated,
        scored=one_pass * test * (1 + SHIFTED_COPIES + (data.swapped is not None)),
        num_weights=network.count_params(),
        num_outputs=sum(int(np.prod(layer.output.shape[1:])) for layer in network.layers),
    )


def _of_job(job: Job, methods: tuple[str, ...], one: Parts) -> tuple[float, float]:
    """Operations and megabytes of a job. A training that jobs share counts once, in the job that makes it.

    Memory is that of weights, gradients, optimiser and of every layer's output of a batch, kept for the backward pass.
    """
    samples, members = one.recipe.num_samples, 4 * one.first  # the ensemble's other members
    alone, continued = "ensemble" not in methods, "deterministic_longer" in methods
    work = {
        "step1": one.first + one.tested,
        "saliency": 3 * one.saliency,  # notebook 02 also shows other scores
        "deterministic": one.scored,
        "temperature": one.scored + one.validated,
        "ensemble": members + 5 * one.scored,
        "ensemble_longer": members * alone + (4 if continued else 5) * one.longer + 5 * one.scored,
        "snapshot": one.longer + 5 * one.scored,
        "mc_dropout": one.longer + samples * one.scored,
        "deterministic_longer": one.longer + one.scored,
        "laplace": one.saliency + samples * (one.scored + 6 * one.validated),
        "bayes_normal": one.from_nothing + samples * one.scored,
    }
    flops = work.get(job.name, one.bayesian + samples * one.scored)
    weights = one.num_weights * (3 if job.name in work else 5)  # the others have scales, too
    at_once = job.name == "bayes_normal" or (job.name not in work and one.recipe.estimator == "all")
    outputs = one.num_outputs * one.recipe.batch_size * (samples if at_once else 1)
    return float(flops), 4e-6 * (weights + outputs)


def estimates(plan: Plan) -> dict[str, dict[str, Any]]:
    """Job's path -> {"flops", "hours", "mb"}; "hours" is None where the plan has no `tflops`.

    Raises:
        ValueError: a dataset whose number of images is neither known nor given.
    """
    parts = {name: _parts(plan, name, data) for name, data in plan.datasets.items()}
    found = {}
    for job in jobs(plan):
        flops, mb = _of_job(job, plan.datasets[job.dataset].methods, parts[job.dataset])
        hours = None if plan.tflops is None else flops / plan.tflops / 1e12 / 3600
        found[job.path] = {"flops": flops, "hours": hours, "mb": mb}
    return found


def kept_estimates(plan: Plan) -> dict:
    """The estimates that a grid's folder has of the same plan, else new ones; {} where the plan has no `tflops`.

    Nothing is written: `grid_results.claim` keeps them, so that the jobs of a cluster need not count again.
    """
    if plan.tflops is None:
        return {}
    settings = plan.model_dump_json() + repr(recipes.RECIPES.get(plan.recipe))
    try:
        kept = json.loads((plan.folder / "estimates.json").read_text())
    except (OSError, ValueError):
        kept = {}
    return kept if kept.get("plan") == settings else {"plan": settings, "jobs": estimates(plan)}


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
