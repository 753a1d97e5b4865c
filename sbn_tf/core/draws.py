"""How one call of a masked layer serves several draws: parts of the batch, random signs, noise on the outputs.

Most layers are linear in their kernel, `y = activation(linear(x, kernel) + bias)`. So a draw comes apart into the
trained part and the noise, `linear(x, loc + delta) = linear(x, loc) + linear(x, delta)`, and where few channels hold
Bayesian entries the second term is small. `sbn_tf.layers` imports this module, never the other way.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Hashable, Iterable
from typing import Any

import keras
import numpy as np
from keras import ops
from keras.src.backend.common.masking import get_keras_mask, set_keras_mask
from numpy.typing import ArrayLike

__all__ = [
    "BatchDraws",
    "call_in_batch",
    "first_rows",
    "join_batch",
    "join_outputs",
    "part_bounds",
    "part_of_example",
    "split_batch",
    "touched_channels",
    "with_attached",
]

KINDS = ("split", "flipout", "local")


class BatchDraws:
    """What one `batch_draws` context keeps: how calls draw, and what each layer has drawn in it.

    Args:
        how: "split", "flipout" or "local".
        num_samples: into how many contiguous parts "split" cuts the batch. >= 1.
        shared: layers that the network uses more than once: "local" does not fit them, and is flipout there.
    """

    def __init__(self, how: str, num_samples: int, shared: Iterable[keras.layers.Layer] = ()):
        if how not in KINDS:
            raise ValueError(f"Expected how to be one of {KINDS}. Received: how={how!r}")
        if isinstance(num_samples, bool) or not isinstance(num_samples, int) or num_samples < 1:
            raise ValueError(f"Expected a whole num_samples >= 1. Received: num_samples={num_samples!r}")
        self.how, self.num_samples = how, num_samples
        self.shared = {id(layer) for layer in shared}
        self._kept = {}

    def keep(self, key: Hashable, make: Callable[[], Any]) -> Any:
        """What `make()` gave at the first call with this key."""
        if key not in self._kept:
            self._kept[key] = make()
        return self._kept[key]

    def holds(self, key: Hashable) -> bool:
        """Whether something is kept under this key."""
        return key in self._kept


# ---- parts of a batch ----


def part_bounds(batch_size, num_samples: int) -> list[tuple]:
    """(start, stop) of each part: part s holds the rows from s * B // S to (s + 1) * B // S, none where S > B."""
    return list(itertools.pairwise(s * batch_size // num_samples for s in range(num_samples + 1)))


def part_sizes(batch_size, num_samples: int) -> list:
    """Examples in each part; they sum to B."""
    return [stop - start for start, stop in part_bounds(batch_size, num_samples)]


def split_batch(tensor, num_samples: int) -> list:
    """(sample, its part of the batch) for each part that is not empty; all along axis 0, in order.

    Where the batch's size is known only when the graph runs, a part that is empty then gets one row of zeros
    (TensorFlow's convolutions of no example have outputs of a wrong shape): `join_batch` drops what comes of it.
    """
    batch_size = ops.shape(tensor)[0]
    sizes = part_sizes(batch_size, num_samples)
    if isinstance(batch_size, int):
        samples = [s for s in range(num_samples) if sizes[s]] or [0]
        parts = _split(tensor, [sizes[s] for s in samples]) if len(samples) > 1 else [tensor]
        return list(zip(samples, parts, strict=True))
    around = [[0, 0]] * (len(tensor.shape) - 1)
    padded = [
        ops.pad(part, [[0, ops.maximum(1 - size, 0)], *around])
        for part, size in zip(_split(tensor, sizes), sizes, strict=True)
    ]
    return list(enumerate(padded))


def join_batch(parts: list, batch_size, num_samples: int):
    """What became of the parts of `split_batch`, one after the other along axis 0, for a batch of this size."""
    if not isinstance(batch_size, int):
        sizes = part_sizes(batch_size, num_samples)
        parts = [
            ops.slice(part, [0] * len(part.shape), [size, *ops.shape(part)[1:]])
            for part, size in zip(parts, sizes, strict=True)
        ]
    return parts[0] if len(parts) == 1 else ops.concatenate(parts, axis=0)


def with_attached(tensor, rows: Callable):
    """`rows(tensor)`, with the same rows of what Keras attaches to it: a mask, the logits of probabilities.

    Without its logits a loss clips probabilities at 1e-7, where a network that is sure and wrong gets no gradient.
    """
    part = rows(tensor)
    if get_keras_mask(tensor) is not None:
        set_keras_mask(part, rows(get_keras_mask(tensor)))
    if hasattr(tensor, "_keras_logits"):
        part._keras_logits = rows(tensor._keras_logits)
    return part


def first_rows(outputs, count):
    """The first `count` examples of every tensor, with what Keras attaches to it."""
    return keras.tree.map_structure(lambda t: with_attached(t, lambda x: x[:count]), outputs)


def join_outputs(parts: list):
    """Outputs of the parts of a batch, one after the other along axis 0, with what Keras attaches to them."""

    def joined(*tensors):
        whole = ops.concatenate(tensors, axis=0)
        masks = [get_keras_mask(t) for t in tensors]
        if all(mask is not None for mask in masks):
            set_keras_mask(whole, ops.concatenate(masks, axis=0))
        if all(hasattr(t, "_keras_logits") for t in tensors):
            whole._keras_logits = ops.concatenate([t._keras_logits for t in tensors], axis=0)
        return whole

    return keras.tree.map_structure(joined, *parts)


def _split(tensor, sizes):
    if keras.backend.backend() == "tensorflow":
        # A split's gradient is one concatenation; that of five slices writes five tensors of the whole batch.
        import tensorflow as tf

        return tf.split(tensor, sizes, num=len(sizes))
    return ops.split(tensor, [int(bound) for bound in np.cumsum(sizes)[:-1]], axis=0)


def part_of_example(batch_size, num_samples: int):
    """Number of the part in which each example lies: (B,) int32."""
    if isinstance(batch_size, int):
        return np.repeat(np.arange(num_samples, dtype="int32"), part_sizes(batch_size, num_samples))
    rows = ops.arange(batch_size, dtype="int32")
    later = (ops.cast(rows >= s * batch_size // num_samples, "int32") for s in range(1, num_samples))
    return sum(later, ops.zeros_like(rows))


# ---- layers that are linear in their kernel ----


class _Linear:
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


class _Dense(_Linear):
    channels_in, channels_out = -2, -1

    def apply(self, inputs, kernel):
        return ops.matmul(inputs, kernel)


class _Embedding(_Linear):
    weight, gathers = "embeddings", False

    def apply(self, inputs, kernel):
        inputs = inputs if str(inputs.dtype) in ("int32", "int64") else ops.cast(inputs, "int32")
        return ops.cast(ops.take(kernel, inputs, axis=0), self.layer.compute_dtype)

    def finish(self, outputs):
        return outputs


class _Einsum(_Linear):
    def __init__(self, layer):
        super().__init__(layer)
        inputs, kernel, outputs = _einsum_terms(layer.equation)
        self.signs_in, self.signs_out = _einsum_axes(inputs, kernel), _einsum_axes(outputs, kernel)

    def apply(self, inputs, kernel):
        return ops.einsum(self.layer.equation, inputs, kernel)


class _Conv(_Linear):
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
            inputs, padding = ops.pad(inputs, layer._compute_causal_padding()), "valid"
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


def _linear(layer):
    """The `_Linear` of a layer; None for one that is not linear in one kernel (separable, wrapped, another class)."""
    form = _LINEAR.get(type(layer)._stock())
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


# ---- one call ----


def call_in_batch(layer: keras.layers.Layer, inputs, batch: BatchDraws, stock_call: Callable):
    """Outputs of a masked layer on a whole batch, its draws distributed over the examples as `batch` says.

    Args:
        layer: a `MaskedGaussian` that has Bayesian entries.
        inputs: its inputs; axis 0 is the batch.
        batch: the `BatchDraws` of the context.
        stock_call: `stock_call(inputs, draws)`, the layer's call with given weights; for layers with no linear form.
    """
    form = _linear(layer)
    if form is None:
        draws = layer._batch_draws(batch, batch.num_samples)
        return _by_parts(inputs, batch, lambda s, part: stock_call(part, layer._drawn(draws[s])))
    if batch.how == "split":
        return form.finish(_split_call(layer, form, inputs, batch))
    if batch.how == "local" and _is_local(layer, form, inputs, batch):
        return form.finish(_local_call(layer, form, inputs))
    return form.finish(_flipout_call(layer, form, inputs, batch))


def _by_parts(inputs, batch, call):
    """`call(s, part)` of each part of the batch, joined."""
    outputs = [call(s, part) for s, part in split_batch(inputs, batch.num_samples)]
    return join_batch(outputs, ops.shape(inputs)[0], batch.num_samples)


def _is_local(layer, form, inputs, batch):
    """Whether this use of a layer has noise on its outputs; an error where there is another use in the same pass.

    Keras's count of a layer's nodes would not tell: a Sequential model adds one each time that it is built anew.
    """
    local = isinstance(form, _Dense) and len(inputs.shape) == 2 and id(layer) not in batch.shared
    again, before = batch.holds((id(layer), "local")), batch.keep((id(layer), "local"), lambda: local)
    if again and (local or before):
        raise ValueError(
            f"Layer '{layer.name}' is used twice in one pass, where noise on its outputs is no draw of one network. "
            'Name it in batch_draws("local", shared=[layer]): it then draws by flipout.'
        )
    return local


def _loc(layer, name):
    return ops.convert_to_tensor(layer._loc(name))


def _split_call(layer, form, inputs, batch):
    draws = layer._batch_draws(batch, batch.num_samples)
    name, num_samples = form.weight, batch.num_samples
    if name not in draws[0]:
        outputs = form.apply(inputs, _loc(layer, name))
    elif isinstance(form, _Embedding) and name in layer._touched.value:
        rows = _embedding_noise(layer, inputs, [draw[name] for draw in draws])
        outputs = form.apply(inputs, _loc(layer, name)) + rows
    else:
        touched = _Touched.of(layer, form)
        if touched is not None and _decomposes(layer, form, touched, inputs):
            kernels = [touched.kernel(draw[name], inputs.dtype) for draw in draws]
            noise = _by_parts(touched.take(inputs), batch, lambda s, part: form.apply(part, kernels[s]))
            outputs = form.apply(inputs, _loc(layer, name)) + touched.put(noise)
        else:
            kernels = [layer._drawn(draw, name)[name] for draw in draws]
            outputs = _by_parts(inputs, batch, lambda s, part: form.apply(part, kernels[s]))
    if getattr(layer, "bias", None) is None:
        return outputs
    if "bias" not in draws[0]:
        return outputs + _bias(form, _loc(layer, "bias"), outputs)
    biases = ops.stack([layer._drawn(draw, "bias")["bias"] for draw in draws])  # (samples, ...)
    part = part_of_example(ops.shape(outputs)[0], num_samples)
    rows = ops.take(biases, part, axis=0)
    return outputs + ops.reshape(rows, (-1, *form.bias_shape(layer._loc("bias"), len(outputs.shape))))


def _bias(form, bias, outputs):
    return ops.reshape(bias, (1, *form.bias_shape(bias, len(outputs.shape))))


def _flipout_call(layer, form, inputs, batch):
    """y_n = linear(x_n, loc) + s_n * linear(r_n * x_n, delta), with signs r_n and s_n of each example.

    Reference: Wen, Vicol, Ba, Tran, Grosse (2018), Flipout, equation 4.
    """
    draw = layer._batch_draws(batch, 1)[0]
    name = form.weight
    outputs = form.apply(inputs, _loc(layer, name))
    if isinstance(form, _Embedding) and name in layer._touched.value:
        noise = _embedding_noise(layer, inputs, [draw[name]])
        outputs = outputs + noise * layer._signs(batch, "outputs", noise, form.signs_out)
    elif name in draw:
        touched = _Touched.of(layer, form)
        reached = inputs if touched is None else touched.take(inputs)
        if form.gathers:
            reached = reached * layer._signs(batch, "inputs", reached, form.signs_in)
        delta = layer._delta(name, draw[name]) if touched is None else touched.kernel(draw[name], outputs.dtype)
        noise = form.apply(reached, delta)
        noise = noise * layer._signs(batch, "outputs", noise, form.signs_out)
        outputs = outputs + (noise if touched is None else touched.put(noise))
    if getattr(layer, "bias", None) is None:
        return outputs
    bias = _bias(form, _loc(layer, "bias"), outputs)
    if "bias" in draw:
        noise = _bias(form, layer._delta("bias", draw["bias"]), outputs)
        axes = [axis - len(outputs.shape) for axis in range(1, len(outputs.shape)) if noise.shape[axis] > 1]
        bias = bias + noise * layer._signs(batch, "bias", outputs, axes)
    return outputs + bias


def _local_call(layer, form, inputs):
    """y_n ~ N(x_n loc + b, x_n^2 scale^2 + scale_b^2), drawn for each example and unit.

    Reference: Kingma, Salimans, Welling (2015), Variational Dropout and the Local Reparameterization Trick, equation 6.
    """
    outputs = form.apply(inputs, _loc(layer, "kernel"))
    names, variance = layer._bayesian_names(), 0.0
    dtype = layer._posterior_dtype()  # squares of 300 and of 1e-4 are none in half precision
    if "kernel" in names:
        touched, squares, inputs = _Touched.of(layer, form), layer._masked_scale("kernel") ** 2, ops.cast(inputs, dtype)
        if touched is None:
            variance = form.apply(inputs**2, layer._delta("kernel", squares, dtype))
        else:
            reached = form.apply(touched.take(inputs) ** 2, touched.kernel(squares, dtype))
            variance = touched.put(reached)
    if layer.bias is not None:
        outputs = outputs + layer.bias
    if "bias" in names:
        variance = variance + layer._delta("bias", layer._masked_scale("bias") ** 2, dtype)
    positive = variance > 0  # a unit with no Bayesian entry: the square root has no finite slope at 0
    deviation = ops.where(positive, ops.sqrt(ops.where(positive, variance, 1.0)), 0.0)
    return outputs + ops.cast(deviation * layer._normal(ops.shape(outputs)), outputs.dtype)


# ---- few touched channels ----


def _ranks(channels, size):
    """For each of `size` channels: its rank among those that occur in `channels`, and whether it occurs."""
    present = ops.scatter(channels[:, None], ops.ones_like(channels), (size,)) > 0
    return ops.cumsum(ops.cast(present, "int32")) - 1, present


def _embedding_noise(layer, inputs, draws):
    """Noise of the rows that are looked up, part s of the batch from draw s: a table of the touched rows alone."""
    size, width = layer._loc("embeddings").shape
    count, _ = layer._touched.value["embeddings"]
    index = ops.cast(ops.convert_to_tensor(layer.embeddings_posterior_index), "int32")
    ranks, present = _ranks(index // width, size)
    positions = ops.take(ranks, index // width) * width + index % width
    fits, tables = ops.max(ranks) < count, []
    for values in draws:
        values = ops.where(fits, values, ops.cast(float("nan"), values.dtype))
        tables.append(ops.scatter(positions[:, None], values, ((count + 1) * width,)))  # the last row is 0
    table = ops.cast(ops.reshape(ops.stack(tables), (-1, width)), layer.compute_dtype)
    rows = ops.cast(inputs, "int32")
    rows = ops.where(ops.take(present, rows), ops.take(ranks, rows), count)
    part = part_of_example(ops.shape(inputs)[0], len(draws))
    return ops.take(table, rows + (count + 1) * ops.reshape(part, (-1,) + (1,) * (len(inputs.shape) - 1)), axis=0)


def touched_channels(layer: keras.layers.Layer, name: str, positions: ArrayLike) -> tuple[int, int] | None:
    """How many indices of the two last axes of weight `name` hold Bayesian entries at flat `positions`."""
    shape = tuple(layer._loc(name).shape)
    if len(shape) < 2:
        return None
    *_, rows, columns = np.unravel_index(np.asarray(positions), shape)
    return len(np.unique(rows)), len(np.unique(columns))


def _decomposes(layer, form, touched, inputs):
    """Whether noise apart from the loc is the cheaper way of "split", by numbers known before the call.

    Two conditions: at most 1/8 of the channel pairs is touched, and the kernel has at least 32 entries for each output
    of an example. Elsewhere a draw's cost is small beside its convolution, and whole draws on the parts are cheaper.
    """
    kernel = tuple(layer._loc(form.weight).shape)
    outputs = layer.compute_output_shape(tuple(inputs.shape))[1:]
    if None in outputs:
        return False
    return touched.share <= 1 / 8 and np.prod(kernel) >= 32 * np.prod(outputs)


class _Touched:
    """The channels of a kernel that hold Bayesian entries, taken out of inputs, kernel and outputs.

    How many there are is static; which ones follows from the index variable, so weights that are loaded later count.
    Should a mask that is loaded touch more channels than the traced call has room for, outputs are NaN: trace it anew,
    by `compile` for one.
    """

    @classmethod
    def of(cls, layer, form):
        """The touched channels, or None where they are all or cannot be taken out."""
        counts = layer._touched.value.get(form.weight)
        if form.channels_in is None or counts is None or counts == tuple(layer._loc(form.weight).shape[-2:]):
            return None
        return cls(layer, form, counts)

    def __init__(self, layer, form, counts):
        self.form, self.counts = form, counts
        *window, size_rows, size_columns = shape = tuple(layer._loc(form.weight).shape)
        self.sizes = (size_rows, size_columns)
        index = ops.cast(ops.convert_to_tensor(getattr(layer, f"{form.weight}_posterior_index")), "int32")
        rows, columns = (index // size_columns) % size_rows, index % size_columns
        self.ranked = _ranks(rows, size_rows), _ranks(columns, size_columns)
        (row_ranks, _), (column_ranks, _) = self.ranked
        place = index // (size_rows * size_columns)
        self.positions = (place * counts[0] + ops.take(row_ranks, rows)) * counts[1] + ops.take(column_ranks, columns)
        self.fits = ops.logical_and(ops.max(row_ranks) < counts[0], ops.max(column_ranks) < counts[1])
        self.shape = (*window, *counts)
        self.share = counts[0] * counts[1] / np.prod(shape[-2:])

    def _pick(self, axis):
        """(channels, touched channels) of ones and zeros, None where all are touched."""
        i = axis + 2
        if self.counts[i] == self.sizes[i]:
            return None
        ranks, present = self.ranked[i]
        return ops.one_hot(ranks, self.counts[i]) * ops.cast(present, "float32")[:, None]

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
        flat = ops.scatter(self.positions[:, None], ops.cast(values, dtype), (int(np.prod(self.shape)),))
        return ops.reshape(flat, self.shape)
