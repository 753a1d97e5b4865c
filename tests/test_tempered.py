"""The numbers of `benchmarks/tempered.py`, by a hand sum and hand-made rows."""

import confirm
import numpy as np
import pandas as pd
import pytest
import tempered
from helpers import table_of_page


def test_the_nll_is_the_mean_cross_entropy_over_raters():
    logits, raters = np.array([[0.3, -2.0]]), np.array([[[1, 0]], [[0, 0]], [[1, 1]], [[1, 0]]])
    p = 1 / (1 + np.exp(-logits))
    expected = np.mean([-(one * np.log(p) + (1 - one) * np.log(1 - p)).mean() for one in raters])
    assert tempered.nll(raters.mean(0), p) == pytest.approx(expected)


def test_differences_are_from_the_network_of_the_same_seed_and_fold():
    def row(seed, method, nll, scaled):
        return ["lidc", 32, "unet_small", 2, seed, method, nll, scaled, 1.5]

    listed = [row(0, "deterministic", 0.5, 0.4), row(1, "deterministic", 0.9, 0.8), row(1, "turned", 0.6, 0.7)]
    found = tempered.means(pd.DataFrame(listed, columns=[*tempered.DATA, "method", "nll", "tempered", "temperature"]))
    turned = found.set_index("method").loc["turned"]
    assert (turned["nll"], turned["tempered"], turned["trainings"]) == pytest.approx((-0.3, -0.1, 1))
    assert found.set_index("method").loc["deterministic", "nll"] == 0


def test_the_page_of_results_has_the_means():
    found = tempered.means(pd.read_csv(tempered.TABLE)).set_index(["dataset", "method"])
    lines = table_of_page("With a temperature each")
    methods = {label: method for method, label in confirm.NAMES.items()}
    assert {methods[label] for label, *_ in lines} == set(found.index.get_level_values("method"))
    for label, *cells in lines:
        method = methods[label]
        for dataset, (raw, scaled, temperature) in (("isic2018", cells[:3]), ("lidc", cells[3:])):
            if (dataset, method) not in found.index:
                assert {raw, scaled, temperature} == {"-"}
                continue
            row = found.loc[(dataset, method)]
            assert temperature == f"{row['temperature']:.2f}"
            if method != "deterministic":
                assert (raw, scaled) == tuple(confirm.short(row[key], "+.4f") for key in ("nll", "tempered"))
