"""Studies: plans, tasks, and the output folder.

Examples:
    >>> from sparring import study
    >>> plan = study.Plan.load("quick", ["sparsities=[0.5, 0.9]"])
    >>> plan.sparsities
    (0.5, 0.9)
"""

from __future__ import annotations

from ._merge import Merged, merge
from .plans._plan import Plan, configured, presets
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
    VerifySettings,
)
from .plans._task_graph import DataFacts, lay_out
from .runner._executors import Executor, InProcess, Processes, Task, TaskOutcome, Tell, Under
from .runner._ray import RayCluster
from .runner._run import Progress, available_cores, forecast, progress, register, run
from .runner._schedule import Event, Watcher, environment, execute
from .runner._watchers import describe, line_of, rest_of, show_progress, to_mlflow, to_tensorboard
from .stages._networks import Context, check_fit, chosen_images, is_untrained, load_network_, trained
from .stages._train import ramped_loss, refuse_constant, robust_score

__all__ = [
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
    "Tell",
    "TrainingSettings",
    "Under",
    "VerifySettings",
    "Watcher",
    "available_cores",
    "check_fit",
    "chosen_images",
    "configured",
    "describe",
    "environment",
    "execute",
    "forecast",
    "is_untrained",
    "lay_out",
    "line_of",
    "load_network_",
    "merge",
    "presets",
    "progress",
    "ramped_loss",
    "refuse_constant",
    "register",
    "rest_of",
    "robust_score",
    "run",
    "show_progress",
    "to_mlflow",
    "to_tensorboard",
    "trained",
]
