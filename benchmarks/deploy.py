"""Sparse kernels beside ONNX Runtime: `python benchmarks/deploy.py [--json] [--networks lenet-5,...] [--rounds N]`.

Random layer-uniform masks of some `--sparsities` (in MobileNetV2 on pointwise layers, in ViT-Tiny on the linear layers
of its blocks), or with `--weights FILE ...` the networks that `sparring prune` wrote, beside the same network with all
its weights; one thread, fp32. Outputs are compared before anything is timed. Rounds are interleaved, so that whatever
else the machine does falls on both; ratios are of medians. Times are the thread's own, without those in which other
programs have the core.
Rows: network, batch, sparsity, over_onnxruntime (dense time over sparse time), over_floor (time over what the nonzeros
alone would need at the measured peak of one core, multiply-adds on registers, so 1 is perfect), relative_error (of the
largest logit, against torch; above 5e-6 only if torch itself is half as far from float64), milliseconds.

With `--channels`, instead: a ResNet-18 at 32 × 32 that has lost half of the channels of each layer, beside the same
network, which is dense, in ONNX Runtime.

With `--int8`, instead: kernels on 8-bit weights and activations beside ONNX Runtime's static int8 of the same network
with all its weights (uint8 activations, int8 weights per channel, calibrated on the same 64 images), on masks of 1 × 4
blocks (four inputs of a unit, four channels of a tap; random where there are no whole blocks) and on random ones.
Logits must be those of plain integers to the last bit, nearly if parts are dense. Rows: over_onnxruntime of the int8
kernels and of the fp32 kernels (fp32_...), over_fp32 (fp32 kernels' time over int8 kernels').

With `--threads`, instead: one process with two threads beside two processes with one thread each, which run side by
side. Logits must be equal to the last bit. Times are wall-clock times, so other programs must be idle. Rows:
over_processes (images per second of the threads over those of the processes), milliseconds of one call of each.
"""

from __future__ import annotations

import argparse
import copy
import json
import multiprocessing
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import onnxruntime
import torch
from torch import nn

from sparring import deploy
from sparring.deploy import interleaved, peak_flops
from sparring.deploy.rounding._reference import run_rounded
from sparring.deploy.timing._engines import ENGINES, Network
from sparring.devices import CPU
from sparring.models import build, load_model
from sparring.sparsity import apply_, magnitude, select, silent, tied_channels

sys.path.insert(0, str(Path(__file__).parents[1]))  # the tests' networks
from tests.architectures import ResNet, mobilenet_v2
from tests.transformers import FusedAttention, ViT


def matrices(name: str, weight: nn.Parameter) -> bool:
    """Choose all weights but biases and normalisation."""
    return weight.dim() > 1


def pointwise(name: str, weight: nn.Parameter) -> bool:
    """Choose the weights without a window: not those of the stem and of depthwise layers."""
    return weight.dim() > 1 and weight[0, 0].numel() == 1


def in_blocks(name: str, weight: nn.Parameter) -> bool:
    """Choose the linear layers of a transformer's blocks."""
    return weight.dim() == 2 and "blocks." in name


@dataclass(frozen=True)
class Kind:
    """How a network is built for images of `shape`, the batch sizes to time, and which weights are masked."""

    build: Callable[[], nn.Module]
    shape: tuple[int, ...]
    batches: tuple[int, ...]
    masked: Callable[[str, nn.Parameter], bool] = matrices


def own(name: str, shape: tuple[int, ...], batches: tuple[int, ...], **options: Any) -> Kind:
    """Return one of the library's own networks."""
    channels = shape[0]
    scaling: dict[str, Any] = {"mean": (0.4,) * channels, "std": (0.25,) * channels}
    return Kind(partial(build, name, shape=shape, classes=10, **scaling, **options), shape, batches)


class LinearBlock(nn.Module):
    """The linear layers of a transformer's block; the values take the place of what attention makes of them."""

    def __init__(self, wide: int) -> None:
        super().__init__()
        self.qkv, self.proj = nn.Linear(wide, 3 * wide), nn.Linear(wide, wide)
        self.fc1, self.fc2 = nn.Linear(wide, 4 * wide), nn.Linear(4 * wide, wide)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + self.proj(self.qkv(x)[..., -x.shape[-1] :])
        return x + self.fc2(self.fc1(x))


class LinearLayers(nn.Module):
    """The linear layers of a transformer's blocks, and the mean over tokens as logits: (N, tokens, width)."""

    def __init__(self, wide: int, depth: int) -> None:
        super().__init__()
        self.blocks = nn.Sequential(*(LinearBlock(wide) for _ in range(depth)))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.blocks(x).mean(1)


DIGIT, SMALL, PHOTOGRAPH = (1, 28, 28), (3, 32, 32), (3, 224, 224)
TOKENS = (197, 192)  # of ViT-Tiny at 224
VIT_TINY: dict[str, Any] = {"width": 192, "depth": 12, "heads": 3, "patch": 16, "ratio": 4}
NETWORKS = {
    "lenet-300-100": own("lenet-300-100", DIGIT, (1, 64)),
    "lenet-5": own("lenet-5", DIGIT, (1, 64)),
    "resnet-32": own("resnet-32", SMALL, (1, 64)),
    "vgg-like-half": own("vgg-like", SMALL, (1, 64), width=0.5),
    "vgg-like": own("vgg-like", SMALL, (1,)),
    "resnet-50": Kind(partial(ResNet, PHOTOGRAPH, 1000, 64, (3, 4, 6, 3), 4), PHOTOGRAPH, (1, 16)),
    "mobilenet-v2": Kind(partial(mobilenet_v2, PHOTOGRAPH, 1000), PHOTOGRAPH, (1,), pointwise),
    "vit-tiny": Kind(partial(ViT, FusedAttention, PHOTOGRAPH, 1000, **VIT_TINY), PHOTOGRAPH, (1, 16), in_blocks),
    "vit-tiny-linear": Kind(partial(LinearLayers, TOKENS[1], 12), TOKENS, (1, 16), in_blocks),
}
TOLERANCE = 5e-6


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", action="store_true", help="print rows as JSON and nothing else")
    parser.add_argument("--networks", default=",".join(NETWORKS))
    parser.add_argument("--weights", nargs="*", type=Path, default=[], help="networks written by sparring prune")
    parser.add_argument("--sparsities", default="0.9,0.95,0.98", help="of random masks")
    parser.add_argument("--rounds", type=int, default=60)
    parser.add_argument("--channels", action="store_true", help="time a network that has lost channels")
    parser.add_argument("--threads", action="store_true", help="time two threads beside two processes")
    parser.add_argument("--int8", action="store_true", help="time kernels on 8-bit weights and activations")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    names, sparsities = arguments.networks.split(","), [float(part) for part in arguments.sparsities.split(",")]
    rows_of = rows_of_threads if arguments.threads else rows_of_pair
    found = (
        (row for name in names for row in rows_of_int8(name, sparsities, arguments.rounds))
        if arguments.int8
        else (
            row
            for pair in pairs_of(arguments.weights, names, sparsities, channels=arguments.channels)
            for row in rows_of(pair, arguments.rounds)
        )
    )
    rows = []
    for row in found:
        rows.append(row)
        if not arguments.json:
            numbers = ((key, f"{v:.4g}" if type(v) is float else v) for key, v in row.items())
            print(" ".join(f"{key}={value}" for key, value in numbers), flush=True)
    if arguments.json:
        json.dump(rows, sys.stdout, indent=1)
        print()


@dataclass(frozen=True)
class Pair:
    """A sparse network, the ONNX session of the same one with all its weights, and the batch sizes to time."""

    name: str
    sparsity: float
    model: nn.Module
    session: Callable[[np.ndarray], np.ndarray]
    shape: tuple[int, ...]
    batches: tuple[int, ...]


def pairs_of(
    weights: Sequence[Path], names: Sequence[str], sparsities: Sequence[float], *, channels: bool
) -> Iterator[Pair]:
    """Return the networks to time."""
    if channels:
        yield without_channels()
    else:
        yield from map(pruned, weights) if weights else random(names, sparsities)


def without_channels() -> Pair:
    """Remove half of the channels of each layer of a ResNet-18, coupled ones together."""
    model = sparse_network(Kind(partial(ResNet, SMALL, 10, 64, (2, 2, 2, 2), 1), SMALL, (1, 16)), 0.0)
    structure, fixed = tied_channels(model, SMALL)
    scores = {name: score for name, score in magnitude(model).items() if name not in fixed}
    apply_(model, silent(model, select(scores, 0.5, structure=structure, scope="layer"), SMALL))
    return Pair("resnet-18 channels", 0.5, model, checked_session(model, SMALL), SMALL, (1, 16))


def random(names: Sequence[str], sparsities: Sequence[float]) -> Iterator[Pair]:
    """Make networks with random masks."""
    for name in names:
        kind = NETWORKS[name]
        session = checked_session(sparse_network(kind, 0.0), kind.shape)
        for sparsity in sparsities:
            yield Pair(name, sparsity, sparse_network(kind, sparsity), session, kind.shape, kind.batches)


def pruned(path: Path) -> Pair:
    """Load a pruned network."""
    model, blueprint, _ = load_model(path)
    weights = [p for p in model.parameters() if p.dim() > 1]
    kept = sum(int(p.count_nonzero()) for p in weights) / sum(p.numel() for p in weights)
    session = checked_session(blueprint.build().eval(), blueprint.shape)
    return Pair(path.stem, 1 - kept, model.eval(), session, blueprint.shape, (1, 64))


def rows_of_pair(pair: Pair, rounds: int) -> Iterator[dict[str, float | str]]:
    """Measure one network at its batch sizes."""
    with tempfile.TemporaryDirectory() as folder:
        packed = deploy.load(deploy.export(pair.model, Path(folder) / "net.sparring", shape=pair.shape))
    for batch in pair.batches:
        x = np.random.default_rng(batch).random((batch, *pair.shape), np.float32)
        error = checked_error(packed(x), pair.model, x)
        sparse, dense = interleaved(
            [partial(packed, x), partial(pair.session, x)], rounds=rounds, clock=time.thread_time
        )
        floor = 2 * batch * deploy.multiplications(packed.program) / peak_flops()
        yield {
            "network": pair.name,
            "batch": batch,
            "sparsity": pair.sparsity,
            "over_onnxruntime": round(dense.median / sparse.median, 2),
            "over_floor": round(sparse.median / floor, 2),
            "relative_error": error,
            "milliseconds": sparse.median * 1e3,
        }


def rows_of_threads(pair: Pair, rounds: int) -> Iterator[dict[str, float | str]]:
    """Measure two threads beside two processes, at each batch size."""
    with tempfile.TemporaryDirectory() as folder:
        path = deploy.export(pair.model, Path(folder) / "net.sparring", shape=pair.shape)
        one, two = deploy.load(path), deploy.load(path, threads=2)
        for batch in pair.batches:
            x = np.random.default_rng(batch).random((batch, *pair.shape), np.float32)
            assert (two(x) == one(x)).all()
            with beside(path, x) as other:
                times = [(*other(partial(one, x)), seconds(partial(two, x))) for _ in range(rounds)]
            mine, its, threads = np.median(times, axis=0)
            yield {
                "network": pair.name,
                "batch": batch,
                "sparsity": pair.sparsity,
                "over_processes": round((mine + its) / 4 / threads, 3),
                "threads_milliseconds": threads * 1e3,
                "processes_milliseconds": (mine + its) / 2 * 1e3,
            }


@contextmanager
def beside(path: Path, x: np.ndarray) -> Iterator[Callable[[Callable[[], object]], tuple[float, float]]]:
    """Yield a function that times a call here and, in another process, that of a file on images at the same time."""
    context = multiprocessing.get_context("spawn")
    here, there = context.Pipe()
    process = context.Process(target=serve, args=(there, path, x), daemon=True)
    process.start()
    here.recv()

    def both(call: Callable[[], object]) -> tuple[float, float]:
        here.send(True)
        return seconds(call), here.recv()

    yield both
    here.send(False)
    process.join()


def serve(pipe: Connection, path: Path, x: np.ndarray) -> None:
    """Run a file on images whenever asked, and say how long it took."""
    packed = deploy.load(path)
    packed(x)
    pipe.send(None)
    while pipe.recv():
        pipe.send(seconds(partial(packed, x)))


def seconds(call: Callable[[], object]) -> float:
    """Return how long a call takes, in seconds."""
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def rows_of_int8(name: str, sparsities: Sequence[float], rounds: int) -> Iterator[dict[str, float | str]]:
    """Measure a network on 8-bit weights and activations, at its batch sizes."""
    kind = NETWORKS[name]
    images = torch.rand(64, *kind.shape, generator=torch.Generator().manual_seed(0))
    with tempfile.TemporaryDirectory() as folder:
        rival = ENGINES["onnxruntime int8"](
            Network(sparse_network(kind, 0.0), kind.shape, Path(folder), images, CPU)
        ).run
        for sparsity, blocks in ((sparsity, blocks) for sparsity in sparsities for blocks in (True, False)):
            model, path = sparse_network(kind, sparsity, blocks=blocks), Path(folder) / "net.sparring"
            plain = deploy.load(deploy.export(model, path, shape=kind.shape))
            packed = deploy.load(deploy.export(model, path, shape=kind.shape, values="int8", calibrate=images))
            expected = run_rounded(packed.program, images[:2].numpy())
            nearly = 0 if packed.program.whole else 0.02 * np.abs(expected).max()  # dense parts compute in floats
            assert np.abs(packed(images[:2].numpy()) - expected).max() <= nearly
            for batch in kind.batches:
                x = np.random.default_rng(batch).random((batch, *kind.shape), np.float32)
                runs = [partial(run, x) for run in (packed, plain, rival)]
                int8, fp32, dense = interleaved(runs, rounds=rounds, clock=time.thread_time)
                yield {
                    "network": name,
                    "batch": batch,
                    "sparsity": sparsity,
                    "mask": "blocks-1x4" if blocks else "random",
                    "over_onnxruntime": round(dense.median / int8.median, 2),
                    "fp32_over_onnxruntime": round(dense.median / fp32.median, 2),
                    "over_fp32": round(fp32.median / int8.median, 2),
                    "relative_error": relative_error(packed(x), model, x),
                    "milliseconds": int8.median * 1e3,
                }


def mask_of(weight: torch.Tensor, sparsity: float, generator: torch.Generator, *, blocks: bool) -> torch.Tensor:
    """Return a random mask, of blocks of four inputs if there are whole ones."""
    if not blocks or weight.shape[1] % 4:
        return torch.rand(weight.shape, generator=generator) >= sparsity
    shape = (weight.shape[0], weight.shape[1] // 4, *weight.shape[2:])
    return (torch.rand(shape, generator=generator) >= sparsity).repeat_interleave(4, 1)


def sparse_network(kind: Kind, sparsity: float, *, blocks: bool = False) -> nn.Module:
    """Build a network with random layer-uniform masks and batch norm statistics of its own activations."""
    torch.manual_seed(0)
    model, generator = kind.build(), torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if kind.masked(name, parameter):
                parameter.mul_(mask_of(parameter, sparsity, generator, blocks=blocks))
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.momentum = 1.0  # take the statistics of the one batch that follows
        model.train()(torch.rand(4 if kind.shape == PHOTOGRAPH else 32, *kind.shape, generator=generator))
    return model.eval()


def relative_error(logits: np.ndarray, model: nn.Module, x: np.ndarray) -> float:
    """Return the largest difference to torch's logits over the largest of them."""
    expected = model(torch.from_numpy(x)).detach().numpy()
    return float(np.abs(logits - expected).max() / np.abs(expected).max())


def checked_error(logits: np.ndarray, model: nn.Module, x: np.ndarray) -> float:
    """Return the relative error; fail where it is too large for rounding."""
    error = relative_error(logits, model, x)
    assert error <= TOLERANCE or rounds_alike(logits, model, x), error
    return error


def rounds_alike(logits: np.ndarray, model: nn.Module, x: np.ndarray) -> bool:
    """Return whether logits are at most twice as far from those in float64 as torch's own are in float32."""
    exact = copy.deepcopy(model).double()(torch.from_numpy(x).double()).detach().numpy()
    own = model(torch.from_numpy(x)).detach().numpy()
    return bool(np.abs(logits - exact).max() <= 2 * np.abs(own - exact).max())


def checked_session(model: nn.Module, shape: tuple[int, ...]) -> Callable[[np.ndarray], np.ndarray]:
    """Return ONNX Runtime's function for a network, on one thread."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    with tempfile.TemporaryDirectory() as folder:
        path = deploy.to_onnx(model, Path(folder) / "net.onnx", shape=shape)
        session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])

    def run(x: np.ndarray) -> np.ndarray:
        return session.run(None, {"images": x})[0]

    x = np.random.default_rng(0).random((3, *shape), np.float32)
    assert relative_error(run(x), model, x) <= 1e-4
    return run


if __name__ == "__main__":
    start = time.perf_counter()
    main()
    print(f"# {time.perf_counter() - start:.0f} s", file=sys.stderr)
