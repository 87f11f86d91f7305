"""Random models, lowered and judged by sampling: benchmarks/lowering.py does it at length."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "benchmarks"))  # its files import each other, also in processes of their own

from lowering import FAILURES, SUPPORTED, drawn, examine, examine_all, summary  # noqa: E402
from planted import FAULTS  # noqa: E402


@pytest.mark.slow
def test_graphs_of_random_models_are_the_models() -> None:
    tally = summary(examine_all(200, seed=0, workers=2))
    assert [tally[outcome] for outcome in FAILURES] == [0, 0, 0], tally["failures"]
    assert tally["lowered"] >= 0.6
    assert tally["supported_lowered"] >= 0.95, tally["refused_though_supported"]
    assert tally["certified"] >= 500  # radii above zero that nothing refuted


@pytest.mark.parametrize("name", FAULTS)
def test_a_planted_fault_is_counted(name: str) -> None:
    can_show = (index for index in range(200) if re.search(FAULTS[name].shown_by, drawn(0, index).source))
    assert any(examine(0, index, name).outcome in ("different", "unsound") for index in can_show)


def test_a_model_is_the_same_whenever_it_is_drawn() -> None:
    assert [drawn(3, index) for index in range(20)] == [drawn(3, index) for index in range(20)]
    assert drawn(3, 0) != drawn(4, 0)


def test_the_documentation_lists_what_is_supported() -> None:
    text = (ROOT / "docs" / "graph.md").read_text(encoding="utf-8")
    listed = re.findall(r"^- ([^:\n]+)", text, re.M)
    assert [name for name in listed if name in SUPPORTED] == list(SUPPORTED)  # test_kinds.py reads what is not drawn
