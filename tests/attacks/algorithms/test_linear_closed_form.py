from __future__ import annotations

from functools import partial

import pytest
import torch

from sparring.attacks import (
    Attack,
    apgd,
    apgd_targeted,
    cw,
    ddn,
    deepfool,
    fab,
    fast,
    fgsm,
    hopskipjump,
    nearest,
    pgd,
    robust_accuracy,
    run,
    sigma_zero,
    square,
    standard,
)
from sparring.attacks.algorithms._losses import dlr
from sparring.threat import L0, L1, L2, LINF, Threat

from ..linear_answers import affine_problem, boxed_distance, unboxed_distance


@pytest.mark.parametrize("norm", [L2, LINF, L1])
def test_far_from_the_box_both_closed_forms_agree(norm: float) -> None:
    model, x, y = affine_problem(3, on_box=False)
    # In l_1 all movement goes to one pixel, which arrives at the box first.
    inside = unboxed_distance(model, x, norm) < (0.4 if norm == L1 else 1)
    assert inside.any()
    torch.testing.assert_close(boxed_distance(model, x, y, norm)[inside], unboxed_distance(model, x, norm)[inside])
    on_box, x, y = affine_problem(3, on_box=True)
    assert bool((boxed_distance(on_box, x, y, norm) > unboxed_distance(on_box, x, norm) * 1.01).any())


@pytest.mark.parametrize("norm", [L2, LINF, L1])
def test_deepfool_overshoots_the_exact_distance_by_two_percent(norm: float) -> None:
    model, x, y = affine_problem(0, on_box=False)
    result = run(model, x, y, deepfool, Threat(norm))
    assert result.success.all()
    ratio = result.distance / boxed_distance(model, x, y, norm)
    assert float((ratio - 1.02).abs().max()) <= 1e-3


@pytest.mark.parametrize(("norm", "most"), [(L2, 1.0201), (LINF, 1.0201), (L1, 1.03)])
def test_deepfool_with_pixels_on_the_box(norm: float, most: float) -> None:
    model, x, y = affine_problem(1, on_box=True)
    result = run(model, x, y, deepfool, Threat(norm))
    ratio = (result.distance / boxed_distance(model, x, y, norm))[result.success]
    assert result.success.all()
    assert float(ratio.min()) >= 1 - 1e-6
    assert float(ratio.max()) <= most


MINIMUM_NORM = [
    (nearest, L2),
    (nearest, LINF),
    (nearest, L1),
    (nearest, L0),
    (fab, L2),
    (fab, LINF),
    (fab, L1),
    (partial(ddn, steps=300), L2),
    (partial(cw, searches=9), L2),
]


@pytest.mark.parametrize(("attack", "norm"), MINIMUM_NORM)
@pytest.mark.parametrize("on_box", [True, False])
def test_minimum_norm_attacks_reach_the_exact_distance(attack: Attack, norm: float, on_box: bool) -> None:
    model, x, y = affine_problem(3, images=15, on_box=on_box)
    result = run(model, x, y, attack, Threat(norm))
    ratio = result.distance / boxed_distance(model, x, y, norm)
    assert result.success.all()
    assert float(ratio.min()) >= 1 - 1e-6
    assert float(ratio.max()) <= 1.01


@pytest.mark.parametrize("on_box", [True, False])
def test_sigma_zero_moves_about_as_few_values_as_can_be(on_box: bool) -> None:
    model, x, y = affine_problem(3, images=15, on_box=on_box)
    exact = boxed_distance(model, x, y, L0)
    result = run(model, x, y, partial(sigma_zero, steps=100), Threat(L0))
    assert bool((result.distance >= exact).all()) and result.distance.mean() <= 1.25 * exact.mean()
    within = run(model, x, y, partial(sigma_zero, steps=100), Threat(L0, 1))
    assert torch.equal(within.success, result.distance <= 1) and not {"budget-violation"} & {
        flag.name for flag in within.flags
    }


@pytest.mark.parametrize("attack", [fgsm, pgd, apgd, partial(apgd, objective=dlr), apgd_targeted, fast])
@pytest.mark.parametrize("norm", [LINF, L2, L1])
@pytest.mark.parametrize("on_box", [True, False])
def test_budget_attacks_reach_the_exact_worst_case(attack: Attack, norm: float, on_box: bool) -> None:
    model, x, y = affine_problem(2, on_box=on_box)
    exact = boxed_distance(model, x, y, norm)
    eps = float(exact.median()) * (1 + 1e-4)
    result = run(model, x, y, attack, Threat(norm, eps), generator=torch.Generator().manual_seed(0))
    assert robust_accuracy(result) == float((exact > eps).double().mean())
    assert not result.flags


@pytest.mark.parametrize("on_box", [True, False])
def test_the_standard_ensemble_reaches_the_exact_worst_case_in_l1(on_box: bool) -> None:
    model, x, y = affine_problem(2, on_box=on_box)
    exact = boxed_distance(model, x, y, L1)
    eps = float(exact.median()) * (1 + 1e-4)
    result = run(model, x, y, standard, Threat(L1, eps), generator=torch.Generator().manual_seed(0))
    assert robust_accuracy(result) == float((exact > eps).double().mean())


@pytest.mark.parametrize("on_box", [True, False])
@pytest.mark.parametrize("norm", [L2, LINF])
def test_decision_based_attack_comes_within_ten_percent(norm: float, on_box: bool) -> None:
    model, x, y = affine_problem(4, images=10, on_box=on_box)
    result = run(model, x, y, hopskipjump, Threat(norm), generator=torch.Generator().manual_seed(0))
    ratio = result.distance / boxed_distance(model, x, y, norm)
    assert float(ratio.min()) >= 1 - 1e-6
    assert float(ratio.max()) <= 1.1


@pytest.mark.parametrize(("norm", "slack"), [(LINF, 1.1), (L2, 1.5)])
def test_square_comes_near_the_exact_worst_case(norm: float, slack: float) -> None:
    model, x, y = affine_problem(5, features=64, on_box=False)
    exact = boxed_distance(model, x, y, norm)
    eps = float(exact.max())
    attack = partial(square, queries=1000)
    result = run(model, x.view(-1, 1, 8, 8), y, attack, Threat(norm, eps), generator=torch.Generator().manual_seed(0))
    assert result.success[exact * slack < eps].double().mean() >= 0.95
