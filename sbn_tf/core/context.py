"""What a call of a masked layer has to know: which draw it belongs to, or that it shall use the posterior means.

Context variables carry it, so the layers keep the signature of their stock layers.
"""

from __future__ import annotations

import contextlib
import contextvars
from collections.abc import Callable, Collection, Hashable, Iterable, Iterator
from typing import Any

import keras

from sbn_tf.core.checks import check_choice, check_count

if keras.backend.backend() == "tensorflow":
    import tensorflow as tf

__all__ = [
    "BatchDraws",
    "batch_draws",
    "computed_once",
    "current_batch",
    "current_graph",
    "current_sample",
    "drawn_weight",
    "is_at_mean",
    "is_one_step",
    "kept_draw",
    "once",
    "posterior_mean",
    "posterior_sample",
    "recorded_draws",
    "weights_drawn",
]

_drawn: contextvars.ContextVar[dict] = contextvars.ContextVar("sbn_tf_drawn", default={})  # noqa: B039
_at_mean: contextvars.ContextVar[bool] = contextvars.ContextVar("sbn_tf_at_mean", default=False)
_kept: contextvars.ContextVar[dict | None] = contextvars.ContextVar("sbn_tf_kept", default=None)
_once: contextvars.ContextVar[dict | None] = contextvars.ContextVar("sbn_tf_once", default=None)
_sample: contextvars.ContextVar[Any] = contextvars.ContextVar("sbn_tf_sample", default=None)

KINDS = ("split", "flipout", "local")


class BatchDraws:
    """What one `batch_draws` context keeps: how calls draw, and what each layer has drawn in it.

    Args:
        how: "split", "flipout" or "local".
        num_samples: number of contiguous parts into which "split" cuts the batch. >= 1.
        shared: layers that the network uses more than once: "local" does not fit them, and is flipout there.
    """

    def __init__(self, how: str, num_samples: int, shared: Iterable[keras.layers.Layer] = ()):
        check_choice("how", how, KINDS)
        check_count("num_samples", num_samples)
        self.how, self.num_samples = how, num_samples
        self.shared = {id(layer) for layer in shared}
        self._kept: dict[Hashable, Any] = {}

    def keep(self, key: Hashable, make: Callable[[], Any]) -> Any:
        """What `make()` returned at the first call with this key."""
        if key not in self._kept:
            self._kept[key] = make()
        return self._kept[key]

    def holds(self, key: Hashable) -> bool:
        """Whether something is kept under this key."""
        return key in self._kept


_batch: contextvars.ContextVar[BatchDraws | None] = contextvars.ContextVar("sbn_tf_batch", default=None)


@contextlib.contextmanager
def posterior_sample(sample=None, fixed: dict | None = None) -> Iterator[None]:
    """Within this context each masked weight is drawn once: a layer used twice has the same weight both times.

    Outside it every call makes a new draw. In a loop that TensorFlow itself traces (`tf.while_loop`) the draw is the
    loop's.

    Args:
        sample: number of the draw, an int or an integer tensor, >= 0: of a posterior of M members, draw s is member
            s modulo M. None: a member at random. Other posteriors ignore it.
        fixed: (id of the layer's posteriors, name of the weight) -> array that is its draw, see `recorded_draws`.
    """
    kept, batch, number = _kept.set(dict(fixed or {})), _batch.set(None), _sample.set(sample)
    try:
        yield
    finally:
        _kept.reset(kept)
        _batch.reset(batch)
        _sample.reset(number)


def recorded_draws(call: Callable[[], Any], sample: int) -> dict:
    """What `posterior_sample(sample)` drew of each weight while `call` ran eagerly, as its `fixed` takes it."""
    with posterior_sample(sample):
        call()
        return {key[:2]: keras.ops.convert_to_numpy(draw) for key, draw in (_kept.get() or {}).items()}


@contextlib.contextmanager
def posterior_mean() -> Iterator[None]:
    """Within this context each masked weight is its loc: calls are deterministic.

    It acts while a call is traced: use it around `model(x)`, not around `model.predict(x)`, whose compiled function
    may have been traced before.
    """
    token = _at_mean.set(True)
    try:
        yield
    finally:
        _at_mean.reset(token)


@contextlib.contextmanager
def batch_draws(how: str, num_samples: int = 5, shared: Collection[keras.layers.Layer] = ()) -> Iterator[None]:
    """Within this context one call of a network on a batch uses several draws, at about the cost of one.

    Axis 0 of every masked layer's inputs must be the batch, in the same order throughout the network.

    Args:
        how: "split": draw s serves part s of the batch, the rows from s * B // S to (s + 1) * B // S. "flipout": every
            example sees a draw of its own, one noise times random signs. "local": each output of a `Dense` on (batch,
            features) has noise of its own, exact in mean and variance; flipout elsewhere. A layer that is not linear in
            one kernel (separable, wrapped) splits under all three. Only Gaussian posteriors allow the last two.
        num_samples: number of parts S. >= 1.
        shared: layers that the network uses twice: "local" draws them by flipout; a second use of any other is an
            error there. Within one context a layer's draws, and signs, are the same at each use.

    With the same seeds, "split" returns what S calls on the parts return, each within `posterior_sample`.
    """
    tokens = _batch.set(BatchDraws(how, num_samples, shared)), _kept.set(None)
    try:
        yield
    finally:
        _batch.reset(tokens[0])
        _kept.reset(tokens[1])


@contextlib.contextmanager
def weights_drawn(layer: keras.layers.Layer, drawn: dict) -> Iterator[None]:
    """Within this context `layer` reads the weights `drawn` (name -> tensor) instead of its locs."""
    token = _drawn.set({**_drawn.get(), **{(id(layer), name): value for name, value in drawn.items()}})
    try:
        yield
    finally:
        _drawn.reset(token)


def drawn_weight(layer: keras.layers.Layer, name: str):
    """The draw that `layer` reads for its weight `name` now; None outside `weights_drawn`."""
    return _drawn.get().get((id(layer), name))


def kept_draw(layer: keras.layers.Layer, name: str, make: Callable[[], Any]) -> Any:
    """A new draw, `make()`, or the one that `posterior_sample` keeps for this weight."""
    kept = _kept.get()
    if kept is None:
        return make()
    if (id(layer), name) in kept:
        return keras.ops.convert_to_tensor(kept[id(layer), name])  # a constant of the graph that is traced
    key = (id(layer), name, current_graph())  # a tensor made within a traced loop is unknown outside it
    if key not in kept:
        kept[key] = make()
    return kept[key]


@contextlib.contextmanager
def computed_once() -> Iterator[None]:
    """Within this context `once` computes each thing once, on TensorFlow, in each graph that it traces.

    For one training step, up to the optimiser's update: what is kept does not follow it. In an eager step it stays in
    memory until then.
    """
    token = _once.set({} if keras.backend.backend() == "tensorflow" else None)
    try:
        yield
    finally:
        _once.reset(token)


def once(owner: keras.layers.Layer, name: str, make: Callable[[], Any]) -> Any:
    """`make()`, or within `computed_once` what it returned before for this owner, name and graph.

    On JAX and torch it is computed each time: JAX's compiler merges equal operations itself.
    """
    kept = _once.get()
    if kept is None:
        return make()
    key = (id(owner), name, current_graph())  # a tensor made within a traced loop is unknown outside it
    if key not in kept:
        kept[key] = make()
    return kept[key]


def is_one_step() -> bool:
    """Whether `once` keeps what it computes now."""
    return _once.get() is not None


def is_at_mean() -> bool:
    """Whether this is within `posterior_mean`."""
    return _at_mean.get()


def current_sample():
    """Number of the draw, as `posterior_sample` was given it; None elsewhere."""
    return _sample.get()


def current_batch() -> BatchDraws | None:
    """The `BatchDraws` of the innermost `batch_draws`; None elsewhere."""
    return _batch.get()


def current_graph() -> int | None:
    """Id of the TensorFlow graph that is being traced; None where there is none."""
    if keras.backend.backend() != "tensorflow" or tf.executing_eagerly():
        return None
    return id(tf.compat.v1.get_default_graph())
