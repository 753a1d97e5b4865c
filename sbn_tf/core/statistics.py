"""Statistics of weighted items, for many weightings at once: a bootstrap is a weighting of images.

Each function here sorts or bins its items once and gives `statistic(weights)`: weights (resamples, images), how often
each image counts, -> (numbers, resamples), NaN where undefined. Weights of 1 give the plain statistic, see `plain`.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable

import numpy as np
from numpy.typing import ArrayLike

from sbn_tf.core.checks import check_count
from sbn_tf.core.predictions import float64, pair, risk_pair

__all__ = ["Statistic"]

Statistic = Callable[[np.ndarray], np.ndarray]  # weights (resamples, images) -> (numbers, resamples)
NUM_BINS = 15  # of a calibration error
DECIMALS = 12  # two uncertainties that differ by less are one: rounding must not rank images


def plain(statistic: Statistic, num_images: int) -> np.ndarray:
    """The statistic's numbers where every image counts once."""
    return statistic(np.ones((1, num_images)))[:, 0]


def divided(numerator, denominator):
    """The ratio, NaN where the denominator is 0."""
    return np.divide(numerator, denominator, out=np.full(np.shape(numerator), np.nan), where=denominator > 0)


def cumulative(values):
    """(resamples, items + 1): sums of the first 0, 1, ... items."""
    result = np.zeros((len(values), values.shape[1] + 1))
    np.cumsum(values, axis=1, out=result[:, 1:])
    return result


def _edges_of_ties(ordered):
    """Where runs of equal values begin in sorted ones, and where the last one ends."""
    return np.append(np.flatnonzero(np.concatenate([[True], np.diff(ordered) != 0])), len(ordered))


def means(columns) -> Statistic:
    """Mean of each of some values of an image, over the images that have it (not NaN)."""
    values = np.stack(columns, 1)
    known = ~np.isnan(values)
    values, known = np.where(known, values, 0), float64(known)
    return lambda weights: divided(weights @ values, weights @ known).T


def skill(score, reference) -> Statistic:
    """1 - mean score / mean score of the reference."""
    return lambda weights: divided(weights @ (reference - score), weights @ reference)[None]


def ranking(scores, positive, images=None) -> Statistic:
    """Area under the ROC curve and average precision, as scikit-learn's with `sample_weight`.

    Ties count half in the first and are one step in the second. `images` is the image of each item; None: in order.
    """
    order = np.argsort(scores, kind="stable")
    images = order if images is None else images[order]
    edges = _edges_of_ties(scores[order])
    tie = np.repeat(np.arange(len(edges) - 1), np.diff(edges))
    at = np.flatnonzero(np.asarray(positive)[order])  # only where positives are does anything count
    ties, inside = np.unique(tie[at], return_index=True)
    starts, ends = edges[ties], edges[ties + 1]

    def statistic(weights):
        if not len(at):
            return np.full((2, len(weights)), np.nan)
        below = cumulative(weights[:, images])
        total = below[:, -1:]
        start, end = below[:, starts], below[:, ends]
        positives = np.add.reduceat(weights[:, images[at]], inside, axis=1)  # (resamples, ties)
        all_positives = positives.sum(1)
        positives_below = np.cumsum(positives, 1) - positives
        negatives = (start - positives_below) + (end - start - positives) / 2
        defined = (all_positives > 0) & (total[:, 0] > all_positives)
        auc = divided((positives * negatives).sum(1), all_positives * (total[:, 0] - all_positives))
        precision = divided(all_positives[:, None] - positives_below, total - start)
        precision = divided(np.where(positives > 0, positives * precision, 0).sum(1), all_positives)
        return np.where(defined, [auc, precision], np.nan)

    return statistic


def rankings(labels, mean_probs) -> list[np.ndarray]:
    """AUC and average precision of each label, of (batch, labels)."""
    pairs = zip(mean_probs.T, labels.T, strict=True)
    return [plain(ranking(probs, truth > 0.5), len(truth)) for probs, truth in pairs]


def column_rankings(mean_probs, targets) -> Statistic:
    """`ranking` of each label, mean over the labels that occur as both 0 and 1, and how many these are."""
    rankings = [ranking(mean_probs[:, i], targets[:, i] > 0.5) for i in range(mean_probs.shape[1])]

    def statistic(weights):
        scores = np.array([one(weights) for one in rankings])  # (labels, 2, resamples)
        defined = ~np.isnan(scores[:, 0])
        number = defined.sum(0)
        mean = np.where(defined[:, None], scores, 0).sum(0) / np.where(number > 0, number, np.nan)
        return np.stack([*mean, float64(number)])

    return statistic


def check_bins(num_bins) -> int:
    """The number of bins, if it is a whole number of 1 or more."""
    check_count("num_bins", num_bins)
    return int(num_bins)


def bin_index(probs, num_bins, binning="width"):
    """The bin of each probability: of equal "width" over [0, 1], or of equal count, "mass"."""
    if binning == "width":
        return np.minimum((probs * num_bins).astype(int), num_bins - 1)
    if binning != "mass":
        raise ValueError(f'Expected binning "width" or "mass". Received: binning={binning!r}')
    # The bin of a value is that of its mean rank, so equal values share one whatever their order.
    _, group, count = np.unique(probs, return_inverse=True, return_counts=True)
    rank = np.cumsum(count) - count / 2
    return np.minimum((rank * num_bins / len(probs)).astype(int), num_bins - 1)[group]


def width_calibration(probs, targets, num_bins=NUM_BINS) -> Statistic:
    """Calibration error in bins of equal width: pooled, and the mean over the labels, of probs (images, labels)."""
    from scipy.sparse import csr_array

    images, labels = probs.shape
    index = bin_index(probs, num_bins) + num_bins * np.arange(labels)
    gaps = csr_array(
        ((probs - targets).ravel(), index.ravel(), labels * np.arange(images + 1)), shape=(images, labels * num_bins)
    ).T.tocsr()

    def statistic(weights):
        gap = (gaps @ weights.T).reshape(labels, num_bins, -1)
        total = labels * weights.sum(1)
        return np.stack([np.abs(gap.sum(0)).sum(0) / total, np.abs(gap).sum((0, 1)) / total])

    return statistic


def mass_calibration(probs, targets, num_bins=NUM_BINS, images=None) -> Statistic:
    """Calibration error in bins of equal weight; equal probabilities share one: that of the middle of their weight."""
    order = np.argsort(probs, kind="stable")
    images = order if images is None else images[order]
    gaps = (probs - targets)[order]
    edges = _edges_of_ties(probs[order])

    def statistic(weights):
        result, ordered, below = np.empty(len(weights)), np.empty(len(images)), np.zeros(len(images) + 1)
        for row, one in enumerate(weights):
            np.take(one, images, out=ordered)
            np.cumsum(ordered, out=below[1:])
            cuts = edges[mass_cuts(below if len(edges) == len(below) else below[edges], num_bins)]
            np.multiply(ordered, gaps, out=ordered)
            result[row] = sum(abs(ordered[start:stop].sum()) for start, stop in itertools.pairwise(cuts)) / below[-1]
        return result[None]

    return statistic


def column_mass_calibration(probs, targets) -> Statistic:
    """`mass_calibration` of each label, mean over the labels."""
    columns = [mass_calibration(probs[:, i], targets[:, i]) for i in range(probs.shape[1])]
    return lambda weights: np.mean([one(weights) for one in columns], 0)


def mass_cuts(below, num_bins=NUM_BINS):
    """Where steps divide into bins of equal weight, (bins + 1,), from their cumulative weights, (steps + 1,)."""
    shares = below[-1] * np.arange(1, num_bins) / num_bins
    # Steps that end before a share lie below it; the one that it falls into does, if its middle does.
    cuts = np.minimum(np.searchsorted(below[1:], shares, "right"), len(below) - 2)
    cuts = cuts + ((below[cuts] + below[cuts + 1]) / 2 < shares)
    return np.concatenate([[0], cuts, [len(below) - 1]])


def areas(uncertain, risk) -> Statistic:
    """Area under the risk-coverage curve, and its excess over the oracle's, which sorts by risk."""
    from scipy.special import digamma

    def area(scores):
        order = np.argsort(scores, kind="stable")
        edges = _edges_of_ties(scores[order])
        risks = risk[order]

        def statistic(weights):
            weights = weights[:, order]
            below = cumulative(weights)[:, edges]
            risk_below = cumulative(weights * risks)[:, edges]
            inside, risk_inside = np.diff(below), np.diff(risk_below)
            # Of m tied images with mean risk r after C with the sum S, the j-th covered one has selective risk
            # (S + j r) / (C + j): their sum over j = 1..m is m r + (S - r C) (H(C + m) - H(C)), H the harmonic numbers.
            excess = risk_below[:, :-1] - below[:, :-1] * risk_inside / np.maximum(inside, np.finfo(float).tiny)
            steps = np.where(inside > 0, excess * np.diff(digamma(below + 1)), 0)
            return (risk_inside + steps).sum(1) / below[:, -1]

        return statistic

    found, oracle = area(uncertain), area(risk)

    def statistic(weights):
        value, best = found(weights), oracle(weights)
        return np.stack([value, np.maximum(value - best, 0)])

    return statistic


def quadratic_kappa(predicted, true) -> Statistic:
    """Cohen's kappa of grades with quadratic weights."""
    columns = np.stack([predicted, true, predicted**2, true**2, np.square(predicted - true)], 1)

    def statistic(weights):
        mean = weights @ columns / weights.sum(1, keepdims=True)
        # In closed form: squared distances of the pairs over those of all pairs, the classes of chance.
        by_chance = mean[:, 2] + mean[:, 3] - 2 * mean[:, 0] * mean[:, 1]
        return (1 - divided(mean[:, 4], np.where(by_chance > 1e-12, by_chance, 0)))[None]

    return statistic


def brier_decomposition(targets: ArrayLike, mean_probs: ArrayLike, num_bins: int = NUM_BINS) -> dict[str, float]:
    """The Brier score as `reliability - resolution + uncertainty + within`, exactly, over equal-width bins.

    "reliability": squared distance of a bin's mean probability and its frequency of 1 (0: calibrated). "resolution":
    variance of the bins' frequencies (more is better). "uncertainty": variance of the targets. "within": variance of p
    within bins minus twice its covariance with y; 0 if each bin has one p. `targets`, `mean_probs`: any shape, in 0..1.
    """
    y, p = (values.ravel() for values in pair(targets, mean_probs))
    num_bins = check_bins(num_bins)
    index = bin_index(p, num_bins)
    count = np.bincount(index)
    weight, filled = count / len(p), np.maximum(count, 1)
    p_bin, y_bin = (np.bincount(index, values) / filled for values in (p, y))
    inside_p, inside_y = p - p_bin[index], y - y_bin[index]
    return {
        "reliability": float((weight * np.square(p_bin - y_bin)).sum()),
        "resolution": float((weight * np.square(y_bin - y.mean())).sum()),
        "uncertainty": float(y.var()),
        "within": float((inside_p**2 - 2 * inside_p * inside_y).mean()),
    }


def calibration_error(p, y, num_bins, binning) -> float:
    """Expected calibration error of flat arrays in bins of equal "width" or "mass"."""
    if binning not in ("width", "mass"):
        raise ValueError(f'Expected binning "width" or "mass". Received: binning={binning!r}')
    num_bins = check_bins(num_bins)
    width = binning == "width"
    found = width_calibration(p[:, None], y[:, None], num_bins) if width else mass_calibration(p, y, num_bins)
    return float(plain(found, len(p))[0])


def error_auroc(uncertainty: ArrayLike, errors: ArrayLike) -> float:
    """Probability that an error (0 or 1) is more uncertain than a correct prediction; NaN where all or none are.

    0.5 is chance. It compares uncertainties of one prediction, not methods: these make other errors.
    """
    uncertainty, errors = risk_pair(np.ravel(uncertainty), np.ravel(errors))
    if not ((errors == 0) | (errors == 1)).all():
        raise ValueError(f"Expected errors to be 0 or 1. Received: values from {errors.min()} to {errors.max()}")
    return float(plain(ranking(uncertainty, errors > 0), len(errors))[0])


def area_under_risk_coverage(uncertainty: ArrayLike, risk: ArrayLike) -> float:
    """Mean of the selective risk over all coverages: low if the risk is low, and if the uncertainty finds it."""
    return float(plain(areas(*risk_pair(uncertainty, risk)), np.size(risk))[0])


def excess_area(uncertainty: ArrayLike, risk: ArrayLike) -> float:
    """That area beyond the oracle's, which sorts by the risk itself: what a better uncertainty could still gain."""
    return float(plain(areas(*risk_pair(uncertainty, risk)), np.size(risk))[1])
