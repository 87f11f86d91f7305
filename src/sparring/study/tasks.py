"""Turn a plan into cells and tasks. A task's key is the hash of all that its result depends on, and of nothing else."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

import torch

from .. import __version__
from ..files import canonical_json, sha256_bytes
from .executors import Task
from .plan import CONTROL, REFERENCE, Attack, Plan, Pruning

__all__ = ["Cell", "DataFacts", "Work", "lay_out"]

# Raised when a stage's meaning changes, so that old results are not taken for new ones.
VERSIONS = {"train": 1, "prune": 1, "measure": 1, "attack": 1, "certify": 1, "deploy": 1}


@dataclass(frozen=True)
class DataFacts:
    """Hold what keys need to know of a data set: its content hash and the sizes of the splits that are attacked."""

    hash: str
    test: int
    valid: int


@dataclass(frozen=True)
class Cell:
    """Name one network of the study and the keys of every task that made or judged it."""

    seed: int
    method: str
    sparsity: float
    axis: str
    tasks: tuple[str, ...]


@dataclass
class Work:
    """Collect tasks by key (shared ones once, parents first) and cells."""

    device: str = "cpu"
    tasks: dict[str, Task] = field(default_factory=dict)
    cells: list[Cell] = field(default_factory=list)

    def add(self, stage: str, inputs: dict[str, Any], *parents: str) -> str:
        """Add a task unless its equal is there, and return its key."""
        inputs = {**inputs, "parents": list(parents)} if parents else inputs
        identity = {
            "stage": stage,
            "version": VERSIONS[stage],
            "inputs": inputs,
            "sparring": __version__,
            "torch": torch.__version__,
            "device": self.device.split(":")[0],
        }
        key = sha256_bytes(canonical_json(identity).encode())[:32]
        self.tasks.setdefault(key, Task(key, stage, inputs, parents))
        return key


def lay_out(plan: Plan, data: DataFacts, *, device: str = "cpu") -> Work:
    """Return every task and cell of a plan, parents before children."""
    work = Work(device)
    shared = {"data": data.hash, "model": _known(asdict(plan.model))}
    for seed in range(plan.seeds):
        dense = work.add(
            "train",
            {**shared, "recipe": asdict(plan.recipe), "training": asdict(plan.training), "seed": seed},
        )
        _judge(work, plan, data, shared, Cell(seed, REFERENCE, 0.0, "weights", (dense,)))
        for method, sparsity, pruning in _networks(plan, seed):
            pruned = work.add(
                "prune",
                {
                    **shared,
                    "recipe": asdict(plan.finetune),
                    "training": asdict(plan.training),
                    "pruning": _method(pruning),
                    "sparsity": sparsity,
                    "seed": seed,
                },
                dense,
            )
            _judge(work, plan, data, shared, Cell(seed, method, sparsity, "weights", (dense, pruned)))
    return work


def _networks(plan: Plan, seed: int) -> list[tuple[str, float, Pruning | None]]:
    """List the networks made from one dense network: the control, then every method at its sparsities."""
    networks: list[tuple[str, float, Pruning | None]] = [(CONTROL, 0.0, None)]
    for pruning in plan.pruning:
        if pruning.seeds is None or seed < pruning.seeds:
            grid = plan.sparsities if pruning.sparsities is None else pruning.sparsities
            networks += [(pruning.label, sparsity, pruning) for sparsity in sorted(grid)]
    return networks


def _judge(work: Work, plan: Plan, data: DataFacts, shared: dict[str, Any], cell: Cell) -> None:
    """Add everything that measures and attacks one network, and its cell."""
    parent = cell.tasks[-1]
    keys = [*cell.tasks, work.add("measure", shared, parent)]
    for attack in plan.attacks:
        if _applies(attack, cell):
            keys += _attack_tasks(work, plan, data, shared, attack, cell.seed, parent)
    work.cells.append(Cell(cell.seed, cell.method, cell.sparsity, cell.axis, tuple(keys)))


def _applies(attack: Attack, cell: Cell) -> bool:
    if attack.seeds is not None and cell.seed >= attack.seeds:
        return False
    if attack.methods is not None and cell.method not in attack.methods:
        return False
    baseline = cell.method in (CONTROL, REFERENCE)
    return attack.sparsities is None or baseline or cell.sparsity in attack.sparsities


def _attack_tasks(
    work: Work, plan: Plan, data: DataFacts, shared: dict[str, Any], attack: Attack, seed: int, parent: str
) -> list[str]:
    """Add one task for each budget and shard of an attack. Shards belong to the plan, never to the workers."""
    images = min(attack.images, data.test if attack.split == "test" else data.valid)
    keys = []
    for eps in attack.eps or (None,):
        for start in range(0, images, plan.shard):
            inputs = {
                **shared,
                "attack": {"name": attack.name, "norm": attack.norm, "eps": eps, **attack.options()},
                "split": attack.split,
                "start": start,
                "stop": min(start + plan.shard, images),
                "batch_size": plan.batch_size,
                "gallery": plan.gallery if start == 0 and attack.split == "test" else 0,
                "seed": seed,
            }
            keys.append(work.add("attack", inputs, parent))
    return keys


def _method(pruning: Pruning | None) -> dict[str, Any] | None:
    """Return what a pruning method depends on: everything but its name and the grid it is run at."""
    if pruning is None:
        return None
    return _known({k: v for k, v in asdict(pruning).items() if k not in ("label", "sparsities", "seeds")})


def _known(options: dict[str, Any]) -> dict[str, Any]:
    """Drop options that are not set, so that a new option leaves old keys as they were."""
    return {name: value for name, value in options.items() if value is not None}
