"""Bounds of convolutional neurons from their own windows: the same as from the whole network, and for less."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import nn

from sparring.bounds._network import prepare
from sparring.bounds._region import region
from sparring.bounds.certify import _crown as crown
from sparring.bounds.certify import _receptive_field as windows
from sparring.bounds.certify._crown import bound_nodes
from sparring.bounds.certify._relaxations import Interval, WindowLines, relax
from sparring.graph import Conv2d, MaxPool
from sparring.models import Normalise, Residual
from sparring.threat import L1, L2, LINF

BODIES = {
    "pooled": [nn.Conv2d(1, 3, 3), nn.MaxPool2d(2), nn.Conv2d(3, 4, 2), nn.MaxPool2d(2)],
    "strided": [nn.Conv2d(1, 3, 3, stride=2), nn.ReLU(), nn.Conv2d(3, 4, (2, 3), stride=(1, 2)), nn.ReLU()],
    "dilated": [nn.Conv2d(1, 4, 2, dilation=2), nn.ReLU(), nn.Conv2d(4, 4, 2, groups=2), nn.ReLU()],
    "overlapping": [nn.Conv2d(1, 3, 2), nn.MaxPool2d(3, stride=2), nn.Conv2d(3, 3, 2), nn.ReLU()],
    "averaged": [nn.Conv2d(1, 3, 3), nn.ReLU(), nn.AvgPool2d(2), nn.BatchNorm2d(3), nn.Conv2d(3, 2, 2), nn.ReLU()],
    "padded": [
        nn.Conv2d(1, 3, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(3, 3, (3, 2), padding=(2, 1), stride=(1, 2)),
        nn.ReLU(),
    ],
    "padded maxima": [
        *(nn.Conv2d(1, 3, 2, padding=1), nn.MaxPool2d(3, 2, 1), nn.BatchNorm2d(3), nn.Conv2d(3, 3, 2, padding=1)),
        nn.ReLU(),
    ],
    "uneven maxima": [
        *(nn.Conv2d(1, 3, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2, ceil_mode=True), nn.Conv2d(3, 3, 3, padding=1)),
        nn.ReLU(),
    ],
    "residual": [
        *(nn.Conv2d(1, 3, 3, padding=1), nn.ReLU()),
        Residual(nn.Sequential(nn.Conv2d(3, 3, 3, padding=1), nn.ReLU(), nn.Conv2d(3, 3, 1)), nn.Conv2d(3, 3, 1)),
        *(nn.ReLU(), nn.Conv2d(3, 2, 2, stride=2), nn.ReLU()),
    ],
    "three deep": [
        *(nn.Conv2d(1, 3, 3), nn.ReLU(), nn.Conv2d(3, 3, 2), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(3, 3, 2)),
        nn.ReLU(),
    ],
}


def network(body: str) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        layers = BODIES[body]
        for layer in layers:
            for inner in layer.modules():
                if isinstance(inner, nn.Conv2d):
                    inner.reset_parameters()
        head = [nn.Flatten(), nn.LazyLinear(6), nn.ReLU(), nn.Linear(6, 3)]
        model = nn.Sequential(Normalise((0.4,), (0.5,)), *layers, *head)
        model.train()(torch.rand(4, 1, 16, 15))  # gives lazy layers their shape, and batch norm its statistics
    return model.eval()


@pytest.mark.parametrize("norm", [LINF, L2, L1])
@pytest.mark.parametrize("body", BODIES)
def test_windows_change_no_bound(body: str, norm: float, monkeypatch: pytest.MonkeyPatch) -> None:
    graph = prepare(network(body), (1, 16, 15))
    x = torch.rand(3, 1, 16, 15, generator=torch.Generator().manual_seed(0))
    reach = region(x, norm, torch.tensor([0.02, 0.1, 0.3], dtype=torch.float64))
    cut: list[bool] = []

    def counted(*arguments: object) -> object:
        found = windows.windows(*arguments)  # type: ignore[arg-type]
        cut.append(found is not None)
        return found

    monkeypatch.setattr(windows, "_WORTH", 1.0)
    # All neurons: those of a known sign are refined or not, as it happens.
    monkeypatch.setattr(crown, "wanted", lambda graph, index, known: torch.ones_like(known.lower, dtype=torch.bool))
    monkeypatch.setattr(crown, "windows", counted)
    found, _ = bound_nodes(graph, reach, backward=True)
    assert any(cut)
    monkeypatch.setattr(crown, "windows", lambda *_: None)
    expected, _ = bound_nodes(graph, reach, backward=True)
    for one, other in zip(found, expected, strict=True):
        assert torch.allclose(one.lower, other.lower, atol=1e-12) and torch.allclose(one.upper, other.upper, atol=1e-12)


@pytest.mark.parametrize("kernel", [(2, 2), (3, 2)])
def test_windows_that_share_nothing_are_pulled_through_as_any_others(kernel: tuple[int, int]) -> None:
    generator = torch.Generator().manual_seed(0)
    op = MaxPool(kernel, kernel, (0, 0), (1, 1), False)
    centre, half = (torch.rand(2, 3, 6, 4, generator=generator, dtype=torch.float64) for _ in range(2))
    tiled = relax(op, Interval(centre - half, centre + half))
    assert isinstance(tiled, WindowLines) and tiled.tile == kernel
    any_ = dataclasses.replace(tiled, tile=None)
    a = torch.randn(2, 5, 3, 6 // kernel[0], 4 // kernel[1], generator=generator, dtype=torch.float64)
    slopes = []
    for lines in (tiled, any_):
        point = a.clone().requires_grad_()
        (pulled,), shift = lines.pull(point, None)
        (slope,) = torch.autograd.grad((pulled.sin().flatten(2).sum(2) + shift).sum(), point)  # as alpha-CROWN does
        slopes.append((pulled.detach(), shift.detach(), slope))
    assert all(torch.allclose(one, other, atol=1e-14) for one, other in zip(*slopes, strict=True))


def test_lenet_5_is_cut_to_a_quarter_of_its_image() -> None:
    layers = [nn.Conv2d(1, 20, 5), nn.MaxPool2d(2), nn.Conv2d(20, 50, 5), nn.MaxPool2d(2), nn.Flatten()]
    graph = prepare(nn.Sequential(*layers, nn.Linear(800, 10)), (1, 28, 28))
    seen = windows.windows(graph, 3)
    assert seen is not None and seen.places == (8, 8) and not seen.padded
    assert [seen.windows[i].size for i in range(4)] == [(14, 14), (10, 10), (5, 5), (1, 1)]
    assert [seen.windows[i].stride for i in range(4)] == [(2, 2), (2, 2), (1, 1), (1, 1)]


@pytest.mark.parametrize(
    "layers",
    [
        [nn.Conv2d(1, 3, 14), nn.ReLU(), nn.Conv2d(3, 3, 2), nn.ReLU()],
        [nn.Conv2d(1, 3, 14, padding=1), nn.ReLU(), nn.Conv2d(3, 3, 4), nn.ReLU()],
    ],
    ids=["sees nearly all", "and padding"],
)
def test_what_cannot_be_cut_or_gains_nothing_is_left_whole(layers: list[nn.Module]) -> None:
    model = nn.Sequential(*layers, nn.Flatten(), nn.LazyLinear(2))
    model(torch.zeros(1, 1, 16, 16))
    graph = prepare(model, (1, 16, 16))
    last = next(i for i, node in enumerate(graph.nodes) if len(node.shape) == 1)
    assert windows.windows(graph, last - 2) is None
    assert windows.windows(graph, last) is None


@pytest.mark.parametrize(("body", "last"), [("padded", "ReLU"), ("uneven maxima", "ReLU"), ("three deep", "ReLU")])
def test_the_first_layers_end_before_units_that_reach_several_outputs(body: str, last: str) -> None:
    graph = prepare(network(body), (1, 16, 15))
    index = windows.stem_of(graph)
    assert type(graph.nodes[index].op).__name__ == last
    assert sum(isinstance(node.op, Conv2d) for node in graph.nodes[: index + 1]) == 1
