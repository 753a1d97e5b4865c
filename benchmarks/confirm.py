"""What one training buys, on test patients: the tables of docs/results.md, from the rows that `sbn-tf study` wrote.

Run: `python benchmarks/confirm.py [--table results/confirm.csv]`. For each dataset it prints the means of each method
over its trainings; its difference in NLL from the one network of the same trainings, with the 95 % interval of that
mean over test patients (images, where no patient is known) of all folds, resampled 2,000 times, seed 0; the interval by
Student's t over trainings, of three or more; in how many trainings the NLL is lower; and the shares of the five
networks' gain in NLL and in Brier score, over the trainings that both have.

The NLL of each test image is in the file beside the table (`confirm_images.npz`). `--runs runs` makes it from the
records of finished runs; run it so once for rows of your own.
"""

import argparse
import re
from pathlib import Path

import numpy as np
import pandas as pd
from scipy import stats

from sbn_tf.core.files import write_atomically
from sbn_tf.experiments import results
from sbn_tf.experiments.records import Record
from sbn_tf.experiments.result import read as read_result

NAMES = {
    "deterministic": "one network",
    "budget_2": "two networks of half the epochs",
    "branched": "five members on 20 %, parted early",
    "turned": "one network, eight flips and turns",
    "branched_turned": "the five members, a flip or turn each",
    "deterministic_longer": "one network, 15 epochs more",
    "partial": "then Gaussians on the salient 1 %",
    "members": "then members on the salient 20 %",
    "members_turned": "these members, a flip or turn each",
    "ensemble": "five networks",
    "ensemble_turned": "five networks, a flip or turn each",
}
CUTS = "trivial_level_sets"


def main():
    """Print the tables of each dataset."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--table", type=Path, default=Path(__file__).resolve().parents[1] / "results" / "confirm.csv")
    parser.add_argument(
        "--runs", type=Path, help="folder of the finished runs: write the NLL of each image beside the table"
    )
    args = parser.parse_args()
    everything = results.wide(results.read_csv(args.table))
    everything = everything[everything["split"] == "test"]
    found = everything[everything["method"].isin(NAMES)]
    images = args.table.with_name(f"{args.table.stem}_images.npz")
    if args.runs is not None:
        keep_images(images, found, args.runs)
    records = images_of(images)
    for dataset, rows in found.groupby("dataset"):
        print(f"\n## {dataset}\n\n{table_of(rows, records.get(dataset, {})).to_markdown(disable_numparse=True)}")
        if cuts := everything[(everything["dataset"] == dataset) & (everything["method"] == CUTS)]["ged"].tolist():
            print(f"\nGED of five level sets of the one network's map: {np.mean(cuts):.3f}")


def units(rows, method):
    """Rows of a method by (fold, seed)."""
    mine = rows[rows["method"] == method]
    mine = mine.set_index([mine["fold"].fillna(-1).astype(int), mine["seed"].astype(int)])
    if mine.index.has_duplicates:
        fold, seed = mine.index[mine.index.duplicated()][0]
        raise ValueError(
            f"Expected one row of {method!r} for each fold and seed. Received: two of {(int(fold), int(seed))}"
            ", of other settings or images.\nKeep rows of your own in a table of their own: --table runs/confirm.csv"
        )
    return mine


def table_of(rows, records):
    """A line for each method, as texts."""
    plain, mark, found = units(rows, "deterministic"), units(rows, "ensemble"), {}
    of_masks = "ged" if rows["ged"].notna().any() else "iou"
    digits = ".5f" if plain["nll"].mean() < 0.05 else ".4f"  # images that are mostly background have small ones
    for method in [name for name in NAMES if name in set(rows["method"])]:
        mine = units(rows, method)
        both = mine.index.intersection(plain.index)
        change = (mine["nll"] - plain["nll"]).loc[both].astype(float)
        means = mine[["nll", "brier", "ece", of_masks, "train_flops_ratio", "predict_flops_ratio"]].mean()
        line = dict.fromkeys(("minus one network's", "over trainings", "lower in", "share of the gain", "in Brier"), "")
        if method != "deterministic":
            missing = [
                (name, *one) for one in both for name in (method, "deterministic") if (name, *one) not in records
            ]
            if missing:
                raise ValueError(
                    f"Expected the NLL of each image of {missing[0]}. Received: none.\nMake it: --runs runs"
                )
            pairs = {one: [records[name, *one] for name in (method, "deterministic")] for one in both}
            line["minus one network's"] = f"{short(change.mean(), '+' + digits)} {span(*interval(pairs), digits)}"
            if len(both) > 2:
                half = stats.t.ppf(0.975, len(both) - 1) * change.sem()
                line["over trainings"] = span(change.mean() - half, change.mean() + half, digits)
            line["lower in"] = f"{(change < 0).sum()} of {len(both)}"
            if len(shared := both.intersection(mark.index)):
                for key, title in (("nll", "share of the gain"), ("brier", "in Brier")):
                    gains = [(plain[key] - one[key]).loc[shared].mean() for one in (mine, mark)]
                    line[title] = f"{gains[0] / gains[1]:.0%}"
        found[NAMES[method]] = {
            "NLL": short(means["nll"], digits),
            **line,
            "Brier": short(means["brier"], digits),
            "ECE": short(means["ece"]),
            of_masks.replace("ged", "GED").replace("iou", "IoU"): short(means[of_masks], ".3f"),
            "training": f"{means['train_flops_ratio']:.2f}",
            "stored": f"{(mine['weight_bytes'] / plain['weight_bytes']).mean():.1f}",
            "passes": f"{means['predict_flops_ratio']:.0f}",
            "trainings": str(len(mine)),
        }
    return pd.DataFrame(found).T


def short(value, form=".4f"):
    """A number without the 0 before its point, and without the sign of -0."""
    digits = int(form[-2])
    return re.sub(r"^([+-]?)0\.", r"\1.", format(round(value, digits) + 0.0, form))


def span(low, high, digits):
    """An interval of differences."""
    return f"[{short(low, '+' + digits)}, {short(high, '+' + digits)}]"


def keep_images(path, found, runs):
    """Write the NLL of each test image of the table's rows, and the patients of each fold, from finished runs."""
    kept = {}
    for dataset, rows in found.groupby("dataset"):
        runs_of = records_of(runs / dataset)
        for method in rows["method"].unique():
            for one, nll in units(rows, method)["nll"].items():
                record = record_of(runs_of.get((method, *one), []), nll)
                kept["/".join(map(str, (dataset, method, *one)))] = record["nll"].astype("float32")
                if record.groups is not None:
                    kept[f"{dataset}/groups/{one[0]}"] = np.unique(record.groups, return_inverse=True)[1].astype(
                        "int32"
                    )
    write_atomically(path, lambda file: np.savez_compressed(file, **kept))


def images_of(path):
    """Dataset -> (method, fold, seed) -> record of the NLL of each image."""
    if not path.is_file():
        raise ValueError(f"Expected {path}, the NLL of each image. Received: no such file.\nMake it once: --runs runs")
    found = {}
    with np.load(path, allow_pickle=False) as file:
        kept = dict(file)
    for key, nll in kept.items():
        dataset, method, fold, *seed = key.split("/")
        if seed:
            arrays = {"nll": nll.astype("float64"), "risk": np.zeros(len(nll))}
            groups = kept.get(f"{dataset}/groups/{fold}")
            record = Record(task="binary", arrays=arrays, threshold=0.5, num_samples=1, groups=groups)
            found.setdefault(dataset, {})[method, int(fold), int(seed[0])] = record
    return found


def records_of(folder):
    """(method, fold, seed) -> results of the test images and their records, of whatever settings, below a folder."""
    found = {}
    for path in sorted(folder.glob("*/seed*/*/metrics.json")):
        result = read_result(path.parent)
        key = (result.method, result.options.get("fold", -1), result.seed)
        found.setdefault(key, []).append((result.metrics.get("nll"), path.with_name("record.npz")))
    if not found:
        raise ValueError(f"Expected finished runs in {folder}. Received: none. Leave --runs out")
    return found


def record_of(some, nll):
    """The record whose NLL is a row's: others are of other settings."""
    near = [path for value, path in some if value is not None and abs(value - nll) < 1e-6]
    if not near:
        raise ValueError(
            f"Expected a finished run with NLL {nll:.6f} in --runs. Received: {[value for value, _ in some]}"
        )
    return Record.load(near[0])


def interval(pairs, resamples=2000):
    """95 % of the mean difference in NLL over trainings, the patients of each fold resampled.

    Args:
        pairs: (fold, seed) -> record of a method, record of the one network. Trainings of a fold share its resamples.
    """
    changes = []
    for (fold, _), records in pairs.items():
        mine, plain = (one.distribution(["nll"], resamples, seed=fold + 1)["nll"] for one in records)
        changes.append(mine - plain)
    return np.percentile(np.mean(changes, axis=0), [2.5, 97.5])


if __name__ == "__main__":
    main()
