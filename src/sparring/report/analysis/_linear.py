"""A study of linear classifiers: every classifier on every group of classes, means over pairs, and the ledger."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from ...statistics import Claim, Effect, Question, ask, pair_effect
from ._hypotheses import MARGIN
from ._records import Study

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


PATHS = {"magnitude": "magnitude pruning", "l1": "l1 penalty"}  # the ways to sparsity
NAMES = {**PATHS, "l2": "l2 penalty"}


def r_inf(eps: float, form: str = "boxed") -> Value:
    """Return what reads accuracy within eps off a classifier: "boxed", "unboxed", or "fgsm" as measured."""
    name = form if form == "fgsm" else f"r_inf_{form}"
    return lambda point: float(point[name][f"{eps:g}"])


def r_2(form: str = "boxed") -> Value:
    """Return what reads the mean l_2 distance off a classifier: "boxed", "unboxed", "deepfool" or "nearest"."""
    return lambda point: float(point[f"r_2_{form}"])


def gain(data: LinearStudy, loss: str, step: Step, value: Value, over: Step = DENSE) -> Effect | None:
    """Return the mean over the pairs of one step's gain over another's."""

    def difference(group: Group) -> float:
        return value(group.points[step]) - value(group.points[over])

    return data.effect(loss, difference)


def linear_claims(data: LinearStudy) -> list[Question]:
    """Return the claims, each for every loss and way to sparsity, with its effect, not yet judged."""
    return [
        judged
        for loss in data.losses
        for path in PATHS
        if data.steps(loss, path) and data.pairs(loss)
        for judged in _claims(data, loss, path)
    ]


def _claims(data: LinearStudy, loss: str, path: str) -> Iterator[Question]:
    eps = data.eps[0]
    step, tuned = (data.best(loss, which, r_inf(eps)) for which in (path, "l2"))
    assert step is not None and tuned is not None
    where = f"{loss}, {_place(data, loss, step)}"
    for form, told, text in (
        ("fgsm", "FGSM", "linear: sparsity gains l_inf robustness"),
        ("unboxed", "the theorem's r_inf, unboxed,", "linear: sparsity gains l_inf robustness without the box"),
    ):
        test = f"{where} − dense: {told} at ε = {eps:g}"
        claim = _claim(text, "above", "points", test, loss, primary=form == "fgsm")
        yield ask(claim, _in(100.0, gain(data, loss, step, r_inf(eps, form))))
    test = f"{where} − {_place(data, loss, tuned)}, the dense one best for r_inf: FGSM at ε = {eps:g}"
    text = "linear: the l_inf gain exceeds that of a denser classifier with a tuned l2 penalty"
    claim = _claim(text, "above", "points", test, loss)
    yield ask(claim, _in(100.0, gain(data, loss, step, r_inf(eps, "fgsm"), tuned)))
    step = data.best(loss, path, r_2())
    assert step is not None
    for form, told, text in (
        ("boxed", "r_2, exact,", "linear: sparsity does not gain l_2 robustness"),
        (
            "unboxed",
            "the theorem's r_2, without the box,",
            "linear: sparsity does not gain l_2 robustness without the box",
        ),
    ):
        scale = 100.0 / data.mean(loss, DENSE, r_2(form))
        test = f"{loss}, {_place(data, loss, step)} − dense: {told} % of the dense mean"
        claim = _claim(text, "not above", "%", test, loss, primary=form == "boxed")
        one, *curve = (_in(scale, gain(data, loss, s, r_2(form))) for s in (step, *data.steps(loss, path)))
        yield ask(claim, one, curve=[e for e in curve if e is not None])


def _claim(
    text: str, expects: Literal["above", "not above"], unit: str, test: str, loss: str, *, primary: bool = False
) -> Claim:
    origin: Literal["paper", "this project"] = "paper" if primary else "this project"
    told = f"{test}, paired over digit pairs"
    return Claim(text, expects, MARGIN, unit, told, primary=primary, origin=origin, metric=loss)


def _in(scale: float, one: Effect | None) -> Effect | None:
    return None if one is None else one.scaled(scale)


def sparsity_of(data: LinearStudy, loss: str, step: Step) -> str:
    """Return a step's mean sparsity over the pairs, in words."""
    return f"{100 * data.mean(loss, step, lambda p: float(p['sparsity'])):.3g}%"


def _place(data: LinearStudy, loss: str, step: Step) -> str:
    """Return a step in words; which one it is was chosen on validation images."""
    if step[0] in PATHS:
        return f"{NAMES[step[0]]} at {sparsity_of(data, loss, step)}"
    return f"{NAMES[step[0]]} of strength C = {step[1]:g}"
