"""The whole method on whatever accelerator is there: what a step costs, and the notebooks 01 to 03 by papermill.

Run: `KERAS_BACKEND=jax python benchmarks/gpu.py` (or torch, or tensorflow). Every row is added to results/gpu.csv once
it is there: the same command goes on where it was stopped.

- *Speed*: for each network, float32 and bfloat16, with and without compilation: seconds of a training step on a batch
  that stays in memory, images a second in prediction, peak memory. One process a row, for the deterministic network,
  its five passes, and five samples by "all", "split" and (members) "turns". `ratio` is to the deterministic step.
- *Notebooks*: 01 to 03 with the recipe `paper` at the paper's sizes, on generated images and on the real files that lie
  in SBN_TF_DATA, for each share of Bayesian weights and each posterior. The executed notebooks stay in runs/gpu/.

`--dry-run` takes small networks, few images and one epoch: it proves each line but the speed, on a CPU as well.
`--requirements` lists what has to be installed beside the backend (with JAX: 71 MB of wheels). `--rows PATTERN` takes
some rows only.
"""

import argparse
import functools
import importlib.metadata
import json
import math
import os
import re
import subprocess
import sys
import time
from itertools import product
from pathlib import Path

os.environ.setdefault("TF_FORCE_GPU_ALLOW_GROWTH", "true")
os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")

from sbn_tf.core.files import write_atomically  # sbn_tf before Keras: it silences TensorFlow's log

ROOT = Path(__file__).resolve().parents[1]
NUM_SAMPLES = 5
KINDS = ("deterministic", "five passes", "all", "split", "turns")
# Network: outputs, channels, side in pixels, batch; the paper's own.
NETWORKS = {"resnet18": (14, 1, 224, 50), "unet": (1, 1, 128, 10)}
# Dataset: its side in pixels. The generated ones have the tasks of the three real ones.
GENERATED = {"phantom_chest": 224, "phantom_nodule": 128, "phantom_lesion": 224}
REAL = {"chestmnist": 224, "lidc": 128, "isic2018": 224}
POSTERIORS = ("gaussian", "members", "mixture")


def speed(network: str, precision: str, compiled: bool, kind: str, dry_run: bool) -> dict:
    """One row: a step's seconds, images a second in prediction, and the peak memory of this process in bytes."""
    import keras
    from floor import Passes, batch_for, frozen, peak_bytes, training_step

    from sbn_tf import saliency
    from sbn_tf.experiments import networks
    from sbn_tf.partial_bayes import to_partial_bayes

    keras.config.set_dtype_policy("float32" if precision == "float32" else f"mixed_{precision}")
    outputs, channels, side, batch = NETWORKS[network]
    if dry_run:
        network, side, batch = f"{network}_small", 32, 10
    keras.utils.set_random_seed(0)
    base = frozen(networks.build(network, (side, side, channels), outputs, seed=0))
    x, y = batch_for(base, batch)
    if kind == "deterministic":
        model = base
    elif kind == "five passes":
        model = Passes(base, NUM_SAMPLES)
    else:
        masks = saliency.top_k(saliency.saliency(base, score="random"), 0.01)
        posterior = "members" if kind == "turns" else "gaussian"
        options = {"num_train": 1000, "num_samples": NUM_SAMPLES, "estimator": kind, "posterior": posterior, "seed": 0}
        model = to_partial_bayes(base, masks, **options)
    model.compile(keras.optimizers.Adam(1e-4), "binary_crossentropy", jit_compile=compiled)
    step = training_step(model, x, y)
    seconds = _seconds(step, dry_run)
    predicting = _seconds(lambda number: [model.predict_on_batch(x) for _ in range(number)], dry_run)
    return {"seconds": seconds, "images_per_second": batch / predicting, "peak_bytes": peak_bytes(), "batch": batch}


def _seconds(call, dry_run):
    """Seconds of one call: the median of blocks of about a second each."""
    call(1)
    start = time.perf_counter()
    call(1)
    number = 1 if dry_run else max(1, math.ceil(1.0 / (time.perf_counter() - start)))
    blocks = []
    for _ in range(1 if dry_run else 5):
        start = time.perf_counter()
        call(number)
        blocks.append((time.perf_counter() - start) / number)
    return sorted(blocks)[len(blocks) // 2]


def notebooks(dataset: str, size: int, r_bayes: float, posterior: str, dry_run: bool) -> dict:
    """One row: the seconds of 01, 02 and 03. Training that an earlier row did is read, not done again."""
    out = ROOT / "runs" / "gpu"
    values = {"dataset": dataset, "recipe": "paper", "size": size, "runs": str(out / "runs")}
    if dry_run:
        small = "resnet18_small" if dataset in ("phantom_chest", "chestmnist") else "unet_small"
        values |= {"size": 32, "limit": 20, "epochs": 1, "network": small}
    seconds = {}
    for name in ("01_deterministic", "02_saliency", "03_partial_bayes"):
        own = {} if name.startswith("01") else {"r_bayes": r_bayes}
        if name.startswith("03"):
            own |= {"posterior": posterior} | ({"bayes_epochs": 1} if dry_run else {})
        target = out / f"{name}_{dataset}_{r_bayes:g}_{posterior}.ipynb"
        target.parent.mkdir(parents=True, exist_ok=True)
        command = [sys.executable, "-m", "papermill", str(ROOT / "nbs" / f"{name}.ipynb"), str(target), "--cwd"]
        command += [str(ROOT / "nbs"), *(word for key, one in (values | own).items() for word in ("-p", key, str(one)))]
        start = time.perf_counter()
        subprocess.run(command, check=True, stdout=sys.stderr)
        seconds[name[:2]] = round(time.perf_counter() - start, 1)
    return {"seconds": sum(seconds.values()), "note": " + ".join(f"{one:g}" for one in seconds.values())}


def jobs(dry_run: bool) -> dict[str, dict]:
    """Title of each row -> its function and arguments."""
    found = {}
    for network, precision, compiled, kind in product(NETWORKS, ("float32", "bfloat16"), (True, False), KINDS):
        title = f"{network}, {precision}, {'compiled' if compiled else 'not compiled'}: {kind}"
        found[title] = {
            "row": "speed",
            "of": {"network": network, "precision": precision, "compiled": compiled, "kind": kind},
        }
    shares = (0.01,) if dry_run else (0.01, 0.05, 0.2, 1.0)
    for (dataset, size), r_bayes, posterior in product((GENERATED | REAL).items(), shares, POSTERIORS):
        title = f"notebooks: {dataset}, r_bayes {r_bayes:g}, {posterior}"
        found[title] = {
            "row": "notebooks",
            "of": {"dataset": dataset, "size": size, "r_bayes": r_bayes, "posterior": posterior},
        }
    return found


@functools.cache
def is_there(name: str) -> bool:
    """Whether a real dataset can be loaded here."""
    from sbn_tf import datasets

    try:
        datasets.load(name, size=REAL[name], limit=2)
    except (FileNotFoundError, ValueError):
        return False
    return True


def requirements() -> list[str]:
    """`name==version` of all that sbn_tf and its notebooks need beside a backend and what JAX and torch bring.

    This environment needs both of them: what they bring here is left out. It also omits what notebooks run without,
    completion and a debugger for Jupyter.
    """
    from packaging.requirements import Requirement

    def below(name, extras=(), seen=None, skipped=()):
        seen = {} if seen is None else seen
        try:
            found = importlib.metadata.distribution(name)
        except importlib.metadata.PackageNotFoundError:
            return seen
        key = found.metadata["Name"].lower().replace("_", "-")
        if key in skipped or (key in seen and not extras):
            return seen
        seen[key] = found.version
        for text in found.requires or []:
            one = Requirement(text)
            if one.marker is None or any(one.marker.evaluate({"extra": extra}) for extra in ("", *extras)):
                below(one.name, one.extras, seen, skipped)
        return seen

    brought = {name for backend in ("jax", "torch") for name in below(backend)}
    unused = {"debugpy", "jedi", "tensorflow", "tensorflow-probability"}
    needed = below("sbn_tf", ("notebooks",), skipped=unused | brought)
    return sorted(f"{name}=={version}" for name, version in needed.items() if name != "sbn-tf")


def main():
    """Measure what is not yet in the table, and print all of it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dry-run", action="store_true", help="small networks, few images, one epoch")
    parser.add_argument("--requirements", action="store_true", help="list what is needed beside the backend")
    parser.add_argument("--rows", default="", help="only rows whose title this regular expression finds")
    parser.add_argument("--out", type=Path, help="CSV table (results/gpu.csv; of a dry run runs/gpu_dry_run.csv)")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.requirements:
        print("\n".join(requirements()))
        return
    if args.one:
        job = json.loads(args.one)
        row = {"speed": speed, "notebooks": notebooks}[job["row"]](**job["of"], dry_run=args.dry_run)
        from floor import device

        print(json.dumps({"device": device(threads=0), **row}))
        return
    sys.exit(measure(args))


def measure(args) -> int:
    """Each row in a process of its own; the exit code."""
    import pandas as pd

    out = args.out or ROOT / ("runs/gpu_dry_run.csv" if args.dry_run else "results/gpu.csv")
    out.parent.mkdir(parents=True, exist_ok=True)
    backend = os.environ.setdefault("KERAS_BACKEND", "tensorflow")
    table = pd.read_csv(out) if out.exists() else pd.DataFrame(columns=["backend", "title"])
    failed = []
    for title, job in jobs(args.dry_run).items():
        known = ((table["backend"] == backend) & (table["title"] == title)).any()
        if known or not re.search(args.rows, title):
            continue
        if (dataset := job["of"].get("dataset")) in REAL and not is_there(dataset):
            print(f"{title}: left out, its files are not there")
            continue
        command = [sys.executable, __file__, "--one", json.dumps(job), *(["--dry-run"] if args.dry_run else [])]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True)
        if done.returncode:
            failed.append(title)
            continue
        row = {"backend": backend, "title": title, **json.loads(done.stdout.splitlines()[-1])}
        table = with_ratios(pd.concat([table, pd.DataFrame([row])], ignore_index=True))
        write_atomically(out, lambda file, table=table: file.write(table.to_csv(index=False).encode()))
        print(f"{title}: {row['seconds']:.4g} s on {row['device']}", flush=True)
    print(table.to_string(index=False))
    if failed:
        print("\nFailed, to be measured by the same command:", *failed, sep="\n")
    return 1 if failed else 0


def with_ratios(table):
    """The table with the ratio of each step to the deterministic one of its network, precision and compilation."""
    group = table["backend"] + table["title"].str.replace(r": [^:]*$", "", regex=True)
    steps = table["title"].str.endswith(": deterministic")
    floor = group.map(dict(zip(group[steps], table["seconds"][steps], strict=True)))
    return table.assign(ratio=(table["seconds"] / floor).round(3))


if __name__ == "__main__":
    main()
