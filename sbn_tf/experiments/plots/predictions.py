"""Pictures of predictions: image, truth, prediction and uncertainty side by side. Each makes a figure of its own."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.artist import Artist
from matplotlib.colors import to_rgb
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import MaxNLocator

from sbn_tf.experiments.plots.style import (
    BLUE,
    ORANGE,
    bare,
    missing,
    outline,
    outline_raters,
    plain,
    short_name,
    show_image,
)
from sbn_tf.metrics import majority_mask, uncertainty

# The paper's Figure 3.
TRUE_POSITIVE, FALSE_POSITIVE, FALSE_NEGATIVE = "#2ca02c", "#1f5fd6", "#d62728"


def _with_raters(truths, rater_valid, num_images):
    """Truths (batch, height, width, raters), and which raters are valid (batch, raters)."""
    truths = np.asarray(truths)
    truths = truths[..., None] if truths.ndim == 3 else truths
    shape = (num_images, truths.shape[-1])
    return truths, np.ones(shape, bool) if rater_valid is None else np.asarray(rater_valid, bool)


def _panels(rows, titles, panel_inches, more, fontsize="medium"):
    """A figure and its array of bare axes, a column for each title; `more` inches of width and height."""
    size = (panel_inches * len(titles) + more[0], panel_inches * rows + more[1])
    figure, axes = plt.subplots(rows, len(titles), figsize=size, squeeze=False, layout="constrained")
    bare(axes)
    for ax, title in zip(axes[0], titles, strict=True):
        ax.set_title(title, fontsize=fontsize)
    return figure, axes


def _colour_bar(figure, picture, axes, label, **options):
    bar = figure.colorbar(picture, ax=axes.tolist(), **options)
    bar.set_label(label, fontsize="small")
    bar.locator = MaxNLocator(3)
    bar.ax.tick_params(labelsize="small")


def plot_segmentation(
    images: np.ndarray,
    truths: np.ndarray,
    probs: np.ndarray,
    num_rows: int | None = None,
    rater_valid: np.ndarray | None = None,
    without: np.ndarray | None = None,
    panel_inches: float = 1.9,
) -> np.ndarray:
    """A row for each image: image, truth, prediction and the uncertainty about it, side by side.

    Columns: the image; the contour of each rater; with several raters, their disagreement (variance of
    their masks); the mean prediction cut at 0.5 against the majority mask, true positives green, false
    positives blue, false negatives red; the predictive entropy of another network, if there is one; predictive
    entropy; mutual information, the part on which the samples disagree. Each kind of uncertainty has one scale.

    Args:
        images: (batch, height, width, 1 or 3), any range: each is stretched.
        truths: (batch, height, width) or (batch, height, width, raters), 0 or 1.
        probs: (samples, batch, height, width) or (..., width, 1), probabilities of foreground.
        num_rows: draw that many images from the start; None for all.
        rater_valid: (batch, raters) bool; None if all are.
        without: probabilities as `probs`, of a network without a posterior; None: no column for it.
        panel_inches: side of a panel.

    Returns:
        (rows, columns) array of axes of a new figure, 5 columns, one more with several raters, one more with `without`.

    Reference: Abboud, Lombaert and Kadoury 2024, Figure 3, for the colours.
    """
    images, probs = np.asarray(images), np.asarray(probs)
    truths, valid = _with_raters(truths, rater_valid, len(images))
    probs = probs[..., 0] if probs.ndim == 5 else probs
    rows, several = min(num_rows or len(images), len(images)), truths.shape[-1] > 1
    parts = uncertainty(probs[:, :rows])
    maps = {"entropy": parts["entropy"], "mutual information": parts["mutual_information"]}
    if without is not None:
        maps = {"entropy without": uncertainty(np.asarray(without)[:, :rows])["entropy"], **maps}
    highest = max(float(one.max()) for title, one in maps.items() if title.startswith("entropy"))
    predicted, majority = parts["mean_probs"] > 0.5, majority_mask(truths[:rows], valid[:rows])
    titles = ["image", "raters" if several else "truth", *["raters disagree"] * several, "prediction"]
    titles += list(maps)
    figure, axes = _panels(rows, titles, panel_inches, (0, 0.9))
    coloured = {}
    for row in range(rows):
        columns = dict(zip(titles, axes[row], strict=True))
        show_image(columns["image"], images[row])
        show_image(columns[titles[1]], images[row])
        outline_raters(columns[titles[1]], truths[row], valid[row], width=1.2)
        empty = int((~truths[row].astype(bool).any((0, 1)) & valid[row]).sum())
        if several and empty:
            columns["raters"].set_xlabel(f"{empty} of {int(valid[row].sum())} marked nothing", fontsize="x-small")
        show_image(columns["prediction"], images[row])
        _overlay(columns["prediction"], _hits(predicted[row], majority[row]))
        if several:
            variance = truths[row][..., valid[row]].astype("float64").var(-1)
            picture = columns["raters disagree"].imshow(variance, "cividis", vmin=0, vmax=0.25)
            coloured["raters disagree"] = picture, "raters' variance"
        for title, values in maps.items():
            high = highest if title.startswith("entropy") else float(values.max())
            # One sample has no mutual information, only its rounding.
            picture = columns[title].imshow(values[row], "viridis", vmin=0, vmax=max(high, 0.01))
            label = {"entropy": "predictive entropy", "entropy without": "without posterior"}.get(title, title)
            coloured[title] = picture, f"{label} (nats)"
    for title, (picture, label) in coloured.items():
        column = axes[:, titles.index(title)]
        _colour_bar(figure, picture, column, label, location="bottom", shrink=0.9, pad=0.02)
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
    images = np.asarray(images)
    truths, valid = _with_raters(truths, rater_valid, len(images))
    majority = majority_mask(truths, valid)
    parts = {name: uncertainty(np.asarray(one)) for name, one in probs.items() if one is not None}
    high = max([0.01, *(float(part["entropy"].max()) for part in parts.values())])
    titles = ["image", "raters" if truths.shape[-1] > 1 else "truth"]
    titles += [text for name in probs for text in (name, "its entropy")]
    figure, axes = _panels(len(images), titles, panel_inches, (0, 0.8), fontsize="small")
    picture = None
    for row, (image, line) in enumerate(zip(images, axes, strict=True)):
        show_image(line[0], image)
        show_image(line[1], image)
        outline_raters(line[1], truths[row], valid[row], width=1.2)
        for (mask_ax, entropy_ax), name in zip(line[2:].reshape(-1, 2), probs, strict=True):
            if name not in parts:
                missing(mask_ax)
                missing(entropy_ax)
                continue
            show_image(mask_ax, image)
            _overlay(mask_ax, _hits(parts[name]["mean_probs"][row] > 0.5, majority[row]))
            picture = entropy_ax.imshow(parts[name]["entropy"][row], "viridis", vmin=0, vmax=high)
    if picture is not None:
        _colour_bar(figure, picture, axes[:, -1], "predictive entropy (nats)", location="right", shrink=0.8, pad=0.02)
    figure.legend(handles=_hit_handles(), loc="outside upper center", ncols=3, frameon=False, fontsize="small")
    return axes


def _hits(predicted, majority):
    """Colour -> where it is: hits, false alarms and misses."""
    wrong, missed = predicted & ~majority, ~predicted & majority
    return {TRUE_POSITIVE: predicted & majority, FALSE_POSITIVE: wrong, FALSE_NEGATIVE: missed}


def _overlay(ax, masks, alpha=0.6):
    """Masks in their colours over an image."""
    overlay = np.zeros((*next(iter(masks.values())).shape, 4))
    for colour, where in masks.items():
        overlay[where] = (*to_rgb(colour), alpha)
    ax.imshow(overlay)


def _hit_handles():
    return [
        Patch(color=TRUE_POSITIVE, alpha=0.6, label="true positive"),
        Patch(color=FALSE_POSITIVE, alpha=0.6, label="false positive"),
        Patch(color=FALSE_NEGATIVE, alpha=0.6, label="false negative"),
    ]


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
        ValueError: fewer than one row or sample; arrays that do not fit; probabilities outside 0..1 or NaN.
    """
    images, probs = np.asarray(images), np.asarray(probs)
    truths, valid = _with_raters(truths, rater_valid, len(images))
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
    if not (probs.min() >= 0 and probs.max() <= 1 + 1e-6):  # NaN fails both
        raise ValueError(f"Expected probs in 0..1, none NaN. Received: min={probs.min()}, max={probs.max()}")
    masks, num_raters = probs[:, :rows] > 0.5, truths.shape[-1]
    titles = ["raters" if num_raters > 1 else "truth", *(f"sample {k + 1}" for k in range(drawn)), "all samples"]
    figure, axes = _panels(rows, titles, panel_inches, (0.6, 0.4))
    figure.set_layout_engine("constrained", w_pad=0.02, h_pad=0.02)
    for row in range(rows):
        for ax in axes[row, :-1]:
            show_image(ax, images[row])
        outline_raters(axes[row, 0], truths[row], valid[row])
        for ax, mask in zip(axes[row, 1:-1], masks[:, row], strict=False):
            _overlay(ax, {ORANGE: mask}, 0.35)
            outline(ax, mask, ORANGE, linewidths=1.2)
        share = axes[row, -1].imshow(masks[:, row].mean(0), "viridis", vmin=0, vmax=1)
    label = f"share of {len(probs)} sample{'s' * (len(probs) > 1)}"
    _colour_bar(figure, share, axes[:, -1], label, location="right", shrink=0.9, pad=0.05)
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
    widths = (min(row_inches, 3.2), 4.6)
    size = (sum(widths) + room, row_inches * rows + 0.8)
    figure, axes = plt.subplots(rows, 2, figsize=size, width_ratios=widths, squeeze=False, layout="constrained")
    bare(axes[:, 0])
    places = np.arange(num_labels)
    for row in range(rows):
        picture, bars = axes[row]
        show_image(picture, images[row])
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
        plain(bars)
    axes[-1, 1].set_xlabel("probability")
    handles: list[Artist] = [Patch(color=ORANGE, label="truly present"), Patch(color=BLUE, label="absent")]
    if len(probs) > 1:
        handles.append(Line2D([], [], color="black", linewidth=1, label=f"range of {len(probs)} samples"))
    figure.legend(handles=handles, loc="outside upper right", ncols=3, frameon=False, fontsize="small")
    return axes
