"""Estimate the memory that work on images needs from a few of them, and compare it with what is free."""

from __future__ import annotations

import multiprocessing
import os
import weakref
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout, suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from .errors import UserError
from .ram import available, size_text

__all__ = ["Need", "answers", "answers_at_once", "check_room", "free_memory", "measured"]

# On a CPU, peak resident memory over the largest sum of live tensors (kept by the allocator), and the libraries'
# scratch memory and reordered filters.
_KEPT, _SCRATCH = 1.25, 128 * 2**20
_PATIENCE = 5.0  # seconds that a network may take to be built without its numbers


@dataclass(frozen=True)
class Need:
    """Additional memory of some work in bytes: `fixed` for any number of images, and `each` per image."""

    fixed: int
    each: int

    def of(self, images: int) -> int:
        """Return the bytes for a number of images at a time."""
        return self.fixed + self.each * images

    def fitting(self, free: int, *, most: int) -> int:
        """Return how many images, at least 1 and at most `most`, fit into `free` bytes at a time."""
        return max(1, min(most, (free - self.fixed) // max(1, self.each)))

    def check(self, images: int, free: int, what: str) -> None:
        """Raise UserError if this number of images at a time does not fit into `free` bytes."""
        if self.of(images) > free:
            fit = max(0, (free - self.fixed) // max(1, self.each))
            way = f"at most {fit} fit" if fit else "use smaller images, fewer workers, or a machine with more memory"
            number = "one image" if images == 1 else f"{images} images at a time"
            raise UserError(
                f"{what} takes {size_text(self.of(images))} for {number} and {size_text(free)} are free: {way}"
            )


def measured(work: Callable[[Tensor], object], x: Tensor, *, enough: Callable[[Need], bool] | None = None) -> Need:
    """Run work on one image and on two, and return its memory: the largest sum of live tensors in bytes.

    x: images; the first is repeated. After the first run, `enough` is called with an upper bound, which assumes that
    nothing is fixed; if it returns True, the bound is returned without a second run. The model that `work` runs is in
    eval mode. Memory that a library uses inside an operation is not seen; on a CPU a fraction is added for it and for
    memory that is freed but not returned.
    """
    image = x[:1] if len(x) else x.new_zeros((1, *x.shape[1:]))
    share, scratch = (_KEPT, _SCRATCH) if x.device.type == "cpu" else (1.0, 0)
    with torch.random.fork_rng(devices=[]):
        one = _peak(work, image.clone())
        if enough is not None and enough(bound := Need(scratch, max(1, int(share * one)))):
            return bound
        two = _peak(work, image.expand(2, *x.shape[1:]).clone())
    return Need(scratch + int(share * max(0, 2 * one - two)), max(1, int(share * max(0, two - one))))


def check_room(build: Callable[[], nn.Module], copies: int, what: str) -> None:
    """Raise UserError, before a network is built, if several copies of its numbers do not fit into the free memory."""
    needed, free = copies * _size(build), free_memory()
    if needed > free:
        raise UserError(
            f"{what} takes at least {size_text(needed)} and {size_text(free)} are free: use a smaller network, or a "
            "machine with more memory"
        )


def _size(build: Callable[[], nn.Module]) -> int:
    """Return the bytes of a network's parameters and buffers, 0 if they cannot be found out.

    It is built without numbers, and in a process of its own: a user's code may keep what it has made.
    """
    if not hasattr(os, "fork") or multiprocessing.current_process().daemon:
        return 0
    context = multiprocessing.get_context("fork")
    found, send = context.Pipe(duplex=False)
    process = context.Process(target=_send_size, args=(build, send), daemon=True)
    process.start()
    send.close()
    try:
        return int(found.recv()) if found.poll(_PATIENCE) else 0
    except EOFError:
        return 0
    finally:
        process.kill()
        process.join()


def _send_size(build: Callable[[], nn.Module], send: Connection) -> None:
    torch.set_num_threads(1)  # the threads of the parent are not here
    with (
        Path(os.devnull).open("w") as nowhere,
        redirect_stdout(nowhere),
        redirect_stderr(nowhere),
        suppress(BaseException),
    ):
        with torch.device("meta"):
            model = build()
        send.send(sum(value.numel() * value.element_size() for value in (*model.parameters(), *model.buffers())))


def answers_at_once(answer: Callable[[Tensor], object], x: Tensor, *, most: int = 500) -> int:
    """Return how many float images, like x, a model evaluates at once: on a CPU in 768 MiB at most.

    Raise UserError if not even one image fits.
    """

    def work(images: Tensor) -> None:
        with torch.no_grad():
            answer(images)

    need, free = measured(work, x), free_memory(x.device)
    need.check(1, free, "a prediction")
    return need.fitting(min(free // 2, 3 * 2**28) if x.device.type == "cpu" else free // 2, most=most)


def answers(answer: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """Return a model's logits (N, classes) of float images x, without gradients, in batches that fit into memory."""
    with torch.no_grad():
        return torch.cat([answer(part) for part in torch.split(x, answers_at_once(answer, x, most=len(x)))])


def _peak(work: Callable[[Tensor], object], x: Tensor) -> int:
    live = _Live()
    with live:
        work(x)
    return live.most


class _Live(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Sum up the bytes of the tensors that operations return, as long as each lives."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.now, self.most = 0, 0
        self.known: dict[int, weakref.ref[Any]] = {}

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # otherwise torch imports its compiler, which takes a second

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for value in tree_leaves(result):
            if isinstance(value, Tensor) and value.layout == torch.strided:
                self._see(value.untyped_storage())
        return result

    def _see(self, storage: torch.UntypedStorage) -> None:
        name = storage._cdata
        if name in self.known:
            return
        size = storage.nbytes()

        def gone(_: object) -> None:
            del self.known[name]
            self.now -= size

        self.known[name] = weakref.ref(storage, gone)
        self.now += size
        self.most = max(self.most, self.now)


def free_memory(device: str | torch.device = "cpu") -> int:
    """Return how many bytes new work may take on a device: on a CPU also within the limit of the control group."""
    place = torch.device(device)
    if place.type == "cuda":
        free, _ = torch.cuda.mem_get_info(place)
        return free + torch.cuda.memory_reserved(place) - torch.cuda.memory_allocated(place)
    if place.type == "mps":
        return torch.mps.recommended_max_memory() - torch.mps.driver_allocated_memory()
    return available()
