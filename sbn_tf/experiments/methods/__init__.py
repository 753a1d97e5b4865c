"""Every method of the table behind one contract: `fit`, `predict_samples`, `cost`, `estimate`.

    from sbn_tf import datasets
    from sbn_tf.experiments import methods, recipes

    data = datasets.load("phantom_lesion")
    recipe = recipes.recipe_for("quick", data.card)
    method = methods.make("ensemble", recipe, network="unet_small").fit(data)
    probs = method.predict_samples(data.test.normalised(slice(0, 20)))  # (samples, images, height, width)

All start from the same step 1, except `bayes_normal`, `branched`, `budget_...` and the other members of ensembles, and
choose on the validation split alone. `fit` goes on after an interruption and loads a finished method; it does not read
the test split.
"""

from __future__ import annotations

from sbn_tf.experiments.methods import dropout, ensembles, laplace, partial, plain, turned
from sbn_tf.experiments.methods.base import Method
from sbn_tf.experiments.methods.estimates import Estimate, Sizes
from sbn_tf.experiments.recipes import Recipe

__all__ = ["METHODS", "Estimate", "Method", "Sizes", "describe", "make"]

_CLASSES = (
    plain.Deterministic,
    turned.Turned,
    plain.DeterministicLonger,
    plain.Temperature,
    ensembles.Budget2,
    ensembles.Budget3,
    ensembles.Budget5,
    ensembles.Ensemble,
    turned.EnsembleTurned,
    ensembles.EnsembleLonger,
    ensembles.Snapshot,
    dropout.MCDropout,
    laplace.Laplace,
    partial.Partial,
    partial.PartialRandom,
    partial.PartialMagnitude,
    partial.PartialChannel,
    partial.PartialLate,
    partial.Members,
    turned.MembersTurned,
    partial.Mixture,
    partial.Branched,
    turned.BranchedTurned,
    partial.FirstLayer,
    partial.LastLayer,
    partial.FirstLast,
    partial.Bayes,
    partial.BayesNormal,
)
METHODS: dict[str, type[Method]] = {cls.name: cls for cls in _CLASSES}  # in the order of a table


def make(name: str, recipe: Recipe, **options) -> Method:
    """A method by its name, to be fitted.

    Args:
        name: one of `METHODS`.
        recipe: a `recipes.Recipe`.
        r_bayes: fraction of the eligible weights that is Bayesian, 0..1, where a method takes one (default 0.01).
        seed: of initial weights, stream and noise (default 0).
        network: a name of `networks.NETWORKS`; None: the dataset's.
        runs: folder of all runs; None: `runs/` of the repository or the working directory.
        limit: named in the settings only (the data were loaded with it).
        num_samples: of a prediction, where a method samples; None: the recipe's. Ensembles have one for each network.
        num_members: networks of "ensemble" (default 5).
        verbose: show progress bars.

    Raises:
        ValueError: an unknown name, or a number out of its range.
        TypeError: something else than a recipe.
    """
    return _class_of(name)(recipe, **options)


def describe(name: str) -> str:
    """One line about a method, for a table."""
    return _class_of(name).title


def _class_of(name):
    if name not in METHODS:
        raise ValueError(f"Expected a method among {', '.join(METHODS)}.\nReceived: {name!r}")
    return METHODS[name]
