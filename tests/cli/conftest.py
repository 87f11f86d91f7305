"""The command line, run in this process."""

from __future__ import annotations

import json
import re
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from sparring.cli import main

PAGE = (Path(__file__).parents[2] / "docs" / "cli.md").read_text(encoding="utf-8")


class Result:
    def __init__(self, code: int, out: str, err: str) -> None:
        self.code, self.out, self.err = code, out, err


@pytest.fixture
def sparring(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):  # type: ignore[no-untyped-def]
    """Run the command line in this process (a fresh one imports torch each time), and hold JSON against its page."""

    def call(*words: object) -> Result:
        monkeypatch.setattr(sys, "argv", ["sparring", *map(str, words)])
        with pytest.raises(SystemExit) as stop:
            main()
        found = capsys.readouterr()
        assert "Traceback" not in found.err
        if "--json" in words and found.out:
            check_json(str(words[0]), json.loads(found.out, parse_constant=pytest.fail))
        return Result(int(stop.value.code or 0), found.out, found.err)

    # On a busy machine what is quick else shows its progress, which is no message.
    monkeypatch.setattr("sparring.cli._progress.PATIENCE", 1e6)
    before = signal.getsignal(signal.SIGTERM)
    yield call
    signal.signal(signal.SIGTERM, before)  # else later tests that are told to end would raise the command line's exit


def check_json(command: str, found: dict[str, Any]) -> None:
    """Assert that JSON has the keys that docs/cli.md lists: those before "also" always, the others maybe."""
    _check(found, _row(rf"`{command}`"))
    for name, value in found.items():
        listed = _row(rf"`{name}` of [^|]*`{command}`[^|]*")
        for one in value if listed and isinstance(value, list) else ():
            _check(one, listed)


def _check(found: dict[str, Any], listed: Sequence[set[str]]) -> None:
    always, maybe = listed
    assert not always or (always <= set(found) <= always | maybe), sorted(set(found) ^ always)


def _row(start: str) -> tuple[set[str], set[str]] | tuple[()]:
    row = re.search(rf"^\| {start} \| (.*) \|$", PAGE, re.M)
    if row is None:
        return ()
    always, _, maybe = re.sub(r"\([^)]*\)", "", row[1]).partition(" also ")
    return set(re.findall(r"`(\w+)`", always)), set(re.findall(r"`(\w+)`", maybe))
