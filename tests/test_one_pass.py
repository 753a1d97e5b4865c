"""The low-rank Gaussian of `benchmarks/one_pass.py`, by its mean and covariance."""

import keras
import numpy as np
import one_pass
import pandas as pd
import pytest
from helpers import table_of_page


def test_logits_have_the_mean_and_covariance_of_the_head():
    outputs = np.random.default_rng(0).normal(size=(2, 1, 3, 2 + one_pass.RANK)).astype("float32")
    drawn = keras.ops.convert_to_numpy(one_pass.sampled_logits(outputs, 100_000, keras.random.SeedGenerator(0)))
    for image, samples in zip(outputs[:, 0], drawn[:, :, 0].swapaxes(0, 1), strict=True):
        mean, factors, diagonal = image[:, 0], image[:, 1:-1], image[:, -1]
        np.testing.assert_allclose(samples.mean(0), mean, atol=0.05)
        expected = factors @ factors.T + np.diag(np.exp(diagonal))
        np.testing.assert_allclose(np.cov(samples.T), expected, atol=0.3)
    together = np.cov(drawn[:, :, 0].reshape(len(drawn), -1).T)
    np.testing.assert_allclose(together[:3, 3:], 0, atol=0.15)  # two images are independent


def test_the_page_of_results_has_the_means_of_the_rows():
    means = pd.read_csv(one_pass.TABLE).groupby(["method", "dataset"])[["nll", "ged"]].mean()
    rows = table_of_page("Tried, and not kept")
    assert {row[0] for row in rows} == set(means.index.get_level_values("method"))
    for method, *cells, _ in rows:
        for cell, (dataset, key) in zip(cells, [("isic2018", "nll"), ("lidc", "nll"), ("lidc", "ged")], strict=True):
            if cell != "-":
                digits = len(cell.split(".")[1])
                assert float(cell) == pytest.approx(means.loc[(method, dataset), key], abs=0.5001 * 10**-digits)
