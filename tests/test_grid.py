"""The grid: which jobs a profile asks for, what became of them, and what it refuses."""

import dataclasses
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import nbformat
import numpy as np
import pytest
import yaml
from helpers import mask_result, record_of, tiny_networks

from sbn_tf.experiments import estimates, grid, grid_results, plan, recipes, result, results
from sbn_tf.experiments.methods import METHODS
from sbn_tf.experiments.study import check_names

ROOT = Path(__file__).parents[1]
SMALL = {
    "name": "tiny",
    "recipe": "quick",
    "seeds": [0, 1],
    "r_bayes": [0.0001, 0.01, 1],
    "methods": ["deterministic", "ensemble", "ensemble_longer"],
    "datasets": {
        "phantom_nodule": {"limit": 40, "epochs": 2, "bayes_epochs": 1, "folds": [0, 1]},
        "phantom_chest": {"r_bayes": [0.01], "methods": ["temperature"], "seeds": [3]},
    },
}


def made(**changes):
    return plan.plan_of({**SMALL, **changes})


def written(mine, method, r_bayes=None, seed=0, name="a", number=0):
    """The path of a result that a job of phantom_chest wrote."""
    folder = mine.folder / f"models/phantom_chest/{method}/seed{seed}/{name}"
    cost = {"num_bayesian": float(number)}
    one = mask_result(method, seed, dataset="phantom_chest", r_bayes=r_bayes, cost=cost)
    return result.write(one, folder, record_of(np.full((1, 4, 2), 0.3), np.eye(4, 2) > 0))


def test_jobs_are_the_product_of_everything_and_step_1_is_shared():
    jobs = grid.jobs(made())
    # Of phantom_nodule 2 folds x 2 seeds, of phantom_chest 1 seed.
    assert len(jobs) == 4 * (1 + 1 + 3 + 3) + (1 + 1 + 1 + 1)
    assert [job.kind for job in jobs].count("step1") == 4 + 1
    assert len({job.path for job in jobs}) == len(jobs)
    assert "phantom_nodule/fold1/seed0/partial_r0.0001.ipynb" in {job.path for job in jobs}


def test_options_are_parameters_of_the_notebooks():
    by_name = {job.name: job for job in grid.jobs(made()) if (job.fold, job.seed) == (1, 0)}
    text = grid.papermill_options(made(), by_name["partial_r0.0001"])
    found = dict(zip(text.split()[1::3], text.split()[2::3], strict=True))
    assert float(found["r_bayes"]) == pytest.approx(1e-4) and found["method"] == "partial" and found["fold"] == "1"
    assert found["bayes_epochs"] == "1" and Path(found["runs"]).is_absolute()
    first = grid.papermill_options(made(), by_name["step1"])
    assert "bayes_epochs" not in first and "method" not in first
    assert set(by_name["ensemble_longer"].unit + f"/{name}.ipynb" for name in ("saliency", "ensemble")) < set(
        grid.before(by_name["ensemble_longer"])
    )
    for name, options in (("01_deterministic", first), ("02_saliency", first), ("04_baselines", text)):
        cells = nbformat.read(ROOT / "nbs" / f"{name}.ipynb", 4).cells
        parameters = next(cell.source for cell in cells if "parameters" in cell.metadata.get("tags", ()))
        for key in options.split()[1::3]:
            assert f"\n{key} = " in f"\n{parameters}", (name, key)


@pytest.mark.parametrize("name", ["smoke", "small", "paper"])
def test_the_profiles_that_come_with_it_are_whole(name):
    found = plan.read(ROOT / "profiles" / name)
    assert found.name == name
    check_names(found)
    assert all(set(data.methods) < set(METHODS) for data in found.datasets.values())
    content = yaml.safe_load((ROOT / "profiles" / name / "config.yaml").read_text())
    assert content["configfile"] == f"profiles/{name}/config.yaml" and content["keep-going"] is True


def test_a_folder_of_another_grid_is_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    grid_results.check_folder(made())
    assert not list(tmp_path.iterdir())  # a look writes nothing
    grid_results.claim(made(recipe="paper"))  # nothing has run yet
    grid_results.claim(made())
    notebook = made().folder / "phantom_nodule/fold0/seed0/step1.ipynb"
    notebook.parent.mkdir(parents=True)
    notebook.write_text("{}")
    grid_results.claim(made(seeds=[5]))  # more of the same
    grid_results.claim(made(datasets={"phantom_lesion": {}}))  # another dataset beside it
    for changes in ({"recipe": "paper"}, {"datasets": {"phantom_nodule": {"limit": 41}}}):
        with pytest.raises(ValueError, match=r"another recipe, other parameters .*\n.*another name") as error:
            grid_results.claim(made(**changes))
        assert len(str(error.value).splitlines()) == 2
    changed = dataclasses.replace(recipes.RECIPES["quick"], learning_rate=0.5)  # of the same name
    with monkeypatch.context() as patch, pytest.raises(ValueError, match="another recipe"):
        patch.setitem(recipes.RECIPES, "quick", changed)
        grid_results.claim(made())
    with monkeypatch.context() as patch, pytest.raises(ValueError, match="another version"):
        patch.setattr(result, "FORMAT", 99)
        grid_results.claim(made())
    (made().folder / "grid.json").write_text("{")
    with pytest.raises(ValueError, match="another version"):
        grid_results.claim(made())


def test_status_tells_done_failed_and_missing_and_what_remains(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    mine = made(datasets={"phantom_chest": {"methods": ["deterministic", "temperature"], "r_bayes": [0.01]}}, seeds=[0])
    unit = mine.folder / "phantom_chest/fold-1/seed0"
    unit.mkdir(parents=True)
    for method, r_bayes in (("deterministic", None), ("partial", 0.01)):
        written(mine, method, r_bayes)
    for name, seconds in (("step1", 100.0), ("deterministic", 30.0)):
        (unit / f"{name}.ipynb").write_text("{}")
        (unit / f"{name}.tsv").write_text(f"s\th:m:s\n{seconds}\t0:00:01\n")
    error = nbformat.v4.new_output("error", ename="ValueError", evalue="no\nluck", traceback=[])
    broken = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell("1/0", outputs=[error])])
    nbformat.write(broken, unit / "saliency.failed.ipynb")
    found = grid.status(mine, cores=2)
    assert (len(found.done), list(found.failed), len(found.missing)) == (
        2,
        ["phantom_chest/fold-1/seed0/saliency.ipynb"],
        2,
    )
    assert "ValueError: no luck" in next(iter(found.failed.values()))
    assert found.remaining_seconds is None  # nothing like a partial job has run
    (unit / "partial_r0.01.ipynb").write_text("{}")
    (unit / "partial_r0.01.tsv").write_text("s\n50.0\n")
    found = grid.status(mine, cores=2)
    assert found.missing == ["phantom_chest/fold-1/seed0/temperature.ipynb"]
    assert found.remaining_seconds == pytest.approx(30.0 / 2)
    by_three = mine.model_copy(update={"threads": 3})
    assert grid.status(by_three, cores=7).remaining_seconds == pytest.approx(30.0 / 2)  # two at a time
    text = grid.report(mine)
    assert "| phantom_chest | baseline | 1 | 0 | 1 |" in text and "no luck" in text


def test_a_job_whose_result_is_gone_or_damaged_is_found_by_the_results_path(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    mine = made(datasets={"phantom_chest": {"methods": ["deterministic", "ensemble"]}}, seeds=[3])
    for job in grid.jobs(mine):
        notebook = mine.folder / job.path
        notebook.parent.mkdir(parents=True, exist_ok=True)
        notebook.write_text("{}")

    def write(method, name, r_bayes=None, number=0):
        return written(mine, method, r_bayes, seed=3, name=name, number=number)

    unit = "phantom_chest/fold-1/seed3"
    write("deterministic", "a")
    damaged = write("ensemble", "b")
    write("partial", "c", 0.01, 100)
    write("partial", "d", 1.0, 10_000)
    assert grid.damaged(mine) == [f"{unit}/partial_r0.0001.ipynb"]
    whole = damaged.read_bytes()
    damaged.write_bytes(whole[:100])
    assert grid.damaged(mine) == [f"{unit}/partial_r0.0001.ipynb", f"{unit}/ensemble.ipynb"]
    write("partial", "e", 0.00012, 1)  # of a share that chooses the same weights
    assert grid.damaged(mine) == [f"{unit}/ensemble.ipynb"]

    found = grid.status(mine)  # which will run that job again
    assert found.damaged == found.missing == [f"{unit}/ensemble.ipynb"] and not found.failed
    assert "1 to do" in found.line and f"gone or damaged: {unit}/ensemble.ipynb" in str(found)
    assert f"gone or damaged: {unit}/ensemble.ipynb" in grid.report(mine)

    damaged.write_bytes(whole.replace(b'"nll": 0.1', b'"nll": 0.2'))
    assert grid.damaged(mine) == [f"{unit}/ensemble.ipynb"]
    damaged.write_bytes(whole)
    assert grid.damaged(mine) == []
    beside = damaged.with_name("record.npz")
    content = bytearray(beside.read_bytes())
    with zipfile.ZipFile(beside) as archive:
        largest = max(archive.infolist(), key=lambda entry: entry.compress_size)
    content[largest.header_offset + 30 + len(largest.filename) + largest.compress_size // 2] ^= 1
    beside.write_bytes(content)
    assert grid.damaged(mine) == grid.status(mine).damaged == [f"{unit}/ensemble.ipynb"]
    assert grid.damaged(mine, records=False) == []  # it is there
    beside.unlink()
    assert grid.damaged(mine, records=False) == grid.damaged(mine) == [f"{unit}/ensemble.ipynb"]


def test_a_damaged_result_is_left_out_of_the_table_with_a_warning(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folder = made().folder / "models/phantom_nodule/partial/seed0/0123456789"
    folder.mkdir(parents=True)
    (folder / "metrics.json").write_text('{"format":')
    with pytest.warns(UserWarning, match="Left out 1 .*metrics.json is not JSON"):
        assert grid_results.gather(made()).empty


@pytest.fixture
def tiny():
    with tiny_networks():
        yield


def test_estimates_are_those_of_the_steps_by_hand(tiny):
    mine = plan.plan_of(
        {
            "name": "e",
            "recipe": "quick",
            "tflops": 2,
            "seeds": [0],
            "r_bayes": [0.01],
            "methods": ["deterministic_longer"],
            "datasets": {"phantom_nodule": {"size": 16, "network": "tiny_masks", "images": [100, 10, 20]}},
        }
    )
    found = estimates.estimates(mine)
    unit = "phantom_nodule/fold-1/seed0"
    from sbn_tf import cost
    from sbn_tf.experiments import networks

    network = networks.build("tiny_masks", (16, 16, 1), 1, seed=0)
    network.compile("adam", "binary_crossentropy")  # the optimiser of quick
    step, one = cost.training_flops(network, 20), cost.prediction_flops(network, 20)
    first = found[f"{unit}/step1.ipynb"]
    assert first["flops"] == pytest.approx(16 * (100 * step + 10 * one) + 20 * one)  # 16 epochs of quick
    assert first["hours"] == pytest.approx(first["flops"] / 2e12 / 3600)
    longer = found[f"{unit}/deterministic_longer.ipynb"]["flops"]
    assert longer == pytest.approx(4 * (100 * step + 10 * one) + 4 * 20 * one)  # with three shifted copies
    assert found[f"{unit}/partial_r0.01.ipynb"]["flops"] > longer
    with pytest.raises(ValueError, match=r"number of images of 'phantom_nodule'"):
        estimates.estimates(plan.plan_of({**SMALL, "datasets": {"phantom_nodule": {}}}))


def test_estimates_of_jobs_that_build_on_one_another(tiny):
    def total(methods):
        mine = plan.plan_of(
            {
                **{"name": "e", "recipe": "quick", "seeds": [0], "r_bayes": [0.01], "methods": methods},
                "datasets": {"phantom_nodule": {"size": 16, "network": "tiny_masks", "images": [100, 10, 20]}},
            }
        )
        return {path.split("/")[-1]: one["flops"] for path, one in estimates.estimates(mine).items()}

    alone, both = total(["ensemble_longer"]), total(["ensemble", "ensemble_longer"])
    shared = total(["ensemble", "ensemble_longer", "deterministic_longer"])
    predicted = both["ensemble.ipynb"] - 4 * (both["step1.ipynb"] - one_pass() * 20)
    assert alone["ensemble_longer.ipynb"] == pytest.approx(
        both["ensemble_longer.ipynb"] + both["ensemble.ipynb"] - predicted
    )
    assert shared["ensemble_longer.ipynb"] < both["ensemble_longer.ipynb"]
    scheduler = estimates.needs(made(), estimates.kept_estimates(made()))
    assert scheduler["phantom_nodule", "partial"] == {"mem_mb": 4000, "runtime": 120}


def one_pass():
    from sbn_tf import cost
    from sbn_tf.experiments import networks

    return cost.prediction_flops(networks.build("tiny_masks", (16, 16, 1), 1, seed=0), 20)


def has_snakemake():
    return shutil.which("snakemake", path=os.path.dirname(sys.executable)) is not None


def snakemake(*arguments, cwd=ROOT, **environment):
    return subprocess.run(
        [sys.executable, "-m", "snakemake", *arguments],
        cwd=cwd,
        capture_output=True,
        text=True,
        env={**os.environ, "TF_CPP_MIN_LOG_LEVEL": "3", **environment},
    )


@pytest.mark.skipif(not has_snakemake(), reason="snakemake is not installed: pip install -e .[workflow]")
@pytest.mark.parametrize(
    ("name", "jobs"), [("small", 6 * (2 + 10 + 8) + 3 * (2 + 5 + 8)), ("paper", (3 + 3 + 12) * (2 + 10 + 12))]
)
def test_a_dry_run_counts_every_job(name, jobs, tmp_path):
    workplace = clone_of(tmp_path)
    done = snakemake("--profile", f"profiles/{name}", "-n", cwd=workplace)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    assert not (workplace / "runs").exists()  # a dry run changes nothing
    assert f"total {jobs + 1}" in " ".join((done.stdout + done.stderr).split())


@pytest.mark.skipif(not has_snakemake(), reason="snakemake is not installed: pip install -e .[workflow]")
def test_a_dry_run_lists_the_jobs_of_a_lost_notebook_and_a_damaged_result_and_deletes_nothing(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    workplace = clone_of(tmp_path)
    content = {**SMALL, "seeds": [0], "datasets": {"phantom_chest": {"r_bayes": [0.01]}}}
    content["methods"] = ["deterministic", "temperature"]
    mine = plan.plan_of(content)
    (tmp_path / "own.yaml").write_text(yaml.safe_dump({"plan": content}))
    grid_results.claim(mine)
    for method, r_bayes in (("deterministic", None), ("temperature", None), ("partial", 0.01)):
        path = written(mine, method, r_bayes)
    path.write_text(path.read_text()[:100])
    for age, job in enumerate(grid.jobs(mine)):
        notebook = mine.folder / job.path
        notebook.parent.mkdir(parents=True, exist_ok=True)
        notebook.write_text("{}")
        os.utime(notebook, (1e9 + age, 1e9 + age))
    notebook.unlink()
    before = {path: path.read_bytes() for path in mine.folder.rglob("*") if path.is_file()}
    done = snakemake("-n", "--cores", "1", "--configfile", "own.yaml", "--rerun-triggers", "mtime", cwd=workplace)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    told = " ".join((done.stdout + done.stderr).split())
    assert "partial_r0.01.ipynb is gone or damaged: that job is run again" in told
    assert mine.folder / grid.jobs(mine)[-1].path == notebook and notebook.stem == "temperature"
    assert "partial 1" in told and "baseline 1" in told and "total 3" in told  # both, and the rule that asks for all
    assert {path: path.read_bytes() for path in mine.folder.rglob("*") if path.is_file()} == before


def clone_of(tmp_path):
    """What a grid needs of the repository, in a folder of its own."""
    for name in ("Snakefile", "profiles", "nbs", "sbn_tf"):
        (tmp_path / name).symlink_to(ROOT / name)
    return tmp_path


@pytest.mark.skipif(not has_snakemake(), reason="snakemake is not installed: pip install -e .[workflow]")
def test_a_config_of_no_grid_and_one_with_an_unknown_key_are_refused(tmp_path):
    workplace = clone_of(tmp_path)
    done = snakemake("-n", "--cores", "1", cwd=workplace)
    assert done.returncode != 0 and "Expected a profile with a key `plan`" in done.stderr
    with pytest.raises(ValueError, match="Received: 'methosd'"):
        plan.plan_of({**SMALL, "methosd": []}, "own.yaml")
    (tmp_path / "own.yaml").write_text(yaml.safe_dump({"plan": {**SMALL, "methods": ["no_such_method"]}}))
    done = snakemake("-n", "--cores", "1", "--configfile", "own.yaml", cwd=workplace)
    assert done.returncode != 0 and "Received: no_such_method" in done.stderr


@pytest.mark.slow
@pytest.mark.skipif(not has_snakemake(), reason="snakemake is not installed: pip install -e .[workflow]")
def test_the_smoke_profile_runs_and_later_a_failed_job_stops_no_other(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    workplace = clone_of(tmp_path)
    done = snakemake("--profile", "profiles/smoke", cwd=workplace)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    mine = plan.read("profiles/smoke")
    found = grid.status(mine)
    assert len(found.done) == len(grid.jobs(mine)) and not found.failed and not found.missing
    rows = results.read_csv(mine.folder / "results.csv")
    assert set(rows["dataset"]) == {"phantom_nodule", "phantom_chest"}
    assert set(rows[rows["method"] == "partial"]["r_bayes"]) == {0.01, 1.0}
    assert "0 failed, 0 to do" in (mine.folder / "report.md").read_text()

    # A dataset whose jobs must fail, and a result that was damaged: its job alone is run again.
    content = yaml.safe_load((ROOT / "profiles/smoke/config.yaml").read_text())["plan"]
    content["datasets"]["chestmnist"] = {"r_bayes": [0.01], "methods": ["deterministic"]}  # whose files are not there
    (tmp_path / "own.yaml").write_text(yaml.safe_dump({"plan": content}))
    before = {path: path.stat().st_mtime_ns for path in mine.folder.glob("phantom_*/*/*/*.ipynb")}
    (damaged,) = mine.folder.glob("models/phantom_chest/temperature/seed0/*/metrics.json")
    damaged.write_text(damaged.read_text()[:100])
    options = ("--configfile", "own.yaml", "--cores", "2", "--keep-going", "--rerun-triggers", "mtime")
    done = snakemake(*options, cwd=workplace, SBN_TF_DATA=str(tmp_path))
    assert done.returncode != 0
    found = grid.status(plan.plan_of(content))
    (path,) = found.failed
    assert path == "chestmnist/fold-1/seed0/step1.ipynb" and "FileNotFoundError" in found.failed[path]
    assert (mine.folder / path).with_suffix(".failed.ipynb").exists() and not (mine.folder / path).exists()
    assert len(found.done) == len(grid.jobs(mine)) == len(before)
    assert len(found.missing) == 3  # what waits for the failed job
    assert "temperature.ipynb is gone or damaged: that job is run again" in done.stderr
    assert results.read(damaged).method == "temperature"
    again = [path.name for path, time in before.items() if path.stat().st_mtime_ns != time]
    assert again == ["temperature.ipynb"]
