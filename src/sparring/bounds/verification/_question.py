"""One question about a network: does any output over a region satisfy one of several sets of linear constraints?"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from ...graph import Graph
from ...threat import L2, LINF, distance, project
from .._network import compacted
from .._region import Region
from ..certify._relaxations import Interval
from ._budget import Budget

Status = Literal["verified", "falsified", "unknown"]
Replay = Callable[
    [Tensor], Tensor | None
]  # points (N, ...) float32 to one of them, (1, ...), that is a counter-example


@dataclass(frozen=True, eq=False)
class Question:
    """Is there x in the ball (of one image) and q with rows[q]·f(x) ≤ limits[q] for all of its constraints?

    rows: (Q, M, classes), limits (Q, M), float64. Points are float32 numbers between `inner`'s bounds, (1, ...);
    candidates are checked by `replay`, which uses the true network.
    """

    graph: Graph
    ball: Region
    rows: Tensor
    limits: Tensor
    inner: Interval
    replay: Replay
    budget: Budget

    def of(self, alternatives: Tensor) -> Question:
        """Return the question for some of the alternatives."""
        return replace(self, rows=self.rows[alternatives], limits=self.limits[alternatives])

    def margins(self, logits: Tensor) -> Tensor:
        """Return by how much each alternative is missed, its constraint missed by most: (N, classes) to (N, Q)."""
        return (torch.einsum("qmc,nc->nqm", self.rows, logits) - self.limits).amax(2)

    def inside(self, points: Tensor) -> Tensor:
        """Return points (N, ...) as float32 numbers in the ball and in the box."""
        if self.ball.norm != LINF:
            moved = project(points - self.ball.x, self.ball.norm, float(self.ball.eps) * (1 - 1e-6))
            points = self.ball.x + moved
        return points.float().clamp(*self.inner)


def climbed(asked: Question, start: Tensor, steps: int) -> Tensor | None:
    """Descend on the margins of all alternatives from points (N, ...), and return a counter-example or None.

    Steps go by the gradient's sign, for l2 along it (Madry et al. 2018), and fall from a quarter of the box to 0.005.
    """
    low, high = asked.ball.lower, asked.ball.upper
    count, width = len(asked.rows), (high - low) / 2
    point = start.double().repeat_interleave(count, 0)
    own, shape = torch.arange(count).repeat(len(start)), (-1, *[1] * (point.dim() - 1))
    for step in range(steps):
        point = point.detach().requires_grad_()
        with torch.enable_grad():
            margins = asked.margins(asked.graph(point)).gather(1, own[:, None]).squeeze(1)
            (slope,) = torch.autograd.grad(margins.sum(), point)
        hit = point.detach()[margins <= 0]
        if len(hit) and (found := asked.replay(asked.inside(hit))) is not None:
            return found
        rate = 0.5 * 0.02 ** (step / max(1, steps - 1))
        if asked.ball.norm == LINF:
            point = point.detach() - rate * width * slope.sign()
        else:
            moved = point.detach() - rate * asked.ball.eps * slope / distance(slope, L2).clamp_min(1e-30).view(shape)
            point = asked.ball.x + project(moved - asked.ball.x, asked.ball.norm, float(asked.ball.eps))
        point = torch.minimum(torch.maximum(point, low), high)
    return asked.replay(asked.inside(point))


def folded(asked: Question) -> Question:
    """Return the question of an equal network of fewer units on the pixels that it reads.

    Its points are put into whole images before they are replayed.
    """
    ball, (low, high) = asked.ball, asked.inner
    place = torch.arange(ball.x.numel(), dtype=torch.float64).view_as(ball.x)
    graph, cut = compacted(asked.graph, torch.cat([ball.x, ball.lower, ball.upper, place, low.double(), high.double()]))
    used, base = cut[3].flatten().long(), ball.x.float().clamp(low, high).flatten(1)

    def replay(points: Tensor) -> Tensor | None:
        flat = base.repeat(len(points), 1).index_copy(1, used, points.flatten(1))
        return asked.replay(flat.view(len(points), *ball.x.shape[1:]))

    inside = Region(cut[:1], ball.norm, ball.eps, cut[1:2], cut[2:3], sided=True)
    return replace(asked, graph=graph, ball=inside, inner=Interval(cut[4:5].float(), cut[5:].float()), replay=replay)


def in_float32(ball: Region) -> Interval:
    """Return the float32 numbers in a box."""
    low, high, inf = ball.lower.float(), ball.upper.float(), torch.tensor(torch.inf)
    low = torch.where(low.double() < ball.lower, low.nextafter(inf), low)
    return Interval(low, torch.where(high.double() > ball.upper, high.nextafter(-inf), high))
