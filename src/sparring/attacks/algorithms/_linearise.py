"""Boundaries between two classes: the nearest one by linearisation, and the way back to one along a line."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from ...threat import L2, dual
from .._gradients import logits_and_rows
from ..fastpath._gram_matrix import Stem
from ._losses import is_past
from ._projections import column


class Boundary(NamedTuple):
    """One linearised boundary per image.

    logits (N, K); gap (N,), positive where it is still to be closed, 0 where it is not finite; gradient (N, ...) of the
    growing difference of logits; distance (N,) = |gap| / dual norm of the gradient, the box ignored.
    """

    logits: Tensor
    gap: Tensor
    gradient: Tensor
    distance: Tensor


def nearest_boundary(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    targets: Tensor | None = None,
    *,
    norm: float,
    aims: Tensor | None = None,
    candidates: int | None = None,
    stem: Stem | None = None,
) -> Boundary:
    """Return the nearest boundary of each image when all differences of logits are linearised at x.

    Untargeted, the own class meets all others, or the `candidates` of largest logit, or only the class in `aims`;
    with `targets` the target meets the strongest other class. For l_2 a `stem` finds the same boundary at less cost.
    """
    if stem is not None and norm == L2:
        return _through_stem(stem, x, y, targets, aims, candidates)
    chosen: list[Tensor] = []

    def differences(logits: Tensor) -> Tensor:
        chosen.append(_differences(logits, y, targets, aims, candidates))
        return chosen[0]

    logits, gradients = logits_and_rows(model, x, differences)
    gaps = _gaps(chosen[0], logits)
    dual_norms = torch.linalg.vector_norm(gradients.flatten(2), ord=dual(norm), dim=2).clamp_min(1e-30)
    distances = gaps.abs() / dual_norms
    if len(distances) == 1:
        return Boundary(logits, gaps[0], gradients[0], distances[0])
    images = torch.arange(len(x), device=x.device)
    nearest = distances.argmin(0)
    return Boundary(logits, gaps[nearest, images], gradients[nearest, images], distances[nearest, images])


def _through_stem(
    stem: Stem, x: Tensor, y: Tensor, targets: Tensor | None, aims: Tensor | None, candidates: int | None
) -> Boundary:
    """Return what nearest_boundary does with only the winner's gradient sent back to the input."""
    logits, hidden = stem.probe.through(stem.dense, x)
    weights = _differences(logits, y, targets, aims, candidates)
    stem.probe.backwards += len(weights) * len(x)
    rows = stem.dense.back_to_first(weights, hidden)
    gaps = _gaps(weights, logits)
    nearest, length = stem.nearest(gaps, rows)
    images = torch.arange(len(x), device=x.device)
    gradient = (rows[nearest, images] @ stem.dense.weights[0]).view_as(x)
    gap = gaps[nearest, images]
    return Boundary(logits, gap, gradient, gap.abs() / length)


def _gaps(weights: Tensor, logits: Tensor) -> Tensor:
    """Return what the weighted sums (R, N) of logits lack to be positive, 0 where that is no number."""
    return (-(weights * logits).sum(2)).nan_to_num_(nan=0.0, posinf=0.0, neginf=0.0)


def _differences(
    logits: Tensor, y: Tensor, targets: Tensor | None, aims: Tensor | None, candidates: int | None
) -> Tensor:
    """Return the differences of logits that an attack may turn positive, as weights of shape (rivals, N, classes)."""
    classes = logits.shape[1]
    if targets is not None:
        against = logits.scatter(1, targets.unsqueeze(1), -torch.inf).argmax(1)
        towards = targets.unsqueeze(0)
    else:
        against = y
        if aims is None:
            count = classes - 1 if candidates is None else min(candidates, classes - 1)
            towards = logits.scatter(1, y.unsqueeze(1), -torch.inf).topk(count, dim=1).indices.T
        else:
            towards = aims.unsqueeze(0)
    weights = torch.zeros(*towards.shape, classes, dtype=logits.dtype, device=logits.device)
    weights.scatter_(2, towards.unsqueeze(2), 1.0)
    return weights.scatter_(2, against.view(1, -1, 1).expand(len(towards), -1, 1), -1.0)


def pull_back(
    model: nn.Module, x: Tensor, x_adv: Tensor, y: Tensor, targets: Tensor | None = None, *, rounds: int
) -> Tensor:
    """Return points on the segments from x to adversarial x_adv, still adversarial, nearer to x, by bisection."""
    low, high = torch.zeros(len(x), dtype=x.dtype, device=x.device), torch.ones(len(x), dtype=x.dtype, device=x.device)
    best = x_adv
    for _ in range(rounds):
        middle = (low + high) / 2
        point = x + column(middle, x) * (x_adv - x)
        with torch.no_grad():
            won = is_past(model(point), y, targets)
        high, low = torch.where(won, middle, high), torch.where(won, low, middle)
        best = torch.where(column(won, x), point, best)
    return best
