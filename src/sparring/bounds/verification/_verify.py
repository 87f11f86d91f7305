"""Questions with fixed budgets: is a label constant in a ball, does a property of VNN-LIB hold?"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from ...errors import UserError
from ...graph import Graph
from ...modes import eval_mode
from ...outputs import logits_of, opened
from ...threat import L2, LINF, Threat, distance, norm_name
from ...waiting import courteous
from .._network import margin_rows, prepare
from .._region import Region, region
from ..certify._relaxations import Interval
from ._budget import WHY, Budget, Limit
from ._question import Question, Status, in_float32
from ._search import Answer, Progress, answered
from ._vnnlib import Box, Case, Property, inward, outward

Run = Callable[[Tensor], Tensor]


@dataclass(frozen=True, eq=False)
class Verdict:
    """An answer: "verified" (no counter-example exists), "falsified" (x_adv is one) or "unknown".

    bound: a lower bound on the distance, in logits, of every point from being a counter-example; above 0 if verified.
    x_adv (1, ...) float32 and logits (classes,): a counter-example and the network's own output. nodes:
    number of bounded sub-problems. seconds: wall time. limit: what ended an unknown search: "nodes", "seconds" or
    "memory" (2 GB of open sub-problems); empty if the bounds leave a gap that splits do not close.
    """

    status: Status
    bound: float
    x_adv: Tensor | None
    logits: Tensor | None
    nodes: int
    seconds: float
    limit: Limit = ""

    @property
    def why(self) -> str:
        """The reason for an unknown answer, a sentence; empty for other answers."""
        return WHY[self.limit] if self.status == "unknown" else ""


@courteous()
def verify(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    norm: float,
    eps: float,
    *,
    run: Run | None = None,
    seconds: float = 60.0,
    nodes: float = math.inf,
    clock: Callable[[], float] = time.perf_counter,
    progress: Progress | None = None,
) -> tuple[Verdict, ...]:
    """Decide for each image whether its label is the same in the whole eps-ball inside [0, 1], as far as time allows.

    x (N, ...) in [0, 1], labels y (N,); linf or l2. Bounds, attacks, then branch and bound over the signs of
    ReLUs, whose inputs are bounded by searches of their own first. "verified" refers to exact arithmetic, by bounds in
    float64 that are lowered for rounding; "falsified" to the model itself, or to `run`, its logits of images (N, ...)
    as it is used, such as on another device: they give x_adv another label. Each image takes at most `seconds` of
    `clock` and `nodes` sub-problems. If no time limit is reached, results do not depend on the machine's
    speed. At most 2 GB of sub-problems are open. Raise UserError for other norms, Unsupported for layers without a
    sound rule.
    Sources: Wang et al. 2021 (β-CROWN), Bunel et al. 2020 (branching).
    """
    if norm not in (L2, LINF):
        raise UserError(f"labels are verified for linf and l2, not {norm_name(norm)}")
    Threat(norm, eps)
    if not len(x):
        return ()
    graph = prepare(model, tuple(x.shape[1:]), images=x, certified=True)
    found = []
    with eval_mode(model):
        run = run or partial(_answers, opened(model, x))
        for i in range(len(x)):
            one, begin = x[i : i + 1], time.perf_counter()
            rows = margin_rows(graph, y[i : i + 1])[0][:, None]
            replay = partial(_other_label, run, one, int(y[i]), norm, eps)
            ball = region(one, norm, eps)
            budget = Budget.of(nodes=nodes, seconds=seconds, clock=clock)
            asked = Question(graph, ball, rows, rows.new_zeros(rows.shape[:2]), in_float32(ball), replay, budget)
            found.append(_verdict(answered(asked, progress=progress), budget, run, begin))
    return tuple(found)


@courteous()
def verify_property(
    model: nn.Module,
    shape: tuple[int, ...],
    asked: Property,
    *,
    run: Run | None = None,
    seconds: float = 60.0,
    nodes: float = math.inf,
    clock: Callable[[], float] = time.perf_counter,
    progress: Progress | None = None,
) -> tuple[Verdict, Case | None]:
    """Decide whether any input in a property's boxes is a counter-example, and to which of its cases.

    The model takes images of `shape`, whose values are the property's inputs in their order. `run` returns the
    network's own outputs for images (N, *shape), such as ONNX Runtime's (default: the model's). Otherwise as `verify`.
    """
    begin, budget = time.perf_counter(), Budget.of(nodes=nodes, seconds=seconds, clock=clock)
    if math.prod(shape) != asked.inputs:
        raise UserError(f"the property has {asked.inputs} inputs, but the network takes images of shape {shape}")
    graph = prepare(model, shape, certified=True)
    if (classes := graph.nodes[-1].shape[0]) != asked.outputs:
        raise UserError(f"the property has {asked.outputs} outputs, but the network has {classes}")
    low = math.inf
    run = run or partial(_answers, model)
    with eval_mode(model):
        for box, cases in _by_box(asked.cases):
            answer = answered(_question(graph, box, cases, run, budget), progress=progress)
            low = min(low, answer.bound)
            if answer.point is not None:
                case = next(case for case in cases if case.satisfied(run(answer.point)[0]))
                return _verdict(answer, budget, run, begin), case
    status: Status = "verified" if low > 0 else "unknown"
    return _verdict(Answer(status, low, None, "" if low > 0 else budget.limit), budget, run, begin), None


def _other_label(run: Run, x: Tensor, y: int, norm: float, eps: float, points: Tensor) -> Tensor | None:
    """Return the first of some points in the ball to which the model itself gives another label."""
    near = distance(points.double() - x.double(), norm) <= eps
    wrong = (run(points).argmax(1) != y) & near
    return points[wrong][:1] if bool(wrong.any()) else None


def _answers(model: nn.Module, x: Tensor) -> Tensor:
    with torch.no_grad():
        return logits_of(model(x))


def _counter_example(run: Run, cases: Sequence[Case], points: Tensor) -> Tensor | None:
    """Return the first of some points whose outputs satisfy any of the cases, exactly."""
    outputs = run(points)
    places = (i for i, y in enumerate(outputs) if any(case.satisfied(y) for case in cases))
    place = next(places, None)
    return None if place is None else points[place : place + 1]


def _by_box(cases: Sequence[Case]) -> Iterator[tuple[Box, list[Case]]]:
    """Yield the boxes, each with the cases that have it."""
    found: dict[int, list[Case]] = {}
    for case in cases:
        found.setdefault(id(case.box), []).append(case)  # equal boxes are one object
    yield from ((some[0].box, some) for some in found.values())


def _question(graph: Graph, box: Box, cases: Sequence[Case], run: Run, budget: Budget) -> Question:
    shape, classes = (1, *graph.nodes[0].shape), graph.nodes[-1].shape[0]
    low, high = (side.view(shape) for side in outward(box))
    ball = Region((low + high) / 2, LINF, torch.zeros(1, dtype=torch.float64), low, high)
    most = max(1, *(len(case.rows) for case in cases))
    rows = torch.zeros(len(cases), most, classes, dtype=torch.float64)
    limits = torch.full((len(cases), most), torch.inf, dtype=torch.float64)  # such a constraint always holds
    for q, case in enumerate(cases):
        for m, (row, limit) in enumerate(case.rows):
            limits[q, m] = float(limit)
            for k, factor in row.items():
                rows[q, m, k] = float(factor)
    inside = Interval(*(side.view(shape) for side in inward(box)))
    return Question(graph, ball, rows, limits, inside, partial(_counter_example, run, cases), budget)


def _verdict(answer: Answer, budget: Budget, run: Run, begin: float) -> Verdict:
    logits, spent = None, time.perf_counter() - begin
    if answer.point is not None:
        with torch.no_grad():
            logits = run(answer.point)[0]
    return Verdict(answer.status, answer.bound, answer.point, logits, budget.used, spent, answer.limit)
