"""HTML pages that need no internet: a template, tables, and pictures inside the page. What data say is escaped."""

from __future__ import annotations

import base64
import io
import os
from collections.abc import Sequence
from typing import Any

import matplotlib
import numpy as np
import pandas as pd
from jinja2 import Environment, PackageLoader, StrictUndefined
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from PIL import Image

import sbn_tf
from sbn_tf.core.files import write_atomically
from sbn_tf.experiments.plots.predictions import FALSE_NEGATIVE, FALSE_POSITIVE, TRUE_POSITIVE

SIDE = 176  # pixels of a picture's longer side, at most
MOST_ROWS = 100  # of a table


def write_page(path: str | os.PathLike, template: str, **content: Any) -> None:
    """Fill in a template of `templates/` and write it, whole or not at all.

    Args:
        path: of the page.
        template: its file name.
        content: what it shows: texts, tables of `rows_of`, pictures. Every text is escaped.

    Raises:
        OSError: a full disk, or no permission; a page that was there before stays.
    """
    loader = PackageLoader("sbn_tf.experiments")
    environment = Environment(loader=loader, autoescape=True, undefined=StrictUndefined, trim_blocks=True)
    text = environment.get_template(template).render(version=sbn_tf.__version__, **content)
    # A file name that is not UTF-8 comes as surrogates.
    write_atomically(path, lambda file: file.write(text.encode("utf-8", "backslashreplace")))


def rows_of(table: pd.DataFrame, first: str = "", most: int = MOST_ROWS) -> dict[str, list]:
    """A table for a template: its index is the first column, called `first`; a note counts the rows after `most`."""
    notes = [*table.attrs.get("notes", ())]
    if len(table) > most:
        notes.insert(0, f"and {len(table) - most:,} more")
    shown = table.head(most)
    rows = [[name, *cells] for name, cells in zip(shown.index, shown.astype("object").to_numpy(), strict=True)]
    return {"columns": [first, *table.columns], "rows": rows, "notes": notes}


def picture(pixels: np.ndarray) -> str:
    """A data URI of uint8 pixels (height, width[, 1 or 3]), as PNG of at most `SIDE` a side."""
    pixels = pixels[..., 0] if pixels.shape[2:] == (1,) else pixels
    image = Image.fromarray(pixels)
    image.thumbnail((SIDE, SIDE))
    file = io.BytesIO()
    image.save(file, "PNG", optimize=True)
    return _uri(file)


def heat(entropy: np.ndarray) -> np.ndarray:
    """A map (height, width) of entropies, in nats, as colours (height, width, 3): yellow is ln 2, the most."""
    colours = matplotlib.colormaps["viridis"](np.clip(entropy / np.log(2), 0, 1))
    return np.rint(255 * colours[..., :3]).astype("uint8")


def marked(image: np.ndarray, mask: np.ndarray, truth: np.ndarray | None = None) -> np.ndarray:
    """A uint8 image (height, width, 1 or 3) under a bool mask (height, width), in colour (height, width, 3).

    With a truth hits are green, false alarms blue and misses red, as in `plots.plot_segmentation`.
    """
    found = np.repeat(image, 3, -1) if image.shape[-1] == 1 else image
    found, truth = found.astype("float64"), mask if truth is None else truth
    parts = ((TRUE_POSITIVE, mask & truth), (FALSE_POSITIVE, mask & ~truth), (FALSE_NEGATIVE, ~mask & truth))
    for colour, where in parts:
        found[where] = 0.5 * found[where] + 0.5 * 255 * np.array(to_rgb(colour))
    return np.rint(found).astype("uint8")


def chart(figure: Figure) -> str:
    """A data URI of a figure."""
    file = io.BytesIO()
    figure.savefig(file, format="png", dpi=110)
    return _uri(file)


def settings_table(settings: Sequence[tuple[str, Any]]) -> dict[str, list]:
    """Settings, name and value, as a table for a template."""
    return {"columns": ["", ""], "rows": [[name, str(value)] for name, value in settings], "notes": []}


def about(predictor: Any) -> list[tuple[str, Any]]:
    """Name and value of what a page says of the network of a `Predictor`."""
    card = predictor.card
    return [
        ("trained on", card.dataset),
        ("method", card.method),
        ("task", card.task),
        ("classes", ", ".join(card.classes)),
        ("input", f"{card.size} x {card.size} x {card.channels}, fit {card.fit}"),
        *((("window", f"{card.window[0]:g} to {card.window[1]:g}"),) if card.window else ()),
        ("draws of a prediction", card.num_samples),
        ("threshold", f"{card.threshold:g}"),
        ("temperature", f"{card.temperature:.4g}"),
        ("weights, crc32", predictor.crc32()),
    ]


def _uri(file):
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode("ascii")
