"""Test-time augmentation by the eight symmetries of the square: each sample sees the image another way round."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import keras
import numpy as np

__all__ = ["NUM_TURNS", "turned_samples"]

NUM_TURNS = 8


def turned_samples(samples_of: Callable[[np.ndarray], np.ndarray], images: np.ndarray, num_samples: int) -> np.ndarray:
    """Samples of which number s is predicted from the images under symmetry s modulo 8, and turned back.

    Symmetry 0 leaves the image as it is. Bits 1, 2 and 4 of the number: mirrored left-right, mirrored up-down, rows and
    columns swapped, in this order.

    Args:
        samples_of: (batch, side, side, channels) -> (samples, batch, side, side, channels) of masks, or
            (samples, batch, labels), which are not turned back. Of one sample: each symmetry takes it.
        images: (batch, side, side, channels).
        num_samples: >= 1. Samples of `samples_of`, or any number where it has one.

    Returns:
        (num_samples, batch, ...) as `samples_of` gives them.

    Raises:
        ValueError: images that are not square.

    Reference: Wang et al. 2019, "Aleatoric uncertainty estimation with test-time augmentation", equations 10 and 11.
    """
    if images.shape[1] != images.shape[2]:
        raise ValueError(f"Expected square images for quarter turns. Received: {images.shape}")
    found = []
    for start in range(min(NUM_TURNS, num_samples)):
        drawn = samples_of(turn(images, start))
        kept = drawn if len(drawn) == 1 else drawn[start:num_samples:NUM_TURNS]
        found.append(turn_back(kept, start) if kept.ndim == 5 else kept)
    return np.stack([found[s % NUM_TURNS][s // NUM_TURNS % len(found[s % NUM_TURNS])] for s in range(num_samples)])


def turn(images: Any, symmetry: int) -> Any:
    """Images (..., side, side, channels) under one symmetry, 0..7: an array, or a tensor of the backend."""
    images = images[..., ::-1, :] if symmetry & 1 else images
    images = images[..., ::-1, :, :] if symmetry & 2 else images
    return _transposed(images) if symmetry & 4 else images


def turn_back(images: Any, symmetry: int) -> Any:
    """The inverse of `turn`."""
    images = _transposed(images) if symmetry & 4 else images
    images = images[..., ::-1, :, :] if symmetry & 2 else images
    return images[..., ::-1, :] if symmetry & 1 else images


def _transposed(images):
    return images.swapaxes(-3, -2) if isinstance(images, np.ndarray) else keras.ops.swapaxes(images, -3, -2)
