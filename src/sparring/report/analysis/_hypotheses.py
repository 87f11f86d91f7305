"""Turn a comparison into a question for the ledger: its unit, its margin, and whether its attacks can be believed."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from ...statistics import Claim, Effect, Question, ask
from .. import _numbers as numbers
from ._cross_checks import suspicion
from ._findings import MANY_FAILED, Choice, Findings, Result, margins_of
from ._metrics import Measure, parts, pretty
from ._records import Who

MARGIN = 2.0  # points or %: an effect that does not matter
Origin = Literal["paper", "later work", "this project"]
Expects = Literal["above", "below", "none", "not above"]


@dataclass(frozen=True)
class Place:
    """Hold where a method's accuracy puts its sparsities, before robustness is seen.

    `appropriate`: accuracy within the plan's margin of the dense control's; `over`: from the first sparsity that loses
    more than the second margin on. `split` says on which images ("" if accuracy was not measured).
    """

    appropriate: tuple[float, ...]
    over: tuple[float, ...]
    split: str


def places(findings: Findings, method: str) -> Place:
    """Return where a method's sparsities lie, by validation accuracy (or by test accuracy, where there is no other)."""
    margins = margins_of(findings.study)
    for split in ("valid", "test"):
        result = findings.result(Measure("accuracy", split), method)
        if result is not None:
            gains = [e.estimate for e in result.gains.effects]
            kept = [s for s, gain in zip(result.sparsities, gains, strict=True) if gain >= -margins["accuracy"]]
            lost = [k for k, gain in enumerate(gains) if gain < -margins["over_sparsified"]]
            return Place(tuple(kept), result.sparsities[lost[0] :] if lost else (), split)
    return Place((), (), "")


def attacks_of(findings: Findings, measure: Measure) -> str:
    """Return the names of the attacks behind a measure: "FGSM, PGD-40 and fast"."""
    return numbers.listed(pretty(m.label) for m in parts(findings.collected, measure))


def says(text: str, expects: Expects = "above", *, primary: bool = False, origin: Origin = "this project") -> Claim:
    """Return a claim whose test is not known yet."""
    return Claim(text, expects, MARGIN, "points", "", primary=primary, origin=origin)


def unasked(claim: Claim, measure: Measure, why: str) -> Question:
    """Return a claim about a metric as a question that this study does not answer."""
    return replace(ask(replace(claim, test=measure.phrase, metric=measure.phrase), None), unknown=why)


def at_choice(findings: Findings, result: Result, choice: Choice | None, claim: Claim) -> Question:
    """Return the question whether a method gains over the dense control at a chosen sparsity; None: there is none."""
    if choice is None:
        margin = margins_of(findings.study)["accuracy"]
        return unasked(claim, result.measure, f"no sparsity keeps accuracy within {margin:.2%} of the dense control's")
    chosen = sorted(set(choice.sparsities))
    how = "each seed's chosen by the others on validation images"
    if choice.choices > 1 or len(result.seeds) == 1:
        how = f"the best of {choice.choices}, corrected for all of them"
    claim = replace(claim, test=f"{result.method} at {result.words(*chosen)} ({how}) − dense control")
    sparse = [(result.method, s, seed) for seed, s in zip(result.seeds, choice.sparsities, strict=True)]
    question = about(findings, result, claim, choice.effect, sparse, curve=choice.curve, choices=choice.choices)
    question = replace(question, failed=result.failures(chosen), gain=(result.measure.slug, result.method))
    if not result.gains.dropped:
        return question
    gone = "whether it is so at the sparsities that the plan dropped"
    return replace(question, p_small=math.nan, p_against=math.nan, unknown=gone)


def at_sparsity(findings: Findings, result: Result, sparsity: float, claim: Claim) -> Question:
    """Return the question what a method gains over the dense control at a sparsity that no result has chosen."""
    claim = replace(claim, test=f"{result.method} at {result.words(sparsity)} − dense control")
    sparse = [(result.method, sparsity, seed) for seed in result.seeds]
    question = about(findings, result, claim, result.gain(sparsity), sparse)
    return replace(question, failed=result.failures([sparsity]))


def about(
    findings: Findings,
    result: Result,
    claim: Claim,
    one: Effect | None,
    sparse: Iterable[Who],
    *,
    curve: Sequence[Effect] = (),
    choices: int = 1,
) -> Question:
    """Return the question about one effect in a result's unit, in doubt where its attacks are on any network asked.

    Over a control whose mean is zero there is no per cent, and no telling what would not matter.
    """
    unit = numbers.gain_unit(result.measure, result.control)
    absolute = unit == numbers.ABSOLUTE
    metric = claim.metric or result.measure.phrase
    margin, test = 0.0 if absolute else MARGIN, f"{metric}, {claim.test}"
    claim = replace(claim, margin=margin, unit=unit, test=test, log=unit == "%", metric=metric)
    scale = 1.0 if absolute else 100.0
    sparse = list(sparse)
    whos = {*sparse, *((findings.study.control(method), 0.0, seed) for method, _, seed in sparse)}
    doubt = suspicion(findings.study, findings.collected, findings.doubts, result.measure, whos)
    if not doubt and max(result.failures([s for _, s, _ in sparse if s in result.sparsities])) > MANY_FAILED:
        doubt = f"the search failed on more than {MANY_FAILED:.0%} of images"
    scaled = [e.scaled(scale) for e in curve]
    return ask(claim, None if one is None else one.scaled(scale), curve=scaled, choices=choices, doubt=doubt)
