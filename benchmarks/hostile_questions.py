"""Read mutated ONNX files and VNN-LIB properties, each in a process that may die of it, and count what came of them.

    python benchmarks/hostile_questions.py [--json] [--files 1000] [--seed 0]

Three networks are written as ONNX, and properties for them as VNN-LIB. Of every second trial the network is changed, up
to three bytes of it, of the others the property, up to three of its words (another word, one twice, none); every tenth
file is cut short. Both are read and the question is asked, for 20 sub-problems. A file may be refused with a UserError,
or be sound and have an answer; anything else (another exception, a process that died, 60 seconds, 4 GiB) is a failure,
and the exit code 1.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
import tempfile
from collections import Counter
from pathlib import Path

import numpy as np
import torch
from torch import nn

from hostile_artefacts import OUTCOMES, apart
from sparring import bounds
from sparring.deploy import to_onnx
from sparring.errors import UserError
from sparring.graph import GraphModule, from_onnx
from sparring.models import build

sys.path.insert(0, str(Path(__file__).parents[1]))  # the tests' property
from tests.docs.prepared import property_text

PLAIN = "( ) and or assert <= >= + - * X_0 Y_0 Y_9 X_99999999 1e9 1e-300 -1 0.5 declare-const Real"
WORDS = [*re.findall(r"\S+", PLAIN), "(" * 60, "9" * 70, "(or (<= Y_0 0) (<= Y_0 1))"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", action="store_true", help="print the tally as JSON")
    parser.add_argument("--files", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    torch.set_num_threads(1)
    generator, tally = np.random.default_rng(options.seed), Counter[str]()
    with tempfile.TemporaryDirectory() as folder:
        pairs = originals(Path(folder))
        for trial in range(options.files):
            network, text = mutant(*pairs[trial % len(pairs)], trial, generator)
            (Path(folder) / "m.onnx").write_bytes(network)
            (Path(folder) / "m.vnnlib").write_text(text)
            outcome = apart(Path(folder) / "m.onnx", outcome_of)
            tally[outcome] += 1
            if outcome not in ("refused", "sound"):
                kept = Path(tempfile.gettempdir()) / f"hostile-{trial}"
                kept.with_suffix(".onnx").write_bytes(network)
                kept.with_suffix(".vnnlib").write_text(text)
                print(f"{outcome}: kept as {kept}.onnx and .vnnlib", file=sys.stderr)
    result = {name: tally[name] for name in OUTCOMES}
    print(json.dumps(result) if options.json else ", ".join(f"{name} {count}" for name, count in result.items()))
    sys.exit(0 if tally["refused"] + tally["sound"] == options.files else 1)


def originals(folder: Path) -> list[tuple[bytes, str]]:
    """Return networks as ONNX, each with a property."""
    torch.manual_seed(0)
    networks: list[tuple[nn.Module, tuple[int, ...]]] = [
        (build("mlp", shape=(1, 4, 4), classes=3, mean=(0.1,), std=(0.3,), widths=(6, 6)), (1, 4, 4)),
        (build("lenet-5", shape=(1, 28, 28), classes=10, mean=(0.1,), std=(0.3,), width=0.25), (1, 28, 28)),
        (nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.ReLU(), nn.Flatten(), nn.Linear(8, 3)), (1, 4, 4)),
    ]
    found = []
    for model, shape in networks:
        path = to_onnx(model.eval(), folder / "original.onnx", shape=shape)
        classes = model(torch.zeros(2, *shape)).shape[1]
        found.append((path.read_bytes(), property_text(int(np.prod(shape)), classes)))
    return found


def mutant(network: bytes, text: str, trial: int, generator: np.random.Generator) -> tuple[bytes, str]:
    """Return both files, one of them changed."""
    if trial % 2:
        body = bytearray(network)
        for _ in range(generator.integers(1, 4)):
            body[generator.integers(0, len(body))] = generator.integers(0, 256)
        return bytes(body[: generator.integers(0, len(body))] if trial % 20 == 1 else body), text
    words = re.findall(r"[()]|[^\s()]+", text)
    for _ in range(generator.integers(1, 4)):
        where = generator.integers(0, len(words))
        words[where : where + generator.integers(0, 2)] = [WORDS[generator.integers(0, len(WORDS))]]
    return network, " ".join(words[: generator.integers(0, len(words))] if trial % 20 == 0 else words)


def outcome_of(path: Path) -> str:
    try:
        asked = bounds.read_vnnlib(path.with_suffix(".vnnlib"))
        model = GraphModule(from_onnx(path)).eval()
        bounds.verify_property(model, model.shape, asked, nodes=20, seconds=10.0)
    except UserError:
        return "refused"
    except Exception as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        return "raised"
    return "sound"


if __name__ == "__main__":
    main()
