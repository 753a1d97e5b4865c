"""Running a network for several posterior draws: what no draw changes runs once."""

from __future__ import annotations

import contextlib
import contextvars
import functools
from collections.abc import Callable, Iterable, Iterator

import keras

from sbn_tf.core.keras_internals import added_losses, nodes_in_order, run_graph_by

__all__ = ["Shared", "run_operations_by", "sharing"]


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


def run_operations_by(functional: keras.Model, run: Callable) -> None:
    """From now on `run(node, operation, *args, **kwargs)` runs each operation of this Functional model.

    `operation(*args, **kwargs)` is what Keras would do. Setting it again has no effect.
    """

    def through_graph(ordinary, inputs, operation_fn=lambda operation: operation, call_fn=None):
        if call_fn is not None:  # `clone_model`
            return ordinary(inputs, operation_fn, call_fn)
        nodes = iter(nodes_in_order(functional))

        def intercepted(operation):
            node = next(node for node in nodes if node.operation is operation)
            return functools.partial(run, node, operation_fn(operation))

        return ordinary(inputs, intercepted)

    run_graph_by(functional, through_graph)


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
