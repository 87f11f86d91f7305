"""Try each pruning method on the untrained network, so that what cannot be is refused before anything runs."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import asdict

from torch import nn
from torch.nn import functional

from ...data import as_float
from ...errors import PlanError, UserError, told
from ...files import load_tensors
from ...models import load_weights_
from ...modes import eval_mode
from ...outputs import opened
from ...sparsity import Batch, CollapsedLayerWarning, all_ones, build_pruner, magnitude
from ..stages._networks import Context, check_fit, network
from ._plan import Plan
from ._tables import PruningSettings


def rehearse(plan: Plan, context: Context) -> None:
    """Raise UserError for a model of the user's own that fails, and for what the plan's network cannot have.

    Only tables that name a structure, layers or a floor can ask for that; other plans of known models pay nothing.
    """
    depending = [p for p in plan.pruning if p.structure or p.layers or p.spare or p.floor or p.c_rate is not None]
    own = context.factory is not None or ":" in plan.model.name or plan.model.weights is not None
    if not depending and not own:
        return
    options = {name: value for name, value in asdict(plan.model).items() if value is not None and name != "weights"}
    model = network(context, {"model": options})
    if own:
        if plan.model.weights is not None:
            tensors = load_tensors(plan.model.weights)
            load_weights_(model, {name: t for name, t in tensors.items() if not name.startswith("sparring/")})
        check_fit(model, context.dataset)
        _try_gradient(model, context)
    train = context.dataset.train
    for pruning in depending:
        try:
            _try(pruning, plan, model, (as_float(train.x[:2]), train.y[:2]))
        except UserError as error:
            raise PlanError(f"pruning method '{pruning.label}': {error}") from error


def _try_gradient(model: nn.Module, context: Context) -> None:
    """Raise UserError for a model that answers but cannot be trained."""
    x, y = (part[:2].to(context.device) for part in context.dataset.train)
    try:
        with eval_mode(model):
            functional.cross_entropy(opened(model, as_float(x))(as_float(x)), y).backward()  # type: ignore[no-untyped-call]
    except Exception as error:  # a user's own code may raise anything
        raise UserError(f"the model gives no gradient: {told(error)}") from error
    model.zero_grad(set_to_none=True)


def _try(pruning: PruningSettings, plan: Plan, model: nn.Module, batch: Batch) -> None:
    grid = pruning.grid(plan.sparsities)
    asked = max((sparsity for sparsity in grid if sparsity is not None), default=None)
    rule, masks = build_pruner(pruning, asked).rule, all_ones(model)
    target = pruning.layers or (pruning.c_rate if asked is None else asked)
    if isinstance(target, Mapping):
        rule.by_layer(masks, target)
    if pruning.c_rate is None and target is not None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", CollapsedLayerWarning)  # these are not the weights that will be pruned
            rule.masks(model, magnitude(model), target, masks=masks, batch=batch)
