"""Scores of weights: functions of the model and, for some, a batch."""

from __future__ import annotations

from contextlib import ExitStack

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..errors import UserError
from ..matrices import Matrix, matrices
from ..modes import eval_mode
from ..outputs import opened
from ._masks import Batch, Loss, Score, Scores, prunable

_TAYLOR_BATCH = 32


def magnitude(
    model: nn.Module, batch: Batch | None = None, *, loss: Loss | None = None, generator: torch.Generator | None = None
) -> Scores:
    """Score by |w| (Han et al. 2015), with w as layers compute it, after weight_norm and similar parametrisations."""
    return {m.name: m.value().abs() for m in matrices(model) if m.excuse is None}


def random(
    model: nn.Module, batch: Batch | None = None, *, loss: Loss | None = None, generator: torch.Generator | None = None
) -> Scores:
    """Score uniformly at random in [0, 1): random masks with an exact count."""
    device = generator.device if generator is not None else None
    return {
        name: torch.rand(weight.shape, generator=generator, device=device).to(weight.device)
        for name, weight in prunable(model).items()
    }


def snip(
    model: nn.Module, batch: Batch | None = None, *, loss: Loss | None = None, generator: torch.Generator | None = None
) -> Scores:
    """Score by |w · ∂L/∂w| on one batch (Lee et al. 2019, equation 6); `loss` None is the cross-entropy."""
    slopes = gradients(model, _needed(batch, "snip"), loss, generator)
    return {name: (weight.detach() * slopes[name]).abs() for name, weight in prunable(model).items()}


def taylor(
    model: nn.Module, batch: Batch | None = None, *, loss: Loss | None = None, generator: torch.Generator | None = None
) -> Scores:
    """Score by the mean over groups of 32 images of (w · ∂L/∂w)² (Molchanov et al. 2019, equation 8)."""
    x, y = _needed(batch, "taylor")
    totals = {name: torch.zeros_like(weight) for name, weight in prunable(model).items()}
    groups = list(zip(torch.split(x, _TAYLOR_BATCH), torch.split(y, _TAYLOR_BATCH), strict=True))
    for group in groups:
        slopes = gradients(model, group, loss, generator)
        for name, weight in prunable(model).items():
            totals[name] += (weight.detach() * slopes[name]).square() / len(groups)
    return {name: total.detach() for name, total in totals.items()}


@torch.no_grad()
def wanda(
    model: nn.Module, batch: Batch | None = None, *, loss: Loss | None = None, generator: torch.Generator | None = None
) -> Scores:
    """Score by |w| times the root mean square of the input it multiplies (Sun et al. 2024, equation 1).

    Inputs of a convolution are taken per channel, over all positions. Raises UserError for layers that do not expose
    the inputs of each weight: recurrent, attention, bilinear and transposed ones.
    """
    x, _ = _needed(batch, "wanda")
    with eval_mode(model):
        answer = opened(model, x)
    found = [m for m in matrices(model) if m.excuse is None]
    for matrix in found:
        hidden = _hides_inputs(model, matrix)
        if hidden:
            raise UserError(f"wanda needs the input of every weight, which '{hidden}' does not expose; use 'magnitude'")
    weights = {m.name: m.value() for m in found}
    squares: dict[str, Tensor] = {}
    names = {id(parameter): name for name, parameter in prunable(model).items()}
    computed = {id(m.module): m.name for m in found}

    def listen(module: nn.Module, inputs: tuple[Tensor, ...], _: Tensor) -> None:
        name = names.get(id(module._parameters.get("weight"))) or computed[id(module)]
        value = inputs[0].detach()
        axis = 1 if weights[name].dim() > 2 else value.dim() - 1
        square = value.square().mean([a for a in range(value.dim()) if a != axis])
        squares[name] = squares.get(name, torch.zeros_like(square)) + square

    shared = [m for m in model.modules() if id(m) in computed or id(m._parameters.get("weight")) in names]
    with eval_mode(model), ExitStack() as stack:
        for module in shared:
            stack.callback(module.register_forward_hook(listen).remove)
        answer(x)
    return {
        name: weight.abs() * _per_input(squares[name].sqrt(), weight) if name in squares else torch.zeros_like(weight)
        for name, weight in weights.items()
    }


def _hides_inputs(model: nn.Module, matrix: Matrix) -> str | None:
    """Return the path of a layer whose matrix multiplies a value that no hook sees, or None."""
    owner = model.get_submodule(matrix.path.rpartition(".")[0])
    hidden = not isinstance(matrix.module, nn.Linear | nn.Conv1d | nn.Conv2d | nn.Conv3d)
    return matrix.path if hidden or isinstance(owner, nn.MultiheadAttention) else None


def _per_input(norms: Tensor, weight: Tensor) -> Tensor:
    """Broadcast norms of a layer's inputs to its weight; outputs of a grouped convolution see only their own group."""
    groups = len(norms) // weight.shape[1]
    rows = norms.view(groups, -1).repeat_interleave(len(weight) // groups, 0)
    return rows.view(len(weight), weight.shape[1], *[1] * (weight.dim() - 2))


def gradients(
    model: nn.Module, batch: Batch, loss: Loss | None = None, generator: torch.Generator | None = None
) -> dict[str, Tensor]:
    """Return ∂L/∂w of every prunable weight, in eval mode, without changing `p.grad`; zero if L ignores w."""
    weights = prunable(model)

    with eval_mode(model), torch.enable_grad():
        x, y = batch
        answer = opened(model, x)
        value = F.cross_entropy(answer(x), y) if loss is None else loss(answer, x, y, generator)
        found = torch.autograd.grad(value, list(weights.values()), allow_unused=True)
    return {
        name: torch.zeros_like(weight) if slope is None else slope
        for (name, weight), slope in zip(weights.items(), found, strict=True)
    }


def _needed(batch: Batch | None, score: str) -> Batch:
    if batch is None or not len(batch[0]):
        raise UserError(f"the score '{score}' needs a batch of images and labels")
    return batch


SCORES: dict[str, Score] = {
    "magnitude": magnitude,
    "random": random,
    "snip": snip,
    "taylor": taylor,
    "wanda": wanda,
}
