"""The command `sbn-tf predict`: what a trained network says of a folder of new images, and how sure it is."""

from __future__ import annotations

import argparse
import io
import math
import os
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from PIL import Image
from tqdm import tqdm

from sbn_tf.core.checks import check_fraction
from sbn_tf.core.files import write_atomically
from sbn_tf.datasets.base import BINARY, EXCLUSIVE, SEGMENTATION
from sbn_tf.datasets.image_files import image_files
from sbn_tf.datasets.medical import pixel_spacing
from sbn_tf.experiments.folders import begin
from sbn_tf.experiments.guarantees import CONFIDENCE, two_classes
from sbn_tf.experiments.prediction_page import write_prediction_page
from sbn_tf.experiments.predictor import BATCH, NetworkCard, Prediction, Predictor

TABLE, SKIPPED, SETTINGS, REPORT = "predictions.csv", "skipped.csv", "settings.json", "report.html"


def predict_folder(
    predictor: Predictor,
    images: str | os.PathLike,
    out: str | os.PathLike,
    *,
    flag: float = 0.1,
    masks: int = 0,
    alpha: float | None = None,
    refer: float | None = None,
    tile_scale: float | None = None,
) -> pd.DataFrame:
    """Predict every image of a folder, and write what `sbn-tf predict` promises; begun work goes on.

    Args:
        predictor: the network.
        images: a folder.
        out: folder of the results: empty, not there, or begun with the same images, network and settings.
        flag: images are flagged whose total uncertainty is above that of all but this share of the validation images,
            0..1: 0.1 is above 90 % of them.
        masks: sampled masks to write for each image, of a segmentation.
        alpha, refer: see `Decider`; None: without.
        tile_scale: as `scale` of `Predictor.predict_tiled`, of a segmentation; None: each image becomes one square.

    Returns:
        The table of `predictions.csv`.

    Raises:
        ValueError: no image, an `out` that holds something else, or too few validation images for `alpha` or `refer`.
        OSError: a full disk, or an `out` that cannot be written; what is done stays.
    """
    files, place, source = image_files(images), Path(out), Path(images).resolve()
    if place.resolve().is_relative_to(source):
        raise ValueError(f"Expected --out outside of the images' folder {source}. Received: {place}")
    settings: dict[str, Any] = {"flag": flag, "masks": masks, "alpha": alpha, "refer": refer, "tile_scale": tile_scale}
    _check(predictor, **settings)
    decider = Decider(predictor.card, alpha, refer)
    settings["images"] = str(source)
    begin(place, SETTINGS, settings | {"network": predictor.digest()})
    finished = set(_read(place / TABLE).get("image", ()))
    rest = [name for name in files if name not in finished]
    skipped: dict[str, str] = {}
    with tqdm(total=len(files), initial=len(files) - len(rest), desc="images", disable=None) as bar:
        step = BATCH if tile_scale is None else 1  # images in memory
        for start in range(0, len(rest), step):
            part = rest[start : start + step]
            found = dict(zip(part, predictor.predict_files([files[name] for name in part], tile_scale), strict=True))
            skipped |= {name: one for name, one in found.items() if isinstance(one, str)}
            predicted = {name: one for name, one in found.items() if isinstance(one, Prediction)}
            for name, one in predicted.items():
                _write_pictures(place, name, one, masks, decider.cut)
            rows = [_row(name, one, flag, files[name]) | decider.columns(one) for name, one in predicted.items()]
            _append(place / TABLE, rows)
            bar.update(len(part))
    table, lost = _read(place / TABLE), pd.DataFrame(skipped.items(), columns=["image", "reason"])
    write_atomically(place / SKIPPED, lambda file: lost.to_csv(file, index=False))
    shown = {key: value for key, value in settings.items() if value is not None}
    write_prediction_page(place / REPORT, predictor, files, place, table, lost, flag, decider.promises(), shown)
    return table


def _check(predictor, flag, masks, alpha, refer, tile_scale):
    check_fraction("flag", flag)
    most = predictor.card.num_samples if predictor.card.task == SEGMENTATION else 0
    if not 0 <= masks <= most:
        raise ValueError(f"Expected masks, 0 to {most} (the draws; 0 of labels). Received: {masks}")
    if tile_scale is not None:
        predictor.check_tiles(tile_scale)
        if alpha is not None or refer is not None:
            raise ValueError("Expected tile_scale without alpha and refer, which hold for whole images. Received: both")


class Decider:
    """What is decided with a guarantee: sets of labels, masks that miss little, images to refer.

    Args:
        card: of the network.
        alpha: the risk of a set of classes to lack the true one; of a label that an image has to lack in its set; the
            mean share of the true pixels that masks miss. Between 0 and 1. None: neither sets nor such masks.
        refer: the rate of errors among the images that are not referred, between 0 and 1, with confidence 0.9. An error
            is a wrong class, any wrong label, or a Dice below 0.5. None: nothing is referred.

    Raises:
        ValueError: a number that is not between 0 and 1, too few validation images, or a card without a calibration.
    """

    def __init__(self, card: NetworkCard, alpha: float | None = None, refer: float | None = None):
        self.card, self.alpha, self.refer = card, alpha, refer
        self.limits = self.cut = self.most = None
        for name, value in (("alpha", alpha), ("refer", refer)):
            if value is not None and not 0 < value < 1:
                raise ValueError(f"Expected {name} between 0 and 1. Received: {name}={value!r}")
        found = card.calibration
        if found is None and (alpha is not None or refer is not None):
            raise ValueError(
                "Expected a network with a calibration, for --alpha and --refer. Received: one without; "
                "run `sbn-tf train` again."
            )
        if found is not None and refer is not None:
            self.most = found.refer_limit(refer)
        if found is not None and alpha is not None and card.task == SEGMENTATION:
            self.cut = found.cut(alpha)
        elif found is not None and alpha is not None:
            self.limits = found.limits(alpha, card.task)

    @property
    def names(self) -> list[str]:
        """The labels that a set may contain."""
        return [*((f"not {self.card.classes[0]}",) if self.card.task == BINARY else ()), *self.card.classes]

    def columns(self, one: Prediction) -> dict[str, str | bool]:
        """Columns of the table: "set" of labels, with semicolons between, "none" of none; "refer"."""
        row: dict[str, str | bool] = {}
        if self.limits is not None:
            probs = two_classes(one.probabilities[None].astype("float64"), self.card.task)[0]
            inside = 1 - probs <= self.limits
            row["set"] = ";".join(np.asarray(self.names)[inside]) or "none"
        if self.most is not None:
            row["refer"] = bool(one.means["total"] >= self.most)
        return row

    def promises(self) -> list[str]:
        """What holds for new images that are drawn as the validation images were, a line for each risk."""
        found, lines = self.card.calibration, []
        if found is None:
            return lines
        drawn = f"new {found.unit} drawn as the {found.num} of validation"
        if self.cut is not None:
            missed = f"{self.alpha:g} of the true pixels missed at most, in the mean over {drawn}"
            lines.append(f"masks_fnr: {missed}; cut at {self.cut:.3g}")
        if self.limits is not None:
            what = "the true class" if self.card.task in (*EXCLUSIVE, BINARY) else "a label that the image has"
            lines.append(f"set: without {what} in {self.alpha:g} of the cases at most, for {drawn}")
            if never := [name for name, at in zip(self.names, self.limits, strict=True) if at == np.inf]:
                lines.append(f"set: always with {', '.join(never)}: too few validation images have it")
        if self.most is not None:
            kept = f"{self.refer:g} of the others wrong at most, with confidence {CONFIDENCE:g}, for {drawn}"
            wrong = sum(found.error)
            none = f"all images, as too many of the {found.num} of validation are wrong ({wrong} of {len(found.error)})"
            lines.append(f"refer: {kept if self.most > -np.inf else none}")
        return lines


def _row(name, one, flag, path):
    """A line of `predictions.csv`."""
    card, probs = one.card, one.probabilities
    row = {"image": name, "prediction": one.decision(), "confidence": one.confidence}
    if card.task == SEGMENTATION:
        marked = probs > card.threshold
        height, width = pixel_spacing(path) or (math.nan, math.nan)
        row |= {"area_pixels": int(marked.sum()), "area": float(marked.mean())}
        row["area_mm2"] = row["area_pixels"] * height * width  # empty where the file does not say
    else:
        row |= {f"p_{label}": float(p) for label, p in zip(card.classes, probs, strict=True)}
    row |= one.means | {"flag": _above(card.quantiles, one.means["total"], flag)}
    if one.distance is None:
        return row
    return row | {"distance": one.distance, "unlike": _above(card.distance_quantiles, one.distance, flag)}


def _above(quantiles, value, flag):
    """Whether a value is above that of all but this share of the validation images."""
    return bool(flag > 0 and value > (quantiles[round(100 * (1 - flag))] if flag < 1 else -math.inf))


def _write_pictures(out, name, one, masks, cut=None):
    """Of a segmentation: the masks, the maps (white is ln 2 nats, the most), and sampled masks."""
    if one.card.task != SEGMENTATION:
        return
    pictures = {"masks": 255 * (one.probabilities > one.card.threshold)}
    if cut is not None:
        pictures["masks_fnr"] = 255 * (one.probabilities >= cut)
    for kind in ("entropy", "mutual_information"):
        pictures[kind] = np.rint(255 * np.clip(one.entropy(kind) / math.log(2), 0, 1))
    for s in range(masks):
        pictures[f"samples_{s + 1}"] = 255 * (one.sample(s) > one.card.threshold)
    for kind, pixels in pictures.items():
        picture = Image.fromarray(pixels.astype("uint8"))
        write_atomically(out / kind / f"{name}.png", lambda file, picture=picture: picture.save(file, "PNG"))


def _read(path):
    """A table that was written; a line that a killed process left half written is cut off."""
    if not path.exists():
        return pd.DataFrame()
    text = path.read_bytes()
    if not text.endswith(b"\n"):
        text = text[: text.rfind(b"\n") + 1]
        write_atomically(path, lambda file: file.write(text))
    names = dict.fromkeys(("image", "prediction", "set"), str)
    options = {"dtype": names, "keep_default_na": False, "na_values": {"area_mm2": [""]}}
    return pd.read_csv(io.BytesIO(text), **options) if text else pd.DataFrame()


def _append(path, rows):
    if not rows:
        return
    with open(path, "ab") as file:
        pd.DataFrame(rows).to_csv(file, index=False, header=file.tell() == 0, float_format="%.6g")
        file.flush()
        os.fsync(file.fileno())


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `sbn-tf predict`."""
    parser.add_argument("network", help="a folder that `sbn-tf train` made")
    parser.add_argument("images", help="a folder of images: png, jpg, tif, bmp, dcm, nii, nii.gz; folders in it count")
    parser.add_argument("--out", required=True, help="folder of the results; the same again goes on")
    parser.add_argument(
        "--flag",
        type=float,
        default=0.1,
        help="flag images that are less certain than all but this share of the validation images",
    )
    parser.add_argument("--masks", type=int, default=0, help="sampled masks for each image, of a segmentation")
    parser.add_argument(
        "--alpha", type=float, help="sets that miss the true label, or masks that miss true pixels, at most so often"
    )
    parser.add_argument(
        "--tile-scale",
        type=float,
        help="cut large images into overlapping tiles, at so many times their size, as training had them: "
        "1 for a network trained on patches, 0.25 where training shrank images of 512 pixels to 128",
    )
    parser.add_argument("--refer", type=float, help="refer images until at most this share of the others is wrong")


def run(given: argparse.Namespace) -> int:
    """Predict a folder; 1 where a file was skipped."""
    predictor = Predictor.load(given.network)
    options = {key: getattr(given, key) for key in ("flag", "masks", "alpha", "refer", "tile_scale")}
    table = predict_folder(predictor, given.images, given.out, **options)
    skipped = _read(Path(given.out, SKIPPED))
    flagged = int(table["flag"].sum()) if len(table) else 0
    referred = f"{int(table['refer'].sum())} to refer, " if "refer" in table else ""
    print(f"{len(table)} images, {flagged} flagged, {referred}{len(skipped)} skipped: {Path(given.out, REPORT)}")
    for line in Decider(predictor.card, given.alpha, given.refer).promises():
        print(line)
    for name, reason in zip(skipped.get("image", ()), skipped.get("reason", ()), strict=True):
        print(f"skipped {name}: {reason}", file=sys.stderr)
    return 1 if len(skipped) else 0
