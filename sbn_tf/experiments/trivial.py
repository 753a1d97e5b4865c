"""Predictors that ignore the image: what they reach is no merit of a method."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import numpy as np
from numpy.typing import ArrayLike

from sbn_tf.core.predictions import EXCLUSIVE, SEGMENTATION, broadcast, check_range, check_targets
from sbn_tf.datasets.base import Data
from sbn_tf.experiments.records import CHUNK_VALUES, Record
from sbn_tf.experiments.scoring import Evaluator, about_images, predicted, prevalence, record_of

__all__ = ["trivial"]


def trivial(
    task: str,
    train_targets: ArrayLike,
    test_targets: ArrayLike,
    *,
    rater_valid: np.ndarray | None = None,
    train_rater_valid: ArrayLike | None = None,
) -> dict[str, dict[str, float | dict[str, str]]]:
    """Rows of predictors that ignore the image, scored as `evaluate` does.

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
    test_targets = check_targets(test_targets, task)
    frequency = prevalence(task, train_targets, train_rater_valid)
    options = {"train_prevalence": frequency, "boundary": False}
    found = _constant_records(task, frequency, test_targets, options, rater_valid=rater_valid)
    return {name: record.metrics() for name, record in found.items()}


def trivial_records(
    data: Data,
    *,
    threshold: float = 0.5,
    boundary: bool = True,
    deterministic: Callable | None = None,
    batch_size: int = 50,
) -> dict[str, Record]:
    """The same as `trivial`, as records of a dataset's test split, for intervals and paired tests.

    With `deterministic`, the `predict_samples` of a deterministic method, and several raters, also "level_sets": the
    `level_sets` of its probability map, `batch_size` images a call. These have "ged" and "hungarian_iou" alone.
    """
    task, train, test = data.card.task, data.train, data.test
    frequency = prevalence(task, train.targets, train.rater_valid)
    options = {"train_prevalence": frequency, "threshold": threshold, "boundary": boundary}
    about = about_images(test)
    found = _constant_records(task, frequency, test.targets, options, **about)
    if deterministic is not None and task == SEGMENTATION and test.num_raters > 1:

        def sets_of(part):
            return level_sets(predicted(deterministic, test.normalised(part), test, part.start).mean(0))

        evaluator = Evaluator(task, threshold=threshold, boundary=False, only=("ged", "hungarian_iou"))
        found["level_sets"] = record_of(evaluator, batch_size, sets_of, test.targets, **about)
    return found


def level_sets(mean_probs: ArrayLike, levels: Iterable[float] = (0.1, 0.3, 0.5, 0.7, 0.9)) -> np.ndarray:
    """Masks where a probability map exceeds each level, as samples: the spread of raters that one map already knows.

    They are no draws from a distribution: compare them with the raters' masks ("ged", "hungarian_iou"); their mean is
    not a probability.

    Args:
        mean_probs: (batch, height, width) or (..., width, 1), 0..1; else a ValueError.
        levels: probabilities.

    Returns:
        (levels, batch, height, width) float32 of 0 and 1.
    """
    mean_probs = np.asarray(mean_probs)
    mean_probs = mean_probs[..., 0] if mean_probs.ndim == 4 and mean_probs.shape[-1] == 1 else mean_probs
    if mean_probs.ndim != 3:
        raise ValueError(f"Expected mean_probs (batch, height, width). Received: shape {mean_probs.shape}")
    check_range(mean_probs)
    return np.stack([mean_probs > level for level in levels]).astype("float32")


def _constant_records(task, frequency, targets, options, **about):
    """Name -> record of predictors that say the same of every image."""
    if task in EXCLUSIVE:
        constant, constants = "most_frequent", np.eye(len(frequency))[frequency.argmax()]
    else:
        constant, constants = "all_background" if task == SEGMENTATION else "all_negative", 0.0
    shape = targets.shape[1 : 3 if task == SEGMENTATION else 2]

    def record(values):
        def probs_of(part):
            return broadcast(values, (1, len(range(len(targets))[part]), *shape), "train_targets")

        step = max(1, CHUNK_VALUES // int(np.prod(shape)))
        return record_of(Evaluator(task, **options), step, probs_of, targets, **about)

    return {constant: record(constants), "prevalence": record(frequency)}
