"""Logits and input gradients of a model, for one objective or for weighted sums of several."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn

from ..modes import eval_mode
from ..outputs import Opened
from ._meter import Meter
from .algorithms._losses import Objective, cross_entropy, cross_entropy_slope, is_answer
from .fastpath._mlp import ByHand, Dense, pulled

# Gradients that share one backward pass, and its memory.
ROWS_AT_ONCE = 16
# Images whose objective has no slope (C&W's beyond the boundary) are not sent back once they are this share, while so
# many others remain: BLAS sums products of fewer rows than about five in another order, so results would depend on it.
_IDLE, _FEWEST = 0.1, 8


class Probe(Opened):
    """Wrap a model to count the passes of an attack: images sent forward and gradient rows sent back.

    With draws > 1, logits are averaged over that many random passes, so that every attack uses the expectation (Athalye
    et al. 2018, expectation over transformation). `split` separates a deterministic part, which runs once, from the
    random part. `hand` is a model that consists of matrices only; passes then use these. `meter` hears of each pass.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        draws: int = 1,
        hand: ByHand | None = None,
        split: tuple[nn.Module, nn.Module] | None = None,
        meter: Meter | None = None,
    ) -> None:
        super().__init__()
        self.model = model
        self.hand = hand
        self.split = split
        self.draws = draws
        self.forwards = 0
        self.backwards = 0
        self.meter = meter
        self._nonfinite: int | Tensor = 0

    @property
    def nonfinite(self) -> int:
        """The number of images with NaN or infinite logits, summed over all passes."""
        return int(self._nonfinite)

    @property
    def dense(self) -> Dense | None:
        """The model as matrices alone, for code that can use nothing else."""
        return self.hand if isinstance(self.hand, Dense) else None

    def forward(self, x: Tensor) -> Tensor:
        """Return the logits of x, averaged over the draws."""
        if self.hand is not None and not (torch.is_grad_enabled() and x.requires_grad):
            return self.through(self.hand, x)[0]
        logits: Tensor = self.model(x) if self.draws == 1 else self._mean(x)
        self._note(logits.detach(), self.draws)
        if logits.requires_grad:
            logits.register_hook(self._count)  # type: ignore[no-untyped-call]
        return logits

    def _mean(self, x: Tensor) -> Tensor:
        steady, drawing = self.split or (nn.Identity(), self.model)
        value = steady(x)
        logits: Tensor = drawing(value.repeat(self.draws, *[1] * (value.dim() - 1)))
        return logits.view(self.draws, len(x), -1).mean(0)

    def through(self, hand: ByHand, x: Tensor) -> tuple[Tensor, Any]:
        """Return the result of `hand.forward`, and count the pass."""
        logits, hidden = hand.forward(x)
        self._note(logits)
        return logits, hidden

    def from_first(self, dense: Dense, first: Tensor) -> Tensor:
        """Return the logits that follow from the first layer's outputs, and count it as a pass."""
        logits, _ = dense.from_first(first)
        self._note(logits)
        return logits

    def twin(self) -> Probe:
        """Return a probe of a copy of the model, which another thread may call; parameters and buffers are shared.

        Raise whatever a model raises that cannot be copied.
        """
        shared = {id(tensor): tensor for tensor in (*self.model.parameters(), *self.model.buffers())}
        return Probe(copy.deepcopy(self.model, cast(dict[int, Any], shared)), hand=self.hand, meter=self.meter)

    def add_(self, twin: Probe) -> None:
        """Add the counts of a twin."""
        self.forwards += twin.forwards
        self.backwards += twin.backwards
        self._nonfinite = self._nonfinite + twin._nonfinite

    def _note(self, logits: Tensor, passes: int = 1) -> None:
        self.forwards += len(logits) * passes
        if self.meter is not None:
            self.meter.pass_(len(logits) * passes)
        if not on_cpu(logits) or not math.isfinite(logits.sum()):
            self._nonfinite = self._nonfinite + (~is_answer(logits)).sum()

    def _count(self, gradient: Tensor) -> None:
        self.backwards += gradient.shape[0] * self.draws


def on_cpu(value: Tensor) -> bool:
    """Return whether reading a value is free: another device must first finish all queued work."""
    return value.device.type == "cpu"


@contextmanager
def frozen(model: nn.Module) -> Iterator[None]:
    """Hold a model in eval mode with parameters that need no gradient, and restore both on leaving."""
    wanted = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    try:
        with eval_mode(model):
            for parameter, _ in wanted:
                parameter.requires_grad_(False)
            yield
    finally:
        for parameter, required in wanted:
            parameter.requires_grad_(required)


def logits_and_gradient(
    model: nn.Module, x: Tensor, objective: Objective, y: Tensor, targets: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Return the logits of x and the gradient of a per-image objective of them with respect to x.

    Gradients are zero where the graph is cut, and where they are NaN or infinite: these would ruin an image for good.
    """
    return logits_and_pull(model, x, partial(_slope, objective, y, targets))


def in_parts(model: nn.Module, x: Tensor, objective: Objective, y: Tensor, batch_size: int) -> tuple[Tensor, Tensor]:
    """Return the result of `logits_and_gradient`, computed in batches of `batch_size` images."""
    split = zip(torch.split(x, batch_size), torch.split(y, batch_size), strict=True)
    parts = [logits_and_gradient(model, images, objective, labels) for images, labels in split]
    return torch.cat([logits for logits, _ in parts]), torch.cat([gradient for _, gradient in parts])


def logits_and_pull(model: nn.Module, x: Tensor, weigh: Callable[[Tensor], Tensor]) -> tuple[Tensor, Tensor]:
    """Return logits (N, K) and the input gradients (..., N, *image) of weighted sums of them; see logits_and_gradient.

    `weigh` turns the detached logits into the weights, (N, K) for one sum per image (an objective's gradient, where
    that is known by hand) or (R, N, K) for R of them, processed 16 at a time. It is called exactly once.
    """
    probe = model if isinstance(model, Probe) else None
    kernels = kernels_of(model)
    if probe is not None and probe.hand is not None:
        logits, hidden = probe.through(probe.hand, x)
        back = partial(_by_hand, probe.hand, hidden, x)
    elif kernels is not None:
        with torch.no_grad():
            logits = model(x)
        back = partial(kernels, x)
    else:
        return _by_autograd(model, x, weigh)
    weights = weigh(logits)
    if probe is not None:
        probe.backwards += math.prod(weights.shape[:-1])
    return logits, _finite(back(weights))


def _by_autograd(model: nn.Module, x: Tensor, weigh: Callable[[Tensor], Tensor]) -> tuple[Tensor, Tensor]:
    point = x.detach().requires_grad_()
    with torch.enable_grad():
        logits = model(point)
    weights = weigh(logits.detach())
    if not logits.requires_grad:
        return logits.detach(), x.new_zeros((*weights.shape[:-1], *x.shape[1:]))
    if weights.dim() == 2:
        return logits.detach(), _finite(pulled(logits, point, weights))
    gradients = torch.cat([_rows(logits, point, part) for part in torch.split(weights, ROWS_AT_ONCE)])
    if isinstance(model, Probe):  # the hook saw the batched pass as one
        model.backwards += (len(weights) - 1) * len(x) * model.draws
    return logits.detach(), _finite(gradients)


def _rows(logits: Tensor, point: Tensor, weights: Tensor) -> Tensor:
    """Return the input gradients (R, N, ...) of weighted sums of logits, in one pass where the model's backward can."""
    ask = partial(torch.autograd.grad, logits, point, retain_graph=True, allow_unused=True)
    try:
        (found,) = ask(weights, is_grads_batched=True)
    except RuntimeError:  # the user's own backward pass, which draws or reads numbers
        found = torch.stack([ask(row, materialize_grads=True)[0] for row in weights])
    return point.new_zeros((len(weights), *point.shape)) if found is None else found


def _by_hand(hand: ByHand, hidden: Any, x: Tensor, weights: Tensor) -> Tensor:
    """Return the input gradients, of a network of matrices only at images where the weights are not all zero."""
    if weights.dim() == 2 and isinstance(hand, Dense) and on_cpu(weights):
        live = weights.any(1).nonzero().squeeze(1)
        if _FEWEST <= len(live) < (1 - _IDLE) * len(x):
            gradient = torch.zeros_like(x)
            gradient[live] = hand.backward(weights[live], [part[live] for part in hidden]).view_as(x[live])
            return gradient
    return hand.backward(weights, hidden).view(*weights.shape[:-1], *x.shape[1:])


def kernels_of(model: nn.Module) -> Callable[[Tensor, Tensor], Tensor] | None:
    """Return the kernels for a packed network's input gradients of sums of logits; None if autograd is needed."""
    inner = model.model if isinstance(model, Probe) and model.draws == 1 else model
    return getattr(inner, "input_gradient", None)


def _slope(objective: Objective, y: Tensor, targets: Tensor | None, logits: Tensor) -> Tensor:
    """Return the gradient of a per-image objective with respect to the logits."""
    if objective is cross_entropy:
        return cross_entropy_slope(logits.detach(), y, targets)
    leaf = logits.detach().requires_grad_()
    with torch.enable_grad():
        total = objective(leaf, y, targets).sum()
    (slope,) = torch.autograd.grad(total, leaf)
    return slope


def _finite(gradients: Tensor) -> Tensor:
    """Set NaN and infinite entries to zero, in place."""
    if not on_cpu(gradients) or not math.isfinite(gradients.sum()):
        torch.nan_to_num_(gradients, nan=0.0, posinf=0.0, neginf=0.0)
    return gradients
