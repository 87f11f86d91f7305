"""Results as JSON, alone on standard output whatever a user's own code prints meanwhile."""

from __future__ import annotations

import io
import json
import sys
from typing import Any, TextIO


class Aside(io.TextIOBase):
    """Stand in for standard output: what is printed goes to standard error, and `print_json` to the true one."""

    def __init__(self, true: TextIO) -> None:
        self.true = true

    def write(self, text: str) -> int:
        """Write to standard error."""
        return sys.stderr.write(text)


def print_json(value: Any) -> None:
    """Print a value as indented JSON."""
    print(json.dumps(value, indent=1), file=sys.stdout.true if isinstance(sys.stdout, Aside) else sys.stdout)
