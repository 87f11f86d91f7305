"""Masks over named parameters: which weights can be pruned, which are kept, and how many that is."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..errors import UserError
from .contracts import Masks

__all__ = [
    "CollapsedLayerWarning",
    "Counts",
    "all_ones",
    "apply_",
    "check_masks",
    "collapsed",
    "counts",
    "prunable",
    "sparsity_of",
    "warn_of_collapse",
]

_PRUNABLE = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)


class CollapsedLayerWarning(UserWarning):
    """Warn that a layer has lost all its weights."""


def prunable(model: nn.Module) -> dict[str, nn.Parameter]:
    """Return the weights of linear and convolutional layers by name, in the model's order, shared ones once."""
    weights = {id(module.weight): None for module in model.modules() if isinstance(module, _PRUNABLE)}
    return {name: parameter for name, parameter in model.named_parameters() if id(parameter) in weights}


def all_ones(model: nn.Module) -> Masks:
    """Return masks that keep every prunable weight: what every pruner starts from."""
    return {name: torch.ones_like(weight, dtype=torch.bool) for name, weight in prunable(model).items()}


@torch.no_grad()
def apply_(model: nn.Module, masks: Masks) -> None:
    """Set every parameter to zero where its mask is False, in place (also where it was infinite or NaN)."""
    for name, mask in masks.items():
        model.get_parameter(name).masked_fill_(~mask, 0.0)


def check_masks(model: nn.Module, masks: Mapping[str, Tensor]) -> Masks:
    """Return the masks as a plain dict; raise UserError that names the first one that does not fit the model.

    Masks are saved and loaded as what they are, named tensors (`files.save_tensors`, `files.load_tensors`), bit for
    bit; this is the check after loading.
    """
    parameters = dict(model.named_parameters())
    for name in prunable(model):
        if name not in masks:
            raise UserError(f"the masks lack '{name}', which the model has: do model and masks belong together?")
    for name, mask in masks.items():
        if name not in parameters:
            raise UserError(f"there is a mask for '{name}', which the model lacks: do they belong together?")
        if mask.dtype != torch.bool or mask.shape != parameters[name].shape:
            raise UserError(
                f"the mask of '{name}' is {mask.dtype} {tuple(mask.shape)}; "
                f"it must be torch.bool {tuple(parameters[name].shape)}"
            )
    return dict(masks)


def sparsity_of(masks: Masks) -> float:
    """Return the fraction of weights removed; masks of vectors (biases, normalisation) are not counted."""
    weights = [mask for mask in masks.values() if mask.dim() > 1]
    total = sum(mask.numel() for mask in weights)
    return 1.0 - sum(int(mask.sum()) for mask in weights) / total if total else 0.0


@dataclass(frozen=True)
class Counts:
    """Count a network's values and those that are nonzero: prunable weights, biases, normalisation, and all."""

    weights: int
    weights_nonzero: int
    biases: int
    biases_nonzero: int
    other: int
    other_nonzero: int

    @property
    def weight_sparsity(self) -> float:
        """The fraction of prunable weights that are zero."""
        return 1.0 - self.weights_nonzero / self.weights if self.weights else 0.0

    @property
    def parameter_sparsity(self) -> float:
        """The fraction of all parameters that are zero, biases and normalisation counted."""
        total = self.weights + self.biases + self.other
        nonzero = self.weights_nonzero + self.biases_nonzero + self.other_nonzero
        return 1.0 - nonzero / total if total else 0.0


def counts(model: nn.Module) -> Counts:
    """Count what a network really holds, not what its masks promise."""
    weights = prunable(model)
    owners = {name.removesuffix("weight") for name in weights}
    tally = {kind: [0, 0] for kind in ("weights", "biases", "other")}
    for name, parameter in model.named_parameters():
        bias = name.endswith("bias") and name.removesuffix("bias") in owners
        entry = tally["weights" if name in weights else "biases" if bias else "other"]
        entry[0] += parameter.numel()
        entry[1] += int(torch.count_nonzero(parameter))
    return Counts(*tally["weights"], *tally["biases"], *tally["other"])


def collapsed(masks: Masks) -> list[str]:
    """Return the names of weights of which nothing is kept."""
    # numpy stops at the first weight that is kept; torch's any() reads them all.
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
