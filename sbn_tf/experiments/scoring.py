"""Every metric of a method at once: from streams of any size, with intervals and paired tests.

An `Evaluator` reduces each image to a few statistics; their arrays are a `Record`. Every metric is a function of these
and of a weight for each image, so reading in pieces is concatenation, a bootstrap is a weighting, and a paired test is
two records under the same weights. A record takes memory for images, not for pixels or samples: about 100 bytes an
image and 9 a label or class, or 13 kB an image with masks of any size.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import uuid
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import ArrayLike

from sbn_tf.datasets.base import (
    BINARY,
    EXCLUSIVE,
    MULTI_CLASS,
    MULTI_LABEL,
    ORDINAL,
    SEGMENTATION,
    TASKS,
    Data,
    Split,
)
from sbn_tf.metrics import (
    LOG_CLIP,
    _broadcast,
    _check,
    _check_range,
    _check_targets,
    _check_valid,
    _drop_channel,
    _energy_distance,
    _float64,
    _nll,
    _rater_mean,
    _soft_brier,
    binary_entropy,
    dice,
    dice_raters,
    hausdorff95,
    hungarian_iou,
    iou,
    majority_mask,
    paper_dice,
    paper_iou,
    uncertainty,
)

__all__ = [
    "Evaluator",
    "Record",
    "compare",
    "evaluate",
    "level_sets",
    "per_image",
    "prevalence",
    "score",
    "select_threshold",
    "shift_auroc",
    "shifted",
    "trivial",
    "trivial_records",
]

# Masks are scored some images at a time, and a bootstrap runs some resamples, so memory stays bounded.
# Temporary arrays of 8 MB are kept by the allocator; the pages of larger ones are new each time, which costs more than
# the arithmetic.
CHUNK_VALUES = 2**20
NUM_BINS = 15  # of every calibration error
# Two uncertainties that differ by less are one: rounding must not rank images.
DECIMALS = 12
# Pixels are kept as counts, in bins of equal width in asinh(logit(p) / LOGIT_UNIT), 0.001 of the logit near p = 1/2 and
# 1/90 of it elsewhere, and of ln of the mutual information from 1e-10 to ln 2, 1/11 each.
LOGIT_LIMIT, LOGIT_UNIT, LOGIT_BINS = 16, 0.1, 1024
INFORMATION_LOW, INFORMATION_BINS = 1e-10, 256

_UNCERTAINTIES = ("entropy", "expected_entropy", "mutual_information")
_IMAGES = ("risk", "aurc", "excess_aurc", "error_auroc", "error_auroc_mi", "num_images")
_PROBABILITIES = ("nll", "brier", "brier_skill", "ece", "ece_mass")
_LABELS = (
    *("auc", "average_precision", "auc_num_labels", "accuracy"),
    *_PROBABILITIES,
    *("ece_label", "ece_label_mass"),
    *_UNCERTAINTIES,
    *_IMAGES,
)
_KEYS = {
    BINARY: (*_LABELS, "label_error_auroc"),
    MULTI_LABEL: (*_LABELS, "label_error_auroc", "paper_accuracy", "paper_brier", "paper_entropy", "paper_ece"),
    MULTI_CLASS: _LABELS,
    ORDINAL: (*_LABELS, "mean_absolute_error", "quadratic_kappa"),
    SEGMENTATION: (
        *("dice", "iou", "hausdorff95"),
        *_PROBABILITIES,
        *_UNCERTAINTIES,
        "ece_region",
        *("ged", "hungarian_iou", "dice_raters", "entropy_disagreement_pearson"),
        *_IMAGES,
        *("pixel_error_auroc", "pixel_error_auroc_mi"),
        *("paper_dice", "paper_iou", "paper_brier", "paper_brier_softmax_twice", "paper_entropy", "paper_ece"),
    ),
}
_COUNTS = ("num_images", "auc_num_labels")
_WITH_RATERS = ("ged", "hungarian_iou", "dice_raters")


# ---------------------------------------------------------------------------
# From predictions to a record
# ---------------------------------------------------------------------------


class Evaluator:
    """Collects what the metrics need of each image, from predictions in pieces of any size.

    Args:
        task: one of `TASKS`.
        train_prevalence: training frequency of 1 (see `prevalence`): a number, (labels,) or (height, width), for
            "brier_skill"; None: that is undefined.
        threshold: where the mean prediction is cut into a decision, between 0 and 1. Classes that exclude one another
            are decided by the most probable. Sampled masks and the paper's metrics are cut at 0.5 always.
        boundary: measure "hausdorff95", which takes some milliseconds an image.
        only: metrics that these predictions are fit for, such as ("ged", "hungarian_iou") for masks that are no
            draws from a distribution; all others are then undefined. None: all.

    Raises:
        ValueError: an unknown task or metric, a threshold or a prevalence outside 0..1.
    """

    def __init__(
        self,
        task: str,
        *,
        train_prevalence: ArrayLike | None = None,
        threshold: float = 0.5,
        boundary: bool = True,
        only: Sequence[str] | None = None,
    ):
        if task not in TASKS:
            raise ValueError(f"Expected task to be one of {TASKS}. Received: task={task!r}")
        if not 0 < threshold < 1:
            raise ValueError(f"Expected threshold between 0 and 1. Received: threshold={threshold!r}")
        if unknown := [key for key in only or () if key not in _KEYS[task]]:
            raise ValueError(f"Expected only among {_KEYS[task]}. Received: {unknown}")
        frequency = None if train_prevalence is None else _float64(train_prevalence)
        if frequency is not None and not ((frequency >= 0) & (frequency <= 1)).all():  # nor NaN
            low, high = frequency.min(), frequency.max()
            raise ValueError(f"Expected train_prevalence in 0..1. Received: values from {low} to {high}")
        self.task, self.train_prevalence, self.threshold = task, frequency, float(threshold)
        self.boundary, self.only = boundary, None if only is None else tuple(only)
        self._parts: list[dict[str, np.ndarray]] = []
        self._shape: tuple[tuple[int, ...], int] | None = None  # of a target, and number of samples
        self._groups: list[np.ndarray] | None = []
        self._has_ids = True
        self._hashes = {name: hashlib.blake2b(digest_size=16) for name in ("targets", "raters", "ids")}

    def update(
        self,
        probs: ArrayLike,
        targets: ArrayLike,
        rater_valid: ArrayLike | None = None,
        groups: Sequence | np.ndarray | None = None,
        ids: Sequence | np.ndarray | None = None,
    ) -> None:
        """Add some images.

        Args:
            probs: (samples, batch, labels), or (samples, batch, height, width) or (..., width, 1): probabilities
                of 1; of classes they sum to 1, but for rounding, and are scaled to do so exactly.
            targets: (batch, labels), or (batch, height, width, raters), 0 or 1; one-hot for classes. Masks may be
                a `DiskArray`.
            rater_valid: (batch, raters) bool, False where that mask is a filler; segmentation only, None if all are.
            groups: (batch,) patient of each image; resampled whole, if every update gives them.
            ids: (batch,) name of each image; a paired test compares them.

        Raises:
            ValueError: probabilities outside 0..1 or NaN or, of classes, that do not sum to 1, targets other than
                0 and 1 or not one-hot, shapes that do not fit one another or the images before, an empty batch,
                an image without a valid rater.
        """
        samples, truths, valid = _check(probs, targets, self.task, rater_valid)
        shape = (truths.shape[1:3] if self.task == SEGMENTATION else truths.shape[1:], len(samples))
        if self._shape is not None and self._shape != shape:
            raise ValueError(
                f"Expected targets and samples as before, {self._shape[0]} and {self._shape[1]}. "
                f"Received: {shape[0]} and {shape[1]}"
            )
        for name, values in (("groups", groups), ("ids", ids)):
            if values is not None and len(values) != len(truths):
                raise ValueError(f"Expected {name} of {len(truths)} images. Received: {len(values)}")
        reference = None
        if self.train_prevalence is not None:
            reference = _broadcast(self.train_prevalence, shape[0], "train_prevalence")
        if self.task == SEGMENTATION:
            boundary = self.boundary and (self.only is None or "hausdorff95" in self.only)
            for chunk in _chunks(samples, truths, valid):
                self._hashes["targets"].update(_bytes(chunk[1] * chunk[2][:, None, None, :]))
                self._hashes["raters"].update(_bytes(chunk[2]))
                self._parts.append(_score_masks(*chunk, reference, self.threshold, boundary))
        else:
            scores = _score_classes if self.task in EXCLUSIVE else _score_labels
            self._hashes["targets"].update(_bytes(truths))
            self._parts.append(scores(samples, truths, reference, self.threshold, self.task))
        self._shape = shape
        self._groups = None if groups is None or self._groups is None else [*self._groups, np.asarray(groups)]
        self._has_ids = self._has_ids and ids is not None
        if ids is not None:
            self._hashes["ids"].update("".join(f"{name}\n" for name in np.asarray(ids).tolist()).encode())

    def record(self) -> Record:
        """The statistics of all images so far.

        Raises:
            ValueError: there are none.
        """
        if not self._parts or self._shape is None:
            raise ValueError("Expected one image or more: call update first. Received: none")
        arrays = {key: np.concatenate([part[key] for part in self._parts]) for key in self._parts[0]}
        groups = None
        if self._groups is not None:
            groups = np.unique(np.concatenate(self._groups), return_inverse=True)[1].astype("int64")
        digests = {
            "images": "".join(self._hashes[name].hexdigest() for name in ("targets", "raters")) + str(self._shape[0]),
            "ids": self._hashes["ids"].hexdigest() if self._has_ids else "",
        }
        return Record(
            self.task,
            arrays,
            threshold=self.threshold,
            num_samples=self._shape[1],
            groups=groups,
            digests=digests,
            only=self.only,
        )


def score(
    predict_samples: Callable,
    split: Split,
    task: str,
    *,
    batch_size: int = 50,
    train_prevalence: ArrayLike | None = None,
    threshold: float = 0.5,
    boundary: bool = True,
    shift: tuple[str, float] | None = None,
    verbose: bool = True,
) -> Record:
    """Predict a split in batches and keep the statistics of each image: memory does not grow with the split's pixels.

    Args:
        predict_samples: normalised float32 images (batch, height, width, channels) -> probabilities
            (samples, batch, labels) or (samples, batch, height, width).
        split: `datasets.Split`.
        task: one of `TASKS`.
        batch_size: images a call.
        train_prevalence, threshold, boundary: as for `Evaluator`.
        shift: (kind, severity) of `shifted`, done to every image; None: as they are.
        verbose: show a progress bar.

    Raises:
        ValueError: predictions of another shape, or NaN: the message names the images; else as `Evaluator`.
    """
    from tqdm import tqdm

    evaluator = Evaluator(task, train_prevalence=train_prevalence, threshold=threshold, boundary=boundary)
    name = f"{split.name}, {shift[0]} {shift[1]:g}" if shift else split.name
    steps = range(split.steps(batch_size))
    for step in tqdm(steps, desc=f"score {name}", unit="batch", mininterval=2.0, disable=not verbose):
        start = step * batch_size
        part = slice(start, start + batch_size)
        images = split.normalised(part)
        if shift:
            images = shifted(images, *shift, offset=start)
        probs = _predicted(predict_samples, images, split, start)
        targets = split.targets[part]
        extra = {key: _part(getattr(split, key), part) for key in ("rater_valid", "groups", "ids")}
        evaluator.update(probs, targets, **extra)
    return evaluator.record()


def _predicted(predict_samples, images, split, start):
    probs = _drop_channel(np.asarray(predict_samples(images)))
    shape = split.targets.shape[1:3] if split.task == SEGMENTATION else split.targets.shape[1:]
    names = f"images {start} to {start + len(images) - 1} of split {split.name!r}"
    if probs.ndim != 2 + len(shape) or probs.shape[1:] != (len(images), *shape) or not len(probs):
        expected = ", ".join(map(str, ("samples", len(images), *shape)))
        raise ValueError(f"Expected predictions ({expected}) for {names}. Received: shape {probs.shape}")
    finite = np.isfinite(probs).all(axis=(0, *range(2, probs.ndim)))
    if not finite.all():
        raise ValueError(
            f"Expected probabilities for {names}. Received: NaN or infinity for {(~finite).sum()} of them, first "
            f"image {start + int(np.argmin(finite))}.\nThe training may have diverged: look at its loss."
        )
    return probs


def _part(values, part):
    return None if values is None else values[part]


def _bytes(values):
    return np.ascontiguousarray(values).astype("uint8").data


def _score_labels(probs, labels, reference, threshold, task):
    """Key -> (batch, ...) for some images."""
    from scipy.special import entr

    probs, truth = np.minimum(_float64(probs), 1), _float64(labels)
    parts = uncertainty(probs)
    mean_probs = parts.pop("mean_probs")
    right = (mean_probs > threshold) == (truth > 0.5)
    scores = {
        "mean_probs": mean_probs,
        "targets": labels.astype("uint8"),
        "nll": _nll(mean_probs, truth).mean(1),
        "brier": np.square(mean_probs - truth).mean(1),
        "accuracy": right.mean(1),
        "risk": (~right).mean(1),
        "error": ~right.all(1),
        **{key: value.mean(1) for key, value in parts.items()},
    }
    if reference is not None:
        scores["reference_brier"] = np.square(reference - truth).mean(1)
    if task == MULTI_LABEL:
        votes = (probs > 0.5).mean(0)
        scores["paper_accuracy"] = ((votes > 0.5) == (truth > 0.5)).mean(1)
        scores["paper_brier"] = np.square(probs - truth).mean((0, 2))
        scores["paper_entropy"] = entr(mean_probs).sum(1)
    return scores


def _score_classes(probs, targets, reference, threshold, task):
    probs, truth = _float64(probs), _float64(targets)
    parts = uncertainty(probs / probs.sum(-1, keepdims=True), task)
    mean_probs = parts.pop("mean_probs")
    predicted, true = mean_probs.argmax(-1), truth.argmax(-1)
    scores = {
        "mean_probs": mean_probs,
        "targets": targets.astype("uint8"),
        "nll": -np.log(np.maximum(mean_probs[truth == 1], LOG_CLIP)),
        "brier": np.square(mean_probs - truth).sum(-1),
        "accuracy": _float64(predicted == true),
        "risk": _float64(predicted != true),
        "error": predicted != true,
        **parts,
    }
    if reference is not None:
        scores["reference_brier"] = np.square(reference - truth).sum(-1)
    if task == ORDINAL:
        scores["mean_absolute_error"] = _float64(np.abs(predicted - true))
    return scores


def _score_masks(probs, masks, valid, reference, threshold, boundary):
    parts = uncertainty(probs)
    mean_probs, soft = parts.pop("mean_probs"), _rater_mean(masks, valid)
    predicted, majority = mean_probs > threshold, soft >= 0.5
    several = valid.sum(1) > 1
    pixels = (1, 2)
    scores = {
        "dice": dice(predicted, majority),
        "iou": iou(predicted, majority),
        "nll": _nll(mean_probs, soft).mean(pixels),
        "brier": _soft_brier(mean_probs, soft).mean(pixels),
        **{key: value.mean(pixels) for key, value in parts.items()},
        **{key: np.full(len(masks), np.nan) for key in _WITH_RATERS},
    }
    if boundary:
        scores["hausdorff95"] = hausdorff95(predicted, majority)
    if several.any():
        rated = masks[several], valid[several]
        scores["ged"][several] = _energy_distance(probs[:, several], *rated)
        scores["hungarian_iou"][several] = hungarian_iou(probs[:, several], *rated)
        scores["dice_raters"][several] = dice_raters(predicted[several], *rated)
    scores["risk"] = 1 - scores["dice"]
    scores["error"] = scores["dice"] < 0.5
    if reference is not None:
        scores["reference_brier"] = _soft_brier(reference, soft).mean(pixels)

    weights = valid / valid.sum(1, keepdims=True)  # (batch, raters)
    scores["paper_dice"] = paper_dice(probs, soft)
    scores["paper_iou"] = sum(weights[:, r] * paper_iou(probs, masks[..., r]) for r in range(masks.shape[-1]))
    twice = 1 / (1 + np.exp(1 - 2 * probs))
    scores["paper_brier"] = _soft_brier(probs, soft).mean((0, 2, 3))
    scores["paper_brier_softmax_twice"] = _soft_brier(twice, soft).mean((0, 2, 3))
    scores["paper_entropy"] = scores["entropy"]
    region = (soft > 0) | predicted  # what any rater or the prediction marks
    return scores | _pixel_statistics(mean_probs, soft, parts, predicted != majority, several, region)


def _pixel_statistics(mean_probs, soft, parts, wrong, several, region):
    """What metrics over the pixels of all images need of each image."""
    gap = mean_probs - soft
    width = _width_bin(mean_probs)
    confidence, right = _confidence(mean_probs, soft)
    with np.errstate(divide="ignore"):
        logit = np.log(mean_probs) - np.log1p(-mean_probs)
        information = np.log(np.maximum(parts["mutual_information"], INFORMATION_LOW))
    # The bins of p and of 1 - p lie symmetrically: they have one entropy.
    distance = np.arcsinh(np.abs(logit) / LOGIT_UNIT) / np.arcsinh(LOGIT_LIMIT / LOGIT_UNIT)
    distance = np.minimum(distance * (LOGIT_BINS // 2), LOGIT_BINS // 2 - 1).astype(int)
    fine = np.where(logit < 0, LOGIT_BINS // 2 - 1 - distance, LOGIT_BINS // 2 + distance)
    low, high = np.log(INFORMATION_LOW), np.log(np.log(2))
    information = np.clip((information - low) / (high - low) * INFORMATION_BINS, 0, INFORMATION_BINS - 1).astype(int)
    entropy, variance = binary_entropy(mean_probs), soft * (1 - soft)
    moments = (np.ones_like(soft), entropy, variance, entropy**2, variance**2, entropy * variance)
    return {
        "calibration": np.stack([_counts(width, NUM_BINS, values) for values in (None, mean_probs, soft)], 1),
        "calibration_region": np.stack(
            [_counts(width, NUM_BINS, values) for values in (region, gap * region)], 1
        ).astype("float32"),
        "paper_gap": _counts(_width_bin(confidence), NUM_BINS, confidence - right),
        "logit_count": _counts(fine, LOGIT_BINS).astype("uint32"),
        "entropy_wrong": _counts(LOGIT_BINS // 2 - 1 - distance, LOGIT_BINS // 2, wrong).astype("uint32"),
        "logit_gap": _counts(fine, LOGIT_BINS, gap).astype("float32"),
        "information_count": _counts(information + wrong * INFORMATION_BINS, 2 * INFORMATION_BINS).astype("uint32"),
        "moments": np.stack([value.sum((1, 2)) for value in moments], 1) * several[:, None],
    }


def _counts(index, num_bins, weights=None):
    """(batch, num_bins): sums of weights, or counts, of each image's pixels in each bin."""
    index = index + num_bins * np.arange(len(index))[:, None, None]
    weights = None if weights is None else weights.ravel()
    return np.bincount(index.ravel(), weights, num_bins * len(index)).reshape(-1, num_bins)


def _width_bin(probs):
    return np.minimum((probs * NUM_BINS).astype(int), NUM_BINS - 1)


def _confidence(mean_probs, truth):
    """Probability of the more probable outcome, and how often that is right: Guo's calibration for two classes."""
    positive = mean_probs > 0.5
    return np.where(positive, mean_probs, 1 - mean_probs), np.where(positive, truth, 1 - truth)


# ---------------------------------------------------------------------------
# The record
# ---------------------------------------------------------------------------


class Record:
    """Statistics of each image of one method: all metrics, their intervals and paired tests come from these.

    `Evaluator.record` makes it. `record["risk"]` is an array whose first axis is images: "risk" (share of wrong labels,
    wrong class, or 1 - Dice), "error" (any label wrong, wrong class, or Dice below 0.5), "nll", "brier",
    "entropy", "expected_entropy", "mutual_information" and other metrics of a single image; with labels and classes
    also "mean_probs" and "targets", with masks "calibration": (images, 3, 15), the pixels in each bin of `ece`, the
    sums of their probabilities and of their truths.

    Args:
        task: one of `TASKS`.
        arrays: name -> array.
        threshold: where the mean prediction was cut.
        num_samples: samples of the posterior.
        groups: (images,) integers, the patient of each, or None where not known.
        digests: "images" and "ids", which tell whether two records are of the same images.
        only: the metrics that it has, or None: all.
    """

    def __init__(
        self,
        task: str,
        arrays: dict[str, np.ndarray],
        *,
        threshold: float,
        num_samples: int,
        groups: np.ndarray | None = None,
        digests: dict[str, str] | None = None,
        only: tuple[str, ...] | None = None,
    ):
        self.task, self.arrays, self.threshold, self.num_samples = task, arrays, threshold, num_samples
        self.groups, self.digests, self.only = groups, digests or {"images": "", "ids": ""}, only
        self._statistics, self._resampled = None, {}

    def __getitem__(self, name: str) -> np.ndarray:
        return self.arrays[name]

    def __len__(self) -> int:
        return self.num_images

    @property
    def num_images(self) -> int:
        """Number of images."""
        return len(self.arrays["risk"])

    def metrics(self, weights: ArrayLike | None = None) -> dict[str, float | dict[str, str]]:
        """All metrics, as `evaluate` describes them.

        Args:
            weights: (images,) >= 0, how often each image counts; None: once.

        Returns:
            Key -> float, and "undefined": the reason for each key that has no value.

        Raises:
            ValueError: weights of another shape, negative, not finite or all 0.
        """
        n = self.num_images
        weights = np.ones(n) if weights is None else _float64(weights)
        if weights.shape != (n,) or not (np.isfinite(weights) & (weights >= 0)).all() or not weights.any():
            raise ValueError(
                f"Expected weights ({n},), finite, >= 0 and not all 0. "
                f"Received: shape {weights.shape}, values from {weights.min(initial=0)} to {weights.max(initial=0)}"
            )
        values = self._values(_KEYS[self.task], weights[None])
        result, undefined = {}, {}
        for key in _KEYS[self.task]:
            value = float(values[key][0]) if key in values else np.nan
            if np.isfinite(value):
                result[key] = value
            else:
                undefined[key] = self._reason(key, weights)
        return {**result, "undefined": undefined}

    def bootstrap(self, num_resamples: int = 1000, seed: int = 0, level: float = 0.95) -> dict:
        """Bootstrap intervals of all metrics under resampling of the test images.

        Patients are drawn with replacement, each with all their images, where every image has one, else images. The
        interval says how far the number depends on which images happen to be in the test set; nothing of how far it
        depends on the training: that takes several seeds. Where a label has no positive in a resample, the means
        over labels are over the others there.

        The interval is that of the resamples' quantiles but for calibration errors (keys with "ece"). These take noise
        for error: of few images they are too high, and of resamples, in which images repeat, higher still. Theirs is
        reflected, `2 * value - quantile`, cut to 0..1 ("basic" interval), which takes the excess off: where noise
        is much of the value, the interval lies below it. Of 300 simulated images with 3 labels and a true error of
        0.081, 0.045 and 0, it held that in 93, 87 and 46 of 100 sets, the quantiles in 73, 50 and 0.

        Args:
            num_resamples: how many.
            seed: of the draws; the same for two records of the same images, so theirs are paired.
            level: share of the resamples within.

        Returns:
            Key -> (low, high) for each metric with a value but the counts, and "undefined": the reason for those
            that more than 5 % of the resamples leave undefined.

        Reference: Efron and Tibshirani 1993, "An Introduction to the Bootstrap", chapter 13; Davison and Hinkley 1997,
            "Bootstrap Methods and their Application", section 5.2 (basic).
        """
        if num_resamples < 1 or not 0 < level < 1:
            raise ValueError(
                f"Expected num_resamples >= 1 and level between 0 and 1. Received: {num_resamples} and {level}"
            )
        metrics = self._numbers()
        keys = [key for key in metrics if key not in _COUNTS]
        if self._num_units() == 1:
            return {"undefined": dict.fromkeys(keys, f"one {self._unit()}: nothing to resample")}
        result, undefined = {}, {}
        for key, values in self._distribution(keys, num_resamples, seed).items():
            values = values[np.isfinite(values)]
            if len(values) < 0.95 * num_resamples:
                undefined[key] = f"undefined in {num_resamples - len(values)} of {num_resamples} resamples"
            else:
                low, high = np.quantile(values, [(1 - level) / 2, (1 + level) / 2])
                if "ece" in key:
                    low, high = np.clip([2 * metrics[key] - high, 2 * metrics[key] - low], 0, 1)
                result[key] = (float(low), float(high))
        return {**result, "undefined": undefined}

    def save(self, path: str | os.PathLike) -> None:
        """Write it as an npz file, whole or not at all."""
        path = Path(path)
        about = {
            "format": _FORMAT,
            "task": self.task,
            "threshold": self.threshold,
            "num_samples": self.num_samples,
            "digests": self.digests,
            "only": self.only,
        }
        arrays = {f"image_{name}": array for name, array in self.arrays.items()}
        if self.groups is not None:
            arrays["groups"] = self.groups
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(f"{path.name}.{uuid.uuid4().hex[:8]}.tmp")
        try:
            with open(temporary, "wb") as file:
                # Of numpy's own parameters none has such a name as these arrays.
                np.savez_compressed(file, about=np.array(json.dumps(about)), **arrays)  # type: ignore[arg-type]
            os.replace(temporary, path)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise

    @classmethod
    def load(cls, path: str | os.PathLike) -> Record:
        """Read what `save` wrote.

        Raises:
            ValueError: a file that is damaged or something else.
            FileNotFoundError: no such file.
        """
        try:
            with np.load(path, allow_pickle=False) as file:
                about = json.loads(str(file["about"]))
                arrays = {name.removeprefix("image_"): file[name] for name in file.files if name != "about"}
                groups = arrays.pop("groups", None)
            if about.pop("format", None) != _FORMAT:
                raise ValueError(f"not of format {_FORMAT}")
            only = about.pop("only")
            record = cls(arrays=arrays, groups=groups, only=None if only is None else tuple(only), **about)
            record._check_arrays()
        except FileNotFoundError:
            raise
        except Exception as error:  # damaged zips, headers and JSON raise a dozen kinds
            raise ValueError(
                f"Expected a record of sbn_tf.experiments.scoring in {path}. Received: {error}.\n"
                "Delete it and score the method again."
            ) from None
        return record

    def _check_arrays(self):
        if self.task not in TASKS:
            raise ValueError(f"task {self.task!r}")
        missing, unknown = _ARRAYS[self.task] - set(self.arrays), set(self.arrays) - _ARRAYS[self.task] - _OPTIONAL
        if missing or unknown:
            raise ValueError(f"{self.task!r} without {sorted(missing)}, with unknown {sorted(unknown)}")
        arrays = [*self.arrays.values(), *(() if self.groups is None else (self.groups,))]
        if len({array.shape[:1] for array in arrays} - {(0,), ()}) != 1 or not all(array.size for array in arrays):
            raise ValueError("arrays of different lengths")
        for name, array in self.arrays.items():
            if name not in _WITH_RATERS and not np.isfinite(array).all():
                raise ValueError(f"NaN or infinity in {name!r}")

    def _numbers(self) -> dict[str, float]:
        """The metrics that have a value."""
        return {key: value for key, value in self.metrics().items() if isinstance(value, float)}

    def _unit(self):
        return "image" if self.groups is None else "patient"

    def _num_units(self):
        return self.num_images if self.groups is None else int(self.groups.max()) + 1

    def _resamples(self, num_resamples, seed) -> Iterator[np.ndarray]:
        """Weights (resamples, images), some resamples at a time, the same whatever their number at a time."""
        bins = max(LOGIT_BINS, 2 * INFORMATION_BINS)  # columns of the largest product with the weights
        items = self["mean_probs"].size if "mean_probs" in self.arrays else max(self.num_images, bins)
        step, units = max(1, CHUNK_VALUES // items), self._num_units()
        generator = np.random.default_rng([seed, 4701])
        for start in range(0, num_resamples, step):
            rows = range(start, min(start + step, num_resamples))
            drawn = [np.bincount(generator.integers(units, size=units), minlength=units) for _ in rows]
            weights = np.stack(drawn).astype("float64")
            yield weights if self.groups is None else weights[:, self.groups]

    def _distribution(self, keys, num_resamples, seed):
        """Key -> (resamples,) values, NaN where undefined; kept for the next interval or test."""
        kept = self._resampled.setdefault((num_resamples, seed), {})
        if wanted := [key for key in keys if key not in kept]:
            parts = [self._values(wanted, weights) for weights in self._resamples(num_resamples, seed)]
            kept |= {key: np.concatenate([part[key] for part in parts]) for key in parts[0]}
        return {key: kept[key] for key in keys if key in kept}

    def _values(self, keys, weights):
        """Key -> (resamples,) for weights (resamples, images); a key that these arrays never have is left out."""
        if self._statistics is None:
            self._statistics = _statistics(self)
        found = {}
        for names, statistic in self._statistics:
            if any(name in keys and self._has(name) for name in names):
                found |= dict(zip(names, statistic(weights), strict=True))
        return {key: value for key, value in found.items() if key in keys and self._has(key)}

    def _has(self, key):
        return self.only is None or key in self.only

    def _reason(self, key, weights):
        """Why a metric has no value."""
        if not self._has(key):
            return "not measured: these predictions are masks, not probabilities"
        if key == "brier_skill":
            given = "reference_brier" in self.arrays
            return (
                "the training prevalence predicts these targets without error"
                if given
                else "train_prevalence was not given"
            )
        if key in ("auc", "average_precision"):
            return "no label occurs as both 0 and 1"
        if key == "quadratic_kappa":
            return "every grade, predicted and true, is the same one"
        if key == "hausdorff95":
            return "boundary=False: boundaries were not measured"
        if key in _WITH_RATERS or (key == "entropy_disagreement_pearson" and not (weights @ self["moments"])[0]):
            return "no image has two or more valid raters"
        if key == "entropy_disagreement_pearson":
            return "the entropy or the raters' variance is the same at every pixel"
        if key.endswith("_mi") and not self._samples_differ():
            return (
                "one sample: mutual information is 0 everywhere"
                if self.num_samples == 1
                else "the samples are all the same: mutual information is 0 everywhere"
            )
        if key == "ece_region":
            return "no rater and no prediction marks a pixel"
        if key.startswith(("label", "pixel")):
            return f"no {key[:5]} is wrong, or every one"
        number = "every" if weights is not None and weights @ self["error"] else "no"
        return f"{number} image {'has Dice below 0.5' if self.task == SEGMENTATION else 'is wrong'}"

    def _samples_differ(self):
        return self.num_samples > 1 and self["mutual_information"].max() >= 10.0**-DECIMALS


RECORD_FORMAT = 3  # of record.npz: raised when an array changes its meaning
_FORMAT = f"sbn_tf.experiments.scoring.Record {RECORD_FORMAT}"
# What a record of each task holds; a damaged name must not pass as an array that is not there.
_OPTIONAL = {"reference_brier", "hausdorff95"}
_ALL = {"nll", "brier", "risk", "error", *_UNCERTAINTIES}
_ARRAYS = dict.fromkeys((BINARY, MULTI_CLASS), _ALL | {"mean_probs", "targets", "accuracy"})
_ARRAYS[ORDINAL] = _ARRAYS[MULTI_CLASS] | {"mean_absolute_error"}
_ARRAYS[MULTI_LABEL] = _ARRAYS[BINARY] | {"paper_accuracy", "paper_brier", "paper_entropy"}
_ARRAYS[SEGMENTATION] = _ALL | {
    *("dice", "iou", *_WITH_RATERS, "calibration", "calibration_region", "moments"),
    *("logit_count", "logit_gap", "entropy_wrong", "information_count"),
    *("paper_dice", "paper_iou", "paper_brier", "paper_brier_softmax_twice", "paper_entropy", "paper_gap"),
}


# ---------------------------------------------------------------------------
# Metrics of weighted images, for many weightings at once
# ---------------------------------------------------------------------------

# Each statistic is (keys, function): weights (resamples, images) -> one (resamples,) array a key, NaN where undefined.


def _statistics(record):
    arrays, task = record.arrays, record.task
    means = [key for key in _KEYS[task] if key in arrays and arrays[key].ndim == 1]
    entropy, information = (arrays[key].round(DECIMALS) for key in ("entropy", "mutual_information"))
    risk, error = arrays["risk"].round(DECIMALS), arrays["error"]
    found = [
        (means, _means([arrays[key] for key in means])),
        (("num_images",), lambda weights: [weights.sum(1)]),
        (("aurc", "excess_aurc"), _areas(entropy, risk)),
        (("error_auroc",), _only_first(_ranking(entropy, error))),
    ]
    if record._samples_differ():
        found.append((("error_auroc_mi",), _only_first(_ranking(information, error))))
    if "reference_brier" in arrays:
        found.append((("brier_skill",), _skill(arrays["brier"], arrays["reference_brier"])))
    specific = _of_masks if task == SEGMENTATION else _of_classes if task in EXCLUSIVE else _of_labels
    return found + specific(record)


def _of_labels(record):
    mean_probs, targets = record["mean_probs"], _float64(record["targets"])
    found = _of_columns(mean_probs, targets)
    found.append((("ece", "ece_label"), _width_calibration(mean_probs, targets)))
    images = np.arange(mean_probs.size) // mean_probs.shape[1]
    pooled = _mass_calibration(mean_probs.ravel(), targets.ravel(), images)
    found.append((("ece_mass",), lambda weights: [pooled(weights)]))
    wrong = (mean_probs > record.threshold) != (targets > 0.5)
    entropy = binary_entropy(mean_probs).round(DECIMALS)
    found.append((("label_error_auroc",), _only_first(_ranking(entropy.ravel(), wrong.ravel(), images))))
    if record.task == MULTI_LABEL:
        confidence, right = _confidence(mean_probs, targets)
        found.append((("paper_ece",), _only_first(_width_calibration(confidence, right))))
    return found


def _of_classes(record):
    mean_probs, targets = record["mean_probs"], _float64(record["targets"])
    found = _of_columns(mean_probs, targets)
    predicted, true = mean_probs.argmax(1), targets.argmax(1)
    confidence, right = mean_probs.max(1), _float64(predicted == true)
    pooled, columns = _mass_calibration(confidence, right), _width_calibration(mean_probs, targets)
    found += [
        (("ece",), _only_first(_width_calibration(confidence[:, None], right[:, None]))),
        (("ece_mass",), lambda weights: [pooled(weights)]),
        (("ece_label",), lambda weights: columns(weights)[1:]),
    ]
    if record.task == ORDINAL:
        found.append((("quadratic_kappa",), _kappa(_float64(predicted), _float64(true))))
    return found


def _of_columns(mean_probs, targets):
    """What is a mean over labels or classes."""
    columns = range(mean_probs.shape[1])
    rankings = [_ranking(mean_probs[:, i], targets[:, i] > 0.5) for i in columns]
    calibrations = [_mass_calibration(mean_probs[:, i], targets[:, i]) for i in columns]

    def ranking(weights):
        scores = np.array([one(weights) for one in rankings])  # (labels, 2, resamples)
        defined = ~np.isnan(scores[:, 0])
        number = defined.sum(0)
        means = np.where(defined[:, None], scores, 0).sum(0) / np.where(number > 0, number, np.nan)
        return [*means, _float64(number)]

    def calibration(weights):
        return [np.mean([one(weights) for one in calibrations], 0)]

    return [
        (("auc", "average_precision", "auc_num_labels"), ranking),
        (("ece_label_mass",), calibration),
    ]


def _of_masks(record):
    calibration, region, moments = record["calibration"], record["calibration_region"], record["moments"]
    gap, pixels = calibration[:, 1] - calibration[:, 2], calibration[:, 0].sum(1)
    found = [
        (("ece",), _binned_calibration(gap, pixels)),
        (("ece_region",), _binned_calibration(region[:, 1], region[:, 0].sum(1))),
        (("paper_ece",), _binned_calibration(record["paper_gap"], pixels)),
        (("ece_mass",), _binned_mass_calibration(record["logit_count"], record["logit_gap"])),
        (("entropy_disagreement_pearson",), _pearson(moments)),
        (("pixel_error_auroc",), _binned_ranking(_by_entropy(record["logit_count"], record["entropy_wrong"]))),
    ]
    if record._samples_differ():
        found.append((("pixel_error_auroc_mi",), _binned_ranking(record["information_count"])))
    return found


def _only_first(statistic):
    return lambda weights: list(statistic(weights))[:1]


def _divided(numerator, denominator):
    """NaN where the denominator is 0."""
    return np.divide(numerator, denominator, out=np.full(np.shape(numerator), np.nan), where=denominator > 0)


def _means(columns):
    values = np.stack(columns, 1)
    known = ~np.isnan(values)
    values, known = np.where(known, values, 0), _float64(known)
    return lambda weights: list(_divided(weights @ values, weights @ known).T)


def _skill(brier, reference):
    return lambda weights: [_divided(weights @ (reference - brier), weights @ reference)]


def _ranking(scores, positive, images=None):
    """Area under the ROC curve and average precision, as scikit-learn's with `sample_weight`.

    Ties count half in the first and are one step in the second. `images` is the image of each item; None: in order.
    """
    order = np.argsort(scores, kind="stable")
    images = order if images is None else images[order]
    first = np.concatenate([[True], np.diff(scores[order]) != 0])
    tie = np.cumsum(first) - 1
    edges = np.append(np.flatnonzero(first), len(order))
    at = np.flatnonzero(np.asarray(positive)[order])  # only where positives are does anything count
    ties, inside = np.unique(tie[at], return_index=True)
    starts, ends = edges[ties], edges[ties + 1]

    def statistic(weights):
        if not len(at):
            return np.full((2, len(weights)), np.nan)
        below = _cumulative(weights[:, images])
        total = below[:, -1:]
        start, end = below[:, starts], below[:, ends]
        positives = np.add.reduceat(weights[:, images[at]], inside, axis=1)  # (resamples, ties)
        all_positives = positives.sum(1)
        positives_below = np.cumsum(positives, 1) - positives
        negatives = (start - positives_below) + (end - start - positives) / 2
        defined = (all_positives > 0) & (total[:, 0] > all_positives)
        auc = _divided((positives * negatives).sum(1), all_positives * (total[:, 0] - all_positives))
        precision = _divided(all_positives[:, None] - positives_below, total - start)
        precision = _divided(np.where(positives > 0, positives * precision, 0).sum(1), all_positives)
        return np.where(defined, [auc, precision], np.nan)

    return statistic


def _cumulative(values):
    """(resamples, items + 1): sums of the first 0, 1, ... items."""
    result = np.zeros((len(values), values.shape[1] + 1))
    np.cumsum(values, axis=1, out=result[:, 1:])
    return result


def _width_calibration(probs, targets):
    """Calibration error in bins of equal width: pooled, and the mean over the labels, probs (images, labels)."""
    from scipy.sparse import csr_array

    images, labels = probs.shape
    index = _width_bin(probs) + NUM_BINS * np.arange(labels)
    gaps = csr_array(
        ((probs - targets).ravel(), index.ravel(), labels * np.arange(images + 1)), shape=(images, labels * NUM_BINS)
    ).T.tocsr()

    def statistic(weights):
        gap = (gaps @ weights.T).reshape(labels, NUM_BINS, -1)
        total = labels * weights.sum(1)
        return [np.abs(gap.sum(0)).sum(0) / total, np.abs(gap).sum((0, 1)) / total]

    return statistic


def _mass_calibration(probs, targets, images=None):
    """Calibration error in bins of equal weight; equal probabilities share one: that of the middle of their weight."""
    order = np.argsort(probs, kind="stable")
    images = order if images is None else images[order]
    gaps = (probs - targets)[order]
    edges = np.append(np.flatnonzero(np.concatenate([[True], np.diff(probs[order]) != 0])), len(order))

    def statistic(weights):
        result, ordered, below = np.empty(len(weights)), np.empty(len(images)), np.zeros(len(images) + 1)
        for row, one in enumerate(weights):
            np.take(one, images, out=ordered)
            np.cumsum(ordered, out=below[1:])
            cuts = edges[_mass_cuts(below if len(edges) == len(below) else below[edges])]
            np.multiply(ordered, gaps, out=ordered)
            result[row] = sum(abs(ordered[start:stop].sum()) for start, stop in itertools.pairwise(cuts)) / below[-1]
        return result

    return statistic


def _mass_cuts(below):
    """Where steps divide into bins of equal weight, (bins + 1,), from their cumulative weights, (steps + 1,)."""
    shares = below[-1] * np.arange(1, NUM_BINS) / NUM_BINS
    # Steps that end before a share lie below it; the one that it falls into does, if its middle does.
    cuts = np.minimum(np.searchsorted(below[1:], shares, "right"), len(below) - 2)
    cuts = cuts + ((below[cuts] + below[cuts + 1]) / 2 < shares)
    return np.concatenate([[0], cuts, [len(below) - 1]])


def _areas(uncertain, risk):
    """Area under the risk-coverage curve, and its excess over the oracle's, which sorts by risk."""
    from scipy.special import digamma

    def area(scores):
        order = np.argsort(scores, kind="stable")
        edges = np.append(np.flatnonzero(np.concatenate([[True], np.diff(scores[order]) != 0])), len(order))
        risks = risk[order]

        def statistic(weights):
            weights = weights[:, order]
            below = _cumulative(weights)[:, edges]
            risk_below = _cumulative(weights * risks)[:, edges]
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
        return [value, np.maximum(value - best, 0)]

    return statistic


def _kappa(predicted, true):
    columns = np.stack([predicted, true, predicted**2, true**2, np.square(predicted - true)], 1)

    def statistic(weights):
        mean = weights @ columns / weights.sum(1, keepdims=True)
        # In closed form: squared distances of the pairs over those of all pairs, the classes of chance.
        by_chance = mean[:, 2] + mean[:, 3] - 2 * mean[:, 0] * mean[:, 1]
        return [1 - _divided(mean[:, 4], np.where(by_chance > 1e-12, by_chance, 0))]

    return statistic


def _binned_calibration(gap, pixels):
    return lambda weights: [_divided(np.abs(weights @ gap).sum(1), weights @ pixels)]


def _binned_mass_calibration(count, gap):
    count = _float64(count)

    def statistic(weights):
        below, gaps = _cumulative(weights @ count), _cumulative(weights @ gap)
        cuts = np.stack([_mass_cuts(row) for row in below])
        return [np.abs(np.diff(np.take_along_axis(gaps, cuts, 1))).sum(1) / below[:, -1]]

    return statistic


def _by_entropy(count, wrong):
    """Right, then wrong pixels in bins of rising entropy: it falls as the logit leaves 0 for either side."""
    half = LOGIT_BINS // 2
    return np.concatenate([count[:, :half] + count[:, : half - 1 : -1] - wrong, wrong], 1)


def _binned_ranking(counts):
    """AUROC from counts (images, 2 * bins): right, then wrong pixels in bins of rising uncertainty."""
    counts, bins = _float64(counts), counts.shape[1] // 2

    def statistic(weights):
        both = weights @ counts
        right, wrong = both[:, :bins], both[:, bins:]
        rank = np.cumsum(right, 1) - right / 2
        return [_divided((wrong * rank).sum(1), wrong.sum(1) * right.sum(1))]

    return statistic


def _pearson(moments):
    def statistic(weights):
        sums = weights @ moments
        _, mean_x, mean_y, square_x, square_y, product = _divided(sums, sums[:, :1] + np.zeros(6)).T
        variance_x, variance_y = square_x - mean_x**2, square_y - mean_y**2
        with np.errstate(invalid="ignore"):
            varies = np.minimum(variance_x, variance_y) > 1e-12
        scale = np.sqrt(np.where(varies, variance_x * variance_y, 0))
        return [np.clip(_divided(product - mean_x * mean_y, scale), -1, 1)]

    return statistic


# ---------------------------------------------------------------------------
# Two records
# ---------------------------------------------------------------------------


def compare(
    record: Record, other: Record, keys: Iterable[str] | None = None, num_resamples: int = 1000, seed: int = 0
) -> dict[str, dict[str, float]]:
    """Paired bootstrap test of two methods on the same images.

    Both are resampled alike, so what makes an image hard for both cancels. The test asks whether the difference
    would be there in other images (patients) of the same kind, for these two trained networks; it knows nothing of
    other seeds or trainings. The resamples say how far a difference strays from its mean, which for calibration errors
    is not the observed one, since resampling raises the lower of two more. p is the share of resamples that stray as
    far as the observed difference is from 0, to either side, with one added to both counts, so never 0; the interval
    is the observed difference less what the resamples stray. Of two methods that are alike it calls 5 % different,
    by calibration errors that are mostly noise fewer. Many comparisons at 5 % find something by chance:
    correct for their number, as `results.table` does (Holm 1979).

    Args:
        record, other: of the same images in the same order.
        keys: metrics to compare; None: all that both have.
        num_resamples, seed: as for `Record.bootstrap`.

    Returns:
        Key -> {"difference": record's minus other's, "low", "high": its 95 % interval, "p_value"}. A key without a
        value in one of them, or in more than 5 % of the resamples, is left out.

    Raises:
        ValueError: records of different images, one image or patient alone, or an unknown key.

    Reference: Efron and Tibshirani 1993, chapter 16; Hall and Wilson 1991, "Two Guidelines for Bootstrap Hypothesis
        Testing" (why about their mean).
    """
    _check_pair(record, other)
    known = [key for key in _KEYS[record.task] if key not in _COUNTS]
    keys = known if keys is None else list(keys)
    if unknown := [key for key in keys if key not in known]:
        raise ValueError(f"Expected keys among {known}. Received: {unknown}")
    if num_resamples < 1:
        raise ValueError(f"Expected num_resamples >= 1. Received: num_resamples={num_resamples}")
    ours, theirs = record._numbers(), other._numbers()
    keys = [key for key in keys if key in ours and key in theirs]
    one, two = (each._distribution(keys, num_resamples, seed) for each in (record, other))
    result = {}
    for key in keys:
        differences = one[key] - two[key]
        differences = differences[np.isfinite(differences)]
        if len(differences) < 0.95 * num_resamples:
            continue
        observed, strayed = ours[key] - theirs[key], differences - differences.mean()
        low, high = observed - np.quantile(strayed, [0.975, 0.025])
        result[key] = {
            "difference": observed,
            "low": float(low),
            "high": float(high),
            "p_value": float(((np.abs(strayed) >= abs(observed)).sum() + 1) / (len(differences) + 1)),
        }
    return result


def _check_pair(record, other):
    if record.task != other.task:
        raise ValueError(f"Expected records of one task. Received: {record.task!r} and {other.task!r}")
    ids = record.digests["ids"], other.digests["ids"]
    same = record.digests["images"] == other.digests["images"] and (ids[0] == ids[1] or "" in ids)
    if not same or record.num_images != other.num_images:
        raise ValueError(
            "Expected records of the same images in the same order: score both methods on one split. "
            f"Received: {record.num_images} and {other.num_images} images with other targets or ids"
        )
    groups = record.groups, other.groups
    if (groups[0] is None) != (groups[1] is None) or not np.array_equal(*(g if g is not None else 0 for g in groups)):
        raise ValueError("Expected the same patients in both records, or none in both. Received: different groups")
    if record._num_units() == 1:
        raise ValueError(f"Expected two {record._unit()}s or more: nothing can be resampled. Received: one")


def shift_auroc(clean: Record, moved: Record) -> dict:
    """How well the uncertainty of an image tells shifted images from clean ones: 0.5 is chance.

    Args:
        clean, moved: records of one method.

    Returns:
        "entropy" and "mutual_information" -> AUROC of that uncertainty of an image for its being shifted, and
        "undefined": the reason for the second where the samples never differ, as with one sample.

    Raises:
        ValueError: records of different tasks.
    """
    if clean.task != moved.task:
        raise ValueError(f"Expected records of one task. Received: {clean.task!r} and {moved.task!r}")
    result, undefined = {}, {}
    labels = np.repeat([False, True], [clean.num_images, moved.num_images])
    for key in ("entropy", "mutual_information"):
        if key == "mutual_information" and not (clean._samples_differ() or moved._samples_differ()):
            undefined[key] = clean._reason("error_auroc_mi", None)
            continue
        scores = np.concatenate([clean[key], moved[key]]).round(DECIMALS)
        result[key] = float(_ranking(scores, labels)(np.ones((1, len(labels))))[0, 0])
    return {**result, "undefined": undefined}


def shifted(images: np.ndarray, kind: str, severity: float, seed: int = 0, offset: int = 0) -> np.ndarray:
    """Images as another scanner might give them: normalised images, made worse; severity 0 leaves them as they are.

    Args:
        images: (batch, height, width, channels) float32, normalised: unit standard deviation.
        kind: "noise" (Gaussian, standard deviation severity * 0.2), "blur" (Gaussian, sigma = severity in pixels) or
            "contrast" (towards the image's own mean by the fraction severity, 0..1).
        severity: how much, >= 0.
        seed: of the noise.
        offset: number of the first image: an image gets the same noise however the images are divided.

    Returns:
        float32, a new array. Values are not cut to the range of the original pixels.

    Raises:
        ValueError: an unknown kind, a severity out of its range, images of another shape.
    """
    images = np.asarray(images, "float32")
    if images.ndim != 4:
        raise ValueError(f"Expected images (batch, height, width, channels). Received: shape {images.shape}")
    if kind not in ("noise", "blur", "contrast"):
        raise ValueError(f'Expected kind "noise", "blur" or "contrast". Received: kind={kind!r}')
    if not 0 <= severity < np.inf or (kind == "contrast" and severity > 1):
        limit = "in 0..1" if kind == "contrast" else "finite and >= 0"
        raise ValueError(f"Expected severity {limit} for {kind!r}. Received: severity={severity!r}")
    if kind == "blur":
        from scipy.ndimage import gaussian_filter

        return gaussian_filter(images, (0, severity, severity, 0), mode="nearest")
    if kind == "contrast":
        mean = images.mean((1, 2), keepdims=True)
        return (mean + (1 - severity) * (images - mean)).astype("float32")
    noise = [np.random.default_rng([seed, offset + k]).standard_normal(images.shape[1:]) for k in range(len(images))]
    return (images + 0.2 * severity * np.asarray(noise).reshape(images.shape)).astype("float32")


# ---------------------------------------------------------------------------
# Arrays at once
# ---------------------------------------------------------------------------


def evaluate(
    probs: ArrayLike,
    targets: ArrayLike,
    task: str,
    *,
    rater_valid: ArrayLike | None = None,
    train_prevalence: ArrayLike | None = None,
    threshold: float = 0.5,
    boundary: bool = False,
) -> dict[str, float | dict[str, str]]:
    """Every metric of a method's probabilities, as plain floats ready for JSON.

    All tasks: "nll", "brier", "ece" (15 bins, pooled), "ece_mass" (the same in bins of equal count), "entropy",
    "expected_entropy", "mutual_information" (nats per label, pixel or classified image), "brier_skill"
    (`1 - brier / brier of train_prevalence`). What the uncertainty of an image, its mean entropy, is good for: "risk"
    is its error (share of wrong labels, wrong class, or 1 - Dice), "aurc" the area under the risk-coverage curve,
    "excess_aurc" that above the oracle's, which sorts by risk, "error_auroc" the AUROC of the entropy for the image
    being wrong (any label wrong, wrong class, Dice below 0.5), "error_auroc_mi" that of the mutual information.
    "num_images".

    Multi-label and binary: "auc" and "average_precision" (means over the labels that occur as both 0 and 1),
    "auc_num_labels" (how many these are), "accuracy", "ece_label" and "ece_label_mass" (means over labels),
    "label_error_auroc" (AUROC of the entropy of each single label for its being wrong); multi-label also
    "paper_accuracy", "paper_brier", "paper_entropy", "paper_ece".

    Multi-class and ordinal: the same keys but the last five, of one event an image. "auc" and "average_precision" are
    means over the classes, each against the rest, as in MedMNIST's evaluator, and "auc_num_labels" counts classes;
    "accuracy" is that of the most probable class; "nll" is `-ln p` of the true class; "brier" the sum over
    classes of `(p - y)^2`, 0 to 2; "ece" and "ece_mass" are of the most probable class's probability against its
    being right (Guo et al. 2017), "ece_label" and "ece_label_mass" means over the classes. Ordinal also:
    "mean_absolute_error" of the most probable grade, in grades, and "quadratic_kappa", its agreement with the truth
    beyond chance (Cohen 1968, quadratic weights).

    Segmentation: "dice" and "iou" (the mean prediction cut at `threshold` against the majority mask, mean over
    images, an image with both empty counts as 1), "hausdorff95" (pixels); nll, brier and ece against a random valid
    rater, so with raters who disagree the best possible brier is their variance and not 0. Over the images with two
    or more valid raters: "ged", the generalised energy distance; "hungarian_iou"; "dice_raters", Dice against each
    rater; "entropy_disagreement_pearson", the Pearson correlation over all pixels of predictive entropy and the
    raters' variance. "pixel_error_auroc" and "pixel_error_auroc_mi": AUROC of a pixel's entropy, or mutual
    information, for its differing from the majority mask. These two and "ece_mass" come from pixels in fine bins
    (0.001 of the logit near p = 1/2, 1/90 of it elsewhere). Measured, they are within 0.005 of the exact values on
    maps with edges, as a network's, and on flat ones of p from 0.47 to 0.499 or from 0.1 to 0.2, and within 0.01 from
    0.01 to 0.03. A map from 0.1 to 0.11 fills eight bins: there 0.82 is given for an AUROC of 0.97. Then "paper_dice",
    "paper_iou", "paper_brier", "paper_brier_softmax_twice", "paper_entropy", "paper_ece", where a rater is random too.

    For one deterministic prediction of a Keras model, and masks (batch, height, width):

        row = evaluate(model.predict(x)[None], masks[..., None], "segmentation")

    Intervals and paired tests: `Evaluator`, `Record.bootstrap`, `compare`.

    Args:
        probs: (samples, batch, labels), or (samples, batch, height, width) or (..., width, 1):
            probabilities of 1; of classes they sum to 1, but for rounding, and are scaled to do so exactly.
        targets: (batch, labels), or (batch, height, width, raters): 0 or 1; one-hot for classes.
        task: "binary", "multi-class", "multi-label", "ordinal" or "segmentation".
        rater_valid: (batch, raters) bool, False where that mask is a filler; segmentation only, None if all
            are.
        train_prevalence: training frequency of 1 (see `prevalence`): a number, (labels,) or (height, width).
        threshold: where the mean prediction is cut, as for `Evaluator`.
        boundary: measure "hausdorff95" too, which takes some milliseconds an image.

    Returns:
        The metrics, and "undefined": the reason for each key that these data leave undefined, {} if none
        does.

    Raises:
        ValueError: probabilities outside 0..1 or NaN or, of classes, that do not sum to 1, targets other than 0
            and 1 or not one-hot, shapes that do not fit, an empty batch, an image without a valid rater, an
            unknown task.
    """
    evaluator = Evaluator(task, train_prevalence=train_prevalence, threshold=threshold, boundary=boundary)
    evaluator.update(probs, targets, rater_valid)
    return evaluator.record().metrics()


def per_image(probs: ArrayLike, masks: ArrayLike, rater_valid: ArrayLike | None = None) -> dict[str, np.ndarray]:
    """The segmentation metrics of each image, for distributions, worst cases and paired tests.

    Args:
        probs: (samples, batch, height, width) or (..., width, 1).
        masks: (batch, height, width, raters), 0 or 1.
        rater_valid: (batch, raters) bool; None if all are.

    Returns:
        Key -> (batch,) float64. Keys as in `evaluate`, whose value is the mean, without those that are not means over
        images. "ged", "hungarian_iou" and "dice_raters" are NaN for an image with fewer than two valid raters.

    Raises:
        ValueError: as `evaluate`.
    """
    evaluator = Evaluator(SEGMENTATION, boundary=False)
    evaluator.update(probs, masks, rater_valid)
    arrays = evaluator.record().arrays
    return {key: arrays[key] for key in _KEYS[SEGMENTATION] if key in arrays and arrays[key].ndim == 1}


def prevalence(task: str, targets: ArrayLike, rater_valid: ArrayLike | None = None) -> np.ndarray:
    """Frequency of 1 in the targets: of each label or class, (labels,), or of each pixel, (height, width).

    Args:
        task: one of `TASKS`.
        targets: (batch, labels), or (batch, height, width, raters): 0 or 1.
        rater_valid: (batch, raters) bool; None if all are. Each image counts once, however many its raters.

    Returns:
        float64 in 0..1, of shape (labels,) or (height, width).
    """
    truths = _check_targets(targets, task)
    if task != SEGMENTATION:
        return truths.mean(0, dtype="float64")
    valid = _check_valid(rater_valid, truths)
    total = np.zeros(truths.shape[1:3])
    for start in range(0, len(truths), 256):
        part = slice(start, start + 256)
        total += _rater_mean(truths[part], valid[part]).sum(0)
    return total / len(truths)


def select_threshold(
    mean_probs: ArrayLike, targets: ArrayLike, task: str, rater_valid: ArrayLike | None = None
) -> float:
    """The cut of 0.05, 0.10, ..., 0.95 that serves decisions best; to be chosen on validation, never on test.

    Best is the highest mean Dice with the majority masks or, for labels, the highest balanced accuracy (mean of
    sensitivity and specificity), mean over the labels that occur as both 0 and 1. Of equal cuts the one nearest 0.5.

    Args:
        mean_probs: (batch, labels) or (batch, height, width): the mean prediction.
        targets: (batch, labels), or (batch, height, width, raters): 0 or 1; may be a `DiskArray`.
        task: one of `TASKS`. Classes that exclude one another are decided by the most probable: 0.5 is given back.
        rater_valid: (batch, raters) bool; None if all are.

    Raises:
        ValueError: as `evaluate`.
    """
    probs, truths, valid = _check(np.asarray(mean_probs)[None], targets, task, rater_valid)
    cuts = np.arange(1, 20) / 20
    if task in EXCLUSIVE:
        return 0.5
    if task == SEGMENTATION:
        values = np.zeros(len(cuts))
        for part_probs, masks, part_valid in _chunks(probs, truths, valid):
            truth = majority_mask(masks, part_valid)
            values += [dice(part_probs[0] > cut, truth).sum() for cut in cuts]
        values /= len(truths)
    else:
        truth = truths > 0.5
        both = truth.any(0) & ~truth.all(0)
        if not both.any():
            return 0.5
        truth, found = truth[:, both], probs[0][:, both]
        positives, negatives = truth.sum(0), (~truth).sum(0)
        balanced = []
        for cut in cuts:
            decided = found > cut
            sensitivity, specificity = (decided & truth).sum(0) / positives, (~decided & ~truth).sum(0) / negatives
            balanced.append(((sensitivity + specificity) / 2).mean())
        values = np.asarray(balanced)
    best = np.flatnonzero(values >= np.max(values) - 1e-12)
    return float(cuts[best[np.argmin(np.abs(cuts[best] - 0.5).round(DECIMALS))]])


# ---------------------------------------------------------------------------
# Predictors that never look at an image
# ---------------------------------------------------------------------------


def trivial(
    task: str,
    train_targets: ArrayLike,
    test_targets: ArrayLike,
    *,
    rater_valid: np.ndarray | None = None,
    train_rater_valid: ArrayLike | None = None,
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
    options = {"train_prevalence": frequency, "boundary": False}
    records = _constant_records(task, frequency, test_targets, rater_valid, options)
    return {name: record.metrics() for name, record in records.items()}


def trivial_records(
    data: Data,
    *,
    threshold: float = 0.5,
    boundary: bool = True,
    deterministic: Callable | None = None,
    batch_size: int = 50,
) -> dict[str, Record]:
    """The same as `trivial`, as records of a dataset's test split, for intervals and paired tests.

    Args:
        data: `datasets.Data`.
        threshold, boundary: as for `Evaluator`.
        deterministic: `predict_samples` of a deterministic method; with it, and several raters, also "level_sets": the
            `level_sets` of its probability map. These have "ged" and "hungarian_iou" alone.
        batch_size: images a call of `deterministic`.
    """
    task, train, test = data.card.task, data.train, data.test
    frequency = prevalence(task, train.targets, train.rater_valid)
    options = {"train_prevalence": frequency, "threshold": threshold, "boundary": boundary}
    extra = {"groups": test.groups, "ids": test.ids}
    records = _constant_records(task, frequency, test.targets, test.rater_valid, options, extra)
    if deterministic is not None and task == SEGMENTATION and test.num_raters > 1:
        evaluator = Evaluator(task, threshold=threshold, boundary=False, only=("ged", "hungarian_iou"))
        for start in range(0, test.num_examples, batch_size):
            part = slice(start, start + batch_size)
            probs = level_sets(_predicted(deterministic, test.normalised(part), test, start).mean(0))
            parts = {key: _part(value, part) for key, value in (extra | {"rater_valid": test.rater_valid}).items()}
            evaluator.update(probs, test.targets[part], **parts)
        records["level_sets"] = evaluator.record()
    return records


def level_sets(mean_probs: ArrayLike, levels: Iterable[float] = (0.1, 0.3, 0.5, 0.7, 0.9)) -> np.ndarray:
    """Masks where a probability map exceeds each level, as samples: the spread of raters that one map already knows.

    Args:
        mean_probs: (batch, height, width) or (..., width, 1).
        levels: probabilities.

    Returns:
        (levels, batch, height, width) float32 of 0 and 1. They are no draws from a distribution: compare them with
        the raters' masks ("ged", "hungarian_iou"); their mean is not a probability.

    Raises:
        ValueError: another shape, probabilities outside 0..1 or NaN.
    """
    mean_probs = np.asarray(mean_probs)
    mean_probs = mean_probs[..., 0] if mean_probs.ndim == 4 and mean_probs.shape[-1] == 1 else mean_probs
    if mean_probs.ndim != 3:
        raise ValueError(f"Expected mean_probs (batch, height, width). Received: shape {mean_probs.shape}")
    _check_range(mean_probs)
    return np.stack([mean_probs > level for level in levels]).astype("float32")


def _constant_records(task, frequency, targets, rater_valid, options, extra=None):
    """Name -> record of predictors that say the same of every image, some images at a time."""
    if task in EXCLUSIVE:
        constant, constants = "most_frequent", np.eye(len(frequency))[frequency.argmax()]
    else:
        constant, constants = "all_background" if task == SEGMENTATION else "all_negative", 0.0
    shape, records = targets.shape[1 : 3 if task == SEGMENTATION else 2], {}
    step = max(1, CHUNK_VALUES // int(np.prod(shape)))
    for name, values in ((constant, constants), ("prevalence", frequency)):
        evaluator = Evaluator(task, **options)
        for start in range(0, len(targets), step):
            part = slice(start, start + step)
            found = targets[part]
            probs = _broadcast(values, (1, len(found), *shape), "train_targets")
            parts = {key: _part(value, part) for key, value in (extra or {}).items()}
            evaluator.update(probs, found, _part(rater_valid, part), **parts)
        records[name] = evaluator.record()
    return records


def _chunks(probs, masks, valid) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    size = max(1, CHUNK_VALUES // (probs[:, 0].size))
    for start in range(0, len(masks), size):
        part = slice(start, start + size)
        yield np.minimum(_float64(probs[:, part]), 1), masks[part], valid[part]
