"""The ledger: published claims with their tests, numbers and verdicts."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from ._effects import (
    MOST_POINTS,
    Effect,
    beyond,
    change,
    equivalence,
    minimum_detectable_effect,
    no_gain,
    seeds_needed,
    two_sided,
    within_points,
)

ALPHA = 0.05
Entry = tuple[bool, Effect | None, float, float]  # is primary, effect, the p-value of being settled, margin
Verdict = Literal["reproduced", "opposite", "no effect that matters", "undecided"]
Expects = Literal["above", "below", "none", "not above"]
Origin = Literal["paper", "later work", "this project"]


@dataclass(frozen=True)
class Claim:
    """A claim about an effect: above zero, below zero, within ±margin of zero, or not above margin.

    `margin`, in the effect's `unit`, is the largest effect that does not matter (0: unknown). `test` says what was
    compared, `metric` in which metric. `key` identifies the test in all looks, independent of its words and sparsity.
    With `log` the tested effect is 100 times the logarithm of a ratio, and shown in %. `primary` claims are tested
    first, the others with the error rate that these pass on. `origin` is the source of the claim.
    """

    text: str
    expects: Expects
    margin: float
    unit: str
    test: str
    log: bool = False
    primary: bool = False
    origin: Origin = "this project"
    metric: str = ""
    key: str = ""

    @property
    def limit(self) -> float:
        """Return the margin on the scale of the test."""
        return 100 * math.log1p(self.margin / 100) if self.log else self.margin


@dataclass(frozen=True)
class Question:
    """A claim with its effect and the p-values that can decide it, not corrected for other claims yet.

    `p` is that of a difference, two-sided; `p_small` that of an effect too small to matter (for a claim of a gain, of a
    gain too small; NaN without a margin); `p_against` that of the opposite of the claim; `p_done` that of knowing on
    which side of zero and of the margin the effect lies, so that the claim is settled. All are NaN without an effect or
    with one seed. `doubt` says why no p-value may decide. `failed` are the shares of images on which an attack failed,
    on either side. `unknown` is what an earlier version did not record. `gain` names the metric and the method of a
    gain over the dense control, so that figures can quote the verdict.
    """

    claim: Claim
    effect: Effect | None
    p: float = math.nan
    p_small: float = math.nan
    p_against: float = math.nan
    p_done: float = math.nan
    doubt: str = ""
    failed: tuple[float, float] = (0.0, 0.0)
    unknown: str = ""
    gain: tuple[str, str] | None = None


def ask(
    claim: Claim, effect: Effect | None, *, curve: Sequence[Effect] = (), choices: int = 1, doubt: str = ""
) -> Question:
    """Return a question with its p-values.

    A claim that something holds at some sparsity is refuted only if it fails at all of them, and a claim that it holds
    at none is reproduced only in this way: `curve` are the effects at all sparsities, which must all be small, or
    opposite (an intersection-union test). `choices` is the number of sparsities among which the best was chosen on the
    test images; p-values are multiplied by it.
    """
    if effect is None or effect.seeds == 1:
        return Question(claim, effect, doubt=doubt)
    every = (effect, *curve)
    p = min(1.0, effect.p * choices)
    against = p if claim.expects == "none" or effect.estimate > 0 else 1.0  # for a claim of no effect
    if claim.expects in ("above", "below"):
        opposite = all(e.estimate < 0 if claim.expects == "above" else e.estimate > 0 for e in every)
        against = max(e.p for e in every) if opposite else 1.0
    small, done = math.nan, p
    if claim.margin > 0:
        one_sided = claim.expects == "not above" or (claim.expects == "above" and curve)
        small = max((no_gain if one_sided else equivalence)(e, claim.limit) for e in every)
        done = max(p, small)
        if effect.estimate > 0 or not curve:  # a loss at the chosen sparsity leaves open whether another one gains
            done = min(done, choices * beyond(effect, claim.limit))
    return Question(claim, effect, p, small, against, done, doubt)


@dataclass(frozen=True)
class Row:
    """One row of the ledger; `effect` is as shown, None if not measured.

    `p`, `p_small` and `p_against` are the question's, corrected within the study's families (None: no such test).
    `merged` is the verdict among the claims of all studies of a merged ledger, with its p-value. `needed` is about how
    many seeds would decide an undecided claim, if its effect is as estimated (None: unknown, or more than 10,000).
    """

    question: Question
    verdict: Verdict
    p: float | None
    p_small: float | None
    p_against: float | None
    study: str
    why: str
    merged: tuple[Verdict, float | None] | None = field(default=None)
    needed: int | None = None

    @property
    def claim(self) -> Claim:
        """Return the claim."""
        return self.question.claim

    @property
    def effect(self) -> Effect | None:
        """Return the effect as shown: that of a logarithm as a change in %, of a share within 100 points."""
        one = self.question.effect
        if one is None or not self.claim.log:
            return within_points(one) if one is not None and self.claim.unit == "points" else one
        low, high, estimate = (change(number / 100) for number in (one.low, one.high, one.estimate))
        return replace(one, estimate=estimate, low=low, high=high)

    @property
    def decisive(self) -> float | None:
        """Return the p-value that the verdict rests on; that of the difference where it is undecided."""
        none = self.claim.expects in ("none", "not above")
        rests = {"no effect that matters": self.p_small, "opposite": self.p_against, "undecided": self.p}
        return rests.get(self.verdict, self.p_small if none else self.p)

    @property
    def told(self) -> str:
        """Return the verdict for a table; it includes a note if there are few seeds."""
        e = self.question.effect
        few = self.verdict != "undecided" and e is not None and e.indicative
        doubt = self.verdict == "undecided" and self.question.doubt
        return self.verdict + (", indicative" if few else ", attack unreliable" if doubt else "")

    def as_dict(self) -> dict[str, Any]:
        """Return the row as a flat dictionary for `reread` and JSON; p-values named "alone" are uncorrected."""
        q, c, e = self.question, self.claim, self.question.effect
        words = {"claim": c.text, "test": c.test, "verdict": self.verdict, "unit": c.unit, "why": self.why}
        asked = {"expects": c.expects, "margin": c.margin, "log": c.log, "primary": c.primary, "origin": c.origin}
        names = ("estimate", "low", "high", "se", "df")
        numbers = {name: None if self.effect is None else getattr(self.effect, name) for name in names}
        alone = {"p": q.p, "p_small": q.p_small, "p_against": q.p_against, "p_done": q.p_done}
        numbers |= {f"{name}_alone": None if math.isnan(p) else p for name, p in alone.items()}
        counts = {"seeds": 0 if e is None else e.seeds, "images": 0 if e is None else e.images, "study": self.study}
        counts |= {"price": None if e is None else e.price}
        merged = {} if self.merged is None else {"merged": self.merged[0], "p_merged": self.merged[1]}
        corrected = {"p": self.p, "p_small": self.p_small, "p_against": self.p_against}
        notes = {"failed": list(q.failed), "doubt": q.doubt, "unknown": q.unknown}
        return words | asked | numbers | corrected | notes | counts | merged


def reread(row: Mapping[str, Any]) -> Question:
    """Return the question of a row that `as_dict` wrote, to be judged again with others.

    Raises KeyError or TypeError if something is missing or not a number.
    """
    texts = (str(row["claim"]), row["expects"], float(row["margin"]), str(row["unit"]), str(row["test"]))
    claim = Claim(*texts, bool(row["log"]), bool(row["primary"]), row["origin"])
    one, other = map(float, row["failed"])
    known = Question(claim, None, doubt=str(row["doubt"]), failed=(one, other), unknown=str(row["unknown"]))
    if row["estimate"] is None:
        return known
    estimate, se, df, low, high = (float(row[name]) for name in ("estimate", "se", "df", "low", "high"))
    if claim.log:
        estimate, low, high = (100 * math.log1p(number / 100) for number in (estimate, low, high))
    counts = int(row["seeds"]), int(row["images"]), float(row["price"])
    effect = Effect(estimate, se, df, low, high, math.nan, *counts)
    effect = replace(effect, p=two_sided(effect)) if effect.seeds > 1 else effect
    p, small, against, done = (
        math.nan if (p := row[f"{name}_alone"]) is None else float(p)
        for name in ("p", "p_small", "p_against", "p_done")
    )
    return replace(known, effect=effect, p=p, p_small=small, p_against=against, p_done=done)


# -- families: the primary claims first, then the others with what settled claims pass on -----------------------------


@dataclass(frozen=True, eq=False)
class Levels:
    """The error rates at which a claim is tested: each row of `steps` (n, 2) has an error rate and a share of it.

    `first` is the level of the first claim of its family to be settled, 0 if none is left.
    """

    steps: NDArray[np.float64]
    first: float

    def adjusted(self, p: float) -> float:
        """Return the smallest error rate of the whole ledger at which this p-value decides, at most 1; NaN for NaN."""
        if math.isnan(p):
            return p
        rates = np.maximum(self.steps[:, 0], p / self.steps[:, 1])
        return min(1.0, float(rates.min(initial=1.0)))


def correct(entries: Sequence[Entry], *, alpha: float) -> list[Levels]:
    """Return the levels of every entry.

    A claim can be wrong in two ways, "differs" and "too small to matter", but only one of them can be at a time; so
    both are tested with the same share of alpha (Shaffer 1986). A claim is settled if the sides of zero and of the
    margin are known, and can then no longer be wrong: half of its share goes to the remaining primary claims, half to
    the others (truncated Holm and a parallel gatekeeper: Dmitrienko, Tamhane & Wiens 2008), which start with nothing.
    Entries with the same effect and margin are one contrast and count once, as a primary one if any of them is.
    """
    keys = [(None if e is None else (e.estimate, e.se, e.df, e.seeds), margin) for _, e, _, margin in entries]
    settled: dict[object, float] = {}
    first = set()
    for key, (primary, _, done, _) in zip(keys, entries, strict=True):
        if not math.isnan(done):
            settled[key] = max(done, settled.get(key, 0.0))
            first |= {key} if primary else set()
    leaders = sorted(settled[key] for key in first)
    rest = sorted(done for key, done in settled.items() if key not in first)
    shares = _primary_steps(leaders)
    leading = Levels(np.array(shares[: len(leaders)]).reshape(-1, 2), alpha / max(1, len(leaders)))
    following = _rest_levels(shares, rest, len(leaders), alpha)
    return [leading if key in first else following for key in keys]


def _primary_steps(done: Sequence[float]) -> list[tuple[float, float]]:
    """Return, for 0, 1, ... settled claims, the lowest error rate for that and the share of each remaining claim."""
    n, gate = len(done), 0.0
    steps: list[tuple[float, float]] = []
    for settled in range(n + 1):
        if settled:
            gate = max(gate, done[settled - 1] / steps[-1][1])
        left = n - settled
        steps.append((gate, 0.5 / left + 0.5 / n if left else 0.0))
    return steps


def _rest_levels(shares: Sequence[tuple[float, float]], done: Sequence[float], n: int, alpha: float) -> Levels:
    """Return the levels of the claims behind the gate: Holm's, with the share that the settled ones pass on."""
    steps: list[tuple[float, float]] = []
    used = 0.0
    for settled, (opened, _) in enumerate(shares):
        share = 1.0 if settled == n else 0.5 * settled / n
        gate = opened
        for k in range(len(done) if share else 0):
            gate = max(gate, done[k - 1] * (len(done) - k + 1) / share) if k else gate
            steps.append((gate, share / (len(done) - k)))
        if opened <= alpha:
            used = share
    return Levels(np.array(steps).reshape(-1, 2), alpha * used / max(1, len(done)))


# -- verdicts ---------------------------------------------------------------------------------------------------------


class Decision(NamedTuple):
    """A verdict, its reason, the corrected p-values (NaN: no such test) and the initial level of the claim."""

    verdict: Verdict
    why: str
    p: float
    p_small: float
    p_against: float
    level: float


def decide(questions: Sequence[Question], *, dropped: Sequence[bool] = ()) -> list[Decision]:
    """Return the verdict on every claim of a ledger; `judge` returns the same as rows, with what a decision would need.

    A claimed direction is reproduced when the effect is significant that way; "opposite" when it is the other way; and
    there is "no effect that matters" when it is shown to lie within the margin. A claim of no effect is reproduced by
    the last. Primary claims share 5%; the others use what settled ones pass on (`correct`), so that the chance of any
    false verdict in a ledger is at most 5%. Anything else is undecided, as are all claims with one seed or with an
    unreliable attack. `dropped` says, for each claim that only earlier looks tested, whether it was primary;
    these are not settled and keep their share.
    """
    entries = [(q.claim.primary, q.effect, 1.0 if q.doubt else q.p_done, q.claim.margin) for q in questions]
    gone = [(primary, None, 1.0, -1.0 - number) for number, primary in enumerate(dropped)]  # no claim's margin
    found = []
    for q, levels in zip(questions, correct([*entries, *gone], alpha=ALPHA), strict=False):
        p, small, against = (levels.adjusted(p) for p in (q.p, q.p_small, q.p_against))
        verdict, why = _verdict(q, p, small, against)
        found.append(Decision(verdict, why, p, small, against, levels.first))
    return found


def judge(questions: Sequence[Question], *, study: str, dropped: Sequence[bool] = ()) -> list[Row]:
    """Return every claim with its verdict (see `decide`); a claim without an effect was not measured in this study.

    For undecided claims, `why` says what a decision would need.
    """
    return [_row(q, one, study) for q, one in zip(questions, decide(questions, dropped=dropped), strict=True)]


def _row(q: Question, one: Decision, study: str) -> Row:
    why, needed = one.why, None
    if q.effect is not None and q.effect.seeds > 1 and one.verdict == "undecided" and not q.doubt and q.effect.se > 0:
        needed = seeds_needed(q.effect, alpha=one.level) if one.level > 0 and q.effect.estimate != 0 else None
        why = f"{why}; {_takes(q, q.effect, one.level, needed)}"
    if q.effect is not None and q.effect.indicative:
        why = f"indicative ({q.effect.seeds} seed{'s' if q.effect.seeds > 1 else ''}): {why}"
    why += f" (unknown: {q.unknown})" if q.unknown and q.effect is not None else ""
    p, small, against = (None if math.isnan(p) else p for p in (one.p, one.p_small, one.p_against))
    return Row(q, one.verdict, p, small, against, study, why, needed=needed)


def _verdict(q: Question, p: float, p_small: float, p_against: float) -> tuple[Verdict, str]:
    """Judge one claim by its corrected p-values; NaN decides nothing."""
    e, expects = q.effect, q.claim.expects
    if e is None:
        return "undecided", q.unknown or "not measured in this study"
    if e.seeds == 1:
        return "undecided", "one seed cannot decide"
    if q.doubt:
        return "undecided", f"attack unreliable: {q.doubt}"
    if e.se == 0:
        return "undecided", "the change is the same on every image of every seed, so its error cannot be estimated"
    side: Expects = "above" if e.estimate > 0 else "below"
    told = f"significantly {side} zero"
    what = f"within ±{_amount(q.claim.margin, q.claim)}, by two one-sided tests"
    if expects in ("above", "not above"):
        what = f"less than {_amount(q.claim.margin, q.claim)}, by a one-sided test"
    if p_small <= ALPHA and expects in ("none", "not above"):
        return "reproduced", what + (f", and {told}" if p <= ALPHA and expects == "not above" else "")
    if p <= ALPHA and side == expects:
        return "reproduced", told + (", but too small to matter" if p_small <= ALPHA else "")
    if p_against <= ALPHA:
        return "opposite", told
    if p_small <= ALPHA:
        return "no effect that matters", what
    if q.p_small <= ALPHA:
        return "undecided", f"{what}, but not after correction"
    return "undecided", "not significant after correction" if e.low > 0 or e.high < 0 else "not significant"


def _takes(q: Question, e: Effect, alpha: float, needed: int | None) -> str:
    """Return what a decision would need at the initial level of the claim, 0 if none is left."""
    if alpha == 0:
        return "not tested, because no primary claim is settled"
    least = minimum_detectable_effect(e, alpha=alpha)
    if q.claim.log:
        least = change(least / 100)
    told = f"detectable: {_amount(least, q.claim)}"
    if (q.claim.unit == "points" and least > MOST_POINTS) or not math.isfinite(least):
        told = "no effect of any size could have been detected"
    if e.estimate == 0:
        return told
    return f"{told}; this effect needs " + (f"about {needed} seeds or more" if needed else "more than 10,000 seeds")


def _amount(number: float, claim: Claim) -> str:
    if claim.unit not in ("%", "points"):
        return f"{number:.2g} {claim.unit}"
    text = f"{number:.1f}" if abs(number) < 10 else f"{number:.0f}"
    return f"{text}%" if claim.unit == "%" else f"{text} {claim.unit}"
