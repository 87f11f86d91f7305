"""Exact distances to the decision boundary, or intervals around them."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ...errors import UserError
from ...graph import Graph
from ...modes import eval_mode
from ...outputs import opened
from ...proofs import refuse_refuted
from ...threat import L2, LINF, diameter, distance, norm_name, project, random_point
from ...waiting import courteous
from .._network import margin_rows, others, prepare
from ..certify._certificates import margins_over, radius_over
from ..certify._relaxations import Interval
from ..verification._budget import Budget
from ._cells import Bounder
from ._joint import emptied
from ._maxima import without_maxima
from ._nearest import Question, nearest, polished, pools

_GAP = 1e-3
_BY_PROGRAM = 0.4  # share of the budget for mixed-integer programs, in networks with max pooling
_STOP = 5e-4  # relative gap at which the search in one class stops
_BEYOND = (1e-7, 1e-6, 1e-5, 3e-5, 1e-4)  # a solution lies on the boundary: replays go this much beyond it
_CLIMBERS, _CLIMBS = 16, 10
_ENDED = {"seconds": "time limit", "nodes": "node limit", "memory": "memory limit", "": "open"}


@dataclass(frozen=True, eq=False)
class Exact:
    """Intervals [lower, upper] (N,), float64, that contain the distance to the boundary inside the image range.

    x_adv (N, ...) are points with another label at distance `upper`, verified on the model; if none is known, `upper`
    is infinite and x_adv is x. status: "exact" (the gap is at most 1e-3, relative and absolute), "wrong" (the model is
    wrong at x; distance 0), or what ended the search: "time limit", "node limit", "memory limit" (2 GB of open
    sub-problems), "open" (the model itself classifies the nearest points correctly). An infinite lower bound means that
    no image has another label. seconds: wall time of each image.
    """

    lower: Tensor
    upper: Tensor
    x_adv: Tensor
    status: tuple[str, ...]
    seconds: Tensor


@courteous()
def exact(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    norm: float,
    *,
    x_adv: Tensor | None = None,
    seconds: float = 60.0,
    nodes: float = math.inf,
    clock: Callable[[], float] = time.perf_counter,
) -> Exact:
    """Compute the distance from each image to the nearest one with another label in [0, 1], within a budget.

    x (N, ...) in [0, 1], labels y (N,). x_adv are the best known adversarial points: the closer they are, the smaller
    the ball that has to be searched. There is one search for all other classes; for linf with max pooling,
    mixed-integer programs, one for each class that CROWN cannot exclude, come first. Only sparse or small networks can
    be solved. To use two cores, run two processes with half of the images each. Each image takes `seconds` of `clock`
    and `nodes` sub-problems at most; unless seconds bind, results do not depend on the machine's speed. Bounds are
    lowered by 1e-7.

    Raises UserError if a point contradicts a proof, Unsupported for layers that are not piecewise linear or too large.
    Source: Tjeng et al. 2019 (the programs).
    """
    if norm not in (L2, LINF):
        raise UserError(f"exact distances support only linf and l2, not {norm_name(norm)}")
    given = prepare(model, tuple(x.shape[1:]), images=x)
    graph = without_maxima(given, Interval(torch.zeros_like(x[:1]).double(), torch.ones_like(x[:1]).double()))
    found = []
    with eval_mode(model):
        answer = opened(model, x)
        for i in range(len(x)):
            budget = Budget.of(nodes=nodes, seconds=seconds, clock=clock)
            search = _Search(answer, given, graph, x[i : i + 1], y[i : i + 1], norm, budget)
            if x_adv is not None:
                search.keep_(x_adv[i : i + 1])
            found.append((search, *search.run_()))
    return Exact(
        lower=torch.tensor([lower for _, lower, _, _ in found], dtype=torch.float64),
        upper=torch.tensor([search.upper for search, _, _, _ in found], dtype=torch.float64),
        x_adv=torch.cat([x[:0], *(search.best for search, _, _, _ in found)]),
        status=tuple(status for _, _, status, _ in found),
        seconds=torch.tensor([spent for _, _, _, spent in found], dtype=torch.float64),
    )


class _Search:
    """The state of one image's search: the best adversarial point so far. `searched` is the graph without maxima."""

    def __init__(
        self,
        model: nn.Module,
        graph: Graph,
        searched: Graph,
        x: Tensor,
        y: Tensor,
        norm: float,
        budget: Budget,
    ) -> None:
        self.model, self.graph, self.searched, self.x, self.y = model, graph, searched, x, y
        self.norm, self.budget = norm, budget
        self.best, self.upper = x, math.inf
        self.classes = others(y, graph.nodes[-1].shape[0])[0].tolist()

    def keep_(self, point: Tensor) -> bool:
        """Keep a point if the model itself gives it another label and it is the nearest; return whether it was kept."""
        point = point.to(self.x).clamp(0, 1)
        reached = float(distance(point.double() - self.x.double(), self.norm))
        if better := reached < self.upper and self._wrong(point):
            self.best, self.upper = point, reached
        return better

    def offer_(self, point: Tensor, row: int) -> None:
        """Move a point where a class may overtake nearer to the image, and keep it, or one just beyond it."""
        asked = self._asked(self.classes[row])
        point, _ = polished(asked, point, min(self.upper, diameter(self.x, self.norm))) or (point, 0.0)
        self._kept_beyond_(point, asked.k)

    def _kept_beyond_(self, point: Tensor, k: int) -> bool:
        return self.keep_(point) or any(self.keep_(self._beyond(point, k, reach)) for reach in _BEYOND)

    def _asked(self, k: int) -> Question:
        return Question(self.searched, self.x, int(self.y), k, self.budget, self.norm)

    def _wrong(self, point: Tensor) -> bool:
        with torch.no_grad():
            return bool((self.model(point).argmax(1) != self.y).all())

    def run_(self) -> tuple[float, str, float]:
        """Search all classes; return the lower bound, the status and the seconds spent."""
        begin = time.perf_counter()
        if self._wrong(self.x):
            self.upper = 0.0
            return 0.0, "wrong", time.perf_counter() - begin
        certified = float(radius_over(self.graph, self.x, self.y, self.norm, "crown"))
        lower = certified
        if self.norm == LINF and pools(self.graph):
            lower = self._by_class(certified, self.budget.share(_BY_PROGRAM))
        if not self._closed(lower):
            lower = self._jointly(lower)
        refuse_refuted([max(certified, lower)], [self.upper], norm=norm_name(self.norm))
        lower = min(max(certified, lower), self.upper)
        return lower, "exact" if self._closed(lower) else _ENDED[self.budget.limit], time.perf_counter() - begin

    def _closed(self, lower: float) -> bool:
        return self.upper == lower or self.upper - lower <= _GAP * min(1, self.upper)

    @torch.no_grad()
    def _jointly(self, certified: float) -> float:
        """Return a lower bound from one search for all classes."""
        if math.isfinite(self.upper):
            self.offer_(self.best.double(), self.classes.index(self._label()))
        bounder = Bounder(self.searched, self.x, margin_rows(self.graph, self.y)[0], self.norm)
        limit = diameter(self.x, self.norm)
        low = emptied(bounder, self, self.budget, floor=certified, limit=limit, gap=_STOP)
        return math.inf if low >= limit else max(0.0, low - 1e-7)

    def _by_class(self, certified: float, budget: Budget) -> float:
        """Return a lower bound from mixed-integer programs for each class."""
        lower = min([math.inf, *(self._search_class_(k, certified, budget) for k in self._open_classes())])
        self.budget.take_(budget)
        return lower

    def _cap(self) -> float:
        return min(self.upper, float(distance(torch.ones_like(self.x), self.norm)))

    def _open_classes(self) -> list[int]:
        eps = torch.tensor([self._cap()], dtype=torch.float64)
        margins = margins_over(self.graph, self.x, self.y, self.norm, eps, "alpha-crown")[0]
        classes = others(self.y, self.graph.nodes[-1].shape[0])[0]
        return [int(classes[j]) for j in margins.argsort() if margins[j] <= 0]

    def _search_class_(self, k: int, floor: float, budget: Budget) -> float:
        """Return a lower bound on the distance to class k, which may be anything above the best distance known."""
        known = math.isfinite(self.upper)
        cap = self._cap() * (1 - _STOP * known)
        bound, points = nearest(
            Question(self.graph, self.x, int(self.y), k, budget, self.norm),
            cap,
            floor=floor,
            start=self.best if known and self._label() == k else None,
            gap=_STOP,
        )
        for point in points:  # nearest first
            if self._kept_beyond_(point, k):
                break
        return max(0.0, bound - 1e-7) if bound < cap or known else math.inf

    @torch.enable_grad()
    def _beyond(self, point: Tensor, k: int, reach: float) -> Tensor:
        """Climb from copies of a boundary point, within reach, to where class k leads by most: (1, ...)."""
        generator = torch.Generator().manual_seed(0)
        start = point.expand(_CLIMBERS, *point.shape[1:])
        found = start + random_point(start, self.norm, reach, generator)  # on several sides of a kink
        for _ in range(_CLIMBS):
            found = found.detach().requires_grad_()
            logits = self.graph(found)
            (slope,) = torch.autograd.grad((logits[:, k] - logits[:, int(self.y)]).sum(), found)
            step = slope.sign() if self.norm == LINF else slope / _wide(distance(slope, self.norm), slope)
            moved = found.detach() + reach / 4 * step
            found = (point + project(moved - point, self.norm, reach)).clamp(0, 1)
        logits = self.graph(found)
        return found[[int((logits[:, k] - logits[:, int(self.y)]).argmax())]]

    def _label(self) -> int:
        """Return the model's label of the best point."""
        with torch.no_grad():
            return int(self.model(self.best).argmax(1))


def _wide(value: Tensor, like: Tensor) -> Tensor:
    return value.clamp_min(1e-30).view(-1, *[1] * (like.dim() - 1))
