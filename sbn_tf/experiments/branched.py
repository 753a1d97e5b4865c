"""Train any compiled model and part it early into members: an ensemble of some weights for one training's cost."""

from __future__ import annotations

import math
from typing import Any

import keras

from sbn_tf.core.checks import check_count, check_fraction, check_number
from sbn_tf.partial_bayes import PartialBayes, to_partial_bayes

__all__ = ["fit_branched"]


def stem_epochs(epochs: int, branch_at: float) -> int:
    """Epochs before the members of a network part: one at least, and one fewer than all."""
    return max(1, min(round(branch_at * epochs), epochs - 1))


def fit_branched(
    model: keras.Model,
    x: Any,
    y: Any = None,
    *,
    epochs: int,
    branch_at: float = 0.2,
    r_bayes: float = 0.2,
    num_members: int = 5,
    num_train: int | None = None,
    apart: float = 1.0,
    batch_size: int | None = None,
    seed: int | None = None,
    verbose: Any = "auto",
    **options: Any,
) -> PartialBayes:
    """Train a network, part it early into members that differ in its salient weights, and train these together.

    One network trains for the first `branch_at` of the epochs. The weights of the highest Fisher score become
    `num_members` values each; a member then sees its part of each batch, and the learning rate falls to 0 by a cosine.
    All of it takes the operations of `model.fit` for `epochs`, and one pass over the data for the scores.

    Args:
        model: built and compiled, not trained yet, its learning rate a number. It is trained for the first epochs.
        x, y: as `model.fit` takes them: arrays, a finite `tf.data.Dataset` or another iterable of batches.
        epochs: of both parts together. >= 2.
        branch_at: share of the epochs after which the members part, 0..1; either part has one epoch at least.
        r_bayes: share of the eligible weights that the members have each for themselves, 0..1.
        num_train: number of training examples; None: counted, which a `PyDataset` does not allow.
        num_members: >= 2. A batch has one example for each at least.
        apart: standard deviation of the members' starts, in sizes of the weight (or of its layer's weights). > 0.
        batch_size, verbose: as of `model.fit`; seed: of the members' start.
        options: other arguments of `model.fit`, for both parts, such as `validation_data` and `callbacks`.

    Returns:
        The members as one `PartialBayes`, compiled and trained, with the `History` of its `fit` as `history`.

    Raises:
        ValueError: a model that is not compiled or whose learning rate is a schedule, or a number out of its range.

    Reference: `nbs/09_what_works.ipynb`, which measured when, where and how far members should part.
    """
    if (isinstance(x, keras.utils.PyDataset) and num_train is None) or "initial_epoch" in options:
        raise ValueError("Expected num_train= for a PyDataset, and no initial_epoch. Received: none, or initial_epoch")
    check_number("apart", apart, above=0.0)
    rate = _checked_rate(model, epochs, num_members, branch_at=branch_at, r_bayes=r_bayes)
    stem = stem_epochs(epochs, branch_at)
    both = {"batch_size": batch_size, "verbose": verbose, **options}
    model.fit(x, y, epochs=stem, **both)
    start: dict[str, Any] = {"estimator": "split", "initial_scale": apart, "relative": True, "seed": seed}
    start |= {"r_bayes": r_bayes, "num_train": num_train, "data": x if y is None else (x, y), "verbose": bool(verbose)}
    members = to_partial_bayes(model, posterior="members", num_samples=num_members, **start)
    members.compile()
    members.start.unguard()
    decay = _cosine(rate, stem, epochs)
    callbacks = [decay, *keras.tree.flatten(both.pop("callbacks", None) or [])]
    members.fit(x, y, initial_epoch=stem, epochs=epochs, callbacks=callbacks, **both)
    return members


def _cosine(rate, start, stop):
    """The rate of each epoch, from `rate` at the first to 0 after the last."""
    return keras.callbacks.LearningRateScheduler(
        lambda epoch, _: 0.5 * rate * (1 + math.cos(math.pi * (epoch - start) / (stop - start)))
    )


def _checked_rate(model, epochs, num_members, **fractions) -> float:
    """The constant learning rate of a compiled model, once all is checked."""
    for name, count in (("epochs", epochs), ("num_members", num_members)):
        check_count(name, count)
        if count < 2:
            raise ValueError(f"Expected {name} >= 2. Received: {name}={count}")
    for name, value in fractions.items():
        check_fraction(name, value)
    if not (isinstance(model, keras.Model) and model.built and model.compiled):
        raise ValueError(f"Expected a keras.Model that is built and compiled. Received: {model!r}")
    optimizer = getattr(model.optimizer, "inner_optimizer", model.optimizer)  # of one that scales the loss
    rate = optimizer.get_config().get("learning_rate")
    if not isinstance(rate, float | int):
        raise ValueError(
            "Expected an optimiser with a number as its learning rate: it is constant first, then falls by a cosine. "
            f"Received: {type(model.optimizer).__name__} with {rate!r}"
        )
    return float(rate)
