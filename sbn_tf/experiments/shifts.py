"""Shifted images: test images as another scanner might give them."""

from __future__ import annotations

import numpy as np

__all__ = ["shifted"]


def shifted(images: np.ndarray, kind: str, severity: float, seed: int = 0, offset: int = 0) -> np.ndarray:
    """Make normalised images worse; severity 0 leaves them as they are.

    Args:
        images: (batch, height, width, channels) float32, normalised: unit standard deviation.
        kind: "noise" (Gaussian, standard deviation severity * 0.2), "blur" (Gaussian, sigma = severity in pixels) or
            "contrast" (towards the image's own mean by the fraction severity, 0..1).
        severity: how much, >= 0.
        seed: of the noise.
        offset: number of the first image: an image gets the same noise however the images are divided.

    Returns:
        float32, a new array. Values are not cut to the range of the original pixels.

    Raises:
        ValueError: an unknown kind, a severity out of its range, images of another shape.
    """
    images = np.asarray(images, "float32")
    if images.ndim != 4:
        raise ValueError(f"Expected images (batch, height, width, channels). Received: shape {images.shape}")
    if kind not in ("noise", "blur", "contrast"):
        raise ValueError(f'Expected kind "noise", "blur" or "contrast". Received: kind={kind!r}')
    if not 0 <= severity < np.inf or (kind == "contrast" and severity > 1):
        limit = "in 0..1" if kind == "contrast" else "finite and >= 0"
        raise ValueError(f"Expected severity {limit} for {kind!r}. Received: severity={severity!r}")
    if kind == "blur":
        from scipy.ndimage import gaussian_filter

        return gaussian_filter(images, (0, severity, severity, 0), mode="nearest")
    if kind == "contrast":
        mean = images.mean((1, 2), keepdims=True)
        return (mean + (1 - severity) * (images - mean)).astype("float32")
    noise = [np.random.default_rng([seed, offset + k]).standard_normal(images.shape[1:]) for k in range(len(images))]
    return (images + 0.2 * severity * np.asarray(noise).reshape(images.shape)).astype("float32")
