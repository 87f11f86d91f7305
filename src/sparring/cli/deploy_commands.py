"""`sparring export` and `pick`: the artefact to ship, and what shipping it costs."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import nn

from .. import attacks, deploy
from ..data import Dataset, as_float
from ..errors import UserError
from ..files import read_json
from ..metrics import accuracy, robust_accuracy
from ..models import build, load_weights_
from ..report import pick
from ..study import Store
from ..study.networks import WEIGHTS, chosen_images
from ..threat import LINF, Threat
from ..train import predict
from .loading import open_data
from .model_commands import open_model

__all__ = ["run_export", "run_pick"]


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
    """Hold the artefact against the model: predictions, accuracy, and attacks made on the model, tried on it."""
    packed = deploy.load(path)
    x, y = chosen_images(dataset, "test", 0, images)
    clean, ours = packed(as_float(x)), predict(model, x)
    agree = float((clean.argmax(1) == ours.argmax(1)).double().mean())
    print(f"predictions agree on {agree:.2%} of {len(y)} images; ", end="")
    print(f"accuracy {accuracy(ours, y):.2%} → {accuracy(clean, y):.2%}")
    generator = torch.Generator().manual_seed(0)
    result = attacks.run(model, as_float(x), y, attacks.ATTACKS["pgd"], Threat(LINF, eps), generator=generator)
    right = clean.argmax(1) == y
    fooled = packed(result.x_adv).argmax(1) != y
    before, after = robust_accuracy(result.clean_correct, result.success), robust_accuracy(right, fooled)
    print(f"standing under PGD (l_inf, eps {eps:g}, made on the model): {before:.2%} → {after:.2%} on the artefact")


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
