"""What the "ship" records say: is the artefact as robust as the network that was studied?"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from ... import units
from ...records import Record, arrays
from ...statistics import Effect, effect, equivalence
from .. import _numbers as numbers
from ..pages._html import Html, join, tag
from ..pages._tables import table
from ._findings import Findings
from ._metrics import NORMS, pretty, pretty_eps
from ._records import Network

MARGIN = 0.02  # of the images: a smaller difference in robustness does not matter
Cell = tuple[str, float, str, str]  # method, sparsity, values, attack


Verdict = Literal["equal", "equivalent", "less", "more", "undecided"]
VERDICTS: dict[Verdict, str] = {
    "equal": "as robust as the model on every image",
    "equivalent": f"as robust as the model, within {100 * MARGIN:g} points",
    "less": "less robust than the model",
    "more": "more robust than the model",
    "undecided": "undecided: more images would tell",
}


def shipped_verdict(one: Effect) -> str:
    """Say what a paired difference of shares of standing images, artefact − model, means."""
    return VERDICTS[_verdict(one)]


def _verdict(one: Effect) -> Verdict:
    if one.estimate == one.low == one.high == 0:
        return "equal"
    if equivalence(one, MARGIN) <= 0.05:
        return "equivalent"
    if one.high < 0:
        return "less"
    return "more" if one.low > 0 else "undecided"


def shipped_html(findings: Findings) -> Html | None:
    """Return a verdict and one row for each kind of network and values; None: nothing was held against its artefact."""
    cells: dict[Cell, list[tuple[Network, Record]]] = defaultdict(list)
    for network in findings.study.networks:
        for record in network.stage("ship"):
            if record.object is not None:
                attack = record.inputs["attack"]
                norm, eps = NORMS.get(attack["norm"], attack["norm"]), pretty_eps(attack["eps"])
                label = f"{pretty(attack['name'])}, {norm} ε = {eps}"
                cells[network.method, network.sparsity, record.inputs["values"], label].append((network, record))
    if not cells:
        return None
    effects = {cell: _difference([record for _, record in found]) for cell, found in cells.items()}
    note = (
        "Each network was packed, and images were attacked on the network and on the artefact (its own values, as "
        "rounded); all examples were tried on both. HopSkipJump asks the artefact's kernels for classes alone. "
        "Certified radii are of the network and of the rounded artefact, means over images."
    )
    head = ["Method", "Sparsity", "Values", "Seeds × images", "Accuracy", "Agreement", "Attack", "Standing"]
    head += ["Difference, points [95%]", "HopSkipJump", "Certified radius", "As shipped"]
    rows = [
        _row(cell, found, effects[cell], numbers.sparsity(findings.study, *cell[:2])) for cell, found in cells.items()
    ]
    return join(tag("p", _sentence(effects)), tag("p", note, class_="note"), table(head, rows, text=3))


def _sentence(effects: dict[Cell, Effect]) -> str:
    """Return what holds of all artefacts together."""
    verdicts = [_verdict(one) for one in effects.values()]
    same, less = verdicts.count("equal") + verdicts.count("equivalent"), verdicts.count("less")
    told = f"{same} of {len(verdicts)} kinds of artefact are as robust as the networks that were studied"
    if open_ := verdicts.count("undecided"):
        told += f", {open_} {'is' if open_ == 1 else 'are'} undecided, which more images or seeds would end"
    return f"{told}; {less or 'none'} significantly less robust."


def _difference(records: Sequence[Record]) -> Effect:
    held = [arrays(record, "stands_model", "stands_packed") for record in records]
    return effect([one["stands_packed"].astype(float) - one["stands_model"] for one in held])


def _row(cell: Cell, found: Sequence[tuple[Network, Record]], one: Effect, told: str) -> list[str]:
    method, sparsity, values, attack = cell
    records = [record for _, record in found]

    def mean(name: str) -> float:
        known = [value for record in records if (value := record.metrics.get(name)) is not None]
        return sum(known) / len(known) if known else float("nan")

    def pair(first: str, second: str) -> str:
        return f"{units.percent(mean(first))} → {units.percent(mean(second))}"

    decided = mean("robust_decision")
    return [
        method,
        told if sparsity else "0",
        values,
        f"{one.seeds} × {one.images}",
        pair("accuracy_model", "accuracy_packed"),
        units.percent(mean("agreement"), 2, trim=True),
        attack,
        pair("robust_model", "robust_packed"),
        f"{100 * one.estimate:+.2f} [{100 * one.low:+.2f}, {100 * one.high:+.2f}]",
        "–" if np.isnan(decided) else units.percent(decided, 0),
        "; ".join(_radii(records)) or "–",
        shipped_verdict(one),
    ]


def _radii(records: Sequence[Record]) -> Iterator[str]:
    """Yield mean certified radii, network → artefact, for each norm and method."""
    for proof in records[0].inputs["certify"]:
        norm, way = proof["norm"], proof["method"]
        names = [f"radius_{side}_{norm}_{way}" for side in ("model", "packed")]
        if all(name in records[0].metrics for name in names):
            values: NDArray[np.float64] = np.array([[r.metrics[name] for name in names] for r in records], float)
            first, second = values.mean(0)
            yield f"{NORMS.get(norm, norm)} {way} {first:.4g} → {second:.4g}"
