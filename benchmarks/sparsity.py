"""Time pruning against torch.nn.utils.prune, on one thread.

    python benchmarks/sparsity.py [--json]

Rows are `{what, seconds, over_torch}`; repetitions of both sides alternate and the median of each is kept. Seconds are
those of the processor, so that other people's work on the machine counts less.
`select` on 25 million scores: seconds, the ratio to torch's global magnitude pruning of the same layers, and the most
memory it took beyond the scores as a multiple of their bytes. A quarter of a fine-tuning epoch of LeNet-300-100 on as
many images as MNIST has, with masks that stay, as a ratio to the same without (`over_dense`), torch's parametrised one
beside it; and for every method with its defaults, at the beginning of 8 such epochs: what it costs while it prunes
(masks that have come to rest cost what the first row says).
Before any time is taken, both sides must keep the same weights.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import statistics
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
from torch import nn
from torch.nn.utils import prune

from sparring.models import build
from sparring.sparsity import (
    METHODS,
    Masks,
    Pruner,
    PruningSpec,
    Scores,
    Step,
    all_ones,
    build_pruner,
    magnitude,
    one_shot,
    prunable,
    select,
)
from sparring.train import Recipe, fit

LAYERS = [(2500, 5000), (1000, 5000), (2500, 3000)]
SPARSITY = 0.9
IMAGES, PARTS = 13_500, 32  # a quarter of MNIST's training images without those for validation, and 8 such epochs


def layers(shapes: list[tuple[int, int]]) -> nn.Sequential:
    """Linear layers that no input ever goes through: only their weights matter."""
    torch.manual_seed(0)
    return nn.Sequential(*(nn.Linear(columns, rows, bias=False) for rows, columns in shapes))


def torch_masks(model: nn.Module) -> Masks:
    """Prune globally by magnitude with torch, and take its masks off again."""
    linear = [(module, "weight") for module in model.modules() if isinstance(module, nn.Linear)]
    prune.global_unstructured(linear, pruning_method=prune.L1Unstructured, amount=SPARSITY)
    masks = {f"{index}.weight": module.get_buffer("weight_mask").bool() for index, (module, _) in enumerate(linear)}
    for module, _ in linear:
        module.weight = nn.Parameter(module.get_parameter("weight_orig").detach())
        del module._forward_pre_hooks[next(iter(module._forward_pre_hooks))]
        del module._parameters["weight_orig"], module._buffers["weight_mask"]
    return masks


def assert_same_up_to_ties(scores: Scores, ours: Masks, theirs: Masks) -> None:
    """Check that both keep as many weights, and that they differ only among equal scores."""
    assert sum(int(m.sum()) for m in ours.values()) == sum(int(m.sum()) for m in theirs.values())
    disputed = [scores[name][ours[name] != theirs[name]] for name in scores]
    assert torch.cat(disputed).unique().numel() <= 1, "both must keep the same weights"


def alternate(first: Callable[[], object], second: Callable[[], object], repeats: int) -> tuple[float, float]:
    """Return the median processor seconds of two functions whose runs alternate."""
    times: tuple[list[float], list[float]] = ([], [])
    for _ in range(repeats):
        for function, kept in zip((first, second), times, strict=True):
            began = time.process_time()
            function()
            kept.append(time.process_time() - began)
    return statistics.median(times[0]), statistics.median(times[1])


def memory_of(function: Callable[[], object]) -> int:
    """Return by how many bytes the resident memory rose at most while a function ran (Linux)."""
    ctypes.CDLL(None).malloc_trim(0)  # what was freed and is still held would be used again unseen
    Path("/proc/self/clear_refs").write_text("5")  # resets the peak
    before = _resident("VmRSS")
    function()
    return _resident("VmHWM") - before


def _resident(which: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(which))


def time_select() -> list[dict[str, object]]:
    """Compare one global selection over 25 million weights."""
    model = layers(LAYERS)
    scores = magnitude(model)
    assert_same_up_to_ties(scores, select(scores, SPARSITY), torch_masks(model))
    selecting, pruning = alternate(lambda: select(scores, SPARSITY), lambda: torch_masks(model), 5)
    memory = memory_of(lambda: select(scores, SPARSITY)) / sum(s.numel() * s.element_size() for s in scores.values())
    row = {"what": "select, 25M scores", "seconds": selecting, "over_torch": selecting / pruning, "memory": memory}
    return [row]


class Beginning(Pruner):
    """The first part of a training: its pruner believes that PARTS times as many steps are to come."""

    def __init__(self, pruner: Pruner) -> None:
        self.pruner, self.dense_weights = pruner, pruner.dense_weights

    def __call__(self, step: Step) -> Masks:
        """Pass everything on."""
        return self.pruner(replace(step, steps=step.steps * PARTS))


def time_epoch() -> list[dict[str, object]]:
    """Compare fine-tuning with and without masks, with torch's reparametrised weights, and under every method."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randint(0, 256, (IMAGES, 1, 28, 28), dtype=torch.uint8, generator=generator)
    y = torch.randint(0, 10, (IMAGES,), generator=generator)
    recipe = Recipe(epochs=1, batch_size=128, lr=0.01)

    def network() -> nn.Module:
        return build("lenet-300-100", shape=(1, 28, 28), classes=10, mean=(0.13,), std=(0.31,))

    dense, sparse, slow = network(), network(), network()
    masks = select(magnitude(sparse), SPARSITY)
    linear = [(module, "weight") for module in slow.modules() if isinstance(module, nn.Linear)]
    prune.global_unstructured(linear, pruning_method=prune.L1Unstructured, amount=SPARSITY)

    def epoch(model: nn.Module, kept: Masks | None = None, pruner: Pruner | None = None) -> None:
        result = fit(model, x, y, recipe, masks=kept, pruner=pruner)
        for name, mask in result.masks.items():
            assert not model.get_parameter(name)[~mask].any(), "masked weights must stay zero"

    def row(what: str, plain: float, seconds: float) -> dict[str, object]:
        return {"what": what, "seconds": seconds, "over_torch": seconds / parametrised, "over_dense": seconds / plain}

    assert prunable(dense).keys() == masks.keys()
    plain, masked = alternate(lambda: epoch(dense), lambda: epoch(sparse, masks, one_shot(magnitude, SPARSITY)), 9)
    _, parametrised = alternate(lambda: epoch(dense), lambda: epoch(slow), 5)
    rows = [row("quarter of an epoch, fixed masks", plain, masked)]
    for method in METHODS:

        def pruned(method: str = method) -> None:
            model = network()
            epoch(model, all_ones(model), Beginning(build_pruner(PruningSpec(method=method), SPARSITY)))

        rows.append(row(f"the same under {method}", *alternate(lambda: epoch(network()), pruned, 5)))
    return rows


def main() -> None:
    """Print one row per measurement."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="print rows as JSON")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    rows = time_select() + time_epoch()
    if arguments.json:
        print(json.dumps(rows, indent=1))
        return
    for row in rows:
        print("  ".join(f"{key} {value:.3f}" if isinstance(value, float) else str(value) for key, value in row.items()))


if __name__ == "__main__":
    main()
