"""Predictions and their targets: the names of the tasks, and the checks that every metric relies on."""

from __future__ import annotations

import numpy as np

from sbn_tf.core.checks import check_choice

__all__ = ["BINARY", "EXCLUSIVE", "LABELS", "MULTI_CLASS", "MULTI_LABEL", "ORDINAL", "SEGMENTATION", "TASKS"]

BINARY = "binary"
MULTI_CLASS = "multi-class"
MULTI_LABEL = "multi-label"
ORDINAL = "ordinal"
SEGMENTATION = "segmentation"
TASKS = (BINARY, MULTI_CLASS, MULTI_LABEL, ORDINAL, SEGMENTATION)
EXCLUSIVE = (MULTI_CLASS, ORDINAL)  # one class an image: targets are one-hot
LABELS = (BINARY, MULTI_CLASS, MULTI_LABEL, ORDINAL)

# Float32 probabilities of classes sum to 1 within a tenth of this; those in half precision within five of its steps.
_SUM_TOLERANCE = 1e-4
_PIECE = 256  # images that are read at once from targets that may lie on a disk
_TARGETS = {BINARY: "(batch, 1)", SEGMENTATION: "(batch, height, width, raters)"}
_TARGETS |= dict.fromkeys(EXCLUSIVE, "(batch, classes), one-hot")


def float64(values) -> np.ndarray:
    """The values as a float64 array, copied only where they are of another type.

    Raises:
        ValueError: texts or complex numbers.
    """
    values = np.asarray(values)
    if values.dtype.kind in "cSU":
        raise ValueError(f"Expected real numbers. Received: an array of {values.dtype}")
    return values.astype("float64", copy=False)


def check_range(values, name="probabilities", hint="") -> np.ndarray:
    """Refuse values outside 0..1 and NaN, and cut off what rounding left above 1; empty arrays pass."""
    if values.size == 0:
        return values
    low, high = float(values.min()), float(values.max())
    if not (low >= 0 and high <= 1 + 1e-6):  # NaN fails both
        raise ValueError(f"Expected {name} in 0..1{hint}, none of them NaN. Received: min={low}, max={high}")
    return np.minimum(values, 1) if high > 1 else values


def pair(targets, predicted) -> tuple[np.ndarray, np.ndarray]:
    """Targets and predictions as float64 arrays in 0..1, of one shape and not empty."""
    targets, predicted = float64(targets), float64(predicted)
    if predicted.shape != targets.shape or predicted.size == 0:
        raise ValueError(
            f"Expected predictions and targets of one shape, not empty. Received: {predicted.shape} and {targets.shape}"
        )
    return check_range(targets, "targets"), check_range(predicted)


def label_pair(labels, mean_probs) -> tuple[np.ndarray, np.ndarray]:
    """Labels 0 or 1 and probabilities in 0..1, both (batch, labels)."""
    labels, mean_probs = pair(labels, mean_probs)
    if labels.ndim != 2:
        raise ValueError(f"Expected mean_probs and labels (batch, labels). Received: shape {labels.shape}")
    if (soft := labels[(labels != 0) & (labels != 1)]).size:
        raise ValueError(f"Expected labels to be 0 or 1. Received: {soft[0]:g}; cut soft labels first.")
    return labels, mean_probs


def mask_pair(truth, predicted) -> tuple[np.ndarray, np.ndarray]:
    """Two masks of each image, (batch, height, width) bool: where the values exceed one half."""
    truth, predicted = pair(truth, predicted)
    if predicted.ndim != 3:
        raise ValueError(f"Expected masks of shape (batch, height, width). Received: shape {predicted.shape}")
    return truth > 0.5, predicted > 0.5


def samples_pair(targets, probs, target_axes=None) -> tuple[np.ndarray, np.ndarray]:
    """Targets (...) and samples (samples, ...), both float64 in 0..1."""
    targets, probs = float64(targets), float64(probs)
    axes = targets.ndim if target_axes is None else target_axes
    if probs.shape[1:] != targets.shape or targets.ndim != axes or probs.ndim == 0 or probs.size == 0:
        raise ValueError(
            "Expected probs of shape (samples, ...) over targets of shape (...), not empty. "
            f"Received: {probs.shape} and {targets.shape}"
        )
    return check_range(targets, "targets"), check_range(probs)


def risk_pair(uncertainty, risk) -> tuple[np.ndarray, np.ndarray]:
    """One finite uncertainty and one finite risk for each image."""
    uncertainty, risk = float64(uncertainty), float64(risk)
    if uncertainty.ndim != 1 or uncertainty.shape != risk.shape or risk.size == 0:
        raise ValueError(
            "Expected one uncertainty and one risk for each image, not empty. "
            f"Received: shapes {uncertainty.shape} and {risk.shape}"
        )
    if not (np.isfinite(uncertainty).all() and np.isfinite(risk).all()):
        raise ValueError("Expected finite uncertainties and risks. Received: NaN or infinity; leave those images out.")
    return uncertainty, risk


def broadcast(values, shape, name) -> np.ndarray:
    """The values as an array of that shape."""
    try:
        return np.broadcast_to(float64(values), shape)
    except ValueError as error:
        raise ValueError(
            f"Expected {name} to fit predictions of shape {shape}. Received: shape {np.shape(values)}"
        ) from error


def check_targets(targets, task) -> np.ndarray:
    """Refuse targets that do not fit the task; masks that lie on a disk stay there."""
    check_choice("task", task, TASKS)
    if task != SEGMENTATION or not isinstance(getattr(targets, "size", None), int):
        targets = np.asarray(targets)
    shape = _TARGETS.get(task, "(batch, labels)")
    fits = targets.ndim == (4 if task == SEGMENTATION else 2) and targets.size > 0
    if not fits or (task == BINARY and targets.shape[1] != 1):
        raise ValueError(f"Expected targets of shape {shape}, not empty. Received: shape {targets.shape}")
    for start in range(0, len(targets), _PIECE):
        part = targets[start : start + _PIECE]
        if part.dtype != bool and not ((part == 0) | (part == 1)).all():
            raise ValueError(f"Expected targets to be 0 or 1. Received: values from {part.min()} to {part.max()}")
    if task in EXCLUSIVE and (targets.sum(1) != 1).any():
        bad = int(np.argmax(targets.sum(1) != 1))
        raise ValueError(f"Expected one class per image, one-hot ({task}). Received: {targets[bad]} for image {bad}")
    return targets


def check_valid(rater_valid, masks) -> np.ndarray:
    """Which raters' masks are real, (batch, raters) bool: a missing rater's place has a filler mask."""
    shape = (masks.shape[0], masks.shape[-1])
    if rater_valid is None:
        return np.ones(shape, bool)
    valid = np.asarray(rater_valid).astype(bool)
    if valid.shape != shape:
        raise ValueError(f"Expected rater_valid of shape (batch, raters) = {shape}. Received: {valid.shape}")
    if not valid.any(1).all():
        raise ValueError(
            f"Expected a valid rater for each image. Received: none for image {int(np.argmin(valid.any(1)))}"
        )
    return valid


def drop_channel(probs) -> np.ndarray:
    """Sampled masks without a last axis of one channel."""
    return probs[..., 0] if probs.ndim == 5 and probs.shape[-1] == 1 else probs


def check(probs, targets, task, rater_valid) -> tuple[np.ndarray, np.ndarray, np.ndarray | None]:
    """Refuse samples, targets and raters that do not fit the task and one another; give them back as arrays."""
    targets, probs = check_targets(targets, task), np.asarray(probs)
    if task != SEGMENTATION and rater_valid is not None:
        raise ValueError(f"Expected rater_valid=None, as {task} targets have no raters. Received: an array")
    probs = drop_channel(probs) if task == SEGMENTATION else probs
    shape = targets.shape[:-1] if task == SEGMENTATION else targets.shape
    if probs.ndim != 1 + len(shape) or probs.shape[1:] != shape or probs.shape[0] == 0:
        raise ValueError(
            f"Expected probs of shape (samples, {', '.join(map(str, shape))}), as the targets (one sample: "
            f"probs[None]). Received: probs.shape={probs.shape}"
        )
    probs = check_range(probs, hint=" (not logits)")
    if task in EXCLUSIVE:
        _check_sums(probs, task)
    return probs, targets, check_valid(rater_valid, targets) if task == SEGMENTATION else None


def check_samples(probs, task) -> np.ndarray:
    """Samples (samples, ...) of a task as float64 in 0..1; of classes they sum to 1 over the last axis."""
    check_choice("task", task, TASKS)
    given, probs = np.asarray(probs), check_range(float64(probs))
    if probs.ndim == 0 or len(probs) == 0:
        raise ValueError(f"Expected probs of shape (samples, ...), one sample or more. Received: shape {probs.shape}")
    if task in EXCLUSIVE:
        _check_sums(given, task)
    return probs


def _check_sums(probs, task) -> None:
    """Refuse probabilities of classes, on the last axis, that do not sum to 1 but for rounding in their precision."""
    sums = probs.sum(-1, dtype="float64")
    tolerance = max(_SUM_TOLERANCE, 5 * float(np.finfo(np.result_type(probs, np.float16)).eps))
    if np.abs(sums - 1).max(initial=0) > tolerance:
        raise ValueError(
            f"Expected probabilities that sum to 1 over the classes ({task}; a softmax's, not sigmoids). "
            f"Received: sums from {sums.min():.6g} to {sums.max():.6g}"
        )


def rater_mean(masks, valid) -> np.ndarray:
    """Share of the valid raters that mark each pixel, (batch, height, width); a tie is exactly 0.5."""
    return np.einsum("bhwr,br->bhw", float64(masks), float64(valid)) / valid.sum(1)[:, None, None]


def event_entropy(probs) -> np.ndarray:
    """Entropy of a binary event, `-p ln p - (1 - p) ln(1 - p)`, in nats; p and 1 - p have one entropy."""
    from scipy.special import entr

    return entr(probs) + entr(1 - probs)
