"""Two and three classes are enough for every attack, in every norm that it supports."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import partial
from typing import cast

import pytest
import torch
from torch import Tensor, nn

from sparring.attacks import ATTACKS, facts_of, run, swift
from sparring.attacks.algorithms._projections import nearest_classes
from sparring.bounds import linear_distance
from sparring.threat import LINF, Threat, parse_norm

FEW = {"steps": 20, "queries": 60, "draws": 20, "learning_rate": 0.1}


def linear_problem(classes: int) -> tuple[nn.Module, Tensor, Tensor]:
    torch.manual_seed(classes)
    model = nn.Sequential(nn.Flatten(), nn.Linear(16, classes)).eval()
    x = torch.rand(4, 1, 4, 4) / 2 + 0.25
    return model, x, model(x).argmax(1)


@pytest.mark.parametrize("classes", [2, 3])
@pytest.mark.parametrize("name", ATTACKS)
def test_few_classes_are_enough(name: str, classes: int) -> None:
    model, x, y = linear_problem(classes)
    attack, facts = ATTACKS[name], facts_of(ATTACKS[name])
    taken = inspect.signature(attack).parameters
    short = partial(cast(Callable[..., Tensor], attack), **{key: few for key, few in FEW.items() if key in taken})
    for norm in map(parse_norm, facts.norms):
        exact = linear_distance(model, x, y, norm)
        threat = Threat(norm, None if facts.kind == "minimum-norm" else float(1.5 * exact.max()))
        result = run(model, x, y, short, threat, generator=torch.Generator().manual_seed(0))
        least = 0 if facts.knowledge == "logits" or facts.single_step else len(x)
        assert int(result.success.sum()) >= least
        assert bool((result.distance >= exact * (1 - 1e-5)).all())


def test_swift_aims_where_the_linearised_boundary_is_nearest() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(16, 20)).eval()
    x = torch.rand(5, 1, 4, 4)
    logits, weight = model(x), model.get_parameter("1.weight")
    y = logits.argmax(1)
    for image, own, ranked in zip(logits, y, nearest_classes(model, x, y, norm=LINF, count=3), strict=True):
        likeliest = image.topk(17).indices[1:]
        far = (image[own] - image[likeliest]) / (weight[own] - weight[likeliest]).abs().sum(1)
        assert ranked.tolist() == likeliest[far.argsort()[:3]].tolist()


def test_swift_begins_as_standard_does_and_ends_sooner() -> None:
    model, x, y = linear_problem(3)
    exact = linear_distance(model, x, y, LINF)
    threat = Threat(LINF, 1.02 * float(exact.median()))  # not at an image's distance, where rounding decides
    found = [
        run(model, x, y, attack, threat, generator=torch.Generator().manual_seed(0))
        for attack in (swift, ATTACKS["standard"])
    ]
    assert torch.equal(found[0].success, found[1].success)
    assert found[0].forwards < found[1].forwards / 3
