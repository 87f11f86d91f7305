"""Show progress as one bar that is redrawn in place, in a terminal or a notebook.

Examples:
    >>> from sparring import progress
    >>> progress.bar(3, 12)
    '[#####...............] 3 of 12'
"""

from __future__ import annotations

import sys

from .units import duration

__all__ = ["bar", "pace", "show", "write_over"]

WIDTH = 110
CELLS = 20


def show(*told: str | float) -> None:
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


def pace(done: float, total: int, seconds: float, *, memory: str, what: str = "images", first: float = 0) -> str:
    """Return how many are done, how many a second, the memory in use, and an estimate of the time for the rest.

    `first` were done before these seconds.
    """
    if done == first:
        return f"{int(done)} of {total} {what}, {memory}"
    rate = (done - first) / max(seconds, 1e-9)
    fast = f"{rate:,.0f}" if rate >= 10 else f"{rate:.2g}"
    left = f", about {duration((total - done) / rate)} left" if done < total else ""
    return f"{int(done)} of {total} {what}, {fast} {what}/s, {memory}{left}"


def write_over(line: str, end: str) -> None:
    """Write over the last line of stderr; spaces clear the rest, because notebooks ignore terminal commands."""
    sys.stderr.write("\r" + line[:WIDTH].ljust(WIDTH) + end)
    sys.stderr.flush()
