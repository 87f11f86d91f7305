"""The command line, run in this process."""

from __future__ import annotations

import signal
import sys

import pytest

from sparring.cli import main


class Result:
    def __init__(self, code: int, out: str, err: str) -> None:
        self.code, self.out, self.err = code, out, err


@pytest.fixture
def sparring(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):  # type: ignore[no-untyped-def]
    """Run the command line in this process (a fresh one imports torch each time)."""

    def call(*words: object) -> Result:
        monkeypatch.setattr(sys, "argv", ["sparring", *map(str, words)])
        with pytest.raises(SystemExit) as stop:
            main()
        found = capsys.readouterr()
        assert "Traceback" not in found.err
        return Result(int(stop.value.code or 0), found.out, found.err)

    before = signal.getsignal(signal.SIGTERM)
    yield call
    signal.signal(signal.SIGTERM, before)  # else later tests that are told to end would raise the command line's exit
