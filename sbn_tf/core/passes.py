"""A pass over data that adds up gradients: batches from data of any kind, the mean loss of one, finite sums."""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Iterable
from typing import Any

import keras
import numpy as np
from keras import ops
from tqdm import tqdm

from sbn_tf.core.checks import check_choice, check_count
from sbn_tf.core.gradients import check_gradients, compiled, state

__all__ = ["add_up", "batches_of", "check_options", "is_endless", "is_of_arrays", "mean_loss"]

SCORES = ("fisher", "paper", "per_example", "magnitude", "taylor", "random")


def check_options(score: str, max_batches: int | None, data, loss) -> None:
    """Raise a ValueError for wrong options of `saliency`, before any work is done."""
    check_choice("score", score, SCORES)
    if max_batches is not None:
        check_count("max_batches", max_batches)
    if score in ("magnitude", "random"):
        return
    if data is None or loss is None:
        missing = "data=None" if data is None else "loss=None, and the model is not compiled"
        raise ValueError(f"Expected data and a loss for score={score!r}. Received: {missing}")
    check_gradients(f"score={score!r}")


def add_up(gradients: Any, sums: Any, data, batch_size: int, max_batches: int | None, verbose: bool) -> int:
    """Add up the gradients of each batch of the data, in a compiled step; returns the number of examples.

    Args:
        gradients: called on a batch's parts; returns its loss and a dict key -> gradient. `missing` lists the keys
            without one, `seeds` the pairs (variable, copy) whose copies a call changes, `model` is the network.
        sums: has `totals`, a dict of variables, and `add(gradients, num_examples)`. With `score` "per_example" it gets
            the gradients of one example after another.
        data: batches of (x, y) or (x, y, sample_weight), or a tuple of arrays.
        batch_size: of a tuple of arrays.
        max_batches: stop after this many batches; None: all.
        verbose: show a progress bar.

    Raises:
        ValueError: no or endless data, a batch that does not fit, or a loss or sum that is not finite.
    """
    finite = _FiniteCheck(sums.totals)

    def step(batch, number):
        loss, found = gradients(*batch)
        sums.add(found, _num_examples(batch))
        finite.add(loss, number)

    changed = [*sums.totals.values(), finite.first, *(copy for _, copy in gradients.seeds)]
    run = compiled(step, changed, gradients.model.variables, each=sums.score == "per_example")
    batches, total = batches_of(data, batch_size, max_batches)
    num_batches = num_examples = 0
    for batch in tqdm(batches, "saliency", total, mininterval=2.0, disable=not verbose):
        batch = _checked(batch, num_batches)
        run(batch, ops.convert_to_tensor(num_batches, "int32"))
        num_batches += 1
        num_examples += int(_num_examples(batch))
        if num_batches % 50 == 0:  # a NaN is found early, and yet the device seldom waits for the host
            finite.check()
    if not num_batches:
        raise ValueError("Expected at least one batch of (x, y). Received: no data.")
    finite.check()
    if gradients.missing:
        warnings.warn(f"The loss does not depend on {gradients.missing[:5]}: their score is 0.", stacklevel=3)
    return num_examples


def is_of_arrays(data: Any) -> bool:
    """Whether data is a tuple of arrays, such as (x, y), not a tuple of batches."""
    return isinstance(data, tuple) and not all(isinstance(part, tuple) for part in data)


def is_endless(data: Any) -> bool:
    """Whether data is a `tf.data.Dataset` without end."""
    return hasattr(data, "cardinality") and int(data.cardinality()) == -1  # `tf.data.INFINITE_CARDINALITY`


def batches_of(data: Any, batch_size: int, max_batches: int | None) -> tuple[Iterable, int | None]:
    """The batches of any data, and how many there are; None where that is not known."""
    if is_of_arrays(data):
        data = _slices(data, batch_size)
    if isinstance(data, keras.utils.PyDataset):
        total = data.num_batches  # None: endless
        max_batches = min((one for one in (max_batches, total) if one), default=None)
        data = map(data.__getitem__, itertools.count())
    try:
        total = len(data)
    except TypeError:  # a generator, an endless dataset, or one that does not know its length
        total = None
        if is_endless(data) and max_batches is None:
            raise ValueError("Expected data that ends, or max_batches. Received: an endless dataset.") from None
    if max_batches is None:
        return data, total
    return itertools.islice(data, max_batches), min(max_batches, total or max_batches)


def _slices(data, batch_size):
    """Batches of a tuple of arrays, as a list of views; a list of numbers is one array."""

    def as_array(part):
        return part if part is None or ops.is_tensor(part) else np.asarray(part)

    def is_structure(part):
        return isinstance(part, dict | tuple) or (isinstance(part, list) and any(getattr(a, "ndim", 0) for a in part))

    parts = [keras.tree.map_structure(as_array, p) if is_structure(p) else as_array(p) for p in data if p is not None]
    sizes = {len(a) for a in keras.tree.flatten(parts)}
    if len(sizes) > 1:
        raise ValueError(f"Expected as many labels and weights as inputs. Received: lengths {sorted(sizes)}.")
    starts = range(0, max(sizes, default=0), batch_size)
    return [tuple(keras.tree.map_structure(lambda a, i=i: a[i : i + batch_size], parts)) for i in starts]


def _num_examples(batch):
    return ops.shape(keras.tree.flatten(batch[0])[0])[0]


def _checked(batch, number):
    """The batch as a tuple of tensors, without a sample weight of None."""
    if not isinstance(batch, tuple | list) or len(batch) not in (2, 3):
        raise ValueError(
            f"Expected data as a tuple of arrays (x, y) or (x, y, sample_weight), or batches of these. Received: "
            f"{type(batch)} in batch {number}."
        )
    batch = keras.tree.map_structure(_tensor, tuple(part for part in batch if part is not None))
    shapes = [tuple(t.shape) for t in keras.tree.flatten(batch)]
    if not all(shapes):
        raise ValueError(f"Expected batches. Received: a single number in batch {number}. Call dataset.batch(32).")
    if len({shape[0] for shape in shapes}) != 1:
        raise ValueError(f"Expected one label for each example. Received: shapes {shapes} in batch {number}.")
    return batch


def _tensor(array):
    """A tensor of the backend, also of another framework's, such as of a `tf.data.Dataset` on JAX."""
    return ops.convert_to_tensor(array if ops.is_tensor(array) else np.asarray(array))


class _NamedLoss(keras.losses.Loss):
    """A Keras loss function under the conventions of `compile`: masks, sample weights, mean."""

    def __init__(self, function, dtype):
        super().__init__(name=function.__name__, dtype=dtype)
        self.call = function


def mean_loss(loss, y: Any, y_pred: Any, sample_weight: Any = None) -> Any:
    """Mean loss of a batch, a scalar; `loss` is a Keras loss, its name, or a callable (y, y_pred) -> losses.

    A mean squared error of labels `(n,)` and outputs `(n, 1)` would be taken over n x n pairs by broadcasting, and
    would look fine. Keras's own losses therefore get labels in the shape of the outputs, or an error.
    """
    if isinstance(loss, str | dict):
        loss = keras.losses.get(loss)
        y = _fitted(getattr(loss, "__name__", type(loss).__name__), y, y_pred)
        if not isinstance(loss, keras.losses.Loss):
            loss = _NamedLoss(loss, "float64" if _dtype(y_pred) == "float64" else "float32")
    elif isinstance(loss, keras.losses.Loss) and type(loss).__module__.startswith("keras."):
        y = _fitted(type(loss).__name__, y, y_pred)
    if isinstance(loss, keras.losses.Loss):
        return ops.mean(loss(y, y_pred, sample_weight=sample_weight))
    half = ("float16", "bfloat16")
    y_pred = keras.tree.map_structure(lambda t: ops.cast(t, "float32") if _dtype(t) in half else t, y_pred)
    dtype = _dtype(keras.tree.flatten(y_pred)[0])
    y = keras.tree.map_structure(lambda t: ops.cast(t, dtype) if keras.backend.is_float_dtype(t.dtype) else t, y)
    values = ops.convert_to_tensor(loss(y, y_pred))
    if sample_weight is not None:
        if not len(values.shape):
            raise ValueError("Expected a loss for each example where data has sample weights. Received: a scalar loss.")
        values *= ops.reshape(ops.cast(sample_weight, values.dtype), [-1] + [1] * (len(values.shape) - 1))
    return ops.mean(values)


def _dtype(tensor):
    return keras.backend.standardize_dtype(tensor.dtype)


def _fitted(name, y, y_pred):
    """Labels in the shape that Keras's loss of this name needs: class numbers for a sparse one, else the outputs'."""
    name = name.lower().replace("_", "")
    if not (ops.is_tensor(y) and ops.is_tensor(y_pred)) or "ctc" in name or "generalized" in name:
        return y
    shape = tuple(y_pred.shape)
    if "sparse" in name:
        fits = any(_agree(tuple(y.shape), s) for s in (shape[:-1], (*shape[:-1], 1)))
    else:
        if len(y.shape) == len(shape) - 1 and shape[-1] == 1:
            y = y[..., None]
        fits = _agree(tuple(y.shape), shape)
    if not fits:
        kind, advice, given = "labels", "", tuple(y.shape)
        if "sparse" in name:
            kind = "class numbers, without a class axis,"
            if _agree(given, shape):
                advice = " For one-hot labels pass y.argmax(-1), or compile with categorical_crossentropy."
        elif "categorical" in name and given == shape[:-1]:
            advice = " For class numbers compile with sparse_categorical_crossentropy."
        if given[:1] == shape[:1]:  # the batch is not what differs, and not the user's
            shape, given = (str(("batch", *one[1:])).replace("'", "") for one in (shape, given))
        raise ValueError(f"Expected {kind} that fit the outputs {shape}. Received: labels {given}.{advice}")
    return y


def _agree(shape, other):
    """Whether two shapes can be the same; None is a size that is not known."""
    return len(shape) == len(other) and all(a == b or None in (a, b) for a, b in zip(shape, other, strict=True))


class _FiniteCheck:
    """Which batch was the first whose loss or sums are not finite. It stays on the device until it is asked."""

    def __init__(self, totals):
        self.totals = totals
        self.first = state(np.full(1 + len(totals), -1, "int32"))

    def add(self, loss, number):
        values = [ops.cast(loss, "float32"), *map(ops.sum, self.totals.values())]
        first, finite = ops.convert_to_tensor(self.first), ops.isfinite(ops.stack(values))
        self.first.assign(ops.where((first < 0) & ~finite, number, first))

    def check(self):
        first = ops.convert_to_numpy(self.first)
        if (first < 0).all():
            return
        number = first[first >= 0].min()
        if first[0] == number:
            raise ValueError(f"Expected a finite loss. Received: NaN or infinity in batch {number}. Check the inputs.")
        keys = [key for key, batch in zip(self.totals, first[1:], strict=True) if batch == number]
        raise ValueError(f"Gradients of {keys[:3]} are not finite in batch {number}. Check the loss there.")
