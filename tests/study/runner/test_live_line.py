"""One line that rewrites itself; failed tasks keep theirs."""

from __future__ import annotations

import pytest

from sparring.records import Record
from sparring.study import Event, show_progress

INPUTS = {"attack": {"name": "fgsm", "norm": "linf", "eps": 0.1}}


def told(capsys: pytest.CaptureFixture[str], done: int, record: Record | None, failed: int = 0) -> str:
    show_progress(Event(3, done, 1, failed, (), record, "seed 0 · magnitude 90.0%", estimate=12.3))
    return capsys.readouterr().err


def test_one_line_rewrites_itself(capsys: pytest.CaptureFixture[str]) -> None:
    first = told(capsys, 1, None)
    second = told(capsys, 2, Record("k", "attack", INPUTS, environment={}, times={}))
    assert first.strip() == "1 of 3 tasks done; the rest takes about 12 s (a rough guess)"
    assert second.strip() == "2 of 3 tasks done · seed 0 · magnitude 90.0% · fgsm linf eps 0.1"
    assert first[0] == second[0] == "\r" and len(first) == len(second)


def test_failed_tasks_keep_their_line_and_the_last_line_ends(capsys: pytest.CaptureFixture[str]) -> None:
    text = told(capsys, 3, Record("k", "train", {}, environment={}, times={}, error="diverged"), failed=1)
    kept, line, end = text.split("\n")
    assert kept.strip() == "failed: seed 0 · magnitude 90.0% · train: diverged"
    assert line.strip().startswith("3 of 3 tasks done, 1 failed") and not end
