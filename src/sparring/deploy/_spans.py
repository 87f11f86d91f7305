"""Parts of a program: runs of steps that have sparse kernels."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from ._program import Add, Constant, Dense, Flatten, Program, ReLU, Shape, Sparse, Step, rows_of


@dataclass(frozen=True)
class Span:
    """Consecutive steps that read one earlier value, `source`; only the last of them is read by others.

    rows: the steps run over the last axis of values.
    """

    start: int
    stop: int
    source: int
    rows: bool


def spans_of(program: Program, density: float, *, sums: bool = True) -> list[Span]:
    """Return the longest runs of steps with sparse kernels, those of layers up to a density, each with a layer.

    sums: residual sums are part of them.
    """
    last = [0] * (len(program.steps) + 1)
    for number, step in enumerate(program.steps):
        for value in step.inputs:
            last[value] = number
    last[-1] = len(program.steps)
    spans, at = [], 0
    while at < len(program.steps):
        span = _span(program, at, last, density, sums=sums)
        spans += [] if span is None else [span]
        at = at + 1 if span is None else span.stop
    return spans


def _span(program: Program, start: int, last: list[int], density: float, *, sums: bool) -> Span | None:
    source, best, layers = program.steps[start].inputs[0], None, 0
    rows = rows_of(program.steps[start].op)
    for at in range(start, len(program.steps)):
        step = program.steps[at]
        inside = all(value == source or start < value <= at for value in step.inputs) and (sums or step.op != Add())
        if not inside or not _serves(step, program.shapes, at, rows, density):
            break
        layers += isinstance(step.op, Sparse)
        if layers and all(last[value] <= at for value in range(start + 1, at + 1)):
            best = Span(start, at + 1, source, rows)
    return best


def _serves(step: Step, shapes: list[Shape], at: int, rows: bool, density: float) -> bool:
    """Return whether a step has a sparse kernel and is not a layer above a density."""
    op = step.op
    if isinstance(op, Sparse):
        return op.rows == rows and op.nonzeros <= density * math.prod(op.shape)
    if rows:
        return isinstance(op, ReLU | Add)
    return not isinstance(op, Dense | Constant) and all(len(shapes[i]) in (1, 3) for i in (*step.inputs, at + 1))


def part_of(program: Program, span: Span) -> Program:
    """Return a span as a program: of one row if it runs over rows, with its result flattened."""
    shapes, steps = program.shapes, [_moved(program.steps[at], span) for at in range(span.start, span.stop)]
    if not span.rows and len(shapes[span.stop]) > 1:
        steps.append(Step(Flatten(), (len(steps),)))
    values = {span.source: 0} | {value: value - span.start for value in range(span.start + 1, span.stop)}
    rounding = {own: program.rounding[value] for value, own in values.items() if value in program.rounding}
    shape = shapes[span.source]
    return Program(shape[-1:] if span.rows else shape, tuple(steps), rounding=rounding)


def integer_spans(program: Program) -> list[Span]:
    """Return the spans that are computed in integers; residual sums are not, as they may be what a span ends with."""
    return spans_of(program, 1.0, sums=False)


def _moved(step: Step, span: Span) -> Step:
    """Return a step of a span as a step of a separate program."""
    inputs = tuple(0 if value == span.source else value - span.start for value in step.inputs)
    return Step(replace(step.op, rows=False) if isinstance(step.op, Sparse) else step.op, inputs)
