# ---
# jupyter:
#   jupytext:
#     text_representation:
#       extension: .py
#       format_name: percent
#       format_version: '1.3'
#       jupytext_version: 1.19.6
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # Partial Bayes: a trained network becomes a sparse Bayesian one
#
# **`to_partial_bayes` copies a trained Keras model, gives a distribution to the masked weights alone, and returns a
# `keras.Model` that trains on the ELBO and predicts with several posterior samples.**
#
# - *You will see*: the conversion, the ELBO and why its KL must be divided, how five samples become one prediction,
#   and the six traps that ruin training, each with its guard.
# - *Words*: a *Bayesian* entry of a weight has a distribution, by default a Gaussian with a mean (*loc*) and a standard
#   deviation (*scale*); a *point* is one number. All these distributions together are the *posterior*; a *sample* or
#   *draw* is one network, with each Bayesian entry drawn once. A *mask* says which entries are Bayesian. More words:
#   [glossary](../../docs/glossary.md).
# - *You need*: the lessons on [layers](layers.ipynb) and on [saliency](saliency.ipynb).
# - *Runs in*: 30 seconds (CPU).

# %%
"""Conversion of trained Keras models to partial Bayesian ones, their ELBO and their predictions."""

from __future__ import annotations

from collections.abc import Mapping

import sbn_tf  # noqa: F401 (first: it silences TensorFlow's log)
import keras
from keras import ops

from sbn_tf.core.checks import check_choice
from sbn_tf.core.context import computed_once
from sbn_tf.core.conversion import check_convertible, convert, to_deterministic
from sbn_tf.core.elbo import KLWeight, watched_scales
from sbn_tf.core.estimators import ESTIMATORS, check_estimator, one_step, refuse_as_a_part
from sbn_tf.core.examples import check_examples
from sbn_tf.core.keras_internals import call_context, compiled_loss, update_mean
from sbn_tf.core.losses import weighted_losses
from sbn_tf.core.optimizers import LocScaleOptimizer, spare_scales
from sbn_tf.core.options import START_OPTIONS, check_masks_or_share, refuse_idle_biases, sorted_options
from sbn_tf.core.outputs import is_samples
from sbn_tf.core.sampled import SampledModel, refuse_posterior_mean, settle_batch_norm
from sbn_tf.core.start import Start, WatchedData, narrow_scales
from sbn_tf.core.weights import biases_before_batch_norm, eligible_weights
from sbn_tf.layers import masked_layers
from sbn_tf.saliency import saliency, top_k

__all__ = [
    "BetaSchedule",
    "LocScaleOptimizer",
    "PartialBayes",
    "settle_batch_norm",
    "to_deterministic",
    "to_partial_bayes",
]

# %% [markdown]
# ## 1. Which network do you get?
#
# A copy: same layers, same names, same trained values. Each layer with a masked weight is replaced by its *masked
# twin*, the layer of the same name in `sbn_tf.layers`; a layer without a twin (an LSTM, an attention layer) is put into
# a wrapper that draws its weights. The original never changes. `sbn_tf.core.conversion` makes the copy.

# %% tags=["active-ipynb"]
# import numpy as np
#
# layers = [keras.layers.Dense(2, name="first"), keras.layers.Dense(1, name="second")]
# small = keras.Sequential([keras.Input((3,)), *layers])
# copy = convert(small, {"second/kernel": np.array([[True], [False]])}, {"kl_weight": 0.0})
# for layer in copy.layers:
#     print(f"{layer.name:<8}{type(layer).__module__.split('.')[0]:<8}{dict(getattr(layer, 'num_bayesian', {}))}")

# %% [markdown]
# ## 2. What is the loss, and what is its KL divided by?
#
# Training minimises the negative *evidence lower bound* (ELBO; Blundell et al. 2015, equation 2), estimated with $S$
# draws $w_s$ of the weights. Keras's loss is a mean, so the whole ELBO is divided by the number of its terms, $N T$. In
# the formula NLL is Keras's loss, the mean negative log-likelihood of a term (defined below), the KL says how far the
# posterior $q$ is from the prior $p$ (layers, section 2), and $\beta$ is a factor, 1 in the ELBO:
#
# $$ \frac{1}{S} \sum_{s=1}^{S} \mathrm{NLL}(x, y; w_s) \;+\; \frac{\beta}{N\,T} \, \mathrm{KL}(q \,\|\, p). $$
#
# $N$ is `num_train`, the number of training examples. $T$ is the number of *terms* of one example that the loss
# averages over: 1 if it averages over images only, the number of pixels if it also averages over pixels, the number of
# labels if it also averages over labels. A mean squared error is $2 s^2$ times an NLL, up to a constant ($s$: the
# noise's sd): `beta=2 * s**2` multiplies the KL by the same factor. By hand: 1,000 images of 32 x 32 pixels, $\beta =
# 1$: the KL's weight is $1 / 1{,}024{,}000$. If $T$ depends on the data (masked padding, an `ignore_class`, a loss
# divided by the sum of the sample weights), the terms of every training batch are counted, and $T$ is the mean number
# per example over all batches so far.

# %% tags=["active-ipynb"]
# from sbn_tf.core.losses import loss_terms
#
# terms = loss_terms("binary_crossentropy", (None, 32, 32, 1))
# print("terms an image:", terms, "| KL weight at 1,000 images: 1 /", 1000 * terms)
# assert terms == 1024 and loss_terms(keras.losses.CategoricalCrossentropy(), (None, 7)) == 1

# %% [markdown]
# > **Misconception: "the KL is divided by `num_train`, and that is all."** With a loss averaged over 32 x 32 pixels the
# > KL is then 1,024 times too strong, which ruins training. The KL of the weights counts once for the whole training
# > set; the loss beside it is a mean over all terms of all images.
#
# > **Misconception: "mean or sum over the weights is a matter of taste."** The ELBO has the *sum* of the KL over the
# > Bayesian entries. `kl_reduction="mean"`, as in the paper's code, takes the mean over the $k$ entries of each weight
# > and divides by neither images nor pixels. That is $N T / k$ times the ELBO's KL: for the images above and $k = 100$
# > it is 10,240 times as strong, before $\beta$ reduces it.
#
# A check: for a weight of six entries the sum of the KL must be six times its mean.

# %% tags=["active-ipynb"]
# nats, every = {}, {"first/kernel": np.ones((3, 2), bool)}
# for how in ("sum", "mean"):
#     layer = convert(small, every, {"kl_weight": 1.0, "kl_reduction": how}).get_layer("first")
#     nats[how] = float(sum(layer.losses))
# print(f"sum / mean: {nats['sum'] / nats['mean']:.0f} entries")
# print(f"a mean over 100 entries, undivided: {1000 * terms / 100:,.0f} times the ELBO's")
# assert np.isclose(nats["sum"], 6 * nats["mean"], rtol=1e-5)

# %% [markdown]
# ## 3. How does the model train and predict?
#
# The *posterior predictive* is the mean of the network's probabilities over the posterior of its weights; a few draws
# estimate it. A `PartialBayes` holds the converted `network`. In training (here with the default estimator "all";
# section 6 has others) it returns the output of each of `num_samples` draws, since the ELBO averages *losses*.
# Elsewhere it returns the posterior predictive mean, which averages *probabilities*. The parent, `SampledModel`
# (`sbn_tf.core.sampled`), predicts; this class adds training: see `call` and `compute_loss`, the loss of section 2.


# %%
@keras.saving.register_keras_serializable(package="sbn_tf")
class PartialBayes(SampledModel):
    """A network with posteriors of chosen weights, trained on the ELBO, predicting with posterior samples.

    Made by `to_partial_bayes`. `compile`, `fit`, `evaluate`, `predict` and saving are Keras's own; `SampledModel` says
    what predictions return. `fit` logs `kl`, in nats per training example, and `nll`, the compiled loss alone.

    Args:
        network: with masked layers; num_samples, probabilities, from_logits, batch_norm: as in `SampledModel`.
        num_train, beta, kl_reduction, terms_per_example: what multiplies the KL, as in `KLWeight`.
        estimator: "all" (each draw sees the batch), "split" (draw s sees part s of it), "turns" (each step one draw, in
            turn, sees the batch), "flipout" or "local" (each example sees a draw of its own), see section 6.

    Raises:
        ValueError: an option out of range, a `stateful=True` layer that runs for each draw, or a trap of section 5.
    """

    def __init__(
        self, network, num_train, num_samples=5, beta=1.0, kl_reduction="sum", terms_per_example=None, estimator="all",
        batch_norm="frozen", probabilities="auto", from_logits=False, **kwargs,
    ):  # fmt: skip
        super().__init__(network, num_samples, probabilities, from_logits, batch_norm, **kwargs)
        check_choice("estimator", estimator, tuple(ESTIMATORS))
        self.estimator = estimator
        check_estimator(self)
        if estimator == "turns":
            self.turn = self.add_weight(name="turn", shape=(), dtype="int32", initializer="zeros", trainable=False)
        self.kl = KLWeight(num_train, beta, kl_reduction, terms_per_example)
        for layer in masked_layers(network):
            layer.posterior_options.kl_weight = self.kl.weight
        self.kl_tracker, self.nll_tracker = keras.metrics.Mean(name="kl"), keras.metrics.Mean(name="nll")
        self.start = Start()
        self.built = True

    beta = property(
        lambda self: self.kl.beta, lambda self, value: self.kl.set_beta(value), doc="Factor of the KL; it acts at once."
    )

    def call(self, inputs, training=None):
        """In training, the outputs of the estimator's draws; else the predictive mean of `num_samples` draws."""
        if not training:
            return super().call(inputs)
        refuse_as_a_part(self)
        with call_context(self):
            return ESTIMATORS[self.estimator](self, inputs)

    def train_step(self, *args):
        """`keras.Model.train_step`, which computes each scale once; with "turns" only one member changes."""
        with computed_once():
            return one_step(self, super().train_step, *args)

    def compute_loss(self, x=None, y=None, y_pred=None, sample_weight=None, training=True):
        """The losses, compiled or of `add_loss`, are means over samples; KL and regularizers are added once."""
        loss = compiled_loss(self)
        if loss is None:
            raise ValueError("Expected a loss: compile(optimizer, loss). Received: none.")
        self.kl_tracker.update_state(self.kl_divergence() / self.kl.num_train)  # here, as no metric can in JAX
        samples = y_pred["samples"] if is_samples(self.network, y_pred) else [y_pred]
        data = sum(loss(y, sample, sample_weight) for sample in samples) / len(samples)
        update_mean(self.nll_tracker, data, samples[0])
        self.kl.follow(y, samples[0], sample_weight, training)
        return data + sum(ops.cast(one, data.dtype) for one in weighted_losses(self))

    def compile(self, optimizer=None, loss=None, **kwargs):
        """`keras.Model.compile`; by default with the trained network's loss and its optimiser at a lower rate."""
        optimizer, loss, kwargs = self.start.filled(optimizer, loss, kwargs)
        self.kl.settle(loss, self.network)
        self.outputs_of_samples.settle(loss)
        super().compile(optimizer=optimizer, loss=loss, **kwargs)
        self.forget_samplers()
        spare_scales(self.optimizer, self.trainable_variables)

    def fit(self, x=None, y=None, batch_size=None, epochs=1, verbose="auto", callbacks=None, *args, **kwargs):
        """`keras.Model.fit`; compiles first if needed; warns if scales do not move or the network gets far worse."""
        refuse_posterior_mean()
        if not self.compiled:
            self.compile()
        check_examples(self.network, self.loss, x, y)
        callbacks = self.start.guarded(self, x, y, batch_size, callbacks)
        with watched_scales(self):
            return super().fit(x, y, batch_size, epochs, verbose, callbacks, *args, **kwargs)

    def get_config(self):
        """Arguments of the model, the network included."""
        return {**super().get_config(), **self.kl.get_config(), "estimator": self.estimator}

    def set_weights(self, weights):
        """`keras.Model.set_weights`; beta stays what it is."""
        super().set_weights(weights)
        self.kl.apply()


# %% [markdown]
# ## 4. How do five samples become one number for each pixel?
#
# *Aleatoric* uncertainty is in the data: more data would not remove it (raters differ, classes overlap). *Epistemic*
# uncertainty is the model's own: another draw of its weights would have said something else. For a predictive mean
# $\bar p = \frac1S \sum_s p_s$ the entropy splits into two parts (Depeweg et al. 2018):
#
# $$ \underbrace{H[\bar p]}_{\text{total}} = \underbrace{\tfrac1S \textstyle\sum_s H[p_s]}_{\text{aleatoric}}
#  + \underbrace{I}_{\text{mutual information: epistemic}}. $$
#
# $H$ is the entropy in nats: $-p \ln p - (1-p) \ln(1-p)$ of a pixel or label, $-\sum_c p_c \ln p_c$ over classes. The
# samples are an array (samples, batch, height, width, 1). The results (the mean and the equation's three terms)
# have no samples axis: each is one picture per image. With classes, the three terms have no class axis either.
#
# By hand: two samples that say 0 and 1 are each sure (entropy 0), but their mean 0.5 is not ($\ln 2 = 0.693$ nats): all
# of the uncertainty is epistemic. Two samples that both say 0.5 have the same total, all of it aleatoric.

# %% tags=["active-ipynb"]
# from sbn_tf.core.outputs import entropy
#
# two = np.array([[0.0, 1.0], [0.5, 0.5]])  # a row: two samples of one pixel
# total = np.array(entropy(two.mean(axis=1), "sigmoid"))
# aleatoric = np.array(entropy(two, "sigmoid")).mean(axis=1)
# print("total:", total.round(3), "aleatoric:", aleatoric.round(3), "epistemic:", (total - aleatoric).round(3))
# assert np.allclose(total, np.log(2)) and np.allclose(aleatoric, [0, np.log(2)])

# %% [markdown]
# ## 5. How do masks become a model, and which six traps must be avoided?
#
# | trap | what happens | guard |
# |---|---|---|
# | KL divided by `num_train`, not by pixels | thousands of times too strong | section 2; a warning for wrong counts |
# | a Bayesian bias before a batch norm in training mode | no effect, so the KL inflates its scale | refused |
# | training batch norm behind a Bayesian weight | sees many draws or part of a batch | only with `"all"` or `"turns"` |
# | every scale starts at .01 | for some weights ten times their value: a ruin | relative to the weight, by default |
# | scales under plain SGD | they never move from the initial scale | `fit` warns; `LocScaleOptimizer` |
# | weight decay on the scales | it pulls each towards softplus(0) = 0.69 | `compile` leaves the scales out |


# %%
def to_partial_bayes(
    model: keras.Model, masks: Mapping | None = None, *, num_train: int | None = None, r_bayes: float | None = None,
    data=None, loss=None, num_samples: int = 5, posterior: str = "gaussian", seed: int | None = None,
    verbose: bool = True, **options,
) -> PartialBayes:  # fmt: skip
    """A sparse Bayesian copy of a trained model; every loc starts at the trained value.

    Args:
        model: built `keras.Model`; a subclassed one is wrapped whole. It is not changed.
        masks: `saliency.Masks` of this model: the entries that are Bayesian. None: the salient ones, by `r_bayes`.
        num_train: int, training examples; the ELBO divides the KL by it. None: those of `data`.
        r_bayes: share of the eligible entries that is Bayesian, 0 to 1: those of the highest Fisher score on `data`.
        data: (x, y), a `tf.data.Dataset` or an iterable of batches of training examples, for the scores.
        loss: for the scores; None: the compiled one. num_samples: draws in a step or in a prediction.
        posterior: "gaussian" (the paper's), "members" (`num_samples` trained values per entry) or "mixture".
        seed: int, fixes initial values and noise. verbose: whether to show the progress of the pass over `data`.
        options: fields of `PosteriorOptions` (`initial_scale`: left out, a tenth of a weight's magnitude, halved while
            its noise raises the first examples' loss much; `prior`, ...) and of `PartialBayes` (`estimator`, ...).

    Raises:
        ValueError: masks of another model, neither masks nor r_bayes with data, a wrong option, or a trap of the table.

    Reference: Abboud, Lombaert, Kadoury (2024), section 2.3.
    """
    check_convertible(model)
    of_layers, of_model = sorted_options(options, model)
    trains_batch_norm = of_model.get("batch_norm", "frozen") != "frozen"
    check_masks_or_share(masks, r_bayes)
    seen = WatchedData(data, model, loss)
    masks = _salient(model, r_bayes, seen.data, loss, trains_batch_norm, verbose) if masks is None else masks
    refuse_idle_biases(model, masks, trains_batch_norm)
    if posterior != "gaussian":
        of_layers["num_members"] = num_samples
    network = convert(model, masks, {**of_layers, "posterior": posterior, "kl_weight": 0.0}, seed=seed)
    if posterior == "gaussian" and not START_OPTIONS & set(options):
        narrow_scales(network, compiled_loss(model) or keras.losses.get(loss), seen.first)
    bnn = PartialBayes(network, seen.checked_count(num_train), num_samples, **of_model)
    bnn.start = Start(model, seen.first, frozen=not trains_batch_norm)
    return bnn


# %% [markdown]
# If no masks are given, they are chosen here, by the Fisher score of the lesson on [saliency](saliency.ipynb).


# %%
def _salient(model, r_bayes, data, loss, trains_batch_norm, verbose):
    own = getattr(model, "loss", None) if loss is None else loss
    if data is None or own is None:
        missing = "data" if data is None else "loss, and the model is not compiled: give loss=..."
        raise ValueError(f"Expected data=(x, y) and a loss to choose the weights by. Received: no {missing}.")
    several = isinstance(own, dict | list) or (loss is None and len(getattr(model, "outputs", ())) > 1)
    loss = compiled_loss(model) if several else own
    idle = biases_before_batch_norm(model) if trains_batch_norm else ()
    exclude = [key for key in eligible_weights(model) if key in idle]  # a frozen bias is not eligible anyway
    return top_k(saliency(model, data, loss, exclude=exclude or None, verbose=verbose), r_bayes)


# %% [markdown]
# ## 6. What do five draws cost?
#
# ### Layers before the first Bayesian weight run once
#
# Let $f$ be the share of the network's operations that use a Bayesian weight or depend on one (the *fan-out*, by
# `sbn_tf.core.graph`). $S$ draws then cost $1 + (S - 1) f$ passes. By hand: three layers of $8 \cdot 16 = 128$,
# $16 \cdot 16 = 256$ and $16$ multiply-adds, the last one Bayesian: $f = 16 / 400 = 0.04$, five draws cost 1.16 passes.

# %% tags=["active-ipynb"]
# from sbn_tf.core.graph import Graph
#
# layers = [keras.layers.Dense(n, "tanh", name=name) for n, name in ((16, "first"), (16, "second"), (1, "last"))]
# network = keras.Sequential([keras.Input((8,)), *layers])
# for name in ("last", "second", "first"):
#     mask = np.ones(network.get_layer(name).kernel.shape, bool)
#     bnn = to_partial_bayes(network, {f"{name}/kernel": mask}, num_train=100, seed=0)
#     fan_out, once = Graph(network).fan_out([f"{name}/kernel"]), Graph(bnn.network).runs_once()
#     print(f"{name:<7} Bayesian: five draws cost {1 + 4 * fan_out:.2f} passes; run once: {', '.join(once) or 'none'}")
# assert np.isclose(Graph(network).fan_out(["last/kernel"]), 0.04)

# %% [markdown]
# In training, dropout and everything after it also runs S times. The results equal those of running everything S
# times, up to float rounding. A subclassed network is one operation: it runs S times.
#
# ### How do several draws share one pass?
#
# The loss is an expectation over the posterior. All estimators are unbiased; they differ in cost and in variance.
# Behind a Bayesian weight, batch norm in training mode would normalise over all draws of one pass together. Only
# `"all"` and `"turns"`, which have one draw a pass, are accepted there.
#
# | `estimator` | who sees which draw | passes | where |
# |---|---|---|---|
# | `"all"` (the paper's) | each of S draws sees the whole batch | $1 + (S - 1) f$ | everywhere |
# | `"split"` | draw $s$ sees part $s$ of the batch | about 1 | everywhere (S calls if a layer may mix examples) |
# | `"turns"` | one draw a step sees the whole batch, the next step another | 1 | everywhere |
# | `"flipout"` (Wen et al. 2018) | one noise, each example with signs of its own | 1 to 2 | axis 0 is the batch |
# | `"local"` (Kingma et al. 2015) | noise on each Dense output; other layers: flipout | 1 to 2 | axis 0 is the batch |
#
# *Which one?* `"split"` and `"turns"` cost least; at equal computing time `"flipout"` has gradients of the least
# variance in `benchmarks/estimators.py` (small networks, 32 px, batch 50: run it for your own). Take `"all"` where the
# batch is smaller than S, or where most of the network runs once.
#
# A check against the closed form: a linear network with squared loss has
# $\mathbb{E}[(x^\top w - t)^2] = (x^\top \mu - t)^2 + \sum_i x_i^2 \sigma_i^2$. Each estimator's mean must agree with
# it.

# %% tags=["active-ipynb"]
# rng = np.random.default_rng(0)
# x, t = rng.normal(size=(20, 3)).astype("float32"), rng.normal(size=(20, 1)).astype("float32")
# linear = keras.Sequential([keras.Input((3,)), keras.layers.Dense(1, use_bias=False, name="d")])
# residual = x @ linear.layers[0].get_weights()[0] - t
# exact = np.mean(residual**2 + 0.25 * np.sum(x**2, axis=1, keepdims=True))
# for estimator in ("all", "split", "turns", "flipout", "local"):
#     options = {"num_train": 20, "beta": 0.0, "initial_scale": 0.5, "seed": 0}
#     bnn = to_partial_bayes(linear, {"d/kernel": np.ones((3, 1), bool)}, estimator=estimator, **options)
#     bnn.compile("sgd", "mse")
#     losses = np.array([float(bnn.compute_loss(x, t, bnn(x, training=True))) for _ in range(100)])
#     standard_error = losses.std() / 10
#     print(f"{estimator:<8} within four standard errors: {bool(abs(losses.mean() - exact) < 4 * standard_error)}")
#     assert abs(losses.mean() - exact) < 4 * standard_error

# %% [markdown]
# ### How do other programs use the model?
#
# `bnn.export(path, outputs="uncertainty")` writes a SavedModel that makes S draws in each call: its `serve` gives what
# `predict_uncertainty` gives. The states of the noise seeds are stored too: two calls of a loaded model differ, and
# each fresh load repeats the same sequence.

# %% [markdown]
# ## 7. Why two learning rates, and a schedule?
#
# Locs start at trained values and need small steps; scales start at a guess and need large ones.
# `LocScaleOptimizer(a, b)` gives each its own optimiser (`sbn_tf.core.optimizers`). `compile()` without arguments takes
# the network's own loss, metrics and optimiser, at a tenth of its learning rate (a hundredth with frozen batch norm),
# and `Adam(0.01)` for the scales. `BetaSchedule` changes beta over the epochs; a change acts at once, even on
# a compiled model. The paper's segmentation runs go from 0.2 to 0.01.


# %%
class BetaSchedule(keras.callbacks.Callback):
    """Sets `model.beta` before each epoch, linearly from `start` to `stop`, reached in the last epoch.

    # Differs from the paper: its formula as printed runs from the target to the start; its text says 0.2 to 0.01.

    Args:
        start, stop: beta in the first and in the last epoch, >= 0.
        epochs: how many epochs the schedule spans.
    """

    def __init__(self, start: float, stop: float, epochs: int):
        super().__init__()
        self.start, self.stop, self.epochs = start, stop, epochs

    def on_train_begin(self, logs=None):
        """Refuse a model without a beta."""
        if not isinstance(self.model, PartialBayes):
            raise ValueError(
                f"Expected a PartialBayes, which has a beta. Received: {type(self.model).__name__}. For layers by hand "
                "give them kl_weight=keras.Variable(...) and assign to it."
            )

    def on_epoch_begin(self, epoch, logs=None):
        """Set beta for this epoch."""
        self.model.beta = self.at(epoch)

    def at(self, epoch: int) -> float:
        """Beta in an epoch, counted from 0."""
        done = 1.0 if self.epochs <= 1 else min(epoch / (self.epochs - 1), 1.0)
        return self.start * (1.0 - done) + self.stop * done


# %% [markdown]
# ## 8. What does the whole procedure give?
#
# From a trained network to uncertainty, on two noisy half-moons, with 337 weights, one in ten of them Bayesian. No step
# is new: train, score, select, convert, fit, predict.

# %% tags=["active-ipynb"]
# from sbn_tf.saliency import saliency, top_k
#
# rng = np.random.default_rng(0)
# label, angle = rng.integers(0, 2, (256, 1)), rng.uniform(0, np.pi, 256)
# moon = np.stack([np.cos(angle), np.sin(angle)], axis=1)
# x = (np.where(label == 0, moon, [1.0, 0.5] - moon) + 0.2 * rng.normal(size=(256, 2))).astype("float32")
# y = label.astype("float32")
#
# keras.utils.set_random_seed(0)
# first, second = (keras.layers.Dense(16, "tanh", name=name) for name in ("first", "second"))
# last = keras.layers.Dense(1, "sigmoid", name="last")
# network = keras.Sequential([keras.Input((2,)), first, second, last])
# network.compile(keras.optimizers.Adam(0.01), "binary_crossentropy")
# network.fit(x, y, epochs=30, verbose=0)
#
# masks = top_k(saliency(network, (x, y), "binary_crossentropy", verbose=False), 0.1)
# bnn = to_partial_bayes(network, masks, num_train=len(x), initial_scale=0.01, seed=0)
# bnn.compile(LocScaleOptimizer(keras.optimizers.Adam(0.001), keras.optimizers.Adam(0.05)), "binary_crossentropy")
# before = np.median(bnn.scales())
# history = bnn.fit(x, y, epochs=30, verbose=0).history
# assert bnn.num_bayesian == masks.num_bayesian == 34 and np.median(bnn.scales()) > 5 * before

# %% tags=["active-ipynb", "nbval-ignore-output"]
# print(f"{bnn.num_bayesian} of {network.count_params()} weights are Bayesian")
# print(f"KL per example: {history['kl'][0]:.3f} -> {history['kl'][-1]:.3f} nats")
# print(f"median scale:   {before:.3f} -> {np.median(bnn.scales()):.3f}")
# for name, model in (("trained network", network), ("partial Bayes", bnn)):
#     right = np.mean((model.predict(x, verbose=0) > 0.5) == y)
#     print(f"{name:<16}right on the training points: {right:.1%}")

# %% [markdown]
# The scales left their initial 0.01, a guess that was too narrow (given here to watch them grow; by default each scale
# starts relative to its weight). The KL falls while they grow towards the prior's 1.
# The loss on the data stops this growth: the more sensitive that loss is to a weight, the smaller its scale stays.
#
# ### Where is the model unsure, and why?

# %% tags=["active-ipynb", "nbval-ignore-output"]
# import matplotlib.pyplot as plt
#
# across, up = np.meshgrid(np.linspace(-3, 4, 60), np.linspace(-3, 3.5, 60))
# plane = np.stack([across.ravel(), up.ravel()], axis=1).astype("float32")
# # 30 samples: smooth pictures. One batch: every point sees the same 30 networks.
# parts = bnn.predict_uncertainty(plane, num_samples=30, batch_size=len(plane))
#
# names = {"mean": "probability", "expected_entropy": "aleatoric (nats)", "mutual_information": "epistemic (nats)"}
# figure, panels = plt.subplots(1, 3, figsize=(10, 3), layout="constrained", sharex=True, sharey=True)
# for axes, (key, title) in zip(panels, names.items(), strict=True):
#     drawn = axes.pcolormesh(across, up, parts[key].reshape(across.shape), shading="auto")
#     axes.scatter(x[:, 0], x[:, 1], c=y[:, 0], s=4, cmap="gray", linewidths=0)
#     axes.set_title(title)
#     axes.set_aspect("equal")
#     figure.colorbar(drawn, ax=axes, shrink=0.8)
# plt.show()

# %% [markdown]
# A check on this picture: on the border, where the probability is .3 to .7, the samples disagree about twice as much
# beyond the points as among them.

# %% tags=["active-ipynb"]
# distance = np.min(np.linalg.norm(plane[:, None] - x[None], axis=-1), axis=1)
# information, border = parts["mutual_information"][:, 0], np.abs(parts["mean"][:, 0] - 0.5) < 0.2
# near, far = information[border & (distance < 0.2)].mean(), information[border & (distance > 1.0)].mean()
# assert far > 1.5 * near > 0, (near, far)

# %% [markdown]
# *Reading*: aleatoric uncertainty lies on the border between the moons. Epistemic uncertainty lies where the border
# continues beyond the points, since each sample draws it elsewhere. Far from border *and* points the model is sure: 34
# weights do not make it doubt.

# %% [markdown]
# ## Summary
#
# - `to_partial_bayes` copies a trained model; masked weights become Gaussian, everything else stays a point. Every loc
# and point starts as trained, and *all* of them are trained further but batch norm, which is frozen by default.
# - The KL is divided by `num_train` *and* by the terms that the loss averages over in each example.
# - Training averages the samples' losses; prediction averages their probabilities.
# - Layers before the first Bayesian weight run once; `estimator="split"` serves all draws in about one pass.
# - `predict_uncertainty` splits the total entropy into an aleatoric and an epistemic part.
# - Give the scales their own, larger rate: `LocScaleOptimizer`.
#
# ## When not to trust it
#
# - *Far from the data.* At $(-30, 10)$ the model of section 8 is sure of one class, with mutual information 0.
#   A few Bayesian weights do not make a network doubt what it has never seen; nothing here detects such inputs.
# - *Scales that hardly moved.* Then the spread of the samples comes from the initial scale, a guess. Look at
#   `bnn.scales()`.
# - *Mutual information near 0.* Then all samples say the same, and one would do.
# - *One seed, five samples.* Both are noisy: repeat before you believe a difference.
# - *A score without that of a trivial predictor beside it*, one that ignores the image. Where a label is true of 6 % of
#   the images, always saying no is right on 94 %.
#
# ## Exercises
#
# 1. A segmentation set of 500 images of 64 x 64 pixels, binary cross-entropy averaged over pixels. What multiplies the
#    KL at $\beta = 1$?
#
#    <details><summary>Answer</summary>
#
#    $1 / (500 \cdot 4{,}096) = 1 / 2{,}048{,}000$.
#    </details>
# 2. Three samples give a pixel the probabilities 0.1, 0.5 and 0.9. Compute total, aleatoric and epistemic uncertainty.
#
#    <details><summary>Answer</summary>
#
#    The mean is 0.5: total $\ln 2 = 0.693$. The samples' entropies are 0.325, 0.693 and 0.325: aleatoric 0.448. The
#    difference, 0.245 nats, is epistemic.
#    </details>
# 3. Why does the ELBO average the samples' losses instead of taking the loss of the averaged probability?
#
#    <details><summary>Answer</summary>
#
#    The ELBO has the *expected* log-likelihood, $\mathbb{E}_q[\log p(y \mid x, w)]$. By Jensen's inequality the log
#    of the mean probability is at least as large: a loss on that mean is no bound on the evidence, and samples may
#    disagree at no cost.
#    </details>
# 4. Pass `beta=20` to `to_partial_bayes` in section 8 and run that section again. What happens to the scales, to the
#    accuracy, and to the last check?
#
#    <details><summary>Answer</summary>
#
#    The KL now outweighs the data: the scales go towards the prior's 1 (0.93 when this was written) and the accuracy
#    falls (from 94 % to 85 %). The last check fails: on the border the samples now disagree nearly as much among the
#    points as beyond them. The Bayesian locs (`to_deterministic(bnn)` has them) move by .09 in the root mean square, a
#    fifth of their size; with `beta=1` by .035. A KL whose division was forgotten looks like this.
#    </details>
#
# ## References
#
# - Abboud, Lombaert, Kadoury (2024). *Sparse Bayesian Networks: Efficient Uncertainty Quantification in Medical Image
#   Analysis*. MICCAI.
# - Blundell, Cornebise, Kavukcuoglu, Wierstra (2015). *Weight Uncertainty in Neural Networks*. ICML.
# - Kingma, Salimans, Welling (2015). *Variational Dropout and the Local Reparameterization Trick*. NeurIPS.
# - Wen, Vicol, Ba, Tran, Grosse (2018). *Flipout: Efficient Pseudo-Independent Weight Perturbations*. ICLR.
# - Depeweg, Hernández-Lobato, Doshi-Velez, Udluft (2018). *Decomposition of Uncertainty in Bayesian Deep Learning for
#   Efficient and Risk-sensitive Learning*. ICML.
