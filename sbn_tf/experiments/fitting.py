"""Training that can be interrupted: `fit` goes on after the last whole epoch and reaches the same weights."""

from __future__ import annotations

import json
import os
import time
import warnings
from collections.abc import Sequence
from pathlib import Path

import keras
import numpy as np
from keras import ops
from tqdm import tqdm

from sbn_tf.core.files import write_atomically
from sbn_tf.core.keras_internals import noise_states
from sbn_tf.core.start import check_callbacks
from sbn_tf.cost import measured
from sbn_tf.datasets.base import Split
from sbn_tf.experiments.folders import read_arrays
from sbn_tf.partial_bayes import BetaSchedule


def state(model: keras.Model) -> list:
    """All variables that training changes: weights and the states of the noise."""
    return [*model.weights, *noise_states(model)]


class StopAtNaN(keras.callbacks.Callback):
    """Stops training that diverges, and puts back all that training changes as of the last good epoch.

    An epoch is good when its losses (of validation, too, where there was one) and weights are finite, and so is the
    loss of the first batch after it: a loss is taken before its update, so only the next one shows what the update did.

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
        return [*state(self.model), *self.model.optimizer.variables]

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
        variables = [*state(model), *model.optimizer.variables]
        arrays = read_arrays(self.path)
        try:
            epochs, history = int(arrays.pop("epochs")), json.loads(str(arrays.pop("history")))
            ended, best_epoch = bool(arrays.pop("ended")), arrays.pop("best_epoch", None)
            if self.keep == "best":
                if best_epoch is None:
                    raise ValueError("it has no best epoch")
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
        logged = {**(logs or {}), "seconds": time.perf_counter() - self._began}
        for key in [*logged, *(key for key in self.history if key.startswith("val_") and key not in logged)]:
            values = self.history.setdefault(key, [None] * epoch if key.startswith("val_") else [])
            values.append(float(logged[key]) if key in logged else None)  # None: not validated
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
        variables = [*state(self.model), *self.model.optimizer.variables]
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
    rater: str | None = None,
    keep: str = "last",
    callbacks: Sequence[keras.callbacks.Callback] = (),
    verbose: bool = True,
) -> dict[str, list]:
    """`model.fit` over a `datasets.Split`, interruptible: called again it goes on to the same weights.

    Args:
        model: compiled `keras.Model`, as at the start of training.
        train, val: `datasets.Split`; `val=None` to leave validation out.
        epochs: in all, those of an interrupted call included.
        batch_size, seed, augment, rater: of the stream.
        folder: where the checkpoint lies.
        keep: "last", or "best": the model ends with the weights of the epoch with the lowest validation loss.
        callbacks: more Keras callbacks.
        verbose: show a progress bar.

    Returns:
        dict of lists. For each epoch, resumed ones included, what Keras logs (None where it was not validated, see
        `validated_epochs`), and `seconds`: wall time, with validation and with tracing where it was traced; of an epoch
        that was interrupted only its second, whole try counts. Of one value: `nan_in_epoch` where a loss that was not
        finite stopped it, `kept_epoch` under `keep="best"`, both counted from 0; `peak_bytes`, the peak memory of the
        process while it trained (the last process, of a run that was resumed), and `grown_bytes`, how far that is above
        its memory before training, if the system says so.

    Raises:
        ValueError: a checkpoint that is corrupt, of another model, or of more epochs than asked for; `keep="best"`
            without validation.
        ModuleNotFoundError: a TensorBoard callback without TensorBoard.
    """
    if keep not in ("last", "best") or (keep == "best" and val is None):
        raise ValueError(
            f'Expected keep "last", or "best" with a validation split. Received: keep={keep!r}, val={val and val.name}'
        )
    check_callbacks(callbacks)
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
                    train.batches(
                        batch_size, seed=seed, initial_epoch=done, epochs=epochs, augment=augment, rater=rater
                    ),
                    steps_per_epoch=train.steps(batch_size),
                    initial_epoch=done,
                    epochs=epochs,
                    validation_data=None if val is None else _val_batches(val, batch_size),
                    validation_freq=validated_epochs(model, epochs, keep, callbacks),
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


def validated_epochs(model: keras.Model, epochs: int, keep: str, callbacks: Sequence = ()) -> list[int]:
    """The epochs that end with a validation, counted from 1: some twenty of a long training, and the last.

    All, where something depends on them: the weights that are kept (`keep="best"`), the noise that follows (validation
    draws, too), or a callback that monitors one, such as `EarlyStopping`. Members validate with all their passes.
    """
    monitored = any(str(getattr(callback, "monitor", "")).startswith("val_") for callback in callbacks)
    step = 1 if keep == "best" or monitored or noise_states(model) else max(1, epochs // 20)
    return sorted({*range(step, epochs, step), epochs})


def _val_batches(val, batch_size):
    """The stream for the validation loss: of several raters the mean mask.

    Cross-entropy is linear in the target, so this is the mean of the raters' losses, as in training; against their
    majority a network that is too sure would win.
    """
    return val.batches(batch_size, rater="mean" if val.num_raters > 1 else None)
