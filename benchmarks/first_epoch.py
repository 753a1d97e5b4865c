"""Do the defaults of `to_partial_bayes` keep what a network has learnt? Ten architectures of keras.applications.

Run: `SBN_TF_DATA=... python benchmarks/first_epoch.py [--out runs/first_epoch.csv] [--only MobileNet VGG16]`.

Each architecture is trained from random weights on 501 chest radiographs of `nih_chest` (64 px; is there any finding?)
until its training accuracy is 90 % or more, or for 30 epochs. `to_partial_bayes` with its defaults and
r_bayes 0.01 makes it Bayesian, and `fit` trains one epoch more, compiled by itself. A row of the table has training
accuracy and NLL of the trained network, of the posterior before training, and after that epoch; `initial_scale=0.01`
and `Adam(0.05)`, what the README said before, in the last columns. Finished rows of `--out` are kept.
"""

import argparse
import pathlib
import warnings

import keras
import numpy as np
import pandas as pd
from tqdm import tqdm

import sbn_tf
from sbn_tf import datasets

ARCHITECTURES = {
    "MobileNet": {"alpha": 0.25},
    "MobileNetV2": {"alpha": 0.35},
    "MobileNetV3Small": {"alpha": 0.75},
    "MobileNetV3Large": {"alpha": 0.75},
    "EfficientNetB0": {},
    "EfficientNetV2B0": {},
    "DenseNet121": {},
    "NASNetMobile": {},
    "ResNet50V2": {},
    "VGG16": {},
}
BATCH = 32


def trained(name: str, x: np.ndarray, y: np.ndarray) -> keras.Model:
    """An architecture, trained on the images until it knows most of them."""
    keras.utils.set_random_seed(0)
    make = getattr(keras.applications, name)
    body = make(weights=None, input_shape=x.shape[1:], include_top=False, pooling="avg", **ARCHITECTURES[name])
    for layer in body.layers:
        if isinstance(layer, keras.layers.BatchNormalization):
            layer.momentum = 0.9  # the published .99 to .999 need thousands of steps
    model = keras.Model(body.input, keras.layers.Dense(1, "sigmoid", name="head")(body.output), name=name)
    rate = 1e-4 if name == "VGG16" else 1e-3  # VGG16 has no batch norm
    model.compile(keras.optimizers.Adam(rate), "binary_crossentropy", metrics=["accuracy"])
    for _ in range(10):
        model.fit(x, y, batch_size=BATCH, epochs=3, verbose=0)
        if model.evaluate(x, y, verbose=0)[1] >= 0.9:
            break
    return model


def scores(model: keras.Model, x: np.ndarray, y: np.ndarray) -> tuple[float, float]:
    """Training accuracy and NLL, in nats an image."""
    values = model.evaluate(x, y, batch_size=BATCH, verbose=0, return_dict=True)
    return values["accuracy"], values.get("nll", values["loss"])


def row(name: str, x: np.ndarray, y: np.ndarray) -> dict:
    """One architecture: before and after its first epoch as a Bayesian network, and with the old settings."""
    model = trained(name, x, y)
    found = {"architecture": name, "weights": model.count_params()}
    found["accuracy"], found["nll"] = scores(model, x, y)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        bayes = sbn_tf.to_partial_bayes(model, r_bayes=0.01, data=(x, y), seed=0, verbose=False)
        bayes.compile()
        found["start accuracy"], found["start nll"] = scores(bayes, x, y)
        bayes.fit(x, y, batch_size=BATCH, verbose=0)
        found["epoch accuracy"], found["epoch nll"] = scores(bayes, x, y)
    found["warned"] = any("trained network's" in str(one.message) for one in caught)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        options = {"r_bayes": 0.01, "data": (x, y), "initial_scale": 0.01, "seed": 0, "verbose": False}
        old = sbn_tf.to_partial_bayes(model, **options)
        old.compile(sbn_tf.LocScaleOptimizer("adam", keras.optimizers.Adam(0.05)))
        old.fit(x, y, batch_size=BATCH, verbose=0)
        found["old accuracy"], found["old nll"] = scores(old, x, y)
    found["old warned"] = any("trained network's" in str(one.message) for one in caught)
    return found


def main() -> None:
    """Print the table, and write it row by row."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path("runs/first_epoch.csv"))
    parser.add_argument("--only", nargs="*", default=list(ARCHITECTURES), choices=list(ARCHITECTURES))
    arguments = parser.parse_args()
    train = datasets.load("nih_chest", size=64).train
    x = np.repeat(train.normalised(), 3, axis=-1)
    y = (train.targets.max(axis=1, keepdims=True) > 0).astype("float32")
    rows = pd.read_csv(arguments.out).to_dict("records") if arguments.out.exists() else []
    for name in tqdm(arguments.only):
        if name not in {one["architecture"] for one in rows}:
            rows.append(row(name, x, y))
            arguments.out.parent.mkdir(parents=True, exist_ok=True)
            pd.DataFrame(rows).to_csv(arguments.out, index=False)
            keras.backend.clear_session()
    print(f"most frequent answer: {max(y.mean(), 1 - y.mean()):.3f} of {len(y)} images")
    print(pd.DataFrame(rows).round(3).to_string(index=False))


if __name__ == "__main__":
    main()
