"""Losses of a network that runs for several draws: how many terms a loss averages over, and what layers add to it."""

from __future__ import annotations

import contextvars
import weakref
from collections.abc import Mapping
from types import MappingProxyType

import keras
import numpy as np
from keras import ops

from sbn_tf.core.keras_internals import summed_loss
from sbn_tf.core.outputs import output_structure

__all__ = ["loss_terms", "set_added_shares", "terms_of_outputs", "weighted_losses"]

_PER_ELEMENT = ("BinaryCrossentropy", "BinaryFocalCrossentropy", "MeanSquaredError", "MeanAbsoluteError", "Huber")
_PER_POSITION = ("CategoricalCrossentropy", "SparseCategoricalCrossentropy", "CategoricalFocalCrossentropy")


def loss_terms(loss, output_shape: tuple) -> int | None:
    """How many terms of one example `loss` averages over; None where the loss is not a known one.

    Args:
        loss: a Keras loss, its name, or any object that has `terms_per_example(output_shape)`.
        output_shape: shape of the network's output, (batch, ...).

    With these terms and beta = 1 the objective is the ELBO where the loss is a negative log-likelihood: the
    cross-entropies are; a mean squared error is one of variance 1/2, a focal loss is none.

    Raises:
        ValueError: a loss that sums over the batch, or a size left open in the output's shape.
    """
    if hasattr(loss, "terms_per_example"):
        return int(loss.terms_per_example(output_shape))
    loss = keras.losses.get(loss) if isinstance(loss, str | dict) else loss
    name = type(loss).__name__ if isinstance(loss, keras.losses.Loss) else getattr(loss, "__name__", "")
    name = name if name[:1].isupper() else "".join(part.title() for part in name.split("_"))
    if getattr(loss, "reduction", "sum_over_batch_size") not in ("sum_over_batch_size", "mean"):
        raise ValueError(
            f'Expected a loss that averages over the batch. Received: {name} with reduction="{loss.reduction}".'
        )
    if name in _PER_ELEMENT:
        averaged = output_shape[1:]
    elif name in _PER_POSITION:
        classes = getattr(loss, "axis", -1) % len(output_shape)
        averaged = tuple(size for axis, size in enumerate(output_shape) if axis not in (0, classes))
    else:
        return None
    if None in averaged:
        raise ValueError(f"The output's size is open: {output_shape}. Pass terms_per_example= (pixels x channels).")
    return int(np.prod(averaged, dtype=int))


def terms_of_outputs(loss, network: keras.Model) -> int | None:
    """Terms of one example that the loss of a network averages over; None if unknown or unequal between outputs.

    Args:
        loss: as in `keras.Model.compile`: one loss, or a list or dict of losses.
    """
    outputs = keras.tree.flatten(network.outputs)
    if isinstance(loss, dict) and "class_name" not in loss:
        structure = output_structure(network)
        keys = sorted(structure) if isinstance(structure, dict) else network.output_names
        losses = [loss.get(key) for key in keys]
    else:
        losses = list(loss) if isinstance(loss, list | tuple) else [loss] * len(outputs)
    if len(losses) != len(outputs):
        return None  # Keras says what is wrong
    known = {loss_terms(one, tuple(out.shape)) for one, out in zip(losses, outputs, strict=True) if one is not None}
    return known.pop() if len(known) == 1 else None


# By model, of its latest call: the share of each added loss by id, and of all others. Replicas run in threads.
_added: contextvars.ContextVar[Mapping] = contextvars.ContextVar("sbn_tf_added", default=MappingProxyType({}))


def set_added_shares(model: keras.Model, shares: dict, share) -> None:
    """Note what an added loss (`add_loss`, activity regularizers) of this call counts for.

    Args:
        shares: id of a loss -> its factor.
        share: factor of all others.
    """
    _added.set(weakref.WeakKeyDictionary({**_added.get(), model: (shares, share)}))


def weighted_losses(model: keras.Model) -> list:
    """The regularizers and KLs of a model, once each, and what its layers added, by its share of the samples."""
    shares, share = _added.get().get(model, ({}, 1.0))
    losses = model.losses
    first = len(losses) - sum(variable.regularizer is not None for variable in model.trainable_weights)
    found = []
    for i, loss in enumerate(losses):  # first those of activity regularizers and add_loss, then the regularizers
        loss, factor = summed_loss(model, loss), shares.get(id(loss), share) if i < first else 1.0
        found.append(loss if i >= first else loss * ops.cast(factor, loss.dtype))
    return found
