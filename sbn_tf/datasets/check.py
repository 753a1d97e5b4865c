"""A check of any dataset before a number is believed: what is in it, what looks wrong, and one picture."""

import hashlib
import itertools
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from tqdm import tqdm

from .arrays import row_sums
from .base import BINARY, EXCLUSIVE, MULTI_LABEL, SEGMENTATION, TASKS, Data, Split, first_in_seeded_order
from .tensors import PIECE_BYTES, are_class_numbers, pieces

__all__ = ["Report", "check"]

WALL = 24  # images that a report keeps, for its picture
FEW = 10  # images that no number of a split should rest on
BINS = 64
NONE = "none of these"


@dataclass(eq=False)
class Report:
    """What `check` found. `print(report)` shows it, in Markdown; `report.plot()` is a picture of it.

    Args:
        name: of the dataset.
        task: as of its card.
        classes: names of the labels or classes, or of the foreground.
        table: one row for each split, fact -> value. Pixels are as stored (uint8: 0..255); "identical" counts the
            images that repeat another of the same split; "positives" are the images of each class, "none of these"
            (multi-label) those of none.
        problems: what should be understood or put right before training, a sentence each.
        notes: what a reader of a number should know, a sentence each.
    """

    name: str
    task: str
    classes: tuple[str, ...]
    table: list[dict]
    problems: list[str]
    notes: list[str]
    _tallies: list = field(default_factory=list, repr=False)

    def __str__(self):
        from sbn_tf.experiments.plots import format_table  # matplotlib: not at import

        names = [row["split"] for row in self.table]
        facts = [key for key in self.table[0] if key not in ("split", "positives", NONE)]
        parts = [f"{self.name}: {self.task}"]
        parts.append(format_table({key: {row["split"]: row[key] for row in self.table} for key in facts}, names))
        if self.task != SEGMENTATION:
            shares = {
                label: {row["split"]: _count_and_share(row["positives"][label], row["images"]) for row in self.table}
                for label in self.table[0]["positives"]
            }
            if self.task == MULTI_LABEL:
                none = {row["split"]: _count_and_share(row[NONE], row["images"]) for row in self.table}
                shares.setdefault(NONE, none)
            parts.append("Images of each class:\n\n" + format_table(shares, names))
        if not self.problems:
            parts.append("No problem found.")
        for title, sentences in (("Problems", self.problems), ("Notes", self.notes)):
            if sentences:
                parts.append(f"{title}:\n\n" + "\n".join(f"- {sentence}" for sentence in sentences))
        return "\n\n".join(parts)

    def plot(self):
        """One figure: a wall of images of the first split, pixel values, and the balance of classes or foreground."""
        import matplotlib.pyplot as plt

        from sbn_tf.experiments import plots

        first = self._tallies[0]
        figure = plt.figure(figsize=(12.5, 6.2), layout="constrained")
        left, right = figure.subfigures(1, 2, width_ratios=(1.75, 1))
        images, targets, valid = (None if part[0] is None else np.stack(part) for part in zip(*first.wall, strict=True))
        names = self.classes
        if self.task in EXCLUSIVE and targets.size == len(targets):
            targets, names = first.named(targets.reshape(len(targets)), self.classes)
        plots.plot_wall(images, targets, valid, class_names=names or None, columns=6, figure=left)
        pixels, balance = right.subplots(2, 1, height_ratios=(1, 1.6))
        colours = plt.get_cmap("viridis")(np.linspace(0, 0.85, len(self._tallies)))
        for tally, colour in zip(self._tallies, colours, strict=True):
            density = tally.histogram / tally.histogram.sum()
            pixels.stairs(density, tally.edges, color=colour, label=tally.name)
        pixels.set_xlabel("pixel value, as stored")
        pixels.set_ylabel("share of pixels")
        pixels.legend(frameon=False, fontsize="small")
        if self.task == SEGMENTATION:
            bins = np.linspace(0, max(max(tally.foreground, default=0) for tally in self._tallies) or 1, 31)
            for tally, colour in zip(self._tallies, colours, strict=True):
                counts, _ = np.histogram(tally.foreground, bins)
                balance.stairs(counts / max(counts.sum(), 1), bins, color=colour, label=tally.name)
            balance.set_xlabel("foreground, share of a mask's pixels")
            balance.set_ylabel("share of masks")
        else:
            names = list(self.table[0]["positives"])
            height = 0.8 / len(self._tallies)
            for k, (row, colour) in enumerate(zip(self.table, colours, strict=True)):
                shares = np.array(list(row["positives"].values())) / row["images"]
                balance.barh(np.arange(len(names)) + (k + 0.5) * height - 0.4, shares, height, color=colour)
            short = list(map(plots.short_name, names))
            balance.set_yticks(range(len(names)), short, fontsize="small" if len(names) < 20 else "xx-small")
            balance.invert_yaxis()
            balance.set_xlabel("share of images")
        for ax in (pixels, balance):
            ax.spines[["top", "right"]].set_visible(False)
        count = len(self.problems)
        found = "no problem found" if not count else f"{count} problem{'s' if count > 1 else ''} found"
        figure.suptitle(f"{self.name} ({self.task}): {found}; {len(images)} images of {first.name}")
        return figure


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

    Returns:
        `Report`.

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
    if max_images is not None and (isinstance(max_images, bool) or max_images < 1):
        raise ValueError(f"Expected max_images >= 1 or None. Received: max_images={max_images!r}")
    if not sources:
        raise ValueError("Expected one split or more. Received: none")
    tallies = []
    for part, source in sources.items():
        tally = _Tally(part, task, tallies[0].edges if tallies else None)
        for images, targets, valid in _limited(source, task, part, max_images, tally):
            tally.update(images, targets, valid)
        if not tally.count:
            raise ValueError(f"Expected at least one image in {part!r}. Received: none")
        tallies.append(tally)
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
        notes.append("Patients are not known: whether one is in two splits cannot be told.")
    if leak:
        problems.append(f"Patients may be in two splits: {leak.rstrip(chr(46))}.")
    table = [tally.row(classes) for tally in tallies]
    return Report(name or "dataset", task, classes, table, problems, notes, tallies)


def _limited(source, task, part, max_images, tally):
    """Pieces of a source, cut to `max_images`; what it says of itself goes to the tally."""
    if isinstance(source, Split):
        tally.available = source.num_examples
        rows = np.arange(source.num_examples)
        if max_images is not None and max_images < len(rows):
            rows = first_in_seeded_order(len(rows), max_images, 0)
        tally.names = rows if source.ids is None else source.ids[rows]
        tally.groups = None if source.groups is None else set(source.groups[rows].tolist())
        step = max(1, PIECE_BYTES // int(np.prod(source.images.shape[1:]) * source.images.dtype.itemsize))
        found = (
            (source.images[k], source.targets[k], None if source.rater_valid is None else source.rater_valid[k])
            for k in (rows[start : start + step] for start in range(0, len(rows), step))
        )
    else:
        if max_images is None and hasattr(source, "cardinality") and int(source.cardinality()) == -1:
            raise ValueError(
                f"Expected a dataset with an end in {part!r}. Received: an infinite one.\n"
                "Leave out repeat(), or give max_images."
            )
        found = pieces(source, task, repr(part))
    total = tally.available if max_images is None else max_images
    with tqdm(desc=f"checking {part}", total=total or None, unit="image", leave=False, delay=2) as bar:
        for images, targets, valid in found:
            left = len(images) if max_images is None else min(len(images), max_images - tally.count)
            yield images[:left], targets[:left], None if valid is None else valid[:left]
            bar.update(left)
            if tally.count == max_images:
                tally.is_sample = tally.count != tally.available
                break


class _Tally:
    """What is counted in one pass over one split."""

    def __init__(self, name, task, edges):
        self.name, self.task, self.edges = name, task, edges
        self.count, self.available, self.is_sample, self.names, self.groups = 0, 0, False, None, None
        self.low, self.high, self.sums, self.pixels = np.inf, -np.inf, 0.0, 0
        self.histogram = np.zeros(BINS)
        self.seen, self.constant, self.not_finite = {}, [], []
        self.repeated, self.other_targets, self.first_repeated = 0, 0, None
        self.positives, self.not_one_class, self.strange = np.zeros(0, int), [], None
        self.columns, self.first_of, self.none = 0, {}, 0
        self.masks, self.empty, self.foreground, self.agreement = 0, 0, [], []
        self.full, self.full_images = 0, []
        self.wall, self._random = [], np.random.default_rng(24)

    def called(self, row):
        """A name for an image: its id or its number."""
        return f"image {row}" if self.names is None else f"image {self.names[row]}"

    def update(self, images, targets, valid):
        if not self.count:
            self.shape, self.dtype = images.shape[1:], images.dtype
        if images.dtype.kind == "f":
            finite = np.isfinite(images)
            if not finite.all():
                bad = ~finite.all(axis=(1, 2, 3))
                self.not_finite += (np.flatnonzero(bad) + self.count).tolist()
                images = np.where(finite, images, 0).astype(images.dtype)
        self._count_pixels(images)
        if self.task == SEGMENTATION:
            valid = np.ones((len(images), targets.shape[-1]), bool) if valid is None else valid
            self._count_masks(targets, valid)
        else:
            self._count_labels(targets)
        self._look_for_repeats(images, targets)
        for k in range(len(images)):  # a sample of all that have passed, each with the same chance
            place = self.count + k if self.count + k < WALL else int(self._random.integers(self.count + k + 1))
            if place < WALL:
                kept = (None if part is None else part[k].copy() for part in (images, targets, valid))
                self.wall[place : place + 1] = [tuple(kept)]
        self.count += len(images)

    def _count_pixels(self, images):
        low, high = images.min(axis=(1, 2, 3)), images.max(axis=(1, 2, 3))
        self.constant += (np.flatnonzero(low == high) + self.count).tolist()
        self.low, self.high = min(self.low, low.min()), max(self.high, high.max())
        self.sums = self.sums + row_sums(images).sum(0)
        self.pixels += images.size // images.shape[-1]
        if self.edges is None:
            start, stop = (0, 256) if images.dtype == np.uint8 else (0, 1)
            if low.min() < start or high.max() > stop:
                margin = 0.25 * (float(high.max()) - float(low.min()))
                start, stop = float(low.min()) - margin, float(high.max()) + margin
            self.edges = np.linspace(start, stop, BINS + 1)
        start, stop = self.edges[[0, -1]]
        if images.dtype == np.uint8 and (start, stop) == (0, 256):  # twice as fast
            self.histogram += np.bincount(images.ravel(), minlength=256).reshape(BINS, -1).sum(1)
            return
        self.histogram += np.histogram(images, BINS, (start, stop))[0]
        self.histogram[0] += (images < start).sum()
        self.histogram[-1] += (images > stop).sum()

    def _count_labels(self, targets):
        if targets.ndim == 2 and targets.shape[1] == 1 and self.task in EXCLUSIVE:
            targets = targets[:, 0]
        if targets.ndim == 1 and self.task in EXCLUSIVE:  # class numbers
            rows = np.flatnonzero(are_class_numbers(targets))
            if self.strange is None and len(rows) < len(targets):
                self.strange = targets[~are_class_numbers(targets)][0]
            numbers = targets[rows].astype("int64")
            for number, k in zip(*np.unique(numbers, return_index=True), strict=True):
                self.first_of.setdefault(int(number), int(rows[k]) + self.count)
            counts = np.bincount(numbers)
        else:
            targets = targets.reshape(len(targets), -1)
            self._look_for_strange(targets)
            if self.task in EXCLUSIVE:
                self.not_one_class += (np.flatnonzero((targets > 0.5).sum(1) != 1) + self.count).tolist()
            self.none += int((~(targets > 0.5).any(1)).sum())
            counts = (targets > 0.5).sum(0)
            self.columns = max(self.columns, len(counts))
        length = max(len(counts), len(self.positives))
        self.positives = np.pad(self.positives, (0, length - len(self.positives)))
        self.positives += np.pad(counts, (0, length - len(counts)))

    def _count_masks(self, masks, valid):
        self._look_for_strange(masks)
        flat = (masks > 0.5).reshape(len(masks), -1, masks.shape[-1]).astype("float32")
        both = np.matmul(flat.transpose(0, 2, 1), flat)  # (B, R, R): pixels that two raters share
        area = np.diagonal(both, axis1=1, axis2=2)
        drew = valid & (area > 0)
        self.masks += int(valid.sum())
        self.empty += int((valid & (area == 0)).sum())
        full = valid & (masks > 0.5).all(axis=(1, 2))
        self.full += int(full.sum())
        self.full_images += (np.flatnonzero(full.any(1)) + self.count).tolist()
        self.foreground += (area[valid] / flat.shape[1]).tolist()
        for a, b in itertools.combinations(range(masks.shape[-1]), 2):
            pair = drew[:, a] & drew[:, b]
            union = area[:, a] + area[:, b] - both[:, a, b]
            self.agreement += (both[pair, a, b] / union[pair]).tolist()

    def _look_for_strange(self, targets):
        if self.strange is None and not (right := (targets == 0) | (targets == 1)).all():
            self.strange = targets[~right][0]

    def _look_for_repeats(self, images, targets):
        constant = set(self.constant)
        for k in range(len(images)):
            row = self.count + k
            if row in constant:  # told already
                continue
            image, target = (hashlib.blake2b(a[k].tobytes(), digest_size=16).digest() for a in (images, targets))
            if image not in self.seen:
                self.seen[image] = (row, target)
                continue
            self.repeated += 1
            self.other_targets += self.seen[image][1] != target
            self.first_repeated = self.first_repeated or (self.seen[image][0], row)

    def moments(self):
        """Mean and standard deviation of each channel, as stored."""
        mean = self.sums[:, 0] / self.pixels
        return mean, np.sqrt(np.maximum(self.sums[:, 1] / self.pixels - mean**2, 0))

    def row(self, classes):
        mean, sd = self.moments()
        row = {
            "split": self.name,
            "images": self.count,
            "patients": None if self.groups is None else len(self.groups),
            "shape": " x ".join(map(str, self.shape)),
            "dtype": str(self.dtype),
            "min": self.low.item(),
            "max": self.high.item(),
            "mean": float(mean.mean()),
            "sd": float(np.sqrt(max((sd**2 + mean**2).mean() - mean.mean() ** 2, 0))),  # over all channels
            "constant": len(self.constant),
            "identical": self.repeated,
        }
        if self.task != SEGMENTATION:
            if self.task == MULTI_LABEL:
                row[NONE] = self.none
            row["positives"] = {label: int(n) for label, n in zip(classes, self._positives(classes), strict=True)}
            return row
        return row | {
            "masks": self.masks,
            "masks an image": self.masks / self.count,
            "empty masks": self.empty,
            "foreground, median": float(np.median(self.foreground)),
            "foreground, min": min(self.foreground),
            "foreground, max": max(self.foreground),
            "raters' IoU": float(np.mean(self.agreement)) if self.agreement else None,
        }

    def _positives(self, classes):
        found = self.positives[: len(classes)]
        return np.pad(found, (0, len(classes) - len(found)))

    def named(self, targets, classes):
        """Class numbers `(N,)` and their names: a number stands for itself where it has none, "?" for what is none."""
        names = [*classes, *map(str, range(len(classes), len(self.positives)))]
        numbers, right = np.full(len(targets), len(names)), are_class_numbers(targets)
        numbers[right] = targets[right].astype("int64")
        return numbers, [*names, "?"]


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
        found.append(f"{tally.name} has no image of {_listed(absent)}: nothing can be learnt or measured there.")
    if always and not tally.is_sample:
        found.append(f"Every image of {tally.name} is of {_listed(always)}.")
    return found


def _absent_and_always(tally, classes):
    positives = tally._positives(classes)
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
    counts = (train._positives(classes), other._positives(classes))
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


def _count_and_share(count, total):
    return f"{count:,} ({count / total:.1%})"
