"""Each name borrowed from Keras's insides, against what a public way shows: a failure says what Keras has changed."""

import contextlib
import importlib.util
import inspect

import keras
import numpy as np
import pytest
import tensorflow as tf
from keras import layers as kl
from keras import ops

from sbn_tf.core import keras_internals as inner
from sbn_tf.core.context import current_graph
from sbn_tf.core.sharing import run_operations_by

pytestmark = pytest.mark.tensorflow


class Holder(kl.Layer):
    """A layer with a weight of its own, a sublayer and noise."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.inside = kl.Dense(2, name="inside")
        self.noise = keras.random.SeedGenerator(1)
        self.seen = []

    def build(self, shape):
        """One number that trains, one that does not."""
        self.inside.build(shape)
        self.own = self.add_weight(name="own", shape=(1,))
        self.count = self.add_weight(name="count", shape=(1,), trainable=False)

    def call(self, x, training=False, factor=1.0):
        """Note the arguments; add a loss."""
        self.seen.append((training, factor, inner.is_called_by_another(self)))
        self.add_loss(ops.sum(self.own))
        return self.inside(x) * factor


def two_layers():
    x = keras.Input((3,), name="x")
    return keras.Model(x, kl.Dense(2, name="b")(kl.Dense(4, name="a")(x)))


def names(things):
    return [thing.name for thing in things]


# ---- layers and their variables ----


def test_all_layers_and_children():
    model = keras.Sequential([keras.Input((3,)), Holder(name="holder"), kl.Dense(1, name="last")])
    found = [layer for layer in inner.all_layers(model) if not isinstance(layer, kl.InputLayer)]
    assert found[0] is model and set(names(found)[1:]) == {"holder", "inside", "last"} and len(found) == 4
    assert names(inner.children(model))[-2:] == ["holder", "last"] and names(inner.children(model.layers[0])) == [
        "inside"
    ]


def test_own_variables_are_those_that_no_sublayer_has():
    layer = Holder()
    layer.build((None, 3))
    assert names(inner.own_variables(layer)) == ["own", "count"] and len(layer.weights) == 4


def test_noise_states_of_a_layer_and_its_sublayers():
    layer = kl.Bidirectional(kl.LSTM(2, dropout=0.5, seed=3))
    layer.build((None, 4, 3))
    states = inner.noise_states(layer)
    assert len(states) >= 2 and all("seed" in state.path and state.shape == (2,) for state in states)
    assert not inner.noise_states(kl.Dense(2))


def test_a_built_layer_takes_variables_and_parts_while_it_is_unlocked_and_forgets_the_parts():
    layer, part = kl.Dense(2), kl.Dense(1, use_bias=False)
    layer.parts = {}
    layer.build((None, 3))
    part.build((None, 3))
    with pytest.raises(ValueError, match="cannot add new elements"):
        layer.late = layer.add_weight(name="late", shape=(1,))
    with inner.unlocked(layer):
        layer.late = layer.add_weight(name="late", shape=(1,))
        layer.parts["one"] = part
    assert names(layer.weights) == ["kernel", "bias", "late", "kernel"]
    with inner.unlocked(layer):
        layer.parts.clear()
    assert names(layer.weights) == ["kernel", "bias", "late"]
    with pytest.raises(ValueError, match="cannot add new elements"):
        layer.later = layer.add_weight(name="later", shape=(1,))


def test_an_unbuilt_layer_is_not_locked():
    layer = kl.Dense(2)
    with inner.unlocked(layer):
        pass
    layer.build((None, 3))
    assert names(layer.weights) == ["kernel", "bias"]


def test_a_part_is_counted_among_the_layers_or_not():
    layer, part = kl.Dense(2), kl.Dense(1, use_bias=False)
    part.build((None, 3))
    layer.build((None, 3))
    for counted in (True, False, True):
        inner.set_part(layer, "part", part, counted)
        assert layer.part is part
        assert inner.all_layers(layer) == ([layer, part] if counted else [layer])
        assert names(layer.weights) == ["kernel", "bias", "kernel"][: 3 if counted else 2]


@pytest.mark.parametrize("counted", [True, False])
def test_a_part_is_saved_counted_or_not(counted, tmp_path):
    layer, part = kl.Dense(2), kl.Dense(1, use_bias=False)
    part.build((None, 3))
    model = keras.Sequential([keras.Input((3,)), layer])
    inner.set_part(layer, "part", part, counted)
    before = np.array(part.kernel)
    model.save_weights(tmp_path / "model.weights.h5")
    part.kernel.assign(np.zeros((3, 1)))
    model.load_weights(tmp_path / "model.weights.h5")
    np.testing.assert_array_equal(part.kernel, before)


def test_a_layer_trains_itself_and_its_sublayers_do_not():
    layer = Holder()
    layer.build((None, 3))
    layer.trainable = False
    inner.set_own_trainable(layer, True)
    assert layer.trainable and not layer.inside.trainable and not layer.trainable_variables


# ---- calls ----


class AnyArguments(kl.Layer):
    """Hands all arguments on."""

    def __init__(self, layer):
        super().__init__()
        self.layer = layer
        inner.copy_call_signature(self, layer)
        self.supports_masking = True

    def call(self, *args, **kwargs):
        """The layer's."""
        return self.layer(*args, **kwargs)


def test_a_wrapper_is_called_with_the_arguments_of_its_layer():
    x = keras.Input((3,))
    wrapper = AnyArguments(Holder())
    model = keras.Model(x, wrapper(x, factor=2.0))
    model(np.ones((1, 3), "float32"), training=True)
    assert wrapper.layer.seen[-1][:2] == (True, 2.0)
    masked = AnyArguments(kl.GlobalAveragePooling1D())
    words = kl.Embedding(3, 2, mask_zero=True)(np.array([[1, 2, 0, 0]]))
    np.testing.assert_allclose(masked(words), kl.GlobalAveragePooling1D()(words), rtol=1e-6)


def test_who_calls_whom():
    layer = Holder()
    layer(np.ones((1, 3), "float32"))
    outer = keras.Sequential([keras.Input((3,)), layer])
    layer.seen.clear()
    outer(np.ones((1, 3), "float32"))
    layer(np.ones((1, 3), "float32"))
    assert [called for _, _, called in layer.seen] == [True, False]


def test_losses_add_up_within_one_call_context():
    model = keras.Sequential([keras.Input((3,)), Holder()])
    outer, x = keras.Sequential([keras.Input((3,)), model]), np.ones((1, 3), "float32")
    with inner.call_context(outer):
        model(x)
        first = inner.added_losses(outer)
        model(x)
        assert first < inner.added_losses(outer) and len(inner.added_losses(outer)) == 2
    model(x)
    assert len(inner.added_losses(outer)) == 1


def test_added_losses_leave_out_the_weights_regularizers():
    layer = kl.Dense(2, kernel_regularizer="l2", activity_regularizer="l2")
    layer(np.ones((1, 3), "float32"))
    assert len(layer.losses) == 2 and inner.added_losses(layer) < {id(loss) for loss in layer.losses}
    assert inner.added_losses(ops.relu) == set()


def test_replaced_puts_back_what_was_there():
    layer = kl.Dense(2)
    with contextlib.suppress(RuntimeError), inner.replaced(layer, "call", lambda x: x + 1.0):
        layer.build((None, 2))
        assert np.allclose(layer(np.zeros((1, 2), "float32")), 1.0)
        with inner.replaced(layer, "call", lambda x: x + 2.0):
            assert np.allclose(layer(np.zeros((1, 2), "float32")), 2.0)
        assert np.allclose(layer(np.zeros((1, 2), "float32")), 1.0)
        raise RuntimeError
    assert "call" not in vars(layer) and np.allclose(layer(np.zeros((1, 2), "float32")), 0.0)


def test_traced_knows_the_outputs_shapes():
    out = inner.traced(lambda x, size: {"y": ops.repeat(x, size, axis=1)}, keras.Input((3,)), size=2)
    assert out["y"].shape == (None, 6) and out["y"].dtype == "float32"
    with pytest.raises(Exception, match=r"shape|Dimension|matmul"):
        inner.traced(lambda x: ops.matmul(x, ops.ones((7, 2))), keras.Input((3,)))


# ---- what hangs on a tensor ----


def test_the_mask_of_a_tensor():
    words = kl.Embedding(3, 2, mask_zero=True)(np.array([[1, 0]]))
    np.testing.assert_array_equal(inner.mask_of(words), [[True, False]])
    other = ops.ones((1, 2, 1))
    assert inner.mask_of(other) is None
    inner.set_mask(other, inner.mask_of(words))
    assert float(kl.GlobalAveragePooling1D()(other * 1.0)[0, 0]) == 1.0
    np.testing.assert_array_equal(inner.mask_of(other), [[True, False]])


@pytest.mark.parametrize("activation", ["sigmoid", "softmax"])
def test_the_logits_of_probabilities(activation):
    layer = kl.Dense(2, activation=activation, kernel_initializer="ones")
    probs = layer(np.full((1, 3), 20.0, "float32"))
    np.testing.assert_allclose(inner.logits_of(probs), np.full((1, 2), 60.0))
    assert inner.logits_of(ops.ones(3)) is None
    plain = tf.identity(probs)
    inner.set_logits(plain, inner.logits_of(probs))
    loss = keras.losses.BinaryCrossentropy()
    if activation == "sigmoid":  # exact with logits: of the probability 1.0 alone it would be 16
        np.testing.assert_allclose(loss(np.zeros((1, 2)), plain), 60.0, rtol=1e-6)


def test_what_made_a_tensor():
    a, b = kl.LSTM(2, return_state=True, name="lstm")(keras.Input((4, 3)))[:2]
    assert [inner.made_by(x)[0].name for x in (a, b)] == ["lstm", "lstm"]
    assert [inner.made_by(x)[1] for x in (a, b)] == [0, 1]


# ---- graphs ----


class Subclassed(keras.Model):
    """Not Functional."""

    def call(self, x):
        """The identity."""
        return x


class OwnCall(keras.Model):
    """Made of inputs and outputs, with a call of its own."""

    def call(self, x, **kwargs):
        """The graph's outputs, doubled."""
        return 2.0 * super().call(x, **kwargs)


def test_functional_or_not():
    functional = two_layers()
    own = OwnCall(functional.inputs, functional.outputs)
    sequential = keras.Sequential([keras.Input((3,)), kl.Dense(2)])
    assert inner.is_functional(functional) and inner.is_functional(own)
    assert not (
        inner.is_functional(sequential) or inner.is_functional(Subclassed()) or inner.is_functional(kl.Dense(1))
    )
    assert inner.functional_of(functional) is functional and inner.functional_of(sequential).layers[-1].units == 2
    assert all(inner.functional_of(x) is None for x in (own, Subclassed(), kl.Dense(1), ops.relu))


def test_nodes_are_the_uses_of_operations_in_order():
    x, again = keras.Input((3,)), kl.Dense(3, name="again")
    y = again(again(x))
    model = keras.Model(x, kl.Dense(1, name="last")(y) + 1.0)
    nodes = inner.nodes_in_order(model)
    assert [node.operation.name for node in nodes][:3] == ["again", "again", "last"] and len(nodes) == 4
    assert nodes[1].input_tensors[0] is nodes[0].outputs[0] and nodes[1].parent_nodes == [nodes[0]]
    assert nodes[0].arguments.args[0] is nodes[0].input_tensors[0] and nodes[0].arguments.kwargs == {}
    assert inner.nodes_of(again) == nodes[:2] and inner.nodes_of(again, after=True) == nodes[1:3]
    args, kwargs = nodes[0].arguments.fill_in({id(nodes[0].input_tensors[0]): 5})
    assert (args, kwargs) == ((5,), {})


def test_run_operations_by_sees_each_use_also_of_nested_models():
    model = two_layers()
    x = keras.Input((3,), name="outer")
    outer, seen, reused = keras.Model(x, model(x) * 2.0), [], {}

    def run(node, operation, *args, **kwargs):
        seen.append(node.operation.name)
        return reused[id(node)] if id(node) in reused else operation(*args, **kwargs)

    data = np.ones((2, 3), "float32")
    before = outer(data)
    for functional in (outer, model):
        run_operations_by(functional, run)
        run_operations_by(functional, lambda *args: None)
    np.testing.assert_allclose(outer(data), before)
    assert seen[:3] == [model.name, "a", "b"] and len(seen) == 4
    assert keras.models.clone_model(outer).count_params() == outer.count_params()
    reused[id(inner.nodes_in_order(outer)[0])] = ops.ones((2, 2))
    np.testing.assert_allclose(outer(data), 2.0)


def test_an_unconnected_copy_of_an_operation():
    x = keras.Input((3,))
    operation = inner.made_by(ops.relu(x))[0]
    new = inner.unconnected_copy(operation)
    assert not inner.nodes_of(new) and len(inner.nodes_of(operation)) == 1 and type(new) is type(operation)
    np.testing.assert_array_equal(keras.Model(x, new(x))(np.array([[-1.0, 0.0, 1.0]])), [[0.0, 0.0, 1.0]])


# ---- losses, optimisers, training ----


def test_the_compiled_loss_is_called_on_the_models_structure():
    model = two_layers()
    model.compile("sgd", keras.losses.MeanSquaredError())
    assert float(inner.compiled_loss(model)(np.zeros((1, 2)), np.full((1, 2), 2.0))) == 4.0
    assert inner.compiled_loss(two_layers()) is None


def test_what_compile_was_called_with():
    model = keras.Sequential([keras.Input((2,)), keras.layers.Dense(1)])
    assert inner.compile_arguments(model) == {}
    model.compile("sgd", "mse", loss_weights=[2.0], metrics=["mae"])
    found = inner.compile_arguments(model)
    assert (found["loss"], found["loss_weights"], found["metrics"]) == ("mse", [2.0], ["mae"])


def test_a_mean_over_examples():
    tracker = keras.metrics.Mean()
    for loss, size in ((1.0, 3), (5.0, 1)):
        inner.update_mean(tracker, keras.ops.convert_to_tensor(loss), [np.zeros((size, 2))])
    assert float(tracker.result()) == 2.0  # (3 * 1 + 5) / 4


def test_weight_decay_spares_these_variables_and_those_of_before():
    optimizer = keras.optimizers.AdamW(1.0, weight_decay=0.5)
    a, b, c = (keras.Variable(np.ones(1, "float32"), name=name) for name in "abc")
    optimizer.exclude_from_weight_decay(var_list=[a])
    inner.spare_weight_decay(optimizer, [b])
    optimizer.build([a, b, c])
    assert inner.optimized_variables(optimizer) == [a, b, c]
    optimizer.apply([np.zeros(1, "float32")] * 3)
    assert [float(v[0]) for v in (a, b, c)] == [1.0, 1.0, 0.5]


def test_the_strategy_under_which_a_model_was_made():
    strategy = tf.distribute.MirroredStrategy(["CPU:0"])
    with strategy.scope():
        model = two_layers()
    assert inner.strategy_of(model) is strategy and inner.strategy_of(two_layers()) is None
    assert inner.strategy_of(kl.Dense(1)) is None


def test_the_batch_by_which_a_model_is_built_under_a_strategy():
    seen, batch = [], (np.ones((1, 3), "float32"), np.ones((1, 2), "float32"), None)

    def batch_of(model, iterator, data_batch):
        seen.append(iterator is not None)
        return None if len(seen) == 2 else batch

    @inner.with_symbolic_build(batch_of)
    class Built(keras.Model):
        """Built by the batch above."""

    with tf.distribute.MirroredStrategy(["CPU:0"]).scope():
        x = keras.Input((3,))
        model = Built(x, kl.Dense(2)(x))
        model.compile("adam", "mse", jit_compile=False)
    for _ in range(2):
        model.train_on_batch(np.ones((2, 3), "float32"), np.ones((2, 2), "float32"))
    model.fit(np.ones((2, 3), "float32"), np.ones((2, 2), "float32"), verbose=0)
    assert seen == [False, False, True] and model.optimizer.built


def test_arguments_of_a_loss():
    loss = keras.losses.SparseCategoricalCrossentropy(axis=1, ignore_class=7)
    assert inner.loss_arguments(loss)["axis"] == 1 and inner.loss_arguments(loss)["ignore_class"] == loss.ignore_class
    assert inner.loss_arguments(lambda y, p: p) == {}


def test_moving_averages_are_found_where_keras_looks_for_them():
    variable = keras.Variable([1.0])
    optimizer = keras.optimizers.SGD(1.0, use_ema=True)
    optimizer.build([variable])
    optimizer.apply([ops.ones((1,))], [variable])
    assert [float(average[0]) for average in inner.moving_averages(optimizer)] == [0.0]

    @inner.with_moving_averages(lambda one: [one.name])
    class Named(keras.optimizers.SGD):
        """Its averages are its name."""

    assert inner.moving_averages(Named(name="mine")) == ["mine"]


# ---- stateless scopes, saving ----


def test_values_in_a_stateless_scope():
    a, b = (keras.Variable(np.full(1, value, "float32")) for value in (1.0, 2.0))
    assert not inner.in_stateless_scope()
    with keras.StatelessScope([(a, ops.full((1,), 3.0))]):
        assert inner.in_stateless_scope()
        assert [float(value[0]) for value in inner.current_values([a, b])] == [3.0, 2.0]


def test_which_graph_is_traced():
    found = []
    tf.function(lambda: found.append(current_graph()))()
    assert current_graph() is None and isinstance(found[0], int)


class Unregistered(kl.Dense):
    """A class that Keras does not know by name."""


def test_a_live_objects_config_is_trusted():
    lambda_layer = kl.Lambda(lambda x: x + 1.0)
    model = keras.Sequential([keras.Input((2,)), lambda_layer, Unregistered(2, name="mine")])
    with pytest.raises(ValueError, match=r"lambda|Lambda"):
        keras.saving.deserialize_keras_object(keras.saving.serialize_keras_object(lambda_layer))
    new = inner.as_trusted(keras.Sequential, model.get_config(), {"Unregistered": Unregistered})
    assert type(new) is keras.Sequential and type(new.layers[1]) is Unregistered
    np.testing.assert_array_equal(new.layers[0](np.zeros(2)), np.ones(2))


def test_an_optimizer_saved_on_torch_is_found_elsewhere():
    here = keras.saving.serialize_keras_object(keras.optimizers.Adam(0.5))
    there = {**here, "module": "keras.src.backend.torch.optimizers.torch_adam", "registered_name": "Adam"}
    if importlib.util.find_spec("torch") is None:
        with pytest.raises((TypeError, ImportError)):
            keras.saving.deserialize_keras_object(there)
    found = inner.of_any_backend({"optimizer": there, "loss": "mse"})
    again = keras.saving.deserialize_keras_object(found["optimizer"])
    assert found["loss"] == "mse" and type(again) is keras.optimizers.Adam and float(again.learning_rate) == 0.5
    assert inner.of_any_backend({"optimizer": here}) == {"optimizer": here}


def test_each_borrowed_name_says_why():
    for name in inner.__all__:
        text = inspect.getdoc(getattr(inner, name))
        assert text and any(word in text for word in ("Why:", "Public:")), name
