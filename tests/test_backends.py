"""Keras's JAX and torch backends: the laws of layers and of the ELBO hold there, with the numbers of TensorFlow.

A backend is chosen once a process, so each runs in others: on JAX the laws as their own tests, and on each a script in
which TensorFlow cannot be imported at all. `SBN_TF_PYTHON_JAX` and `SBN_TF_PYTHON_TORCH` name the Python of an
environment without TensorFlow, such as `python tests/versions.py --backends` makes; without them this Python serves.
"""

import importlib.util
import json
import os
import pathlib
import re
import subprocess
import sys

import keras
import numpy as np
import pandas as pd
import pytest
from helpers import tiny_networks
from keras import layers as kl
from PIL import Image

import sbn_tf
from sbn_tf.__main__ import main
from sbn_tf.layers import masked_layers, posterior_mean
from sbn_tf.partial_bayes import to_partial_bayes
from sbn_tf.saliency import Masks, saliency, top_k

pytestmark = pytest.mark.backends

BACKENDS = ("jax", "torch")
TESTS = pathlib.Path(__file__).parent
# Left to TensorFlow: what needs TFP, GradientTape, tf.function, tf.distribute, a SavedModel or float64; and more kinds
# of layers, which are the same keras.ops.
LAWS = {
    "test_layers.py": [
        *(
            f"{law}_the_stock_layer[{kind}]"
            for law in ("test_no_bayesian_entry_is", "test_without_noise_it_is")
            for kind in ("Dense", "Conv2D", "DepthwiseConv2D", "Embedding")
        ),
        "test_draws_differ_only_at_the_given_mask",
        "test_the_seed_fixes_mask_and_draws",
        "test_kl_is_counted_once_when_called_five_times",
        "test_mean_reduction_divides_by_the_entries",
        "test_the_saved_weight_is_the_loc",
        "test_one_draw_within_posterior_sample",
    ],
    "test_partial_bayes.py": [
        "test_a_shared_layer_is_drawn_once_a_sample",
        "test_tiny_scales_nearly_equal_the_original_and_it_is_untouched",
        "test_as_a_part_of_another_model_it_predicts_and_refuses_to_train",
        "test_one_step_against_numpy",
        "test_losses_of_calls_are_averaged_over_the_samples",
        "test_another_models_call_in_between_changes_no_loss",
        "test_moving_averages_become_the_weights_at_the_end_of_fit",
        "test_beta_schedule_and_the_kl_in_nats_per_example",
        "test_more_samples_after_a_prediction_are_more_samples",
        "test_uncertainty_splits_in_two",
    ],
}


def on(backend, *arguments, python=None):
    environment = {**os.environ, "KERAS_BACKEND": backend, "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(TESTS.parent)}
    environment["JAX_DISABLE_MOST_OPTIMIZATIONS"] = "1"  # compiling takes longer than running here
    command = [python or python_of(backend), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, env=environment)


def python_of(backend):
    """The Python that has this backend; the test is skipped where there is none."""
    named = os.environ.get(f"SBN_TF_PYTHON_{backend.upper()}")
    if named is None and importlib.util.find_spec(backend) is None:
        pytest.skip(f"{backend} is not installed: python tests/versions.py --backends makes environments with it")
    return named or sys.executable


@pytest.mark.skipif(importlib.util.find_spec("jax") is None, reason="jax is an optional extra")
def test_the_laws_hold_under_jax():
    named = [f"{TESTS / file}::{test}" for file, tests in LAWS.items() for test in tests]
    options = ("-q", "-p", "no:cacheprovider", "-W", "ignore", "-rs", "--tb=short")
    done = on("jax", "-m", "pytest", *options, *named, python=sys.executable)  # these tests import TensorFlow
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    counts = re.fullmatch(r"(\d+) passed in .*", done.stdout.strip().splitlines()[-1])  # none skipped, none failed
    assert counts and int(counts[1]) >= sum(map(len, LAWS.values())), done.stdout[-2000:]


def network():
    x = keras.Input((4, 4, 1))
    y = kl.Conv2D(2, 3, activation="tanh", name="conv")(x)
    y = kl.Dense(1, "sigmoid", name="head")(kl.Flatten(name="flat")(kl.BatchNormalization(name="norm")(y)))
    return keras.Model(x, y)


def data():
    rng = np.random.default_rng(0)
    x = rng.normal(size=(8, 4, 4, 1)).astype("float32")
    return x, (x.mean(axis=(1, 2)) > 0).astype("float32")


def bayesian(initial_scale, **options):
    kernel = np.zeros((3, 3, 1, 2), bool)
    kernel.flat[::3] = True
    masks = Masks({"conv/kernel": kernel, "head/bias": np.ones(1, bool)})
    bnn = to_partial_bayes(network(), masks, num_train=8, initial_scale=initial_scale, seed=0, **options)
    bnn.compile(keras.optimizers.SGD(0.1), "binary_crossentropy")
    return bnn


def numbers(bnn):
    """What does not depend on the noise."""
    with posterior_mean():
        mean = bnn.network(data()[0], training=False)
    masks = [layer.mask(name).tolist() for layer in masked_layers(bnn.network) for name in layer.posteriors]
    found = {"mean": mean, "scales": bnn.scales(), "kl": bnn.kl_divergence()}
    return {"masks": masks, **{k: np.asarray(keras.ops.convert_to_numpy(v)).tolist() for k, v in found.items()}}


def scores(model):
    """Saliency by each gradient score: arrays, a PyDataset and a generator, with weights; the compiled loss."""
    x, y = data()
    weights = np.linspace(0.5, 1.5, len(x), dtype="float32")
    parts = [(x[i : i + 3], y[i : i + 3], weights[i : i + 3]) for i in (0, 3, 6)]

    class Batches(keras.utils.PyDataset):
        def __len__(self):
            return len(parts)

        def __getitem__(self, index):
            return parts[index]

    given = {
        "fisher": (x, y, weights),
        "paper": Batches(),  # in training mode: batch norm by the batch
        "per_example": (x, y, weights),
        "taylor": (part for part in parts),
    }
    found = {s: saliency(model, batches, score=s, batch_size=3, verbose=False) for s, batches in given.items()}
    return {s: {key: values.tolist() for key, values in by_key.items()} for s, by_key in found.items()}


def trained(path):
    """A network with running statistics of its own, saved."""
    keras.utils.set_random_seed(0)
    model = network()
    model.compile(keras.optimizers.Adam(0.01), "binary_crossentropy")
    model.fit(*data(), epochs=2, verbose=0)
    model.save(path)
    return model


def assert_same_scores(ours, tensorflows):
    for score, by_key in tensorflows.items():
        largest = max(np.max(values) for values in by_key.values())
        for key, values in by_key.items():  # a bias before batch norm has a score of rounding errors
            close = {"rtol": 1e-5, "atol": 1e-6 * largest, "err_msg": f"{score} of {key}"}
            np.testing.assert_allclose(ours[score][key], values, **close)


def three_steps():
    """The recipe from end to end: a trained network, its salient entries, their posterior, uncertainty."""
    (x, y), model = data(), network()
    model.compile(keras.optimizers.Adam(0.01), "binary_crossentropy")
    model.fit(x, y, epochs=2, batch_size=4, verbose=0)
    masks = top_k(saliency(model, (x, y), verbose=False), 0.2)
    bnn = to_partial_bayes(model, r_bayes=0.2, data=(x, y), num_samples=2, verbose=False)
    bnn.compile()
    losses = bnn.fit(x, y, epochs=2, batch_size=4, verbose=0).history["loss"]
    found = bnn.predict_uncertainty(x)
    entries = sum(int(layer.mask(name).sum()) for layer in masked_layers(bnn.network) for name in layer.posteriors)
    return {
        "finite": bool(np.isfinite(losses).all() and all(np.isfinite(values).all() for values in found.values())),
        "shape": found["mean"].shape,
        "draws_differ": float(found["mutual_information"].max()),
        "entries": [entries, masks.num_bayesian],
    }


def command_line(folder):
    """What `sbn-tf train` and `sbn-tf predict` leave of a folder with masks."""
    rng, rows = np.random.default_rng(0), ["image,mask,split"]
    for name in ("images", "masks"):
        (folder / name).mkdir(parents=True)
    for i in range(12):
        disc = np.zeros((12, 12), "uint8")
        disc[2 + i % 4 : 8 + i % 4, 3:9] = 255
        pixels = rng.integers(0, 99, (12, 12)).astype("uint8") + disc // 2
        Image.fromarray(pixels).save(folder / "images" / f"{i}.png")
        Image.fromarray(disc).save(folder / "masks" / f"{i}.png")
        rows.append(f"{i}.png,{i}.png,{('train', 'train', 'val', 'test')[i % 4]}")
    (folder / "images.csv").write_text("\n".join(rows))
    sizes = ["--network", "tiny_masks", "--size", "8", "--epochs", "1", "--bayes-epochs", "1"]
    train = ["train", str(folder), "--out", str(folder / "out"), "--recipe", "quick", "--method", "partial", *sizes]
    with tiny_networks():
        codes = [main(train)]
    codes.append(main(["predict", str(folder / "out"), str(folder / "images"), "--out", str(folder / "new")]))
    rows = pd.read_csv(folder / "out" / "results.csv").query("method == 'partial'")
    return {
        "codes": codes,
        "metrics": sorted(rows["metric"]),
        "versions": sorted(json.loads(rows["versions"].iloc[0])),
        "masks": len(list((folder / "new" / "masks").iterdir())),
    }


SCRIPT = """
import sys
for name in ("tensorflow", "tensorflow_probability", "tf_keras"):
    sys.modules[name] = None  # importing it is an error
sys.path.insert(0, sys.argv[1])
import json, pathlib, keras, numpy as np
import sbn_tf.metrics, sbn_tf.experiments.networks
import test_backends as here
from sbn_tf.core.prior import make_prior
from sbn_tf.layers import Dense
from sbn_tf.partial_bayes import BetaSchedule, LocScaleOptimizer
from sbn_tf.saliency import SaliencyRecorder, saliency, top_k

folder, (x, y) = pathlib.Path(sys.argv[2]), here.data()
found = {"backend": keras.backend.backend()}

# numbers: of a file of the other backend, then after one step at scales of nearly 0
loaded = keras.saving.load_model(folder / "of_tensorflow.keras")
found["loaded"] = here.numbers(loaded)
loaded.fit(x, y, batch_size=8, verbose=0)
found["one_step"] = here.numbers(loaded)
loaded.save(folder / "back.keras")

# saliency of the other backend's network; the three steps
network = keras.saving.load_model(folder / "network.keras")
found["scores"], found["three_steps"] = here.scores(network), here.three_steps()

# noise: differs between samples, between calls and between steps of a compiled function; same seed, same result
keras.utils.set_random_seed(0)
bnn, again = (here.bayesian(0.5, num_samples=2) for _ in range(2))
again.set_weights(bnn.get_weights())
first, second = (bnn.predict_samples(x) for _ in range(2))
found["between_samples"] = float(np.abs(first[0] - first[1]).max())
found["between_calls"] = float(np.abs(first - second).max())
found["between_predictions"] = float(np.abs(bnn.predict(x, verbose=0) - bnn.predict(x, verbose=0)).max())
again.predict_samples(x), again.predict_samples(x), again.predict(x, verbose=0), again.predict(x, verbose=0)
both = [m.fit(x, y, batch_size=4, shuffle=False, verbose=0).history["loss"] for m in (bnn, again)]
found["same_seed"] = both[0] == both[1] and bool(np.array_equal(bnn.scales(), again.scales()))
bnn.scales()
trained = bnn.predict_uncertainty(x)
found["entropies"] = bool(np.allclose(
    trained["total_entropy"], trained["expected_entropy"] + trained["mutual_information"], atol=1e-6
))
for layer in (bnn.network.get_layer("conv"), bnn.network.get_layer("head")):
    for name in layer.posteriors:  # the compiled prediction sees weights assigned after it was traced
        layer.posteriors[name].untransformed_scale.assign(-200.0 * np.ones(layer.num_bayesian[name]))
found["sees_new_weights"] = float(np.ptp(bnn.predict_samples(x), axis=0).max())

# every estimator, both optimisers, a schedule; at a rate of 0 only the noise differs between epochs
found["estimators"] = {}
for estimator in ("all", "split", "flipout", "local"):
    bnn = here.bayesian(0.5, num_samples=2, estimator=estimator)
    still = keras.optimizers.SGD(0.0)
    bnn.compile(still, "binary_crossentropy")
    losses = bnn.fit(x, y, epochs=2, batch_size=8, shuffle=False, verbose=0).history["loss"]
    found["estimators"][estimator] = losses
before = bnn.scales()
bnn.compile(LocScaleOptimizer(keras.optimizers.SGD(0.01)), "binary_crossentropy")
bnn.fit(x, y, epochs=2, verbose=0, callbacks=[BetaSchedule(1.0, 0.0, 2)])
found["beta"], found["scales_moved"] = bnn.beta, float(np.abs(bnn.scales() - before).min())

# half precision
keras.config.set_dtype_policy("mixed_bfloat16")
half = here.bayesian(0.1, num_samples=2, estimator="split")
found["bfloat16"] = half.fit(x, y, batch_size=8, verbose=0).history["loss"]
found["bfloat16_dtypes"] = sorted({v.dtype for v in half.trainable_variables} | {str(half.predict(x, verbose=0).dtype)})
keras.config.set_dtype_policy("float32")

# what needs TensorFlow says so in one line; what does not, works
def refused(call):
    try:
        call()
    except (ValueError, RuntimeError) as error:
        return str(error)
recorded = dict(verbose=0, callbacks=[SaliencyRecorder()])
layer = Dense(2, num_bayesian=2, kl_weight=1.0)
layer.build((None, 3))
found["refused"] = {
    "recorder": refused(lambda: network.fit(x, y, **recorded)),
    "export": refused(lambda: bnn.export(folder / "served")),
    "posterior": refused(lambda: layer.posteriors["kernel"].distribution),
    "prior_distribution": refused(lambda: make_prior(layer.posterior_options.prior)),
    "prior": refused(lambda: Dense(2, prior={"class_name": "Laplace", "config": {"loc": 0.0, "scale": 1.0}})),
}
found["not_finite"] = refused(lambda: saliency(network, [(x, y), (x * np.nan, y)], verbose=False))
found["command_line"] = here.command_line(folder / "command_line")
found["selected"] = int(top_k(saliency(network, score="magnitude"), 0.1).num_bayesian)
print(json.dumps(found))
"""


@pytest.fixture(scope="module", params=BACKENDS)
def found(request, tmp_path_factory):
    """What the script found on another backend, and beside it TensorFlow's numbers."""
    python_of(request.param)  # or skip
    folder = tmp_path_factory.mktemp(request.param)
    keras.utils.set_random_seed(0)
    bnn, (x, y) = bayesian(1e-7), data()
    bnn.save(folder / "of_tensorflow.keras")
    loaded = numbers(bnn)
    bnn.fit(x, y, batch_size=8, verbose=0)
    model = trained(folder / "network.keras")
    done = on(request.param, "-c", SCRIPT, TESTS, folder)
    assert done.returncode == 0, done.stderr[-4000:]
    other = keras.saving.load_model(folder / "back.keras")
    assert sbn_tf.load(folder / "command_line" / "out").predict(np.zeros((1, 9, 9, 1), "uint8"))[0].means["total"] >= 0
    ours = {"loaded": loaded, "one_step": numbers(bnn), "back": numbers(other), "scores": scores(model)}
    return json.loads(done.stdout.strip().splitlines()[-1]) | {"asked": request.param, "tensorflow": ours}


def test_it_needs_no_tensorflow(found):
    assert found["backend"] == found["asked"]


@pytest.mark.parametrize(("theirs", "ours"), [("loaded", "loaded"), ("one_step", "one_step"), ("one_step", "back")])
def test_both_backends_give_the_same_numbers(found, theirs, ours):
    other, tensorflow = found[theirs], found["tensorflow"][ours]
    assert other["masks"] == tensorflow["masks"]
    for key in ("mean", "scales", "kl"):
        np.testing.assert_allclose(other[key], tensorflow[key], rtol=1e-5, atol=1e-6, err_msg=key)
    assert not np.allclose(found["loaded"]["mean"], found["one_step"]["mean"], atol=1e-4)  # the step did something


def test_noise_differs_within_compiled_functions(found):
    for between in ("between_samples", "between_calls", "between_predictions"):
        assert found[between] > 1e-3, between
    for estimator, losses in found["estimators"].items():
        assert np.isfinite(losses).all() and abs(losses[0] - losses[1]) > 1e-4, estimator


def test_the_same_seed_gives_the_same(found):
    assert found["same_seed"]


def test_predictions_see_weights_changed_after_tracing(found):
    assert found["sees_new_weights"] < 1e-6


def test_entropies_add_up(found):
    assert found["entropies"]


def test_optimisers_and_schedule_act(found):
    assert found["beta"] == 0.0 and found["scales_moved"] > 1e-4


def test_half_precision_trains_and_predicts_in_float32(found):
    assert np.isfinite(found["bfloat16"]).all()
    assert found["bfloat16_dtypes"] == ["float32"]


@pytest.mark.parametrize("what", ["recorder", "export", "posterior", "prior_distribution", "prior"])
def test_what_needs_tensorflow_says_so_in_one_line(found, what):
    message = found["refused"][what]
    assert message and "\n" not in message
    assert re.search("TensorFlow|TFP", message), message


def test_saliency_is_that_of_tensorflow(found):
    assert_same_scores(found["scores"], found["tensorflow"]["scores"])


def test_a_loss_that_is_not_finite_is_found(found):
    ours = "Expected a finite loss. Received: NaN or infinity in batch 1. .*"
    torchs = "all elements of input should be between 0 and 1"  # its cross-entropy itself refuses a NaN
    assert re.fullmatch(torchs if found["backend"] == "torch" else ours, found["not_finite"])


def test_three_steps_from_end_to_end(found):
    steps = found["three_steps"]
    assert steps["finite"] and steps["shape"] == [8, 1] and steps["draws_differ"] > 1e-6
    assert steps["entries"] == [round(0.2 * (3 * 3 * 2 + 2 + 2 * 2 * 2 + 1))] * 2


def test_selection_by_magnitude_needs_no_gradient(found):
    assert found["selected"] == round(0.1 * (3 * 3 * 2 + 2 + 2 * 2 * 2 + 1))


def test_the_command_line_trains_and_predicts(found):
    done = found["command_line"]
    assert done["codes"] == [0, 0] and done["masks"] == 12
    assert {"nll", "dice", "train_seconds", "weight_bytes", "num_bayesian"} <= set(done["metrics"])
    assert not any("flops" in key for key in done["metrics"] if key != "paper_flops")  # TensorFlow's graphs are counted
    assert done["versions"] == sorted(("keras", "sbn_tf", found["backend"]))


DEVICES = """
import json, os, sys
os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=2"
sys.path.insert(0, sys.argv[1])
import numpy as np, jax, keras
import test_backends as here

def trained(distribution, **options):
    keras.distribution.set_distribution(distribution)
    keras.utils.set_random_seed(0)
    bnn = here.bayesian(0.3, num_samples=2, **options)
    losses = bnn.fit(*here.data(), batch_size=4, epochs=2, shuffle=False, verbose=0).history
    return [losses["loss"], losses["kl"], *(w.tolist() for w in bnn.get_weights() if w.dtype.kind == "f")]

kinds = ({"estimator": "all"}, {"estimator": "split"}, {"estimator": "split", "posterior": "members"})
both = [[trained(one, **kind) for one in (None, keras.distribution.DataParallel())] for kind in kinds]
print(json.dumps({"devices": jax.device_count(), "both": both}))
"""


def test_two_devices_of_jax_train_as_one_does():
    done = on("jax", "-c", DEVICES, TESTS)
    assert done.returncode == 0, done.stderr[-4000:]
    found = json.loads(done.stdout.strip().splitlines()[-1])
    assert found["devices"] == 2
    for one, two in found["both"]:  # losses, KL and all weights: the noise is that of the whole batch
        for single, parallel in zip(one, two, strict=True):
            np.testing.assert_allclose(parallel, single, rtol=1e-5, atol=1e-6)
