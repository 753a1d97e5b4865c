"""Every metric: its range, which way is better, and its meaning in one sentence."""

from __future__ import annotations

import math
from typing import NamedTuple

__all__ = ["METRICS", "Metric"]


class Metric(NamedTuple):
    """What a metric's number is. `higher_is_better` is None where neither way is better."""

    higher_is_better: bool | None
    low: float
    high: float
    meaning: str


METRICS = {
    # All tasks.
    "nll": Metric(False, 0, math.inf, "negative log likelihood of the truth, nats per label, pixel or image"),
    "brier": Metric(False, 0, 2, "squared error of the probabilities, mean; of classes summed, 0 to 2"),
    "brier_skill": Metric(True, -math.inf, 1, "1 - Brier / Brier of the training prevalence: 0 is no skill"),
    "ece": Metric(False, 0, 1, "expected calibration error, 15 bins of equal width, pooled"),
    "ece_mass": Metric(False, 0, 1, "expected calibration error, 15 bins of equal count, pooled"),
    "ece_region": Metric(
        False, 0, 1, "expected calibration error of the pixels that any rater or the prediction marks"
    ),
    "entropy": Metric(None, 0, math.inf, "entropy of the mean prediction, nats: how unsure it is in all"),
    "expected_entropy": Metric(None, 0, math.inf, "mean entropy of the samples, nats: what each is unsure of"),
    "mutual_information": Metric(None, 0, math.inf, "entropy minus expected_entropy, nats: how far samples disagree"),
    "risk": Metric(False, 0, 1, "mean error of an image: share of wrong labels, wrong class, or 1 - Dice"),
    "aurc": Metric(False, 0, 1, "area under the risk-coverage curve: mean error if unsure images are refused"),
    "excess_aurc": Metric(False, 0, 1, "that area minus the oracle's, which refuses the worst images first"),
    "error_auroc": Metric(True, 0, 1, "AUROC of an image's entropy for its prediction being wrong"),
    "error_auroc_mi": Metric(True, 0, 1, "AUROC of an image's mutual information for its being wrong"),
    "num_images": Metric(None, 1, math.inf, "test images scored"),
    # Labels and classes.
    "auc": Metric(True, 0, 1, "area under the ROC curve, mean over the labels that have both 0 and 1"),
    "auc_num_labels": Metric(None, 0, math.inf, "how many labels these are"),
    "average_precision": Metric(True, 0, 1, "average precision, mean over the same labels"),
    "accuracy": Metric(True, 0, 1, "share of right decisions; with rare labels, 1 - prevalence is free"),
    "ece_label": Metric(False, 0, 1, "expected calibration error of each label or class, mean, equal width"),
    "ece_label_mass": Metric(False, 0, 1, "the same in bins of equal count"),
    "label_error_auroc": Metric(True, 0, 1, "AUROC of a label's entropy for that label being wrong"),
    "mean_absolute_error": Metric(False, 0, math.inf, "distance of the predicted from the true grade, in grades"),
    "quadratic_kappa": Metric(True, -1, 1, "agreement of the grades beyond chance, quadratic weights"),
    # Masks.
    "dice": Metric(True, 0, 1, "Dice of the foreground with the majority mask, mean over images"),
    "iou": Metric(True, 0, 1, "intersection over union with the majority mask, mean over images"),
    "hausdorff95": Metric(False, 0, math.inf, "95th percentile of the distance between the outlines, pixels"),
    "ged": Metric(False, 0, 2, "generalised energy distance of the sampled masks to the raters' masks"),
    "hungarian_iou": Metric(True, 0, 1, "IoU of sampled masks and raters' masks, best matched one to one"),
    "dice_raters": Metric(True, 0, 1, "Dice with each rater's mask, mean over raters and images"),
    "entropy_disagreement_pearson": Metric(True, -1, 1, "correlation over pixels of entropy and raters' variance"),
    "pixel_error_auroc": Metric(True, 0, 1, "AUROC of a pixel's entropy for that pixel being wrong"),
    "pixel_error_auroc_mi": Metric(True, 0, 1, "AUROC of a pixel's mutual information for its being wrong"),
    # The paper's, with the directions that it reads them in.
    "paper_accuracy": Metric(True, 0, 1, "mostly the share of absent labels: never any finding scores high"),
    "paper_brier": Metric(False, 0, 1, "Brier score of one random sample, not of the mean prediction"),
    "paper_brier_softmax_twice": Metric(False, 0, 1, "the same after a second softmax: 0.0723 is the least"),
    "paper_entropy": Metric(None, 0, math.inf, "of labels -p ln p without the 1 - p term; of masks the entropy"),
    "paper_dice": Metric(True, 0, 1, "mostly how near to exactly 0 background is: an empty mask scores its share"),
    "paper_iou": Metric(True, 0, 1, "IoU of a typical sample, not of the mean prediction"),
    "paper_ece": Metric(False, 0, 1, "calibration error of the decisions: mostly whether a sure no is right"),
}
