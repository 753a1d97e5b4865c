"""One network, trained once or longer, as it is or with a temperature."""

from __future__ import annotations

import numpy as np

from sbn_tf.datasets.base import SEGMENTATION
from sbn_tf.experiments.methods.base import Method, chosen, validation
from sbn_tf.experiments.predictor import recovered_logits, tempered
from sbn_tf.experiments.temperature import TEMPERATURES, fit_temperature


class Deterministic(Method):
    """Step 1 and nothing more."""

    name, title = "deterministic", "deterministic"

    def _paper_flops(self):
        return 1.0


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
