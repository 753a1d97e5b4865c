"""How the cost grows: training steps, predictions and peak memory against what makes a job larger.

Run: `python benchmarks/growth.py [--out benchmarks/growth.csv] [--quick]`, about 25 minutes on 2 threads. Each point is
measured in processes of its own and written once it is there, so the same command goes on where it was stopped; then
it draws `growth.png` beside the table and prints the slopes.

One ResNet-18, of which one thing is varied at a time: the share of Bayesian weights, the posterior samples, the batch,
the side of the images, the width of the network. Each number is a ratio to the plain network of the same size: a step
to its step, a prediction to its prediction, peak memory of steps to that of its steps. A slope is the exponent p in
`ratio ~ value^p`, by least squares in logarithms: 0 is a cost that grows as the plain network's does, 1 is one that
grows in proportion to the value. Random masks reach every layer, so they cost most.
"""

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path

import floor
import numpy as np
import pandas as pd

from sbn_tf import saliency
from sbn_tf.core.files import write_atomically
from sbn_tf.experiments import networks
from sbn_tf.partial_bayes import to_partial_bayes

BASE = {"r_bayes": 0.05, "num_samples": 5, "batch": 10, "side": 64, "width": 32}
AXES = {
    "r_bayes": (0.01, 0.05, 0.2, 1.0),
    "num_samples": (2, 5, 10, 20),
    "batch": (5, 10, 20, 40),
    "side": (32, 64, 128),
    "width": (16, 32, 64),
}
NAMES = {
    "r_bayes": "share of Bayesian weights",
    "num_samples": "posterior samples",
    "batch": "images in a batch",
    "side": "side of an image (pixels)",
    "width": "channels of the first stage",
}
KINDS = {"all": 'step, "all"', "split": 'step, "split"', "prediction": "prediction", "peak_all": 'peak memory, "all"'}


def main():
    """Measure the points that are missing, draw them, print the slopes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="growth.csv beside this file; of --quick runs/growth_quick.csv")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=5, help="pairs timed in turn")
    parser.add_argument("--quick", action="store_true", help="one small point: does it run?")
    parser.add_argument("--point", type=json.loads, help=argparse.SUPPRESS)  # of a process of its own
    parser.add_argument("--what", choices=("time", "one", "all"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.point:
        floor.device(args.threads)
        found = times(args) if args.what == "time" else peak(args)
        print(json.dumps(found))
        return
    args.out = args.out or (Path("runs/growth_quick.csv") if args.quick else Path(__file__).with_name("growth.csv"))
    points = [{**BASE, "side": 32, "width": 8}] if args.quick else grid()
    rows = pd.read_csv(args.out).to_dict("records") if args.out.exists() else []
    if any(row["threads"] != args.threads for row in rows):
        parser.error(f"Expected --threads as in {args.out}. Received: {args.threads}")
    for number, point in enumerate(points, 1):
        if any(all(np.isclose(row[name], value) for name, value in point.items()) for row in rows):
            continue
        print(f"{number} of {len(points)}: {point}", flush=True)
        rows.append({**point, **measured(point, args)})
        args.out.parent.mkdir(parents=True, exist_ok=True)
        text = pd.DataFrame(rows).to_csv(index=False, float_format="%.4g")
        write_atomically(args.out, lambda file, text=text: file.write(text.encode()))
    table = pd.DataFrame(rows)
    if not args.quick:
        draw(table, args.out.with_suffix(".png"))
        print(slopes(table).to_markdown(floatfmt=".2f"))


def grid():
    """Every point once: the base, and it with one thing changed."""
    points = [BASE] + [{**BASE, name: value} for name, values in AXES.items() for value in values]
    return [point for i, point in enumerate(points) if point not in points[:i]]


def measured(point, args):
    """Ratios of one point, each kind of measurement in a process of its own."""

    def process(what):
        command = [sys.executable, __file__, "--point", json.dumps(point), "--what", what]
        command += ["--threads", str(args.threads), "--repeats", str(1 if args.quick else args.repeats)]
        out = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout
        return json.loads(out.splitlines()[-1])

    return {**process("time"), "peak_all": process("all") / process("one"), "threads": args.threads}


def models(point):
    """The plain network with its batch norm frozen, a batch, and what converts it for an estimator."""
    base = networks.resnet18((point["side"], point["side"], 1), 14, width=point["width"], seed=0)
    base = floor.frozen(base)
    masks = saliency.top_k(saliency.saliency(base, score="random"), point["r_bayes"])

    def converted(estimator):
        options = {"num_train": 1000, "num_samples": point["num_samples"], "estimator": estimator, "seed": 0}
        return floor.compiled(to_partial_bayes(base, masks, initial_scale=0.01, **options))

    return floor.compiled(base), converted, floor.batch_for(base, point["batch"])


def times(args):
    """Steps and predictions over the plain network's: medians of pairs timed in turn, with quartiles."""
    plain, converted, (x, y) = models(args.point)
    both = {estimator: converted(estimator) for estimator in ("all", "split")}
    pairs = {name: (floor.training_step(model, x, y), floor.training_step(plain, x, y)) for name, model in both.items()}
    pairs["prediction"] = tuple(
        lambda calls, model=model: [model.predict_on_batch(x) for _ in range(calls)] for model in (both["all"], plain)
    )
    found = {}
    for name, (above, below) in pairs.items():
        for call in (above, below):
            call(2)
        row = floor.ratio_of(lambda call=above: seconds_of(call), lambda call=below: seconds_of(call), args.repeats)
        found |= dict(zip((name, f"{name}_low", f"{name}_high"), (row["ratio"], *row["quartiles"]), strict=True))
    return found


def seconds_of(call, number=3):
    """Seconds of one of `number` calls."""
    start = time.perf_counter()
    call(number)
    return (time.perf_counter() - start) / number


def peak(args):
    """Bytes at the peak of two steps above what the process held before."""
    plain, converted, (x, y) = models(args.point)
    before = floor.peak_bytes()
    floor.training_step(plain if args.what == "one" else converted("all"), x, y)(2)
    return floor.peak_bytes() - before


def along(table, name):
    """Rows in which only `name` differs from the base, in its order."""
    same = [np.isclose(table[other], value) for other, value in BASE.items() if other != name]
    return table[np.logical_and.reduce(same)].sort_values(name)


def slopes(table):
    """Exponent of each ratio along each axis: kinds by axes."""

    def slope(name, kind):
        rows = along(table, name)
        return np.polyfit(np.log(rows[name]), np.log(rows[kind]), 1)[0]

    return pd.DataFrame({NAMES[name]: {label: slope(name, kind) for kind, label in KINDS.items()} for name in AXES})


def draw(table, path):
    """One panel an axis, one line a kind of cost."""
    import matplotlib.pyplot as plt

    figure, panels = plt.subplots(1, len(AXES), figsize=(13, 3), layout="constrained", sharey=True)
    colours = plt.get_cmap("viridis")(np.linspace(0, 0.85, len(KINDS)))
    for name, axes in zip(AXES, panels, strict=True):
        rows = along(table, name)
        for (kind, label), colour in zip(KINDS.items(), colours, strict=True):
            axes.plot(rows[name], rows[kind], "o-", color=colour, label=label, markersize=4)
        axes.set(xscale="log", yscale="log", xlabel=NAMES[name])
        axes.set_xticks(rows[name], [f"{value:g}" for value in rows[name]], minor=False)
        axes.minorticks_off()
        axes.grid(alpha=0.3)
    ticks = (1, 2, 5, 10, 20)
    panels[0].set_yticks(ticks, map(str, ticks))
    panels[0].set_ylabel("over the plain network")
    panels[1].legend(fontsize=7)
    figure.suptitle("Cost over the plain network's, with one setting varied at a time", size=10)
    figure.savefig(path, dpi=80)


if __name__ == "__main__":
    main()
