"""sbn_tf: sparse (partial) Bayesian networks in Keras.

    import sbn_tf

    bayes = sbn_tf.to_partial_bayes(model, num_train=len(x), r_bayes=0.05, data=(x, y))
    bayes = sbn_tf.load("bayes.keras")
    layer = sbn_tf.layers.Dense(8, num_bayesian=3, kl_weight=1 / len(x))

The names here, and the modules, are loaded when they are first used: `import sbn_tf` alone loads neither Keras nor
TensorFlow.
"""

import importlib

from sbn_tf.core.quiet import quiet_tensorflow

__all__ = [
    "CalibrationError",
    "LocScaleOptimizer",
    "Masks",
    "__version__",
    "estimate_batch_norm",
    "fit_branched",
    "load",
    "to_partial_bayes",
    "top_k",
    "turned_samples",
]
__version__ = "0.2.0"

_HOMES = {
    "CalibrationError": "core.calibration",
    "LocScaleOptimizer": "partial_bayes",
    "Masks": "saliency",
    "estimate_batch_norm": "core.batch_norm",
    "fit_branched": "experiments.branched",
    "load": "core.loading",
    "to_partial_bayes": "partial_bayes",
    "top_k": "saliency",
    "turned_samples": "core.turns",
}
_MODULES = ("cost", "datasets", "layers", "metrics", "partial_bayes", "saliency")


def __getattr__(name):
    if name in _MODULES:
        return importlib.import_module(f"{__name__}.{name}")
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = globals()[name] = getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
    return value


def __dir__():
    return sorted({*globals(), *_HOMES, *_MODULES})


quiet_tensorflow()
