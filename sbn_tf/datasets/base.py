"""The contract of every dataset: a `Card` that describes it, three `Split`s, a `Data` of them."""

import hashlib
import logging
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import numpy as np

from .arrays import DiskArray, Index, row_crc32, row_sums

__all__ = [
    "BINARY",
    "EXCLUSIVE",
    "MULTI_CLASS",
    "MULTI_LABEL",
    "ORDINAL",
    "SEGMENTATION",
    "TASKS",
    "Card",
    "Data",
    "Parts",
    "Split",
]

logger = logging.getLogger(__name__)

BINARY = "binary"
MULTI_CLASS = "multi-class"
MULTI_LABEL = "multi-label"
ORDINAL = "ordinal"
SEGMENTATION = "segmentation"
TASKS = (BINARY, MULTI_CLASS, MULTI_LABEL, ORDINAL, SEGMENTATION)
EXCLUSIVE = (MULTI_CLASS, ORDINAL)  # one class an image: targets are one-hot


@dataclass(frozen=True)
class Card:
    """What a dataset is, where it comes from and under which terms. `print(card)` shows it.

    Args:
        name: name that `load` takes.
        title: one line for people.
        task: "multi-label" (any number of labels an image), "binary" (one label), "multi-class" (one class an
            image), "ordinal" (the same, classes in order) or "segmentation" (masks).
        classes: names of the labels or classes, or of the one foreground class.
        channels: 1 (grey) or 3 (RGB).
        num_raters: masks per image; 1 where there is a single truth.
        licence, citation, source: terms, what to cite, where it comes from.
        files: official file or folder names, as they are looked for under the data root.
        default_size: side in pixels of the square images that `load` gives when no size is asked for.
        counts: images of train, val and test, where the dataset fixes them, else None.
        splits: how the images are divided, in words.
        network: the customary network here, "resnet18" or "unet".
        notes: what a user should know before trusting a number.
        paper_normalisation: (mean, sd) on the 0..1 scale where the paper has constants, else None.
        checksums: (file name, md5) pairs of the official files, where they are published.
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

    def __str__(self):
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
        lines = [f"{self.name}: {self.title}"]
        return "\n".join(lines + [f"  {key:<8} {value}" for key, value in rows if value])


@dataclass(eq=False)
class Split:
    """One part (train, val or test) of a dataset.

    Images and targets are arrays in memory or `DiskArray`s, which are indexed alike; `np.asarray` reads all of one.

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
        ValueError: an empty split, or shapes, types or values other than these.
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

    # Values of a `DiskArray` were checked when it was written, and its bytes are whenever it is read.

    def _check_images(self):
        where, images = f"split {self.name!r}", self.images
        if images.ndim != 4 or images.dtype not in (np.uint8, np.float32):
            raise ValueError(
                f"Expected images (N, H, W, C) uint8 or float32 in {where}. "
                f"Received: shape {images.shape}, {images.dtype}"
            )
        if len(images) == 0:
            raise ValueError(f"Expected at least one image in {where}. Received: none. Check the files and limit.")
        if isinstance(images, np.ndarray) and images.dtype == np.float32 and not np.isfinite(images).all():
            bad = int(np.flatnonzero(~np.isfinite(images).all(axis=(1, 2, 3)))[0])
            raise ValueError(f"Expected finite pixels in {where}. Received: NaN or infinity in image {bad}.")

    def _check_targets(self):
        where, targets = f"split {self.name!r}", self.targets
        n, height, width, _ = self.images.shape
        if self.task != SEGMENTATION:
            expected, fits = f"({n}, labels)", targets.ndim == 2 and len(targets) == n
            if self.task == BINARY:
                expected, fits = f"({n}, 1)", targets.shape == (n, 1)
        else:
            expected = f"({n}, {height}, {width}, raters)"
            fits = targets.ndim == 4 and targets.shape[:3] == (n, height, width)
        if not fits or targets.dtype != np.uint8:
            raise ValueError(
                f"Expected targets {expected} uint8 in {where}. Received: shape {targets.shape}, {targets.dtype}"
            )
        if isinstance(targets, np.ndarray) and targets.max() > 1:
            raise ValueError(f"Expected targets of 0 and 1 in {where}. Received: a value of {targets.max()}")
        if self.task != SEGMENTATION:
            self._check_labels(where)
            return
        shape = (n, targets.shape[-1])
        if self.rater_valid is None:
            self.rater_valid = np.ones(shape, bool)
        if self.rater_valid.shape != shape or self.rater_valid.dtype != bool:
            raise ValueError(
                f"Expected rater_valid {shape} bool in {where}. "
                f"Received: shape {self.rater_valid.shape}, {self.rater_valid.dtype}"
            )
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
        """The same split with the examples of `index` (integers or a bool per example) alone."""
        keys = ("images", "targets", "groups", "ids", "rater_valid", "truth_probs")
        parts = {key: getattr(self, key) for key in keys}
        return replace(self, **{key: _rows(part, index) for key, part in parts.items()})

    def in_memory(self) -> "Split":
        """The same split with images and targets read into memory; itself where they are there."""
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
        images = self.images[index].astype("float32")
        if self.images.dtype == np.uint8:
            images /= np.float32(255)
        images -= self.mean
        images /= self.sd
        return images

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

    def batches(
        self,
        batch_size: int,
        *,
        seed: int | None = None,
        initial_epoch: int = 0,
        epochs: int = 1,
        augment: str | None = None,
        rater: str | None = None,
        drop_remainder: bool = False,
    ):
        """Stream of (images, targets), both float32: images normalised, targets `(B, L)` or `(B, H, W, 1)`.

        Without a seed the order is the file's and nothing is random: the stream for evaluation. With a
        seed each epoch has its own order, raters and augmentation, all functions of (seed, epoch, example)
        and of nothing else: a stream that starts at `initial_epoch=3` gives, bit for bit, what the
        uninterrupted one gives from epoch 3 on. So a resumed run equals an uninterrupted one.

        Args:
            batch_size: images per batch; the last batch of an epoch may be smaller.
            seed: integer >= 0, or None.
            initial_epoch, epochs: yields epochs `initial_epoch` to `epochs - 1`, as in `keras.Model.fit`.
            augment: None or "flips_and_quarter_turns" (the paper's for ISIC): one of the eight symmetries
                of the square, each equally likely, the same for image and mask. Needs a seed.
            rater: "random" (one valid rater's mask, each equally likely, drawn anew each epoch; needs a
                seed), "majority" (see `majority`) or "mean" (soft, see `mean_mask`). Default: "random"
                with a seed, "majority" without. Segmentation only.
            drop_remainder: leave out the smaller last batch.

        Returns:
            `tf.data.Dataset` of known length. Over several epochs give `fit` `steps_per_epoch=steps(...)`.

        Raises:
            ValueError: an option that is unknown, out of range, or random without a seed.
        """
        from . import stream

        return stream.batches(
            self,
            batch_size,
            seed=seed,
            initial_epoch=initial_epoch,
            epochs=epochs,
            augment=augment,
            rater=rater,
            drop_remainder=drop_remainder,
        )


class Parts(NamedTuple):
    """What a reader gives: the three splits, and why groups may be in two of them ("": none are)."""

    train: Split
    val: Split
    test: Split
    leak: str = ""


@dataclass(eq=False)
class Data:
    """A loaded dataset: its card and its three splits.

    Args:
        card: the description.
        train, val, test: the splits. No group (patient) is in two of them, unless `leak` says so.
        leak: why groups may be in two splits, in one sentence for the reader of a number; "" (default): none are.
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
        for i, first in enumerate(parts):
            for second in parts[i + 1 :]:
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
        """Ten hexadecimal digits that stand for all images, targets and constants: other data, other digits.

        The same whether they are in memory or on disk, where nothing is read for it.
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

        A label without a positive in training gets the number of training examples (one positive is
        assumed), so the weight stays finite; there it weighs nothing, as only positives are weighted.

        Raises:
            ValueError: for masks, or classes that exclude one another.
        """
        if self.card.task not in (MULTI_LABEL, BINARY):
            raise ValueError(
                "Expected a multi-label or binary dataset, as pos_weight is per label. "
                f"Received: {self.card.name!r} ({self.card.task})"
            )
        positives = np.asarray(self.train.targets).sum(axis=0, dtype="float64")
        negatives = self.train.num_examples - positives
        return (negatives / np.maximum(positives, 1)).astype("float32")

    def class_weights(self) -> np.ndarray:
        """Weights that make every class of the training split weigh the same: `n / (classes * n of the class)`.

        As scikit-learn's "balanced". Float32: `(L,)` for "multi-class" and "ordinal"; `(2,)`, background and
        foreground over the pixels of the valid raters' masks, for "segmentation". A class that does not occur
        in training is counted as occurring once.

        Raises:
            ValueError: for labels that do not exclude one another: `pos_weight` weighs those.
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
            raise ValueError(
                "Expected classes that exclude one another, or masks; weigh labels by pos_weight. "
                f"Received: {self.card.name!r} ({self.card.task})"
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


def _rows(part, index):
    if part is None:
        return None
    return part.select(index) if isinstance(part, DiskArray) else part[index]
