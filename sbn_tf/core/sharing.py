"""Running a network for several posterior draws: what no draw changes runs once, the rest one draw after another."""

from __future__ import annotations

import contextlib
import contextvars
from collections.abc import Iterable, Iterator

import keras
from keras import ops

from sbn_tf.core.context import current_graph
from sbn_tf.core.keras_internals import added_losses, current_values, in_stateless_scope, run_operations_by

__all__ = ["Shared", "one_after_another", "sharing"]


class Shared:
    """What has run once: the results of each use of an operation, and the losses that it added.

    A use is known by its path: the ids of the nodes of the nested models around it, then that of its own node.

    Args:
        once: paths of the uses that run once.
    """

    def __init__(self, once: set[tuple[int, ...]]):
        self.once, self.results, self.losses, self.path = once, {}, set(), ()


_shared: contextvars.ContextVar[Shared | None] = contextvars.ContextVar("sbn_tf_shared", default=None)


@contextlib.contextmanager
def sharing(functionals: Iterable, shared: Shared) -> Iterator[set[int]]:
    """Within it these Functional models take results from `shared`, which the first call fills.

    Yields:
        A set that fills with the ids of the losses (`add_loss`, activity regularizers) of what has run once.
    """
    for functional in functionals:
        run_operations_by(functional, _run)
    token = _shared.set(shared)
    try:
        yield shared.losses
    finally:
        _shared.reset(token)


def _run(node, operation, *args, **kwargs):
    """Outputs of one use of an operation: those of before, or those that Keras computes now."""
    shared = _shared.get()
    if shared is None:
        return operation(*args, **kwargs)
    outer = shared.path
    here = (*outer, id(node))
    if here in shared.results:
        return shared.results[here]
    before = added_losses(node.operation)
    shared.path = here
    try:
        results = operation(*args, **kwargs)
    finally:
        shared.path = outer
    if here in shared.once:
        shared.results[here] = results
        shared.losses.update(added_losses(node.operation) - before)
    return results


def one_after_another(step, state: list, start: int, stop: int, variables=()) -> list:
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
