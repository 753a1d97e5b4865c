"""The contract of every dataset: a `Card` that describes it, three `Split`s, a `Data` of them."""

import hashlib
import itertools
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from .arrays import DiskArray, Index, row_crc32, row_sums
from .card import BINARY as BINARY
from .card import EXCLUSIVE as EXCLUSIVE
from .card import MULTI_CLASS as MULTI_CLASS
from .card import MULTI_LABEL as MULTI_LABEL
from .card import ORDINAL as ORDINAL
from .card import SEGMENTATION as SEGMENTATION
from .card import TASKS as TASKS
from .card import Card as Card
from .split import Split as Split
from .split import rows

__all__ = ["Data", "Parts"]

logger = logging.getLogger(__name__)

SPLITS = ("train", "val", "test")
_MEMORY_BYTES = 512 * 2**20  # splits whose images and targets take more stay on the disk


class Parts(NamedTuple):
    """What a reader gives: the three splits, and why groups may be in two of them ("": none are)."""

    train: Split
    val: Split
    test: Split
    leak: str = ""

    @classmethod
    def of(cls, task: str, index: Mapping[str, Index], leak: str = "", **columns) -> "Parts":
        """Three splits of the rows of `columns` (images, targets, groups, ...), arrays or None, by `index`."""
        of = {name: {key: rows(column, index[name]) for key, column in columns.items()} for name in SPLITS}
        train, val, test = (Split(name=name, task=task, **found) for name, found in of.items())
        return cls(train, val, test, leak)


@dataclass(eq=False)
class Data:
    """A loaded dataset: its card and its three splits.

    Args:
        card: the description.
        train, val, test: the splits. No group (patient) is in two of them, unless `leak` says so.
        leak: why groups may be in two splits, in one sentence; "" (default): none are.
        mean, sd: `(C,)` float32 on the 0..1 scale; every split's `normalised` uses them. By default the
            pixel mean and standard deviation of the training split, per channel.

    Raises:
        ValueError: a patient or image in two splits, groups or ids of some splits only, or splits of different shapes.
    """

    card: Card
    train: Split
    val: Split
    test: Split
    mean: np.ndarray | None = None
    sd: np.ndarray | None = None
    leak: str = ""

    def __post_init__(self):
        parts = (self.train, self.val, self.test)
        forms = {(p.images.shape[1:], str(p.images.dtype), p.targets.shape[1:], p.task) for p in parts}
        if len(forms) > 1:
            raise ValueError(f"Expected splits of one shape and dtype in {self.card.name!r}. Received: {sorted(forms)}")
        for first, second in itertools.combinations(parts, 2):
            self._check_disjoint(first, second)
        if self.mean is None or self.sd is None:
            self.mean, self.sd = channel_statistics(self.train.images)
        if self.leak:
            logger.warning("%s: %s", self.card.name, self.leak)
        for part in parts:
            part.mean, part.sd = self.mean, self.sd

    def _check_disjoint(self, first, second):
        for what, key in (("patient", "groups"), ("image", "ids")):
            if key == "groups" and self.leak:
                continue
            ours, theirs = getattr(first, key), getattr(second, key)
            if (ours is None) != (theirs is None):
                raise ValueError(
                    f"Expected {key} of every split of {self.card.name!r} or of none. Received: {key} of "
                    f"{(second if ours is None else first).name} and none of {(first if ours is None else second).name}"
                )
            both = [] if ours is None else np.intersect1d(ours, theirs)
            if len(both):
                raise ValueError(
                    f"Expected every {what} of {self.card.name!r} in one split. "
                    f"Received: {len(both)} in both {first.name} and {second.name}, as {both[0]}"
                )

    @property
    def input_shape(self) -> tuple[int, int, int]:
        """Shape of one image, `(H, W, C)`."""
        return self.train.images.shape[1:]

    @property
    def num_outputs(self) -> int:
        """Outputs the network needs, one per label or class, or one per pixel (1) for masks."""
        return 1 if self.card.task == SEGMENTATION else self.train.targets.shape[1]

    def digest(self) -> str:
        """Ten hexadecimal digits that depend on every image, target and constant.

        They are the same in memory and on disk, and on disk no image is read for them.
        """
        found = hashlib.blake2b(digest_size=5)
        for part in (self.train, self.val, self.test):
            for array in (part.images, part.targets):
                found.update(f"{array.dtype.str}{array.shape}".encode())
                found.update((array.crc32() if isinstance(array, DiskArray) else row_crc32(array)).data)
            for array in (a for a in (part.rater_valid, self.mean, self.sd) if a is not None):
                found.update(f"{array.dtype.str}{array.shape}".encode())
                found.update(np.ascontiguousarray(array).data)
        return found.hexdigest()

    def pos_weight(self) -> np.ndarray:
        """Per label, negatives / positives in the training split: the paper's class weights. `(L,)` float32.

        A label without a positive in training gets the number of training examples, as if it had one: the weight stays
        finite, and has no effect there, as only positives are weighted.

        Raises:
            ValueError: for masks, or classes that exclude one another.
        """
        if self.card.task not in (MULTI_LABEL, BINARY):
            received = f"{self.card.name!r} ({self.card.task})"
            raise ValueError(
                f"Expected a multi-label or binary dataset, as pos_weight is per label. Received: {received}"
            )
        positives = np.asarray(self.train.targets).sum(axis=0, dtype="float64")
        negatives = self.train.num_examples - positives
        return (negatives / np.maximum(positives, 1)).astype("float32")

    def class_weights(self) -> np.ndarray:
        """Weights that make every class of the training split weigh the same: `n / (classes * n of the class)`.

        They are scikit-learn's "balanced". Float32: `(L,)` for "multi-class" and "ordinal"; `(2,)`, background and
        foreground over the pixels of the valid raters' masks, for "segmentation". A class that does not occur in
        training counts as occurring once.

        Raises:
            ValueError: for labels that do not exclude one another; `pos_weight` is for those.
        """
        if self.card.task in EXCLUSIVE:
            counts = np.asarray(self.train.targets).sum(axis=0, dtype="float64")
        elif self.card.task == SEGMENTATION:
            foreground = total = 0.0
            for start in range(0, self.train.num_examples, 256):
                part = slice(start, start + 256)
                valid = np.asarray(self.train.rater_valid)[part]
                masks = self.train.targets[part]
                foreground += float((masks.sum(axis=(1, 2), dtype="float64") * valid).sum())
                total += float(valid.sum()) * masks.shape[1] * masks.shape[2]
            counts = np.array([total - foreground, foreground])
        else:
            received = f"{self.card.name!r} ({self.card.task})"
            raise ValueError(
                f"Expected classes that exclude one another, or masks; weigh labels by pos_weight. Received: {received}"
            )
        return (counts.sum() / (len(counts) * np.maximum(counts, 1))).astype("float32")

    def __str__(self):
        sizes = ", ".join(f"{p.name} {p.num_examples}" for p in (self.train, self.val, self.test))
        shape = " x ".join(map(str, self.input_shape))
        moments = ", ".join(f"{m:.3f} +- {s:.3f}" for m, s in zip(self.mean, self.sd, strict=True))
        leak = f"; {self.leak}" if self.leak else ""
        return f"{self.card.name}: {sizes} images of {shape}, pixels {moments}{leak}"


def first_in_seeded_order(n: int, limit: int, seed: int) -> np.ndarray:
    """The first `limit` of a seeded order of `range(n)`, sorted: a smaller limit takes a subset of these."""
    return np.sort(np.random.default_rng([seed, 711]).permutation(n)[:limit])


def read_if_small(splits: Sequence[Split], in_memory: bool | None) -> list[Split]:
    """The splits, read into memory if `in_memory` says so; None: if they take at most `_MEMORY_BYTES`."""
    if in_memory or (in_memory is None and sum(split.nbytes for split in splits) <= _MEMORY_BYTES):
        return [split.in_memory() for split in splits]
    return list(splits)


def channel_statistics(images: np.ndarray | DiskArray) -> tuple[np.ndarray, np.ndarray]:
    """Mean and standard deviation per channel on the 0..1 scale, `(C,)` float32 each."""
    scale = 255.0 if images.dtype == np.uint8 else 1.0
    count = images.size // images.shape[-1]
    if isinstance(images, DiskArray):
        sums = images.sums().sum(0)
    else:  # in parts: the squares of a large split would not fit in memory
        sums = sum(row_sums(images[start : start + 1024]).sum(0) for start in range(0, len(images), 1024))
    mean, square = sums[:, 0] / count / scale, sums[:, 1] / count / scale**2
    sd = np.sqrt(np.maximum(square - mean**2, 0))
    if not (sd > 1e-6).all():
        raise ValueError(f"Expected training images that vary. Received: pixel standard deviation {sd}")
    return mean.astype("float32"), sd.astype("float32")
