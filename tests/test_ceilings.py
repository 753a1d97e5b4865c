"""What can be reached at best: by hand, on a few pixels and raters; and what networks may not beat."""

import numpy as np
import pytest

from sbn_tf import datasets, metrics
from sbn_tf.datasets import MULTI_LABEL, SEGMENTATION, Split
from sbn_tf.experiments import scoring
from sbn_tf.experiments.ceilings import LEVELS, ceilings


def masks_of(*rows):
    """`(1, 2, 2, raters)` from the pixels of each rater."""
    return np.array(rows, "uint8").T.reshape(1, 2, 2, len(rows))


def split(targets, valid=None, truth_probs=None):
    images = np.zeros((len(targets), 2, 2, 1), "uint8")
    return Split("test", SEGMENTATION, images, targets, rater_valid=valid, truth_probs=truth_probs)


def test_one_rater_against_the_majority_of_the_others_by_hand():
    rows = ceilings(split(masks_of([1, 1, 0, 0], [1, 0, 0, 0], [1, 1, 1, 0])))
    # Against {2, 3}: a tie counts, majority {0, 1, 2}; against {1, 3}: {0, 1, 2}; against {1, 2}: {0, 1}.
    assert rows["one rater"]["dice"] == pytest.approx(np.mean([4 / 5, 2 / 4, 4 / 5]))
    assert rows["one rater"]["iou"] == pytest.approx(np.mean([2 / 3, 1 / 3, 2 / 3]))
    assert "half the raters" not in rows and "scene" not in rows


def test_half_the_raters_by_hand():
    same = masks_of([1, 1, 0, 0], [1, 0, 0, 0], [1, 1, 0, 0], [1, 0, 0, 0])
    assert ceilings(split(same))["half the raters"]["ged"] == pytest.approx(0)
    apart = masks_of([1, 0, 0, 0], [1, 0, 0, 0], [0, 0, 0, 1], [0, 0, 0, 1])
    assert ceilings(split(apart))["half the raters"]["ged"] == pytest.approx(2)  # 2 * 1 - 0 - 0


def test_images_that_not_all_raters_saw_do_not_count():
    masks = np.concatenate([masks_of([1, 1, 0, 0], [1, 1, 0, 0]), masks_of([0, 0, 1, 1], [1, 1, 0, 0])])
    every = np.ones((2, 2), bool)
    assert ceilings(split(masks, every))["one rater"]["dice"] == pytest.approx(0.5)
    assert ceilings(split(masks, np.array([[True, True], [True, False]])))["one rater"]["dice"] == 1
    assert ceilings(split(masks, np.array([[True, False], [False, True]]))) == {}


def test_the_scene_s_loss_by_hand():
    p = np.array([[0.5, 0.25, 0.0, 1.0]], "float32").reshape(1, 2, 2, 1)
    rows = ceilings(split(masks_of([1, 0, 0, 1]), truth_probs=p))
    assert rows["scene"]["nll"] == pytest.approx(-(np.log(0.5) + np.log(0.75)) / 4, rel=1e-4)
    assert rows["scene"]["brier"] == pytest.approx((0.25 + 0.0625) / 4, rel=1e-5)
    assert set(rows) == {"scene"}  # one rater: nothing to compare


def test_level_sets_are_masks_at_thresholds():
    p = np.array([[0.95, 0.6, 0.2, 0.0]], "float32").reshape(1, 2, 2, 1)
    raters = masks_of([1, 0, 0, 0], [1, 1, 0, 0], [1, 1, 0, 0], [1, 1, 1, 0])
    samples = [[float(level < value) for value in p.ravel()] for level in LEVELS]
    expected = metrics.generalised_energy_distance(raters, np.array(samples).reshape(5, 1, 2, 2))
    assert ceilings(split(raters, truth_probs=p))["level sets"]["ged"] == pytest.approx(expected[0])


@pytest.mark.parametrize("name", ["phantom_chest", "phantom_lesion", "phantom_nodule"])
def test_no_other_probabilities_do_better_than_the_scene_s(name):
    """A proper score is best at the truth: any blur of it, or any shift of its logits, costs."""
    test = datasets.load(name, num_train=2, num_val=2, size=16).test
    best = ceilings(test)["scene"]
    prevalence = scoring.prevalence(test.task, test.targets)
    prevalence = prevalence if test.task == MULTI_LABEL else prevalence[None, ..., None]
    logits = np.log(np.clip(test.truth_probs, 1e-4, 1 - 1e-4) / np.clip(1 - test.truth_probs, 1e-4, 1 - 1e-4))
    others = {
        "blurred": 0.8 * test.truth_probs + 0.2 * prevalence,
        "too sure": 1 / (1 + np.exp(-2 * logits)),
        "too shy": 1 / (1 + np.exp(-logits / 2)),
        "shifted": 1 / (1 + np.exp(-logits - 0.7)),
    }
    for probs in others.values():
        row = scoring.evaluate(probs[None], test.targets, test.task)
        assert row["nll"] > best["nll"] and row["brier"] > best["brier"]


def test_labels_have_no_raters():
    images = np.zeros((4, 2, 2, 1), "uint8")
    assert ceilings(Split("test", MULTI_LABEL, images, np.eye(4, dtype="uint8"))) == {}
