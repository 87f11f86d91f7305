from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from sparring.deploy._compile import compile_model
from sparring.deploy.kernels import _engine as engine
from sparring.deploy.kernels import _plan as planning
from sparring.deploy.kernels._abi import Layout, Tiling
from sparring.deploy.kernels._dense import is_full
from sparring.deploy.kernels._engine import Engine
from sparring.deploy.kernels._fusion import FusedLayer, tasks_of
from sparring.deploy.kernels._native import host_lanes


class Blocks(nn.Module):
    """Dense convolutions of all kinds: strided, dilated, pooled, capped, with residuals and rows without weights."""

    def __init__(self, side: int, width: int = 20) -> None:
        super().__init__()
        first, bias = nn.Conv2d(3, width, 7, 2, 3), torch.rand(width)
        self.stem = nn.Sequential(first, nn.ReLU6())
        self.inner = nn.Sequential(nn.Conv2d(width, width, 3, padding=1), nn.ReLU())
        self.outer = nn.Conv2d(width, width, 3, padding=2, dilation=2)
        self.last = nn.Sequential(nn.Conv2d(width, 37, 3, 2, 1), nn.MaxPool2d(2), nn.ReLU(), nn.Flatten())
        with torch.no_grad():
            left = self.last(self.outer(self.inner(self.stem(torch.zeros(1, 3, side, side)))))
            first.weight *= 20  # the cap takes effect
            self.outer.weight[3:11] = 0
            bias[4] = 0
            self.outer.bias = nn.Parameter(bias)
        self.head = nn.Linear(left.shape[1], 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.stem(x)
        return self.head(self.last(torch.relu(x + self.outer(self.inner(x)))))


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))


def shared(tiles: bool, lanes: int) -> list[Tiling]:
    return [c for c in planning.candidates(lanes, tiles) if c.height > 1 or c.across]


def logits(program, x: np.ndarray, lanes: int, choice, monkeypatch) -> np.ndarray:
    monkeypatch.setattr(engine, "tuned", lambda *_, **__: lambda key: choice)
    return np.concatenate([Engine(program, lanes=lanes).run(part) for part in (x, x[:1])])


@pytest.mark.parametrize("side", [17, 30])
@pytest.mark.parametrize("lanes", sorted({4, 8, host_lanes()}))
def test_dense_kernels_give_the_bits_of_sparse_ones(monkeypatch, side, lanes):
    torch.manual_seed(0)
    model = Blocks(side).eval()
    x = torch.rand(lanes + 1, 3, side, side)
    program = compile_model(model, (3, side, side))
    expected = torch.cat([model(x), model(x[:1])]).detach().numpy()
    sparse = logits(program, x.numpy(), lanes, planning.usual(lanes), monkeypatch)
    assert np.abs(sparse - expected).max() <= 5e-6 * np.abs(expected).max()
    for choice in (*shared(False, lanes), *shared(True, lanes)):
        assert (logits(program, x.numpy(), lanes, choice, monkeypatch) == sparse).all(), choice


@pytest.mark.parametrize("sides", [(1, 1), (1, 3), (1, 4), (2, 1), (2, 2), (3, 2)])
@pytest.mark.parametrize("lanes", sorted({4, host_lanes()}))
def test_few_pixels_leave_out_weights_that_multiply_zeros(monkeypatch, sides, lanes):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(7, 33, 3, padding=1), nn.ReLU(), nn.Conv2d(33, 16, 3, padding=1), nn.Flatten())
    model = nn.Sequential(*model, nn.Linear(16 * sides[0] * sides[1], 3)).eval()
    with torch.no_grad():
        model[0].weight[5] = 0
    program = compile_model(model, (7, *sides))
    x = np.random.default_rng(0).random((lanes + 1, 7, *sides), np.float32)
    sparse = logits(program, x, lanes, planning.usual(lanes), monkeypatch)
    for choice in (*shared(False, lanes), *shared(True, lanes)):
        assert (logits(program, x, lanes, choice, monkeypatch) == sparse).all(), choice
    planner = planning.Planner(program, tasks_of(program), Layout(False, lanes))
    task = [task for task in planner.tasks if isinstance(task, FusedLayer)][1]
    taps = (1 if sides[0] == 1 else 3) * (1 if sides[1] == 1 else 3)
    assert planner.layer(task, shared(False, lanes)[-1]).arguments[10] == taps * task.op.shape[1]  # places


def test_only_layers_with_few_zeros_are_dense(sparse_model):
    tasks = tasks_of(compile_model(sparse_model("lenet-5", 0.1), (1, 28, 28)))
    assert not any(is_full(task.op, 0.5) for task in tasks if isinstance(task, FusedLayer))
