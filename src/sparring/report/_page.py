"""Fill the page's templates: one file, no address outside itself, every text escaped, a policy for the rest."""

from __future__ import annotations

import base64
import functools
import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jinja2

from ..statistics import Row
from . import _figures as figures
from . import _numbers as numbers
from . import _summary as words
from . import _tables as tables
from ._image_tiles import first_layers, galleries
from ._plots import Drawn, Panel, styles
from .analysis._cross_checks import Doubt
from .analysis._findings import Findings, gain_told
from .analysis._looks import look_sentences
from .analysis._metrics import NORMS
from .analysis._records import Study

Section = tuple[str, str, tuple[Any, ...]]  # the name of the macro that shows it, heading, and what it shows
Shown = tuple[Panel, str, tables.Table]  # a panel, its caption and its numbers


@dataclass(frozen=True)
class Curves:
    """Hold what a section of curves shows: main panels and others, and the norms and methods to choose from."""

    main: Sequence[Shown]
    others: Sequence[Shown]
    norms: Sequence[tuple[str, str]] = ()
    methods: Sequence[tuple[str, str, Sequence[int]]] = ()


def render(findings: Findings, drawn: Drawn, ledger: Sequence[Row], told: Sequence[str]) -> str:
    """Return the page as HTML text."""
    study = findings.study
    curves = _curves(findings, drawn.weights, ledger)
    activations = _curves(findings, drawn.activations, ledger) if drawn.activations else None
    sections: list[Section] = [
        ("curves", "Robustness against sparsity", (curves,)),
        ("activations", "Robustness against activation sparsity", (activations,)),
        ("methods", "Methods at the same sparsity", (tables.methods(findings),)),
        ("comparisons", "Theory, speed and transfer", (drawn.comparisons, tables.tightness(findings))),
        ("shipped", "As shipped", tables.shipped(findings)),
        ("layers", "Layer by layer", (drawn.layers, first_layers(findings))),
        ("gallery", "What the attacks did", (galleries(findings),)),
        ("ledger", "Ledger of claims", (tables.ledger_table(ledger),)),
        *judged_sections(study, findings.doubts),
        ("networks", "Every network", (tables.networks(findings),)),
        ("method", "Methods and citation", (words.methods(findings), words.bibtex(findings))),
        ("again", "To make it again", (_again(study),)),
    ]
    sparsity = words.chosen(findings)
    key = None if sparsity is None else tables.key_numbers(findings, sparsity, ledger)
    title = f"{study.name}: sparsity and adversarial robustness"
    return document(study, title, words.subject(findings), told, sections, key)


def judged_sections(study: Study, doubts: Sequence[Doubt] = ()) -> list[Section]:
    """Return the sections on how a study came about, which the pages of all kinds of study have."""
    head = study.looks.entries[-1]["sha256"] if study.looks.entries else "–"
    return [
        ("looks", "Looks at this study", (look_sentences(study), head, tables.looks(study))),
        ("flags", "Flags", (tables.flags(study, doubts),)),
        ("cost", "Cost", (tables.cost(study),)),
    ]


def document(
    study: Study,
    title: str,
    subject: str,
    headline: Sequence[str],
    sections: Sequence[Section],
    key: tables.Table | None = None,
) -> str:
    """Return a whole page with the report's style, script and policy, but for sections that show nothing."""
    script = _templates().get_template("page.js").render()
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    shown = [section for section in sections if any(section[2])]
    page = {"study": study, "title": title, "subject": subject, "headline": headline, "sections": shown, "key": key}
    page |= {"norms": NORMS, "script": script, "digest": digest}
    return _templates().get_template("page.html").render(page)


def summary_html(findings: Findings, panels: Sequence[Panel], ledger: Sequence[Row]) -> str:
    """Return the verdict, the key numbers and the main figures as a fragment, for notebooks."""
    sparsity = words.chosen(findings)
    key = None if sparsity is None else tables.key_numbers(findings, sparsity, ledger)
    module: Any = _templates().get_template("sections.html").module
    return str(module.summary(words.headline(findings, ledger), key, panels))


@functools.cache
def _templates() -> jinja2.Environment:
    loader = jinja2.PackageLoader(__package__)
    strict = jinja2.StrictUndefined
    return jinja2.Environment(loader=loader, autoescape=True, undefined=strict, trim_blocks=True, lstrip_blocks=True)


def _curves(findings: Findings, panels: Sequence[Panel], ledger: Sequence[Row]) -> Curves:
    main: list[Shown] = []
    others: list[Shown] = []
    for panel in panels:
        side = main if panel.measure in findings.main else others
        side.append((panel, _caption(panel, ledger), tables.curve_table(panel.results)))
    norms = dict.fromkeys(p.measure.norm for p in panels if p.measure.norm)
    looks = [(method, *figures.look(k)) for method, k in styles(findings).items()]
    return Curves(main, others, [(norm, NORMS.get(norm, norm)) for norm in norms], looks)


def _caption(panel: Panel, ledger: Sequence[Row]) -> str:
    """Say what the ledger says of a figure's gains, what of a curve is not shown, and how many seeds there are."""
    parts, first = [], panel.results[0]
    for result in panel.results if len(panel.results) <= 2 else panel.results[:1]:
        name = f"{result.method}: " if len(panel.results) > 1 else ""
        if told := gain_told(result, ledger):
            parts.append(f"{name}gain: {told}")
        if result.over_sparsified is not None:
            parts.append(f"{name}judged alone, loses more than allowed from {result.words(result.over_sparsified)}")
        if result.left_out:
            parts.append(f"{name}{', '.join(map(numbers.percent, result.left_out))} left out: not all seeds are there")
    if any(first.failed):
        share = sum(first.failed) / len(first.failed)
        parts.append(f"the attack failed on {100 * share:.2g}% of images, which count as the largest distance found")
    seeds = "1 seed, so intervals cover the images only" if len(first.seeds) == 1 else f"{len(first.seeds)} seeds"
    return "; ".join([*parts, f"{seeds}, {first.images:,} images"]) + "."


def _again(study: Study) -> list[tuple[str, str]]:
    """Return the command, the plan and the environment, each with its heading."""
    return [("", study.command), ("Plan", _json(study.plan)), ("Environment", _json(study.environment))]


def _json(table: Mapping[str, object]) -> str:
    """Return a table as JSON, one key a line."""
    lines = [f"  {json.dumps(name)}: {json.dumps(value, ensure_ascii=False)}" for name, value in table.items()]
    return "\n".join(["{", ",\n".join(lines), "}"])
