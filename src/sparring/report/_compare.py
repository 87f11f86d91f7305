"""Compare two sets of networks, of one study or of two: whether the candidate may take the other's place."""

from __future__ import annotations

import math
from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from ..errors import UnknownNameError, UserError
from ..statistics import LEAST_RATIO, Effect, effect, log_ratio_values, unpaired
from . import _numbers as numbers
from .analysis._findings import Findings, find
from .analysis._metrics import Floats, Measure, PerImage, common, values
from .analysis._records import load
from .pages import _summary as words


@dataclass(frozen=True)
class Side:
    """Name the networks of one side: a study's folder, a method and a sparsity, all seeds together.

    Without a method it is the one that the study's headline speaks of; without a sparsity, likewise.
    """

    folder: Path
    method: str | None = None
    sparsity: float | None = None


@dataclass(frozen=True)
class Difference:
    """Hold one metric of both sides and the change from the first to the second.

    `change` is in `unit`: points of a share, or % of the first side's mean distance. `paired` tells whether both sides
    saw the same images. With one seed intervals speak of these very networks on new images, else of new seeds too.
    """

    metric: str
    title: str
    first: Effect
    second: Effect
    change: Effect
    unit: str
    paired: bool

    def __str__(self) -> str:
        return f"{self.title}: {numbers.signed(self.change, self.unit)}"


def compare(first: Side, second: Side) -> list[Difference]:
    """Return the change of every metric that both sides have, on test images, in reading order.

    Paired by image where the data are the same, and by seed as far as both have seeds. Raises UserError when a folder
    holds no study, a side no network, or the two have no metric in common.
    """
    found = [find(load(side.folder)) for side in (first, second)]
    chosen = [_chosen(findings, side) for findings, side in zip(found, (first, second), strict=True)]
    same = data_of(found[0]) == data_of(found[1])
    shared = [m for m in found[0].collected if m.split == "test" and m in found[1].collected]
    made = [_difference(m, [_held(f, m, c) for f, c in zip(found, chosen, strict=True)], same) for m in shared]
    differences = [one for one in made if one is not None]
    if not differences:
        raise UserError("the two sides have no metric in common: attack both with the same attacks and budgets")
    return differences


def compare_values(
    first: Mapping[str, Floats], second: Mapping[str, Floats], *, lengths: Container[str] = ()
) -> list[Difference]:
    """Return the change of every metric of two models, from per-image values (N,) of the same images.

    Those named in `lengths` change by % of the first model's mean; the others are shares of images (0 or 1).
    """
    found = []
    for name in (n for n in first if n in second):
        before, after = effect(first[name][None]), effect(second[name][None])
        measure = Measure("distance" if name in lengths else "worst")
        change = numbers.shown(measure, _change(measure, first[name][None], second[name][None]), before)
        unit = numbers.gain_unit(measure, before)
        found.append(Difference(name, name, before, after, change, unit, paired=True))
    return found


def broken(differences: Sequence[Difference], allowed: Mapping[str, float]) -> list[str]:
    """Return a sentence for every metric that may have dropped by more than allowed: whose lower bound lies below.

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
    """Return the method and sparsity that a side names."""
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


def data_of(findings: Findings) -> object:
    """Return what identifies a study's test images: the data's hash where records have it, else the folder."""
    hashes = {r.inputs.get("data") for r in findings.study.records.values() if r.stage == "measure"}
    return hashes if hashes and None not in hashes else findings.study.folder.resolve()


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
        before, after, change = effect(first), effect(second), _change(measure, first, second)
    else:
        before, after = (effect(values(side, common([one.images for one in side]))) for side in sides)
        logs = numbers.gain_unit(measure, before) == "%"
        least = LEAST_RATIO * before.estimate
        change = unpaired(*(_logarithm(one, least) for one in (before, after))) if logs else unpaired(before, after)
    change = numbers.shown(measure, change, before)
    return Difference(measure.slug, measure.title, before, after, change, numbers.gain_unit(measure, before), paired)


def _change(measure: Measure, first: Floats, second: Floats) -> Effect:
    """Return the change from one side's values (seeds, images) to the other's: of lengths, the ratio's logarithm."""
    length = not measure.is_share and first.mean() > 0
    return effect(log_ratio_values(second, first) if length else second - first)


def _logarithm(one: Effect, least: float) -> Effect:
    """Return the effect on the logarithm of a mean, by the delta method."""
    mean = max(one.estimate, least)
    return replace(one, estimate=math.log(mean), se=one.se / mean)
