from __future__ import annotations

import copy
import math
import re
from fractions import Fraction
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from sparring.attacks import (
    ATTACKS,
    FLAGS,
    Attack,
    Flag,
    apgd,
    check_budgets,
    check_convergence,
    check_order,
    check_silence,
    check_unlimited,
    cw,
    ddn,
    deepfool,
    fab,
    fast,
    fgsm,
    hopskipjump,
    nearest,
    pgd,
    run,
    square,
    worst_case,
)
from sparring.attacks.evaluation._run import lengthened
from sparring.attacks.evaluation._sanity_checks import exceeds
from sparring.attacks.evaluation._sanity_checks import many as beyond
from sparring.errors import UserError
from sparring.threat import L0, L1, L2, LINF, Threat, distance

THREAT = Threat(LINF, 0.05)


def idle(model, x, y, *, norm, eps=None, targets=None, generator=None):  # type: ignore[no-untyped-def]
    return x


def test_flag_names_are_known() -> None:
    with pytest.raises(ValueError, match="unknown"):
        Flag("no-such-flag", "")


def test_the_document_explains_every_flag_and_no_other() -> None:
    document = (Path(__file__).parents[3] / "docs" / "flags.md").read_text(encoding="utf-8")
    explained = set(re.findall(r"^\| `([a-z-]+)` \|", document, flags=re.MULTILINE))
    others = {"contradicted-distance", "outdone", "memory-limit", "time-limit"}  # found by the report and by `verify`
    assert explained == {*FLAGS, *others}


def test_an_idle_attack_fails_with_an_unlimited_budget(net: nn.Module, images: Tensor) -> None:
    y = net(images).argmax(1)
    assert [flag.name for flag in check_unlimited(net, images, y, idle)] == ["unlimited-budget"]
    assert check_unlimited(net, images, y, pgd) == ()


def test_bad_luck_with_an_unlimited_budget_is_no_flag(net: nn.Module, images: Tensor) -> None:
    tries: list[int] = []

    def unlucky(model, x, y, *, norm, eps=None, targets=None, generator=None):  # type: ignore[no-untyped-def]
        tries.append(len(x))
        x_adv = pgd(model, x, y, norm=norm, eps=eps)
        return torch.where(torch.rand(len(x), 1, 1, 1, generator=generator) < 0.5, x_adv, x)

    assert (
        check_unlimited(net, images, net(images).argmax(1), unlucky, generator=torch.Generator().manual_seed(0)) == ()
    )
    assert len(tries) > 1 and tries == sorted(tries, reverse=True), "only images still standing are tried again"


@pytest.fixture
def many() -> Tensor:
    """Return as many images as it takes to tell a weak attack from bad luck."""
    return torch.rand(40, 1, 8, 8, generator=torch.Generator().manual_seed(2))


def test_a_weak_attack_above_a_strong_one_is_flagged(net: nn.Module, many: Tensor) -> None:
    y = net(many).argmax(1)
    good, bad = (run(net, many, y, attack, THREAT) for attack in (pgd, idle))
    assert int(good.success.sum()) >= 10
    for weak, strong in (("fgsm", "pgd"), ("square", "fast"), ("square", "apgd-targeted")):
        assert [flag.name for flag in check_order({weak: good, strong: bad})[strong]] == ["weaker-wins"]
    assert check_order({"fgsm": bad, "pgd": good}) == {}


def test_a_larger_budget_that_does_worse_is_flagged(net: nn.Module, many: Tensor) -> None:
    y = net(many).argmax(1)
    good, bad = (run(net, many, y, attack, THREAT) for attack in (pgd, idle))
    assert [flag.name for flag in check_budgets({0.05: good, 0.1: bad, 0.02: bad})[0.1]] == ["weaker-wins"]
    assert check_budgets({0.02: bad, 0.05: good}) == {}


def test_ten_images_to_none_are_beyond_chance_and_nine_are_not() -> None:
    assert exceeds(10, 0, share=0.05, of=100) and not exceeds(9, 0, share=0.05, of=100)
    assert not exceeds(10, 3, share=0.05, of=100), "as uneven a count comes up by luck"
    assert not exceeds(100, 20, share=0.05, of=10_000), "significant, but small"
    assert not exceeds(0, 0, share=0.0, of=5)


def test_what_is_beyond_chance_is_told_of_any_number_of_images() -> None:
    for of in (5, 100, 1000):  # the exact sums, in fractions
        chances = [math.comb(of, k) * Fraction(1, 10) ** k * Fraction(9, 10) ** (of - k) for k in range(of + 1)]
        for count in range(0, of + 1, max(1, of // 50)):
            assert beyond(count, of, share=0.1) == (sum(chances[count:]) <= Fraction(1, 1000)), (count, of)
    # Beyond a thousand images these sums need numbers that no float holds.
    assert not beyond(0, 60_000, share=0.1) and not beyond(6_100, 60_000, share=0.1)
    assert beyond(6_400, 60_000, share=0.1) and beyond(60_000, 60_000, share=0.1)
    assert exceeds(30_500, 29_500, share=0.01, of=60_000) and not exceeds(30_300, 29_700, share=0.01, of=60_000)


def test_an_attack_may_fail_on_thousands_of_images() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(4, 2))
    x = torch.rand(3000, 1, 2, 2)
    result = run(model, x, model(x).argmax(1), fgsm, Threat(LINF, 1e-4))
    assert result.flags == () and int(result.success.sum()) < 100


SHORT = partial(pgd, steps=2, step_size=0.012, random_start=False)


def test_a_run_that_stopped_too_soon_is_flagged(net: nn.Module, many: Tensor) -> None:
    y = net(many).argmax(1)
    result = run(net, many, y, SHORT, THREAT)
    assert [flag.name for flag in check_convergence(net, many, y, SHORT, THREAT, result)] == ["not-converged"]
    assert [flag.name for flag in run(net, many, y, SHORT, THREAT, convergence=40).flags] == ["not-converged"]
    result = run(net, many, y, nearest, Threat(L2))
    assert check_convergence(net, many, y, nearest, Threat(L2), result) == ()
    assert run(net, many, y, fgsm, THREAT, convergence=40).flags == ()


def tiring(model, x, y, *, norm, eps=None, targets=None, generator=None, steps=5):  # type: ignore[no-untyped-def]
    """Stand for an attack that loses its way: with more than five steps it does nothing."""
    return pgd(model, x, y, norm=norm, eps=eps) if steps <= 5 else x


def test_more_steps_that_do_worse_are_flagged(net: nn.Module, many: Tensor) -> None:
    y = net(many).argmax(1)
    result = run(net, many, y, tiring, THREAT)
    assert [flag.name for flag in check_convergence(net, many, y, tiring, THREAT, result)] == ["weaker-wins"]


def forgetful(model, x, y, *, norm, eps=None, targets=None, generator=None):  # type: ignore[no-untyped-def]
    """Stand for an attack that looks at adversarial points and returns where it began."""
    with torch.no_grad():
        model(pgd(model, x, y, norm=norm, eps=eps))
    return x


def test_an_attack_that_drops_its_success_is_flagged(net: nn.Module, images: Tensor) -> None:
    y = net(images).argmax(1)
    result = run(net, images, y, forgetful, THREAT)
    assert [flag.name for flag in check_silence(net, images, y, forgetful, THREAT, result)] == ["silent-success"]
    for attack in (pgd, apgd, fgsm):
        weak = run(net, images, y, attack, Threat(LINF, 0.01))
        assert bool((~weak.success).any())
        assert check_silence(net, images, y, attack, Threat(LINF, 0.01), weak) == ()


class Odd(nn.Module):
    """A model in double precision that writes into its images and returns a dictionary."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = copy.deepcopy(net).double()

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        return {"logits": self.net(x.sub_(0.1).add_(0.1).double())}


def test_second_opinions_are_of_any_model_that_attacks_take(net: nn.Module, images: Tensor) -> None:
    y, model, before = net(images).argmax(1), Odd(net), images.clone()
    result = run(model, images, y, forgetful, THREAT)
    assert [flag.name for flag in check_silence(model, images, y, forgetful, THREAT, result)] == ["silent-success"]
    assert check_unlimited(model, images, y, pgd, norm=LINF) == ()
    assert torch.equal(images, before)


def test_an_attack_without_steps_cannot_be_lengthened() -> None:
    with pytest.raises(UserError, match="steps"):
        lengthened(fgsm)


def test_a_descent_is_flagged(net: nn.Module, images: Tensor) -> None:
    def backwards(model, x, y, *, norm, eps=None, targets=None, generator=None):  # type: ignore[no-untyped-def]
        return (2 * x - fgsm(model, x, y, norm=norm, eps=eps)).clamp(0, 1)

    y = net(images).argmax(1)
    assert [flag.name for flag in run(net, images, y, backwards, Threat(LINF, 0.01)).flags] == ["loss-not-increasing"]
    assert run(net, images, y, fgsm, Threat(LINF, 0.001)).flags == ()


BUDGETED = ("apgd", "apgd-dlr", "apgd-targeted", "fast", "fgsm", "pgd", "rfgsm", "square", "standard", "swift")
BRIEF = {
    "cw": partial(cw, steps=100, searches=3, start_constant=1.0),
    "hopskipjump": partial(hopskipjump, steps=3, draws=20),
    "square": partial(square, queries=300),
}


@pytest.mark.parametrize("name", sorted(ATTACKS))
def test_targeted_attacks_reach_their_target(name: str, net: nn.Module, images: Tensor) -> None:
    y = net(images).argmax(1)
    # The likeliest other class, which random images show too: a decision-based attack has to start from one.
    targets = net(images).scatter(1, y.unsqueeze(1), -torch.inf).argmax(1)
    budget = Threat(L2, 3.0) if name in BUDGETED else Threat(L0 if name == "sigma-zero" else L2)
    attack, generator = BRIEF.get(name, ATTACKS[name]), torch.Generator().manual_seed(0)
    result = run(net, images, y, attack, budget, targets=targets, generator=generator)
    # Half of the one step of R+FGSM is random.
    assert result.success.double().mean() >= (0.4 if name == "rfgsm" else 0.9)
    assert torch.equal(net(result.x_adv).argmax(1)[result.success], targets[result.success])


def test_the_worst_case_is_the_union_of_its_attacks(net: nn.Module, images: Tensor) -> None:
    y = net(images).argmax(1)
    attacks: list[Attack] = [fgsm, partial(apgd, steps=10)]
    union = run(
        net, images, y, partial(worst_case, attacks=attacks), THREAT, generator=torch.Generator().manual_seed(0)
    )
    alone = run(net, images, y, fgsm, THREAT)
    assert bool((union.success | ~alone.success).all())


def test_the_smallest_of_several_searches_counts(net: nn.Module, images: Tensor) -> None:
    y = net(images).argmax(1)
    parts = [run(net, images, y, attack, Threat(L2)).distance for attack in (nearest, deepfool)]
    both = run(net, images, y, partial(worst_case, attacks=[nearest, deepfool]), Threat(L2)).distance
    assert torch.allclose(both, torch.minimum(*parts), atol=1e-6)


DETERMINISTIC = [
    *((attack, norm) for attack in (nearest, deepfool, fab) for norm in (L2, LINF, L1)),
    (partial(cw, steps=60, start_constant=1.0, searches=3), L2),
    (ddn, L2),
    (fast, L2),
]


@pytest.mark.parametrize(("attack", "norm"), DETERMINISTIC)
def test_batch_size_and_order_move_no_distance(attack: Attack, norm: float, net: nn.Module, images: Tensor) -> None:
    """In float64, where the rounding of other products sends no search another way."""
    net, images = copy.deepcopy(net).double(), images.double()
    y = net(images).argmax(1)
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
    whole = run(net, images, y, attack, Threat(norm))
    parts = run(net, images[order], y[order], attack, Threat(norm), batch_size=5)
    assert whole.success.all()
    assert torch.equal(whole.success[order], parts.success)
    moved = (whole.distance[order] - parts.distance).abs()
    # In ℓ1 several vertices are equally far away: the last bit decides with which one `nearest` goes on.
    assert int((moved > 1e-5).sum()) <= (attack is nearest and norm == L1)
    assert bool((moved <= 0.05 * parts.distance).all())


@pytest.mark.parametrize(("attack", "norm"), [(nearest, L2), (nearest, LINF), (deepfool, L2), (fab, L2), (ddn, L2)])
def test_batch_size_and_order_move_no_distance_on_real_images(
    attack: Attack, norm: float, trained: tuple[nn.Module, Tensor, Tensor]
) -> None:
    model, x, y = trained[0], trained[1][:40], trained[2][:40]
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
    whole = run(model, x, y, attack, Threat(norm)).distance
    parts = run(model, x[order], y[order], attack, Threat(norm), batch_size=7).distance
    assert abs(float(whole.mean() - parts.mean())) <= 1e-4
    assert float(((whole[order] - parts).abs() <= 1e-3).double().mean()) >= 0.97


@pytest.mark.parametrize("attack", [fgsm, partial(pgd, random_start=False)])
@pytest.mark.parametrize(("norm", "eps"), [(LINF, 0.05), (L2, 0.5), (L1, 3.0)])
def test_batch_size_and_order_change_no_success(
    attack: Attack, norm: float, eps: float, net: nn.Module, images: Tensor
) -> None:
    y = net(images).argmax(1)
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
    whole = run(net, images, y, attack, Threat(norm, eps))
    parts = run(net, images[order], y[order], attack, Threat(norm, eps), batch_size=5)
    assert torch.equal(whole.success[order], parts.success)


def test_fast_with_a_budget_stays_inside_it(net: nn.Module, images: Tensor) -> None:
    y = net(images).argmax(1)
    x_adv = fast(net, images, y, norm=LINF, eps=0.03, generator=torch.Generator().manual_seed(0))
    assert float(distance(x_adv - images, LINF).max()) <= 0.03 + 1e-6
