"""Test-time augmentation by the eight symmetries of the square: each sample sees the image another way round."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from keras import ops

from sbn_tf.core.checks import check_count

__all__ = ["NUM_TURNS", "turned_samples"]

NUM_TURNS = 8


def turned_samples(samples_of: Callable[[np.ndarray], Any], images: np.ndarray, num_samples: int) -> np.ndarray:
    """Samples of which number s is predicted from the images under symmetry s modulo 8, and turned back.

    Symmetry 0 leaves the image as it is. Bits 1, 2 and 4 of the number: mirrored left-right, mirrored up-down, rows and
    columns swapped, in this order. Each of the samples costs a call of `samples_of`.

    Args:
        samples_of: (batch, side, side, channels) -> (samples, batch, labels), or maps, (samples, batch, side, side) or
            (samples, batch, side, side, channels). If it gives one sample, that is what every symmetry uses.
        images: (batch, side, side, channels).
        num_samples: >= 1; at most the number of samples of `samples_of`, if that is above 1.

    Returns:
        (num_samples, batch, ...) as `samples_of` gives them; maps are turned back.

    Raises:
        ValueError: images that are not square, too many samples, or samples of another shape.

    Reference: Wang et al. 2019, "Aleatoric uncertainty estimation with test-time augmentation", equations 10 and 11.
    """

    def sample_of(turned_images, number):
        drawn = ops.convert_to_numpy(samples_of(turned_images))
        if 1 < len(drawn) < num_samples:
            raise ValueError(f"Expected num_samples of at most {len(drawn)}. Received: {num_samples}")
        return drawn[number if len(drawn) > 1 else 0]

    return turned(sample_of, images, num_samples)


def turned(sample_of: Callable[[np.ndarray, int], np.ndarray], images: np.ndarray, num_samples: int) -> np.ndarray:
    """The same of `sample_of(images, number)`, which gives one sample, (batch, ...)."""
    check_count("num_samples", num_samples)
    if images.ndim != 4 or images.shape[1] != images.shape[2]:
        raise ValueError(f"Expected square images for quarter turns. Received: {images.shape}")
    found = []
    for number in range(num_samples):
        symmetry = number % NUM_TURNS
        sample = sample_of(turn(images, symmetry), number)
        square = sample.shape[1:3] == images.shape[1:3]
        if sample.ndim == 4 and square:
            sample = turn_back(sample, symmetry)
        elif sample.ndim == 3 and square:
            sample = turn_back(sample[..., None], symmetry)[..., 0]
        elif sample.ndim != 2:
            raise ValueError(f"Expected labels, or maps of the images' size. Received: a sample of {sample.shape}")
        found.append(sample)
    return np.stack(found)


def turn(images: Any, symmetry: int) -> Any:
    """Images (..., side, side, channels) under one symmetry, 0..7: an array, or a tensor of the backend."""
    images = _flipped(images, -2) if symmetry & 1 else images
    images = _flipped(images, -3) if symmetry & 2 else images
    return _transposed(images) if symmetry & 4 else images


def turn_back(images: Any, symmetry: int) -> Any:
    """The inverse of `turn`."""
    images = _transposed(images) if symmetry & 4 else images
    images = _flipped(images, -3) if symmetry & 2 else images
    return _flipped(images, -2) if symmetry & 1 else images


def _flipped(images, axis):
    return np.flip(images, axis) if isinstance(images, np.ndarray) else ops.flip(images, axis)


def _transposed(images):
    return images.swapaxes(-3, -2) if isinstance(images, np.ndarray) else ops.swapaxes(images, -3, -2)
