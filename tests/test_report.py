"""Reports: costs, words, and the Markdown of any table."""

import re

import numpy as np
import pandas as pd
import pytest
from helpers import mask_result as result

from sbn_tf.experiments.report import cost_table, describe_metrics, shift_table, show, to_markdown
from sbn_tf.experiments.results import frame
from sbn_tf.metrics import METRICS


def test_metrics_are_described():
    assert describe_metrics(["nll", "entropy"]).splitlines() == [
        f"- `nll`: {METRICS['nll'].meaning} (lower is better)",
        f"- `entropy`: {METRICS['entropy'].meaning} (neither way is better)",
    ]
    with pytest.raises(ValueError, match=r"Received: \['f2'\]"):
        describe_metrics(["f2"])


def test_cost_table_by_hand():
    cost = {"num_trainable": 1234567, "weight_bytes": 2.5e6, "train_flops_ratio": 2.0, "train_seconds": 3.0}
    made = [
        result("trivial_prevalence", None),
        result("partial", 0, cost=cost),
        result("partial", 1, cost=cost | {"train_seconds": 4.0, "train_grown_bytes": None}),
    ]
    table = cost_table(frame(made))
    assert list(table.index) == ["partial"]
    shown = table.loc["partial"]
    assert shown["trainable"] == "1,234,567" and shown["weights, MB"] == "2.50" and shown["train, x"] == "2.00"
    assert shown["train, s"] == "3.5" and shown["memory, MB"] == "-"
    assert any("paper's, x: the paper's formula" in note for note in table.attrs["notes"])
    assert list(cost_table(frame(made), ["train_seconds"]).columns) == ["train, s"]


def test_results_of_nothing_or_of_two_datasets_have_no_costs():
    with pytest.raises(ValueError, match="Expected one result or more"):
        cost_table(frame([]))
    with pytest.raises(ValueError, match="Expected results of one dataset"):
        cost_table(frame([result(), result(dataset="lidc")]))


def test_shifts_have_their_mean_and_spread():
    made = [
        result(seed=seed, shift={"noise": {"severity": 2.0, "entropy": value, "mutual_information": None}})
        for seed, value in enumerate((0.6, 0.8))
    ]
    table = shift_table(frame(made))
    assert table.loc["partial"].tolist() == [f"0.700 +- {np.std([0.6, 0.8], ddof=1):.3f}", "-"]
    assert list(table.columns) == ["noise: entropy", "noise: mutual information"]
    assert table.attrs["notes"][0].endswith("Severities: noise 2.")


def test_markdown_of_a_table():
    table = pd.DataFrame({"dice": [0.86125, 1.0], "n": [3, pd.NA]}, index=["deterministic", "b"], dtype="object")
    assert to_markdown(table) == "\n".join(
        [
            "|               |  dice |   n |",
            "| :------------ | ----: | --: |",
            "| deterministic | 0.861 |   3 |",
            "| b             | 1.000 |   - |",
        ]
    )
    table.attrs["notes"] = ["One.", "Two."]
    assert to_markdown(table).endswith("\n\nOne.  \nTwo.")
    assert to_markdown(pd.DataFrame(columns=["dice"])).count("\n") == 1


def test_markdown_shows_no_small_number_as_zero():
    table = pd.DataFrame({"x": [8.9e-5], "y": [0.0], "z": [6e-4]}, index=["a"])
    assert "| 8.9e-05 | 0.000 | 0.001 |" in to_markdown(table)


def test_a_table_is_shown_as_a_table_with_its_best_values_bold(monkeypatch):
    shown = []
    monkeypatch.setattr("IPython.display.display", lambda one: shown.append(one.data))
    table = pd.DataFrame({"dice": ["0.5 +- 0.1", "0.7 +- 0.1"], "size <": [1.5, 2.5]}, index=["a & b", "c"])
    table.attrs |= {"notes": ["A note."], "best": {"dice": ["c"], "size <": []}}
    show(table, digits=1)
    cells = re.findall("<t[hd]>(.*?)</t[hd]>", shown[0])
    assert cells[-6:] == [
        "a &amp; b",
        "0.5&nbsp;&plusmn;&nbsp;0.1",
        "1.5",
        "c",
        "<b>0.7&nbsp;&plusmn;&nbsp;0.1</b>",
        "2.5",
    ]
    assert "<th>size &lt;</th>" in shown[0]
    assert shown[1].startswith("Bold: ") and shown[1].endswith("A note.")


def test_the_nearest_numbers_are_bold(monkeypatch):
    shown = []
    monkeypatch.setattr("IPython.display.display", lambda one: shown.append(one.data))
    table = pd.DataFrame({"high": [0.904, 0.9, float("nan")], "low": [2, 1, 3], "95 %": [0.99, 0.9, 0.96]})
    show(table, {"high": np.inf, "low": -np.inf, "95 %": 0.95}, digits=2)
    cells = [re.findall("<td>(.*?)</td>", row) for row in shown[0].split("<tr")[2:]]
    assert cells == [["<b>0.90</b>", "2", "0.99"], ["<b>0.90</b>", "<b>1</b>", "0.90"], ["-", "3", "<b>0.96</b>"]]
    assert len(shown) == 1  # no note
    with pytest.raises(ValueError, match=r"Expected columns among .*Received: \['f2'\]"):
        show(table, {"f2": np.inf})
