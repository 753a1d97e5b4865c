"""Metrics: against scikit-learn, sums by hand, and laws."""

import json

import numpy as np
import pytest
from scipy import stats
from sklearn import metrics as sk

from sbn_tf import evaluation, metrics
from sbn_tf.datasets.arrays import DiskArray

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


def floats(row):
    return {key: value for key, value in row.items() if key != "undefined"}


def assert_same(one, two):
    assert one["undefined"] == two["undefined"]
    assert floats(one) == pytest.approx(floats(two), rel=1e-9, abs=1e-12)


# Multi-label


def test_multi_label_agrees_with_scikit_learn():
    row = evaluation.evaluate(LABEL_PROBS, LABELS, "multi-label")
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
    row = evaluation.evaluate(LABEL_PROBS, labels, "multi-label")
    kept = [0, 2, 4]
    assert row["auc_num_labels"] == 3
    assert row["auc"] == pytest.approx(sk.roc_auc_score(labels[:, kept], LABEL_PROBS.mean(0)[:, kept]), rel=1e-6)
    row = evaluation.evaluate(LABEL_PROBS, np.zeros_like(labels), "multi-label")
    assert row["auc_num_labels"] == 0
    assert "auc" not in row and "average_precision" not in row
    assert row["undefined"]["auc"] == "no label occurs as both 0 and 1"


def test_ece_by_hand():
    # Bins of 1/15: {.01, .02} with one of two positive, {.5} and {1.0} with one of one.
    probs, targets = np.array([0.01, 0.02, 0.5, 1.0]), np.array([0, 1, 1, 1])
    assert metrics.ece(probs, targets) == pytest.approx((abs(0.03 - 1) + 0.5 + 0) / 4)
    # Well calibrated: 0.25 with one of four.
    assert metrics.ece(np.full(4, 0.25), np.array([0, 0, 1, 0])) == 0


def test_ece_per_label_is_the_ece_of_each_column():
    mean = LABEL_PROBS.mean(0)
    values = metrics.ece(mean, LABELS, per_label=True)
    assert values.shape == (5,)
    assert values[2] == metrics.ece(mean[:, 2], LABELS[:, 2])


def test_a_certain_mistake_costs_a_finite_log_score():
    assert metrics.nll([0.0], [1]) == pytest.approx(-np.log(1e-7))
    assert metrics.nll([0.0, 1.0], [0, 1]) == pytest.approx(0, abs=1e-6)


def test_brier_skill_is_against_the_training_prevalence():
    frequency = evaluation.prevalence("multi-label", LABELS)
    row = evaluation.evaluate(LABEL_PROBS, LABELS, "multi-label", train_prevalence=frequency)
    reference = ((frequency - LABELS) ** 2).mean()
    assert row["brier_skill"] == pytest.approx(1 - row["brier"] / reference)
    row = evaluation.evaluate(LABEL_PROBS, LABELS, "multi-label")
    assert row["undefined"]["brier_skill"] == "train_prevalence was not given"
    perfect = evaluation.evaluate(LABELS[None].astype(float), LABELS, "multi-label", train_prevalence=frequency)
    assert perfect["brier_skill"] == 1 and perfect["auc"] == 1 and perfect["ece"] == 0


# Binary, and classes that exclude one another


def test_binary_is_multi_label_with_one_label_less_the_papers_metrics():
    probs, labels = LABEL_PROBS[..., :1], LABELS[:, :1]
    row = evaluation.evaluate(probs, labels, "binary", train_prevalence=0.4)
    same = evaluation.evaluate(probs, labels, "multi-label", train_prevalence=0.4)
    assert {key for key in same if key not in row} == {"paper_accuracy", "paper_brier", "paper_entropy"}
    assert_same(row, {key: same[key] for key in row})
    mean = probs.astype("float64").mean(0)
    assert row["auc"] == pytest.approx(sk.roc_auc_score(labels, mean))
    assert row["average_precision"] == pytest.approx(sk.average_precision_score(labels, mean))


@pytest.mark.parametrize("task", ["multi-class", "ordinal"])
def test_classes_agree_with_scikit_learn_and_scipy(task):
    row = evaluation.evaluate(CLASS_PROBS, ONE_HOT, task)
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


def test_grades_agree_with_scikit_learn():
    row = evaluation.evaluate(CLASS_PROBS, ONE_HOT, "ordinal")
    predicted = CLASS_PROBS.mean(0).argmax(1)
    assert row["mean_absolute_error"] == pytest.approx(sk.mean_absolute_error(CLASSES, predicted))
    assert row["quadratic_kappa"] == pytest.approx(sk.cohen_kappa_score(CLASSES, predicted, weights="quadratic"))


def test_grades_that_are_all_the_same_have_no_kappa():
    targets = np.tile(np.eye(3, dtype="uint8")[1], (5, 1))
    row = evaluation.evaluate(targets[None] * 1.0, targets, "ordinal")
    assert "quadratic_kappa" not in row and row["undefined"]["quadratic_kappa"].startswith("every grade")
    assert row["undefined"]["auc"] == "no label occurs as both 0 and 1"
    assert row["mean_absolute_error"] == row["nll"] == 0 and row["accuracy"] == 1


def test_the_ece_of_classes_is_of_the_most_probable_one_by_hand():
    # Confidences .5 and .52 share a bin of 1/15, the first right; .9 wrong; 1.0 right, in the last bin with .96, right.
    probs = np.array([[0.5, 0.3, 0.2], [0.24, 0.52, 0.24], [0.05, 0.05, 0.9], [0, 1, 0], [0.96, 0.02, 0.02]])
    targets = np.eye(3, dtype="uint8")[[0, 0, 1, 1, 0]]
    row = evaluation.evaluate(probs[None], targets, "multi-class")
    assert row["ece"] == pytest.approx((abs(1.02 - 1) + 0.9 + abs(1.96 - 2)) / 5)


def test_a_class_that_does_not_occur_is_left_out_of_the_auc():
    probs = np.concatenate([CLASS_PROBS * 0.9, np.full((3, 60, 1), 0.1, "float32")], -1)
    row = evaluation.evaluate(probs, np.pad(ONE_HOT, ((0, 0), (0, 1))), "multi-class")
    assert row["auc_num_labels"] == 4
    assert row["auc"] == pytest.approx(evaluation.evaluate(CLASS_PROBS, ONE_HOT, "multi-class")["auc"])


@pytest.mark.parametrize("task", ["multi-class", "ordinal"])
def test_trivial_rows_of_classes_by_hand(task):
    rows = evaluation.trivial(task, ONE_HOT, ONE_HOT[::-1][:40])  # of 40: 10, 15, 10, 5
    assert list(rows) == ["most_frequent", "prevalence"]
    frequency = np.array([30, 15, 10, 5]) / 60
    np.testing.assert_allclose(evaluation.prevalence(task, ONE_HOT), frequency)
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
    rows = evaluation.trivial("binary", LABELS[:, :1], LABELS[:, :1])
    assert list(rows) == ["all_negative", "prevalence"]
    assert rows["all_negative"]["accuracy"] == pytest.approx(1 - LABELS[:, 0].mean())


# Uncertainty


@pytest.mark.parametrize("probs", [LABEL_PROBS, MASK_PROBS, np.array([[0.0], [1.0]]), np.array([[0.3]])])
def test_entropy_is_expected_entropy_plus_mutual_information(probs):
    parts = metrics.uncertainty(probs)
    np.testing.assert_allclose(parts["entropy"], parts["expected_entropy"] + parts["mutual_information"])
    assert (parts["mutual_information"] >= -1e-12).all()
    if len(probs) == 1:
        np.testing.assert_array_equal(parts["mutual_information"], 0)


@pytest.mark.parametrize("task", ["multi-class", "ordinal"])
def test_entropy_over_classes(task):
    two = np.array([[[1.0, 0, 0]], [[0, 1.0, 0]]])  # two certain samples of one image that disagree
    parts = metrics.uncertainty(two, task)
    assert parts["mean_probs"].shape == (1, 3) and parts["entropy"].shape == (1,)
    assert parts["expected_entropy"][0] == 0
    assert parts["mutual_information"][0] == pytest.approx(np.log(2))
    assert metrics.uncertainty(np.full((1, 1, 3), 1 / 3), task)["entropy"][0] == pytest.approx(np.log(3))


def test_entropy_by_hand():
    np.testing.assert_allclose(metrics.binary_entropy([0, 0.5, 1]), [0, np.log(2), 0])
    parts = metrics.uncertainty(np.array([[0.0], [1.0]]))  # two certain samples that disagree
    assert parts["expected_entropy"] == 0
    assert parts["mutual_information"] == pytest.approx(np.log(2))


# Segmentation


def test_majority_mask_gives_a_tie_to_the_foreground():
    masks = np.array([[[[1, 1, 0, 0], [1, 0, 0, 0]]]])
    np.testing.assert_array_equal(metrics.majority_mask(masks), [[[True, False]]])
    np.testing.assert_array_equal(metrics.majority_mask(masks, [[1, 1, 1, 0]]), [[[True, False]]])


def test_dice_and_iou_by_hand():
    a = np.array([[[1, 1, 0, 0]], [[0, 0, 0, 0]], [[1, 0, 0, 0]], [[0, 0, 0, 0]]])
    b = np.array([[[0, 1, 1, 1]], [[0, 0, 0, 0]], [[0, 0, 0, 0]], [[0, 1, 0, 0]]])
    np.testing.assert_allclose(metrics.dice(a, b), [2 / 5, 1, 0, 0])
    np.testing.assert_allclose(metrics.iou(a, b), [1 / 4, 1, 0, 0])
    np.testing.assert_allclose(metrics.dice(a[:1], b[:1])[0], sk.f1_score(b[0].ravel(), a[0].ravel()))
    np.testing.assert_allclose(metrics.iou(a[:1], b[:1])[0], sk.jaccard_score(b[0].ravel(), a[0].ravel()))


def test_segmentation_scores_are_means_over_valid_raters():
    row = evaluation.evaluate(MASK_PROBS, MASKS, "segmentation", rater_valid=VALID)
    mean = MASK_PROBS.astype("float64").mean(0)
    nll, brier, paper_brier, paper_dice, paper_iou = [], [], [], [], []
    for image in range(6):
        raters = np.flatnonzero(VALID[image])
        truths = [MASKS[image, ..., rater] for rater in raters]
        nll.append(np.mean([sk.log_loss(y.ravel(), mean[image].ravel(), labels=[0, 1]) for y in truths]))
        brier.append(np.mean([((mean[image] - y) ** 2).mean() for y in truths]))
        paper_brier.append(np.mean([metrics.paper_brier(MASK_PROBS[:, image], y) for y in truths]))
        one = MASK_PROBS[:, [image]]
        paper_dice.append(np.mean([metrics.paper_dice(one, y[None]) for y in truths]))
        paper_iou.append(np.mean([metrics.paper_iou(one, y[None]) for y in truths]))
    for key, values in {
        "nll": nll,
        "brier": brier,
        "paper_brier": paper_brier,
        "paper_dice": paper_dice,
        "paper_iou": paper_iou,
    }.items():
        assert row[key] == pytest.approx(np.mean(values)), key
    majority = metrics.majority_mask(MASKS, VALID)
    assert row["dice"] == pytest.approx(metrics.dice(mean > 0.5, majority).mean())
    several = VALID.sum(1) > 1
    expected = [
        np.mean([metrics.dice(mean[[i]] > 0.5, MASKS[[i], ..., r])[0] for r in np.flatnonzero(VALID[i])])
        for i in np.flatnonzero(several)
    ]
    assert row["dice_raters"] == pytest.approx(np.mean(expected))


def test_fillers_of_invalid_raters_do_not_matter():
    other = np.where(VALID[:, None, None, :], MASKS, 1 - MASKS)
    rows = [evaluation.evaluate(MASK_PROBS, masks, "segmentation", rater_valid=VALID) for masks in (MASKS, other)]
    assert_same(*rows)


def test_pixel_ece_and_correlation_pool_all_images(monkeypatch):
    row = evaluation.evaluate(MASK_PROBS, MASKS, "segmentation")
    mean, soft = MASK_PROBS.astype("float64").mean(0), MASKS.mean(-1)
    assert row["ece"] == pytest.approx(metrics.ece(mean, soft))
    entropy = metrics.binary_entropy(mean).ravel()
    expected = np.corrcoef(entropy, (soft * (1 - soft)).ravel())[0, 1]
    assert row["entropy_disagreement_pearson"] == pytest.approx(expected)
    monkeypatch.setattr(evaluation, "CHUNK_VALUES", 1)  # image by image
    frequency = evaluation.prevalence("segmentation", MASKS)
    assert_same(
        {**evaluation.evaluate(MASK_PROBS, MASKS, "segmentation")},
        row,
    )
    row = evaluation.evaluate(MASK_PROBS, MASKS, "segmentation", train_prevalence=frequency)
    reference = ((frequency[None, ..., None] - MASKS) ** 2).mean()
    assert row["brier_skill"] == pytest.approx(1 - row["brier"] / reference)


def test_masks_on_disk_score_as_those_in_memory(tmp_path):
    np.save(tmp_path / "masks.npy", MASKS)
    masks = DiskArray(tmp_path / "masks.npy")
    assert_same(
        evaluation.evaluate(MASK_PROBS, masks, "segmentation", rater_valid=VALID),
        evaluation.evaluate(MASK_PROBS, MASKS, "segmentation", rater_valid=VALID),
    )
    np.testing.assert_array_equal(
        evaluation.prevalence("segmentation", masks, VALID), evaluation.prevalence("segmentation", MASKS, VALID)
    )
    assert_same(
        evaluation.trivial("segmentation", masks, masks)["prevalence"],
        evaluation.trivial("segmentation", MASKS, MASKS)["prevalence"],
    )
    np.save(tmp_path / "wrong.npy", MASKS * 2)
    with pytest.raises(ValueError, match=r"0 or 1.*0 to 2"):
        evaluation.prevalence("segmentation", DiskArray(tmp_path / "wrong.npy"))


def test_energy_distance_laws():
    masks = np.moveaxis((MASK_PROBS > 0.5), 0, -1)
    np.testing.assert_allclose(metrics.generalised_energy_distance(MASK_PROBS, masks), 0, atol=1e-12)
    distance = metrics.generalised_energy_distance(MASK_PROBS, MASKS, VALID)
    assert distance.shape == (6,) and (distance >= 0).all()
    # Repeating all samples leaves their distribution as it was.
    twice = np.concatenate([MASK_PROBS, MASK_PROBS])
    np.testing.assert_allclose(metrics.generalised_energy_distance(twice, MASKS, VALID), distance)


def test_energy_distance_by_hand():
    # Samples {a}, {a, b}; raters {a}, {}. d(S, Y): 0, 1, 1/2, 1. d(S, S'): 1/2, twice. d(Y, Y'): 1, twice.
    probs = np.array([[[[1, 0]]], [[[1, 1]]]])
    masks = np.array([[[[1, 0], [0, 0]]]])
    expected = 2 * (0 + 1 + 0.5 + 1) / 4 - (0.5 + 0.5) / 4 - (1 + 1) / 4
    np.testing.assert_allclose(metrics.generalised_energy_distance(probs, masks), [expected])
    empty = metrics.generalised_energy_distance(np.zeros((2, 1, 1, 2)), np.zeros((1, 1, 2, 3)))
    np.testing.assert_array_equal(empty, [0])


def test_one_rater_leaves_rater_metrics_undefined():
    row = evaluation.evaluate(MASK_PROBS[..., None], MASKS[..., :1], "segmentation")
    for key in ("ged", "dice_raters", "entropy_disagreement_pearson"):
        assert key not in row
        assert row["undefined"][key] == "no image has two or more valid raters"


def test_per_image_means_are_what_evaluate_reports():
    row = evaluation.evaluate(MASK_PROBS, MASKS, "segmentation", rater_valid=VALID)
    scores = evaluation.per_image(MASK_PROBS, MASKS, VALID)
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
    row = evaluation.evaluate(probs, targets, task)
    assert_same(evaluation.evaluate(probs[::-1], targets, task), row)
    assert_same(evaluation.evaluate(probs[:, ::-1], targets[::-1], task), row)


@pytest.mark.parametrize(("task", "probs", "targets"), EXAMPLES)
@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_rows_are_plain_floats(task, probs, targets, dtype):
    row = evaluation.evaluate(probs[:1].astype(dtype), targets.astype(bool), task)
    assert all(type(value) is float and np.isfinite(value) for value in floats(row).values())
    assert json.loads(json.dumps(row)) == row
    assert row["mutual_information"] == 0
    assert set(row["undefined"]) == {"brier_skill"}


def test_rounding_above_one_is_forgiven():
    probs = np.minimum(LABEL_PROBS.astype("float64") + 1, 1 + 1e-7)
    row = evaluation.evaluate(probs, LABELS, "multi-label")
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
        evaluation.evaluate(probs, targets, task, **options)
    assert "Received" in str(error.value) and len(str(error.value).splitlines()) <= 2


def test_scores_refuse_to_broadcast():
    for score in (metrics.nll, metrics.brier, metrics.accuracy, metrics.ece, metrics.auc_per_label):
        with pytest.raises(ValueError, match="one shape"):
            score(LABEL_PROBS, LABELS)


# The paper's metrics, and trivial predictors


def test_papers_binary_brier_is_the_brier_of_the_mean_plus_the_samples_variance():
    variance = LABEL_PROBS.astype("float64").var(0).mean()
    brier = metrics.brier(LABEL_PROBS.mean(0, dtype="float64"), LABELS)
    assert metrics.paper_brier(LABEL_PROBS, LABELS) == pytest.approx(brier + variance)


def test_papers_softmax_applied_twice_has_a_floor():
    masks = MASKS[None, ..., 0].astype(float)
    assert metrics.paper_brier(masks, MASKS[..., 0], softmax_twice=True) == pytest.approx(0.0723, abs=5e-5)
    row = evaluation.evaluate(masks, MASKS[..., :1], "segmentation")
    assert row["paper_brier_softmax_twice"] == pytest.approx(0.0723, abs=5e-5)
    assert row["paper_brier"] == row["brier"] == 0


def test_papers_accuracy_is_a_vote():
    probs = np.array([[[0.6]], [[0.6]], [[0.0]]])  # mean 0.4, two votes of three
    assert metrics.paper_accuracy(probs, [[1]]) == 1
    assert metrics.accuracy(probs.mean(0), [[1]]) == 0
    assert metrics.paper_accuracy(probs[1:], [[1]]) == 0  # a tie


def test_papers_dice_by_its_formula():
    probs, truth, eps = MASK_PROBS.astype("float64"), MASKS[..., 0], 1e-5
    both_p, both_y = np.stack([1 - probs, probs]), np.stack([1 - truth, truth])[:, None]
    expected = ((2 * both_p * both_y + eps) / (both_p + both_y + eps)).mean((0, 1, 3, 4))
    np.testing.assert_allclose(metrics.paper_dice(probs, truth), expected)


def test_papers_iou_sums_over_samples():
    probs = np.array([[[[1, 0]]], [[[1, 1]]]])
    np.testing.assert_allclose(metrics.paper_iou(probs, np.array([[[0, 1]]])), [1 / 4])
    np.testing.assert_array_equal(metrics.paper_iou(np.zeros((2, 1, 1, 2)), np.zeros((1, 1, 2))), [1])
    one = metrics.iou(MASK_PROBS[0] > 0.5, MASKS[..., 0])
    np.testing.assert_allclose(metrics.paper_iou(MASK_PROBS[:1], MASKS[..., 0]), one)


def test_trivial_rows_of_labels_as_in_the_paper():
    # Prevalences near ChestMNIST's, from its 4.7 (infiltration) to over 500 negatives a positive (hernia).
    percent = [10.5, 2.6, 12.2, 18.2, 5.2, 5.7, 1.3, 4.9, 4.3, 2.2, 2.4, 1.5, 3.0, 0.2]
    labels = RNG.permuted(np.arange(1000)[:, None] < 10 * np.array(percent), axis=0).astype("uint8")
    rows = evaluation.trivial("multi-label", labels, labels)
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
    rows = evaluation.trivial("segmentation", masks[:5], masks[5:], rater_valid=np.ones((5, 3)))
    assert list(rows) == ["all_background", "prevalence"]
    assert rows["all_background"]["paper_dice"] == pytest.approx(0.99, abs=0.002)
    assert rows["all_background"]["dice"] == 0
    assert rows["prevalence"]["dice"] == 1
    assert rows["prevalence"]["brier_skill"] == 0
    assert rows["all_background"]["undefined"]["entropy_disagreement_pearson"].startswith("the entropy")
    frequency = evaluation.prevalence("segmentation", masks[:5])
    assert frequency.shape == (20, 20) and frequency[0, 0] == pytest.approx(3 / 5 / 3)
