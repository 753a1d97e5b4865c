"""What a dataset is: its task and its card."""

import html
from dataclasses import dataclass

__all__ = ["Card"]

BINARY = "binary"
MULTI_CLASS = "multi-class"
MULTI_LABEL = "multi-label"
ORDINAL = "ordinal"
SEGMENTATION = "segmentation"
TASKS = (BINARY, MULTI_CLASS, MULTI_LABEL, ORDINAL, SEGMENTATION)
EXCLUSIVE = (MULTI_CLASS, ORDINAL)  # one class an image: targets are one-hot


@dataclass(frozen=True)
class Card:
    """What a dataset is, where it comes from and under which terms. `print(card)` shows it, in a notebook `card` does.

    Args:
        name: name that `load` takes.
        title: one line for people.
        task: "multi-label" (any number of labels an image), "binary" (one label), "multi-class" (one class an
            image), "ordinal" (the same, classes in order) or "segmentation" (masks).
        classes: names of the labels or classes, or of the one foreground class.
        channels: 1 (grey) or 3 (RGB).
        num_raters: masks per image; 1 where there is a single truth.
        licence, citation, source: terms, what to cite, where it comes from.
        files: official file or folder names under the data root.
        default_size: side in pixels of the square images that `load` gives if it is given no size.
        counts: images of train, val and test, if the dataset fixes them, else None.
        splits: how the images are divided, in words.
        network: the customary network here, "resnet18" or "unet".
        notes: what a user should know before trusting a number.
        paper_normalisation: (mean, sd) on the 0..1 scale if the paper has constants, else None.
        checksums: (file name, md5) pairs of the official files, if they are published.
    """

    name: str
    title: str
    task: str
    classes: tuple[str, ...]
    channels: int
    num_raters: int
    licence: str
    citation: str
    source: str
    files: tuple[str, ...]
    default_size: int
    network: str
    counts: tuple[int, int, int] | None = None
    splits: str = ""
    notes: str = ""
    paper_normalisation: tuple[float, float] | None = None
    checksums: tuple[tuple[str, str], ...] = ()

    def _rows(self):
        """What is known of it: (what, in words)."""
        kind = self.task
        if self.task in (*EXCLUSIVE, MULTI_LABEL):
            kind += f", {len(self.classes)} {'labels' if self.task == MULTI_LABEL else 'classes'}"
        raters = f"{self.num_raters} an image" if self.num_raters > 1 else ""
        images = f"{self.default_size} x {self.default_size} x {self.channels} by default"
        counts = "" if self.counts is None else "train {:,}, val {:,}, test {:,}".format(*self.counts)
        rows = [
            ("task", kind),
            ("classes", ("; " if "," in "".join(self.classes) else ", ").join(self.classes)),
            ("images", images),
            ("counts", counts),
            ("splits", self.splits),
            ("raters", raters),
            ("network", self.network),
            ("files", ", ".join(self.files) or "none"),
            ("source", self.source),
            ("licence", self.licence),
            ("cite", self.citation),
            ("notes", self.notes),
        ]
        return [(key, value) for key, value in rows if value]

    def __str__(self):
        return "\n".join([f"{self.name}: {self.title}", *(f"  {key:<8} {value}" for key, value in self._rows())])

    def _repr_html_(self):
        cell = '<td style="text-align: left">{}</td>'
        rows = (f"<tr><th>{key}</th>{cell.format(html.escape(value))}</tr>" for key, value in self._rows())
        return f"<table><caption>{html.escape(f'{self.name}: {self.title}')}</caption>{''.join(rows)}</table>"
