"""The grid: the jobs of a plan, the options of each, and what became of them. `Snakefile` runs the jobs.

A job is one numbered notebook, executed by papermill. This module loads no TensorFlow: `estimates` says what the jobs
take, `grid_results` checks and collects what they wrote.
"""

from __future__ import annotations

import argparse
import csv
import json
import shlex
import time
from dataclasses import dataclass, field

from sbn_tf.core.files import write_atomically
from sbn_tf.experiments import result
from sbn_tf.experiments.plan import Plan, read

# Kind of job -> its notebook.
NOTEBOOKS = {
    "step1": "01_deterministic",
    "saliency": "02_saliency",
    "partial": "04_baselines",
    "baseline": "04_baselines",
}
_OF_BASELINES = ("bayes_epochs", "num_samples", "threshold", "num_resamples", "swapped")  # 01 and 02 do not take them
# These methods continue the networks of others, if the plan has those.
_CONTINUES = {"ensemble_longer": ("ensemble", "deterministic_longer")}


@dataclass(frozen=True)
class Job:
    """One notebook to be executed: `kind` is of `NOTEBOOKS`; `name` its notebook's, such as "partial_r0.01" (1 %)."""

    kind: str
    name: str
    dataset: str
    fold: int
    seed: int
    method: str = ""
    r_bayes: float = 0.01

    @property
    def unit(self) -> str:
        """Folder of its notebook, below the plan's."""
        return f"{self.dataset}/fold{self.fold}/seed{self.seed}"

    @property
    def path(self) -> str:
        """Path of its notebook, below the plan's folder."""
        return f"{self.unit}/{self.name}.ipynb"


def jobs(plan: Plan) -> list[Job]:
    """Every job of a plan's methods and shares, for each dataset, fold and seed; step 1 first."""
    found = []
    for name, data in plan.datasets.items():
        for fold in data.folds:
            for seed in data.seeds:
                unit = (name, fold, seed)
                found += [Job("step1", "step1", *unit), Job("saliency", "saliency", *unit)]
                found += [Job("partial", f"partial_r{r:g}", *unit, method="partial", r_bayes=r) for r in data.r_bayes]
                found += [Job("baseline", method, *unit, method=method) for method in data.methods]
    return found


def before(job: Job) -> list[str]:
    """Paths of the jobs that must be done before one, if the plan has them."""
    names = {"step1": (), "saliency": ("step1",)}.get(job.kind, ("saliency", *_CONTINUES.get(job.method, ())))
    return [f"{job.unit}/{name}.ipynb" for name in names]


def papermill_options(plan: Plan, job: Job) -> str:
    """Parameters of a job's notebook, as papermill's command line takes them."""
    parameters = plan.datasets[job.dataset].parameters
    given = {"dataset": job.dataset, "recipe": plan.recipe, "seed": job.seed, "fold": job.fold, **parameters}
    given["runs"] = (plan.folder / "models").resolve().as_posix()
    if job.method:
        given |= {"method": job.method, "r_bayes": job.r_bayes}
    else:
        given = {key: value for key, value in given.items() if key not in _OF_BASELINES}
    flags = {key: "-r" if isinstance(value, str) else "-p" for key, value in given.items()}
    return " ".join(f"{flags[key]} {key} {shlex.quote(str(value))}" for key, value in given.items())


def damaged(plan: Plan, *, records: bool = True) -> list[str]:
    """Paths, below the plan's folder, of jobs that were done and whose result is gone or cannot be read.

    Without `records` it is enough that each `record.npz` is there, which is faster than reading it.
    """
    found = {}
    for path in sorted(plan.folder.glob("models/*/*/seed*/*/metrics.json")):
        try:
            one = result.read(path)
            whole = one.record() is not None if records else path.with_name("record.npz").exists()
        except (ValueError, OSError):
            continue
        if whole:
            found.setdefault((one.dataset, one.options.get("fold", -1), one.seed, one.method), []).append(one)
    done = [job for job in jobs(plan) if job.method and (plan.folder / job.path).exists()]
    unit = {job.path: found.get((job.dataset, job.fold, job.seed, job.method), ()) for job in done}
    return [job.path for job in done if not any(_is_of(one, job) for one in unit[job.path])]


def _is_of(one, job):
    """Whether a result is of the job's share. Two shares that choose the same weights have one result between them."""
    if one.r_bayes is None:
        return True
    number = max(one.cost.get("num_bayesian") or 0, 0.5)  # of the weights that the result's share chooses
    return abs(one.r_bayes - job.r_bayes) * number < max(one.r_bayes, 1e-12)


@dataclass(frozen=True)
class Status:
    """What became of the jobs. Keys are paths below the plan's folder.

    Args:
        done: path -> seconds, None where unknown.
        failed: path -> its error.
        missing: paths of the others.
        remaining_seconds: how long the missing jobs will take; None where nothing like them has run.
        damaged: which of the missing were done, but their result is gone or cannot be read.
    """

    done: dict[str, float | None]
    failed: dict[str, str]
    missing: list[str]
    remaining_seconds: float | None
    damaged: list[str] = field(default_factory=list)

    @property
    def line(self) -> str:
        """All in one line."""
        number = len(self.done) + len(self.failed) + len(self.missing)
        left = "" if self.remaining_seconds is None or not self.missing else f", about {_time(self.remaining_seconds)}"
        return f"{len(self.done)} of {number} jobs done, {len(self.failed)} failed, {len(self.missing)} to do{left}"

    def __str__(self):
        return "\n".join([self.line, *self.faults("  ")])

    def faults(self, bullet: str) -> list[str]:
        """A line for each job that failed, or whose result is gone or damaged."""
        failed = [f"{bullet}failed: {path}: {reason}" for path, reason in self.failed.items()]
        return failed + [f"{bullet}to do again, its result is gone or damaged: {path}" for path in self.damaged]


def status(plan: Plan, cores: int = 1, *, records: bool = True) -> Status:
    """What is done, what failed, what remains, and how long that will take on so many cores.

    A missing job is expected to take as long as done jobs of its dataset and name did, else of its dataset and kind,
    else of its kind. A job whose result is `damaged` will be run again: it is missing.
    """
    done, failed, missing, taken = {}, {}, [], {}
    again = damaged(plan, records=records)
    for job in jobs(plan):
        path = plan.folder / job.path
        broken = path.with_suffix(".failed.ipynb")
        if job.path in again:
            missing.append(job)
        elif path.exists():
            done[job.path] = seconds = _seconds(path)
            for key in _alike(job) if seconds is not None else ():
                taken.setdefault(key, []).append(seconds)
        elif broken.exists():
            failed[job.path] = _error_of(broken)
        else:
            missing.append(job)
    times = [next((taken[key] for key in _alike(job) if key in taken), None) for job in missing]
    known = [sum(one) / len(one) for one in times if one is not None]
    remaining = sum(known) / max(1, cores // plan.threads) if len(known) == len(missing) else None
    return Status(done, failed, [job.path for job in missing], remaining, again)


def _alike(job):
    return (job.dataset, job.name), (job.dataset, job.kind), job.kind


def _seconds(path):
    """What Snakemake's benchmark of a job says."""
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
    """Write `report.md` into the plan's folder: what ran and for how long, what failed, what is missing.

    Returns:
        Its text, Markdown.
    """
    found, rows = status(plan), {}
    for job in jobs(plan):
        row = rows.setdefault((job.dataset, job.kind), [0, 0, 0, 0.0])
        row[0] += job.path in found.done
        row[1] += job.path in found.failed
        row[2] += job.path in found.missing
        row[3] += found.done.get(job.path) or 0.0
    lines = [f"# Grid {plan.name}", "", f"{found.line} ({time.strftime('%Y-%m-%d %H:%M')}).", ""]
    lines += ["| dataset | jobs | done | failed | missing | core time |", "|---|---|---|---|---|---|"]
    for key, (*counts, seconds) in rows.items():
        lines.append(f"| {' | '.join(map(str, (*key, *counts, _time(seconds))))} |")
    lines += ["", *found.faults("- ")]
    text = "\n".join(lines).rstrip() + "\n"
    write_atomically(plan.folder / "report.md", lambda file: file.write(text.encode()))
    return text


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `sbn-tf grid status` and `report`."""
    parser.add_argument("plan", help="a folder of profiles/, or a YAML file")
    parser.add_argument("--cores", type=int, default=1, help="cores of the grid, for the remaining time")
    parser.add_argument("--brief", action="store_true", help="one line")


def run(given: argparse.Namespace) -> None:
    """Print the state of a grid, or write and print its report."""
    plan = read(given.plan)
    if given.command == "grid report":
        print(report(plan))
    else:
        found = status(plan, given.cores, records=not given.brief)
        print(found.line if given.brief else found)
