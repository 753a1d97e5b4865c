"""Layers that are linear in their kernel, `y = activation(linear(x, kernel) + bias)`, and where their channels lie."""

from __future__ import annotations

import keras
import numpy as np
from keras import ops

from sbn_tf.core.batch import part_of_example
from sbn_tf.core.posterior import scattered

__all__ = ["Linear", "TouchedChannels", "embedding_noise", "linear_form"]


class Linear:
    """A layer as `activation(apply(x, kernel) + bias)`, and where its channels lie.

    `signs_in`, `signs_out`: axes of inputs and outputs (never the batch) that the kernel connects, counted from the
    end; those before an ellipsis of axes from the start.
    `channels_in`, `channels_out`: the two last axes of the kernel, for a layer whose touched channels can be taken out.
    """

    weight = "kernel"
    channels_in: int | None = None
    channels_out: int | None = None
    gathers = True  # inputs can be multiplied by signs and restricted to channels

    def __init__(self, layer):
        self.layer = layer
        self.signs_in, self.signs_out = (-1,), (-1,)

    def bias_shape(self, bias, rank):
        """Shape of a bias for outputs of this rank, the batch axis left out."""
        shape = tuple(bias.shape)
        return (1,) * (rank - 1 - len(shape)) + shape

    def finish(self, outputs):
        """What the layer does after bias and kernel."""
        return outputs if self.layer.activation is None else self.layer.activation(outputs)


class _Dense(Linear):
    channels_in, channels_out = -2, -1

    def apply(self, inputs, kernel):
        return ops.matmul(inputs, kernel)


class _Embedding(Linear):
    weight, gathers = "embeddings", False

    def apply(self, inputs, kernel):
        inputs = inputs if str(inputs.dtype) in ("int32", "int64") else ops.cast(inputs, "int32")
        return ops.cast(ops.take(kernel, inputs, axis=0), self.layer.compute_dtype)

    def finish(self, outputs):
        return outputs


class _Einsum(Linear):
    def __init__(self, layer):
        super().__init__(layer)
        inputs, kernel, outputs = _einsum_terms(layer.equation)
        self.signs_in, self.signs_out = _einsum_axes(inputs, kernel), _einsum_axes(outputs, kernel)

    def apply(self, inputs, kernel):
        return ops.einsum(self.layer.equation, inputs, kernel)


class _Conv(Linear):
    channels_in, channels_out = -2, -1

    def __init__(self, layer):
        super().__init__(layer)
        first = layer.data_format == "channels_first"
        self.signs_in = self.signs_out = (-1 - layer.rank if first else -1,)
        if first or getattr(layer, "groups", 1) > 1:
            self.channels_in = self.channels_out = None

    def apply(self, inputs, kernel):
        layer, padding = self.layer, self.layer.padding
        if padding == "causal":
            before = [[layer.dilation_rate[0] * (layer.kernel_size[0] - 1), 0]]
            steps_last = layer.data_format == "channels_first"
            inputs = ops.pad(inputs, [[0, 0], [0, 0], *before] if steps_last else [[0, 0], *before, [0, 0]])
            padding = "valid"
        return ops.conv(inputs, kernel, list(layer.strides), padding, layer.data_format, layer.dilation_rate)

    def bias_shape(self, bias, rank):
        channels = tuple(bias.shape)
        spatial = (1,) * self.layer.rank
        return channels + spatial if self.layer.data_format == "channels_first" else spatial + channels


class _ConvTranspose(_Conv):
    channels_in, channels_out = -1, -2

    def apply(self, inputs, kernel):
        layer = self.layer
        return ops.conv_transpose(
            inputs,
            kernel,
            list(layer.strides),
            layer.padding,
            layer.output_padding,
            layer.data_format,
            layer.dilation_rate,
        )


class _DepthwiseConv(_Conv):
    def __init__(self, layer):
        super().__init__(layer)
        self.channels_in = self.channels_out = None

    def apply(self, inputs, kernel):
        layer = self.layer
        return ops.depthwise_conv(inputs, kernel, layer.strides, layer.padding, layer.data_format, layer.dilation_rate)


_LINEAR = {
    keras.layers.Dense: _Dense,
    keras.layers.Embedding: _Embedding,
    keras.layers.EinsumDense: _Einsum,
    **dict.fromkeys((keras.layers.Conv1D, keras.layers.Conv2D, keras.layers.Conv3D), _Conv),
    **dict.fromkeys(
        (keras.layers.Conv1DTranspose, keras.layers.Conv2DTranspose, keras.layers.Conv3DTranspose), _ConvTranspose
    ),
    **dict.fromkeys((keras.layers.DepthwiseConv1D, keras.layers.DepthwiseConv2D), _DepthwiseConv),
}


def linear_form(layer: keras.layers.Layer) -> Linear | None:
    """The `Linear` of a masked layer; None for one not linear in one kernel (separable, wrapped, another class)."""
    form = _LINEAR.get(type(layer).stock_class)
    if form is None or (form is _Einsum and not _einsum_fits(layer)):
        return None
    return form(layer)


def _einsum_terms(equation):
    left, outputs = equation.replace(" ", "").replace("...", ".").split("->")
    inputs, kernel = left.split(",")
    return inputs, kernel, outputs


def _einsum_axes(term, kernel):
    """Where the axes that a term shares with the kernel lie: the "." stands for any number of axes."""
    dots = term.find(".")
    return tuple(i if i < dots else i - len(term) for i, axis in enumerate(term) if axis != "." and axis in kernel)


def _einsum_fits(layer):
    """Whether the batch is axis 0 of inputs and outputs, the kernel has no batch, and the bias none either."""
    inputs, kernel, outputs = _einsum_terms(layer.equation)
    if inputs[0] != outputs[0] or inputs[0] in kernel:
        return False
    return layer.bias is None or "." in outputs or len(layer.bias.shape) < len(outputs)


# ---- few touched channels ----


def embedding_noise(layer: keras.layers.Layer, inputs, draws: list):
    """Noise of the rows that `inputs` look up, part s of the batch from `draws[s]`: a table of the touched rows alone.

    Args:
        layer: a masked Embedding with a posterior of some of its entries.
        inputs: (batch, ...) whole numbers.
        draws: offsets (k,) of each sample.
    """
    posterior = layer.posteriors["embeddings"]
    size, width = posterior.weight_shape
    count, _ = posterior.touched()
    index = ops.cast(ops.convert_to_tensor(posterior.index), "int32")
    ranks, present = _ranks(index // width, size)
    positions = ops.take(ranks, index // width) * width + index % width
    fits, tables = ops.max(ranks) < count, []
    for values in draws:
        values = ops.where(fits, values, ops.cast(float("nan"), values.dtype))
        tables.append(scattered(values, positions, (count + 1) * width))  # the last row is 0
    table = ops.cast(ops.reshape(ops.stack(tables), (-1, width)), layer.compute_dtype)
    rows = ops.cast(inputs, "int32")
    rows = ops.where(ops.take(present, rows), ops.take(ranks, rows), count)
    part = part_of_example(ops.shape(inputs)[0], len(draws))
    return ops.take(table, rows + (count + 1) * ops.reshape(part, (-1,) + (1,) * (len(inputs.shape) - 1)), axis=0)


class TouchedChannels:
    """The channels of a kernel that have Bayesian entries, taken out of inputs, kernel and outputs.

    How many there are is static. Which ones follows from the index variable, so weights that are loaded later count.
    If a mask that is loaded touches more channels than the traced call has room for, the outputs are NaN: compile the
    model again, so that the call is traced again.
    """

    @classmethod
    def of(cls, layer: keras.layers.Layer, form: Linear) -> TouchedChannels | None:
        """The touched channels of a layer; None where they are all or cannot be taken out."""
        posterior = layer.posteriors[form.weight]
        counts = posterior.touched()
        if form.channels_in is None or counts is None or counts == posterior.weight_shape[-2:]:
            return None
        return cls(posterior, form, counts)

    def __init__(self, posterior, form: Linear, counts: tuple[int, int]):
        self.form, self.counts = form, counts
        *window, size_rows, size_columns = posterior.weight_shape
        self.sizes = (size_rows, size_columns)
        index = ops.cast(ops.convert_to_tensor(posterior.index), "int32")
        rows, columns = (index // size_columns) % size_rows, index % size_columns
        self.ranked = _ranks(rows, size_rows), _ranks(columns, size_columns)
        (row_ranks, _), (column_ranks, _) = self.ranked
        place = index // (size_rows * size_columns)
        self.positions = (place * counts[0] + ops.take(row_ranks, rows)) * counts[1] + ops.take(column_ranks, columns)
        self.fits = ops.logical_and(ops.max(row_ranks) < counts[0], ops.max(column_ranks) < counts[1])
        self.shape = (*window, *counts)
        self.share = counts[0] * counts[1] / (size_rows * size_columns)

    def take(self, inputs):
        """The touched channels of inputs (..., channels)."""
        pick = self._pick(self.form.channels_in)
        return inputs if pick is None else ops.matmul(inputs, ops.cast(pick, inputs.dtype))

    def put(self, outputs):
        """Outputs of the touched channels at their places among all channels, 0 elsewhere."""
        pick = self._pick(self.form.channels_out)
        return outputs if pick is None else ops.matmul(outputs, ops.cast(ops.transpose(pick), outputs.dtype))

    def kernel(self, values, dtype):
        """Kernel of the touched channels with `values` (k,) at the Bayesian entries, 0 elsewhere."""
        values = ops.where(self.fits, values, ops.cast(float("nan"), values.dtype))
        flat = scattered(ops.cast(values, dtype), self.positions, int(np.prod(self.shape)))
        return ops.reshape(flat, self.shape)

    def _pick(self, axis):
        """(channels, touched channels) of ones and zeros, None where all are touched."""
        i = axis + 2
        if self.counts[i] == self.sizes[i]:
            return None
        ranks, present = self.ranked[i]
        return ops.one_hot(ranks, self.counts[i], dtype="float32") * ops.cast(present, "float32")[:, None]


def _ranks(channels, size):
    """For each of `size` channels: its rank among those that occur in `channels`, and whether it occurs."""
    present = scattered(ops.ones_like(channels), channels, size) > 0
    return ops.cumsum(ops.cast(present, "int32")) - 1, present
