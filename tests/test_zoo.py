"""Networks as people write them go through attack, prune and study, dense, sparse and dead, without an exception."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from sparring import attacks, bounds
from sparring.data import Dataset, Split
from sparring.errors import Unsupported
from sparring.sparsity import PruningSpec, all_ones, apply_, build_pruner, magnitude, select
from sparring.study import Plan, run
from sparring.threat import L2, LINF, Threat
from sparring.train import Recipe, fit

from .zoo import ZOO, kill_

# Attention, recurrence and gates: certificates refuse these by name.
UNCERTIFIED = ("attention", "recurrent", "convnext", "swin")
STATES = ("dense", "90%", "99%", "dead")
TRIED = (
    ("fgsm", Threat(LINF, 0.1)),
    ("pgd", Threat(LINF, 0.1)),
    ("apgd", Threat(L2, 0.5)),
    ("deepfool", Threat(L2)),
    ("nearest", Threat(LINF)),
    ("fast", Threat(LINF, 0.1)),
)


@pytest.fixture(scope="module")
def tiny(digits: Dataset) -> Dataset:
    """Return a few dozen digits."""

    def first(split: Split, count: int) -> Split:
        return Split(split.x[:count], split.y[:count])

    train, valid, test = first(digits.train, 60), first(digits.valid, 20), first(digits.test, 12)
    return Dataset("tiny-digits", train, valid, test, digits.classes, digits.mean, digits.std)


def network(name: str, state: str) -> nn.Module:
    """Return a network of the zoo in eval mode: as drawn, pruned, or with a layer whose units are all dead."""
    torch.manual_seed(0)
    model = ZOO[name]().eval()
    if state == "dead":
        return kill_(model)
    if state != "dense":
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # layers that nothing is left of: meant
            apply_(model, select(magnitude(model), float(state.rstrip("%")) / 100))
    return model


def some(dataset: Dataset, count: int) -> tuple[Tensor, Tensor]:
    return dataset.test.x[:count].float() / 255, dataset.test.y[:count]


@pytest.mark.parametrize("state", STATES)
@pytest.mark.parametrize("name", ZOO)
def test_attacks_go_through(name: str, state: str, tiny: Dataset) -> None:
    model = network(name, state)
    x, _ = some(tiny, 5)
    before = x.clone()
    with torch.no_grad():
        y = model(x).argmax(1)
    for attack, threat in TRIED:
        result = attacks.run(model, x, y, attacks.ATTACKS[attack], threat)
        with torch.no_grad():
            fooled = model(result.x_adv).argmax(1) != y
        assert torch.equal(result.success, fooled), attack
        assert not (state == "dead" and result.success.any() and is_constant(model, x)), attack
    assert torch.equal(x, before)


def is_constant(model: nn.Module, x: Tensor) -> bool:
    with torch.no_grad():
        logits = model(torch.rand(50, *x.shape[1:], generator=torch.Generator().manual_seed(0)))
    return bool((logits == logits[0]).all())


@pytest.mark.parametrize("sparsity", [0.9, 0.99])
@pytest.mark.parametrize("name", ZOO)
def test_pruning_goes_through(name: str, sparsity: float, tiny: Dataset) -> None:
    torch.manual_seed(0)
    model = ZOO[name]()
    pruner = build_pruner(PruningSpec(method="gradual", score="magnitude"), sparsity)
    recipe = Recipe(lr=0.01, epochs=1, batch_size=20)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        result = fit(model, *tiny.train, recipe, seed=0, masks=all_ones(model), pruner=pruner)
    left = sum(int(mask.sum()) for mask in result.masks.values() if mask.dim() > 1)
    every = sum(mask.numel() for mask in result.masks.values() if mask.dim() > 1)
    assert left == pytest.approx((1 - sparsity) * every, abs=2)
    for key, mask in result.masks.items():
        assert not bool(model.get_parameter(key)[~mask].any())


def plan(**changes: Any) -> Plan:
    table = {
        "name": "zoo",
        "model": "zoo:network",
        "seeds": 1,
        "sparsities": [0.9, 0.99],
        "recipe": {"epochs": 4, "lr": 0.01, "batch_size": 20, "optimizer": "adam"},
        "finetune": {"epochs": 1, "lr": 0.01, "batch_size": 20, "optimizer": "adam"},
        "pruning": [{"label": "magnitude"}],
        "attacks": [
            {"name": "fgsm", "eps": [0.1], "images": 6},
            {"name": "pgd", "eps": [0.1], "images": 6, "steps": 5},
            {"name": "deepfool", "norm": "l2", "images": 6, "steps": 10},
        ],
        "shard": 6,
        "batch_size": 6,
        "gallery": 0,
    }
    return Plan.from_table({**table, **changes})


@pytest.mark.parametrize("dead", [False, True], ids=["alive", "half dead"])
@pytest.mark.parametrize("name", ZOO)
def test_studies_go_through(name: str, dead: bool, few_digits: Dataset, tmp_path: Path) -> None:
    def factory() -> nn.Module:
        return kill_(ZOO[name](), 0.5) if dead else ZOO[name]()

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        records = run(plan(), tmp_path, dataset=few_digits, workers=0, factory=factory)
    assert not [(record.stage, record.error) for record in records if record.error]
    assert {record.stage for record in records} >= {"train", "prune", "measure", "attack"}
    assert sum(record.stage == "attack" for record in records) == 3 * 4  # dense, control, 90%, 99%
    if not dead:
        assert all(record.metrics["accuracy"] is not None for record in records if record.stage == "measure")


@pytest.mark.parametrize(("state", "norm"), [("dense", LINF), ("90%", L2), ("99%", LINF), ("dead", LINF)])
@pytest.mark.parametrize("name", ZOO)
def test_certified_is_below_exact_is_below_attacked(name: str, state: str, norm: float, tiny: Dataset) -> None:
    model = network(name, state)
    x, _ = some(tiny, 2)
    with torch.no_grad():
        y = model(x).argmax(1)
    reached = attacks.run(model, x, y, attacks.ATTACKS["nearest"], Threat(norm)).distance.double()
    found = lower_bounds(model, x, y, norm)
    assert all(bool((bound <= reached * (1 + 1e-6)).all()) for bound in found)
    assert (len(found) == 0) == (name in UNCERTIFIED)


def lower_bounds(model: nn.Module, x: Tensor, y: Tensor, norm: float) -> list[Tensor]:
    """Return what certificates and the exact search say of the distance; nothing where they refuse by name."""
    try:
        certified = [bounds.radius(model, x, y, norm, method=method) for method in ("interval", "crown")]
    except Unsupported as error:
        assert "operation" in str(error)
        return []
    try:
        exact = bounds.exact(model, x, y, norm, seconds=0.2)
    except Unsupported:  # too large, or pooled under l_2
        return certified
    assert all(bool((each <= exact.upper * (1 + 1e-6)).all()) for each in certified)
    return [*certified, exact.lower]
