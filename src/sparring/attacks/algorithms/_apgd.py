"""APGD: projected gradient ascent with momentum and an adaptive step size."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ...draws import Source, drawn_at
from ...threat import LINF, random_point
from .._entry import opening
from .._gradients import logits_and_gradient
from ._losses import Objective, cross_entropy, dlr
from ._pgd import Prospects
from ._projections import FeasibleSet, budget, column, put_, select, shrink

_MOMENTUM = 0.75
_NEEDED_SHARE = 0.75
# Checks of prospects in an ascent (without and with further starts), and the fewest steps between two checks. If other
# starts follow, giving up too early costs less.
_CHECKS, _CHECKS_AGAIN, _SHORTEST = 5, 7, 8
# Off the CPU, steps between two looks at which images have left.
_ASKED = 4
# If another start follows, images just short of the boundary are kept up to this share of an ascent.
_SPARED = 0.6


@dataclass
class _Ascent:
    """State of the images still under attack: one entry per image in every tensor.

    goal: the classes that the objective climbs towards.
    """

    region: FeasibleSet
    prospects: Prospects
    goal: Tensor | None
    point: Tensor
    previous: Tensor
    best_point: Tensor
    best_gradient: Tensor
    step_size: Tensor
    rises: Tensor
    last_loss: Tensor
    best_loss: Tensor
    checked_loss: Tensor
    just_halved: Tensor


@opening
def apgd(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    *,
    norm: float = LINF,
    eps: float | None = None,
    targets: Tensor | None = None,
    generator: Source = None,
    objective: Objective = cross_entropy,
    steps: int = 100,
    restarts: int = 1,
    aims: Tensor | None = None,
    again: bool = True,
) -> Tensor:
    """Ascend the objective, halving an image's step length when it stalls (Croce & Hein 2020, algorithm 1).

    Supports linf, l2 and l1. For l1, steps and projection treat box and ball together (see `Region`; the projection of
    Croce & Hein 2021, with Frank-Wolfe steps instead of sparse steps and a shrinking radius). Images leave at their
    first success, or when their ascent has stalled far from the boundary (see `Prospects`). Restarts use the remaining
    images. With `again`, images close to the boundary keep 60% of the steps and then use the rest for two more starts,
    the second with the DLR loss. No image takes more than `steps`. `aims` (int64, (N,)) are target classes of the
    objective, while any wrong class counts as success, as in AutoAttack's targeted losses. Raises UserError without
    eps.
    """
    eps = budget(eps)
    x_adv = x.clone()
    still_open = torch.ones(len(x), dtype=torch.bool, device=x.device)
    interval = max(steps // (_CHECKS_AGAIN if again else _CHECKS), _SHORTEST)
    # The first check after all images were spared; an ascent of n steps checks n + 1 times.
    early = (int(_SPARED * steps) // interval + 1) * interval
    left = (steps - early) // 2 - 1
    others = (objective, dlr) if again and left >= _SHORTEST else ()

    def ascend(
        rows: Tensor, start: int, objective: Objective, steps: int, interval: int, spared: int = 0
    ) -> tuple[Tensor, Tensor, Tensor]:
        region, own = FeasibleSet.around(x[rows], norm, eps), select(targets, rows)
        prospects = Prospects.of(region.x, y[rows], own, steps, interval=interval, spared=spared)
        away = random_point(region.x, norm, eps, drawn_at(generator, start, rows))
        state = _begin(region.bring_in_(region.x + away), region, prospects, own if aims is None else aims[rows])
        return _ascend(model, state, objective, early)

    for restart in range(restarts):
        standing = still_open.nonzero().squeeze(1)
        if len(standing) == 0:
            break
        x_adv[standing], won, short = ascend(
            standing, 3 * restart, objective, steps, interval, early - 1 if others else 0
        )
        still_open[standing[won]] = False
        near = standing[short]
        for number, other in enumerate(others, 3 * restart + 1):
            if len(near) == 0:
                break
            found, won, _ = ascend(near, number, other, left, max(left // _CHECKS, _SHORTEST))
            x_adv[near[won]] = found[won]
            still_open[near[won]] = False
            near = near[~won]
    return x_adv


def _begin(start: Tensor, region: FeasibleSet, prospects: Prospects, goal: Tensor | None) -> _Ascent:
    none = torch.zeros(len(start), dtype=start.dtype, device=start.device)
    points = (start, start, start.clone(), torch.zeros_like(start))
    lowest, longest = torch.full_like(none, -torch.inf), torch.full_like(none, 2 * region.eps)
    halved = torch.ones_like(none, dtype=torch.bool)
    return _Ascent(region, prospects, goal, *points, longest, none, lowest, lowest, lowest, halved)


def _ascend(model: nn.Module, state: _Ascent, objective: Objective, early: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return each image's best point, which images succeeded, and which left just short of it by step `early`."""
    end = state.point.clone()
    won = torch.zeros(len(end), dtype=torch.bool, device=end.device)
    short = won.clone()
    prospects = state.prospects
    checkpoints = _checkpoints(prospects.steps)
    last_check = 0
    for step in range(prospects.steps + 1):
        logits, gradient = logits_and_gradient(model, state.point, objective, prospects.y, state.goal)
        done, leaving = prospects.judge_(logits, step)
        _record(state, objective(logits, prospects.y, state.goal), gradient)
        put_(end, prospects.row, leaving, state.best_point)
        put_(end, prospects.row, done, state.point)
        put_(won, prospects.row, done, done)
        if step <= early:
            put_(short, prospects.row, leaving, prospects.short() & ~done)
        if prospects.crowded(step, every=_ASKED):
            stay = prospects.staying()
            state, gradient = shrink(state, stay), gradient[stay]
            prospects = state.prospects
            if len(stay) == 0:
                return end, won, short
        if step in checkpoints:
            gradient = _halve_where_stalled(state, gradient, step - last_check)
            last_check = step
        ahead = state.region.ahead(state.point, gradient, state.step_size)
        if step > 0:
            # z + 0.75·(ahead − z) + 0.25·(z − previous), gathered.
            ahead = ahead.mul_(_MOMENTUM).add_(state.point, alpha=2 - 2 * _MOMENTUM)
            ahead = state.region.bring_in_(ahead.sub_(state.previous, alpha=1 - _MOMENTUM))
        state.previous, state.point = state.point, ahead
    stay = prospects.staying()
    end[prospects.row[stay]] = state.best_point[stay]
    return end, won, short


def _record(state: _Ascent, loss: Tensor, gradient: Tensor) -> None:
    state.rises = state.rises + (loss > state.last_loss)
    state.last_loss = loss
    better = loss > state.best_loss
    state.best_loss = torch.where(better, loss, state.best_loss)
    taken = column(better, gradient)
    torch.where(taken, state.point, state.best_point, out=state.best_point)
    torch.where(taken, gradient, state.best_gradient, out=state.best_gradient)


def _halve_where_stalled(state: _Ascent, gradient: Tensor, interval: int) -> Tensor:
    """Halve stalled steps (conditions 1 and 2 of the paper) and go back to the best point; return the gradients."""
    few_rises = state.rises < _NEEDED_SHARE * interval
    no_gain = ~state.just_halved & (state.best_loss <= state.checked_loss)
    stalled = few_rises | no_gain
    state.step_size = torch.where(stalled, state.step_size / 2, state.step_size)
    state.just_halved, state.checked_loss = stalled, state.best_loss
    state.rises = torch.zeros_like(state.rises)
    back = column(stalled, gradient)
    state.point = torch.where(back, state.best_point, state.point)
    return torch.where(back, state.best_gradient, gradient)


def _checkpoints(steps: int) -> set[int]:
    """Return the steps after which progress is judged: gaps of 22% of all steps shrinking by 3% each, at least 6%."""
    marks, share, gap = {0}, 0.22, 0.22
    while share < 1:
        marks.add(math.ceil(share * steps))
        gap = max(gap - 0.03, 0.06)
        share += gap
    return marks - {0}
