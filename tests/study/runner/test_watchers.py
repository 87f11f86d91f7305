"""Watchers: one line that rewrites itself, TensorBoard and MLflow; no study ends for want of a witness."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from sparring.data import Dataset
from sparring.errors import UserError
from sparring.records import Record
from sparring.study import Event, Watcher, line_of, run, show_progress, to_mlflow, to_tensorboard
from sparring.study.runner._watchers import _forgiving, _numbers

from .test_run import tiny_plan

ATTACK = {"attack": {"name": "pgd", "norm": "linf", "eps": 0.1}}
EVENT = Event(9, 4, 1, 2, (), Record("k", "attack", ATTACK, {"robust_accuracy": 0.25, "x": None}), "seed 0 · m 50.0%")


def test_names_suit_both_tools() -> None:
    assert _numbers(EVENT) == {
        "study/done": 4,
        "study/failed": 2,
        "study/running": 0,
        "seed 0/m 50.0 percent/pgd linf eps 0.1/robust_accuracy": 0.25,
        "seed 0/m 50.0 percent/pgd linf eps 0.1/seconds": 0.0,
    }


def test_a_broken_watcher_warns_once_and_is_left_alone() -> None:
    calls = []

    def broken(event: Event) -> None:
        calls.append(event)
        raise ConnectionError("no route")

    watch = _forgiving(broken, "a server")
    with pytest.warns(RuntimeWarning, match="a server stopped: no route"):
        watch(EVENT)
    watch(EVENT)
    assert len(calls) == 1


MAKERS: dict[str, Callable[[Path], AbstractContextManager[Watcher]]] = {
    "tensorboard": to_tensorboard,
    "mlflow": lambda folder: to_mlflow(folder.as_uri(), "tiny"),
}


@pytest.mark.parametrize("name", MAKERS)
def test_a_missing_package_is_named(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in ("mlflow", "tensorboard", "torch.utils.tensorboard.writer"):
        monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(UserError, match=rf"pip install 'sparring\[{name}\]'"), MAKERS[name](tmp_path):
        pass


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", MAKERS)
def test_a_study_is_seen(name: str, few_digits: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if not importlib.util.find_spec(name):
        pytest.skip(f"the extra '{name}' is not installed")
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    folder = tmp_path / "seen"
    plan = tiny_plan(seeds=1, sparsities=[0.5])
    with MAKERS[name](folder) as watch:
        records = run(plan, tmp_path / "out", dataset=few_digits, workers=0, watch=watch)
    assert _final(name, folder) == {"study/done": float(len(records)), "study/failed": 0.0}


def _final(name: str, folder: Path) -> dict[str, Any]:
    tags = ("study/done", "study/failed")
    if name == "tensorboard":
        from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

        found = EventAccumulator(str(folder))
        found.Reload()
        return {tag: found.Scalars(tag)[-1].value for tag in tags}
    from mlflow import MlflowClient

    client = MlflowClient(tracking_uri=folder.as_uri())
    experiment = client.get_experiment_by_name("sparring")
    (seen,) = client.search_runs([experiment.experiment_id])
    assert seen.info.status == "FINISHED"
    return {tag: seen.data.metrics[tag] for tag in tags}


def told(capsys: pytest.CaptureFixture[str], done: int, record: Record | None, failed: int = 0) -> str:
    label = "seed 0 · magnitude 90.0%"
    show_progress(Event(3, done, 1, failed, (), record, label, estimate=12.3, memory=2**30))
    return capsys.readouterr().err


def test_one_line_rewrites_itself(capsys: pytest.CaptureFixture[str]) -> None:
    first, shard = told(capsys, 1, None), ATTACK | {"start": 0, "stop": 50}
    second = told(capsys, 2, Record("k", "attack", shard, environment={}, times={"seconds": 2.0}))
    assert first.strip() == "[######..............] 1 of 3 tasks, 1.0 GiB, about 13 s left"
    half = "[#############.......] 2 of 3 tasks, 1.0 GiB, about 13 s left · seed 0 · magnitude 90.0% · pgd linf eps 0.1"
    assert second.strip().startswith(half[:100])
    assert first[0] == second[0] == "\r" and len(first) == len(second)


def test_failed_tasks_keep_their_line_and_the_last_line_ends(capsys: pytest.CaptureFixture[str]) -> None:
    text = told(capsys, 3, Record("k", "train", {}, environment={}, times={}, error="diverged"), failed=1)
    kept, line, end = text.split("\n")
    assert kept.strip() == "seed 0 · magnitude 90.0% · train: failed: diverged"
    assert line.strip().startswith("[####################] 3 of 3 tasks, 1 failed, 1.0 GiB") and not end


def test_a_line_for_each_task_has_its_pace() -> None:
    times, shard = {"seconds": 2.0}, ATTACK | {"start": 0, "stop": 50}
    event = replace(EVENT, record=Record("k", "attack", shard, times=times), memory=2**30, estimate=12.3)
    assert line_of(event) == "[4/9] seed 0 · m 50.0% · pgd linf eps 0.1 (2.0 s, 25 images/s), 1.0 GiB, about 13 s left"
    assert line_of(replace(event, record=None)) == "9 tasks, 1 cached; about 13 s left (rough estimate)"
