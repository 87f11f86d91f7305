"""A rule says how scores become masks: over which layers, in which structure, with what floor."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field

from torch import nn

from ..errors import UnknownNameError
from .contracts import Batch, Masks, Scores
from .masks import prunable
from .selection import select
from .structures import Structure, Unstructured

__all__ = ["Rule", "first_and_last"]


@dataclass(frozen=True)
class Rule:
    """Hold the options of `select` that stay the same from step to step.

    `spare` names weights that are never pruned; sparsities are fractions of the other weights.
    """

    scope: str = "global"
    structure: Structure = field(default_factory=Unstructured)
    floor: float = 0.0
    spare: Collection[str] = ()

    def open(self, masks: Masks) -> Masks:
        """Return the masks of the weights that may be pruned."""
        for name in self.spare:
            if name not in masks:
                raise UnknownNameError("layer", name, masks)
        return {name: mask for name, mask in masks.items() if name not in self.spare and mask.dim() > 1}

    def masks(
        self,
        model: nn.Module,
        scores: Scores,
        sparsity: float | Mapping[str, float],
        *,
        masks: Masks,
        batch: Batch | None = None,
        regrow: bool = False,
    ) -> Masks:
        """Return new masks for a model; with `regrow` a weight may come back."""
        within = self.open(masks)
        scores = {name: scores[name] for name in within}
        new = select(
            scores,
            sparsity,
            structure=self.structure,
            scope=self.scope,
            within=None if regrow else within,
            floor=self.floor,
        )
        return {**masks, **new}


def first_and_last(model: nn.Module) -> tuple[str, ...]:
    """Return the names of the first and the last prunable weight, the ones most often spared."""
    names = list(prunable(model))
    return tuple(dict.fromkeys((names[0], names[-1]))) if names else ()
