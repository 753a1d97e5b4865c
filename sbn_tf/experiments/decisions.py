"""What `sbn-tf predict` decides with a guarantee: sets of labels, masks that miss little, images to refer."""

from __future__ import annotations

import numpy as np

from sbn_tf.datasets.base import BINARY, EXCLUSIVE, SEGMENTATION
from sbn_tf.experiments.guarantees import CONFIDENCE, two_classes
from sbn_tf.experiments.predictor import NetworkCard, Prediction


class Decider:
    """The limits of a network for the asked risks.

    Args:
        card: of the network.
        alpha: the risk of a set of classes to lack the true one; of a label that an image has to lack in its set; the
            mean share of the true pixels that masks miss. Between 0 and 1. None: neither sets nor such masks.
        refer: the rate of errors among the images that are not referred, between 0 and 1, with confidence 0.9. An error
            is a wrong class, any wrong label, or a Dice below 0.5. None: nothing is referred.

    Raises:
        ValueError: a number that is not between 0 and 1, too few validation images, or a card without a calibration.
    """

    def __init__(self, card: NetworkCard, alpha: float | None = None, refer: float | None = None):
        self.card, self.alpha, self.refer = card, alpha, refer
        self.limits = self.cut = self.most = None
        for name, value in (("alpha", alpha), ("refer", refer)):
            if value is not None and not 0 < value < 1:
                raise ValueError(f"Expected {name} between 0 and 1. Received: {name}={value!r}")
        found = card.calibration
        if found is None and (alpha is not None or refer is not None):
            raise ValueError(
                "Expected a network with a calibration, for --alpha and --refer. Received: one without; "
                "run `sbn-tf train` again."
            )
        if found is not None and refer is not None:
            self.most = found.refer_limit(refer)
        if found is not None and alpha is not None and card.task == SEGMENTATION:
            self.cut = found.cut(alpha)
        elif found is not None and alpha is not None:
            self.limits = found.limits(alpha, card.task)

    @property
    def names(self) -> list[str]:
        """The labels that a set may contain."""
        return [*((f"not {self.card.classes[0]}",) if self.card.task == BINARY else ()), *self.card.classes]

    def columns(self, one: Prediction) -> dict[str, str | bool]:
        """Columns of the table: "set" of labels, with semicolons between, "none" of none; "refer"."""
        row: dict[str, str | bool] = {}
        if self.limits is not None:
            probs = two_classes(one.probabilities[None].astype("float64"), self.card.task)[0]
            inside = 1 - probs <= self.limits
            row["set"] = ";".join(np.asarray(self.names)[inside]) or "none"
        if self.most is not None:
            row["refer"] = bool(one.means["total"] >= self.most)
        return row

    def promises(self) -> list[str]:
        """What holds for new images that are drawn as the validation images were, a line for each risk."""
        found, lines = self.card.calibration, []
        if found is None:
            return lines
        drawn = f"new {found.unit} drawn as the {found.num} of validation"
        if self.cut is not None:
            missed = f"{self.alpha:g} of the true pixels missed at most, in the mean over {drawn}"
            lines.append(f"masks_fnr: {missed}; cut at {self.cut:.3g}")
        if self.limits is not None:
            what = "the true class" if self.card.task in (*EXCLUSIVE, BINARY) else "a label that the image has"
            lines.append(f"set: without {what} in {self.alpha:g} of the cases at most, for {drawn}")
            if never := [name for name, at in zip(self.names, self.limits, strict=True) if at == np.inf]:
                lines.append(f"set: always with {', '.join(never)}: too few validation images have it")
        if self.most is not None:
            kept = f"{self.refer:g} of the others wrong at most, with confidence {CONFIDENCE:g}, for {drawn}"
            none = "all images; every share of the validation images has too many errors"
            lines.append(f"refer: {kept if self.most > -np.inf else none}")
        return lines
