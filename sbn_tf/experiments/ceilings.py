"""The best scores to expect on a dataset: of a phantom's known probabilities, of one rater against the others."""

import numpy as np

from sbn_tf import metrics
from sbn_tf.datasets.base import SEGMENTATION, Split

from .scoring import evaluate

__all__ = ["ceilings"]

LEVELS = (0.1, 0.3, 0.5, 0.7, 0.9)


def ceilings(split: Split) -> dict[str, dict]:
    """Rows of metrics, as of `scoring.evaluate`, to compare a network's row with.

    "scene": the generating probabilities `truth_probs` as the prediction (phantoms). They are the truth given the
    scene, and the image shows less than the scene: in the mean over images no network has a better NLL or Brier score.
    These two are bounds; Dice and IoU are those of a cut at one half, and another cut may have more.
    "level sets": masks where the generating probability exceeds `LEVELS`, used as five samples; only their GED. It is
    what one probability map is worth as a distribution of masks, without knowing how pixels go together.
    "one rater": each rater's mask as the prediction, against the majority of the others, in the mean; only "dice" and
    "iou".
    "half the raters": the first half of them as samples against the other half; only "ged". Few samples bias it
    upwards: compare it with as many samples against as many raters.

    Args:
        split: a `Split`. Rows on raters are over the images whose masks all exist (`rater_valid`), and need two raters
            or more (GED: four).

    Returns:
        Row name -> metrics; {} where nothing is known: no `truth_probs`, one rater.
    """
    rows = {}
    if split.truth_probs is not None:
        targets = np.asarray(split.targets)
        probs = split.truth_probs[None]
        rows["scene"] = evaluate(probs, targets, split.task, rater_valid=split.rater_valid)
        if split.task == SEGMENTATION and split.num_raters > 1:
            sets = np.stack([split.truth_probs > level for level in LEVELS]).astype("float32")
            ged = metrics.generalised_energy_distance(targets, sets, split.rater_valid)
            rows["level sets"] = {"ged": float(ged.mean())}
    if split.task != SEGMENTATION or split.num_raters < 2:
        return rows
    complete = np.flatnonzero(np.asarray(split.rater_valid).all(axis=1))
    if not len(complete):
        return rows
    masks = np.asarray(split.targets)[complete]
    overlaps = []
    for rater in range(split.num_raters):
        others = metrics.majority_mask(np.delete(masks, rater, axis=-1))
        overlaps.append([measure(masks[..., rater], others).mean() for measure in (metrics.dice, metrics.iou)])
    rows["one rater"] = dict(zip(("dice", "iou"), np.mean(overlaps, axis=0).tolist(), strict=True))
    half = split.num_raters // 2
    if half > 1:
        samples = np.moveaxis(masks[..., :half], -1, 0).astype("float32")
        ged = metrics.generalised_energy_distance(masks[..., half:], samples)
        rows["half the raters"] = {"ged": float(ged.mean())}
    return rows
