"""A trained network with all that it needs to read an image file: a folder with `model.keras` and `network.json`."""

from __future__ import annotations

import copy
import os
import zlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import keras
import numpy as np
from numpy.typing import ArrayLike
from PIL import Image
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from scipy import special

from sbn_tf.core.checks import check_number
from sbn_tf.core.files import check_archive, replacing, write_atomically
from sbn_tf.core.loading import load
from sbn_tf.core.sampled import SameDraws, SampledModel
from sbn_tf.core.turns import turned
from sbn_tf.datasets.base import BINARY, EXCLUSIVE, SEGMENTATION
from sbn_tf.datasets.decoding import MODES, read_image, read_scaled, square
from sbn_tf.datasets.image_files import image_files
from sbn_tf.datasets.split import normalise
from sbn_tf.experiments.distance import Features, mahalanobis
from sbn_tf.experiments.folders import read_arrays, read_json, write_json
from sbn_tf.experiments.guarantees import Calibration
from sbn_tf.experiments.served import export_served
from sbn_tf.metrics import uncertainty

__all__ = ["Predictor", "recovered_logits", "tempered"]

MODEL, CARD, TRAINING = "model.keras", "network.json", "training_features.npz"
BATCH = 16  # images in memory at a time
MARGIN = 8  # an eighth of a tile is not used where another tile sees it from further inside


class NetworkCard(BaseModel):
    """What stands in `network.json`: how an image becomes the network's input, and its outputs a decision.

    Args:
        dataset, method: what it was trained on, and how, in words.
        task: a task of `datasets.base.TASKS`.
        classes: names of the outputs.
        size, channels, fit: side of the network's square images, 1 (grey) or 3 (RGB), and a fit of `decoding.FITS`.
        window: what became 0 and 1 of DICOM and NIfTI, (low, high); None: as `datasets.medical` says.
        mean, sd: of each channel on the 0..1 scale.
        threshold: where probabilities are cut into labels and masks.
        num_samples: draws of a prediction.
        turned: draw s sees the image under symmetry s modulo 8, as `turned_samples` says.
        temperature: the logits of every draw are divided by it, > 0; 1 where that does not lower the validation NLL.
        quantiles: the 0 %, 1 %, ... 100 % quantiles of the total uncertainty of a validation image, in nats.
        aleatoric_quantiles, epistemic_quantiles: those of its two parts.
        distance_quantiles: those of `Prediction.distance`; (): unknown.
        calibration: what the validation images say about errors; None: unknown.
        crc32: of the weights, set by `Predictor.save`: card and network belong together.
    """

    model_config = ConfigDict(frozen=True, extra="ignore")  # write_json adds the versions

    dataset: str
    method: str
    task: Literal["multi-label", "binary", "multi-class", "ordinal", "segmentation"]
    classes: tuple[str, ...] = Field(min_length=1)
    size: int = Field(gt=0)
    channels: Literal[1, 3]
    fit: Literal["crop", "pad", "stretch"]
    window: tuple[float, float] | None = None
    mean: tuple[float, ...]
    sd: tuple[float, ...]
    threshold: float = Field(gt=0, lt=1)
    num_samples: int = Field(gt=0)
    turned: bool = False
    temperature: float = Field(gt=0)
    quantiles: tuple[float, ...] = Field(min_length=101, max_length=101)
    aleatoric_quantiles: tuple[float, ...] = Field(min_length=101, max_length=101)
    epistemic_quantiles: tuple[float, ...] = Field(min_length=101, max_length=101)
    distance_quantiles: tuple[float, ...] = ()
    calibration: Calibration | None = None
    crc32: int = 0


@dataclass(frozen=True, eq=False)
class Prediction:
    """What the network says of one image.

    Args:
        card: of the network.
        whole: (width, height) of the image; None: maps stay at the network's size.
        values: "probabilities", "entropy", "expected_entropy" and "mutual_information" as the network gives them.
        samples: probabilities of each draw as the network gives them, (samples, ...).
        distance: Mahalanobis, from the training images in the network's features; None: unknown.
    """

    card: NetworkCard
    whole: tuple[int, int] | None
    values: dict[str, np.ndarray]
    samples: np.ndarray
    distance: float | None = None

    @property
    def probabilities(self) -> np.ndarray:
        """(classes,); of masks (height, width), at the image's own size: 0 where a crop does not look."""
        return self.at_own_size(self.values["probabilities"])

    @property
    def means(self) -> dict[str, float]:
        """How unsure the network is of all that it sees: mean entropies over pixels or labels, in nats."""
        names = {"total": "entropy", "aleatoric": "expected_entropy", "epistemic": "mutual_information"}
        return {name: float(np.mean(self.values[key])) for name, key in names.items()}

    @property
    def confidence(self) -> float:
        """Probability of the likeliest class; of labels and masks that of what is decided, in the mean."""
        probs = self.values["probabilities"]
        return float(probs.max() if self.card.task in EXCLUSIVE else np.maximum(probs, 1 - probs).mean())

    def entropy(self, kind: str = "entropy") -> np.ndarray:
        """Nats, at the image's own size: "entropy" (total), "expected_entropy" or "mutual_information"."""
        return self.at_own_size(self.values[kind])

    def sample(self, number: int) -> np.ndarray:
        """`probabilities` of one draw."""
        return self.at_own_size(self.samples[number])

    def labels(self) -> list[str]:
        """Names of what the image shows: the likeliest class, or those above the threshold."""
        card, probs = self.card, self.values["probabilities"]
        if card.task in EXCLUSIVE:
            return [card.classes[int(np.argmax(probs))]]
        found = probs.max() if card.task == SEGMENTATION else probs
        return [name for name, p in zip(card.classes, np.atleast_1d(found), strict=True) if p > card.threshold]

    def decision(self) -> str:
        """`labels` as one text; "not ..." or "none" where there are none."""
        return ";".join(self.labels()) or (f"not {self.card.classes[0]}" if self.card.task == BINARY else "none")

    def at_own_size(self, values: np.ndarray) -> np.ndarray:
        """A map of the network's square at the image's own size, as `decoding.square` undone."""
        if self.card.task != SEGMENTATION or self.whole is None:
            return values
        whole, size = self.whole, self.card.size
        image = Image.fromarray(np.asarray(values, "float32"))
        if self.card.fit == "crop":
            scale = size / min(whole)
            left, top = ((side - min(whole)) / 2 for side in whole)
            matrix = (scale, 0, -left * scale, 0, scale, -top * scale)  # from places in the image to those in the map
            return np.asarray(image.transform(whole, Image.Transform.AFFINE, matrix, Image.Resampling.BILINEAR))
        box = None
        if self.card.fit == "pad":
            inner = [max(1, round(side * size / max(whole))) for side in whole]
            left, top = ((size - side) // 2 for side in inner)
            box = (left, top, left + inner[0], top + inner[1])
        return np.asarray(image.resize(whole, Image.Resampling.BILINEAR, box=box))


class Predictor:
    """A network that reads image files.

    Args:
        model: a `PartialBayes`, or a network without draws.
        card: how it reads an image.
        training: "means" and "precision" of the training images' features, see `distance.mahalanobis`; None: unknown.

    Raises:
        ValueError: the card is of a network with another input.
    """

    def __init__(self, model: keras.Model, card: NetworkCard, training: Mapping[str, np.ndarray] | None = None):
        expected = (card.size, card.size, card.channels)
        network = model.network if isinstance(model, SampledModel) else model
        if tuple(network.input_shape[1:]) != expected:
            raise ValueError(
                f"Expected a network of {expected} images, as its card says. Received: {network.input_shape}"
            )
        self.model, self.card, self.training = model, card, training
        self._features = None if training is None else Features(model)
        self._sampled = SameDraws(model) if isinstance(model, SampledModel) else None

    def with_card(self, **changes) -> Predictor:
        """The same network with the same draws, and fields of its card changed."""
        found = copy.copy(self)
        found.card = self.card.model_copy(update=changes)
        return found

    @classmethod
    def load(cls, folder: str | os.PathLike) -> Predictor:
        """The network of a folder that `save` wrote.

        Raises:
            ValueError: a file of it is missing or damaged.
        """
        folder = Path(folder)
        try:
            card = NetworkCard.model_validate(read_json(folder / CARD))
            check_archive(folder / MODEL)
            training = read_arrays(folder / TRAINING) if card.distance_quantiles else None
        except (OSError, ValueError) as error:
            reason = str(error).splitlines()[0]
            if isinstance(error, ValidationError):
                reason = f"{'.'.join(map(str, error.errors()[0]['loc']))}: {error.errors()[0]['msg']}"
            raise ValueError(
                f"Expected a folder of `sbn-tf train` with {CARD} and {MODEL}. Received: {folder} ({reason}).\n"
                "Run `sbn-tf train` again."
            ) from None
        found = cls(load(folder / MODEL, compile=False), card, training)
        if card.crc32 != found.crc32():
            raise ValueError(
                f"Expected {CARD} and {MODEL} of one training. Received: two, in {folder}.\nRun `sbn-tf train` again."
            )
        return found

    def save(self, folder: str | os.PathLike) -> None:
        """Write the network and its card, each whole or not at all."""
        self._start()
        with replacing(Path(folder, MODEL)) as temporary:
            self.model.save(temporary)
        if self.training is not None:
            arrays = self.training
            write_atomically(Path(folder, TRAINING), lambda file: np.savez(file, **arrays))  # type: ignore[arg-type]
        write_json(Path(folder, CARD), {**self.card.model_dump(), "crc32": self.crc32()})

    def export(self, path: str | os.PathLike, format: str = "tf_saved_model") -> None:
        """Write the network for another runtime, with its draws and its reading of pixels in it.

        It takes pixels (batch, size, size, channels), float32 of 0 to 255, and gives "mean" (probabilities), "entropy",
        "expected_entropy" and "mutual_information" as `predict_batch` does, from the same draws in every call. Images
        have to be made squares of the card's size before, by its `fit`.

        Args:
            path: folder of the SavedModel, or the .onnx or .tflite file.
            format: "tf_saved_model", "litert", or "onnx" with the extra `sbn_tf[onnx]`.

        Raises:
            ValueError: another format, an operation that ONNX has not, or tf2onnx is not installed.
        """
        export_served(self.model, self.card, path, format, self._start)

    def _start(self):
        """Set the noise to where every prediction begins."""
        if self._sampled is not None:
            self._sampled.start()

    def predict(self, images) -> list[Prediction]:
        """Predictions of images, in their order.

        Each image meets the same draws of the weights, however the images are grouped.

        Args:
            images: a folder, a file, a list of files, or a uint8 array (batch, height, width[, channels]).

        Raises:
            ValueError: a file that cannot be read, or an array of another form.
        """
        items = list(_items(images))
        parts = (items[start : start + BATCH] for start in range(0, len(items), BATCH))
        return [one for part in parts for one in self._predict_read([self.read(image) for image in part])]

    def predict_files(self, paths: Iterable[Path], tile_scale: float | None = None) -> list[Prediction | str]:
        """The prediction of each file of one batch, by tiles where they have a scale; or why it cannot be read."""
        found: list = []
        for path in paths:
            try:
                found.append(self.read(path) if tile_scale is None else self.predict_tiled(path, tile_scale))
            except (ValueError, OSError) as error:
                found.append(str(error).replace("\n", " "))
        read = [one for one in found if isinstance(one, tuple)]
        predicted = iter(self._predict_read(read) if read else ())
        return [next(predicted) if isinstance(one, tuple) else one for one in found]

    def crc32(self) -> int:
        """A number that tells networks apart: of all weights, and of the training images' features."""
        arrays = [*self.model.get_weights(), *(self.training or {}).values()]
        arrays = [one.astype("int64") if one.dtype.kind == "i" else one for one in arrays]  # JAX has 32 bits
        return zlib.crc32(b"".join(np.ascontiguousarray(one).tobytes() for one in arrays))

    def digest(self) -> int:
        """A number that tells networks apart, and what their cards say."""
        return zlib.crc32(self.card.model_dump_json().encode(), self.crc32())

    def read(self, image: str | os.PathLike | np.ndarray) -> tuple[np.ndarray, tuple[int, int]]:
        """An image as the network's normalised input (size, size, channels), and its own (width, height)."""
        if isinstance(image, np.ndarray):
            pixels, whole = _pixels(image, self.card), (image.shape[1], image.shape[0])
        else:
            pixels, whole = read_image(image, self.card.size, self.card.fit, self.card.channels, self.card.window)
        return self.normalised(pixels), whole

    def normalised(self, pixels: np.ndarray) -> np.ndarray:
        """Pixels (..., channels), uint8 or floats of 0..1, as the network's input."""
        return normalise(pixels, np.asarray(self.card.mean, "float32"), np.asarray(self.card.sd, "float32"))

    def samples(self, inputs: np.ndarray) -> np.ndarray:
        """Probabilities of each draw for one batch of normalised inputs: (samples, batch, classes), or maps.

        The card's temperature divides the logits of every draw. So the mean probability, both parts of the entropy and
        the sampled masks all follow from the same tempered draws, and total = aleatoric + epistemic still.
        """
        card = self.card
        samples = turned(self._draw, inputs, card.num_samples) if card.turned else self._drawn(inputs)
        if card.task == SEGMENTATION:
            samples = samples[..., 0]
        return samples if card.temperature == 1 else tempered(samples, card.temperature, card.task)

    def _drawn(self, inputs):
        if self._sampled is None:
            return self._draw(inputs, 0)[None]
        return self._sampled.samples(inputs, self.card.num_samples)

    def _draw(self, inputs, number):
        if self._sampled is None:
            return np.asarray(self.model.predict_on_batch(inputs))
        return self._sampled.one(inputs, number)

    def predict_batch(self, inputs: np.ndarray, wholes: Sequence[tuple[int, int]] | None = None) -> list[Prediction]:
        """Predictions of normalised inputs (batch, size, size, channels); maps at the sizes `wholes`, if given."""
        far = None
        if self.training is not None and self._features is not None:
            far = mahalanobis(self._features(inputs), **self.training).tolist()
        return _predictions(self.card, self.samples(inputs), wholes or [None] * len(inputs), far)

    def check_tiles(self, scale: float) -> None:
        """Raise ValueError where the network cannot be used on tiles at this scale."""
        check_number("tile_scale", scale, above=0.0)
        if self.card.task != SEGMENTATION or self.card.size < MARGIN:
            raise ValueError(
                f"Expected the network of a segmentation, of {MARGIN} pixels or more, for tiles: labels are of whole "
                f"images. Received: {self.card.task}, {self.card.size} px"
            )

    def predict_tiled(self, path: str | os.PathLike, scale: float) -> Prediction:
        """The prediction of an image file by tiles of the network's size, which overlap by half.

        The image is resized to `scale` times its own pixels, as large as things were in training. Every tile meets the
        same draws of the weights. Where tiles overlap a draw's probabilities are averaged, more so the further a pixel
        lies inside; an eighth of a tile at its edge does not count, so a network that sees no further than that gives
        what one pass over the whole image would. Entropies are of these draws. In memory is one image with its draws.

        Args:
            path: an image file.
            scale: pixels of the network for one of the image; > 0.

        Raises:
            ValueError: a network of labels, a scale that is none, or a file that cannot be read.
        """
        self.check_tiles(scale)
        card, size = self.card, self.card.size
        pixels, whole = read_scaled(path, scale, card.channels, card.window)
        height, width = pixels.shape[:2]
        padded = np.zeros((max(height, size), max(width, size), card.channels), pixels.dtype)
        padded[:height, :width] = pixels
        inputs = self.normalised(padded)
        places = [(up, left) for up in _starts(len(padded), size) for left in _starts(padded.shape[1], size)]
        total = np.zeros((card.num_samples, *padded.shape[:2]), "float32")
        weight = np.zeros(padded.shape[:2], "float32")
        for part in (places[start : start + BATCH] for start in range(0, len(places), BATCH)):
            samples = self.samples(np.stack([inputs[up : up + size, left : left + size] for up, left in part]))
            for number, (up, left) in enumerate(part):
                within = np.outer(_weights(up, size, len(padded)), _weights(left, size, padded.shape[1]))
                total[:, up : up + size, left : left + size] += within * samples[:, number]
                weight[up : up + size, left : left + size] += within
        samples = (total / weight)[:, None, :height, :width]
        return _predictions(card.model_copy(update={"fit": "stretch"}), samples, [whole])[0]

    def _predict_read(self, images):
        inputs, wholes = zip(*images, strict=True)
        return self.predict_batch(np.stack(inputs), wholes)


def _predictions(card, samples, wholes, far=None):
    """What samples (samples, batch, ...) say of each image."""
    maps = uncertainty(samples, card.task)
    maps["probabilities"] = maps.pop("mean_probs")
    return [
        Prediction(card, whole, {key: values[i] for key, values in maps.items()}, samples[:, i], far and far[i])
        for i, whole in enumerate(wholes)
    ]


def recovered_logits(probs: ArrayLike, task: str) -> np.ndarray:
    """Logits of float32 probabilities, up to a constant an image for classes, clipped where float32 ends.

    `log p - log(1 - p)` of labels and pixels, `log p` of classes; a probability of 0 counts as the smallest normal
    float32 number, one of 1 as the largest below 1.
    """
    limits = np.finfo("float32")
    probs = np.clip(np.asarray(probs, "float64"), limits.tiny, 1.0 if task in EXCLUSIVE else 1.0 - limits.epsneg)
    return np.log(probs) if task in EXCLUSIVE else special.logit(probs)


def tempered(probs: ArrayLike, temperature: float, task: str) -> np.ndarray:
    """Probabilities with their logits divided by `temperature`: float32 of the same shape."""
    logits = recovered_logits(probs, task) / temperature
    return (special.softmax(logits, axis=-1) if task in EXCLUSIVE else special.expit(logits)).astype("float32")


def _starts(length, size):
    """Where tiles begin: half a tile apart, the last one at the end."""
    return [*range(0, length - size, size // 2), length - size]


def _weights(start, size, length):
    """How much each row of a tile counts: up to 1 in its middle, 0 at an edge that is not the image's."""
    place, margin = np.arange(size) + 0.5, size // MARGIN
    before = np.inf if start == 0 else place - margin
    after = np.inf if start + size == length else size - place - margin
    return np.clip(np.minimum(before, after) / size, 0, 1) * np.ones(size)


def _items(images) -> Iterable:
    if isinstance(images, np.ndarray) and (images.ndim not in (3, 4) or (images.ndim == 3 and images.shape[-1] == 3)):
        raise ValueError(
            "Expected images (batch, height, width), or (batch, height, width, 1 or 3). "
            f"Received: shape {images.shape}. Of one image pass image[None]."
        )
    if isinstance(images, str | os.PathLike):
        return image_files(images).values() if Path(images).is_dir() else [images]
    return images


def _pixels(image, card):
    fits = image.ndim == 2 or (image.ndim == 3 and image.shape[-1] in MODES)
    if image.dtype != np.uint8 or not fits or 0 in image.shape:
        raise ValueError(
            "Expected uint8 images (height, width), or (height, width, 1 or 3), of 0 to 255. "
            f"Received: {image.dtype} of shape {image.shape}"
        )
    image = Image.fromarray(image[..., 0] if image.shape[2:] == (1,) else image)
    return square(image.convert(MODES[card.channels]), card.size, card.fit, Image.Resampling.BILINEAR, card.channels)
