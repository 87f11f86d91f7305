"""What layers declare because it cannot be detected: randomness, and gradients that mislead attacks."""

from __future__ import annotations

import torch
from torch import nn

__all__ = ["Declared"]


class Declared(nn.Module):
    """Base class of layers that attacks, bounds and the graph must know about.

    The graph keeps such a layer whole. Attacks set `straight_through` if the layer has `masks_gradients`; the backward
    pass is then the layer's BPDA (Athalye et al. 2018). The forward pass never changes.
    """

    kind: str = ""
    """Name by which bounds and the sparse runtime recognise the layer; they refuse names without a rule."""

    masks_gradients: bool = False
    """Whether the layer's true backward pass misleads attacks."""

    stochastic: bool = False
    """Whether the layer draws random numbers, from `generator` (None: torch's default)."""

    nondecreasing: bool = False
    """Whether each output is a nondecreasing function of its own input, possibly with jumps; intervals then suffice."""

    straight_through: bool = False
    generator: torch.Generator | None = None

    def dense(self) -> nn.Module | None:
        """Return the layer that this one replaced, for attacks that transfer from the dense network, or None."""
        return None
