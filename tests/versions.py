"""Run the layer, conversion and saving tests with other versions of Keras and Python: `python tests/versions.py`.

For each Python on PATH it makes one virtual environment (3 GB in a temporary folder, or in `--folder`, where it stays),
installs the package, then each version of Keras in turn, and prints a table. It takes about ten minutes a row, so CI
does not run it. The exit code is 1 if a test fails.
"""

import argparse
import os
import re
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

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
    """The Python of a virtual environment with the package installed; None where PATH has no such Python."""
    if output_of(f"python{version}", "-c", "import sys; print('%d.%d' % sys.version_info[:2])") != version:
        return None
    python = folder / f"python{version}" / "bin" / "python"
    if not python.exists():
        subprocess.run([f"python{version}", "-m", "venv", python.parents[1]], check=True)
    packages = ["-e", str(ROOT), "pytest", "pytest-xdist", "hypothesis"]  # pyproject.toml has an option of xdist
    subprocess.run([python, "-m", "pip", "install", "-q", *packages], check=True)
    return python


def run(python: Path, arguments: list[str]) -> str:
    """Counts of one pytest run, in words."""
    missing = [one for one in arguments if one.endswith(".py") and not (ROOT / one).exists()]
    if missing:
        return "absent"
    given = {**os.environ, "PYTHONPATH": str(ROOT), "TF_CPP_MIN_LOG_LEVEL": "3"}
    command = [python, "-m", "pytest", "-q", "--tb=line", "-p", "no:cacheprovider", *arguments]
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
    parser.add_argument("--folder", type=Path, help="where the environments are made and stay")
    given = parser.parse_args()
    all_fine = True
    print("| Python | Keras |", " | ".join(name for name, _ in SUITES), "| seconds |")
    print("|---" * (len(SUITES) + 3) + "|", flush=True)
    with tempfile.TemporaryDirectory() as temporary:
        for version in given.python:
            python = environment(version, given.folder or Path(temporary))
            if python is None:
                print(f"| {version} | not on PATH |" + " |" * (len(SUITES) + 1), flush=True)
                continue
            for keras in given.keras:
                # Afterwards, so that the package's own pin does not choose another version.
                subprocess.run([python, "-m", "pip", "install", "-q", f"keras=={keras}.*"], check=True)
                found = output_of(python, "-c", "from importlib.metadata import version; print(version('keras'))")
                start = time.monotonic()
                results = [run(python, arguments) for _, arguments in SUITES]
                all_fine &= all(re.fullmatch(r"\d+ passed|absent", one) for one in results)
                row = " | ".join([version, str(found), *results, f"{time.monotonic() - start:.0f}"])
                print(f"| {row} |", flush=True)
    return int(not all_fine)


if __name__ == "__main__":
    sys.exit(main())
