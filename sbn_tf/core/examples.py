"""Whether the arrays that a user gives fit the network and its loss, before TensorFlow says it in forty lines."""

from __future__ import annotations

from typing import Any

import keras
import numpy as np

from sbn_tf.core.keras_internals import loss_arguments
from sbn_tf.core.outputs import input_structure

__all__ = ["check_examples", "check_inputs", "check_targets"]

_SPARSE = ("sparse_categorical_crossentropy", "SparseCategoricalCrossentropy")
_BINARY = ("binary_crossentropy", "BinaryCrossentropy")


def check_inputs(network: keras.Model, x: Any) -> None:
    """Refuse arrays of inputs that the network does not take. Datasets and other structures pass: Keras checks them.

    Raises:
        ValueError: no inputs, no examples, another shape, or no axis of the batch.
    """
    if x is None:
        raise ValueError("Expected inputs x. Received: None")
    if not getattr(network, "inputs", None):  # a subclassed model
        return
    wanted = input_structure(network)
    if isinstance(x, list) and len(x) != 1 and not isinstance(wanted, list | tuple | dict):
        raise ValueError(f"Expected one array of inputs: give np.stack(x). Received: a list of {len(x)}")
    try:
        keras.tree.assert_same_structure(wanted, x)
    except (TypeError, ValueError):
        return
    for array, expected in zip(keras.tree.flatten(x), keras.tree.flatten(wanted), strict=True):
        if not isinstance(array, np.ndarray) and not keras.ops.is_tensor(array):
            return
        shape, whole = tuple(array.shape), tuple(expected.shape)
        if not shape or shape[0] == 0:
            raise ValueError(f"Expected inputs of one example or more, {_shown(whole)}. Received: shape {shape}")
        # Keras adds or drops a last axis of 1.
        fits = any(_fits(shape, form) for form in (whole, whole[:-1] if whole[-1:] == (1,) else whole, (*whole, 1)))
        if not fits:
            hint = "; of one example give x[None]" if _fits((1, *shape), whole) else ""
            raise ValueError(f"Expected inputs of shape {_shown(whole)}. Received: shape {shape}{hint}")


def check_examples(network: keras.Model, loss: Any, x: Any, y: Any) -> None:
    """`check_inputs` and `check_targets`, of what `fit` and `evaluate` take."""
    check_inputs(network, x)
    check_targets(network, loss, x, y)


def check_targets(network: keras.Model, loss: Any, x: Any, y: Any) -> None:
    """Refuse arrays of targets that one loss of one output cannot take. Everything else passes.

    Raises:
        ValueError: a list of labels, another number of examples than `x`, texts, or labels out of range.
    """
    if isinstance(y, list | tuple) and y and np.ndim(y[0]) == 0:
        if isinstance(y[0], str):
            y = np.asarray(y)
        else:
            raise ValueError(
                f"Expected targets as an array: give np.array(y). Received: a {type(y).__name__} of numbers"
            )
    if not isinstance(y, np.ndarray) or not isinstance(x, np.ndarray):
        return
    if y.ndim and x.ndim and len(x) != len(y):
        raise ValueError(f"Expected as many targets as inputs. Received: {len(x)} inputs and {len(y)} targets")
    if y.dtype.kind in "US":
        raise ValueError(
            "Expected targets as numbers; of texts give np.unique(y, return_inverse=True)[1]. "
            f"Received: texts such as {str(y.flat[0])!r}"
        )
    outputs = keras.tree.flatten(getattr(network, "outputs", None) or [])
    if len(outputs) != 1 or y.size == 0 or y.dtype.kind not in "biuf":
        return
    name = loss if isinstance(loss, str) else type(loss).__name__
    if name in _SPARSE:
        options = loss_arguments(loss)
        num, ignored = outputs[0].shape[options.get("axis", -1)], options.get("ignore_class")
        y = y if ignored is None else y[y != ignored]
        if num is not None and y.size and not (y.min() >= 0 and y.max() < num):
            raise ValueError(f"Expected labels from 0 to {num - 1}. Received: {y.min()} to {y.max()}")
    elif name in _BINARY and not (y.min() >= 0 and y.max() <= 1):
        raise ValueError(f"Expected targets in 0..1 of a binary cross-entropy. Received: {y.min()} to {y.max()}")


def _fits(shape, expected):
    """Whether an array of this shape is a batch of that symbolic shape."""
    pairs = zip(shape[1:], expected[1:], strict=False)
    return len(shape) == len(expected) and all(None in (a, b) or a == b for a, b in pairs)


def _shown(expected):
    return f"({', '.join(['batch', *('any' if size is None else str(size) for size in expected[1:])])})"
