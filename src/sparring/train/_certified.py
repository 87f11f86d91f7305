"""Certified training: losses on bounds that no attack inside the ball can beat (IBP, CROWN-IBP)."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..bounds import TrainingBounds, training_bounds
from ..errors import UserError
from ..graph import Graph, lower
from ..modes import eval_mode
from ..outputs import logits_of
from ._losses import Loss, Ramped


def certified(
    *, eps: float, crown: bool = False, ramp: float | None = None, kappa: float = 0.5, stability: float = 0.0
) -> Ramped:
    """Return κ · clean cross-entropy + (1 − κ) · cross-entropy of the certified margins (Gowal et al. 2018, eq. 9).

    Over a fraction `ramp` of training, eps grows from 0 to `eps` and κ falls from 1 to `kappa`; None: constant. With
    `crown` the bounds are CROWN-IBP's at first and turn into IBP's over the ramp (Zhang et al. 2020, eq. 10).
    `stability` weights the loss of Xiao et al. (2019, eq. 8), which is small if ReLUs keep their sign. Raises UserError
    for settings out of range; training raises Unsupported for layers without a rule.
    """
    if not 0 < eps <= 1 or not 0 <= kappa <= 1 or not 0 <= stability < float("inf") or not 0 < (ramp or 1) <= 1:
        raise UserError("certified training: eps and ramp lie in (0, 1], kappa in [0, 1], stability is at least 0")
    structure = _Structure()

    def at(share: float) -> Loss:
        grown = 1.0 if ramp is None else min(1.0, share / ramp)
        weight = 1 - (1 - kappa) * grown

        def loss(model: nn.Module, x: Tensor, y: Tensor, generator: torch.Generator | None = None) -> Tensor:
            clean = F.cross_entropy(logits_of(model(x)), y)
            graph = structure.of(model, tuple(x.shape[1:]))
            found = training_bounds(model, graph, x, y, eps=eps * grown, crown=1 - grown if crown else 0.0)
            return weight * clean + (1 - weight) * worst_case(found) + stability * instability(found)

        return loss

    return Ramped(at)


class _Structure:
    """Cache the graph of the trained model, but not its weights."""

    def __init__(self) -> None:
        self._model: nn.Module | None = None
        self._graph: Graph | None = None

    def of(self, model: nn.Module, shape: tuple[int, ...]) -> Graph:
        if self._graph is None or self._model is not model:
            with eval_mode(model):
                self._model, self._graph = model, lower(model, shape)
        return self._graph


def worst_case(found: TrainingBounds) -> Tensor:
    """Return the mean cross-entropy of the worst logits that the bounds allow: log(1 + Σ exp(−margin))."""
    return torch.logsumexp(F.pad(-found.margins, (1, 0)), 1).mean()


def instability(found: TrainingBounds) -> Tensor:
    """Return −mean tanh(1 + lower · upper) over all units before a ReLU (Xiao et al. 2019, eq. 8)."""
    if not found.before_relu:
        return found.margins.new_zeros(())
    return -torch.cat([(1 + lower * upper).tanh().flatten() for lower, upper in found.before_relu]).mean()
