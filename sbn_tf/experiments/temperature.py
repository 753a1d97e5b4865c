"""The temperature that fits probabilities to validation targets best."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike
from scipy import optimize, special

from sbn_tf.core.predictions import EXCLUSIVE

__all__ = ["fit_temperature"]

TEMPERATURES = (0.05, 20.0)


def fit_temperature(logits: ArrayLike, targets: ArrayLike, task: str) -> float:
    """Temperature that minimises the NLL of `logits / temperature`, within 0.05 to 20.

    The NLL is convex in `1 / temperature`, so the minimum is one.

    Args:
        logits: (images, ...), of classes on the last axis.
        targets: of the same shape, 0..1; the mean of raters gives the mean of their NLLs.
        task: one of `datasets.base.TASKS`.

    Raises:
        ValueError: shapes that differ, no image, or logits that are not finite.

    Reference: Guo et al. 2017, "On calibration of modern neural networks", section 4.2.
    """
    logits, targets = np.asarray(logits), np.asarray(targets)
    if logits.shape != targets.shape or not len(logits):
        raise ValueError(
            f"Expected logits and targets of one shape, one image or more. Received: {logits.shape}, {targets.shape}"
        )
    if not np.isfinite(logits).all():
        raise ValueError("Expected finite logits. Received: NaN or infinity. Did training diverge?")
    rows = max(1, 2**20 // max(1, logits[0].size))
    parts = [slice(start, start + rows) for start in range(0, len(logits), rows)]  # logits of many masks are large

    def nll(log_temperature):
        total = 0.0
        for part in parts:
            z = logits[part].astype("float64") / np.exp(log_temperature)
            normaliser = special.logsumexp(z, axis=-1).sum() if task in EXCLUSIVE else np.logaddexp(0.0, z).sum()
            total += normaliser - (targets[part] * z).sum()
        return total / logits.size

    found = optimize.minimize_scalar(nll, bounds=np.log(TEMPERATURES), method="bounded", options={"xatol": 1e-5})
    return float(np.exp(found.x))
