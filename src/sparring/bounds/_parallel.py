"""Independent pieces of one computation, each on one thread, as many at a time as torch has threads."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

import torch
from torch import Tensor


def slices(count: int, at_most: int) -> list[slice]:
    """Cut `count` images into pieces of `at_most`, or smaller ones where that gives every thread one."""
    step = max(1, min(at_most, -(-count // torch.get_num_threads())))
    return [slice(i, i + step) for i in range(0, count, step)]


def over_slices(work: Callable[[slice], Tensor], pieces: Sequence[slice]) -> Tensor:
    """Return the results of all pieces in a row, without gradients.

    The products of a network on a few images are too small to be shared out among threads; whole images are not.
    """
    threads = min(torch.get_num_threads(), len(pieces))

    def alone(piece: slice) -> Tensor:
        with torch.no_grad():  # the switch is each thread's own
            return work(piece)

    if threads == 1:
        return torch.cat([alone(piece) for piece in pieces])
    before = torch.get_num_threads()
    torch.set_num_threads(1)  # new threads begin with this
    try:
        with ThreadPoolExecutor(threads) as pool:
            return torch.cat(list(pool.map(alone, pieces)))
    finally:
        torch.set_num_threads(before)
