"""Every architecture of keras.applications, converted in one call: does it hold what a conversion promises?

Run: `python benchmarks/applications.py [--out runs/applications.jsonl] [--only MobileNet VGG16]`. Each architecture
(three classes, untrained, the smallest images that it takes) is checked in a process of its own, since memory adds up:
a random 1 % of its weights becomes Bayesian; their count is exact; with scales of 0 its outputs are those of the
original; one training step is finite and moves locs and scales; saved and loaded it has the same outputs, masks and
scales. A line of JSON for each goes to `--out` as soon as it is known; those that are "ok" there are not run again.
"""

import argparse
import json
import os
import pathlib
import subprocess
import sys
import tempfile
import time

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import keras
import numpy as np
from tqdm import tqdm

from sbn_tf.layers import masked_layers, posterior_mean
from sbn_tf.partial_bayes import to_partial_bayes
from sbn_tf.saliency import saliency, top_k

CLASSES, R_BAYES, BATCH = 3, 0.01, 2
SMALLEST = {"InceptionResNetV2": 75, "InceptionV3": 75, "Xception": 71}  # px; 32 elsewhere


def names() -> list[str]:
    """Architectures that keras.applications offers."""
    return [name for name in dir(keras.applications) if name[0].isupper()]


def check(name: str) -> dict:
    """Convert one architecture and check it; a row of the table, with `ok` or the reason why not."""
    start = time.perf_counter()
    row = {"architecture": name, "size": SMALLEST.get(name, 32), "ok": False}
    keras.utils.set_random_seed(0)
    shape = (row["size"], row["size"], 3)
    model = getattr(keras.applications, name)(weights=None, input_shape=shape, classes=CLASSES)
    random = np.random.default_rng(0)
    x = random.normal(size=(BATCH, *shape)).astype("float32")
    y = np.eye(CLASSES, dtype="float32")[random.integers(CLASSES, size=BATCH)]
    expected = np.asarray(model(x))
    masks = top_k(saliency(model, score="random"), R_BAYES)
    bnn = to_partial_bayes(model, masks, num_train=100, num_samples=1, seed=0)
    row |= {"parameters": model.count_params(), "bayesian": bnn.num_bayesian, "masked": masks.num_bayesian}
    del model

    scales = [v for v in bnn.trainable_variables if v.name.endswith("untransformed_scale")]
    before = [np.asarray(v) for v in scales]
    for scale in scales:
        scale.assign(np.full(scale.shape, -200.0))  # a softplus of 0
    found = np.asarray(bnn.network(x))
    row["difference"] = float(np.abs(found - expected).max() / np.abs(expected).max())
    for scale, value in zip(scales, before, strict=True):
        scale.assign(value)

    locs = [v for v in bnn.trainable_variables if not v.name.endswith("untransformed_scale")]
    before = [[np.asarray(v) for v in part] for part in (locs, scales)]
    # Clipped: an untrained network whose batch norm is frozen normalises nothing, and a deep one's gradients are huge.
    optimizer = keras.optimizers.SGD(1e-4, clipvalue=1.0)
    bnn.compile(optimizer, "categorical_crossentropy", jit_compile=False)
    row["loss"] = float(bnn.train_on_batch(x, y, return_dict=True)["loss"])
    after = [[np.asarray(v) for v in part] for part in (locs, scales)]
    row["finite"] = bool(np.isfinite(row["loss"]) and all(np.isfinite(v).all() for part in after for v in part))
    row["moved"] = [
        any((a != b).any() for a, b in zip(olds, news, strict=True)) for olds, news in zip(before, after, strict=True)
    ]
    del before, after

    with tempfile.TemporaryDirectory() as folder:
        path = pathlib.Path(folder) / "bnn.keras"
        bnn.save(path)
        loaded = keras.models.load_model(path)
    posteriors = [
        [(x.name, n, x.mask(n)) for x in masked_layers(m.network) for n in x.num_bayesian] for m in (bnn, loaded)
    ]
    with posterior_mean():
        row["loaded"] = bool(
            np.array_equal(bnn.network(x), loaded.network(x))
            and np.array_equal(bnn.scales(), loaded.scales())
            and all(a[:2] == b[:2] and np.array_equal(a[2], b[2]) for a, b in zip(*posteriors, strict=True))
        )
    row["seconds"] = time.perf_counter() - start
    wrong = [
        (row["bayesian"] != row["masked"], "count"),
        (not row["difference"] <= 1e-5, "outputs differ"),
        (not row["finite"], "a step that is not finite"),
        (not all(row["moved"]), "a step that moves nothing"),
        (not row["loaded"], "other outputs after loading"),
    ]
    row["reason"] = ", ".join(reason for is_wrong, reason in wrong if is_wrong)
    row["ok"] = not row["reason"]
    return row


def table(rows: list[dict]) -> str:
    """The rows as a text table."""
    lines = [
        f"{'architecture':<18} {'px':>3} {'parameters':>12} {'Bayesian':>9} {'rel. diff.':>10} {'s':>6}  result",
    ]
    for row in rows:
        keys = ("size", "parameters", "bayesian", "difference", "seconds")
        size, parameters, bayesian, difference, seconds = (row.get(key, np.nan) for key in keys)
        lines.append(
            f"{row['architecture']:<18} {size:>3} {parameters:>12,} {bayesian:>9,} {difference:>10.1e} {seconds:>6.0f}"
            f"  {row['reason'] or 'ok'}"
        )
    good = sum(row["ok"] for row in rows)
    return "\n".join([*lines, f"{good} of {len(rows)} hold."])


def run_alone(name: str, minutes: float) -> dict:
    """`check` in a process of its own."""
    command = [sys.executable, os.path.abspath(__file__), "--one", name]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=60 * minutes)
        return json.loads(done.stdout.strip().splitlines()[-1])
    except subprocess.TimeoutExpired:
        return {"architecture": name, "ok": False, "reason": f"not done within {minutes:g} minutes"}
    except (IndexError, json.JSONDecodeError):
        reason = (done.stderr.strip().splitlines() or [""])[-1][:200]
        return {"architecture": name, "ok": False, "reason": f"exit status {done.returncode}: {reason}"}


def main():
    """Check all architectures, or the missing ones, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path("runs/applications.jsonl"))
    parser.add_argument("--only", nargs="+", default=names(), metavar="NAME")
    parser.add_argument("--minutes", type=float, default=30, help="limit of one architecture")
    parser.add_argument("--one", help="check one here and print its row as JSON")
    args = parser.parse_args()
    if args.one:
        print(json.dumps(check(args.one)))
        return

    args.out.parent.mkdir(parents=True, exist_ok=True)
    lines = args.out.read_text().splitlines() if args.out.exists() else []
    rows = {row["architecture"]: row for row in map(json.loads, lines)}
    missing = [name for name in args.only if not rows.get(name, {}).get("ok")]
    for name in (bar := tqdm(missing, desc="architectures")):
        bar.set_postfix_str(name)
        rows[name] = run_alone(name, args.minutes)
        with args.out.open("a") as file:
            file.write(json.dumps(rows[name]) + "\n")
    print(table([rows[name] for name in args.only]))


if __name__ == "__main__":
    main()
