"""Guess how long a plan will take here, from one short measurement and what each stage does per image."""

from __future__ import annotations

import math
import time
from collections.abc import Iterable
from typing import Any

import torch
from torch.nn import functional as F

from ...data import as_float
from ...facts import ATTACKS, BOUNDS, LIPSCHITZ, OWN_ATTACK, BoundFacts
from ...memory_format import channels_last
from ...outputs import logits_of
from ...sparsity import ACTIVATIONS
from ..runner._executors import Task
from ..stages._networks import Context, network

# What holding an artefact against its network takes, as `passes` of facts.
SHIP = 500.0
# How much longer an attack takes on a network that draws: seven times it starts, six of them on means over ten draws,
# of which a network whose first layers do not draw makes little. LeNet-5's took 10 (`fast`) to 15 times (DeepFool).
DRAWN = 13.0
BATCH, SECONDS = 64, 0.3


def estimate(tasks: Iterable[Task], context: Context, *, workers: int) -> float | None:
    """Return a rough number of seconds for some tasks, from the speed of the first one's network (half a second).

    None where that network cannot be run: the cells that need it will fail and say why.
    """
    todo = list(tasks)
    if not todo:
        return 0.0
    try:
        each = _seconds_per_pass(context, todo[0])
    except Exception:  # a user's factory may raise anything
        return None
    return sum(_passes(task, context) for task in todo) * each / max(1, workers)


def _passes(task: Task, context: Context) -> float:
    inputs = task.inputs
    if task.stage in ("train", "prune", "activate"):
        epochs = (inputs.get("recipe") or {"epochs": 0})["epochs"]
        if not epochs:
            return float(len(context.dataset.valid.x))
        inner = inputs["training"]["steps"] + 1 if inputs["training"]["loss"] != "standard" else 1
        return float(len(context.dataset.train.x) * epochs * inner)
    if task.stage in ("attack", "lend", "transfer"):
        each = ATTACKS.get(inputs["attack"]["name"], OWN_ATTACK).passes * _rounds(inputs)
        return each * float(inputs["stop"] - inputs["start"])
    if task.stage == "linear":
        classifiers = sum(len(inputs[path]) for path in ("l2", "l1", "magnitude"))
        against = max(1, len(inputs["classes"]) - 1)
        images: float = 8.0 * against * inputs["train_images"] + 100.0 * inputs["images"]
        return classifiers * images
    if task.stage == "exact":
        return 1e5 * float(inputs["images"])  # seconds on end, where a search runs into its limit
    if task.stage in ("certify", "lipschitz", "ship"):
        each = SHIP if task.stage == "ship" else {**BOUNDS, **LIPSCHITZ}.get(inputs["method"], BoundFacts()).passes
        return each * float(inputs["images"])
    return float(len(context.dataset.test.x)) / 3


def _rounds(inputs: dict[str, Any]) -> float:
    """Return how much longer an attack takes: it goes again straight through, and over many draws where they differ."""
    asked = inputs.get("activation")
    module = ACTIVATIONS.get(asked["kind"]) if asked else None
    if asked is None or module is None:
        return 1.0
    found = module(asked["level"])
    if found.stochastic:
        return DRAWN
    return 2.0 if found.masks_gradients and not inputs["attack"].get("naive") else 1.0


def _seconds_per_pass(context: Context, task: Task) -> float:
    model = network(context, task.inputs)
    x = as_float(context.dataset.train.x[:BATCH]).to(context.device)
    y = context.dataset.train.y[:BATCH].to(context.device)
    threads = torch.get_num_threads()
    # The workers have just begun and want this core too, so that what counts is the time it was given.
    clock = time.process_time if torch.device(context.device).type == "cpu" else time.perf_counter
    torch.set_num_threads(1)
    try:
        with channels_last(model):
            F.cross_entropy(logits_of(model(x)), y).backward()  # type: ignore[no-untyped-call]
            began, fastest = clock(), math.inf
            while (start := clock()) - began < SECONDS:
                F.cross_entropy(logits_of(model(x)), y).backward()  # type: ignore[no-untyped-call]
                fastest = min(fastest, clock() - start)
            return fastest / len(x)
    finally:
        torch.set_num_threads(threads)
