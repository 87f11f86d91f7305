"""Run tasks on a Ray cluster. Data and tensors use its object store, so no shared file system is needed.

Only the driver writes to the output folder. Ray retries a task elsewhere when its worker or node is lost.
"""

from __future__ import annotations

import signal
import threading
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import replace
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from ... import __version__
from ...data import Dataset
from ...devices import Place
from ...errors import UserError
from ..stages._networks import Context, Factory
from ._executors import MAX_DEATHS, AnyTask, Done, TaskOutcome, Tell, Under, ignore, perform

Stage = Callable[[Context, AnyTask, Tell], TaskOutcome]
# Parents' tensors kept in the object store, besides those of running tasks; Ray spills to disk beyond its size.
KEPT_PARENTS = 256
# Tasks in the cluster per core (or GPU), so that a worker need not wait for the driver to write the last result.
QUEUED = 2


class RayCluster:
    """Run tasks on a cluster at `address` ("auto": the one on this machine), each on one core or one GPU.

    Raises UserError if Ray is not installed, if there is no cluster, or (from `wait`) if a node has other versions of
    sparring or torch, which would lead to other records.
    """

    def __init__(self, stage: Stage, context: Context, address: str) -> None:
        self.ray, self.ours = _connected(address)
        self.stage, self.context = stage, context
        self.hear: Callable[[Under], None] = ignore  # what runs elsewhere is not heard of before its end
        self.gpu = context.device != "cpu"
        resources: dict[str, Any] = {"num_gpus": 1} if self.gpu else {}
        self.perform = self.ray.remote(_perform).options(
            num_cpus=1, max_retries=MAX_DEATHS - 1, retry_exceptions=False, **resources
        )
        self.shared = self.ray.put(
            (stage, context.dataset, context.factory, replace(context.place, device=context.device.partition(":")[0]))
        )
        self.parents: OrderedDict[str, Any] = OrderedDict()
        self.pending: dict[Any, AnyTask] = {}

    @property
    def slots(self) -> int:
        """Return the number of tasks to run at once now, because the cluster may grow and shrink."""
        units = self.ray.cluster_resources().get("GPU" if self.gpu else "CPU", 1)
        return max(1, int(units)) * QUEUED

    def submit(self, task: AnyTask) -> None:
        parents = [self._parent(key) for key in task.parents]
        self.pending[self.perform.remote(task, _versions(), self.shared, *parents)] = task

    def wait(self) -> list[Done]:
        self.ray.wait(list(self.pending), num_returns=1)
        ready, _ = self.ray.wait(list(self.pending), num_returns=len(self.pending), timeout=0)
        return [self._collect(reference) for reference in ready]

    def close(self) -> None:
        """Cancel running tasks, and leave the cluster as it was."""
        for reference in self.pending:
            self.ray.cancel(reference, force=True)
        self.pending.clear()
        self.parents.clear()
        if self.ours:
            self.ray.shutdown()

    def _parent(self, key: str) -> Any:
        """Return a reference to a parent's tensors, which the driver reads from its folder."""
        if key not in self.parents:
            self.parents[key] = self.ray.put(self.context.tensors(key))
        self.parents.move_to_end(key)
        while len(self.parents) > KEPT_PARENTS:
            self.parents.popitem(last=False)
        return self.parents[key]

    def _collect(self, reference: Any) -> Done:
        task = self.pending.pop(reference)
        try:
            done: Done = self.ray.get(reference)
        except UserError:  # the node cannot run any task
            raise
        except self.ray.exceptions.RayError as problem:
            reason = str(problem).strip().split("\n")[0]
            return Done(task, None, f"its worker was lost {MAX_DEATHS} times: {type(problem).__name__}: {reason}", 0.0)
        return done


def _perform(
    task: AnyTask,
    versions: tuple[str, str],
    shared: tuple[Stage, Dataset, Factory | None, Place],
    *parents: dict[str, Tensor],
) -> Done:
    """Run one task on whatever node this is."""
    if versions != _versions():
        raise UserError(
            f"a node of the cluster has sparring {_versions()[0]} and torch {_versions()[1]}, the driver "
            f"{versions[0]} and {versions[1]}; install the same versions on all nodes"
        )
    stage, dataset, factory, place = shared
    context = Context(dataset, dict(zip(task.parents, parents, strict=True)).__getitem__, None, place, factory)
    return perform(lambda task, tell: stage(context, task, tell), task)


def _versions() -> tuple[str, str]:
    return __version__, torch.__version__


def _connected(address: str) -> tuple[ModuleType, bool]:
    """Return the module ray, connected, and whether it was not before."""
    try:
        import ray
    except ImportError:
        raise UserError("--ray needs the package ray: pip install 'sparring[ray]', on every node") from None
    if ray.is_initialized():
        return ray, False
    main = threading.current_thread() is threading.main_thread()
    before = signal.getsignal(signal.SIGTERM)
    try:
        ray.init(address=address, log_to_driver=False, logging_level="ERROR")
    except (ConnectionError, RuntimeError, ValueError, TimeoutError) as error:
        reason = str(error).strip().split("\n")[0]
        raise UserError(
            f"no Ray cluster at '{address}' ({reason}); start one with `ray start --head`, or omit --ray"
        ) from error
    if main and before is not None:
        signal.signal(signal.SIGTERM, before)  # Ray's own handler would end the driver silently
    return ray, True
