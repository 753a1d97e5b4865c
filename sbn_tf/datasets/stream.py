"""Seeded, stateless, resumable streams of batches: `Split.batches`, by tf.data or, off TensorFlow, in NumPy."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

import numpy as np

from .arrays import DiskArray
from .card import SEGMENTATION
from .numpy_batches import numpy_batches

if TYPE_CHECKING:
    import tensorflow as tf

logger = logging.getLogger(__name__)

AUGMENTATIONS = ("flips_and_quarter_turns",)
RATERS = ("random", "majority", "mean")


def batches(
    split: Any,
    batch_size: int,
    *,
    seed: int | None = None,
    initial_epoch: int = 0,
    epochs: int = 1,
    augment: str | None = None,
    rater: str | None = None,
    drop_remainder: bool = False,
) -> Any:
    """Stream of (images, targets), both float32: images normalised, targets `(B, L)` or `(B, H, W, 1)`.

    Without a seed the order is the file's and nothing is random: the stream for evaluation. With a seed each epoch has
    its own order, raters and augmentation, all of them functions of (seed, epoch, example) alone: a stream that starts
    at `initial_epoch=3` gives, bit for bit, what the uninterrupted one gives from epoch 3 on. So a resumed run equals
    an uninterrupted one.

    Args:
        split: the `Split`.
        batch_size: images per batch; the last batch of an epoch may be smaller.
        seed: integer >= 0, or None.
        initial_epoch, epochs: yields epochs `initial_epoch` to `epochs - 1`, as in `keras.Model.fit`.
        augment: None or "flips_and_quarter_turns" (the paper's for ISIC): one of the eight symmetries of the square,
            each equally likely, the same for image and mask. Needs a seed.
        rater: "random" (one valid rater's mask, each equally likely, drawn again each epoch; needs a seed), "majority"
            (see `majority`) or "mean" (soft, see `mean_mask`). Default: "random" with a seed, "majority" without.
            Segmentation only.
        drop_remainder: leave out the smaller last batch.

    Returns:
        `tf.data.Dataset` of known length; where Keras runs on JAX or torch, a `keras.utils.PyDataset` of NumPy arrays:
        the same batches, bit for bit. Over several epochs give `fit` `steps_per_epoch=steps(...)` and `shuffle=False`.

    Raises:
        ValueError: an option that is unknown, out of range, or random without a seed.
    """
    import keras

    rater = _check(split, batch_size, seed, initial_epoch, epochs, augment, rater)
    if keras.backend.backend() != "tensorflow":
        return numpy_batches(split, batch_size, seed, range(initial_epoch, epochs), augment, rater, drop_remainder)
    import tensorflow as tf

    read_images, read_targets = _reader(split.images), _reader(split.targets)
    with tf.device("CPU:0"):
        valid = None if split.task != SEGMENTATION else tf.constant(split.rater_valid)
        mean, sd = tf.constant(split.mean), tf.constant(split.sd)
    scale = 255.0 if split.images.dtype == np.uint8 else 1.0
    num_examples = split.num_examples

    def one_epoch(epoch):
        order, draws = tf.range(num_examples), None
        if seed is not None:
            base = tf.random.fold_in((seed, 0), epoch, alg="philox")
            order_seed, draw_seed = tf.unstack(tf.random.split(base, 2, alg="philox"))
            order = tf.random.experimental.stateless_shuffle(order, order_seed, alg="philox")
            # One row per example, whatever its place in the order: a draw belongs to the example.
            draws = tf.random.stateless_uniform((num_examples, 4), draw_seed, alg="philox")

        def one_batch(index):
            x, y = read_images(index), read_targets(index)
            if split.task == SEGMENTATION:
                draw = None if draws is None else tf.gather(draws, index)[:, 3]
                y = _one_mask(y, tf.gather(valid, index), rater, draw)
            if augment is not None:
                flips = tf.gather(draws, index)[:, :3] < 0.5
                x = flip_and_turn(x, flips)
                y = flip_and_turn(y, flips) if split.task == SEGMENTATION else y
            return (tf.cast(x, "float32") / scale - mean) / sd, tf.cast(y, "float32")

        stream = tf.data.Dataset.from_tensor_slices(order).batch(batch_size, drop_remainder=drop_remainder)
        return stream.map(one_batch, num_parallel_calls=tf.data.AUTOTUNE, deterministic=True)

    steps = split.steps(batch_size, drop_remainder) * (epochs - initial_epoch)
    stream = tf.data.Dataset.range(initial_epoch, epochs).flat_map(one_epoch)
    return stream.apply(tf.data.experimental.assert_cardinality(steps)).prefetch(tf.data.AUTOTUNE)


def _reader(array):
    """A function of TensorFlow from row numbers to rows: of a tensor, or of files for a `DiskArray`."""
    import tensorflow as tf

    if isinstance(array, DiskArray):

        def rows_of(index):
            try:
                return array[index]
            except ValueError as error:
                logger.error("%s", error)  # TensorFlow's own message has these two lines in the middle of thirty
                raise

        def read(index):
            return tf.ensure_shape(
                tf.numpy_function(rows_of, [index], array.dtype, stateful=False), (None, *array.shape[1:])
            )

        return read
    with tf.device("CPU:0"):  # tf.data reads from host memory; an eager tensor would go to the GPU
        tensor = tf.constant(array)
    return lambda index: tf.gather(tensor, index)


def _one_mask(masks, valid, rater, draw):
    """The mask to learn from, `(B, H, W, 1)`, one or a mean of `(B, H, W, R)`."""
    import tensorflow as tf

    count = tf.reduce_sum(tf.cast(valid, "float32"), axis=1)
    if rater == "random":
        place = tf.minimum(tf.floor(draw * count), count - 1)  # the product can round up to the count
        order = tf.cumsum(tf.cast(valid, "float32"), axis=1, exclusive=True)
        chosen = tf.argmax(tf.cast(valid & (order == place[:, None]), "int32"), axis=1)
        return tf.gather(masks, chosen, axis=3, batch_dims=1)[..., None]
    marks = tf.cast(masks, "float32") * tf.cast(valid, "float32")[:, None, None, :]
    share = tf.reduce_sum(marks, axis=3, keepdims=True) / count[:, None, None, None]
    return share if rater == "mean" else tf.cast(share >= 0.5, "float32")


def flip_and_turn(images: tf.Tensor, flips: tf.Tensor) -> tf.Tensor:
    """One of the square's eight symmetries per image.

    Args:
        images: `(B, S, S, C)`.
        flips: `(B, 3)` bool: mirror left-right, mirror up-down, swap rows and columns. A swap and one
            mirror is a quarter turn, so fair coins give all eight, each equally likely.
    """
    import tensorflow as tf

    across, down, swap = (flips[:, k, None, None, None] for k in range(3))
    images = tf.where(across, images[:, :, ::-1], images)
    images = tf.where(down, images[:, ::-1], images)
    return tf.where(swap, tf.transpose(images, (0, 2, 1, 3)), images)


def _check(split, batch_size, seed, initial_epoch, epochs, augment, rater):
    split.steps(batch_size)  # raises for batch_size < 1
    if not 0 <= initial_epoch < epochs:
        received = f"initial_epoch={initial_epoch}, epochs={epochs}"
        raise ValueError(f"Expected 0 <= initial_epoch < epochs. Received: {received}")
    if seed is not None and seed < 0:
        raise ValueError(f"Expected seed >= 0 or None. Received: seed={seed}")
    if augment is not None:
        if augment not in AUGMENTATIONS:
            raise ValueError(f"Expected augment None or one of {AUGMENTATIONS}. Received: augment={augment!r}")
        if split.images.shape[1] != split.images.shape[2]:
            raise ValueError(f"Expected square images for quarter turns. Received: images {split.images.shape}")
        if seed is None:
            raise ValueError(f"Expected a seed: augment={augment!r} is random. Received: seed=None")
    if split.task != SEGMENTATION:
        if rater is not None:
            raise ValueError(f"Expected rater=None for labels: only masks have raters. Received: rater={rater!r}")
        return None
    rater = rater or ("majority" if seed is None else "random")
    if rater not in RATERS:
        raise ValueError(f"Expected rater one of {RATERS}. Received: rater={rater!r}")
    if rater == "random" and seed is None:
        raise ValueError("Expected a seed: rater='random' is random. Received: seed=None")
    return rater
