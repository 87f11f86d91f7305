from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn

from sparring.attacks import deepfool, run
from sparring.attacks._gradients import Probe
from sparring.attacks.algorithms._linearise import nearest_boundary, pull_back
from sparring.attacks.algorithms._losses import margin_loss
from sparring.attacks.fastpath._gram_matrix import find_stem
from sparring.attacks.fastpath._mlp import read_dense
from sparring.threat import L2, LINF, Threat, distance


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
    full, short = (nearest_boundary(probe, images, y, norm=L2, stem=choice) for choice in (None, stem))
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
            net[1].weight.copy_(torch.randn(300, 784, generator=draws) * kept)
        x = torch.rand(30, 1, 28, 28, generator=draws)
        y = net(x).argmax(1)
        probe = Probe(net, hand=read_dense(net, x))
        stem = find_stem(probe)
        assert stem is not None
        full, short = (nearest_boundary(probe, x, y, norm=L2, stem=choice) for choice in (None, stem))
        torch.testing.assert_close(short.distance, full.distance, rtol=1e-4, atol=1e-6)


def test_the_stem_leaves_an_image_without_gradient_where_it_is(images: Tensor) -> None:
    """Channel pruning leaves so few units that all of them can be silent at an image."""
    net = narrow_net(3)
    with torch.no_grad():
        net[2].bias[:] = -100
    probe = Probe(net, hand=read_dense(net, images))
    boundary = nearest_boundary(probe, images, net(images).argmax(1), norm=L2, stem=find_stem(probe))
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
