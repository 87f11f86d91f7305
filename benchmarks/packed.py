"""Attacks and starts of packed networks: `python benchmarks/packed.py [--json] [--weights FILE ...] [--rounds N]`.

Attacks: DDN-100 through the packed network beside the same attack through dense PyTorch, one thread, interleaved, on
LeNets at 98% sparsity: by magnitude in each layer, trained and fine-tuned on mnist-5k, or as `sparring prune` wrote
them (`--weights`). Mean distances and successes are compared before anything is timed. Rows: network, sparsity,
attack, over_torch, mean_distance, mean_distance_torch, seconds. Seconds are those of the processor, here and below,
so that other work on the machine counts less.

Starts: seconds from `load` to the first answer of ResNet-32 at 90%, each in a fresh process, without (`cold`) and with
(`cached`) generated code on disk. Importing sparring and torch is not counted.

Calls: microseconds of one call of LeNet-300-100 at 98% with one image, random masks, in turns: through Python built-ins
(`builtin`) and through ctypes (`ctypes`).

Threads: how many times faster two threads answer 256 images than one, with the same bits, in elapsed time, which
needs two idle cores.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from functools import partial
from pathlib import Path
from unittest import mock

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import torch
from torch import Tensor, nn

from deploy import NETWORKS, sparse_network
from sparring import data, deploy
from sparring.attacks import ddn
from sparring.deploy import interleaved
from sparring.deploy.kernels import _engine
from sparring.models import build, load_model
from sparring.sparsity import magnitude, select
from sparring.train import Recipe, fit

SPARSITY = 0.98
TOLERANCE = 1e-3  # of the mean distance

START = """
import sys, time
import numpy as np
from sparring import deploy
x = np.zeros((1, 3, 32, 32), np.float32)
start = time.process_time()
deploy.load(sys.argv[1])(x)
print(time.process_time() - start)
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", action="store_true", help="print rows as JSON and nothing else")
    parser.add_argument("--weights", nargs="*", type=Path, default=[], help="networks written by sparring prune")
    parser.add_argument("--images", type=int, default=100)
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    digits = data.load("mnist-5k")
    if arguments.weights:
        networks = {path.stem: load_model(path)[0].eval() for path in arguments.weights}
    else:
        networks = {name: pruned(name, digits) for name in ("lenet-300-100", "lenet-5")}
    x, y = digits.test.x[: arguments.images].float() / 255, digits.test.y[: arguments.images]
    rows = [attacked(name, model, x, y, arguments.rounds) for name, model in networks.items()]
    rows += [started(arguments.rounds), called(), threaded(arguments.rounds)]
    if arguments.json:
        json.dump(rows, sys.stdout, indent=1)
        print()
    else:
        for row in rows:
            print(" ".join(f"{key}={value:.5g}" if type(value) is float else str(value) for key, value in row.items()))


def pruned(name: str, digits: data.Dataset) -> nn.Module:
    """Train a network, prune every layer by magnitude, fine-tune it."""
    model = build(name, shape=(1, 28, 28), classes=10, mean=digits.mean, std=digits.std)
    recipe = Recipe(epochs=4, lr=0.05)
    fit(model, digits.train.x, digits.train.y, recipe)
    masks = select(magnitude(model), SPARSITY, scope="layer")
    fit(model, digits.train.x, digits.train.y, recipe, masks=masks)
    return model


def attacked(name: str, model: nn.Module, x: Tensor, y: Tensor, rounds: int) -> dict[str, float | str]:
    """Attack a network through torch and through its packed form, and return a row."""
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    packed = deploy.pack(model, shape=tuple(x.shape[1:]))
    assert packed.has_gradient
    forms = [model, deploy.PackedModule(packed)]
    ddn(forms[1], x[:9], y[:9], steps=1)  # generate the kernels
    distances, successes = [], []
    seconds: list[list[float]] = [[], []]
    for form in forms:
        moved = ddn(form, x, y)
        won = model(moved).argmax(1) != y
        successes.append(int(won.sum()))
        distances.append(float((moved - x).flatten(1).norm(dim=1)[won].mean()))
    assert successes[0] == successes[1], successes
    assert abs(distances[1] - distances[0]) <= TOLERANCE * distances[0], distances
    for _ in range(rounds):
        for form, times in zip(forms, seconds, strict=True):
            start = time.process_time()
            ddn(form, x, y)
            times.append(time.process_time() - start)
    torch_seconds, packed_seconds = (statistics.median(times) for times in seconds)
    weights = [p for p in model.parameters() if p.dim() > 1]
    return {
        "network": name,
        "sparsity": 1 - sum(int(p.count_nonzero()) for p in weights) / sum(p.numel() for p in weights),
        "attack": "ddn-100",
        "over_torch": torch_seconds / packed_seconds,
        "mean_distance": distances[1],
        "mean_distance_torch": distances[0],
        "seconds": packed_seconds,
    }


def started(rounds: int) -> dict[str, float | str]:
    """Return the medians of seconds from `load` to the first answer."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "net.sparring"
        deploy.export(sparse_network(NETWORKS["resnet-32"], 0.9), path, shape=(3, 32, 32))
        colds, cached = list[float](), list[float]()
        for number in range(rounds):
            environment = {**os.environ, "XDG_CACHE_HOME": f"{folder}/cache{number}"}
            for times in (colds, cached):
                command = [sys.executable, "-c", START, str(path)]
                done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
                times.append(float(done.stdout))
    return {"network": "resnet-32", "cold": statistics.median(colds), "cached": statistics.median(cached)}


def called() -> dict[str, float | str]:
    """Return the medians of microseconds of one call on one image, with built-ins and without."""
    model, x = sparse_network(NETWORKS["lenet-300-100"], SPARSITY), np.random.default_rng(0).random((1, 1, 28, 28))
    built = deploy.pack(model, shape=(1, 28, 28))
    image = x.astype(np.float32)
    with mock.patch.multiple(_engine, builtin=lambda *_: None, reader=lambda *_: None):
        plain = deploy.pack(model, shape=(1, 28, 28))
        plain(image), plain(image)
    assert (built(image) == plain(image)).all()
    first, second = interleaved([partial(built, image), partial(plain, image)], rounds=2000, clock=time.thread_time)
    return {"network": "lenet-300-100", "builtin": 1e6 * first.median, "ctypes": 1e6 * second.median}


def threaded(rounds: int) -> dict[str, float | str]:
    """Return how much two threads gain on a large batch."""
    one = deploy.pack(sparse_network(NETWORKS["resnet-32"], 0.9), shape=(3, 32, 32))
    two = deploy.Packed(one.program, threads=2)
    x = torch.rand(256, 3, 32, 32, generator=torch.Generator().manual_seed(0)).numpy()
    assert (one(x) == two(x)).all()
    first, second = interleaved([lambda: one(x), lambda: two(x)], rounds=3 * rounds)
    return {"network": "resnet-32", "batch": 256, "threads": 2, "over_one_thread": first.median / second.median}


if __name__ == "__main__":
    main()
