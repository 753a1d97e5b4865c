"""The definitions of the metrics: against scikit-learn, scipy, sums by hand, and laws."""

import itertools
import os
from pathlib import Path

import numpy as np
import pytest
from scipy import optimize, spatial, stats
from sklearn import calibration
from sklearn import metrics as sk

from sbn_tf import datasets, metrics

RNG = np.random.default_rng(0)
LABELS = (RNG.random((60, 5)) < [0.5, 0.3, 0.2, 0.1, 0.05]).astype("uint8")
LABELS[0], LABELS[1] = 1, 0
LABEL_PROBS = RNG.beta(1, 3, (4, 60, 5)).astype("float32")
MEAN = LABEL_PROBS.mean(0, dtype="float64")
MASKS = (RNG.random((6, 8, 10, 3)) < RNG.random((6, 8, 10, 1)) ** 2).astype("uint8")
MASK_PROBS = RNG.beta(0.5, 1, (4, 6, 8, 10)).astype("float32")
CLASS_PROBS = RNG.dirichlet([0.6, 0.5, 0.5, 0.4], (3, 20))
VALID = np.array([[1, 1, 1], [1, 1, 0], [1, 0, 0], [0, 1, 1], [1, 1, 1], [0, 0, 1]], bool)
# Images of NIH ChestX-ray14 (which are ChestMNIST's, all splits together) with each finding, in ChestMNIST's order.
CHEST_POSITIVES = (11559, 2776, 13317, 19894, 5782, 6331, 1431, 5302, 4667, 2303, 2516, 1686, 3385, 227)
CHEST_PREVALENCE = np.array(CHEST_POSITIVES) / 112_120

# Scores of the mean prediction


def test_scores_agree_with_scikit_learn():
    flat, true = MEAN.ravel(), LABELS.ravel()
    assert metrics.nll(LABELS, MEAN) == pytest.approx(sk.log_loss(true, flat))
    assert metrics.brier(LABELS, MEAN) == pytest.approx(sk.brier_score_loss(true, flat))
    assert metrics.accuracy(LABELS, MEAN) == pytest.approx(sk.accuracy_score(true, flat > 0.5))
    for ours, theirs in (
        (metrics.auc_per_label, sk.roc_auc_score),
        (metrics.average_precision_per_label, sk.average_precision_score),
    ):
        np.testing.assert_allclose(ours(LABELS, MEAN), theirs(LABELS, MEAN, average=None))


def test_a_label_of_one_class_has_no_ranking_score():
    labels = LABELS.copy()
    labels[:, 1], labels[:, 3] = 0, 1
    for score in (metrics.auc_per_label, metrics.average_precision_per_label):
        np.testing.assert_array_equal(np.isnan(score(labels, MEAN)), [False, True, False, True, False])


def test_a_certain_mistake_costs_a_finite_log_score():
    assert metrics.nll([1], [0.0]) == pytest.approx(-np.log(1e-7))
    assert metrics.nll([0, 1], [0.0, 1.0]) == pytest.approx(0, abs=1e-6)


def test_soft_targets_give_the_expectation_over_raters():
    soft = MASKS.mean(-1)
    mean = MASK_PROBS.mean(0, dtype="float64")
    each = [metrics.nll(MASKS[..., rater], mean) for rater in range(3)]
    assert metrics.nll(soft, mean) == pytest.approx(np.mean(each))
    each = [metrics.brier(MASKS[..., rater], mean) for rater in range(3)]
    assert metrics.brier(soft, mean) + metrics.disagreement(MASKS).mean() == pytest.approx(np.mean(each))


def test_brier_skill_by_hand():
    # Brier (.04 + .09 + .16 + .01) / 4 = .075; of the prevalence 1/4: (3 / 16 + 9 / 16) / 4 = .1875.
    probs, targets = [0.2, 0.3, 0.6, 0.1], [0, 0, 1, 0]
    assert metrics.brier_skill(targets, probs, 0.25) == pytest.approx(1 - 0.075 / 0.1875)
    assert metrics.brier_skill(LABELS, np.full((60, 5), LABELS.mean(0)), LABELS.mean(0)) == 0
    assert metrics.brier_skill(LABELS, LABELS, LABELS.mean(0)) == 1
    assert np.isnan(metrics.brier_skill([0, 0], [0.1, 0.2], 0.0))  # the prevalence makes no error


# Calibration


def test_ece_by_hand():
    # Bins of 1/15: {.01, .02} with one of two positive, {.5} and {1.0} with one of one.
    probs, targets = np.array([0.01, 0.02, 0.5, 1.0]), np.array([0, 1, 1, 1])
    assert metrics.ece(targets, probs) == pytest.approx((abs(0.03 - 1) + 0.5 + 0) / 4)
    # Well calibrated: 0.25 with one of four.
    assert metrics.ece(np.array([0, 0, 1, 0]), np.full(4, 0.25)) == 0
    # Two bins of two: (.1, .2) without a positive, (.3, .9) with two.
    probs, targets = np.array([0.3, 0.1, 0.9, 0.2]), np.array([1, 0, 1, 0])
    assert metrics.ece(targets, probs, 2, binning="mass") == pytest.approx((0.3 + abs(1.2 - 2)) / 4)


@pytest.mark.parametrize(("binning", "strategy"), [("width", "uniform"), ("mass", "quantile")])
def test_ece_agrees_with_the_bins_of_scikit_learn(binning, strategy):
    probs, true = MEAN.ravel(), LABELS.ravel()  # 300 different values: 10 bins of 30
    frequency, mean = calibration.calibration_curve(true, probs, n_bins=10, strategy=strategy)
    if binning == "width":
        counts = np.histogram(probs, np.linspace(0, 1, 11))[0]
        counts = counts[counts > 0]
    else:
        counts = np.full(10, 30)
    expected = (counts * np.abs(frequency - mean)).sum() / 300
    assert metrics.ece(true, probs, 10, binning=binning) == pytest.approx(expected)


@pytest.mark.parametrize("binning", ["width", "mass"])
def test_ece_laws(binning):
    def ece(probs, targets, **options):
        return metrics.ece(targets, probs, binning=binning, **options)

    order = RNG.permutation(60)
    rounded = MEAN.round(1)  # many ties
    assert ece(LABELS[order], rounded[order]) == pytest.approx(ece(LABELS, rounded))
    values = ece(LABELS, MEAN, per_label=True)
    assert values.shape == (5,) and values[2] == ece(LABELS[:, 2], MEAN[:, 2])
    assert 0 <= ece(LABELS, MEAN) <= 1
    # One bin: the difference of the means. Bins can only add to it.
    in_all = abs(MEAN.mean() - LABELS.mean())
    assert ece(LABELS, MEAN, num_bins=1) == pytest.approx(in_all)
    assert ece(LABELS, MEAN, num_bins=7) >= in_all - 1e-12
    assert ece(np.ones(3), np.zeros(3)) == 1
    assert ece([1], [0.3]) == pytest.approx(0.7)  # one value


@pytest.mark.parametrize("num_bins", [1, 2, 15, 1000])
@pytest.mark.parametrize(
    ("probs", "targets"),
    [(MEAN, LABELS), (MASK_PROBS[0], MASKS.mean(-1)), ([0.0, 1.0], [1, 0]), ([0.4], [1]), (MEAN, LABELS * 0)],
)
def test_the_brier_decomposition_is_exact(num_bins, probs, targets):
    parts = metrics.brier_decomposition(targets, probs, num_bins)
    total = parts["reliability"] - parts["resolution"] + parts["uncertainty"] + parts["within"]
    assert total == pytest.approx(metrics.brier(targets, probs), abs=1e-14)
    assert parts["reliability"] >= 0 and -1e-15 <= parts["resolution"] <= parts["uncertainty"] + 1e-15


def test_the_brier_decomposition_by_hand():
    # p = .25 with one of four, p = .75 with four of four: q = 5/8.
    parts = metrics.brier_decomposition([0, 0, 1, 0, 1, 1, 1, 1], [0.25] * 4 + [0.75] * 4)
    assert parts["reliability"] == pytest.approx(0.5 * 0.25**2)
    assert parts["resolution"] == pytest.approx((3 / 8) ** 2)
    assert parts["uncertainty"] == pytest.approx(5 / 8 * 3 / 8)
    assert parts["within"] == pytest.approx(0)
    # One bin of two values, p = .2 and .4 with y = 0 and 1: variance .01, covariance .05.
    parts = metrics.brier_decomposition([0, 1], [0.2, 0.4], num_bins=1)
    assert parts["within"] == pytest.approx(0.01 - 2 * 0.05)


# Entropies


@pytest.mark.parametrize("probs", [LABEL_PROBS, MASK_PROBS, np.array([[0.0], [1.0]]), np.array([[0.3]])])
def test_entropy_is_expected_entropy_plus_mutual_information(probs):
    parts = metrics.uncertainty(probs)
    np.testing.assert_allclose(parts["entropy"], parts["expected_entropy"] + parts["mutual_information"])
    assert (parts["mutual_information"] >= -1e-12).all() and (parts["entropy"] <= np.log(2) + 1e-12).all()
    exact = probs.astype("float64")
    both = np.stack([exact, 1 - exact])
    # Mutual information is the mean divergence of the samples from their mean.
    divergence = stats.entropy(both, both.mean(1, keepdims=True) * np.ones_like(both), axis=0).mean(0)
    np.testing.assert_allclose(parts["mutual_information"], divergence, atol=1e-12)
    if len(probs) == 1:
        np.testing.assert_array_equal(parts["mutual_information"], 0)


@pytest.mark.parametrize("task", ["multi-class", "ordinal"])
def test_entropy_over_classes(task):
    parts = metrics.uncertainty(CLASS_PROBS, task)
    np.testing.assert_allclose(parts["entropy"], stats.entropy(CLASS_PROBS.mean(0), axis=-1))
    np.testing.assert_allclose(parts["expected_entropy"], stats.entropy(CLASS_PROBS, axis=-1).mean(0))
    two = np.array([[[1.0, 0, 0]], [[0, 1.0, 0]]])  # two certain samples of one image that disagree
    parts = metrics.uncertainty(two, task)
    assert parts["mean_probs"].shape == (1, 3) and parts["expected_entropy"][0] == 0
    assert parts["mutual_information"][0] == pytest.approx(np.log(2))
    assert metrics.uncertainty(np.full((1, 1, 3), 1 / 3), task)["entropy"][0] == pytest.approx(np.log(3))


def test_binary_entropy_by_hand():
    np.testing.assert_allclose(metrics.binary_entropy([0, 0.5, 1]), [0, np.log(2), 0])
    assert metrics.binary_entropy(1 + 1e-7) == 0  # rounding


# Masks


def test_majority_mask_gives_a_tie_to_the_foreground():
    masks = np.array([[[[1, 1, 0, 0], [1, 0, 0, 0]]]])
    np.testing.assert_array_equal(metrics.majority_mask(masks), [[[True, False]]])
    np.testing.assert_array_equal(metrics.majority_mask(masks, [[1, 1, 1, 0]]), [[[True, False]]])


def test_disagreement_is_the_variance_of_the_valid_raters():
    expected = [MASKS[image][..., VALID[image]].var(-1) for image in range(6)]
    np.testing.assert_allclose(metrics.disagreement(MASKS, VALID), expected)
    np.testing.assert_array_equal(metrics.disagreement(MASKS[..., :1]), 0)  # one rater


def test_dice_and_iou_by_hand():
    a = np.array([[[1, 1, 0, 0]], [[0, 0, 0, 0]], [[1, 0, 0, 0]], [[0, 0, 0, 0]]])
    b = np.array([[[0, 1, 1, 1]], [[0, 0, 0, 0]], [[0, 0, 0, 0]], [[0, 1, 0, 0]]])
    np.testing.assert_allclose(metrics.dice(b, a), [2 / 5, 1, 0, 0])
    np.testing.assert_allclose(metrics.iou(b, a), [1 / 4, 1, 0, 0])


def test_dice_and_iou_agree_with_scikit_learn():
    predicted = MASK_PROBS[0] > 0.5
    for image in range(6):
        true, found = MASKS[image, ..., 0].ravel(), predicted[image].ravel()
        assert metrics.dice(MASKS[..., 0], predicted)[image] == pytest.approx(sk.f1_score(true, found))
        assert metrics.iou(MASKS[..., 0], predicted)[image] == pytest.approx(sk.jaccard_score(true, found))


def test_dice_raters_is_the_mean_over_valid_raters():
    predicted = MASK_PROBS[0] > 0.5
    expected = [
        np.mean([sk.f1_score(MASKS[i, ..., r].ravel(), predicted[i].ravel()) for r in np.flatnonzero(VALID[i])])
        for i in range(6)
    ]
    np.testing.assert_allclose(metrics.dice_raters(MASKS, predicted, VALID), expected)
    np.testing.assert_allclose(  # one rater
        metrics.dice_raters(MASKS[..., :1], predicted), metrics.dice(MASKS[..., 0], predicted)
    )


def outline(mask):
    """Foreground pixels with a 4-neighbour outside, by hand."""
    padded = np.pad(mask, 1)
    inside = padded[:-2, 1:-1] & padded[2:, 1:-1] & padded[1:-1, :-2] & padded[1:-1, 2:]
    return np.argwhere(mask & ~inside)


@pytest.mark.parametrize("share", [0.05, 0.3, 0.7])
def test_hausdorff95_agrees_with_all_pairs_of_outline_pixels(share):
    rng = np.random.default_rng(1)
    a, b = rng.random((2, 8, 12, 15)) < share
    expected = []
    for one, other in zip(a, b, strict=True):
        pairs = spatial.distance.cdist(outline(one), outline(other))
        expected.append(np.percentile(np.concatenate([pairs.min(0), pairs.min(1)]), 95))
    np.testing.assert_allclose(metrics.hausdorff95(b, a), expected)
    np.testing.assert_allclose(metrics.hausdorff95(a, b), expected)


def test_hausdorff95_in_millimetres():
    """A mask moved by 2 rows of 3 mm: 6 mm everywhere; against nothing the diagonal of 10 x 3 and 10 x 1 mm."""
    one = np.zeros((1, 10, 10), bool)
    one[:, 3] = True
    np.testing.assert_allclose(metrics.hausdorff95(one, np.roll(one, 2, 1), spacing=(3, 1)), [6])
    np.testing.assert_allclose(metrics.hausdorff95(one, one & False, spacing=(3, 1)), [np.hypot(30, 10)])


def test_hausdorff95_by_hand():
    a, b = np.zeros((2, 5, 6, 8), bool)
    a[0, 1:4, 1:4], b[0, 1:4, 4:7] = True, True  # a square of 3, moved by 3: distances 1, 2 and 3
    a[1, 2, 2], b[1, 5, 6] = True, True  # two pixels 3 and 4 apart
    a[2], b[2] = True, True
    a[3, 0, 0] = True  # b is empty; a and b are in 4
    # Of a square's 8 outline pixels 3, 2, 3 lie 1, 2, 3 from the other's: of 16 the 95th percentile is 3.
    np.testing.assert_allclose(metrics.hausdorff95(b, a), [3, 5, 0, 10, 0])
    np.testing.assert_allclose(metrics.hausdorff95(a, b), [3, 5, 0, 10, 0])


# Sets of masks


def one_minus_iou(a, b):
    return 0.0 if not (a.any() or b.any()) else 1 - (a & b).sum() / (a | b).sum()


@pytest.mark.parametrize("image", range(6))
def test_energy_distance_is_the_sum_over_all_pairs(image):
    samples = list(MASK_PROBS[:, image] > 0.5)
    raters = [MASKS[image, ..., rater] == 1 for rater in np.flatnonzero(VALID[image])]

    def expected(a, b):
        return np.mean([one_minus_iou(x, y) for x, y in itertools.product(a, b)])

    value = 2 * expected(samples, raters) - expected(samples, samples) - expected(raters, raters)
    assert metrics.generalised_energy_distance(MASKS, MASK_PROBS, VALID)[image] == pytest.approx(value)


def test_energy_distance_by_hand():
    # Samples {a}, {a, b}; raters {a}, {}. d(S, Y): 0, 1, 1/2, 1. d(S, S'): 1/2, twice. d(Y, Y'): 1, twice.
    probs = np.array([[[[1, 0]]], [[[1, 1]]]])
    masks = np.array([[[[1, 0], [0, 0]]]])
    expected = 2 * (0 + 1 + 0.5 + 1) / 4 - (0.5 + 0.5) / 4 - (1 + 1) / 4
    np.testing.assert_allclose(metrics.generalised_energy_distance(masks, probs), [expected])
    empty = metrics.generalised_energy_distance(np.zeros((1, 1, 2, 3)), np.zeros((2, 1, 1, 2)))
    np.testing.assert_array_equal(empty, [0])


def test_masks_cut_at_every_level_keep_what_one_map_is_unsure_of():
    # One map, twice: .3 and .6. At 1/2 both samples are {b}; at 1/4 and 3/4 they are {a, b} and {}. Raters {a, b}, {}.
    probs, masks = np.full((2, 1, 1, 2), [0.3, 0.6]), np.array([[[[1, 0], [1, 0]]]])
    whole = 2 * (0.5 + 1 + 0.5 + 1) / 4 - 0 - 0.5
    np.testing.assert_allclose(metrics.generalised_energy_distance(masks, probs), [whole])
    np.testing.assert_allclose(metrics.generalised_energy_distance(masks, probs, spread=True), [0])


def test_hungarian_iou_by_hand():
    # Two samples {a}, {a, b}, one rater {a}: both are matched with it, (1 + 1/2) / 2.
    probs = np.array([[[[1, 0]]], [[[1, 1]]]])
    np.testing.assert_allclose(metrics.hungarian_iou(np.array([[[[1], [0]]]]), probs), [0.75])
    # Raters {b}, {a}: {a} with {a}, {a, b} with {b}. The greedy order would not do worse; the crossed one 1/4.
    np.testing.assert_allclose(metrics.hungarian_iou(np.array([[[[0, 1], [1, 0]]]]), probs), [0.75])
    np.testing.assert_array_equal(metrics.hungarian_iou(np.zeros((1, 1, 2, 3)), np.zeros((2, 1, 1, 2))), [1])


@pytest.mark.parametrize("image", range(6))
def test_hungarian_iou_is_the_optimal_transport_between_the_sets(image):
    samples = list(MASK_PROBS[:, image] > 0.5)
    raters = [MASKS[image, ..., rater] == 1 for rater in np.flatnonzero(VALID[image])]
    cost = np.array([[one_minus_iou(a, b) for b in raters] for a in samples])
    n, m = cost.shape
    # Every sample gives 1/n, every rater takes 1/m: a linear programme, which the repetition solves exactly.
    sums = np.concatenate([np.kron(np.eye(n), np.ones(m)), np.kron(np.ones(n), np.eye(m))])
    found = optimize.linprog(cost.ravel(), A_eq=sums, b_eq=np.repeat([1 / n, 1 / m], [n, m]))
    assert metrics.hungarian_iou(MASKS, MASK_PROBS, VALID)[image] == pytest.approx(1 - found.fun)


@pytest.mark.parametrize("seed", range(3))
def test_laws_of_sets_of_masks(seed):
    rng = np.random.default_rng(seed)
    masks = rng.random((5, 6, 7, 3)) < rng.random((5, 1, 1, 3))
    masks[0] = False
    probs = np.where(np.moveaxis(masks, -1, 0), 0.9, 0.1)
    # Identical sets, in any order and any number of times.
    for same in (probs, probs[[2, 0, 1]], np.concatenate([probs, probs])[..., None]):
        np.testing.assert_allclose(metrics.generalised_energy_distance(masks, same), 0, atol=1e-12)
        np.testing.assert_allclose(metrics.hungarian_iou(masks, same), 1)
    samples = rng.random((4, 5, 6, 7))
    valid = rng.permuted(np.arange(3) < rng.integers(1, 4, (5, 1)), axis=1)
    order, images = rng.permutation(4), rng.permutation(5)
    for score in (metrics.generalised_energy_distance, metrics.hungarian_iou):
        value = score(masks, samples, valid)
        assert (value >= 0).all() and (value <= 2).all()
        np.testing.assert_allclose(score(masks[..., ::-1], samples[order], valid[:, ::-1]), value)
        np.testing.assert_allclose(score(masks[images], samples[:, images], valid[images]), value[images])
        fillers = np.where(valid[:, None, None], masks, ~masks)
        np.testing.assert_array_equal(score(fillers, samples, valid), value)
        assert score(masks[..., :1], samples[:1]).shape == (5,)  # one sample, one rater
    matched = metrics.hungarian_iou(masks, samples, valid)
    assert (matched <= 1).all()
    # The best matching is no worse than the mean over all pairs.
    pairs = [
        np.mean(
            [1 - one_minus_iou(a, b) for a in samples[:, i] > 0.5 for b in np.moveaxis(masks[i][..., valid[i]], -1, 0)]
        )
        for i in range(5)
    ]
    assert (matched >= np.array(pairs) - 1e-12).all()


# Use of uncertainty


def test_risk_coverage_by_hand():
    # In the order of uncertainty the risks are 0, 1, 0, 1.
    coverage, risk = metrics.risk_coverage([0.4, 0.1, 0.3, 0.2], [1, 0, 0, 1])
    np.testing.assert_allclose(coverage, [0.25, 0.5, 0.75, 1])
    np.testing.assert_allclose(risk, [0, 1 / 2, 1 / 3, 1 / 2])
    area = (1 / 2 + 1 / 3 + 1 / 2) / 4
    assert metrics.area_under_risk_coverage([0.4, 0.1, 0.3, 0.2], [1, 0, 0, 1]) == pytest.approx(area)
    # The oracle: 0, 0, 1, 1.
    assert metrics.excess_area([0.4, 0.1, 0.3, 0.2], [1, 0, 0, 1]) == pytest.approx(area - (1 / 3 + 1 / 2) / 4)
    assert metrics.excess_area([5.0], [1]) == 0  # one image


def test_tied_uncertainties_give_the_mean_over_all_orders():
    uncertainty, risk = np.array([1, 0, 1, 1, 2]), np.array([0.3, 0.9, 0.0, 0.6, 0.2])
    curves = []
    for order in itertools.permutations(range(5)):
        if list(uncertainty[list(order)]) == sorted(uncertainty):
            curves.append(np.cumsum(risk[list(order)]) / np.arange(1, 6))
    assert len(curves) == 6
    np.testing.assert_allclose(metrics.risk_coverage(uncertainty, risk)[1], np.mean(curves, 0))


@pytest.mark.parametrize("seed", range(3))
def test_laws_of_risk_coverage(seed):
    rng = np.random.default_rng(seed)
    uncertainty, risk, order = rng.random(40).round(1), rng.random(40), rng.permutation(40)
    for score in (metrics.area_under_risk_coverage, metrics.excess_area):
        value = score(uncertainty, risk)
        assert score(uncertainty[order], risk[order]) == pytest.approx(value)
        assert score(np.exp(uncertainty), risk) == pytest.approx(value)  # only the order counts
    assert metrics.excess_area(uncertainty, risk) >= 0
    assert metrics.excess_area(risk, risk) == metrics.excess_area(uncertainty, np.ones(40)) == 0
    area = metrics.area_under_risk_coverage
    assert area(risk, risk) <= area(uncertainty, risk) <= area(-risk, risk)
    assert area(np.zeros(40), risk) == pytest.approx(risk.mean())
    assert metrics.risk_coverage(uncertainty, risk)[1][-1] == pytest.approx(risk.mean())


def test_error_auroc_is_the_share_of_pairs_in_order():
    uncertainty, errors = RNG.random((10, 7)).round(1), RNG.random((10, 7)) < 0.3
    wrong, right = uncertainty[errors], uncertainty[~errors]
    expected = stats.mannwhitneyu(wrong, right).statistic / (wrong.size * right.size)
    assert metrics.error_auroc(uncertainty, errors) == pytest.approx(expected)
    assert metrics.error_auroc(np.zeros(70), errors.ravel()) == 0.5
    assert np.isnan(metrics.error_auroc([0.1, 0.2], [0, 0])) and np.isnan(metrics.error_auroc([0.1], [1]))


# The paper's metrics


def test_papers_accuracy_is_a_vote():
    probs = np.array([[[0.6]], [[0.6]], [[0.0]]])  # mean 0.4, two votes of three
    assert metrics.paper_accuracy([[1]], probs) == 1
    assert metrics.accuracy([[1]], probs.mean(0)) == 0
    assert metrics.paper_accuracy([[1]], probs[1:]) == 0  # a tie


def test_papers_brier_is_the_brier_of_the_mean_plus_the_samples_variance():
    variance = LABEL_PROBS.astype("float64").var(0).mean()
    assert metrics.paper_brier(LABELS, LABEL_PROBS) == pytest.approx(metrics.brier(LABELS, MEAN) + variance)
    each = [sk.brier_score_loss(LABELS.ravel(), sample.ravel()) for sample in LABEL_PROBS]
    assert metrics.paper_brier(LABELS, LABEL_PROBS) == pytest.approx(np.mean(each), rel=1e-6)


def test_papers_entropy_lacks_the_second_term():
    full = metrics.uncertainty(LABEL_PROBS)["entropy"].sum(-1).mean()
    missing = -((1 - MEAN) * np.log(1 - MEAN)).sum(-1).mean()
    assert metrics.paper_entropy(LABEL_PROBS) == pytest.approx(full - missing)
    pixels = stats.entropy(np.stack([MASK_PROBS.mean(0), 1 - MASK_PROBS.mean(0)]), axis=0).mean()
    assert metrics.paper_entropy(MASK_PROBS, "segmentation") == pytest.approx(pixels, rel=1e-5)


def test_papers_dice_by_its_formula():
    probs, truth, eps = MASK_PROBS.astype("float64"), MASKS[..., 0], 1e-5
    both_p, both_y = np.stack([1 - probs, probs]), np.stack([1 - truth, truth])[:, None]
    expected = ((2 * both_p * both_y + eps) / (both_p + both_y + eps)).mean((0, 1, 3, 4))
    np.testing.assert_allclose(metrics.paper_dice(truth, probs), expected)


def test_papers_iou_sums_over_samples():
    probs = np.array([[[[1, 0]]], [[[1, 1]]]])
    np.testing.assert_allclose(metrics.paper_iou(np.array([[[0, 1]]]), probs), [1 / 4])
    np.testing.assert_array_equal(metrics.paper_iou(np.zeros((1, 1, 2)), np.zeros((2, 1, 1, 2))), [1])
    one = metrics.iou(MASKS[..., 0], MASK_PROBS[0] > 0.5)
    np.testing.assert_allclose(metrics.paper_iou(MASKS[..., 0], MASK_PROBS[:1]), one)


def test_papers_ece_is_of_the_predicted_class():
    # Confidences .9 (right), .8 (wrong: p = .2, y = 1), .9 (wrong): bins {.9, .9} and {.8}.
    probs, targets = np.array([[0.9, 0.2, 0.1]]), np.array([1, 1, 1])
    assert metrics.paper_ece(targets, probs) == pytest.approx((abs(1.8 - 1) + 0.8) / 3)
    # The class does not matter: 0 and 1 exchanged.
    assert metrics.paper_ece(1 - LABELS, 1 - LABEL_PROBS) == pytest.approx(metrics.paper_ece(LABELS, LABEL_PROBS))
    soft = MASKS.mean(-1)  # every rater's masks beside one another are one long mask
    long_probs, long_masks = np.concatenate([MASK_PROBS] * 3, 1), np.concatenate(np.moveaxis(MASKS, -1, 0))
    assert metrics.paper_ece(soft, MASK_PROBS) == pytest.approx(metrics.paper_ece(long_masks, long_probs))


def test_never_looking_in_the_papers_terms_on_chestmnist():
    """What PAPER.md says of Table 1's chest columns, from the published counts.

    The counts are of all 112,120 images; the text's .947 and .0475 are of one split, hence a tolerance of .002.
    """
    labels = np.arange(10_000)[:, None] < np.round(1e4 * CHEST_PREVALENCE)
    prevalence = labels.mean(0)
    np.testing.assert_allclose(prevalence, CHEST_PREVALENCE, atol=6e-5)
    negative, constant = np.zeros((1, *labels.shape)), np.broadcast_to(prevalence, (1, *labels.shape))
    assert metrics.paper_accuracy(labels, negative) == pytest.approx(0.947, abs=0.002)
    assert metrics.paper_accuracy(labels, negative) > 0.936  # the best row of Table 1
    assert metrics.paper_brier(labels, constant) == pytest.approx(0.0475, abs=0.001)
    assert metrics.paper_brier(labels, constant) < 0.053  # the best row of Table 1
    assert metrics.paper_entropy(constant) == pytest.approx(1.90, abs=0.03)
    assert metrics.paper_entropy(negative) == 0
    assert metrics.paper_ece(labels, constant) < 1e-12
    assert metrics.paper_ece(labels, negative) == pytest.approx(prevalence.mean())
    # The maximum of -p ln p is 1/e, at p = 1/e.
    highest = optimize.minimize_scalar(lambda p: -metrics.paper_entropy(np.full((1, 1, 14), p)), bounds=(0.01, 0.99))
    assert highest.x == pytest.approx(np.exp(-1), abs=1e-4) and -highest.fun == pytest.approx(5.15, abs=0.001)


def test_a_perfect_map_under_two_softmaxes():
    # Softmax of (0, 1) is sigmoid(1) = .7311 of the true class: (1 - .7311)^2.
    perfect = MASKS[None, ..., 0].astype(float)
    floor = metrics.paper_brier(MASKS[..., 0], perfect, softmax_twice=True)
    assert floor == pytest.approx((1 - 1 / (1 + np.exp(-1))) ** 2) and floor == pytest.approx(0.0723, abs=5e-5)
    assert metrics.paper_brier(MASKS[..., 0], perfect) == 0
    # Table 1's .075 and .110 lie above the floor, its .004 and .068 below: those had one softmax.
    assert 0.004 < 0.068 < floor < 0.075 < 0.110


def test_all_background_in_the_papers_terms():
    truth = np.zeros((1, 20, 20))
    truth[0, 9:11, 9:11] = 1  # 1 % foreground
    background = np.zeros((1, 1, 20, 20))
    assert metrics.paper_dice(truth, background) == pytest.approx(0.99, abs=1e-4)
    assert metrics.dice(truth, background[0]) == metrics.paper_iou(truth, background) == 0


@pytest.mark.skipif("SBN_TF_DATA" not in os.environ, reason="real LIDC needs SBN_TF_DATA")
def test_all_background_on_lidc_scores_its_share_of_background():
    found = list(Path(os.environ["SBN_TF_DATA"]).rglob("lidc_idri_maxslice_71.npz"))
    if not found:
        pytest.skip("SBN_TF_DATA holds no LIDC npz")
    data = datasets.load("lidc", root=os.environ["SBN_TF_DATA"])
    masks = np.asarray(data.test.targets[:200])
    valid = data.test.rater_valid[:200]
    soft = np.einsum("bhwr,br->bhw", masks, valid / valid.sum(1, keepdims=True))
    score = metrics.paper_dice(soft, np.zeros((1, *soft.shape))).mean()
    assert score == pytest.approx(1 - soft.mean(), abs=1e-4)
    assert score > 0.95


# Laws of all scores, and bad input

LABEL_SCORES = [
    metrics.nll,
    metrics.brier,
    metrics.accuracy,
    metrics.ece,
    metrics.auc_per_label,
    metrics.average_precision_per_label,
]


def decomposed(targets, mean_probs):
    return list(metrics.brier_decomposition(targets, mean_probs).values())


@pytest.mark.parametrize("score", [*LABEL_SCORES, decomposed])
def test_the_order_of_images_does_not_matter(score):
    order = RNG.permutation(60)
    np.testing.assert_allclose(score(LABELS[order], MEAN[order]), score(LABELS, MEAN), atol=1e-12)


@pytest.mark.parametrize("score", [metrics.paper_accuracy, metrics.paper_brier, metrics.paper_ece])
def test_the_order_of_samples_and_images_does_not_matter_to_the_papers(score):
    order = RNG.permutation(60)
    assert score(LABELS[order], LABEL_PROBS[::-1, order]) == pytest.approx(score(LABELS, LABEL_PROBS))
    assert 0 <= score(LABELS, LABEL_PROBS) <= 1


PREDICTED = MASK_PROBS[0] > 0.5


@pytest.mark.parametrize(
    ("call", "message"),
    [
        *[(lambda score=score: score(LABELS, LABEL_PROBS), "one shape") for score in LABEL_SCORES],
        *[(lambda score=score: score(LABELS[:0], MEAN[:0]), "not empty") for score in LABEL_SCORES],
        *[(lambda score=score: score(LABELS, MEAN * 9), r"probabilities in 0\.\.1.*max=") for score in LABEL_SCORES],
        *[(lambda score=score: score(LABELS, MEAN * np.nan), "none of them NaN.*min=nan") for score in LABEL_SCORES],
        *[(lambda score=score: score(LABELS * 2, MEAN), r"targets in 0\.\.1.*max=2") for score in LABEL_SCORES],
        (lambda: metrics.ece(LABELS, MEAN, 0), "num_bins=0"),
        (lambda: metrics.ece(LABELS, MEAN, 2.5), "num_bins=2.5"),
        (lambda: metrics.ece(LABELS, MEAN, binning="equal"), "binning='equal'"),
        (lambda: metrics.brier_skill(LABELS, MEAN, np.ones(4)), r"train_prevalence.*\(4,\)"),
        (lambda: metrics.brier_decomposition(LABELS, MEAN, -1), "num_bins=-1"),
        (lambda: metrics.binary_entropy([-0.1]), "min=-0.1"),
        (lambda: metrics.uncertainty(LABEL_PROBS[:0]), r"one sample or more.*\(0, 60, 5\)"),
        (lambda: metrics.uncertainty(LABEL_PROBS - 1), "min=-"),
        (lambda: metrics.dice(PREDICTED[0], PREDICTED[0]), r"\(batch, height, width\).*\(8, 10\)"),
        (lambda: metrics.iou(255 * PREDICTED, PREDICTED), "max=255"),
        (lambda: metrics.hausdorff95(MASKS, PREDICTED), "one shape"),
        (lambda: metrics.majority_mask(MASKS * 2), "0 or 1.*0 to 2"),
        (lambda: metrics.majority_mask(MASKS, VALID[:, :2]), r"\(6, 3\).*\(6, 2\)"),
        (lambda: metrics.disagreement(MASKS, VALID & False), "valid rater.*image 0"),
        (lambda: metrics.dice_raters(MASKS[..., :0], PREDICTED), "not empty"),
        (lambda: metrics.dice_raters(MASKS, PREDICTED[:2]), "one shape"),
        (lambda: metrics.generalised_energy_distance(MASKS, MASK_PROBS[:0]), r"\(0, 6, 8, 10\)"),
        (lambda: metrics.hungarian_iou(MASKS, MASK_PROBS * 9), "not logits"),
        (lambda: metrics.hungarian_iou(MASKS[..., 0], MASK_PROBS), "raters"),
        (lambda: metrics.risk_coverage([], []), "not empty"),
        (lambda: metrics.risk_coverage([1, 2], [1]), r"\(2,\) and \(1,\)"),
        (lambda: metrics.excess_area([1, np.nan], [1, 0]), "NaN or infinity"),
        (lambda: metrics.error_auroc([1, 2], [0, np.inf]), "NaN or infinity"),
        (lambda: metrics.error_auroc([1, 2], [0, 0.5]), "0 or 1.*0.5"),
        (lambda: metrics.paper_accuracy(LABELS, MEAN), r"samples.*\(60, 5\)"),
        (lambda: metrics.paper_brier(LABELS, LABEL_PROBS[:0]), "not empty"),
        (lambda: metrics.paper_brier(LABELS, LABEL_PROBS + 1), "max="),
        (lambda: metrics.paper_entropy(LABEL_PROBS[:, :0]), "not empty"),
        (lambda: metrics.paper_entropy(LABEL_PROBS, "binary"), "'binary'"),
        (lambda: metrics.paper_dice(MASKS, MASK_PROBS), r"\(6, 8, 10, 3\)"),
        (lambda: metrics.paper_iou(LABELS, LABEL_PROBS), r"\(60, 5\)"),
        (lambda: metrics.paper_ece(LABELS, LABEL_PROBS * np.nan), "min=nan"),
    ],
)
def test_bad_input_is_refused_in_two_lines(call, message):
    with pytest.raises(ValueError, match=message) as error:
        call()
    assert "Received" in str(error.value) and len(str(error.value).splitlines()) <= 2


def test_every_public_name_exists():
    assert len(set(metrics.__all__)) == len(metrics.__all__)
    assert all(hasattr(metrics, name) for name in metrics.__all__)


def test_the_registry_has_every_metric_once():
    for name, metric in metrics.METRICS.items():
        assert metric.name == name and metric.meaning and set(metric.tasks) <= set(metrics.TASKS)
        assert (metric.image is None) != (metric.statistic is None)
        assert metric.low < metric.high and metric.higher_is_better in (True, False, None)
        assert metric.interval in ("quantile", "basic", None) and (metric.interval == "basic") == ("ece" in name)
    assert metrics.TASKS == datasets.base.TASKS  # lessons do not import datasets


@pytest.mark.parametrize("function", [metrics.auc_per_label, metrics.average_precision_per_label])
@pytest.mark.parametrize(
    ("probs", "labels", "message"),
    [
        ([0.2, 0.7], [0, 1], r"\(batch, labels\). Received: shape \(2,\)"),
        (0.2, 1, r"\(batch, labels\). Received: shape \(\)"),
        ([[0.2], [0.7], [0.1]], [[0], [1], [0.25]], "0 or 1. Received: 0.25"),
    ],
)
def test_rankings_of_bad_labels_are_refused(function, probs, labels, message):
    with pytest.raises(ValueError, match=message):
        function(labels, probs)


@pytest.mark.parametrize(("probs", "targets"), [(0.3, 1), ([0.3, 0.2], [1, 0])])
def test_ece_per_label_needs_labels(probs, targets):
    with pytest.raises(ValueError, match=r"\(..., labels\) with per_label=True. Received: shape"):
        metrics.ece(targets, probs, per_label=True)


def test_matched_iou_and_the_papers_depend_on_the_number_of_samples():
    """One distribution of masks, a single pixel or the whole row: more samples match two raters better."""
    raters = np.array([[1, 0, 0, 0], [1, 1, 1, 1]]).T[None, None]  # (1, 1, 4, 2)
    one, other = (np.moveaxis(raters, -1, 0)[[k]].astype(float) for k in (0, 1))
    both = np.concatenate([one, other])
    single = [metrics.hungarian_iou(raters, samples)[0] for samples in (one, other)]
    assert np.mean(single) == pytest.approx(5 / 8) and metrics.hungarian_iou(raters, both)[0] == 1
    single = [metrics.generalised_energy_distance(raters, samples)[0] for samples in (one, other)]
    assert np.mean(single) == pytest.approx(3 / 8) and metrics.generalised_energy_distance(raters, both)[0] == 0
    single = [metrics.paper_iou(raters[..., 0], samples)[0] for samples in (one, other)]  # 1/1 and 1/4
    assert np.mean(single) == pytest.approx(5 / 8)
    assert metrics.paper_iou(raters[..., 0], both)[0] == pytest.approx((1 + 1) / (1 + 4))
