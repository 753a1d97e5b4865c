"""What saliency costs: a pass of its own over an epoch of gradients, and recorded in `fit` over the same epoch without.

Run: python benchmarks/saliency_pass.py [--images 800] [--repeats 5]
"""

import argparse
import os
import time

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import keras
import numpy as np
import tensorflow as tf

from sbn_tf.experiments import networks
from sbn_tf.saliency import SaliencyRecorder, eligible_weights, saliency

SIZE, BATCH_SIZE, CLASSES = 64, 50, 10


class Clock(keras.callbacks.Callback):
    """Seconds of each step, from its beginning to the next one's; the first of an epoch holds its tracing."""

    def on_train_begin(self, logs=None):
        """No step yet."""
        self.steps = []

    def on_train_batch_begin(self, batch, logs=None):
        """Start the step's clock."""
        self._began = time.perf_counter()

    def on_train_batch_end(self, batch, logs=None):
        """Stop it."""
        self.steps.append(time.perf_counter() - self._began)


def pass_of_its_own(model, data, loss, batches):
    """Ratio of a saliency pass to an epoch of plain compiled gradients, without and with its tracing."""
    variables = [weight.variable.value for weight in eligible_weights(model).values()]

    @tf.function
    def gradients(x, y):
        with tf.GradientTape(watch_accessed_variables=False) as tape:
            tape.watch(variables)
            value = loss(y, model(x, training=False))
        return value, tape.gradient(value, variables)

    def epoch(number):
        for batch in data.take(number):
            value, _ = gradients(*batch)
            float(value)

    def scores(number):
        saliency(model, data, loss, max_batches=number, verbose=False)

    # `saliency` traces anew in every call: a call of one batch is that cost, and the rest is the pass itself.
    epoch(batches), scores(batches)
    plain, one, whole = [], [], []
    for _ in range(3):
        plain.append(timed(epoch, batches))
        one.append(timed(scores, 1))
        whole.append(timed(scores, batches))
    plain, one, whole = min(plain), min(one), min(whole)
    return (whole - one) / (plain * (batches - 1) / batches), whole / plain


def recorded(model, data, loss, repeats):
    """(ratio of a recorded epoch's median step to an ordinary one's, of the sums, seconds of the tracing)."""
    model.compile(keras.optimizers.SGD(1e-3, momentum=0.9), loss)
    model.fit(data, shuffle=False, verbose=0)
    plain, with_recorder, tracing = [], [], []
    clock = Clock()
    for _ in range(repeats):  # by turns: the machine's speed drifts
        model.fit(data, epochs=2, shuffle=False, verbose=0, callbacks=[SaliencyRecorder(), clock])
        half = len(clock.steps) // 2
        plain.append(clock.steps[1:half])
        with_recorder.append(clock.steps[half + 1 :])
        tracing.append(clock.steps[half])
    plain, with_recorder = np.array(plain), np.array(with_recorder)
    each = np.median(with_recorder, axis=1) / np.median(plain, axis=1)
    return np.median(each), with_recorder.sum() / plain.sum(), np.median(tracing) - np.median(with_recorder)


def timed(function, *arguments):
    """Seconds of a call."""
    start = time.perf_counter()
    function(*arguments)
    return time.perf_counter() - start


def main():
    """Print the ratios."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--network", default="resnet18", help="a name of models.NETWORKS (default: resnet18)")
    parser.add_argument("--images", type=int, default=800, help="of an epoch (default: 800)")
    parser.add_argument("--repeats", type=int, default=5, help="pairs of epochs (default: 5)")
    options = parser.parse_args()
    keras.utils.set_random_seed(0)
    tf.config.threading.set_intra_op_parallelism_threads(2)
    model = networks.build(options.network, (SIZE, SIZE, 3), CLASSES)
    rng = np.random.default_rng(0)
    x = rng.normal(size=(options.images, SIZE, SIZE, 3)).astype("float32")
    y = rng.integers(0, 2, (len(x), CLASSES)).astype("float32")
    data = tf.data.Dataset.from_tensor_slices((x, y)).batch(BATCH_SIZE, drop_remainder=True).cache()
    loss = keras.losses.BinaryCrossentropy()
    device = "GPU" if tf.config.list_physical_devices("GPU") else "CPU, 2 threads"
    print(f"{options.network}, {SIZE} px, {len(data)} batches of {BATCH_SIZE}, {device}")
    steady, whole = pass_of_its_own(model, data, loss, len(data))
    print(f"a pass of its own / an epoch of gradients: {steady:.3f}, tracing included {whole:.3f}")
    median, total, tracing = recorded(model, data, loss, options.repeats)
    print(f"a step of `fit` with the recorder / without: median {median:.3f}, sum {total:.3f} (aim 1.02)")
    print(f"once a fit, to trace the step again: {tracing:.1f} s")


if __name__ == "__main__":
    main()
