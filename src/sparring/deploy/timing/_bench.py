"""Latency, throughput and size of a network in every installed engine, and which engine to ship."""

from __future__ import annotations

import copy
import tempfile
import time
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from ...devices import CPU, Place
from ...errors import UnknownNameError, UserError
from ...memory import free_memory, measured
from ...modes import eval_mode
from ...sparsity import apply_, magnitude, select
from ...tally import counts
from ...units import percent
from .._equivalent import Equivalent
from .._program import products
from .._runtime import Packed, load
from ._clock import interleaved, one_core, peak_flops, processor
from ._engines import ENGINES, Network, Opened, Unavailable, open_engines, run_torch

SMALL = "small dense, "  # prefix of the names of another network's engines
_DENSER = (0.5, 0.7, 0.8, 0.9, 0.95, 0.98, 0.99)  # sparsities at which the sparse kernels are timed if they are slower


@dataclass(frozen=True)
class BenchRow:
    """One engine at one batch size: milliseconds per call (median, quartiles over rounds), and its size in bytes.

    `floor` is the milliseconds of the network's nonzero products at the measured peak speed. `of_peak` is the fraction
    of that peak that the engine's own products reach (dense ones, except for "packed"). `joules` per call and
    `bytes_memory` are None if they cannot be measured. `logit_error` is relative to the largest logit of the same
    network in torch. `exact` is False for an engine that rounds below float32.
    """

    engine: str
    settings: str
    batch: int
    milliseconds: float
    low: float
    high: float
    images_per_second: float
    floor: float
    of_peak: float
    joules: float | None
    bytes_disk: int
    bytes_memory: int | None
    logit_error: float
    exact: bool


@dataclass(frozen=True)
class Bench:
    """Result of a benchmark: the processor, one row per engine and batch size, and omitted engines with reasons.

    If another float32 engine beats the packed network at the smallest batch, `wins_from` is the sparsity from which the
    packed one would be faster (equal per layer, by magnitude). None if it is faster already, or at no tested sparsity.
    """

    processor: str
    peak_gflops: float
    rows: list[BenchRow]
    left_out: dict[str, str]
    sparsity: float
    wins_from: float | None

    def fastest(self, batch: int, *, exact: bool) -> BenchRow:
        """Return the fastest engine for the network itself at a batch size; with `exact`, only engines in float32."""
        rows = (r for r in self.rows if r.batch == batch and not r.engine.startswith(SMALL) and (r.exact or not exact))
        return min(rows, key=lambda row: row.milliseconds)


def bench(
    model: nn.Module,
    *,
    shape: tuple[int, ...],
    batches: Sequence[int] = (1, 64, 256),
    rounds: int = 30,
    small: nn.Module | None = None,
    images: Tensor | None = None,
    engines: Collection[str] | None = None,
    place: Place | None = None,
    progress: Callable[[str, int, int], None] = lambda *_: None,
) -> Bench:
    """Time a sparse classifier for images of `shape` in `engines`, interleaved, on one thread.

    engines: names in ENGINES; None for all that are installed. small: a dense network of similar accuracy, as a fair
    alternative, timed in the same engines. images: float images (N, *shape) in [0, 1] for the calibration of int8;
    random ones by default. place: device and dtype of torch's own engines; times then include copies of images and
    logits. progress: gets a name, the number of finished rounds and their total. Raises UserError for empty batches,
    batches that do not fit into memory, or no engine in float32, UnknownNameError for an unknown engine.
    """
    if not batches or min(batches) < 1 or rounds < 1:
        raise UserError("a benchmark needs batch sizes and rounds of at least 1")
    names = tuple(ENGINES) if engines is None else tuple(engines)
    for name in names:
        if name not in ENGINES:
            raise UnknownNameError("engine", name, ENGINES)
    if images is None:
        images = torch.rand(64, *shape, generator=torch.Generator().manual_seed(0))
    with tempfile.TemporaryDirectory() as folder, one_core(), eval_mode(model), eval_mode(small or model):
        place = place or CPU
        _check_memory(model, images, max(batches))
        networks = [("", Network(model, shape, Path(folder), images, place))]
        if small is not None:
            (Path(folder) / "small").mkdir()
            networks.append((SMALL, Network(small, shape, Path(folder) / "small", images, place)))
        running, left_out = [], {}
        for prefix, network in networks:
            for number, (name, found) in enumerate(open_engines(network, names), 1):
                progress("engines", number, len(names))
                if isinstance(found, Unavailable):
                    left_out[prefix + name] = str(found)
                else:
                    running.append(_Running(prefix + name, found, network))
        if not any(one.engine.exact for one in running if not one.name.startswith(SMALL)):
            reasons = "".join(f"; {name}: {reason}" for name, reason in left_out.items())
            raise UserError(f"a benchmark needs an engine in float32, such as packed or torch{reasons}")
        rows = [row for batch in batches for row in _rows(running, batch, rounds, partial(progress, f"batch {batch}"))]
        result = Bench(processor(), peak_flops() / 1e9, rows, left_out, counts(model).matrix_sparsity, None)
        return replace(result, wins_from=_wins_from(result, networks[0][1], min(batches), progress))


def _check_memory(model: nn.Module, images: Tensor, batch: int) -> None:
    """Raise UserError, with the numbers, if torch's forward pass of a batch does not fit into the free memory."""
    answer = CPU.answers(model, images)

    def work(x: Tensor) -> None:
        with torch.no_grad():
            answer(x)

    measured(work, images).check(batch, free_memory(), "a forward pass")


@dataclass(frozen=True)
class _Running:
    name: str
    engine: Opened
    network: Network


def _rows(running: list[_Running], batch: int, rounds: int, progress: Callable[[int, int], None]) -> list[BenchRow]:
    shape = running[0].network.shape
    x = np.random.default_rng(batch).random((batch, *shape), np.float32)
    timings = interleaved([partial(one.engine.run, x) for one in running], rounds=rounds, progress=progress)
    needed = {one.network.packed: products(load(one.network.packed).program) for one in running}
    rows = []
    for one, timing in zip(running, timings, strict=True):
        found, expected = np.asarray(one.engine.run(x)), run_torch(one.network.reference, x)
        kept, dense = needed[one.network.packed]
        own = kept if one.name.removeprefix(SMALL).startswith("packed") else dense
        row = BenchRow(
            one.name,
            one.engine.settings,
            batch,
            timing.median * 1e3,
            timing.low * 1e3,
            timing.high * 1e3,
            batch / timing.median,
            2e3 * batch * kept / peak_flops(),
            2 * batch * own / peak_flops() / timing.median,
            timing.joules,
            one.engine.bytes_disk,
            one.engine.memory(),
            float(np.abs(found - expected).max() / max(1e-30, np.abs(expected).max())),
            one.engine.exact,
        )
        rows.append(row)
    return rows


def _wins_from(found: Bench, network: Network, batch: int, progress: Callable[[str, int, int], None]) -> float | None:
    """Return the smallest sparsity above the network's at which its packed form would be the fastest, or None."""
    best = found.fastest(batch, exact=True)
    if best.engine == "packed" or all(row.engine != "packed" for row in found.rows):
        return None
    x = np.random.default_rng(batch).random((batch, *network.shape), np.float32)
    for number, sparsity in enumerate(_DENSER):
        progress("sparser networks", number, len(_DENSER))
        if sparsity > found.sparsity and _packed_seconds(network, sparsity, x) * 1e3 < best.milliseconds:
            return sparsity
    return None


def _packed_seconds(network: Network, sparsity: float, x: np.ndarray) -> float:
    """Return the median seconds of a call of the packed network, pruned to a sparsity in every layer."""
    pruned = copy.deepcopy(network.model)
    apply_(pruned, select(magnitude(pruned), sparsity, scope="layer"))
    folder = network.folder / f"{sparsity:g}"
    folder.mkdir()
    packed = load(replace(network, model=pruned, folder=folder).packed)
    return interleaved([partial(packed, x)], rounds=5)[0].median


def over_dense(packed: Packed) -> tuple[float, float]:
    """Return the seconds that one image takes on one core: in a packed network, and in PyTorch with all its weights."""
    image = np.random.default_rng(0).random((1, *packed.program.shape), np.float32)
    runs: list[Callable[[], object]] = [partial(packed, image), partial(run_torch, Equivalent(packed.program), image)]
    with one_core():
        ours, dense = interleaved(runs, rounds=5, clock=time.thread_time)
    return ours.median, dense.median


def what_to_ship(found: Bench) -> list[str]:
    """Recommend an engine for each batch size, with the sparsity from which the sparse kernels are faster."""
    told = []
    for batch in dict.fromkeys(row.batch for row in found.rows):
        best, exact = found.fastest(batch, exact=False), found.fastest(batch, exact=True)
        others = [row for row in found.rows if row.batch == batch and row.exact and row.engine != exact.engine]
        others = [row for row in others if not row.engine.startswith(SMALL)]
        line = f"At batch {batch} ship {exact.engine}: {exact.milliseconds:.3g} ms"
        if others:
            second = min(others, key=lambda row: row.milliseconds)
            line += f", {second.milliseconds / exact.milliseconds:.1f} times as fast as {second.engine}"
        if not best.exact:
            line += (
                f"; {best.engine} takes {best.milliseconds:.3g} ms, with logits off by {percent(best.logit_error)} "
                "of the largest: ship it only after its accuracy and robustness have been measured"
            )
        told.append(line + ".")
    fastest = found.fastest(min(row.batch for row in found.rows), exact=True)
    if fastest.engine != "packed":
        least = found.wins_from
        where = "at no sparsity up to 99%" if least is None else f"from about {percent(least, 0)} sparsity"
        told.append(f"The sparse kernels would be the fastest {where}; this network has {percent(found.sparsity, 0)}.")
    return told
