"""Run the Python of README.md as written: a model and tensors of one's own, studied in ten lines or so."""

from __future__ import annotations

import re
import runpy
from pathlib import Path

import numpy as np
import pytest

from sparring.data import Dataset
from sparring.report import Report
from sparring.study import Plan

README = Path(__file__).parents[2] / "README.md"


def test_the_python_of_the_readme_works_as_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], digits: Dataset
) -> None:
    (text,) = re.findall(r"```python\n(import.*?)```", README.read_text(), flags=re.DOTALL)
    lines = text.strip().splitlines()
    assert len(lines) <= 12, "ten lines or so"
    x = np.kron(digits.train.x[:900].numpy(), np.ones((1, 1, 4, 4), np.uint8))[..., 2:-2, 2:-2]
    x, y = np.concatenate([x, x]), np.tile(digits.train.y[:900].numpy(), 2)
    monkeypatch.chdir(tmp_path)
    np.savez("images.npz", x=x, y=y)
    _make_quick_quicker(monkeypatch)
    Path("mine.py").write_text("\n".join([*lines[:-1], f"shown = {lines[-1]}"]))
    shown = runpy.run_path("mine.py")["shown"]
    assert isinstance(shown, Report) and {row["method"] for row in shown.rows()} >= {"control"}
    assert "<svg" in shown._repr_html_() and "net on mine" in str(shown)
    progress = capsys.readouterr().err
    assert progress.startswith("\r[....................] 0 of ") and progress.endswith("\n")
    assert not [line for line in progress.splitlines() if line.startswith("failed")]


def _make_quick_quicker(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the preset train one epoch and attack twenty images."""
    load = Plan.load
    fewer = ["recipe.epochs=1", "finetune.epochs=1"]

    def quicker(name: str, overrides: list[str]) -> Plan:
        count = len(load(name).attacks)
        return load(name, [*overrides, *fewer, *(f"attacks.{k}.images=20" for k in range(count))])

    monkeypatch.setattr(Plan, "load", staticmethod(quicker))
