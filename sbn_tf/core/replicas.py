"""What a model needs to train data parallel, under a `tf.distribute` strategy of several replicas.

Keras 3.15's own models fail under `tf.distribute.MultiWorkerMirroredStrategy` in two places: the first batch, which
`fit` reduces over the replicas to learn its shapes, and the results of each step, of which it takes a mean over axis 0
although they are scalars. Under any strategy of several replicas they fail with several steps in one execution, with
XLA, and where the first batch does not divide evenly among the replicas.

As in Keras each replica averages over its own examples, and the replicas count alike. So the examples of a batch that
does not divide evenly do not: with one example on two replicas, of which one gets none, its loss counts half, the KL
whole. A dataset of `batch(n, drop_remainder=True)`, n a multiple of the replicas, has no such batch.
"""

from __future__ import annotations

import keras

__all__ = ["Distributed"]


class Distributed:
    """Mixin: a `keras.Model` that trains under `MirroredStrategy` and `MultiWorkerMirroredStrategy`.

    Without a strategy, and on another backend than TensorFlow, it changes nothing.

    Raises:
        ValueError: `compile` under several replicas with `steps_per_execution` > 1 or `jit_compile=True`.
    """

    def compile(self, *args, jit_compile="auto", steps_per_execution=1, **kwargs):
        """`keras.Model.compile`; under several replicas `jit_compile="auto"` means False."""
        if self._has_replicas():
            if steps_per_execution != 1 or jit_compile is True:
                raise ValueError(
                    "Expected steps_per_execution=1 and no XLA: TensorFlow cannot run them with several replicas. "
                    f"Received: steps_per_execution={steps_per_execution}, jit_compile={jit_compile}"
                )
            jit_compile = False
        super().compile(*args, jit_compile=jit_compile, steps_per_execution=steps_per_execution, **kwargs)

    def train_step(self, *args, **kwargs):
        """`keras.Model.train_step`; between workers each result has shape (1,)."""
        return self._with_axis(super().train_step(*args, **kwargs))

    def test_step(self, *args, **kwargs):
        """`keras.Model.test_step`; between workers each result has shape (1,)."""
        return self._with_axis(super().test_step(*args, **kwargs))

    def _with_axis(self, results):
        if not self._between_workers():
            return results
        return keras.tree.map_structure(lambda v: keras.ops.reshape(v, (1,)), results)

    def _maybe_symbolic_build(self, iterator=None, data_batch=None):
        """Keras's, with the batch of this process's first replica for the shapes."""
        if not (self._has_replicas() or self._between_workers()):
            return super()._maybe_symbolic_build(iterator, data_batch)
        strategy = self.distribute_strategy
        if iterator is not None:
            batch = next(next(iter(iterator))[2])  # of its steps' (begin, end, batches)
            data_batch = keras.tree.map_structure(lambda v: strategy.experimental_local_results(v)[0], batch)
        with strategy.scope():
            self._symbolic_build(data_batch=data_batch)

    def _has_replicas(self):
        return bool(getattr(self, "_distribute_strategy", None)) and self.distribute_strategy.num_replicas_in_sync > 1

    def _between_workers(self):
        extended = getattr(getattr(self, "_distribute_strategy", None), "extended", None)
        return extended is not None and extended._in_multi_worker_mode()
