"""Each cap on the processor's instructions takes effect: the last bits of a product change."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

from sparring.deploy.kernels import _native as native

FOLDER = Path(__file__).parents[3] / ".ci"


def settings(cap: str) -> dict[str, str]:
    """Return the variables that .ci/capped sets for a cap."""
    lines = (FOLDER / f"{cap}.env").read_text().splitlines()
    return dict(line.split("=", 1) for line in lines if line and not line.startswith("#"))


CAPS = {"best": {}, "avx2": settings("avx2"), "sse": settings("sse")}

PRODUCTS = """
import hashlib, json
import numpy as np, torch
from torch import nn
from sparring import deploy

torch.set_num_threads(1)
source = np.random.default_rng(0)
a, b = (source.normal(size=size).astype(np.float32) for size in ((300, 700), (700, 200)))
x = torch.from_numpy(source.random((16, 8, 14, 14), np.float32))
torch.manual_seed(0)
net = nn.Sequential(nn.Flatten(), nn.Linear(8 * 14 * 14, 50), nn.ReLU(), nn.Linear(50, 10)).eval()
packed = deploy.pack(net, shape=(8, 14, 14))
with torch.no_grad():
    products = {
        "torch": torch.from_numpy(a).softmax(1),
        "MKL": torch.from_numpy(a) @ torch.from_numpy(b),
        "oneDNN": nn.Conv2d(8, 16, 3)(x),
        "OpenBLAS": a @ b,
        "kernels": np.concatenate([packed(x), *(packed(x[i : i + 1]) for i in range(4))]),
    }
print(json.dumps({name: hashlib.sha256(np.asarray(p).tobytes()).hexdigest() for name, p in products.items()}))
"""


@cache
def _bits(cap: str) -> dict[str, str]:
    known = {name for variables in CAPS.values() for name in variables}
    environment = {key: value for key, value in os.environ.items() if key not in known} | CAPS[cap]
    run = subprocess.run([sys.executable, "-c", PRODUCTS], capture_output=True, text=True, env=environment, check=True)
    found: dict[str, str] = json.loads(run.stdout)
    return found


def _host_has(feature: str) -> bool:
    return native.native_available() and feature in native._llvm().get_host_cpu_features().flatten().split(",")


@pytest.mark.skipif(not _host_has("+avx2"), reason="this processor has no AVX2, so nothing that a cap could take away")
@pytest.mark.parametrize("product", ["torch", "MKL", "oneDNN", "OpenBLAS", "kernels"])
def test_each_cap_changes_the_bits_of_a_product(product: str) -> None:
    assert _bits("sse")[product] != _bits("avx2")[product]
    # On other makers' processors MKL stops at AVX2 by itself, and only MKL_CBWR takes it further down.
    if _host_has("+avx512f") and (product != "MKL" or "GenuineIntel" in Path("/proc/cpuinfo").read_text()):
        assert _bits("avx2")[product] != _bits("best")[product]


def test_a_cap_that_is_none_is_refused() -> None:
    code = "from sparring.deploy.kernels._native import host_lanes; host_lanes()"
    environment = {**os.environ, "SPARRING_CPU": "avx3"}
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=False)
    assert run.returncode and "SPARRING_CPU must be avx2 or sse, not 'avx3'" in run.stderr
