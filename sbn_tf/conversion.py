"""Conversion of trained Keras models: chosen weights become Gaussian, everything else is copied.

What comes out is a plain Keras model with masked layers in it; `sbn_tf.partial_bayes` gives it the ELBO.
"""

import contextlib

import keras
import numpy as np

from sbn_tf.layers import MaskedGaussian, masked_layers, partial_class
from sbn_tf.saliency import Masks, named_weights

__all__ = ["convert"]


def convert(model, masks, layer_options: dict, seed: int | None = None):
    """Copy of a built Functional or Sequential model whose masked weights are Gaussian.

    Args:
        model: built Functional or Sequential `keras.Model`, nested models and shared layers included.
        masks: `sbn_tf.saliency.Masks` (or a dict key -> boolean array) of this model.
        layer_options: keyword arguments of every masked layer (`initial_scale`, `prior`, `kl_weight`, ...).
        seed: int; each masked layer derives its own noise seed from it.

    Raises:
        ValueError: another kind of model, masks of another model, masked weights in a layer without a twin, or a model
            that is Bayesian already.
    """
    if not isinstance(model, keras.Model) or not model.built:
        raise ValueError(f"Expected a built keras.Model (call it once on data). Received: {model!r}")
    if hasattr(model, "predict_uncertainty") or masked_layers(model):
        raise ValueError(
            f"Expected a deterministic network. Received: '{model.name}', which has Bayesian entries already. Convert "
            "the network that it was made of, or change a layer's entries by layer.set_mask."
        )
    if not (isinstance(model, keras.Sequential) or hasattr(model, "_functional") or _is_functional(model)):
        raise ValueError(
            f"Expected a Functional or Sequential model. Received: the subclassed {type(model).__name__} "
            f"'{model.name}'. Convert the Functional part of it, or build it from sbn_tf.layers by hand."
        )
    masks = masks if isinstance(masks, Masks) else Masks(masks)
    masks.check(model)
    wanted, names = {}, {}
    for weight in named_weights(model).values():
        if weight.key in masks and masks[weight.key].any():
            wanted.setdefault(id(weight.layer), {})[weight.name] = np.asarray(masks[weight.key])
            names[id(weight.layer)] = f"{weight.key} ({type(weight.layer).__name__})"
    twins = {}

    def twin(layer):
        chosen = wanted.get(id(layer))
        cls = partial_class(layer)
        if chosen is None or cls is None or set(chosen) - set(cls.posterior_weights):
            return layer.__class__.from_config(layer.get_config())
        position = list(wanted).index(id(layer))
        layer_seed = _layer_seed(seed, position)
        twins[id(layer)] = layer
        try:
            return cls.from_config({**layer.get_config(), **layer_options, "mask": chosen, "seed": layer_seed})
        except TypeError as error:  # Keras wraps the layer's own message in its whole config
            if isinstance(error.__context__, ValueError):
                raise error.__context__ from None
            raise

    with _uncompiled(model):
        copy = keras.models.clone_model(model, clone_function=twin, recursive=True)
    stuck = [names[i] for i in wanted if i not in twins]
    if stuck:
        raise ValueError(
            f"No masked layer stands for: {', '.join(stuck[:5])}{' ...' if len(stuck) > 5 else ''}. Leave these "
            f"weights out of the selection: saliency(..., exclude={stuck[0].split(' ')[0].rsplit('/', 1)[0] + '/*'!r})."
        )
    _copy_variables(model, copy)
    return copy


@contextlib.contextmanager
def _uncompiled(model):
    """Within it no part of `model` counts as compiled: Keras would compile the copy too, with slots of its own."""
    compiled = [m for m in (model, *model._flatten_layers(include_self=False)) if getattr(m, "compiled", False)]
    for part in compiled:
        part.compiled = False
    try:
        yield
    finally:
        for part in compiled:
            part.compiled = True


def _layer_seed(seed, position):
    return None if seed is None else int(np.random.default_rng([seed, position]).integers(2**31))


def _is_functional(model) -> bool:
    return type(model).__name__ == "Functional" or hasattr(model, "_nodes_by_depth")


def _own_variables(layer) -> list:
    """A layer's own variables as its stock class has them: without a posterior's."""
    if isinstance(layer, MaskedGaussian):
        return layer._stock_variables()
    return layer._trainable_variables + layer._non_trainable_variables


def _copy_variables(old_model, new_model):
    """Every variable's value, and whether it trains, from one model to its copy."""
    old_layers, new_layers = ([m, *m._flatten_layers(include_self=False)] for m in (old_model, new_model))
    for old, new in zip(old_layers, new_layers, strict=True):
        for a, b in zip(_own_variables(old), _own_variables(new), strict=True):
            b.assign(a)
            if not a.trainable and b.trainable:
                b.trainable = False
