"""Divide independent pieces of work among threads; each computes alone.

The products of a network on a few images are too small to be divided among threads; whole images are not.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import torch

__all__ = ["shared_out"]

Piece = TypeVar("Piece")
Result = TypeVar("Result")


def shared_out(work: Callable[[Piece], Result], pieces: Sequence[Piece]) -> Iterator[Result]:
    """Yield the result of each piece in order; torch's number of threads work at once, each on one piece.

    Modes such as `torch.no_grad` are local to a thread: `work` must enter them itself.
    """
    before = torch.get_num_threads()
    threads = min(before, len(pieces))
    if threads < 2:
        yield from map(work, pieces)
        return
    torch.set_num_threads(1)  # new threads begin with this
    pool = ThreadPoolExecutor(threads)
    try:
        yield from pool.map(work, pieces)
    finally:
        pool.shutdown(cancel_futures=True)
        torch.set_num_threads(before)
