"""Studies: what a file asks for is run once, told in a table, and found again by its label."""

import dataclasses
from pathlib import Path

import pytest
import yaml
from helpers import table_of_page, tiny_networks

from sbn_tf.experiments import compare, results, run_folder, study

ROOT = Path(__file__).parents[1]
CONTENT = {
    "name": "tiny",
    "recipe": "sbn",
    "datasets": {
        "phantom_nodule": {"size": 16, "limit": 12, "network": "tiny_masks", "epochs": 1, "bayes_epochs": 1},
    },
    "seeds": [0],
    "questions": {
        "rivals": {
            "text": "Does it help?",
            "variants": [
                {"label": "one", "method": "deterministic"},
                {"label": "partial", "r_bayes": 0.05},
                {"label": "more samples", "r_bayes": 0.05, "num_samples": 7},
            ],
        },
        "scale": {
            "text": "How wide?",
            "variants": [
                {"label": "as it is", "r_bayes": 0.05},
                {"label": "wide", "r_bayes": 0.05, "changes": "initial_scale=0.5"},
                {"label": "fails", "method": "members", "changes": "scale_start=fisher"},
            ],
        },
    },
}


@pytest.fixture(scope="module", autouse=True)
def _tiny():
    with tiny_networks():
        yield


def written(tmp_path, content):
    path = tmp_path / "study.yaml"
    path.write_text(yaml.safe_dump({"plan": content}))
    return path


def test_a_study_is_run_once_and_its_rows_are_found_by_label(tmp_path, monkeypatch):
    plan = study.read(written(tmp_path, CONTENT))
    options = {"runs": str(tmp_path / "runs"), "table": tmp_path / "t.csv"}
    failed = study.run_study(plan, **options)
    assert len(failed) == 1 and failed[0].startswith("fails, seed 0: Expected scale_start")
    found = results.read_csv(tmp_path / "t.csv")
    trivial = found["method"].str.startswith(("trivial_", "bound_"))
    assert {"trivial_prevalence", "trivial_level_sets"} < set(found[trivial]["method"])
    runs = results.wide(found[~trivial])
    assert set(runs["split"]) == {"val"} and (runs["num_images"] == 12).all()
    assert len(runs) == 4  # "as it is" is "partial" again
    asked = {name: study.rows_of(question, plan, found) for name, question in plan.questions.items()}
    by_label = {name: results.wide(rows).set_index("label") for name, rows in asked.items()}
    assert list(by_label["rivals"].index) == ["one", "partial", "more samples"]
    assert list(by_label["rivals"]["num_samples"]) == [1, 5, 7]
    assert by_label["scale"].loc["as it is", "nll"] == by_label["rivals"].loc["partial", "nll"]
    assert results.recipe_settings(by_label["scale"].loc["wide", "settings"])["initial_scale"] == 0.5
    assert "fails" in asked["scale"]["label"].cat.categories and "fails" not in by_label["scale"].index
    # Again: everything is read, and nothing is trained or scored.
    monkeypatch.setattr(run_folder, "fit", None)
    monkeypatch.setattr(compare, "_score", None)
    before = (tmp_path / "t.csv").read_bytes()
    assert study.run_study(plan, **options, names=["rivals"]) == []
    assert (tmp_path / "t.csv").read_bytes() == before


def test_each_fold_runs_each_variant_once_for_each_seed(tmp_path, monkeypatch):
    data = {"lidc": {"size": 16, "network": "tiny_masks", "folds": [1, 3]}}
    plan = study.read(written(tmp_path, {**CONTENT, "datasets": data, "seeds": [0, 4]}))
    asked = []

    def row(settings, method):
        asked.append((settings.options["fold"], settings.seed, method))
        raise ValueError("not run here")

    made = compare.experiment("phantom_nodule", size=16, limit=4)
    monkeypatch.setattr(compare, "experiment", lambda *_, options, **__: dataclasses.replace(made, options=options))
    monkeypatch.setattr(compare, "trivial_rows", lambda settings: {})
    monkeypatch.setattr(compare, "row", row)
    failed = study.run_study(plan, table=tmp_path / "t.csv", names=["rivals"])
    variants = ["deterministic", "partial", "partial"]
    assert asked == [(fold, seed, method) for fold in (1, 3) for seed in (0, 4) for method in variants]
    assert failed[0] == "one, seed 0, fold 1: not run here" and len(failed) == len(asked)
    asked.clear()
    study.run_study(plan, table=tmp_path / "t.csv", names=["rivals"], folds=[3], seeds=[4])
    assert asked == [(3, 4, method) for method in variants]


def test_of_the_test_split_shifts_are_told_too(tmp_path):
    data = {"phantom_nodule": {**CONTENT["datasets"]["phantom_nodule"], "swapped": "phantom_nodule"}}
    rivals = {**CONTENT["questions"]["rivals"], "variants": CONTENT["questions"]["rivals"]["variants"][:1]}
    plan = study.read(written(tmp_path, {**CONTENT, "datasets": data, "questions": {"rivals": rivals}}))
    study.run_study(plan, runs=str(tmp_path / "runs"), table=tmp_path / "t.csv", split="test")
    found = results.read_csv(tmp_path / "t.csv")
    found = found[found["method"] == "deterministic"]
    shifts = {key.split(": ")[1] for key in found["metric"] if key.startswith("shift: ")}
    assert set(found["split"]) == {"test"} and shifts == {"noise", "blur", "contrast", "phantom_nodule instead"}


def test_how_far_a_choice_repeats_itself(tmp_path):
    labels = {"phantom_chest": {**CONTENT["datasets"]["phantom_nodule"], "network": "tiny"}}
    plan = study.read(written(tmp_path, {**CONTENT, "datasets": labels, "seeds": [0, 1]}))
    found = study.stability(plan, runs=str(tmp_path / "runs"), r_bayes=0.05, early=2).to_dict("records")
    assert [row["score"] for row in found[::2]] == ["fisher", "paper", "per_example", "taylor", "magnitude"]
    magnitude = [row for row in found if row["score"] == "magnitude"]
    assert all(row["halves"] == 1 for row in magnitude)  # weights know nothing of the halves
    assert magnitude[0]["other_seed"] == magnitude[1]["other_seed"] < 0.5
    assert all(0 <= row[key] <= 1 for row in found for key in ("halves", "other_seed", "early"))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"questions": {}}, "Expected questions"),
        ({"datasets": {"lidc": {}, "isic2018": {}}}, "Expected one dataset in a study"),
        ({"recipe": "mine"}, "a recipe among .*\nReceived: mine"),
        ({"datasets": {"lidc": {"network": "mine"}}}, "networks among .*\nReceived: mine"),
        ({"questions": {"a": {"text": "?", "variants": [{"label": "x", "method": "y"}]}}}, "methods among"),
        ({"questions": {"a": {"text": "?", "variants": [{"label": "x", "changes": "y=1"}]}}}, "'y=1'"),
    ],
)
def test_a_plan_without_questions_or_with_unknown_names_is_refused(tmp_path, change, message):
    with pytest.raises(ValueError, match=message) as error:
        study.read(written(tmp_path, {**CONTENT, **change}))
    assert len(str(error.value).splitlines()) <= 3


def test_unknown_questions_are_refused(tmp_path):
    plan = study.read(written(tmp_path, CONTENT))
    with pytest.raises(ValueError, match=r"questions among rivals, scale\. Received: \['why'\]"):
        study.run_study(plan, names=["why"], runs=str(tmp_path), table=tmp_path / "t.csv")


@pytest.mark.parametrize("name", ["study", "repeats", "early"])
def test_the_studies_that_come_with_it_are_whole(name):
    plan = study.read(ROOT / "profiles" / f"{name}.yaml")
    assert plan.name == name
    question = next(iter(plan.questions.values()))
    rows = study.rows_of(question, plan, results.frame([]))
    assert list(rows["label"].cat.categories) == [one.label for one in question.variants]
    assert rows.empty


def test_the_page_of_results_has_the_screening_of_early_members():
    screening = study.read(ROOT / "profiles" / "parting.yaml")
    found = results.wide(results.read_csv(ROOT / "results" / "parting.csv"))
    found = found[found["seed"] == 0]
    lines = table_of_page("When, where and how far to part")
    page = {label: [float(cell) for cell in cells] for label, *cells in lines}
    seen = set()
    for question in screening.questions.values():
        for _, row in study.rows_of(question, screening, found).iterrows():
            mine = tuple(round(row[key], 4) for key in ("nll", "member_nll", "mutual_information"))
            if row["label"] in page:
                assert page.pop(row["label"]) == pytest.approx(mine, abs=1e-9), row["label"]
                seen.add(mine)
            assert mine in seen or row["label"] in ("after 12 epochs", "1.0 apart", "the salient 20 %"), row["label"]
    assert not page
