"""How much of a phantom's uncertainty is in the data: the loss between "knows the scene" and "has seen much".

Run: python benchmarks/phantom_ceilings.py

No network has a better mean loss than the probabilities that generated the phantom, given the scene; an image shows
less than the scene, so the best possible network lies above that by an unknown amount. A network trained on many
images lies above the best possible one. The two rows bracket it, and what the network of the usual 600 images has
above the bracket is what more data, or knowing its own doubt, could win. Test: 2,000 images that no row has seen.
"""

import argparse
import os

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import keras
import numpy as np
import pandas as pd
from tqdm import tqdm

from sbn_tf import datasets
from sbn_tf.experiments import networks, report, scoring, trivial

TESTED, BATCH_SIZE = 2000, 50


def trained(data, epochs, seed=0):
    """Test probabilities of the small network at the epoch of its best validation loss."""
    keras.utils.set_random_seed(seed)
    model = networks.build(f"{data.card.network}_small", data.input_shape, data.num_outputs, seed=seed)
    steps = data.train.steps(BATCH_SIZE)
    model.compile(
        keras.optimizers.Adam(keras.optimizers.schedules.CosineDecay(3e-3, epochs * steps)),
        keras.losses.BinaryCrossentropy(),
    )
    rater = "mean" if data.val.num_raters > 1 else None
    best, weights = np.inf, None
    for epoch in tqdm(range(epochs), desc=f"{data.card.name}, {data.train.num_examples} images", leave=False):
        model.fit(data.train.batches(BATCH_SIZE, seed=seed, initial_epoch=epoch, epochs=epoch + 1), verbose=0)
        loss = model.evaluate(data.val.batches(BATCH_SIZE, rater=rater), verbose=0)
        if loss < best:
            best, weights = loss, model.get_weights()
    model.set_weights(weights)
    return model.predict(data.test.batches(BATCH_SIZE), verbose=0)[None]


def main():
    """Print a table for each phantom."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--many", type=int, default=20_000, help="training images of the network that has seen much")
    parser.add_argument("--names", nargs="+", default=["phantom_nodule", "phantom_lesion", "phantom_chest"])
    arguments = parser.parse_args()
    for name in arguments.names:
        rows = {}
        for label, count, epochs in (("600 images", 600, 40), (f"{arguments.many} images", arguments.many, 15)):
            data = datasets.load(name, num_train=count, num_val=max(150, count // 10), num_test=TESTED)
            options = {"train_prevalence": scoring.prevalence(data.card.task, data.train.targets)}
            rows[label] = scoring.evaluate(trained(data, epochs), data.test.targets, data.card.task, **options)
        rows["knows the scene"] = scoring.evaluate(
            data.test.truth_probs[None], data.test.targets, data.card.task, **options
        )
        constants = trivial.trivial(data.card.task, data.train.targets, data.test.targets)
        rows = {"prevalence": constants["prevalence"], **rows}
        keys = ["auc", "dice", "nll", "brier", "brier_skill", "ece"]
        print(f"{name}: {TESTED} test images, seed 0")
        table = pd.DataFrame.from_dict(rows, orient="index").reindex(columns=keys).dropna(axis=1, how="all")
        print(report.to_markdown(table), flush=True)


if __name__ == "__main__":
    main()
