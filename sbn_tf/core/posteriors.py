"""The posteriors of one layer: which entries of its weights are Bayesian, their draws and their noise."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping

import keras
import numpy as np
from keras import ops

from sbn_tf.core.checks import check_seed, is_number
from sbn_tf.core.context import current_sample, is_at_mean, kept_draw
from sbn_tf.core.keras_internals import all_layers, own_variables, set_part, unlocked
from sbn_tf.core.noise import noise_of_a_step, standard_normal
from sbn_tf.core.posterior import AS_SAVED, POSTERIORS, Posterior, PosteriorOptions
from sbn_tf.core.registry import partial_class

__all__ = ["NO_LORA", "NO_QUANTIZATION", "Posteriors", "WithPosteriors"]

NO_LORA = "LoRA cannot be enabled on it. Enable it before the conversion"
NO_QUANTIZATION = "it cannot be quantized. Quantize to_deterministic(model)"

_EXACT = "exact:"  # in a file, before what is no count


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
        self.options, self.seed, self.noise_seed = options, None if seed is None else check_seed(seed), None
        self._layer = lambda: layer  # hidden from Keras, which would take the layer for a part of this part
        self.by_weight: dict[str, Posterior] = {}
        self.masks = self._named(masks, "mask")
        self.counts = {k: int(v) for k, v in self._checked_counts(num_bayesian).items()}
        if self.masks:
            if any(self.counts.values()):
                raise ValueError(f"Expected num_bayesian or mask. Received: both, num_bayesian={num_bayesian}")
            self.counts = {name: int(np.count_nonzero(mask)) for name, mask in self.masks.items()}
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
        names = self._bayesian(self.counts)
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
        set_part(layer, "posteriors", self, counted=bool(names))

    def choose(self, masks) -> None:
        """Choose again which entries are Bayesian; their posteriors start again."""
        layer, masks = self._layer(), self._named(masks, "mask")
        if not layer.built:
            raise ValueError(f"Build layer '{layer.name}' before set_mask (call it once, or pass mask= to it).")
        self._check_masks(masks)
        counts = {name: int(np.sum(mask)) for name, mask in masks.items()}
        self._bayesian(counts)
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
        one = self.by_weight[name]
        noise = functools.partial(noise_of_a_step, one, seed_generator=self.noise_seed, dtype=self.variable_dtype)
        return one.offsets(sample, noise)

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
        """The counts, by which loading notices a layer with other entries; what the layer saves in another form."""
        for name, posterior in self.items():
            store[name.replace("/", ".")] = np.int64(posterior.count)
        for key, variable in self._saved_otherwise().items():
            store[key] = variable

    def load_own_variables(self, store):
        """Refuse a file with other Bayesian entries. In a stock layer's file there is nothing: priors are centred.

        Keras has loaded the layer itself before this part of it.
        """
        own = {name.replace("/", "."): posterior.count for name, posterior in self.items()}
        stored = set(store.keys())
        found = {name: int(np.asarray(store[name])) for name in stored if not name.startswith(_EXACT)}
        if not found:
            for posterior in self.by_weight.values():
                posterior.centre_prior()
        elif found != own:
            raise ValueError(
                f"Layer '{self._layer().name}' expected Bayesian entries {own}. Received: {found}. {AS_SAVED}"
            )
        for key, variable in self._saved_otherwise().items():
            if key in stored:
                variable.assign(store[key])

    def _saved_otherwise(self) -> dict:
        """Variables that are saved in another form by the layers that have Bayesian weights, by a key for the file.

        Keras saves a kernel merged with its LoRA factors, and zeros as the factors: the draws would be other ones.
        """
        found, bayesian = {}, {id(self._layer().loc(name)) for name in self}
        for i, part in enumerate(all_layers(self._layer()) if bayesian else ()):
            own, saved = own_variables(part), {}
            if bayesian & {id(variable) for variable in own}:
                part.save_own_variables(saved)
                unchanged = {id(value) for value in saved.values()}
                found |= {f"{_EXACT}{i}.{k}": v for k, v in enumerate(own) if id(v) not in unchanged}
        return found

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
        if any(not is_number(v) or v != int(v) or v < 0 for v in counts.values()):
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

    def _bayesian(self, counts) -> list[str]:
        """Names of the weights with Bayesian entries."""
        layer = self._layer()
        names = [name for name in layer.posterior_weights if counts.get(name, 0) > 0]
        for name in names:
            loc = layer.loc(name)
            if not isinstance(loc, keras.Variable) or not keras.backend.is_float_dtype(loc.dtype):
                raise ValueError(
                    "Expected a weight of floating point without LoRA factors for Bayesian entries. Received: "
                    f"`{name}` of layer '{layer.name}'. Choose its entries before that, or convert a model with LoRA."
                )
        return names

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
    built: bool
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
        self.refuse_bayesian(NO_LORA)
        super().enable_lora(*args, **kwargs)

    def quantize(self, mode=None, type_check=True, **kwargs):
        """Refused with Bayesian entries: a posterior needs its floating-point loc."""
        self.refuse_bayesian(NO_QUANTIZATION)
        # The stock layer refuses all other classes, since these may have a call of their own.
        super().quantize(mode, type_check=type_check and partial_class(self) is not type(self), **kwargs)

    def refuse_bayesian(self, reason: str, error: type[Exception] = ValueError) -> None:
        """Raise an error with this reason where an entry is Bayesian."""
        if len(self.posteriors):
            raise error(f"Layer '{self.name}' is Bayesian: {reason}.")
