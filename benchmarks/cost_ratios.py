"""Counted operations beside measured times, as ratios to the deterministic network, from one run.

Run: `python benchmarks/cost_ratios.py [--network resnet18_small] [--size 32] [--batch 20] [--r-bayes 0.01]`. Times are
medians of interleaved calls, so that a busy machine hits all of them alike.
"""

import argparse
import os

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import keras
import numpy as np

from sbn_tf import cost
from sbn_tf.experiments import networks
from sbn_tf.partial_bayes import to_partial_bayes
from sbn_tf.saliency import saliency, top_k


def main():
    """Measure and print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--network", default="resnet18_small")
    parser.add_argument("--size", type=int, default=32)
    parser.add_argument("--batch", type=int, default=20)
    parser.add_argument("--r-bayes", type=float, default=0.01)
    parser.add_argument("--repeats", type=int, default=15)
    args = parser.parse_args()

    keras.utils.set_random_seed(0)
    shape = (args.size, args.size, 1)
    base = networks.build(args.network, shape, 14 if "resnet" in args.network else 1, seed=0)
    x = np.random.default_rng(0).normal(size=(args.batch, *shape)).astype("float32")
    y = (np.random.default_rng(1).random((args.batch, *base.output_shape[1:])) < 0.1).astype("float32")
    masks = top_k(saliency(base, score="magnitude"), args.r_bayes)
    trained = {"deterministic": base}
    for estimator in ("all", "split"):
        trained[estimator] = to_partial_bayes(base, masks, num_train=1000, num_samples=5, estimator=estimator, seed=0)

    calls, flops = {}, {}
    for name, model in trained.items():
        model.compile(keras.optimizers.Adam(1e-4), "binary_crossentropy", jit_compile=False)
        calls["step", name] = lambda model=model: model.train_on_batch(x, y)
        flops["step", name] = cost.training_flops(model, args.batch)
        if name != "split":  # it predicts as "all" does
            calls["prediction", name] = lambda model=model: model.predict_on_batch(x)
            flops["prediction", name] = cost.prediction_flops(model, args.batch)
    for call in calls.values():
        call()  # traces
    times = {key: [] for key in calls}
    for _ in range(args.repeats):
        for key, call in calls.items():
            with cost.measured() as used:
                call()
            times[key].append(used.seconds)

    print(f"{args.network}, {args.size} px, batch {args.batch}, r_bayes {args.r_bayes:g}, 5 samples")
    print(f"{'':<26}{'operations':>11}{'time':>7}{'MFLOPs an image':>17}{'GFLOPs a second':>17}")
    for kind, name in calls:
        seconds, reference = np.median(times[kind, name]), np.median(times[kind, "deterministic"])
        number, one = flops[kind, name], flops[kind, "deterministic"]
        rate = number * args.batch / seconds / 1e9
        print(f"{kind:<11}{name:<15}{number / one:>11.2f}{seconds / reference:>7.2f}{number / 1e6:>17.1f}{rate:>17.1f}")


if __name__ == "__main__":
    main()
