"""Speed against sparsity: `python benchmarks/speed.py RECORD.json [--plot FIGURE.svg] [--networks lenet-5,...]`.

With `--networks`, time the networks of `benchmarks/deploy.py` at several sparsities in the sparse kernels, and with all
their weights in the other engines, in turns and in processor time on one core, and add them to the record. `--plot`
draws what the record has: how many times as fast as ONNX Runtime in float32.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import matplotlib
import numpy as np
import torch
from matplotlib import pyplot

from deploy import NETWORKS, checked_error, sparse_network
from sparring import deploy
from sparring.deploy.timing._clock import processor
from sparring.deploy.timing._engines import Network, Opened, open_engines
from sparring.devices import CPU

SPARSITIES = (0.8, 0.9, 0.95, 0.98, 0.99)
RIVALS = ("torch", "torch.compile", "onnxruntime", "onnxruntime int8", "openvino", "openvino bf16", "openvino int8")


def timed(name: str, rounds: int) -> dict[str, Any]:
    """Return the milliseconds of a network's largest batch, by sparsity and by engine."""
    kind = NETWORKS[name]
    batch, images = max(kind.batches), torch.rand(64, *kind.shape, generator=torch.Generator().manual_seed(0))
    x = images[:batch].contiguous().numpy()
    with tempfile.TemporaryDirectory() as folder:
        dense = Network(sparse_network(kind, 0.0), kind.shape, Path(folder), images, CPU)
        rivals = {e: found.run for e, found in open_engines(dense, RIVALS) if isinstance(found, Opened)}
        packed = {}
        for sparsity in SPARSITIES:
            model = sparse_network(kind, sparsity)
            packed[sparsity] = deploy.load(
                deploy.export(model, Path(folder) / f"{sparsity}.sparring", shape=kind.shape)
            )
            checked_error(packed[sparsity](x), model, x)
        functions: list[Callable[[np.ndarray], Any]] = [*packed.values(), *rivals.values()]
        runs = [partial(run, x) for run in functions]
        times = [1e3 * t.median for t in deploy.interleaved(runs, rounds=rounds, clock=time.process_time)]
    return {
        "network": name,
        "batch": batch,
        "processor": processor(),
        "sparse": dict(zip(map(str, packed), times, strict=False)),
        "dense": dict(zip(rivals, times[len(packed) :], strict=True)),
    }


def draw(rows: list[dict[str, Any]], path: Path) -> None:
    """Draw one panel for each network: the sparse kernels as a curve, the other engines as lines."""
    matplotlib.rcParams |= {"svg.hashsalt": "speed", "font.size": 9}
    figure, panels = pyplot.subplots(1, len(rows), figsize=(2.6 * len(rows), 3.2), layout="constrained")
    engines = list(dict.fromkeys(engine for row in rows for engine in row["dense"]))
    for row, panel in zip(rows, np.atleast_1d(panels), strict=True):
        unit = row["dense"]["onnxruntime"]
        kept = [1 - float(s) for s in row["sparse"]]
        panel.plot(kept, [unit / t for t in row["sparse"].values()], "ko-", label="sparse kernels", markersize=3)
        for number, engine in enumerate(engines):
            if engine in row["dense"]:
                panel.axhline(unit / row["dense"][engine], color=f"C{number}", label=engine, linewidth=1)
        panel.set(xscale="log", yscale="log", title=f"{row['network']}, batch {row['batch']}", xlabel="sparsity")
        panel.set_xticks(kept, [f"{float(s):.0%}" for s in row["sparse"]], fontsize=7)
        panel.minorticks_off()
        panel.yaxis.set_major_formatter("{x:g}")
        panel.invert_xaxis()
    np.atleast_1d(panels)[0].set_ylabel("speed, ONNX Runtime in float32 = 1")
    figure.legend(
        *np.atleast_1d(panels)[0].get_legend_handles_labels(), loc="outside lower center", ncols=6, frameon=False
    )
    figure.savefig(path, metadata={"Date": None})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("record", type=Path)
    parser.add_argument("--plot", type=Path)
    parser.add_argument("--networks", default="")
    parser.add_argument("--rounds", type=int, default=15)
    given = parser.parse_args()
    torch.set_num_threads(1)
    rows = json.loads(given.record.read_text()) if given.record.exists() else []
    for name in filter(None, given.networks.split(",")):
        rows = [*(row for row in rows if row["network"] != name), timed(name, given.rounds)]
        given.record.write_text(json.dumps(rows, indent=1) + "\n")
    if given.plot is not None:
        draw(rows, given.plot)


if __name__ == "__main__":
    main()
