from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from sparring.bounds import LIPSCHITZ, lipschitz
from sparring.bounds._lipschitz import operator_norm
from sparring.bounds._network import others, prepare
from sparring.declared import Declared
from sparring.errors import UnknownNameError, Unsupported, UserError
from sparring.graph import Conv2d
from sparring.threat import dual

from .random_networks import double, hostile_points, network

BOUNDS = ("product", "active", "jacobian")


@pytest.mark.parametrize("norm", [math.inf, 2.0])
def test_no_gradient_or_slope_beats_a_bound(norm: float) -> None:
    for seed in range(14):
        model, shape = network(seed)
        generator = torch.Generator().manual_seed(seed)
        x = torch.rand(1, *shape, generator=generator)
        exact = double(model)
        label = int(exact(x.double()).argmax())
        points = hostile_points(model, x.double(), label, norm, 0.2, points=20, generator=generator).requires_grad_()
        logits = exact(points)
        rest = others(torch.tensor([label]), logits.shape[1])[0]
        steepest = []
        for k in rest:
            gap = logits[:, label] - logits[:, k]
            (slope,) = torch.autograd.grad(gap.sum(), points, retain_graph=True)
            steepest.append(torch.linalg.vector_norm(slope.flatten(1), ord=dual(norm), dim=1).max())
        sampled = lipschitz(model, x, 0.2, norm=norm, method="sampled")[0]
        for method in BOUNDS:
            bound = lipschitz(model, x, 0.2, norm=norm, method=method)[0]
            # Pixels at the box's edge still move inward, so every gradient counts here.
            assert (bound >= torch.stack(steepest) * (1 - 1e-6)).all(), (seed, method)
            assert (bound >= sampled * (1 - 1e-6)).all(), (seed, method)


@pytest.mark.parametrize("norm", [math.inf, 2.0])
def test_in_one_linear_region_the_jacobian_method_is_exact(norm: float) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 3))
    x = torch.rand(3, 1, 2, 2)
    tight, sampled = (lipschitz(model, x, 1e-6, norm=norm, method=m) for m in ("jacobian", "sampled"))
    torch.testing.assert_close(tight, sampled)
    assert (lipschitz(model, x, 1e-6, norm=norm, method="active") >= tight - 1e-9).all()


def test_the_product_bound_is_the_product() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 2))
    w, v = (model.get_parameter(f"{layer}.weight").double() for layer in (1, 3))
    x = torch.rand(2, 1, 2, 2)
    found = lipschitz(model, x, 0.1, norm=2.0, method="product")
    torch.testing.assert_close(found[0, 0], torch.linalg.matrix_norm(w, 2) * (v[0] - v[1]).norm())
    found = lipschitz(model, x, 0.1, norm=math.inf, method="product")
    torch.testing.assert_close(found[0, 0], w.abs().sum(1).max() * (v[0] - v[1]).abs().sum())
    assert (
        lipschitz(model, x, 0.1, norm=2.0, method="active")
        <= 1e-9 + lipschitz(model, x, 0.1, norm=2.0, method="product")
    ).all()


@pytest.mark.parametrize("seed", range(8))
def test_a_convolutions_norm_is_that_of_its_operator(seed: int) -> None:
    torch.manual_seed(seed)
    stride, padding, dilation, groups = 1 + seed % 2, seed % 3, 1 + seed // 4, 1 + (seed // 2) % 2
    layer = nn.Conv2d(4, 6, 3, stride=stride, padding=padding, dilation=dilation, groups=groups).double()
    layer.requires_grad_(False)
    graph = prepare(nn.Sequential(layer, nn.Flatten()), (4, 7, 7))
    op, shape = graph.nodes[1].op, graph.nodes[1].shape
    assert isinstance(op, Conv2d)
    basis = torch.eye(4 * 49, dtype=torch.float64).view(-1, 4, 7, 7)
    matrix = (layer(basis) - layer(torch.zeros_like(basis))).flatten(1).T
    columns, rows = torch.ones(1, 4, 7, 7, dtype=torch.float64), torch.ones(1, *shape, dtype=torch.float64)
    spectral = float(torch.linalg.matrix_norm(matrix, 2))
    assert spectral <= float(operator_norm(op, (4, 7, 7), 2.0, columns, rows)) <= spectral * 2.2
    if stride == dilation == 1 and padding == 2:
        assert float(operator_norm(op, (4, 7, 7), 2.0, columns, rows)) <= spectral * 1.1
    largest = float(operator_norm(op, (4, 7, 7), math.inf, columns, rows))
    assert largest == pytest.approx(float(matrix.abs().sum(1).max()))


def test_clever_is_at_least_what_it_sampled() -> None:
    model, shape = network(0)
    x = torch.rand(2, *shape)
    sampled, estimate = (lipschitz(model, x, 0.3, norm=2.0, method=m) for m in ("sampled", "clever"))
    assert (estimate >= sampled * (1 - 1e-9)).all()
    assert set(LIPSCHITZ) == {"sampled", "clever", *BOUNDS}


class Jump(Declared):
    kind = "top-k"

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * (x > 0.5)


def test_refusals() -> None:
    x = torch.rand(1, 1, 2, 2)
    model = nn.Sequential(nn.Flatten(), nn.Linear(4, 3), Jump(), nn.Linear(3, 2))
    with pytest.raises(Unsupported, match="discontinuous"):
        lipschitz(model, x, 0.1, norm=2.0)
    with pytest.raises(UnknownNameError, match="jacobian"):
        lipschitz(nn.Sequential(nn.Flatten(), nn.Linear(4, 2)), x, 0.1, norm=2.0, method="jacobean")
    with pytest.raises(UserError, match="l1"):
        lipschitz(nn.Sequential(nn.Flatten(), nn.Linear(4, 2)), x, 0.1, norm=1.0)
