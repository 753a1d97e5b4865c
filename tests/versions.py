"""Run tests with other versions of Keras and Python, and on Keras's other backends: `python tests/versions.py`.

For each Python on PATH it makes one virtual environment (3 GB in a temporary folder, or in `--folder`, where it stays),
installs the wheel, then each version of Keras in turn, and prints a table. It takes about ten minutes a row, so CI does
not run it. With `--backends jax torch` it instead makes an environment for each Python and each of these backends,
without TensorFlow and TFP, and runs the tests marked "backends" in it: this Python, with TensorFlow, compares the
numbers. `--python` names those that are on PATH. `--dry-run` prints the commands. The exit code is 1 if a test
fails, and with `--backends` if a Python is missing.
"""

import argparse
import itertools
import os
import re
import shlex
import subprocess
import sys
import tempfile
import time
import tomllib
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType

ROOT = Path(__file__).resolve().parents[1]
KERAS = ("3.12", "3.13", "3.14", "3.15")
PYTHONS = ("3.11", "3.12", "3.13")
SUITES = (
    ("layers", ["tests/test_layers.py"]),
    ("conversion", ["tests/test_conversion.py"]),
    ("saving", ["tests/test_partial_bayes.py", "tests/test_loading.py", "-k", "round_trip or load or save or saved"]),
    ("internals", ["tests/test_keras_internals.py"]),
)


def output_of(*command) -> str | None:
    """What a command prints; None where it fails or is missing."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def environment(version: str, folder: Path) -> Path | None:
    """The Python of a virtual environment in this folder; None where PATH has no such Python."""
    if output_of(f"python{version}", "-c", "import sys; print('%d.%d' % sys.version_info[:2])") != version:
        return None
    python = folder / "bin" / "python"
    if not python.exists():
        subprocess.run([f"python{version}", "-m", "venv", python.parents[1]], check=True)
    return python


def commands(python: Path | str, keras: str) -> list[list[str]]:
    """What runs for one row: the package as a wheel, this Keras, then each suite."""
    pip = [str(python), "-m", "pip", "install", "-q"]
    packages = [str(ROOT), "pytest", "pytest-xdist", "hypothesis"]  # pyproject.toml has an option of xdist
    # -P: the installed package, not the checkout's. Keras comes last: the package's own pin would choose another.
    pytest = [str(python), "-P", "-m", "pytest", "-q", "--tb=line", "-rfE", "-p", "no:cacheprovider"]
    return [[*pip, *packages], [*pip, f"keras=={keras}.*"], *([*pytest, *given] for _, given in SUITES)]


def backend_commands(python: Path | str, backend: str) -> tuple[list[str], list[str]]:
    """What installs a backend and what the package needs but TensorFlow and TFP, and what tests it."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    needed = [one for one in project["dependencies"] if not one.startswith("tensorflow")]
    install = [str(python), "-m", "pip", "install", "-q", *needed, *project["optional-dependencies"][backend], "pytest"]
    pytest = [sys.executable, "-m", "pytest", "-q", "--tb=short", "-rfE", "-m", "backends", "-k", backend]
    return install, [*pytest, "tests/test_backends.py"]


def backend_row(version: str, backend: str, folder: Path) -> bool:
    """Install a backend for a Python, print its row, and say whether all tests passed."""
    python = environment(version, folder / f"{backend}{version}")
    if python is None:
        print(f"| {version} | {backend} | not on PATH | |", flush=True)
        return False
    install, test = backend_commands(python, backend)
    subprocess.run(install, check=True)
    found = output_of(python, "-c", f"from importlib.metadata import version; print(version('{backend}'))")
    start = time.monotonic()
    result = run(test, {f"SBN_TF_PYTHON_{backend.upper()}": str(python)})
    print(f"| {version} | {backend} {found} | {result} | {time.monotonic() - start:.0f} |", flush=True)
    return re.fullmatch(r"\d+ passed", result) is not None


def run(command: list[str], more: Mapping[str, str] = MappingProxyType({})) -> str:
    """Counts of one pytest run, in words; `more` are variables of its environment."""
    given = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"} | dict(more)
    done = subprocess.run(command, cwd=ROOT, env=given, capture_output=True, text=True)
    counts = Counter({kind: int(n) for n, kind in re.findall(r"(\d+) (passed|failed|error)", done.stdout[-300:])})
    if not counts:
        lines = (done.stdout + done.stderr).strip().splitlines() or ["no output"]
        return next((line for line in lines if "error" in line.lower()), lines[-1])[:60]
    failed = counts["failed"] + counts["error"]
    for line in re.findall(r"^(?:FAILED|ERROR) .*", done.stdout, re.MULTILINE):
        print(f"  {line[:150]}", file=sys.stderr)
    return f"{counts['passed']} passed" + (f", {failed} FAILED" if failed else "")


def main() -> int:
    """Print the table; 1 if a test fails."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--keras", nargs="*", default=KERAS, help="versions of Keras, such as 3.12 3.15")
    parser.add_argument("--python", nargs="*", default=PYTHONS, help="versions of Python, such as 3.11 3.13")
    parser.add_argument("--backends", nargs="*", default=(), choices=("jax", "torch"), help="test these instead")
    parser.add_argument("--folder", type=Path, help="where the environments are made and stay")
    parser.add_argument("--dry-run", action="store_true", help="print the commands and run none")
    given = parser.parse_args()
    if given.dry_run and given.backends:
        for version, backend in itertools.product(given.python, given.backends):
            print(*map(shlex.join, backend_commands(f"{backend}{version}/bin/python", backend)), sep="\n")
        return 0
    if given.backends:
        print("| Python | backend | tests | seconds |\n|---|---|---|---|", flush=True)
        with tempfile.TemporaryDirectory() as temporary:
            folder, rows = given.folder or Path(temporary), itertools.product(given.python, given.backends)
            return int(not all([backend_row(version, backend, folder) for version, backend in rows]))
    if given.dry_run:
        for version, keras in itertools.product(given.python, given.keras):
            print(*map(shlex.join, commands(f"python{version}", keras)), sep="\n")
        return 0
    all_fine = True
    print("| Python | Keras |", " | ".join(name for name, _ in SUITES), "| seconds |")
    print("|---" * (len(SUITES) + 3) + "|", flush=True)
    with tempfile.TemporaryDirectory() as temporary:
        for version in given.python:
            python = environment(version, (given.folder or Path(temporary)) / f"python{version}")
            if python is None:
                print(f"| {version} | not on PATH |" + " |" * (len(SUITES) + 1), flush=True)
                continue
            for keras in given.keras:
                package, version_of_keras, *suites = commands(python, keras)
                subprocess.run(package, check=True)
                subprocess.run(version_of_keras, check=True)
                found = output_of(python, "-c", "from importlib.metadata import version; print(version('keras'))")
                start = time.monotonic()
                results = [run(suite) for suite in suites]
                all_fine &= all(re.fullmatch(r"\d+ passed", one) for one in results)
                row = " | ".join([version, str(found), *results, f"{time.monotonic() - start:.0f}"])
                print(f"| {row} |", flush=True)
    return int(not all_fine)


if __name__ == "__main__":
    sys.exit(main())
