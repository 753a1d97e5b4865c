"""What the jobs of a grid wrote: whether it is of this plan, whether it is whole, and the table that is made of it."""

from __future__ import annotations

import argparse
import dataclasses
import json
from pathlib import Path

import pandas as pd

from sbn_tf.core.files import write_atomically
from sbn_tf.experiments import compare, folders, grid, result, results, study
from sbn_tf.experiments.plan import Plan, read
from sbn_tf.experiments.records import RECORD_FORMAT

FORMAT = 2  # of a folder of jobs: raised when notebooks of older ones would not fit


def check_folder(plan: Plan) -> dict:
    """What shapes the results, of this plan's datasets and of others that the folder has. Nothing is written.

    Raises:
        ValueError: there are notebooks of another recipe (of this name or not), of other parameters of a dataset, or
            whose results have another format.
    """
    path = plan.folder / "grid.json"
    formats = [FORMAT, result.FORMAT, folders.FORMAT, RECORD_FORMAT]
    mine = {"formats": formats, "datasets": {name: _shaping(plan, name) for name in plan.datasets}}
    if not path.exists() or not any(plan.folder.glob("*/fold*/seed*/*.ipynb")):
        return mine
    try:
        there = json.loads(path.read_text())
        known = there["datasets"]
        same = there["formats"] == formats and known | mine["datasets"] == mine["datasets"] | known
    except (ValueError, KeyError, TypeError):
        same, known = False, {}
    if not same:
        raise ValueError(
            f"Expected a folder of this grid. Received: {plan.folder}, of another recipe, other parameters of a "
            f"dataset or another version ({path}).\nGive this grid another name, or delete that folder."
        )
    return {**mine, "datasets": known | mine["datasets"]}


def _shaping(plan, name):
    """All that shapes a dataset's results, as JSON gives it back."""
    parameters = plan.datasets[name].parameters
    recipe = compare.recipe_of(name, plan.recipe, **parameters)
    parameters.pop("changes", None)  # the recipe has them
    return json.loads(json.dumps({"parameters": parameters, "recipe": dataclasses.asdict(recipe)}))


def claim(plan: Plan, estimates: dict | None = None) -> None:
    """Write into the plan's folder what shapes its results, and its estimates, if it has some, before the first job.

    Raises:
        ValueError: as `check_folder`.
    """
    _write(plan.folder / "grid.json", check_folder(plan))
    if estimates:
        _write(plan.folder / "estimates.json", estimates)


def _write(path, content):
    write_atomically(path, lambda file: file.write(json.dumps(content, indent=1).encode()))


def gather(plan: Plan) -> pd.DataFrame:
    """Every result of test images in the plan's folder; damaged ones are left out with a warning."""
    return results.collect(plan.folder / "models", damaged="skip")


def write_table(plan: Plan, found: pd.DataFrame) -> str:
    """Add results to the plan's table, and say so in one line. Rows of an older recipe of its datasets are dropped."""
    table = Path(plan.table) if plan.table else plan.folder / "results.csv"
    there = results.read_csv(table) if table.exists() else results.frame([])
    now = {name: _shaping(plan, name)["recipe"] for name in plan.datasets}
    kinds = list(zip(*(there[key] for key in ("dataset", "method", "recipe", "settings")), strict=True))
    other = {
        (name, method, recipe, text): not study.is_of_recipe(
            method, {**results.recipe_settings(text), "name": recipe}, now[name]
        )
        for name, method, recipe, text in set(kinds)
        if name in now
    }
    old = pd.Series([other.get(kind, False) for kind in kinds], index=there.index, dtype=bool)
    if old.any():
        results.write_csv(there[~old], table, merge=False)
    results.write_csv(found, table)
    dropped = f", {len(results.wide(there[old]))} of another recipe dropped" if old.any() else ""
    return f"{len(results.wide(found))} results in {table}{dropped}"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the argument of `sbn-tf grid table` and `finish`."""
    parser.add_argument("plan", help="a folder of profiles/, or a YAML file")


def run(given: argparse.Namespace) -> None:
    """Write the table of results; for `finish` the report before it."""
    plan = read(given.plan)
    if given.command == "grid finish":
        print(grid.report(plan))
    found = gather(plan)
    if not found.empty:
        print(write_table(plan, found))
    elif given.command == "grid finish":
        print("No result yet.")
    else:
        raise ValueError(f"Expected results in {plan.folder}. Received: none. Run the grid first.")
