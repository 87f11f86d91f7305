"""Which networks attacks go through: torch, or the packed network's sparse kernels where that is faster."""

from __future__ import annotations

from typing import Any

from .settings import Attack

__all__ = ["goes_packed"]

# Fully connected networks that attacks compute by hand (attacks/dense.py), in two matrix products a layer.
BY_HAND = ("linear", "mlp", "lenet-300-100")
# Attacks that ask for one gradient an image at a time; others want whole Jacobians, which the kernels do not compute.
ONE_GRADIENT = ("fgsm", "rfgsm", "pgd", "apgd", "apgd-dlr", "ddn", "nearest", "fast", "cw")
SPARSE_ENOUGH = 0.9


def goes_packed(kernels: str, model: dict[str, Any], sparsity: float | None, attack: Attack) -> bool:
    """Say whether an attack on a network of a plan's sparsity goes through its packed form.

    `kernels` is the plan's: "torch" never, "packed" always, "auto" by this rule, which knows the plan and nothing of
    the machine, so that records do not depend on where they were made.
    """
    if kernels != "auto":
        return kernels == "packed"
    by_hand = model["name"] in BY_HAND or ":" in model["name"]
    return not by_hand and sparsity is not None and sparsity >= SPARSE_ENOUGH and attack.name in ONE_GRADIENT
