"""What a network's validation images say about its errors on new ones: kept in its card, asked for any risk."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Literal

import numpy as np
from pydantic import BaseModel, ConfigDict
from scipy.special import expit

from sbn_tf.core import conformal
from sbn_tf.core.overlap import false_negative_rates
from sbn_tf.datasets.base import BINARY, EXCLUSIVE, SEGMENTATION, Split
from sbn_tf.metrics import dice

# Where masks may be cut, from safe to bold: even steps of the logit, chosen before any image.
CUTS = np.concatenate([[0.0], expit(np.arange(-160, 161) / 10)])
CONFIDENCE = 0.9  # that the error rate of what is not referred holds


class Calibration(BaseModel):
    """Of each validation image what `core.conformal` needs.

    It fits new images that are drawn as the validation images were. These also chose the temperature, and the epoch or
    the threshold where the recipe says so: then the guarantees are a little too good. With patients they are for a new
    patient.

    Args:
        unit: "patients", or "images" where the data have no patients: what is drawn.
        num: the number of these.
        owners: the patient of each validation image.
        scores: of labels, for each class the `1 - p` of the images that have it; "not" the label first where there is
            one. Of masks ().
        images: for each class the numbers of these images.
        missed: of masks the mean share of missed pixels at each of `CUTS`, patients weighing alike. Else ().
        total: the total uncertainty of each image in nats.
        error: whether it was wrong: any label, the class, or a Dice below 0.5 with the majority mask.
    """

    model_config = ConfigDict(frozen=True)

    unit: Literal["patients", "images"]
    num: int
    owners: tuple[int, ...]
    scores: tuple[tuple[float, ...], ...] = ()
    images: tuple[tuple[int, ...], ...] = ()
    missed: tuple[float, ...] = ()
    total: tuple[float, ...]
    error: tuple[bool, ...]

    def limits(self, alpha: float, task: str) -> np.ndarray:
        """The largest `1 - p` with which a class is in the set, (classes,): see `conformal.class_limits`."""
        owners = [np.asarray(self.owners)[list(one)] for one in self.images]
        return conformal.class_limits(self.scores, alpha, owners, pool=task == BINARY or task in EXCLUSIVE)

    def cut(self, alpha: float) -> float:
        """Where masks are cut, `p >= cut`, so that they miss at most alpha of the true pixels in the mean."""
        return float(CUTS[conformal.risk_cut(self.missed, self.num, alpha)])

    def refer_limit(self, rate: float) -> float:
        """The total uncertainty below which errors are at most `rate`, with confidence 0.9."""
        chosen = conformal.one_of_each(self.owners)
        return conformal.refer_limit(np.asarray(self.total)[chosen], np.asarray(self.error)[chosen], rate, CONFIDENCE)


def calibrated(split: Split, predictions: Iterable[tuple[np.ndarray, float]], threshold: float) -> Calibration:
    """The calibration of a network.

    Args:
        split: images that no weight was trained on.
        predictions: of each image, in order: the mean probabilities (classes,) or (height, width), and the total
            uncertainty in nats.
        threshold: where probabilities are cut into labels and masks.
    """
    num, masks = split.num_examples, split.task == SEGMENTATION
    owners = np.arange(num) if split.groups is None else np.unique(split.groups, return_inverse=True)[1]
    probs, totals, errors, losses = [], [], [], []
    for i, (one, total) in enumerate(predictions):
        target = split.majority(slice(i, i + 1))[0, ..., 0] if masks else np.asarray(split.targets[i])
        totals.append(float(total))
        if masks:
            losses.append(false_negative_rates(one[None], target[None], CUTS)[0])
            errors.append(bool(dice(target[None] > 0.5, one[None] > threshold)[0] < 0.5))
        else:
            probs.append(one)
            decided = np.eye(len(one))[one.argmax()] if split.task in EXCLUSIVE else one > threshold
            errors.append(bool((decided != target).any()))
    unit = "images" if split.groups is None else "patients"
    found = {"unit": unit, "num": len(np.unique(owners)), "owners": owners.tolist(), "total": totals, "error": errors}
    if masks:
        found["missed"] = conformal.mean_risk(np.stack(losses), owners)[0].tolist()
    else:
        outputs = two_classes(np.stack(probs).astype("float64"), split.task)
        targets = two_classes(np.asarray(split.targets), split.task)
        found["images"] = [np.flatnonzero(column).tolist() for column in targets.T]
        found["scores"] = [(1 - outputs[targets[:, k] > 0, k]).tolist() for k in range(targets.shape[1])]
    return Calibration.model_validate(found)


def two_classes(values: np.ndarray, task: str) -> np.ndarray:
    """(batch, 1) of a binary label as (batch, 2): not the label, and the label. Of other tasks as they are."""
    return np.concatenate([1 - values, values], 1) if task == BINARY else values
