"""Run docs/extending.md as written: its files go into one folder, then its command runs there."""

from __future__ import annotations

import json
import re
import runpy
import shlex
import sys
from pathlib import Path

import pytest

from sparring.bounds import BOUNDS
from sparring.cli import main
from sparring.sparsity import ACTIVATIONS
from sparring.study import CertifySettings

DOCUMENT = Path(__file__).parents[2] / "docs" / "extending.md"


def blocks(kind: str) -> list[str]:
    return re.findall(rf"```{kind}\n(.*?)```", DOCUMENT.read_text(), flags=re.DOTALL)


def test_the_page_works_as_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    for text in blocks("python") + blocks("toml"):
        name = text.splitlines()[0].removeprefix("# ")
        with Path(name).open("a") as file:
            file.write(text)
    for text in blocks("python"):
        assert len(text.strip().splitlines()) <= 16, "ten lines or so, the page promises"
    study, attack, script = "".join(blocks("sh")).splitlines()
    for command in (f"{study} --workers 0 --quiet", f"{attack} --json"):
        monkeypatch.setattr(sys, "argv", shlex.split(command))
        with pytest.raises(SystemExit) as stop:
            main()
        assert stop.value.code == 0
        said = capsys.readouterr()
    plan = json.loads(Path("out/mine/plan.json").read_text())
    assert {cell["method"] for cell in plan["cells"]} == {"reference", "control", "mine", "late"}
    results = Path("out/mine/results.csv").read_text()
    assert "mine:noise-tries 5" in results and "mine:towards_grey" in results
    noise, grey = json.loads(said.out)["results"]
    assert noise["eps"] == 0.1 and grey["eps"] is None and grey["mean_distance"] > 0
    assert not {flag["name"] for flag in grey["flags"]} & {"budget-violation", "box-violation"}
    monkeypatch.setitem(BOUNDS, "better", BOUNDS["crown"])  # so that the tables are as before when the test is over
    monkeypatch.setitem(ACTIVATIONS, "halved", ACTIVATIONS["threshold"])
    runpy.run_path(script.split()[1])
    said = capsys.readouterr()
    assert "operation 'mish' (layer '4')" in said.out and "tensor(" in said.out
    assert CertifySettings(method="better").method == "better"
