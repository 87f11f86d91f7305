"""Read a study of linear classifiers: every classifier on every group of classes, and means over the pairs."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from ...statistics import Effect, pair_effect
from ..analysis._records import Study

Point = Mapping[str, Any]
Value = Callable[[Point], float]
Step = tuple[str, float]  # path, and the strength or sparsity on it
DENSE: Step = ("dense", 0.0)  # of each group, the l_2 strength that validation accuracy chose


@dataclass(frozen=True)
class Group:
    """Hold one loss's classifiers of one group of classes."""

    loss: str
    classes: tuple[int, ...]
    points: Mapping[Step, Point]


@dataclass(frozen=True)
class LinearStudy:
    """Hold all groups; `eps` are the budgets that all losses share, the first of them the one that words speak of."""

    study: Study
    groups: tuple[Group, ...]
    eps: tuple[float, ...]

    @property
    def losses(self) -> tuple[str, ...]:
        """Return the losses in the plan's order."""
        return tuple(dict.fromkeys(group.loss for group in self.groups))

    def pairs(self, loss: str) -> list[Group]:
        """Return a loss's groups of two classes."""
        return [group for group in self.groups if group.loss == loss and len(group.classes) == 2]

    def shown(self, loss: str) -> list[Group]:
        """Return the pairs, or where there are none the loss's other groups."""
        return self.pairs(loss) or [group for group in self.groups if group.loss == loss]

    def together(self, loss: str) -> Group | None:
        """Return a loss's group of all classes, or None."""
        return next((g for g in self.groups if g.loss == loss and len(g.classes) > 2), None)

    def steps(self, loss: str, path: str) -> list[Step]:
        """Return the steps of a path, in the plan's order."""
        first = next((group for group in self.groups if group.loss == loss), None)
        return [step for step in first.points if step[0] == path] if first else []

    def effect(self, loss: str, value: Callable[[Group], float]) -> Effect | None:
        """Return the mean of a value over the pairs, or None without a full set of pairs of four classes at least."""
        pairs = self.pairs(loss)
        images = max((int(group.points[DENSE]["images"]) for group in pairs), default=0)
        try:
            one = pair_effect({(g.classes[0], g.classes[1]): value(g) for g in pairs}, images=images)
            return one.priced(self.study.looks.price)
        except ValueError:
            return None

    def mean(self, loss: str, step: Step, value: Value) -> float:
        """Return the mean over the pairs of a value of one step, NaN without any pair."""
        found = [value(group.points[step]) for group in self.pairs(loss)]
        return sum(found) / len(found) if found else math.nan

    def best(self, loss: str, path: str, value: Value) -> Step | None:
        """Return the step of a path that is best on validation images in the mean over the pairs."""
        return max(self.steps(loss, path), key=lambda s: self.mean(loss, s, lambda p: value(p["valid"])), default=None)


def is_linear(study: Study) -> bool:
    """Tell whether a study's plan is of linear classifiers."""
    return bool(study.plan.get("linear"))


def read_linear(study: Study) -> LinearStudy:
    """Take the groups out of a study's records; what failed or is not there yet is left out."""
    groups = []
    for network in study.networks:
        for record in network.stage("linear"):
            points = {(str(p["path"]), float(p["step"])): p for p in record.series["points"]}
            dense = points["l2", float(record.metrics["strength"] or 0.0)]
            classes = tuple(int(k) for k in record.inputs["classes"])
            groups.append(Group(str(record.inputs["loss"]), classes, {DENSE: dense, **points}))
    eps = [tuple(float(e) for e in table["eps"]) for table in study.plan["linear"]]
    return LinearStudy(study, tuple(groups), tuple(e for e in eps[0] if all(e in other for other in eps)))
