"""The pages of the API reference, one for each public module; `conf.py` writes them before each build."""

import ast
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def pages() -> dict[str, str]:
    """Module name without `sbn_tf.` -> its page. A module is public if it has an `__all__`.

    The modules of `datasets` are left out, since `sbn_tf.datasets` itself exports what they offer.
    """
    found = {}
    for path in sorted((ROOT / "sbn_tf").rglob("*.py")):
        parts = path.relative_to(ROOT / "sbn_tf").with_suffix("").parts
        name = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
        if name and not name.startswith("datasets.") and _has_all(path):
            found[name] = _page(name)
    return found


def write(folder: Path) -> None:
    """Write every page, and remove those of modules that are gone."""
    folder.mkdir(exist_ok=True)
    wanted = {folder / f"{name}.md": page for name, page in pages().items()}
    for old in set(folder.glob("*.md")) - set(wanted):
        old.unlink()
    for path, page in wanted.items():
        if not path.exists() or path.read_text("utf-8") != page:  # an equal page is not built again
            path.write_text(page, "utf-8")


def _has_all(path):
    body = ast.parse(path.read_text("utf-8")).body
    return any(isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__" for node in body)


def _page(name):
    lesson = ROOT / "nbs" / "sbn_tf" / f"{name}.ipynb"
    link = f"The same text as a lesson: [{name}](../../nbs/sbn_tf/{name}.ipynb).\n\n" if lesson.exists() else ""
    options = "   :members:\n   :show-inheritance:\n"
    return f"# sbn_tf.{name}\n\n{link}```{{eval-rst}}\n.. automodule:: sbn_tf.{name}\n{options}```\n"
