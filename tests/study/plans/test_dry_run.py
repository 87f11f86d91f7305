"""What a network cannot have is refused before anything runs."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from sparring.data import Dataset, Split
from sparring.errors import PlanError
from sparring.models import build
from sparring.sparsity import LeftDenseWarning
from sparring.study import Context, Plan, forecast, run
from sparring.study.plans import _dry_run, _memory
from sparring.study.plans._dry_run import rehearse


def plan(**pruning: Any) -> Plan:
    model = {"name": "mlp", "widths": [30, 16]}
    return Plan.from_table({"name": "p", "data": "digits", "model": model, "sparsities": [0.5], "pruning": [pruning]})


@pytest.mark.parametrize(
    ("pruning", "message"),
    [
        ({"structure": "blocks-4x4"}, r"not whole blocks of 4 × 4"),
        ({"spare": ["nope"]}, r"unknown layer 'nope'"),
        ({"layers": {"nope": 0.5}}, r"unknown layer 'nope'"),
        ({"method": "dns", "c_rate": {"nope": 0.5}}, r"unknown layer 'nope'"),
        ({"floor": 0.8}, r"structure and floor protect"),
    ],
)
def test_it_is_refused_with_the_methods_name(few_digits: Dataset, pruning: dict[str, Any], message: str) -> None:
    with pytest.raises(PlanError, match=rf"pruning method 'mine'.*{message}"):
        rehearse(plan(label="mine", **pruning), Context(few_digits, lambda key: {}))


def test_channels_by_hand_must_fit_the_network(few_digits: Dataset) -> None:
    context, names = Context(few_digits, lambda key: {}), ("2.weight", "4.weight", "6.weight")
    with pytest.raises(PlanError, match=r"'6\.weight' keeps all its channels"):
        rehearse(plan(structure="channels", layers=dict.fromkeys(names, 0.5)), context)
    rehearse(plan(structure="channels", layers=dict(zip(names, (0.5, 0.5, 0.0), strict=True))), context)


def test_a_plan_says_before_the_images_are_decoded_how_long_it_trains(
    few_digits: Dataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_dry_run, "_seconds_per_pass", lambda *_: 0.001)
    count = 1_281_167
    train = Split(few_digits.train.x[:1].expand(count, -1, -1, -1), torch.arange(count) % 10)
    large = replace(few_digits, train=train)
    asked = Plan.from_table(plan().table() | {"seeds": 1, "recipe": {"epochs": 90}, "finetune": {"epochs": 10}})
    # The pruned network and the control are trained at once, after the dense one: 100 epochs of 1,281 s in turn.
    said = forecast(asked, large, workers=4)
    assert "training of 3 networks on 140,928,370 images, counted once an epoch: about 35.6 h, with all else" in said
    assert "Assumed: 4 at a time, each 1,000 images/s, as measured on random images of 1×8×8" in said
    assert "about 39.1 h" in forecast(asked, large, workers=1)
    monkeypatch.setattr(_memory, "free_memory", lambda _: 1000)
    with pytest.raises(PlanError, match="a worker's share, of 4"):
        forecast(asked, large, workers=4)


def test_networks_that_nothing_would_train_are_refused(few_digits: Dataset) -> None:
    untrained = Plan.from_table(plan().table() | {"recipe": {"epochs": 0}, "finetune": {"epochs": 1}})
    with pytest.raises(PlanError, match=r"recipe.epochs = 0 trains nothing"):
        rehearse(untrained, Context(few_digits, lambda key: {}))
    fixed = build("mlp", shape=(1, 8, 8), classes=10, mean=(0.0,), std=(1.0,), widths=(16,))
    rehearse(untrained, Context(few_digits, lambda key: {}, factory=lambda: copy.deepcopy(fixed)))  # as if trained


def test_nothing_is_written_for_a_plan_that_is_refused(few_digits: Dataset, tmp_path: Path) -> None:
    with pytest.raises(PlanError):
        run(plan(structure="blocks-4x4"), tmp_path, dataset=few_digits, workers=0)
    assert not list(tmp_path.rglob("*.json"))


def test_a_plan_may_ask_for_n_of_m_and_for_layers_by_hand(few_digits: Dataset, tmp_path: Path) -> None:
    layers = {"2.weight": 0.75, "4.weight": 0.2}
    quick = {"seeds": 1, "recipe": {"epochs": 1}, "finetune": {"epochs": 1}, "model": {"name": "mlp", "widths": [16]}}
    table = {"pruning": [{"structure": "2:4", "label": "half"}, {"layers": layers, "label": "by hand"}]}
    records = run(Plan.from_table(plan().table() | quick | table), tmp_path, dataset=few_digits, workers=0)
    half, by_hand = [r for r in records if r.stage == "prune" and r.inputs["pruning"] is not None]
    assert half.error is None and half.metrics["sparsity"] == 0.5
    assert by_hand.error is None and by_hand.inputs["sparsity"] is None
    assert by_hand.metrics["sparsity"] == pytest.approx((0.75 * 64 * 16 + 0.2 * 16 * 10) / (64 * 16 + 16 * 10))


def test_layers_without_whole_groups_are_named(few_digits: Dataset) -> None:
    with pytest.warns(LeftDenseWarning, match=r"30 inputs"):
        rehearse(plan(label="mine", structure="2:4"), Context(few_digits, lambda key: {}))
