"""README, docs, help texts, messages and docstrings are plain English (docs/style.md): a word list finds old habits."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGES = [*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").rglob("*.md")), ROOT / "benchmarks" / "RESULTS.md"]
PAGES += [ROOT / "Makefile", *sorted((ROOT / ".github").rglob("*.yml")), *sorted((ROOT / "src").rglob("*.toml"))]
SOURCES = [*sorted((ROOT / "src").rglob("*.py")), *sorted((ROOT / "benchmarks").glob("*.py"))]
TEMPLATES = sorted((ROOT / "src" / "sparring" / "report" / "templates").glob("*.html"))
CODE = re.compile(r"```.*?```|`[^`]*`|<!--.*?-->|\]\([^)]*\)|\{\{.*?\}\}|\{%.*?%\}", re.DOTALL)
# What must not occur, as a regular expression of whole words, and what to write.
WORDS = {
    r"anew|afresh": "again",
    r"of which|from where|whereof": "a second sentence, or which",
    r"strangers?|foreign": "untrusted, from someone else, of another study",
    r"dear|dearer|dearest": "expensive",
    r"withstands?|withstood": "is robust to",
    r"not to be believed|attacks? in doubt": "unreliable",
    r"(?:does|do) not tell|tells? (?:what|that|which|how)": "prints, shows, says",
    r"to make it again|made again": "reproduce, recompute",
    r"how far (?:a|this|the) study is": "the progress of the study",
    r"(?:goes|go|went|going) on (?:where|from|with)": "resumes",
    r"the house|bears? the name|laid? .{1,20} before you": "the project, is called",
    r"in the place of": "instead of, replaces",
    r"(?<!')(?<!\")l_(?:inf|2|1)": "ℓ∞, ℓ2, ℓ1 in prose, linf, l2, l1 in code",
}
NUMBERS = re.compile(r"(?<![\w.)\]/*#'-])\.\d+\b")
PATTERN = re.compile("|".join(rf"\b(?:{words})\b" for words in WORDS), re.IGNORECASE)


def prose(text: str) -> str:
    """Return a page without its code, with lines kept."""
    return CODE.sub(lambda code: re.sub(r"[^\n]", " ", code[0]), text)


def said(path: Path) -> Iterator[str]:
    """Yield what a module says to users: docstrings of modules and public names, messages, help texts."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    documented = (ast.Module, ast.ClassDef, ast.FunctionDef)
    parts = {id(part) for node in ast.walk(tree) if isinstance(node, ast.JoinedStr) for part in node.values}
    hidden = {id(node.format_spec) for node in ast.walk(tree) if isinstance(node, ast.FormattedValue)}
    hidden |= {id(p) for n in ast.walk(tree) if id(n) in hidden and isinstance(n, ast.JoinedStr) for p in n.values}
    for node in ast.walk(tree):
        if isinstance(node, documented) and (text := ast.get_docstring(node)):
            hidden.add(id(node.body[0].value))  # type: ignore[attr-defined]
            if not getattr(node, "name", "").startswith("_"):
                yield text
    for node in ast.walk(tree):
        if isinstance(node, ast.JoinedStr) and id(node) not in hidden:
            yield "".join(str(part.value) if isinstance(part, ast.Constant) else "#" for part in node.values)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in hidden | parts:
            yield node.value


def faults(text: str) -> list[str]:
    """Return the words of a text that the list rejects, and numbers without a leading zero."""
    return [match[0] for pattern in (PATTERN, NUMBERS) for match in pattern.finditer(text)]


@pytest.mark.parametrize("path", [*PAGES, *TEMPLATES], ids=lambda path: str(path.relative_to(ROOT)))
def test_pages_are_plain(path: Path) -> None:
    text = "" if path.name == "style.md" else prose(path.read_text(encoding="utf-8"))
    found = [(number, fault) for number, line in enumerate(text.splitlines(), 1) for fault in faults(line)]
    assert not found, f"{found}; docs/style.md says what to write"


def test_messages_and_docstrings_are_plain() -> None:
    found = [(path.name, fault, text[:80]) for path in SOURCES for text in said(path) for fault in faults(prose(text))]
    assert not found, "\n".join(map(str, found))


@pytest.mark.parametrize("text", ["made anew", "a number, .05", "the dearest one", "in l_inf", "it goes on from here"])
def test_old_habits_are_found(text: str) -> None:
    assert faults(text)


@pytest.mark.parametrize("text", ["a new 0.05", "dearth", "file.5x", "np.linalg", "[0.5, 1.5]", "it goes on"])
def test_other_words_are_not(text: str) -> None:
    assert not faults(text)
