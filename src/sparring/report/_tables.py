"""Tables of the report: key numbers, curves, networks, ledger, cost and flags, and results.csv."""

from __future__ import annotations

import csv
import io
import math
import re
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from .. import units
from ..records import Record
from ..statistics import Row, minimum_detectable_effect
from . import _numbers as numbers
from . import _summary as words
from .analysis import _comparisons as comparisons
from .analysis._comparisons import DistanceBounds, Shipped, brackets, duels, norms, shipped_verdict
from .analysis._cross_checks import Doubt
from .analysis._findings import Findings, Result, gain_told
from .analysis._metrics import NORMS, Measure, Role, pretty, pretty_eps, summary
from .analysis._records import Network, Study, attack_label

COLUMNS = (
    *("method", "sparsity", "seed", "metric", "attack", "norm", "eps", "split"),
    *("value", "low", "high", "images", "failed"),
)
METRICS: dict[Role, str] = {
    "accuracy": "accuracy",
    "budget": "robust_accuracy",
    "worst": "worst_case_accuracy",
    "distance": "mean_distance",
    "distance-correct": "mean_distance_correct",
    "certified": "mean_certified_radius",
    "margin": "mean_margin",
    "lipschitz": "mean_lipschitz_constant",
    "ratio": "mean_margin_over_lipschitz",
    "verified": "verified",
    "not falsified": "not_falsified",
    "stable": "stable_relus",
    "to sparse": "transferred_to_sparse",
    "to dense": "transferred_to_dense",
}
FIRM = "\N{NO-BREAK SPACE}"
PASSES = ("forwards", "backwards")
SCALARS = (
    *("accuracy_valid", "sparsity", "sparsity_total", "activation_sparsity", "nonzero", "parameters"),
    *("macs", "macs_dense", "bytes_dense", "bytes_sparse"),
)


class Cell(NamedTuple):
    """A cell with more than plain text: `mark` is "strong" or a class, `small` is the text below."""

    text: str
    mark: str = ""
    small: str = ""


@dataclass(frozen=True)
class Table:
    """A table whose first `text` columns are words and the rest numbers."""

    head: Sequence[str]
    rows: Sequence[Sequence[str | Cell]]
    text: int = 1
    class_: str | None = None


def key_numbers(findings: Findings, sparsity: float, ledger: Sequence[Row]) -> Table:
    """Return the table behind the verdict: every main metric at one sparsity, and the ledger's verdict on its gain."""
    rows = []
    for measure in findings.main:
        result = findings.result(measure)
        if result is None or sparsity not in result.sparsities:
            continue
        index = result.sparsities.index(sparsity)
        one = result.gains.effects[index]
        least = minimum_detectable_effect(one, alpha=0.05 / (len(result.sparsities) + result.gains.dropped))
        rows.append(
            [
                measure.title,
                numbers.level(measure, result.control),
                numbers.level(measure, result.levels[index]),
                numbers.gain(measure, one, result.control),
                numbers.detectable(measure, result.control, least),
                gain_told(result, ledger) or "not tested",
            ]
        )
    told = numbers.sparsity(findings.study, findings.method or "", sparsity)
    head = ["Metric", "Dense control", f"At {told}", "Gain", "Detectable"]
    return Table([*head, "Verdict on a gain at an appropriate sparsity"], rows, class_="key")


def around(findings: Findings, at_most: int = 8) -> Table | None:
    """Return the sparsities around the one to ship: size, costs, and whether losses are within their allowances."""
    measures = words.told(findings)
    results = [r for m in measures if (r := findings.result(m)) is not None]
    at, spot = words.chosen(findings), findings.sweet_spot
    if at is None or spot is None or findings.seeds < 2:
        return None
    every = [s for s in results[0].sparsities if all(s in r.sparsities for r in results)]
    first = max(0, min(every.index(at) - at_most // 2, len(every) - at_most)) if at in every else 0
    wide = words.wider(findings)
    rows: list[list[str | Cell]] = []
    for s in every[first : first + at_most]:
        ratio = words.size_ratio(findings, s)
        met = "exceeded" if spot.at_most is None or s > spot.at_most else "undecided"
        met = "met" if s <= (spot.sparsity or 0) else f"{met}; met at twice the allowance" if s <= (wide or 0) else met
        gains = [numbers.gain(r.measure, r.gains.at(s), r.control) for r in results]
        name = numbers.sparsity(findings.study, findings.method or "", s)
        mark = Cell(name, "strong") if s == spot.sparsity else name
        rows.append([mark, "–" if ratio is None else f"{ratio:.1f}×", *gains, met])
    return Table(["Sparsity", "Smaller", *map(_heading, measures), "Allowances"], rows)


def curve_table(results: Sequence[Result]) -> Table:
    """Return a figure's numbers: level and gain at every sparsity of every method, and the medians of distances."""
    measure = results[0].measure
    rows = []
    for result in results:
        medians = [numbers.value(measure, number) for number in result.medians]
        rows.append([result.method, "0 (control)", numbers.level(measure, result.control), *medians[:1], "–", "–"])
        for k, (sparsity, level) in enumerate(zip(result.sparsities, result.levels, strict=True)):
            told = numbers.gain(measure, result.gains.effects[k], result.control, unit=False)
            shown = [result.words(sparsity), numbers.level(measure, level), *medians[k + 1 : k + 2], told]
            rows.append([result.method, *shown, numbers.p_value(result.gains.p_holm[k])])
    middle = [] if measure.is_share else ["Median"]
    unit = numbers.gain_unit(measure, results[0].control)
    return Table(["Method", "Sparsity", "Mean [95%]", *middle, f"Gain, {unit} [95%]", "p (Holm)"], rows)


def _heading(measure: Measure) -> str:
    return measure.short if measure.short.startswith("r_") else measure.short[:1].upper() + measure.short[1:]


def methods(findings: Findings) -> Table | None:
    """Return each method against random masks (or else the headline's method) at the same sparsity, or None."""
    found = duels(findings)
    shown = [m for m in findings.main if any(duel.measure == m for duel in found)]
    told: dict[tuple[float, str, str], dict[Measure, str | Cell]] = defaultdict(dict)
    seeds = {}
    for duel in found:
        unit, who = numbers.gain_unit(duel.measure), (duel.sparsity, duel.method, duel.against)
        gain = numbers.signed(duel.effect, unit if unit == "%" else "").replace(", ", f",{FIRM}")
        text = f"{gain}, " + f"p {numbers.p_value(duel.p)}".replace(" ", FIRM)  # breaks only around the interval
        told[who][duel.measure] = Cell(text, "strong") if duel.significant else text
        seeds[who] = str(duel.effect.seeds)
    rows = [
        [
            " / ".join(dict.fromkeys(numbers.sparsity(findings.study, m, who[0]) for m in who[1:])),
            f"{who[1]} − {who[2]}",
            *(cells.get(m, "–") for m in shown),
            seeds[who],
        ]
        for who, cells in told.items()
    ]
    units = {m: numbers.gain_unit(m) for m in shown}
    metrics = (_heading(m) if units[m] == "%" else f"{_heading(m)}, {units[m]}" for m in shown)
    head = ["Sparsity", "Methods", *(name.replace("ε ", f"ε{FIRM}") for name in metrics), "Seeds"]
    return Table(head, rows, text=2, class_="wrapped") if rows else None


def networks(findings: Findings) -> Table:
    """Return one row per network: its description, and each test metric (accuracy with its exact binomial interval)."""
    shown = [m for m in findings.collected if m.split == "test"]
    deployed = any(network.stage("deploy") for network in findings.study.networks)
    shares = {network.who: network.metric("covered", "prune") for network in findings.study.networks}
    structured = any(share is not None for share in shares.values())
    head = ["Method", "Sparsity", "Seed", "Sparsity of all parameters", "Bytes"]
    head += ["Covered by n:m"] if structured else []
    head += ["Packed bytes", "ms per image", "in PyTorch", "Agreement"] if deployed else []
    head += [_heading(m) for m in shown]
    rows = []
    for network in findings.study.networks:
        total, size = network.metric("sparsity_total"), network.metric("bytes_sparse")
        told = numbers.sparsity(findings.study, network.method, network.sparsity)
        row = [network.method, told, str(network.seed)]
        row += ["–" if total is None else units.percent(total, 2), "–" if size is None else f"{size:,.0f}"]
        share = shares[network.who]
        row += ["–" if share is None else units.percent(share)] if structured else []
        row += _deployed(network) if deployed else []
        for measure in shown:
            one = findings.collected[measure].get(network.who)
            mean, low, high = (None, None, None) if one is None else summary(measure, one)
            told = numbers.value(measure, mean)
            if measure.role == "accuracy" and low is not None and high is not None:
                told += f" [{100 * low:.1f}, {100 * high:.1f}]"
            row.append(told)
        rows.append(row)
    return Table(head, rows)


def tightness(findings: Findings) -> Table | None:
    """Return the gap between attacks and proofs at each sparsity, and the share of solved searches; None: no proofs."""
    rows = []
    for norm in norms(findings):
        searched = {(b.method, b.sparsity): b for b in brackets(findings, norm, exact=True)}
        wide = {(b.method, b.sparsity): b for b in brackets(findings, norm, exact=False)}
        for key in dict.fromkeys([*wide, *searched]):
            one, other = wide.get(key) or searched[key], searched.get(key)
            row = [
                NORMS.get(norm, norm),
                key[0],
                numbers.sparsity(findings.study, *key) if key[1] else "0",
                f"{one.seeds} × {one.images}",
            ]
            row += [_short(one.certified), _short(one.attack), _short(one.ratio, "×")]
            row += ["–"] * 3 if other is None else _search(other)
            rows.append(row)
    head = ["Norm", "Method", "Sparsity", "Seeds × images", "Certified", "Attack", "Attack / certified"]
    return Table([*head, "Searched", "Exact distance", "Solved exactly"], rows, text=2) if rows else None


def verified(findings: Findings) -> Table | None:
    """Return the shares verified, falsified and undecided at each sparsity at one budget; None: no such records."""
    rows = []
    for one in comparisons.verified(findings):
        gap = "–" if one.gap is None else " to ".join(f"{100 * e.estimate:+.1f}" for e in one.gap).replace("-", "−")
        shares = (one.interval, one.alpha_crown, one.verified, one.falsified, one.undecided, one.stable)
        row = [f"{NORMS[one.norm]} {pretty_eps(one.eps)}", one.method]
        row += [numbers.sparsity(findings.study, one.method, one.sparsity) if one.sparsity else "0"]
        row += [f"{one.seeds} × {one.images}", *(units.percent(share) for share in shares)]
        rows.append([*row, units.percent(1 - one.undecided), gap, one.told or "–"])
    head = ["Norm, ε", "Method", "Sparsity", "Seeds × images", "By interval", "By α-CROWN", "Verified", "Falsified"]
    head += ["Undecided", "Stable ReLUs", "Share decided", "Robust accuracy − control, points", "Against the control"]
    return Table(head, rows, text=3) if rows else None


def _search(one: DistanceBounds) -> list[str]:
    closed = one.lower is not None and one.upper is not None and one.upper - one.lower < 1e-3 * one.upper
    interval = _short(one.upper) if closed else f"{_short(one.lower)} to {_short(one.upper)}"
    return [f"{one.seeds} × {one.images}", interval, "–" if one.solved is None else units.percent(one.solved, 0)]


def _short(number: float | None, unit: str = "") -> str:
    return "–" if number is None else f"{number:.3g}{unit}"


def _deployed(network: Network) -> list[str]:
    """Return the packed network's bytes, its latency and PyTorch's, and the share of predictions that agree."""
    metrics: dict[str, float | None] = {}
    for record in network.stage("deploy"):
        metrics |= {**record.metrics, **record.times}
    wanted = (("bytes_packed", 1, ",.0f"), ("latency", 1000, ".3g"), ("latency_torch", 1000, ".3g"))
    told = [(metrics.get(name), factor, form) for name, factor, form in (*wanted, ("agreement", 100, ".4g"))]
    *cells, agreement = ["–" if value is None else format(factor * value, form) for value, factor, form in told]
    return [*cells, agreement if agreement == "–" else f"{agreement}%"]


def shipped(findings: Findings) -> tuple[str, Table] | tuple[()]:
    """Return a summary of all artefacts, and a row for each kind; empty if none was compared with its network."""
    found = comparisons.shipped(findings)
    if not found:
        return ()
    verdicts = [one.verdict for one in found]
    same, less = verdicts.count("equal") + verdicts.count("equivalent"), verdicts.count("less")
    told = f"{same} of {len(verdicts)} kinds of artefact are as robust as the networks they were exported from"
    if open_ := verdicts.count("undecided"):
        told += f"; {open_} {'is' if open_ == 1 else 'are'} undecided and would need more images or seeds"
    head = ["Method", "Sparsity", "Values", "Seeds × images", "Accuracy", "Agreement", "Attack", "Robust accuracy"]
    head += ["Difference, points [95%]", "HopSkipJump", "Certified radius", "As shipped"]
    rows = [_artefact(one, numbers.sparsity(findings.study, one.method, one.sparsity)) for one in found]
    worse = f"{less or 'none'} {'are' if less > 1 else 'is'} significantly less robust"
    return f"{told}; {worse}.", Table(head, rows, text=3)


def _artefact(kind: Shipped, sparsity: str) -> list[str]:
    def pair(first: str, second: str) -> str:
        return f"{units.percent(kind.mean(first))} → {units.percent(kind.mean(second))}"

    one, decided, few = kind.effect, kind.mean("robust_decision"), kind.mean("decided")
    told = "–" if math.isnan(decided) else units.percent(decided, 0)
    return [
        kind.method,
        sparsity if kind.sparsity else "0",
        kind.values,
        f"{one.seeds} × {one.images}",
        pair("accuracy_model", "accuracy_packed"),
        units.percent(kind.mean("agreement"), 2, trim=True),
        kind.attack,
        pair("robust_model", "robust_packed"),
        f"{100 * one.estimate:+.2f} [{100 * one.low:+.2f}, {100 * one.high:+.2f}]",
        told if math.isnan(few) or math.isnan(decided) else f"{told} of {few:.0f}",
        "; ".join(f"{name} {first:.4g} → {second:.4g}" for name, first, second in kind.radii()) or "–",
        shipped_verdict(one),
    ]


def ledger_table(rows: Sequence[Row]) -> Table | None:
    """Return the ledger as a table, None if it is empty; verdicts are words, not colours alone."""
    cells: list[list[str | Cell]] = []
    for row in rows:
        effect = "–" if row.effect is None else numbers.signed(row.effect, row.claim.unit)
        mark = {"reproduced": "●", "undecided": "○"}.get(row.verdict, "✕")
        kind = row.verdict if mark != "✕" else "contradicted"
        told = [row.claim.test, row.claim.origin if row.claim.origin == "later work" else ""]
        if any(row.question.failed):
            told.append("search failed on {} and {}".format(*map(numbers.percent, row.question.failed)))
        what = Cell(row.claim.text, "strong" if row.claim.primary else "", "; ".join(part for part in told if part))
        verdict = Cell(f"{mark} {row.told}", f"verdict {kind}", row.why)
        p = "–" if row.decisive is None or row.question.doubt else numbers.p_value(row.decisive)
        counts = ("–", "–") if row.effect is None else (str(row.effect.seeds), f"{row.effect.images:,}")
        cells.append([what, verdict, effect, p, *counts])
    head = ["Claim and test", "Verdict", "Effect [95%]", "p", "Seeds", "Images"]
    return Table(head, cells, text=2, class_="claims") if cells else None


def cost(study: Study) -> Table:
    """Return the cost of the study: seconds by stage, and each attack's mean passes through the network per image."""
    groups: dict[str, list[Record]] = defaultdict(list)
    for record in study.records.values():
        attack = f"attack: {pretty(attack_label(record))}" if record.stage == "attack" else record.stage
        groups[attack].append(record)
    spent = {name: sum(record.seconds for record in records) for name, records in groups.items()}
    rows = [
        [name, f"{len(groups[name]):,}", f"{seconds:,.1f}", *_passes(groups[name])]
        for name, seconds in sorted(spent.items(), key=lambda item: -item[1])
    ]
    rows.append(["all", f"{len(study.records):,}", f"{sum(spent.values()):,.1f}", "–", "–"])
    return Table(["Stage", "Tasks", "Core seconds", "Forward passes per image", "Backward passes per image"], rows)


def _passes(records: Sequence[Record]) -> list[str]:
    """Return an attack's mean forward and backward passes per image."""
    images = [int(r.inputs["stop"]) - int(r.inputs["start"]) if r.stage == "attack" else 0 for r in records]
    if not sum(images):
        return ["–", "–"]
    every = [[n * (r.metrics.get(name) or 0.0) for n, r in zip(images, records, strict=True)] for name in PASSES]
    return [f"{sum(passes) / sum(images):,.1f}" for passes in every]


def flags(study: Study, found: Sequence[Doubt] = ()) -> Table:
    """Return flags, contradictions, failures and missing tasks, one row for all that differ only in numbers."""
    raised = [
        (name, detail, network.who, pretty(attack_label(record)) if record.stage == "attack" else record.stage)
        for network in study.networks
        for record in network.records
        for name, detail in [
            *((str(flag["name"]), str(flag["detail"])) for flag in record.flags),
            *([("failed", record.error)] if record.error is not None else []),
        ]
    ]
    raised += [(doubt.name, doubt.detail, doubt.who, pretty(doubt.attack)) for doubt in found]
    seen: dict[tuple[str, str], list[tuple[str, str]]] = defaultdict(list)
    for name, detail, (method, sparsity, seed), stage in raised:
        place = f"{method} {numbers.percent(sparsity)} seed {seed} ({stage})"
        seen[name, re.sub(r"[0-9.]+", "#", detail)].append((detail, place))
    if study.missing:
        seen["missing", ""] = [("tasks of the plan that have no record", f"{len(study.missing)} tasks")]
    rows = []
    for (name, _), told in seen.items():
        details, places = (list(dict.fromkeys(column)) for column in zip(*told, strict=True))
        alike = f" (and {len(details) - 1} similar)" if len(details) > 1 else ""
        rest = f" and {len(places) - 4} more" if len(places) > 4 else ""
        rows.append([name, details[0] + alike, ", ".join(places[:4]) + rest])
    return Table(["Flag", "Detail", "Where"], rows, text=3)


def looks(study: Study) -> Table:
    """Return a table with one row per look at a study."""
    rows = []
    for entry in study.looks.entries:
        grids = [f"{method} at {', '.join(map(numbers.percent, grid))}" for method, grid in entry["sparsities"].items()]
        counts = [f"{entry[name]:,}" for name in ("look", "seeds", "records", "orphans")]
        rows.append([*counts, entry["time"], "; ".join(grids), ", ".join(entry["attacks"])])
    return Table(["Look", "Seeds", "Records", "No longer in the plan", "When", "Sparsities", "Attacks"], rows)


def csv_text(findings: Findings) -> str:
    """Return results.csv: one row per network and metric; unknown values are empty."""
    target = io.StringIO()
    writer = csv.DictWriter(target, COLUMNS, lineterminator="\n")
    writer.writeheader()
    writer.writerows(csv_rows(findings))
    return target.getvalue()


def csv_rows(findings: Findings) -> list[dict[str, Any]]:
    """Return one row per network and metric, for a data frame; unknown values are None.

    Shares are fractions with exact binomial bounds, distances in the norm's own unit; `failed` is the share of images
    on which the search for a distance failed.
    """
    rows = []
    for network in findings.study.networks:
        who = dict.fromkeys(COLUMNS) | {"method": network.method, "sparsity": network.sparsity, "seed": network.seed}
        for measure, held in findings.collected.items():
            if (one := held.get(network.who)) is not None:
                mean, low, high = summary(measure, one)
                row = who | {"metric": METRICS[measure.role], "attack": measure.label or None, "eps": measure.eps}
                row |= {"norm": measure.norm or None, "split": measure.split, "value": mean, "low": low, "high": high}
                rows.append(row | {"images": len(one.images), "failed": None if one.failed is None else one.missed})
        known = ((name, network.metric(name)) for name in SCALARS)
        rows += [who | {"metric": name, "value": value} for name, value in known if value is not None]
    return rows
