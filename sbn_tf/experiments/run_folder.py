"""One run: settings name a folder; a finished run is loaded from it, an interrupted one goes on."""

from __future__ import annotations

import dataclasses
import os
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import keras
import numpy as np

from sbn_tf.core.checks import check_seed
from sbn_tf.core.files import check_archive, remove_leftovers, replacing, write_atomically
from sbn_tf.datasets.base import Data
from sbn_tf.experiments.fitting import fit
from sbn_tf.experiments.folders import (
    check_method,
    read_arrays,
    read_json,
    run_folder,
    write_checked,
    write_json,
)
from sbn_tf.experiments.recipes import Recipe
from sbn_tf.saliency import Masks


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
        """Wall time of all epochs; None if that of an epoch is unknown."""
        seconds = self.history.get("seconds", [])
        return float(sum(seconds)) if len(seconds) == len(self.history.get("loss", [])) > 0 else None

    @property
    def peak_bytes(self) -> int | None:
        """Peak memory of the process that trained it; None if the system does not say."""
        return self.history.get("peak_bytes", [None])[0]

    @property
    def grown_bytes(self) -> int | None:
        """How far the peak was above the memory that the process had when training began; None if unknown."""
        return self.history.get("grown_bytes", [None])[0]


def data_settings(data: Data, limit: int | None) -> dict:
    """What identifies the data in a run's settings."""
    sizes = [part.num_examples for part in (data.train, data.val, data.test)]
    return {"input_shape": list(data.input_shape), "sizes": sizes, "limit": limit, "data": data.digest()}


class RunFolder:
    """The folder of one training, found by its settings.

    Args:
        data, recipe: of the training. The recipe gives batch size, augmentation and `keep`.
        method: first part of the folder's name.
        seed: of noise and stream.
        settings: what else shapes the result: numbers and strings.
        masks: which weights are Bayesian; they are written beside the model.
        ready: `ready(model)` compiles a model that was loaded; None: it is loaded compiled. What of its batch norm is
            trained is not in the file.
        ends: ends of the cycles, in epochs, whose weights are kept.
        runs, limit, verbose, callbacks: as in `training.deterministic_run`.
    """

    def __init__(
        self,
        data: Data,
        recipe: Recipe,
        method: str,
        seed: int,
        settings: dict,
        *,
        masks: Masks | None = None,
        ready: Callable[[keras.Model], None] | None = None,
        ends: Sequence[int] | None = None,
        runs: str | os.PathLike | None = None,
        limit: int | None = None,
        verbose: bool = True,
        callbacks: Sequence[keras.callbacks.Callback] = (),
    ):
        self.data, self.recipe, self.seed, self.verbose = data, recipe, check_seed(seed), verbose
        self.masks, self.ready, self.ends, self.callbacks = masks, ready, ends, callbacks
        self.settings = {**settings, "seed": self.seed, "keep": recipe.keep, **data_settings(data, limit)}
        self.path = run_folder(runs, data.card.name, check_method(method), self.seed, self.settings)

    def trained(
        self, make: Callable[[], keras.Model], epochs: int, callbacks: Callable[[keras.Model], Sequence] = lambda _: ()
    ) -> Run:
        """The finished run, after training if need be.

        The model is always read from the file, also after training: the noise that follows is the same either way.

        Args:
            make: gives the compiled model as it is before the first epoch. Called after Keras's seed is set.
            epochs: of the training, in all.
            callbacks: gives Keras callbacks that are part of the training, for the model.
        """
        if (self.path / "model.keras").exists():
            remove_leftovers(self.path)
            (self.path / "checkpoint.npz").unlink(missing_ok=True)  # of a process that was killed as it finished
            return self.read(warn=True)
        keras.utils.set_random_seed(self.seed)
        model = make()
        if self.masks is not None:
            self.path.mkdir(parents=True, exist_ok=True)
            self.masks.save(self.path / "masks.npz")
        cycles = [_Snapshots(self)] if self.ends is not None and len(self.ends) > 1 else []
        history = fit(
            model,
            self.data.train,
            self.data.val,
            epochs=epochs,
            batch_size=self.recipe.batch_size,
            seed=self.seed,
            folder=self.path,
            augment=self.recipe.augment,
            rater=self.recipe.targets if self.data.train.num_raters > 1 else None,
            keep=self.recipe.keep,
            callbacks=[*callbacks(model), *cycles, *self.callbacks],
            verbose=self.verbose,
        )
        self._write(model, history)
        return self.read()

    def _write(self, model, history):
        written = {"settings": self.settings, "recipe": dataclasses.asdict(self.recipe)}
        if self.masks is not None:
            written["r_bayes"] = self.masks.r_bayes  # the settings have the masks' digest
        write_json(self.path / "config.json", written)
        write_checked(self.path / "history.json", history)
        with replacing(self.path / "model.keras") as temporary:
            model.save(temporary)
        (self.path / "checkpoint.npz").unlink(missing_ok=True)

    def read(self, *, warn: bool = False) -> Run:
        """The run as its files give it.

        Args:
            warn: warn if the training diverged.

        Raises:
            ValueError: a file is missing or damaged.
        """
        try:
            check_archive(self.path / "model.keras")
            history = read_json(self.path / "history.json")
            model = keras.models.load_model(self.path / "model.keras", compile=self.ready is None)
            if self.ready is not None:
                self.ready(model)
            snapshots = None if self.ends is None else self._read_snapshots(model, history)
        except (OSError, ValueError) as error:
            reason = str(error).splitlines()[0]
            raise ValueError(
                f"Expected a whole run in {self.path}. Received: {reason}. Delete it: it will be made again."
            ) from error
        if warn and "nan_in_epoch" in history:
            warnings.warn(
                f"This run diverged in epoch {history['nan_in_epoch'][0] + 1}: its weights are those of the epoch "
                f"before. To train again, lower the learning rate, or delete {self.path}.",
                stacklevel=4,
            )
        return Run(model, history, self.path, self.masks, snapshots)

    def snapshot_path(self, cycle: int) -> Path:
        """Where the weights at the end of a cycle lie."""
        return self.path / f"snapshot{cycle + 1}.npz"

    def _read_snapshots(self, model, history):
        """Weights at the end of each cycle; a run that diverged may lack the last cycles."""
        last = model.get_weights()
        if len(self.ends) == 1 or "loss" not in history:
            return [last]
        snapshots = []
        for cycle in range(sum(end <= len(history["loss"]) for end in self.ends)):
            path = self.snapshot_path(cycle)
            try:
                arrays = read_arrays(path)
            except ValueError:
                raise ValueError(f"{path.name} is missing or cut short") from None
            weights = [arrays[f"w{i}"] for i in range(len(arrays)) if f"w{i}" in arrays]
            if [w.shape for w in weights] != [w.shape for w in last]:
                raise ValueError(f"{path.name} has weights of another network")
            snapshots.append(weights)
        return snapshots or [last]


class _Snapshots(keras.callbacks.Callback):
    """Writes the weights at the end of each cycle."""

    def __init__(self, folder: RunFolder):
        super().__init__()
        self.folder = folder

    def on_epoch_end(self, epoch, logs=None):
        if epoch + 1 in self.folder.ends and not self.model.stop_training:
            arrays = {f"w{i}": w for i, w in enumerate(self.model.get_weights())}
            path = self.folder.snapshot_path(self.folder.ends.index(epoch + 1))
            write_atomically(path, lambda file: np.savez(file, **arrays))
