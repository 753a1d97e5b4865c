"""The twelve 2-D sets of MedMNIST in their official npz files, converted to the array cache piece by piece.

Their labels, counts, md5 and addresses are in `medmnist.json`; if the package medmnist is installed, its own table
comes first, read without importing it.
"""

import ast
import collections
import functools
import importlib.util
import json
import logging
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np

from . import cache as array_cache
from . import files, npz
from .base import BINARY, MULTI_CLASS, MULTI_LABEL, ORDINAL, SPLITS, Card, Parts, Split
from .download import check_official, fetch

logger = logging.getLogger(__name__)

_KINDS = ("path", "chest", "derma", "oct", "pneumonia", "retina", "breast", "blood", "tissue")
NAMES = tuple(f"{kind}mnist" for kind in (*_KINDS, "organa", "organc", "organs"))
SIZES = (28, 64, 128, 224)
_EXTRAS = ("patients", "names")
_SOURCE = "https://zenodo.org/records/10519652"
_MEDMNIST_V2 = "Yang, J., et al. (2023). MedMNIST v2. Scientific Data 10:41"
CHEST_NORMALISATION = (0.498, 0.247)  # the paper's
_TASK_OF = {
    "multi-class": MULTI_CLASS,
    "binary-class": BINARY,
    "multi-label, binary-class": MULTI_LABEL,
    "ordinal-regression": ORDINAL,
}
PIECE_BYTES = 2**22  # of decompressed images in memory at a time

# ---- cards


def registered(name: str) -> tuple[Card, Callable[..., Parts]]:
    """(card, reader) of one of `NAMES`; the reader takes `(root, size, seed, cache=None, *, verify, download)`."""
    card = _cards()[name]
    return card, functools.partial(_load, card)


def official_file(name: str, size: int) -> tuple[str, str, str]:
    """File name, address and md5 of the smallest official file of at least `size` pixels."""
    side = _sides(_cards()[name], size)[0]
    entry = _table()[name]
    return _file_name(name, side), entry[f"url{_suffix(side)}"], entry[f"MD5{_suffix(side)}"]


@functools.cache
def _cards():
    return {name: _card(name, entry) for name, entry in _table().items()}


@functools.cache
def _table():
    """{name: entry}: our own words, with the facts of an installed medmnist or of the built-in table."""
    built_in = _built_in_table()
    try:
        installed = _installed_info()
        if installed is None:
            return built_in
        table = {name: built_in[name] | installed[name] for name in NAMES}
        for name, entry in table.items():
            _card(name, entry)
    except Exception as error:  # whatever another version of that file contains
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        logger.warning("medmnist: the table of the installed package cannot be read (%s); using our own", reason)
        return built_in
    return table


def _built_in_table():
    return json.loads(Path(__file__).with_name("medmnist.json").read_text("utf-8"))


def _installed_info():
    """INFO of an installed medmnist, or None; read as text, since its import imports torch and makes a folder."""
    found = importlib.util.find_spec("medmnist")
    if found is None:
        return None
    tree = ast.parse(Path(found.origin).with_name("info.py").read_text("utf-8"))
    for node in tree.body:
        if isinstance(node, ast.Assign) and [getattr(t, "id", None) for t in node.targets] == ["INFO"]:
            return ast.literal_eval(node.value)
    raise KeyError("INFO")


def _card(name, entry):
    task = _TASK_OF[entry["task"]]
    classes = tuple(entry["label"][str(k)] for k in range(len(entry["label"])))
    notes = entry["notes"]
    if task == BINARY:  # one output, the probability of 1
        notes = f"1 is {classes[1]!r}, 0 is {classes[0]!r}. {notes}".strip()
        classes = classes[1:]
    sides = [side for side in SIZES if f"MD5{_suffix(side)}" in entry and entry[f"url{_suffix(side)}"]]
    return Card(
        name=name,
        title=entry["title"],
        task=task,
        classes=classes,
        channels=entry["n_channels"],
        num_raters=1,
        licence=f"{entry['license']} (MedMNIST v2)",
        citation=f"{_MEDMNIST_V2}; {entry['citation']}",
        source=f"{_SOURCE} (MedMNIST)",
        files=tuple(_file_name(name, side) for side in sides),
        default_size=64 if 64 in sides else sides[0],
        network="resnet18",
        counts=tuple(entry["n_samples"][part] for part in SPLITS),
        splits="official",
        notes=notes,
        paper_normalisation=CHEST_NORMALISATION if name == "chestmnist" else None,
        checksums=tuple((_file_name(name, side), entry[f"MD5{_suffix(side)}"]) for side in sides),
    )


def _suffix(side):
    return "" if side == 28 else f"_{side}"


def _file_name(name, side):
    return f"{name}{_suffix(side)}.npz"


def _sides(card, size):
    """Sides of the official files of at least `size` pixels, smallest first."""
    sides = [side for side in SIZES if _file_name(card.name, side) in card.files]
    if size > sides[-1]:
        raise ValueError(f"Expected size <= {sides[-1]}, the largest official file. Received: size={size}")
    return [side for side in sides if side >= size]


# ---- readers


def download(name: str, size: int | None = None, root: str | os.PathLike | None = None) -> Path:
    """Download the official file of a set of MedMNIST, unless it is there.

    Args:
        name: "chestmnist" or another set of MedMNIST. Other data have terms that their source shows first.
        size: side of the images in pixels; the smallest official file of at least that side is taken. Default:
            the card's.
        root: folder to put it in. Default: SBN_TF_DATA, else `data/` of the working directory.

    Returns:
        The file.

    Raises:
        ValueError: another name; or a file, there or downloaded, whose md5 is not the official one.
        ConnectionError: no connection, or one that breaks off again and again. What came is kept as `.part`.
        OSError: the folder cannot be written to, or the disk is full. What came is kept.
    """
    if name not in NAMES:
        raise ValueError(
            f"Expected a dataset that can be downloaded, among {', '.join(NAMES)}. Received: name={name!r}\n"
            "Get others from their source, which print(datasets.card(name)) names."
        )
    if size is not None and not files.is_integer(size, 1):
        raise ValueError(f"Expected an integer size of 1 to {max(SIZES)}. Received: size={size!r}")
    card = _cards()[name]
    side = _sides(card, card.default_size if size is None else size)[0]
    try:
        path = files.find(card, root, _places(card, [side]))
    except FileNotFoundError:
        return _fetch(card, side, root)
    check_official(path, official_file(name, side)[2])
    return path


def _places(card, sides):
    names = [_file_name(card.name, side) for side in sides]
    return [place for name in names for place in (Path(name), Path(card.name) / name)]


def _fetch(card, side, root):
    name, url, md5 = official_file(card.name, side)
    return fetch(url, files.roots(root)[0] / name, md5, card.source)


def _load(card, root, size, seed, cache=None, *, verify=False, download=False):
    """A set of MedMNIST: the smallest official file of at least `size` pixels, resized down if it is larger.

    Args:
        card: of the set.
        root, size, cache: see `load`.
        seed: not used, the split is official.
        verify: compare the file's md5 with the official one first (seconds).
        download: get the smallest official file of at least `size` pixels if it is missing.
    """
    sides = _sides(card, size)[: 1 if download else None]
    try:
        path = files.find(replace(card, source=f"{card.source} or by download=True"), root, _places(card, sides))
    except FileNotFoundError:
        if not download:
            raise
        path = _fetch(card, sides[0], root)
    side = next(s for s in sides if _file_name(card.name, s) == path.name)
    if side != size:
        logger.warning("%s: %s is resized from %d to %d pixels", card.name, path.name, side, size)
    if verify:
        check_official(path, dict(card.checksums)[path.name])
    parts = load_npz(card, path, size, side, cache)
    counts = tuple(part.num_examples for part in parts[:3])
    if card.counts is not None and counts != card.counts:
        found, official = (" / ".join(f"{n:,}" for n in numbers) for numbers in (counts, card.counts))
        message = "%s: %s has %s images, the official file %s: it is another"
        logger.warning(message, card.name, path.name, found, official)
    return parts


def load_npz(
    card: Card, path: str | os.PathLike, size: int, side: int | None = None, cache: str | os.PathLike | None = None
) -> Parts:
    """Three splits from an npz with MedMNIST's keys; images go through the array cache, some at a time.

    Args:
        card: its task, classes and channels are what the file must have; its name names the cache.
        path: npz, compressed or not. For train, val and test: `*_images` `(N, S, S)`, or `(N, S, S, 3)` in colour,
            uint8 in C order; `*_labels` integers, `(N, L)` of 0 and 1 for "multi-label", else `(N, 1)`, a class;
            `*_patients` and `*_names` `(N,)` become groups and ids if they are there.
        size: side in pixels that images are resized to (bilinear, antialiased).
        side: S, where the file's name says it; None: whatever it is.
        cache: see `load`.

    Raises:
        ValueError: a file that is truncated, corrupt or not as described; nothing of it is written to the cache.
    """
    path = Path(path).resolve()  # one cache, however the path was written
    counts, arrays = _inspect(card, side, path)
    targets = {part: _targets(arrays[f"{part}_labels"], f"{part}_labels", card, path) for part in SPLITS}
    total = sum(counts)

    def produce(start):
        if start == 0:  # read it all first: rows of an array that turns out corrupt at its end are not to be kept
            collections.deque(_pieces(path, total), maxlen=0)
        for images in _pieces(path, start):
            yield {"images": files.resize_images(images.reshape(*images.shape[:3], card.channels), size)}

    source = {"files": array_cache.fingerprint([path]), "size": size}
    layout = {"images": ((size, size, card.channels), "uint8")}
    images = array_cache.cached(f"{card.name}-{size}px", source, layout, produce, total=total, cache=cache)["images"]
    splits, first = [], 0
    for part, n in zip(SPLITS, counts, strict=True):
        rows = images.select(slice(first, first + n))
        groups, ids = (arrays.get(f"{part}_{key}") for key in _EXTRAS)
        splits.append(Split(part, card.task, rows, targets[part], groups=groups, ids=ids))
        first += n
    train, val, test = splits
    return Parts(train, val, test)


def _inspect(card, side, path):
    """Number of images of each part, and {key: array} of the small arrays, read once all headers fit together."""
    columns = len(card.classes) if card.task == MULTI_LABEL else 1
    colours = () if card.channels == 1 else (card.channels,)
    counts, small = [], []
    with npz.whole(path) as archive:
        found = npz.check_keys(archive, [f"{part}_{key}" for part in SPLITS for key in ("images", "labels")], path)
        for part in SPLITS:
            form = ("N", side or "S", side or "S", *colours), "uint8 in C order"
            count, side, *_ = npz.check_forms(archive, {f"{part}_images": form}, path)[f"{part}_images"]
            counts.append(count)
        for part, count in zip(SPLITS, counts, strict=True):
            forms = {f"{part}_labels": ((count, columns), "integers")}
            forms |= {f"{part}_{key}": ((count,), "integers or text") for key in _EXTRAS if f"{part}_{key}" in found}
            small += npz.check_forms(archive, forms, path)
        return counts, npz.read_arrays(archive, small)


def _pieces(path, start):
    """Images of train, then val, then test, from row `start` on, some MB at a time.

    The rows before are decompressed too: an array's CRC-32, which zipfile checks at its end, is that of all its bytes.
    """
    with npz.whole(path) as archive:
        for part in SPLITS:
            for rows in npz.read_rows(archive, f"{part}_images", PIECE_BYTES):
                skip = min(start, len(rows))
                start -= skip
                if skip < len(rows):
                    yield rows[skip:]


def _targets(labels, key, card, path):
    """Labels of the file as `(N, L)` uint8 targets of 0 and 1: one-hot where one class excludes the others."""
    top = 1 if card.task in (MULTI_LABEL, BINARY) else len(card.classes) - 1
    wrong = np.argwhere((labels < 0) | (labels > top))
    if len(wrong):
        image, column = wrong[0]
        raise ValueError(
            f"Expected 0 to {top} in {key} of {path}. Received: {labels[image, column]} for image {image}, "
            f"column {column}; {len(wrong)} such value(s).\nMend the labels, or get the file again."
        )
    if card.task in (MULTI_LABEL, BINARY):
        return labels.astype("uint8")
    return np.eye(len(card.classes), dtype="uint8")[labels[:, 0].astype("int64")]
