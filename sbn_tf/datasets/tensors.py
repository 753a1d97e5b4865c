"""Any three `tf.data.Dataset`s, or numpy arrays, of images and targets as a `Data`, under the contract of all others.

    data = datasets.from_tf_data(train, val, test, task="multi-class", classes=("cyst", "tumour", "stone"))
    data = datasets.from_arrays((x_train, y_train), (x_val, y_val), (x_test, y_test), task="segmentation")

Then `datasets.check(data)`, and the methods and notebooks take it like any other. Patients are not known to a
`tf.data.Dataset`: that no patient is in two of them is up to you.
"""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import json
import logging
import os
import platform
import re
import shutil
import uuid
import weakref
from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from . import cache as array_cache
from .arrays import DiskArray
from .base import BINARY, EXCLUSIVE, MULTI_LABEL, SEGMENTATION, TASKS, Card, Data, Split

__all__ = ["are_class_numbers", "from_arrays", "from_tf_data", "pieces"]

logger = logging.getLogger(__name__)

PIECE_BYTES = 2**22
MOST_CLASSES = 10_000
SPLITS = ("train", "val", "test")
ROUNDING = 1e-5  # of float images: that much outside 0..1 is cut off


def from_tf_data(
    train: Any,
    val: Any,
    test: Any,
    *,
    task: str,
    classes: tuple[str, ...] | None = None,
    name: str = "my_data",
    key: str | None = None,
    cache: str | os.PathLike | None = None,
    in_memory: bool | None = None,
) -> Data:
    """A `Data` of any three `tf.data.Dataset`s, each read once, through the array cache: they may exceed memory.

    Args:
        train, val, test: datasets of (image, target), batched or not. Image: `(H, W)` or `(H, W, C)` with 1 or 3
            channels, uint8 (0..255) or float (0..1), all of one shape; an element of rank 3 is a batch of grey
            images unless its last axis is of 1 or 3. Target: "multi-label" `(L,)` of 0 and 1; "binary" 0 or 1;
            "multi-class" and "ordinal" a class number, or one-hot `(L,)`; "segmentation" `(H, W)` or `(H, W, R)` of
            0 and 1, and then a third member may be rater_valid `(R,)` bool, which of these masks exist. Neither
            shuffled nor repeated: `Data` does that.
        task: one of `base.TASKS`.
        classes: names of the labels or classes, or of the foreground. Default: their numbers.
        name: of the dataset: letters, digits, - and _.
        key: a cache of this name and key is kept and used again, also by another process, without reading an element
            of datasets of the same `element_spec`: give another key when they change. Default: what is left on disk
            is removed once no `Data`, split or array holds it, at the latest when the process ends (TensorFlow holds
            until then the arrays of which `batches` made a stream).
        cache: folder of the array cache, see `load`.
        in_memory: as in `load`.

    Returns:
        `Data`.

    Raises:
        ValueError: an argument, an element or a value that is not as above; an empty or an infinite dataset.
        OSError: the cache's folder cannot be written to, or the disk is full.
    """
    from . import MEMORY_BYTES  # the package imports this module

    sources = dict(zip(SPLITS, (train, val, test), strict=True))
    _check_arguments(task, classes, name)
    if key is not None and (not isinstance(key, str) or not key):
        raise ValueError(f"Expected key, a text that is not empty, or None. Received: key={key!r}")
    for part, source in sources.items():
        if not hasattr(source, "as_numpy_iterator"):
            raise ValueError(
                f"Expected a tf.data.Dataset for {part}. Received: {type(source).__name__}.\nArrays go to from_arrays."
            )
        if int(source.cardinality()) == -1:
            raise ValueError(
                f"Expected a dataset with an end for {part}. Received: an infinite one.\nLeave out repeat()."
            )
    temporary = None
    if key is None:
        temporary = _TemporaryFolder(array_cache.cache_folder(cache))
        cache = temporary.path
    kept = False
    try:
        arrays = {part: _through_cache(source, task, part, name, key, cache) for part, source in sources.items()}
        if temporary is not None:
            arrays = {
                part: {what: _TemporaryArray(rows, temporary) for what, rows in found.items()}
                for part, found in arrays.items()
            }
        data = _data(arrays, task, classes, name, "tf.data.Dataset")
        splits = (data.train, data.val, data.test)
        kept = not (in_memory or (in_memory is None and sum(split.nbytes for split in splits) <= MEMORY_BYTES))
        return data if kept else Data(data.card, *(split.in_memory() for split in splits))
    finally:
        if temporary is not None and not kept:
            temporary.remove()


def from_arrays(
    train: tuple,
    val: tuple,
    test: tuple,
    *,
    task: str,
    classes: tuple[str, ...] | None = None,
    name: str = "my_data",
    patients: tuple[ArrayLike, ArrayLike, ArrayLike] | None = None,
) -> Data:
    """A `Data` of numpy arrays in memory.

    Args:
        train, val, test: (images, targets), or with masks (images, targets, rater_valid): arrays whose rows are as
            the elements of `from_tf_data`; images `(N, H, W)` or `(N, H, W, C)`.
        task, classes, name: as for `from_tf_data`.
        patients: three arrays, the patient of each image of train, val and test: refused where one is in two splits.

    Returns:
        `Data`.

    Raises:
        ValueError: as `from_tf_data`.
    """
    _check_arguments(task, classes, name)
    arrays = {}
    for part, source in zip(SPLITS, (train, val, test), strict=True):
        found = list(_cleaned(source, task, part))
        if not found:
            raise _empty(part)
        arrays[part] = {key: np.concatenate([piece[key] for piece in found]) for key in found[0]}
    if patients is not None and len(patients) != 3:
        raise ValueError(f"Expected patients of train, val and test. Received: {len(patients)} arrays")
    return _data(arrays, task, classes, name, "numpy arrays", patients)


def _check_arguments(task, classes, name):
    from . import names

    if task not in TASKS:
        raise ValueError(f"Expected task one of {TASKS}. Received: task={task!r}")
    if not isinstance(name, str) or not re.fullmatch(r"[A-Za-z0-9_-]+", name) or name in names():
        raise ValueError(
            f"Expected a name of letters, digits, - and _ that no dataset has. Received: name={name!r}.\n"
            "Runs are kept under it."
        )
    if isinstance(classes, str) or (classes is not None and len(set(classes)) != len(classes)):
        raise ValueError(f"Expected classes, names that differ. Received: classes={classes!r}")


def _through_cache(source, task, part, name, key, cache):
    """The arrays of a split, from the cache. Their shapes are those of the first piece, or of the cache of a key."""

    def opened():
        stream = _cleaned(source, task, part)
        first = next(stream, None)
        if first is None:
            raise _empty(part)
        return {what: (rows.shape[1:], rows.dtype.name) for what, rows in first.items()}, [[first], stream]

    origin, arrays, stream = {"key": key, "split": part, "task": task}, None, None
    if key is not None:
        origin["elements"] = str(source.element_spec)
        arrays = _kept_layout(f"{name}-{part}", origin, cache)
    if arrays is None:
        arrays, stream = opened()  # one pass: a generator may give its elements once

    def produce(start):
        found, elements = (arrays, stream) if stream is not None else opened()  # a damaged cache is made anew
        if found != arrays:
            raise ValueError(
                f"Expected rows of one shape under one key in {part}: {arrays}. Received: {found}.\n"
                "Give another key: the dataset has changed."
            )
        waiting, count = [], 0  # elements may be single: some are written at a time
        for piece in itertools.chain(*elements):
            skipped = min(start, len(piece["images"]))
            start -= skipped
            waiting.append({what: rows[skipped:] for what, rows in piece.items()})
            count += waiting[-1]["images"].nbytes
            if count >= PIECE_BYTES:
                yield _joined(waiting)
                waiting, count = [], 0
        if waiting:
            yield _joined(waiting)

    return array_cache.cached(f"{name}-{part}", origin, arrays, produce, cache=cache)


def _kept_layout(name, origin, cache):
    """Shapes and dtypes of the rows of the finished cache of this origin; None where there is not just one."""
    found = []
    with contextlib.suppress(OSError):
        for path in array_cache.cache_folder(cache).glob(f"{name}-*/manifest.json"):
            with contextlib.suppress(OSError, ValueError, TypeError, KeyError):
                if json.loads(path.read_text("utf-8"))["source"] == origin:
                    names = {re.sub("_(crc32|sums)$", "", file.stem) for file in path.parent.glob("*.npy")}
                    rows = {what: DiskArray(path.with_name(f"{what}.npy")) for what in names}  # fails where one lacks
                    found.append({what: (array.shape[1:], array.dtype.name) for what, array in rows.items()})
    return found[0] if len(found) == 1 else None


def _joined(found):
    return {what: np.concatenate([piece[what] for piece in found]) for what in found[0]}


def _data(arrays, task, classes, name, source, patients=None):
    """A `Data` of each split's arrays: images, targets and rater_valid, or class numbers."""
    if task in EXCLUSIVE:
        numbers = {part: np.asarray(found["numbers"]) for part, found in arrays.items()}
        columns = np.unique(np.concatenate([np.asarray(found["columns"]) for found in arrays.values()])).tolist()
        count = _count_classes(numbers, classes, name, columns)
        targets = {part: np.eye(count, dtype="uint8")[found] for part, found in numbers.items()}
    else:
        targets = {part: found["targets"] for part, found in arrays.items()}
    splits = []
    for k, part in enumerate(SPLITS):
        found = arrays[part]
        valid = found.get("rater_valid")
        split = Split(
            name=part,
            task=task,
            images=found["images"],
            targets=targets[part] if task == SEGMENTATION else np.asarray(targets[part]),
            groups=None if patients is None else np.asarray(patients[k]),
            rater_valid=None if valid is None else np.asarray(valid),
        )
        splits.append(split)
    height, width, channels = splits[0].images.shape[1:]
    outputs = splits[0].targets.shape[-1]
    card = Card(
        name=name,
        title=f"{name}, {height} x {width} pixels, from {source}",
        task=task,
        classes=_class_names(task, classes, outputs),
        channels=channels,
        num_raters=outputs if task == SEGMENTATION else 1,
        licence="yours",
        citation="none",
        source=source,
        files=(),
        default_size=height,
        network="unet" if task == SEGMENTATION else "resnet18",
        counts=tuple(split.num_examples for split in splits),
        splits="as given",
    )
    return Data(card, *splits)


def _count_classes(numbers, classes, name, columns):
    if len(columns) > 1 or (classes is not None and columns != [0] and columns != [len(classes)]):
        expected = "one-hot targets of one width" + ("" if classes is None else f", {len(classes)} for the classes")
        raise ValueError(
            f"Expected {expected}, or class numbers throughout. Received: {' and '.join(map(str, columns))} columns "
            "(0: numbers).\nGive all splits the same form."
        )
    count = columns[0] or max(2, 1 + max(int(found.max()) for found in numbers.values()))
    count = count if classes is None else len(classes)
    for part, found in numbers.items():
        if found.max() >= count:
            bad = int(np.argmax(found))
            raise ValueError(
                f"Expected class numbers 0 to {count - 1} for {count} classes. "
                f"Received: {found[bad]} for image {bad} of {part}.\nCount classes from 0, and name all of them."
            )
    if classes is None and min(int(found.min()) for found in numbers.values()) > 0:
        logger.warning(
            "%s: no image is of class 0, which is made a class all the same. Are they counted from 1? Then subtract 1; "
            "if not, name all classes by classes=.",
            name,
        )
    return count


def _class_names(task, classes, outputs):
    if task == SEGMENTATION:
        expected, outputs = "one name, of the foreground", 1
        classes = ("foreground",) if classes is None else classes
    elif task == BINARY:
        expected = "one name, of 1, or two, of 0 and of 1"
        classes = ("1",) if classes is None else classes[-1:] if len(classes) == 2 else classes
    else:
        expected = f"{outputs} names"
        classes = range(outputs) if classes is None else classes
    if len(classes) != outputs:
        raise ValueError(f"Expected classes, {expected}. Received: classes={tuple(classes)}")
    return tuple(map(str, classes))


def _empty(part):
    return ValueError(f"Expected at least one image in {part}. Received: none. Check filter() and take().")


# ---- values


def _cleaned(source, task, part):
    """Pieces of a source, name -> rows, in the types of a `Split`; each value is checked."""
    start = 0
    for images, targets, valid in pieces(source, task, part):
        where = f"image {{}} of {part}"
        found = {"images": _clean_images(images, where, start)}
        if task in EXCLUSIVE:
            found["numbers"] = _class_numbers(targets, where, start)
            width = targets.shape[1] if targets.ndim == 2 and targets.shape[1] > 1 else 0
            found["columns"] = np.full(len(targets), width, "int32")  # of one-hot targets
        elif task == MULTI_LABEL and targets.ndim == 1:
            raise ValueError(f"Expected labels (L,) for each image of {part}. Received: one number for each")
        elif task == BINARY and targets.ndim == 2 and targets.shape[1] != 1:
            raise ValueError(f"Expected 0 or 1 for each image of {part}. Received: targets {targets.shape[1:]}")
        else:
            targets = targets[:, None] if targets.ndim == 1 else targets
            found["targets"] = _zeros_and_ones(targets, where, start)
        if valid is not None:
            found["rater_valid"] = valid
        yield found
        start += len(images)


def _first(bad, start):
    """Row and place of the first True of `(B, ...)`."""
    place = tuple(int(k) for k in np.argwhere(bad)[0])
    return place[0] + start, place


def _clean_images(images, where, start):
    if images.dtype == np.uint8:
        return images
    if images.dtype.kind != "f":
        raise ValueError(
            f"Expected images of uint8 (0..255) or float (0..1). Received: {images.dtype} for {where.format(start)}.\n"
            "Cast numbers of 0..255 to uint8."
        )
    images = images.astype("float32")
    bad = ~((images >= -ROUNDING) & (images <= 1 + ROUNDING))  # NaN too
    if bad.any():
        row, place = _first(bad, start)
        raise ValueError(
            f"Expected float images in 0..1. Received: {images[place]:.6g} for {where.format(row)}.\n"
            "Divide numbers of 0..255 by 255; normalisation is done later, with the training split's mean and sd."
        )
    return np.clip(images, 0, 1)


def _zeros_and_ones(targets, where, start):
    bad = ~((targets == 0) | (targets == 1)) if targets.dtype.kind in "biuf" else np.ones(targets.shape, bool)
    if bad.any():
        row, place = _first(bad, start)
        raise ValueError(
            f"Expected targets of 0 and 1. Received: {targets[place]!s} for {where.format(row)}.\n"
            "Masks of 0 and 255: map them to mask > 0."
        )
    return targets.astype("uint8")


def _class_numbers(targets, where, start):
    if targets.ndim == 2 and targets.shape[1] > 1:
        one_hot = _zeros_and_ones(targets, where, start)
        bad = one_hot.sum(1) != 1
        if bad.any():
            row, place = _first(bad, start)
            raise ValueError(
                f"Expected one class for each image. Received: {one_hot[place].sum()} for {where.format(row)}"
            )
        return one_hot.argmax(1).astype("int32")
    targets = targets.reshape(len(targets))
    bad = ~are_class_numbers(targets)
    if bad.any():
        row, place = _first(bad, start)
        raise ValueError(f"Expected class numbers 0, 1, 2, ... Received: {targets[place]!s} for {where.format(row)}")
    return targets.astype("int32")


def are_class_numbers(targets: np.ndarray) -> np.ndarray:
    """Which values are whole numbers of 0 to 9,999, bool; text is none."""
    if targets.dtype.kind not in "biuf":
        return np.zeros(targets.shape, bool)
    return (targets >= 0) & (targets < MOST_CLASSES) & (np.floor(targets) == targets)


# ---- shapes


def pieces(
    source: Any, task: str, where: str = "the dataset"
) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray | None]]:
    """Images, targets and rater_valid (or None) of a source, some at a time; shapes are checked, values are not.

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

    An image of rank 4 is a batch, one of rank 2 a single grey one. Of rank 3 it is single where its last axis is of 1
    or 3 channels, else a batch of grey ones.
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


# ---- temporary folders


class _TemporaryFolder:
    """A folder that is removed when nothing holds this, at the latest when the process that made it ends.

    A fork removes nothing. What a killed process left is removed when the next one is made beside it.
    """

    def __init__(self, parent):
        owner = f"{os.getpid()}-{_machine()}"
        _sweep(parent)
        self.path = parent / f"temporary-{owner}-{uuid.uuid4().hex[:12]}"
        self.remove = weakref.finalize(self, _remove, self.path, os.getpid())


class _TemporaryArray(DiskArray):
    """Rows in a temporary folder, which stays as long as they, or rows selected from them, are held."""

    def __init__(self, array, folder):
        super().__init__(*array.__reduce__()[1])
        self._folder = folder

    def select(self, index):
        return _TemporaryArray(super().select(index), self._folder)

    def __copy__(self):
        return self  # rows never change

    def __deepcopy__(self, memo):
        return self

    def __reduce__(self):  # a pickle names the file; it does not hold it
        return DiskArray, super().__reduce__()[1]


def _remove(folder, process):
    if os.getpid() == process:
        shutil.rmtree(folder, ignore_errors=True)


def _sweep(parent):
    """Remove the temporary folders of processes of this machine that have ended."""
    if os.name != "posix":  # elsewhere os.kill(process, 0) is not a question
        return
    with contextlib.suppress(OSError):
        for folder in parent.glob(f"temporary-*-{_machine()}-*"):
            process = re.fullmatch(r"temporary-([1-9]\d{0,8})-\w+-\w+", folder.name)
            if process and _has_ended(int(process[1])):
                shutil.rmtree(folder, ignore_errors=True)


def _has_ended(process):
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return True
    except OSError:  # another user's
        return False
    return False


def _machine():
    """Eight digits for where process ids are told apart: this machine, and in it this container; they share caches."""
    try:
        container = os.stat("/proc/self/ns/pid").st_ino
    except OSError:
        container = 0
    return hashlib.sha256(f"{platform.node()} {container}".encode()).hexdigest()[:8]
