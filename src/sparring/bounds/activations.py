"""Bounds of activation-sparsity modules, by their `kind`; those without a sound rule are refused with the reason."""

from __future__ import annotations

from torch import Tensor

from ..errors import Unsupported
from ..graph import Activation

__all__ = ["activation_interval", "activation_lines"]


def activation_interval(op: Activation, lower: Tensor, upper: Tensor) -> tuple[Tensor, Tensor]:
    """Return the bounds of an activation-sparsity module's output from those of its input."""
    raise _refusal(op)


def activation_lines(op: Activation, lower: Tensor, upper: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return low slope, low shift, high slope and high shift of an activation-sparsity module over an interval."""
    raise _refusal(op)


def _refusal(op: Activation) -> Unsupported:
    kind = getattr(op.module, "kind", type(op.module).__name__)
    return Unsupported(f"activation '{op.name}' of kind '{kind}' has no sound bound")
