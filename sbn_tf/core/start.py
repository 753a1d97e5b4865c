"""How training of the posterior starts: from the trained network's own settings, guarded against ruining it."""

from __future__ import annotations

import importlib.util
import math
import warnings
from collections.abc import Iterator
from typing import Any

import keras
import numpy as np
from keras import ops

from sbn_tf.core.batch_norm import batch_norms, warn_of_lag
from sbn_tf.core.checks import check_count
from sbn_tf.core.context import posterior_mean, posterior_sample
from sbn_tf.core.examples import check_examples
from sbn_tf.core.keras_internals import compile_arguments, compiled_loss, noise_states
from sbn_tf.core.optimizers import LocScaleOptimizer
from sbn_tf.core.passes import is_endless, is_of_arrays
from sbn_tf.layers import masked_layers

__all__ = ["Guard", "Start", "WatchedData", "check_callbacks", "is_far_worse", "narrow_scales"]

_NUM_PROBED = 32  # examples on which draws are compared with the trained network, at most
_NUM_DRAWS = 3  # draws of the posterior that are averaged there
_MOST_TRIALS = 10  # of narrower scales at the start
# Of the trained network's learning rate: its weights are near their optimum. Batch norm with frozen statistics does not
# take up what a step changes before it (`benchmarks/first_epoch.py`: at a tenth MobileNetV3 lost 12 and 33 points).
LOC_RATE, LOC_RATE_BESIDE_FROZEN_NORM = 0.1, 0.01


class WatchedData:
    """Data whose examples are counted as batches pass, and of which the first ones are kept.

    Args:
        data: a tuple of arrays, a finite `tf.data.Dataset` or an iterable of batches; of other data nothing is known.
        model, loss: which the arrays have to fit; a loss of None is the model's own.

    Raises:
        ValueError: arrays that do not fit, or a function instead of what it returns.

    Attributes:
        data: what to pass on instead of the data.
        count: examples seen; None if not known.
        first: (x, y) of a few examples as NumPy arrays; None if not known.
    """

    def __init__(self, data, model: keras.Model, loss: Any = None):
        if data is not None and (callable(data) or not (hasattr(data, "__iter__") or hasattr(data, "__getitem__"))):
            called = "; call it" if callable(data) else ""
            raise ValueError(f"Expected data as (x, y) or as batches of it. Received: {type(data).__name__}{called}")
        self.data: Any = data
        self.count: int | None = None
        self.first: tuple | None = None
        self._inner: Any = None
        if is_of_arrays(data):
            check_examples(model, getattr(model, "loss", None) if loss is None else loss, *data[:2])
            self.first = _first_examples(data[0], data[1]) if len(data) > 1 else None
            self.count = len(keras.tree.flatten(data[0])[0]) if self.first is not None else None
        elif data is not None and not isinstance(data, keras.utils.PyDataset) and not is_endless(data):
            self._inner, self.data = data, self

    def checked_count(self, num_train: int | None) -> int:
        """The number of training examples: what is given, else what was counted; warns where these differ.

        Raises:
            ValueError: neither is known.
        """
        if num_train is None:
            if self.count is None:
                raise ValueError(
                    "Expected num_train=, the number of training examples. Received: none, and no data in which they "
                    "were counted (arrays, or what the saliency pass went over)."
                )
            return self.count
        check_count("num_train", num_train)
        if self.count and num_train != self.count:
            warnings.warn(
                f"num_train={num_train}, but data has {self.count} examples: the KL is {self.count / num_train:.3g} "
                "times the ELBO's. Leave num_train out, or give data of all training examples.",
                stacklevel=3,
            )
        return num_train

    def __iter__(self) -> Iterator:
        self.count = 0
        for batch in self._inner:
            if isinstance(batch, tuple | list) and len(batch) > 1:
                if self.first is None:
                    self.first = _first_examples(*batch[:2])
                shape: Any = getattr(keras.tree.flatten(batch[0])[0], "shape", ())
                self.count += int(shape[0]) if len(shape) else 0
            yield batch

    def __len__(self) -> int:
        return len(self._inner)


def _first_examples(x: Any, y: Any, most: int = _NUM_PROBED) -> tuple | None:
    """The first examples of (x, y) as NumPy arrays of their own; None of what is not dense arrays."""
    try:
        parts = keras.tree.map_structure(lambda a: np.array(a[:most]), (x, y))
    except (TypeError, ValueError, IndexError, KeyError, NotImplementedError):  # sparse, ragged, lists of numbers
        return None
    dense = all(part.ndim and part.dtype != object for part in keras.tree.flatten(parts))
    return parts if dense and y is not None else None


def narrow_scales(network: keras.Model, loss: Any, examples: tuple | None) -> None:
    """Halve the start of relative scales until draws fit a few examples about as the trained weights do.

    A tenth of a weight's size changes little in a U-Net and ruins a MobileNet (`benchmarks/first_epoch.py`), so the
    width is measured: the loss of one draw, a mean over three, may exceed that at the locs by 10 % and .03.

    Args:
        network: with Gaussian masked layers of relative scales; they change.
        loss: as called on (y, outputs), or None; examples: (x, y), or None. Without them the scales stay.
    """
    own = math.nan if loss is None or examples is None else _own_loss(network, loss, examples)
    if not math.isfinite(own):
        return
    allowed = 0.1 * abs(own) + 0.03
    for _ in range(_MOST_TRIALS):
        excess = _loss(network, loss, examples, _NUM_DRAWS) - own
        if excess <= allowed:
            break
        # Near the optimum the excess grows with the square of the width.
        halvings = math.ceil(0.5 * math.log2(excess / allowed)) if math.isfinite(excess) else 2
        for layer in masked_layers(network):
            layer.posterior_options.initial_scale /= 2**halvings
            layer.posteriors.centre()


def _own_loss(network, loss, examples):
    """At the locs; nan where these examples are not what this loss takes: there is nothing to compare."""
    try:
        return _loss(network, loss, examples, num_draws=0)
    except Exception:  # whatever a loss of the user's raises; `fit` says it
        return math.nan


def _loss(network, loss, examples, num_draws):
    """Mean loss of draws on the examples in inference mode, 0: at the locs. Noise later is the same with it."""
    x, y = examples
    seeds = noise_states(network)
    before = [np.array(ops.convert_to_numpy(seed)) for seed in seeds]
    found = []
    for sample in range(num_draws or 1):
        with posterior_sample(sample) if num_draws else posterior_mean():
            found.append(float(np.mean(ops.convert_to_numpy(loss(y, network(x, training=False))))))
    for seed, state in zip(seeds, before, strict=True):
        seed.assign(state)
    return float(np.mean(found))


def is_far_worse(drawn: float, own: float) -> bool:
    """Whether a posterior's loss on training examples exceeds twice the trained network's own plus .05, or is NaN."""
    return not drawn <= own + abs(own) + 0.05


class Guard(keras.callbacks.Callback):
    """Warns, once, if draws of the posterior fit training examples far worse than the trained network does.

    It compares the compiled loss on a few training examples, in inference mode: before training and after each of the
    first three epochs. Noise and training are the same with it and without.

    Args:
        examples: (x, y), some training examples.
    """

    def __init__(self, examples: tuple):
        super().__init__()
        self.examples = examples
        self.own: float | None = None

    def on_train_begin(self, logs=None):
        """Measure the trained network's own loss, at its first training, and that of the first draws."""
        if self.own is not None:
            return
        self.own = _own_loss(self.model.network, compiled_loss(self.model), self.examples)
        self._compare("before training", "Its scales may start too wide: give a smaller initial_scale.")

    def on_epoch_end(self, epoch, logs=None):
        """Compare again after each of the first epochs."""
        if epoch < 3:
            self._compare(f"after epoch {epoch + 1}", "Its learning rate may be too high: compile with a lower one.")

    def _compare(self, when, remedy):
        if self.own is None or not math.isfinite(self.own):
            return
        drawn = _loss(self.model.network, compiled_loss(self.model), self.examples, _NUM_DRAWS)
        if is_far_worse(drawn, self.own):
            warnings.warn(
                f"The posterior's NLL on a few training examples is {drawn:.3g} {when}; the trained network's is "
                f"{self.own:.3g}. {remedy}",
                stacklevel=2,
            )
            self.own = math.nan  # it warns once


class Start:
    """What is known of a network as it was trained, when the training of its posterior starts.

    Args:
        model: the trained `keras.Model`; None, or one that is not compiled: nothing.
        examples: (x, y) of a few training examples, on which the posterior is compared with it; None: not known.
        frozen: whether its batch norm is frozen.
    """

    def __init__(self, model: keras.Model | None = None, examples: tuple | None = None, frozen: bool = True):
        self.optimizer: Any = None
        self.settings: dict = {}
        self.examples = examples
        self.guard: Guard | None = None
        if model is None or not model.compiled:
            return
        rate = LOC_RATE_BESIDE_FROZEN_NORM if frozen and batch_norms(model) else LOC_RATE
        self.optimizer, self.settings = _gentle(model.optimizer, rate), {"loss": model.loss}
        warn_of_lag(model, compiled_loss(model), examples)
        given = compile_arguments(model)
        for key in ("loss_weights", "metrics", "weighted_metrics"):
            try:
                config = keras.saving.serialize_keras_object(given.get(key))
                self.settings[key] = keras.saving.deserialize_keras_object(config)
            except (TypeError, ValueError, NotImplementedError):  # not registered: no file could hold it, either
                warnings.warn(f"The network's {key} cannot be copied: give them to compile().", stacklevel=3)

    def filled(self, optimizer: Any, loss: Any, others: dict) -> tuple:
        """Arguments of `compile`: what is given; else the network's own optimiser, and its own loss with its metrics.

        Raises:
            ValueError: no optimiser is given, and the network's own has no learning rate that can be read.
        """
        self.guard = None  # it measures by the compiled loss
        if loss is None:
            own = {key: value for key, value in self.settings.items() if value is not None}
            loss, others = own.pop("loss", None), {**own, **others}
        if optimizer is None and isinstance(self.optimizer, str):
            raise ValueError(f"Expected compile(optimizer). Received: none, and the network's own is {self.optimizer}.")
        if optimizer is None:
            cls, config = self.optimizer or (None, {})
            optimizer = "rmsprop" if cls is None else LocScaleOptimizer(cls.from_config(dict(config)))
        return optimizer, loss, others

    def unguard(self) -> None:
        """Compare nothing in the next `fit`: its draws start far from the trained weights on purpose."""
        self.guard = Guard(())
        self.guard.own = math.nan

    def guarded(self, model: keras.Model, x: Any, y: Any, batch_size: int | None, callbacks: Any) -> Any:
        """The callbacks of `fit` with the guard, if there are examples: of the arrays, else of those known before."""
        check_callbacks(callbacks)
        if self.guard is None and compiled_loss(model) is not None:
            examples = _first_examples(x, y, min(batch_size or _NUM_PROBED, _NUM_PROBED)) if y is not None else None
            examples = self.examples if examples is None else examples
            self.guard = None if examples is None else Guard(examples)
        if self.guard is None or isinstance(callbacks, keras.callbacks.CallbackList):
            return callbacks
        return [*keras.tree.flatten(callbacks or []), self.guard]


def _gentle(optimizer, share):
    """Class and config of a network's optimiser at a share of its rate: of a schedule, of the largest it has had.

    None of no optimiser; the name of its class where no rate can be read.
    """
    optimizer = getattr(optimizer, "inner_optimizer", optimizer)  # of one that scales the loss
    if optimizer is None:
        return None
    try:
        config = optimizer.get_config()
        rate = config["learning_rate"]
        if isinstance(rate, dict):
            schedule, taken = keras.saving.deserialize_keras_object(rate), int(optimizer.iterations)
            rate = max(float(schedule(int(step))) for step in np.linspace(0, taken, 11))
        return type(optimizer), {**config, "learning_rate": share * float(rate), "loss_scale_factor": None}
    except (KeyError, TypeError, ValueError, NotImplementedError):  # several rates, a function, a schedule of no config
        return f"{type(optimizer).__name__}, whose learning rate cannot be read"


def check_callbacks(callbacks: Any) -> None:
    """Refuse a TensorBoard callback where TensorBoard is not installed: Keras fails only after the first epoch.

    Raises:
        ModuleNotFoundError: with the command that installs it.
    """
    given = keras.tree.flatten(getattr(callbacks, "callbacks", callbacks))
    wanted = any(isinstance(one, keras.callbacks.TensorBoard) for one in given)
    if wanted and importlib.util.find_spec("tensorboard") is None:
        raise ModuleNotFoundError(
            'Expected TensorBoard for keras.callbacks.TensorBoard: pip install "sbn_tf[tensorboard]". Received: none.'
        )
