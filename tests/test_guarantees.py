"""Tests of what the card of a network keeps of its validation images, and of `sbn-tf predict --alpha --refer`."""

import numpy as np
import pytest
from PIL import Image
from test_predict import plain, write_image

from sbn_tf.core import conformal
from sbn_tf.datasets.base import Split
from sbn_tf.experiments import predict
from sbn_tf.experiments.guarantees import CUTS, Calibration, calibrated
from sbn_tf.experiments.predict import Decider
from sbn_tf.experiments.predictor import Prediction

RNG = np.random.default_rng(0)


def split_of(task, targets, groups=None):
    """Images of nothing with these targets."""
    num, side = len(targets), targets.shape[1] if task == "segmentation" else 4
    valid = np.ones((num, targets.shape[-1]), bool) if task == "segmentation" else None
    images = np.zeros((num, side, side, 1), "uint8")
    return Split("val", task, images, targets.astype("uint8"), rater_valid=valid, groups=groups)


def calibration_of(task, targets, probs, groups=None):
    """Total uncertainty: the number of the image."""
    pairs = [(one, float(i)) for i, one in enumerate(probs)]
    return calibrated(split_of(task, targets, groups), pairs, 0.5)


def card_of(task, outputs, calibration):
    return plain(task, outputs).card.model_copy(update={"calibration": calibration})


def prediction(card, probs, total=0.0):
    names = ("entropy", "expected_entropy", "mutual_information")
    return Prediction(card, None, {"probabilities": np.asarray(probs), **dict.fromkeys(names, total)}, None)


def test_a_card_keeps_the_scores_of_the_true_classes():
    probs = np.array([[0.7, 0.2, 0.1], [0.6, 0.3, 0.1], [0.1, 0.8, 0.1], [0.2, 0.2, 0.6]])
    found = calibration_of("multi-class", np.eye(3)[[0, 1, 1, 2]], probs, np.array(["b", "a", "a", "b"]))
    assert (found.unit, found.num, found.owners, found.total) == ("patients", 2, (1, 0, 0, 1), (0, 1, 2, 3))
    assert found.images == ((0,), (1, 2), (3,)) and found.error == (False, True, False, False)
    for scores, expected in zip(found.scores, [[0.3], [0.7, 0.2], [0.4]], strict=True):
        np.testing.assert_allclose(scores, expected)
    assert Calibration.model_validate_json(found.model_dump_json()) == found


def test_a_binary_card_has_the_label_and_its_absence():
    found = calibration_of("binary", np.array([[1], [0], [0]]), np.array([[0.7], [0.2], [0.9]]))
    np.testing.assert_allclose(found.scores[1], [0.3])
    np.testing.assert_allclose(found.scores[0], [0.2, 0.9])
    card = card_of("binary", 1, found)
    decider = Decider(card, 0.5)  # one image of a class is enough: limits .9 of "not", .3 of the label
    found = {p: decider.columns(prediction(card, [p]))["set"] for p in (0.05, 0.6, 0.8, 0.95)}
    assert found == {0.05: "not c0", 0.6: "not c0", 0.8: "not c0;c0", 0.95: "c0"}


def test_a_label_with_few_images_is_in_every_set():
    targets = np.zeros((12, 2))
    targets[:10, 0], targets[3, 1] = 1, 1
    probs = np.full((12, 2), 0.5)
    probs[:10, 0] = np.arange(10) / 10
    card = card_of("multi-label", 2, calibration_of("multi-label", targets, probs))
    decider = Decider(card, 0.2)  # ceil(11 * 0.8) = the 9th of 1 - p: 0.9
    assert decider.columns(prediction(card, [0.11, 0.0])) == {"set": "c0;c1"}
    assert decider.columns(prediction(card, [0.09, 0.0])) == {"set": "c1"}
    assert "always with c1" in decider.promises()[1]


def test_a_card_of_masks_keeps_what_is_missed():
    """Three raters: their majority counts; two images of one patient weigh as one."""
    masks = RNG.random((5, 6, 6, 3)) < 0.4
    masks[4] = False
    probs = RNG.random((5, 6, 6))
    owner = np.array([0, 0, 1, 2, 3])
    found = calibration_of("segmentation", masks, probs, owner)
    truth = masks.sum(-1) >= 2
    missed = [
        [(one[true] < cut).mean() if true.any() else 0 for cut in CUTS] for one, true in zip(probs, truth, strict=True)
    ]
    means = [np.mean([missed[i] for i in np.flatnonzero(owner == k)], 0) for k in range(4)]
    np.testing.assert_allclose(found.missed, np.mean(means, 0))
    dices = [
        2 * (true & (one > 0.5)).sum() / (true.sum() + (one > 0.5).sum())
        for one, true in zip(probs, truth, strict=True)
    ]
    assert found.error == tuple(one < 0.5 for one in dices)
    at = found.cut(0.4)
    allowed = [cut for cut, risk in zip(CUTS, found.missed, strict=True) if (4 * risk + 1) / 5 <= 0.4]
    assert at == max(allowed) > 0


def test_referral_takes_one_image_of_each_patient():
    targets, probs = np.eye(2)[np.zeros(60, int)], np.tile([[0.9, 0.1]], (60, 1))
    owner = np.arange(60) // 2
    found = calibration_of("multi-class", targets, probs, owner)
    assert found.refer_limit(0.1) == np.inf
    with pytest.raises(ValueError, match=r"Expected 45 or more .*Received: 30"):
        found.refer_limit(0.05)
    probs[48:] = 0.1, 0.9  # unsure and wrong
    card = card_of("multi-class", 2, calibration_of("multi-class", targets, probs))
    decider = Decider(card, refer=0.1)
    chosen = conformal.refer_limit(np.arange(60), np.arange(60) >= 48, 0.1)
    assert chosen == 48  # of the shares 70 % to 100 %
    assert [decider.columns(prediction(card, [1, 0], at))["refer"] for at in (chosen - 1, chosen)] == [False, True]
    lost = Decider(card_of("multi-class", 2, calibration_of("multi-class", 1 - targets, probs)), refer=0.1)
    assert lost.columns(prediction(card, [1, 0]))["refer"] and lost.promises()[0].startswith("refer: all")


def test_sets_hold_for_new_images():
    """A network that knows the probabilities: each class is in its sets as often as promised, or more."""
    probs = RNG.dirichlet(np.full(3, 0.7), size=4000)
    truth = (RNG.random((4000, 1)) > np.cumsum(probs, 1)).sum(1).clip(max=2)
    covered = np.zeros((8, 3))
    for run in range(8):
        part = slice(500 * run, 500 * run + 250)
        new = slice(500 * run + 250, 500 * run + 500)
        found = calibration_of("multi-class", np.eye(3)[truth[part]], probs[part])
        inside = 1 - probs[new] <= found.limits(0.1, "multi-class")
        covered[run] = [inside[truth[new] == k, k].mean() for k in range(3)]
    spread = covered.std(0, ddof=1) / np.sqrt(8)
    assert (covered.mean(0) > 0.9 - 3 * spread).all() and (covered.mean(0) < 0.96).all()


def test_a_folder_gets_sets_masks_and_referrals(tmp_path):
    for i in range(3):
        write_image(tmp_path / "in" / f"{i}.png", 9, 12, i)
    one = plain()
    card = card_of(
        "segmentation", 1, calibration_of("segmentation", RNG.random((60, 8, 8, 1)) < 0.5, RNG.random((60, 8, 8)))
    )
    one.card = card
    table = predict.predict_folder(one, tmp_path / "in", tmp_path / "out", alpha=0.1, refer=0.9)
    decider = Decider(card, 0.1, 0.9)
    assert table["refer"].tolist() == [found.means["total"] >= decider.most for found in one.predict(tmp_path / "in")]
    for i, found in enumerate(one.predict(tmp_path / "in")):
        mask = np.asarray(Image.open(tmp_path / "out" / "masks_fnr" / f"{i}.png.png"))
        np.testing.assert_array_equal(mask > 0, found.probabilities >= decider.cut)
    with pytest.raises(ValueError, match="begun with"):
        predict.predict_folder(one, tmp_path / "in", tmp_path / "out", alpha=0.2)
    with pytest.raises(ValueError, match=r"Expected 99 or more .*Received: 60"):
        predict.predict_folder(one, tmp_path / "in", tmp_path / "new", alpha=0.01)
    with pytest.raises(ValueError, match="Expected a network with a calibration"):
        predict.predict_folder(plain(), tmp_path / "in", tmp_path / "new", refer=0.1)
    assert not (tmp_path / "new").exists()
    labels = plain("multi-class", 3)
    targets = np.eye(3)[np.arange(60) % 3]
    labels.card = card_of("multi-class", 3, calibration_of("multi-class", targets, RNG.dirichlet([1, 1, 1], 60)))
    table = predict.predict_folder(labels, tmp_path / "in", tmp_path / "sets", alpha=0.1)
    assert all(set(row.split(";")) <= {"c0", "c1", "c2"} for row in table["set"])
