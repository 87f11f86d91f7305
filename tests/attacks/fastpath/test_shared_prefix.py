from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from sparring.attacks import pgd, run
from sparring.attacks._gradients import Probe, logits_and_gradient
from sparring.attacks.algorithms._losses import cross_entropy
from sparring.attacks.evaluation._bpda import seeded
from sparring.attacks.fastpath._shared_prefix import split_at_draw
from sparring.sparsity import ACTIVATIONS
from sparring.threat import LINF, Threat

from ..noise import Noise


def drawing(units: int = 20) -> nn.Sequential:
    """A network whose second activation draws."""
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Flatten(),
        nn.Linear(64, units),
        nn.ReLU(),
        nn.Linear(units, 16),
        ACTIVATIONS["stochastic-pruning"](1.0),
        nn.Linear(16, 4),
    ).eval()


@pytest.fixture
def x() -> Tensor:
    return torch.rand(30, 1, 8, 8, generator=torch.Generator().manual_seed(0))


def test_a_model_is_split_before_its_first_draw(x: Tensor) -> None:
    model = drawing()
    split = split_at_draw(model, x)
    assert split is not None
    assert list(split.steady) == list(model)[:4] and list(split.drawing) == list(model)[4:]


def test_models_that_cannot_be_split_are_left_whole(x: Tensor) -> None:
    model = drawing()
    assert split_at_draw(nn.Sequential(model), x) is None
    assert split_at_draw(nn.Sequential(nn.Flatten(), Noise(), *list(model)[1:]), x) is None
    assert split_at_draw(model[:4], x) is None
    assert split_at_draw(nn.Sequential(nn.Flatten(), nn.Linear(64, 65), *list(drawing(65))[4:]), x) is None
    model.register_forward_hook(lambda *_: None)
    assert split_at_draw(model, x) is None
    replaced = drawing()
    inner = replaced.forward
    replaced.forward = lambda images: inner(1 - images)
    assert split_at_draw(replaced, x) is None


def test_passes_through_both_parts_are_those_of_the_model(x: Tensor) -> None:
    model, y = drawing(), torch.zeros(30, dtype=torch.int64)
    found = []
    for split in (None, split_at_draw(model, x)):
        probe = Probe(model, draws=5, split=split)
        with seeded(model, 3):
            found.append((*logits_and_gradient(probe, x, cross_entropy, y), probe.forwards, probe.backwards))
    (logits, gradient, *counts), (logits_split, gradient_split, *counts_split) = found
    assert torch.allclose(logits, logits_split, atol=1e-6) and torch.allclose(gradient, gradient_split, atol=1e-6)
    assert gradient.abs().max() > 1e-3
    assert counts == counts_split == [150, 150]


def test_an_evaluation_asks_the_steady_part_once_for_all_draws(x: Tensor) -> None:
    model, rows = drawing(), [0, 0]
    y = model(x).argmax(1)
    for number, layer in enumerate((model[1], model[5])):
        layer.register_forward_hook(lambda _m, _i, out, n=number: rows.__setitem__(n, rows[n] + len(out)))
    result = run(model, x, y, pgd, Threat(LINF, 0.1), generator=torch.Generator().manual_seed(0), surrogates={})
    assert result.success.any()
    assert rows[1] > 5 * rows[0] > 0
