"""The house rules: imports point down, and what a package exports is what it says."""

from __future__ import annotations

import ast
import importlib
from pathlib import Path

import pytest

SOURCE = Path(__file__).parent.parent / "src" / "sparring"

# docs/design.md, section 3, lowest first; names on one line are strangers to each other.
LAYERS = [
    {"errors", "modes", "outputs", "proofs", "units"},
    {"threat", "layout", "matrices", "files", "graph", "plugins", "waiting"},
    {"history"},
    {"attacks", "bounds", "sparsity", "data", "models", "metrics", "statistics"},
    {"train", "deploy"},
    {"study"},
    {"report"},
    {"cli"},
]
LEVEL = {part: level for level, parts in enumerate(LAYERS) for part in parts}
MODULES = sorted(SOURCE.rglob("*.py"))


def _part(path: Path) -> str:
    return path.relative_to(SOURCE).parts[0].removesuffix(".py")


def _imported_parts(path: Path) -> set[str]:
    """Return the top-level parts of sparring that a module imports, also inside functions."""
    package = ["sparring", *path.relative_to(SOURCE).parts[:-1]]
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            stem = ".".join([*base, *([node.module] if node.module else [])])
            names = [f"{stem}.{alias.name}" for alias in node.names]
        for name in names:
            parts = name.split(".")
            if parts[0] == "sparring" and len(parts) > 1:
                found.add(parts[1])
    return found & set(LEVEL)


@pytest.mark.parametrize("path", MODULES, ids=lambda p: str(p.relative_to(SOURCE)))
def test_imports_point_down(path: Path) -> None:
    own = _part(path)
    if own not in LEVEL:
        return  # __init__ and __main__ of the package itself
    for other in _imported_parts(path) - {own}:
        allowed = LEVEL[other] < LEVEL[own] or other in ("errors", "modes")
        assert allowed, f"{path.relative_to(SOURCE)} ({own}) must not import {other}"


def test_every_part_is_in_the_layers() -> None:
    assert {_part(p) for p in MODULES} <= set(LEVEL) | {"__init__", "__main__", "plans"}


PACKAGES = [p for p in MODULES if p.name == "__init__.py"] + [p for p in MODULES if p.parent == SOURCE]


@pytest.mark.parametrize("path", sorted(set(PACKAGES)), ids=lambda p: str(p.relative_to(SOURCE)))
def test_exported_names(path: Path) -> None:
    if path.name == "__main__.py":
        return
    relative = path.relative_to(SOURCE.parent).with_suffix("")
    name = ".".join(relative.parts).removesuffix(".__init__")
    module = importlib.import_module(name)
    listed = module.__all__
    assert len(listed) == len(set(listed))
    for exported in listed:
        assert hasattr(module, exported), f"{name}.__all__ lists '{exported}', which is not there"
    if path.name == "__init__.py":
        tree = ast.parse(path.read_text())
        imported = {
            alias.asname or alias.name
            for node in tree.body
            if isinstance(node, ast.ImportFrom) and node.level
            for alias in node.names
        }
        # Some are imported only to fill a table; what the package defines itself is public too.
        used = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)}
        public = {n for n in imported if not n.startswith("_")} - used
        assert public <= set(listed), f"{name} imports {public - set(listed)} but does not list them"


@pytest.mark.parametrize("path", PACKAGES, ids=lambda p: str(p.relative_to(SOURCE)))
def test_no_module_bears_the_name_of_what_its_package_exports(path: Path) -> None:
    if path.name != "__init__.py":
        return
    name = ".".join(path.parent.relative_to(SOURCE.parent).parts)
    modules = {p.stem for p in path.parent.glob("*.py")}
    assert not modules & set(importlib.import_module(name).__all__), "`from .pgd import pgd` shadows the module"
