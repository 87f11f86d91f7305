"""What the pages of docs/results say of the ledger is what it holds."""

from __future__ import annotations

import runpy
from pathlib import Path

import pytest

from sparring import report
from sparring.statistics import Row

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "docs" / "results"
PAGES = sorted(path for path in RESULTS.glob("*.md") if "<!-- claims" in path.read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def ledger() -> list[Row]:
    return report.merge_ledgers([], earlier=RESULTS / "ledger.json")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_a_page_tells_the_claims_of_the_ledger(page: Path, ledger: list[Row]) -> None:
    renewed = runpy.run_path(str(ROOT / "benchmarks" / "results.py"))["renewed"]
    text = page.read_text(encoding="utf-8")
    assert renewed(text, page.stem, ledger) == text
    assert text.count("\n| ") > 5, "a table with claims in it"


def test_every_study_of_the_ledger_has_a_page(ledger: list[Row]) -> None:
    assert {row.study for row in ledger} == {page.stem for page in RESULTS.glob("*.md")}
    assert len(PAGES) >= 4


def test_the_recorded_figures_are_those_that_a_page_shows() -> None:
    figures = runpy.run_path(str(ROOT / "benchmarks" / "results.py"))["figures"]
    shown = {
        f"{page.stem}/{name}" for page in RESULTS.glob("*.md") for name in figures(page.read_text("utf-8"), page.stem)
    }
    assert {str(path.relative_to(RESULTS)) for path in RESULTS.rglob("*.svg")} == shown
