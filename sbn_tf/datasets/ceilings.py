"""What can be reached on a dataset: on phantoms by their known probabilities, by one rater against the others."""

import numpy as np

from .base import SEGMENTATION, Split

__all__ = ["LEVELS", "ceilings"]

LEVELS = (0.1, 0.3, 0.5, 0.7, 0.9)


def ceilings(split: Split) -> dict[str, dict]:
    """Rows of metrics, as of `sbn_tf.experiments.scoring.evaluate`, to read a network's row against.

    "scene": the generating probabilities `truth_probs` as the prediction (phantoms). They are the truth given the
    scene, of which the image shows less: in the mean over images no network has a better NLL or Brier score. These two
    are bounds. The others are not: Dice and IoU are those of a cut at one half, and another cut may have more.
    "level sets": masks where the generating probability exceeds `LEVELS`, as if these were five samples; only their
    GED: what one probability map is worth as a distribution of masks, with no knowledge of how pixels go together.
    "one rater": the mean over raters of one's mask as the prediction, against the majority of the others; only "dice"
    and "iou".
    "half the raters": the first half of them as samples against the other half; only "ged". Few samples bias it
    upwards: compare it with as many samples against as many raters.

    Args:
        split: a `Split`; rows on raters are over the images that all of them marked or left empty on purpose
            (`rater_valid`), and only where there are two raters or more (GED: four).

    Returns:
        Row name -> metrics, and {} where nothing is known: no `truth_probs`, one rater.
    """
    from sbn_tf import metrics  # a dataset needs no metric but here
    from sbn_tf.experiments import scoring  # a dataset needs no metric but here

    rows = {}
    if split.truth_probs is not None:
        targets = np.asarray(split.targets)
        probs = split.truth_probs[None]
        rows["scene"] = scoring.evaluate(probs, targets, split.task, rater_valid=split.rater_valid)
        if split.task == SEGMENTATION and split.num_raters > 1:
            sets = np.stack([split.truth_probs > level for level in LEVELS]).astype("float32")
            ged = metrics.generalised_energy_distance(sets, targets, split.rater_valid)
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
        ged = metrics.generalised_energy_distance(samples, masks[..., half:])
        rows["half the raters"] = {"ged": float(ged.mean())}
    return rows
