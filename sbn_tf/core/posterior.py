"""Posteriors: what is believed of chosen entries of one weight, behind one interface.

A masked layer has one `Posterior` for each of its weights that has Bayesian entries, and knows this interface alone.
`POSTERIORS` lists them by name; the Gaussian one is in the lesson `sbn_tf.layers`.
"""

from __future__ import annotations

import contextlib
import zlib
from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any

import keras
import numpy as np
from keras import ops

from sbn_tf.core.checks import check_count, check_number, is_number
from sbn_tf.core.context import current_graph
from sbn_tf.core.keras_internals import in_stateless_scope
from sbn_tf.core.prior import kl_normal, prior_config

if keras.backend.backend() == "tensorflow":
    import tensorflow as tf

__all__ = [
    "LEAST_LOC", "OPTION_NAMES", "POSTERIORS", "KLRegularizer", "MembersPosterior", "MixturePosterior", "Posterior",
    "PosteriorOptions", "scatter_entries", "scattered", "softplus_inverse",
]  # fmt: skip

LEAST_LOC = 1e-3  # a relative start takes at least this for |loc|: an entry at 0 gets a spread, too
POSTERIORS: dict[str, type[Posterior]] = {}  # by the name that `to_partial_bayes` and the layers take


def softplus_inverse(scale):
    """Untransformed scale whose softplus is `scale` (> 0): `log(exp(scale) - 1)`, stable for small scales."""
    return scale + np.log(-np.expm1(-scale))


def scatter_entries(values, index, shape):
    """Put `values` (k,) at flat positions `index` (k,) of zeros of `shape`; `index=None` means all in order."""
    if index is None:
        return ops.reshape(values, shape)
    size = (int(np.prod(shape)),)
    if keras.backend.backend() == "tensorflow":
        # The same as `ops.scatter`, which takes up to 14 times as long on a CPU.
        entries = tf.SparseTensor(tf.cast(index, "int64")[:, None], values, size)
        return tf.reshape(tf.sparse.to_dense(entries, validate_indices=False), shape)
    return ops.reshape(scattered(values, index, *size), shape)


def scattered(values, index, size: int):
    """Zeros (size,) with `values` (k,) at the positions `index` (k,)."""
    if keras.backend.backend() == "torch":  # Keras's scatter is a loop over the entries there
        return ops.scatter_update(ops.zeros((size,), values.dtype), ops.expand_dims(index, -1), values)
    return ops.scatter(ops.expand_dims(index, -1), values, (size,))


@dataclass
class PosteriorOptions:
    """How the posteriors of a layer start, and what their KL costs.

    Attributes:
        posterior: "gaussian", "members" or "mixture": a name of `POSTERIORS`.
        num_members: values of each entry ("members"), or Gaussians in its mixture. >= 1.
        initial_scale: standard deviation at which each posterior starts, in the weight's unit, or relative. > 0. None:
            .1 where it is relative, else .01.
        relative: what `initial_scale` is a multiple of. False: of 1. True: of |loc| or of the root mean square of the
            whole weight, whichever is larger. "entry": of |loc| alone. Both at least of 1e-3. None: False for
            Gaussians, else True.
        untransformed_scale_initializer: a Keras initializer for the untransformed scales of Gaussians instead; a
            seeded one gives different values to each weight.
        prior: None for N(0, 1), or a scalar `tfd` distribution with a registered KL from a normal: in TFP 0.25 these
            are `tfd.Normal`s of any loc and scale.
        prior_at_loc: the prior lies around each Bayesian entry's own value instead of around 0: around the loc that
            the entry had when it became Bayesian, or at the last `centre()`. Costs one stored number an entry.
        kl_weight: factor of the KL in the loss, >= 0. A number is fixed when the model is compiled; to change it
            later, pass a `keras.Variable`. 1 / num_train for a loss averaged over images.
        kl_reduction: "sum" over the entries of a weight (the ELBO), or "mean" (the paper's code).

    Raises:
        ValueError: a name, scale, reduction, prior or `kl_weight` that does not fit.
    """

    posterior: str = "gaussian"
    num_members: int = 5
    initial_scale: Any = None
    relative: Any = None
    untransformed_scale_initializer: Any = None
    prior: Any = None
    prior_at_loc: bool = False
    kl_weight: Any = None
    kl_reduction: str = "sum"

    def __post_init__(self):
        if self.posterior not in POSTERIORS:
            raise ValueError(f"Expected posterior to be one of {sorted(POSTERIORS)}. Received: {self.posterior!r}")
        gaussian = self.posterior == "gaussian"
        self.relative = (not gaussian) if self.relative is None else self.relative
        self.initial_scale = (0.1 if self.relative else 0.01) if self.initial_scale is None else self.initial_scale
        check_number("initial_scale", self.initial_scale)
        check_count("num_members", self.num_members)
        if self.kl_reduction not in ("sum", "mean"):
            raise ValueError(f'Expected kl_reduction "sum" or "mean". Received: kl_reduction={self.kl_reduction!r}')
        if not isinstance(self.relative, bool | np.bool_) and self.relative != "entry":
            raise ValueError(f'Expected relative True, False or "entry". Received: relative={self.relative!r}')
        if not isinstance(self.prior_at_loc, bool | np.bool_):
            raise ValueError(f"Expected prior_at_loc True or False. Received: prior_at_loc={self.prior_at_loc!r}")
        self.prior, self.prior_at_loc = prior_config(self.prior), bool(self.prior_at_loc)
        self.untransformed_scale_initializer = keras.initializers.get(self.untransformed_scale_initializer)

    def settle(self, dtype: str, is_bayesian: bool, name: str) -> None:
        """Refuse a scale that `dtype` cannot store, and a missing weight of the KL, for the layer `name`."""
        tiny, most = float(np.finfo(dtype).tiny), float(np.sqrt(np.finfo(dtype).max))  # the KL takes its square
        if not tiny < self.initial_scale < most:
            raise ValueError(
                f"Expected initial_scale > {tiny:.1e} and < {most:.1e}. Received: initial_scale={self.initial_scale}"
            )
        self.initial_scale = float(self.initial_scale)
        if self.kl_weight is None and is_bayesian and POSTERIORS[self.posterior].has_kl:
            raise ValueError(
                f"Layer '{name}' has Bayesian entries and no kl_weight. Pass kl_weight=1/num_train (a loss that "
                "averages over images) or 1/(num_train * pixels) (one that averages over pixels as well)."
            )
        self.kl_weight = _checked_kl_weight(0.0 if self.kl_weight is None else self.kl_weight)

    def get_config(self) -> dict:
        """The options as numbers and strings."""
        initializer = self.untransformed_scale_initializer
        return {
            **{field.name: getattr(self, field.name) for field in fields(self)},
            "untransformed_scale_initializer": initializer and keras.initializers.serialize(initializer),
            "prior": prior_config(self.prior),
            "kl_weight": float(ops.convert_to_numpy(self.kl_weight)),
        }


OPTION_NAMES = tuple(field.name for field in fields(PosteriorOptions))


def _checked_kl_weight(value):
    """`value` if it may be the weight of a KL: a finite number >= 0, or a `keras.Variable`."""
    if isinstance(value, keras.Variable):
        return value
    if not is_number(value) or value < 0:
        raise ValueError(f"Expected a finite number kl_weight >= 0, or a keras.Variable. Received: kl_weight={value!r}")
    return value


class KLRegularizer(keras.regularizers.Regularizer):
    """The weighted KL of one posterior, as the regularizer of its untransformed scale: Keras adds it once a step."""

    def __init__(self, posterior: Posterior):
        self.posterior = posterior

    def __call__(self, untransformed_scale):
        """The KL of the posterior, reduced and times `kl_weight`: a scalar."""
        options = self.posterior.options
        kl = self.posterior.kl_of_entries()
        kl = ops.mean(kl) if options.kl_reduction == "mean" else ops.sum(kl)
        return ops.cast(ops.convert_to_tensor(options.kl_weight), kl.dtype) * kl

    def get_config(self) -> dict:
        """Nothing: the posterior makes its regularizer itself."""
        return {}


class Posterior(keras.layers.Layer):
    """What is believed of k entries of one weight; the other entries of the weight are points.

    A draw of the weight is its loc plus `offsets(sample, noise)` at the entries. A subclass makes its variables in
    `start` and defines `offsets`, `scale_of_entries` and, where it has a KL, `kl_of_entries`.

    Args:
        loc: function without arguments that returns the weight's variable.
        positions: (k,) flat positions of the entries, or None: all entries.
        options: `PosteriorOptions`.
        key: name of the weight with its layer's before it, such as "dense/kernel".
        seed: int or None; with the key it fixes what is random at the start.
        dtype: of the variables, "float32" or "float64".

    Attributes:
        index: variable with the positions, (k,) int; None where all entries are Bayesian.
    """

    is_gaussian = False  # whether noise may be drawn for each example ("flipout", "local")
    has_kl = True

    def __init__(self, loc: Callable[[], Any], positions, options: PosteriorOptions, *, key: str, seed, dtype: str):
        name = key.split("/", 1)[-1].replace("/", ".")  # Keras allows no slash in a name
        super().__init__(name=f"{name}_posterior", dtype=dtype, autocast=False)
        self.options, self.key, self.seed, self._read_loc = options, key, seed, loc
        self.weight_shape = tuple(loc().shape)
        self.count = int(np.prod(self.weight_shape)) if positions is None else len(positions)
        self.index = None
        if positions is not None:
            self.index = self.add_weight(
                name="index",
                shape=(self.count,),
                dtype="int64" if keras.backend.backend() == "tensorflow" else "int32",  # JAX has no int64
                initializer=lambda shape, dtype: ops.convert_to_tensor(positions, dtype=dtype),
                trainable=False,
                autocast=False,
            )
        self._touched = None if positions is None else _touched_channels(self.weight_shape, positions)
        self.prior_loc = None
        self.start()
        if options.prior_at_loc:
            self.prior_loc = self._add("prior_loc", lambda shape, dtype: self.loc(), trainable=False)
        self.built = True

    # ---- what a layer, an estimator and the ELBO ask for ----

    def start(self) -> None:
        """Make the variables, at their starting values."""

    def offsets(self, sample, noise: Callable):
        """Distance of one draw from the loc: (k,).

        Args:
            sample: number of the draw, an int or integer tensor; None: any draw.
            noise: `noise(shape)` gives standard normal numbers. With a count, not a shape, call it once a draw: the
                draws of a training step share those numbers, turned.
        """
        raise NotImplementedError

    def mean_offsets(self):
        """Distance of the posterior's mean from the loc, (k,); None: it is the loc."""
        return None

    def scale_of_entries(self):
        """Standard deviation of each entry: (k,)."""
        raise NotImplementedError

    def kl_of_entries(self):
        """KL from the prior in nats, entry by entry: (k,). 0 of a posterior without a density."""
        return ops.zeros((self.count,), self.variable_dtype)

    def kl_divergence(self):
        """KL of the posterior from its prior in nats, summed over the entries: a scalar."""
        return ops.sum(self.kl_of_entries())

    def centre_prior(self) -> None:
        """With `prior_at_loc`: put the prior of every entry around its current loc. Otherwise nothing."""
        if self.prior_loc is not None:
            self.prior_loc.assign(self.loc())

    def centre(self) -> None:
        """Start again from the current loc: the prior's centres, and what starts relative to the loc."""
        self.centre_prior()

    # ---- what they share ----

    def loc(self):
        """Current locs of the entries: (k,)."""
        flat = ops.reshape(ops.convert_to_tensor(self._read_loc()), (-1,))
        flat = flat if self.index is None else ops.take(flat, ops.convert_to_tensor(self.index), axis=0)
        return ops.cast(flat, self.variable_dtype)

    def from_prior(self):
        """Locs of the entries as the prior sees them: minus the prior's centres, where it has any."""
        return self.loc() if self.prior_loc is None else self.loc() - self.prior_loc

    def scatter(self, values, dtype=None):
        """`values` (k,) at the entries of a tensor of the weight's shape, 0 elsewhere."""
        index = self.index if self.index is None else ops.convert_to_tensor(self.index)
        dtype = dtype or ops.convert_to_tensor(self._read_loc()).dtype  # the layer's compute dtype, within its call
        return scatter_entries(ops.cast(values, dtype), index, self.weight_shape)

    def dense(self, values, dtype) -> np.ndarray:
        """`values` (k,) or a number at the entries of an array of the weight's shape, 0 elsewhere. For reading."""
        whole = np.zeros(int(np.prod(self.weight_shape)), dtype)
        whole[slice(None) if self.index is None else ops.convert_to_numpy(self.index)] = values
        return whole.reshape(self.weight_shape)

    def touched(self) -> tuple[int, int] | None:
        """How many indices of the weight's last two axes have Bayesian entries; None where it has fewer axes.

        Read when a call is traced, from the index as it is then.
        """
        if self.index is not None and _can_be_read_now():
            with tf.init_scope() if current_graph() is not None else contextlib.nullcontext():
                self._touched = _touched_channels(self.weight_shape, ops.convert_to_numpy(self.index))
        return self._touched

    def quantize(self, *args, **kwargs):
        """Refused: `Model.quantize` warns of it, and leaves the layer as it is."""
        raise NotImplementedError(f"'{self.key}' has Bayesian entries: its layer is not quantized.")

    def save_own_variables(self, store):
        """Each variable under its name."""
        for variable in self.variables:
            store[variable.name] = variable

    def load_own_variables(self, store):
        """Load them; a store with none, of a stock layer's checkpoint, leaves the posterior as it is."""
        stored, own = set(store.keys()), {variable.name: variable for variable in self.variables}
        if not stored:
            return
        shapes = {name: tuple(store[name].shape) for name in stored}
        expected = {name: tuple(variable.shape) for name, variable in own.items()}
        if shapes != expected:
            wrong = sorted(n for n in stored | set(own) if shapes.get(n) != expected.get(n))
            raise ValueError(
                f"'{self.path}' expected {wrong[0]} of shape {expected.get(wrong[0], 'none')}. Received: "
                f"{shapes.get(wrong[0], 'none')}. {AS_SAVED}"
            )
        for name, variable in own.items():
            variable.assign(store[name])
        self.touched()

    def _add(self, name, initializer, shape=None, trainable=True, **options):
        return self.add_weight(
            name=name,
            shape=(self.count,) if shape is None else shape,
            dtype=self.variable_dtype,
            initializer=initializer,
            trainable=trainable,
            autocast=False,
            **options,
        )

    def _start_scales(self) -> np.ndarray:
        """Standard deviation of each entry at the start: (k,)."""
        options = self.options
        if not options.relative:
            return options.initial_scale * np.ones(self.count, self.variable_dtype)
        least = LEAST_LOC
        if options.relative != "entry":
            whole = ops.convert_to_numpy(ops.cast(ops.convert_to_tensor(self._read_loc()), self.variable_dtype))
            least = max(least, float(np.sqrt(np.mean(np.square(whole, dtype="float64")))))
        return options.initial_scale * np.maximum(np.abs(ops.convert_to_numpy(self.loc())), least)

    def _generator(self) -> np.random.Generator:
        """Random numbers for the start: the same for one seed and name."""
        return np.random.default_rng(None if self.seed is None else [self.seed, zlib.crc32(self.key.encode())])


AS_SAVED = "Build it with the num_bayesian and prior_at_loc that it had when it was saved."


class MembersPosterior(Posterior):
    """M trained values of each entry, of equal weight: draw s is member s modulo M. Without a density, so no KL.

    `weight_m = loc + offset_m` at the entries. Members start apart: their offsets are normal with the start's scale.
    """

    has_kl = False

    def start(self):
        """Make the offsets: (M, k)."""
        self.member_offsets = self._add("member_offsets", self._apart, (self.options.num_members, self.count))

    def _apart(self, shape, dtype=None):
        values = self._start_scales() * self._generator().standard_normal(shape)
        return ops.convert_to_tensor(values, dtype=dtype or self.variable_dtype)

    def centre(self):
        """Start again from the current loc."""
        super().centre()
        self.member_offsets.assign(self._apart(tuple(self.member_offsets.shape)))

    def offsets(self, sample, noise):
        """Offsets of member `sample` modulo M; of a member at random where `sample` is None."""
        return ops.take(self.member_offsets, self._member(sample, noise), axis=0)

    def mean_offsets(self):
        """Mean over the members."""
        return ops.mean(self.member_offsets, axis=0)

    def scale_of_entries(self):
        """Standard deviation over the members."""
        return ops.std(self.member_offsets, axis=0)

    def _member(self, sample, noise):
        num_members = self.options.num_members
        return ops.argmax(noise((num_members,))) if sample is None else sample % num_members


class MixturePosterior(MembersPosterior):
    """M Gaussians of each entry, of equal weight: draw s is of Gaussian s modulo M.

    `weight_m = loc + offset_m + softplus(untransformed_scale_m) * eps`. Its KL is a bound from above: the mean of the
    components' KLs, since the KL is convex; it exceeds the mixture's by at most ln M.
    """

    has_kl = True

    def start(self):
        """Make offsets and untransformed scales: (M, k) each."""
        super().start()
        shape = (self.options.num_members, self.count)
        options = {"regularizer": KLRegularizer(self)}
        self.untransformed_scale = self._add("untransformed_scale", self._first_scales, shape, **options)

    def _first_scales(self, shape, dtype=None):
        values = np.broadcast_to(softplus_inverse(self._start_scales()), shape)
        return ops.convert_to_tensor(values, dtype=dtype or self.variable_dtype)

    def centre(self):
        """Start again from the current loc."""
        super().centre()
        self.untransformed_scale.assign(self._first_scales(tuple(self.untransformed_scale.shape)))

    def offsets(self, sample, noise):
        """One draw of Gaussian `sample` modulo M."""
        member = self._member(sample, noise)
        scale = ops.softplus(ops.take(self.untransformed_scale, member, axis=0))
        return ops.take(self.member_offsets, member, axis=0) + scale * noise(self.count)

    def scale_of_entries(self):
        """Standard deviation of the mixture."""
        within = ops.mean(ops.softplus(self.untransformed_scale) ** 2, axis=0)
        return ops.sqrt(within + ops.var(self.member_offsets, axis=0))

    def kl_of_entries(self):
        """The mean over the components of their KL: (k,)."""
        loc = self.from_prior() + self.member_offsets
        return ops.mean(kl_normal(loc, ops.softplus(self.untransformed_scale), self.options.prior), axis=0)


POSTERIORS.update(members=MembersPosterior, mixture=MixturePosterior)


def _can_be_read_now() -> bool:
    """Whether the value of a variable can be read here: not within a step of JAX, nor on one of several replicas."""
    if keras.backend.backend() != "tensorflow":
        return not in_stateless_scope()
    replica = tf.distribute.get_replica_context()
    return replica is not None and replica.num_replicas_in_sync == 1


def _touched_channels(shape, positions):
    if len(shape) < 2:
        return None
    *_, rows, columns = np.unravel_index(np.asarray(positions), shape)
    return len(np.unique(rows)), len(np.unique(columns))
