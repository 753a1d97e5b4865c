"""The three steps as resumable runs.

A run lives in `runs/<dataset>/<method>/seed<k>/<settings>/`, where `<settings>` is a short hash of everything that
shapes the result: runs with other settings never mix, a finished one is loaded, an interrupted one goes on.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import operator
import os
import re
import subprocess
import time
import uuid
import warnings
import zipfile
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import keras
import numpy as np
import tensorflow_probability as tfp
from keras import ops
from tqdm import tqdm

from sbn_tf.core.files import write_atomically
from sbn_tf.core.losses import loss_terms
from sbn_tf.cost import measured
from sbn_tf.datasets.base import EXCLUSIVE, Data, Split
from sbn_tf.experiments import networks
from sbn_tf.experiments.recipes import Recipe, loss_for, optimizer_for
from sbn_tf.layers import masked_layers
from sbn_tf.partial_bayes import BetaSchedule, LocScaleOptimizer, settle_batch_norm, to_partial_bayes
from sbn_tf.particles import LEAST_LOC, to_particles
from sbn_tf.saliency import Masks, biases_before_batch_norm, named_weights, one_per_channel, saliency, top_k

__all__ = [
    "Checkpoint",
    "Run",
    "StopAtNaN",
    "choose_masks",
    "continued_run",
    "deterministic_run",
    "empirical_fisher",
    "ensemble_runs",
    "fit",
    "masks_run",
    "member_seed",
    "partial_run",
    "particles_run",
    "repository",
    "scores_run",
    "write_json",
]


FORMAT = 2  # of a run's files: raised when what they hold changes its meaning, so that old runs are not taken for new


def _state(model) -> list:
    """All that training changes: weights and the states of the noise."""
    layers = [model, *model._flatten_layers(include_self=False)]
    seeds = {id(g): g.state for layer in layers for g in layer._seed_generators}
    return [*model.weights, *seeds.values()]


class StopAtNaN(keras.callbacks.Callback):
    """Stops training that diverges, and puts back all that training changes as of the last good epoch.

    An epoch is good when its losses (validation included) and weights are finite, and so is the loss of the first batch
    after it: a loss is taken before its update, so only the next one tells what the update did.

    Attributes:
        stopped: whether training was stopped.
        nan_in_epoch: the epoch, counted from 0, that was not good; None where all were.
    """

    def on_train_begin(self, logs=None):
        """Remember the first weights."""
        self.stopped, self.nan_in_epoch, self._epoch = False, None, 0
        self._good = self._newest = self._values()

    def on_epoch_begin(self, epoch, logs=None):
        """Know which epoch this is."""
        self._epoch = epoch

    def on_train_batch_end(self, batch, logs=None):
        """Check the loss of this batch."""
        if self.stopped:
            return
        if np.isfinite((logs or {}).get("loss", 0.0)):
            self._good = self._newest
        else:
            # The first batch is bad: the update that ruined it was the last epoch's.
            first = batch == 0 and self._good is not self._newest
            self._stop(self._epoch - 1 if first else self._epoch, f"the loss became {logs['loss']}")

    def on_epoch_end(self, epoch, logs=None):
        """Remember this epoch's weights, if they are finite."""
        if self.stopped:
            return
        losses = {key: value for key, value in (logs or {}).items() if key in ("loss", "val_loss")}
        values = self._values()
        bad = [key for key, value in losses.items() if not np.isfinite(value)]
        if bad or not all(np.isfinite(value).all() for value in values):
            self._stop(epoch, f"{bad[0]} became {losses[bad[0]]}" if bad else "a weight became NaN or infinite")
        else:
            self._newest = values

    def _stop(self, epoch, why):
        self.stopped = self.model.stop_training = True
        self.nan_in_epoch = epoch
        for variable, value in zip(self._variables(), self._good, strict=True):
            variable.assign(value)
        warnings.warn(
            f"In epoch {epoch + 1} {why}: training stopped, the weights of the last good epoch are kept. Lower the "
            "learning rate, or look at the data.",
            stacklevel=3,
        )

    def _variables(self):
        self.model.optimizer.build(self.model.trainable_variables)
        return [*_state(self.model), *self.model.optimizer.variables]

    def _values(self):
        return [np.array(ops.convert_to_numpy(v)) for v in self._variables()]


class Checkpoint(keras.callbacks.Callback):
    """Writes all state after each epoch, whole or not at all; `resume` takes it up bit for bit.

    Args:
        path: the npz file.
        guard: a `StopAtNaN` whose bad epochs are not written.
        keep: "last", or "best": the weights of the epoch with the lowest validation loss are remembered too.

    Attributes:
        history: what Keras logs of each epoch, and `seconds`: each epoch's wall time, validation included.
        ended: whether training was ended on purpose.
        best: of `keep="best"`, (epoch counted from 0, its weights); None before the first epoch.
    """

    def __init__(self, path: str | os.PathLike, guard: StopAtNaN | None = None, keep: str = "last"):
        super().__init__()
        self.path, self.guard, self.keep, self.history = Path(path), guard, keep, {}
        self.ended = False
        self.best: tuple[int, list[np.ndarray]] | None = None
        self._best_before: tuple[int, list[np.ndarray]] | None = None

    def resume(self, model: keras.Model) -> int:
        """Load the last written epoch into a compiled model; return how many epochs are done (0: none).

        Raises:
            ValueError: a file that is corrupt, or of another model or optimiser.
        """
        if not self.path.exists():
            return 0
        model.optimizer.build(model.trainable_variables)
        variables = [*_state(model), *model.optimizer.variables]
        arrays = _read_arrays(self.path)
        try:
            epochs, history = int(arrays.pop("epochs")), json.loads(str(arrays.pop("history")))
            ended, best_epoch = bool(arrays.pop("ended")), arrays.pop("best_epoch", None)
            if best_epoch is None and self.keep == "best":
                raise ValueError("it holds no best epoch")
            if self.keep == "best":
                best = [arrays.pop(f"best{i}") for i in range(len(model.weights))]
                self.best = (int(best_epoch), best)
        except (KeyError, ValueError) as error:
            raise ValueError(f"Expected a checkpoint. Received: {self.path} ({error}). Delete it.") from None
        found = [arrays[f"v{i}"].shape for i in range(len(arrays)) if f"v{i}" in arrays]
        if found != [tuple(v.shape) for v in variables]:
            raise ValueError(
                f"Expected a checkpoint of this model and optimiser, {len(variables)} variables. Received: "
                f"{self.path}, {len(arrays)} variables, or other shapes. Delete it, or train in another folder."
            )
        for i, variable in enumerate(variables):
            variable.assign(arrays[f"v{i}"])
        self.history, self.ended = history, ended
        return epochs

    def on_epoch_begin(self, epoch, logs=None):
        """Start this epoch's clock."""
        self._began = time.perf_counter()

    def on_epoch_end(self, epoch, logs=None):
        """Write the state after this epoch."""
        if self.guard is not None and self.guard.stopped:
            return
        for key, value in {**(logs or {}), "seconds": time.perf_counter() - self._began}.items():
            self.history.setdefault(key, []).append(float(value))
        if self.keep == "best":
            losses = self.history["val_loss"]
            self._best_before = self.best
            if self.best is None or losses[-1] < losses[self.best[0]]:
                self.best = (epoch, [np.array(w) for w in self.model.get_weights()])
        self._write(epoch + 1)

    def on_train_end(self, logs=None):
        """Say in the file that training was ended on purpose; go back to the last good epoch after a NaN."""
        if self.guard is not None and self.guard.stopped:
            epochs = self.guard.nan_in_epoch
            self.history = {key: values[:epochs] for key, values in self.history.items()} if epochs else {}
            if self.best is not None and self.best[0] >= epochs:
                self.best = self._best_before
            self._write(epochs) if epochs else self.path.unlink(missing_ok=True)
        elif self.model.stop_training:
            self.ended = True
            self._write(max(map(len, self.history.values()), default=0))

    def _write(self, epochs):
        variables = [*_state(self.model), *self.model.optimizer.variables]
        arrays = {f"v{i}": ops.convert_to_numpy(v) for i, v in enumerate(variables)}
        extra = {"epochs": epochs, "history": json.dumps(self.history), "ended": self.ended}
        if self.best is not None:
            extra |= {"best_epoch": self.best[0], **{f"best{i}": w for i, w in enumerate(self.best[1])}}
        write_atomically(self.path, lambda file: np.savez(file, **arrays, **extra))


class _Progress(keras.callbacks.Callback):
    """One bar for all batches of all epochs, with the remaining time and the last losses."""

    def __init__(self, name, steps, epochs, done):
        super().__init__()
        # Refreshed seldom: an executed notebook keeps every line.
        self.bar = tqdm(desc=name, total=steps * epochs, initial=steps * done, unit="batch", mininterval=2.0)

    def on_train_batch_end(self, batch, logs=None):
        self.bar.update()

    def on_epoch_end(self, epoch, logs=None):
        losses = {key: f"{value:.4g}" for key, value in (logs or {}).items() if key in ("loss", "val_loss")}
        self.bar.set_postfix({"epoch": epoch + 1, **losses}, refresh=False)


def fit(
    model: keras.Model,
    train: Split,
    val: Split | None,
    *,
    epochs: int,
    batch_size: int,
    seed: int,
    folder: str | os.PathLike,
    augment: str | None = None,
    keep: str = "last",
    callbacks: Sequence[keras.callbacks.Callback] = (),
    verbose: bool = True,
) -> dict[str, list]:
    """`model.fit` over a `datasets.Split`, interruptible: called again it goes on to the same weights.

    Args:
        model: compiled `keras.Model`, as at the start of training.
        train, val: `datasets.Split`; `val=None` to leave validation out.
        epochs: in all, those of an interrupted call included.
        batch_size, seed, augment: of the stream.
        folder: where the checkpoint lies.
        keep: "last", or "best": the model ends with the weights of the epoch with the lowest validation loss.
        callbacks: more Keras callbacks.
        verbose: show a progress bar.

    Returns:
        dict of lists. For each epoch, resumed ones included, what Keras logs, and `seconds`: wall time, with validation
        and with tracing where it was traced; of an epoch that was interrupted only its second, whole try counts. Of one
        value: `nan_in_epoch` where a loss that was not finite stopped it, `kept_epoch` under `keep="best"`, both
        counted from 0; `peak_bytes`, the peak memory of the process while it trained (the last process, of a run that
        was resumed), and `grown_bytes`, how much of it was above what the process held before, where the system tells.

    Raises:
        ValueError: a checkpoint that is corrupt, of another model, or of more epochs than asked for; `keep="best"`
            without validation.
    """
    if keep not in ("last", "best") or (keep == "best" and val is None):
        raise ValueError(
            f'Expected keep "last", or "best" with a validation split. Received: keep={keep!r}, val={val and val.name}'
        )
    guard = StopAtNaN()
    checkpoint = Checkpoint(Path(folder) / "checkpoint.npz", guard, keep)
    Path(folder).mkdir(parents=True, exist_ok=True)
    done = checkpoint.resume(model)
    if done > epochs:
        raise ValueError(
            f"Expected epochs >= {done}, which {checkpoint.path} has already. Received: epochs={epochs}. Ask for more, "
            "or delete it."
        )
    for callback in callbacks:
        if isinstance(callback, BetaSchedule) and done:
            model.beta = callback.at(done - 1)
    if done < epochs and not checkpoint.ended:
        progress = [_Progress(model.name, train.steps(batch_size), epochs, done)] if verbose else []
        try:
            with measured() as used:
                model.fit(
                    train.batches(batch_size, seed=seed, initial_epoch=done, epochs=epochs, augment=augment),
                    steps_per_epoch=train.steps(batch_size),
                    initial_epoch=done,
                    epochs=epochs,
                    validation_data=None if val is None else _val_batches(val, batch_size),
                    callbacks=[guard, *callbacks, *progress, checkpoint],
                    shuffle=False,  # the stream does
                    verbose=0,
                )
        finally:
            for shown in progress:
                shown.bar.close()
        if used.peak_bytes is not None:
            checkpoint.history["peak_bytes"] = [int(used.peak_bytes)]
            if used.start_bytes is not None:
                checkpoint.history["grown_bytes"] = [max(0, int(used.peak_bytes) - int(used.start_bytes))]
        if guard.stopped:
            checkpoint.history["nan_in_epoch"] = [guard.nan_in_epoch]
    if checkpoint.best is not None:
        kept, weights = checkpoint.best
        model.set_weights(weights)
        for callback in callbacks:
            if isinstance(callback, BetaSchedule):
                model.beta = callback.at(kept)
        checkpoint.history["kept_epoch"] = [kept]
    return checkpoint.history


def _val_batches(val, batch_size):
    """The stream for the validation loss: of several raters the mean mask.

    Cross-entropy is linear in the target, so this is the mean of the raters' losses, as in training; against their
    majority a network that is too sure would win.
    """
    return val.batches(batch_size, rater="mean" if val.num_raters > 1 else None)


@dataclass
class Run:
    """A finished step: its model, its training curves (as `fit` returns them), its folder.

    `snapshots` of a `continued_run`: the weights at the end of each cycle, each as from `model.get_weights()`.
    """

    model: keras.Model
    history: dict
    folder: Path
    masks: Masks | None = None
    snapshots: list[list[np.ndarray]] | None = None

    @property
    def seconds(self) -> float | None:
        """Wall time of all epochs; None where it is not known of each, as of a run made before it was taken."""
        seconds = self.history.get("seconds", [])
        return float(sum(seconds)) if len(seconds) == len(self.history.get("loss", [])) > 0 else None

    @property
    def peak_bytes(self) -> int | None:
        """Peak memory of the process that trained it; None where it is not known."""
        return self.history.get("peak_bytes", [None])[0]

    @property
    def grown_bytes(self) -> int | None:
        """How much of the peak was new, above what the process held when training began; None where unknown."""
        return self.history.get("grown_bytes", [None])[0]


def deterministic_run(
    data: Data,
    recipe: Recipe,
    *,
    seed: int = 0,
    network: str | None = None,
    runs: str | os.PathLike | None = None,
    limit: int | None = None,
    verbose: bool = True,
) -> Run:
    """Step 1: train the deterministic network, or load it where it is finished.

    Args:
        data: `datasets.Data`.
        recipe: a `Recipe`.
        seed: of initial weights and stream.
        network: a name of `models.NETWORKS`; None: the dataset's.
        runs: folder of all runs; None: `runs/` of the repository or the working directory.
        limit: named in the settings only (the data were loaded with it).
        verbose: show a progress bar.

    Raises:
        ValueError: a seed that is not an integer >= 0, a network that is unknown or of another task, or files of an
            earlier run that are corrupt.
    """
    return _deterministic_runs(data, recipe, [_check_seed(seed)], network, runs, limit, verbose)[0]


def ensemble_runs(
    data: Data,
    recipe: Recipe,
    *,
    seed: int = 0,
    num_members: int = 5,
    network: str | None = None,
    runs: str | os.PathLike | None = None,
    limit: int | None = None,
    verbose: bool = True,
) -> list[Run]:
    """The members of a deep ensemble: step 1 from other initial weights and another order of the images.

    Member m is, bit for bit, the `deterministic_run` of `member_seed(seed, m)`, and lies in that run's folder: the
    first is step 1 itself, each is resumed or loaded by itself. The train step is traced once for all of them.

    Args:
        data, recipe, network, runs, limit, verbose: as in `deterministic_run`.
        seed: of the ensemble.
        num_members: networks, 1 to 1000.

    Raises:
        ValueError: a number of members out of range, or what `deterministic_run` refuses.

    Reference: Lakshminarayanan, Pritzel and Blundell 2017, "Simple and Scalable Predictive Uncertainty Estimation using
    Deep Ensembles", Algorithm 1 (without adversarial training).
    """
    if isinstance(num_members, bool) or not isinstance(num_members, int) or not 1 <= num_members <= 1000:
        raise ValueError(f"Expected num_members, an integer from 1 to 1000. Received: num_members={num_members!r}")
    seeds = [member_seed(_check_seed(seed), member) for member in range(num_members)]
    return _deterministic_runs(data, recipe, seeds, network, runs, limit, verbose)


def member_seed(seed: int, member: int) -> int:
    """Seed of an ensemble's member: `seed` itself for the first, then `1000 * (seed + 1) + member`.

    So ensembles of seeds below 1000 share no member, and each shares its first with the single network of its seed.
    """
    return seed if member == 0 else 1000 * (seed + 1) + member


def _deterministic_runs(data, recipe, seeds, network, runs, limit, verbose):
    """A deterministic run of each seed; those that are not finished are trained by one model, traced once."""
    network = network or data.card.network
    fields = ("epochs", "batch_size", "optimizer", "learning_rate", "momentum", "weight_decay", "decay")
    shared = {f: getattr(recipe, f) for f in (*fields, "class_weights", "augment")}
    shared |= {"network": network, **_data_settings(data, limit), **_keep_settings(recipe)}
    # The networks' own activation is the sigmoid of labels and masks, which needs no setting.
    head = {"activation": "softmax"} if data.card.task in EXCLUSIVE else {}
    shared |= head
    model, slots, found = None, [], []
    for seed in seeds:
        settings = {**shared, "seed": seed}
        folder = run_folder(runs, data.card.name, "deterministic", seed, settings)
        if (folder / "model.keras").exists():
            found.append(_finished(folder, tell=True, stacklevel=4))
            continue
        keras.utils.set_random_seed(seed)
        fresh = networks.build(network, data.input_shape, data.num_outputs, seed=seed, **head)
        if model is None:
            model = fresh
            if len(model.output_shape) != len(data.train.targets.shape):
                raise ValueError(
                    f"Expected a network for {data.card.task} ({data.card.name}), as {data.card.network!r}. "
                    f"Received: network={network!r}, which gives {model.output_shape}"
                )
            steps = recipe.epochs * data.train.steps(recipe.batch_size)
            model.compile(_optimizer(recipe, steps), loss_for(recipe, data))
            model.optimizer.build(model.trainable_variables)
            slots = [np.array(ops.convert_to_numpy(v)) for v in model.optimizer.variables]
        else:
            for variable, value in zip(_state(model), _state(fresh), strict=True):
                variable.assign(value)
            for variable, value in zip(model.optimizer.variables, slots, strict=True):
                variable.assign(value)
        _fit_and_save(model, data, recipe, recipe.epochs, seed, folder, settings, verbose=verbose)
        found.append(_finished(folder))
    return found


def masks_run(step1: Run, data: Data, recipe: Recipe, r_bayes: float, *, seed: int = 0, verbose: bool = True) -> Masks:
    """Step 2: masks of the top `r_bayes` of the weights that may be Bayesian, by the recipe's score and scope.

    `seed`: of the score "random", as in `scores_run`.
    """
    return choose_masks(step1.model, scores_run(step1, data, recipe, seed=seed, verbose=verbose), recipe, r_bayes)


def choose_masks(model: keras.Model, scores: Mapping[str, np.ndarray], recipe: Recipe, r_bayes: float) -> Masks:
    """Masks by the recipe's `eligible`, `scope` and `fan_out` from any scores of a model's weights.

    Under `eligible="kernels"` or `"biases"` the share `r_bayes` is of these alone.

    Raises:
        ValueError: what `top_k` refuses, or no weight that is eligible.
    """
    if recipe.eligible != "all":
        is_bias = recipe.eligible == "biases"
        kept = {key: values for key, values in scores.items() if key.endswith("bias") == is_bias}
        if not kept:
            raise ValueError(f"Expected {recipe.eligible} among the weights. Received: {', '.join(scores)}")
        scores = kept
    if recipe.scope == "one_per_channel":
        return one_per_channel(scores, model)
    graph = recipe.scope == "channel" or recipe.fan_out is not None
    return top_k(scores, r_bayes, scope=recipe.scope, model=model if graph else None, cost_aware=recipe.fan_out)


def scores_run(step1: Run, data: Data, recipe: Recipe, *, seed: int = 0, verbose: bool = True) -> dict[str, np.ndarray]:
    """The recipe's saliency score of every weight that may be Bayesian, kept beside step 1 for every r_bayes.

    `seed`: of the score "random" alone; the others follow from the trained weights and the data. Left out are biases
    right before a batch norm that step 3 runs in training mode: they have no effect there.
    """
    settings = {"score": recipe.score, "batch_size": recipe.batch_size, "class_weights": recipe.class_weights}
    settings |= {"seed": _check_seed(seed)} if recipe.score == "random" else {}
    path = step1.folder / f"saliency_{recipe.score}_{_digest({**settings, **_data_settings(data, None)})}.npz"
    if path.exists():
        scores = _read_arrays(path)
    else:
        stream = data.train.batches(recipe.batch_size, seed=0)
        loss = loss_for(recipe, data)
        scores = saliency(step1.model, stream, loss, score=recipe.score, seed=seed, verbose=verbose)
        write_atomically(path, lambda file: np.savez(file, **scores))
    if recipe.batch_norm != "frozen":
        idle = biases_before_batch_norm(step1.model)
        scores = {key: values for key, values in scores.items() if key not in idle}
    return scores


def empirical_fisher(
    scores: Mapping[str, np.ndarray], score: str, *, terms: int, num_examples: int, batch_size: int
) -> dict[str, np.ndarray]:
    """Mean over examples of the squared gradient of one example's negative log-likelihood, from a saliency score.

    "per_example" is the mean of squared gradients of a loss that is itself a mean over `terms`: times `terms^2` it is
    exact. "fisher" squares the gradient of a batch's mean. Where examples are independent and their gradients average
    to zero, as near an optimum, that square is in expectation the batch's size times smaller: times the mean size it is
    an approximation, from one pass. Away from an optimum it is too large.

    Args:
        scores: key -> array, from `saliency`.
        score: "per_example" or "fisher".
        terms: of one example, over which the loss averages; see `partial_bayes.loss_terms`.
        num_examples, batch_size: of the saliency pass.

    Raises:
        ValueError: another score, of which no Fisher information can be made.
    """
    if score not in ("per_example", "fisher"):
        raise ValueError(f'Expected score "per_example" or "fisher". Received: score={score!r}')
    size = 1.0 if score == "per_example" else num_examples / math.ceil(num_examples / batch_size)
    return {key: values.astype("float64") * terms**2 * size for key, values in scores.items()}


def partial_run(
    step1: Run,
    masks: Masks,
    data: Data,
    recipe: Recipe,
    *,
    seed: int = 0,
    method: str | None = None,
    locs: str = "trained",
    runs: str | os.PathLike | None = None,
    limit: int | None = None,
    verbose: bool = True,
) -> Run:
    """Step 3: train the sparse Bayesian network from step 1's weights, or load it where it is finished.

    What comes back is read from the file, also after training: the noise that follows is the same either way.

    Args:
        step1: the trained network.
        masks: which of its weights are Bayesian.
        data, recipe, runs, limit, verbose: as in `deterministic_run`.
        seed: of noise and stream.
        method: name of the folder; None: `partial_r` and the share of weights that is Bayesian.
        locs: where the Bayesian locs start: "trained", or "normal": drawn from N(0, 1), as the paper's code does for
            its fully Bayesian network. All other weights start at step 1's.

    Raises:
        ValueError: a seed, method or `locs` that is none, masks of another network, or files of an earlier run that are
            corrupt.
    """
    seed = _check_seed(seed)
    if locs not in ("trained", "normal"):
        raise ValueError(f'Expected locs "trained" or "normal". Received: locs={locs!r}')
    if locs == "normal" and recipe.scale_start == "fisher":
        raise ValueError('Expected scales that do not start by the curvature of other locs. Received: "fisher"')
    # How the masks were chosen is in their digest.
    settings = {f: v for f, v in dataclasses.asdict(recipe).items() if f not in ("keep", *_OF_MASKS, *_ADDED)}
    settings |= {f: getattr(recipe, f) for f in _ADDED if getattr(recipe, f) != getattr(Recipe, f)}
    settings |= {"step1": step1.folder.name, "masks": masks.digest(), **_keep_settings(recipe)}
    settings |= {**_data_settings(data, limit), "seed": seed} | ({"locs": locs} if locs != "trained" else {})
    method = f"partial_r{masks.r_bayes:.2g}" if method is None else _check_method(method)
    folder = run_folder(runs, data.card.name, method, seed, settings)
    if (folder / "model.keras").exists():
        return _finished(folder, masks, tell=True)
    keras.utils.set_random_seed(seed)
    rho = keras.initializers.RandomNormal(-3.0, 1.0, seed=seed) if recipe.initial_scale is None else None
    model = to_partial_bayes(
        step1.model,
        masks,
        num_train=data.train.num_examples,
        num_samples=recipe.num_samples,
        beta=recipe.beta_start,
        kl_reduction=recipe.kl_reduction,
        estimator=recipe.estimator,
        initial_scale=0.01 if recipe.initial_scale is None else recipe.initial_scale,
        untransformed_scale_initializer=rho,
        prior=None if recipe.prior_scale == 1.0 else tfp.distributions.Normal(0.0, recipe.prior_scale),
        prior_at_loc=recipe.prior_at == "weight",
        batch_norm=recipe.batch_norm,
        seed=seed,
    )
    if locs == "normal":
        _draw_locs(model.network, seed)
    if recipe.scale_start != "absolute":
        _start_scales(model, masks, step1, data, recipe, verbose)
    held = [] if recipe.trains == "all" else [_Held(model, masks if recipe.trains == "bayesian" else {})]
    steps = recipe.bayes_epochs * data.train.steps(recipe.batch_size)
    scales = optimizer_for(recipe.scale_optimizer, recipe.scale_learning_rate, momentum=recipe.momentum)
    model.compile(LocScaleOptimizer(_optimizer(_gentle(recipe), steps), scales), loss_for(recipe, data))
    schedule = BetaSchedule(recipe.beta_start, recipe.beta_stop, recipe.bayes_epochs)
    masks_path = folder / "masks.npz"
    masks_path.parent.mkdir(parents=True, exist_ok=True)
    masks.save(masks_path)
    _fit_and_save(
        model, data, recipe, recipe.bayes_epochs, seed, folder, settings, callbacks=[schedule, *held], verbose=verbose
    )
    return _finished(folder, masks)


PAPERS_SCALE = 0.049  # softplus(-3): the median of the paper's initial scales
_OF_MASKS = ("scope", "fan_out", "eligible")
_ADDED = ("scale_start", "prior_scale", "prior_at", "trains")  # named where they are not the default, as `keep` is


def _start_scales(model, masks, step1, data, recipe, verbose):
    """Start each scale at a multiple of its loc, or of the width that the curvature gives it."""
    weights = named_weights(model.network)
    if recipe.scale_start == "fisher":
        exact = recipe if recipe.score == "per_example" else dataclasses.replace(recipe, score="fisher")
        fisher = empirical_fisher(
            scores_run(step1, data, exact, verbose=verbose),
            exact.score,
            terms=loss_terms(loss_for(recipe, data), step1.model.output_shape),
            num_examples=data.train.num_examples,
            batch_size=recipe.batch_size,
        )
    for key, mask in masks.items():
        if not mask.any():
            continue
        if recipe.scale_start == "fisher":
            start = (data.train.num_examples * fisher[key][mask] + 1.0) ** -0.5
        else:
            start = np.maximum(np.abs(ops.convert_to_numpy(weights[key].variable))[mask], LEAST_LOC)
        rho = tfp.math.softplus_inverse(recipe.initial_scale * start).numpy()
        weights[f"{key}_posterior_untransformed_scale"].variable.assign(rho.astype("float32"))


class _Held(keras.callbacks.Callback):
    """Puts back, after each batch, every loc that is not to be trained: exact, as each entry has its own slots."""

    def __init__(self, model, masks):
        super().__init__()
        self.held = [
            (weight.variable, ops.convert_to_tensor(ops.copy(weight.variable.value)), masks.get(key))
            for key, weight in named_weights(model.network).items()
            if weight.variable.trainable and not key.endswith("_posterior_untransformed_scale")
        ]

    def on_train_batch_end(self, batch, logs=None):
        for variable, start, mask in self.held:
            variable.assign(start if mask is None else ops.where(mask, variable, start))


def particles_run(
    step1: Run,
    masks: Masks,
    data: Data,
    recipe: Recipe,
    *,
    seed: int = 0,
    method: str = "particles",
    gaussian: bool = False,
    runs: str | os.PathLike | None = None,
    limit: int | None = None,
    verbose: bool = True,
) -> Run:
    """Step 3 with another posterior on the same masks: `num_samples` particles, or Gaussians about them.

    Each particle sees its part of a batch, as under the estimator "split"; batch norm is frozen, all weights train, the
    prior is N(0, 1) and the KL that of the ELBO times the recipe's first beta. Offsets start as the recipe's scales do.

    Args:
        step1, masks, data, recipe, seed, runs, limit, verbose: as in `partial_run`.
        method: name of the folder.
        gaussian: whether the particles are Gaussians: a mixture.

    Raises:
        ValueError: as `partial_run`, or a recipe whose scales start by the Fisher score.
    """
    seed, method = _check_seed(seed), _check_method(method)
    if recipe.scale_start == "fisher":
        raise ValueError('Expected scale_start "absolute" or "relative" of particles. Received: scale_start="fisher"')
    fields: tuple[str, ...]
    fields = ("optimizer", "learning_rate", "momentum", "weight_decay", "decay", "class_weights", "augment")
    fields += (
        "batch_size",
        "scale_optimizer",
        "scale_learning_rate",
        "num_samples",
        "initial_scale",
        "scale_start",
        "beta_start",
    )
    gentle = _gentle(recipe)
    settings = {f: getattr(gentle, f) for f in fields} | {"epochs": recipe.bayes_epochs, "gaussian": gaussian}
    settings |= {"step1": step1.folder.name, "masks": masks.digest(), "seed": seed}
    settings |= {**_data_settings(data, limit), **_keep_settings(recipe)}
    folder = run_folder(runs, data.card.name, method, seed, settings)
    if (folder / "model.keras").exists():
        return _finished(folder, masks, tell=True)
    keras.utils.set_random_seed(seed)
    terms = loss_terms(loss_for(recipe, data), step1.model.output_shape)  # known of every recipe's losses: no None
    model = to_particles(
        step1.model,
        masks,
        num_particles=recipe.num_samples,
        initial_scale=PAPERS_SCALE if recipe.initial_scale is None else recipe.initial_scale,
        relative=recipe.scale_start == "relative",
        gaussian=gaussian,
        kl_weight=recipe.beta_start / (data.train.num_examples * terms) if gaussian else 0.0,  # type: ignore[operator]
        seed=seed,
    )
    steps = recipe.bayes_epochs * data.train.steps(recipe.batch_size)
    scales = optimizer_for(recipe.scale_optimizer, recipe.scale_learning_rate, momentum=recipe.momentum)
    model.compile(LocScaleOptimizer(_optimizer(gentle, steps), scales), loss_for(recipe, data))
    _fit_and_save(model, data, recipe, recipe.bayes_epochs, seed, folder, settings, verbose=verbose)
    return _finished(folder, masks)


def _draw_locs(network, seed):
    """Start every Bayesian loc at a draw from N(0, 1)."""
    random = np.random.default_rng(seed)
    for layer in masked_layers(network):
        for name in layer._bayesian_names():
            loc = layer._loc(name)
            loc.assign(np.where(layer.mask(name), random.standard_normal(loc.shape), ops.convert_to_numpy(loc)))


def _gentle(recipe):
    """The recipe with the learning rate of step 3."""
    if recipe.bayes_learning_rate is None:
        return recipe
    return dataclasses.replace(recipe, learning_rate=recipe.bayes_learning_rate)


def continued_run(
    step1: Run,
    data: Data,
    recipe: Recipe,
    *,
    method: str,
    seed: int = 0,
    epochs: int | None = None,
    cycles: int = 1,
    dropout: float = 0.0,
    runs: str | os.PathLike | None = None,
    limit: int | None = None,
    verbose: bool = True,
) -> Run:
    """Train on from step 1's weights without a posterior, as step 3 would, or load it where it is finished.

    Learning rate, optimiser, batch norm, batches, loss and augmentation are step 3's. `partial_run` with empty masks is
    the same training but for rounding (with `batch_norm="frozen"`; else its passes each move the running statistics),
    at the price of `num_samples` equal passes where the estimator is "all"; it gives back a `PartialBayes`.

    Args:
        step1: the trained network; it is not changed.
        data, recipe, runs, limit, verbose: as in `deterministic_run`.
        method: name of the folder, such as "deterministic_longer", "mc_dropout" or "snapshot".
        seed: of stream and dropout.
        epochs: None for the recipe's `bayes_epochs`.
        cycles: 1: the learning rate decays as the recipe says. More: it falls from its start to 0 by a cosine in each
            cycle, and the weights at the end of each are kept; lengths differ by one epoch at most. Step 1's own
            weights are none of them.
        dropout: 0, or the rate of `models.with_dropout`.

    Returns:
        A `Run` whose model is a plain `keras.Model`, compiled, its optimiser as at the start; `snapshots`: the weights
        at the end of each cycle, the model's own last. Of a run that diverged only whole cycles, or the weights that
        were kept where there is none.

    Raises:
        ValueError: a setting out of range, `keep="best"` with more than one cycle, or files of an earlier run that are
            corrupt.

    Reference: Huang et al. 2017, "Snapshot Ensembles: Train 1, Get M for Free", section 3 (there from random weights).
    """
    seed, method = _check_seed(seed), _check_method(method)
    epochs = recipe.bayes_epochs if epochs is None else epochs
    for name, value, most in (("epochs", epochs, np.inf), ("cycles", cycles, epochs)):
        if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= most:
            bound = ">= 1" if np.isinf(most) else f"from 1 to epochs={epochs}"
            raise ValueError(f"Expected {name}, an integer {bound}. Received: {name}={value!r}")
    if cycles > 1 and recipe.keep == "best":
        raise ValueError(
            'Expected keep="last" with more than one cycle: each cycle gives its last weights. '
            f"Received: keep={recipe.keep!r}, cycles={cycles}"
        )
    gentle = _gentle(recipe)
    fields = ("batch_size", "optimizer", "learning_rate", "momentum", "weight_decay", "decay", "class_weights")
    settings = {f: getattr(gentle, f) for f in (*fields, "augment", "batch_norm")}
    settings |= {"step1": step1.folder.name, "epochs": epochs, "cycles": cycles, "dropout": dropout, "seed": seed}
    settings |= {**_data_settings(data, limit), **_keep_settings(recipe)}
    folder = run_folder(runs, data.card.name, method, seed, settings)
    ends = [epochs * (cycle + 1) // cycles for cycle in range(cycles)]  # in epochs
    steps = data.train.steps(recipe.batch_size)
    cycle_steps = [steps * int(length) for length in np.diff([0, *ends])] if cycles > 1 else None

    def ready(model):
        settle_batch_norm(model, recipe.batch_norm)
        model.compile(_optimizer(gentle, epochs * steps, cycle_steps), loss_for(recipe, data))
        model.optimizer.build(model.trainable_variables)

    if (folder / "model.keras").exists():
        return _finished(folder, tell=True, ready=ready, ends=ends)
    keras.utils.set_random_seed(seed)
    model = networks.with_dropout(step1.model, dropout, seed=seed)
    ready(model)
    snapshots = [_Snapshots(folder, ends)] if cycles > 1 else []
    _fit_and_save(model, data, recipe, epochs, seed, folder, settings, callbacks=snapshots, verbose=verbose)
    return _finished(folder, ready=ready, ends=ends)


class _Snapshots(keras.callbacks.Callback):
    """Writes the weights at the end of each cycle."""

    def __init__(self, folder, ends):
        super().__init__()
        self.folder, self.ends = folder, ends

    def on_epoch_end(self, epoch, logs=None):
        if epoch + 1 in self.ends and not self.model.stop_training:
            arrays = {f"w{i}": w for i, w in enumerate(self.model.get_weights())}
            path = _snapshot_path(self.folder, self.ends.index(epoch + 1))
            write_atomically(path, lambda file: np.savez(file, **arrays))


def _snapshot_path(folder, cycle):
    return folder / f"snapshot{cycle + 1}.npz"


def _read_snapshots(folder, model, history, ends):
    """Weights at the end of each cycle of a finished run: one that diverged may lack the last cycles."""
    last = model.get_weights()
    if len(ends) == 1 or "loss" not in history:
        return [last]
    snapshots = []
    for cycle in range(sum(end <= len(history["loss"]) for end in ends)):
        path = _snapshot_path(folder, cycle)
        try:
            arrays = _read_arrays(path)
        except ValueError:
            raise ValueError(f"{path.name} is missing or cut short") from None
        weights = [arrays[f"w{i}"] for i in range(len(arrays)) if f"w{i}" in arrays]
        if [w.shape for w in weights] != [w.shape for w in last]:
            raise ValueError(f"{path.name} holds weights of another network")
        snapshots.append(weights)
    return snapshots or [last]


def repository() -> Path:
    """The checkout that the working folder lies in, as that of a notebook in `nbs/` does; else the working folder."""
    here = Path.cwd()
    ours = (path for path in (here, *here.parents) if (path / "pyproject.toml").exists() and (path / "sbn_tf").is_dir())
    return next(ours, here)


def run_folder(runs: str | os.PathLike | None, dataset: str, method: str, seed: int, settings: dict) -> Path:
    """`runs/<dataset>/<method>/seed<k>/<hash of the settings>`."""
    runs = repository() / "runs" if runs is None else runs
    return Path(runs) / dataset / method / f"seed{seed}" / _digest(settings)


def _digest(settings) -> str:
    settings = {**settings, "format": FORMAT, "dtype": keras.config.dtype_policy().name}
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:10]


def _keep_settings(recipe):
    """Named where it is not the default, so that older runs have the names that they had."""
    return {"keep": recipe.keep} if recipe.keep != "last" else {}


def _check_method(method) -> str:
    if not isinstance(method, str) or not re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9_.-]*", method):
        raise ValueError(f"Expected method, a name of letters, digits and . _ - for a folder. Received: {method!r}")
    return method


def _check_seed(seed) -> int:
    if isinstance(seed, bool) or not hasattr(seed, "__index__") or operator.index(seed) < 0:
        raise ValueError(f"Expected seed, an integer >= 0. Received: seed={seed!r}")
    return operator.index(seed)


def write_json(path: str | os.PathLike, content: Mapping) -> None:
    """Write JSON with the versions and the commit that made it, whole or not at all."""
    import tensorflow as tf

    import sbn_tf

    versions = {"sbn_tf": sbn_tf.__version__, "keras": keras.__version__, "tensorflow": tf.__version__}
    versions["tensorflow_probability"] = tfp.__version__
    text = json.dumps({**content, "versions": versions, "commit": _commit()}, indent=1)
    write_atomically(path, lambda file: file.write(text.encode()))


def _commit() -> str | None:
    """This package's commit, "-dirty" where files have changed since; None outside its own repository."""
    package = Path(__file__).resolve().parents[1]

    def git(*arguments):
        return subprocess.run(
            ["git", *arguments], cwd=package, capture_output=True, text=True, check=True
        ).stdout.strip()

    try:
        if Path(git("rev-parse", "--show-toplevel")).resolve() != package.parent:
            return None
        return git("describe", "--always", "--dirty", "--abbrev=40", "--exclude=*")
    except (OSError, subprocess.CalledProcessError):
        return None


def _data_settings(data, limit):
    parts = (data.train, data.val, data.test)
    sizes = [p.num_examples for p in parts]
    return {"input_shape": list(data.input_shape), "sizes": sizes, "limit": limit, "data": data.digest()}


def _optimizer(recipe, steps, cycle_steps=None):
    return optimizer_for(
        recipe.optimizer,
        recipe.learning_rate,
        momentum=recipe.momentum,
        weight_decay=recipe.weight_decay,
        decay=recipe.decay,
        steps=steps,
        cycle_steps=cycle_steps,
    )


def _fit_and_save(model, data, recipe, epochs, seed, folder, settings, callbacks=(), verbose=True):
    history = fit(
        model,
        data.train,
        data.val,
        epochs=epochs,
        batch_size=recipe.batch_size,
        seed=seed,
        folder=folder,
        augment=recipe.augment,
        keep=recipe.keep,
        callbacks=callbacks,
        verbose=verbose,
    )
    write_json(folder / "config.json", {"settings": settings, "recipe": dataclasses.asdict(recipe)})
    write_atomically(folder / "history.json", lambda file: file.write(json.dumps(history).encode()))
    temporary = folder / f"saving{uuid.uuid4().hex[:8]}.keras"
    try:
        model.save(temporary)
        os.replace(temporary, folder / "model.keras")
    finally:
        temporary.unlink(missing_ok=True)
    (folder / "checkpoint.npz").unlink(missing_ok=True)


def _finished(folder, masks=None, *, tell=False, stacklevel=3, ready=None, ends=None):
    """The run that `_fit_and_save` left in `folder`; `tell` again where it diverged.

    `ready(model)` compiles it: what of its batch norm trains is not in the file. `ends`: of its cycles, in epochs.
    """
    try:
        if not zipfile.is_zipfile(folder / "model.keras"):
            raise ValueError("model.keras is cut short")
        history = json.loads((folder / "history.json").read_text())
        model = keras.models.load_model(folder / "model.keras", compile=ready is None)
        if ready is not None:
            ready(model)
        snapshots = None if ends is None else _read_snapshots(folder, model, history, ends)
    except (OSError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(
            f"Expected a whole run in {folder}. Received: {reason}. Delete it: it is made anew."
        ) from error
    if tell and "nan_in_epoch" in history:
        warnings.warn(
            f"This run diverged in epoch {history['nan_in_epoch'][0] + 1}: its weights are those of the epoch before. "
            f"To train again, lower the learning rate, or delete {folder}.",
            stacklevel=stacklevel,
        )
    return Run(model, history, folder, masks, snapshots)


def _read_arrays(path):
    """Arrays of an npz file that an earlier step wrote."""
    try:
        with np.load(path, allow_pickle=False) as file:
            return {key: file[key] for key in file.files}
    except (OSError, KeyError, ValueError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        raise ValueError(
            f"Expected a whole npz file. Received: {path} ({error}). Delete it: it is made anew."
        ) from None
