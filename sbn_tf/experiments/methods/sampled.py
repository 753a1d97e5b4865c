"""Predictions from a model that draws weights: the same draws in each call."""

from __future__ import annotations

import keras
import numpy as np
from keras import ops

from sbn_tf import cost as costs
from sbn_tf.core.keras_internals import noise_states
from sbn_tf.partial_bayes import PartialBayes


class Sampled:
    """A `PartialBayes` whose noise starts in each call as it is now."""

    def __init__(self, model: PartialBayes):
        self.model = model
        self.noise = [(state, ops.convert_to_numpy(state)) for state in noise_states(model)]

    def start(self) -> None:
        """Set the noise to where it was when this was made."""
        for state, start in self.noise:
            state.assign(start)

    def samples(self, images: np.ndarray, num_samples: int) -> np.ndarray:
        """Outputs of one batch: (num_samples, batch, ...)."""
        self.start()
        return self.model.predict_samples(images, num_samples=num_samples, batch_size=len(images))

    def flops(self, batch: int, num_samples: int) -> float:
        """Operations of a sample of one image: the mean over so many samples."""
        trained_with, self.model.num_samples = self.model.num_samples, num_samples
        try:
            return costs.prediction_flops(self.model, batch) / num_samples
        finally:
            self.model.num_samples = trained_with


def score_flops(model: keras.Model, loss: keras.losses.Loss, score: str, batch: int) -> float:
    """Operations of the pass that computes a saliency score, for one image."""
    if score in ("magnitude", "random"):
        return 0.0
    return costs.saliency_flops(model, loss, 1 if score == "per_example" else batch)
