"""The ledger's claims: which comparison of this study speaks for or against each."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

from ..statistics import Claim, Effect, Row, judge
from . import numbers
from .findings import Findings, Result, best, difference, validation_twin
from .measures import Measure
from .words import short_name

__all__ = ["ledger"]

Judged = tuple[Claim, Effect | None]


def ledger(findings: Findings) -> list[Row]:
    """Return the claims that this study can speak of, each with its test, numbers and verdict (Holm across all)."""
    model = findings.study.plan.get("model")
    name = model.get("name") if isinstance(model, dict) else model
    linear = str(name).startswith("linear")
    fgsm, r_2 = (findings.first("budget", "fgsm"), findings.first("distance", "deepfool"))
    judged: list[Judged] = []
    kind = "linear" if linear else "nonlinear"
    for measure, label in ((fgsm, "r_inf"), (r_2, "r_2")):
        result = findings.result(measure)
        if result is not None:
            text = f"{kind} networks gain {label} at an appropriate sparsity"
            claim_of_none = linear and label == "r_2"
            judged.append(_at_best(findings, result, f"linear networks gain no {label}" if claim_of_none else text))
            judged.append(_when_over_sparsified(result, label))
    judged += _survival(findings, findings.result(fgsm))
    judged += _other_methods(findings, findings.result(fgsm))
    judged += _activations(findings, fgsm)
    judged += _proofs(findings)
    return judge(judged, study=str(findings.study.plan.get("name") or "study"))


def _judged(text: str, expects: Literal["above", "below", "none"], result: Result, one: Effect, test: str) -> Judged:
    """Return a claim with its effect in points or per cent; up to 2 of either do not matter."""
    scale = numbers.scale(result.measure, result.control)
    return Claim(text, expects, 2.0, numbers.gain_unit(result.measure), test), one.scaled(scale)


def _at_best(findings: Findings, result: Result, text: str) -> Judged:
    twin = validation_twin(findings, result)
    sparsity, one = best(result, twin)
    where = "chosen on validation images" if twin else "the best of the curve, corrected for all of them"
    test = f"{short_name(result.measure)}, {result.method} at {numbers.percent(sparsity)} ({where}) − dense control"
    return _judged(text, "none" if " no " in text else "above", result, one, test)


def _when_over_sparsified(result: Result, label: str) -> Judged:
    sparsity, one = result.sparsities[-1], result.gains.effects[-1]
    test = f"{short_name(result.measure)}, {result.method} at {numbers.percent(sparsity)} − dense control"
    return _judged(f"over-sparsified networks lose {label} (here: the sparsest)", "below", result, one, test)


def _survival(findings: Findings, fgsm: Result | None) -> Iterator[Judged]:
    """Ask of FGSM's best sparsity whether the gain is there under stronger attacks."""
    if fgsm is None:
        return
    sparsity, _ = best(fgsm, validation_twin(findings, fgsm))
    for role, names, text in (
        ("budget", ("pgd", "apgd"), "the gain survives PGD"),
        ("worst", (), "the gain survives the worst case over all attacks"),
    ):
        result = findings.result(findings.first(role, *names))
        if result is not None and (one := result.gain(sparsity)) is not None:
            test = f"{short_name(result.measure)}, {result.method} at {numbers.percent(sparsity)} − dense control"
            yield _judged(text, "above", result, one, test)


def _other_methods(findings: Findings, fgsm: Result | None) -> Iterator[Judged]:
    """Ask which part of the gain other ways to a sparse or small network have too."""
    if fgsm is None:
        return
    sparsity, _ = best(fgsm, validation_twin(findings, fgsm))
    mine = (fgsm.method, sparsity)
    for method in (m for m in findings.study.methods if m != fgsm.method):
        what = _what(method)
        if what is None:
            continue
        side, text = what
        if side == "itself":
            result = findings.result(fgsm.measure, method)
            if result is not None:
                yield _at_best(findings, result, text)
        else:
            yield from _against(findings, fgsm, mine, method, text)


def _activations(findings: Findings, fgsm: Measure | None) -> Iterator[Judged]:
    """Ask of each activation-sparse method whether it gains, and whether the gain outlives the strongest attack."""
    for method in (m for m in findings.study.methods if findings.study.axis(m) == "activations"):
        for measure, attack in ((fgsm, "FGSM"), (findings.first("worst"), "the worst case over all attacks")):
            result = findings.result(measure, method)
            if result is not None:
                text = f"activation sparsity gains robustness under {attack} ({method})"
                yield _at_best(findings, result, text)


def _proofs(findings: Findings) -> Iterator[Judged]:
    """Ask whether what can be proved, not only what attacks fail to break, grows with sparsity."""
    for measure in (m for m in findings.collected if m.role == "certified"):
        result = findings.result(measure)
        if result is not None:
            yield _at_best(findings, result, f"the certified {measure.norm} radius grows at an appropriate sparsity")


def _what(method: str) -> tuple[str, str] | None:
    """Return what a method's name asks: of its own gain ("itself") or of the headline's gain over it ("over it")."""
    word = method.lower()
    if "random" in word:
        return "itself", f"random masks gain r_inf too ({method})"
    if "channel" in word or "filter" in word:
        return "itself", f"pruning whole channels gains r_inf too ({method})"
    if "small" in word:
        return "over it", f"the gain exceeds that of a dense network of equal size ({method})"
    if "decay" in word or "tuned" in word:
        return "over it", f"the gain exceeds that of tuned weight decay ({method})"
    return None


def _against(findings: Findings, fgsm: Result, mine: tuple[str, float], method: str, text: str) -> Iterator[Judged]:
    """Compare the headline's network with another method's at the same sparsity, or at its nearest."""
    sparsities = {n.sparsity for n in findings.study.of(method)}
    other = (method, min(sparsities, key=lambda s: abs(s - mine[1])))
    one = difference(findings, fgsm.measure, mine, other)
    if one is not None:
        told = f"{mine[0]} at {numbers.percent(mine[1])} − {method} at {numbers.percent(other[1])}"
        yield _judged(text, "above", fgsm, one, f"{short_name(fgsm.measure)}, {told}")
