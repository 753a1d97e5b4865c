"""Images and targets of any source, some at a time, in one form."""

from collections.abc import Iterator
from typing import Any

import numpy as np

from .arrays import DiskArray
from .base import SEGMENTATION

PIECE_BYTES = 2**22
_MOST_CLASSES = 10_000


def pieces(
    source: Any, task: str, where: str = "the dataset"
) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray | None]]:
    """Images, targets and rater_valid (or None) of a source, some at a time; checks shapes, not values.

    Args:
        source: a `tf.data.Dataset` of (image, target), batched or not, or (images, targets) arrays. With masks, a
            third member may say which of them exist: bool, one for each rater.
        task: one of `base.TASKS`.
        where: what messages call it.

    Yields:
        images `(B, H, W, C)`; targets `(B, L)`, or `(B,)` class numbers, or `(B, H, W, R)`; rater_valid `(B, R)`.

    Raises:
        ValueError: members, ranks or shapes that are not these, or an element unlike the first.
    """
    first = None
    for members in _members(source, task, where):
        images, targets, valid = _as_batch(members, task, where)
        shapes = (images.shape[1:], targets.shape[1:])
        first = first or shapes
        if shapes != first:
            what, k = ("images", 0) if shapes[0] != first[0] else ("targets", 1)
            raise ValueError(
                f"Expected {what} of one shape, {first[k]}, in {where}. Received: {shapes[k]}.\n"
                "Resize or crop them before, as by tf.image.resize."
            )
        if len(images):
            yield images, targets, valid


def check_ends(source: Any, part: str, advice: str) -> None:
    """Raises a ValueError for a `tf.data.Dataset` that is known to be infinite."""
    if hasattr(source, "cardinality") and int(source.cardinality()) == -1:
        raise ValueError(f"Expected a dataset with an end for {part}. Received: an infinite one.\n{advice}")


def _members(source, task, where):
    if hasattr(source, "as_numpy_iterator"):
        for element in source.as_numpy_iterator():
            yield _pair(element, task, where)
        return
    members = _pair(source, task, where)
    members = [part if isinstance(part, DiskArray) else np.asarray(part) for part in members]
    if members[0].ndim not in (3, 4):
        raise ValueError(f"Expected images (N, H, W) or (N, H, W, C) in {where}. Received: shape {members[0].shape}")
    lengths = [len(part) if part.ndim else 0 for part in members]
    if len(set(lengths)) > 1:
        raise ValueError(f"Expected as many targets as images in {where}. Received: {' and '.join(map(str, lengths))}")
    if members[0].ndim == 3:
        members[0] = members[0][..., None]
    step = max(1, PIECE_BYTES // max(members[0].nbytes // max(lengths[0], 1), 1))
    for start in range(0, lengths[0], step):
        yield tuple(part[start : start + step] for part in members)


def _pair(element, task, where):
    most = 3 if task == SEGMENTATION else 2
    if not isinstance(element, tuple | list) or not 2 <= len(element) <= most:
        received = f"{len(element)} members" if isinstance(element, tuple | list) else type(element).__name__
        raise ValueError(
            f"Expected pairs (image, target) in {where}. Received: {received}.\n"
            "Map the dataset to pairs: dataset.map(lambda ...: (image, target))."
        )
    return tuple(element)


def _as_batch(members, task, where):
    """Arrays with a batch axis and a channel axis.

    An image of rank 4 is a batch, one of rank 2 a single grey image. An image of rank 3 is single if its last axis has
    1 or 3 channels, else a batch of grey images.
    """
    members = [np.asarray(part) for part in members]
    images, targets = members[:2]
    valid = members[2] if len(members) == 3 else None
    if images.ndim == 2 or (images.ndim == 3 and images.shape[-1] in (1, 3)):
        images, targets = images[None], targets[None]
        valid = None if valid is None else valid[None]
    if images.ndim == 3:
        images = images[..., None]
    if images.ndim != 4 or images.shape[-1] not in (1, 3):
        raise ValueError(
            f"Expected images (H, W), (H, W, 1) or (H, W, 3), or batches of them, in {where}. "
            f"Received: shape {members[0].shape}"
        )
    if task == SEGMENTATION:
        targets = targets[..., None] if targets.ndim == 3 else targets
        expected, fits = "masks (H, W) or (H, W, raters)", targets.ndim == 4 and targets.shape[:3] == images.shape[:3]
    else:
        expected, fits = "labels (L,) or a class number ()", targets.ndim in (1, 2) and len(targets) == len(images)
    if not fits:
        raise ValueError(
            f"Expected {expected} for each image in {where}. "
            f"Received: images {members[0].shape}, targets {members[1].shape}"
        )
    if valid is not None and (valid.dtype != bool or valid.shape != (len(images), targets.shape[-1])):
        raise ValueError(
            f"Expected rater_valid of {targets.shape[-1]} bool for each image in {where}. "
            f"Received: shape {members[2].shape}, {members[2].dtype}"
        )
    return images, targets, valid


def are_class_numbers(targets: np.ndarray) -> np.ndarray:
    """Which values are whole numbers from 0 to 9,999, bool; text is not."""
    if targets.dtype.kind not in "biuf":
        return np.zeros(targets.shape, bool)
    return (targets >= 0) & (targets < _MOST_CLASSES) & (np.floor(targets) == targets)
