"""Phantoms: small images made on the spot, with known and genuine uncertainty.

Each dataset is drawn from a stated generative model, so the probability of a label, or that a rater marks a
pixel, is known exactly given the scene (`Split.truth_probs`). An image shows its scene only through noise, so
on average no network has a better NLL or Brier score than these probabilities; the bound may be out of reach.
Coordinates run from 0 to 1 over the image, so the same seed gives the same scenes at every size.

Images are `(N, size, size, C)` uint8; options of the readers: `num_train`, `num_val`, `num_test`.
"""

import functools

import numpy as np
from scipy.special import ndtr

from .base import MULTI_LABEL, SEGMENTATION, Card, Parts, Split
from .chest import LABELS
from .files import is_integer


def _card(name, title, task, classes, notes, channels=1, num_raters=1):
    return Card(
        name=name,
        title=title,
        task=task,
        classes=classes,
        channels=channels,
        num_raters=num_raters,
        licence="Apache-2.0 (made by this package)",
        citation="none needed",
        source="sbn_tf.datasets.phantoms",
        files=(),
        default_size=32,
        network="unet" if task == SEGMENTATION else "resnet18",
        notes=notes,
    )


PHANTOM_CHEST = _card(
    "phantom_chest",
    "phantom radiographs with 14 rare, faint findings",
    MULTI_LABEL,
    LABELS,
    "Synthetic; names only say where a sign is put. Labels of 1 to 20 % prevalence, some wrong.",
)
PHANTOM_LESION = _card(
    "phantom_lesion",
    "phantom dermoscopic images with the lesion's boundary",
    SEGMENTATION,
    ("lesion",),
    "Synthetic. The mask is one annotator's: the boundary is uncertain in proportion to its blur.",
    channels=3,
)
PHANTOM_NODULE = _card(
    "phantom_nodule",
    "phantom CT nodules, outlined by 4 raters who disagree",
    SEGMENTATION,
    ("nodule",),
    "Synthetic. Some nodules have a halo that only some raters include; faint ones are missed by some. "
    "An empty mask is a rater who outlined nothing.",
    num_raters=4,
)

# Roughly ChestMNIST's own rates, none under 1.2 % so that a small split has each.
PREVALENCE = np.array([0.12, 0.03, 0.13, 0.20, 0.06, 0.06, 0.015, 0.05, 0.045, 0.025, 0.03, 0.02, 0.035, 0.012])
_FALSE_SHARE = 0.12  # positives of a label whose sign is not there: wrong labels, as in mined reports
NUM_RATERS = 4


def _reader(make, tag, root, size, seed, *, num_train=600, num_val=150, num_test=300):
    """Three splits, each from the images, targets and probabilities that `make` draws."""
    splits = []
    for k, (name, n) in enumerate((("train", num_train), ("val", num_val), ("test", num_test))):
        if not is_integer(n, 1):
            raise ValueError(f"Expected an integer num_{name} >= 1. Received: num_{name}={n!r}")
        # Latents and pixel noise have a generator each: another size changes the noise and nothing else.
        latent, noise = (np.random.default_rng([seed, tag, k, which]) for which in range(2))
        images, targets, truth_probs = make(n, size, latent, noise)
        splits.append(
            Split(
                name=name,
                task=MULTI_LABEL if targets.ndim == 2 else SEGMENTATION,
                images=_to_uint8(images),
                targets=targets,
                truth_probs=truth_probs.astype("float32"),
            )
        )
    return Parts(*splits)


# ---- radiographs


def _chest(n, size, latent, noise):
    """Targets and `truth_probs` `(N, 14)`.

    A finding has a severity, 0 for most images. Its sign's contrast grows with the severity, and
    `P(label = 1 | severity) = 0.5 + 0.4 * severity` where there is a sign (severity 0.4 to 1), a small constant where
    there is none (`_FALSE_SHARE` of the positives).
    """
    x, y = _grid(size)
    image, place = _thorax(n, x, y, latent)

    # Present signs, severities, labels. Counts are as even as the rates allow, so that no label is absent.
    present_rate = PREVALENCE * (1 - _FALSE_SHARE) / 0.78  # 0.78: mean P(label | sign)
    false_rate = PREVALENCE * _FALSE_SHARE / (1 - present_rate)
    present = _systematic(np.tile(present_rate, (n, 1)), latent)
    severity = np.where(present, latent.uniform(0.4, 1.0, present.shape), 0.0)
    truth_probs = np.where(present, 0.5 + 0.4 * severity, false_rate)
    labels = _systematic(truth_probs, latent)

    signs = _signs(n, x, y, place, latent)  # 14 of (N, size, size)
    for k, sign in enumerate(signs):
        image = image + severity[:, k, None, None] * sign
    exposure = 1 + 0.08 * latent.standard_normal((n, 1, 1))
    image = image * exposure + 0.045 * noise.standard_normal(image.shape)
    return image[..., None], labels, truth_probs


def _thorax(n, x, y, latent):
    """Body, lungs, ribs, heart, spine and soft clutter, jittered; and where things lie, for the signs."""
    jitter = 0.02 * latent.standard_normal((8, n, 1, 1))
    place = {
        "left": 0.29 + jitter[0],
        "right": 0.71 + jitter[1],
        "middle": 0.48 + jitter[2],
        "width": 0.155 + 0.4 * jitter[3],
        "height": 0.31 + 0.6 * jitter[4],
        "heart_x": 0.55 + 0.6 * jitter[5],
        "heart_y": 0.66 + 0.6 * jitter[6],
        "heart": 0.13 + 0.4 * jitter[7],
    }
    lungs = sum(
        _soft_disc(x, y, place[side], place["middle"], place["width"], place["height"], 0.12)
        for side in ("left", "right")
    )
    place["lungs"] = np.minimum(lungs, 1)
    body = _soft_disc(x, y, 0.5, 0.55, 0.47, 0.6, 0.08)
    image = 0.08 + 0.6 * body - 0.38 * place["lungs"]
    image += 0.28 * _soft_disc(x, y, place["heart_x"], place["heart_y"], place["heart"], 0.14, 0.2)
    image += 0.12 * np.exp(-(((x - 0.5) / 0.05) ** 2))
    tilt, pitch, phase = (latent.uniform(low, high, (n, 1, 1)) for low, high in ((3, 6), (8, 10), (0, 6.3)))
    ribs = np.sin(2 * np.pi * pitch * y + tilt * (2 * (x - 0.5)) ** 2 + phase)
    image += 0.05 * ribs * body
    image += 0.035 * _clutter(n, x, y, latent, waves=10, cycles=4.0)
    return image, place


def _signs(n, x, y, place, latent):
    """One sign per label, of unit severity: additive brightness, each at its own kind of place."""
    middle, width, height, lungs = (place[key] for key in ("middle", "width", "height", "lungs"))

    def side():
        return np.where(latent.random((n, 1, 1)) < 0.5, place["left"], place["right"])

    def around(spread):
        return spread * latent.standard_normal((n, 1, 1))

    def lung_at(across, down):  # a place in one lung, in units of its half axes
        return side() + (across + around(0.25)) * width, middle + (down + around(0.12)) * height

    sign = {}
    cx, cy = lung_at(0, 0.5)
    sign["atelectasis"] = 0.42 * _blob(x, y, cx, cy, 0.13, 0.025)
    big = _soft_disc(x, y, place["heart_x"] - 0.03, place["heart_y"] + 0.02, place["heart"] + 0.1, 0.19, 0.25)
    sign["cardiomegaly"] = 0.2 * big
    cx = side()
    level = middle + (0.45 + around(0.1)) * height
    sign["effusion"] = 0.34 * _step((y - level) / 0.05) * _blob(x, y, cx, 0.8, 0.13, 0.3)
    cx, cy = lung_at(0, -0.05)
    texture = _clutter(n, x, y, latent, waves=8, cycles=9.0)
    sign["infiltration"] = (0.18 + 0.12 * texture) * _blob(x, y, cx, cy, 0.1, 0.15)
    cx, cy = lung_at(0, -0.1)
    sign["mass"] = 0.4 * _soft_disc(x, y, cx, cy, 0.075, 0.075, 0.3)
    cx, cy = lung_at(0, 0.0)
    sign["nodule"] = 0.6 * _blob(x, y, cx, cy, 0.032, 0.032)
    cx, cy = lung_at(0.2, 0.45)
    sign["pneumonia"] = 0.3 * _blob(x, y, cx, cy, 0.09, 0.09)
    outward = np.where(latent.random((n, 1, 1)) < 0.5, -1.0, 1.0)
    apex = np.where(outward < 0, place["left"], place["right"])
    cx, cy = apex + 0.55 * outward * width, middle - 0.55 * height
    sign["pneumothorax"] = -0.36 * _soft_disc(x, y, cx, cy, 0.08, 0.13, 0.15)
    cx, cy = lung_at(0, -0.45)
    sign["consolidation"] = 0.4 * _step((0.085 - np.maximum(abs(x - cx), abs(y - cy))) / 0.012) * (0.3 + lungs)
    butterfly = sum(_blob(x, y, 0.5 + s * 0.13, middle + 0.05, 0.07, 0.13) for s in (-1, 1))
    sign["edema"] = 0.3 * butterfly
    sign["emphysema"] = -0.2 * lungs - 0.12 * _blob(x, y, 0.5, middle + 0.9 * height, 0.3, 0.07)
    net = np.cos(2 * np.pi * 11 * (x + y)) * np.cos(2 * np.pi * 11 * (x - y) + around(1.0))
    sign["fibrosis"] = 0.3 * net * lungs * _step((y - middle) / 0.06)
    outward = np.where(latent.random((n, 1, 1)) < 0.5, -1.0, 1.0)
    wall = np.where(outward < 0, place["left"], place["right"]) + 1.02 * outward * width
    sign["pleural"] = 0.42 * _blob(x, y, wall, middle + around(0.05), 0.028, 0.16)
    cx, cy = 0.47 + around(0.015), 0.88 + around(0.015)
    distance = np.hypot(x - cx, y - cy)
    sign["hernia"] = 0.5 * np.exp(-(((distance - 0.07) / 0.028) ** 2)) - 0.25 * _blob(x, y, cx, cy, 0.05, 0.05)
    return [sign[label] for label in LABELS]


# ---- skin


def _lesion(n, size, latent, noise):
    """Targets and `truth_probs` `(N, size, size, 1)`.

    The annotated boundary is the true one moved, in each direction, by a smooth Gaussian error of standard deviation
    `s`: `P(pixel marked) = Phi(distance inside the boundary / s)`, `s` larger where the border is blurred.
    """
    x, y = _grid(size)
    shape = _outline(n, latent, radius=(0.16, 0.36), irregularity=0.16, spread=0.06)
    inside, angle = _inside(x, y, shape)
    blur = latent.uniform(0.012, 0.045, (n, 1, 1))
    error = 0.9 * blur + 0.008
    mask = inside + error * _smooth_error(n, angle, latent)[..., 0] > 0
    truth_probs = ndtr(inside / error)

    skin = np.array([0.85, 0.66, 0.57]) + 0.03 * latent.standard_normal((n, 1, 1, 3))
    skin = skin * (1 - 0.25 * latent.random((n, 1, 1, 1)))  # lighter to darker skin
    pigment = np.array([0.45, 0.27, 0.20]) + 0.04 * latent.standard_normal((n, 1, 1, 3))
    contrast = latent.uniform(0.35, 1.0, (n, 1, 1))
    mottle = 0.18 * _clutter(n, x, y, latent, waves=10, cycles=7.0)
    cover = contrast * ndtr(inside / blur) * np.clip(0.9 + mottle, 0.3, 1.2)
    image = skin + cover[..., None] * (pigment - skin)
    image += 0.03 * _clutter(n, x, y, latent, waves=8, cycles=3.0)[..., None]
    corner = np.hypot(x - 0.5, y - 0.5)
    dark_edge = latent.random((n, 1, 1)) * _step((corner - 0.62) / 0.05)
    hairs = _hairs(n, x, y, latent)
    image = image * (1 - 0.5 * dark_edge - 0.55 * hairs)[..., None]
    image += 0.025 * noise.standard_normal(image.shape)
    return image, mask[..., None].astype("uint8"), truth_probs[..., None]


def _hairs(n, x, y, latent, most=4):
    hairs = np.zeros((n, *x.shape))
    number = latent.integers(0, most + 1, (n, 1, 1))
    for k in range(most):
        angle, offset, bend = (latent.uniform(low, high, (n, 1, 1)) for low, high in ((0, 3.14), (-0.4, 0.4), (-1, 1)))
        along = (x - 0.5) * np.cos(angle) + (y - 0.5) * np.sin(angle)
        across = (y - 0.5) * np.cos(angle) - (x - 0.5) * np.sin(angle)
        line = np.exp(-(((across - offset - bend * along**2) / 0.012) ** 2))
        hairs = np.maximum(hairs, line * (k < number))
    return hairs


# ---- lung nodules


def _nodule(n, size, latent, noise):
    """Targets `(N, size, size, 4)`, one mask per rater, and `truth_probs` `(N, size, size, 1)`.

    A rater takes the core or, with probability `q`, the halo as well; errs on the boundary by a bias and a smooth
    wobble, Gaussian with standard deviation `s` in all; and outlines nothing with probability `m`.
    `truth_probs = (1 - m) * (q * Phi(inside halo / s) + (1 - q) * Phi(inside core / s))`. `q` grows with the halo's
    contrast and `m` falls with the nodule's, so the image shows how unsure the raters are.
    """
    x, y = _grid(size)
    core = _outline(n, latent, radius=(0.09, 0.22), irregularity=0.12, spread=0.04)
    inside_core, angle = _inside(x, y, core)
    has_halo = latent.random((n, 1, 1)) < 0.4
    halo = np.where(has_halo, latent.uniform(0.05, 0.11, (n, 1, 1)), 0.0)
    inside_halo = inside_core + halo

    contrast = latent.uniform(0.25, 1.0, (n, 1, 1))
    halo_contrast = np.where(has_halo, latent.uniform(0.2, 0.7, (n, 1, 1)), 0.0)
    takes_halo = np.where(has_halo, 0.1 + halo_contrast, 0.0)  # q, 0.3 to 0.8
    misses = np.clip(0.75 * (0.75 - contrast) / 0.5, 0.02, 0.7)  # m, more than half for the faintest
    error = latent.uniform(0.014, 0.026, (n, 1, 1))

    with_halo = latent.random((n, 1, 1, NUM_RATERS)) < takes_halo[..., None]
    drawn = latent.random((n, 1, 1, NUM_RATERS)) >= misses[..., None]
    inside = np.where(with_halo, inside_halo[..., None], inside_core[..., None])
    masks = (inside + error[..., None] * _smooth_error(n, angle, latent, NUM_RATERS) > 0) & drawn
    marked = takes_halo * ndtr(inside_halo / error) + (1 - takes_halo) * ndtr(inside_core / error)
    truth_probs = (1 - misses) * marked

    image = 0.16 + 0.03 * _clutter(n, x, y, latent, waves=10, cycles=5.0)
    image += 0.45 * _vessels(n, x, y, latent)
    image += _pleura(n, x, y, latent)
    body = ndtr(inside_core / 0.015) + halo_contrast * (ndtr(inside_halo / 0.02) - ndtr(inside_core / 0.015))
    texture = 1 + 0.12 * _clutter(n, x, y, latent, waves=8, cycles=8.0)
    image = np.maximum(image, 0.16 + 0.6 * contrast * body * texture)
    image += 0.04 * noise.standard_normal(image.shape)
    return image[..., None], masks.astype("uint8"), truth_probs[..., None]


def _vessels(n, x, y, latent, most=4):
    vessels = np.zeros((n, *x.shape))
    for _ in range(most):
        cx, cy = latent.random((2, n, 1, 1))
        angle = latent.uniform(0, np.pi, (n, 1, 1))
        length, width = latent.uniform(0.02, 0.3, (n, 1, 1)), latent.uniform(0.015, 0.03, (n, 1, 1))
        along = (x - cx) * np.cos(angle) + (y - cy) * np.sin(angle)
        across = (y - cy) * np.cos(angle) - (x - cx) * np.sin(angle)
        line = np.exp(-((along / length) ** 2) - (across / width) ** 2)
        vessels = np.maximum(vessels, latent.uniform(0.2, 1.0, (n, 1, 1)) * line)
    return vessels


def _pleura(n, x, y, latent):
    """The chest wall, across one side of a third of the images."""
    angle = latent.uniform(0, 2 * np.pi, (n, 1, 1))
    away = latent.uniform(0.28, 0.45, (n, 1, 1))
    there = latent.random((n, 1, 1)) < 0.35
    depth = (x - 0.5) * np.cos(angle) + (y - 0.5) * np.sin(angle) - away
    return 0.5 * there * _step(depth / 0.02)


# ---- shapes; x, y are (size, size), parameters (N, 1, 1), results (N, size, size)


def _grid(size):
    centres = (np.arange(size) + 0.5) / size
    return np.meshgrid(centres, centres)  # x to the right, y down


def _step(z):
    return 1 / (1 + np.exp(-np.clip(z, -30, 30)))


def _blob(x, y, cx, cy, width, height):
    return np.exp(-(((x - cx) / width) ** 2) - ((y - cy) / height) ** 2)


def _soft_disc(x, y, cx, cy, width, height, softness):
    return _step((1 - np.hypot((x - cx) / width, (y - cy) / height)) / softness * 2)


def _clutter(n, x, y, latent, waves, cycles):
    """Smooth texture of unit variance: a sum of plane waves of up to `cycles` periods."""
    total = np.zeros((n, *x.shape))
    for _ in range(waves):
        fx, fy = latent.uniform(-cycles, cycles, (2, n, 1, 1))
        total += np.cos(2 * np.pi * (fx * x + fy * y) + latent.uniform(0, 2 * np.pi, (n, 1, 1)))
    return total * np.sqrt(2 / waves)


def _outline(n, latent, radius, irregularity, spread):
    """A star-shaped outline: centre, and radius by angle as a short Fourier series."""
    orders = np.arange(2, 7)
    size = (n, len(orders))
    return {
        "cx": 0.5 + spread * latent.standard_normal((n, 1, 1)).clip(-2, 2),
        "cy": 0.5 + spread * latent.standard_normal((n, 1, 1)).clip(-2, 2),
        "radius": latent.uniform(*radius, (n, 1, 1)),
        "orders": orders,
        "amplitude": irregularity * latent.standard_normal(size).clip(-2, 2) / orders**0.8 / 1.5,
        "phase": latent.uniform(0, 2 * np.pi, size),
    }


def _inside(x, y, shape):
    """How far inside the outline a pixel is along its ray (negative outside), and its angle."""
    dx, dy = x - shape["cx"], y - shape["cy"]
    angle = np.arctan2(dy, dx)
    wave = sum(
        shape["amplitude"][:, k, None, None] * np.cos(order * angle + shape["phase"][:, k, None, None])
        for k, order in enumerate(shape["orders"])
    )
    return shape["radius"] * (1 + wave) - np.hypot(dx, dy), angle


def _smooth_error(n, angle, latent, raters=1, bias_share=0.6, orders=(1, 2, 3, 4)):
    """Standard normal at every angle, smooth along it: an own bias and a wobble. `(N, H, W, raters)`.

    A random sinusoid `a cos(k t) + b sin(k t)` with standard normal `a`, `b` has variance 1 at every `t`,
    so the variances add up to 1 everywhere and the marginal is exactly normal.
    """
    error = np.sqrt(bias_share) * latent.standard_normal((n, 1, 1, raters))
    share = np.sqrt((1 - bias_share) / len(orders))
    for k in orders:
        a, b = latent.standard_normal((2, n, 1, 1, raters))
        turn = (k * angle)[..., None]
        error = error + share * (a * np.cos(turn) + b * np.sin(turn))
    return error


def _systematic(probs, latent):
    """0/1 draws with exactly these probabilities, column by column, whose counts are the sums to within 1.

    Systematic sampling (Madow 1949): one uniform number per column, steps of 1 along the shuffled sums.
    """
    n, columns = probs.shape
    order = latent.permuted(np.tile(np.arange(n)[:, None], (1, columns)), axis=0)
    start = latent.random(columns)
    sums = np.floor(np.cumsum(np.take_along_axis(probs, order, axis=0), axis=0) + start)
    draws = np.diff(sums, axis=0, prepend=0.0)  # floor(start) is 0
    out = np.empty((n, columns), "uint8")
    np.put_along_axis(out, order, draws.astype("uint8"), axis=0)
    return out


def _to_uint8(images):
    return np.round(255 * np.clip(images, 0, 1)).astype("uint8")


load_phantom_chest = functools.partial(_reader, _chest, 1)
load_phantom_lesion = functools.partial(_reader, _lesion, 2)
load_phantom_nodule = functools.partial(_reader, _nodule, 3)
