"""Sparse kernels beside ONNX Runtime: `python benchmarks/deploy.py [--json] [--networks lenet-5,...] [--rounds N]`.

Random layer-uniform masks, one thread, fp32. Outputs are compared before anything is timed. Rounds are interleaved, so
that whatever else the machine does falls on both; ratios are of medians. Rows: network, batch, sparsity,
over_onnxruntime (dense time over sparse time), over_floor (time over what the nonzeros alone would need at the measured
peak of fused multiply-adds, so 1 is perfect), relative_error (of the largest logit, against torch), milliseconds.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import onnxruntime
import torch
from torch import nn

from sparring import deploy
from sparring.deploy.timing import interleaved, peak_flops
from sparring.models import build

NETWORKS = {
    "lenet-300-100": ("lenet-300-100", (1, 28, 28), 1.0, (1, 64)),
    "lenet-5": ("lenet-5", (1, 28, 28), 1.0, (1, 64)),
    "resnet-32": ("resnet-32", (3, 32, 32), 1.0, (1, 64)),
    "vgg-like-half": ("vgg-like", (3, 32, 32), 0.5, (1, 64)),
    "vgg-like": ("vgg-like", (3, 32, 32), 1.0, (1,)),
}
SPARSITIES = (0.9, 0.95, 0.98)
TOLERANCE = 5e-6


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", action="store_true", help="print rows as JSON and nothing else")
    parser.add_argument("--networks", default=",".join(NETWORKS))
    parser.add_argument("--rounds", type=int, default=60)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    rows = []
    for name in arguments.networks.split(","):
        rows += rows_of(name, arguments.rounds, quiet=arguments.json)
    if arguments.json:
        json.dump(rows, sys.stdout, indent=1)
        print()


def rows_of(name: str, rounds: int, *, quiet: bool) -> list[dict[str, float | str]]:
    """Measure one network at all sparsities and batch sizes."""
    kind, shape, width, batches = NETWORKS[name]
    rows: list[dict[str, float | str]] = []
    dense_model = sparse_network(kind, shape, width, 0.0)  # all channels: removing dead ones is a gain of sparsity too
    session = onnx_session(dense_model, shape)
    for sparsity in SPARSITIES:
        model = sparse_network(kind, shape, width, sparsity)
        packed = deploy.pack(model, shape=shape)
        for batch in batches:
            x = np.random.default_rng(batch).random((batch, *shape), np.float32)
            expected = model(torch.from_numpy(x)).detach().numpy()
            error = float(np.abs(packed(x) - expected).max() / np.abs(expected).max())
            assert error <= TOLERANCE, (name, batch, sparsity, error)
            dense_logits = dense_model(torch.from_numpy(x)).detach().numpy()
            assert np.abs(session(x) - dense_logits).max() <= 1e-4 * np.abs(dense_logits).max()
            sparse, dense = interleaved([partial(packed, x), partial(session, x)], rounds=rounds)
            floor = 2 * batch * deploy.multiplications(packed.program) / peak_flops()
            row = {
                "network": name,
                "batch": batch,
                "sparsity": sparsity,
                "over_onnxruntime": round(dense.median / sparse.median, 2),
                "over_floor": round(sparse.median / floor, 2),
                "relative_error": error,
                "milliseconds": sparse.median * 1e3,
            }
            rows.append(row)
            if not quiet:
                print(
                    " ".join(f"{key}={value:.4g}" if type(value) is float else f"{value}" for key, value in row.items())
                )
    return rows


def sparse_network(kind: str, shape: tuple[int, ...], width: float, sparsity: float) -> nn.Module:
    """Build a network with random layer-uniform masks and batch norm statistics of its own activations."""
    channels = shape[0]
    options = {} if width == 1 else {"width": width}
    model = build(kind, shape=shape, classes=10, mean=(0.4,) * channels, std=(0.25,) * channels, **options)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(torch.rand(parameter.shape, generator=generator) >= sparsity)
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.momentum = 1.0  # take the statistics of the one batch that follows
        model.train()(torch.rand(32, *shape, generator=generator))
    return model.eval()


def onnx_session(model: nn.Module, shape: tuple[int, ...]) -> Callable[[np.ndarray], np.ndarray]:
    """Return ONNX Runtime's function for a network, on one thread."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    with tempfile.TemporaryDirectory() as folder:
        path = deploy.to_onnx(model, Path(folder) / "net.onnx", shape=shape)
        session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    return lambda x: session.run(None, {"images": x})[0]


if __name__ == "__main__":
    start = time.perf_counter()
    main()
    print(f"# {time.perf_counter() - start:.0f} s", file=sys.stderr)
