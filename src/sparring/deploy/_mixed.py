"""Run a program in parts: sparse kernels where they are supported and faster, torch otherwise."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Protocol

import numpy as np
import torch
from torch import Tensor, from_numpy, nn

from ..errors import Unsupported
from ._equivalent import Equivalent, module_of
from ._program import Floats, Program, Sparse
from ._spans import Span, integer_spans, part_of, spans_of
from .kernels._engine import Arena, Engine
from .kernels._native import Code
from .rounding._reference import run_rounded

DENSITY = 0.3  # up to which sparse kernels are usually faster than dense ones
_TOGETHER = 64  # images, to limit the memory of values
_ROUNDS, _SECONDS = 12, 1.0  # seconds of trials: the longer a round takes, the fewer there are
_SHARE = 0.1  # of the products: a smaller share in dense layers is not worth a trial


class Runner(Protocol):
    """What runs a network."""

    def run(self, x: Floats) -> Floats:
        """Return the logits of contiguous images (N, *shape)."""
        ...

    @property
    def bytes_memory(self) -> int:
        """Return the bytes of its tables and values."""
        ...


class Mixed:
    """A program on sparse kernels for layers up to a density (for all with `rounding`), and on torch for the rest."""

    def __init__(self, program: Program, density: float, *, threads: int = 1, code: Code | None = None) -> None:
        self._program = program
        found = integer_spans(program) if program.rounding else spans_of(program, density)
        spans = {span.start: span for span in found}
        code = code or Code()
        self._last = {value: number for number, step in enumerate(program.steps) for value in step.inputs}
        self._parts: list[tuple[tuple[int, ...], int, Callable[..., Tensor]]] = []
        self._engines: list[_Kernels] = []
        self._room: list[Arena] = []  # which stays in a near cache while parts use it in turn
        at = 0
        while at < len(program.steps):
            span = spans.get(at)
            if span is None:
                step = program.steps[at]
                self._parts.append((step.inputs, at + 1, module_of(step.op, program.shapes[step.inputs[0]])))
                at += 1
            else:
                self._engines.append(_Kernels(program, span, threads, code, self._room))
                self._parts.append(((span.source,), span.stop, self._engines[-1]))
                at = span.stop

    def run(self, x: Floats) -> Floats:
        """Return the logits of contiguous images (N, *shape)."""
        parts = [self._together(x[at : at + _TOGETHER]) for at in range(0, len(x), _TOGETHER)]
        return np.concatenate(parts) if parts else np.zeros((0, self._program.classes), np.float32)

    @torch.no_grad()
    def _together(self, x: Floats) -> Floats:
        values = {0: from_numpy(x)}
        for inputs, result, run in self._parts:
            values[result] = run(*(values[i] for i in inputs))
            for value in inputs:
                if self._last.get(value, result) < result:
                    values.pop(value, None)
        logits: Floats = values[len(self._program.steps)].contiguous().numpy()
        return logits

    @property
    def bytes_memory(self) -> int:
        """Return the bytes of the kernels' tables and values, and of torch's tensors."""
        modules = [run for _, _, run in self._parts if isinstance(run, nn.Module)]
        held = [t for m in modules for t in (*m.parameters(), *m.buffers())]
        tensors, shared = sum(t.numel() * t.element_size() for t in held), sum(arena.size for arena in self._room)
        return tensors + shared + sum(e.bytes_memory for e in self._engines)


class _Kernels:
    """One span of a program on sparse kernels, or on torch if the kernels cannot plan it."""

    def __init__(self, program: Program, span: Span, threads: int, code: Code, room: list[Arena]) -> None:
        self._result = program.shapes[span.stop]
        self._part = part_of(program, span)
        self._engine: Engine | None = Engine(self._part, threads=threads, code=code, rows=room if span.rows else None)
        self._other: Callable[[Floats], Floats] | None = None

    def __call__(self, x: Tensor) -> Tensor:
        given = np.ascontiguousarray(x.numpy()).reshape(-1, *self._part.shape)
        return from_numpy(self._run(given)).reshape(len(x), *self._result)

    def _run(self, x: Floats) -> Floats:
        if self._engine is not None:
            try:
                return self._engine.run(x)
            except Unsupported:
                self._engine, self._other = None, _without_kernels(self._part)
        assert self._other is not None
        return self._other(x)

    @property
    def bytes_memory(self) -> int:
        return 0 if self._engine is None else self._engine.bytes_memory


def _without_kernels(program: Program) -> Callable[[Floats], Floats]:
    """Return a function that computes the same without kernels: in torch, or integers in NumPy."""
    dense = Equivalent(program)
    return partial(run_rounded, program) if program.rounding else lambda x: dense(from_numpy(x)).numpy()


class Timed:
    """Several ways to run a program: each is timed on the first images, single or batched, and the fastest is used."""

    def __init__(self, ways: Sequence[Callable[[], Runner]]) -> None:
        self._ways = ways
        self._chosen: dict[bool, Runner] = {}

    def run(self, x: Floats) -> Floats:
        """Return the logits of contiguous images (N, *shape)."""
        alone = len(x) == 1
        if alone not in self._chosen:
            self._chosen[alone] = self._fastest(x[:_TOGETHER])
        return self._chosen[alone].run(x)

    @property
    def single(self) -> Runner | None:
        """Return what runs single images, once it is chosen."""
        return self._chosen.get(True)

    @property
    def bytes_memory(self) -> int:
        """Return the bytes of the chosen ways."""
        return sum(way.bytes_memory for way in {id(w): w for w in self._chosen.values()}.values())

    def _fastest(self, x: Floats) -> Runner:
        runners = [way() for way in self._ways]
        seconds, end = [math.inf] * len(runners), math.inf
        for turn in range(_ROUNDS):
            if turn > 1 and time.perf_counter() > end:
                break
            end = time.perf_counter() + _SECONDS if turn == 1 else end
            for number, runner in enumerate(runners):
                began = time.perf_counter()
                runner.run(x)
                if turn:  # the first compiles
                    seconds[number] = min(seconds[number], time.perf_counter() - began)
        return runners[seconds.index(min(seconds))]


def ways_of(program: Program, *, threads: int, first: Runner | None = None) -> list[Callable[[], Runner]]:
    """Return ways to run a program that are worth trying; the first uses kernels wherever possible (or is `first`)."""
    code, densities = Code(), (DENSITY, 0.0) if first else (1.0, DENSITY, 0.0)
    different = {tuple(spans_of(program, density)): density for density in reversed(densities)}
    ways = [partial(Mixed, program, density, threads=threads, code=code) for density in reversed(different.values())]
    return [lambda: first, *ways] if first else [*ways]


def is_dense(program: Program) -> bool:
    """Return whether much of the work of a program is in layers for which sparse kernels may be too slow."""
    work = [
        (
            step.op.nonzeros * math.prod(program.shapes[at + 1][1:]),
            step.op.nonzeros > DENSITY * math.prod(step.op.shape),
        )
        for at, step in enumerate(program.steps)
        if isinstance(step.op, Sparse)
    ]
    return sum(products for products, full in work if full) > _SHARE * sum(products for products, _ in work)
