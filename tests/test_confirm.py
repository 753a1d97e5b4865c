"""The interval of `benchmarks/confirm.py`, by hand."""

from pathlib import Path

import confirm
import numpy as np
import pandas as pd
import pytest

from sbn_tf.experiments import results
from sbn_tf.experiments.records import Record

TABLE = Path(__file__).parents[1] / "results" / "confirm.csv"


def record(nll, groups=None):
    arrays = {"nll": np.asarray(nll, "float64"), "risk": np.zeros(len(nll))}
    return Record(task="binary", arrays=arrays, threshold=0.5, num_samples=1, groups=groups)


def test_a_difference_that_all_images_share_is_its_own_interval():
    plain = record([0.3, 0.5, 0.1, 0.4], np.array([0, 0, 1, 2]))
    pairs = {(2, 0): [record(plain.arrays["nll"] - 0.01, plain.groups), plain]}
    np.testing.assert_allclose(confirm.interval(pairs, resamples=50), [-0.01, -0.01])


def test_patients_of_two_folds_are_resampled_apart():
    """Patient 0 of each fold has difference 1, patient 1 has 0: a mean of 0, 1/2 or 1 in each fold, independently."""
    groups = np.array([0, 1])
    pairs = {(fold, 0): [record([1.0, 0.0], groups), record([0.0, 0.0], groups)] for fold in (2, 3)}
    low, high = confirm.interval(pairs, resamples=4000)
    assert (low, high) == (0.0, 1.0)  # 1/16 of the resamples each: both are beyond 2.5 %
    one = {(2, seed): pairs[2, 0] for seed in (0, 1)}  # two trainings of one fold share their patients
    assert tuple(confirm.interval(one, resamples=4000)) == (0.0, 1.0)


def test_a_record_is_found_by_its_nll(tmp_path):
    with pytest.raises(ValueError, match=r"Expected a finished run with NLL 0.500000 .* Received: \[0.4\]"):
        confirm.record_of([(0.4, tmp_path)], 0.5)
    with pytest.raises(ValueError, match="Leave --runs out"):
        confirm.records_of(tmp_path)


def tables():
    """Of each committed table: dataset, its rows, and the records of their images."""
    for table in (TABLE, TABLE.with_name("confirm64.csv")):
        found = results.wide(results.read_csv(table))
        records = confirm.images_of(table.with_name(f"{table.stem}_images.npz"))
        for dataset, rows in found[found["method"].isin(confirm.NAMES)].groupby("dataset"):
            yield dataset, rows, records[dataset]


def test_the_kept_images_have_the_means_of_the_table():
    for _, rows, records in tables():
        for method in rows["method"].unique():
            for one, nll in confirm.units(rows, method)["nll"].items():
                np.testing.assert_allclose(records[method, *one]["nll"].mean(), nll, rtol=1e-6)


def test_the_page_of_results_has_these_tables():
    _, after = (TABLE.parents[1] / "docs" / "results.md").read_text("utf-8").split("## What does one training buy?")
    section = after.split("\n### ")[0]
    pages = [[cell.strip() for cell in line.strip("|").split("|")] for line in section.splitlines() if line[:1] == "|"]
    for dataset, rows, records in tables():
        made = confirm.table_of(rows, records)
        assert ["", *made.columns] in pages
        for label, line in made.iterrows():
            assert [label, *line] in pages, (dataset, label)


def test_two_rows_of_one_training_are_refused():
    found = results.wide(results.read_csv(TABLE))
    with pytest.raises(ValueError, match=r"one row of 'turned' .* Received: two of \(2, 0\)"):
        confirm.units(pd.concat([found, found[found["fold"] == 2]]), "turned")
