"""Run docs/extending.md as written: its files go into one folder, then its command runs there."""

from __future__ import annotations

import json
import re
import shlex
import sys
from pathlib import Path

import pytest

from sparring.cli import main

DOCUMENT = Path(__file__).parents[2] / "docs" / "extending.md"


def blocks(kind: str) -> list[str]:
    return re.findall(rf"```{kind}\n(.*?)```", DOCUMENT.read_text(), flags=re.DOTALL)


def test_the_page_works_as_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for text in blocks("python") + blocks("toml"):
        name = text.splitlines()[0].removeprefix("# ")
        with Path(name).open("a") as file:
            file.write(text)
    for text in blocks("python"):
        assert len(text.strip().splitlines()) <= 16, "ten lines or so, the page promises"
    (command,) = blocks("sh")
    monkeypatch.setattr(sys, "argv", [*shlex.split(command), "--workers", "0", "--quiet"])
    with pytest.raises(SystemExit) as stop:
        main()
    assert stop.value.code == 0
    plan = json.loads(Path("out/mine/plan.json").read_text())
    assert {cell["method"] for cell in plan["cells"]} == {"reference", "control", "mine"}
    assert "mine:noise" in Path("out/mine/results.csv").read_text()
