"""Show the progress of a study on one line, in MLflow and in TensorBoard."""

from __future__ import annotations

import contextlib
import re
import warnings
from collections.abc import Iterator
from pathlib import Path

from ...errors import UserError
from ...progress import bar, write_over
from ...records import Record
from ._schedule import Event, Watcher


def show_progress(event: Event) -> None:
    """Write the progress of a study over the last line of stderr; a failed task keeps its line. Pass it as `watch`."""
    record = event.record
    if record is not None and record.error:
        write_over(f"failed: {event.label} · {what_of(record)}: {record.error}", "\n")
    write_over(_line(event), "\n" if event.done == event.total else "")


def _line(event: Event) -> str:
    counts = f"{bar(event.done, event.total)} tasks" + (f", {event.failed} failed" if event.failed else "")
    if event.record is None:
        damaged = f"; damaged files to recompute: {len(event.damaged)}" if event.damaged else ""
        guess = f"; the rest takes about {event.estimate:.0f} s (rough estimate)" if event.estimate else ""
        return counts + damaged + guess
    return f"{counts} · {event.label} · {what_of(event.record)}"


@contextlib.contextmanager
def to_tensorboard(folder: str | Path) -> Iterator[Watcher]:
    """Write every event's numbers to `folder` while the block runs; raise UserError if TensorBoard is missing."""
    try:
        from torch.utils.tensorboard.writer import SummaryWriter
    except ImportError:
        raise UserError("--tensorboard needs the package tensorboard: pip install 'sparring[tensorboard]'") from None
    writer = SummaryWriter(str(folder))

    def watch(event: Event) -> None:
        for name, value in _numbers(event).items():
            writer.add_scalar(name, value, event.done)
        writer.flush()

    try:
        yield _forgiving(watch, f"TensorBoard in {folder}")
    finally:
        writer.close()


@contextlib.contextmanager
def to_mlflow(uri: str, name: str) -> Iterator[Watcher]:
    """Log every event's numbers to one run of the experiment "sparring" on an MLflow server or in a folder.

    The run ends as FINISHED, or as KILLED if the block raised an exception. Raises UserError if MLflow is missing or
    cannot be reached.
    """
    try:
        from mlflow import MlflowClient
        from mlflow.exceptions import MlflowException
    except ImportError:
        raise UserError("--mlflow needs the package mlflow-skinny: pip install 'sparring[mlflow]'") from None
    try:
        client = MlflowClient(tracking_uri=uri)
        experiment = client.get_experiment_by_name("sparring")
        number = experiment.experiment_id if experiment else client.create_experiment("sparring")
        run = client.create_run(number, run_name=name).info.run_id
    except (MlflowException, OSError, ImportError) as error:
        raise UserError(f"cannot log to MLflow at {uri}: {error}") from error

    def watch(event: Event) -> None:
        for key, value in _numbers(event).items():
            client.log_metric(run, key, value, step=event.done)

    state = "KILLED"
    try:
        yield _forgiving(watch, f"MLflow at {uri}")
        state = "FINISHED"
    finally:
        with contextlib.suppress(MlflowException, OSError):
            client.set_terminated(run, state)


def _forgiving(watch: Watcher, place: str) -> Watcher:
    """Return a watcher that warns once and falls silent where the other raises: no study ends for want of a witness."""
    broken = False

    def forgiving(event: Event) -> None:
        nonlocal broken
        if broken:
            return
        try:
            watch(event)
        except Exception as error:
            broken = True
            warnings.warn(f"progress logging to {place} stopped: {error}", RuntimeWarning, stacklevel=2)

    return forgiving


def _numbers(event: Event) -> dict[str, float]:
    """Return an event's counts and its record's metrics, under names that both tools take."""
    found: dict[str, float] = {
        "study/done": event.done,
        "study/failed": event.failed,
        "study/running": len(event.running),
    }
    record = event.record
    if record is None:
        return found
    place = f"{event.label}/{what_of(record)}".replace(" · ", "/").replace("%", " percent")
    place = re.sub(r"[^\w\-./ ]", "_", place)
    metrics = {f"{place}/{name}": value for name, value in record.metrics.items() if value is not None}
    return {**found, **metrics, f"{place}/seconds": record.times.get("seconds", 0.0)}


def what_of(record: Record) -> str:
    """Return a short description of a record's task."""
    if record.stage not in ("attack", "lend", "transfer"):
        return record.stage
    spec = record.attack
    budget = f" eps {spec['eps']:g}" if spec["eps"] is not None else ""
    return ("" if record.stage == "attack" else f"{record.stage} ") + f"{spec['name']} {spec['norm']}{budget}"
