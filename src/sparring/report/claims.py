"""The ledger's claims: which comparison of this study speaks for or against each."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Literal

from ..statistics import Claim, Effect, Question, Row, ask, effect, judge
from . import numbers
from .findings import Findings, Result, best, difference, validation_twin
from .kinds import Kind, kind_of
from .looks import dropped_tests
from .measures import NORMS, TRANSFER, Measure, common, pretty, values
from .records import CONTROL, NAIVE, REFERENCE, checkpoint_of
from .words import short_name, title

__all__ = ["claims", "ledger"]

Judged = Question

# What is asked of other methods: whether they gain too, or whether the headline's method gains more than they do.
ITSELF: dict[Kind, str] = {
    "random": "random masks gain r_inf too",
    "channels": "pruning whole channels or filters gains r_inf too",
    "wide sparse": "a wider network, pruned to as many weights as the dense one has, gains r_inf",
}
OVER_IT: dict[Kind, str] = {
    "small dense": "the gain exceeds that of a dense network of equal size",
    "tuned decay": "the gain exceeds that of tuned weight decay",
}


def ledger(findings: Findings) -> list[Row]:
    """Return the claims that this study can speak of, each with its test, numbers and verdict (Holm across all)."""
    asked = claims(findings)
    return judge(asked, study=title(findings), dropped=dropped_tests(findings.study, asked))


def claims(findings: Findings) -> list[Judged]:
    """Return the claims that this study can speak of, each with its effect, not yet judged."""
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
    headline = findings.result(fgsm)
    if headline is not None:
        judged += _survival(findings, headline)
        judged += _fine_tuning(findings, headline)
        judged += _other_methods(findings, headline)
    judged += _chosen_weights(findings)
    judged += _activations(findings, fgsm)
    judged += _proofs(findings)
    judged += _transfers(findings, headline)
    return judged


def _judged(text: str, expects: Literal["above", "below", "none"], result: Result, one: Effect, test: str) -> Judged:
    """Return a claim with its effect in points or per cent; up to 2 of either do not matter.

    Over a control whose mean is zero there is no per cent, and no telling what would not matter.
    """
    scale, unit = numbers.scale(result.measure, result.control), numbers.gain_unit(result.measure, result.control)
    return ask(Claim(text, expects, 0.0 if unit == numbers.ABSOLUTE else 2.0, unit, test), one.scaled(scale))


def _at_best(findings: Findings, result: Result, text: str) -> Judged:
    twin = validation_twin(findings, result)
    sparsity, one = best(result, twin)
    where = "chosen on validation images" if twin else "the best of the curve, corrected for all of them"
    test = f"{short_name(result.measure)}, {result.method} at {numbers.percent(sparsity)} ({where}) − dense control"
    return _judged(text, "none" if " no " in text else "above", result, one, test)


def _when_over_sparsified(result: Result, label: str) -> Judged:
    sparsity, one = result.sparsities[-1], result.gains.effects[-1]
    test = _over_control(result, sparsity)
    return _judged(f"over-sparsified networks lose {label} (here: the sparsest)", "below", result, one, test)


def _survival(findings: Findings, fgsm: Result) -> Iterator[Judged]:
    """Ask of FGSM's best sparsity whether the gain is there under stronger attacks."""
    sparsity = _best_sparsity(findings, fgsm)
    for role, names, text in (
        ("budget", ("pgd", "apgd"), "the gain survives PGD"),
        ("worst", (), "the gain survives the worst case over all attacks"),
    ):
        result = findings.result(findings.first(role, *names))
        if result is not None and (one := result.gain(sparsity)) is not None:
            yield _judged(text, "above", result, one, _over_control(result, sparsity))


def _best_sparsity(findings: Findings, result: Result) -> float:
    return best(result, validation_twin(findings, result))[0]


def _over_control(result: Result, sparsity: float) -> str:
    return f"{short_name(result.measure)}, {result.method} at {numbers.percent(sparsity)} − dense control"


def _fine_tuning(findings: Findings, fgsm: Result) -> Iterator[Judged]:
    """Ask how much of a gain over the network as trained is fine-tuning's: what the dense control takes away."""
    checkpoint = checkpoint_of(fgsm.method)
    one = difference(findings, fgsm.measure, (CONTROL + checkpoint, 0.0), (REFERENCE + checkpoint, 0.0))
    if one is not None:
        test = f"{short_name(fgsm.measure)}, dense control − the network as trained"
        yield _judged("fine-tuning alone, without pruning, moves no r_inf", "none", fgsm, one, test)


def _other_methods(findings: Findings, fgsm: Result) -> Iterator[Judged]:
    """Ask which part of the gain other ways to a sparse or small network have too."""
    mine = (fgsm.method, _best_sparsity(findings, fgsm))
    for method in (m for m in _comparable(findings) if m != fgsm.method):
        kind = kind_of(findings.study, method)
        if kind in ITSELF:
            result = findings.result(fgsm.measure, method)
            if result is not None:
                yield _at_best(findings, result, f"{ITSELF[kind]} ({method})")
        elif kind in OVER_IT:
            yield from _against(findings, fgsm, mine, method, f"{OVER_IT[kind]} ({method})")


def _chosen_weights(findings: Findings) -> Iterator[Judged]:
    """Ask whether it matters which weights stay: pruned against random masks where both are sparsest."""
    accuracy = findings.first("accuracy")
    masks = [m for m in _comparable(findings) if kind_of(findings.study, m) == "random"]
    for method in (m for m in _comparable(findings) if masks and kind_of(findings.study, m) in ("pruned", "surgery")):
        result = findings.result(accuracy, masks[0])
        shared = {n.sparsity for n in findings.study.of(method)}.intersection(result.sparsities if result else ())
        one = None
        if accuracy is not None and shared:
            one = difference(findings, accuracy, (method, max(shared)), (masks[0], max(shared)))
        if one is not None and result is not None:
            test = f"{short_name(result.measure)}, {method} − {masks[0]}, both at {numbers.percent(max(shared))}"
            text = f"weights that were chosen keep more accuracy than random ones ({method})"
            yield _judged(text, "above", result, one, test)


def _comparable(findings: Findings) -> list[str]:
    """Return the methods at the same checkpoint (final or best epoch) as the headline's."""
    checkpoint = checkpoint_of(findings.method or "")
    return [m for m in findings.study.methods if checkpoint_of(m) == checkpoint]


def _against(findings: Findings, fgsm: Result, mine: tuple[str, float], method: str, text: str) -> Iterator[Judged]:
    """Compare the headline's network with another method's at the same sparsity, or at its nearest."""
    sparsities = {n.sparsity for n in findings.study.of(method)}
    other = (method, min(sparsities, key=lambda s: abs(s - mine[1])))
    one = difference(findings, fgsm.measure, mine, other)
    if one is not None:
        told = f"{mine[0]} at {numbers.percent(mine[1])} − {method}"
        told += f" at {numbers.percent(other[1])}" if other[1] else ""
        yield _judged(text, "above", fgsm, one, f"{short_name(fgsm.measure)}, {told}")


def _activations(findings: Findings, fgsm: Measure | None) -> Iterator[Judged]:
    """Ask of each activation-sparse method whether it gains, under the worst case too, and what BPDA leaves of it."""
    for method in (m for m in _comparable(findings) if kind_of(findings.study, m) == "activations"):
        for measure, attack in ((fgsm, "FGSM"), (findings.first("worst"), "the worst case over all attacks")):
            result = findings.result(measure, method)
            if result is not None:
                text = f"activation sparsity gains robustness under {attack} ({method})"
                yield _at_best(findings, result, text)
        for measure in (m for m in findings.collected if m.role == "budget" and m.attack.endswith(NAIVE)):
            naive = findings.result(measure, method)
            honest = findings.result(replace(measure, attack=measure.attack.removesuffix(NAIVE)), method)
            if naive is not None and honest is not None:
                level = _best_sparsity(findings, naive)
                text = (
                    f"activation sparsity's gain under naive {pretty(honest.measure.attack)} survives BPDA ({method})"
                )
                if (one := honest.gain(level)) is not None:
                    yield _judged(text, "above", honest, one, _over_control(honest, level))


def _proofs(findings: Findings) -> Iterator[Judged]:
    """Ask whether what can be proved, not only what attacks fail to break, grows with sparsity."""
    for measure in (m for m in findings.collected if m.role in ("certified", "lipschitz", "ratio")):
        result = findings.result(measure)
        if result is None:
            continue
        norm = NORMS.get(measure.norm, measure.norm)
        if measure.role == "lipschitz":
            text = f"the {norm} Lipschitz constant falls with sparsity (here: the sparsest; {measure.attack})"
            test = _over_control(result, result.sparsities[-1])
            yield _judged(text, "below", result, result.gains.effects[-1], test)
        else:
            what = f"certified {norm} radius" if measure.role == "certified" else f"{norm} margin / Lipschitz constant"
            yield _at_best(findings, result, f"the {what} rises at an appropriate sparsity ({measure.attack})")


def _transfers(findings: Findings, fgsm: Result | None) -> Iterator[Judged]:
    """Ask of FGSM's best sparsity, or the nearest that was tried, whether most examples fool the other network too."""
    for measure in (m for m in findings.collected if m.role in TRANSFER):
        held = {who: one for who, one in findings.collected[measure].items() if one.bottom.any()}
        tried = {sparsity for method, sparsity, _ in held if method == findings.method}
        if not tried:
            continue
        wanted = _best_sparsity(findings, fgsm) if fgsm is not None else min(tried)
        sparsity = min(tried, key=lambda s: abs(s - wanted))
        seeds = [one for who, one in sorted(held.items()) if who[:2] == (findings.method, sparsity)]
        images = common([one.images for one in seeds])
        if len(images) < 2 or not all(one.at(images).bottom.any() for one in seeds):
            continue
        way = "dense → sparse" if measure.role == "to sparse" else "sparse → dense"
        text = f"adversarial examples transfer {way} (most of them fool the other network too)"
        test = f"{measure.title}, {findings.method} at {numbers.percent(sparsity)}: share of those that could − 50%"
        one = effect(values(seeds, images) - 0.5).scaled(100.0).priced(findings.study.looks.price)
        yield ask(Claim(text, "above", 2.0, "points", test), one)
