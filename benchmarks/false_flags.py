"""Honestly trained networks under every attack and check: how many raise a false alarm.

    python benchmarks/false_flags.py [--json] [--networks 54] [--first-seed 0] [--images 100]
        [--study out/paper-lenet-300-100 --studied 54 --data-dir DIR] [--keep DIR] [--seconds 170]

Small networks on the 8×8 digits, in equal parts plain, pruned and adversarially trained, fully connected and
convolutional with batch normalisation, a third of them cast to float16 and bfloat16 besides; and, with --study,
networks that a study has trained on real images: its references, controls and those of every pruning method at every
sparsity, evenly picked. Each is attacked by FGSM, PGD, `fast` (linf) and by `nearest` and DeepFool (l2), then checked
for convergence, order, losses, silent successes, and for half and unlimited budgets. At most 1% of the networks may
raise a false flag. `unfinished-search` is shown but not counted: where the attack found nothing for an image, it says
no more than that.

With --keep each network's row is written to a file; --seconds ends a run early, and the next one resumes.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from sparring import data, models
from sparring.attacks import (
    Attack,
    Flag,
    check_budgets,
    check_convergence,
    check_order,
    check_silence,
    check_unlimited,
    deepfool,
    fast,
    fgsm,
    nearest,
    pgd,
    robust_accuracy,
    run,
)
from sparring.files import write_json
from sparring.records import Record, Store, read_plan
from sparring.study import Context
from sparring.study.stages._inputs import Inputs, Network
from sparring.study.stages._networks import chosen_images, network_of
from sparring.threat import L2, LINF, Threat

EPS = 0.1
HALVES = (torch.float16, torch.bfloat16)
KINDS = ("plain", "pruned", "adversarial")
BUDGET: dict[str, Attack] = {"fgsm": fgsm, "pgd": pgd, "fast": fast}
MINIMUM_NORM: dict[str, Attack] = {"nearest": nearest, "deepfool": deepfool}


@dataclass(frozen=True)
class Subject:
    """An honest network: its name, how it was trained, and what makes it together with images and labels."""

    name: str
    training: str
    make: Callable[[int], tuple[nn.Module, Tensor, Tensor]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--networks", type=int, default=54, help="how many small ones are trained")
    parser.add_argument("--first-seed", type=int, default=0)
    parser.add_argument("--images", type=int, default=100)
    parser.add_argument("--study", type=Path, help="a study's folder")
    parser.add_argument("--studied", type=int, default=54, help="how many of its networks")
    parser.add_argument("--data-dir", type=Path, help="where the study's data are")
    parser.add_argument("--keep", type=Path, help="a folder for the rows")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="begin no other network after that")
    options = parser.parse_args()
    torch.set_num_threads(1)
    seeds = range(options.first_seed, options.first_seed + options.networks)
    subjects = [small(seed) for seed in seeds] + [
        small(seed, kind) for seed in seeds[: len(seeds) // 3] for kind in HALVES
    ]
    if options.study:
        subjects += studied(options.study, options.studied, options.data_dir)
    start, rows = time.monotonic(), []
    for subject in subjects:
        kept = options.keep / f"{subject.name}.json" if options.keep else None
        if kept and kept.exists():
            rows.append(json.loads(kept.read_text()))
        elif time.monotonic() - start < options.seconds:
            rows.append(examine(subject, options.images))
            if kept:
                write_json(kept, rows[-1])
            if not options.json:
                print(rows[-1], flush=True)
    report(rows, len(subjects), as_json=options.json)


def report(rows: list[dict[str, object]], wanted: int, *, as_json: bool) -> None:
    """Print what was found, and fail where more than 1% of all networks raised a false flag."""
    flagged = sum(bool(row["false"]) for row in rows)
    if as_json:
        print(json.dumps({"networks": len(rows), "flagged": flagged, "rows": rows}, indent=1))
    else:
        for kind in sorted({str(row["training"]) for row in rows}):
            alike = [row for row in rows if row["training"] == kind]
            print(f"{kind}: {sum(bool(row['false']) for row in alike)} of {len(alike)}")
        print(f"{flagged} of {len(rows)} networks raised a false flag; {wanted - len(rows)} are still to be examined")
    if len(rows) == wanted and flagged > 0.01 * len(rows):
        raise SystemExit(f"{flagged} of {len(rows)} honest networks raised a false flag; 1% is the limit")


def examine(subject: Subject, images: int) -> dict[str, object]:
    """Return one row: what was trained, its robust accuracies and the flags that it raised."""
    model, x, y = subject.make(images)
    robust, flags = judge(model.eval(), x, y)
    false = [flag for flag in flags if "unfinished-search" not in flag]
    row: dict[str, object] = {"network": subject.name, "training": subject.training, "robust": robust, "flags": flags}
    return row | {"false": false}


def studied(folder: Path, count: int, root: Path | None) -> Iterator[Subject]:
    """Yield networks of a study, evenly picked from all of its cells."""
    document, store = read_plan(folder), Store(folder)
    dataset = data.load(document.plan["data"], root)
    found = {}
    for cell in document.cells:
        for key in cell.tasks:
            record = store.peek(key)
            # A cell's last training is its own; those before it are what it began from.
            if record is not None and record.stage in ("train", "prune") and record.error is None:
                found[cell.method, cell.sparsity, cell.seed] = record
    places = sorted(found, key=str)
    for method, level, seed in places[:: max(len(places) // count, 1)][:count]:
        record = found[method, level, seed]

        def make(images: int, record: Record = record) -> tuple[nn.Module, Tensor, Tensor]:
            inputs = Inputs(data=record.inputs["data"], model=Network(**record.inputs["model"]))
            network = network_of(Context(dataset, store.tensors), inputs, record.key).eval()
            x, y = chosen_images(dataset, "test", 0, images)
            return network, data.as_float(x), y

        yield Subject(f"{method}-{level}-{seed}", method, make)


def small(seed: int, precision: torch.dtype = torch.float32) -> Subject:
    """Return a network on the digits, trained in single precision; the seed determines which of six kinds."""
    kind, shape = KINDS[seed % 3], "dense" if seed // 3 % 2 else "convolutional"

    def make(images: int) -> tuple[nn.Module, Tensor, Tensor]:
        dataset = data.load("digits")
        torch.manual_seed(seed)
        model = network(shape, dataset)
        train(model, data.as_float(dataset.train.x), dataset.train.y, kind)
        return model.to(precision), data.as_float(dataset.test.x)[:images], dataset.test.y[:images]

    name = f"digits-{shape}-{seed}"
    if precision == torch.float32:
        return Subject(name, kind, make)
    short = str(precision).removeprefix("torch.")
    return Subject(f"{name}-{short}", short, make)


def network(shape: str, dataset: data.Dataset) -> nn.Module:
    if shape == "dense":
        return models.build("lenet-300-100", shape=(1, 8, 8), classes=10, mean=dataset.mean, std=dataset.std)
    head = (nn.MaxPool2d(2), nn.Flatten(), nn.Linear(256, 10))
    return nn.Sequential(nn.Conv2d(1, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(), *head)


def train(model: nn.Module, x: Tensor, y: Tensor, kind: str, *, epochs: int = 12) -> None:
    """Train with Adam; "pruned" drops 90% of each layer half-way, "adversarial" trains on PGD's points."""
    optimiser = torch.optim.Adam(model.parameters(), 2e-3)
    weights = [p for p in model.parameters() if p.dim() > 1]
    masks: list[Tensor] = []
    for epoch in range(epochs):
        if kind == "pruned" and epoch == epochs // 2:
            masks = [w.detach().abs() > w.detach().abs().quantile(0.9) for w in weights]
        for rows in torch.randperm(len(x)).split(128):
            batch = x[rows]
            if kind == "adversarial":
                model.eval()
                batch = pgd(model, batch, y[rows], eps=EPS, steps=4, step_size=EPS / 2, stop_early=False)
            model.train()
            optimiser.zero_grad()
            nn.functional.cross_entropy(model(batch), y[rows]).backward()
            optimiser.step()
            with torch.no_grad():
                for weight, mask in zip(weights, masks, strict=False):
                    weight.mul_(mask)


def judge(model: nn.Module, x: Tensor, y: Tensor) -> tuple[dict[str, float], list[str]]:
    """Return the robust accuracies and every flag of every attack and check, as "where: flag (detail)"."""
    generator = torch.Generator().manual_seed(0)
    threat = Threat(LINF, EPS)
    results = {name: run(model, x, y, attack, threat, generator=generator) for name, attack in BUDGET.items()}
    found: dict[str, tuple[Flag, ...]] = {name: result.flags for name, result in results.items()}
    for name, attack in MINIMUM_NORM.items():
        result = run(model, x, y, attack, Threat(L2), generator=generator)
        found[name] = result.flags
        found[f"convergence of {name}"] = check_convergence(
            model, x, y, attack, Threat(L2), result, generator=generator
        )
    for name, result in results.items():
        found[f"silence of {name}"] = check_silence(
            model, x, y, BUDGET[name], threat, result, images=4, generator=generator
        )
    found |= {f"order of {name}": flags for name, flags in check_order(results).items()}
    half = run(model, x, y, pgd, Threat(LINF, EPS / 2), generator=generator)
    for eps, flags in check_budgets({EPS / 2: half, EPS: results["pgd"]}).items():
        found[f"budget {eps:g}"] = flags
    found["convergence"] = check_convergence(model, x, y, pgd, threat, results["pgd"], generator=generator)
    found["unlimited"] = check_unlimited(model, x, y, pgd, generator=generator)
    listed = [f"{place}: {flag.name} ({flag.detail})" for place, flags in found.items() for flag in flags]
    return {name: round(robust_accuracy(result), 4) for name, result in results.items()}, listed


if __name__ == "__main__":
    main()
