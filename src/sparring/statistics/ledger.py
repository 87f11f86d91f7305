"""The ledger: each claim of the literature with its test, its numbers and one of three verdicts."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from .effects import Effect, equivalence, holm, minimum_detectable_effect, seeds_needed

__all__ = ["Claim", "Row", "judge"]

ALPHA = 0.05
Verdict = Literal["reproduced", "contradicted", "undecided"]


@dataclass(frozen=True)
class Claim:
    """State what a claim says of an effect: that it is above zero, below zero, or within ±margin of zero.

    `margin`, in the effect's `unit`, is the largest effect that does not matter; `test` says what was compared.
    """

    text: str
    expects: Literal["above", "below", "none"]
    margin: float
    unit: str
    test: str


@dataclass(frozen=True)
class Row:
    """Hold one line of the ledger. `p` is two-sided, corrected by Holm across the ledger; None where not measured."""

    claim: str
    test: str
    verdict: Verdict
    estimate: float | None
    low: float | None
    high: float | None
    unit: str
    p: float | None
    seeds: int
    images: int
    study: str
    why: str


def judge(claims: Sequence[tuple[Claim, Effect | None]], *, study: str) -> list[Row]:
    """Give every claim its verdict; an effect of None is a claim that this study did not measure.

    A claimed direction is reproduced when the effect is significant that way (Holm across the ledger), contradicted
    when it is significant the other way or shown to lie within the margin; a claim of no effect the other way round.
    Anything else is undecided, and `why` says what it would take.
    """
    corrected = holm([math.nan if e is None else e.p for _, e in claims])
    return [_row(claim, e, float(p), study) for (claim, e), p in zip(claims, corrected, strict=True)]


def _row(claim: Claim, e: Effect | None, p: float, study: str) -> Row:
    if e is None:
        why = "not measured in this study"
        return Row(claim.text, claim.test, "undecided", None, None, None, claim.unit, None, 0, 0, study, why)
    verdict, why = _verdict(claim, e, p)
    if e.indicative:
        why = f"indicative ({e.seeds} seed{'s' if e.seeds > 1 else ''}): {why}"
    bounds = e.estimate, e.low, e.high
    return Row(claim.text, claim.test, verdict, *bounds, claim.unit, p, e.seeds, e.images, study, why)


def _verdict(claim: Claim, e: Effect, p: float) -> tuple[Verdict, str]:
    small = equivalence(e, claim.margin) <= ALPHA
    found: Literal["above", "below", "none"] | None = None
    if p <= ALPHA:
        found = "above" if e.estimate > 0 else "below"
    if claim.expects == "none":
        if small:
            return "reproduced", f"within ±{claim.margin:.3g} {claim.unit} by two one-sided tests"
        return ("contradicted", f"significantly {found} zero") if found else ("undecided", _takes(claim, e))
    if found == claim.expects:
        return "reproduced", f"significantly {found} zero" + (", though smaller than matters" if small else "")
    if found is not None:
        return "contradicted", f"significantly {found} zero"
    if small:
        return "contradicted", f"within ±{claim.margin:.3g} {claim.unit} by two one-sided tests: no effect that matters"
    return "undecided", _takes(claim, e)


def _takes(claim: Claim, e: Effect) -> str:
    """Say what a decision would take."""
    least = f"would have seen an effect of {minimum_detectable_effect(e):.2g} {claim.unit}"
    if e.estimate == 0:
        return least
    return f"{least}; this one needs about {seeds_needed(e)} seeds or more"
