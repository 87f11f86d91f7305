"""Masks name the right parameters, hold through optimisers, and survive a file bit for bit."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from sparring.files import load_tensors, save_tensors
from sparring.metrics import size
from sparring.models import build
from sparring.sparsity import all_ones, apply_, magnitude, masked, prunable, select, sparsity_of


def small() -> nn.Module:
    return build("resnet-32", shape=(3, 8, 8), classes=4, mean=(0.5,) * 3, std=(0.25,) * 3, width=0.25, depth=8)


def test_prunable_are_the_weights_of_linear_and_convolutional_layers() -> None:
    model = small()
    expected = [f"{name}.weight" for name, module in model.named_modules() if isinstance(module, nn.Conv2d | nn.Linear)]
    assert list(prunable(model)) == expected
    assert sparsity_of(all_ones(model)) == 0.0


def test_sizes_separate_weights_from_biases_and_normalisation() -> None:
    model = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3), nn.Linear(3, 2, bias=False))
    with torch.no_grad():
        model.get_parameter("0.bias").fill_(1.0)
    masks = select(magnitude(model), 0.5)
    apply_(model, masks)
    found = size(model)
    assert (found.weights, found.nonzero_weights) == (18, 9)
    assert (found.parameters, found.nonzero) == (27, 15)  # batch norm starts with ones and zeros
    assert found.sparsity == sparsity_of(masks) == 0.5
    assert found.sparsity_total == 1 - 15 / 27


@pytest.mark.parametrize(
    "optimiser",
    [
        lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, weight_decay=1e-2, nesterov=True),
        lambda p: torch.optim.Adam(p, lr=1e-2, weight_decay=1e-2),
    ],
)
def test_masked_weights_stay_zero_through_momentum_and_decay(
    optimiser: Callable[[object], torch.optim.Optimizer],
) -> None:
    model = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3))
    steps = optimiser(model.parameters())
    masks = all_ones(model)
    generator = torch.Generator().manual_seed(0)
    for step in range(20):
        x, y = torch.rand(16, 6, generator=generator), torch.randint(3, (16,), generator=generator)
        steps.zero_grad()
        F.cross_entropy(model(x), y).backward()
        steps.step()
        if step == 5:
            masks = select(magnitude(model), 0.7)
        apply_(model, masks)
        assert all(bool((model.get_parameter(n)[~m] == 0).all()) for n, m in masks.items())
    assert size(model).sparsity == sparsity_of(masks)


def test_masks_survive_a_file_bit_for_bit(tmp_path: Path) -> None:
    model = small()
    masks = select(magnitude(model), 0.53)
    loaded = load_tensors(save_tensors(tmp_path / "masks.safetensors", masks))
    assert loaded.keys() == masks.keys()
    assert all(torch.equal(loaded[name], masks[name]) for name in masks)


def test_apply_clears_values_that_are_not_finite() -> None:
    model = nn.Linear(2, 1)
    with torch.no_grad():
        model.weight[0, 0] = torch.inf
    apply_(model, {"weight": torch.tensor([[False, True]])})
    assert model.weight[0, 0] == 0


def test_masked_shows_masked_weights_and_gives_dense_ones_back() -> None:
    model, shown = small().eval(), small().eval()
    masks = select(magnitude(model), 0.7)
    apply_(shown, masks)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    x = torch.rand(4, 3, 8, 8)
    with pytest.raises(ZeroDivisionError), masked(model, masks) as inside:
        assert torch.equal(inside(x), shown(x))
        F.cross_entropy(inside(x), torch.arange(4)).backward()
        raise ZeroDivisionError
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    for name, mask in masks.items():
        gradient = model.get_parameter(name).grad
        assert gradient is not None and bool((gradient[~mask] != 0).any())
