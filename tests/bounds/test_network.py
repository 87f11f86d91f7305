"""A network without its idle pixels and units is the same network; products that skip zeros are the same products."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import nn

from sparring.bounds import exact, lipschitz, margin, radius, verify
from sparring.bounds._network import SparseLinear, adjoint, compacted, prepare
from sparring.bounds.certify._certificates import margins_over
from sparring.errors import UserError
from sparring.graph import Linear
from sparring.models import Normalise
from sparring.threat import L0, Threat

from .random_networks import network


def sparse_model(seed: int, density: float) -> nn.Module:
    torch.manual_seed(seed)
    layers = [nn.Linear(18, 30), nn.ReLU(), nn.Linear(30, 20, bias=bool(seed % 2)), nn.ReLU(), nn.Linear(20, 3)]
    model = nn.Sequential(Normalise((0.3, 0.6), (0.4, 0.2)), nn.Flatten(), *layers).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(3 * (torch.rand(parameter.shape) < density))
    return model


@pytest.mark.parametrize("density", [1.0, 0.1, 0.03, 0.0])
@pytest.mark.parametrize("seed", range(4))
def test_logits_and_margins_stay(seed: int, density: float) -> None:
    model = sparse_model(seed, density)
    x = torch.rand(6, 2, 3, 3)
    dense = prepare(model, (2, 3, 3), sparse=False)
    graph, pixels = compacted(prepare(model, (2, 3, 3)), x)
    torch.testing.assert_close(graph(pixels.double()), dense(x.double()), atol=1e-12, rtol=0)
    y = model(x).argmax(1)
    for norm in (math.inf, 2.0, 1.0):
        eps = torch.full((6,), 0.07, dtype=torch.float64)
        for method in ("interval", "crown-interval", "crown"):
            found, expected = (
                margins_over(graph, pixels, y, norm, eps, method),
                margins_over(dense, x, y, norm, eps, method),
            )
            torch.testing.assert_close(found, expected, atol=1e-9, rtol=0)


def test_what_is_idle_goes() -> None:
    model = sparse_model(0, 0.1)
    graph, pixels = compacted(prepare(model, (2, 3, 3)), torch.rand(2, 2, 3, 3))
    weights = [node.op.weight for node in graph.nodes if isinstance(node.op, Linear)]
    assert pixels.shape[1] == weights[0].shape[1] < 18
    assert all((weight != 0).any(0).all() for weight in weights)
    assert len(weights[0]) < 30 and len(weights[1]) < 20


@pytest.mark.parametrize("seed", range(7))
def test_other_networks_stay_as_they_are(seed: int) -> None:
    model, shape = network(seed)
    x = torch.rand(3, *shape)
    before = prepare(model, shape)
    graph, pixels = compacted(before, x)
    torch.testing.assert_close(graph(pixels.double()), before(x.double()))
    assert seed % 7 == 0 or graph is before


def test_products_that_skip_zeros_are_the_products() -> None:
    torch.manual_seed(0)
    weight = torch.randn(30, 20, dtype=torch.float64) * (torch.rand(30, 20) < 0.1)
    dense, sparse = Linear("", weight, None), SparseLinear("", weight, None)
    a = torch.randn(5, 30, dtype=torch.float64, requires_grad=True)
    one, two = adjoint(dense, a, (20,)), adjoint(sparse, a, (20,))
    torch.testing.assert_close(one, two)
    slopes = [torch.autograd.grad(value.square().sum(), a)[0] for value in (one, two)]
    torch.testing.assert_close(*slopes)


@pytest.mark.parametrize(
    "bound",
    [
        partial(exact, norm=L0),
        partial(margin, threat=Threat(L0, 2)),
        partial(radius, norm=L0),
        partial(verify, norm=L0, eps=2),
        lambda model, x, y: lipschitz(model, x, 0.1, norm=L0, method="jacobian"),
    ],
)
def test_what_has_no_dual_is_refused_by_name(bound: Callable[..., Any]) -> None:
    with pytest.raises(UserError, match="not l0"):
        bound(sparse_model(0, 1.0), torch.rand(1, 2, 3, 3), torch.tensor([0]))
