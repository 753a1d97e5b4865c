"""sbn_tf: sparse (partial) Bayesian networks in Keras.

    import sbn_tf

    bayes = sbn_tf.to_partial_bayes(model, num_train=len(x), r_bayes=0.05, data=(x, y))

The names here are loaded when they are first used: `import sbn_tf` alone loads neither Keras nor TensorFlow. Once both
Keras and sbn_tf are imported, `keras.saving.load_model` knows the classes of sbn_tf and needs no `custom_objects`.
"""

import importlib
import importlib.machinery
import sys

from sbn_tf.core.quiet import quiet_tensorflow

__all__ = ["LocScaleOptimizer", "Masks", "__version__", "load", "to_partial_bayes", "top_k"]
__version__ = "0.1.0"

_HOMES = {
    "LocScaleOptimizer": "partial_bayes",
    "Masks": "saliency",
    "load": "core.loading",
    "to_partial_bayes": "partial_bayes",
    "top_k": "saliency",
}


def __getattr__(name):
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = globals()[name] = getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
    return value


def __dir__():
    return sorted({*globals(), *_HOMES})


def _register():
    """Load the modules that register classes with Keras."""
    importlib.import_module(f"{__name__}.core.loading")


class _AfterKeras:
    """An import hook: when Keras is imported after sbn_tf, it registers our classes with Keras."""

    def find_spec(self, name, path=None, target=None):
        spec = importlib.machinery.PathFinder.find_spec(name, path) if name == "keras" else None
        if spec is not None and spec.loader is not None:
            run = spec.loader.exec_module

            def exec_module(module):
                sys.meta_path.remove(self)
                run(module)
                # A module of ours that imports Keras is not complete yet, and registers its own classes.
                ours = {one for one in sys.modules if one.startswith(f"{__name__}.")}
                if ours <= {f"{__name__}.core", f"{__name__}.core.quiet"}:
                    _register()

            spec.loader.exec_module = exec_module
        return spec


quiet_tensorflow()
if "keras" in sys.modules:
    _register()
else:
    sys.meta_path.insert(0, _AfterKeras())
