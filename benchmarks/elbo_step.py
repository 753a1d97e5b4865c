"""Cost of a partial Bayesian training step and its memory, as ratios to the deterministic network, from one run.

Run: `python benchmarks/elbo_step.py [--size 32] [--batch 20] [--r-bayes 0.01]`. Times are medians of interleaved steps,
so that a busy machine hits all of them alike.
"""

import argparse
import os
import time

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import keras
import numpy as np

from sbn_tf import models
from sbn_tf.partial_bayes import to_partial_bayes
from sbn_tf.saliency import saliency, top_k


def stepper(model, x, y):
    """One compiled training step on a resident batch."""
    model.compile(keras.optimizers.Adam(1e-4), "binary_crossentropy", jit_compile=False)
    model.train_on_batch(x, y)
    return lambda: model.train_on_batch(x, y)


def bytes_of(variables):
    """Bytes held by variables."""
    return sum(int(np.prod(v.shape)) * np.dtype(keras.backend.standardize_dtype(v.dtype)).itemsize for v in variables)


def main():
    """Measure and print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--network", default="resnet18")
    parser.add_argument("--size", type=int, default=32)
    parser.add_argument("--batch", type=int, default=20)
    parser.add_argument("--r-bayes", type=float, default=0.01)
    parser.add_argument("--repeats", type=int, default=7)
    args = parser.parse_args()

    keras.utils.set_random_seed(0)
    shape = (args.size, args.size, 1)
    base = models.build(args.network, shape, 14 if "resnet" in args.network else 1, seed=0)
    x = np.random.default_rng(0).normal(size=(args.batch, *shape)).astype("float32")
    y = (np.random.default_rng(1).random((args.batch, *base.output_shape[1:])) < 0.1).astype("float32")
    masks = top_k(saliency(base, None, None, score="magnitude"), args.r_bayes)

    steps, models_ = {}, {}
    for name, options in {"all": {"estimator": "all"}, "split": {"estimator": "split"}}.items():
        # r = 0 with S samples is S deterministic passes of the same graph: the floor of "all".
        for kind, chosen in (("", masks), (" floor", {k: np.zeros_like(m) for k, m in masks.items()})):
            bnn = to_partial_bayes(base, chosen, num_train=1000, num_samples=5, seed=0, **options)
            models_[name + kind], steps[name + kind] = bnn, stepper(bnn, x, y)
    for layer in base.layers:
        if isinstance(layer, keras.layers.BatchNormalization):
            layer.trainable = False  # as in step 3
    models_["deterministic"], steps["deterministic"] = base, stepper(base, x, y)

    times = {name: [] for name in steps}
    for _ in range(args.repeats):
        for name, step in steps.items():
            start = time.perf_counter()
            step()
            times[name].append(time.perf_counter() - start)
    median = {name: float(np.median(t)) for name, t in times.items()}
    one = median["deterministic"]
    print(f"{args.network}, {args.size} px, batch {args.batch}, r_bayes {args.r_bayes:g}, 5 samples")
    print(f"five samples / five deterministic passes: {median['all'] / median['all floor']:.3f} (aim 1.05)")
    print(f"five samples / one deterministic step:    {median['all'] / one:.2f}")
    print(f"split / one deterministic step:           {median['split'] / one:.2f}")

    plain, bayes = models_["all floor"], models_["all"]
    trainable = bytes_of(bayes.trainable_weights) / bytes_of(plain.trainable_weights)
    slots = bytes_of(bayes.optimizer.variables) / bytes_of(plain.optimizer.variables)
    print(f"trainable bytes / deterministic: {trainable:.4f}, optimiser bytes: {slots:.4f} (aim {1 + args.r_bayes:g})")


if __name__ == "__main__":
    main()
