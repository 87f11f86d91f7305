from __future__ import annotations

import json
import math
import os
import shutil
import signal
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch

from sparring.data import Dataset
from sparring.errors import UserError
from sparring.files import sha256_file
from sparring.records import Store, read_plan
from sparring.study import DataFacts, Event, InProcess, Plan, Processes, Task, TaskOutcome, Tell, execute, lay_out, run
from sparring.study.stages._inputs import Inputs, Network
from sparring.train import _fit as loop


def tiny_plan(**changes: Any) -> Plan:
    table = {
        "name": "tiny",
        "data": "digits",
        "model": {"name": "mlp", "widths": [16]},
        "seeds": 2,
        "sparsities": [0.5, 0.9],
        "recipe": {"epochs": 2, "lr": 0.05},
        "finetune": {"epochs": 2},
        "pruning": [{"label": "magnitude"}],
        "attacks": [
            {"name": "fgsm", "eps": [0.1], "images": 40},
            {"name": "deepfool", "norm": "l2", "images": 40},
        ],
        "shard": 25,
        "batch_size": 10,
    }
    return Plan.from_table({**table, **changes})


def contents(out: Path) -> dict[str, Any]:
    """Return every record without its times, and the bytes of every object."""
    found: dict[str, Any] = {}
    for path in sorted((out / "records").glob("*.json")):
        record = json.loads(path.read_text())
        record.pop("times")
        found[path.name] = record
    for path in sorted((out / "objects").glob("*.safetensors")):
        found[path.name] = path.read_bytes()
    return found


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory, few_digits: Dataset) -> Path:
    out = tmp_path_factory.mktemp("undisturbed")
    records = run(tiny_plan(), out, dataset=few_digits, workers=0)
    assert not [record.error for record in records if record.error]
    return out


def test_a_study_has_every_cell(undisturbed: Path) -> None:
    plan = json.loads((undisturbed / "plan.json").read_text())
    cells = {(c["seed"], c["method"], c["sparsity"]) for c in plan["cells"]}
    methods = [("reference", 0.0), ("control", 0.0), ("magnitude", 0.5), ("magnitude", 0.9)]
    assert cells == {(seed, *method) for seed in (0, 1) for method in methods}
    store = Store(undisturbed)
    stages = {
        (c["method"], record.stage): record
        for c in plan["cells"]
        for key in c["tasks"]
        if (record := store.read(key)) is not None
    }
    assert stages["magnitude", "prune"].metrics["sparsity"] == pytest.approx(0.9, abs=1e-3)
    assert (stages["control", "measure"].metrics["sparsity"] or 0.0) < 0.01


def test_a_second_run_does_nothing(undisturbed: Path, few_digits: Dataset) -> None:
    before = {p: p.stat().st_mtime_ns for p in (undisturbed / "records").iterdir()}
    events: list[Event] = []
    run(tiny_plan(), undisturbed, dataset=few_digits, workers=0, watch=events.append)
    assert events[0].cached == events[0].total and len(events) == 1
    assert before == {p: p.stat().st_mtime_ns for p in (undisturbed / "records").iterdir()}


def test_workers_change_nothing(undisturbed: Path, few_digits: Dataset, tmp_path: Path) -> None:
    run(tiny_plan(), tmp_path, dataset=few_digits, workers=3)
    assert contents(tmp_path) == contents(undisturbed)


def test_a_plan_may_grow(undisturbed: Path, few_digits: Dataset, tmp_path: Path) -> None:
    run(tiny_plan(seeds=1, sparsities=[0.5]), tmp_path, dataset=few_digits, workers=0)
    events: list[Event] = []
    run(tiny_plan(), tmp_path, dataset=few_digits, workers=0, watch=events.append)
    assert events[0].cached > 5
    assert contents(tmp_path) == contents(undisturbed)


def test_another_plan_is_refused(undisturbed: Path, few_digits: Dataset, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="belongs to another plan: its recipe"):
        run(tiny_plan(recipe={"epochs": 3}), undisturbed, dataset=few_digits, workers=0)
    (tmp_path / "records").mkdir()
    (tmp_path / "records" / "x.json").write_text("{}")
    with pytest.raises(UserError, match=r"no plan\.json"):
        run(tiny_plan(), tmp_path, dataset=few_digits, workers=0)


def test_a_folder_in_use_is_refused(few_digits: Dataset, tmp_path: Path) -> None:
    store = Store(tmp_path)
    store.prepare()
    with store.lock(), pytest.raises(UserError, match="another process"), store.lock(wait=0.1):
        pass


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_an_unwritable_folder_is_named(few_digits: Dataset, tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    with pytest.raises(UserError, match="--out"):
        run(tiny_plan(), tmp_path / "x", dataset=few_digits, workers=0)


def test_damaged_files_are_found_set_aside_and_made_again(
    undisturbed: Path, few_digits: Dataset, tmp_path: Path
) -> None:
    run(tiny_plan(), tmp_path, dataset=few_digits, workers=0)
    good = contents(tmp_path)
    objects = sorted((tmp_path / "objects").iterdir())
    records = sorted((tmp_path / "records").iterdir())
    train = next(p for p in records if json.loads(p.read_text())["stage"] == "train")
    weights = tmp_path / "objects" / f"{train.stem}.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"\x00")
    dependents = [p for p in records if train.stem in json.loads(p.read_text())["inputs"].get("parents", [])]
    dependents[0].write_text(dependents[0].read_text()[:50])
    changed = json.loads(dependents[1].read_text())
    changed["metrics"]["accuracy"] = 1.0
    dependents[1].write_text(json.dumps(changed))
    (tmp_path / "objects" / f"{dependents[2].stem}.safetensors").unlink()
    run(tiny_plan(), tmp_path, dataset=few_digits, workers=0)
    assert contents(tmp_path) == good
    assert (tmp_path / "damaged" / weights.name).exists()
    assert len(objects) == len(sorted((tmp_path / "objects").iterdir()))


def test_a_damaged_result_is_found_though_nothing_needs_it(
    undisturbed: Path, few_digits: Dataset, tmp_path: Path
) -> None:
    out = Path(shutil.copytree(undisturbed, tmp_path / "out"))
    attacked = next(p.stem for p in (out / "records").iterdir() if json.loads(p.read_text())["stage"] == "attack")
    path = out / "objects" / f"{attacked}.safetensors"
    path.write_bytes(path.read_bytes()[:-1] + b"\x07")
    events: list[Event] = []
    run(tiny_plan(), out, dataset=few_digits, workers=0, watch=events.append)
    assert events[0].total - events[0].cached == 1 and path.name in events[0].damaged
    assert contents(out) == contents(undisturbed)


def test_plan_json_holds_the_latest_command(undisturbed: Path, few_digits: Dataset, tmp_path: Path) -> None:
    # When a preset's defaults change, the command that made a folder may mean another plan.
    out = Path(shutil.copytree(undisturbed, tmp_path / "out"))
    for command, kept in (("study one", "study one"), ("study two", "study two"), ("", "study two")):
        run(tiny_plan(), out, dataset=few_digits, workers=0, command=command)
        assert read_plan(out) == replace(read_plan(undisturbed), command=kept)
    written = (out / "plan.json").stat().st_mtime_ns
    run(tiny_plan(), out, dataset=few_digits, workers=0, command=kept)
    assert (out / "plan.json").stat().st_mtime_ns == written


@pytest.mark.parametrize("damage", ["{", "[]", None])
def test_a_damaged_plan_json_is_made_again(
    undisturbed: Path, few_digits: Dataset, tmp_path: Path, damage: str | None
) -> None:
    out = Path(shutil.copytree(undisturbed, tmp_path / "out"))
    path = out / "plan.json"
    before = read_plan(out)
    path.write_text(path.read_text().replace("tiny", "tino") if damage is None else damage)
    with pytest.raises(UserError, match=r"plan\.json"):
        read_plan(out)
    events: list[Event] = []
    run(tiny_plan(), out, dataset=few_digits, workers=0, watch=events.append)
    assert events[0].cached == events[0].total and events[0].damaged == ("plan.json",)
    assert read_plan(out) == before and (out / "damaged" / "plan.json").exists()
    path.write_text("{")
    with pytest.raises(UserError, match="records of another plan and a damaged"):
        run(tiny_plan(recipe={"epochs": 1}), out, dataset=few_digits, workers=0)
    assert path.read_text() == "{", "what belongs to another plan is left alone"


def test_a_damaged_checkpoint_is_set_aside(undisturbed: Path, few_digits: Dataset, tmp_path: Path) -> None:
    store = Store(tmp_path)
    trained = read_plan(undisturbed).cells[0].tasks[0]
    with pytest.MonkeyPatch.context() as patch:
        real = loop.save_checkpoint

        def once(state: Any, path: Path) -> None:
            real(state, path)
            raise KeyboardInterrupt

        patch.setattr(loop, "save_checkpoint", once)
        with pytest.raises(KeyboardInterrupt):
            run(tiny_plan(), tmp_path, dataset=few_digits, workers=0)
    path = store.checkpoint(trained)
    content = bytearray(path.read_bytes())
    content[-100] ^= 1  # in the middle of the numbers: a sound file of tensors still
    path.write_bytes(content)
    events: list[Event] = []
    run(tiny_plan(), tmp_path, dataset=few_digits, workers=0, watch=events.append)
    assert events[0].damaged == (path.name,) and (store.damaged / path.name).exists()
    assert contents(tmp_path) == contents(undisturbed)


def test_a_record_says_where_it_comes_from(undisturbed: Path) -> None:
    store, cells = Store(undisturbed), read_plan(undisturbed).cells
    for cell in cells:
        for key in cell.tasks:
            record = store.read(key)
            assert record is not None and record.object is not None
            assert (record.origin["plan"], record.origin["seed"]) == ("tiny", cell.seed)
            assert record.inputs["data"] and {"sparring", "torch", "numpy", "threads"} <= set(record.environment)
            parents = {p: sha256_file(undisturbed / "objects" / f"{p}.safetensors") for p in record.origin["weights"]}
            assert record.origin["weights"] == parents and set(parents) == set(record.inputs.get("parents", []))


def test_what_json_cannot_say_is_no_damage(store: Store) -> None:
    work = lambda task, tell: TaskOutcome({"value": math.nan}, {"splices": [1.0, math.inf]})  # noqa: E731
    execute(_tasks(1), store, InProcess(work))
    (again,) = execute(_tasks(1), store, InProcess(work))
    assert again.metrics == {"value": None} and again.series == {"splices": [1.0, None]} and not store.found_damaged


@dataclass(frozen=True, kw_only=True)
class Numbered(Inputs):
    """The inputs of a task that only has a number."""

    stage = "train"
    i: int
    folder: str = ""


def numbered(i: int, folder: str = "") -> Numbered:
    return Numbered(data="", model=Network(name="linear"), i=i, folder=folder)


def _tasks(count: int) -> list[Task[Numbered]]:
    return [Task(f"{i:032x}", numbered(i), (f"{i - 1:032x}",) if i % 3 else ()) for i in range(count)]


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    found = Store(tmp_path)
    found.prepare()
    yield found


@pytest.mark.parametrize("problem", [ValueError("the user's pruner raised"), SystemExit("the user's pruner raised")])
@pytest.mark.parametrize("workers", [0, 2])
def test_a_failing_task_fails_alone_and_can_be_tried_again(store: Store, workers: int, problem: BaseException) -> None:
    flag = store.out / "mended"

    def work(task: Task[Any], _: Tell) -> TaskOutcome:
        if task.inputs.i == 3 and not flag.exists():
            raise problem
        return TaskOutcome({"value": float(task.inputs.i)})

    def go(retry: bool = False) -> list[Any]:
        executor = Processes(work, workers) if workers else InProcess(work)
        try:
            return execute(_tasks(9), store, executor, retry=retry)
        finally:
            executor.close()

    first = go()
    failed = [r for r in first if r.error]
    assert len(failed) == 1 and "the user's pruner raised" in failed[0].error and Path(__file__).name in failed[0].error
    assert len(first) == 7  # two depend on the failed one
    flag.touch()
    assert len(go()) == 7  # not tried again unasked
    assert [r.metrics["value"] for r in go(retry=True)] == list(range(9))


def test_a_worker_that_dies_is_replaced(store: Store) -> None:
    def work(task: Task[Any], _: Tell) -> TaskOutcome:
        marker = store.out / f"died-{task.inputs.i}"
        if task.inputs.i in (1, 4) and not marker.exists():
            marker.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        if task.inputs.i == 6:
            os.kill(os.getpid(), signal.SIGKILL)
        return TaskOutcome({"value": 1.0}, tensors={"t": torch.arange(3)})

    executor = Processes(work, 2)
    try:
        records = execute(_tasks(9), store, executor)
    finally:
        executor.close()
    assert [r.error is None for r in records] == [True] * 6 + [False]
    assert "crashed 3 times" in (records[-1].error or "")


def test_keys_depend_on_what_matters_and_on_nothing_else() -> None:
    facts = DataFacts("h", 100, 50, (1, 8, 8), 10)
    base = {cell.tasks for cell in lay_out(tiny_plan(), facts).cells}

    def keys(plan: Plan, data: DataFacts = facts) -> set[Any]:
        return {cell.tasks for cell in lay_out(plan, data).cells}

    assert keys(replace(tiny_plan(), name="other", title="x")) == base
    assert keys(tiny_plan(seeds=3)) > base
    relabelled = tiny_plan(pruning=[{"label": "another name"}])
    assert keys(relabelled) == base
    assert not keys(tiny_plan(), DataFacts("other", 100, 50, (1, 8, 8), 10)) & base
    assert not keys(tiny_plan(recipe={"epochs": 2, "lr": 0.04})) & base


def test_shards_cover_the_images_once() -> None:
    work = lay_out(tiny_plan(), DataFacts("h", 100, 50, (1, 8, 8), 10))
    spans = [
        (task.table()["start"], task.table()["stop"])
        for task in work.tasks.values()
        if task.stage == "attack" and task.table()["attack"]["name"] == "fgsm"
    ]
    assert set(spans) == {(0, 25), (25, 40)}


def test_keys_change_with_a_user_s_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import importlib

    module = tmp_path / "scored_by_me.py"
    text = "def score(model, batch=None, *, loss=None, generator=None):\n    return {}\n"
    module.write_text(text)
    monkeypatch.chdir(tmp_path)
    importlib.invalidate_caches()
    plan = tiny_plan(pruning=[{"label": "mine", "score": "scored_by_me:score"}])
    facts = DataFacts("h", 100, 50, (1, 8, 8), 10)

    def keys(stage: str) -> set[str]:
        return {key for key, task in lay_out(plan, facts).tasks.items() if task.stage == stage}

    before = keys("train"), keys("prune")
    module.write_text(text + "# changed\n")
    assert keys("train") == before[0], "the dense networks know nothing of the score"
    assert len(keys("prune") & before[1]) == 2, "only the dense controls stay"


def test_a_model_given_in_code_is_told_from_another(few_digits: Dataset, tmp_path: Path) -> None:
    from torch import nn

    plan = tiny_plan(model="my:net", seeds=1, sparsities=[0.5])
    events: list[Event] = []
    for width in (4, 8):
        net = lambda width=width: nn.Sequential(nn.Flatten(), nn.Linear(64, width), nn.ReLU(), nn.Linear(width, 10))  # noqa: E731
        run(plan, tmp_path, dataset=few_digits, factory=net, workers=0, watch=events.append)
    assert {event.cached for event in events} == {0}
