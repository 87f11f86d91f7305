from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from scipy.optimize import LinearConstraint, linprog, minimize
from torch import nn

from sparring.bounds import Exact, exact, lipschitz, radius
from sparring.bounds.exact_distances import _exact
from sparring.errors import Unsupported, UserError
from sparring.threat import distance

from ..random_networks import hostile_points, network


def tiny(seed: int) -> tuple[nn.Sequential, torch.Tensor, torch.Tensor]:
    """A network of three inputs and 3 + 2 hidden units, and an image it has no doubt about."""
    torch.manual_seed(seed)
    return doubled(nn.Flatten(), nn.Linear(3, 3), nn.ReLU(), nn.Linear(3, 2), nn.ReLU(), nn.Linear(2, 3))


def pooled(seed: int) -> tuple[nn.Sequential, torch.Tensor, torch.Tensor]:
    """A network of three inputs that takes two maxima of three units each, and an image."""
    torch.manual_seed(seed)
    convolution = nn.Conv2d(1, 2, (1, 2), padding=(0, 1))
    return doubled(convolution, nn.ReLU(), nn.MaxPool2d((1, 3), 1), nn.Flatten(), nn.Linear(4, 3))


def doubled(*layers: nn.Module) -> tuple[nn.Sequential, torch.Tensor, torch.Tensor]:
    """A network with twice the parameters of these layers, an image of three inputs, and the class it is given."""
    model = nn.Sequential(*layers)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(2)
    x = torch.rand(1, 1, 1, 3)
    return model, x, model(x).argmax(1)


def brute_force_of_maxima(model: nn.Sequential, x: torch.Tensor, y: int, norm: float) -> float:
    """Minimise the distance over the largest entry of every window, which may be 0, and every class."""
    with torch.no_grad():
        zero = model[0](torch.zeros(1, 1, 1, 3)).double()
        matrix = torch.cat([model[0](v.view(1, 1, 1, 3)).double() - zero for v in torch.eye(3)])  # (3, 2, 1, 4)
    a, b = matrix[:, :, 0].permute(1, 2, 0).numpy(), zero[0, :, 0].numpy()
    windows = [np.append(a[c, i : i + 3], np.zeros((1, 3)), 0) for c in range(2) for i in range(2)]
    shifts = [np.append(b[c, i : i + 3], 0.0) for c in range(2) for i in range(2)]
    weight, bias = (p.detach().double().numpy() for p in model[4].parameters())
    best = math.inf
    for largest in itertools.product(range(4), repeat=4):
        rows = [v - v[k] for v, k in zip(windows, largest, strict=True)]
        limits = [s[k] - s for s, k in zip(shifts, largest, strict=True)]
        slope = weight @ np.stack([v[k] for v, k in zip(windows, largest, strict=True)])
        constant = weight @ np.array([s[k] for s, k in zip(shifts, largest, strict=True)]) + bias
        for k in {0, 1, 2} - {y}:
            above = np.vstack([*rows, slope[y] - slope[k]])
            below = np.concatenate([*limits, [constant[k] - constant[y]]])
            best = min(best, _smallest(above, below, x.double().flatten().numpy(), norm))
    return best


def brute_force(model: nn.Module, x: torch.Tensor, y: int, norm: float) -> float:
    """Minimise the distance over every activation pattern and every class: one small convex program each."""
    linears = [
        (m.weight.detach().double().numpy(), m.bias.detach().double().numpy())
        for m in model.modules()
        if isinstance(m, nn.Linear)
    ]
    origin = x.double().flatten().numpy()
    best = math.inf
    for pattern in itertools.product((0, 1), repeat=5):
        matrix, constant = np.eye(3), np.zeros(3)
        rows, limits = [], []
        for (weight, bias), signs in zip(linears, (pattern[:3], pattern[3:]), strict=False):
            matrix, constant = weight @ matrix, weight @ constant + bias
            sign = 2 * np.array(signs) - 1
            rows.append(-sign[:, None] * matrix)
            limits.append(sign * constant)
            matrix, constant = matrix * np.array(signs)[:, None], constant * np.array(signs)
        matrix, constant = linears[2][0] @ matrix, linears[2][0] @ constant + linears[2][1]
        for k in {0, 1, 2} - {y}:
            a = np.vstack([*rows, matrix[y] - matrix[k]])
            b = np.concatenate([*limits, [constant[k] - constant[y]]])
            best = min(best, _smallest(a, b, origin, norm))
    return best


def _smallest(a: np.ndarray, b: np.ndarray, origin: np.ndarray, norm: float) -> float:
    eye, one = np.eye(3), np.ones((3, 1))
    rows = np.vstack([np.hstack([a, np.zeros((len(a), 1))]), np.hstack([eye, -one]), np.hstack([-eye, -one])])
    limits = np.concatenate([b, origin, -origin])
    found = linprog([0, 0, 0, 1], A_ub=rows, b_ub=limits, bounds=[(0, 1)] * 3 + [(0, None)])
    if found.status != 0:
        return math.inf
    if norm == math.inf:
        return float(found.fun)
    result = minimize(
        lambda v: ((v - origin) ** 2).sum(),
        found.x[:3],
        jac=lambda v: 2 * (v - origin),
        bounds=[(0, 1)] * 3,
        constraints=LinearConstraint(a, -np.inf, b),
        method="SLSQP",
        options={"ftol": 1e-14, "maxiter": 500},
    )
    return float(np.sqrt(result.fun)) if (a @ result.x <= b + 1e-8).all() else math.inf


@pytest.mark.parametrize("norm", [math.inf, 2.0])
@pytest.mark.parametrize("seed", range(12))
def test_the_distance_equals_brute_force_over_activation_patterns(seed: int, norm: float) -> None:
    model, x, y = tiny(seed)
    _agrees(exact(model, x, y, norm), brute_force(model, x, int(y), norm))


@pytest.mark.parametrize("by_program", [0.0, 0.4])
@pytest.mark.parametrize(("seed", "norm"), [(0, math.inf), (1, math.inf), (1, 2.0)])
def test_the_distance_equals_brute_force_over_the_largest_entries_of_windows(
    seed: int, norm: float, by_program: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_exact, "_BY_PROGRAM", by_program)
    model, x, y = pooled(seed)
    _agrees(exact(model, x, y, norm), brute_force_of_maxima(model, x, int(y), norm))


def test_programs_solve_a_small_network_that_pools() -> None:
    """Here the search alone reaches its limit."""
    torch.manual_seed(2)
    pool = nn.MaxPool2d(2)
    layers = [nn.Conv2d(1, 2, 3, padding=1), nn.ReLU(), pool, nn.Conv2d(2, 3, 2), pool, nn.Flatten(), nn.LazyLinear(3)]
    model, x = nn.Sequential(*layers).eval(), torch.rand(1, 1, 8, 8)
    assert exact(model, x, model(x).argmax(1), math.inf).status == ("exact",)


def _agrees(found: Exact, expected: float) -> None:
    assert found.status == ("exact",)
    if math.isinf(expected):
        assert found.lower.item() == found.upper.item() == math.inf
    else:
        assert found.lower.item() <= expected * (1 + 1e-6) and found.upper.item() >= expected * (1 - 1e-6)
        assert found.upper.item() - found.lower.item() <= 1e-3


@pytest.mark.parametrize(("seed", "norm"), [*((seed, math.inf) for seed in range(7)), (3, 2.0), (10, 2.0)])
def test_certified_at_most_exact_at_most_attacked_on_every_layer_kind(seed: int, norm: float) -> None:
    model, shape = network(seed)
    generator = torch.Generator().manual_seed(seed)
    x = torch.rand(1, *shape, generator=generator)
    y = model(x).argmax(1)
    adversarial = _attacked(model, x, int(y), norm, generator)
    found = exact(model, x, y, norm, x_adv=adversarial, seconds=1.0)  # the order holds whenever it stops
    attacked = torch.where(model(adversarial).argmax(1) != y, distance(adversarial.double() - x, norm), math.inf)
    certified = radius(model, x, y, norm)
    assert (certified <= found.lower + 1e-4).all() and (found.lower <= found.upper).all()
    assert (found.upper <= attacked).all()
    reached = found.upper.isfinite()
    assert (model(found.x_adv).argmax(1) != y)[reached].all()
    torch.testing.assert_close(distance(found.x_adv.double() - x, norm)[reached], found.upper[reached])


def _attacked(model: nn.Module, x: torch.Tensor, y: int, norm: float, generator: torch.Generator) -> torch.Tensor:
    for eps in (0.02, 0.05, 0.1, 0.2, 0.5, 1.0):
        points = hostile_points(model, x.double(), y, norm, eps, points=50, generator=generator).float()
        wrong = model(points).argmax(1) != y
        if wrong.any():
            return points[wrong][:1]
    return x


def test_a_wrong_image_is_at_distance_zero_and_modes_stay() -> None:
    model, x, y = tiny(0)
    model.train()
    found = exact(model, x, (y + 1) % 3, math.inf)
    assert found.status == ("wrong",) and found.lower.item() == found.upper.item() == 0
    assert model.training


def test_no_time_leaves_an_honest_interval() -> None:
    model, x, y = tiny(1)
    expected = brute_force(model, x, int(y), math.inf)
    found = exact(model, x, y, math.inf, seconds=0.0)
    assert found.lower.item() <= expected * (1 + 1e-6) and found.upper.item() >= expected * (1 - 1e-6)


def test_other_norms_are_refused() -> None:
    model, x, y = tiny(0)
    with pytest.raises(UserError, match="l1"):
        exact(model, x, y, 1.0)


@pytest.mark.parametrize("name", ["gelu", "sigmoid"])
def test_curves_are_refused_by_name_and_certified(name: str) -> None:
    act = {"gelu": nn.GELU(), "sigmoid": nn.Sigmoid()}[name]
    model, x = nn.Sequential(nn.Flatten(), nn.Linear(4, 3), act, nn.Linear(3, 2)).eval(), torch.rand(1, 1, 2, 2)
    y = model(x).argmax(1)
    with pytest.raises(Unsupported, match=f"'{name}' .*not piecewise linear; certificates support it"):
        exact(model, x, y, math.inf)
    with pytest.raises(Unsupported, match=f"'{name}' .*not piecewise linear"):
        lipschitz(model, x, 0.1, norm=math.inf, method="jacobian")
    assert radius(model, x, y, math.inf).item() > 0
