"""Our method, and others that train a posterior on some of the weights: they differ in which weights and how."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np

from sbn_tf import cost as costs
from sbn_tf.datasets.base import EXCLUSIVE
from sbn_tf.experiments import networks, training
from sbn_tf.experiments.branched import stem_epochs
from sbn_tf.experiments.methods.base import Method
from sbn_tf.experiments.methods.sampled import Sampled, score_flops
from sbn_tf.experiments.recipes import optimizer_for
from sbn_tf.experiments.run_folder import Run
from sbn_tf.saliency import Masks, biases_before_batch_norm, saliency

FAN_OUT = 0.5  # of `partial_late`: highest share of the operations that run again for each sample


class Partial(Method):
    """The paper's method: the most salient weights are Bayesian and trained on the ELBO from step 1's weights.

    Its run is that of notebook 03 with `posterior="gaussian"`. Subclasses choose other weights or another
    posterior and share everything else.
    """

    name, title = "partial", "partial Bayesian, salient weights"
    takes_r_bayes = takes_samples = True
    uses_scores = True  # whether a saliency pass chooses the weights
    posterior = "gaussian"
    places: tuple[int, ...] | None = None  # of layers that are wholly Bayesian, in the network's order; None: by score

    def _count_samples(self, num_samples):
        return super()._count_samples(num_samples) if self.takes_samples else self.recipe.num_samples

    def _train(self, data):
        self._train_step1(data)
        self.masks = self._choose_masks(data)
        self._take(self._train_posterior(data))

    def _choose_masks(self, data):
        if self.places is not None:
            return _whole_layers(self.step1.model, self.recipe, self.places)
        return self._masks_of(data, self.recipe)

    def _masks_of(self, data, recipe):
        """Masks by a recipe's score, scope and fan-out."""
        return training.masks_run(self.step1, data, recipe, self.r_bayes, seed=self.seed, verbose=self.verbose)

    def _train_posterior(self, data):
        method = None if self.name == "partial" else self.name
        options = {"method": method, "posterior": self.posterior, **self._options()}
        return training.partial_run(self.step1, self.masks, data, self._use(**self._settings()), **options)

    def _settings(self):
        """What the posterior sets of the recipe."""
        return {} if self.posterior == "gaussian" else {**_MEMBERS, "beta_stop": self.recipe.beta_start}

    def _take(self, run):
        self.trained = [self.step1, run]
        self.model, self.folder, self.sampled = run.model, run.folder, Sampled(run.model)

    def _samples(self, images):
        return self.sampled.samples(images, self.num_samples)

    def one_sample(self, images, number):
        """Sample `number` alone, (batch, ...)."""
        return self.sampled.one(images, number)

    def _sample_flops(self, batch):
        return self.sampled.flops(batch, self.num_samples)

    def _saliency_flops(self, batch):
        return score_flops(self.step1.model, self._loss, self.recipe.score, batch) if self.uses_scores else 0.0

    def _paper_flops(self):
        return float(costs.paper_flops(self.masks.r_bayes)) if self.posterior == "gaussian" else None

    def _trainings(self, parts):
        scores = {f"saliency_{self.recipe.score}": parts.saliency} if self.uses_scores else {}
        return scores | {self.name: parts.bayesian}

    def _memory(self, parts):
        at_once = self.recipe.num_samples if self.recipe.estimator == "all" else 1
        return parts.num_bytes(scales=True, passes=at_once)


# ---------------------------------------------------------------------------
# Other weights
# ---------------------------------------------------------------------------


class PartialRandom(Partial):
    """As many Bayesian weights as in `partial`, taken at random: what is the saliency worth?"""

    name, title = "partial_random", "partial Bayesian, random weights"
    uses_scores = False

    def _choose_masks(self, data):
        numbers = saliency(self.step1.model, score="random", seed=self.seed)
        numbers = {key: numbers[key] for key in _may_be_bayesian(self.step1.model, self.recipe)}
        return training.choose_masks(self.step1.model, numbers, self.recipe, self.r_bayes)


class PartialMagnitude(Partial):
    """As many Bayesian weights as in `partial`, the largest ones."""

    name, title = "partial_magnitude", "partial Bayesian, largest weights"
    uses_scores = False

    def _choose_masks(self, data):
        sizes = _may_be_bayesian(self.step1.model, self.recipe)
        return training.choose_masks(self.step1.model, sizes, self.recipe, self.r_bayes)


class PartialChannel(Partial):
    """Whole output channels of the most saliency per entry, at most as many weights as in `partial`."""

    name, title = "partial_channel", "partial Bayesian, whole salient channels"
    sets = ("scope",)

    def _choose_masks(self, data):
        return self._masks_of(data, self._use(scope="channel"))


class PartialLate(Partial):
    """As many Bayesian weights as in `partial`: the most salient with at most half of the operations after them.

    Only these operations run again for each sample: five samples then cost three passes at most.
    """

    name, title = "partial_late", f"partial Bayesian, salient late weights (fan-out {FAN_OUT:g})"
    sets = ("fan_out",)

    def _choose_masks(self, data):
        return self._masks_of(data, self._use(fan_out=FAN_OUT))


# ---------------------------------------------------------------------------
# Another posterior
# ---------------------------------------------------------------------------


# Each member sees its part of a batch; all weights train, batch norm stays, the KL is that of the ELBO.
_MEMBERS = {
    "estimator": "split",
    "batch_norm": "frozen",
    "trains": "all",
    "prior_scale": 1.0,
    "prior_at": "zero",
    "kl_reduction": "sum",
}
SET_BY_MEMBERS = (*_MEMBERS, "beta_stop")


class Members(Partial):
    """A sparse ensemble: networks that differ in the salient weights alone, each trained on its part of each batch."""

    name, title = "members", "sparse ensemble: members on the salient weights"
    takes_samples = False
    sets = SET_BY_MEMBERS
    posterior = "members"


class Branched(Partial):
    """A sparse ensemble that parts early: one network first, then members for the rest of step 1's epochs.

    The first `branch_at` of the recipe's `epochs` train one network at a constant learning rate. There the saliency
    chooses the weights, and the members train together for the epochs that are left, at the same rate, with the
    recipe's decay, estimator and batch norm. So all of it costs what step 1 costs by itself, and the saliency pass.
    """

    name, title = "branched", "sparse ensemble that parts early"
    sets = (*SET_BY_MEMBERS[2:], "bayes_epochs", "bayes_learning_rate")
    takes_samples = needs_step1 = False
    posterior = "members"

    def _train_step1(self, data):
        stem = dataclasses.replace(self.recipe, epochs=self._stem(), decay="none")
        self.step1 = training.deterministic_run(data, stem, network=self.network, **self._options())

    def _stem(self):
        return stem_epochs(self.recipe.epochs, self.recipe.branch_at)

    def _settings(self):
        rest = max(1, self.recipe.epochs - self._stem())
        own = {"estimator": self.recipe.estimator, "batch_norm": self.recipe.batch_norm}
        return {**super()._settings(), **own, "bayes_epochs": rest, "bayes_learning_rate": None}

    def _trainings(self, parts):
        share = self._stem() / self.recipe.epochs
        members = parts.bayesian / self.recipe.bayes_epochs * self._settings()["bayes_epochs"]
        return {"stem": share * parts.first, "saliency_of_stem": parts.saliency, self.name: members}


class Mixture(Partial):
    """As many Gaussians as samples at each salient weight, of equal weight, one draw of each in a prediction."""

    name, title = "mixture", "mixture of Gaussians on the salient weights"
    takes_samples = False
    sets = SET_BY_MEMBERS
    posterior = "mixture"


# ---------------------------------------------------------------------------
# Whole layers
# ---------------------------------------------------------------------------


class Bayes(Partial):
    """Every weight outside normalisation layers is Bayesian, from step 1's weights."""

    name, title = "bayes", "fully Bayesian, from the trained weights"
    takes_r_bayes = uses_scores = False

    def _choose_masks(self, data):
        return _whole_layers(self.step1.model, self.recipe)


class FirstLayer(Partial):
    """All weights of the first layer are Bayesian."""

    name, title = "first_layer", "Bayesian first layer"
    takes_r_bayes = uses_scores = False
    places = (0,)


class LastLayer(Partial):
    """All weights of the last layer are Bayesian.

    The layers before it run once for all samples: it predicts for about the price of one pass.
    """

    name, title = "last_layer", "Bayesian last layer"
    takes_r_bayes = uses_scores = False
    places = (-1,)


class FirstLast(Partial):
    """All weights of the first and of the last layer are Bayesian."""

    name, title = "first_last", "Bayesian first and last layer"
    takes_r_bayes = uses_scores = False
    places = (0, -1)


class BayesNormal(Partial):
    """Fully Bayesian as the paper's code starts it: every loc is drawn from N(0, 1), and there is no step 1.

    `paper_flops` 15 is the cell of the paper's table, about 161 of its epochs; the training here is another.

    It starts from nothing, so it trains for the epochs of steps 1 and 3 at step 1's learning rate. If the recipe would
    freeze batch norm, at the statistics of an untrained network, batch norm is trained too and the draws see whole
    batches.
    """

    name, title = "bayes_normal", "fully Bayesian, means from N(0, 1), as the paper's code starts it"
    sets = ("bayes_epochs", "bayes_learning_rate", "batch_norm", "estimator")
    takes_r_bayes = uses_scores = needs_step1 = False

    def _train(self, data):
        recipe = self.recipe
        changes = {"bayes_epochs": recipe.epochs + recipe.bayes_epochs, "bayes_learning_rate": None}
        if recipe.batch_norm == "frozen":
            changes |= {"batch_norm": "train", "estimator": "all"}
        recipe = self._use(**changes)
        network = self.network or data.card.network
        head = {"activation": "softmax"} if data.card.task in EXCLUSIVE else {}
        untrained = networks.build(network, data.input_shape, data.num_outputs, seed=self.seed, **head)
        # Only to be counted, and for its batch norm and biases before one. The name stands in the run's settings.
        untrained.compile(optimizer_for(recipe.optimizer, recipe.learning_rate, momentum=recipe.momentum), self._loss)
        self.step1 = Run(untrained, {}, Path(f"untrained_{network}"))
        self.masks = _whole_layers(untrained, recipe)
        options = {"method": self.name, "locs": "normal", **self._options()}
        run = training.partial_run(self.step1, self.masks, data, recipe, **options)
        self._take(run)
        self.trained = [run]

    def _paper_flops(self):
        return 15.0

    def _trainings(self, parts):
        return {self.name: parts.from_nothing}

    def _memory(self, parts):
        return parts.num_bytes(scales=True, passes=self.recipe.num_samples)


def _may_be_bayesian(model, recipe) -> dict[str, np.ndarray]:
    """Magnitude of every weight that a posterior may take, as in `training.scores_run`."""
    idle = biases_before_batch_norm(model) if recipe.batch_norm != "frozen" else ()
    return {key: values for key, values in saliency(model, score="magnitude").items() if key not in idle}


def _whole_layers(model, recipe, places=None):
    """Masks of all weights of the layers at these places in the network's order; None: of all layers."""
    weights = _may_be_bayesian(model, recipe)
    layer_of = {key: key.rsplit("/", 1)[0] for key in weights}
    layers = list(dict.fromkeys(layer_of.values()))
    chosen = layers if places is None else [layers[place] for place in places]
    return Masks({key: np.full(w.shape, layer_of[key] in chosen) for key, w in weights.items()})
