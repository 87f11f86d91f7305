"""Images that are decoded whenever they are looked at, on all cores, and never kept."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from .formats._listing import Entry

aten = torch.ops.aten
Decode = Callable[[Sequence[Entry]], Tensor]


class Undecoded(Tensor):
    """Stand for uint8 images (N, C, H, W): slices and splits stand for some of them, any other use decodes all.

    `decode` makes images of entries.
    """

    entries: Sequence[Entry]
    decode: Decode

    @staticmethod
    def __new__(cls, entries: Sequence[Entry], shape: tuple[int, int, int], decode: Decode) -> Undecoded:
        """Return what stands for the images of these entries."""
        made: Undecoded = Tensor._make_wrapper_subclass(cls, (len(entries), *shape), dtype=torch.uint8)
        made.entries, made.decode = entries, decode
        return made

    def some(self, entries: Sequence[Entry]) -> Undecoded:
        """Return what stands for other images of the same set."""
        return Undecoded(entries, (self.shape[1], self.shape[2], self.shape[3]), self.decode)

    def decoded(self) -> Tensor:
        """Return the images."""
        return self.decode(self.entries)

    def __reduce_ex__(self, _: Any) -> tuple[Any, ...]:
        return Undecoded, (self.entries, tuple(self.shape[1:]), self.decode)

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        """Decode what an operation needs."""
        x, *rest = args
        if func in (aten.detach.default, aten.alias.default):
            return x
        if func is aten.slice.Tensor and rest[:1] in ([], [0]):
            return x.some(x.entries[slice(*rest[1:])])
        if func is aten.split.Tensor and rest[1:] in ([], [0]):
            return [x.some(x.entries[start : start + rest[0]]) for start in range(0, len(x.entries), rest[0])]
        if func is aten.split_with_sizes.default and rest[1:] in ([], [0]):
            ends = list(itertools.accumulate(rest[0], initial=0))
            return [x.some(x.entries[start:end]) for start, end in itertools.pairwise(ends)]
        if func is aten.index.Tensor and isinstance(x, Undecoded) and len(rest[0]) == 1:
            places = torch.arange(len(x.entries))[rest[0][0].cpu()]
            return x.decode([x.entries[at] for at in places.reshape(-1).tolist()])
        plain = tree_map(lambda value: value.decoded() if isinstance(value, Undecoded) else value, (args, kwargs or {}))
        return func(*plain[0], **plain[1])
