"""A pass gives an equal graph: fewer operations and units, the same logits."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn

from sparring.graph import Affine, Graph, Linear, drop_dead_units, fold_affine, lower
from sparring.models import Normalise


def batch_norm(kind: type[nn.BatchNorm1d | nn.BatchNorm2d], features: int) -> nn.Module:
    layer = kind(features)
    for values in (layer.running_mean, layer.running_var, layer.weight.data, layer.bias.data):
        assert values is not None
        values.uniform_(0.5, 1.5)
    return layer


NETWORKS: dict[str, tuple[int, Callable[[], list[nn.Module]]]] = {
    # How many Affines stay, and the layers behind the normalisation (of two Affines) of images of two channels.
    "linear": (0, lambda: [nn.Flatten(), nn.Linear(72, 9, bias=False), batch_norm(nn.BatchNorm1d, 9), nn.ReLU()]),
    "convolved": (0, lambda: [nn.Conv2d(2, 9, 6), batch_norm(nn.BatchNorm2d, 9), nn.ReLU(), nn.Flatten()]),
    "behind ReLU": (0, lambda: [nn.Conv2d(2, 9, 6), nn.ReLU(), batch_norm(nn.BatchNorm2d, 9), nn.Flatten()]),
    "padded": (1, lambda: [nn.Conv2d(2, 9, 3, padding=1), nn.ReLU(), nn.MaxPool2d(6), nn.Flatten()]),
    "grouped": (2, lambda: [nn.Conv2d(2, 2, 3, groups=2), nn.Conv2d(2, 9, 4), nn.ReLU(), nn.Flatten()]),
    "not a layer": (2, lambda: [nn.AvgPool2d(2), nn.ReLU(), nn.Flatten(), nn.Linear(18, 9)]),
}


def lowered(name: str) -> tuple[Graph, torch.Tensor]:
    torch.manual_seed(0)
    layers = [Normalise((0.3, 0.6), (0.4, 0.2)), *NETWORKS[name][1](), nn.Linear(9, 4)]
    for layer in layers:
        if isinstance(layer, nn.Linear | nn.Conv2d):
            layer.weight.data *= torch.rand_like(layer.weight) < 0.2
            layer.weight.data[:: 1 + len(layer.weight) // 2] = 0
    return lower(nn.Sequential(*layers).eval(), (2, 6, 6), dtype=torch.float64), torch.rand(5, 2, 6, 6).double()


@pytest.mark.parametrize("name", NETWORKS)
def test_logits_stay(name: str) -> None:
    graph, x = lowered(name)
    folded = fold_affine(graph)
    torch.testing.assert_close(folded(x), graph(x))
    torch.testing.assert_close(drop_dead_units(folded)(x), graph(x))
    assert sum(isinstance(node.op, Affine) for node in folded.nodes) == NETWORKS[name][0]


@pytest.mark.parametrize("name", NETWORKS)
def test_shapes_are_those_of_the_values(name: str) -> None:
    graph, x = lowered(name)
    smaller = drop_dead_units(fold_affine(graph))
    assert [tuple(value.shape[1:]) for value in smaller.values(x)] == [node.shape for node in smaller.nodes]


@pytest.mark.parametrize("name", ["linear", "convolved", "behind ReLU", "padded"])
def test_dead_units_go_and_those_at_their_end_too(name: str) -> None:
    smaller = drop_dead_units(fold_affine(lowered(name)[0]))
    last = smaller.nodes[-1].op
    assert isinstance(last, Linear) and last.weight.shape[1] < 9 and bool((last.weight != 0).any(0).all())


def test_the_model_keeps_its_parameters() -> None:
    model = nn.Sequential(Normalise((0.3,), (0.4,)), nn.Flatten(), nn.Linear(4, 3))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    drop_dead_units(fold_affine(lower(model, (1, 2, 2))))
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
