"""The one claim of the paper that needs two studies: nonlinear networks gain more in l_2 than linear ones."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from ...statistics import Claim, Question, ask, effect
from .. import _numbers as numbers
from .._compare import data_of
from ..pages._summary import title
from ._claims import is_linear
from ._cross_checks import suspicion
from ._findings import Findings
from ._hypotheses import MARGIN, places
from ._metrics import Measure

TEXT = "nonlinear networks gain more r_2 (DeepFool) than linear ones at matched accuracy loss"


def across(found: Sequence[Findings]) -> Iterator[tuple[str, Question]]:
    """Yield the claim for every nonlinear and linear study of the same data, with both studies' names.

    Asked at the nonlinear networks' highest appropriate sparsity and at the linear ones' whose loss of accuracy is
    nearest to theirs there, so that no robustness chose either; paired by image, and seed by seed in their order.
    """
    for one in (f for f in found if not is_linear(f)):
        for other in (f for f in found if is_linear(f) and data_of(f) == data_of(one)):
            question = _question(one, other)
            if question is not None:
                yield f"{title(one)} and {title(other)}", question


def _question(one: Findings, other: Findings) -> Question | None:
    measure = one.first("distance", "deepfool")
    results = one.result(measure), other.result(measure)
    if measure is None or results[0] is None or results[1] is None or results[0].images != results[1].images:
        return None
    units = [numbers.gain_unit(measure, result.control) for result in results if result is not None]
    kept = [s for s in places(one, results[0].method).appropriate if s in results[0].sparsities]
    losses = _losses(other, results[1].sparsities)
    if not kept or not losses or units != ["%", "%"]:
        return None
    wanted = _losses(one, kept)[kept[-1]]
    chosen = kept[-1], min(losses, key=lambda s: (abs(losses[s] - wanted), abs(s - kept[-1])))
    seeds = min(len(result.seeds) for result in results if result is not None)
    gains = [r.gains.differences[r.sparsities.index(s)][:seeds] for r, s in zip(results, chosen, strict=True) if r]
    doubts = [
        suspicion(f.study, f.collected, f.doubts, measure, {(r.method, s, k), (f.study.control(r.method), 0.0, k)})
        for f, r, s in zip((one, other), results, chosen, strict=True)
        if r is not None
        for k in r.seeds
    ]
    test = f"r_2, {title(one)} at {numbers.percent(chosen[0])} − {title(other)} at {numbers.percent(chosen[1])}"
    claim = Claim(TEXT, "above", MARGIN, "%", test, log=True, origin="paper", metric="r_2")
    price = max(f.study.looks.price for f in (one, other))
    return ask(
        claim, effect(gains[0] - gains[1]).scaled(100.0).priced(price), doubt=", ".join({d for d in doubts if d})
    )


def _losses(findings: Findings, sparsities: Sequence[float]) -> dict[float, float]:
    """Return what networks lose of the dense control's accuracy, on the images that `places` asks."""
    split = places(findings, findings.method or "").split
    result = findings.result(Measure("accuracy", split)) if split == "valid" or split == "test" else None
    if result is None:
        return {}
    return {s: -result.gains.effects[result.sparsities.index(s)].estimate for s in sparsities if s in result.sparsities}
