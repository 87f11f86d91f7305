"""Pick the network to ship: chosen on validation images, its numbers reported on test images."""

from __future__ import annotations

import statistics
from dataclasses import dataclass
from pathlib import Path

from ..errors import UserError
from ..statistics import Effect
from ..units import percent
from . import _numbers as numbers
from .analysis._findings import Findings, difference, find
from .analysis._metrics import Measure
from .analysis._records import Network, load


@dataclass(frozen=True)
class Choice:
    """Name the network to ship. `key` is that of the task that made its weights; gains are test, over the control.

    They are fractions, of the images or of the control's mean distance.
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

    Of the method and sparsities that fit, the one with the highest validation robust accuracy is chosen, or without
    attacks on validation images the sparsest; of its seeds, the one with the highest validation accuracy.
    Raise UserError where nothing fits, naming what comes nearest, or where latencies were not measured.
    """
    findings = find(load(out))
    study = findings.study
    points = list(dict.fromkeys((n.method, n.sparsity) for n in study.networks if _may_ship(n)))
    facts = {point: _facts(findings, *point) for point in points}
    if max_latency is not None and all(latency is None for latency, _, _ in facts.values()):
        raise UserError("this study measured no latency; run it again with --set deploy=true")
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


def _may_ship(network: Network) -> bool:
    dense = network.kind in ("reference", "control")
    return not dense and network.axis == "weights" and network.checkpoint == "final"


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
        float(one.top.sum() / one.bottom.sum())
        for measure, held in findings.collected.items()
        if _judges(measure)
        for who, one in held.items()
        if who[:2] == (method, sparsity)
    ]
    drop = statistics.mean(drops) if drops else float("inf")
    return (statistics.median(times) if times else None), drop, (statistics.mean(robust) if robust else 0.0)


def _judges(measure: Measure) -> bool:
    return measure.split == "valid" and measure.role == "budget"


def _nearest(facts: dict[tuple[str, float], tuple[float | None, float, float]], max_latency: float | None) -> str:
    if not facts:
        return "this study has no sparse network to pick from"
    (method, sparsity), (_, drop, _) = min(facts.items(), key=lambda item: item[1][1])
    told = f"the smallest accuracy drop on validation images is {drop:.2g} points ({method} at {percent(sparsity)})"
    timed = {who: latency for who, (latency, _, _) in facts.items() if latency is not None}
    if timed and max_latency is not None:
        (method, sparsity), latency = min(timed.items(), key=lambda item: item[1])
        told += f", the lowest latency {latency:.3g} ms ({method} at {percent(sparsity)})"
    return f"no network fits; {told}: allow more with --max-accuracy-drop or --max-latency"
