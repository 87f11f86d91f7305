"""A study of a network of which not all matrices can be pruned says what share of all of them is gone."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from sparring import report
from sparring.data import Dataset
from sparring.study import Plan, run


class Bare(nn.Module):
    """A matrix that is no layer's weight, and is left dense."""

    def __init__(self) -> None:
        super().__init__()
        self.matrix = nn.Parameter(torch.randn(64, 20) / 8)

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.matrix


PLAN = {
    "name": "p",
    "data": "digits",
    "model": "my:net",
    "recipe": {"epochs": 1},
    "finetune": {"epochs": 1},
    "attacks": [{"name": "fgsm", "eps": [0.1]}],
}


def _partly() -> nn.Module:
    return nn.Sequential(nn.Flatten(), Bare(), nn.ReLU(), nn.Linear(20, 10))


def _wholly() -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 20), nn.ReLU(), nn.Linear(20, 10))


@pytest.mark.parametrize("factory", (_partly, _wholly))
def test_the_total_stands_beside_the_sparsity(factory, few_digits: Dataset, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    table = {**PLAN, "seeds": 2, "sparsities": [0.9]}
    records = run(Plan.from_table(table), tmp_path, dataset=few_digits, factory=factory, workers=0)
    assert not [record.error for record in records if record.error]
    sparse = [r for r in records if r.stage == "measure" and (r.metrics["sparsity"] or 0) > 0.5]
    assert sparse and all(r.metrics["sparsity"] == pytest.approx(0.9, abs=1e-3) for r in sparse)
    text = re.sub(r"<[^>]+>", "", report.write(tmp_path).read_text())
    lines = [line for line in text.splitlines() if "At 90%" in line]
    assert lines
    if factory is _wholly:
        assert not any("sparsity_matrices" in r.metrics for r in records) and "of all matrices" not in text
    else:
        share = 0.9 * 200 / (200 + 64 * 20)
        assert all(r.metrics["sparsity_matrices"] == pytest.approx(share, abs=1e-3) for r in sparse)
        assert all(f"90% (of all matrices {100 * share:.1f}%)" in line for line in lines)


def test_what_an_nm_structure_covers_is_recorded_and_reported(few_digits: Dataset, tmp_path: Path) -> None:
    table = {**PLAN, "seeds": 1, "sparsities": [0.5], "pruning": [{"method": "one-shot", "structure": "2:4"}]}
    records = run(Plan.from_table(table), tmp_path, dataset=few_digits, factory=_partly, workers=0)
    share = 200 / (200 + 64 * 20)
    (found,) = [r.metrics["covered"] for r in records if "covered" in r.metrics]
    assert found == pytest.approx(share)
    text = report.write(tmp_path).read_text()
    assert "Covered by n:m" in text and f">{100 * share:.1f}%<" in text
