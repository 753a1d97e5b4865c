"""The command `sbn-tf train`: from a folder of images with answers to a folder with a network that reads new ones."""

from __future__ import annotations

import argparse
import shlex
from pathlib import Path

import numpy as np
from scipy.special import log_softmax

from sbn_tf import metrics
from sbn_tf.core.checks import check_choice, check_fraction, check_seed
from sbn_tf.core.predictions import EXCLUSIVE
from sbn_tf.datasets.decoding import FITS
from sbn_tf.datasets.folder import is_folder
from sbn_tf.experiments import recipes, report, results
from sbn_tf.experiments.check_data import add_folder_arguments
from sbn_tf.experiments.compare import CONTROLS, all_rows, check_methods, fitted
from sbn_tf.experiments.distance import BATCH, FeatureDistance, Features
from sbn_tf.experiments.experiment import TRAINING, Experiment, identity, of_training
from sbn_tf.experiments.folders import begin
from sbn_tf.experiments.guarantees import calibrated
from sbn_tf.experiments.methods import METHODS
from sbn_tf.experiments.methods.base import Method, validation
from sbn_tf.experiments.networks import NETWORKS
from sbn_tf.experiments.predictor import NetworkCard, Predictor, recovered_logits
from sbn_tf.experiments.temperature import fit_temperature
from sbn_tf.experiments.training_page import write_training_page

# They predict from one saved model.
ONE_NETWORK = ("members", "members_turned", "branched", "branched_turned", "mixture", "partial", CONTROLS[0], "turned")


def predictor_of(settings: Experiment, made: Method, fit: str, window: tuple[float, float] | None = None) -> Predictor:
    """A fitted method as a network that reads image files; what it says of certainty is of the validation images.

    The temperature is fitted to the mean probability (`fit_temperature`), and kept only if dividing the logits of
    every draw by it, as `Predictor.samples` does, lowers the NLL of the validation images; else it is 1.

    Args:
        settings: the experiment that it was fitted in.
        made: a method with one network.
        fit: how the data made squares of the images, see `decoding.FITS`.
        window: what became 0 and 1 of DICOM and NIfTI.
    """
    data, size = settings.data, settings.recipe.batch_size
    card = NetworkCard.model_validate(
        {
            "dataset": data.card.title,
            "method": made.title,
            "task": data.card.task,
            "classes": data.card.classes,
            "size": data.input_shape[0],
            "channels": data.input_shape[2],
            "fit": fit,
            "window": window,
            "mean": np.asarray(data.mean).tolist(),
            "sd": np.asarray(data.sd).tolist(),
            "threshold": settings.threshold,
            "num_samples": made.num_samples,
            "turned": made.turned,
            "temperature": 1.0,
            **dict.fromkeys(("quantiles", "aleatoric_quantiles", "epistemic_quantiles"), [0.0] * 101),
        }
    )
    training = _training(made.model, data.train)
    plain = Predictor(made.model, card, training)
    probs, targets, seen = _seen(plain, data, size)
    temperature = fit_temperature(recovered_logits(probs, card.task), targets.astype("float32"), card.task)
    tempered = plain.with_card(temperature=temperature)
    probs_after, _, seen_after = _seen(tempered, data, size)
    found = plain
    if _nll(probs_after, targets, card.task) < _nll(probs, targets, card.task):
        found, seen = tempered, seen_after
    calibration = calibrated(data.val, [(one, means["total"]) for one, means, _ in seen], card.threshold)
    parts = {"quantiles": "total", "aleatoric_quantiles": "aleatoric", "epistemic_quantiles": "epistemic"}
    columns = {key: [means[part] for _, means, _ in seen] for key, part in parts.items()}
    columns["distance_quantiles"] = [distance for _, _, distance in seen]
    steps = np.linspace(0, 1, 101)
    quantiles = {key: tuple(np.quantile(column, steps).tolist()) for key, column in columns.items()}
    return found.with_card(**quantiles, calibration=calibration)


def _seen(predictor, data, batch_size):
    """Of the validation images the mean probabilities, float32, the targets, and what each `Prediction` says."""
    means, targets, seen = [], [], []
    for images, truth in validation(data, batch_size):
        predicted = predictor.predict_batch(images)
        means.append(np.stack([one.samples for one in predicted], 1).mean(0))
        targets.append(truth)
        seen += [(one.probabilities, one.means, one.distance) for one in predicted]
    return np.concatenate(means), np.concatenate(targets), seen


def _nll(probs, targets, task):
    if task in EXCLUSIVE:
        return -log_softmax(recovered_logits(probs, task), -1)[targets == 1].mean()
    return metrics.nll(targets, probs)


def _training(model, split) -> dict[str, np.ndarray]:
    """Where the training images lie in the network's features."""
    features, starts = Features(model), range(0, split.num_examples, BATCH)
    found = np.concatenate([features(split.normalised(slice(start, start + BATCH))) for start in starts])
    classes = np.asarray(split.targets).argmax(-1) if split.task in EXCLUSIVE else None
    one = FeatureDistance(found, classes)
    return {"means": one.means, "precision": one.precision}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `sbn-tf train`."""
    parser.add_argument("folder", help="a folder with images.csv, see data/README.md")
    parser.add_argument(
        "--out", required=True, help="folder of the trained network, new or empty; the same command again goes on"
    )
    parser.add_argument(
        "--method",
        choices=ONE_NETWORK,
        help="default: turned where training has flips (sbn, masks), else members",
    )
    parser.add_argument("--r-bayes", type=float, default=0.2, help="fraction of the weights with a posterior, 0..1")
    parser.add_argument("--recipe", default="sbn", help=f"one of {', '.join(recipes.RECIPES)}")
    parser.add_argument("--network", help="a name of sbn_tf.experiments.networks.NETWORKS; default: the recipe's")
    parser.add_argument("--size", type=int, help="side of the network's images in pixels; default: 64")
    parser.add_argument("--fit", choices=FITS, default="pad", help="how an image becomes a square; default: pad")
    parser.add_argument(
        "--window",
        type=float,
        nargs=2,
        metavar=("LOW", "HIGH"),
        help="what becomes 0 and 1 of DICOM and NIfTI (CT: Hounsfield units); default: the file's own window",
    )
    parser.add_argument("--epochs", type=int, help="of step 1; default: the recipe's")
    parser.add_argument("--bayes-epochs", type=int, help="of step 3; default: the recipe's")
    parser.add_argument("--changes", default="", help="other fields of the recipe, such as augment=none")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--rivals", default="", help="other methods to train and compare, such as budget_2,ensemble")
    parser.add_argument("--limit", type=int, help="at most so many images a split")
    add_folder_arguments(parser)


def run(given: argparse.Namespace) -> None:
    """Train, score on the test split beside a plain network, and write the network and the table."""
    check_fraction("r_bayes", given.r_bayes)
    out = Path(given.out)
    if out.exists() and not out.is_dir():
        raise ValueError(f"Expected --out, a folder. Received: {out}, a file.")
    if not is_folder(given.folder):
        raise ValueError(f"Expected a folder with images.csv (data/README.md). Received: {given.folder}")
    asked = {key: value for key, value in vars(given).items() if key not in ("run", "command", "out", "rivals")}
    asked["folder"] = str(Path(given.folder).resolve())
    rivals = [name.strip() for name in given.rivals.split(",") if name.strip()]
    check_methods(rivals)
    check_seed(given.seed)
    if given.network is not None:
        check_choice("network", given.network, tuple(NETWORKS))
    settings = of_training(out, asked)
    if given.method is None:
        given.method = asked["method"] = "turned" if settings.recipe.augment else "members"
    print(settings.data.card, settings.data, sep="\n")
    begin(out, TRAINING, asked | identity(settings))
    # What the turns give by themselves is no merit of a posterior.
    turned = ("turned",) if METHODS[given.method].turned else ()
    rows = all_rows(settings, dict.fromkeys((*CONTROLS, *turned, *rivals, given.method)))
    predictor = predictor_of(settings, fitted(settings, given.method), given.fit, given.window)
    predictor.save(out)
    frame = results.frame(rows)
    frame.to_csv(out / "results.csv", index=False)
    write_training_page(out / "report.html", settings, predictor, frame, given.method)
    title, table = next(iter(report.tables(frame, settings.task).items()))
    print(f"\n## {title}, {settings.data.test.num_examples} test images\n\n{report.to_markdown(table)}")
    print(
        f"\nThe report is {out / 'report.html'}. The network is in {out}, {METHODS[given.method].title}. "
        f"New images: sbn-tf predict {shlex.quote(str(out))} IMAGES --out DIR"
    )
