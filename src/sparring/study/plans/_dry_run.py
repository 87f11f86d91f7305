"""Check a plan before it runs: refuse what its network does not support, and estimate the time."""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Iterable, Mapping
from dataclasses import replace

import torch
from torch import nn
from torch.nn import functional as F

from ...data import as_float, check_classes
from ...devices import Place
from ...errors import PlanError, UserError, told
from ...facts import ATTACKS, BOUNDS, LIPSCHITZ, OWN_ATTACK, BoundFacts
from ...memory import check_room
from ...memory_format import channels_last
from ...models import load_weights_, read_weights
from ...modes import eval_mode
from ...outputs import logits_of, opened
from ...sparsity import ACTIVATIONS, Batch, CollapsedLayerWarning, all_ones, build_pruner, magnitude, spared
from ...train import copies_of
from ...units import duration
from ..runner._executors import AnyTask
from ..stages._inputs import (
    Activate,
    Attack,
    Certify,
    Exact,
    Given,
    Inputs,
    Linear,
    Lipschitz,
    Network,
    Shard,
    Ship,
    Train,
    Verify,
)
from ..stages._networks import Context, check_fit, is_untrained, network
from ._plan import Plan
from ._tables import PruningSettings

# Cost of comparing an artefact with its network, as `passes` of facts.
SHIP = 500.0
# How much longer an attack takes on a network that draws: it runs seven times, six of them on means over ten draws,
# which cost little if the first layers do not draw. For LeNet-5 it took 10 (`fast`) to 15 times (DeepFool) as long.
DRAWN = 13.0
BATCH, VALUES, SECONDS = 64, 2**20, 0.3


def rehearse(plan: Plan, context: Context) -> None:
    """Raise UserError for a user's model that fails, and for settings that the plan's network does not support.

    Only tables with a structure, layers or a floor can have these; other plans of known models are not checked.
    """
    _refuse_untrained(plan, context)
    if plan.trains:
        check_classes(context.dataset)
    copies = copies_of(plan.recipe) if plan.trains and context.device == "cpu" else 1
    nowhere = replace(context, place=Place("meta", context.place.dtype))
    check_room(lambda: network(nowhere, Network.of(plan.model)), copies, f"a task with '{plan.model.name}'")
    depending = [p for p in plan.pruning if p.structure or p.layers or p.spare or p.floor or p.c_rate is not None]
    own = context.factory is not None or ":" in plan.model.name or plan.model.weights is not None
    if not depending and not own:
        return
    model = network(context, Network.of(plan.model))
    if own:
        if plan.model.weights is not None:
            load_weights_(model, read_weights(plan.model.weights))
        check_fit(model, context.dataset)
        _try_gradient(model, context)
    train = context.dataset.train
    for pruning in depending:
        try:
            _try(pruning, plan, model, (as_float(train.x[:2]), train.y[:2]))
        except UserError as error:
            raise PlanError(f"pruning method '{pruning.title}': {error}") from error


def _refuse_untrained(plan: Plan, context: Context) -> None:
    """Raise PlanError for dense networks that would never be trained: no epochs, no weights, random initial ones."""
    if plan.recipe.epochs or plan.model.weights is not None or plan.linear:
        return
    if is_untrained(*(network(context, Network.of(plan.model), seed) for seed in (0, 1))):
        raise PlanError(
            "recipe.epochs = 0 trains nothing, so every network would start from random weights; set 1 or more, or "
            "give trained weights as model.weights"
        )


def _try_gradient(model: nn.Module, context: Context) -> None:
    """Raise UserError for a model that returns logits but cannot be trained."""
    x, y = (part[:2].to(context.device) for part in context.dataset.train)
    try:
        with eval_mode(model):
            F.cross_entropy(opened(model, as_float(x))(as_float(x)), y).backward()  # type: ignore[no-untyped-call]
    except Exception as error:  # a user's own code may raise anything
        raise UserError(f"the model gives no gradient: {told(error)}") from error
    model.zero_grad(set_to_none=True)


def _try(pruning: PruningSettings, plan: Plan, model: nn.Module, batch: Batch) -> None:
    grid = pruning.grid(plan.sparsities)
    asked = max((sparsity for sparsity in grid if sparsity is not None), default=None)
    rule, masks = build_pruner(spared(pruning, model), asked).rule, all_ones(model)
    target = pruning.layers or (pruning.c_rate if asked is None else asked)
    if isinstance(target, Mapping):
        rule.by_layer(masks, target)
    if pruning.c_rate is None and target is not None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", CollapsedLayerWarning)  # these are not the weights that will be pruned
            rule.masks(model, magnitude(model), target, masks=masks, batch=batch)


def estimate(tasks: Iterable[AnyTask], context: Context, *, workers: int) -> float | None:
    """Return a rough number of seconds for some tasks, from the speed of the first one's network (half a second).

    None if that network cannot be run: the cells that need it will fail with the reason.
    """
    todo = list(tasks)
    if not todo:
        return 0.0
    try:
        each = _seconds_per_pass(context, todo[0].inputs)
    except Exception:  # a user's factory may raise anything
        return None
    return _passes_in_turn(todo, context, workers) * each


def foretold(tasks: Iterable[AnyTask], context: Context, *, workers: int) -> str:
    """Return a sentence on the time that a plan's training and the rest take, and on what it assumes.

    "" for a plan that trains nothing, or with a network that cannot be run.
    """
    todo = list(tasks)
    trained = [task for task in todo if _is_training(task.inputs)]
    seconds = estimate(todo, context, workers=workers)
    if not trained or seconds is None:
        return ""
    whole, training = (_passes_in_turn(some, context, workers) for some in (todo, trained))
    images = sum(_passes(task.inputs, context) for task in trained)
    shape = "×".join(map(str, context.dataset.train.x.shape[1:]))
    each = f"{whole / seconds:,.0f}" if whole > 10 * seconds else f"{whole / seconds:.2g}"
    return (
        f"training of {len(trained)} networks on {images:,.0f} images, counted once an epoch: about "
        f"{duration(seconds * training / whole)}, with all else {duration(seconds)}. Assumed: {workers} at a time, "
        f"each {each} images/s, as measured on random images of {shape}"
    )


def _is_training(inputs: Inputs) -> bool:
    return isinstance(inputs, Train | Activate) and inputs.recipe is not None and inputs.recipe.epochs > 0


def _passes_in_turn(tasks: Iterable[AnyTask], context: Context, workers: int) -> float:
    """Return the passes of one worker: its share of all, or the longest chain of tasks that wait for each other."""
    ends, total = dict[str, float](), 0.0
    for task in tasks:  # parents come first
        own = _passes(task.inputs, context)
        total += own
        ends[task.key] = own + max((ends.get(parent, 0.0) for parent in task.parents), default=0.0)
    return max([total / max(1, workers), *ends.values()])


def _passes(inputs: Inputs, context: Context) -> float:
    match inputs:
        case Train() | Activate() if inputs.recipe is not None and inputs.recipe.epochs:  # as `_is_training`
            training = inputs.training
            inner = 3 if training.certified else 1 if training.loss == "standard" else training.steps + 1
            return float(len(context.dataset.train.x) * inputs.recipe.epochs * inner)
        case Given() | Train() | Activate():
            return float(len(context.dataset.valid.x))
        case Shard():
            each = ATTACKS.get(inputs.attack.name, OWN_ATTACK).passes * _rounds(inputs)
            return each * float(inputs.stop - inputs.start)
        case Linear(paths=paths):
            classifiers = len(paths.l2) + len(paths.l1) + len(paths.magnitude)
            against = max(1, len(paths.classes or ()) - 1)
            return classifiers * (8.0 * against * paths.train_images + 100.0 * paths.images)
        case Exact(asked=asked):
            return 1e5 * float(asked.images)  # many seconds, if a search reaches its limit
        case Verify(asked=asked):
            return 5.0 * (100 + asked.nodes) * float(asked.images)
        case Certify(asked=asked) | Lipschitz(asked=asked):
            return {**BOUNDS, **LIPSCHITZ}.get(asked.method, BoundFacts()).passes * float(asked.images)
        case Ship():
            return SHIP * float(inputs.images)
    return float(len(context.dataset.test.x)) / 3


def _rounds(inputs: Shard) -> float:
    """Return how much longer an attack takes: it runs again straight through, and over draws if there are any."""
    asked = inputs.activation if isinstance(inputs, Attack) else None
    if asked is None or asked.kind not in ACTIVATIONS:
        return 1.0
    found = ACTIVATIONS[asked.kind](asked.level)
    if found.stochastic:
        return DRAWN
    return 2.0 if found.masks_gradients and not inputs.attack.naive else 1.0


def _seconds_per_pass(context: Context, inputs: Inputs) -> float:
    model = network(context, inputs.model, inputs.initial_seed)
    on_cpu = torch.device(context.device).type == "cpu"  # where many large images take long, and no less time each
    count = min(BATCH, max(8, VALUES // context.dataset.train.x[0].numel())) if on_cpu else BATCH
    x = context.place.images(as_float(context.dataset.train.x[:count]))
    y = context.dataset.train.y[:count].to(context.device)
    threads = torch.get_num_threads()
    # The workers have just started and compete for this core, so only the processor time counts.
    clock = time.process_time if on_cpu else time.perf_counter
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
