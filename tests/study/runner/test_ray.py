"""A real Ray cluster on loopback: a head that runs nothing, and two workers of one core."""

from __future__ import annotations

import os
import signal
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from sparring.data import Dataset
from sparring.errors import UserError
from sparring.records import Store
from sparring.study import Context, RayCluster, Task, TaskOutcome, Tell, execute, run

from .test_run import Numbered, contents, numbered, tiny_plan

ray = pytest.importorskip("ray", reason="the extra 'ray' is not installed")

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
]


@pytest.fixture(scope="module")
def cluster() -> Iterator[Any]:
    with warnings.catch_warnings(), pytest.MonkeyPatch.context() as patch:
        warnings.simplefilter("ignore")
        # Workers import what the tests pickle by name.
        root = Path(__file__).parents[3]
        paths = [str(root), os.environ.get("PYTHONPATH", "")]
        patch.setenv("PYTHONPATH", os.pathsep.join(paths))
        patch.setenv("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        # Ray makes workers nice by 15: beside other jobs theirs would not come.
        patch.setenv("RAY_worker_niceness", "0")
        from ray.cluster_utils import Cluster

        small = {"object_store_memory": 80 << 20, "include_dashboard": False}
        found = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, **small})
        nodes = [found.add_node(num_cpus=1, object_store_memory=80 << 20) for _ in range(2)]
        found.wait_for_nodes()
        yield found, nodes
        ray.shutdown()
        found.shutdown()


def test_records_equal_those_of_one_process(cluster: Any, few_digits: Dataset, tmp_path: Path) -> None:
    run(tiny_plan(seeds=1), tmp_path / "ray", dataset=few_digits, ray=cluster[0].address)
    run(tiny_plan(seeds=1), tmp_path / "local", dataset=few_digits, workers=0)
    assert contents(tmp_path / "ray") == contents(tmp_path / "local")
    assert not ray.is_initialized()


def dies_once(context: Context, task: Task[Any], _: Tell) -> TaskOutcome:
    """Kill the worker, once for task 1 and always for task 4; else add one to the parent's tensor."""
    marker = Path(task.inputs.folder) / f"died-{task.inputs.i}"
    if task.inputs.i == 4 or (task.inputs.i == 1 and not marker.exists()):
        marker.touch()
        os.kill(os.getpid(), signal.SIGKILL)
    before = sum(int(context.tensors(key)["t"]) for key in task.parents)
    return TaskOutcome({"value": before + 1.0}, tensors={"t": torch.tensor(before + 1)})


def chain(folder: Path, count: int) -> list[Task[Numbered]]:
    keys = [f"{i:032x}" for i in range(count)]
    return [Task(key, numbered(i, str(folder)), (keys[i - 1],) if i else ()) for i, key in enumerate(keys)]


def test_a_lost_worker_is_replaced_and_a_deadly_task_fails_alone(
    cluster: Any, few_digits: Dataset, tmp_path: Path
) -> None:
    store = Store(tmp_path / "out")
    store.prepare()
    executor = RayCluster(dies_once, Context(few_digits, store.tensors), cluster[0].address)
    try:
        records = execute(chain(tmp_path, 6), store, executor)
    finally:
        executor.close()
    assert [r.metrics.get("value") for r in records] == [1.0, 2.0, 3.0, 4.0, None]
    assert "lost 3 times" in (records[-1].error or "")


@pytest.mark.nightly  # a cluster of its own
def test_a_lost_node_is_survived(cluster: Any, few_digits: Dataset, tmp_path: Path) -> None:
    found, nodes = cluster
    removed = False

    def remove_one(event: Any) -> None:
        nonlocal removed
        if event.done == 3 and not removed:
            removed = True
            found.remove_node(nodes[1], allow_graceful=False)

    plan = tiny_plan(seeds=1)
    run(plan, tmp_path / "ray", dataset=few_digits, ray=found.address, watch=remove_one)
    run(plan, tmp_path / "local", dataset=few_digits, workers=0)
    assert removed and contents(tmp_path / "ray") == contents(tmp_path / "local")


def test_no_cluster_is_said(few_digits: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    with pytest.raises(UserError, match="no Ray cluster at 'nonsense"):
        run(tiny_plan(), tmp_path, dataset=few_digits, ray="nonsense:1:2")
