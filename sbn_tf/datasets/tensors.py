"""Any three `tf.data.Dataset`s, or numpy arrays, of images and targets as a `Data`, under the contract of all others.

    data = datasets.from_tf_data(train, val, test, task="multi-class", classes=("cyst", "tumour", "stone"))
    data = datasets.from_arrays((x_train, y_train), (x_val, y_val), (x_test, y_test), task="segmentation")

Then `datasets.check(data)`, and the methods and notebooks take it like any other. Patients are not known to a
`tf.data.Dataset`: that no patient is in two of them is up to you.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import logging
import os
import re
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from . import cache as array_cache
from .arrays import DiskArray
from .base import BINARY, EXCLUSIVE, MULTI_LABEL, SEGMENTATION, SPLITS, TASKS, Card, Data, Split, read_if_small
from .files import check_option
from .pieces import PIECE_BYTES, are_class_numbers, check_ends, pieces
from .registry import names
from .temporary import TemporaryFolder

logger = logging.getLogger(__name__)

ROUNDING = 1e-5  # float images may be that much outside 0..1; the excess is cut off


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
            of datasets of the same `element_spec`: give another key when they change. Default: the cache is removed
            once no `Data`, split or array refers to it, at the latest when the process ends (until then TensorFlow
            keeps the arrays of which `batches` made a stream).
        cache: folder of the array cache, see `load`.
        in_memory: as in `load`.

    Raises:
        ValueError: an argument, an element or a value that is not as above; an empty or an infinite dataset.
        OSError: the cache's folder cannot be written to, or the disk is full.
    """
    sources = dict(zip(SPLITS, (train, val, test), strict=True))
    _check_arguments(task, classes, name)
    if key is not None and (not isinstance(key, str) or not key):
        raise ValueError(f"Expected key, a text that is not empty, or None. Received: key={key!r}")
    for part, source in sources.items():
        if not hasattr(source, "as_numpy_iterator"):
            raise ValueError(
                f"Expected a tf.data.Dataset for {part}. Received: {type(source).__name__}.\nArrays go to from_arrays."
            )
        check_ends(source, part, "Leave out repeat().")
    if key is not None:
        arrays = {part: _through_cache(source, task, part, name, key, cache) for part, source in sources.items()}
        return _data(arrays, task, classes, name, "tf.data.Dataset", in_memory=in_memory)
    temporary, kept = TemporaryFolder(array_cache.cache_folder(cache)), False
    try:
        arrays = {
            part: _through_cache(source, task, part, name, key, temporary.path, temporary)
            for part, source in sources.items()
        }
        data = _data(arrays, task, classes, name, "tf.data.Dataset", in_memory=in_memory)
        kept = any(isinstance(rows, DiskArray) for rows in (data.train.images, data.train.targets))
        return data
    finally:
        if not kept:
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
    check_option("task", task, TASKS)
    if not isinstance(name, str) or not re.fullmatch(r"[A-Za-z0-9_-]+", name) or name in names():
        raise ValueError(
            f"Expected a name of letters, digits, - and _ that no dataset has. Received: name={name!r}.\n"
            "Runs are kept under it."
        )
    if isinstance(classes, str) or (classes is not None and len(set(classes)) != len(classes)):
        raise ValueError(f"Expected classes, names that differ. Received: classes={classes!r}")


def _through_cache(source, task, part, name, key, cache, keeps=None):
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
        found, elements = (arrays, stream) if stream is not None else opened()  # a damaged cache is made again
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

    found = array_cache.cached(f"{name}-{part}", origin, arrays, produce, cache=cache)
    for rows in found.values():
        rows.keeps = keeps
    return found


def _kept_layout(name, origin, cache):
    """Shapes and dtypes of the rows of the finished cache of this origin; None unless there is exactly one."""
    found = []
    with contextlib.suppress(OSError):
        for path in array_cache.cache_folder(cache).glob(f"{name}-*/manifest.json"):
            with contextlib.suppress(OSError, ValueError, TypeError, KeyError):
                if json.loads(path.read_text("utf-8"))["source"] == origin:
                    stems = {re.sub("_(crc32|sums)$", "", file.stem) for file in path.parent.glob("*.npy")}
                    rows = {what: DiskArray(path.with_name(f"{what}.npy")) for what in stems}  # fails if one is missing
                    found.append({what: (array.shape[1:], array.dtype.name) for what, array in rows.items()})
    return found[0] if len(found) == 1 else None


def _joined(found):
    return {what: np.concatenate([piece[what] for piece in found]) for what in found[0]}


def _data(arrays, task, classes, name, source, patients=None, in_memory=False):
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
        valid = arrays[part].get("rater_valid")
        split = Split(
            name=part,
            task=task,
            images=arrays[part]["images"],
            targets=targets[part] if task == SEGMENTATION else np.asarray(targets[part]),
            groups=None if patients is None else np.asarray(patients[k]),
            rater_valid=None if valid is None else np.asarray(valid),
        )
        splits.append(split)
    splits = read_if_small(splits, in_memory)
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
            "%s: no image is of class 0, which becomes a class all the same. If they are counted from 1, subtract 1; "
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


def _refuse(bad, values, where, start, expected, advice=""):
    """Raises a ValueError about the first value that is bad, if there is one."""
    if bad.any():
        place = tuple(int(k) for k in np.argwhere(bad)[0])
        value = f"{values[place]:.6g}" if values.dtype.kind == "f" else str(values[place])
        received = f"{value} for {where.format(place[0] + start)}"
        raise ValueError(f"Expected {expected}. Received: {received}" + (f".\n{advice}" if advice else ""))


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
    advice = "Divide numbers of 0..255 by 255; normalisation is done later, with the training split's mean and sd."
    _refuse(bad, images, where, start, "float images in 0..1", advice)
    return np.clip(images, 0, 1)


def _zeros_and_ones(targets, where, start):
    bad = ~((targets == 0) | (targets == 1)) if targets.dtype.kind in "biuf" else np.ones(targets.shape, bool)
    _refuse(bad, targets, where, start, "targets of 0 and 1", "Masks of 0 and 255: map them to mask > 0.")
    return targets.astype("uint8")


def _class_numbers(targets, where, start):
    if targets.ndim == 2 and targets.shape[1] > 1:
        one_hot = _zeros_and_ones(targets, where, start)
        found = one_hot.sum(1)
        _refuse(found != 1, found, where, start, "one class for each image")
        return one_hot.argmax(1).astype("int32")
    targets = targets.reshape(len(targets))
    _refuse(~are_class_numbers(targets), targets, where, start, "class numbers 0, 1, 2, ..")
    return targets.astype("int32")
