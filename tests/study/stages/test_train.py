"""Where sparse activations act: in training, in tests, or in both."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from sparring.data import Dataset
from sparring.errors import PlanError, UserError
from sparring.models import build
from sparring.records import Store
from sparring.study import Plan, run
from sparring.study.plans._tables import TrainingSettings
from sparring.study.stages._train import ramped_loss, refuse_constant, training_loss
from sparring.train import Ramped


@pytest.mark.parametrize(("share", "eps"), [(0.125, 0.05), (0.25, 0.1), (0.5, 0.2), (0.75, 0.2), (1.0, 0.2)])
@pytest.mark.parametrize("kind", ["pgd-at", "trades"])
def test_eps_grows_over_the_ramp_and_stays(few_digits: Dataset, kind: str, share: float, eps: float) -> None:
    model = build("mlp", shape=(1, 8, 8), classes=10, mean=few_digits.mean, std=few_digits.std, widths=(16,), seed=0)
    x, y = few_digits.test.x[:8].float() / 255, few_digits.test.y[:8]
    table = TrainingSettings(loss=kind, eps=0.2, ramp=0.5)  # type: ignore[arg-type]
    ramped = ramped_loss(table)
    assert isinstance(ramped, Ramped)
    values = [
        loss(model, x, y, torch.Generator().manual_seed(0))
        for loss in (ramped.at(share), training_loss(replace(table, eps=eps)))
    ]
    assert torch.equal(*values)
    assert not isinstance(ramped_loss(replace(table, ramp=None)), Ramped)


def test_a_constant_network_is_refused_with_the_way_out(few_digits: Dataset, tmp_path: Path) -> None:
    table = {
        "name": "p",
        "data": "digits",
        "model": {"name": "mlp", "widths": [24]},
        "seeds": 1,
        "sparsities": [0.5],
        "recipe": {"epochs": 2, "lr": 50.0},  # the units die in the first epoch
        "finetune": {"epochs": 1},
        "attacks": [{"name": "fgsm", "eps": [0.1]}],
    }
    records = run(Plan.from_table(table), tmp_path, dataset=few_digits, workers=0)
    assert [record.stage for record in records] == ["train"], "nothing is made of it"
    assert "for every validation image" in (records[0].error or "") and "ramp = 0.5" in (records[0].error or "")


def test_a_network_of_several_answers_passes_and_so_does_data_of_one_class(few_digits: Dataset) -> None:
    y = few_digits.valid.y
    constant = torch.zeros(len(y), 10)
    with pytest.raises(UserError, match="every validation image"):
        refuse_constant(constant, y)
    refuse_constant(constant, torch.full((len(y),), 3))
    constant[0, 1] = 1
    refuse_constant(constant, y)


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
    with pytest.raises(PlanError, match="disabled in both training and tests"):
        plan({"kind": "top-k", "levels": [0.5], "test": False})
