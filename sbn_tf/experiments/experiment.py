"""The experiment: what all rows of one table share, loaded from plain numbers and names."""

from __future__ import annotations

import dataclasses
import json
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import keras
import numpy as np

from sbn_tf import datasets
from sbn_tf.core.checks import check_fraction
from sbn_tf.datasets.folder import Folder
from sbn_tf.experiments import recipes, scoring
from sbn_tf.experiments.folders import read_json

__all__ = ["experiment", "recipe_of"]

TRAINING = "training.json"  # in the folder of `sbn-tf train`: what it was asked for
SHIFTS = {"noise": 2.0, "blur": 1.5, "contrast": 0.5}  # kind -> severity, of `scoring.shifted`


@dataclass(frozen=True, eq=False)
class Experiment:
    """What all rows of one table share.

    Args:
        network: a name of `networks.NETWORKS`.
        r_bayes: fraction of the eligible weights that is Bayesian, where a method takes one, 0..1.
        seed: of initial weights, shuffling and noise.
        runs: folder of all runs; None: `runs/` of the repository or the working directory.
        limit, options, normalisation: that the data were loaded with.
        threshold: where probabilities are cut into decisions, 0..1, or "validation": chosen there, see
            `scoring.select_threshold`.
        num_resamples: of the bootstrap.
        shifts: kind -> severity of the shifted copies of the images; {} for none.
        swapped: name of a dataset of the same task and channels, whose test images stand in for images from another
            source; they are reported as a shift. None: none.
        data_root: folder of the real data, for `swapped`; None: the variable SBN_TF_DATA, or data/.
        split: what is scored: "test", or "val", on which choices may be made.
        num_samples: posterior samples of a prediction, where a method samples; None: the recipe's.
    """

    data: datasets.base.Data
    recipe: recipes.Recipe
    network: str
    r_bayes: float = 0.01
    seed: int = 0
    runs: str | os.PathLike | None = None
    limit: int | None = None
    options: dict = field(default_factory=dict)
    normalisation: str = "train"
    threshold: float | str = 0.5
    num_resamples: int = 1000
    shifts: dict = field(default_factory=lambda: dict(SHIFTS))
    swapped: str | None = None
    data_root: str | os.PathLike | None = None
    split: str = "test"
    num_samples: int | None = None
    verbose: bool = True

    def __post_init__(self):
        check_fraction("r_bayes", self.r_bayes)  # before anything long
        chosen = self.threshold == "validation"
        if not chosen and not (isinstance(self.threshold, int | float) and 0 < self.threshold < 1):
            raise ValueError(
                f'Expected threshold between 0 and 1, or "validation". Received: threshold={self.threshold!r}'
            )
        if self.swapped is not None:
            mine, other = self.data.card, datasets.card(self.swapped)
            if (other.task, other.channels) != (mine.task, mine.channels):
                raise ValueError(
                    f"Expected swapped, a dataset of {mine.task} with {mine.channels} channels. "
                    f"Received: {self.swapped!r}, of {other.task} with {other.channels}"
                )
        if self.split not in ("test", "val"):
            raise ValueError(f'Expected split "test" or "val". Received: split={self.split!r}')
        if self.num_resamples < 1:
            raise ValueError(f"Expected num_resamples >= 1. Received: num_resamples={self.num_resamples!r}")

    @property
    def task(self) -> str:
        """The dataset's task."""
        return self.data.card.task

    @property
    def scored(self) -> datasets.base.Split:
        """The split that is scored."""
        return getattr(self.data, self.split)

    def prevalence(self) -> np.ndarray:
        """Training frequency of 1, of each label, class or pixel."""
        train = self.data.train
        return scoring.prevalence(self.task, train.targets, train.rater_valid)


def experiment(
    dataset: str | os.PathLike,
    recipe: str = "quick",
    *,
    network: str | None = None,
    epochs: int | None = None,
    bayes_epochs: int | None = None,
    num_samples: int | None = None,
    keep: str | None = None,
    changes: str | dict = "",
    limit: int | None = None,
    size: int | None = None,
    normalisation: str | None = None,
    data_root: str | os.PathLike | None = None,
    options: dict | None = None,
    **shared,
) -> Experiment:
    """Load a dataset and fix everything that the rows of a table share, from plain numbers and names.

    Args:
        dataset: a name of `datasets.names()`, or a folder of images.
        recipe: a name of `recipes.RECIPES`.
        network: a name of `networks.NETWORKS`; None: a small one for "quick", the paper's own for its recipes.
        epochs, bayes_epochs, num_samples, keep: changes of the recipe; None: as it is.
        changes: of any other field of the recipe: a dict, or a text as `recipes.parse_changes` reads it.
        limit: at most so many images a split; None: all.
        size: image side in pixels; None: the dataset's default.
        normalisation: "train" or "paper"; None: the paper's constants for its recipes, where it has some.
        data_root: folder of the real data; None: the variable SBN_TF_DATA, or data/.
        options: the dataset's own options, such as `{"fold": 2}`.
        shared: other fields of `Experiment`.

    Raises:
        ValueError: an unknown name, or a number out of its range.
        FileNotFoundError: data that are not there; the message says where to get them.
    """
    card = datasets.card(dataset)
    normalisation = normalisation or recipes.normalisation_for(recipe, card)
    settings = recipe_of(
        dataset, recipe, epochs=epochs, bayes_epochs=bayes_epochs, num_samples=num_samples, keep=keep, changes=changes
    )
    data = datasets.load(
        dataset, root=data_root, size=size, limit=limit, normalisation=normalisation, **(options or {})
    )
    return Experiment(
        data,
        settings,
        network or recipes.network_for(recipe, card),
        limit=limit,
        options=options or {},
        normalisation=normalisation,
        data_root=data_root,
        **shared,
    )


def trained_in(out: Path) -> tuple[Experiment, dict]:
    """The experiment of `sbn-tf train`, and what it was asked for: what `training.json` in its folder says."""
    try:
        asked = read_json(out / TRAINING)
        begun = {key: asked[key] for key in ("images", "backend", "dtype", "fields")}
    except (KeyError, ValueError):
        raise ValueError(f"Expected {out / TRAINING} as `sbn-tf train` wrote it. Received: another file.") from None
    made = of_training(out, asked)
    if begun != (now := identity(made)):
        raise ValueError(f"Expected what {out} was trained on, {begun}. Received: {now}.")
    return made, asked


def identity(made: Experiment) -> dict[str, Any]:
    """What tells the runs of a trained folder apart, beside what `sbn-tf train` was asked for."""
    policy = keras.config.dtype_policy().name
    fields = json.loads(json.dumps(dataclasses.asdict(made.recipe)))  # a recipe of this name may change
    return {"images": made.data.digest(), "backend": keras.backend.backend(), "dtype": policy, "fields": fields}


def of_training(out: Path, asked: dict) -> Experiment:
    """The experiment of `sbn-tf train`, whose runs lie below `out`."""
    folder = Folder(asked["folder"], asked["threshold"], asked["skip_broken"])
    chosen = {
        key: asked[key] for key in ("network", "epochs", "bayes_epochs", "size", "limit", "r_bayes", "seed", "changes")
    }
    options = {"fit": asked["fit"]} | ({"window": asked["window"]} if asked["window"] else {})
    return experiment(folder, asked["recipe"], **chosen, options=options, runs=out / "runs", shifts={})


def recipe_of(
    dataset: str | os.PathLike, recipe: str = "quick", *, changes: str | dict = "", **others
) -> recipes.Recipe:
    """The recipe that `experiment` would use with these arguments; arguments that are no field of it are ignored."""
    changes = recipes.parse_changes(changes) if isinstance(changes, str) else dict(changes)
    named = {key: value for key, value in others.items() if key in _NAMED and value is not None}
    if twice := sorted(key for key in named if key in changes and changes[key] != named[key]):
        raise ValueError(f"Expected each field once. Received: {', '.join(twice)} in changes, and as a parameter.")
    named = {key: value for key, value in named.items() if key not in changes}
    return dataclasses.replace(recipes.recipe_for(recipe, datasets.card(dataset)), **changes, **named)


_NAMED = ("epochs", "bayes_epochs", "num_samples", "keep")  # parameters of their own, in notebooks and shells
