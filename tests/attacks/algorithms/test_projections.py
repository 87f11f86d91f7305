"""The geometry of budgets: the nearest point of box and ball, and the best one along a gradient."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn

from sparring.attacks import deepfool, run
from sparring.attacks._gradients import Probe
from sparring.attacks.algorithms._losses import margin_loss
from sparring.attacks.algorithms._projections import (
    FeasibleSet,
    boundary_step,
    climb,
    corner_step,
    hold,
    inside,
    nearest_boundary,
    pull_back,
)
from sparring.attacks.fastpath._gram_matrix import find_stem
from sparring.attacks.fastpath._mlp import read_dense
from sparring.threat import L1, L2, LINF, Threat, distance


def problem(seed: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.rand(20, 1, 6, 6, generator=generator)
    return torch.where(x < 0.3, 0.0, x), torch.randn(x.shape, generator=generator)


def nearest_by_bisection(x: Tensor, step: Tensor, eps: float) -> Tensor:
    """Return the nearest point of box and l_1 ball in float64: soft thresholds, cut off at the box."""
    base, delta = x.double().flatten(1), step.double().flatten(1)
    room = torch.where(delta > 0, 1 - base, base)
    low, high = torch.zeros(len(x), 1).double(), torch.full((len(x), 1), 10.0).double()
    for _ in range(60):
        level = (low + high) / 2
        moved = torch.minimum((delta.abs() - level).clamp_min(0), room)
        out = moved.sum(1, keepdim=True) > eps
        low, high = torch.where(out, level, low), torch.where(out, high, level)
    return (base + moved * delta.sign()).view(x.shape)


@pytest.mark.parametrize("eps", [0.01, 1.0, 4.0])
def test_the_l1_projection_is_the_nearest_point_of_ball_and_box(eps: float) -> None:
    x, step = problem(0)
    point = inside(x, x + step, L1, eps)
    # float32 against float64: 2.2e-6 apart where products are not fused
    torch.testing.assert_close(point.double(), nearest_by_bisection(x, step, eps), rtol=0, atol=1e-5)
    assert float(distance(point - x, L1).max()) <= eps * (1 + 1e-6)


def test_points_already_inside_stay_where_they_are() -> None:
    x, step = problem(1)
    near = (x + 0.01 * step).clamp(0, 1)
    for norm in (L1, L2, LINF):
        torch.testing.assert_close(inside(x, near, norm, 2.0), near, rtol=0, atol=1e-7)


@pytest.mark.parametrize(("norm", "eps"), [(LINF, 0.2), (L2, 1.0), (L1, 3.0)])
def test_no_point_of_the_region_gains_more_than_one_long_step(norm: float, eps: float) -> None:
    x, gradient = problem(2)
    region = FeasibleSet.around(x, norm, eps)
    best = region.ahead(x.clone(), gradient, eps)
    gain = ((best - x) * gradient).flatten(1).sum(1)
    generator = torch.Generator().manual_seed(3)
    for length in (0.1, 1.0, 3.0):
        other = inside(x, x + length * (gradient + torch.randn(x.shape, generator=generator)), norm, eps)
        assert bool((((other - x) * gradient).flatten(1).sum(1) <= gain + 1e-5).all())
    assert float(distance(best - x, norm).max()) <= eps * (1 + 1e-6)
    onward = region.ahead(best.clone(), gradient, 0.1 * eps)
    assert bool((((onward - x) * gradient).flatten(1).sum(1) >= 0.99 * gain).all()), "the best point is left"


def test_an_l1_step_uses_its_length_up_inside_the_box() -> None:
    x, gradient = problem(4)
    point = climb(x, gradient, L1, torch.full((20,), 2.5))
    torch.testing.assert_close(distance(point - x, L1), torch.full((20,), 2.5))
    assert float(point.min()) >= 0 and float(point.max()) <= 1 + 1e-6


def test_only_what_the_box_stops_is_held() -> None:
    x, gradient = problem(3)
    x[0, 0, 0, 0], x[0, 0, 0, 1] = 1.0, 1.0
    gradient[0, 0, 0, :2] = torch.tensor([1.0, -1.0])
    stopped = ((x <= 0) & (gradient < 0)) | ((x >= 1) & (gradient > 0))
    assert 0 < int(stopped.sum()) < x.numel() // 2
    assert torch.equal(hold(gradient, x), torch.where(stopped, 0.0, gradient))


@pytest.mark.parametrize("norm", [L1, L2, LINF])
def test_a_boundary_step_gains_what_is_wanted_or_all_the_box_allows(norm: float) -> None:
    x, gradient = problem(4)
    gradient[:, :, 0] = 0.0
    most = torch.where(gradient > 0, 1 - x, -x).mul(gradient).flatten(1).sum(1)
    for share, gained in ((0.3, 0.3), (1.5, 1.0)):
        step = boundary_step(x, gradient, share * most, norm)
        torch.testing.assert_close((step * gradient).flatten(1).sum(1), gained * most, rtol=1e-5, atol=0)
        assert float((x + step).min()) >= -1e-6 and float((x + step).max()) <= 1 + 1e-6
        assert bool((step[:, :, 0] == 0).all())


def test_a_corner_step_is_the_shortest_that_gains_enough_of_each() -> None:
    draws = torch.Generator().manual_seed(5)
    x, gradients = torch.full((20, 1, 6, 6), 0.5), torch.randn(20, 3, 1, 6, 6, generator=draws)
    gains = 0.1 * torch.rand(20, 3, generator=draws)
    step = corner_step(x, x, gradients, gains).flatten(1)
    flat = gradients.flatten(2)
    reached = (flat * step.unsqueeze(1)).sum(2)
    assert bool((reached >= gains - 1e-4).all())
    # The conditions of Karush, Kuhn and Tucker: a sum of gradients, none negative, only of those that gain no more.
    times = torch.linalg.lstsq(flat.transpose(1, 2), step.unsqueeze(2)).solution.squeeze(2)
    torch.testing.assert_close((times.unsqueeze(2) * flat).sum(1), step, rtol=0, atol=1e-5)
    assert float(times.min()) >= -1e-5
    assert bool(((times.abs() < 1e-5) | ((reached - gains).abs() < 1e-4)).all())
    assert int((times.abs() < 1e-5).sum()) > 0


class Shift(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return (x - 0.1) / 0.3


def narrow_net(seed: int) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(
        Shift(), nn.Flatten(), nn.Linear(64, 48), nn.ReLU(), nn.Linear(48, 20), nn.ReLU(), nn.Linear(20, 10)
    ).eval()


@pytest.mark.parametrize("seed", range(5))
def test_the_stem_finds_the_same_boundary(seed: int, images: Tensor) -> None:
    net = narrow_net(seed)
    y = net(images).argmax(1)
    probe = Probe(net, hand=read_dense(net, images))
    stem = find_stem(probe)
    assert stem is not None
    full, short = (nearest_boundary(probe, images, y, norm=L2, seen=seen) for seen in (None, stem.look(images)))
    for expected, found in zip(full, short, strict=True):
        assert torch.allclose(expected, found, rtol=1e-4, atol=1e-6)


@pytest.fixture
def one_thread() -> Iterator[None]:
    """Compute as a study's task does."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.usefixtures("one_thread")
def test_the_stem_of_a_sparse_network_finds_the_same_boundary() -> None:
    """Of such first layers the eigenvectors in single precision are lost for about one in five."""
    for seed in range(20):
        draws = torch.Generator().manual_seed(seed)
        net = nn.Sequential(nn.Flatten(), nn.Linear(784, 300), nn.ReLU(), nn.Linear(300, 10)).eval()
        kept = (torch.rand(300, 784, generator=draws) < 0.01) & (torch.rand(300, 1, generator=draws) < 0.4)
        with torch.no_grad():
            net.get_parameter("1.weight").copy_(torch.randn(300, 784, generator=draws) * kept)
        x = torch.rand(30, 1, 28, 28, generator=draws)
        y = net(x).argmax(1)
        probe = Probe(net, hand=read_dense(net, x))
        stem = find_stem(probe)
        assert stem is not None
        full, short = (nearest_boundary(probe, x, y, norm=L2, seen=seen) for seen in (None, stem.look(x)))
        torch.testing.assert_close(short.distance, full.distance, rtol=1e-4, atol=1e-6)


def test_the_stem_leaves_an_image_without_gradient_where_it_is(images: Tensor) -> None:
    """Channel pruning leaves so few units that all of them can be silent at an image."""
    net = narrow_net(3)
    with torch.no_grad():
        net.get_parameter("2.bias")[:] = -100
    probe = Probe(net, hand=read_dense(net, images))
    stem = find_stem(probe)
    assert stem is not None
    boundary = nearest_boundary(probe, images, net(images).argmax(1), norm=L2, seen=stem.look(images))
    assert torch.isfinite(boundary.distance).all() and not boundary.gradient.any()
    result = run(net, images, net(images).argmax(1), deepfool, Threat(L2))
    assert torch.isfinite(result.x_adv).all() and torch.isinf(result.distance).all()


def test_a_second_way_for_the_input_is_noticed(images: Tensor) -> None:
    class Bypass(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = narrow_net(0)

        def forward(self, x: Tensor) -> Tensor:
            return self.net(x) + x.flatten(1)[:, :10]

    net = Bypass().eval()
    assert find_stem(Probe(net, hand=read_dense(net, images))) is None


def test_networks_without_a_narrow_linear_first_layer_have_no_stem(images: Tensor) -> None:
    for layers in (
        (nn.Conv2d(1, 2, 3), nn.Flatten(), nn.Linear(72, 3)),
        (nn.Flatten(), nn.Linear(64, 64)),
        (nn.Flatten(), nn.Linear(64, 1)),
    ):
        net = nn.Sequential(*layers).eval()
        assert find_stem(Probe(net, hand=read_dense(net, images))) is None


@pytest.mark.parametrize("norm", [L2, LINF])
def test_the_nearest_boundary_is_the_smallest_of_all_classes(norm: float, images: Tensor) -> None:
    net = narrow_net(1)
    y = net(images).argmax(1)
    boundary = nearest_boundary(net, images, y, norm=norm)
    for offset in range(1, 10):
        single = nearest_boundary(net, images, y, norm=norm, aims=(y + offset) % 10)
        assert bool((boundary.distance <= single.distance * (1 + 1e-5)).all())


def test_pull_back_stays_adversarial_and_comes_nearer(images: Tensor) -> None:
    net = narrow_net(2)
    y = net(images).argmax(1)
    far = torch.rand(images.shape, generator=torch.Generator().manual_seed(4))
    won = margin_loss(net(far), y) > 0
    x, far, y = images[won], far[won], y[won]
    near = pull_back(net, x, far, y, rounds=12)
    assert len(x) > 0
    assert bool((margin_loss(net(near), y) > 0).all())
    assert bool((distance(near - x, L2) <= distance(far - x, L2) + 1e-6).all())
