"""Dropout that stays on in prediction."""

from __future__ import annotations

from sbn_tf.experiments import dropout
from sbn_tf.experiments.methods.base import Method

RATE = 0.1


class MCDropout(Method):
    """Dropout before every weight layer but the first, trained on from step 1, kept on in prediction.

    Gal and Ghahramani 2016; there from initial weights. Rate 0.1.
    """

    name, title = "mc_dropout", f"MC dropout, rate {RATE:g}, from the trained weights"
    takes_samples = True

    def _train(self, data):
        self._train_step1(data)
        self._continue(data, dropout=RATE)

    def _samples(self, images):
        return dropout.sample_dropout(self.model, images, self.num_samples, seed=self.seed, batch_size=len(images))

    def _trainings(self, parts):
        return {self.name: parts.longer}
