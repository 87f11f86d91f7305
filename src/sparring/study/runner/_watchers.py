"""Show the progress of a study: in a line of text, on one line that is overwritten, in MLflow and in TensorBoard."""

from __future__ import annotations

import contextlib
import re
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from ...errors import UserError
from ...progress import bar, pace, write_over
from ...ram import size_text
from ...units import duration
from ._schedule import Event, Watcher


def show_progress(event: Event) -> None:
    """Write the progress of a study over the last line of stderr; a failed task keeps its line. Pass it as `watch`."""
    told = describe(event) if event.record is not None or event.under is not None else ""
    if event.record is not None and event.record.error:
        write_over(told, "\n")
        told = ""
    counts = f"{bar(event.done, event.total)} tasks" + (f", {event.failed} failed" if event.failed else "")
    counts += f", {len(event.damaged)} damaged" if event.damaged and not told else ""
    standing = ", ".join(part for part in (counts, rest_of(event)) if part)
    write_over(f"{standing} · {told}" if told else standing, "\n" if event.done == event.total else "")


def line_of(event: Event) -> str:
    """Describe an event: the first by the number of tasks, others by their task and the remaining ones."""
    if event.under is not None:
        return f"[{event.done}/{event.total}] {describe(event)}"
    if event.record is not None:
        return ", ".join(part for part in (f"[{event.done}/{event.total}] {describe(event)}", rest_of(event)) if part)
    text = f"{event.total} tasks, {event.cached} cached"
    if event.damaged:
        shown = ", ".join(event.damaged[:3]) + (", ..." if len(event.damaged) > 3 else "")
        text += f"; {len(event.damaged)} damaged, moved to damaged/ and recomputed ({shown})"
    return text + (f"; about {duration(event.estimate)} left (rough estimate)" if event.estimate else "")


def rest_of(event: Event) -> str:
    """Return the memory in use and the remaining time, if known."""
    told = [size_text(event.memory)] if event.memory else []
    told += [f"about {duration(event.estimate)} left"] if event.estimate and event.done < event.total else []
    return ", ".join(told)


def describe(event: Event) -> str:
    """Return one line about a finished task, or one that is under way."""
    record, under = event.record, event.under
    if under is not None:
        told = pace(under.done, under.total, under.seconds, memory=size_text(event.memory))
        return f"{event.label} · {what_of(under.task.stage, under.task.table())}: {told}"
    assert record is not None
    what = what_of(record.stage, record.inputs)
    if record.error:
        return f"{event.label} · {what}: failed: {record.error}"
    shown = ("accuracy", "accuracy_valid", "robust_accuracy", "mean_distance", "sparsity", "radius_median")
    values = [f"{name} {value:.4g}" for name in shown if (value := record.metrics.get(name)) is not None]
    flags = f" [{', '.join(flag['name'] for flag in record.flags)}]" if record.flags else ""
    told = f": {', '.join(values)}" if values else ""
    seconds = record.times.get("seconds", 0)
    images = record.inputs.get("stop", 0) - record.inputs.get("start", 0) or event.images
    rate = f", {images / seconds:,.0f} images/s" if images and seconds else ""
    return f"{event.label} · {what}{told}{flags} ({seconds:.1f} s{rate})"


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
    """Return a watcher that warns once and stops if the other raises, so that no study fails for lack of a watcher."""
    broken = False

    def forgiving(event: Event) -> None:
        nonlocal broken
        if broken or event.under is not None:
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
    place = f"{event.label}/{what_of(record.stage, record.inputs)}".replace(" · ", "/").replace("%", " percent")
    place = re.sub(r"[^\w\-./ ]", "_", place)
    metrics = {f"{place}/{name}": value for name, value in record.metrics.items() if value is not None}
    return {**found, **metrics, f"{place}/seconds": record.times.get("seconds", 0.0)}


def what_of(stage: str, inputs: Mapping[str, Any]) -> str:
    """Return a short description of a task, by what its record holds."""
    if stage not in ("attack", "lend", "transfer"):
        return stage
    spec = inputs["attack"]
    budget = f" eps {spec['eps']:g}" if spec["eps"] is not None else ""
    return ("" if stage == "attack" else f"{stage} ") + f"{spec['name']} {spec['norm']}{budget}"
