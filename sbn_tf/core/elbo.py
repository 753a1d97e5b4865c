"""The weight of the KL in the loss, and a watch on the scales that it trains."""

from __future__ import annotations

import contextlib
import math
import warnings
from collections.abc import Iterator

import keras
import numpy as np
from keras import ops

from sbn_tf.core.losses import terms_of_outputs
from sbn_tf.core.optimizers import is_scale
from sbn_tf.core.sampled import check_choice, check_count

__all__ = ["KLWeight", "watched_scales"]


class KLWeight(keras.layers.Layer):
    """By how much the KL of all Bayesian entries is multiplied in a loss that is a mean.

    It is `beta / (num_train * terms)` of the summed KL: the ELBO's share of one term. With `kl_reduction="mean"`, the
    paper's, it is beta alone.

    Args:
        num_train: training examples, >= 1.
        beta: factor of the KL, >= 0.
        kl_reduction: "sum" or "mean" over the entries of each weight.
        terms_per_example: terms of one example that the loss averages over; None: read from the loss.

    Attributes:
        weight: variable that all masked layers read.
    """

    def __init__(self, num_train: int, beta: float, kl_reduction: str, terms_per_example: int | None):
        super().__init__(name="kl_weight", dtype="float32", autocast=False)
        check_count("num_train", num_train)
        if terms_per_example is not None:
            check_count("terms_per_example", terms_per_example)
        check_choice("kl_reduction", kl_reduction, ("sum", "mean"))
        self.num_train, self.kl_reduction = int(num_train), kl_reduction
        self.terms_per_example = self.terms = terms_per_example
        self.weight = self.add_weight(name="kl_weight", shape=(), initializer="zeros", trainable=False)
        self.set_beta(beta)
        self.built = True

    def set_beta(self, value: float) -> None:
        """Set beta; it acts at once, also on a compiled model."""
        if not (np.isfinite(value) and value >= 0):
            raise ValueError(f"Expected a finite beta >= 0. Received: beta={value}")
        self.beta = float(value)
        self.apply()

    def apply(self) -> None:
        """Write the weight into the variable."""
        divisor = 1.0 if self.kl_reduction == "mean" else self.num_train * (self.terms or 1)
        self.weight.assign(self.beta / divisor)

    def settle(self, loss, network: keras.Model) -> None:
        """Read from the compiled loss how many terms of one example it averages over.

        Raises:
            ValueError: an unknown loss, and no `terms_per_example`.
        """
        if loss is None or self.kl_reduction == "mean":
            return
        terms = terms_of_outputs(loss, network)
        if terms is None and self.terms_per_example is None:
            raise ValueError(
                "How many terms of one example does this loss average over? Pass terms_per_example= to "
                "to_partial_bayes: 1 for a loss per image, pixels for a mean over pixels, labels for one over labels."
            )
        if terms is not None and self.terms_per_example not in (None, terms):
            warnings.warn(
                f"terms_per_example={self.terms_per_example}, but this loss averages over {terms} terms an example: "
                f"the KL is {terms / self.terms_per_example:g} times the ELBO's.",
                stacklevel=3,
            )
        self.terms = self.terms_per_example or terms
        self.apply()

    def get_config(self) -> dict:
        """The arguments."""
        return {name: getattr(self, name) for name in ("num_train", "beta", "kl_reduction", "terms_per_example")}

    def save_own_variables(self, store):
        """The loss's terms; the weight follows from them and from beta."""
        store["terms"] = np.int64(self.terms or 0)

    def load_own_variables(self, store):
        """The loss's terms, where they are stored."""
        if "terms" in set(store.keys()):
            self.terms = int(np.asarray(store["terms"])) or None
        self.apply()


@contextlib.contextmanager
def watched_scales(model: keras.Model) -> Iterator[None]:
    """Warn if the scales have not moved after 50 steps or more: then their initial value decides the result."""
    if not any(is_scale(variable) for variable in model.trainable_variables):
        yield
        return

    def steps():
        return int(ops.convert_to_numpy(model.optimizer.iterations)) if model.optimizer else 0

    before, first = model.scales(), steps()
    yield
    after, taken = model.scales(), steps() - first
    change = float(np.median(np.abs(np.log(after / before)))) if len(before) else math.inf
    if taken >= 50 and change < 1e-3:
        warnings.warn(
            f"The posterior scales did not learn: their median change is {100 * change:.3f} % after {taken} steps. "
            "Their initial value decides the result. LocScaleOptimizer(optimizer, Adam(0.01)) lets them learn.",
            stacklevel=4,
        )
