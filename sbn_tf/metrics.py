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

from collections.abc import Iterator

import numpy as np

from sbn_tf.datasets.arrays import DiskArray
from sbn_tf.datasets.base import BINARY, EXCLUSIVE, MULTI_LABEL, ORDINAL, SEGMENTATION, TASKS

__all__ = [
    "TASKS",
    "accuracy",
    "auc_per_label",
    "average_precision_per_label",
    "binary_entropy",
    "brier",
    "dice",
    "ece",
    "evaluate",
    "generalised_energy_distance",
    "iou",
    "majority_mask",
    "nll",
    "paper_accuracy",
    "paper_brier",
    "paper_dice",
    "paper_entropy",
    "paper_iou",
    "per_image",
    "prevalence",
    "trivial",
    "uncertainty",
]

# A log score is infinite for one certain and wrong prediction; clipped here, that costs 16.1 nats.
LOG_CLIP = 1e-7
# Segmentation is computed some images at a time, so memory does not grow with the test set.
CHUNK_VALUES = 2**22
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
# Everything at once
# ---------------------------------------------------------------------------


def evaluate(
    probs,
    targets,
    task: str,
    *,
    rater_valid=None,
    train_prevalence=None,
) -> dict[str, float | dict[str, str]]:
    """Every metric of a method's probabilities, as plain floats ready for JSON.

    All tasks: "nll", "brier", "ece" (15 bins, pooled), "entropy", "expected_entropy", "mutual_information"
    (nats per label, pixel or classified image), "brier_skill" (`1 - brier / brier of train_prevalence`).

    Multi-label and binary: "auc" and "average_precision" (means over the labels that occur as both 0 and 1),
    "auc_num_labels" (how many these are), "accuracy"; multi-label also "paper_accuracy", "paper_brier",
    "paper_entropy".

    Multi-class and ordinal: the same keys, but of one event an image. "auc" and "average_precision" are means
    over the classes, each against the rest, as in MedMNIST's evaluator, and "auc_num_labels" counts classes;
    "accuracy" is that of the most probable class; "nll" is `-ln p` of the true class; "brier" the sum over
    classes of `(p - y)^2`, 0 to 2; "ece" is of the most probable class's probability against its being right
    (Guo et al. 2017). Ordinal also: "mean_absolute_error" of the most probable grade, in grades, and
    "quadratic_kappa", its agreement with the truth beyond chance (Cohen 1968, quadratic weights).

    Segmentation: "dice" and "iou" (the mean prediction cut at 0.5 against the majority mask, mean over
    images, an image with both empty counts as 1); nll, brier and ece against a random valid rater, so with
    raters who disagree the best possible brier is their variance and not 0. Over the images with two or
    more valid raters: "ged", the generalised energy distance; "dice_raters", Dice against each rater;
    "entropy_disagreement_pearson", the Pearson correlation over all pixels of predictive entropy and the
    raters' variance. Then "paper_dice", "paper_iou", "paper_brier", "paper_brier_softmax_twice",
    "paper_entropy", where a rater is random too.

    Args:
        probs: (samples, batch, labels), or (samples, batch, height, width) or (..., width, 1):
            probabilities of 1; of classes they sum to 1, but for rounding, and are scaled to do so exactly.
        targets: (batch, labels), or (batch, height, width, raters): 0 or 1; one-hot for classes.
        task: one of `TASKS`.
        rater_valid: (batch, raters) bool, False where that mask is a filler; segmentation only, None if all
            are.
        train_prevalence: training frequency of 1 (see `prevalence`): a number, (labels,) or (height, width).

    Returns:
        The metrics, and "undefined": the reason for each key that these data leave undefined, {} if none
        does.

    Raises:
        ValueError: probabilities outside 0..1 or NaN or, of classes, that do not sum to 1, targets other than 0
            and 1 or not one-hot, shapes that do not fit, an empty batch, an image without a valid rater, an
            unknown task.
    """
    probs, targets, valid = _check(probs, targets, task, rater_valid)
    if task in EXCLUSIVE:
        return _evaluate_classes(probs, targets, task, train_prevalence)
    if task != SEGMENTATION:
        return _evaluate_labels(probs, targets, task, train_prevalence)
    return _evaluate_segmentation(probs, targets, valid, train_prevalence)


def per_image(probs, masks, rater_valid=None) -> dict[str, np.ndarray]:
    """The segmentation metrics of each image, for distributions, worst cases and paired tests.

    Args:
        probs: (samples, batch, height, width) or (..., width, 1).
        masks: (batch, height, width, raters), 0 or 1.
        rater_valid: (batch, raters) bool; None if all are.

    Returns:
        Key -> (batch,) float64. Keys as in `evaluate`, whose value is the mean, without "ece",
        "brier_skill" and "entropy_disagreement_pearson", which are not means over images. "ged" and
        "dice_raters" are NaN for an image with fewer than two valid raters.

    Raises:
        ValueError: as `evaluate`.
    """
    probs, masks, valid = _check(probs, masks, SEGMENTATION, rater_valid)
    parts = [_score_images(*chunk) for chunk in _chunks(probs, masks, valid)]
    return {key: np.concatenate([part[key] for part in parts]) for key in parts[0]}


def prevalence(task: str, targets, rater_valid=None) -> np.ndarray:
    """Frequency of 1 in the targets: of each label or class, (labels,), or of each pixel, (height, width).

    Args:
        task: one of `TASKS`.
        targets: (batch, labels), or (batch, height, width, raters): 0 or 1.
        rater_valid: (batch, raters) bool; None if all are. Each image counts once, however many its raters.

    Returns:
        float64 in 0..1, of shape (labels,) or (height, width).
    """
    targets = _check_targets(targets, task)
    if task != SEGMENTATION:
        return targets.mean(0, dtype="float64")
    valid = _check_valid(rater_valid, targets)
    total = np.zeros(targets.shape[1:3])
    for start in range(0, len(targets), 256):
        part = slice(start, start + 256)
        total += _rater_mean(targets[part], valid[part]).sum(0)
    return total / len(targets)


def trivial(
    task: str,
    train_targets,
    test_targets,
    *,
    rater_valid=None,
    train_rater_valid=None,
) -> dict[str, dict[str, float | dict[str, str]]]:
    """Rows of predictors that never look at an image, scored by the same `evaluate`.

    Args:
        task: one of `TASKS`.
        train_targets: (batch, labels), or (batch, height, width, raters): what the prevalence is taken from.
        test_targets: the same, what is predicted.
        rater_valid: of the test targets, as in `evaluate`.
        train_rater_valid: of the training targets.

    Returns:
        "all_negative" (labels) or "all_background" (masks): probability 0 everywhere; "most_frequent"
        (classes): probability 1 of the most frequent training class; "prevalence": the training frequency of
        each label or class, or the mean training mask of each pixel. Each a row of `evaluate`.
    """
    test_targets = _check_targets(test_targets, task)
    frequency = prevalence(task, train_targets, train_rater_valid)
    shape = (1, *test_targets.shape[: 3 if task == SEGMENTATION else 2])
    if task in EXCLUSIVE:
        constant, values = "most_frequent", np.eye(len(frequency))[frequency.argmax()]
    else:
        constant, values = "all_background" if task == SEGMENTATION else "all_negative", 0.0
    options = {"rater_valid": rater_valid, "train_prevalence": frequency}
    return {
        name: evaluate(_broadcast(values, shape, "train_targets"), test_targets, task, **options)
        for name, values in ((constant, values), ("prevalence", frequency))
    }


def _evaluate_labels(probs, labels, task, train_prevalence):
    probs, labels = np.minimum(_float64(probs), 1), _float64(labels)
    parts = uncertainty(probs)
    mean_probs = parts.pop("mean_probs")
    result, undefined = _ranking(mean_probs, labels)
    result["accuracy"] = accuracy(mean_probs, labels)
    result["nll"] = nll(mean_probs, labels)
    result["brier"] = brier(mean_probs, labels)
    reference = None
    if train_prevalence is not None:
        reference = brier(_broadcast(train_prevalence, labels.shape, "train_prevalence"), labels)
    _add_skill(result, undefined, reference)
    result["ece"] = ece(mean_probs, labels)
    result |= {key: float(value.mean()) for key, value in parts.items()}
    if task == MULTI_LABEL:
        result["paper_accuracy"] = paper_accuracy(probs, labels)
        result["paper_brier"] = paper_brier(probs, labels)
        result["paper_entropy"] = paper_entropy(probs)
    return {**result, "undefined": undefined}


def _evaluate_classes(probs, targets, task, train_prevalence):
    probs, targets = _float64(probs), _float64(targets)
    parts = uncertainty(probs / probs.sum(-1, keepdims=True), task)
    mean_probs = parts.pop("mean_probs")
    result, undefined = _ranking(mean_probs, targets)
    predicted, true = mean_probs.argmax(-1), targets.argmax(-1)
    result["accuracy"] = float((predicted == true).mean())
    result["nll"] = float(-np.log(np.maximum(mean_probs[targets == 1], LOG_CLIP)).mean())
    result["brier"] = _class_brier(mean_probs, targets)
    reference = None
    if train_prevalence is not None:
        reference = _class_brier(_broadcast(train_prevalence, targets.shape, "train_prevalence"), targets)
    _add_skill(result, undefined, reference)
    result["ece"] = ece(mean_probs.max(-1), predicted == true)
    result |= {key: float(value.mean()) for key, value in parts.items()}
    if task == ORDINAL:
        result["mean_absolute_error"] = float(np.abs(predicted - true).mean())
        # In closed form: squared distances of the pairs over those of all pairs, the classes of chance.
        by_chance = predicted.var() + true.var() + (predicted.mean() - true.mean()) ** 2
        if by_chance > 0:
            result["quadratic_kappa"] = float(1 - np.square(predicted - true).mean() / by_chance)
        else:
            undefined["quadratic_kappa"] = "every grade, predicted and true, is the same one"
    return {**result, "undefined": undefined}


def _evaluate_segmentation(probs, masks, valid, train_prevalence):
    scores, bins, moments, reference = [], 0.0, 0.0, None
    if train_prevalence is not None:
        train_prevalence, reference = _broadcast(train_prevalence, probs.shape[2:], "train_prevalence"), 0.0
    for chunk_probs, chunk_masks, chunk_valid in _chunks(probs, masks, valid):
        scores.append(_score_images(chunk_probs, chunk_masks, chunk_valid))
        mean_probs, soft = chunk_probs.mean(0, dtype="float64"), _rater_mean(chunk_masks, chunk_valid)
        bins = bins + _calibration_bins(mean_probs, soft, 15)
        several = chunk_valid.sum(1) > 1
        moments = moments + _moments(binary_entropy(mean_probs[several]), (soft * (1 - soft))[several])
        if reference is not None:
            reference += _soft_brier(train_prevalence, soft).mean((1, 2)).sum()
    result, undefined = {}, {}
    for key in scores[0]:
        values = np.concatenate([part[key] for part in scores])
        if np.isnan(values).all():
            undefined[key] = "no image has two or more valid raters"
        else:
            result[key] = float(np.nanmean(values))
    _add_skill(result, undefined, None if reference is None else reference / len(masks))
    result["ece"] = _ece_of_bins(bins)
    key = "entropy_disagreement_pearson"
    if moments[0] == 0:
        undefined[key] = "no image has two or more valid raters"
    else:
        _, mean_x, mean_y, square_x, square_y, product = moments / moments[0]
        variance_x, variance_y = square_x - mean_x**2, square_y - mean_y**2
        if min(variance_x, variance_y) > 1e-12:
            result[key] = float((product - mean_x * mean_y) / np.sqrt(variance_x * variance_y))
        else:
            undefined[key] = "the entropy or the raters' variance is the same at every pixel"
    return {**result, "undefined": undefined}


def _score_images(probs, masks, valid):
    """Key -> (batch,) for some images, in float64."""
    parts = uncertainty(probs)
    mean_probs, soft = parts.pop("mean_probs"), _rater_mean(masks, valid)
    predicted, majority = mean_probs > 0.5, soft >= 0.5
    several = valid.sum(1) > 1
    pixels = (1, 2)
    scores = {
        "dice": dice(predicted, majority),
        "iou": iou(predicted, majority),
        "nll": _nll(mean_probs, soft).mean(pixels),
        "brier": _soft_brier(mean_probs, soft).mean(pixels),
        **{key: value.mean(pixels) for key, value in parts.items()},
        "ged": np.full(len(masks), np.nan),
        "dice_raters": np.full(len(masks), np.nan),
    }
    if several.any():
        scores["ged"][several] = _energy_distance(probs[:, several], masks[several], valid[several])

    weights = valid / valid.sum(1, keepdims=True)  # (batch, raters)

    def over_raters(score):
        return sum(weights[:, rater] * score(masks[..., rater]) for rater in range(masks.shape[-1]))

    scores["dice_raters"][several] = over_raters(lambda mask: dice(predicted, mask))[several]
    scores["paper_dice"] = paper_dice(probs, soft)
    scores["paper_iou"] = over_raters(lambda mask: paper_iou(probs, mask))
    twice = 1 / (1 + np.exp(1 - 2 * probs))
    scores["paper_brier"] = _soft_brier(probs, soft).mean((0, 2, 3))
    scores["paper_brier_softmax_twice"] = _soft_brier(twice, soft).mean((0, 2, 3))
    scores["paper_entropy"] = scores["entropy"]
    return scores


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


def _broadcast(values, shape, name):
    try:
        return np.broadcast_to(_float64(values), shape)
    except ValueError as error:
        raise ValueError(
            f"Expected {name} to fit predictions of shape {shape}. Received: shape {np.shape(values)}"
        ) from error


def _chunks(probs, masks, valid) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    size = max(1, CHUNK_VALUES // (probs[:, 0].size))
    for start in range(0, len(masks), size):
        part = slice(start, start + size)
        yield np.minimum(_float64(probs[:, part]), 1), masks[part], valid[part]


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


def _class_brier(mean_probs, targets):
    return float(np.square(mean_probs - targets).sum(-1).mean())


def _nll(probs, targets):
    probs = np.clip(probs, LOG_CLIP, 1 - LOG_CLIP)
    return -(targets * np.log(probs) + (1 - targets) * np.log1p(-probs))


def _soft_brier(probs, soft):
    # The mean over raters of (p - y)^2, of which y (1 - y) is the raters' own variance.
    return np.square(probs - soft) + soft * (1 - soft)


def _ranking(mean_probs, labels):
    """Ranking scores of each label or class against the rest, as means; with the reasons where there is none."""
    auc = auc_per_label(mean_probs, labels)
    defined = ~np.isnan(auc)
    result, undefined = {"auc_num_labels": float(defined.sum())}, {}
    if defined.any():
        result["auc"] = float(auc[defined].mean())
        precision = average_precision_per_label(mean_probs[:, defined], labels[:, defined])
        result["average_precision"] = float(precision.mean())
    else:
        undefined["auc"] = undefined["average_precision"] = "no label occurs as both 0 and 1"
    return result, undefined


def _add_skill(result, undefined, reference):
    if reference is None:
        undefined["brier_skill"] = "train_prevalence was not given"
    elif reference == 0:
        undefined["brier_skill"] = "the training prevalence predicts these targets without error"
    else:
        result["brier_skill"] = float(1 - result["brier"] / reference)


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


def _moments(x, y):
    return np.array([x.size, x.sum(), y.sum(), (x * x).sum(), (y * y).sum(), (x * y).sum()])
