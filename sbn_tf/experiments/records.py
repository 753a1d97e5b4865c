"""Statistics of each test image: a record gives every metric, its bootstrap interval, and paired tests of two methods.

Every metric is a function of these arrays and of a weight for each image. So reading in pieces is concatenation, a
bootstrap is a weighting, and a paired test is two records under the same weights. A record takes about 100 bytes an
image and 9 a label or class, or 13 kB an image with masks of any size.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
from numpy.typing import ArrayLike

from sbn_tf.core.files import check_archive, write_atomically
from sbn_tf.core.histograms import COLUMNS
from sbn_tf.core.predictions import TASKS, float64
from sbn_tf.core.statistics import DECIMALS, means, plain, ranking
from sbn_tf.metrics import METRICS, Metric

# Masks are scored some images at a time, and a bootstrap runs some resamples, so memory stays bounded. The allocator
# keeps temporary arrays of 8 MB; the pages of larger ones are new each time, which costs more than the arithmetic.
CHUNK_VALUES = 2**20
RECORD_FORMAT = 4  # of record.npz: raised when an array changes its meaning
_FORMAT = f"sbn_tf.experiments.records.Record {RECORD_FORMAT}"


def of_task(task: str) -> dict[str, Metric]:
    """The metrics of a task."""
    return {name: metric for name, metric in METRICS.items() if task in metric.tasks}


class Record:
    """Statistics of each image of one method: all metrics, their intervals and paired tests come from these.

    `Evaluator.record` makes it. `record["risk"]` is an array whose first axis is images: the value of each image for
    metrics that are means over images, "error" (any label wrong, wrong class, or Dice below 0.5), and what `Case.keep`
    gives: with labels and classes "mean_probs" and "targets", with masks histograms of the pixels.

    Args:
        task: one of `TASKS`.
        arrays: name -> array.
        threshold: where the mean prediction was cut.
        num_samples: samples of the posterior.
        groups: (images,) integers, the patient of each, or None where not known.
        digests: "images" and "ids", which differ where two records are of different images.
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
        self._made, self._resampled = {}, {}

    def __getitem__(self, name: str) -> np.ndarray:
        return self.arrays[name]

    def __len__(self) -> int:
        return self.num_images

    @property
    def num_images(self) -> int:
        """Number of images."""
        return len(self.arrays["risk"])

    @property
    def unit(self) -> str:
        """What a bootstrap draws: "patient" where each image has one, else "image"."""
        return "image" if self.groups is None else "patient"

    @property
    def num_units(self) -> int:
        """How many of them there are."""
        return self.num_images if self.groups is None else int(self.groups.max()) + 1

    @property
    def alike(self) -> str:
        """Why the mutual information ranks nothing; "" where the samples differ."""
        if self.num_samples == 1:
            return "one sample: mutual information is 0 everywhere"
        differ = self["mutual_information"].max() >= 10.0**-DECIMALS
        return "" if differ else "the samples are all the same: mutual information is 0 everywhere"

    def metrics(self, weights: ArrayLike | None = None) -> dict[str, float | dict[str, str]]:
        """All metrics of the task: key -> float, and "undefined": the reason for each key that has no value.

        Args:
            weights: (images,) >= 0, how often each image counts; None: once.

        Raises:
            ValueError: weights of another shape, negative, not finite or all 0.
        """
        n = self.num_images
        weights = np.ones(n) if weights is None else float64(weights)
        if weights.shape != (n,) or not (np.isfinite(weights) & (weights >= 0)).all() or not weights.any():
            raise ValueError(
                f"Expected weights ({n},), finite, >= 0 and not all 0. "
                f"Received: shape {weights.shape}, values from {weights.min(initial=0)} to {weights.max(initial=0)}"
            )
        values, result, undefined = self._values(of_task(self.task), weights[None]), {}, {}
        for key, metric in of_task(self.task).items():
            value = float(values[key][0]) if key in values else np.nan
            if np.isfinite(value):
                result[key] = value
            elif self.only is not None and key not in self.only:
                undefined[key] = "not measured: these predictions are masks, not probabilities"
            else:
                why = metric.undefined
                undefined[key] = why if isinstance(why, str) else why(self, weights)
        return {**result, "undefined": undefined}

    def numbers(self) -> dict[str, float]:
        """The metrics that have a value."""
        return {key: value for key, value in self.metrics().items() if isinstance(value, float)}

    def bootstrap(self, num_resamples: int = 1000, seed: int = 0, level: float = 0.95) -> dict:
        """Bootstrap intervals of all metrics under resampling of the test images.

        Patients are drawn with replacement, each with all their images, where every image has one, else images. The
        interval says how far the number depends on which images are in the test set, and nothing of how far it depends
        on the training: that takes several seeds. Where a label has no positive in a resample, the means over labels
        are over the others there.

        The interval is that of the resamples' quantiles, except for calibration errors. They count noise as error: of
        few images they are too high, and of resamples, in which images repeat, higher still. Theirs is reflected,
        `2 * value - quantile`, cut to 0..1 ("basic" interval), which removes the excess. Of 300 simulated images with 3
        labels and a true error of 0.081, 0.045 and 0, it included that in 93, 87 and 46 of 100 sets, the quantiles in
        73, 50 and 0.

        Args:
            num_resamples: how many.
            seed: of the draws; the same for two records of the same images, so theirs are paired.
            level: share of the resamples within.

        Returns:
            Key -> (low, high) for each metric with a value but the counts, and "undefined": the reason for those
            that more than 5 % of the resamples leave undefined.

        Reference: Efron and Tibshirani 1993, chapter 13; Davison and Hinkley 1997, section 5.2 (basic).
        """
        if num_resamples < 1 or not 0 < level < 1:
            raise ValueError(
                f"Expected num_resamples >= 1 and level between 0 and 1. Received: {num_resamples} and {level}"
            )
        numbers = self.numbers()
        keys = [key for key in numbers if METRICS[key].interval]
        if self.num_units == 1:
            return {"undefined": dict.fromkeys(keys, f"one {self.unit}: nothing to resample")}
        result, undefined = {}, {}
        for key, values in self.distribution(keys, num_resamples, seed).items():
            values, metric = values[np.isfinite(values)], METRICS[key]
            if len(values) < 0.95 * num_resamples:
                undefined[key] = f"undefined in {num_resamples - len(values)} of {num_resamples} resamples"
                continue
            low, high = np.quantile(values, [(1 - level) / 2, (1 + level) / 2])
            if metric.interval == "basic":
                reflected = 2 * numbers[key] - high, 2 * numbers[key] - low
                low, high = np.clip(reflected, metric.low, metric.high)
            result[key] = (float(low), float(high))
        return {**result, "undefined": undefined}

    def distribution(self, keys: Iterable[str], num_resamples: int, seed: int) -> dict[str, np.ndarray]:
        """Key -> (resamples,) values, NaN where undefined; kept for the next interval or test."""
        kept = self._resampled.setdefault((num_resamples, seed), {})
        if wanted := [key for key in keys if key not in kept]:
            parts = [self._values(wanted, weights) for weights in self._resamples(num_resamples, seed)]
            kept |= {key: np.concatenate([part[key] for part in parts]) for key in parts[0]}
        return {key: kept[key] for key in keys if key in kept}

    def _resamples(self, num_resamples, seed) -> Iterator[np.ndarray]:
        """Weights (resamples, images), some resamples at a time, the same whatever their number at a time."""
        items = self["mean_probs"].size if "mean_probs" in self.arrays else max(self.num_images, COLUMNS)
        step, units = max(1, CHUNK_VALUES // items), self.num_units
        generator = np.random.default_rng([seed, 4701])
        for start in range(0, num_resamples, step):
            rows = range(start, min(start + step, num_resamples))
            drawn = [np.bincount(generator.integers(units, size=units), minlength=units) for _ in rows]
            weights = np.stack(drawn).astype("float64")
            yield weights if self.groups is None else weights[:, self.groups]

    def _values(self, keys, weights):
        """Key -> (resamples,) for weights (resamples, images); a key that this record never has is left out."""
        of_images = [name for name, m in of_task(self.task).items() if not m.statistic and name in self.arrays]
        wanted: dict = {}
        for key in keys:
            if self.only is None or key in self.only:
                wanted.setdefault(METRICS[key].statistic, []).append(METRICS[key])
        found = {}
        for make, metrics in wanted.items():
            if make not in self._made:
                self._made[make] = make(self) if make else means([self.arrays[name] for name in of_images])
            numbers = self._made[make](weights) if self._made[make] else None
            for metric in metrics:
                if make and numbers is not None:
                    found[metric.name] = numbers[metric.part]
                elif metric.name in of_images:
                    found[metric.name] = numbers[of_images.index(metric.name)]
        return found

    def save(self, path: str | os.PathLike) -> None:
        """Write it as an npz file, whole or not at all."""
        about = {name: getattr(self, name) for name in ("task", "threshold", "num_samples", "digests", "only")}
        about |= {"format": _FORMAT, "arrays": sorted(self.arrays)}
        arrays = {f"image_{name}": array for name, array in self.arrays.items()}
        if self.groups is not None:
            arrays["groups"] = self.groups
        arrays["about"] = np.array(json.dumps(about))
        # None of numpy's own parameters has such a name as these arrays.
        write_atomically(path, lambda file: np.savez_compressed(file, **arrays))  # type: ignore[arg-type]

    @classmethod
    def load(cls, path: str | os.PathLike) -> Record:
        """Read what `save` wrote.

        Raises:
            ValueError: a file that is damaged or something else.
            FileNotFoundError: no such file.
        """
        try:
            check_archive(path)
            with np.load(path, allow_pickle=False) as file:
                about = json.loads(str(file["about"]))
                arrays = {name.removeprefix("image_"): file[name] for name in file.files if name != "about"}
                groups = arrays.pop("groups", None)
            if about.pop("format", None) != _FORMAT:
                raise ValueError(f"not of format {_FORMAT}")
            names, only = about.pop("arrays"), about.pop("only")
            record = cls(arrays=arrays, groups=groups, only=None if only is None else tuple(only), **about)
            record._check(names)
        except FileNotFoundError:
            raise
        except Exception as error:  # damaged zips, headers and JSON raise a dozen kinds
            raise ValueError(
                f"Expected a record of sbn_tf.experiments.scoring in {Path(path)}. Received: {error}.\n"
                "Delete it and score the method again."
            ) from None
        return record

    def _check(self, names):
        """Refuse arrays that are not those of the task, or damaged."""
        if self.task not in TASKS:
            raise ValueError(f"task {self.task!r}")
        of_images = {key for key, metric in of_task(self.task).items() if metric.image and not metric.slow}
        if sorted(self.arrays) != names or of_images - set(names):
            raise ValueError(f"{self.task!r} with arrays {sorted(self.arrays)}")
        arrays = [*self.arrays.values(), *(() if self.groups is None else (self.groups,))]
        if len({array.shape[:1] for array in arrays} - {(0,), ()}) != 1 or not all(array.size for array in arrays):
            raise ValueError("arrays of different lengths")
        for name, array in self.arrays.items():
            partial = name in METRICS and METRICS[name].undefined  # a value that not every image has
            if not partial and not np.isfinite(array).all():
                raise ValueError(f"NaN or infinity in {name!r}")


def compare(
    record: Record, other: Record, keys: Iterable[str] | None = None, num_resamples: int = 1000, seed: int = 0
) -> dict[str, dict[str, float]]:
    """Paired bootstrap test of two methods on the same images.

    Both are resampled alike, so what makes an image hard for both cancels. The test asks whether the difference would
    be there in other images (patients) of the same kind, for these two trained networks; it knows nothing of other
    seeds or trainings. The resamples say how far a difference strays from its mean, which for calibration errors is not
    the observed one, since resampling raises the lower of two more. p is the share of resamples that stray as far as
    the observed difference is from 0, to either side, with one added to both counts, so never 0; the interval is the
    observed difference minus what the resamples stray. It calls 5 % of alike methods different, by calibration errors
    that are mostly noise fewer. Many comparisons at 5 % find something by chance: correct for their number (Holm 1979).

    Args:
        record, other: of the same images in the same order.
        keys: metrics to compare; None: all that both have.
        num_resamples, seed: as for `Record.bootstrap`.

    Returns:
        Key -> {"difference": record's minus other's, "low", "high": its 95 % interval, "p_value"}. A key without a
        value in one of them, or in more than 5 % of the resamples, is left out.

    Raises:
        ValueError: records of different images, one image or patient alone, or an unknown key.

    Reference: Efron and Tibshirani 1993, chapter 16; Hall and Wilson 1991 (why about their mean).
    """
    _check_pair(record, other)
    known = [key for key, metric in of_task(record.task).items() if metric.interval]
    keys = known if keys is None else list(keys)
    if unknown := [key for key in keys if key not in known]:
        raise ValueError(f"Expected keys among {known}. Received: {unknown}")
    if num_resamples < 1:
        raise ValueError(f"Expected num_resamples >= 1. Received: num_resamples={num_resamples}")
    ours, theirs = record.numbers(), other.numbers()
    keys = [key for key in keys if key in ours and key in theirs]
    one, two = (each.distribution(keys, num_resamples, seed) for each in (record, other))
    result = {}
    for key in keys:
        differences = one[key] - two[key]
        differences = differences[np.isfinite(differences)]
        if len(differences) < 0.95 * num_resamples:
            continue
        observed, strayed = ours[key] - theirs[key], differences - differences.mean()
        low, high = observed - np.quantile(strayed, [0.975, 0.025])
        p_value = float(((np.abs(strayed) >= abs(observed)).sum() + 1) / (len(differences) + 1))
        result[key] = {"difference": observed, "low": float(low), "high": float(high), "p_value": p_value}
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
    if record.num_units == 1:
        raise ValueError(f"Expected two {record.unit}s or more: nothing can be resampled. Received: one")


def shift_auroc(clean: Record, moved: Record) -> dict:
    """How well the uncertainty of an image separates shifted images from clean ones: 0.5 is chance.

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
        if key == "mutual_information" and clean.alike and moved.alike:
            undefined[key] = clean.alike
            continue
        scores = np.concatenate([clean[key], moved[key]]).round(DECIMALS)
        result[key] = float(plain(ranking(scores, labels), len(labels))[0])
    return {**result, "undefined": undefined}
