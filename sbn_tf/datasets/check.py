"""A check of any dataset before a number is believed: what is in it, and what looks wrong."""

import itertools
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from tqdm import tqdm

from .base import BINARY, EXCLUSIVE, MULTI_LABEL, SEGMENTATION, TASKS, Data, Split, first_in_seeded_order
from .files import is_integer
from .pieces import check_ends, pieces
from .tally import NONE, Tally

__all__ = ["Report", "check"]

FEW = 10  # images that no number of a split should rest on


@dataclass(eq=False, repr=False)
class Report:
    """What `check` found. `print(report)` shows it; in a notebook, `display(report)` shows it with real tables.

    Args:
        name: of the dataset.
        task: of the dataset, as on a card.
        classes: names of the labels or classes, or of the foreground.
        table: one row for each split, fact -> value. Pixels are as stored (uint8: 0..255); "identical" counts the
            images that repeat another of the same split; "positives" are the images of each class, "none of these"
            (multi-label) those of none.
        problems: what should be understood or put right before training, a sentence each.
        notes: what a reader of a number should know, a sentence each.
        tallies: what was counted in each split, for pictures.
    """

    name: str
    task: str
    classes: tuple[str, ...]
    table: list[dict]
    problems: list[str]
    notes: list[str]
    tallies: list[Tally] = field(default_factory=list)

    def __repr__(self):
        names = [row["split"] for row in self.table]
        facts = [key for key in self.table[0] if key not in ("split", "positives", NONE)]
        parts = [f"{self.name}: {self.task}"]
        parts.append(_markdown({key: [_number(row[key]) for row in self.table] for key in facts}, names))
        if self.task != SEGMENTATION:
            labels = dict.fromkeys(self.table[0]["positives"]) | ({NONE: None} if self.task == MULTI_LABEL else {})
            counts = [{NONE: row.get(NONE)} | row["positives"] for row in self.table]
            totals = [row["images"] for row in self.table]
            shares = {
                label: [f"{count[label]:,} ({count[label] / n:.1%})" for count, n in zip(counts, totals, strict=True)]
                for label in labels
            }
            parts.append("Images of each class:\n\n" + _markdown(shares, names))
        if not self.problems:
            parts.append("No problem found.")
        for title, sentences in (("Problems", self.problems), ("Notes", self.notes)):
            if sentences:
                parts.append(f"{title}:\n\n" + "\n".join(f"- {sentence}" for sentence in sentences))
        return "\n\n".join(parts)

    _repr_markdown_ = __repr__


def _markdown(rows: Mapping[str, list[str]], names: list[str]) -> str:
    """A Markdown table whose columns are aligned, so that it reads well as text too."""
    lines = [["", *names], *([key, *cells] for key, cells in rows.items())]
    widths = [max(3, *map(len, column)) for column in zip(*lines, strict=True)]
    lines.insert(1, [":" + "-" * (widths[0] - 1), *("-" * (width - 1) + ":" for width in widths[1:])])
    padded = (
        [line[0].ljust(widths[0]), *(cell.rjust(w) for cell, w in zip(line[1:], widths[1:], strict=True))]
        for line in lines
    )
    return "\n".join(f"| {' | '.join(line)} |" for line in padded)


def _number(value):
    if isinstance(value, float):
        return f"{value:.1e}" if 0 < abs(value) < 0.0005 else f"{value:.3f}"
    return "-" if value is None else str(value)


def check(
    data: Any,
    task: str | None = None,
    *,
    classes: tuple[str, ...] | None = None,
    name: str | None = None,
    max_images: int | None = None,
) -> Report:
    """Look through a dataset once, some images at a time, and say what is in it and what looks wrong.

    Args:
        data: a `Data` or a `Split`; or a `tf.data.Dataset` of (image, target), batched or not, or (images, targets)
            arrays, or a dict of those, split name -> source, the training split first. A target is a multi-hot or
            one-hot `(L,)`, a class number, or masks `(H, W)` or `(H, W, R)`.
        task: one of `base.TASKS`; known for a `Data` or `Split`.
        classes: names of the labels or classes; known for a `Data`.
        name: what the report calls the dataset.
        max_images: at most that many images of each split: of a `Data` some drawn with a fixed seed, of a
            `tf.data.Dataset` the first. Then identical images may be missed.

    Raises:
        ValueError: no task or an unknown one, an empty or infinite source, or one whose shapes are not as above.
    """
    sources, leak = data, ""
    if isinstance(data, Data):
        sources = {part.name: part for part in (data.train, data.val, data.test)}
        task, classes, name, leak = data.card.task, classes or data.card.classes, name or data.card.name, data.leak
    elif isinstance(data, Split):
        sources, task, name = {data.name: data}, data.task, name or data.name
    elif not isinstance(data, dict):
        sources = {"images": data}
    if task not in TASKS:
        raise ValueError(f"Expected task one of {TASKS}. Received: task={task!r}")
    if max_images is not None and not is_integer(max_images, 1):
        raise ValueError(f"Expected max_images >= 1 or None. Received: max_images={max_images!r}")
    if not sources:
        raise ValueError("Expected one split or more. Received: none")
    tallies = []
    for part, source in sources.items():
        tallies.append(_counted(source, task, part, max_images, tallies[0].edges if tallies else None))
    classes = _class_names(classes, tallies)
    problems = [sentence for tally in tallies for sentence in _problems_of(tally, classes)]
    for first, second in itertools.combinations(tallies, 2):
        problems += _shared(first, second)
    for other in tallies[1:]:
        problems += _differences(tallies[0], other, classes)
    notes = []
    for tally in (t for t in tallies if t.is_sample):
        of = f"of {tally.available:,}" if tally.available else "from the start"
        notes.append(f"{tally.name}: {tally.count:,} images {of} were looked at.")
    notes += [sentence for tally in tallies for sentence in _notes_of(tally, classes)]
    if all(tally.groups is None for tally in tallies):
        notes.append("Patients are not known, so a patient may be in two splits.")
    if leak:
        problems.append(f"Patients may be in two splits: {leak.rstrip(chr(46))}.")
    table = [tally.row(classes) for tally in tallies]
    return Report(name or "dataset", task, classes, table, problems, notes, tallies)


def _counted(source, task, part, max_images, edges):
    """The tally of a source, of at most `max_images`."""
    tally = Tally(part, task, edges)
    if isinstance(source, Split):
        tally.available, rows = source.num_examples, np.arange(source.num_examples)
        if max_images is not None and max_images < len(rows):
            rows = first_in_seeded_order(len(rows), max_images, 0)
            source = source.subset(rows)
        tally.names = rows if source.ids is None else source.ids
        tally.groups = None if source.groups is None else set(source.groups.tolist())
        source = (source.images, source.targets, *([] if source.rater_valid is None else [source.rater_valid]))
    elif max_images is None:
        check_ends(source, repr(part), "Leave out repeat(), or give max_images.")
    total = tally.available if max_images is None else max_images
    with tqdm(desc=f"checking {part}", total=total or None, unit="image", leave=False, delay=2) as bar:
        for members in pieces(source, task, repr(part)):
            left = len(members[0]) if max_images is None else min(len(members[0]), max_images - tally.count)
            tally.update(*(None if rows is None else rows[:left] for rows in members))
            bar.update(left)
            if tally.count == max_images:
                tally.is_sample = tally.count != tally.available
                break
    if not tally.count:
        raise ValueError(f"Expected at least one image in {part!r}. Received: none")
    return tally


def _class_names(classes, tallies):
    if tallies[0].task == SEGMENTATION:
        return tuple(classes or ("foreground",))
    most = max(len(tally.positives) for tally in tallies)
    if classes is not None and tallies[0].task == BINARY and len(classes) == 2:
        classes = classes[1:]  # of 1
    # Columns without a name are a wrong argument; class numbers without one may be wrong data, and are a problem.
    if classes is not None and (len(classes) < max(tally.columns for tally in tallies) or not len(classes)):
        raise ValueError(f"Expected {most} class names. Received: classes={tuple(classes)}")
    return tuple(map(str, range(most) if classes is None else classes))


def _problems_of(tally, classes):
    """Sentences on one split by itself."""
    name, found = tally.name, []
    if tally.count < FEW and not tally.is_sample:
        found.append(f"{name} has {tally.count} image{'s' if tally.count > 1 else ''}: too few for any number.")
    for rows, what in ((tally.not_finite, "with NaN or infinity"), (tally.constant, "of one value throughout")):
        if rows:
            found.append(f"{name} has {_images(len(rows))} {what} (first: {tally.called(rows[0])}).")
    if tally.dtype.kind == "f" and tally.low >= 0 and tally.high > 1.5:
        found.append(f"{name} has float pixels up to {tally.high:.4g}: divide by 255, or keep them as uint8.")
    if tally.dtype == np.uint8 and tally.high <= 1:
        found.append(f"{name} has uint8 pixels of 0 and 1 only: were numbers in 0..1 cast to uint8?")
    if tally.repeated:
        pair = " and ".join(tally.called(row) for row in tally.first_repeated)
        other = f", {tally.other_targets} of them with another target" if tally.other_targets else ""
        found.append(f"{name} has {_images(tally.repeated)} identical to another of it{other} (first: {pair}).")
    if tally.strange is not None:
        expected = "classes 0, 1, 2, ..." if tally.task in EXCLUSIVE else "0 and 1"
        found.append(f"{name} has other targets than {expected}, as {tally.strange}.")
    if tally.not_one_class:
        first = tally.called(tally.not_one_class[0])
        found.append(f"{name} has {_images(len(tally.not_one_class))} not of exactly one class (first: {first}).")
    return found + (_mask_problems(tally) if tally.task == SEGMENTATION else _label_problems(tally, classes))


def _mask_problems(tally):
    if not tally.masks or tally.empty == tally.masks:
        return [] if tally.is_sample else [f"All masks of {tally.name} are empty."]
    share = float(np.mean(tally.foreground))
    if share > 0.95:
        return [f"{share:.1%} of the pixels of {tally.name}'s masks are foreground: are 0 and 1 swapped?"]
    return []


def _label_problems(tally, classes):
    found, beyond = [], [(row, number) for number, row in tally.first_of.items() if number >= len(classes)]
    if beyond:
        row, number = min(beyond)
        found.append(
            f"{tally.name} has {_images(tally.positives[len(classes) :].sum())} of classes without a name, beyond 0 to "
            f"{len(classes) - 1} (first: {tally.called(row)}, of class {number})."
        )
    absent, always = _absent_and_always(tally, classes)
    if absent and not tally.is_sample:
        found.append(
            f"{tally.name} has no image of {_listed(absent)}: nothing can be learnt or measured there. A column split "
            "may help."
        )
    if always and not tally.is_sample:
        found.append(f"Every image of {tally.name} is of {_listed(always)}.")
    return found


def _absent_and_always(tally, classes):
    positives = tally.positives_of(classes)
    absent = [label for label, n in zip(classes, positives, strict=True) if n == 0]
    return absent, [label for label, n in zip(classes, positives, strict=True) if n == tally.count]


def _notes_of(tally, classes):
    """Sentences on one split by itself that need not be a fault: those of a sample may be chance."""
    found, looked_at = [], f"{_images(tally.count)} of {tally.name} looked at"
    if tally.task == SEGMENTATION:
        if tally.is_sample and tally.empty == tally.masks:
            found.append(f"All masks of the {looked_at} are empty.")
        if tally.full:
            masks = "1 mask" if tally.full == 1 else f"{tally.full:,} masks"
            found.append(
                f"{masks} of {tally.name}, of {_images(len(tally.full_images))}, cover{'s' * (tally.full == 1)} the "
                f"whole image (first: {tally.called(tally.full_images[0])})."
            )
    elif tally.is_sample:
        absent, always = _absent_and_always(tally, classes)
        if absent:
            found.append(f"None of the {looked_at} is of {_listed(absent)}.")
        if always:
            found.append(f"Every one of the {looked_at} is of {_listed(always)}.")
    return found


def _shared(first, second):
    found = []
    both = [(row, second.seen[key][0]) for key, (row, _) in first.seen.items() if key in second.seen]
    if both:
        row, other = min(both)
        found.append(
            f"{first.name} and {second.name} share {_images(len(both))}, identical in every pixel (first: "
            f"{first.called(row)} of {first.name}, {second.called(other)} of {second.name}): a leak."
        )
    shared = (first.groups or set()) & (second.groups or set())
    if shared:
        patients = f"{len(shared)} patient{'s' if len(shared) > 1 else ''}"
        found.append(f"{first.name} and {second.name} share {patients} (first: {min(shared)}): a leak.")
    return found


def _differences(train, other, classes):
    """Sentences on how a split differs from the first one by more than chance and by much."""
    found = []
    (mean, sd), (other_mean, _) = train.moments(), other.moments()
    if train.shape != other.shape or train.dtype != other.dtype:
        kinds = [f"{tally.shape} {tally.dtype}" for tally in (train, other)]
        return [f"Images of {other.name} are {kinds[1]}, of {train.name} {kinds[0]}."]
    if (np.abs(other_mean - mean) > 0.5 * sd).any():
        k = int(np.argmax(np.abs(other_mean - mean) / np.maximum(sd, 1e-12)))
        found.append(
            f"The pixel mean of {other.name} is {other_mean[k]:.4g}, of {train.name} {mean[k]:.4g}: "
            "more than half a standard deviation apart."
        )
    if train.task == SEGMENTATION:
        ours, theirs = np.array(train.foreground), np.array(other.foreground)
        if len(ours) and len(theirs) and _differs(ours.mean(), theirs.mean(), ours.var(), theirs.var(), ours, theirs):
            found.append(
                f"The foreground of {other.name}'s masks is {theirs.mean():.1%} of the pixels, of {train.name}'s "
                f"{ours.mean():.1%}."
            )
        return found
    far = []
    counts = (train.positives_of(classes), other.positives_of(classes))
    for label, ours, theirs in zip(classes, *counts, strict=True):
        p, q = ours / train.count, theirs / other.count
        pooled = (ours + theirs) / (train.count + other.count)
        variance = pooled * (1 - pooled)
        if _differs(p, q, variance, variance, range(train.count), range(other.count)):
            far.append(f"{label} {q:.1%} and {p:.1%}")
    if far:
        found.append(f"Shares of classes differ between {other.name} and {train.name}: {_listed(far)}.")
    return found


def _differs(first, second, first_variance, second_variance, first_all, second_all):
    """Whether two means differ by four standard errors, and by a factor of 2 or 15 percentage points."""
    error = np.sqrt(first_variance / len(first_all) + second_variance / len(second_all))
    much = abs(first - second) >= 0.15 or max(first, second) >= 2 * min(first, second)
    return abs(first - second) > 4 * error and much


def _images(count):
    return f"{count:,} image{'s' if count > 1 else ''}"


def _listed(words, most=6):
    return ", ".join(words[:most]) + (f" and {len(words) - most} more" if len(words) > most else "")
