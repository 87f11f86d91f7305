"""Small sparse networks of every shape that deployment must handle."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import nn

from sparring.models import build


def sparsify_(model: nn.Module, density: float, generator: torch.Generator) -> nn.Module:
    """Zero weights at random, layer by layer, and give batch norm statistics that are not the identity."""
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d | nn.BatchNorm1d):
            module.running_mean = torch.randn(module.num_features, generator=generator) * 0.1
            module.running_var = torch.rand(module.num_features, generator=generator) + 0.5
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(torch.rand(parameter.shape, generator=generator) < density)
    return model.eval()


@pytest.fixture(scope="module")
def new_kernels(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Use no kernels that an earlier run left in the cache; those of this run, by any worker, are shared."""
    base = tmp_path_factory.getbasetemp()
    folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "kernels"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(folder))
        yield


@pytest.fixture
def sparse_model() -> Callable[..., nn.Module]:
    """Return a function that builds a named network with a given density."""

    def make(name: str, density: float, *, seed: int = 0, width: float | None = None) -> nn.Module:
        channels = 1 if "lenet" in name else 3
        shape = (channels, 28, 28) if channels == 1 else (channels, 32, 32)
        model = build(name, shape=shape, classes=10, mean=(0.4,) * channels, std=(0.3,) * channels, width=width)
        generator = torch.Generator().manual_seed(seed)
        sparsify_(model, density, generator)
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.momentum = 1.0  # take the statistics of the one batch that follows, so that no layer dies
        with torch.no_grad():
            model.train()(torch.rand(16, *shape, generator=generator))
        return model.eval()

    return make


@pytest.fixture
def sparsify() -> Callable[..., nn.Module]:
    """Return the function that makes any network sparse."""
    return sparsify_
