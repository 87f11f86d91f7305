"""Compare a network's attacks with each other: if a weaker attack does better, the stronger one is unreliable.

Each record is checked when it is written; these checks need two records, and only records.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence, Set
from dataclasses import dataclass, replace
from itertools import combinations

import numpy as np
from scipy.special import bdtrc

from ...proofs import refuse_refuted
from ...records import arrays, image_places
from ._metrics import (
    NORMS,
    Collected,
    Measure,
    PerImage,
    common,
    measures_of,
    parts,
    pretty,
    pretty_eps,
    rung,
)
from ._records import Study, Who, attack_label

ITERATED = 1.0  # the rank from which on an attack should find, in a larger budget, what others find in a smaller one
GATHERED = 3.0  # the rank from which on an attack counts as a worst case
NOTABLE = 0.02  # of the images, and at least two of them
FAR = 0.05  # of the images: `fast` misses at most 1.5% of `standard` without masked gradients (benchmarks/gaps.py)
CHANCE = 1e-3  # probability of such an uneven count if both attacks were equally strong
SLACK = 1.05  # of a distance: DeepFool's overshoot is 2%
DECISIVE = ("masked-gradients", "partial-gradients", "contradicted-distance")  # flags under which nothing is decided

Held = tuple[Measure, PerImage]


@dataclass(frozen=True)
class Doubt:
    """A reason why an attack's numbers on one network may be wrong; `attack` is its label."""

    name: str
    detail: str
    who: Who
    attack: str


def doubts(study: Study, collected: Collected) -> list[Doubt]:
    """Return every contradiction between two attacks on the same network and images, in the plan's order.

    Naive attacks are omitted: they are expected to be weaker. Raise UserError if an attack refutes a certificate.
    """
    _refuse_refuted(study, collected)
    pixels = math.prod(study.dataset["shape"])
    attacked = [
        m for m in collected if m.role in ("budget", "distance") and m.attack and m.name != "smallest" and not m.naive
    ]
    found = []
    for network in study.networks:
        held = {m: one for m in attacked if (one := collected[m].get(network.who)) is not None}
        for first, second in combinations(held.items(), 2):
            for weak, strong in ((first, second), (second, first)):
                told = _against(weak, strong, pixels) if weak[0].split == strong[0].split else ()
                found += [Doubt(name, detail, network.who, strong[0].attack) for name, detail in told]
    return found


def suspicion(study: Study, collected: Collected, found: Sequence[Doubt], measure: Measure, whos: Set[Who]) -> str:
    """Return why a measure is unreliable on some networks; empty if it is not.

    Its attacks raised a flag on one of them that they miss adversarial examples; or a stronger ensemble, which ran on
    only some, leaves notably less robust accuracy.
    """
    asked = {(m.attack, m.naive, m.split, m.eps) for m in parts(collected, measure) if m.attack}
    names = {attack for attack, naive, *_ in asked if not naive}
    flagged = {
        (str(flag["name"]), attack_label(record))
        for network in study.networks
        if network.who in whos
        for record in network.records
        for flag in record.flags
        if flag["name"] in DECISIVE and record.stage == "attack"
        for one in measures_of(record)
        if (one.attack, one.naive, one.split, one.eps) in asked
    }
    flagged |= {(d.name, d.attack) for d in found if d.who in whos and d.attack in names and d.name in DECISIVE}
    told = [f"{name} ({pretty(attack)})" for name, attack in sorted(flagged)]
    if measure.role == "worst":
        missed = _missed(collected, measure, whos).items()
        told += [
            f"robust accuracy under {name} is {100 * by:.1f} points lower than under the cheaper attacks"
            for name, by in missed
            if by > NOTABLE
        ]
    return ", ".join(told)


def _missed(collected: Collected, worst: Measure, whos: Set[Who]) -> dict[str, float]:
    """Return the most, over the networks, by which each ensemble lowers a worst case that does not include it."""
    here = set(parts(collected, worst))
    found: dict[str, float] = {}
    for measure, held in collected.items():
        alike = (measure.split, measure.norm, measure.eps) == (worst.split, worst.norm, worst.eps)
        if alike and measure.role == "budget" and measure not in here and rung(measure) >= GATHERED:
            for who in whos & held.keys() & collected[worst].keys():
                images = common([held[who].images, collected[worst][who].images])
                cheap, strong = collected[worst][who].at(images).top, held[who].at(images).top
                by = float(np.maximum(cheap - strong, 0.0).mean()) if len(images) else 0.0
                found[measure.label] = max(by, found.get(measure.label, 0.0))
    return found


def _refuse_refuted(study: Study, collected: Collected) -> None:
    """Compare every certified radius, exact distance and verified ball with every attack in its norm.

    Any success within the eps of a verified ball refutes it; for the others see `refuse_refuted`.
    """
    proofs = [(m.norm, who, one) for m, held in collected.items() if m.role == "certified" for who, one in held.items()]
    balls = [
        (m.norm, who, replace(one, top=(m.eps or 0.0) * one.top))
        for m, held in collected.items()
        if m.role == "verified"
        for who, one in held.items()
    ]
    for network in study.networks:
        for record in network.stage("exact"):
            if bound := arrays(record, "lower", "images"):
                images, lower = image_places(record, bound, study.dataset), bound["lower"].astype(float)
                one = PerImage(images, lower, np.ones(len(lower)))
                proofs.append((str(record.inputs["norm"]), network.who, one))
    reaching = ("budget", "distance-correct", "not falsified")
    for number, (norm, who, proof) in enumerate([*balls, *proofs]):
        for m, held in collected.items():
            if (m.norm, m.split) != (norm, "test") or m.role not in reaching or who not in held:
                continue
            images = common([proof.images, held[who].images])
            one = held[who].at(images)
            reached = one.found if m.eps is None else np.where(one.top == 0, m.eps or np.inf, np.inf)
            named = f"{who[0]} at sparsity {who[1]:g}, seed {who[2]}, {m.label}"
            proved, reached = proof.at(images).top, np.where(reached > 0, reached, np.inf)
            closed = number < len(balls) and m.eps is not None
            refuse_refuted(proved, reached, norm=norm, who=named, images=images, closed=closed)


def _against(weak: Held, strong: Held, pixels: int) -> Iterator[tuple[str, str]]:
    """Yield flags, with details, that the first attack's success raises against the second's numbers."""
    (one, _), (other, _) = weak, strong
    if one.role == other.role == "budget" and one.norm == other.norm:
        yield from _between_budgets(weak, strong)
    elif one.role == "budget" and other.role == "distance" and one.eps is not None:
        reach = _reach(one, other.norm, pixels)
        if reach is not None and (extra := _beyond(weak[1], strong[1], reach)):
            yield (
                "contradicted-distance",
                f"on {extra} images the distance found is above {reach:.3g} ({NORMS[other.norm]}), although "
                f"{pretty(one.attack)} at {NORMS[one.norm]} ε = {pretty_eps(one.eps)} succeeds within it",
            )


def _between_budgets(weak: Held, strong: Held) -> Iterator[tuple[str, str]]:
    (one, _), (other, _) = weak, strong
    (lower, upper), (smaller, larger) = (rung(one), rung(other)), (one.eps or 0.0, other.eps or 0.0)
    near, far = pretty_eps(smaller), pretty_eps(larger)
    at = f"at {NORMS[one.norm]} ε = {near}"
    if smaller == larger and lower < upper and (extra := _extra(weak, strong)):
        yield "weaker-wins", f"{pretty(one.attack)} fools {extra} more images {at}"
    elif smaller == larger and lower > upper >= GATHERED and (extra := _extra(weak, strong, notable=FAR)):
        told = f"{pretty(one.attack)} fools {extra} more images {at}"
        yield "outdone", f"{told}; networks on which it did not run may be overestimated by as many"
    elif smaller < larger and one.attack == other.attack and (extra := _extra(weak, strong)):
        yield "weaker-wins", f"ε = {far} fools {extra} fewer images than ε = {near}"
    elif smaller < larger and upper >= ITERATED and one.attack != other.attack and (extra := _extra(weak, strong)):
        yield "weaker-wins", f"{pretty(one.attack)} {at} fools {extra} more images than this attack at ε = {far}"


def _extra(weak: Held, strong: Held, *, notable: float = NOTABLE) -> int:
    """Return how many more images the first attack fools, 0 if few or by chance (McNemar's exact test, one-sided)."""
    images = common([weak[1].images, strong[1].images])
    stands_strong, stands_weak = (one.at(images).top > 0 for _, one in (strong, weak))
    more, fewer = int((stands_strong & ~stands_weak).sum()), int((stands_weak & ~stands_strong).sum())
    if more <= fewer or bdtrc(more - 1, more + fewer, 0.5) > CHANCE:
        return 0
    return _notable(more - fewer, len(images), notable)


def _reach(budget: Measure, norm: str, pixels: int) -> float | None:
    """Return the largest length, in another norm, of a perturbation within a budget; None if unknown."""
    assert budget.eps is not None
    if budget.norm == norm:
        return budget.eps
    if budget.norm == "linf" and norm in ("l2", "l1"):
        return budget.eps * (math.sqrt(pixels) if norm == "l2" else pixels)
    if (budget.norm, norm) in (("l2", "linf"), ("l1", "linf"), ("l1", "l2")):
        return budget.eps  # the larger p, the smaller the norm
    return None


def _beyond(budget: PerImage, distance: PerImage, reach: float) -> int:
    """Return on how many images a smaller perturbation is known than the minimum-norm attack's, 0 if few."""
    images = common([budget.images, distance.images])
    one, other = budget.at(images), distance.at(images)
    return _notable(int(((one.top == 0) & (other.found > SLACK * reach)).sum()), len(images))


def _notable(count: int, images: int, share: float = NOTABLE) -> int:
    return count if count >= max(2, share * images) else 0
