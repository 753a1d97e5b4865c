"""How far an image lies from the training images in a network's features: another sign that it does not belong."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import keras
import numpy as np
import pandas as pd
from keras import ops
from sklearn.covariance import LedoitWolf
from sklearn.neighbors import NearestNeighbors

from sbn_tf.core.checks import check_choice, check_count
from sbn_tf.core.context import posterior_mean
from sbn_tf.core.sampled import SampledModel
from sbn_tf.core.statistics import plain, ranking
from sbn_tf.datasets.base import EXCLUSIVE, Split
from sbn_tf.experiments import scoring
from sbn_tf.experiments.records import shift_auroc
from sbn_tf.experiments.shifts import shifted

BATCH = 50


class Features:
    """What a network makes of an image before its last layer; of a U-Net at its smallest maps, their mean.

    A Bayesian network is taken at the mean of its posterior.

    Args:
        model: a Functional `keras.Model` of one input and one output, or a `PartialBayes` of one.
    """

    def __init__(self, model: keras.Model):
        network = model.network if isinstance(model, SampledModel) else model
        if len(network.output_shape) == 4:
            maps = [layer.output for layer in network.layers if len(layer.output.shape) == 4]
            found = min(reversed(maps), key=lambda map: map.shape[1] * map.shape[2])
        else:
            found = next(layer for layer in reversed(network.layers) if layer.weights).input
        self.model = keras.Model(network.inputs[0], found)

    def __call__(self, images: np.ndarray) -> np.ndarray:
        """Normalised images (batch, height, width, channels) -> float64 (batch, features)."""
        parts = []
        for start in range(0, len(images), BATCH):
            with posterior_mean():
                found = ops.convert_to_numpy(self.model(images[start : start + BATCH], training=False))
            parts.append(found.mean(tuple(range(1, found.ndim - 1))))
        return np.concatenate(parts).astype("float64")


class FeatureDistance:
    """The distance of features from those of training images.

    "mahalanobis": `sqrt((f - m)' P (f - m))` to the nearest mean m of a class, with P the inverse of the covariance
    that the classes share, shrunk as Ledoit and Wolf do; all images are one class where classes do not exclude one
    another. "neighbours": from the k-th nearest training image, of features scaled to length 1.

    Args:
        features: (images, features) of training images.
        classes: (images,) class of each; None: one class.
        kind: "mahalanobis" or "neighbours".
        k: which neighbour, 1 to the number of images.

    `means` (classes, features) and `precision` (features, features) are what `mahalanobis` takes.

    References: Lee et al. (2018), "A simple unified framework for detecting out-of-distribution samples", equation 2;
        Sun et al. (2022), "Out-of-distribution detection with deep nearest neighbors", section 3.
    """

    def __init__(self, features: np.ndarray, classes: np.ndarray | None = None, kind: str = "mahalanobis", k: int = 10):
        check_choice("kind", kind, ("mahalanobis", "neighbours"))
        self.kind = kind
        if kind == "neighbours":
            check_count("k", k, len(features))
            self._nearest = NearestNeighbors(n_neighbors=k).fit(_of_length_1(features))
            return
        names, index = np.unique(np.zeros(len(features)) if classes is None else classes, return_inverse=True)
        self.means = np.stack([features[index == place].mean(0) for place in range(len(names))])
        self.precision = LedoitWolf(assume_centered=True).fit(features - self.means[index]).precision_

    def __call__(self, features: np.ndarray) -> np.ndarray:
        """The distances (batch,) of features (batch, features)."""
        if self.kind == "neighbours":
            return self._nearest.kneighbors(_of_length_1(features))[0][:, -1]
        return mahalanobis(features, self.means, self.precision)


def mahalanobis(features: np.ndarray, means: np.ndarray, precision: np.ndarray) -> np.ndarray:
    """The distance (batch,) of features (batch, features) from the nearest of the means (classes, features)."""
    apart = features - means[:, None]
    return np.sqrt(np.einsum("cbi,ij,cbj->cb", apart, precision, apart, optimize=True).min(0))


def detection(
    predict_samples: Callable,
    model: keras.Model,
    train: Split,
    clean: Split,
    shifts: Mapping[str, Sequence[float]],
    other: Mapping[str, Split] | None = None,
) -> pd.DataFrame:
    """How well uncertainty and distance tell shifted images, or those of another dataset, from clean ones.

    Args:
        predict_samples: as for `scoring.score`.
        model: the network whose features are taken.
        train: the images that the distance is from.
        clean: the images that are not shifted.
        shifts: kind -> severities, of `shifts.shifted`.
        other: name -> images of other datasets, normalised as the clean ones.

    Returns:
        A row for each kind and severity: "kind", "severity" (NaN of other datasets), and AUROCs of "entropy",
        "mutual_information" (NaN of one sample), "mahalanobis" and "neighbours"; 0.5 is chance.
    """
    features = Features(model)
    classes = np.asarray(train.targets).argmax(-1) if train.task in EXCLUSIVE else None
    seen = features(train.normalised())
    distances = {kind: FeatureDistance(seen, classes, kind) for kind in ("mahalanobis", "neighbours")}

    def looked_at(split, shift=None):
        images = split.normalised()
        moved = shifted(images, *shift, mean=split.mean, sd=split.sd) if shift else images
        record = scoring.score(predict_samples, split, split.task, shift=shift, boundary=False, verbose=False)
        found = features(moved)
        return record, {kind: one(found) for kind, one in distances.items()}

    first, near = looked_at(clean)
    rows = []
    cases = [(kind, level, clean, (kind, level)) for kind, levels in shifts.items() for level in levels]
    for kind, severity, split, shift in cases + [(name, np.nan, one, None) for name, one in (other or {}).items()]:
        record, far = looked_at(split, shift)
        found = shift_auroc(first, record)
        row = {"kind": kind, "severity": severity}
        row |= {key: found.get(key, np.nan) for key in ("entropy", "mutual_information")}
        labels = np.repeat([False, True], [clean.num_examples, split.num_examples])
        for name in distances:
            row[name] = float(plain(ranking(np.concatenate([near[name], far[name]]), labels), len(labels))[0])
        rows.append(row)
    return pd.DataFrame(rows)


def _of_length_1(features):
    return features / np.maximum(np.linalg.norm(features, axis=1, keepdims=True), 1e-12)
