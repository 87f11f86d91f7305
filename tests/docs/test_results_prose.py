"""Every number and verdict in the prose of docs/results, and of the README's findings, is worked out again.

A page's digits must stand in a phrase of `results_numbers.FACTS`, which is computed from results.csv and ledger.json,
or be a setting: a sparsity or an eps of the plan behind a word that says so, what a network or attack is called, or a
paragraph of settings or of running times.
"""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from .results_numbers import FACTS, RESULTS

ROOT = RESULTS.parents[1]
CLAIMS = re.compile(r"<!-- claims.*?<!-- end of claims -->", re.DOTALL)  # test_results.py checks them
SETTINGS = ("The whole preset", "**Small**", "How long it takes", "It takes ", "MNIST, 45 pairs", "    ", "![", "#")
VERDICTS = r"\b(?:reproduced|undecided|contradicted|opposite|no effect that matters)\b"
HEADS = ("| sparsity |", "| method |", "| network |", "| logistic |", "| svm |")
NAMES = re.compile(
    r"`[^`]*`|\]\([^)]*\)|LeNet-300-100|LeNet-5|ResNet-32|paper-[\w-]+|robust-[\w.-]+|PGD-40|CIFAR-10|r_2\b|ℓ[12]\b|R\+FGSM|int8"
)
PLACE = r"(?i:at|from|to|until|below|beyond|and|,|is|or|level) (\d+(?:\.\d+)?)%"


def prose(text: str) -> str:
    """Return a page without what is generated, settings and names; blanks keep every place."""
    text = CLAIMS.sub(_blank, text)
    lines = [_blanked(line) if line.startswith((*SETTINGS, *HEADS)) else line for line in text.splitlines()]
    return NAMES.sub(_blank, "\n".join(lines))


def _blank(match: re.Match[str]) -> str:
    return re.sub(r"[^\n]", " ", match[0])


def _blanked(line: str) -> str:
    return " " * len(line)


def unexplained(page: str, text: str, facts: list[str]) -> list[str]:
    """Return the numbers and verdicts of a page's prose that no fact and no setting explains, with words around."""
    left = prose(text)
    for fact in facts:
        for found in re.finditer(re.escape(fact), text):
            left = left[: found.start()] + " " * len(fact) + left[found.end() :]
    for pattern, known in _settings(page):
        for found in re.finditer(pattern, left):
            if known(found[1]):
                left = left[: found.start(1)] + " " * len(found[1]) + left[found.end(1) :]
    return [text[max(0, m.start() - 30) : m.end() + 20] for m in re.finditer(rf"\d[\d.,/]*|{VERDICTS}", left)]


def _settings(page: str):  # type: ignore[no-untyped-def]
    """Return patterns of settings, and what tells whether a number of that kind is one of this study's."""
    path = RESULTS / page / "plan.json"
    plan = json.loads(path.read_text(encoding="utf-8"))["plan"] if path.exists() else {}
    levels = [level for method in plan.get("activation", []) for level in method.get("levels", [])]
    grids = [s for method in plan.get("pruning", []) for s in method.get("sparsities") or []]
    places = {round(100 * s, 6) for s in [*plan.get("sparsities", []), *grids, *levels]}
    eps = {round(e, 6) for one in [*plan.get("attacks", []), *plan.get("linear", [])] for e in one["eps"]}
    counts = {f"{attack['images']:,}" for attack in plan.get("attacks", [])}
    return [
        (PLACE, lambda number: float(number) in places),
        (r"(\d[\d,]*) (?:test )?images", lambda number: number in counts),
        (r"eps (\d\.\d+|\d/255)", lambda number: "/" in number or float(number) in eps),
    ]


@pytest.mark.parametrize("page", sorted(FACTS))
def test_every_fact_is_on_its_page(page: str) -> None:
    text = _path(page).read_text(encoding="utf-8")
    missing = [fact for fact in FACTS[page]() if fact not in text]
    assert not missing, "\n".join(missing)


@pytest.mark.parametrize("page", sorted(FACTS))
def test_every_number_of_a_page_is_a_fact_or_a_setting(page: str) -> None:
    text = _path(page).read_text(encoding="utf-8")
    assert unexplained(page, _findings(page, text), FACTS[page]()) == []


def test_every_page_is_checked() -> None:
    assert {path.stem for path in RESULTS.glob("*.md")} | {"README"} == set(FACTS)


@pytest.mark.parametrize("page", sorted(FACTS))
def test_a_planted_number_is_found(page: str) -> None:
    text, facts = _path(page).read_text(encoding="utf-8"), FACTS[page]()
    for fact in facts:
        found = re.search(r"\d(?!.*\d)", fact, re.DOTALL) or re.search(VERDICTS, fact)
        assert found is not None, f"neither a number nor a verdict in the fact {fact!r}"
        other = str((int(found[0]) + 1) % 10) if found[0].isdigit() else "contradicted"
        wrong = fact[: found.start()] + other + fact[found.end() :]
        planted = _findings(page, text.replace(fact, wrong))
        assert unexplained(page, planted, facts), f"{wrong!r} is not noticed"
    assert unexplained(page, _findings(page, text) + "\nAnd 12.3% more.\n", facts)


def _path(page: str) -> Path:
    return ROOT / "README.md" if page == "README" else RESULTS / f"{page}.md"


def _findings(page: str, text: str) -> str:
    """Return what is checked of a page: all of it, of the README the findings."""
    return text[text.index("## What it found") : text.index("## Documentation")] if page == "README" else text
