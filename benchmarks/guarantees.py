"""Do the guarantees of `sbn-tf predict --alpha --refer` hold on held-out patients, and what is left under shift?

Run: python benchmarks/guarantees.py phantom_lesion [--recipe quick] [--method members] [--alpha 0.1] [--refer 0.1]
(or lidc, isic2018 with SBN_TF_DATA set). It trains one network, or reads what is trained. Then

1. *Held out*: validation and test patients together are divided by chance into halves, many times: one calibrates, the
   other is counted. The mean over divisions is what is guaranteed; its spread is what one division may give.
2. *As used*: the validation split calibrates, the test split is counted: as it is, shifted, and of another dataset.
3. *Detection*: AUROC of uncertainty and of the distance in features for an image's being shifted.
"""

import argparse
import dataclasses
import os

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import numpy as np
import pandas as pd
from tqdm import tqdm

from sbn_tf import datasets
from sbn_tf.core.overlap import false_negative_rates
from sbn_tf.datasets.base import SEGMENTATION
from sbn_tf.experiments import compare, distance, report
from sbn_tf.experiments.experiment import experiment
from sbn_tf.experiments.guarantees import calibrated, two_classes
from sbn_tf.experiments.shifts import CORRUPTIONS, shifted
from sbn_tf.experiments.train import predictor_of

BATCH = 50
SHIFTS = (("blur", 1.5), ("noise", 2.0), ("contrast", 0.5), ("gamma_up", 3), ("impulse_noise", 3), ("black_corner", 3))


def looked_at(predictor, split, shift=None):
    """(mean probabilities, total uncertainty) of each image of a split."""
    found = []
    for start in range(0, split.num_examples, BATCH):
        images = split.normalised(slice(start, start + BATCH))
        if shift:
            images = shifted(images, *shift, offset=start, mean=split.mean, sd=split.sd)
        found += [(one.probabilities, one.means["total"]) for one in predictor.predict_batch(images)]
    return found


def by_patient(values, owners):
    """Mean over patients of the means over their images; NaN where an image has none."""
    return pd.Series(values).groupby(np.asarray(owners)).mean().mean()


def counted(calibration, split, found, alpha, rate, threshold):
    """What became of the promises on some images."""
    own = calibrated(split, found, threshold)  # the same statistics of these images
    row = {}
    if split.task == SEGMENTATION:
        cut, probs = calibration.cut(alpha), np.stack([one for one, _ in found])
        truth = split.majority()[..., 0]
        row["true pixels missed"] = by_patient(false_negative_rates(probs, truth, [cut])[:, 0], own.owners)
        row["missed at 1/2"] = by_patient(false_negative_rates(probs, truth, [threshold])[:, 0], own.owners)
        row["area, x"] = (probs >= cut).sum() / max((probs > threshold).sum(), 1)
    else:
        probs, truth = (
            two_classes(part, split.task) for part in (np.stack([one for one, _ in found]), np.asarray(split.targets))
        )
        inside = 1 - probs <= calibration.limits(alpha, split.task)
        row["labels missed"] = by_patient(
            np.where(truth > 0, ~inside, np.nan).T.ravel(), np.tile(own.owners, truth.shape[1])
        )
        row["labels in a set"] = inside.sum(1).mean()
    try:
        kept = np.asarray(own.total) < calibration.refer_limit(rate)
    except ValueError as error:
        print(error)
        return row
    row["referred"] = 1 - by_patient(kept, own.owners)
    row["wrong of the others"] = (
        by_patient(np.asarray(own.error)[kept], np.asarray(own.owners)[kept]) if kept.any() else np.nan
    )
    row["wrong of all"] = by_patient(own.error, own.owners)
    return row


def halves(split, found, count, **promise):
    """`counted` for chance halves of the patients."""
    owners = np.arange(split.num_examples) if split.groups is None else np.unique(split.groups, return_inverse=True)[1]
    for seed in tqdm(range(count), desc="halves", leave=False):
        first = np.random.default_rng(seed).permutation(owners.max() + 1)[: (owners.max() + 1) // 2]
        inside = np.isin(owners, first)
        one, other = (
            (split.subset(np.flatnonzero(part)), [found[i] for i in np.flatnonzero(part)]) for part in (inside, ~inside)
        )
        yield counted(calibrated(*one, promise["threshold"]), *other, **promise)


def together(splits):
    """Some splits as one."""

    def joined(key):
        values = [getattr(one, key) for one in splits]
        return None if values[0] is None else np.concatenate([np.asarray(one) for one in values])

    keys = ("images", "targets", "groups", "rater_valid")
    return dataclasses.replace(splits[0], ids=None, truth_probs=None, **{key: joined(key) for key in keys})


def main():
    """Print the three tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("dataset")
    parser.add_argument("--recipe", default="quick")
    parser.add_argument("--method", default="members")
    parser.add_argument("--network")
    parser.add_argument("--r-bayes", type=float, default=0.2)
    parser.add_argument("--size", type=int)
    parser.add_argument("--limit", type=int)
    parser.add_argument("--alpha", type=float, default=0.1)
    parser.add_argument("--refer", type=float, default=0.1)
    parser.add_argument("--other", help="another dataset of the same task and channels")
    parser.add_argument("--halves", type=int, default=100)
    parser.add_argument("--severities", type=int, nargs="+", default=[1, 3, 5])
    parser.add_argument("--runs")
    given = parser.parse_args()
    keys = ("network", "size", "limit", "runs", "r_bayes")
    settings = experiment(given.dataset, given.recipe, **{key: getattr(given, key) for key in keys}, shifts={})
    data, made = settings.data, compare.fitted(settings, given.method)
    print(data, f"{given.method}, recipe {given.recipe}, alpha {given.alpha:g}, refer {given.refer:g}", sep="\n")
    predictor = predictor_of(settings, made, "stretch")
    promise = {"alpha": given.alpha, "rate": given.refer, "threshold": predictor.card.threshold}
    found = [looked_at(predictor, one) for one in (data.val, data.test)]
    table = pd.DataFrame(halves(together([data.val, data.test]), found[0] + found[1], given.halves, **promise))
    low, high = table.quantile(0.05), table.quantile(0.95)
    summary = pd.DataFrame(
        {"mean": table.mean(), "standard error": table.std() / np.sqrt(len(table)), "5 %": low, "95 %": high}
    )
    print(f"\n## Held out: {given.halves} divisions of validation and test\n\n{report.to_markdown(summary)}")

    calibration = predictor.card.calibration
    rows = {"as it is": counted(calibration, data.test, found[1], **promise)}
    for kind, severity in SHIFTS:
        moved = looked_at(predictor, data.test, (kind, severity))
        rows[f"{kind} {severity:g}"] = counted(calibration, data.test, moved, **promise)
    other = {}
    if given.other:
        loaded = datasets.load(given.other, size=data.input_shape[0], limit=given.limit).test
        other = {given.other: dataclasses.replace(loaded, mean=data.mean, sd=data.sd)}
        rows[given.other] = counted(
            calibration, other[given.other], looked_at(predictor, other[given.other]), **promise
        )
    print(f"\n## As used: {calibration.num} {calibration.unit} of validation, the test split\n")
    print(report.to_markdown(pd.DataFrame.from_dict(rows, orient="index")))

    kinds = [kind for kind in CORRUPTIONS if kind != "desaturate" or data.input_shape[2] == 3]
    shifts = {kind: [level] for kind, level in SHIFTS[:3]} | {kind: given.severities for kind in kinds}
    table = distance.detection(made.predict_samples, made.model, data.train, data.test, shifts, other)
    table = table.drop(columns="severity").groupby("kind", sort=False).mean()
    levels = ", ".join(map(str, given.severities))
    print(f"\n## Detection: AUROC, mean over severities {levels}\n\n{report.to_markdown(table)}")


if __name__ == "__main__":
    main()
