"""What a network's outputs are, and how the outputs of several posterior samples become one prediction."""

from __future__ import annotations

import math
import warnings
from collections import Counter

import keras
from keras import ops

from sbn_tf.core.checks import check_flag
from sbn_tf.core.keras_internals import loss_arguments, made_by, mask_of, set_mask
from sbn_tf.core.wrapper import MaskedWrapper

__all__ = [
    "Outputs",
    "class_axes",
    "entropy",
    "input_structure",
    "is_samples",
    "names_of_outputs",
    "output_kind",
    "output_structure",
]


def entropy(probs, kind: str, axis: int = -1):
    """Entropy in nats: of each Bernoulli ("sigmoid"), or over the axis of the classes ("softmax")."""

    def xlogx(p):
        return p * ops.log(ops.maximum(p, 1e-30))

    if kind == "sigmoid":
        return -xlogx(probs) - xlogx(1.0 - probs)
    return -ops.sum(xlogx(probs), axis=axis)


class Outputs:
    """The kind of a network's outputs, and means over samples of them.

    A mean over samples is one of probabilities. Of logits it is computed by sums of exponentials, so that no
    probability becomes 0 or 1 on the way, and returned as a logit: for logits z_s of a sigmoid it is
    `logsumexp(log_sigmoid(z_s)) - logsumexp(log_sigmoid(-z_s))`.

    Args:
        probabilities: "sigmoid", "softmax", None (no probabilities), or a list of these, one for each output.
        from_logits: the outputs are logits of these probabilities.
        axes: where the classes of each output lie, see `class_axes`.

    Raises:
        ValueError: another kind, or logits of more than one kind.
    """

    def __init__(self, probabilities, from_logits: bool, axes: list):
        self.probabilities, self.from_logits, self._axes, self._of_loss = probabilities, from_logits, axes, -1
        for kind in probabilities if isinstance(probabilities, list) else [probabilities]:
            if kind not in ("sigmoid", "softmax", None):
                raise ValueError(
                    'Expected probabilities to be one of ("sigmoid", "softmax", None). '
                    f"Received: probabilities={kind!r}"
                )
        check_flag("from_logits", from_logits)
        if from_logits and probabilities not in ("sigmoid", "softmax"):
            raise ValueError('With from_logits=True pass probabilities="sigmoid" or "softmax".')

    @property
    def axes(self) -> list[int]:
        """The axis of the classes of each output, counted from the end; -1 where nothing says another."""
        return [self._of_loss if axis is None else axis for axis in self._axes]

    def as_probabilities(self, outputs):
        """Outputs as probabilities, not in half precision: its entropies would be NaN."""
        outputs = keras.tree.map_structure(_at_least_float32, outputs)
        if not self.from_logits:
            return outputs
        if self.probabilities == "sigmoid":
            return keras.tree.map_structure(ops.sigmoid, outputs)
        flat = zip(keras.tree.flatten(outputs), self.axes, strict=True)
        return keras.tree.pack_sequence_as(outputs, [ops.softmax(x, axis) for x, axis in flat])

    def to_average(self, outputs) -> list:
        """One sample's probabilities, as what is summed: themselves, or logarithms that are added as exponentials."""
        outputs = [_at_least_float32(x) for x in keras.tree.flatten(outputs)]
        if not self.from_logits:
            return outputs
        if self.probabilities == "sigmoid":
            return [ops.log_sigmoid(z) for x in outputs for z in (x, -x)]
        return [ops.log_softmax(x, axis) for x, axis in zip(outputs, self.axes, strict=True)]

    def plus(self, state: list, more: list) -> list:
        """Add what `to_average` returned for two samples."""
        return [(ops.logaddexp if self.from_logits else ops.add)(a, b) for a, b in zip(state, more, strict=True)]

    def averaged(self, state: list, like, count: int):
        """The mean of `count` samples from their sum, in the structure of the outputs `like`, with their masks."""
        if not self.from_logits:
            state = [total / count for total in state]
        elif self.probabilities == "sigmoid":
            state = [yes - no for yes, no in zip(state[::2], state[1::2], strict=True)]
        else:
            state = [total - math.log(count) for total in state]
        for mean, output in zip(state, keras.tree.flatten(like), strict=True):
            if mask_of(output) is not None:  # loss and metrics leave masked steps out
                set_mask(mean, mask_of(output))
        return keras.tree.pack_sequence_as(like, state)

    def kinds(self) -> list:
        """The kind of each output."""
        return self.probabilities if isinstance(self.probabilities, list) else [self.probabilities] * len(self.axes)

    def spreads(self, outputs, first: list) -> list:
        """What is averaged over draws beside each output: its entropy in nats; of a regression's its squared distance.

        Args:
            outputs: of one draw, or the mean; first: those of the first draw, flat, from which distances are taken.
        """
        flat = zip(keras.tree.flatten(outputs), first, self.kinds(), self.axes, strict=True)
        return [ops.square(x - x0) if kind is None else entropy(x, kind, axis) for x, x0, kind, axis in flat]

    def uncertainties(self, means: list, averaged: list, first: list) -> list[dict]:
        """The parts of `predict_uncertainty` of each output, from its mean and the mean of its `spreads`."""
        found = []
        for p, h, e, kind in zip(means, self.spreads(means, first), averaged, self.kinds(), strict=True):
            if kind is None:
                found.append({"mean": p, "variance": ops.maximum(e - h, 0.0)})
            else:
                parts = {"total_entropy": h, "expected_entropy": e, "mutual_information": ops.maximum(h - e, 0.0)}
                found.append({"mean": p, **parts})
        return found

    def settle(self, loss) -> None:
        """Read the classes' axis from the loss where nothing else says it; warn of logits where nothing says of what.

        Raises:
            ValueError: several losses of different axes.
        """
        losses = [one for one in keras.tree.flatten(loss) if "Categorical" in type(one).__name__]
        axes = {loss_arguments(one).get("axis", -1) for one in losses}
        self._of_loss = -1
        if axes and None in self._axes and "softmax" in (self.probabilities or ()):
            if len(axes) > 1:
                raise ValueError(f"Expected one class_axis of all losses. Received: {sorted(axes)}. Pass class_axis=.")
            (self._of_loss,) = axes
        if getattr(loss, "from_logits", False) and self.probabilities is None:
            warnings.warn(
                "This loss takes logits, and nothing says of what: predictions average logits, and have no entropy. "
                'Pass from_logits=True and probabilities="sigmoid" or "softmax" to to_partial_bayes.',
                stacklevel=3,
            )

    def check_entropies(self) -> None:
        """Refuse a network of which no output is a probability: it has no entropy."""
        if not any(self.kinds()):
            raise ValueError(
                f"Expected outputs that are probabilities. Received: probabilities={self.probabilities!r}. Pass "
                'probabilities="sigmoid" or "softmax" to to_partial_bayes (with from_logits=True for logits); of a '
                "regression use mean and deviation of predict_samples."
            )


def is_samples(network: keras.Model, outputs) -> bool:
    """Whether `outputs` are one output a draw, `{"samples": [...]}`, and not the network's own outputs of that form."""
    if not (isinstance(outputs, dict) and set(outputs) == {"samples"}):
        return False
    own = output_structure(network)
    if not (isinstance(own, dict) and set(own) == {"samples"}):
        return True
    try:
        keras.tree.assert_same_structure(outputs, own)
    except (ValueError, TypeError):
        return True
    return False


def output_kind(network: keras.Model):
    """The kind of each output ("sigmoid", "softmax" or None), by the activation of the layer that made it."""
    kinds = [_kind_of(output)[0] for output in keras.tree.flatten(network.outputs)]
    return kinds[0] if len(set(kinds)) == 1 else kinds


def class_axes(network: keras.Model, given: int | None) -> list[int | None]:
    """The axis of the classes of each output, counted from the end: as `given`, or that of the softmax that made it.

    None where no softmax did: its loss may say.

    Raises:
        ValueError: an axis that is none of an output's, or the batch's.
    """
    outputs = keras.tree.flatten(network.outputs)
    axes = [_kind_of(output)[1] if given is None else given for output in outputs]
    found = []
    for axis, output in zip(axes, outputs, strict=True):
        rank = len(output.shape)
        if axis is not None and (isinstance(axis, bool) or not isinstance(axis, int) or axis % rank == 0):
            raise ValueError(
                f"Expected class_axis, an axis of the outputs but the batch's. Received: class_axis={axis!r}"
            )
        found.append(None if axis is None else axis % rank - rank)
    return found


def _kind_of(output):
    """(kind, axis of the classes): the axis of a softmax, else None."""
    operation, position = made_by(output)
    while isinstance(operation, keras.Model | MaskedWrapper):
        if not isinstance(operation, keras.Model):
            operation = operation.layer
        elif not getattr(operation, "outputs", None):  # a subclassed one
            return None, None
        else:  # a nested model's output is made inside it
            operation, position = made_by(keras.tree.flatten(operation.outputs)[position])
    if isinstance(operation, keras.layers.RNN):  # its outputs are gates times the activation
        return None, None
    activation = getattr(operation, "activation", None)
    name = getattr(activation, "__name__", type(operation).__name__.lower())
    axis = -1 if activation else getattr(operation, "axis", None)  # Keras's activation "softmax" is over the last
    if name == "softmax" and isinstance(axis, int) and axis % len(output.shape):
        return name, axis
    return ("sigmoid" if name == "sigmoid" else None), None


def _at_least_float32(x):
    """A tensor in float32, if it has half precision: sums over samples are not kept in that."""
    half = keras.backend.standardize_dtype(x.dtype) in ("float16", "bfloat16")
    return ops.cast(x, "float32") if half else x


def output_structure(network: keras.Model):
    """A network's symbolic outputs in their structure: a tensor, or a list or dict of tensors."""
    return network.output if isinstance(network, keras.Function) else network.outputs[0]


def input_structure(network: keras.Model):
    """A network's symbolic inputs in their structure: a tensor, or a list or dict of tensors."""
    return network.input if isinstance(network, keras.Function) else network.inputs[0]


def names_of_outputs(network: keras.Model) -> list[str]:
    """A name for each output: the keys on the way to it in a dict, else its layer's name; a second use is numbered."""
    structure = output_structure(network)
    if isinstance(structure, dict):
        return _numbered("_".join(map(str, path)) for path, _ in keras.tree.flatten_with_path(structure))
    return _numbered(network.output_names)


def _numbered(names):
    names, uses, found = list(names), Counter(), []
    for name in names:
        new = name
        while new in found or (new != name and new in names):
            uses[name] += 1
            new = f"{name}_{uses[name]}"
        found.append(new)
    return found
