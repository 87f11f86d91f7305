from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from sparring.attacks import audit, check_budgets, check_order, fgsm, nearest, pgd, run
from sparring.draws import Draws
from sparring.errors import UserError
from sparring.threat import LINF, Threat


def unmoved(model, x, y, *, norm, eps=None, targets=None, generator=None):  # type: ignore[no-untyped-def]
    return x


def flags(row) -> list[str]:  # type: ignore[no-untyped-def]
    return [flag.name for flag in row.result.flags]


def test_rows_are_attacks_by_budget_and_then_the_worst_cases(net: nn.Module, images: Tensor) -> None:
    y = net(images).argmax(1)
    rows = audit(net, images, y, {"fgsm": fgsm, "pgd": pgd, "nearest": nearest}, eps=[0.02, 0.05], checks=0, seed=3)
    threats = [(row.attack, row.threat.eps) for row in rows]
    assert threats == [
        ("fgsm", 0.02), ("fgsm", 0.05), ("pgd", 0.02), ("pgd", 0.05), ("nearest", None),
        ("worst case", 0.02), ("worst case", 0.05),
    ]  # fmt: skip
    alone = run(net, images, y, pgd, Threat(LINF, 0.05), generator=Draws.of(3, range(len(y))))
    assert torch.equal(rows[3].result.x_adv, alone.x_adv), "an attack's result does not depend on which others run"
    one, other, worst = (rows[at].result for at in (1, 3, 6))
    assert torch.equal(worst.success, one.success | other.success) and worst.success.any()
    assert bool((net(worst.x_adv).argmax(1) != y)[worst.success].all())
    assert torch.equal(worst.distance.isfinite(), worst.success | ~worst.clean_correct)
    assert worst.forwards == one.forwards + other.forwards and worst.flags == ()


def test_one_attack_is_its_own_worst_case(net: nn.Module, images: Tensor) -> None:
    rows = audit(net, images, net(images).argmax(1), {"fgsm": fgsm}, eps=[0.05], checks=0)
    assert [row.attack for row in rows] == ["fgsm"]


def test_second_opinions_are_flags_of_the_results(net: nn.Module, images: Tensor) -> None:
    y = net(images).argmax(1)
    rows = audit(net, images, y, {"fgsm": fgsm, "pgd": unmoved}, eps=[0.1, 0.2], checks=len(images))
    found = {(row.attack, row.threat.eps): row for row in rows}
    assert "unlimited-budget" in flags(found["pgd", 0.2]) and "unlimited-budget" not in flags(found["pgd", 0.1])
    results = {name: found[name, 0.2].result for name in ("fgsm", "pgd")}
    assert check_order(results)["pgd"][0] in results["pgd"].flags and "weaker-wins" not in flags(found["fgsm", 0.2])


def test_a_budget_outdone_by_a_smaller_one_is_flagged(net: nn.Module, images: Tensor) -> None:
    def timid(model, x, y, *, norm, eps=None, targets=None, generator=None):  # type: ignore[no-untyped-def]
        return pgd(model, x, y, norm=norm, eps=eps) if eps < 0.3 or eps == 1 else x

    rows = audit(net, images, net(images).argmax(1), {"mine": timid}, eps=[0.2, 0.3], checks=2)
    assert check_budgets({row.threat.eps: row.result for row in rows if row.threat.eps})
    assert "weaker-wins" in flags(rows[1]) and "weaker-wins" not in flags(rows[0])


def test_a_budget_attack_without_a_budget_is_refused(net: nn.Module, images: Tensor) -> None:
    with pytest.raises(UserError, match=r"'pgd' needs a budget; give eps, such as eps=\[0.03\]"):
        audit(net, images, net(images).argmax(1), {"pgd": pgd})
