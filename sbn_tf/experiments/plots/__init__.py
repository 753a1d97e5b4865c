"""Pictures: functions that take axes and arrays, and return the axes. None shows or saves a figure."""

from sbn_tf.experiments.plots.calibration import plot_reliability, plot_reliability_curves, plot_risk_coverage
from sbn_tf.experiments.plots.networks import (
    plot_history,
    plot_masks_by_layer,
    plot_saliency_against_cost,
    plot_scales,
    plot_scores,
)
from sbn_tf.experiments.plots.predictions import (
    plot_classification,
    plot_comparison,
    plot_sample_masks,
    plot_segmentation,
)
from sbn_tf.experiments.plots.results import plot_cost, plot_differences, plot_intervals, plot_sweep
from sbn_tf.experiments.plots.style import BLUE, ORANGE, short_name
from sbn_tf.experiments.plots.wall import plot_wall

__all__ = [
    "BLUE",
    "ORANGE",
    "plot_classification",
    "plot_comparison",
    "plot_cost",
    "plot_differences",
    "plot_history",
    "plot_intervals",
    "plot_masks_by_layer",
    "plot_reliability",
    "plot_reliability_curves",
    "plot_risk_coverage",
    "plot_saliency_against_cost",
    "plot_sample_masks",
    "plot_scales",
    "plot_scores",
    "plot_segmentation",
    "plot_sweep",
    "plot_wall",
    "short_name",
]
