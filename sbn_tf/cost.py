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
# - *Words*: a *Bayesian* weight has a mean (`loc`) and a standard deviation (`scale`) in place of one number; `r_bayes`
#   is the share of such weights; a *sample* is the network with each of them drawn once. A *deterministic* network has
#   none. More words: [glossary](../../docs/glossary.md).
# - *You need*: a convolution, a gradient; the lessons on [layers](layers.ipynb) and on
#   [partial Bayes](partial_bayes.ipynb) for the last sections.
# - *Runs in*: 20 seconds (CPU).
#
# At a first reading take the text of sections 1, 3, 4 and 6, which say what is counted and what came out. The code
# of section 2, which walks through a graph, can wait.

# %% tags=["active-ipynb"]
# import os
#
# os.environ["TF_CPP_MIN_LOG_LEVEL"] = "3"  # TensorFlow's start-up messages are no part of the lesson

# %%
"""Cost of a model: operations counted from traced graphs, parameters, bytes, time and memory."""

from __future__ import annotations

import contextlib
import math
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import keras
import numpy as np
import tensorflow as tf

from sbn_tf.layers import MaskedGaussian, masked_layers

__all__ = [
    "Flops",
    "Used",
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
# ## 1. What is one operation?
#
# A FLOP (floating point operation) is one addition or one multiplication of real numbers. Convolutions and matrix
# products do nearly all of them, and there is no doubt about their number: each entry of the output is a sum of
# products, a multiplication *and* an addition each. The small rest needs a convention:
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
# An operation that is not in these tables counts 1 an entry of its output and is named in `Flops.unknown`: nothing is
# dropped in silence.
#
# In code these are tables, one for each way of counting. First the products: for each kind of convolution, which two of
# its tensors tell how many windows there are and how large a filter is.

# %%
# The convolutions: where the entry is (input or output of the operation) that one window belongs to, and the filter.
# Gradients use the gradient of the output, which has an entry for each window of the forward pass.
_CONVOLUTIONS = {
    "Conv2D": ("output", 0, "input", 1),
    "Conv2DBackpropInput": ("input", 2, "input", 1),
    "Conv2DBackpropInputV2": ("input", 2, "input", 1),
    "Conv2DBackpropFilter": ("input", 2, "output", 0),
    "Conv2DBackpropFilterV2": ("input", 2, "output", 0),
    "Conv3D": ("output", 0, "input", 1),
    "Conv3DBackpropInput": ("input", 2, "input", 1),
    "Conv3DBackpropInputV2": ("input", 2, "input", 1),
    "Conv3DBackpropFilter": ("input", 2, "output", 0),
    "Conv3DBackpropFilterV2": ("input", 2, "output", 0),
    "DepthwiseConv2dNative": ("output", 0, "input", 1),
    "DepthwiseConv2dNativeBackpropInput": ("input", 2, "input", 1),
    "DepthwiseConv2dNativeBackpropFilter": ("input", 2, "output", 0),
}
_MATRIX_PRODUCTS = ("MatMul", "BatchMatMul", "BatchMatMulV2", "BatchMatMulV3")

# %% [markdown]
# What works entry by entry counts by what comes out, once an entry or, for a few, more often.

# %%
_NAMES_ONE_AN_OUTPUT = """
Abs Acos Acosh Add AddV2 Asin Asinh Atan Atan2 Atanh BesselI0e BesselI1e BiasAdd Ceil ClipByValue Cos Cosh Cumprod
Cumsum CumulativeLogsumexp Digamma Div DivNoNan Elu EluGrad Equal Erf Erfc Erfinv Exp Expm1 Floor FloorDiv FloorMod
Greater GreaterEqual Igamma Igammac Inv InvGrad IsFinite IsInf IsNan LeakyRelu LeakyReluGrad Less LessEqual Lgamma Log
Log1p Maximum Minimum Mod Mul MulNoNan Ndtri Neg NextAfter NotEqual Pow RealDiv Reciprocal ReciprocalGrad Relu Relu6
Relu6Grad ReluGrad Rint Round Rsqrt RsqrtGrad Selu SeluGrad Sigmoid SigmoidGrad Sign Sin Sinh Softplus SoftplusGrad
Softsign SoftsignGrad Sqrt SqrtGrad Square SquaredDifference Sub Tan Tanh TanhGrad TruncateDiv TruncateMod Xdivy Xlog1py
Xlogy Zeta RandomStandardNormal RandomUniform TruncatedNormal StatelessRandomNormal StatelessRandomNormalV2
StatelessRandomUniform StatelessRandomUniformV2 StatelessTruncatedNormal StatelessTruncatedNormalV2
"""
_AN_OUTPUT = {
    **dict.fromkeys(_NAMES_ONE_AN_OUTPUT.split(), 1),
    "Softmax": 5,  # maximum, difference, exponential, sum, quotient
    "LogSoftmax": 5,
    "ResizeBilinear": 8,
    "ResizeBicubic": 32,
}

# %% [markdown]
# A sum of a million numbers has one number as its output, and about a million additions: what brings many numbers
# together counts by what goes in.

# %%
_NAMES_ONE_AN_INPUT = """
All Any ArgMax ArgMin BiasAddGrad EuclideanNorm Max Mean Min Prod ResizeNearestNeighborGrad SegmentSum Sum
UnsortedSegmentMax UnsortedSegmentMin UnsortedSegmentSum MirrorPadGrad TopKV2
"""
_AN_INPUT = {  # operation: (which input, how many an entry of it)
    **dict.fromkeys(_NAMES_ONE_AN_INPUT.split(), (0, 1)),
    "AssignAddVariableOp": (1, 1),
    "AssignSubVariableOp": (1, 1),
    "L2Loss": (0, 2),
    "ResizeBilinearGrad": (0, 8),
    "ResizeBicubicGrad": (0, 32),
    "ResourceScatterAdd": (2, 1),
    "ResourceScatterSub": (2, 1),
    "SoftmaxCrossEntropyWithLogits": (0, 8),  # log-softmax, product, sum; the gradient's difference
    "SparseSoftmaxCrossEntropyWithLogits": (0, 6),
    "TensorScatterAdd": (2, 1),
    "TensorScatterSub": (2, 1),
}

# %% [markdown]
# What moves numbers, copies them or asks for a shape computes none.

# %%
_NAMES_FREE = """
Assert AssignVariableOp BatchToSpace BatchToSpaceND Bitcast BroadcastArgs BroadcastGradientArgs BroadcastTo Bucketize
Cast CheckNumerics Concat ConcatV2 Const DepthToSpace DestroyResourceOp Diag DiagPart DynamicPartition DynamicStitch
Empty EnsureShape ExpandDims ExtractImagePatches Fill Gather GatherNd GatherV2 Identity IdentityN InvertPermutation
LinSpace MatrixBandPart MatrixDiag MatrixDiagPart MatrixDiagPartV3 MatrixDiagV3 MatrixSetDiagV3 MirrorPad NoOp OneHot
OnesLike Pack ParallelConcat Pad PadV2 ParallelDynamicStitch Placeholder PlaceholderWithDefault PreventGradient Print
PrintV2 Range ReadVariableOp Reshape ResizeNearestNeighbor ResourceGather ResourceGatherNd ResourceScatterUpdate
Reverse ReverseSequence ReverseV2 Roll ScatterNd Select SelectV2 Shape ShapeN Size Slice Snapshot SpaceToBatch
SpaceToBatchND SpaceToDepth SparseToDense Split SplitV Squeeze StopGradient StridedSlice StridedSliceGrad
TensorScatterUpdate Tile Transpose Unique Unpack VarHandleOp VarIsInitializedOp VariableShape VariableV2 Where ZerosLike
"""
_FREE = frozenset(_NAMES_FREE.split())

# %% [markdown]
# ### How many operations is a convolution?
#
# $B$ images give $H' \times W'$ windows each. A window of $k \times k$ pixels with $C_{\text{in}}$ channels is summed
# up once for each of $C_{\text{out}}$ filters:
#
# $$ 2 \cdot \underbrace{B\, H' W'}_{\text{windows}} \cdot \underbrace{k^2\, C_{\text{in}}}_{\text{products in a sum}}
#  \cdot\; C_{\text{out}} . $$
#
# *Source*: Molchanov et al. (2017), appendix, without its term for the bias, which is an operation of its own here.
#
# By hand: 3 x 3 windows on one image of 8 x 8 with 4 channels, 6 filters, "same" padding: 64 windows, each a sum of
# $3 \cdot 3 \cdot 4 = 36$ products for each of 6 filters: $2 \cdot 64 \cdot 36 \cdot 6 = 27{,}648$ operations.
# Each pair of an input and a weight that meets in the forward pass meets once in the gradient by the inputs and once in
# that by the filter: each of the two takes as many again. *Training is three times the forward pass*, wherever products
# dominate. (Griewank and Walther 2008, chapter 4, bound the cost of any gradient in this way.)
#
# Windows over the edge count whole, as is usual: their products with padded zeros are done by some kernels, not by
# others. In code, `_of_op` counts one operation (a *node*) of a graph by the tables.


# %%
def _entries(tensor) -> int:
    """How many entries a tensor of the graph has."""
    if not tensor.shape.is_fully_defined():
        raise ValueError(
            f"Expected shapes without open sizes. Received: {tensor.shape} in operation '{tensor.op.name}' "
            f"({tensor.op.type}).\nFix the size that it depends on: trace with static shapes, and no boolean masks."
        )
    return tensor.shape.num_elements()


def _of_op(op, known: dict) -> int | None:
    """Operations of one node of the graph; None: of a kind that no table has."""
    kind = op.type
    if kind in _FREE or kind.startswith(("TensorList", "TensorArray", "StatelessRandomGet")) or not _is_float(op):
        return 0
    if kind in known:
        return known[kind](op)
    if kind in _AN_OUTPUT:
        return _AN_OUTPUT[kind] * _entries(op.outputs[0])
    if kind in _AN_INPUT:
        number, each = _AN_INPUT[kind]
        return each * _entries(op.inputs[number])
    return None


def _is_float(op):
    return any(t.dtype.is_floating or t.dtype.is_complex for t in (*op.inputs, *op.outputs))


# %% [markdown]
# The formula in code. Of a gradient, too, two tensors tell the number of windows and the size of a filter.


# %%
def _convolution(op):
    at, number, kept, filter_number = _CONVOLUTIONS[op.type]
    windows = _entries((op.inputs if at == "input" else op.outputs)[number])  # (batch, height, width, filters)
    kernel = (op.inputs if kept == "input" else op.outputs)[filter_number]
    _entries(kernel)
    # The last axis are the filters; of a depthwise kernel the last two. Of grouped ones the others are a group's.
    summed = kernel.shape[:2] if op.type.startswith("Depthwise") else kernel.shape[:-1]
    return 2 * windows * summed.num_elements()


def _matrix_product(op):
    left = op.inputs[0]
    _entries(left)
    transposed = op.get_attr("transpose_a" if op.type == "MatMul" else "adj_x")
    return 2 * _entries(op.outputs[0]) * int(left.shape[-2 if transposed else -1])


# %% [markdown]
# An Einstein sum is a product in other words: in `ab,bc->ac` each combination of $a$, $b$ and $c$ meets once. Letters
# that the result lacks are summed over.


# %%
def _einsum(op):
    terms, result = op.get_attr("equation").decode().replace(" ", "").split("->")
    sizes = {}
    for term, tensor in zip(terms.split(","), op.inputs, strict=True):
        _entries(tensor)
        before, dots, after = term.partition("...")
        shape = tensor.shape.as_list()
        spread = shape[len(before) : len(shape) - len(after)] if dots else []
        for position, size in enumerate(reversed(spread)):
            sizes[position] = max(size, sizes.get(position, 1))
        sizes.update(zip(before + after, shape[: len(before)] + shape[len(shape) - len(after) :], strict=True))
    all_of_them = math.prod(sizes.values())
    if len(op.inputs) == 1:
        return all_of_them if all_of_them > _entries(op.outputs[0]) else 0  # a sum, or a transposition
    summed = any(label not in result for label in sizes if isinstance(label, str))
    return (2 if summed else 1) * all_of_them


# %% [markdown]
# What is left has windows without products, or is a sum of tensors. `_KNOWN` says which function counts what.


# %%
def _pooling(op):
    window = math.prod(op.get_attr("ksize"))
    if op.type.startswith("MaxPool"):
        grad = "Grad" in op.type
        return (window + 1) * _entries(op.inputs[1]) if grad else window * _entries(op.outputs[0])
    return 2 * window * _entries(op.inputs[1]) if "Grad" in op.type else window * _entries(op.outputs[0])


def _batch_norm(op):
    training = op.get_attr("is_training")
    if "Grad" in op.type:
        return (10 if training else 5) * _entries(op.inputs[0])
    return (8 if training else 2) * _entries(op.inputs[0])


def _add_n(op):
    return (len(op.inputs) - 1) * _entries(op.outputs[0])


_KNOWN = {
    **dict.fromkeys(_CONVOLUTIONS, _convolution),
    **dict.fromkeys(_MATRIX_PRODUCTS, _matrix_product),
    "Einsum": _einsum,
    **{f"{kind}Pool{rank}{grad}": _pooling for kind in ("Max", "Avg") for rank in ("", "3D") for grad in ("", "Grad")},
    **{f"FusedBatchNorm{grad}{version}": _batch_norm for grad in ("", "Grad") for version in ("", "V2", "V3")},
    "AddN": _add_n,
    "AccumulateNV2": _add_n,
}
_PRODUCTS = frozenset((*_CONVOLUTIONS, *_MATRIX_PRODUCTS, "Einsum"))

# %% [markdown]
# ## 2. Which operations run?
#
# `tf.function` traces a Python function once, with shapes instead of numbers, into a *graph* of operations. What we
# count is what runs: from the results (and from the assignments to variables) back to the inputs. What nothing asks
# for, such as the first layer's gradient by the image, is in the trace and yet never computed. The way leads into
# functions that the graph calls; of a condition the costlier branch counts; a loop's body counts as often as it runs,
# where that is known.


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
        return sum(n for kind, n in self.by_op.items() if kind in _PRODUCTS) / self.total if self.total else 0.0


# %% [markdown]
# `count_flops` traces and adds up. A batch of open size has no count: it is refused.


# %%
def count_flops(function: Callable, *specs, loop_trips: int | None = None) -> Flops:
    """Floating point operations of `function(*specs)`, counted from its graph. Nothing is computed.

    The graph is counted as traced: TensorFlow may still merge equal operations or fuse neighbours when it runs it.

    Args:
        function: callable on tensors. It is traced without AutoGraph; give a `tf.function` where it needs that.
        specs: its arguments: `tf.TensorSpec`s of static shape, or structures of them.
        loop_trips: how often the body of a loop runs whose number of trips is not in the graph.

    Returns:
        `Flops`: `total`, `by_op`, `matmul_like`, `unknown`. A loop that may end early counts as run to its limit.

    Raises:
        ValueError: a spec or an operation with an open size, or a loop whose number of trips is unknown.
    """
    if loop_trips is not None:
        _check_count("loop_trips", loop_trips)
    for position, spec in enumerate(specs):
        for leaf in tf.nest.flatten(spec):
            if isinstance(leaf, tf.TensorSpec) and not leaf.shape.is_fully_defined():
                raise ValueError(
                    f"Expected specs of static shape. Received: {leaf} as argument {position} of the function.\n"
                    "Give each axis its size, the batch too: tf.TensorSpec((32, 28, 28, 1))."
                )
    graph = tf.function(function, autograph=False).get_concrete_function(*specs).graph
    unknown = set()
    counts = _count(graph, range(len(graph.outputs)), loop_trips, unknown)
    by_op = {kind: float(number) for kind, number in counts.most_common() if number}
    return Flops(by_op, tuple(sorted(unknown)))


# %% [markdown]
# What is needed is found from the end: from the wanted results and the assignments back to what they were made of.


# %%
def _count(graph, wanted, loop_trips, unknown) -> Counter:
    """Operation type -> operations, of what runs for the `wanted` outputs of a graph."""
    counts = Counter()
    for op, outputs in _needed(graph, wanted).items():
        if op.type in _CONTROL:
            counts.update(_CONTROL[op.type](op, outputs, loop_trips, unknown))
            continue
        number = _of_op(op, _KNOWN)
        if number is None:
            unknown.add(op.type)
            tensors = [t for t in op.outputs or op.inputs if t.dtype.is_floating or t.dtype.is_complex]
            number = max(map(_entries, tensors), default=0) if not op.outputs else sum(map(_entries, tensors))
        counts[op.type] += number
    return counts


def _needed(graph, wanted) -> dict:
    """Operations that run for these outputs of a graph and for its assignments -> which of their outputs are used."""
    used = {}
    waiting = [(graph.outputs[i].op, graph.outputs[i].value_index) for i in wanted]
    waiting += [(op, None) for op in graph.control_outputs]
    while waiting:
        op, number = waiting.pop()
        if op not in used:
            used[op] = set()
            waiting += [(t.op, t.value_index) for t in op.inputs] + [(before, None) for before in op.control_inputs]
        if number is not None:
            used[op].add(number)
    return used


def _graph_of(op, attribute):
    """The graph of a function that an operation calls."""
    name = getattr(attribute, "name", None) or op.get_attr(attribute).name
    found = op.graph._get_function(name)
    if not hasattr(found, "graph"):
        raise ValueError(
            f"Expected functions traced in this process. Received: '{name}', called by '{op.name}', without a graph.\n"
            "Count the Python function that it was made of."
        )
    return found.graph


# %% [markdown]
# Three kinds of operations hold graphs of their own: calls of functions, conditions and loops.


# %%
def _call(op, outputs, loop_trips, unknown):
    return _count(_graph_of(op, "f"), outputs, loop_trips, unknown)


def _branches(op, outputs, loop_trips, unknown):
    named = op.get_attr("branches") if "Case" in op.type else ("then_branch", "else_branch")
    counts = [_count(_graph_of(op, branch), outputs, loop_trips, unknown) for branch in named]
    return max(counts, key=lambda count: sum(count.values()))


def _loop(op, outputs, loop_trips, unknown):
    trips = _trips(op)
    trips = loop_trips if trips is None else trips
    if trips is None:
        raise ValueError(
            f"Expected a loop whose number of trips is in the graph. Received: '{op.name}', which depends on data.\n"
            "Pass loop_trips=, how often its body runs."
        )
    body = _graph_of(op, "body")
    counts = _count(body, range(len(body.outputs)), loop_trips, unknown)
    test = _count(_graph_of(op, "cond"), [0], loop_trips, unknown)
    return Counter({kind: trips * counts[kind] + (trips + 1) * test[kind] for kind in counts | test})


_CONTROL = {
    **dict.fromkeys(("PartitionedCall", "StatefulPartitionedCall"), _call),
    **dict.fromkeys(("If", "StatelessIf", "Case", "StatelessCase"), _branches),
    **dict.fromkeys(("While", "StatelessWhile"), _loop),
}

# %% [markdown]
# How often does a loop run? Its test compares a counter with a limit; both may be constants of the graph, and the body
# adds a constant to the counter. The loop of a gradient counts down the trips of the forward one.


# %%
def _trips(op) -> int | None:
    """Trips of a loop at most; None where the graph does not tell."""
    known, waiting = [], [_graph_of(op, "cond").outputs[0]]
    while waiting:
        test = _source(waiting.pop()).op
        if test.type == "LogicalAnd":
            waiting += test.inputs
        elif test.type in ("Less", "LessEqual"):
            counter, limit = map(_source, test.inputs)
            place = _place(counter, test.graph)
            step = None if place is None else _step(op, place)
            start = None if place is None else _static(op.inputs[place])
            place = _place(limit, test.graph)
            limit = _static(limit) if place is None else _static(op.inputs[place]) if _step(op, place) == 0 else None
            if start is not None and limit is not None and step is not None and step > 0:
                known.append(max(0, math.ceil((limit - start + (test.type == "LessEqual")) / step)))
    return min(known, default=None)


def _source(tensor):
    """The tensor that a chain of identities hands on."""
    while tensor.op.type == "Identity":
        tensor = tensor.op.inputs[0]
    return tensor


def _place(tensor, graph) -> int | None:
    """Which input of the graph a tensor is."""
    names = [t.op.name for t in graph.inputs]
    return names.index(tensor.op.name) if tensor.op.type == "Placeholder" and tensor.op.name in names else None


# %% [markdown]
# Two questions are left: what does one trip add to a variable, and is a number known before anything runs?


# %%
def _step(op, place) -> float | None:
    """What the body of a loop adds to its variable number `place`; None where that is no constant."""
    body = _graph_of(op, "body")
    after = _source(body.outputs[place])
    if _place(after, body) == place:
        return 0
    if after.op.type not in ("Add", "AddV2"):
        return None
    left, right = map(_source, after.op.inputs)
    if _place(left, body) == place:
        return _static(right)
    return _static(left) if _place(right, body) == place else None


def _static(tensor) -> float | None:
    """Value of a scalar that the graph holds; None where it does not."""
    value = tf.get_static_value(tensor)
    if value is not None:
        return value.item() if np.size(value) == 1 else None
    tensor = _source(tensor)
    if tensor.op.type not in ("While", "StatelessWhile"):
        return None
    loop, place = tensor.op, tensor.value_index
    start, step, trips = _static(loop.inputs[place]), _step(loop, place), _trips(loop)
    return None if start is None or step is None or trips is None else start + step * trips


# %% [markdown]
# ### Does the graph agree with the count by hand?
#
# The convolution from above and both of its gradients: 27,648 each.

# %% tags=["active-ipynb"]
# image, filters = tf.TensorSpec((1, 8, 8, 4)), tf.TensorSpec((3, 3, 4, 6))
#
#
# def with_gradients(x, kernel):
#     with tf.GradientTape() as tape:
#         tape.watch([x, kernel])
#         y = tf.nn.conv2d(x, kernel, 1, "SAME")
#     return tape.gradient(y, [x, kernel], output_gradients=y)
#
#
# counted = count_flops(with_gradients, image, filters)
# for kind, number in counted.by_op.items():
#     print(f"{kind:<22}{number:>8,.0f}")
# assert set(counted.by_op.values()) == {2 * 64 * 36 * 6}

# %% [markdown]
# ### Why not TensorFlow's own counter?
#
# It has one, of its first version. It is right on the pass above, and our numbers agree. But it overcounts the
# gradients of convolutions without padding, sees nothing of a called function, and counts most operations as 0.

# %% tags=["active-ipynb"]
# from tensorflow.compat.v1 import profiler
#
# tf.get_logger().setLevel("ERROR")  # it calls itself deprecated
#
#
# def tensorflow_count(function, *specs):
#     graph = tf.function(function, autograph=False).get_concrete_function(*specs).graph
#     builder = profiler.ProfileOptionBuilder
#     options = builder(builder.float_operation()).with_empty_output().build()
#     return profiler.profile(graph, options=options).total_float_ops
#
#
# def both_gradients(padding):
#     def gradients(x, kernel):
#         with tf.GradientTape() as tape:
#             tape.watch([x, kernel])
#             y = tf.nn.conv2d(x, kernel, 1, padding)
#         return tape.gradient(y, [x, kernel], output_gradients=y)
#
#     return gradients
#
#
# called = tf.function(both_gradients("SAME"))
# cases = {
#     "same padding": (both_gradients("SAME"), 3 * 2 * 64 * 36 * 6),
#     "no padding": (both_gradients("VALID"), 3 * 2 * 36 * 36 * 6),  # 6 x 6 windows
#     "in a function": (lambda x, kernel: called(x, kernel), 3 * 2 * 64 * 36 * 6),
# }
# print(f"{'':<14}{'by hand':>9}{'ours':>9}{'TensorFlow':>12}")
# for name, (function, by_hand) in cases.items():
#     ours, theirs = count_flops(function, image, filters).total, tensorflow_count(function, image, filters)
#     print(f"{name:<14}{by_hand:>9,}{ours:>9,.0f}{theirs:>12,}")
#     assert ours == by_hand

# %% [markdown]
# ## 3. What does a training step take?
#
# `training_step` traces `model.train_step`, the very function that `fit` runs: the forward pass, the loss, every
# backward pass, the optimiser, the metrics. A trace computes nothing: weights, optimiser state and the states of random
# generators stay. `prediction_flops` traces one call in inference mode, `saliency_flops` a forward and a backward pass.


# %%
def training_step(model: keras.Model, batch_size: int, targets=None) -> Flops:
    """Operations of one step of `fit` on a whole batch: forward, every backward pass, optimiser and metrics.

    No value changes. An optimiser or a metric without variables gets them, as in the first step of `fit`.

    Args:
        model: compiled `keras.Model`, `PartialBayes` among them, with input sizes that are known.
        batch_size: examples in the step.
        targets: spec, or structure of specs, of the labels; None: the outputs' shape, for a sparse loss without its
            last axis.

    Raises:
        ValueError: a model that is not compiled, or an open size.
    """
    _check_count("batch_size", batch_size)
    if not getattr(model, "compiled", False) or getattr(model, "loss", None) is None:
        raise ValueError(
            f"Expected a model compiled with a loss. Received: model={getattr(model, 'name', model)!r}, which is not.\n"
            "Call model.compile(optimizer, loss): the optimiser's operations are part of the step."
        )
    inputs = _input_specs(model, batch_size)
    targets = _target_specs(model, model.loss, batch_size) if targets is None else targets
    if not model.optimizer.built:
        model.optimizer.build(model.trainable_variables)
    return count_flops(lambda x, y: model.train_step((x, y)), inputs, targets)


# %% [markdown]
# Per example, steps of batches of different sizes can be compared. A prediction is the forward pass alone.


# %%
def training_flops(model: keras.Model, batch_size: int) -> float:
    """Operations of one step of `fit`, divided by the batch size; see `training_step`."""
    return training_step(model, batch_size).total / batch_size


def prediction_flops(model: keras.Model, batch_size: int = 1) -> float:
    """Operations of one call of a model in inference mode, per example; of a `PartialBayes`: all its samples.

    Args:
        model: built `keras.Model` with input sizes that are known.
        batch_size: examples in the call: what is done once for a batch, such as drawing weights, is shared by them.

    Raises:
        ValueError: an open size.
    """
    _check_count("batch_size", batch_size)
    flops = count_flops(lambda x: model(x, training=False), _input_specs(model, batch_size))
    return flops.total / batch_size


# %% [markdown]
# Step 2 of the method looks at gradients and changes nothing: forward and backward, no optimiser.


# %%
def saliency_flops(model: keras.Model, loss, batch_size: int) -> float:
    """Operations of a forward and a backward pass, per example: a pass of gradients over data, without an optimiser.

    Args:
        model: built `keras.Model` with input sizes that are known.
        loss: Keras loss or its name, or a callable (y, y_pred) -> loss.
        batch_size: examples in the pass.

    Raises:
        ValueError: an open size.
    """
    _check_count("batch_size", batch_size)
    compute = keras.losses.get(loss) if isinstance(loss, str | dict) else loss

    def gradients(x, y):
        variables = [variable.value for variable in model.trainable_variables]
        with tf.GradientTape(watch_accessed_variables=False) as tape:
            tape.watch(variables)
            value = tf.reduce_mean(compute(y, model(x, training=False)))
        return [g for g in tape.gradient(value, variables) if g is not None]

    flops = count_flops(gradients, _input_specs(model, batch_size), _target_specs(model, loss, batch_size))
    return flops.total / batch_size


# %% [markdown]
# A trace needs no data, only what data look like: the shapes of a batch of inputs and of its targets, taken from the
# model.


# %%
def _check_count(name, value):
    if isinstance(value, bool) or not isinstance(value, int | np.integer) or value < 1:
        raise ValueError(f"Expected {name} to be an integer >= 1. Received: {name}={value!r}")


def _network(model):
    """The Functional or Sequential model in a `PartialBayes`, which has no inputs of its own; else the model."""
    return model if getattr(model, "inputs", None) else getattr(model, "network", model)


def _input_specs(model, batch_size):
    network = _network(model)
    inputs = getattr(network, "_inputs_struct", None)  # a dict stays a dict
    inputs = getattr(network, "inputs", None) if inputs is None else inputs
    if inputs is None or not keras.tree.flatten(inputs):
        raise ValueError(
            f"Expected a built Functional or Sequential model, or a PartialBayes. Received: {model!r}\n"
            "Give it a keras.Input, or count a function of your own: count_flops(model, tf.TensorSpec(shape))."
        )
    specs = keras.tree.map_structure(lambda t: tf.TensorSpec((batch_size, *t.shape[1:]), t.dtype), inputs)
    if isinstance(specs, list | tuple) and len(specs) == 1:
        specs = specs[0]
    if not all(spec.shape.is_fully_defined() for spec in tf.nest.flatten(specs)):
        raise ValueError(
            f"Expected a model of known input sizes. Received: '{model.name}' with input {specs}.\n"
            "Build it for images of one size: the count depends on it."
        )
    return specs


def _target_specs(model, loss, batch_size):
    network = _network(model)
    outputs = getattr(network, "_outputs_struct", None)
    outputs = network.outputs if outputs is None else outputs
    outputs = outputs[0] if isinstance(outputs, list | tuple) and len(outputs) == 1 else outputs
    name = loss if isinstance(loss, str) else getattr(loss, "__name__", type(loss).__name__)
    end = -1 if "sparse" in name.lower() else None
    return keras.tree.map_structure(
        lambda t: tf.TensorSpec((batch_size, *t.shape[1:end]), "float32"),
        outputs,
    )


# %% [markdown]
# ### Where does the work go?
#
# A small network: three convolutions of 3 x 3 and one dense layer, images of 16 x 16. Its step has three parts: the
# forward pass, the backward pass (nearly twice as much), and the optimiser, which works once for a whole batch.

# %% tags=["active-ipynb"]
# keras.utils.set_random_seed(0)
#
#
# def convolution(filters, stride, name):
#     return keras.layers.Conv2D(filters, 3, stride, padding="same", activation="relu", name=name)
#
#
# network = keras.Sequential(
#     [
#         keras.Input((16, 16, 1)),
#         convolution(16, 1, "first"),
#         convolution(32, 2, "second"),
#         convolution(32, 1, "third"),
#         keras.layers.GlobalAveragePooling2D(name="pool"),
#         keras.layers.Dense(4, "sigmoid", name="last"),
#     ]
# )
# network.compile("adam", "binary_crossentropy")
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
# *Reading*: a little under twice, since nobody asks for the first layer's gradient by the image. Adam takes about 12
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

    It stands for step 1, five forward passes and one backward pass. # Differs from the paper: five samples have five
    backward passes; `training_flops` counts them, and gives about 6.

    Args:
        r_bayes: share of the weights that is Bayesian, 0 to 1.

    Raises:
        ValueError: a share out of range.

    Reference: Abboud, Lombaert, Kadoury (2024), Table 1; the formula is ours, found from its numbers.
    """
    if isinstance(r_bayes, bool) or not isinstance(r_bayes, int | float | np.number) or not 0 <= r_bayes <= 1:
        raise ValueError(f"Expected r_bayes to be a share from 0 to 1. Received: r_bayes={r_bayes!r}")
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
#
#
# steps = {name: training_step(bayesian(0.01, name), batch) for name in ("all", "split")}
# five_and_five = 5 * both / step
# five_and_one = (5 * forward + (both - forward)) / step
# print(f"five forwards, five backwards: {five_and_five:.2f} deterministic steps")
# print(f"five forwards, one backward:   {five_and_one:.2f}")
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
# hides that by leaving out four of the backward passes. With `"split"` it costs about 2: both trainings are of equally
# many epochs here, as in the paper. The recipe `sbn` gives step 3 an eighth of step 1's epochs, and costs 1.13.

# %% [markdown]
# ## 5. What must be stored?
#
# A Bayesian entry adds one trainable number, its scale, and one index of 8 bytes; the optimiser keeps its *slots* (the
# running means that it remembers of each number, two of Adam's) for the scale too. A tensor that is Bayesian throughout
# needs no index; a prior around the weights (`prior_at_loc`) keeps where each entry began, 4 bytes more.
#
# By hand, for the network above at `r_bayes` 0.01: 142 of its 14,180 weights. The weights take $4 \cdot 14{,}180 =
# 56{,}720$ bytes, the scales $4 \cdot 142$ and the indices $8 \cdot 142$ more, and 4 hold the factor of the KL: 58,428.


# %%
def parameters(model: keras.Model) -> dict[str, int]:
    """How many numbers a model has.

    Returns:
        dict: `num_weights`, the entries of all weights that can be trained, frozen ones included (a Bayesian one is one
        weight; running statistics are none); `num_trainable`, the numbers that training changes, locs *and* scales;
        `num_bayesian`, the weights that have a scale.
    """
    layers, scales = [model, *model._flatten_layers(include_self=False)], set()
    for layer in layers:
        if isinstance(layer, MaskedGaussian):
            scales |= {id(v) for v in layer._posterior_variables().values()}
    weights = {id(v): v for layer in layers for v in layer._trainable_variables if id(v) not in scales}
    return {
        "num_weights": sum(math.prod(v.shape) for v in weights.values()),
        "num_trainable": sum(math.prod(v.shape) for v in model.trainable_variables),
        "num_bayesian": sum(sum(layer.num_bayesian.values()) for layer in masked_layers(model)),
    }


def bytes_of(model: keras.Model) -> dict[str, int]:
    """Bytes that a model's variables hold.

    Returns:
        dict: `weight_bytes`, of every weight, index and running statistic; `optimizer_bytes`, of the optimiser's state:
        0 without an optimiser. One that has no slots yet gets them, as in the first step of `fit`.
    """
    optimizer = getattr(model, "optimizer", None)
    if optimizer is not None and not optimizer.built:
        optimizer.build(model.trainable_variables)
    states = {"weight_bytes": model.weights, "optimizer_bytes": getattr(optimizer, "variables", ())}
    return {key: sum(math.prod(v.shape) * tf.as_dtype(v.dtype).size for v in found) for key, found in states.items()}


# %% tags=["active-ipynb"]
# print(f"{'r_bayes':>7}{'weights':>9}{'Bayesian':>10}{'trainable':>11}{'weight bytes':>14}{'optimiser bytes':>17}")
# for r_bayes in (0, 0.01, 0.2, 1):
#     model = bayesian(r_bayes) if r_bayes else network
#     numbers, sizes = parameters(model), bytes_of(model)
#     row = (numbers["num_weights"], numbers["num_bayesian"], numbers["num_trainable"], *sizes.values())
#     print(f"{r_bayes:>7}" + "".join(f"{n:>{w},}" for n, w in zip(row, (9, 10, 11, 14, 17), strict=True)))
#     assert numbers["num_trainable"] == numbers["num_weights"] + numbers["num_bayesian"]

# %% [markdown]
# ## 6. How long does it take, and how much memory?
#
# Operations say what must be done, not how long it takes. `measured()` reads the clock, and the largest memory that the
# process held within the block (on a GPU: that was allocated there).


# %%
@dataclass
class Used:
    """What a block took; filled in at its end.

    Attributes:
        seconds: wall time.
        peak_bytes: largest memory within the block; None where the system does not tell.
        start_bytes: memory in use when the block began; None where the system does not tell.
        note: what `peak_bytes` is.
    """

    seconds: float | None = None
    peak_bytes: int | None = None
    start_bytes: int | None = None
    note: str = ""


_open_blocks: list[Used] = []  # blocks may be nested: an inner one must not hide an outer one's peak


@contextlib.contextmanager
def measured() -> Iterator[Used]:
    """Measures a block: `with measured() as used: ...`, then `used.seconds` and `used.peak_bytes`.

    Blocks may be nested; a block that ends by an exception is measured up to there. It never fails by itself.
    """
    used = Used()
    _see_peak()  # for the blocks around this one, before the system forgets
    used.note = _forget_peak()
    used.start_bytes = _bytes_in_use()
    _open_blocks.append(used)
    start = time.perf_counter()
    try:
        yield used
    finally:
        used.seconds = time.perf_counter() - start
        _see_peak()
        _open_blocks.remove(used)


# %% [markdown]
# A system keeps *one* largest value since it was last told to forget. An inner block that makes it forget would spoil
# the outer one's, so every open block notes the peak first.


# %%
def _see_peak():
    """Tell every open block the largest memory since the last time that the system was told to forget it."""
    if not _open_blocks:
        return
    peak = _peak_bytes()
    for used in _open_blocks:
        if peak is not None:
            used.peak_bytes = max(peak, used.peak_bytes or 0)


def _gpus():
    try:
        return [f"GPU:{number}" for number, _ in enumerate(tf.config.list_logical_devices("GPU"))]
    except (RuntimeError, tf.errors.OpError):
        return []


def _forget_peak() -> str:
    """Start a new peak where the system lets us; what the peak then is."""
    try:
        if gpus := _gpus():
            for gpu in gpus:
                tf.config.experimental.reset_memory_stats(gpu)
            return "largest memory allocated on the GPUs within the block"
        with open("/proc/self/clear_refs", "w") as file:
            file.write("5")
        return "largest resident memory of the process within the block"
    except (OSError, RuntimeError, ValueError, tf.errors.OpError):
        return "largest memory of the process since it began: this system keeps no other"


# %% [markdown]
# Where does the number come from? From TensorFlow on a GPU, from the files of the process on Linux, and elsewhere from
# what the process has ever held.


# %%
def _bytes_in_use() -> int | None:
    """Memory in use now."""
    try:
        return _memory("current", "VmRSS")
    except _UNTOLD:
        return None


def _peak_bytes() -> int | None:
    """Largest memory since the last `_forget_peak`."""
    try:
        return _memory("peak", "VmHWM")
    except _UNTOLD:
        return _largest_ever()


# A system that does not tell its memory raises one of these.
_UNTOLD = (OSError, RuntimeError, ValueError, KeyError, StopIteration, tf.errors.OpError)


def _memory(on_gpu: str, on_linux: str) -> int:
    """Bytes under a name of TensorFlow's GPU statistics, or of the process's status where there is no GPU."""
    if gpus := _gpus():
        return sum(tf.config.experimental.get_memory_info(gpu)[on_gpu] for gpu in gpus)
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith(on_linux))


def _largest_ever() -> int | None:
    try:
        import resource
        import sys
    except ImportError:  # Windows
        return None
    largest = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return int(largest if sys.platform == "darwin" else largest * 1024)


# %% [markdown]
# A check: 200 MB are held, and given back within an inner block. The outer block must have seen them.

# %% tags=["active-ipynb"]
# with measured() as used:
#     held = np.ones(25_000_000)  # 200 MB
#     with measured() as inner:
#         held = None
#         time.sleep(0.01)
# assert used.peak_bytes > 200e6 and used.seconds > inner.seconds >= 0.01
# assert used.start_bytes is None or used.peak_bytes - used.start_bytes > 150e6

# %% [markdown]
# ### Do operations tell the time?
#
# The three training steps of section 4, by count and by the clock: medians of 30 steps, the deterministic one as 1.

# %% tags=["active-ipynb", "nbval-ignore-output"]
# rng = np.random.default_rng(0)
# x = rng.normal(size=(batch, 16, 16, 1)).astype("float32")
# y = rng.integers(0, 2, (batch, 4)).astype("float32")
# models = {"deterministic": network, "all": bayesian(0.01), "split": bayesian(0.01, "split")}
# times = {name: [] for name in models}
# for trial in range(31):  # one after the other, so that a busy machine hits all alike; the first ones trace
#     for name, model in models.items():
#         with measured() as used:
#             model.train_on_batch(x, y)
#         times[name] += [used.seconds] if trial else []
# print(f"{'':<15}{'operations':>11}{'time':>7}")
# for name, taken in times.items():
#     operations = 1 if name == "deterministic" else steps[name].total / batch / step
#     print(f"{name:<15}{operations:>11.2f}{np.median(taken) / np.median(times['deterministic']):>7.2f}")

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
# - `"split"` draws five samples with the operations of one pass; on the clock it takes more, 1.3 passes here.
# - A graph is counted as it was traced: fusion, and what runs at once, is the clock's to tell.
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
#    All that comes before that layer, in training too as long as nothing there is random. `PartialBayes` runs it
#    once, and the count shows it: $1 + 4 f$ passes, with $f$ the share of the operations that the layer and what
#    follows take.
#    </details>
#
# ## References
#
# - Abboud, Lombaert, Kadoury (2024). *Sparse Bayesian Networks: Efficient Uncertainty Quantification in Medical Image
#   Analysis*. MICCAI.
# - Griewank, Walther (2008). *Evaluating Derivatives*. SIAM. Chapter 4 bounds the cost of a gradient.
# - Molchanov, Tyree, Karras, Aila, Kautz (2017). *Pruning Convolutional Neural Networks for Resource Efficient
#   Inference*. ICLR. arXiv:1611.06440. Appendix A.1 counts operations.
