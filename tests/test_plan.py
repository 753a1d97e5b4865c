"""Plans: what a file may say, what a dataset takes from its plan, and what is refused."""

from pathlib import Path

import pytest

from sbn_tf.experiments import plan

ROOT = Path(__file__).parents[1]
CONTENT = {
    "name": "tiny",
    "recipe": "quick",
    "seeds": [0, 1],
    "r_bayes": [0.0001, 0.01, 1],
    "methods": ["deterministic", "ensemble"],
    "datasets": {
        "phantom_nodule": {"limit": 40, "epochs": 2, "folds": [0, 1], "split": "patient"},
        "phantom_chest": {"r_bayes": [0.01], "methods": ["temperature"], "seeds": [3]},
        "phantom_lesion": None,
    },
    "questions": {
        "scale": {"text": "How wide?", "variants": [{"label": "as it is"}, {"label": "2 %", "r_bayes": 0.02}]}
    },
}
ONE = {"label": "x"}


def asks(*variants):
    return {"questions": {"a": {"text": "?", "variants": list(variants)}}}


def test_a_dataset_takes_from_its_plan_what_it_has_not():
    found = plan.plan_of(CONTENT)
    nodule, chest, lesion = found.datasets.values()
    assert (nodule.seeds, nodule.folds, nodule.r_bayes) == ((0, 1), (0, 1), (0.0001, 0.01, 1.0))
    assert (chest.seeds, chest.folds, chest.methods) == ((3,), (-1,), ("temperature",))
    assert lesion.methods == ("deterministic", "ensemble") and lesion.parameters == {}
    assert nodule.parameters == {"limit": 40, "epochs": 2, "split": "patient"}
    options = {"fold": 1, "split": "patient"}
    assert nodule.arguments(1) == {"limit": 40, "epochs": 2, "options": options}
    assert lesion.arguments() == {"options": {}}
    first, second = found.questions["scale"].variants
    assert (first.method, first.r_bayes, first.changes, second.r_bayes) == ("partial", 0.01, "", 0.02)
    assert found.folder == Path("runs/grid/tiny")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"method": ["partial"]}, "a plan: keys among .*methods.* Received: 'method'"),
        ({"datasets": {"lidc": {"keep": "best"}}}, "datasets.lidc: keys among .* Received: 'keep'"),
        ({"datasets": {"lidc": {"sise": 3}}}, "datasets.lidc: keys among .*size.* Received: 'sise'"),
        ({"datasets": {}}, "datasets: .* Received: {}"),
        ({"datasets": {"lidc": 5}}, "datasets.lidc: .* Received: 5"),
        ({"r_bayes": [0.01, 1.01]}, "r_bayes.1: .*less than or equal to 1. Received: 1.01"),
        ({"r_bayes": [1, 1]}, "r_bayes: each value once"),
        ({"r_bayes": [True]}, "r_bayes.0: .* Received: True"),
        ({"seeds": [1, 1]}, "seeds: each value once"),
        ({"seeds": [-1]}, "seeds.0: .*greater than or equal to 0. Received: -1"),
        ({"seeds": []}, "seeds: .*at least 1.* Received: "),
        ({"seeds": 0}, "seeds: .* Received: 0"),
        ({"name": "a/b"}, "name: .* Received: 'a/b'"),
        ({"threads": 0}, "threads: .*greater than or equal to 1. Received: 0"),
        ({"tflops": -1}, "tflops: .*greater than 0. Received: -1"),
        ({"datasets": {"lidc": {"images": [1, 2]}}}, "datasets.lidc.images"),
        ({"datasets": {"lidc": {"images": 5}}}, "datasets.lidc.images: .* Received: 5"),
        ({"datasets": {"lidc": {"folds": [-2]}}}, "datasets.lidc.folds.0: .* Received: -2"),
        ({"datasets": {"/data/mine": {}}}, "datasets./data/mine.* Received: '/data/mine'"),
        ({"methods": ["partial"]}, "methods without 'partial'"),
        ({"r_bayes": [0.333333331, 0.333333332]}, "numbers in six digits"),
        ({"table": 5}, "table: .* Received: 5"),
        ({"recipe": 7}, "recipe: .* Received: 7"),
        ({"gpus": -1}, "gpus: .*greater than or equal to 0. Received: -1"),
        ({"question": {}}, "keys among .*questions.* Received: 'question'"),
        ({"questions": {"a": {"text": "?"}}}, "questions.a.variants: Field required"),
        (asks({**ONE, "methd": "y"}), "questions.a.variants.0: keys among .*method.* Received: 'methd'"),
        (asks({**ONE, "r_bayes": 2}), "variants.0.r_bayes: .* Received: 2"),
        (asks(ONE, ONE), "questions.a.variants: each label once"),
        (asks(), "questions.a.variants: .*at least 1"),
    ],
)
def test_a_wrong_plan_is_refused_in_two_lines_that_name_the_place(changes, message):
    with pytest.raises(ValueError, match=message) as error:
        plan.plan_of({**CONTENT, **changes}, "my.yaml")
    assert "my.yaml" in str(error.value) and len(str(error.value).splitlines()) <= 2


def test_a_file_without_a_plan_is_refused(tmp_path):
    for text, message in (
        ("a: [", "Expected YAML"),
        ("cores: 2\n", "Expected a key `plan`"),
        ("[1]\n", "a key `plan`"),
        ("plan: 5\n", "Received: 5"),
    ):
        (tmp_path / "config.yaml").write_text(text)
        with pytest.raises(ValueError, match=message):
            plan.read(tmp_path)
    with pytest.raises(FileNotFoundError):
        plan.read(tmp_path / "none.yaml")
