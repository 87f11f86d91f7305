"""Studies: plans, their tasks, and the folder that keeps what they found."""

from __future__ import annotations

from .cluster import RayCluster
from .driver import available_cores, register, run, usable_device
from .executors import Executor, InProcess, Outcome, Processes, Task
from .kept import Progress, progress, read_plan
from .linear import LinearPaths
from .live import show_progress
from .merging import Merged, merge
from .networks import Context
from .plan import Plan
from .reading import presets
from .scheduling import Event, Watcher, environment, execute
from .settings import Activation, Attack, Certify, Controls, Exact, Lipschitz, Network, Pruning, Training
from .stages import perform_stage
from .store import SCHEMA, Record, Store
from .tasks import Cell, DataFacts, lay_out
from .watching import to_mlflow, to_tensorboard, what_of

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
