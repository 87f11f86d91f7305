"""Progress of work that takes longer than two seconds: bars and lines on a terminal, else plain lines."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Callable, Iterator

from ..units import duration

PATIENCE = 2.0  # seconds


class Pace:
    """Measure how fast a count grows from now on."""

    def __init__(self) -> None:
        self.began = time.monotonic()

    @property
    def seconds(self) -> float:
        """Return the seconds so far."""
        return time.monotonic() - self.began

    def left(self, done: int, total: int) -> str:
        """Return an estimate of the time for the rest, in words."""
        return f"about {duration(self.seconds / max(1, done) * (total - done))} left"

    def told(self, done: int, total: int, what: str = "images") -> str:
        """Return the number of finished images, images per second, the memory in use, and the remaining time."""
        from ..memory import size_text, used_memory

        rate = done / max(self.seconds, 1e-9)
        fast = f"{rate:,.0f}" if rate >= 10 else f"{rate:.2g}"
        rest = f", {self.left(done, total)}" if done < total else ""
        return f"{done} of {total} {what}, {fast} {what}/s, {size_text(used_memory())}{rest}"


Tell = Callable[[str, int, int], None]


@contextlib.contextmanager
def shown_images(what: str = "images") -> Iterator[Tell]:
    """Yield a function of a name, the finished images and their total, which prints one line or one per tenth.

    `what` names the unit that is counted.
    """
    paces, tenths = dict[str, Pace](), dict[str, int]()
    terminal, began = sys.stderr.isatty(), Pace()

    def tell(name: str, done: int, total: int) -> None:
        if name not in paces or done == 0:
            paces[name], tenths[name] = Pace(), 0
        tenth = 10 * done // max(1, total)
        if done == 0 or began.seconds < PATIENCE or not (terminal or tenth > tenths[name]):
            return
        tenths[name], line = tenth, f"{name}: {paces[name].told(done, total, what)}"
        print(*(("\r", line, "\033[K") if terminal else (line,)), sep="", end="" if terminal else "\n", file=sys.stderr)
        sys.stderr.flush()

    try:
        yield tell
    finally:
        if terminal:
            print("\r\033[K", end="", file=sys.stderr)


@contextlib.contextmanager
def shown_bytes() -> Iterator[Callable[[str, int, int | None], None]]:
    """Yield a function of a name, the bytes that are done and their total: bars on a terminal, else plain lines."""
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TimeRemainingColumn())
    bar, rows = Progress(*columns, console=Console(file=sys.stderr), transient=True), dict[str, TaskID]()

    def draw(name: str, done: int, total: int | None) -> None:
        bar.start()
        if name not in rows:
            rows[name] = bar.add_task(name)
        bar.update(rows[name], completed=done, total=total)

    try:
        yield draw if sys.stderr.isatty() else _tenths()
    finally:
        if rows:  # a bar that never began would print an empty line
            bar.stop()


def _tenths() -> Callable[[str, int, int | None], None]:
    """Return a function that prints one line at the beginning, and one more for every tenth that is done."""
    told: dict[str, int] = {}

    def tell(name: str, done: int, total: int | None) -> None:
        tenth = 10 * done // total if total else 0
        if tenth > told.get(name, -1):
            print(f"  {10 * tenth}%" if name in told else name, file=sys.stderr, flush=True)
        told[name] = tenth

    return tell
