"""An architecture of keras.applications, another from day to day, by the check of `benchmarks/applications.py`.

Which ones: the day's number modulo the list below, or SBN_TF_ROTATION (a whole number) to repeat a day's choice, which
the test's name tells. The script itself runs all of them and prints the table.
"""

import datetime
import os

import applications
import keras
import pytest

LIGHT = [
    *("MobileNet", "MobileNetV2", "MobileNetV3Small", "MobileNetV3Large", "ResNet50V2", "EfficientNetB0", "ResNet50"),
    *("ConvNeXtTiny", "Xception"),
]
ROTATION = int(os.environ.get("SBN_TF_ROTATION", datetime.date.today().toordinal()))
TODAY = [LIGHT[ROTATION % len(LIGHT)]]  # one: a minute or two of the time that CI has


def test_the_script_knows_every_architecture():
    families = [family for family in vars(keras.applications).values() if hasattr(family, "preprocess_input")]
    offered = {name for family in families for name in vars(family) if name[:1].isupper()}
    assert set(applications.names()) == offered | {"MobileNetV3Small", "MobileNetV3Large"}  # their module names none
    assert len(applications.names()) >= 40 and set(LIGHT) <= set(applications.names())


@pytest.mark.parametrize("name", TODAY, ids=[f"rotation{ROTATION}-{name}" for name in TODAY])
def test_an_architecture_holds(name):
    row = applications.check(name)
    assert row["ok"], row


def test_the_table_tells_what_failed():
    good = {"architecture": "A", "size": 32, "parameters": 1000, "bayesian": 10, "difference": 0.0, "seconds": 1.0}
    bad = {"architecture": "B", "ok": False, "reason": "not done within 30 minutes"}
    lines = applications.table([{**good, "ok": True, "reason": ""}, bad]).splitlines()
    assert lines[1].endswith("ok") and lines[2].endswith("not done within 30 minutes")
    assert lines[-1] == "1 of 2 hold."
