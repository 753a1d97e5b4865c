"""Estimators of the expected loss: which draw sees which examples in one training step."""

from __future__ import annotations

import keras
from keras import ops

from sbn_tf.core.batch import first_rows, join_outputs, part_bounds
from sbn_tf.core.context import batch_draws
from sbn_tf.core.graph import Graph, layers_of
from sbn_tf.core.keras_internals import added_losses, all_layers, is_called_by_another
from sbn_tf.core.losses import set_added_shares
from sbn_tf.core.optimizers import others_stay
from sbn_tf.core.sampler import one_draw
from sbn_tf.layers import masked_layers

__all__ = ["ESTIMATORS", "check_estimator", "one_step", "refuse_as_a_part"]


def _all_draws(model: keras.Model, inputs) -> dict:
    """Each draw sees the whole batch: `{"samples": [one output a draw]}`."""
    num_samples = model.num_samples
    with model.graph.sharing(training=True) as losses:
        samples = [one_draw(model.network, inputs, True, s) for s in range(num_samples)]
    set_added_shares(model, dict.fromkeys(losses, 1.0), 1 / num_samples)
    return {"samples": samples}


def one_pass(model: keras.Model, inputs):
    """All draws share one pass; by parts, where a layer may mix examples."""
    if model.graph.mixes_batch() is not None:
        return _in_parts(model, inputs)
    set_added_shares(model, {}, 1.0)
    with batch_draws(model.estimator, model.num_samples, shared=model.graph.reused_layers()):
        return model.network(inputs, training=True)


def _one_in_turn(model: keras.Model, inputs):
    """One draw sees the whole batch; the next step is the next draw's."""
    outputs = one_draw(model.network, inputs, True, ops.convert_to_tensor(model.turn))
    model.turn.assign(model.turn + 1)
    set_added_shares(model, {}, 1.0)
    return outputs


ESTIMATORS = {"all": _all_draws, "split": one_pass, "flipout": one_pass, "local": one_pass, "turns": _one_in_turn}


def refuse_as_a_part(model: keras.Model) -> None:
    """Refuse to train a model as a part of another one, which would see one of its samples only."""
    if is_called_by_another(model):
        raise ValueError(
            f"'{model.name}' cannot be trained as a part of another model, which would see one of its samples only. "
            "Build that model of the trained network and convert it whole."
        )


def one_step(model: keras.Model, train_step, *args):
    """A training step. With "turns", members that did not train, and an optimiser's slots of them, stay unchanged."""
    if model.estimator != "turns":
        return train_step(*args)
    position = [id(v) for v in model.non_trainable_variables].index(id(model.turn))
    optimizer = model.optimizer
    names = [v.path for v in (*model.trainable_variables, *optimizer.variables)]
    if keras.backend.backend() == "jax":
        state, count = args[0], len(args[0][0])
        logs, (trained, others, slots, metrics) = train_step(*args)
        after = others_stay([*state[0], *state[2]], [*trained, *slots], names, state[1][position])
        return logs, (after[:count], others, after[count:], metrics)
    turn = ops.copy(model.turn)
    chosen = [v for v in (*model.trainable_variables, *optimizer.variables) if "member_offsets" in v.path]
    before = [ops.copy(v) for v in chosen]
    logs = train_step(*args)
    for variable, value in zip(chosen, others_stay(before, chosen, [v.path for v in chosen], turn), strict=True):
        variable.assign(value)
    return logs


def check_estimator(model: keras.Model) -> None:
    """Refuse an estimator with which one call of the network would not be several draws of it.

    Raises:
        ValueError: layers that mix examples, batch norm in training mode or a state after a draw, or noise for each
            example of a posterior that is not Gaussian.
    """
    graph, network, estimator = model.graph, model.network, model.estimator
    _check_states(graph)
    posteriors = [one for layer in masked_layers(network) for _, one in layer.posteriors.items()]
    if estimator in ("flipout", "local") and not all(one.is_gaussian for one in posteriors):
        raise ValueError(
            f"Expected Gaussian posteriors for estimator={estimator!r}, which gives each example noise of its own. "
            'Received: members or mixtures. Use "split", "turns" or "all".'
        )
    mixing = graph.mixes_batch()
    if mixing is not None and estimator in ("flipout", "local"):
        raise ValueError(
            f"Expected layers that keep axis 0 as the batch for estimator={estimator!r}. Received: '{mixing}', "
            'which is not known to (a subclassed model cannot be looked into). Use "split" or "all".'
        )
    if estimator in ("all", "turns") or model.batch_norm == "frozen":
        return
    if mixing is not None and any(_trains_batch_norm(layer) for layer in all_layers(network)):
        raise ValueError(
            f"estimator=\"split\" would show batch norm batch/num_samples images a draw, since '{mixing}' is not "
            'known to keep axis 0 as the batch. Use batch_norm="frozen" with it, or estimator="all".'
        )
    for step in _after_draws(graph):
        if any(_trains_batch_norm(layer) for layer in layers_of(step.layer)):
            raise ValueError(
                "Expected no batch norm in training mode after a Bayesian weight, or in one wrapped layer with it: "
                f"one pass would mix draws in it. Received: '{step.name}', estimator={estimator!r}, "
                f'batch_norm={model.batch_norm!r}. Use estimator="all", or batch_norm="frozen".'
            )


def _in_parts(model, inputs):
    """The estimator "split" by one call a draw, each on its part of the batch. Outputs in the batch's order.

    A draw that is left without examples, as by the last batch of an epoch, runs on one: a mean over none is NaN.
    What a part adds as loss counts by the part's share of the batch: nothing, where that one example is no part.
    """
    size = ops.shape(keras.tree.flatten(inputs)[0])[0]
    outputs, shares, known = [], {}, added_losses(model.network)
    for s, (start, stop) in enumerate(part_bounds(size, model.num_samples)):
        end = max(stop, start + 1) if isinstance(size, int) else ops.maximum(stop, start + 1)
        part = keras.tree.map_structure(lambda t, start=start, end=end: t[start:end], inputs)
        outputs.append(first_rows(one_draw(model.network, part, True, s), stop - start))
        share = (stop - start) / (max(size, 1) if isinstance(size, int) else ops.maximum(size, 1))
        shares.update({key: share for key in added_losses(model.network) - known - shares.keys()})
    set_added_shares(model, shares, 1.0)
    return join_outputs(outputs)


def _check_states(graph: Graph):
    """Refuse what would carry a state from one draw to the next."""
    once = graph.runs_once(training=True)
    for step in graph.steps:
        if step.name not in once and any(getattr(layer, "stateful", False) for layer in layers_of(step.layer)):
            raise ValueError(
                "Expected no stateful=True in or after what runs again for each draw: a draw would go on from the "
                f"state of the one before. Received: '{step.name}'. Make it of stateful=False."
            )


def _trains_batch_norm(layer):
    return isinstance(layer, keras.layers.BatchNormalization) and layer.trainable


def _after_draws(graph):
    """The operations of a graph that use a Bayesian weight or depend on one."""
    after = []
    for step in graph.steps:
        own = isinstance(step.layer, keras.layers.Layer) and bool(masked_layers(step.layer))
        after.append(own or any(after[source] for source in step.sources))
    return [step for step, depends in zip(graph.steps, after, strict=True) if depends]
