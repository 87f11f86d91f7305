"""What kind of network a method's label stands for: read from the plan's tables, never from the words of the label."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from .records import Study, checkpoint_of

__all__ = ["Kind", "kind_of"]

Kind = Literal["pruned", "random", "channels", "surgery", "activations", "small dense", "wide sparse", "tuned decay"]
CONTROLS: tuple[Kind, ...] = ("small dense", "wide sparse", "tuned decay")  # labels that plans may not give


def kind_of(study: Study, method: str) -> Kind:
    """Return a method's kind, whichever its checkpoint."""
    label = method.removesuffix(checkpoint_of(method))
    for control in CONTROLS:
        if label == control:
            return control
    if study.axis(method) == "activations":
        return "activations"
    table: Mapping[str, Any] = next(
        (table for table in study.plan.get("pruning") or () if table.get("label") == label), {}
    )
    if table.get("score") == "random" or table.get("method") == "bernoulli":
        return "random"
    if table.get("structure") == "channels":
        return "channels"
    return "surgery" if table.get("method") == "dns" else "pruned"
