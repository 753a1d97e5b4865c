"""The posteriors of one layer: which entries of its weights are Bayesian, their draws and their noise."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping

import keras
import numpy as np
from keras import ops

from sbn_tf.core.context import current_sample, is_at_mean, kept_draw
from sbn_tf.core.keras_internals import unlocked
from sbn_tf.core.posterior import AS_SAVED, POSTERIORS, Posterior, PosteriorOptions, standard_normal

__all__ = ["Posteriors", "WithPosteriors"]


class Posteriors(keras.layers.Layer):
    """A mapping from the names of a layer's weights with Bayesian entries to their `Posterior`s.

    It is a part of a masked layer, which asks it for draws. Keras saves it with the layer.

    Args:
        layer: the masked layer, with `posterior_weights` and `loc(name)`.
        num_bayesian: int, or dict by weight: how many entries are Bayesian, chosen at random.
        masks: boolean array, or dict by weight: which entries are Bayesian instead.
        options: `PosteriorOptions`.
        seed: int or None.
        dtype: of the variables: "float32" or "float64".

    Attributes:
        counts: dict, name of a weight -> number of its Bayesian entries, known before the layer is built.
        noise_seed: `keras.random.SeedGenerator` of all draws; None as long as nothing is Bayesian.

    Raises:
        ValueError: counts or masks that do not fit, or both.
    """

    def __init__(self, layer, num_bayesian, masks, options: PosteriorOptions, *, seed, dtype: str):
        super().__init__(name=f"{layer.name}_posteriors", dtype=dtype, autocast=False)
        self.options, self.seed, self.noise_seed = options, seed, None
        self._layer = lambda: layer  # hidden from Keras, which would take the layer for a part of this part
        self.by_weight: dict[str, Posterior] = {}
        self.masks = self._named(masks, "mask")
        self.counts = {k: int(v) for k, v in self._checked_counts(num_bayesian).items()}
        if self.masks:
            if any(self.counts.values()):
                raise ValueError(f"Expected num_bayesian or mask. Received: both, num_bayesian={num_bayesian}")
            self.counts = {name: int(np.sum(mask)) for name, mask in self.masks.items()}
        options.settle(dtype, any(self.counts.values()), layer.name)
        self.built = True

    def make(self) -> None:
        """Make the posterior of every weight with Bayesian entries, when the layer is built."""
        layer = self._layer()
        for argument, value in (("num_bayesian", self.counts), ("mask", self.masks)):
            self._named(value, argument)
        if self.masks:
            self._check_masks(self.masks)
        random = np.random.default_rng(self.seed)
        names = [name for name in layer.posterior_weights if self.counts.get(name, 0) > 0]
        with unlocked(self):
            self.by_weight.clear()
            for name in names:
                self.by_weight[name] = POSTERIORS[self.options.posterior](
                    functools.partial(layer.loc, name),
                    self._positions(name, random),
                    self.options,
                    key=f"{layer.name}/{name}",
                    seed=self.seed,
                    dtype=self.variable_dtype,
                )
            if names and self.noise_seed is None:
                self.noise_seed = keras.random.SeedGenerator(self.seed)
        self.masks, self.trainable = None, layer.trainable

    def choose(self, masks) -> None:
        """Choose again which entries are Bayesian; their posteriors start again."""
        layer, masks = self._layer(), self._named(masks, "mask")
        if not layer.built:
            raise ValueError(f"Build layer '{layer.name}' before set_mask (call it once, or pass mask= to it).")
        self._check_masks(masks)
        counts = {name: int(np.sum(mask)) for name, mask in masks.items()}
        if any(counts.values()) and not any(self.counts.values()):
            has_kl = POSTERIORS[self.options.posterior].has_kl
            if has_kl and float(ops.convert_to_numpy(self.options.kl_weight)) == 0.0:
                raise ValueError(
                    f"Layer '{layer.name}' becomes Bayesian with a kl_weight of 0, which charges no KL. Set "
                    "layer.posterior_options.kl_weight = 1/num_train first."
                )
        self.masks, self.counts = masks, counts
        self.make()

    # ---- draws ----

    def noise(self, size):
        """Standard normal noise of `size`, a count or a shape."""
        return standard_normal(size, self.noise_seed, self.variable_dtype)

    def offsets(self, name: str, sample=None):
        """New offsets of the Bayesian entries from their loc, (k,): of draw `sample`, or of any."""
        return self.by_weight[name].offsets(sample, self.noise)

    def draw(self, name: str, offsets=None):
        """A draw of weight `name`, of its shape: a new one, or the one with these offsets (k,)."""
        offsets = self.offsets(name, current_sample()) if offsets is None else offsets
        return ops.convert_to_tensor(self._layer().loc(name)) + self.by_weight[name].scatter(offsets)

    def draws(self) -> dict:
        """Name -> this call's draw; within `posterior_mean` the mean of each weight whose mean is not its loc."""
        if is_at_mean():
            means = {name: one.mean_offsets() for name, one in self.items()}
            return {name: self.draw(name, mean) for name, mean in means.items() if mean is not None}
        return {name: kept_draw(self, name, functools.partial(self.draw, name)) for name in self}

    # ---- what is known of them ----

    def mask(self, name: str) -> np.ndarray:
        """Dense boolean mask of weight `name`: True where it is Bayesian. For reading and plotting."""
        return self._dense(name, lambda one: True, bool)

    def scale(self, name: str) -> np.ndarray:
        """Dense posterior standard deviation of weight `name`: 0 where it is a point. For reading and plotting."""
        return self._dense(name, lambda one: ops.convert_to_numpy(one.scale_of_entries()), self.variable_dtype)

    def kl_divergence(self):
        """Summed KL of the posteriors from their priors, in nats: a scalar; 0 with no Bayesian entry."""
        return sum((one.kl_divergence() for one in self.by_weight.values()), ops.zeros((), self.variable_dtype))

    def centre(self) -> None:
        """Start again from the current locs: priors with `prior_at_loc`, and what starts relative to the loc."""
        for one in self.by_weight.values():
            one.centre()

    def items(self):
        """Pairs of name and `Posterior`."""
        return self.by_weight.items()

    def __getitem__(self, name: str) -> Posterior:
        return self.by_weight[name]

    def __contains__(self, name: object) -> bool:
        return name in self.by_weight

    def __iter__(self) -> Iterator[str]:
        return iter(self.by_weight)

    def __len__(self) -> int:
        return len(self.by_weight)

    # ---- saving: how many entries of each weight; the posteriors save the rest themselves ----

    def save_own_variables(self, store):
        """The counts, by which loading notices a layer with other entries."""
        for name, posterior in self.items():
            store[name.replace("/", ".")] = np.int64(posterior.count)

    def load_own_variables(self, store):
        """Refuse a file with other Bayesian entries. In a stock layer's file there is nothing: priors are centred."""
        own = {name.replace("/", "."): posterior.count for name, posterior in self.items()}
        found = {name: int(np.asarray(store[name])) for name in store.keys()}  # noqa: SIM118  (a file's group)
        if not found:
            for posterior in self.by_weight.values():
                posterior.centre_prior()
        elif found != own:
            raise ValueError(
                f"Layer '{self._layer().name}' expected Bayesian entries {own}. Received: {found}. {AS_SAVED}"
            )

    # ---- below: checks ----

    def _named(self, value, argument):
        """A dict by the names of weights; another value is of the first weight."""
        names = self._layer().posterior_weights
        if value is None:
            return None
        if not isinstance(value, Mapping):
            if names:
                return {names[0]: value}
            if isinstance(value, int) and value == 0:
                return None
            raise ValueError(
                f"Expected {argument} of '{self._layer().name}' as a dict by weight, such as "
                f"{{'query/kernel': ...}}. Received: {type(value).__name__}"
            )
        unknown = sorted(set(value) - set(names)) if names else []
        if unknown:
            shown = names if len(names) <= 5 else f"{list(names[:5])} ..."
            raise ValueError(
                f"Expected {argument} for weights among {shown} of layer '{self._layer().name}'. "
                f"Received: {unknown[:5]}{' ...' if len(unknown) > 5 else ''}"
            )
        return dict(value)

    def _checked_counts(self, num_bayesian):
        counts = self._named(num_bayesian, "num_bayesian") or {}
        if any(not np.isfinite(v) or v != int(v) or v < 0 for v in counts.values()):
            raise ValueError(
                "Expected whole counts num_bayesian >= 0 (for a share of n entries: round(share * n)). "
                f"Received: num_bayesian={num_bayesian}"
            )
        return counts

    def _check_masks(self, masks):
        layer = self._layer()
        for name, mask in masks.items():
            mask, shape = np.asarray(mask), tuple(layer.loc(name).shape)
            if mask.dtype != bool or mask.shape != shape:
                raise ValueError(
                    f"Expected a boolean mask of shape {shape} for `{name}` of layer '{layer.name}'. "
                    f"Received: {mask.dtype} of shape {mask.shape}"
                )

    def _positions(self, name, random):
        """Flat positions of the Bayesian entries of a weight, (k,): of its mask, or at random. None: all of them."""
        layer, count = self._layer(), self.counts[name]
        size = int(np.prod(layer.loc(name).shape))
        if count > size:
            raise ValueError(
                f"Expected at most {size} Bayesian entries in `{name}` of layer '{layer.name}'. Received: {count}"
            )
        if count == size:
            return None
        return np.flatnonzero(self.masks[name]) if self.masks else np.sort(random.choice(size, count, replace=False))

    def _dense(self, name, values, dtype):
        if name in self:
            return self[name].dense(values(self[name]), dtype)
        return np.zeros(tuple(self._layer().loc(name).shape), dtype)


class WithPosteriors:
    """What a masked layer answers and allows: its Bayesian entries, read and chosen again.

    Attributes:
        posteriors: mapping of the name of a weight with Bayesian entries to its `Posterior`.
    """

    name: str
    variable_dtype: str
    posteriors: Posteriors

    @property
    def num_bayesian(self) -> dict[str, int]:
        """Name of a weight -> number of its Bayesian entries."""
        return dict(self.posteriors.counts)

    def mask(self, name: str) -> np.ndarray:
        """Dense boolean mask of weight `name`: True where it is Bayesian. For reading and plotting."""
        return self.posteriors.mask(name)

    def scale(self, name: str) -> np.ndarray:
        """Dense posterior standard deviation of weight `name`: 0 where it is a point. For reading and plotting."""
        return self.posteriors.scale(name)

    def set_mask(self, mask) -> None:
        """Choose again which entries are Bayesian, as `mask` above; scales start again. Compile the model after it."""
        self.posteriors.choose(mask)

    def kl_divergence(self):
        """Summed KL of the posteriors from their priors, in nats: a scalar; 0 with no Bayesian entry."""
        return self.posteriors.kl_divergence()

    def enable_lora(self, *args, **kwargs):
        """Refused with Bayesian entries: a layer has a posterior or LoRA factors, not both."""
        if len(self.posteriors):
            raise ValueError(f"Layer '{self.name}' is Bayesian: LoRA cannot be enabled on it.")
        super().enable_lora(*args, **kwargs)

    def quantize(self, *args, **kwargs):
        """Refused with Bayesian entries: a posterior needs its floating-point loc."""
        if len(self.posteriors):
            raise ValueError(f"Layer '{self.name}' is Bayesian: it cannot be quantized. Quantize the trained network.")
        super().quantize(*args, **kwargs)
