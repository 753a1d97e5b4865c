"""The package keeps its shape: sizes, imports that go down only, lessons that can be read (see `shape.py`)."""

import subprocess
import sys

import pytest
import shape


def test_every_figure_keeps_its_limit():
    rows = shape.figures()
    assert [
        (row.name, row.value, row.limit, row.where) for row in rows if not row.ok and row.name not in shape.GOALS
    ] == []
    assert {f"lines of {name}" for name in shape.sources()} < {row.name for row in rows}


@pytest.mark.parametrize(
    "rule",
    [
        shape.imports_inside_functions,
        shape.upward_imports,
        shape.circles,
        shape.underscores_across,
        shape.keras_src,
    ],
    ids=lambda rule: rule.__name__,
)
def test_no_module_breaks_a_rule(rule):
    assert rule() == []


def test_no_class_has_more_than_two_ancestors_of_ours():
    found = shape.ancestors()
    assert {one: above for one, above in found.items() if len(above) > 2} == {}
    assert "sbn_tf.layers.MaskedGaussian" in found["sbn_tf.layers.Conv2D"]


def test_the_rules_see_what_breaks_them(monkeypatch):
    """On a package of four modules in which everything is wrong."""
    modules = {
        "sbn_tf": "",
        "sbn_tf.layers": "from sbn_tf.datasets import base\nclass A: _x = 1\nclass B(A): pass\nclass C(B): pass\n",
        "sbn_tf.datasets.base": "import keras.src.x\nfrom sbn_tf import cost\ndef f(a):\n    return a._x, a._flat\n",
        "sbn_tf.cost": "from sbn_tf import layers as l\nfrom sbn_tf.layers import _y\nclass D(l.C): pass\nz = l._z\n"
        "def told():\n    import sbn_tf.layers\n",
    }
    cached = [one for one in vars(shape).values() if hasattr(one, "cache_clear")]
    monkeypatch.setattr(shape, "sources", lambda: modules)
    monkeypatch.setattr(shape, "is_package", lambda name: name == "sbn_tf")
    for one in cached:
        one.cache_clear()
    try:
        assert shape.imports_inside_functions() == ["sbn_tf.cost:6 sbn_tf.layers"]
        assert shape.upward_imports() == ["sbn_tf.layers:1 sbn_tf.datasets.base", "sbn_tf.datasets.base:2 sbn_tf.cost"]
        assert shape.circles() == ["sbn_tf.cost sbn_tf.datasets.base sbn_tf.layers"]
        across = ["sbn_tf.cost:2 _y", "sbn_tf.cost:4 l._z", "sbn_tf.datasets.base:4 a._x"]
        assert shape.underscores_across() == across
        assert shape.borrowed_from_keras() == {"sbn_tf.cost": ["_z"], "sbn_tf.datasets.base": ["_flat"]}
        assert shape.keras_src() == ["sbn_tf.datasets.base:1 keras.src.x"]
        assert len(shape.ancestors()["sbn_tf.cost.D"]) == 3
        assert shape.words() == {"sbn_tf.cost": {"told": 1}}
        assert shape.loaded_by("sbn_tf.layers") == {"keras"}
    finally:
        for one in cached:
            one.cache_clear()


# ---- what an import loads, in a process of its own

HEAVY = ("PIL", "scipy", "pandas", "sklearn", "matplotlib")


def in_a_fresh_process(code):
    done = subprocess.run([sys.executable, "-c", code], cwd=shape.ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


def test_the_layers_load_no_heavy_library():
    """Keras itself loads these where they are installed, so they are made to be missing; and none is asked for."""
    code = f"import sys\nsys.modules.update(dict.fromkeys({HEAVY}))\nimport sbn_tf.layers\nprint(sbn_tf.layers.Dense)"
    assert in_a_fresh_process(code)
    assert shape.loaded_by("sbn_tf.layers").isdisjoint(HEAVY)


def test_the_package_alone_loads_no_backend():
    code = "import sys\nimport sbn_tf\nprint(*{name.split('.')[0] for name in sys.modules})"
    assert {"tensorflow", "keras", "jax", "torch", *HEAVY}.isdisjoint(in_a_fresh_process(code).split())


def test_the_face_offers_its_names_lazily():
    modules = ("layers", "saliency", "partial_bayes", "cost", "metrics", "datasets")
    code = f"""
import sbn_tf
print(*dir(sbn_tf))
print(*(getattr(sbn_tf, n).__name__ for n in {modules}))
print(*(getattr(sbn_tf, n).__name__ for n in sbn_tf.__all__ if n[0] != "_"))
"""
    listed, loaded, names = in_a_fresh_process(code).splitlines()
    classes = {"LocScaleOptimizer", "Masks", "load", "to_partial_bayes", "top_k", "__version__"}
    assert classes | set(modules) < set(listed.split())
    assert loaded.split() == [f"sbn_tf.{name}" for name in modules]
    assert names.split() == [
        "CalibrationError",
        "LocScaleOptimizer",
        "Masks",
        "estimate_batch_norm",
        "fit_branched",
        "load",
        "to_partial_bayes",
        "top_k",
        "turned_samples",
    ]
