"""`sparring study`: run a plan and show how it goes."""

from __future__ import annotations

import contextlib
import math
import shlex
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any, TextIO

from rich.console import Console, Group
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.text import Text

from .. import report
from ..files import check_writable
from ..records import Folder, Record
from ..study import Event, Plan, Watcher, run, to_mlflow, to_tensorboard, usable_device, what_of
from ..study import register as register_plan
from ._loading import open_data
from ._printing import print_json

FAILED = 3


def run_study(
    plan_name: str,
    out: Path | None,
    overrides: tuple[str, ...],
    workers: int | None,
    data_dir: Path | None,
    download: bool,
    *,
    register: bool,
    retry: bool,
    device: str,
    ray: str | None,
    mlflow: str | None,
    tensorboard: Path | None,
    quiet: bool,
    as_json: bool,
) -> int:
    """Run a plan, write its report, print the verdict; return the exit code."""
    plan = Plan.load(plan_name, overrides)
    command = _command(plan_name, out, overrides, data_dir, download, device)
    out = out or Path("out") / plan.name
    check_writable(out, folder=True)
    usable_device(device, here=ray is None)
    dataset = open_data(plan.data, data_dir, download)
    if register:
        entry = register_plan(plan, out)
        told = f"registered on {entry['time']}: {entry['plan']}"
        print(told, file=sys.stderr if as_json else sys.stdout, flush=True)
    view = _view(quiet or as_json, sys.stderr if as_json else sys.stdout)
    with contextlib.ExitStack() as stack:
        stack.enter_context(view)
        watchers: list[Watcher] = [view.show]
        if mlflow is not None:
            watchers.append(stack.enter_context(to_mlflow(mlflow, plan.name)))
        if tensorboard is not None:
            watchers.append(stack.enter_context(to_tensorboard(tensorboard)))
        records = run(
            plan, out, dataset=dataset, workers=workers, retry=retry, watch=_all_of(watchers), device=device, ray=ray,
            command=command,
        )  # fmt: skip
    folder = Folder(out)
    path = folder.report
    stale = not path.exists() or path.stat().st_mtime_ns < folder.plan.stat().st_mtime_ns or view.fresh
    verdict = report.publish(out)[1] if stale else report.verdict(out)
    failed = [record for record in records if record.error]
    if as_json:
        print_json(_summary(out, path, verdict, records))
    else:
        print(f"\n{verdict}\n\nreport: {path.resolve()}")
    for record in failed:
        print(f"failed: {record.stage} {record.key}: {record.error}", file=sys.stderr)
    if failed:
        print("all else is kept: mend the cause and run the same command again, with --retry", file=sys.stderr)
    return FAILED if failed else 0


def _command(
    plan_name: str, out: Path | None, overrides: tuple[str, ...], data_dir: Path | None, download: bool, device: str
) -> str:
    """Return the command that makes the study again, without options that change none of its records."""
    words = ["sparring", "study", plan_name, *(word for change in overrides for word in ("--set", change))]
    places = {"--data-dir": data_dir, "--out": out, "--device": None if device == "auto" else device}
    words += [word for option, value in places.items() if value is not None for word in (option, str(value))]
    return shlex.join([*words, *(["--download"] if download else [])])


def _all_of(watchers: list[Watcher]) -> Watcher:
    def watch(event: Event) -> None:
        for watcher in watchers:
            watcher(event)

    return watch


def _summary(out: Path, path: Path, verdict: str, records: list[Record]) -> dict[str, Any]:
    return {
        "out": str(out),
        "report": str(path),
        "verdict": verdict,
        "failed": sum(1 for record in records if record.error),
        "records": [
            {"key": r.key, "stage": r.stage, "metrics": r.metrics, "flags": r.flags, "error": r.error} for r in records
        ],
    }


class PlainView:
    """Print one line for every finished task."""

    def __init__(self, stream: TextIO) -> None:
        self.stream = stream
        self.fresh = 0

    def __enter__(self) -> PlainView:
        return self

    def __exit__(self, *unused: object) -> None:
        self.stream.flush()

    def show(self, event: Event) -> None:
        if event.record is None:
            print(beginning(event), file=self.stream, flush=True)
        else:
            self.fresh += 1
            line = f"[{event.done}/{event.total}] {describe(event)}"
            print(line, file=self.stream, flush=True)


class LiveView:
    """Keep a progress bar, what is running, an estimate of what is left, and the last results on the terminal."""

    def __init__(self) -> None:
        self.live = Live(console=Console(), refresh_per_second=8, transient=False)
        self.began = time.monotonic()
        self.recent: list[str] = []
        self.fresh = 0

    def __enter__(self) -> LiveView:
        self.live.__enter__()
        return self

    def __exit__(self, *details: Any) -> None:
        self.live.__exit__(*details)

    def show(self, event: Event) -> None:
        if event.record is None:
            self.live.console.print(beginning(event), highlight=False)
        else:
            self.fresh += 1
            self.recent = [*self.recent, describe(event)][-6:]
        left = event.total - event.done - len(event.running)
        running = Counter(task.stage for task in event.running)
        state = ", ".join(f"{count} × {stage}" for stage, count in running.items()) or "nothing"
        failed = f" · {event.failed} failed" if event.failed else ""
        self.live.update(
            Group(
                ProgressBar(total=max(1, event.total), completed=event.done, width=60),
                Text(
                    f"{event.done} done ({event.cached} before) · running {state} · {left} left"
                    f"{failed} · {self._remaining(event)}"
                ),
                *(Text("  " + line, style="dim") for line in self.recent),
            )
        )

    def _remaining(self, event: Event) -> str:
        if self.fresh < 3:
            return "estimating"
        each = (time.monotonic() - self.began) / self.fresh
        return f"about {duration(each * (event.total - event.done))} to go"


def _view(plain: bool, stream: TextIO) -> PlainView | LiveView:
    return PlainView(stream) if plain or not sys.stdout.isatty() else LiveView()


def beginning(event: Event) -> str:
    """Return what there is to do, and about how long it will take."""
    text = f"{event.total} tasks, {event.cached} done before"
    if event.damaged:
        shown = ", ".join(event.damaged[:3]) + (", ..." if len(event.damaged) > 3 else "")
        text += f"; damaged, moved to damaged/ and made again: {len(event.damaged)} ({shown})"
    return text + (f"; the rest takes about {duration(event.estimate)} (a rough guess)" if event.estimate else "")


def duration(seconds: float) -> str:
    """Return seconds as a person says them."""
    if seconds < 90:
        return f"{math.ceil(seconds)} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def describe(event: Event) -> str:
    """Return one line about a finished task."""
    record = event.record
    assert record is not None
    what = what_of(record)
    if record.error:
        return f"{event.label} · {what}: failed: {record.error}"
    shown = ("accuracy", "accuracy_valid", "robust_accuracy", "mean_distance", "sparsity", "radius_median")
    values = [f"{name} {value:.4g}" for name in shown if (value := record.metrics.get(name)) is not None]
    flags = f" [{', '.join(flag['name'] for flag in record.flags)}]" if record.flags else ""
    told = f": {', '.join(values)}" if values else ""
    return f"{event.label} · {what}{told}{flags} ({record.times.get('seconds', 0):.1f} s)"
