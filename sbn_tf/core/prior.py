"""Priors of a weight as plain descriptions, and the KL divergence of a normal distribution from them."""

from __future__ import annotations

import keras
import numpy as np
from keras import ops

if keras.backend.backend() == "tensorflow":
    import tensorflow_probability as tfp

    tfd = tfp.distributions

__all__ = ["STANDARD_NORMAL", "kl_normal", "make_normal", "make_prior", "prior_config"]

STANDARD_NORMAL = {"class_name": "Normal", "config": {"loc": 0.0, "scale": 1.0}}


def kl_normal(loc, scale, prior: dict = STANDARD_NORMAL):
    """KL divergence in nats of N(loc, scale^2) from the prior, entry by entry.

    TensorFlow Probability computes it. On another Keras backend the closed form of two normal distributions does.

    Args:
        loc, scale: tensors of one shape, such as (k,).
        prior: a description as `prior_config` returns it.
    """
    if keras.backend.backend() == "tensorflow":
        return tfd.kl_divergence(tfd.Normal(loc, scale), make_prior(prior, loc.dtype))
    ratio = scale / prior["config"]["scale"]
    shift = (loc - prior["config"]["loc"]) / prior["config"]["scale"]
    return 0.5 * (shift**2 + ratio**2 - 1.0) - ops.log(ratio)


def prior_config(prior) -> dict:
    """Plain description of a prior, which a layer's config can store.

    Args:
        prior: None for N(0, 1); a scalar `tfd` distribution whose parameters are numbers; or such a description.

    Raises:
        ValueError: a prior of another kind, or one with no registered or no finite KL from a normal distribution.
    """
    if prior is None:
        prior = STANDARD_NORMAL
    prior = _described(prior)
    if prior != STANDARD_NORMAL:
        _check_kl(prior)
    return {"class_name": prior["class_name"], "config": dict(prior["config"])}


def make_prior(prior: dict, dtype="float32"):
    """The `tfd` distribution that `prior_config` describes."""
    _check_tfp("a prior as a distribution")
    dtype = keras.backend.standardize_dtype(dtype)
    config = {k: v if isinstance(v, bool) else np.asarray(v, dtype) for k, v in prior["config"].items()}
    return getattr(tfd, prior["class_name"])(**config)


def make_normal(loc, scale):
    """`tfd.Normal` of these tensors."""
    _check_tfp("a posterior as a distribution")
    return tfd.Normal(loc, scale)


def _check_tfp(what: str) -> None:
    """Refuse a request for a TFP distribution on a Keras backend for which TFP makes none."""
    if keras.backend.backend() != "tensorflow":
        raise ValueError(
            f"Expected Keras on TensorFlow, for which TFP makes distributions, to read {what}. Received: "
            f"KERAS_BACKEND={keras.backend.backend()}. There use mask(name), scale(name) and kl_divergence()."
        )


def _described(prior) -> dict:
    if isinstance(prior, dict):
        if set(prior) != {"class_name", "config"}:
            raise ValueError(f"Expected a prior as {STANDARD_NORMAL}. Received: prior={prior}")
        return prior
    if not hasattr(prior, "parameters"):
        raise ValueError(
            "Expected prior to be None or a scalar tfd distribution such as tfd.Normal(0., 0.5). "
            f"Received: prior={prior!r}"
        )
    parameters = {k: v for k, v in prior.parameters.items() if k not in ("name", "validate_args")}
    try:
        config = {k: v if isinstance(v, bool) else float(v) for k, v in parameters.items() if v is not None}
    except (TypeError, ValueError):
        raise ValueError(f"Expected a prior with scalar parameters. Received: {prior}") from None
    return {"class_name": type(prior).__name__.lstrip("_"), "config": config}


def _check_kl(prior):
    on_tensorflow = keras.backend.backend() == "tensorflow"
    try:
        if not on_tensorflow and prior["class_name"] != "Normal":
            raise AttributeError(prior["class_name"])
        nats = float(kl_normal(np.zeros(1, "float32"), np.ones(1, "float32"), prior)[0])
    except (NotImplementedError, AttributeError):
        raise ValueError(
            "Expected a prior with a KL from tfd.Normal registered in TFP: tfd.Normal(loc, scale). "
            f"Received: {prior['class_name']}"
        ) from None
    if not np.isfinite(nats):
        raise ValueError(f"Expected a prior with a finite loc and a scale > 0. Received: {prior}")
