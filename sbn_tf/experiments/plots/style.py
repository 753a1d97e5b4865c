"""The one style of all pictures: colours, and how an image and the outline of a mask are drawn."""

from __future__ import annotations

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes

BLUE, ORANGE, GREY = "#3b6ea8", "#d9822b", "#b8bfc7"
RATERS = ("#ffd000", "#00d5ff", "#ff6ad5", "#7dff6a", "#ff8a3d", "#b79bff")


def plain(ax: Axes) -> Axes:
    """Take the upper and the right border away."""
    ax.spines[["top", "right"]].set_visible(False)
    return ax


def short_name(name: str, most: int = 24) -> str:
    """A name of at most `most` characters: a longer one is cut, and ends in " ..."."""
    return name if len(name) <= most else name[: most - 4].rstrip() + " ..."


def colours(number: int) -> list:
    """Distinct colours for so many curves."""
    return [BLUE] if number == 1 else list(plt.get_cmap("viridis")(np.linspace(0, 0.85, number)))


def show_image(ax: Axes, image: np.ndarray) -> None:
    """Draw an image (height, width, 1 or 3) of any range, stretched to its own darkest and brightest value."""
    image = np.asarray(image, "float64")
    low, high = image.min(), image.max()
    image = (image - low) / (high - low) if high > low else np.zeros_like(image)
    grey = image.shape[-1] == 1
    ax.imshow(image[..., 0] if grey else image, cmap="gray" if grey else None, vmin=0, vmax=1)


def outline(ax: Axes, mask: np.ndarray, colour: str, **options) -> None:
    """Draw the outline of a mask; an empty mask has none."""
    if not mask.any():
        return
    padded = np.pad(mask.astype("float64"), 1)  # the margin closes the outline at the border
    places = [np.arange(-1, side + 1) for side in mask.shape]
    ax.contour(places[1], places[0], padded, [0.5], colors=[colour], **options)
    ax.set_xlim(-0.5, mask.shape[1] - 0.5)
    ax.set_ylim(mask.shape[0] - 0.5, -0.5)


def outline_raters(ax: Axes, masks: np.ndarray, valid: np.ndarray, width: float | None = None) -> None:
    """Draw the outline of each valid rater's mask, (height, width, raters); later ones are thinner, so all are seen."""
    num_raters = masks.shape[-1]
    for rater in np.flatnonzero(valid):
        thinner = 0.9 + 0.35 * (num_raters - 1 - rater)
        colour = RATERS[rater % len(RATERS)]
        outline(ax, masks[..., rater] > 0.5, colour, linewidths=thinner if width is None else width)


def missing(ax: Axes) -> None:
    """Say in the middle that there is nothing to draw."""
    ax.text(0.5, 0.5, "missing", ha="center", va="center", transform=ax.transAxes)


def bare(axes: np.ndarray) -> None:
    """Take the ticks away from an array of axes."""
    for ax in axes.flat:
        ax.set_xticks([])
        ax.set_yticks([])
