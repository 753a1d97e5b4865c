"""The documentation site: the README, the lessons as they are committed (nothing is run anew), and every docstring.

sphinx-build -W --keep-going -c docs . docs/_build/html
"""

import importlib.metadata
import inspect
import itertools
import logging
import os
import re

import sphinx.util.inspect

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
logging.getLogger("tensorflow").setLevel("ERROR")

from sbn_tf.layers import MaskedGaussian  # noqa: E402  (after TensorFlow is told to be quiet)
from sbn_tf.partial_bayes import PartialBayes  # noqa: E402

project = "sbn_tf"
author = "The sbn_tf authors"
release = version = importlib.metadata.version("sbn_tf")
root_doc = "docs/index"
extensions = [
    "myst_nb",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx.ext.viewcode",
]
include_patterns = ["docs/*.md", "docs/api/*.md", "nbs/*.ipynb", "nbs/sbn_tf/*.ipynb", "*.md"]
include_patterns += ["data/README.md", "benchmarks/README.md"]
exclude_patterns = ["docs/_build", "**/.ipynb_checkpoints", "nbs/template.ipynb"]

html_theme = "furo"
html_title = f"sbn_tf {version}"
html_show_sourcelink = False
html_theme_options = {"navigation_with_keys": True}

nb_execution_mode = "off"  # what is committed is shown
nb_merge_streams = True
myst_enable_extensions = ["dollarmath", "amsmath"]
myst_heading_anchors = 4
suppress_warnings = ["mystnb.unknown_mime_type"]

napoleon_google_docstring = True
napoleon_numpy_docstring = False
napoleon_use_rtype = False
napoleon_custom_sections = ["Input shape", "Output shape", "Reference", "References"]
autodoc_member_order = "bysource"
autodoc_typehints = "description"
autodoc_typehints_description_target = "documented"
autodoc_preserve_defaults = True
autodoc_type_aliases = {"ArrayLike": "ArrayLike"}
add_module_names = False
autodoc_inherit_docstrings = False


sphinx.util.inspect.TypeAliasForwardRef.__repr__ = lambda alias: alias.name  # in hints that hold it, as `A | None`

PAGES = {
    "keras": "https://www.tensorflow.org/api_docs/python/tf/keras/",
    "tf": "https://www.tensorflow.org/api_docs/python/tf/",
    "tfd": "https://www.tensorflow.org/probability/api_docs/python/tfp/distributions/",
    "tfp": "https://www.tensorflow.org/probability/api_docs/python/tfp/",
}


def as_rst(app, what, name, obj, options, lines):
    """Docstrings are written to be read as they are, `code`, |loc|, tables of Markdown. Say it as Sphinx reads it."""
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
    """What a line of a docstring is of: "table", "code" (indented, in a module's; elsewhere an argument) or "text"."""
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
    """A name of Keras, TensorFlow or TFP leads to its page; anything else is code."""
    name = re.fullmatch(r"`(keras|tf|tfd|tfp)\.([A-Za-z_][\w.]*)`", part)
    if name is None:
        return f"`{part}`"
    return f"`{part[1:-1]} <{PAGES[name[1]]}{name[2].replace('.', '/')}>`__"


def whole(cls):
    """Lessons tell a long class in parts, each a private base of the next; to a reader of the reference it is one."""
    for part in cls.__mro__[1:]:
        if _is_part(part, cls):
            for name in [name for name in vars(part) if not name.startswith("_") and name not in vars(cls)]:
                setattr(cls, name, vars(part)[name])
    parameters = list(inspect.signature(cls.__init__).parameters.values())[1:]
    cls.__signature__ = inspect.Signature(parameters)  # Keras's own of a model says (*args, **kwargs)


def known_bases(app, name, obj, options, bases):
    """Instead of the parts of a class, what its first part is derived from."""
    while any(_is_part(base, obj) for base in bases):
        bases[:] = [one for base in bases for one in (base.__bases__ if _is_part(base, obj) else [base])]


def _is_part(base, cls):
    return base.__module__ == cls.__module__ and base.__name__.startswith("_")


def setup(app):
    """Before napoleon, whose priority is 500, reads the sections."""
    for cls in (MaskedGaussian, PartialBayes):
        whole(cls)
    app.connect("autodoc-process-bases", known_bases)
    app.connect("autodoc-process-docstring", as_rst, priority=400)
