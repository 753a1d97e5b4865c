"""The three steps as resumable runs.

A run lives in `runs/<dataset>/<method>/seed<k>/<settings>/`, where `<settings>` is a short hash of everything that
shapes the result: runs with other settings never mix, a finished one is loaded, an interrupted one goes on.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import operator
import os
import subprocess
import warnings
import zipfile
import zlib
from dataclasses import dataclass
from pathlib import Path

import keras
import numpy as np
from keras import ops
from tqdm import tqdm

from sbn_tf import models
from sbn_tf.datasets.base import EXCLUSIVE
from sbn_tf.partial_bayes import BetaSchedule, LocScaleOptimizer, to_partial_bayes
from sbn_tf.recipes import Recipe, loss_for, optimizer_for
from sbn_tf.saliency import Masks, biases_before_batch_norm, saliency, top_k

__all__ = [
    "Checkpoint",
    "Run",
    "StopAtNaN",
    "deterministic_run",
    "fit",
    "masks_run",
    "partial_run",
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
    """

    def __init__(self, path, guard: StopAtNaN | None = None):
        super().__init__()
        self.path, self.guard, self.history = Path(path), guard, {}
        self.ended = False

    def resume(self, model) -> int:
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
            ended = bool(arrays.pop("ended"))
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

    def on_epoch_end(self, epoch, logs=None):
        """Write the state after this epoch."""
        if self.guard is not None and self.guard.stopped:
            return
        for key, value in (logs or {}).items():
            self.history.setdefault(key, []).append(float(value))
        self._write(epoch + 1)

    def on_train_end(self, logs=None):
        """Say in the file that training was ended on purpose; go back to the last good epoch after a NaN."""
        if self.guard is not None and self.guard.stopped:
            epochs = self.guard.nan_in_epoch
            self.history = {key: values[:epochs] for key, values in self.history.items()} if epochs else {}
            self._write(epochs) if epochs else self.path.unlink(missing_ok=True)
        elif self.model.stop_training:
            self.ended = True
            self._write(max(map(len, self.history.values()), default=0))

    def _write(self, epochs):
        variables = [*_state(self.model), *self.model.optimizer.variables]
        arrays = {f"v{i}": ops.convert_to_numpy(v) for i, v in enumerate(variables)}
        extra = {"epochs": epochs, "history": json.dumps(self.history), "ended": self.ended}
        _atomically(self.path, lambda file: np.savez(file, **arrays, **extra))


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
    model,
    train,
    val,
    *,
    epochs: int,
    batch_size: int,
    seed: int,
    folder,
    augment: str | None = None,
    callbacks=(),
    verbose: bool = True,
) -> dict[str, list]:
    """`model.fit` over a `datasets.Split`, interruptible: called again it goes on to the same weights.

    Args:
        model: compiled `keras.Model`, as at the start of training.
        train, val: `datasets.Split`; `val=None` to leave validation out.
        epochs: in all, those of an interrupted call included.
        batch_size, seed, augment: of the stream.
        folder: where the checkpoint lies.
        callbacks: more Keras callbacks.
        verbose: show a progress bar.

    Returns:
        dict of lists: the history of all epochs, resumed ones included; `nan_in_epoch` where a loss that was not finite
        stopped it.

    Raises:
        ValueError: a checkpoint that is corrupt, of another model, or of more epochs than asked for.
    """
    guard = StopAtNaN()
    checkpoint = Checkpoint(Path(folder) / "checkpoint.npz", guard)
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
        if guard.stopped:
            checkpoint.history["nan_in_epoch"] = [guard.nan_in_epoch]
    return checkpoint.history


def _val_batches(val, batch_size):
    """The stream for the validation loss: of several raters the mean mask.

    Cross-entropy is linear in the target, so this is the mean of the raters' losses, as in training; against their
    majority a network that is too sure would win.
    """
    return val.batches(batch_size, rater="mean" if val.num_raters > 1 else None)


@dataclass
class Run:
    """A finished step: its model, its training curves, its folder."""

    model: keras.Model
    history: dict
    folder: Path
    masks: Masks | None = None


def deterministic_run(data, recipe: Recipe, *, seed=0, network=None, runs=None, limit=None, verbose=True) -> Run:
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
    seed = _check_seed(seed)
    network = network or data.card.network
    fields = ("epochs", "batch_size", "optimizer", "learning_rate", "momentum", "weight_decay", "decay")
    settings = {f: getattr(recipe, f) for f in (*fields, "class_weights", "augment")}
    settings |= {"network": network, **_data_settings(data, limit), "seed": seed}
    # The networks' own activation is the sigmoid of labels and masks, which needs no setting.
    head = {"activation": "softmax"} if data.card.task in EXCLUSIVE else {}
    settings |= head
    folder = run_folder(runs, data.card.name, "deterministic", seed, settings)
    if (folder / "model.keras").exists():
        return _finished(folder, tell=True)
    keras.utils.set_random_seed(seed)
    model = models.build(network, data.input_shape, data.num_outputs, seed=seed, **head)
    if len(model.output_shape) != len(data.train.targets.shape):
        raise ValueError(
            f"Expected a network for {data.card.task} ({data.card.name}), as {data.card.network!r}. "
            f"Received: network={network!r}, which gives {model.output_shape}"
        )
    steps = recipe.epochs * data.train.steps(recipe.batch_size)
    model.compile(_optimizer(recipe, steps), loss_for(recipe, data))
    _fit_and_save(model, data, recipe, recipe.epochs, seed, folder, settings, verbose=verbose)
    return _finished(folder)


def masks_run(step1: Run, data, recipe: Recipe, r_bayes: float, *, verbose=True) -> Masks:
    """Step 2: masks of the top `r_bayes` of the weights, by `scores_run`."""
    return top_k(scores_run(step1, data, recipe, verbose=verbose), r_bayes)


def scores_run(step1: Run, data, recipe: Recipe, *, verbose=True) -> dict[str, np.ndarray]:
    """The recipe's saliency score of every weight that may be Bayesian, kept beside step 1 for every r_bayes.

    Left out are biases right before a batch norm that step 3 runs in training mode: they have no effect there.
    """
    settings = {"score": recipe.score, "batch_size": recipe.batch_size, "class_weights": recipe.class_weights}
    path = step1.folder / f"saliency_{recipe.score}_{_digest({**settings, **_data_settings(data, None)})}.npz"
    if path.exists():
        scores = _read_arrays(path)
    else:
        stream = data.train.batches(recipe.batch_size, seed=0)
        scores = saliency(step1.model, stream, loss_for(recipe, data), score=recipe.score, verbose=verbose)
        _atomically(path, lambda file: np.savez(file, **scores))
    if recipe.batch_norm != "frozen":
        idle = biases_before_batch_norm(step1.model)
        scores = {key: values for key, values in scores.items() if key not in idle}
    return scores


def partial_run(step1: Run, masks: Masks, data, recipe: Recipe, *, seed=0, runs=None, limit=None, verbose=True) -> Run:
    """Step 3: train the sparse Bayesian network from step 1's weights, or load it where it is finished.

    What comes back is read from the file, also after training: the noise that follows is the same either way.
    """
    seed = _check_seed(seed)
    settings = {**dataclasses.asdict(recipe), "step1": step1.folder.name, "masks": masks.digest()}
    settings |= {**_data_settings(data, limit), "seed": seed}
    folder = run_folder(runs, data.card.name, f"partial_r{masks.r_bayes:.2g}", seed, settings)
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
        batch_norm=recipe.batch_norm,
        seed=seed,
    )
    steps = recipe.bayes_epochs * data.train.steps(recipe.batch_size)
    scales = optimizer_for(recipe.scale_optimizer, recipe.scale_learning_rate, momentum=recipe.momentum)
    gentle = recipe
    if recipe.bayes_learning_rate is not None:
        gentle = dataclasses.replace(recipe, learning_rate=recipe.bayes_learning_rate)
    model.compile(LocScaleOptimizer(_optimizer(gentle, steps), scales), loss_for(recipe, data))
    schedule = BetaSchedule(recipe.beta_start, recipe.beta_stop, recipe.bayes_epochs)
    masks_path = folder / "masks.npz"
    masks_path.parent.mkdir(parents=True, exist_ok=True)
    masks.save(masks_path)
    _fit_and_save(
        model, data, recipe, recipe.bayes_epochs, seed, folder, settings, callbacks=[schedule], verbose=verbose
    )
    return _finished(folder, masks)


def run_folder(runs, dataset: str, method: str, seed: int, settings: dict) -> Path:
    """`runs/<dataset>/<method>/seed<k>/<hash of the settings>`."""
    if runs is None:
        here = Path.cwd()
        roots = [p for p in (here, *here.parents) if (p / "pyproject.toml").exists() and (p / "sbn_tf").is_dir()]
        runs = (roots[0] if roots else here) / "runs"
    return Path(runs) / dataset / method / f"seed{seed}" / _digest(settings)


def _digest(settings) -> str:
    settings = {**settings, "format": FORMAT, "dtype": keras.config.dtype_policy().name}
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:10]


def _check_seed(seed) -> int:
    if isinstance(seed, bool) or not hasattr(seed, "__index__") or operator.index(seed) < 0:
        raise ValueError(f"Expected seed, an integer >= 0. Received: seed={seed!r}")
    return operator.index(seed)


def write_json(path, content: dict) -> None:
    """Write JSON with the versions and the commit that made it, whole or not at all."""
    import tensorflow as tf
    import tensorflow_probability as tfp

    import sbn_tf

    versions = {"sbn_tf": sbn_tf.__version__, "keras": keras.__version__, "tensorflow": tf.__version__}
    versions["tensorflow_probability"] = tfp.__version__
    text = json.dumps({**content, "versions": versions, "commit": _commit()}, indent=1)
    _atomically(path, lambda file: file.write(text.encode()))


def _commit() -> str | None:
    """This package's commit, "-dirty" where files have changed since; None outside its own repository."""
    package = Path(__file__).resolve().parent

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


def _optimizer(recipe, steps):
    return optimizer_for(
        recipe.optimizer,
        recipe.learning_rate,
        momentum=recipe.momentum,
        weight_decay=recipe.weight_decay,
        decay=recipe.decay,
        steps=steps,
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
        callbacks=callbacks,
        verbose=verbose,
    )
    write_json(folder / "config.json", {"settings": settings, "recipe": dataclasses.asdict(recipe)})
    _atomically(folder / "history.json", lambda file: file.write(json.dumps(history).encode()))
    temporary = folder / f"saving{os.getpid()}.keras"
    try:
        model.save(temporary)
        os.replace(temporary, folder / "model.keras")
    finally:
        temporary.unlink(missing_ok=True)
    (folder / "checkpoint.npz").unlink(missing_ok=True)


def _finished(folder, masks=None, tell=False):
    """The run that `_fit_and_save` left in `folder`; `tell` again where it diverged."""
    try:
        if not zipfile.is_zipfile(folder / "model.keras"):
            raise ValueError("model.keras is cut short")
        history = json.loads((folder / "history.json").read_text())
        model = keras.models.load_model(folder / "model.keras")
    except (OSError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(
            f"Expected a whole run in {folder}. Received: {reason}. Delete it: it is made anew."
        ) from error
    if tell and "nan_in_epoch" in history:
        warnings.warn(
            f"This run diverged in epoch {history['nan_in_epoch'][0] + 1}: its weights are those of the epoch before. "
            f"To train again, lower the learning rate, or delete {folder}.",
            stacklevel=3,
        )
    return Run(model, history, folder, masks)


def _read_arrays(path):
    """Arrays of an npz file that an earlier step wrote."""
    try:
        with np.load(path, allow_pickle=False) as file:
            return {key: file[key] for key in file.files}
    except (OSError, KeyError, ValueError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        raise ValueError(
            f"Expected a whole npz file. Received: {path} ({error}). Delete it: it is made anew."
        ) from None


def _atomically(path, write):
    """Call `write(file)` on a temporary file and put it in place only when it is whole."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")  # not tempfile's: only their owner may read those
    try:
        with open(temporary, "wb") as file:
            write(file)
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
