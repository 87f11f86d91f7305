"""The stages of a study by name: each a pure function of a task's inputs, its parents' tensors and the data set."""

from __future__ import annotations

from collections.abc import Callable

from .classifiers import classify_group
from .executors import Outcome, Task
from .fitting import activate, choose, prune, train
from .judging import attack, measure, transfer
from .networks import Context
from .proving import certify, constants, distances
from .shipping import pack, ship

__all__ = ["STAGES", "VERSIONS", "perform_stage"]

STAGES: dict[str, Callable[[Context, Task], Outcome]] = {
    "train": train,
    "prune": prune,
    "activate": activate,
    "choose": choose,
    "measure": measure,
    "attack": attack,
    "transfer": transfer,
    "certify": certify,
    "lipschitz": constants,
    "exact": distances,
    "deploy": pack,
    "ship": ship,
    "linear": classify_group,
}

# Raised when a stage's meaning changes, so that old results are not taken for new ones. That includes packed kernels
# that sum in another order: attacks that go through them ("kernels" in their inputs) then end in other bits.
VERSIONS = dict.fromkeys(STAGES, 1) | {"attack": 3, "exact": 2}


def perform_stage(context: Context, task: Task) -> Outcome:
    """Run one task."""
    return STAGES[task.stage](context, task)
