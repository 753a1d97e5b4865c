"""Keras's torch backend: the saliency is that of TensorFlow, and the three steps run from end to end.

A backend is chosen once a process, so torch runs in another one.
"""

import importlib.util
import json
import os
import subprocess
import sys

import pytest
from test_jax import TESTS, assert_same_scores, scores, trained

pytestmark = pytest.mark.skipif(importlib.util.find_spec("torch") is None, reason="torch is not installed")

SCRIPT = """
import json, sys
sys.path.insert(0, sys.argv[1])
import keras
import test_jax as here
model = keras.saving.load_model(sys.argv[2])
print(json.dumps({"backend": keras.backend.backend(), "scores": here.scores(model), "steps": here.three_steps()}))
"""


def test_saliency_and_three_steps(tmp_path):
    model = trained(tmp_path / "network.keras")
    environment = {**os.environ, "KERAS_BACKEND": "torch"}
    command = [sys.executable, "-c", SCRIPT, str(TESTS), str(tmp_path / "network.keras")]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr[-4000:]
    found = json.loads(done.stdout.strip().splitlines()[-1])
    assert found["backend"] == "torch" and found["steps"]["finite"] and found["steps"]["draws_differ"] > 1e-6
    assert found["steps"]["entries"][0] == found["steps"]["entries"][1]
    assert_same_scores(found["scores"], scores(model))
