"""Scores of a method: every metric of a test set of any size, read in pieces.

An `Evaluator` reduces each image to a few statistics; their arrays are a `Record`, which gives metrics, intervals and
paired tests. Which metrics there are is the business of `sbn_tf.metrics.METRICS` alone.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence

import numpy as np
from numpy.typing import ArrayLike

from sbn_tf.core import predictions
from sbn_tf.core.predictions import EXCLUSIVE, SEGMENTATION, TASKS, float64
from sbn_tf.datasets.base import Split
from sbn_tf.experiments import records
from sbn_tf.experiments.records import Record, compare, of_task
from sbn_tf.experiments.shifts import shifted
from sbn_tf.metrics import Case, dice, majority_mask, uncertainty

__all__ = ["compare", "evaluate", "prevalence"]


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
        if unknown := [key for key in only or () if key not in of_task(task)]:
            raise ValueError(f"Expected only among {list(of_task(task))}. Received: {unknown}")
        frequency = None if train_prevalence is None else float64(train_prevalence)
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
                of 1; of classes they sum to 1, but for rounding (see `evaluate`).
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
        samples, truths, valid = predictions.check(probs, targets, self.task, rater_valid)
        masks = self.task == SEGMENTATION
        shape = (truths.shape[1:3] if masks else truths.shape[1:], len(samples))
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
            reference = predictions.broadcast(self.train_prevalence, shape[0], "train_prevalence")
        for some, truth, real in chunks(samples, truths, valid) if masks else [(samples, truths, None)]:
            self._hashes["targets"].update(_bytes(truth if real is None else truth * real[:, None, None, :]))
            if real is not None:
                self._hashes["raters"].update(_bytes(real))
            self._parts.append(self._reduce(Case(some, truth, self.task, real, uncertainty, self.threshold, reference)))
        self._shape = shape
        self._groups = None if groups is None or self._groups is None else [*self._groups, np.asarray(groups)]
        self._has_ids = self._has_ids and ids is not None
        if ids is not None:
            self._hashes["ids"].update("".join(f"{name}\n" for name in np.asarray(ids).tolist()).encode())

    def _reduce(self, case):
        """Name -> (batch, ...): the value of each image for metrics of images, and what the others share."""
        kept = {}
        for name, metric in of_task(self.task).items():
            wanted = not metric.slow or (self.boundary and (self.only is None or name in self.only))
            if metric.image and wanted:
                kept[name] = metric.image(case)
        return kept | case.keep(kept["risk"])

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
        batch_size: images a call.
        task, train_prevalence, threshold, boundary: as for `Evaluator`.
        shift: (kind, severity) of `shifted`, done to every image; None: as they are.
        verbose: show a progress bar.

    Raises:
        ValueError: predictions of another shape, or NaN: the message names the images; else as `Evaluator`.
    """
    from tqdm import tqdm

    evaluator = Evaluator(task, train_prevalence=train_prevalence, threshold=threshold, boundary=boundary)
    name = f"{split.name}, {shift[0]} {shift[1]:g}" if shift else split.name
    bar = tqdm(total=split.steps(batch_size), desc=f"score {name}", unit="batch", mininterval=2.0, disable=not verbose)

    def probs_of(part):
        images = split.normalised(part)
        if shift:
            images = shifted(images, *shift, offset=part.start, mean=split.mean, sd=split.sd)
        probs = predicted(predict_samples, images, split, part.start)
        bar.update()
        return probs

    with bar:
        return record_of(evaluator, batch_size, probs_of, split.targets, **about_images(split))


def record_of(evaluator: Evaluator, size: int, probs_of: Callable[[slice], np.ndarray], targets, **about) -> Record:
    """The record of images that are predicted and added to an evaluator `size` at a time; `about`: `about_images`."""
    for start in range(0, len(targets), size):
        part = slice(start, start + size)
        known = {key: None if values is None else values[part] for key, values in about.items()}
        evaluator.update(probs_of(part), targets[part], **known)
    return evaluator.record()


def about_images(split: Split) -> dict:
    """What an evaluator takes of each image beside its target."""
    return {"rater_valid": split.rater_valid, "groups": split.groups, "ids": split.ids}


def predicted(predict_samples, images, split, start) -> np.ndarray:
    """Samples of some images of a split; an error names the images."""
    probs = predictions.drop_channel(np.asarray(predict_samples(images)))
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


def _bytes(values):
    return np.ascontiguousarray(values).astype("uint8").data


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

    `METRICS` says what each means; calibration errors have 15 bins. Of classes, "nll" is `-ln p` of the true one,
    "brier" the sum over classes, "accuracy" and "ece" are of the most probable class, "auc" and "average_precision"
    means over classes, each against the rest, as in MedMNIST's evaluator. Masks are cut at `threshold` and compared
    with the majority mask; an image with both empty counts as 1. nll, brier and ece of masks are against a random valid
    rater: the best possible brier is the raters' variance. "ged", "hungarian_iou", "dice_raters" and the correlation
    with disagreement are over images with two or more valid raters.

    "pixel_error_auroc", "pixel_error_auroc_mi" and "ece_mass" of masks come from pixels in fine bins (0.001 of the
    logit near p = 1/2, 1/90 of it elsewhere). Measured, they are within 0.005 of the exact values on maps with edges,
    as a network's, and on flat ones of p from 0.47 to 0.499 or from 0.1 to 0.2, and within 0.01 from 0.01 to 0.03. A
    map from 0.1 to 0.11 fills eight bins: there 0.82 is given for an AUROC of 0.97.

    For one deterministic prediction of a Keras model, and masks (batch, height, width):

        row = evaluate(model.predict(x)[None], masks[..., None], "segmentation")

    Intervals and paired tests: `Evaluator`, `Record.bootstrap`, `compare`.

    Args:
        probs: (samples, batch, labels), or (samples, batch, height, width) or (..., width, 1):
            probabilities of 1; of classes they sum to 1, but for rounding. For entropies alone they are scaled to do
            so exactly: that would break ties.
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


def prevalence(task: str, targets: ArrayLike, rater_valid: ArrayLike | None = None) -> np.ndarray:
    """Frequency of 1 in the targets: of each label or class, (labels,), or of each pixel, (height, width).

    Args:
        task: one of `TASKS`.
        targets: (batch, labels), or (batch, height, width, raters): 0 or 1.
        rater_valid: (batch, raters) bool; None if all are. Each image counts once, however many its raters.

    Returns:
        float64 in 0..1, of shape (labels,) or (height, width).
    """
    truths = predictions.check_targets(targets, task)
    if task != SEGMENTATION:
        return truths.mean(0, dtype="float64")
    valid = predictions.check_valid(rater_valid, truths)
    total = np.zeros(truths.shape[1:3])
    for start in range(0, len(truths), 256):
        part = slice(start, start + 256)
        total += predictions.rater_mean(truths[part], valid[part]).sum(0)
    return total / len(truths)


def select_threshold(
    mean_probs: ArrayLike, targets: ArrayLike, task: str, rater_valid: ArrayLike | None = None
) -> float:
    """The cut of 0.05, 0.10, ..., 0.95 that serves decisions best; to be chosen on validation, never on test.

    Best is the highest mean Dice with the majority masks or, for labels, the highest balanced accuracy (mean of
    sensitivity and specificity), mean over the labels that occur as both 0 and 1. Of equal cuts the one nearest 0.5.
    Classes that exclude one another are decided by the most probable: 0.5 is given back.

    Args:
        mean_probs: (batch, labels) or (batch, height, width): the mean prediction.
        targets, task, rater_valid: as for `evaluate`. Masks may be a `DiskArray`.
    """
    probs, truths, valid = predictions.check(np.asarray(mean_probs)[None], targets, task, rater_valid)
    cuts = np.arange(1, 20) / 20
    if task in EXCLUSIVE:
        return 0.5
    if task == SEGMENTATION:
        values = np.zeros(len(cuts))
        for part_probs, masks, part_valid in chunks(probs, truths, valid):
            truth = majority_mask(masks, part_valid)
            values += [dice(truth, part_probs[0] > cut).sum() for cut in cuts]
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
    return float(cuts[best[np.argmin(np.abs(cuts[best] - 0.5).round(12))]])


def chunks(probs, masks, valid) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """Sampled masks, raters' masks and which are real, some images at a time."""
    size = max(1, records.CHUNK_VALUES // (probs[:, 0].size))
    for start in range(0, len(masks), size):
        part = slice(start, start + size)
        yield np.minimum(float64(probs[:, part]), 1), masks[part], valid[part]
