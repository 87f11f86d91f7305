"""The house rules: imports point down, and what a package exports is what it says."""

from __future__ import annotations

import ast
import functools
import importlib
import statistics
import subprocess
import sys
from pathlib import Path

import pytest

SOURCE = Path(__file__).parent.parent / "src" / "sparring"

# docs/design.md, section 3, lowest first; names on one line are not importing each other.
LAYERS = [
    {"children", "declared", "draws", "errors", "facts", "modes", "outputs", "proofs", "ram", "units", "waiting"},
    {
        "devices",
        "threat",
        "memory_format",
        "matrices",
        "files",
        "graph",
        "memory",
        "plugins",
        "progress",
        "threads",
    },
    {"history", "records", "tally"},
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


@functools.cache
def _imported_modules(path: Path) -> frozenset[str]:
    """Return the dotted names that a module imports, also inside functions, each with what is taken from it."""
    package = ["sparring", *path.relative_to(SOURCE).parts[:-1]]
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            stem = ".".join([*base, *([node.module] if node.module else [])])
            found |= {f"{stem}.{alias.name}" for alias in node.names}
    return frozenset(found)


def _imported_parts(path: Path) -> set[str]:
    """Return the top-level parts of sparring that a module imports, also inside functions."""
    names = (name.split(".") for name in _imported_modules(path))
    return {parts[1] for parts in names if parts[0] == "sparring" and len(parts) > 1} & set(LEVEL)


@pytest.mark.parametrize("path", MODULES, ids=lambda p: str(p.relative_to(SOURCE)))
def test_imports_point_down(path: Path) -> None:
    own = _part(path)
    if own not in LEVEL:
        return  # __init__ and __main__ of the package itself
    for other in _imported_parts(path) - {own}:
        allowed = LEVEL[other] < LEVEL[own] or other in ("errors", "modes")
        assert allowed, f"{path.relative_to(SOURCE)} ({own}) must not import {other}"


def test_every_part_is_in_the_layers() -> None:
    assert {_part(p) for p in MODULES} <= set(LEVEL) | {"__init__", "__main__"}


def test_records_are_read_without_torch_or_pydantic() -> None:
    found = "import sys, sparring.records; print({'torch', 'pydantic'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", found], capture_output=True, text=True, check=True, timeout=120)
    assert done.stdout == "set()\n"


# A room inside a part exports nothing: its part says what is public.
PACKAGES = [p for p in MODULES if p.name == "__init__.py" and len(p.relative_to(SOURCE).parts) < 3]
PACKAGES += [p for p in MODULES if p.parent == SOURCE]


@pytest.mark.parametrize("path", MODULES, ids=lambda p: str(p.relative_to(SOURCE)))
def test_private_modules_are_imported_only_by_their_own_part(path: Path) -> None:
    for name in _imported_modules(path):
        parts = name.split(".")
        if parts[0] != "sparring" or len(parts) < 3 or parts[1] == _part(path):
            continue
        assert len(parts) == 3 and not parts[2].startswith("_"), f"{path.relative_to(SOURCE)} imports {name}"


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


def test_the_map_of_the_design_is_complete() -> None:
    """The block under "Layout" lists each module under its room."""
    text = (SOURCE.parents[1] / "docs" / "design.md").read_text()
    block = text.split("## 3. Layout", 1)[1].split("```")[1]
    rooms: list[tuple[int, str]] = []
    drawn = set()
    for line in block.splitlines():
        indent, words = len(line) - len(line.lstrip()), line.split()
        while rooms and words and rooms[-1][0] >= indent:
            rooms.pop()
        if words and words[0].endswith("/"):
            rooms.append((indent, words[0]))
        elif words and (words[0].startswith("_") or words[0].endswith(".py")):
            names = words[:1] if words[0].endswith(".py") else [word for word in words if word != "·"]
            drawn |= {"".join(room for _, room in rooms[1:]) + name.removesuffix(".py") for name in names}
    there = {str(path.relative_to(SOURCE).with_suffix("")) for path in MODULES if not path.stem.startswith("__")}
    assert drawn == there


def test_parts_are_listed_before_they_are_imported() -> None:
    code = "import sparring, sys; assert 'sparring.attacks' not in sys.modules; print(*dir(sparring))"
    listed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert {path.parent.name for path in SOURCE.glob("*/__init__.py")} - set(listed) <= {"cli", "graph", "records"}


@pytest.mark.parametrize("path", [p for p in MODULES if _part(p) == "cli"], ids=lambda p: p.name)
def test_commands_are_short(path: Path) -> None:
    """What a command does is a call that Python users have too: here is only what reads options and prints."""
    functions = [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.FunctionDef)]
    lengths = {f.name: (f.end_lineno or 0) - f.lineno + 1 for f in functions}
    assert {name: lines for name, lines in lengths.items() if lines > 25} == {}


def test_functions_are_short() -> None:
    """Counted with signature and docstring: half of all have at most 8 lines, none more than 60."""
    lengths = {
        f"{path.relative_to(SOURCE)}: {node.name}": (node.end_lineno or 0) - node.lineno + 1
        for path in MODULES
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.FunctionDef)
    }
    assert {name: lines for name, lines in lengths.items() if lines > 60} == {}
    assert statistics.median(lengths.values()) <= 8


def test_an_editor_completes_what_there_is() -> None:
    """The imports under TYPE_CHECKING, which editors and type checkers read, name the parts that are found lazily."""
    tree = ast.parse((SOURCE / "__init__.py").read_text())
    checked = next(node for node in tree.body if isinstance(node, ast.If))
    named = [alias.name for node in checked.body if isinstance(node, ast.ImportFrom) for alias in node.names]
    assert named == list(importlib.import_module("sparring")._PARTS)
