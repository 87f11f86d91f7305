"""Run an attack and judge it: success is recounted, distances are measured, violations are flagged, never repaired."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn

from ..threat import Threat, distance
from .derivatives import Probe, frozen
from .flags import Flag
from .steps import select

__all__ = ["Attack", "AttackResult", "batch_size_for", "classify", "robust_accuracy", "run"]

TOLERANCE = 1e-6
_BATCH_BYTES = 256 * 2**20


class Attack(Protocol):
    """What every attack is: a function from images to perturbed images; configure it with functools.partial."""

    def __call__(
        self,
        model: nn.Module,
        x: Tensor,
        y: Tensor,
        /,
        *,
        norm: float,
        eps: float | None = None,
        targets: Tensor | None = None,
        generator: torch.Generator | None = None,
    ) -> Tensor: ...


@dataclass(frozen=True)
class AttackResult:
    """What an attack did to N images; robust means clean_correct & ~success.

    x_adv: the perturbed images; images misclassified from the start are not attacked and stay as they are.
    clean_correct, success: bool (N,); success is False where clean_correct is.
    distance: (N,), the norm of each successful perturbation; 0 for images misclassified from the start, inf where the
    attack failed. forwards, backwards: mean number of passes per attacked image. seconds: wall time of everything.
    """

    x_adv: Tensor
    clean_correct: Tensor
    success: Tensor
    distance: Tensor
    forwards: float
    backwards: float
    seconds: float
    flags: tuple[Flag, ...]


def robust_accuracy(result: AttackResult) -> float:
    """Return the share of all images that were classified correctly and stayed so."""
    return float((result.clean_correct & ~result.success).double().mean())


def run(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    attack: Attack,
    threat: Threat,
    *,
    targets: Tensor | None = None,
    batch_size: int | None = None,
    generator: torch.Generator | None = None,
) -> AttackResult:
    """Attack every correctly classified image and judge the outcome on a fresh forward pass.

    x: float (N, ...) in [0, 1]; y: int64 (N,). With a threat without eps the attack looks for the smallest
    perturbation. batch_size None: as many images as fit into 256 MB of activations. The model is held in eval mode
    with frozen parameters and restored. Raises UserError for inputs or a model that break the contract.
    """
    start = time.perf_counter()
    with frozen(model):
        size = batch_size or batch_size_for(model, x)
        predicted, _ = classify(model, x, size)
        clean_correct = predicted == y
        probe = Probe(model)
        x_adv = x.clone()
        attacked = clean_correct.nonzero().squeeze(1)
        for rows in torch.split(attacked, size):
            x_adv[rows] = attack(
                probe,
                x[rows],
                y[rows],
                norm=threat.norm,
                eps=threat.eps,
                targets=select(targets, rows),
                generator=generator,
            ).detach()
        predicted, _ = classify(model, x_adv, size)
    reached = predicted != y if targets is None else predicted == targets
    success = clean_correct & reached
    moved = distance(x_adv - x, threat.norm)
    count = max(len(attacked), 1)
    return AttackResult(
        x_adv=x_adv,
        clean_correct=clean_correct,
        success=success,
        distance=torch.where(success, moved, torch.where(clean_correct, torch.inf, 0.0)),
        forwards=probe.forwards / count,
        backwards=probe.backwards / count,
        seconds=time.perf_counter() - start,
        flags=_violations(x_adv, moved, threat, probe),
    )


def classify(model: nn.Module, x: Tensor, batch_size: int) -> tuple[Tensor, Tensor]:
    """Return the predicted classes (−1 where logits are not finite: no class) and the logits, without gradients."""
    with torch.no_grad():
        logits = torch.cat([model(part) for part in torch.split(x, batch_size)])
    return torch.where(torch.isfinite(logits).all(1), logits.argmax(1), -1), logits


def batch_size_for(model: nn.Module, x: Tensor) -> int:
    """Return how many images keep the outputs of all layers, stored for the backward pass, in 256 MB (1 to 1024)."""
    numbers = [x[:1].numel()]
    handles = [
        module.register_forward_hook(lambda _module, _inputs, output: numbers.append(output.numel()))
        for module in model.modules()
        if not any(True for _ in module.children())
    ]
    try:
        with torch.no_grad():
            model(x[:1])
    finally:
        for handle in handles:
            handle.remove()
    # Twice: what the forward pass stores and as much again for gradients.
    return max(1, min(1024, _BATCH_BYTES // (2 * x.element_size() * sum(numbers))))


def _violations(x_adv: Tensor, moved: Tensor, threat: Threat, probe: Probe) -> tuple[Flag, ...]:
    flags = []
    beyond = float((x_adv.clamp(0, 1) - x_adv).abs().max()) if x_adv.numel() else 0.0
    if not beyond <= TOLERANCE:
        flags.append(Flag("box-violation", f"by up to {beyond:.2g}"))
    if threat.eps is not None:
        excess = float((moved - threat.eps).max()) if len(moved) else 0.0
        # Rounding of a norm grows with its size.
        if not excess <= TOLERANCE * max(1.0, threat.eps):
            flags.append(Flag("budget-violation", f"by up to {excess:.2g}"))
    if probe.nonfinite:
        flags.append(Flag("nonfinite-logits", f"{probe.nonfinite} times"))
    return tuple(flags)
