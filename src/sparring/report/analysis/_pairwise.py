"""Methods held against one another at the same sparsity: what it is worth to choose the weights well."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from ...records import Checkpoint
from ...statistics import Effect, holm
from .. import _numbers as numbers
from ._findings import Findings, difference
from ._metrics import Measure


@dataclass(frozen=True)
class Duel:
    """Hold one metric's paired difference between a method and another at one sparsity, in points or per cent.

    `p` is corrected by Holm over all duels of a study.
    """

    measure: Measure
    sparsity: float
    method: str
    against: str
    effect: Effect
    p: float

    @property
    def significant(self) -> bool:
        """Tell whether the difference is; one network of each says nothing of methods."""
        return self.p <= 0.05 and self.effect.seeds > 1


def yardstick(findings: Findings, checkpoint: Checkpoint = "final") -> str | None:
    """Return the method that others are held against: random masks, or without them the headline's method."""
    here = [m for m in _methods(findings) if findings.study.checkpoint(m) == checkpoint]
    masks = [m for m in here if findings.study.kind(m) == "random"]
    return next((m for m in (*masks, findings.method) if m in here), None)


def duels(findings: Findings) -> list[Duel]:
    """Return every main metric of every pruned network against its yardstick at the same sparsity, sparsest last."""
    found = sorted(_duels(findings), key=lambda duel: duel.sparsity)
    corrected = map(float, holm([duel.effect.p for duel in found])) if found else ()
    return [replace(duel, p=p) for duel, p in zip(found, corrected, strict=True)]


def _duels(findings: Findings) -> Iterator[Duel]:
    for method in _methods(findings):
        against = yardstick(findings, findings.study.checkpoint(method))
        if against is None or against == method:
            continue
        shared = {n.sparsity for n in findings.study.of(method)} & {n.sparsity for n in findings.study.of(against)}
        for sparsity in sorted(shared):
            for measure in findings.main:
                one = difference(findings, measure, (method, sparsity), (against, sparsity))
                other = findings.result(measure, against)
                if one is None or other is None or sparsity not in other.sparsities:
                    continue
                level = other.levels[other.sparsities.index(sparsity)]
                if numbers.gain_unit(measure, level) != numbers.ABSOLUTE:
                    yield Duel(measure, sparsity, method, against, numbers.shown(measure, one, level), one.p)


def _methods(findings: Findings) -> list[str]:
    return [m for m in findings.study.methods if findings.study.axis(m) == "weights"]
