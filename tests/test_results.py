"""Results of many runs: the tidy frame, and the CSV table that it is written as."""

import json

import numpy as np
import pandas as pd
import pytest
from helpers import mask_result as result
from helpers import whole_result

from sbn_tf.experiments import results
from sbn_tf.experiments.result import write
from sbn_tf.experiments.results import collect, frame, read_csv, recipe_settings, wide, write_csv


def alike(one, other):
    """Whether two frames hold the same, in any order."""
    keys = [*results.RUN, "metric"]
    one, other = (part.sort_values(keys).reset_index(drop=True) for part in (one, other))
    pd.testing.assert_frame_equal(one, other, rtol=1e-6)


# ---- the frame


def test_a_frame_has_a_row_for_each_run_and_metric():
    one = whole_result()
    found = frame([one, result("ensemble", seed=1)])
    values = found[found["method"] == "partial"].set_index("metric")
    for key, value in one.metrics.items():
        assert values.loc[key, "value"] == value
    assert values.loc["train_flops_ratio", "value"] == 2.5 and "train_seconds" not in values.index  # unknown
    assert (
        values.loc["shift: noise: entropy", "value"] == 0.7 and "shift: noise: mutual_information" not in values.index
    )
    assert (values.loc["dice", "low"], values.loc["dice", "high"]) == (0.75, 0.85)
    assert np.isnan(values.loc["ged", "value"]) and values.loc["ged", "note"] == one.undefined["ged"]
    first = found.iloc[0]
    assert (first["fold"], first["seed"], first["r_bayes"], first["num_samples"]) == (2, 0, 0.01, 5)
    assert json.loads(first["options"]) == {}  # the fold is a column
    assert recipe_settings(first["settings"])["epochs"] == 3 and recipe_settings(first["settings"])["batch_size"] == 50
    other = found[found["method"] == "ensemble"].iloc[0]
    assert other["fold"] is pd.NA and np.isnan(other["r_bayes"])
    assert frame([]).empty and list(frame([]).columns) == list(found.columns)


def test_wide_has_one_row_a_run():
    rows = [result(seed=seed, metrics={"nll": 0.1 * (seed + 1)}) for seed in range(3)] + [result("ensemble", None)]
    found = wide(frame(rows))
    assert list(found["method"]) == ["partial"] * 3 + ["ensemble"]
    np.testing.assert_allclose(found["nll"], [0.1, 0.2, 0.3, 0.1])
    assert found["ged"].isna().all()


def test_collect(tmp_path):
    for method, seed in (("partial", 0), ("partial", 1), ("ensemble", 0)):
        write(result(method, seed), tmp_path / "phantom_nodule" / method / f"seed{seed}" / "abc")
    write(result(dataset="lidc"), tmp_path / "lidc" / "partial" / "seed0" / "abc")

    def found(**filters):
        runs = wide(collect(tmp_path, **filters))
        return list(zip(runs["dataset"], runs["method"], runs["seed"], strict=True))

    ours = [("phantom_nodule", "ensemble", 0), ("phantom_nodule", "partial", 0), ("phantom_nodule", "partial", 1)]
    assert found(dataset="phantom_nodule") == ours and found() == [("lidc", "partial", 0), *ours]
    assert collect(tmp_path, "nothing").empty and collect(tmp_path / "nowhere").empty
    folders = set(collect(tmp_path)["folder"])
    assert str(tmp_path / "lidc" / "partial" / "seed0" / "abc") in folders and len(folders) == 4


def test_collect_refuses_damaged_files_or_skips_them_with_one_warning(tmp_path):
    folder = tmp_path / "phantom_nodule" / "partial"
    for seed in range(3):
        write(result(seed=seed), folder / f"seed{seed}" / "abc")
    for seed, text in ((0, '{"format": 0}'), (1, "{")):
        (folder / f"seed{seed}" / "abc" / "metrics.json").write_text(text)
    with pytest.warns(UserWarning, match="Left out 2 file") as caught:
        assert list(wide(collect(tmp_path, damaged="skip"))["seed"]) == [2]
    assert len(caught) == 1
    with pytest.raises(ValueError, match="Expected format 3"):
        collect(tmp_path)
    (folder / "seed0" / "abc" / "metrics.json").unlink()
    with pytest.raises(ValueError, match=r"metrics\.json is not JSON"):
        collect(tmp_path)


def test_results_of_the_validation_split_are_found_when_asked_for(tmp_path):
    for split, place in (("test", ""), ("val", "val")):
        write(result(split=split), tmp_path / "phantom_nodule/partial/seed0/0123456789" / place)
    assert set(collect(tmp_path)["split"]) == {"test"}
    assert set(collect(tmp_path, split="val")["split"]) == {"val"}
    assert len(wide(collect(tmp_path, split=None))) == 2


# ---- CSV tables


def test_a_csv_gives_back_what_was_written_but_for_records(tmp_path):
    written = [whole_result(), result("ensemble", seed=1), result("trivial_prevalence", seed=None, split="val")]
    for one in written:
        write(one, tmp_path / one.method)
    path = write_csv(frame(written), tmp_path / "table.csv")
    found = read_csv(path)
    assert (found["folder"] == "").all()
    alike(found, frame(written).assign(folder=""))


def test_a_csv_keeps_other_rows_and_replaces_the_same(tmp_path):
    path = tmp_path / "table.csv"
    write_csv(frame([result(seed=0), result(seed=1)]), path)
    write_csv(frame([result(seed=1, metrics={"nll": 0.3}, commit="later"), result(seed=0, r_bayes=0.2)]), path)
    found = wide(read_csv(path)).fillna({"r_bayes": 0})
    assert sorted(zip(found["seed"], found["r_bayes"], found["nll"], strict=True)) == [
        (0, 0, 0.1),
        (0, 0.2, 0.1),
        (1, 0, 0.3),
    ]
    write_csv(frame([result(cost={"num_weights": 1093734400, "train_seconds": 1.25})]), path)
    found, before = read_csv(path), path.read_bytes()
    assert b",1093734400," in before
    write_csv(found[::-1], path)
    assert path.read_bytes() == before  # the order of the rows is theirs
    write_csv(frame([result(seed=5)]), path, merge=False)
    assert list(wide(read_csv(path))["seed"]) == [5]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda text: text.replace("0.1", "nan"), "a finite number as nll of line 2"),
        (lambda text: text.replace("0.1", "much"), "a finite number as nll of line 2 .*'much'"),
        (lambda text: text.replace("0.1", "-0.1"), "a number in 0..inf as nll of line 2"),
        (lambda text: text.replace("segmentation", "guessing"), "task of line 2"),
        (lambda text: text.replace("nll", "nil", 1), r"with unknown \['nil'\]"),
        (lambda text: text.replace(",0.1,", ",,", 1), "a value, or a reason in undefined, as nll of line 2"),
        (lambda text: text.replace("seed", "sead", 1), r"without \['seed'\]"),
        (lambda text: text.replace('"{', '"[', 1), "JSON as .* of line 2"),
        (lambda text: "a,b\n1\n", "Expected the columns of results"),
        (lambda text: "", "Expected a CSV table of results"),
    ],
)
def test_a_csv_that_is_none_is_refused_with_its_line(tmp_path, change, message):
    path = write_csv(frame([result()]), tmp_path / "table.csv")
    path.write_text(change(path.read_text()))
    with pytest.raises(ValueError, match=message) as error:
        read_csv(path)
    assert len(str(error.value).splitlines()) <= 2 and str(path) in str(error.value)


def test_a_csv_that_cannot_be_written_stays_as_it_was(tmp_path, monkeypatch):
    path = write_csv(frame([result()]), tmp_path / "table.csv")
    before = path.read_bytes()
    monkeypatch.setattr("os.replace", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    with pytest.raises(OSError, match="No space"):
        write_csv(frame([result(seed=3)]), path)
    assert path.read_bytes() == before and sorted(tmp_path.iterdir()) == [path, tmp_path / "table.csv.lock"]


def test_a_row_is_known_again_by_what_was_asked_for(tmp_path):
    path = tmp_path / "table.csv"
    for rate in (0.7 / 100, 0.007, 33.3 / 100):  # the first two differ in the last bit alone
        write_csv(frame([result(r_bayes=rate)]), path)
    assert len(wide(read_csv(path))) == 2
    old = result(r_bayes=0.007, title="in other words", settings={"epochs": 3}, num_groups=4)
    write_csv(frame([old]), path, merge=False)
    write_csv(frame([result(r_bayes=0.007, settings={"epochs": 3, "scope": "global"})]), path)
    assert list(wide(read_csv(path))["title"]) == ["one line"]  # a field at its default, a new title
    write_csv(frame([result(r_bayes=0.007, settings={"epochs": 3, "scope": "layer"})]), path)
    assert len(wide(read_csv(path))) == 2
