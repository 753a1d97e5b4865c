"""Parts of a batch: cutting tensors along axis 0 and joining them, with what Keras attaches to them."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import keras
import numpy as np
from keras import ops

from sbn_tf.core.keras_internals import logits_of, mask_of, set_logits, set_mask

if keras.backend.backend() == "tensorflow":
    import tensorflow as tf

__all__ = ["first_rows", "join_batch", "join_outputs", "part_bounds", "part_of_example", "split_batch", "with_attached"]


def part_bounds(batch_size, num_samples: int) -> list[tuple]:
    """(start, stop) of each part: part s holds the rows from s * B // S to (s + 1) * B // S, none where S > B."""
    return list(itertools.pairwise(s * batch_size // num_samples for s in range(num_samples + 1)))


def part_sizes(batch_size, num_samples: int) -> list:
    """Examples in each part; they sum to B."""
    return [stop - start for start, stop in part_bounds(batch_size, num_samples)]


def split_batch(tensor, num_samples: int) -> list:
    """(sample, its part of the batch) for each part that is not empty; all along axis 0, in order.

    Where the batch's size is known only when the graph runs, a part that is empty then gets one row of zeros
    (TensorFlow's convolutions of no example have outputs of a wrong shape): `join_batch` drops what comes of it.
    """
    batch_size = ops.shape(tensor)[0]
    sizes = part_sizes(batch_size, num_samples)
    if isinstance(batch_size, int):
        samples = [s for s in range(num_samples) if sizes[s]] or [0]
        parts = _split(tensor, [sizes[s] for s in samples]) if len(samples) > 1 else [tensor]
        return list(zip(samples, parts, strict=True))
    around = [[0, 0]] * (len(tensor.shape) - 1)
    padded = [
        ops.pad(part, [[0, ops.maximum(1 - size, 0)], *around])
        for part, size in zip(_split(tensor, sizes), sizes, strict=True)
    ]
    return list(enumerate(padded))


def join_batch(parts: list, batch_size, num_samples: int):
    """What became of the parts of `split_batch`, one after the other along axis 0, for a batch of this size."""
    if not isinstance(batch_size, int):
        sizes = part_sizes(batch_size, num_samples)
        parts = [
            ops.slice(part, [0] * len(part.shape), [size, *ops.shape(part)[1:]])
            for part, size in zip(parts, sizes, strict=True)
        ]
    return parts[0] if len(parts) == 1 else ops.concatenate(parts, axis=0)


def with_attached(tensor, rows: Callable):
    """`rows(tensor)`, with the same rows of what Keras attaches to it: a mask, the logits of probabilities.

    Without its logits a loss clips probabilities at 1e-7, where a network that is sure and wrong gets no gradient.
    """
    part = rows(tensor)
    if mask_of(tensor) is not None:
        set_mask(part, rows(mask_of(tensor)))
    if logits_of(tensor) is not None:
        set_logits(part, rows(logits_of(tensor)))
    return part


def first_rows(outputs, count):
    """The first `count` examples of every tensor, with what Keras attaches to it."""
    return keras.tree.map_structure(lambda t: with_attached(t, lambda x: x[:count]), outputs)


def join_outputs(parts: list):
    """Outputs of the parts of a batch, one after the other along axis 0, with what Keras attaches to them."""

    def joined(*tensors):
        whole = ops.concatenate(tensors, axis=0)
        masks, logits = ([get(t) for t in tensors] for get in (mask_of, logits_of))
        if all(mask is not None for mask in masks):
            set_mask(whole, ops.concatenate(masks, axis=0))
        if all(one is not None for one in logits):
            set_logits(whole, ops.concatenate(logits, axis=0))
        return whole

    return keras.tree.map_structure(joined, *parts)


def _split(tensor, sizes):
    if keras.backend.backend() == "tensorflow":
        # A split's gradient is one concatenation; that of five slices writes five tensors of the whole batch.
        return tf.split(tensor, sizes, num=len(sizes))
    return ops.split(tensor, [int(bound) for bound in np.cumsum(sizes)[:-1]], axis=0)


def part_of_example(batch_size, num_samples: int):
    """Number of the part in which each example lies: (B,) int32."""
    if isinstance(batch_size, int):
        return np.repeat(np.arange(num_samples, dtype="int32"), part_sizes(batch_size, num_samples))
    rows = ops.arange(batch_size, dtype="int32")
    later = (ops.cast(rows >= s * batch_size // num_samples, "int32") for s in range(1, num_samples))
    return sum(later, ops.zeros_like(rows))
