"""Noise that a model does not declare."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class Noise(nn.Module):
    """A layer that draws and does not say so."""

    def forward(self, x: Tensor) -> Tensor:
        return x + 0.1 * torch.randn_like(x)
