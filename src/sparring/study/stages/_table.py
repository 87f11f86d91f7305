"""The table of stages: pure functions of a task's inputs, its parents' tensors and the data set."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from ...facts import ATTACKS, OWN_ATTACK
from ...sparsity import ACTIVATIONS
from ..runner._executors import AnyTask, TaskOutcome, Tell
from ._certify import certify, constants, distances, verdicts
from ._evaluate import attack, lend, measure, transfer
from ._linear import classify_group
from ._networks import Context
from ._ship import pack, ship
from ._train import activate, choose, prune, train

STAGES: dict[str, Callable[[Context, Any], TaskOutcome]] = {
    "train": train,
    "prune": prune,
    "activate": activate,
    "choose": choose,
    "measure": measure,
    "attack": attack,
    "lend": lend,
    "transfer": transfer,
    "certify": certify,
    "lipschitz": constants,
    "exact": distances,
    "verify": verdicts,
    "deploy": pack,
    "ship": ship,
    "linear": classify_group,
}

# Raised when a stage's meaning changes, so that old results are not mistaken for new ones. That includes packed kernels
# that sum in another order: attacks that use them ("kernels" in their inputs) then differ in the last bits.
VERSIONS = dict.fromkeys(STAGES, 1) | {"attack": 3, "certify": 2, "exact": 3, "linear": 3, "ship": 3}
# Raised when the use of transferred examples changes: attacks that have some, from a second parent, are recomputed.
LENDING = 1
# The same for exact distances in l2.
EXACT_L2 = 1
# The same for all attacks on networks that draw, and for the minimum-norm ones among them.
DRAWN, DRAWN_DISTANCES = 1, 1


def versions(stage: str, inputs: Mapping[str, Any]) -> list[int | str]:
    """Return every version that a task with these inputs ever had, the current one last."""
    attack, activation = (
        found if isinstance(found := inputs.get(part), Mapping) else {} for part in ("attack", "activation")
    )
    facts = ATTACKS.get(attack.get("name", ""), OWN_ATTACK)
    revisions = facts.revision if attack else 0
    if stage == "attack" and len(inputs.get("parents", ())) > 1:
        revisions += LENDING + facts.lent
    if stage == "exact" and inputs.get("norm") == "l2":
        revisions += EXACT_L2
    layer, distances = ACTIVATIONS.get(str(activation.get("kind"))), attack.get("eps") is None
    if layer is not None and layer.stochastic:
        revisions += facts.drawn
        if stage == "attack" and attack:
            revisions += DRAWN + (DRAWN_DISTANCES if distances else 0)
    elif layer is not None and layer.masks_gradients and activation.get("test", True):
        revisions += 0 if distances or attack.get("naive") else facts.masked
    return [
        f"{version}.{revision}" if revision else version
        for version in range(1, VERSIONS[stage] + 1)
        for revision in range(revisions + 1)
    ]


def perform_stage(context: Context, task: AnyTask, tell: Tell) -> TaskOutcome:
    """Run one task; `tell` gets the images that are done meanwhile, and their number."""
    return STAGES[task.stage](replace(context, tell=tell), task)
