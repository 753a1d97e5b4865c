"""A wrapper that gives chosen weights of any Keras layer or model a posterior.

The layers of `sbn_tf.layers` have their own classes; attention, recurrent and normalisation layers, custom layers and
whole subclassed models go through this one.
"""

from __future__ import annotations

import functools

import keras
from keras import ops

from sbn_tf.core.batch import first_rows, join_outputs, part_bounds, with_attached
from sbn_tf.core.context import current_batch, is_at_mean
from sbn_tf.core.draws import drawn_weights, offsets_of_samples
from sbn_tf.core.keras_internals import all_layers, copy_call_signature, nodes_of, traced
from sbn_tf.core.posteriors import NO_LORA, NO_QUANTIZATION
from sbn_tf.core.weights import named_weights
from sbn_tf.layers import MaskedGaussian

__all__ = ["MaskedWrapper"]


@keras.saving.register_keras_serializable(package="sbn_tf")
class MaskedWrapper(MaskedGaussian, keras.layers.Wrapper):
    """Any layer or model of which chosen weight entries are random, the rest points.

    `weight = loc + scatter(index, offsets)` for the time of the wrapped layer's own call.

    It is called as the wrapped layer is: arguments, masks, `training`, states and outputs are those of that layer,
    which keeps its weights (the locs), dtype policies, regularizers and updates. A weight is named by its path in the
    wrapped layer: `"query/kernel"`, `"forward_lstm/lstm_cell/recurrent_kernel"`.

    Within `batch_draws` the layer is called on one part of the batch after another, with the rows of every argument
    whose first size is the batch's. What it adds by `add_loss` then counts by its part's share of the examples, so it
    must be a mean over them, as activity regularizers are: of a sum over the batch about 1 / S is left.

    Args:
        layer: a `keras.layers.Layer` or `keras.Model`, built or not.
        num_bayesian: dict such as `{"query/kernel": 10}`: how many entries of a weight are Bayesian, chosen at random.
        mask: dict of boolean arrays instead: which entries are Bayesian.
        weight_names: list of str: names of all weights of the layer, in their order. Keras numbers the sublayers and
            unnamed weights of a custom layer again at each making, and their paths change. None: the current paths.
        name, trainable, and the keyword arguments of `sbn_tf.layers.MaskedGaussian`.

    Input shape: the wrapped layer's. Output shape: the wrapped layer's.

    Raises:
        ValueError: a weight that the layer does not have, or one that the layer itself assigns to during its call.
    """

    def __init__(
        self,
        layer: keras.layers.Layer,
        *,
        weight_names: list[str] | None = None,
        name: str | None = None,
        trainable: bool = True,
        **kwargs,
    ):
        if not isinstance(layer, keras.layers.Layer):
            raise ValueError(f"Expected a keras layer or model. Received: layer={layer!r}")
        # Draws are made in the precision of the weights; the wrapped layer casts them and its inputs by its own policy.
        dtype = keras.DTypePolicy(layer.variable_dtype)
        super().__init__(layer, name=name or layer.name, trainable=trainable, dtype=dtype, autocast=False, **kwargs)
        self._weight_names, self._by_name = weight_names, None
        self.supports_masking = layer.supports_masking
        copy_call_signature(self, layer)

    def __call__(self, *args, **kwargs):
        """The wrapped layer's output for one draw; the first call builds."""
        if not self.built:
            if not self._has_weights():
                # As in a Functional model: some layers make their weights, or sublayers, only when they are called.
                symbolic_args, symbolic_kwargs = keras.tree.map_structure(_symbolic, (args, kwargs))
                self.layer(*symbolic_args, **symbolic_kwargs)
            self.build()
        return super().__call__(*args, **kwargs)

    def build(self, input_shape=None):
        """Build the posteriors, and the wrapped layer if need be."""
        if not self.layer.built:
            self.layer.build(input_shape)
        self._by_name = None
        self.posterior_weights = tuple(self._floats())
        self.posteriors.make()
        for part in all_layers(self.layer):
            for method, reason in (("quantize", NO_QUANTIZATION), ("enable_lora", NO_LORA)):
                if hasattr(part, method):
                    object.__setattr__(part, method, self._guarded(getattr(part, method), reason))

    def call(self, *args, **kwargs):
        """The wrapped layer's call with one new draw of the masked entries."""
        batch = None if is_at_mean() or not len(self.posteriors) else current_batch()
        if batch is not None:
            return self._call_in_parts(batch, args, kwargs)
        drawn = self.posteriors.draws()
        return self._call_layer(drawn, args, kwargs) if drawn else self.layer(*args, **kwargs)

    def loc(self, name: str):
        """The variable of the wrapped layer's weight `name`."""
        return self._floats()[name]

    def compute_mask(self, inputs, previous_mask=None):
        """The wrapped layer's mask."""
        return self.layer.compute_mask(inputs, previous_mask)

    def compute_output_spec(self, *args, **kwargs):
        """The wrapped layer's output."""
        found = [getattr(type(self.layer), f"compute_output_{what}") for what in ("spec", "shape")]
        if found == [keras.layers.Layer.compute_output_spec, keras.layers.Layer.compute_output_shape]:
            return traced(self.layer, *args, **kwargs)  # Keras traces `call` alone, without the casts of a dtype policy
        return self.layer.compute_output_spec(*args, **kwargs)

    def compute_output_shape(self, *args, **kwargs):
        """The wrapped layer's output shape."""
        return self.layer.compute_output_shape(*args, **kwargs)

    def get_config(self):
        """The wrapped layer and the posterior's config; the mask itself is saved among the weights."""
        config = super().get_config()
        del config["dtype"]  # the wrapped layer's
        return {**config, "weight_names": self._names()}

    def get_build_config(self):
        """Nothing: the wrapped layer has its own."""
        return {}

    def build_from_config(self, config):
        """Build if the wrapped layer is; else the first call does."""
        if self._has_weights():
            self.build()

    # ---- below: how it is done ----

    def _guarded(self, method, reason):
        """A method of the wrapped layer that changes its weights: refused as long as some are Bayesian.

        By the error that `Model.quantize` takes for "leave this layer as it is".
        """

        @functools.wraps(method)
        def guarded(*args, **kwargs):
            self.refuse_bayesian(reason, NotImplementedError)
            results = method(*args, **kwargs)
            self._weight_names, self._by_name, self.posteriors.counts = None, None, {}
            self.posterior_weights = tuple(self._floats())
            return results

        return guarded

    def _names(self):
        """Names of the wrapped layer's weights, in their order; None as long as it has none and none were given."""
        if self._weight_names is None and self.layer.built:
            return list(named_weights(self.layer))
        return self._weight_names

    def _floats(self):
        """The wrapped layer's weights of floating point by name."""
        if self._by_name is None:
            variables = [weight.variable for weight in named_weights(self.layer).values()]
            if len(variables) != len(self._names()):
                raise ValueError(
                    f"Expected {len(self._names())} weights in the layer that '{self.name}' wraps, as its weight_names "
                    f"say. Received: {len(variables)}. Its config must say all (Keras's: no LoRA of sublayers)."
                )
            named = zip(self._names(), variables, strict=True)
            found = {n: v for n, v in named if keras.backend.is_float_dtype(v.dtype)}
            self._by_name = lambda: found  # hidden from Keras, which would take the variables for the wrapper's own
        return self._by_name()

    def _has_weights(self):
        """Whether the wrapped layer has made the weights that are named. Some make them only when they are called."""
        if not self.layer.built:
            return False
        found = named_weights(self.layer)
        if self._weight_names is not None:
            return len(found) == len(self._weight_names)
        return {name for name, count in self.num_bayesian.items() if count} <= set(found)

    def _call_layer(self, draws, args, kwargs, share=None):
        """The wrapped layer's call with these weights; what it assigns to others and adds as loss is kept.

        `share` of a batch: what its losses count for.
        """
        with keras.StatelessScope(
            [(self.loc(name), draw) for name, draw in draws.items()], collect_losses=True, initialize_variables=False
        ) as scope:
            if scope.original_scope is not None:  # a scope hides the values of the one around it
                scope.state_mapping = {**scope.original_scope.state_mapping, **scope.state_mapping}
            before = dict(scope.state_mapping)
            outputs = self.layer(*args, **kwargs)
        drawn = {id(self.loc(name)): name for name in draws}
        for variable in self.layer.variables:
            after = scope.get_current_value(variable)
            if after is None or after is before.get(id(variable)):
                continue
            if id(variable) in drawn:
                raise ValueError(
                    f"'{self.name}' assigns to its weight '{drawn[id(variable)]}' when called: it cannot be Bayesian. "
                    "Leave it out of the mask."
                )
            variable.assign(after)
        for loss in scope.losses:  # a tensor of its own each: the wrapped layer claims the one that it added
            self.add_loss(loss + 0.0 if share is None else loss * ops.cast(share, loss.dtype))
        return outputs

    def _cut(self, args, kwargs):
        """Which tensors among the arguments hold a row for each example: booleans in the structure of (args, kwargs).

        Those whose first size is the batch's. By chance that of something else may be equal, of an attention mask
        (T, T) for one. Where a Functional model of open batch size uses the layer, its graph tells them apart.
        """
        size = next(leaf.shape[0] for leaf in keras.tree.flatten((args, kwargs)) if _rank(leaf))
        nodes = [n.arguments for n in nodes_of(self) if any(map(_is_open, n.input_tensors))]

        def in_rows(name, value):
            leaves = keras.tree.flatten(value)
            found = [bool(_rank(leaf)) and leaf.shape[0] == size for leaf in leaves]
            if name == "attention_mask":
                axes = getattr(self.layer, "_attention_axes", None) or (1,)
                found = [here and _rank(leaf) > 2 * len(axes) for here, leaf in zip(found, leaves, strict=True)]
            used = [_argument(node.args, node.kwargs, name) for node in nodes]
            used = [u for u in used if len(u) == len(leaves) and all(map(_fits, u, leaves))]
            found = [here and all(_is_open(u[i]) for u in used) for i, here in enumerate(found)]
            return keras.tree.pack_sequence_as(value, found)

        return tuple(in_rows(*x) for x in enumerate(args)), {name: in_rows(name, x) for name, x in kwargs.items()}

    def _call_in_parts(self, batch, args, kwargs):
        """One call for each part of the batch with a draw of its own, outputs joined."""
        if any(getattr(part, "stateful", False) for part in all_layers(self.layer)):
            raise ValueError(
                f"'{self.name}' is stateful: it keeps states of a whole batch, and cannot be called on its parts. "
                "Use stateful=False."
            )
        draws = offsets_of_samples(self, batch, batch.num_samples)
        cut = self._cut(args, kwargs)
        leaves = zip(keras.tree.flatten((args, kwargs)), keras.tree.flatten(cut), strict=True)
        batch_size = ops.shape(next(leaf for leaf, in_rows in leaves if in_rows))[0]
        results = []
        for s, (start, stop) in enumerate(part_bounds(batch_size, batch.num_samples)):
            if isinstance(batch_size, int) and start == stop:
                continue
            # Of a batch whose size is unknown yet no part is empty: one example too many is computed, and dropped.
            end = stop if isinstance(batch_size, int) else ops.maximum(stop, start + 1)

            def rows(leaf, in_rows, start=start, end=end):
                return with_attached(leaf, lambda t: t[start:end]) if in_rows else leaf

            part_args, part_kwargs = keras.tree.map_structure(rows, (args, kwargs), cut)
            outputs = self._call_layer(
                drawn_weights(self, draws[s]), part_args, part_kwargs, (stop - start) / batch_size
            )
            results.append(outputs if end is stop else first_rows(outputs, stop - start))
        return join_outputs(results)


def _argument(args, kwargs, name):
    """Leaves of the argument at this place or of this name; none where there is no such argument."""
    if not isinstance(name, int):
        return keras.tree.flatten(kwargs[name]) if name in kwargs else []
    return keras.tree.flatten(args[name]) if name < len(args) else []


def _fits(leaf, given):
    """Whether `given` may be what stands for `leaf` of a node."""
    if _rank(leaf) != _rank(given):
        return False
    return not _rank(leaf) or all(
        None in sizes or len(set(sizes)) == 1 for sizes in zip(leaf.shape, given.shape, strict=True)
    )


def _is_open(leaf):
    return isinstance(leaf, keras.KerasTensor) and bool(leaf.shape) and leaf.shape[0] is None


def _symbolic(leaf):
    if isinstance(leaf, keras.KerasTensor) or not hasattr(leaf, "shape"):
        return leaf
    return keras.KerasTensor(leaf.shape, dtype=keras.backend.standardize_dtype(leaf.dtype))


def _rank(leaf):
    return len(getattr(leaf, "shape", ()))
