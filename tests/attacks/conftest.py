"""Small models that attack tests share."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from .broken_defences import task


@pytest.fixture
def net() -> nn.Sequential:
    """Return a small untrained network for 8×8 images and four classes."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 4)).eval()


@pytest.fixture
def images() -> Tensor:
    """Return twelve random 8×8 images."""
    return torch.rand(12, 1, 8, 8, generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="session")
def trained() -> tuple[nn.Sequential, Tensor, Tensor]:
    """Return LeNet-300-100 trained on mnist-5k and a hundred test images that it classifies correctly."""
    return task("undefended")[:3]
