"""Large images of a segmentation: overlapping tiles, all with the same draws of the weights, put together again."""

from __future__ import annotations

import os
from collections.abc import Iterator

import numpy as np

from sbn_tf.core.checks import check_number
from sbn_tf.datasets.base import SEGMENTATION
from sbn_tf.datasets.decoding import read_scaled
from sbn_tf.experiments.predictor import BATCH, Prediction, Predictor

MARGIN = 8  # an eighth of a tile is not used where another tile sees it from further inside


def check_tiles(predictor: Predictor, scale: float) -> None:
    """Raise ValueError where a network cannot be used on tiles at this scale."""
    check_number("tile_scale", scale, above=0.0)
    card = predictor.card
    if card.task != SEGMENTATION or card.size < MARGIN:
        raise ValueError(
            f"Expected the network of a segmentation, of {MARGIN} pixels or more, for tiles: labels are of whole "
            f"images. Received: {card.task}, {card.size} px"
        )


def predict_tiled(predictor: Predictor, path: str | os.PathLike, scale: float) -> Prediction:
    """The prediction of an image file by tiles of the network's size, which overlap by half.

    The image is resized to `scale` times its own pixels, as large as things were in training. Every tile meets the same
    draws of the weights. Where tiles overlap a draw's probabilities are averaged, more so the further a pixel lies
    inside; an eighth of a tile at its edge does not count, so a network that sees no further than that gives what one
    pass over the whole image would. Entropies are of these draws. In memory is one image with all its draws.

    Args:
        predictor: the network of a segmentation.
        path: an image file.
        scale: pixels of the network for one of the image; > 0.

    Raises:
        ValueError: labels, a scale that is none, or a file that cannot be read.
    """
    check_tiles(predictor, scale)
    card = predictor.card
    pixels, whole = read_scaled(path, scale, card.channels, card.window)
    height, width = pixels.shape[:2]
    size = card.size
    padded = np.zeros((max(height, size), max(width, size), card.channels), pixels.dtype)
    padded[:height, :width] = pixels
    inputs = predictor.normalised(padded)
    places = [(up, left) for up in _starts(len(padded), size) for left in _starts(padded.shape[1], size)]
    total = np.zeros((card.num_samples, *padded.shape[:2]), "float32")
    weight = np.zeros(padded.shape[:2], "float32")
    for part in (places[start : start + BATCH] for start in range(0, len(places), BATCH)):
        tiles = np.stack([inputs[up : up + size, left : left + size] for up, left in part])
        samples = predictor.samples(tiles)
        for number, (up, left) in enumerate(part):
            within = np.outer(_weights(up, size, len(padded)), _weights(left, size, padded.shape[1]))
            total[:, up : up + size, left : left + size] += within * samples[:, number]
            weight[up : up + size, left : left + size] += within
    samples = (total / weight)[:, :height, :width]
    return predictor.prediction(samples, whole)


def _starts(length, size) -> Iterator[int]:
    """Where tiles begin: half a tile apart, the last one at the end."""
    yield from range(0, length - size, size // 2)
    yield length - size


def _weights(start, size, length):
    """How much each row of a tile counts: up to 1 in its middle, 0 at an edge that is not the image's."""
    place, margin = np.arange(size) + 0.5, size // MARGIN
    before = np.inf if start == 0 else place - margin
    after = np.inf if start + size == length else size - place - margin
    return np.clip(np.minimum(before, after) / size, 0, 1) * np.ones(size)
