"""Hold proofs against attacks on the same images: certified radius, exact distance, smallest perturbation found."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from ...records import arrays, image_places
from ._findings import Findings
from ._metrics import Measure, PerImage, common
from ._records import Network, Study

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class DistanceBounds:
    """Hold, for one method and sparsity, medians over correctly classified images of all seeds, all on the same images.

    The true median lies between `certified` and `attack`, and where searches were made between `lower` and `upper`;
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
    """Return the norms in which anything was proved of a distance."""
    certified = [m.norm for m in findings.collected if m.role == "certified"]
    searched = [str(r.inputs["norm"]) for r in findings.study.records.values() if r.stage == "exact" and not r.error]
    return list(dict.fromkeys([*certified, *searched]))


def brackets(findings: Findings, norm: str, *, exact: bool) -> list[DistanceBounds]:
    """Return the dense control's and the headline method's brackets in a norm, in order of sparsity.

    With `exact` on the few images whose distances were searched for, else on all that were certified and attacked.
    """
    found = []
    for method in (findings.study.control(), findings.method or ""):
        for sparsity in sorted({n.sparsity for n in findings.study.of(method)}):
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
    certified = [
        h[network.who] for m, h in findings.collected.items() if _is(m, "certified", norm) and network.who in h
    ]
    attacked = [
        replace(one, top=one.found)
        for m, h in findings.collected.items()
        if _is(m, "distance-correct", norm) and (one := h.get(network.who)) is not None
    ]
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


def _is(measure: Measure, role: str, norm: str) -> bool:
    return measure.role == role and measure.norm == norm and measure.split == "test" and measure.name != "smallest"


def _searched(study: Study, network: Network, norm: str) -> dict[str, PerImage]:
    """Return what searches for exact distances found: bounds, which are equal, and the attack they began with."""
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
