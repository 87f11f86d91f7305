"""Print tables, progress, and JSON alone on standard output."""

from __future__ import annotations

import contextlib
import io
import json
import math
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, TextIO

if TYPE_CHECKING:
    from rich.console import Console


class Aside(io.TextIOBase):
    """Stand in for standard output: what is printed goes to standard error, and `print_json` to the true one."""

    def __init__(self, true: TextIO) -> None:
        self.true = true

    def write(self, text: str) -> int:
        """Write to standard error."""
        return sys.stderr.write(text)


def print_json(value: Any) -> None:
    """Print a value as indented JSON, with null for what is no finite number."""
    text = json.dumps(_finite(value), indent=1, allow_nan=False)
    print(text, file=sys.stdout.true if isinstance(sys.stdout, Aside) else sys.stdout)


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(one) for one in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def print_table(headings: Sequence[str], rows: Iterable[Sequence[str]], *, left: int = 1, width: int = 140) -> Console:
    """Print rows under headings, all but the first `left` columns aligned right; `width` counts where no terminal is.

    Return the console that it was printed to.
    """
    from rich.console import Console
    from rich.table import Table

    table = Table(box=None, header_style="bold")
    for place, heading in enumerate(headings):
        table.add_column(heading, justify="left" if place < left else "right")
    for row in rows:
        table.add_row(*row)
    console = Console(width=None if sys.stdout.isatty() else width)
    console.print(table)
    return console


@contextlib.contextmanager
def shown_bytes() -> Iterator[Callable[[str, int, int | None], None]]:
    """Give what takes a name, the bytes that are done and those of the whole: bars on a terminal, else plain lines."""
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
        if rows:  # one that never began would still print an empty line
            bar.stop()


@contextlib.contextmanager
def shown_count(name: str) -> Iterator[Callable[[int, int], None]]:
    """Give what takes how many are done, and of how many: one line on a terminal, else one for every tenth."""
    begin, tell = time.monotonic(), _tenths()

    def draw(done: int, total: int) -> None:
        left = duration((time.monotonic() - begin) / done * (total - done))
        print(f"\r{name}: {done} of {total}, about {left} left \033[K", end="", file=sys.stderr, flush=True)

    terminal = sys.stderr.isatty()
    try:
        yield draw if terminal else lambda done, total: tell(name, done, total)
    finally:
        if terminal:
            print("\r\033[K", end="", file=sys.stderr)


def _tenths() -> Callable[[str, int, int | None], None]:
    """Return what says what is begun in one line, and in one more for every tenth that is done."""
    told: dict[str, int] = {}

    def tell(name: str, done: int, total: int | None) -> None:
        tenth = 10 * done // total if total else 0
        if tenth > told.get(name, -1):
            print(f"  {10 * tenth}%" if name in told else name, file=sys.stderr, flush=True)
        told[name] = tenth

    return tell


def duration(seconds: float) -> str:
    """Return seconds as a person says them."""
    if seconds < 90:
        return f"{math.ceil(seconds)} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
