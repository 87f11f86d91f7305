"""Masks of named parameters: which weights can be pruned, which are kept, and how many."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Protocol

import torch
from torch import Tensor, nn

from ..errors import UserError
from ..matrices import matrices

Masks = dict[str, Tensor]
"""Parameter name to bool tensor of the parameter's shape; True = kept."""

Scores = dict[str, Tensor]
"""Parameter name to finite float tensor of the parameter's shape; the highest are kept."""

Batch = tuple[Tensor, Tensor]
"""Images (N, C, H, W), float in [0, 1], and labels (N,), int64."""

Loss = Callable[[nn.Module, Tensor, Tensor, torch.Generator | None], Tensor]
"""A scalar from a model, float images, labels and a generator."""


class Score(Protocol):
    """Score each prunable weight. Scores ignore arguments that they do not need and do not change the model."""

    def __call__(
        self,
        model: nn.Module,
        batch: Batch | None = None,
        *,
        loss: Loss | None = None,
        generator: torch.Generator | None = None,
    ) -> Scores: ...


class CollapsedLayerWarning(UserWarning):
    """Warn that a layer has lost all its weights."""


def prunable(model: nn.Module) -> dict[str, nn.Parameter]:
    """Return the parameters through which weight matrices can be pruned, by name, in the model's order.

    These are parameters of linear, convolutional, recurrent and attention layers; for a layer under weight_norm,
    spectral_norm or torch.nn.utils.prune, the tensor whose zeros are zeros of the weight that the layer computes.
    Shared parameters occur once.
    """
    return {m.name: model.get_parameter(m.name) for m in matrices(model) if m.excuse is None}


def all_ones(model: nn.Module) -> Masks:
    """Return masks that keep every prunable weight, the start of every pruner."""
    return {name: torch.ones_like(weight, dtype=torch.bool) for name, weight in prunable(model).items()}


@torch.no_grad()
def apply_(model: nn.Module, masks: Masks) -> None:
    """Set every parameter to zero where its mask is False, in place (also where it was infinite or NaN)."""
    for name, mask in applied_(model, masks).items():
        model.get_parameter(name).masked_fill_(~mask, 0.0)


@torch.no_grad()
def applied_(model: nn.Module, masks: Masks) -> Masks:
    """Return factors of parameters that make the weights that layers compute zero where masks are False.

    These are the masks, except for weight_norm, which divides by the norm of a row: in a row without nonzero weights
    one value stays (set to 1 if it was zero), and the gain is zero instead. Raise UserError if nothing is left of a
    layer under spectral_norm, since it cannot be computed.
    """
    result = dict(masks)
    for matrix in matrices(model):
        if matrix.excuse is not None or matrix.name not in masks:
            continue
        value, mask = model.get_parameter(matrix.name), masks[matrix.name]
        if matrix.gain is not None:
            result |= _held_by_gain_(matrix.name, value, mask, matrix.gain, model.get_parameter(matrix.gain))
        elif matrix.divides and not bool(mask.any()):
            raise UserError(
                f"nothing would be left of '{matrix.name}', and spectral_norm cannot divide by the norm of zeros; "
                "set a floor, or allocate sparsity per layer"
            )
    return result


def _held_by_gain_(name: str, value: Tensor, mask: Tensor, gain_name: str, gain: Tensor) -> Masks:
    axis = next((a for a, size in enumerate(gain.shape) if size > 1), None)

    def rows(tensor: Tensor) -> Tensor:
        return tensor.reshape(1, -1) if axis is None else tensor.movedim(axis, 0).flatten(1)

    kept = rows(mask)
    dead = ~(rows(value) * kept).any(1)
    if not bool(dead.any()):
        return {}
    choice = torch.where(kept.any(1), kept.int().argmax(1), rows(value).abs().argmax(1))
    one = torch.zeros_like(kept).scatter_(1, choice[:, None], True) & dead[:, None]
    one = one.view(value.shape) if axis is None else one.view(value.movedim(axis, 0).shape).movedim(0, axis)
    value.masked_fill_(one & (value == 0), 1.0)
    gain.masked_fill_(dead.view(gain.shape), 0.0)
    return {name: mask | one, gain_name: kept.any(1).view(gain.shape)}


@contextmanager
def masked(model: nn.Module, masks: Masks) -> Iterator[nn.Module]:
    """Apply masks to a model while the block runs: outputs are those of w∘mask, gradients are dense.

    Use it in your own training loop with a pruner that keeps dense weights (surgery, HYDRA, movement): forward and
    backward pass inside the block, the optimiser's step outside, where the dense weights are restored.
    """
    with shown(targets(model, masks)):
        yield model


def targets(model: nn.Module, masks: Masks) -> list[tuple[nn.Parameter, Tensor]]:
    """Pair each masked parameter with its mask in the parameter's type and layout, which are fastest to multiply."""
    parameters = dict(model.named_parameters())
    unknown = set(masks) - set(parameters)
    if unknown:
        raise UserError(f"the mask names '{min(unknown)}', which is not a parameter of the model")
    masks = applied_(model, masks)
    return [(parameters[name], torch.empty_like(parameters[name].data).copy_(mask)) for name, mask in masks.items()]


@contextmanager
def shown(pairs: Sequence[tuple[nn.Parameter, Tensor]]) -> Iterator[None]:
    """Multiply parameters by their masks while the block runs; the parameters are restored unchanged."""
    kept = [parameter.detach().clone() for parameter, _ in pairs]
    multiply_(pairs)
    try:
        yield
    finally:
        with torch.no_grad():
            for (parameter, _), dense in zip(pairs, kept, strict=True):
                parameter.copy_(dense)


@torch.no_grad()
def multiply_(pairs: Iterable[tuple[Tensor, Tensor]]) -> None:
    """Multiply values by their masks, in place."""
    for value, mask in pairs:
        value.mul_(mask)


def sparsity_of(masks: Masks) -> float:
    """Return the fraction of weights removed; masks of vectors (biases, normalisation) are not counted."""
    weights = [mask for mask in masks.values() if mask.dim() > 1]
    total = sum(mask.numel() for mask in weights)
    return 1.0 - sum(int(mask.sum()) for mask in weights) / total if total else 0.0


def collapsed(masks: Masks) -> list[str]:
    """Return the names of weights without any kept entry."""
    # NumPy stops at the first kept weight; torch's any() reads them all.
    return [name for name, mask in masks.items() if mask.dim() > 1 and not mask.detach().cpu().numpy().any()]


def warn_of_collapse(masks: Masks, before: Masks | None = None) -> None:
    """Warn of layers that have lost all their weights (and had not in `before`)."""
    lost = collapsed(masks)
    if lost and before is not None:
        old = set(collapsed({name: before[name] for name in lost if name in before}))
        lost = [name for name in lost if name not in old]
    if lost:
        names = ", ".join(f"'{name}'" for name in lost)
        warnings.warn(
            f"nothing is left of {names}: no signal passes; set a floor, or allocate sparsity per layer",
            CollapsedLayerWarning,
            stacklevel=3,
        )
