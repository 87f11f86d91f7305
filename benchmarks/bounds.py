"""CROWN's speed: `python benchmarks/bounds.py [--json] [--images N] [--rounds N] [--threads N]`.

LeNet-300-100 with random weights of the usual size, dense and under random masks, l_inf at eps 0.01, all nine margins
of every image. Before anything is timed, margins are held against sampled points. Rounds are interleaved, so that
whatever else the machine does falls on all. Rows: sparsity, images_per_second (median of wall times),
images_per_core_second (of processor times: what a busy machine leaves comparable), over_dense (dense processor time
over this). All come from the same code: units that are dead in a whole batch leave the products.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import time

import torch
from torch import Tensor, nn

from sparring.bounds import margin
from sparring.bounds.network import others
from sparring.models import build
from sparring.threat import Threat

SPARSITIES = (0.0, 0.9, 0.95, 0.98, 0.99)
THREAT = Threat(math.inf, 0.01)


def masked(sparsity: float) -> nn.Module:
    """Build the network and drop weights at random."""
    model = build("lenet-300-100", shape=(1, 28, 28), classes=10, mean=(0.13,), std=(0.31,)).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(torch.rand(parameter.shape, generator=generator) >= sparsity)
    return model


def check(model: nn.Module, x: Tensor, y: Tensor) -> None:
    """Stop if any of many perturbed images has a smaller margin than its bound."""
    bound = margin(model, x, y, THREAT)
    generator = torch.Generator().manual_seed(0)
    for _ in range(50):
        step = torch.rand(x.shape, generator=generator).round() * 2 - 1
        logits = model((x + 0.01 * step).clamp(0, 1)).double()
        gaps = logits.gather(1, y[:, None]) - logits.gather(1, others(y, 10))
        assert (bound <= gaps + 1e-5).all(), "a bound is beaten"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--images", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    x = torch.rand(options.images, 1, 28, 28, generator=torch.Generator().manual_seed(1))
    models = [masked(sparsity) for sparsity in SPARSITIES]
    with torch.no_grad():
        labels = [model(x).argmax(1) for model in models]
        for model, y in zip(models, labels, strict=True):
            check(model, x[:8], y[:8])
    times: list[list[tuple[float, float]]] = [[] for _ in models]
    for _ in range(options.rounds):
        for spent, model, y in zip(times, models, labels, strict=True):
            wall, processor = time.perf_counter(), time.process_time()
            margin(model, x, y, THREAT)
            spent.append((time.perf_counter() - wall, time.process_time() - processor))
    medians = [tuple(statistics.median(column) for column in zip(*spent, strict=True)) for spent in times]
    rows = [
        {
            "sparsity": sparsity,
            "images_per_second": round(options.images / wall, 1),
            "images_per_core_second": round(options.images / processor, 1),
            "over_dense": round(medians[0][1] / processor, 2),
        }
        for sparsity, (wall, processor) in zip(SPARSITIES, medians, strict=True)
    ]
    if options.json:
        print(json.dumps(rows, indent=2))
        return
    for row in rows:
        print("  ".join(f"{name} {value}" for name, value in row.items()))


if __name__ == "__main__":
    main()
