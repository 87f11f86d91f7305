"""Attacks through torch and through the packed network, side by side: what the "auto" rule of studies rests on.

    python benchmarks/routes.py MODEL.safetensors [--attacks pgd,ddn,...] [--data D] [--eps 0.1] [--images 100]

Each pair is interleaved on one thread, in seconds of the processor; the verdict is torch's in both. Fails where the
routes differ by more than the rounding of sums explains (see `disagreement`). Packing is timed
apart: a study packs once for each task.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from functools import partial

import torch
from scipy.stats import binomtest

from sparring import data, deploy
from sparring.attacks import Attack, AttackResult, apgd, cw, ddn, deepfool, fab, fast, fgsm, nearest, pgd, run, standard
from sparring.data import as_float
from sparring.models import load_model
from sparring.threat import L2, LINF, Threat

BUDGET: dict[str, Attack] = {
    "fgsm": fgsm,
    "pgd": partial(pgd, steps=40),
    "apgd": apgd,
    "fast": fast,
    "standard": standard,
}
SMALLEST: dict[str, Attack] = {
    "deepfool": deepfool,
    "fab": fab,
    "cw": cw,
    "ddn": partial(ddn, steps=100),
    "nearest": nearest,
}
ROUTES = ("torch", "packed")
FEW = 0.05  # of the images
SAME = 5e-3  # of the mean distance
CHANCE = 0.01


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("--data", default="mnist-5k")
    parser.add_argument("--attacks", default=",".join((*BUDGET, *SMALLEST)))
    parser.add_argument("--eps", type=float, default=0.1, help="the linf budget of attacks that have one")
    parser.add_argument("--images", type=int, default=100)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", action="store_true", help="print rows as JSON")
    options = parser.parse_args()
    torch.set_num_threads(1)
    model, blueprint, _ = load_model(options.model)
    test = data.load(options.data).test
    x, y = as_float(test.x[: options.images]), test.y[: options.images]
    began = time.process_time()
    through = deploy.PackedModule(deploy.pack(model, shape=blueprint.shape))
    through(x)
    packing = time.process_time() - began
    rows = []
    for name in options.attacks.split(","):
        attack, threat = (BUDGET | SMALLEST)[name], Threat(LINF, options.eps) if name in BUDGET else Threat(L2)
        times: dict[str, list[float]] = {route: [] for route in ROUTES}
        found = {}
        for _ in range(options.rounds):
            for route, network in zip(ROUTES, (None, through), strict=True):
                began = time.process_time()
                found[route] = run(model, x, y, attack, threat, through=network, batch_size=500)
                times[route].append(time.process_time() - began)
        fault = disagreement(found["torch"], found["packed"], smallest=threat.eps is None)
        if fault is not None:
            sys.exit(f"{name}: the routes disagree: {fault}")
        seconds = {route: statistics.median(values) for route, values in times.items()}
        alone = [int((found[a].success & ~found[b].success).sum()) for a, b in (ROUTES, ROUTES[::-1])]
        ratio = seconds["torch"] / seconds["packed"]
        rows.append({"attack": name, **seconds, "ratio": ratio, "broken_by_one": alone, "packing": packing})
        if not options.json:
            print(
                f"{name:10s} torch {seconds['torch']:.3f} s, packed {seconds['packed']:.3f} s: {ratio:.2f}; "
                f"images that one route alone broke: {alone[0]} and {alone[1]}"
            )
    print(json.dumps(rows, indent=1) if options.json else f"packing took {packing:.2f} s")


def disagreement(one: AttackResult, other: AttackResult, *, smallest: bool) -> str | None:
    """Say how two routes' results differ by more than the rounding of sums explains, or None.

    The routes add in different orders. Where an entry of a gradient is about zero, the last bit decides its sign, and
    a signed step goes elsewhere from there on: images near the edge of the budget then fall by one route and not by
    the other. They must be few, and not one route's more often than chance makes them (a sign test). Mean distances
    must agree on the images that both broke, if the attack looks for the smallest; within a budget all are as good.
    """
    both = one.success & other.success
    alone = int((one.success & ~both).sum()), int((other.success & ~both).sum())
    if sum(alone) > FEW * len(both):
        return f"of {len(both)} images {alone[0]} and {alone[1]} were broken by one alone"
    if sum(alone) and binomtest(alone[0], sum(alone)).pvalue < CHANCE:
        return f"{alone[0]} images were broken by the first alone, {alone[1]} by the second: no chance"
    reached = [float(result.distance[both].mean()) for result in (one, other)]
    if smallest and not abs(reached[0] / reached[1] - 1) <= SAME:
        return f"mean distances {reached[0]:.5g} and {reached[1]:.5g}"
    return None


if __name__ == "__main__":
    main()
