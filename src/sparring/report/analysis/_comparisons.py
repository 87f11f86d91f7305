"""Comparisons on the same images: two methods, an artefact and its network, a proof and an attack."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np

from ...records import Checkpoint, Record, arrays, image_places
from ...statistics import Effect, effect, equivalence, holm
from .. import _numbers as numbers
from ._findings import Findings, difference, paired
from ._metrics import NORMS, Floats, Measure, PerImage, common, pretty, pretty_eps
from ._records import Network, Study

MARGIN = 0.02  # of the images: a smaller difference in robustness does not matter


Verdict = Literal["equal", "equivalent", "less", "more", "undecided"]
VERDICTS: dict[Verdict, str] = {
    "equal": "as robust as the model on every image",
    "equivalent": f"as robust as the model, within {100 * MARGIN:g} points",
    "less": "less robust than the model",
    "more": "more robust than the model",
    "undecided": "undecided, more images are needed",
}


def shipped_verdict(one: Effect) -> str:
    """Return the verdict on a paired difference in robust accuracy, artefact − model."""
    return VERDICTS[_verdict(one)]


def _verdict(one: Effect) -> Verdict:
    if one.estimate == one.low == one.high == 0:
        return "equal"
    if equivalence(one, MARGIN) <= 0.05:
        return "equivalent"
    if one.high < 0:
        return "less"
    return "more" if one.low > 0 else "undecided"


@dataclass(frozen=True)
class Shipped:
    """One kind of network and attack: the records of all seeds, and the difference of robust accuracies."""

    method: str
    sparsity: float
    values: str
    attack: str
    records: tuple[Record, ...]
    effect: Effect

    @property
    def verdict(self) -> Verdict:
        """Return the verdict on whether the artefact is as robust as the studied network."""
        return _verdict(self.effect)

    def mean(self, name: str) -> float:
        """Return the mean of a metric over the seeds that have it, NaN if none has."""
        known = [value for record in self.records if (value := record.metrics.get(name)) is not None]
        return sum(known) / len(known) if known else math.nan

    def radii(self) -> Iterator[tuple[str, float, float]]:
        """Yield mean certified radii, of network and artefact, for each norm and method."""
        for proof in self.records[0].inputs["certify"]:
            norm, way = proof["norm"], proof["method"]
            names = [f"radius_{side}_{norm}_{way}" for side in ("model", "packed")]
            if all(name in self.records[0].metrics for name in names):
                values: Floats = np.array([[r.metrics[name] for name in names] for r in self.records], float)
                first, second = map(float, values.mean(0))
                yield f"{NORMS.get(norm, norm)} {way}", first, second


def shipped(findings: Findings) -> list[Shipped]:
    """Return every kind of network that was compared with its artefact."""
    cells: dict[tuple[str, float, str, str], list[Record]] = defaultdict(list)
    for network in findings.study.networks:
        for record in (r for r in network.stage("ship") if r.object is not None):
            attack = record.inputs["attack"]
            norm, eps = NORMS.get(attack["norm"], attack["norm"]), pretty_eps(attack["eps"])
            label = f"{pretty(attack['name'])}, {norm} ε = {eps}"
            values = record.inputs["values"]
            if record.inputs.get("activations", "fp32") != "fp32":
                values += ", activations too"
            cells[network.method, network.sparsity, values, label].append(record)
    found = []
    for cell, records in cells.items():
        held = [arrays(record, "stands_model", "stands_packed") for record in records]
        standing = effect([one["stands_packed"].astype(float) - one["stands_model"] for one in held])
        found.append(Shipped(*cell, tuple(records), standing))
    return found


@dataclass(frozen=True)
class Duel:
    """One metric's paired difference between two methods, in points or per cent; `p` is corrected over all."""

    measure: Measure
    sparsity: float
    method: str
    against: str
    effect: Effect
    p: float

    @property
    def significant(self) -> bool:
        """Return whether the difference is significant; never with one network of each method."""
        return self.p <= 0.05 and self.effect.seeds > 1


def yardstick(findings: Findings, checkpoint: Checkpoint = "final") -> str | None:
    """Return the method that others are compared with: random masks, or without them the headline's method."""
    here = [m for m in _methods(findings) if findings.study.checkpoint(m) == checkpoint]
    masks = [m for m in here if findings.study.kind(m) == "random"]
    return next((m for m in (*masks, findings.method) if m in here), None)


def duels(findings: Findings) -> list[Duel]:
    """Return every main metric of every pruned network against its yardstick at the same sparsity, sparsest last."""
    found = sorted(_duels(findings), key=lambda duel: duel.sparsity)
    corrected = map(float, holm([duel.effect.p for duel in found])) if found else ()
    return [replace(duel, p=p) for duel, p in zip(found, corrected, strict=True)]


def _duels(findings: Findings) -> Iterator[Duel]:
    for method in _methods(findings):
        against = yardstick(findings, findings.study.checkpoint(method))
        if against is None or against == method:
            continue
        for sparsity in (s for s in findings.study.sparsities(method) if s in findings.study.sparsities(against)):
            for measure in findings.main:
                one = difference(findings, measure, (method, sparsity), (against, sparsity))
                other = findings.result(measure, against)
                if one is None or other is None or sparsity not in other.sparsities:
                    continue
                level = other.levels[other.sparsities.index(sparsity)]
                if numbers.gain_unit(measure, level) != numbers.ABSOLUTE:
                    yield Duel(measure, sparsity, method, against, numbers.shown(measure, one, level), one.p)


def _methods(findings: Findings) -> list[str]:
    return [m for m in findings.study.methods if findings.study.axis(m) == "weights"]


@dataclass(frozen=True)
class DistanceBounds:
    """For one method and sparsity, medians over correctly classified images of all seeds, all on the same images.

    The true median is between `certified` and `attack`, and if searches were made between `lower` and `upper`;
    None: there are no such records. `ratio` is the median of attack / certified over images with a positive radius,
    `solved` the share of searches that ended with the exact distance.
    """

    method: str
    sparsity: float
    seeds: int
    images: int
    certified: float | None
    attack: float | None
    lower: float | None
    upper: float | None
    ratio: float | None
    solved: float | None


def norms(findings: Findings) -> list[str]:
    """Return the norms in which bounds of a distance were proved."""
    certified = [m.norm for m in findings.collected if m.role == "certified"]
    searched = [str(r.inputs["norm"]) for r in findings.study.records.values() if r.stage == "exact" and not r.error]
    return list(dict.fromkeys([*certified, *searched]))


def brackets(findings: Findings, norm: str, *, exact: bool) -> list[DistanceBounds]:
    """Return the dense control's and the headline method's brackets in a norm, in order of sparsity.

    With `exact` on the few images with exact searches, else on all that were certified and attacked.
    """
    found = []
    for method in (findings.study.control(), findings.method or ""):
        for sparsity in findings.study.sparsities(method):
            rows = [
                r for n in findings.study.of(method, sparsity) if (r := _rows(findings, n, norm, exact)) is not None
            ]
            if rows:
                found.append(_bracket(method, sparsity, rows))
    return found


def _rows(findings: Findings, network: Network, norm: str, exact: bool) -> dict[str, Floats] | None:
    """Return one network's values on the correctly classified images that all its records share."""
    parts = _searched(findings.study, network, norm) if exact else {}
    if exact and not parts:
        return None
    certified, distances = (_tested(findings, network, role, norm) for role in ("certified", "distance-correct"))
    attacked = [replace(one, top=one.found) for one in distances]
    if not exact and not (certified and attacked):
        return None
    images = common([one.images for one in (*parts.values(), *certified, *attacked)])
    rows = {name: one.at(images).top for name, one in parts.items()}
    tops = [one.at(images).top for one in attacked] + ([rows.pop("found")] if "found" in rows else [])
    rows["attack"] = np.minimum.reduce(tops)
    if certified:
        rows["certified"] = np.maximum.reduce([one.at(images).top for one in certified])
    usable = np.isfinite(rows["attack"]) & (rows["attack"] > 0)
    usable &= rows.pop("clean_correct", usable) > 0
    return {name: row[usable] for name, row in rows.items()} if usable.any() else None


def _tested(findings: Findings, network: Network, role: str, norm: str) -> list[PerImage]:
    """Return a network's values in a role and norm on test images, by every attack or method."""
    wanted = (m for m in findings.collected if (m.role, m.norm, m.split) == (role, norm, "test"))
    return [
        findings.collected[m][network.who]
        for m in wanted
        if m.name != "smallest" and network.who in findings.collected[m]
    ]


def _searched(study: Study, network: Network, norm: str) -> dict[str, PerImage]:
    """Return the results of searches for exact distances: bounds, which are equal if solved, and the initial attack."""
    for record in network.stage("exact"):
        if record.inputs["norm"] == norm:
            held = arrays(record, "lower", "upper", "solved", "attack", "clean_correct", "images")
            if held:
                images = image_places(record, held, study.dataset)
                named = {"found" if name == "attack" else name: a for name, a in held.items() if name != "images"}
                return {name: PerImage(images, a.astype(float), np.ones(len(a))) for name, a in named.items()}
    return {}


def _bracket(method: str, sparsity: float, networks: list[dict[str, Floats]]) -> DistanceBounds:
    rows = {name: np.concatenate([one[name] for one in networks]) for name in networks[0]}
    middle = {name: float(np.median(row)) for name, row in rows.items()}
    proved = rows.get("certified", np.zeros_like(rows["attack"])) > 0
    return DistanceBounds(
        method=method,
        sparsity=sparsity,
        seeds=len(networks),
        images=max(len(one["attack"]) for one in networks),
        certified=middle.get("certified"),
        attack=middle["attack"],
        lower=middle.get("lower"),
        upper=middle.get("upper"),
        ratio=float(np.median(rows["attack"][proved] / rows["certified"][proved])) if proved.any() else None,
        solved=float(rows["solved"].mean()) if "solved" in rows else None,
    )


@dataclass(frozen=True)
class Verified:
    """Results of one method and sparsity at a fixed eps: shares of all images, means over seeds.

    interval, alpha_crown, verified: proved by these methods, each after the one before, and by the search after both.
    `gap` has the ends of robust accuracy minus the dense control's on the same images, its minimum and maximum:
    verified − the control's not falsified, not falsified − the control's verified; None for dense networks. `eased` is
    the difference of verified shares.
    """

    norm: str
    eps: float
    method: str
    sparsity: float
    seeds: int
    images: int
    interval: float
    alpha_crown: float
    verified: float
    falsified: float
    undecided: float
    stable: float
    gap: tuple[Effect, Effect] | None
    eased: Effect | None

    @property
    def told(self) -> str:
        """Describe what this row alone shows against the control; empty for the control."""
        if self.gap is None or self.eased is None:
            return ""
        if self.gap[0].low > 0:
            return "more robust"
        if self.gap[1].high < 0:
            return "less robust"
        easier = "easier to verify" if self.eased.low > 0 else "harder to verify" if self.eased.high < 0 else "neither"
        return easier if easier != "neither" else "no difference shown"


def verified(findings: Findings) -> list[Verified]:
    """Return the results of every method, for each norm and eps in order of sparsity."""
    return [
        _verified(findings, measure, method, sparsity, records)
        for measure in findings.collected
        if measure.role == "verified"
        for method in (findings.study.control(), *findings.study.methods)
        for sparsity in findings.study.sparsities(method)
        if (records := _verdicts(findings.study, measure, method, sparsity))
    ]


def _verdicts(study: Study, measure: Measure, method: str, sparsity: float) -> list[Record]:
    return [
        record
        for network in study.of(method, sparsity)
        for record in network.stage("verify")
        if (record.inputs["norm"], record.inputs["eps"]) == (measure.norm, measure.eps) and record.object is not None
    ]


def _verified(findings: Findings, measure: Measure, method: str, sparsity: float, records: list[Record]) -> Verified:
    held = [arrays(record, "verified_by", "falsified", "stable") for record in records]
    by, falsified, stable = (np.concatenate([one[name] for one in held]) for name in held[0])
    ends = gap(findings, measure, (method, sparsity))
    eased = None if ends is None else difference(findings, measure, (method, sparsity), _control(findings, method))
    return Verified(
        norm=measure.norm,
        eps=measure.eps or 0.0,
        method=method,
        sparsity=sparsity,
        seeds=len(records),
        images=len(held[0]["verified_by"]),
        interval=float((by == 1).mean()),
        alpha_crown=float(((by == 1) | (by == 2)).mean()),
        verified=float((by > 0).mean()),
        falsified=float(falsified.mean()),
        undecided=float(((by == 0) & (falsified == 0)).mean()),
        stable=float(stable.mean()),
        gap=ends,
        eased=eased,
    )


def _control(findings: Findings, method: str) -> tuple[str, float]:
    return findings.study.control(method), 0.0


def gap(findings: Findings, measure: Measure, who: tuple[str, float]) -> tuple[Effect, Effect] | None:
    """Return the minimum and maximum by which robust accuracy can exceed the control's; None for a control."""
    if findings.study.is_dense(who[0]):
        return None
    proved, open_ = (
        {
            side: {seed: one for (*which, seed), one in findings.collected[m].items() if tuple(which) == side}
            for side in (who, _control(findings, who[0]))
        }
        for m in (measure, replace(measure, role="not falsified"))
    )
    control = _control(findings, who[0])
    least = paired(findings, measure, proved[who], open_[control])
    most = paired(findings, measure, open_[who], proved[control])
    return None if least is None or most is None else (least, most)
