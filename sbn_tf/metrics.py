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
# **A number means little until you know what a predictor that ignores the image would score. Each metric here comes
# with the question that it answers, a case worked by hand and what it hides; one registry has them all.**
#
# Medical labels are rare and lesions are small, so "nothing there" is nearly always right. Raters disagree, so there is
# no single truth. Both make the usual numbers flattering; the paper's Table 1 is an example:
# [08_reading_table_1](../08_reading_table_1.ipynb).
#
# - *You will see*: scores, calibration, ranking, entropies, overlap and sets of masks, risk-coverage; four traps.
# - *Words*: an *event* is one label of one image, or one pixel; its *target* is 1 where it is so (*positive*), else 0.
#   The *prevalence* is the share of positives; as a predictor, that of the training set. A *posterior sample* is the
#   prediction of one network drawn from a Bayesian one. More words: [glossary](../../docs/glossary.md).
# - *You need*: probabilities and averages. *Runs in*: 10 seconds (CPU). First take sections 1, 2, 4 and 6.

# %%
"""Metrics: what a method's probabilities are worth, and beside them what the paper measured.

A method gives probabilities with the posterior samples on axis 0 (a deterministic network gives one sample):

task            probs                                                targets
"multi-label"   (samples, batch, labels)                             (batch, labels), 0 or 1
"binary"        (samples, batch, 1)                                  (batch, 1), 0 or 1
"multi-class"   (samples, batch, classes), sum 1                     (batch, classes), one-hot
"ordinal"       the same, classes in order                           the same
"segmentation"  (samples, batch, height, width) or (..., width, 1)   (batch, height, width, raters), 0 or 1

Metrics take (targets, predictions), as Keras and scikit-learn do. `mean_probs` is the mean over samples. `rater_valid`,
(batch, raters) bool, is False where a mask is a filler; None: all are real. Entropies and log scores are in nats.
"""

from __future__ import annotations


import sbn_tf  # noqa: F401 (first: it silences TensorFlow's log)
import numpy as np
from numpy.typing import ArrayLike
from scipy.special import entr

from sbn_tf.core import cases as of
from sbn_tf.core import paper_metrics, predictions, statistics
from sbn_tf.core.cases import Case, Metric
from sbn_tf.core.paper_metrics import paper_accuracy, paper_brier, paper_dice, paper_ece, paper_entropy, paper_iou
from sbn_tf.core.predictions import EXCLUSIVE, LABELS, MULTI_LABEL, ORDINAL, SEGMENTATION, TASKS
from sbn_tf.core.statistics import area_under_risk_coverage, brier_decomposition, error_auroc, excess_area
from sbn_tf.core.overlap import disagreement, distances, hausdorff95, majority_mask, mask_sets
from sbn_tf.core.overlap import matched_distance, overlap

__all__ = [
    "METRICS", "TASKS", "Case", "Metric", "accuracy", "area_under_risk_coverage", "auc_per_label",
    "average_precision_per_label", "binary_entropy", "brier", "brier_decomposition", "brier_skill", "dice",
    "dice_raters", "disagreement", "ece", "error_auroc", "excess_area", "generalised_energy_distance", "hausdorff95",
    "hungarian_iou", "iou", "majority_mask", "nll", "paper_accuracy", "paper_brier", "paper_dice", "paper_ece",
    "paper_entropy", "paper_iou", "risk_coverage", "uncertainty",
]  # fmt: skip

# %% [markdown]
# ## 1. How good are the probabilities?
# For one event with probability $p$ and outcome $y \in \{0, 1\}$:
#
# $$\mathrm{NLL} = -y \ln p - (1 - y) \ln (1 - p), \qquad \mathrm{Brier} = (p - y)^2.$$
#
# By hand: $p = 0.8$ and the event happens, $-\ln 0.8 = 0.223$ nats and $0.2^2 = 0.04$; it does not, $-\ln 0.2 = 1.609$
# and $0.8^2 = 0.64$. Several raters give *soft* targets, their mean $s$: the NLL is then the mean over raters, while
# the Brier score lacks the raters' own variance $s (1 - s)$.

# %%
LOG_CLIP = 1e-7  # a log score is infinite for one certain and wrong prediction; clipped here, that costs 16.1 nats


def log_score(targets, probs):
    """`-y ln p - (1 - y) ln(1 - p)` of each event, p clipped to [1e-7, 1 - 1e-7]."""
    probs = np.clip(probs, LOG_CLIP, 1 - LOG_CLIP)
    return -(targets * np.log(probs) + (1 - targets) * np.log1p(-probs))


def nll(targets: ArrayLike, mean_probs: ArrayLike) -> float:
    """Negative log likelihood in nats, mean over labels or pixels; soft targets give the mean over raters."""
    return float(log_score(*predictions.pair(targets, mean_probs)).mean())


def brier(targets: ArrayLike, mean_probs: ArrayLike) -> float:
    """Brier score, `(p - y)^2`, mean over labels or pixels; a soft target counts without the raters' variance."""
    return float(np.square(np.subtract(*predictions.pair(targets, mean_probs))).mean())


# %% tags=["active-ipynb"]
# for outcome in (1, 0):
#     print(f"p = 0.8, y = {outcome}: NLL {nll([outcome], [0.8]):.3f}, Brier {brier([outcome], [0.8]):.2f}")
# certain = np.r_[np.zeros(999), 1.0], np.zeros(1000)  # 1,000 certain predictions, one of them wrong
# print(f"one certain mistake in 1,000: NLL {nll(*certain):.4f}, Brier {brier(*certain):.4f}")
# truth, constants = (np.arange(100) < 30).astype(float), np.linspace(0.01, 0.99, 99)  # 30 % positive
# best = [constants[np.argmin([score(truth, np.full(100, c)) for c in constants])] for score in (nll, brier)]
# print(f"best constants: {best[0]:.2f} and {best[1]:.2f}")

# %% [markdown]
# Both are *proper*: on average nothing beats saying what you believe (Gneiting and Raftery 2007), so the best
# constant is the true frequency. Is that better than ignoring the image? *Source*: Murphy (1988):
# $$\text{Brier skill} = 1 - \frac{\text{Brier}}{\text{Brier of the training prevalence}}$$
# 0 is what the prevalence scores, 1 is perfect. By hand: $p = .2, .3, .6, .1$, only the third is positive: Brier
# $(.04 + .09 + .16 + .01) / 4 = .075$; of the prevalence 1/4 it is $.1875$: the skill is $.6$. Accuracy has no zero.
#
# **Trap 1: accuracy of rare findings.** The published counts of the fourteen findings in NIH ChestX-ray14 (Wang et al.,
# CVPR 2017), whose images are ChestMNIST's. "No finding", for everyone, about everything:


# %%
def brier_skill(targets: ArrayLike, mean_probs: ArrayLike, train_prevalence: ArrayLike) -> float:
    """`1 - brier / brier of the training prevalence`, a number, (labels,) or (height, width); NaN if that is 0."""
    reference = brier(targets, predictions.broadcast(train_prevalence, np.shape(targets), "train_prevalence"))
    return 1 - brier(targets, mean_probs) / reference if reference > 0 else float("nan")


def accuracy(labels: ArrayLike, mean_probs: ArrayLike) -> float:
    """Fraction of labels for which `p > 0.5` equals the label; with rare labels, 1 - prevalence is free."""
    labels, mean_probs = predictions.pair(labels, mean_probs)
    return float(((mean_probs > 0.5) == (labels > 0.5)).mean())


# %% tags=["active-ipynb"]
# import matplotlib.pyplot as plt
# import pandas as pd
#
# plt.rcParams |= {"figure.dpi": 72, "axes.spines.top": False, "axes.spines.right": False, "font.size": 9}
# rng = np.random.default_rng(0)
# FINDINGS = {"infiltration": 19894, "effusion": 13317, "atelectasis": 11559, "nodule": 6331, "mass": 5782,
#             "pneumothorax": 5302, "consolidation": 4667, "pleural": 3385, "cardiomegaly": 2776, "emphysema": 2516,
#             "edema": 2303, "fibrosis": 1686, "pneumonia": 1431, "hernia": 227}
# frequency = np.array(list(FINDINGS.values())) / 112_120
# findings = (np.arange(10_000)[:, None] < np.round(1e4 * frequency)).astype(float)  # 10,000 images of that prevalence
# nothing = np.zeros_like(findings)
# skill = brier_skill(findings, nothing, findings.mean(0))
# print(f"by hand {brier_skill([0, 0, 1, 0], [0.2, 0.3, 0.6, 0.1], 0.25):.2f}; nothing: accuracy", end=" ")
# print(f"{accuracy(findings, nothing):.3f}, Brier skill {skill:.3f}")
# assert accuracy(findings, nothing) > 0.936  # the best row of the paper's Table 1, an ensemble

# %% tags=["active-ipynb", "nbval-ignore-output"]
# figure, ax = plt.subplots(figsize=(7, 3), layout="constrained")
# ax.barh(list(FINDINGS), 1 - frequency, color="0.75")
# ax.axvline(0.936, color="tab:red", label="the paper's best row, mean (0.936)")
# ax.axvline(1 - frequency.mean(), color="black", linestyle="--", label="saying no, mean (0.948)")
# ax.set(xlim=(0.8, 1), xlabel="accuracy of saying no", title="A predictor that ignores the image is 95 % accurate")
# ax.invert_yaxis()
# ax.legend(loc="lower left", fontsize=8)
# plt.show()

# %% [markdown]
# *Reading*: the rarer the finding, the more accurate it is to deny it. No row of Table 1 reaches the dashed line. Brier
# skill is below 0, since a certain "no" is worse than the prevalence.
#
# > **Misconception: "93 % accurate is good."** With rare labels accuracy is mostly the share of negatives, here 0.948.
# > Only the distance from that number says anything. For ranking ask AUC (section 3), for probabilities Brier skill.
#
# ## 2. Do the probabilities mean what they say?
# Of all cases with $p \approx 0.3$, three in ten should be positive. The expected calibration error (Guo et al. 2017)
# puts predictions in bins and averages the gap,
# $\mathrm{ECE} = \sum_k \frac{n_k}{n} \left| \bar p_k - \bar y_k \right|$.
# By hand, two bins: $p = 0.1, 0.2$ with no positive, $p = 0.7, 0.8$ with one: $(0.15 + 0.25) / 2 = 0.2$. With rare
# labels nearly all values crowd the first bin of equal *width*; bins of equal *mass* (Nixon et al. 2019) look closer.
#
# What is a Brier score made of? How far the bins are from the diagonal, minus how far apart they are, plus what nobody
# can remove (Murphy 1973):
#
# $$\underbrace{\sum_k \tfrac{n_k}{n} (\bar p_k - \bar y_k)^2}_{\text{reliability}}
# - \underbrace{\sum_k \tfrac{n_k}{n} (\bar y_k - \bar y)^2}_{\text{resolution}}
# + \underbrace{\bar y (1 - \bar y)}_{\text{uncertainty}}
# + \underbrace{\sum_k \tfrac{n_k}{n} \left( \mathrm{var}_k(p) - 2\, \mathrm{cov}_k(p, y) \right)}_{\text{within}}$$
#
# The last term (Stephenson et al. 2008) makes it exact where a bin has several values of $p$. In
# `compile(metrics=[...])`, `sbn_tf.CalibrationError` is this ECE, Keras's "mse" Brier, `BinaryCrossentropy` the NLL.


# %%
def ece(
    targets: ArrayLike, mean_probs: ArrayLike, num_bins: int = 15, per_label: bool = False, binning: str = "width"
) -> float | np.ndarray:
    """Expected calibration error of the probability of 1, pooled, or of each index of the last axis (`per_label`).

    `binning` is "width" (bins of equal width over [0, 1]) or "mass" (of equally many values; equal values share one).
    """
    targets, mean_probs = predictions.pair(targets, mean_probs)
    if not per_label:
        return statistics.calibration_error(mean_probs.ravel(), targets.ravel(), num_bins, binning)
    if mean_probs.ndim < 2:
        raise ValueError(f"Expected (..., labels) with per_label=True. Received: shape {mean_probs.shape}")
    columns = range(mean_probs.shape[-1])
    return np.array([ece(targets[..., i], mean_probs[..., i], num_bins, False, binning) for i in columns])


# %% tags=["active-ipynb"]
# p, y = [0.1, 0.2, 0.7, 0.8], [0, 0, 1, 0]
# print(f"ECE {ece(y, p, num_bins=2):.2f}; one bin: {ece(y, p, num_bins=1):.2f}, the difference of the means")
# p, y = [0.25] * 4 + [0.75] * 4, [0, 0, 1, 0, 1, 1, 1, 1]  # frequencies 1/4 and 1, of all 5/8
# parts = brier_decomposition(y, p)
# print({key: round(value, 4) for key, value in parts.items()}, "Brier", round(brier(y, p), 4))
# assert np.isclose(parts["reliability"], 0.5 * 0.25**2) and np.isclose(parts["resolution"], (3 / 8) ** 2)

# %% [markdown]
# ## 3. Does it rank the sick above the well?
# AUC, the area under the ROC curve, is the probability that a random positive scores higher than a random negative
# (Hanley and McNeil 1982), $\mathbb{P}(p_+ > p_-) + \tfrac12\, \mathbb{P}(p_+ = p_-)$; 0.5 is chance. A label that is
# all 0 in the test split has none: NaN, so that a mean can leave it out *and say how many labels it is of*. By hand:
# positives 0.8 and 0.3, negatives 0.5 and 0.1: of four pairs three are in order, 0.75. Average precision is the mean,
# over the positives, of the share of positives among all that score at least as high: $(1 + 2/3)/2 = 0.83$ here.
# Chance is the prevalence.
#
# **Trap 2: calibration is not skill.** Three predictors of 20,000 events: one that knows each event's true probability,
# the same made overconfident (its log odds doubled), and the prevalence for everyone.


# %%
def auc_per_label(labels: ArrayLike, mean_probs: ArrayLike) -> np.ndarray:
    """Area under the ROC curve of each label, (labels,), from (batch, labels); NaN where all are 0 or all are 1."""
    return np.array([area for area, _ in statistics.rankings(*predictions.label_pair(labels, mean_probs))])


def average_precision_per_label(labels: ArrayLike, mean_probs: ArrayLike) -> np.ndarray:
    """Average precision of each label, (labels,), from (batch, labels); NaN where all are 0 or all are 1."""
    return np.array([precision for _, precision in statistics.rankings(*predictions.label_pair(labels, mean_probs))])


# %% tags=["active-ipynb"]
# p, y = np.array([[0.8], [0.3], [0.5], [0.1]]), np.array([[1], [1], [0], [0]])
# print(f"AUC {auc_per_label(y, p)[0]:.2f}, average precision {average_precision_per_label(y, p)[0]:.2f}")
# true_probs = rng.beta(0.7, 3, 20_000)
# events = (rng.random(20_000) < true_probs).astype(float)
# odds = (true_probs / (1 - true_probs)) ** 2
# predictors = {"knows": true_probs, "overconfident": odds / (1 + odds), "prevalence": np.full(20_000, events.mean())}
# rows = {}
# for name, p in predictors.items():
#     rows[name] = {"ECE": ece(events, p), "Brier": brier(events, p), "skill": brier_skill(events, p, events.mean())}
#     rows[name] |= {key: brier_decomposition(events, p)[key] for key in ("reliability", "resolution")}
#     rows[name] |= {"AUC": auc_per_label(events[:, None], p[:, None])[0]}
# assert rows["prevalence"]["ECE"] < 1e-9 < rows["knows"]["ECE"]
# pd.DataFrame(rows).T.round(3) + 0.0

# %% tags=["active-ipynb", "nbval-ignore-output"]
# from sbn_tf.experiments.plots.calibration import plot_reliability_curves, plot_risk_coverage
#
# figure, ax = plt.subplots(figsize=(6, 3.5), layout="constrained")
# plot_reliability_curves(ax, {name: (predictors[name], events) for name in ("knows", "overconfident")})
# plt.show()

# %% [markdown]
# *Reading*: below the diagonal at the right and above it at the left is overconfidence. The steps count the predictions
# of each bin; a point over a low step is mostly noise.
#
# > **Misconception: "well calibrated is good."** The prevalence would be one point on the diagonal: a perfect ECE, and
# > no resolution, no skill, no ranking. Calibration is the part of a proper score that a constant has at no cost.
#
# ## 4. How unsure is it, and why?
# With samples $p_1, \dots, p_S$ and the entropy $H(p) = -p \ln p - (1 - p) \ln (1 - p)$, the total splits in two
# (Depeweg et al. 2018, equation 5):
#
# $$H\!\left(\tfrac{1}{S} \sum_s p_s\right) = \tfrac{1}{S} \sum_s H(p_s) + \text{mutual information}.$$
#
# Each sample may be unsure (of the data: aleatoric), or the samples may disagree (about the weights: epistemic). By
# hand: samples 0 and 1 have $\ln 2 = 0.693$, all of it disagreement; samples 0.5 and 0.5 have the same total and none.


# %%
def binary_entropy(probs: ArrayLike) -> np.ndarray:
    """Entropy of a binary event, `-p ln p - (1 - p) ln(1 - p)`, in nats, elementwise: 0 to ln 2 = 0.693."""
    return predictions.event_entropy(predictions.check_range(predictions.float64(probs)))


def uncertainty(probs: ArrayLike, task: str = MULTI_LABEL) -> dict[str, np.ndarray]:
    """Split the entropy of every label or pixel, or of an image's classes (the last axis), into two parts.

    Gives "mean_probs", (...), and `entropy = expected_entropy + mutual_information` in nats, of that shape; of classes
    ("multi-class", "ordinal") without the last axis. With one sample the mutual information is 0.
    """
    probs = predictions.check_samples(probs, task)
    entropy = (lambda p: entr(p).sum(-1)) if task in EXCLUSIVE else binary_entropy
    mean_probs = probs.mean(0)
    total, expected = entropy(mean_probs), entropy(probs).mean(0)
    parts = {"entropy": total, "expected_entropy": expected, "mutual_information": total - expected}
    return {"mean_probs": mean_probs} | parts


# %% tags=["active-ipynb"]
# pairs = ([0.0, 1.0], [0.5, 0.5], [0.1, 0.5])
# found = uncertainty(np.array(pairs).T)
# assert np.allclose(found["entropy"], found["expected_entropy"] + found["mutual_information"])
# pd.DataFrame(found, index=[f"samples {pair}" for pair in pairs]).round(3) + 0.0

# %% [markdown]
# > **Misconception: "low entropy is good calibration."** Entropy is a statement about the prediction alone: the labels
# > do not occur in it. The certain "nothing" of trap 1 has the lowest entropy of all, 0, and the largest error.
#
# ## 5. Do the masks overlap?
# $$\mathrm{Dice} = \frac{2 |A \cap B|}{|A| + |B|}, \qquad \mathrm{IoU} = \frac{|A \cap B|}{|A \cup B|}.$$
# *Source*: Taha and Hanbury (2015). Of the foreground, for each image, then the mean over images. By hand: $A = 1100$,
# $B = 0111$: one pixel in both, four in either: IoU 1/4, Dice 2/5. Two empty masks agree: 1. Overlap hides *where*
# masks differ. HD95 is the 95th percentile of the distances, in pixels, from each outline to the other, both
# directions pooled (Huttenlocher et al. 1993); it forgives the stray pixel that decides the plain Hausdorff distance.
# By hand: a square of $3 \times 3$ and the same moved right by 3. Its outline has 8 pixels, at distances 1, 2 or 3 from
# the other square's; at 95 % it is 3.


# %%
def dice(truth: ArrayLike, predicted: ArrayLike) -> np.ndarray:
    """Dice of the foreground for each image, (batch,), of masks (batch, height, width); 1 if both are empty."""
    both, total = overlap(truth, predicted)
    return np.where(total > 0, 2 * both / np.maximum(total, 1), 1.0)


def iou(truth: ArrayLike, predicted: ArrayLike) -> np.ndarray:
    """Intersection over union of the foreground for each image, (batch,); 1 if both masks are empty."""
    both, total = overlap(truth, predicted)
    return np.where(total > 0, both / np.maximum(total - both, 1), 1.0)


# %% tags=["active-ipynb"]
# a, b = np.array([[[1, 1, 0, 0]], [[0, 0, 0, 0]]]), np.array([[[0, 1, 1, 1]], [[0, 0, 0, 0]]])
# print("Dice", dice(b, a), "IoU", iou(b, a))
# square, moved, speck = np.zeros((3, 1, 40, 40), bool)
# square[0, 2:5, 2:5], moved[0, 2:5, 5:8], speck[0, 39, 39] = True, True, True
# print("moved by 3:", hausdorff95(moved, square), " against nothing:", hausdorff95(speck & False, square).round(2))
# square[0, 10:30, 10:30] = True  # a large lesion, and one wrong pixel far away
# print("one stray pixel:", hausdorff95(square, square | speck), " Dice:", dice(square, square | speck).round(3))

# %% [markdown]
# ## 6. Which rater is right?
# None. The target is a rater drawn at random, and a score against it is the mean over the raters. With $s$ the share of
# raters who mark a pixel, any prediction $p$ has $\mathbb{E}\,(p - y)^2 = (p - s)^2 + s (1 - s)$: the last term is the
# raters' variance, which no prediction removes. How good is *one* mask? Ask Dice against the majority, or each rater.


# %%
def dice_raters(masks: ArrayLike, predicted: ArrayLike, rater_valid: ArrayLike | None = None) -> np.ndarray:
    """Dice against each valid rater, their mean, for each image: what a random rater thinks of one mask."""
    masks = predictions.check_targets(np.asarray(masks), SEGMENTATION)
    valid = predictions.check_valid(rater_valid, masks)
    scores = np.stack([dice(masks[..., rater], predicted) for rater in range(masks.shape[-1])], 1)
    return (scores * valid).sum(1) / valid.sum(1)


# %% tags=["active-ipynb"]
# raters = np.array([[[[1, 1, 1, 1], [1, 1, 0, 0], [1, 0, 0, 0], [0, 0, 0, 0]]]])  # four pixels, four raters
# print("majority", majority_mask(raters)[0, 0].astype(int), " variance", disagreement(raters)[0, 0])
# print("Dice of the majority against each rater:", dice_raters(raters, majority_mask(raters)).round(3))
# print("the last mask a filler: majority", majority_mask(raters, [[1, 1, 1, 0]])[0, 0].astype(int))

# %% [markdown]
# And do the *sampled* masks vary as the raters do? The *generalised energy distance* (GED; Kohl et al. 2018, eq. 5)
# between samples $S$ and raters $Y$ is $2\, \mathbb{E}\, d(S, Y) - \mathbb{E}\, d(S, S') - \mathbb{E}\, d(Y, Y')$ with
# $d = 1 - \mathrm{IoU}$; a prime is another one drawn from the same set. By hand, two pixels: samples $10, 11$; raters
# $10, 00$. $\mathbb{E}\, d(S, Y) = (0 + 1 + \tfrac12 + 1)/4$, $\mathbb{E}\, d(S, S') = \tfrac14$,
# $\mathbb{E}\, d(Y, Y') = \tfrac12$: in all $1.25 - 0.25 - 0.5 = 0.5$. The second answer matches the masks one to one
# (Hungarian algorithm; Kohl et al. 2019): $10$ with $10$ is 1, $11$ with $00$ is 0, a mean IoU of one half.


# %%
def generalised_energy_distance(
    masks: ArrayLike, probs: ArrayLike, rater_valid: ArrayLike | None = None, spread: bool = False
) -> np.ndarray:
    """Squared distance between the sampled masks and the raters', for each image; 0 if they are identical.

    Samples are cut at 1/2; `spread`: sample m of M at (m - 1/2)/M, which keeps what each is unsure of. All pairs count,
    a mask with itself too: few samples bias it upwards, so compare equal numbers.
    """
    found = []
    for samples, raters in mask_sets(probs, masks, rater_valid, spread):
        within = distances(samples, samples).mean() + distances(raters, raters).mean()
        found.append(2 * distances(samples, raters).mean() - within)
    return np.array(found)


def hungarian_iou(masks: ArrayLike, probs: ArrayLike, rater_valid: ArrayLike | None = None) -> np.ndarray:
    """Mean IoU of sampled and raters' masks, each paired with one of the other so that the mean is largest.

    Both sets are repeated to their least common multiple first, so a rater's mask finds as many samples as its share.
    It rises with the number of samples drawn from one distribution: compare only equal numbers.
    """
    return np.array([1 - matched_distance(distances(*sets)) for sets in mask_sets(probs, masks, rater_valid)])


# %% [markdown]
# **Trap 3: GED without any sampling.** Five *level sets* of one probability map, the masks $p > 0.1, 0.3, \dots, 0.9$,
# come from a single deterministic pass. Two toy images: raters who draw the outline tighter or wider, and raters who
# disagree on *which* of two spots it is. The map is the raters' mean. The "samples" are five masks of a method that
# varies the outline too little, but knows that it is one spot or the other.

# %% tags=["active-ipynb"]
# samples, raters = np.array([[[[1, 0]]], [[[1, 1]]]]), np.array([[[[1, 0], [0, 0]]]])
# print("by hand: GED", generalised_energy_distance(raters, samples), " matched IoU", hungarian_iou(raters, samples))
# row, column = np.mgrid[:48, :48]
# disc = lambda centre, radius: np.hypot(row - 24, column - centre) < radius
# toys = {  # name: the raters' masks, five sampled masks
#     "tight or wide": ([disc(24, r) for r in (7, 10, 13, 16)], [disc(24, r) for r in (10.5, 11, 11.5, 12, 12.5)]),
#     "left or right": ([disc(c, 8) for c in (13, 13, 35, 35)], [disc(13 + 22 * (k % 2), 7 + k / 2) for k in range(5)]),
# }
# levels, rows = np.array([0.1, 0.3, 0.5, 0.7, 0.9])[:, None, None], {}
# for name, (truth, sampled) in toys.items():
#     mean_map, drawn = np.mean(truth, 0), np.stack(truth, -1)[None]
#     sets = {"one mask": mean_map[None] > 0.5, "samples": sampled, "level sets": mean_map > levels, "raters": truth}
#     for key, score in {"GED": generalised_energy_distance, "matched IoU": hungarian_iou}.items():
#         rows[f"{name}, {key}"] = {one: score(drawn, np.array(m, float)[:, None])[0] for one, m in sets.items()}
# nested, either = (rows[f"{name}, GED"] for name in toys)
# assert nested["level sets"] < nested["samples"] and either["samples"] < either["level sets"]
# pd.DataFrame(rows).T.round(3) + 0.0

# %% tags=["active-ipynb", "nbval-ignore-output"]
# figure, axes = plt.subplots(2, 3, figsize=(7, 4), layout="constrained")
# for (name, (truth, _)), (left, middle, bars), ged in zip(toys.items(), axes, (nested, either), strict=True):
#     shown = left.imshow(np.mean(truth, 0), cmap="viridis", vmin=0, vmax=1)
#     figure.colorbar(shown, ax=left, shrink=0.8, label="share of raters")
#     left.set(title=name, xticks=[], yticks=[])
#     shown = middle.imshow((np.mean(truth, 0) > levels).sum(0), cmap="cividis", vmin=0, vmax=5)
#     figure.colorbar(shown, ax=middle, shrink=0.8, label="of 5 level sets")
#     middle.set(title="level sets", xticks=[], yticks=[])
#     bars.barh(list(ged), list(ged.values()), color="0.6")
#     bars.invert_yaxis()
#     bars.set(xlabel="GED (lower is better)")
# plt.show()

# %% [markdown]
# *Reading*: where disagreement is nested, thresholds of one map replay it, and beat samples that vary too little. Where
# it is either-or, the level sets mark both spots or none, which no rater did: samples that choose a side win. So report
# level sets as a row; GED alone does not show that anything was sampled.
#
# ## 7. Does uncertainty find the mistakes?
# Keep the most certain images and refer the rest to a person. *Risk* is what a mistake costs, *coverage* the share of
# images that is kept. The *selective risk* at coverage $k/n$ is the mean risk of the $k$ most certain (Geifman and
# El-Yaniv 2017), with $r_{(i)}$ the risk of the image of the $i$-th least uncertainty:
#
# $$R(k) = \frac1k \sum_{i=1}^{k} r_{(i)}, \qquad \text{area} = \frac1n \sum_{k=1}^{n} R(k).$$
#
# By hand: risks 0, 1, 0, 1 in the order of uncertainty: 0, 1/2, 1/3, 1/2, whose mean, the area, is 0.333. An oracle,
# which knows the risks, would sort them 0, 0, 1, 1 and have 0.208: the *excess* is 0.125 (Geifman et al. 2019).
# Without a curve: the AUC of section 3, with errors as the positives and the uncertainty as the score.
#
# **Trap 4: a better area, a worse uncertainty.** Method A errs in 5 % of 2,000 images and knows nothing of where;
# method B errs in 20 % and its uncertainty ranks its errors well.


# %%
def risk_coverage(uncertainty: ArrayLike, risk: ArrayLike) -> tuple[np.ndarray, np.ndarray]:
    """Coverage 1/n, ..., 1 and the mean risk of the most certain images kept; ties count with their mean risk."""
    uncertainty, risk = predictions.risk_pair(uncertainty, risk)
    _, group, count = np.unique(uncertainty, return_inverse=True, return_counts=True)
    tied = np.repeat(np.bincount(group, risk) / count, count)
    number = np.arange(1, len(risk) + 1)
    return number / len(risk), np.cumsum(tied) / number


# %% tags=["active-ipynb"]
# pair, none = ([1, 2, 3, 4], [0, 1, 0, 1]), [0, 0, 0, 0]  # uncertainties, and who is wrong
# print("curve", risk_coverage(*pair)[1].round(3), f"area {area_under_risk_coverage(*pair):.3f}")
# print(f"excess {excess_area(*pair):.3f}, AUROC {error_auroc(*pair):.2f}, of no errors {error_auroc(pair[0], none)}")
# assert np.isclose(area_under_risk_coverage(*pair), risk_coverage(*pair)[1].mean())
# wrong_a, wrong_b = rng.random(2000) < 0.05, rng.random(2000) < 0.2
# curves = {"A": (rng.random(2000), wrong_a), "B": (rng.normal(size=2000) + 1.5 * wrong_b, wrong_b)}
# curves["oracle of B"] = (wrong_b, wrong_b)
# scores = {"area": area_under_risk_coverage, "excess": excess_area, "AUROC": error_auroc}
# rows = {name: {key: score(*pair) for key, score in scores.items()} for name, pair in curves.items()}
# pd.DataFrame(rows).T.round(3).assign(risk=[pair[1].mean() for pair in curves.values()])

# %% tags=["active-ipynb", "nbval-ignore-output"]
# figure, ax = plt.subplots(figsize=(6, 3.5), layout="constrained")
# plot_risk_coverage(ax, {name: curves[name] for name in ("A", "B")})
# ax.set_title("B gains by referring its uncertain images, A does not")
# plt.show()

# %% [markdown]
# *Reading*: a flat curve knows nothing; its right end is the plain error rate. The area mixes how often a method is
# wrong with how well it knows; the excess and the AUROC show the second alone.
#
# ## 8. The registry
# Two kinds of metrics: the mean of a value of each image, made by a function of a `Case` (some images: probabilities,
# truth, decisions), and a statistic that pools labels or pixels. Both take a *weight* for each image: a bootstrap
# resample is a weighting, a paired test two methods under the same. The paper's are in `core/paper_metrics.py`. To
# add one, define it above and add an entry; scores, intervals, tests and tables follow.


# %%
def image_nll(case: Case, samples: bool = False) -> np.ndarray:
    """Log score of each image, of classes that of the true one: of the mean prediction, or the mean of all samples'."""
    probs = case.probs if samples else case.mean_probs
    if case.task in EXCLUSIVE:
        return np.atleast_2d(-np.log(np.maximum(probs[..., case.targets == 1], LOG_CLIP))).mean(0)
    return case.mean(log_score(case.truth, probs), samples)


def image_risk(case: Case) -> np.ndarray:
    """What a mistake costs, for each image: the share of wrong labels, a wrong class, or 1 - Dice."""
    return 1 - dice(case.actual, case.decision) if case.task == SEGMENTATION else case.wrong.mean(1)


# %%
_MASKS, _INF = (SEGMENTATION,), np.inf
_UP, _DOWN, _LOSS, _SIZE = (0, 1, True), (0, 1, False), (0, _INF, False), (0, _INF, None)
# fmt: off
_ENTRIES: list[tuple] = [  # name, tasks, (lowest, highest, is higher better), how, meaning
    ("nll", TASKS, *_LOSS, image_nll, "negative log likelihood, nats per label, pixel or image"),
    ("member_nll", TASKS, *_LOSS, lambda case: image_nll(case, True), "the samples' own, mean: above the nll"),
    ("brier", TASKS, 0, 2, False, of.image_brier, "squared error of the probabilities; of classes summed, 0 to 2"),
    ("brier_skill", TASKS, -_INF, 1, True, of.SKILL, "1 - Brier / Brier of the training prevalence: 0 is no skill"),
    ("ece", TASKS, *_DOWN, of.ECE, "expected calibration error, 15 bins of equal width, pooled"),
    ("ece_mass", TASKS, *_DOWN, of.ECE_MASS, "expected calibration error, 15 bins of equal count, pooled"),
    ("ece_label", LABELS, *_DOWN, of.ECE_LABEL, "calibration error of each label or class, mean, equal width"),
    ("ece_label_mass", LABELS, *_DOWN, of.ECE_LABEL_MASS, "the same in bins of equal count"),
    ("auc", LABELS, *_UP, of.AUC, "area under the ROC curve, mean over the labels that have both 0 and 1"),
    ("auc_num_labels", LABELS, *_SIZE, of.NUM_LABELS, "how many labels these are"),
    ("average_precision", LABELS, *_UP, of.PRECISION, "average precision, mean over the same labels"),
    ("accuracy", LABELS, *_UP, lambda case: (~case.wrong).mean(1),
     "share of right decisions; with rare labels, 1 - prevalence is free"),
    ("label_error_auroc", of.INDEPENDENT, *_UP, of.LABEL_ERRORS, "AUROC of a label's entropy for its being wrong"),
    ("mean_absolute_error", (ORDINAL,), *_LOSS, lambda case: np.abs(case.decision - case.actual).mean(1),
     "distance of the predicted from the true grade, in grades"),
    ("quadratic_kappa", (ORDINAL,), -1, 1, True, of.KAPPA, "agreement of the grades beyond chance, quadratic weights"),
    ("num_images", TASKS, 1, _INF, None, of.COUNT, "test images scored"),
    ("entropy", TASKS, *_SIZE, of.part("entropy"), "entropy of the mean prediction, nats: how unsure it is in all"),
    ("expected_entropy", TASKS, *_SIZE, of.part("expected_entropy"), "mean entropy of the samples, nats"),
    ("mutual_information", TASKS, *_SIZE, of.part("mutual_information"),
     "entropy minus expected_entropy, nats: how far samples disagree"),
    ("risk", TASKS, *_DOWN, image_risk, "mean error of an image: share of wrong labels, wrong class, or 1 - Dice"),
    ("aurc", TASKS, *_DOWN, of.AREA, "area under the risk-coverage curve: mean error if unsure images are refused"),
    ("excess_aurc", TASKS, *_DOWN, of.EXCESS, "that area minus the oracle's, which refuses the worst images first"),
    ("error_auroc", TASKS, *_UP, of.ERRORS, "AUROC of an image's entropy for its prediction being wrong"),
    ("error_auroc_mi", TASKS, *_UP, of.ERRORS_MI, "AUROC of an image's mutual information for its being wrong"),
]

# %%
_ENTRIES += [
    ("dice", _MASKS, *_UP, of.overlap(dice), "Dice with the majority mask, mean over images"),
    ("iou", _MASKS, *_UP, of.overlap(iou), "intersection over union with the majority mask, mean over images"),
    ("hausdorff95", _MASKS, *_LOSS, of.overlap(hausdorff95),
     "95th percentile of the distance between the outlines, pixels",
     "boundary=False: boundaries were not measured", True),
    ("ece_region", _MASKS, *_DOWN, of.ECE_REGION, "calibration error of pixels marked by a rater or the prediction"),
    ("ged", _MASKS, 0, 2, False, of.of_raters(generalised_energy_distance),
     "generalised energy distance of the sampled masks to the raters' masks", of.ONE_RATER),
    ("ged_spread", _MASKS, 0, 2, False, of.of_raters(generalised_energy_distance, spread=True),
     "the same of M samples cut at 1/2M, 3/2M, ... instead of each at 1/2", of.ONE_RATER),
    ("hungarian_iou", _MASKS, *_UP, of.of_raters(hungarian_iou),
     "IoU of sampled masks and raters' masks, best matched one to one", of.ONE_RATER),
    ("dice_raters", _MASKS, *_UP, of.of_raters(dice_raters, decided=True),
     "Dice with each rater's mask, mean over raters and images", of.ONE_RATER),
    ("entropy_disagreement_pearson", _MASKS, -1, 1, True, of.CORRELATION,
     "correlation over pixels of entropy and raters' variance"),
    ("pixel_error_auroc", _MASKS, *_UP, of.PIXEL_ERRORS, "AUROC of a pixel's entropy for that pixel being wrong"),
    ("pixel_error_auroc_mi", _MASKS, *_UP, of.PIXEL_ERRORS_MI,
     "AUROC of a pixel's mutual information for its being wrong"),
]
# fmt: on
METRICS: dict[str, Metric] = {entry[0]: of.metric(*entry) for entry in [*_ENTRIES, *paper_metrics.ENTRIES]}

# %% [markdown]
# | question | number | ignoring the image scores | it hides |
# |---|---|---|---|
# | are the probabilities good, all in all? | `nll`, `brier` | the prevalence's | ranking or calibration? |
# | are they better than the prevalence? | `brier_skill` | 0 | small differences, if the event is rare |
# | how often is the decision right? | `accuracy` | 1 - prevalence: often best | everything about the rare positives |
# | do they mean what they say? | `ece` | 0: perfect | whether they separate anyone |
# | do they rank? | `auc` | 0.5 | calibration, and rarity |
# | can I find the few positives? | `average_precision` | the prevalence | calibration |
# | how unsure, and why? | `entropy`, `mutual_information` | any | whether it is right to be unsure |
# | do the masks overlap? | `dice`, `iou` | 0; 1 for empty truths | where they differ, and how unsure |
# | how far off is the outline? | `hausdorff95` | the diagonal | the size of what was missed |
# | do samples vary as raters do? | `ged`, `hungarian_iou` | the mean mask's | was anything sampled? |
# | does it see where raters differ? | `entropy_disagreement_pearson` | the mean mask's: 0.55 | was anything seen? |
# | does it know its wrong images? | `excess_aurc`, `error_auroc` | 0.5 (AUROC) | how many mistakes there are |
# | does it know its wrong pixels? | `pixel_error_auroc` | the mean mask's: 0.93 | was anything seen? |
#
# The mean mask's numbers are of `phantom_nodule`'s test split: it is unsure where lesions end, where errors lie.
#
# ## Summary
# Put the trivial predictor's score beside every number. Proper scores judge the whole; ECE, AUC and entropy a part.
#
# ## Exercises
# 1. All 14 probabilities are 0.5. What are `accuracy`, `ece` and `paper_entropy` if 5 % of the labels are 1?
#    <details><summary>Answer</summary>0.95 (`p > 0.5` is false everywhere), 0.45, and 14 * 0.5 ln 2 = 4.85. Lower
#    entropy would not be better calibrated: the all-0 prediction has 0.</details>
# 2. Why is `brier(soft, mean_probs)` lower than the mean over raters of `brier(mask, mean_probs)`, and by how much?
#    <details><summary>Answer</summary>By the raters' variance, `disagreement(masks).mean()`.</details>
#
# ## References
# Brier (1950), Murphy (1988), Monthly Weather Review. Murphy (1973), J. Applied Meteorology 12. Stephenson et al.
# (2008), Weather and Forecasting 23. Hanley, McNeil (1982), Radiology 143. Gneiting, Raftery (2007), JASA 102. Guo
# et al. (2017), Depeweg et al. (2018), ICML. Nixon et al. (2019), CVPR Workshops. Huttenlocher et al. (1993), IEEE
# TPAMI 15. Taha, Hanbury (2015), BMC Medical Imaging 15. Kohl et al. (2018), NeurIPS; (2019), arXiv 1905.13077.
# Geifman, El-Yaniv (2017), NeurIPS; Geifman, Uziel, El-Yaniv (2019), ICLR. Abboud, Lombaert, Kadoury (2024), MICCAI.
