"""A callback that listens to the gradients of one epoch of `fit`."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import keras
import numpy as np

from sbn_tf.core.keras_internals import optimized_variables
from sbn_tf.core.weights import eligible_weights

if keras.backend.backend() == "tensorflow":
    import tensorflow as tf

__all__ = ["EpochRecorder", "first_replica"]


class EpochRecorder(keras.callbacks.Callback):
    """Adds up the gradients of one epoch of `fit`; the model trains as it would without it.

    Each Keras training step ends in `optimizer.apply(gradients, variables)`. During the recorded epoch the model's
    optimiser is one that first hands its gradients on: before clipping, weight decay and momentum, without the loss
    scale, and of those steps only that loss scaling does not skip. The gradient of weight regularisers is subtracted.

    Args:
        make_sums: called as `make_sums(weights, **options_of_variables)`. What it returns has `totals`, a dict of
            variables, `add(gradients, num_examples)` and `scores(num_examples)`.
        epoch: "last", "every" (the last whole one counts), or an epoch's number from 0.
        include, exclude: patterns on keys, see `eligible_weights`.
    """

    def __init__(self, make_sums: Callable, *, epoch: int | str = "last", include=None, exclude=None):
        super().__init__()
        number = isinstance(epoch, int) and not isinstance(epoch, bool) and epoch >= 0
        if not number and epoch not in ("last", "every"):
            raise ValueError(f'Expected epoch "last", "every" or a number from 0. Received: epoch={epoch!r}')
        self.epoch, self.include, self.exclude = epoch, include, exclude
        self._make_sums, self._function = make_sums, None
        self._scores, self._missing = None, "no fit with this callback"

    def scores(self) -> dict[str, np.ndarray]:
        """Key -> float32 array of the weight's shape.

        Raises:
            ValueError: no epoch was recorded to its end, or a gradient was not finite.
        """
        if self._scores is None:
            raise ValueError(f"Expected an epoch recorded to its end. Received: {self._missing}.")
        bad = [key for key, values in self._scores.items() if not np.isfinite(values).all()]
        if bad:
            raise ValueError(f"Expected finite gradients in the recorded epoch. Received: NaN or infinity in {bad[:3]}")
        return self._scores

    def on_train_begin(self, logs=None):
        """Find the weights; forget an earlier fit."""
        if keras.backend.backend() != "tensorflow":
            raise ValueError(
                f"Expected Keras on TensorFlow for {type(self).__name__}, which listens to its training step. "
                f"Received: KERAS_BACKEND={keras.backend.backend()}. Call saliency(model, data) after training instead."
            )
        self._weights = eligible_weights(self.model, self.include, self.exclude)
        last = self.params["epochs"] - 1
        self._recorded = {"last": last, "every": None}.get(self.epoch, self.epoch)
        self._scores = self._function = None
        self._missing = f"training ended before epoch {0 if self._recorded is None else self._recorded}, counted from 0"

    def on_epoch_begin(self, epoch, logs=None):
        """Put the recording step in the place of the ordinary one."""
        if self._recorded not in (None, epoch):
            return
        self._scores, self._missing = None, f"epoch {epoch}, counted from 0, did not run to its end"
        if self._function is None:
            self._make_function()
        for variable in (*self._sums.totals.values(), self._num_examples, self._num_steps):
            variable.assign(tf.zeros_like(variable))
        self._iterator, self._ran_out = None, False
        self._ordinary, self.model.train_function = self.model.train_function, self._step

    def on_epoch_end(self, epoch, logs=None):
        """Take the scores, if the epoch is whole, and put the ordinary step back."""
        if self._recorded not in (None, epoch):
            return
        self.model.train_function = self._ordinary
        steps, found = self.params["steps"], int(first_replica(self._num_steps))
        if not (self._ran_out if steps is None else found >= steps):
            return
        num_examples = int(first_replica(self._num_examples))
        if not num_examples:
            self._missing = "no gradient: the model's train_step calls no optimizer.apply, or every step was skipped"
            return
        self._scores = self._sums.scores(num_examples)

    def on_train_end(self, logs=None):
        """Give the memory on the device back."""
        self._function = self._sums = self._ordinary = self._iterator = None

    def _make_function(self):
        """The training function that records, and what it adds to: one local copy for each replica."""
        options = {"trainable": False, "synchronization": tf.VariableSynchronization.ON_READ}
        options["aggregation"] = tf.VariableAggregation.ONLY_FIRST_REPLICA
        with self.model.distribute_strategy.scope():
            self._sums = self._make_sums(self._weights, **options)
            self._num_examples, self._num_steps = (tf.Variable(tf.zeros((), "int64"), **options) for _ in range(2))
        self._sizes = {}

        def train_step(data):
            x = next(t for t in keras.tree.flatten(keras.utils.unpack_x_y_sample_weight(data)[0]) if t is not None)
            self._sizes[_replica()] = tf.shape(x, out_type="int64")[0]
            self._num_steps.assign_add(1)
            return self.model.train_step(data)

        maker = _StandIn(self.model, train_step=train_step, train_function=None)
        type(self.model).make_train_function(maker, force=True)
        self._function = maker.train_function

    def _step(self, iterator):
        """One call of the training function, in which the model's optimiser hands its gradients on."""
        if self._iterator is None:
            self._iterator = iterator
        if iterator is not self._iterator:  # another fit, after an error in a callback ended the recorded one
            ordinary = self._ordinary
            self._give_up()
            return ordinary(iterator)
        try:
            with self._listening():
                return self._function(iterator)
        except (StopIteration, tf.errors.OutOfRangeError):
            self._ran_out = True
            raise
        except BaseException:
            self._give_up()
            raise

    def _give_up(self):
        """Put the ordinary step back after an error."""
        self.model.train_function = self._ordinary
        self.on_train_end()

    @contextlib.contextmanager
    def _listening(self):
        """Within it the model's optimiser hands its gradients to `_add` before it applies them."""
        optimizer = self.model.optimizer

        def apply(grads, trainable_variables=None):
            grads = list(grads)
            variables = optimized_variables(optimizer) if trainable_variables is None else list(trainable_variables)
            self._add(optimizer, grads, variables)
            return optimizer.apply(grads, variables)

        def apply_gradients(grads_and_vars):
            apply(*zip(*grads_and_vars, strict=True))
            return optimizer.iterations

        self.model.optimizer = _StandIn(optimizer, apply=apply, apply_gradients=apply_gradients)
        try:
            yield
        finally:
            self.model.optimizer = optimizer

    def _add(self, optimizer, gradients, variables):
        """Add one batch's gradients to the sums."""
        gradients = [None if g is None else tf.convert_to_tensor(g) for g in gradients]  # an embedding's become dense
        of_variable = {id(v): tf.cast(g, "float32") for v, g in zip(variables, gradients, strict=True) if g is not None}
        found = {k: of_variable[id(w.variable)] for k, w in self._weights.items() if id(w.variable) in of_variable}
        scales = isinstance(optimizer, keras.optimizers.LossScaleOptimizer)  # it skips steps that overflow
        skipped = tf.cast(~optimizer.check_finite(gradients) if scales else False, "float32")
        size, skipped, *values = _over_replicas([tf.cast(self._sizes[_replica()], "float32"), skipped, *found.values()])
        scale = optimizer.scale_loss(tf.ones(()))
        for key, gradient in zip(found, values, strict=True):
            gradient = _without_penalty(self._weights[key].variable, gradient / scale)
            found[key] = tf.where(skipped > 0, tf.zeros_like(gradient), gradient) if scales else gradient
        size = tf.where(skipped > 0, 0.0, size)
        self._num_examples.assign_add(tf.cast(size, "int64"))
        self._sums.add(found, size)


class _StandIn:
    """An object that passes for another one: some attributes are its own, all others are those of the other."""

    def __init__(self, other, **own):
        vars(self).update(own, other_object=other)

    @property  # type: ignore[misc]
    def __class__(self):  # isinstance and super() then see the other's class
        return type(self.other_object)

    def __getattr__(self, name):
        return getattr(self.other_object, name)

    def __setattr__(self, name, value):
        if name in vars(self):
            vars(self)[name] = value
        else:
            setattr(self.other_object, name, value)


def _without_penalty(variable, gradient):
    """The gradient minus that of the variable's regulariser."""
    if variable.regularizer is None:
        return gradient
    value = tf.convert_to_tensor(variable.value)
    with tf.GradientTape() as tape:
        tape.watch(value)
        penalty = variable.regularizer(value)
    return gradient - tf.cast(tape.gradient(penalty, value), gradient.dtype)


def _over_replicas(values):
    """Sums over the replicas, all of one dtype in one call: several collectives may run in another order elsewhere."""
    if tf.distribute.get_strategy().num_replicas_in_sync == 1:
        return values
    return tf.distribute.get_replica_context().all_reduce(tf.distribute.ReduceOp.SUM, values)


def _replica():
    return int(tf.get_static_value(tf.distribute.get_replica_context().replica_id_in_sync_group))


def first_replica(variable: Any) -> np.ndarray:
    """The value of a variable, or of its copy on the first replica of this process."""
    if keras.backend.backend() != "tensorflow":
        return keras.ops.convert_to_numpy(variable)
    return tf.distribute.get_strategy().experimental_local_results(variable)[0].numpy()
