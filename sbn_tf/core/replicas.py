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

from sbn_tf.core.keras_internals import strategy_of, with_symbolic_build

__all__ = ["Distributed"]


def _batch_for_shapes(model, iterator, data_batch):
    """The batch of this process's first replica; None without several replicas or workers, where Keras knows it."""
    if not (_has_replicas(model) or _is_between_workers(model)):
        return None
    if iterator is None:
        return data_batch
    batch = next(next(iter(iterator))[2])  # of its steps' (begin, end, batches)
    local = model.distribute_strategy.experimental_local_results
    return keras.tree.map_structure(lambda v: local(v)[0], batch)


@with_symbolic_build(_batch_for_shapes)
class Distributed(keras.Model):
    """A `keras.Model` that trains under `MirroredStrategy` and `MultiWorkerMirroredStrategy`.

    Without a strategy, and on another backend than TensorFlow, it is a plain model.

    Raises:
        ValueError: `compile` under several replicas with `steps_per_execution` > 1 or `jit_compile=True`.
    """

    def compile(self, *args, jit_compile="auto", steps_per_execution=1, **kwargs):
        """`keras.Model.compile`; under several replicas `jit_compile="auto"` means False."""
        if _has_replicas(self):
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
        if not _is_between_workers(self):
            return results
        return keras.tree.map_structure(lambda v: keras.ops.reshape(v, (1,)), results)


def _has_replicas(model: keras.Model) -> bool:
    """Whether a model was made under a strategy of several replicas."""
    strategy = strategy_of(model)
    return strategy is not None and strategy.num_replicas_in_sync > 1


def _is_between_workers(model: keras.Model) -> bool:
    """Whether a model was made under a strategy of several workers."""
    extended = getattr(strategy_of(model), "extended", None)
    return extended is not None and extended._in_multi_worker_mode()
