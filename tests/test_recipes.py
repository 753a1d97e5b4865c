"""Recipes: the paper's published settings, the weighted loss against TensorFlow's, settings out of range."""

import numpy as np
import pytest
import tensorflow as tf

from sbn_tf import datasets, recipes


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
