"""Memory of ChestMNIST at 224 pixels: converting, streaming and training within 2 GB.

Run: `python benchmarks/medmnist_memory.py [--folder DIR] [--limit N] [--steps 60] [--keep]`. It generates an npz of the
official file's exact shape (112,120 images; cheap content, random labels), loads it as a user would, and measures each
phase in a process of its own. It needs 7 GB of disk while it runs, and some minutes; `--limit` makes it small.
"""

import argparse
import json
import os
import resource
import shutil
import subprocess
import sys
import tempfile
import time
import zipfile
from pathlib import Path

import numpy as np

COUNTS = {"train": 78_468, "val": 11_219, "test": 22_433}
SIDE, LABELS, BATCH = 224, 14, 50
LIMIT_GB = 2.0
PHASES = {
    "import": "import of TensorFlow alone",
    "convert": "conversion of the npz",
    "stream": "one pass of train, val and test",
    "train": "training steps on the stream",
    "resident": "the same steps on one resident batch",
}


def generate(path, counts):
    """Write the npz piece by piece: coarse squares of random grey, which compress fast."""
    rng = np.random.default_rng(0)
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as archive:
        for part, n in counts.items():
            with archive.open(f"{part}_images.npy", "w", force_zip64=True) as file:
                header = {"descr": "|u1", "fortran_order": False, "shape": (n, SIDE, SIDE)}
                np.lib.format.write_array_header_1_0(file, header)
                for first in range(0, n, 200):
                    coarse = rng.integers(0, 256, (min(200, n - first), SIDE // 8, SIDE // 8)).astype("uint8")
                    file.write(coarse.repeat(8, 1).repeat(8, 2).data)
            with archive.open(f"{part}_labels.npy", "w") as file:
                np.lib.format.write_array(file, (rng.random((n, LABELS)) < 0.1).astype("uint8"))


def run_phase(phase, folder, steps):
    """Do one phase in this process; prints its figures as JSON."""
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    import keras
    import tensorflow  # noqa: F401 - what is measured

    figures = {}
    if phase != "import":
        from sbn_tf import datasets
        from sbn_tf.experiments import networks

        start = time.perf_counter()
        data = datasets.load("chestmnist", root=folder, size=SIDE, cache=Path(folder) / "cache", in_memory=False)
        figures["load_seconds"] = time.perf_counter() - start
    start = time.perf_counter()
    if phase == "stream":
        figures["images"] = 0
        for split, seed in ((data.train, 0), (data.val, None), (data.test, None)):
            for x, _ in split.batches(BATCH, seed=seed):
                figures["images"] += len(x)
    elif phase in ("train", "resident"):
        # The 7 x 7 stem of stride 2, as for images of this size.
        model = networks.build("resnet18_small", data.input_shape, data.num_outputs, seed=0, stem=7)
        model.compile(keras.optimizers.Adam(1e-3), "binary_crossentropy", jit_compile=False)
        stream = data.train.batches(BATCH, seed=0, epochs=1000, drop_remainder=True)
        if phase == "resident":
            stream = [next(iter(stream))] * (steps + 1)
        batches, stamps = iter(stream), []
        for _ in range(steps + 1):  # the first one also traces
            x, y = next(batches)
            model.train_on_batch(x, y)
            stamps.append(time.perf_counter())
        figures["ms_per_step"] = 1000 * float(np.median(np.diff(stamps)))
    figures["seconds"] = time.perf_counter() - start
    unit = 1 if sys.platform == "darwin" else 1024
    figures["peak_bytes"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    print(json.dumps(figures))


def measured(phase, folder, steps):
    """The figures of a phase, from a process of its own."""
    command = [sys.executable, __file__, "--phase", phase, "--folder", str(folder), "--steps", str(steps)]
    out = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout
    return json.loads(out.splitlines()[-1])


def main():
    """Generate, measure, print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", help="where to work; default: a temporary folder")
    parser.add_argument("--limit", type=int, help="at most that many images of each split")
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--keep", action="store_true", help="keep the npz and its cache")
    parser.add_argument("--phase", choices=PHASES, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.phase:
        run_phase(args.phase, args.folder, args.steps)
        return

    counts = {part: min(n, args.limit or n) for part, n in COUNTS.items()}
    if counts["train"] < BATCH:
        parser.error(f"Expected --limit >= {BATCH}, one batch. Received: --limit {args.limit}")
    folder = Path(tempfile.mkdtemp(prefix="medmnist_memory_", dir=args.folder))
    try:
        start = time.perf_counter()
        path = folder / "chestmnist_224.npz"
        generate(path, counts)
        total = sum(counts.values())
        print(
            f"{total:,} images of {SIDE} x {SIDE}: {total * SIDE**2 / 1e9:.2f} GB in an npz of "
            f"{path.stat().st_size / 1e9:.2f} GB, generated in {time.perf_counter() - start:.0f} s",
            flush=True,
        )
        found, failed = {}, []
        for phase, title in PHASES.items():
            found[phase] = figures = measured(phase, folder, args.steps)
            peak = figures["peak_bytes"] / 1e9
            limit = ""
            if phase in ("stream", "train"):
                limit = f"  {'PASS' if peak < LIMIT_GB else 'FAIL'} (limit {LIMIT_GB:g} GB)"
                failed += [title] if peak >= LIMIT_GB else []
            print(f"{title:<40} peak {peak:.2f} GB{limit}", flush=True)
        stream = found["stream"]
        print(
            f"conversion: {found['convert']['load_seconds']:.0f} s, once; opened again: {stream['load_seconds']:.1f} s"
        )
        print(f"one pass: {stream['images']:,} images in {stream['seconds']:.0f} s")
        train, resident = found["train"]["ms_per_step"], found["resident"]["ms_per_step"]
        print(f"step of resnet18_small, batch {BATCH}: {train:.0f} ms streamed, {resident:.0f} ms resident")
    finally:
        if args.keep:
            print(f"kept: {folder}")
        else:
            shutil.rmtree(folder)
    if failed:
        sys.exit(f"over {LIMIT_GB:g} GB: {', '.join(failed)}")


if __name__ == "__main__":
    main()
