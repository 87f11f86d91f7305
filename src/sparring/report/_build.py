"""Build a study's report from its output folder: the page, figures, results.csv and ledger.json."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

from ..errors import UserError
from ..files import write_atomic, write_json
from ..records import Folder
from ..statistics import Question, Row, judge, reread
from . import _figures as figures
from . import _linear_page as linear
from . import _summary as words
from . import _tables as tables
from ._page import render, summary_html
from ._plots import Drawn, comparisons, curve_panels, density_pictures, overview_picture
from .analysis._claims import across, claims, ledger
from .analysis._findings import Findings, find
from .analysis._linear import LinearStudy, is_linear, linear_claims, read_linear
from .analysis._looks import dropped_tests, judge_study, note_look, open_study

Named = tuple[str, Question]  # a claim with its p-values, and its study


class _Judged(NamedTuple):
    """A study with its claims before and after judging, and its verdict in words."""

    found: Findings | LinearStudy
    claims: list[Question]
    ledger: list[Row]
    verdict: words.Verdict


def write(out: Path | str) -> Path:
    """Write OUT/report.html, OUT/results.csv, OUT/ledger.json and OUT/figures/*.svg and *.png; return the page's path.

    Reads plan.json and the records and objects that it names, without models or data. Figures of an earlier report that
    this one does not have are removed. Raises UserError if there is no study in the folder, something in it is damaged,
    or it cannot be written to.
    """
    return publish(out)[0]


def publish(out: Path | str) -> tuple[Path, str]:
    """Write the report as `write` does, and return the page's path and the summary; the study is read only once."""
    folder, (found, _, rows, told) = Folder(Path(out)), _judged(out)
    if isinstance(found, LinearStudy):
        pictures = linear.pictures(found)
        csv, page = linear.csv_text(found), linear.render(found, pictures, rows, told)
    else:
        weights, activations = (curve_panels(found, axis) for axis in ("weights", "activations"))
        drawn = Drawn(weights, activations, density_pictures(found), comparisons(found), overview_picture(found))
        pictures = drawn.pictures
        csv, page = tables.csv_text(found), render(found, drawn, rows, told)
    write_atomic(folder.results, csv)
    write_json(folder.ledger, [row.as_dict() for row in rows])
    written = set()
    for picture in pictures:
        written.add(write_atomic(folder.figures / f"{picture.slug}.svg", picture.svg))
        drawing = figures.png(picture.svg, scale=picture.scale)
        written.add(write_atomic(folder.figures / f"{picture.slug}.png", drawing))
    for path in {*folder.figures.glob("*.svg"), *folder.figures.glob("*.png")} - written:
        path.unlink(missing_ok=True)
    return write_atomic(folder.report, page), str(told)


def verdict(out: Path | str) -> str:
    """Return the findings of the study in a folder, in paragraphs of plain text; raises as `write` does."""
    return str(_judged(out).verdict)


def read(out: Path | str) -> Report:
    """Return the study in a folder as an object for notebooks and scripts; raises as `write` does.

    A study of linear classifiers has no such object; use its results.csv and ledger.json.
    """
    found = _judged(out).found
    if isinstance(found, LinearStudy):
        raise UserError(f"{out} is a study of linear classifiers; read its results.csv and ledger.json instead")
    return Report(found)


def _judged(out: Path | str) -> _Judged:
    """Read and judge a study, and record this look at it."""
    study = open_study(out)
    if is_linear(study):
        data = read_linear(study)
        asked = linear_claims(data)
        data = replace(data, study=note_look(study, asked))
        rows = judge_study(data.study, asked)
        return _Judged(data, asked, rows, linear.headline(data, rows))
    findings = find(study)
    asked = claims(findings)
    findings = replace(findings, study=note_look(study, asked))
    rows = judge_study(findings.study, asked)
    return _Judged(findings, asked, rows, words.headline(findings, rows))


def merge_ledgers(outs: Iterable[Path | str], *, earlier: Path | str | None = None) -> list[Row]:
    """Return the claims of several studies as one ledger, each with its study's verdict and that among all claims.

    The first is the verdict of the claim: a study's families of claims are fixed before it runs. The second says
    whether any of the studies' verdicts together would be wrong.

    `earlier` is a ledger.json of one or more studies, whose folders need not exist any more. Its rows are judged again
    with the others, except those of a study with the same name as one in `outs`, which replaces them. Raises as `write`
    does, and UserError if `earlier` is not a ledger.
    """
    found = [_judged(out) for out in outs]
    fresh = [(one.found.study.name, asked) for one in found for asked in one.claims]
    fresh += across([one.found for one in found if isinstance(one.found, Findings)])
    old = [] if earlier is None else _read_ledger(Path(earlier))
    places = list(dict.fromkeys(name for name, _ in [*old, *fresh]))
    names = {name for name, _ in fresh}
    asked = sorted([named for named in old if named[0] not in names] + fresh, key=lambda named: places.index(named[0]))
    dropped = {one.found.study.name: dropped_tests(one.found.study, one.claims) for one in found}
    gone = [primary for part in dropped.values() for primary in part]
    merged = judge([one for _, one in asked], study="", dropped=gone)
    alone = [
        row
        for place in places
        for row in judge([q for name, q in asked if name == place], study=place, dropped=dropped.get(place, ()))
    ]
    return [replace(row, merged=(among.verdict, among.decisive)) for row, among in zip(alone, merged, strict=True)]


def _read_ledger(path: Path) -> list[Named]:
    try:
        rows = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(rows, list):
            raise TypeError("a ledger is a list of rows")
        return [(str(row["study"]), reread(row)) for row in rows]
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from error
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"{path} is not a ledger of this version; recreate it with: sparring report OUT") from error


@dataclass(frozen=True, eq=False)
class Report:
    """The findings of a study: `str` is the summary; a notebook shows text, table and figures."""

    findings: Findings

    def __str__(self) -> str:
        return str(words.headline(self.findings, self.ledger))

    @cached_property
    def ledger(self) -> list[Row]:
        """Return the claims that this study can test, with their verdicts."""
        return ledger(self.findings)

    def rows(self) -> list[dict[str, Any]]:
        """Return one row per network and metric, as in results.csv."""
        return tables.csv_rows(self.findings)

    def frame(self) -> Any:
        """Return the rows as a pandas.DataFrame; raise UserError if pandas is not installed."""
        try:
            import pandas
        except ImportError as error:
            raise UserError("a data frame needs pandas: pip install pandas, or use rows()") from error
        return pandas.DataFrame(self.rows())

    def _repr_html_(self) -> str:
        panels = curve_panels(self.findings, "weights", only_main=True)
        return summary_html(self.findings, panels, self.ledger)
