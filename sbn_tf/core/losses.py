"""Losses of a network that runs for several draws: how many terms a loss averages over, and what layers add to it."""

from __future__ import annotations

import contextvars
import math
import weakref
from collections.abc import Mapping
from types import MappingProxyType

import keras
from keras import ops

from sbn_tf.core.keras_internals import loss_arguments, mask_of, set_mask, summed_loss
from sbn_tf.core.outputs import output_structure

__all__ = ["LossTerms", "loss_terms", "set_added_shares", "weighted_losses"]

_PER_ELEMENT = ("BinaryCrossentropy", "BinaryFocalCrossentropy", "MeanSquaredError", "MeanAbsoluteError", "Huber")
_PER_POSITION = ("CategoricalCrossentropy", "SparseCategoricalCrossentropy", "CategoricalFocalCrossentropy")


def loss_terms(loss, output_shape: tuple) -> int | None:
    """How many terms of one example `loss` averages over; None where the loss is not a known one.

    Args:
        loss: a Keras loss, its name, or any object that has `terms_per_example(output_shape)`.
        output_shape: shape of the network's output, (batch, ...).

    With these terms and beta = 1 the objective is the ELBO where the loss is a negative log-likelihood: the
    cross-entropies are; a mean squared error is one of variance 1/2, a focal loss is none.

    Raises:
        ValueError: a loss that sums over the batch, or a size left open in the output's shape.
    """
    sizes = _sizes(_loss_of(loss), output_shape)
    if sizes is None:
        return None
    if None in sizes:
        raise ValueError(f"The output's size is open: {output_shape}. Pass terms_per_example= (pixels x channels).")
    return math.prod(sizes)


class LossTerms:
    """How many terms a network's loss averages over: the same for each example, or counted in each batch.

    They are counted where the data decide: Keras divides a loss of masked outputs by what is not masked, one with an
    `ignore_class` by what is left, one that is a "mean_with_sample_weight" by the weights' sum. A size that the output
    leaves open is counted, too.

    Args:
        loss: as in `keras.Model.compile`: one loss, or a list or dict of losses.
        network: the network; its outputs' shapes and masks are read.

    Attributes:
        known: terms of one example by the shape alone; None if unknown, open, or unequal between outputs.
        by_data: the data decide, as far as loss and network show it before the first batch.
        is_open: the outputs have open sizes: there is no `known`, and each batch can be counted.

    Raises:
        ValueError: a loss that sums over the batch.
    """

    def __init__(self, loss, network: keras.Model):
        outputs, self._network = keras.tree.flatten(network.outputs), network
        self._losses = [one and _loss_of(one) for one in _by_output(loss, network) or ()]
        pairs = [(one, out) for one, out in zip(self._losses, outputs, strict=False) if one is not None]
        sizes = [_sizes(one, tuple(out.shape)) for one, out in pairs]
        self.is_open = bool(sizes) and all(size is not None and None in size for size in sizes)
        known = {None if size is None or None in size else math.prod(size) for size in sizes}
        self.known = known.pop() if len(known) == 1 else None
        self.by_data = any(mask_of(out) is not None or _excludes(one) for one, out in pairs)

    def of_batch(self, y, outputs, sample_weight):
        """How many terms Keras divides this batch's loss by, a float32 scalar; None where they are `known`.

        Of several outputs their mean.

        Args:
            y: targets, in a structure that Keras takes.
            outputs: of the network, with their masks.
            sample_weight: None, weights of all outputs, or a structure of them.
        """
        outputs = keras.tree.flatten(outputs)
        masked = any(mask_of(out) is not None for out in outputs)
        weighted = sample_weight is not None and any(map(_by_weight, self._losses))
        if not (masked or weighted or self.is_open or any(map(_excludes, self._losses))):
            return None
        targets, weights = (_by_output(one, self._network, self._losses) for one in (y, sample_weight))
        if targets is None or weights is None:
            raise ValueError(
                "Expected targets and sample weights in the outputs' structure, to count the terms of this loss. "
                f"Received: {type(y).__name__}, {type(sample_weight).__name__}. Pass terms_per_example= instead."
            )
        rows = zip(self._losses, targets, outputs, weights, strict=True)
        found = [_counted(*row) for row in rows if row[0] is not None]
        return sum(found[1:], found[0]) / len(found)


class _Ones(keras.losses.Loss):
    """The sum of a 1 for each value of a loss, masks and weights as Keras applies them: what its mean divides by."""

    def __init__(self, loss):
        super().__init__("terms", "sum", "float32")
        self.loss, self.shape, self.masked = loss, None, False

    def call(self, y_true, y_pred):
        """Ones, with the mask that the loss gives its values."""
        values = getattr(self.loss, "call", self.loss)(y_true, y_pred)
        ones = ops.ones_like(values)
        self.shape, self.masked = ops.shape(values), mask_of(values) is not None
        if self.masked:
            set_mask(ones, mask_of(values))
        return ones


def _counted(loss, y, output, weight):
    """Terms of a batch of one output, a float32 scalar."""
    ones, weight = _Ones(loss), weight if _by_weight(loss) else None
    values = ones(y, output, weight)  # that the mean is one of
    if weight is not None and not ones.masked and mask_of(output) is None:
        values = ops.sum(ops.cast(weight, "float32"))  # as they are given, also where Keras broadcasts them
    sizes, shape = _sizes(loss, tuple(output.shape)), ops.shape(output)
    if None in sizes:
        terms = [shape[_axis(loss)]] if _name(loss) in _PER_ELEMENT else []
    else:
        terms, values = sizes, values / _product(ones.shape[1:])
    return values * _product(terms)


def _product(sizes):
    if all(isinstance(size, int) for size in sizes):
        return math.prod(sizes)
    return ops.prod(ops.cast(ops.stack(sizes), "float32"))


def _loss_of(loss):
    """The loss that Keras makes of a name, a config or one of its own functions."""
    loss = keras.losses.get(loss) if isinstance(loss, str | dict) else loss
    is_keras = getattr(keras.losses, getattr(loss, "__name__", ""), None) is loss
    return getattr(keras.losses, _name(loss))() if is_keras and _name(loss) in _PER_ELEMENT + _PER_POSITION else loss


def _name(loss):
    name = type(loss).__name__ if isinstance(loss, keras.losses.Loss) else getattr(loss, "__name__", "")
    return name if name[:1].isupper() else "".join(part.title() for part in name.split("_"))


def _axis(loss):
    """The axis of the classes, or the one over which each value is a mean."""
    return loss_arguments(loss).get("axis", -1)


def _excludes(loss):
    """Whether a loss says that it leaves terms out."""
    return loss_arguments(loss).get("ignore_class") is not None


def _by_weight(loss):
    return getattr(loss, "reduction", None) == "mean_with_sample_weight"


def _sizes(loss, output_shape):
    """Sizes whose product are the terms of one example, None where they are open; None of an unknown loss."""
    if hasattr(loss, "terms_per_example"):
        return (int(loss.terms_per_example(output_shape)),)
    if getattr(loss, "reduction", "mean") not in ("sum_over_batch_size", "mean", "mean_with_sample_weight"):
        raise ValueError(
            f'Expected a loss that averages over the batch. Received: {_name(loss)} with reduction="{loss.reduction}".'
        )
    if _name(loss) in _PER_ELEMENT:
        return output_shape[1:]
    if _name(loss) in _PER_POSITION:
        classes = _axis(loss) % len(output_shape)
        return tuple(size for axis, size in enumerate(output_shape) if axis not in (0, classes))
    return None


def _by_output(values, network, losses=()):
    """Losses, targets or weights, as Keras takes them, one for each output; None where they are another number.

    One is for all outputs; a list may be of those outputs alone that have one of `losses`.
    """
    count = len(keras.tree.flatten(network.outputs))
    if isinstance(values, dict) and "class_name" not in values:
        structure = output_structure(network)
        keys = sorted(structure) if isinstance(structure, dict) else network.output_names
        return [values.get(key) for key in keys]
    if not isinstance(values, list | tuple):
        return [values] * count
    given = iter(values)
    if len(values) == sum(one is not None for one in losses):
        return [None if one is None else next(given) for one in losses]
    return list(values) if len(values) == count else None


# By model, of its latest call: the share of each added loss by id, and of all others. Replicas run in threads.
_added: contextvars.ContextVar[Mapping] = contextvars.ContextVar("sbn_tf_added", default=MappingProxyType({}))


def set_added_shares(model: keras.Model, shares: dict, share) -> None:
    """Note what an added loss (`add_loss`, activity regularizers) of this call counts for.

    Args:
        shares: id of a loss -> its factor.
        share: factor of all others.
    """
    _added.set(weakref.WeakKeyDictionary({**_added.get(), model: (shares, share)}))


def weighted_losses(model: keras.Model) -> list:
    """The regularizers and KLs of a model, once each, and what its layers added, by its share of the samples."""
    shares, share = _added.get().get(model, ({}, 1.0))
    losses = model.losses
    first = len(losses) - sum(variable.regularizer is not None for variable in model.trainable_weights)
    found = []
    for i, loss in enumerate(losses):  # first those of activity regularizers and add_loss, then the regularizers
        loss, factor = summed_loss(model, loss), shares.get(id(loss), share) if i < first else 1.0
        found.append(loss if i >= first else loss * ops.cast(factor, loss.dtype))
    return found
