"""The modules of the product import each other in one direction."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from configparser import ConfigParser
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

pytestmark = pytest.mark.pure

ROOT = Path(__file__).parents[2]
ROOMS = {"mobilevlm": "mobilevlm", "export": "mobilevlm.export", "runtime": "mobilevlm.runtime"}
"""Folders of the checkout, and the package that each is."""


def modules(root: Path) -> dict[str, Path]:
    found = {}
    for folder, package in ROOMS.items():
        for path in sorted((root / folder).rglob("*.py")):
            parts = path.relative_to(root / folder).with_suffix("").parts
            found[".".join((package, *parts)).removesuffix(".__init__")] = path
    return found


def test_every_package_is_installed() -> None:
    """But the training of the built-in models."""
    described = ConfigParser()
    described.read(ROOT / "setup.cfg", "utf-8")
    there = {name for name, path in modules(ROOT).items() if path.name == "__init__.py"}
    installed = described["options"]["packages"].split()
    assert there - set(installed) == {"mobilevlm.nano.training"}


def imports(tree: ast.AST, inside: bool) -> Iterator[str]:
    """Names that a module imports, those that functions import too if ``inside``. Types that are
    imported for the checker only are none."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            continue
        if isinstance(node, ast.Import):
            yield from (item.name for item in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.module
            yield from (f"{node.module}.{item.name}" for item in node.names)
        elif inside or not isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            yield from imports(node, inside)


def circle(root: Path, inside: bool) -> list[str]:
    """Modules that import each other in a circle; none where there is no circle."""
    found = modules(root)
    graph = {
        name: {part for part in imports(ast.parse(path.read_text()), inside) if part in found}
        - {name}
        for name, path in found.items()
    }
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        return list(error.args[1])
    return []


@pytest.mark.parametrize("inside", [False, True], ids=["at the top", "in functions too"])
def test_no_modules_import_each_other_in_a_circle(inside: bool) -> None:
    assert len(modules(ROOT)) > 200
    assert circle(ROOT, inside) == []


def test_a_circle_is_found_at_the_top_or_in_a_function(tmp_path: Path) -> None:
    for folder in ROOMS:
        (tmp_path / folder).mkdir()
    (tmp_path / "mobilevlm" / "spec.py").write_text("from mobilevlm.export import first\n")
    (tmp_path / "export" / "first.py").write_text("def f():\n    import mobilevlm.spec\n")
    assert circle(tmp_path, inside=False) == []
    assert set(circle(tmp_path, inside=True)) == {"mobilevlm.spec", "mobilevlm.export.first"}
