"""What a pass over data needs of the backend: variables that add up, a compiled step, gradients of a loss.

On TensorFlow the lesson on saliency takes the gradients, by `GradientTape`. On JAX `jax.value_and_grad` takes them
here, on torch its autograd; the scores are the same.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import keras
import numpy as np
from keras import ops

BACKEND = keras.backend.backend()
if BACKEND == "tensorflow":
    import tensorflow as tf
elif BACKEND == "jax":
    import jax
elif BACKEND == "torch":
    import torch

__all__ = ["add_scaled", "check_gradients", "compiled", "dense", "seed_copies", "state", "value_and_gradients", "zeros"]


def check_gradients(what: str) -> None:
    """Raise a ValueError unless Keras runs on TensorFlow, JAX or torch."""
    if BACKEND not in ("tensorflow", "jax", "torch"):
        raise ValueError(
            f"Expected Keras on TensorFlow, JAX or torch, which take gradients, for {what}. Received: "
            f"KERAS_BACKEND={BACKEND}. There make and save the masks, here Masks.load(path)."
        )


def state(value: Any, **options) -> Any:
    """A `tf.Variable` (with these options) or `keras.Variable` that starts as a copy of an array or tensor."""
    if BACKEND == "tensorflow":
        return tf.Variable(value, **{"trainable": False, **options})
    dtype = keras.backend.standardize_dtype(value.dtype)
    copy = np.array(ops.convert_to_numpy(value))  # torch would share the memory of a weight
    return keras.Variable(copy, trainable=False, dtype=dtype)


def zeros(shape: tuple, **options) -> Any:
    """A float32 `state` of zeros."""
    return state(np.zeros(shape, "float32"), **options)


def seed_copies(model: keras.Model) -> list[tuple]:
    """Pairs (variable, its copy as a `state`) of what a model has beside its weights: the seeds of its layers."""
    of_weights = {id(variable) for variable in model.weights}
    return [(v, state(v.value)) for v in model.variables if id(v) not in of_weights]


def add_scaled(total: Any, factor: Any, values: Any) -> None:
    """`total += factor * values` for a float32 `state`; on TensorFlow in one pass over memory."""
    if BACKEND == "tensorflow":
        tf.raw_ops.ResourceApplyGradientDescent(var=total.handle, alpha=-tf.cast(factor, "float32"), delta=values)
    else:
        total.assign(total + ops.cast(factor, "float32") * values)


def dense(gradient: Any) -> Any:
    """A gradient as a float32 tensor; that of an embedding is a list of rows on TensorFlow."""
    return ops.cast(tf.convert_to_tensor(gradient) if BACKEND == "tensorflow" else gradient, "float32")


def compiled(step: Callable, changed: list, read: list, each: bool) -> Callable:
    """`step(batch, number)` as a compiled function; on torch it runs as it is.

    Args:
        step: called on a batch's parts, a structure of tensors, and its number, an int32 scalar.
        changed: the `state`s that it assigns to, all of them.
        read: other variables that it reads: weights of a network.
        each: call it for one example after another, as batches of one.
    """
    if BACKEND == "tensorflow":
        return tf.function(_looped(step) if each else step, autograph=False, reduce_retracing=True)
    run = _jitted(step, changed, read) if BACKEND == "jax" else step

    def of_each(batch, number):
        for i in range(len(keras.tree.flatten(batch)[0])):
            run(keras.tree.map_structure(lambda t, i=i: t[i : i + 1], batch), number)

    return of_each if each else run


def _looped(step):
    """A loop over the examples that TensorFlow compiles."""

    def of_each(batch, number):
        def one(i):
            step(keras.tree.map_structure(lambda t: t[i][None], batch), number)
            return i + 1

        count = tf.shape(keras.tree.flatten(batch)[0])[0]
        return tf.while_loop(lambda i: i < count, one, [0], parallel_iterations=1)

    return of_each


def _jitted(step, changed, read):
    """JAX compiles pure functions: the variables' values go in, and the changed ones come out."""

    @jax.jit
    def pure(values, of_read, batch, number):
        with keras.StatelessScope([*zip(changed, values, strict=True), *zip(read, of_read, strict=True)]) as scope:
            step(batch, number)
        return [scope.get_current_value(variable) for variable in changed]

    def run(batch, number):
        found = pure([v.value for v in changed], [v.value for v in read], batch, number)
        for variable, value in zip(changed, found, strict=True):
            variable.assign(value)

    return run


def value_and_gradients(loss_of: Callable, variables: dict, others: list, by_tape: Callable) -> tuple:
    """Loss of one batch, what comes with it, and its gradients.

    Args:
        loss_of: called with pairs (variable, value), the values that stand for the variables; returns a scalar loss and
            a list of other tensors.
        variables: key -> `keras.Variable` of which the gradients are taken.
        others: all variables that the loss reads.
        by_tape: called with `loss_of` and `variables`, it does the same on TensorFlow.

    Returns:
        `(loss, tensors, gradients)`, the last a dict key -> gradient. torch has None for a variable on which the loss
        does not depend; JAX has zeros.
    """
    if BACKEND == "tensorflow":
        return by_tape(loss_of, variables)
    fixed = [(variable, variable.value) for variable in others]
    if BACKEND == "jax":

        def function(values):
            return loss_of([*fixed, *((variables[key], value) for key, value in values.items())])

        (loss, tensors), found = jax.value_and_grad(function, has_aux=True)({k: v.value for k, v in variables.items()})
        return loss, tensors, found
    leaves = {key: variable.value.detach().requires_grad_() for key, variable in variables.items()}
    with torch.enable_grad():
        loss, tensors = loss_of([*fixed, *((variables[key], leaf) for key, leaf in leaves.items())])
    if not loss.requires_grad:
        return loss, tensors, dict.fromkeys(leaves)
    gradients = torch.autograd.grad(loss, list(leaves.values()), allow_unused=True)
    return loss.detach(), tensors, dict(zip(leaves, gradients, strict=True))
