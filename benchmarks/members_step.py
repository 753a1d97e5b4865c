"""By the clock: a training step of five members, each on its part of the batch, over one of the plain network.

Run: `python benchmarks/members_step.py [--threads 2] [--repeats 21]`: U-Nets of three sizes at 32 and 64 px in batches
of 20, members on a random 20 % of the weights, batch norm frozen in the members and training in the plain network, as
in `fit_branched`. By count both steps have the same operations. Timed in turn: the median over pairs, in brackets its
quartiles.
"""

import argparse
import functools

import floor
from growth import seconds_of

from sbn_tf import saliency
from sbn_tf.experiments import networks
from sbn_tf.partial_bayes import to_partial_bayes


def main():
    """Time the steps and print their ratios."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=21)
    args = parser.parse_args()
    floor.device(args.threads)
    for name, side in (("unet_small", 32), ("unet_small", 64), ("unet_medium", 64), ("unet", 64)):
        base = networks.build(name, (side, side, 3), 1, seed=0)
        masks = saliency.top_k(saliency.saliency(base, score="random"), 0.2)
        options = {"posterior": "members", "initial_scale": 1.0, "relative": True, "estimator": "split", "seed": 0}
        members = to_partial_bayes(base, masks, num_train=1000, num_samples=5, **options)
        x, y = floor.batch_for(base, 20)

        def timed(model, x=x, y=y):
            step = floor.training_step(floor.compiled(model), x, y)
            step(1)  # traces it
            return functools.partial(seconds_of, step)

        row = floor.ratio_of(timed(members), timed(base), args.repeats)
        low, high = row["quartiles"]
        print(f"{name}, {side} px, {args.threads} threads: {row['ratio']:.2f} [{low:.2f}, {high:.2f}]", flush=True)


if __name__ == "__main__":
    main()
