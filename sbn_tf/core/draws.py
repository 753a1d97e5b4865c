"""How one call of a masked layer serves several draws: parts of the batch, random signs, noise on the outputs.

Most layers are linear in their kernel, so a draw is the trained part plus the noise, `linear(x, loc + delta) =
linear(x, loc) + linear(x, delta)`. Where few channels have Bayesian entries the second term is small.
"""

from __future__ import annotations

from collections.abc import Callable

import keras
import numpy as np
from keras import ops

from sbn_tf.core.batch import join_batch, part_of_example, split_batch
from sbn_tf.core.context import BatchDraws, current_graph
from sbn_tf.core.linear import TouchedChannels, embedding_noise, linear_form

__all__ = ["call_in_batch", "drawn_weights", "offsets_of_samples"]


def call_in_batch(layer: keras.layers.Layer, inputs, batch: BatchDraws, stock_call: Callable):
    """Outputs of a masked layer on a whole batch, its draws distributed over the examples as `batch` says.

    Args:
        layer: a `MaskedGaussian` that has Bayesian entries.
        inputs: its inputs; axis 0 is the batch.
        batch: the `BatchDraws` of the context.
        stock_call: `stock_call(inputs, draws)`, the layer's call with given weights; for layers with no linear form.
    """
    inputs = ops.convert_to_tensor(inputs, sparse=False)  # a sparse one has neither parts nor squares
    form = linear_form(layer)
    if form is None:
        draws = offsets_of_samples(layer, batch, batch.num_samples)
        return _by_parts(inputs, batch, lambda s, part: stock_call(part, drawn_weights(layer, draws[s])))
    if batch.how == "split":
        return form.finish(_split_call(layer, form, inputs, batch))
    if batch.how == "local" and _is_local(layer, form, inputs, batch):
        return form.finish(_local_call(layer, form, inputs))
    return form.finish(_flipout_call(layer, form, inputs, batch))


def offsets_of_samples(layer: keras.layers.Layer, batch: BatchDraws, num_samples: int) -> list[dict]:
    """Offsets (weight name -> (k,)) of each sample, kept in `batch`, in the order in which separate calls draw them."""

    def make():
        return [{name: layer.posteriors.offsets(name, s) for name in layer.posteriors} for s in range(num_samples)]

    return batch.keep((id(layer), num_samples, current_graph()), make)


def drawn_weights(layer: keras.layers.Layer, offsets: dict) -> dict:
    """Dense draws of the weights with these offsets."""
    return {name: layer.posteriors.draw(name, values) for name, values in offsets.items()}


def _by_parts(inputs, batch, call):
    """`call(s, part)` of each part of the batch, joined."""
    outputs = [call(s, part) for s, part in split_batch(inputs, batch.num_samples)]
    return join_batch(outputs, ops.shape(inputs)[0], batch.num_samples)


def _is_local(layer, form, inputs, batch):
    """Whether this use of a layer has noise on its outputs; an error where there is another use in the same pass.

    Keras's count of a layer's nodes does not show it: a Sequential model adds one each time that it is built again.
    """
    is_dense = type(layer).stock_class is keras.layers.Dense
    local = is_dense and len(inputs.shape) == 2 and id(layer) not in batch.shared
    again, before = batch.holds((id(layer), "local")), batch.keep((id(layer), "local"), lambda: local)
    if again and (local or before):
        raise ValueError(
            f"Layer '{layer.name}' is used twice in one pass, where noise on its outputs is no draw of one network. "
            'Name it in batch_draws("local", shared=[layer]): it then draws by flipout.'
        )
    return local


def _split_call(layer, form, inputs, batch):
    draws, posteriors, name = offsets_of_samples(layer, batch, batch.num_samples), layer.posteriors, form.weight
    if name not in posteriors:
        outputs = form.apply(inputs, _loc(layer, name))
    elif name == "embeddings" and posteriors[name].touched() is not None:
        rows = embedding_noise(layer, inputs, [draw[name] for draw in draws])
        outputs = form.apply(inputs, _loc(layer, name)) + rows
    else:
        touched = TouchedChannels.of(layer, form)
        if touched is not None and _decomposes(layer, form, touched, inputs):
            kernels = [touched.kernel(draw[name], inputs.dtype) for draw in draws]
            noise = _by_parts(touched.take(inputs), batch, lambda s, part: form.apply(part, kernels[s]))
            outputs = form.apply(inputs, _loc(layer, name)) + touched.put(noise)
        else:
            kernels = [posteriors.draw(name, draw[name]) for draw in draws]
            outputs = _by_parts(inputs, batch, lambda s, part: form.apply(part, kernels[s]))
    if getattr(layer, "bias", None) is None:
        return outputs
    if "bias" not in posteriors:
        return outputs + _bias(form, _loc(layer, "bias"), outputs)
    biases = ops.stack([posteriors.draw("bias", draw["bias"]) for draw in draws])  # (samples, ...)
    part = part_of_example(ops.shape(outputs)[0], batch.num_samples)
    rows = ops.take(biases, part, axis=0)
    return outputs + ops.reshape(rows, (-1, *form.bias_shape(layer.loc("bias"), len(outputs.shape))))


def _flipout_call(layer, form, inputs, batch):
    """y_n = linear(x_n, loc) + s_n * linear(r_n * x_n, delta), with signs r_n and s_n of each example.

    Reference: Wen, Vicol, Ba, Tran, Grosse (2018), Flipout, equation 4.
    """
    draw, posteriors, name = offsets_of_samples(layer, batch, 1)[0], layer.posteriors, form.weight
    outputs = form.apply(inputs, _loc(layer, name))
    if name == "embeddings" and name in posteriors and posteriors[name].touched() is not None:
        noise = embedding_noise(layer, inputs, [draw[name]])
        outputs = outputs + noise * _signs(layer, batch, "outputs", noise, form.signs_out)
    elif name in posteriors:
        touched = TouchedChannels.of(layer, form)
        reached = inputs if touched is None else touched.take(inputs)
        if form.gathers:
            reached = reached * _signs(layer, batch, "inputs", reached, form.signs_in)
        delta = posteriors[name].scatter(draw[name]) if touched is None else touched.kernel(draw[name], outputs.dtype)
        noise = form.apply(reached, delta)
        noise = noise * _signs(layer, batch, "outputs", noise, form.signs_out)
        outputs = outputs + (noise if touched is None else touched.put(noise))
    if getattr(layer, "bias", None) is None:
        return outputs
    bias = _bias(form, _loc(layer, "bias"), outputs)
    if "bias" in posteriors:
        noise = _bias(form, posteriors["bias"].scatter(draw["bias"]), outputs)
        axes = [axis - len(outputs.shape) for axis in range(1, len(outputs.shape)) if noise.shape[axis] > 1]
        bias = bias + noise * _signs(layer, batch, "bias", outputs, axes)
    return outputs + bias


def _local_call(layer, form, inputs):
    """y_n ~ N(x_n loc + b, x_n^2 scale^2 + scale_b^2), drawn for each example and unit.

    Reference: Kingma, Salimans, Welling (2015), Variational Dropout and the Local Reparameterization Trick, equation 6.
    """
    outputs = form.apply(inputs, _loc(layer, "kernel"))
    posteriors, variance = layer.posteriors, 0.0
    dtype = posteriors.variable_dtype  # half precision cannot store squares of 300 and of 1e-4
    if "kernel" in posteriors:
        touched = TouchedChannels.of(layer, form)
        squares, inputs = posteriors["kernel"].scale_of_entries() ** 2, ops.cast(inputs, dtype)
        if touched is None:
            variance = form.apply(inputs**2, posteriors["kernel"].scatter(squares, dtype))
        else:
            reached = form.apply(touched.take(inputs) ** 2, touched.kernel(squares, dtype))
            variance = touched.put(reached)
    if layer.bias is not None:
        outputs = outputs + layer.bias
    if "bias" in posteriors:
        variance = variance + posteriors["bias"].scatter(posteriors["bias"].scale_of_entries() ** 2, dtype)
    positive = variance > 0  # a unit with no Bayesian entry: the square root has no finite slope at 0
    deviation = ops.where(positive, ops.sqrt(ops.where(positive, variance, 1.0)), 0.0)
    return outputs + ops.cast(deviation * posteriors.noise(ops.shape(outputs)), outputs.dtype)


def _loc(layer, name):
    return ops.convert_to_tensor(layer.loc(name))


def _bias(form, bias, outputs):
    return ops.reshape(bias, (1, *form.bias_shape(bias, len(outputs.shape))))


def _signs(layer, batch, place, tensor, axes):
    """Random signs of each example along `axes`, kept in `batch`: 1 along every other axis of `tensor`.

    Kept without those other axes: the next use may have more of them, or none.
    """
    rank, shape = len(tensor.shape), ops.shape(tensor)
    along = {0, *(axis % rank for axis in axes)}
    kept = [size for i, size in enumerate(shape) if i in along]
    key = (id(layer), place, current_graph())
    signs = batch.keep(key, lambda: ops.where(layer.posteriors.noise(kept) < 0, -1.0, 1.0))
    return ops.cast(ops.reshape(signs, [size if i in along else 1 for i, size in enumerate(shape)]), tensor.dtype)


def _decomposes(layer, form, touched, inputs):
    """Whether noise apart from the loc is the cheaper way of "split", by numbers known before the call.

    Two conditions: at most 1/8 of the channel pairs is touched, and the kernel has at least 32 entries for each output
    of an example. Elsewhere a draw's cost is small beside its convolution, and whole draws on the parts are cheaper.
    """
    outputs = layer.compute_output_shape(tuple(inputs.shape))[1:]
    if None in outputs:
        return False
    return touched.share <= 1 / 8 and np.prod(layer.posteriors[form.weight].weight_shape) >= 32 * np.prod(outputs)
