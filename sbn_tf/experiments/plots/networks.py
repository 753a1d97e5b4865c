"""Pictures of a network: its training, its saliency, its masks and its scales."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import MaxNLocator, PercentFormatter
from numpy.typing import ArrayLike

from sbn_tf.experiments.plots.style import BLUE, GREY, ORANGE, plain


def plot_history(histories: Mapping[str, Mapping[str, Sequence[float | None]]], keys: Sequence[str], ax: Axes) -> Axes:
    """Training curves: a colour for each run, a line style for each key.

    Args:
        histories: run name -> `History.history`: key -> one value for each epoch, or None.
        keys: what to draw, such as `["loss", "val_loss"]`; a run that lacks a key is drawn without it.
        ax: where to draw.

    Returns:
        `ax`. Epochs count from 1, as Keras prints them.
    """
    styles = ("-", "--", ":", "-.")
    colours = plt.get_cmap("viridis")(np.linspace(0, 0.85, max(len(histories), 1)))
    for (name, history), colour in zip(histories.items(), colours, strict=False):
        for index, key in enumerate(keys):
            values = np.asarray(history.get(key, []), "float64")
            known = np.flatnonzero(~np.isnan(values))  # not each epoch is validated
            if len(known):
                label = name if len(keys) == 1 else f"{name}, {key}"
                marker = "o" if len(known) == 1 else None
                style = styles[index % len(styles)]
                ax.plot(known + 1, values[known], style, color=colour, label=label, marker=marker)
    ax.set_xlabel("epoch")
    ax.set_ylabel(" / ".join(keys))
    ax.xaxis.set_major_locator(MaxNLocator(integer=True))
    if ax.get_legend_handles_labels()[0]:
        ax.legend(frameon=False, fontsize="small")
    return plain(ax)


def plot_masks_by_layer(ax: Axes, names: Sequence[str], num_bayesian: ArrayLike, num_weights: ArrayLike) -> Axes:
    """How much of each layer is Bayesian: a bar for each layer, the network's input at the top.

    The axis is logarithmic, since fractions run from one weight in a million to all; a layer with none has no
    bar. Its counts stand beside each bar.

    Args:
        ax: where to draw.
        names: of the layers, from input to output.
        num_bayesian: Bayesian weights in each layer.
        num_weights: all eligible weights in each layer.

    Returns:
        `ax`.
    """
    num_bayesian, num_weights = np.asarray(num_bayesian), np.asarray(num_weights)
    fractions = num_bayesian / np.maximum(num_weights, 1)
    positive = fractions[fractions > 0]
    total = num_bayesian.sum() / max(num_weights.sum(), 1)
    left = 10 ** np.floor(np.log10(min(positive.min(), total)) - 0.5) if positive.size else 1e-3
    rows = np.arange(len(names))
    ax.barh(rows, np.where(fractions > 0, fractions, np.nan) - left, left=left, color=BLUE, height=0.7)
    for row, fraction in enumerate(fractions):
        text = f" {num_bayesian[row]:,} of {num_weights[row]:,}"
        box = {"facecolor": "white", "edgecolor": "none", "pad": 0.5}
        ax.text(max(fraction, left), row, text, va="center", fontsize="small", bbox=box)
    if total > 0:
        ax.axvline(total, color=ORANGE, linestyle="--", linewidth=1, zorder=0)
    ax.set_xscale("log")
    # Room for the counts of a layer that is wholly Bayesian.
    ax.set_xlim(left, 10 ** (-0.45 * np.log10(left)))
    ax.set_xticks([tick for tick in ax.get_xticks() if left <= tick <= 1])
    ax.minorticks_off()
    ax.set_yticks(rows, names, fontsize="small")
    ax.set_ylim(len(rows) - 0.5, -0.5)  # also where the first layer has no bar
    ax.set_xlabel(f"Bayesian fraction of the layer's weights (dashed: whole network, {total:.3g})")
    return plain(ax)


def plot_scores(ax: Axes, scores: ArrayLike, chosen: ArrayLike) -> Axes:
    """Histogram of log10 of the saliency, and which weights are Bayesian.

    Args:
        ax: where to draw.
        scores: any shape, non-negative. Zeros have no logarithm: they are counted in the legend.
        chosen: bool, of the same shape: which of them are Bayesian (a threshold would take all equal scores).

    Returns:
        `ax`.

    Raises:
        ValueError: `chosen` of another type or shape.
    """
    chosen = np.asarray(chosen)
    if chosen.dtype != bool or chosen.shape != np.shape(scores):
        raise ValueError(f"Expected chosen, bool {np.shape(scores)}. Received: {chosen.dtype} {chosen.shape}")
    scores, chosen = np.asarray(scores, "float64").ravel(), chosen.ravel()
    threshold = scores[chosen].min() if chosen.any() else 0.0
    positive = scores[scores > 0]
    if positive.size:
        logs = np.log10(positive)
        bins = np.linspace(logs.min(), logs.max() + 1e-9, 61).tolist()
        counts, _, _ = ax.hist(logs, bins, color=GREY)
        ax.hist(logs[chosen[scores > 0]], bins, color=BLUE)
    num_selected, num_zero = int(chosen.sum()), int((scores[~chosen] == 0).sum())
    handles: list[Artist] = [
        Patch(color=BLUE, label=f"Bayesian: {num_selected:,} ({num_selected / max(scores.size, 1):.2%})"),
        Patch(color=GREY, label=f"the others: {scores.size - num_selected:,}"),
    ]
    if num_zero:
        handles.append(Patch(color="none", label=f"of the others exactly zero: {num_zero:,}"))
    if threshold > 0:
        ax.axvline(np.log10(threshold), color=ORANGE, linestyle="--")
        handles.append(Line2D([], [], color=ORANGE, linestyle="--", label=f"smallest chosen: {threshold:.2g}"))
    ax.set_yscale("log")
    if positive.size:
        ax.set_ylim(0.7, 2 * np.max(counts) ** 1.6)  # room for the legend
    ax.set_xlabel("log10 of the saliency")
    ax.set_ylabel("weights")
    ax.legend(handles=handles, frameon=False, fontsize="small")
    return plain(ax)


def plot_saliency_against_cost(ax: Axes, costs: ArrayLike, kept: ArrayLike, num_samples: int = 5) -> Axes:
    """Saliency that a selection keeps against what its samples cost: a step at each place where more is kept.

    Args:
        ax: where to draw.
        costs: passes of the whole network, rising, as from `saliency.saliency_against_cost`.
        kept: share of all saliency, 0..1, of each.
        num_samples: of the costs: the most that they can be.

    Returns:
        `ax`.
    """
    costs, kept = np.asarray(costs), np.asarray(kept)
    # Beyond the last step nothing more is to be had; the line goes on to the price of selecting anywhere.
    ax.step([*costs, max(num_samples, costs[-1])], [*kept, kept[-1]], where="post", color=BLUE, linewidth=1.2)
    ax.plot(costs, kept, "o", color=BLUE, markersize=4)
    ax.set_xlim(1, num_samples * 1.02)
    ax.set_ylim(0, 1.08 * kept[-1] if kept[-1] > 0 else 1)
    ax.yaxis.set_major_formatter(PercentFormatter(1))
    ax.set_xlabel(f"cost of {num_samples} samples (passes; layers before the first draw run once)")
    ax.set_ylabel("share of all saliency kept")
    return plain(ax)


def plot_scales(ax: Axes, before: ArrayLike, after: ArrayLike) -> Axes:
    """Posterior scales before and after training, as histograms over a logarithmic axis.

    Scales that are all equal, as before training they often are, are drawn as a line.

    Args:
        ax: where to draw.
        before: any shape, positive standard deviations of the Bayesian weights.
        after: the same, later.

    Returns:
        `ax`.
    """
    groups = {
        "before training": np.asarray(before, "float64").ravel(),
        "after training": np.asarray(after, "float64").ravel(),
    }
    pooled = np.concatenate(list(groups.values()))
    low, high = np.log10(pooled.min()), np.log10(pooled.max())
    margin = max(0.05 * (high - low), 0.02)
    bins = np.logspace(low - margin, high + margin, 50).tolist()
    for (name, scales), colour in zip(groups.items(), (GREY, BLUE), strict=True):
        label = f"{name}: median {np.median(scales):.3g}"
        if scales.max() < 1.001 * scales.min():
            ax.axvline(scales[0], color=colour, linewidth=3, label=label)
        else:
            ax.hist(scales, bins, color=colour, alpha=0.75, label=label)
    ax.set_xscale("log")
    ticks = np.logspace(low - margin, high + margin, 6)[1:-1]
    ax.set_xticks(ticks, [f"{tick:.2g}" for tick in ticks])
    ax.minorticks_off()
    ax.set_ylim(top=1.5 * ax.get_ylim()[1])  # room for the legend
    ax.set_xlabel("posterior scale (standard deviation of a weight)")
    ax.set_ylabel("Bayesian weights")
    ax.legend(frameon=False, fontsize="small")
    return plain(ax)
