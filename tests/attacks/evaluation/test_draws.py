"""What an attack draws for an image depends on a seed and the image, not on the batch that it is in."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from sparring.attacks import ATTACKS, AttackResult, audit, fgsm, pgd, run, worst_case
from sparring.draws import Draws
from sparring.threat import L0, L2, LINF, Threat

SHORT: dict[str, dict[str, Any]] = {
    "apgd": {"steps": 30},
    "apgd-dlr": {"steps": 30},
    "apgd-targeted": {"steps": 20},
    "ddn": {"steps": 30},
    "fab-targeted": {"steps": 10, "classes": 2},
    "cw": {"steps": 20, "searches": 2},
    "hopskipjump": {"steps": 3, "draws": 20},
    "sigma-zero": {"steps": 30},
    "square": {"queries": 30},
    "swift": {"classes": 1},
    "nearest": {"steps": 10, "starts": 1, "polish": 3},
    "fab": {"steps": 10, "restarts": 2},
    "pgd": {"restarts": 2, "steps": 10},
}
BATCHES = (7, 32, 40)
# FAB's projections end when the last image of a batch is within a thousandth of its plane.
ROUGH = ("fab", "fab-targeted", "standard")
LONG = pytest.param("standard", marks=pytest.mark.nightly)
DRAWING = ["apgd", "apgd-dlr", "apgd-targeted", "fast", "hopskipjump", "pgd", "rfgsm", "square", "swift", LONG]


@pytest.fixture(scope="module")
def task() -> tuple[nn.Module, Tensor, Tensor]:
    """Return a network in double precision, whose last bits matter less, with images and the classes it gives them."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Flatten(), nn.Linear(36, 16), nn.ReLU(), nn.Linear(16, 4)).double().eval()
    x = torch.rand(40, 1, 6, 6, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    return net, x, net(x).argmax(1)


def attacked(name: str, task: tuple[nn.Module, Tensor, Tensor], batch: int, draws: Draws, norm: float) -> AttackResult:
    attack = partial(ATTACKS[name], **SHORT.get(name, {}))
    eps = {"linf": 0.06, "l2": 0.2}["linf" if norm == LINF else "l2"]
    if name == "sigma-zero":
        norm = L0
    minimum = name in {"cw", "ddn", "deepfool", "fab", "fab-targeted", "hopskipjump", "nearest", "sigma-zero"}
    return run(*task, attack, Threat(norm, None if minimum else eps), batch_size=batch, generator=draws)


@pytest.mark.parametrize("name", [*sorted(ATTACKS.keys() - {"standard"}), LONG])
def test_results_do_not_depend_on_batches_or_their_order(name: str, task: tuple[nn.Module, Tensor, Tensor]) -> None:
    net, x, y = task
    norm = L2 if name in {"cw", "ddn", "hopskipjump", "square"} else LINF
    draws = Draws.of(3, range(len(x)))
    first, *others = (attacked(name, task, batch, draws, norm) for batch in BATCHES)
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(2))
    mixed = attacked(name, (net, x[order], y[order]), 13, draws[order], norm)
    back = order.argsort()
    tolerance = 2e-3 if name in ROUGH else 1e-6
    for found in [one.x_adv for one in others] + [mixed.x_adv[back]]:
        assert torch.allclose(found, first.x_adv, atol=tolerance)
        assert torch.equal(net(found).argmax(1), net(first.x_adv).argmax(1))
    assert torch.equal(mixed.success[back], first.success)


@pytest.mark.parametrize("name", DRAWING)
def test_another_seed_draws_others(name: str, task: tuple[nn.Module, Tensor, Tensor]) -> None:
    one, other = (attacked(name, task, 40, Draws.of(seed, range(40)), LINF) for seed in (0, 1))
    assert not torch.equal(one.x_adv, other.x_adv)
    assert torch.equal(attacked(name, task, 40, Draws.of(0, range(40)), LINF).x_adv, one.x_adv)


def test_every_attack_of_an_ensemble_and_every_restart_draws_others(task: tuple[nn.Module, Tensor, Tensor]) -> None:
    seen: list[Tensor] = []

    def noted(model: nn.Module, x: Tensor, y: Tensor, *, norm: float, eps: float | None = None,
              targets: Tensor | None = None, generator: torch.Generator | None = None) -> Tensor:  # fmt: skip
        seen.append(torch.rand(3, generator=generator))
        return x

    run(*task, partial(worst_case, attacks=[noted, noted]), Threat(LINF, 0.01), batch_size=20, surrogates={})
    assert len({tuple(drawn.tolist()) for drawn in seen}) == len(seen) == 4
    # Nothing moves but by the random start: each restart that fails leaves another point.
    ends = [partial(pgd, steps=1, step_size=0.0, restarts=count) for count in (1, 2)]
    net, x, y = task
    first, second = (end(net, x, y, eps=1e-6, generator=Draws.of(0, range(40))) for end in ends)
    assert ((first - second).flatten(1).abs().amax(1) > 0).all()


def test_a_users_attack_gets_a_generator_that_the_first_image_seeds(task: tuple[nn.Module, Tensor, Tensor]) -> None:
    def noise(model: nn.Module, x: Tensor, y: Tensor, *, norm: float, eps: float | None = None,
              targets: Tensor | None = None, generator: torch.Generator | None = None) -> Tensor:  # fmt: skip
        return (x + (eps or 0) * (torch.rand(x.shape, generator=generator, dtype=x.dtype) - 0.5)).clamp(0, 1)

    found = [run(*task, noise, Threat(LINF, 0.1), batch_size=20, surrogates={}).x_adv for _ in range(2)]
    assert torch.equal(*found)
    net, x, y = task
    later = run(net, x[20:], y[20:], noise, Threat(LINF, 0.1), batch_size=20, generator=Draws.of(0, range(20, 40)))
    assert torch.equal(later.x_adv, found[0][20:])


def test_an_audit_draws_by_its_seed(task: tuple[nn.Module, Tensor, Tensor]) -> None:
    one, other = (audit(*task, {"pgd": pgd, "fgsm": fgsm}, eps=[0.03], checks=0, seed=seed) for seed in (0, 1))
    assert not torch.equal(one[0].result.x_adv, other[0].result.x_adv)
    assert torch.equal(one[1].result.x_adv, other[1].result.x_adv)  # FGSM draws nothing
