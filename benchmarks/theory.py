"""The tables of theory: `python benchmarks/theory.py certified|tightness|exact|speed|masks|ratios WEIGHTS...`.

WEIGHTS are files of LeNet-300-100 on MNIST: what a study of `paper-lenet-300-100` leaves under objects/, or plain
weights. One line of JSON is printed for each file (for `exact` also for each image, and with --to FILE appended there:
images that the file holds are not searched again). Images are the first of the fixed order that studies use.

certified: accuracy by intervals and CROWN at linf eps 1/255, 2/255, 0.01 and 0.03.
tightness: medians of CROWN's radius, of the `nearest` attack's distance, and of margin / product constant.
exact: which distances a search finds within --seconds of wall time, starting from `nearest`. `processor` counts the
  seconds of one core that it took, which is what remains comparable on a machine that is busy with other work.
speed: CROWN's images per second of one core's processor time, all margins, by eps, and the dense path's time over it.
masks: the Bernoulli theorem: constants and margin / constant under random masks, for each layer and for all.
ratios: medians of product constants and of margin / constant, at radius 0.02 in linf and 0.2 in l2.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import time
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from sparring import attacks, bounds, data
from sparring.bounds._network import compacted, prepare
from sparring.bounds.certify._certificates import margins_over
from sparring.data import Dataset, as_float
from sparring.models import build, load_weights_
from sparring.study.stages._networks import chosen_images
from sparring.threat import L2, LINF, Threat, norm_name, parse_norm

EPS = (1 / 255, 2 / 255, 0.01, 0.03)
ALPHAS = (0.0, 0.1, 0.3, 0.5, 0.7, 0.9)
LAYERS: tuple[tuple[str, ...] | None, ...] = (None, ("2",), ("4",), ("6",))


def certified(model: nn.Module, x: Tensor, y: Tensor, options: argparse.Namespace) -> dict[str, Any]:
    """Return certified accuracy by method and eps."""
    methods = ("interval", "crown")
    return {
        method: [round(bounds.certified_accuracy(model, x, y, Threat(LINF, eps), method=method), 3) for eps in EPS]
        for method in methods
    }


def tightness(model: nn.Module, x: Tensor, y: Tensor, options: argparse.Namespace) -> dict[str, Any]:
    """Return medians over the correctly classified images, in both norms."""
    found = {}
    for norm in (LINF, L2):
        attacked = _attack(model, x, y, norm)
        right = attacked.clean_correct
        proved = bounds.radius(model, x, y, norm)[right]
        _, ratio = bounds.margin_ratios(model, x[right], y[right], float(proved.median()), norm=norm)
        found[norm_name(norm)] = {
            "crown": round(float(proved.median()), 4),
            "attack": round(float(attacked.distance[right].median()), 4),
            "crown_over_attack": round(float((proved / attacked.distance[right].double()).median()), 3),
            "crown_over_product": round(float((proved / ratio).median()), 1),
        }
    return found


def exact(model: nn.Module, x: Tensor, y: Tensor, options: argparse.Namespace) -> dict[str, Any]:
    """Search image by image; return the share that was solved, and how far the others' intervals are open."""
    norm, rows = parse_norm(options.norm), _held(options.to)
    attacked = _attack(model, x, y, norm)
    proved = bounds.radius(model, x, y, norm)
    for i in range(len(rows), len(x)):
        wall, processor, one = time.perf_counter(), time.process_time(), slice(i, i + 1)
        found = bounds.exact(model, x[one], y[one], norm, x_adv=attacked.x_adv[one], seconds=options.seconds)
        row: dict[str, Any] = {
            "image": i,
            "status": found.status[0],
            "lower": float(found.lower),
            "upper": float(found.upper),
        }
        row |= {"attack": float(attacked.distance[i]), "crown": float(proved[i])}
        row |= {"seconds": time.perf_counter() - wall, "processor": time.process_time() - processor}
        assert row["crown"] <= row["lower"] + 1e-4 and row["lower"] <= row["upper"] <= row["attack"] + 1e-4
        rows.append(row)
        print(json.dumps(row), flush=True)
        if options.to:
            with options.to.open("a") as file:
                file.write(json.dumps(row) + "\n")
    solved = [row for row in rows if row["status"] == "exact"]
    return {
        "images": len(rows),
        "settled": sum(row["status"] != "time limit" for row in rows) / len(rows),
        **{name: _median(row[name] for row in solved) for name in ("seconds", "processor")},
        "crown_over_exact": _median(row["crown"] / row["upper"] for row in solved),
        "attack_beyond_exact": _median(row["attack"] / row["upper"] - 1 for row in solved),
        "attack_beyond_exact_at_most": max((row["attack"] / row["upper"] - 1 for row in solved), default=None),
        "open_lower_over_upper": _median(row["lower"] / row["upper"] for row in rows if row["status"] == "time limit"),
    }


def masks(model: nn.Module, x: Tensor, y: Tensor, options: argparse.Namespace) -> dict[str, Any]:
    """Return the product constant and margin / constant, with intervals, for each rate, norm and set of layers."""
    return {
        f"{norm_name(norm)} {'all' if layers is None else layers[0]}": [
            {name: [round(v, 4) for v in getattr(point, name)] for name in ("constant", "ratio")}
            for point in bounds.random_mask_bounds(model, x, y, ALPHAS, norm=norm, radius=0.1, layers=layers, draws=6)
        ]
        for norm in (LINF, L2)
        for layers in LAYERS
    }


def ratios(model: nn.Module, x: Tensor, y: Tensor, options: argparse.Namespace) -> dict[str, Any]:
    """Return the median constant and the median of margin / constant, in both norms."""
    found = {}
    for norm, radius in ((LINF, 0.02), (L2, 0.2)):
        constant, ratio = bounds.margin_ratios(model, x, y, radius, norm=norm)
        found[norm_name(norm)] = {"constant": float(constant.median()), "ratio": float(ratio.median())}
    return found


def speed(model: nn.Module, x: Tensor, y: Tensor, options: argparse.Namespace) -> dict[str, Any]:
    """Time CROWN with products that skip zeros and with dense ones: the better of three rounds."""
    found = {}
    for eps in (0.01, 0.03, 0.06):
        reach, spent = torch.full((len(x),), eps, dtype=torch.float64), {True: math.inf, False: math.inf}
        for _ in range(3):
            for sparse in (True, False):
                begin = time.process_time()
                graph, pixels = prepare(model, tuple(x.shape[1:]), sparse=sparse), x
                if sparse:
                    graph, pixels = compacted(graph, x)
                margins_over(graph, pixels, y, LINF, reach, "crown")
                spent[sparse] = min(spent[sparse], time.process_time() - begin)
        found[str(eps)] = [round(len(x) / spent[True]), round(spent[False] / spent[True], 2)]
    return found


def _attack(model: nn.Module, x: Tensor, y: Tensor, norm: float) -> attacks.AttackResult:
    return attacks.run(model, x, y, attacks.nearest, Threat(norm), generator=torch.Generator().manual_seed(0))


def _held(path: Path | None) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()] if path and path.exists() else []


def _median(values: Any) -> float | None:
    listed = list(values)
    return round(statistics.median(listed), 4) if listed else None


def network(path: Path, dataset: Dataset) -> nn.Module:
    """Build LeNet-300-100 with the weights of a file."""
    model = build(
        "lenet-300-100", shape=(1, 28, 28), classes=10, mean=tuple(dataset.mean), std=tuple(dataset.std), seed=0
    )
    tensors = load_file(path)
    prefix = "model/" if any(name.startswith("model/") for name in tensors) else ""
    load_weights_(model, {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)})
    return model.eval()


TABLES = {one.__name__: one for one in (certified, tightness, exact, masks, ratios, speed)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("table", choices=TABLES)
    parser.add_argument("weights", nargs="+", type=Path)
    parser.add_argument("--data-dir", type=Path)
    parser.add_argument("--images", type=int, default=50)
    parser.add_argument("--norm", default="linf")
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--to", type=Path)
    options = parser.parse_args()
    if options.to and len(options.weights) > 1:
        parser.error("--to holds the images of one file of weights")
    torch.set_num_threads(options.threads)
    dataset = data.load("mnist", options.data_dir)
    x, y = chosen_images(dataset, "test", 0, options.images)
    for path in options.weights:
        model = network(path, dataset)
        zeros, weights = (sum(f(p) for p in model.parameters() if p.dim() > 1) for f in (_zeros, Tensor.numel))
        found = TABLES[options.table](model, as_float(x), y, options)
        print(json.dumps({"file": path.name, "sparsity": round(zeros / weights, 4), **found}), flush=True)


def _zeros(parameter: Tensor) -> int:
    return int((parameter == 0).sum())


if __name__ == "__main__":
    main()
