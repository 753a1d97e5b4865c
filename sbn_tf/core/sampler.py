"""Runs several draws of a network for one batch, one after another, in one compiled call."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import keras
import numpy as np
from keras import ops

from sbn_tf.core.context import current_graph, posterior_sample
from sbn_tf.core.keras_internals import current_values, in_stateless_scope
from sbn_tf.core.outputs import names_of_outputs
from sbn_tf.core.replicas import Distributed

if keras.backend.backend() == "tensorflow":
    import tensorflow as tf

__all__ = ["Sampler", "one_after_another", "one_draw"]

SLICE = 256  # images, at least: of a prediction that is put together slice by slice


class Sampler(Distributed):
    """Runs S draws of a `SampledModel`'s network for one batch, in one compiled call."""

    def __init__(self, model, kind, num_samples):
        super().__init__(name=f"{kind}_of_{num_samples}")
        self.model, self.kind, self.num_samples = model, kind, num_samples  # tracked: JAX passes its variables
        if kind == "one":  # the number of its draw
            self.number = self.add_weight(name="number", shape=(), dtype="int32", initializer="zeros", trainable=False)
        self.built = True

    def by_slices(self, x, batch_size, verbose):
        """`predict`; of arrays slice by slice into results made once, where Keras holds 3.5 times the results."""
        leaves, size = keras.tree.flatten(x), batch_size or 32
        step = size * -(-SLICE // size)
        lengths = {len(leaf) for leaf in leaves} if all(isinstance(leaf, np.ndarray) for leaf in leaves) else set()
        count = lengths.pop() if len(lengths) == 1 else 0  # Keras says what is wrong with others
        if count <= step:
            return self.predict(x, batch_size=batch_size, verbose=verbose)
        bar, results = keras.utils.Progbar(count, verbose=1 if verbose == "auto" else int(verbose)), None
        for start in range(0, count, step):
            part = keras.tree.map_structure(lambda a, start=start: a[start : start + step], x)
            found = self.predict(part, batch_size=batch_size, verbose=0)
            if results is None:
                results = keras.tree.map_structure(lambda a: np.empty((count, *a.shape[1:]), a.dtype), found)
            for whole, piece in zip(keras.tree.flatten(results), keras.tree.flatten(found), strict=True):
                whole[start : start + step] = piece
            bar.update(min(start + step, count))
        return results

    def call(self, inputs):
        """The samples, or what follows from their sums."""
        with self.model.graph.sharing():
            if self.kind == "one":
                return self._draw(inputs, ops.convert_to_tensor(self.number))
            return self._array(inputs) if self.kind == "samples" else self._sums(inputs)

    def _array(self, inputs):
        """The samples' outputs: (batch, samples, ...)."""
        first, (start, write, whole) = self._draw(inputs, 0), _rows_written_once(self.num_samples)

        def step(i, state):
            rows = zip(state, keras.tree.flatten(self._draw(inputs, i)), strict=True)
            return [write(written, i, x) for written, x in rows]

        state = [start(x) for x in keras.tree.flatten(first)]
        state = one_after_another(step, state, 1, self.num_samples, self.model.network.non_trainable_variables)
        return keras.tree.pack_sequence_as(first, [ops.moveaxis(whole(rows), 0, 1) for rows in state])

    def _sums(self, inputs):
        """Mean and entropies by running sums: no (samples, batch, ...) array."""
        outputs, first = self.model.outputs_of_samples, self._draw(inputs, 0)
        start = keras.tree.flatten(first)

        def terms(drawn):
            return [*keras.tree.flatten(drawn), *outputs.spreads(drawn, start)]

        def add(i, state):
            return [total + x for total, x in zip(state, terms(self._draw(inputs, i)), strict=True)]

        sums = one_after_another(add, terms(first), 1, self.num_samples, self.model.network.non_trainable_variables)
        means = [total / self.num_samples for total in sums]
        results = outputs.uncertainties(means[: len(start)], means[len(start) :], start)
        if len(results) == 1:
            return results[0]
        if self.kind == "served":  # a signature has no structure: "name_mean", ...
            named = zip(names_of_outputs(self.model.network), results, strict=True)
            return {f"{name}_{key}": value for name, result in named for key, value in result.items()}
        return keras.tree.pack_sequence_as(first, results)

    def _draw(self, inputs, sample):
        return self.model.outputs_of_samples.as_probabilities(one_draw(self.model.network, inputs, False, sample))


def one_draw(network: keras.Model, inputs: Any, training: bool, sample: Any) -> Any:
    """The network's outputs for draw number `sample` of its weights."""
    with posterior_sample(sample):
        return network(inputs, training=training)


def _rows_written_once(count):
    """`rows = start(row 0)`, `rows = write(rows, i, row)`, `whole(rows)`: of (count, ...), each row written once.

    TensorFlow's scatter and its XLA slice update copy the whole array at each step of a loop: count times count rows.
    """
    if keras.backend.backend() != "tensorflow":  # JAX updates in place
        return (
            lambda row: ops.repeat(row[None], count, axis=0),
            lambda rows, i, row: ops.slice_update(rows, (i, *(0 for _ in row.shape)), row[None]),
            lambda rows: rows,
        )
    return (
        lambda row: tf.TensorArray(row.dtype, count).write(0, row),
        lambda rows, i, row: rows.write(i, row),
        lambda rows: rows.stack(),
    )


def one_after_another(step: Callable, state: list, start: int, stop: int, variables: Iterable = ()) -> list:
    """`state = step(i, state)` for i from `start` to `stop` - 1, one at a time, in a TensorFlow graph too.

    An unrolled loop would run its steps at once wherever their results do not depend on each other, and hold the
    memory of all. JAX would compile each of them.

    Args:
        variables: those that a step may assign to, as the states of noise seeds: a compiled loop of JAX carries them.
    """
    if keras.backend.backend() == "jax" and in_stateless_scope() and stop - start > 1:
        return _carried_loop(step, state, start, stop, list(variables))
    if current_graph() is None or stop - start < 2:
        for i in range(start, stop):
            state = step(i, state)
        return state
    return list(
        ops.while_loop(
            lambda i, *_: i < stop, lambda i, *state: (i + 1, *step(i, list(state))), (start, *state), stop - start
        )[1:]
    )


def _carried_loop(step, state, start, stop, variables):
    """`one_after_another` in a compiled function of JAX, where nothing made within a loop may be left in a variable."""

    def values():
        return current_values(variables)

    def assign(carried):
        for variable, value in zip(variables, carried, strict=True):
            variable.assign(value)

    def body(i, carried):
        assign(carried[0])
        after = step(i, carried[1])
        return values(), after

    carried, state = ops.fori_loop(start, stop, body, (values(), state))
    assign(carried)
    return state
