# ---
# jupyter:
#   jupytext:
#     text_representation:
#       extension: .py
#       format_name: percent
#       format_version: '1.3'
#       jupytext_version: 1.19.6
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # Saliency: which weights deserve a distribution?
#
# **The weights whose gradients are large matter most to the loss; the top `k = round(r_bayes * n)` of them become
# Bayesian.**
#
# `r_bayes` is the share of the *eligible* entries that becomes Bayesian, 0 to 1: `n` counts the entries of trainable
# weights outside normalisation layers.
#
# Why these? The loss is most sensitive to them: the same small noise moves predictions most where it falls on them, so
# few of them suffice to make samples differ. The other side of it: what the loss feels, the data pin down, so these are
# *not* the weights that the data leave most in doubt, and an exact posterior would be narrowest here. How far samples
# differ is sensitivity times scale. That the first is what to choose by is the paper's claim, not a theorem: compare
# with `random`; [what works](../09_what_works.ipynb) does.
#
# - *You will see*: a name for every weight, one gradient pass over the training set (or none), six scores, the
#   selection by entries and by channels, where in the network it falls, and what that costs.
# - *Words*: a *weight* is, as in Keras, an array such as a kernel, an *entry* one number of it; "the salient weights"
#   or "1 % of the weights" are entries, as in the paper. A *Bayesian* entry has a distribution, a *point* has none. A
#   *mask* says which entries are Bayesian. A *sample* is the network with each Bayesian entry drawn once. Choosing
#   the entries is step 2 of the method; step 1 is the usual training, step 3 the training with distributions. More
#   words: [glossary](../../docs/glossary.md).
# - *You need*: gradients of a loss.
# - *Runs in*: 30 seconds (CPU).
#
# At a first reading take the table and the docstring of `saliency` in section 2, the docstring of the recorder (the
# third part of its class, section 3), and go on to sections 4, 7 and 8.

# %% tags=["active-ipynb"]
# import os
#
# os.environ["TF_CPP_MIN_LOG_LEVEL"] = "3"  # TensorFlow's start-up messages are no part of the lesson

# %%
"""Saliency of weights by gradients, the top-k selection, and masks."""

from __future__ import annotations

import contextlib
import fnmatch
import functools
import hashlib
import itertools
import os
import warnings
import zipfile
import zlib
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import keras
import numpy as np
from tqdm import tqdm

from sbn_tf.core.graph import Graph

if keras.backend.backend() == "tensorflow":  # elsewhere masks and selections do without
    import tensorflow as tf

__all__ = [
    "Masks",
    "SaliencyRecorder",
    "Weight",
    "biases_before_batch_norm",
    "captured",
    "check_r_bayes",
    "eligible_weights",
    "named_weights",
    "one_per_channel",
    "overlap",
    "saliency",
    "saliency_against_cost",
    "top_k",
]

SCORES = ("fisher", "paper", "per_example", "magnitude", "taylor", "random")

# %% [markdown]
# ## 1. What is a weight called?
#
# A mask must find its weight again, in this model and in its copy. Keras's own `variable.path` will not do: two nested
# models may both hold a `dense/kernel`. Ours is the way down from the model: `encoder/conv1/kernel`. A layer used twice
# is one weight, named where it is met first.


# %%
class Weight(NamedTuple):
    """A weight, the layer that owns it, and its name in the model."""

    key: str
    layer: keras.layers.Layer
    name: str
    variable: keras.Variable


def named_weights(model: keras.Model) -> dict[str, Weight]:
    """Every variable of a built model's layers by key, nested models and sublayers included, each once.

    Raises:
        ValueError: an unbuilt model, or two weights of one key.
    """
    if not getattr(model, "built", False):
        raise ValueError(f"Expected a built model (call it once on data, or give it an Input). Received: {model!r}")
    found, seen = {}, set()

    def walk(layer, path):
        for variable in layer._trainable_variables + layer._non_trainable_variables:
            if id(variable) in seen:
                continue
            seen.add(id(variable))
            key = "/".join([*path, variable.name])
            if key in found:
                raise ValueError(f"Two weights are called {key!r}. Give their layers different names.")
            found[key] = Weight(key, layer, variable.name, variable)
        for child in layer._layers:
            walk(child, [*path, child.name])

    walk(model, [])
    return found


# %% [markdown]
# Not every weight may be chosen. Normalisation layers are left out, frozen weights too, and what a pattern excludes.


# %%
def eligible_weights(
    model: keras.Model, include: str | Sequence[str] | None = None, exclude: str | Sequence[str] | None = None
) -> dict[str, Weight]:
    """Weights that may become Bayesian: trainable ones, normalisation layers left out.

    Args:
        model: built `keras.Model`.
        include, exclude: `fnmatch` patterns on keys, one or several: `"decoder*"`, `["*/bias"]`.

    Raises:
        ValueError: a pattern that matches nothing, or no weight left.
    """
    kept = {
        key: weight
        for key, weight in named_weights(model).items()
        if weight.variable.trainable
        and weight.layer.trainable
        and keras.backend.is_float_dtype(weight.variable.dtype)
        and "Normalization" not in type(weight.layer).__name__
    }
    for patterns, keep in ((include, True), (exclude, False)):
        if patterns is None:
            continue
        patterns = [patterns] if isinstance(patterns, str) else list(patterns)
        hits = {p: set(fnmatch.filter(kept, p)) for p in patterns}
        for pattern, matched in hits.items():
            if not matched:
                raise ValueError(f"No eligible weight matches {pattern!r}. Keys look like: {list(kept)[:3]}")
        matched = set().union(*hits.values()) if hits else set()
        kept = {key: weight for key, weight in kept.items() if (key in matched) == keep}
    if not kept:
        raise ValueError("No eligible weight: all are frozen, excluded or in normalisation layers.")
    return kept


# %% [markdown]
# One kind of weight is eligible and yet has nothing to say: a bias whose layer feeds a batch norm in training mode. The
# batch's mean takes it away, so the loss does not depend on it. To find it, look for each batch norm at what feeds it.


# %%
def biases_before_batch_norm(model: keras.Model) -> list[str]:
    """Keys of biases whose layer feeds a batch normalisation directly.

    In training mode such a bias has no effect (the batch mean takes it away), so its gradient is zero and a KL alone
    would shape its posterior. Padding or dropout in between keeps some effect: such a bias is not listed.
    """
    keys = {id(w.layer): w.key for w in named_weights(model).values() if w.name == "bias"}
    layers, biases = [model, *model._flatten_layers(include_self=False)], []
    outputs = {
        id(t) for layer in layers if isinstance(layer, keras.Model) for t in getattr(layer, "outputs", None) or []
    }
    for layer in layers:
        if not isinstance(layer, keras.layers.BatchNormalization) or not layer.trainable:
            continue
        for node in layer._inbound_nodes:
            for parent in node.parent_nodes:
                operation = parent.operation
                while type(operation).__name__.startswith("Cropping") and len(operation._outbound_nodes) == 1:
                    operation = operation._inbound_nodes[0].parent_nodes[0].operation
                used_elsewhere = {id(t) for n in operation._inbound_nodes for t in n.outputs} & outputs
                if len(operation._outbound_nodes) != 1 or used_elsewhere:  # where it may have an effect
                    continue
                rank = len(node.outputs[0].shape)
                channels = 1 if getattr(operation, "data_format", None) == "channels_first" else rank - 1
                linear = getattr(getattr(operation, "activation", None), "__name__", "linear") == "linear"
                known = id(operation) in keys and keys[id(operation)] not in biases
                if known and linear and layer.axis % rank == channels:
                    biases.append(keys[id(operation)])
    return biases


# %% [markdown]
# ## 2. How salient is a weight?
#
# With $g_b$ the gradient of batch $b$'s mean loss at the trained weights, $n_b$ its number of examples and
# $N = \sum_b n_b$:
#
# | score | definition | source |
# |---|---|---|
# | `fisher` (the default) | $\frac1N \sum_b n_b\, g_b^2$ | batch gradients squared: the Fisher's, up to scale |
# | `paper` | $\big(\sum_b g_b\big)^2$, network in training mode | the paper's code |
# | `per_example` | $\frac1N \sum_i g_i^2$ | the empirical Fisher's diagonal (Kirkpatrick et al. 2017) |
# | `magnitude` | $\lvert w \rvert$ | pruning by size |
# | `taylor` | $\frac1N \sum_b n_b\, (w\, g_b)^2$ | Molchanov et al. 2019, eq. 8 |
# | `random` | uniform numbers | the control |
#
# (The *Fisher information* is the expected squared gradient of the log likelihood, over labels drawn from the model;
# the *empirical* one takes the labels of the data. Sung et al. 2021 choose by it which weights to train at all.)
#
# A batch's mean gradient squared is not the mean of its examples' squares; where examples are independent and gradients
# nearly average out, as at an optimum, one is about $1/n_b$ of the other, and the ranking is nearly that of
# `per_example` at the price of one pass.
#
# Why the weights $n_b$? The squared noise of the gradient of one example is 32 times that of a batch of 32. Counted
# once like the others, a last batch of one would make up more than half of the score of an epoch of 20 batches. The
# paper's sum counts every batch once, and so does `paper`.


# %%
def saliency(
    model: keras.Model,
    data=None,
    loss=None,
    *,
    score: str = "fisher",
    batch_statistics: bool | None = None,
    max_batches: int | None = None,
    batch_size: int = 32,
    seed: int = 0,
    include: str | Sequence[str] | None = None,
    exclude: str | Sequence[str] | None = None,
    verbose: bool = True,
) -> dict[str, np.ndarray]:
    """Saliency score of every eligible weight entry, in one pass over the data. Nothing in the model changes.

    Batch norm's running statistics, the states of dropout and every weight are as before, whatever the mode.
    "per_example" runs one forward and backward pass for each example: as slow as batches of one.

    Args:
        model: built `keras.Model`, at its trained weights.
        data: iterable of (x, y) or (x, y, sample_weight) batches (a `tf.data.Dataset`, a `PyDataset`, a list), or a
            tuple of arrays, taken in their order: shuffle what is sorted by class. Unused by "magnitude" and "random".
        loss: Keras loss or its name, or a callable (y, y_pred) -> loss, whose mean is taken; None: the one
            that the model was compiled with. Regularisers of the model are left out.
        score: one of "fisher", "paper", "per_example", "magnitude", "taylor", "random".
        batch_statistics: network in training mode (batch norm by the batch, dropout on). None: for "paper" alone.
        max_batches: stop after so many batches; None: all.
        batch_size: of a tuple of arrays.
        seed: of "random": the same numbers for the same key.
        include, exclude: patterns on keys, see `eligible_weights`.
        verbose: show a progress bar.

    Returns:
        dict key -> float32 array of the weight's shape, in the order of `eligible_weights`. A weight that the loss does
        not depend on scores 0, with a UserWarning.

    Raises:
        ValueError: unknown score, unbuilt model, no or endless data, labels that do not fit the outputs, or a loss or
            gradient that is not finite (the weight and the batch are named).

    Reference: Abboud, Lombaert, Kadoury (2024), section 2.2.
    """
    _check_options(score, max_batches)
    weights = eligible_weights(model, include, exclude)
    if score in ("magnitude", "random"):
        return _without_data(score, weights, seed)
    loss = getattr(model, "loss", None) if loss is None else loss
    _check_needed(score, data, loss)
    training = score == "paper" if batch_statistics is None else batch_statistics
    gradients = _Gradients(model, weights, loss, training)
    sums = _Sums(weights, score)
    batches, total = _batches(data, batch_size, max_batches)
    num_examples = _pass(gradients, sums, batches, total, verbose)
    if gradients.missing:
        warnings.warn(f"The loss does not depend on {gradients.missing[:5]}: their score is 0.", stacklevel=2)
    return sums.scores(num_examples)


# %% [markdown]
# Two scores need no data. The others need data, a loss and TensorFlow's gradients, and say so before any work is done.


# %%
def _check_options(score, max_batches):
    if score not in SCORES:
        raise ValueError(f"Expected score to be one of {SCORES}. Received: score={score!r}")
    if max_batches is not None and max_batches < 1:
        raise ValueError(f"Expected max_batches to be 1 or more, or None. Received: max_batches={max_batches!r}")


def _without_data(score, weights, seed):
    """Scores "magnitude" and "random"."""
    if score == "magnitude":
        return {k: np.abs(keras.ops.convert_to_numpy(w.variable)).astype("float32") for k, w in weights.items()}
    return {
        k: np.random.default_rng([seed, zlib.crc32(k.encode())]).random(tuple(w.variable.shape), "float32")
        for k, w in weights.items()
    }


def _check_needed(score, data, loss):
    if data is None or loss is None:
        missing = "data=None" if data is None else "loss=None, and the model is not compiled"
        raise ValueError(f"Expected data and a loss for score={score!r}. Received: {missing}")
    _check_backend(f"score={score!r}")


def _check_backend(what):
    if keras.backend.backend() != "tensorflow":
        raise ValueError(
            f"Expected Keras on TensorFlow, whose GradientTape takes the gradients, for {what}. Received: "
            f"KERAS_BACKEND={keras.backend.backend()}. There make and save the masks, here Masks.load(path)."
        )


# %% [markdown]
# The pass has three parts. `_batches` brings data of every kind into one form. `_Gradients` takes the gradients of one
# batch inside `keras.StatelessScope`: what the layers want to assign (running statistics, a dropout's next seed) stays
# in the scope, so the model cannot change. `_Sums` adds up on the device. `_pass` puts them together.


# %%
def _pass(gradients, sums, batches, total, verbose) -> int:
    """Add up the gradients of each batch, or of each example; the number of examples."""

    def step(batch, number):
        if sums.score != "per_example":
            sums.add(*gradients(*batch), _num_examples(batch), number)
            return

        def one(i):
            sums.add(*gradients(*keras.tree.map_structure(lambda t: t[i][None], batch)), 1, number)
            return i + 1

        tf.while_loop(lambda i: i < _num_examples(batch), one, [0], parallel_iterations=1)

    compiled = tf.function(step, autograph=False, reduce_retracing=True)
    num_batches = num_examples = 0
    for batch in tqdm(batches, total=total, desc="saliency", mininterval=2.0, disable=not verbose):
        batch = _checked(batch, num_batches)
        compiled(batch, tf.constant(num_batches))
        num_batches += 1
        num_examples += int(_num_examples(batch))
        if num_batches % 50 == 0:  # a NaN is found early, and yet the device seldom waits for the host
            sums.check()
    if not num_batches:
        raise ValueError("Expected at least one batch of (x, y). Received: no data.")
    sums.check()
    return num_examples


# %% [markdown]
# Arrays are cut into batches, a `PyDataset` is asked for one after the other, and what never ends is refused.


# %%
def _batches(data, batch_size, max_batches):
    """(iterable of batches, their number or None)."""
    if isinstance(data, tuple) and not all(isinstance(part, tuple) for part in data):
        data = tf.data.Dataset.from_tensor_slices(data).batch(batch_size)
    if isinstance(data, keras.utils.PyDataset):
        total = data.num_batches  # None: endless
        max_batches = min(max_batches or total, total or max_batches)
        data = map(data.__getitem__, itertools.count())
    try:
        total = len(data)
    except TypeError:  # a generator, an endless dataset, or one that does not know its length
        total = None
        endless = isinstance(data, tf.data.Dataset) and data.cardinality() == tf.data.INFINITE_CARDINALITY
        if endless and max_batches is None:
            raise ValueError("Expected data that ends, or max_batches. Received: an endless dataset.") from None
    if max_batches is None:
        return data, total
    return itertools.islice(data, max_batches), min(max_batches, total or max_batches)


# %% [markdown]
# A batch that does not fit is reported with its number, before it is used.


# %%
def _num_examples(batch):
    return tf.shape(keras.tree.flatten(batch[0])[0])[0]


def _checked(batch, number):
    """The batch as a tuple of tensors, without a sample weight of None."""
    if not isinstance(batch, tuple | list) or len(batch) not in (2, 3):
        raise ValueError(
            f"Expected data as a tuple of arrays (x, y) or (x, y, sample_weight), or batches of these. Received: "
            f"{type(batch)} in batch {number}."
        )
    batch = keras.tree.map_structure(tf.convert_to_tensor, tuple(part for part in batch if part is not None))
    if not all(t.shape.rank for t in keras.tree.flatten(batch)):
        raise ValueError(f"Expected batches. Received: a single number in batch {number}. Call dataset.batch(32).")
    sizes = {int(t.shape[0]) for t in keras.tree.flatten(batch)}
    if len(sizes) != 1:
        shapes = [tuple(t.shape) for t in keras.tree.flatten(batch)]
        raise ValueError(f"Expected one label for each example. Received: shapes {shapes} in batch {number}.")
    return batch


# %% [markdown]
# A mean squared error of labels `(n,)` and outputs `(n, 1)` would be taken over $n \times n$ pairs by broadcasting, and
# would look fine. Keras's own losses are therefore given labels of the outputs' shape, or none at all.


# %%
class _NamedLoss(keras.losses.Loss):
    """A Keras loss function under the conventions of `compile`: masks, sample weights, mean."""

    def __init__(self, function, dtype):
        super().__init__(name=function.__name__, dtype=dtype)
        self.call = function


def _mean_loss(loss, y, y_pred, sample_weight=None):
    """Mean loss of a batch, a scalar."""
    if isinstance(loss, str | dict):
        loss = keras.losses.get(loss)
        y = _fitted(getattr(loss, "__name__", type(loss).__name__), y, y_pred)
        if not isinstance(loss, keras.losses.Loss):
            loss = _NamedLoss(loss, "float64" if y_pred.dtype == tf.float64 else "float32")
    elif isinstance(loss, keras.losses.Loss) and type(loss).__module__.startswith("keras."):
        y = _fitted(type(loss).__name__, y, y_pred)
    if isinstance(loss, keras.losses.Loss):
        return tf.reduce_mean(loss(y, y_pred, sample_weight=sample_weight))
    y_pred = keras.tree.map_structure(lambda t: tf.cast(t, "float32") if t.dtype.size < 4 else t, y_pred)
    dtype = keras.tree.flatten(y_pred)[0].dtype
    y = keras.tree.map_structure(lambda t: tf.cast(t, dtype) if t.dtype.is_floating else t, y)
    values = tf.convert_to_tensor(loss(y, y_pred))
    if sample_weight is not None:
        if not values.shape.rank:
            raise ValueError("Expected a loss for each example where data has sample weights. Received: a scalar loss.")
        shape = [-1] + [1] * (values.shape.rank - 1)
        values *= tf.reshape(tf.cast(sample_weight, values.dtype), shape)
    return tf.reduce_mean(values)


# %% [markdown]
# Which shape of labels does a loss need? Its name tells: a sparse one takes class numbers, the others the outputs'
# shape.


# %%
def _fitted(name, y, y_pred):
    """Labels in the shape that Keras's loss of this name needs."""
    name = name.lower().replace("_", "")
    if not (tf.is_tensor(y) and tf.is_tensor(y_pred)) or "ctc" in name or "generalized" in name:
        return y
    if "sparse" in name:
        fits = any(y.shape.is_compatible_with(s) for s in (y_pred.shape[:-1], [*y_pred.shape[:-1], 1]))
    else:
        if y.shape.rank == y_pred.shape.rank - 1 and y_pred.shape[-1] == 1:
            y = y[..., None]
        fits = y.shape.is_compatible_with(y_pred.shape)
    if not fits:
        kind = "class numbers, without a class axis," if "sparse" in name else "labels"
        raise ValueError(f"Expected {kind} that fit the outputs {y_pred.shape}. Received: labels {y.shape}.")
    return y


# %% [markdown]
# The gradients of one batch. The seeds of dropout are copied, so that each batch is dropped out by a mask of its own
# and the model's own seeds stay.


# %%
class _Gradients:
    """Loss of one batch and its gradients; the model stays as it is."""

    def __init__(self, model, weights, loss, training):
        self.model, self.weights, self.loss, self.training = model, weights, loss, training
        of_weights = {id(v) for v in model.weights}
        seeds = [v for v in model.variables if id(v) not in of_weights]
        # Without copies of their own every batch would be dropped out by the same mask.
        self.seeds = [(v, tf.Variable(v.value, trainable=False)) for v in seeds]
        self.missing = []

    def __call__(self, x, y, sample_weight=None):
        variables = [weight.variable.value for weight in self.weights.values()]
        with tf.GradientTape(watch_accessed_variables=False) as tape:
            tape.watch(variables)
            with keras.StatelessScope(self.seeds) as scope:
                y_pred = self.model(x, training=self.training)
            value = _mean_loss(self.loss, y, y_pred, sample_weight)
        for seed, copy in self.seeds:
            copy.assign(scope.get_current_value(seed))
        found = tape.gradient(value, variables)
        self.missing = [key for key, g in zip(self.weights, found, strict=True) if g is None]
        return value, found


# %% [markdown]
# What is added up for each score: gradients for `paper`, their squares times the number of examples for the others. Of
# each weight it is noted when it was not finite for the first time.


# %%
class _Sums:
    """Sums of gradients, or of their squares, over batches; in float32 on the device."""

    def __init__(self, weights, score):
        self.weights, self.score = weights, score
        self.sums = [tf.Variable(tf.zeros(w.variable.shape), trainable=False) for w in weights.values()]
        # Of the loss and of each weight: the first batch in which it was not finite.
        self.first_bad = tf.Variable(tf.fill([1 + len(weights)], -1), trainable=False)

    def add(self, loss, gradients, num_examples, number):
        finite = [tf.math.is_finite(tf.cast(loss, "float32"))]
        for total, gradient in zip(self.sums, gradients, strict=True):
            if gradient is None:
                finite.append(tf.constant(True))
                continue
            sparse = isinstance(gradient, tf.IndexedSlices)  # of an embedding: the rows that were looked up
            if sparse:
                rows, places = tf.unique(gradient.indices)
                gradient = tf.math.unsorted_segment_sum(gradient.values, places, tf.size(rows))
            gradient = tf.cast(gradient, "float32")
            if self.score != "paper":
                gradient = tf.square(gradient) * tf.cast(num_examples, "float32")
            total.scatter_add(tf.IndexedSlices(gradient, rows)) if sparse else total.assign_add(gradient)
            finite.append(tf.math.is_finite(tf.reduce_sum(gradient)))
        new = (self.first_bad < 0) & ~tf.stack(finite)
        self.first_bad.assign(tf.where(new, number, self.first_bad))

    def check(self):
        bad = self.first_bad.numpy()
        if (bad < 0).all():
            return
        number = bad[bad >= 0].min()
        if bad[0] == number:
            raise ValueError(f"Expected a finite loss. Received: NaN or infinity in batch {number}. Check the inputs.")
        keys = [key for key, b in zip(self.weights, bad[1:], strict=True) if b == number]
        raise ValueError(f"Gradients of {keys[:3]} are not finite in batch {number}. Check the loss there.")

    def scores(self, num_examples):
        totals = {key: total.numpy() for key, total in zip(self.weights, self.sums, strict=True)}
        return _scores_of(self.score, self.weights, totals, num_examples)


# %% [markdown]
# From the sums to the scores, as the table above defines them.


# %%
def _scores_of(score, weights, totals, num_examples):
    """Scores from the sums over batches."""
    if score == "paper":
        return {key: total**2 for key, total in totals.items()}
    scores = {key: total / np.float32(num_examples) for key, total in totals.items()}
    if score == "taylor":
        locs = {key: keras.ops.convert_to_numpy(weights[key].variable).astype("float32") for key in scores}
        return {key: locs[key] ** 2 * value for key, value in scores.items()}
    return scores


# %% [markdown]
# By hand, two weights and two batches: gradients of 3 and -3, which cancel, and of 1 and 1, which do not. `fisher`
# ranks the first weight higher, `paper` the second. Which is right for a trained network? Section 7 asks.

# %% tags=["active-ipynb"]
# def score_by_hand(batch_gradients):
#     g = np.array(batch_gradients)
#     return {"fisher": float(np.mean(g**2)), "paper": float(np.sum(g) ** 2)}
#
# print(score_by_hand([3, -3]), score_by_hand([1, 1]))

# %% [markdown]
# ## 3. Must it be a pass of its own?
#
# No: the last epoch of training has every batch's gradient in hand. A callback adds up what the optimiser is given,
#
# $$T \leftarrow T + n_b\, g_b^2 ,$$
#
# and the scores are there when `fit` returns. What differs from a pass of its own: the weights still move during that
# epoch, and the network runs in training mode (batch norm by the batch, dropout on). With a learning rate of 0, no
# dropout and the same batches both are equal to float rounding: the check below.
#
# Where is the gradient to be had? Each Keras training step ends in `optimizer.apply(gradients, variables)`. During the
# recorded epoch that method first hands its gradients to the recorder: before clipping, weight decay and momentum,
# and, under loss scaling, unscaled and of those steps alone that are applied. In a pass of its own regularisers are
# left out; here their gradient is subtracted again.
#
# Keras offers no such hook, so the class comes in three parts. What a part uses and does not set, the callback of the
# last one does, as training and epochs begin. First the sums: `train_step` notes how many examples a batch has, `_add`
# adds its gradients up.


# %%
class _Recorded(keras.callbacks.Callback):
    """A training step that counts its examples, and sums of gradients over steps."""

    def _make(self):
        """The step that records, and what it adds to: one local copy a replica."""
        options = {"trainable": False, "synchronization": tf.VariableSynchronization.ON_READ}
        options["aggregation"] = tf.VariableAggregation.ONLY_FIRST_REPLICA
        with self.model.distribute_strategy.scope():
            self._totals = {k: tf.Variable(tf.zeros(w.variable.shape), **options) for k, w in self._weights.items()}
            self._num_examples, self._num_steps = (tf.Variable(tf.zeros((), "int64"), **options) for _ in range(2))
        self._sizes, ordinary, before = {}, self.model.train_step, self.model.train_function

        def train_step(data):
            x = next(t for t in keras.tree.flatten(keras.utils.unpack_x_y_sample_weight(data)[0]) if t is not None)
            self._sizes[_replica()] = tf.shape(x, out_type="int64")[0]
            self._num_steps.assign_add(1)
            return ordinary(data)

        with _replaced(self.model, "train_step", train_step):
            self.model.make_train_function(force=True)
            self._function, self.model.train_function = self.model.train_function, before

    def _add(self, gradients, loss_scale):
        """Add one batch's gradients, variable's id -> gradient, to the totals."""
        found = {k: gradients.get(id(w.variable)) for k, w in self._weights.items()}
        found = {key: tf.convert_to_tensor(g) for key, g in found.items() if g is not None}  # an embedding's: dense
        size = self._sizes[_replica()]
        if self.model.distribute_strategy.num_replicas_in_sync > 1:
            total = functools.partial(tf.distribute.get_replica_context().all_reduce, tf.distribute.ReduceOp.SUM)
            size, found = total(size), dict(zip(found, total(list(found.values())), strict=True))
        self._num_examples.assign_add(size)
        for key, gradient in found.items():
            if loss_scale is not None:
                gradient /= tf.cast(loss_scale, gradient.dtype)
            gradient = tf.cast(_without_penalty(self._weights[key].variable, gradient), "float32")
            squared = self.score != "paper"
            # `total += n * g ** 2` in place, n without a pass over memory of its own.
            tf.raw_ops.ResourceApplyGradientDescent(
                var=self._totals[key].handle,
                alpha=-tf.cast(size, "float32") if squared else -1.0,
                delta=tf.square(gradient) if squared else gradient,
            )


# %% [markdown]
# Then the listening: during one call of the training function the optimiser's `apply` is replaced by one that hands the
# gradients to `_add` first; afterwards, also after an error, the old one is back.


# %%
class _Listening(_Recorded):
    """The training function of the recorded epoch."""

    def _step(self, iterator):
        """One call of the training function, with the optimiser's `apply` listened to."""
        if self._iterator is None:
            self._iterator = iterator
        if iterator is not self._iterator:  # another fit, after one that an error in a callback ended
            ordinary = self._ordinary
            self._give_up()
            return ordinary(iterator)
        optimizer = self.model.optimizer
        while isinstance(optimizer, keras.optimizers.LossScaleOptimizer):
            optimizer = optimizer.inner_optimizer
        apply = optimizer.apply

        def recorded(grads, trainable_variables=None):
            variables = optimizer._trainable_variables if trainable_variables is None else list(trainable_variables)
            grads = list(grads)
            self._add({id(v): g for v, g in zip(variables, grads, strict=True)}, optimizer.loss_scale_factor)
            return apply(grads, variables)

        try:
            with _replaced(optimizer, "apply", recorded):
                return self._function(iterator)
        except (StopIteration, tf.errors.OutOfRangeError):
            self._ran_out = True
            raise
        except BaseException:
            self._give_up()
            raise

    def _give_up(self):
        """After an error, in this step or elsewhere."""
        self.model.train_function = self._ordinary
        self.on_train_end()


# %% [markdown]
# Last, the callback itself: when to listen, and when the sums are scores. It is the part that is used.


# %%
class SaliencyRecorder(_Listening):
    """Scores of `saliency` from the gradients of an epoch of `fit`: no pass of their own.

    `total += num_examples * gradient ** 2` at each step of the recorded epoch, one float32 array a weight; other epochs
    cost nothing. The model is as before afterwards, also when `fit` raises (after an error in another callback, as soon
    as it trains again). The step is traced once more, unless the recorded epoch is the first.

    The gradients are those of training: in training mode (dropout on), with class and sample weights, at weights that
    move. Gradients of weight regularisers are taken out, other losses that layers add are left in. Each call of
    `optimizer.apply` is a batch, of accumulated gradients too. Under `tf.distribute` a batch is the global one: its
    gradients are summed over the replicas once more, before any clipping.

    Args:
        score: "fisher", "paper" or "taylor" (with the weights as they are after the epoch).
        epoch: "last", or "every": each epoch starts anew, so that the last one counts wherever early stopping ends; or
            one epoch's number, from 0.
        include, exclude: patterns on keys, see `eligible_weights`.

    Raises:
        ValueError: a score that needs other gradients; in `fit`, Keras on another backend than TensorFlow.

    Reference: Abboud, Lombaert, Kadoury (2024), section 2.2, which takes the gradients of the trained network.
    """

    def __init__(self, score: str = "fisher", *, epoch: int | str = "last", include=None, exclude=None):
        super().__init__()
        if score not in ("fisher", "paper", "taylor"):
            raise ValueError(f'Expected score "fisher", "paper" or "taylor". Received: score={score!r}')
        number = isinstance(epoch, int) and not isinstance(epoch, bool) and epoch >= 0
        if not number and epoch not in ("last", "every"):
            raise ValueError(f'Expected epoch "last", "every" or a number from 0. Received: epoch={epoch!r}')
        self.score, self.epoch, self.include, self.exclude = score, epoch, include, exclude
        self._scores, self._missing = None, "no fit with this callback"
        self._function = None

    def scores(self) -> dict[str, np.ndarray]:
        """Key -> float32 array of the weight's shape, as from `saliency`.

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
        _check_backend("SaliencyRecorder")
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
            self._make()
        for variable in (*self._totals.values(), self._num_examples, self._num_steps):
            variable.assign(tf.zeros_like(variable))
        self._iterator, self._ran_out = None, False
        self._ordinary, self.model.train_function = self.model.train_function, self._step

    def on_epoch_end(self, epoch, logs=None):
        """Take the scores, if the epoch is whole, and put the ordinary step back."""
        if self._recorded not in (None, epoch):
            return
        self.model.train_function = self._ordinary
        steps, found = self.params["steps"], int(_local(self._num_steps))
        if not (self._ran_out if steps is None else found >= steps):
            return
        num_examples = int(_local(self._num_examples))
        if not num_examples:
            self._missing = "no gradient: the model's train_step calls no optimizer.apply, or every step was skipped"
            return
        totals = {key: _local(total) for key, total in self._totals.items()}
        self._scores = _scores_of(self.score, self._weights, totals, num_examples)

    def on_train_end(self, logs=None):
        """Give the memory on the device back."""
        self._function = self._totals = self._ordinary = self._iterator = None


# %% [markdown]
# Its helpers: a gradient without that of the regulariser, an attribute that is another one for a while, and which
# replica of a distributed training this is.


# %%
def _without_penalty(variable, gradient):
    """The gradient less that of the variable's regulariser."""
    if variable.regularizer is None:
        return gradient
    value = tf.convert_to_tensor(variable.value)
    with tf.GradientTape() as tape:
        tape.watch(value)
        penalty = variable.regularizer(value)
    return gradient - tf.cast(tape.gradient(penalty, value), gradient.dtype)


@contextlib.contextmanager
def _replaced(owner, name, value):
    """`owner.name` is `value` meanwhile."""
    before = vars(owner).get(name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        delattr(owner, name) if before is None else setattr(owner, name, before)


def _replica():
    return int(tf.get_static_value(tf.distribute.get_replica_context().replica_id_in_sync_group))


def _local(variable):
    """The value of the first replica here."""
    values = tf.distribute.get_strategy().experimental_local_results(variable)
    return values[0].numpy()


# %% [markdown]
# The oracle is the pass of section 2. With a learning rate of 0 the weights stand still, and the clipping must not be
# seen.

# %% tags=["active-ipynb"]
# rng = np.random.default_rng(0)
# inputs, labels = rng.normal(size=(90, 2)), rng.integers(0, 2, (90, 1))
# network = keras.Sequential([keras.Input((2,)), keras.layers.Dense(4, "tanh"), keras.layers.Dense(1, "sigmoid")])
# network.compile(keras.optimizers.Adam(0.0, clipnorm=0.01), "binary_crossentropy")
# recorder = SaliencyRecorder()
# network.fit(inputs, labels, epochs=3, shuffle=False, verbose=0, callbacks=[recorder])
# own = saliency(network, (inputs, labels), "binary_crossentropy", batch_statistics=True, verbose=False)
# equal = [np.allclose(own[key], values, rtol=1e-4) for key, values in recorder.scores().items()]
# print("recorded as by a pass of its own:", equal)
# assert all(equal)

# %% [markdown]
# ## 4. Which entries are chosen?
#
# Exactly `round(r_bayes * n)`, where `n` counts all entries that were scored: the largest scores, ties to the earlier
# key and position. A threshold on the score would take more than asked where scores are equal (dead units have 0).
# `scope="layer"` takes the same share of every weight instead.


# %%
class Masks(Mapping):
    """Which entries of which weights are Bayesian: key -> boolean array of the weight's shape.

    Raises:
        ValueError: no mapping, or an array that is not boolean.
    """

    def __init__(self, masks: Mapping):
        self._masks = _boolean_arrays(masks)

    def __getitem__(self, key):
        return self._masks[key]

    def __iter__(self):
        return iter(self._masks)

    def __len__(self):
        return len(self._masks)

    def __eq__(self, other):
        same_keys = isinstance(other, Masks) and list(self) == list(other)
        return same_keys and all(np.array_equal(self[k], other[k]) for k in self)

    def __repr__(self):
        return f"Masks({self.num_bayesian:,} of {self.num_weights:,} entries, {len(self)} weights)"

    @property
    def num_bayesian(self) -> int:
        """Bayesian entries in all."""
        return int(sum(m.sum() for m in self.values()))

    @property
    def num_weights(self) -> int:
        """Entries in all."""
        return int(sum(m.size for m in self.values()))

    @property
    def r_bayes(self) -> float:
        """Fraction of the entries that is Bayesian, 0..1."""
        return self.num_bayesian / max(self.num_weights, 1)

    def digest(self) -> str:
        """Ten hexadecimal digits that stand for the chosen entries: other masks, other digits."""
        return _digest(self)

    def save(self, path) -> None:
        """Write an npz, whole or not at all."""
        _write_masks(os.fspath(path), self)

    @classmethod
    def load(cls, path) -> Masks:
        """Read what `save` wrote."""
        return cls(_read_masks(path))

    def check(self, model) -> None:
        """Raise a ValueError unless these masks fit this model's weights."""
        _check_fit(self, model)

    def table(self) -> str:
        """One line a weight: shape, entries, Bayesian entries, their share of the weight and of the selection."""
        return _table(self)


# %% [markdown]
# What may be a mask? Boolean arrays only: scores or numbers of 0 and 1 are a mistake, and refused. And a mask must
# fit the model that it is used on.


# %%
def _boolean_arrays(masks) -> dict[str, np.ndarray]:
    if not isinstance(masks, Mapping):
        raise ValueError(
            f"Expected masks: weight key -> boolean array, as top_k gives. Received: {masks!r}. A share of the "
            "weights is r_bayes."
        )
    found = {key: np.asarray(mask) for key, mask in masks.items()}
    for key, mask in found.items():
        if mask.dtype != bool:
            raise ValueError(
                f"Expected boolean masks (of scores, make them by top_k). Received: {mask.dtype} for {key!r}"
            )
    return found


def _check_fit(masks, model):
    weights = named_weights(model)
    unknown = [k for k in masks if k not in weights]
    other = [k for k in masks if k not in unknown and masks[k].shape != tuple(weights[k].variable.shape)]
    if unknown or other:
        raise ValueError(
            f"These masks are of another model: {(unknown + other)[:3]} "
            f"{'are not weights' if unknown else 'have another shape'} of '{model.name}'. "
            "Make them with this model."
        )


# %% [markdown]
# How are masks stored and shown? As an npz, whole or not at all: a program that is killed while it writes leaves the
# old file as it was.


# %%
def _write_masks(path, masks):
    # Not tempfile: its files are readable by their owner alone, and masks are shared.
    temporary = f"{path}.{os.getpid()}.tmp"
    try:
        with zipfile.ZipFile(temporary, "w", zipfile.ZIP_DEFLATED) as archive:
            for key, mask in masks.items():  # as np.savez does, which a weight called "file" would break
                with archive.open(f"{key}.npy", "w", force_zip64=True) as file:
                    np.lib.format.write_array(file, mask, allow_pickle=False)
        os.replace(temporary, path)
    except BaseException:
        if os.path.exists(temporary):
            os.unlink(temporary)
        raise


def _read_masks(path) -> dict[str, np.ndarray]:
    try:
        with np.load(path, allow_pickle=False) as file:
            return _boolean_arrays({key: file[key] for key in file.files})
    except FileNotFoundError:
        raise
    except Exception as error:
        raise ValueError(f"Expected masks written by Masks.save in {path}. Received: {error}") from None


def _digest(masks) -> str:
    found = hashlib.blake2b(digest_size=5)
    for key, mask in masks.items():
        found.update(f"{key}{mask.shape}".encode())
        found.update(np.packbits(mask).tobytes())
    return found.hexdigest()


def _table(masks) -> str:
    lines = [f"{'weight':<36}{'shape':>20}{'entries':>12}{'Bayesian':>10}{'of weight':>11}{'of all':>9}"]
    chosen = max(masks.num_bayesian, 1)
    for key, m in masks.items():
        shape = "x".join(map(str, m.shape))
        lines.append(f"{key:<36}{shape:>20}{m.size:>12,}{m.sum():>10,}{m.mean():>11.1%}{m.sum() / chosen:>9.1%}")
    total, found = masks.num_weights, masks.num_bayesian
    lines.append(f"{'all':<36}{'':>20}{total:>12,}{found:>10,}{masks.r_bayes:>11.1%}{found / chosen:>9.1%}")
    return "\n".join(lines)


# %% [markdown]
# Now the choice. `top_k` checks what it was given, selects, and warns where rounding leaves no entry at all.


# %%
def top_k(
    scores: Mapping,
    r_bayes: float,
    *,
    scope: str = "global",
    model: keras.Model | None = None,
    cost_aware: float | None = None,
) -> Masks:
    """Masks of the `k = round(r_bayes * n)` largest scores, of whole channels, or of weights late in the network.

    Args:
        scores: key -> array, from `saliency`.
        r_bayes: fraction of all scored entries to be Bayesian, 0..1.
        scope: "global" (one ranking); "layer" (the same share of each weight; the total is exact, what rounding leaves
            over goes to the weights with the largest remainders); "channel" (whole output channels, each with its bias
            entry, by saliency per entry: every channel that still fits into k, so at most k entries).
        model: the network of the scores; needed by "channel" and `cost_aware`.
        cost_aware: highest share of the network's operations that may run anew for each sample, 0..1 (see
            `sbn_tf.core.graph.Graph.fan_out`); None: any. Exactly k entries (scopes "global" and "layer"), all in
            weights that are late enough; `n` counts all.

    Raises:
        ValueError: `r_bayes` or `cost_aware` that is no fraction, empty or non-finite scores, an unknown scope, no or
            another model where one is needed, no channel that fits, or no set of weights found that is late enough and
            holds k entries.
    """
    check_r_bayes(r_bayes)
    if scope not in ("global", "layer", "channel"):
        raise ValueError(f'Expected scope "global", "layer" or "channel". Received: scope={scope!r}')
    if not scores or not all(np.size(s) for s in scores.values()):
        raise ValueError("Expected scores of at least one weight, from saliency(...). Received: empty scores.")
    for key, values in scores.items():
        if not np.isfinite(values).all():
            raise ValueError(f"Expected finite scores. Received: NaN or infinity in {key!r}.")
    if model is None and (scope == "channel" or cost_aware is not None):
        raise ValueError('Expected the model of the scores for scope="channel" or cost_aware. Received: model=None')
    weights = None if model is None else _weights_of(scores, model)
    if cost_aware is None:
        masks = _select(scores, r_bayes, scope, weights, set(scores))
    elif (
        isinstance(cost_aware, bool) or not isinstance(cost_aware, int | float | np.number) or not 0 <= cost_aware <= 1
    ):
        raise ValueError(f"Expected cost_aware, a fraction in [0, 1]. Received: cost_aware={cost_aware!r}")
    else:
        masks = _late(scores, r_bayes, scope, weights, Graph(model), cost_aware)
    if r_bayes > 0 and not masks.num_bayesian:
        warnings.warn(
            f"No entry is Bayesian: r_bayes={r_bayes:g} of {masks.num_weights:,} entries rounds to 0.", stacklevel=2
        )
    return masks


# %% [markdown]
# A selection in one of three scopes: one ranking of all entries, the same share of each weight, or whole channels
# (section 5).


# %%
def _select(scores, r_bayes, scope, weights, allowed):
    """Masks of k entries, all of them in the weights `allowed`."""
    n = sum(np.size(s) for s in scores.values())
    k = round(float(r_bayes) * n)
    masks = {key: np.zeros(np.shape(s), bool) for key, s in scores.items()}
    found = {key: np.ravel(s) for key, s in scores.items() if key in allowed}
    sizes = np.array([s.size for s in found.values()])
    if scope == "channel":
        parts = _channels(found, {key: weights[key] for key in found}, k)
    elif scope == "global":
        parts = np.split(_largest(np.concatenate(list(found.values())), k), np.cumsum(sizes)[:-1])
    else:
        share = r_bayes * (n / sizes.sum()) * sizes
        counts = np.floor(share).astype(int)
        order = np.argsort(counts - share, kind="stable")
        counts[order[: k - counts.sum()]] += 1
        parts = [_largest(s, c) for s, c in zip(found.values(), counts, strict=True)]
    masks |= {key: part.reshape(masks[key].shape) for key, part in zip(found, parts, strict=True)}
    return Masks(masks)


# %% [markdown]
# What must hold first: scores of this very model, and a share that is one.


# %%
def _weights_of(scores, model):
    weights = named_weights(model)
    other = [k for k, s in scores.items() if k not in weights or tuple(weights[k].variable.shape) != np.shape(s)]
    if other:
        raise ValueError(
            f"Expected scores of this model. Received: {other[:3]}, not among the weights of {model.name!r}"
        )
    return weights


def check_r_bayes(r_bayes: float) -> None:
    """Raise a ValueError unless `r_bayes` is a fraction in [0, 1]: long work asks first."""
    if isinstance(r_bayes, bool) or not isinstance(r_bayes, int | float | np.number) or not 0 <= r_bayes <= 1:
        raise ValueError(f"Expected r_bayes to be a fraction in [0, 1]. Received: r_bayes={r_bayes!r}")


# %% [markdown]
# Exactly $k$, even among equal scores, without sorting all of them: `np.partition` finds the k-th largest value, the
# rest is counting. Two shares compare selections: of entries in common, and of all saliency that the chosen entries
# hold.


# %%
def _largest(values, k):
    """Boolean array of the k largest entries; among equals the earlier ones."""
    chosen = np.zeros(values.size, bool)
    if k == 0:
        return chosen
    threshold = np.partition(values, values.size - k)[values.size - k]
    chosen[values > threshold] = True
    chosen[np.flatnonzero(values == threshold)[: k - chosen.sum()]] = True
    return chosen


def overlap(a: Mapping, b: Mapping) -> float:
    """Share of `a`'s Bayesian entries that are Bayesian in `b` too, 0..1."""
    return sum(int((a[k] & b[k]).sum()) for k in a if k in b) / max(sum(int(m.sum()) for m in a.values()), 1)


def captured(scores: Mapping, masks: Mapping) -> float:
    """Share of all saliency that the chosen entries hold, 0..1."""
    total = sum(float(np.sum(s, dtype="float64")) for s in scores.values())
    held = sum(float(np.sum(scores[key][mask], dtype="float64")) for key, mask in masks.items())
    return held / total if total else 0.0


# %% tags=["active-ipynb"]
# masks = top_k({"a/kernel": np.array([3.0, 1.0, 2.0]), "b/kernel": np.array([2.0, 2.0])}, 0.4)
# print({key: mask.astype(int).tolist() for key, mask in masks.items()})
# assert masks.num_bayesian == round(0.4 * 5)

# %% [markdown]
# ## 5. What do whole channels cost?
#
# Single entries are scattered over a kernel. Entries that fill whole output channels make the random part of a
# convolution a small dense convolution, which is cheap; the price is saliency left behind. Which channels? Each costs
# its number of entries $n_c$ and holds the saliency $s_c = \sum_{i \in c} s_i$:
#
# $$\max_C \sum_{c \in C} s_c \quad\text{such that}\quad \sum_{c \in C} n_c \le k .$$
#
# A knapsack: channels are taken in the order of $s_c / n_c$, each that still fits, so that fewer than $k$ entries may
# be chosen, never more. By the sum $s_c$ alone the widest layers would win.
#
# An output channel is an entry of the last axis of a Dense or convolution kernel, of the second last of a transposed
# one, an (input channel, multiplier) pair of a depthwise one, the kernel's output letters of an EinsumDense, a column
# of an Embedding (a Dense of one-hot words), and the entry of the layer's bias that is added to it.


# %%
def _channels(scores, weights, k):
    """Flat boolean arrays: whole channels of the most saliency per entry, at most k entries."""
    groups = {}
    for key, weight in weights.items():
        axes = _channel_axes(weight)
        count = int(np.prod([weight.variable.shape[a] for a in axes]))
        apart = weight.name if weight.name == "depthwise_kernel" else None  # its channels are not the layer's outputs
        groups.setdefault((id(weight.layer), count, apart), []).append((key, axes))
    totals, sizes = [], []
    for (_, count, _), members in groups.items():
        rows = [_by_channel(scores[key].reshape(weights[key].variable.shape), axes, count) for key, axes in members]
        totals.append(sum(r.sum(axis=1, dtype="float64") for r in rows))
        sizes.append(np.full(count, sum(r.shape[1] for r in rows)))
    ends = np.cumsum([len(s) for s in sizes])[:-1]
    totals, sizes = np.concatenate(totals), np.concatenate(sizes)
    if 0 < k < sizes.min():
        raise ValueError(
            f"Expected an r_bayes of one channel or more: {sizes.min()} entries. Received: an r_bayes of {k} entries."
        )
    chosen, left = np.zeros(len(sizes), bool), k
    for c in np.argsort(-totals / sizes, kind="stable"):
        if sizes[c] <= left:
            chosen[c], left = True, left - sizes[c]
    masks = {}
    for members, channels in zip(groups.values(), np.split(chosen, ends), strict=True):
        for key, axes in members:
            shape = tuple(weights[key].variable.shape)
            mask = np.zeros(shape, bool)
            _by_channel(mask, axes, len(channels), write=channels)
            masks[key] = mask.ravel()
    return [masks[key] for key in scores]


# %% [markdown]
# The other extreme: one entry in every channel. No part of the network is then without a distribution.


# %%
def one_per_channel(scores: Mapping, model: keras.Model) -> Masks:
    """Masks of the most salient entry of each output channel of each kernel: the sparsest that leaves no channel out.

    Args:
        scores: key -> array, from `saliency`; of biases and other weights of one axis nothing is chosen.
        model: the network of the scores.

    Raises:
        ValueError: no or another model.
    """
    weights, masks = _weights_of(scores, model), {}
    for key, values in scores.items():
        masks[key] = mask = np.zeros(values.shape, bool)
        if values.ndim > 1:
            axes = _channel_axes(weights[key])
            count = int(np.prod([values.shape[a] for a in axes]))
            rows = _by_channel(values, axes, count)
            best = np.arange(rows.shape[1]) == rows.argmax(axis=1)[:, None]
            moved = np.moveaxis(mask, axes, range(len(axes)))  # a view of the mask
            moved[...] = best.reshape(moved.shape)
    return Masks(masks)


# %% [markdown]
# Which axes of a weight count the outputs? `_by_channel` brings those to the front.


# %%
def _by_channel(values, axes, count, write=None):
    """(channels, entries of each); with `write` each channel's entries are set."""
    moved = np.moveaxis(values, axes, range(len(axes)))
    if write is not None:
        moved[...] = write.reshape(moved.shape[: len(axes)] + (1,) * (values.ndim - len(axes)))
    return moved.reshape(count, -1)


def _channel_axes(weight):
    """Axes of a weight that count its layer's output channels."""
    layer, rank, layers = weight.layer, len(weight.variable.shape), keras.layers
    if isinstance(layer, layers.EinsumDense):
        terms, outputs = layer.equation.replace(" ", "").replace("...", "").split("->")
        kernel = terms.split(",")[1]
        channels = [letter for letter in outputs if letter in kernel]  # a bias counts them in this order
        if weight.name == "bias":  # of the output's letters from the first of `bias_axes` on
            own = outputs[min(outputs.index(letter) for letter in layer.bias_axes) :]
            return tuple(own.index(letter) for letter in channels if letter in own)
        return tuple(kernel.index(letter) for letter in channels) or (rank - 1,)
    transposed = (layers.Conv1DTranspose, layers.Conv2DTranspose, layers.Conv3DTranspose)
    if isinstance(layer, transposed) and weight.name == "kernel":
        return (rank - 2,)
    depthwise = isinstance(layer, layers.DepthwiseConv1D | layers.DepthwiseConv2D) and weight.name == "kernel"
    if depthwise or weight.name == "depthwise_kernel":
        return (rank - 2, rank - 1)
    return (rank - 1,)


# %% [markdown]
# By hand: a layer from 2 to 3 has three channels, each of two kernel entries and one bias entry. With $k = 4$ one fits.

# %% tags=["active-ipynb"]
# small = keras.Sequential([keras.Input((2,)), keras.layers.Dense(3, name="a")])
# by_hand = {"a/kernel": np.array([[1.0, 5.0, 0.0], [1.0, 0.0, 2.0]]), "a/bias": np.array([1.0, 1.0, 0.0])}
# channels = top_k(by_hand, 0.4, scope="channel", model=small)  # sums 3, 6, 2, of 3 entries each; k = 4: one fits
# print({key: mask.astype(int).tolist() for key, mask in channels.items()})
# assert channels["a/kernel"].tolist() == [[False, True, False]] * 2 and channels.num_bayesian == 3
# entries = top_k(by_hand, 0.4)
# print(f"saliency kept: channels {captured(by_hand, channels):.2f}, single entries {captured(by_hand, entries):.2f}")

# %% [markdown]
# ## 6. Why are late weights cheaper?
#
# What comes before the first Bayesian weight gives the same for every sample and runs once. Let $f(W)$ be the *fan-out*
# of a set $W$ of weights: the share of the network's multiply-adds that use one of them, or depend on what does. $S$
# samples then cost $1 + (S - 1) f$ passes. `cost_aware` bounds $f$:
#
# $$\max_M \sum_{i \in M} s_i \quad\text{such that}\quad |M| = k, \quad f(W(M)) \le \texttt{cost\_aware},$$
#
# with $W(M)$ the weights that hold an entry of $M$. More weights to choose from never hold less saliency, so in a chain
# of layers, where $f$ only falls from input to output, the best set is the whole tail that the bound admits: exact.
# Where the graph branches, the number of such sets grows exponentially, and the better of two is taken, each grown
# weight by weight as long as the bound holds: latest first, and most salient first. Where neither holds $k$ entries, a
# third one is grown by entries per added fan-out: a small weight that is dear may have shut out a large one.


# %%
def _late(scores, r_bayes, scope, weights, graph, most):
    """The best masks found whose fan-out is at most `most`."""
    own = {key: graph.fan_out([key]) for key in scores}
    latest_first = sorted(scores, key=own.get)
    k = round(float(r_bayes) * sum(np.size(s) for s in scores.values()))
    if not k:
        return _select(scores, r_bayes, scope, weights, set(scores))
    sums = {key: float(np.sum(s, dtype="float64")) for key, s in scores.items()}
    size = {key: np.size(s) for key, s in scores.items()}
    found = []
    for order in (latest_first, sorted(scores, key=sums.get, reverse=True)):
        keys = []
        for key in order:
            if own[key] <= most and graph.fan_out([*keys, key]) <= most:
                keys.append(key)
        if set(keys) not in found:
            found.append(set(keys))
    if not any(sum(map(size.get, keys)) >= k for keys in found):
        found.append(_most_entries(size, graph, most, [key for key in latest_first if own[key] <= most]))
    enough = [keys for keys in found if sum(map(size.get, keys)) >= k]
    if not enough:
        most_entries = max(sum(map(size.get, keys)) for keys in found)
        sizes = np.cumsum([size[key] for key in latest_first])
        needed = graph.fan_out(latest_first[: int(np.searchsorted(sizes, k)) + 1])
        raise ValueError(
            f"Expected {k:,} entries in weights of a fan-out of {most:g} or less. Received: weights with "
            f"{most_entries:,}. Take cost_aware={np.ceil(needed * 1e3) / 1e3:g}, or a smaller r_bayes."
        )
    return max((_select(scores, r_bayes, scope, weights, keys) for keys in enough), key=lambda m: captured(scores, m))


# %% [markdown]
# Where no set of weights grown so far is large enough: grow one by size.


# %%
def _most_entries(size, graph, most, keys):
    """Weights whose fan-out is at most `most`, taken one by one by entries per fan-out that they add."""
    chosen, left, now = [], list(keys), 0.0
    while left:
        added = {key: graph.fan_out([*chosen, key]) - now for key in left}
        left = [key for key in left if now + added[key] <= most]
        if left:
            best = max(left, key=lambda key: size[key] / max(added[key], 1e-12))
            now += added[best]
            chosen.append(best)
            left.remove(best)
    return set(chosen)


# %% [markdown]
# What does the bound cost in saliency? One selection for each bound that makes a difference.


# %%
def saliency_against_cost(
    scores: Mapping,
    r_bayes: float,
    model: keras.Model,
    *,
    num_samples: int = 5,
    scope: str = "global",
    num_points: int = 30,
) -> tuple[np.ndarray, np.ndarray]:
    """What `top_k(..., cost_aware=...)` keeps of all saliency, against what its samples cost.

    Args:
        scores, r_bayes, model, scope: as in `top_k`.
        num_samples: S of the cost.
        num_points: at most so many bounds, evenly among the weights' own fan-outs, the highest always.

    Returns:
        `(costs, kept)`, each of shape (points,), both rising: passes of the whole network, `1 + (S - 1) * fan_out`, and
        the share of all saliency. Bounds that leave fewer than k entries, or keep no more than a lower one, are left
        out.

    Raises:
        ValueError: as `top_k`.
    """
    unbounded = top_k(scores, r_bayes, scope=scope, model=model)
    weights, graph = named_weights(model), Graph(model)
    bounds = np.unique([graph.fan_out([key]) for key in scores])
    bounds = bounds[np.unique(np.linspace(0, len(bounds) - 1, num_points).round().astype(int))]
    points = []
    for bound in [*bounds, 1.0]:
        try:
            masks = unbounded if bound == 1 else _late(scores, r_bayes, scope, weights, graph, bound)
        except ValueError:  # too few entries as late as this
            continue
        fan_out = graph.fan_out([key for key, mask in masks.items() if mask.any()])
        kept = captured(scores, masks)
        if not points or kept > points[-1][1]:
            points.append((1 + (num_samples - 1) * fan_out, kept))
    costs, kept = np.array(points).T
    return costs, kept


# %% [markdown]
# By hand: a chain of three layers with 8, 8 and 4 multiply-adds and two salient entries in each, of scores 6, 3 and 1;
# one entry is chosen. The last one alone costs
# $1 + 4 \cdot 4/20 = 1.8$ passes, from the second on $1 + 4 \cdot 12/20 = 3.4$.

# %% tags=["active-ipynb"]
# layers = [keras.layers.Dense(n, use_bias=False, name=name) for n, name in ((4, "a"), (2, "b"), (2, "c"))]
# small = keras.Sequential([keras.Input((2,)), *layers])
# ones = {key: np.eye(*weight.variable.shape) for key, weight in named_weights(small).items()}  # 2 of each weight
# scores = {key: ones[key] * size for key, size in zip(ones, (6, 3, 1), strict=True)}  # 20 in all
# costs, kept = saliency_against_cost(scores, 0.05, small, num_samples=5)
# print("passes", costs.tolist(), "saliency kept", kept.tolist())
# assert np.allclose(costs, [1.8, 3.4, 5.0]) and np.allclose(kept, [1 / 20, 3 / 20, 6 / 20])

# %% [markdown]
# ## 7. Is the score a signal, or noise?
#
# The mean square of $B$ batch gradients has two parts:
#
# $$ \frac1B \sum_b g_b^2 = \underbrace{\bar g^2}_{\text{the paper's, up to } B^2}
# + \underbrace{\frac1B \sum_b (g_b - \bar g)^2}_{\text{spread between batches}},
# \qquad \bar g = \frac1B \sum_b g_b . $$
#
# For batches of one size `fisher` has both, `paper` the first alone. By hand, the first weight of section 2: $3^2 =
# 0^2 + 3^2$.
#
# > **Misconception: "$(\sum_b g_b)^2$ is the squared gradient of the whole loss, so it is the better score."**
# > Training goes where that gradient is 0, for *every* weight, salient or not, and stops close by. What is left of it
# > there is the rest of the way, $\bar g \approx H (w - w^*)$ ($H$: the curvature, $w^*$: the optimum): it tells
# > where the optimiser happened to stop, and its square ranks noise. The spread between batches does not vanish
# > there, unless the network fits every example exactly.
#
# Is it so? Three small networks, trained until their loss hardly moves, on two noisy half-moons. A selection that means
# something should be nearly the same when it is made from half of the training data.

# %% tags=["active-ipynb"]
# def two_moons(n, seed):
#     rng = np.random.default_rng(seed)
#     label, angle = rng.integers(0, 2, (n, 1)), rng.uniform(0, np.pi, n)
#     upper = np.stack([np.cos(angle), np.sin(angle)], axis=1)
#     x = np.where(label == 0, upper, [1.0, 0.5] - upper) + 0.3 * rng.normal(size=(n, 2))
#     return x.astype("float32"), label.astype("float32")
#
#
# def trained_network(x, y, seed):
#     keras.utils.set_random_seed(seed)
#     network = keras.Sequential(
#         [
#             keras.Input((2,)),
#             keras.layers.Dense(16, "tanh", name="first"),
#             keras.layers.Dense(16, "tanh", name="second"),
#             keras.layers.Dense(1, "sigmoid", name="last"),
#         ]
#     )
#     network.compile(keras.optimizers.Adam(0.01), "binary_crossentropy")
#     network.fit(x, y, batch_size=32, epochs=30, verbose=0)
#     network.optimizer.learning_rate = 0.0005
#     network.fit(x, y, batch_size=32, epochs=10, verbose=0)
#     return network

# %% [markdown]
# Each score chooses its 10 % three times: from one half, from the other, and from all data. By chance two choices have
# 10 % in common.

# %% tags=["active-ipynb", "nbval-ignore-output"]
# def choose(network, x, y, score):
#     return top_k(saliency(network, (x, y), "binary_crossentropy", score=score, verbose=False), 0.1)
#
#
# agreement = {"fisher": [], "paper": []}
# for seed in range(3):
#     x, y = two_moons(512, seed)
#     network = trained_network(x, y, seed)
#     for score, rows in agreement.items():
#         first, second = choose(network, x[:256], y[:256], score), choose(network, x[256:], y[256:], score)
#         rows.append((overlap(first, choose(network, x, y, score)), overlap(first, second)))
# print("share of the chosen entries in common, three networks")
# for score, rows in agreement.items():
#     with_all, halves = np.array(rows).T
#     print(f"{score:<8} a half and all data: {with_all.round(2)}   the two halves: {halves.round(2)}")

# %% tags=["active-ipynb"]
# mean = {score: np.mean([with_all for with_all, _ in rows]) for score, rows in agreement.items()}
# assert mean["fisher"] > mean["paper"] + 0.1

# %% [markdown]
# `fisher` chooses nearly the same entries from half of the data as from all (0.88 or more when this was written);
# `paper` does not (0.35 to 0.59): over all data its sum has nearly cancelled, and the ranking is that of the remainder.
#
# Why then may the *two halves* agree under `paper`? Because at an optimum the halves' sums are opposite,
# $\sum_A g \approx -\sum_B g$, and their squares equal. That agreement is a property of the optimum, not of the
# weights.

# %% [markdown]
# ## 8. Where do the chosen weights lie?
#
# The last of the three networks, by `fisher`: for each weight the share of its entries that was chosen.

# %% tags=["active-ipynb", "nbval-ignore-output"]
# import matplotlib.pyplot as plt
#
# from sbn_tf.experiments.plots import plot_masks_by_layer
#
# masks = choose(network, x, y, "fisher")
# figure, axes = plt.subplots(figsize=(7, 2.6), layout="constrained")
# plot_masks_by_layer(axes, list(masks), [int(m.sum()) for m in masks.values()], [m.size for m in masks.values()])
# plt.show()

# %% [markdown]
# *Reading*: a bar to the right of the dashed line is a weight that got more than its share of the 10 %; no bar, none.
# Nearly all of the chosen are in the first layer, kernel and bias, which sees the data; of the largest weight, the
# middle kernel, none or few.
#
# What would cheaper samples leave behind? The middle layer has most of the multiply-adds: before it or in it, nearly
# the whole network runs anew.

# %% tags=["active-ipynb", "nbval-ignore-output"]
# from sbn_tf.experiments.plots import plot_saliency_against_cost
#
# scores = saliency(network, (x, y), "binary_crossentropy", verbose=False)
# figure, axes = plt.subplots(figsize=(4, 2.6), layout="constrained")
# plot_saliency_against_cost(axes, *saliency_against_cost(scores, 0.04, network))
# plt.show()

# %% [markdown]
# *Reading*: each point is the best selection of 4 % at its price: the last layer alone, which would be cheap, leaves
# nearly all saliency behind. (4 %, not 10: the last layer has no more entries than that.) The next cell asks how far
# the recorder's choice, from one more epoch of training, is that of the pass of its own.

# %% tags=["active-ipynb", "nbval-ignore-output"]
# recorder = SaliencyRecorder()
# network.fit(x, y, batch_size=32, verbose=0, callbacks=[recorder])
# print(f"entries in common: {overlap(top_k(recorder.scores(), 0.1), choose(network, x, y, 'fisher')):.2f}")

# %% [markdown]
# ## Summary
#
# - `saliency` passes once over the training data and leaves the model as it was; `fisher` is the default.
# - `SaliencyRecorder` takes the same scores from the last epoch of `fit`, at no pass of their own.
# - `paper` is the paper's code to the letter; at a trained optimum its sum nearly cancels.
# - `top_k` chooses exactly `round(r_bayes * n)` entries; the same scores give the same masks. Whole channels: at most
#   that many. `cost_aware` keeps the choice to late weights, whose samples are cheap.
# - A bias right before a batch norm has no gradient in training mode (`biases_before_batch_norm` names it).
#
# ## Exercises
#
# 1. Two weights have the batch gradients $(2, -2, 2)$ and $(1, 1, 1)$. Which ranks first under `fisher`, which under
#    `paper`?
#
#    <details><summary>Answer</summary>
#
#    `fisher`: 4 against 1, the first. `paper`: $2^2 = 4$ against $3^2 = 9$, the second.
#    </details>
# 2. When are `fisher` and `per_example` the same?
#
#    <details><summary>Answer</summary>
#
#    With batches of one example. In larger batches the examples' gradients partly cancel before they are squared.
#    </details>
# 3. Why does `top_k` not take every score above a threshold?
#
#    <details><summary>Answer</summary>
#
#    Equal scores fall on the same side of it, so the number chosen can be far from what was asked: with half of all
#    scores 0, no threshold gives 70 %.
#    </details>
# 4. Train the networks for 2 epochs instead of 40. What becomes of the overlap under `paper`?
#
#    <details><summary>Answer</summary>
#
#    Far from the optimum the batch gradients point the same way, their sum does not cancel, and it rises (0.56 to 0.79
#    for half of the data and all when this was written). The claim of section 7 is about trained networks only.
#    </details>
# 5. In which network does `cost_aware` cost no saliency at all?
#
#    <details><summary>Answer</summary>
#
#    In one whose most salient `k` entries all lie in late layers; or with `cost_aware=1`.
#    </details>
#
# ## References
#
# - Abboud, Lombaert, Kadoury (2024). *Sparse Bayesian Networks: Efficient Uncertainty Quantification in Medical Image
#   Analysis*. MICCAI.
# - Kirkpatrick et al. (2017). *Overcoming catastrophic forgetting in neural networks*. PNAS 114.
# - Sung, Nair, Raffel (2021). *Training Neural Networks with Fixed Sparse Masks*. NeurIPS 34.
# - Molchanov, Mallya, Tyree, Frosio, Kautz (2019). *Importance Estimation for Neural Network Pruning*. CVPR.
