"""The graph of a Keras network: its operations, what they cost, and which of them depend on which weights.

Nested Functional and Sequential models are entered: their operations count as the network's own. A layer that holds
several operations (an LSTM, an attention, a wrapped or subclassed model) is one operation.
"""

from __future__ import annotations

import collections
import contextlib
import math
from collections.abc import Iterable
from dataclasses import dataclass

import keras

from sbn_tf.core.keras_internals import (
    all_layers,
    children,
    functional_of,
    nodes_in_order,
    nodes_of,
    noise_states,
    traced,
)
from sbn_tf.core.sharing import Shared, sharing
from sbn_tf.core.weights import all_weights
from sbn_tf.layers import MaskedGaussian, masked_layers

__all__ = ["Graph", "Operation", "layers_of"]


@dataclass
class Operation:
    """One use of one layer (or of one `keras.ops` function) in a network.

    Attributes:
        name: the layer's name, those of nested models before it: "encoder/conv1"; a second use is "encoder/conv1:1".
        layer: the layer, or the Keras operation where it is none.
        sources: positions, in `Graph.steps`, of the operations whose outputs it takes.
        multiply_adds: multiplications with an addition, for one example.
    """

    name: str
    layer: object
    sources: frozenset
    multiply_adds: float


class Graph:
    """The operations of a Functional or Sequential model in the order in which they run.

    Any other model, a subclassed one for instance, is one single operation.

    Args:
        model: built `keras.Model`.
        open_size: what a size that the model leaves open counts as (height and width of an image, length of a text).

    Attributes:
        steps: list of `Operation`s.

    Raises:
        ValueError: a model that is not built.
    """

    def __init__(self, model: keras.Model, open_size: int = 64):
        if not isinstance(model, keras.Model) or not model.built:
            raise ValueError(f"Expected a built keras.Model (call it once on data). Received: {model!r}")
        self.model, self._open_size = model, open_size
        self.steps: list[Operation] = []
        self._positions, self._within, self._functionals = {}, {}, {}
        self._nodes, self._drawing = {}, {}
        functional = functional_of(model)
        if functional is None:
            weights = sum(math.prod(w.shape) for w in model.weights)
            self.steps.append(Operation(model.name, model, frozenset(), float(weights)))
        else:
            tensors = {id(x): (self._sized(x), frozenset()) for x in functional.inputs}
            self._walk(functional, (), "", tensors)
        self._steps_of, self._costs = self._by_weight(), [step.multiply_adds for step in self.steps]
        self._after = self._with_all_after()
        for training in (False, True) if masked_layers(model) else ():
            self._per_sample(training)  # calls are traced here, and not later within the trace of a step

    @property
    def operations(self) -> dict[str, float]:
        """Multiply-adds of one example, by operation.

        Convolutions, Dense, EinsumDense, depthwise and transposed layers by their formula; any other operation takes
        the size of its output, and each entry of its matrices once for every position of its input.
        """
        return {step.name: step.multiply_adds for step in self.steps}

    def fan_out(self, keys: str | Iterable[str]) -> float:
        """Share of the multiply-adds that run again for each sample if the weights `keys` are Bayesian: 0 to 1.

        These are the operations that use such a weight, and all that depend on them.

        Args:
            keys: names of weights as in `sbn_tf.saliency.named_weights`, such as "encoder/conv1/kernel".

        Raises:
            ValueError: a key that the model does not have.
        """
        again = 0
        for key in [keys] if isinstance(keys, str) else keys:
            if key not in self._steps_of:
                raise ValueError(f"No weight is called {key!r}. Keys look like: {list(self._steps_of)[:3]}")
            again |= self._dependent(key)
        total = sum(self._costs)
        return sum(cost for i, cost in enumerate(self._costs) if again >> i & 1) / total if total else 0.0

    def runs_once(self, training: bool = False) -> list[str]:
        """Names of the operations whose outputs are the same for every posterior sample, masked as the model is now.

        In training what is random, dropout for one, and all after it runs again for each sample as well. Custom layers
        and Lambdas are traced to see whether they draw random numbers.
        """
        again = self._per_sample(training)
        return [step.name for i, step in enumerate(self.steps) if not again[i]]

    def mixes_batch(self) -> str | None:
        """Name of the first operation that may not keep axis 0 as the batch, in order; None: all keep it.

        Known to keep it are Keras's own layers other than Lambda, layers that act along axis 0, and TimeDistributed
        around a masked layer; `sbn_tf`'s layers; operations of `keras.ops` that act entry by entry or along other axes,
        as `x[:, 0]` does.
        """
        if functional_of(self.model) is None:
            return self.model.name
        return next((step.name for step in self.steps if not _keeps_batch(step.layer)), None)

    def reused_layers(self) -> list:
        """Layers that the model uses more than once."""
        uses = collections.Counter(id(step.layer) for step in self.steps)
        return list({id(step.layer): step.layer for step in self.steps if uses[id(step.layer)] > 1}.values())

    def sharing(self, training: bool = False) -> contextlib.AbstractContextManager[set[int]]:
        """Within it the model may be called many times: operations that no draw changes run at the first call only.

        The inputs and `training` must be the same at every call. Where the model is not Functional everything runs
        each time.

        Yields:
            A set that fills with the ids of the losses (`add_loss`, activity regularizers) of what has run once.
        """
        return sharing(self._functionals.values(), Shared(self._shared_paths(training)))

    # ---- below: how it is done ----

    def _walk(self, functional, path, prefix, tensors):
        """Append a Functional's operations; `tensors`: id -> (KerasTensor of known size, positions it comes from)."""
        self._functionals[id(functional)] = functional
        for node in nodes_in_order(functional):
            if any(id(x) not in tensors for x in node.input_tensors):
                continue
            here, name = (*path, id(node)), f"{prefix}{node.operation.name}"
            sources = frozenset().union(*(tensors[id(x)][1] for x in node.input_tensors))
            inner = functional_of(node.operation)
            first = len(self.steps)
            if inner is None:
                outputs = self._outputs_of(node, tensors)
                cost = _multiply_adds(node.operation, [tensors[id(x)][0] for x in node.input_tensors], outputs)
                self.steps.append(Operation(self._new_name(name), node.operation, sources, cost))
                self._positions[here] = first
                self._nodes[first] = node
                made = [(x, frozenset([first])) for x in outputs]
            else:
                entering = {
                    id(x): given for x, given in zip(inner.inputs, _entering(node, inner, tensors), strict=True)
                }
                self._walk(inner, here, f"{name}/", entering)
                made = [entering[id(x)] for x in inner.outputs]
            self._within[here] = (range(first, len(self.steps)), sources)
            tensors.update({id(x): out for x, out in zip(node.outputs, made, strict=False)})

    def _new_name(self, name):
        uses = sum(step.name == name or step.name.startswith(f"{name}:") for step in self.steps)
        return f"{name}:{uses}" if uses else name

    def _sized(self, x):
        if None not in x.shape[1:]:
            return x
        shape = (x.shape[0], *(self._open_size if size is None else size for size in x.shape[1:]))
        return keras.KerasTensor(shape, dtype=x.dtype, sparse=x.sparse, record_history=False)

    def _outputs_of(self, node, tensors):
        """A node's outputs, of known size: its own, or computed again where the model leaves a size open."""
        if not any(None in x.shape[1:] for x in (*node.input_tensors, *node.outputs)):
            return node.outputs
        args, kwargs = node.arguments.fill_in({key: x for key, (x, _) in tensors.items()})
        try:
            outputs = keras.tree.flatten(node.operation.compute_output_spec(*args, **kwargs))
        except Exception:  # of whatever kind: the size that was made up does not fit this network
            outputs = node.outputs
        return [self._sized(x) for x in outputs]

    def _by_weight(self):
        """Key of each weight -> positions of the operations that use it."""
        users = {}
        for i, step in enumerate(self.steps):
            for variable in getattr(step.layer, "variables", ()):
                users.setdefault(id(variable), []).append(i)
        return {weight.key: users.get(id(weight.variable), []) for weight in all_weights(self.model)}

    def _with_all_after(self):
        """For each operation itself and all that depend on it, as the bits of an int."""
        after = [1 << i for i in range(len(self.steps))]
        for i in reversed(range(len(self.steps))):
            for source in self.steps[i].sources:
                after[source] |= after[i]
        return after

    def _dependent(self, key):
        bits = 0
        for i in self._steps_of[key]:
            bits |= self._after[i]
        return bits

    def _per_sample(self, training):
        again = []
        for i, step in enumerate(self.steps):
            own = _is_bayesian(step.layer) or _is_random(step.layer, training)
            again.append(own or any(again[source] for source in step.sources) or self._draws(i, training))
        return again

    def _draws(self, i, training):
        if i in self._nodes and (i, training) not in self._drawing:
            self._drawing[i, training] = _draws_unseeded(self._nodes[i], training)
        return self._drawing.get((i, training), False)

    def _shared_paths(self, training):
        again = self._per_sample(training)
        return {
            path
            for path, (inside, sources) in self._within.items()
            if not any(again[i] for i in inside) and not any(again[i] for i in sources)
        }


def _entering(node, inner, tensors):
    """What a nested model's inputs get: (tensor, positions) for each."""
    first = node.arguments.args[0] if node.arguments.args else node.arguments.kwargs.get("inputs")
    known = {id(x) for x in keras.tree.flatten(first)}
    if isinstance(first, dict):  # by name, as Keras does: it may hold more than the inner model takes
        named = isinstance(inner.input, dict)
        first = [first.get(key) for key in (sorted(inner.input) if named else [x.name for x in inner.inputs])]
    given = [tensors.get(id(x)) for x in keras.tree.flatten(first)]
    others = [tensors[id(x)][1] for x in node.input_tensors if id(x) not in known]  # a mask given as an argument
    return [
        (x, frozenset()) if got is None else (got[0], got[1].union(*others))
        for x, got in zip(inner.inputs, given, strict=True)
    ]


# ---- what an operation costs ----

_CONVOLUTIONS = (keras.layers.Conv1D, keras.layers.Conv2D, keras.layers.Conv3D)
_DEPTHWISE = (keras.layers.DepthwiseConv1D, keras.layers.DepthwiseConv2D)
_SEPARABLE = (keras.layers.SeparableConv1D, keras.layers.SeparableConv2D)
_TRANSPOSED = (keras.layers.Conv1DTranspose, keras.layers.Conv2DTranspose, keras.layers.Conv3DTranspose)


def _multiply_adds(operation, inputs, outputs) -> float:
    first = getattr(operation, "data_format", None) == "channels_first"
    size = float(sum(math.prod(x.shape[1:]) for x in outputs))

    def positions(x):
        return math.prod(x.shape[2:] if first else x.shape[1:-1])

    if isinstance(operation, _SEPARABLE):
        kernels = (operation.depthwise_kernel, operation.pointwise_kernel)
        return float(positions(outputs[0]) * sum(math.prod(k.shape) for k in kernels))
    if isinstance(operation, _TRANSPOSED):
        return float(positions(inputs[0]) * math.prod(operation.kernel.shape))
    if isinstance(operation, (*_CONVOLUTIONS, *_DEPTHWISE, keras.layers.Dense)):
        return float(positions(outputs[0]) * math.prod(operation.kernel.shape))
    if isinstance(operation, keras.layers.EinsumDense):
        return float(_einsum(operation, inputs[0]))
    if isinstance(operation, keras.layers.Embedding) or not isinstance(operation, keras.layers.Layer):
        return size
    matrices = sum(math.prod(w.shape) for w in operation.weights if len(w.shape) > 1)
    return size + (positions(inputs[0]) * matrices if inputs and matrices else 0.0)


def _einsum(layer, x):
    """Each entry of the kernel once for every position that the inputs have beside the kernel's axes."""
    given, kernel = layer.equation.replace(" ", "").split("->")[0].split(",")
    before, dots, after = given.partition("...")
    shape = list(x.shape)
    end = len(shape) - len(after)
    sizes = [*zip(before, shape[: len(before)], strict=True), *zip(after, shape[end:], strict=True)]
    sizes += [("...", size) for size in shape[len(before) : end]] if dots else []
    batch = 0 if before else next((i for i, (label, _) in enumerate(sizes) if label == "..."), 0)
    positions = (size for i, (label, size) in enumerate(sizes) if i != batch and label not in kernel)
    return math.prod(layer.kernel.shape) * math.prod(positions)


# ---- what an operation depends on ----


def layers_of(operation: object) -> list:
    """An operation's layers: itself and those in it; none where it is of `keras.ops`."""
    return all_layers(operation) if isinstance(operation, keras.layers.Layer) else []


def _is_bayesian(operation):
    return isinstance(operation, keras.layers.Layer) and bool(masked_layers(operation))


def _is_random(operation, training):
    """Whether two calls may differ: dropout and its like in training; of layers that are not Keras's own, always."""
    for layer in layers_of(operation):
        if isinstance(layer, MaskedGaussian):
            continue
        seeded = _has_noise(layer)
        if not _is_of_keras(layer):
            if seeded or hasattr(layer, "seed"):
                return True
        elif training and seeded:
            rates = [getattr(layer, name, None) for name in ("rate", "dropout", "recurrent_dropout")]
            if any(rates) or all(rate is None for rate in rates):  # an LSTM has a seed without any dropout
                return True
    return False


def _has_noise(layer):
    """Whether a layer has a seed generator of its own."""
    inside = {id(state) for child in children(layer) for state in noise_states(child)}
    return any(id(state) not in inside for state in noise_states(layer))


def _draws_unseeded(node, training) -> bool:
    """Whether a foreign layer or a Lambda draws random numbers.

    One without a seed generator (`keras.random.normal(shape)`, `tf.random.normal`) does not say so: its call is traced
    and its operations are read. Running all of them again for each sample instead would leave no trunk to a network of
    custom layers. A layer that cannot be traced counts as random.
    """
    if all(_is_of_keras(x) and not isinstance(x, keras.layers.Lambda) for x in layers_of(node.operation)):
        return False
    found = []

    def call(*args, **kwargs):
        outputs = node.operation(*args, **kwargs)
        if keras.backend.backend() == "tensorflow":
            import tensorflow as tf

            graph = tf.compat.v1.get_default_graph().as_graph_def()
            nodes = [*graph.node, *(node for function in graph.library.function for node in function.node_def)]
            found.append(any("Random" in node.op or node.op == "Multinomial" for node in nodes))
        return outputs

    mode = {"training": training} if "training" in getattr(node.operation, "call_signature_parameters", ()) else {}
    try:
        traced(call, *node.arguments.args, **{**node.arguments.kwargs, **mode})
    except Exception:  # whatever a foreign call raises; on JAX that of a draw without a seed
        return True
    return any(found)


def _is_of_keras(operation):
    return type(operation).__module__.split(".")[0] == "keras"


_NAMES_ENTRY_BY_ENTRY = """
Abs Absolute Add Cast Celu Clip Cos Cosh Divide Elu Equal Erf Exp Expm1 Gelu Glu Greater GreaterEqual HardSigmoid
HardSilu HardTanh Identity LeakyRelu Less LessEqual Log Log1p LogSigmoid LogicalAnd LogicalNot LogicalOr Maximum Minimum
Mod Multiply Negative NotEqual OnesLike Power Reciprocal Relu Relu6 Round Rsqrt Selu Sigmoid Sign Silu Sin Sinh Softplus
Softsign Sqrt Square Subtract Tan Tanh Threshold TrueDivide Where ZerosLike
"""
_NAMES_ALONG_AXES = "Amax Amin Concatenate LogSoftmax Logsumexp Max Mean Min Prod Softmax Std Sum Var"
_ENTRY_BY_ENTRY, _ALONG_AXES = frozenset(_NAMES_ENTRY_BY_ENTRY.split()), frozenset(_NAMES_ALONG_AXES.split())


def _keeps_batch(operation):
    if isinstance(operation, keras.layers.Layer):
        known = _is_of_keras(operation) or isinstance(operation, MaskedGaussian)
        mixing = isinstance(operation, keras.layers.Lambda)
        if isinstance(operation, keras.layers.TimeDistributed):  # a masked layer in it gets one time step after another
            mixing = bool(masked_layers(operation))
        wrapped = getattr(operation, "layer", None)  # what a wrapper holds may be anything
        inside = not isinstance(wrapped, keras.layers.Layer) or _keeps_batch(wrapped)
        return known and not mixing and inside and 0 not in _axes(operation)
    name = type(operation).__name__
    if name == "GetItem":  # x[:, 0]
        keys = [(*node.arguments.args, *node.arguments.kwargs.values())[1] for node in nodes_of(operation)]
        return all(isinstance(key, tuple | list) and tuple(key[:1]) == (slice(None),) for key in keys)  # loaded: a list
    return name in _ENTRY_BY_ENTRY or (name in _ALONG_AXES and _axes(operation) and 0 not in _axes(operation))


def _axes(operation):
    """The axes that an operation names; none of its own: ()."""
    axis = getattr(operation, "axis", None)
    axes = () if axis is None else tuple(axis) if isinstance(axis, list | tuple) else (axis,)
    return tuple(a + len(node.input_tensors[0].shape) if a < 0 else a for node in nodes_of(operation)[:1] for a in axes)
