"""The contract of a method: `fit`, `predict_samples`, `cost`, `estimate`."""

from __future__ import annotations

import dataclasses
import math
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import keras
import numpy as np
from numpy.typing import ArrayLike

from sbn_tf import cost as costs
from sbn_tf.core.checks import check_count, check_fraction
from sbn_tf.datasets.base import SEGMENTATION, Data
from sbn_tf.experiments import training
from sbn_tf.experiments.folders import read_json, run_folder, write_json
from sbn_tf.experiments.methods.estimates import Estimate, Parts, Sizes, parts_of
from sbn_tf.experiments.recipes import Recipe, loss_for
from sbn_tf.saliency import Masks

_COUNTED = (
    "predict_flops_per_sample",
    "predict_flops",
    "train_step_flops_per_image",
    "train_flops",
    "train_flops_ratio",
    "predict_flops_ratio",
)
_STEP_FLOPS = {}  # tracing a step takes seconds, and step 1 is part of nearly every method


class Method:
    """What every method shares: step 1, the contract, and its costs.

    Made by `methods.make`, which explains the arguments. Before `fit` only `title`, `name`, `num_samples` and
    `estimate` are there.

    Attributes:
        name: as in `METHODS`.
        title: one line for a table.
        takes_r_bayes: whether `r_bayes` shapes it.
        takes_samples: whether it predicts with as many samples as it is asked for.
        turned: whether each sample sees the image flipped or turned, as `core.turns` says.
        sets: fields of the recipe that the method sets for itself.
        num_samples: samples of a prediction: the first axis of `predict_samples`.
        selection: what was chosen on the validation split, such as `{"temperature": 1.31}`; {} where nothing was.
        folder: `runs/<dataset>/<method>/seed<k>/<settings>`, where its results belong.
        history: training curves of the run that was trained last.
        model: the network of its predictions.
    """

    name = title = ""
    takes_r_bayes = takes_samples = turned = False
    sets: tuple[str, ...] = ()
    num_networks = 1  # that are stored
    masks: Masks | None = None  # of the weights that have a posterior of any kind
    needs_step1 = True  # the recipe's, which methods share

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
        check_fraction("r_bayes", r_bayes)
        if not isinstance(recipe, Recipe):
            raise TypeError(f"Expected a Recipe, from recipes.recipe_for(name, card). Received: recipe={recipe!r}")
        for key, value in (("num_samples", num_samples), ("num_members", num_members)):
            if value is not None:
                check_count(key, value)
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
            ValueError: a setting that `training` refuses, or a damaged file of an earlier run.
        """
        self._task, self._num_train = data.card.task, data.train.num_examples
        self._loss, self._input_shape = loss_for(self.recipe, data), data.input_shape
        self._train(data)
        self.history = self.trained[-1].history
        return self

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
        """What it took: a dict of numbers for JSON. Floating point operations are counted from traced graphs, and
        None on another backend than TensorFlow.

        - `num_weights`, `num_trainable`, `num_bayesian`, `weight_bytes`: of all networks that it stores.
        - `optimizer_bytes`: of the largest of its trainings, which run one after the other.
        - `num_samples`, `predict_flops_per_sample`, `predict_flops`: of one image. Per sample it is the mean: the
          samples share the layers before the first Bayesian weight.
        - `train_step_flops_per_image`: of the training that came last.
        - `train_flops`: of all its trainings and its saliency pass, without validation.
        - `train_flops_ratio`, `predict_flops_ratio`: to step 1's training, and to one pass, of a deterministic network.
        - `paper_flops`: the paper's number or formula; None where it has none.
        - `train_seconds`, `train_peak_bytes`, `train_grown_bytes` (the peak above what the process held before): of its
          trainings, shared ones included, without the saliency pass; None if one of them is unknown.
        """
        self._check_fitted()
        sizes = {**costs.parameters(self.model), "weight_bytes": costs.bytes_of(self.model)["weight_bytes"]}
        sizes["num_trainable"] = costs.parameters(self.trained[-1].model)["num_trainable"]
        found = {key: int(value) * self.num_networks for key, value in sizes.items()}
        if self.masks is not None:
            found["num_bayesian"] = self.masks.num_bayesian
        found["optimizer_bytes"] = max(int(costs.bytes_of(run.model)["optimizer_bytes"]) for run in self.trained)
        seconds, peaks, grown = (
            [getattr(run, key) for run in self.trained] for key in ("seconds", "peak_bytes", "grown_bytes")
        )
        return {
            **found,
            **self._operations(),
            "num_samples": self.num_samples,
            "paper_flops": self._paper_flops(),
            "train_seconds": None if None in seconds else float(sum(seconds)),
            "train_peak_bytes": None if None in peaks else int(max(peaks)),
            "train_grown_bytes": None if None in grown else int(max(grown)),
        }

    def _operations(self) -> dict:
        """What of `cost` is counted from traced graphs; None on another backend than TensorFlow, which has none."""
        if keras.backend.backend() != "tensorflow":
            return dict.fromkeys(_COUNTED)
        batch = min(self.recipe.batch_size, self._num_train)
        images = [self._num_train * len(run.history.get("loss", ())) for run in self.trained]
        train = sum(n * self._step_flops(run, batch) for n, run in zip(images, self.trained, strict=True))
        train += self._num_train * self._saliency_flops(batch)
        step1 = self._num_train * self.recipe.epochs * self._step_flops(self.step1, batch)
        sample = self._sample_flops(batch)
        ratio = sample * self.num_samples / costs.prediction_flops(self.step1.model, batch)
        step = self._step_flops(self.trained[-1], batch)
        found = (sample, sample * self.num_samples, step, train, train / step1, ratio)
        return dict(zip(_COUNTED, map(float, found), strict=True))

    def estimate(self, data: Data | Sizes) -> Estimate:
        """What it will take, before anything is run: operations and memory, counted from traced steps.

        It is at least what `cost` finds, and includes validation: layers before the first Bayesian weight are counted
        once for each sample.

        Args:
            data: `datasets.Data`, or its sizes: no image is read.
        """
        parts = parts_of(self.recipe, data, self.network)
        trainings = ({"step1": parts.first} if self.needs_step1 else {}) | self._trainings(parts)
        return Estimate(trainings, self.num_samples * parts.one_pass, self._memory(parts))

    # ---- below: a method overrides these ----

    def _count_samples(self, num_samples):
        """Samples of a prediction, from what was asked for."""
        return (num_samples or self.recipe.num_samples) if self.takes_samples else 1

    def _train(self, data):
        """Set `trained`, `model`, `folder` and `selection`."""
        self._train_step1(data)
        self.folder = self.step1.folder

    def _samples(self, images):
        """Raw outputs for a batch no larger than the recipe's: (samples, batch, ...)."""
        return self.model.predict_on_batch(images)[None]

    def one_sample(self, images, number):
        """Sample `number` alone, (batch, ...); of a method of one sample that one."""
        samples = self._samples(images)
        return samples[number if len(samples) > 1 else 0]

    def _sample_flops(self, batch):
        """Operations of a sample of one image: the mean over the samples of a prediction."""
        return costs.prediction_flops(self.model, batch)

    def _saliency_flops(self, batch):
        """Operations of the saliency pass, for one image."""
        return 0.0

    def _paper_flops(self):
        return None

    def _trainings(self, parts: Parts) -> dict[str, float]:
        """Name of each training beside step 1 -> its operations; see `Estimate`."""
        return {}

    def _memory(self, parts: Parts) -> float:
        """Bytes of its largest training."""
        return parts.num_bytes()

    # ---- below: tools ----

    def _use(self, **changes) -> Recipe:
        """The recipe with the method's own settings, which its result names."""
        self.recipe_used = dataclasses.replace(self.recipe, **changes)
        return self.recipe_used

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

    def _continue(self, data, recipe=None, **options):
        """Train on from step 1 without a posterior, in a folder of the method's name."""
        options = {"method": self.name, **self._options(), **options}
        run = training.continued_run(self.step1, data, recipe or self.recipe, **options)
        self.trained, self.model, self.folder = [self.step1, run], run.model, run.folder
        return run

    def _own_folder(self, data, **settings):
        """The folder of a method that is no run of its own."""
        settings |= {"step1": self.step1.folder.name, "data": data.digest(), "limit": self.limit}
        return run_folder(self.runs, data.card.name, self.name, self.seed, settings)

    def _check_fitted(self):
        if not self.trained:
            raise ValueError(f"Expected a fitted method: call fit(data) first. Received: {self.name!r}, not fitted.")


def validation(data: Data, batch_size: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """(images, targets) of the validation split; with several raters a target is the share who marked each pixel."""
    val = data.val
    for start in range(0, val.num_examples, batch_size):
        part = slice(start, start + batch_size)
        masks = val.task == SEGMENTATION
        yield val.normalised(part), val.mean_mask(part)[..., 0] if masks else np.asarray(val.targets[part])


def chosen(folder: Path, key: str, choose: Callable[[], float]) -> dict[str, float]:
    """{key: number}, the number > 0 that `choose()` gives; it is kept in the folder and read from there.

    Raises:
        ValueError: a damaged file.
    """
    path = folder / f"{key}.json"
    if not path.exists():
        write_json(path, {key: float(choose())})
    try:
        value = float(read_json(path)[key])
        if not 0 < value < math.inf:
            raise ValueError(f"{key} is {value}")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"Expected a whole file with {key}, > 0. Received: {path} ({error}).\nDelete it: it will be chosen again."
        ) from None
    return {key: value}
