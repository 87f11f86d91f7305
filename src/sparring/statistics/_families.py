"""Correction for the number of claims: a primary family first, then the rest with what settled claims hand on."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ._effects import Effect

Entry = tuple[bool, Effect | None, float, float]  # primary?, effect, the p-value of being settled, margin


@dataclass(frozen=True, eq=False)
class Levels:
    """Hold at which error rates a claim is tested: from a rate on, with a share of it, both in a row of `steps` (n, 2).

    `first` is the level of the first claim of its family to be settled, 0 if none was left for it.
    """

    steps: NDArray[np.float64]
    first: float

    def adjusted(self, p: float) -> float:
        """Return the smallest error rate of the whole ledger at which this p-value decides, at most 1; NaN stays."""
        if math.isnan(p):
            return p
        rates = np.maximum(self.steps[:, 0], p / self.steps[:, 1])
        return min(1.0, float(rates.min(initial=1.0)))


def correct(entries: Sequence[Entry], *, alpha: float) -> list[Levels]:
    """Return the levels of every entry.

    A claim can be wrong in two ways, "differs" and "too small to matter", but only one of them can be at a time; so
    both are tested at its one share of alpha (Shaffer 1986). A claim that is settled, known to lie on one side of zero
    and of the margin, can be wrong no more: half of its share goes to the primary claims that are left, half to the
    others (truncated Holm and a parallel gatekeeper: Dmitrienko, Tamhane & Wiens 2008), which have nothing before.
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
    """Return, with 0, 1, ... claims settled, from which error rate on that is so and the share of one that is left."""
    n, gate = len(done), 0.0
    steps: list[tuple[float, float]] = []
    for settled in range(n + 1):
        if settled:
            gate = max(gate, done[settled - 1] / steps[-1][1])
        left = n - settled
        steps.append((gate, 0.5 / left + 0.5 / n if left else 0.0))
    return steps


def _rest_levels(shares: Sequence[tuple[float, float]], done: Sequence[float], n: int, alpha: float) -> Levels:
    """Return the levels of the claims behind the gate: Holm's, with the share that so many settled ones hand on."""
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
