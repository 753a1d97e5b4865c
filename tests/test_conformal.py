"""Tests of decisions with a guarantee: by hand, against MAPIE, and against the known laws of coverage."""

import numpy as np
import pytest
from scipy import stats

from sbn_tf.core import conformal
from sbn_tf.core.overlap import false_negative_rates

RNG = np.random.default_rng(0)
PROBS = RNG.dirichlet(np.full(4, 0.5), size=230)
TRUTH = np.array([RNG.choice(4, p=row) for row in PROBS])
CALIBRATION, NEW = slice(0, 150), slice(150, None)


def true_scores(scores, part=CALIBRATION):
    return scores[part][np.arange(len(TRUTH[part])), TRUTH[part]]


# By hand


@pytest.mark.parametrize(("alpha", "place"), [(0.1, 18), (0.25, 15), (0.5, 10), (1 / 20, 19), (0.049, None)])
def test_the_limit_is_an_order_statistic(alpha, place):
    """Of 19 scores 1..19: the ceil(20 (1 - alpha))-th, which is 18 of 20 for 0.1."""
    scores = RNG.permutation(np.arange(1.0, 20))
    if place is None:
        with pytest.raises(ValueError, match=r"Expected 20 or more calibration images.*alpha=0.049. Received: 19"):
            conformal.limit(scores, alpha)
        return
    assert conformal.limit(scores, alpha) == place


def test_patients_weigh_alike():
    """Patients a (scores 1, 2), b (3), c (4, 9): weights 1/2, 1, 1/2; at alpha 1/4 they must sum to 3, all of them.

    At alpha 1/2 they must sum to 2: 1/2 + 1/2 + 1, the score 3. As five images it is the third, 3, and at 1/4 the
    fifth, 9; a sixth image of patient a with a score of 20 raises the limit of images alone.
    """
    scores, groups = np.array([9.0, 1, 2, 3, 4]), np.array(["c", "a", "a", "b", "c"])
    assert conformal.limit(scores, 0.5, groups) == 3
    assert conformal.limit(scores, 0.25, groups) == 9
    assert conformal.limit(scores, 0.38, groups) == 4  # 2.48 of 3: 1/2 + 1/2 + 1 + 1/2
    with pytest.raises(ValueError, match=r"Expected 4 .*patients.*Received: 3"):
        conformal.limit(scores, 0.2, groups)


def test_aps_scores_by_hand():
    """Of .5, .3, .2 with a share u: .5 u, .5 + .3 u, .8 + .2 u."""
    share = np.random.default_rng(3).uniform()
    found = conformal.aps_scores([[0.3, 0.5, 0.2]], seed=3)
    np.testing.assert_allclose(found, [[0.5 + 0.3 * share, 0.5 * share, 0.8 + 0.2 * share]])


def test_classes_with_few_images_share_a_limit():
    """At alpha 1/4 three images are needed: classes of 5 and 4 have them; of 1 and 1 together not: the 4 join."""
    scores = [[1.0, 2, 3, 4, 5], [6.0], [7.0, 8, 9, 10], [11.0]]
    np.testing.assert_array_equal(conformal.class_limits(scores, 0.25), [5, 11, 11, 11])
    np.testing.assert_array_equal(conformal.class_limits(scores, 0.5), [3, 6, 9, 11])  # one image is enough
    np.testing.assert_array_equal(conformal.class_limits(scores, 0.25, pool=False), [5, np.inf, 10, np.inf])
    patients = [[1, 1, 1, 2, 3], [3], [4, 4, 4, 5], [5]]  # 3, 1, 2 and 1: pooled 3, 4 and 5
    np.testing.assert_array_equal(conformal.class_limits(scores, 0.25, patients), [5, 11, 11, 11])
    with pytest.raises(ValueError, match=r"Expected 19 .*Received: 11"):
        conformal.class_limits(scores, 0.05)
    with pytest.raises(ValueError, match=r"Expected 9 .*of a label\. Received: 5"):
        conformal.class_limits(scores, 0.1, pool=False)


def test_the_cut_of_masks_by_hand():
    """True pixels of .2, .4, .6, .8 and of .5: at .45 the first image misses half, at .55 the second all."""
    probs = np.array([[[0.2, 0.4], [0.6, 0.8]], [[0.1, 0.5], [0.9, 0.9]], [[0.5, 0.5], [0.5, 0.5]]])
    masks = np.array([[[1, 1], [1, 1]], [[0, 1], [0, 0]], [[0, 0], [0, 0]]])
    cuts = np.array([0, 0.2, 0.45, 0.5, 0.55, 1])
    losses = false_negative_rates(probs, masks, cuts)
    np.testing.assert_allclose(losses, [[0, 0, 0.5, 0.5, 0.5, 1], [0, 0, 0, 0, 1, 1], [0] * 6])
    risk, patients = conformal.mean_risk(losses), conformal.mean_risk(losses, [0, 0, 1])
    assert conformal.risk_cut(*risk, 0.375) == 3  # (0.5 + 1) / 4, no less
    assert conformal.risk_cut(*risk, 0.374) == 1
    assert conformal.risk_cut(*risk, 0.625) == 4  # (1.5 + 1) / 4
    assert conformal.risk_cut(*patients, 0.417) == 3  # (0.5 / 2 + 0 + 1) / 3
    assert conformal.risk_cut(*patients, 0.416) == 1
    with pytest.raises(ValueError, match=r"Expected 4 .*Received: 3"):
        conformal.risk_cut(*risk, 0.2)
    with pytest.raises(ValueError, match="do not fall"):
        conformal.risk_cut(risk[0][::-1], 3, 0.5)
    with pytest.raises(ValueError, match="probs and masks"):
        false_negative_rates(probs, masks[:2], cuts)


def test_referral_by_hand():
    """100 images, wrong where unsure: of the levels that may pass, the largest with a small enough tail."""
    unsure = np.arange(100.0)
    wrong = unsure >= 80
    # Without an error 22 images are evidence against 10 %; of the levels 50 % to 100 % each at 0.1 / 6.
    assert conformal.needed_to_refer(0.1) == 22
    assert 0.9**40 > 0.1 / 7 and 0.9**50 < 0.1 / 6
    assert stats.binom.cdf(0, 80, 0.1) < 0.1 / 6 < stats.binom.cdf(10, 90, 0.1)
    assert conformal.refer_limit(unsure, wrong, 0.1) == 80
    assert conformal.refer_limit(unsure, np.zeros(100), 0.1) == np.inf
    assert conformal.refer_limit(unsure, np.ones(100), 0.1) == -np.inf
    with pytest.raises(ValueError, match=r"Expected 45 or more .*rate=0.05 with confidence 0.9. Received: 40"):
        conformal.refer_limit(unsure[:40], wrong[:40], 0.05)


def test_one_image_of_each_patient():
    groups = np.array(["b", "a", "b", "c", "b"])
    chosen = [tuple(conformal.one_of_each(groups, seed)) for seed in range(300)]
    assert {tuple(groups[list(one)]) for one in chosen} <= {("b", "a", "c"), ("a", "b", "c"), ("a", "c", "b")}
    counts = [sum(place in one for one in chosen) for place in range(5)]
    assert counts[1] == counts[3] == 300 and min(counts[0], counts[2], counts[4]) > 70


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda: conformal.needed(1), "alpha between 0 and 1"),
        (lambda: conformal.limit([1, np.nan], 0.5), "finite score"),
        (lambda: conformal.limit([1.0, 2.0], 0.5, [1]), "patients of 2 images"),
        (lambda: conformal.refer_limit([1.0], [0.5], 0.5, 0.5), "errors, 0 or 1"),
        (lambda: conformal.needed_to_refer(0.1, 1.0), "confidence between"),
        (lambda: conformal.aps_scores(PROBS, seed=-1), "seed"),
    ],
)
def test_what_cannot_be_is_refused(call, says):
    with pytest.raises(ValueError, match=says):
        call()


# Against MAPIE


class Fitted:
    """A classifier that gives the probabilities that it is given, as MAPIE wants them."""

    def __init__(self, classes):
        from sklearn.base import BaseEstimator, ClassifierMixin

        class Given(ClassifierMixin, BaseEstimator):
            def fit(self, x, y):
                return self

            def predict_proba(self, x):
                return np.asarray(x)

            def predict(self, x):
                return np.asarray(x).argmax(1)

            def __sklearn_is_fitted__(self):
                return True

        self.model = Given()
        self.model.classes_ = np.arange(classes)


@pytest.mark.parametrize("score", ["lac", "aps"])
def test_sets_are_those_of_mapie(score):
    mapie = pytest.importorskip("mapie.classification", reason="needs MAPIE (pip install mapie)")
    peer = mapie.SplitConformalClassifier(
        Fitted(4).model, confidence_level=0.85, conformity_score=score, prefit=True, random_state=7
    )
    peer.conformalize(PROBS[CALIBRATION], TRUTH[CALIBRATION])
    options = {"include_last_label": "randomized"} if score == "aps" else {}
    expected = peer.predict_set(PROBS[NEW], conformity_score_params=options)[1][..., 0]
    if score == "lac":
        scores = 1 - PROBS
    else:  # MAPIE takes its share off: 1 - ours, from the same uniform numbers
        scores = np.concatenate([aps_of_mapie(PROBS[part], 7) for part in (CALIBRATION, NEW)])
    found = scores[NEW] <= conformal.limit(true_scores(scores), 0.15)
    np.testing.assert_array_equal(found, expected)


def aps_of_mapie(probs, seed):
    with pytest.MonkeyPatch.context() as patch:
        shares = 1 - np.random.RandomState(seed).uniform(size=(len(probs), 1))
        patch.setattr(np.random, "default_rng", lambda seed: type("", (), {"uniform": lambda self, size: shares})())
        return conformal.aps_scores(probs)


def test_the_cut_is_that_of_mapie():
    methods = pytest.importorskip("mapie.risk_control.methods", reason="needs MAPIE (pip install mapie)")
    cuts, losses = masks_of(40)
    for alpha in (0.1, 0.2, 0.4):
        bounds = methods.get_r_hat_plus(losses, cuts, "crc", None, None, None)[1]
        expected = methods.find_best_predict_param(cuts, bounds, np.array([alpha]))
        assert cuts[conformal.risk_cut(*conformal.mean_risk(losses), alpha)] == expected


# Against the laws of coverage


def masks_of(num, seed=0, noise=1.0):
    """Cuts, and the losses of noisy maps of pixels that are true as their own logit is above 0."""
    rng = np.random.default_rng(seed)
    level = rng.normal(size=(num, 5, 5)) + rng.normal(size=(num, 1, 1))
    probs = 1 / (1 + np.exp(-2 * (level + rng.normal(0, noise, level.shape))))
    cuts = np.linspace(0, 1, 101)
    return cuts, false_negative_rates(probs, level > 0, cuts)


def near(values, expected):
    """Their mean is within three of its standard errors."""
    values = np.asarray(values, float)
    assert abs(values.mean() - expected) < 3 * values.std(ddof=1) / np.sqrt(len(values)), (values.mean(), expected)


@pytest.mark.parametrize(("num", "alpha"), [(9, 0.1), (19, 0.2), (100, 0.1), (37, 0.25)])
def test_coverage_follows_its_beta_law(num, alpha):
    """Of uniform scores the limit itself is the coverage: Beta(k, n + 1 - k), k = ceil((n + 1) (1 - alpha))."""
    rng = np.random.default_rng(num)
    coverages = [conformal.limit(rng.uniform(size=num), alpha) for _ in range(2000)]
    k = np.ceil((num + 1) * (1 - alpha) - 1e-9)
    near(coverages, k / (num + 1))
    assert stats.kstest(coverages, stats.beta(k, num + 1 - k).cdf).pvalue > 0.001


def test_patients_are_covered_where_images_are_not():
    """Scores of a patient are alike; sick ones have many images and higher scores.

    A limit of images is that of patients with many; the guarantee for a new patient needs the patients.
    """
    rng = np.random.default_rng(1)
    covered = {True: [], False: []}
    for _ in range(1500):
        sick = rng.uniform(size=41) < 0.3
        sizes = np.where(sick, 1, 12)
        owner = np.repeat(np.arange(41), sizes)
        scores = np.repeat(rng.uniform(size=41) + sick, sizes)
        new = owner == 40
        for by_patient, result in covered.items():
            found = conformal.limit(scores[~new], 0.2, owner[~new] if by_patient else None)
            result.append((scores[new] <= found).mean())
    near(covered[True], np.ceil(41 * 0.8) / 41)
    assert np.mean(covered[False]) < 0.75


def test_classes_are_covered_each():
    """The rarest class is easily left out by one limit for all."""
    rng = np.random.default_rng(2)
    each, together = [], []
    for _ in range(800):
        truth = np.append(np.arange(60) >= 45, [True])
        scores = rng.uniform(size=61) + truth
        parts = [scores[:60][~truth[:60]], scores[:60][truth[:60]]]
        each.append(scores[60] <= conformal.class_limits(parts, 0.25)[1])
        together.append(scores[60] <= conformal.limit(scores[:60], 0.25))
    near(each, 12 / 16)
    assert np.mean(together) < 0.2


@pytest.mark.parametrize("score", [lambda p, s: 1 - p, conformal.aps_scores])
def test_sets_cover_and_adapt(score):
    rng = np.random.default_rng(3)
    covered = []
    for run in range(400):
        probs = rng.dirichlet(np.full(4, 0.5), size=40)
        truth = (rng.uniform(size=(40, 1)) > np.cumsum(probs, 1)).sum(1).clip(max=3)
        scores = score(probs, run)[np.arange(40), truth]
        covered.append(scores[39] <= conformal.limit(scores[:39], 0.2))
    near(covered, 0.8)


def test_the_risk_of_masks_is_controlled():
    """The mean miss is at most alpha, and no less than alpha - 2 / (n + 1) but for the steps of the cuts."""
    misses = []
    for run in range(600):
        _, losses = masks_of(50, seed=run)
        misses.append(losses[-1, conformal.risk_cut(*conformal.mean_risk(losses[:-1]), 0.2)])
    error = np.std(misses, ddof=1) / np.sqrt(len(misses))
    assert 0.2 - 2 / 50 - 0.01 - 3 * error < np.mean(misses) < 0.2 + 3 * error


def test_referral_keeps_its_rate():
    """The share of calibration sets after which the true rate of what is kept is too high is at most 1 - confidence."""
    rng = np.random.default_rng(4)
    broken, kept = [], []
    for _ in range(600):
        unsure = rng.uniform(size=300)
        at = conformal.refer_limit(unsure, rng.uniform(size=300) < 0.4 * unsure**2, 0.1)
        at = min(max(at, 0), 1)  # the error rate below a limit is 0.4 / 3 of its square
        broken.append(at**2 * 0.4 / 3 > 0.1)
        kept.append(at)
    assert np.mean(broken) < 0.1 + 3 * np.sqrt(0.1 * 0.9 / 600)
    assert np.mean(kept) > 0.5  # of the 0.87 that may be kept
