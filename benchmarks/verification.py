"""The verifier on others' questions and on sparse networks: `python benchmarks/verification.py [--json] [--seconds S]`.

`--mnist-fc FOLDER` holds networks (onnx/) and properties (vnnlib/) of VNN-COMP's mnist_fc, gzipped, whose answers are
known (union of the competition's tools); a wrong answer ends the benchmark. `--lenet [NAME]` trains LeNet-300-100 (or
lenet-5) on MNIST (`--data-dir`), prunes it by magnitude, and asks for exact distances, in `--norm`, of `--images` test
images at each sparsity.

One thread. `--seconds` (120; 60 an image for `--lenet`) are processor seconds of one question, which a busy machine
leaves comparable; wall times stand beside them, and reading and lowering the network is counted in neither.
"""

from __future__ import annotations

import argparse
import gzip
import json
import re
import statistics
import sys
import tempfile
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

import torch

from sparring import attacks, bounds
from sparring.graph import GraphModule, from_onnx, onnx_runtime, read_onnx
from sparring.threat import Threat
from sparring.units import parse_norm
from trained import trained

# u: no counter-example exists; S: there is one; ?: open. Of properties 0 to 7.
KNOWN = {
    ("256x2", "0.03"): "uSSuuuuu",
    ("256x2", "0.05"): "SSSuSSSu",
    ("256x4", "0.03"): "uSuuuuuu",
    ("256x4", "0.05"): "uS?uuuSu",
}
SPARSITIES = ("99", "98", "95", "90")
ANSWERS = {"verified": "u", "falsified": "S", "unknown": "?"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", action="store_true", help="print the rows as JSON")
    parser.add_argument("--mnist-fc", type=Path, help="folder with onnx/ and vnnlib/")
    parser.add_argument("--only", default="", help="network and eps of mnist_fc, as 256x4:0.05, or a sparsity, as 95")
    parser.add_argument("--lenet", nargs="?", const="lenet-300-100", help="exact distances of this network, pruned")
    parser.add_argument("--norm", choices=("linf", "l2"), default="linf")
    parser.add_argument("--seconds", type=float, default=120.0)
    parser.add_argument("--images", type=int, default=10)
    parser.add_argument("--data-dir", type=Path)
    parser.add_argument("--cache", type=Path, default=Path(tempfile.gettempdir()) / "sparring-benchmarks")
    options = parser.parse_args()
    torch.set_num_threads(1)
    rows: list[dict[str, Any]] = []
    if options.mnist_fc:
        rows += questions(options.mnist_fc, options.seconds, options.only)
    if options.lenet:
        rows += [distances(name, options) for name in SPARSITIES if options.only in ("", name)]
    print(json.dumps(rows, indent=1) if options.json else "\n".join(map(str, rows)))


def questions(folder: Path, seconds: float, only: str) -> list[dict[str, Any]]:
    """Ask every property of every network; return one row for each network and eps."""
    found: dict[tuple[str, str], list[tuple[int, str, float, float]]] = defaultdict(list)
    for network in sorted((folder / "onnx").glob("*.onnx.gz")):
        name = re.sub(r".*_(\w+)\.onnx\.gz", r"\1", network.name)
        with tempfile.TemporaryDirectory() as place:
            file = unpacked(network, Path(place))
            model, run = GraphModule(from_onnx(file)).eval(), onnx_runtime(read_onnx(file))
            for property_ in sorted((folder / "vnnlib").glob("*.vnnlib.gz")):
                number, eps = re.findall(r"[\d.]*\d", property_.name)[:2]
                if only and only != f"{name}:{eps}":
                    continue
                asked = bounds.read_vnnlib(unpacked(property_, Path(place)))
                begin, wall = time.process_time(), time.perf_counter()
                verdict, _ = bounds.verify_property(
                    model, model.shape, asked, run=run, seconds=seconds, clock=time.process_time
                )
                spent = time.process_time() - begin, time.perf_counter() - wall
                answer = ANSWERS[verdict.status]
                print(name, eps, number, verdict.status, *(f"{s:.2f}" for s in spent), verdict.nodes, file=sys.stderr)
                expected = KNOWN[name, eps][int(number)]
                if "?" not in (answer, expected) and answer != expected:
                    raise SystemExit(f"wrong: {name}, property {number} at {eps} is {expected}, not {answer}")
                found[name, eps].append((int(number), answer, *spent))
    return [row(*key, sorted(answers)) for key, answers in found.items()]


def unpacked(file: Path, folder: Path) -> Path:
    """Write a gzipped file without its packing."""
    target = folder / file.stem
    target.write_bytes(gzip.decompress(file.read_bytes()))
    return target


def row(name: str, eps: str, answers: list[tuple[int, str, float, float]]) -> dict[str, Any]:
    """Return what became of the properties of one network at one eps."""
    processor, wall = [spent for *_, spent, _ in answers], [spent for *_, spent in answers]
    of_falsified = [spent for _, answer, spent, _ in answers if answer == "S"]
    return {
        "network": name,
        "eps": float(eps),
        "answers": "".join(answer for _, answer, *_ in answers),
        "known": KNOWN[name, eps],
        "solved": sum(answer != "?" for _, answer, *_ in answers),
        "median_processor_seconds": round(statistics.median(processor), 2),
        "longest_processor_seconds": round(max(processor), 2),
        "median_wall_seconds": round(statistics.median(wall), 2),
        "median_processor_seconds_falsified": round(statistics.median(of_falsified), 2) if of_falsified else None,
    }


def distances(sparsity: str, options: argparse.Namespace) -> dict[str, Any]:
    """Return how many exact distances of a pruned network close, and how far the others are from it."""
    network, norm = trained(f"{options.lenet}-p{sparsity}", options.data_dir, options.cache), parse_norm(options.norm)
    x = network.dataset.test.x[: options.images].float() / 255
    y = network.dataset.test.y[: options.images]
    near = attacks.run(network.model, x, y, attacks.nearest, Threat(norm), generator=torch.Generator().manual_seed(0))
    begin, wall = time.process_time(), time.perf_counter()
    found = bounds.exact(
        network.model, x, y, norm, x_adv=near.x_adv, seconds=min(60.0, options.seconds), clock=time.process_time
    )
    right = near.clean_correct
    closed = torch.tensor([status == "exact" for status in found.status])
    gaps = (1 - found.lower / found.upper)[right & ~closed].nan_to_num(1.0)
    return {
        "network": f"{options.lenet} at {sparsity}%, {options.norm}",
        "accuracy": network.accuracy,
        "images": int(right.sum()),
        "closed": float(closed[right].double().mean()),
        "median_gap_of_others": float(gaps.quantile(0.5)) if len(gaps) else None,
        "processor_seconds": round(time.process_time() - begin, 1),
        "wall_seconds": round(time.perf_counter() - wall, 1),
    }


if __name__ == "__main__":
    main()
