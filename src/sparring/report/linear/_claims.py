"""The ledger of a linear study: what sparsity gains in each norm, with the box and without, over which control."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

from ...statistics import Claim, Effect, Question, Row, ask, judge
from ..analysis._looks import dropped_tests
from ._study import DENSE, Group, LinearStudy, Step, Value

MARGIN = 2.0  # points or %: a gain or loss that does not matter, as in every ledger
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


def linear_ledger(data: LinearStudy) -> list[Row]:
    """Return the claims, each for every loss and way to sparsity, with verdicts (Holm across all)."""
    asked = linear_claims(data)
    name = str(data.study.plan.get("name") or "study")
    return judge(asked, study=name, dropped=dropped_tests(data.study, asked))


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
