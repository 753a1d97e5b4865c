"""LIDC-IDRI's customary 15,096 patches of 128 x 128 at 0.5 mm, each with the masks of four radiologists."""

import functools
import itertools
import math
from pathlib import Path

import numpy as np

from . import cache as array_cache
from . import files, npz
from .base import SEGMENTATION, Card, Parts
from .lidc import FOLDS, RATERS, centre, check_fold, split_by_group
from .safe_pickle import SafePickle
from .tables import read_table

NUM_RATERS = 4
SPLITS = ("patient", "paper")
WIDTHS = {"key": 128, "series_uid": 64, "patient_id": 64}  # letters
_FORMS: dict[str, npz.Form] = {
    "image": (("N", "H", "W"), "numbers in C order"),
    "masks": (("N", NUM_RATERS, "H", "W"), "numbers or booleans in C order"),
} | {name: (("N",), "text in C order") for name in WIDTHS}
CHUNK = 32  # patches at a time; an interruption costs no more than these
PICKLES, NPZ = (".pickle", ".pkl"), (".npz",)
ENTRIES = ("image", "masks", "series_uid")  # of a patch in a pickle
MAX_PIXELS = 2**24  # of a patch
_PATIENTS = "series_patients.csv"

LIDC_PATCHES = Card(
    name="lidc_patches",
    title="LIDC-IDRI: 15,096 patches, every slice of every nodule, masks of 4 radiologists",
    task=SEGMENTATION,
    classes=("nodule",),
    channels=1,
    num_raters=NUM_RATERS,
    licence="CC BY 3.0 (TCIA)",
    citation="Armato III, S. G., et al. (2015). Data From LIDC-IDRI. The Cancer Imaging Archive, "
    "doi:10.7937/K9/TCIA.2015.LO9QL9SX; Kohl, S., et al. (2018). arXiv:1806.05034 (the patches).",
    source="https://github.com/stefanknegt/Probabilistic-Unet-Pytorch (data_lidc.pickle), or make it from the DICOM "
    "images: help(datasets.lidc_dicom)",
    files=("lidc_patches/*.pickle", "lidc_idri/*.pickle", "data_lidc.pickle", "lidc_patches/*.npz"),
    default_size=128,
    network="unet",
    splits="4 folds by patient, or by series where the patient is not known; split='paper': by patch, as in the "
    "paper's code",
    notes="0.5 mm a pixel. The customary file has 15,096 patches and names no patients: a series counts as one. 8 of "
    "LIDC's 1,010 patients have two series: series_patients.csv (columns series_uid, patient_id) beside it names them. "
    "Mask slot k is not the same radiologist in two scans. An empty mask is a radiologist who outlined nothing; "
    "fewer than 4 masks: a missing rater. Numbers are not comparable with those on lidc.",
)


def load_lidc_patches(
    root: files.Folder,
    size: int,
    seed: int,
    cache: files.Folder = None,
    *,
    split: str = "patient",
    fold: int = 0,
    raters: str = "all",
) -> Parts:
    """Three splits: images `(N, size, size, 1)` float32 0..1, targets `(N, size, size, 4)` uint8, patients or series.

    The files are converted to the array cache once. Pickles are read as data (see `safe_pickle`): no code in them runs.

    Args:
        root, seed, cache: see `load`.
        size: side in pixels of 0.5 mm; patches of another size are cropped, or padded with air, about the centre.
        split: "patient": a quarter of the patients is tested, a tenth of the others validates. "paper": the file is
            cut in its order, a quarter of the patches is tested, the last tenth of the others validates; a patient is
            then in two splits, and test scores are too good.
        fold: 0 to 3: which quarter is tested.
        raters: "all": an empty mask says that a rater outlined nothing (customary with LIDC); "drew": only raters
            who marked a pixel of the patch count in `rater_valid`. A mask that is missing never counts.
    """
    files.check_option("split", split, SPLITS)
    files.check_option("raters", raters, RATERS)
    check_fold(fold)
    paths = _find(root)
    arrays = _converted(paths, size, cache)
    keys, series, patients, drew, valid = (
        np.asarray(arrays[name]) for name in ("key", "series_uid", "patient_id", "drew", "rater_valid")
    )
    groups = _groups(paths[0].parent, series, patients)
    if raters == "drew":
        valid = drew
        if not valid.any(axis=1).all():
            bad = int(np.flatnonzero(~valid.any(axis=1))[0])
            raise ValueError(
                f"Expected a mask that is not empty in every patch for raters='drew'. Received: none in patch "
                f"{str(keys[bad])!r}.\nUse raters='all'."
            )
    index = split_by_group(groups, fold, seed) if split == "patient" else _split_in_order(len(keys), fold)
    leak = ""
    if split == "paper":
        tested, known = np.unique(groups[index["test"]]), np.unique(groups[index["train"]])
        both = len(np.intersect1d(tested, known))
        leak = (
            f"split='paper' cuts the file by patch: {both} of the {len(tested)} patients or series of test are in "
            "train too, so test scores are too good"
        )
    columns = dict(images=arrays["images"], targets=arrays["masks"], groups=groups, ids=keys, rater_valid=valid)
    return Parts.of(SEGMENTATION, index, leak, **columns)


def _split_in_order(num_patches, fold):
    """The k-th quarter in the file's order is tested, the last tenth of the others validates."""
    quarters = np.array_split(np.arange(num_patches), FOLDS)
    rest = np.concatenate(quarters[:fold] + quarters[fold + 1 :])
    num_val = len(rest) // 10
    if not num_val or not len(quarters[fold]):
        raise ValueError(f"Expected 14 patches or more to be divided. Received: {num_patches}")
    return {"train": rest[:-num_val], "val": rest[-num_val:], "test": quarters[fold]}


def _groups(folder, series, patients):
    """The patient of each patch, the same for a whole series: from its patches, else from a csv, else the series.

    The csv must agree with what the patches say: one patient under two names would be in two splits.
    """
    series, patients = ([text.strip() for text in array.tolist()] for array in (series, patients))
    patient_of = {}
    for uid, patient in zip(series, patients, strict=True):
        if patient and patient_of.setdefault(uid, patient) != patient:
            raise ValueError(
                f"Expected one patient_id for each series_uid in the patches of {folder}. "
                f"Received: {patient_of[uid]!r} and {patient!r} for {uid!r}.\n"
                "Mend the patient_id of these patches, or make the file again."
            )
    missing, path = sorted(set(series) - set(patient_of)), folder / _PATIENTS
    if missing and path.exists():
        named = _patients_of_csv(path)
        other = [uid for uid in patient_of if named.get(uid, patient_of[uid]) != patient_of[uid]]
        if other:
            raise ValueError(
                f"Expected the patients of the patches in {path}. Received: {named[other[0]]!r} for {other[0]!r}, "
                f"which is {patient_of[other[0]]!r} in the patches.\nMend that row, or leave it out."
            )
        patient_of = named | patient_of
        missing = [uid for uid in missing if uid not in named]
        if missing:
            raise ValueError(
                f"Expected every series in {path}. Received: none for {len(missing)}, as {missing[0]}.\n"
                "Add them, or remove the file: each series then counts as a patient."
            )
    return np.array([patient_of.get(uid, uid) for uid in series])


def _patients_of_csv(path):
    header, rows = read_table(path, ("series_uid", "patient_id"))
    patient_of = {}
    for row in rows:
        uid, patient = (row[header.index(name)] for name in ("series_uid", "patient_id"))
        if not uid or not patient or patient_of.setdefault(uid, patient) != patient:
            raise ValueError(
                f"Expected one patient_id for each series_uid in {path}. Received: {uid!r}, {patient!r}.\n"
                "Mend that row, or remove it."
            )
    return patient_of


# ---- finding and converting


def _find(root):
    """The files of one place under a data root, of one kind, sorted by name."""
    places = [("lidc_patches", PICKLES + NPZ), ("lidc_idri", PICKLES)]
    for folder in files.roots(root):
        for name, suffixes in places:
            found = [p for p in files.listed(folder / name).values() if p.suffix in suffixes]
            kinds = sorted({p.suffix if p.suffix in NPZ else PICKLES[0] for p in found})
            if len(kinds) > 1:
                raise ValueError(
                    f"Expected pickles or npz files in {folder / name}. Received: both, as {found[0].name} and "
                    f"{found[-1].name}.\nLeave those to be read and move the others elsewhere."
                )
            if found:
                return [p.resolve() for p in found]
        if (folder / "data_lidc.pickle").is_file():
            return [(folder / "data_lidc.pickle").resolve()]
    return [files.find(LIDC_PATCHES, root, [Path(name) for name in LIDC_PATCHES.files])]  # raises


def _converted(paths, size, cache):
    """All patches in the array cache, in the order of the files."""
    layout = {
        "images": ((size, size, 1), "float32"),
        "masks": ((size, size, NUM_RATERS), "uint8"),
        "rater_valid": ((NUM_RATERS,), "bool"),
        "drew": ((NUM_RATERS,), "bool"),
    } | {name: ((), f"<U{width}") for name, width in WIDTHS.items()}

    # Read only if there is no cache yet.
    opened = functools.cache(lambda: (_open_npz if paths[0].suffix in NPZ else _open_pickles)(paths))

    def produce(start):
        piece = []
        for patch in opened()[1](start):
            piece.append(_row(*patch, size))
            if len(piece) == CHUNK:
                yield _stacked(piece, layout)
                piece = []
        if piece:
            yield _stacked(piece, layout)

    source = {"files": array_cache.fingerprint(paths), "size": size}
    options = {"total": lambda: opened()[0], "cache": cache, "unit": "patch"}
    return array_cache.cached(f"lidc_patches-{size}px", source, layout, produce, **options)


def _stacked(piece, layout):
    return {name: np.stack([row[name] for row in piece]).astype(layout[name][1]) for name in layout}


def _row(path, names, image, masks, size):
    """One row of the cache from a patch; checks the values, whose shapes were checked before."""
    if not np.isfinite(image).all() or image.min() < 0 or image.max() > 1:
        low, high = (float(f(image)) for f in (np.min, np.max))
        raise _wrong(path, names["key"], "an image of numbers in 0..1", f"{low:g} to {high:g}")
    stacked = np.zeros((*image.shape, NUM_RATERS), "uint8")
    for k, mask in enumerate(masks):
        strange = mask[(mask != 0) & (mask != 1)]
        if strange.size:
            raise _wrong(path, names["key"], "masks of 0 and 1", f"a value of {strange[0]:g} in mask {k}")
        stacked[..., k] = mask
    # Before the crop: a rater may have drawn only outside it.
    row = {"drew": stacked.any(axis=(0, 1)), "rater_valid": np.arange(NUM_RATERS) < len(masks)}
    row["images"] = centre(image.astype("float32")[None, ..., None], size)[0]
    row["masks"] = centre(stacked[None], size)[0]
    return row | names


def _wrong(path, key, expected, received):
    return ValueError(
        f"Expected {expected} in patch {key!r} of {path}. Received: {received}.\n"
        "Mend that patch, or get the file again."
    )


def _check_names(path, names, seen):
    """Refuses names that are not text or too long for the cache, and a key that occurs twice in all files."""
    key = names["key"]
    for name, value in names.items():
        least = 0 if name == "patient_id" else 1
        if not isinstance(value, str) or not least <= len(value) <= WIDTHS[name] or "\0" in value:
            shown = repr(value[:80]) if isinstance(value, str | bytes) else type(value).__name__
            raise _wrong(path, str(key)[:80], f"a {name} of {least} to {WIDTHS[name]} letters", shown)
    if key in seen:
        raise _wrong(path, key, "each key once in all files", f"it is in {seen[key]} too")
    seen[key] = path


# ---- pickles


def _open_pickles(paths):
    """How many patches there are, all of the right shape, and a function that yields (path, names, image, masks)."""
    pickles = [SafePickle(path) for path in paths]
    seen, shape = {}, None
    for pickle in pickles:
        if not len(pickle):
            raise ValueError(f"Expected a dict of patches in {pickle.path}. Received: an empty one.\nGet it again.")
        for key in pickle:
            shape = _check_patch(pickle.path, key, pickle.peek(key), shape, seen)

    def patches(start):
        places = ((one, key) for one in pickles for key in one)
        for one, key in itertools.islice(places, start, None):
            patch = one.read(key, ENTRIES)  # a patch may have others, of any size
            names = {"key": key, "series_uid": patch["series_uid"], "patient_id": ""}
            yield one.path, names, patch["image"], patch["masks"]

    return len(seen), patches


def _check_patch(path, key, patch, shape, seen):
    """The shape of this patch, which all others must have."""
    shown = str(key)[:80]  # of a number of 64 bits at most, see `safe_pickle`
    if not isinstance(patch, dict):
        raise _wrong(path, shown, "a dict of image, masks and series_uid", f"a {type(patch).__name__}")
    missing = [name for name in ENTRIES if name not in patch]
    if missing:
        raise _wrong(path, shown, "image, masks and series_uid", f"no {missing[0]}")
    _check_names(path, {"key": key, "series_uid": patch["series_uid"]}, seen)
    image, masks = patch["image"], patch["masks"]
    if len(getattr(image, "shape", ())) != 2 or image.dtype.kind not in "fiu" or 0 in image.shape:
        raise _wrong(path, key, "an image (H, W) of numbers", _form(image))
    if math.prod(image.shape) > MAX_PIXELS:
        raise _wrong(path, key, f"an image of at most {MAX_PIXELS:,} pixels", _form(image))
    if shape is not None and image.shape != shape:
        raise _wrong(path, key, f"an image {shape} like the others", _form(image))
    if not isinstance(masks, list | tuple) or not 1 <= len(masks) <= NUM_RATERS:
        received = f"{len(masks)} masks" if isinstance(masks, list | tuple) else f"a {type(masks).__name__}"
        raise _wrong(path, key, f"a list of 1 to {NUM_RATERS} masks", received)
    for k, mask in enumerate(masks):
        if getattr(mask, "shape", None) != image.shape or mask.dtype.kind not in "bfiu":
            raise _wrong(path, key, f"masks {image.shape} of 0 and 1", f"{_form(mask)} as mask {k}")
    return image.shape


def _form(value):
    return f"{value.shape} {value.dtype}" if hasattr(value, "shape") else f"a {type(value).__name__}"


# ---- npz files, as lidc_dicom writes them


def _open_npz(paths):
    """As `_open_pickles`; images and masks are read row by row, never a whole array of them."""
    lengths, seen, tables = {}, {}, []
    for path in paths:
        with npz.whole(path) as archive:
            npz.check_keys(archive, _FORMS, path)
            lengths.pop("N", None)  # height and width are the same in all files
            npz.check_forms(archive, _FORMS, path, lengths)
            table = {name: array.tolist() for name, array in npz.read_arrays(archive, WIDTHS).items()}
        for values in zip(*table.values(), strict=True):
            _check_names(path, dict(zip(table, values, strict=True)), seen)
        tables.append(table)

    def patches(start):
        for path, table in zip(paths, tables, strict=True):
            with npz.whole(path) as archive:
                arrays = (itertools.chain.from_iterable(npz.read_rows(archive, key, 1)) for key in ("image", "masks"))
                rows = zip(*table.values(), *arrays, strict=True)
                for *values, image, masks in rows:  # those before are read too: an archive's CRC is of all its bytes
                    if start <= 0:
                        yield path, dict(zip(table, values, strict=True)), image, masks
                    start -= 1

    return len(seen), patches
