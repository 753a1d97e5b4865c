"""Several networks, each a sample."""

from __future__ import annotations

import dataclasses

import numpy as np

from sbn_tf.experiments import training
from sbn_tf.experiments.folders import write_json
from sbn_tf.experiments.methods.base import Method

MAX_CYCLES = 5


class Networks(Method):
    """Several sets of weights of one network, each a sample; here each a run of `deterministic` by itself."""

    share = 1  # each has one `share`-th of the recipe's epochs; above 1 they are as many, else `num_members`

    def _count_samples(self, num_samples):
        self.num_members = self.share if self.share > 1 else self.num_members
        return self.num_members

    def _epochs(self):
        return max(1, round(self.recipe.epochs / self.share))

    def _train(self, data):
        self.trained = self._train_members(data)

    def _samples(self, images):
        return np.stack([self.one_sample(images, number) for number in range(len(self._weights))])

    def one_sample(self, images, number):
        """Sample `number` alone, (batch, ...)."""
        self.model.set_weights(self._weights[number])  # one traced network for all
        return super()._samples(images)[0]

    def _trainings(self, parts):
        first, member = 0 if self.share > 1 else 1, parts.first / self.recipe.epochs * self._epochs()
        kind = "member" if self.share == 1 else f"{self.name}_member"
        return {f"{kind}{index}": member for index in range(first, self.num_members)}

    @property
    def num_networks(self):
        """Sets of weights that are stored."""
        return self.num_samples

    def _train_members(self, data):
        """Train the members of step 1, each a run of `deterministic` by itself."""
        options = {"num_members": self.num_members, "network": self.network, **self._options()}
        members = training.ensemble_runs(data, dataclasses.replace(self.recipe, epochs=self._epochs()), **options)
        self.step1 = members[0]
        self._hold(members, data)
        return members

    def _hold(self, members, data):
        """Take the members' weights, in one network, and name their runs in the method's folder."""
        self.model = members[0].model
        self._weights = [run.model.get_weights() for run in members]
        for run in members[1:]:  # of one architecture
            run.model = self.model
        self.folder = self._own_folder(data, members=[run.folder.name for run in members])
        dataset = self.folder.parents[2]
        names = [run.folder.relative_to(dataset).as_posix() for run in members]
        if not (self.folder / "members.json").exists():
            write_json(self.folder / "members.json", {"members": names})


class Ensemble(Networks):
    """Networks trained alike from other initial weights and orders (Lakshminarayanan et al. 2017).

    Each member is a run of `deterministic` by itself, the first that of this seed. The folder names them all.
    """

    name, title = "ensemble", "deep ensemble"

    def _paper_flops(self):
        return float(self.num_members)


class Budget2(Networks):
    """Networks that together have the epochs of one: what a posterior at the price of one training has to beat."""

    name, title, share = "budget_2", "two networks, half of the epochs each", 2
    needs_step1 = False


class Budget3(Networks):
    """Three of them."""

    name, title, share = "budget_3", "three networks, a third of the epochs each", 3
    needs_step1 = False


class Budget5(Networks):
    """Five of them."""

    name, title, share = "budget_5", "five networks, a fifth of the epochs each", 5
    needs_step1 = False


class EnsembleLonger(Networks):
    """The ensemble of `deterministic_longer`: each member has the epochs of steps 1 and 3, as the partial model has."""

    name, title = "ensemble_longer", "deep ensemble, each member with the epochs of steps 1 and 3"

    def _train(self, data):
        members, longer = self._train_members(data), []
        for index, weights in enumerate(self._weights):
            members[index].model.set_weights(weights)
            options = {**self._options(), "seed": training.member_seed(self.seed, index)}
            run = training.continued_run(members[index], data, self.recipe, method="deterministic_longer", **options)
            longer.append(run)
        members[0].model.set_weights(self._weights[0])
        self._hold(longer, data)
        self.trained = [*members, *longer]

    def _trainings(self, parts):
        members = {f"member{index}": parts.first for index in range(1, self.num_members)}
        return members | {f"longer{index}": parts.longer for index in range(self.num_members)}


class Snapshot(Networks):
    """From step 1's weights on, the learning rate restarts in cycles: the weights at the end of each are a sample.

    Five cycles, or one an epoch if step 3 has fewer epochs (Huang et al. 2017, there from initial weights).
    """

    name, title = "snapshot", "snapshot ensemble from the trained weights"
    sets = ("keep",)

    def _count_samples(self, num_samples):
        return min(MAX_CYCLES, self.recipe.bayes_epochs)

    def _train(self, data):
        self._train_step1(data)
        run = self._continue(data, self._use(keep="last"), cycles=self.num_samples)  # each cycle gives its last weights
        self._weights = run.snapshots
        self.num_samples = len(run.snapshots)  # fewer if training diverged

    def _trainings(self, parts):
        return {self.name: parts.longer}
