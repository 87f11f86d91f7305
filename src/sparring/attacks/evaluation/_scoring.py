"""The verdict on perturbed images: fresh passes, measured distances, the better of two ways, violations."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ...threat import Threat, distance
from .._gradients import Probe
from ..algorithms._projections import column
from ._batches import classify
from ._bpda import seeded
from ._flags import Flag

TOLERANCE = 1e-6
# Factors by which a perturbation is tried shorter and longer where a model draws.
_SIZES = (0.75, 0.8, 0.85, 0.9, 0.95, 1.05, 1.1, 1.2, 1.3, 1.5, 1.75, 2.0)


class Scored(NamedTuple):
    """What one way of attacking reached: the images, how far each moved, success, distance as in AttackResult."""

    x_adv: Tensor
    moved: Tensor
    success: Tensor
    distance: Tensor


@dataclass(frozen=True)
class Judge:
    """Says, on fresh forward passes, which images are misclassified and how far they were moved.

    probe: the model, or what follows on its `steady` part.
    """

    probe: Probe
    steady: nn.Module | None
    y: Tensor
    targets: Tensor | None
    norm: float
    batch_size: int
    draws: int
    seed: int

    def wrong(self, x: Tensor) -> Tensor:
        """Return which images most of the passes do not assign to their class."""
        return self._share(x, self.y) < 0.5

    def __call__(self, x: Tensor, x_adv: Tensor, clean_correct: Tensor) -> Scored:
        """Return the outcome of an attack; images misclassified from the start are no success."""
        reached = self.wrong(x_adv) if self.targets is None else self._share(x_adv, self.targets) > 0.5
        moved = distance(x_adv - x, self.norm)
        success = clean_correct & reached & torch.isfinite(moved)  # NaN is no image, whatever the model makes of it
        reach = torch.where(success, moved, torch.where(clean_correct, torch.inf, 0.0))
        return Scored(x_adv, moved, success, reach)

    def _share(self, x: Tensor, label: Tensor) -> Tensor:
        votes = torch.zeros(len(x), device=x.device)
        if self.steady is not None:
            with torch.no_grad():
                x = torch.cat([self.steady(part) for part in torch.split(x, self.batch_size)])
        with seeded(self.probe, self.seed):
            for _ in range(self.draws):
                votes += classify(self.probe, x, self.batch_size) == label
        return votes / self.draws


def untouched(x: Tensor, clean_correct: Tensor) -> Scored:
    """Return the outcome of no attack at all."""
    nowhere = torch.zeros(len(x), dtype=x.dtype, device=x.device)
    reach = torch.where(clean_correct, torch.inf, nowhere)
    return Scored(x, nowhere, torch.zeros_like(clean_correct), reach)


def still_open(outcome: Scored, threat: Threat) -> Tensor:
    """Return the images another way of attacking could still do something about."""
    return (outcome.distance > 0) if threat.eps is None else torch.isinf(outcome.distance)


def better(first: Scored, second: Scored) -> tuple[Scored, Tensor]:
    """Return the per-image better of two outcomes, and where the second was better by more than 5% or alone.

    Where neither succeeded, what the second left behind is kept if it moved at all.
    """
    taken = (second.distance < first.distance) | (torch.isinf(first.distance) & (second.moved != 0))  # NaN is not 0
    shape = column(taken, first.x_adv)
    merged = Scored(
        torch.where(shape, second.x_adv, first.x_adv),
        torch.where(taken, second.moved, first.moved),
        first.success | second.success,
        torch.minimum(second.distance, first.distance),
    )
    return merged, second.distance < 0.95 * first.distance


def resized(judge: Judge, x: Tensor, outcome: Scored, clean_correct: Tensor) -> Scored:
    """Return the nearest of an outcome's perturbations and the same ones shorter and longer.

    A search on a model that draws ends at the boundary of its own few draws, and that of most draws lies elsewhere.
    """
    nearest = outcome
    for size in _SIZES:
        x_adv = (x + size * (outcome.x_adv - x)).clamp(0, 1)
        nearest, _ = better(nearest, judge(x, x_adv, clean_correct))
    return nearest


def violations(outcome: Scored, threat: Threat, nonfinite: int) -> list[Flag]:
    """Return flags for images beyond box or budget, for searches that failed, and for logits that are no numbers."""
    flags = []
    beyond = float((outcome.x_adv.clamp(0, 1) - outcome.x_adv).abs().max())
    if not beyond <= TOLERANCE:
        flags.append(Flag("box-violation", f"by up to {beyond:.2g}"))
    if threat.eps is not None:
        excess = float((outcome.moved - threat.eps).max())
        # Rounding of a norm grows with its size.
        if not excess <= TOLERANCE * max(1.0, threat.eps):
            flags.append(Flag("budget-violation", f"by up to {excess:.2g}"))
    if threat.eps is None:
        failed = int(torch.isinf(outcome.distance).sum())
        if failed:
            detail = f"on {failed} images, whose distance is infinite; take more steps, or another attack"
            flags.append(Flag("unfinished-search", detail))
    if nonfinite:
        detail = f"for {nonfinite} images, counting every pass; look for divisions and exponentials in the model"
        flags.append(Flag("nonfinite-logits", detail))
    return flags
