"""Small networks with exact distances: by looking along every direction, or by mixed-integer programs."""

from __future__ import annotations

import math
from functools import lru_cache, partial

import pytest
import torch
from torch import Tensor, nn

from sparring.attacks import Attack, cw, ddn, deepfool, fab, fast, hopskipjump, nearest, run
from sparring.bounds import exact as exact_distances
from sparring.threat import L2, LINF, Threat, distance


def wavy_net(seed: int) -> nn.Sequential:
    torch.manual_seed(seed)
    net = nn.Sequential(nn.Flatten(), nn.Linear(2, 12), nn.ReLU(), nn.Linear(12, 8), nn.ReLU(), nn.Linear(8, 3))
    with torch.no_grad():
        net.get_parameter("1.weight").mul_(6)
        net.get_parameter("1.bias").copy_(-(net.get_parameter("1.weight") @ torch.rand(2, 12)).diagonal())
        net.get_parameter("3.weight").mul_(2)
    return net.eval()


def distance_by_rays(net: nn.Module, x: Tensor, label: Tensor, norm: float) -> float:
    """Return the least distance to another class over 360 directions and 1000 radii inside the box."""
    angle = torch.arange(360) * (2 * math.pi / 360)
    direction = torch.stack([angle.cos(), angle.sin()], 1)
    direction = direction / distance(direction, norm).unsqueeze(1)
    radius = torch.linspace(0, 1.5, 1001)[1:]
    points = x.flatten() + radius.view(-1, 1, 1) * direction
    inside = ((points >= 0) & (points <= 1)).all(2)
    with torch.no_grad():
        other = net(points.view(-1, 2)).argmax(1).view(len(radius), -1) != label
    hits = (other & inside).any(1)
    return float(radius[hits.nonzero()[0, 0]]) if bool(hits.any()) else math.inf


ATTACKS = [
    (nearest, L2),
    (nearest, LINF),
    (fab, L2),
    (fab, LINF),
    (ddn, L2),
    (deepfool, L2),
    (partial(cw, steps=200, searches=4), L2),
]


@lru_cache
def problem(seed: int, norm: float) -> tuple[nn.Sequential, Tensor, Tensor, Tensor]:
    """Return a network, images, its own labels and the exact distances."""
    net = wavy_net(seed)
    x = torch.rand(8, 2, generator=torch.Generator().manual_seed(seed))
    y = net(x).argmax(1)
    exact = [distance_by_rays(net, image, label, norm) for image, label in zip(x, y, strict=True)]
    return net, x, y, torch.tensor(exact)


@pytest.mark.parametrize(("attack", "norm"), ATTACKS)
def test_no_attack_undercuts_the_exact_distance(attack: Attack, norm: float) -> None:
    ratios = []
    for seed in range(3):
        net, x, y, exact = problem(seed, norm)
        found = run(net, x, y, attack, Threat(norm)).distance
        # One step of the radius grid, and what a direction between two rays can gain.
        assert bool(((found >= exact * 0.998 - 0.0015) | torch.isinf(exact)).all())
        ratios += (found / exact)[torch.isfinite(exact)].tolist()
    if attack is nearest:
        assert torch.tensor(ratios).median() <= 1.05


@lru_cache
def solved(norm: float) -> tuple[nn.Sequential, Tensor, Tensor, Tensor]:
    """Return a network of 16 pixels, images, its own labels and bounds on their exact distances, by search."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Flatten(), nn.Linear(16, 10), nn.ReLU(), nn.Linear(10, 6), nn.ReLU(), nn.Linear(6, 4)).eval()
    with torch.no_grad():
        for layer in (1, 3, 5):
            net.get_parameter(f"{layer}.weight").mul_(2)
    x = torch.rand(4, 1, 4, 4, generator=torch.Generator().manual_seed(0))
    y = net(x).argmax(1)
    start = run(net, x, y, nearest, Threat(norm)).x_adv
    found = exact_distances(net, x, y, norm, x_adv=start, seconds=20)
    assert set(found.status) == {"exact"}
    return net, x, y, torch.stack([found.lower, found.upper])


@pytest.mark.parametrize(
    ("attack", "norm"),
    [
        *((attack, norm) for attack in (nearest, fab, deepfool, fast, hopskipjump) for norm in (LINF, L2)),
        (ddn, L2),
        (partial(cw, steps=200, searches=4, start_constant=1.0), L2),
    ],
)
def test_no_attack_undercuts_a_proven_distance(attack: Attack, norm: float) -> None:
    net, x, y, (lower, upper) = solved(norm)
    found = run(net, x, y, attack, Threat(norm), generator=torch.Generator().manual_seed(0)).distance
    assert torch.isfinite(found).all()
    assert bool((found >= lower * (1 - 1e-6)).all())
    if attack is nearest:
        assert float((found / upper).median()) <= 1.05
