"""Counts the operations of a traced TensorFlow graph: which nodes run, how often, and what each of them takes.

The lesson on cost says what is counted, and has the rules for convolutions and matrix products. The rules for all other
kinds are the tables here.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import keras
import numpy as np

from sbn_tf.core.checks import check_count

if keras.backend.backend() == "tensorflow":
    import tensorflow as tf

__all__ = ["count", "einsum", "entries"]

# One operation an entry of the first output; below, the few that take more.
_ONE_AN_OUTPUT = """
Abs Acos Acosh Add AddV2 Asin Asinh Atan Atan2 Atanh BesselI0e BesselI1e BiasAdd Ceil ClipByValue Cos Cosh Cumprod
Cumsum CumulativeLogsumexp Digamma Div DivNoNan Elu EluGrad Equal Erf Erfc Erfinv Exp Expm1 Floor FloorDiv FloorMod
Greater GreaterEqual Igamma Igammac Inv InvGrad IsFinite IsInf IsNan LeakyRelu LeakyReluGrad Less LessEqual Lgamma Log
Log1p Maximum Minimum Mod Mul MulNoNan Ndtri Neg NextAfter NotEqual Pow RealDiv Reciprocal ReciprocalGrad Relu Relu6
Relu6Grad ReluGrad Rint Round Rsqrt RsqrtGrad Selu SeluGrad Sigmoid SigmoidGrad Sign Sin Sinh Softplus SoftplusGrad
Softsign SoftsignGrad Sqrt SqrtGrad Square SquaredDifference Sub Tan Tanh TanhGrad TruncateDiv TruncateMod Xdivy
Xlog1py Xlogy Zeta RandomStandardNormal RandomUniform TruncatedNormal StatelessRandomNormal StatelessRandomNormalV2
StatelessRandomUniform StatelessRandomUniformV2 StatelessTruncatedNormal StatelessTruncatedNormalV2
"""
_AN_OUTPUT = dict.fromkeys(_ONE_AN_OUTPUT.split(), 1) | {
    "Softmax": 5,  # maximum, difference, exponential, sum, quotient
    "LogSoftmax": 5,
    "ResizeBilinear": 8,
    "ResizeBicubic": 32,
}

# Operation: (which input, how many operations an entry of it).
_ONE_AN_INPUT = """
All Any ArgMax ArgMin BiasAddGrad EuclideanNorm Max Mean Min Prod ResizeNearestNeighborGrad SegmentSum Sum
UnsortedSegmentMax UnsortedSegmentMin UnsortedSegmentSum MirrorPadGrad TopKV2
"""
_AN_INPUT = dict.fromkeys(_ONE_AN_INPUT.split(), (0, 1)) | {
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

# These move or copy numbers, or ask for a shape; they compute none.
_FREE_NAMES = """
Assert AssignVariableOp BatchToSpace BatchToSpaceND Bitcast BroadcastArgs BroadcastGradientArgs BroadcastTo Bucketize
Cast CheckNumerics Concat ConcatV2 Const DepthToSpace DestroyResourceOp Diag DiagPart DynamicPartition DynamicStitch
Empty EnsureShape ExpandDims ExtractImagePatches Fill Gather GatherNd GatherV2 Identity IdentityN InvertPermutation
LinSpace MatrixBandPart MatrixDiag MatrixDiagPart MatrixDiagPartV3 MatrixDiagV3 MatrixSetDiagV3 MirrorPad NoOp OneHot
OnesLike Pack ParallelConcat Pad PadV2 ParallelDynamicStitch Placeholder PlaceholderWithDefault PreventGradient Print
PrintV2 Range ReadVariableOp Reshape ResizeNearestNeighbor ResourceGather ResourceGatherNd ResourceScatterUpdate
Reverse ReverseSequence ReverseV2 Roll ScatterNd Select SelectV2 Shape ShapeN Size Slice Snapshot SpaceToBatch
SpaceToBatchND SpaceToDepth SparseToDense Split SplitV Squeeze StopGradient StridedSlice StridedSliceGrad
TensorScatterUpdate Tile Transpose Unique Unpack VarHandleOp VarIsInitializedOp VariableShape VariableV2 Where
ZerosLike
"""
_FREE = frozenset(_FREE_NAMES.split())
_FREE_FAMILIES = ("TensorList", "TensorArray", "StatelessRandomGet")


def count(
    graph: Any, rules: Mapping[str, Callable], loop_trips: int | None = None
) -> tuple[dict[str, float], tuple[str, ...]]:
    """Operations that run for the outputs of a graph and for its assignments to variables.

    Args:
        graph: of a `tf.function`, traced with static shapes.
        rules: kind of operation -> a function of the node that gives its count; the tables here have the other kinds.
        loop_trips: how often the body of a loop runs whose number of trips is not in the graph.

    Returns:
        tuple: kind -> operations, largest first; and the kinds that no table has, counted as 1 an entry of the output.

    Raises:
        ValueError: an open size, or a loop whose number of trips is unknown.
    """
    if loop_trips is not None:
        check_count("loop_trips", loop_trips)
    counting = _Counting({**_RULES, **rules}, loop_trips)
    counts = counting.graph(graph, range(len(graph.outputs)))
    return {kind: float(n) for kind, n in counts.most_common() if n}, tuple(sorted(counting.unknown))


def entries(tensor: Any) -> int:
    """How many entries a tensor of a graph has.

    Raises:
        ValueError: an open size.
    """
    if not tensor.shape.is_fully_defined():
        raise ValueError(
            f"Expected shapes without open sizes. Received: {tensor.shape} in operation '{tensor.op.name}' "
            f"({tensor.op.type}).\nFix the size that it depends on: trace with static shapes, and no boolean masks."
        )
    return tensor.shape.num_elements()


# ---- rules of single operations


def einsum(op: Any) -> int:
    """An Einstein sum: in `ab,bc->ac` each combination of a, b and c is one product, and b is summed over."""
    terms, result = op.get_attr("equation").decode().replace(" ", "").split("->")
    sizes: dict = {}
    for term, tensor in zip(terms.split(","), op.inputs, strict=True):
        entries(tensor)
        before, dots, after = term.partition("...")
        shape = tensor.shape.as_list()
        spread = shape[len(before) : len(shape) - len(after)] if dots else []
        for position, size in enumerate(reversed(spread)):
            sizes[position] = max(size, sizes.get(position, 1))
        sizes.update(zip(before + after, shape[: len(before)] + shape[len(shape) - len(after) :], strict=True))
    combinations = math.prod(sizes.values())
    if len(op.inputs) == 1:
        return combinations if combinations > entries(op.outputs[0]) else 0  # a sum, or a transposition
    is_summed = any(label not in result for label in sizes if isinstance(label, str))
    return (2 if is_summed else 1) * combinations


def _pooling(op):
    window, is_gradient = math.prod(op.get_attr("ksize")), "Grad" in op.type
    if not is_gradient:
        return window * entries(op.outputs[0])
    return (window + 1 if op.type.startswith("MaxPool") else 2 * window) * entries(op.inputs[1])


def _batch_norm(op):
    in_training, in_inference = (10, 5) if "Grad" in op.type else (8, 2)
    return (in_training if op.get_attr("is_training") else in_inference) * entries(op.inputs[0])


def _add_n(op):
    return (len(op.inputs) - 1) * entries(op.outputs[0])


_RULES = {
    **{f"{kind}Pool{rank}{grad}": _pooling for kind in ("Max", "Avg") for rank in ("", "3D") for grad in ("", "Grad")},
    **{f"FusedBatchNorm{grad}{version}": _batch_norm for grad in ("", "Grad") for version in ("", "V2", "V3")},
    "AddN": _add_n,
    "AccumulateNV2": _add_n,
}


def _is_float(tensor):
    return tensor.dtype.is_floating or tensor.dtype.is_complex


# ---- which operations run, and how often


class _Counting:
    """One count: the rules, and what was met that no rule has."""

    def __init__(self, rules, loop_trips):
        self.rules, self.loop_trips, self.unknown = rules, loop_trips, set()

    def graph(self, graph, wanted: Iterable[int]) -> Counter:
        """Kind -> operations that run for the outputs of these numbers."""
        counts: Counter = Counter()
        for op, outputs in _needed(graph, wanted).items():
            if op.type in ("PartitionedCall", "StatefulPartitionedCall"):
                counts.update(self.graph(_graph_of(op, "f"), outputs))
            elif op.type in ("If", "StatelessIf", "Case", "StatelessCase"):
                counts.update(self.costliest_branch(op, outputs))
            elif op.type in ("While", "StatelessWhile"):
                counts.update(self.loop(op))
            else:
                counts[op.type] += self.operation(op)
        return counts

    def operation(self, op) -> int:
        """Operations of one node."""
        kind = op.type
        if kind in _FREE or kind.startswith(_FREE_FAMILIES) or not any(map(_is_float, (*op.inputs, *op.outputs))):
            return 0
        if kind in self.rules:
            return self.rules[kind](op)
        if kind in _AN_OUTPUT:
            return _AN_OUTPUT[kind] * entries(op.outputs[0])
        if kind in _AN_INPUT:
            number, each = _AN_INPUT[kind]
            return each * entries(op.inputs[number])
        self.unknown.add(kind)
        if op.outputs:
            return sum(entries(t) for t in op.outputs if _is_float(t))
        return max(entries(t) for t in op.inputs if _is_float(t))

    def costliest_branch(self, op, outputs) -> Counter:
        """Of a condition."""
        named = op.get_attr("branches") if "Case" in op.type else ("then_branch", "else_branch")
        return max((self.graph(_graph_of(op, branch), outputs) for branch in named), key=Counter.total)

    def loop(self, op) -> Counter:
        """The body as often as it runs, the test once more."""
        trips = _trips(op)
        trips = self.loop_trips if trips is None else trips
        if trips is None:
            raise ValueError(
                f"Expected a loop whose number of trips is in the graph. Received: '{op.name}', which depends on data."
                "\nPass loop_trips=, how often its body runs."
            )
        body = _graph_of(op, "body")
        counts, test = self.graph(body, range(len(body.outputs))), self.graph(_graph_of(op, "cond"), [0])
        return Counter({kind: trips * counts[kind] + (trips + 1) * test[kind] for kind in counts | test})


def _needed(graph, wanted) -> dict:
    """Operations that run for these outputs of a graph and for its assignments -> which of their outputs are used."""
    used: dict = {}
    waiting: list = [(graph.outputs[i].op, graph.outputs[i].value_index) for i in wanted]
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
    found = op.graph._get_function(name)  # TensorFlow has no public way from a call to the graph that is called
    if not hasattr(found, "graph"):
        raise ValueError(
            f"Expected functions traced in this process. Received: '{name}', called by '{op.name}', without a graph.\n"
            "Count the Python function that it was made of."
        )
    return found.graph


def _trips(op) -> int | None:
    """How often a loop runs at most; None where that is not in the graph.

    Its test compares a counter with a limit, and its body adds a constant to the counter.
    """
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
    """The tensor at the start of a chain of identities."""
    while tensor.op.type == "Identity":
        tensor = tensor.op.inputs[0]
    return tensor


def _place(tensor, graph) -> int | None:
    """Which input of the graph a tensor is."""
    names = [t.op.name for t in graph.inputs]
    return names.index(tensor.op.name) if tensor.op.type == "Placeholder" and tensor.op.name in names else None


def _step(op, place) -> float | None:
    """What one trip of a loop adds to its variable number `place`; None where that is no constant."""
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
    """The value of a scalar that is known before anything runs, or None.

    The loop of a gradient counts down the trips of the forward loop, so these are followed too.
    """
    value = tf.get_static_value(tensor)
    if value is not None:
        return value.item() if np.size(value) == 1 else None
    tensor = _source(tensor)
    if tensor.op.type not in ("While", "StatelessWhile"):
        return None
    loop, place = tensor.op, tensor.value_index
    start, step, trips = _static(loop.inputs[place]), _step(loop, place), _trips(loop)
    return None if start is None or step is None or trips is None else start + step * trips
