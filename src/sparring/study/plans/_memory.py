"""Memory that a plan's tasks take, before they begin: the batch size where it is "auto", and a refusal with numbers."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ... import attacks
from ...data import as_float
from ...errors import PlanError, UserError
from ...facts import ATTACKS, OWN_ATTACK
from ...memory import Need, free_memory, measured
from ...modes import eval_mode
from ...outputs import logits_of, opened
from ..stages._inputs import Network
from ..stages._networks import Context, network
from ._plan import AUTO, BATCH_SIZE, Plan

# Copies of its images in single precision that an attack's task holds beside the batch that it works on.
_COPIES = 4


def fitted(plan: Plan, context: Context, workers: int, *, kept: int | None = None) -> Plan:
    """Return the plan with a number for its batch size; raise PlanError where a worker's share of memory is too small.

    `kept`: the number that the plan of an earlier run was given. A network that cannot be run says so in its tasks.
    """
    auto, size = plan.batch_size == AUTO, plan.batch_size if isinstance(plan.batch_size, int) else BATCH_SIZE
    try:
        model, x = network(context, Network.of(plan.model)), as_float(context.dataset.train.x[:1]).to(context.device)
        need, train = _attacking(plan, model, x), _training(plan, model, x)
    except Exception:  # a user's own code may raise anything
        return replace(plan, batch_size=size)
    free = free_memory(context.device) // workers
    try:
        if auto:
            size = kept or attacks.images_at_once(need, free, x.device, most=BATCH_SIZE)
        if plan.attacks:
            need.check(size, free, "an attack")
        if plan.recipe.epochs and plan.model.weights is None:
            train.check(plan.recipe.batch_size, free, "training")
    except UserError as error:
        way = 'a smaller recipe.batch_size, or batch_size = "auto" for attacks'
        way = f"fewer --workers than {workers}, {way}" if workers > 1 else way
        raise PlanError(f"{error} (a worker's share, of {workers}); try {way}") from error
    return replace(plan, batch_size=size)


def _attacking(plan: Plan, model: nn.Module, x: Tensor) -> Need:
    rows = [
        ATTACKS.get(attack.name, OWN_ATTACK).together(eps) for attack in plan.attacks for eps in attack.eps or (None,)
    ]
    with eval_mode(model):
        need = attacks.need_of(opened(model, x), x, rows=max(rows, default=1))
    images = max((min(attack.images, plan.shard) for attack in plan.attacks), default=0)
    return replace(need, fixed=need.fixed + _COPIES * images * x.numel() * x.element_size())


def _training(plan: Plan, model: nn.Module, x: Tensor) -> Need:
    """Measure a step in evaluation mode, which leaves statistics as they are, and add what the optimiser keeps."""

    def work(images: Tensor) -> None:
        label = torch.zeros(len(images), dtype=torch.int64, device=images.device)
        F.cross_entropy(logits_of(model(images)), label).backward()  # type: ignore[no-untyped-call]

    with eval_mode(model):
        need = measured(work, x)
    model.zero_grad(set_to_none=True)
    averages = 1 if plan.recipe.optimizer == "sgd" else 2
    return replace(need, fixed=need.fixed + averages * sum(p.numel() * p.element_size() for p in model.parameters()))
