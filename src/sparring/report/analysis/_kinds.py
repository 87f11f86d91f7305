"""What kind of network a method's label stands for: read from the plan's tables, never from the words of the label."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

from .._numbers import percent
from ._records import Study, checkpoint_of

Kind = Literal["pruned", "random", "channels", "surgery", "activations", "small dense", "wide sparse", "tuned decay"]
CONTROLS: tuple[Kind, ...] = ("small dense", "wide sparse", "tuned decay")  # labels that plans may not give
_TOLERANCE = 5e-4  # what a unit of a structure, or one weight, makes of a sparsity is not worth a word


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


def sparsity_told(study: Study, method: str, sparsity: float) -> str:
    """Return a sparsity as "90%" or, where less of all weight matrices is gone, as "90% (of all matrices 6.8%)"."""
    return percent(sparsity) + of_all(study, method, [sparsity])


def of_all(study: Study, method: str, sparsities: Sequence[float]) -> str:
    """Return what is gone of all weight matrices, as " (of all matrices 6.8%)", or "" where that is no less.

    A plan's sparsity is of the weights that its pruning may touch; what is gone of all is the mean over seeds.
    """
    told = [gone for s in sparsities if (gone := _gone(study, method, s)) is not None and gone < s - _TOLERANCE]
    if not told or kind_of(study, method) not in ("pruned", "random", "channels", "surgery"):
        return ""
    shares = [f"{100 * gone:.1f}%" for gone in told]
    return f" (of all matrices {f'{shares[0]} to {shares[-1]}' if len(shares) > 2 else ' or '.join(shares)})"


def axis_title(study: Study, *methods: str) -> str:
    """Return "sparsity", or where less of all weight matrices is gone "sparsity, up to 90% (of all matrices 6.8%)"."""
    for method in methods:
        highest = max((network.sparsity for network in study.of(method)), default=0.0)
        if of_all(study, method, [highest]):
            return f"sparsity, up to {sparsity_told(study, method, highest)}"
    return "activation sparsity" if {study.axis(method) for method in methods} == {"activations"} else "sparsity"


def _gone(study: Study, method: str, sparsity: float) -> float | None:
    shares = []
    for network in study.of(method, sparsity):
        total, share = network.metric("sparsity_matrices"), network.metric("sparsity")
        shares += [one for one in (share if total is None else total,) if one is not None]
    return sum(shares) / len(shares) if shares else None
