"""Studies: plans, their tasks, and the folder that keeps what they found."""

from __future__ import annotations

from .cluster import RayCluster
from .driver import available_cores, run
from .executors import Executor, InProcess, Outcome, Processes, Task
from .linear import LinearPaths
from .networks import Context
from .plan import Plan
from .reading import presets
from .scheduling import Event, Watcher, environment, execute
from .settings import Activation, Attack, Certify, Controls, Exact, Lipschitz, Network, Pruning, Training
from .stages import perform_stage
from .store import SCHEMA, Record, Store
from .tasks import Cell, DataFacts, lay_out

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
    "Network",
    "Outcome",
    "Plan",
    "Processes",
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
    "perform_stage",
    "presets",
    "run",
]
