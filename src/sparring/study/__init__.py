"""Studies: plans, their tasks, and the folder that keeps what they found."""

from __future__ import annotations

from ._merge import Merged, merge
from ._progress import Progress, progress
from .plans._plan import Plan
from .plans._tables import (
    ActivationSettings,
    AttackSettings,
    CertifySettings,
    ControlSettings,
    ExactSettings,
    LinearPaths,
    LipschitzSettings,
    NetworkSettings,
    PruningSettings,
    TrainingSettings,
    configured,
)
from .plans._task_graph import DataFacts, lay_out
from .plans._toml import presets
from .runner._executors import Executor, InProcess, Processes, Task, TaskOutcome
from .runner._live_line import show_progress
from .runner._ray import RayCluster
from .runner._run import available_cores, register, run, usable_device
from .runner._schedule import Event, Watcher, environment, execute
from .runner._trackers import to_mlflow, to_tensorboard, what_of
from .stages._networks import WEIGHTS, Context, check_fit, chosen_images
from .stages._train import ramped_loss, refuse_constant, robust_score

__all__ = [
    "WEIGHTS",
    "ActivationSettings",
    "AttackSettings",
    "CertifySettings",
    "Context",
    "ControlSettings",
    "DataFacts",
    "Event",
    "ExactSettings",
    "Executor",
    "InProcess",
    "LinearPaths",
    "LipschitzSettings",
    "Merged",
    "NetworkSettings",
    "Plan",
    "Processes",
    "Progress",
    "PruningSettings",
    "RayCluster",
    "Task",
    "TaskOutcome",
    "TrainingSettings",
    "Watcher",
    "available_cores",
    "check_fit",
    "chosen_images",
    "configured",
    "environment",
    "execute",
    "lay_out",
    "merge",
    "presets",
    "progress",
    "ramped_loss",
    "refuse_constant",
    "register",
    "robust_score",
    "run",
    "show_progress",
    "to_mlflow",
    "to_tensorboard",
    "usable_device",
    "what_of",
]
