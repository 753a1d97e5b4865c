"""The metrics of the paper's Table 1 as its code defines them; each docstring says what the number really measures."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike

from sbn_tf.core.cases import PAPER_ECE
from sbn_tf.core.histograms import confidence_of
from sbn_tf.core.predictions import MULTI_LABEL, SEGMENTATION, check_range, event_entropy, float64, samples_pair
from sbn_tf.core.statistics import NUM_BINS, check_bins, plain, width_calibration

__all__ = ["paper_accuracy", "paper_brier", "paper_dice", "paper_ece", "paper_entropy", "paper_iou"]


def vote(probs: np.ndarray) -> np.ndarray:
    """What most samples say; a tied vote counts as 0, as coded."""
    return (probs > 0.5).mean(0) > 0.5


def paper_accuracy(labels: ArrayLike, probs: ArrayLike) -> float:
    """Accuracy of the samples' majority vote: it measures mostly that most labels are 0.

    Predicting no finding for everyone scores 1 - prevalence, on ChestMNIST above every row of the paper's Table 1.

    Args:
        probs: (samples, batch, labels).
        labels: (batch, labels), 0 or 1.
    """
    labels, probs = samples_pair(labels, probs)
    return float((vote(probs) == (labels > 0.5)).mean())


def _second_softmax(probs: np.ndarray) -> np.ndarray:
    """Probabilities after one more softmax over (background, foreground): a certain 1 becomes 0.731."""
    return 1 / (1 + np.exp(1 - 2 * probs))


def paper_brier(targets: ArrayLike, probs: ArrayLike, softmax_twice: bool = False) -> float:
    """Mean of the samples' Brier scores: the Brier score of one random sample, not of the prediction.

    It exceeds `brier` of the mean by the samples' variance. With two classes, background and foreground, the mean over
    classes is the binary score.

    Args:
        probs: (samples, ...), probabilities of 1.
        targets: (...), 0 or 1.
        softmax_twice: apply a softmax over (background, foreground) to the probabilities once more, as the paper's
            code does for its deterministic and ensemble segmentation rows: even a perfect map then scores 0.0723.
    """
    targets, probs = samples_pair(targets, probs)
    return float(np.square((_second_softmax(probs) if softmax_twice else probs) - targets).mean())


def paper_entropy(probs: ArrayLike, task: str = MULTI_LABEL) -> float:
    """Entropy of the mean prediction; for labels the sum over them of `-p ln p` *without* the 1 - p term.

    For labels it measures mostly how far the probabilities are from both 0 and 1 on the low side: p = 1/e, not 1/2, is
    its maximum, 5.15 for 14 labels. For segmentation it is the binary entropy, mean over pixels.

    Args:
        probs: (samples, batch, labels), or (samples, batch, height, width) probabilities of foreground.
        task: "multi-label" or "segmentation".
    """
    from scipy.special import entr

    if task not in (MULTI_LABEL, SEGMENTATION):
        raise ValueError(f"Expected a task of the paper's, {MULTI_LABEL!r} or {SEGMENTATION!r}. Received: {task!r}")
    probs = check_range(float64(probs))
    if probs.ndim < 3 or probs.size == 0:
        raise ValueError(f"Expected probs of shape (samples, batch, ...), not empty. Received: shape {probs.shape}")
    mean = probs.mean(0)
    return float(event_entropy(mean).mean() if task == SEGMENTATION else entr(mean).sum(-1).mean())


def paper_dice(truth: ArrayLike, probs: ArrayLike) -> np.ndarray:
    """Elementwise `(2 p y + eps) / (p + y + eps)`, mean over pixels, both classes and samples, eps = 1e-5.

    It measures mostly how near to exactly 0 the probabilities of the background are: an all-background prediction
    scores 1 - the fraction of foreground, about 0.99 on LIDC, a right background pixel with p = 0.001 one half.

    Args:
        probs: (samples, batch, height, width), probabilities of foreground.
        truth: (batch, height, width), 0 or 1; the mean of raters' masks gives the mean score over raters.

    Returns:
        (batch,) float64.
    """
    (truth, probs), eps = samples_pair(truth, probs, 3), 1e-5

    def score(p):  # of a pixel whose true class has probability p; the second ratio is the other class's
        return ((2 * p + eps) / (p + 1 + eps) + eps / (1 - p + eps)) / 2

    return (truth * score(probs) + (1 - truth) * score(1 - probs)).mean((0, 2, 3))


def paper_iou(truth: ArrayLike, probs: ArrayLike) -> np.ndarray:
    """IoU of all samples' masks together, the sum of intersections over the sum of unions, for each image.

    It measures the overlap of a typical sample, not of the mean prediction. 1 if truth and all samples are empty. One
    sample differs from many of the same distribution: the mean of ratios is not the ratio of means.

    Args:
        probs: (samples, batch, height, width), probabilities of foreground, cut at `p > 0.5`.
        truth: (batch, height, width), 0 or 1.

    Returns:
        (batch,) float64.
    """
    truth, predicted = (values > 0.5 for values in samples_pair(truth, probs, 3))
    votes = predicted.sum(0)
    both = (votes * truth).sum((1, 2))
    either = votes.sum((1, 2)) + len(predicted) * truth.sum((1, 2)) - both
    return np.where(either > 0, both / np.maximum(either, 1), 1.0)


def paper_ece(targets: ArrayLike, probs: ArrayLike, num_bins: int = NUM_BINS) -> float:
    """Expected calibration error of the predicted class, as Guo et al. define it, of the mean prediction.

    It measures mostly whether a confident "no" is right: the confidence is `max(p, 1 - p)`, and with rare labels or few
    foreground pixels nearly every prediction is a confident 0. A constant prevalence scores about 0.

    # Differs from the paper: its Table 1 has no column for it and its code none; this is the definition its text
    # cites, with each label or pixel a two-class event and all pooled.

    Args:
        probs: (samples, ...), probabilities of 1; p = 0.5 predicts 0.
        targets: (...), in 0..1; the mean of raters gives the expectation over raters.
        num_bins: number of bins over [0, 1], of which the upper half can be filled.

    Reference: Guo et al. 2017, "On Calibration of Modern Neural Networks", equation 3.
    """
    targets, probs = samples_pair(targets, probs)
    confidence, right = (values.reshape(-1, 1) for values in confidence_of(probs.mean(0), targets))
    return float(plain(width_calibration(confidence, right, check_bins(num_bins)), len(right))[0])


# The same for each image of a `core.cases.Case`: (batch,), where raters are several against a random one.


def _image_accuracy(case) -> np.ndarray:
    """`paper_accuracy` of each image."""
    return case.mean(vote(case.probs) == case.actual)


def image_brier(case) -> np.ndarray:
    """`paper_brier` of each image."""
    return case.brier(case.probs, samples=True)


def _image_brier_twice(case) -> np.ndarray:
    """`paper_brier` of each image with the second softmax."""
    return case.brier(_second_softmax(case.probs), samples=True)


def _image_entropy(case) -> np.ndarray:
    """`paper_entropy` of each image."""
    from scipy.special import entr

    return case.mean(case.parts["entropy"]) if case.task == SEGMENTATION else entr(case.parts["mean_probs"]).sum(1)


def _image_dice(case) -> np.ndarray:
    """`paper_dice` of each image."""
    return paper_dice(case.truth, case.probs)


def _image_iou(case) -> np.ndarray:
    """`paper_iou` of each image."""
    weights = case.valid / case.valid.sum(1, keepdims=True)  # (batch, raters)
    return sum(weights[:, r] * paper_iou(case.targets[..., r], case.probs) for r in range(case.targets.shape[-1]))


_MASKS, _BOTH = (SEGMENTATION,), (MULTI_LABEL, SEGMENTATION)
# The rows of the registry, with the directions that the paper reads them in.
# fmt: off
ENTRIES = [
    ("paper_accuracy", (MULTI_LABEL,), 0, 1, True, _image_accuracy,
     "mostly the share of absent labels: never any finding scores high"),
    ("paper_brier", _BOTH, 0, 1, False, image_brier,
     "Brier score of one random sample, not of the mean prediction"),
    ("paper_brier_softmax_twice", _MASKS, 0, 1, False, _image_brier_twice,
     "the same after a second softmax: 0.0723 is the least"),
    ("paper_entropy", _BOTH, 0, np.inf, None, _image_entropy,
     "of labels -p ln p without the 1 - p term; of masks the entropy"),
    ("paper_dice", _MASKS, 0, 1, True, _image_dice,
     "mostly how near to exactly 0 background is: an empty mask scores its share"),
    ("paper_iou", _MASKS, 0, 1, True, _image_iou, "IoU of a typical sample, not of the mean prediction"),
    ("paper_ece", _BOTH, 0, 1, False, PAPER_ECE,
     "calibration error of the decisions: mostly whether a sure no is right"),
]
# fmt: on
