from __future__ import annotations

import pytest
import torch
from linear_answers import affine_problem, boxed_distance

from sparring.attacks import deepfool, fgsm, pgd, robust_accuracy, run
from sparring.threat import L2, LINF, Threat


@pytest.mark.parametrize("norm", [L2, LINF])
def test_deepfool_overshoots_the_exact_distance_by_two_percent(norm: float) -> None:
    model, x, y = affine_problem(0, on_box=False)
    result = run(model, x, y, deepfool, Threat(norm))
    assert result.success.all()
    ratio = result.distance / boxed_distance(model, x, y, norm)
    assert float((ratio - 1.02).abs().max()) <= 1e-3


@pytest.mark.parametrize("norm", [L2, LINF])
def test_deepfool_with_pixels_on_the_box(norm: float) -> None:
    model, x, y = affine_problem(1, on_box=True)
    result = run(model, x, y, deepfool, Threat(norm))
    ratio = (result.distance / boxed_distance(model, x, y, norm))[result.success]
    assert result.success.all()
    assert float(ratio.min()) >= 1 - 1e-6
    assert float(ratio.max()) <= 1.0201


@pytest.mark.parametrize("attack", [fgsm, pgd])
@pytest.mark.parametrize("on_box", [True, False])
def test_budget_attacks_reach_the_exact_worst_case(attack, on_box: bool) -> None:  # type: ignore[no-untyped-def]
    model, x, y = affine_problem(2, on_box=on_box)
    exact = boxed_distance(model, x, y, LINF)
    eps = float(exact.median()) + 1e-5
    result = run(model, x, y, attack, Threat(LINF, eps), generator=torch.Generator().manual_seed(0))
    assert robust_accuracy(result) == float((exact > eps).double().mean())
