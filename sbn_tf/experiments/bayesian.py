"""Networks of step 3 before training: which weights are random, and where locs and scales start."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import keras
import numpy as np
from keras import ops

from sbn_tf.core.posterior import LEAST_LOC, softplus_inverse
from sbn_tf.datasets.base import Data
from sbn_tf.experiments.recipes import Recipe
from sbn_tf.layers import masked_layers
from sbn_tf.partial_bayes import PartialBayes, to_partial_bayes
from sbn_tf.saliency import Masks, named_weights

PAPERS_SCALE = 0.049  # softplus(-3): the median of the paper's initial scales


def bayesian_network(
    step1: keras.Model, masks: Masks, data: Data, recipe: Recipe, seed: int, posterior: str = "gaussian"
) -> PartialBayes:
    """The sparse Bayesian network of a recipe, from a trained one.

    `posterior` is "gaussian", "members" or "mixture". Scales of Gaussians that are not absolute: `start_scales`.
    """
    gaussian = posterior == "gaussian"
    rho = keras.initializers.RandomNormal(-3.0, 1.0, seed=seed) if recipe.initial_scale is None and gaussian else None
    absolute = 0.01 if gaussian else PAPERS_SCALE
    return to_partial_bayes(
        step1,
        masks,
        num_train=data.train.num_examples,
        num_samples=recipe.num_samples,
        beta=recipe.beta_start,
        kl_reduction=recipe.kl_reduction,
        estimator=recipe.estimator,
        posterior=posterior,
        initial_scale=absolute if recipe.initial_scale is None else recipe.initial_scale,
        relative=False if gaussian else {"relative": "entry", "layer": True}.get(recipe.scale_start, False),
        untransformed_scale_initializer=rho,
        prior={"class_name": "Normal", "config": {"loc": 0.0, "scale": float(recipe.prior_scale)}},
        prior_at_loc=recipe.prior_at == "weight",
        batch_norm=recipe.batch_norm,
        seed=seed,
    )


def posteriors(network: keras.Model) -> Iterator[tuple]:
    """(key of a weight, its `Posterior`, its loc) of every weight that has one."""
    keys = {id(weight.variable): key for key, weight in named_weights(network).items()}
    for layer in masked_layers(network):
        for name, posterior in layer.posteriors.items():
            loc = layer.loc(name)
            yield keys[id(loc)], posterior, loc


def set_scales(model: keras.Model, scales: Mapping[str, np.ndarray]) -> None:
    """Give the Bayesian entries of a `PartialBayes` these standard deviations: weight's key -> (k,)."""
    for key, posterior, _ in posteriors(model.network):
        posterior.untransformed_scale.assign(softplus_inverse(scales[key]).astype("float32"))


def start_scales(
    model: PartialBayes, masks: Masks, recipe: Recipe, fisher: Mapping[str, np.ndarray] | None, num_train: int
) -> None:
    """Start each scale at `initial_scale` times |loc|, or times the width that the curvature gives.

    `fisher` is the Fisher information of every weight; None: the scales are relative to the locs.
    """
    scales = {}
    for key, _, loc in posteriors(model.network):
        if fisher is None:
            width = np.maximum(np.abs(ops.convert_to_numpy(loc))[masks[key]], LEAST_LOC)
        else:
            width = (num_train * fisher[key][masks[key]] + 1.0) ** -0.5
        scales[key] = recipe.initial_scale * width
    set_scales(model, scales)


class Held(keras.callbacks.Callback):
    """Puts back, after each batch, every loc that is not to be trained: exact, as each entry has its own slots.

    `masks` says which entries of locs are trained; {}: none.
    """

    def __init__(self, model, masks):
        super().__init__()
        own = {id(v) for _, posterior, _ in posteriors(model.network) for v in posterior.trainable_variables}
        self.held = [
            (weight.variable, ops.convert_to_tensor(ops.copy(weight.variable.value)), masks.get(key))
            for key, weight in named_weights(model.network).items()
            if weight.variable.trainable and id(weight.variable) not in own
        ]

    def on_train_batch_end(self, batch, logs=None):
        """Put the locs back."""
        for variable, start, mask in self.held:
            variable.assign(start if mask is None else ops.where(mask, variable, start))


def draw_locs(network: keras.Model, seed: int) -> None:
    """Start every Bayesian loc at a draw from N(0, 1)."""
    random = np.random.default_rng(seed)
    for layer in masked_layers(network):
        for name in layer.posteriors:
            loc = layer.loc(name)
            loc.assign(np.where(layer.mask(name), random.standard_normal(loc.shape), ops.convert_to_numpy(loc)))
