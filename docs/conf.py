"""The documentation site: the README, the lessons as they are committed (none is run), and every docstring.

sphinx-build -W --keep-going -c docs . docs/_build/html
"""

import importlib.metadata
import inspect
import itertools
import logging
import os
import re
import sys
from pathlib import Path

import sphinx.util.inspect

sys.path.insert(0, str(Path(__file__).parent))
import pages

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
logging.getLogger("tensorflow").setLevel("ERROR")

project = "sbn_tf"
author = "The sbn_tf authors"
release = version = importlib.metadata.version("sbn_tf")
root_doc = "docs/index"
extensions = [
    "myst_nb",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx.ext.viewcode",
    "sphinx-mathjax-offline",  # ships MathJax with the site: its pages fetch nothing
]
include_patterns = ["docs/*.md", "docs/api/*.md", "nbs/*.ipynb", "nbs/sbn_tf/*.ipynb", "*.md"]
include_patterns += ["data/README.md", "benchmarks/README.md"]
exclude_patterns = ["docs/_build", "**/.ipynb_checkpoints", "nbs/template.ipynb"]

html_theme = "furo"
html_title = f"sbn_tf {version}"
html_show_sourcelink = False
html_static_path = ["site.css"]
html_css_files = ["site.css"]
html_theme_options = {"navigation_with_keys": True}

nb_execution_mode = "off"  # what is committed is shown
nb_merge_streams = True
myst_enable_extensions = ["dollarmath", "amsmath"]
myst_heading_anchors = 4
suppress_warnings = ["mystnb.unknown_mime_type"]

napoleon_google_docstring = True
napoleon_numpy_docstring = False
napoleon_use_rtype = False
napoleon_custom_sections = [
    "Input shape",
    "Output shape",
    "Reference",
    "References",
    ("Call arguments", "params_style"),
]
autodoc_member_order = "bysource"
autodoc_typehints = "description"
autodoc_typehints_description_target = "documented"
autodoc_preserve_defaults = True
autodoc_type_aliases = {"ArrayLike": "ArrayLike"}
add_module_names = False
autodoc_inherit_docstrings = False


sphinx.util.inspect.TypeAliasForwardRef.__repr__ = lambda alias: alias.name  # in hints such as `A | None`

PAGES = {
    "keras": "https://www.tensorflow.org/api_docs/python/tf/keras/",
    "tf": "https://www.tensorflow.org/api_docs/python/tf/",
    "tfd": "https://www.tensorflow.org/probability/api_docs/python/tfp/distributions/",
    "tfp": "https://www.tensorflow.org/probability/api_docs/python/tfp/",
}


def as_rst(app, what, name, obj, options, lines):
    """Turn a docstring, which is written to be read as it is (`code`, |loc|, Markdown tables), into Sphinx's markup."""
    found = []
    for kind, part in itertools.groupby(lines, lambda line: _kind(line, what)):
        if kind == "text":
            found += _escaped("\n".join(part)).split("\n")
            continue
        if kind == "code":
            found += ["::", "", *part, ""]
            continue
        rows = [[_escaped(cell.strip()) for cell in line.strip("|").split("|")] for line in part]
        found += [".. list-table::", "   :header-rows: 1", ""]
        for row in rows[:1] + rows[2:]:
            found += [f"   {'  ' if place else '* '}- {cell}" for place, cell in enumerate(row)]
    lines[:] = found


def _kind(line, what):
    """What a line of a docstring belongs to: "table", "code" (indented in a module's docstring) or "text"."""
    if line.startswith("|"):
        return "table"
    return "code" if what == "module" and line.startswith("    ") else "text"


def _escaped(text):
    found = []
    for part in re.split(r"(`[^`]+`)", text):
        if part.startswith("`"):
            found.append(_code(part))
            continue
        if found and part[:1].isalnum():  # `Operation`s
            found.append("\\ ")
        found.append(re.sub(r"[|*`]|(?<=\w)_(?!\w)", r"\\\g<0>", part))
    return "".join(found)


def _code(part):
    """A name of Keras, TensorFlow or TFP becomes a link to its page; anything else is code."""
    name = re.fullmatch(r"`(keras|tf|tfd|tfp)\.([A-Za-z_][\w.]*)`", part)
    if name is None:
        return f"`{part}`"
    return f"`{part[1:-1]} <{PAGES[name[1]]}{name[2].replace('.', '/')}>`__"


def with_signature(app, what, name, obj, options, signature, returns):
    """Keras gives its models a `__new__` that takes anything; the arguments of `__init__` are the real ones."""
    if what == "class" and signature == "(*args, **kwargs)":
        parameters = list(inspect.signature(obj.__init__).parameters.values())[1:]
        plain = [one.replace(annotation=one.empty) for one in parameters]
        signature = sphinx.util.inspect.stringify_signature(inspect.Signature(plain))
    return signature, returns


def setup(app):
    """Before napoleon, whose priority is 500, reads the sections."""
    pages.write(Path(app.confdir) / "api")
    app.connect("autodoc-process-signature", with_signature)
    app.connect("autodoc-process-docstring", as_rst, priority=400)
