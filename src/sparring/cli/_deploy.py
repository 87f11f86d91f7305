"""`sparring export`, `bench` and `pick`: the artefact to ship, and what shipping it costs and brings."""

from __future__ import annotations

import math
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from .. import __version__, attacks, deploy
from ..data import Dataset, as_float, content_hash
from ..errors import UserError
from ..files import sha256_file, write_atomic
from ..metrics import accuracy
from ..models import build, load_weights_
from ..records import PlanFile, Record, Store, read_plan, read_record
from ..report import Choice, pick, png, shipped_verdict, timings_figure
from ..study import WEIGHTS, chosen_images
from ..threat import LINF, Threat
from ..train import predict
from ..units import percent
from ._loading import open_data
from ._models import SAVED, check_named, open_model, plain
from ._printing import print_json

ONNX_TOLERANCE = 1e-4


def run_export(
    name: str,
    out: Path,
    to: str,
    values: str,
    weights: Path | None,
    data_name: str,
    eps: float,
    images: int,
    data_dir: Path | None,
    download: bool,
) -> int:
    """Export a model and say what the artefact costs in bytes, accuracy and robustness."""
    _check_values(values)
    Threat(LINF, eps)  # refuses a budget in other units
    check_named(name, weights)
    dataset = open_data(data_name, data_dir, download)
    model = plain(open_model(name, weights, dataset)[0])
    shape = tuple(dataset.test.x.shape[1:])
    dense = 4 * sum(p.numel() for p in model.parameters())
    few = as_float(dataset.test.x[:8])
    if to == "onnx":
        path = deploy.to_onnx(model, out, shape=shape, images=few)
        _print_size(path, dense)
        return _check_onnx(path, model, as_float(dataset.test.x[:images]))
    file = weights or (Path(name) if name.endswith(SAVED) else None)
    provenance = {
        "model": name,
        "weights_sha256": None if file is None else sha256_file(file),
        "data": dataset.name,
        "data_hash": content_hash(dataset),
        "sparring": __version__,
    }
    names = dataset.class_names or None
    path = deploy.export(model, out, shape=shape, images=few, values=values, class_names=names, provenance=provenance)
    _print_size(path, dense)
    _print_cost(model, path, dataset, eps, images)
    return 0


def _print_size(path: Path, dense: int) -> None:
    size = path.stat().st_size
    print(f"wrote {path}: {size} bytes, {dense / size:.1f} times smaller than its dense parameters in float32")


def _check_onnx(path: Path, model: nn.Module, x: Tensor) -> int:
    error = deploy.onnx_error(path, model, x)
    if error is None:
        print("not checked: ONNX Runtime is not installed (sparring[onnx])")
    elif error > ONNX_TOLERANCE:
        raise UserError(f"{path}: ONNX Runtime's logits are off by {error:.1e} of the largest: do not use this file")
    else:
        print(f"checked in ONNX Runtime on {len(x)} images: logits equal to {error:.1e} of the largest")
    return 0


def _print_cost(model: nn.Module, path: Path, dataset: Dataset, eps: float, images: int) -> None:
    """Attack the model and the artefact, and say what shipping costs in accuracy and robustness."""
    x, y = chosen_images(dataset, "test", 0, images)
    found = deploy.ship_report(model, deploy.load(path), as_float(x), y, attacks.pgd, Threat(LINF, eps))
    print(f"predictions agree on {percent(found.agreement, 2)} of {len(y)} images", end="; ")
    print(f"logits differ by {found.logit_error:.1e} of the largest", end="; ")
    print(f"accuracy {percent(found.accuracy_model, 2)} → {percent(found.accuracy_packed, 2)}")
    standing = (found.robust_model, found.robust_packed, found.robust_transfer)
    own, itself, lent = (percent(share, 2) for share in standing)
    asked = percent(found.robust_decision or 0.0, 0)
    print(
        f"standing under PGD (l_inf, eps {eps:g}): the model {own}; on the artefact {itself} when attacked itself, "
        f"{lent} under the model's examples; {asked} of the first {min(len(y), 50)} under HopSkipJump, which asks it "
        "for classes only"
    )
    one = found.change
    print(
        f"against all gradient examples the artefact stands on {100 * one.estimate:+.2f} points more images than the "
        f"model [{100 * one.low:+.2f}, {100 * one.high:+.2f}]: {shipped_verdict(one)}"
    )


def run_bench(
    name: str,
    weights: Path | None,
    data_name: str,
    batches: str,
    rounds: int,
    small: str | None,
    plot: Path | None,
    data_dir: Path | None,
    download: bool,
    *,
    as_json: bool,
) -> int:
    """Time a model, packed and in every engine that is installed, side by side on one core."""
    try:
        sizes = tuple(int(part) for part in batches.split(",") if part.strip())
    except ValueError:
        sizes = ()
    if not sizes or min(sizes) < 1:
        raise UserError(f"--batches takes whole numbers above 0 separated by commas, as 1,64; not '{batches}'")
    check_named(name, weights)
    if small is not None:
        check_named(small, None)
    dataset = open_data(data_name, data_dir, download)
    model = plain(open_model(name, weights, dataset)[0])
    rival = None if small is None else plain(open_model(small, None, dataset)[0])
    rows = deploy.bench(model, shape=tuple(dataset.test.x.shape[1:]), batches=sizes, rounds=rounds, small=rival)
    table = [asdict(row) for row in rows]
    if plot is not None:
        drawn = timings_figure(f"{Path(name).stem} on one core", table)
        write_atomic(plot, drawn.encode() if plot.suffix == ".svg" else png(drawn))
    if as_json:
        print_json(table)
        return 0
    _print_rows(rows)
    if rival is not None:
        theirs, ours = (accuracy(predict(network, dataset.test.x), dataset.test.y) for network in (rival, model))
        print(f"test accuracy: this network {percent(ours, 2)}, the small dense one {percent(theirs, 2)}")
    print("floor: the time that the nonzero products alone would take at the measured peak of this core")
    return 0


def _print_rows(rows: list[deploy.BenchRow]) -> None:
    table = Table(box=None, header_style="bold")
    headings = ["engine", "batch", "ms", "quartiles", "images/s", "over floor", "bytes", "in memory"]
    told = any(row.joules is not None for row in rows)
    for heading in [*headings, *(["mJ an image"] if told else []), "logit error"]:
        table.add_column(heading, justify="left" if heading == "engine" else "right")
    for row in rows:
        joules = "–" if row.joules is None else f"{1e3 * row.joules / row.batch:.3g}"
        table.add_row(
            row.engine,
            str(row.batch),
            f"{row.milliseconds:.3g}",
            f"{row.low:.3g}–{row.high:.3g}",
            f"{row.images_per_second:,.0f}",
            f"{row.milliseconds / row.floor:.1f}×",
            f"{row.bytes_disk:,}",
            "–" if row.bytes_memory is None else f"{row.bytes_memory:,}",
            *([joules] if told else []),
            f"{row.logit_error:.1e}",
        )
    Console(width=None if sys.stdout.isatty() else 140).print(table)
    if not told:
        print("joules: this machine does not tell (no readable counter under /sys/class/powercap)")


def run_pick(
    out: Path,
    to: Path | None,
    max_latency: float | None,
    max_accuracy_drop: float,
    values: str,
    factory: str | None,
    *,
    as_json: bool,
) -> int:
    """Choose a network of a study on validation images, report it on test images, and export it."""
    _check_values(values)
    if math.isnan(max_accuracy_drop) or not (max_latency is None or max_latency > 0):
        raise UserError("--max-accuracy-drop takes a number of points, --max-latency milliseconds above 0")
    choice = pick(out, max_latency=max_latency, max_accuracy_drop=max_accuracy_drop)
    rounded = "" if values == "fp32" else f"-{values}"
    path = to or out / f"{choice.method}-{choice.sparsity:g}{rounded}.sparring".replace(" ", "-")
    content = read_plan(out)
    model, shape, record = _network(out, content, choice.key, factory)
    provenance = {
        "study": content.plan["name"],
        "cell": {"method": choice.method, "sparsity": choice.sparsity, "seed": choice.seed},
        "key": choice.key,
        "weights_sha256": None if record.object is None else record.object["sha256"],
        "data": content.dataset["name"],
        "data_hash": record.inputs["data"],
        "sparring": __version__,
    }
    names = content.dataset["classes"] or None
    deploy.export(model, path, shape=shape, values=values, class_names=names, provenance=provenance)
    shipped = _as_shipped(out, content, choice, values)
    if as_json:
        print_json({**asdict(choice), "path": str(path), "shipped": shipped})
        return 0
    print(
        f"{choice.method} at {percent(choice.sparsity)} (seed {choice.seed}), of {choice.fitting} that fit out of "
        f"{choice.considered}; chosen on validation images, where it loses {choice.accuracy_drop_valid:.2g} points"
    )
    if choice.latency_ms is not None:
        print(f"  {choice.latency_ms:.3g} ms an image, packed in fp32 on the machine of the study")
    for name, gain in choice.gains.items():
        print(f"  test, over the dense control: {name} {gain.estimate:+.4g} [{gain.low:+.4g}, {gain.high:+.4g}]")
    for name, value in shipped.items():
        print(f"  as shipped in {values}: {name} {value:.4g}")
    if not shipped and values != "fp32":
        print(f"  what {values} costs this network was not measured: add a [[shipped]] table for {values} to the plan")
    print(f"wrote {path} ({path.stat().st_size} bytes)")
    return 0


def _as_shipped(out: Path, content: PlanFile, choice: Choice, values: str) -> dict[str, float]:
    """Return what the study measured of the chosen network's artefact with these values, attacked and certified."""
    who = choice.method, choice.sparsity, choice.seed
    keys = [key for c in content.cells if (c.method, c.sparsity, c.seed) == who for key in c.tasks]
    records = [record for key in keys if (record := read_record(out, key)) is not None]
    metrics = [r.metrics for r in records if r.stage == "ship" and r.inputs["values"] == values]
    return {name: value for found in metrics for name, value in found.items() if value is not None}


def _check_values(values: str) -> None:
    if values not in ("fp32", "fp16", "int8"):
        raise UserError(f"--values takes fp32, fp16 or int8, not '{values}'")


def _network(out: Path, content: PlanFile, key: str, factory: str | None) -> tuple[nn.Module, tuple[int, ...], Record]:
    """Rebuild a study's network from its folder alone, with its record; normalisation is among its weights."""
    record = read_record(out, key)
    if record is None:
        raise UserError(f"{out} no longer holds {key}; run the study again")
    own = record.inputs["model"]["name"]
    if ":" in own and factory != own:
        raise UserError(f"the study's model is code; if you trust '{own}' in this folder, run it with --model {own}")
    facts = content.dataset
    shape = tuple(facts["shape"])
    ones = (1.0,) * shape[0]
    options: dict[str, Any] = {k: tuple(v) if k == "widths" else v for k, v in record.inputs["model"].items()}
    model = build(options.pop("name"), shape=shape, classes=facts["class_count"], mean=ones, std=ones, **options)
    tensors = Store(out).tensors(key)
    load_weights_(model, {k.removeprefix(WEIGHTS): v for k, v in tensors.items() if k.startswith(WEIGHTS)})
    return model.eval(), shape, record
