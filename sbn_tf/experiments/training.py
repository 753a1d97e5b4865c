"""The three steps as resumable runs.

A run lives in `runs/<dataset>/<method>/seed<k>/<settings>/`, where `<settings>` is a short hash of everything that
shapes the result: runs with other settings never mix, a finished one is loaded, an interrupted one goes on.
"""

from __future__ import annotations

import dataclasses
import math
import os
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import keras
import numpy as np
from keras import ops

from sbn_tf.core.checks import check_count, check_seed
from sbn_tf.core.files import write_atomically
from sbn_tf.core.losses import loss_terms
from sbn_tf.core.start import is_far_worse
from sbn_tf.datasets.base import EXCLUSIVE, Data
from sbn_tf.experiments import networks
from sbn_tf.experiments.bayesian import Held, bayesian_network, draw_locs, start_scales
from sbn_tf.experiments.dropout import with_dropout
from sbn_tf.experiments.fitting import state
from sbn_tf.experiments.folders import digest, read_arrays
from sbn_tf.experiments.recipes import Recipe, loss_for, optimizer_for
from sbn_tf.experiments.run_folder import Run, RunFolder, data_settings
from sbn_tf.partial_bayes import BetaSchedule, LocScaleOptimizer, PartialBayes, settle_batch_norm
from sbn_tf.saliency import Masks, biases_before_batch_norm, one_per_channel, saliency, top_k

__all__ = ["choose_masks", "deterministic_run", "masks_run", "scores_run", "untrained_network"]

_OF_TRAINING = (
    *("batch_size", "optimizer", "learning_rate", "momentum", "weight_decay", "decay", "ema"),
    *("class_weights", "targets"),
)
_OF_SCALES = ("scale_optimizer", "scale_learning_rate", "num_samples", "initial_scale", "scale_start", "beta_start")
_OF_MASKS = ("scope", "fan_out", "eligible", "branch_at")  # the digest of the masks, and step 1, say what they did


def deterministic_run(
    data: Data,
    recipe: Recipe,
    *,
    seed: int = 0,
    network: str | None = None,
    runs: str | os.PathLike | None = None,
    limit: int | None = None,
    verbose: bool = True,
    callbacks: Sequence[keras.callbacks.Callback] = (),
) -> Run:
    """Step 1: train the deterministic network, or load it where it is finished.

    Args:
        data: `datasets.Data`.
        recipe: a `Recipe`.
        seed: of initial weights and stream.
        network: a name of `networks.NETWORKS`; None: the dataset's.
        runs: folder of all runs; None: `runs/` of the repository or the working directory.
        limit: named in the settings only (the data were loaded with it).
        verbose: show a progress bar.
        callbacks: your own for `fit`. They are no part of the settings that name the run, so let them watch: where the
            run is finished none is called, and after an interruption they see the epochs that are left.

    Raises:
        ValueError: a seed that is not an integer >= 0, a network that is unknown or of another task, or files of an
            earlier run that are corrupt.
    """
    return _Members(data, recipe, network, runs=runs, limit=limit, verbose=verbose, callbacks=callbacks).run(
        check_seed(seed)
    )


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
    callbacks: Sequence[keras.callbacks.Callback] = (),
) -> list[Run]:
    """The members of a deep ensemble: step 1 from other initial weights and another order of the images.

    Member m is, bit for bit, the `deterministic_run` of `member_seed(seed, m)`, and lies in that run's folder: the
    first is step 1 itself, each is resumed or loaded by itself. The train step is traced once for all of them.

    Args:
        data, recipe, network, runs, limit, verbose, callbacks: as in `deterministic_run`.
        seed: of the ensemble.
        num_members: networks, 1 to 1000.

    Raises:
        ValueError: a number of members out of range, or what `deterministic_run` refuses.

    Reference: Lakshminarayanan, Pritzel and Blundell 2017, "Simple and Scalable Predictive Uncertainty Estimation using
    Deep Ensembles", Algorithm 1 (without adversarial training).
    """
    check_count("num_members", num_members, 1000)
    seeds = [member_seed(check_seed(seed), member) for member in range(num_members)]
    members = _Members(data, recipe, network, runs=runs, limit=limit, verbose=verbose, callbacks=callbacks)
    return [members.run(one) for one in seeds]


def member_seed(seed: int, member: int) -> int:
    """Seed of an ensemble's member: `seed` itself for the first, then `1000 * (seed + 1) + member`.

    So ensembles of seeds below 1000 share no member, and each shares its first with the single network of its seed.
    """
    return seed if member == 0 else 1000 * (seed + 1) + member


class _Members:
    """Deterministic runs of several seeds, trained by one model, so that its train step is traced once."""

    def __init__(self, data, recipe, network, **options):
        self.data, self.recipe, self.options = data, recipe, options
        self.network = network or data.card.network
        # The networks' own activation is the sigmoid of labels and masks, which needs no setting.
        self.head = {"activation": "softmax"} if data.card.task in EXCLUSIVE else {}
        self.model, self.slots = None, []

    def run(self, seed):
        recipe = self.recipe
        settings = {f: getattr(recipe, f) for f in ("epochs", "augment", *_OF_TRAINING)}
        settings |= {"network": self.network, **self.head}
        folder = RunFolder(self.data, recipe, "deterministic", seed, settings, **self.options)
        return folder.trained(lambda: self._fresh(seed), recipe.epochs)

    def _fresh(self, seed):
        """The one model with the initial weights of a seed and an optimiser as at the start."""
        data, recipe = self.data, self.recipe
        fresh = networks.build(self.network, data.input_shape, data.num_outputs, seed=seed, **self.head)
        if self.model is not None:
            for variable, value in zip(state(self.model), state(fresh), strict=True):
                variable.assign(value)
            for variable, value in zip(self.model.optimizer.variables, self.slots, strict=True):
                variable.assign(value)
            return self.model
        if len(fresh.output_shape) != len(data.train.targets.shape):
            raise ValueError(
                f"Expected a network for {data.card.task} ({data.card.name}), as {data.card.network!r}. "
                f"Received: network={self.network!r}, which gives {fresh.output_shape}"
            )
        fresh.compile(_optimizer(recipe, recipe.epochs * data.train.steps(recipe.batch_size)), loss_for(recipe, data))
        fresh.optimizer.build(fresh.trainable_variables)
        self.model, self.slots = fresh, [np.array(ops.convert_to_numpy(v)) for v in fresh.optimizer.variables]
        return fresh


def masks_run(step1: Run, data: Data, recipe: Recipe, r_bayes: float, *, seed: int = 0, verbose: bool = True) -> Masks:
    """Step 2: masks of the top `r_bayes` of the weights that may be Bayesian, by the recipe's score and scope.

    `seed`: as in `scores_run`.
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
    settings |= {"seed": check_seed(seed)} if recipe.score == "random" else {}
    path = step1.folder / f"saliency_{recipe.score}_{digest({**settings, **data_settings(data, None)})}.npz"
    if path.exists():
        scores = read_arrays(path)
    else:
        stream, loss = data.train.batches(recipe.batch_size, seed=0), loss_for(recipe, data)
        scores = saliency(step1.model, stream, loss, score=recipe.score, seed=seed, verbose=verbose)
        write_atomically(path, lambda file: np.savez(file, **scores))  # type: ignore[arg-type]
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


def fisher_run(step1: Run, data: Data, recipe: Recipe, *, verbose: bool = True) -> dict[str, np.ndarray]:
    """Fisher information of every weight that may be Bayesian: exact if the recipe's score is "per_example".

    Other scores are no Fisher information; then it is approximated from the score "fisher".
    """
    exact = recipe if recipe.score == "per_example" else dataclasses.replace(recipe, score="fisher")
    return empirical_fisher(
        scores_run(step1, data, exact, verbose=verbose),
        exact.score,
        terms=loss_terms(loss_for(recipe, data), step1.model.output_shape),  # type: ignore[arg-type]
        num_examples=data.train.num_examples,
        batch_size=recipe.batch_size,
    )


def partial_run(
    step1: Run,
    masks: Masks,
    data: Data,
    recipe: Recipe,
    *,
    seed: int = 0,
    method: str | None = None,
    locs: str = "trained",
    posterior: str = "gaussian",
    runs: str | os.PathLike | None = None,
    limit: int | None = None,
    verbose: bool = True,
    callbacks: Sequence[keras.callbacks.Callback] = (),
) -> Run:
    """Step 3: train the sparse Bayesian network from step 1's weights, or load it where it is finished.

    What comes back is read from the file, also after training: the noise that follows is the same either way.

    Args:
        step1: the trained network.
        masks: which of its weights are Bayesian.
        data, recipe, runs, limit, verbose, callbacks: as in `deterministic_run`.
        seed: of noise and stream.
        method: name of the folder; None: `partial_r` and the share of weights that is Bayesian.
        locs: where the Bayesian locs start: "trained", or "normal": drawn from N(0, 1), as the paper's code does for
            its fully Bayesian network. All other weights start at step 1's.
        posterior: "gaussian"; "members", `recipe.num_samples` values of each entry; or "mixture", as many Gaussians.

    Raises:
        ValueError: a seed, method or `locs` that is none, masks of another network, or files of an earlier run that are
            corrupt.
    """
    seed = check_seed(seed)
    if locs not in ("trained", "normal"):
        raise ValueError(f'Expected locs "trained" or "normal". Received: locs={locs!r}')
    if posterior == "gaussian" and recipe.scale_start == "layer":
        raise ValueError('Expected scale_start "absolute", "relative" or "fisher" of gaussian. Received: "layer"')
    if locs == "normal" and recipe.scale_start == "fisher":
        raise ValueError('Expected scales that do not start by the curvature of other locs. Received: "fisher"')
    if posterior != "gaussian" and recipe.scale_start == "fisher":
        raise ValueError(
            f'Expected scale_start "absolute", "relative" or "layer" of {posterior}. Received: scale_start="fisher"'
        )
    settings = {f: v for f, v in dataclasses.asdict(recipe).items() if f not in _OF_MASKS}
    settings |= {"step1": step1.folder.name, "masks": masks.digest(), "locs": locs, "posterior": posterior}
    method = f"partial_r{masks.r_bayes:.2g}" if method is None else method
    options: dict[str, Any] = {"runs": runs, "limit": limit, "verbose": verbose, "callbacks": callbacks}
    folder = RunFolder(data, recipe, method, seed, settings, masks=masks, **options)

    def make():
        start = {"seed": seed, "locs": locs, "posterior": posterior, "verbose": verbose}
        return _compiled_with_scales(untrained_network(step1, masks, data, recipe, **start), data, recipe)

    def schedules(model):
        schedule = BetaSchedule(recipe.beta_start, recipe.beta_stop, recipe.bayes_epochs)
        if recipe.trains == "all":
            return [schedule]
        return [schedule, Held(model, masks if recipe.trains == "bayesian" else {})]

    run = folder.trained(make, recipe.bayes_epochs, schedules)
    _warn_if_far_worse(run, step1)
    return run


def _warn_if_far_worse(run, step1):
    """Warn where step 3 ends with a far higher NLL of the training images than step 1 did, by the epochs kept."""

    def kept(history, key):
        return history[key][history.get("kept_epoch", [-1])[0]] if history.get(key) else math.nan

    before, after = kept(step1.history, "loss"), kept(run.history, "nll")
    if not math.isnan(before + after) and is_far_worse(after, before):
        warnings.warn(
            f"Step 3 ends with NLL {after:.3g} on the training images; step 1 ended with {before:.3g}. Its predictions "
            "may be ruined: look at the metrics, and lower initial_scale or bayes_learning_rate.",
            stacklevel=3,
        )


def untrained_network(
    step1: Run,
    masks: Masks,
    data: Data,
    recipe: Recipe,
    *,
    seed: int = 0,
    locs: str = "trained",
    posterior: str = "gaussian",
    verbose: bool = True,
) -> PartialBayes:
    """The network with which `partial_run` starts, of the same arguments."""
    model = bayesian_network(step1.model, masks, data, recipe, seed, posterior)
    if locs == "normal":
        draw_locs(model.network, seed)
    if posterior == "gaussian" and recipe.scale_start != "absolute":
        fisher = fisher_run(step1, data, recipe, verbose=verbose) if recipe.scale_start == "fisher" else None
        start_scales(model, masks, recipe, fisher, data.train.num_examples)
    return model


def _compiled_with_scales(model, data, recipe):
    """Compile a model for step 3: one optimiser for the locs, one for the scales."""
    steps = recipe.bayes_epochs * data.train.steps(recipe.batch_size)
    momenta = {"momentum": recipe.momentum, "ema": recipe.ema}
    scales = optimizer_for(recipe.scale_optimizer, recipe.scale_learning_rate, **momenta)
    model.compile(LocScaleOptimizer(_optimizer(_gentle(recipe), steps), scales), loss_for(recipe, data))
    return model


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
    callbacks: Sequence[keras.callbacks.Callback] = (),
) -> Run:
    """Train on from step 1's weights without a posterior, as step 3 would, or load it where it is finished.

    Learning rate, optimiser, batch norm, batches, loss and augmentation are step 3's. `partial_run` with empty masks is
    the same training but for rounding (with `batch_norm="frozen"`; else its passes each move the running statistics),
    at the price of `num_samples` equal passes where the estimator is "all"; it gives back a `PartialBayes`.

    Args:
        step1: the trained network; it is not changed.
        data, recipe, runs, limit, verbose, callbacks: as in `deterministic_run`.
        method: name of the folder, such as "deterministic_longer", "mc_dropout" or "snapshot".
        seed: of stream and dropout.
        epochs: None for the recipe's `bayes_epochs`.
        cycles: 1: the learning rate decays as the recipe says. More: it falls from its start to 0 by a cosine in each
            cycle, and the weights at the end of each are kept; lengths differ by one epoch at most. Step 1's own
            weights are none of them.
        dropout: 0, or the rate of `dropout.with_dropout`.

    Returns:
        A `Run` whose model is a plain `keras.Model`, compiled, its optimiser as at the start; `snapshots`: the weights
        at the end of each cycle, the model's own last. Of a run that diverged only whole cycles, or the weights that
        were kept where there is none.

    Raises:
        ValueError: a setting out of range, `keep="best"` with more than one cycle, or files of an earlier run that are
            corrupt.

    Reference: Huang et al. 2017, "Snapshot Ensembles: Train 1, Get M for Free", section 3 (there from random weights).
    """
    seed = check_seed(seed)
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
    settings = {f: getattr(gentle, f) for f in ("augment", "batch_norm", *_OF_TRAINING)}
    settings |= {"step1": step1.folder.name, "epochs": epochs, "cycles": cycles, "dropout": dropout}
    ends = [epochs * (cycle + 1) // cycles for cycle in range(cycles)]  # in epochs
    steps = data.train.steps(recipe.batch_size)
    cycle_steps = [steps * int(length) for length in np.diff([0, *ends])] if cycles > 1 else None

    def ready(model):
        settle_batch_norm(model, recipe.batch_norm)
        model.compile(_optimizer(gentle, epochs * steps, cycle_steps), loss_for(recipe, data))
        model.optimizer.build(model.trainable_variables)

    def make():
        model = with_dropout(step1.model, dropout, seed=seed)
        ready(model)
        return model

    options: dict[str, Any] = {"runs": runs, "limit": limit, "verbose": verbose, "callbacks": callbacks}
    folder = RunFolder(data, recipe, method, seed, settings, ready=ready, ends=ends, **options)
    return folder.trained(make, epochs)


def _optimizer(recipe, steps, cycle_steps=None):
    return optimizer_for(
        recipe.optimizer,
        recipe.learning_rate,
        momentum=recipe.momentum,
        weight_decay=recipe.weight_decay,
        decay=recipe.decay,
        ema=recipe.ema,
        steps=steps,
        cycle_steps=cycle_steps,
    )
