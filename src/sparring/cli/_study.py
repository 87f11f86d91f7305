"""`sparring study`, `status` and `merge`: run a plan, show its progress, merge studies."""

from __future__ import annotations

import contextlib
import functools
import shlex
import sys
from collections import Counter
from dataclasses import asdict
from pathlib import Path
from typing import TextIO

from rich.console import Console, Group
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.text import Text

from .. import report
from ..data import Dataset
from ..devices import place_of
from ..files import check_writable
from ..records import Folder, Record
from ..study import Event, Plan, Watcher, describe, forecast, line_of, progress, rest_of, run, to_mlflow, to_tensorboard
from ..study import merge as merge_studies
from ..study import register as register_plan
from ._app import DataSource, ModelSource, StudyOptions, StudySource
from ._printing import print_json
from ._sources import open_data, preparation, say_fresh

FAILED = CONTRADICTED = 3


def run_study(source: StudySource, how: StudyOptions, *, as_json: bool) -> int:
    """Run a plan, write its report, print the verdict; return the exit code."""
    plan = _plan_of(source)
    out, stream = source.out or Path("out") / plan.name, sys.stderr if as_json else sys.stdout
    check_writable(out, folder=True)
    place_of(source.device, source.dtype, training=True, here=how.ray is None)
    dataset = _data_of(plan, source, how)
    if how.register:
        entry = register_plan(plan, out)
        print(f"registered on {entry['time']}: {entry['plan']}", file=stream, flush=True)
    view = LiveView() if sys.stdout.isatty() and not (how.quiet or as_json) else PlainView(stream)
    with contextlib.ExitStack() as stack:
        watchers: list[Watcher] = [view.show]
        if isinstance(view, LiveView):
            stack.enter_context(view)
        if how.mlflow is not None:
            watchers.append(stack.enter_context(to_mlflow(how.mlflow, plan.name)))
        if how.tensorboard is not None:
            watchers.append(stack.enter_context(to_tensorboard(how.tensorboard)))
        records = run(
            plan, out, dataset=dataset, workers=how.workers, retry=how.retry, watch=_all_of(watchers),
            device=source.device, dtype=source.dtype, ray=how.ray, command=_command(source),
        )  # fmt: skip
    return _tell(out, records, fresh=view.fresh > 0, as_json=as_json)


def _data_of(plan: Plan, source: StudySource, how: StudyOptions) -> Dataset:
    foretell = functools.partial(forecast, plan, workers=how.workers, device=source.device, dtype=source.dtype)
    begin = None if how.ray else foretell  # of a cluster's machines nothing is known
    where = DataSource(plan.data, source.data_dir, source.download)
    return open_data(where, plan.request(cache=not source.no_cache), begin=begin)


def _plan_of(source: StudySource) -> Plan:
    plan = Plan.load(source.plan, _changes(source))
    say_fresh(plan.model.name, plan.model.weights)
    return plan


def _changes(source: StudySource) -> tuple[str, ...]:
    model = None if source.model is None else ModelSource(source.model, source.weights).named()
    named = {"model.name": model and model[0], "model.weights": model[1] if model else source.weights}
    prepared = preparation(source)
    named |= {f"prepare.{key}": value for key, value in prepared.items() if key != "limit"}
    limits = (f"prepare.limit.{split}={count}" for split, count in prepared.get("limit", {}).items())
    changed = (f"{key}='{value}'" for key, value in named.items() if value is not None)
    return *(source.overrides or ()), *limits, *changed


def _command(source: StudySource) -> str:
    """Return the command that reproduces the study, without options that change none of its records."""
    words = ["sparring", "study", source.plan, *(word for change in _changes(source) for word in ("--set", change))]
    device = None if source.device == "auto" else source.device
    places = {"--data-dir": source.data_dir, "--out": source.out, "--device": device, "--dtype": source.dtype}
    words += [word for option, value in places.items() if value is not None for word in (option, str(value))]
    words += ["--download"] if source.download else []
    return shlex.join([*words, *(["--no-cache"] if source.no_cache else [])])


def _all_of(watchers: list[Watcher]) -> Watcher:
    def watch(event: Event) -> None:
        for watcher in watchers:
            watcher(event)

    return watch


def _tell(out: Path, records: list[Record], *, fresh: bool, as_json: bool) -> int:
    """Print the verdict, of a new report if anything changed, and failures; return the exit code."""
    folder, failed = Folder(out), [record for record in records if record.error]
    path = folder.report
    stale = fresh or not path.exists() or path.stat().st_mtime_ns < folder.plan.stat().st_mtime_ns
    verdict = report.publish(out)[1] if stale else report.verdict(out)
    if as_json:
        kept = ("key", "stage", "metrics", "flags", "error")
        told = [{name: getattr(record, name) for name in kept} for record in records]
        summary = {"out": str(out), "report": str(path), "verdict": verdict, "failed": len(failed), "records": told}
        print_json(summary)
    else:
        print(f"\n{verdict}\n\nreport: {path.resolve()}")
    for record in failed:
        print(f"failed: {record.stage} {record.key}: {record.error}", file=sys.stderr)
    if failed:
        print("all other results are kept; fix the cause and rerun the same command with --retry", file=sys.stderr)
    return FAILED if failed else 0


def rebuild(out: Path, *, as_json: bool) -> None:
    """Write a study's report, tables and figures again, and print the verdict."""
    path, verdict = report.publish(out)
    if as_json:
        print_json({"out": str(out), "report": str(path), "verdict": verdict})
    else:
        print(f"{verdict}\n\nreport: {path}")


def show_status(out: Path, *, as_json: bool) -> None:
    """Print the number of a study's finished and failed tasks; safe while it is running."""
    found = progress(out)
    if as_json:
        counts = {"plan": found.plan, "tasks": found.tasks, "done": found.done, "failed": len(found.failures)}
        print_json({**counts, "stages": found.stages})
        return
    print(f"{found.plan}: {found.done} of {found.tasks} tasks done, {len(found.failures)} failed")
    for record in found.failures:
        print(f"  failed: {record.stage} {record.key}: {record.error}")


def run_merge(sources: list[Path], out: Path | None, *, as_json: bool) -> int:
    """Merge studies, write the report, and print what was refused; return 3 if records contradict each other."""
    out = out or sources[0]
    merged = merge_studies(sources, out)
    path = report.write(out)
    if as_json:
        print_json({**asdict(merged), "report": str(path)})
    else:
        print(f"{merged.added} records added, {merged.known} already present, {len(merged.refused)} refused")
        for line in merged.refused:
            print(f"  refused: {line}")
        for key in merged.different:
            print(f"  differs from the existing record of the same task, which was kept: {key}")
        print(f"report: {path.resolve()}")
    return CONTRADICTED if merged.different else 0


class PlainView:
    """Print one line for every finished task, and for every tenth of one that takes long."""

    def __init__(self, stream: TextIO) -> None:
        self.stream, self.fresh = stream, 0
        self.tenths: dict[str, int] = {}

    def show(self, event: Event) -> None:
        self.fresh += event.record is not None
        if event.under is not None:
            key, tenth = event.under.task.key, 10 * event.under.done // max(1, event.under.total)
            if tenth == self.tenths.get(key):
                return
            self.tenths[key] = tenth
        print(line_of(event), file=self.stream, flush=True)


class LiveView(Live):
    """Show a progress bar, running tasks, an estimate of the remaining time, and the latest results on the terminal."""

    def __init__(self) -> None:
        super().__init__(console=Console(), refresh_per_second=8)
        self.recent: list[str] = []
        self.under: dict[str, str] = {}
        self.fresh = 0

    def show(self, event: Event) -> None:
        if event.under is not None:
            self.under[event.under.task.key] = describe(event)
        elif event.record is None:
            self.console.print(line_of(event), highlight=False)
        else:
            self.fresh += 1
            self.recent = [*self.recent, describe(event)][-6:]
        left = event.total - event.done - len(event.running)
        running = Counter(task.stage for task in event.running)
        state = ", ".join(f"{count} × {stage}" for stage, count in running.items()) or "nothing"
        told = [f"{event.done} done ({event.cached} cached)", f"running {state}", f"{left} waiting"]
        told += [f"{event.failed} failed"] if event.failed else []
        bar = ProgressBar(total=max(1, event.total), completed=event.done, width=60)
        under = [Text("  " + self.under[task.key]) for task in event.running if task.key in self.under]
        recent = (Text("  " + line, style="dim") for line in self.recent)
        state_line = Text("\n" + " · ".join([*told, rest_of(event)]))  # a bar alone does not end its line
        self.update(Group(bar, state_line, *under, *recent))
