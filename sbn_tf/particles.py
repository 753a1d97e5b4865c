"""Particles: a sparse ensemble, whose members share all weights but the salient ones.

Another posterior on the same masks: instead of one Gaussian at each salient weight, a few values that are trained apart
(`gaussian=False`, points), or a mixture of as many Gaussians of equal weight (`gaussian=True`).
"""

from __future__ import annotations

from collections.abc import Mapping

import keras
import numpy as np
from keras import ops
from numpy.typing import ArrayLike

from sbn_tf.core.batch import first_rows, join_outputs, part_bounds
from sbn_tf.core.posterior import scatter_entries, softplus_inverse, standard_normal
from sbn_tf.core.prior import kl_normal
from sbn_tf.partial_bayes import settle_batch_norm
from sbn_tf.saliency import named_weights

__all__ = ["LEAST_LOC", "Particles", "to_particles"]

LEAST_LOC = 1e-3  # of what starts relative to a loc: one of 0 has a spread, too


@keras.saving.register_keras_serializable(package="sbn_tf")
class Particles(keras.Model):
    """A network of which each masked entry has `num_particles` values: `kernel_m = kernel + offset_m`.

    In training particle m sees part m of each batch, so a step costs about one pass: a particle's own weights learn
    from 1/M of the data, all others from all of it. Elsewhere the model's output is the mean over the particles.

    With `gaussian` each is the centre of a Gaussian, `kernel_m = kernel + offset_m + softplus(untransformed_scale_m) *
    eps`, and the loss holds `kl_weight` times a bound on the KL of their mixture from N(0, 1): the mean of the
    components' KLs (the KL is convex), at most ln M above it.

    Args:
        network: a deterministic network of its own; batch norm in it is frozen.
        index: weight's key -> flat positions of its masked entries, or their number, where a file fills them in.
        num_particles: M >= 1.
        initial_scale: standard deviation of the offsets at the start, and of the Gaussians.
        relative: whether that is a multiple of |loc|, at least of 1e-3, or in the weights' unit.
        gaussian: whether the particles are Gaussians.
        kl_weight: of Gaussians; `1 / (num_train * terms)` for the ELBO, see `partial_bayes.loss_terms`.
        seed: of the offsets and of the noise.
    """

    def __init__(
        self,
        network: keras.Model,
        index: Mapping[str, int | ArrayLike],
        *,
        num_particles: int = 5,
        initial_scale: float = 0.1,
        relative: bool = True,
        gaussian: bool = False,
        kl_weight: float = 0.0,
        seed: int | None = None,
        **kwargs,
    ):
        super().__init__(**kwargs)
        if isinstance(num_particles, bool) or not isinstance(num_particles, int) or num_particles < 1:
            raise ValueError(f"Expected num_particles, an integer >= 1. Received: num_particles={num_particles!r}")
        self.network, self.num_particles, self.gaussian = network, num_particles, bool(gaussian)
        self.initial_scale, self.relative = float(initial_scale), bool(relative)
        self.kl_weight, self.seed = float(kl_weight), seed
        places = {key: np.zeros(one) if isinstance(one, int) else np.asarray(one) for key, one in index.items()}
        self._sampler = None
        settle_batch_norm(network, "frozen")
        weights, rng = named_weights(network), np.random.default_rng(seed)
        if unknown := [key for key in places if key not in weights]:
            raise ValueError(f"Expected masks of {network.name!r}. Received: entries of {unknown[:3]}")
        self._noise = keras.random.SeedGenerator(seed)
        self.index, self._offsets, self._rhos = {}, {}, {}
        for key, one in places.items():
            name, shape = key.replace("/", "_"), (num_particles, len(one))
            options = {"dtype": "int64", "trainable": False, "autocast": False}
            self.index[key] = self.add_weight(shape=(len(one),), name=f"{name}_index", **options)
            self.index[key].assign(one.astype("int64"))
            loc = np.abs(ops.convert_to_numpy(weights[key].variable).ravel()[one.astype("int64")])
            start = self.initial_scale * (np.maximum(loc, LEAST_LOC) if relative else np.ones_like(loc))
            self._offsets[key] = self.add_weight(shape=shape, name=f"{name}_offset")
            self._offsets[key].assign(start * rng.standard_normal(shape))
            if gaussian:
                self._rhos[key] = self.add_weight(shape=shape, name=f"{name}_posterior_untransformed_scale")
                rho = [[softplus_inverse(float(value)) for value in start]] * num_particles
                self._rhos[key].assign(np.array(rho))
        self.built = True

    def build(self, input_shape=None):
        """Nothing to do: the network is built."""
        self.built = True

    def call(self, inputs, training=None):
        """In training each example's output under the particle of its part; else the mean over the particles."""
        if not training:
            return ops.mean(ops.stack([self._under(m, inputs) for m in range(self.num_particles)]), axis=0)
        if self.gaussian:
            self.add_loss(self.kl_weight * self.kl_divergence())
        size, outputs = ops.shape(inputs)[0], []
        for m, (start, stop) in enumerate(part_bounds(size, self.num_particles)):
            end = max(stop, start + 1) if isinstance(size, int) else ops.maximum(stop, start + 1)
            outputs.append(first_rows(self._under(m, inputs[start:end]), stop - start))
        return join_outputs(outputs)

    def kl_divergence(self):
        """The mean over the particles of their KL from N(0, 1), in nats, summed over the entries: a scalar."""
        total = 0.0
        weights = named_weights(self.network)
        for key, places in self.index.items():
            loc = ops.take(ops.reshape(weights[key].variable, (-1,)), places) + self._offsets[key]
            total += ops.sum(kl_normal(loc, ops.softplus(self._rhos[key]))) / self.num_particles
        return total

    def predict_samples(self, images: ArrayLike, draws: int = 1) -> np.ndarray:
        """The output under each particle: (num_particles * draws, batch, ...); points need one draw each."""
        parts = []
        for _ in range(draws):
            parts += [ops.convert_to_numpy(sample) for sample in self._all_samples()(images)]
        return np.stack(parts)

    def _all_samples(self):
        """Images -> the outputs under all particles; under TensorFlow traced once."""
        if self._sampler is None:

            def samples(images):
                return [self._under(m, images) for m in range(self.num_particles)]

            if keras.backend.backend() == "tensorflow":
                import tensorflow as tf

                samples = tf.function(samples, reduce_retracing=True)
            self._sampler = samples
        return self._sampler

    def _under(self, m, inputs):
        """The network's output with the weights of particle m."""
        weights = named_weights(self.network)
        mapping = []
        for key, places in self.index.items():
            variable = weights[key].variable
            offset = self._offsets[key][m]
            if self.gaussian:
                offset += ops.softplus(self._rhos[key][m]) * standard_normal(int(places.shape[0]), self._noise)
            dense = scatter_entries(offset, ops.convert_to_tensor(places), tuple(variable.shape))
            mapping.append((variable, variable + dense))
        with keras.StatelessScope(state_mapping=mapping):
            return self.network(inputs, training=False)

    def get_config(self):
        """Arguments of the model, the network included."""
        return {
            **super().get_config(),
            "network": keras.saving.serialize_keras_object(self.network),
            "index": {key: int(places.shape[0]) for key, places in self.index.items()},
            "num_particles": self.num_particles,
            "initial_scale": self.initial_scale,
            "relative": self.relative,
            "gaussian": self.gaussian,
            "kl_weight": self.kl_weight,
            "seed": self.seed,
        }

    @classmethod
    def from_config(cls, config, custom_objects=None):
        """Model from its config."""
        network = keras.saving.deserialize_keras_object(config["network"], custom_objects=custom_objects)
        return cls(**{**config, "network": network})


def to_particles(model: keras.Model, masks: Mapping[str, ArrayLike], **options) -> Particles:
    """A sparse ensemble about a trained network, which is not changed.

    Args:
        model: built Functional or Sequential `keras.Model`.
        masks: `saliency.Masks` of it: which entries the particles do not share.
        options: of `Particles`.

    Raises:
        ValueError: masks of another network, or an option out of range.
    """
    network = type(model).from_config(model.get_config())  # not `clone_model`, which compiles the copy
    network.set_weights(model.get_weights())
    index = {key: np.flatnonzero(mask) for key, mask in dict(masks).items() if np.any(mask)}
    return Particles(network, index, **options)
