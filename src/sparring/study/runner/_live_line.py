"""Show a study's progress where Python runs: one line that rewrites itself, in a terminal and in a notebook alike."""

from __future__ import annotations

import sys

from ._schedule import Event
from ._trackers import what_of

WIDTH = 110


def show_progress(event: Event) -> None:
    """Write how far a study is over the last line of stderr; a failed task keeps its line. Pass it as `watch`."""
    record = event.record
    if record is not None and record.error:
        _write(f"failed: {event.label} · {what_of(record)}: {record.error}", "\n")
    _write(_line(event), "\n" if event.done == event.total else "")


def _line(event: Event) -> str:
    counts = f"{event.done} of {event.total} tasks done" + (f", {event.failed} failed" if event.failed else "")
    if event.record is None:
        damaged = f"; damaged, to be made again: {len(event.damaged)}" if event.damaged else ""
        guess = f"; the rest takes about {event.estimate:.0f} s (a rough guess)" if event.estimate else ""
        return counts + damaged + guess
    return f"{counts} · {event.label} · {what_of(event.record)}"


def _write(line: str, end: str) -> None:
    """Overwrite the line; spaces clear the rest, as notebooks do not know a terminal's command for it."""
    sys.stderr.write("\r" + line[:WIDTH].ljust(WIDTH) + end)
    sys.stderr.flush()
