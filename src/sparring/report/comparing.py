"""Compare two studies cell by cell, or two models metric by metric: paired by seed and by image."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..errors import UserError
from ..statistics import Effect, effect
from .measures import PerImage, collect, common, values
from .records import Who, load

__all__ = ["Comparison", "Drop", "compare", "compare_models", "failures"]

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Comparison:
    """Hold one metric of one cell in both: `effect` is second − first, in `unit` (points for shares of images)."""

    metric: str
    cell: str
    first: float
    second: float
    unit: str
    effect: Effect

    def as_dict(self) -> dict[str, Any]:
        """Return the comparison as JSON takes it."""
        return {**asdict(self), "effect": asdict(self.effect)}


@dataclass(frozen=True)
class Drop:
    """Allow a metric to fall by at most `amount`, in its unit, from the first to the second."""

    metric: str
    amount: float


def compare(first: Path | str, second: Path | str) -> list[Comparison]:
    """Compare the cells that two studies have in common, on the seeds and images that they share.

    Raise UserError where they have no cell, seed or image in common, or were made on different test images.
    """
    studies = [load(Path(first)), load(Path(second))]
    names = [study.plan.get("data") for study in studies]
    if names[0] != names[1]:
        raise UserError(f"the studies are of different data ({names[0]}, {names[1]}), so they cannot be paired")
    ours, theirs = (collect(study) for study in studies)
    rows = []
    for measure in (m for m in ours if m in theirs and m.split == "test"):
        cells = dict.fromkeys(who[:2] for who in ours[measure])
        for method, sparsity in cells:
            mine, yours = (_by_seed(held[measure], method, sparsity) for held in (ours, theirs))
            seeds = sorted(mine.keys() & yours.keys())
            if not seeds:
                continue
            images = common([held[seed].images for held in (mine, yours) for seed in seeds])
            pair = [values([held[seed] for seed in seeds], images) for held in (mine, yours)]
            cell = method + (f" {sparsity:.1%}" if sparsity else "")
            rows.append(_row(measure.slug, cell, pair[0], pair[1], share=measure.is_share))
    if not rows:
        raise UserError(f"{first} and {second} have no metric of a cell in common")
    return rows


def _by_seed(held: Mapping[Who, PerImage], method: str, sparsity: float) -> dict[int, PerImage]:
    return {who[2]: one for who, one in held.items() if who[:2] == (method, sparsity)}


def compare_models(first: Mapping[str, Floats], second: Mapping[str, Floats]) -> list[Comparison]:
    """Compare two models by per-image values (N,) of the same images, metric by metric.

    A metric whose name begins with "distance" is in pixel units; the others are shares of images.
    """
    return [
        _row(name, "", first[name][None], second[name][None], share=not name.startswith("distance"))
        for name in first
        if name in second
    ]


def _row(metric: str, cell: str, first: Floats, second: Floats, *, share: bool) -> Comparison:
    scale, unit = (100.0, "points") if share else (1.0, "distance")
    one = effect((second - first) * scale)
    return Comparison(metric, cell, float(first.mean()) * scale, float(second.mean()) * scale, unit, one)


def failures(rows: Sequence[Comparison], drops: Sequence[Drop]) -> list[str]:
    """Return a sentence for every drop that is not excluded: the interval's lower bound passes what is allowed.

    Raise UserError for a metric that was not compared.
    """
    found = []
    for drop in drops:
        rows_of = [row for row in rows if row.metric == drop.metric]
        if not rows_of:
            known = ", ".join(dict.fromkeys(row.metric for row in rows))
            raise UserError(f"--max-drop names '{drop.metric}', which was not compared; compared: {known}")
        found += [
            f"{row.metric}{' of ' + row.cell if row.cell else ''} may have fallen by {-row.effect.low:.3g} {row.unit}, "
            f"more than the {drop.amount:g} allowed"
            for row in rows_of
            if row.effect.low < -drop.amount
        ]
    return found
