"""The examples in docstrings run as they stand."""

from __future__ import annotations

import doctest
import importlib
from pathlib import Path

import pytest

SOURCE = Path(__file__).parents[1] / "src" / "sparring"
SHOWN = [path for path in sorted(SOURCE.rglob("*.py")) if ">>>" in path.read_text(encoding="utf-8")]


def _name(path: Path) -> str:
    return ".".join(path.relative_to(SOURCE.parent).with_suffix("").parts).removesuffix(".__init__")


@pytest.mark.parametrize("path", SHOWN, ids=_name)
def test_examples_run(path: Path) -> None:
    found = doctest.testmod(importlib.import_module(_name(path)))
    assert found.attempted and not found.failed


def test_nearly_every_part_shows_an_example() -> None:
    from sparring import _PARTS

    assert set(_PARTS) - {path.parent.name for path in SHOWN} - {path.stem for path in SHOWN} <= {"records", "report"}
