"""Methods whose samples each see the image flipped or turned another way: test-time augmentation."""

from __future__ import annotations

from sbn_tf import cost as costs
from sbn_tf.core.turns import NUM_TURNS, turned
from sbn_tf.experiments.methods.base import Method
from sbn_tf.experiments.methods.ensembles import Ensemble
from sbn_tf.experiments.methods.partial import Branched, Members
from sbn_tf.experiments.methods.plain import Deterministic


class Turned(Method):
    """Another method, trained as it is by itself: sample s sees the image under symmetry s, see `core.turns`.

    A method of one sample gets eight. Reference: Wang et al. 2019, "Aleatoric uncertainty estimation with test-time
    augmentation".
    """

    name, title = "turned", "deterministic, mean over eight flips and turns"
    turned = True
    inner: type[Method] = Deterministic

    def __init_subclass__(cls, **kwargs):
        super().__init_subclass__(**kwargs)
        cls.takes_r_bayes, cls.sets, cls.needs_step1 = cls.inner.takes_r_bayes, cls.inner.sets, cls.inner.needs_step1

    def __init__(self, recipe, **options):
        self.other = self.inner(recipe, **options)
        super().__init__(recipe, **options)

    def _count_samples(self, num_samples):
        return self.other.num_samples if self.other.num_samples > 1 else NUM_TURNS

    @property
    def num_networks(self):
        """Sets of weights that are stored."""
        return self.other.num_networks

    def _train(self, data):
        other = self.other.fit(data)
        self.step1, self.trained, self.model, self.recipe_used = (
            other.step1, other.trained, other.model, other.recipe_used,
        )  # fmt: skip
        self.masks = other.masks
        self.folder = self._own_folder(data, of=other.folder.relative_to(other.folder.parents[2]).as_posix())

    def _samples(self, images):
        return turned(self.other.one_sample, images, self.num_samples)

    def _sample_flops(self, batch):
        return costs.prediction_flops(self.step1.model, batch)  # samples of different images share no layer

    def _saliency_flops(self, batch):
        return self.other._saliency_flops(batch)

    def _trainings(self, parts):
        return self.other._trainings(parts)

    def _memory(self, parts):
        return self.other._memory(parts)


class EnsembleTurned(Turned):
    """A deep ensemble."""

    name, title = "ensemble_turned", "deep ensemble, each member with a flip or turn of its own"
    inner = Ensemble


class MembersTurned(Turned):
    """A sparse ensemble."""

    name, title = "members_turned", "sparse ensemble, each member with a flip or turn of its own"
    inner = Members


class BranchedTurned(Turned):
    """A sparse ensemble that parts early."""

    name, title = "branched_turned", "sparse ensemble that parts early, each member with a flip or turn of its own"
    inner = Branched
