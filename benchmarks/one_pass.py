"""What was tried and not kept: members or turns put into one pass, and a head that samples whole masks.

Run: `python benchmarks/one_pass.py isic2018 [--seeds 0,1,2] [--runs runs]`, or `lidc [--folds 2,3]`. Small U-Nets at
32 px with the settings of `profiles/confirm.yaml` and `confirm_isic.yaml`, whose finished runs in --runs are loaded.
Rows are of the *validation* images. Each is added to `results/one_pass.csv` when it is done; a row that is there is not
made again. The means over seeds and folds are printed. NLL, Brier score, ECE and GED as in `sbn_tf.metrics`.

- *Taught by turns*: the one network trains on for step 3's epochs; its target is a mix of the true mask and the mean of
  its own eight flips and turns. A share of 0 is the control. Hinton, Vinyals and Dean 2015, "Distilling the Knowledge
  in a Neural Network", section 2 (there with a temperature).
- *Members' mean weights*: each salient weight is the mean of its five members'; batch norm's statistics are estimated
  again. Izmailov et al. 2018, "Averaging weights leads to wider optima".
- *Low-rank Gaussian over the logits* (data of several raters): a head gives the mean, 10 factors and a diagonal. It
  trains on from the one network, on one rater's mask a step, with 20 samples. Monteiro et al. 2020, "Stochastic
  segmentation networks: modelling spatially correlated aleatoric uncertainty".
"""

import argparse
import dataclasses
import functools
from pathlib import Path

import keras
import numpy as np
import pandas as pd
from keras import ops

from sbn_tf import estimate_batch_norm
from sbn_tf.core.batch_norm import batch_norms
from sbn_tf.core.files import write_atomically
from sbn_tf.core.overlap import spread_cuts
from sbn_tf.core.turns import NUM_TURNS, turn
from sbn_tf.experiments import methods
from sbn_tf.experiments.experiment import experiment
from sbn_tf.experiments.recipes import optimizer_for
from sbn_tf.experiments.scoring import evaluate
from sbn_tf.experiments.trivial import level_sets
from sbn_tf.partial_bayes import to_deterministic

TABLE = Path(__file__).resolve().parents[1] / "results" / "one_pass.csv"
SETTINGS = "keep=last, augment=flips_and_quarter_turns, scale_start=layer, initial_scale=1.0"
EPOCHS = {"isic2018": 60, "lidc": 240}
AFTERWARDS = {"scale_start": "relative", "initial_scale": 0.3}
RANK, TRAINING_SAMPLES, NUM_MASKS = 10, 20, 16
KEPT = ("nll", "brier", "ece", "ged")


def main(about, trial, table):
    """Make the rows that are missing, and print their means."""
    parser = argparse.ArgumentParser(description=about, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("dataset", choices=sorted(EPOCHS))
    parser.add_argument("--seeds", default="0")
    parser.add_argument("--folds", default="2,3", help="of lidc, by patient")
    parser.add_argument("--runs", default=None, help="folder of finished runs; default: runs/ of the repository")
    parser.add_argument("--table", type=Path, default=table)
    args = parser.parse_args()
    for fold in map(int, args.folds.split(",")) if args.dataset == "lidc" else [None]:
        for seed in map(int, args.seeds.split(",")):
            trial(args.dataset, fold, seed, args.runs, args.table).run()
    rows = pd.read_csv(args.table)
    print(rows[rows["dataset"] == args.dataset].groupby("method", sort=False)[list(trial.kept)].agg(["mean", "count"]))


def add_row(table, about, numbers):
    """Add a row to a CSV file, `about` and what `numbers()` gives, if it has none of `about`."""
    done = pd.read_csv(table) if table.exists() else pd.DataFrame()
    if len(done) and (done[list(about)].fillna(-1) == pd.Series(about).fillna(-1)).all(axis=1).any():
        return
    line = about | numbers()
    text = pd.concat([done, pd.DataFrame([line])]).to_csv(index=False, float_format="%.6f")
    write_atomically(table, lambda file: file.write(text.encode()))
    print(line, flush=True)


class Trial:
    """The rows of one seed and fold."""

    kept = KEPT

    def __init__(self, dataset, fold, seed, runs, table):
        self.about, self.runs, self.table = {"dataset": dataset, "fold": fold, "seed": seed}, runs, table
        options = {} if fold is None else {"split": "patient", "fold": fold}
        changes = SETTINGS + (", targets=mean" if fold is not None else "")
        made = {"network": "unet_small", "size": 32, "epochs": EPOCHS[dataset], "seed": seed, "options": options}
        settings = experiment(dataset, "sbn", changes=changes, **made)
        self.data, self.recipe = settings.data, settings.recipe
        self.images = self.data.val.normalised()
        self.steps = self.data.train.steps(self.recipe.batch_size)

    def run(self):
        """All rows."""
        for name in ("deterministic", "turned", "members", "branched"):
            self.row(name, self.samples, name)
        for name in ("members", "branched"):
            self.row(f"{name}: mean weights, one pass", self.mean_weights, name)
        for share in (0.0, 0.5, 1.0):
            self.row(f"taught by turns, share {share:g}", self.taught, share)
        if self.data.train.num_raters > 1:
            self.row(f"{NUM_MASKS} level sets of deterministic", self.level_sets)
            for epochs, rate in ((15, 1e-3), (40, 3e-3)):
                name = f"low-rank Gaussian over the logits, {epochs} epochs at {rate:g}"
                self.row(name, self.low_rank, epochs, rate)

    def row(self, name, predict, *given, **options):
        """Add one row, if it is not there."""

        def numbers():
            val, samples = self.data.val, predict(*given, **options)
            found = evaluate(samples, np.asarray(val.targets), "segmentation", rater_valid=val.rater_valid)
            return {"num_val": val.num_examples, **{key: found.get(key) for key in self.kept}}

        add_row(self.table, {**self.about, "method": name}, numbers)

    def method(self, name):
        """A method of the library, trained or loaded."""
        recipe = self.recipe
        if name.startswith("members"):
            recipe = dataclasses.replace(recipe, **AFTERWARDS)
        options = {"r_bayes": 0.2, "seed": self.about["seed"], "network": "unet_small", "runs": self.runs}
        return methods.make(name, recipe, **options).fit(self.data)

    def samples(self, name):
        """Samples of a method of the library."""
        return self.method(name).predict_samples(self.images)

    def mean_weights(self, name):
        """One pass with the mean of the members' values."""
        plain = to_deterministic(self.method(name).model)
        for norm in batch_norms(plain):
            norm.trainable = True  # it was frozen, with one network's statistics
        estimate_batch_norm(plain, self.data.train.batches(self.recipe.batch_size, seed=0))
        return plain.predict(self.images, verbose=0)[None, ..., 0]

    def taught(self, share):
        """One pass of the network that trained on, `share` of its target the mean of its eight flips and turns."""
        base, images = self.method("deterministic").model, self.data.train.normalised()
        target = (share * self.mean_of_turns + (1 - share) * self.data.train.mean_mask()).astype("float32")
        random = np.random.default_rng(self.about["seed"])

        def batches():
            while True:
                order, symmetries = random.permutation(len(images)), random.integers(NUM_TURNS, size=len(images))
                for some in np.array_split(order, self.steps):
                    pairs = [(turn(images[i], symmetries[i]), turn(target[i], symmetries[i])) for i in some]
                    yield tuple(map(np.stack, zip(*pairs, strict=True)))

        self.compiled(base, "binary_crossentropy", self.recipe.bayes_epochs, self.recipe.bayes_learning_rate)
        base.fit(batches(), steps_per_epoch=self.steps, epochs=self.recipe.bayes_epochs, verbose=0)
        return base.predict(self.images, verbose=0)[None, ..., 0]

    @functools.cached_property
    def mean_of_turns(self):
        """Mean prediction from the eight flips and turns of each training image."""
        return self.method("turned").predict_samples(self.data.train.normalised()).mean(0)[..., None]

    def level_sets(self):
        """The one map cut at (m - 1/2) / M, each cut softened so that its logarithm exists."""
        cut = level_sets(self.samples("deterministic")[0], spread_cuts(NUM_MASKS))
        return np.where(cut, 0.999, 0.001)

    def low_rank(self, epochs, rate):
        """Samples of the head, `NUM_MASKS` of them."""
        base = self.method("deterministic").model
        last = base.layers[-1]
        parts = [
            keras.layers.Conv2D(1, 1, name="mean"),
            keras.layers.Conv2D(RANK, 1, kernel_initializer=keras.initializers.RandomNormal(stddev=0.05, seed=1)),
            keras.layers.Conv2D(1, 1, kernel_initializer="zeros", bias_initializer=keras.initializers.Constant(-4.0)),
        ]
        head = keras.Model(base.inputs, keras.layers.Concatenate()([part(last.input) for part in parts]))
        parts[0].set_weights(last.get_weights())
        noise = keras.random.SeedGenerator(self.about["seed"])

        def loss(y_true, y_pred):
            logits = sampled_logits(y_pred, TRAINING_SAMPLES, noise)
            likelihood = ops.sum(y_true[None, ..., 0] * logits - ops.softplus(logits), axis=(2, 3))
            mean = ops.logsumexp(likelihood, axis=0) - np.log(TRAINING_SAMPLES)
            return -mean / (y_pred.shape[1] * y_pred.shape[2])

        self.compiled(head, loss, epochs, rate)
        stream = {"augment": self.recipe.augment, "rater": "random", "seed": self.about["seed"], "epochs": epochs}
        batches = self.data.train.batches(self.recipe.batch_size, **stream)
        head.fit(batches, steps_per_epoch=self.steps, epochs=epochs, shuffle=False, verbose=0)
        logits = sampled_logits(ops.convert_to_tensor(head.predict(self.images, verbose=0)), NUM_MASKS, noise)
        return ops.convert_to_numpy(ops.sigmoid(logits))

    def compiled(self, model, loss, epochs, rate):
        """Compile for a training with cosine decay."""
        model.compile(optimizer_for("adam", rate, decay="cosine", steps=self.steps * epochs), loss)


def sampled_logits(outputs, num_samples, noise):
    """Logits, (samples, batch, height, width), of N(mean, factors factors' + exp(log diagonal))."""
    batch, height, width, _ = ops.shape(outputs)
    mean, factors, diagonal = outputs[..., 0], outputs[..., 1 : 1 + RANK], outputs[..., -1]
    shared = keras.random.normal((num_samples, batch, RANK), seed=noise)
    own = keras.random.normal((num_samples, batch, height, width), seed=noise)
    return mean + ops.einsum("bhwr,sbr->sbhw", factors, shared) + ops.exp(0.5 * diagonal) * own


if __name__ == "__main__":
    main(__doc__, Trial, TABLE)
