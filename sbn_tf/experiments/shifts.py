"""Shifted images: test images as another scanner, another camera or a bad day might give them."""

from __future__ import annotations

import io
from collections.abc import Callable

import numpy as np
from PIL import Image
from scipy import ndimage

__all__ = ["shifted"]


def _impulses(pixels, share, rng):
    """Salt and pepper: this share of the pixels becomes white or black."""
    hit, white = rng.random(pixels.shape[:2]) < share, rng.random(pixels.shape[:2]) < 0.5
    return np.where(hit[..., None], white[..., None].astype(pixels.dtype), pixels)


def _through_picture(pixels, change):
    """Pixels of 0..1 as an 8-bit picture, which `change` makes another."""
    picture = Image.fromarray(np.rint(255 * pixels).astype("uint8").squeeze())
    return np.asarray(change(picture)).reshape(pixels.shape) / 255


def _jpeg(pixels, quality, rng):
    def change(picture):
        picture.save(stored := io.BytesIO(), "JPEG", quality=quality)
        return Image.open(stored)

    return _through_picture(pixels, change)


def _pixelate(pixels, share, rng):
    def change(picture):
        small = [max(1, int(side * share)) for side in picture.size]
        return picture.resize(small, Image.Resampling.BOX).resize(picture.size, Image.Resampling.NEAREST)

    return _through_picture(pixels, change)


def _desaturate(pixels, share, rng):
    grey = pixels.mean(-1, keepdims=True)
    return grey + share * (pixels - grey)


def _black_corner(pixels, radius, rng):
    """A round lens: black beyond this share of half the diagonal."""
    up, across = (np.linspace(-1, 1, side) for side in pixels.shape[:2])
    return pixels * (np.hypot(*np.meshgrid(up, across, indexing="ij")) <= radius * np.sqrt(2))[..., None]


# Kind -> what severities 1 to 5 are, and (pixels (height, width, channels) in 0..1, that, generator) -> pixels, which
# are then cut to 0..1. Noise, brightness, jpeg and pixelate: the levels of CIFAR-10-C (Hendrycks and Dietterich 2019).
# The kinds are those of MedMNIST-C (Di Salvo et al. 2024) that NumPy, SciPy and Pillow make.
CORRUPTIONS: dict[str, tuple[tuple[float, ...], Callable]] = {
    "gaussian_noise": ((0.04, 0.06, 0.08, 0.09, 0.10), lambda x, sd, rng: x + rng.normal(0, sd, x.shape)),
    "shot_noise": ((500, 250, 100, 75, 50), lambda x, photons, rng: rng.poisson(x * photons) / photons),
    "impulse_noise": ((0.01, 0.02, 0.03, 0.05, 0.07), _impulses),
    "speckle_noise": ((0.06, 0.1, 0.12, 0.16, 0.2), lambda x, sd, rng: x + x * rng.normal(0, sd, x.shape)),
    "motion_blur": ((3, 5, 7, 9, 11), lambda x, length, rng: ndimage.uniform_filter1d(x, length, axis=1)),
    "brightness_up": ((0.05, 0.1, 0.15, 0.2, 0.3), lambda x, more, rng: x + more),
    "brightness_down": ((0.05, 0.1, 0.15, 0.2, 0.3), lambda x, less, rng: x - less),
    "gamma_up": ((1.2, 1.4, 1.7, 2.0, 2.5), lambda x, power, rng: x**power),
    "gamma_down": ((1.2, 1.4, 1.7, 2.0, 2.5), lambda x, power, rng: x ** (1 / power)),
    "desaturate": ((0.8, 0.6, 0.4, 0.2, 0.0), _desaturate),
    "jpeg": ((80, 65, 58, 50, 40), _jpeg),
    "pixelate": ((0.95, 0.9, 0.85, 0.75, 0.65), _pixelate),
    "black_corner": ((0.95, 0.9, 0.85, 0.8, 0.75), _black_corner),
}
KINDS = ("noise", "blur", "contrast", *CORRUPTIONS)


def shifted(
    images: np.ndarray,
    kind: str,
    severity: float,
    seed: int = 0,
    offset: int = 0,
    mean: np.ndarray | float = 0.0,
    sd: np.ndarray | float = 1.0,
) -> np.ndarray:
    """Make normalised images worse; severity 0 leaves them as they are.

    Args:
        images: (batch, height, width, channels) float32, normalised: unit standard deviation.
        kind: "noise" (Gaussian, standard deviation severity * 0.2), "blur" (Gaussian, sigma = severity in pixels) or
            "contrast" (towards the image's own mean by the fraction severity, 0..1); or a kind of `CORRUPTIONS`, of
            severity 1, 2, 3, 4 or 5, done to the pixels of 0..1.
        severity: how much, >= 0.
        seed: of the noise.
        offset: number of the first image: an image gets the same noise however the images are divided.
        mean, sd: of each channel on the 0..1 scale, with which the images were normalised; for `CORRUPTIONS`.

    Returns:
        float32, a new array. Of the first three kinds, values are not cut to the range of the original pixels.

    Raises:
        ValueError: an unknown kind, a severity out of its range, images of another shape.
    """
    images = np.asarray(images, "float32")
    if images.ndim != 4:
        raise ValueError(f"Expected images (batch, height, width, channels). Received: shape {images.shape}")
    if kind not in KINDS:
        raise ValueError(f"Expected kind to be one of {KINDS}. Received: kind={kind!r}")
    known = severity in range(6) if kind in CORRUPTIONS else 0 <= severity < np.inf
    if not known or (kind == "contrast" and severity > 1):
        limit = "1, 2, 3, 4 or 5" if kind in CORRUPTIONS else "in 0..1" if kind == "contrast" else "finite and >= 0"
        raise ValueError(f"Expected severity {limit} for {kind!r}. Received: severity={severity!r}")
    if kind == "desaturate" and images.shape[-1] != 3:
        raise ValueError(f"Expected images in colour for {kind!r}. Received: shape {images.shape}")
    if kind == "blur":
        return ndimage.gaussian_filter(images, (0, severity, severity, 0), mode="nearest")
    if kind == "contrast":
        own = images.mean((1, 2), keepdims=True)
        return (own + (1 - severity) * (images - own)).astype("float32")
    generators = [np.random.default_rng([seed, offset + k]) for k in range(len(images))]
    if kind == "noise":
        noise = [one.standard_normal(images.shape[1:]) for one in generators]
        return (images + 0.2 * severity * np.asarray(noise).reshape(images.shape)).astype("float32")
    if severity == 0:
        return images.copy()
    levels, change = CORRUPTIONS[kind]
    pixels = np.clip(images * sd + mean, 0, 1)
    made = [change(one, levels[int(severity) - 1], rng) for one, rng in zip(pixels, generators, strict=True)]
    return ((np.clip(np.asarray(made), 0, 1) - mean) / sd).astype("float32").reshape(images.shape)
