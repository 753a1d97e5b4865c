"""Plots: they return axes, draw only where they are told, and take one sample and one rater."""

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
import numpy as np
import pytest
from matplotlib.colors import to_rgb

from sbn_tf import metrics
from sbn_tf.experiments import plots
from sbn_tf.experiments.plots import predictions, style
from sbn_tf.experiments.plots import results as plots_of_results
from sbn_tf.experiments.result import REQUIRED, Result
from sbn_tf.experiments.results import frame

RNG = np.random.default_rng(0)
SCORES = RNG.random(200) ** 8
HISTORIES = {"a": {"loss": [3, 2, 1], "val_loss": [3, 3, 2]}, "b": {"loss": [2.0]}}

CURVES = {
    "a": (SCORES, SCORES > 0.5),
    "b": (np.sqrt(SCORES), RNG.random(200) < np.sqrt(SCORES)),
    "constant": (np.full(200, 0.3), SCORES > 0.5),
}


def row(method, nll, seed=0, cost=2.0, **changes):
    """A `Result` of masks."""
    return Result(
        **{
            **dict.fromkeys(("title", "recipe", "network", "normalisation"), "x"),
            **dict.fromkeys(("size", "num_train", "num_val", "num_test"), 9),
            "dataset": "phantom_nodule",
            "task": "segmentation",
            "method": method,
            "seed": seed,
            "metrics": {} if nll is None else {"nll": nll},
            "undefined": dict.fromkeys(REQUIRED["segmentation"][1:], "not of interest")
            | ({"nll": "no test image was scored"} if nll is None else {}),
            "intervals": {} if nll is None else {"nll": [nll - 0.01, nll + 0.01]},
            "cost": {} if method.startswith("trivial") else {"train_flops_ratio": cost},
        }
        | changes
    )


NAMES = ["deterministic", *(f"method_{number}" for number in range(13))]
ROWS = [
    row("trivial_prevalence", 0.11, None),
    row("trivial_all_background", 9.0, None),
    *(row(name, 0.1 + 0.001 * (number % 3), cost=1 + number % 4) for number, name in enumerate(NAMES)),
    row("broken", None),
    row("far_away", 3.0, cost=7.0),
]

INTO_AXES = {
    "history": lambda ax: plots.plot_history(HISTORIES, ["loss", "val_loss"], ax),
    "history of nothing": lambda ax: plots.plot_history({}, ["loss"], ax),
    "masks": lambda ax: plots.plot_masks_by_layer(ax, ["conv", "dense", "head"], [9, 0, 1], [9, 100, 1000]),
    "no mask": lambda ax: plots.plot_masks_by_layer(ax, ["conv"], [0], [9]),
    "scores": lambda ax: plots.plot_scores(ax, SCORES.reshape(10, 20), SCORES.reshape(10, 20) > 0.5),
    "scores of zero": lambda ax: plots.plot_scores(ax, np.zeros(5), np.arange(5) < 2),
    "scales": lambda ax: plots.plot_scales(ax, SCORES + 0.01, SCORES + 0.02),
    "equal scales": lambda ax: plots.plot_scales(ax, np.full(4, 0.01), np.full(4, 0.01)),
    "reliability": lambda ax: plots.plot_reliability(ax, SCORES.reshape(20, 10), SCORES.reshape(20, 10) > 0.5),
    "reliability of equal count": lambda ax: plots.plot_reliability(ax, *CURVES["a"], binning="mass"),
    "reliability of several": lambda ax: plots.plot_reliability_curves(ax, CURVES),
    "reliability of several, equal count": lambda ax: plots.plot_reliability_curves(ax, CURVES, binning="mass"),
    "constant prediction": lambda ax: plots.plot_reliability(ax, *CURVES["constant"], binning="mass"),
    "risk and coverage": lambda ax: plots.plot_risk_coverage(ax, {"a": (SCORES, SCORES), "b": (SCORES, 1 - SCORES)}),
    "risk of one image": lambda ax: plots.plot_risk_coverage(ax, {"a": ([0.5], [1.0])}, oracle=False),
    "intervals": lambda ax: plots.plot_intervals(ax, frame(ROWS), "nll"),
    "intervals of nothing": lambda ax: plots.plot_intervals(ax, frame(ROWS), "ged", band="none"),
    "cost": lambda ax: plots.plot_cost(ax, frame(ROWS)),
    "cost of nothing": lambda ax: plots.plot_cost(ax, frame(ROWS), y="ged"),
    "saliency against cost": lambda ax: plots.plot_saliency_against_cost(ax, [1.6, 2.7, 5.0], [0.1, 0.25, 0.6]),
    "no saliency against cost": lambda ax: plots.plot_saliency_against_cost(ax, [5.0], [0.0]),
    "one prediction": lambda ax: plots.plot_reliability(ax, [0.5], [1]),
}


def test_a_curve_joins_the_epochs_that_have_a_value():
    axes = plots.plot_history({"a": {"val_loss": [None, 3.0, None, 2.0]}}, ["val_loss"], plt.subplots()[1])
    np.testing.assert_array_equal(axes.lines[0].get_xydata(), [[2, 3.0], [4, 2.0]])


@pytest.fixture(autouse=True)
def close_figures():
    plt.close("all")
    yield
    plt.close("all")


@pytest.mark.parametrize("name", INTO_AXES)
def test_draws_into_the_given_axes_only(name):
    figure, (left, right) = plt.subplots(1, 2)
    before = dict(plt.rcParams)
    assert INTO_AXES[name](left) is left
    figure.canvas.draw()
    assert not right.has_data() and not right.get_legend()
    assert plt.get_fignums() == [figure.number]
    assert dict(plt.rcParams) == before
    assert left.get_xlabel()
    assert left.get_ylabel() or any(tick.get_text() for tick in left.get_yticklabels())


@pytest.mark.parametrize("num_samples", [1, 5])
@pytest.mark.parametrize("num_raters", [None, 1, 4])
@pytest.mark.parametrize("channels", [1, 3])
def test_segmentation_panel(num_samples, num_raters, channels):
    images = RNG.normal(size=(3, 16, 12, channels))
    probs = RNG.random((num_samples, 3, 16, 12, 1))
    truths = RNG.random((3, 16, 12, num_raters or 1)) > 0.5
    truths[1] = False  # an empty mask has no contour
    axes = plots.plot_segmentation(images, truths if num_raters else truths[..., 0], probs, num_rows=2)
    assert axes.shape == (2, 6 if num_raters == 4 else 5)
    assert len(plt.get_fignums()) == 1
    axes[0, 0].figure.canvas.draw()
    titles = [ax.get_title() for ax in axes[0]]
    assert titles[1] == ("raters" if num_raters == 4 else "truth")
    labels = [ax.get_xlabel() for ax in axes[0, 0].figure.axes]
    assert {"predictive entropy (nats)", "mutual information (nats)"} <= set(labels)
    assert [text.get_text() for text in axes[0, 0].figure.legends[0].get_texts()] == [
        "true positive",
        "false positive",
        "false negative",
    ]


def test_segmentation_panel_colours_by_the_majority_of_valid_raters():
    probs = np.array([[[[0.9, 0.9, 0.1, 0.1]]]])
    truths = np.array([[[[1, 0], [0, 1], [1, 0], [0, 1]]]])  # the second rater is not valid
    axes = plots.plot_segmentation(np.zeros((1, 1, 4, 1)), truths, probs, rater_valid=[[1, 0]])
    prediction = next(ax for ax in axes[0] if ax.get_title() == "prediction")
    overlay = prediction.images[-1].get_array()[0]
    for pixel, colour in enumerate([predictions.TRUE_POSITIVE, predictions.FALSE_POSITIVE, predictions.FALSE_NEGATIVE]):
        np.testing.assert_allclose(overlay[pixel, :3], matplotlib.colors.to_rgb(colour))
    assert overlay[3, 3] == 0
    disagreement = next(ax for ax in axes[0] if ax.get_title() == "raters disagree")
    assert not disagreement.images[0].get_array().any()


def test_segmentation_panel_shows_the_uncertainty_of_metrics():
    probs = RNG.random((3, 2, 8, 8))
    axes = plots.plot_segmentation(np.zeros((2, 8, 8, 1)), np.ones((2, 8, 8)), probs)
    parts = metrics.uncertainty(probs)
    for column, key in ((-2, "entropy"), (-1, "mutual_information")):
        for row in range(2):
            np.testing.assert_allclose(axes[row, column].images[0].get_array(), parts[key][row])
        assert axes[0, column].images[0].get_clim() == axes[1, column].images[0].get_clim()


def test_segmentation_panel_sets_another_network_beside_ours_on_one_scale():
    probs, other = RNG.random((3, 2, 8, 8)), RNG.random((1, 2, 8, 8))
    axes = plots.plot_segmentation(np.zeros((2, 8, 8, 1)), np.ones((2, 8, 8)), probs, without=other)
    assert [ax.get_title() for ax in axes[0, -3:]] == ["entropy without", "entropy", "mutual information"]
    expected = -other[0] * np.log(other[0]) - (1 - other[0]) * np.log(1 - other[0])
    np.testing.assert_allclose(axes[1, -3].images[0].get_array(), expected[1], rtol=1e-6)
    assert axes[0, -3].images[0].get_clim() == axes[1, -2].images[0].get_clim()


def test_segmentation_panel_says_how_many_raters_marked_nothing():
    truths = np.ones((2, 8, 8, 4))
    truths[0, ..., 1:3] = 0
    valid = np.array([[True, True, True, False], [True] * 4])
    axes = plots.plot_segmentation(np.zeros((2, 8, 8, 1)), truths, RNG.random((3, 2, 8, 8)), rater_valid=valid)
    assert [ax.get_xlabel() for ax in axes[:, 1]] == ["2 of 3 marked nothing", ""]


@pytest.mark.parametrize("num_samples", [1, 5])
def test_classification_panel(num_samples):
    probs, labels = RNG.random((num_samples, 3, 4)), np.eye(4)[:3]
    axes = plots.plot_classification(RNG.random((3, 8, 8, 1)), labels, probs, list("wxyz"), num_rows=2)
    assert axes.shape == (2, 2)
    axes[0, 0].figure.canvas.draw()
    bars = axes[1, 1].patches
    np.testing.assert_allclose([bar.get_width() for bar in bars], probs[:, 1].mean(0))
    assert [text.get_fontweight() for text in axes[1, 1].get_yticklabels()] == [
        "normal",
        "bold",
        *["normal"] * 2,
    ]


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("", ""),
        ("x" * 24, "x" * 24),
        ("x" * 25, "x" * 20 + " ..."),
        ("immature granulocytes(myelocytes, metamyelocytes)", "immature granulocyte ..."),
        ("actinic keratoses / intraepithelial", "actinic keratoses / ..."),
    ],
)
def test_short_name(name, expected):
    assert plots.short_name(name) == expected and len(expected) <= 24


def test_classification_panel_with_long_names_keeps_its_images_and_all_text():
    names = ["immature granulocytes(myelocytes, metamyelocytes and promyelocytes)", "b", "c" * 24, "d" * 90]
    axes = plots.plot_classification(RNG.random((3, 8, 8, 3)), np.eye(4)[:3], RNG.random((5, 3, 4)), names)
    figure = axes[0, 0].figure
    figure.canvas.draw()
    assert [text.get_text() for text in axes[0, 1].get_yticklabels()] == list(map(plots.short_name, names))
    for picture, bars in axes:
        assert picture.get_window_extent().width > 0.8 * 1.6 * figure.dpi
        for text in bars.get_yticklabels():
            box = text.get_window_extent()
            assert box.x0 >= picture.get_window_extent().x1 and box.x1 <= figure.bbox.x1


def test_layers_run_from_input_at_the_top():
    ax = plots.plot_masks_by_layer(plt.figure().add_subplot(), ["first", "last"], [5, 10], [10, 10])
    assert ax.yaxis_inverted()
    assert [text.get_text() for text in ax.get_yticklabels()] == ["first", "last"]
    ends = [bar.get_x() + bar.get_width() for bar in ax.patches]
    np.testing.assert_allclose(ends, [0.5, 1])
    assert [text.get_text().strip() for text in ax.texts] == ["5 of 10", "10 of 10"]


def test_scores_legend_counts_the_selected():
    scores = np.array([0, 1e-3, 1e-2, 1e-1])
    ax = plots.plot_scores(plt.figure().add_subplot(), scores, scores >= 1e-2)
    texts = [text.get_text() for text in ax.get_legend().get_texts()]
    assert texts[0] == "Bayesian: 2 (50.00%)" and "exactly zero: 1" in texts[2]


def test_scores_legend_counts_the_selected_among_equals():
    chosen = np.array([True, False, False, True, False])  # two of five equal scores
    ax = plots.plot_scores(plt.figure().add_subplot(), np.ones(5), chosen)
    texts = [text.get_text() for text in ax.get_legend().get_texts()]
    assert texts[:2] == ["Bayesian: 2 (40.00%)", "the others: 3"]
    with pytest.raises(ValueError, match="Expected chosen, bool"):
        plots.plot_scores(ax, np.ones(5), 0.5)


def test_reliability_agrees_with_the_metric():
    probs, targets = RNG.random(500), RNG.random(500) > 0.5
    ax = plots.plot_reliability(plt.figure().add_subplot(), probs, targets)
    line = ax.get_lines()[1]
    assert f"{metrics.ece(targets, probs):.4f}" in line.get_label()
    counts = ax.figure.axes[1].patches
    assert sum(bar.get_height() for bar in counts) == 500


@pytest.mark.parametrize("binning", ["width", "mass"])
def test_reliability_of_several_methods_agrees_with_the_metric(binning):
    ax = plots.plot_reliability_curves(plt.figure().add_subplot(), CURVES, 10, binning)
    lines = ax.get_lines()[1:]
    assert [line.get_label() for line in lines] == [
        f"{name}: ECE {metrics.ece(targets, probs, 10, binning=binning):.4f}"
        for name, (probs, targets) in CURVES.items()
    ]
    np.testing.assert_allclose(lines[2].get_xydata(), [[0.3, (SCORES > 0.5).mean()]])  # one bin, of all
    for line, (probs, _) in zip(lines, CURVES.values(), strict=True):
        assert line.get_xdata().min() >= probs.min() - 1e-12 and (np.diff(line.get_xdata()) > 0).all()


def test_reliability_in_bins_of_equal_count_by_hand():
    probs, targets = [0.1, 0.2, 0.2, 0.2, 0.5, 0.9], [0, 1, 0, 0, 1, 1]
    ax = plots.plot_reliability(plt.figure().add_subplot(), probs, targets, 3, binning="mass")
    # Middles of the ranks 0.5, 2.5, 4.5, 5.5 of 6: bins 0, 1, 2, 2. Equal probabilities stay together.
    np.testing.assert_allclose(ax.get_lines()[1].get_xydata(), [[0.1, 0], [0.2, 1 / 3], [0.7, 1]])
    bars = ax.figure.axes[1].patches
    assert [bar.get_height() for bar in bars] == [1, 3, 2]
    middles = [bar.get_x() + bar.get_width() / 2 for bar in bars]
    np.testing.assert_allclose(middles, [(0.1 + 0.15) / 2, (0.15 + 0.35) / 2, (0.35 + 0.9) / 2])


def test_reliability_refuses():
    for curves, binning in (({}, "width"), (CURVES, "depth")):
        with pytest.raises(ValueError, match="Expected a curve and binning"):
            plots.plot_reliability_curves(plt.figure().add_subplot(), curves, binning=binning)


@pytest.mark.parametrize(
    ("probs", "targets", "message"),
    [
        ([0.2, np.nan], [0, 1], "NaN"),
        ([0.2, 0.3], [0, np.nan], "targets.*NaN"),
        ([0.2, 1.3], [0, 1], "max=1.3"),
        ([0.2, 0.3], [0, 1, 1], r"one shape.*\(2,\) and \(3,\)"),
        ([], [], "not empty"),
    ],
)
@pytest.mark.parametrize("binning", ["width", "mass"])
def test_reliability_of_bad_input_draws_nothing(probs, targets, message, binning):
    ax = plt.figure().add_subplot()
    for draw in (
        lambda: plots.plot_reliability(ax, probs, targets, binning=binning),
        lambda: plots.plot_reliability_curves(ax, {**CURVES, "bad": (probs, targets)}, binning=binning),
    ):
        with pytest.raises(ValueError, match=message):
            draw()
    assert not ax.has_data() and ax.figure.axes == [ax]


# ---- risk and coverage, intervals, cost


def test_risk_coverage_by_hand():
    uncertain, risk = [0.1, 0.4, 0.2, 0.3], [0.0, 1.0, 1.0, 0.0]
    ax = plots.plot_risk_coverage(plt.figure().add_subplot(), {"a": (uncertain, risk)})
    dotted, solid, dashed = ax.get_lines()
    coverage, mean_risk = solid.get_data()
    for share, expected in ((0.25, 0), (0.5, 1 / 2), (0.75, 1 / 3), (1, 1 / 2)):  # kept: images 0, 2, 3, 1
        assert np.interp(share, coverage, mean_risk) == pytest.approx(expected)
    for share, expected in ((0.5, 0), (0.75, 1 / 3), (1, 1 / 2)):
        assert np.interp(share, *dotted.get_data()) == pytest.approx(expected)
    np.testing.assert_allclose(dashed.get_ydata(), 0.5)
    areas = [metrics.area_under_risk_coverage(order, risk) for order in (uncertain, risk)]
    assert solid.get_label() == "a: {:.4f} (oracle {:.4f})".format(*areas)
    with pytest.raises(ValueError, match="Expected a curve or more"):
        plots.plot_risk_coverage(ax, {})


def test_intervals_show_every_row():
    ax = plots.plot_intervals(plt.figure().add_subplot(), frame(ROWS), "nll")
    assert [text.get_text() for text in ax.get_yticklabels()] == [one.method for one in ROWS]
    assert ax.yaxis_inverted() and ax.get_title("left") == "\u2190 better"
    points = {float(line.get_ydata()[0]): line.get_xdata()[0] for line in ax.get_lines() if line.get_marker() == "o"}
    for place, one in enumerate(ROWS):
        if one.method in ("trivial_all_background", "broken", "far_away"):
            assert place not in points
        else:
            assert points[place] == one.metrics["nll"]
    assert {text.get_text() for text in ax.texts} == {"9", "3", "undefined: no test image was scored"}
    low, high = ax.get_xlim()
    assert low < 0.09 and 0.112 < high < 0.2  # what is far away does not press the others together
    for better, side in (("dice", "right"), ("entropy", None)):
        ax = plots.plot_intervals(plt.figure().add_subplot(), frame([row("a", 0.1)]), better)
        assert (side is None) or ax.get_title(side) == "better \u2192"


def test_intervals_of_several_seeds():
    rows = [row("a", 0.1, 0), row("a", 0.2, 1), row("b", 0.1)]
    ax = plots.plot_intervals(plt.figure().add_subplot(), frame(rows), "nll", band="a")
    seeds = next(line for line in ax.get_lines() if line.get_marker() == "|")
    np.testing.assert_allclose(seeds.get_xydata(), [[0.1, 0], [0.2, 0]])
    spread = 0.05 * np.sqrt(2)
    np.testing.assert_allclose(ax.get_lines()[0].get_xdata(), [0.15 - spread, 0.15 + spread])
    band = ax.patches[0].get_extents().transformed(ax.transData.inverted())
    np.testing.assert_allclose([band.x0, band.x1], [0.15 - spread, 0.15 + spread])
    with pytest.raises(ValueError, match="Expected a key of metrics"):
        plots.plot_intervals(ax, frame(rows), "f2")


@pytest.mark.parametrize("together", [False, True])
def test_cost_numbers_do_not_overlap(together):
    rows = [row(name, 0.1 + 0.0001 * k, cost=2.4 if together else 1 + k % 3) for k, name in enumerate(NAMES)]
    figure = plt.figure(figsize=(8, 4), layout="constrained")
    ax = plots.plot_cost(figure.add_subplot(), frame(rows))
    figure.canvas.draw()
    boxes = [matplotlib.text.Text.get_window_extent(text) for text in ax.texts]  # without its line
    assert [text.get_text() for text in ax.texts] == [str(number + 1) for number in range(len(NAMES))]
    for i, box in enumerate(boxes):
        assert ax.bbox.contains(box.x0, box.y0) and ax.bbox.contains(box.x1, box.y1)
        assert not any(box.overlaps(other) for other in boxes[:i])
    legend = ax.get_legend().get_window_extent()
    assert legend.x0 >= ax.bbox.x1 and legend.x1 <= figure.bbox.x1 + 1


def test_cost_legend_names_every_row():
    ax = plots.plot_cost(plt.figure(figsize=(9, 5), layout="constrained").add_subplot(), frame(ROWS))
    texts = [text.get_text() for text in ax.get_legend().get_texts()]
    assert texts[0] == "1  deterministic" and texts[14] == "15  far_away (3)"
    assert texts[15:] == ["trivial_prevalence", "trivial_all_background (9)", "not shown: broken"]
    assert ax.get_xscale() == "log"
    with pytest.raises(ValueError, match="Received: x='nll', y='f2'"):
        plots.plot_cost(ax, frame(ROWS), "nll", "f2")


@pytest.mark.parametrize(("higher", "expected"), [(False, [[1, 5], [2, 3], [4, 1]]), (True, [[1, 5], [3, 6]])])
def test_front_by_hand(higher, expected):
    points = [(2, 3), (1, 5), (3, 6), (4, 1), (2, 4), (5, 1)]
    np.testing.assert_allclose(plots_of_results._front(points, higher).T, expected)


def test_saliency_against_cost_shows_its_numbers():
    ax = plots.plot_saliency_against_cost(plt.subplots()[1], [1.6, 2.7], [0.1, 0.25], num_samples=5)
    stairs, points = ax.lines
    np.testing.assert_allclose(stairs.get_xydata(), [[1.6, 0.1], [2.7, 0.25], [5, 0.25]])
    assert stairs.get_drawstyle() == "steps-post"  # nothing more is kept before the next cost is paid
    np.testing.assert_allclose(points.get_xydata(), [[1.6, 0.1], [2.7, 0.25]])
    assert ax.get_xlim()[0] == 1 and ax.get_ylim()[0] == 0
    assert ax.get_xlabel().startswith("cost of 5 samples (passes")


# ---- samples


@pytest.mark.parametrize("num_samples", [1, 8])
@pytest.mark.parametrize("num_raters", [None, 3])
def test_sample_masks(num_samples, num_raters):
    probs = RNG.random((num_samples, 3, 16, 12, 1))
    truths = RNG.random((3, 16, 12, num_raters or 1)) > 0.5
    probs[:, 1] = 0  # an empty mask has no outline
    truths = truths if num_raters else truths[..., 0]
    axes = plots.plot_sample_masks(RNG.random((3, 16, 12, 3)), truths, probs, num_rows=2)
    drawn = min(5, num_samples)
    assert axes.shape == (2, 2 + drawn) and len(plt.get_fignums()) == 1
    axes[0, 0].figure.canvas.draw()
    first = "raters" if num_raters else "truth"
    assert [ax.get_title() for ax in axes[0]] == [first, *(f"sample {k + 1}" for k in range(drawn)), "all samples"]
    for k in range(drawn):
        shown = axes[0, 1 + k].images[-1].get_array()[..., 3] > 0
        np.testing.assert_array_equal(shown, probs[k, 0, ..., 0] > 0.5)
        assert not axes[1, 1 + k].collections
    share = axes[0, -1].images[0]
    np.testing.assert_allclose(share.get_array(), (probs[:, 0, ..., 0] > 0.5).mean(0))
    assert share.get_clim() == (0, 1)


def test_sample_masks_outline_the_valid_raters():
    truths = np.zeros((1, 8, 8, 2))
    truths[0, 2:5, 3:6] = 1
    axes = plots.plot_sample_masks(np.zeros((1, 8, 8, 1)), truths, np.zeros((1, 1, 8, 8)), rater_valid=[[0, 1]])
    assert set(outlines(axes[0, 0])) == {style.RATERS[1]}
    for options in ({"num_rows": 0}, {"num_samples": 0}):
        with pytest.raises(ValueError, match="Expected an image and a sample or more"):
            plots.plot_sample_masks(np.zeros((1, 8, 8, 1)), truths, np.zeros((1, 1, 8, 8)), **options)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"probs": np.full((2, 3, 8, 8), np.nan)}, "NaN"),
        ({"probs": np.full((2, 3, 8, 8), 4.0)}, "max=4.0"),
        ({"probs": np.zeros((2, 2, 8, 8))}, r"probs of 3 images or more, \(8, 8\). Received: 2"),
        ({"probs": np.zeros((2, 3, 8, 9))}, r"Received: 3, \(8, 9\)"),
        ({"truths": np.zeros((1, 8, 8))}, "truths of 3 images or more"),
    ],
)
def test_sample_masks_refuse(changes, message):
    given = {"images": np.zeros((3, 8, 8, 1)), "truths": np.zeros((3, 8, 8)), "probs": np.zeros((2, 3, 8, 8))}
    with pytest.raises(ValueError, match=message):
        plots.plot_sample_masks(**(given | changes))
    assert not plt.get_fignums()


# ---- the wall


def outlines(ax):
    """Colour -> vertices of each outline of an axes."""
    return {
        matplotlib.colors.to_hex(found.get_edgecolor()[0]): found.get_paths()[0].vertices for found in ax.collections
    }


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("side", [28, 224])
def test_wall_has_a_panel_for_each_image_and_one_scale_for_all(channels, side):
    images = np.zeros((5, side, side, channels), "uint8")
    images[1] = 51
    axes = plots.plot_wall(images, columns=3)
    assert axes.shape == (2, 3) and [ax.axison for ax in axes.flat] == [True] * 5 + [False]
    shown = axes[0, 1].images[0]
    assert shown.get_array().shape == ((side, side) if channels == 1 else (side, side, 3))
    np.testing.assert_allclose(shown.get_array(), 0.2)  # 51 of 255, though it is the largest there is
    assert shown.get_clim() == (0, 1)
    wide = plots.plot_wall(np.linspace(-1, 3, 8).reshape(2, 2, 2, 1))
    np.testing.assert_allclose(wide[0, 1].images[0].get_array().max(), 1)
    np.testing.assert_allclose(wide[0, 0].images[0].get_array().max(), 3 / 7)


def test_wall_outlines_the_masks_of_valid_raters_in_their_colours():
    masks = np.zeros((2, 8, 8, 3), "uint8")
    masks[0, 2:5, 3:6, 0] = 1
    masks[0, :4, :4, 1] = 1  # touches the border
    masks[1, ..., 2] = 1
    axes = plots.plot_wall(np.zeros((2, 8, 8, 1)), masks, rater_valid=[[1, 1, 0], [1, 0, 0]])
    found = outlines(axes[0, 0])
    assert set(found) == set(style.RATERS[:2])
    np.testing.assert_allclose(found[style.RATERS[0]].min(0), [2.5, 1.5])  # column, row: half a pixel outside
    np.testing.assert_allclose(found[style.RATERS[0]].max(0), [5.5, 4.5])
    np.testing.assert_allclose(found[style.RATERS[1]].min(0), [-0.5, -0.5])
    assert outlines(axes[0, 1]) == {}  # an empty mask, and two that are not valid
    assert [text.get_text() for text in axes[0, 0].figure.legends[0].get_texts()] == ["rater 1", "rater 2", "rater 3"]


@pytest.mark.parametrize(
    ("targets", "class_names", "texts"),
    [
        ([[1, 0, 1], [0, 0, 0]], list("abc"), ["a, c", "none"]),
        ([[0, 1], [1, 0]], None, ["1", "0"]),
        ([2, 0], list("abc"), ["c", "a"]),
        ([[1], [0]], ["tumour"], ["tumour", "none"]),
        ([[1], [0]], ["healthy", "tumour"], ["tumour", "healthy"]),
        ([[1], [0]], ["x" * 15 + " " + "y" * 15], ["x" * 15 + "\n" + "y" * 15, "none"]),
    ],
)
def test_wall_names_labels_below(targets, class_names, texts):
    axes = plots.plot_wall(np.zeros((2, 4, 4, 1)), np.array(targets), class_names=class_names)
    assert [ax.get_xlabel() for ax in axes.flat] == texts


@pytest.mark.parametrize("targets", [np.ones((9, 14)), np.ones((9, 20, 20, 4)), np.ones((9, 20, 20))])
@pytest.mark.parametrize("columns", [1, 8])
def test_wall_clips_no_text(targets, columns):
    names = [f"finding with a long name {k}" for k in range(14)]
    axes = plots.plot_wall(np.zeros((9, 20, 20, 1)), targets, class_names=names, columns=columns)
    figure = axes[0, 0].figure
    figure.canvas.draw()
    texts = [ax.xaxis.label for ax in axes.flat] + [text for legend in figure.legends for text in legend.get_texts()]
    for text in texts:
        if text.get_text():
            box = text.get_window_extent()
            assert box.x0 >= -1 and box.y0 >= -1 and box.x1 <= figure.bbox.x1 + 1 and box.y1 <= figure.bbox.y1 + 1
    for ax in axes.flat[:9]:  # the images keep their size
        assert ax.get_window_extent().width > 0.8 * 1.3 * figure.dpi


def test_wall_draws_into_the_figure_it_is_given():
    figure = plt.figure(layout="constrained")
    left, right = figure.subfigures(1, 2)
    axes = plots.plot_wall(np.zeros((3, 4, 4, 3)), np.ones((3, 4, 4)), figure=left)
    assert list(left.axes) == list(axes.flat) and not right.axes
    assert plt.get_fignums() == [figure.number]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"images": np.zeros((4, 8, 8))}, "Expected images"),
        ({"images": np.zeros((0, 8, 8, 1))}, "Expected images"),
        ({"targets": np.zeros((3, 5))}, "Expected targets"),
        ({"targets": np.zeros((2, 8, 4))}, "Expected targets"),
        ({"targets": np.ones((2, 3)), "class_names": ["a"]}, "Expected 3 class names"),
        ({"targets": np.ones((2, 8, 8, 2)), "rater_valid": [True, True]}, "Expected rater_valid"),
        ({"columns": 0}, "Expected columns"),
    ],
)
def test_wall_refuses(options, message):
    with pytest.raises(ValueError, match=message):
        plots.plot_wall(**({"images": np.zeros((2, 8, 8, 1))} | options))


def test_a_sweep_has_its_medians_and_quartiles_on_a_logarithmic_axis():
    fig, ax = plt.subplots()
    sweep = {0.0001: [0.3, 0.1, 0.2], 0.01: [0.5, 0.4, 0.9], 1.0: [1.0]}
    plots.plot_sweep(ax, sweep, {"ensemble": [0.2, 0.6, 0.3], "dropout": []}, "nll")
    (line,) = [one for one in ax.lines if one.get_label() == "partial"]
    np.testing.assert_allclose(line.get_xdata(), [0.01, 1, 100])
    np.testing.assert_allclose(line.get_ydata(), [0.2, 0.5, 1.0])
    band = ax.collections[0].get_paths()[0].vertices
    assert np.isclose(band, [1, np.quantile([0.5, 0.4, 0.9], 0.75)]).all(axis=1).any()
    rival = next(one for one in ax.lines if one.get_label() == "ensemble")
    assert set(rival.get_ydata()) == {0.3} and ax.get_xscale() == "log"
    assert "dropout: missing" in ax.get_legend_handles_labels()[1]
    plt.close(fig)
    fig, ax = plt.subplots()
    assert plots.plot_sweep(ax, {}, {}).texts[0].get_text() == "missing"
    plt.close(fig)


def test_differences_are_of_the_same_training():
    fig, ax = plt.subplots()
    rows = {"ours": {0: 0.4, 1: 0.6, 7: 9.0}, "theirs": {}}
    plots.plot_differences(ax, rows, {0: 0.5, 1: 0.5, 2: 0.1}, "less")
    np.testing.assert_allclose(sorted(ax.lines[0].get_xdata()), [-0.1, 0.1])
    assert ax.lines[1].get_xdata()[0] == pytest.approx(0.0)
    assert [text.get_text().strip() for text in ax.texts] == ["missing"]
    assert [label.get_text() for label in ax.get_yticklabels()] == ["ours", "theirs"]
    plt.close(fig)
    fig, axes = plt.subplots(1, 2, sharey=True)
    for ax in axes:
        plots.plot_differences(ax, rows, {0: 0.5}, "less")
    assert axes[0].get_ylim() == (1.5, -0.5)  # the first row is on top in both
    plt.close(fig)


def test_a_comparison_shows_each_method_and_says_what_is_missing():
    rng = np.random.default_rng(0)
    images, truths = rng.random((2, 8, 8, 1)), rng.random((2, 8, 8, 3)) > 0.5
    probs = {"one": rng.random((1, 2, 8, 8)), "many": rng.random((4, 2, 8, 8)), "none": None}
    axes = plots.plot_comparison(images, truths, probs, rater_valid=np.array([[True] * 3, [True, True, False]]))
    assert axes.shape == (2, 8)
    assert [ax.get_title() for ax in axes[0]][2:] == [
        "one",
        "its entropy",
        "many",
        "its entropy",
        "none",
        "its entropy",
    ]
    assert axes[1, -1].texts[0].get_text() == "missing"
    mean = probs["many"].mean(0)[1]
    shown = axes[1, 5].images[0].get_array()
    np.testing.assert_allclose(shown, -(mean * np.log(mean) + (1 - mean) * np.log(1 - mean)), rtol=1e-6)
    overlay = axes[1, 4].images[-1].get_array()
    majority = truths[1][..., :2].mean(-1) >= 0.5
    hits = (mean > 0.5) & majority
    np.testing.assert_array_equal((np.asarray(overlay)[..., :3] == to_rgb(predictions.TRUE_POSITIVE)).all(-1), hits)
    plt.close(axes[0, 0].figure)
