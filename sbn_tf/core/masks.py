"""Masks as arrays: what may be one, whether they fit a model, and their file."""

from __future__ import annotations

import os
import zipfile
from collections.abc import Mapping
from typing import TYPE_CHECKING

import keras
import numpy as np

from sbn_tf.core.files import check_archive, write_atomically
from sbn_tf.core.weights import named_weights

if TYPE_CHECKING:
    import pandas as pd

__all__ = ["checked_masks", "load_masks", "save_masks", "table_of"]


def checked_masks(masks: Mapping, model: keras.Model | None = None) -> dict[str, np.ndarray]:
    """Masks as a dict of boolean arrays; with `model` they must also fit its weights.

    Raises:
        ValueError: no mapping, an array that is not boolean, or masks of another model.
    """
    if not isinstance(masks, Mapping):
        raise ValueError(
            f"Expected masks: weight key -> boolean array, as top_k gives. Received: {masks!r}. A share of the "
            "weights is r_bayes."
        )
    found = {key: np.asarray(mask) for key, mask in masks.items()}
    for key, mask in found.items():
        if mask.dtype != bool:
            raise ValueError(
                f"Expected boolean masks (top_k makes them from scores). Received: {mask.dtype} for {key!r}"
            )
    if model is None:
        return found
    weights = named_weights(model)
    unknown = [k for k in found if k not in weights]
    other = [k for k in found if k not in unknown and found[k].shape != tuple(weights[k].variable.shape)]
    if unknown or other:
        raise ValueError(
            f"These masks are of another model: {(unknown + other)[:3]} "
            f"{'are not weights' if unknown else 'have another shape'} of '{model.name}'. Make them with this model."
        )
    return found


def save_masks(path: str | os.PathLike, masks: Mapping[str, np.ndarray]) -> None:
    """Write masks to an npz file, whole or not at all."""

    def write(file):
        with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
            for key, mask in masks.items():  # np.savez does the same, but fails with a weight called "file"
                with archive.open(f"{key}.npy", "w", force_zip64=True) as entry:
                    np.lib.format.write_array(entry, mask, allow_pickle=False)

    write_atomically(path, write)


def load_masks(path: str | os.PathLike) -> dict[str, np.ndarray]:
    """Read what `save_masks` wrote.

    Raises:
        ValueError: a file of something else.
    """
    try:
        check_archive(path)
        with np.load(path, allow_pickle=False) as file:
            return checked_masks({key: file[key] for key in file.files})
    except FileNotFoundError:
        raise
    except Exception as error:
        raise ValueError(f"Expected masks written by Masks.save in {path}. Received: {error}") from None


def table_of(masks: Mapping[str, np.ndarray]) -> pd.DataFrame:
    """A pandas DataFrame with a row for each weight, and one for all."""
    import pandas as pd

    n, chosen = sum(m.size for m in masks.values()), sum(int(m.sum()) for m in masks.values())
    rows = [(k, "x".join(map(str, m.shape)), m.size, int(m.sum())) for k, m in masks.items()] + [("all", "", n, chosen)]
    table = pd.DataFrame(rows, columns=["weight", "shape", "entries", "Bayesian"]).set_index("weight")
    table["% of weight"] = (100 * table["Bayesian"] / table["entries"].clip(lower=1)).round(1)
    table["% of all"] = (100 * table["Bayesian"] / max(chosen, 1)).round(1)
    return table
