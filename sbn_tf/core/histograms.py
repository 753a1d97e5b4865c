"""Pixels as histograms: what metrics over the pixels of all images keep of each image, and their statistics.

A record of a test set keeps these counts instead of pixels: 13 kB an image, whatever its size.
"""

from __future__ import annotations

import numpy as np

from sbn_tf.core.predictions import event_entropy, float64
from sbn_tf.core.statistics import NUM_BINS, Statistic, bin_index, cumulative, divided, mass_cuts

__all__ = ["pixel_histograms"]

# Bins of equal width in asinh(logit(p) / LOGIT_UNIT), 0.001 of the logit near p = 1/2 and 1/90 of it elsewhere, and of
# ln of the mutual information from 1e-10 to ln 2, 1/11 each.
LOGIT_LIMIT, LOGIT_UNIT, LOGIT_BINS = 16, 0.1, 1024
INFORMATION_LOW, INFORMATION_BINS = 1e-10, 256
COLUMNS = max(LOGIT_BINS, 2 * INFORMATION_BINS)  # of the widest array


def pixel_histograms(mean_probs, soft, mutual_information, wrong, several, region) -> dict[str, np.ndarray]:
    """Histograms and moments of each image's pixels.

    Args:
        mean_probs, soft, mutual_information: (batch, height, width), the prediction, the raters' mean, the epistemic
            part of the entropy.
        wrong, region: (batch, height, width) bool, where the decision is wrong, and what anyone marks.
        several: (batch,) bool, images with two or more valid raters: the only ones in "moments".
    """
    gap = mean_probs - soft
    width = bin_index(mean_probs, NUM_BINS)
    confidence, right = confidence_of(mean_probs, soft)
    with np.errstate(divide="ignore"):
        logit = np.log(mean_probs) - np.log1p(-mean_probs)
        information = np.log(np.maximum(mutual_information, INFORMATION_LOW))
    # The bins of p and of 1 - p lie symmetrically: they have one entropy.
    half = LOGIT_BINS // 2
    distance = np.arcsinh(np.abs(logit) / LOGIT_UNIT) / np.arcsinh(LOGIT_LIMIT / LOGIT_UNIT)
    distance = np.minimum(distance * half, half - 1).astype(int)
    fine = np.where(logit < 0, half - 1 - distance, half + distance)
    low, high = np.log(INFORMATION_LOW), np.log(np.log(2))
    information = np.clip((information - low) / (high - low) * INFORMATION_BINS, 0, INFORMATION_BINS - 1).astype(int)
    entropy, variance = event_entropy(mean_probs), soft * (1 - soft)
    moments = (np.ones_like(soft), entropy, variance, entropy**2, variance**2, entropy * variance)
    return {
        "calibration": np.stack([_counts(width, NUM_BINS, values) for values in (None, mean_probs, soft)], 1),
        "calibration_region": np.stack(
            [_counts(width, NUM_BINS, values) for values in (region, gap * region)], 1
        ).astype("float32"),
        "paper_gap": _counts(bin_index(confidence, NUM_BINS), NUM_BINS, confidence - right),
        "logit_count": _counts(fine, LOGIT_BINS).astype("uint32"),
        "entropy_wrong": _counts(half - 1 - distance, half, wrong).astype("uint32"),
        "logit_gap": _counts(fine, LOGIT_BINS, gap).astype("float32"),
        "information_count": _counts(information + wrong * INFORMATION_BINS, 2 * INFORMATION_BINS).astype("uint32"),
        "moments": np.stack([value.sum((1, 2)) for value in moments], 1) * several[:, None],
    }


def _counts(index, num_bins, weights=None):
    """(batch, num_bins): sums of weights, or counts, of each image's pixels in each bin."""
    index = index + num_bins * np.arange(len(index))[:, None, None]
    weights = None if weights is None else weights.ravel()
    return np.bincount(index.ravel(), weights, num_bins * len(index)).reshape(-1, num_bins)


def confidence_of(mean_probs, truth) -> tuple[np.ndarray, np.ndarray]:
    """Probability of the more probable outcome, and how often that is right: Guo's calibration for two classes."""
    positive = mean_probs > 0.5
    return np.where(positive, mean_probs, 1 - mean_probs), np.where(positive, truth, 1 - truth)


def width_error(gap, pixels) -> Statistic:
    """Calibration error from the sums of probability less truth in bins of equal width, (images, bins)."""
    return lambda weights: divided(np.abs(weights @ gap).sum(1), weights @ pixels)[None]


def mass_error(count, gap) -> Statistic:
    """Calibration error in bins of equal count, each made of fine bins (images, fine bins)."""
    count = float64(count)

    def statistic(weights):
        below, gaps = cumulative(weights @ count), cumulative(weights @ gap)
        cuts = np.stack([mass_cuts(row) for row in below])
        return (np.abs(np.diff(np.take_along_axis(gaps, cuts, 1))).sum(1) / below[:, -1])[None]

    return statistic


def by_entropy(count, wrong) -> np.ndarray:
    """Right, then wrong pixels in bins of rising entropy: it falls as the logit leaves 0 for either side."""
    half = LOGIT_BINS // 2
    return np.concatenate([count[:, :half] + count[:, : half - 1 : -1] - wrong, wrong], 1)


def pixel_ranking(counts) -> Statistic:
    """AUROC from counts (images, 2 * bins): right, then wrong pixels in bins of rising uncertainty."""
    counts, bins = float64(counts), counts.shape[1] // 2

    def statistic(weights):
        both = weights @ counts
        right, wrong = both[:, :bins], both[:, bins:]
        rank = np.cumsum(right, 1) - right / 2
        return divided((wrong * rank).sum(1), wrong.sum(1) * right.sum(1))[None]

    return statistic


def pearson(moments) -> Statistic:
    """Pearson correlation of two values of a pixel from their moments (images, 6)."""

    def statistic(weights):
        sums = weights @ moments
        _, mean_x, mean_y, square_x, square_y, product = divided(sums, sums[:, :1] + np.zeros(6)).T
        variance_x, variance_y = square_x - mean_x**2, square_y - mean_y**2
        with np.errstate(invalid="ignore"):
            varies = np.minimum(variance_x, variance_y) > 1e-12
        scale = np.sqrt(np.where(varies, variance_x * variance_y, 0))
        return np.clip(divided(product - mean_x * mean_y, scale), -1, 1)[None]

    return statistic
