"""The few layers that torch lacks."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..graph import Add, Affine, Step


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

    def steps(self, dtype: torch.dtype) -> list[Step]:
        """Say what forward() computes; see `graph.Stepwise`."""
        mean, std = self.mean.to(dtype).flatten(), self.std.to(dtype).flatten()
        one = torch.ones_like(mean)
        return [(Affine("", one, -mean), (0,)), (Affine("", one / std, torch.zeros_like(one)), (1,))]


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

    def steps(self, dtype: torch.dtype) -> list[Step]:
        """Say what forward() computes; see `graph.Stepwise`."""
        return [(self.body, (0,)), (self.shortcut, (0,)), (Add(), (1, 2)), (self.relu, (3,))]
