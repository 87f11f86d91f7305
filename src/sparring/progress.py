"""Progress as one bar that is drawn over itself, in a terminal and in a notebook.

Examples:
    >>> from sparring import progress
    >>> progress.bar(3, 12)
    '[#####...............] 3 of 12'
"""

from __future__ import annotations

import sys

__all__ = ["bar", "show", "write_over"]

WIDTH = 110
CELLS = 20


def show(*told: str | int) -> None:
    """Draw a bar over the last line of stderr: an optional name, the number that is done, and the total.

    Pass it as `progress` to `attacks.run`, `attacks.audit`, `bounds.radius` or `bounds.summary`. In `train.fit`, pass
    `lambda now: show("epochs", now.epoch, now.epochs)`.
    """
    *names, done, total = told
    write_over(" ".join([*map(str, names), bar(int(done), int(total))]), "\n" if done == total else "")


def bar(done: int, total: int) -> str:
    """Return a bar as text, with its numbers."""
    filled = CELLS * done // max(1, total)
    return f"[{'#' * filled}{'.' * (CELLS - filled)}] {done:,} of {total:,}"


def write_over(line: str, end: str) -> None:
    """Write over the last line of stderr; spaces clear the rest, because notebooks ignore terminal commands."""
    sys.stderr.write("\r" + line[:WIDTH].ljust(WIDTH) + end)
    sys.stderr.flush()
