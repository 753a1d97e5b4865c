"""What the input costs: a training step on the real stream over the same step on one batch held in memory.

Run: python benchmarks/input_pipeline.py

Rows are pairs of a network and a stream: images held in memory and images read row by row from the array cache,
labels, and masks of four raters of which one is drawn, with flips and quarter turns. 1.00 is an input that is never
waited for. The images are noise: what they show costs a network nothing.
"""

import argparse
import os
import tempfile
import time
from pathlib import Path

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import keras
import numpy as np
import tensorflow as tf

from sbn_tf.datasets import MULTI_LABEL, SEGMENTATION, Split, cache
from sbn_tf.experiments import networks

BATCH_SIZE, REPEATS, AIM = 50, 5, 1.05


def noise_split(task, size, channels, raters, steps, folder=None):
    """Images for `steps` batches, in memory or in an array cache below `folder`."""
    rng, count = np.random.default_rng(0), steps * BATCH_SIZE
    images = rng.integers(0, 256, (count, size, size, channels)).astype("uint8")
    shape = (count, 14) if task == MULTI_LABEL else (count, size, size, raters)
    arrays = {"images": images, "targets": rng.integers(0, 2, shape).astype("uint8")}
    if folder is not None:
        columns = {name: (values.shape[1:], "uint8") for name, values in arrays.items()}
        arrays = cache.cached(f"noise{size}", task, columns, lambda start: [arrays], cache=folder)
        arrays["targets"] = arrays["targets"][:] if task == MULTI_LABEL else arrays["targets"]
    return Split("train", task, **arrays)


def ratio(network, split, augment):
    """Time of an epoch on the stream over its time on a resident batch: the median of pairs run in turn."""
    keras.utils.set_random_seed(0)
    outputs = 14 if split.task == MULTI_LABEL else 1
    stem = {"stem": 7} if split.images.shape[1] > 64 else {}  # as `models.resnet18` advises
    model = networks.build(network, split.images.shape[1:], outputs, **stem)
    model.compile(keras.optimizers.SGD(1e-3), keras.losses.BinaryCrossentropy())
    steps = split.steps(BATCH_SIZE)
    resident = tf.data.Dataset.from_tensors(next(iter(split.batches(BATCH_SIZE, seed=0, augment=augment)))).repeat()

    def seconds(data):
        start = time.perf_counter()
        model.fit(data, steps_per_epoch=steps, shuffle=False, verbose=0)
        return time.perf_counter() - start

    stream = split.batches(BATCH_SIZE, seed=0, augment=augment, epochs=1000).repeat()
    seconds(resident), seconds(stream)
    pairs = [(seconds(stream), seconds(resident)) for _ in range(REPEATS)]
    return float(np.median([a / b for a, b in pairs])), float(np.median([b for _, b in pairs])) / steps


def main():
    """Print a row for each pair of network and stream."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="small images only")
    quick = parser.parse_args().quick
    turns = "flips_and_quarter_turns"
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        rows = [
            ("resnet18_small", MULTI_LABEL, 28, 1, 1, 20, None, None),
            ("resnet18_small", MULTI_LABEL, 64, 1, 1, 8, None, folder),
            ("unet_small", SEGMENTATION, 64, 1, 4, 20, turns, None),
            ("unet_small", SEGMENTATION, 64, 3, 1, 20, turns, folder),
        ]
        if not quick:
            rows += [
                ("resnet18", MULTI_LABEL, 64, 1, 1, 3, None, folder),
                ("unet", SEGMENTATION, 64, 1, 4, 10, turns, folder),
                ("resnet18_small", MULTI_LABEL, 224, 1, 1, 12, None, folder),
            ]
        print(f"batch {BATCH_SIZE}, median of {REPEATS}; a step on a resident batch = 1")
        for network, task, size, channels, raters, steps, augment, place in rows:
            found, step = ratio(network, noise_split(task, size, channels, raters, steps, place), augment)
            where = "memory" if place is None else "disk"
            name = f"{network:<15} {size:>3} px x {channels}, {task:<12} from {where:<6}"
            print(f"{name} {step:7.3f} s  {found:.3f}{'' if found <= AIM else f'  above the aim of {AIM}'}", flush=True)


if __name__ == "__main__":
    main()
