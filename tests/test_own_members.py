"""The members of `benchmarks/own_members.py`, against a stock batch norm and by turning back."""

import keras
import numpy as np
import own_members
import pandas as pd
import pytest
from helpers import table_of_page

from sbn_tf import to_partial_bayes, top_k
from sbn_tf.core.context import posterior_sample
from sbn_tf.core.turns import turn_back

IMAGES = np.random.default_rng(0).normal(size=(12, 4, 4, 3)).astype("float32")


@pytest.fixture
def network():
    keras.utils.set_random_seed(0)
    layers = [keras.layers.Conv2D(2, 3), keras.layers.BatchNormalization(momentum=0.9)]
    model = keras.Sequential([keras.Input((4, 4, 3)), *layers, keras.layers.Dense(1, name="last")])
    model.layers[1].set_weights(np.array([[1.0, 2.0], [0.5, 0.0], [0.1, -0.1], [2.0, 3.0]]))
    return model


@pytest.mark.parametrize("sample", [None, 3, np.int32(3)])
def test_members_start_with_the_network_s_batch_norm(network, sample):
    with posterior_sample(sample):
        found = own_members.with_own_norms(network)(IMAGES)
    np.testing.assert_allclose(found, network(IMAGES), atol=1e-5)


def test_a_member_s_batch_norm_trains_as_a_stock_one_and_the_others_stay(network):
    own = own_members.with_own_norms(network)
    with posterior_sample(own_members.NUM_MEMBERS + 3):  # as the count of steps goes on
        found = own(IMAGES, training=True)
    np.testing.assert_allclose(found, network(IMAGES, training=True), atol=1e-5)
    for one, other in zip(own.layers[1].get_weights(), network.layers[1].get_weights(), strict=True):
        np.testing.assert_allclose(one[3], other, rtol=1e-5)
    np.testing.assert_allclose(own.layers[1].moving_mean[0], [0.1, -0.1])


def test_each_part_of_a_batch_has_its_turn():
    found = own_members.each_its_turn(IMAGES)
    parts = [(0, 2), (2, 4), (4, 7), (7, 9), (9, 12)]  # of 12 images for five members
    back = [turn_back(found[start:stop], member) for member, (start, stop) in enumerate(parts)]
    np.testing.assert_array_equal(np.concatenate(back), IMAGES)
    np.testing.assert_array_equal(found[2:4], IMAGES[2:4, :, ::-1])  # the second sees mirrored images


def test_a_step_in_turn_trains_the_batch_norm_of_one_member(network):
    model = to_partial_bayes(
        own_members.with_own_norms(network), top_k({"last/kernel": np.ones((2, 1))}, 1.0), num_train=12,
        posterior="members", estimator="turns", initial_scale=0.1, verbose=False,
    )  # fmt: skip
    norm = model.network.layers[1]
    model.compile(keras.optimizers.Adam(0.1), "mse")
    for member in range(2):  # Adam has a momentum of the first member's in the second step
        before = [w.copy() for w in norm.get_weights()]
        model.fit(IMAGES, np.ones((12, 2, 2, 1)), batch_size=12, epochs=1, verbose=0)
        for old, new in zip(before, norm.get_weights(), strict=True):
            assert (new[member] != old[member]).all()
            np.testing.assert_array_equal(np.delete(new, member, 0), np.delete(old, member, 0))


def test_the_page_of_results_has_the_rows():
    rows = pd.read_csv(own_members.TABLE).set_index(["dataset", "method"])
    lines = table_of_page("What members could have of their own")
    columns = [("isic2018", "nll"), ("isic2018", "member_nll"), ("isic2018", "mutual_information"), ("lidc", "nll")]
    assert {name for name, *_ in lines} == set(rows.index.get_level_values("method"))
    for name, *cells in lines:
        for cell, (dataset, key) in zip(cells, columns, strict=True):
            made = (dataset, name) in rows.index
            expected = f"{rows.loc[(dataset, name), key]:.4f}".lstrip("0") if made else "-"
            assert cell == expected, (name, key)


def test_own_weights_move_at_a_multiple_of_the_rate():
    shared, own = (keras.Variable([0.0], name=name) for name in ("kernel", "member_offsets"))
    optimizer = own_members.AdamApart(0.01, 3.0)
    optimizer.build([shared, own])
    optimizer.apply([np.array([2.0], "float32"), np.array([-5.0], "float32")], [shared, own])
    # Adam's first step is the rate, against the gradient's sign.
    np.testing.assert_allclose([float(shared[0]), float(own[0])], [-0.01, 0.03], rtol=1e-4)
