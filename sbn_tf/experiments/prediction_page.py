"""The page that `sbn-tf predict` writes: what is flagged and why, what was skipped, and the least certain images."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from PIL import Image
from scipy.stats import binomtest

from sbn_tf.datasets.base import SEGMENTATION
from sbn_tf.datasets.decoding import DEEP, opened
from sbn_tf.datasets.medical import is_medical, read
from sbn_tf.experiments import pages
from sbn_tf.experiments.predictor import NetworkCard, Predictor

CASES = 12
NAMED = 20  # images to refer, at most, that the page names
FEW = 20  # validation images
UNUSUAL = 0.01  # probability of so many flags, if the images were like those of validation


def write_prediction_page(
    path: str | os.PathLike,
    predictor: Predictor,
    files: Mapping[str, Path],
    out: str | os.PathLike,
    table: pd.DataFrame,
    skipped: pd.DataFrame,
    flag: float,
    promises: Sequence[str] = (),
    settings: Mapping[str, Any] | None = None,
) -> None:
    """Write the report of the images that a network predicted. At most one whole image is in memory at a time.

    Args:
        path: of the page.
        predictor: the network.
        files: name of each image in the table -> its file.
        out: the results' folder, with the masks and maps of a segmentation.
        table: `predictions.csv`; empty where no image could be read.
        skipped: columns image and reason.
        flag: share of the validation images whose uncertainty is above the limit of a flag, 0..1.
        promises: of `predict.Decider`: what the decisions guarantee.
        settings: to be named, such as {"images": folder, "alpha": 0.1}.

    Raises:
        OSError: a full disk, or no permission; a page that was there before stays.
    """
    card = predictor.card
    unsure = table.sort_values("total", ascending=False, kind="stable") if len(table) else table
    flagged = unsure[unsure["flag"]] if len(table) else table
    sentences = _sentences(len(table), len(flagged), flag, "are flagged")
    listed = flagged
    if "unlike" in table:
        words = f"are further from the training images, in the network's features, than {100 * (1 - flag):g} % of those"
        sentences += _sentences(len(table), int(table["unlike"].sum()), flag, f"{words} of validation")
        listed = unsure[unsure["flag"] | unsure["unlike"]]
    if card.calibration is not None and len(card.calibration.total) < FEW:
        sentences.append(
            f"The network has {len(card.calibration.total)} validation images: too few for flags and percentages to "
            "mean much."
        )
    if card.turned:
        sentences.append(
            "Each draw sees an image flipped or turned another way: its epistemic part is how far these views disagree."
        )
    if settings and settings.get("tile_scale"):
        sentences.append("These were cut into tiles; flags compare them with whole images of validation.")
    if "refer" in table:
        names = unsure.loc[unsure["refer"], "image"].tolist()
        which = ", ".join(names) if 0 < len(names) <= NAMED else "column refer of predictions.csv"
        promises = [*promises, f"To refer: {len(names)} of {len(table)} images ({which})."]
    legend = "Total uncertainty is the mean entropy in nats; it is aleatoric plus epistemic."
    if card.task == SEGMENTATION:
        legend += " The mask is green. Uncertainty: the entropy of each pixel, from 0 (dark) to ln 2 nats (yellow)."
    pages.write_page(
        path,
        "prediction.html",
        title=f"{len(table):,} images, predicted by a network trained on {card.dataset}",
        headline=f"{len(table):,} images: {len(flagged):,} flagged, {len(skipped):,} skipped.",
        sentences=[*sentences, *promises],
        limit=f"{100 * (1 - flag):g} %",
        flagged=pages.rows_of(_reasons(listed, card), "image"),
        skipped=pages.rows_of(
            skipped.set_index("image") if len(skipped) else pd.DataFrame(columns=["reason"]), "image"
        ),
        unsure=[_case(row, card, files.get(row["image"]), Path(out)) for _, row in unsure.head(CASES).iterrows()],
        legend=legend,
        settings=pages.settings_table([*(settings or {}).items(), *pages.about(predictor)]),
    )


def share_below(quantiles: tuple[float, ...], value: float) -> int:
    """Per cent of the validation images that a value is above, by their 0 %, 1 %, ... 100 % quantiles."""
    return max(0, int(np.searchsorted(quantiles, value)) - 1)


def stands_out(card: NetworkCard, aleatoric: float, epistemic: float) -> str:
    """Which part of an image's uncertainty is higher beside the validation images' than the other one, in words."""
    if card.num_samples == 1:
        return "one draw: aleatoric alone"
    ours = {
        "aleatoric": share_below(card.aleatoric_quantiles, aleatoric),
        "epistemic": share_below(card.epistemic_quantiles, epistemic),
    }
    first, second = sorted(ours, key=ours.__getitem__, reverse=True)
    if ours[first] == ours[second]:
        return f"both parts, {_above(ours[first])}"
    return f"{first}, {_above(ours[first])}; {second} {_above(ours[second])}"


def _above(share):
    return "above all" if share == 100 else f"above {share} %"


def _reasons(flagged, card):
    made = {
        row["image"]: {
            **({"marked": f"{100 * row['area']:.1f} %"} if "area" in row else {"prediction": row["prediction"]}),
            "uncertainty": f"{row['total']:.3f} nats, {_above(share_below(card.quantiles, row['total']))}",
            "what stands out": stands_out(card, row["aleatoric"], row["epistemic"]),
            **({"distance": _distance(row, card)} if "unlike" in row else {}),
        }
        for _, row in flagged.iterrows()
    }
    return pd.DataFrame.from_dict(made, orient="index")


def _distance(row, card):
    words = _above(share_below(card.distance_quantiles, row["distance"]))
    return f"unlike the training images, {words}" if row["unlike"] else words


def _sentences(number, flagged, flag, words):
    if not number or not 0 < flag < 1:
        return []
    share, usual = f"{100 * flagged / number:.0f} % {words}", f"{100 * flag:g} %"
    share += f"; of images like those of validation it would be about {usual}."
    if binomtest(flagged, number, flag, alternative="greater").pvalue < UNUSUAL:
        return [f"{share} That many are a hint that these images differ from the training images: look at them first."]
    return [share]


def _case(row, card, path, out):
    """Pictures and numbers of an image."""
    name = row["image"]
    tiles = [] if path is None else _tiles(name, card, path, out)
    lines = [
        f"{row['prediction']} (confidence {row['confidence']:.2f})",
        f"uncertainty {row['total']:.3f} nats: aleatoric {row['aleatoric']:.3f}, epistemic {row['epistemic']:.3f}",
    ]
    return {"name": name, "tiles": [{"name": key, "source": pages.picture(one)} for key, one in tiles], "lines": lines}


def _tiles(name, card, path, out):
    try:
        image = _small(path, window=card.window)
        if card.task != SEGMENTATION:
            return [("image", image)]
        mask, entropy = (_small(out / kind / f"{name}.png", "L") for kind in ("masks", "entropy"))
    except (ValueError, OSError):  # gone or changed since it was predicted
        return []
    maps = {"prediction": pages.marked(image, mask > 127), "uncertainty": pages.heat(entropy / 255 * np.log(2))}
    return [("image", image), *maps.items()]


def _small(path, mode="RGB", window=None):
    """An image file as a thumbnail, uint8 (height, width[, 3])."""
    if is_medical(path):
        return _shrunk(Image.fromarray(np.rint(255 * read(path, window)).astype("uint8")), mode)
    with opened(path) as image:
        if image.mode in DEEP:
            return _shrunk(Image.fromarray((np.asarray(image) // 257).astype("uint8")), mode)
        return _shrunk(image, mode)


def _shrunk(image, mode):
    scale = min(1, pages.SIDE / max(image.size))
    size = [max(1, round(scale * side)) for side in image.size]  # the same for an image and its maps
    image.draft(mode, size)  # a JPEG need not be decoded in full
    same = image if image.mode == mode else image.convert(mode)
    return np.asarray(same.resize(size, Image.Resampling.BILINEAR))
