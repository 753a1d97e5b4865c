"""A picture of what `datasets.check` found."""

from typing import Any

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.figure import Figure

from sbn_tf.datasets.base import EXCLUSIVE, SEGMENTATION
from sbn_tf.datasets.check import Report

from .plots import plot_wall, short_name

__all__ = ["plot_check"]


def plot_check(report: Report) -> Figure:
    """One figure: a wall of images of the first split, pixel values, and the balance of classes or foreground."""
    first = report.tallies[0]
    figure = plt.figure(figsize=(12.5, 6.2), layout="constrained")
    parts: Any = figure.subfigures(1, 2, width_ratios=(1.75, 1))
    left, right = parts
    images, targets = (np.stack([kept[k] for kept in first.wall]) for k in (0, 1))
    valid = None if first.wall[0][2] is None else np.stack([kept[2] for kept in first.wall])
    names = list(report.classes)
    if report.task in EXCLUSIVE and targets.size == len(targets):
        targets, names = first.named(targets.reshape(len(targets)), report.classes)
    plot_wall(images, targets, valid, class_names=names or None, columns=6, figure=left)
    pixels, balance = right.subplots(2, 1, height_ratios=(1, 1.6))
    colours = plt.get_cmap("viridis")(np.linspace(0, 0.85, len(report.tallies)))
    _plot_pixels(report, pixels, colours)
    (_plot_foreground if report.task == SEGMENTATION else _plot_classes)(report, balance, colours)
    for ax in (pixels, balance):
        ax.spines[["top", "right"]].set_visible(False)
    count = len(report.problems)
    found = "no problem found" if not count else f"{count} problem{'s' if count > 1 else ''} found"
    figure.suptitle(f"{report.name} ({report.task}): {found}; {len(images)} images of {first.name}")
    return figure


def _plot_pixels(report, ax, colours):
    for tally, colour in zip(report.tallies, colours, strict=True):
        ax.stairs(tally.histogram / tally.histogram.sum(), tally.edges, color=colour, label=tally.name)
    ax.set_xlabel("pixel value, as stored")
    ax.set_ylabel("share of pixels")
    ax.legend(frameon=False, fontsize="small")


def _plot_foreground(report, ax, colours):
    bins = np.linspace(0, max(max(tally.foreground, default=0) for tally in report.tallies) or 1, 31)
    for tally, colour in zip(report.tallies, colours, strict=True):
        counts, _ = np.histogram(tally.foreground, bins)
        ax.stairs(counts / max(counts.sum(), 1), bins, color=colour, label=tally.name)
    ax.set_xlabel("foreground, share of a mask's pixels")
    ax.set_ylabel("share of masks")


def _plot_classes(report, ax, colours):
    names = list(report.table[0]["positives"])
    height = 0.8 / len(report.tallies)
    for k, (row, colour) in enumerate(zip(report.table, colours, strict=True)):
        shares = np.array(list(row["positives"].values())) / row["images"]
        ax.barh(np.arange(len(names)) + (k + 0.5) * height - 0.4, shares, height, color=colour)
    ax.set_yticks(range(len(names)), list(map(short_name, names)), fontsize="small" if len(names) < 20 else "xx-small")
    ax.invert_yaxis()
    ax.set_xlabel("share of images")
