"""Every method of the table behind one contract: `fit`, `predict_samples`, `cost`.

    from sbn_tf import baselines, datasets, recipes

    data = datasets.load("phantom_lesion")
    recipe = recipes.recipe_for("quick", data.card)
    method = baselines.make("ensemble", recipe, network="unet_small").fit(data)
    probs = method.predict_samples(data.test.normalised(slice(0, 20)))  # (samples, images, height, width)

All start from the same step 1 (but for the other members of ensembles, and `bayes_normal`) and choose on the validation
split alone. `fit` goes on where it was interrupted and loads what is finished; the test split is not touched.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
from pathlib import Path

import numpy as np
import tensorflow_probability as tfp
from keras import ops
from numpy.typing import ArrayLike
from scipy import optimize, special

from sbn_tf import cost as costs
from sbn_tf import metrics
from sbn_tf.core.losses import loss_terms
from sbn_tf.datasets.base import EXCLUSIVE, SEGMENTATION, Data
from sbn_tf.experiments import networks, training
from sbn_tf.experiments.recipes import Recipe, loss_for, optimizer_for
from sbn_tf.experiments.training import empirical_fisher
from sbn_tf.partial_bayes import to_partial_bayes
from sbn_tf.saliency import Masks, biases_before_batch_norm, check_r_bayes, named_weights, saliency

__all__ = [
    "METHODS",
    "Method",
    "describe",
    "fit_temperature",
    "make",
    "recovered_logits",
    "tempered",
]

TEMPERATURES = (0.05, 20.0)
PRIOR_PRECISIONS = (1.0, 10.0, 100.0, 1e3, 1e4, 1e5)  # 1: the prior N(0, 1) of `to_partial_bayes`
DROPOUT = 0.1
FAN_OUT = 0.5  # highest share of the operations that run anew for each sample, of `partial_late`
MAX_CYCLES = 5
_STEP_FLOPS = {}  # tracing a step takes seconds, and step 1 is part of nearly every method


class Method:
    """What every method shares: step 1, the contract, and its costs.

    Made by `make`, which explains the arguments. Before `fit` only `title`, `name` and `num_samples` are there.

    Attributes:
        name: as in `METHODS`.
        title: one line for a table.
        takes_r_bayes: whether `r_bayes` shapes it.
        takes_samples: whether it predicts with as many samples as it is asked for.
        sets: fields of the recipe that the method sets for itself.
        num_samples: samples of a prediction: the first axis of `predict_samples`.
        selection: what was chosen on the validation split, such as `{"temperature": 1.31}`; {} where nothing was.
        folder: `runs/<dataset>/<method>/seed<k>/<settings>`, where its results belong.
        history: training curves of the run that was trained last.
        model: the network of its predictions.
    """

    name = title = ""
    takes_r_bayes = takes_samples = False
    sets: tuple[str, ...] = ()
    num_networks = 1  # that are stored

    def __init__(
        self,
        recipe: Recipe,
        *,
        r_bayes: float = 0.01,
        seed: int = 0,
        network: str | None = None,
        runs: str | os.PathLike | None = None,
        limit: int | None = None,
        num_samples: int | None = None,
        num_members: int = 5,
        verbose: bool = True,
    ):
        check_r_bayes(r_bayes)
        if not isinstance(recipe, Recipe):
            raise TypeError(f"Expected a Recipe, from recipes.recipe_for(name, card). Received: recipe={recipe!r}")
        for key, value in (("num_samples", num_samples), ("num_members", num_members)):
            if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
                raise ValueError(f"Expected {key}, an integer >= 1. Received: {key}={value!r}")
        self.recipe, self.r_bayes, self.seed, self.network = recipe, float(r_bayes), seed, network
        self.runs, self.limit, self.verbose, self.num_members = runs, limit, verbose, num_members
        self.num_samples = self._count_samples(num_samples)
        self.selection, self.folder, self.history, self.model = {}, None, {}, None
        self.trained = []  # runs, in the order of their training
        self.recipe_used = recipe  # with a method's own changes, once it is fitted

    def fit(self, data: Data) -> Method:
        """Train on the training split of `data`, choose on its validation split; or load what is finished.

        Args:
            data: `datasets.Data`. Its test split is not read.

        Returns:
            The method itself.

        Raises:
            ValueError: what `training` refuses, or a file of an earlier run that is corrupt.
        """
        self._task, self._num_train = data.card.task, data.train.num_examples
        self._loss, self._input_shape = loss_for(self.recipe, data), data.input_shape
        self._train(data)
        self.history = self.trained[-1].history
        return self

    def _use(self, **changes) -> Recipe:
        """The recipe with the method's own settings, which its result tells."""
        self.recipe_used = dataclasses.replace(self.recipe, **changes)
        return self.recipe_used

    def predict_samples(self, images: ArrayLike) -> np.ndarray:
        """Probabilities of each sample: float32 (samples, batch, labels), or (samples, batch, height, width) of masks.

        Sampled methods draw the same networks in each call: one batch or many, today or after loading, the samples are
        the same. (Those of dropout, whose masks are drawn for each image, are so for images at the same places.)

        Args:
            images: normalised (see `datasets.Split.normalised`), (batch, height, width, channels).

        Raises:
            ValueError: a method that is not fitted, or images of another shape.
        """
        self._check_fitted()
        images = np.asarray(images, "float32")
        if images.ndim != 4 or images.shape[1:] != self._input_shape or not len(images):
            raise ValueError(
                f"Expected normalised images (batch, {', '.join(map(str, self._input_shape))}), one or more. "
                f"Received: shape {images.shape}"
            )
        size = self.recipe.batch_size
        parts = [self._samples(images[start : start + size]) for start in range(0, len(images), size)]
        probs = np.concatenate(parts, axis=1)
        return probs[..., 0] if self._task == SEGMENTATION else probs

    def cost(self) -> dict:
        """What it took: a dict of numbers, ready for JSON; floating point operations are counted from traced graphs.

        - `num_weights`, `num_trainable`, `num_bayesian`, `weight_bytes`: of all networks that it stores.
        - `optimizer_bytes`: of the largest of its trainings, which run one after the other.
        - `num_samples`, `predict_flops_per_sample`, `predict_flops`: of one image; a sample's is the mean of so many,
          which share what no Bayesian weight precedes.
        - `train_step_flops_per_image`: of the training that came last.
        - `train_flops`: of all its trainings and its saliency pass. Validation is left out, for all methods.
        - `train_flops_ratio`, `predict_flops_ratio`: to step 1's training, and to one pass, of a deterministic network.
        - `paper_flops`: the paper's number or formula; None where it has none.
        - `train_seconds`, `train_peak_bytes`, `train_grown_bytes` (the peak above what the process held before): of its
          trainings, shared ones included, without the saliency pass; None where one was trained before these were kept.
        """
        self._check_fitted()
        batch = min(self.recipe.batch_size, self._num_train)
        reference = self.step1.model
        images = [self._num_train * len(run.history.get("loss", ())) for run in self.trained]
        train = sum(n * self._step_flops(run, batch) for n, run in zip(images, self.trained, strict=True))
        train += self._num_train * self._saliency_flops(batch)
        one_pass = costs.prediction_flops(reference, batch)
        sample = self._sample_flops(batch)
        sizes = {**costs.parameters(self.model), "weight_bytes": costs.bytes_of(self.model)["weight_bytes"]}
        sizes["num_trainable"] = costs.parameters(self.trained[-1].model)["num_trainable"]
        found = {key: int(value) * self.num_networks for key, value in sizes.items()}
        found["optimizer_bytes"] = max(int(costs.bytes_of(run.model)["optimizer_bytes"]) for run in self.trained)
        seconds, peaks, grown = (
            [getattr(run, key) for run in self.trained] for key in ("seconds", "peak_bytes", "grown_bytes")
        )
        return {
            **found,
            "predict_flops_per_sample": float(sample),
            "num_samples": self.num_samples,
            "predict_flops": float(sample * self.num_samples),
            "train_step_flops_per_image": self._step_flops(self.trained[-1], batch),
            "train_flops": float(train),
            "train_flops_ratio": float(
                train / (self._num_train * self.recipe.epochs * self._step_flops(self.step1, batch))
            ),
            "predict_flops_ratio": float(sample * self.num_samples / one_pass),
            "paper_flops": self._paper_flops(),
            "train_seconds": None if None in seconds else float(sum(seconds)),
            "train_peak_bytes": None if None in peaks else int(max(peaks)),
            "train_grown_bytes": None if None in grown else int(max(grown)),
        }

    # ---- below: what a method may do otherwise ----

    def _count_samples(self, num_samples):
        """Samples of a prediction, from what was asked for."""
        return 1

    def _train(self, data):
        """Set `trained`, `model`, `folder` and `selection`."""
        self._train_step1(data)
        self.folder = self.step1.folder

    def _samples(self, images):
        """Raw outputs for a batch no larger than the recipe's: (samples, batch, ...)."""
        return self.model.predict_on_batch(images)[None]

    def _sample_flops(self, batch):
        """Operations of a sample of one image, in the mean over the samples of a prediction."""
        return costs.prediction_flops(self.model, batch)

    def _saliency_flops(self, batch):
        """Operations of the saliency pass, for one image."""
        return 0.0

    def _paper_flops(self):
        return None

    # ---- below: tools ----

    def _step_flops(self, run, batch) -> float:
        """Operations of a training step of a run, for one image; each is traced once in a process, for all methods."""
        alike = next(one for one in (self.step1, *self.trained) if one.model is run.model)  # members share a network
        key = (str(alike.folder), self.recipe, self._input_shape, run.model.count_params(), batch)
        if key not in _STEP_FLOPS:
            _STEP_FLOPS[key] = float(costs.training_flops(run.model, batch))
        return _STEP_FLOPS[key]

    def _train_step1(self, data):
        self.step1 = training.deterministic_run(data, self.recipe, network=self.network, **self._options())
        self.trained, self.model = [self.step1], self.step1.model

    def _options(self):
        return {"seed": self.seed, "runs": self.runs, "limit": self.limit, "verbose": self.verbose}

    def _own_folder(self, data, **settings):
        """The folder of a method that is no run of its own."""
        settings |= {"step1": self.step1.folder.name, "data": data.digest(), "limit": self.limit}
        return training.run_folder(self.runs, data.card.name, self.name, self.seed, settings)

    def _check_fitted(self):
        if not self.trained:
            raise ValueError(f"Expected a fitted method: call fit(data) first. Received: {self.name!r}, not fitted.")

    def _validation_nll(self, data) -> float:
        """NLL of the mean prediction on the validation split, in nats a label, pixel or classified image."""
        total = 0.0
        for images, targets in _validation(data, self.recipe.batch_size):
            mean = self.predict_samples(images).mean(axis=0)
            if self._task in EXCLUSIVE:
                mean, targets = (mean * targets).sum(axis=-1), np.ones(len(targets))
            total += len(images) * metrics.nll(mean, targets)
        return total / data.val.num_examples


class Deterministic(Method):
    """Step 1 and nothing more."""

    name, title = "deterministic", "deterministic"

    def _paper_flops(self):
        return 1.0


class DeterministicLonger(Method):
    """Step 1, then the epochs of step 3 at its learning rate, without any posterior: as many epochs as `partial`.

    The same budget where a step costs one pass ("split"); five samples of the whole batch ("all") cost five.
    """

    name, title = "deterministic_longer", "deterministic, the epochs of steps 1 and 3"

    def _train(self, data):
        self._train_step1(data)
        run = training.continued_run(self.step1, data, self.recipe, method=self.name, **self._options())
        self.trained, self.model, self.folder = [self.step1, run], run.model, run.folder


# ---------------------------------------------------------------------------
# Temperature
# ---------------------------------------------------------------------------


def recovered_logits(probs: ArrayLike, task: str) -> np.ndarray:
    """Logits of float32 probabilities, up to a constant an image for classes, clipped where float32 ends.

    `log p - log(1 - p)` of labels and pixels, `log p` of classes; a probability of 0 counts as the smallest normal
    float32 number, one of 1 as the largest below 1.
    """
    limits = np.finfo("float32")
    probs = np.clip(np.asarray(probs, "float64"), limits.tiny, 1.0 if task in EXCLUSIVE else 1.0 - limits.epsneg)
    return np.log(probs) if task in EXCLUSIVE else special.logit(probs)


def tempered(probs: ArrayLike, temperature: float, task: str) -> np.ndarray:
    """Probabilities with their logits divided by `temperature`: float32 of the same shape."""
    logits = recovered_logits(probs, task) / temperature
    return (special.softmax(logits, axis=-1) if task in EXCLUSIVE else special.expit(logits)).astype("float32")


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
            for images, targets in _validation(data, self.recipe.batch_size):
                logits.append(recovered_logits(self._at_one(images), self._task).astype("float32"))
                truth.append(targets.astype("float32"))
            return fit_temperature(np.concatenate(logits), np.concatenate(truth), self._task)

        self.selection = _chosen(self.folder, "temperature", choose)

    def _at_one(self, images):
        probs = super()._samples(images)[0]
        return probs[..., 0] if self._task == SEGMENTATION else probs

    def _samples(self, images):
        return tempered(super()._samples(images), self.selection["temperature"], self._task)


# ---------------------------------------------------------------------------
# Several networks
# ---------------------------------------------------------------------------


class _Networks(Method):
    """Several sets of weights of one network, each a sample."""

    def _samples(self, images):
        samples = []
        for weights in self._weights:  # one traced network for all
            self.model.set_weights(weights)
            samples.append(super()._samples(images))
        return np.concatenate(samples)

    @property
    def num_networks(self):
        """Sets of weights that are stored."""
        return self.num_samples


class Ensemble(_Networks):
    """Networks trained alike from other initial weights and orders (Lakshminarayanan et al. 2017).

    Each member is a run of `deterministic` by itself, the first that of this seed. The folder names them all.
    """

    name, title = "ensemble", "deep ensemble"

    def _count_samples(self, num_samples):
        return self.num_members

    def _train(self, data):
        members = training.ensemble_runs(
            data, self.recipe, num_members=self.num_members, network=self.network, **self._options()
        )
        self.step1 = members[0]
        self._hold(members, data)
        self.trained = members

    def _hold(self, members, data):
        """Take the members' weights, in one network, and name their runs in the method's folder."""
        self.model = members[0].model
        self._weights = [run.model.get_weights() for run in members]
        for run in members[1:]:  # of one architecture
            run.model = self.model
        self.folder = self._own_folder(data, members=[run.folder.name for run in members])
        dataset = self.folder.parents[2]
        names = [run.folder.relative_to(dataset).as_posix() for run in members]
        if not (self.folder / "members.json").exists():
            training.write_json(self.folder / "members.json", {"members": names})

    def _paper_flops(self):
        return float(self.num_members)


class EnsembleLonger(Ensemble):
    """The ensemble of `deterministic_longer`: each member has the epochs of steps 1 and 3, as the partial model has."""

    name, title = "ensemble_longer", "deep ensemble, each member with the epochs of steps 1 and 3"

    def _train(self, data):
        super()._train(data)
        members, longer = self.trained, []
        for index, weights in enumerate(self._weights):
            members[index].model.set_weights(weights)
            options = {**self._options(), "seed": training.member_seed(self.seed, index)}
            method = DeterministicLonger.name
            longer.append(training.continued_run(members[index], data, self.recipe, method=method, **options))
        members[0].model.set_weights(self._weights[0])
        self._hold(longer, data)
        self.trained = [*members, *longer]

    def _paper_flops(self):
        return None


class Snapshot(_Networks):
    """From step 1's weights on, the learning rate restarts in cycles: the weights at the end of each are a sample.

    Five cycles, or one an epoch where step 3 has fewer epochs (Huang et al. 2017, there from initial weights).
    """

    name, title = "snapshot", "snapshot ensemble from the trained weights"
    sets = ("keep",)

    def _count_samples(self, num_samples):
        return min(MAX_CYCLES, self.recipe.bayes_epochs)

    def _train(self, data):
        self._train_step1(data)
        recipe = self._use(keep="last")  # the end of each cycle is what it is about
        run = training.continued_run(
            self.step1, data, recipe, method=self.name, cycles=self.num_samples, **self._options()
        )
        self.trained, self.model, self.folder = [self.step1, run], run.model, run.folder
        self._weights = run.snapshots
        self.num_samples = len(run.snapshots)  # fewer where training diverged


class MCDropout(Method):
    """Dropout before every weight layer but the first, trained on from step 1, kept on in prediction.

    Gal and Ghahramani 2016; there from initial weights. Rate 0.1.
    """

    name, title = "mc_dropout", f"MC dropout, rate {DROPOUT:g}, from the trained weights"
    takes_samples = True

    def _count_samples(self, num_samples):
        return num_samples or self.recipe.num_samples

    def _train(self, data):
        self._train_step1(data)
        run = training.continued_run(
            self.step1, data, self.recipe, method=self.name, dropout=DROPOUT, **self._options()
        )
        self.trained, self.model, self.folder = [self.step1, run], run.model, run.folder

    def _samples(self, images):
        return networks.sample_dropout(self.model, images, self.num_samples, seed=self.seed, batch_size=len(images))


# ---------------------------------------------------------------------------
# Bayesian weights
# ---------------------------------------------------------------------------


class _Bayesian(Method):
    """What predicts with a `PartialBayes`."""

    takes_samples = True

    def _count_samples(self, num_samples):
        return num_samples or self.recipe.num_samples

    def _hold(self, model):
        """Take a model whose noise starts now as it will in every call."""
        self.model = model
        self._noise = [(state, ops.convert_to_numpy(state)) for state in _noise_states(model)]

    def _sample_flops(self, batch):
        trained_with, self.model.num_samples = self.model.num_samples, self.num_samples
        try:
            return costs.prediction_flops(self.model, batch) / self.num_samples
        finally:
            self.model.num_samples = trained_with

    def _samples(self, images):
        for state, start in self._noise:
            state.assign(start)
        return self.model.predict_samples(images, num_samples=self.num_samples, batch_size=len(images))


class Partial(_Bayesian):
    """The paper's method: the most salient weights are Bayesian and trained on the ELBO from step 1's weights.

    Its run is that of notebook 03. Subclasses choose other weights and share everything else.
    """

    name, title = "partial", "partial Bayesian, salient weights"
    takes_r_bayes = True

    def _train(self, data):
        self._train_step1(data)
        self.masks = self._choose_masks(data)
        run = training.partial_run(
            self.step1,
            self.masks,
            data,
            self.recipe,
            method=None if self.name == "partial" else self.name,
            **self._options(),
        )
        self.trained, self.folder = [self.step1, run], run.folder
        self._hold(run.model)

    def _choose_masks(self, data):
        return training.masks_run(self.step1, data, self.recipe, self.r_bayes, seed=self.seed, verbose=self.verbose)

    def _saliency_flops(self, batch):
        return _score_flops(self.step1.model, self._loss, self.recipe.score, batch)

    def _paper_flops(self):
        return float(costs.paper_flops(self.masks.r_bayes))


class PartialRandom(Partial):
    """As many Bayesian weights as in `partial`, taken at random: what is the saliency worth?"""

    name, title = "partial_random", "partial Bayesian, random weights"

    def _choose_masks(self, data):
        numbers = saliency(self.step1.model, score="random", seed=self.seed)
        numbers = {key: numbers[key] for key in _may_be_bayesian(self.step1.model, self.recipe)}
        return training.choose_masks(self.step1.model, numbers, self.recipe, self.r_bayes)

    def _saliency_flops(self, batch):
        return 0.0


class PartialMagnitude(PartialRandom):
    """As many Bayesian weights as in `partial`, the largest ones."""

    name, title = "partial_magnitude", "partial Bayesian, largest weights"

    def _choose_masks(self, data):
        sizes = _may_be_bayesian(self.step1.model, self.recipe)
        return training.choose_masks(self.step1.model, sizes, self.recipe, self.r_bayes)


class PartialChannel(Partial):
    """Whole output channels of the most saliency per entry, at most as many weights as in `partial`."""

    name, title = "partial_channel", "partial Bayesian, whole salient channels"
    sets = ("scope",)

    def _choose_masks(self, data):
        recipe = self._use(scope="channel")
        return training.masks_run(self.step1, data, recipe, self.r_bayes, seed=self.seed, verbose=self.verbose)


class PartialLate(Partial):
    """As many Bayesian weights as in `partial`, the most salient after which half of the operations or less remain.

    Only these run anew for each sample: five samples then cost three passes at most.
    """

    name, title = "partial_late", f"partial Bayesian, salient late weights (fan-out {FAN_OUT:g})"
    sets = ("fan_out",)

    def _choose_masks(self, data):
        recipe = self._use(fan_out=FAN_OUT)
        return training.masks_run(self.step1, data, recipe, self.r_bayes, seed=self.seed, verbose=self.verbose)


class Particles(Partial):
    """A sparse ensemble: networks that differ in the salient weights alone, each trained on its part of each batch."""

    name, title = "particles", "sparse ensemble: particles on the salient weights"
    gaussian = takes_samples = False
    sets = ("estimator", "batch_norm", "trains", "prior_scale", "prior_at", "kl_reduction", "beta_stop")

    def _train(self, data):
        self._train_step1(data)
        of_fit = {"estimator": "split", "batch_norm": "frozen", "trains": "all"}
        self._use(**of_fit, prior_scale=1.0, prior_at="zero", kl_reduction="sum", beta_stop=self.recipe.beta_start)
        self.masks = self._choose_masks(data)
        run = training.particles_run(
            self.step1, self.masks, data, self.recipe, method=self.name, gaussian=self.gaussian, **self._options()
        )
        self.trained, self.folder = [self.step1, run], run.folder
        self._hold(run.model)

    def cost(self) -> dict:
        """As of every method; Bayesian are the weights of which each particle has values of its own."""
        return {**super().cost(), "num_bayesian": self.masks.num_bayesian}

    def _paper_flops(self):
        return None

    def _count_samples(self, num_samples):
        return self.recipe.num_samples

    def _samples(self, images):
        for state, start in self._noise:
            state.assign(start)
        return self.model.predict_samples(images)

    def _sample_flops(self, batch):
        return costs.prediction_flops(self.model, batch) / self.num_samples


class Mixture(Particles):
    """As many Gaussians as samples at each salient weight, of equal weight, one draw of each in a prediction."""

    name, title = "mixture", "mixture of Gaussians on the salient weights"
    gaussian = True


class _WholeLayers(PartialRandom):
    """All weights of some layers are Bayesian.

    The layers before the first Bayesian one run once for all samples: by its last layer alone a network predicts for
    about the price of one pass.
    """

    takes_r_bayes = False

    def _choose_masks(self, data):
        weights = _may_be_bayesian(self.step1.model, self.recipe)
        layers = list(dict.fromkeys(_layer_of(key) for key in weights))
        chosen = self._choose_layers(layers)
        return Masks({key: np.full(w.shape, _layer_of(key) in chosen) for key, w in weights.items()})

    def _choose_layers(self, layers):
        """Which of the layers, in the network's order."""
        return layers


class FirstLayer(_WholeLayers):
    """All weights of the first layer are Bayesian."""

    name, title = "first_layer", "Bayesian first layer"

    def _choose_layers(self, layers):
        return layers[:1]


class LastLayer(_WholeLayers):
    """All weights of the last layer are Bayesian."""

    name, title = "last_layer", "Bayesian last layer"

    def _choose_layers(self, layers):
        return layers[-1:]


class FirstLast(_WholeLayers):
    """All weights of the first and of the last layer are Bayesian."""

    name, title = "first_last", "Bayesian first and last layer"

    def _choose_layers(self, layers):
        return [layers[0], layers[-1]]


class Bayes(_WholeLayers):
    """Every weight outside normalisation layers is Bayesian, from step 1's weights."""

    name, title = "bayes", "fully Bayesian, from the trained weights"


class BayesNormal(Bayes):
    """Fully Bayesian as the paper's code starts it: every loc is drawn from N(0, 1), and there is no step 1.

    `paper_flops` 15 is the cell of the paper's table, about 161 of its epochs; it is not what is trained here.

    It starts from nothing, so it trains for the epochs of steps 1 and 3 at step 1's learning rate. Batch norm then
    trains too, where the recipe would freeze it on the statistics of a network that is none, and the draws see whole
    batches.
    """

    name, title = "bayes_normal", "fully Bayesian, means from N(0, 1), as the paper's code starts it"
    sets = ("bayes_epochs", "bayes_learning_rate", "batch_norm", "estimator")

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
        self.step1 = training.Run(untrained, {}, Path(f"untrained_{network}"))
        self.masks = Masks({k: np.ones(w.shape, bool) for k, w in _may_be_bayesian(untrained, recipe).items()})
        run = training.partial_run(
            self.step1, self.masks, data, recipe, method=self.name, locs="normal", **self._options()
        )
        self.trained, self.folder = [run], run.folder
        self._hold(run.model)

    def _paper_flops(self):
        return 15.0


class Laplace(_Bayesian):
    """A Gaussian about step 1's weights at the salient ones, as wide as the curvature says, with no training.

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
    takes_r_bayes = True

    def _train(self, data):
        self._train_step1(data)
        recipe = self.recipe
        self.masks = training.masks_run(self.step1, data, recipe, self.r_bayes, seed=self.seed, verbose=self.verbose)
        # Other scores are no Fisher information.
        exact = recipe if recipe.score == "per_example" else dataclasses.replace(recipe, score="fisher")
        scores = training.scores_run(self.step1, data, exact, verbose=self.verbose)
        fisher = empirical_fisher(
            scores,
            exact.score,
            terms=loss_terms(self._loss, self.model.output_shape),
            num_examples=self._num_train,
            batch_size=recipe.batch_size,
        )
        self._precision = {key: self._num_train * fisher[key] for key in self.masks}
        model = to_partial_bayes(
            self.step1.model,
            self.masks,
            num_train=self._num_train,
            num_samples=self.num_samples,
            batch_norm="frozen",
            seed=self.seed,
        )
        self._hold(model)
        self.folder = self._own_folder(
            data,
            masks=self.masks.digest(),
            score=exact.score,
            batch_size=recipe.batch_size,
            class_weights=recipe.class_weights,
            num_samples=self.num_samples,
            grid=PRIOR_PRECISIONS,
        )
        self.selection = _chosen(self.folder, "prior_precision", lambda: self._choose(data))
        self._set_scales(self.selection["prior_precision"])

    def _choose(self, data):
        def nll(prior_precision):
            self._set_scales(prior_precision)
            return self._validation_nll(data)

        return min(PRIOR_PRECISIONS, key=nll)

    def _set_scales(self, prior_precision):
        weights = named_weights(self.model.network)
        for key, mask in self.masks.items():
            if mask.any():
                scale = (self._precision[key][mask] + prior_precision) ** -0.5
                rho = tfp.math.softplus_inverse(scale).numpy()
                weights[f"{key}_posterior_untransformed_scale"].variable.assign(rho.astype("float32"))

    def _saliency_flops(self, batch):
        scores = {self.recipe.score, "per_example" if self.recipe.score == "per_example" else "fisher"}
        return sum(_score_flops(self.step1.model, self._loss, score, batch) for score in scores)


_CLASSES = (
    Deterministic,
    DeterministicLonger,
    Temperature,
    Ensemble,
    EnsembleLonger,
    Snapshot,
    MCDropout,
    Laplace,
    Partial,
    PartialRandom,
    PartialMagnitude,
    PartialChannel,
    PartialLate,
    Particles,
    Mixture,
    FirstLayer,
    LastLayer,
    FirstLast,
    Bayes,
    BayesNormal,
)
METHODS: dict[str, type[Method]] = {cls.name: cls for cls in _CLASSES}  # in the order of a table


def make(name: str, recipe: Recipe, **options) -> Method:
    """A method by its name, to be fitted.

    Args:
        name: one of `METHODS`.
        recipe: a `recipes.Recipe`.
        r_bayes: fraction of the eligible weights that is Bayesian, 0..1, where a method takes one (default 0.01).
        seed: of initial weights, stream and noise (default 0).
        network: a name of `models.NETWORKS`; None: the dataset's.
        runs: folder of all runs; None: `runs/` of the repository or the working directory.
        limit: named in the settings only (the data were loaded with it).
        num_samples: of a prediction, where a method samples; None: the recipe's. Ensembles have one for each network.
        num_members: networks of "ensemble" (default 5).
        verbose: show progress bars.

    Raises:
        ValueError: an unknown name, or a number out of its range.
        TypeError: something else than a recipe.
    """
    return _class_of(name)(recipe, **options)


def describe(name: str) -> str:
    """One line about a method, for a table."""
    return _class_of(name).title


def _class_of(name):
    if name not in METHODS:
        raise ValueError(f"Expected a method among {', '.join(METHODS)}.\nReceived: {name!r}")
    return METHODS[name]


def _validation(data, batch_size):
    """(images, targets) of the validation split, of several raters the share who marked each pixel."""
    val = data.val
    for start in range(0, val.num_examples, batch_size):
        part = slice(start, start + batch_size)
        masks = val.task == SEGMENTATION
        yield val.normalised(part), val.mean_mask(part)[..., 0] if masks else np.asarray(val.targets[part])


def _chosen(folder, key, choose) -> dict[str, float]:
    """What `choose()` gives, a number > 0, kept in the folder: {key: number}."""
    path = folder / f"{key}.json"
    if not path.exists():
        training.write_json(path, {key: float(choose())})
    try:
        value = float(json.loads(path.read_text())[key])
        if not 0 < value < math.inf:
            raise ValueError(f"{key} is {value}")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"Expected a whole file with {key}, > 0. Received: {path} ({error}).\nDelete it: it is chosen anew."
        ) from None
    return {key: value}


def _noise_states(model):
    """States of all noise of a model, each once."""
    layers = [model, *model._flatten_layers(include_self=False)]
    return list({id(g): g.state for layer in layers for g in layer._seed_generators}.values())


def _may_be_bayesian(model, recipe) -> dict[str, np.ndarray]:
    """Magnitude of every weight that a posterior may take, as in `training.scores_run`."""
    idle = biases_before_batch_norm(model) if recipe.batch_norm != "frozen" else ()
    return {key: values for key, values in saliency(model, score="magnitude").items() if key not in idle}


def _layer_of(key):
    return key.rsplit("/", 1)[0]


def _score_flops(model, loss, score, batch):
    if score in ("magnitude", "random"):
        return 0.0
    return costs.saliency_flops(model, loss, 1 if score == "per_example" else batch)
