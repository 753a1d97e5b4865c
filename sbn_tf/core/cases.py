"""What metrics are made of: some images as metrics see them, an entry of the registry, statistics of a record."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from sbn_tf.core import histograms, statistics
from sbn_tf.core.predictions import BINARY, EXCLUSIVE, MULTI_LABEL, SEGMENTATION, event_entropy, float64, rater_mean

__all__ = ["Case", "Metric"]


class Case:
    """Some images as metrics see them: checked probabilities, what is true, and what follows from both.

    Args:
        probs: (samples, batch, ...) in 0..1.
        targets, valid: as `predictions.check` gives them.
        task: one of `TASKS`.
        uncertainty: the function `metrics.uncertainty`.
        threshold: where the mean prediction is cut into a decision; classes are decided by the most probable.
        prevalence: training frequency of 1, or None.
    """

    def __init__(self, probs, targets, task, valid, uncertainty, threshold=0.5, prevalence=None):
        probs, masks = float64(probs), task == SEGMENTATION
        self.probs = np.minimum(probs, 1)
        self.targets, self.task, self.valid, self.prevalence = targets, task, valid, prevalence
        self.axes = (1, 2) if masks else () if task in EXCLUSIVE else (1,)  # of the events of an image
        self.truth = rater_mean(targets, valid) if masks else float64(targets)
        # Entropies need classes that sum to 1. Rankings and bins do not: dividing by a sum that is 1 but for rounding
        # would part probabilities that are equal, and join others.
        self.parts = uncertainty(probs / probs.sum(-1, keepdims=True) if task in EXCLUSIVE else self.probs, task)
        self.mean_probs = self.probs.mean(0) if task in EXCLUSIVE else self.parts["mean_probs"]
        decided, actual = self.mean_probs > threshold, self.truth >= 0.5
        if task in EXCLUSIVE:
            decided, actual = (values.argmax(-1)[:, None] for values in (self.mean_probs, self.truth))
        self.decision, self.actual, self.wrong = decided, actual, decided != actual
        self.several = valid.sum(1) > 1 if masks else None  # images with two or more raters

    def mean(self, values, samples=False):
        """The mean over the events of each image, or over those of all its samples."""
        return values.mean((0, *(axis + 1 for axis in self.axes)) if samples else self.axes)

    def brier(self, probs, samples=False):
        """Brier score of each image against a random rater; over classes it is a sum."""
        each = np.square(probs - self.truth) + self.truth * (1 - self.truth)
        return each.sum(-1) if self.task in EXCLUSIVE else self.mean(each, samples)

    def keep(self, risk) -> dict[str, np.ndarray]:
        """What metrics that pool labels or pixels share: probabilities and targets, or histograms of the pixels."""
        kept = {"error": risk > 0.5 if self.task == SEGMENTATION else risk > 0}
        if self.prevalence is not None:
            kept["reference_brier"] = self.brier(self.prevalence)
        if self.task != SEGMENTATION:
            return kept | {"mean_probs": self.mean_probs, "targets": self.targets.astype("uint8")}
        region = (self.truth > 0) | self.decision  # what any rater or the prediction marks
        pixels = self.mean_probs, self.truth, self.parts["mutual_information"], self.wrong
        return kept | histograms.pixel_histograms(*pixels, self.several, region)


class Metric(NamedTuple):
    """One number of a table, defined once: scores, intervals, paired tests and tables ask nothing else.

    Args:
        name, tasks: what it is called, and the tasks that have it.
        low, high, higher_is_better: the values that it can take, and which way is better (None: neither).
        meaning: one sentence.
        image: `Case` -> (batch,), its value for each image, NaN where one has none; a record keeps it.
        statistic: record -> weighted statistic (`core.statistics`), or None: no value. Default: the mean of `image`.
        part: which of the statistic's numbers it is.
        interval: "quantile", "basic" (reflected: for calibration errors, which noise raises), or None for counts.
        undefined: why a record has no value, or a function (record, weights) -> reason.
        slow: it takes milliseconds an image and can be left out.
    """

    name: str
    tasks: tuple[str, ...]
    low: float
    high: float
    higher_is_better: bool | None
    meaning: str
    image: Callable[[Case], np.ndarray] | None = None
    statistic: Callable[[Any], statistics.Statistic | None] | None = None
    part: int = 0
    interval: str | None = "quantile"
    undefined: str | Callable[[Any, Any], str] = ""
    slow: bool = False


class Pooled(NamedTuple):
    """How a metric comes from a record: the last fields of `Metric` but one."""

    statistic: Callable[[Any], statistics.Statistic | None]
    part: int = 0
    interval: str | None = "quantile"
    undefined: str | Callable[[Any, Any], str] = ""


def metric(name, tasks, low, high, higher_is_better, how, meaning, undefined="", slow=False) -> Metric:
    """An entry: `how` is a function of a `Case`, the value of each image, or `Pooled`."""
    about = name, tasks, low, high, higher_is_better, meaning
    return (
        Metric(*about, None, *how) if isinstance(how, Pooled) else Metric(*about, how, undefined=undefined, slow=slow)
    )


INDEPENDENT = (BINARY, MULTI_LABEL)  # labels that do not exclude one another


def image_brier(case):
    """Brier score of the prediction for each image."""
    return case.brier(case.mean_probs)


def part(name):
    """That part of the entropy, for each image."""
    return lambda case: case.mean(case.parts[name])


def overlap(score):
    """A score of the decided mask against the majority mask, for each image."""
    return lambda case: score(case.actual, case.decision)


# The statistics of a record: it has arrays by name, `task`, `threshold`, and `alike`, why its samples do not differ.


def count(record):
    """Number of images."""
    return lambda weights: weights.sum(1)[None]


def skill(record):
    """Brier skill, where the prevalence is known."""
    known = "reference_brier" in record.arrays
    return statistics.skill(record["brier"], record["reference_brier"]) if known else None


def kappa(record):
    """Quadratic kappa of the most probable grades."""
    return statistics.quadratic_kappa(*(float64(record[name].argmax(1)) for name in ("mean_probs", "targets")))


def rankings(record):
    """AUC and average precision, means over the labels that have both; how many these are."""
    return statistics.column_rankings(record["mean_probs"], float64(record["targets"]))


def _pooled(record):
    """Probability and truth of each pooled event: every label, or the most probable class."""
    probs, targets = record["mean_probs"], float64(record["targets"])
    if record.task in EXCLUSIVE:
        return probs.max(1)[:, None], float64(probs.argmax(1) == targets.argmax(1))[:, None]
    return probs, targets


def width_error(record):
    """Calibration error in bins of equal width."""
    if record.task == SEGMENTATION:
        bins = record["calibration"]
        return histograms.width_error(bins[:, 1] - bins[:, 2], bins[:, 0].sum(1))
    return statistics.width_calibration(*_pooled(record))


def mass_error(record):
    """Calibration error in bins of equal count."""
    if record.task == SEGMENTATION:
        return histograms.mass_error(record["logit_count"], record["logit_gap"])
    probs, targets = _pooled(record)
    images = np.arange(probs.size) // probs.shape[1]
    return statistics.mass_calibration(probs.ravel(), targets.ravel(), images=images)


def _label_width_error(record):
    """Calibration error of each label or class in bins of equal width: the second number."""
    return statistics.width_calibration(record["mean_probs"], float64(record["targets"]))


def _label_mass_error(record):
    """Calibration error of each label or class in bins of equal count."""
    return statistics.column_mass_calibration(record["mean_probs"], float64(record["targets"]))


def _region_error(record):
    """Calibration error of the pixels that any rater or the prediction marks."""
    return histograms.width_error(record["calibration_region"][:, 1], record["calibration_region"][:, 0].sum(1))


def _confidence_error(record):
    """Calibration error of the more probable outcome."""
    if record.task == SEGMENTATION:
        return histograms.width_error(record["paper_gap"], record["calibration"][:, 0].sum(1))
    return statistics.width_calibration(*histograms.confidence_of(record["mean_probs"], float64(record["targets"])))


def correlation(record):
    """Pearson correlation of entropy and disagreement over the pixels."""
    return histograms.pearson(record["moments"])


def areas(record):
    """Area under the risk-coverage curve of the entropy, and its excess."""
    return statistics.areas(*(record[name].round(statistics.DECIMALS) for name in ("entropy", "risk")))


def _errors_by_entropy(record):
    """AUROC of an image's entropy for its being wrong."""
    return statistics.ranking(record["entropy"].round(statistics.DECIMALS), record["error"])


def _errors_by_information(record):
    """AUROC of an image's mutual information for its being wrong."""
    scores = record["mutual_information"].round(statistics.DECIMALS)
    return None if record.alike else statistics.ranking(scores, record["error"])


def _labels_by_entropy(record):
    """AUROC of a label's entropy for its being wrong: p and 1 - p have one entropy."""
    probs = record["mean_probs"]
    wrong, images = (probs > record.threshold) != (record["targets"] > 0.5), np.arange(probs.size) // probs.shape[1]
    scores = event_entropy(probs).round(statistics.DECIMALS)
    return statistics.ranking(scores.ravel(), wrong.ravel(), images)


def _pixels_by_entropy(record):
    """AUROC of a pixel's entropy for its being wrong."""
    return histograms.pixel_ranking(histograms.by_entropy(record["logit_count"], record["entropy_wrong"]))


def _pixels_by_information(record):
    """AUROC of a pixel's mutual information for its being wrong."""
    return None if record.alike else histograms.pixel_ranking(record["information_count"])


# Why a record has no value.


def _no_skill(record, weights):
    """Of the Brier skill."""
    known = "reference_brier" in record.arrays
    return "the training prevalence predicts these targets without error" if known else "train_prevalence was not given"


def _one_sided(record, weights):
    """Of a ranking of errors."""
    number = "every" if weights @ record["error"] else "no"
    return f"{number} image {'has Dice below 0.5' if record.task == SEGMENTATION else 'is wrong'}"


def _alike_or(reason):
    """Of a ranking by mutual information: the samples are alike, or that reason."""
    return lambda record, weights: record.alike or (reason if isinstance(reason, str) else reason(record, weights))


ONE_RATER = "no image has two or more valid raters"


def _no_correlation(record, weights):
    """Of the correlation with disagreement."""
    rated = (weights @ record["moments"])[0]
    return "the entropy or the raters' variance is the same at every pixel" if rated else ONE_RATER


def of_raters(score, decided=False, **options):
    """The value of each image of a score against raters: NaN where there are not two or more."""

    def image(case):
        values, two = np.full(len(case.truth), np.nan), case.several
        if two.any():
            predicted = case.decision[two] if decided else case.probs[:, two]
            values[two] = score(case.targets[two], predicted, case.valid[two], **options)
        return values

    return image


_NO_PAIR = "no label occurs as both 0 and 1"
NO_LABEL, NO_PIXEL = "no label is wrong, or every one", "no pixel is wrong, or every one"
COUNT = Pooled(count, 0, None)
SKILL = Pooled(skill, undefined=_no_skill)
KAPPA = Pooled(kappa, undefined="every grade, predicted and true, is the same one")
AUC, PRECISION = Pooled(rankings, undefined=_NO_PAIR), Pooled(rankings, 1, undefined=_NO_PAIR)
NUM_LABELS = Pooled(rankings, 2, None)
ECE, ECE_MASS, PAPER_ECE = (Pooled(made, 0, "basic") for made in (width_error, mass_error, _confidence_error))
ECE_LABEL, ECE_LABEL_MASS = Pooled(_label_width_error, 1, "basic"), Pooled(_label_mass_error, 0, "basic")
ECE_REGION = Pooled(_region_error, 0, "basic", "no rater and no prediction marks a pixel")
CORRELATION = Pooled(correlation, undefined=_no_correlation)
AREA, EXCESS = Pooled(areas), Pooled(areas, 1)
ERRORS = Pooled(_errors_by_entropy, undefined=_one_sided)
ERRORS_MI = Pooled(_errors_by_information, undefined=_alike_or(_one_sided))
LABEL_ERRORS = Pooled(_labels_by_entropy, undefined=NO_LABEL)
PIXEL_ERRORS = Pooled(_pixels_by_entropy, undefined=NO_PIXEL)
PIXEL_ERRORS_MI = Pooled(_pixels_by_information, undefined=_alike_or(NO_PIXEL))
