"""One network, trained once or longer, as it is or with a temperature."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike
from scipy import optimize, special

from sbn_tf.datasets.base import EXCLUSIVE, SEGMENTATION
from sbn_tf.experiments.methods.base import Method, chosen, validation
from sbn_tf.experiments.predictor import recovered_logits, tempered
from sbn_tf.experiments.turns import NUM_TURNS, turned_samples

__all__ = ["fit_temperature"]

TEMPERATURES = (0.05, 20.0)


class Deterministic(Method):
    """Step 1 and nothing more."""

    name, title = "deterministic", "deterministic"

    def _paper_flops(self):
        return 1.0


class Turned(Deterministic):
    """`deterministic`, which sees each image in eight ways, flipped and turned: their mean predicts.

    Reference: Wang et al. 2019, "Aleatoric uncertainty estimation with test-time augmentation".
    """

    name, title = "turned", "deterministic, mean over eight flips and turns"

    def _count_samples(self, num_samples):
        return NUM_TURNS

    def _train(self, data):
        super()._train(data)
        self.folder = self._own_folder(data)

    def _samples(self, images):
        return turned_samples(super()._samples, images, self.num_samples)

    def _paper_flops(self):
        return None


class DeterministicLonger(Method):
    """Step 1, then the epochs of step 3 at its learning rate, without any posterior: as many epochs as `partial`.

    The budget is the same if a step costs one pass ("split"); five samples of the whole batch ("all") cost five.
    """

    name, title = "deterministic_longer", "deterministic, the epochs of steps 1 and 3"

    def _train(self, data):
        self._train_step1(data)
        self._continue(data)

    def _trainings(self, parts):
        return {"longer0": parts.longer}


def fit_temperature(logits: ArrayLike, targets: ArrayLike, task: str) -> float:
    """Temperature that minimises the NLL of `logits / temperature`, within 0.05 to 20.

    The NLL is convex in `1 / temperature`, so the minimum is one.

    Args:
        logits: (images, ...), of classes on the last axis.
        targets: of the same shape, 0..1; the mean of raters gives the mean of their NLLs.
        task: one of `datasets.base.TASKS`.

    Raises:
        ValueError: shapes that differ, no image, or logits that are not finite.

    Reference: Guo et al. 2017, "On calibration of modern neural networks", section 4.2.
    """
    logits, targets = np.asarray(logits), np.asarray(targets)
    if logits.shape != targets.shape or not len(logits):
        raise ValueError(
            f"Expected logits and targets of one shape, one image or more. Received: {logits.shape}, {targets.shape}"
        )
    if not np.isfinite(logits).all():
        raise ValueError("Expected finite logits. Received: NaN or infinity. Did training diverge?")
    rows = max(1, 2**20 // max(1, logits[0].size))
    parts = [slice(start, start + rows) for start in range(0, len(logits), rows)]  # logits of many masks are large

    def nll(log_temperature):
        total = 0.0
        for part in parts:
            z = logits[part].astype("float64") / np.exp(log_temperature)
            normaliser = special.logsumexp(z, axis=-1).sum() if task in EXCLUSIVE else np.logaddexp(0.0, z).sum()
            total += normaliser - (targets[part] * z).sum()
        return total / logits.size

    found = optimize.minimize_scalar(nll, bounds=np.log(TEMPERATURES), method="bounded", options={"xatol": 1e-5})
    return float(np.exp(found.x))


class Temperature(Method):
    """`deterministic` with its logits divided by one number, chosen for the NLL of the validation split."""

    name, title = "temperature", "deterministic, temperature chosen on validation"

    def _train(self, data):
        self._train_step1(data)
        self.folder = self._own_folder(data, bounds=TEMPERATURES)

        def choose():
            logits, truth = [], []
            for images, targets in validation(data, self.recipe.batch_size):
                logits.append(recovered_logits(self._at_one(images), self._task).astype("float32"))
                truth.append(targets.astype("float32"))
            return fit_temperature(np.concatenate(logits), np.concatenate(truth), self._task)

        self.selection = chosen(self.folder, "temperature", choose)

    def _at_one(self, images):
        probs = super()._samples(images)[0]
        return probs[..., 0] if self._task == SEGMENTATION else probs

    def _samples(self, images):
        return tempered(super()._samples(images), self.selection["temperature"], self._task)

    def _trainings(self, parts):
        return {self.name: parts.validated}
