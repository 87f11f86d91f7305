"""Open mutated artefacts, each in a process that may die of it, and count what came of them.

    python benchmarks/hostile_artefacts.py [--json] [--files 1000] [--seed 0]

Networks are packed (residual and convolutional ones, one with activation sparsity, one without zeros, two with dense
parts, each also with activations on bytes) and their files changed: up to three bytes of the header or of
anything, every tenth file cut short, half of all with a checksum made right again, so that the checks behind it are
reached. What opens is run by numpy and by the kernels, on one, three and 19 images, with guard pages around every
buffer. A file may be refused with a UserError, or be a sound network whose runs agree (on bytes to the last bit, unless
parts are dense: then what one rounding changes); anything else (another exception, a process that died, 60 seconds,
4 GiB) is a failure, and the exit code 1. The files must be sound before they are changed. `SPARRING_CPU=avx2` or `sse`
tries those kernels.
"""

from __future__ import annotations

import argparse
import ctypes
import faulthandler
import hashlib
import json
import os
import resource
import signal
import sys
import tempfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import nn

from sparring import deploy
from sparring.deploy._reference import run_reference
from sparring.deploy.rounding._reference import run_rounded
from sparring.errors import UserError
from sparring.models import build
from sparring.sparsity import TopK

sys.path.insert(0, str(Path(__file__).parent))
sys.path.insert(0, str(Path(__file__).parents[1]))  # the tests' networks
from tests.zoo import ZOO

from guarded import compiled, guard_

OUTCOMES = ("refused", "sound", "disagreed", "raised", "died")
SECONDS, BYTES = 60, 4 << 30


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", action="store_true", help="print the tally as JSON")
    parser.add_argument("--files", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        tally = try_all(originals(Path(folder)), options.files, options.seed, Path(folder) / "mutant.sparring")
    if options.json:
        print(json.dumps(tally))
    else:
        print(", ".join(f"{name} {count}" for name, count in tally.items()))
    sys.exit(1 if tally["disagreed"] + tally["raised"] + tally["died"] else 0)


def originals(folder: Path) -> list[bytes]:
    """Return the files that are mutated."""
    generator = torch.Generator().manual_seed(0)
    residual = build("resnet-32", shape=(3, 32, 32), classes=10, mean=(0.5,) * 3, std=(0.2,) * 3, width=0.125)
    lenet = build("lenet-5", shape=(1, 28, 28), classes=10, mean=(0.1,), std=(0.3,))
    winners = nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), TopK(0.8), nn.Flatten(), nn.Linear(256, 10))
    torch.manual_seed(0)
    attention, gated = ZOO["attention"](), ZOO["squeeze-excite"]()
    layers = [nn.Conv2d(1, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 40, 3, 3), nn.ReLU(), nn.Conv2d(40, 16, 3, 2, 1)]
    full = nn.Sequential(*layers, nn.Flatten(), nn.Linear(16, 10))
    files = []
    for name, model, shape, values in (
        ("attention", attention, (1, 8, 8), "fp32"),
        ("gated", gated, (1, 8, 8), "int8"),
        ("residual", residual, (3, 32, 32), "fp32"),
        ("lenet", lenet, (1, 28, 28), "int8"),
        ("winners", winners, (1, 8, 8), "fp16"),
        ("full", full, (1, 8, 8), "fp32"),
    ):
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.dim() > 1 and name != "full":
                    parameter.mul_(torch.rand(parameter.shape, generator=generator) < 0.1)
        images = torch.rand(16, *shape, generator=generator)
        for calibrate in (None, images):
            numbers, path = values if calibrate is None else "int8", folder / f"{name}.sparring"
            deploy.export(model.eval(), path, shape=shape, values=numbers, calibrate=calibrate)
            deploy.load(path)(np.zeros((1, *shape), np.float32))  # its kernels are made once, here
            files.append(path.read_bytes())
    return files


def mutate(original: bytes, trial: int, generator: np.random.Generator) -> bytes:
    """Return a changed file; every second trial has a right checksum."""
    header = 24 + int.from_bytes(original[16:24], "little")
    body = bytearray(original[:-32])
    for _ in range(generator.integers(1, 4)):
        where = generator.integers(0, header if trial % 4 < 2 else len(body))
        body[where] = generator.integers(0, 256)
    if trial % 10 == 0:
        del body[generator.integers(0, len(body)) :]
    return bytes(body) + (hashlib.sha256(body).digest() if trial % 2 else original[-32:])


def try_all(files: list[bytes], count: int, seed: int, path: Path) -> dict[str, int]:
    """Open `count` mutants and count the outcomes."""
    generator, tally, allocator = np.random.default_rng(seed), Counter[str](), compiled()
    assert apart(path, past_the_end, allocator) == "died", "the guard pages do not guard"
    for original in files:
        path.write_bytes(original)
        assert apart(path, outcome_of, allocator) == "sound"
    for trial in range(count):
        mutant = mutate(files[trial % len(files)], trial // len(files), generator)
        path.write_bytes(mutant)
        outcome = apart(path, outcome_of, allocator)
        tally[outcome] += 1
        if outcome not in ("refused", "sound"):
            kept = Path(tempfile.gettempdir()) / f"hostile-{trial}.sparring"
            kept.write_bytes(mutant)
            print(f"{outcome}: kept as {kept}", file=sys.stderr)
    return {name: tally[name] for name in OUTCOMES}


def apart(path: Path, outcome_of: Callable[[Path], str], allocator: ctypes.CDLL | None = None) -> str:
    """Open a file in a process of its own and return the outcome."""
    child = os.fork()
    if child == 0:
        faulthandler.disable()  # a child that dies is an outcome, and pytest would print it
        signal.alarm(SECONDS)
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        base = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (base + BYTES, base + BYTES))
        if allocator is not None:
            guard_(allocator)
        os._exit(OUTCOMES.index(outcome_of(path)))
    _, status = os.waitpid(child, 0)
    return OUTCOMES[os.WEXITSTATUS(status)] if os.WIFEXITED(status) else "died"


def past_the_end(path: Path) -> str:
    """Write one number behind an array."""
    array = np.zeros(1000, np.float32)
    ctypes.memset(array.ctypes.data + array.nbytes, 0, 4)
    return "sound"


def outcome_of(path: Path) -> str:
    try:
        packed = deploy.load(path)
        x = np.random.default_rng(0).random((19, *packed.program.shape), np.float32)
        with np.errstate(all="ignore"):
            found = np.concatenate([packed(x[:1]), packed(x[1:4]), packed(x)])
            reference = run_rounded if packed.program.rounding else run_reference
            expected = reference(packed.program, np.concatenate([x[:4], x]))
    except UserError:
        return "refused"
    except Exception as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        return "raised"
    if packed.program.rounding and (found == expected).all():
        return "sound"
    # Weights that a mutant makes huge round to infinity, and what comes of infinities may differ.
    size = np.abs(expected).max()
    finite = np.isfinite(expected).all() and size < 1e30
    rtol, atol = (0.05, 0.05) if packed.program.rounding and not packed.program.whole else (1e-3, 1e-4)
    return "sound" if not finite or np.allclose(found, expected, rtol=rtol, atol=atol * size) else "disagreed"


if __name__ == "__main__":
    main()
