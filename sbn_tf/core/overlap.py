"""Masks of an image: their overlap, the distance of their outlines, and the distances between two sets of them."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from numpy.typing import ArrayLike

from sbn_tf.core.predictions import SEGMENTATION, check, check_targets, check_valid, float64, mask_pair, rater_mean

__all__ = ["false_negative_rates", "overlap"]


def overlap(truth, predicted) -> tuple[np.ndarray, np.ndarray]:
    """Pixels in both masks, and those of one plus those of the other, for each image."""
    truth, predicted = mask_pair(truth, predicted)
    return (predicted & truth).sum((1, 2)), predicted.sum((1, 2)) + truth.sum((1, 2))


def false_negative_rates(probs: ArrayLike, masks: ArrayLike, cuts: ArrayLike) -> np.ndarray:
    """The share of an image's true pixels that a mask of the pixels with `p >= cut` misses; 0 where none is true.

    Args:
        probs: (batch, height, width), in 0..1.
        masks: (batch, height, width), 0 or 1.
        cuts: (cuts,), in 0..1.

    Returns:
        float64 (batch, cuts), in 0..1; it grows with the cut.

    Raises:
        ValueError: shapes that do not fit.
    """
    probs, masks, cuts = float64(probs), np.asarray(masks) > 0.5, float64(cuts)
    if probs.ndim != 3 or probs.shape != masks.shape:
        raise ValueError(
            f"Expected probs and masks (batch, height, width). Received: shapes {probs.shape} and {masks.shape}"
        )
    true = [np.sort(one[mask]) for one, mask in zip(probs, masks, strict=True)]
    return np.stack([np.searchsorted(one, cuts, "left") / max(len(one), 1) for one in true])


def _outline_distances(one, other, spacing=(1.0, 1.0)) -> np.ndarray:
    """Distance of each outline pixel of two masks (height, width) to the other's outline, both directions pooled."""
    from scipy import ndimage

    if not one.any() or not other.any():
        return np.array([0.0 if one.any() == other.any() else np.hypot(*np.multiply(one.shape, spacing))])
    box = ndimage.find_objects((one | other).astype("uint8"))[0]  # an empty margin changes no distance
    one, other = (mask[box] & ~ndimage.binary_erosion(mask[box]) for mask in (one, other))
    return np.concatenate([ndimage.distance_transform_edt(~b, spacing)[a] for a, b in ((one, other), (other, one))])


def hausdorff95(truth: ArrayLike, predicted: ArrayLike, spacing: tuple[float, float] = (1.0, 1.0)) -> np.ndarray:
    """95th percentile of the distances between the outlines, in pixels, for each image, (batch,).

    An outline is the foreground's pixels with a background pixel, or the image's edge, above, below, left or right.
    0 if both masks are empty; the image's diagonal, more than any distance within it, if one of them is. With
    `spacing`, height and width of a pixel in millimetres, distances are in millimetres.
    """
    pairs = zip(*mask_pair(truth, predicted), strict=True)
    return np.array([np.percentile(_outline_distances(*pair, spacing), 95) for pair in pairs])


def _soft_mask(masks, rater_valid):
    masks = check_targets(np.asarray(masks), SEGMENTATION)
    return rater_mean(masks, check_valid(rater_valid, masks))


def majority_mask(masks: ArrayLike, rater_valid: ArrayLike | None = None) -> np.ndarray:
    """Where at least half of the valid raters mark, (batch, height, width) bool: a tie (2 of 4) is foreground."""
    return _soft_mask(masks, rater_valid) >= 0.5


def disagreement(masks: ArrayLike, rater_valid: ArrayLike | None = None) -> np.ndarray:
    """The raters' variance at each pixel, `s (1 - s)`, (batch, height, width): 0 if they agree, at most 1/4."""
    soft = _soft_mask(masks, rater_valid)
    return soft * (1 - soft)


def spread_cuts(count: int) -> np.ndarray:
    """(m - 1/2) / count for m = 1 ... count: where `count` sampled masks are cut, so that all levels are used."""
    return (np.arange(count) + 0.5) / count


def mask_sets(probs, masks, rater_valid, spread=False) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Each image's sampled masks (samples, pixels) and valid raters' masks (raters, pixels), float32 0 and 1."""
    probs, masks, _ = check(probs, masks, SEGMENTATION, rater_valid)
    real, cuts = check_valid(rater_valid, masks), spread_cuts(len(probs))[:, None, None] if spread else 0.5
    for index in range(len(masks)):
        samples = (probs[:, index] > cuts).reshape(len(probs), -1).astype("float32")
        yield samples, np.asarray(masks[index])[..., real[index]].reshape(samples.shape[1], -1).T.astype("float32")


def distances(a, b) -> np.ndarray:
    """1 - IoU of each mask of a, (n, pixels), with each of b, (m, pixels): (n, m); 0 if both are empty."""
    both = (a @ b.T).astype("float64")
    either = a.sum(1)[:, None] + b.sum(1)[None, :] - both
    return np.where(either > 0, 1 - both / np.maximum(either, 1), 0.0)


def matched_distance(distance) -> float:
    """Mean distance of two sets whose members are matched one to one; both are repeated to one length first."""
    from scipy.optimize import linear_sum_assignment

    multiple = np.lcm(*distance.shape)
    distance = distance.repeat(multiple // len(distance), 0).repeat(multiple // distance.shape[1], 1)
    return distance[linear_sum_assignment(distance)].mean()
