"""The command `sbn-tf predict`: what a trained network says of a folder of new images, and how sure it is."""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pandas as pd
from PIL import Image
from tqdm import tqdm

from sbn_tf.core.checks import check_fraction
from sbn_tf.core.files import write_atomically
from sbn_tf.datasets.base import EXCLUSIVE, SEGMENTATION
from sbn_tf.experiments.predictor import Prediction, Predictor, image_files

__all__ = ["add_arguments", "predict_folder", "run"]

BATCH = 16  # images in memory at a time
TABLE, SKIPPED, SETTINGS = "predictions.csv", "skipped.csv", "settings.json"


def predict_folder(
    predictor: Predictor,
    images: str | os.PathLike,
    out: str | os.PathLike,
    *,
    flag: float = 0.1,
    masks: int = 0,
    model: int = 0,
) -> pd.DataFrame:
    """Predict every image of a folder, and write what `sbn-tf predict` promises; begun work goes on.

    Args:
        predictor: the network.
        images: a folder.
        out: folder of the results: empty, not there, or begun with the same network and settings.
        flag: images are flagged that are less sure than this share of the validation images, 0..1.
        masks: sampled masks to write for each image.

    Returns:
        The table of `predictions.csv`.

    Raises:
        ValueError: no image, or an `out` that holds something else.
        OSError: a full disk, or an `out` that cannot be written; what is done stays.
    """
    check_fraction("flag", flag)
    if not 0 <= masks <= predictor.card.num_samples:
        raise ValueError(f"Expected masks, 0 to {predictor.card.num_samples} (the draws). Received: {masks}")
    files, place = image_files(images), Path(out)
    _begin(place, {"network": predictor.crc32(), "flag": flag, "masks": masks})
    done = _read(place / TABLE)
    skipped: dict[str, str] = {}
    rest = [name for name in files if name not in set(done["image"] if len(done) else ())]
    with tqdm(total=len(files), initial=len(files) - len(rest), desc="images", disable=None) as bar:
        for start in range(0, len(rest), BATCH):
            part = rest[start : start + BATCH]
            found = list(_predicted(predictor, {name: files[name] for name in part}, skipped))
            for name, one in found:
                _write_pictures(place, name, one, predictor, masks)
            rows = [_row(name, one, predictor, flag) for name, one in found]
            done = pd.concat([done, pd.DataFrame(rows)], ignore_index=True) if rows else done
            _write(place / TABLE, done)
            bar.update(len(part))
    _write(place / SKIPPED, pd.DataFrame(skipped.items(), columns=["image", "reason"]))
    return done


def _predicted(predictor, files, skipped) -> Iterator[tuple[str, Prediction]]:
    """Name and prediction of the files that can be read; the others' reasons go into `skipped`."""
    inputs, wholes = {}, []
    for name, path in files.items():
        try:
            inputs[name], whole = predictor.read(path)
            wholes.append(whole)
        except (ValueError, OSError) as error:
            skipped[name] = str(error).replace("\n", " ")
    if inputs:
        yield from zip(inputs, predictor.predict_batch(np.stack(list(inputs.values())), wholes), strict=True)


def _row(name, one, predictor, flag):
    """A line of `predictions.csv`; entropies in nats, of masks and labels the mean over pixels or labels."""
    card, probs = predictor.card, one.probabilities
    sure = probs.max() if card.task in EXCLUSIVE else np.maximum(probs, 1 - probs).mean()
    row = {"image": name, "prediction": ";".join(one.labels(card)) or "none", "confidence": float(sure)}
    if card.task == SEGMENTATION:
        marked = probs > card.threshold
        row |= {"area_pixels": int(marked.sum()), "area": float(marked.mean())}
    else:
        row |= {f"p_{label}": float(p) for label, p in zip(card.classes, probs, strict=True)}
    row |= {
        "total": one.score,
        "aleatoric": float(one.expected_entropy.mean()),
        "epistemic": float(one.mutual_information.mean()),
    }
    limit = card.quantiles[round(100 * (1 - flag))]
    return row | {"flag": bool(flag == 1 or one.score > limit)}


def _write_pictures(out, name, one, predictor, masks):
    """Of a segmentation: the mask, the maps (white is ln 2 nats, the most), and sampled masks."""
    card = predictor.card
    if card.task != SEGMENTATION:
        return
    cut = {"masks": one.probabilities, **{f"samples_{s + 1}": one.samples[s] for s in range(masks)}}
    pictures = {kind: 255 * (probs > card.threshold) for kind, probs in cut.items()}
    maps = {"entropy": one.entropy, "mutual_information": one.mutual_information}
    pictures |= {kind: np.rint(255 * np.clip(values / math.log(2), 0, 1)) for kind, values in maps.items()}
    for kind, pixels in pictures.items():
        picture = Image.fromarray(pixels.astype("uint8"))
        write_atomically(out / kind / f"{name}.png", lambda file, picture=picture: picture.save(file, "PNG"))


def _begin(out, settings):
    """Make the folder of the results, or see that it was begun with these settings."""
    path = out / SETTINGS
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        write_atomically(path, lambda file: file.write(json.dumps(settings).encode()))
        return
    try:
        begun = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError):
        raise ValueError(f"Expected --out, an empty folder or a new one. Received: {out}, with other files.") from None
    if begun != settings:
        raise ValueError(
            f"Expected the settings that {out} was begun with, {begun}. Received: {settings}.\n"
            "Take another --out, or delete this one."
        )


def _read(path):
    return pd.read_csv(path, dtype={"image": str}, keep_default_na=False) if path.exists() else pd.DataFrame()


def _write(path, table):
    write_atomically(path, lambda file: table.to_csv(file, index=False, float_format="%.6g"))


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `sbn-tf predict`."""
    parser.add_argument("network", help="a folder that `sbn-tf train` made")
    parser.add_argument("images", help="a folder of images: png, jpg, tif, bmp; folders in it count")
    parser.add_argument("--out", required=True, help="folder of the results; the same again goes on")
    parser.add_argument("--flag", type=float, default=0.1, help="flag what is less sure than this share of validation")
    parser.add_argument("--masks", type=int, default=0, help="sampled masks for each image, of a segmentation")


def run(given: argparse.Namespace) -> int:
    """Predict a folder; 1 where a file was skipped."""
    predictor = Predictor.load(given.network)
    table = predict_folder(predictor, given.images, given.out, flag=given.flag, masks=given.masks)
    skipped = _read(Path(given.out, SKIPPED))
    flagged = int(table["flag"].sum()) if len(table) else 0
    print(f"{len(table)} images, {flagged} flagged, {len(skipped)} skipped: {Path(given.out, TABLE)}")
    for name, reason in zip(skipped.get("image", ()), skipped.get("reason", ()), strict=True):
        print(f"skipped {name}: {reason}", file=sys.stderr)
    return 1 if len(skipped) else 0
