"""Pictures: functions that take axes and arrays, and return the axes.

Nothing here shows or saves a figure, and nothing touches a style that is not its own. Functions with an `ax`
argument draw into it and return it; the panels (`plot_segmentation`, `plot_comparison`, `plot_sample_masks`,
`plot_classification`, `plot_wall`) make a figure and return its array of axes. Images are grey or RGB, uncertainty is
in nats on viridis.
"""

from __future__ import annotations

import itertools
import textwrap
from collections.abc import Mapping, Sequence

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure, SubFigure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import FuncFormatter, MaxNLocator, NullFormatter, PercentFormatter
from numpy.typing import ArrayLike

from sbn_tf import metrics
from sbn_tf.core import predictions, statistics
from sbn_tf.metrics import majority_mask, uncertainty

__all__ = [
    "format_table",
    "plot_classification",
    "plot_comparison",
    "plot_cost",
    "plot_differences",
    "plot_history",
    "plot_intervals",
    "plot_masks_by_layer",
    "plot_reliability",
    "plot_reliability_curves",
    "plot_risk_coverage",
    "plot_saliency_against_cost",
    "plot_sample_masks",
    "plot_scales",
    "plot_scores",
    "plot_segmentation",
    "plot_sweep",
    "plot_wall",
    "short_name",
]

BLUE, ORANGE, GREY = "#3b6ea8", "#d9822b", "#b8bfc7"
# The paper's Figure 3.
TRUE_POSITIVE, FALSE_POSITIVE, FALSE_NEGATIVE = "#2ca02c", "#1f5fd6", "#d62728"
RATERS = ("#ffd000", "#00d5ff", "#ff6ad5", "#7dff6a", "#ff8a3d", "#b79bff")


def _plain(ax: Axes) -> Axes:
    ax.spines[["top", "right"]].set_visible(False)
    return ax


def short_name(name: str, most: int = 24) -> str:
    """A name of at most `most` characters: a longer one is cut, and ends in " ..."."""
    return name if len(name) <= most else name[: most - 4].rstrip() + " ..."


def plot_history(histories: Mapping[str, Mapping[str, Sequence[float]]], keys: Sequence[str], ax: Axes) -> Axes:
    """Training curves: a colour for each run, a line style for each key.

    Args:
        histories: run name -> `History.history`: key -> one value for each epoch.
        keys: what to draw, such as `["loss", "val_loss"]`; a run that lacks a key is drawn without it.
        ax: where to draw.

    Returns:
        `ax`. Epochs count from 1, as Keras prints them.
    """
    styles = ("-", "--", ":", "-.")
    colours = plt.get_cmap("viridis")(np.linspace(0, 0.85, max(len(histories), 1)))
    for (name, history), colour in zip(histories.items(), colours, strict=False):
        for index, key in enumerate(keys):
            values = history.get(key, [])
            if len(values):
                label = name if len(keys) == 1 else f"{name}, {key}"
                marker = "o" if len(values) == 1 else None
                style = styles[index % len(styles)]
                epochs = np.arange(1, len(values) + 1)
                ax.plot(epochs, values, style, color=colour, label=label, marker=marker)
    ax.set_xlabel("epoch")
    ax.set_ylabel(" / ".join(keys))
    ax.xaxis.set_major_locator(MaxNLocator(integer=True))
    if ax.get_legend_handles_labels()[0]:
        ax.legend(frameon=False, fontsize="small")
    return _plain(ax)


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
    return _plain(ax)


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
    return _plain(ax)


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
    ax.set_xlabel(f"cost of {num_samples} samples (passes; what no draw changes runs once)")
    ax.set_ylabel("share of all saliency kept")
    return _plain(ax)


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
    return _plain(ax)


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
        steps for several; of equal-count bins of several methods the label tells them. The ECE is in the legend.

    Raises:
        ValueError: no curve, or an unknown binning; probabilities or targets outside 0..1, NaN or of different shapes.
    """
    if not curves or binning not in ("width", "mass"):
        raise ValueError(f'Expected a curve and binning "width" or "mass". Received: {len(curves)}, {binning!r}')
    flat = {name: [values.ravel() for values in predictions.pair(*pair)] for name, pair in curves.items()}
    num_bins = statistics.check_bins(num_bins)
    counts, most = ax.twinx(), 1.0
    ax.plot([0, 1], [0, 1], color="black", linestyle=":", linewidth=1, label="calibrated")
    for (name, (probs, targets)), colour in zip(flat.items(), _colours(len(curves)), strict=True):
        edges, count, mean_probs, frequency = _bins(probs, targets, num_bins, binning)
        value = metrics.ece(probs, targets, num_bins, binning=binning)
        ax.plot(mean_probs, frequency, "o-", color=colour, markersize=4, label=f"{name}: ECE {value:.4f}")
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
    ax.set_xlabel(
        f"predicted probability (bins of about {probs.size / num_bins:.0f})" if alike else "predicted probability"
    )
    ax.set_ylabel("observed frequency")
    ax.legend(frameon=False, fontsize="small", loc="upper left")
    ax.spines["top"].set_visible(False)
    return ax


def _bins(probs, targets, num_bins, binning):
    """Edges and counts of the bins; mean probability and frequency of 1 of those that are not empty."""
    index = statistics.bin_index(probs, num_bins, binning)
    edges = np.linspace(0, 1, num_bins + 1)
    if binning == "mass":
        index = np.unique(index, return_inverse=True)[1]  # numbered without gaps
        borders = [(probs[index == k].min(), probs[index == k].max()) for k in range(index.max() + 1)]
        inner = [(left[1] + right[0]) / 2 for left, right in itertools.pairwise(borders)]
        edges = np.array([borders[0][0], *inner, borders[-1][1]])
    count, sum_probs, sum_targets = (np.bincount(index, w, len(edges) - 1) for w in (None, probs, targets))
    used = count > 0
    return edges, count, sum_probs[used] / count[used], sum_targets[used] / count[used]


def _colours(number):
    return [BLUE] if number == 1 else list(plt.get_cmap("viridis")(np.linspace(0, 0.85, number)))


def plot_risk_coverage(ax: Axes, curves: Mapping[str, tuple[np.ndarray, np.ndarray]], oracle: bool = True) -> Axes:
    """Mean error of the images that are kept, when those of the highest uncertainty are refused first.

    Useful uncertainty bends its curve below the dashed line, which refuses at random, and towards the dotted one of
    its oracle, which refuses the worst images first. The areas below the curves are in the legend: less is better.

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
    for (name, (uncertain, risk)), colour in zip(curves.items(), _colours(len(curves)), strict=True):
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
    ax.legend(
        handles=handles,
        title="area below the curve",
        loc="upper left",
        alignment="left",
        frameon=False,
        fontsize="small",
        title_fontsize="small",
    )
    return _plain(ax)


def plot_intervals(ax: Axes, rows: list, key: str, band: str | None = "deterministic") -> Axes:
    """One metric of every method: a point and its interval, in the order given.

    Of several seeds the point is their mean, the line the standard deviation, and each seed is a small dot. Trivial
    rows are grey. A row far away from the others is an arrow at the border with its value beside it, so that it does
    not press the others together.

    Args:
        ax: where to draw.
        rows: list of `results.Result`, of one dataset.
        key: of `results.METRICS`.
        band: label of the row whose interval is shaded over all the others; None, or one that is not there: no band.

    Returns:
        `ax`.

    Raises:
        ValueError: an unknown key, or results that do not belong together.
    """
    from sbn_tf.experiments.results import METRICS, group  # these make their tables with this module

    if key not in METRICS:
        raise ValueError(f"Expected a key of results.METRICS, {list(METRICS)}. Received: key={key!r}")
    rows = group(rows)
    low, high = _limits([(row.value(key), row.interval(key)) for row in rows if not row.is_trivial])
    for place, row in enumerate(rows):
        value, colour = row.value(key), GREY if row.is_trivial else BLUE
        if value is None:
            reason = textwrap.shorten(f"undefined: {row.reason(key)}", 60, placeholder=" ...")
            ax.text(
                0.02, place, reason, va="center", fontsize="x-small", color="0.4", transform=ax.get_yaxis_transform()
            )
        elif not low <= value <= high:
            _at_border(ax, value, place, low, high, colour)
        else:
            bounds = row.interval(key)
            if bounds is not None:
                ax.plot(bounds, [place] * 2, color=colour, linewidth=2, solid_capstyle="butt")
            seeds = list(row.values(key).values())
            if len(seeds) > 1:
                ax.plot(seeds, [place] * len(seeds), "|", color=colour, markersize=8)
            ax.plot(value, place, "o", color=colour, markersize=6)
    if all(row.value(key) is None for row in rows):
        ax.set_xticks([])
    base = next((row for row in rows if row.label == band and row.value(key) is not None), None)
    middle = None if base is None else base.value(key)
    if base is not None and middle is not None:
        start, stop = base.interval(key) or (middle, middle)
        ax.axvspan(start, stop, color=ORANGE, alpha=0.15, linewidth=0, zorder=0)
        ax.axvline(middle, color=ORANGE, linestyle="--", linewidth=1, zorder=0)
    ax.set_xlim(low, high)
    ax.set_yticks(range(len(rows)), [row.label for row in rows], fontsize="small")
    ax.set_ylim(len(rows) - 0.5, -0.5)
    better = METRICS[key].better
    if better is not None:
        higher = better == "higher"
        text = "better \u2192" if higher else "\u2190 better"
        ax.set_title(text, fontsize="small", loc="right" if higher else "left")
    lines = "mean and sd of the seeds" if any(len(row.results) > 1 for row in rows) else "95 % interval"
    ax.set_xlabel(f"{key} ({lines})" if any(row.interval(key) for row in rows) else key)
    return _plain(ax)


def plot_cost(ax: Axes, rows: list, x: str = "train_flops_ratio", y: str = "nll") -> Axes:
    """A metric against what the method costs: numbered points, and which is which beside the axes.

    The cost is logarithmic. The stepped line joins the methods that none is both cheaper and better than. Trivial rows
    cost nothing: they are horizontal lines. A row far away from the others is an arrow at the border, its value in the
    legend.

    Args:
        ax: where to draw; the legend is to its right, outside.
        rows: list of `results.Result`, of one dataset; those without this cost or metric are named in the legend.
        x: of `results.COSTS`.
        y: of `results.METRICS`.

    Returns:
        `ax`.

    Raises:
        ValueError: an unknown key, or results that do not belong together.
    """
    from sbn_tf.experiments.results import COSTS, METRICS, group

    if x not in COSTS or y not in METRICS:
        raise ValueError(f"Expected x of results.COSTS and y of results.METRICS. Received: x={x!r}, y={y!r}")
    rows = group(rows)
    shown = [row for row in rows if not row.is_trivial and row.value(y) is not None and (row.value(x) or 0) > 0]
    low, high = _limits([(row.value(y), row.interval(y)) for row in shown])
    ax.set_xscale("log")
    ax.set_ylim(low, high)
    handles, points = [], []
    for number, row in enumerate(shown, 1):
        cost, value, bounds = row.value(x) or 0.0, row.value(y) or 0.0, row.interval(y)  # what is shown has both
        inside, label = low <= value <= high, f"{number}  {row.label}"
        if inside and bounds is not None:
            ax.plot([cost] * 2, bounds, color=BLUE, alpha=0.3, linewidth=1.2)
        marker = "o" if inside else "^" if value > high else "v"
        height = float(np.clip(value, low + 0.01 * (high - low), high - 0.01 * (high - low)))
        ax.plot(cost, height, marker, color=BLUE, markersize=5)
        points.append((cost, height))
        handles.append(Line2D([], [], linestyle="none", label=label if inside else f"{label} ({value:.3g})"))
    handles += _trivial_lines(ax, [row for row in rows if row.is_trivial], y, low, high)
    missing = [row.label for row in rows if not row.is_trivial and row not in shown]
    handles += [Line2D([], [], linestyle="none", label=f"not shown: {label}") for label in missing]
    if METRICS[y].better is not None and shown:
        ax.plot(*_front(points, METRICS[y].better), color=ORANGE, linewidth=1, drawstyle="steps-post", zorder=1)
    if points:
        costs = [cost for cost, _ in points]
        ax.set_xlim(min(costs) / 1.3, max(costs) * 1.3)
        _plain_ticks(ax, min(costs) / 1.3, max(costs) * 1.3)
    better = METRICS[y].better
    ax.set_xlabel(textwrap.fill(f"{COSTS[x][2]} ({x})", 50))
    ax.set_ylabel(f"{y} ({better} is better)" if better else y)
    ax.legend(
        handles=handles, frameon=False, fontsize="small", loc="upper left", bbox_to_anchor=(1.01, 1), handlelength=1.2
    )
    ax.figure.figure.draw_without_rendering()  # the layout, by which the numbers find their places
    _number_points(ax, points)
    return _plain(ax)


def _trivial_lines(ax, rows, key, low, high):
    """Trivial rows as horizontal lines where they are in sight; their legend entries."""
    handles = []
    styles = ("--", ":", "-.", (0, (1, 3)))
    for index, row in enumerate(row for row in rows if row.value(key) is not None):
        value, style = row.value(key), styles[index % len(styles)]
        inside = low <= value <= high
        if inside:
            ax.axhline(value, color="0.5", linestyle=style, linewidth=1, zorder=0)
        options = {"linestyle": style, "color": "0.5"} if inside else {"linestyle": "none"}
        handles.append(Line2D([], [], label=row.label if inside else f"{row.label} ({value:.3g})", **options))
    return handles


def _limits(scores):
    """Limits of an axis that shows (value, interval) of most rows, and leaves out those far away."""
    scores = [(value, bounds or (value, value)) for value, bounds in scores if value is not None]
    if not scores:
        return 0.0, 1.0
    values = np.array([value for value, _ in scores])
    middle = np.median(values)
    reach = 8 * max(np.median([high - low for _, (low, high) in scores]), np.median(np.abs(values - middle)))
    near = [bounds for value, bounds in scores if abs(value - middle) <= reach]
    low, high = min(b[0] for b in near), max(b[1] for b in near)
    margin = 0.08 * (high - low) or 0.05 * abs(high) or 0.05
    return float(low - margin), float(high + margin)


def _at_border(ax, value, place, low, high, colour):
    right = value > high
    inner = 0.02 * (high - low)
    edge = high - inner if right else low + inner
    ax.plot(edge, place, ">" if right else "<", color=colour, markersize=6)
    ax.annotate(
        f"{value:.3g}",
        (edge, place),
        (-6 if right else 6, 0),
        textcoords="offset points",
        ha="right" if right else "left",
        va="center",
        fontsize="x-small",
        color="0.4",
    )


def _front(points, better):
    """Costs and values of the points that no cheaper one equals or betters, by rising cost."""
    sign = 1 if better == "higher" else -1
    front = []
    for cost, value in sorted(points, key=lambda point: (point[0], -sign * point[1])):
        if not front or sign * value > sign * front[-1][1]:
            front.append((cost, value))
    return np.array(front).T


def _plain_ticks(ax, low, high):
    """Ticks at 1, 2, 5 of each decade, or at decades where there are many, in plain numbers."""
    decades = 10.0 ** np.arange(np.floor(np.log10(low)), np.ceil(np.log10(high)) + 1)
    ticks = decades if high / low > 1e4 else np.outer(decades, [1, 2, 5]).ravel()
    ticks = [tick for tick in ticks if low <= tick <= high]
    ax.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
    ax.minorticks_off()


def _number_points(ax, points):
    """A number beside each point, no two over one another, with a line to its point where that is not near."""
    scale = ax.figure.dpi / 72  # points to pixels
    centres = ax.transData.transform(np.reshape(points, (-1, 2))) / scale
    corner, far = ax.bbox.min / scale, ax.bbox.max / scale
    shifts = [
        radius * np.array([np.cos(np.pi * angle), np.sin(np.pi * angle)])
        for radius in range(9, 80, 6)
        for angle in np.linspace(0.5, 2.5, 16, endpoint=False)
    ]
    line = {"arrowstyle": "-", "color": "0.6", "linewidth": 0.6, "shrinkA": 0, "shrinkB": 3}
    placed = []
    for number, (point, centre) in enumerate(zip(points, centres, strict=True), 1):
        half = np.array([3.5 * len(str(number)), 5.0])

        def is_free(at, half=half):
            apart = all((np.abs(at - other) > half + other_half + 0.5).any() for other, other_half in placed)
            return (
                apart
                and (np.abs(at - centres) > half + 3).any(1).all()
                and ((at - half > corner) & (at + half < far)).all()
            )

        shift = next((shift for shift in shifts if is_free(centre + shift)), shifts[0])
        placed.append((centre + shift, half))
        ax.annotate(
            str(number),
            point,
            shift,
            textcoords="offset points",
            ha="center",
            va="center",
            fontsize="small",
            arrowprops=line if np.hypot(*shift) > 10 else None,
        )


def _to_display(image):
    """(height, width, 1 or 3) of any range -> what imshow takes, stretched to 0..1."""
    image = np.asarray(image, "float64")
    low, high = image.min(), image.max()
    image = (image - low) / (high - low) if high > low else np.zeros_like(image)
    return image[..., 0] if image.shape[-1] == 1 else image


def _show(ax, image):
    image = _to_display(image)
    ax.imshow(image, cmap="gray" if image.ndim == 2 else None, vmin=0, vmax=1)


def _contour(ax, mask, colour, **options):
    # A line of level 0.5 needs both sides; an empty mask has no contour. The margin closes it at the border.
    if mask.any():
        padded = np.pad(mask.astype("float64"), 1)
        places = [np.arange(-1, side + 1) for side in mask.shape]
        ax.contour(places[1], places[0], padded, [0.5], colors=[colour], **options)
        ax.set_xlim(-0.5, mask.shape[1] - 0.5)
        ax.set_ylim(mask.shape[0] - 0.5, -0.5)


def plot_segmentation(
    images: np.ndarray,
    truths: np.ndarray,
    probs: np.ndarray,
    num_rows: int | None = None,
    rater_valid: np.ndarray | None = None,
    panel_inches: float = 1.9,
) -> np.ndarray:
    """A row for each image: image, truth, prediction and the uncertainty about it, side by side.

    Columns: the image; the contour of each rater; with several raters, their disagreement (variance of
    their masks); the mean prediction cut at 0.5 against the majority mask, true positives green, false
    positives blue, false negatives red; predictive entropy; mutual information, the part on which the
    samples disagree. Each uncertainty has one scale for all rows.

    Args:
        images: (batch, height, width, 1 or 3), any range: each is stretched.
        truths: (batch, height, width) or (batch, height, width, raters), 0 or 1.
        probs: (samples, batch, height, width) or (..., width, 1), probabilities of foreground.
        num_rows: draw that many images from the start; None for all.
        rater_valid: (batch, raters) bool; None if all are.
        panel_inches: side of a panel.

    Returns:
        (rows, columns) array of axes of a new figure, 6 columns with several raters, else 5.

    Reference: Abboud, Lombaert and Kadoury 2024, Figure 3, for the colours.
    """
    images, truths, probs = np.asarray(images), np.asarray(truths), np.asarray(probs)
    truths = truths[..., None] if truths.ndim == 3 else truths
    probs = probs[..., 0] if probs.ndim == 5 else probs
    rows, num_raters = min(num_rows or len(images), len(images)), truths.shape[-1]
    valid = np.ones((len(images), num_raters), bool) if rater_valid is None else np.asarray(rater_valid, bool)
    parts = uncertainty(probs[:, :rows])
    predicted = parts["mean_probs"] > 0.5
    majority = majority_mask(truths[:rows], valid[:rows])
    titles = ["image", "raters" if num_raters > 1 else "truth", "prediction"]
    titles += ["entropy", "mutual information"]
    maps = [("entropy", "predictive entropy (nats)"), ("mutual_information", "mutual information (nats)")]
    if num_raters > 1:
        titles.insert(2, "disagreement")

    figure, axes = plt.subplots(
        rows,
        len(titles),
        figsize=(panel_inches * len(titles), panel_inches * rows + 0.9),
        squeeze=False,
        layout="constrained",
    )
    coloured = {}
    for row in range(rows):
        columns = dict(zip(titles, axes[row], strict=True))
        for name in ("image", titles[1], "prediction"):
            _show(columns[name], images[row])
        for rater in np.flatnonzero(valid[row]):
            colour = RATERS[rater % len(RATERS)]
            _contour(columns[titles[1]], truths[row, ..., rater] > 0.5, colour, linewidths=1.2)
        if num_raters > 1:
            variance = truths[row][..., valid[row]].astype("float64").var(-1)
            coloured["disagreement"] = columns["disagreement"].imshow(variance, "cividis", vmin=0, vmax=0.25)
        _overlay(columns["prediction"], predicted[row], majority[row])
        for (key, _), title in zip(maps, titles[-2:], strict=True):
            high = max(float(parts[key].max()), 0.01)  # one sample has no mutual information: not its rounding
            coloured[title] = columns[title].imshow(parts[key][row], "viridis", vmin=0, vmax=high)
    for ax in axes.flat:
        ax.set_xticks([])
        ax.set_yticks([])
    for ax, title in zip(axes[0], titles, strict=True):
        ax.set_title(title, fontsize="medium")
    names = {
        "disagreement": "raters' variance",
        **dict(zip(titles[-2:], (text for _, text in maps), strict=True)),
    }
    for title, picture in coloured.items():
        column = axes[:, titles.index(title)].tolist()
        bar = figure.colorbar(picture, ax=column, location="bottom", shrink=0.9, pad=0.02)
        bar.locator = MaxNLocator(3)
        bar.set_label(names[title], fontsize="small")
        bar.ax.tick_params(labelsize="small")
    figure.legend(handles=_hit_handles(), loc="outside upper center", ncols=3, frameon=False, fontsize="small")
    return axes


def plot_comparison(
    images: np.ndarray,
    truths: np.ndarray,
    probs: Mapping[str, np.ndarray | None],
    rater_valid: np.ndarray | None = None,
    panel_inches: float = 1.45,
) -> np.ndarray:
    """The paper's Figure 3: a row for each image; image, raters, then of each method its mask and its entropy.

    Masks are the mean prediction cut at 0.5 against the raters' majority: true positives green, false positives blue,
    false negatives red. Entropy has one scale for all rows and methods.

    Args:
        images: (batch, height, width, 1 or 3), any range: each is stretched.
        truths: (batch, height, width) or (batch, height, width, raters), 0 or 1.
        probs: method -> (samples, batch, height, width), probabilities of foreground; None: that method is missing.
        rater_valid: (batch, raters) bool; None if all are.
        panel_inches: side of a panel.

    Returns:
        (rows, 2 + 2 * methods) array of axes of a new figure.

    Reference: Abboud, Lombaert and Kadoury 2024, Figure 3.
    """
    images, truths = np.asarray(images), np.asarray(truths)
    truths = truths[..., None] if truths.ndim == 3 else truths
    valid = np.ones((len(images), truths.shape[-1]), bool) if rater_valid is None else np.asarray(rater_valid, bool)
    majority = majority_mask(truths, valid)
    parts = {name: uncertainty(np.asarray(one)) for name, one in probs.items() if one is not None}
    high = max([0.01, *(float(part["entropy"].max()) for part in parts.values())])
    columns = 2 + 2 * len(probs)
    figure, axes = plt.subplots(
        len(images),
        columns,
        figsize=(panel_inches * columns, panel_inches * len(images) + 0.8),
        squeeze=False,
        layout="constrained",
    )
    titles = ["image", "raters" if truths.shape[-1] > 1 else "truth"]
    titles += [text for name in probs for text in (name, "its entropy")]
    picture = None
    for row, (image, line) in enumerate(zip(images, axes, strict=True)):
        for ax in line[:2]:
            _show(ax, image)
        for rater in np.flatnonzero(valid[row]):
            _contour(line[1], truths[row, ..., rater] > 0.5, RATERS[rater % len(RATERS)], linewidths=1.2)
        for (mask_ax, entropy_ax), name in zip(line[2:].reshape(-1, 2), probs, strict=True):
            if name not in parts:
                for ax in (mask_ax, entropy_ax):
                    ax.text(0.5, 0.5, "missing", ha="center", va="center", transform=ax.transAxes)
                continue
            _show(mask_ax, image)
            _overlay(mask_ax, parts[name]["mean_probs"][row] > 0.5, majority[row])
            picture = entropy_ax.imshow(parts[name]["entropy"][row], "viridis", vmin=0, vmax=high)
    for ax in axes.flat:
        ax.set_xticks([])
        ax.set_yticks([])
    for ax, title in zip(axes[0], titles, strict=True):
        ax.set_title(title, fontsize="small")
    if picture is not None:
        bar = figure.colorbar(picture, ax=axes[:, -1].tolist(), location="right", shrink=0.8, pad=0.02)
        bar.set_label("predictive entropy (nats)", fontsize="small")
        bar.ax.tick_params(labelsize="small")
    figure.legend(handles=_hit_handles(), loc="outside upper center", ncols=3, frameon=False, fontsize="small")
    return axes


def _overlay(ax, predicted, majority):
    """Hits, false alarms and misses over an image."""
    overlay = np.zeros((*predicted.shape, 4))
    for colour, where in (
        (TRUE_POSITIVE, predicted & majority),
        (FALSE_POSITIVE, predicted & ~majority),
        (FALSE_NEGATIVE, ~predicted & majority),
    ):
        overlay[where] = (*to_rgb(colour), 0.6)
    ax.imshow(overlay)


def _hit_handles():
    return [
        Patch(color=TRUE_POSITIVE, alpha=0.6, label="true positive"),
        Patch(color=FALSE_POSITIVE, alpha=0.6, label="false positive"),
        Patch(color=FALSE_NEGATIVE, alpha=0.6, label="false negative"),
    ]


def plot_sweep(
    ax: Axes, sweep: Mapping[float, Sequence[float]], lines: Mapping[str, Sequence[float]], label: str = ""
) -> Axes:
    """A metric against the share of Bayesian weights: median and quartile band over trainings; rivals as lines.

    Args:
        ax: where to draw.
        sweep: r_bayes, 0..1 and above 0 -> one value a training.
        lines: rival -> its values: a horizontal line at their median.
        label: of the metric.

    Returns:
        `ax`; its x-axis is logarithmic, in %.

    Reference: Abboud, Lombaert and Kadoury 2024, Figure 4.
    """
    if sweep:
        shares = 100 * np.array(list(sweep))
        low, median, high = (np.array([np.quantile(v, q) for v in sweep.values()]) for q in (0.25, 0.5, 0.75))
        ax.fill_between(shares, low, high, color=BLUE, alpha=0.2, linewidth=0)
        ax.plot(shares, median, "o-", color=BLUE, markersize=4, label="partial")
        ax.set_xscale("log")
        ax.set_xticks([share for share in (0.01, 0.1, 1, 10, 100) if shares[0] <= share <= shares[-1]])
        ax.xaxis.set_major_formatter(FuncFormatter(lambda share, _: f"{share:g}"))
        ax.xaxis.set_minor_formatter(NullFormatter())
    else:
        ax.text(0.5, 0.5, "missing", ha="center", va="center", transform=ax.transAxes)
    colours = _colours(len(lines) + 1)[1:]
    styles = ("--", ":", "-.", (0, (5, 1)))
    for number, (name, numbers) in enumerate(lines.items()):
        if len(numbers):
            style = styles[number % len(styles)]
            ax.axhline(np.median(numbers), color=colours[number], linestyle=style, linewidth=1.3, label=name)
        else:
            ax.plot([], [], " ", label=f"{name}: missing")
    ax.set_xlabel("Bayesian weights (%)")
    ax.set_ylabel(label)
    return _plain(ax)


def plot_differences(ax: Axes, rows: Mapping[str, Mapping], rival: Mapping, label: str = "") -> Axes:
    """How far each row's metric lies from a rival's, training by training: a dot each, and their mean as a bar.

    Args:
        ax: where to draw; the first row is on top.
        rows: label -> {training: value}; a label without a training that the rival has is "missing".
        rival: {training: value}.
        label: of the x-axis.

    Returns:
        `ax`.
    """
    for place, values in enumerate(rows.values()):
        gaps = [values[unit] - rival[unit] for unit in values if unit in rival]
        if gaps:
            ax.plot(gaps, [place] * len(gaps), "o", color=BLUE, alpha=0.6, markersize=4)
            ax.plot([np.mean(gaps)] * 2, [place - 0.3, place + 0.3], color=ORANGE, linewidth=2)
        else:
            ax.text(0, place, " missing", va="center", fontsize="small", color="grey")
    ax.axvline(0, color=GREY, linewidth=1, zorder=0)
    ax.set_yticks(range(len(rows)), [short_name(name, 48) for name in rows], fontsize="small")
    ax.set_ylim(len(rows) - 0.5, -0.5)  # not inverted: axes that share it would turn it back
    ax.xaxis.set_major_locator(MaxNLocator(5))
    ax.set_xlabel(label)
    return _plain(ax)


def plot_sample_masks(
    images: np.ndarray,
    truths: np.ndarray,
    probs: np.ndarray,
    num_rows: int | None = None,
    num_samples: int = 5,
    rater_valid: np.ndarray | None = None,
    panel_inches: float = 1.6,
) -> np.ndarray:
    """A row for each image: the raters' outlines, the masks of some samples, and how often each pixel is in a mask.

    Args:
        images: (batch, height, width, 1 or 3), any range: each is stretched.
        truths: (batch, height, width) or (batch, height, width, raters), 0 or 1.
        probs: (samples, batch, height, width) or (..., width, 1), probabilities of foreground, cut at 0.5.
        num_rows: draw that many images from the start; None for all.
        num_samples: draw that many samples from the start; the last column is of all of them.
        rater_valid: (batch, raters) bool; None if all are.
        panel_inches: side of a panel.

    Returns:
        (rows, 2 + drawn samples) array of axes of a new figure.

    Raises:
        ValueError: fewer than one row or sample; fewer predictions or truths than rows, or of another size;
            probabilities outside 0..1 or NaN.
    """
    images, truths, probs = np.asarray(images), np.asarray(truths), np.asarray(probs)
    truths = truths[..., None] if truths.ndim == 3 else truths
    probs = probs[..., 0] if probs.ndim == 5 else probs
    rows, drawn = min(len(images) if num_rows is None else num_rows, len(images)), min(num_samples, len(probs))
    if rows < 1 or drawn < 1:
        raise ValueError(f"Expected an image and a sample or more. Received: {rows} images, {drawn} samples")
    for name, values in (("probs", probs[0]), ("truths", truths)):
        if len(values) < rows or values.shape[1:3] != images.shape[1:3]:
            raise ValueError(
                f"Expected {name} of {rows} images or more, {images.shape[1:3]}. "
                f"Received: {len(values)}, {values.shape[1:3]}"
            )
    predictions.check_range(probs)
    num_raters = truths.shape[-1]
    valid = np.ones((len(images), num_raters), bool) if rater_valid is None else np.asarray(rater_valid, bool)
    masks = probs[:, :rows] > 0.5
    titles = ["raters" if num_raters > 1 else "truth", *(f"sample {k + 1}" for k in range(drawn)), "all samples"]
    figure, axes = plt.subplots(
        rows,
        len(titles),
        figsize=(panel_inches * len(titles) + 0.6, panel_inches * rows + 0.4),
        squeeze=False,
        layout="constrained",
    )
    figure.set_layout_engine("constrained", w_pad=0.02, h_pad=0.02)
    for row in range(rows):
        for ax in axes[row, :-1]:
            _show(ax, images[row])
        for rater in np.flatnonzero(valid[row]):
            width = 0.9 + 0.35 * (num_raters - 1 - rater)  # outlines that coincide are all seen
            _contour(axes[row, 0], truths[row, ..., rater] > 0.5, RATERS[rater % len(RATERS)], linewidths=width)
        for ax, mask in zip(axes[row, 1:-1], masks[:, row], strict=False):
            overlay = np.zeros((*mask.shape, 4))
            overlay[mask] = (*to_rgb(ORANGE), 0.35)
            ax.imshow(overlay)
            _contour(ax, mask, ORANGE, linewidths=1.2)
        share = axes[row, -1].imshow(masks[:, row].mean(0), "viridis", vmin=0, vmax=1)
    for ax in axes.flat:
        ax.set_xticks([])
        ax.set_yticks([])
    for ax, title in zip(axes[0], titles, strict=True):
        ax.set_title(title, fontsize="medium")
    bar = figure.colorbar(share, ax=axes[:, -1].tolist(), location="right", shrink=0.9, pad=0.05)
    bar.set_label(f"share of {len(probs)} sample{'s' * (len(probs) > 1)}", fontsize="small")
    bar.locator = MaxNLocator(3)
    bar.ax.tick_params(labelsize="small")
    return axes


def plot_classification(
    images: np.ndarray,
    labels: np.ndarray,
    probs: np.ndarray,
    class_names: Sequence[str],
    num_rows: int | None = None,
    row_inches: float | None = None,
) -> np.ndarray:
    """A row for each image: the image, and beside it what the network says of each label.

    A bar is the mean probability, the line across its end runs from the smallest to the largest sample, and a
    label that is truly present has an orange name and bar.

    Args:
        images: (batch, height, width, 1 or 3), any range: each is stretched.
        labels: (batch, labels), 0 or 1.
        probs: (samples, batch, labels), probabilities.
        class_names: of the labels; long ones are shortened, see `short_name`.
        num_rows: draw that many images from the start; None for all.
        row_inches: height of a row; None for what the labels' names need.

    Returns:
        (rows, 2) array of axes of a new figure: image, bars.
    """
    images, labels, probs = np.asarray(images), np.asarray(labels), np.asarray(probs, "float64")
    rows, num_labels = min(num_rows or len(images), len(images)), labels.shape[1]
    row_inches = row_inches or max(1.6, 0.2 * num_labels + 0.4)
    names = [short_name(str(name)) for name in class_names]
    room = 0.07 * max(0, max(map(len, names), default=0) - 10)  # for longer names, so that the images keep their size
    figure, axes = plt.subplots(
        rows,
        2,
        figsize=(min(row_inches, 3.2) + 4.6 + room, row_inches * rows + 0.8),
        width_ratios=(min(row_inches, 3.2), 4.6),
        squeeze=False,
        layout="constrained",
    )
    places = np.arange(num_labels)
    for row in range(rows):
        picture, bars = axes[row]
        _show(picture, images[row])
        picture.set_xticks([])
        picture.set_yticks([])
        samples = probs[:, row]
        mean, present = samples.mean(0), labels[row] > 0.5
        colours = np.where(present, ORANGE, BLUE)
        bars.barh(places, mean, color=colours, height=0.7)
        spread = np.stack([mean - samples.min(0), samples.max(0) - mean]).clip(0)
        if len(samples) > 1:
            bars.errorbar(mean, places, xerr=spread, fmt="none", ecolor="black", elinewidth=1, capsize=2)
        bars.set_yticks(places, names, fontsize="small")
        for text, truly in zip(bars.get_yticklabels(), present, strict=True):
            text.set_color(ORANGE if truly else "black")
            text.set_fontweight("bold" if truly else "normal")
        bars.set_xlim(0, 1)
        bars.invert_yaxis()
        _plain(bars)
    axes[-1, 1].set_xlabel("probability")
    handles: list[Artist] = [Patch(color=ORANGE, label="truly present"), Patch(color=BLUE, label="absent")]
    if len(probs) > 1:
        handles.append(Line2D([], [], color="black", linewidth=1, label=f"range of {len(probs)} samples"))
    figure.legend(handles=handles, loc="outside upper right", ncols=3, frameon=False, fontsize="small")
    return axes


def format_table(rows: Mapping[str, Mapping], keys: Sequence[str], digits: int = 3) -> str:
    """A Markdown table that also reads well as plain text: a line for each method, a column for each key.

    Args:
        rows: row name -> metrics, as `evaluation.evaluate` gives.
        keys: the columns, in order. A key that a row lacks (undefined there) is shown as "-".
        digits: after the decimal point; a number that this would show as 0 keeps two significant ones; integers and
            text are shown as they are.

    Returns:
        The table, without a final line break.
    """

    def text(value):
        if value is None:
            return "-"
        if not isinstance(value, float | np.floating):
            return str(value)
        return f"{value:.1e}" if 1e-9 < abs(value) < 0.5 * 10**-digits else f"{value:.{digits}f}"

    table = [["", *keys], *([name, *(text(row.get(key)) for key in keys)] for name, row in rows.items())]
    widths = [max(3, *(len(line[column]) for line in table)) for column in range(len(keys) + 1)]
    lines = [
        "| " + " | ".join([line[0].ljust(widths[0]), *map(str.rjust, line[1:], widths[1:])]) + " |" for line in table
    ]
    rule = [":" + "-" * (widths[0] - 1), *("-" * (width - 1) + ":" for width in widths[1:])]
    return "\n".join([lines[0], "| " + " | ".join(rule) + " |", *lines[1:]])


def plot_wall(
    images: np.ndarray,
    targets: np.ndarray | None = None,
    rater_valid: np.ndarray | None = None,
    class_names: Sequence[str] | None = None,
    columns: int = 8,
    panel_inches: float = 1.3,
    figure: Figure | SubFigure | None = None,
) -> np.ndarray:
    """A wall of images, each with the outlines of its masks, or with the names of its labels below it.

    All images have one grey scale, so a dark one looks dark: 0..255 for uint8, 0..1 for numbers in 0..1, else from
    the smallest to the largest number of all.

    Args:
        images: (batch, height, width, 1 or 3).
        targets: (batch, labels), 0 or 1; (batch,), class numbers; (batch, height, width) or
            (batch, height, width, raters), masks of 0 and 1; None for images alone.
        rater_valid: (batch, raters) bool, which masks are drawn; None for all.
        class_names: of the labels or classes, or of the foreground; numbers where None. Two names for one column of
            labels are those of 0 and of 1.
        columns: images in a row.
        panel_inches: side of an image.
        figure: a figure or subfigure to draw in; None for a new one.

    Returns:
        (rows, columns) array of axes; those without an image are switched off.

    Raises:
        ValueError: images or targets of another shape, or too few class names.
    """
    images = np.asarray(images)
    targets = None if targets is None else np.asarray(targets)
    if images.ndim != 4 or not len(images) or images.shape[-1] not in (1, 3):
        raise ValueError(f"Expected images (batch, height, width, 1 or 3). Received: shape {images.shape}")
    masks = targets if targets is not None and targets.ndim > 2 else None
    if targets is not None and targets.shape[: 1 if masks is None else 3] != images.shape[: 1 if masks is None else 3]:
        raise ValueError(f"Expected targets of images {images.shape}. Received: targets of shape {targets.shape}")
    if columns < 1:
        raise ValueError(f"Expected columns >= 1. Received: columns={columns}")
    texts = [""] * len(images)
    if targets is not None and masks is None:
        texts = _label_texts(targets, class_names, round(panel_inches * 17))  # characters that fit below an image
    lines = max(text.count("\n") + 1 if text else 0 for text in texts)
    columns = min(columns, len(images))
    rows = -(-len(images) // columns)
    if figure is None:
        num_raters = 0 if masks is None else 1 if masks.ndim == 3 else masks.shape[-1]
        legend = 0.1 + 0.2 * -(-num_raters // columns)
        size = (panel_inches * columns + 0.1, (panel_inches + 0.14 * lines) * rows + 0.1 + legend)
        figure = plt.figure(figsize=size)
        figure.set_layout_engine("constrained", w_pad=0.02, h_pad=0.03, wspace=0, hspace=0)
    axes = figure.subplots(rows, columns, squeeze=False)
    low, high = (0, 255) if images.dtype == np.uint8 else (0, 1)
    if images.min() < low or images.max() > high:
        low, high = images.min(), images.max()
    for ax, image, text in zip(axes.flat, images, texts, strict=False):
        shown = np.clip((image.astype("float64") - low) / max(high - low, 1e-12), 0, 1)
        ax.imshow(shown if shown.shape[-1] == 3 else shown[..., 0], cmap="gray", vmin=0, vmax=1)
        ax.set_xticks([])
        ax.set_yticks([])
        ax.spines[:].set_visible(False)
        if text:
            ax.set_xlabel(text, fontsize=7, labelpad=2)
    for ax in axes.flat[len(images) :]:
        ax.set_axis_off()
    if masks is not None:
        _outline_all(figure, axes, masks if masks.ndim == 4 else masks[..., None], rater_valid, class_names)
    return axes


def _outline_all(figure, axes, masks, rater_valid, class_names):
    num_raters = masks.shape[-1]
    valid = np.ones((len(masks), num_raters), bool) if rater_valid is None else np.asarray(rater_valid, bool)
    if valid.shape != (len(masks), num_raters):
        raise ValueError(f"Expected rater_valid {(len(masks), num_raters)}. Received: shape {valid.shape}")
    colours = [RATERS[rater % len(RATERS)] for rater in range(num_raters)]
    for ax, mask, drawn in zip(axes.flat, masks, valid, strict=False):
        for rater in np.flatnonzero(drawn):
            width = 0.9 + 0.35 * (num_raters - 1 - rater)  # outlines that coincide are all seen
            _contour(ax, mask[..., rater] > 0.5, colours[rater], linewidths=width)
    names = [f"rater {rater + 1}" for rater in range(num_raters)]
    if num_raters == 1:
        names = [textwrap.fill(str(class_names[0]), 12 * axes.shape[1]) if class_names else "mask"]
    handles = [
        Line2D([], [], color=colour, linewidth=2, label=name) for colour, name in zip(colours, names, strict=True)
    ]
    # Yellow and cyan are read on grey, as on the images, not on white.
    figure.legend(
        handles=handles,
        loc="outside upper left",
        ncols=min(num_raters, axes.shape[1]),
        fontsize="small",
        facecolor="0.25",
        edgecolor="none",
        labelcolor="white",
    )


def _label_texts(targets, class_names, width):
    """What is written below each image: the names of its labels, in lines of `width` characters, at most three."""
    if targets.ndim == 1:
        named = [[int(number)] for number in targets]
    elif targets.shape[1] == 1 and class_names is not None and len(class_names) == 2:
        named = [[int(row[0] > 0.5)] for row in targets]
    else:
        named = [np.flatnonzero(row > 0.5).tolist() for row in targets]
    most = max((max(row) for row in named if row), default=-1)
    if class_names is not None and most >= len(class_names):
        raise ValueError(f"Expected {most + 1} class names or more. Received: {len(class_names)}")
    texts = []
    for row in named:
        names = [str(k if class_names is None else class_names[k]) for k in row] or ["none"]
        lines = textwrap.wrap(", ".join(names), width, max_lines=3, placeholder=" ...")
        texts.append("\n".join(lines))
    return texts
