"""What several tests measure by hand, and what they train."""

import contextlib
from pathlib import Path

import keras
import numpy as np
import pytest

from sbn_tf.datasets.base import MULTI_LABEL, SEGMENTATION
from sbn_tf.experiments import networks, scoring
from sbn_tf.experiments.result import Result

QUANTILES = ("quantiles", "aleatoric_quantiles", "epistemic_quantiles")
NETWORK_CARD = {  # of a `NetworkCard`
    "dataset": "made up",
    "method": "none",
    "task": "segmentation",
    "classes": ["spot"],
    "size": 8,
    "channels": 1,
    "fit": "pad",
    "mean": [0.4],
    "sd": [0.2],
    "threshold": 0.5,
    "num_samples": 1,
    "temperature": 1.0,
    **dict.fromkeys(QUANTILES, [0.0] * 101),
}


def pairwise_iou(masks):
    """Mean IoU of all pairs of raters where both drew, of `(N, H, W, R)` masks."""
    ious = []
    for i in range(masks.shape[-1]):
        for j in range(i):
            a, b = masks[..., i] > 0, masks[..., j] > 0
            both = a.any(axis=(1, 2)) & b.any(axis=(1, 2))
            ious.append(((a & b).sum(axis=(1, 2)) / np.maximum((a | b).sum(axis=(1, 2)), 1))[both])
    return np.concatenate(ious).mean()


METRICS_OF_MASKS = {"nll": 0.1, "brier": 0.03, "ece": 0.02, "entropy": 0.2, "dice": 0.8, "iou": 0.7}


def mask_result(method="partial", seed=0, metrics=None, **changes):
    """A result of masks, with `metrics` and fields changed."""
    fields = {
        "dataset": "phantom_nodule",
        "task": SEGMENTATION,
        "method": method,
        "title": "one line",
        "recipe": "quick",
        "network": "unet_small",
        "size": 32,
        "normalisation": "train",
        "num_train": 10,
        "num_val": 4,
        "num_test": 5,
        "seed": seed,
        "undefined": {"ged": "no image has two or more valid raters"},
        "evaluation": {"num_resamples": 1000},
    }
    return Result(**{**fields, "metrics": METRICS_OF_MASKS | (metrics or {}), **changes})


def of_task(task, metrics, undefined, method="partial"):
    """A result of given numbers."""
    return Result(**{**vars(mask_result(method)), "task": task, "metrics": metrics, "undefined": undefined})


def whole_result():
    """A result with something in every field."""
    return mask_result(
        r_bayes=0.01,
        settings={"epochs": 3, "betas": [0.2, 0.01], "augment": None},
        options={"fold": 2},
        limit=100,
        leak="slices of one patient in two splits",
        num_groups=3,
        num_samples=5,
        threshold=0.4,
        selection={"temperature": 1.31},
        intervals={"dice": [0.75, 0.85]},
        shift={"noise": {"severity": 2.0, "entropy": 0.7, "mutual_information": None}},
        cost={"num_trainable": 1000, "train_flops_ratio": 2.5, "train_seconds": None},
    )


def record_of(probs, targets):
    """The record of labels' predictions."""
    evaluator = scoring.Evaluator(MULTI_LABEL)
    evaluator.update(probs, targets)
    return evaluator.record()


def tiny_network(input_shape, num_outputs, activation="sigmoid", seed=None, masks=False):
    """Two layers of weights, and two more of masks, with a batch norm: traced in a second."""
    inputs = x = keras.Input(input_shape)
    for name in ("first", "second")[: 1 + masks]:
        init = keras.initializers.HeNormal(seed=seed)
        x = keras.layers.Conv2D(6, 3, padding="same", kernel_initializer=init, use_bias=False, name=name)(x)
        x = keras.layers.ReLU()(keras.layers.BatchNormalization(name=f"{name}_bn")(x))
    init = keras.initializers.GlorotUniform(seed=seed)
    if masks:
        x = keras.layers.Conv2D(num_outputs, 1, activation=activation, kernel_initializer=init, name="head")(x)
    else:
        x = keras.layers.GlobalAveragePooling2D()(x)
        x = keras.layers.Dense(num_outputs, activation=activation, kernel_initializer=init, name="head")(x)
    return keras.Model(inputs, x)


@contextlib.contextmanager
def tiny_networks():
    """The networks "tiny" and "tiny_masks", known by these names."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(networks.NETWORKS, "tiny", (tiny_network, {}))
        patch.setitem(networks.NETWORKS, "tiny_masks", (tiny_network, {"masks": True}))
        yield


def table_of_page(heading):
    """The lines of the table under a heading of docs/results.md, without its head: lists of cells."""
    page = (Path(__file__).parents[1] / "docs" / "results.md").read_text("utf-8")
    section = page.split(f"### {heading}\n")[1].split("\n### ")[0]
    lines = [line.strip("|").split("|") for line in section.splitlines() if line[:1] == "|"][2:]
    return [[cell.strip() for cell in line] for line in lines]
