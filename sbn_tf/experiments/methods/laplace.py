"""A Gaussian posterior without training."""

from __future__ import annotations

import numpy as np

from sbn_tf import metrics
from sbn_tf.datasets.base import EXCLUSIVE
from sbn_tf.experiments import training
from sbn_tf.experiments.bayesian import set_scales
from sbn_tf.experiments.methods.base import Method, chosen, validation
from sbn_tf.experiments.methods.sampled import Sampled, score_flops
from sbn_tf.partial_bayes import to_partial_bayes

PRIOR_PRECISIONS = (1.0, 10.0, 100.0, 1e3, 1e4, 1e5)  # 1: the prior N(0, 1) of `to_partial_bayes`


class Laplace(Method):
    """A Gaussian about step 1's weights at the salient ones, as wide as the curvature says, without training.

    `scale = (num_train * fisher + prior_precision) ** -0.5`, with the empirical Fisher information's diagonal for the
    Hessian of the negative log-likelihood (see `empirical_fisher`). The prior precision is chosen on the validation
    split's NLL. The weights are those of `partial`; batch norm is frozen.

    The likelihood is the one of training: under weighted losses the weighted one. From the score "fisher" the curvature
    is too large where step 1 has not converged: on phantom_nodule 18 times after 8 epochs on 300 images (in the median;
    scales then 4 times too narrow), 1.02 times after the 16 epochs of "quick" on all. The prior only narrows further.
    Recipes of score "per_example" have it exact.

    Reference: Daxberger et al. 2021, "Bayesian deep learning via subnetwork inference", section 4 (there a full
    covariance of the subnetwork).
    """

    name, title = "laplace", "diagonal Laplace on the salient weights, no training"
    takes_r_bayes = takes_samples = True

    def _train(self, data):
        self._train_step1(data)
        recipe = self.recipe
        self.masks = training.masks_run(self.step1, data, recipe, self.r_bayes, seed=self.seed, verbose=self.verbose)
        fisher = training.fisher_run(self.step1, data, recipe, verbose=self.verbose)
        self._precision = {key: self._num_train * fisher[key][mask] for key, mask in self.masks.items()}
        options = {"num_train": self._num_train, "num_samples": self.num_samples}
        self.model = to_partial_bayes(self.step1.model, self.masks, batch_norm="frozen", seed=self.seed, **options)
        self.sampled = Sampled(self.model)
        self.folder = self._own_folder(
            data,
            masks=self.masks.digest(),
            score=self._score(),
            batch_size=recipe.batch_size,
            class_weights=recipe.class_weights,
            num_samples=self.num_samples,
            grid=PRIOR_PRECISIONS,
        )
        self.selection = chosen(self.folder, "prior_precision", lambda: self._choose(data))
        self._set_scales(self.selection["prior_precision"])

    def _score(self):
        """The score that gives the Fisher information."""
        return "per_example" if self.recipe.score == "per_example" else "fisher"

    def _choose(self, data):
        def nll(prior_precision):
            self._set_scales(prior_precision)
            return self._validation_nll(data)

        return min(PRIOR_PRECISIONS, key=nll)

    def _validation_nll(self, data) -> float:
        """NLL of the mean prediction on the validation split, in nats a label, pixel or classified image."""
        total = 0.0
        for images, targets in validation(data, self.recipe.batch_size):
            mean = self.predict_samples(images).mean(axis=0)
            if self._task in EXCLUSIVE:
                mean, targets = (mean * targets).sum(axis=-1), np.ones(len(targets))
            total += len(images) * metrics.nll(targets, mean)
        return total / data.val.num_examples

    def _set_scales(self, prior_precision):
        set_scales(self.model, {key: (values + prior_precision) ** -0.5 for key, values in self._precision.items()})

    def _samples(self, images):
        return self.sampled.samples(images, self.num_samples)

    def _sample_flops(self, batch):
        return self.sampled.flops(batch, self.num_samples)

    def _saliency_flops(self, batch):
        scores = {self.recipe.score, self._score()}
        return sum(score_flops(self.step1.model, self._loss, score, batch) for score in scores)

    def _trainings(self, parts):
        scores = {f"saliency_{score}": parts.saliency for score in (self.recipe.score, self._score())}
        return scores | {self.name: len(PRIOR_PRECISIONS) * self.num_samples * parts.validated}
