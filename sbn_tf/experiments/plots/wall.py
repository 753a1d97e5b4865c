"""A wall of images, with the outlines of their masks or the names of their labels."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.figure import Figure, SubFigure
from matplotlib.lines import Line2D

from sbn_tf.experiments.plots.style import RATERS, bare, outline_raters


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
        ax.spines[:].set_visible(False)
        if text:
            ax.set_xlabel(text, fontsize=7, labelpad=2)
    bare(axes)
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
    for ax, mask, drawn in zip(axes.flat, masks, valid, strict=False):
        outline_raters(ax, mask, drawn)
    names = [f"rater {rater + 1}" for rater in range(num_raters)]
    if num_raters == 1:
        names = [textwrap.fill(str(class_names[0]), 12 * axes.shape[1]) if class_names else "mask"]
    handles = [Line2D([], [], color=RATERS[k % len(RATERS)], linewidth=2, label=name) for k, name in enumerate(names)]
    # Yellow and cyan are read on grey, as on the images, not on white.
    colours = {"facecolor": "0.25", "edgecolor": "none", "labelcolor": "white"}
    columns = min(num_raters, axes.shape[1])
    figure.legend(handles=handles, loc="outside upper left", ncols=columns, fontsize="small", **colours)


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
