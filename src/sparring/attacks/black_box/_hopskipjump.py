"""HopSkipJump: a decision-based attack that needs only predicted classes."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ...draws import Draws, Source, drawn_at
from ...threat import L2, distance, gaussian, uniform
from .._entry import opening
from ..algorithms._losses import margin_loss
from ..algorithms._projections import column, keep_within, pull_back, select, steepest

# Probes evaluated in one pass.
_BLOCK = 1024
# Values in such a block, so that large images come in smaller blocks.
_NUMBERS = 1 << 22


@opening
def hopskipjump(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    *,
    norm: float = L2,
    eps: float | None = None,
    targets: Tensor | None = None,
    generator: Source = None,
    steps: int = 40,
    draws: int = 100,
    starts: int = 100,
) -> Tensor:
    """Walk along the boundary with a gradient estimated from decisions alone (Chen et al. 2020, algorithm 2).

    Uses only the sign of the margin. The start is the first of `starts` uniform random images that is adversarial (with
    `targets`: in the target class). Step t uses draws·√t queries for the gradient, in total about 0.7·draws·steps^1.5
    per image. Supports l2 and linf. Returns x if no start is found or the result is outside of eps. Raises Unsupported
    for l1.
    """
    x_adv, found = _random_start(_Decision(model, y, targets), x, starts, generator)
    rows = found.nonzero().squeeze(1)
    result = x.clone()
    if len(rows) == 0:
        return result
    part, labels, aims = x[rows], y[rows], select(targets, rows)
    decide = _Decision(model, labels, aims)
    point = pull_back(model, part, x_adv[rows], labels, aims, rounds=20)
    best = point
    pixels = part[0].numel()
    for step in range(1, steps + 1):
        moved = distance(point - part, norm)
        # The paper's probe radius (section III-C), an l2 length in both cases.
        probe = moved / math.sqrt(pixels)
        count = min(round(draws * math.sqrt(step)), 10_000)
        direction = steepest(_estimate(decide, point, probe, count, drawn_at(generator, starts + step, rows)), norm)
        point = _stride(decide, point, direction, moved / math.sqrt(step))
        point = pull_back(model, part, point, labels, aims, rounds=20)
        better = distance(point - part, norm) < distance(best - part, norm)
        best = torch.where(column(better, part), point, best)
    result[rows] = best
    return keep_within(x, result, norm, eps)


@dataclass(frozen=True)
class _Decision:
    """Return which points are adversarial, the same number for each image: the only query that the attack may make."""

    model: nn.Module
    y: Tensor
    targets: Tensor | None

    def __call__(self, x: Tensor) -> Tensor:
        turns = len(x) // len(self.y)
        targets = None if self.targets is None else self.targets.repeat_interleave(turns)
        with torch.no_grad():
            return margin_loss(self.model(x), self.y.repeat_interleave(turns), targets) > 0


def _random_start(decide: _Decision, x: Tensor, tries: int, generator: Source) -> tuple[Tensor, Tensor]:
    start = x.clone()
    found = decide(x)
    for place in range(tries):
        rows = (~found).nonzero().squeeze(1)
        if len(rows) == 0:
            break
        noise = uniform(x.shape, x, drawn_at(generator, place))[rows]
        fresh = _Decision(decide.model, decide.y[rows], select(decide.targets, rows))(noise)
        start[rows[fresh]] = noise[fresh]
        found[rows] = fresh
    return start, found


def _estimate(decide: _Decision, point: Tensor, probe: Tensor, count: int, generator: Source) -> Tensor:
    """Return the direction in which random probes succeed more often, with the paper's baseline (equation 16)."""
    total, weights, decided = torch.zeros_like(point), torch.zeros_like(point), torch.zeros_like(probe)
    images = len(point)
    block = max(1, min(_BLOCK, _NUMBERS // point[0].numel()) // images)
    for first in range(0, count, block):
        size = min(block, count - first)
        source = generator.spread(range(first, first + size)) if isinstance(generator, Draws) else generator
        noise = steepest(gaussian((images * size, *point.shape[1:]), point, source), L2)
        start, reach = point.unsqueeze(1), probe.view(-1, *[1] * point.dim())
        near = (start + reach * noise.view(images, size, *point.shape[1:])).clamp(0, 1)
        offset = (near - start) / reach.clamp_min(1e-30)
        sign = torch.where(decide(near.flatten(0, 1)), 1.0, -1.0).to(point.dtype).view(images, size)
        total += (sign.view(images, size, *[1] * (point.dim() - 1)) * offset).sum(1)
        weights += offset.sum(1)
        decided += sign.sum(1)
    mean = decided / count
    # All probes agree: the baseline would leave nothing, so the plain mean is the best guess.
    baseline = torch.where(mean.abs() == 1, torch.zeros_like(mean), mean)
    return total - column(baseline, point) * weights


def _stride(decide: _Decision, point: Tensor, direction: Tensor, length: Tensor) -> Tensor:
    """Return the point moved along the direction, the length halved until it stays adversarial (at most 15 times)."""
    ahead = point
    waiting = torch.ones(len(point), dtype=torch.bool, device=point.device)
    for _ in range(15):
        trial = (point + column(length, point) * direction).clamp(0, 1)
        won = waiting & decide(trial)
        ahead = torch.where(column(won, point), trial, ahead)
        waiting = waiting & ~won
        if not bool(waiting.any()):
            break
        length = length / 2
    return ahead
