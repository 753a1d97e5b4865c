"""Do the defaults of `to_partial_bayes` keep what a network has learnt? Ten architectures of keras.applications.

Run: `SBN_TF_DATA=... python benchmarks/first_epoch.py [--out results/first_epoch.csv] [--only MobileNet VGG16]`.

Each architecture is trained from random weights on 501 chest radiographs of `nih_chest` (is there any finding?) until
its training accuracy is 90 % or more, or for 30 epochs. `to_partial_bayes` with its defaults and r_bayes 0.01 makes it
Bayesian, and `fit` trains one epoch more, compiled by itself. A row of the table has training accuracy and NLL of the
trained network, of the posterior before training, and after that epoch. Finished rows of `--out` and networks in
`--networks` are kept.
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

ARCHITECTURES = {  # name -> side of the images in pixels, options
    "MobileNet": (64, {"alpha": 0.25}),
    "MobileNetV2": (64, {"alpha": 0.35}),
    "MobileNetV3Small": (64, {"alpha": 0.75}),
    "MobileNetV3Large": (64, {"alpha": 0.75}),
    "EfficientNetB0": (64, {}),
    "EfficientNetV2B0": (64, {}),
    "ResNet50V2": (32, {}),
    "VGG16": (32, {}),
    "DenseNet121": (32, {}),
    "NASNetMobile": (32, {}),
}
BATCH = 32


def images_and_findings(name: str) -> tuple[np.ndarray, np.ndarray]:
    """Training images (501, size, size, 3) and whether a radiograph has any finding, (501, 1)."""
    train = datasets.load("nih_chest", size=ARCHITECTURES[name][0]).train
    findings = (train.targets.max(axis=1, keepdims=True) > 0).astype("float32")
    return np.repeat(train.normalised(), 3, axis=-1), findings


def trained(name: str, x: np.ndarray, y: np.ndarray, path: pathlib.Path) -> keras.Model:
    """An architecture, trained on the images until it knows most of them; saved at `path`, or loaded from there."""
    if path.exists():
        return keras.models.load_model(path)
    keras.utils.set_random_seed(0)
    make = getattr(keras.applications, name)
    body = make(weights=None, input_shape=x.shape[1:], include_top=False, pooling="avg", **ARCHITECTURES[name][1])
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
    path.parent.mkdir(parents=True, exist_ok=True)
    model.save(path)
    return model


def scores(model: keras.Model, x: np.ndarray, y: np.ndarray) -> tuple[float, float]:
    """Training accuracy and NLL, in nats an image."""
    values = model.evaluate(x, y, batch_size=BATCH, verbose=0, return_dict=True)
    return values["accuracy"], values.get("nll", values["loss"])


def row(name: str, networks: pathlib.Path) -> dict:
    """One architecture: before and after its first epoch as a Bayesian network."""
    x, y = images_and_findings(name)
    model = trained(name, x, y, networks / f"{name}.keras")
    found = {"architecture": name, "size": x.shape[1], "weights": model.count_params()}
    found["accuracy"], found["nll"] = scores(model, x, y)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        bayes = sbn_tf.to_partial_bayes(model, r_bayes=0.01, data=(x, y), seed=0, verbose=False)
        bayes.compile()
        found["start accuracy"], found["start nll"] = scores(bayes, x, y)
        bayes.fit(x, y, batch_size=BATCH, verbose=0)
        found["epoch accuracy"], found["epoch nll"] = scores(bayes, x, y)
    found["warned"] = any("trained network's" in str(one.message) for one in caught)
    return found


def main() -> None:
    """Print the table, and write it row by row."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path("results/first_epoch.csv"))
    parser.add_argument("--networks", type=pathlib.Path, default=pathlib.Path("runs/first_epoch"))
    parser.add_argument("--only", nargs="*", default=list(ARCHITECTURES), choices=list(ARCHITECTURES))
    arguments = parser.parse_args()
    rows = pd.read_csv(arguments.out).to_dict("records") if arguments.out.exists() else []
    for name in tqdm(arguments.only):
        if name not in {one["architecture"] for one in rows}:
            rows.append(row(name, arguments.networks))
            arguments.out.parent.mkdir(parents=True, exist_ok=True)
            pd.DataFrame(rows).to_csv(arguments.out, index=False)
            keras.backend.clear_session()
    y = images_and_findings(arguments.only[0])[1]
    print(f"most frequent answer: {max(y.mean(), 1 - y.mean()):.3f} of {len(y)} images")
    print(pd.DataFrame(rows).round(3).to_string(index=False))


if __name__ == "__main__":
    main()
