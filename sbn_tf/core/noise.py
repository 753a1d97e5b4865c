"""Standard normal noise: fresh, or for the draws of one training step from numbers that are drawn once."""

from __future__ import annotations

import math
from typing import Any

import keras
import numpy as np
from keras import ops

from sbn_tf.core.context import is_one_step, once

if keras.backend.backend() == "tensorflow":
    import tensorflow as tf

__all__ = ["LEAST_SHARED", "noise_of_a_step", "standard_normal"]

LEAST_SHARED = 4096  # with at least so many Bayesian entries of a weight, the draws of a training step share noise


def standard_normal(size: int | tuple, seed_generator: Any, dtype: str = "float32") -> Any:
    """Standard normal noise of `size`, a count or a shape; different for each call and each replica of a strategy."""
    shape = (size,) if isinstance(size, int) else size
    if keras.backend.backend() == "tensorflow":
        context = tf.distribute.get_replica_context()
        if context is not None and context.num_replicas_in_sync > 1:
            replica = tf.cast(context.replica_id_in_sync_group, "int32")
            # In the seed, not in the counter beside it: no replica meets later what another has drawn.
            seed = tf.cast(seed_generator.next(ordered=False), "int32") + tf.stack([replica * 1013904243, 0])
            return tf.random.stateless_normal(shape, seed, dtype=dtype)
    return keras.random.normal(shape, dtype=dtype, seed=seed_generator)


def noise_of_a_step(owner: keras.layers.Layer, size: int | tuple, seed_generator: Any, dtype: str) -> Any:
    """Noise of one draw. Within a training step long vectors are drawn once, and rolled with new signs for each draw.

    Every draw is standard normal, and draws are uncorrelated, their products of two entries too: the signs of each
    are the products of a random sign for its row and one for its column, as in flipout. What the draws share are the
    absolute values, at other entries.

    Args:
        owner: the posterior whose draws share them.
        size: number of entries, or a shape, which is always fresh; so is everything outside a training step.
        seed_generator, dtype: as for `standard_normal`.

    Reference: Wen et al. 2018, "Flipout", section 3.1.
    """
    if not isinstance(size, int) or size < LEAST_SHARED or not is_one_step():
        return standard_normal(size, seed_generator, dtype)
    first = once(owner, "noise", lambda: standard_normal(size, seed_generator, dtype))
    side = math.isqrt(size - 1) + 1
    place, more = ops.split(standard_normal(1 + 2 * side, seed_generator, dtype), [1])
    start = ops.cast(size * 0.5 * (1 + ops.erf(place[0] / np.sqrt(2.0))), "int32")  # uniform, in 2**24 steps at most
    rows, columns = ops.split(ops.cast(ops.where(more < 0, -1, 1), dtype), [side])
    return ops.roll(first, start) * ops.reshape(rows[:, None] * columns, (-1,))[:size]
