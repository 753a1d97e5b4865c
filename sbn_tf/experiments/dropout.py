"""Dropout for any trained network, and predictions with it left on."""

from __future__ import annotations

import weakref

import keras
import numpy as np
from keras import ops

from sbn_tf.core.checks import check_count
from sbn_tf.core.conversion import copied, inputs_like
from sbn_tf.core.keras_internals import noise_states
from sbn_tf.experiments.networks import layer_seed

_WEIGHT_LAYERS = (
    keras.layers.Dense,
    keras.layers.EinsumDense,
    *(keras.layers.Conv1D, keras.layers.Conv2D, keras.layers.Conv3D),
    *(keras.layers.Conv1DTranspose, keras.layers.Conv2DTranspose, keras.layers.Conv3DTranspose),
    *(keras.layers.DepthwiseConv1D, keras.layers.DepthwiseConv2D),
    *(keras.layers.SeparableConv1D, keras.layers.SeparableConv2D),
)
_DROPOUTS = (keras.layers.Dropout, keras.layers.GaussianDropout, keras.layers.AlphaDropout)


def with_dropout(model: keras.Model, rate: float, seed: int | None = None) -> keras.Model:
    """A copy of a trained network with dropout before every layer of weights but the first.

    With dropout left on, each call is a draw from an approximate posterior: `sample_dropout`.

    Args:
        model: built Functional or Sequential model without models in it. It is not changed.
        rate: share of the inputs that is dropped, 0 <= rate < 1; 0: a copy without dropout.
        seed: fixes the noise; None draws it from Keras's global seed.

    Returns:
        A Functional `keras.Model`, not compiled: the layers of `model` under their names with their state, and
        before each dense or convolution layer NAME, but the first that is called, `keras.layers.Dropout` NAME_dropout.
        A layer that is called twice has one dropout layer, called twice.

    Raises:
        ValueError: a rate out of range, or another kind of model.

    Reference: Gal and Ghahramani 2016, "Dropout as a Bayesian Approximation", section 3.
    """
    if isinstance(rate, bool) or not isinstance(rate, int | float) or not 0 <= rate < 1:
        raise ValueError(f"Expected a dropout rate, 0 <= rate < 1. Received: rate={rate!r}")
    model = _plain(model)
    dropouts, seen = {}, []

    def call(layer, *args, **kwargs):
        if isinstance(layer, _WEIGHT_LAYERS):
            seen.append(layer.name)
            if rate and layer.name != seen[0]:
                name = f"{layer.name}_dropout"
                if name not in dropouts:
                    dropouts[name] = keras.layers.Dropout(rate, seed=layer_seed(seed, name), name=name)
                args = (dropouts[name](args[0]), *args[1:])
        return layer(*args, **kwargs)

    return copied(model, call=call)


def _plain(model):
    """A Functional or Sequential model as a Functional one of the same layers that is not compiled, so copies are not.

    Raises:
        ValueError: a model of another kind, or one with models among its layers.
    """
    try:
        inputs, outputs = (t[0] if len(t) == 1 else list(t) for t in (model.inputs, model.outputs))
    except (AttributeError, TypeError):
        raise ValueError(
            f"Expected a built Functional or Sequential model. Received: the {type(model).__name__} {model!r}"
        ) from None
    nested = [layer.name for layer in model.layers if isinstance(layer, keras.Model)]
    if nested:
        raise ValueError(
            f"Expected a model without models among its layers. Received: '{model.name}', which contains {nested}. "
            "Build it flat: call the inner model's layers on its input."
        )
    return keras.Model(inputs, outputs, name=model.name)


class _Noisy(keras.layers.Layer):
    """A dropout layer that is on in prediction too."""

    def __init__(self, layer):
        super().__init__(name=layer.name)
        self.layer = layer

    def call(self, inputs):
        return self.layer(inputs, training=True)


class _DropoutSampler(keras.Model):
    """`num_samples` passes of a network in inference mode, its dropout on, in one compiled call."""

    def __init__(self, model, num_samples):
        super().__init__(name=f"dropout_of_{num_samples}")
        noisy = []

        def twin(layer):
            if not isinstance(layer, _DROPOUTS):
                return layer  # the very layer: training it further is seen here
            noisy.append(type(layer).from_config(layer.get_config()))
            return _Noisy(noisy[-1])

        plain = _plain(model)
        self.network = keras.models.clone_model(plain, inputs_like(plain), clone_function=twin)
        if not noisy:
            raise ValueError(
                f"Expected a network with dropout layers. Received: '{model.name}', which has none. See with_dropout."
            )
        self.noise = [state for layer in noisy for state in noise_states(layer)]
        self.num_samples, self.built = num_samples, True

    def call(self, inputs):
        return ops.stack([self.network(inputs, training=False) for _ in range(self.num_samples)], axis=1)


_samplers: weakref.WeakKeyDictionary = weakref.WeakKeyDictionary()  # model -> {num_samples: its sampler}


def sample_dropout(
    model: keras.Model, images, num_samples: int = 5, *, seed: int | None = 0, batch_size: int = 32
) -> np.ndarray:
    """Predictions of `num_samples` networks, each with other units dropped.

    Only dropout is as in training: batch norm takes its running statistics, whether it is frozen or not. Traced once
    for each number of samples, and not again in later calls.

    Args:
        model: Functional or Sequential model with dropout layers and one output, as from `with_dropout`.
        images: array or `tf.data.Dataset`, as for `predict`.
        num_samples: networks.
        seed: the same seed, images and batch size give the same samples; None: noise goes on from the last call's.
        batch_size: images at a time, where `images` is an array. Each image has units of its own dropped.

    Returns:
        (num_samples, batch, ...), the model's outputs.

    Raises:
        ValueError: no dropout layer, another kind of model, or `num_samples` < 1.
    """
    check_count("num_samples", num_samples)
    known = _samplers.setdefault(model, {})
    if num_samples not in known:
        known[num_samples] = _DropoutSampler(model, num_samples)
        known[num_samples].compile(jit_compile=False)
    sampler = known[num_samples]
    if seed is not None:
        for position, state in enumerate(sampler.noise):
            state.assign([layer_seed(seed, str(position)), 0])
    options = {"batch_size": batch_size} if hasattr(images, "shape") else {}
    return np.moveaxis(sampler.predict(images, verbose=0, **options), 1, 0)
