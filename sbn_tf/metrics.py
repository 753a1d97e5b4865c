"""Metrics: what a method's probabilities are worth, and beside them what the paper measured.

The contract: a method gives probabilities with the posterior samples on axis 0 (a deterministic network
gives one sample), `evaluate` gives every metric.

task            probs                                                targets
"multi-label"   (samples, batch, labels)                             (batch, labels), 0 or 1
"binary"        (samples, batch, 1)                                  (batch, 1), 0 or 1
"multi-class"   (samples, batch, classes), sum 1                     (batch, classes), one-hot
"ordinal"       the same, classes in order                           the same
"segmentation"  (samples, batch, height, width) or (..., width, 1)   (batch, height, width, raters), 0 or 1

"binary" is "multi-label" with one label. Classes that exclude one another ("multi-class", "ordinal") are one
event an image.

Functions that take `mean_probs` score the posterior predictive mean, the mean over samples: that is the
prediction. Functions that take `probs` need the samples. Entropies and log scores are in nats. A
segmentation target is a rater drawn at random: a score against it is its mean over the valid raters of the
image; masks may be a `DiskArray`, which is read in pieces.

Everything here is plain numpy in float64; scikit-learn is imported where it is used.
"""

import numpy as np

from sbn_tf.datasets.arrays import DiskArray
from sbn_tf.datasets.base import BINARY, EXCLUSIVE, MULTI_LABEL, SEGMENTATION, TASKS

__all__ = [
    "TASKS",
    "accuracy",
    "auc_per_label",
    "average_precision_per_label",
    "binary_entropy",
    "brier",
    "dice",
    "ece",
    "generalised_energy_distance",
    "iou",
    "majority_mask",
    "nll",
    "paper_accuracy",
    "paper_brier",
    "paper_dice",
    "paper_entropy",
    "paper_iou",
    "uncertainty",
]

# A log score is infinite for one certain and wrong prediction; clipped here, that costs 16.1 nats.
LOG_CLIP = 1e-7
# Float32 probabilities of classes sum to 1 within a tenth of this; those in half precision within five of its steps.
SUM_TOLERANCE = 1e-4


# ---------------------------------------------------------------------------
# Scores of the mean prediction
# ---------------------------------------------------------------------------


def nll(mean_probs, targets) -> float:
    """Negative log likelihood, `-y ln p - (1 - y) ln(1 - p)`, in nats per label or pixel.

    Args:
        mean_probs: any shape, probabilities of 1; clipped to [1e-7, 1 - 1e-7] inside the logarithms.
        targets: same shape, in 0..1; a soft target (the mean of raters) gives the expectation over raters.
    """
    return float(_nll(*_pair(mean_probs, targets)).mean())


def brier(mean_probs, targets) -> float:
    """Brier score, `(p - y)^2`, mean over labels or pixels (Brier 1950, for one of the two classes).

    Args:
        mean_probs: any shape, probabilities of 1.
        targets: same shape, in 0..1. A soft target counts as its mean, without the raters' own variance
            (`evaluate` adds it).
    """
    return float(np.square(np.subtract(*_pair(mean_probs, targets))).mean())


def accuracy(mean_probs, labels) -> float:
    """Fraction of labels for which `p > 0.5` equals the label; with rare labels, 1 - prevalence is free."""
    mean_probs, labels = _pair(mean_probs, labels)
    return float(((mean_probs > 0.5) == (labels > 0.5)).mean())


def ece(mean_probs, targets, num_bins: int = 15, per_label: bool = False) -> float | np.ndarray:
    """Expected calibration error of the probability of 1, in equal-width bins.

    `sum over bins of n_bin / n * |mean p - mean y|`. Each label or pixel is a binary event of its own, so p
    is the probability of 1 and not, as in multi-class use, that of the predicted class.

    Args:
        mean_probs: any shape, probabilities of 1; p = 1 belongs to the last bin.
        targets: same shape, in 0..1.
        num_bins: number of bins over [0, 1].
        per_label: give one value for each index of the last axis, instead of pooling all.

    Returns:
        A float, or (labels,) float64.

    Reference: Guo et al. 2017, "On Calibration of Modern Neural Networks", equation 3.
    """
    mean_probs, targets = _pair(mean_probs, targets)
    if per_label:
        columns = range(mean_probs.shape[-1])
        return np.array([ece(mean_probs[..., i], targets[..., i], num_bins) for i in columns])
    return _ece_of_bins(_calibration_bins(mean_probs, targets, num_bins))


def auc_per_label(mean_probs, labels) -> np.ndarray:
    """Area under the ROC curve of each label, (labels,); NaN where the labels are all 0 or all 1.

    Args:
        mean_probs: (batch, labels).
        labels: (batch, labels), 0 or 1.
    """
    from sklearn.metrics import roc_auc_score

    return _per_label(roc_auc_score, mean_probs, labels)


def average_precision_per_label(mean_probs, labels) -> np.ndarray:
    """Average precision of each label, (labels,); NaN where the labels are all 0 or all 1.

    A random ranking scores about the label's prevalence.

    Args:
        mean_probs: (batch, labels).
        labels: (batch, labels), 0 or 1.
    """
    from sklearn.metrics import average_precision_score

    return _per_label(average_precision_score, mean_probs, labels)


# ---------------------------------------------------------------------------
# Uncertainty
# ---------------------------------------------------------------------------


def binary_entropy(probs) -> np.ndarray:
    """Entropy of a binary event, `-p ln p - (1 - p) ln(1 - p)`, in nats, elementwise: 0 to ln 2 = 0.693."""
    from scipy.special import entr

    probs = _float64(probs)
    return entr(probs) + entr(1 - probs)


def uncertainty(probs, task: str = MULTI_LABEL) -> dict[str, np.ndarray]:
    """Split the predictive entropy of every label or pixel, or of an image's classes, into two parts.

    `entropy = expected_entropy + mutual_information`: total, aleatoric (the samples are each unsure),
    epistemic (the samples disagree). With one sample the last is 0.

    Args:
        probs: (samples, ...), probabilities of 1, or of the classes on the last axis.
        task: one of `TASKS`; under "multi-class" and "ordinal" entropies are over the last axis, 0 to
            ln(classes).

    Returns:
        "mean_probs", (...) float64; "entropy", "expected_entropy", "mutual_information" in nats, of the same
        shape, or without the last axis where that holds classes.

    Reference: Depeweg et al. 2018, "Decomposition of Uncertainty in Bayesian Deep Learning", equation 5.
    """
    probs, entropy = _float64(probs), _class_entropy if task in EXCLUSIVE else binary_entropy
    mean_probs = probs.mean(0)
    total, expected = entropy(mean_probs), entropy(probs).mean(0)
    return {
        "mean_probs": mean_probs,
        "entropy": total,
        "expected_entropy": expected,
        "mutual_information": total - expected,
    }


# ---------------------------------------------------------------------------
# Overlap of masks
# ---------------------------------------------------------------------------


def majority_mask(masks, rater_valid=None) -> np.ndarray:
    """Foreground where at least half of the valid raters mark it: a tie (2 of 4) is foreground.

    The 50 % consensus customary for LIDC (Kubota et al. 2011), as `datasets.Split.majority` has it.

    Args:
        masks: (batch, height, width, raters), 0 or 1.
        rater_valid: (batch, raters) bool; None if all are.

    Returns:
        (batch, height, width) bool.
    """
    masks = np.asarray(masks)
    return _rater_mean(masks, _check_valid(rater_valid, masks)) >= 0.5


def dice(predicted, truth) -> np.ndarray:
    """Dice of the foreground, `2 |A and B| / (|A| + |B|)`, for each image; 1 if both masks are empty.

    Args:
        predicted: (batch, height, width), bool or 0/1.
        truth: the same.

    Returns:
        (batch,) float64.
    """
    both, total = _overlap(predicted, truth)
    return np.where(total > 0, 2 * both / np.maximum(total, 1), 1.0)


def iou(predicted, truth) -> np.ndarray:
    """Intersection over union of the foreground, `|A and B| / |A or B|`, for each image; 1 if both are empty.

    Args:
        predicted: (batch, height, width), bool or 0/1.
        truth: the same.

    Returns:
        (batch,) float64.
    """
    both, total = _overlap(predicted, truth)
    return np.where(total > 0, both / np.maximum(total - both, 1), 1.0)


def generalised_energy_distance(probs, masks, rater_valid=None) -> np.ndarray:
    """Distance between the distribution of sampled masks and that of the raters' masks, for each image.

    `2 E d(sample, rater) - E d(sample, sample') - E d(rater, rater')` with `d = 1 - IoU`, and `d = 0`
    between two empty masks. Samples are cut at `p > 0.5`. Every expectation runs over all pairs, a mask
    with itself included, as is customary; the value is then biased upwards by few samples: compare only
    equal numbers of samples.

    Args:
        probs: (samples, batch, height, width) or (..., width, 1).
        masks: (batch, height, width, raters), 0 or 1.
        rater_valid: (batch, raters) bool; None if all are.

    Returns:
        (batch,) float64: the squared distance, as is customary. 0 if the two sets of masks are identical.

    Reference: Kohl et al. 2018, "A Probabilistic U-Net", equation 5; Szekely and Rizzo 2013.
    """
    return _energy_distance(*_check(probs, masks, SEGMENTATION, rater_valid))


# ---------------------------------------------------------------------------
# The paper's own metrics
# ---------------------------------------------------------------------------


def paper_accuracy(probs, labels) -> float:
    """Accuracy of the samples' majority vote: what it measures is mostly that most labels are 0.

    Predicting no finding for everyone scores 1 - prevalence, on ChestMNIST above every row of the paper's
    Table 1.

    Args:
        probs: (samples, batch, labels); a tied vote counts as 0, as coded.
        labels: (batch, labels), 0 or 1.
    """
    votes = (_float64(probs) > 0.5).mean(0)
    return accuracy(votes, labels)


def paper_brier(probs, targets, softmax_twice: bool = False) -> float:
    """Mean of the samples' Brier scores: the Brier score of one random sample, not of the prediction.

    It exceeds `brier` of the mean by the samples' variance. With two classes, background and foreground,
    the mean over classes is the binary score.

    Args:
        probs: (samples, ...), probabilities of 1.
        targets: (...), 0 or 1.
        softmax_twice: apply a softmax over (background, foreground) to the probabilities once more, as the
            paper's code does for its deterministic and ensemble segmentation rows: even a perfect map then
            scores 0.0723.
    """
    probs = _float64(probs)
    if softmax_twice:
        probs = 1 / (1 + np.exp(1 - 2 * probs))
    return float(np.square(probs - _float64(targets)).mean())


def paper_entropy(probs, task: str = MULTI_LABEL) -> float:
    """Entropy of the mean prediction; for labels the sum over them of `-p ln p` *without* the 1 - p term.

    For labels it measures mostly how far the probabilities are from both 0 and 1 on the low side: p = 1/e,
    not 1/2, is its maximum, 5.15 for 14 labels. For segmentation it is the binary entropy, mean over
    pixels.

    Args:
        probs: (samples, batch, labels), or (samples, batch, height, width) probabilities of foreground.
        task: "multi-label" or "segmentation".
    """
    from scipy.special import entr

    if task == SEGMENTATION:
        return float(binary_entropy(_float64(probs).mean(0)).mean())
    return float(entr(_float64(probs).mean(0)).sum(-1).mean())


def paper_dice(probs, truth) -> np.ndarray:
    """Elementwise `(2 p y + eps) / (p + y + eps)`, mean over pixels, both classes and samples, eps = 1e-5.

    It measures mostly the fraction of background that is called background: an all-background prediction
    scores 1 - the fraction of foreground, about 0.99 on LIDC.

    Args:
        probs: (samples, batch, height, width), probabilities of foreground.
        truth: (batch, height, width), 0 or 1; the mean of raters' masks gives the mean score over raters.

    Returns:
        (batch,) float64.
    """
    probs, truth, eps = _float64(probs), _float64(truth), 1e-5

    def score(p):  # of a pixel whose true class has probability p; the second ratio is the other class's
        return ((2 * p + eps) / (p + 1 + eps) + eps / (1 - p + eps)) / 2

    return (truth * score(probs) + (1 - truth) * score(1 - probs)).mean((0, 2, 3))


def paper_iou(probs, truth) -> np.ndarray:
    """IoU of all samples' masks together, the sum of intersections over the sum of unions, for each image.

    It measures the overlap of a typical sample, not of the mean prediction. 1 if truth and all samples are
    empty.

    Args:
        probs: (samples, batch, height, width), probabilities of foreground, cut at `p > 0.5`.
        truth: (batch, height, width), 0 or 1.

    Returns:
        (batch,) float64.
    """
    predicted, truth = np.asarray(probs) > 0.5, np.asarray(truth) > 0.5
    votes = predicted.sum(0)
    both = (votes * truth).sum((1, 2))
    either = votes.sum((1, 2)) + len(predicted) * truth.sum((1, 2)) - both
    return np.where(either > 0, both / np.maximum(either, 1), 1.0)


# ---------------------------------------------------------------------------
# Checks and small parts
# ---------------------------------------------------------------------------


def _check(probs, targets, task, rater_valid):
    targets, probs = _check_targets(targets, task), np.asarray(probs)
    if task != SEGMENTATION and rater_valid is not None:
        raise ValueError(f"Expected rater_valid=None, as {task} targets have no raters. Received: an array")
    if task == SEGMENTATION:
        probs = _drop_channel(probs)
    batch_shape = targets.shape[:-1] if task == SEGMENTATION else targets.shape
    if probs.ndim != 1 + len(batch_shape) or probs.shape[1:] != batch_shape or probs.shape[0] == 0:
        raise ValueError(
            f"Expected probs of shape (samples, {', '.join(map(str, batch_shape))}), as the targets. "
            f"Received: probs.shape={probs.shape}"
        )
    # NaN passes through both; rounding may leave a mean of float32 probabilities a little above 1.
    low, high = float(probs.min()), float(probs.max())
    if not (low >= 0 and high <= 1 + 1e-6):
        raise ValueError(
            f"Expected probabilities in 0..1 (not logits), none of them NaN. Received: min={low}, max={high}"
        )
    if task in EXCLUSIVE:
        sums = probs.sum(-1, dtype="float64")
        tolerance = max(SUM_TOLERANCE, 5 * float(np.finfo(np.result_type(probs, np.float16)).eps))
        if np.abs(sums - 1).max() > tolerance:
            raise ValueError(
                f"Expected probabilities that sum to 1 over the classes ({task}; a softmax's, not sigmoids). "
                f"Received: sums from {sums.min():.6g} to {sums.max():.6g}"
            )
    valid = _check_valid(rater_valid, targets) if task == SEGMENTATION else None
    return probs, targets, valid


_TARGETS = {BINARY: "(batch, 1)", SEGMENTATION: "(batch, height, width, raters)"}
_TARGETS |= dict.fromkeys(EXCLUSIVE, "(batch, classes), one-hot")


def _check_targets(targets, task):
    if task not in TASKS:
        raise ValueError(f"Expected task to be one of {TASKS}. Received: task={task!r}")
    if task != SEGMENTATION or not isinstance(targets, DiskArray):
        targets = np.asarray(targets)
    shape = _TARGETS.get(task, "(batch, labels)")
    fits = targets.ndim == (4 if task == SEGMENTATION else 2) and targets.size > 0
    if not fits or (task == BINARY and targets.shape[1] != 1):
        raise ValueError(f"Expected targets of shape {shape}, not empty. Received: shape {targets.shape}")
    for start in range(0, len(targets), 256):
        part = targets[start : start + 256]
        if part.dtype != bool and not ((part == 0) | (part == 1)).all():
            raise ValueError(f"Expected targets to be 0 or 1. Received: values from {part.min()} to {part.max()}")
    if task in EXCLUSIVE and (targets.sum(1) != 1).any():
        bad = int(np.argmax(targets.sum(1) != 1))
        raise ValueError(f"Expected one class per image, one-hot ({task}). Received: {targets[bad]} for image {bad}")
    return targets


def _check_valid(rater_valid, masks):
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


def _drop_channel(probs):
    if probs.ndim == 5 and probs.shape[-1] == 1:
        return probs[..., 0]
    return probs


def _pair(predicted, targets):
    predicted, targets = _float64(predicted), _float64(targets)
    if predicted.shape != targets.shape or predicted.size == 0:
        raise ValueError(
            f"Expected predictions and targets of one shape, not empty. Received: {predicted.shape} and {targets.shape}"
        )
    return predicted, targets


def _float64(values):
    return np.asarray(values).astype("float64", copy=False)


def _rater_mean(masks, valid):
    # Counts are exact, so a tie is exactly 0.5.
    return np.einsum("bhwr,br->bhw", _float64(masks), _float64(valid)) / valid.sum(1)[:, None, None]


def _class_entropy(probs):
    from scipy.special import entr

    return entr(probs).sum(-1)


def _nll(probs, targets):
    probs = np.clip(probs, LOG_CLIP, 1 - LOG_CLIP)
    return -(targets * np.log(probs) + (1 - targets) * np.log1p(-probs))


def _soft_brier(probs, soft):
    # The mean over raters of (p - y)^2, of which y (1 - y) is the raters' own variance.
    return np.square(probs - soft) + soft * (1 - soft)


def _per_label(function, mean_probs, labels):
    mean_probs, labels = _pair(mean_probs, labels)
    scores = np.full(labels.shape[1], np.nan)
    for index in range(labels.shape[1]):
        if 0 < labels[:, index].sum() < len(labels):
            scores[index] = function(labels[:, index], mean_probs[:, index])
    return scores


def _calibration_bins(probs, targets, num_bins):
    """(3, num_bins): count, sum of probabilities, sum of targets."""
    probs, targets = probs.ravel(), targets.ravel()
    index = np.minimum((probs * num_bins).astype(int), num_bins - 1)
    return np.stack([np.bincount(index, weights, num_bins) for weights in (None, probs, targets)])


def _ece_of_bins(bins):
    count, probs, targets = bins
    return float(np.abs(probs - targets).sum() / count.sum())


def _overlap(predicted, truth):
    predicted, truth = (values > 0.5 for values in _pair(predicted, truth))
    return (predicted & truth).sum((1, 2)), predicted.sum((1, 2)) + truth.sum((1, 2))


def _energy_distance(probs, masks, valid):
    distances = np.empty(masks.shape[0])
    for index in range(masks.shape[0]):
        samples = (probs[:, index] > 0.5).reshape(len(probs), -1).astype("float32")
        raters = masks[index][..., valid[index]].reshape(samples.shape[1], -1).T.astype("float32")
        cross = _pairwise_distance(samples, raters).mean()
        within = _pairwise_distance(samples, samples).mean() + _pairwise_distance(raters, raters).mean()
        distances[index] = 2 * cross - within
    return distances


def _pairwise_distance(a, b):
    """1 - IoU of each mask of a, (n, pixels), with each of b, (m, pixels): (n, m)."""
    both = (a @ b.T).astype("float64")
    either = a.sum(1)[:, None] + b.sum(1)[None, :] - both
    return np.where(either > 0, 1 - both / np.maximum(either, 1), 0.0)
