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
# **The weights with large gradients matter most to the loss; the top `k = round(r_bayes * n)` of them become
# Bayesian.**
#
# Why these? The loss is most sensitive to them: the same noise changes predictions most when it is added to them, so a
# few are enough to make samples differ. But weights that the loss is sensitive to are also well determined by the data,
# and an exact posterior would be narrowest here. The paper chooses by sensitivity; nobody has proved that
# this is best. [What works](../09_what_works.ipynb) compares it with a random choice.
#
# - *You will see*: six scores, the gradient pass, the selection of the top k, where these lie, and what they cost.
# - *Words*: a *weight* is, as in Keras, an array such as a kernel; an *entry* is one number of it. A *Bayesian* entry
#   has a distribution. A *mask* says which entries are Bayesian. A *sample* is the network with each Bayesian entry
#   drawn once. `r_bayes` is the share of the *eligible* entries that become Bayesian, and `n` counts all eligible ones:
#   the trainable entries outside normalisation layers. More words: [glossary](../../docs/glossary.md).
# - *You need*: gradients of a loss. *Runs in*: 30 seconds (CPU).

# %%
"""Saliency of weights by gradients, the top-k selection, and masks."""

from __future__ import annotations

import functools
import hashlib
import warnings
import zlib
from collections.abc import Mapping, Sequence

import sbn_tf  # noqa: F401 (first: it silences TensorFlow's log)
import keras
import numpy as np

from sbn_tf.core import masks as masks_core
from sbn_tf.core import passes, selection
from sbn_tf.core.checks import check_fraction
from sbn_tf.core.gradients import add_scaled, dense, seed_copies, value_and_gradients, zeros
from sbn_tf.core.graph import Graph
from sbn_tf.core.recorder import EpochRecorder, first_replica
from sbn_tf.core.selection import captured, overlap
from sbn_tf.core.weights import biases_before_batch_norm, eligible_weights, named_weights, weights_of

if keras.backend.backend() == "tensorflow":  # masks and selections work on other backends too
    import tensorflow as tf

# %%
__all__ = ["Masks", "SaliencyRecorder", "one_per_channel", "saliency", "saliency_against_cost", "top_k"]
__all__ += ["biases_before_batch_norm", "captured", "eligible_weights", "named_weights", "overlap"]  # of core

# %% [markdown]
# ## 1. What is a score?
#
# Take two entries and two batches. The first entry has the gradients 3 and -3, which cancel. The second has 1 and 1,
# which do not. The two main scores are the mean of the squares and the square of the sum.

# %% tags=["active-ipynb"]
# import pandas as pd
# from sklearn.datasets import make_moons
#
# gradients_by_hand = np.array([[3.0, 1.0], [-3.0, 1.0]])  # (batches, weights)
# by_hand = {"fisher": (gradients_by_hand**2).mean(axis=0), "paper": gradients_by_hand.sum(axis=0) ** 2}
# pd.DataFrame(by_hand, index=["first entry", "second entry"])

# %% [markdown]
# `fisher` ranks the first entry higher, `paper` the second. Section 6 asks which is right for a trained network.
#
# Now all six. Let $g_b$ be the gradient of batch $b$'s mean loss at the trained weights, $n_b$ its number of examples
# and $N = \sum_b n_b$:
#
# | score | definition | source |
# |---|---|---|
# | `fisher` (the default) | $\frac1N \sum_b n_b\, g_b^2$ | the Fisher's diagonal from batches, up to scale |
# | `paper` | $\big(\sum_b g_b\big)^2$, network in training mode | the paper's code |
# | `per_example` | $\frac1N \sum_i g_i^2$ | the empirical Fisher's diagonal (Kirkpatrick et al. 2017) |
# | `magnitude` | $\lvert w \rvert$ | pruning by size |
# | `taylor` | $\frac1N \sum_b n_b\, (w\, g_b)^2$ | Molchanov et al. 2019, eq. 8 |
# | `random` | uniform numbers | the control |
#
# The *Fisher information* is the expected squared gradient of the log likelihood, over labels drawn from the model; the
# *empirical* one takes the labels of the data. (Sung et al. 2021 use it to choose the weights to train.) Near an
# optimum the gradients of examples have a mean of about 0, so the expected square of a batch's mean gradient is that of
# one example divided by the batch size: `fisher` ranks weights nearly as `per_example`, which needs batches of one. Why
# $n_b$? Without it a last batch of one example would count too much: the square of its noise is 32 times that of a
# batch of 32. In an epoch of 20 batches that is more than half of the score. The scores are computed from sums over the
# batches. Two scores need no gradients:


# %%
class _Sums:
    """Sums over batches of `n * gradient ** 2`, or of `gradient` for "paper": one float32 array for each weight."""

    def __init__(self, weights, score, **options):
        self.weights, self.score = weights, score
        self.totals = {key: zeros(weight.variable.shape, **options) for key, weight in weights.items()}

    def add(self, gradients, num_examples):
        for key, gradient in gradients.items():
            if self.score == "paper":
                add_scaled(self.totals[key], 1, dense(gradient))
            else:
                add_scaled(self.totals[key], num_examples, keras.ops.square(dense(gradient)))

    def scores(self, num_examples):
        totals = {key: first_replica(total) for key, total in self.totals.items()}
        if self.score == "paper":
            return {key: total**2 for key, total in totals.items()}
        scores = {key: total / np.float32(num_examples) for key, total in totals.items()}
        if self.score == "taylor":
            return {key: _values(self.weights[key]) ** 2 * score for key, score in scores.items()}
        return scores


def _values(weight):
    return keras.ops.convert_to_numpy(weight.variable).astype("float32")


def _without_data(weights, score, seed):
    if score == "magnitude":
        return {key: np.abs(_values(weight)) for key, weight in weights.items()}
    shapes = {key: tuple(weight.variable.shape) for key, weight in weights.items()}
    return {k: np.random.default_rng([seed, zlib.crc32(k.encode())]).random(s, "float32") for k, s in shapes.items()}


# %% [markdown]
# ## 2. How are the gradients taken?
#
# By TensorFlow's `GradientTape`, one batch at a time (on JAX and torch: `core/gradients.py`). The layers run inside
# `keras.StatelessScope`: what they assign (running statistics, dropout's next seed) stays in the scope, so the model
# cannot change. Only the seeds are carried on, in copies; otherwise every batch would get the same dropout mask.


# %%
class _Gradients:
    """Loss of one batch and its gradients; the model stays as it is."""

    def __init__(self, model, weights, loss, training):
        self.model, self.loss, self.training = model, loss, training
        self.variables = {key: weight.variable for key, weight in weights.items()}
        self.seeds, self.missing = seed_copies(model), []  # pairs (variable, copy)

    def __call__(self, x, y, sample_weight=None):
        def loss_of(values=()):
            with keras.StatelessScope([*values, *self.seeds]) as scope:
                y_pred = self.model(x, training=self.training)
            loss = passes.mean_loss(self.loss, y, y_pred, sample_weight)
            return loss, [scope.get_current_value(seed) for seed, _ in self.seeds]

        loss, seeds, gradients = value_and_gradients(loss_of, self.variables, self.model.variables, _by_tape)
        for (_, copy), seed in zip(self.seeds, seeds, strict=True):
            copy.assign(seed)
        self.missing = [key for key, gradient in gradients.items() if gradient is None]
        return loss, {key: gradient for key, gradient in gradients.items() if gradient is not None}


def _by_tape(loss_of, variables):
    values = {key: variable.value for key, variable in variables.items()}
    with tf.GradientTape(watch_accessed_variables=False) as tape:
        tape.watch(list(values.values()))
        loss, seeds = loss_of()
    return loss, seeds, tape.gradient(loss, values)


# %% [markdown]
# `add_up` (in `core/passes.py`) goes through the data: it cuts batches, compiles the step and stops at a NaN.


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
    """Score of every eligible entry, key -> float32 array, from one pass over the data. The model does not change.

    Args:
        model: built `keras.Model`, at its trained weights.
        data: batches of (x, y) or (x, y, sample_weight), or a tuple of arrays, cut in their order: shuffle arrays
            that are sorted by class. "magnitude" and "random" need no data.
        loss: Keras loss, its name, or a callable (y, y_pred) -> losses; None: the compiled loss, without regularisers.
        score: "fisher", "paper", "per_example" (as slow as batches of one), "magnitude", "taylor" or "random".
        batch_statistics: run in training mode (batch norm uses the batch, dropout is on). None: for "paper" only.
        max_batches: at most this many; None: all. batch_size: for a tuple of arrays. seed: for "random".
        include, exclude: patterns on keys, see `eligible_weights`.

    Raises:
        ValueError: a wrong argument or batch, or a loss or gradient that is not finite.
    """
    loss = getattr(model, "loss", None) if loss is None else loss
    passes.check_options(score, max_batches, data, loss)
    weights = eligible_weights(model, include, exclude)
    if score in ("magnitude", "random"):
        return _without_data(weights, score, seed)
    training = score == "paper" if batch_statistics is None else batch_statistics
    gradients, sums = _Gradients(model, weights, loss, training), _Sums(weights, score, trainable=False)
    return sums.scores(passes.add_up(gradients, sums, data, batch_size, max_batches, verbose))


# %% [markdown]
# A check: if the loss is a linear network's output, its gradients are the inputs. With the gradients of section 1 as
# inputs, the scores must be those of section 1. A weight's key is the path of layer names to it; `include="decoder*"`
# and `exclude=["*/bias"]` limit the keys that `eligible_weights` lists.

# %% tags=["active-ipynb"]
# network = keras.Sequential([keras.Input((2,)), keras.layers.Dense(1, use_bias=False, name="out")])
# batches = [(inputs[None], np.zeros((1, 1))) for inputs in gradients_by_hand]
# for score, values in by_hand.items():
#     found = saliency(network, batches, lambda y, output: output, score=score, verbose=False)
#     print(score, {key: scores.ravel().tolist() for key, scores in found.items()})
#     assert np.allclose(found["out/kernel"].ravel(), values)

# %% [markdown]
# ## 3. Do the scores need a pass of their own?
#
# No: the last epoch of training computes the gradient of every batch. A callback adds $T \leftarrow T + n_b\, g_b^2$ as
# the optimiser receives each gradient. Two things differ from a separate pass: the weights still move, and the network
# runs in training mode. `EpochRecorder` (`core/recorder.py`) listens to the optimiser; the sums are those of section 1.


# %%
class SaliencyRecorder(EpochRecorder):
    """Scores of `saliency` from the gradients of an epoch of `fit`, without a pass of their own.

    Other epochs cost nothing. After `fit`, even if it fails, the model is free of the recorder. The gradients are those
    of training: dropout is on, class and sample weights count. Gradients of weight regularisers are subtracted;
    other losses that layers add stay in. Under `tf.distribute` a batch is the global one.

    Args:
        score: "fisher", "paper" or "taylor" (with the weights as they are after the epoch).
        epoch: "last"; "every" (the sums restart each epoch, so training may stop early at any epoch); or one epoch's
            number, from 0.
        include, exclude: patterns on keys, see `eligible_weights`.
    """

    def __init__(self, score: str = "fisher", *, epoch: int | str = "last", include=None, exclude=None):
        if score not in ("fisher", "paper", "taylor"):
            raise ValueError(f'Expected score "fisher", "paper" or "taylor". Received: score={score!r}')
        super().__init__(functools.partial(_Sums, score=score), epoch=epoch, include=include, exclude=exclude)
        self.score = score


# %% [markdown]
# The oracle is the pass of section 2. With a learning rate of 0 the weights stand still, so both must agree. Clipping
# comes after the recorder and must not affect it.

# %% tags=["active-ipynb"]
# rng = np.random.default_rng(0)
# inputs, labels = rng.normal(size=(330, 2)), rng.integers(0, 2, (330, 1))  # 10 batches of 32 and one of 10
# network = keras.Sequential([keras.Input((2,)), keras.layers.Dense(4, "tanh"), keras.layers.Dense(1, "sigmoid")])
# network.compile(keras.optimizers.Adam(0.0, clipnorm=0.01), "binary_crossentropy")
# recorder = SaliencyRecorder()
# network.fit(inputs, labels, epochs=3, shuffle=False, verbose=0, callbacks=[recorder])
# own = saliency(network, (inputs, labels), batch_statistics=True, verbose=False)
# equal = [np.allclose(own[key], values, rtol=1e-4) for key, values in recorder.scores().items()]
# print("recorded as by a pass of its own:", equal)
# assert all(equal)

# %% [markdown]
# ## 4. Which entries are chosen?
#
# Exactly `k = round(r_bayes * n)`: those with the largest scores, and among equal scores the earlier ones. A threshold
# would take too many where scores are equal, and the scores of all dead units are 0. `np.partition` finds the k-th
# largest value without sorting; the rest is counting.


# %%
def _largest(values, k):
    """Boolean array of the k largest entries; among equal ones the earlier."""
    chosen = np.zeros(values.size, bool)
    if k == 0:
        return chosen
    threshold = np.partition(values, values.size - k)[values.size - k]
    chosen[values > threshold] = True
    chosen[np.flatnonzero(values == threshold)[: k - chosen.sum()]] = True
    return chosen


# %% [markdown]
# The result is a `Masks`: a mapping from keys to boolean arrays that can be saved, checked against a model and shown.


# %%
class Masks(Mapping):
    """Which entries of which weights are Bayesian: key -> boolean array of the weight's shape."""

    def __init__(self, masks: Mapping):
        self._masks = masks_core.checked_masks(masks)

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
        """Number of Bayesian entries."""
        return int(sum(m.sum() for m in self.values()))

    @property
    def num_weights(self) -> int:
        """Number of all entries."""
        return int(sum(m.size for m in self.values()))

    @property
    def r_bayes(self) -> float:
        """Fraction of the entries that is Bayesian, 0..1."""
        return self.num_bayesian / max(self.num_weights, 1)

    def digest(self) -> str:
        """Ten hexadecimal digits of a hash of the chosen entries, which other masks almost certainly do not share."""
        found = hashlib.blake2b(digest_size=5)
        for key, mask in self.items():
            found.update(f"{key}{mask.shape}".encode())
            found.update(np.packbits(mask).tobytes())
        return found.hexdigest()

    def save(self, path) -> None:
        """Write an npz file, whole or not at all."""
        masks_core.save_masks(path, self)

    @classmethod
    def load(cls, path) -> Masks:
        """Read what `save` wrote."""
        return cls(masks_core.load_masks(path))

    def check(self, model) -> None:
        """Raise a ValueError unless these masks fit this model's weights."""
        masks_core.checked_masks(self, model)

    def table(self):
        """A pandas DataFrame with a row for each weight, and one for all."""
        return masks_core.table_of(self)


# %% [markdown]
# Now the choice. `scope`: one ranking of all, the same share of each weight, or whole channels (section 5).


# %%
def _select(scores, r_bayes, scope, weights, allowed):
    """Masks of the k largest scores, all of them in the weights `allowed`."""
    n = sum(np.size(s) for s in scores.values())
    k = round(float(r_bayes) * n)
    found = {key: np.ravel(s) for key, s in scores.items() if key in allowed}
    sizes = [s.size for s in found.values()]
    if scope == "channel":
        parts = selection.whole_channels({key: scores[key] for key in found}, weights, k).values()
    elif scope == "layer":
        counts = selection.counts_by_layer(sizes, r_bayes, n)
        parts = [_largest(s, count) for s, count in zip(found.values(), counts, strict=True)]
    else:
        parts = np.split(_largest(np.concatenate(list(found.values())), k), np.cumsum(sizes)[:-1])
    masks = {key: np.zeros(np.shape(s), bool) for key, s in scores.items()}
    return Masks(masks | {key: part.reshape(masks[key].shape) for key, part in zip(found, parts, strict=True)})


# %%
def top_k(
    scores: Mapping,
    r_bayes: float,
    *,
    scope: str = "global",
    model: keras.Model | None = None,
    cost_aware: float | None = None,
) -> Masks:
    """Masks of the `k = round(r_bayes * n)` largest scores; optionally whole channels or late, cheap weights.

    Args:
        scores: key -> array, from `saliency`.
        r_bayes: fraction of all scored entries to be Bayesian, 0..1.
        scope: "global" (one ranking), "layer" (the same share of each weight, k entries in all), or "channel" (whole
            output channels by their mean saliency, without those that no longer fit: at most k entries).
        model: the network of the scores; needed by "channel" and `cost_aware`.
        cost_aware: highest share of the network's operations that may run again for each sample, 0..1; None: any.

    Raises:
        ValueError: a wrong argument, no channel that fits, or fewer than k entries in late enough weights.
    """
    check_fraction("r_bayes", r_bayes)
    selection.check_selection(scores, scope, model, cost_aware)
    weights = None if model is None else weights_of(scores, model)
    select = functools.partial(_select, scores, r_bayes, scope, weights)
    if cost_aware is None:
        masks = select(set(scores))
    else:
        masks = selection.best_within(scores, r_bayes, Graph(model), cost_aware, select)
    if r_bayes > 0 and not masks.num_bayesian:
        asked = f"r_bayes={r_bayes:g} of {masks.num_weights:,} entries"
        warnings.warn(f"No entry is Bayesian: {asked} rounds to 0.", stacklevel=2)
    return masks


# %% [markdown]
# By hand: five entries, `k = round(0.4 * 5) = 2`. The 3 is chosen, and of the equal scores the earliest.

# %% tags=["active-ipynb"]
# masks = top_k({"a/kernel": np.array([3.0, 1.0, 2.0]), "b/kernel": np.array([2.0, 2.0])}, 0.4)
# print({key: mask.astype(int).tolist() for key, mask in masks.items()})
# assert masks.num_bayesian == round(0.4 * 5)
# masks.table()

# %% [markdown]
# ## 5. What do whole channels and late weights cost?
#
# Single entries are scattered over a kernel. If they fill whole output channels instead, the random part of a
# convolution is a small dense one. That is cheap, but such a selection has less saliency than the best single entries.
# Each channel has $n_c$ entries and the saliency $s_c = \sum_{i \in c} s_i$. `scope="channel"` takes channels in the
# order of $s_c / n_c$, and skips those that no longer fit. By $s_c$ alone the channels with most entries would win.
#
# By hand: a layer with 2 inputs and 3 outputs has three channels of two kernel entries and one bias entry each. Their
# sums are 3, 6 and 2. With $k = 4$ one of them fits. (`one_per_channel` is the other extreme.)

# %% tags=["active-ipynb"]
# small = keras.Sequential([keras.Input((2,)), keras.layers.Dense(3, name="a")])
# by_hand = {"a/kernel": np.array([[1.0, 5.0, 0.0], [1.0, 0.0, 2.0]]), "a/bias": np.array([1.0, 1.0, 0.0])}
# channels, entries = top_k(by_hand, 0.4, scope="channel", model=small), top_k(by_hand, 0.4)
# print({key: mask.astype(int).tolist() for key, mask in channels.items()})
# print(f"saliency kept: channels {captured(by_hand, channels):.2f}, single entries {captured(by_hand, entries):.2f}")
# assert channels["a/kernel"].tolist() == [[False, True, False]] * 2 and channels.num_bayesian == 3

# %% [markdown]
# Why are late weights cheaper? Layers before the first Bayesian weight give the same output for every sample and run
# once. The *fan-out* $f(W)$ of weights $W$ is the share of the network's multiply-adds that use one of them or come
# after one. $S$ samples then cost $1 + (S - 1) f$ passes. `cost_aware` bounds $f$: it takes the $k$ entries with most
# saliency whose weights have $f(W) \le$ `cost_aware`. In a chain of layers the result is optimal: the last layers are
# allowed, and all their entries are ranked together. If the graph branches, it tries a few sets and may miss the best.


# %%
def one_per_channel(scores: Mapping, model: keras.Model) -> Masks:
    """Masks of the most salient entry of each output channel of each kernel of `model`; no entry of biases."""
    return Masks(selection.best_of_each_channel(scores, weights_of(scores, model)))


def saliency_against_cost(
    scores: Mapping, r_bayes: float, model: keras.Model, *, num_samples: int = 5, scope: str = "global"
) -> tuple[np.ndarray, np.ndarray]:
    """Share of saliency that `top_k(..., cost_aware=...)` keeps, against its samples' cost.

    Returns `(costs, kept)`, both rising, of shape (points,). `costs`: passes of the network, `1 + (num_samples - 1) *
    fan_out`. `kept`: the share of all saliency. The other arguments are those of `top_k`.
    """
    check_fraction("r_bayes", r_bayes)
    selection.check_selection(scores, scope, model, None)
    select = functools.partial(_select, scores, r_bayes, scope, weights_of(scores, model))
    return selection.kept_against_cost(scores, r_bayes, Graph(model), select, num_samples)


# %% [markdown]
# By hand: three layers have 8, 8 and 4 multiply-adds, and two salient entries each, which both score 6 in the first, 3
# in the second, 1 in the third. One in the last layer costs $1 + 4 \cdot 4/20 = 1.8$ passes, in the second 3.4.

# %% tags=["active-ipynb"]
# layers = [keras.layers.Dense(n, use_bias=False, name=name) for n, name in ((4, "a"), (2, "b"), (2, "c"))]
# small = keras.Sequential([keras.Input((2,)), *layers])
# shapes = {key: weight.variable.shape for key, weight in named_weights(small).items()}
# scores = {key: size * np.eye(*shapes[key]) for key, size in zip(shapes, (6, 3, 1), strict=True)}  # 20 in all
# costs, kept = saliency_against_cost(scores, 0.05, small, num_samples=5)
# print("passes", costs.tolist(), "saliency kept", kept.tolist())
# assert np.allclose(costs, [1.8, 3.4, 5.0]) and np.allclose(kept, [1 / 20, 3 / 20, 6 / 20])

# %% [markdown]
# ## 6. Is the score a signal, or noise?
#
# The mean square of $B$ batch gradients has two parts:
#
# $$ \frac1B \sum_b g_b^2 = \underbrace{\bar g^2}_{\text{the paper's, up to } B^2}
# + \underbrace{\frac1B \sum_b (g_b - \bar g)^2}_{\text{spread between batches}},
# \qquad \bar g = \frac1B \sum_b g_b . $$
#
# With batches of equal size `fisher` has both parts, `paper` only the first. In section 1, entry 1: $3^2 = 0^2 + 3^2$.
#
# > **Misconception: "$(\sum_b g_b)^2$ is the squared gradient of the whole loss, so it is the better score."**
# > Training goes where that gradient is 0, for *every* weight, salient or not, and stops close by. What is left is
# > $\bar g \approx H (w - w^*)$ ($H$: the curvature, $w^*$: the optimum). It says where the optimiser happened to
# > stop, so its square ranks noise. At $w^*$ the batches' spread is 0 only if the fit is exact.
#
# Is that so? Take three small networks, trained until their loss hardly moves, on two noisy half-moons. A selection
# that means something should be nearly the same when it is made from half of the training data.

# %% tags=["active-ipynb"]
# def trained_network(x, y, seed):
#     keras.utils.set_random_seed(seed)
#     hidden = [keras.layers.Dense(16, "tanh", name=name) for name in ("first", "second")]
#     network = keras.Sequential([keras.Input((2,)), *hidden, keras.layers.Dense(1, "sigmoid", name="last")])
#     network.compile(keras.optimizers.Adam(0.01), "binary_crossentropy")
#     network.fit(x, y, batch_size=32, epochs=30, verbose=0)
#     network.optimizer.learning_rate = 0.0005
#     network.fit(x, y, batch_size=32, epochs=10, verbose=0)
#     return network

# %% [markdown]
# Each score chooses 10 % of the entries, from each half of the data and from all. Random choices would share 10 %.

# %% tags=["active-ipynb", "nbval-ignore-output"]
# def choose(network, x, y, score):
#     return top_k(saliency(network, (x, y), score=score, verbose=False), 0.1)
#
# rows = []
# for seed in (3, 4, 5):
#     x, y = make_moons(512, noise=0.3, random_state=seed)
#     network = trained_network(x, y, seed)
#     for score in ("fisher", "paper"):
#         halves = [choose(network, x[part], y[part], score) for part in (slice(256), slice(256, None))]
#         shares = overlap(halves[0], choose(network, x, y, score)), overlap(*halves)
#         rows.append((score, seed, *shares))
# agreement = pd.DataFrame(rows, columns=["score", "network", "a half and all data", "the two halves"])
# mean = agreement.groupby("score")["a half and all data"].mean()
# assert mean["fisher"] > mean["paper"] + 0.1
# agreement.set_index(["score", "network"]).sort_index().round(2)

# %% [markdown]
# *Reading*: `fisher` chooses nearly the same entries from half of the data as from all (0.94 or more when this was
# written), `paper` does not (0.24 to 0.56): over all data its sum has nearly cancelled. Why, then, can the *two halves*
# agree under `paper`? At an optimum the halves' sums are opposite, $\sum_A g \approx -\sum_B g$, so their squares
# are equal. That agreement is a property of the optimum, not of the weights.
#
# ## 7. Where do the chosen weights lie?
#
# The pictures are of the last of the three networks: the share of each weight's entries that `fisher` chose (left), and
# the saliency kept by cheaper choices (right; 4 % are chosen, so that the last layer could hold all).

# %% tags=["active-ipynb", "nbval-ignore-output"]
# import matplotlib.pyplot as plt
# from sbn_tf.experiments.plots import plot_masks_by_layer, plot_saliency_against_cost
#
# masks, scores = choose(network, x, y, "fisher"), saliency(network, (x, y), verbose=False)
# figure, axes = plt.subplots(1, 2, figsize=(10, 2.8), layout="constrained", width_ratios=(3, 2))
# sizes = [int(m.sum()) for m in masks.values()], [m.size for m in masks.values()]
# plot_masks_by_layer(axes[0], list(masks), *sizes)
# plot_saliency_against_cost(axes[1], *saliency_against_cost(scores, 0.04, network))
# plt.show()

# %% [markdown]
# *Reading*: a bar beyond the dashed line is a weight with more than its share of the 10 %. Most of the chosen entries
# are in the first layer, which sees the data. Each point on the right is the best selection at its cost: the last
# layer alone is cheap, but loses nearly all saliency. Does the recorder, in one more epoch, choose the same?

# %% tags=["active-ipynb", "nbval-ignore-output"]
# recorder = SaliencyRecorder()
# network.fit(x, y, batch_size=32, verbose=0, callbacks=[recorder])
# print(f"entries in common: {overlap(top_k(recorder.scores(), 0.1), choose(network, x, y, 'fisher')):.2f}")

# %% [markdown]
# ## Summary
#
# - `saliency` passes once over the training data; `SaliencyRecorder` takes nearly the same from an epoch of `fit`.
# - `paper` is the paper's code to the letter; at a trained optimum its sum nearly cancels.
# - `top_k` chooses `round(r_bayes * n)` entries (whole channels: at most so many). `cost_aware`: late ones.
# - A bias right before a batch norm has no gradient in training mode (`biases_before_batch_norm` names it).
#
# ## Exercises
#
# 1. Two weights have the batch gradients $(2, -2, 2)$ and $(1, 1, 1)$. Which ranks first under `fisher`, under `paper`?
#    <details><summary>Answer</summary>The first by `fisher`, 4 to 1; the second by `paper`, $3^2$ to $2^2$.</details>
# 2. Why does `top_k` not take every score above a threshold?
#    <details><summary>Answer</summary>Equal scores fall on the same side of it, so the number chosen can be far from
#    what was asked: with half of all scores 0, no threshold gives 70 %.</details>
# 3. Train the networks for 2 epochs instead of 40. What happens to the overlap under `paper`?
#    <details><summary>Answer</summary>It rises: far from the optimum the batch gradients point the same way.</details>
#
# ## References
#
# - Abboud, Lombaert, Kadoury (2024). *Sparse Bayesian Networks*. MICCAI.
# - Kirkpatrick et al. (2017). *Overcoming catastrophic forgetting in neural networks*. PNAS 114.
# - Sung, Nair, Raffel (2021). *Training Neural Networks with Fixed Sparse Masks*. NeurIPS 34.
# - Molchanov, Mallya, Tyree, Frosio, Kautz (2019). *Importance Estimation for Neural Network Pruning*. CVPR.
