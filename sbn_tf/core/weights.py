"""Names for the weights of a model, and which of them may become Bayesian."""

from __future__ import annotations

import fnmatch
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

import keras
import numpy as np

from sbn_tf.core.keras_internals import all_layers, children, nodes_of, own_variables

__all__ = ["Weight", "all_weights", "biases_before_batch_norm", "eligible_weights", "named_weights", "weights_of"]


class Weight(NamedTuple):
    """A weight, the layer that owns it, and its name in the model."""

    key: str
    layer: keras.layers.Layer
    name: str
    variable: keras.Variable


def named_weights(model: keras.Model) -> dict[str, Weight]:
    """Every variable of a built model's layers by its key, the path of layer names that leads to it.

    Nested models and sublayers are included. A variable that is used twice is listed once, where it is met first.

    Raises:
        ValueError: an unbuilt model, or two weights with one key.
    """
    if not getattr(model, "built", False):
        raise ValueError(f"Expected a built model (call it once on data, or give it an Input). Received: {model!r}")
    found = {}
    for weight in all_weights(model):
        if weight.key in found:
            raise ValueError(f"Two weights are called {weight.key!r}. Give their layers different names.")
        found[weight.key] = weight
    return found


def all_weights(model: keras.Model) -> Iterator[Weight]:
    """As `named_weights`, of any model; two may have one key."""
    seen = set()

    def walk(layer, path):
        for variable in own_variables(layer):
            if id(variable) not in seen:
                seen.add(id(variable))
                yield Weight("/".join([*path, variable.name]), layer, variable.name, variable)
        for child in children(layer):
            yield from walk(child, [*path, child.name])

    return walk(model, [])


def eligible_weights(
    model: keras.Model, include: str | Sequence[str] | None = None, exclude: str | Sequence[str] | None = None
) -> dict[str, Weight]:
    """Weights that may become Bayesian: the trainable ones, except those of normalisation layers.

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
        matched = set()
        for pattern in [patterns] if isinstance(patterns, str) else patterns:
            hits = fnmatch.filter(kept, pattern)
            if not hits:
                raise ValueError(f"No eligible weight matches {pattern!r}. Keys look like: {list(kept)[:3]}")
            matched.update(hits)
        kept = {key: weight for key, weight in kept.items() if (key in matched) == keep}
    if not kept:
        raise ValueError("No eligible weight: all are frozen, excluded or in normalisation layers.")
    return kept


def weights_of(scores: Mapping, model: keras.Model) -> dict[str, Weight]:
    """The named weights of the model that these scores belong to.

    Raises:
        ValueError: scores of another model.
    """
    weights = named_weights(model)
    other = [k for k, s in scores.items() if k not in weights or tuple(weights[k].variable.shape) != np.shape(s)]
    if other:
        raise ValueError(
            f"Expected scores of this model. Received: {other[:3]}, not among the weights of {model.name!r}"
        )
    return weights


def biases_before_batch_norm(model: keras.Model) -> list[str]:
    """Keys of the biases whose layer feeds a batch normalisation directly.

    In training mode such a bias has no effect, because the batch mean is subtracted. Its gradient is zero, and the KL
    alone would shape its posterior. With padding or dropout in between the bias keeps some effect and is not listed.
    """
    keys = {id(w.layer): w.key for w in named_weights(model).values() if w.name == "bias"}
    models = [layer for layer in all_layers(model) if isinstance(layer, keras.Model)]
    outputs = {id(tensor) for one in models for tensor in getattr(one, "outputs", None) or []}
    biases = []
    for layer in all_layers(model):
        if isinstance(layer, keras.layers.BatchNormalization) and layer.trainable:
            for node in nodes_of(layer):
                parents = [parent.operation for parent in node.parent_nodes]
                biases += [keys.get(id(_idle_source(layer, node, parent, outputs))) for parent in parents]
    return [key for key in dict.fromkeys(biases) if key is not None]


def _idle_source(batch_norm, node, operation, outputs):
    """The layer before a use of batch norm whose bias has no effect, or None."""
    while type(operation).__name__.startswith("Cropping") and len(nodes_of(operation, after=True)) == 1:
        operation = nodes_of(operation)[0].parent_nodes[0].operation
    is_output = {id(tensor) for use in nodes_of(operation) for tensor in use.outputs} & outputs
    if len(nodes_of(operation, after=True)) != 1 or is_output:  # the bias may have an effect elsewhere
        return None
    rank = len(node.outputs[0].shape)
    channels = 1 if getattr(operation, "data_format", None) == "channels_first" else rank - 1
    is_linear = getattr(getattr(operation, "activation", None), "__name__", "linear") == "linear"
    return operation if is_linear and batch_norm.axis % rank == channels else None
