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
# - *You will see*: a name for every weight, one gradient pass over the training set, six scores, the selection and
#   where in the network it falls.
# - *You need*: gradients of a loss.
# - *Runs in*: 30 seconds (CPU).

# %% tags=["active-ipynb"]
# import os
# import warnings
#
# warnings.filterwarnings("ignore", message="IProgress")  # tqdm's bar is text where ipywidgets are missing
# os.environ["TF_CPP_MIN_LOG_LEVEL"] = "3"  # TensorFlow's start-up messages are no part of the lesson

# %%
"""Saliency of weights by gradients, the top-k selection, and masks."""

from __future__ import annotations

import fnmatch
import os
import tempfile
import warnings
import zlib
from collections.abc import Mapping
from typing import NamedTuple

import keras
import numpy as np
import tensorflow as tf
from tqdm.auto import tqdm

__all__ = [
    "Masks",
    "Weight",
    "biases_before_batch_norm",
    "eligible_weights",
    "named_weights",
    "overlap",
    "saliency",
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


def named_weights(model) -> dict[str, Weight]:
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


def eligible_weights(model, include=None, exclude=None) -> dict[str, Weight]:
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


def biases_before_batch_norm(model) -> list[str]:
    """Keys of biases whose layer feeds a batch normalisation directly.

    In training mode such a bias has no effect (the batch mean takes it away), so its gradient is zero and a KL alone
    would shape its posterior. Padding or dropout in between keeps some effect: such a bias is not listed.
    """
    keys = {id(w.layer): w.key for w in named_weights(model).values() if w.name == "bias"}
    layers, biases = [model, *model._flatten_layers(include_self=False)], []
    for layer in layers:
        if not isinstance(layer, keras.layers.BatchNormalization) or not layer.trainable:
            continue
        for node in layer._inbound_nodes:
            for parent in node.parent_nodes:
                operation = parent.operation
                while type(operation).__name__.startswith("Cropping") and len(operation._outbound_nodes) == 1:
                    operation = operation._inbound_nodes[0].parent_nodes[0].operation
                if len(operation._outbound_nodes) != 1:  # used elsewhere too, where it may have an effect
                    continue
                linear = getattr(getattr(operation, "activation", None), "__name__", "linear") == "linear"
                if linear and id(operation) in keys and keys[id(operation)] not in biases:
                    biases.append(keys[id(operation)])
    return biases


# %% [markdown]
# ## 2. How salient is a weight?
#
# With $g_b$ the gradient of batch $b$'s mean loss at the trained weights:
#
# | score | definition | source |
# |---|---|---|
# | `fisher` | $\frac1B \sum_b g_b^2$ | squared batch gradients: the empirical Fisher's diagonal, up to scale |
# | `paper` | $\big(\sum_b g_b\big)^2$, network in training mode | the paper's code |
# | `per_example` | $\frac1N \sum_i g_i^2$ | the empirical Fisher's diagonal (Kirkpatrick et al. 2017) |
# | `magnitude` | $\lvert w \rvert$ | pruning by size |
# | `taylor` | $\frac1B \sum_b (w\, g_b)^2$ | Molchanov et al. 2019 |
# | `random` | uniform numbers | the control |
#
# At a trained optimum $\sum_b g_b \approx 0$ by definition: what is left of it is noise, and so may be the paper's
# choice. The squares of single batches do not cancel. By hand: batch gradients $+3$ and $-3$ give `fisher` 9 and
# `paper` 0; $+1$ and $+1$ give 1 and 4. The two scores rank these two weights the other way round.
#
# Every batch counts once, also a smaller last one: that is what the sum over batches in the paper's code does.


# %%
def saliency(
    model,
    data,
    loss,
    *,
    score: str = "fisher",
    batch_statistics: bool | None = None,
    max_batches: int | None = None,
    batch_size: int = 32,
    seed: int = 0,
    include=None,
    exclude=None,
    verbose: bool = True,
) -> dict[str, np.ndarray]:
    """Saliency score of every eligible weight entry. Nothing in the model changes.

    Args:
        model: built `keras.Model`, at its trained weights.
        data: iterable of (x, y) or (x, y, sample_weight) batches (a `tf.data.Dataset`), or a pair of arrays.
        loss: Keras loss or its name, or a callable (y, y_pred) -> loss, averaged.
        score: one of "fisher", "paper", "per_example", "magnitude", "taylor", "random".
        batch_statistics: network in training mode (batch norm by the batch, dropout on). None: for "paper" alone.
        max_batches: stop after so many batches; None: all.
        batch_size: of a pair of arrays.
        seed: of "random": the same numbers for the same key.
        include, exclude: patterns on keys, see `eligible_weights`.
        verbose: show a progress bar.

    Returns:
        dict key -> float32 array of the weight's shape, in the order of `eligible_weights`.

    Raises:
        ValueError: unknown score, unbuilt model, no data, or a loss or gradient that is not finite (the weight named).

    Reference: Abboud, Lombaert, Kadoury (2024), section 2.2.
    """
    if score not in SCORES:
        raise ValueError(f"Expected score to be one of {SCORES}. Received: score={score!r}")
    weights = eligible_weights(model, include, exclude)
    if score == "magnitude":
        return {k: np.abs(keras.ops.convert_to_numpy(w.variable)).astype("float32") for k, w in weights.items()}
    if score == "random":
        return {
            k: np.random.default_rng([seed, zlib.crc32(k.encode())]).random(tuple(w.variable.shape), "float32")
            for k, w in weights.items()
        }
    if isinstance(data, tuple) and len(data) == 2 and hasattr(data[0], "shape"):
        data = tf.data.Dataset.from_tensor_slices(data).batch(batch_size)
    training = score == "paper" if batch_statistics is None else batch_statistics
    state = [v for v in model.variables if not v.trainable]
    before = [tf.identity(v.value) for v in state]
    try:
        totals, num_batches = _accumulate(model, weights, data, loss, score, training, max_batches, verbose)
    finally:
        for variable, value in zip(state, before, strict=True):
            variable.assign(value)
    return {k: _finish(t.numpy(), score, num_batches) for k, t in zip(weights, totals, strict=True)}


# %%
def _finish(total, score, count):
    return (total**2 if score == "paper" else total / count).astype("float32")


def _mean_loss(loss):
    if isinstance(loss, str | dict):
        loss = keras.losses.get(loss)
    if isinstance(loss, keras.losses.Loss):
        return loss
    return lambda y, y_pred, sample_weight=None: tf.reduce_mean(
        loss(y, y_pred) if sample_weight is None else loss(y, y_pred) * sample_weight
    )


def _accumulate(model, weights, data, loss, score, training, max_batches, verbose):
    """One pass over the data in one compiled step; the sums stay on the device."""
    loss = _mean_loss(loss)
    variables = [w.variable.value for w in weights.values()]
    totals = [tf.Variable(tf.zeros(v.shape, "float32"), trainable=False) for v in variables]
    missing = []

    def gradients(x, y, sample_weight):
        with tf.GradientTape(watch_accessed_variables=False) as tape:
            tape.watch(variables)
            value = loss(y, model(x, training=training), sample_weight)
        found = tape.gradient(value, variables)
        missing[:] = [k for k, g in zip(weights, found, strict=True) if g is None]
        return value, [None if g is None else tf.cast(tf.convert_to_tensor(g), "float32") for g in found]

    def add(found):
        for total, variable, g in zip(totals, variables, found, strict=True):
            if g is not None and score == "taylor":
                g = g * tf.cast(variable, "float32")
            if g is not None:
                total.assign_add(g if score == "paper" else g**2)

    @tf.function(reduce_retracing=True)
    def step(x, y, sample_weight=None):
        if score == "per_example":
            value = tf.zeros(())
            for i in tf.range(tf.shape(keras.tree.flatten(x)[0])[0]):
                one = keras.tree.map_structure(
                    lambda t, i=i: None if t is None else t[i : i + 1], (x, y, sample_weight)
                )
                each, found = gradients(*one)
                add(found)
                value += tf.cast(each, "float32")
        else:
            value, found = gradients(x, y, sample_weight)
            add(found)
        return value

    count = 0
    try:
        total = len(data) if max_batches is None else max_batches
    except TypeError:  # a generator, or a dataset that does not know its length
        total = None
    for number, batch in enumerate(tqdm(data, total=total, desc="saliency", disable=not verbose)):
        if max_batches is not None and number >= max_batches:
            break
        value = float(step(*batch))
        if not np.isfinite(value):
            raise ValueError(f"Expected a finite loss. Received: {value} in batch {number}. Check inputs and weights.")
        count += int(keras.tree.flatten(batch[0])[0].shape[0]) if score == "per_example" else 1
    if not count:
        raise ValueError("Expected at least one batch of (x, y). Received: no data.")
    for key, sums in zip(weights, totals, strict=True):
        if not np.isfinite(sums.numpy()).all():
            raise ValueError(f"Gradients of {key!r} are not finite. Check the loss at the trained weights.")
    if missing:
        warnings.warn(f"The loss does not depend on {missing[:5]}: their score is 0.", stacklevel=3)
    return totals, count


# %% tags=["active-ipynb"]
# def score_by_hand(batch_gradients):
#     g = np.array(batch_gradients)
#     return {"fisher": float(np.mean(g**2)), "paper": float(np.sum(g) ** 2)}
#
# print(score_by_hand([3, -3]), score_by_hand([1, 1]))

# %% [markdown]
# ## 3. Which entries are chosen?
#
# Exactly `round(r_bayes * n)`, where `n` counts all entries that were scored: the largest scores, ties to the earlier
# key and position. A threshold on the score would take more than asked where scores are equal (dead units have 0).
# `scope="layer"` takes the same share of every weight instead.


# %%
class Masks(Mapping):
    """Which entries of which weights are Bayesian: key -> boolean array of the weight's shape.

    Raises:
        ValueError: an array that is not boolean.
    """

    def __init__(self, masks: Mapping):
        self._masks = {key: np.asarray(mask) for key, mask in masks.items()}
        for key, mask in self._masks.items():
            if mask.dtype != bool:
                raise ValueError(f"Expected boolean masks. Received: {mask.dtype} for {key!r}")

    def __getitem__(self, key):
        return self._masks[key]

    def __iter__(self):
        return iter(self._masks)

    def __len__(self):
        return len(self._masks)

    def __eq__(self, other):
        return (
            isinstance(other, Masks)
            and list(self) == list(other)
            and all(np.array_equal(self[k], other[k]) for k in self)
        )

    __hash__ = None

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
        return self.num_bayesian / self.num_weights

    def save(self, path) -> None:
        """Write an npz, whole or not at all."""
        path = os.fspath(path)
        handle, temporary = tempfile.mkstemp(dir=os.path.dirname(path) or ".", suffix=".npz")
        try:
            with os.fdopen(handle, "wb") as file:
                np.savez_compressed(file, **self._masks)
            os.replace(temporary, path)
        except BaseException:
            os.unlink(temporary)
            raise

    @classmethod
    def load(cls, path) -> Masks:
        """Read what `save` wrote."""
        try:
            with np.load(path, allow_pickle=False) as file:
                return cls({key: file[key] for key in file.files})
        except FileNotFoundError:
            raise
        except Exception as error:
            raise ValueError(f"Expected masks written by Masks.save in {path}. Received: {error}") from None

    def check(self, model) -> None:
        """Raise a ValueError unless these masks fit this model's weights."""
        weights = named_weights(model)
        unknown = [k for k in self if k not in weights]
        other = [k for k in self if k not in unknown and self[k].shape != tuple(weights[k].variable.shape)]
        if unknown or other:
            raise ValueError(
                f"These masks are of another model: {(unknown + other)[:3]} "
                f"{'are not weights' if unknown else 'have another shape'} of '{model.name}'. "
                "Make them with this model."
            )

    def table(self) -> str:
        """One line a weight: shape, entries, Bayesian entries, their share of the weight and of the selection."""
        lines = [f"{'weight':<36}{'shape':>20}{'entries':>12}{'Bayesian':>10}{'of weight':>11}{'of all':>9}"]
        chosen = max(self.num_bayesian, 1)
        for key, m in self.items():
            shape = "x".join(map(str, m.shape))
            lines.append(f"{key:<36}{shape:>20}{m.size:>12,}{m.sum():>10,}{m.mean():>11.1%}{m.sum() / chosen:>9.1%}")
        return "\n".join(lines)


# %%
def top_k(scores: Mapping, r_bayes: float, *, scope: str = "global") -> Masks:
    """Masks of the `round(r_bayes * n)` largest scores.

    Args:
        scores: key -> array, from `saliency`.
        r_bayes: fraction of all scored entries to be Bayesian, 0..1.
        scope: "global" (one ranking), or "layer" (the same share of each weight; the total is exact, what rounding
            leaves over goes to the weights with the largest remainders).

    Raises:
        ValueError: `r_bayes` outside [0, 1] or not a number, empty or non-finite scores, unknown scope.
    """
    if isinstance(r_bayes, bool) or not isinstance(r_bayes, int | float | np.number) or not 0 <= r_bayes <= 1:
        raise ValueError(f"Expected r_bayes to be a fraction in [0, 1]. Received: r_bayes={r_bayes!r}")
    if scope not in ("global", "layer"):
        raise ValueError(f'Expected scope "global" or "layer". Received: scope={scope!r}')
    if not scores or not all(np.size(s) for s in scores.values()):
        raise ValueError("Expected scores of at least one weight, from saliency(...). Received: empty scores.")
    for key, values in scores.items():
        if not np.isfinite(values).all():
            raise ValueError(f"Expected finite scores. Received: NaN or infinity in {key!r}.")
    sizes = np.array([np.size(s) for s in scores.values()])
    k = round(float(r_bayes) * int(sizes.sum()))
    if scope == "global":
        chosen = _largest(np.concatenate([np.ravel(s) for s in scores.values()]), k)
        parts = np.split(chosen, np.cumsum(sizes)[:-1])
    else:
        share = r_bayes * sizes
        counts = np.floor(share).astype(int)
        order = np.argsort(counts - share, kind="stable")
        counts[order[: k - counts.sum()]] += 1
        parts = [_largest(np.ravel(s), c) for s, c in zip(scores.values(), counts, strict=True)]
    return Masks({key: p.reshape(np.shape(s)) for (key, s), p in zip(scores.items(), parts, strict=True)})


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


# %% tags=["active-ipynb"]
# masks = top_k({"a/kernel": np.array([3.0, 1.0, 2.0]), "b/kernel": np.array([2.0, 2.0])}, 0.4)
# print({key: mask.astype(int).tolist() for key, mask in masks.items()})
# assert masks.num_bayesian == round(0.4 * 5)

# %% [markdown]
# ## 4. Is the score a signal, or noise?
#
# Three small networks, trained until their loss hardly moves, on two noisy half-moons. A selection that means something
# should be nearly the same when it is made from half of the training data.

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
# ## 5. Where do the chosen weights lie?

# %% tags=["active-ipynb", "nbval-ignore-output"]
# import matplotlib.pyplot as plt
#
# from sbn_tf.plots import plot_masks_by_layer
#
# masks = choose(network, x, y, "fisher")
# figure, axes = plt.subplots(figsize=(7, 2.6), layout="constrained")
# plot_masks_by_layer(axes, list(masks), [int(m.sum()) for m in masks.values()], [m.size for m in masks.values()])
# plt.show()

# %% [markdown]
# *Reading*: a bar to the right of the dashed line is a weight that got more than its share of the 10 %; no bar, none.

# %% [markdown]
# ## Summary
#
# - `saliency` passes once over the training data and leaves the model as it was; `fisher` is the default.
# - `paper` is the paper's code to the letter; at a trained optimum its sum nearly cancels.
# - `top_k` chooses exactly `round(r_bayes * n)` entries; the same scores give the same masks.
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
#    Far from the optimum the batch gradients point the same way, their sum does not cancel, and it should rise. Run it:
#    the claim of section 4 is about trained networks only.
#    </details>
#
# ## References
#
# - Abboud, Lombaert, Kadoury (2024). *Sparse Bayesian Networks: Efficient Uncertainty Quantification in Medical Image
#   Analysis*. MICCAI.
# - LeCun, Denker, Solla (1990). *Optimal Brain Damage*. NeurIPS 2.
# - Kirkpatrick et al. (2017). *Overcoming catastrophic forgetting in neural networks*. PNAS 114.
# - Sung, Nair, Raffel (2021). *Training Neural Networks with Fixed Sparse Masks*. NeurIPS 34.
# - Molchanov, Mallya, Tyree, Frosio, Kautz (2019). *Importance Estimation for Neural Network Pruning*. CVPR.
