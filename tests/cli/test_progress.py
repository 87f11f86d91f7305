"""Progress is silent for two seconds, then says how far, how fast, in what memory and how long still."""

from __future__ import annotations

import time

import pytest

from sparring.cli import _progress
from sparring.cli._progress import Pace, shown_bytes, shown_images
from sparring.graph import quiet
from sparring.units import duration


def test_tenths_are_told_once_and_not_at_once(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    now = [0.0]
    monkeypatch.setattr("time.monotonic", lambda: now[0])
    with shown_images() as tell:
        for done in range(0, 200, 5):
            tell("pgd", done, 200)
            now[0] += 0.1
        assert capsys.readouterr().err.count("pgd: ") == 5, "of twenty steps after the second second every fourth"
        tell("fgsm", 0, 50)
        now[0] += 1
        tell("fgsm", 25, 50)
    told = capsys.readouterr().err
    assert told.startswith("fgsm: 25 of 50 images, 25 images/s, ") and told.endswith("iB, about 1 s left\n")


def test_pace_counts_from_when_it_was_made(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [5.0]
    monkeypatch.setattr("time.monotonic", lambda: now[0])
    pace = Pace()
    now[0] = 15.0
    assert pace.told(10, 40).startswith("10 of 40 images, 1 images/s, ") and pace.told(10, 40).endswith(
        ", about 30 s left"
    )
    assert [duration(s) for s in (1.2, 600, 7200)] == ["2 s", "10 min", "2.0 h"]


def test_images_that_are_cached_are_told_by_the_second(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    now = [0.0]
    monkeypatch.setattr("time.monotonic", lambda: now[0])
    with shown_bytes() as tell:
        for done in (0, 500, 1000):
            tell("the rest of them", done, 1000, 2000)
            now[0] += 4.0
    first, half, end = capsys.readouterr().err.splitlines()
    assert first == "the rest of them"
    assert half.startswith("  50%, 250 images/s, ") and half.endswith("iB, about 4 s left")
    assert end.startswith("  100%, 250 images/s, ") and end.endswith("iB")


def test_what_torch_captures_for_long_is_told(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(_progress, "PATIENCE", 0.02)
    with shown_images(), quiet():
        time.sleep(0.2)
    assert "preparing: " in capsys.readouterr().err
