"""Pictures of probabilities: whether they mean what they say, and whether uncertainty finds the errors."""

from __future__ import annotations

import itertools
from collections.abc import Mapping

import numpy as np
from matplotlib.axes import Axes
from matplotlib.lines import Line2D
from numpy.typing import ArrayLike

from sbn_tf import metrics
from sbn_tf.experiments.plots.style import GREY, colours, plain

__all__ = ["plot_reliability_curves", "plot_risk_coverage"]


def plot_reliability(
    ax: Axes, probs: ArrayLike, targets: ArrayLike, num_bins: int = 15, binning: str = "width"
) -> Axes:
    """Observed frequency against mean probability in bins, with the count of each bin.

    Args:
        ax: where to draw.
        probs: any shape, probabilities of 1 (the posterior predictive mean).
        targets: same shape, in 0..1.
        num_bins: number of bins, as in `metrics.ece`.
        binning: "width", bins of equal width over [0, 1], or "mass", of equal count.

    Returns:
        `ax`, the first of two: the counts are drawn on a twin axis, logarithmic.
    """
    return plot_reliability_curves(ax, {"predictions": (probs, targets)}, num_bins, binning)


def plot_reliability_curves(
    ax: Axes, curves: Mapping[str, tuple[ArrayLike, ArrayLike]], num_bins: int = 15, binning: str = "width"
) -> Axes:
    """Reliability of several methods in one picture: a curve for each, and the counts of its bins below.

    Args:
        ax: where to draw.
        curves: method -> (probs, targets), each of any shape: probabilities of 1, and targets in 0..1.
        num_bins: number of bins, as in `metrics.ece`.
        binning: "width", bins of equal width over [0, 1], or "mass", of equal count.

    Returns:
        `ax`, the first of two: the counts are drawn on a twin axis, logarithmic, as bars for one method and as
        steps for several; with equal-count bins of several methods they are in the axis label. The legend has the ECE.

    Raises:
        ValueError: no curve, or an unknown binning; probabilities or targets outside 0..1, NaN or of different shapes.
    """
    if not curves or binning not in ("width", "mass"):
        raise ValueError(f'Expected a curve and binning "width" or "mass". Received: {len(curves)}, {binning!r}')
    eces = {name: metrics.ece(y, p, num_bins, binning=binning) for name, (p, y) in curves.items()}
    flat = {name: [np.asarray(values, "float64").ravel() for values in pair] for name, pair in curves.items()}
    counts, most = ax.twinx(), 1.0
    ax.plot([0, 1], [0, 1], color="black", linestyle=":", linewidth=1, label="calibrated")
    for (name, (probs, targets)), colour in zip(flat.items(), colours(len(curves)), strict=True):
        edges, count, mean_probs, frequency = _bins(probs, targets, num_bins, binning)
        ax.plot(mean_probs, frequency, "o-", color=colour, markersize=4, label=f"{name}: ECE {eces[name]:.4f}")
        if len(curves) == 1:
            width = np.maximum(np.diff(edges), 0.004)  # a bin of one probability is seen
            counts.bar((edges[1:] + edges[:-1]) / 2, count, 0.9 * width, color=GREY, alpha=0.6)
        elif binning == "width":
            counts.stairs(np.maximum(count, 0.5), edges, color=colour, alpha=0.8, baseline=None)
        most = max(most, count.max())
    counts.set_yscale("log")
    counts.set_ylim(0.5, 0.5 * (2 * most) ** 2.5)  # the bars stay in the lower part
    counts.set_yticks([tick for tick in 10.0 ** np.arange(12) if tick <= most])
    counts.minorticks_off()
    counts.set_ylabel(f"predictions in the bin ({'bars' if len(curves) == 1 else 'steps'})", loc="bottom")
    counts.spines["top"].set_visible(False)
    alike = binning == "mass" and len(curves) > 1
    counts.set_visible(not alike)
    ax.set_zorder(counts.get_zorder() + 1)
    ax.patch.set_visible(False)
    ax.set_xlim(0, 1)
    ax.set_ylim(0, 1.02)
    ax.set_xlabel("predicted probability" + f" (bins of about {probs.size / num_bins:.0f})" * alike)
    ax.set_ylabel("observed frequency")
    ax.legend(frameon=False, fontsize="small", loc="upper left")
    ax.spines["top"].set_visible(False)
    return ax


def _bins(probs, targets, num_bins, binning):
    """Edges and counts of the bins; mean probability and frequency of 1 of those that are not empty."""
    index, edges = np.minimum((probs * num_bins).astype(int), num_bins - 1), np.linspace(0, 1, num_bins + 1)
    if binning == "mass":
        _, group, count = np.unique(probs, return_inverse=True, return_counts=True)
        ranks = (np.cumsum(count) - count / 2) * num_bins / len(probs)  # equal values share a bin
        index = np.unique(np.minimum(ranks.astype(int), num_bins - 1)[group], return_inverse=True)[1]  # without gaps
        borders = [(probs[index == k].min(), probs[index == k].max()) for k in range(index.max() + 1)]
        inner = [(left[1] + right[0]) / 2 for left, right in itertools.pairwise(borders)]
        edges = np.array([borders[0][0], *inner, borders[-1][1]])
    count, sum_probs, sum_targets = (np.bincount(index, w, len(edges) - 1) for w in (None, probs, targets))
    used = count > 0
    return edges, count, sum_probs[used] / count[used], sum_targets[used] / count[used]


def plot_risk_coverage(ax: Axes, curves: Mapping[str, tuple[np.ndarray, np.ndarray]], oracle: bool = True) -> Axes:
    """Mean error of the images that are kept, when those of the highest uncertainty are refused first.

    Useful uncertainty bends its curve below the dashed line, which refuses at random, and towards the dotted one of
    its oracle, which refuses the worst images first. The legend gives the areas below the curves; smaller is better.

    Args:
        ax: where to draw.
        curves: method -> (uncertainty, risk), each (images,): as `metrics.risk_coverage` takes them.
        oracle: draw each method's oracle.

    Returns:
        `ax`.

    Raises:
        ValueError: no curve.
    """
    if not curves:
        raise ValueError("Expected a curve or more. Received: none")
    for (name, (uncertain, risk)), colour in zip(curves.items(), colours(len(curves)), strict=True):
        label = f"{name}: {metrics.area_under_risk_coverage(uncertain, risk):.4f}"
        if oracle:
            label += f" (oracle {metrics.area_under_risk_coverage(risk, risk):.4f})"
            ax.plot(*metrics.risk_coverage(risk, risk), ":", color=colour, linewidth=1)
        ax.plot(*metrics.risk_coverage(uncertain, risk), color=colour, linewidth=1.6, label=label)
        ax.plot([0, 1], [np.mean(risk)] * 2, "--", color=colour, linewidth=0.8)
    handles, _ = ax.get_legend_handles_labels()
    handles.append(Line2D([], [], color="black", linestyle="--", linewidth=0.8, label="refused at random"))
    if oracle:
        handles.append(Line2D([], [], color="black", linestyle=":", linewidth=1, label="the worst refused first"))
    ax.set_xlim(0, 1)
    low, high = ax.get_ylim()
    ax.set_ylim(min(0, low), high + 0.075 * (len(handles) + 1) * (high - min(0, low)))  # room for the legend
    ax.set_xlabel("coverage (share of the images that is kept)")
    ax.set_ylabel("mean risk of the kept images")
    small = {"frameon": False, "fontsize": "small", "title_fontsize": "small"}
    ax.legend(handles=handles, title="area below the curve", loc="upper left", alignment="left", **small)
    return plain(ax)
