"""`Split.batches` in NumPy, for Keras on JAX and torch: the order, raters and turns of the stream on TensorFlow.

TensorFlow draws its stateless numbers with Philox 4x32-10, a counter-based generator of a few lines. So a seed gives
the same batches on every backend, bit for bit.

Reference: Salmon, Moraes, Dror and Shaw 2011, "Parallel random numbers: as easy as 1, 2, 3", section 3.3.
"""

from __future__ import annotations

import functools
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import numpy as np

from .card import SEGMENTATION

__all__ = ["numpy_batches"]


def numpy_batches(
    split: Any,
    batch_size: int,
    seed: int | None,
    epochs: range,
    augment: str | None,
    rater: str | None,
    drop_remainder: bool,
) -> Any:
    """A `keras.utils.PyDataset` of (images, targets): what `stream.batches` yields, as float32 arrays.

    Batch i is a function of i alone: Keras's threads and a resumed run read the same. One thread makes the next batch
    while the network works on this one.

    Args:
        split, batch_size, seed, augment, rater, drop_remainder: as of `stream.batches`, checked there.
        epochs: the epochs that it yields, one after another.
    """
    import keras

    steps, num_examples = split.steps(batch_size, drop_remainder), split.num_examples

    @functools.lru_cache(maxsize=2)
    def of_epoch(epoch):
        return (np.arange(num_examples), None) if seed is None else order_and_draws(seed, epoch, num_examples)

    def one_batch(number):
        epoch, step = divmod(number, steps)
        order, draws = of_epoch(epochs[epoch])
        index = order[step * batch_size : (step + 1) * batch_size]
        x, y = split.normalised(index), _targets(split, index, rater, None if draws is None else draws[index, 3])
        if augment is not None:
            flips = draws[index, :3] < 0.5
            x, y = flip_and_turn(x, flips), flip_and_turn(y, flips) if split.task == SEGMENTATION else y
        return x, y.astype("float32")

    class Batches(keras.utils.PyDataset):
        """The batches by number."""

        def __init__(self):
            super().__init__()
            self.thread, self.ahead = ThreadPoolExecutor(1), {}

        def __len__(self):
            return steps * len(epochs)

        def __getitem__(self, number):
            if not 0 <= number < len(self):
                raise IndexError(f"Expected a batch from 0 to {len(self) - 1}. Received: {number}")
            made, self.ahead = self.ahead.get(number), {}
            if number + 1 < len(self):
                self.ahead = {number + 1: self.thread.submit(one_batch, number + 1)}
            return made.result() if isinstance(made, Future) else one_batch(number)

    return Batches()


def _targets(split, index, rater, draw):
    """What the network learns from: labels, or one mask of several raters' or their mean."""
    if split.task != SEGMENTATION:
        return split.targets[index]
    if rater != "random":
        return split.mean_mask(index) if rater == "mean" else split.majority(index)
    valid = split.rater_valid[index]
    count = valid.sum(axis=1).astype("float32")
    place = np.minimum(np.floor(draw * count), count - 1)  # the product can round up to the count
    chosen = (valid & (np.cumsum(valid, axis=1) - 1 == place[:, None])).argmax(axis=1)
    return np.take_along_axis(split.targets[index], chosen[:, None, None, None], axis=3)


def flip_and_turn(images: np.ndarray, flips: np.ndarray) -> np.ndarray:
    """`stream.flip_and_turn` of arrays: `(B, S, S, C)` images, and `(B, 3)` bool that choose the symmetry of each."""
    across, down, swap = (flips[:, k, None, None, None] for k in range(3))
    images = np.where(across, images[:, :, ::-1], images)
    images = np.where(down, images[:, ::-1], images)
    return np.where(swap, images.transpose(0, 2, 1, 3), images)


def order_and_draws(seed: int, epoch: int, num_examples: int) -> tuple[np.ndarray, np.ndarray]:
    """An epoch's order of the examples, (N,) integers, and four uniform numbers of each, (N, 4) float32 in [0, 1).

    They are those of `tf.random` with alg="philox": `fold_in`, `split`, `stateless_shuffle` and `stateless_uniform`.
    """
    folded = _words((seed, 0), 2).view("uint64")[0]
    seeds = _words((folded, epoch), 8).view("uint64")
    order = np.arange(num_examples)
    places = _words(seeds[:2], num_examples) % np.arange(num_examples, 0, -1)
    swapped = order.tolist()
    for i, place in enumerate(places.tolist()):
        swapped[i], swapped[i + place] = swapped[i + place], swapped[i]
    mantissas = _words(seeds[2:], 4 * num_examples) & np.uint32(0x7FFFFF)
    draws = (mantissas | np.uint32(0x3F800000)).view("float32") - np.float32(1)
    return np.asarray(swapped), draws.reshape(num_examples, 4)


def _words(seed, count):
    """`count` random uint32 of a seed of two integers; TensorFlow first scrambles it by a key of its own."""
    key, high = _philox(np.uint64(0x02461E293EC8F720), np.uint64(seed[0]), np.uint64(seed[1]), 4).view("uint64")
    return _philox(key, np.uint64(0), high, count)


def _philox(key, low, high, count):
    """The first `count` uint32 of Philox 4x32-10 under a key of 64 bits, from a counter of two times 64 bits."""
    mask, half = np.uint64(0xFFFFFFFF), np.uint64(32)
    low = low + np.arange(-(-count // 4), dtype="uint64")
    high = np.broadcast_to(high, low.shape)
    a, b, c, d = low & mask, low >> half, high & mask, high >> half
    keys = [key & mask, key >> half]
    for _ in range(10):
        left, right = a * np.uint64(0xD2511F53), c * np.uint64(0xCD9E8D57)
        a, b, c, d = (right >> half) ^ b ^ keys[0], right & mask, (left >> half) ^ d ^ keys[1], left & mask
        keys = [(keys[0] + np.uint64(0x9E3779B9)) & mask, (keys[1] + np.uint64(0xBB67AE85)) & mask]
    return np.stack([a, b, c, d], axis=1).astype("uint32").ravel()[:count]
