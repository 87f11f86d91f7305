"""Scheduled pruners are exact at every step, monotone, and idle between updates."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

from sparring.errors import UserError
from sparring.metrics import size
from sparring.sparsity import (
    NM,
    SCORES,
    Masks,
    Pruner,
    Rule,
    Step,
    all_ones,
    apply_,
    cubic,
    gradual,
    magnitude,
    one_shot,
    snip,
    sparsity_of,
)


def cross_entropy(model: nn.Module, x: Tensor, y: Tensor, generator: torch.Generator | None) -> Tensor:
    return F.cross_entropy(model(x), y)


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(16, 12), nn.ReLU(), nn.Linear(12, 3))


def follow(pruner: Pruner, model: nn.Module, steps: int) -> list[Masks]:
    """Train a little with a pruner, as the training loop does, and return the masks after every step."""
    generator = torch.Generator().manual_seed(1)
    masks, history = all_ones(model), []
    optimiser = torch.optim.SGD(model.parameters(), lr=0.05)
    for step in range(steps):
        x, y = torch.rand(20, 1, 4, 4, generator=generator), torch.randint(3, (20,), generator=generator)
        optimiser.zero_grad()
        cross_entropy(model, x, y, None).backward()
        optimiser.step()
        if not pruner.dense_weights:
            apply_(model, masks)
        masks = pruner(Step(model, masks, step, steps, (x, y), cross_entropy, generator))
        history.append(masks)
    return history


@settings(max_examples=20, deadline=None)
@given(st.floats(0, 0.95), st.floats(0, 1), st.floats(0, 1), st.integers(1, 7), st.integers(1, 30))
def test_gradual_is_exact_and_never_grows(sparsity: float, a: float, b: float, every: int, steps: int) -> None:
    history = follow(gradual(magnitude, sparsity, start=min(a, b), stop=max(a, b), every=every), network(), steps)
    removed = [round(sparsity_of(masks) * 228) for masks in history]
    assert removed == sorted(removed)
    assert removed[-1] == round(sparsity * 228)
    for before, after in itertools.pairwise(history):
        assert all(bool((after[name] <= before[name]).all()) for name in before)


def test_gradual_follows_the_cubic_schedule_at_every_update_and_idles_between() -> None:
    history = follow(gradual(magnitude, 0.9, start=0.0, stop=1.0, every=5), network(), 21)
    for step in (0, 5, 10, 15, 20):
        assert sparsity_of(history[step]) == pytest.approx(cubic(step / 20, 0.9), abs=0.5 / 228 + 1e-9)
    assert history[6] is history[5]
    assert cubic(0, 0.9, 0.3) == pytest.approx(0.3)
    assert cubic(1, 0.9, 0.3) == 0.9


@pytest.mark.parametrize("name", SCORES)
def test_every_score_prunes_to_the_count(name: str) -> None:
    model = network()
    masks = follow(one_shot(SCORES[name], 0.5), model, 2)[-1]
    assert sparsity_of(masks) == size(model).sparsity == 0.5


def test_rule_spares_layers_and_keeps_n_of_m() -> None:
    masks = follow(gradual(magnitude, 0.5, rule=Rule(structure=NM(2, 4), spare=("3.weight",))), network(), 10)[-1]
    assert masks["3.weight"].all()
    assert bool((masks["1.weight"].view(12, 4, 4).sum(-1) == 2).all())


def test_by_layer_schedule() -> None:
    masks = follow(gradual(magnitude, {"1.weight": 0.75, "3.weight": 0.25}), network(), 10)[-1]
    assert sparsity_of({"1": masks["1.weight"]}) == 0.75
    assert sparsity_of({"3": masks["3.weight"]}) == 0.25


def test_bad_options_are_refused() -> None:
    with pytest.raises(UserError, match="start <= stop"):
        gradual(magnitude, 0.5, start=0.9, stop=0.1)
    with pytest.raises(UserError, match="below 1"):
        gradual(magnitude, 1.0)
    with pytest.raises(UserError, match="at least 1"):
        gradual(magnitude, 0.5, every=0)
    with pytest.raises(UserError, match="unknown layer"):
        follow(gradual(magnitude, 0.5, rule=Rule(spare=("nope",))), network(), 2)
    with pytest.raises(UserError, match="unknown layer 'nope'"):
        follow(gradual(magnitude, {"nope": 0.5}), network(), 2)
    with pytest.raises(UserError, match="has no value"):
        follow(gradual(magnitude, {"1.weight": 0.5}), network(), 2)
    with pytest.raises(UserError, match="needs a batch"):
        snip(network())
