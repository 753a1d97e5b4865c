"""The calibration error as a `keras.metrics.Metric`: it adds up over batches, in `compile(metrics=[...])`."""

from __future__ import annotations

import keras
from keras import ops

from sbn_tf.core.checks import check_count

__all__ = ["CalibrationError"]


@keras.saving.register_keras_serializable(package="sbn_tf")
class CalibrationError(keras.metrics.Metric):
    """Expected calibration error of the probability of 1, pooled over labels or pixels: `metrics.ece` over batches.

    A `PartialBayes` gives metrics the predictive mean. Of that mean Keras's own `BinaryCrossentropy` and
    `MeanSquaredError` are the NLL and the Brier score.

    Args:
        num_bins: bins of equal width over [0, 1], >= 1.
        name, dtype: as in Keras.

    Call arguments:
        y_true: targets in 0..1 of the shape of `y_pred`; its last axis may lack if it is 1. Or integer classes, whose
            last axis lacks or is 1.
        y_pred: probabilities, not logits.
        sample_weight: broadcast to `y_pred`; None: 1.

    Source: Guo et al. (2017), equation 3, of the probability of 1 instead of the largest one.
    """

    def __init__(self, num_bins: int = 15, name: str = "ece", dtype=None):
        super().__init__(name=name, dtype=dtype)
        check_count("num_bins", num_bins)
        self.num_bins = num_bins
        self.gaps = self.add_variable((num_bins,), "zeros", name="gaps")
        self.weight = self.add_variable((), "zeros", name="weight")

    def update_state(self, y_true, y_pred, sample_weight=None):
        """Add the gaps between probability and target of a batch to their bins."""
        probs = ops.cast(y_pred, self.dtype)
        targets = ops.convert_to_tensor(y_true)
        if len(targets.shape) < len(probs.shape):
            targets = targets[..., None]
        if targets.shape[-1] == 1 < probs.shape[-1]:
            targets = ops.one_hot(ops.cast(targets[..., 0], "int32"), probs.shape[-1])
        targets = ops.cast(targets, self.dtype)
        weights = ops.ones_like(probs) if sample_weight is None else ops.cast(sample_weight, self.dtype)
        while len(weights.shape) < len(probs.shape):
            weights = weights[..., None]
        weights = ops.broadcast_to(weights, ops.shape(probs))
        index = ops.clip(ops.cast(ops.floor(probs * self.num_bins), "int32"), 0, self.num_bins - 1)
        gaps = ops.reshape(weights * (probs - targets), (-1,))
        self.gaps.assign_add(ops.segment_sum(gaps, ops.reshape(index, (-1,)), num_segments=self.num_bins))
        self.weight.assign_add(ops.sum(weights))

    def result(self):
        """The error of all batches so far: a scalar."""
        return ops.divide_no_nan(ops.sum(ops.abs(self.gaps)), self.weight)

    def get_config(self):
        """Arguments of the metric."""
        return {**super().get_config(), "num_bins": self.num_bins}
