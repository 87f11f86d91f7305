"""Take real architectures through every command, and say what works, what is refused and why, and what it takes.

    python benchmarks/models.py [--json] [--hubs] [--only NAME ...] [--commands NAME ...] [--docs] [--kept] [--again]

The networks are those of tests/architectures.py, which are written as torchvision, timm and Hugging Face write theirs;
with `--hubs` those libraries' own, small. Each is trained for a moment on patterns of its own. Every cell is a command
as a user types it, in a process of its own, on a factory, a file of weights and a small data set:

    works       exit code 0, and what it says holds (certify proves a share of the images at the stated eps, ...)
    vacuous     exit code 0, but certify proves no image
    refused     one of sparring's own refusals, in one sentence
    traceback   any other exception
    too long    more than --seconds of processor time

Cells are kept as they are done, those of the repository's networks in docs/results/models.jsonl, and taken from there
when the command is run again; `--again` runs the chosen ones again. `--docs` writes the table into docs/models.md,
`--kept` runs nothing. The exit code is 1 after a traceback or where something took too long.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import io
import json
import multiprocessing
import os
import re
import resource
import signal
import sys
import traceback
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from torch import nn

ROOT = Path(__file__).parents[1]
IMPORTED = ("sparring.cli._app", "sparring.report", "sparring.deploy", "sparring.bounds", "torch.export", "onnxscript")
PAGE, KEPT = ROOT / "docs" / "models.md", ROOT / "docs" / "results" / "models.jsonl"
CLASSES, SIDE, EPS = 10, 32, "0.0001"
OWN = """
from tests.architectures import ARCHITECTURES
globals().update(ARCHITECTURES)
"""
LIBRARY = '''
"""Networks of other libraries, small."""
import torch
from torch import nn
from sparring.models._hubs import _parted

def tv(name, **options):
    _parted("torchvision:" + name)
    from torchvision import models
    return models.get_model(name, weights=None, num_classes=10, **options)

def tm(name, **options):
    _parted("timm:" + name)
    import timm
    return timm.create_model(name, num_classes=10, **options)

def resnet18(): return tv("resnet18")
def resnet50(): return tv("resnet50")
def wide_resnet(): return tv("wide_resnet50_2")
def vgg16_bn(): return tv("vgg16_bn")
def densenet121(): return tv("densenet121")
def regnet_x(): return tv("regnet_x_400mf")
def regnet_y(): return tv("regnet_y_400mf")
def squeezenet(): return tv("squeezenet1_1")
def shufflenet(): return tv("shufflenet_v2_x0_5")
def mobilenet_v2(): return tv("mobilenet_v2", width_mult=0.5)
def mobilenet_v3(): return tv("mobilenet_v3_small")
def efficientnet_b0(): return tv("efficientnet_b0")
def efficientnet_lite0(): return tm("efficientnet_lite0")
def convnext(): return tm("convnext_atto")
def vit(): return tm("vit_tiny_patch16_224", img_size=32, patch_size=8, depth=2)
def deit(): return tm("deit_tiny_patch16_224", img_size=32, patch_size=8, depth=2)
def swin():
    _parted("torchvision:swin_t")
    from torchvision.models import SwinTransformer
    return SwinTransformer([2, 2], 24, [2, 2], [2, 4], [4, 4], num_classes=10)
def mixer():
    _parted("timm:mixer_s32_224")
    from timm.models.mlp_mixer import MlpMixer
    return MlpMixer(10, 32, patch_size=8, num_blocks=2, embed_dim=64)
def torchvision_vit():
    _parted("torchvision:vit_b_16")
    from torchvision.models import VisionTransformer
    return VisionTransformer(32, 8, 2, 2, 48, 96, num_classes=10)
def hugging_face_vit():
    _parted("torchvision:vit_b_16")
    from transformers import ViTConfig, ViTForImageClassification
    sizes = dict(hidden_size=48, num_hidden_layers=2, num_attention_heads=2, intermediate_size=96)
    return ViTForImageClassification(ViTConfig(**sizes, image_size=32, patch_size=8, num_labels=10))

SIDES = {"squeezenet": 48}
'''
LIBRARY_NAMES = [line.split("(")[0][4:] for line in LIBRARY.splitlines() if line.startswith("def ")][2:]


@dataclass(frozen=True)
class Cell:
    """Hold how a command ended on a network: outcome, the sentence or number that says so, and processor time."""

    network: str
    command: str
    outcome: str
    detail: str
    seconds: float
    side: int
    parameters: int


def commands(name: str, place: Path) -> dict[str, Sequence[str]]:
    """Return the words of every command for a network whose weights are in a file."""
    model, data = f"nets:{name}@{place / name}.safetensors", ("--data", str(place / f"{name}.npz"))
    few = ("--set", "epochs=1", "--set", "batch_size=16", "--set", "augment=false", "--quiet", *data)

    def out(what: str, ending: str = ".safetensors") -> str:
        return str(place / f"{name}-{what}{ending}")

    plan = (
        "sparsities=[0.9]",
        "seeds=1",
        "recipe.epochs=1",
        "recipe.lr=0.001",
        "finetune.epochs=1",
        "recipe.batch_size=16",
    )
    pruned = f"nets:{name}@{out('pruned')}" if Path(out("pruned")).exists() else model
    study = ("study", str(place / f"{name}.toml"), "--model", model, "--out", out("study", ""), "--workers", "0")
    return {
        "attack": ("attack", model, *data, "--images", "8", "--checks", "4", "--eps", "0.01"),
        "prune": ("prune", model, "--out", out("pruned"), "--sparsity", "0.9", *few),
        "dns": ("prune", model, "--out", out("dns"), "--sparsity", "0.8", "--set", "method=dns", *few),
        "2:4": ("prune", model, "--out", out("nm"), "--sparsity", "0.5", "--set", 'structure="2:4"', *few),
        "channels": ("prune", model, "--out", out("ch"), "--sparsity", "0.5", "--set", 'structure="channels"', *few),
        "certify": ("certify", model, *data, "--images", "2", "--eps", EPS, "--seconds", "60", "--json"),
        "export": ("export", pruned, out("packed", ".sparring"), *data, "--images", "4", "--eps", "0.01"),
        "onnx": ("export", pruned, out("open", ".onnx"), *data, "--images", "4", "--eps", "0.01"),
        "bench": ("bench", pruned, *data, "--batches", "1", "--rounds", "2"),
        "study": (*study, *(word for change in plan for word in ("--set", change))),
    }


PLAN = """
data = "{data}"
[[pruning]]
method = "one-shot"
[[attacks]]
name = "fgsm"
norm = "linf"
eps = [0.01]
images = 8
"""


def fit_(model: nn.Module, x: torch.Tensor, y: torch.Tensor, *, steps: int = 150) -> None:
    """Train on images with noise, new in every step, until the loss is small, so that margins are those of a network.

    Statistics of batch normalisation are then those of the images alone.
    """
    optimizer, generator = torch.optim.Adam(model.parameters(), lr=1e-3), torch.Generator().manual_seed(0)
    for _ in range(steps):
        noise = 0.2 * torch.rand(x.shape, generator=generator) - 0.1
        logits = model.train()((x + noise).clamp(0, 1))
        loss = nn.functional.cross_entropy(getattr(logits, "logits", logits), y)
        if loss.item() < 0.05:
            break
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.reset_running_stats()
                module.momentum = None  # an average of all that it sees
        model(x)


def prepare(name: str, place: Path) -> tuple[int, int]:
    """Write a network's data, plan and weights, trained for a moment under a seed; what is there already is kept.

    Return the side of its images and how many parameters it has.
    """
    weights = place / f"{name}.safetensors"
    torch.manual_seed(0)
    model, side = built(name)
    if not weights.exists():
        x, y = draw(place / f"{name}.npz", side)
        (place / f"{name}.toml").write_text(PLAN.format(data=place / f"{name}.npz"))
        fit_(model, x, y)
        save_file({key: value.contiguous().clone() for key, value in model.state_dict().items()}, weights)
    return side, sum(parameter.numel() for parameter in model.parameters())


def built(name: str) -> tuple[nn.Module, int]:
    """Return a network with fresh weights, and the side of its images."""
    import nets  # type: ignore[import-not-found]

    sides = getattr(nets, "SIDES", None)  # of networks that other libraries make
    if sides is None:
        return getattr(nets, name)((3, SIDE, SIDE), CLASSES), SIDE
    return getattr(nets, name)(), sides.get(name, SIDE)


def draw(path: Path, side: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Write a data set of noisy patterns, one a class, and return its images for training, floats, and labels."""
    rng, sets = np.random.default_rng(0), dict[str, Any]()
    patterns = rng.integers(0, 180, (CLASSES, side, side, 3))
    for split, count in (("train", 64), ("test", 20)):
        y = np.arange(count) % CLASSES
        noise = rng.integers(0, 60, (count, side, side, 3))
        sets |= {f"x_{split}": (patterns[y] + noise).astype(np.uint8), f"y_{split}": y}
    np.savez(path, **sets)
    x = torch.from_numpy(sets["x_train"]).permute(0, 3, 1, 2).float() / 255
    return x, torch.from_numpy(sets["y_train"])


def ended(words: Sequence[str]) -> tuple[str, str]:
    """Run a command in this process; return its outcome and what it said last."""
    from sparring.cli import main

    sys.argv = ["sparring", "--traceback", *words]
    out, err, code = io.StringIO(), io.StringIO(), 0
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            main()
        except SystemExit as stop:
            code = stop.code if isinstance(stop.code, int) else int(stop.code is not None)
        except BaseException:
            code = 70
            traceback.print_exc(file=err)
    said = [line.strip() for line in (err if code else out).getvalue().splitlines() if line.strip()] or [""]
    if code == 0:
        return judged(words[0], out.getvalue(), said[-1])
    if code == 2 and re.search(r"^sparring\.errors\.\w+: ", err.getvalue(), re.M):
        return "refused", said[-1].removeprefix("error: ")
    failed = [line for line in (out.getvalue() + err.getvalue()).splitlines() if "fail" in line or "Error" in line]
    return "traceback", f"{(failed or said)[-1].strip()} ({code})"


def judged(command: str, said: str, last: str) -> tuple[str, str]:
    """Return whether what a command that went through says is of worth."""
    if command == "certify":
        shares = json.loads(said)["certified_accuracy"]
        return ("works" if any(shares.values()) else "vacuous"), f"certified: {shares}"
    return "works", "" if last.startswith("{") else last


def ran(name: str, command: str, place: Path, seconds: int) -> tuple[str, str, float]:
    """Run one command on one network in a process of its own; return its outcome, what it said, and processor time."""
    queue, before = multiprocessing.get_context("fork").SimpleQueue(), used()

    def work() -> None:
        resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds + 5))
        torch.set_num_threads(1)
        os.chdir(place)
        queue.put(ended(commands(name, place)[command]))

    process = multiprocessing.get_context("fork").Process(target=work)
    process.start()
    process.join()
    if process.exitcode == -signal.SIGXCPU:
        return "too long", f"more than {seconds} s", used() - before
    outcome, detail = ("traceback", f"exit code {process.exitcode}") if queue.empty() else queue.get()
    return outcome, detail.replace(f"{place}/", ""), used() - before  # a record is the same in every folder


def used() -> float:
    """Return the processor time of processes that ended."""
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def run(names: Sequence[str], wanted: Sequence[str], options: argparse.Namespace) -> list[Cell]:
    """Return a cell for every network and command, from the file of those that are done where it is there."""
    place, kept = options.out.resolve(), options.out / "cells.jsonl" if options.hubs else KEPT
    cells = [Cell(**json.loads(line)) for line in kept.read_text().splitlines()] if kept.exists() else []
    chosen = {(name, command) for name in names for command in wanted if options.again}
    done = {(cell.network, cell.command): cell for cell in cells if (cell.network, cell.command) not in chosen}
    for name in names:
        missing = [command for command in wanted if (name, command) not in done and not options.kept]
        about = prepare(name, place) if missing else ()
        for command in missing:
            cell = Cell(name, command, *ran(name, command, place, options.seconds), *about)
            done[name, command] = cell
            kept.write_text("".join(json.dumps(asdict(one)) + "\n" for one in sorted(done.values(), key=_place)))
            if not options.json:
                print(
                    f"{name:<20}{command:<10}{cell.outcome:<10}{cell.seconds:6.1f} s  {cell.detail[:150]}", flush=True
                )
    return [done[name, command] for name in names for command in wanted if (name, command) in done]


def _place(cell: Cell) -> tuple[str, str]:
    return cell.network, cell.command


def table(names: Sequence[str], heads: Sequence[str], cells: Sequence[Cell]) -> str:
    """Return the matrix in Markdown: seconds where a command works, and below it what is refused and why."""
    found = {(cell.network, cell.command): cell for cell in cells}
    rows = [f"| network | image | parameters | {' | '.join(heads)} |", f"|---|---|{'---:|' * (1 + len(heads))}"]
    for name in names:
        row = [found.get((name, head)) for head in heads]
        model, side = built(name)
        weights = sum(parameter.numel() for parameter in model.parameters())
        shown = [("–" if c is None else f"{c.seconds:.0f} s" if c.outcome == "works" else c.outcome) for c in row]
        rows.append(f"| {name} | 3×{side}×{side} | {weights:,} | {' | '.join(shown)} |")
    reasons: dict[str, list[str]] = {}
    for cell in cells:
        if cell.outcome not in ("works", "vacuous"):
            reasons.setdefault(f"`{cell.command}`, {cell.outcome}: {cell.detail}", []).append(cell.network)
    why = [f"- {', '.join(who)}: {reason}" for reason, who in reasons.items()]
    return "\n".join([*rows, *(["", *why] if why else [])])


def write_page(names: Sequence[str], heads: Sequence[str], cells: Sequence[Cell]) -> None:
    """Put the matrix between its marks in docs/models.md."""
    counts = Counter(cell.outcome for cell in cells)
    total = f"{sum(cell.seconds for cell in cells) / 60:.0f} minutes of processor time in all"
    counts["not run (–)"] = len(names) * len(heads) - len(cells)
    said = "Cells: " + ", ".join(f"{outcome} {count}" for outcome, count in counts.most_common() if count)
    first, last = "<!-- matrix: written by benchmarks/models.py -->", "<!-- end of matrix -->"
    before, rest = PAGE.read_text().split(first)
    page = f"{before}{first}\n\n{said}; {total}.\n\n{table(names, heads, cells)}\n\n{last}{rest.split(last)[1]}"
    PAGE.write_text(page)


def main() -> int:
    """Print a row for every cell, then the counts."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--hubs", action="store_true", help="timm's, torchvision's and Hugging Face's own networks")
    parser.add_argument("--only", nargs="*", default=[])
    parser.add_argument("--commands", nargs="*", default=[])
    parser.add_argument("--seconds", type=int, default=120)
    parser.add_argument("--kept", action="store_true", help="run nothing; print the stored results")
    parser.add_argument("--again", action="store_true", help="run the chosen cells again")
    parser.add_argument("--docs", action="store_true", help="write the table into docs/models.md")
    parser.add_argument("--out", type=Path, help="[default: out/models, or out/hubs]")
    options = parser.parse_args()
    options.out = options.out or Path("out/hubs" if options.hubs else "out/models")
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "nets.py").write_text(LIBRARY if options.hubs else OWN)
    sys.path[:0] = [str(options.out.resolve()), str(ROOT)]
    torch.set_num_threads(1)
    for module in IMPORTED:  # once, not in every cell
        importlib.import_module(module)
    from tests.architectures import ARCHITECTURES

    names = [n for n in (LIBRARY_NAMES if options.hubs else ARCHITECTURES) if not options.only or n in options.only]
    wanted = [c for c in commands("", options.out) if not options.commands or c in options.commands]
    cells = run(names, wanted, options)
    if options.docs:
        write_page(names, wanted, cells)
    if options.json:
        print(json.dumps([asdict(one) for one in cells], indent=1))
    else:
        print(dict(Counter(one.outcome for one in cells)))
    return int(any(one.outcome in ("traceback", "too long") for one in cells))


if __name__ == "__main__":
    sys.exit(main())
