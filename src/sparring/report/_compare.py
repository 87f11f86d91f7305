"""Compare networks of one study or of two, and choose the network to ship."""

from __future__ import annotations

import math
import statistics
from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from ..errors import UnknownNameError, UserError
from ..statistics import LEAST_RATIO, Effect, effect, unpaired
from ..units import percent
from . import _numbers as numbers
from . import _summary as words
from .analysis._findings import Findings, difference, find
from .analysis._metrics import Floats, Measure, PerImage, common, values
from .analysis._records import load


@dataclass(frozen=True)
class Side:
    """The networks of one side: a study's folder, a method and a sparsity, with all seeds.

    Method and sparsity default to those of the study's headline.
    """

    folder: Path
    method: str | None = None
    sparsity: float | None = None


@dataclass(frozen=True)
class Difference:
    """One metric of both sides and the change from the first to the second.

    `change` is in `unit`: points for a share, or % of the first side's mean distance. `paired` says whether both sides
    have the same images. With one seed, intervals describe these networks on new images; otherwise also new seeds.
    """

    metric: str
    title: str
    first: Effect
    second: Effect
    change: Effect
    unit: str
    paired: bool

    def __repr__(self) -> str:
        change = f"{self.change.estimate:+.3g} [{self.change.low:+.3g}, {self.change.high:+.3g}] {self.unit}"
        return f"{self.metric}: {self.first.estimate:.4g} → {self.second.estimate:.4g}, {change}"

    def __str__(self) -> str:
        return f"{self.title}: {numbers.signed(self.change, self.unit)}"

    def cells(self) -> list[str]:
        """Return the cells of a table's row: metric, both values, the change with its interval, and the p-value."""
        shown = percent if self.unit == "points" else numbers.length
        values = [shown(one.estimate) for one in (self.first, self.second)]
        return [self.metric, *values, numbers.signed(self.change, self.unit), numbers.p_value(self.change.p)]


def compare(first: Side, second: Side) -> list[Difference]:
    """Return the change of every metric that both sides have, on test images, in reading order.

    The comparison is paired by image if the data are the same, and by seed as far as both have seeds. Raises UserError
    if a folder has no study, a side no network, or the two no common metric.
    """
    found = [find(load(side.folder)) for side in (first, second)]
    chosen = [_chosen(findings, side) for findings, side in zip(found, (first, second), strict=True)]
    same = found[0].study.data == found[1].study.data
    shared = [m for m in found[0].collected if m.split == "test" and m in found[1].collected]
    made = [_difference(m, [_held(f, m, c) for f, c in zip(found, chosen, strict=True)], same) for m in shared]
    differences = [one for one in made if one is not None]
    if not differences:
        raise UserError("the two sides have no metric in common: attack both with the same attacks and budgets")
    return differences


def compare_values(
    first: Mapping[str, Floats], second: Mapping[str, Floats], *, lengths: Container[str] = ()
) -> list[Difference]:
    """Return the change of every metric of two models, from values per image (N,) of the same images.

    Metrics in `lengths` change in % of the first model's mean; the others are shares of images (0 or 1).
    """
    found = []
    for name in (n for n in first if n in second):
        before, after = effect(first[name][None]), effect(second[name][None])
        measure = Measure("distance" if name in lengths else "worst")
        change = numbers.shown(measure, measure.change(second[name][None], first[name][None]), before)
        unit = numbers.gain_unit(measure, before)
        found.append(Difference(name, name, before, after, change, unit, paired=True))
    return found


def broken(differences: Sequence[Difference], allowed: Mapping[str, float]) -> list[str]:
    """Return a sentence for every metric whose interval does not rule out a larger drop than allowed.

    `allowed` maps metrics (as in `Difference.metric`) to drops in the change's unit. Raises UnknownNameError for a
    metric that was not compared.
    """
    known = {one.metric: one for one in differences}
    for name in allowed:
        if name not in known:
            raise UnknownNameError("metric", name, known)
    return [
        f"{known[name]}, which does not rule out a drop of more than {numbers.amount(drop, known[name].unit)}"
        for name, drop in allowed.items()
        if known[name].change.low < -drop
    ]


def _chosen(findings: Findings, side: Side) -> tuple[str, float]:
    """Return the method and sparsity of a side."""
    known = {(n.method, n.sparsity) for n in findings.study.networks}
    method = side.method if side.method is not None else findings.method
    sparsities = sorted(s for m, s in known if m == method)
    if method is None or not sparsities:
        raise UnknownNameError("method", str(method), {m for m, _ in known})
    if side.sparsity is not None and side.sparsity not in sparsities:
        there = ", ".join(f"{s:g}" for s in sparsities)
        raise UserError(f"'{method}' in {side.folder} has no sparsity {side.sparsity:g}; it has {there}")
    preferred = side.sparsity if side.sparsity is not None else words.chosen(findings)
    return method, preferred if preferred in sparsities else sparsities[0]


def _held(findings: Findings, measure: Measure, chosen: tuple[str, float]) -> list[PerImage]:
    """Return a metric of the chosen networks, in the order of their seeds."""
    held = findings.collected[measure]
    return [held[who] for who in sorted(held) if who[:2] == chosen and held[who].bottom.any()]


def _difference(measure: Measure, sides: Sequence[list[PerImage]], same: bool) -> Difference | None:
    if not all(sides):
        return None
    count = min(map(len, sides))
    every = [one for side in sides for one in side]
    images = common([one.images for one in every])
    paired = same and len(images) >= 2 and all(one.at(images).bottom.any() for one in every)
    if paired:
        first, second = (values(side[:count], images) for side in sides)
        before, after, change = effect(first), effect(second), measure.change(second, first)
    else:
        before, after = (effect(values(side, common([one.images for one in side]))) for side in sides)
        ends = [before, after]
        if numbers.gain_unit(measure, before) == "%":  # on the logarithms of means, by the delta method
            means = [max(one.estimate, LEAST_RATIO * before.estimate) for one in ends]
            ends = [replace(e, estimate=math.log(m), se=e.se / m) for e, m in zip(ends, means, strict=True)]
        change = unpaired(*ends)
    change = numbers.shown(measure, change, before)
    return Difference(measure.slug, measure.title, before, after, change, numbers.gain_unit(measure, before), paired)


@dataclass(frozen=True)
class Choice:
    """The network to ship. `key` is that of the task that trained its weights; gains are on test images.

    Gains over the dense control are fractions of the images or of the control's mean distance.
    """

    method: str
    sparsity: float
    seed: int
    key: str
    latency_ms: float | None
    accuracy_drop_valid: float
    gains: dict[str, Effect]
    considered: int
    fitting: int


def pick(out: Path | str, *, max_latency: float | None = None, max_accuracy_drop: float = 0.5) -> Choice:
    """Choose the best network of a study within a latency (ms) and an accuracy drop (points, validation images).

    Of the methods and sparsities within the limits, the one with the highest validation robust accuracy is chosen, or
    the sparsest if validation images were not attacked; of its seeds, the one with the highest validation accuracy.
    Raises UserError if no network is within the limits, naming the closest one, or if latencies were not measured.
    """
    findings = find(load(out))
    study = findings.study
    sparse = [n for n in study.networks if not study.is_dense(n.method) and n.axis == "weights"]
    points = list(dict.fromkeys((n.method, n.sparsity) for n in sparse if n.checkpoint == "final"))
    facts = {point: _facts(findings, *point) for point in points}
    if max_latency is not None and all(latency is None for latency, _, _ in facts.values()):
        raise UserError("this study did not measure latency; run it with --set deploy=true")
    fitting = [
        point
        for point, (latency, drop, _) in facts.items()
        if drop <= max_accuracy_drop and (max_latency is None or (latency is not None and latency <= max_latency))
    ]
    if not fitting:
        raise UserError(_nearest(facts, max_latency))
    method, sparsity = max(fitting, key=lambda point: (facts[point][2], point[1]))
    latency, drop, _ = facts[method, sparsity]
    network = max(study.of(method, sparsity), key=lambda n: n.metric("accuracy_valid") or 0.0)
    gains = {
        m.slug: _fraction(m, one, result.control)
        for m in findings.main
        if (one := difference(findings, m, (method, sparsity), (study.control(), 0.0))) is not None
        and (result := findings.result(m, method)) is not None
    }
    key = next(r.key for r in reversed(network.records) if r.stage in ("prune", "activate", "train"))
    return Choice(method, sparsity, network.seed, key, latency, drop, gains, len(points), len(fitting))


def _fraction(measure: Measure, one: Effect, control: Effect) -> Effect:
    """Return a gain as a fraction: of the images, or of the control's mean length (if that is not zero)."""
    absolute = numbers.gain_unit(measure, control) == numbers.ABSOLUTE
    return one if absolute else numbers.shown(measure, one, control).scaled(0.01)


def _facts(findings: Findings, method: str, sparsity: float) -> tuple[float | None, float, float]:
    """Return median latency in ms, mean validation accuracy drop in points, and mean validation robust accuracy."""
    networks = findings.study.of(method, sparsity)
    control = {n.seed: n for n in findings.study.of(findings.study.control())}
    times = [1e3 * t for n in networks for r in n.stage("deploy") if (t := r.times.get("latency")) is not None]
    drops = [
        100 * (a - b)
        for n in networks
        if n.seed in control
        and (a := control[n.seed].metric("accuracy_valid")) is not None
        and (b := n.metric("accuracy_valid")) is not None
    ]
    robust = [
        one.mean
        for measure, held in findings.collected.items()
        if (measure.split, measure.role) == ("valid", "budget")
        for who, one in held.items()
        if who[:2] == (method, sparsity)
    ]
    drop = statistics.mean(drops) if drops else float("inf")
    return (statistics.median(times) if times else None), drop, (statistics.mean(robust) if robust else 0.0)


def _nearest(facts: dict[tuple[str, float], tuple[float | None, float, float]], max_latency: float | None) -> str:
    if not facts:
        return "this study has no sparse network to pick from"
    (method, sparsity), (_, drop, _) = min(facts.items(), key=lambda item: item[1][1])
    told = f"the smallest accuracy drop on validation images is {drop:.2g} points ({method} at {percent(sparsity)})"
    timed = {who: latency for who, (latency, _, _) in facts.items() if latency is not None}
    if timed and max_latency is not None:
        (method, sparsity), latency = min(timed.items(), key=lambda item: item[1])
        told += f", the lowest latency {latency:.3g} ms ({method} at {percent(sparsity)})"
    return f"no network fits; {told}; allow more with --max-accuracy-drop or --max-latency"
