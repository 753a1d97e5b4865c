"""Options of `to_partial_bayes`: whose they are, and masks that they do not allow."""

from __future__ import annotations

from collections.abc import Mapping

import keras
import numpy as np

from sbn_tf.core.checks import check_fraction
from sbn_tf.core.posterior import OPTION_NAMES
from sbn_tf.core.weights import biases_before_batch_norm

__all__ = ["START_OPTIONS", "check_masks_or_share", "refuse_idle_biases", "sorted_options"]

START_OPTIONS = {"initial_scale", "relative", "untransformed_scale_initializer"}
_OF_THE_MODEL = ("beta", "terms_per_example", "estimator", "batch_norm", "probabilities", "from_logits", "class_axis")


def check_masks_or_share(masks: Mapping | None, r_bayes: float | None) -> None:
    """Refuse a choice of weights that is none, two at once, or no share: before any pass over the data.

    Raises:
        ValueError: neither or both of masks and r_bayes, or a share outside [0, 1].
    """
    if (masks is None) == (r_bayes is None):
        raise ValueError(f"Expected masks, or r_bayes and data. Received: masks={masks!r}, r_bayes={r_bayes!r}")
    if r_bayes is not None:
        check_fraction("r_bayes", r_bayes)


def sorted_options(options: Mapping, model: keras.Model) -> tuple[dict, dict]:
    """Options of the layers' posteriors, and those of the Bayesian copy of `model`, with its name and dtype.

    Scales start relative to the weights, where nothing is said of them.

    Raises:
        ValueError: an option that is of neither.
    """
    of_layers = {key: value for key, value in options.items() if key in OPTION_NAMES}
    of_model = {key: value for key, value in options.items() if key in _OF_THE_MODEL}
    if unknown := sorted(set(options) - set(of_layers) - set(of_model)):
        known = sorted({*OPTION_NAMES, *_OF_THE_MODEL} - {"kl_weight", "num_members"})
        raise ValueError(f"Expected options among {known}. Received: {unknown[0]}={options[unknown[0]]!r}")
    if not START_OPTIONS & set(options):
        of_layers["relative"] = True
    if "kl_reduction" in options:  # the layers reduce, the model divides
        of_model["kl_reduction"] = options["kl_reduction"]
    return of_layers, of_model | {"name": f"partial_{model.name}", "dtype": model.dtype_policy}


def refuse_idle_biases(model: keras.Model, masks: Mapping, trains_batch_norm: bool) -> None:
    """Refuse Bayesian biases before a batch norm in training mode: without effect there, their scales only grow."""
    if not trains_batch_norm:
        return
    masked = {key for key, mask in dict(masks).items() if np.any(mask)}
    biases = [key for key in biases_before_batch_norm(model) if key in masked]
    if biases:
        raise ValueError(
            f"Bayesian biases right before a batch norm in training mode have no effect there: {biases[:5]}. "
            'Leave them out of the saliency pass (exclude=...), or use batch_norm="frozen".'
        )
