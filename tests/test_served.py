"""An exported network gives what the predictor gives, from raw pixels, in TensorFlow and in ONNX Runtime."""

import keras
import numpy as np
import pytest
import tensorflow as tf
from helpers import NETWORK_CARD

import sbn_tf
from sbn_tf import to_partial_bayes
from sbn_tf.experiments.predictor import NetworkCard, Predictor

COLOURS = {"channels": 3, "mean": [0.4, 0.5, 0.6], "sd": [0.2, 0.3, 0.1]}
CARD = {**NETWORK_CARD, **COLOURS, "num_samples": 3}
NAMES = {"mean": "probabilities"} | {name: name for name in ("entropy", "expected_entropy", "mutual_information")}


def made(task, posterior, temperature, turned=False):
    keras.utils.set_random_seed(0)
    layers = keras.layers
    first = [layers.Conv2D(4, 3, padding="same", activation="relu"), layers.BatchNormalization()]
    if task == "segmentation":
        classes, loss, shape = ["spot"], "binary_crossentropy", (16, 8, 8, 1)
        last = [
            layers.MaxPooling2D(),
            layers.Conv2DTranspose(3, 2, strides=2),
            layers.Conv2D(1, 1, activation="sigmoid"),
        ]
    else:
        classes, loss, shape = ["a", "b", "c"], "categorical_crossentropy", (16, 3)
        last = [layers.GlobalAveragePooling2D(), layers.Dense(3, "softmax")]
    network = keras.Sequential([keras.Input((8, 8, 3)), *first, *last])
    rng = np.random.default_rng(0)
    x = rng.normal(size=(16, 8, 8, 3)).astype("float32")
    y = np.eye(3)[np.arange(16) % 3] if shape == (16, 3) else rng.integers(0, 2, shape)
    options = {"initial_scale": 0.3} if posterior == "gaussian" else {}
    if posterior is not None:
        network = to_partial_bayes(
            network, r_bayes=0.5, data=(x, y.astype("float32")), loss=loss, posterior=posterior, num_samples=3, seed=1,
            verbose=False, **options,
        )  # fmt: skip
    card = {**CARD, "task": task, "classes": classes, "temperature": temperature, "turned": turned}
    return Predictor(network, NetworkCard.model_validate(card))


@pytest.fixture(
    scope="module",
    params=[
        ("segmentation", "gaussian", 1.5),
        ("multi-class", "members", 0.7),
        ("segmentation", None, 1.0),
        ("segmentation", "members", 1.0, True),
        ("segmentation", None, 1.0, True),
        ("multi-class", "gaussian", 1.0, True),
    ],
    ids=str,
)
def predictor(request):
    return made(*request.param)


@pytest.fixture(scope="module")
def pixels():
    return np.random.default_rng(1).integers(0, 256, (5, 8, 8, 3), "uint8")


def expected(predictor, pixels):
    found = predictor.predict(pixels)
    card = predictor.card
    drawn = card.num_samples if hasattr(predictor.model, "network") or card.turned else 1
    assert len(found[0].samples) == drawn
    return {name: np.stack([one.values[key] for one in found]) for name, key in NAMES.items()}


def test_a_saved_model_takes_pixels_and_has_the_same_draws_in_each_call(predictor, pixels, tmp_path):
    before = expected(predictor, pixels)
    predictor.export(tmp_path / "served")
    served = tf.saved_model.load(tmp_path / "served")
    for _ in range(2):
        found = served.serve(pixels.astype("float32"))
        assert set(found) == set(NAMES)
        for name, values in before.items():
            np.testing.assert_allclose(found[name], values, atol=1e-5)
    for name, values in expected(predictor, pixels).items():  # exporting changes nothing
        np.testing.assert_array_equal(values, before[name])
    if predictor.model.name != "sequential" and predictor.card.temperature != 1:
        assert before["mutual_information"].max() > 1e-4


def test_onnx_gives_the_same(predictor, pixels, tmp_path):
    pytest.importorskip("tf2onnx", reason="needs the extra sbn_tf[onnx]")
    runtime = pytest.importorskip("onnxruntime", reason="needs the extra sbn_tf[onnx]")
    predictor.export(tmp_path / "a.onnx", format="onnx")
    session = runtime.InferenceSession(tmp_path / "a.onnx")
    names = [output.name for output in session.get_outputs()]
    assert set(names) == set(NAMES) and [one.name for one in session.get_inputs()] == ["pixels"]
    found = dict(zip(names, session.run(None, {"pixels": pixels.astype("float32")}), strict=True))
    for name, values in expected(predictor, pixels).items():
        np.testing.assert_allclose(found[name], values, atol=1e-4)


def test_litert_gives_the_same(predictor, pixels, tmp_path):
    predictor.export(tmp_path / "a.tflite", format="litert")
    runner = tf.lite.Interpreter(str(tmp_path / "a.tflite")).get_signature_runner()
    found = runner(pixels=pixels[:1].astype("float32"))
    for name, values in expected(predictor, pixels[:1]).items():
        np.testing.assert_allclose(found[name], values, atol=1e-4)


def test_an_operation_that_onnx_has_not_is_refused(tmp_path):
    pytest.importorskip("tf2onnx", reason="needs the extra sbn_tf[onnx]")
    network = keras.Sequential(
        [keras.Input((8, 8, 3)), keras.layers.Conv2D(1, 1), keras.layers.Lambda(keras.ops.log1p)]
    )
    card = NetworkCard.model_validate({**CARD, "task": "segmentation", "classes": ["spot"], "temperature": 1.0})
    with pytest.raises(ValueError, match=r"operations that ONNX has.*Log1p"):
        Predictor(network, card).export(tmp_path / "a.onnx", format="onnx")
    assert not (tmp_path / "a.onnx").exists()


def test_what_cannot_be_exported_is_named(tmp_path, monkeypatch):
    predictor = made("segmentation", None, 1.0)
    with pytest.raises(ValueError, match="torch"):
        predictor.export(tmp_path / "a", format="torch")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r'tf2onnx.*\npip install "sbn_tf\[onnx\]"'):
        predictor.export(tmp_path / "a.onnx", format="onnx")


@pytest.mark.parametrize("format", ["onnx", "litert"])
def test_random_draws_go_to_no_format_that_cannot_draw(format, tmp_path):
    model = keras.Sequential([keras.Input((2,)), keras.layers.Dense(1, "sigmoid", name="d")])
    bayes = sbn_tf.to_partial_bayes(model, {"d/kernel": np.ones((2, 1), bool)}, num_train=4)
    with pytest.raises(ValueError, match=r"cannot draw random numbers\.\n.*sbn_tf.load"):
        bayes.export(tmp_path / "file", format=format)
    assert not (tmp_path / "file").exists()
