"""Decisions with a guarantee: limits, set on calibration images, that hold on new ones whatever the network.

The guarantees need calibration and new images that are *exchangeable*: drawn alike, and neither used in training. They
are averages over calibration sets and new images, not promises for one image, and they end where the images shift.

Several images of one patient are not exchangeable, the patients are. `groups` says whose an image is: each patient then
counts once, and a guarantee is for the images of a new patient, all of them weighing together as one.
A set has the classes whose score is at most the limit. `1 - p` as a score (Sadinle, Lei and Wasserman 2019: "least
ambiguous") gives the smallest sets on average.

| | guarantees for a new image | function |
|---|---|---|
| set of classes | it has the true class with probability >= 1 - alpha | `limit` of `1 - p` or `aps_scores` |
| by class or label | the same among the images of each class | `class_limits` |
| mask | mean share of the missed pixels <= alpha | `risk_cut` of `overlap.false_negative_rates` |
| referral | with confidence: error rate of what is kept <= rate | `refer_limit` |
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike

from sbn_tf.core.checks import check_seed, is_number
from sbn_tf.core.predictions import float64, risk_pair

__all__ = [
    "aps_scores",
    "class_limits",
    "limit",
    "mean_risk",
    "needed",
    "needed_to_refer",
    "one_of_each",
    "refer_limit",
    "risk_cut",
]

ROUNDING = 1e-9  # of sums of weights: below any weight


def needed(alpha: float) -> int:
    """The fewest calibration images (patients) for a risk `alpha` in (0, 1), `1 / alpha - 1` rounded up: 9 for 0.1."""
    _check_between("alpha", alpha)
    return math.ceil(1 / alpha - 1 - ROUNDING)


def aps_scores(probs: ArrayLike, seed: int = 0) -> np.ndarray:
    """The probability of all likelier classes and a random share of the class's own: sets that grow where it is unsure.

    Equally likely classes come in their order.

    Args:
        probs: (batch, classes), in 0..1, sum 1.
        seed: of the shares, one an image, uniform in 0..1. Calibration and new images need different seeds.

    Returns:
        float64 (batch, classes).

    Reference: Romano, Sesia and Candes (2020), "Classification with valid and adaptive coverage", equations 5 and 7.
    """
    probs = float64(probs)
    share = np.random.default_rng(check_seed(seed)).uniform(size=(len(probs), 1))
    order = np.argsort(-probs, axis=1, kind="stable")
    ranked = np.take_along_axis(probs, order, 1)
    scores = np.empty_like(probs)
    np.put_along_axis(scores, order, np.cumsum(ranked, 1) - (1 - share) * ranked, 1)
    return scores


def limit(scores: ArrayLike, alpha: float, groups: ArrayLike | None = None) -> float:
    """The limit below which the true class's score of a new image lies with probability >= 1 - alpha.

    Of n images it is the `ceil((n + 1) (1 - alpha))`-th smallest score. Of patients, an image weighs 1 over the number
    of its patient's images: the smallest limit for which the weights of the scores up to it sum to
    `(n + 1) (1 - alpha)` or more, n the number of patients.

    Args:
        scores: (images,): of the true class of each calibration image.
        alpha: the risk, between 0 and 1.
        groups: (images,) patient of each image; None: one image a patient.

    Raises:
        ValueError: too few calibration images: the message says how many are needed.

    References: Vovk, Gammerman and Shafer (2005), "Algorithmic learning in a random world", chapter 2. With patients:
        Angelopoulos et al. (2024), "Conformal risk control", theorem 1, of the share of a patient's images that miss.
    """
    scores = float64(scores)
    if scores.ndim != 1 or not np.isfinite(scores).all():
        raise ValueError(f"Expected one finite score for each image. Received: shape {scores.shape}, or NaN in it")
    weights, num = _weights(groups, len(scores))
    _check_enough(num, needed(alpha), f"alpha={alpha:g}")
    order = np.argsort(scores, kind="stable")
    below = np.cumsum(weights[order])
    return float(scores[order][np.searchsorted(below, (num + 1) * (1 - alpha) - ROUNDING)])


def class_limits(
    scores: Sequence[ArrayLike], alpha: float, groups: Sequence[ArrayLike] | None = None, *, pool: bool = True
) -> np.ndarray:
    """A limit for each class: among the new images of a class, the set has it with probability >= 1 - alpha.

    Args:
        scores: of each class, (images of that class,): the score of that class.
        alpha: the risk, between 0 and 1.
        groups: of each class, the patients of these images; None: one image a patient.
        pool: classes with too few images share a limit, which then holds for them together; the class with the fewest
            images of all others joins them as long as they have too few. So the sets have the true class with
            probability >= 1 - alpha in any case. False, for labels that do not exclude one another: the limit of a
            label with too few images is infinity, so it is in every set.

    Returns:
        (classes,) float64.

    Raises:
        ValueError: too few calibration images of all classes together or, if `pool` is False, of every label.

    Reference: Vovk (2012), "Conditional validity of inductive conformal predictors", section 4 (label-conditional).
    """
    least, parts = needed(alpha), [float64(part) for part in scores]
    starts = np.cumsum([0, *map(len, parts)])
    owners = [
        np.arange(starts[k], starts[k + 1]) if groups is None else np.asarray(groups[k]) for k in range(len(parts))
    ]
    sizes = np.array([len(np.unique(one)) for one in owners])
    by_size = np.argsort(sizes, kind="stable").tolist()
    rare = by_size[: int((sizes < least).sum())]
    if pool and rare:
        while len(rare) < len(parts) and len(np.unique(np.concatenate([owners[k] for k in rare]))) < least:
            rare = by_size[: len(rare) + 1]
    elif len(rare) == len(parts):
        _check_enough(int(sizes.max()), least, f"alpha={alpha:g} of a label")
    found = np.full(len(parts), np.inf)
    if pool and rare:
        found[rare] = limit(np.concatenate([parts[k] for k in rare]), alpha, np.concatenate([owners[k] for k in rare]))
    for k in by_size[len(rare) :]:
        found[k] = limit(parts[k], alpha, owners[k])
    return found


def mean_risk(losses: ArrayLike, groups: ArrayLike | None = None) -> tuple[np.ndarray, int]:
    """Mean losses (cuts,) over images, or over patients of the means over their images, and how many these are.

    Args:
        losses: (images, cuts) of each calibration image, such as `overlap.false_negative_rates`.
        groups: (images,) patient of each image; None: one image a patient.
    """
    losses = float64(losses)
    weights, num = _weights(groups, len(losses))
    return weights @ losses / num, num


def risk_cut(risk: ArrayLike, num: int, alpha: float) -> int:
    """Which of some cuts, from safe to bold, is the boldest whose mean loss on a new image is at most alpha.

    Conformal risk control: the last cut with `(n R + 1) / (n + 1) <= alpha`. The guarantee is a mean over calibration
    sets and new images, for losses in 0..1 that do not fall from one cut to the next.

    Args:
        risk: (cuts,) the mean losses R, see `mean_risk`: 0 at the first. The cuts were chosen without these images.
        num: the number n of calibration images (patients).
        alpha: the risk, between 0 and 1.

    Returns:
        The position of the cut.

    Raises:
        ValueError: mean losses outside 0..1, or that fall; too few calibration images: how many are needed.

    Reference: Angelopoulos, Bates, Fisch, Lei and Schuster (2024), "Conformal risk control", equation 4, theorem 1.
    """
    risk = float64(risk)
    _check_enough(num, needed(alpha), f"alpha={alpha:g}")
    if risk.ndim != 1 or (np.diff(risk) < -ROUNDING).any() or risk[0] or risk[-1] > 1 + ROUNDING:
        raise ValueError(
            "Expected mean losses (cuts,) that are 0 at the first cut, do not fall and are at most 1. "
            f"Received: shape {risk.shape}, values from {risk.min()} to {risk.max()}"
        )
    return int(np.flatnonzero(num * risk + 1 <= alpha * (num + 1) + ROUNDING)[-1])


def needed_to_refer(rate: float, confidence: float = 0.9) -> int:
    """The fewest calibration images (patients) that, without one error among them, are evidence of a rate of errors.

    `ln(1 - confidence) / ln(1 - rate)`, rounded up: 45 for a rate of 0.05 with confidence 0.9.
    """
    _check_between("rate", rate)
    _check_between("confidence", confidence)
    return math.ceil(math.log(1 - confidence) / math.log(1 - rate) - ROUNDING)


def refer_limit(uncertainty: ArrayLike, errors: ArrayLike, rate: float, confidence: float = 0.9) -> float:
    """The limit of the uncertainty below which the error rate of new images is at most `rate`; the others are referred.

    It keeps as much as it can: of the shares 10 %, 20 %, ... 100 % of the calibration images, those that could pass
    are tested, each against an error rate above `rate` by its binomial tail, all of them together at the level
    `1 - confidence` (Bonferroni). So with probability >= confidence over calibration sets the rate holds.

    Args:
        uncertainty: (images,) of each calibration image, one image a patient: see `one_of_each`.
        errors: (images,), 0 or 1.
        rate: of errors among what is kept, between 0 and 1.
        confidence: between 0 and 1.

    Returns:
        Images whose uncertainty is below it are kept. Infinity keeps all; minus infinity none: no share passed.

    Raises:
        ValueError: errors other than 0 and 1; too few calibration images: how many are needed.

    References: Geifman and El-Yaniv (2017), "Selective classification", section 3; Angelopoulos et al. (2021), "Learn
        then test". Given the limit, an order statistic, the images below it are independent draws.
    """
    from scipy.stats import binom

    uncertainty, errors = risk_pair(uncertainty, errors)
    if not np.isin(errors, (0, 1)).all():
        raise ValueError(f"Expected errors, 0 or 1. Received: values from {errors.min()} to {errors.max()}")
    num, fails, best = len(errors), 1 - confidence, -math.inf
    _check_enough(num, needed_to_refer(rate, confidence), f"rate={rate:g} with confidence {confidence:g}")
    counts = [num * share // 10 for share in range(1, 11)]
    while len(counts) > 1 and (1 - rate) ** counts[0] > fails / len(counts):
        counts = counts[1:]
    ranked = np.append(np.sort(uncertainty), math.inf)
    for at in ranked[counts]:
        kept = errors[uncertainty < at]
        if binom.cdf(kept.sum(), len(kept), rate) <= fails / len(counts):
            best = max(best, float(at))
    return best


def one_of_each(groups: ArrayLike, seed: int = 0) -> np.ndarray:
    """Positions of one image of each patient, by chance, (patients,), sorted: these images are exchangeable."""
    groups = np.asarray(groups)
    order = np.random.default_rng(check_seed(seed)).permutation(len(groups))
    return np.sort(order[np.unique(groups[order], return_index=True)[1]])


def _weights(groups, num):
    """1 over the number of images of its patient for each image, and the number of patients."""
    if groups is None:
        return np.ones(num), num
    if len(groups) != num:
        raise ValueError(f"Expected groups, the patients of {num} images. Received: {len(groups)}")
    _, owner, count = np.unique(np.asarray(groups), return_inverse=True, return_counts=True)
    return 1 / count[owner], len(count)


def _check_enough(num, least, what):
    if num < least:
        raise ValueError(
            f"Expected {least} or more calibration images (or patients, where known) for {what}. Received: {num}.\n"
            "Take a higher value, or put more images into validation."
        )


def _check_between(name, value):
    if not is_number(value) or not 0 < value < 1:
        raise ValueError(f"Expected {name} between 0 and 1. Received: {name}={value!r}")
