"""What a batch of a model looks like: the shapes and dtypes with which TensorFlow traces it, without data."""

from typing import Any

import keras

from sbn_tf.core.checks import check_count

BACKEND = keras.backend.backend()
if BACKEND == "tensorflow":
    import tensorflow as tf

__all__ = ["check_graphs", "input_specs", "target_specs"]


def check_graphs() -> None:
    """Raise a ValueError unless Keras runs on TensorFlow, whose graphs are counted."""
    if BACKEND != "tensorflow":
        raise ValueError(
            f"Expected Keras on TensorFlow, whose graphs are counted. Received: KERAS_BACKEND={BACKEND}. Count the "
            "same network there: it takes the same operations here."
        )


def input_specs(model: keras.Model, batch_size: int) -> Any:
    """A `tf.TensorSpec` for each input of a model, in the structure in which the model takes them.

    Raises:
        ValueError: a batch size below 1, a model that is not built from inputs, an open size, or another backend than
            TensorFlow.
    """
    check_graphs()
    check_count("batch_size", batch_size)
    network = _network(model)
    if not getattr(network, "inputs", None):
        raise ValueError(
            f"Expected a built Functional or Sequential model, or a PartialBayes. Received: {model!r}\n"
            "Give it a keras.Input, or count a function of your own: count_flops(model, tf.TensorSpec(shape))."
        )
    inputs = network.inputs if isinstance(network, keras.Sequential) else network.input  # a dict stays a dict
    specs = _one(keras.tree.map_structure(lambda t: tf.TensorSpec((batch_size, *t.shape[1:]), t.dtype), inputs))
    if not all(spec.shape.is_fully_defined() for spec in tf.nest.flatten(specs)):
        raise ValueError(
            f"Expected a model of known input sizes. Received: '{model.name}' with input {specs}.\n"
            "Build it for images of one size: the count depends on it."
        )
    return specs


def target_specs(model: keras.Model, loss: Any, batch_size: int) -> Any:
    """A `tf.TensorSpec` for each target: as the outputs, without their last axis where the loss is a sparse one."""
    network = _network(model)
    outputs = _one(network.outputs if isinstance(network, keras.Sequential) else network.output)
    name = loss if isinstance(loss, str) else getattr(loss, "__name__", type(loss).__name__)
    end = -1 if "sparse" in name.lower() else None
    return keras.tree.map_structure(lambda t: tf.TensorSpec((batch_size, *t.shape[1:end]), "float32"), outputs)


def _network(model):
    """The Functional or Sequential model in a `PartialBayes`, which has no inputs of its own; else the model."""
    return model if getattr(model, "inputs", None) else getattr(model, "network", model)


def _one(found):
    """The only element of a list, or the structure itself."""
    return found[0] if isinstance(found, list | tuple) and len(found) == 1 else found
