"""What a training step saves by drawing the noise of a large weight once: steps with and without it, timed in turn.

Run: `python benchmarks/shared_noise.py [--r-bayes 1] [--repeats 7]`: a ResNet-18 at 32 px in batches of 10, five draws,
random masks. Each line is a ratio to the step of the plain network: the median over pairs, in brackets its quartiles.
"""

import argparse
import time

import floor
import keras
import numpy as np

from sbn_tf import saliency
from sbn_tf.core import noise
from sbn_tf.experiments import networks
from sbn_tf.partial_bayes import to_partial_bayes

SIDE, BATCH, STEPS = 32, 10, 3


def main():
    """Time the steps and print their ratios."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--r-bayes", type=float, default=1.0)
    parser.add_argument("--repeats", type=int, default=7)
    args = parser.parse_args()
    base = floor.frozen(networks.build("resnet18", (SIDE, SIDE, 3), 10, seed=0))
    masks = saliency.top_k(saliency.saliency(base, score="random"), args.r_bayes)
    x, y = floor.batch_for(base, BATCH)

    def compiled(model):
        model.compile(keras.optimizers.Adam(1e-4), "binary_crossentropy", jit_compile=False)
        step = floor.training_step(model, x, y)
        step(1)  # traces it
        return step

    steps, least = {"plain": compiled(base)}, noise.LEAST_SHARED
    for estimator in ("all", "split"):
        for name, noise.LEAST_SHARED in (("noise for each draw", float("inf")), ("one noise a step", least)):
            options = {"num_train": 1000, "num_samples": 5, "estimator": estimator, "seed": 0}
            steps[f'"{estimator}", {name}'] = compiled(to_partial_bayes(base, masks, **options))
    seconds = {name: [] for name in steps}
    for _ in range(args.repeats):
        for name, step in steps.items():
            start = time.perf_counter()
            step(STEPS)
            seconds[name].append((time.perf_counter() - start) / STEPS)
    for name, values in seconds.items():
        low, median, high = np.quantile(np.divide(values, seconds["plain"]), [0.25, 0.5, 0.75])
        print(f"{name}: {median:.2f} [{low:.2f}, {high:.2f}] plain steps, {np.median(values):.3f} s")


if __name__ == "__main__":
    main()
