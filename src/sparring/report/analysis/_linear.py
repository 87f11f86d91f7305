"""Linear studies: every classifier on every group of classes, means over pairs, and the ledger."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from ...statistics import Claim, Effect, Expects, Origin, Question, ask, pair_effect
from ._claims import MARGIN
from ._records import Study

Point = Mapping[str, Any]
Value = Callable[[Point], float]
Step = tuple[str, float]  # path, and a strength or sparsity on it
PATHS = {"magnitude": "magnitude pruning", "l1": "ℓ1 penalty"}  # the ways to sparsity
NAMES = {**PATHS, "l2": "ℓ2 penalty"}
DENSE: Step = ("dense", 0.0)  # for each group, the ℓ2 strength chosen by validation accuracy


@dataclass(frozen=True)
class Group:
    """One loss's classifiers of one group of classes."""

    loss: str
    classes: tuple[int, ...]
    points: Mapping[Step, Point]


@dataclass(frozen=True)
class LinearStudy:
    """All groups; `eps` are the budgets that all losses share; sentences are about the first."""

    study: Study
    groups: tuple[Group, ...]
    eps: tuple[float, ...]

    @property
    def losses(self) -> tuple[str, ...]:
        """Return the losses in the plan's order."""
        return tuple(dict.fromkeys(group.loss for group in self.groups))

    @property
    def ways(self) -> list[tuple[str, str]]:
        """Return every loss and kind of sparsity that has pairs."""
        return [(loss, path) for loss in self.losses for path in PATHS if self.steps(loss, path) and self.pairs(loss)]

    def of(self, loss: str) -> list[Group]:
        """Return a loss's groups."""
        return [group for group in self.groups if group.loss == loss]

    def pairs(self, loss: str) -> list[Group]:
        """Return a loss's groups of two classes."""
        return [group for group in self.of(loss) if len(group.classes) == 2]

    def steps(self, loss: str, path: str) -> list[Step]:
        """Return the steps of a path, in the plan's order."""
        return [step for group in self.of(loss)[:1] for step in group.points if step[0] == path]

    def effect(self, loss: str, step: Step, value: Value, over: Step | None = None) -> Effect | None:
        """Return the mean over the pairs of a step's value, less that of another step if one is given.

        None without a full set of pairs of at least four classes.
        """
        pairs = self.pairs(loss)
        images = max((int(group.points[DENSE]["images"]) for group in pairs), default=0)
        values = {
            (g.classes[0], g.classes[1]): value(g.points[step]) - (value(g.points[over]) if over else 0.0)
            for g in pairs
        }
        try:
            return pair_effect(values, images=images).priced(self.study.looks.price)
        except ValueError:
            return None

    def mean(self, loss: str, step: Step, value: Value) -> float:
        """Return the mean over the pairs of a value of one step, NaN without any pair."""
        found = [value(group.points[step]) for group in self.pairs(loss)]
        return sum(found) / len(found) if found else math.nan

    def best(self, loss: str, path: str, value: Value) -> Step:
        """Return the step of a path that is best on validation images in the mean over the pairs."""
        return max(self.steps(loss, path), key=lambda s: self.mean(loss, s, lambda p: value(p["valid"])))

    def sparsity(self, loss: str, step: Step) -> str:
        """Return a step's mean sparsity over the pairs, in words."""
        return f"{100 * self.mean(loss, step, lambda p: float(p['sparsity'])):.3g}%"


def is_linear(study: Study) -> bool:
    """Return whether a study's plan is of linear classifiers."""
    return bool(study.plan.get("linear"))


def read_linear(study: Study) -> LinearStudy:
    """Read the groups from a study's records; failed and missing ones are omitted."""
    groups = []
    for network in study.networks:
        for record in network.stage("linear"):
            points = {(str(p["path"]), float(p["step"])): p for p in record.series["points"]}
            dense = points["l2", float(record.metrics["strength"] or 0.0)]
            classes = tuple(int(k) for k in record.inputs["classes"])
            groups.append(Group(str(record.inputs["loss"]), classes, {DENSE: dense, **points}))
    eps = [tuple(float(e) for e in table["eps"]) for table in study.plan["linear"]]
    return LinearStudy(study, tuple(groups), tuple(e for e in eps[0] if all(e in other for other in eps)))


def r_inf(eps: float, form: str = "boxed") -> Value:
    """Return a function that reads a classifier's accuracy within eps: "boxed", "unboxed", or "fgsm" as measured."""
    name = form if form == "fgsm" else f"r_inf_{form}"
    return lambda point: float(point[name][f"{eps:g}"])


def r_2(form: str = "boxed") -> Value:
    """Return a function that reads a classifier's mean ℓ2 distance: "boxed", "unboxed", "deepfool" or "nearest"."""
    return lambda point: float(point[f"r_2_{form}"])


def linear_claims(data: LinearStudy) -> list[Question]:
    """Return the claims, each for every loss and way to sparsity, with its effect, not yet judged."""
    return [asked for loss, path in data.ways for asked in _claims(data, loss, path)]


def _claims(data: LinearStudy, loss: str, path: str) -> Iterator[Question]:
    eps = data.eps[0]
    step, tuned = (data.best(loss, which, r_inf(eps)) for which in (path, "l2"))
    where = f"{loss}, {NAMES[path]} at {data.sparsity(loss, step)}"
    rival = f"{NAMES['l2']} of strength C = {tuned[1]:g}, the dense one best for r_inf: FGSM"
    gains = "linear: sparsity gains ℓ∞ robustness"
    exceeds = "linear: the ℓ∞ gain exceeds that of a denser classifier with a tuned ℓ2 penalty"
    for key, form, text, test, over in (
        ("r_inf", "fgsm", gains, "dense: FGSM", DENSE),
        ("r_inf unboxed", "unboxed", f"{gains} without the box", "dense: the theorem's r_inf, unboxed,", DENSE),
        ("r_inf over tuned", "fgsm", exceeds, rival, tuned),
    ):
        primary = (form, over) == ("fgsm", DENSE)
        test = f"{where} − {test} at ε = {eps:g}"
        claim = _claim(f"{key} {loss} {path}", text, "above", "points", test, loss, primary=primary)
        one = data.effect(loss, step, r_inf(eps, form), over)
        yield ask(claim, None if one is None else one.scaled(100.0))
    step = data.best(loss, path, r_2())
    gains = "linear: sparsity does not gain ℓ2 robustness"
    for form, text, told in (
        ("boxed", gains, "r_2, exact,"),
        ("unboxed", f"{gains} without the box", "the theorem's r_2, without the box,"),
    ):
        test = f"{loss}, {NAMES[path]} at {data.sparsity(loss, step)} − dense: {told} % of the dense mean"
        key = f"r_2 {form} {loss} {path}"
        claim = _claim(key, text, "not above", "%", test, loss, primary=form == "boxed")
        scale = 100.0 / data.mean(loss, DENSE, r_2(form))
        found = (data.effect(loss, s, r_2(form), DENSE) for s in (step, *data.steps(loss, path)))
        one, *curve = [None if e is None else e.scaled(scale) for e in found]
        yield ask(claim, one, curve=[e for e in curve if e is not None])


def _claim(key: str, text: str, expects: Expects, unit: str, test: str, loss: str, *, primary: bool) -> Claim:
    origin: Origin = "paper" if primary else "this project"
    told = f"{test}, paired over digit pairs"
    return Claim(text, expects, MARGIN, unit, told, primary=primary, origin=origin, metric=loss, key=key)
