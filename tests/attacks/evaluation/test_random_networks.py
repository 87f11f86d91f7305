"""Attacks on networks that draw at random: in expectation, so that each image passes several times."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from sparring import attacks
from sparring.attacks._gradients import Probe
from sparring.attacks.algorithms import _ensembles as ensemble
from sparring.sparsity import ACTIVATIONS, insert
from sparring.threat import LINF, Threat

from ..linear_answers import affine_problem, unboxed_distance
from ..noise import Noise


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


@pytest.mark.parametrize("attack", [attacks.nearest, attacks.ddn, attacks.deepfool])
def test_distances_on_a_noisy_linear_model_are_those_to_the_boundary_of_most_draws(attack: attacks.Attack) -> None:
    affine, x, y = affine_problem(0, features=64, on_box=False)
    generator = torch.Generator().manual_seed(0)
    result = attacks.run(nn.Sequential(affine, Noise()).eval(), x, y, attack, Threat(2.0), generator=generator)
    ratio = result.distance / unboxed_distance(affine, x, 2.0)
    # The noise is symmetric, so that most draws change sides where the noiseless model does; 31 draws say so roughly.
    assert bool(result.success.all())
    assert float(ratio.median()) == pytest.approx(1.0, abs=0.05)
    assert float(ratio.max()) < 1.25


@pytest.mark.parametrize("norm", [LINF, 1.0])
def test_the_standard_worst_case_leaves_searches_out_where_layers_declare_that_they_draw(
    norm: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[str] = []

    def noted(name: str) -> Callable[..., Tensor]:
        def attack(_model: nn.Module, x: Tensor, _y: Tensor, **_: object) -> Tensor:
            asked.append(name)
            return x

        return attack

    for name in ("nearest", "_DEEP", "pgd", "apgd", "apgd_targeted", "fab_targeted", "square"):
        monkeypatch.setattr(ensemble, name, noted(name))
    x, y = torch.rand(4, 1, 8, 8), torch.zeros(4, dtype=torch.int64)
    found = []
    for activation, draws in ((nn.ReLU(), 1), (ACTIVATIONS["stochastic-pruning"](1.0), 1), (nn.ReLU(), 5)):
        layer = nn.Linear(64, 10)
        nn.init.zeros_(layer.weight)
        layer.bias.data.copy_(torch.eye(10)[0])  # class 0 wins whatever is drawn
        asked.clear()
        model = Probe(nn.Sequential(nn.Flatten(), layer, activation).eval(), draws=draws)
        ensemble.standard(model, x, y, norm=norm, eps=0.1)
        found.append(list(asked))
    gradients = ["pgd"] if norm == 1.0 else ["apgd", "apgd_targeted"]
    assert found[0][1:] == [*gradients, "fab_targeted", *([] if norm == 1.0 else ["square"])]
    undeclared = ["_DEEP", *found[0][1:]]
    assert found == [["nearest", *found[0][1:]], ["_DEEP", *gradients], undeclared]
