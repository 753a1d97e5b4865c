"""Scores: against scikit-learn, scipy, sums by hand, and laws; in pieces, weighted, resampled and paired."""

import json
import tracemalloc

import numpy as np
import pytest
from scipy import ndimage, stats
from sklearn import metrics as sk

from sbn_tf import datasets, metrics
from sbn_tf.datasets.arrays import DiskArray
from sbn_tf.datasets.base import Split
from sbn_tf.experiments import records, scoring, shifts, trivial
from sbn_tf.experiments.records import shift_auroc

RNG = np.random.default_rng(0)
LABELS = (RNG.random((60, 5)) < [0.5, 0.3, 0.2, 0.1, 0.05]).astype("uint8")
LABELS[0], LABELS[1] = 1, 0
LABEL_PROBS = RNG.beta(1, 3, (4, 60, 5)).astype("float32")
MASKS = (RNG.random((6, 8, 10, 3)) < RNG.random((6, 8, 10, 1)) ** 2).astype("uint8")
MASK_PROBS = RNG.beta(0.5, 1, (4, 6, 8, 10)).astype("float32")
CLASSES = np.repeat(np.arange(4), [30, 15, 10, 5])
ONE_HOT = np.eye(4, dtype="uint8")[CLASSES]
CLASS_PROBS = RNG.dirichlet([0.6, 0.5, 0.5, 0.4], (3, 60)).astype("float32") * 0.8 + 0.2 * ONE_HOT
VALID = np.array([[1, 1, 1], [1, 1, 0], [1, 0, 0], [0, 1, 1], [1, 1, 1], [0, 0, 1]], bool)
STATE = RNG.bit_generator.state


@pytest.fixture(autouse=True)
def same_draws():
    """Whichever tests run, each draws the same numbers."""
    RNG.bit_generator.state = STATE


def floats(row):
    return {key: value for key, value in row.items() if key != "undefined"}


def assert_same(one, two):
    assert one["undefined"] == two["undefined"]
    assert floats(one) == pytest.approx(floats(two), rel=1e-9, abs=1e-12)


# Multi-label


def test_multi_label_agrees_with_scikit_learn():
    row = scoring.evaluate(LABEL_PROBS, LABELS, "multi-label")
    mean = LABEL_PROBS.astype("float64").mean(0)
    flat, true = mean.ravel(), LABELS.ravel()
    assert row["auc"] == pytest.approx(sk.roc_auc_score(LABELS, mean, average="macro"))
    assert row["average_precision"] == pytest.approx(sk.average_precision_score(LABELS, mean, average="macro"))
    assert row["auc_num_labels"] == 5
    assert row["nll"] == pytest.approx(sk.log_loss(true, flat))
    assert row["brier"] == pytest.approx(sk.brier_score_loss(true, flat))
    assert row["accuracy"] == pytest.approx(sk.accuracy_score(true, flat > 0.5))


def test_labels_without_both_classes_are_left_out_of_the_auc():
    labels = LABELS.copy()
    labels[:, 1], labels[:, 3] = 0, 1
    row = scoring.evaluate(LABEL_PROBS, labels, "multi-label")
    kept = [0, 2, 4]
    assert row["auc_num_labels"] == 3
    assert row["auc"] == pytest.approx(sk.roc_auc_score(labels[:, kept], LABEL_PROBS.mean(0)[:, kept]), rel=1e-6)
    row = scoring.evaluate(LABEL_PROBS, np.zeros_like(labels), "multi-label")
    assert row["auc_num_labels"] == 0
    assert "auc" not in row and "average_precision" not in row
    assert row["undefined"]["auc"] == "no label occurs as both 0 and 1"


def test_brier_skill_is_against_the_training_prevalence():
    frequency = scoring.prevalence("multi-label", LABELS)
    row = scoring.evaluate(LABEL_PROBS, LABELS, "multi-label", train_prevalence=frequency)
    reference = ((frequency - LABELS) ** 2).mean()
    assert row["brier_skill"] == pytest.approx(1 - row["brier"] / reference)
    row = scoring.evaluate(LABEL_PROBS, LABELS, "multi-label")
    assert row["undefined"]["brier_skill"] == "train_prevalence was not given"
    perfect = scoring.evaluate(LABELS[None].astype(float), LABELS, "multi-label", train_prevalence=frequency)
    assert perfect["brier_skill"] == 1 and perfect["auc"] == 1 and perfect["ece"] == 0


def test_a_samples_own_nll_is_the_mean_of_scikit_learns():
    row = scoring.evaluate(LABEL_PROBS, LABELS, "multi-label")
    each = [sk.log_loss(LABELS.ravel(), probs.ravel()) for probs in LABEL_PROBS.astype("float64")]
    assert row["member_nll"] == pytest.approx(np.mean(each)) and row["member_nll"] > row["nll"]
    row, whole = scoring.evaluate(CLASS_PROBS, ONE_HOT, "multi-class"), CLASS_PROBS.astype("float64")
    whole /= whole.sum(-1, keepdims=True)
    assert row["member_nll"] == pytest.approx(np.mean([sk.log_loss(CLASSES, probs) for probs in whole]))


# Binary, and classes that exclude one another


def test_binary_is_multi_label_with_one_label_less_the_papers_metrics():
    probs, labels = LABEL_PROBS[..., :1], LABELS[:, :1]
    row = scoring.evaluate(probs, labels, "binary", train_prevalence=0.4)
    same = scoring.evaluate(probs, labels, "multi-label", train_prevalence=0.4)
    assert {key for key in same if key not in row} == {
        "paper_accuracy",
        "paper_brier",
        "paper_entropy",
        "paper_ece",
    }
    assert_same(row, {key: same[key] for key in row})
    mean = probs.astype("float64").mean(0)
    assert row["auc"] == pytest.approx(sk.roc_auc_score(labels, mean))
    assert row["average_precision"] == pytest.approx(sk.average_precision_score(labels, mean))


@pytest.mark.parametrize("task", ["multi-class", "ordinal"])
def test_classes_agree_with_scikit_learn_and_scipy(task):
    row = scoring.evaluate(CLASS_PROBS, ONE_HOT, task)
    samples = CLASS_PROBS.astype("float64")
    samples /= samples.sum(-1, keepdims=True)
    mean = samples.mean(0)
    assert row["accuracy"] == pytest.approx(sk.accuracy_score(CLASSES, mean.argmax(1)))
    assert row["auc"] == pytest.approx(sk.roc_auc_score(CLASSES, mean, multi_class="ovr"))
    assert row["average_precision"] == pytest.approx(sk.average_precision_score(ONE_HOT, mean, average="macro"))
    assert row["auc_num_labels"] == 4
    assert row["nll"] == pytest.approx(sk.log_loss(CLASSES, mean))
    brier = sum((mean[i, k] - ONE_HOT[i, k]) ** 2 for i in range(60) for k in range(4)) / 60
    assert row["brier"] == pytest.approx(brier)
    assert row["entropy"] == pytest.approx(stats.entropy(mean, axis=1).mean())
    assert row["expected_entropy"] == pytest.approx(stats.entropy(samples, axis=2).mean())
    assert row["mutual_information"] == pytest.approx(row["entropy"] - row["expected_entropy"], abs=1e-9)
    assert not [key for key in row if key.startswith("paper_")]
    grades = {"mean_absolute_error", "quadratic_kappa"}
    assert grades & set(row) == (grades if task == "ordinal" else set())


@pytest.mark.parametrize("task", ["multi-class", "ordinal"])
def test_ties_of_classes_stay_ties(task):
    # Of the second class 1e-9 beats 0 by nothing that a division of [1, 1e-9, 0] by its sum may take away or add.
    probs = np.array([[1, 1e-9, 0], [1, 0, 0], [0, 1, 0], [0, 0, 1]])
    targets = np.eye(3, dtype="uint8")[[1, 0, 1, 2]]
    areas = [sk.roc_auc_score(targets[:, i], probs[:, i]) for i in range(3)]
    assert np.mean(areas) == pytest.approx(17 / 18)
    assert scoring.evaluate(probs[None], targets, task)["auc"] == pytest.approx(17 / 18)
    for seed in range(20):  # saturated float32 softmaxes: many are 1, and sum to 1 but for rounding
        random = np.random.default_rng(seed)
        odds = np.exp(random.normal(size=(50, 4), scale=30).clip(-80, 80).astype("float32"))
        probs = odds / odds.sum(1, keepdims=True)
        targets = np.eye(4, dtype="uint8")[random.integers(0, 4, 50)]
        row = scoring.evaluate(probs[None], targets, task)
        for key, score in (("auc", sk.roc_auc_score), ("average_precision", sk.average_precision_score)):
            assert row[key] == pytest.approx(np.mean([score(targets[:, i], probs[:, i]) for i in range(4)]), abs=1e-12)
        each = [metrics.ece(targets[:, i], probs[:, i], binning="mass") for i in range(4)]
        assert row["ece_label_mass"] == pytest.approx(np.mean(each), abs=1e-12)
        assert row["entropy"] == pytest.approx(stats.entropy(probs.astype("float64"), axis=1).mean(), abs=1e-12)


def test_grades_agree_with_scikit_learn():
    row = scoring.evaluate(CLASS_PROBS, ONE_HOT, "ordinal")
    predicted = CLASS_PROBS.mean(0).argmax(1)
    assert row["mean_absolute_error"] == pytest.approx(sk.mean_absolute_error(CLASSES, predicted))
    assert row["quadratic_kappa"] == pytest.approx(sk.cohen_kappa_score(CLASSES, predicted, weights="quadratic"))


def test_grades_that_are_all_the_same_have_no_kappa():
    targets = np.tile(np.eye(3, dtype="uint8")[1], (5, 1))
    row = scoring.evaluate(targets[None] * 1.0, targets, "ordinal")
    assert "quadratic_kappa" not in row and row["undefined"]["quadratic_kappa"].startswith("every grade")
    assert row["undefined"]["auc"] == "no label occurs as both 0 and 1"
    assert row["mean_absolute_error"] == row["nll"] == 0 and row["accuracy"] == 1


def test_the_ece_of_classes_is_of_the_most_probable_one_by_hand():
    # Confidences .5 and .52 share a bin of 1/15, the first right; .9 wrong; 1.0 right, in the last bin with .96, right.
    probs = np.array([[0.5, 0.3, 0.2], [0.24, 0.52, 0.24], [0.05, 0.05, 0.9], [0, 1, 0], [0.96, 0.02, 0.02]])
    targets = np.eye(3, dtype="uint8")[[0, 0, 1, 1, 0]]
    row = scoring.evaluate(probs[None], targets, "multi-class")
    assert row["ece"] == pytest.approx((abs(1.02 - 1) + 0.9 + abs(1.96 - 2)) / 5)


def test_a_class_that_does_not_occur_is_left_out_of_the_auc():
    probs = np.concatenate([CLASS_PROBS * 0.9, np.full((3, 60, 1), 0.1, "float32")], -1)
    row = scoring.evaluate(probs, np.pad(ONE_HOT, ((0, 0), (0, 1))), "multi-class")
    assert row["auc_num_labels"] == 4
    assert row["auc"] == pytest.approx(scoring.evaluate(CLASS_PROBS, ONE_HOT, "multi-class")["auc"])


@pytest.mark.parametrize("task", ["multi-class", "ordinal"])
def test_trivial_rows_of_classes_by_hand(task):
    rows = trivial.trivial(task, ONE_HOT, ONE_HOT[::-1][:40])  # of 40: 10, 15, 10, 5
    assert list(rows) == ["most_frequent", "prevalence"]
    frequency = np.array([30, 15, 10, 5]) / 60
    np.testing.assert_allclose(scoring.prevalence(task, ONE_HOT), frequency)
    most, by_chance = rows["most_frequent"], rows["prevalence"]
    assert most["accuracy"] == by_chance["accuracy"] == 10 / 40
    assert most["brier"] == pytest.approx(2 * 30 / 40)
    assert most["nll"] == pytest.approx(30 / 40 * -np.log(1e-7))
    assert by_chance["nll"] == pytest.approx(-(np.array([10, 15, 10, 5]) / 40 * np.log(frequency)).sum())
    assert by_chance["entropy"] == pytest.approx(stats.entropy(frequency))
    assert by_chance["brier_skill"] == 0 and by_chance["auc"] == most["auc"] == 0.5
    expected = np.square(frequency).sum() + 1 - 2 * (np.array([10, 15, 10, 5]) / 40 * frequency).sum()
    assert by_chance["brier"] == pytest.approx(expected)
    if task == "ordinal":
        assert most["mean_absolute_error"] == pytest.approx((15 * 1 + 10 * 2 + 5 * 3) / 40)
        assert most["quadratic_kappa"] == pytest.approx(0)


def test_trivial_rows_of_a_binary_task():
    rows = trivial.trivial("binary", LABELS[:, :1], LABELS[:, :1])
    assert list(rows) == ["all_negative", "prevalence"]
    assert rows["all_negative"]["accuracy"] == pytest.approx(1 - LABELS[:, 0].mean())


# Segmentation


def test_segmentation_scores_are_means_over_valid_raters():
    row = scoring.evaluate(MASK_PROBS, MASKS, "segmentation", rater_valid=VALID)
    mean = MASK_PROBS.astype("float64").mean(0)
    nll, brier, paper_brier, paper_dice, paper_iou = [], [], [], [], []
    for image in range(6):
        raters = np.flatnonzero(VALID[image])
        truths = [MASKS[image, ..., rater] for rater in raters]
        nll.append(np.mean([sk.log_loss(y.ravel(), mean[image].ravel(), labels=[0, 1]) for y in truths]))
        brier.append(np.mean([((mean[image] - y) ** 2).mean() for y in truths]))
        paper_brier.append(np.mean([metrics.paper_brier(y, MASK_PROBS[:, image]) for y in truths]))
        one = MASK_PROBS[:, [image]]
        paper_dice.append(np.mean([metrics.paper_dice(y[None], one) for y in truths]))
        paper_iou.append(np.mean([metrics.paper_iou(y[None], one) for y in truths]))
    for key, values in {
        "nll": nll,
        "brier": brier,
        "paper_brier": paper_brier,
        "paper_dice": paper_dice,
        "paper_iou": paper_iou,
    }.items():
        assert row[key] == pytest.approx(np.mean(values)), key
    majority = metrics.majority_mask(MASKS, VALID)
    assert row["dice"] == pytest.approx(metrics.dice(majority, mean > 0.5).mean())
    several = VALID.sum(1) > 1
    expected = [
        np.mean([metrics.dice(MASKS[[i], ..., r], mean[[i]] > 0.5)[0] for r in np.flatnonzero(VALID[i])])
        for i in np.flatnonzero(several)
    ]
    assert row["dice_raters"] == pytest.approx(np.mean(expected))


def test_fillers_of_invalid_raters_do_not_matter():
    other = np.where(VALID[:, None, None, :], MASKS, 1 - MASKS)
    rows = [scoring.evaluate(MASK_PROBS, masks, "segmentation", rater_valid=VALID) for masks in (MASKS, other)]
    assert_same(*rows)


def test_pixel_ece_and_correlation_pool_all_images(monkeypatch):
    row = scoring.evaluate(MASK_PROBS, MASKS, "segmentation")
    mean, soft = MASK_PROBS.astype("float64").mean(0), MASKS.mean(-1)
    assert row["ece"] == pytest.approx(metrics.ece(soft, mean))
    region = (soft > 0) | (mean > 0.5)
    assert row["ece_region"] == pytest.approx(metrics.ece(soft[region], mean[region]), abs=1e-6)
    assert row["ece_region"] != pytest.approx(row["ece"])
    entropy = metrics.binary_entropy(mean).ravel()
    expected = np.corrcoef(entropy, (soft * (1 - soft)).ravel())[0, 1]
    assert row["entropy_disagreement_pearson"] == pytest.approx(expected)
    monkeypatch.setattr(records, "CHUNK_VALUES", 1)  # image by image
    frequency = scoring.prevalence("segmentation", MASKS)
    assert_same(
        {**scoring.evaluate(MASK_PROBS, MASKS, "segmentation")},
        row,
    )
    row = scoring.evaluate(MASK_PROBS, MASKS, "segmentation", train_prevalence=frequency)
    reference = ((frequency[None, ..., None] - MASKS) ** 2).mean()
    assert row["brier_skill"] == pytest.approx(1 - row["brier"] / reference)


def test_masks_on_disk_score_as_those_in_memory(tmp_path):
    np.save(tmp_path / "masks.npy", MASKS)
    masks = DiskArray(tmp_path / "masks.npy")
    assert_same(
        scoring.evaluate(MASK_PROBS, masks, "segmentation", rater_valid=VALID),
        scoring.evaluate(MASK_PROBS, MASKS, "segmentation", rater_valid=VALID),
    )
    np.testing.assert_array_equal(
        scoring.prevalence("segmentation", masks, VALID), scoring.prevalence("segmentation", MASKS, VALID)
    )
    assert_same(
        trivial.trivial("segmentation", masks, masks)["prevalence"],
        trivial.trivial("segmentation", MASKS, MASKS)["prevalence"],
    )
    np.save(tmp_path / "wrong.npy", MASKS * 2)
    with pytest.raises(ValueError, match=r"0 or 1.*0 to 2"):
        scoring.prevalence("segmentation", DiskArray(tmp_path / "wrong.npy"))


def test_one_rater_leaves_rater_metrics_undefined():
    row = scoring.evaluate(MASK_PROBS[..., None], MASKS[..., :1], "segmentation")
    for key in ("ged", "dice_raters", "entropy_disagreement_pearson"):
        assert key not in row
        assert row["undefined"][key] == "no image has two or more valid raters"


def test_per_image_means_are_what_evaluate_reports():
    row = scoring.evaluate(MASK_PROBS, MASKS, "segmentation", rater_valid=VALID)
    evaluator = scoring.Evaluator("segmentation", boundary=False)
    evaluator.update(MASK_PROBS, MASKS, VALID)
    arrays = evaluator.record().arrays
    scores = {key: arrays[key] for key in scoring.of_task("segmentation") if key in arrays}
    for key, values in scores.items():
        assert values.shape == (6,)
        assert row[key] == pytest.approx(np.nanmean(values))
    np.testing.assert_array_equal(np.isnan(scores["ged"]), VALID.sum(1) < 2)


# Laws of evaluate

EXAMPLES = [
    ("multi-label", LABEL_PROBS, LABELS),
    ("binary", LABEL_PROBS[..., :1], LABELS[:, :1]),
    ("multi-class", CLASS_PROBS, ONE_HOT),
    ("ordinal", CLASS_PROBS, ONE_HOT),
    ("segmentation", MASK_PROBS, MASKS),
]


@pytest.mark.parametrize(("task", "probs", "targets"), EXAMPLES)
def test_the_order_of_samples_and_images_does_not_matter(task, probs, targets):
    row = scoring.evaluate(probs, targets, task)
    turned = scoring.evaluate(probs[::-1], targets, task)
    if task == "segmentation":  # the one that knows an order: sample m is cut at the m-th level
        turned["ged_spread"] = row["ged_spread"]
    assert_same(turned, row)
    assert_same(scoring.evaluate(probs[:, ::-1], targets[::-1], task), row)


@pytest.mark.parametrize(("task", "probs", "targets"), EXAMPLES)
@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_rows_are_plain_floats(task, probs, targets, dtype):
    row = scoring.evaluate(probs[:1].astype(dtype), targets.astype(bool), task)
    assert all(type(value) is float and np.isfinite(value) for value in floats(row).values())
    assert json.loads(json.dumps(row)) == row
    assert row["mutual_information"] == 0
    expected = {"brier_skill", "error_auroc_mi"}
    if task == "segmentation":  # Dice of noise is below 0.5 everywhere
        expected |= {"hausdorff95", "pixel_error_auroc_mi", "error_auroc"}
    assert set(row["undefined"]) == expected
    assert row["undefined"]["error_auroc_mi"].startswith("one sample")


def test_rounding_above_one_is_forgiven():
    probs = np.minimum(LABEL_PROBS.astype("float64") + 1, 1 + 1e-7)
    row = scoring.evaluate(probs, LABELS, "multi-label")
    assert row["entropy"] == 0


@pytest.mark.parametrize(
    ("probs", "targets", "task", "options", "message"),
    [
        (LABEL_PROBS * 3, LABELS, "multi-label", {}, r"0\.\.1 .not logits.*max="),
        (np.full_like(LABEL_PROBS, np.nan), LABELS, "multi-label", {}, "NaN.*min=nan"),
        (LABEL_PROBS[0], LABELS, "multi-label", {}, r"samples, 60, 5.*\(60, 5\)"),
        (LABEL_PROBS[:0], LABELS, "multi-label", {}, r"\(0, 60, 5\)"),
        (LABEL_PROBS[:, :0], LABELS[:0], "multi-label", {}, r"not empty.*\(0, 5\)"),
        (LABEL_PROBS, LABELS * 2, "multi-label", {}, "0 or 1.*0 to 2"),
        (LABEL_PROBS, LABELS, "multi-label", {"rater_valid": VALID}, "rater_valid=None"),
        (LABEL_PROBS, LABELS, "multi-label", {"train_prevalence": np.ones(4)}, r"train_prevalence.*\(4,\)"),
        (LABEL_PROBS, LABELS, "multiclass", {}, "'multiclass'"),
        (LABEL_PROBS, LABELS, "binary", {}, r"\(batch, 1\).*\(60, 5\)"),
        (CLASS_PROBS, CLASSES, "multi-class", {}, r"\(batch, classes\), one-hot.*\(60,\)"),
        (LABEL_PROBS, LABELS, "multi-class", {}, r"one class per image.*\[1 1 1 1 1\] for image 0"),
        (CLASS_PROBS * 0.99, ONE_HOT, "ordinal", {}, "sum to 1 over the classes.*0.99 to 0.99"),
        (np.where(CLASS_PROBS > 0.9, np.nan, CLASS_PROBS), ONE_HOT, "ordinal", {}, "NaN.*min=nan"),
        (CLASS_PROBS, ONE_HOT, "ordinal", {"rater_valid": VALID}, "ordinal targets have no raters"),
        (CLASS_PROBS, ONE_HOT, "multi-class", {"train_prevalence": np.ones(5)}, r"train_prevalence.*\(5,\)"),
        (MASK_PROBS, MASKS[..., 0], "segmentation", {}, "raters"),
        (MASK_PROBS[:, :3], MASKS, "segmentation", {}, r"\(4, 3, 8, 10\)"),
        (MASK_PROBS, MASKS, "segmentation", {"rater_valid": VALID[:, :2]}, r"\(6, 3\).*\(6, 2\)"),
        (MASK_PROBS, MASKS, "segmentation", {"rater_valid": VALID & (VALID.sum(1) > 1)[:, None]}, "image 2"),
    ],
)
def test_bad_input_is_refused_in_two_lines(probs, targets, task, options, message):
    with pytest.raises(ValueError, match=message) as error:
        scoring.evaluate(probs, targets, task, **options)
    assert "Received" in str(error.value) and len(str(error.value).splitlines()) <= 2


# The paper's metrics, and trivial predictors


def test_papers_softmax_applied_twice_has_a_floor():
    masks = MASKS[None, ..., 0].astype(float)
    assert metrics.paper_brier(MASKS[..., 0], masks, softmax_twice=True) == pytest.approx(0.0723, abs=5e-5)
    row = scoring.evaluate(masks, MASKS[..., :1], "segmentation")
    assert row["paper_brier_softmax_twice"] == pytest.approx(0.0723, abs=5e-5)
    assert row["paper_brier"] == row["brier"] == 0


def test_trivial_rows_of_labels_as_in_the_paper():
    # Prevalences near ChestMNIST's, from its 4.7 (infiltration) to over 500 negatives a positive (hernia).
    percent = [10.5, 2.6, 12.2, 18.2, 5.2, 5.7, 1.3, 4.9, 4.3, 2.2, 2.4, 1.5, 3.0, 0.2]
    labels = RNG.permuted(np.arange(1000)[:, None] < 10 * np.array(percent), axis=0).astype("uint8")
    rows = trivial.trivial("multi-label", labels, labels)
    assert list(rows) == ["all_negative", "prevalence"]
    assert rows["all_negative"]["paper_accuracy"] == pytest.approx(1 - labels.mean())
    assert rows["all_negative"]["accuracy"] == pytest.approx(0.947, abs=0.001)
    assert rows["prevalence"]["brier"] == pytest.approx(0.0475, abs=0.001)
    assert rows["prevalence"]["auc"] == rows["all_negative"]["auc"] == 0.5
    assert rows["prevalence"]["brier_skill"] == 0
    assert rows["prevalence"]["paper_entropy"] == pytest.approx(1.90, abs=0.05)
    assert metrics.paper_entropy(np.full((1, 1, 14), np.exp(-1))) == pytest.approx(5.15, abs=0.001)


def test_trivial_rows_of_masks_as_in_the_paper():
    masks = np.zeros((10, 20, 20, 3), "uint8")
    masks[:, 9:11, 9:11] = 1  # 1 % foreground
    masks[::2, 0, 0, 0] = 1
    rows = trivial.trivial("segmentation", masks[:5], masks[5:], rater_valid=np.ones((5, 3)))
    assert list(rows) == ["all_background", "prevalence"]
    assert rows["all_background"]["paper_dice"] == pytest.approx(0.99, abs=0.002)
    assert rows["all_background"]["dice"] == 0
    assert rows["prevalence"]["dice"] == 1
    assert rows["prevalence"]["brier_skill"] == 0
    assert rows["all_background"]["undefined"]["entropy_disagreement_pearson"].startswith("the entropy")
    frequency = scoring.prevalence("segmentation", masks[:5])
    assert frequency.shape == (20, 20) and frequency[0, 0] == pytest.approx(3 / 5 / 3)


# In pieces


def record_of(probs, targets, task, pieces=1, **options):
    """A record of images in some pieces."""
    extra = {key: options.pop(key) for key in ("rater_valid", "groups", "ids") if key in options}
    evaluator = scoring.Evaluator(task, **options)
    for part in np.array_split(np.arange(len(targets)), pieces):
        evaluator.update(probs[:, part], targets[part], **{key: value[part] for key, value in extra.items()})
    return evaluator.record()


@pytest.mark.parametrize(("task", "probs", "targets"), EXAMPLES)
@pytest.mark.parametrize("pieces", [2, 5])
def test_pieces_of_any_size_give_one_record(task, probs, targets, pieces):
    options = {"train_prevalence": scoring.prevalence(task, targets)}
    if task == "segmentation":
        options["rater_valid"] = VALID
    whole, parts = (record_of(probs, targets, task, n, **options) for n in (1, pieces))
    assert whole.digests == parts.digests
    for key, values in whole.arrays.items():
        np.testing.assert_allclose(parts[key], values, rtol=1e-12, atol=1e-12)
    assert_same(parts.metrics(), whole.metrics())
    assert_same(scoring.evaluate(probs, targets, task, boundary=True, **options), whole.metrics())


@pytest.mark.parametrize(("task", "probs", "targets"), EXAMPLES)
def test_every_key_has_a_value_or_a_reason(task, probs, targets):
    none, one = np.zeros_like(targets), targets[:1]
    if task in ("multi-class", "ordinal"):
        none[:, 0] = 1
    known = set(scoring.evaluate(probs, targets, task)) | set(scoring.evaluate(probs, targets, task)["undefined"])
    extreme = np.eye(4)[None, np.zeros(60, int)] if task in ("multi-class", "ordinal") else np.zeros_like(probs[:1])
    for case in ((probs, none), (probs[:, :1], one), (extreme, none), (extreme[:, :1], one), (extreme, targets)):
        row = scoring.evaluate(*case, task, train_prevalence=0.25)
        values = {key: value for key, value in row.items() if key != "undefined"}
        assert all(type(value) is float and np.isfinite(value) for value in values.values())
        assert set(row) | set(row["undefined"]) == known
        assert not set(values) & set(row["undefined"])
        assert all(reason and "\n" not in reason for reason in row["undefined"].values())


def test_memory_of_a_record_does_not_grow_with_pixels_or_samples():
    sizes = []
    for samples, side in ((2, 8), (9, 8), (2, 64)):
        masks = (RNG.random((3, side, side, 2)) > 0.5).astype("uint8")
        record = record_of(RNG.random((samples, 3, side, side)), masks, "segmentation")
        sizes.append(sum(array.nbytes for array in record.arrays.values()) / 3)
    assert sizes[0] == sizes[1] == sizes[2] < 13100


def test_pieces_have_to_fit_one_another():
    evaluator = scoring.Evaluator("multi-label")
    with pytest.raises(ValueError, match="call update first"):
        evaluator.record()
    evaluator.update(LABEL_PROBS, LABELS)
    with pytest.raises(ValueError, match=r"\(5,\) and 4. Received: \(5,\) and 2"):
        evaluator.update(LABEL_PROBS[:2], LABELS)
    with pytest.raises(ValueError, match=r"\(5,\) and 4. Received: \(3,\) and 4"):
        evaluator.update(LABEL_PROBS[..., :3], LABELS[:, :3])
    for name in ("groups", "ids"):
        with pytest.raises(ValueError, match=f"{name} of 60 images. Received: 2"):
            evaluator.update(LABEL_PROBS, LABELS, **{name: np.arange(2)})
    assert evaluator.record().num_images == len(evaluator.record()) == 60  # what was refused left nothing


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"threshold": 1.0}, "between 0 and 1.*1.0"),
        ({"threshold": np.nan}, "between 0 and 1.*nan"),
        ({"train_prevalence": [0.2, np.nan]}, r"0\.\.1.*nan"),
        ({"train_prevalence": 1.2}, r"0\.\.1.*1.2"),
        ({"only": ("ged",)}, r"only among.*\['ged'\]"),
    ],
)
def test_options_out_of_range_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        scoring.Evaluator("multi-label", **options)


# What the uncertainty is good for, and calibration


def test_use_of_uncertainty_of_labels_agrees_with_scikit_learn():
    row = scoring.evaluate(LABEL_PROBS, LABELS, "multi-label", threshold=0.3)
    parts = metrics.uncertainty(LABEL_PROBS)
    wrong = (parts["mean_probs"] > 0.3) != LABELS
    assert row["accuracy"] == pytest.approx(sk.accuracy_score(LABELS.ravel(), parts["mean_probs"].ravel() > 0.3))
    assert row["risk"] == pytest.approx(wrong.mean())
    assert row["error_auroc"] == pytest.approx(sk.roc_auc_score(wrong.any(1), parts["entropy"].mean(1)))
    assert row["error_auroc_mi"] == pytest.approx(sk.roc_auc_score(wrong.any(1), parts["mutual_information"].mean(1)))
    assert row["label_error_auroc"] == pytest.approx(sk.roc_auc_score(wrong.ravel(), parts["entropy"].ravel()))
    curve = parts["entropy"].mean(1), wrong.mean(1)
    assert row["aurc"] == pytest.approx(metrics.area_under_risk_coverage(*curve))
    assert row["excess_aurc"] == pytest.approx(metrics.excess_area(*curve))
    assert row["num_images"] == 60


def test_use_of_uncertainty_of_classes_agrees_with_scikit_learn():
    row = scoring.evaluate(CLASS_PROBS, ONE_HOT, "multi-class")
    probs = CLASS_PROBS.astype("float64")
    parts = metrics.uncertainty(probs / probs.sum(-1, keepdims=True), "multi-class")
    wrong = parts["mean_probs"].argmax(1) != CLASSES
    assert row["error_auroc"] == pytest.approx(sk.roc_auc_score(wrong, parts["entropy"]))
    assert row["error_auroc_mi"] == pytest.approx(sk.roc_auc_score(wrong, parts["mutual_information"]))
    assert row["aurc"] == pytest.approx(metrics.area_under_risk_coverage(parts["entropy"], wrong))
    assert row["ece_label"] == pytest.approx(metrics.ece(ONE_HOT, parts["mean_probs"], per_label=True).mean())
    mass = metrics.ece(ONE_HOT, parts["mean_probs"], per_label=True, binning="mass")
    assert row["ece_label_mass"] == pytest.approx(mass.mean())
    assert row["ece_mass"] == pytest.approx(metrics.ece(~wrong, parts["mean_probs"].max(1), binning="mass"))


@pytest.mark.parametrize("decimals", [16, 1])  # of the probabilities: without ties, and with many
def test_calibration_of_labels_is_that_of_its_definition(decimals):
    mean = LABEL_PROBS.astype("float64").mean(0).round(decimals)
    row = scoring.evaluate(mean[None], LABELS, "multi-label")
    assert row["ece"] == pytest.approx(metrics.ece(LABELS, mean))
    assert row["ece_mass"] == pytest.approx(metrics.ece(LABELS, mean, binning="mass"))
    assert row["ece_label"] == pytest.approx(metrics.ece(LABELS, mean, per_label=True).mean())
    assert row["ece_label_mass"] == pytest.approx(metrics.ece(LABELS, mean, per_label=True, binning="mass").mean())
    assert row["paper_ece"] == pytest.approx(metrics.paper_ece(LABELS, mean[None]))
    assert row["auc"] == pytest.approx(sk.roc_auc_score(LABELS, mean))
    assert row["average_precision"] == pytest.approx(sk.average_precision_score(LABELS, mean))


def test_one_point_is_the_perfectly_calibrated_one_by_hand():
    # Equal weight: the lowest of 15 values has p = 0.1 and is a 1, all others are certain and right.
    probs = np.array([[0.1]] + [[1.0]] * 14)
    row = scoring.evaluate(probs[None], np.ones((15, 1), "uint8"), "binary")
    assert row["ece_mass"] == pytest.approx(0.9 / 15)


def sharp_masks(images=12, side=24):
    """Smooth maps with steep edges, as a network's, samples that differ, and raters who disagree."""
    field = ndimage.gaussian_filter(RNG.normal(size=(images, side, side)), (0, 2, 2)) * 60 - 4
    noise = ndimage.gaussian_filter(RNG.normal(size=(5, images, side, side)), (0, 0, 2, 2)) * 12
    probs = 1 / (1 + np.exp(-(field + noise)))
    bias = RNG.normal(size=(images, 1, 1, 4)) * 4
    return probs.astype("float32"), (field[..., None] + bias > 0).astype("uint8")


def test_pixels_in_fine_bins_score_nearly_as_pixels_themselves():
    probs, masks = sharp_masks()
    row = scoring.evaluate(probs, masks, "segmentation")
    parts, soft = metrics.uncertainty(probs), masks.mean(-1)
    wrong = ((parts["mean_probs"] > 0.5) != (soft >= 0.5)).ravel()
    for key, name in (("pixel_error_auroc", "entropy"), ("pixel_error_auroc_mi", "mutual_information")):
        exact = sk.roc_auc_score(wrong, parts[name].ravel())
        assert 0.55 < exact < 0.99
        assert row[key] == pytest.approx(exact, abs=0.005), key
    exact = metrics.ece(soft, parts["mean_probs"], binning="mass")
    assert exact > 0.01 and row["ece_mass"] == pytest.approx(exact, abs=0.005)
    assert row["paper_ece"] == pytest.approx(metrics.paper_ece(soft, probs))


@pytest.mark.parametrize(
    ("low", "high", "tolerance"),
    [(0.47, 0.499, 0.005), (0.49, 0.52, 0.005), (0.1, 0.2, 0.005), (0.7, 0.9, 0.005), (0.01, 0.03, 0.01)],
)
def test_pixels_of_flat_maps_score_nearly_as_pixels_themselves(low, high, tolerance):
    field = ndimage.gaussian_filter(RNG.normal(size=(12, 24, 24)), (0, 2, 2))
    noise = ndimage.gaussian_filter(RNG.normal(size=(2, 12, 24, 24)), (0, 0, 2, 2))
    masks = (field[..., None] + 0.06 * RNG.normal(size=(12, 1, 1, 4)) > 0.1).astype("uint8")
    probs = field + 0.3 * noise
    probs = low + (high - low) * (probs - probs.min()) / np.ptp(probs)
    row = scoring.evaluate(probs, masks, "segmentation")
    parts, soft = metrics.uncertainty(probs), masks.mean(-1)
    wrong = ((parts["mean_probs"] > 0.5) != (soft >= 0.5)).ravel()
    exact = sk.roc_auc_score(wrong, parts["entropy"].ravel())
    assert abs(exact - 0.5) > 0.05 and row["pixel_error_auroc"] == pytest.approx(exact, abs=tolerance)
    exact = sk.roc_auc_score(wrong, parts["mutual_information"].ravel())
    assert row["pixel_error_auroc_mi"] == pytest.approx(exact, abs=tolerance)
    exact = metrics.ece(soft, parts["mean_probs"], binning="mass")
    assert exact > 0.05 and row["ece_mass"] == pytest.approx(exact, abs=tolerance)


def test_images_of_masks_score_as_their_definitions():
    probs, masks = sharp_masks()
    valid = np.ones((12, 4), bool)
    valid[:3, 1:] = False  # one rater
    row = scoring.evaluate(probs, masks, "segmentation", rater_valid=valid, threshold=0.3, boundary=True)
    mean, majority = probs.mean(0, dtype="float64"), metrics.majority_mask(masks, valid)
    assert row["dice"] == pytest.approx(metrics.dice(majority, mean > 0.3).mean())
    assert row["iou"] == pytest.approx(metrics.iou(majority, mean > 0.3).mean())
    assert row["hausdorff95"] == pytest.approx(metrics.hausdorff95(majority, mean > 0.3).mean())
    assert row["risk"] == pytest.approx(1 - row["dice"])
    rated = masks[3:], valid[3:]
    assert row["dice_raters"] == pytest.approx(metrics.dice_raters(rated[0], mean[3:] > 0.3, rated[1]).mean())
    assert row["ged"] == pytest.approx(metrics.generalised_energy_distance(rated[0], probs[:, 3:], rated[1]).mean())
    assert row["hungarian_iou"] == pytest.approx(metrics.hungarian_iou(rated[0], probs[:, 3:], rated[1]).mean())
    entropy, dice = metrics.binary_entropy(mean).mean((1, 2)), metrics.dice(majority, mean > 0.3)
    assert row["aurc"] == pytest.approx(metrics.area_under_risk_coverage(entropy, 1 - dice))
    assert row["excess_aurc"] == pytest.approx(metrics.excess_area(entropy, 1 - dice))
    low = dice < np.median(dice)
    record = record_of(probs, masks, "segmentation", threshold=0.3, rater_valid=valid)
    record.arrays["error"] = low
    assert record.metrics()["error_auroc"] == pytest.approx(sk.roc_auc_score(low, entropy))


def test_samples_that_are_all_the_same_have_no_epistemic_ranking():
    probs = np.repeat(LABEL_PROBS[:1], 3, 0)
    row = scoring.evaluate(probs, LABELS, "multi-label")
    assert row["undefined"]["error_auroc_mi"].startswith("the samples are all the same")


# Weights


@pytest.mark.parametrize(("task", "probs", "targets"), EXAMPLES)
@pytest.mark.parametrize("tied", [False, True])
def test_weights_count_images(task, probs, targets, tied):
    probs = np.round(probs * 8) / 8 if tied and task not in ("multi-class", "ordinal") else probs
    counts = RNG.integers(0, 4, len(targets))
    counts[:4] = [3, 2, 0, 1]
    options = {"train_prevalence": scoring.prevalence(task, targets)}
    weighted = record_of(probs, targets, task, **options).metrics(counts)
    repeated = np.repeat(np.arange(len(targets)), counts)
    assert_same(weighted, record_of(probs[:, repeated], targets[repeated], task, **options).metrics())


@pytest.mark.parametrize("decimals", [16, 1])
def test_weighted_rankings_agree_with_scikit_learn(decimals):
    mean, weights = LABEL_PROBS.mean(0).round(decimals), RNG.random(60) + 0.1
    row = record_of(mean[None], LABELS, "multi-label").metrics(weights)
    options = {"sample_weight": weights, "average": "macro"}
    assert row["auc"] == pytest.approx(sk.roc_auc_score(LABELS, mean, **options))
    assert row["average_precision"] == pytest.approx(sk.average_precision_score(LABELS, mean, **options))
    assert row["nll"] == pytest.approx(sk.log_loss(LABELS.ravel(), mean.ravel(), sample_weight=weights.repeat(5)), 1e-4)
    assert row["num_images"] == pytest.approx(weights.sum())


def test_weighted_kappa_agrees_with_scikit_learn():
    weights = RNG.random(60)
    row = record_of(CLASS_PROBS, ONE_HOT, "ordinal").metrics(weights)
    predicted = CLASS_PROBS.mean(0).argmax(1)
    expected = sk.cohen_kappa_score(CLASSES, predicted, weights="quadratic", sample_weight=weights)
    assert row["quadratic_kappa"] == pytest.approx(expected)


@pytest.mark.parametrize("weights", [np.ones(3), -np.ones(60), np.zeros(60), np.full(60, np.nan), np.full(60, np.inf)])
def test_weights_that_cannot_be_are_refused(weights):
    with pytest.raises(ValueError, match=r"weights \(60,\), finite, >= 0 and not all 0"):
        record_of(LABEL_PROBS, LABELS, "multi-label").metrics(weights)


# Intervals


def test_intervals_of_means_agree_with_scipy():
    record = record_of(LABEL_PROBS, LABELS, "multi-label")
    found = record.bootstrap(num_resamples=4000)
    for key in ("brier", "nll", "entropy"):
        options = {"n_resamples": 4000, "method": "percentile", "rng": np.random.default_rng(1)}
        expected = stats.bootstrap((record[key],), np.mean, **options).confidence_interval
        width = expected.high - expected.low
        np.testing.assert_allclose(found[key], expected, atol=0.05 * width)
    low, high = record.bootstrap(num_resamples=4000, level=0.5)["brier"]
    assert (high - low) / (found["brier"][1] - found["brier"][0]) == pytest.approx(0.6745 / 1.96, rel=0.1)


@pytest.mark.parametrize(("task", "probs", "targets"), EXAMPLES)
def test_intervals_hold_the_value_and_are_reproducible(task, probs, targets, monkeypatch):
    record = record_of(probs, targets, task, train_prevalence=scoring.prevalence(task, targets) * 0.9)
    metrics_, found = record.metrics(), record.bootstrap(num_resamples=100)
    counts = {"num_images", "auc_num_labels"}
    assert set(found) | set(found["undefined"]) == set(metrics_) - counts
    for key, (low, high) in ((key, bounds) for key, bounds in found.items() if key != "undefined"):
        assert type(low) is float and low <= high
        if "ece" not in key:  # see below
            assert low - 1e-9 <= metrics_[key] <= high + 1e-9, key
    monkeypatch.setattr(records, "CHUNK_VALUES", 1)  # one resample at a time
    again = record_of(probs, targets, task, train_prevalence=scoring.prevalence(task, targets) * 0.9)
    again = again.bootstrap(num_resamples=100)
    assert again.pop("undefined") == found.pop("undefined")
    for key, bounds in again.items():
        np.testing.assert_allclose(bounds, found[key], rtol=1e-9, atol=1e-12)
    assert record.bootstrap(num_resamples=100, seed=1) != {**found, "undefined": {}}


@pytest.mark.parametrize("scale", [1.0, 3.0])  # the second overconfident
def test_intervals_of_calibration_errors_are_scipys_basic_ones(scale):
    odds = RNG.normal(size=200)
    labels, mean = RNG.random(200) < 1 / (1 + np.exp(-odds)), 1 / (1 + np.exp(-scale * odds))
    record = record_of(mean[None, :, None], labels[:, None].astype("uint8"), "binary")
    found, value = record.bootstrap(num_resamples=2000), record.metrics()["ece"]
    options = {"n_resamples": 2000, "method": "basic", "paired": True, "vectorized": False}
    expected = stats.bootstrap((labels, mean), metrics.ece, rng=np.random.default_rng(1), **options).confidence_interval
    np.testing.assert_allclose(found["ece"], np.clip(expected, 0, 1), atol=0.1 * (expected.high - expected.low))
    assert found["ece_label"] == pytest.approx(found["ece"])  # one label
    if scale > 1:
        assert found["ece"][0] < value < found["ece"][1]
    low, high = record_of(labels[None, :, None] * 1.0, labels[:, None].astype("uint8"), "binary").bootstrap(50)["ece"]
    assert low == high == 0


def test_patients_are_resampled_whole():
    alone = record_of(LABEL_PROBS, LABELS, "multi-label").bootstrap(num_resamples=200)
    four = np.repeat(np.arange(60), 4)  # each image four times: as many patients, four times the images
    options = {"groups": np.char.add("patient", np.char.zfill(four.astype(str), 2))}
    patients = record_of(LABEL_PROBS[:, four], LABELS[four], "multi-label", 3, **options)
    images = record_of(LABEL_PROBS[:, four], LABELS[four], "multi-label")
    found, wrong = (record.bootstrap(num_resamples=200) for record in (patients, images))
    for key in ("auc", "average_precision", "brier", "ece", "ece_mass", "error_auroc"):
        np.testing.assert_allclose(found[key], alone[key])
    for key in ("auc", "brier"):  # as if there were four times as many patients: half the width
        assert np.ptp(wrong[key]) / np.ptp(found[key]) == pytest.approx(0.5, abs=0.1)


def test_patients_that_some_pieces_lack_are_not_used():
    evaluator = scoring.Evaluator("multi-label")
    evaluator.update(LABEL_PROBS, LABELS, groups=np.arange(60))
    assert evaluator.record().groups is not None
    evaluator.update(LABEL_PROBS, LABELS)
    assert evaluator.record().groups is None
    evaluator.update(LABEL_PROBS, LABELS, groups=np.arange(60))
    assert evaluator.record().groups is None


def test_what_many_resamples_leave_undefined_has_no_interval():
    labels = np.zeros((60, 1), "uint8")
    labels[7] = 1  # missing in (1 - 1/60)^60 = 36 % of the resamples
    record = record_of(LABEL_PROBS[..., :1], labels, "binary")
    found = record.bootstrap(num_resamples=300)
    assert "auc" in record.metrics() and "auc" not in found and "brier" in found
    number = int(found["undefined"]["auc"].split()[2])
    assert number / 300 == pytest.approx((1 - 1 / 60) ** 60, abs=0.1)
    assert found["undefined"]["auc"] == f"undefined in {number} of 300 resamples"


@pytest.mark.parametrize(("groups", "unit"), [({}, "image"), ({"groups": np.zeros(1)}, "patient")])
def test_one_image_has_no_interval(groups, unit):
    record = record_of(LABEL_PROBS[:, :1], LABELS[:1], "multi-label", **groups)
    found = record.bootstrap()
    assert set(found) == {"undefined"} and found["undefined"]["brier"].startswith(f"one {unit}")
    with pytest.raises(ValueError, match=f"two {unit}s or more"):
        scoring.compare(record, record)


@pytest.mark.parametrize("options", [{"num_resamples": 0}, {"level": 1.0}, {"level": 0}])
def test_intervals_need_resamples_and_a_level(options):
    with pytest.raises(ValueError, match="num_resamples >= 1 and level between 0 and 1"):
        record_of(LABEL_PROBS, LABELS, "multi-label").bootstrap(**options)


# Paired tests


def test_a_method_does_not_differ_from_itself():
    record = record_of(LABEL_PROBS, LABELS, "multi-label")
    found = scoring.compare(record, record_of(LABEL_PROBS, LABELS, "multi-label"), num_resamples=50)
    assert set(found) == set(record.bootstrap(num_resamples=50)) - {"undefined"}
    for test in found.values():
        assert test == {"difference": 0, "low": 0, "high": 0, "p_value": 1}


def test_paired_test_agrees_with_the_paired_t_test_and_is_never_certain():
    record = record_of(LABEL_PROBS, LABELS, "multi-label")
    for sure in (False, True):
        other_probs = np.clip(LABEL_PROBS - 0.3 * RNG.random(LABEL_PROBS.shape), 0, 1)
        other_probs = LABELS[None] * 0.9 if sure else other_probs
        other = record_of(other_probs, LABELS, "multi-label")
        found = scoring.compare(record, other, keys=["brier"], num_resamples=2000)["brier"]
        differences = record["brier"] - other["brier"]
        assert found["difference"] == pytest.approx(differences.mean())
        interval = stats.ttest_1samp(differences, 0).confidence_interval()
        np.testing.assert_allclose([found["low"], found["high"]], interval, atol=0.1 * (interval.high - interval.low))
        if sure:
            assert found["p_value"] == 1 / 2001
        else:
            assert found["p_value"] == pytest.approx(stats.ttest_1samp(differences, 0).pvalue, rel=0.2)
            assert 0.01 < found["p_value"] < 0.2
        swapped = scoring.compare(other, record, keys=["brier"], num_resamples=2000)["brier"]
        assert swapped["p_value"] == found["p_value"] and swapped["low"] == pytest.approx(-found["high"])


def test_alike_methods_are_called_different_in_one_of_twenty_sets():
    keys, rejected = ("nll", "auc", "ece", "ece_mass"), []
    for _ in range(120):
        odds = RNG.normal(-1, 1.5, (100, 2))
        labels = (RNG.random((100, 2)) < 1 / (1 + np.exp(-odds))).astype("uint8")
        pair = [1 / (1 + np.exp(-2 * (odds + 0.5 * RNG.normal(size=odds.shape)))) for _ in range(2)]
        tests = scoring.compare(*(record_of(p[None], labels, "multi-label") for p in pair), keys, num_resamples=100)
        rejected.append([tests[key]["p_value"] < 0.05 for key in keys])
    for key, count in zip(keys, np.sum(rejected, 0), strict=True):
        assert count <= stats.binom.ppf(0.999, 120, 0.05), key  # 15
    assert np.sum(rejected) > 0


def test_a_difference_of_calibration_errors_lies_in_its_interval_and_has_its_sign():
    odds = RNG.normal(-2, 1.5, (300, 14))
    labels = (RNG.random(odds.shape) < 1 / (1 + np.exp(-odds))).astype("uint8")
    pair = [1 / (1 + np.exp(-odds)), 1 / (1 + np.exp(-1.4 * odds))]  # calibrated, and overconfident
    records = [record_of(probs[None], labels, "multi-label") for probs in pair]
    tests = scoring.compare(*records, num_resamples=200)
    for key in ("ece", "ece_mass", "ece_label", "ece_label_mass", "paper_ece"):
        assert tests[key]["low"] < tests[key]["difference"] < tests[key]["high"], key
        assert tests[key]["p_value"] >= 0.05 or tests[key]["difference"] < 0, key
    assert tests["ece"]["p_value"] < 0.05


def test_pairing_sees_what_two_intervals_do_not():
    worse = np.clip(LABEL_PROBS * 0.97 + 0.02, 0, 1)
    records = [record_of(probs, LABELS, "multi-label") for probs in (LABEL_PROBS, worse)]
    one, two = (record.bootstrap(num_resamples=500)["entropy"] for record in records)
    assert one[1] > two[0]  # they overlap
    assert scoring.compare(*records, keys=["entropy"], num_resamples=500)["entropy"]["p_value"] < 0.01


def test_keys_without_a_value_are_left_out_and_unknown_ones_refused():
    record, single = (record_of(probs, LABELS, "multi-label") for probs in (LABEL_PROBS, LABEL_PROBS[:1]))
    assert scoring.compare(record, single, keys=["error_auroc_mi", "brier_skill"], num_resamples=20) == {}
    with pytest.raises(ValueError, match=r"keys among.*\['num_images'\]"):
        scoring.compare(record, record, keys=["num_images"])
    with pytest.raises(ValueError, match="num_resamples >= 1"):
        scoring.compare(record, record, num_resamples=0)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"targets": LABELS[::-1]}, "same images in the same order"),
        ({"targets": 1 - LABELS}, "same images in the same order"),
        ({"ids": np.arange(60)[::-1]}, "same images in the same order"),
        ({"groups": np.arange(60) // 3}, "same patients"),
        ({"task": "binary"}, "one task.*'multi-label' and 'binary'"),
    ],
)
def test_other_images_are_not_compared(changes, message):
    first = record_of(LABEL_PROBS, LABELS, "multi-label", ids=np.arange(60), groups=np.arange(60) // 2)
    changed = {"targets": LABELS, "task": "multi-label", "ids": np.arange(60), "groups": np.arange(60) // 2, **changes}
    probs = LABEL_PROBS
    if changed["task"] == "binary":
        probs, changed["targets"] = LABEL_PROBS[..., :1], LABELS[:, :1]
    second = record_of(probs, changed.pop("targets"), changed.pop("task"), 2, **changed)
    with pytest.raises(ValueError, match=message) as error:
        scoring.compare(first, second)
    assert "Received" in str(error.value) and len(str(error.value).splitlines()) <= 2


def test_raters_are_part_of_the_images():
    first, second = (record_of(MASK_PROBS, MASKS, "segmentation", rater_valid=v) for v in (VALID, VALID | True))
    with pytest.raises(ValueError, match="same images"):
        scoring.compare(first, second)


# Files


@pytest.mark.parametrize(("task", "probs", "targets"), EXAMPLES)
def test_a_record_is_read_as_it_was_written(task, probs, targets, tmp_path):
    options = {"ids": np.arange(len(targets)), "threshold": 0.4, "train_prevalence": 0.3}
    options |= {"rater_valid": VALID} if task == "segmentation" else {"groups": np.arange(len(targets)) // 2}
    record = record_of(probs, targets, task, **options)
    path = tmp_path / "deep" / "record.npz"
    record.save(path)
    record.save(path)  # over the old one
    found = scoring.Record.load(path)
    assert [one.name for one in path.parent.iterdir()] == ["record.npz"]
    assert (found.task, found.threshold, found.num_samples) == (task, 0.4, len(probs))
    assert found.metrics() == record.metrics()
    assert found.bootstrap(num_resamples=20) == record.bootstrap(num_resamples=20)
    assert all(test["p_value"] == 1 for test in scoring.compare(found, record, num_resamples=20).values())


def test_an_interrupted_save_leaves_the_old_record(tmp_path, monkeypatch):
    record = record_of(LABEL_PROBS, LABELS, "multi-label")
    record.save(tmp_path / "record.npz")

    def stop(file, **arrays):
        file.write(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr(np, "savez_compressed", stop)
    with pytest.raises(KeyboardInterrupt):
        record_of(LABEL_PROBS[:1], LABELS, "multi-label").save(tmp_path / "record.npz")
    assert [one.name for one in tmp_path.iterdir()] == ["record.npz"]
    assert scoring.Record.load(tmp_path / "record.npz").num_samples == 4


def shorter(content):
    return content[: len(content) // 2]


def flipped(content):
    middle = len(content) // 2
    return content[:middle] + bytes([content[middle] ^ 0xFF]) + content[middle + 1 :]


@pytest.mark.parametrize("damage", [shorter, flipped, lambda content: b"", lambda content: b"not an archive"])
def test_damaged_records_are_refused_in_two_lines(damage, tmp_path):
    path = tmp_path / "record.npz"
    record_of(LABEL_PROBS, LABELS, "multi-label").save(path)
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(ValueError, match=r"Expected a record of sbn_tf.experiments.scoring in .*record\.npz") as error:
        scoring.Record.load(path)
    assert str(error.value).splitlines()[1] == "Delete it and score the method again."


@pytest.mark.parametrize("task", ["multi-label", "segmentation", "anything"])
def test_foreign_records_are_refused(task, tmp_path):
    path, record = tmp_path / "record.npz", record_of(LABEL_PROBS, LABELS, "multi-label")
    np.savez(path, risk=np.ones(3))
    with pytest.raises(ValueError, match="Expected a record"):
        scoring.Record.load(path)
    record.arrays["risk"] = record["risk"][:5] if task == "multi-label" else record["risk"]
    record.task = task
    record.save(path)
    with pytest.raises(ValueError, match="different lengths" if task == "multi-label" else f"'{task}'"):
        scoring.Record.load(path)
    with pytest.raises(FileNotFoundError):
        scoring.Record.load(tmp_path / "none.npz")


def test_records_of_another_format_are_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(records, "_FORMAT", "sbn_tf.experiments.records.Record 1")
    record_of(MASK_PROBS, MASKS, "segmentation").save(tmp_path / "record.npz")
    monkeypatch.undo()
    with pytest.raises(ValueError, match=r"not of format sbn_tf\.experiments\.records\.Record 4"):
        scoring.Record.load(tmp_path / "record.npz")


def test_nan_in_a_record_is_refused(tmp_path):
    record = record_of(MASK_PROBS, MASKS[..., :1], "segmentation")
    record.save(tmp_path / "one_rater.npz")
    assert np.isnan(scoring.Record.load(tmp_path / "one_rater.npz")["ged"]).all()  # no raters to compare with
    record.arrays["nll"][2] = np.nan
    record.save(tmp_path / "nan.npz")
    with pytest.raises(ValueError, match="NaN or infinity in 'nll'"):
        scoring.Record.load(tmp_path / "nan.npz")


# A split


def split_of(images=23, side=10, on_disk=None):
    """A split with raters, patients and names, and a function that predicts from its images."""
    pixels = RNG.random((images, side, side, 1)).astype("float32")
    masks = (pixels + 0.3 * RNG.normal(size=(images, side, side, 3)) > 0.5).astype("uint8")
    if on_disk is not None:
        np.save(on_disk / "masks.npy", masks)
    targets = masks if on_disk is None else DiskArray(on_disk / "masks.npy")
    valid = RNG.random((images, 3)) > 0.3
    valid[:, 0] = True
    split = Split("test", "segmentation", pixels, targets, np.arange(images) // 2, np.arange(images), valid)

    def predict_samples(batch):
        return np.stack([1 / (1 + np.exp(-scale * (batch[..., 0] - 0.5))) for scale in (2, 4, 8)]).astype("float32")

    return split, predict_samples


def test_a_split_is_scored_in_batches_as_at_once(tmp_path):
    split, predict_samples = split_of(on_disk=tmp_path)
    probs = predict_samples(split.normalised())
    expected = record_of(probs, np.asarray(split.targets), "segmentation", rater_valid=split.rater_valid)
    for batch_size in (50, 4):
        options = {"batch_size": batch_size, "train_prevalence": 0.4, "threshold": 0.4, "verbose": False}
        record = scoring.score(predict_samples, split, "segmentation", **options)
        assert record.digests["images"] == expected.digests["images"] and record.threshold == 0.4
        np.testing.assert_array_equal(record.groups, split.groups)
        one = scoring.evaluate(
            probs,
            split.targets,
            "segmentation",
            rater_valid=split.rater_valid,
            train_prevalence=0.4,
            threshold=0.4,
            boundary=True,
        )
        assert_same(record.metrics(), one)
    channel = scoring.score(lambda x: predict_samples(x)[..., None], split, "segmentation", verbose=False)
    assert channel.metrics() == scoring.score(predict_samples, split, "segmentation", verbose=False).metrics()


def test_predictions_that_are_wrong_name_their_images():
    split, predict_samples = split_of()

    def diverged(images):
        probs = predict_samples(images)
        probs[1, 2 : 2 + (images[0, 0, 0, 0] == split.images[8, 0, 0, 0])] = np.nan
        return probs

    for wrong, message in (
        (diverged, r"images 8 to 15 of split 'test'. Received: NaN or infinity for 1 of them, first image 10"),
        (lambda images: predict_samples(images)[0], r"\(samples, 8, 10, 10\) for images 0 to 7.*\(8, 10, 10\)"),
        (lambda images: predict_samples(images)[:, :3], r"images 0 to 7.*\(3, 3, 10, 10\)"),
        (lambda images: predict_samples(images)[:0], r"images 0 to 7.*\(0, 8, 10, 10\)"),
    ):
        with pytest.raises(ValueError, match=message) as error:
            scoring.score(wrong, split, "segmentation", batch_size=8, verbose=False)
        assert len(str(error.value).splitlines()) <= 2


def test_scoring_a_split_keeps_no_pixels():
    """Peak memory of 40 images and of 400 differ by their statistics, not by their samples' pixels."""
    peaks = []
    for images in (40, 400):
        split, predict_samples = split_of(images, 32)
        tracemalloc.start()
        scoring.score(predict_samples, split, "segmentation", batch_size=10, boundary=False, verbose=False)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] - peaks[0] < 360 * 1.8 * 13000 < 360 * 3 * 32 * 32 * 8


# Shifted inputs


def images_of(count=6, side=12):
    return RNG.normal(size=(count, side, side, 2)).astype("float32")


@pytest.mark.parametrize("kind", ["noise", "blur", "contrast"])
def test_no_severity_is_no_shift(kind):
    images = images_of()
    moved = shifts.shifted(images, kind, 0)
    np.testing.assert_allclose(moved, images, atol=1e-6)
    assert moved is not images and moved.dtype == np.float32


def test_noise_has_its_size_and_is_that_of_its_image():
    images = images_of(8, 32)
    moved = shifts.shifted(images, "noise", 2.0, seed=3)
    assert (moved - images).std() == pytest.approx(0.4, rel=0.05)
    parts = [shifts.shifted(images[k : k + 3], "noise", 2.0, seed=3, offset=k) for k in (0, 3, 6)]
    np.testing.assert_array_equal(np.concatenate(parts), moved)
    assert not np.allclose(moved, shifts.shifted(images, "noise", 2.0, seed=4))
    assert not np.allclose((moved - images)[0], (moved - images)[1])


def test_blur_and_contrast_by_their_definitions():
    images = images_of()
    expected = ndimage.gaussian_filter(images[2, :, :, 1], 1.5, mode="nearest")
    np.testing.assert_allclose(shifts.shifted(images, "blur", 1.5)[2, :, :, 1], expected, atol=1e-6)
    moved = shifts.shifted(images, "contrast", 0.75)
    np.testing.assert_allclose(moved.mean((1, 2)), images.mean((1, 2)), atol=1e-6)
    np.testing.assert_allclose(moved.std((1, 2)), images.std((1, 2)) / 4, rtol=1e-5)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((images_of()[0], "noise", 1), "batch, height, width, channels"),
        ((images_of(), "fog", 1), "'fog'"),
        ((images_of(), "blur", -1), "severity=-1"),
        ((images_of(), "noise", np.inf), "severity=inf"),
        ((images_of(), "contrast", 1.5), r"in 0\.\.1 for 'contrast'.*1.5"),
        ((images_of(), "jpeg", 6), "1, 2, 3, 4 or 5 for 'jpeg'.*6"),
        ((images_of(), "desaturate", 1), "in colour"),
    ],
)
def test_shifts_that_cannot_be_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        shifts.shifted(*arguments)


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("kind", shifts.CORRUPTIONS)
def test_corruptions_grow_with_their_severity_and_stay_pixels(kind, channels):
    if kind == "desaturate" and channels == 1:
        pytest.skip("grey images have no colour")
    up, across = np.mgrid[:24, :24] / 24
    pixels = np.stack([up * across, up, across][:channels], -1)[None] * 0.8 + 0.1
    mean, sd = np.linspace(0.4, 0.6, channels), np.full(channels, 0.2)
    images = ((pixels - mean) / sd).astype("float32")
    changes = []
    for severity in range(6):
        moved = shifts.shifted(images, kind, severity, mean=mean, sd=sd)
        assert moved.shape == images.shape and moved.dtype == np.float32
        back = moved * sd + mean
        assert back.min() > -1e-6 and back.max() < 1 + 1e-6
        changes.append(np.abs(back - pixels).mean())
    assert changes[0] < 1e-6 and min(changes[1:]) > 10 * changes[0]
    if kind not in ("jpeg", "pixelate"):  # on a smooth picture some coarser grids fit better
        assert (np.diff(changes) > -1e-3 * changes[5]).all() and changes[5] > 1.2 * changes[1]
    twice = shifts.shifted(np.repeat(images, 2, 0), kind, 3, mean=mean, sd=sd)
    alone = shifts.shifted(images, kind, 3, offset=1, mean=mean, sd=sd)
    np.testing.assert_array_equal(twice[1:], alone)


def test_corruptions_by_their_definitions():
    pixels = np.full((1, 64, 64, 1), 0.5)

    def done(kind, severity=3):
        return shifts.shifted(pixels, kind, severity)

    np.testing.assert_allclose(done("brightness_down"), 0.35, rtol=1e-6)
    np.testing.assert_allclose(done("gamma_up", 4), 0.25, rtol=1e-6)
    np.testing.assert_allclose(done("motion_blur"), 0.5, rtol=1e-6)
    assert done("shot_noise").var() == pytest.approx(0.5 / 100, rel=0.1)  # Poisson of 50, over 100
    assert done("speckle_noise").std() == pytest.approx(0.5 * 0.12, rel=0.05)
    assert (done("impulse_noise", 5) != 0.5).mean() == pytest.approx(0.07, rel=0.2)
    edge = np.zeros((1, 5, 9, 1))
    edge[:, :, 4] = 1
    np.testing.assert_allclose(shifts.shifted(edge, "motion_blur", 1)[0, 2, :, 0], [0, 0, 0, *[1 / 3] * 3, 0, 0, 0])
    colours = RNG.random((1, 4, 4, 3))
    grey = np.repeat(colours.mean(-1, keepdims=True), 3, -1)
    np.testing.assert_allclose(shifts.shifted(colours, "desaturate", 5), grey, rtol=1e-5)


def test_shift_auroc_agrees_with_scikit_learn():
    split, predict_samples = split_of()
    options = {"boundary": False, "verbose": False}
    clean = scoring.score(predict_samples, split, "segmentation", **options)
    moved = scoring.score(predict_samples, split, "segmentation", batch_size=7, shift=("contrast", 0.5), **options)
    images = shifts.shifted(split.normalised(), "contrast", 0.5)
    parts = [metrics.uncertainty(predict_samples(one)) for one in (split.normalised(), images)]
    found = shift_auroc(clean, moved)
    for key in ("entropy", "mutual_information"):
        values = np.concatenate([part[key].mean((1, 2)) for part in parts])
        assert found[key] == pytest.approx(sk.roc_auc_score(np.repeat([0, 1], 23), values))
    assert found["undefined"] == {} and found["entropy"] > 0.6
    noise = [
        scoring.score(predict_samples, split, "segmentation", batch_size=size, shift=("noise", 1.0), **options)
        for size in (4, 50)
    ]
    assert_same(noise[0].metrics(), noise[1].metrics())


def test_shift_auroc_of_one_sample_has_no_mutual_information():
    records = [record_of(LABEL_PROBS[:1], LABELS, "multi-label") for _ in range(2)]
    found = shift_auroc(*records)
    assert found["entropy"] == 0.5 and "mutual_information" not in found
    assert found["undefined"]["mutual_information"].startswith("one sample")
    with pytest.raises(ValueError, match="one task"):
        shift_auroc(records[0], record_of(LABEL_PROBS[..., :1], LABELS[:, :1], "binary"))


# The threshold, chosen on validation


def test_threshold_of_labels_has_the_best_balanced_accuracy():
    mean = LABEL_PROBS.mean(0)
    labels = np.concatenate([LABELS, np.zeros((60, 1), "uint8")], 1)  # the last label does not occur
    probs = np.concatenate([mean, mean[:, :1]], 1)
    cuts = np.arange(5, 100, 5) / 100
    scores = [np.mean([sk.balanced_accuracy_score(LABELS[:, k], mean[:, k] > c) for k in range(5)]) for c in cuts]
    found = scoring.select_threshold(probs, labels, "multi-label")
    assert found == pytest.approx(cuts[np.argmax(scores)]) and found != 0.5


def test_threshold_of_masks_has_the_best_dice(tmp_path):
    probs, masks = sharp_masks()
    probs = probs.mean(0) ** 3  # too sure of background
    cuts = np.arange(5, 100, 5) / 100
    truth = metrics.majority_mask(masks)
    scores = [metrics.dice(truth, probs > cut).mean() for cut in cuts]
    found = scoring.select_threshold(probs, masks, "segmentation")
    assert found == pytest.approx(cuts[np.argmax(scores)]) and found < 0.5
    np.save(tmp_path / "masks.npy", masks)
    assert scoring.select_threshold(probs, DiskArray(tmp_path / "masks.npy"), "segmentation") == found


@pytest.mark.parametrize(("low", "high", "expected"), [(0.0, 1.0, 0.5), (0.1, 0.32, 0.3), (0.62, 0.8, 0.65)])
def test_of_equal_thresholds_the_one_nearest_a_half(low, high, expected):
    labels = np.array([[0], [1], [0], [1]])
    assert scoring.select_threshold(np.where(labels, high, low), labels, "binary") == pytest.approx(expected)


def test_a_threshold_that_nothing_tells_is_a_half():
    assert scoring.select_threshold(LABEL_PROBS[0], np.zeros_like(LABELS), "multi-label") == 0.5
    assert scoring.select_threshold(CLASS_PROBS[0], ONE_HOT, "multi-class") == 0.5
    with pytest.raises(ValueError, match=r"0\.\.1"):
        scoring.select_threshold(LABEL_PROBS[0] * 3, LABELS, "multi-label")


# Rows that never look at an image, as records


@pytest.mark.parametrize("name", ["phantom_nodule", "phantom_chest"])
def test_trivial_records_are_the_trivial_rows(name):
    data = datasets.load(name, size=16, limit=20)
    task, test = data.card.task, data.test
    found = trivial.trivial_records(data, threshold=0.3, boundary=False)
    rows = trivial.trivial(
        task,
        data.train.targets,
        test.targets,
        rater_valid=test.rater_valid,
        train_rater_valid=data.train.rater_valid,
    )
    assert list(found) == list(rows)
    for key, record in found.items():
        assert record.threshold == 0.3 and record.num_images == test.num_examples
        row = record.metrics()
        assert [row[one] for one in ("nll", "brier", "ece")] == [rows[key][one] for one in ("nll", "brier", "ece")]
        np.testing.assert_array_equal(record.groups is None, test.groups is None)
    assert "brier" in scoring.compare(*found.values(), num_resamples=20)


def test_level_sets_are_masks_alone():
    data = datasets.load("phantom_nodule", size=16, limit=20)

    def predict_samples(images):
        return 1 / (1 + np.exp(-images[None, ..., 0]))

    record = trivial.trivial_records(data, boundary=False, deterministic=predict_samples, batch_size=6)["level_sets"]
    row = record.metrics()
    assert set(row) == {"ged", "hungarian_iou", "undefined"}
    assert (
        row["undefined"]["nll"]
        == row["undefined"]["dice"]
        == ("not measured: these predictions are masks, not probabilities")
    )
    masks = trivial.level_sets(predict_samples(data.test.normalised())[0])
    expected = metrics.generalised_energy_distance(np.asarray(data.test.targets), masks, data.test.rater_valid)
    assert row["ged"] == pytest.approx(expected[data.test.rater_valid.sum(1) > 1].mean())
    assert set(record.bootstrap(num_resamples=20)) == {"ged", "hungarian_iou", "undefined"}


def test_level_sets_by_hand():
    probs = np.array([[[0.05, 0.1, 0.2], [0.6, 0.95, 0.3]]])
    masks = trivial.level_sets(probs, (0.1, 0.5))
    np.testing.assert_array_equal(masks, [[[[0, 0, 1], [1, 1, 1]]], [[[0, 0, 0], [1, 1, 0]]]])
    np.testing.assert_array_equal(trivial.level_sets(probs[..., None], (0.1, 0.5)), masks)
    assert trivial.level_sets(probs).shape == (5, 1, 2, 3) and masks.dtype == np.float32
    with pytest.raises(ValueError, match=r"\(batch, height, width\).*\(2, 3\)"):
        trivial.level_sets(probs[0])
    with pytest.raises(ValueError, match=r"0\.\.1, none of them NaN"):
        trivial.level_sets(np.where(probs > 0.9, np.nan, probs))


def test_where_nothing_is_marked_there_is_no_calibration_of_the_region():
    row = scoring.evaluate(np.full((1, 2, 4, 4), 0.1), np.zeros((2, 4, 4, 1)), "segmentation")
    assert "ece_region" not in row and row["undefined"]["ece_region"] == "no rater and no prediction marks a pixel"
