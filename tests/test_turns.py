"""Test-time augmentation: the eight symmetries of the square, against rotations and mirrors of NumPy."""

import keras
import numpy as np
import pytest

from sbn_tf import to_partial_bayes
from sbn_tf.core.sampled import SameDraws
from sbn_tf.core.turns import turn, turn_back, turned, turned_samples

IMAGES = np.arange(2 * 4 * 4 * 3).reshape(2, 4, 4, 3).astype("float32")


def test_the_eight_symmetries_are_the_turns_and_mirrors_of_numpy():
    mirrored = IMAGES[:, :, ::-1]
    expected = [np.rot90(images, k, axes=(1, 2)) for images in (IMAGES, mirrored) for k in range(4)]
    found = [turn(IMAGES, k) for k in range(8)]
    assert {a.tobytes() for a in found} == {np.ascontiguousarray(a).tobytes() for a in expected}
    assert len({a.tobytes() for a in found}) == 8
    np.testing.assert_array_equal(found[0], IMAGES)
    np.testing.assert_array_equal(found[1], np.flip(IMAGES, 2))
    np.testing.assert_array_equal(found[2], np.flip(IMAGES, 1))
    np.testing.assert_array_equal(found[4], IMAGES.transpose(0, 2, 1, 3))
    for k in range(8):
        np.testing.assert_array_equal(turn_back(found[k], k), IMAGES)


def test_a_network_that_commutes_with_symmetries_gives_the_same_eight_times():
    samples = turned_samples(lambda x: (x.sum(-1, keepdims=True) ** 2)[None], IMAGES, 8)
    assert samples.shape == (8, 2, 4, 4, 1)
    for sample in samples:
        np.testing.assert_array_equal(sample, IMAGES.sum(-1, keepdims=True) ** 2)


def test_member_s_sees_symmetry_s_modulo_8():
    seen = []

    def members(images):  # member m: the images as they came, plus 1,000 m
        seen.append(images)
        return np.stack([images + 1000 * m for m in range(10)])

    samples = turned_samples(members, IMAGES, 10)
    assert len(seen) == 10
    for m, sample in enumerate(samples):
        np.testing.assert_array_equal(sample, IMAGES + 1000 * m)
    ramp = np.linspace(0, 1, 4, dtype="float32")[:, None, None] * np.ones((2, 4, 4, 1), "float32")  # of rows
    weighted = turned_samples(lambda x: np.stack([ramp * (m + 1) for m in range(4)]), IMAGES, 4)
    for m, sample in enumerate(weighted):  # a map fixed to the frame turns with the image
        np.testing.assert_array_equal(sample, turn_back(ramp * (m + 1), m))


def test_maps_without_channels_are_turned_back_too():
    whole = turned_samples(lambda x: x[None], IMAGES, 8)
    np.testing.assert_array_equal(turned_samples(lambda x: x[None, ..., 0], IMAGES, 8), whole[..., 0])


def test_a_tensor_of_the_backend_turns_as_an_array_does():
    for k in range(8):
        np.testing.assert_array_equal(turn(keras.ops.convert_to_tensor(IMAGES), k), turn(IMAGES, k))
        np.testing.assert_array_equal(turn_back(keras.ops.convert_to_tensor(IMAGES), k), turn_back(IMAGES, k))
    samples = turned_samples(lambda x: keras.ops.convert_to_tensor(x)[None], IMAGES, 8)
    np.testing.assert_array_equal(samples[5], IMAGES)


def test_members_of_a_network_each_run_once():
    """As the members one by one, each under its own symmetry."""
    network = keras.Sequential(
        [keras.Input((8, 8, 1)), keras.layers.Conv2D(1, 3, padding="same", activation="sigmoid")]
    )
    masks = {f"{network.layers[0].name}/kernel": np.ones((3, 3, 1, 1), bool)}
    bayes = to_partial_bayes(network, masks, num_train=10, posterior="members", num_samples=3, seed=0)
    x = np.random.default_rng(0).normal(size=(2, 8, 8, 1)).astype("float32")
    together = bayes.predict_samples(x)
    for number in range(3):
        np.testing.assert_allclose(bayes.predict_draw(x, number), together[number], atol=1e-6)
    expected = turned_samples(bayes.predict_samples, x, 3)
    np.testing.assert_allclose(turned(SameDraws(bayes).one, x, 3), expected, atol=1e-6)


@pytest.mark.parametrize(("count", "says"), [(3, "at most 2"), (0, "num_samples")])
def test_more_samples_than_there_are_are_refused(count, says):
    with pytest.raises(ValueError, match=says):
        turned_samples(lambda x: np.stack([x, x]), IMAGES, count)
    with pytest.raises(ValueError, match="maps of the images' size"):
        turned_samples(lambda x: x[None, :, :2, :2], IMAGES, 2)


def test_labels_are_not_turned_back():
    samples = turned_samples(lambda x: x[None, :, 0, 0, :], IMAGES, 8)
    assert samples.shape == (8, 2, 3)
    np.testing.assert_array_equal(samples[0], IMAGES[:, 0, 0])
    np.testing.assert_array_equal(samples[1], IMAGES[:, 0, -1])  # mirrored left-right: the corner was on the right
    np.testing.assert_array_equal(samples[2], IMAGES[:, -1, 0])


def test_images_that_are_not_square_are_refused():
    with pytest.raises(ValueError, match=r"Expected square images for quarter turns. Received: \(2, 4, 3, 3\)"):
        turned_samples(lambda x: x[None], IMAGES[:, :, :3], 8)
