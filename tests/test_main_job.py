"""The README's numbers of its main job are the means of the committed rows."""

import re
from pathlib import Path

import pandas as pd
import pytest

ROOT = Path(__file__).parents[1]


def test_the_readme_has_the_means_of_the_eight_seeds():
    rows = pd.read_csv(ROOT / "results" / "main_job_seeds.csv")
    means = rows.groupby("method").mean()
    caption = re.search(r"^\*The last columns.*$", (ROOT / "README.md").read_text("utf-8"), re.M)[0]
    said = [float(number) for number in re.findall(r"(?<![\w/])\.\d+", caption)]
    members, control = means.loc["members"], means.loc["deterministic_longer"]
    spread = rows.loc[rows["method"] == "members", "blur_mutual_information"].std()
    cuts = means.loc["trivial_level_sets", "ged"]
    expected = [members["ged"], control["ged"], members["nll"], control["nll"], cuts]
    expected += [members["blur_mutual_information"], spread, control["blur_entropy"]]
    assert len(said) == len(expected)
    for number, mean in zip(said, expected, strict=True):
        assert number == pytest.approx(mean, abs=0.0051 if number > 0.1 else 0.000051)
    assert rows["seed"].nunique() == 8 and "(eight seeds)" in caption
