"""Attacks through torch and through the packed network, side by side: what the "auto" rule of studies rests on.

    python benchmarks/routes.py MODEL.safetensors [--attacks pgd,ddn,...] [--images 100] [--rounds 3] [--json]

Each pair is interleaved on one thread; the verdict is torch's in both. Fails where success differs by more than 2%, or
mean distances by more than 0.5%. Packing is timed apart: a study packs once for each task.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from functools import partial

import torch

from sparring import data, deploy
from sparring.attacks import apgd, ddn, fast, fgsm, nearest, pgd, run
from sparring.data import as_float
from sparring.models import load_model
from sparring.threat import L2, LINF, Threat

BUDGET, SMALLEST = Threat(LINF, 0.1), Threat(L2)
ATTACKS = {
    "fgsm": (fgsm, BUDGET),
    "pgd": (partial(pgd, steps=40), BUDGET),
    "apgd": (apgd, BUDGET),
    "fast": (fast, BUDGET),
    "ddn": (partial(ddn, steps=100), SMALLEST),
    "nearest": (nearest, SMALLEST),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("--data", default="mnist-5k")
    parser.add_argument("--attacks", default=",".join(ATTACKS))
    parser.add_argument("--images", type=int, default=100)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", action="store_true", help="print rows as JSON")
    options = parser.parse_args()
    torch.set_num_threads(1)
    model, blueprint, _ = load_model(options.model)
    test = data.load(options.data).test
    x, y = as_float(test.x[: options.images]), test.y[: options.images]
    began = time.perf_counter()
    through = deploy.PackedModule(deploy.pack(model, shape=blueprint.shape))
    through(x)
    packing = time.perf_counter() - began
    rows = []
    for name in options.attacks.split(","):
        attack, threat = ATTACKS[name]
        times: dict[str, list[float]] = {"torch": [], "packed": []}
        found = {}
        for _ in range(options.rounds):
            for route, network in (("torch", None), ("packed", through)):
                began = time.perf_counter()
                found[route] = run(model, x, y, attack, threat, through=network, batch_size=500)
                times[route].append(time.perf_counter() - began)
        success = [float(found[route].success.double().mean()) for route in times]
        reached = [found[route].distance[torch.isfinite(found[route].distance)].mean() for route in times]
        if abs(success[0] - success[1]) > 0.02 or abs(reached[0] / reached[1] - 1) > 5e-3:
            sys.exit(f"{name}: the routes disagree: success {success}, distance {reached}")
        seconds = {route: statistics.median(values) for route, values in times.items()}
        rows.append({"attack": name, **seconds, "ratio": seconds["torch"] / seconds["packed"], "packing": packing})
        if not options.json:
            print(
                f"{name:10s} torch {seconds['torch']:.3f} s, packed {seconds['packed']:.3f} s: {rows[-1]['ratio']:.2f}"
            )
    print(json.dumps(rows, indent=1) if options.json else f"packing took {packing:.2f} s")


if __name__ == "__main__":
    main()
