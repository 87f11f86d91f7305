"""Time the preset `quick` against the script a user would otherwise write: torch.nn.utils.prune and foolbox.

    python benchmarks/study.py [--json] [--seeds N]

Both do the same work: LeNet-300-100 on mnist-5k, dense training, a dense control and six sparsities with gradual global
magnitude pruning, FGSM at three budgets, PGD-40 and DeepFool-50 on 1,000 test images each. The script runs on as many
threads as PyTorch likes. Before any time is compared, the two must agree: accuracies within two points at each
sparsity. foolbox (pip install 'sparring[peers]') is needed for the script; without it only sparring is timed.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import math
import tempfile
import time
from collections import defaultdict
from functools import partial
from pathlib import Path

import torch
from torch import nn
from torch.nn.utils import prune

from sparring import data, report
from sparring.data import Dataset, as_float
from sparring.models import build
from sparring.study import Plan, run

Rows = dict[float, list[float]]


def sparring_way(plan: Plan, dataset: Dataset) -> tuple[float, Rows]:
    """Run the study and its report; return seconds and test accuracies by sparsity (0 is the control)."""
    with tempfile.TemporaryDirectory() as folder:
        began = time.perf_counter()
        records = run(plan, folder, dataset=dataset)
        report.write(Path(folder))
        seconds = time.perf_counter() - began
    sparsity_of = {r.key: r.inputs["sparsity"] for r in records if r.stage == "prune"}
    rows: Rows = defaultdict(list)
    for record in records:
        if record.stage == "measure" and record.inputs["parents"][0] in sparsity_of:
            rows[sparsity_of[record.inputs["parents"][0]]].append(record.metrics["accuracy"] or 0.0)
    return seconds, rows


def train(model: nn.Module, dataset: Dataset, plan: Plan, *, epochs: int, lr: float, sparsity: float = 0.0) -> None:
    """Train, and prune gradually by global magnitude over the first 80% of the epochs."""
    x, y = as_float(dataset.train.x), dataset.train.y
    recipe = plan.recipe
    optimizer = torch.optim.SGD(model.parameters(), lr=lr, momentum=recipe.momentum, weight_decay=recipe.weight_decay)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs)
    layers = [(m, "weight") for m in model.modules() if isinstance(m, nn.Linear)]
    removed = 0.0
    for epoch in range(epochs):
        if sparsity:
            progress = min(1.0, (epoch + 1) / (0.8 * epochs))
            target = sparsity * (1 - (1 - progress) ** 3)
            if target > removed:
                prune.global_unstructured(
                    layers, pruning_method=prune.L1Unstructured, amount=(target - removed) / (1 - removed)
                )
                removed = target
        model.train()
        for chosen in torch.randperm(len(x)).split(recipe.batch_size):
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(x[chosen]), y[chosen]).backward()
            optimizer.step()
        schedule.step()
    model.eval()


def by_hand(plan: Plan, dataset: Dataset) -> tuple[float, Rows]:
    """Do the same work with torch.nn.utils.prune and foolbox."""
    import foolbox as fb

    began = time.perf_counter()
    rows: Rows = defaultdict(list)
    x, y = as_float(dataset.test.x), dataset.test.y
    for seed in range(plan.seeds):
        torch.manual_seed(seed)
        built = partial(build, "lenet-300-100", shape=(1, 28, 28), classes=10, mean=dataset.mean, std=dataset.std)
        dense = built(seed=seed)
        train(dense, dataset, plan, epochs=plan.recipe.epochs, lr=plan.recipe.lr)
        networks: list[tuple[float | None, nn.Module]] = [(None, dense)]
        for level in (0.0, *plan.sparsities):
            model = built()
            model.load_state_dict(dense.state_dict())
            train(model, dataset, plan, epochs=plan.finetune.epochs, lr=plan.finetune.lr, sparsity=level)
            networks.append((level, model))
        for sparsity, model in networks:
            victim = fb.PyTorchModel(model, bounds=(0, 1), device="cpu")
            for eps in (0.05, 0.1, 0.2):
                fb.attacks.FGSM()(victim, x, y, epsilons=eps)
            fb.attacks.LinfPGD(steps=40)(victim, x, y, epsilons=0.1)
            fb.attacks.L2DeepFoolAttack(steps=50, candidates=10)(victim, x, y, epsilons=None)
            if sparsity is not None:
                with torch.no_grad():
                    rows[sparsity].append(float((model(x).argmax(1) == y).float().mean()))
    return time.perf_counter() - began, rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--seeds", type=int, default=3)
    options = parser.parse_args()
    plan = Plan.load("quick", [f"seeds={options.seeds}"])
    dataset = data.load(plan.data)
    seconds, rows = sparring_way(plan, dataset)
    result: dict[str, float | None] = {"sparring_seconds": seconds, "by_hand_seconds": None, "ratio": None}
    if importlib.util.find_spec("foolbox"):
        hand, hand_rows = by_hand(plan, dataset)
        for sparsity, found in hand_rows.items():
            ours = rows[sparsity]
            gap = sum(ours) / len(ours) - sum(found) / len(found)
            if math.isnan(gap) or gap < -0.02:
                raise SystemExit(f"at sparsity {sparsity} the study's accuracy is {-gap:.1%} below the script's")
        result |= {"by_hand_seconds": hand, "ratio": hand / seconds}
    if options.json:
        print(json.dumps(result))
    else:
        print(f"sparring study quick, report included: {seconds:.1f} s")
        if result["ratio"] is None:
            print("foolbox is not installed: nothing to compare with (pip install 'sparring[peers]')")
        else:
            print(
                f"torch.nn.utils.prune and foolbox by hand: {result['by_hand_seconds']:.1f} s ({result['ratio']:.1f}×)"
            )


if __name__ == "__main__":
    main()
