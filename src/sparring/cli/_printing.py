"""Print tables, and JSON alone on standard output."""

from __future__ import annotations

import io
import json
import math
import sys
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any, TextIO

if TYPE_CHECKING:
    from rich.console import Console


class Aside(io.TextIOBase):
    """A replacement of standard output: what is printed goes to standard error, but `print_json` uses the true one."""

    def __init__(self, true: TextIO) -> None:
        self.true = true

    def write(self, text: str) -> int:
        """Write to standard error."""
        return sys.stderr.write(text)


def print_json(value: Any) -> None:
    """Print a value as indented JSON, with null for numbers that are not finite."""
    text = json.dumps(_finite(value), indent=1, allow_nan=False)
    print(text, file=sys.stdout.true if isinstance(sys.stdout, Aside) else sys.stdout)


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(one) for one in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def print_table(headings: Sequence[str], rows: Iterable[Sequence[str]], *, left: int = 1, width: int = 140) -> Console:
    """Print rows under headings, all but the first `left` columns aligned right; `width` applies without a terminal.

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
