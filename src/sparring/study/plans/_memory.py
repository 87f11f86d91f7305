"""Memory of a plan's tasks, checked before they begin: set a batch size of "auto", or refuse with numbers."""

from __future__ import annotations

from dataclasses import replace

from torch import Tensor, nn

from ... import attacks
from ...data import as_float
from ...errors import PlanError, UserError, short_of_memory, told
from ...facts import ATTACKS, OWN_ATTACK
from ...memory import Need, free_memory
from ...modes import eval_mode
from ...outputs import opened
from ...train import step_need
from ..stages._inputs import Network
from ..stages._networks import Context, network
from ..stages._train import ramped_loss
from ._plan import AUTO, BATCH_SIZE, Plan

# Copies of its images in single precision that an attack's task holds besides the current batch.
_COPIES = 4
# Up to these bytes "auto" is what every machine takes, so that their records can be merged.
_LARGE = 2**30


def fitted(plan: Plan, context: Context, workers: int, *, kept: int | None = None) -> Plan:
    """Return the plan with a number for its batch size; raise PlanError if a worker's share of memory is too small.

    `kept`: the number in the plan of an earlier run. A network that cannot be run fails in its tasks.
    """
    if plan.linear:
        return replace(plan, batch_size=BATCH_SIZE)
    auto, size = plan.batch_size == AUTO, plan.batch_size if isinstance(plan.batch_size, int) else BATCH_SIZE
    try:
        model, x = network(context, Network.of(plan.model)), context.place.images(as_float(context.dataset.train.x[:1]))
        need, step = _attacking(plan, model, x), step_need(model, x, plan.recipe, ramped_loss(plan.training))
    except Exception as error:  # a user's own code may raise anything
        if short_of_memory(error):
            raise PlanError(told(error)) from error
        return replace(plan, batch_size=size)
    free = free_memory(context.device) // workers
    try:
        if auto:
            whole = need.of(BATCH_SIZE) <= min(free, _LARGE)
            size = kept or (BATCH_SIZE if whole else attacks.images_at_once(need, free, x.device, most=BATCH_SIZE))
        if plan.attacks:
            need.check(size, free, "an attack")
        recipes = [plan.finetune] if plan.model.weights else [plan.recipe, plan.finetune]
        step.check(max(recipe.batch_size if recipe.epochs else 1 for recipe in recipes), free, "training")
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
