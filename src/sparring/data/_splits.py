"""Fixed rules that divide labelled images: no random generator, so that a split is the same on every machine."""

from __future__ import annotations

import torch
from torch import Tensor

from ._types import Split


def balanced_order(y: Tensor) -> tuple[Tensor, Tensor]:
    """Order labelled items so that every prefix is as balanced as can be, without drawing anything at random.

    Takes labels y (N,), int64. Returns the order (N,), which takes the first item of every class, then the second of
    every class and so on, and the rank within its class (N,) of each item in that order.
    """
    by_class = torch.argsort(y, stable=True)
    counts = torch.bincount(y)
    starts = torch.cumsum(counts, 0) - counts
    rank = torch.arange(len(y)) - starts[y[by_class]]
    order = torch.argsort(rank, stable=True)
    return by_class[order], rank[order]


def take(split: Split, which: Tensor) -> Split:
    """Return the images and labels at the given positions, or where a mask is true."""
    return Split(split.x[which], split.y[which])


def tenths(every: Split) -> tuple[Split, Split, Split]:
    """Divide one set into training, validation and test: of every ten images of a class seven, one and two, in order.

    The parts come in balanced order.
    """
    order, rank = balanced_order(every.y)
    tenth = rank % 10
    return take(every, order[tenth < 7]), take(every, order[tenth == 7]), take(every, order[tenth > 7])


def hold_out(train: Split) -> tuple[Split, Split]:
    """Divide training images into training and validation: every tenth image of a class is held out.

    Of a class with two to nine images the last is held out, of a class with one none. The order stays.
    """
    order, rank = balanced_order(train.y)
    count = torch.bincount(train.y)[train.y[order]]
    chosen = (rank % 10 == 9) | ((count < 10) & (count > 1) & (rank == count - 1))
    held = torch.zeros(len(train.y), dtype=torch.bool)
    held[order[chosen]] = True
    return take(train, ~held), take(train, held)
