"""Choose where attacks run: in torch, or on sparse kernels if these are faster."""

from __future__ import annotations

from ...facts import ATTACKS, MODELS, NEVER, OWN_ATTACK
from ..plans._tables import AttackSettings


def goes_packed(kernels: str, model: str, sparsity: float | None, attack: AttackSettings) -> bool:
    """Return whether an attack on a network of a plan's sparsity uses its packed form.

    `kernels` is the plan's: "torch" never, "packed" always, "auto" by this rule, which depends on the plan but not on
    the machine, so that records do not depend on where they were made. It does not apply to a user's own model.
    """
    if kernels != "auto":
        return kernels == "packed"
    if sparsity is None or model not in MODELS:
        return False
    # Attacks have hand-written code for fully connected networks, so there is less to gain.
    return sparsity >= ATTACKS.get(attack.name, OWN_ATTACK).kernels.get(MODELS[model].layers, NEVER)
