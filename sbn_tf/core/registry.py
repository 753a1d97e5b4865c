"""Which masked class stands for which stock class."""

from __future__ import annotations

import inspect

import keras

__all__ = ["partial_class", "register", "register_named"]

_PARTIAL: dict[type, type] = {}  # stock or masked class: the masked class that stands for it


def register(cls: type) -> type:
    """Class decorator: conversion takes this masked class for its stock class, which need not be one of Keras.

    Args:
        cls: derived from `sbn_tf.layers.MaskedGaussian` and then from the stock class, with the names of its
            `posterior_weights`. To be saved in a file it has to be registered with Keras as well, as every class of
            one's own.

    Raises:
        ValueError: a class that is not derived so, or one that names no weight; a stock class of one's own whose `call`
            takes more than `inputs`; a stock class for which another one stands.
    """
    stock = getattr(cls, "stock_class", None)
    if not isinstance(cls, type) or not (stock and issubclass(stock, keras.layers.Layer)):
        raise ValueError(
            "Expected a class Mine(MaskedGaussian, TheStockLayer) with posterior_weights, the names of its weights. "
            f"Received: {cls!r}"
        )
    taken = list(inspect.signature(stock.call).parameters)[1:]
    if len(taken) != 1 and not stock.__module__.startswith("keras."):  # of Keras's, those for quantized training
        raise ValueError(
            f"Expected a stock layer with call(self, inputs). Received: {stock.__name__}.call with {taken}. It needs "
            "no masked class: conversion wraps it, and hands every argument on."
        )
    known = _PARTIAL.get(stock, cls)
    if (known.__module__, known.__qualname__) != (cls.__module__, cls.__qualname__):  # the same: a cell that ran twice
        raise ValueError(
            f"Expected a stock class without a masked one. Received: {stock.__name__}, which has {known!r}."
        )
    _PARTIAL[stock] = _PARTIAL[cls] = cls
    return cls


def register_named(cls: type) -> type:
    """`register` a class of the name of its stock layer, here and with Keras, and write its docstring."""
    names = ", ".join(cls.posterior_weights)  # type: ignore[attr-defined]
    cls.__doc__ = (
        f"`keras.layers.{cls.__name__}` with masked entries in {names}.\n\n"
        f"    Args, input and output shapes as in `keras.layers.{cls.__name__}`; the keyword arguments of\n"
        "    `MaskedGaussian` say which entries are Bayesian, where their scales start, their prior and KL weight.\n"
    )
    return keras.saving.register_keras_serializable(package="sbn_tf")(register(cls))


def partial_class(layer: keras.layers.Layer | type) -> type | None:
    """The masked class that stands for a stock or masked layer (or for its class); None if there is none."""
    return _PARTIAL.get(layer if isinstance(layer, type) else type(layer))
