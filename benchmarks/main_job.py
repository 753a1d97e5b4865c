"""The README's main job over seeds: `results/main_job_seeds.csv`, and the table of nbs/03_partial_bayes.ipynb.

Run: `python benchmarks/main_job.py [--seeds 0,1,2,3,4,5,6,7] [--runs runs]`, about 15 minutes on 2 cores. Trainings
that notebook 03 has finished there are read. Members have the settings of that notebook, all others the recipe's own.
"""

import argparse
import dataclasses

import pandas as pd

from sbn_tf.core.files import write_atomically
from sbn_tf.experiments import compare, folders, recipes

MEMBERS = "scale_start=relative, initial_scale=1.0, bayes_learning_rate=0.003"  # of notebook 03
METHODS = ("deterministic", "deterministic_longer", "partial", "members")


def main():
    """Train or read every seed, write the rows, print their means."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=compare.parse_seeds, help="default: 0 to 7")
    parser.add_argument("--runs")
    parser.add_argument("--out", help="default: results/main_job_seeds.csv of all seeds, else runs/main_job_seeds.csv")
    args = parser.parse_args()
    folder = folders.repository() / ("runs" if args.seeds else "results")
    args.seeds, args.out = args.seeds or range(8), args.out or folder / "main_job_seeds.csv"
    rows = []
    for seed in args.seeds:
        shared = compare.experiment("phantom_nodule", "quick", seed=seed, runs=args.runs, verbose=False)
        apart = dataclasses.replace(shared.recipe, **recipes.parse_changes(MEMBERS))
        cut = compare.trivial_rows(shared)["trivial_level_sets"]
        rows.append({"seed": seed, "method": cut.method, "ged": cut.metrics["ged"]})
        for method in METHODS:
            settings = dataclasses.replace(shared, recipe=apart) if method == "members" else shared
            rows.append({"seed": seed, "method": method, **numbers(compare.row(settings, method))})
        print(f"seed {seed} is done", flush=True)
    table = pd.DataFrame(rows)
    text = table.to_csv(index=False, float_format="%.4g").encode()
    write_atomically(args.out, lambda file: file.write(text))
    of_method = table.drop(columns="seed").groupby("method", sort=False)
    mean, spread = (part.map("{:.3f}".format) for part in (of_method.mean(), of_method.std()))
    print((mean + " +- " + spread).replace("nan +- nan", "").T.to_markdown())


def numbers(result):
    """NLL, GED, and how well each uncertainty separates degraded images from clean ones (AUROC)."""
    found = {"nll": result.metrics["nll"], "ged": result.metrics["ged"]}
    for kind in ("blur", "contrast", "noise"):
        shift = result.shift[kind]
        found[f"{kind}_entropy"] = shift["entropy"]
        found[f"{kind}_mutual_information"] = shift.get("mutual_information")
    return found


if __name__ == "__main__":
    main()
