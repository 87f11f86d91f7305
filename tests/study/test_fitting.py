"""Where sparse activations act: in training, in tests, or in both."""

from __future__ import annotations

from pathlib import Path

import pytest

from sparring.data import Dataset
from sparring.errors import PlanError
from sparring.study import Plan, Store, run


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
