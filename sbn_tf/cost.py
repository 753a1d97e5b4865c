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
# # Cost: what does a method really take?
#
# **Operations are counted from the traced graph, every backward pass included; parameters and bytes from the variables;
# time and memory are measured.**
#
# - *You will see*: what counts as an operation, a convolution counted by hand and by graph, where the work of a
#   training step goes, and why the paper's formula says 3.4 where the graph says 6.
# - *You need*: a convolution, a gradient; the lessons on [layers](layers.ipynb) and on
#   [partial Bayes](partial_bayes.ipynb) for the last sections. Words: [glossary](../../docs/glossary.md).
# - *Runs in*: 20 seconds (CPU).

# %% tags=["active-ipynb"]
# import sbn_tf  # first: it silences TensorFlow's log

# %%
"""Cost of a model: operations counted from traced graphs, parameters, bytes, time and memory."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import keras
import numpy as np

from sbn_tf.core import operations
from sbn_tf.core.checks import check_fraction
from sbn_tf.core.keras_internals import all_layers, own_trained
from sbn_tf.core.memory import measured
from sbn_tf.core.posterior import Posterior
from sbn_tf.core.specs import check_graphs, input_specs, target_specs
from sbn_tf.layers import masked_layers

if keras.backend.backend() == "tensorflow":  # sizes, time and memory are measured on other backends too
    import tensorflow as tf

__all__ = [
    "Flops",
    "bytes_of",
    "count_flops",
    "measured",
    "paper_flops",
    "parameters",
    "prediction_flops",
    "saliency_flops",
    "training_flops",
    "training_step",
]

# %% [markdown]
# ## 1. How many operations is a convolution?
#
# A FLOP (floating point operation) is one addition or one multiplication of real numbers. $B$ images give
# $H' \times W'$ windows each. A window of $k \times k$ pixels with $C_{\text{in}}$ channels is summed up once for each
# of $C_{\text{out}}$ filters, and each product is a multiplication *and* an addition:
#
# $$ 2 \cdot \underbrace{B\, H' W'}_{\text{windows}} \cdot \underbrace{k^2\, C_{\text{in}}}_{\text{products in a sum}}
#  \cdot\; C_{\text{out}} . $$
#
# *Source*: Molchanov et al. (2017), appendix, without its term for the bias, which is an operation of its own here.
#
# By hand: 3 x 3 windows on one image of 8 x 8 with 4 channels, 6 filters, "same" padding: 64 windows, each a sum of
# $3 \cdot 3 \cdot 4 = 36$ products for each of 6 filters: $2 \cdot 64 \cdot 36 \cdot 6 = 27{,}648$ operations.
#
# TensorFlow can say the same. `tf.function` traces a Python function once, with shapes instead of numbers, into a
# *graph* of operations: nothing is computed, and every shape is there to be read.

# %% tags=["active-ipynb"]
# image, filters = tf.TensorSpec((1, 8, 8, 4)), tf.TensorSpec((3, 3, 4, 6))
# traced = tf.function(lambda x, kernel: tf.nn.conv2d(x, kernel, 1, "SAME")).get_concrete_function(image, filters)
# for op in traced.graph.get_operations():
#     print(op.type.ljust(12), *(t.shape for t in op.inputs), "->", *(t.shape for t in op.outputs))

# %% [markdown]
# The code is the formula, with the sizes of the operation's tensors. Each pair of an input and a weight that meets in
# the forward pass meets once in the gradient by the inputs and once in the gradient by the filter. So each gradient
# takes as many operations again, and *training is three times the forward pass* wherever products dominate (Griewank
# and Walther 2008, chapter 4). Windows over the edge count whole, as is usual: some kernels multiply the padded zeros.


# %%
def convolution(op) -> int:
    """Operations of a convolution or of one of its gradients."""
    windows = op.inputs[2] if "Backprop" in op.type else op.outputs[0]  # (batch, height, width, filters)
    kernel = op.outputs[0] if "BackpropFilter" in op.type else op.inputs[1]
    operations.entries(kernel)
    # The last axis are the filters; of a depthwise kernel the last two.
    summed = kernel.shape[:2] if op.type.startswith("Depthwise") else kernel.shape[:-1]
    return 2 * operations.entries(windows) * summed.num_elements()


# %% [markdown]
# A matrix product has a sum of products for each entry of its result, as long as the left matrix is wide.


# %%
def matrix_product(op) -> int:
    """Operations of a matrix product."""
    transposed = op.get_attr("transpose_a" if op.type == "MatMul" else "adj_x")
    summed = int(op.inputs[0].shape[-2 if transposed else -1])
    return 2 * operations.entries(op.outputs[0]) * summed


# %% [markdown]
# These two do nearly all of the work, and nobody doubts their number. The small rest needs a convention:
#
# | operations | counted as |
# |---|---|
# | convolutions, matrix products, and their gradients | 2 a multiplication and addition, at padding too |
# | arithmetic, comparisons, `exp`, `log`, activations and their gradients, random numbers | 1 an entry of the output |
# | sums, means, maxima; adding to a variable | 1 an entry of what is summed or added |
# | pooling | the window's size for each window; its gradient: one more a window (max), twice that (average) |
# | bilinear resizing and its gradient | 8 an entry: four multiplications and additions |
# | softmax; softmax with cross-entropy and its gradient | 5; 8 an entry |
# | fused batch norm | 8 an entry in training, 2 in inference; its gradient 10 |
# | reshaping, padding, slicing, gathering, scattering, selecting, casting, reading a variable | 0 |
# | anything on integers or booleans alone | 0 |
#
# `core/operations.py` has these as tables, one for each way of counting. An operation that no table has counts 1 an
# entry of its output and is named in `Flops.unknown`: nothing is dropped in silence.

# %%
PRODUCTS: dict[str, Callable] = {
    **dict.fromkeys(("MatMul", "BatchMatMul", "BatchMatMulV2", "BatchMatMulV3"), matrix_product),
    "Einsum": operations.einsum,
}
for kind in ("Conv2D", "Conv3D", "DepthwiseConv2dNative"):
    for gradient in ("", "BackpropInput", "BackpropInputV2", "BackpropFilter", "BackpropFilterV2"):
        PRODUCTS[kind + gradient] = convolution


# %% [markdown]
# ## 2. Which operations run?
#
# The count starts from the results, and from the assignments to variables, and walks back to the inputs. It skips what
# no result needs, such as the first layer's gradient by the image. It enters functions that the graph calls. Of a
# condition the costlier branch counts, and a loop's body counts as often as it runs.


# %%
@dataclass(frozen=True)
class Flops:
    """Floating point operations of one call.

    Attributes:
        by_op: operation's type in the graph -> operations, largest first.
        unknown: types that no table has: counted as one an entry of the output.
    """

    by_op: dict[str, float]
    unknown: tuple[str, ...] = ()

    @property
    def total(self) -> float:
        """All operations."""
        return float(sum(self.by_op.values()))

    @property
    def matmul_like(self) -> float:
        """Share of convolutions and matrix products, gradients included, in the total, 0 to 1."""
        return sum(n for kind, n in self.by_op.items() if kind in PRODUCTS) / self.total if self.total else 0.0


# %%
def count_flops(function: Callable, *specs, loop_trips: int | None = None) -> Flops:
    """Floating point operations of `function(*specs)`, counted from its graph. Nothing is computed.

    Args:
        function: callable on tensors. It is traced without AutoGraph; give a `tf.function` where it needs that.
        specs: its arguments: `tf.TensorSpec`s of static shape, or structures of them.
        loop_trips: how often the body of a loop runs whose number of trips is not in the graph.

    Returns:
        `Flops`: `total`, `by_op`, `matmul_like`, `unknown`. A loop that may end early counts as run to its limit.

    Raises:
        ValueError: a spec or an operation with an open size, a loop whose number of trips is unknown, or another
            backend than TensorFlow.
    """
    check_graphs()
    for position, spec in enumerate(specs):
        for leaf in tf.nest.flatten(spec):
            if isinstance(leaf, tf.TensorSpec) and not leaf.shape.is_fully_defined():
                raise ValueError(
                    f"Expected specs of static shape. Received: {leaf} as argument {position} of the function.\n"
                    "Give each axis its size, the batch too: tf.TensorSpec((32, 28, 28, 1))."
                )
    graph = tf.function(function, autograph=False).get_concrete_function(*specs).graph
    return Flops(*operations.count(graph, PRODUCTS, loop_trips))


# %% [markdown]
# ### Does the graph agree with the count by hand?
#
# The convolution from above and both of its gradients: 27,648 each.


# %% tags=["active-ipynb"]
# def gradients(x, kernel, padding="SAME"):
#     with tf.GradientTape() as tape:
#         tape.watch([x, kernel])
#         y = tf.nn.conv2d(x, kernel, 1, padding)
#     return tape.gradient(y, [x, kernel], output_gradients=y)

# %% tags=["active-ipynb"]
# counted = count_flops(gradients, image, filters)
# for kind, number in counted.by_op.items():
#     print(f"{kind:<22}{number:>8,.0f}")
# assert set(counted.by_op.values()) == {2 * 64 * 36 * 6}

# %% [markdown]
# ### Why not TensorFlow's own counter?
#
# It has one, of its first version. It is right on the pass above, and our numbers agree. But it overcounts the
# gradients of convolutions without padding, does not look into a called function, and counts most operations as 0.


# %% tags=["active-ipynb"]
# from tensorflow.compat.v1 import profiler
#
# tf.get_logger().setLevel("ERROR")  # it calls itself deprecated
#
#
# def tensorflow_count(function, *specs):
#     graph = tf.function(function, autograph=False).get_concrete_function(*specs).graph
#     options = profiler.ProfileOptionBuilder(profiler.ProfileOptionBuilder.float_operation()).with_empty_output()
#     return profiler.profile(graph, options=options.build()).total_float_ops

# %% tags=["active-ipynb"]
# import pandas as pd
#
# called = tf.function(gradients)
# cases = {
#     "same padding": (gradients, 3 * 2 * 64 * 36 * 6),
#     "no padding": (lambda x, kernel: gradients(x, kernel, "VALID"), 3 * 2 * 36 * 36 * 6),  # 6 x 6 windows
#     "in a function": (lambda x, kernel: called(x, kernel), 3 * 2 * 64 * 36 * 6),
# }
# counters = {"ours": lambda *given: int(count_flops(*given).total), "TensorFlow": tensorflow_count}
# rows = {name: {who: c(f, image, filters) for who, c in counters.items()} for name, (f, _) in cases.items()}
# table = pd.DataFrame(rows).T
# table.insert(0, "by hand", [by_hand for _, by_hand in cases.values()])
# assert (table["ours"] == table["by hand"]).all()
# table

# %% [markdown]
# ## 3. What does a training step take?
#
# `training_step` traces `model.train_step`, the very function that `fit` runs: the forward pass, the loss, every
# backward pass, the optimiser, the metrics. A trace changes no weight and no random state. It needs no data, only the
# shapes of a batch: `input_specs` and `target_specs` read them from the model.


# %%
def training_step(model: keras.Model, batch_size: int, targets=None) -> Flops:
    """Operations of one step of `fit` on a whole batch: forward, every backward pass, optimiser and metrics.

    No value changes. An optimiser or a metric without variables gets them, as in the first step of `fit`.

    Args:
        model: compiled `keras.Model`, such as a `PartialBayes`, with input sizes that are known.
        batch_size: examples in the step.
        targets: spec, or structure of specs, of the labels; None: the outputs' shape, for a sparse loss without its
            last axis.

    Raises:
        ValueError: a model that is not compiled, or an open size.
    """
    inputs = input_specs(model, batch_size)
    if getattr(model, "loss", None) is None:
        raise ValueError(
            f"Expected a model compiled with a loss. Received: model={model.name!r}, which is not.\n"
            "Call model.compile(optimizer, loss): the optimiser's operations are part of the step."
        )
    targets = target_specs(model, model.loss, batch_size) if targets is None else targets
    if not model.optimizer.built:
        model.optimizer.build(model.trainable_variables)
    return count_flops(lambda x, y: model.train_step((x, y)), inputs, targets)


# %%
def training_flops(model: keras.Model, batch_size: int) -> float:
    """Operations of one step of `fit`, divided by the batch size; see `training_step`."""
    return training_step(model, batch_size).total / batch_size


# %% [markdown]
# A prediction is the forward pass alone; the saliency of step 2 takes a forward and a backward pass, no optimiser.


# %%
def prediction_flops(model: keras.Model, batch_size: int = 1) -> float:
    """Operations of one call of a model in inference mode, per example; of a `PartialBayes`: all its samples.

    Work that is done once for a batch, such as drawing weights, is shared by its `batch_size` examples.
    """
    flops = count_flops(lambda x: model(x, training=False), input_specs(model, batch_size))
    return flops.total / batch_size


# %%
def saliency_flops(model: keras.Model, loss, batch_size: int) -> float:
    """Operations of a forward and a backward pass, per example: a pass of gradients over data, without an optimiser.

    Args:
        model: built `keras.Model` with input sizes that are known.
        loss: Keras loss or its name, or a callable (y, y_pred) -> loss.
        batch_size: examples in the pass.
    """
    compute = keras.losses.get(loss) if isinstance(loss, str | dict) else loss

    def gradients(x, y):
        variables = [variable.value for variable in model.trainable_variables]
        with tf.GradientTape(watch_accessed_variables=False) as tape:
            tape.watch(variables)
            value = tf.reduce_mean(compute(y, model(x, training=False)))
        return [g for g in tape.gradient(value, variables) if g is not None]

    flops = count_flops(gradients, input_specs(model, batch_size), target_specs(model, loss, batch_size))
    return flops.total / batch_size


# %% [markdown]
# ### Where does the work go?
#
# A small network on images of 16 x 16. Its step has three parts: the forward pass, the backward pass (nearly twice as
# much), and the optimiser, which works once for a whole batch.

# %% tags=["active-ipynb"]
# keras.utils.set_random_seed(0)
# convolution_of = {"kernel_size": 3, "padding": "same", "activation": "relu"}
# network = keras.Sequential([keras.Input((16, 16, 1))])
# for name, filters, stride in (("first", 16, 1), ("second", 32, 2), ("third", 32, 1)):
#     network.add(keras.layers.Conv2D(filters, strides=stride, name=name, **convolution_of))
# network.add(keras.layers.GlobalAveragePooling2D(name="pool"))
# network.add(keras.layers.Dense(4, "sigmoid", name="last"))
# network.compile("adam", "binary_crossentropy")

# %% tags=["active-ipynb"]
# batch = 20
# forward = prediction_flops(network, batch)
# both = saliency_flops(network, "binary_crossentropy", batch)
# step = training_flops(network, batch)
# by_hand = 2 * 9 * (256 * 1 * 16 + 64 * 16 * 32 + 64 * 32 * 32)
# print(f"forward by hand (convolutions): {by_hand:>9,}")
# print(f"forward, counted:               {forward:>9,.0f}")
# print(f"forward and backward / forward: {both / forward:>9.2f}")
# assert 0 < forward / by_hand - 1 < 0.03

# %% tags=["active-ipynb", "nbval-ignore-output"]
# import matplotlib.pyplot as plt
#
# parts = {"forward": forward, "backward": both - forward, "optimiser, metrics": step - both}
# figure, axes = plt.subplots(figsize=(6, 1.9), layout="constrained")
# bars = axes.barh(list(parts), [n / 1e6 for n in parts.values()], color=plt.cm.viridis([0.2, 0.5, 0.8]))
# axes.bar_label(bars, [f"{n / step:.1%}" for n in parts.values()], padding=3)
# axes.set(xlabel="million operations per image, batch of 20", title="Backward costs nearly twice forward")
# axes.margins(x=0.16)
# axes.invert_yaxis()
# plt.show()

# %% [markdown]
# *Reading*: a little under twice, because the first layer's gradient by the image is not needed. Adam takes about 12
# operations a weight, shared by the images of a batch: little for convolutions, which use each weight at every pixel.

# %% [markdown]
# ## 4. Does the paper's formula count the whole step?
#
# The paper's Table 1 gives training costs of 3.36, 3.45 and 3.80 for 1, 5 and 20 % Bayesian weights, relative to the
# deterministic training. They equal
#
# $$ 1 + \tfrac73 (1 + r). $$
#
# *Source*: Abboud et al. (2024), Table 1; the formula is ours, found from its numbers. Where does 7/3 come from? With
# the forward pass as 1 and the backward pass as 2, a deterministic step is 3. *Five forwards and one backward* are
# $5 + 2 = 7$: 7/3 of it. The factor $1 + r$ is for the scales, and the 1 is step 1 of the method, the deterministic
# training that comes first.
#
# > **Misconception: "five samples need five forward passes and one backward pass."** The loss is the mean of five
# > samples' losses, and each sample has its own activations: the gradient goes back through *all five*. Five forwards
# > and five backwards are 15/3 = 5 steps: with step 1, 6.


# %%
def paper_flops(r_bayes: float) -> float:
    """The paper's cost of training, `1 + 7/3 (1 + r_bayes)`, in units of the deterministic training.

    # Differs from the paper: five samples have five backward passes; `training_flops` counts them, and gives about 6.
    """
    check_fraction("r_bayes", r_bayes)
    return float(1 + 7 / 3 * (1 + r_bayes))


# %% tags=["active-ipynb"]
# print("paper's formula:", [round(paper_flops(r), 2) for r in (0.01, 0.05, 0.2)])
# assert [round(paper_flops(r), 2) for r in (0.01, 0.05, 0.2)] == [3.36, 3.45, 3.8]

# %% [markdown]
# ### What does the graph say?
#
# The same network, 1 % of its weights Bayesian, five samples. `"all"`: each sample sees the whole batch. `"split"`:
# each sees a fifth of it.


# %% tags=["active-ipynb"]
# from sbn_tf.partial_bayes import to_partial_bayes
# from sbn_tf.saliency import saliency, top_k
#
#
# def bayesian(r_bayes, estimator="all"):
#     masks = top_k(saliency(network, score="magnitude"), r_bayes)
#     bnn = to_partial_bayes(network, masks, num_train=1000, estimator=estimator, seed=0)
#     bnn.compile("adam", "binary_crossentropy")
#     return bnn

# %% tags=["active-ipynb"]
# steps = {name: training_step(bayesian(0.01, name), batch) for name in ("all", "split")}
# five_and_five = 5 * both / step
# print(f"five forwards, five backwards: {five_and_five:.2f} deterministic steps")
# print(f"five forwards, one backward:   {(5 * forward + (both - forward)) / step:.2f}")
# for name, counted in steps.items():
#     print(f'counted, "{name}":'.ljust(30), f"{counted.total / batch / step:.2f}")
# assert abs(steps["all"].total / batch / step - five_and_five) < 0.25
# assert steps["split"].total / batch / step < 1.2

# %% tags=["active-ipynb", "nbval-ignore-output"]
# costs = {
#     "deterministic": 1,
#     "ensemble of 5": 5,
#     "partial 1 %, paper's formula": paper_flops(0.01),
#     "partial 1 %, counted, 5 samples": 1 + steps["all"].total / batch / step,
#     'partial 1 %, counted, "split"': 1 + steps["split"].total / batch / step,
# }
# figure, axes = plt.subplots(figsize=(7, 2.4), layout="constrained")
# colours = ["0.6", "0.6", "tab:orange", *plt.cm.viridis([0.3, 0.3])]
# axes.bar_label(axes.barh(list(costs), list(costs.values()), color=colours), fmt="%.2f", padding=3)
# axes.set(xlabel="training, in units of the deterministic one", title="Five samples cost more than five networks")
# axes.margins(x=0.1)
# axes.invert_yaxis()
# plt.show()

# %% [markdown]
# *Reading*: trained with five whole passes, the method costs more than the ensemble that it is to replace; the formula
# hides that by leaving out four of the backward passes. With `"split"` it costs about 2: both trainings have the same
# number of epochs here, as in the paper. The recipe `sbn` gives step 3 an eighth of step 1's epochs, and costs 1.13.

# %% [markdown]
# ## 5. What must be stored?
#
# A Bayesian entry adds one trainable number, its scale, and one index of 8 bytes; the optimiser keeps its *slots* (the
# running means that it remembers of each number, two of Adam's) for the scale too. A tensor that is Bayesian throughout
# needs no index; a prior around the weights (`prior_at_loc`) keeps where each entry began, 4 bytes more.
#
# By hand, for the network above at `r_bayes` 0.01: 142 of its 14,180 weights. The weights take $4 \cdot 14{,}180 =
# 56{,}720$ bytes, the scales $4 \cdot 142$ and the indices $8 \cdot 142$ more, and the KL's weight with the terms it
# counts 16: 58,440.


# %%
def parameters(model: keras.Model) -> dict[str, int]:
    """How many numbers a model has.

    Returns:
        dict: `num_weights`, the entries of all weights that can be trained, frozen ones included (a Bayesian one is one
        weight; running statistics are none); `num_trainable`, the numbers that training changes, locs *and* scales;
        `num_bayesian`, the weights that have a distribution.
    """
    layers = [layer for layer in all_layers(model) if not isinstance(layer, Posterior)]
    weights = {id(variable): variable for layer in layers for variable in own_trained(layer)}
    return {
        "num_weights": sum(math.prod(v.shape) for v in weights.values()),
        "num_trainable": sum(math.prod(v.shape) for v in model.trainable_variables),
        "num_bayesian": sum(sum(layer.num_bayesian.values()) for layer in masked_layers(model)),
    }


# %%
def bytes_of(model: keras.Model) -> dict[str, int]:
    """How many bytes a model's variables take.

    Returns:
        dict: `weight_bytes`, of every weight, index and running statistic; `optimizer_bytes`, of the optimiser's state:
        0 without an optimiser. One that has no slots yet gets them, as in the first step of `fit`.
    """
    optimizer = getattr(model, "optimizer", None)
    if optimizer is not None and not optimizer.built:
        optimizer.build(model.trainable_variables)
    states = {"weight_bytes": model.weights, "optimizer_bytes": getattr(optimizer, "variables", ())}
    return {key: sum(math.prod(v.shape) * np.dtype(v.dtype).itemsize for v in found) for key, found in states.items()}


# %% tags=["active-ipynb"]
# sizes = {r_bayes: bayesian(r_bayes) if r_bayes else network for r_bayes in (0, 0.01, 0.2, 1)}
# table = pd.DataFrame({r_bayes: parameters(model) | bytes_of(model) for r_bayes, model in sizes.items()}).T
# assert (table["num_trainable"] == table["num_weights"] + table["num_bayesian"]).all()
# table.rename_axis("r_bayes")

# %% [markdown]
# ## 6. How long does it take, and how much memory?
#
# Operations say what must be done, not how long it takes. `measured()` reads the clock, and the largest memory that the
# process had within the block (on a GPU: that was allocated there). Blocks may be nested. A check: an inner block frees
# 200 MB, and the outer block must have seen them.

# %% tags=["active-ipynb"]
# import time
#
# import numpy as np
#
# with measured() as used:
#     large = np.ones(25_000_000)  # 200 MB
#     with measured() as inner:
#         large = None
#         time.sleep(0.01)
# assert used.peak_bytes > 200e6 and used.seconds > inner.seconds >= 0.01
# assert used.start_bytes is None or used.peak_bytes - used.start_bytes > 150e6

# %% [markdown]
# ### Do operations predict the time?
#
# The three training steps of section 4, by count and by the clock: medians of 30 steps, the deterministic one as 1.

# %% tags=["active-ipynb"]
# rng = np.random.default_rng(0)
# x = rng.normal(size=(batch, 16, 16, 1)).astype("float32")
# y = rng.integers(0, 2, (batch, 4)).astype("float32")
# models = {"deterministic": network, "all": bayesian(0.01), "split": bayesian(0.01, "split")}
# times = {name: [] for name in models}
# for trial in range(31):  # one after the other, so that a busy machine slows all alike; the first ones trace
#     for name, model in models.items():
#         with measured() as used:
#             model.train_on_batch(x, y)
#         times[name] += [used.seconds] if trial else []

# %% tags=["active-ipynb", "nbval-ignore-output"]
# seconds = pd.DataFrame(times).median()
# counted = [1, *(steps[name].total / batch / step for name in ("all", "split"))]
# pd.DataFrame({"operations": counted, "time": seconds / seconds["deterministic"]}).round(2)

# %% [markdown]
# *Reading*: the two columns differ. In so small a network much of the time is not arithmetic: each operation has a
# price for being started, and `"split"` starts five times as many as a deterministic step, on a fifth of the images
# each. The larger the network and the batch, the nearer the two columns.
#
# > **Misconception: "as many operations, as much time."** Believe a count for what a method *must* do, a time for what
# > *this* machine made of it.

# %% [markdown]
# ## Summary
#
# - Nearly all operations are convolutions and matrix products: 2 a multiplication and addition.
# - Backward takes twice as many as forward: once by the inputs, once by the weights.
# - Five samples have five backward passes: about 5 deterministic steps, and 6 with step 1. The paper's 3.36 counts one.
# - `"split"` draws five samples with the operations of one pass; on the clock it takes more, about 1.4 passes here.
# - A graph is counted as it was traced. Only the clock shows what TensorFlow fuses and runs at once.
#
# ## Exercises
#
# 1. A dense layer from 100 to 10, a batch of 32: how many operations are its three products?
#
#    <details><summary>Answer</summary>
#
#    Each $2 \cdot 32 \cdot 100 \cdot 10 = 64{,}000$: forward, by the inputs, by the kernel. Together 192,000.
#    </details>
# 2. What would the paper's formula be with ten samples, and what would the graph say (with step 1)?
#
#    <details><summary>Answer</summary>
#
#    Ten forwards and one backward: $1 + \tfrac{12}{3}(1 + r)$, about 5. The graph: about 11.
#    </details>
# 3. Only the last layer is Bayesian. Which operations of five samples are equal, and could be done once?
#
#    <details><summary>Answer</summary>
#
#    Everything before that layer, in training too as long as nothing there is random. `PartialBayes` runs it once, and
#    the count shows it: $1 + 4 f$ passes, with $f$ the share of the operations that the layer and those after it take.
#    </details>
#
# ## References
#
# - Abboud, Lombaert, Kadoury (2024). *Sparse Bayesian Networks: Efficient Uncertainty Quantification in Medical Image
#   Analysis*. MICCAI.
# - Griewank, Walther (2008). *Evaluating Derivatives*. SIAM. Chapter 4 bounds the cost of a gradient.
# - Molchanov, Tyree, Karras, Aila, Kautz (2017). *Pruning Convolutional Neural Networks for Resource Efficient
#   Inference*. ICLR. arXiv:1611.06440. Appendix A.1 counts operations.
