"""What a method will take, before anything is run: operations and memory, counted from traced steps."""

from __future__ import annotations

import functools
from dataclasses import dataclass

import keras
import numpy as np

from sbn_tf import cost as costs
from sbn_tf.datasets.base import EXCLUSIVE, Card, Data
from sbn_tf.experiments import networks
from sbn_tf.experiments.recipes import Recipe, optimizer_for
from sbn_tf.partial_bayes import LocScaleOptimizer, to_partial_bayes
from sbn_tf.saliency import Masks, biases_before_batch_norm, eligible_weights


@dataclass(frozen=True)
class Estimate:
    """What a method will take.

    Args:
        trainings: name -> operations of each training, validation included, and of each pass over the data that is
            not a prediction. Methods of one dataset, recipe and seed that have a name in common share that training:
            it runs once.
        predict_flops: operations of predicting one image with all samples.
        num_bytes: memory of the largest training: weights, gradients, optimiser, and every layer's output of a batch.
    """

    trainings: dict[str, float]
    predict_flops: float
    num_bytes: float


@dataclass(frozen=True)
class Sizes:
    """What an estimate needs to know of data that are not loaded."""

    card: Card
    input_shape: tuple[int, int, int]
    num_outputs: int
    num_train: int
    num_val: int


@dataclass(frozen=True)
class Parts:
    """Operations of the parts that methods are made of; those of trainings include validation.

    Args:
        recipe: of the trainings.
        first: step 1.
        longer: as many epochs as step 3 has, without a posterior.
        bayesian: step 3.
        from_nothing: the epochs of steps 1 and 3 of a network whose weights are all Bayesian, on whole batches.
        saliency: one pass over the training images.
        validated: one pass over the validation images.
        one_pass: one pass for one image.
        num_weights, num_outputs: of the network, and of all its layers for one image.
    """

    recipe: Recipe
    first: float
    longer: float
    bayesian: float
    from_nothing: float
    saliency: float
    validated: float
    one_pass: float
    num_weights: int
    num_outputs: int

    def num_bytes(self, *, scales: bool = False, passes: int = 1) -> float:
        """Bytes of a training, with scales or without, with so many passes of a batch at once."""
        return 4.0 * (self.num_weights * (5 if scales else 3) + passes * self.recipe.batch_size * self.num_outputs)


def parts_of(recipe: Recipe, data: Data | Sizes, network: str | None = None) -> Parts:
    """Trace the steps of a network; each is traced once in a process. No image is read."""
    if isinstance(data, Data):
        train, val = data.train.num_examples, data.val.num_examples
    else:
        train, val = data.num_train, data.num_val
    softmax = data.card.task in EXCLUSIVE
    traced = _traced(network or data.card.network, tuple(data.input_shape), data.num_outputs, softmax, recipe)
    step, bayesian, whole, saliency, one_pass, num_weights, num_outputs = traced
    validated = one_pass * val
    return Parts(
        recipe,
        first=recipe.epochs * (step * train + validated),
        longer=recipe.bayes_epochs * (step * train + validated),
        bayesian=recipe.bayes_epochs * (bayesian * train + validated),
        from_nothing=(recipe.epochs + recipe.bayes_epochs) * (whole * train + validated),
        saliency=saliency * train,
        validated=validated,
        one_pass=one_pass,
        num_weights=num_weights,
        num_outputs=num_outputs,
    )


@functools.cache
def _traced(name, input_shape, num_outputs, softmax, recipe):
    """For one image: operations of a step, of a step of step 3, of the saliency pass, of a pass; and sizes."""
    head = {"activation": "softmax"} if softmax else {}
    network = networks.build(name, input_shape, num_outputs, seed=0, **head)
    network.compile(_optimizer(recipe), "binary_crossentropy")
    masks = Masks({key: np.ones(one.variable.shape, bool) for key, one in eligible_weights(network).items()})
    options = {"num_samples": recipe.num_samples, "estimator": recipe.estimator}
    model = to_partial_bayes(network, masks, num_train=1, verbose=False, **options)

    def scales_optimizer():
        return optimizer_for(recipe.scale_optimizer, 0.01, momentum=recipe.momentum)

    model.compile(LocScaleOptimizer(_optimizer(recipe), scales_optimizer()), "binary_crossentropy")
    size, idle = recipe.batch_size, biases_before_batch_norm(network)
    busy = Masks({key: mask for key, mask in masks.items() if key not in idle})
    options |= {"estimator": "all", "batch_norm": "train"}
    whole = to_partial_bayes(network, busy, num_train=1, verbose=False, **options)
    whole.compile(LocScaleOptimizer(_optimizer(recipe), scales_optimizer()), "binary_crossentropy")
    return (
        float(costs.training_flops(network, size)),
        float(costs.training_flops(model, size)),
        float(costs.training_flops(whole, size)),
        float(costs.saliency_flops(network, keras.losses.BinaryCrossentropy(), size)),
        float(costs.prediction_flops(network, size)),
        network.count_params(),
        sum(int(np.prod(layer.output.shape[1:])) for layer in network.layers),
    )


def _optimizer(recipe):
    options = {"momentum": recipe.momentum, "weight_decay": recipe.weight_decay, "decay": recipe.decay}
    return optimizer_for(recipe.optimizer, 0.01, **options)
