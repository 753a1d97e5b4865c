"""The repository: the README's example runs, the pins are plain, notebooks are clean, no file names a machine."""

import json
import re
import subprocess
import sys
from pathlib import Path

import nbformat
import numpy as np
import pytest
import tensorflow as tf
import yaml

from sbn_tf.experiments import folders
from sbn_tf.layers import posterior_mean

ROOT = Path(__file__).resolve().parents[1]
MACHINE_PATH = re.compile(r"(?<![\w.~$}/])/(?:work|root|home|Users|tmp|opt|mnt|private)/\w|\b[A-Z]:\\+Users\b")
UP = re.compile(r"""["'/][.][.]["'/]""")
REGISTRY = re.compile(r"pypi[.]org|pythonhosted[.]org|(?:index|find)[-_](?:url|links)\s*[=:]|/simple/\w")


def tracked_files() -> list[Path]:
    """Files that git tracks and that are there."""
    try:
        done = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True)
    except FileNotFoundError:
        pytest.skip("git is not installed")
    if done.returncode:
        pytest.skip("not a git checkout")
    return [path for name in done.stdout.split("\0") if name and (path := ROOT / name).is_file()]


def tracked_notebooks() -> dict[str, dict]:
    paths = [path for path in tracked_files() if path.suffix == ".ipynb"]
    return {str(path.relative_to(ROOT)): json.loads(path.read_text("utf-8")) for path in paths}


def code_cells(notebook):
    return [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]


def test_stored_notebooks_show_no_progress_bars_or_logs():
    for name, notebook in tracked_notebooks().items():
        outputs = [one for cell in notebook["cells"] for one in cell.get("outputs", [])]
        assert not [one for one in outputs if one.get("name") == "stderr"], name


def test_readme_examples_run(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names, data = {}, {}
    pages = ("README.md", "docs/your_model.md", "data/README.md")
    examples = {
        page: re.findall(r"^```python\n(.*?)^```", (ROOT / page).read_text("utf-8"), re.M | re.S) for page in pages
    }
    for (page, blocks), found in zip(examples.items(), (names, names, data), strict=True):
        exec(compile("\n".join(blocks), page, "exec"), found)
        if page == "README.md":
            assert names["bayes"].num_bayesian == round(0.05 * names["model"].count_params())
    assert names["bayes"].num_bayesian == names["masks"].num_bayesian == round(0.05 * names["model"].count_params())
    assert names["samples"].shape == (8, 4, 32, 32, 1) and names["parts"]["mean_probs"].shape == (4, 32, 32)
    with posterior_mean():
        np.testing.assert_allclose(names["plain"](names["x"]), names["bayes"].network(names["x"]), rtol=1e-6)
    loaded = tf.saved_model.load(tmp_path / "runs" / "served")
    served = loaded.serve(names["x"][:4])
    assert served["mutual_information"].shape == (4,) and float(served["total_entropy"].numpy().max()) > 0
    assert names["uncertainty"]["mean"].shape == (4, 3)
    assert names["uncertainty"]["mutual_information"].shape == (4,)
    assert data["model"].history.epoch == [0, 1]
    assert "No problem found" in capsys.readouterr().out


@pytest.mark.parametrize("missing", [False, True])
def test_the_first_cell_of_the_quickstart_installs_the_package_by_name_where_it_is_missing(missing, monkeypatch):
    source = "".join(code_cells(tracked_notebooks()["nbs/00_quickstart.ipynb"])[0]["source"])
    package, commands = sys.modules["sbn_tf"], []

    def install(command, check):
        commands.append(command)
        monkeypatch.setitem(sys.modules, "sbn_tf", package)

    monkeypatch.setattr(subprocess, "run", install)
    if missing:
        monkeypatch.setitem(sys.modules, "sbn_tf", None)
    names = {}
    exec(compile(source, "cell", "exec"), names)
    assert names["__version__"] == package.__version__
    assert commands == ([[sys.executable, "-m", "pip", "install", "-q", "sbn_tf"]] if missing else [])


@pytest.mark.filterwarnings("error")
def test_papermill_reads_every_parameter(caplog):
    from papermill.translators import PythonTranslator

    found = 0
    for name, notebook in tracked_notebooks().items():
        for cell in code_cells(notebook):
            if "parameters" in cell["metadata"].get("tags", ()):
                source = "".join(cell["source"])
                read = PythonTranslator.inspect(nbformat.from_dict({**cell, "source": source}))
                assert [one.name for one in read] == re.findall(r"^(\w+) = ", source, re.M), name
                found += 1
    assert found >= 6 and not caplog.records  # it only warns of a line that it cannot read: an "=" in its comment


def test_no_placeholder_is_left():
    assert [
        path.name for path in tracked_files() if path.suffix in {".md", ".ipynb"} and "@@" in path.read_text("utf-8")
    ] == []


def test_links_of_pages_lead_somewhere():
    pages = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "data" / "README.md", *(ROOT / "docs").glob("*.md")]
    for page in pages:
        links = re.findall(r"\]\((?!https?:)([^)#]+)\)", page.read_text("utf-8"))
        assert [link for link in links if not (page.parent / link).exists()] == [], page


def test_readme_is_short():
    text = (ROOT / "README.md").read_text("utf-8")
    assert text.count("\n") <= 120 and len(text.split()) <= 1300


def test_readme_has_one_test_command_on_one_line():
    (block,) = re.findall(r"<!-- test-command -->\n```bash\n(.*?)```", (ROOT / "README.md").read_text("utf-8"), re.S)
    assert block.count("\n") == 1
    assert block.rstrip().endswith("&& .venv/bin/pytest --nbval -n 2 --dist loadfile")


def test_requirements_are_names_and_versions_only():
    lines = (ROOT / "requirements.txt").read_text("utf-8").splitlines()
    assert [line for line in lines if not re.fullmatch(r"[a-z0-9._-]+==[^ ]+", line) or "://" in line] == []
    names = [line.split("==")[0] for line in lines]
    assert len(names) == len(set(names))
    assert {"tensorflow", "keras", "tensorflow-probability", "tf-keras", "pytest", "nbval"} <= set(names)


def test_environment_is_a_conda_file_of_the_same_pins():
    environment = yaml.safe_load((ROOT / "environment.yml").read_text("utf-8"))
    assert environment["name"] == "sbn_tf"
    plain = [entry for entry in environment["dependencies"] if isinstance(entry, str)]
    (pip,) = [entry["pip"] for entry in environment["dependencies"] if isinstance(entry, dict)]
    assert "python=3.11" in plain and "pip" in plain
    assert pip == ["-r requirements.txt", "-e .[test]"]


@pytest.mark.parametrize("pattern", [MACHINE_PATH, REGISTRY], ids=["machine_path", "registry"])
def test_no_tracked_file_names_a_machine(pattern):
    found = []
    for path in tracked_files():
        try:
            text = path.read_text("utf-8")
        except UnicodeDecodeError:
            continue  # a picture
        hits = (f"{path.relative_to(ROOT)}: {m.group()}" for m in pattern.finditer(text))
        found += list(hits)[:3]
    assert found == []


@pytest.mark.parametrize(
    "text, wanted",
    [
        ("open('/" + "home/ann/x.npz')", True),
        ("C:" + "\\Users\\ann", True),
        ("/" + "tmp/ipykernel_12/3.py:1: UserWarning", True),
        ("https://example.com/home/page", False),
        ("../shared/data", False),
    ],
)
def test_machine_path_pattern(text, wanted):
    assert bool(MACHINE_PATH.search(text)) == wanted


def test_notebooks_use_the_kernel_that_every_environment_has():
    kernels = {name: book["metadata"].get("kernelspec", {}).get("name") for name, book in tracked_notebooks().items()}
    assert {name: kernel for name, kernel in kernels.items() if kernel != "python3"} == {}


def test_notebooks_read_the_same_files_from_the_root_as_from_their_folder(monkeypatch, tmp_path):
    """Papermill runs a notebook where it is called, pytest and an editor in the notebook's folder."""
    for folder, expected in ((ROOT, ROOT), (ROOT / "nbs" / "sbn_tf", ROOT), (tmp_path, tmp_path)):
        monkeypatch.chdir(folder)
        assert folders.repository() == expected
    lines = {
        name: [
            line for cell in code_cells(notebook) for line in "".join(cell["source"]).splitlines() if UP.search(line)
        ]
        for name, notebook in tracked_notebooks().items()
    }
    assert lines and not any(lines.values()), lines


def test_notebooks_hold_no_error():
    assert [
        name
        for name, book in tracked_notebooks().items()
        if any(o["output_type"] == "error" for cell in code_cells(book) for o in cell["outputs"])
    ] == []
