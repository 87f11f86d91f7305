"""How often a study that is looked at again and again claims a gain that is not there.

    python benchmarks/simulated_looks.py

simulates studies without any effect: a dense control and six sparsities, or one, which no correction over sparsities
protects; normal seeds that differ by two points, 20 images that add next to nothing, which is when few seeds err
most. Each is looked at several times while it grows, or shrinks and grows, as somebody does who wants a gain; it counts
as wrong if one of its looks called one gain significant. "As one look" is what comes of judging each look as if it were
the only one, "paid" what `sparring` does: p-values times the price of the look, sparsities that were dropped still
counted. The command fails if what is paid for is wrong more often than 2.5% (half of 5%, as the other half are losses),
by more than the simulation's own error.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Callable, Iterator

import numpy as np
from numpy.typing import NDArray

from sparring.statistics import Curve, curve, look_price

SPARSITIES = (0.5, 0.8, 0.9, 0.95, 0.98, 0.99)
MOST, IMAGES = 20, 20
SEEDS_SD, REST_SD = 0.02, 0.01  # of a network's mean, and of one image on one network
Values = NDArray[np.float64]
Look = tuple[int, tuple[int, ...]]  # seeds, and which sparsities the plan has
Strategy = Callable[[Callable[[Look], Curve]], Iterator[Look]]

EVERY = tuple(range(len(SPARSITIES)))


def planned(*seeds: int) -> Strategy:
    """Look after so many seeds each, decided beforehand."""

    def strategy(_: Callable[[Look], Curve]) -> Iterator[Look]:
        yield from ((count, EVERY) for count in seeds)

    return strategy


def by_promise(see: Callable[[Look], Curve]) -> Iterator[Look]:
    """Add one seed as long as something looks promising, and as many as there are already where nothing does."""
    seeds = 3
    for _ in range(10):
        yield seeds, EVERY
        best = min((e.p for e in see((seeds, EVERY)).effects if e.estimate > 0), default=1.0)
        seeds += 1 if best < 0.1 else seeds
        if seeds > MOST:
            return


def shrinking(see: Callable[[Look], Curve]) -> Iterator[Look]:
    """Keep of all sparsities the one that looks best, give it more seeds, and take the others in again."""
    yield 3, EVERY
    effects = see((3, EVERY)).effects
    best = max(range(len(effects)), key=lambda k: effects[k].estimate)
    for seeds in (3, 5, 8):
        yield seeds, (best,)
    yield 8, EVERY


STRATEGIES: dict[str, Strategy] = {
    "3 seeds, once": planned(3),
    "3, 4, 5 seeds": planned(3, 4, 5),
    "3, 5, 10 seeds": planned(3, 5, 10),
    "3, 4, ... 12 seeds (10 looks)": planned(*range(3, 13)),
    "one more seed while it looks promising, else twice as many": by_promise,
    "3 seeds, then the best sparsity alone to 8 seeds, then all": shrinking,
}


def draw(rng: np.random.Generator) -> tuple[Values, Values]:
    """Return the values of all networks and of the dense control, with as many seeds as there can be."""
    size = (1 + len(SPARSITIES), MOST, IMAGES)
    made = SEEDS_SD * rng.normal(size=(*size[:2], 1)) + REST_SD * rng.normal(size=size)
    return made[1:], made[0]


def errs(strategy: Strategy, values: Values, control: Values, *, paid: bool) -> bool:
    """Tell whether one look of a study without effect calls a gain significant."""
    seen: dict[Look, int] = {}
    before: set[int] = set()

    def see(look: Look) -> Curve:
        seeds, chosen = look
        kept = [k for k in chosen if k < len(values)]
        return curve(tuple(SPARSITIES[k] for k in kept), values[kept, :seeds], control[:seeds])

    for look in strategy(see):
        number = seen.setdefault(look, len(seen) + 1)
        before |= set(look[1])
        one = see(look)
        one = one.priced(look_price(number), len(before - set(look[1]))) if paid else one
        if any(one.gains()):
            return True
    return False


def main() -> None:
    """Run the simulations, print a table or JSON, and fail if the promised error rate is broken."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--studies", type=int, default=4000)
    options = parser.parse_args()
    rng = np.random.default_rng(1)
    cases = [(name, count) for count in (len(SPARSITIES), 1) for name in STRATEGIES]
    wrong = {(case, paid): 0 for case in cases for paid in (False, True)}
    for _ in range(options.studies):
        values, control = draw(rng)
        for (name, count), paid in wrong:
            wrong[(name, count), paid] += errs(STRATEGIES[name], values[:count], control, paid=paid)
    rates = {key: count / options.studies for key, count in wrong.items()}
    error = math.sqrt(0.025 * 0.975 / options.studies)
    if options.json:
        found = [{"looks": c[0], "sparsities": c[1], "paid": p, "false gain": rate} for (c, p), rate in rates.items()]
        print(json.dumps({"studies": options.studies, "standard error": error, "rows": found}))
    else:
        for name, count in cases:
            once, paid = (rates[(name, count), paid] for paid in (False, True))
            print(f"{count} sparsities, {name}: as one look {once:.2%}, paid {paid:.2%}")
        print(f"standard error at 2.5%: {error:.2%}")
    for case in cases:
        assert rates[case, True] <= 0.025 + 2 * error, (case, rates[case, True])


if __name__ == "__main__":
    main()
