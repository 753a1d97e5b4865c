"""Pictures: functions that take axes and arrays, and return the axes.

Nothing here shows or saves a figure, and nothing touches a style that is not its own. Functions with an `ax`
argument draw into it and return it; the panels (`plot_segmentation`, `plot_classification`, `plot_wall`) make a
figure and return its array of axes. Images are grey or RGB, uncertainty is in nats on viridis.
"""

import textwrap

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import to_rgb
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import MaxNLocator

from sbn_tf.metrics import majority_mask, uncertainty

__all__ = [
    "format_table",
    "plot_classification",
    "plot_history",
    "plot_masks_by_layer",
    "plot_reliability",
    "plot_scales",
    "plot_scores",
    "plot_segmentation",
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


def plot_history(histories: dict[str, dict[str, list]], keys: list[str], ax: Axes) -> Axes:
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


def plot_masks_by_layer(ax: Axes, names: list[str], num_bayesian: list[int], num_weights: list[int]) -> Axes:
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


def plot_scores(ax: Axes, scores: np.ndarray, chosen: np.ndarray) -> Axes:
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
        bins = np.linspace(logs.min(), logs.max() + 1e-9, 61)
        counts, _, _ = ax.hist(logs, bins, color=GREY)
        ax.hist(logs[chosen[scores > 0]], bins, color=BLUE)
    num_selected, num_zero = int(chosen.sum()), int((scores[~chosen] == 0).sum())
    handles = [
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
        ax.set_ylim(0.7, 2 * counts.max() ** 1.6)  # room for the legend
    ax.set_xlabel("log10 of the saliency")
    ax.set_ylabel("weights")
    ax.legend(handles=handles, frameon=False, fontsize="small")
    return _plain(ax)


def plot_scales(ax: Axes, before: np.ndarray, after: np.ndarray) -> Axes:
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
    bins = np.logspace(low - margin, high + margin, 50)
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


def plot_reliability(ax: Axes, probs: np.ndarray, targets: np.ndarray, num_bins: int = 15) -> Axes:
    """Observed frequency against mean probability in equal-width bins, with the count of each bin.

    Args:
        ax: where to draw.
        probs: any shape, probabilities of 1 (the posterior predictive mean).
        targets: same shape, in 0..1.
        num_bins: number of bins over [0, 1], as in `metrics.ece`.

    Returns:
        `ax`, the first of two: the counts are drawn on a twin axis, logarithmic.
    """
    probs, targets = np.asarray(probs, "float64").ravel(), np.asarray(targets, "float64").ravel()
    index = np.minimum((probs * num_bins).astype(int), num_bins - 1)
    count, sum_probs, sum_targets = (np.bincount(index, w, num_bins) for w in (None, probs, targets))
    used = count > 0
    mean_probs, frequency = sum_probs[used] / count[used], sum_targets[used] / count[used]
    ece = np.abs(sum_probs - sum_targets).sum() / probs.size

    counts = ax.twinx()
    counts.bar((np.arange(num_bins) + 0.5) / num_bins, count, 0.9 / num_bins, color=GREY, alpha=0.6)
    counts.set_yscale("log")
    counts.set_ylim(0.5, 0.5 * (2 * count.max()) ** 2.5)  # the bars stay in the lower part
    counts.set_yticks([tick for tick in 10.0 ** np.arange(12) if tick <= count.max()])
    counts.minorticks_off()
    counts.set_ylabel("predictions in the bin (bars)", loc="bottom")
    counts.spines["top"].set_visible(False)
    ax.set_zorder(counts.get_zorder() + 1)
    ax.patch.set_visible(False)

    ax.plot([0, 1], [0, 1], color="black", linestyle=":", linewidth=1, label="calibrated")
    ax.plot(mean_probs, frequency, "o-", color=BLUE, markersize=4, label=f"predictions: ECE {ece:.4f}")
    ax.set_xlim(0, 1)
    ax.set_ylim(0, 1.02)
    ax.set_xlabel("predicted probability")
    ax.set_ylabel("observed frequency")
    ax.legend(frameon=False, fontsize="small", loc="upper left")
    ax.spines["top"].set_visible(False)
    return ax


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
        overlay = np.zeros((*predicted.shape[1:], 4))
        for colour, where in (
            (TRUE_POSITIVE, predicted[row] & majority[row]),
            (FALSE_POSITIVE, predicted[row] & ~majority[row]),
            (FALSE_NEGATIVE, ~predicted[row] & majority[row]),
        ):
            overlay[where] = (*to_rgb(colour), 0.6)
        columns["prediction"].imshow(overlay)
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
    handles = [
        Patch(color=TRUE_POSITIVE, alpha=0.6, label="true positive"),
        Patch(color=FALSE_POSITIVE, alpha=0.6, label="false positive"),
        Patch(color=FALSE_NEGATIVE, alpha=0.6, label="false negative"),
    ]
    figure.legend(handles=handles, loc="outside upper center", ncols=3, frameon=False, fontsize="small")
    return axes


def plot_classification(
    images: np.ndarray,
    labels: np.ndarray,
    probs: np.ndarray,
    class_names: list[str],
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
    handles = [Patch(color=ORANGE, label="truly present"), Patch(color=BLUE, label="absent")]
    if len(probs) > 1:
        handles.append(Line2D([], [], color="black", linewidth=1, label=f"range of {len(probs)} samples"))
    figure.legend(handles=handles, loc="outside upper right", ncols=3, frameon=False, fontsize="small")
    return axes


def format_table(rows: dict[str, dict], keys: list[str], digits: int = 3) -> str:
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
    class_names: list[str] | None = None,
    columns: int = 8,
    panel_inches: float = 1.3,
    figure=None,
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
        figure = plt.figure(figsize=size, layout="constrained")
        figure.get_layout_engine().set(w_pad=0.02, h_pad=0.03, wspace=0, hspace=0)
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
