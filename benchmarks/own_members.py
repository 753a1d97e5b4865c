"""What else members could have of their own: batch norm, a flip or turn in training, a higher rate, a trunk.

Run: `python benchmarks/own_members.py isic2018 [--seeds 0,1] [--runs runs]`, or `lidc [--folds 2,3]`. Networks,
settings, *validation* images and the ways to run it are those of `one_pass.py`; rows go to `results/own_members.csv`.

Five members, on the salient weights of one network: of the trained one, which then trains on for 15 epochs (*after*),
or of one that has had a fifth of its epochs (*early*). The schedules are those of the methods `members` and `branched`.

- *Own batch norm*: each member has its own scales, shifts and running statistics. They train on its part of a batch, or
  on each fifth batch as a whole (*alternating*). In the methods all share the one network's, and none of it trains.
- *Own turn*: member m sees its part of a batch under flip or turn m, and nothing else is augmented; so it does when it
  predicts. In the methods each sees all of them in training.
- *Own weights at three times the rate*, and *two trunks*: two networks of half the epochs, each parted into three.
"""

import dataclasses
import functools
from pathlib import Path

import keras
import numpy as np
from keras import ops
from one_pass import AFTERWARDS, KEPT, Trial, main

from sbn_tf.core.batch import part_bounds
from sbn_tf.core.context import current_sample
from sbn_tf.core.turns import turn, turned_samples
from sbn_tf.experiments import training
from sbn_tf.experiments.branched import stem_epochs

TABLE = Path(__file__).resolve().parents[1] / "results" / "own_members.csv"
NUM_MEMBERS = 5


class OwnNorm(keras.layers.Layer):
    """A batch norm for each member: each trains on what its member sees. Variables are (members, channels)."""

    def __init__(self, momentum, epsilon, **kwargs):
        super().__init__(**kwargs)
        self.momentum, self.epsilon = momentum, epsilon

    def get_config(self):
        """What makes it again."""
        return {**super().get_config(), "momentum": self.momentum, "epsilon": self.epsilon}

    def build(self, input_shape):
        """In the order of a stock batch norm's weights."""
        shape = (NUM_MEMBERS, input_shape[-1])
        # With "turns" a step leaves other members' rows, and Adam's of them, of what is called so as they are.
        self.gamma = self.add_weight(name="gamma_member_offsets", shape=shape, initializer="ones")
        self.beta = self.add_weight(name="beta_member_offsets", shape=shape, initializer="zeros")
        self.moving_mean = self.add_weight(name="moving_mean", shape=shape, initializer="zeros", trainable=False)
        self.moving_variance = self.add_weight(name="moving_variance", shape=shape, initializer="ones", trainable=False)

    def compute_output_shape(self, input_shape):
        """As it came."""
        return input_shape

    def call(self, inputs, training=None, mask=None):
        """By the variables of the member that sees these inputs; at the mean of the weights by the first's."""
        member = ops.cast(0 if current_sample() is None else current_sample(), "int32") % NUM_MEMBERS
        mean, variance = self.moving_mean.value[member], self.moving_variance.value[member]
        if training:
            own = (1 - self.momentum) * ops.one_hot(member, NUM_MEMBERS)[:, None]
            before = mean, variance
            mean, variance = ops.moments(inputs, axes=(0, 1, 2))
            self.moving_mean.assign_add(own * (mean - before[0]))
            self.moving_variance.assign_add(own * (variance - before[1]))
        shift, scale = self.beta.value[member], self.gamma.value[member]
        return ops.batch_normalization(inputs, mean, variance, -1, shift, scale, self.epsilon)


def with_own_norms(network):
    """A copy of a network whose batch norms are the members' own, and equal."""

    def copied(layer):
        if isinstance(layer, keras.layers.BatchNormalization):
            return OwnNorm(layer.momentum, layer.epsilon, name=layer.name)
        return layer.__class__.from_config(layer.get_config())

    copy = keras.models.clone_model(network, clone_function=copied)
    for one, other in zip(network.layers, copy.layers, strict=True):
        weights = one.get_weights()
        other.set_weights([np.tile(w, (NUM_MEMBERS, 1)) for w in weights] if isinstance(other, OwnNorm) else weights)
    return copy


class AdamApart(keras.optimizers.Adam):
    """Adam that moves what members have of their own at `factor` times the rate."""

    def __init__(self, learning_rate, factor):
        super().__init__(learning_rate)
        self.factor = factor

    def update_step(self, gradient, variable, learning_rate):
        """One variable's step."""
        own = "member_offsets" in variable.name
        super().update_step(gradient, variable, self.factor * learning_rate if own else learning_rate)


class OwnMembers(Trial):
    """The rows of one seed and fold."""

    kept = (*KEPT, "member_nll", "mutual_information")

    def run(self):
        """All rows."""
        for name in ("deterministic", "turned", "members", "members_turned", "branched_turned"):
            self.row(name, self.samples, name)
        for share in (0.2, 0.01):
            name, turns = f"early, {share:.0%}", {"r_bayes": share, "estimator": "turns"}
            self.row(name, self.members, r_bayes=share)
            self.row(f"{name}, alternating", self.members, **turns)
            self.row(f"{name}, own batch norm", self.members, r_bayes=share, own_norm=True)
            self.row(f"{name}, own batch norm, alternating", self.members, own_norm=True, **turns)
            given = {"own_norm": True, "turned_too": True}
            self.row(f"{name}, own batch norm, alternating, a flip or turn each", self.members, **given, **turns)
        self.row("early, 20%, own weights at three times the rate", self.members, factor=3.0)
        self.row("early, 20%, two trunks of half the epochs, three members each", self.two_trunks)
        self.row("early, 20%, own turn", self.members, own_turn=True)
        self.row("after, 20%, own turn", self.members, early=False, own_turn=True)

    def members(self, turned_too=False, **given):
        """Samples of members, each of the images as they are or under its flip or turn."""
        model, size = self.trained(**given), self.recipe.batch_size

        def predict(images):
            return np.asarray(model.predict_samples(images, batch_size=size, verbose=0))[..., 0]

        if turned_too or given.get("own_turn"):
            return turned_samples(predict, self.images, NUM_MEMBERS)
        return predict(self.images)

    def two_trunks(self):
        """Samples of six members, three of each of two networks."""
        half = {"epochs": self.recipe.epochs // 2, "num_samples": 3}
        seeds = [training.member_seed(self.about["seed"], trunk) for trunk in range(2)]
        return np.concatenate([self.members(seed=seed, **half) for seed in seeds])

    @functools.lru_cache(maxsize=1)  # noqa: B019 (a process makes few)
    def trained(self, early=True, r_bayes=0.2, own_norm=False, own_turn=False, factor=1.0, seed=None, **changes):
        """Members that part early or are put on the trained network."""
        recipe, seed = dataclasses.replace(self.recipe, **changes), self.about["seed"] if seed is None else seed
        if early:
            stem = stem_epochs(recipe.epochs, recipe.branch_at)
            first, epochs = dataclasses.replace(recipe, epochs=stem, decay="none"), recipe.epochs - stem
            rate = recipe.learning_rate
        else:
            first, epochs, rate = recipe, recipe.bayes_epochs, recipe.bayes_learning_rate
            recipe = dataclasses.replace(recipe, **AFTERWARDS)
        options = {"seed": seed, "network": "unet_small", "runs": self.runs}
        step1 = training.deterministic_run(self.data, first, **options)
        masks = training.masks_run(step1, self.data, first, r_bayes)
        if own_norm:
            step1 = dataclasses.replace(step1, model=with_own_norms(step1.model))
        model = training.untrained_network(step1, masks, self.data, recipe, seed=seed, posterior="members")
        decay = keras.optimizers.schedules.CosineDecay(rate, self.steps * epochs)
        model.compile(AdamApart(decay, factor), "binary_crossentropy")
        rater = recipe.targets if self.data.train.num_raters > 1 else None
        stream = {"augment": None if own_turn else recipe.augment, "rater": rater, "seed": seed, "epochs": epochs}
        batches = self.data.train.batches(recipe.batch_size, **stream)
        if own_turn:
            batches = (tuple(map(each_its_turn, batch[:2])) for batch in batches)
        model.fit(batches, steps_per_epoch=self.steps, epochs=epochs, shuffle=False, verbose=0)
        return model


def each_its_turn(images):
    """Part m of the batch under flip or turn m."""
    images, bounds = np.asarray(images), part_bounds(len(images), NUM_MEMBERS)
    return np.concatenate([turn(images[start:stop], m) for m, (start, stop) in enumerate(bounds)])


if __name__ == "__main__":
    main(__doc__, OwnMembers, TABLE)
