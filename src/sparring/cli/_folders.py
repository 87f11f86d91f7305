"""`sparring status` and `sparring merge`: what can be done with studies' folders without running anything."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from .. import report
from ..study import merge, progress
from ._printing import print_json

CONTRADICTED = 3


def show_status(out: Path, *, as_json: bool) -> int:
    """Count a study's done and failed tasks without disturbing whoever runs it."""
    found = progress(out)
    if as_json:
        counts = {"plan": found.plan, "tasks": found.tasks, "done": found.done, "failed": len(found.failures)}
        print_json({**counts, "stages": found.stages})
        return 0
    print(f"{found.plan}: {found.done} of {found.tasks} tasks done, {len(found.failures)} failed")
    for record in found.failures:
        print(f"  failed: {record.stage} {record.key}: {record.error}")
    return 0


def run_merge(sources: list[Path], out: Path | None, *, as_json: bool) -> int:
    """Unite studies, write the report, and say what was refused; exit code 3 if records contradict each other."""
    out = out or sources[0]
    merged = merge(sources, out)
    path = report.write(out)
    if as_json:
        print_json({**dataclasses.asdict(merged), "report": str(path)})
    else:
        print(f"{merged.added} records added, {merged.known} known before, {len(merged.refused)} refused")
        for line in merged.refused:
            print(f"  refused: {line}")
        for key in merged.different:
            print(f"  contradicts another result of the same task, which was kept: {key}")
        print(f"report: {path.resolve()}")
    return CONTRADICTED if merged.different else 0
