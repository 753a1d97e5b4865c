"""What is left of the gains of docs/results.md when each method has a temperature of its own.

Run: `python benchmarks/tempered.py profiles/confirm_isic64.yaml [--seeds 0] [--folds 2] [--runs runs]`: all questions
of the plan but those on epochs; finished runs are loaded. The logits of the mean prediction are divided by the
temperature that fits the *validation* images best; NLL of the test images. Each row is added to `results/tempered.csv`
when it is done; a row that is there is not made again. Printed are the differences from the one network of the same
seed and fold. Guo et al. 2017, "On calibration of modern neural networks", section 4.2.
"""

import argparse
import dataclasses
import functools
from pathlib import Path

import pandas as pd
from one_pass import add_row

from sbn_tf.datasets.base import SEGMENTATION
from sbn_tf.experiments import compare, study
from sbn_tf.experiments.predictor import recovered_logits, tempered
from sbn_tf.experiments.temperature import fit_temperature
from sbn_tf.metrics import nll

TABLE = Path(__file__).resolve().parents[1] / "results" / "tempered.csv"
DATA = ["dataset", "size", "network", "fold", "seed"]


def main():
    """Make the rows that are missing, and print the means."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("plan", help="a YAML file with questions")
    parser.add_argument("--seeds", type=compare.parse_seeds, help="default: those of the plan")
    parser.add_argument("--folds", type=compare.parse_seeds, help="default: those of the plan")
    parser.add_argument("--questions", default="one_training,mark,turned,turned_mark,afterwards")
    parser.add_argument("--runs", help="folder of finished runs; default: runs/ of the repository")
    parser.add_argument("--table", type=Path, default=TABLE)
    args = parser.parse_args()
    asked = study.read(args.plan)
    ((name, data),) = asked.datasets.items()
    names = [question for question in asked.questions if question in args.questions.split(",")]
    variants = [one for question in names for one in asked.questions[question].variants]
    if len({one.method for one in variants}) < len(variants) or not variants:
        raise ValueError(f"Expected questions with one variant of each method. Received: {args.questions}")
    for fold in args.folds or data.folds:
        base = compare.experiment(name, asked.recipe, runs=args.runs, verbose=False, **data.arguments(fold))
        for seed in args.seeds or data.seeds:
            for variant in variants:
                about = dict(zip(DATA, (name, base.data.input_shape[0], base.network, fold, seed), strict=True))
                changed = dataclasses.replace(base, seed=seed)
                add_row(args.table, about | {"method": variant.method}, functools.partial(numbers, variant, changed))
    print(means(pd.read_csv(args.table)).to_markdown(index=False, floatfmt=".4f"))


def numbers(variant, settings):
    """NLL of the test images as they are predicted and with the temperature, and that."""
    made = compare.fitted(study.settings_of(settings, variant), variant.method)
    (val, shares), (test, truth) = (of_split(made, part) for part in (settings.data.val, settings.data.test))
    temperature = fit_temperature(recovered_logits(val, SEGMENTATION), shares, SEGMENTATION)
    scaled = tempered(test, temperature, SEGMENTATION)
    return {"nll": nll(truth, test), "tempered": nll(truth, scaled), "temperature": temperature}


def of_split(made, part):
    """Mean prediction, and the share of raters who marked each pixel: (images, height, width)."""
    return made.predict_samples(part.normalised()).mean(0), part.mean_mask()[..., 0].astype("float32")


def means(rows):
    """A line for each method: NLL minus the one network's, as it is and with a temperature each; mean temperature."""
    rows = rows.set_index([*DATA, "method"])
    plain = rows.xs("deterministic", level="method")
    change = rows[["nll", "tempered"]] - plain[["nll", "tempered"]].reindex(rows.index.droplevel("method")).values
    found = change.assign(temperature=rows["temperature"], trainings=1)
    keys = ["dataset", "size", "network", "method"]
    how = {"nll": "mean", "tempered": "mean", "temperature": "mean", "trainings": "sum"}
    return found.groupby(level=keys, sort=False).agg(how).reset_index()


if __name__ == "__main__":
    main()
