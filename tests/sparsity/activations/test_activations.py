"""Activation sparsity: measured right, controlled exactly, put into any model, honest about gradients."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

from sparring.errors import UserError
from sparring.graph import SparseActivation, lower
from sparring.models import build
from sparring.sparsity import (
    ACTIVATIONS,
    MeanSparse,
    Percentile,
    ShiftedReLU,
    StochasticPruning,
    Threshold,
    TopK,
    activity,
    calibrate_,
    insert,
    sparsifiers,
    with_activation_penalty,
)

LEVELS = {
    "shifted-relu": 0.2,
    "threshold": 0.2,
    "top-k": 0.7,
    "percentile": 0.7,
    "stochastic-pruning": 0.5,
    "mean-sparse": 0.5,
}


class Functional(nn.Module):
    """ReLUs as functions and methods, and one module used twice."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.last = nn.Conv2d(1, 4, 3), nn.Conv2d(4, 4, 3), nn.Linear(4 * 16, 5)
        self.relu = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.first(x))
        x = self.relu(self.relu(self.second(x)))
        result: Tensor = self.last(x.flatten(1).relu())
        return result


def images(count: int = 8) -> Tensor:
    return torch.rand(count, 1, 8, 8, generator=torch.Generator().manual_seed(0))


def functional() -> nn.Module:
    torch.manual_seed(0)
    return Functional().eval()


def residual() -> nn.Module:
    return build("resnet-32", shape=(1, 8, 8), classes=5, mean=(0.5,), std=(0.5,), depth=8)


def test_activity_is_counted_after_functions_and_modules() -> None:
    model = functional()
    x = images()
    found = activity(model, x, batch_size=3)
    assert isinstance(model, Functional)
    first = F.relu(model.first(x))
    second = F.relu(model.second(first))
    expected = [first, second, second, second.flatten(1)]
    assert [layer.name for layer in found.layers] == ["model", "relu", "relu#2", "model#2"]
    for layer, value in zip(found.layers, expected, strict=True):
        assert layer.sparsity == float((value == 0).double().mean())
        assert layer.units == value.shape[1]
    zeros = sum(int((v == 0).sum()) for v in expected)
    assert found.sparsity == zeros / sum(v.numel() for v in expected)


def test_dead_units_are_listed() -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 6), nn.ReLU(), nn.Linear(6, 2))
    with torch.no_grad():
        model.get_parameter("1.bias")[[1, 4]] = -1e3
    (layer,) = activity(model, (images() * 255).to(torch.uint8)).layers
    assert {1, 4} <= set(layer.dead)
    assert layer.sparsity >= 2 / 6


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 40), st.floats(0, 0.99), st.integers(0, 99))
def test_top_k_keeps_the_count_under_ties(units: int, sparsity: float, seed: int) -> None:
    x = torch.randint(1, 4, (3, units), generator=torch.Generator().manual_seed(seed)).float()
    kept = (TopK(sparsity)(x) != 0).sum(1)
    assert kept.tolist() == [max(1, units - round(sparsity * units))] * 3


def test_percentile_reaches_its_sparsity_on_the_calibration_data() -> None:
    model = insert(build("lenet-300-100", shape=(1, 8, 8), classes=3, mean=(0.5,), std=(0.5,)), lambda: Percentile(0.8))
    x = images(64)
    calibrate_(model, x)
    for layer in activity(model, x).layers:
        assert layer.sparsity == pytest.approx(0.8, abs=1e-3)


def test_mean_sparse_blocks_exactly_the_band_around_the_mean() -> None:
    module = MeanSparse(0.5)
    x = torch.randn(50, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    assert torch.equal(module(x), F.relu(x)), "before calibration it is a ReLU"
    calibrate_(nn.Sequential(module, nn.Flatten()), x)
    mean, deviation = x.mean((0, 2, 3)).view(1, 3, 1, 1), x.std((0, 2, 3), correction=0).view(1, 3, 1, 1)
    inside = (x - mean).abs() <= 0.5 * deviation
    assert torch.allclose(module(x), F.relu(torch.where(inside, mean, x)))
    fresh = MeanSparse(0.5)
    fresh.load_state_dict(module.state_dict())
    assert torch.equal(fresh(x), module(x))


def test_stochastic_pruning_is_unbiased_and_reproducible() -> None:
    module = StochasticPruning(0.5)
    x = torch.tensor([[0.5, 1.0, 2.0, 0.0, -1.0, 4.0]])
    module.generator = torch.Generator().manual_seed(3)
    mean = module(x.expand(20_000, -1)).mean(0)
    assert torch.allclose(mean, F.relu(x[0]), atol=0.1)
    module.generator.manual_seed(5)
    once = module(x)
    module.generator.manual_seed(5)
    assert torch.equal(once, module(x))
    assert torch.equal(module(-x.abs()), torch.zeros_like(x))


@pytest.mark.parametrize("kind", ACTIVATIONS)
def test_straight_through_has_the_relus_gradient_and_the_same_output(kind: str) -> None:
    module = ACTIVATIONS[kind](LEVELS[kind])
    assert module.kind == kind
    x = torch.randn(4, 20, generator=torch.Generator().manual_seed(1))
    calibrate_(nn.Sequential(module), x)
    module.generator = torch.Generator().manual_seed(2)
    plain = module(x)
    module.generator.manual_seed(2)
    module.straight_through = True
    x.requires_grad_()
    through = module(x)
    assert torch.allclose(through, plain, atol=1e-6)
    (gradient,) = torch.autograd.grad(through.sum(), x)
    assert torch.equal(gradient, (x > 0).float())


@pytest.mark.parametrize("kind", ACTIVATIONS)
@pytest.mark.parametrize("make", [functional, residual])
def test_insert_replaces_every_relu_and_keeps_names(kind: str, make: Callable[[], nn.Module]) -> None:
    model = make()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    sparse = insert(model, lambda: ACTIVATIONS[kind](LEVELS[kind]))
    assert not any(isinstance(module, nn.ReLU) for module in sparse.modules())
    assert len(list(sparsifiers(sparse))) == (4 if isinstance(model, Functional) else 7)
    assert set(before) <= set(sparse.state_dict())
    assert all(torch.equal(sparse.state_dict()[name], value) for name, value in before.items())
    calibrate_(sparse, images())
    sparse.train()
    sparse(images()).sum().backward()
    assert all(p.grad is not None for p in sparse.parameters())
    assert sum(isinstance(n.op, SparseActivation) for n in lower(sparse, (1, 8, 8)).nodes) == len(
        list(sparsifiers(sparse))
    )


def test_insert_spares_and_refuses() -> None:
    model = functional()
    assert len(list(sparsifiers(insert(model, lambda: TopK(0.5), spare=("relu",))))) < 4
    with pytest.raises(UserError, match="unknown ReLU 'nope'"):
        insert(model, lambda: TopK(0.5), spare=("nope",))
    with pytest.raises(UserError, match="no ReLU"):
        insert(nn.Linear(2, 2), lambda: TopK(0.5))


def test_inserting_a_zero_threshold_changes_nothing() -> None:
    model = functional()
    for factory in (lambda: Threshold(0.0), lambda: ShiftedReLU(0.0), lambda: TopK(0.0), lambda: Percentile(0.0)):
        assert torch.allclose(insert(model, factory)(images()), model(images()), atol=1e-6)


def test_penalty_is_the_mean_activation_and_reaches_the_weights() -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 6), nn.ReLU(), nn.Linear(6, 2))
    x, y = images(), torch.zeros(8, dtype=torch.int64)
    loss = lambda m, x, y, g=None: F.cross_entropy(m(x), y)  # noqa: E731
    extra = with_activation_penalty(loss, 3.0)(model, x, y, None) - loss(model, x, y)
    assert extra.item() == pytest.approx(3.0 * model[:3](x).mean().item(), rel=1e-5)
    (gradient,) = torch.autograd.grad(extra, model.get_parameter("1.weight"))
    assert bool((gradient != 0).any())


@pytest.mark.parametrize("bad", [-0.1, 1.0, float("nan")])
def test_bad_levels_are_refused(bad: float) -> None:
    for module in (TopK, Percentile):
        with pytest.raises(UserError, match="fraction"):
            module(bad)
    if bad != 1.0:
        for other in (ShiftedReLU, Threshold, MeanSparse):
            with pytest.raises(UserError, match="at least 0"):
                other(bad)
