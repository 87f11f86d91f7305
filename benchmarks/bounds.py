"""CROWN's speed: `python benchmarks/bounds.py [--json] [--images N] [--rounds N] [--threads N] [--cnn N]`.

LeNet-300-100 with random weights of the usual size, dense and under random masks, linf at eps 0.01, all nine margins
of every image. Each network is bounded twice: with products that skip its zeros wherever a layer has few nonzero
weights (the sparse path, which is what `margin` does), and with dense products alone. Before anything is timed, margins
are held against sampled points, and the two paths against each other. Rounds are interleaved, so that whatever else the
machine does falls on all. Rows: sparsity; images_per_second (median of wall times, building the graph counted);
images_per_core_second (of processor times: what a busy machine leaves comparable); sparse_over_dense_path (processor
time of the dense path over the sparse one's, for the same network); over_dense_network.

With `--cnn N`, N random images of 32×32 and a CNN of 122,000 random weights alone, on one thread: the median processor
time of all margins at eps 1/255 and of a certified radius, and the radius over that of the full search (tolerance 1%),
median and least.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import time

import torch
from torch import Tensor, nn

from sparring.bounds import margin, radius
from sparring.bounds._network import compacted, others, prepare
from sparring.bounds.certify._certificates import margins_over
from sparring.models import build
from sparring.threat import Threat

SPARSITIES = (0.0, 0.9, 0.95, 0.98, 0.99)
EPS = 0.01
THREAT = Threat(math.inf, EPS)


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
    assert (bound - crown(model, x, y, sparse=False)).abs().max() < 1e-9, "the two paths differ"


def crown(model: nn.Module, x: Tensor, y: Tensor, *, sparse: bool) -> Tensor:
    """Bound all margins by the path that skips zeros or by the dense one."""
    graph, pixels = prepare(model, tuple(x.shape[1:]), sparse=sparse), x
    if sparse:
        graph, pixels = compacted(graph, x)
    return margins_over(graph, pixels, y, THREAT.norm, torch.full((len(x),), EPS, dtype=torch.float64), "crown")


def convolutional(images: int) -> dict[str, float]:
    """Bound padded convolutions with maxima and means between them: see the module's docstring."""
    torch.manual_seed(0)
    body = (nn.Conv2d(3, 32, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(32, 64, 3, padding=1), nn.ReLU())
    rest = (nn.AvgPool2d(2), nn.Conv2d(64, 64, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten())
    model = nn.Sequential(*body, *rest, nn.Linear(1024, 64), nn.ReLU(), nn.Linear(64, 10)).eval()
    x = torch.rand(images, 3, 32, 32)
    y = model(x).argmax(1)
    spent: dict[str, list[float]] = {"margin": [], "radius": []}
    found = []
    for one in (slice(i, i + 1) for i in range(images)):
        begin = time.process_time()
        margin(model, x[one], y[one], Threat(math.inf, 1 / 255))
        between = time.process_time()
        found.append(radius(model, x[one], y[one], math.inf))
        spent["margin"].append(between - begin)
        spent["radius"].append(time.process_time() - between)
    shares = torch.cat(found) / radius(model, x, y, math.inf, tolerance=0.01)
    seconds = {f"{name}_seconds": round(statistics.median(times), 2) for name, times in spent.items()}
    return seconds | {"over_full": round(float(shares.median()), 3), "least_over_full": round(float(shares.min()), 3)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--images", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--cnn", type=int, default=0)
    options = parser.parse_args()
    if options.cnn:
        torch.set_num_threads(1)
        print(json.dumps(convolutional(options.cnn)))
        return
    torch.set_num_threads(options.threads)
    x = torch.rand(options.images, 1, 28, 28, generator=torch.Generator().manual_seed(1))
    models = [masked(sparsity) for sparsity in SPARSITIES]
    with torch.no_grad():
        labels = [model(x).argmax(1) for model in models]
        for model, y in zip(models, labels, strict=True):
            check(model, x[:8], y[:8])
    spent: dict[tuple[float, bool], list[tuple[float, float]]] = {}
    for _ in range(options.rounds):
        for sparsity, model, y in zip(SPARSITIES, models, labels, strict=True):
            for sparse in (True, False):
                begin, began = time.perf_counter(), time.process_time()
                crown(model, x, y, sparse=sparse)
                taken = time.perf_counter() - begin, time.process_time() - began
                spent.setdefault((sparsity, sparse), []).append(taken)
    wall, processor = ({key: statistics.median(t[i] for t in times) for key, times in spent.items()} for i in (0, 1))
    rows = [
        {
            "sparsity": sparsity,
            "images_per_second": round(options.images / wall[sparsity, True], 1),
            "images_per_core_second": round(options.images / processor[sparsity, True], 1),
            "sparse_over_dense_path": round(processor[sparsity, False] / processor[sparsity, True], 2),
            "over_dense_network": round(processor[0.0, True] / processor[sparsity, True], 2),
        }
        for sparsity in SPARSITIES
    ]
    if options.json:
        print(json.dumps(rows, indent=2))
        return
    for row in rows:
        print("  ".join(f"{name} {value}" for name, value in row.items()))


if __name__ == "__main__":
    main()
