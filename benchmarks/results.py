"""Copy finished studies into the documentation: figures, results.csv, and one ledger for all of them.

    python benchmarks/results.py out/paper-linear out/paper-lenet-300-100 --to docs/results

writes docs/results/ledger.json (Holm's correction across all studies, those that it held before included) and a folder
for each study with the figures that its page shows, results.csv (each seed's means) and plan.json (command and plan).
The table of claims between two marks in a study's page, docs/results/STUDY.md, is rewritten from the ledger. Without
any OUT, only the tables are rewritten.
"""

from __future__ import annotations

import argparse
import csv
import io
import json
import re
import shlex
import shutil
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

from sparring import report
from sparring.statistics import LEAST_P, Effect, Row

KEYS = ("method", "sparsity", "metric", "attack", "norm", "eps", "split")

MARKS = ("<!-- claims: written by benchmarks/results.py -->\n", "<!-- end of claims -->\n")


def copy_study(out: Path, folder: Path, page: str) -> None:
    """Copy what documentation shows of one study, the figures that its page shows among it."""
    report.write(out)
    folder.mkdir(parents=True, exist_ok=True)
    document = json.loads((out / "plan.json").read_text())
    kept = {"command": portable(document["command"])} | {name: document[name] for name in ("plan", "environment")}
    _write(folder / "plan.json", json.dumps(kept, indent=1, ensure_ascii=False) + "\n")
    _write(folder / "results.csv", means((out / "results.csv").read_text(encoding="utf-8")))
    for old in folder.glob("*.svg"):
        old.unlink()
    for name in figures(page, folder.name):
        shutil.copyfile(out / "figures" / name, folder / name)


def figures(page: str, study: str) -> list[str]:
    """Return the names of the figures of a study that a page shows."""
    return re.findall(rf"\]\({re.escape(study)}/([\w.-]+\.svg)\)", page)


def portable(command: str) -> str:
    """Return a command with the last part alone of every absolute path: where a folder lay tells a reader nothing."""
    return shlex.join(Path(word).name if Path(word).is_absolute() else word for word in shlex.split(command))


def means(text: str) -> str:
    """Return results as CSV text with one row for a network and metric: number, mean and range over seeds, each seed's.

    Of linear classifiers, which have no seeds, the row of a classifier holds all its metrics, as written by `wide`.
    """
    rows = list(csv.DictReader(io.StringIO(text)))
    if not rows or "seed" not in rows[0]:
        return wide(rows)
    groups: dict[tuple[str, ...], dict[int, float]] = defaultdict(dict)
    for row in rows:
        if row["value"]:
            groups[tuple(row[key] for key in KEYS)][int(row["seed"])] = float(row["value"])
    seeds = sorted({seed for values in groups.values() for seed in values})
    target = io.StringIO()
    writer = csv.writer(target, lineterminator="\n")
    writer.writerow([*KEYS, "seeds", "mean", "lowest", "highest", *(f"seed {seed}" for seed in seeds)])
    for key, by_seed in groups.items():
        values = [*by_seed.values()]
        told = [sum(values) / len(values), min(values), max(values), *(by_seed.get(seed) for seed in seeds)]
        writer.writerow([*key, len(values), *("" if number is None else f"{number:.6g}" for number in told)])
    return target.getvalue()


def wide(rows: Sequence[dict[str, str]]) -> str:
    """Return the results of linear classifiers with one row a classifier and pair of classes, one column a metric."""
    keys = ("loss", "classes", "path", "step")
    groups: dict[tuple[str, ...], dict[str, str]] = defaultdict(dict)
    for row in rows:
        groups[tuple(row[key] for key in keys)][row["metric"]] = f"{float(row['value']):.6g}"
    columns = list(dict.fromkeys(name for values in groups.values() for name in values))
    target = io.StringIO()
    writer = csv.writer(target, lineterminator="\n")
    writer.writerow([*keys, *columns])
    writer.writerows([*key, *(values.get(name, "") for name in columns)] for key, values in groups.items())
    return target.getvalue()


def renewed(page: str, study: str, ledger: Sequence[Row]) -> str:
    """Return a study's page with a new table of its claims, if it has the marks for one."""
    if not all(page.count(mark) == 1 for mark in MARKS):
        return page
    before, after = page[: page.index(MARKS[0])], page[page.index(MARKS[1]) :]
    return before + MARKS[0] + claims_table([row for row in ledger if row.study == study], len(ledger)) + after


def claims_table(rows: Sequence[Row], total: int) -> str:
    """Return claims as Markdown, each with its verdict and with that among the claims of all studies."""
    lines = [f"| claim | effect [95%] | seeds × images | verdict | among all {total} |\n|---|---|---|---|---|"]
    for row in rows:
        effect, merged = "–", "–"
        counts = "–"
        if (e := row.effect) is not None:
            effect = _signed(e, row.claim.unit)
            counts = f"{e.seeds} × {e.images:,}"
        if row.merged is not None:
            merged = _told(*row.merged)
        alike = sum(other.claim.text == row.claim.text for other in rows) > 1
        text = f"{row.claim.text} ({row.claim.test.split(' − ')[0]})" if alike else row.claim.text
        text = f"**{text}**" if row.claim.primary else text
        lines.append(f"| {text} | {effect} | {counts} | {_told(row.told, row.decisive)} | {merged} |")
    words = (
        "The verdict is that of this study, whose families of claims were fixed before it ran: the claims in bold are"
        " tested first, the others with the error rate that settled claims pass on. The last column is stricter: any"
        " verdict of all studies together would be wrong in at most one ledger of twenty. The p-value of the test that"
        " a verdict rests on is in brackets."
    )
    return "\n".join(lines) + f"\n\n{words} The tests are in [ledger.json](ledger.json).\n"


def _signed(e: Effect, unit: str) -> str:
    digits = 0 if abs(e.estimate) >= 1000 else 1
    told = (f"{number:+,.{digits}f}".replace("-", "−") for number in (e.estimate, e.low, e.high))
    estimate, low, high = (text if text.strip("+−0.") else text[1:] for text in told)  # zero has no sign
    return f"{estimate}% [{low}, {high}]" if unit == "%" else f"{estimate} [{low}, {high}] {unit}"


def _told(verdict: str, p: float | None) -> str:
    return verdict if p is None else f"{verdict} ({'< 1e-4' if p <= LEAST_P else f'{p:.2g}'})"


def _write(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("outs", nargs="*", type=Path, metavar="OUT")
    parser.add_argument("--to", type=Path, required=True)
    options = parser.parse_args()
    for out in options.outs:
        page = options.to / f"{out.name}.md"
        shown = page.read_text(encoding="utf-8") if page.exists() else f"![]({out.name}/overview.svg)"
        copy_study(out, options.to / out.name, shown)
    earlier = options.to / "ledger.json"
    rows = report.merge_ledgers(options.outs, earlier=earlier if earlier.exists() else None)
    _write(earlier, json.dumps([row.as_dict() for row in rows], indent=1, ensure_ascii=False) + "\n")
    print(f"{earlier}: {len(rows)} claims")
    for page in sorted(options.to.glob("*.md")):
        _write(page, renewed(page.read_text(encoding="utf-8"), page.stem, rows))


if __name__ == "__main__":
    main()
