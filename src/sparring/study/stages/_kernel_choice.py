"""Choose where attacks run: in torch, or on sparse kernels if these are faster."""

from __future__ import annotations

from ...facts import ATTACKS, MODELS, NEVER, OWN_ATTACK
from ..plans._tables import AttackSettings


def goes_packed(kernels: str, model: str, sparsity: float | None, attack: AttackSettings) -> bool:
    """Say whether an attack on a network of a plan's sparsity goes through its packed form.

    `kernels` is the plan's: "torch" never, "packed" always, "auto" by this rule, which knows the plan and nothing of
    the machine, so that records do not depend on where they were made. Of a user's own model it knows too little.
    """
    if kernels != "auto":
        return kernels == "packed"
    if sparsity is None or model not in MODELS:
        return False
    # Attacks compute fully connected networks by hand, which leaves less to gain.
    return sparsity >= ATTACKS.get(attack.name, OWN_ATTACK).kernels.get(MODELS[model].layers, NEVER)
