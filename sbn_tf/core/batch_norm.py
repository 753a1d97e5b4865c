"""Running statistics of batch norm: whether they lag behind the weights, and how to estimate them again."""

from __future__ import annotations

import warnings
from typing import Any

import keras
import numpy as np
from keras import ops

from sbn_tf.core.keras_internals import all_layers, noise_states
from sbn_tf.core.passes import batches_of

__all__ = ["batch_norms", "estimate_batch_norm", "warn_of_lag"]

_FEWEST_COMPARED = 8  # examples whose own statistics batch norm may use


def estimate_batch_norm(model: keras.Model, data: Any, batch_size: int = 32, max_batches: int | None = None) -> None:
    """Set the running mean and variance of each batch norm to their mean over the batches of `data`, by their size.

    One pass in training mode. For a network that was trained for few steps, whose statistics still hold their start:
    momentum .999 needs thousands of steps. Batch norm that does not train stays as it is. A layer that the network uses
    several times keeps what its last use gave.

    Args:
        model: built `keras.Model`; it changes.
        data: (x, y) or batches of it, training examples; y is not used.
        batch_size: of arrays; about that of training.
        max_batches: stop after so many; None: all.

    Raises:
        ValueError: no batch norm that trains, no batch, data without y, or endless data without max_batches.

    Reference: Izmailov et al. 2018, "Averaging weights leads to wider optima", section 3.2.
    """
    norms = [one for one in batch_norms(model) if one.trainable]
    if not norms:
        raise ValueError("Expected a network with batch norm that trains. Received: none")
    before, seen = [one.momentum for one in norms], 0
    try:
        for batch in batches_of(data, batch_size, max_batches)[0]:
            if not isinstance(batch, tuple | list) or len(batch) < 2:
                raise ValueError(
                    f"Expected data as (x, y), or batches of it. Received: {type(data).__name__} without y"
                )
            x = keras.tree.map_structure(ops.convert_to_tensor, batch[0])
            size = int(ops.shape(keras.tree.flatten(x)[0])[0])
            for norm in norms:
                norm.momentum = seen / (seen + size)  # so the statistics are the mean over all examples so far
            model(x, training=True)
            seen += size
    finally:
        for norm, momentum in zip(norms, before, strict=True):
            norm.momentum = momentum
    if not seen:
        raise ValueError("Expected data with one batch or more. Received: none")


def batch_norms(model: keras.Model) -> list[keras.layers.BatchNormalization]:
    """The batch norms of a network, those of nested models too."""
    return [one for one in all_layers(model) if isinstance(one, keras.layers.BatchNormalization)]


def warn_of_lag(model: keras.Model, loss: Any, examples: tuple | None) -> None:
    """Warn where a network fits a few training examples far worse in inference mode than in training mode.

    Then the running statistics of its batch norm are not those of its layers: it was trained for few steps, or with a
    momentum that is too high for them. The network is the same afterwards.

    Args:
        model: a trained network; loss: as called on (y, outputs).
        examples: (x, y) of training examples; None or fewer than 8: nothing is compared.
    """
    if (
        not batch_norms(model)
        or loss is None
        or examples is None
        or len(keras.tree.flatten(examples[0])[0]) < _FEWEST_COMPARED
    ):
        return
    x, y = examples
    before = [(one, ops.convert_to_numpy(one)) for one in (*model.non_trainable_variables, *noise_states(model))]
    try:
        own, trained = (
            float(np.mean(ops.convert_to_numpy(loss(y, model(x, training=mode))))) for mode in (False, True)
        )
    except Exception:  # whatever a loss of the user's raises; `fit` says it
        return
    finally:
        for variable, value in before:
            variable.assign(value)
    if own - trained > (0.5 if trained > 0 else 2) * abs(trained) + 0.1:  # below 0 a loss has no natural unit
        count = len(keras.tree.flatten(x)[0])
        warnings.warn(
            f"The network's loss on the first {count} examples is {own:.3g} in inference mode and {trained:.3g} in "
            "training mode: the running statistics of its batch norm probably lag behind. Train it longer, or call "
            "sbn_tf.estimate_batch_norm(model, data), which changes the model, and convert again.",
            stacklevel=4,
        )
