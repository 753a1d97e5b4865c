"""Conversion of trained Keras models: chosen weights become Gaussian, everything else is copied; and the way back.

What comes out is a plain Keras model with masked layers in it; `sbn_tf.partial_bayes` gives it the ELBO.
"""

from __future__ import annotations

import contextlib
import itertools
import tempfile
from collections.abc import Callable, Mapping
from typing import Any

import keras
import numpy as np
from keras import ops
from numpy.typing import ArrayLike

from sbn_tf.core.checks import check_seed
from sbn_tf.core.keras_internals import (
    all_layers,
    as_trusted,
    children,
    functional_of,
    is_functional,
    made_by,
    own_variables,
    replaced,
    set_own_trainable,
    traced,
    unconnected_copy,
)
from sbn_tf.core.masks import checked_masks
from sbn_tf.core.posterior import OPTION_NAMES, Posterior
from sbn_tf.core.posteriors import Posteriors
from sbn_tf.core.weights import named_weights
from sbn_tf.core.wrapper import MaskedWrapper
from sbn_tf.layers import STOCK_CALLS, MaskedGaussian, masked_layers, partial_class

__all__ = ["check_convertible", "convert", "copied", "inputs_like", "to_deterministic"]


def convert(
    model: keras.Model, masks: Mapping[str, ArrayLike], layer_options: Mapping, seed: int | None = None
) -> keras.Model:
    """Copy of a built Keras model whose masked weights are Gaussian, as a Functional or Sequential model.

    A layer that holds masked weights becomes its namesake in `sbn_tf.layers`, or, where none stands for it (attention,
    recurrent and normalisation layers, custom ones), it is put into a `MaskedWrapper` of its name. A model that has no
    graph of layers, a subclassed one, is wrapped whole.

    Args:
        model: built `keras.Model`, nested models and shared layers included. A subclassed one must come back from
            `from_config(get_config())`, and must have been called on data: its inputs are those of that call.
        masks: `sbn_tf.saliency.Masks` (or a dict key -> boolean array) of this model.
        layer_options: keyword arguments of every masked layer (`initial_scale`, `prior`, `kl_weight`, ...).
        seed: int; each masked layer derives its own noise seed from it.

    Raises:
        ValueError: masks of another model or of weights that its outputs do not depend on, a layer that cannot be
            copied, or a model that is Bayesian already.
    """
    check_convertible(model)
    masks = checked_masks(masks, model)
    left = {
        id(weight.variable): (weight.key, np.asarray(masks[weight.key]))
        for weight in named_weights(model).values()
        if weight.key in masks and np.any(masks[weight.key])
    }
    position = {}

    def masked(layer):
        chosen = {}
        for name, weight in named_weights(layer).items() if left and layer.built else ():
            if id(weight.variable) in left:
                chosen[name] = left.pop(id(weight.variable))[1]
        if not chosen:
            return copied_layer(layer)
        position[id(layer)] = len(position)
        options = {**layer_options, "mask": chosen, "seed": _layer_seed(seed, position[id(layer)])}
        cls = partial_class(layer)
        if cls is None or set(chosen) - set(cls.posterior_weights) or getattr(layer, "lora_enabled", False):
            return _wrapped(layer, options)
        try:
            return cls.from_config({**layer.get_config(), **options})
        except TypeError as error:  # Keras wraps the layer's own message in its whole config
            if isinstance(error.__context__, ValueError):
                raise error.__context__ from None
            raise

    network = copied(model, masked)
    for layer in masked_layers(network):
        layer.posteriors.centre()  # at the values that were copied
    if left:
        keys = [key for key, _ in left.values()]
        raise ValueError(
            f"The outputs of '{model.name}' do not depend on: {', '.join(keys[:5])}{' ...' if len(keys) > 5 else ''}. "
            f"Leave these weights out of the selection: saliency(..., exclude={keys[0]!r})."
        )
    return network


def check_convertible(model: keras.Model) -> None:
    """Refuse what cannot become Bayesian, before any work is spent on it.

    Raises:
        ValueError: no built `keras.Model`, or one with Bayesian entries.
    """
    if not isinstance(model, keras.Model) or not model.built:
        raise ValueError(f"Expected a built keras.Model (call it once on data). Received: {model!r}")
    if hasattr(model, "predict_uncertainty") or masked_layers(model):
        raise ValueError(
            f"Expected a deterministic network. Received: '{model.name}', which has Bayesian entries already. Convert "
            "the network that it was made of, or change a layer's entries by layer.set_mask."
        )


def to_deterministic(model: keras.Model) -> keras.Model:
    """Plain Keras model of the posterior means: the way back from `convert` and `to_partial_bayes`.

    Stock layers of the same names with the locs as weights; a wrapped layer comes out of its wrapper. Which weights
    are frozen stays as it is: after `to_partial_bayes(..., batch_norm="frozen")` batch norm is. The result is not
    compiled, knows nothing of this package, and equals the network under `posterior_mean()`.

    Args:
        model: `PartialBayes`, or any Functional or Sequential model with masked layers.

    Raises:
        ValueError: no model, or a custom layer that makes masked layers itself.
    """
    if not isinstance(model, keras.Model):
        raise ValueError(f"Expected a keras.Model. Received: {model!r}")
    network = model.network if hasattr(model, "predict_uncertainty") else model

    def stock(layer):
        name = layer.name
        while isinstance(layer, MaskedWrapper):
            layer = layer.layer
        cls = type(layer).stock_class if isinstance(layer, MaskedGaussian) else type(layer)
        if isinstance(layer, MaskedGaussian) and type(layer).call not in STOCK_CALLS:
            raise ValueError(
                f"Expected a masked layer with the call of `keras.layers.{cls.__name__}`. Received: '{name}', whose "
                f"class {type(layer).__name__} has its own. Give it to a stock layer of the same call by hand."
            )
        plain = copied_layer(layer, cls, _stock_config(layer))
        plain.name = name
        inside = [x.name for x in all_layers(plain) if isinstance(x, MaskedGaussian)]
        if inside:
            raise ValueError(
                f"'{name}' ({type(layer).__name__}) makes the masked layers {inside[:5]} itself. Build it with stock "
                "layers and give it these weights."
            )
        return plain

    posteriors = [(layer, *item) for layer in masked_layers(network) for item in layer.posteriors.items()]
    means = {id(layer.loc(name)): (layer, name, one.mean_offsets()) for layer, name, one in posteriors}
    means = {key: layer.posteriors.draw(name, mean) for key, (layer, name, mean) in means.items() if mean is not None}
    return _Copier(stock, means).network(network)


def copied(model: keras.Model, make: Callable | None = None, call: Callable | None = None) -> keras.Model:
    """Copy of a built model with all of its state, as a Functional or Sequential model that is not compiled.

    Weights, what `Normalization` has learnt, vocabularies, boundaries and seeds in the configs are those of `model`,
    and so is what trains. Nested models are copied layer by layer, and a layer that is used twice stays one layer.

    Args:
        model: built `keras.Model`. One without a graph of layers becomes one layer of a Functional model.
        make: called with each layer that is no such graph, gives its copy; default: a layer made again from its config.
        call: called with a copied layer and its inputs instead of the layer, of a Functional model.

    Raises:
        ValueError: a layer that cannot be made again from its config.
    """
    return _Copier(make or copied_layer, call=call).network(model)


class _Copier:
    """Copies models graph by graph, each layer once; `make(layer)` copies what is no graph."""

    def __init__(self, make, values=None, call=None):
        self.make, self.copies, self.values = make, {}, values or {}  # by variable's id: a value instead of its own
        self.options = {} if call is None else {"call_function": call}

    def network(self, model):
        """Copy of a whole model with its variables' values, as a Functional or Sequential model."""
        with _uncompiled(model):
            new = self(model) if _has_graph(model) else _as_graph(self(model), model)
        self._copy_state()
        return new

    def __call__(self, operation):
        if not isinstance(operation, keras.layers.Layer):  # of keras.ops: it holds nothing
            return unconnected_copy(operation)
        if id(operation) not in self.copies:
            new = self._graph(operation) if _has_graph(operation) else self.make(operation)
            self.copies[id(operation)] = (operation, new)
        return self.copies[id(operation)][1]

    def _graph(self, model):
        inputs = inputs_like(functional_of(model))
        return keras.models.clone_model(model, clone_function=self, input_tensors=inputs, **self.options)

    def _copy_state(self):
        """Every variable's value, and what trains."""
        new_of = {}
        for old, new in self.copies.values():
            if _has_graph(old):
                set_own_trainable(new, old.trainable)
                continue
            pairs = list(itertools.zip_longest(_parts(old), _parts(new)))
            if not all(a and b and _shapes(a) == _shapes(b) for a, b in pairs):
                raise ValueError(
                    f"'{old.name}' ({type(old).__name__}) has other weights when it is made again from its config. "
                    "Let get_config and from_config describe it in full, weights made in build()."
                )
            for a, b in pairs:
                set_own_trainable(b, a.trainable)
                for before, after in zip(own_variables(a), own_variables(b), strict=True):
                    if new_of.setdefault(id(before), after) is not after:
                        raise ValueError(
                            f"Two layers share the weight '{before.path}', which their configs do not say. "
                            "Share the layer instead."
                        )
                    value = self.values.get(id(before), before)
                    after.assign(ops.copy(value))  # on JAX an assignment shares the buffer, and `fit` gives it away
                    after.trainable = before.trainable
                if isinstance(b, keras.layers.Normalization):
                    b.finalize_state()


def _made_again(layer, cls=None, config=None):
    own = {type(x).__name__: type(x) for x in all_layers(layer) if not type(x).__module__.startswith("keras.")}
    return as_trusted(cls or type(layer), layer.get_config() if config is None else config, own)


def _can_be_made_again(layer) -> bool:
    try:
        return _made_again(layer) is not None
    except Exception:  # whatever a foreign constructor raises
        return False


def copied_layer(layer, cls=None, config=None):
    """A layer made again from its config, with its vocabularies; it is not built."""
    try:
        new = _made_again(layer, cls, config)
    except Exception as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[-1]
        raise ValueError(
            f"'{layer.name}' ({type(layer).__name__}) cannot be made again by from_config(get_config()): {reason}\n"
            "Give its class a get_config that names every argument of its __init__."
        ) from error
    parts = [part for part in all_layers(layer) if not isinstance(part, Posteriors | Posterior)]
    pairs = list(zip(parts, all_layers(new), strict=False))
    for a, b in pairs:
        if hasattr(a, "save_assets"):  # vocabularies
            for old, lookup in pairs:
                if hasattr(old, "idf_weights_const"):  # in no file: `load_assets` takes what is there, and pads it
                    lookup.idf_weights_const = old.idf_weights_const[: old.vocabulary_size()]
            with tempfile.TemporaryDirectory() as folder:
                a.save_assets(folder)
                b.load_assets(folder)
    return new


def _wrapped(layer, options):
    names = list(named_weights(layer))
    return MaskedWrapper(copied_layer(layer), name=layer.name, trainable=layer.trainable, weight_names=names, **options)


def _stock_config(layer):
    """A layer's config in which every masked layer is its stock layer."""
    return _without_masks(layer.get_config(), isinstance(layer, MaskedGaussian))


def _without_masks(config, is_masked=False):
    if isinstance(config, list | tuple):
        return type(config)(_without_masks(x) for x in config)
    if not isinstance(config, dict):
        return config
    cls = keras.saving.get_registered_object(config.get("registered_name") or "")
    if cls is MaskedWrapper:
        inner = _without_masks(config["config"]["layer"])
        return {**inner, "config": {**inner["config"], "name": config["config"]["name"]}}
    if isinstance(cls, type) and issubclass(cls, MaskedGaussian):
        stock = cls.stock_class
        named = {"module": "keras.layers", "class_name": stock.__name__, "registered_name": None}
        if not stock.__module__.startswith("keras."):
            named |= {"module": stock.__module__, "registered_name": keras.saving.get_registered_name(stock)}
        return {**config, **named, "config": _without_masks(config["config"], is_masked=True)}
    return {k: _without_masks(v) for k, v in config.items() if not (is_masked and k in _POSTERIOR_OPTIONS)}


_POSTERIOR_OPTIONS = {*OPTION_NAMES, "num_bayesian", "mask", "seed"}


def _has_graph(layer) -> bool:
    """Whether a model is no more than the graph of its layers: Functional or Sequential, with the call of these.

    A class of its own may know how to make layers that cannot be made again by themselves, as some of KerasHub's.
    """
    if functional_of(layer) is None:
        return False
    plain = isinstance(layer, keras.Sequential) or type(layer).__module__.startswith("keras.")
    return plain or all(_has_graph(x) or _can_be_made_again(x) for x in layer.layers)


def inputs_like(model: keras.Model) -> Any:
    """New Inputs in the structure of a Functional model's; `clone_model` itself forgets sparse, ragged and optional."""

    def like(x):
        made, _ = made_by(x)
        return keras.Input(
            batch_shape=x.shape,
            dtype=x.dtype,
            sparse=x.sparse,
            ragged=x.ragged,
            name=made.name,
            optional=getattr(made, "optional", False),
        )

    return keras.tree.map_structure(like, model.input)


def _as_graph(new, old):
    """Functional model of one layer: the copy `new` of a model without a graph, on inputs like those of `old`."""
    if is_functional(old):
        inputs = inputs_like(old)
        return keras.Model(inputs, new(inputs), name=old.name)
    shapes = getattr(old, "_build_shapes_dict", None) or {}
    if not shapes:
        raise ValueError(f"The inputs of '{old.name}' ({type(old).__name__}) are unknown. Call it once on data.")
    reasons, call = [], new if len(shapes) == 1 else lambda inputs: new(**inputs)
    for dtype in (old.input_dtype, "int32"):  # a model keeps the shapes of its inputs, not their dtypes
        inputs = {key.removesuffix("_shape"): _inputs_of_shapes(shape, dtype) for key, shape in shapes.items()}
        try:
            first, rounded = _tokens_as_integers(new, call, next(iter(inputs.values())) if len(inputs) == 1 else inputs)
            outputs = call(first)
        except Exception as error:
            reasons.append((str(error).strip() or type(error).__name__).splitlines()[0])
            continue
        if rounded:
            raise ValueError(
                f"Expected to see which inputs of '{old.name}' are tokens, since {dtype} rounds large ones. Received: "
                f"a part of an input for {sorted(rounded)}. Give the tokens an input of their own, or use float32."
            )
        return keras.Model(first, outputs, name=old.name)
    raise ValueError(
        f"'{old.name}' ({type(old).__name__}) cannot be called on symbolic inputs of shapes {shapes}: {reasons[0]}\n"
        "Its call must run on symbolic tensors (keras.ops), and its get_config name every argument of its __init__."
    )


def _inputs_of_shapes(shapes, dtype, name=None):
    if isinstance(shapes, dict):
        return {key: _inputs_of_shapes(shape, dtype, key) for key, shape in shapes.items()}
    if shapes and isinstance(shapes[0], list | tuple | dict):
        return [_inputs_of_shapes(shape, dtype) for shape in shapes]
    return keras.Input(batch_shape=(None, *shapes[1:]), dtype=dtype, name=name)


def _tokens_as_integers(new, call, inputs):
    """Inputs of which those that embeddings look up are integers; the embeddings whose tokens are rounded even so."""
    leaves, rounded = keras.tree.flatten(inputs), _rounded_tokens(new, call, inputs)
    for i, x in enumerate(leaves):
        if not any(_is_whole(x, shape) for shape in rounded.values()):
            continue
        whole = keras.Input(batch_shape=x.shape, dtype="int32", name=made_by(x)[0].name)
        tried = keras.tree.pack_sequence_as(inputs, [*leaves[:i], whole, *leaves[i + 1 :]])
        try:
            left = _rounded_tokens(new, call, tried)
        except Exception:  # it serves as numbers as well
            continue
        if len(left) < len(rounded):
            inputs, leaves, rounded = tried, keras.tree.flatten(tried), left
    return inputs, rounded


def _is_whole(x, shape):
    return len(x.shape) == len(shape) and all(a in (None, b) for a, b in zip(x.shape, shape, strict=True))


def _rounded_tokens(new, call, inputs) -> dict:
    """Shapes of the tokens that come to embeddings in half precision, by name: it rounds those above 256 or 2,048."""
    found, exact = {}, {"bfloat16": 256, "float16": 2048}
    parts = all_layers(new)
    half = any(part.compute_dtype in exact for part in parts)
    tables = [x for x in parts if isinstance(x, keras.layers.Embedding) and half]

    def watched(table, own):
        def call(tokens):
            if table.input_dim > exact.get(keras.backend.standardize_dtype(tokens.dtype), table.input_dim) + 1:
                found[table.path] = tuple(tokens.shape)
            return own(tokens)

        return call

    if tables:
        with contextlib.ExitStack() as stack:
            for table in tables:
                stack.enter_context(replaced(table, "call", watched(table, table.call)))
            traced(call, inputs)
    return found


@contextlib.contextmanager
def _uncompiled(model):
    """Within it no part of `model` counts as compiled: Keras would compile the copy too, with slots of its own."""
    compiled = [m for m in all_layers(model) if getattr(m, "compiled", False)]
    for part in compiled:
        part.compiled = False
    try:
        yield
    finally:
        for part in compiled:
            part.compiled = True


def _layer_seed(seed, position):
    return None if seed is None else int(np.random.default_rng([check_seed(seed), position]).integers(2**31))


def _parts(layer) -> list:
    """A layer and its sublayers, each once, without wrappers around them."""
    found = {}

    def walk(part):
        while isinstance(part, MaskedWrapper):
            part = part.layer
        if id(part) not in found:
            found[id(part)] = part
            for child in children(part):
                if not isinstance(child, Posteriors):
                    walk(child)

    walk(layer)
    return list(found.values())


def _shapes(layer) -> list:
    return [tuple(variable.shape) for variable in own_variables(layer)]
