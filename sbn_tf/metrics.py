# ---
# jupyter:
#   jupytext:
#     text_representation:
#       extension: .py
#       format_name: percent
#       format_version: '1.3'
#       jupytext_version: 1.19.6
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # Metrics: what is a prediction worth?
#
# **A number means little until you know what a predictor that never looks at an image would score: each metric here
# comes with the question that it answers, a case worked by hand, and what it hides.**
#
# Medical labels are rare and lesions are small, so "nothing there" is nearly always right. Raters disagree, so there is
# no single truth to agree with. Both make the usual numbers flattering; the paper's Table 1 is an example (section 9).
#
# - *You will see*: log score and Brier score, calibration, ranking, entropies, overlap of masks, distances between sets
#   of masks, risk-coverage curves, and the paper's own metrics; four pictures of traps.
# - *Words*: an *event* is one label of one image, or one pixel; its *target* is 1 where it is so (*positive*), else 0.
#   The *prevalence* is the share of positives; as a predictor, that of the training set. *Log odds* of $p$ are $\ln p -
#   \ln (1 - p)$; a network gives them as *logits*. A *posterior sample* is the prediction of one network drawn from a
#   Bayesian one. *Nats* are units of the natural logarithm. More words: [glossary](../../docs/glossary.md).
# - *You need*: probabilities and averages.
# - *Runs in*: 20 seconds (CPU), most of it start-up.
#
# At a first reading take sections 2, 3, 5 and 7, and the table of section 10.

# %% tags=["active-ipynb"]
# import os
#
# os.environ["TF_CPP_MIN_LOG_LEVEL"] = "3"  # TensorFlow's start-up messages are no part of the lesson

# %%
"""Metrics: what a method's probabilities are worth, and beside them what the paper measured.

The contract: a method gives probabilities with the posterior samples on axis 0 (a deterministic network
gives one sample); `sbn_tf.experiments.scoring` computes every metric of them at once.

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

Everything here is plain numpy and scipy in float64; scikit-learn is imported where it is used. Probabilities
outside 0..1 (but for rounding), NaN, empty arrays and shapes that do not fit are refused. NaN is returned where
a docstring says so, and only there.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike
from scipy import ndimage, optimize
from scipy.special import entr

from sbn_tf.datasets.arrays import DiskArray
from sbn_tf.datasets.base import BINARY, EXCLUSIVE, MULTI_CLASS, MULTI_LABEL, ORDINAL, SEGMENTATION, TASKS

# %% [markdown]
# What the lesson defines, and two numbers that several metrics share.

# %%
__all__ = [
    "METRICS",
    "TASKS",
    "Metric",
    "accuracy",
    "area_under_risk_coverage",
    "auc_per_label",
    "average_precision_per_label",
    "binary_entropy",
    "brier",
    "brier_decomposition",
    "brier_skill",
    "dice",
    "dice_raters",
    "disagreement",
    "ece",
    "error_auroc",
    "excess_area",
    "generalised_energy_distance",
    "hausdorff95",
    "hungarian_iou",
    "iou",
    "majority_mask",
    "nll",
    "paper_accuracy",
    "paper_brier",
    "paper_dice",
    "paper_ece",
    "paper_entropy",
    "paper_iou",
    "risk_coverage",
    "uncertainty",
]

# A log score is infinite for one certain and wrong prediction; clipped here, that costs 16.1 nats.
LOG_CLIP = 1e-7
# Float32 probabilities of classes sum to 1 within a tenth of this; those in half precision within five of its steps.
SUM_TOLERANCE = 1e-4

# %% tags=["active-ipynb"]
# import matplotlib.pyplot as plt
#
# plt.rcParams |= {"figure.dpi": 72, "axes.spines.top": False, "axes.spines.right": False, "font.size": 9}
# rng = np.random.default_rng(0)
#
#
# def refused(function, *values):
#     try:
#         function(*values)
#     except ValueError as error:
#         print(error)

# %% [markdown]
# ## 1. What comes in?
#
# Probabilities, never logits, with the posterior samples on axis 0; a deterministic network gives one sample. The
# prediction is their mean over samples. Some scores accept *soft* targets, the mean of several raters. Where a score is
# linear in the target, as `nll`, that gives its expectation over a rater drawn at random; `brier` is not, and lacks the
# raters' own variance (exercise 2).
#
# A NaN in a table hides a mistake, so what cannot be scored is refused here, in the functions that all others call.


# %%
def _float64(values) -> np.ndarray:
    return np.asarray(values).astype("float64", copy=False)


def _check_range(values, name="probabilities") -> np.ndarray:
    """The values, if all are in 0..1, what rounding left above 1 cut off; empty arrays pass."""
    if values.size == 0:
        return values
    low, high = float(values.min()), float(values.max())
    if not (low >= 0 and high <= 1 + 1e-6):  # NaN fails both
        raise ValueError(f"Expected {name} in 0..1, none of them NaN. Received: min={low}, max={high}")
    return np.minimum(values, 1) if high > 1 else values


def _pair(predicted, targets) -> tuple[np.ndarray, np.ndarray]:
    predicted, targets = _float64(predicted), _float64(targets)
    if predicted.shape != targets.shape or predicted.size == 0:
        raise ValueError(
            f"Expected predictions and targets of one shape, not empty. Received: {predicted.shape} and {targets.shape}"
        )
    return _check_range(predicted), _check_range(targets, "targets")


# %% [markdown]
# Masks have a shape of their own, and a prevalence may come once for all images.


# %%
def _image_pair(predicted, truth) -> tuple[np.ndarray, np.ndarray]:
    predicted, truth = _pair(predicted, truth)
    if predicted.ndim != 3:
        raise ValueError(f"Expected masks of shape (batch, height, width). Received: shape {predicted.shape}")
    return predicted, truth


def _broadcast(values, shape, name):
    try:
        return np.broadcast_to(_float64(values), shape)
    except ValueError as error:
        raise ValueError(
            f"Expected {name} to fit predictions of shape {shape}. Received: shape {np.shape(values)}"
        ) from error


# %% tags=["active-ipynb"]
# refused(_pair, [0.2, 3.1], [0, 1])
# refused(_pair, [0.2, np.nan], [0, 1])
# refused(_pair, [[0.2, 0.3]], [0, 1])
# assert _pair([0.2, 1 + 1e-7], [0, 1])[0].max() == 1  # the mean of float32 probabilities may round above 1

# %% [markdown]
# Sets of masks and classes have a stricter contract: 0/1 masks of several raters, some of them fillers, or one-hot
# classes whose probabilities sum to 1.

# %%
_TARGETS = {BINARY: "(batch, 1)", SEGMENTATION: "(batch, height, width, raters)"}
_TARGETS |= dict.fromkeys(EXCLUSIVE, "(batch, classes), one-hot")


def _check_targets(targets, task) -> np.ndarray:
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


# %% [markdown]
# Not every image has all raters. A missing one's place holds a *filler* mask, and `rater_valid` says which masks are
# real.


# %%
def _check_valid(rater_valid, masks) -> np.ndarray:
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


def _drop_channel(probs) -> np.ndarray:
    if probs.ndim == 5 and probs.shape[-1] == 1:
        return probs[..., 0]
    return probs


# %% [markdown]
# The checks above together are the contract of all functions that take samples and a task.


# %%
def _check(probs, targets, task, rater_valid) -> tuple[np.ndarray, np.ndarray, np.ndarray | None]:
    targets, probs = _check_targets(targets, task), np.asarray(probs)
    if task != SEGMENTATION and rater_valid is not None:
        raise ValueError(f"Expected rater_valid=None, as {task} targets have no raters. Received: an array")
    if task == SEGMENTATION:
        probs = _drop_channel(probs)
    batch_shape = targets.shape[:-1] if task == SEGMENTATION else targets.shape
    if probs.ndim != 1 + len(batch_shape) or probs.shape[1:] != batch_shape or probs.shape[0] == 0:
        raise ValueError(
            f"Expected probs of shape (samples, {', '.join(map(str, batch_shape))}), as the targets (one sample: "
            f"probs[None]). Received: probs.shape={probs.shape}"
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


# %% [markdown]
# ## 2. How good are the probabilities?
#
# For one event with probability $p$ and outcome $y \in \{0, 1\}$:
#
# $$\mathrm{NLL} = -y \ln p - (1 - y) \ln (1 - p), \qquad \mathrm{Brier} = (p - y)^2.$$
#
# Both are *proper*: on average nothing beats saying what you believe (Gneiting and Raftery 2007). By hand: $p = 0.8$
# and the event happens, $-\ln 0.8 = 0.223$ nats and $0.2^2 = 0.04$; it does not, $-\ln 0.2 = 1.609$ and $0.8^2 = 0.64$.
# The log score has no upper end: one certain mistake outweighs a thousand good predictions.


# %%
def nll(mean_probs: ArrayLike, targets: ArrayLike) -> float:
    """Negative log likelihood, `-y ln p - (1 - y) ln(1 - p)`, in nats per label or pixel.

    Args:
        mean_probs: any shape, probabilities of 1; clipped to [1e-7, 1 - 1e-7] inside the logarithms.
        targets: same shape, in 0..1; a soft target (the mean of raters) gives the expectation over raters.
    """
    return float(_nll(*_pair(mean_probs, targets)).mean())


def _nll(probs, targets):
    probs = np.clip(probs, LOG_CLIP, 1 - LOG_CLIP)
    return -(targets * np.log(probs) + (1 - targets) * np.log1p(-probs))


# %% [markdown]
# The Brier score asks for nothing but a mean of squares. Against a soft target the raters' own variance is missing;
# `_soft_brier` adds it.


# %%
def brier(mean_probs: ArrayLike, targets: ArrayLike) -> float:
    """Brier score, `(p - y)^2`, mean over labels or pixels (Brier 1950, for one of the two classes).

    Args:
        mean_probs: any shape, probabilities of 1.
        targets: same shape, in 0..1. A soft target counts as its mean, without the raters' own variance
            (`evaluate` adds it).
    """
    return float(np.square(np.subtract(*_pair(mean_probs, targets))).mean())


def _soft_brier(probs, soft):
    # The mean over raters of (p - y)^2, of which y (1 - y) is the raters' own variance.
    return np.square(probs - soft) + soft * (1 - soft)


# %% tags=["active-ipynb"]
# for outcome in (1, 0):
#     print(f"p = 0.8, y = {outcome}: NLL {nll([0.8], [outcome]):.3f}, Brier {brier([0.8], [outcome]):.2f}")
# certain = np.r_[np.zeros(999), 0.0], np.r_[np.zeros(999), 1.0]  # 1,000 certain predictions, one of them wrong
# print(f"one certain mistake in 1,000: NLL {nll(*certain):.4f}, Brier {brier(*certain):.4f}")

# %% [markdown]
# Proper means: whatever the true frequency, the best constant is that frequency.

# %% tags=["active-ipynb"]
# truth = (np.arange(100) < 30).astype(float)  # 30 % positive
# constants = np.linspace(0.01, 0.99, 99)
# for score in (nll, brier):
#     best = constants[np.argmin([score(np.full(100, c), truth) for c in constants])]
#     print(f"{score.__name__}: best constant {best:.2f}")
#     assert np.isclose(best, 0.3)

# %% [markdown]
# ### Is that better than never looking?
#
# $$\text{Brier skill} = 1 - \frac{\text{Brier}}{\text{Brier of the training prevalence}}$$
#
# *Source*: Murphy (1988), with the training prevalence as what is to be beaten. 0 is what the prevalence scores, 1 is
# perfect.


# %%
def brier_skill(mean_probs: ArrayLike, targets: ArrayLike, train_prevalence: ArrayLike) -> float:
    """`1 - brier / brier of the training prevalence`: 1 is perfect, 0 no better than never looking, below it worse.

    Args:
        mean_probs: any shape, probabilities of 1.
        targets: same shape, in 0..1; soft targets as in `brier`.
        train_prevalence: training frequency of 1, of a shape that broadcasts to them: (labels,) or (height, width).

    Returns:
        A float; NaN where the prevalence predicts these targets without error, so that nothing can be gained.
    """
    reference = brier(_broadcast(train_prevalence, np.shape(targets), "train_prevalence"), targets)
    return 1 - brier(mean_probs, targets) / reference if reference > 0 else float("nan")


# %% [markdown]
# Accuracy cuts the probability at one half and counts. It has no such zero built in.


# %%
def accuracy(mean_probs: ArrayLike, labels: ArrayLike) -> float:
    """Fraction of labels for which `p > 0.5` equals the label; with rare labels, 1 - prevalence is free."""
    mean_probs, labels = _pair(mean_probs, labels)
    return float(((mean_probs > 0.5) == (labels > 0.5)).mean())


# %% [markdown]
# **Trap 1: accuracy of rare findings.** The published counts of the fourteen findings in NIH ChestX-ray14, whose images
# are ChestMNIST's. "No finding", for everyone, about everything:

# %% tags=["active-ipynb"]
# FINDINGS = {"infiltration": 19894, "effusion": 13317, "atelectasis": 11559, "nodule": 6331, "mass": 5782,
#             "pneumothorax": 5302, "consolidation": 4667, "pleural": 3385, "cardiomegaly": 2776, "emphysema": 2516,
#             "edema": 2303, "fibrosis": 1686, "pneumonia": 1431, "hernia": 227}
# frequency = np.array(list(FINDINGS.values())) / 112_120
# findings = (np.arange(10_000)[:, None] < np.round(1e4 * frequency)).astype(float)  # 10,000 images of that prevalence
# nothing = np.zeros_like(findings)
# skill = brier_skill(nothing, findings, findings.mean(0))
# print(f"accuracy {accuracy(nothing, findings):.3f}, Brier skill {skill:.3f}")
# assert accuracy(nothing, findings) > 0.936  # the best row of the paper's Table 1, an ensemble

# %% tags=["active-ipynb", "nbval-ignore-output"]
# figure, ax = plt.subplots(figsize=(7, 3), layout="constrained")
# ax.barh(list(FINDINGS), 1 - frequency, color="0.75")
# ax.axvline(0.936, color="tab:red", label="the paper's best row, mean (0.936)")
# ax.axvline(1 - frequency.mean(), color="black", linestyle="--", label="saying no, mean (0.948)")
# ax.set(xlim=(0.8, 1), xlabel="accuracy of saying no", title="A predictor that never looks is 95 % accurate")
# ax.invert_yaxis()
# ax.legend(loc="lower left", fontsize=8)
# plt.show()

# %% [markdown]
# *Reading*: the rarer the finding, the more accurate it is to deny it. No row of Table 1 reaches the dashed line. Brier
# skill sees through it: below 0, since a certain "no" is worse than the prevalence.
#
# > **Misconception: "93 % accurate is good."** With rare labels accuracy is mostly the share of negatives: never
# > looking has 1 - prevalence, here 0.948. Only the distance from that number says anything. For ranking ask AUC
# > and average precision (section 4), for the probabilities Brier skill.

# %% [markdown]
# ## 3. Do the probabilities mean what they say?
#
# Of all cases with $p \approx 0.3$, three in ten should be positive. The expected calibration error (Guo et al. 2017)
# puts the predictions in bins and averages the gap:
#
# $$\mathrm{ECE} = \sum_k \frac{n_k}{n} \left| \bar p_k - \bar y_k \right|.$$
#
# By hand, two bins: $p = 0.1, 0.2$ with no positive, $p = 0.7, 0.8$ with one. The gaps are $0.15 - 0$ and
# $0.75 - 0.5$, so $\mathrm{ECE} = (0.15 + 0.25) / 2 = 0.2$. With rare labels nearly all values crowd the first bin of
# equal *width*; bins of equal *mass* look closer at where the values are.


# %%
def _check_bins(num_bins):
    if isinstance(num_bins, bool) or num_bins != int(num_bins) or num_bins < 1:
        raise ValueError(f"Expected num_bins to be a whole number, 1 or more. Received: num_bins={num_bins!r}")
    return int(num_bins)


def _bin_index(probs, num_bins, binning):
    if binning == "width":
        return np.minimum((probs * num_bins).astype(int), num_bins - 1)
    if binning != "mass":
        raise ValueError(f'Expected binning "width" or "mass". Received: binning={binning!r}')
    # The bin of a value is that of its mean rank, so equal values share one whatever their order.
    _, group, count = np.unique(probs, return_inverse=True, return_counts=True)
    rank = np.cumsum(count) - count / 2
    return np.minimum((rank * num_bins / len(probs)).astype(int), num_bins - 1)[group]


def _calibration_bins(probs, targets, num_bins, binning="width"):
    """(3, num_bins): count, sum of probabilities, sum of targets."""
    probs, targets = probs.ravel(), targets.ravel()
    index = _bin_index(probs, _check_bins(num_bins), binning)
    return np.stack([np.bincount(index, weights, num_bins) for weights in (None, probs, targets)])


def _ece_of_bins(bins):
    count, probs, targets = bins
    return float(np.abs(probs - targets).sum() / count.sum())


# %% [markdown]
# From the bins to the number. `per_label` asks each label on its own: over- and underconfident labels cannot cancel.


# %%
def ece(
    mean_probs: ArrayLike, targets: ArrayLike, num_bins: int = 15, per_label: bool = False, binning: str = "width"
) -> float | np.ndarray:
    """Expected calibration error of the probability of 1.

    `sum over bins of n_bin / n * |mean p - mean y|`. Each label or pixel is a binary event of its own, so p
    is the probability of 1 and not, as in multi-class use, that of the predicted class.

    Args:
        mean_probs: any shape, probabilities of 1; p = 1 belongs to the last bin.
        targets: same shape, in 0..1.
        num_bins: number of bins.
        per_label: give one value for each index of the last of two or more axes, instead of pooling all.
        binning: "width" (bins of equal width over [0, 1]) or "mass" (of equally many values; equal values
            stay together, so the order of images does not matter).

    Returns:
        A float, or (labels,) float64.

    Reference: Guo et al. 2017, "On Calibration of Modern Neural Networks", equation 3; Nixon et al. 2019,
        "Measuring Calibration in Deep Learning" (equal mass).
    """
    mean_probs, targets = _pair(mean_probs, targets)
    if per_label:
        if mean_probs.ndim < 2:
            raise ValueError(f"Expected (..., labels) with per_label=True. Received: shape {mean_probs.shape}")
        columns = range(mean_probs.shape[-1])
        return np.array([ece(mean_probs[..., i], targets[..., i], num_bins, False, binning) for i in columns])
    return _ece_of_bins(_calibration_bins(mean_probs, targets, num_bins, binning))


# %% tags=["active-ipynb"]
# p, y = [0.1, 0.2, 0.7, 0.8], [0, 0, 1, 0]
# print(f"ECE {ece(p, y, num_bins=2):.2f}")
# assert np.isclose(ece(p, y, num_bins=2), ece(p, y, num_bins=2, binning="mass"))
# assert np.isclose(ece(p, y, num_bins=1), abs(np.mean(p) - np.mean(y)))  # one bin: the difference of the means

# %% [markdown]
# ### What is a Brier score made of?
#
# Murphy (1973): how far the bins are from the diagonal, less how far they are told apart, plus what nobody can remove:
#
# $$\mathrm{Brier} = \underbrace{\sum_k \tfrac{n_k}{n} (\bar p_k - \bar y_k)^2}_{\text{reliability}}
# - \underbrace{\sum_k \tfrac{n_k}{n} (\bar y_k - \bar y)^2}_{\text{resolution}}
# + \underbrace{\bar y (1 - \bar y)}_{\text{uncertainty}}
# + \underbrace{\sum_k \tfrac{n_k}{n} \left( \mathrm{var}_k(p) - 2\, \mathrm{cov}_k(p, y) \right)}_{\text{within}}$$
#
# The last term (Stephenson et al. 2008) makes it exact where a bin holds several values of $p$.


# %%
def brier_decomposition(mean_probs: ArrayLike, targets: ArrayLike, num_bins: int = 15) -> dict[str, float]:
    """The Brier score as `reliability - resolution + uncertainty + within`, exactly, over equal-width bins.

    "reliability": squared distance of a bin's mean probability and its frequency of 1 (0: calibrated).
    "resolution": variance of the bins' frequencies (how far the bins are told apart; more is better).
    "uncertainty": variance of the targets, for 0/1 `q (1 - q)`: the Brier score of their own frequency q.
    "within": variance of p within bins less twice its covariance with y; 0 if each bin has one p.

    Args:
        mean_probs: any shape, probabilities of 1.
        targets: same shape, in 0..1.
        num_bins: number of bins over [0, 1].

    Reference: Murphy 1973, "A New Vector Partition of the Probability Score"; Stephenson, Coelho and Jolliffe
        2008, "Two Extra Components in the Brier Score Decomposition", equation 6.
    """
    p, y = (values.ravel() for values in _pair(mean_probs, targets))
    index = _bin_index(p, _check_bins(num_bins), "width")
    count = np.bincount(index)
    weight, filled = count / len(p), np.maximum(count, 1)

    def bin_means(values):
        return np.bincount(index, values) / filled

    p_bin, y_bin = bin_means(p), bin_means(y)
    inside_p, inside_y = p - p_bin[index], y - y_bin[index]
    return {
        "reliability": float((weight * np.square(p_bin - y_bin)).sum()),
        "resolution": float((weight * np.square(y_bin - y.mean())).sum()),
        "uncertainty": float(y.var()),
        "within": float((inside_p**2 - 2 * inside_p * inside_y).mean()),
    }


# %% tags=["active-ipynb"]
# p, y = [0.25] * 4 + [0.75] * 4, [0, 0, 1, 0, 1, 1, 1, 1]  # frequencies 1/4 and 1, of all 5/8
# parts = brier_decomposition(p, y)
# print({key: round(value, 4) for key, value in parts.items()}, "Brier", round(brier(p, y), 4))
# assert np.isclose(parts["reliability"], 0.5 * 0.25**2) and np.isclose(parts["resolution"], (3 / 8) ** 2)
# assert np.isclose(parts["reliability"] - parts["resolution"] + parts["uncertainty"] + parts["within"], brier(p, y))

# %% [markdown]
# **Trap 2: calibration is not skill.** Three predictors of 20,000 events: one that knows each event's true probability,
# the same made overconfident (its log odds doubled), and the prevalence for everyone.

# %% tags=["active-ipynb"]
# true_probs = rng.beta(0.7, 3, 20_000)
# events = (rng.random(20_000) < true_probs).astype(float)
# odds = (true_probs / (1 - true_probs)) ** 2
# predictors = {
#     "knows": true_probs,
#     "overconfident": odds / (1 + odds),
#     "prevalence": np.full(20_000, events.mean()),
# }

# %% [markdown]
# AUC, the last column, comes from section 4: the probability that a positive ranks above a negative.


# %%
def _per_label(function, mean_probs, labels):
    mean_probs, labels = _pair(mean_probs, labels)
    if labels.ndim != 2:
        raise ValueError(f"Expected mean_probs and labels (batch, labels). Received: shape {labels.shape}")
    if (soft := labels[(labels != 0) & (labels != 1)]).size:
        raise ValueError(f"Expected labels to be 0 or 1. Received: {soft[0]:g}; cut soft labels first.")
    scores = np.full(labels.shape[1], np.nan)
    for index in range(labels.shape[1]):
        if 0 < labels[:, index].sum() < len(labels):
            scores[index] = function(labels[:, index], mean_probs[:, index])
    return scores


def auc_per_label(mean_probs: ArrayLike, labels: ArrayLike) -> np.ndarray:
    """Area under the ROC curve of each label, (labels,); NaN where the labels are all 0 or all 1.

    Args:
        mean_probs: (batch, labels).
        labels: (batch, labels), 0 or 1.
    """
    from sklearn.metrics import roc_auc_score

    return _per_label(roc_auc_score, mean_probs, labels)


# %% tags=["active-ipynb"]
# print(f"{'':<14}{'ECE':>7}{'Brier':>8}{'skill':>7}{'reliability':>13}{'resolution':>12}{'AUC':>6}")
# for name, p in predictors.items():
#     parts, auc = brier_decomposition(p, events), auc_per_label(p[:, None], events[:, None])[0]
#     print(f"{name:<14}{ece(p, events):>7.3f}{brier(p, events):>8.3f}{brier_skill(p, events, events.mean()):>7.2f}"
#           f"{parts['reliability']:>13.4f}{parts['resolution']:>12.4f}{auc:>6.2f}")
# assert ece(predictors["prevalence"], events) < 1e-9 < ece(predictors["knows"], events)

# %% tags=["active-ipynb", "nbval-ignore-output"]
# figure, axes = plt.subplots(2, 2, figsize=(7, 4), sharex=True, height_ratios=(3, 1), layout="constrained")
# for (name, p), column in zip(list(predictors.items())[:2], axes.T, strict=True):
#     count, sum_p, sum_y = _calibration_bins(p, events, 15)
#     filled = count > 0
#     column[0].plot([0, 1], [0, 1], color="0.6", linewidth=1)
#     column[0].plot(sum_p[filled] / count[filled], sum_y[filled] / count[filled], "o-", color="tab:blue", markersize=4)
#     column[0].set(title=f"{name}: ECE {ece(p, events):.3f}", aspect="auto")
#     column[1].bar((np.arange(15) + 0.5) / 15, count, 0.06, color="0.6")
#     column[1].set(yscale="log", xlabel="predicted probability")
# axes[0, 0].set_ylabel("observed frequency")
# axes[1, 0].set_ylabel("count")
# plt.show()

# %% [markdown]
# *Reading*: below the diagonal at the right and above it at the left is overconfidence. The bars count the values in
# each bin: a point over a low bar is mostly noise.
#
# > **Misconception: "well calibrated is good."** The prevalence would be one point on the diagonal: a perfect ECE, and
# > no resolution, no skill, no ranking. Calibration is one part of a proper score, and the part that never looking has
# > for nothing.

# %% [markdown]
# ## 4. Does it rank the sick above the well?
#
# AUC, the area under the ROC curve (positives found against false alarms, at every cut), is the probability that a
# random positive $p_+$ scores higher than a random negative $p_-$ (Hanley and McNeil 1982); 0.5 is chance:
#
# $$\mathrm{AUC} = \mathbb{P}(p_+ > p_-) + \tfrac12\, \mathbb{P}(p_+ = p_-).$$
#
# It needs both: a label that is all 0 in the test split has none, and is returned as NaN so that a mean can leave it
# out *and say how many labels it is of*. By hand: positives 0.8 and 0.3, negatives 0.5 and 0.1. Of four pairs three are
# in order: 0.75.
#
# Average precision is the mean, over the positives, of the share of positives among all that score at least as high:
# $(1 + 2/3)/2 = 0.83$ here. Chance is the prevalence: for hernia 0.002, so 0.1 is then an achievement. Both are
# scikit-learn's; the check below is by hand.


# %%
def average_precision_per_label(mean_probs: ArrayLike, labels: ArrayLike) -> np.ndarray:
    """Average precision of each label, (labels,); NaN where the labels are all 0 or all 1.

    A random ranking scores about the label's prevalence.

    Args:
        mean_probs: (batch, labels).
        labels: (batch, labels), 0 or 1.
    """
    from sklearn.metrics import average_precision_score

    return _per_label(average_precision_score, mean_probs, labels)


# %% tags=["active-ipynb"]
# p, y = np.array([[0.8], [0.3], [0.5], [0.1]]), np.array([[1], [1], [0], [0]])
# print(f"AUC {auc_per_label(p, y)[0]:.2f}, average precision {average_precision_per_label(p, y)[0]:.2f}")
# print("all labels 0:", auc_per_label(p, 0 * y))
# assert auc_per_label(p**9, y) == auc_per_label(p, y)  # only the order counts: AUC says nothing of calibration

# %% [markdown]
# ## 5. How unsure is it, and why?
#
# With samples $p_1, \dots, p_S$ of one probability and the entropy $H$ (of an event
# $-p \ln p - (1 - p) \ln (1 - p)$), the total splits in two (Depeweg et al. 2018):
#
# $$\underbrace{H\!\left(\tfrac{1}{S} \sum_s p_s\right)}_{\text{entropy of expectation}}
# = \underbrace{\tfrac{1}{S} \sum_s H(p_s)}_{\text{expected entropy}}
# + \underbrace{\text{the rest}}_{\text{mutual information}}.$$
#
# Each sample may be unsure (of the data: aleatoric), or the samples may disagree (about the weights: epistemic). By
# hand: samples 0 and 1 have $\ln 2 = 0.693$ in all, and all of it is disagreement; samples 0.5 and 0.5 have the same
# total and no disagreement.


# %%
def binary_entropy(probs: ArrayLike) -> np.ndarray:
    """Entropy of a binary event, `-p ln p - (1 - p) ln(1 - p)`, in nats, elementwise: 0 to ln 2 = 0.693."""
    probs = _check_range(_float64(probs))
    return entr(probs) + entr(1 - probs)


def _class_entropy(probs):
    return entr(probs).sum(-1)


# %% [markdown]
# The split in code: the entropy of the mean, the mean of the entropies, and what is left.


# %%
def uncertainty(probs: ArrayLike, task: str = MULTI_LABEL) -> dict[str, np.ndarray]:
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
    probs, entropy = _check_range(_float64(probs)), _class_entropy if task in EXCLUSIVE else binary_entropy
    if probs.ndim == 0 or len(probs) == 0:
        raise ValueError(f"Expected probs of shape (samples, ...), one sample or more. Received: shape {probs.shape}")
    mean_probs = probs.mean(0)
    total, expected = entropy(mean_probs), entropy(probs).mean(0)
    return {
        "mean_probs": mean_probs,
        "entropy": total,
        "expected_entropy": expected,
        "mutual_information": total - expected,
    }


# %% tags=["active-ipynb"]
# for samples in ([0.0, 1.0], [0.5, 0.5], [0.1, 0.5]):
#     parts = uncertainty(np.array(samples)[:, None])
#     total, expected, mutual = (parts[key].item() for key in ("entropy", "expected_entropy", "mutual_information"))
#     print(f"samples {samples}: entropy {total:.3f} = expected {expected:.3f} + mutual information {mutual:.3f}")
#     assert np.isclose(total, expected + mutual)

# %% [markdown]
# With one sample the mutual information is 0: a deterministic network cannot report it.
#
# > **Misconception: "low entropy is good calibration."** Entropy is a statement about the prediction alone: the
# > labels do not occur in it. In section 9, by the paper's entropy and the calibration error that it names, the
# > answer "no finding" has the lowest entropy, 0, and an error of 0.052; the prevalence has 1.88 nats, and 0.000. A
# > low entropy is a merit only where the prediction is right (section 8).

# %% [markdown]
# ## 6. Do the masks overlap?
#
# $$\mathrm{Dice} = \frac{2 |A \cap B|}{|A| + |B|}, \qquad \mathrm{IoU} = \frac{|A \cap B|}{|A \cup B|}
# = \frac{\mathrm{Dice}}{2 - \mathrm{Dice}}.$$
#
# *Source*: Taha and Hanbury (2015). IoU is the intersection over the union, $A$ and $B$ are the pixels that the two
# masks mark. Of the foreground, for each image, then the mean over images. By hand: $A = 1100$, $B = 0111$: one pixel
# in both, four in either: IoU 1/4, Dice 2/5. Two empty masks agree: 1.


# %%
def _overlap(predicted, truth):
    predicted, truth = (values > 0.5 for values in _image_pair(predicted, truth))
    return (predicted & truth).sum((1, 2)), predicted.sum((1, 2)) + truth.sum((1, 2))


def dice(predicted: ArrayLike, truth: ArrayLike) -> np.ndarray:
    """Dice of the foreground, `2 |A and B| / (|A| + |B|)`, for each image; 1 if both masks are empty.

    Args:
        predicted: (batch, height, width), bool or 0/1.
        truth: the same.

    Returns:
        (batch,) float64.
    """
    both, total = _overlap(predicted, truth)
    return np.where(total > 0, 2 * both / np.maximum(total, 1), 1.0)


# %% [markdown]
# IoU from the same two counts: what is in either mask is the sum of both less what is in both.


# %%
def iou(predicted: ArrayLike, truth: ArrayLike) -> np.ndarray:
    """Intersection over union of the foreground, `|A and B| / |A or B|`, for each image; 1 if both are empty.

    Args:
        predicted: (batch, height, width), bool or 0/1.
        truth: the same.

    Returns:
        (batch,) float64.
    """
    both, total = _overlap(predicted, truth)
    return np.where(total > 0, both / np.maximum(total - both, 1), 1.0)


# %% tags=["active-ipynb"]
# a, b = np.array([[[1, 1, 0, 0]], [[0, 0, 0, 0]]]), np.array([[[0, 1, 1, 1]], [[0, 0, 0, 0]]])
# print("Dice", dice(a, b), "IoU", iou(a, b))
# assert np.allclose(iou(a, b), dice(a, b) / (2 - dice(a, b)))

# %% [markdown]
# ### How far apart are the outlines?
#
# Overlap hides *where* the masks differ: a thin rim around a large lesion costs little, and may be a centimetre. HD95,
# the 95th percentile of the Hausdorff distance, is a distance in pixels between the outlines $\partial A$, $\partial B$
# (Huttenlocher et al. 1993; Taha and Hanbury 2015):
#
# $$\mathrm{HD}_{95} = P_{95} \Big( \{ \min_{b \in \partial B} \lVert a - b \rVert : a \in \partial A \} \cup
# \{ \min_{a \in \partial A} \lVert a - b \rVert : b \in \partial B \} \Big).$$
#
# By hand: a square of $3 \times 3$ and the same moved right by 3. Its outline has 8 pixels, at distances 1, 2 or 3 from
# the other square's; at 95 % it is 3.


# %%
def hausdorff95(predicted: ArrayLike, truth: ArrayLike) -> np.ndarray:
    """95th percentile of the distances between the two outlines, in pixels, for each image.

    An outline is the foreground's pixels with a background pixel, or the image's edge, above, below, left or
    right of them. Each has a distance to the nearest pixel of the other outline; those of both directions are
    pooled. The 95th percentile forgives the one stray pixel that decides the plain Hausdorff distance.

    Args:
        predicted: (batch, height, width), bool or 0/1.
        truth: the same.

    Returns:
        (batch,) float64: 0 if both masks are empty; the image's diagonal, more than any distance within it,
        if one of them is.

    Reference: Huttenlocher et al. 1993; Taha and Hanbury 2015, "Metrics for Evaluating 3D Medical Image
        Segmentation".
    """
    predicted, truth = (values > 0.5 for values in _image_pair(predicted, truth))
    return np.array([_hausdorff95(one, other) for one, other in zip(predicted, truth, strict=True)])


def _hausdorff95(one, other):
    if not one.any() or not other.any():
        return 0.0 if one.any() == other.any() else float(np.hypot(*one.shape))
    # Distances between outlines do not change when the empty margin is cut off.
    box = ndimage.find_objects((one | other).astype("uint8"))[0]
    one, other = one[box], other[box]
    one, other = (mask & ~ndimage.binary_erosion(mask) for mask in (one, other))
    pooled = [ndimage.distance_transform_edt(~b)[a] for a, b in ((one, other), (other, one))]
    return float(np.percentile(np.concatenate(pooled), 95))


# %% tags=["active-ipynb"]
# square, moved, speck = np.zeros((3, 1, 12, 12), bool)
# square[0, 2:5, 2:5], moved[0, 2:5, 5:8], speck[0, 11, 11] = True, True, True
# print("moved by 3:", hausdorff95(square, moved), " against nothing:", hausdorff95(square, speck & False).round(2))
# large = np.zeros((1, 40, 40), bool)
# large[0, 10:30, 10:30] = True
# stray = large.copy()
# stray[0, 39, 39] = True  # one wrong pixel far away
# print("one stray pixel:", hausdorff95(stray, large), " Dice:", dice(stray, large).round(3))

# %% [markdown]
# ## 7. Which rater is right?
#
# None. The target is a rater drawn at random, and a score against it is the mean over the raters. Two questions follow:
# how good is *one* mask (Dice against the majority, or against each rater), and do the *sampled* masks vary as the
# raters do? With $s$ the share of raters who mark a pixel, any prediction $p$ has
#
# $$\mathbb{E}\,(p - y)^2 = (p - s)^2 + s (1 - s):$$
#
# the last term is the raters' variance, which no prediction removes.


# %%
def _rater_mean(masks, valid):
    # Counts are exact, so a tie is exactly 0.5.
    return np.einsum("bhwr,br->bhw", _float64(masks), _float64(valid)) / valid.sum(1)[:, None, None]


def _soft_mask(masks, rater_valid) -> np.ndarray:
    masks = _check_targets(np.asarray(masks), SEGMENTATION)
    return _rater_mean(masks, _check_valid(rater_valid, masks))


def majority_mask(masks: ArrayLike, rater_valid: ArrayLike | None = None) -> np.ndarray:
    """Foreground where at least half of the valid raters mark it: a tie (2 of 4) is foreground.

    The 50 % consensus customary for LIDC (Kubota et al. 2011), as `datasets.Split.majority` has it.

    Args:
        masks: (batch, height, width, raters), 0 or 1.
        rater_valid: (batch, raters) bool; None if all are.

    Returns:
        (batch, height, width) bool.
    """
    return _soft_mask(masks, rater_valid) >= 0.5


# %% [markdown]
# Where do the raters disagree, and what does each of them think of one mask?


# %%
def disagreement(masks: ArrayLike, rater_valid: ArrayLike | None = None) -> np.ndarray:
    """The raters' variance at each pixel, `s (1 - s)` of their mean s: 0 if they agree, at most 1/4.

    It is the part of a pixel's Brier score against a random rater that no prediction can remove.

    Args:
        masks: (batch, height, width, raters), 0 or 1.
        rater_valid: (batch, raters) bool; None if all are.

    Returns:
        (batch, height, width) float64; 0 everywhere for an image with one valid rater.
    """
    soft = _soft_mask(masks, rater_valid)
    return soft * (1 - soft)


def dice_raters(predicted: ArrayLike, masks: ArrayLike, rater_valid: ArrayLike | None = None) -> np.ndarray:
    """Dice against each valid rater, their mean, for each image: what a random rater thinks of one mask.

    Args:
        predicted: (batch, height, width), bool or 0/1.
        masks: (batch, height, width, raters), 0 or 1.
        rater_valid: (batch, raters) bool; None if all are.

    Returns:
        (batch,) float64. With one valid rater, the Dice against that one.
    """
    masks = _check_targets(np.asarray(masks), SEGMENTATION)
    valid = _check_valid(rater_valid, masks)
    scores = np.stack([dice(predicted, masks[..., rater]) for rater in range(masks.shape[-1])], 1)
    return (scores * valid).sum(1) / valid.sum(1)


# %% tags=["active-ipynb"]
# raters = np.array([[[[1, 1, 1, 1], [1, 1, 0, 0], [1, 0, 0, 0], [0, 0, 0, 0]]]])  # four pixels, four raters
# print("majority", majority_mask(raters)[0, 0].astype(int), " variance", disagreement(raters)[0, 0])
# print("Dice of the majority against each rater:", dice_raters(majority_mask(raters), raters).round(3))
# three = [[True, True, True, False]]  # the last mask is a filler
# print("three raters: majority", majority_mask(raters, three)[0, 0].astype(int))

# %% [markdown]
# ### Do the samples vary as the raters do?
#
# The *generalised energy distance* (GED; Kohl et al. 2018) between samples $S$ and raters $Y$, with
# $d = 1 - \mathrm{IoU}$; a prime is another one drawn from the same set:
#
# $$2\, \mathbb{E}\, d(S, Y) - \mathbb{E}\, d(S, S') - \mathbb{E}\, d(Y, Y').$$
#
# By hand, two pixels: samples $10, 11$; raters $10, 00$. $\mathbb{E}\, d(S, Y) = (0 + 1 + \tfrac12 + 1)/4$,
# $\mathbb{E}\, d(S, S') = (\tfrac12 + \tfrac12)/4$, $\mathbb{E}\, d(Y, Y') = (1 + 1)/4$: in all
# $1.25 - 0.25 - 0.5 = 0.5$.


# %%
def _mask_rows(probs, masks, valid, index):
    """One image's sampled masks, (samples, pixels), and its valid raters', (raters, pixels): float32 0 and 1."""
    samples = (probs[:, index] > 0.5).reshape(len(probs), -1).astype("float32")
    raters = np.asarray(masks[index])[..., valid[index]].reshape(samples.shape[1], -1).T.astype("float32")
    return samples, raters


def _pairwise_distance(a, b):
    """1 - IoU of each mask of a, (n, pixels), with each of b, (m, pixels): (n, m)."""
    both = (a @ b.T).astype("float64")
    either = a.sum(1)[:, None] + b.sum(1)[None, :] - both
    return np.where(either > 0, 1 - both / np.maximum(either, 1), 0.0)


# %% [markdown]
# Each of the three expectations is a mean over all pairs of masks.


# %%
def generalised_energy_distance(probs: ArrayLike, masks: ArrayLike, rater_valid: ArrayLike | None = None) -> np.ndarray:
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


def _energy_distance(probs, masks, valid):
    distances = np.empty(masks.shape[0])
    for index in range(masks.shape[0]):
        samples, raters = _mask_rows(probs, masks, valid, index)
        cross = _pairwise_distance(samples, raters).mean()
        within = _pairwise_distance(samples, samples).mean() + _pairwise_distance(raters, raters).mean()
        distances[index] = 2 * cross - within
    return distances


# %% [markdown]
# The second answer matches the masks one to one (Hungarian algorithm; Kohl et al. 2019) and takes the mean IoU of the
# pairs. With the masks above: $10$ with $10$ is 1, $11$ with $00$ is 0: one half.


# %%
def hungarian_iou(probs: ArrayLike, masks: ArrayLike, rater_valid: ArrayLike | None = None) -> np.ndarray:
    """Mean IoU of sampled and raters' masks, each paired with one of the other so that the mean is largest.

    Both sets are repeated to their least common multiple first, so a rater's mask finds as many samples as its
    share. Samples are cut at `p > 0.5`; the IoU of two empty masks is 1.

    Args:
        probs: (samples, batch, height, width) or (..., width, 1).
        masks: (batch, height, width, raters), 0 or 1.
        rater_valid: (batch, raters) bool; None if all are.

    Returns:
        (batch,) float64: 1 if the two sets are identical. With one sample, or one rater, the plain mean IoU. It rises
        with the number of samples drawn from one distribution: compare only equal numbers.

    Reference: Kohl et al. 2019, "A Hierarchical Probabilistic U-Net for Modeling Multi-Scale Ambiguities",
        section 3.
    """
    probs, masks, valid = _check(probs, masks, SEGMENTATION, rater_valid)
    return np.array([_matched_iou(*_mask_rows(probs, masks, valid, index)) for index in range(len(masks))])


def _matched_iou(samples, raters):
    distance = _pairwise_distance(samples, raters)
    multiple = np.lcm(*distance.shape)
    distance = distance.repeat(multiple // len(distance), 0).repeat(multiple // distance.shape[1], 1)
    return float(1 - distance[optimize.linear_sum_assignment(distance)].mean())


# %% tags=["active-ipynb"]
# samples, raters = np.array([[[[1, 0]]], [[[1, 1]]]]), np.array([[[[1, 0], [0, 0]]]])
# print("GED", generalised_energy_distance(samples, raters), " matched IoU", hungarian_iou(samples, raters))
# same = np.moveaxis(raters, -1, 0)
# assert generalised_energy_distance(same, raters) == 0 and hungarian_iou(same, raters) == 1

# %% [markdown]
# **Trap 3: GED without any sampling.** Five *level sets* of one probability map, the masks $p > 0.1, 0.3, \dots, 0.9$,
# come from a single deterministic pass. Two toy images: raters who draw the outline tighter or wider, and raters who
# disagree on *which* of two spots it is. The map is the raters' mean, as training on a random rater teaches it. The
# "samples" are five masks of a method that varies the outline too little, but knows that it is one spot or the other.

# %% tags=["active-ipynb"]
# row, column = np.mgrid[:48, :48]
#
#
# def disc(centre, radius):
#     return np.hypot(row - 24, column - centre) < radius
#
#
# toys = {  # name: the raters' masks, five sampled masks
#     "tight or wide": ([disc(24, r) for r in (7, 10, 13, 16)], [disc(24, r) for r in (10.5, 11, 11.5, 12, 12.5)]),
#     "left or right": ([disc(c, 8) for c in (13, 13, 35, 35)], [disc(13 + 22 * (k % 2), 7 + k / 2) for k in range(5)]),
# }

# %% [markdown]
# Each toy's raters against four sets of masks, by both distances.

# %% tags=["active-ipynb"]
# thresholds, ged, matched = np.array([0.1, 0.3, 0.5, 0.7, 0.9]), {}, {}
# for name, (truth, sampled) in toys.items():
#     mean_map, masks = np.mean(truth, 0), np.stack(truth, -1)[None]
#     rows = {
#         "one mask": mean_map[None] > 0.5,
#         "samples": sampled,
#         "level sets": mean_map > thresholds[:, None, None],
#         "the raters": truth,
#     }
#     rows = {key: np.array(values, float)[:, None] for key, values in rows.items()}  # (samples, 1, height, width)
#     ged[name] = {key: generalised_energy_distance(values, masks)[0] for key, values in rows.items()}
#     matched[name] = {key: hungarian_iou(values, masks)[0] for key, values in rows.items()}

# %% tags=["active-ipynb"]
# print(f"{'':<16}" + "".join(f"{key:>12}" for key in rows))
# for name in toys:
#     print(f"{name}, GED  " + "".join(f"{value:>12.3f}" for value in ged[name].values()))
#     print(f"{'  matched IoU':<20}" + "".join(f"{value:>12.3f}" for value in matched[name].values()))
# nested, either = ged.values()
# assert nested["level sets"] < nested["samples"] and either["samples"] < either["level sets"]

# %% tags=["active-ipynb", "nbval-ignore-output"]
# figure, axes = plt.subplots(2, 3, figsize=(7, 4), layout="constrained")
# for (name, (truth, _)), (image, levels, bars) in zip(toys.items(), axes, strict=True):
#     shown = image.imshow(np.mean(truth, 0), cmap="viridis", vmin=0, vmax=1)
#     figure.colorbar(shown, ax=image, shrink=0.8, label="share of raters")
#     image.set(title=name, xticks=[], yticks=[])
#     total = (np.mean(truth, 0) > thresholds[:, None, None]).sum(0)
#     shown = levels.imshow(total, cmap="cividis", vmin=0, vmax=5)
#     figure.colorbar(shown, ax=levels, shrink=0.8, label="of 5 level sets")
#     levels.set(title="level sets", xticks=[], yticks=[])
#     bars.barh(list(ged[name]), list(ged[name].values()), color="0.6")
#     bars.invert_yaxis()
#     bars.set(xlabel="GED (lower is better)")
# plt.show()

# %% [markdown]
# *Reading*: where disagreement is nested, thresholds of one map replay it, and beat samples that vary too little. Where
# it is either-or, the level sets mark both spots or none, which no rater did: samples that choose a side win. So report
# level sets as a row; GED alone does not show that anything was sampled.
#
# GED also falls with the number of samples alone (each set meets itself in its own expectation): compare equal numbers.

# %% [markdown]
# ## 8. Does uncertainty find the mistakes?
#
# Keep the most certain images and refer the rest to a person. *Risk* is what a mistake costs, *coverage* the share of
# images that is kept. The *selective risk* at coverage $k/n$ is the mean risk of the $k$ most certain (Geifman and
# El-Yaniv 2017), with $r_{(i)}$ the risk of the image of the $i$-th least uncertainty:
#
# $$R(k) = \frac1k \sum_{i=1}^{k} r_{(i)}, \qquad \text{area} = \frac1n \sum_{k=1}^{n} R(k).$$
#
# By hand: risks 0, 1, 0, 1 in the order of uncertainty: 0, 1/2, 1/3, 1/2, whose mean, the area, is 0.333. An oracle,
# which knows the risks, would sort them 0, 0, 1, 1 and have 0.208: the *excess* is 0.125 (Geifman et al. 2019).


# %%
def _check_risk(uncertainty, risk) -> tuple[np.ndarray, np.ndarray]:
    uncertainty, risk = _float64(uncertainty), _float64(risk)
    if uncertainty.ndim != 1 or uncertainty.shape != risk.shape or risk.size == 0:
        raise ValueError(
            "Expected one uncertainty and one risk for each image, not empty. "
            f"Received: shapes {uncertainty.shape} and {risk.shape}"
        )
    if not (np.isfinite(uncertainty).all() and np.isfinite(risk).all()):
        raise ValueError("Expected finite uncertainties and risks. Received: NaN or infinity; leave those images out.")
    return uncertainty, risk


def risk_coverage(uncertainty: ArrayLike, risk: ArrayLike) -> tuple[np.ndarray, np.ndarray]:
    """Mean risk of the most certain images, for every share of images that is kept.

    Equally uncertain images count with their mean risk, the expectation over their order: an uncertainty that
    is the same everywhere gives a flat curve.

    Args:
        uncertainty: (images,), any scale.
        risk: (images,), what a mistake costs: 0/1 errors, 1 - Dice, a Brier score.

    Returns:
        coverage, (images,): 1/n, 2/n, ..., 1; selective_risk, (images,). The last is the mean risk of all.

    Reference: El-Yaniv and Wiener 2010; Geifman and El-Yaniv 2017, "Selective Classification for Deep Neural
        Networks".
    """
    uncertainty, risk = _check_risk(uncertainty, risk)
    _, group, count = np.unique(uncertainty, return_inverse=True, return_counts=True)
    tied = np.repeat(np.bincount(group, risk) / count, count)
    number = np.arange(1, len(risk) + 1)
    return number / len(risk), np.cumsum(tied) / number


# %% [markdown]
# One number for the curve, and what is left of it when the oracle's is taken off.


# %%
def area_under_risk_coverage(uncertainty: ArrayLike, risk: ArrayLike) -> float:
    """Mean of the selective risk over all coverages: low if the risk is low, and if the uncertainty finds it.

    Args:
        uncertainty, risk: (images,), as in `risk_coverage`.
    """
    return float(risk_coverage(uncertainty, risk)[1].mean())


def excess_area(uncertainty: ArrayLike, risk: ArrayLike) -> float:
    """Area under the risk-coverage curve beyond the oracle's, which sorts by the risk itself: 0 is best.

    The area alone is mostly the mean risk; this is what a better uncertainty could still gain.

    Args:
        uncertainty, risk: (images,), as in `risk_coverage`.

    Reference: Geifman, Uziel and El-Yaniv 2019, "Bias-Reduced Uncertainty Estimation for Deep Neural
        Classifiers" (E-AURC).
    """
    return area_under_risk_coverage(uncertainty, risk) - area_under_risk_coverage(risk, risk)


# %% [markdown]
# Without a curve: does an error look less certain than a correct prediction? It is the AUC of section 4, with errors as
# the positives and the uncertainty as the score.


# %%
def error_auroc(uncertainty: ArrayLike, errors: ArrayLike) -> float:
    """Probability that an error is more uncertain than a correct prediction: 0.5 is chance.

    It also tells shifted (1) from clean (0) inputs. A method with other errors is asked another question, so
    it compares uncertainties of one prediction, not methods.

    Args:
        uncertainty: any shape, any scale: of images, labels or pixels.
        errors: same shape, 0 or 1.

    Returns:
        A float; NaN where all or none are errors.
    """
    from sklearn.metrics import roc_auc_score

    uncertainty, errors = _check_risk(np.ravel(uncertainty), np.ravel(errors))
    if not ((errors == 0) | (errors == 1)).all():
        raise ValueError(f"Expected errors to be 0 or 1. Received: values from {errors.min()} to {errors.max()}")
    return float(roc_auc_score(errors, uncertainty)) if 0 < errors.sum() < len(errors) else float("nan")


# %% tags=["active-ipynb"]
# order, errors = [1, 2, 3, 4], [0, 1, 0, 1]
# print("curve", risk_coverage(order, errors)[1].round(3))
# print(f"area {area_under_risk_coverage(order, errors):.3f}, excess {excess_area(order, errors):.3f}")
# print(f"AUROC {error_auroc(order, errors):.2f}, of no errors {error_auroc(order, [0, 0, 0, 0])}")
# assert np.isclose(area_under_risk_coverage(np.zeros(4), errors), np.mean(errors))  # all equally uncertain: flat

# %% [markdown]
# **Trap 4: a better area, a worse uncertainty.** Method A errs in 5 % of 2,000 images and knows nothing of where;
# method B errs in 20 % and its uncertainty ranks its errors well.

# %% tags=["active-ipynb"]
# wrong_a, wrong_b = rng.random(2000) < 0.05, rng.random(2000) < 0.2
# curves = {
#     "A": (rng.random(2000), wrong_a),
#     "B": (rng.normal(size=2000) + 1.5 * wrong_b, wrong_b),
#     "oracle of B": (wrong_b, wrong_b),
# }
# print(f"{'':<13}{'risk':>6}{'area':>7}{'excess':>8}{'AUROC':>7}")
# for name, (uncertain, wrong) in curves.items():
#     print(f"{name:<13}{wrong.mean():>6.2f}{area_under_risk_coverage(uncertain, wrong):>7.3f}"
#           f"{excess_area(uncertain, wrong):>8.3f}{error_auroc(uncertain, wrong):>7.2f}")

# %% tags=["active-ipynb", "nbval-ignore-output"]
# figure, ax = plt.subplots(figsize=(5, 2.8), layout="constrained")
# for (name, (uncertain, wrong)), style in zip(curves.items(), ("-", "-", ":"), strict=True):
#     ax.plot(*risk_coverage(uncertain, wrong), style, label=name)
# ax.set(xlabel="coverage: share of images kept", ylabel="error rate of those kept", ylim=(0, 0.25))
# ax.set_title("B gains by referring its uncertain images, A does not")
# ax.legend()
# plt.show()

# %% [markdown]
# *Reading*: a flat curve is an uncertainty that knows nothing; the right end is the plain error rate. The area mixes
# how often a method is wrong with how well it knows; the excess and the AUROC tell the second.

# %% [markdown]
# ## 11. The registry
#
# Every metric of a table: where it is defined, its range, its direction, and what it says.


# %%
class Metric(NamedTuple):
    """One number of a table: its tasks, its range, which way is better and what it says."""

    name: str
    tasks: tuple[str, ...]
    low: float
    high: float
    higher_is_better: bool | None  # None: neither way is better
    meaning: str


_OF_LABELS = (BINARY, MULTI_LABEL, MULTI_CLASS, ORDINAL)
_ENTRIES = (
    Metric("nll", TASKS, 0, np.inf, False, "negative log likelihood of the truth, nats per label, pixel or image"),
    Metric("brier", TASKS, 0, 2, False, "squared error of the probabilities, mean; of classes summed, 0 to 2"),
    Metric("brier_skill", TASKS, -np.inf, 1, True, "1 - Brier / Brier of the training prevalence: 0 is no skill"),
    Metric("ece", TASKS, 0, 1, False, "expected calibration error, 15 bins of equal width, pooled"),
    Metric("ece_mass", TASKS, 0, 1, False, "expected calibration error, 15 bins of equal count, pooled"),
    Metric(
        "ece_region",
        (SEGMENTATION,),
        0,
        1,
        False,
        "expected calibration error of the pixels that any rater or the prediction marks",
    ),
    Metric("entropy", TASKS, 0, np.inf, None, "entropy of the mean prediction, nats: how unsure it is in all"),
    Metric("expected_entropy", TASKS, 0, np.inf, None, "mean entropy of the samples, nats: what each is unsure of"),
    Metric(
        "mutual_information", TASKS, 0, np.inf, None, "entropy less expected_entropy, nats: how far samples disagree"
    ),
    Metric("risk", TASKS, 0, 1, False, "mean error of an image: share of wrong labels, wrong class, or 1 - Dice"),
    Metric("aurc", TASKS, 0, 1, False, "area under the risk-coverage curve: mean error if unsure images are refused"),
    Metric("excess_aurc", TASKS, 0, 1, False, "that area less the oracle's, which refuses the worst images first"),
    Metric("error_auroc", TASKS, 0, 1, True, "AUROC of an image's entropy for its prediction being wrong"),
    Metric("error_auroc_mi", TASKS, 0, 1, True, "AUROC of an image's mutual information for its being wrong"),
    Metric("num_images", TASKS, 1, np.inf, None, "test images scored"),
    Metric(
        "auc",
        _OF_LABELS,
        0,
        1,
        True,
        "area under the ROC curve, mean over the labels that have both 0 and 1",
    ),
    Metric("auc_num_labels", _OF_LABELS, 0, np.inf, None, "how many labels these are"),
    Metric(
        "average_precision",
        _OF_LABELS,
        0,
        1,
        True,
        "average precision, mean over the same labels",
    ),
    Metric(
        "accuracy",
        _OF_LABELS,
        0,
        1,
        True,
        "share of right decisions; with rare labels, 1 - prevalence is free",
    ),
    Metric(
        "ece_label",
        _OF_LABELS,
        0,
        1,
        False,
        "expected calibration error of each label or class, mean, equal width",
    ),
    Metric("ece_label_mass", _OF_LABELS, 0, 1, False, "the same in bins of equal count"),
    Metric(
        "label_error_auroc", (BINARY, MULTI_LABEL), 0, 1, True, "AUROC of a label's entropy for that label being wrong"
    ),
    Metric(
        "mean_absolute_error", (ORDINAL,), 0, np.inf, False, "distance of the predicted from the true grade, in grades"
    ),
    Metric("quadratic_kappa", (ORDINAL,), -1, 1, True, "agreement of the grades beyond chance, quadratic weights"),
    Metric("dice", (SEGMENTATION,), 0, 1, True, "Dice of the foreground with the majority mask, mean over images"),
    Metric("iou", (SEGMENTATION,), 0, 1, True, "intersection over union with the majority mask, mean over images"),
    Metric(
        "hausdorff95", (SEGMENTATION,), 0, np.inf, False, "95th percentile of the distance between the outlines, pixels"
    ),
    Metric(
        "ged", (SEGMENTATION,), 0, 2, False, "generalised energy distance of the sampled masks to the raters' masks"
    ),
    Metric(
        "hungarian_iou", (SEGMENTATION,), 0, 1, True, "IoU of sampled masks and raters' masks, best matched one to one"
    ),
    Metric("dice_raters", (SEGMENTATION,), 0, 1, True, "Dice with each rater's mask, mean over raters and images"),
    Metric(
        "entropy_disagreement_pearson",
        (SEGMENTATION,),
        -1,
        1,
        True,
        "correlation over pixels of entropy and raters' variance",
    ),
    Metric("pixel_error_auroc", (SEGMENTATION,), 0, 1, True, "AUROC of a pixel's entropy for that pixel being wrong"),
    Metric(
        "pixel_error_auroc_mi", (SEGMENTATION,), 0, 1, True, "AUROC of a pixel's mutual information for its being wrong"
    ),
    Metric(
        "paper_accuracy", (MULTI_LABEL,), 0, 1, True, "mostly the share of absent labels: never any finding scores high"
    ),
    Metric(
        "paper_brier",
        (MULTI_LABEL, SEGMENTATION),
        0,
        1,
        False,
        "Brier score of one random sample, not of the mean prediction",
    ),
    Metric(
        "paper_brier_softmax_twice",
        (SEGMENTATION,),
        0,
        1,
        False,
        "the same after a second softmax: 0.0723 is the least",
    ),
    Metric(
        "paper_entropy",
        (MULTI_LABEL, SEGMENTATION),
        0,
        np.inf,
        None,
        "of labels -p ln p without the 1 - p term; of masks the entropy",
    ),
    Metric(
        "paper_dice",
        (SEGMENTATION,),
        0,
        1,
        True,
        "mostly how near to exactly 0 background is: an empty mask scores its share",
    ),
    Metric("paper_iou", (SEGMENTATION,), 0, 1, True, "IoU of a typical sample, not of the mean prediction"),
    Metric(
        "paper_ece",
        (MULTI_LABEL, SEGMENTATION),
        0,
        1,
        False,
        "calibration error of the decisions: mostly whether a sure no is right",
    ),
)
METRICS = {metric.name: metric for metric in _ENTRIES}

# %% [markdown]
# ## 9. What did the paper measure?
#
# Table 1's columns, as its code defines them. Each docstring says what the number really measures;
# [08_reading_table_1](../08_reading_table_1.ipynb) takes the table apart with them.


# %%
def _samples_pair(probs, targets, target_axes=None) -> tuple[np.ndarray, np.ndarray]:
    probs, targets = _float64(probs), _float64(targets)
    axes = targets.ndim if target_axes is None else target_axes
    if probs.shape[1:] != targets.shape or targets.ndim != axes or probs.ndim == 0 or probs.size == 0:
        raise ValueError(
            "Expected probs of shape (samples, ...) over targets of shape (...), not empty. "
            f"Received: {probs.shape} and {targets.shape}"
        )
    return _check_range(probs), _check_range(targets, "targets")


def paper_accuracy(probs: ArrayLike, labels: ArrayLike) -> float:
    """Accuracy of the samples' majority vote: what it measures is mostly that most labels are 0.

    Predicting no finding for everyone scores 1 - prevalence, on ChestMNIST above every row of the paper's
    Table 1.

    Args:
        probs: (samples, batch, labels); a tied vote counts as 0, as coded.
        labels: (batch, labels), 0 or 1.
    """
    probs, labels = _samples_pair(probs, labels)
    return accuracy((probs > 0.5).mean(0), labels)


# %% [markdown]
# Its Brier score is the mean over single samples, and one softmax too many lifts that of two of its rows.


# %%
def paper_brier(probs: ArrayLike, targets: ArrayLike, softmax_twice: bool = False) -> float:
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
    probs, targets = _samples_pair(probs, targets)
    if softmax_twice:
        probs = 1 / (1 + np.exp(1 - 2 * probs))
    return float(np.square(probs - targets).mean())


# %% [markdown]
# Its entropy of labels has half of the terms.


# %%
def paper_entropy(probs: ArrayLike, task: str = MULTI_LABEL) -> float:
    """Entropy of the mean prediction; for labels the sum over them of `-p ln p` *without* the 1 - p term.

    For labels it measures mostly how far the probabilities are from both 0 and 1 on the low side: p = 1/e,
    not 1/2, is its maximum, 5.15 for 14 labels. For segmentation it is the binary entropy, mean over
    pixels.

    Args:
        probs: (samples, batch, labels), or (samples, batch, height, width) probabilities of foreground.
        task: "multi-label" or "segmentation".
    """
    if task not in (MULTI_LABEL, SEGMENTATION):
        raise ValueError(f"Expected a task of the paper's, {MULTI_LABEL!r} or {SEGMENTATION!r}. Received: {task!r}")
    probs = _check_range(_float64(probs))
    if probs.ndim < 3 or probs.size == 0:
        raise ValueError(f"Expected probs of shape (samples, batch, ...), not empty. Received: shape {probs.shape}")
    mean_probs = probs.mean(0)
    return float(binary_entropy(mean_probs).mean() if task == SEGMENTATION else entr(mean_probs).sum(-1).mean())


# %% [markdown]
# Its Dice is a mean over all pixels and both classes, so where lesions are small it asks mostly whether the
# background is *exactly* 0: at $p = 0.001$ a right background pixel scores one half.


# %%
def paper_dice(probs: ArrayLike, truth: ArrayLike) -> np.ndarray:
    """Elementwise `(2 p y + eps) / (p + y + eps)`, mean over pixels, both classes and samples, eps = 1e-5.

    It measures mostly how near to exactly 0 the probabilities of the background are: an all-background prediction
    scores 1 - the fraction of foreground, about 0.99 on LIDC, a right background pixel with p = 0.001 one half.

    Args:
        probs: (samples, batch, height, width), probabilities of foreground.
        truth: (batch, height, width), 0 or 1; the mean of raters' masks gives the mean score over raters.

    Returns:
        (batch,) float64.
    """
    (probs, truth), eps = _samples_pair(probs, truth, 3), 1e-5

    def score(p):  # of a pixel whose true class has probability p; the second ratio is the other class's
        return ((2 * p + eps) / (p + 1 + eps) + eps / (1 - p + eps)) / 2

    return (truth * score(probs) + (1 - truth) * score(1 - probs)).mean((0, 2, 3))


# %% [markdown]
# Its IoU pools the samples: a ratio of sums, where `iou` of each sample would give a mean of ratios.


# %%
def paper_iou(probs: ArrayLike, truth: ArrayLike) -> np.ndarray:
    """IoU of all samples' masks together, the sum of intersections over the sum of unions, for each image.

    It measures the overlap of a typical sample, not of the mean prediction. 1 if truth and all samples are
    empty. One sample differs from many of the same distribution: the mean of ratios is not the ratio of means.

    Args:
        probs: (samples, batch, height, width), probabilities of foreground, cut at `p > 0.5`.
        truth: (batch, height, width), 0 or 1.

    Returns:
        (batch,) float64.
    """
    predicted, truth = (values > 0.5 for values in _samples_pair(probs, truth, 3))
    votes = predicted.sum(0)
    both = (votes * truth).sum((1, 2))
    either = votes.sum((1, 2)) + len(predicted) * truth.sum((1, 2)) - both
    return np.where(either > 0, both / np.maximum(either, 1), 1.0)


# %% [markdown]
# Its text cites a calibration error that no column shows; by that definition it would be this one.


# %%
def paper_ece(probs: ArrayLike, targets: ArrayLike, num_bins: int = 15) -> float:
    """Expected calibration error of the predicted class, as Guo et al. define it, of the mean prediction.

    It measures mostly whether a confident "no" is right: the confidence is `max(p, 1 - p)`, and with rare labels
    or few foreground pixels nearly every prediction is a confident 0. A constant prevalence scores about 0.

    # Differs from the paper: its Table 1 has no column for it and its code none; this is the definition its text
    # cites, with each label or pixel a two-class event and all pooled.

    Args:
        probs: (samples, ...), probabilities of 1; p = 0.5 predicts 0.
        targets: (...), in 0..1; the mean of raters gives the expectation over raters.
        num_bins: number of bins over [0, 1], of which the upper half can be filled.

    Reference: Guo et al. 2017, "On Calibration of Modern Neural Networks", equation 3.
    """
    probs, targets = _samples_pair(probs, targets)
    mean_probs = probs.mean(0)
    correct = np.where(mean_probs > 0.5, targets, 1 - targets)
    return float(ece(np.maximum(mean_probs, 1 - mean_probs), correct, num_bins))


# %% [markdown]
# Never looking, in these terms. The counts are of all of NIH ChestX-ray14; in ChestMNIST's training split the third
# digit differs.

# %% tags=["active-ipynb"]
# no, often = nothing[None], np.broadcast_to(findings.mean(0), (1, *findings.shape))
# print(f"{'':<24}{'accuracy':>9}{'Brier':>7}{'entropy':>9}{'ECE':>7}")
# for name, values in (("no finding", no), ("prevalence", often)):
#     print(f"{name:<24}{paper_accuracy(values, findings):>9.3f}{paper_brier(values, findings):>7.4f}"
#           f"{paper_entropy(values):>9.2f}{paper_ece(values, findings):>7.3f}")
# print(f"{'best row of Table 1':<24}{0.936:>9.3f}{0.053:>7.4f}{0.367:>9.2f}")
# assert paper_brier(often, findings) < 0.053 and np.isclose(paper_entropy(np.full((1, 1, 14), np.exp(-1))), 14 / np.e)

# %% [markdown]
# For masks: a lesion of 1 % of the pixels, an empty prediction, and a perfect one under the softmax that the code
# applies twice to its deterministic rows.

# %% tags=["active-ipynb"]
# lesion = np.zeros((1, 20, 20))
# lesion[0, 9:11, 9:11] = 1
# empty = np.zeros((1, 1, 20, 20))
# print(f"all background: the paper's Dice {paper_dice(empty, lesion)[0]:.3f}, Dice {dice(empty[0], lesion)[0]:.0f}")
# floor = paper_brier(lesion[None], lesion, softmax_twice=True)
# print(f"perfect map: Brier {paper_brier(lesion[None], lesion):.0f}, after a second softmax {floor:.4f}")
# assert np.isclose(floor, (1 / (1 + np.e)) ** 2)  # the second softmax makes 0.731 of a certain 1

# %% [markdown]
# So Table 1's segmentation Brier of .075 (deterministic) against .004 (partial) is mostly the floor of .072, and a
# "Dice" of .80 lies below that of an empty mask.
#
# ## 10. Which number answers which question?
#
# | question | number | never looking scores | it hides |
# |---|---|---|---|
# | are the probabilities good, all in all? | `nll`, `brier` | the prevalence's | ranking or calibration? |
# | are they better than never looking? | `brier_skill` | 0 | small differences, if the event is rare |
# | how often is the decision right? | `accuracy` | 1 - prevalence: often best | everything about the rare positives |
# | do they mean what they say? | `ece`, reliability | 0: perfect | whether they tell anyone apart |
# | do they rank? | `auc_per_label` | 0.5 | calibration, and rarity |
# | can I find the few positives? | `average_precision_per_label` | the prevalence | calibration |
# | how unsure, and why? | `uncertainty` | any | whether it is right to be unsure |
# | do the masks overlap? | `dice`, `iou` | 0; 1 for empty truths | where they differ, and how unsure |
# | how far off is the outline? | `hausdorff95` | the diagonal | the size of what was missed |
# | do samples vary as raters do? | GED, `hungarian_iou` | the mean mask's | was anything sampled? level sets do well |
# | does it see where raters differ? | correlation with `disagreement` | the mean mask's: 0.55 | was anything seen? |
# | does it know its wrong images? | `excess_area`, `error_auroc` | 0.5 (AUROC) | how many mistakes there are |
# | does it know its wrong pixels? | `error_auroc` | the mean mask's: 0.93 | was anything seen? |
#
# The mean mask's numbers are of `phantom_nodule`'s test split (`evaluation.trivial`, "prevalence"). It is unsure where
# lesions usually end, and raters differ and errors lie nowhere else: both numbers reward location alone.
#
# ## Summary
#
# - Put the trivial predictor's score beside every number.
# - Proper scores (NLL, Brier) judge the whole; ECE, AUC and entropy each judge a part. The prevalence has a perfect
#   ECE, a predictor that is certain and always wrong has the lowest entropy, and with a perfect AUC every probability
#   may be false.
# - With several raters the target is a random one, and level sets of one map are a baseline of every sampled method.
# - Undefined is said, never averaged: NaN comes only from `auc_per_label`, `average_precision_per_label`, `brier_skill`
#   and `error_auroc`, where their docstrings say so.
#
# ## Exercises
#
# 1. All 14 probabilities are 0.5. What are `accuracy`, `ece` and `paper_entropy` if 5 % of the labels are 1?
#
#    <details><summary>Answer</summary>
#
#    0.95 (`p > 0.5` is false everywhere), 0.45, and $14 \cdot 0.5 \ln 2 = 4.85$. Lower entropy would not be better
#    calibrated: the all-0 prediction has 0.
#    </details>
# 2. Why is `brier(mean_probs, soft)` lower than the mean over raters of `brier(mean_probs, mask)`, and by how much?
#
#    <details><summary>Answer</summary>
#
#    By the raters' variance, `disagreement(masks).mean()`: $\mathbb{E}(p - y)^2 = (p - s)^2 + s (1 - s)$.
#    </details>
# 3. A method repeats its one mask ten times. What becomes of its GED and its matched IoU?
#
#    <details><summary>Answer</summary>
#
#    Nothing: both depend on the distribution of the masks only. Ten *different* samples are another matter.
#    </details>
# 4. Square every probability of a perfectly calibrated predictor. Which of NLL, Brier, ECE, AUC, average precision and
#    the risk-coverage curve (uncertainty $p$) change?
#
#    <details><summary>Answer</summary>
#
#    NLL, Brier and ECE get worse. AUC and average precision depend on the order alone, and so does the curve as long as
#    the risks stay: they do not if they are errors of decisions at 0.5, since $0.6$ becomes $0.36$.
#    </details>
# 5. In the toy of section 7, replace the raters' mean by the map of a network that is too sure: 1 where at least half
#    of the raters mark, else 0. What are its level sets worth?
#
#    <details><summary>Answer</summary>
#
#    All five are the majority mask: the GED of "one mask", but for ties. Level sets are as good as the map is
#    calibrated.
#    </details>
#
# ## References
#
# - Brier (1950). *Verification of forecasts expressed in terms of probability*. Monthly Weather Review 78.
# - Murphy (1973). *A new vector partition of the probability score*. Journal of Applied Meteorology 12.
# - Murphy (1988). *Skill scores based on the mean square error and their relationships to the correlation coefficient*.
#   Monthly Weather Review 116.
# - Stephenson, Coelho, Jolliffe (2008). *Two extra components in the Brier score decomposition*. Weather and
#   Forecasting 23.
# - Hanley, McNeil (1982). *The meaning and use of the area under a receiver operating characteristic (ROC) curve*.
#   Radiology 143.
# - Gneiting, Raftery (2007). *Strictly proper scoring rules, prediction, and estimation*. JASA 102.
# - Guo, Pleiss, Sun, Weinberger (2017). *On calibration of modern neural networks*. ICML.
# - Nixon, Dusenberry, Zhang, Jerfel, Tran (2019). *Measuring calibration in deep learning*. CVPR Workshops.
# - Depeweg, Hernandez-Lobato, Doshi-Velez, Udluft (2018). *Decomposition of uncertainty in Bayesian deep learning for
#   efficient and risk-sensitive learning*. ICML.
# - Huttenlocher, Klanderman, Rucklidge (1993). *Comparing images using the Hausdorff distance*. IEEE Transactions on
#   Pattern Analysis and Machine Intelligence 15.
# - Taha, Hanbury (2015). *Metrics for evaluating 3D medical image segmentation*. BMC Medical Imaging 15.
# - Kohl et al. (2018). *A probabilistic U-Net for segmentation of ambiguous images*. NeurIPS.
# - Kohl et al. (2019). *A hierarchical probabilistic U-Net for modeling multi-scale ambiguities*. arXiv 1905.13077.
# - Geifman, El-Yaniv (2017). *Selective classification for deep neural networks*. NeurIPS.
# - Geifman, Uziel, El-Yaniv (2019). *Bias-reduced uncertainty estimation for deep neural classifiers*. ICLR.
# - Wang et al. (2017). *ChestX-ray8*. CVPR. The counts of section 2 are those of its release of fourteen findings.
# - Abboud, Lombaert, Kadoury (2024). *Sparse Bayesian Networks: Efficient Uncertainty Quantification in Medical Image
#   Analysis*. MICCAI.
