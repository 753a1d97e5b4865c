"""What a training step saves by drawing the noise of a large weight once: steps with and without it, timed in turn.

Run: `python benchmarks/shared_noise.py [--r-bayes 1] [--repeats 7]`: a ResNet-18 at 32 px in batches of 10, five draws,
random masks. Each line is a ratio to the step of the plain network: the median over pairs, in brackets its quartiles.
"""

import argparse
import functools

import floor
import keras
from growth import seconds_of

from sbn_tf import saliency
from sbn_tf.core import noise
from sbn_tf.experiments import networks
from sbn_tf.partial_bayes import to_partial_bayes

SIDE, BATCH = 32, 10


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

    plain, least = compiled(base), noise.LEAST_SHARED
    for estimator in ("all", "split"):
        options = {"num_train": 1000, "num_samples": 5, "estimator": estimator, "seed": 0}
        for name, entries in (("noise for each draw", float("inf")), ("one noise a step", least)):
            noise.LEAST_SHARED = entries  # read when a step is traced
            step = compiled(to_partial_bayes(base, masks, **options))
            row = floor.ratio_of(
                functools.partial(seconds_of, step), functools.partial(seconds_of, plain), args.repeats
            )
            low, high = row["quartiles"]
            print(f'"{estimator}", {name}: {row["ratio"]:.2f} [{low:.2f}, {high:.2f}] plain steps', flush=True)


if __name__ == "__main__":
    main()
