"""The ledger: each claim of the literature with its test, its numbers and one of three verdicts."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from .effects import MOST_POINTS, Effect, equivalence, holm, minimum_detectable_effect, no_gain, seeds_needed

__all__ = ["Claim", "Row", "judge", "reread"]

ALPHA = 0.05
Verdict = Literal["reproduced", "contradicted", "undecided"]


@dataclass(frozen=True)
class Claim:
    """State what a claim says of an effect: above zero, below zero, within ±margin of zero, or not above margin.

    `margin`, in the effect's `unit`, is the largest effect that does not matter, 0 where nobody can tell; `test` says
    what was compared.
    """

    text: str
    expects: Literal["above", "below", "none", "not above"]
    margin: float
    unit: str
    test: str


@dataclass(frozen=True)
class Row:
    """Hold one line of the ledger; None: not measured.

    `p` is the two-sided p-value of a difference, `p_small` that of an effect too small to matter (of a gain too small
    to matter, where the claim is "not above"; None also where the claim has no margin). Both are corrected by Holm
    across the ledger, each in a family of its own.
    """

    claim: Claim
    verdict: Verdict
    effect: Effect | None
    p: float | None
    p_small: float | None
    study: str
    why: str

    @property
    def decisive(self) -> float | None:
        """Return the p-value that the verdict rests on; that of the difference where it is undecided."""
        if self.claim.expects in ("none", "not above"):
            return self.p_small if self.verdict == "reproduced" else self.p
        by_size = self.verdict == "contradicted" and self.p is not None and self.p > ALPHA
        return self.p_small if by_size else self.p

    def as_dict(self) -> dict[str, str | float | int | None]:
        """Return the row flat, for JSON: all that `reread` needs; `p_alone` is the p-value before any correction."""
        c, e = self.claim, self.effect
        words = {"claim": c.text, "test": c.test, "verdict": self.verdict, "unit": c.unit, "why": self.why}
        asked = {"expects": c.expects, "margin": c.margin}
        names = {"estimate": "estimate", "low": "low", "high": "high", "se": "se", "df": "df", "p_alone": "p"}
        numbers = {name: None if e is None else getattr(e, field) for name, field in names.items()}
        counts = {"seeds": 0 if e is None else e.seeds, "images": 0 if e is None else e.images}
        return words | asked | numbers | {"p": self.p, "p_small": self.p_small} | counts | {"study": self.study}


def reread(row: Mapping[str, Any]) -> tuple[Claim, Effect | None]:
    """Return the claim and effect of a row that `as_dict` made flat, to be judged again among others.

    Raises KeyError or TypeError when something is missing or is not a number where it should be.
    """
    claim = Claim(str(row["claim"]), row["expects"], float(row["margin"]), str(row["unit"]), str(row["test"]))
    if row["estimate"] is None:
        return claim, None
    estimate, se, df, low, high, p = (float(row[n]) for n in ("estimate", "se", "df", "low", "high", "p_alone"))
    return claim, Effect(estimate, se, df, low, high, p, int(row["seeds"]), int(row["images"]))


def judge(claims: Sequence[tuple[Claim, Effect | None]], *, study: str) -> list[Row]:
    """Give every claim its verdict; an effect of None is a claim that this study did not measure.

    A claimed direction is reproduced when the effect is significant that way, contradicted when it is significant the
    other way or shown to lie within the margin; a claim of no effect the other way round. Holm's correction runs across
    the ledger twice, as there are two ways to err: over all tests of a difference, and over all tests of an effect too
    small to matter. Anything else is undecided, and `why` says what it would take; one seed decides nothing.
    """
    corrected = holm([math.nan if e is None else e.p for _, e in claims])
    small = holm([_too_small(claim, e) for claim, e in claims])
    alpha = ALPHA / max(1, sum(e is not None for _, e in claims))
    both = zip(claims, corrected, small, strict=True)
    return [_row(claim, e, float(p), float(p_small), alpha, study) for (claim, e), p, p_small in both]


def _too_small(claim: Claim, e: Effect | None) -> float:
    if e is None or claim.margin <= 0:
        return math.nan
    return no_gain(e, claim.margin) if claim.expects == "not above" else equivalence(e, claim.margin)


def _row(claim: Claim, e: Effect | None, p: float, p_small: float, alpha: float, study: str) -> Row:
    if e is None:
        return Row(claim, "undecided", None, None, None, study, "not measured in this study")
    verdict: Verdict
    verdict, why = _verdict(claim, e, p, p_small) if e.seeds > 1 else ("undecided", "one seed cannot decide")
    if verdict == "undecided" and e.seeds > 1:
        why = f"{why}; {_takes(claim, e, alpha)}"
    if e.indicative:
        why = f"indicative ({e.seeds} seed{'s' if e.seeds > 1 else ''}): {why}"
    return Row(claim, verdict, e, p, None if math.isnan(p_small) else p_small, study, why)


def _verdict(claim: Claim, e: Effect, p: float, p_small: float) -> tuple[Verdict, str]:
    """Judge one claim by its two corrected p-values; that of a small effect is NaN where there is no margin."""
    small = p_small <= ALPHA
    margin = _amount(claim.margin, claim)
    what = f"less than {margin}, by a one-sided test"
    if claim.expects != "not above":
        what = f"within ±{margin}, by two one-sided tests"
    found: Literal["above", "below", "none"] = "none"
    if p <= ALPHA:
        found = "above" if e.estimate > 0 else "below"
    if claim.expects == "not above" and small:
        loss = f", and significantly {found} zero" if found != "none" else ""
        return "reproduced", f"{what}{loss}"
    if claim.expects == "none" and small:
        return "reproduced", what
    if found == claim.expects and found != "none":
        return "reproduced", f"significantly {found} zero" + (", though smaller than matters" if small else "")
    if found != "none":
        return "contradicted", f"significantly {found} zero"
    if small:
        return "contradicted", f"{what}: no effect that matters"
    if _too_small(claim, e) <= ALPHA:
        return "undecided", f"{what}, but not after correction"
    return "undecided", "not significant after correction" if e.low > 0 or e.high < 0 else "not significant"


def _takes(claim: Claim, e: Effect, alpha: float) -> str:
    """Say what a decision would take."""
    least = minimum_detectable_effect(e, alpha=alpha)
    told = f"would have seen an effect of {_amount(least, claim)}"
    if claim.unit == "points" and least > MOST_POINTS:
        told = "would have seen no effect, however large"
    if e.estimate == 0:
        return told
    return f"{told}; this one needs about {seeds_needed(e, alpha=alpha)} seeds or more"


def _amount(number: float, claim: Claim) -> str:
    if claim.unit not in ("%", "points"):
        return f"{number:.2g} {claim.unit}"
    text = f"{number:.1f}" if abs(number) < 10 else f"{number:.0f}"
    return f"{text}%" if claim.unit == "%" else f"{text} {claim.unit}"
