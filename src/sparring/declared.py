"""Layers declare what cannot be detected: whether they are stochastic, and whether their gradients mislead attacks."""

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
    """By what name bounds and the sparse runtime know it; they refuse what has no rule."""

    masks_gradients: bool = False
    """Its true backward pass misleads an attack."""

    stochastic: bool = False
    """It draws from `generator`, None being torch's default."""

    nondecreasing: bool = False
    """Each output is a nondecreasing function of its own input, jumps included, so that intervals pass through."""

    straight_through: bool = False
    generator: torch.Generator | None = None

    def dense(self) -> nn.Module | None:
        """Return what this layer took the place of, for attacks that transfer from the dense network; None: nothing."""
        return None
