"""Make a study's report from its output folder alone: the page, the figures, results.csv and ledger.json."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from ..errors import UserError
from ..files import write_atomic, write_json
from ..records import Folder
from ..statistics import Question, Row, judge, reread
from . import _figures as figures
from . import _summary as words
from . import _tables as tables
from ._linear_page import linear_csv, linear_headline, linear_pictures, render_linear
from ._page import render, summary_html
from ._plots import Drawn, Picture, comparisons, curve_panels, density_pictures, overview_picture
from .analysis._claims import across, claims, ledger
from .analysis._findings import Findings, find
from .analysis._linear import LinearStudy, is_linear, linear_claims, linear_ledger, read_linear
from .analysis._looks import dropped_tests, note_look, open_study

Named = tuple[str, Question]  # a claim with its p-values, and the study that it is of


def write(out: Path | str) -> Path:
    """Write OUT/report.html, OUT/results.csv, OUT/ledger.json and OUT/figures/*.svg and *.png; return the page's path.

    Reads plan.json and the records and objects that it names; no models, no data. Figures of an earlier report that
    this one does not have are removed. Raises UserError when there is no study in the folder, something in it is
    damaged, or it cannot be written to.
    """
    return publish(out)[0]


def publish(out: Path | str) -> tuple[Path, str]:
    """Write all that `write` does and return the page's path and the verdict, for one reading of the study."""
    out = Path(out)
    found = _judged(out)
    if isinstance(found, LinearStudy):
        return _write_linear(out, found), _linear_verdict(found)
    made = Report(found)
    return _write(out, made), str(made)


def _judged(out: Path | str) -> Findings | LinearStudy:
    """Read and judge a study, which is a look at it, and write that down."""
    study = open_study(out)
    if is_linear(study):
        data = read_linear(study)
        return replace(data, study=note_look(study, linear_claims(data)))
    findings = find(study)
    return replace(findings, study=note_look(study, claims(findings)))


def _write(out: Path, made: Report) -> Path:
    findings, rows = made.findings, made.ledger
    weights, activations = (curve_panels(findings, axis) for axis in ("weights", "activations"))
    overview = overview_picture(findings)
    drawn = Drawn(weights, activations, density_pictures(findings), comparisons(findings), overview)
    return _write_files(out, tables.csv_text(findings), rows, drawn.pictures, render(findings, drawn, rows))


def _write_linear(out: Path, data: LinearStudy) -> Path:
    pictures, rows = linear_pictures(data), linear_ledger(data)
    return _write_files(out, linear_csv(data), rows, pictures, render_linear(data, pictures, rows))


def _write_files(out: Path, csv: str, rows: Iterable[Row], pictures: Iterable[Picture], page: str) -> Path:
    folder = Folder(out)
    write_atomic(folder.results, csv)
    write_json(folder.ledger, [row.as_dict() for row in rows])
    _write_figures(folder.figures, pictures)
    return write_atomic(folder.report, page)


def _write_figures(folder: Path, pictures: Iterable[Picture]) -> None:
    """Write every figure and remove those of an earlier report that this one does not have."""
    written = set()
    for picture in pictures:
        written.add(write_atomic(folder / f"{picture.slug}.svg", picture.svg))
        written.add(write_atomic(folder / f"{picture.slug}.png", figures.png(picture.svg, scale=picture.scale)))
    for path in {*folder.glob("*.svg"), *folder.glob("*.png")} - written:
        path.unlink(missing_ok=True)


def verdict(out: Path | str) -> str:
    """Return what the study in a folder found, as one paragraph of plain text; raises as `write` does."""
    found = _judged(out)
    return _linear_verdict(found) if isinstance(found, LinearStudy) else str(Report(found))


def _linear_verdict(data: LinearStudy) -> str:
    return " ".join(linear_headline(data, linear_ledger(data)))


def read(out: Path | str) -> Report:
    """Return the study in a folder as an object for notebooks and scripts; raises as `write` does.

    A study of linear classifiers has no such object: its results.csv and ledger.json hold all of it.
    """
    found = _judged(out)
    if isinstance(found, LinearStudy):
        raise UserError(f"{out} is a study of linear classifiers; read its results.csv and ledger.json instead")
    return Report(found)


def merge_ledgers(outs: Iterable[Path | str], *, earlier: Path | str | None = None) -> list[Row]:
    """Return the claims of several studies as one ledger, each with its study's verdict and that among all claims.

    The first is the verdict: a study's families are fixed before it runs. The second answers another question, whether
    any of so many studies would be wrong.

    `earlier` is a ledger.json, of one study or of many, whose folders need not be there any more: its rows are judged
    again among the others, but for those of a study of the same name as one in `outs`, which takes their place. Raises
    as `write` does, and UserError when `earlier` is no such file.
    """
    found = [_judged(out) for out in outs]
    fresh = [named for one in found for named in _claims_of(one)]
    fresh += across([one for one in found if isinstance(one, Findings)])
    old = [] if earlier is None else _read_ledger(Path(earlier))
    places = list(dict.fromkeys(name for name, _ in [*old, *fresh]))
    names = {name for name, _ in fresh}
    asked = sorted([named for named in old if named[0] not in names] + fresh, key=lambda named: places.index(named[0]))
    dropped = {one.study.name: dropped_tests(one.study, [q for _, q in _claims_of(one)]) for one in found}
    merged = judge(
        [one for _, one in asked], study="", dropped=[primary for part in dropped.values() for primary in part]
    )
    alone = [
        row
        for place in places
        for row in judge([q for name, q in asked if name == place], study=place, dropped=dropped.get(place, ()))
    ]
    return [replace(row, merged=(among.verdict, among.decisive)) for row, among in zip(alone, merged, strict=True)]


def _claims_of(found: Findings | LinearStudy) -> list[Named]:
    asked = linear_claims(found) if isinstance(found, LinearStudy) else claims(found)
    return [(found.study.name, one) for one in asked]


def _read_ledger(path: Path) -> list[Named]:
    try:
        rows = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(rows, list):
            raise TypeError("a ledger is a list of rows")
        return [(str(row["study"]), reread(row)) for row in rows]
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from error
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"{path} is no ledger of this version: make it anew, sparring report OUT") from error


@dataclass(frozen=True, eq=False)
class Report:
    """Hold what a study found: `str` is the verdict; in a notebook it shows as words, table and figures."""

    findings: Findings

    def __str__(self) -> str:
        return " ".join(words.headline(self.findings, self.ledger))

    @cached_property
    def ledger(self) -> list[Row]:
        """Return the claims that this study can speak of, with their verdicts."""
        return ledger(self.findings)

    def rows(self) -> list[dict[str, Any]]:
        """Return one row a network and metric, as in results.csv."""
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
