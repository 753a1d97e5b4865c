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
# # Layers: a weight of which only some entries are random
#
# **A masked Gaussian weight keeps its trained value as `loc` and gives a scale to `k` of its entries only;
# everything that a Bayesian layer costs (parameters, optimiser slots, noise, KL) then costs `k`, not `n`.**
#
# - *You will see*: the sparse posterior of one weight, the reparameterization trick, the KL term and its scale,
#   and Dense, Conv, Embedding and other stock Keras layers that hold such weights.
# - *Words*: an entry with a distribution is *Bayesian*, one that stays a number is a *point*; `r_bayes` is the share of
#   a network's eligible entries (all that train, but for normalisation) that is Bayesian. *Nats* are units of entropy
#   and KL with the natural logarithm: 1 bit is 0.69. More words: [glossary](../../docs/glossary.md).
# - *You need*: Keras layers, the normal distribution.
# - *Runs in*: 30 seconds (CPU).
#
# At a first reading take sections 1 and 3, of section 5 its opening and its last cell, and section 8, where a layer is
# used.

# %% tags=["active-ipynb"]
# import os
# os.environ["TF_CPP_MIN_LOG_LEVEL"] = "3"  # TensorFlow's start-up messages are no part of the lesson

# %%
"""Masked variational layers: stock Keras layers of which chosen weight entries are Gaussian.

`kernel = loc + softplus(untransformed_scale) * eps` at the masked entries, `kernel = loc` elsewhere.
"""

from __future__ import annotations

import contextlib
import contextvars
import inspect
import zlib
from collections.abc import Collection, Iterator, Mapping
from typing import Any

import keras
import numpy as np
from keras import ops
from keras.src.backend.common.stateless_scope import in_stateless_scope

from sbn_tf.core.draws import BatchDraws, call_in_batch, touched_channels

if keras.backend.backend() == "tensorflow":
    import tensorflow as tf
    import tensorflow_probability as tfp

    tfd = tfp.distributions

__all__ = [
    "Conv1D",
    "Conv1DTranspose",
    "Conv2D",
    "Conv2DTranspose",
    "Conv3D",
    "Conv3DTranspose",
    "Dense",
    "DepthwiseConv1D",
    "DepthwiseConv2D",
    "EinsumDense",
    "Embedding",
    "MaskedGaussian",
    "SeparableConv1D",
    "SeparableConv2D",
    "batch_draws",
    "masked_layers",
    "partial_class",
    "posterior_mean",
    "posterior_sample",
    "register",
]

# %% [markdown]
# ## 1. What is stored?
#
# A trained weight $w \in \mathbb{R}^n$ and a mask of $k$ entries. The paper (Abboud et al. 2024, section 2.3) lets
# $w_i \sim \mathcal{N}(\mu_i, \sigma_i^2)$ at the masked entries and $w_i = \mu_i$ elsewhere, with
# $\sigma = \log(1 + e^{\rho})$. In the terms of TensorFlow Probability: `loc` is $\mu$, `scale` is $\sigma$,
# `untransformed_scale` is $\rho$. Its draw is written as a function of $\mu$, $\rho$ and noise that depends on neither,
# so the loss of a draw has gradients with respect to both (the *reparameterization trick*, Kingma and Welling 2014):
#
# $$ w = \mu + \mathrm{scatter}\big(\text{index},\ \mathrm{softplus}(\rho) \odot \epsilon\big),
# \qquad \epsilon \sim \mathcal{N}(0, I_k). $$
#
# The stock variable *is* the loc, so trained checkpoints load unchanged. Beside it live two short vectors (three where
# the prior lies around the weights themselves, section 3):
# `kernel_posterior_index` and `kernel_posterior_untransformed_scale`, both of length $k$.
#
# By hand: $n = 4$, index $= [2]$, $\mu = [1, 2, 3, 4]$, $\rho = 0$ and $\epsilon = 1$: softplus(0) = 0.693, so the draw
# is $[1, 2, 3.693, 4]$.
#
# > **Misconception: "the trained number $\rho$ is the standard deviation."** It is what stands before the softplus: at
# > $\rho = 0$ the scale is 0.693, not 0, and a negative $\rho$ is no mistake. Read `layer.scale(name)`.


# %%
def softplus_inverse(scale: float) -> float:
    """Untransformed scale whose softplus is `scale` (> 0): `log(exp(scale) - 1)`, stable for small scales."""
    return float(scale + np.log(-np.expm1(-scale)))


def scatter_entries(values, index, shape):
    """Put `values` (k,) at flat positions `index` (k,) of zeros of `shape`; `index=None` means all in order."""
    if index is None:
        return ops.reshape(values, shape)
    size = (int(np.prod(shape)),)
    if keras.backend.backend() == "tensorflow":
        # The same as `ops.scatter`, which takes up to 14 times as long on a CPU.
        entries = tf.SparseTensor(tf.cast(index, "int64")[:, None], values, size)
        return tf.reshape(tf.sparse.to_dense(entries, validate_indices=False), shape)
    return ops.reshape(ops.scatter(ops.expand_dims(index, -1), values, size), shape)


# %% tags=["active-ipynb"]
# loc = np.array([1.0, 2.0, 3.0, 4.0], "float32")
# draw = loc + scatter_entries(ops.softplus(ops.zeros(1)) * 1.0, ops.array([2]), (4,))
# print(np.round(draw, 3))
# assert np.allclose(draw, [1, 2, 3 + np.log(2), 4])

# %% [markdown]
# ## 2. Where does the noise come from?
#
# From one `keras.random.SeedGenerator` a layer: same seed, same draws. Under a distribution strategy every replica
# holds the same (mirrored) seed, and without care all of them would draw the *same* noise: the replica's number is
# folded into the seed.


# %%
def standard_normal(size, seed_generator, dtype: str = "float32"):
    """Standard normal noise of `size`, a count or a shape; different for each call and each replica of a strategy."""
    shape = (size,) if isinstance(size, int) else size
    if keras.backend.backend() == "tensorflow":
        context = tf.distribute.get_replica_context()
        if context is not None and context.num_replicas_in_sync > 1:
            replica = tf.cast(context.replica_id_in_sync_group, "int32")
            # In the seed, not in the counter beside it: no replica meets later what another has drawn.
            seed = tf.cast(seed_generator.next(ordered=False), "int32") + tf.stack([replica * 1013904243, 0])
            return tf.random.stateless_normal(shape, seed, dtype=dtype)
    return keras.random.normal(shape, dtype=dtype, seed=seed_generator)


# %% [markdown]
# ## 3. How far is the posterior from the prior?
#
# Fitting the data alone would drive every scale to 0. The *evidence lower bound* (ELBO) that is maximised instead takes
# from the expected log-likelihood the price (Blundell et al. 2015, equations 1 and 2)
#
# $$ \mathrm{KL}(q \,\|\, p) = \mathbb{E}_{w \sim q} \big[ \log q(w) - \log p(w) \big] : $$
#
# how many nats the *posterior* $q$, what is believed after training, says more than the *prior* $p$, what was believed
# before any data, did. So a scale shrinks only where the data pay for it, and grows where they do not care. The price
# is charged for the masked entries alone: a point has no KL here (the paper, section 2.3). TensorFlow Probability
# computes it. For $q = \mathcal{N}(\mu, \sigma^2)$ and the default prior $p = \mathcal{N}(0, 1)$ the closed form is
# $\tfrac12(\mu^2 + \sigma^2 - 1) - \log \sigma$ nats an entry; it stands in where the Keras backend is not TensorFlow.
#
# By hand: $\mu = 0.5$, $\sigma = 0.1$: $\tfrac12(0.25 + 0.01 - 1) + 2.303 = 1.933$ nats.
#
# A trained network has reasons to be where it is, and N(0, 1) does not know them: it charges $\mu^2 / 2$ for every
# trained weight, and pulls it to 0. `prior_at_loc` puts the prior around the weight's own start $m$ instead. A KL
# does not change when both distributions are moved alike, so it is that of $\mathcal{N}(\mu - m, \sigma^2)$ from the
# same prior: the loc is free where it starts, and pays for how far it goes. By hand: with $m = \mu$ the term $\mu^2 /
# 2 = 0.125$ is gone, 1.808 nats are left.
#
# In code a prior is a plain description of numbers and strings, so that a layer's config can hold it.


# %%
DEFAULT_PRIOR = {"class_name": "Normal", "config": {"loc": 0.0, "scale": 1.0}}


def prior_config(prior) -> dict:
    """Plain description of a prior, fit for a layer's config.

    Args:
        prior: None for N(0, 1); a scalar `tfd` distribution whose parameters are numbers; or such a description.

    Raises:
        ValueError: a prior of another kind, or one with no registered or no finite KL from a normal distribution.
    """
    if prior is None:
        return dict(DEFAULT_PRIOR)
    if isinstance(prior, dict):
        if set(prior) != {"class_name", "config"}:
            raise ValueError(f"Expected a prior as {DEFAULT_PRIOR}. Received: prior={prior}")
    else:
        if not hasattr(prior, "parameters"):
            raise ValueError(
                "Expected prior to be None or a scalar tfd distribution such as tfd.Normal(0., 0.5). "
                f"Received: prior={prior!r}"
            )
        parameters = {k: v for k, v in prior.parameters.items() if k not in ("name", "validate_args")}
        try:
            config = {k: v if isinstance(v, bool) else float(v) for k, v in parameters.items() if v is not None}
        except (TypeError, ValueError):
            raise ValueError(f"Expected a prior with scalar parameters. Received: {prior}") from None
        prior = {"class_name": type(prior).__name__.lstrip("_"), "config": config}
    if prior != DEFAULT_PRIOR:
        try:
            nats = float(kl_normal(np.zeros(1, "float32"), np.ones(1, "float32"), prior)[0])
        except (NotImplementedError, AttributeError):
            raise ValueError(
                "Expected a prior with a KL from tfd.Normal registered in TFP: tfd.Normal(loc, scale). "
                f"Received: {prior['class_name']}"
            ) from None
        if not np.isfinite(nats):
            raise ValueError(f"Expected a prior with a finite loc and a scale > 0. Received: {prior}")
    return prior


# %% [markdown]
# The KL itself, entry by entry: by TFP, which is the oracle of the closed form in the tests, or by the closed form.


# %%
def kl_normal(loc, scale, prior: dict = DEFAULT_PRIOR):
    """KL divergence in nats of N(loc, scale) from the prior, entry by entry: (k,)."""
    if keras.backend.backend() == "tensorflow":
        return tfd.kl_divergence(tfd.Normal(loc, scale), make_prior(prior, loc.dtype))
    if prior["class_name"] != "Normal":
        raise NotImplementedError(prior["class_name"])
    ratio = scale / prior["config"]["scale"]
    shift = (loc - prior["config"]["loc"]) / prior["config"]["scale"]
    return 0.5 * (shift**2 + ratio**2 - 1.0) - ops.log(ratio)


def make_prior(prior: dict, dtype="float32"):
    """The `tfd` distribution that `prior_config` describes."""
    _check_tfp("prior_distribution")
    dtype = keras.backend.standardize_dtype(dtype)
    config = {k: v if isinstance(v, bool) else np.asarray(v, dtype) for k, v in prior["config"].items()}
    return getattr(tfd, prior["class_name"])(**config)


def _check_tfp(what):
    if keras.backend.backend() != "tensorflow":
        raise ValueError(
            f"Expected Keras on TensorFlow, for which TFP makes distributions, to read {what}. Received: "
            f"KERAS_BACKEND={keras.backend.backend()}. There mask(name), scale(name) and kl_divergence() tell the same."
        )


# %% tags=["active-ipynb"]
# by_hand = 0.5 * (0.5**2 + 0.1**2 - 1) - np.log(0.1)
# nats = kl_normal(np.float32([0.5]), np.float32([0.1]))
# print(f"{float(nats[0]):.3f} nats, by hand {by_hand:.3f}")
# around = kl_normal(np.float32([0.5 - 0.5]), np.float32([0.1]))  # a prior around the loc itself
# print(f"{float(nats[0] - around[0]):.3f} nats less around the loc")
# assert np.allclose(nats, by_hand, atol=1e-5) and np.allclose(nats - around, 0.5**2 / 2, atol=1e-5)

# %% [markdown]
# ## 4. How does a stock layer come to hold such a weight?
#
# In every stock layer `call` reads `self.kernel`. *Inside* the layer's own `call` our property answers with this call's
# draw; *outside* it answers with the loc. A draw is a dense tensor of the weight's shape, made and dropped within the
# call: what costs `k` is parameters, optimiser slots, noise and KL, not the arithmetic of the layer. So one mixin
# serves every layer with its stock signature, dtype policy and config, and nothing that reads `layer.kernel` (Keras's
# own saving, for one) ever stores a random draw.
#
# A layer that is called twice draws twice. Where a layer is shared within one network that is not *one* network drawn
# from the posterior: `posterior_sample()` keeps each weight's first draw, so every use sees the same weight.
# `posterior_mean()` switches the noise off: within it each weight is its loc.
#
# What a call has to know, it finds in context variables; the two contexts set them.

# %%
_draws: contextvars.ContextVar[dict] = contextvars.ContextVar("sbn_tf_draws", default={})  # noqa: B039
_at_mean: contextvars.ContextVar[bool] = contextvars.ContextVar("sbn_tf_at_mean", default=False)
_kept: contextvars.ContextVar[dict | None] = contextvars.ContextVar("sbn_tf_kept", default=None)
_batch: contextvars.ContextVar[BatchDraws | None] = contextvars.ContextVar("sbn_tf_batch", default=None)


@contextlib.contextmanager
def posterior_sample() -> Iterator[None]:
    """Within this context each masked weight is drawn once: a layer used twice has the same weight both times.

    Outside it every call draws anew. In a loop that TensorFlow itself traces (`tf.while_loop`) the draw is the loop's.
    """
    token, batch_token = _kept.set({}), _batch.set(None)
    try:
        yield
    finally:
        _kept.reset(token)
        _batch.reset(batch_token)


@contextlib.contextmanager
def posterior_mean() -> Iterator[None]:
    """Within this context each masked weight is its loc: calls are deterministic.

    It acts while a call is traced: use it around `model(x)`, not around `model.predict(x)`, whose compiled function
    may have been traced before.
    """
    token = _at_mean.set(True)
    try:
        yield
    finally:
        _at_mean.reset(token)


# %% [markdown]
# A third context is for training at about the price of one pass: several draws share a batch. What that is good for is
# told in the lesson on [partial Bayes](partial_bayes.ipynb), section 6.


# %%
@contextlib.contextmanager
def batch_draws(how: str, num_samples: int = 5, shared: Collection[keras.layers.Layer] = ()) -> Iterator[None]:
    """Within this context one call of a network on a batch holds several draws, at about the cost of one.

    Axis 0 of every masked layer's inputs must be the batch, in the same order throughout the network.

    Args:
        how: "split": draw s serves part s of the batch, the rows from s * B // S to (s + 1) * B // S. "flipout": every
            example sees a draw of its own, one noise times random signs. "local": each output of a `Dense` on (batch,
            features) has noise of its own, exact in mean and variance; flipout elsewhere. A layer that is not linear in
            one kernel (separable, wrapped) splits under all three.
        num_samples: number of parts S. >= 1.
        shared: layers that the network uses twice: "local" draws them by flipout; a second use of any other is an
            error there. Within one context a layer's draws, and signs, are the same at each use.

    With the same seeds, "split" gives what S calls on the parts give, each within `posterior_sample`.
    """
    token, kept_token = _batch.set(BatchDraws(how, num_samples, shared)), _kept.set(None)
    try:
        yield
    finally:
        _batch.reset(token)
        _kept.reset(kept_token)


# %% [markdown]
# The *seam* is where the draw comes in: a property for each weight, which answers in one way inside `call` and in
# another outside.


# %%
def _seam(name: str, stock):
    """Property that answers with this call's draw inside the layer's `call`, with the loc outside.

    Most stock layers keep the loc in a plain attribute, which Keras sets in `build`. Where the stock class has a
    property of that name (`kernel` of Dense and of the convolutions), that property goes on answering for the loc.
    """
    stored = f"_{name}_loc"

    def read(self):
        drawn = _draws.get().get((id(self), name))
        if drawn is not None:
            return drawn
        if isinstance(stock, property):
            return stock.fget(self)
        if stored not in self.__dict__:
            raise AttributeError(f"Build layer '{self.name}' before reading `{name}`.")
        return self.__dict__[stored]

    def write(self, value):
        if isinstance(stock, property):
            raise AttributeError(f"`{name}` cannot be set: assign to the variable instead.")
        self.__dict__[stored] = value

    return property(read, write, doc=f"The draw of `{name}` inside `call`, its loc elsewhere.")


# %% [markdown]
# Every masked class gets these properties, and a signature that shows the stock layer's arguments beside ours: the base
# of the class of section 5, `MaskedGaussian`.


# %%
class _Seams:
    """Gives each masked class its properties: `kernel`, `kernel_mask`, `kernel_posterior`, `kernel_posterior_scale`."""

    posterior_weights: tuple[str, ...] = ()

    @classmethod
    def _stock(cls):
        """The stock class: `keras.layers.Dense` of `class Dense(MaskedGaussian, keras.layers.Dense)`."""
        return cls.__mro__[cls.__mro__.index(_Seams) + 1]  # what follows the last of ours

    def __init_subclass__(cls, **kwargs):
        super().__init_subclass__(**kwargs)
        if not cls.__dict__.get("posterior_weights"):
            return
        stock = cls._stock()
        for name in cls.posterior_weights:
            setattr(cls, name, _seam(name, getattr(stock, name, None)))
            setattr(cls, f"{name}_mask", property(lambda self, n=name: self.mask(n)))
            setattr(cls, f"{name}_posterior", property(lambda self, n=name: self.posterior.get(n)))
            setattr(cls, f"{name}_posterior_scale", property(lambda self, n=name: self.scale(n)))
        theirs = list(inspect.signature(stock.__init__).parameters.values())[1:]
        ours = inspect.signature(MaskedGaussian.__init__).parameters.values()
        ours = [p for p in ours if p.kind is inspect.Parameter.KEYWORD_ONLY]
        end = [p for p in theirs if p.kind is inspect.Parameter.VAR_KEYWORD]
        cls.__signature__ = inspect.Signature([*(p for p in theirs if p not in end), *ours, *end])


# %% [markdown]
# What a posterior keeps, and how its KL reaches the loss: as a regularizer of the untransformed scale. `_Box` hides a
# value from Keras, which would take another object's variable for the layer's own.


# %%
_POSTERIOR = ("index", "untransformed_scale", "prior_loc")  # of each weight: its variables, where there are any


class _KL:
    """Regularizer of an untransformed scale: the weighted KL of its posterior, once a step."""

    def __init__(self, layer, name):
        self.layer, self.name = layer, name

    def __call__(self, untransformed_scale):
        layer = self.layer
        kl = kl_normal(layer._from_centre(self.name), ops.softplus(untransformed_scale), layer.prior)
        kl = ops.mean(kl) if layer.kl_reduction == "mean" else ops.sum(kl)
        return ops.cast(ops.convert_to_tensor(layer.kl_weight), kl.dtype) * kl


class _Box:
    """Holds a value out of sight of Keras's tracking: another object's variable or model, or a plain dict."""

    def __init__(self, value):
        self.value = value


# %% [markdown]
# ## 5. What does a layer have to know and to do?
#
# Which entries are Bayesian is settled at `build`, or later by `set_mask`. The KL hangs on the scale variable as its
# *regularizer*: Keras evaluates it once a step however often the layer is called, so five posterior samples do not
# charge it five times, and it works in a plain `compile` and `fit`. Its weight has no default: `1 / num_train` is the
# ELBO's for a loss averaged over images; for a loss averaged over pixels it is `1 / (num_train * pixels)`.


# %%
def _check_scale(scale, dtype):
    tiny = float(np.finfo(dtype).tiny)
    if not (np.isfinite(scale) and scale > tiny):
        raise ValueError(f"Expected a finite initial_scale > {tiny:.1e}. Received: initial_scale={scale}")


def _check_counts(counts, received):
    if any(not np.isfinite(v) or v != int(v) or v < 0 for v in counts.values()):
        raise ValueError(
            "Expected whole counts num_bayesian >= 0 (for a share of n entries: round(share * n)). "
            f"Received: num_bayesian={received}"
        )


def _check_options(kl_reduction, prior_at_loc):
    if kl_reduction not in ("sum", "mean"):
        raise ValueError(f'Expected kl_reduction "sum" or "mean". Received: kl_reduction={kl_reduction!r}')
    if not isinstance(prior_at_loc, bool | np.bool_):
        raise ValueError(f"Expected prior_at_loc True or False. Received: prior_at_loc={prior_at_loc!r}")


def _check_kl_weight(value):
    if isinstance(value, bool) or not isinstance(value, int | float | np.number) or not 0 <= value < np.inf:
        raise ValueError(f"Expected a finite number kl_weight >= 0, or a keras.Variable. Received: kl_weight={value!r}")


def _graph():
    """The TensorFlow graph that is being traced, None where there is none."""
    if keras.backend.backend() != "tensorflow" or tf.executing_eagerly():
        return None
    return id(tf.compat.v1.get_default_graph())


# %% [markdown]
# Above are the checks of its arguments. The class itself comes in parts, one idea each, each built on the one before,
# the first on the seams of section 4; what a user holds is the last, `MaskedGaussian`, and at a first reading that will
# do. What a part uses and does not set (`_masks`, `_touched`, the arguments) the last one's `__init__` sets.
#
# The first part reads the locs of the Bayesian entries, and makes dense arrays to look at.


# %%
class _Entries(_Seams):
    """The Bayesian entries of a stock layer's weights: their locs, of shape (k,), and dense arrays to look at."""

    # Of the last part:
    num_bayesian: dict[str, int]
    prior_at_loc: bool
    kl_weight: Any
    # Of the stock layer behind the mixin:
    name: str
    built: bool
    add_weight: Any
    _tracker: Any
    _untrack_variable: Any

    def mask(self, name: str) -> np.ndarray:
        """Dense boolean mask of weight `name`: True where it is Bayesian. For reading and plotting."""
        return self._dense(name, True, bool)

    def _bayesian_names(self):
        return [n for n in self.posterior_weights if self.num_bayesian.get(n, 0) > 0]

    def _by_weight(self, value, argument):
        if value is None or isinstance(value, dict):
            unknown = set(value or {}) - set(self.posterior_weights)
            if unknown:
                raise ValueError(
                    f"Expected {argument} for weights among {self.posterior_weights} of layer '{self.name}'. "
                    f"Received: {sorted(unknown)}"
                )
            return value
        return {self.posterior_weights[0]: value}

    def _loc(self, name):
        variable = getattr(self, name)
        if variable is None:
            raise ValueError(f"Layer '{self.name}' has no weight `{name}` (use_bias=False?). Leave it out of the mask.")
        return variable

    def _dense(self, name, values, dtype):
        shape = tuple(self._loc(name).shape)
        dense = np.zeros(int(np.prod(shape)), dtype)
        if name in self._bayesian_names():
            index = getattr(self, f"{name}_posterior_index", None)
            dense[slice(None) if index is None else ops.convert_to_numpy(index)] = values
        return dense.reshape(shape)

    def _masked_loc(self, name):
        flat = ops.reshape(ops.convert_to_tensor(self._loc(name)), (-1,))
        index = getattr(self, f"{name}_posterior_index", None)
        flat = flat if index is None else ops.take(flat, ops.convert_to_tensor(index), axis=0)
        return ops.cast(flat, self._posterior_dtype())

    def _posterior_dtype(self):
        return "float64" if self.variable_dtype == "float64" else "float32"


# %% [markdown]
# An *index* holds the positions of a weight's Bayesian entries in its flattened array. From it follows which channels
# a draw touches, which matters for what several draws at once cost (`sbn_tf.core.draws`).


# %%
class _Index(_Entries):
    """The positions of the Bayesian entries, and the channels that they touch."""

    def refresh_touched(self) -> None:
        """Count anew the channels that the masks touch, which `batch_draws` must know when a call is traced.

        Every assignment to an index counts them, those of `set_weights` and `load_weights` too. After one that goes
        around the Keras variable, as a `tf.train.Checkpoint` does, call this, then compile the model again.
        """
        for name in self._bayesian_names():
            self._count_touched(name, getattr(self, f"{name}_posterior_index", None))

    def _add_index(self, name, chosen):
        self._touched.value[name] = touched_channels(self, name, chosen)
        index = self.add_weight(
            name=f"{name}_posterior_index",
            shape=(len(chosen),),
            dtype="int64" if keras.backend.backend() == "tensorflow" else "int32",  # JAX has no int64
            initializer=lambda shape, dtype: ops.convert_to_tensor(chosen, dtype=dtype),
            trainable=False,
            autocast=False,
        )
        index.assign = self._counting(name, index)
        setattr(self, f"{name}_posterior_index", index)

    def _count_touched(self, name, index):
        if index is not None:
            self._touched.value[name] = touched_channels(self, name, ops.convert_to_numpy(index))

    def _counting(self, name, index):
        """An index's `assign`, after which its touched channels are counted anew wherever its value can be read."""
        assign = index.assign

        def assign_and_count(value):
            result = assign(value)
            is_current = getattr(self, f"{name}_posterior_index", None) is index  # set_mask makes a new one
            if is_current and _graph() is None and not in_stateless_scope():
                self._count_touched(name, index)  # no other: JAX's `fit` empties all variables, and then fills each
            return result

        return assign_and_count


# %% [markdown]
# Each weight with Bayesian entries gets up to three variables of its own: `index` (none where all entries are
# Bayesian), `untransformed_scale` and, with `prior_at_loc`, the prior's centres.


# %%
class _Variables(_Index):
    """The variables of a posterior: made, read and listed."""

    def scale(self, name: str) -> np.ndarray:
        """Dense posterior standard deviation of weight `name`: 0 where it is a point. For reading and plotting."""
        bayesian = name in self._bayesian_names()
        values = ops.convert_to_numpy(self._masked_scale(name)) if bayesian else 0.0
        return self._dense(name, values, self._posterior_dtype())

    def _add_scale(self, name, k):
        scale = self.add_weight(
            name=f"{name}_posterior_untransformed_scale",
            shape=(k,),
            dtype=self._posterior_dtype(),
            initializer=self._scale_initializer(name),
            regularizer=_KL(self, name),
            autocast=False,
        )
        setattr(self, f"{name}_posterior_untransformed_scale", scale)

    def _add_centre(self, name, k):
        centre = self.add_weight(
            name=f"{name}_posterior_prior_loc",
            shape=(k,),
            dtype=self._posterior_dtype(),
            initializer=lambda shape, dtype: self._masked_loc(name),
            trainable=False,
            autocast=False,
        )
        setattr(self, f"{name}_posterior_prior_loc", centre)

    def _masked_scale(self, name):
        return ops.softplus(ops.convert_to_tensor(getattr(self, f"{name}_posterior_untransformed_scale")))

    def _from_centre(self, name):
        """The Bayesian entries' locs as the prior sees them: less the prior's centres, where it has any."""
        loc = self._masked_loc(name)
        return loc - getattr(self, f"{name}_posterior_prior_loc") if self.prior_at_loc else loc

    def _scale_initializer(self, name):
        """Initializer of one weight's untransformed scales. Keras's seeded ones repeat, so each weight has its seed."""
        if self.untransformed_scale_initializer is None:
            return keras.initializers.Constant(softplus_inverse(self.initial_scale))
        config = self.untransformed_scale_initializer.get_config()
        if isinstance(config.get("seed"), int):
            where = zlib.crc32(f"{self.name}/{name}".encode())
            own = [config["seed"], self.seed or 0, where]
            config["seed"] = int(np.random.default_rng(own).integers(2**31))
        return type(self.untransformed_scale_initializer).from_config(config)

    def _posterior_variables(self):
        names = [f"{n}_posterior_{s}" for n in self._bayesian_names() for s in _POSTERIOR]
        return {n: getattr(self, n) for n in names if getattr(self, n, None) is not None}

    def _stock_variables(self):
        ours = {id(v) for v in self._posterior_variables().values()}
        return [v for v in self._trainable_variables + self._non_trainable_variables if id(v) not in ours]


# %% [markdown]
# Under which names are they saved? A stock layer numbers its variables in a file, and so does this one; the posterior's
# have names. So a trained stock checkpoint loads as it is: its weights become the locs. What Keras offers for trained
# layers and a posterior does not allow, LoRA and quantisation, is refused.


# %%
_AS_SAVED = "Build it with the num_bayesian and prior_at_loc that it had when it was saved."


class _Saved(_Variables):
    """Saving and loading, and what Keras may do with a trained layer that a posterior does not allow."""

    def save_own_variables(self, store):
        """Stock variables under the stock layer's numbers, the posterior under its names."""
        for i, variable in enumerate(self._stock_variables()):
            store[str(i)] = variable
        for name, variable in self._posterior_variables().items():
            store[name] = variable

    def load_own_variables(self, store):
        """Load own variables, or a stock layer's (a trained checkpoint): those become the locs."""
        keys, stock, posterior = set(store.keys()), self._stock_variables(), self._posterior_variables()
        numbers = {str(i) for i in range(len(stock))}
        missing, extra = numbers - keys, {k for k in keys if k not in numbers and k not in posterior}
        if missing or extra or (keys - numbers and set(posterior) - keys):
            raise ValueError(
                f"Layer '{self.name}' expected {len(stock)} stock variables and posterior {sorted(posterior)}. "
                f"Received: {sorted(keys)}. {_AS_SAVED}"
            )
        for i, variable in enumerate(stock):
            variable.assign(store[str(i)])
        for name in keys - numbers:
            if tuple(store[name].shape) != tuple(posterior[name].shape):
                raise ValueError(
                    f"Layer '{self.name}' expected {name} of shape {tuple(posterior[name].shape)}. "
                    f"Received: {tuple(store[name].shape)}. {_AS_SAVED}"
                )
            posterior[name].assign(store[name])
        if self.built and not keys - numbers:
            self.centre_prior()

    def enable_lora(self, *args, **kwargs):
        """Refused with Bayesian entries: a layer holds a posterior or LoRA factors, not both."""
        if self._bayesian_names():
            raise ValueError(f"Layer '{self.name}' is Bayesian: LoRA cannot be enabled on it.")
        super().enable_lora(*args, **kwargs)

    def quantize(self, *args, **kwargs):
        """Refused with Bayesian entries: a posterior needs its floating-point loc."""
        if self._bayesian_names():
            raise ValueError(f"Layer '{self.name}' is Bayesian: it cannot be quantized. Quantize the trained network.")
        super().quantize(*args, **kwargs)


# %% [markdown]
# Who says which entries are Bayesian? A mask that is given, or `num_bayesian` of them at random; `set_mask` chooses
# again later.


# %%
class _Choice(_Saved):
    """Which entries are Bayesian: at `build`, and later."""

    def set_mask(self, mask) -> None:
        """Choose anew which entries are Bayesian; scales start again. Compile the model again after it.

        Args:
            mask: boolean array of the first weight's shape, or a dict of such arrays; weights left out become points.
        """
        if not self.built:
            raise ValueError(f"Build layer '{self.name}' before set_mask (call it once, or pass mask= to it).")
        masks = self._by_weight(mask, "mask")
        self._check_masks(masks)
        first = not any(self.num_bayesian.values())
        if first and any(np.any(m) for m in masks.values()) and float(ops.convert_to_numpy(self.kl_weight)) == 0.0:
            raise ValueError(
                f"Layer '{self.name}' becomes Bayesian with a kl_weight of 0, which charges no KL. Set "
                "layer.kl_weight = 1/num_train first."
            )
        self._tracker.unlock()
        for name in self._bayesian_names():
            for suffix in _POSTERIOR:
                variable = getattr(self, f"{name}_posterior_{suffix}", None)
                if variable is not None:
                    self._untrack_variable(variable)
                    setattr(self, f"{name}_posterior_{suffix}", None)
        self.num_bayesian = {k: int(np.sum(v)) for k, v in masks.items()}
        self._build_posterior(masks)
        self._tracker.lock()

    def _build_posterior(self, masks):
        """Make the variables of every weight that has Bayesian entries: at those of `masks`, or at random ones."""
        if masks:
            self._check_masks(masks)
        random = np.random.default_rng(self.seed)
        for name in self._bayesian_names():
            size, k = int(np.prod(self._loc(name).shape)), self.num_bayesian[name]
            if k > size:
                raise ValueError(
                    f"Expected at most {size} Bayesian entries in `{name}` of layer '{self.name}'. Received: {k}"
                )
            self._touched.value.pop(name, None)
            if k < size:
                chosen = np.flatnonzero(masks[name]) if masks else np.sort(random.choice(size, k, replace=False))
                self._add_index(name, chosen)
            self._add_scale(name, k)
            if self.prior_at_loc:
                self._add_centre(name, k)
        if self._bayesian_names() and not hasattr(self, "_noise_seed"):
            self._noise_seed = keras.random.SeedGenerator(self.seed)
        self._masks.value = None

    def _check_masks(self, masks):
        for name, mask in masks.items():
            mask, shape = np.asarray(mask), tuple(self._loc(name).shape)
            if mask.dtype != bool or mask.shape != shape:
                raise ValueError(
                    f"Expected a boolean mask of shape {shape} for `{name}` of layer '{self.name}'. "
                    f"Received: {mask.dtype} of shape {mask.shape}"
                )


# %% [markdown]
# The noise: (k,) numbers times the scales, scattered into a tensor of the weight's shape and added to the locs. A draw
# is new at each call, unless something keeps it: `posterior_sample` (section 4), or `batch_draws`, by whose estimators
# one pass holds several draws (`_batch_draws`; flipout's random signs: `_signs`).


# %%
class _Noise(_Choice):
    """Draws of the weights."""

    def _kept_draw(self, name):
        """This call's draw: a new one, or under `posterior_sample` the one that is kept."""
        kept = _kept.get()
        if kept is None:
            return self._draw(name)
        key = (id(self), name, _graph())  # a tensor made within a traced loop is unknown outside it
        if key not in kept:
            kept[key] = self._draw(name)
        return kept[key]

    def _draw(self, name):
        return self._drawn({name: self._noise(name)})[name]

    def _noise(self, name):
        """New noise of the Bayesian entries, scaled: (k,)."""
        return self._masked_scale(name) * self._normal(self.num_bayesian[name])

    def _normal(self, size):
        return standard_normal(size, self._noise_seed, self._posterior_dtype())

    def _drawn(self, noise, *names):
        """Dense draws of the weights `names` (default: all) from their noise (name -> (k,))."""
        return {n: ops.convert_to_tensor(self._loc(n)) + self._delta(n, noise[n]) for n in names or noise}

    def _delta(self, name, values, dtype=None):
        """`values` (k,) at the Bayesian entries of a tensor shaped as weight `name`, 0 elsewhere."""
        loc = self._loc(name)
        index = getattr(self, f"{name}_posterior_index", None)
        index = index if index is None else ops.convert_to_tensor(index)
        dtype = dtype or ops.convert_to_tensor(loc).dtype  # the layer's compute dtype, within its call
        return scatter_entries(ops.cast(values, dtype), index, tuple(loc.shape))

    def _batch_draws(self, batch, num_samples):
        """Noise (name -> (k,)) of each sample, kept in `batch`: in the order in which separate calls would draw it."""
        names = self._bayesian_names()
        key = (id(self), num_samples, _graph())
        return batch.keep(key, lambda: [{name: self._noise(name) for name in names} for _ in range(num_samples)])

    def _signs(self, batch, place, tensor, axes):
        """Random signs of each example along `axes`, kept in `batch`: 1 along every other axis of `tensor`.

        Kept without those other axes: the next use may have more of them, or none.
        """
        rank, shape = len(tensor.shape), ops.shape(tensor)
        along = {0, *(axis % rank for axis in axes)}
        kept = [size for i, size in enumerate(shape) if i in along]
        signs = batch.keep((id(self), place, _graph()), lambda: ops.where(self._normal(kept) < 0, -1.0, 1.0))
        return ops.cast(ops.reshape(signs, [size if i in along else 1 for i, size in enumerate(shape)]), tensor.dtype)


# %% [markdown]
# And the layer itself, in the order of a Keras layer (`__init__`, `build`, `call`, `get_config`), then the KL and its
# parts (`mask`, `scale` and `set_mask` are above). Look at `Args`, `call` and `kl_divergence`: `call` is the stock
# layer's own, with drawn weights in place of the locs.


# %%
class MaskedGaussian(_Noise):
    """Mixin: a stock Keras layer of which chosen weight entries are Gaussian, the rest points.

    `kernel = loc + softplus(untransformed_scale) * eps` at the masked entries; `eps ~ N(0, 1)` is new at each call.

    Args:
        num_bayesian: how many entries are Bayesian, chosen at random: an int (of the first of `posterior_weights`)
            or a dict such as `{"kernel": 10, "bias": 2}`. 0: the stock layer.
        mask: which entries are Bayesian instead: a boolean array (of the first weight) or a dict of such arrays.
        initial_scale: standard deviation at which each posterior starts, in the weight's unit. > 0.
        untransformed_scale_initializer: a Keras initializer for the untransformed scales instead; a seeded one draws
            anew for each weight.
        prior: None for N(0, 1), or a scalar `tfd` distribution with a registered KL from a normal: in TFP 0.25 these
            are `tfd.Normal`s of any loc and scale.
        prior_at_loc: the prior lies around each Bayesian entry's own value instead of around 0: it is of the distance
            from the loc that the entry had when it became Bayesian, or at the last `centre_prior()`. `to_partial_bayes`
            and a stock layer's checkpoint centre it at the trained weights. Costs one stored number an entry.
        kl_weight: factor of the KL in the loss, >= 0. A number is fixed when the model is compiled; to change it
            later, pass a `keras.Variable`. Required where any entry is Bayesian: 1 / num_train for a loss averaged
            over images. A frozen scale (`trainable=False`) charges no KL, as with every Keras regularizer.
        kl_reduction: "sum" over the entries of a weight (the ELBO), or "mean" (the paper's code).
        seed: int; fixes the mask chosen at random and the noise.

    A stock layer's `kernel_regularizer` acts on the loc, and so does its `kernel_constraint`, after each step: a draw
    may leave the constraint's set. An `activity_regularizer` sees the outputs of the draw.

    Raises:
        ValueError: a count, mask, scale, reduction or `kl_weight` that does not fit, or a missing `kl_weight`.

    Reference: Abboud, Lombaert, Kadoury (2024), section 2.3; Blundell et al. (2015), equations 3 and 8.
    """

    def __init__(
        self,
        *args,
        num_bayesian: int | Mapping[str, int] = 0,
        mask=None,
        initial_scale: float = 0.01,
        untransformed_scale_initializer=None,
        prior=None,
        prior_at_loc: bool = False,
        kl_weight=None,
        kl_reduction: str = "sum",
        seed: int | None = None,
        **kwargs,
    ):
        super().__init__(*args, **kwargs)
        self._masks = _Box(self._by_weight(mask, "mask"))
        counts = self._by_weight(num_bayesian, "num_bayesian") or {}
        _check_counts(counts, num_bayesian)
        self.num_bayesian = {k: int(v) for k, v in counts.items()}
        self._touched = _Box({})  # weight -> how many indices of its last two axes hold Bayesian entries
        if self._masks.value:
            if any(self.num_bayesian.values()):
                raise ValueError(f"Expected num_bayesian or mask. Received: both, num_bayesian={num_bayesian}")
            self.num_bayesian = {k: int(np.sum(v)) for k, v in self._masks.value.items()}
        _check_scale(initial_scale, self._posterior_dtype())
        _check_options(kl_reduction, prior_at_loc)
        if kl_weight is None and any(self.num_bayesian.values()):
            raise ValueError(
                f"Layer '{self.name}' has Bayesian entries and no kl_weight. Pass kl_weight=1/num_train (a loss that "
                "averages over images) or 1/(num_train * pixels) (one that averages over pixels as well)."
            )
        self.initial_scale = float(initial_scale)
        self.untransformed_scale_initializer = keras.initializers.get(untransformed_scale_initializer)
        self.prior = prior_config(prior)
        self.prior_at_loc = bool(prior_at_loc)
        self._kl_weight = _Box(None)
        self.kl_weight = 0.0 if kl_weight is None else kl_weight  # type: ignore[misc]  # see __setattr__
        self.kl_reduction = kl_reduction
        self.seed = seed

    def build(self, input_shape=None):
        """Build the stock layer, then the posterior of its masked entries."""
        if self.built:
            return
        super().build(input_shape)
        self._build_posterior(self._masks.value)

    def call(self, inputs):
        """The stock layer's `call` with one new draw of the masked entries."""
        names = [] if _at_mean.get() else self._bayesian_names()
        if not names:
            return super().call(inputs)
        if _batch.get() is not None:
            return call_in_batch(self, inputs, _batch.get(), self._call_with)
        return self._call_with(inputs, {name: self._kept_draw(name) for name in names})

    def _call_with(self, inputs, drawn):
        """The stock layer's `call` with the weights `drawn` (name -> tensor)."""
        token = _draws.set({**_draws.get(), **{(id(self), name): value for name, value in drawn.items()}})
        try:
            return super().call(inputs)
        finally:
            _draws.reset(token)

    def get_config(self):
        """The stock layer's config and the posterior's; the mask itself is saved among the weights."""
        initializer = self.untransformed_scale_initializer
        return {
            **super().get_config(),
            "num_bayesian": dict(self.num_bayesian),
            "initial_scale": self.initial_scale,
            "untransformed_scale_initializer": initializer and keras.initializers.serialize(initializer),
            "prior": {"class_name": self.prior["class_name"], "config": dict(self.prior["config"])},
            "prior_at_loc": self.prior_at_loc,
            "kl_weight": float(ops.convert_to_numpy(self.kl_weight)),
            "kl_reduction": self.kl_reduction,
            "seed": self.seed,
        }

    @property
    def kl_weight(self):
        """Factor of the KL in the loss, a number or a `keras.Variable`."""
        return self._kl_weight.value

    def __setattr__(self, name, value):
        if name == "kl_weight":  # another object's variable: out of sight of Keras's tracking
            if not isinstance(value, keras.Variable):
                _check_kl_weight(value)
            self._kl_weight.value = value
        else:
            super().__setattr__(name, value)

    @property
    def posterior(self) -> dict:
        """`tfd.Normal` over the (k,) Bayesian entries of each weight that has any."""
        _check_tfp("posterior")
        return {n: tfd.Normal(self._masked_loc(n), self._masked_scale(n)) for n in self._bayesian_names()}

    @property
    def prior_distribution(self):
        """The `tfd` prior of every Bayesian entry; with `prior_at_loc`, of its distance from where it started."""
        return make_prior(self.prior)

    def kl_divergence(self):
        """Summed KL of this layer's posterior from its prior, in nats: a scalar; 0 with no Bayesian entry."""
        terms = [kl_normal(self._from_centre(n), self._masked_scale(n), self.prior) for n in self._bayesian_names()]
        return sum((ops.sum(t) for t in terms), ops.zeros((), self._posterior_dtype()))

    def centre_prior(self) -> None:
        """With `prior_at_loc`: put the prior of every Bayesian entry around its loc of now. Else nothing."""
        for name in self._bayesian_names() if self.prior_at_loc else ():
            getattr(self, f"{name}_posterior_prior_loc").assign(self._masked_loc(name))


# %% [markdown]
# ## 6. Which layers are there?
#
# Each is its stock layer with the mixin in front: same arguments, same `call`, same config, plus the posterior's.


# %%
_PARTIAL: dict[type, type] = {}  # stock or masked class: the masked class that stands for it


def register(cls: type[MaskedGaussian]) -> type[MaskedGaussian]:
    """Class decorator: conversion takes this masked class for its stock class, which need not be one of Keras.

    Args:
        cls: derived from `MaskedGaussian` and then from the stock class, with the names of its `posterior_weights`.
            To be saved in a file it has to be registered with Keras as well, as every class of one's own.

    Raises:
        ValueError: a class that is not derived so, or one that names no weight; a stock class of one's own whose `call`
            takes more than `inputs`; a stock class for which another one stands.
    """
    derived = isinstance(cls, type) and issubclass(cls, MaskedGaussian) and cls is not MaskedGaussian
    if not derived or not issubclass(cls._stock(), keras.layers.Layer) or not cls.posterior_weights:
        raise ValueError(
            "Expected a class Mine(MaskedGaussian, TheStockLayer) with posterior_weights, the names of its weights. "
            f"Received: {cls!r}"
        )
    stock = cls._stock()
    taken = list(inspect.signature(stock.call).parameters)[1:]
    if len(taken) != 1 and not stock.__module__.startswith("keras."):  # of Keras's, those for quantized training
        raise ValueError(
            f"Expected a stock layer with call(self, inputs). Received: {stock.__name__}.call with {taken}. It needs "
            "no masked class: conversion wraps it, and hands every argument on."
        )
    known = _PARTIAL.get(stock, cls)
    if (known.__module__, known.__qualname__) != (cls.__module__, cls.__qualname__):  # the same: a cell that ran twice
        raise ValueError(
            f"Expected a stock class without a masked one. Received: {stock.__name__}, which has {known!r}."
        )
    _PARTIAL[stock] = _PARTIAL[cls] = cls
    return cls


def _register(cls):
    cls.__doc__ = (
        f"`keras.layers.{cls.__name__}` with masked Gaussian entries in {', '.join(cls.posterior_weights)}.\n\n"
        f"    Args, input and output shapes as in `keras.layers.{cls.__name__}`; the keyword arguments of\n"
        "    `MaskedGaussian` say which entries are Bayesian, where their scales start, their prior and KL weight.\n"
    )
    return keras.saving.register_keras_serializable(package="sbn_tf")(register(cls))


@_register
class Dense(MaskedGaussian, keras.layers.Dense):  # noqa: D101
    posterior_weights = ("kernel", "bias")


@_register
class EinsumDense(MaskedGaussian, keras.layers.EinsumDense):  # noqa: D101
    posterior_weights = ("kernel", "bias")


@_register
class Embedding(MaskedGaussian, keras.layers.Embedding):  # noqa: D101
    posterior_weights = ("embeddings",)


# %% [markdown]
# The convolutions, plain and transposed.


# %%
@_register
class Conv1D(MaskedGaussian, keras.layers.Conv1D):  # noqa: D101
    posterior_weights = ("kernel", "bias")


@_register
class Conv2D(MaskedGaussian, keras.layers.Conv2D):  # noqa: D101
    posterior_weights = ("kernel", "bias")


@_register
class Conv3D(MaskedGaussian, keras.layers.Conv3D):  # noqa: D101
    posterior_weights = ("kernel", "bias")


@_register
class Conv1DTranspose(MaskedGaussian, keras.layers.Conv1DTranspose):  # noqa: D101
    posterior_weights = ("kernel", "bias")


@_register
class Conv2DTranspose(MaskedGaussian, keras.layers.Conv2DTranspose):  # noqa: D101
    posterior_weights = ("kernel", "bias")


@_register
class Conv3DTranspose(MaskedGaussian, keras.layers.Conv3DTranspose):  # noqa: D101
    posterior_weights = ("kernel", "bias")


# %% [markdown]
# Depthwise and separable ones. A separable layer has two kernels, and each may have Bayesian entries.


# %%
@_register
class DepthwiseConv1D(MaskedGaussian, keras.layers.DepthwiseConv1D):  # noqa: D101
    posterior_weights = ("kernel", "bias")


@_register
class DepthwiseConv2D(MaskedGaussian, keras.layers.DepthwiseConv2D):  # noqa: D101
    posterior_weights = ("kernel", "bias")


@_register
class SeparableConv1D(MaskedGaussian, keras.layers.SeparableConv1D):  # noqa: D101
    posterior_weights = ("depthwise_kernel", "pointwise_kernel", "bias")


@_register
class SeparableConv2D(MaskedGaussian, keras.layers.SeparableConv2D):  # noqa: D101
    posterior_weights = ("depthwise_kernel", "pointwise_kernel", "bias")


# %% [markdown]
# Two look-ups for those who convert whole networks: the class that stands for a stock layer, and the masked layers that
# a model holds.


# %%
def partial_class(layer: keras.layers.Layer | type) -> type | None:
    """The masked class that stands for a stock or masked layer (or for its class); None if there is none."""
    return _PARTIAL.get(layer if isinstance(layer, type) else type(layer))


def masked_layers(model: keras.layers.Layer) -> list:
    """All layers of a model, nested ones too, that have Bayesian entries; each once."""
    found = [model, *model._flatten_layers(include_self=False, recursive=True)]
    unique = {id(x): x for x in found if isinstance(x, MaskedGaussian) and any(x.num_bayesian.values())}
    return list(unique.values())


# %% [markdown]
# ## 7. Is it right?
#
# ### With no Bayesian entry, is it the stock layer?
#
# The oracle is Keras itself. The same weights give the same outputs, to the last bit.

# %% tags=["active-ipynb"]
# keras.utils.set_random_seed(0)
# x = np.random.normal(size=(5, 4)).astype("float32")
# stock, layer = keras.layers.Dense(3), Dense(3, num_bayesian=0)
# stock.build(x.shape)
# layer.build(x.shape)
# layer.set_weights(stock.get_weights())
# print("equal to keras.layers.Dense:", bool(np.array_equal(layer(x), stock(x))))
# assert np.array_equal(layer(x), stock(x)) and not layer.losses

# %% [markdown]
# ### With some, are mean and variance right?
#
# A Dense output is linear in its weights, so its mean is $x^\top \mu$ and its variance $\sum_i x_i^2 \sigma_i^2$, the
# sum over the masked entries of its column.
#
# By hand: inputs $[1, 2]$, both entries masked, $\sigma = 0.1$: variance $1 \cdot 0.01 + 4 \cdot 0.01 = 0.05$.

# %% tags=["active-ipynb"]
# x, draws = np.float32([[1.0, 2.0]]), 2000
# layer = Dense(1, num_bayesian=2, initial_scale=0.1, kl_weight=0.0, seed=0)
# layer.build(x.shape)
# mean = (x @ ops.convert_to_numpy(layer.kernel)).item()
# variance = (x**2 @ layer.kernel_posterior_scale**2).item()
# outputs = np.array([float(layer(x)[0, 0]) for _ in range(draws)])
# print(f"variance {outputs.var():.2f} of {draws} draws, {variance:.2f} by the closed form")
# assert np.isclose(variance, 0.05)
# assert abs(outputs.mean() - mean) < 4 * np.sqrt(variance / draws)  # four standard errors
# assert abs(outputs.var() - variance) < 4 * variance * np.sqrt(2 / draws)

# %% [markdown]
# The same for one entry of the kernel: its draws against its normal density. `_draw` is what `call` uses inside.

# %% tags=["active-ipynb", "nbval-ignore-output"]
# import matplotlib.pyplot as plt
#
# entry = np.array([ops.convert_to_numpy(layer._draw("kernel"))[0, 0] for _ in range(draws)])
# loc, scale = float(layer.kernel[0, 0]), float(layer.kernel_posterior_scale[0, 0])
# grid = np.linspace(loc - 4 * scale, loc + 4 * scale, 200)
# figure, axes = plt.subplots(figsize=(5, 2.6), layout="constrained")
# axes.hist(entry, bins=50, density=True, color="0.75", label=f"{draws} draws")
# axes.plot(grid, np.exp(-0.5 * ((grid - loc) / scale) ** 2) / (scale * np.sqrt(2 * np.pi)), label="normal density")
# axes.set(xlabel="weight", ylabel="density", title="Draws of one entry follow N(loc, scale²)")
# axes.legend(frameon=False)
# plt.show()

# %% [markdown]
# *Reading*: the grey bars follow the curve: centred at the trained weight, with a standard deviation of 0.1.

# %% [markdown]
# ### What does a wrong call say?
#
# The KL's weight has no default, since a guess that is wrong by the number of pixels ruins training without a word.

# %% tags=["active-ipynb"]
# try:
#     Dense(3, num_bayesian=2, name="head")
# except ValueError as error:
#     print(error)

# %% [markdown]
# ## 8. How does it go into your own model?
#
# A masked layer goes where its stock layer went; `compile` and `fit` stay as they are. (From outside this lesson:
# `from sbn_tf.layers import Dense`.) The task: does $x_0 x_1 > 0$ hold?
# The bias is among the Bayesian entries, so every input sees noise, even one for which all eight hidden units are off.

# %% tags=["active-ipynb"]
# keras.utils.set_random_seed(0)
# x = np.random.normal(size=(256, 2)).astype("float32")
# y, num_train = (x[:, :1] * x[:, 1:] > 0).astype("float32"), len(x)
# model = keras.Sequential([
#     keras.layers.Dense(32, activation="relu"),
#     Dense(1, num_bayesian={"kernel": 8, "bias": 1}, initial_scale=0.3, kl_weight=1 / num_train),
# ])
# model.compile(keras.optimizers.Adam(0.02), keras.losses.BinaryCrossentropy(from_logits=True))
# history = model.fit(x, y, epochs=20, verbose=0)
# print("the loss fell:", history.history["loss"][-1] < history.history["loss"][0])

# %% [markdown]
# Each call is one draw of the network, and so is `model.predict`: call it a few times, and the mean of the
# probabilities is the prediction, their spread says how sure it is. (The lesson on partial Bayes has a model that does
# this for you.) `posterior_mean()` gives the answer of the trained weights themselves.

# %% tags=["active-ipynb"]
# logits = np.stack([model(x) for _ in range(20)])  # (samples, batch, 1)
# with posterior_mean():
#     first, second = model(x), model(x)
# print("draws:", logits.shape, " all inputs vary:", bool((logits.std(0) > 0).all()))
# print("at the posterior mean two calls agree:", bool(np.array_equal(first, second)))
# print("masked layers:", len(masked_layers(model)), " entries:", dict(masked_layers(model)[0].num_bayesian))
# assert (logits.std(0) > 0).all() and np.array_equal(first, second)

# %% [markdown]
# ## Summary
#
# - A masked weight is its stock variable (the loc) with `k` positions and `k` scales beside it; the rest stays a point.
# - Each call draws once, each *network* once within `posterior_sample()`; outside `call`, and in every saved file, the
#   weight is its loc.
# - The KL of the `k` entries enters the loss once a step, times `kl_weight`, which you must give.
# - With no Bayesian entry each layer is its stock Keras layer, bit for bit; with all of them it needs no index.
#
# ## Exercises
#
# 1. A network segments images of 64 x 64 pixels, with 1,000 of them to train on; its loss is a mean over pixels. Which
#    `kl_weight` gives the ELBO?
#
#    <details><summary>Answer</summary>
#
#    $1 / (1000 \cdot 4096) \approx 2.4 \cdot 10^{-7}$.
#    </details>
# 2. A kernel of a million weights has ten Bayesian entries. How many numbers does the layer hold more than its stock
#    layer, and how many of them are trained?
#
#    <details><summary>Answer</summary>
#
#    Twenty: ten positions and ten untransformed scales. The ten scales are trained.
#    </details>
# 3. A posterior has its loc at 0.5 and the prior is $\mathcal{N}(0, 1)$. Which scale has the least KL, and how many
#    nats are left?
#
#    <details><summary>Answer</summary>
#
#    The derivative $\sigma - 1/\sigma$ is zero at $\sigma = 1$; what is left is $\tfrac12 \mu^2 = 0.125$ nats.
#    </details>
# 4. Suppose `layer.kernel` were a new draw wherever it is read. What would `model.save` write?
#
#    <details><summary>Answer</summary>
#
#    A random draw in place of the trained weight, without an error: Keras's saving reads `kernel` too. That is why
#    section 4 draws inside `call` alone.
#    </details>
#
# ## References
#
# - Abboud, Lombaert, Kadoury (2024). *Sparse Bayesian Networks: Efficient Uncertainty Quantification in Medical Image
#   Analysis*. MICCAI.
# - Blundell, Cornebise, Kavukcuoglu, Wierstra (2015). *Weight Uncertainty in Neural Networks*. ICML. arXiv:1505.05424.
# - Kingma, Welling (2014). *Auto-Encoding Variational Bayes*. ICLR. arXiv:1312.6114.
