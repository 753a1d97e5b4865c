"""Data parallel: replicas train as one device does on the whole batch, but for their noise, which is their own."""

import json
import os
import socket
import subprocess
import sys

import keras
import numpy as np
import pytest

import sbn_tf.partial_bayes  # noqa: F401 (registers the classes of what is loaded)

# A network whose KL has its full weight over eight examples: counted twice, it would show in every number.
SETUP = """
import json, os, sys
import tensorflow as tf
{devices}
import keras, numpy as np
from sbn_tf import layers
from sbn_tf.partial_bayes import LocScaleOptimizer, to_partial_bayes
from sbn_tf.saliency import Masks, named_weights
{strategy}

x = np.random.default_rng(0).normal(size=(8, 3)).astype("float32")
y = (x[:, :1] > 0).astype("float32")

def bayesian(strategy, scale=1e-8, policy="float32", compiling=None, **options):
    keras.config.set_dtype_policy(policy)
    with strategy.scope():
        keras.utils.set_random_seed(0)
        inputs = keras.Input((3,))
        hidden = keras.layers.Dense(4, "tanh", kernel_regularizer="l2", name="hidden")(inputs)
        model = keras.Model(inputs, keras.layers.Dense(1, "sigmoid", name="head")(hidden))
        masks = Masks({{k: np.full(w.variable.shape, True) for k, w in named_weights(model).items()}})
        options = {{"num_train": 8, "num_samples": 2, "seed": 0, **options}}
        bnn = to_partial_bayes(model, masks, initial_scale=scale, **options)
        optimizer = LocScaleOptimizer(keras.optimizers.SGD(0.1), keras.optimizers.SGD(0.1))
        bnn.compile(optimizer, "binary_crossentropy", metrics=["mse"], **(compiling or {{}}))
    keras.config.set_dtype_policy("float32")
    return bnn

def numbers(bnn):
    return {{v.path: np.array(v).tolist() for v in bnn.trainable_variables}}

def trained(strategy, batch_size=8, epochs=1, **options):
    bnn = bayesian(strategy, **options)
    logs = bnn.fit(x, y, batch_size=batch_size, epochs=epochs, shuffle=False, verbose=0).history
    return bnn, {{"logs": logs, "weights": numbers(bnn)}}
"""

MIRRORED = (
    SETUP.format(
        devices="""
cpu = tf.config.list_physical_devices("CPU")[0]
tf.config.set_logical_device_configuration(cpu, [tf.config.LogicalDeviceConfiguration()] * 2)
""",
        strategy="""
single, mirrored = tf.distribute.get_strategy(), tf.distribute.MirroredStrategy(["CPU:0", "CPU:1"])
""",
    )
    + """
found = {}
for estimator in ("all", "split", "flipout", "local"):
    for name, strategy in (("single", single), ("mirrored", mirrored)):
        compiling = {"run_eagerly": strategy is single}  # of one step: quicker than its trace
        bnn, result = trained(strategy, estimator=estimator, compiling=compiling)
        if estimator == "all":
            result["evaluate"] = bnn.evaluate(x, y, batch_size=8, verbose=0, return_dict=True)
            result["predict"] = bnn.predict(x, batch_size=8, verbose=0).tolist()
            result["samples"] = bnn.predict_samples(x, 3, batch_size=8).tolist()
            result["uncertainty"] = {k: v.tolist() for k, v in bnn.predict_uncertainty(x, 3, batch_size=8).items()}
        found[f"{estimator} {name}"] = result

# Three examples: two for one replica, one for the other; then one, for the first alone.
for name, strategy in (("single", single), ("mirrored", mirrored)):
    bnn, found[f"odd {name}"] = bayesian(strategy, compiling={"run_eagerly": strategy is single}), []
    for weights in ([0.75, 0.75, 1.5], [0.5]):
        count, weighted = len(weights), {"sample_weight": np.array(weights)} if strategy is single else {}
        bnn.fit(x[:count], y[:count], batch_size=count, verbose=0, **weighted)
        found[f"odd {name}"].append(numbers(bnn))

for name in ("once", "again", "another seed"):
    bnn, found[name] = trained(mirrored, scale=0.5, batch_size=4, seed=int(name == "another seed"))
path = os.path.join(sys.argv[1], "mirrored.keras")
bnn.save(path)
loaded = keras.models.load_model(path)
found["loaded"] = numbers(loaded)
loaded.fit(x, y, verbose=0)
with layers.posterior_mean():
    found["predictions of both"] = [np.array(b.network(x)).tolist() for b in (bnn, keras.models.load_model(path))]
found["float16"] = trained(mirrored, policy="mixed_float16")[1]

found["refused"] = []
for compiling in ({"steps_per_execution": 2}, {"jit_compile": True}):
    try:
        bayesian(mirrored, compiling=compiling)
    except ValueError as error:
        found["refused"].append(str(error))

# The draws of each replica, read off a kernel whose loc is 0 and whose scale is 1.
from sbn_tf.core.wrapper import MaskedWrapper
with mirrored.scope():
    options = {"initial_scale": 1.0, "kl_weight": 0.0, "seed": 0}
    named = layers.Dense(40, use_bias=False, kernel_initializer="zeros", num_bayesian=1600, **options)
    inner = keras.layers.Dense(40, use_bias=False, kernel_initializer="zeros")
    inner.build((None, 40))
    wrapped = MaskedWrapper(inner, num_bayesian={"kernel": 1600}, **options)
for name, layer in (("named", named), ("wrapped", wrapped)):
    with mirrored.scope():
        model = keras.Sequential([keras.Input((40,)), layer])
    draw = tf.function(lambda: mirrored.run(lambda: model(tf.eye(40))))
    both = lambda: [np.array(one).ravel().tolist() for one in mirrored.experimental_local_results(draw())]
    found[f"draws {name}"] = both() + both()
print(json.dumps(found))
"""
)

WORKER = (
    SETUP.format(devices="strategy = tf.distribute.MultiWorkerMirroredStrategy()", strategy="")
    + """
found = {"replicas": strategy.num_replicas_in_sync}
bnn, found["split"] = trained(strategy, estimator="split")
bnn, found["all"] = trained(strategy)
found["all"]["evaluate"] = bnn.evaluate(x, y, batch_size=8, verbose=0, return_dict=True)
found["all"]["predict"] = bnn.predict(x, batch_size=8, verbose=0).tolist()
found["all"]["samples"] = bnn.predict_samples(x, 3, batch_size=8).tolist()
found["all"]["uncertainty"] = {k: v.tolist() for k, v in bnn.predict_uncertainty(x, 3, batch_size=8).items()}
bnn, found["noise"] = trained(strategy, scale=0.5, batch_size=4)
bnn.save(os.path.join(sys.argv[1], "worker.keras"))
print(json.dumps(found))
"""
)


def start(code, folder, **environment):
    arguments = [sys.executable, "-c", code, str(folder)]
    environment = {**os.environ, "TF_CPP_MIN_LOG_LEVEL": "3", **environment}
    return subprocess.Popen(arguments, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)


def results(processes):
    """The JSON that each process printed last."""
    try:
        outputs = [process.communicate(timeout=300) for process in processes]
    finally:
        for process in processes:
            process.kill()
    for process, (_, errors) in zip(processes, outputs, strict=True):
        assert process.returncode == 0, errors[-3000:]
    return [json.loads(printed.splitlines()[-1]) for printed, _ in outputs]


@pytest.fixture(scope="module")
def mirrored(tmp_path_factory):
    return results([start(MIRRORED, tmp_path_factory.mktemp("mirrored"))])[0]


def free_ports(count):
    sockets = [socket.socket() for _ in range(count)]
    for one in sockets:
        one.bind(("127.0.0.1", 0))
    ports = [one.getsockname()[1] for one in sockets]
    for one in sockets:
        one.close()
    return ports


@pytest.fixture(scope="module")
def workers(tmp_path_factory):
    """What each of two processes of `MultiWorkerMirroredStrategy` on this machine found, and their folders."""
    addresses = [f"127.0.0.1:{port}" for port in free_ports(2)]
    folders = [tmp_path_factory.mktemp(f"worker{index}") for index in range(2)]
    tasks = [{"cluster": {"worker": addresses}, "task": {"type": "worker", "index": index}} for index in range(2)]
    return results([start(WORKER, f, TF_CONFIG=json.dumps(t)) for f, t in zip(folders, tasks, strict=True)]), folders


def assert_close(seen, expected, rtol=1e-4, atol=1e-6):
    assert seen.keys() == expected.keys()
    for key, value in expected.items():
        if isinstance(value, dict):
            assert_close(seen[key], value, rtol, atol)
        else:
            np.testing.assert_allclose(seen[key], value, rtol=rtol, atol=atol, err_msg=key)


@pytest.mark.parametrize("estimator", ["all", "split", "flipout", "local"])
def test_two_replicas_train_as_one_device_does(mirrored, estimator):
    """Losses, KL, metrics, weights after a step, and what is predicted: as the scales go to 0 all equal."""
    assert_close(mirrored[f"{estimator} mirrored"], mirrored[f"{estimator} single"])


def test_a_first_batch_that_does_not_divide_among_the_replicas(mirrored):
    """Replicas count alike, as in Keras: one device with those weights of the examples takes the same steps."""
    for seen, expected in zip(mirrored["odd mirrored"], mirrored["odd single"], strict=True):
        assert_close(seen, expected)


def test_the_kl_is_counted_once(mirrored):
    """Its gradient of an untransformed scale is kl_weight (sigma - 1 / sigma) sigmoid(rho), here -1/8."""
    rho, sigma = np.log(np.expm1(1e-8)), 1e-8
    gradient = 1 / 8 * (sigma - 1 / sigma) / (1 + np.exp(-rho))
    assert gradient == pytest.approx(-1 / 8)
    weights = mirrored["all mirrored"]["weights"]
    scales = [value for key, value in weights.items() if "untransformed" in key]
    assert len(scales) == 4
    for scale in scales:
        np.testing.assert_allclose(scale, rho - 0.1 * gradient, rtol=1e-5)


def test_the_same_seed_gives_the_same_weights_bit_for_bit(mirrored):
    assert mirrored["once"] == mirrored["again"]
    assert mirrored["once"]["weights"] != mirrored["another seed"]["weights"]


def test_what_was_saved_under_a_strategy_loads_on_one_device(mirrored):
    assert mirrored["loaded"] == mirrored["another seed"]["weights"]
    np.testing.assert_array_equal(*mirrored["predictions of both"])


def test_replicas_in_mixed_precision(mirrored):
    """Within the rounding of 8 bits; under float16 the loss scale is around both optimisers."""
    expected = {key: mirrored["all single"][key] for key in ("logs", "weights")}
    assert_close(mirrored["float16"], expected, rtol=2**-7, atol=2**-7)


def test_several_steps_at_once_and_xla_are_refused(mirrored):
    assert len(mirrored["refused"]) == 2
    assert all(message.startswith("Expected steps_per_execution=1 and no XLA") for message in mirrored["refused"])


@pytest.mark.parametrize("kind", ["named", "wrapped"])
def test_replicas_draw_independent_noise(mirrored, kind):
    """1,600 draws of each replica in each of two calls: standard normal, and no two correlated."""
    draws = np.array(mirrored[f"draws {kind}"])
    assert draws.shape == (4, 1600)
    np.testing.assert_allclose(draws.mean(axis=1), 0, atol=4 / np.sqrt(1600))
    np.testing.assert_allclose(draws.var(axis=1), 1, atol=4 * np.sqrt(2 / 1600))
    correlations = np.corrcoef(draws)[np.triu_indices(4, 1)]
    np.testing.assert_allclose(correlations, 0, atol=4 / np.sqrt(1600))


def test_two_workers_train_as_two_replicas_of_one_process_do(mirrored, workers):
    """Also with noise: a replica's draws depend on its number alone."""
    for found in workers[0]:
        assert found["replicas"] == 2
        assert_close(found["all"], mirrored["all mirrored"])
        assert_close(found["split"], mirrored["split mirrored"])
        assert_close(found["noise"], mirrored["once"])


def test_what_a_worker_saved_loads_alone(workers):
    found, folders = workers
    for result, folder in zip(found, folders, strict=True):
        bnn = keras.models.load_model(folder / "worker.keras")
        for variable in bnn.trainable_variables:
            np.testing.assert_array_equal(variable, np.float32(result["noise"]["weights"][variable.path]))
