"""What `check` counts in one pass over a split."""

import hashlib
import itertools

import numpy as np

from .arrays import row_sums
from .base import EXCLUSIVE, MULTI_LABEL, SEGMENTATION
from .pieces import are_class_numbers

_WALL = 24  # images that a tally keeps, for a picture
_BINS = 64
NONE = "none of these"


class Tally:
    """What is counted in one pass over one split.

    Args:
        name, task: of the split.
        edges: of the pixels' histogram; None: from the first images.
    """

    def __init__(self, name, task, edges=None):
        self.name, self.task, self.edges = name, task, edges
        self.count, self.available, self.is_sample, self.names, self.groups = 0, 0, False, None, None
        self.low, self.high, self.sums, self.pixels = np.inf, -np.inf, 0.0, 0
        self.histogram = np.zeros(_BINS)
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
        """Count some images, in the form of `pieces`."""
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
            place = self.count + k if self.count + k < _WALL else int(self._random.integers(self.count + k + 1))
            if place < _WALL:
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
            self.edges = np.linspace(start, stop, _BINS + 1)
        start, stop = self.edges[[0, -1]]
        if images.dtype == np.uint8 and (start, stop) == (0, 256):  # twice as fast
            self.histogram += np.bincount(images.ravel(), minlength=256).reshape(_BINS, -1).sum(1)
            return
        self.histogram += np.histogram(images, _BINS, (start, stop))[0]
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
            if row in constant:  # reported already
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
        """One row of the report's table."""
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
            row["positives"] = {label: int(n) for label, n in zip(classes, self.positives_of(classes), strict=True)}
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

    def positives_of(self, classes):
        """Images of each class, `(classes,)`."""
        found = self.positives[: len(classes)]
        return np.pad(found, (0, len(classes) - len(found)))

    def named(self, targets, classes):
        """Class numbers `(N,)` and the names: a class without a name has its number, other values "?"."""
        names = [*classes, *map(str, range(len(classes), len(self.positives)))]
        numbers, right = np.full(len(targets), len(names)), are_class_numbers(targets)
        numbers[right] = targets[right].astype("int64")
        return numbers, [*names, "?"]
