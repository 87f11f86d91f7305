from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import nn

from sparring import attacks
from sparring.bounds import LinearMap, linear_distance
from sparring.data import Dataset
from sparring.errors import PlanError
from sparring.study import DataFacts, LinearPaths, Plan, lay_out, run
from sparring.study.stages import _linear as classifiers
from sparring.study.stages._linear import mismatches
from sparring.threat import L2


def small_plan(**changes: Any) -> Plan:
    paths = {"l2": [0.01, 1.0], "l1": [0.5, 5.0], "magnitude": [0.5, 0.9], "classes": [0, 1, 2, 3], "eps": [0.2]}
    return Plan.from_table({"name": "small", "data": "digits", "model": "linear", "linear": [{**paths, **changes}]})


@pytest.fixture(scope="module")
def records(few_digits: Dataset, tmp_path_factory: pytest.TempPathFactory) -> list[Any]:
    return run(small_plan(), tmp_path_factory.mktemp("linear"), dataset=few_digits, workers=0)


def test_every_pair_and_all_classes_are_studied(few_digits: Dataset) -> None:
    work = lay_out(small_plan(), DataFacts.of(few_digits))
    groups = [task.table()["classes"] for task in work.tasks.values()]
    assert groups == [[0, 1, 2, 3], *map(list, itertools.combinations(range(4), 2))]
    assert [cell.seed for cell in work.cells] == list(range(7))
    assert len(LinearPaths().groups(10)) == 46


def test_theory_holds_at_every_point(records: list[Any]) -> None:
    assert [record.error for record in records] == [None] * 7
    assert not any(record.flags for record in records)
    for record in records:
        points = record.series["points"]
        assert [p["path"] for p in points] == ["l2", "l2", "l1", "l1", "magnitude", "magnitude"]
        for point in points:
            assert point["r_inf_unboxed"]["0.2"] <= point["r_inf_boxed"]["0.2"] <= point["accuracy"]
            assert point["r_2_unboxed"] <= point["r_2_boxed"] + 1e-9 <= point["r_2_nearest"] * (1 + 1e-4) + 2e-9
            assert (point["theorem"] is None) == (len(record.inputs["classes"]) > 2)
        for point in points[4:]:
            assert point["sparsity"] >= point["step"] - 0.01


def test_the_dense_classifier_is_chosen_on_validation_images(records: list[Any]) -> None:
    for record in records:
        dense = [p for p in record.series["points"] if p["path"] == "l2"]
        assert record.metrics["accuracy_valid"] == max(p["accuracy_valid"] for p in dense)
        chosen = next(p for p in dense if p["step"] == record.metrics["strength"])
        assert chosen["accuracy"] == record.metrics["accuracy"]


def test_what_contradicts_theory_is_told(records: list[Any]) -> None:
    point = records[1].series["points"][0]
    assert mismatches(point) == []
    robust = {"0.2": point["fgsm"]["0.2"] - 0.2}
    assert "FGSM" in mismatches({**point, "fgsm": robust})[0]
    assert "below the exact" in mismatches({**point, "below_deepfool": 0.01})[0]
    for name, word in (("by_means", "means"), ("r_2", "r_2"), ("l1", "nonzero")):
        broken = {**point["theorem"], name: point["theorem"][name] * 100}
        assert any(word in text for text in mismatches({**point, "theorem": broken}))
    low = {**point["theorem"], "markov": {"0.2": 0.0}}
    assert any("Markov" in text for text in mismatches({**point, "theorem": low, "r_inf_unboxed": {"0.2": 0.1}}))


def test_only_what_double_precision_calls_fooled_contradicts_an_exact_distance(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    linear = LinearMap(torch.tensor([[0.0, 1.0], [1.0, 0.0]], dtype=torch.float64), torch.zeros(2, dtype=torch.float64))
    x, y = torch.tensor([[0.25, 0.5]]).reshape(1, 1, 1, 2), torch.tensor([0])
    exact = linear_distance(linear, x, y, L2)
    for short, expected in ((1e-6, 0.0), (-1e-6, 0.5)):
        moved = x + torch.tensor([0.25 - short, 0.0])
        found = attacks.AttackResult(
            x_adv=moved, success=torch.tensor([True]), distance=(moved - x).flatten(1).norm(dim=1),
            clean_correct=torch.tensor([True]), forwards=1.0, backwards=1.0,
            flags=(), seconds=0.0, batch_size=1,
        )  # fmt: skip
        monkeypatch.setattr(classifiers, "_run", lambda *_, found=found: found)
        point = classifiers._attacked(nn.Flatten(), linear, classifiers._Images(x, y), [0.1], 2 * exact * 2**0.5)
        assert point["below_nearest"] == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"l2": []}, "l2 strength"),
        ({"l1": [0.0]}, "above 0"),
        ({"magnitude": [1.0]}, "fraction removed"),
        ({"images": 1}, "2 or more"),
        ({"classes": [3]}, "two or more"),
        ({"loss": "hinge"}, "loss"),
    ],
)
def test_refusals(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(PlanError, match=message):
        small_plan(**changes)


def test_classes_that_the_data_lack_are_refused(few_digits: Dataset) -> None:
    with pytest.raises(PlanError, match="0 to 9"):
        lay_out(small_plan(classes=[3, 10]), DataFacts.of(few_digits))
    with pytest.raises(PlanError, match='model = "linear"'):
        Plan.from_table({"name": "x", "linear": [{}]})
