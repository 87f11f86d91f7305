"""Where sparse activations act: in training, in tests, or in both."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

import pytest
import torch

from sparring.data import Dataset
from sparring.errors import PlanError
from sparring.models import build
from sparring.study import Plan, Store, run
from sparring.study.fitting import ramped_loss, training_loss
from sparring.study.settings import Training
from sparring.train import Ramped


@pytest.mark.parametrize(("share", "eps"), [(0.125, 0.05), (0.25, 0.1), (0.5, 0.2), (0.75, 0.2), (1.0, 0.2)])
@pytest.mark.parametrize("kind", ["pgd-at", "trades"])
def test_eps_grows_over_the_ramp_and_stays(few_digits: Dataset, kind: str, share: float, eps: float) -> None:
    model = build("mlp", shape=(1, 8, 8), classes=10, mean=few_digits.mean, std=few_digits.std, widths=(16,), seed=0)
    x, y = few_digits.test.x[:8].float() / 255, few_digits.test.y[:8]
    table = asdict(Training(loss=kind, eps=0.2, ramp=0.5))  # type: ignore[arg-type]
    ramped = ramped_loss(table)
    assert isinstance(ramped, Ramped)
    values = [
        loss(model, x, y, torch.Generator().manual_seed(0))
        for loss in (ramped.at(share), training_loss(table | {"eps": eps}))
    ]
    assert torch.equal(*values)
    assert not isinstance(ramped_loss(table | {"ramp": None}), Ramped)


def plan(*activation: dict[str, object]) -> Plan:
    table = {
        "name": "p",
        "data": "digits",
        "model": {"name": "mlp", "widths": [24]},
        "seeds": 1,
        "recipe": {"epochs": 1},
        "finetune": {"epochs": 2},
        "pruning": [],
        "activation": list(activation),
    }
    return Plan.from_table(table)


def test_modules_act_where_they_are_wanted(few_digits: Dataset, tmp_path: Path) -> None:
    part = {"kind": "percentile", "levels": [0.5], "train": True}
    asked = plan({**part, "label": "both"}, {**part, "label": "in training", "test": False})
    records = run(asked, tmp_path, dataset=few_digits, workers=0)
    both, training = (r for r in records if r.stage == "activate")
    assert both.error is None and training.error is None
    store = Store(tmp_path)
    assert any("threshold" in name for name in store.tensors(both.key))
    assert not any("threshold" in name for name in store.tensors(training.key)), "the modules are out again"
    measured = {r.inputs["parents"][0]: r.metrics for r in records if r.stage == "measure"}
    # The weights have moved since the modules went in: the level is that of the network that is judged.
    assert measured[both.key]["activation_sparsity"] == pytest.approx(0.5, abs=0.05)
    assert measured[training.key]["accuracy_valid"] == training.metrics["accuracy_valid"]


def test_a_module_must_act_somewhere() -> None:
    with pytest.raises(PlanError, match="neither in training nor in tests"):
        plan({"kind": "top-k", "levels": [0.5], "test": False})
