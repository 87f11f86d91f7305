"""Attacks on networks that draw at random: in expectation, so that each image passes several times."""

from __future__ import annotations

import torch
from torch import nn

from sparring import attacks
from sparring.sparsity import ACTIVATIONS, insert
from sparring.threat import Threat


def test_deepfool_runs_in_expectation_behind_a_linear_layer() -> None:
    torch.manual_seed(0)
    dense = nn.Sequential(nn.Flatten(), nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10))
    model = insert(dense, lambda: ACTIVATIONS["stochastic-pruning"](1.0)).eval()
    x = torch.rand(20, 1, 8, 8)
    y = dense(x).argmax(1)
    generator = torch.Generator().manual_seed(0)
    result = attacks.run(model, x, y, attacks.deepfool, Threat(2.0), batch_size=20, generator=generator)
    assert result.success.any()
    assert torch.isfinite(result.distance[result.success]).all()
