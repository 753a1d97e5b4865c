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
# # Layers: a weight in which only some entries are random
#
# **A masked weight keeps its trained value as `loc` and gives a distribution to only `k` of its entries; new
# parameters, optimiser slots, noise and KL grow with `k`, not with the size `n` of the weight.**
#
# - *You will see*: the sparse posterior of one weight, the reparameterization trick, the KL term and its scale, and
#   Dense, Conv, Embedding and other stock Keras layers with such weights.
# - *Words*: an entry with a distribution is *Bayesian*, one that stays a number is a *point*; `r_bayes` is the share of
#   Bayesian entries among the eligible ones of a network (trainable, outside normalisation). *Nats* are units of
#   entropy and KL with the natural logarithm: 1 bit is 0.69. More words: [glossary](../../docs/glossary.md).
# - *You need*: Keras layers, the normal distribution.
# - *Runs in*: 30 seconds (CPU).

# %%
"""Masked variational layers: stock Keras layers in which chosen weight entries are random.

`kernel = loc + softplus(untransformed_scale) * eps` at the masked entries, `kernel = loc` elsewhere.
"""

from __future__ import annotations

import inspect
import zlib

import sbn_tf  # noqa: F401 (first: it silences TensorFlow's log)
import keras
import numpy as np
from keras import ops

from sbn_tf.core.context import (
    batch_draws,
    current_batch,
    drawn_weight,
    is_at_mean,
    once,
    posterior_mean,
    posterior_sample,
    weights_drawn,
)
from sbn_tf.core.draws import call_in_batch
from sbn_tf.core.keras_internals import all_layers, set_part
from sbn_tf.core.posterior import (
    OPTION_NAMES,
    POSTERIORS,
    KLRegularizer,
    Posterior,
    PosteriorOptions,
    softplus_inverse,
)
from sbn_tf.core.posteriors import Posteriors, WithPosteriors
from sbn_tf.core.prior import kl_normal, make_normal
from sbn_tf.core.registry import partial_class, register, register_named

# %%
__all__ = [
    "Conv1D", "Conv1DTranspose", "Conv2D", "Conv2DTranspose", "Conv3D", "Conv3DTranspose", "Dense", "DepthwiseConv1D",
    "DepthwiseConv2D", "EinsumDense", "Embedding", "MaskedGaussian", "SeparableConv1D", "SeparableConv2D",
    "batch_draws", "masked_layers", "partial_class", "posterior_mean", "posterior_sample", "register",
]  # fmt: skip

# %% [markdown]
# ## 1. What is stored?
#
# A mask chooses $k$ entries of a trained weight $w \in \mathbb{R}^n$. The paper (Abboud et al. 2024, section 2.3) lets
# $w_i \sim \mathcal{N}(\mu_i, \sigma_i^2)$ at the masked entries and $w_i = \mu_i$ elsewhere, with $\sigma = \log(1 +
# e^{\rho})$. TensorFlow Probability calls $\mu$ `loc`, $\sigma$ `scale` and $\rho$ `untransformed_scale`. A draw is
# computed from $\mu$, $\rho$ and noise that is drawn independently of them. So the loss of a draw has gradients with
# respect to $\mu$ and $\rho$ (the *reparameterization trick*, Kingma and Welling 2014):
#
# $$ w = \mu + \mathrm{scatter}\big(\text{index},\ \mathrm{softplus}(\rho) \odot \epsilon\big),
# \qquad \epsilon \sim \mathcal{N}(0, I_k). $$
#
# The stock variable *is* the loc, so trained checkpoints load unchanged. Beside it live two short vectors of length
# $k$, the positions `index` and the `untransformed_scale`.
#
# By hand: $n = 4$, index $= [2]$, $\mu = [1, 2, 3, 4]$, $\rho = 0$ and $\epsilon = 1$: softplus(0) = 0.693, so the draw
# is $[1, 2, 3.693, 4]$.

# %% tags=["active-ipynb"]
# from sbn_tf.core.posterior import scatter_entries
#
# loc = np.array([1.0, 2.0, 3.0, 4.0], "float32")
# draw = loc + scatter_entries(ops.softplus(ops.zeros(1)) * 1.0, ops.array([2]), (4,))
# print(np.round(draw, 3))
# assert np.allclose(draw, [1, 2, 3 + np.log(2), 4])

# %% [markdown]
# > **Misconception: "the trained number $\rho$ is the standard deviation."** The softplus comes after it: at $\rho = 0$
# > the scale is 0.693, not 0, and a negative $\rho$ is no mistake. `layer.scale(name)` gives the scale.
#
# ## 2. How far is the posterior from the prior?
#
# Fitting the data alone would drive the scale of every weight that matters to 0. So we maximise the *evidence lower
# bound* (ELBO) instead: the expected log-likelihood minus a penalty, the KL (Blundell et al. 2015, equations 1 and 2):
#
# $$ \mathrm{KL}(q \,\|\, p) = \mathbb{E}_{w \sim q} \big[ \log q(w) - \log p(w) \big]. $$
#
# It says how far, in nats, the *posterior* $q$ (our belief after training) has moved from the *prior* $p$ (our belief
# before any data). Scales shrink where that improves the fit more than it costs in KL, and grow elsewhere. The penalty
# covers the masked entries alone: a point has no KL here (the paper, section 2.3). For $q = \mathcal{N}(\mu, \sigma^2)$
# and the default prior $p = \mathcal{N}(0, 1)$ it is $\tfrac12(\mu^2 + \sigma^2 - 1) - \log \sigma$ nats per entry.
#
# By hand: $\mu = 0.5$, $\sigma = 0.1$: $\tfrac12(0.25 + 0.01 - 1) + 2.303 = 1.933$ nats.
#
# The prior N(0, 1) ignores the values that training found: each Bayesian entry costs $\mu^2 / 2$, which pulls its loc
# $\mu$ to 0. `prior_at_loc` moves the prior's centre to the value $m$ that the weight had at the start. The KL is then
# that of $\mathcal{N}(\mu - m, \sigma^2)$ from $\mathcal{N}(0, 1)$. By hand: with $m = \mu$ the term $\mu^2 / 2 =
# 0.125$ is gone, and 1.808 nats are left.

# %% tags=["active-ipynb"]
# by_hand = 0.5 * (0.5**2 + 0.1**2 - 1) - np.log(0.1)
# nats = kl_normal(np.float32([0.5]), np.float32([0.1]))
# print(f"{float(nats[0]):.3f} nats, by hand {by_hand:.3f}")
# around = kl_normal(np.float32([0.5 - 0.5]), np.float32([0.1]))  # a prior around the loc itself
# print(f"{float(nats[0] - around[0]):.3f} nats fewer around the loc")
# assert np.allclose(nats, by_hand, atol=1e-5) and np.allclose(nats - around, 0.5**2 / 2, atol=1e-5)

# %% [markdown]
# ## 3. What is a posterior?
#
# In the code, a posterior is an object for the Bayesian entries of one weight. It makes the variables that they need,
# draws the entries, and computes their KL. `Posterior` (`sbn_tf.core.posterior`) stores the positions and defines the
# interface; the Gaussian one adds the two formulas above. Two more have the same interface: a few trained values per
# entry ("members": draw $s$ takes the $s$-th value of every entry), and a mixture of Gaussians.


# %%
class GaussianPosterior(Posterior):
    """A normal distribution of each entry: `weight = loc + softplus(untransformed_scale) * eps`."""

    is_gaussian = True

    def start(self):
        """Make the untransformed scales: (k,). Their regularizer is the KL."""
        regularizer = KLRegularizer(self)
        self.untransformed_scale = self._add("untransformed_scale", self._first_scales(), regularizer=regularizer)

    def offsets(self, sample, noise):
        """One draw minus the loc: (k,)."""
        return self.scale_of_entries() * noise(self.count)

    def scale_of_entries(self):
        """Standard deviation of each entry: (k,)."""
        return once(self, "scale", lambda: ops.softplus(ops.convert_to_tensor(self.untransformed_scale)))

    def kl_of_entries(self):
        """KL of each entry from the prior in nats: (k,)."""
        return once(self, "kl", lambda: kl_normal(self.from_prior(), self.scale_of_entries(), self.options.prior))

    def centre(self):
        """Compute the prior's centres from the current loc, and the scales too if they are relative to it."""
        super().centre()
        if self.options.relative:
            self.untransformed_scale.assign(softplus_inverse(self._start_scales()))

    @property
    def distribution(self):
        """`tfd.Normal` over the (k,) entries."""
        return make_normal(self.loc(), self.scale_of_entries())

    def _first_scales(self):
        """Initializer of the scales. Each weight gets its own seed, or all would start alike."""
        initializer = self.options.untransformed_scale_initializer
        if initializer is None:
            return lambda shape, dtype: ops.cast(softplus_inverse(self._start_scales()), dtype)
        config = initializer.get_config()
        if isinstance(config.get("seed"), int):
            own = [config["seed"], self.seed or 0, zlib.crc32(self.key.encode())]
            config["seed"] = int(np.random.default_rng(own).integers(2**31))
        return type(initializer).from_config(config)


POSTERIORS["gaussian"] = GaussianPosterior

# %% [markdown]
# `Posteriors` keeps one posterior for each weight of a layer that has Bayesian entries, and the seed of the layer's
# noise: same seed, same draws. Under a distribution strategy each replica draws noise of its own.
#
# ## 4. How does a stock layer get such a weight?
#
# The `call` of a stock layer reads each weight as an attribute, such as `self.kernel`. *Inside* the layer's own `call`
# our property returns this call's draw; *outside* it returns the loc. A draw is a dense tensor of the weight's shape,
# but it lives only within the call. What is stored, drawn and trained in addition grows with `k` alone. So one mixin
# serves all the layers of section 5, and each keeps its stock arguments, dtype policy and config, with ours added. Code
# outside `call` that reads `layer.kernel`, such as Keras's saving, gets the loc and never a random draw.


# %%
def _seam(name: str, stock):
    """Property that returns this call's draw inside the layer's `call`, and the loc outside.

    Most stock layers keep the loc in a plain attribute, which Keras sets in `build`. Where the stock class has a
    property of that name (`kernel` of Dense, `embeddings` of Embedding), that property still returns the loc.
    """
    stored = f"_{name}_loc"

    def read(self):
        drawn = drawn_weight(self, name)
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


# %%
def add_seams(cls):
    """Give a masked class its properties, and a signature with the stock layer's arguments and ours."""
    if not cls.__dict__.get("posterior_weights"):
        return
    stock = cls.stock_class = next(one for one in cls.__mro__ if not issubclass(one, WithPosteriors))
    for name in cls.posterior_weights:
        setattr(cls, name, _seam(name, getattr(stock, name, None)))
    if cls.call is MaskedGaussian.call and "training" in inspect.signature(stock.call).parameters:
        cls.call = call_in_training
    theirs = list(inspect.signature(stock.__init__).parameters.values())[1:]
    ours = [*inspect.signature(MaskedGaussian.__init__).parameters.values()]
    ours = [*ours, *inspect.signature(PosteriorOptions).parameters.values()]
    ours = [p.replace(kind=p.KEYWORD_ONLY) for p in ours if p.name not in ("self", "args", "kwargs")]
    end = [p for p in theirs if p.kind is p.VAR_KEYWORD]
    cls.__signature__ = inspect.Signature([*(p for p in theirs if p not in end), *ours, *end])


# %% [markdown]
# The KL is the *regularizer* of the scale variable: Keras evaluates it once per step however often the layer is called,
# so five samples do not add it five times, and it works in a plain `compile` and `fit`. Its factor `kl_weight` has no
# default: the ELBO needs `1 / num_train` for a loss averaged over images, and `1 / (num_train * pixels)` for a loss
# averaged over pixels.
#
# The mixin follows. Its methods come in the order in which Keras calls them. Look at `call`: it is the stock layer's
# own, with drawn weights.


# %%
class MaskedGaussian(WithPosteriors):
    """Mixin: a stock Keras layer in which chosen weight entries are random, the rest points.

    `weight = loc + scatter(index, offsets)` in `call`; each call draws new offsets from the weight's posterior.

    Args:
        num_bayesian: how many entries are Bayesian, chosen at random: an int (for the first of `posterior_weights`)
            or a dict such as `{"kernel": 10, "bias": 2}`. 0: the stock layer.
        mask: instead of `num_bayesian`, which entries are Bayesian: a boolean array (for the first weight) or a dict
            of such arrays.
        seed: int; fixes the random mask, the initial values and the noise.
        kwargs: the fields of `sbn_tf.core.posterior.PosteriorOptions` (`kl_weight`, which is required if any entry
            is Bayesian, `initial_scale`, `prior`, `posterior`, ...), and the stock layer's arguments.

    Regularizers and constraints of the stock layer act on the loc, an `activity_regularizer` on the draw's outputs.

    Raises:
        ValueError: a count, mask or option that does not fit, or a missing `kl_weight`.

    Reference: Abboud, Lombaert, Kadoury (2024), section 2.3; Blundell et al. (2015), equations 3 and 8.
    """

    posterior_weights: tuple[str, ...] = ()
    stock_class: type | None = None  # `keras.layers.Dense` of `class Dense(MaskedGaussian, keras.layers.Dense)`

    def __init_subclass__(cls, **kwargs):
        super().__init_subclass__(**kwargs)
        add_seams(cls)

    def __init__(self, *args, num_bayesian=0, mask=None, seed: int | None = None, **kwargs):
        options = {name: kwargs.pop(name) for name in OPTION_NAMES if name in kwargs}
        super().__init__(*args, **kwargs)
        self.seed, self.posterior_options = seed, PosteriorOptions(**options)
        dtype = "float64" if self.variable_dtype == "float64" else "float32"
        posteriors = Posteriors(self, num_bayesian, mask, self.posterior_options, seed=seed, dtype=dtype)
        set_part(self, "posteriors", posteriors, counted=False)  # Keras sees it when it has entries
        if self.built:  # some are built in `__init__`, such as `Embedding(weights=...)`
            self.posteriors.make()

    def build(self, input_shape=None):
        """Build the stock layer, then the posteriors of its masked entries."""
        if not self.built:
            super().build(input_shape)
            if hasattr(self, "posteriors"):
                self.posteriors.make()

    def call(self, inputs):
        """The stock layer's `call` with one new draw of the masked entries."""
        batch = None if is_at_mean() or not len(self.posteriors) else current_batch()
        if batch is not None:
            return call_in_batch(self, inputs, batch, self.call_with)
        return self.call_with(inputs, self.posteriors.draws())

    def call_with(self, inputs, drawn: dict):
        """The stock layer's `call` with the weights `drawn` (name -> tensor)."""
        with weights_drawn(self, drawn):
            return super().call(inputs)  # type: ignore[misc]  # the stock layer's

    def loc(self, name: str):
        """The variable of weight `name`."""
        variable = getattr(self, name)
        if variable is None:
            raise ValueError(f"Layer '{self.name}' has no weight `{name}` (use_bias=False?). Leave it out of the mask.")
        return variable

    def get_config(self):
        """The stock layer's config and the posterior's; the mask itself is saved among the weights."""
        own = {"num_bayesian": self.num_bayesian, "seed": self.seed, **self.posterior_options.get_config()}
        return {**super().get_config(), **own}


# %% [markdown]
# Keras's `call` of Dense and EinsumDense has a `training` argument, used in float8 alone; the masked layers accept it.


# %%
def call_in_training(self, inputs, training=None):
    """`MaskedGaussian.call` of a stock layer that takes `training`."""
    return MaskedGaussian.call(self, inputs)


STOCK_CALLS = (MaskedGaussian.call, call_in_training)  # the stock layer's own with drawn weights, and nothing more

# %% [markdown]
# ## 5. Which layers are there?
#
# Each is its stock layer with the mixin in front: same arguments, same `call`, same config, plus the posterior's.


# %%
@register_named
class Dense(MaskedGaussian, keras.layers.Dense):  # noqa: D101
    posterior_weights = ("kernel", "bias")


@register_named
class EinsumDense(MaskedGaussian, keras.layers.EinsumDense):  # noqa: D101
    posterior_weights = ("kernel", "bias")


@register_named
class Embedding(MaskedGaussian, keras.layers.Embedding):  # noqa: D101
    posterior_weights = ("embeddings",)


# %% [markdown]
# The convolutions, plain and transposed.


# %%
@register_named
class Conv1D(MaskedGaussian, keras.layers.Conv1D):  # noqa: D101
    posterior_weights = ("kernel", "bias")


@register_named
class Conv2D(MaskedGaussian, keras.layers.Conv2D):  # noqa: D101
    posterior_weights = ("kernel", "bias")


@register_named
class Conv3D(MaskedGaussian, keras.layers.Conv3D):  # noqa: D101
    posterior_weights = ("kernel", "bias")


@register_named
class Conv1DTranspose(MaskedGaussian, keras.layers.Conv1DTranspose):  # noqa: D101
    posterior_weights = ("kernel", "bias")


@register_named
class Conv2DTranspose(MaskedGaussian, keras.layers.Conv2DTranspose):  # noqa: D101
    posterior_weights = ("kernel", "bias")


@register_named
class Conv3DTranspose(MaskedGaussian, keras.layers.Conv3DTranspose):  # noqa: D101
    posterior_weights = ("kernel", "bias")


# %% [markdown]
# Depthwise and separable convolutions. A separable layer has two kernels, and each may have Bayesian entries.


# %%
@register_named
class DepthwiseConv1D(MaskedGaussian, keras.layers.DepthwiseConv1D):  # noqa: D101
    posterior_weights = ("kernel", "bias")


@register_named
class DepthwiseConv2D(MaskedGaussian, keras.layers.DepthwiseConv2D):  # noqa: D101
    posterior_weights = ("kernel", "bias")


@register_named
class SeparableConv1D(MaskedGaussian, keras.layers.SeparableConv1D):  # noqa: D101
    posterior_weights = ("depthwise_kernel", "pointwise_kernel", "bias")


@register_named
class SeparableConv2D(MaskedGaussian, keras.layers.SeparableConv2D):  # noqa: D101
    posterior_weights = ("depthwise_kernel", "pointwise_kernel", "bias")


# %% [markdown]
# One function finds the masked layers of a whole model, such as a converted one:


# %%
def masked_layers(model: keras.layers.Layer) -> list:
    """All layers of a model, nested ones too, that have Bayesian entries; each once."""
    unique = {id(x): x for x in all_layers(model) if isinstance(x, MaskedGaussian) and any(x.num_bayesian.values())}
    return list(unique.values())


# %% [markdown]
# ## 6. Is it right?
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
# ### With Bayesian entries, are mean and variance right?
#
# Without activation and bias, an output of Dense is linear in its column of the kernel: its mean is $x^\top \mu$, its
# variance $\sum_i x_i^2 \sigma_i^2$ over the masked entries of that column.
#
# By hand: inputs $[1, 2]$, both entries masked, $\sigma = 0.1$: variance $1 \cdot 0.01 + 4 \cdot 0.01 = 0.05$.

# %% tags=["active-ipynb"]
# x, draws = np.float32([[1.0, 2.0]]), 2000
# layer = Dense(1, num_bayesian=2, initial_scale=0.1, kl_weight=0.0, seed=0)
# layer.build(x.shape)
# mean = (x @ ops.convert_to_numpy(layer.kernel)).item()
# variance = (x**2 @ layer.scale("kernel")**2).item()
# outputs = np.array([float(layer(x)[0, 0]) for _ in range(draws)])
# print(f"variance {outputs.var():.2f} of {draws} draws, {variance:.2f} by the closed form")
# assert np.isclose(variance, 0.05)
# assert abs(outputs.mean() - mean) < 4 * np.sqrt(variance / draws)  # four standard errors
# assert abs(outputs.var() - variance) < 4 * variance * np.sqrt(2 / draws)

# %% [markdown]
# The same check for one entry of the kernel: do its draws follow its normal density? (`call` uses `posteriors.draw`.)

# %% tags=["active-ipynb", "nbval-ignore-output"]
# import matplotlib.pyplot as plt
#
# entry = [float(layer.posteriors.draw("kernel")[0, 0]) for _ in range(draws)]
# loc, scale = float(layer.kernel[0, 0]), float(layer.scale("kernel")[0, 0])
# grid = np.linspace(loc - 4 * scale, loc + 4 * scale, 200)
# figure, axes = plt.subplots(figsize=(5, 2.6), layout="constrained")
# axes.hist(entry, bins=50, density=True, color="0.75", label=f"{draws} draws")
# axes.plot(grid, np.exp(-0.5 * ((grid - loc) / scale) ** 2) / (scale * np.sqrt(2 * np.pi)), label="normal density")
# axes.set(xlabel="weight", ylabel="density", title="Draws of one entry follow N(loc, scale²)")
# axes.legend(frameon=False)
# plt.show()

# %% [markdown]
# *Reading*: the grey bars follow the curve: centred at the loc, with a standard deviation of 0.1.

# %% [markdown]
# ### What message does a wrong call give?
#
# `kl_weight` has no default. A guess could be wrong by as much as the number of pixels, and would ruin training without
# a warning.

# %% tags=["active-ipynb"]
# try:
#     Dense(3, num_bayesian=2, name="head")
# except ValueError as error:
#     print(error)

# %% [markdown]
# ## 7. How does it go into your own model?
#
# A masked layer goes where its stock layer went; `compile` and `fit` stay as they are. (From outside this lesson: `from
# sbn_tf.layers import Dense`.) The task: does $x_0 x_1 > 0$ hold? Of the nine Bayesian entries, one is the bias. Its
# noise changes the output of every input, even where the eight Bayesian kernel entries get inputs of 0.

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
# Each call, and each batch of `model.predict`, uses one draw. Call the model a few times: the mean of the probabilities
# is the prediction, and their spread says how sure it is. (The lesson on partial Bayes has a model that does this for
# you.) `posterior_mean()` gives the answer of the trained weights themselves.

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
# - Each call makes a new draw; inside `with posterior_sample():` all calls share one. Outside `call`, and in every
#   saved file, the weight is its loc.
# - The KL of the `k` entries enters the loss once a step, times `kl_weight`, which you must give.
# - With no Bayesian entry each layer is its stock Keras layer, bit for bit; a weight that is all Bayesian has
#   no index.
#
# ## Exercises
#
# 1. A network segments images of 64 x 64 pixels, 1,000 of them for training; its loss is a mean over pixels. Which
#    `kl_weight` gives the ELBO?
#
#    <details><summary>Answer</summary>
#
#    $1 / (1000 \cdot 4096) \approx 2.4 \cdot 10^{-7}$.
#    </details>
# 2. A kernel of a million weights has ten Bayesian entries. How many more numbers does it store than its stock layer,
#    and how many of them are trained?
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
