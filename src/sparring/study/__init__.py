"""Studies: plans, their tasks, and the folder that keeps what they found."""

from __future__ import annotations

from ._merge import Merged, merge
from ._plan_file import Progress, progress, read_plan
from ._store import SCHEMA, Record, Store
from .plans._linear import LinearPaths
from .plans._plan import Plan
from .plans._tables import Activation, Attack, Certify, Controls, Exact, Lipschitz, Network, Pruning, Training
from .plans._task_graph import Cell, DataFacts, lay_out
from .plans._toml import presets
from .runner._executors import Executor, InProcess, Outcome, Processes, Task
from .runner._live_line import show_progress
from .runner._ray import RayCluster
from .runner._run import available_cores, register, run, usable_device
from .runner._schedule import Event, Watcher, environment, execute
from .runner._trackers import to_mlflow, to_tensorboard, what_of
from .stages._networks import Context
from .stages._table import perform_stage

__all__ = [
    "SCHEMA",
    "Activation",
    "Attack",
    "Cell",
    "Certify",
    "Context",
    "Controls",
    "DataFacts",
    "Event",
    "Exact",
    "Executor",
    "InProcess",
    "LinearPaths",
    "Lipschitz",
    "Merged",
    "Network",
    "Outcome",
    "Plan",
    "Processes",
    "Progress",
    "Pruning",
    "RayCluster",
    "Record",
    "Store",
    "Task",
    "Training",
    "Watcher",
    "available_cores",
    "environment",
    "execute",
    "lay_out",
    "merge",
    "perform_stage",
    "presets",
    "progress",
    "read_plan",
    "register",
    "run",
    "show_progress",
    "to_mlflow",
    "to_tensorboard",
    "usable_device",
    "what_of",
]
