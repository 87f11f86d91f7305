"""Simulate curves whose truth is known and count how often sparring.statistics is wrong, and how often it sees.

    python benchmarks/simulated_curves.py [--json] [--studies N]

A simulated network classifies an image under attack when ease(image) + luck(network) + luck(network, image) + shift is
positive, all normal: images differ more than networks do, and every network meets the same images, as in a real study.
The shift of a sparsity is its true effect; its gain in points follows in closed form. Each study has a dense control
and eight sparsities; where a sparsity is chosen there are validation images as well, seen by the same networks. Error
rates are asserted (within two standard errors of the simulation), power is reported.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.stats import norm

from sparring.statistics import (
    Curve,
    curve,
    equivalence,
    leave_one_out,
    over_sparsified,
    peak,
    simultaneous,
    sweet_spot,
)

SPARSITIES = (0.5, 0.8, 0.9, 0.95, 0.97, 0.98, 0.99, 0.995)
NETWORK, REST = 0.06, 0.6  # in units of the images' spread; the first alone moves accuracy by about 2 points
CENTRE = 0.3
# One tail of a two-sided test makes a peak, a loss, a gain or a safe sparsity, at 2.5%; equivalence has one at 5%.
BOUNDS = dict.fromkeys(
    ("false peak", "false loss", "unsafe sweet spot", "false gain, left out", "false gain, corrected"), 0.025
) | {"false equivalence": 0.05}
COVERED = 0.94
PEAK = np.array([0.2, 0.6, 1.0, 1.0, 0.6, 0.2, -0.6, -1.5])


@dataclass(frozen=True)
class Setting:
    """Name one kind of study: how many seeds and images, and the largest gain in points."""

    seeds: int
    images: int
    points: float


def share(shift: NDArray[np.float64] | float) -> NDArray[np.float64]:
    """Return the true share of images classified correctly at a shift."""
    return np.asarray(norm.cdf((CENTRE + np.asarray(shift)) / math.sqrt(1 + NETWORK**2 + REST**2)))


def shifts(points: float, shape: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return the shifts at which the true gains are `points` times the shape, in points."""
    wanted = share(0.0) + points / 100 * shape
    return np.asarray(norm.ppf(wanted) * math.sqrt(1 + NETWORK**2 + REST**2) - CENTRE)


def study(setting: Setting, shift: NDArray[np.float64], rng: np.random.Generator) -> Curve:
    """Simulate one study and compare its sparsities with its dense control."""
    return tested(setting, shift, networks(setting, rng), rng)


def networks(setting: Setting, rng: np.random.Generator) -> NDArray[np.float64]:
    """Return the luck of every network, the dense controls' first."""
    return np.asarray(NETWORK * rng.normal(size=(1 + len(SPARSITIES), setting.seeds, 1)))


def tested(setting: Setting, shift: NDArray[np.float64], luck: NDArray[np.float64], rng: np.random.Generator) -> Curve:
    """Show new images to some networks and compare the sparsities with the dense control."""
    size = (1 + len(SPARSITIES), setting.seeds, setting.images)
    latent = CENTRE + rng.normal(size=setting.images) + luck + REST * rng.normal(size=size)
    correct = (latent + np.concatenate([[0.0], shift])[:, None, None] > 0).astype(float)
    return curve(SPARSITIES, correct[1:], correct[0])


def no_effect(setting: Setting, studies: int, rng: np.random.Generator) -> dict[str, float]:
    """Return how often a study without any effect claims a peak or a loss, and how often an interval misses zero."""
    made = [study(setting, np.zeros(len(SPARSITIES)), rng) for _ in range(studies)]
    covered = [e.low <= 0 <= e.high for one in made for e in one.effects]
    return {
        "false peak": float(np.mean([peak(one, generator=rng, draws=500) is not None for one in made])),
        "false loss": float(np.mean([over_sparsified(one) is not None for one in made])),
        "coverage": float(np.mean(covered)),
    }


def chosen(setting: Setting, studies: int, rng: np.random.Generator) -> dict[str, float]:
    """Return how often a chosen sparsity is falsely said to gain where none does, and what its gain is in the mean.

    Left out: each seed's sparsity is chosen by the other seeds' validation images. Corrected: the best of the test's
    own curve, p-values times the number of sparsities, and the interval that holds for all of them.
    """
    none, left_out, corrected, covered = np.zeros(len(SPARSITIES)), [], [], []
    for _ in range(studies):
        luck = networks(setting, rng)
        one, valid = (tested(setting, none, luck, rng) for _ in range(2))
        found = leave_one_out(one, valid)
        assert found is not None
        left_out.append(found[1])
        best = int(np.argmax([e.estimate for e in one.effects]))
        corrected.append(len(SPARSITIES) * one.effects[best].p <= 0.05 and one.effects[best].estimate > 0)
        wide = simultaneous(one, generator=rng, draws=500)[best]
        covered.append(wide.low <= 0 <= wide.high)
    return {
        "false gain, left out": float(np.mean([e.p <= 0.05 and e.estimate > 0 for e in left_out])),
        "coverage, left out": float(np.mean([e.low <= 0 <= e.high for e in left_out])),
        "mean gain, left out": float(np.mean([100 * e.estimate for e in left_out])),
        "false gain, corrected": float(np.mean(corrected)),
        "coverage, simultaneous": float(np.mean(covered)),
    }


def planted(setting: Setting, studies: int, rng: np.random.Generator) -> dict[str, float]:
    """Return coverage, power, and how often the peak's set holds the best, with a curve that rises and falls."""
    shift = shifts(setting.points, PEAK)
    truth = 100 * (share(shift) - share(0.0))
    best = {s for s, gain in zip(SPARSITIES, truth, strict=True) if gain > truth.max() - 1e-9}
    made = [study(setting, shift, rng) for _ in range(studies)]
    bounds = [(e, true / 100) for one in made for e, true in zip(one.effects, truth, strict=True)]
    found = [p for one in made if (p := peak(one, generator=rng)) is not None]
    return {
        "coverage": float(np.mean([e.low <= true <= e.high for e, true in bounds])),
        "power": len(found) / studies,
        "set holds the best": float(np.mean([bool(best & set(p.members)) for p in found])) if found else math.nan,
        "size of the set": float(np.mean([len(p.members) for p in found])) if found else math.nan,
    }


def unsafe(setting: Setting, studies: int, rng: np.random.Generator) -> dict[str, float]:
    """Return how often a sweet spot or an equivalence is claimed where the truth lies exactly on the margin."""
    shift = shifts(-2.0, np.ones(len(SPARSITIES)))
    made = [study(setting, shift, rng) for _ in range(studies)]
    spots = [sweet_spot({"robust": one}, {"robust": 0.02}).sparsity is not None for one in made]
    equal = [equivalence(one.effects[0], 0.02) <= 0.05 for one in made]
    return {"unsafe sweet spot": float(np.mean(spots)), "false equivalence": float(np.mean(equal))}


def timing(rng: np.random.Generator) -> float:
    """Return the seconds that a curve of 12 sparsities, 5 seeds and 1,000 images takes with 2,000 joint draws."""
    values = rng.random((12, 5, 1000)) + np.linspace(0, 0.2, 12)[:, None, None]
    began = time.perf_counter()
    one = curve(tuple(np.linspace(0.1, 0.9, 12)), values, rng.random((5, 1000)))
    found = peak(one, generator=rng, draws=2000)
    seconds = time.perf_counter() - began
    assert found is not None
    return seconds


def check(rows: list[dict[str, object]], studies: int) -> None:
    """Assert the promised error rates, within two standard errors of the simulation."""
    for row in rows:
        for name, most in BOUNDS.items():
            assert float(str(row.get(name, 0.0))) <= most + 2 * math.sqrt(most * (1 - most) / studies), (name, row)
        for name in (name for name in row if name.startswith("coverage") and row["seeds"] != 1):
            assert float(str(row[name])) >= COVERED - 2 * math.sqrt(COVERED * (1 - COVERED) / studies), (name, row)


def main() -> None:
    """Run the simulations, print a table or JSON, and fail if an error rate is broken."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--studies", type=int, default=1000)
    options = parser.parse_args()
    rng = np.random.default_rng(1)
    rows: list[dict[str, object]] = []
    for seeds in (1, 2, 3, 5, 10):
        for points, simulate in (
            (0.0, no_effect),
            (0.0, chosen),
            (3.0, planted),
            (6.0, planted),
            (12.0, planted),
            (-2.0, unsafe),
        ):
            setting = Setting(seeds, 500, points)
            kind = simulate.__name__.replace("_", " ")
            measured = simulate(setting, options.studies, rng)
            rows.append({"seeds": seeds, "images": 500, "truth": kind, "points": points, **measured})
            if not options.json:
                told = ", ".join(f"{name} {value:.3f}" for name, value in measured.items() if not math.isnan(value))
                print(f"{seeds:2d} seeds, {kind} {points:+g} points: {told}", flush=True)
    check(rows, options.studies)
    seconds = timing(rng)
    if options.json:
        print(json.dumps({"studies": options.studies, "seconds for one curve": seconds, "rows": rows}))
    else:
        print(f"one curve of 12 sparsities, 5 seeds, 1,000 images and 2,000 draws: {seconds:.2f} s")


if __name__ == "__main__":
    main()
