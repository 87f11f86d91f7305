"""Allocations: how much each layer loses so that the network loses a given fraction."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from ..errors import UserError


def uniform(weights: Mapping[str, Tensor], sparsity: float) -> dict[str, float]:
    """Return the same sparsity for every layer."""
    return dict.fromkeys(weights, sparsity)


def erdos_renyi_kernel(weights: Mapping[str, Tensor], sparsity: float) -> dict[str, float]:
    """Return sparsities per layer with density ∝ (sum of dimensions) / (product of dimensions).

    Layers that would exceed density 1 stay dense and the others make up for it (Evci et al. 2020, section 3, ERK).
    Small layers and convolutions to few channels keep more of their weights. `weights` gives names and shapes.
    """
    if not 0 <= sparsity <= 1:
        raise UserError(f"sparsity is the fraction removed, between 0 and 1, not {sparsity}")
    raw = {name: sum(w.shape) / w.numel() for name, w in weights.items()}
    dense: set[str] = set()
    while True:
        kept = (1 - sparsity) * sum(w.numel() for w in weights.values()) - sum(weights[n].numel() for n in dense)
        share = sum(raw[name] * w.numel() for name, w in weights.items() if name not in dense)
        scale = max(kept, 0.0) / share if share else 0.0
        full = {name for name in weights if name not in dense and scale * raw[name] > 1}
        if not full:
            return {name: 0.0 if name in dense else 1 - scale * raw[name] for name in weights}
        dense |= full
