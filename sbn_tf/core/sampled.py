"""A model that runs a network with random weights several times: its predictions, their uncertainty, and saving."""

from __future__ import annotations

import functools

import h5py
import keras
import numpy as np
from keras import ops

from sbn_tf.core.batch_norm import batch_norms
from sbn_tf.core.checks import check_choice, check_count
from sbn_tf.core.context import is_at_mean
from sbn_tf.core.examples import check_examples, check_inputs
from sbn_tf.core.graph import Graph
from sbn_tf.core.keras_internals import (
    added_losses,
    call_context,
    noise_states,
    of_any_backend,
    own_trained,
)
from sbn_tf.core.losses import set_added_shares
from sbn_tf.core.outputs import Outputs, class_axes, input_structure, is_samples, output_kind
from sbn_tf.core.overlap import spread_cuts
from sbn_tf.core.replicas import Distributed
from sbn_tf.core.sampler import Sampler, one_after_another, one_draw
from sbn_tf.core.weights import named_weights
from sbn_tf.layers import masked_layers

__all__ = ["SameDraws", "SampledModel", "refuse_posterior_mean", "settle_batch_norm"]

_MOST_SAMPLES = 100_000  # each is a pass, and its outputs are kept


class SampledModel(Distributed):
    """A `keras.Model` that calls its network `num_samples` times, each time with another draw of its weights.

    In each sample every weight is drawn once, those of shared layers too. Layers before the first Bayesian weight run
    once for all samples. Samples of one prediction follow one another, so its memory does not grow with their number.
    Results are in float32 (float64 of a float64 network):

    | | network of probabilities | `from_logits=True` |
    |---|---|---|
    | `predict`, `evaluate`, `model(x)` | mean probability | logit of the mean probability |
    | `predict_samples` | probability of each sample | probability of each sample |
    | `predict_uncertainty` | mean probability, nats | mean probability, nats |

    Input shape: the network's. Output shape: the network's; `{"samples": [...]}` in training by the estimator "all".

    Args:
        network: built Functional or Sequential model with masked layers.
        num_samples: draws in each prediction. >= 1.
        probabilities: "sigmoid", "softmax", None (the outputs are no probabilities), a list of these for several
            outputs, or "auto": by the activation of the last layer.
        from_logits: the outputs are logits of these probabilities.
        batch_norm: "frozen", "statistics" or "train", see `settle_batch_norm`.
        class_axis: axis of the classes in the outputs, the batch included; None: that of the last softmax, or of the
            compiled loss, or else the last.
    """

    def __init__(
        self, network, num_samples: int, probabilities, from_logits: bool, batch_norm: str, class_axis=None, **kwargs
    ):
        super().__init__(**kwargs)
        check_count("num_samples", num_samples, _MOST_SAMPLES)
        check_choice("batch_norm", batch_norm, ("frozen", "statistics", "train"))
        self.network, self._num_samples, self.batch_norm = network, int(num_samples), batch_norm
        settle_batch_norm(network, batch_norm)
        own = output_kind(network)
        kinds = own if probabilities == "auto" else probabilities
        if from_logits is True and any(own if isinstance(own, list) else [own]):
            raise ValueError(f"Expected from_logits=False: the network's {own} gives probabilities. Received: True")
        self.class_axis = class_axis
        self.outputs_of_samples = Outputs(kinds, from_logits, class_axes(network, class_axis))
        graph, samplers = Graph(network), {}
        self._graph, self._samplers = lambda: graph, lambda: samplers  # hidden from Keras: no parts of this model

    @property
    def graph(self) -> Graph:
        """The operations of the network."""
        return self._graph()

    @property
    def probabilities(self):
        """What the outputs are: "sigmoid", "softmax", None, or a list of these."""
        return self.outputs_of_samples.probabilities

    @property
    def from_logits(self) -> bool:
        """Whether the outputs are logits."""
        return self.outputs_of_samples.from_logits

    @property
    def num_samples(self) -> int:
        """Posterior draws in each step and prediction. After a change the compiled functions are traced again."""
        return self._num_samples

    @num_samples.setter
    def num_samples(self, value):
        check_count("num_samples", value, _MOST_SAMPLES)
        self._num_samples = int(value)
        self.train_function = self.test_function = self.predict_function = None

    @property
    def num_bayesian(self) -> int:
        """How many weight entries are Bayesian."""
        return sum(sum(layer.num_bayesian.values()) for layer in masked_layers(self.network))

    def kl_divergence(self):
        """KL of the whole posterior from its prior, in nats: a scalar."""
        terms = [layer.kl_divergence() for layer in masked_layers(self.network)]
        return sum(terms[1:], terms[0]) if terms else ops.zeros(())

    def scales(self) -> np.ndarray:
        """Posterior standard deviations of all Bayesian entries, layer by layer: (k,)."""
        posteriors = [one for layer in masked_layers(self.network) for _, one in layer.posteriors.items()]
        found = [ops.convert_to_numpy(one.scale_of_entries()) for one in posteriors]
        return np.concatenate(found) if found else np.zeros(0, "float32")

    @property
    def trainable(self) -> bool:
        """Whether anything trains. Batch norm stays as `batch_norm` says."""
        return self._trainable

    @trainable.setter
    def trainable(self, value):
        keras.Model.trainable.fset(self, value)
        if hasattr(self, "batch_norm"):
            settle_batch_norm(self.network, self.batch_norm)

    @property
    def output_names(self) -> list[str]:
        """The network's, by which losses, weights of losses and metrics may be given."""
        return self.network.output_names

    @property
    def input_shape(self):
        """The network's, batch first: a tuple, or a structure of them for several inputs."""
        return self.network.input_shape

    @property
    def output_shape(self):
        """The network's, batch first: of each prediction, not of samples."""
        return self.network.output_shape

    def build(self, input_shape=None):
        """Nothing to do: the network is built."""
        self.built = True

    def call(self, inputs, training=None):
        """The predictive mean."""
        with call_context(self):
            return self.predictive_mean(inputs)

    def predictive_mean(self, inputs):
        """Mean of the samples' probabilities, in the network's own units (logits stay logits)."""
        outputs, num_samples = self.outputs_of_samples, self.num_samples
        with self.graph.sharing() as losses:
            first = one_draw(self.network, inputs, False, 0)

            def step(sample, state):
                return outputs.plus(state, outputs.to_average(one_draw(self.network, inputs, False, sample)))

            state = outputs.to_average(first)
            if added_losses(self.network):  # evaluate needs each of them
                for sample in range(1, num_samples):
                    state = step(sample, state)
            else:
                state = one_after_another(step, state, 1, num_samples, self.network.non_trainable_variables)
        set_added_shares(self, dict.fromkeys(losses, 1.0), 1 / num_samples)
        return outputs.averaged(state, first, num_samples)

    def evaluate(self, x=None, y=None, *args, **kwargs):
        """`keras.Model.evaluate`; compiles first, by the defaults of `compile`, if needed."""
        if not self.compiled:
            self.compile()
        check_examples(self.network, self.loss, x, y)
        return super().evaluate(x, y, *args, **kwargs)

    def predict(self, x, *args, **kwargs):
        """`keras.Model.predict`: the predictive mean."""
        check_inputs(self.network, x)
        return super().predict(x, *args, **kwargs)

    def compute_metrics(self, x, y, y_pred, sample_weight=None):
        """Metrics of the predictive mean, also where training returned one output a draw."""
        if is_samples(self.network, y_pred):
            outputs, samples = self.outputs_of_samples, y_pred["samples"]
            total = functools.reduce(outputs.plus, (outputs.to_average(sample) for sample in samples))
            y_pred = outputs.averaged(total, samples[0], len(samples))
        return super().compute_metrics(x, y, y_pred, sample_weight)

    def predict_samples(self, x, num_samples: int | None = None, batch_size=None, verbose=0):
        """Outputs of `num_samples` posterior draws, as probabilities: (samples, batch, ...) for each output.

        Each batch has draws of its own: the samples of two images from different batches share no weights. Of a
        posterior of M members draw s is member s modulo M, in every batch.
        """
        refuse_posterior_mean()
        check_inputs(self.network, x)
        outputs = self._sampler("samples", num_samples).by_slices(x, batch_size, verbose)
        return keras.tree.map_structure(lambda a: np.moveaxis(a, 1, 0), outputs)

    def predict_draw(self, x, number: int):
        """Outputs of one batch by draw `number` of the weights, as probabilities: (batch, ...) for each output."""
        refuse_posterior_mean()
        sampler = self._sampler("one", 1)
        sampler.number.assign(number)
        return sampler.predict_on_batch(x)

    def predict_masks(self, x, num_masks: int | None = None, batch_size=None, verbose=0):
        """Masks of a segmentation that vary as the answer may: bool (num_masks, batch, ...) for each output.

        Mask m is cut from draw m at (m - 1/2) / num_masks. Cut at 1/2, each would hide what its draw is unsure of: the
        raters' masks of an image differ more than the probable outlines of five networks do.

        Args:
            x, batch_size, verbose: as in `predict`.
            num_masks: >= 1; None: `num_samples`. More than a posterior has members use each several times.

        Raises:
            ValueError: a number of masks that is none, or an output that is no probability of a pixel (sigmoid).
        """
        kinds = self.outputs_of_samples.probabilities
        if any(kind != "sigmoid" for kind in (kinds if isinstance(kinds, list) else [kinds])):
            raise ValueError(f"Expected sigmoid outputs, of which masks are cut. Received: {kinds}")
        samples = self.predict_samples(x, num_masks, batch_size, verbose)
        return keras.tree.map_structure(
            lambda a: np.moveaxis(np.moveaxis(a, 0, -1) > spread_cuts(len(a)), -1, 0), samples
        )

    def predict_uncertainty(self, x, num_samples: int | None = None, batch_size=None, verbose=0):
        """How sure the model is, and why not.

        Returns:
            dict of arrays: `mean` (batch, ...) predictive probability; in nats `total_entropy` of the mean,
            `expected_entropy` of the samples (aleatoric) and `mutual_information`, their difference (epistemic).
            Sigmoid outputs: one value an output. Softmax: summed over classes, (batch, ...) without the class axis.
            Several outputs: such a dict for each, in the network's structure; of one that is no probability beside them
            `mean` and `variance`, the variance over draws.

        Raises:
            ValueError: no output is a probability, or `x` does not fit the network.
        """
        refuse_posterior_mean()
        check_inputs(self.network, x)
        self.outputs_of_samples.check_entropies()
        return self._sampler("uncertainty", num_samples).by_slices(x, batch_size, verbose)

    def export(
        self, filepath, format="tf_saved_model", verbose=None, input_signature=None, outputs: str = "mean", **kwargs
    ):
        """`keras.Model.export` for serving, with `num_samples` draws in each call.

        The states of the noise seeds are part of what is exported: each call of the served model goes on from them, so
        two calls differ, and every fresh load repeats the sequence, with which this model goes on, too.

        Args:
            filepath, format, verbose, input_signature: as in Keras.
            outputs: "mean": what `predict` returns. "uncertainty": what `predict_uncertainty` returns: a dict with
                mean, total_entropy, expected_entropy and mutual_information; of several outputs each with its name
                before it, such as "lesion_mean": the keys of a dict of outputs, else names of layers, a second use
                numbered.
            kwargs: as in Keras.

        Raises:
            ValueError: an unknown kind of outputs, outputs without an entropy, a format that cannot draw random numbers
                (ONNX, LiteRT), or another backend than TensorFlow.
        """
        check_choice("outputs", outputs, ("mean", "uncertainty"))
        if keras.backend.backend() != "tensorflow":
            raise ValueError(
                f"Expected Keras on TensorFlow for export. Received: KERAS_BACKEND={keras.backend.backend()}. Save the "
                "model here, and export the .keras file there."
            )
        if format in ("onnx", "litert"):
            raise ValueError(
                f"Expected format='tf_saved_model'. Received: {format!r}, whose graphs cannot draw random numbers.\n"
                "Networks of `sbn-tf train` go there with fixed draws: sbn_tf.load(folder).export(path, format)."
            )
        refuse_posterior_mean()
        if input_signature is None:
            structure = input_structure(self.network)
            input_signature = [
                keras.tree.map_structure(lambda t: keras.InputSpec(t.dtype, t.shape, name=t.name), structure)
            ]
        if outputs == "mean":
            super().export(filepath, format, verbose, input_signature, **kwargs)
        else:
            self.outputs_of_samples.check_entropies()
            self._sampler("served", None).export(filepath, format, verbose, input_signature, **kwargs)

    def quantize(self, *args, **kwargs):
        """`keras.Model.quantize`, of layers without Bayesian entries; the others stay as they are, with a warning."""
        super().quantize(*args, **kwargs)
        self.forget_samplers()

    def forget_samplers(self) -> None:
        """Trace predictions again: they were traced with the masks of before."""
        self._samplers().clear()

    def _sampler(self, kind, num_samples):
        num_samples = self.num_samples if num_samples is None else num_samples
        check_count("num_samples", num_samples, _MOST_SAMPLES)
        key = (kind, num_samples)
        if key not in self._samplers():
            sampler = Sampler(self, kind, num_samples)
            sampler.compile(jit_compile=False)
            self._samplers()[key] = sampler
        return self._samplers()[key]

    # ---- functions are not traced at the posterior mean, where they would stay ----

    def make_train_function(self, force=False):
        """`keras.Model.make_train_function`, of `fit` and `train_on_batch`; not within `posterior_mean()`."""
        refuse_posterior_mean()
        if not self.optimizer.built:  # by its first step it would be traced twice, and TensorFlow keeps each trace
            self.optimizer.build(self.trainable_variables)
        return super().make_train_function(force)

    def make_test_function(self, force=False):
        """`keras.Model.make_test_function`, of `evaluate` and `test_on_batch`; not within `posterior_mean()`."""
        refuse_posterior_mean()
        return super().make_test_function(force)

    def make_predict_function(self, force=False):
        """`keras.Model.make_predict_function`, of `predict` and `predict_on_batch`; not within `posterior_mean()`."""
        refuse_posterior_mean()
        return super().make_predict_function(force)

    # ---- saving ----

    def get_config(self):
        """The network and what is needed to make the model again."""
        return {
            **super().get_config(),
            "network": keras.saving.serialize_keras_object(self.network),
            "num_samples": self.num_samples,
            "probabilities": self.probabilities,
            "from_logits": self.from_logits,
            "batch_norm": self.batch_norm,
            "class_axis": self.class_axis,
            "frozen_weights": self._frozen_alone(),
        }

    def _frozen_alone(self):
        """Keys of what does not train although its layer does (`variable.trainable = False`): no config has them."""
        weights = named_weights(self.network).items()
        return [
            key
            for key, weight in weights
            if weight.layer.trainable
            and not weight.variable.trainable
            and any(weight.variable is one for one in own_trained(weight.layer))
        ]

    @classmethod
    def from_config(cls, config, custom_objects=None):
        """Model from its config."""
        config = dict(config)
        network = keras.saving.deserialize_keras_object(config.pop("network"), custom_objects=custom_objects)
        weights = named_weights(network)
        for key in config.pop("frozen_weights", None) or ():
            weights[key].variable.trainable = False
        return cls(network=network, **config)

    def get_compile_config(self):
        """How the model is compiled, for every backend."""
        return of_any_backend(super().get_compile_config())

    def compile_from_config(self, config):
        """Compile again after loading, optimiser state included."""
        self.compile(**keras.saving.deserialize_keras_object(config))
        if self.optimizer is not None:
            self.optimizer.build(self.trainable_variables)

    def load_weights(self, filepath, **kwargs):
        """`keras.Model.load_weights`; a file of the network alone, masked or deterministic, is read as such."""
        if str(filepath).endswith(".weights.h5") and _is_of_network(filepath, self.network):
            return self.network.load_weights(filepath, **kwargs)
        return super().load_weights(filepath, **kwargs)


class SameDraws:
    """Predictions of a model whose noise starts in each call as it is now.

    Args:
        model: a `SampledModel`.
    """

    def __init__(self, model: SampledModel):
        self.model = model
        self.noise = [(state, ops.convert_to_numpy(state)) for state in noise_states(model)]

    def start(self) -> None:
        """Set the noise to where it was when this was made."""
        for state, start in self.noise:
            state.assign(start)

    def samples(self, images: np.ndarray, num_samples: int) -> np.ndarray:
        """Outputs of one batch: (num_samples, batch, ...)."""
        self.start()
        return self.model.predict_samples(images, num_samples=num_samples, batch_size=len(images))

    def one(self, images: np.ndarray, number: int) -> np.ndarray:
        """Outputs of one batch by draw `number` alone: of members that of `samples`. Gaussians go on from draw 0 on."""
        if number == 0:
            self.start()
        return self.model.predict_draw(images, number)


def settle_batch_norm(network: keras.Model, how: str) -> None:
    """What of batch norm trains: nothing ("frozen"), its running statistics alone ("statistics"), or all of it."""
    for layer in batch_norms(network):
        if how == "frozen":  # Keras then runs it in inference mode
            layer.trainable = False
        elif how == "statistics":
            for variable in (layer.gamma, layer.beta):
                if variable is not None:
                    variable.trainable = False


def refuse_posterior_mean() -> None:
    """Refuse to trace a function within `posterior_mean()`, which acts on what is being traced and would last."""
    if is_at_mean():
        raise ValueError(
            "Expected fit, evaluate and predict outside posterior_mean(): it acts on what is being traced, and "
            "would last. For the network at its locs: with posterior_mean(): bnn.network(x)"
        )


def _is_of_network(path, network):
    """Whether a weights file is of a network such as this; else it is of a `SampledModel`, which wraps one."""
    with h5py.File(path, "r") as file:
        children = list(file["layers"].values()) if "layers" in file else []
        wraps = len(children) == 1 and "layers" in children[0]
        return not (wraps and len(children[0]["layers"]) == len(network.layers))
