"""Selections that look at the network: whole output channels, and weights that are late enough to be cheap."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

import keras
import numpy as np

from sbn_tf.core.checks import check_fraction
from sbn_tf.core.graph import Graph
from sbn_tf.core.weights import Weight

__all__ = [
    "best_of_each_channel",
    "best_within",
    "captured",
    "check_selection",
    "counts_by_layer",
    "kept_against_cost",
    "overlap",
    "whole_channels",
]


def check_selection(scores: Mapping, scope: str, model: keras.Model | None, cost_aware: float | None) -> None:
    """Raise a ValueError for scores or options that `top_k` cannot use."""
    if scope not in ("global", "layer", "channel"):
        raise ValueError(f'Expected scope "global", "layer" or "channel". Received: scope={scope!r}')
    received = "empty scores" if isinstance(scores, Mapping) else f"scores={scores!r}"
    if not isinstance(scores, Mapping) or not scores or not all(np.size(s) for s in scores.values()):
        raise ValueError(f"Expected scores of at least one weight, from saliency(...). Received: {received}.")
    for key, values in scores.items():
        values = np.asarray(values)
        if values.dtype.kind in "cmMOSU":
            raise ValueError(f"Expected scores that are real numbers. Received: {values.dtype} in {key!r}.")
        if not np.isfinite(values).all():
            raise ValueError(f"Expected finite scores. Received: NaN or infinity in {key!r}.")
    if model is None and (scope == "channel" or cost_aware is not None):
        raise ValueError('Expected the model of the scores for scope="channel" or cost_aware. Received: model=None')
    if cost_aware is not None:
        check_fraction("cost_aware", cost_aware)


def overlap(a: Mapping, b: Mapping) -> float:
    """Share of `a`'s Bayesian entries that are Bayesian in `b` too, 0..1."""
    return sum(int((a[k] & b[k]).sum()) for k in a if k in b) / max(sum(int(m.sum()) for m in a.values()), 1)


def captured(scores: Mapping, masks: Mapping) -> float:
    """Share of all saliency that the chosen entries have, 0..1."""
    total = sum(float(np.sum(s, dtype="float64")) for s in scores.values())
    chosen = sum(float(np.sum(scores[key][mask], dtype="float64")) for key, mask in masks.items())
    return chosen / total if total else 0.0


def counts_by_layer(sizes: Iterable[int], r_bayes: float, n: int) -> np.ndarray:
    """How many entries each weight gives if all give the same share, `round(r_bayes * n)` in all.

    What rounding leaves over goes to the weights with the largest remainders.
    """
    sizes = np.array(list(sizes))
    share = r_bayes * (n / sizes.sum()) * sizes
    counts = np.floor(share).astype(int)
    order = np.argsort(counts - share, kind="stable")
    counts[order[: round(float(r_bayes) * n) - counts.sum()]] += 1
    return counts


# ---- channels ----


def whole_channels(scores: Mapping, weights: Mapping[str, Weight], k: int) -> dict[str, np.ndarray]:
    """Masks of whole output channels with at most k entries, taken by saliency per entry as long as they fit.

    An output channel is an entry of the last axis of a Dense or convolution kernel, of the second last of a transposed
    one, an (input channel, multiplier) pair of a depthwise one, the kernel's output letters of an EinsumDense, a column
    of an Embedding (a Dense of one-hot words), and the entry of the layer's bias that is added to it.

    Raises:
        ValueError: no channel fits into k entries.
    """
    groups = {}  # the weights that share their channels: a layer's kernel and bias
    for key in scores:
        axes = _channel_axes(weights[key])
        count = int(np.prod([weights[key].variable.shape[a] for a in axes]))
        apart = "depthwise" if weights[key].name == "depthwise_kernel" else None  # no outputs of the layer
        groups.setdefault((id(weights[key].layer), count, apart), {})[key] = axes
    totals, sizes = [], []
    for (_, count, _), members in groups.items():
        rows = [_by_channel(np.asarray(scores[key]), axes, count) for key, axes in members.items()]
        totals.append(sum(r.sum(axis=1, dtype="float64") for r in rows))
        sizes.append(np.full(count, sum(r.shape[1] for r in rows)))
    ends, size = np.cumsum([len(s) for s in sizes])[:-1], np.concatenate(sizes)
    if 0 < k < size.min():
        raise ValueError(
            f"Expected an r_bayes of one channel or more: {size.min()} entries. Received: an r_bayes of {k} entries."
        )
    chosen, left = np.zeros(len(size), bool), k
    for c in np.argsort(-np.concatenate(totals) / size, kind="stable"):
        if size[c] <= left:
            chosen[c], left = True, left - size[c]
    masks = {key: np.zeros(np.shape(s), bool) for key, s in scores.items()}
    for members, channels in zip(groups.values(), np.split(chosen, ends), strict=True):
        for key, axes in members.items():
            moved = np.moveaxis(masks[key], axes, range(len(axes)))  # a view of the mask
            moved[...] = channels.reshape(moved.shape[: len(axes)] + (1,) * (moved.ndim - len(axes)))
    return masks


def best_of_each_channel(scores: Mapping, weights: Mapping[str, Weight]) -> dict[str, np.ndarray]:
    """Masks of the most salient entry of each output channel of each kernel; no entry of biases."""
    masks = {}
    for key, values in scores.items():
        masks[key] = mask = np.zeros(values.shape, bool)
        if values.ndim > 1:
            axes = _channel_axes(weights[key])
            rows = _by_channel(values, axes, int(np.prod([values.shape[a] for a in axes])))
            best = np.arange(rows.shape[1]) == rows.argmax(axis=1)[:, None]
            moved = np.moveaxis(mask, axes, range(len(axes)))  # a view of the mask
            moved[...] = best.reshape(moved.shape)
    return masks


def _by_channel(values, axes, count):
    """(channels, entries of each)."""
    return np.moveaxis(values, axes, range(len(axes))).reshape(count, -1)


def _channel_axes(weight):
    """Axes of a weight that count its layer's output channels."""
    layer, rank, layers = weight.layer, len(weight.variable.shape), keras.layers
    if isinstance(layer, layers.EinsumDense):
        terms, outputs = layer.equation.replace(" ", "").replace("...", "").split("->")
        kernel = terms.split(",")[1]
        channels = [letter for letter in outputs if letter in kernel]  # a bias counts them in this order
        if weight.name == "bias":  # it has the output's letters from the first of `bias_axes` on
            own = outputs[min(outputs.index(letter) for letter in layer.bias_axes) :]
            return tuple(own.index(letter) for letter in channels if letter in own)
        return tuple(kernel.index(letter) for letter in channels) or (rank - 1,)
    transposed = (layers.Conv1DTranspose, layers.Conv2DTranspose, layers.Conv3DTranspose)
    if isinstance(layer, transposed) and weight.name == "kernel":
        return (rank - 2,)
    depthwise = isinstance(layer, layers.DepthwiseConv1D | layers.DepthwiseConv2D) and weight.name == "kernel"
    if depthwise or weight.name == "depthwise_kernel":
        return (rank - 2, rank - 1)
    return (rank - 1,)


# ---- cost ----


def best_within(scores: Mapping, r_bayes: float, graph: Graph, most: float, select: Callable) -> Mapping:
    """Masks of the k most salient entries in weights whose fan-out is at most `most`; `k = round(r_bayes * n)`.

    `select(keys)` gives masks of the k best entries in the weights `keys`. The fan-out of weights is the share of the
    network's operations that use one of them or come after one.

    Raises:
        ValueError: no set of weights with k entries was found. The message names a bound that is enough.
    """
    k = round(float(r_bayes) * sum(map(np.size, scores.values())))
    sets = _late_sets(scores, k, graph, most) if k else [set(scores)]
    return max((select(keys) for keys in sets), key=lambda masks: captured(scores, masks))


def kept_against_cost(
    scores: Mapping, r_bayes: float, graph: Graph, select: Callable, num_samples: int, num_points: int = 30
) -> tuple[np.ndarray, np.ndarray]:
    """Costs, in passes of the network, and the share of all saliency that the best k entries at each cost have.

    One selection is made for each of at most `num_points` bounds on the fan-out, evenly among the weights' own; the
    highest is always among them. Bounds that leave fewer than k entries, or keep no more than a lower one, are left
    out.
    """
    bounds = np.unique([graph.fan_out([key]) for key in scores])
    bounds = bounds[np.unique(np.linspace(0, len(bounds) - 1, num_points).round().astype(int))]
    points: list[tuple[float, float]] = []
    for bound in [*bounds, 1.0]:
        try:
            masks = select(set(scores)) if bound == 1 else best_within(scores, r_bayes, graph, bound, select)
        except ValueError:  # too few entries are as late as this
            continue
        kept = captured(scores, masks)
        if not points or kept > points[-1][1]:
            fan_out = graph.fan_out([key for key, mask in masks.items() if mask.any()])
            points.append((1 + (num_samples - 1) * fan_out, kept))
    costs, kept = np.array(points).T
    return costs, kept


def _late_sets(scores, k, graph, most):
    """Sets of weights that have at least k entries and a fan-out of at most `most`.

    In a chain of layers the fan-out only falls from input to output, and the whole tail that the bound admits is the
    best set. Where the graph branches, the number of sets grows exponentially. Two are then grown weight by weight as
    long as the bound is kept: latest first, and most salient first. If neither has k entries, a third is grown by
    entries per added fan-out: a small weight with a large fan-out may have shut out a large one.
    """
    own = {key: graph.fan_out([key]) for key in scores}
    size = {key: np.size(s) for key, s in scores.items()}
    sums = {key: float(np.sum(s, dtype="float64")) for key, s in scores.items()}
    latest_first = sorted(scores, key=own.__getitem__)
    found = []
    for order in (latest_first, sorted(scores, key=sums.__getitem__, reverse=True)):
        keys = []
        for key in order:
            if own[key] <= most and graph.fan_out([*keys, key]) <= most:
                keys.append(key)
        if set(keys) not in found:
            found.append(set(keys))
    if max(_entries(size, keys) for keys in found) < k:
        found.append(_most_entries(size, graph, most, [key for key in latest_first if own[key] <= most]))
    enough = [keys for keys in found if _entries(size, keys) >= k]
    if not enough:
        sizes = np.cumsum([size[key] for key in latest_first])
        needed = graph.fan_out(latest_first[: int(np.searchsorted(sizes, k)) + 1])
        raise ValueError(
            f"Expected {k:,} entries in weights of a fan-out of {most:g} or less. Received: weights with "
            f"{max(_entries(size, keys) for keys in found):,}. Take cost_aware={np.ceil(needed * 1e3) / 1e3:g}, or a "
            "smaller r_bayes."
        )
    return enough


def _entries(size, keys):
    return sum(size[key] for key in keys)


def _most_entries(size, graph, most, keys):
    """Weights whose fan-out is at most `most`, taken one by one by entries per added fan-out."""
    chosen, left, now = [], list(keys), 0.0
    while left:
        added = {key: graph.fan_out([*chosen, key]) - now for key in left}
        left = [key for key in left if now + added[key] <= most]
        if left:
            best = max(left, key=lambda key: size[key] / max(added[key], 1e-12))
            now += added[best]
            chosen.append(best)
            left.remove(best)
    return set(chosen)
