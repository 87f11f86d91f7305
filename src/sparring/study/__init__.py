"""Studies: plans, their tasks, and the folder that keeps what they found."""

from __future__ import annotations

from .driver import Event, available_cores, environment, execute, run
from .executors import Executor, InProcess, Outcome, Processes, Task
from .networks import Context
from .plan import Activation, Attack, Certify, Controls, Network, Plan, Pruning, Training, presets
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
    "Executor",
    "InProcess",
    "Network",
    "Outcome",
    "Plan",
    "Processes",
    "Pruning",
    "Record",
    "Store",
    "Task",
    "Training",
    "available_cores",
    "environment",
    "execute",
    "lay_out",
    "perform_stage",
    "presets",
    "run",
]
