"""The few layers that torch lacks."""

from __future__ import annotations

import torch
from torch import Tensor, nn

__all__ = ["Normalise", "Residual"]


class Normalise(nn.Module):
    """Subtract a mean and divide by a standard deviation per channel; a model's first layer, so attacks see [0, 1]."""

    mean: Tensor
    std: Tensor

    def __init__(self, mean: tuple[float, ...], std: tuple[float, ...]) -> None:
        super().__init__()
        self.register_buffer("mean", torch.tensor(mean).view(-1, 1, 1))
        self.register_buffer("std", torch.tensor(std).view(-1, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        return (x - self.mean) / self.std


class Residual(nn.Module):
    """Compute relu(body(x) + shortcut(x)) (He et al. 2016, figure 2)."""

    def __init__(self, body: nn.Module, shortcut: nn.Module) -> None:
        super().__init__()
        self.body = body
        self.shortcut = shortcut
        self.relu = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.relu(self.body(x) + self.shortcut(x))
        return result
