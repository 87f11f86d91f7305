"""The whole product: every method with every score, structure and allocation works to its count or is refused."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sparring.errors import UserError
from sparring.sparsity import (
    METHODS,
    SCOPES,
    SCORES,
    STRUCTURES,
    Masks,
    Pruner,
    PruningSpec,
    Step,
    all_ones,
    apply_,
    build_pruner,
    check_reached,
)

SINGLE = ("bernoulli", "dns", "set", "rigl")  # they move single weights
SCORED = ("one-shot", "gradual", "iterative")
BY_HAND = ("one-shot", "gradual", "bernoulli", "proximal")
ALLOCATIONS = (None, *SCOPES, "by hand")
STEPS = 3


def cross_entropy(model: nn.Module, x: Tensor, y: Tensor, generator: torch.Generator | None) -> Tensor:
    return F.cross_entropy(model(x), y)


def specs(method: str, structure: str) -> Iterator[PruningSpec]:
    for score in (None, *SCORES):
        for allocation in ALLOCATIONS:
            yield PruningSpec(
                method=method,
                score=score,
                structure=structure,
                scope=allocation if allocation in SCOPES else None,
                layers={} if allocation == "by hand" else None,
                floor=None if method == "bernoulli" else 0.05,
            )


def is_refused(spec: PruningSpec) -> bool:
    """Say what cannot be, by reason: the test's own list, beside the one in the code."""
    return (
        (spec.score is not None and spec.method not in SCORED)
        or (spec.structure != "unstructured" and spec.method in SINGLE)
        or (spec.layers is not None and spec.method not in BY_HAND)
        or (spec.scope == "erk" and spec.structure in ("1:2", "1:4", "2:4", "4:8"))
    )


def tied_network() -> nn.Module:
    """Return a network most of whose weights are equal to others."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 8))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_((parameter * 8).round() / 8)
    return model


def follow(pruner: Pruner) -> Masks:
    model, generator = tied_network(), torch.Generator().manual_seed(0)
    masks = all_ones(model)
    x, y = torch.rand(8, 1, 4, 4, generator=generator), torch.randint(8, (8,), generator=generator)
    for step in range(STEPS):
        model.zero_grad()
        F.cross_entropy(model(x), y).backward()
        masks = pruner(Step(model, masks, step, STEPS, (x, y), cross_entropy, generator))
        if not pruner.dense_weights:
            apply_(model, masks)
    return masks


def check(spec: PruningSpec, masks: Masks) -> None:
    kept = {name: mask for name, mask in masks.items() if mask.dim() > 1}
    if spec.structure == "channels":
        assert int(kept["1.weight"].any(1).sum()) == 8 and bool(kept["3.weight"].all())
    elif spec.method == "bernoulli":
        assert 0.3 < float(kept["1.weight"].float().mean()) < 0.7
    else:
        assert all(bool(mask.any()) for mask in kept.values()), "the floor keeps every layer"
    if spec.structure == "2:4":
        assert all(bool((mask.view(len(mask), -1, 4).sum(-1) == 2).all()) for mask in kept.values())
    if spec.scope == "layer" or spec.layers is not None:
        parts = [kept["1.weight"]] if spec.structure == "channels" else list(kept.values())
        exact = spec.method != "bernoulli"
        assert not exact or all(float(mask.float().mean()) == 0.5 for mask in parts)


@pytest.mark.parametrize("structure", STRUCTURES)
@pytest.mark.parametrize("method", METHODS)
def test_every_combination_works_to_its_count_or_is_refused_with_a_reason(method: str, structure: str) -> None:
    for spec in specs(method, structure):
        target = 0.5 if STRUCTURES[structure] != STRUCTURES["1:4"] or method in SINGLE else 0.75
        if spec.layers is not None:
            classes = 0.0 if structure == "channels" else target  # which keep all their rows
            spec = dataclasses.replace(spec, layers={"1.weight": target, "3.weight": classes})
        asked = target if spec.layers is None else None
        if is_refused(spec):
            with pytest.raises(UserError, match=r"\w+ .* \w+"):
                build_pruner(spec, asked)
            continue
        pruner = build_pruner(spec, asked)
        masks = follow(pruner)
        check_reached(pruner, masks, spec.layers or target)
        if target == 0.5:
            check(spec, masks)


@pytest.mark.parametrize("scope", SCOPES)
def test_the_rule_that_was_asked_for_is_the_pruners(scope: str) -> None:
    for method in METHODS:
        rule = build_pruner(PruningSpec(method=method, scope=scope), 0.5).rule
        assert rule.scope == scope, f"{method} must not ignore its allocation"
