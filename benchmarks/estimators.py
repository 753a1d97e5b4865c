"""Which estimator of the expected loss is worth its time: variance of its gradients, cost, and their product.

Run: `python benchmarks/estimators.py [--networks resnet18 unet] [--masks random magnitude] [--r-bayes 0.01]
[--draws 20]`

- *Variance*: the gradient of the loss of one fixed batch at fixed weights, drawn again and again: the sum of its
  entries' variances, apart for the locs and for the untransformed scales, as a ratio to that of "all" with 5 samples.
- *Cost*: time of loss and gradient over that of the deterministic network, the median of pairs timed in turn.
- *Product*: variance of all entries times cost. Of two estimators the one with the smaller product gives, in equal
  time, the mean gradient with the smaller error; the spread between batches, the same for all, is left out.

The variance of a sum of M draws has a relative error of at most sqrt(2 / (M - 1)), 0.32 at 20 draws; over many entries
it is far smaller. The weights are those of an untrained network.
"""

import argparse
import os
import time

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import keras
import numpy as np
import tensorflow as tf

from sbn_tf.experiments import networks
from sbn_tf.partial_bayes import to_partial_bayes
from sbn_tf.saliency import saliency, top_k

OUTPUTS = {"resnet18": 14, "resnet18_small": 14, "unet": 1, "unet_small": 1}
ESTIMATORS = ("all", "split", "flipout", "local")


def gradients(model, x, y):
    """A compiled function of no argument: gradients of the mean loss by every trainable weight."""
    loss, weights = keras.losses.BinaryCrossentropy(), [w.value for w in model.trainable_weights]

    @tf.function
    def gradient():
        with tf.GradientTape(watch_accessed_variables=False) as tape:
            tape.watch(weights)
            outputs = model(x, training=True)
            samples = outputs["samples"] if isinstance(outputs, dict) else [outputs]
            value = sum(loss(y, sample) for sample in samples) / len(samples)
        return tape.gradient(value, weights, unconnected_gradients="zero")

    return gradient


def variances(model, gradient, draws):
    """Summed variance of the entries' gradients over `draws` calls: of the locs, and of the scales."""
    mean, squares = [0.0] * len(model.trainable_weights), [0.0] * len(model.trainable_weights)
    for number in range(1, draws + 1):  # Welford's update: no difference of large sums
        for i, values in enumerate(gradient()):
            step = tf.convert_to_tensor(values).numpy().astype("float64") - mean[i]
            mean[i] = mean[i] + step / number
            squares[i] = squares[i] + step**2 * (1 - 1 / number)
    total = {False: 0.0, True: 0.0}
    for weight, values in zip(model.trainable_weights, squares, strict=True):
        total["untransformed_scale" in weight.name] += float(np.sum(values)) / (draws - 1)
    return total[False], total[True]


def seconds(call):
    """Time of one call."""
    start = time.perf_counter()
    tf.convert_to_tensor(call()[0]).numpy()
    return time.perf_counter() - start


def main():
    """Measure and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--networks", nargs="+", default=["resnet18", "unet"], choices=sorted(OUTPUTS))
    parser.add_argument("--masks", nargs="+", default=["random", "magnitude"], choices=["random", "magnitude"])
    parser.add_argument("--r-bayes", type=float, default=0.01)
    parser.add_argument("--initial-scale", type=float, default=0.01)
    parser.add_argument("--size", type=int, default=64)
    parser.add_argument("--batch", type=int, default=50)
    parser.add_argument("--draws", type=int, default=20)
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    tf.config.threading.set_intra_op_parallelism_threads(args.threads)
    tf.config.threading.set_inter_op_parallelism_threads(args.threads)

    device = [d.name for d in tf.config.list_physical_devices("GPU")] or f"CPU, {args.threads} threads"
    print(f"{args.size} px, batch {args.batch}, r_bayes {args.r_bayes:g}, scale {args.initial_scale:g}, {device}")
    print("| network | mask | estimator | variance of locs | variance of scales | cost | variance x cost |")
    print("|---|---|---|---|---|---|---|")
    for network in args.networks:
        keras.utils.set_random_seed(0)
        shape = (args.size, args.size, 1)
        base = networks.build(network, shape, OUTPUTS[network], seed=0)
        for layer in base.layers:
            if isinstance(layer, keras.layers.BatchNormalization):
                layer.trainable = False  # as in step 3
        x = tf.constant(np.random.default_rng(0).normal(size=(args.batch, *shape)), "float32")
        y = tf.constant(np.random.default_rng(1).random((args.batch, *base.output_shape[1:])) < 0.1, "float32")
        one = gradients(base, x, y)
        one()
        for mask in args.masks:
            masks = top_k(saliency(base, score=mask), args.r_bayes)
            reference = None
            for estimator in ESTIMATORS:
                bnn = to_partial_bayes(
                    base, masks, num_train=1000, estimator=estimator, initial_scale=args.initial_scale, seed=0
                )
                gradient = gradients(bnn, x, y)
                gradient()
                ratios = [seconds(gradient) / seconds(one) for _ in range(7)]
                found = np.array(variances(bnn, gradient, args.draws))
                reference = found if reference is None else reference
                both, cost = found.sum() / reference.sum(), float(np.median(ratios))
                locs, scales = found / reference
                print(
                    f"| {network} | {mask} | {estimator} | {locs:.2f} | {scales:.2f} | {cost:.2f} | {both * cost:.2f} |"
                )


if __name__ == "__main__":
    main()
