"""Every metric of a method at once: from streams of any size, with intervals and paired tests."""

from collections.abc import Iterator

import numpy as np

from sbn_tf.datasets.base import EXCLUSIVE, MULTI_LABEL, ORDINAL, SEGMENTATION
from sbn_tf.metrics import (
    LOG_CLIP,
    _calibration_bins,
    _check,
    _check_targets,
    _check_valid,
    _ece_of_bins,
    _energy_distance,
    _float64,
    _nll,
    _rater_mean,
    _soft_brier,
    accuracy,
    auc_per_label,
    average_precision_per_label,
    binary_entropy,
    brier,
    dice,
    ece,
    iou,
    nll,
    paper_accuracy,
    paper_brier,
    paper_dice,
    paper_entropy,
    paper_iou,
    uncertainty,
)

__all__ = ["evaluate", "per_image", "prevalence", "trivial"]

# Segmentation is computed some images at a time, so memory does not grow with the test set.
CHUNK_VALUES = 2**22


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


def _class_brier(mean_probs, targets):
    return float(np.square(mean_probs - targets).sum(-1).mean())


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


def _moments(x, y):
    return np.array([x.size, x.sum(), y.sum(), (x * x).sum(), (y * y).sum(), (x * y).sum()])
