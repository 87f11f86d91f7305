"""Defences by sparsity that only hide the gradient, on one trained network: the default evaluation must see through.

The reference numbers are frozen: `python benchmarks/broken_defences.py --write tests/attacks/broken_defences.json`.
"""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from broken_defences import DEFENCES, EPS, Hidden, defended
from sparring.attacks import fast, fgsm, nearest, pgd, robust_accuracy, run
from sparring.threat import L2, LINF, Threat

FROZEN = json.loads((Path(__file__).parent / "broken_defences.json").read_text())
THREAT = Threat(LINF, EPS)
NAIVE = {"fgsm": fgsm, "pgd": partial(pgd, steps=10, step_size=EPS / 4)}
FLAGS = {
    "k-winners": {"masked-gradients"},
    "staircase": {"zero-gradients", "masked-gradients"},
    "scaled-logits": {"logit-scale"},
    "cut": {"zero-gradients", "masked-gradients"},
}

Trained = tuple[nn.Sequential, Tensor, Tensor]


def seeded() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def images_of(name: str, trained: Trained) -> tuple[Tensor, Tensor]:
    """Return the images of the frozen numbers: fewer where each costs dozens of passes."""
    count = 50 if name == "stochastic-pruning" else len(trained[1])
    return trained[1][:count], trained[2][:count]


def test_the_undefended_network_is_neither_lost_nor_safe(trained: Trained) -> None:
    result = run(*trained, fast, THREAT, generator=seeded())
    assert 0.3 <= robust_accuracy(result) <= 0.6
    assert result.flags == ()
    assert robust_accuracy(result) <= FROZEN["undefended"]["reference"] + 0.02
    assert robust_accuracy(result) == pytest.approx(FROZEN["undefended"]["default"], abs=0.011), "another network"


@pytest.mark.parametrize("name", [name for name in FROZEN if name in DEFENCES])
def test_naive_attacks_are_fooled_by_ten_points_and_the_default_evaluation_is_not(name: str, trained: Trained) -> None:
    model, x, y = trained
    network, reference = defended(model, name), FROZEN[name]["reference"]
    for attack in NAIVE.values():
        x_adv = attack(network, x, y, norm=LINF, eps=EPS, generator=seeded())
        with torch.no_grad():
            standing = (network(x).argmax(1) == y) & (network(x_adv).argmax(1) == y)
        assert float(standing.double().mean()) >= reference + 0.1
    result = run(network, x, y, fast, THREAT, generator=seeded())
    assert robust_accuracy(result) <= reference + 0.02 + 1e-9
    assert FLAGS[name] <= {flag.name for flag in result.flags}
    assert not any(getattr(part, "straight_through", False) for part in network)


def test_random_activations_gain_nothing_in_expectation(trained: Trained) -> None:
    x, y = trained[1][:20], trained[2][:20]
    base = run(trained[0], x, y, pgd, THREAT, generator=seeded())
    network = defended(trained[0], "stochastic-pruning")
    first, again = (run(network, x, y, pgd, THREAT, generator=seeded()) for _ in range(2))
    assert robust_accuracy(first) <= robust_accuracy(base) + 0.05
    assert torch.equal(first.x_adv, again.x_adv) and torch.equal(first.success, again.success)
    assert all(part.generator is None for part in network if hasattr(part, "stochastic"))


def test_scaled_logits_change_no_image(trained: Trained) -> None:
    model, x, y = trained
    scaled = defended(model, "scaled-logits")
    first, second = (run(network, x, y, fast, THREAT, generator=seeded()) for network in (model, scaled))
    assert torch.equal(first.success, second.success)
    assert {flag.name for flag in second.flags} == {"logit-scale"}
    reach = [run(network, x, y, nearest, Threat(L2)).distance for network in (model, scaled)]
    assert torch.allclose(reach[0], reach[1], rtol=1e-2)


def test_the_dense_network_lends_its_examples_unasked(trained: Trained) -> None:
    network = defended(trained[0], "k-winners")
    for part in network:
        if hasattr(part, "masks_gradients"):
            part.masks_gradients = False  # as if it did not know: no straight-through pass
    alone, helped = (
        run(network, *trained[1:], pgd, THREAT, surrogates=others, generator=seeded()) for others in ({}, None)
    )
    assert robust_accuracy(helped) <= robust_accuracy(alone) - 0.05
    assert [flag.name for flag in helped.flags if "the dense network" in flag.detail] == ["masked-gradients"]


def test_examples_are_transferred_from_a_named_model(trained: Trained) -> None:
    model, x, y = trained
    alone = run(Hidden(model), x, y, pgd, THREAT, generator=seeded())
    helped = run(Hidden(model), x, y, pgd, THREAT, surrogates={"dense": model}, generator=seeded())
    assert robust_accuracy(alone) > robust_accuracy(helped) + 0.2
    assert any(flag.name == "masked-gradients" and "dense" in flag.detail for flag in helped.flags)
