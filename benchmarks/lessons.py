"""How long does each lesson take? python benchmarks/lessons.py [name ...]

Each runs alone, by papermill (`pip install -e ".[notebooks]"`), with its defaults and no real data, in a copy of the
repository that holds no finished runs. Best on a machine that does nothing else: the times are wall clock, TensorFlow's
import included.
"""

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from tqdm import tqdm

ROOT = Path(__file__).resolve().parents[1]
PARTS = ("nbs", "sbn_tf", "profiles", "results")


def seconds(notebook: Path) -> float:
    """Wall time of one lesson, in seconds.

    Raises:
        RuntimeError: a lesson that fails, with the end of what it said.
    """
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / "sbn_tf"
        for part in PARTS:
            shutil.copytree(ROOT / part, copy / part)
        shutil.copy(ROOT / "pyproject.toml", copy)
        environment = {key: value for key, value in os.environ.items() if key != "SBN_TF_DATA"}
        environment |= {"PYTHONPATH": str(copy), "TF_CPP_MIN_LOG_LEVEL": "3"}
        command = [sys.executable, "-m", "papermill", "--no-progress-bar", copy / notebook, copy / "out.ipynb"]
        start = time.perf_counter()
        done = subprocess.run(command, cwd=copy, env=environment, capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"{notebook} failed: {done.stderr[-500:]}")
        return time.perf_counter() - start


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", help="of lessons, such as 03_partial_bayes; default: all")
    names = parser.parse_args().names
    found = sorted([*(ROOT / "nbs").glob("*.ipynb"), *(ROOT / "nbs" / "sbn_tf").glob("*.ipynb")])
    lessons = [path.relative_to(ROOT) for path in found if path.stem != "template"]
    unknown = set(names) - {lesson.stem for lesson in lessons}
    if unknown:
        parser.error(f"Expected names of lessons. Received: {sorted(unknown)}")
    chosen = [lesson for lesson in lessons if not names or lesson.stem in names]
    print("| lesson | seconds |\n|---|---|")
    for lesson in tqdm(chosen, unit="lesson"):
        tqdm.write(f"| {lesson.relative_to('nbs')} | {seconds(lesson):.0f} |")
