"""Budget of a search: sub-problems, seconds, and memory for open sub-problems."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

Limit = Literal["", "nodes", "seconds", "memory"]  # what ended a search before its answer; "": none of these
WHY: dict[Limit, str] = {
    "": "the bounds leave a gap that splits do not close",
    "nodes": "the search reached its number of sub-problems; allow more nodes",
    "seconds": "the search ran out of time; allow more seconds",
    "memory": "the open sub-problems reached 2 GB; ask for a smaller eps or a smaller network",
}
BYTES = 2**31  # of open sub-problems
_OVERHEAD = 4096  # bytes of a sub-problem beside its numbers


@dataclass
class Budget:
    """Sub-problems that may be bounded and those that were (`used`), and a deadline of `clock`.

    Unless the deadline binds, the result of a budget of nodes does not depend on the machine's speed. `full`: more
    sub-problems were open than memory allows.
    """

    nodes: float = math.inf
    deadline: float = math.inf
    clock: Callable[[], float] = time.perf_counter
    used: int = 0
    full: bool = False

    @classmethod
    def of(cls, *, nodes: float, seconds: float, clock: Callable[[], float]) -> Budget:
        """Return a budget that begins now."""
        return cls(nodes, clock() + seconds, clock)

    @property
    def seconds(self) -> float:
        """Return the seconds that are left."""
        return self.deadline - self.clock()

    @property
    def over(self) -> bool:
        """Return whether nodes or seconds are used up."""
        return self.used >= self.nodes or self.seconds <= 0

    @property
    def limit(self) -> Limit:
        """Return which limit an unfinished search reached."""
        return "nodes" if self.used >= self.nodes else "seconds" if self.seconds <= 0 else "memory" if self.full else ""

    def part(self, nodes: float) -> Budget:
        """Return a budget of a number of nodes, at most those that are left."""
        return Budget(min(nodes, self.nodes - self.used), self.deadline, self.clock)

    def share(self, share: float) -> Budget:
        """Return a budget of a share of what is left: of the nodes where they are limited, else of the seconds."""
        if math.isfinite(self.nodes):
            return self.part(share * (self.nodes - self.used))
        return self.within(share * self.seconds)

    def within(self, seconds: float) -> Budget:
        """Return a budget of a number of seconds, at most those that are left."""
        return Budget(self.nodes - self.used, min(self.deadline, self.clock() + seconds), self.clock)

    def take_(self, part: Budget) -> None:
        """Count the use of a part of the budget."""
        self.used += part.used
        self.full |= part.full

    def fits_(self, count: int, size: int) -> bool:
        """Return whether so many open sub-problems of `size` bytes fit into memory; note if they do not."""
        fits = count * (size + _OVERHEAD) <= BYTES
        self.full |= not fits
        return fits
