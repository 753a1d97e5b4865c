"""One part of a dataset: images, targets and what is known of them, in memory or on disk."""

from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from . import stream
from .arrays import DiskArray, Index
from .card import BINARY, EXCLUSIVE, SEGMENTATION, TASKS

__all__ = ["Split"]


@dataclass(eq=False)
class Split:
    """One part (train, val or test) of a dataset.

    Images and targets are arrays in memory or `DiskArray`s, which are indexed in the same way; `np.asarray` reads all.

    Args:
        name: "train", "val" or "test"; used in messages.
        task: one of `TASKS`.
        images: `(N, H, W, C)`, uint8 (0..255) or float32 (0..1).
        targets: uint8, 0 or 1. Labels: `(N, L)`; one-hot where one class excludes the others ("multi-class",
            "ordinal"), one column for "binary". Segmentation: `(N, H, W, R)`, one mask per rater.
        groups: `(N,)` patient or case of each image, or None where unknown.
        ids: `(N,)` name of each image in its source, or None.
        rater_valid: `(N, R)` bool, which masks exist (segmentation; default: all). Each image needs one.
        truth_probs: the generating probability of a 1, float32, where it is known (phantoms):
            `(N, L)` per label, or `(N, H, W, 1)` that a rater taken at random marks the pixel. Else None.
        mean, sd: `(C,)` float32 on the 0..1 scale, used by `normalised` and `batches`.

    Raises:
        ValueError: an empty split, or other shapes, types or values than these.
    """

    name: str
    task: str
    images: np.ndarray | DiskArray
    targets: np.ndarray | DiskArray
    groups: np.ndarray | None = None
    ids: np.ndarray | None = None
    rater_valid: np.ndarray | None = None
    truth_probs: np.ndarray | None = None
    mean: np.ndarray = field(default_factory=lambda: np.zeros(1, "float32"))
    sd: np.ndarray = field(default_factory=lambda: np.ones(1, "float32"))

    def __post_init__(self):
        if self.task not in TASKS:
            raise ValueError(f"Expected task one of {TASKS}. Received: task={self.task!r}")
        self._check_images()
        self._check_targets()
        n = len(self.images)
        for key in ("groups", "ids", "truth_probs"):
            value = getattr(self, key)
            if value is not None and len(value) != n:
                raise ValueError(f"Expected {n} {key} in split {self.name!r}. Received: {len(value)}")

    # The values of a `DiskArray` were checked when it was written; its bytes are checked whenever it is read.

    def _check_images(self):
        where, images = f"split {self.name!r}", self.images
        if images.ndim != 4 or images.dtype not in (np.uint8, np.float32):
            received = f"shape {images.shape}, {images.dtype}"
            raise ValueError(f"Expected images (N, H, W, C) uint8 or float32 in {where}. Received: {received}")
        if len(images) == 0:
            raise ValueError(f"Expected at least one image in {where}. Received: none. Check the files and limit.")
        if isinstance(images, np.ndarray) and images.dtype == np.float32 and not np.isfinite(images).all():
            bad = int(np.flatnonzero(~np.isfinite(images).all(axis=(1, 2, 3)))[0])
            raise ValueError(f"Expected finite pixels in {where}. Received: NaN or infinity in image {bad}.")

    def _check_targets(self):
        where, targets = f"split {self.name!r}", self.targets
        n, height, width, _ = self.images.shape
        if self.task == SEGMENTATION:
            expected = f"({n}, {height}, {width}, raters)"
            fits = targets.ndim == 4 and targets.shape[:3] == (n, height, width)
        elif self.task == BINARY:
            expected, fits = f"({n}, 1)", targets.shape == (n, 1)
        else:
            expected, fits = f"({n}, labels)", targets.ndim == 2 and len(targets) == n
        if not fits or targets.dtype != np.uint8:
            received = f"shape {targets.shape}, {targets.dtype}"
            raise ValueError(f"Expected targets {expected} uint8 in {where}. Received: {received}")
        if isinstance(targets, np.ndarray) and targets.max() > 1:
            raise ValueError(f"Expected targets of 0 and 1 in {where}. Received: a value of {targets.max()}")
        if self.task != SEGMENTATION:
            self._check_labels(where)
            return
        shape = (n, targets.shape[-1])
        if self.rater_valid is None:
            self.rater_valid = np.ones(shape, bool)
        if self.rater_valid.shape != shape or self.rater_valid.dtype != bool:
            received = f"shape {self.rater_valid.shape}, {self.rater_valid.dtype}"
            raise ValueError(f"Expected rater_valid {shape} bool in {where}. Received: {received}")
        if not self.rater_valid.any(axis=1).all():
            bad = int(np.flatnonzero(~self.rater_valid.any(axis=1))[0])
            raise ValueError(f"Expected one valid mask or more per image in {where}. Received: none for image {bad}.")

    def _check_labels(self, where):
        if self.rater_valid is not None:
            raise ValueError(f"Expected no rater_valid for labels, in {where}: only masks have raters.")
        if self.task in EXCLUSIVE:
            classes = np.asarray(self.targets).sum(axis=1)
            if (classes != 1).any():
                bad = int(np.flatnonzero(classes != 1)[0])
                raise ValueError(
                    f"Expected one class per image in {where} ({self.task}). Received: {classes[bad]} for image {bad}."
                )

    @property
    def num_examples(self) -> int:
        """Number of images."""
        return len(self.images)

    @property
    def num_raters(self) -> int:
        """Masks per image (segmentation), or 1."""
        return self.targets.shape[-1] if self.task == SEGMENTATION else 1

    @property
    def nbytes(self) -> int:
        """Bytes of images and targets, in memory or on disk."""
        return self.images.nbytes + self.targets.nbytes

    def subset(self, index: Index) -> "Split":
        """The same split with only the examples of `index` (integers or a bool per example)."""
        keys = ("images", "targets", "groups", "ids", "rater_valid", "truth_probs")
        return replace(self, **{key: rows(getattr(self, key), index) for key in keys})

    def in_memory(self) -> "Split":
        """The same split with images and targets read into memory; itself if they are in memory."""
        if isinstance(self.images, np.ndarray) and isinstance(self.targets, np.ndarray):
            return self
        return replace(self, images=np.asarray(self.images), targets=np.asarray(self.targets))

    def steps(self, batch_size: int, drop_remainder: bool = False) -> int:
        """Batches in one epoch; the last, smaller one counts unless `drop_remainder`."""
        if batch_size < 1:
            raise ValueError(f"Expected batch_size >= 1. Received: batch_size={batch_size}")
        return self.num_examples // batch_size if drop_remainder else -(-self.num_examples // batch_size)

    def normalised(self, index: int | Index = slice(None)) -> np.ndarray:
        """Images as the network sees them: `(pixel on the 0..1 scale - mean) / sd`, float32 `(N, H, W, C)`.

        Args:
            index: which images (any numpy index on the first axis); all of them by default.
        """
        return normalise(self.images[index], self.mean, self.sd)

    def mean_mask(self, index: Index = slice(None)) -> np.ndarray:
        """Share of the valid raters who marked each pixel, float32 `(N, H, W, 1)`.

        Args:
            index: which images (an index that keeps the first axis); all of them by default.
        """
        if self.task != SEGMENTATION:
            raise ValueError(f"Expected a split with masks. Received: split {self.name!r} of task={self.task!r}")
        valid = np.asarray(self.rater_valid)[index][:, None, None, :]
        marks = (self.targets[index] * valid).sum(axis=-1, keepdims=True, dtype="float32")
        return marks / valid.sum(axis=-1, keepdims=True, dtype="float32")

    def majority(self, index: Index = slice(None)) -> np.ndarray:
        """Pixels that at least half of the valid raters marked, uint8 `(N, H, W, 1)`.

        A tie (2 of 4) counts as marked: the 50 % consensus customary for LIDC (Kubota et al. 2011).

        Args:
            index: which images (an index that keeps the first axis); all of them by default.
        """
        return (self.mean_mask(index) >= 0.5).astype("uint8")

    batches = stream.batches


def normalise(images: np.ndarray, mean: np.ndarray, sd: np.ndarray) -> np.ndarray:
    """`(pixel on the 0..1 scale - mean) / sd`, float32, of images (..., channels): uint8, or float32 on that scale."""
    found = images.astype("float32")
    if images.dtype == np.uint8:
        found /= np.float32(255)
    found -= mean
    found /= sd
    return found


def rows(column: Any, index: Index) -> Any:
    """Rows of an array, on the disk if it is a `DiskArray`; None of None."""
    if column is None:
        return None
    return column.select(index) if isinstance(column, DiskArray) else column[index]
