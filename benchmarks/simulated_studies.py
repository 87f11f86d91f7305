"""Simulate whole ledgers whose truth is known and count how often the verdicts of sparring.statistics are wrong.

    python benchmarks/simulated_studies.py [--json] [--ledgers N]

A ledger has 6 primary claims and 100 others, in points, with a margin of 2. Seeds' luck is normal, heavy-tailed
(Student's with 3 degrees of freedom), skewed (one network in ten falls by three standard deviations more), or one
network is 20 points lower in all rows. Half of its variance is shared by all rows, as that of the dense control is,
or none; rows have 200 to 10,000 images, which vary as shares of images do. Effects are made from their mean squares,
which is all that the ledger's formula sees. Truths: no effect anywhere; every effect exactly on the margin; or a
mixture in which half of the primary claims hold by 12 points, so that the gate to the others is open, and the rest of
all claims lie on zero or on the margin.

The command fails if a rate lies beyond its bound by more than two standard errors of the simulation.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace

import numpy as np
from numpy.typing import NDArray
from scipy.special import stdtrit

from sparring.statistics import Claim, Effect, Question, ask, decide, error_of
from sparring.statistics._effects import two_sided

PRIMARY, OTHERS, MARGIN = 6, 100, 2.0
IMAGES = (200, 500, 1000, 10_000)
OF_IMAGES, OF_BOTH = 500.0, 1500.0  # variances of single differences, in points: 0.05 and 0.15 of shares
EXPECTS = ("above", "below", "none")
BOUNDS = {"false verdict": 0.05, "false gain": 0.025}
COVERED = 0.94
COLLAPSE = 20.0  # points, of one network in all rows


@dataclass(frozen=True)
class Setting:
    """Name one kind of ledger; `spread` is the seeds' standard deviation in points, 0 for 0.5 to 4 mixed over rows."""

    seeds: int
    spread: float
    truth: str
    luck: str = "normal"
    shared: float = 0.0


def settings() -> Iterator[Setting]:
    """Return every setting."""
    for seeds in (3, 5, 10):
        for spread in (0.5, 1.0, 2.0, 4.0, 0.0):
            for truth in ("none", "margin", "mixture"):
                yield Setting(seeds, spread, truth)
        for luck, shared in (("heavy", 0.0), ("skewed", 0.0), ("one collapsed", 0.0), ("normal", 0.5)):
            for truth in ("none", "mixture"):
                yield Setting(seeds, 2.0, truth, luck, shared)


def truths(setting: Setting) -> NDArray[np.float64]:
    """Return the true effect of every claim, in points; the primary ones come first."""
    rows = PRIMARY + OTHERS
    if setting.truth == "none":
        return np.zeros(rows)
    if setting.truth == "margin":
        return np.resize([MARGIN, -MARGIN], rows)
    true = np.resize([0.0, MARGIN, 0.0, -MARGIN], rows)
    true[: PRIMARY // 2] = 12.0
    return true


def luck_of(setting: Setting, shape: tuple[int, ...], rng: np.random.Generator) -> NDArray[np.float64]:
    """Return luck with mean 0 and variance 1."""
    if setting.luck == "heavy":
        return np.asarray(rng.standard_t(3, size=shape) / math.sqrt(3))
    normal = rng.normal(size=shape)
    if setting.luck == "skewed":
        normal = (normal - 3 * (rng.random(shape) < 0.1) + 0.3) / math.sqrt(1 + 9 * 0.09)
    return np.asarray(normal)


def effects(setting: Setting, rng: np.random.Generator) -> list[Effect]:
    """Return the effects of one ledger: mean squares drawn as the crossed model has them."""
    true, seeds = truths(setting), setting.seeds
    rows = len(true)
    images = rng.choice(IMAGES, size=rows)
    spread = np.full(rows, setting.spread) if setting.spread else rng.choice([0.5, 1.0, 2.0, 4.0], size=rows)
    own, common = luck_of(setting, (rows, seeds), rng), luck_of(setting, (1, seeds), rng)
    luck = math.sqrt(1 - setting.shared) * own + math.sqrt(setting.shared) * common
    by_seed = spread[:, None] * luck + rng.normal(size=(rows, seeds)) * np.sqrt(OF_BOTH / images)[:, None]
    if setting.luck == "one collapsed":
        by_seed[:, 0] -= COLLAPSE
    estimate = true + by_seed.mean(axis=1) + rng.normal(size=rows) * np.sqrt(OF_IMAGES / images)
    of_images, of_rest = images - 1, (seeds - 1) * (images - 1)
    ms_seed = images * by_seed.var(axis=1, ddof=1)
    ms_image = (seeds * OF_IMAGES + OF_BOTH) * rng.chisquare(of_images) / of_images
    ms_rest = OF_BOTH * rng.chisquare(of_rest) / of_rest
    return [
        _effect(float(e), *error_of(float(a), float(b), float(c), seeds, int(n)), seeds, int(n))
        for e, a, b, c, n in zip(estimate, ms_seed, ms_image, ms_rest, images, strict=True)
    ]


def _effect(estimate: float, se: float, df: float, seeds: int, images: int) -> Effect:
    half = float(stdtrit(df, 0.975)) * se
    one = Effect(estimate, se, df, estimate - half, estimate + half, math.nan, seeds, images)
    return replace(one, p=two_sided(one))


def questions(found: list[Effect]) -> list[Question]:
    """Return a claim of every kind in turn, the primary ones first."""
    kinds = [Claim("", EXPECTS[k % 3], MARGIN, "points", "", primary=k < PRIMARY) for k in range(len(found))]  # type: ignore[arg-type]
    return [ask(claim, one) for claim, one in zip(kinds, found, strict=True)]


def is_false(verdict: str, expects: str, true: float) -> bool:
    """Tell whether a verdict is wrong of a true effect."""
    side = {"above": true > 0, "below": true < 0, "none": abs(true) < MARGIN}[expects]
    other = {"above": true < 0, "below": true > 0, "none": true != 0}[expects]
    small = abs(true) < MARGIN
    return not {"reproduced": side, "opposite": other, "no effect that matters": small, "undecided": True}[verdict]


def simulate(setting: Setting, ledgers: int, rng: np.random.Generator) -> dict[str, float]:
    """Return how many ledgers hold a false verdict or a false gain, the coverage, and how many true gains are seen."""
    true = truths(setting)
    wrong, gains, covered, seen = 0, 0, 0.0, 0.0
    for _ in range(ledgers):
        found = effects(setting, rng)
        asked = questions(found)
        said = [one.verdict for one in decide(asked)]
        false = [is_false(v, q.claim.expects, t) for v, q, t in zip(said, asked, true, strict=True)]
        wrong += any(false)
        gains += any(
            f and v == "reproduced" and q.claim.expects == "above" for f, v, q in zip(false, said, asked, strict=True)
        )
        covered += float(np.mean([e.low <= t <= e.high for e, t in zip(found, true, strict=True)]))
        seen += said[0] == "reproduced"
    power = {"power at 12 points": seen / ledgers} if setting.truth == "mixture" else {}
    return {"false verdict": wrong / ledgers, "false gain": gains / ledgers, "coverage": covered / ledgers} | power


def broken(setting: Setting, measured: dict[str, float], ledgers: int) -> list[str]:
    """Return the names of rates that lie beyond their bounds by more than two standard errors."""
    found = [
        name for name, most in BOUNDS.items() if measured[name] > most + 2 * math.sqrt(most * (1 - most) / ledgers)
    ]
    rows = ledgers * (PRIMARY + OTHERS) / 2  # where luck is shared rows are not independent: half of them count
    if setting.luck == "one collapsed":
        return found  # what an interval should cover then is a matter of taste
    return found + ["coverage"] * (measured["coverage"] < COVERED - 2 * math.sqrt(COVERED * (1 - COVERED) / rows))


def main() -> None:
    """Run the simulations, print a line each or JSON, and fail if a rate is broken."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--ledgers", type=int, default=1000)
    options = parser.parse_args()
    rng, rows, failed = np.random.default_rng(1), [], []
    for setting in settings():
        measured = simulate(setting, options.ledgers, rng)
        rows.append(asdict(setting) | measured)
        beyond = broken(setting, measured, options.ledgers)
        failed += [(setting, beyond)] if beyond else []
        if not options.json:
            told = ", ".join(f"{name} {100 * value:.2f}%" for name, value in measured.items())
            print(f"{setting}: {told} {'BROKEN ' + ', '.join(beyond) if beyond else ''}", flush=True)
    if options.json:
        print(json.dumps({"ledgers": options.ledgers, "rows": rows}))
    if failed:
        raise SystemExit(f"{len(failed)} settings are beyond their bounds: {failed}")


if __name__ == "__main__":
    main()
