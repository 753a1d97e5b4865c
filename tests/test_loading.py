"""A file of ours opens in a process that has imported nothing else."""

import subprocess
import sys

import keras
import numpy as np

from sbn_tf import load
from sbn_tf.experiments.recipes import WeightedBinaryCrossentropy
from sbn_tf.partial_bayes import to_partial_bayes
from sbn_tf.saliency import saliency, top_k

READ = """
import sys
import keras
import sbn_tf
path = sys.argv[1]
model = sbn_tf.load(path)
assert type(model.loss).__name__ == "WeightedBinaryCrossentropy"
print(type(model).__name__, model.num_bayesian, model.loss.get_config()["pos_weight"])
assert model.input_shape == (None, 4) and model.output_shape == (None, 3)
assert sbn_tf.load(path, compile=False).loss is None
"""


def test_load_knows_our_models_and_the_losses_of_recipes(tmp_path):
    model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(3, "sigmoid")])
    bayes = to_partial_bayes(model, top_k(saliency(model, score="magnitude"), 0.4), num_train=10)
    bayes.compile("adam", WeightedBinaryCrossentropy(2.0))
    bayes.fit(np.ones((4, 4)), np.ones((4, 3)), verbose=0)
    bayes.save(tmp_path / "bayes.keras")
    command = [sys.executable, "-c", READ, str(tmp_path / "bayes.keras")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.split() == ["PartialBayes", "6", "2.0"]


def test_shapes_are_the_network_s_also_of_several_inputs_and_outputs(tmp_path):
    first, second = keras.Input((4,), name="first"), keras.Input((6, 6, 1), name="second")
    both = keras.layers.Concatenate()([first, keras.layers.Flatten()(second)])
    outputs = [keras.layers.Dense(2, "softmax", name="kind")(both), keras.layers.Dense(1)(both)]
    network = keras.Model([first, second], outputs)
    to_partial_bayes(network, {"kind/kernel": np.ones((40, 2), bool)}, num_train=10).save(tmp_path / "bayes.keras")
    model = load(tmp_path / "bayes.keras")
    assert model.input_shape == [(None, 4), (None, 6, 6, 1)] and model.output_shape == [(None, 2), (None, 1)]
