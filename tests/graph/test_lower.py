from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sparring.declared import Declared
from sparring.errors import Unsupported, UserError
from sparring.graph import AvgPool, Input, SparseActivation, lower
from sparring.models import MODELS, build

SHAPES = {"resnet-32": (3, 16, 16), "vgg-like": (3, 16, 16)}


def _randomise_statistics_(model: nn.Module) -> None:
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            assert module.running_mean is not None and module.running_var is not None
            module.running_mean.normal_()
            module.running_var.uniform_(0.5, 2)


@pytest.mark.parametrize("name", sorted(MODELS))
def test_graph_computes_what_the_model_computes(name: str) -> None:
    shape = SHAPES.get(name, (1, 28, 28))
    width = 0.25 if name in SHAPES else None
    model = build(name, shape=shape, classes=7, mean=(0.4,) * shape[0], std=(0.3,) * shape[0], width=width)
    torch.manual_seed(0)
    _randomise_statistics_(model)
    graph = lower(model, shape)
    x = torch.rand(3, *shape)
    model.eval()
    with torch.no_grad():
        assert torch.allclose(graph(x), model(x), atol=1e-4)
    assert isinstance(graph.nodes[0].op, Input)
    assert graph.nodes[-1].shape == (7,)


class Functional(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(2, 4, 3, padding=1)
        self.fc = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.conv(2 * x - 1)) / 2
        x = F.max_pool2d(x, 2) + F.max_pool2d(torch.relu(x), 2)
        return self.fc(F.dropout(x.mean(dim=(2, 3)).view(x.size(0), -1), 0.5, self.training))


def test_functional_style_is_understood() -> None:
    model = Functional().eval()
    graph = lower(model, (2, 8, 8))
    x = torch.rand(5, 2, 8, 8)
    assert torch.allclose(graph(x), model(x), atol=1e-6)
    assert any(isinstance(node.op, AvgPool) for node in graph.nodes)


def test_average_pools_and_mode_is_restored() -> None:
    model = nn.Sequential(nn.AdaptiveAvgPool2d(2), nn.AvgPool2d(2), nn.Flatten(), nn.Linear(3, 2)).train()
    graph = lower(model, (3, 8, 8))
    assert model.training
    x = torch.rand(2, 3, 8, 8)
    assert torch.allclose(graph(x), model(x), atol=1e-6)


def test_activation_modules_stay_whole() -> None:
    class Half(Declared):
        def forward(self, x: Tensor) -> Tensor:
            return x * (x > 0.5)

    model = nn.Sequential(nn.Flatten(), nn.Linear(4, 4), Half(), nn.Linear(4, 2))
    graph = lower(model, (1, 2, 2))
    assert [node.op.name for node in graph.nodes if isinstance(node.op, SparseActivation)] == ["2"]


class Branching(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.flatten(1) if x.sum() > 0 else -x.flatten(1)


class Staircase(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.floor(4 * x.flatten(1))


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (Staircase(), r"'floor' .* has no rule: it jumps, so it has no finite Lipschitz constant"),
        (Branching(), "branches on a value"),
    ],
)
def test_what_has_no_rule_is_named(model: nn.Module, message: str) -> None:
    with pytest.raises(Unsupported, match=message):
        lower(model, (1, 8, 8))


def test_wrong_shape_is_a_user_error() -> None:
    with pytest.raises(UserError, match=r"does not accept images .*cannot be multiplied"):
        lower(nn.Sequential(nn.Flatten(), nn.Linear(4, 2)), (1, 3, 3))
