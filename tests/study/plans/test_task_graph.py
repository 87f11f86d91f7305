"""Keys of tasks: what a result depends on is in its key, and nothing else."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import sparring
from sparring.data import Dataset
from sparring.facts import ATTACKS
from sparring.files import canonical_json, sha256_bytes
from sparring.records import Cell, Record
from sparring.study import DataFacts, Event, Plan, lay_out, run
from sparring.study.plans._task_graph import is_key_of
from sparring.study.runner import _schedule
from sparring.study.stages import _table as stages

TABLE: dict[str, Any] = {
    "name": "keys",
    "data": "digits",
    "model": {"name": "mlp", "widths": [8]},
    "seeds": 1,
    "sparsities": [0.5],
    "pruning": [{"label": "magnitude"}],
    "attacks": [{"name": name, "norm": "linf", "eps": [0.1]} for name in ("pgd", "fast", "square", "standard")],
}
SMALL = TABLE | {
    "sparsities": [0.5, 0.9],
    "recipe": {"epochs": 1, "lr": 0.05},
    "finetune": {"epochs": 1},
    "attacks": [
        {"name": "pgd", "eps": [0.1], "images": 20, "steps": 2},
        {"name": "fgsm", "eps": [0.1], "images": 20},
    ],
}
FACTS = DataFacts("0" * 64, 100, 100, (1, 8, 8), 10)


def keys_of() -> dict[str, str]:
    tasks = lay_out(Plan.from_table(TABLE), FACTS).tasks
    return {key: task.table().get("attack", {}).get("name", task.stage) for key, task in tasks.items()}


def test_an_attack_that_changed_is_done_again_and_nothing_else(monkeypatch: pytest.MonkeyPatch) -> None:
    def revise(**revisions: int) -> None:
        for name in ("pgd", "fast", "square", "standard"):
            monkeypatch.setitem(ATTACKS, name, replace(ATTACKS[name], revision=revisions.get(name, 0)))

    revise()
    before = lay_out(Plan.from_table(TABLE), FACTS).tasks
    first = keys_of()
    revise(square=1, standard=2)
    second = keys_of()
    assert {name for key, name in second.items() if key not in first} == {"square", "standard"}
    assert len(first) == len(second)
    # What was found before the change stays a record of its task, of whatever revision it was.
    environment = {"sparring": "0.1.0", "torch": torch.__version__}
    assert all(is_key_of(key, task.stage, task.table(), environment) for key, task in before.items())
    revise(standard=1)
    assert {name for key, name in second.items() if key not in keys_of()} == {"square", "standard"}


def made_anew(out: Path, dataset: Dataset) -> list[Record]:
    """Run the plan into a folder and return the records that were not there."""
    events: list[Event] = []
    run(Plan.from_table(SMALL), out, dataset=dataset, workers=0, watch=events.append)
    return [event.record for event in events if event.record is not None]


def test_a_release_makes_nothing_anew_and_a_revision_what_hangs_on_it(
    few_digits: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = made_anew(tmp_path, few_digits)
    assert len(before) == 1 + 3 + 4 * (1 + 2)  # trainings, prunings, measures and attacks
    monkeypatch.setattr(sparring, "__version__", "7.0.0")
    monkeypatch.setattr(_schedule, "__version__", "7.0.0")
    assert made_anew(tmp_path, few_digits) == []
    monkeypatch.setitem(ATTACKS, "pgd", replace(ATTACKS["pgd"], revision=ATTACKS["pgd"].revision + 1))
    attacked = made_anew(tmp_path, few_digits)
    assert {r.environment["sparring"] for r in attacked} == {"7.0.0"}
    assert len(attacked) == 4 and {r.attack["name"] for r in attacked} == {"pgd"}
    monkeypatch.setattr(stages, "VERSIONS", stages.VERSIONS | {"prune": 2})
    pruned = made_anew(tmp_path, few_digits)
    assert Counter(r.stage for r in pruned) == {"prune": 3, "measure": 3, "attack": 6}, "all but what is unpruned"
    monkeypatch.setattr(stages, "VERSIONS", stages.VERSIONS | {"train": 2})
    assert len(made_anew(tmp_path, few_digits)) == len(before), "everything is made from dense networks"
    assert all(is_key_of(r.key, r.stage, r.inputs, r.environment) for r in (*before, *attacked, *pruned))


def test_the_keys_of_the_first_version_are_those_of_today() -> None:
    """Recorded studies are read by these keys: whatever changes them makes every record anew."""
    identity = {"stage": "train", "version": 1, "inputs": {"seed": 0}, "torch": "2.13.0", "device": "cpu"}
    key = sha256_bytes(canonical_json({**identity, "sparring": "0.1.0"}).encode())[:32]
    for version in ("0.1.0", "0.2.0"):
        assert is_key_of(key, "train", {"seed": 0}, {"sparring": version, "torch": "2.13.0"})
    assert not is_key_of(key, "train", {"seed": 1}, {"torch": "2.13.0"})
    assert not is_key_of(key, "train", {"seed": 0}, {"torch": "2.14.0"})


def test_attacks_with_a_surrogate_have_a_revision_of_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    table = TABLE | {"activation": [{"label": "k-winners", "kind": "top-k", "levels": [0.5]}]}

    def tasks() -> dict[str, Any]:
        return lay_out(Plan.from_table(table), FACTS).tasks

    now = tasks()
    monkeypatch.setattr(stages, "LENDING", stages.LENDING + 1)
    new = [task for key, task in tasks().items() if key not in now]
    assert len(new) == 4 and all(len(task.table()["parents"]) == 2 for task in new)


def test_one_attack_with_a_surrogate_is_done_again_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    table = TABLE | {"activation": [{"label": "k-winners", "kind": "top-k", "levels": [0.5]}]}

    def tasks() -> dict[str, Any]:
        return lay_out(Plan.from_table(table), FACTS).tasks

    now = tasks()
    monkeypatch.setitem(ATTACKS, "square", replace(ATTACKS["square"], lent=1))
    new = [task for key, task in tasks().items() if key not in now]
    assert [task.table()["attack"]["name"] for task in new] == ["square"] and len(new[0].table()["parents"]) == 2


def test_one_attack_on_networks_that_draw_is_done_again_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    kinds = [{"kind": "top-k", "levels": [0.5]}, {"kind": "stochastic-pruning", "levels": [1.0]}]

    def tasks() -> dict[str, Any]:
        return lay_out(Plan.from_table(TABLE | {"activation": kinds}), FACTS).tasks

    now = tasks()
    monkeypatch.setitem(ATTACKS, "square", replace(ATTACKS["square"], drawn=1))
    (new,) = [task for key, task in tasks().items() if key not in now]
    assert new.table()["attack"]["name"] == "square" and new.table()["activation"]["kind"] == "stochastic-pruning"


def test_one_attack_on_networks_that_mask_gradients_is_done_again_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    kinds = [
        {"kind": "top-k", "levels": [0.5]},
        {"kind": "stochastic-pruning", "levels": [1.0]},
        {"kind": "shifted-relu", "levels": [0.1]},
        {"label": "trained", "kind": "mean-sparse", "levels": [0.2], "train": True, "test": False},
    ]

    def tasks() -> dict[str, Any]:
        attacks = [{"name": "fast", "norm": "linf", "eps": [0.1]}, {"name": "fast", "norm": "l2"}]
        return lay_out(Plan.from_table(TABLE | {"activation": kinds, "attacks": attacks}), FACTS).tasks

    now = tasks()
    monkeypatch.setitem(ATTACKS, "fast", replace(ATTACKS["fast"], masked=2))
    new = [task for key, task in tasks().items() if key not in now]
    assert [(task.table()["activation"]["kind"], task.table()["attack"]["eps"]) for task in new] == [("top-k", 0.1)]


def test_what_a_plan_lists_twice_counts_once() -> None:
    def cells(times: int) -> list[Cell]:
        fgsm = {"name": "fgsm", "eps": [0.1] * times}
        more: dict[str, Any] = {"activation": [{"kind": "top-k", "levels": [0.5] * times}], "attacks": [fgsm] * times}
        more |= {"checkpoints": ["final"] * times, "controls": {"small_dense": [0.5] * times}}
        return lay_out(Plan.from_table(TABLE | more | {"sparsities": [0.5] * times}), FACTS).cells

    assert cells(2) == cells(1)


def test_distances_on_networks_that_draw_are_measured_again_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    kinds = [{"kind": "top-k", "levels": [0.5]}, {"kind": "stochastic-pruning", "levels": [1.0]}]

    def tasks() -> dict[str, Any]:
        attacks = [*TABLE["attacks"], {"name": "deepfool", "norm": "l2"}]
        return lay_out(Plan.from_table(TABLE | {"activation": kinds, "attacks": attacks}), FACTS).tasks

    now = tasks()
    monkeypatch.setattr(stages, "DRAWN_DISTANCES", stages.DRAWN_DISTANCES + 1)
    new = [task for key, task in tasks().items() if key not in now]
    assert {task.table()["attack"]["name"] for task in new} == {"deepfool"}
    assert {task.table()["activation"]["kind"] for task in new} == {"stochastic-pruning"}


def test_a_ramp_is_part_of_dense_training_alone() -> None:
    def trainings(**ramp: float) -> dict[str, list[dict[str, Any]]]:
        training = {"loss": "pgd-at", "eps": 0.2, **ramp}
        tasks = lay_out(Plan.from_table(TABLE | {"training": training}), FACTS).tasks.values()
        return {s: [t.table()["training"] for t in tasks if t.stage == s] for s in ("train", "prune")}

    without, ramped = trainings(), trainings(ramp=0.5)
    assert ramped["train"] == [one | {"ramp": 0.5} for one in without["train"]]
    assert ramped["prune"] == without["prune"] and len(without["prune"]) >= 2
    assert all("ramp" not in one for one in without["train"] + without["prune"])


@pytest.mark.parametrize("table", ["certify", "lipschitz", "shipped"])
def test_what_narrows_cells_is_no_part_of_a_key(table: str) -> None:
    options = {"radius": 0.1} if table == "lipschitz" else {}
    stage = "ship" if table == "shipped" else table
    labels = [{"label": "magnitude"}, {"label": "random", "score": "random"}]
    plan = TABLE | {"seeds": 2, "sparsities": [0.5, 0.8], "pruning": labels}

    def judged(**narrow: Any) -> dict[tuple[str, float | None, int], str]:
        work = lay_out(Plan.from_table(plan | {table: [options | {"seeds": 2} | narrow]}), FACTS)
        cells = [(cell, key) for cell in work.cells for key in cell.tasks if work.tasks[key].stage == stage]
        return {(cell.method, cell.sparsity, cell.seed): key for cell, key in cells}

    everywhere = judged()
    assert len(everywhere) == 2 * (2 + 2 * 2)
    few = judged(seeds=1, methods=["control", "magnitude"], sparsities=[0.8])
    assert few.keys() == {("control", 0.0, 0), ("magnitude", 0.8, 0)}
    assert judged(methods=["random"]).keys() == {("random", s, seed) for s in (0.5, 0.8) for seed in (0, 1)}
    assert all(everywhere[cell] == key for cell, key in few.items())
