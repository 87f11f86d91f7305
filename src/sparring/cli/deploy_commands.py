"""`sparring export`, `bench` and `pick`: the artefact to ship, and what shipping it costs and brings."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from .. import attacks, deploy
from ..data import Dataset, as_float
from ..errors import UserError
from ..files import read_json
from ..models import build, load_weights_
from ..report import pick
from ..study import Store
from ..study.networks import WEIGHTS, chosen_images
from ..threat import LINF, Threat
from .loading import open_data
from .model_commands import open_model

__all__ = ["run_bench", "run_export", "run_pick"]


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
    dataset = open_data(data_name, data_dir, download)
    model, _ = open_model(name, weights, dataset)
    shape = tuple(dataset.test.x.shape[1:])
    if to == "onnx":
        path = deploy.to_onnx(model, out, shape=shape)
        print(f"wrote {path} ({path.stat().st_size} bytes)")
        return 0
    if to != "packed":
        raise UserError(f"--to takes packed or onnx, not '{to}'")
    path = deploy.export(model, out, shape=shape, values=values, class_names=dataset.class_names or None)
    dense = 4 * sum(p.numel() for p in model.parameters())
    print(f"wrote {path}: {path.stat().st_size} bytes, {dense / path.stat().st_size:.1f} times smaller than float32")
    _print_cost(model, path, dataset, eps, images)
    return 0


def _print_cost(model: nn.Module, path: Path, dataset: Dataset, eps: float, images: int) -> None:
    """Attack the model and the artefact, and say what shipping costs in accuracy and robustness."""
    x, y = chosen_images(dataset, "test", 0, images)

    def attack(network: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        generator = torch.Generator().manual_seed(0)
        return attacks.run(network, x, y, attacks.pgd, Threat(LINF, eps), generator=generator).x_adv

    found = deploy.compare_shipped(model, deploy.load(path), as_float(x), y, attack)
    print(f"predictions agree on {found.agreement:.2%} of {len(y)} images", end="; ")
    print(f"accuracy {found.accuracy_model:.2%} → {found.accuracy_packed:.2%}")
    print(
        f"standing under PGD (l_inf, eps {eps:g}): the model {found.robust_model:.2%}; on the artefact "
        f"{found.robust_packed:.2%} when attacked itself, {found.robust_transfer:.2%} under the model's examples"
    )


def run_bench(
    name: str,
    weights: Path | None,
    data_name: str,
    batches: str,
    rounds: int,
    small: str | None,
    data_dir: Path | None,
    download: bool,
    *,
    as_json: bool,
) -> int:
    """Time a model, packed and in every engine that is installed, side by side on one core."""
    try:
        sizes = tuple(int(part) for part in batches.split(",") if part.strip())
    except ValueError:
        raise UserError(f"--batches takes whole numbers separated by commas, as 1,64; not '{batches}'") from None
    dataset = open_data(data_name, data_dir, download)
    model, _ = open_model(name, weights, dataset)
    rival = None if small is None else open_model(small, None, dataset)[0]
    rows = deploy.bench(model, shape=tuple(dataset.test.x.shape[1:]), batches=sizes, rounds=rounds, small=rival)
    if as_json:
        print(json.dumps([asdict(row) for row in rows], indent=1))
        return 0
    table = Table(box=None, header_style="bold")
    for heading in ("engine", "batch", "ms", "quartiles", "images/s", "over floor", "bytes", "logit error"):
        table.add_column(heading, justify="left" if heading == "engine" else "right")
    for row in rows:
        table.add_row(
            row.engine,
            str(row.batch),
            f"{row.milliseconds:.3g}",
            f"{row.low:.3g}–{row.high:.3g}",
            f"{row.images_per_second:,.0f}",
            f"{row.milliseconds / row.floor:.1f}×",
            f"{row.bytes_disk:,}",
            f"{row.logit_error:.1e}",
        )
    Console(width=None if sys.stdout.isatty() else 130).print(table)
    return 0


def run_pick(
    out: Path, to: Path | None, max_latency: float | None, max_accuracy_drop: float, values: str, *, as_json: bool
) -> int:
    """Choose a network of a study on validation images, report it on test images, and export it."""
    choice = pick(out, max_latency=max_latency, max_accuracy_drop=max_accuracy_drop)
    path = to or out / f"{choice.method}-{choice.sparsity:g}.sparring".replace(" ", "-")
    model, shape = _network(out, choice.key)
    provenance = {"study": str(out), "method": choice.method, "sparsity": choice.sparsity, "seed": choice.seed}
    deploy.export(model, path, shape=shape, values=values, provenance={**provenance, "key": choice.key})
    if as_json:
        print(json.dumps({**asdict(choice), "path": str(path)}, indent=1))
        return 0
    print(
        f"{choice.method} at {choice.sparsity:.1%} (seed {choice.seed}), of {choice.fitting} that fit out of "
        f"{choice.considered}; chosen on validation images, where it loses {choice.accuracy_drop_valid:.2g} points"
    )
    for name, gain in choice.gains.items():
        print(f"  test, over the dense control: {name} {gain.estimate:+.4g} [{gain.low:+.4g}, {gain.high:+.4g}]")
    print(f"wrote {path} ({path.stat().st_size} bytes)")
    return 0


def _network(out: Path, key: str) -> tuple[nn.Module, tuple[int, ...]]:
    """Rebuild a study's network from its folder alone; normalisation is among its weights."""
    facts = read_json(out / "plan.json")["dataset"]
    record = Store(out).read(key)
    if record is None:
        raise UserError(f"{out} no longer holds {key}; run the study again")
    if ":" in record.inputs["model"]["name"]:
        raise UserError("the study's model is your own code; export it with: sparring export package.module:factory")
    shape = tuple(facts["shape"])
    ones = (1.0,) * shape[0]
    options: dict[str, Any] = {k: tuple(v) if k == "widths" else v for k, v in record.inputs["model"].items()}
    model = build(options.pop("name"), shape=shape, classes=facts["class_count"], mean=ones, std=ones, **options)
    tensors = Store(out).tensors(key)
    load_weights_(model, {k.removeprefix(WEIGHTS): v for k, v in tensors.items() if k.startswith(WEIGHTS)})
    return model.eval(), shape
