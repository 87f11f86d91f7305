"""Which networks attacks go through: torch, or the packed network's sparse kernels where that is faster."""

from __future__ import annotations

from typing import Any

from ...models import MODELS
from ..plans._tables import Attack

# As measured (docs/deploy.md): how sparse a network must be for each attack to gain from the kernels. Single steps do
# not make up for packing.
_STEPWISE = (
    *("apgd", "apgd-dlr", "apgd-targeted", "cw", "ddn", "deepfool", "fab", "fab-targeted"),
    *("fast", "nearest", "pgd", "standard"),
)
CONVOLUTIONAL = dict.fromkeys(_STEPWISE, 0.5)
# In wide layers torch is nearer to the machine's peak, so that the kernels gain later.
WIDE = dict.fromkeys(_STEPWISE, 0.8) | {"deepfool": 0.5}
# Attacks compute fully connected networks by hand (attacks/dense.py), which leaves less to gain.
FULLY_CONNECTED = {"apgd": 0.95, "apgd-dlr": 0.95, "ddn": 0.95, "cw": 0.8}
RULES = {"vgg-like": WIDE} | dict.fromkeys(("linear", "mlp", "lenet-300-100"), FULLY_CONNECTED)
NEVER = 1.0


def goes_packed(kernels: str, model: dict[str, Any], sparsity: float | None, attack: Attack) -> bool:
    """Say whether an attack on a network of a plan's sparsity goes through its packed form.

    `kernels` is the plan's: "torch" never, "packed" always, "auto" by this rule, which knows the plan and nothing of
    the machine, so that records do not depend on where they were made. Of a user's own model it knows too little.
    """
    if kernels != "auto":
        return kernels == "packed"
    if sparsity is None or model["name"] not in MODELS:
        return False
    return sparsity >= RULES.get(model["name"], CONVOLUTIONAL).get(attack.name, NEVER)
