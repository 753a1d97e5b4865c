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

from sbn_tf.experiments.plots.style import BLUE, ORANGE, RATERS, bare, outline, plain, short_name, show_image
from sbn_tf.metrics import majority_mask, uncertainty

__all__ = ["plot_classification", "plot_comparison", "plot_sample_masks", "plot_segmentation"]

# The paper's Figure 3.
TRUE_POSITIVE, FALSE_POSITIVE, FALSE_NEGATIVE = "#2ca02c", "#1f5fd6", "#d62728"


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
            show_image(columns[name], images[row])
        for rater in np.flatnonzero(valid[row]):
            colour = RATERS[rater % len(RATERS)]
            outline(columns[titles[1]], truths[row, ..., rater] > 0.5, colour, linewidths=1.2)
        if num_raters > 1:
            variance = truths[row][..., valid[row]].astype("float64").var(-1)
            coloured["disagreement"] = columns["disagreement"].imshow(variance, "cividis", vmin=0, vmax=0.25)
        _overlay(columns["prediction"], predicted[row], majority[row])
        for (key, _), title in zip(maps, titles[-2:], strict=True):
            high = max(float(parts[key].max()), 0.01)  # one sample has no mutual information: not its rounding
            coloured[title] = columns[title].imshow(parts[key][row], "viridis", vmin=0, vmax=high)
    bare(axes)
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
            show_image(ax, image)
        for rater in np.flatnonzero(valid[row]):
            outline(line[1], truths[row, ..., rater] > 0.5, RATERS[rater % len(RATERS)], linewidths=1.2)
        for (mask_ax, entropy_ax), name in zip(line[2:].reshape(-1, 2), probs, strict=True):
            if name not in parts:
                for ax in (mask_ax, entropy_ax):
                    ax.text(0.5, 0.5, "missing", ha="center", va="center", transform=ax.transAxes)
                continue
            show_image(mask_ax, image)
            _overlay(mask_ax, parts[name]["mean_probs"][row] > 0.5, majority[row])
            picture = entropy_ax.imshow(parts[name]["entropy"][row], "viridis", vmin=0, vmax=high)
    bare(axes)
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
    if not (probs.min() >= 0 and probs.max() <= 1):  # NaN fails both
        raise ValueError(f"Expected probs in 0..1, none NaN. Received: min={probs.min()}, max={probs.max()}")
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
            show_image(ax, images[row])
        for rater in np.flatnonzero(valid[row]):
            width = 0.9 + 0.35 * (num_raters - 1 - rater)  # outlines that coincide are all seen
            outline(axes[row, 0], truths[row, ..., rater] > 0.5, RATERS[rater % len(RATERS)], linewidths=width)
        for ax, mask in zip(axes[row, 1:-1], masks[:, row], strict=False):
            overlay = np.zeros((*mask.shape, 4))
            overlay[mask] = (*to_rgb(ORANGE), 0.35)
            ax.imshow(overlay)
            outline(ax, mask, ORANGE, linewidths=1.2)
        share = axes[row, -1].imshow(masks[:, row].mean(0), "viridis", vmin=0, vmax=1)
    bare(axes)
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
        show_image(picture, images[row])
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
        plain(bars)
    axes[-1, 1].set_xlabel("probability")
    handles: list[Artist] = [Patch(color=ORANGE, label="truly present"), Patch(color=BLUE, label="absent")]
    if len(probs) > 1:
        handles.append(Line2D([], [], color="black", linewidth=1, label=f"range of {len(probs)} samples"))
    figure.legend(handles=handles, loc="outside upper right", ncols=3, frameon=False, fontsize="small")
    return axes
