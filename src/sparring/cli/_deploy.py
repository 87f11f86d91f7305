"""`sparring export`, `bench` and `pick`: export a model, time it, choose one from a study."""

from __future__ import annotations

import math
import sys
import time
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .. import __version__, attacks, deploy
from ..data import Dataset, as_float, content_hash
from ..devices import Place, place_of
from ..errors import UserError
from ..files import sha256_file, write_atomic
from ..metrics import accuracy
from ..records import PlanFile, read_plan, read_record
from ..report import Choice, pick, png, shipped_verdict, timings_figure
from ..study import chosen_images, trained
from ..threat import LINF, Threat
from ..units import duration, parse_eps, percent
from ._app import BenchOptions, DataSource, ExportOptions, ModelSource, PickOptions, Where
from ._printing import print_json, print_table
from ._progress import predicted, shown_images
from ._sources import check_out, check_seconds, file_of, float_images, open_both, open_model, plain_form

ONNX_TOLERANCE = 1e-4  # or four roundings of the model's own type
# Passes of one image in the attacks on an exported file: PGD's gradients count as two more, on network and artefact.
_GRADIENTS, _DECISIONS = 240, 1000
ENDINGS = {"packed": ".sparring", "onnx": ".onnx"}


def run_export(model: ModelSource, how: ExportOptions, data: DataSource, where: Where, *, as_json: bool) -> None:
    """Export a model and print the artefact's size, accuracy and robustness.

    The model that the file is compared with runs on the device of `where`.
    """
    threat, form = Threat(LINF, parse_eps(how.eps)), how.format or ("onnx" if how.out.suffix == ".onnx" else "packed")
    if form not in ENDINGS:
        raise UserError(f"--format takes packed or onnx, not '{form}'")
    check_out(how.out, *(ENDINGS.values() if how.format is None else [ENDINGS[form]]))
    _check_values(how.values)
    check_seconds(how.seconds)
    possible = ("fp32", "int8") if (form, how.values) == ("packed", "int8") else ("fp32",)
    if how.activations not in possible:
        raise UserError("--activations takes fp32, or int8 for a packed file with --values int8")
    place = place_of(where.device, where.dtype)
    network, dataset = open_both(model, data, plain=True, images=how.images, identify=form == "packed")
    if form == "onnx":
        told = _write_onnx(network, how, dataset, place)
    else:
        told = _write_packed(model, network, how, dataset, threat, place)
    if as_json:
        about = {"model": model.model, "data": dataset.name, **place.facts(network)}
        print_json({**about, "path": str(how.out), "format": form, **told})


def _write_onnx(network: nn.Module, how: ExportOptions, dataset: Dataset, place: Place) -> dict[str, Any]:
    """Write a network as ONNX; print and return its size and the error of its logits."""
    shape, few = tuple(dataset.test.x.shape[1:]), as_float(dataset.test.x[:8])
    with shown_images("steps", name := "exporting") as tell:
        path = deploy.to_onnx(network, how.out, shape=shape, images=few, progress=partial(tell, name))
    return {
        **_print_size(path, network),
        "logit_error": _check_onnx(path, place.model(network), as_float(dataset.test.x[: how.images])),
    }


def _write_packed(
    model: ModelSource, network: nn.Module, how: ExportOptions, dataset: Dataset, threat: Threat, place: Place
) -> dict[str, Any]:
    """Write a network as an artefact; print and return its size and the cost of shipping it."""
    if len(dataset.test.x) < 2:
        raise UserError("the attack on the exported file compares shares of images: give at least two test images")
    packed = _packed(model, network, how, dataset)
    print(_gain(packed))
    path = deploy.write_program(packed.program, how.out, values=how.values)
    size = _print_size(path, network)
    model_there, loaded = place.model(network), deploy.load(path)
    x, y = chosen_images(dataset, "test", 0, how.images)
    count = _affordable(loaded, as_float(x[:1]), len(x), how.seconds)
    with shown_images() as tell:
        task = model_there, loaded, float_images(x[:count], results=2), y[:count]
        found = deploy.ship_report(*task, attacks.pgd, threat, progress=tell)
    _print_cost(found, count, threat)
    shares = {name: value for name, value in vars(found).items() if not isinstance(value, Tensor)}
    change = {"estimate": found.change.estimate, "low": found.change.low, "high": found.change.high}
    numbers = {"values": how.values, "activations": how.activations}
    return {**size, **numbers, "images": count, "eps": threat.eps, **shares, "change": change}


def _packed(model: ModelSource, network: nn.Module, how: ExportOptions, dataset: Dataset) -> deploy.Packed:
    x = dataset.test.x
    with shown_images("steps", name := "packing") as tell:
        return deploy.pack(
            network, shape=tuple(x.shape[1:]), images=as_float(x[:8]), values=how.values,
            class_names=dataset.class_names or None,
            calibrate=_calibrating(dataset) if how.activations == "int8" else None,
            provenance=_provenance(model, dataset), progress=partial(tell, name),
        )  # fmt: skip


def _affordable(packed: deploy.Packed, image: Tensor, most: int, seconds: float) -> int:
    """Return how many images the attacks can take in a time budget, two at least; say if they are fewer than `most`."""
    packed(image)  # not timed: it is planned
    begin = time.perf_counter()
    packed(image)
    each = time.perf_counter() - begin
    cost = {count: each * (count * _GRADIENTS + min(count, 50) * _DECISIONS) for count in range(most, 1, -1)}
    few = next((count for count, needed in cost.items() if needed <= seconds), 2)
    if few < most:
        said = f"attacking {few} of {most} images, which takes about {duration(cost[few])}: --seconds changes this"
        print(said, file=sys.stderr, flush=True)
    return few


def _calibrating(dataset: Dataset) -> Tensor:
    """Return the images on which engines in int8 are calibrated: of the validation split, if there is one."""
    split = dataset.valid if len(dataset.valid.x) else dataset.test
    return as_float(split.x[: deploy.CALIBRATING])


def _check_values(values: str) -> None:
    if values not in ("fp32", "fp16", "int8"):
        raise UserError(f"--values takes fp32, fp16 or int8, not '{values}'")


def _provenance(model: ModelSource, dataset: Dataset) -> dict[str, Any]:
    file = file_of(model)
    return {
        "model": model.model,
        "weights_sha256": None if file is None else sha256_file(file),
        "data": dataset.name,
        ("files_hash" if dataset.identity else "data_hash"): content_hash(dataset),
        "sparring": __version__,
    }


def _gain(packed: deploy.Packed) -> str:
    """Return what the sparse kernels save of this network's work and time, to be said before it is written."""
    kept, dense = deploy.products(packed.program)
    if not dense:
        return "no layer of this network can run on sparse kernels: it runs dense, in PyTorch"
    ours, torchs = deploy.over_dense(packed)
    few = "; little to gain: `sparring bench` compares engines" if 2 * ours > torchs else ""
    return (
        f"sparse kernels compute {percent(kept / dense)} of the products per image ({kept:,} of {dense:,}); "
        f"one image takes {1e3 * ours:.3g} ms on one core, {torchs / ours:.3g} times as fast as dense in PyTorch{few}"
    )


def _print_size(path: Path, model: nn.Module) -> dict[str, int]:
    size, dense = path.stat().st_size, 4 * sum(p.numel() for p in model.parameters())
    print(f"wrote {path}: {size} bytes, {dense / size:.1f} times smaller than its dense parameters in float32")
    return {"bytes": size, "dense_bytes": dense}


def _check_onnx(path: Path, model: nn.Module, x: Tensor) -> float | None:
    with shown_images(name="checking"):
        error = deploy.onnx_error(path, model, x)
    own = max((torch.finfo(p.dtype).eps for p in model.parameters() if p.is_floating_point()), default=0.0)
    if error is None:
        print("not checked: ONNX Runtime is not installed (sparring[onnx])")
    elif error > max(ONNX_TOLERANCE, 4 * own):
        raise UserError(
            f"{path}: ONNX Runtime's logits differ by {error:.1e} of the largest logit; do not use this file"
        )
    else:
        print(f"checked in ONNX Runtime on {len(x)} images: logits agree to {error:.1e} of the largest")
    if not deploy.takes_any_number(path):
        print("it takes one image at a time: forward() turns the number of images into a Python number")
    return error


def _print_cost(found: deploy.Shipped, images: int, threat: Threat) -> None:
    """Print what shipping costs in accuracy and robustness."""
    print(f"predictions agree on {percent(found.agreement, 2)} of {images} images", end="; ")
    print(f"logits differ by {found.logit_error:.1e} of the largest", end="; ")
    print(f"accuracy {percent(found.accuracy_model, 2)} → {percent(found.accuracy_packed, 2)}")
    standing = (found.robust_model, found.robust_packed, found.robust_transfer)
    own, itself, lent = (percent(share, 2) for share in standing)
    asked, one = percent(found.robust_decision or 0.0, 0), found.change
    print(
        f"robust accuracy under PGD (ℓ∞, eps {threat.eps:g}): model {own}; artefact {itself} when attacked directly, "
        f"{lent} under the model's adversarial examples; {asked} of the first {found.decided} images under "
        "HopSkipJump, a decision-based attack"
    )
    print(
        f"robust accuracy under all gradient attacks, artefact − model: {100 * one.estimate:+.2f} points "
        f"[{100 * one.low:+.2f}, {100 * one.high:+.2f}]: {shipped_verdict(one)}"
    )


def run_bench(model: ModelSource, data: DataSource, how: BenchOptions, *, as_json: bool) -> None:
    """Time a model, packed and in every engine that is installed, side by side on one core."""
    if how.plot is not None:
        check_out(how.plot, ".svg", ".png")
    place = place_of(how.device, how.dtype)
    sizes, small = _batches(how.batches), None if how.small is None else ModelSource(how.small)
    few = deploy.CALIBRATING if small is None else None
    network, dataset = open_both(model, data, plain=True, images=few, beside=small)
    rival = None if small is None else plain_form(open_model(small, dataset)[0].eval())
    engines = None if how.engines is None else [name.strip() for name in how.engines.split(",")]
    with shown_images("rounds") as tell:
        found = deploy.bench(
            network, shape=tuple(dataset.test.x.shape[1:]), batches=sizes, rounds=how.rounds, small=rival,
            images=_calibrating(dataset), engines=engines, place=place, progress=tell,
        )  # fmt: skip
    if how.plot is not None:
        _plot(found, f"{Path(model.model).stem} on one core", how.plot)
    if as_json:
        about = {"model": model.model, "data": dataset.name, "device": place.device}
        print_json({**about, **asdict(found), "ship": deploy.what_to_ship(found)})
    else:
        _print_bench(found)
        if rival is not None:
            _print_accuracies(network, rival, dataset)


def _print_accuracies(network: nn.Module, rival: nn.Module, dataset: Dataset) -> None:
    x, y = dataset.test
    ours, theirs = (accuracy(predicted(one, x, "test images"), y) for one in (network, rival))
    print(f"test accuracy: this network {percent(ours, 2)}, the small dense one {percent(theirs, 2)}")


def _batches(text: str) -> tuple[int, ...]:
    try:
        sizes = tuple(int(part) for part in text.split(",") if part.strip())
    except ValueError:
        sizes = ()
    if not sizes or min(sizes) < 1:
        raise UserError(f"--batches takes whole numbers above 0 separated by commas, such as 1,64; not '{text}'")
    return sizes


def _plot(found: deploy.Bench, title: str, path: Path) -> None:
    drawn = timings_figure(title, [asdict(row) for row in found.rows])
    write_atomic(path, drawn.encode() if path.suffix == ".svg" else png(drawn))


def _print_bench(found: deploy.Bench) -> None:
    told = any(row.joules is not None for row in found.rows)
    headings = ["engine", "batch", "ms", "quartiles", "images/s", "over floor", "of peak", "bytes", "in memory"]
    print_table([*headings, *(["mJ per image"] if told else []), "logit error"], (_shown(r, told) for r in found.rows))
    for engine, settings in dict.fromkeys((row.engine, row.settings) for row in found.rows):
        print(f"{engine}: {settings}")
    for engine, reason in found.left_out.items():
        print(f"{engine}: not timed: {reason}")
    print(f"processor: {found.processor}, one thread, peak {found.peak_gflops:.0f} GFLOP/s measured")
    print("floor: the time that the nonzero products alone would take at this peak")
    if not told:
        print("energy: not available (no readable counter under /sys/class/powercap)")
    print("\n".join(deploy.what_to_ship(found)))


def _shown(row: deploy.BenchRow, told: bool) -> list[str]:
    joules = "–" if row.joules is None else f"{1e3 * row.joules / row.batch:.3g}"
    return [
        row.engine,
        str(row.batch),
        f"{row.milliseconds:.3g}",
        f"{row.low:.3g}–{row.high:.3g}",
        f"{row.images_per_second:,.0f}",
        f"{row.milliseconds / row.floor:.1f}×",
        percent(row.of_peak, 0),
        f"{row.bytes_disk:,}",
        "–" if row.bytes_memory is None else f"{row.bytes_memory:,}",
        *([joules] if told else []),
        f"{row.logit_error:.1e}",
    ]


def run_pick(how: PickOptions, *, as_json: bool) -> None:
    """Choose a network of a study on validation images, report it on test images, and export it."""
    if how.out is not None:
        check_out(how.out, ".sparring")
    _check_values(how.values)
    if math.isnan(how.max_accuracy_drop) or not (how.max_latency is None or how.max_latency > 0):
        raise UserError("--max-accuracy-drop takes a number of points, --max-latency milliseconds above 0")
    choice = pick(how.study, max_latency=how.max_latency, max_accuracy_drop=how.max_accuracy_drop)
    content = read_plan(how.study)
    packed = _packed_choice(how, content, choice)
    if not as_json:
        print(_gain(packed))
    rounded = "" if how.values == "fp32" else f"-{how.values}"
    default = how.study / f"{choice.method}-{choice.sparsity:g}{rounded}.sparring".replace(" ", "-")
    path = deploy.write_program(packed.program, how.out or default, values=how.values)
    shipped = _as_shipped(how.study, content, choice, how.values)
    if as_json:
        print_json({**asdict(choice), "path": str(path), "shipped": shipped})
        return
    _print_choice(choice, shipped, how.values)
    print(f"wrote {path} ({path.stat().st_size} bytes)")


def _packed_choice(how: PickOptions, content: PlanFile, choice: Choice) -> deploy.Packed:
    """Pack the chosen network as an artefact that records its study and cell."""
    model, record = trained(how.study, choice.key, factory=how.model), read_record(how.study, choice.key)
    assert record is not None  # `trained` has built the model from it
    provenance = {
        "study": content.plan["name"],
        "cell": {"method": choice.method, "sparsity": choice.sparsity, "seed": choice.seed},
        "key": choice.key,
        "weights_sha256": None if record.object is None else record.object["sha256"],
        "data": content.dataset["name"],
        "data_hash": record.inputs["data"],
        "sparring": __version__,
    }
    shape, names = tuple(content.dataset["shape"]), content.dataset["classes"] or None
    return deploy.pack(model, shape=shape, values=how.values, class_names=names, provenance=provenance)


def _as_shipped(out: Path, content: PlanFile, choice: Choice, values: str) -> dict[str, float]:
    """Return the study's results for the chosen network's artefact with these values, attacked and certified."""
    who = choice.method, choice.sparsity, choice.seed
    keys = [key for c in content.cells if (c.method, c.sparsity, c.seed) == who for key in c.tasks]
    records = [record for key in keys if (record := read_record(out, key)) is not None]
    kinds = [r for r in records if r.stage == "ship" and r.inputs.get("activations", "fp32") == "fp32"]
    metrics = [r.metrics for r in kinds if r.inputs["values"] == values]
    return {name: value for found in metrics for name, value in found.items() if value is not None}


def _print_choice(choice: Choice, shipped: dict[str, float], values: str) -> None:
    print(
        f"{choice.method} at {percent(choice.sparsity)} (seed {choice.seed}), chosen from {choice.fitting} networks "
        f"within the limits, of {choice.considered}; its validation accuracy drops by "
        f"{choice.accuracy_drop_valid:.2g} points"
    )
    if choice.latency_ms is not None:
        print(f"  {choice.latency_ms:.3g} ms per image, packed in fp32, on the study's machine")
    for name, gain in choice.gains.items():
        print(f"  test, minus the dense control: {name} {gain.estimate:+.4g} [{gain.low:+.4g}, {gain.high:+.4g}]")
    for name, value in shipped.items():
        print(f"  as shipped in {values}: {name} {value:.4g}")
    if not shipped and values != "fp32":
        print(f"  the effect of {values} was not measured; to measure it, add a [[shipped]] table to the plan")
