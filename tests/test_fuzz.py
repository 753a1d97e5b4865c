"""Random small networks of all supported layers, made sparse Bayesian: the laws that hold for every one of them.

Hypothesis builds the networks, always the same ones, so that a failure here is a failure everywhere. To look at many
more, new ones at each run: `SBN_TF_FUZZ=1000 pytest tests/test_fuzz.py`; a failure prints the draws that build its
network.
"""

import os
import tempfile

import hypothesis
import keras
import numpy as np
from hypothesis import strategies as st
from keras import layers as kl
from keras import ops

from sbn_tf.core.batch import part_bounds
from sbn_tf.core.conversion import to_deterministic
from sbn_tf.core.graph import Graph
from sbn_tf.layers import batch_draws, masked_layers, posterior_mean, posterior_sample
from sbn_tf.partial_bayes import to_partial_bayes
from sbn_tf.saliency import Masks, named_weights

EXAMPLES = int(os.environ.get("SBN_TF_FUZZ", "0"))
BATCH, SAMPLES = 5, 2  # parts of two and of three


def one_of(**options):
    """Arguments of a layer, each drawn from its list."""
    return st.fixed_dictionaries({name: st.sampled_from(values) for name, values in options.items()})


ACTIVATIONS = ["relu", "tanh", None]
CONV = {"filters": [2, 4], "kernel_size": [1, 2, 3], "activation": ACTIVATIONS, "use_bias": [True, False]}
SPREAD = [{}, {"strides": 2}, {"dilation_rate": 2}, {"groups": 2}, {"strides": 2, "padding": "same"}]
UPWARD = [{}, {"strides": 2}, {"strides": 2, "output_padding": 1}]  # TensorFlow dilates none of these on a CPU


def conv(padding=("valid", "same"), more=SPREAD, **changed):
    """Arguments of a convolution; `more` are settings that only fit together as they are listed."""
    plain = one_of(**{**CONV, "padding": padding, **changed})
    return st.builds(lambda a, b: {**a, **b}, plain, st.sampled_from(more))


DEPTH = {"depth_multiplier": [1, 2], "kernel_size": [1, 3], "use_bias": [True, False]}
ANYWHERE = {
    kl.Dense: one_of(units=[2, 3], activation=ACTIVATIONS, use_bias=[True, False]),
    kl.BatchNormalization: one_of(scale=[True, False]),
    kl.LayerNormalization: one_of(center=[True, False]),
    kl.Dropout: one_of(rate=[0.5]),
    kl.Activation: one_of(activation=["relu", "sigmoid"]),
}
# rank of the inputs, batch included -> what may come next
LAYERS = {
    2: {**ANYWHERE, kl.RepeatVector: one_of(n=[2])},
    3: {
        **ANYWHERE,
        kl.EinsumDense: one_of(equation=["abc,cd->abd"], bias_axes=["d", None], activation=ACTIVATIONS),
        kl.Conv1D: conv(("valid", "same", "causal")),
        kl.Conv1DTranspose: conv(more=UPWARD),
        kl.DepthwiseConv1D: one_of(**DEPTH, padding=["valid", "same"]),
        kl.SeparableConv1D: conv(kernel_size=[1, 3], more=[{}, {"depth_multiplier": 2}]),
        kl.MultiHeadAttention: one_of(num_heads=[2], key_dim=[2]),
        kl.LSTM: one_of(units=[2], return_sequences=[True, False]),
        kl.GRU: one_of(units=[3], return_sequences=[True]),
        kl.MaxPooling1D: one_of(pool_size=[2], padding=["same"]),
        kl.ZeroPadding1D: one_of(padding=[1]),
        kl.Permute: one_of(dims=[(2, 1)]),
        kl.GlobalAveragePooling1D: st.just({}),
        kl.Flatten: st.just({}),
    },
    4: {
        **ANYWHERE,
        kl.Conv2D: conv(),
        kl.Conv2DTranspose: conv(more=UPWARD),
        kl.DepthwiseConv2D: one_of(**DEPTH, padding=["valid", "same"]),
        kl.SeparableConv2D: conv(kernel_size=[1, 3], more=[{}, {"depth_multiplier": 2}]),
        kl.AveragePooling2D: one_of(pool_size=[2], padding=["same"]),
        kl.UpSampling2D: st.just({}),
        kl.ZeroPadding2D: one_of(padding=[1]),
        kl.Cropping2D: one_of(cropping=[((0, 1), (0, 0))]),
        kl.GlobalMaxPooling2D: st.just({}),
        kl.Flatten: st.just({}),
    },
    5: {
        **ANYWHERE,
        kl.Conv3D: conv(kernel_size=[1, 2], more=[{}, {"strides": 2}]),
        kl.Conv3DTranspose: conv(kernel_size=[1, 2], more=[{}, {"strides": 2}]),
        kl.ZeroPadding3D: one_of(padding=[((0, 1), (0, 0), (0, 0))]),
        kl.Cropping3D: one_of(cropping=[((0, 0), (1, 0), (0, 0))]),
        kl.GlobalAveragePooling3D: st.just({}),
        kl.Flatten: st.just({}),
    },
}
INPUTS = {"vector": (4,), "sequence": (6, 2), "image": (5, 5, 2), "volume": (3, 3, 3, 2), "text": (5,), "word": ()}
POOLING = {3: kl.GlobalAveragePooling1D, 4: kl.GlobalAveragePooling2D, 5: kl.GlobalMaxPooling3D}
NEED_SIZES = (kl.Flatten, kl.Permute, kl.EinsumDense)
LARGEST = 400  # numbers in one example of one tensor


class Builder:
    """A random network: each step adds a layer to one of its open ends."""

    def __init__(self, draw):
        self.draw, self.inputs, self.ends, self.used, self.tables, self.count = draw, [], [], [], [], 0
        self.open = draw(st.booleans())  # its inputs get sizes that are known only at the call

    def network(self):
        for _ in range(self.draw(st.integers(1, 2))):
            self.add_input(self.draw(st.sampled_from(list(INPUTS))))
        for _ in range(self.draw(st.integers(1, 5))):
            self.step()
        ends = self.draw(st.integers(1, 2))
        outputs = [self.head(x) for x in [self.merged(), *self.ends][:ends]]
        model = keras.Model(self.inputs, outputs)
        if self.open:
            model = of_open_sizes(model)
        for layer in model._flatten_layers(include_self=False):
            if layer.weights and self.draw(st.integers(0, 5)) == 5:
                layer.trainable = False
        return model

    def name(self, layer_class):
        self.count += 1
        return f"{layer_class.__name__.lower()}_{self.count}"

    def add_input(self, kind):
        tokens = kind in ("text", "word")
        dtype = "int32" if tokens else keras.config.dtype_policy().compute_dtype  # else Keras's float32
        x = keras.Input(INPUTS[kind], dtype=dtype, name=f"input_{len(self.inputs)}_{kind}")
        self.inputs.append(x)
        if tokens:
            self.tables = self.tables or [kl.Embedding(5, 3, name=self.name(kl.Embedding))]
            if self.draw(st.booleans()):
                self.tables.append(kl.Embedding(5, 3, name=self.name(kl.Embedding)))
        self.ends.append(self.tables[-1](x) if tokens else x)

    def step(self):
        i = self.draw(st.integers(0, len(self.ends) - 1))
        x, how = (
            self.ends[i],
            self.draw(st.sampled_from(["layer"] * 5 + ["skip", "again", "again", "nested", "branch"])),
        )
        if how == "again":
            fitting = [layer for layer, shape in self.used if shape == x.shape[1:] or is_dense_of(layer, shape, x)]
            if fitting:
                self.ends[i] = self.called(self.draw(st.sampled_from(fitting)), x)
        elif how == "nested":
            self.ends[i] = self.nested(x)
        elif how == "branch":
            self.ends.append(self.layer(x))
        else:
            y = self.layer(x)
            if how == "skip" and y.shape == x.shape:
                y = kl.Add(name=self.name(kl.Add))([x, y])
            elif how == "skip" and y.shape[1:-1] == x.shape[1:-1]:
                y = kl.Concatenate(name=self.name(kl.Concatenate))([x, y])
            self.ends[i] = y

    def layer(self, x):
        """Outputs of a new layer on x; x itself where the layer that was drawn does not fit its size."""
        table = LAYERS[len(x.shape)]
        layer_class = self.draw(st.sampled_from(list(table)))
        arguments = self.draw(table[layer_class])
        if self.open and layer_class in NEED_SIZES:
            return x
        if layer_class is kl.EinsumDense:
            arguments["output_shape"] = (x.shape[1], 2)
        layer = layer_class(**arguments, name=self.name(layer_class))
        inputs = [x, x] if layer_class is kl.MultiHeadAttention else [x]
        try:
            shape = layer_class(**arguments).compute_output_spec(*inputs).shape
        except ValueError:  # a kernel larger than its inputs, groups that do not divide the channels
            return x
        if 0 in shape or np.prod(shape[1:]) > LARGEST:
            return x
        self.used.append((layer, x.shape[1:]))
        return self.called(layer, x)

    def called(self, layer, x):
        return layer(x, x) if isinstance(layer, kl.MultiHeadAttention) else layer(x)

    def nested(self, x):
        inner, outer = keras.Input(x.shape[1:], dtype=x.dtype), self.ends
        y = self.layer(self.layer(inner))
        self.ends = outer
        if y is inner:
            return x
        self.used = [(layer, shape) for layer, shape in self.used if not self.is_inside(layer, y, inner)]
        model = keras.Model(inner, y, name=self.name(keras.Model))
        self.used.append((model, x.shape[1:]))
        return model(x)

    def is_inside(self, layer, y, inner):
        return layer in keras.Model(inner, y).layers

    def merged(self):
        """One open end for all of them, so that no input is left out."""
        flat = [self.flat(x) for x in self.ends]
        return flat[0] if len(flat) == 1 else kl.Concatenate(name=self.name(kl.Concatenate))(flat)

    def flat(self, x):
        if len(x.shape) == 2:
            return x
        layer_class = POOLING[len(x.shape)] if self.open else kl.Flatten
        return layer_class(name=self.name(layer_class))(x)

    def head(self, x):
        return kl.Dense(2, name=self.name(kl.Dense))(self.flat(x))


def is_dense_of(layer, shape, x):
    """Whether x, of any rank, has the features that a Dense layer has seen."""
    return isinstance(layer, kl.Dense) and shape[-1] == x.shape[-1]


def of_open_sizes(model):
    """The network with the sizes of its inputs left open; as it is where one of its layers must know them."""
    shapes = [(None,) * (len(x.shape) - 1) for x in model.inputs]
    shapes = [s if "int" in x.dtype else (*s[:-1], x.shape[-1]) for s, x in zip(shapes, model.inputs, strict=True)]
    inputs = [keras.Input(s, dtype=x.dtype, name=x.name) for s, x in zip(shapes, model.inputs, strict=True)]
    try:
        return keras.models.clone_model(model, input_tensors=inputs)
    except (ValueError, TypeError):
        return model


def random_masks(draw, model):
    """A mask for each weight: of no entry, one, every third, or all."""
    masks = {}
    for key, weight in named_weights(model).items():
        if keras.backend.is_float_dtype(weight.variable.dtype) and weight.variable.trainable:
            masks[key] = np.zeros(weight.variable.shape, bool)
            every = {"none": 0, "one": masks[key].size, "third": 3, "all": 1}[draw(MASKS)]
            if every:
                masks[key].flat[::every] = True
    return Masks(masks)


MASKS = st.sampled_from(["none", "none", "one", "third", "all"])


def random_inputs(model, seed=0):
    """Integers and float32 numbers: what `predict` hands to a network of any precision."""
    rng, shapes = np.random.default_rng(seed), [(BATCH, *INPUTS[x.name.split("_")[-1]]) for x in model.inputs]
    return [
        rng.integers(0, 5, shape) if "int" in x.dtype else rng.normal(size=shape).astype("float32")
        for x, shape in zip(model.inputs, shapes, strict=True)
    ]


def numbers(model):
    return [ops.convert_to_numpy(v) for v in model.variables]


def arrays(outputs):
    return [ops.convert_to_numpy(y) for y in keras.tree.flatten(outputs)]


def close(found, expected, dtype, what):
    tolerance = {"float32": 1e-4, "float64": 1e-10}[dtype]
    for a, b in zip(arrays(found), arrays(expected), strict=True):
        assert a.shape == b.shape, (what, a.shape, b.shape)
        assert np.max(np.abs(a - b)) <= tolerance * (1 + np.max(np.abs(b))), (what, np.max(np.abs(a - b)))


def noise_seeds(network):
    return [layer.posteriors.noise_seed.state for layer in masked_layers(network)]


def stacked(per_sample):
    return [np.stack(s) for s in zip(*map(arrays, per_sample), strict=True)]


def all_masks(network):
    """Mask by the end of its key: the layer's and the weight's names."""
    return {f"{layer.name}/{name}": layer.mask(name) for layer in masked_layers(network) for name in layer.posteriors}


def check_laws(model, masks, dtype, estimator):
    """What must hold for this network and these masks."""
    x = random_inputs(model)
    before, expected = numbers(model), arrays(model(x, training=False))
    options = {"num_samples": SAMPLES, "initial_scale": 0.3, "estimator": estimator, "seed": 1}
    bnn = to_partial_bayes(model, masks, num_train=BATCH, **options)
    network = bnn.network

    # which entries
    chosen = {key: mask for key, mask in masks.items() if mask.any()}
    assert bnn.num_bayesian == masks.num_bayesian == sum(mask.sum() for mask in chosen.values())
    held = all_masks(network)
    assert len(held) == len(chosen)
    for key, mask in chosen.items():
        (found,) = [m for name, m in held.items() if f"/{key}".endswith(f"/{name}")]
        np.testing.assert_array_equal(found, mask)

    # at the mean, and with no scale: the original
    with posterior_mean():
        close(network(x, training=False), expected, dtype, "the posterior mean is the original")
    close(to_deterministic(bnn)(x, training=False), expected, dtype, "the way back is the original")
    for layer in masked_layers(network):
        for name in layer.posteriors:
            layer.posteriors[name].untransformed_scale.assign(ops.full((layer.num_bayesian[name],), -800.0))
    close(network(x, training=False), expected, dtype, "a scale of 0 is the original")
    for how in ("split", "flipout", "local"):
        with batch_draws(how, SAMPLES, shared=Graph(network).reused_layers()):
            close(network(x, training=False), expected, dtype, f"a scale of 0 is the original under {how}")
    for layer in masked_layers(network):
        for name in layer.posteriors:
            layer.posteriors[name].untransformed_scale.assign(ops.full((layer.num_bayesian[name],), -1.0))

    # the shared trunk: what S passes give
    seeds = [ops.convert_to_numpy(s) for s in noise_seeds(network)]
    together = bnn.predict_samples(x)
    put_back(network, seeds)
    passes = []
    for _ in range(SAMPLES):
        with posterior_sample():
            passes.append(network(x, training=False))
    close(together, stacked(passes), dtype, "shared trunk")

    # split draws: what one call on each part gives
    put_back(network, seeds)
    with batch_draws("split", SAMPLES):
        whole = arrays(network(x, training=False))
    put_back(network, seeds)
    parts = []
    for start, stop in part_bounds(BATCH, SAMPLES):
        with posterior_sample():
            parts.append(arrays(network([a[start:stop] for a in x], training=False)))
    close(whole, [np.concatenate(p) for p in zip(*parts, strict=True)], dtype, "split in one call")

    # one step
    frozen = {k: ops.convert_to_numpy(w.variable) for k, w in named_weights(network).items() if is_frozen(w)}
    trained = {k: ops.convert_to_numpy(w.variable) for k, w in named_weights(network).items() if k not in frozen}
    bnn.compile(keras.optimizers.SGD(0.01), "mse", run_eagerly=True)
    history = bnn.fit(x, [np.ones((BATCH, 2))] * len(model.outputs), batch_size=BATCH, verbose=0).history
    assert np.isfinite(history["loss"]).all()
    after = {k: ops.convert_to_numpy(w.variable) for k, w in named_weights(network).items()}
    for key, values in frozen.items():
        if "seed" not in key:
            np.testing.assert_array_equal(after[key], values, err_msg=key)
    scales = [k for k in trained if k.endswith("untransformed_scale")]
    assert all((after[k] != trained[k]).any() for k in scales), scales  # the KL reaches every one
    for old, new in zip(before, numbers(model), strict=True):
        np.testing.assert_array_equal(old, new, err_msg="the original changed")

    # saving
    with posterior_mean():
        mean = arrays(network(x, training=False))
    with tempfile.TemporaryDirectory() as folder:
        bnn.save(f"{folder}/bnn.keras")
        again = keras.saving.load_model(f"{folder}/bnn.keras")
    with posterior_mean():
        close(again.network(x, training=False), mean, dtype, "saved and loaded")
    np.testing.assert_array_equal(again.scales(), bnn.scales())
    assert held.keys() == all_masks(again.network).keys()
    for name, mask in all_masks(again.network).items():
        np.testing.assert_array_equal(mask, held[name])
    close(to_deterministic(again)(x, training=False), mean, dtype, "the way back after training")


def put_back(network, seeds):
    for state, seed in zip(noise_seeds(network), seeds, strict=True):
        state.assign(seed)


def is_frozen(weight):
    return not (weight.variable.trainable and weight.layer.trainable)


@hypothesis.settings(
    max_examples=EXAMPLES or 7,
    derandomize=not EXAMPLES,
    deadline=None,
    database=None,
    phases=[hypothesis.Phase.generate],  # networks are small as they come; to shrink one takes many minutes
    suppress_health_check=list(hypothesis.HealthCheck),
    print_blob=True,
)
@hypothesis.given(data=st.data(), dtype=st.sampled_from(["float32", "float32", "float64"]))
def test_the_laws_hold_for_random_networks(data, dtype):
    keras.backend.clear_session()
    keras.utils.set_random_seed(0)
    keras.config.set_dtype_policy(dtype)
    try:
        model = Builder(data.draw).network()
        masks = random_masks(data.draw, model)
        hypothesis.assume(any(mask.any() for mask in masks.values()))
        check_laws(model, masks, dtype, data.draw(st.sampled_from(["all", "split", "flipout", "local"])))
    finally:
        keras.config.set_dtype_policy("float32")
