"""Scores against their formulas, on networks small enough to write them out."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sparring.sparsity import SCORES, Score, prunable, random, snip, taylor, wanda


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(2, 4, 3, groups=2), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Dropout(0.5), nn.Linear(64, 3)
    )


def batch(count: int = 40) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return torch.rand(count, 2, 6, 6, generator=generator), torch.randint(3, (count,), generator=generator)


@pytest.mark.parametrize("score", SCORES.values(), ids=SCORES)
def test_scores_have_the_weights_shapes_and_leave_the_model_alone(score: Score) -> None:
    model = network()
    model.train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    found = score(model, batch(), generator=torch.Generator().manual_seed(0))
    assert {name: s.shape for name, s in found.items()} == {n: w.shape for n, w in prunable(model).items()}
    assert not any(s.requires_grad for s in found.values())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(module.training for module in model.modules())
    assert all(p.grad is None for p in model.parameters())


def test_snip_is_the_derivative_by_the_mask() -> None:
    model = network().eval()
    x, y = batch()
    ones = {name: torch.ones_like(w, requires_grad=True) for name, w in prunable(model).items()}
    masked = {name: w.detach() * ones[name] for name, w in prunable(model).items()}
    value = F.cross_entropy(torch.func.functional_call(model, masked, (x,)), y)
    slopes = torch.autograd.grad(value, list(ones.values()))
    found = snip(model, (x, y))
    for name, slope in zip(ones, slopes, strict=True):
        assert torch.allclose(found[name], slope.abs(), atol=1e-7)


def test_taylor_averages_squares_over_groups() -> None:
    model = network().eval()
    x, y = batch(64)
    parts = [snip(model, (x[s], y[s])) for s in (slice(0, 32), slice(32, 64))]
    found = taylor(model, (x, y))
    for name, score in found.items():
        assert torch.allclose(score, sum((p[name].square() for p in parts), torch.zeros(())) / 2, atol=1e-8)


def test_wanda_multiplies_by_the_norm_of_each_input() -> None:
    model = network().eval()
    x, y = batch()
    found = wanda(model, (x, y))
    inputs = model[:4](x)  # type: ignore[index]
    weight = model.get_parameter("5.weight")
    assert torch.allclose(found["5.weight"], weight.detach().abs() * inputs.square().mean(0).sqrt())
    kernel = model.get_parameter("0.weight").detach().abs()
    norms = x.square().mean((0, 2, 3)).sqrt()
    assert torch.allclose(found["0.weight"][:2], kernel[:2] * norms[0])
    assert torch.allclose(found["0.weight"][2:], kernel[2:] * norms[1])


def test_random_scores_follow_their_generator() -> None:
    model = network()
    first, second = (random(model, generator=torch.Generator().manual_seed(1)) for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)
