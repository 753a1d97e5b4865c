"""Loading a model of ours: importing this module registers our layers and models with Keras."""

import importlib
import os
from typing import Any

import keras

import sbn_tf.core.wrapper
import sbn_tf.partial_bayes  # noqa: F401 (both register their classes)

__all__ = ["load"]


def load(path: str | os.PathLike, **kwargs: Any) -> Any:
    """Load a `.keras` file, with the classes of sbn_tf known to Keras; or a folder of `sbn-tf train`.

    Args:
        path: the file or folder.
        **kwargs: of `keras.saving.load_model`, for a file: `custom_objects`, `compile`, `safe_mode`.

    Returns:
        The model. A `PartialBayes` starts its random draws again at its seed. Of a folder a
        `sbn_tf.experiments.predictor.Predictor`: `predict(images)` takes files, folders, and uint8 arrays.
    """
    if os.path.isdir(path):
        if kwargs:
            raise ValueError(f"Expected no options for a folder of `sbn-tf train`. Received: {', '.join(kwargs)}")
        return importlib.import_module("sbn_tf.experiments.predictor").Predictor.load(path)
    importlib.import_module("sbn_tf.experiments.recipes")  # a model may be compiled with a loss of a recipe
    return keras.saving.load_model(path, **kwargs)
