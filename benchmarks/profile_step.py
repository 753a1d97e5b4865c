"""Where the time above the floor goes: a training step, or a prediction, profiled op by op, beside its floor's.

Run: `python benchmarks/profile_step.py [--network resnet18] [--estimator split] [--r-bayes 0.01] [--batch 50]`, or
`python benchmarks/profile_step.py --estimator all --cost-aware 0.1`, or with `--prediction`

Both run under TensorFlow's profiler, one op at a time (`inter_op` 1 thread, `intra_op` --threads), so that the
durations of ops add up. The table sums them by kind of op, largest difference first. The floor of "all", and of a
prediction, is five passes of the deterministic network; of the other estimators, and of `--cost-aware` masks, one.
"""

import argparse
import collections
import os
import tempfile
from pathlib import Path

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import floor
import numpy as np
import tensorflow as tf
from tensorflow.tsl.profiler.protobuf import xplane_pb2

from sbn_tf import saliency


def milliseconds_by_op(call, steps):
    """Kind of op -> (milliseconds, number of ops) of one call."""
    call()  # traces
    with tempfile.TemporaryDirectory() as folder:
        tf.profiler.experimental.start(folder)
        for _ in range(steps):
            call()
        tf.profiler.experimental.stop()
        (path,) = Path(folder).rglob("*.xplane.pb")
        space = xplane_pb2.XSpace.FromString(path.read_bytes())
    found = collections.defaultdict(lambda: np.zeros(2))
    for plane in space.planes:
        for line in plane.lines:
            for event in line.events:
                name, colon, kind = plane.event_metadata[event.metadata_id].name.rpartition(":")
                # An op's event is named "its/name:Kind"; those of the executor, of calls and of loops hold others.
                if colon and name and not name.endswith(":") and kind.isidentifier() and "Call" not in kind:
                    found[kind] += (event.duration_ps / 1e9 / steps, 1 / steps)
    return found


def main():
    """Profile both steps, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--network", default="resnet18", choices=floor.NETWORKS)
    parser.add_argument("--estimator", default="split", choices=["all", "split", "flipout", "local"])
    parser.add_argument("--r-bayes", type=float, default=0.01)
    parser.add_argument("--score", default="random", choices=["random", "magnitude", "fisher"])
    parser.add_argument("--cost-aware", type=float, help="share of the operations that may run again for each sample")
    parser.add_argument("--prediction", action="store_true", help="of a prediction instead of a training step")
    parser.add_argument("--size", type=int, default=64)
    parser.add_argument("--batch", type=int, default=50)
    parser.add_argument("--stem", type=int, default=3, choices=(3, 7), help="of the ResNet")
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--top", type=int, default=12, help="rows")
    parser.add_argument("--out", type=Path, default=Path("runs/floor.jsonl"), help="beside it the scores are kept")
    parser.set_defaults(quick=False, train_steps=20)  # of `floor.Bench`
    args = parser.parse_args()
    tf.config.threading.set_intra_op_parallelism_threads(args.threads)
    tf.config.threading.set_inter_op_parallelism_threads(1)
    bench = floor.Bench(args.network, args)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    masks = saliency.top_k(bench.scores, args.r_bayes, model=bench.base, cost_aware=args.cost_aware)
    one = bench.passes() if (args.estimator == "all" or args.prediction) and args.cost_aware is None else bench.one()
    models = (one, bench.converted(masks, args.estimator))
    below, above = (
        milliseconds_by_op(
            lambda m=model: m.predict_on_batch(bench.x) if args.prediction else m.train_on_batch(bench.x, bench.y),
            args.steps,
        )
        for model in models
    )
    kinds = sorted({*above, *below}, key=lambda kind: -abs(above[kind][0] - below[kind][0]))
    total = sum(v[0] for v in below.values()), sum(v[0] for v in above.values())
    share = f"{100 * args.r_bayes:g} % by {args.score}"
    what = "prediction" if args.prediction else f'step, "{args.estimator}"'
    print(f"{args.network}, {args.size} px, batch {args.batch}, {share}, {what}\n")
    print("| op | ms of the floor | ops | ms of it | ops | difference, % of the floor |")
    print("|---|---|---|---|---|---|")
    for kind in kinds[: args.top]:
        (low, few), (high, many) = below[kind], above[kind]
        print(f"| {kind} | {low:.1f} | {few:.0f} | {high:.1f} | {many:.0f} | {100 * (high - low) / total[0]:+.1f} |")
    rest = [sum(side[kind][0] for kind in kinds[args.top :]) for side in (below, above)]
    print(f"| all others | {rest[0]:.1f} | | {rest[1]:.1f} | | {100 * (rest[1] - rest[0]) / total[0]:+.1f} |")
    print(f"| all | {total[0]:.1f} | | {total[1]:.1f} | | {100 * (total[1] - total[0]) / total[0]:+.1f} |")


if __name__ == "__main__":
    main()
