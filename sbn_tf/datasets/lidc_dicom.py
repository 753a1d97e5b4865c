"""From LIDC-IDRI's DICOM images to the patches of `lidc_patches`, by way of pylidc.

1. Get LIDC-IDRI from TCIA (https://doi.org/10.7937/K9/TCIA.2015.LO9QL9SX, 125 GB of DICOM images).
2. Make an environment of its own for pylidc, which needs an old NumPy (it uses `np.int`):
   Python 3.10 or 3.11, `pip install pylidc "numpy<1.24" scipy tqdm "setuptools<70"`.
3. Name the folder of the images in `~/.pylidcrc`: `[dicom]`, next line `path = /the/folder/LIDC-IDRI`.
4. In that environment, beside a copy of this file, which needs nothing else of sbn_tf:

       import pylidc, lidc_dicom
       scans = pylidc.query(pylidc.Scan).all()
       lidc_dicom.patches_from_pylidc(scans, "lidc_patches/lidc_patches_128.npz")

   It takes a minute for each of 1,018 scans, shows a progress bar, and continues after an interruption.
5. Put `lidc_patches` under the data root: `datasets.load("lidc_patches")` reads it, by patient.

An array of the file is `image` (N, 128, 128) float16, 0..1; `masks` (N, 4, 128, 128) uint8, 0 or 1; `key`,
`series_uid` and `patient_id` (N,) text.
"""

import contextlib
import hashlib
import json
import logging
import os
import platform
import shutil
import zipfile
from collections.abc import Iterable
from pathlib import Path

import numpy as np
from scipy import ndimage
from tqdm import tqdm

__all__ = ["patches_from_pylidc"]

logger = logging.getLogger(__name__)

NUM_RATERS = 4
WINDOW = (-1000.0, 400.0)  # Hounsfield units: air to soft tissue, the customary lung window
WIDTHS = {"key": 128, "series_uid": 64, "patient_id": 64}  # letters


def patches_from_pylidc(
    scans: Iterable,
    path: str | os.PathLike,
    size: int = 128,
    spacing: float = 0.5,
    window: tuple[float, float] = WINDOW,
) -> Path:
    """Cut every axial slice of every nodule, with the masks of its raters, and write them to an npz.

    A nodule is a group of 1 to 4 annotations, made by `cluster_annotations`. Larger groups are left out, with a
    warning, as nobody knows which annotation is whose. Each slice that a rater marked is cut, all slices of a nodule
    about the middle of its outlines; a rater who did not mark a slice has an empty mask there.

    Args:
        scans: of pylidc, or objects with `patient_id`, `series_instance_uid`, `pixel_spacing` (mm), `to_volume` and
            `cluster_annotations`, of annotations with `bbox` and `boolean_mask`.
        path: the npz to write; its folder is made. Finished scans are kept beside it until all are finished.
        size: side of a patch in pixels.
        spacing: side of a pixel in mm. Images are resampled linearly, masks to the nearest pixel.
        window: (low, high) in Hounsfield units, which become 0 and 1; values beyond are cut off.

    Returns:
        The path.

    Raises:
        FileExistsError: there is a file at `path`, or another build of it runs; a lock beside it names the process.
        ValueError: an argument out of range, a scan twice, a scan that is not as expected, or none with a nodule.
    """
    path = Path(path)
    _check(path, size, spacing, window)
    settings = json.dumps([size, float(spacing), [float(value) for value in window]])
    parts = path.with_name(f"{path.name}.{hashlib.sha256(settings.encode()).hexdigest()[:8]}.parts")
    path.parent.mkdir(parents=True, exist_ok=True)
    with _alone(path):
        _check(path, size, spacing, window)  # another build may have finished it
        parts.mkdir(exist_ok=True)
        _merge(_cut_all(scans, parts, size, spacing, window), path, size)
        shutil.rmtree(parts)
    return path


def _cut_all(scans, parts, size, spacing, window):
    """A file in the folder `parts` for each scan; finished ones are kept."""
    done = []
    for scan in tqdm(scans, desc="cutting patches", unit="scan"):
        part = parts / f"{hashlib.sha256(scan.series_instance_uid.encode()).hexdigest()[:16]}.npz"
        if part in done:
            raise ValueError(
                f"Expected each scan once. Received: series {scan.series_instance_uid} twice.\nTake it out of scans."
            )
        if not _is_whole(part):
            arrays = _cut(scan, size, spacing, window)
            _write_atomically(part, lambda file, arrays=arrays: np.savez_compressed(file, **arrays))
        done.append(part)
    return done


def _check(path, size, spacing, window):
    if path.suffix != ".npz":
        raise ValueError(f"Expected a path that ends with .npz. Received: path={str(path)!r}")
    if path.exists():
        raise FileExistsError(
            f"Expected no file at {path}. Received: one is there.\nMove it elsewhere, or choose another name."
        )
    if isinstance(size, bool) or not hasattr(size, "__index__") or size < 8:
        raise ValueError(f"Expected an integer size >= 8. Received: size={size!r}")
    if not 0 < spacing < np.inf:
        raise ValueError(f"Expected spacing > 0 in mm. Received: spacing={spacing!r}")
    if len(window) != 2 or not -np.inf < window[0] < window[1] < np.inf:
        raise ValueError(f"Expected window (low, high) in Hounsfield units, low < high. Received: window={window!r}")


def _cut(scan, size, spacing, window):
    """Arrays of all patches of a scan; its volume is read only if it has a nodule."""
    uid, patient = scan.series_instance_uid, scan.patient_id
    nodules = scan.cluster_annotations(verbose=False)
    crowded = [nodule for nodule in nodules if len(nodule) > NUM_RATERS]
    if crowded:
        logger.warning("%s: left out %d group(s) of more than %d annotations", uid, len(crowded), NUM_RATERS)
    kept = [(k, nodule) for k, nodule in enumerate(nodules) if 1 <= len(nodule) <= NUM_RATERS]
    images, masks, keys = [], [], []
    if kept:
        native = float(scan.pixel_spacing)
        if not 0 < native < np.inf:
            raise ValueError(f"Expected pixel_spacing > 0 in series {uid}. Received: {scan.pixel_spacing!r}")
        volume = np.asarray(scan.to_volume(verbose=False))
        if volume.ndim != 3:
            raise ValueError(f"Expected a volume of rows, columns, slices in series {uid}. Received: {volume.shape}")
    for number, nodule in kept:
        boxes = [annotation.bbox() for annotation in nodule]
        low = [min(box[axis].start for box in boxes) for axis in range(3)]
        high = [max(box[axis].stop for box in boxes) for axis in range(3)]
        if min(low) < 0 or any(stop > side for stop, side in zip(high, volume.shape, strict=True)):
            raise ValueError(
                f"Expected nodule {number} of series {uid} within its volume {volume.shape}. "
                f"Received: {low} to {high}.\n"
                "Images are missing: get the series again."
            )
        whole = [
            _in_box(annotation.boolean_mask(), box, low, high) for annotation, box in zip(nodule, boxes, strict=True)
        ]
        middle = [(low[axis] + high[axis] - 1) / 2 for axis in (0, 1)]
        for z in range(low[2], high[2]):
            drawn = [mask[:, :, z - low[2]] for mask in whole]
            if not any(mask.any() for mask in drawn):
                continue  # between two slices that a rater marked
            image = _square(volume[:, :, z].astype("float32"), size, spacing / native, middle, 1, window[0])
            images.append((np.clip(image, *window) - window[0]) / (window[1] - window[0]))
            patch = np.zeros((NUM_RATERS, size, size), "uint8")
            inner = [middle[axis] - low[axis] for axis in (0, 1)]
            for r, mask in enumerate(drawn):
                patch[r] = _square(mask.astype("uint8"), size, spacing / native, inner, 0, 0)
            masks.append(patch)
            keys.append(f"{patient}_{uid[-12:]}_nodule{number:02d}_slice{z:04d}")
    n = len(keys)
    return {
        "image": np.array(images, "float16").reshape(n, size, size),
        "masks": np.array(masks, "uint8").reshape(n, NUM_RATERS, size, size),
        "key": _texts("key", keys),
        "series_uid": _texts("series_uid", [uid] * n),
        "patient_id": _texts("patient_id", [patient] * n),
    }


def _in_box(mask, box, low, high):
    """A mask of its own box in the box of all."""
    out = np.zeros([stop - start for start, stop in zip(low, high, strict=True)], bool)
    place = tuple(slice(b.start - start, b.stop - start) for b, start in zip(box, low, strict=True))
    if mask.shape != out[place].shape:
        raise ValueError(f"Expected a mask {out[place].shape} as its bbox says. Received: {mask.shape}")
    out[place] = mask
    return out


def _square(image, size, scale, middle, order, outside):
    """As `lidc.resample` about a middle; repeated here, so that this file needs nothing else of sbn_tf."""
    offset = np.asarray(middle) - scale * (size - 1) / 2
    return ndimage.affine_transform(
        image, np.diag([scale, scale]), offset, (size, size), order=order, mode="constant", cval=outside
    )


def _texts(name, values):
    longest = max(values, key=len, default="")
    if len(longest) > WIDTHS[name]:
        raise ValueError(f"Expected a {name} of {WIDTHS[name]} letters at most. Received: {longest!r}")
    return np.array(values, f"<U{WIDTHS[name]}").reshape(len(values))


# ---- files


@contextlib.contextmanager
def _alone(path):
    """Holds a lock beside the path: two builds would write over and remove each other's files."""
    lock = path.with_name(path.name + ".lock")
    try:
        lock.touch(exist_ok=False)
    except FileExistsError:
        try:
            holder = lock.read_text("utf-8").strip() or "nobody it names"
        except OSError as error:
            holder = error.strerror
        raise FileExistsError(
            f"Expected one build of {path} at a time. Received: {lock}, held by {holder}.\n"
            f"Wait for that build; if it is gone, as after a power cut, remove {lock.name} and call again."
        ) from None
    try:
        lock.write_text(f"process {os.getpid()} on {platform.node()}\n", "utf-8")
        yield
    finally:
        lock.unlink(missing_ok=True)


def _is_whole(part):
    if not part.exists():
        return False
    try:
        with zipfile.ZipFile(part) as archive:
            return archive.testzip() is None
    except (OSError, zipfile.BadZipFile, EOFError):
        return False


def _write_atomically(path, write):
    """As `core.files.write_atomically`; repeated here, so that this file needs nothing else of sbn_tf."""
    temporary = path.with_name(path.name + ".tmp")
    try:
        with open(temporary, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def _merge(parts, path, size):
    """One npz of all; arrays are written part by part, so they need not fit in memory."""
    rows = {"image": ((size, size), "float16"), "masks": ((NUM_RATERS, size, size), "uint8")}
    rows |= {name: ((), f"<U{width}") for name, width in WIDTHS.items()}
    counts = []
    for part in parts:
        with np.load(part, allow_pickle=False) as archive:
            counts.append(len(archive["key"]))
    if not sum(counts):
        raise ValueError(f"Expected scans with nodules. Received: {len(parts)} scans without one")

    def write(file):
        with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED, compresslevel=4) as archive:
            for name, (row, dtype) in rows.items():
                with archive.open(f"{name}.npy", "w", force_zip64=True) as member:
                    header = {"descr": np.dtype(dtype).str, "fortran_order": False, "shape": (sum(counts), *row)}
                    np.lib.format.write_array_header_1_0(member, header)
                    for part in parts:
                        with np.load(part, allow_pickle=False) as source:
                            member.write(source[name].astype(dtype, copy=False).tobytes())

    _write_atomically(path, write)
