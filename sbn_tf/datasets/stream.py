"""Seeded, stateless, resumable streams of batches with tf.data (see `Split.batches`)."""

import numpy as np
import tensorflow as tf

from .base import MULTI_LABEL

__all__ = ["AUGMENTATIONS", "RATERS", "batches"]

AUGMENTATIONS = ("flips_and_quarter_turns",)
RATERS = ("random", "majority", "mean")


def batches(split, batch_size, *, seed=None, initial_epoch=0, epochs=1, augment=None, rater=None, drop_remainder=False):
    """The stream that `Split.batches` documents."""
    rater = _check(split, batch_size, seed, initial_epoch, epochs, augment, rater)
    with tf.device("CPU:0"):  # tf.data reads from host memory; an eager tensor would go to the GPU
        images = tf.constant(split.images)
        targets, order_of_raters, num_valid = _targets(split, rater)
    mean, sd = tf.constant(split.mean), tf.constant(split.sd)
    num_examples = split.num_examples

    def one_epoch(epoch):
        order, draws = tf.range(num_examples), None
        if seed is not None:
            order_seed, draw_seed = _epoch_seeds(seed, epoch)
            order = tf.random.experimental.stateless_shuffle(order, order_seed, alg="philox")
            # One row per example, whatever its place in the order: a draw belongs to the example.
            draws = tf.random.stateless_uniform((num_examples, 4), draw_seed, alg="philox")

        def one_batch(index):
            x, y = tf.gather(images, index), tf.gather(targets, index)
            if rater == "random":
                chosen = _choose_rater(order_of_raters, num_valid, draws, index)
                y = tf.gather(y, chosen, axis=3, batch_dims=1)[..., None]
            if augment is not None:
                flips = tf.gather(draws, index)[:, :3] < 0.5
                x = flip_and_turn(x, flips)
                y = y if split.task == MULTI_LABEL else flip_and_turn(y, flips)
            x = tf.cast(x, "float32")
            if images.dtype == tf.uint8:
                x = x / 255.0
            return (x - mean) / sd, tf.cast(y, "float32")

        stream = tf.data.Dataset.from_tensor_slices(order).batch(batch_size, drop_remainder=drop_remainder)
        return stream.map(one_batch, num_parallel_calls=tf.data.AUTOTUNE, deterministic=True)

    steps = split.steps(batch_size, drop_remainder) * (epochs - initial_epoch)
    stream = tf.data.Dataset.range(initial_epoch, epochs).flat_map(one_epoch)
    return stream.apply(tf.data.experimental.assert_cardinality(steps)).prefetch(tf.data.AUTOTUNE)


def flip_and_turn(images, flips):
    """One of the square's eight symmetries per image.

    Args:
        images: `(B, S, S, C)`.
        flips: `(B, 3)` bool: mirror left-right, mirror up-down, swap rows and columns. A swap and one
            mirror is a quarter turn, so fair coins give all eight, each equally likely.
    """
    across, down, swap = (flips[:, k, None, None, None] for k in range(3))
    images = tf.where(across, images[:, :, ::-1], images)
    images = tf.where(down, images[:, ::-1], images)
    return tf.where(swap, tf.transpose(images, (0, 2, 1, 3)), images)


def _epoch_seeds(seed, epoch):
    base = tf.random.fold_in((seed, 0), epoch, alg="philox")
    pair = tf.random.split(base, 2, alg="philox")
    return pair[0], pair[1]


def _choose_rater(order_of_raters, num_valid, draws, index):
    valid = tf.gather(num_valid, index)
    place = tf.cast(tf.gather(draws, index)[:, 3] * tf.cast(valid, "float32"), "int32")
    place = tf.minimum(place, valid - 1)  # the product can round up to `valid`
    return tf.gather(tf.gather(order_of_raters, index), place, batch_dims=1)


def _targets(split, rater):
    if split.task == MULTI_LABEL:
        return tf.constant(split.targets), None, None
    if rater == "majority":
        return tf.constant(split.majority()), None, None
    if rater == "mean":
        return tf.constant(split.mean_mask()), None, None
    valid_first = np.argsort(~split.rater_valid, axis=1, kind="stable").astype("int32")
    num_valid = split.rater_valid.sum(axis=1).astype("int32")
    return tf.constant(split.targets), tf.constant(valid_first), tf.constant(num_valid)


def _check(split, batch_size, seed, initial_epoch, epochs, augment, rater):
    split.steps(batch_size)  # raises for batch_size < 1
    if not 0 <= initial_epoch < epochs:
        raise ValueError(
            f"Expected 0 <= initial_epoch < epochs. Received: initial_epoch={initial_epoch}, epochs={epochs}"
        )
    if seed is not None and seed < 0:
        raise ValueError(f"Expected seed >= 0 or None. Received: seed={seed}")
    if augment is not None and augment not in AUGMENTATIONS:
        raise ValueError(f"Expected augment None or one of {AUGMENTATIONS}. Received: augment={augment!r}")
    if augment is not None and split.images.shape[1] != split.images.shape[2]:
        raise ValueError(f"Expected square images for quarter turns. Received: images {split.images.shape}")
    if augment is not None and seed is None:
        raise ValueError(f"Expected a seed: augment={augment!r} is random. Received: seed=None")
    if split.task == MULTI_LABEL:
        if rater is not None:
            raise ValueError(f"Expected rater=None for labels: only masks have raters. Received: rater={rater!r}")
        return None
    if rater is None:
        rater = "majority" if seed is None else "random"
    if rater not in RATERS:
        raise ValueError(f"Expected rater one of {RATERS}. Received: rater={rater!r}")
    if rater == "random" and seed is None:
        raise ValueError("Expected a seed: rater='random' is random. Received: seed=None")
    return rater
