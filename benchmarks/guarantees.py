"""Do the guarantees of `sbn-tf predict --alpha --refer` hold on held-out patients, and what is left under shift?

Run: python benchmarks/guarantees.py phantom_lesion [--recipe quick] [--method members] [--alpha 0.1] [--refer 0.1]
(or lidc, isic2018 with SBN_TF_DATA set). It trains one network, or reads what is trained. Then

1. *Held out*: validation and test patients together are divided by chance into halves, many times: one calibrates, the
   other is counted. The guarantee is for the mean over divisions; 5 % and 95 % say what a single one may give.
2. *As used*: the validation split calibrates, the test split is counted: as it is, shifted, and of another dataset.
3. *Detection*: AUROC of uncertainty and of the distance in features for an image's being shifted, or of another dataset
   (`--other`, whatever its task and channels). `--table` adds the rows to a CSV.
"""

import argparse
import dataclasses
import os
from types import SimpleNamespace

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import numpy as np
import pandas as pd
from tqdm import tqdm

import sbn_tf
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


def counted(calibration, split, found, own, alpha, rate):
    """What became of the promises on some images; `own` has their patients, uncertainty and errors."""
    row = {}
    if split.task == SEGMENTATION:
        cut, probs = calibration.cut(alpha), np.stack([one for one, _ in found])
        truth = split.majority()[..., 0]
        row["true pixels missed"], row["missed at 1/2"] = (
            by_patient(missed, own["owner"]) for missed in false_negative_rates(probs, truth, [cut, 0.5]).T
        )
        row["area, x"] = (probs >= cut).sum() / max((probs >= 0.5).sum(), 1)
    else:
        probs, truth = (
            two_classes(part, split.task) for part in (np.stack([one for one, _ in found]), np.asarray(split.targets))
        )
        inside = 1 - probs <= calibration.limits(alpha, split.task)
        missed = np.where(truth > 0, ~inside, np.nan)
        row["labels missed"] = by_patient(missed.T.ravel(), np.tile(own["owner"], truth.shape[1]))
        row["labels in a set"] = inside.sum(1).mean()
    try:
        kept = own["total"] < calibration.refer_limit(rate)
    except ValueError as error:
        print(error)
        return row
    row["referred"] = 1 - by_patient(kept, own["owner"])
    row["wrong of the others"] = by_patient(own["error"][kept], own["owner"][kept]) if kept.any() else np.nan
    row["wrong of all"] = by_patient(own["error"], own["owner"])
    return row


def of_images(split, found, threshold):
    """Patient, uncertainty and error of each image."""
    whole = calibrated(split, found, threshold)
    return {"owner": np.array(whole.owners), "total": np.array(whole.total), "error": np.array(whole.error)}


def halves(split, found, count, threshold, **promise):
    """`counted` for chance halves of the patients."""
    own = of_images(split, found, threshold)
    num = own["owner"].max() + 1
    for seed in tqdm(range(count), desc="halves", leave=False):
        chosen = np.isin(own["owner"], np.random.default_rng(seed).permutation(num)[: num // 2])
        one, other = (np.flatnonzero(part) for part in (chosen, ~chosen))
        calibration = calibrated(split.subset(one), [found[i] for i in one], threshold)
        theirs = {key: values[other] for key, values in own.items()}
        yield counted(calibration, split.subset(other), [found[i] for i in other], theirs, **promise)


def together(splits):
    """Some splits as one."""

    def joined(key):
        values = [getattr(one, key) for one in splits]
        return None if values[0] is None else np.concatenate([np.asarray(one) for one in values])

    keys = ("images", "targets", "groups", "rater_valid")
    return dataclasses.replace(splits[0], ids=None, truth_probs=None, **{key: joined(key) for key in keys})


def other_images(name, data, limit):
    """The test images of another dataset with these channels and this normalisation, and whether its answers count."""
    found = datasets.load(name, size=data.input_shape[0], limit=limit)
    images, (*_, channels) = np.asarray(found.test.images), data.input_shape
    if images.shape[-1] != channels:
        grey = images.mean(-1, keepdims=True).round().astype(images.dtype) if images.shape[-1] == 3 else images
        images = np.repeat(grey, channels, -1)
    one = dataclasses.replace(found.test, images=images, mean=data.mean, sd=data.sd)
    same = found.card.task == data.card.task and found.card.classes == data.card.classes
    if not same:
        like = np.asarray(data.test.targets[:1])
        blank = np.zeros_like(like).repeat(len(images), 0)
        blank = blank[..., :1] if data.card.task == SEGMENTATION else blank
        fields = {"targets": blank, "rater_valid": None, "truth_probs": None, "task": data.card.task}
        one = dataclasses.replace(one, **fields)
    return one, same


def loaded_network(path):
    """A deterministic network of a file, as a method."""
    model = sbn_tf.load(path, compile=False)
    return SimpleNamespace(
        model=model,
        title="deterministic",
        num_samples=1,
        predict_samples=lambda images: model.predict_on_batch(images)[None],
    )


def main():
    """Print the three tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("dataset")
    parser.add_argument("--recipe", default="quick")
    parser.add_argument("--method", default="members")
    parser.add_argument("--network")
    parser.add_argument("--r-bayes", type=float, default=0.2)
    parser.add_argument("--size", type=int)
    parser.add_argument("--fold", type=int, help="of lidc")
    parser.add_argument("--changes", default="", help="of the recipe, as epochs=40, keep=last")
    parser.add_argument("--model", help="a deterministic network of these data that is trained: a .keras file")
    parser.add_argument("--limit", type=int)
    parser.add_argument("--alpha", type=float, default=0.1)
    parser.add_argument("--refer", type=float, default=0.1)
    parser.add_argument("--other", nargs="*", default=[], help="other datasets")
    parser.add_argument("--table", help="a CSV to which the rows of detection are added")
    parser.add_argument("--halves", type=int, default=100)
    parser.add_argument("--severities", type=int, nargs="+", default=[1, 3, 5])
    parser.add_argument("--runs")
    given = parser.parse_args()
    keys = ("network", "size", "limit", "runs", "r_bayes", "changes")
    options = {} if given.fold is None else {"fold": given.fold}
    chosen = {key: getattr(given, key) for key in keys}
    settings = experiment(given.dataset, given.recipe, **chosen, options=options, shifts={})
    data = settings.data
    made = loaded_network(given.model) if given.model else compare.fitted(settings, given.method)
    print(data, f"{given.method}, recipe {given.recipe}, alpha {given.alpha:g}, refer {given.refer:g}", sep="\n")
    predictor = predictor_of(settings, made, "stretch")
    promise, threshold = {"alpha": given.alpha, "rate": given.refer}, predictor.card.threshold
    found = [looked_at(predictor, one) for one in (data.val, data.test)]
    table = pd.DataFrame(
        halves(together([data.val, data.test]), found[0] + found[1], given.halves, threshold, **promise)
    )
    low, high = table.quantile(0.05), table.quantile(0.95)
    summary = pd.DataFrame({"mean": table.mean(), "5 %": low, "95 %": high})
    print(
        f"\n## Held out: {given.halves} divisions of validation and test\n\n{report.to_markdown(summary)}", flush=True
    )

    calibration = predictor.card.calibration

    def used(split, found):
        return counted(calibration, split, found, of_images(split, found, threshold), **promise)

    rows = {"as it is": used(data.test, found[1])}
    for kind, severity in SHIFTS:
        rows[f"{kind} {severity:g}"] = used(data.test, looked_at(predictor, data.test, (kind, severity)))
    other = {}
    for name in given.other:
        other[name], same = other_images(name, data, given.limit)
        if same:
            rows[name] = used(other[name], looked_at(predictor, other[name]))
    print(f"\n## As used: {calibration.num} {calibration.unit} of validation, the test split\n")
    print(report.to_markdown(pd.DataFrame.from_dict(rows, orient="index")), flush=True)

    kinds = [kind for kind in CORRUPTIONS if kind != "desaturate" or data.input_shape[2] == 3]
    shifts = {kind: [level] for kind, level in SHIFTS[:3]} | {kind: given.severities for kind in kinds}
    table = distance.detection(made.predict_samples, made.model, data.train, data.test, shifts, other)
    if given.table:
        run = {"network": f"{given.dataset}, {given.method}", "seed": 0, "clean": data.test.num_examples}
        rows = table.assign(images=[other.get(kind, data.test).num_examples for kind in table["kind"]], **run)
        rows.to_csv(given.table, mode="a", header=not os.path.exists(given.table), index=False, float_format="%.4f")
    table = table.drop(columns="severity").groupby("kind", sort=False).mean()
    levels = ", ".join(map(str, given.severities))
    print(f"\n## Detection: AUROC, mean over severities {levels}\n\n{report.to_markdown(table)}")


if __name__ == "__main__":
    main()
