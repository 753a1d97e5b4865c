"""The shape of the package in figures, each with its limit: `python tests/shape.py`.

It reads source files and notebooks and imports nothing of sbn_tf. The exit code is 1 if a limit is broken.
"""

from __future__ import annotations

import ast
import json
import re
import statistics
import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
LESSONS = ("layers", "saliency", "partial_bayes", "metrics", "cost")
INTERNALS = "sbn_tf.core.keras_internals"
WORDS = ("anew", "told", "of now", "be it")

GOALS = ("lines of sbn_tf/",)  # not reached yet: no test fails
MAX_LINES, MAX_MODULE, MAX_LESSON = 17_000, 450, 600
MAX_FUNCTION, MAX_LONG_FUNCTIONS, MAX_PUBLIC, MAX_ANCESTORS = 60, 10, 200, 2
MAX_FIRST_OUTPUT, MAX_CELL, MAX_CLASS_CELL, MAX_MEDIAN_CELL = 5, 40, 90, 10


@dataclass(frozen=True)
class Figure:
    """One row of the table; `where` names what breaks the limit, or the largest ones."""

    name: str
    value: float
    limit: float | None = None
    where: tuple[str, ...] = ()

    @property
    def ok(self) -> bool:
        """Whether the value keeps its limit."""
        return self.limit is None or self.value <= self.limit


@cache
def sources() -> dict[str, str]:
    """The text of each module of the package by its dotted name."""
    found = {}
    for path in sorted((ROOT / "sbn_tf").rglob("*.py")):
        parts = path.relative_to(ROOT).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path.read_text("utf-8")
    return found


@cache
def trees() -> dict[str, ast.Module]:
    """The syntax tree of each module of the package."""
    return {name: ast.parse(text) for name, text in sources().items()}


def is_package(name: str) -> bool:
    """Whether a module is the `__init__.py` of a folder."""
    return (ROOT / Path(*name.split(".")) / "__init__.py").exists()


def floor(name: str) -> int:
    """0: core and lessons, and the package itself, which loads lazily; 1: datasets; 2: experiments; 3: command line."""
    return {"datasets": 1, "experiments": 2, "__main__": 3}.get(f"{name}.".split(".")[1], 0)


# ---- imports


@dataclass(frozen=True)
class Import:
    """One imported name: `module` of ours, or of another package, and the `name` taken from it, if any."""

    line: int
    module: str
    name: str | None
    alias: str
    inside: bool  # of a function


@cache
def imports(module: str) -> tuple[Import, ...]:
    """Every import of a module, those inside functions included."""
    package = module.split(".") if is_package(module) else module.split(".")[:-1]
    found = []

    def visit(node, inside):
        if isinstance(node, ast.Import):
            for one in node.names:
                found.append(Import(node.lineno, one.name, None, one.asname or one.name, inside))
        if isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            base = ".".join([*base, *filter(None, [node.module])])
            for one in node.names:
                alias, full = one.asname or one.name, f"{base}.{one.name}"
                taken = (full, None) if full in sources() else (base, one.name)
                found.append(Import(node.lineno, *taken, alias, inside))

        for child in ast.iter_child_nodes(node):
            visit(child, inside or isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda))

    visit(trees()[module], False)
    return tuple(found)


def own_imports(module: str) -> list[Import]:
    """The imports of modules of ours."""
    return [one for one in imports(module) if one.module.split(".")[0] == "sbn_tf"]


def imports_inside_functions() -> list[str]:
    """Imports of our own modules that stand in a function."""
    found = [f"{name}:{one.line} {one.module}" for name in sources() for one in own_imports(name) if one.inside]
    return list(dict.fromkeys(found))


def upward_imports() -> list[str]:
    """Imports of a higher floor; and what a module of `datasets` imports but `core.files` and its neighbours."""
    found = []
    for name in sources():
        for one in own_imports(name):
            up = floor(one.module) > floor(name)
            foreign = floor(name) == 1 and floor(one.module) == 0 and one.module != "sbn_tf.core.files"
            if up or foreign:
                found.append(f"{name}:{one.line} {one.module}")
    return list(dict.fromkeys(found))


def circles() -> list[str]:
    """Groups of modules that import one another."""
    graph = {name: {one.module for one in own_imports(name)} & set(sources()) - {name} for name in sources()}
    reached = {}
    for name in graph:
        seen, waiting = set(), list(graph[name])
        while waiting:
            if (one := waiting.pop()) not in seen:
                seen.add(one)
                waiting += graph[one]
        reached[name] = seen
    groups = {frozenset(b for b in reached[a] if a in reached[b]) for a in graph if a in reached[a]}
    return sorted(" ".join(sorted(group)) for group in groups)


def loaded_by(module: str) -> set[str]:
    """Packages of others that `import module` loads through modules of ours."""
    seen, waiting, found = set(), [module], set()
    while waiting:
        name = waiting.pop()
        if name in seen or name not in sources():
            continue
        seen.add(name)
        waiting += [".".join(name.split(".")[:place]) for place in range(1, name.count(".") + 1)]  # its packages
        for one in imports(name):
            if not one.inside:
                waiting.append(one.module)
                found.add(one.module.split(".")[0])
    return found - {"sbn_tf", "__future__"}


# ---- names with an underscore, and Keras's insides


def is_private(name: str) -> bool:
    """Whether a name starts with one underscore."""
    return name.startswith("_") and not name.startswith("__") and name != "_"


@cache
def defined_names(module: str) -> frozenset[str]:
    """Private names that a module defines: functions, classes, variables, attributes of its own objects."""
    found = set()
    for node in ast.walk(trees()[module]):
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            found.add(node.name)
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            found.add(node.id)
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
            found |= {node.attr} if ast.unparse(node.value) in ("self", "cls") else set()
    return frozenset(filter(is_private, found))


@cache
def defined_anywhere() -> frozenset[str]:
    """Private names that any module of ours defines."""
    return frozenset().union(*map(defined_names, sources()))


def private_reads(module: str) -> Iterator[tuple[int, str, str]]:
    """(line, owner, name) of each private attribute that is read, by a dot or by `getattr`."""
    for node in ast.walk(trees()[module]):
        if isinstance(node, ast.Attribute) and is_private(node.attr):
            yield node.lineno, ast.unparse(node.value), node.attr
        if isinstance(node, ast.Call) and ast.unparse(node.func) in ("getattr", "hasattr", "setattr"):
            name = node.args[1]
            if isinstance(name, ast.Constant) and is_private(str(name.value)):
                yield node.lineno, ast.unparse(node.args[0]), name.value


def underscores_across() -> list[str]:
    """Private names of one module of ours that another imports, or reads on the module, a class or an object of it."""
    found = []
    for name in sources():
        elsewhere = defined_anywhere() - defined_names(name)
        found += [f"{name}:{one.line} {one.name}" for one in own_imports(name) if one.name and is_private(one.name)]
        aliases = {one.alias for one in own_imports(name)}
        for line, owner, attribute in private_reads(name):
            foreign = name != INTERNALS and attribute in elsewhere and owner not in ("self", "cls", "super()")
            if owner in aliases or foreign:
                found.append(f"{name}:{line} {owner}.{attribute}")
    return sorted(set(found))


def borrowed_from_keras() -> dict[str, list[str]]:
    """Module -> private attributes in use that no module of ours defines: Keras's and TensorFlow's."""
    found = {}
    for name in sources():
        names = sorted({attribute for _, _, attribute in private_reads(name)} - defined_anywhere())
        if names:
            found[name] = names
    return found


def keras_src() -> list[str]:
    """Imports of `keras.src` outside `core/keras_internals.py`."""
    found = []
    for name in sources():
        if name != INTERNALS:
            found += [f"{name}:{one.line} {one.module}" for one in imports(name) if one.module.startswith("keras.src")]
    return sorted(set(found))


# ---- functions, classes, words


def long_functions() -> dict[str, int]:
    """Functions above 60 lines, docstring included -> their lines."""
    found = {}
    for name, tree in trees().items():
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                lines = node.end_lineno - node.lineno + 1
                if lines > MAX_FUNCTION:
                    found[f"{name}:{node.lineno} {node.name}"] = lines
    return dict(sorted(found.items(), key=lambda item: -item[1]))


def public_names() -> dict[str, int]:
    """Module -> how many names its `__all__` has; what is in `core` is for the package itself."""
    found = {}
    for name, tree in trees().items():
        if name.startswith("sbn_tf.core"):
            continue
        for node in tree.body:
            if isinstance(node, ast.Assign | ast.AnnAssign) and ast.unparse(node).startswith("__all__"):
                found[name] = sum(isinstance(one, ast.Constant) for one in ast.walk(node.value))
    return found


def ancestors() -> dict[str, set[str]]:
    """Class of ours -> the classes of ours that it is derived from, near and far."""
    parents = {}
    for name, tree in trees().items():
        here = {node.name: f"{name}.{node.name}" for node in ast.walk(tree) if isinstance(node, ast.ClassDef)}
        for one in own_imports(name):
            here[one.alias] = f"{one.module}.{one.name}" if one.name else one.module
        for node in ast.walk(tree):
            if isinstance(node, ast.ClassDef):
                split = [ast.unparse(base).split("[")[0].partition(".") for base in node.bases]
                parents[f"{name}.{node.name}"] = {
                    here[first] + dot + rest for first, dot, rest in split if first in here
                }

    def above(one, seen=()):
        direct = {base for base in parents.get(one, ()) if base in parents and base not in seen}
        return direct.union(*(above(base, (*seen, base)) for base in direct))

    return {one: above(one) for one in parents}


def words() -> dict[str, Counter]:
    """Module -> how often each word of inverted English stands in it."""
    found = {}
    for name, text in sources().items():
        flat = re.sub(r"\s+#?\s*", " ", text)
        counts = Counter({word: len(re.findall(rf"\b{word}\b", flat, re.IGNORECASE)) for word in WORDS})
        if counts.total():
            found[name] = +counts
    return dict(sorted(found.items(), key=lambda item: -item[1].total()))


# ---- lessons


@dataclass(frozen=True)
class Lesson:
    """What a lesson's notebook is made of; cells count from 1, markdown included."""

    name: str
    lines: int
    first_output: int
    longest_cell: int
    longest_class_cell: int
    median_cell: float


@cache
def lessons() -> tuple[Lesson, ...]:
    """The five lessons, as they are committed."""
    found = []
    for name in LESSONS:
        cells = json.loads((ROOT / "nbs" / "sbn_tf" / f"{name}.ipynb").read_text("utf-8"))["cells"]
        code = ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"]
        with_class = [len(one.splitlines()) for one in code if re.search(r"^class ", one, re.MULTILINE)]
        without = [len(one.splitlines()) for one in code if not re.search(r"^class ", one, re.MULTILINE)]
        found.append(
            Lesson(
                name=name,
                lines=len(sources()[f"sbn_tf.{name}"].splitlines()),
                first_output=next(
                    (place for place, cell in enumerate(cells, 1) if cell.get("outputs")), len(cells) + 1
                ),
                longest_cell=max(without, default=0),
                longest_class_cell=max(with_class, default=0),
                median_cell=statistics.median(with_class + without),
            )
        )
    return tuple(found)


# ---- the table


def lines_by_module() -> dict[str, int]:
    """Module -> its lines, longest first."""
    lines = {name: len(text.splitlines()) for name, text in sources().items()}
    return dict(sorted(lines.items(), key=lambda item: -item[1]))


def module_limit(name: str) -> int:
    """How many lines a module may have."""
    return MAX_LESSON if name in {f"sbn_tf.{lesson}" for lesson in LESSONS} else MAX_MODULE


def figures() -> list[Figure]:
    """Every figure with its limit."""
    lines, public, longest = lines_by_module(), public_names(), long_functions()
    above = {one: found for one, found in ancestors().items() if len(found) > MAX_ANCESTORS}
    borrowed = borrowed_from_keras()
    outside = {name: names for name, names in borrowed.items() if name != INTERNALS}
    spoken = words()

    def several(name, found, limit=0):
        return Figure(name, len(found), limit, tuple(found))

    rows = [Figure("lines of sbn_tf/", sum(lines.values()), MAX_LINES)]
    rows += [Figure(f"lines of {name}", number, module_limit(name)) for name, number in lines.items()]
    rows += [
        several(
            f"functions above {MAX_FUNCTION} lines", [f"{k} ({n})" for k, n in longest.items()], MAX_LONG_FUNCTIONS
        ),
        Figure("public names", sum(public.values()), MAX_PUBLIC, tuple(f"{k} ({n})" for k, n in public.items())),
        several(
            f"classes with more than {MAX_ANCESTORS} ancestors of our own",
            [f"{k} ({len(v)})" for k, v in above.items()],
        ),
    ]
    for lesson in lessons():
        rows += [
            Figure(f"lesson {lesson.name}: first output at cell", lesson.first_output, MAX_FIRST_OUTPUT),
            Figure(f"lesson {lesson.name}: longest code cell", lesson.longest_cell, MAX_CELL),
            Figure(f"lesson {lesson.name}: longest class cell", lesson.longest_class_cell, MAX_CLASS_CELL),
            Figure(f"lesson {lesson.name}: median code cell", lesson.median_cell, MAX_MEDIAN_CELL),
        ]
    return [
        *rows,
        several("own imports inside functions", imports_inside_functions()),
        several("circles of modules", circles()),
        several("imports of a higher floor", upward_imports()),
        several("underscore names across modules", underscores_across()),
        several("imports of keras.src outside keras_internals", keras_src()),
        Figure("private names of Keras and TensorFlow", len(set().union(*borrowed.values())), None),
        Figure(
            "... outside keras_internals",
            len(set().union(*outside.values())),
            None,
            tuple(f"{name}: {', '.join(names)}" for name, names in outside.items()),
        ),
        Figure(
            f"words: {', '.join(WORDS)}",
            sum(counts.total() for counts in spoken.values()),
            0,
            tuple(
                f"{name} ({', '.join(f'{word} {n}' for word, n in found.items())})" for name, found in spoken.items()
            ),
        ),
    ]


def main() -> int:
    """Print the table; 1 if a limit is broken."""
    rows = figures()
    print(f"{'figure':<62}{'value':>8}{'limit':>8}  ok")
    for row in rows:
        limit = "" if row.limit is None else f"{row.limit:,}"
        print(f"{row.name:<62}{row.value:>8,}{limit:>8}  {'yes' if row.ok else 'NO'}")
        if not row.ok or row.limit is None:
            print("".join(f"    {one}\n" for one in row.where), end="")
    broken = sum(not row.ok for row in rows)
    print(f"\n{broken} of {len(rows)} limits broken" if broken else "\nEvery limit holds.")
    return int(bool(broken))


if __name__ == "__main__":
    sys.exit(main())
