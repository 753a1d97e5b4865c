"""What a saliency pass costs: its time over that of one epoch of plain compiled gradients, same model, same data.

Run: python benchmarks/saliency_pass.py
"""

import os
import time

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import keras
import numpy as np
import tensorflow as tf

from sbn_tf import models
from sbn_tf.saliency import eligible_weights, saliency

BATCHES, BATCH_SIZE = 16, 16


def main():
    keras.utils.set_random_seed(0)
    model = models.build("resnet18_small", (32, 32, 3), 10)
    rng = np.random.default_rng(0)
    x = rng.normal(size=(BATCHES * BATCH_SIZE, 32, 32, 3)).astype("float32")
    y = rng.integers(0, 2, (len(x), 10)).astype("float32")
    data = tf.data.Dataset.from_tensor_slices((x, y)).batch(BATCH_SIZE, drop_remainder=True).cache()
    loss = keras.losses.BinaryCrossentropy()
    variables = [weight.variable.value for weight in eligible_weights(model).values()]

    @tf.function
    def gradients(x, y):
        with tf.GradientTape(watch_accessed_variables=False) as tape:
            tape.watch(variables)
            value = loss(y, model(x, training=False))
        return value, tape.gradient(value, variables)

    def epoch(batches):
        for batch in data.take(batches):
            value, _ = gradients(*batch)
            float(value)

    def timed(function, batches):
        start = time.perf_counter()
        function(batches)
        return time.perf_counter() - start

    def scores(batches):
        saliency(model, data, loss, max_batches=batches, verbose=False)

    # `saliency` traces anew in every call: a call of one batch is that cost, and the rest is the pass itself.
    epoch(BATCHES), scores(BATCHES)
    plain, one, whole = [], [], []
    for _ in range(3):
        plain.append(timed(epoch, BATCHES))
        one.append(timed(scores, 1))
        whole.append(timed(scores, BATCHES))
    plain, one, whole = min(plain), min(one), min(whole)
    steady = (whole - one) / (plain * (BATCHES - 1) / BATCHES)
    print(f"{BATCHES} batches of {BATCH_SIZE}, one epoch of gradients = 1")
    print(f"saliency pass, tracing left out: {steady:.2f}")
    print(f"saliency pass, tracing included: {whole / plain:.2f}")


if __name__ == "__main__":
    main()
