"""A trained network for other runtimes: raw pixels in, mean, entropy and its two parts out."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable
from typing import Any

import keras
import numpy as np
from keras import ops

from sbn_tf.core.checks import check_choice
from sbn_tf.core.context import posterior_sample, recorded_draws
from sbn_tf.core.outputs import entropy
from sbn_tf.core.sampled import SampledModel
from sbn_tf.core.turns import NUM_TURNS, turn, turn_back
from sbn_tf.datasets.base import EXCLUSIVE, SEGMENTATION

FORMATS = ("tf_saved_model", "onnx", "litert")


class Served(keras.Model):
    """Maps pixels of 0 to 255 to a dict of mean probability, and entropy with its two parts in nats.

    Its draws are constants: every call has the same ones, and no noise is left in its graph.

    Args:
        model: a `SampledModel`, or a network without draws.
        draws: of each sample the `fixed` of `posterior_sample`; of a network without draws [{}].
        card: the `NetworkCard`.
    """

    def __init__(self, model: keras.Model, draws: list[dict], card):
        super().__init__(name="served")
        self.model, self.card = model, card
        self._draws = lambda: draws  # hidden from Keras, which would track the arrays

    def call(self, pixels):
        """Outputs of pixels (batch, size, size, channels)."""
        card = self.card
        x = (ops.cast(pixels, "float32") / 255.0 - np.float32(card.mean)) / np.float32(card.sd)
        if card.turned:
            found = [self._turned_draw(x, number) for number in range(card.num_samples)]
        elif isinstance(self.model, SampledModel):
            with self.model.graph.sharing():
                found = [self._draw(x, number, fixed) for number, fixed in enumerate(self._draws())]
        else:
            found = [self.model(x, training=False)]
        samples = ops.stack([self._tempered(ops.cast(one, "float32")) for one in found])
        if card.task == SEGMENTATION:
            samples = samples[..., 0]
        kind = "softmax" if card.task in EXCLUSIVE else "sigmoid"
        mean = ops.mean(samples, 0)
        total, expected = entropy(mean, kind), ops.mean(entropy(samples, kind), 0)
        return {
            "mean": mean,
            "entropy": total,
            "expected_entropy": expected,
            "mutual_information": total - expected,
        }

    def _turned_draw(self, x, number):
        """A draw that sees the image as in `turns.turned_samples`."""
        x, draws = turn(x, number % NUM_TURNS), self._draws()
        sampled = isinstance(self.model, SampledModel)
        found = self._draw(x, number, draws[number]) if sampled else self.model(x, training=False)
        return turn_back(found, number % NUM_TURNS) if self.card.task == SEGMENTATION else found

    def _draw(self, x, number, fixed):
        with posterior_sample(number, fixed):
            outputs = self.model.network(x, training=False)
        return self.model.outputs_of_samples.as_probabilities(outputs)

    def _tempered(self, probs):
        """As `predictor.tempered`, in the graph."""
        if self.card.temperature == 1:
            return probs
        limits = np.finfo("float32")
        probs = ops.clip(probs, limits.tiny, 1.0 if self.card.task in EXCLUSIVE else 1.0 - limits.epsneg)
        if self.card.task in EXCLUSIVE:
            return ops.softmax(ops.log(probs) / self.card.temperature, -1)
        return ops.sigmoid((ops.log(probs) - ops.log(1.0 - probs)) / self.card.temperature)


def export_served(
    model: keras.Model, card: Any, path: str | os.PathLike, format: str, start: Callable[[], None] = lambda: None
) -> None:
    """Write a network that takes raw pixels, float32 (batch, size, size, channels) of 0 to 255.

    Args:
        model: as for `Served`.
        card: the `NetworkCard`.
        path: folder of the SavedModel, or the .onnx or .tflite file.
        format: "tf_saved_model", "onnx" or "litert".
        start: sets the noise to where predictions begin.

    Raises:
        ValueError: another format, an operation that ONNX has not, tf2onnx is not installed, or another backend than
            TensorFlow.
    """
    check_choice("format", format, FORMATS)
    if keras.backend.backend() != "tensorflow":
        raise ValueError(
            f"Expected Keras on TensorFlow for export. Received: KERAS_BACKEND={keras.backend.backend()}. Export the "
            "network's folder there."
        )
    missing = [name for name in ("tf2onnx", "onnx") if format == "onnx" and importlib.util.find_spec(name) is None]
    if missing:
        raise ValueError(
            f'Expected {missing[0]} for format="onnx". Received: it is not installed.\npip install "sbn_tf[onnx]"'
        )
    shape = (card.size, card.size, card.channels)
    blank = np.zeros((1, *shape), "float32")
    draws: list[dict] = [{}]
    if isinstance(model, SampledModel):
        start()
        draws = [recorded_draws(lambda: model.network(blank, training=False), s) for s in range(card.num_samples)]
        start()
    served = Served(model, draws, card)
    served(blank)
    signature = [keras.InputSpec(dtype="float32", shape=(None, *shape), name="pixels")]
    served.export(os.fspath(path), format=format, verbose=False, input_signature=signature)
    if format == "onnx":
        _check_onnx(path)


def _check_onnx(path):
    """Refuse a file with operations that ONNX has not: tf2onnx writes them all the same."""
    import onnx

    try:
        onnx.checker.check_model(os.fspath(path))
    except onnx.checker.ValidationError as error:
        os.remove(path)
        raise ValueError(
            f"Expected a network of operations that ONNX has. Received: {str(error).splitlines()[0]}\n"
            'Export it with format="tf_saved_model".'
        ) from error
