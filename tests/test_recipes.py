"""Recipes: the paper's published settings, the weighted loss against TensorFlow's, settings out of range."""

import keras
import numpy as np
import pytest
import tensorflow as tf
from sklearn.metrics import log_loss

from sbn_tf import datasets
from sbn_tf.core.losses import loss_terms
from sbn_tf.experiments import recipes


def test_the_papers_recipe_is_section_3():
    chest = recipes.recipe_for("paper", datasets.card("chestmnist"))
    assert (chest.epochs, chest.bayes_epochs, chest.batch_size) == (50, 50, 50)
    assert (chest.optimizer, chest.learning_rate, chest.weight_decay, chest.momentum) == ("sgd", 0.01, 1e-5, 0.0)
    assert (chest.beta_start, chest.beta_stop, chest.num_samples) == (0.01, 0.01, 5)
    lesions = recipes.recipe_for("paper", datasets.card("isic2018"))
    assert (lesions.batch_size, lesions.beta_start, lesions.beta_stop) == (10, 0.2, 0.01)
    assert lesions.augment == "flips_and_quarter_turns" and lesions.class_weights == "none"
    coded = recipes.recipe_for("paper_as_coded", datasets.card("lidc"))
    assert (coded.score, coded.momentum, coded.weight_decay) == ("paper", 0.9, None)


def test_unknown_recipe_and_field():
    with pytest.raises(ValueError, match="Expected a recipe among"):
        recipes.recipe_for("best", datasets.card("lidc"))
    with pytest.raises(ValueError, match="Unknown recipe fields"):
        recipes.recipe_for("quick", datasets.card("lidc"), epoch=3)


@pytest.mark.parametrize("pos_weight", [1.0, 10.0, [1.0, 4.0, 9.0]])
def test_weighted_cross_entropy_is_tensorflows(pos_weight):
    random = np.random.default_rng(0)
    logits = random.normal(size=(5, 3)).astype("float32")
    labels = random.integers(0, 2, size=(5, 3)).astype("float32")
    expected = tf.nn.weighted_cross_entropy_with_logits(labels, logits, np.float32(pos_weight))
    loss = recipes.WeightedBinaryCrossentropy(pos_weight)
    assert float(loss(labels, tf.sigmoid(logits))) == pytest.approx(float(tf.reduce_mean(expected)), rel=1e-5)
    again = recipes.WeightedBinaryCrossentropy.from_config(loss.get_config())
    assert float(again(labels, tf.sigmoid(logits))) == float(loss(labels, tf.sigmoid(logits)))
    assert loss.terms_per_example((None, 8, 8, 1)) == 64
    with pytest.raises(ValueError, match="pos_weight > 0"):
        recipes.WeightedBinaryCrossentropy(-1.0)


def test_labels_that_would_be_broadcast_are_refused():
    loss = recipes.WeightedBinaryCrossentropy(2.0)
    with pytest.raises(ValueError, match=r"outputs' shape \(4, 1\). Received: \(4,\)"):
        loss(np.ones(4, "float32"), np.full((4, 1), 0.5, "float32"))
    with pytest.raises(ValueError, match="one pos_weight, or 1"):
        recipes.WeightedBinaryCrossentropy(np.ones(14))(np.ones((4, 1), "float32"), np.full((4, 1), 0.5, "float32"))


def softmax_outputs():
    random = np.random.default_rng(0)
    logits = random.normal(size=(9, 3)).astype("float32")
    classes = np.array([0, 0, 1, 2, 1, 0, 0, 2, 0])
    return classes, np.eye(3, dtype="float32")[classes], np.array(tf.nn.softmax(logits))


def test_weighted_categorical_cross_entropy_is_scikit_learns_and_keras_with_class_weight():
    classes, one_hot, probs = softmax_outputs()
    weights = np.array([0.5, 2.0, 3.0])
    loss = recipes.WeightedCategoricalCrossentropy(weights)
    normalised = log_loss(classes, probs, sample_weight=weights[classes])  # divided by the sum of the weights
    assert float(loss(one_hot, probs)) == pytest.approx(normalised * weights[classes].mean(), rel=1e-5)
    stock = keras.losses.CategoricalCrossentropy()(one_hot, probs, sample_weight=weights[classes])
    assert float(loss(one_hot, probs)) == pytest.approx(float(stock), rel=1e-6)
    again = keras.losses.deserialize(keras.losses.serialize(loss))
    assert type(again) is type(loss) and float(again(one_hot, probs)) == float(loss(one_hot, probs))
    plain = recipes.WeightedCategoricalCrossentropy(np.ones(3))
    assert float(plain(one_hot, probs)) == pytest.approx(log_loss(classes, probs), rel=1e-5)


def test_the_gradient_of_the_weighted_categorical_cross_entropy_by_hand():
    classes, one_hot, probs = softmax_outputs()
    weights = np.array([0.5, 2.0, 3.0])
    loss = recipes.WeightedCategoricalCrossentropy(weights)
    logits = tf.Variable(np.log(probs))
    with tf.GradientTape() as tape:
        value = loss(one_hot, keras.activations.softmax(logits))  # Keras finds the logits behind a softmax
    expected = weights[classes][:, None] * (probs - one_hot) / 9
    np.testing.assert_allclose(tape.gradient(value, logits), expected, atol=1e-6)


@pytest.mark.parametrize(("shape", "terms"), [((None, 7), 1), ((None, 8, 4, 7), 32)])
def test_a_categorical_cross_entropy_is_one_term_an_image_or_pixel(shape, terms):
    assert loss_terms(recipes.WeightedCategoricalCrossentropy(np.ones(7)), shape) == terms
    assert loss_terms(keras.losses.CategoricalCrossentropy(), shape) == terms


@pytest.mark.parametrize("weights", [[1.0, 0.0], [1.0, np.nan], [-1.0, 1.0], 2.0, [[1.0, 1.0]]])
def test_class_weights_that_are_none(weights):
    with pytest.raises(ValueError, match=r"Expected .*class_weights"):
        recipes.WeightedCategoricalCrossentropy(weights)


def test_classes_that_would_be_broadcast_are_refused():
    _, one_hot, probs = softmax_outputs()
    with pytest.raises(ValueError, match=r"outputs' shape \(9, 3\). Received: \(9,\)"):
        recipes.WeightedCategoricalCrossentropy(np.ones(3))(one_hot[:, 0], probs)
    with pytest.raises(ValueError, match="Expected 3 class_weights"):
        recipes.WeightedCategoricalCrossentropy([1.0])(one_hot, probs)


def with_labels(task, targets):
    """A dataset of blank but for noise 8 x 8 images, all its splits with these targets."""
    card = datasets.Card("made", "made", task, ("a", "b", "c"), 1, 1, "", "", "", (), 8, "resnet18")
    images = np.random.default_rng(0).integers(0, 256, (len(targets), 8, 8, 1)).astype("uint8")
    parts = [datasets.Split(name, task, images, targets.astype("uint8")) for name in ("train", "val", "test")]
    return datasets.Data(card, *parts)


@pytest.mark.parametrize("task", ["multi-class", "ordinal", "binary", "multi-label"])
@pytest.mark.parametrize("class_weights", ["none", "paper"])
def test_the_loss_of_each_task_with_labels_by_hand(task, class_weights):
    _, one_hot, probs = softmax_outputs()  # 5, 2 and 2 of a class
    targets = one_hot[:, :1] if task == "binary" else one_hot
    probs = probs[:, : targets.shape[1]]
    data = with_labels(task, targets)
    loss = recipes.loss_for(recipes.recipe_for("quick", data.card, class_weights=class_weights), data)
    if task in ("multi-class", "ordinal"):
        weights = 9 / (3 * np.array([5, 2, 2])) if class_weights == "paper" else np.ones(3)
        terms = -(weights * targets * np.log(probs)).sum(-1)
    else:
        weights = (np.array([4, 7, 7]) / np.array([5, 2, 2]))[: targets.shape[1]] if class_weights == "paper" else 1.0
        terms = -(weights * targets * np.log(probs) + (1 - targets) * np.log(1 - probs))
    assert float(loss(targets, probs)) == pytest.approx(terms.mean(), rel=1e-5)


@pytest.mark.parametrize(
    "change",
    [
        {"epochs": 0},
        {"bayes_epochs": -1},
        {"epochs": 1.5},
        {"batch_size": "20"},
        {"num_samples": 0},
        {"learning_rate": float("nan")},
        {"learning_rate": 0.0},
        {"initial_scale": 0.0},
        {"bayes_learning_rate": 0.0},
        {"weight_decay": -1e-5},
        {"beta_start": -0.1},
        {"class_weights": "papr"},
        {"optimizer": "lion"},
        {"augment": "flip"},
        {"score": "fischer"},
        {"keep": "first"},
        {"scale_start": "wide"},
        {"prior_scale": 0.0},
        {"trains": "some"},
        {"scope": "world"},
        {"eligible": "none"},
        {"fan_out": -0.1},
        {"fan_out": 1.5},
    ],
)
def test_a_recipe_out_of_range_is_refused_at_once(change):
    with pytest.raises(ValueError, match=f"Expected .*{next(iter(change))}"):
        recipes.recipe_for("quick", datasets.card("lidc"), **change)


def test_the_papers_recipes_take_its_networks_and_constants():
    chest, lidc, isic = (datasets.card(name) for name in ("nih_chest", "lidc", "isic2018"))
    found = [recipes.network_for("paper", card) for card in (chest, lidc, isic)]
    assert found == ["resnet18_paper", "unet_paper_lidc", "unet_paper_isic"]
    assert recipes.network_for("quick", chest) == "resnet18_small"
    assert [recipes.normalisation_for("paper", card) for card in (chest, lidc)] == ["paper", "train"]
    assert recipes.normalisation_for("quick", chest) == "train"


def test_our_recipe_turns_the_images_of_segmentations_alone():
    of = {name: recipes.recipe_for("sbn", datasets.card(name)) for name in ("lidc", "isic2018", "nih_chest")}
    assert [one.augment for one in of.values()] == ["flips_and_quarter_turns", "flips_and_quarter_turns", None]
    assert [one.targets for one in of.values()] == ["mean", "random", "random"]
    assert recipes.recipe_for("quick", datasets.card("lidc")).augment is None


def test_the_last_weights_are_kept_unless_a_recipe_says_otherwise():
    assert {name for name, recipe in recipes.RECIPES.items() if recipe.keep == "best"} == {"sbn"}
    assert recipes.recipe_for("quick", datasets.card("lidc"), keep="best").keep == "best"


def test_cycles_of_one_length_are_kerass_restarts():
    theirs = keras.optimizers.schedules.CosineDecayRestarts(0.3, 7, t_mul=1.0)
    ours = recipes.CosineCycles(0.3, [7, 7, 7])
    found = np.array([[float(schedule(step)) for step in range(21)] for schedule in (ours, theirs)])
    np.testing.assert_allclose(found[0], found[1], atol=1e-7)


def test_each_cycle_of_another_length_is_kerass_cosine_decay():
    cycles = [3, 1, 5]
    expected = [
        float(keras.optimizers.schedules.CosineDecay(0.3, steps)(step)) for steps in cycles for step in range(steps)
    ]
    schedule = recipes.CosineCycles(0.3, cycles)
    np.testing.assert_allclose([float(schedule(step)) for step in range(9)], expected, atol=1e-7)
    traced = tf.function(schedule)
    np.testing.assert_allclose([float(traced(tf.constant(step, "int64"))) for step in range(9)], expected, atol=1e-7)
    assert float(schedule(9)) == pytest.approx(0.0, abs=1e-7) == float(schedule(1000))


def test_cycles_are_saved_with_their_optimiser():
    optimizer = recipes.optimizer_for("sgd", 0.3, decay="cosine", steps=2, cycle_steps=[2, 3])
    again = keras.optimizers.deserialize(keras.optimizers.serialize(optimizer))
    assert again._learning_rate.get_config() == {"learning_rate": 0.3, "cycle_steps": [2, 3]}


@pytest.mark.parametrize("cycle_steps", [[], [3, 0], [-1]])
def test_cycles_without_a_step_are_none(cycle_steps):
    with pytest.raises(ValueError, match="Expected cycle_steps"):
        recipes.CosineCycles(0.1, cycle_steps)


def test_changes_of_a_recipe_are_read_from_one_line():
    found = recipes.parse_changes("score=taylor, initial_scale=0.03 ,epochs=20,fan_out=none, augment=None")
    assert found == {"score": "taylor", "initial_scale": 0.03, "epochs": 20, "fan_out": None, "augment": None}
    assert recipes.parse_changes("decay=none, class_weights=none") == {"decay": "none", "class_weights": "none"}
    assert isinstance(found["epochs"], int) and recipes.parse_changes("") == recipes.parse_changes(" , ") == {}


@pytest.mark.parametrize("text", ["scores=taylor", "score", "score=", "score=taylor, score=paper", "name=mine"])
def test_changes_that_are_none_name_the_fields(text):
    with pytest.raises(ValueError, match=r"Expected changes of a recipe .*initial_scale") as error:
        recipes.parse_changes(text)
    assert len(str(error.value).splitlines()) == 2
