"""Pictures of results: methods side by side, cost against quality, a sweep over the share of Bayesian weights."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, MaxNLocator, NullFormatter

from sbn_tf.experiments.plots.style import BLUE, GREY, ORANGE, colours, missing, plain, short_name
from sbn_tf.experiments.result import COSTS
from sbn_tf.experiments.rows import rows
from sbn_tf.metrics import METRICS

_REMARK: dict[str, Any] = {"va": "center", "fontsize": "x-small", "color": "0.4"}


def plot_intervals(ax: Axes, frame: pd.DataFrame, key: str, band: str | None = "deterministic") -> Axes:
    """One metric of every method: a point and its interval, in the order given.

    Of several seeds the point is their mean, the line the standard deviation, and each seed is a small dot. Trivial
    rows are grey. A row far away from the others is an arrow at the border with its value beside it, so that it does
    not press the others together.

    Args:
        ax: where to draw.
        frame: tidy results of one dataset.
        key: of `metrics.METRICS`.
        band: label of the row whose interval is shaded over all the others; None, or one that is not there: no band.

    Returns:
        `ax`.

    Raises:
        ValueError: an unknown key, or results that do not belong together.
    """
    if key not in METRICS:
        raise ValueError(f"Expected a key of metrics.METRICS, {list(METRICS)}. Received: key={key!r}")
    found = rows(frame)
    low, high = _limits([(row.value(key), row.interval(key)) for row in found if not row.is_trivial])
    for place, row in enumerate(found):
        value, colour = row.value(key), GREY if row.is_trivial else BLUE
        if value is None:
            reason = textwrap.shorten(f"undefined: {row.reason(key)}", 60, placeholder=" ...")
            ax.text(0.02, place, reason, transform=ax.get_yaxis_transform(), **_REMARK)
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
    if all(row.value(key) is None for row in found):
        ax.set_xticks([])
    base = next((row for row in found if row.label == band and row.value(key) is not None), None)
    middle = None if base is None else base.value(key)
    if base is not None and middle is not None:
        start, stop = base.interval(key) or (middle, middle)
        ax.axvspan(start, stop, color=ORANGE, alpha=0.15, linewidth=0, zorder=0)
        ax.axvline(middle, color=ORANGE, linestyle="--", linewidth=1, zorder=0)
    ax.set_xlim(low, high)
    ax.set_yticks(range(len(found)), [row.label for row in found], fontsize="small")
    ax.set_ylim(len(found) - 0.5, -0.5)
    higher = METRICS[key].higher_is_better
    if higher is not None:
        text = "better \u2192" if higher else "\u2190 better"
        ax.set_title(text, fontsize="small", loc="right" if higher else "left")
    lines = "mean and sd of the seeds" if any(len(row.units) > 1 for row in found) else "95 % interval"
    ax.set_xlabel(f"{key} ({lines})" if any(row.interval(key) for row in found) else key)
    return plain(ax)


def plot_cost(ax: Axes, frame: pd.DataFrame, x: str = "train_flops_ratio", y: str = "nll") -> Axes:
    """A metric against what the method costs: numbered points, and which is which beside the axes.

    The cost is logarithmic. The stepped line joins the methods that none is both cheaper and better than. Trivial rows
    cost nothing: they are horizontal lines. A row far away from the others is an arrow at the border, its value in the
    legend.

    Args:
        ax: where to draw; the legend is to its right, outside.
        frame: tidy results of one dataset; rows without this cost or metric are named in the legend.
        x: of `result.COSTS`.
        y: of `metrics.METRICS`.

    Returns:
        `ax`.

    Raises:
        ValueError: an unknown key, or results that do not belong together.
    """
    if x not in COSTS or y not in METRICS:
        raise ValueError(f"Expected x of result.COSTS and y of metrics.METRICS. Received: x={x!r}, y={y!r}")
    found = rows(frame)
    shown = [row for row in found if not row.is_trivial and row.value(y) is not None and (row.value(x) or 0) > 0]
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
    handles += _trivial_lines(ax, [row for row in found if row.is_trivial], y, low, high)
    without = [row.label for row in found if not row.is_trivial and row not in shown]
    handles += [Line2D([], [], linestyle="none", label=f"not shown: {label}") for label in without]
    higher = METRICS[y].higher_is_better
    if higher is not None and shown:
        ax.plot(*_front(points, higher), color=ORANGE, linewidth=1, drawstyle="steps-post", zorder=1)
    if points:
        costs = [cost for cost, _ in points]
        ax.set_xlim(min(costs) / 1.3, max(costs) * 1.3)
        _plain_ticks(ax, min(costs) / 1.3, max(costs) * 1.3)
    ax.set_xlabel(textwrap.fill(f"{COSTS[x]} ({x})", 50))
    ax.set_ylabel(y if higher is None else f"{y} ({'higher' if higher else 'lower'} is better)")
    ax.legend(
        handles=handles, frameon=False, fontsize="small", loc="upper left", bbox_to_anchor=(1.01, 1), handlelength=1.2
    )
    ax.figure.figure.draw_without_rendering()  # the layout, by which the numbers find their places
    _number_points(ax, points)
    return plain(ax)


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
    side, shift = ("right", -6) if right else ("left", 6)
    ax.annotate(f"{value:.3g}", (edge, place), (shift, 0), textcoords="offset points", ha=side, **_REMARK)


def _front(points, higher):
    """Costs and values of the points that no cheaper one equals or betters, by rising cost."""
    sign = 1 if higher else -1
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
            inside = ((at - half > corner) & (at + half < far)).all()
            beside_points = (np.abs(at - centres) > half + 3).any(1).all()
            beside_numbers = all((np.abs(at - other) > half + its + 0.5).any() for other, its in placed)
            return inside and beside_points and beside_numbers

        shift = next((shift for shift in shifts if is_free(centre + shift)), shifts[0])
        placed.append((centre + shift, half))
        options = {"ha": "center", "va": "center", "arrowprops": line if np.hypot(*shift) > 10 else None}
        ax.annotate(str(number), point, shift, textcoords="offset points", fontsize="small", **options)


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
        missing(ax)
    shades = colours(len(lines) + 1)[1:]
    styles = ("--", ":", "-.", (0, (5, 1)))
    for number, (name, numbers) in enumerate(lines.items()):
        if len(numbers):
            style = styles[number % len(styles)]
            ax.axhline(np.median(numbers), color=shades[number], linestyle=style, linewidth=1.3, label=name)
        else:
            ax.plot([], [], " ", label=f"{name}: missing")
    ax.set_xlabel("Bayesian weights (%)")
    ax.set_ylabel(label)
    return plain(ax)


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
    return plain(ax)
