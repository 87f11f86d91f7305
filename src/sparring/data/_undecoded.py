"""Images that are decoded whenever they are used, on all cores, and never stored."""

from __future__ import annotations

import functools
import itertools
import math
import os
import tempfile
import weakref
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from typing import IO, Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from ._pixels import CHUNK, FEW, Rows, available_workers, fill_file, in_memory, jobs, processes, shared
from ._places import space
from .formats._listing import Entry, Source

aten = torch.ops.aten
Decode = Callable[[Sequence[Entry]], Tensor]
ROOM = 64 << 20  # bytes of pixels that worker processes decode at a time


class _Workers(NamedTuple):
    """Decoding processes, the file in memory that they write to, and their parent's process id."""

    pool: ProcessPoolExecutor
    cores: int
    file: IO[bytes]
    parent: int


class Decoder:
    """Decode images of a set in any order, repeatedly, in processes that live as long as this object.

    A few images, and all images in a worker process, are decoded in the calling thread.
    """

    def __init__(self, source: Source, how: Rows) -> None:
        self.source, self.how = source, how
        self.workers: _Workers | None = None

    def __reduce__(self) -> tuple[Any, ...]:
        return Decoder, (self.source, self.how)

    def __call__(self, entries: Sequence[Entry]) -> Tensor:
        """Return images (N, C, H, W) in the order of their entries, each of them once or more."""
        once = {entry.place: entry for entry in entries}
        alone = len(once) <= FEW or available_workers() == 1
        x = torch.from_numpy(self._here(list(once.values())) if alone else self._there(list(once.values())))
        rows = dict(zip(once, range(len(once)), strict=True))
        return x if len(once) == len(entries) else x[[rows[entry.place] for entry in entries]]

    def _here(self, entries: Sequence[Entry]) -> Any:
        return in_memory(self.source, list(enumerate(entries)), self.how)[0]

    def _there(self, entries: Sequence[Entry]) -> Any:
        """Decode as many images at a time as fit into the file, and copy them out."""
        workers, size = self._started(), math.prod(self.how.shape)
        out = np.frombuffer(space(len(entries) * size), np.uint8).reshape(len(entries), *self.how.shape)
        most = max(1, ROOM // size)
        chunk = min(CHUNK, -(-min(most, len(entries)) // workers.cores))
        task = functools.partial(fill_file, workers.file.fileno(), how=self.how)
        for start in range(0, len(entries), most):
            part = out[start : start + most]
            rows = list(enumerate(entries[start : start + most]))
            for _ in shared(task, jobs(self.source, rows, chunk), workers.pool, workers.cores):
                pass
            os.preadv(workers.file.fileno(), [part.data], 0)
        return out

    def _started(self) -> _Workers:
        if self.workers is None or self.workers.parent != os.getpid():
            cores = available_workers()
            self.workers = _Workers(processes(cores), cores, _file_in_memory(), os.getpid())
            weakref.finalize(self, self.workers.file.close)
        return self.workers


def _file_in_memory() -> IO[bytes]:
    """Return an unnamed file in memory, or on disk if the system has none in memory."""
    if hasattr(os, "memfd_create"):
        return os.fdopen(os.memfd_create("pixels"), "w+b")
    return tempfile.TemporaryFile()


class Undecoded(Tensor):
    """A stand-in for uint8 images (N, C, H, W): slices and splits stand for some of them, any other use decodes all.

    `decode` returns the images of entries.
    """

    entries: Sequence[Entry]
    decode: Decode

    @staticmethod
    def __new__(cls, entries: Sequence[Entry], shape: tuple[int, int, int], decode: Decode) -> Undecoded:
        """Return a stand-in for the images of these entries."""
        made: Undecoded = Tensor._make_wrapper_subclass(cls, (len(entries), *shape), dtype=torch.uint8)
        made.entries, made.decode = entries, decode
        return made

    def some(self, entries: Sequence[Entry]) -> Undecoded:
        """Return a stand-in for other images of the same set."""
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
