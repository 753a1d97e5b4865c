"""How training of the posterior starts: from the trained network's own settings, guarded against ruining it."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator
from typing import Any

import keras
import numpy as np
from keras import ops

from sbn_tf.core.context import posterior_mean
from sbn_tf.core.keras_internals import compiled_loss
from sbn_tf.core.optimizers import LocScaleOptimizer
from sbn_tf.core.sampled import check_count
from sbn_tf.layers import masked_layers

__all__ = ["Guard", "Start", "WatchedData", "num_examples"]

NUM_PROBED = 64  # examples on which the guard compares
LOC_RATE = 0.1  # of the trained network's learning rate: its weights are at their optimum, and shall stay near it


def num_examples(data: Any) -> int | None:
    """Number of examples of a tuple of arrays; None of other data."""
    if not isinstance(data, tuple) or not data or all(isinstance(part, tuple) for part in data):
        return None
    shape = getattr(keras.tree.flatten(data[0])[0], "shape", ())
    return int(shape[0]) if shape else None


class WatchedData:
    """Data whose examples are counted as batches pass, and of which the first ones are kept.

    Args:
        data: a tuple of arrays, a finite `tf.data.Dataset` or an iterable of batches; of other data nothing is known.

    Attributes:
        data: what to pass on instead of the data.
        count: examples seen; None if not known.
        first: (x, y) of at most 64 examples; None if not known.
    """

    def __init__(self, data: Any):
        self.data, self.count, self.first = data, num_examples(data), None
        if self.count is not None:
            self._keep(data)
        elif data is not None and not isinstance(data, keras.utils.PyDataset) and not _is_endless(data):
            self.inner, self.data = data, self

    def checked_count(self, num_train: int | None) -> int:
        """The number of training examples: what is given, else what was counted; warns where these differ.

        Raises:
            ValueError: neither is known.
        """
        if num_train is None:
            if self.count is None:
                raise ValueError("Expected num_train=, the number of training examples. Received: none, and no data.")
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
        for batch in self.inner:
            if isinstance(batch, tuple | list) and len(batch) > 1:
                if self.first is None:
                    self._keep(batch)
                leaf = keras.tree.flatten(batch[0])[0]
                self.count += int(np.shape(leaf)[0]) if np.ndim(leaf) else 0
            yield batch

    def __len__(self) -> int:
        return len(self.inner)

    def _keep(self, batch):
        if len(batch) > 1:
            self.first = _first(tuple(batch[:2]))


def _is_endless(data):
    return hasattr(data, "cardinality") and int(data.cardinality()) == -1  # `tf.data.INFINITE_CARDINALITY`


class Guard(keras.callbacks.Callback):
    """Warns, once, if draws of the posterior fit training examples far worse than the trained network does.

    It compares the compiled loss on a few training examples, in inference mode: before training and after each of the
    first three epochs. Noise and training are the same with it and without.

    Args:
        examples: (x, y), some training examples.
        num_draws: draws of the posterior that are averaged.
    """

    def __init__(self, examples: tuple, num_draws: int = 3):
        super().__init__()
        self.examples, self.num_draws, self.own = examples, num_draws, None

    def on_train_begin(self, logs=None):
        """Measure the trained network's own loss, at its first training, and that of the first draws."""
        if self.own is None:
            self.own = self._loss(mean=True)
            self._compare(
                "before training", "initial scale", "initial_scale, or none: it is then a tenth of each weight"
            )

    def on_epoch_end(self, epoch, logs=None):
        """Compare again after each of the first epochs."""
        if epoch < 3:
            self._compare(
                f"after epoch {epoch + 1}", "learning rate", "one, or none: compile() takes a tenth of its own"
            )

    def _compare(self, when, what, remedy):
        if self.own is None or not np.isfinite(self.own):
            return
        drawn = self._loss(mean=False)
        if not drawn <= 2 * self.own + 0.05:
            warnings.warn(
                f"The posterior's NLL on a few training examples is {drawn:.3g} {when}; the trained network's is "
                f"{self.own:.3g}. The {what} may be too large: give a smaller {remedy}.",
                stacklevel=2,
            )
            self.own = math.nan  # it has said so

    def _loss(self, mean):
        model, (x, y) = self.model, self.examples
        loss, network = compiled_loss(model), model.network
        if mean:
            with posterior_mean():
                return float(ops.convert_to_numpy(loss(y, network(x, training=False))))
        seeds = [layer.posteriors.noise_seed for layer in masked_layers(network)]
        states = [ops.convert_to_numpy(seed.state) for seed in seeds if seed is not None]
        found = [float(loss(y, model.one_draw(x, False, sample))) for sample in range(self.num_draws)]
        for seed, state in zip([seed for seed in seeds if seed is not None], states, strict=True):
            seed.state.assign(state)
        return sum(found) / self.num_draws


class Start:
    """What is known of a network as it was trained, when the training of its posterior starts.

    Args:
        model: the trained `keras.Model`; None, or one that is not compiled: nothing.
        examples: (x, y) of a few training examples, on which the posterior is compared with it; None: not known.
    """

    def __init__(self, model: keras.Model | None = None, examples: tuple | None = None):
        self.optimizer, self.settings = None, {}
        self.guard = None if examples is None else Guard(examples)
        if model is None or not model.compiled:
            return
        self.optimizer, self.settings = _gentle(model.optimizer), {"loss": model.loss}
        try:
            config = keras.saving.deserialize_keras_object(model.get_compile_config() or {})
        except (TypeError, ValueError):  # a loss or metric that no file can hold
            return
        self.settings |= {key: config.get(key) for key in ("loss_weights", "metrics", "weighted_metrics")}

    def filled(self, optimizer: Any, loss: Any, others: dict) -> tuple:
        """Arguments of `compile`: what is given; else the network's own optimiser, and its own loss and metrics."""
        if loss is None:
            own = {key: value for key, value in self.settings.items() if value is not None}
            loss, others = own.pop("loss", None), {**own, **others}
        if optimizer is None:
            optimizer = "rmsprop" if self.optimizer is None else LocScaleOptimizer(_made(self.optimizer))
        return optimizer, loss, others

    def guarded(self, model: keras.Model, x: Any, y: Any, callbacks: Any) -> Any:
        """The callbacks of `fit` with the guard, if there are examples: those known, or the first of some arrays."""
        if self.guard is None and y is not None and num_examples((x, y)) is not None:
            self.guard = Guard(_first((x, y)))
        if self.guard is None or compiled_loss(model) is None or isinstance(callbacks, keras.callbacks.CallbackList):
            return callbacks
        return [*keras.tree.flatten(callbacks or []), self.guard]


def _gentle(optimizer):
    """Class and config of a network's optimiser at a tenth of its rate: of a schedule, of the largest it has had."""
    optimizer = getattr(optimizer, "inner_optimizer", optimizer)  # of one that scales the loss
    if optimizer is None:
        return None
    config = optimizer.get_config()
    rate = config["learning_rate"]
    if isinstance(rate, dict):
        schedule, taken = keras.saving.deserialize_keras_object(rate), int(ops.convert_to_numpy(optimizer.iterations))
        rate = max(float(ops.convert_to_numpy(schedule(step))) for step in np.linspace(0, taken, 11).astype(int))
    return type(optimizer), {**config, "learning_rate": LOC_RATE * float(rate), "loss_scale_factor": None}


def _made(optimizer):
    cls, config = optimizer
    return cls.from_config(dict(config))


def _first(data):
    return keras.tree.map_structure(lambda a: a[:NUM_PROBED], data)
