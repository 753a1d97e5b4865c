"""The site has every module and every lesson. (Sphinx itself says what does not resolve: `sphinx-build -W`.)"""

import importlib
import re
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "docs"))

import pages  # noqa: E402

INDEX = (ROOT / "docs" / "index.md").read_text()
PAGES = pages.pages()


@pytest.mark.parametrize("name", PAGES)
def test_a_public_module_has_a_page_and_says_what_it_is(name):
    assert f".. automodule:: sbn_tf.{name}\n" in PAGES[name]
    assert importlib.import_module(f"sbn_tf.{name}").__doc__


def test_every_public_module_has_a_page_and_no_other(tmp_path):
    assert {"layers", "cost", "core.conversion", "datasets"} < set(PAGES)
    (tmp_path / "gone.md").write_text("of a module that is gone")
    pages.write(tmp_path)
    assert sorted(path.stem for path in tmp_path.glob("*.md")) == sorted(PAGES)
    assert "\napi/*\n" in (ROOT / "docs" / "api.md").read_text()


def test_every_lesson_is_in_the_tree_once_and_in_the_readme():
    lessons = [path.relative_to(ROOT).as_posix() for path in (ROOT / "nbs").rglob("[!.]*.ipynb")]
    lessons = [one for one in lessons if ".ipynb_checkpoints" not in one and one != "nbs/template.ipynb"]
    listed = re.findall(r"^\.\./(nbs/\S+)$", INDEX, re.MULTILINE)
    assert sorted(f"{one}.ipynb" for one in listed) == sorted(lessons)
    readme = (ROOT / "README.md").read_text()
    assert [one for one in lessons if f"]({one})" not in readme] == []
