"""Predictions from a model that draws weights: the same draws in each call."""

from __future__ import annotations

import keras

from sbn_tf import cost as costs
from sbn_tf.core.sampled import SameDraws


class Sampled(SameDraws):
    """The same draws in each call, and what they cost."""

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
