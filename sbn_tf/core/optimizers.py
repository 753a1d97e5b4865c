"""Optimisers for posteriors: scales apart from locs, and members that train in turn."""

from __future__ import annotations

import keras
from keras import ops

from sbn_tf.core.keras_internals import moving_averages, optimized_variables, spare_weight_decay, with_moving_averages

__all__ = ["LocScaleOptimizer", "is_scale", "others_stay", "spare_scales"]


def is_scale(variable) -> bool:
    """Whether a variable holds untransformed scales."""
    return variable.name.endswith("untransformed_scale")


def spare_scales(optimizer: keras.optimizers.Optimizer, variables: list) -> None:
    """Exclude scales from weight decay, which would pull each towards softplus(0) = 0.69."""
    optimizer = getattr(optimizer, "inner_optimizer", optimizer)
    optimizer = getattr(optimizer, "scale_optimizer", optimizer)
    if getattr(optimizer, "weight_decay", None) and not optimizer.built:
        spare_weight_decay(optimizer, [v for v in variables if is_scale(v)])


def _averages(optimizer):
    """The moving averages of both optimisers; of one that keeps none copies of its variables, which swap unchanged."""
    # Not `optimizers`, as a MultiOptimizer has them: Keras's schedules would set the scales' learning rate, too.
    found = {}
    for one, variables in optimizer.shares():
        if one.use_ema:
            found.update(zip(map(id, variables), moving_averages(one), strict=True))
    if not found:
        raise AttributeError("Expected an optimiser with use_ema=True among the two. Received: none.")
    variables = optimized_variables(optimizer)
    return [found[id(v)] if id(v) in found else keras.Variable(v, trainable=False, dtype=v.dtype) for v in variables]


@with_moving_averages(_averages)
@keras.saving.register_keras_serializable(package="sbn_tf")
class LocScaleOptimizer(keras.optimizers.Optimizer):
    """One optimiser for the locs (and everything else), another for the untransformed scales.

    Clipping, weight decay, moving averages and gradient accumulation are settings of the two, not of this one: each
    `global_clipnorm` is of its own variables' gradients. Loss scaling goes around it, as Keras does by itself under
    `mixed_float16`: `LossScaleOptimizer(LocScaleOptimizer(...))`.

    Args:
        loc_optimizer: Keras optimiser or its name; `learning_rate` and Keras's schedules act on it.
        scale_optimizer: Keras optimiser of the scales; default `Adam(0.01)`.

    Raises:
        ValueError: one optimiser given for both, or one that scales the loss, which it would not see.
    """

    def __init__(self, loc_optimizer="adam", scale_optimizer=None, name="loc_scale"):
        super().__init__(learning_rate=0.0, name=name)
        if loc_optimizer is scale_optimizer and not isinstance(loc_optimizer, str):
            raise ValueError(
                "Expected two optimisers. Received: one for both. Make one each: they hold their own state."
            )
        self.loc_optimizer = keras.optimizers.get(loc_optimizer)
        self.scale_optimizer = keras.optimizers.get(scale_optimizer or keras.optimizers.Adam(0.01))
        for one in (self.loc_optimizer, self.scale_optimizer):
            if isinstance(one, keras.optimizers.LossScaleOptimizer) or one.loss_scale_factor is not None:
                raise ValueError(
                    "Expected loss scaling around the two: LossScaleOptimizer(LocScaleOptimizer(...)). Received: "
                    f"{type(one).__name__} with loss_scale_factor={one.loss_scale_factor} inside."
                )

    def build(self, variables):
        """Make each optimiser's slots for its own variables."""
        if self.built:
            return
        super().build(variables)
        for optimizer, chosen in self.shares():
            optimizer.build(chosen)

    def apply(self, grads, trainable_variables=None):
        """Apply each gradient by the optimiser of its variable."""
        variables = self._trainable_variables if trainable_variables is None else list(trainable_variables)
        self.build(variables)
        gradients = {id(v): g for v, g in zip(variables, grads, strict=True)}
        for optimizer, chosen in self.shares(variables):
            optimizer.apply([gradients[id(v)] for v in chosen], chosen)
        self._iterations.assign_add(1)

    def finalize_variable_values(self, var_list):
        """At the end of `fit`: moving averages, where an optimiser keeps them, become the weights."""
        for optimizer, chosen in self.shares(var_list):
            optimizer.finalize_variable_values(chosen)

    def save_own_variables(self, store):
        """The step count; each of the two saves its own."""
        store["iterations"] = self._iterations.numpy()

    def load_own_variables(self, store):
        """The step count; each of the two loads its own."""
        self._iterations.assign(store["iterations"])

    def get_config(self):
        """Both optimisers' configs."""
        both = (keras.optimizers.serialize(o) for o in (self.loc_optimizer, self.scale_optimizer))
        return {"name": self.name, **dict(zip(("loc_optimizer", "scale_optimizer"), both, strict=True))}

    @classmethod
    def from_config(cls, config, custom_objects=None):
        """Optimiser from its config."""
        return cls(**config)

    @property
    def variables(self):
        """State of both optimisers."""
        return [*self._variables, *self.loc_optimizer.variables, *self.scale_optimizer.variables]

    @property
    def learning_rate(self):
        """The locs' learning rate."""
        return self.loc_optimizer.learning_rate

    @learning_rate.setter
    def learning_rate(self, value):
        self.loc_optimizer.learning_rate = value

    def shares(self, variables=None) -> list[tuple]:
        """(optimiser, its variables) of the two that have any; `variables`: among those, None: all it was built for."""
        variables = optimized_variables(self) if variables is None else variables
        scales = [v for v in variables if is_scale(v)]
        locs = [v for v in variables if not is_scale(v)]
        return [(o, vs) for o, vs in ((self.loc_optimizer, locs), (self.scale_optimizer, scales)) if vs]


def others_stay(before: list, after: list, names: list[str], turn) -> list:
    """Values after a step in which one member trained: the rows of the others, and of their slots, are as before.

    Args:
        before, after: values of variables, before and after the step.
        names: their paths; an optimiser's slot has the path of its variable in its own.
        turn: number of the draw that trained, an int or integer tensor: member `turn` modulo M.

    Returns:
        One value for each variable; `after` itself where it is not of members, (M, k).
    """
    found = []
    for old, new, name in zip(before, after, names, strict=True):
        if "member_offsets" not in name or len(new.shape) != 2:
            found.append(new)
            continue
        num_members = new.shape[0]
        trained = ops.arange(num_members, dtype="int32")[:, None] == ops.cast(turn, "int32") % num_members
        found.append(ops.where(trained, new, old))
    return found
