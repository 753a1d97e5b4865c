"""All that this package borrows from Keras's insides: names that Keras does not document and may change.

Each function borrows one thing. Its docstring says why it is needed and which public way was looked for. The tests in
`tests/test_keras_internals.py` fail by name when Keras changes one of them. No other module imports `keras.src` or
reads a private attribute of a Keras object.
"""

from __future__ import annotations

import contextlib
import copy
import functools
from collections.abc import Callable, Iterator
from typing import Any

import keras
from keras.src import backend
from keras.src.backend.common import global_state
from keras.src.losses.loss import unscale_loss_for_distribution
from keras.src.models.functional import Functional

__all__ = [
    "added_losses", "all_layers", "as_trusted", "call_context", "children", "compile_arguments", "compiled_loss",
    "copy_call_signature", "current_values", "functional_of", "in_stateless_scope", "is_called_by_another",
    "is_functional", "logits_of", "loss_arguments", "made_by", "mask_of", "moving_averages", "nodes_in_order",
    "nodes_of", "noise_states", "of_any_backend", "optimized_variables", "own_trained", "own_variables", "replaced",
    "run_graph_by", "set_logits", "set_mask", "set_own_trainable", "set_part", "spare_weight_decay",
    "strategy_of", "summed_loss", "traced", "unconnected_copy", "unlocked", "update_mean", "with_moving_averages",
    "with_symbolic_build",
]  # fmt: skip

# ---- layers and their variables ----


def all_layers(layer: keras.layers.Layer) -> list:
    """A layer or model and every layer in it, each once, in Keras's order.

    Why: `Model.layers` lists the uppermost layers of a model, and a layer does not list its sublayers publicly.
    """
    return layer._flatten_layers()


def children(layer: keras.layers.Layer) -> list:
    """The layers directly inside a layer or model. Why: as `all_layers`."""
    return layer._flatten_layers(include_self=False, recursive=False)


def own_variables(layer: keras.layers.Layer) -> list:
    """A layer's own variables, without those of its sublayers: trainable ones first.

    Why: `Layer.weights` includes the sublayers' variables: it does not show whether the layer itself has one.
    """
    return layer._trainable_variables + layer._non_trainable_variables


def own_trained(layer: keras.layers.Layer) -> list:
    """A layer's own variables that training changes unless they are frozen.

    Why: a frozen weight and a running statistic both have `trainable` False; only a layer's own list tells them apart.
    """
    return layer._trainable_variables


def noise_states(layer: keras.layers.Layer) -> list:
    """The states of a layer's seed generators, those of its sublayers included, each once.

    Public: `Layer.variables` is `Layer.weights` and these states. It replaces `Layer._seed_generators`.
    """
    weights = {id(variable) for variable in layer.weights}
    return list({id(v): v for v in layer.variables if id(v) not in weights}.values())


def set_own_trainable(layer: keras.layers.Layer, value: bool) -> None:
    """Whether a layer itself trains. Why: the public `layer.trainable = value` changes its sublayers too."""
    layer._trainable = value


@contextlib.contextmanager
def unlocked(layer: keras.layers.Layer) -> Iterator[None]:
    """Within it a built layer takes new variables and sublayers.

    Why: a mask may be chosen after `build`, and Keras then refuses new variables. Keras's `enable_lora` does the same.
    """
    was_locked = layer._tracker.locked
    layer._tracker.unlock()
    try:
        yield
    finally:
        if was_locked:
            layer._tracker.lock()


def set_part(layer: keras.layers.Layer, name: str, part: keras.layers.Layer, counted: bool) -> None:
    """Set the attribute `name` of a layer to a sublayer, which Keras saves, and counts among the layers or does not.

    Why: a layer with a sublayer that does nothing is not treated as the same layer without it: `Model.quantize` visits
    layers without sublayers alone.
    """
    with unlocked(layer):
        if counted:
            setattr(layer, name, part)
        else:
            layer._tracker.untrack(part)
            object.__setattr__(layer, name, part)


# ---- calls ----


def copy_call_signature(wrapper: keras.layers.Layer, layer: keras.layers.Layer) -> None:
    """Let Keras call `wrapper`, whose `call` takes `*args, **kwargs`, with the arguments of `layer`.

    Masks and `training` are then given where `layer` takes them, arguments that are no tensors are allowed, and inputs
    are not cast, since `layer` casts them itself. Why: Keras reads the signature of `call` from the class only.
    """
    for name in (
        "_call_signature",
        "call_signature_parameters",
        "_call_has_training_arg",
        "_call_has_mask_arg",
        "_call_context_args",
        "_call_has_context_arg",
    ):
        if hasattr(layer, name):  # not every version of Keras has all of them
            setattr(wrapper, name, getattr(layer, name))
    wrapper._convert_input_args = False
    wrapper._allow_non_tensor_positional_args = True


def is_called_by_another(model: keras.Model) -> bool:
    """Whether another layer or model is calling `model` now. Why: Keras shows nobody who calls whom.

    Keras's JAX trainer runs `call` of the outermost model without a context.
    """
    context = global_state.get_global_attribute("current_call_ctx")
    if keras.backend.backend() == "jax" and in_stateless_scope():
        return context is not None
    return context is not None and context.entry_layer is not model


@contextlib.contextmanager
def call_context(model: keras.Model) -> Iterator[None]:
    """Within it calls of layers are parts of one call of `model`, and the losses that each adds are kept.

    Why: each outermost call clears the added losses. Keras's JAX trainer runs `call` without a context, so that each of
    several calls of a network would drop the losses of the one before.
    """
    is_outermost = global_state.get_global_attribute("current_call_ctx") is None
    model._get_call_context()
    try:
        yield
    finally:
        if is_outermost:
            model._maybe_reset_call_context()


@contextlib.contextmanager
def replaced(thing: Any, name: str, value: Any) -> Iterator[None]:
    """Within it the attribute `name` of one object, usually a method, is `value`.

    Why: Keras has no hooks that run before a layer's call or an optimiser's update. The attribute is set behind
    Keras's tracking and removed afterwards, also after an error.
    """
    before = vars(thing).get(name, _MISSING)
    object.__setattr__(thing, name, value)
    try:
        yield
    finally:
        if before is _MISSING:
            object.__delattr__(thing, name)
        else:
            object.__setattr__(thing, name, before)


_MISSING = object()


class _Traced(keras.Operation):
    def __init__(self, function):
        super().__init__()
        self.function = function

    def call(self, *args, **kwargs):
        """Call it."""
        return self.function(*args, **kwargs)


def traced(function: Callable, *args, **kwargs) -> Any:
    """Shapes and dtypes of what `function` returns: it runs on placeholders for the KerasTensors among its arguments.

    Public: an `Operation` knows its output's shape. It replaces `keras.src.backend.compute_output_spec`.
    """
    return _Traced(function).compute_output_spec(*args, **kwargs)


# ---- what hangs on a tensor ----


def mask_of(tensor: Any) -> Any:
    """The mask (of padding, by `Masking` or `Embedding`) that goes with a tensor, or None.

    Why: `Layer.compute_mask` makes the mask of a layer's output, and nothing public reads the one that a tensor has.
    """
    return backend.get_keras_mask(tensor)


def set_mask(tensor: Any, mask: Any) -> None:
    """Give a tensor its mask. Why: as `mask_of`; a part of a batch, or a mean over samples, keeps the mask."""
    backend.set_keras_mask(tensor, mask)


def logits_of(tensor: Any) -> Any:
    """The logits that a sigmoid or softmax made this tensor of, or None.

    Why: Keras's crossentropies compute with them, which is exact, and nothing public reads them.
    """
    return getattr(tensor, "_keras_logits", None)


def set_logits(tensor: Any, logits: Any) -> None:
    """Give a tensor of probabilities its logits. Why: as `logits_of`."""
    tensor._keras_logits = logits


def made_by(tensor: Any) -> tuple[Any, int]:
    """The operation that made a KerasTensor, and which of its outputs this is. Why: no public way back exists."""
    return tensor._keras_history.operation, tensor._keras_history.tensor_index


# ---- graphs ----


def is_functional(model: Any) -> bool:
    """Whether a model was made of its inputs and outputs. Public: such a model is a `keras.Function` as well."""
    return isinstance(model, keras.Model) and isinstance(model, keras.Function)


def functional_of(operation: Any) -> Any:
    """The Functional behind a Functional or Sequential model whose `call` is Keras's own; None for anything else.

    Why: `call` is compared with that of a class that Keras does not export. A Sequential model runs as a Functional
    one that it keeps to itself; a second one made of its inputs and outputs is not the one that runs.
    """
    if isinstance(operation, keras.Sequential):
        own = type(operation).call is keras.Sequential.call
        return operation._functional if own else None
    own = getattr(type(operation), "call", None) is Functional.call
    return operation if own else None


def nodes_in_order(functional: Any) -> list:
    """The uses of operations in a Functional model, in the order in which Keras runs them, without the inputs.

    A node has `operation`, `arguments` (`args`, `kwargs`, `fill_in`), `input_tensors`, `outputs` and `parent_nodes`.
    Why: `Function.operations` is public, but lists an operation that is used twice once, and without its inputs.
    """
    by_depth = functional._nodes_by_depth
    return [n for depth in sorted(by_depth, reverse=True) for n in by_depth[depth] if n.operation and not n.is_input]


def nodes_of(operation: Any, after: bool = False) -> list:
    """All uses of an operation, in any model; `after`: the uses of other operations that take its outputs.

    Why: `Layer.input` and `Layer.output` are public, and of the first use only.
    """
    return operation._outbound_nodes if after else operation._inbound_nodes


def run_graph_by(functional: Any, run: Callable) -> None:
    """From now on `run(ordinary, inputs, operation_fn, call_fn)` runs this Functional model.

    `ordinary(inputs, operation_fn, call_fn)` is what Keras would do. Setting it again has no effect.

    Why: what no posterior draw changes runs once for all samples, nested models entered. A model of the first part and
    one of the rest (`keras.Model` on tensors in the middle) would be public, but a nested model cannot be cut in two
    within its outer one, and taken out of it its layers' names may clash.
    """
    if "_run_through_graph" not in vars(functional):
        ordinary = functools.partial(type(functional)._run_through_graph, functional)
        object.__setattr__(functional, "_run_through_graph", functools.partial(run, ordinary))


def unconnected_copy(operation: Any) -> Any:
    """A copy of an operation of `keras.ops` that no graph uses yet.

    Why: `from_config(get_config())` is public, and some of these operations have no config.
    """
    new = copy.copy(operation)
    new._inbound_nodes, new._outbound_nodes = [], []
    return new


# ---- losses, optimisers, training ----


def added_losses(layer: Any) -> set[int]:
    """Ids of the losses that a layer and those in it have added by `add_loss` or as activity regularizers.

    Why: `Layer.losses` is public and computes the weights' regularizers as well, new tensors at each reading.
    """
    if not isinstance(layer, keras.layers.Layer):
        return set()
    return {id(loss) for part in all_layers(layer) for loss in part._get_own_losses()}


def compiled_loss(model: keras.Model) -> Any:
    """The loss of a compiled model, as called on (y, y_pred, sample_weight); None where it has none.

    Why: `Model.compute_loss` is public and adds all other losses to it; `Model.loss` may be a name, a list or a dict.
    """
    return model._compile_loss


def loss_arguments(loss: Any) -> dict:
    """The arguments of a Keras loss beside its reduction, such as `axis` and `ignore_class`; {} of another one.

    Why: `SparseCategoricalCrossentropy` shows its `axis` neither as an attribute nor in its config.
    """
    return getattr(loss, "_fn_kwargs", {})


def compile_arguments(model: keras.Model) -> dict:
    """What `compile` was called with; {} before. Why: the public `get_compile_config` serializes all or raises."""
    return dict(getattr(getattr(model, "_compile_config", None), "config", {}))


def summed_loss(model: keras.Model, loss: Any) -> Any:
    """A loss that a layer added, or a regularizer, as one number of the total; under replicas each has its share.

    Why: the public `Model.compute_loss` adds all of them itself, each once; here some count by their share of samples.
    """
    return model._aggregate_additional_loss(loss)


def update_mean(tracker: keras.metrics.Mean, loss: Any, outputs: Any) -> None:
    """Add the loss of a batch with these outputs to a mean over examples, as Keras tracks `loss`.

    Why: under a strategy a loss is divided by the number of replicas, and Keras multiplies it before it is logged.
    """
    size = keras.ops.shape(keras.tree.flatten(outputs)[0])[0]
    tracker.update_state(unscale_loss_for_distribution(loss), sample_weight=size)


def spare_weight_decay(optimizer: keras.optimizers.Optimizer, variables: list) -> None:
    """Exclude these variables from an optimiser's weight decay, before it is built.

    Why: the public `exclude_from_weight_decay` forgets what was excluded before.
    """
    spared = {optimizer._var_key(variable) for variable in variables}
    optimizer._exclude_from_weight_decay = spared | getattr(optimizer, "_exclude_from_weight_decay", set())


def optimized_variables(optimizer: keras.optimizers.Optimizer) -> list:
    """The variables that a built optimiser updates. Why: `Optimizer.variables` are the optimiser's own."""
    return list(optimizer._trainable_variables)


def moving_averages(optimizer: keras.optimizers.Optimizer) -> list:
    """The moving averages of a built optimiser of `use_ema=True`. Why: `Optimizer.variables` mixes them with slots."""
    return optimizer._model_variables_moving_average


def with_moving_averages(averages_of: Callable) -> Callable:
    """Class decorator: Keras finds `averages_of(optimizer)`. Why: `SwapEMAWeights` looks for them by this name."""

    def decorate(cls):
        cls._model_variables_moving_average = property(averages_of)
        return cls

    return decorate


def strategy_of(model: keras.Model) -> Any:
    """The `tf.distribute` strategy under which a model was made; None without one, and on other backends.

    Why: the public `distribute_strategy` is the strategy of the moment where a model was made under none.
    """
    return getattr(model, "_distribute_strategy", None)


def with_symbolic_build(batch_of: Callable) -> Callable:
    """Class decorator of models: `batch_of(model, iterator, data_batch)` is the batch that their variables are made by.

    None: as Keras does it. Why: under several replicas Keras takes the mean over their batches, which fails for batches
    of unequal size and for workers; it has no public step before training.
    """

    def decorate(cls):
        ordinary = getattr(cls, "_maybe_symbolic_build", None)  # of TensorFlow's trainer alone

        def build(self, iterator=None, data_batch=None):
            batch = batch_of(self, iterator, data_batch)
            if batch is None:
                return ordinary(self, iterator, data_batch)
            with self.distribute_strategy.scope():
                return self._symbolic_build(data_batch=batch)

        if ordinary is not None:
            cls._maybe_symbolic_build = build
        return cls

    return decorate


# ---- stateless scopes, saving ----


def in_stateless_scope() -> bool:
    """Whether variables are now stood for by values, as in Keras's JAX training step.

    Why: `keras.StatelessScope` is public, the question whether one is open is not.
    """
    return backend.in_stateless_scope()


def current_values(variables: list) -> list:
    """The variables' values in the open stateless scope, in their own precision.

    Why: `Variable.value` is public, and rounded to half precision within a layer of mixed precision.
    """
    scope = backend.get_stateless_scope()
    found = [scope.get_current_value(variable) for variable in variables]
    return [v._value if value is None else value for v, value in zip(variables, found, strict=True)]


def as_trusted(cls: type, config: dict, custom_objects: dict) -> Any:
    """`cls.from_config(config)` of a live object's config: Lambda layers in it are no foreign code.

    Public: `deserialize_keras_object` with `safe_mode=False`. It replaces `SafeModeScope`.
    """
    name = "sbn_tf>as_trusted"
    given = {"module": None, "class_name": name, "config": config, "registered_name": name}
    return keras.saving.deserialize_keras_object(given, {**custom_objects, name: cls}, safe_mode=False)


def of_any_backend(config: Any) -> Any:
    """A compile config in which no optimiser is named by torch's own module.

    Why: on torch Keras saves `Adam` as a class of `keras.src.backend.torch`, which no other backend can import.
    """
    if not isinstance(config, dict):
        return config
    found = {key: of_any_backend(value) for key, value in config.items()}
    if str(found.get("module")).startswith("keras.src.backend.torch.optimizers."):
        found |= {"module": "keras.optimizers", "registered_name": None}
    return found
