"""The site names every module and every lesson. (Sphinx itself says what does not resolve: `sphinx-build -W`.)"""

import importlib
import pkgutil
import re
from pathlib import Path

import pytest

import sbn_tf

ROOT = Path(__file__).parents[1]
INDEX = (ROOT / "docs" / "index.md").read_text()
API = (ROOT / "docs" / "api.md").read_text()
MODULES = [
    one.name.removeprefix("sbn_tf.")
    for one in pkgutil.walk_packages(sbn_tf.__path__, "sbn_tf.")
    if one.name not in ("sbn_tf.core", "sbn_tf.experiments") and not one.name.startswith("sbn_tf.datasets.")
]


@pytest.mark.parametrize("name", MODULES)
def test_a_module_has_a_page_a_row_and_a_place_in_the_tree(name):
    assert f".. automodule:: sbn_tf.{name}\n" in (ROOT / "docs" / "api" / f"{name}.md").read_text()
    assert API.count(f"| [`sbn_tf.{name}`](api/{name}.md) |") == 1 and API.count(f"\napi/{name}\n") == 1
    assert importlib.import_module(f"sbn_tf.{name}").__doc__


def test_no_page_is_left_of_a_module_that_is_gone():
    assert sorted(path.stem for path in (ROOT / "docs" / "api").glob("*.md")) == sorted(MODULES)


def test_every_lesson_is_in_the_tree_once_and_in_the_readme():
    lessons = [path.relative_to(ROOT).as_posix() for path in (ROOT / "nbs").rglob("[!.]*.ipynb")]
    lessons = [one for one in lessons if ".ipynb_checkpoints" not in one and one != "nbs/template.ipynb"]
    listed = re.findall(r"^\.\./(nbs/\S+)$", INDEX, re.MULTILINE)
    assert sorted(f"{one}.ipynb" for one in listed) == sorted(lessons)
    readme = (ROOT / "README.md").read_text()
    assert [one for one in lessons if f"]({one})" not in readme] == []
