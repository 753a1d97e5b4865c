"""The weight of the KL in the loss, and a watch on the scales that it trains."""

from __future__ import annotations

import contextlib
import math
import warnings
from collections.abc import Iterator

import keras
import numpy as np
from keras import ops

from sbn_tf.core.checks import check_choice, check_count, check_number
from sbn_tf.core.losses import LossTerms
from sbn_tf.core.optimizers import is_scale

__all__ = ["KLWeight", "watched_scales"]


class KLWeight(keras.layers.Layer):
    """By how much the KL of all Bayesian entries is multiplied in a loss that is a mean.

    It is `beta / (num_train * terms)` of the summed KL: the ELBO's share of one term. With `kl_reduction="mean"`, the
    paper's, it is beta alone. Where the data decide how many terms the loss averages over, the terms of all batches
    that have been trained on are counted, and `terms` is their mean.

    Args:
        num_train: training examples, >= 1.
        beta: factor of the KL, >= 0.
        kl_reduction: "sum" or "mean" over the entries of each weight.
        terms_per_example: terms of one example that the loss averages over; None: read from the loss and the data.

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
        self.terms_per_example = self._terms = terms_per_example
        self._loss_terms: LossTerms | None = None
        self.weight, self._per_example, self._seen = (
            self.add_weight(name=name, shape=shape, initializer="zeros", trainable=False, aggregation="mean")
            for name, shape in (("kl_weight", ()), ("kl_per_example", ()), ("terms_and_examples", (2,)))
        )
        self.set_beta(beta)
        self.built = True

    def set_beta(self, value: float) -> None:
        """Set beta; it acts at once, also on a compiled model."""
        check_number("beta", value, least=0)
        self.beta = float(value)
        self.apply()

    @property
    def terms(self) -> float | None:
        """Terms of one example that the KL is divided by: those given, counted, or of the loss; None: not known yet."""
        terms, examples = map(float, ops.unstack(ops.convert_to_tensor(self._seen), 2))
        return terms / examples if self.terms_per_example is None and examples else self._terms

    def apply(self) -> None:
        """Write the weight into the variables."""
        per_example = self.beta / (1.0 if self.kl_reduction == "mean" else self.num_train)
        self._per_example.assign(per_example)
        self.weight.assign(per_example / (1.0 if self.kl_reduction == "mean" else self.terms or 1))

    def follow(self, y, outputs, sample_weight, training: bool) -> None:
        """Count the terms that the loss of this batch averages over, where the data decide; the weight follows.

        Evaluation counts nothing, and takes its own batch's terms where no batch has been trained on.

        Args:
            y, outputs, sample_weight: of the batch, as `keras.Model.compute_loss` gets them.
            training: whether it is a training step.
        """
        terms = self._loss_terms and self._loss_terms.of_batch(y, outputs, sample_weight)
        if terms is None:
            return
        examples = ops.shape(keras.tree.flatten(outputs)[0])[0]
        batch, seen = ops.stack([terms, ops.cast(examples, "float32")]), ops.convert_to_tensor(self._seen)
        seen = seen + batch if training else ops.where(seen[1] > 0, seen, batch)
        if training:
            self._seen.assign(seen)
        self.weight.assign(self._per_example * seen[1] / ops.maximum(seen[0], 1.0))

    def settle(self, loss, network: keras.Model) -> None:
        """Read from the compiled loss how many terms of one example it averages over.

        Raises:
            ValueError: an unknown loss, and no `terms_per_example`.
        """
        self._loss_terms = None
        if loss is None or self.kl_reduction == "mean":
            return
        terms = LossTerms(loss, network)
        counted = terms.is_open and keras.backend.backend() == "tensorflow"  # JAX reads the KL before the batch's terms
        if terms.known is None and not counted and self.terms_per_example is None:
            raise ValueError(
                "How many terms of one example does this loss average over? Pass terms_per_example= to "
                "to_partial_bayes: 1 for a loss per image, pixels for a mean over pixels, labels for one over labels."
            )
        if terms.known is not None and not terms.by_data and self.terms_per_example not in (None, terms.known):
            warnings.warn(
                f"terms_per_example={self.terms_per_example}, but this loss averages over {terms.known} terms an "
                f"example: the KL is {terms.known / self.terms_per_example:g} times the ELBO's.",
                stacklevel=3,
            )
        self._terms = self.terms_per_example or terms.known
        self._loss_terms = terms if self.terms_per_example is None else None
        self._seen.assign(ops.zeros((2,)))  # of another loss
        self.apply()

    def get_config(self) -> dict:
        """The arguments."""
        return {name: getattr(self, name) for name in ("num_train", "beta", "kl_reduction", "terms_per_example")}

    def save_own_variables(self, store):
        """The loss's terms, and those counted; the weight follows from them and from beta."""
        store["terms"], store["seen"] = np.int64(self._terms or 0), self._seen

    def load_own_variables(self, store):
        """The loss's terms, where they are stored."""
        if "terms" in set(store.keys()):
            self._terms = int(np.asarray(store["terms"])) or None
        if "seen" in set(store.keys()):
            self._seen.assign(store["seen"])
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
