"""Take real architectures through every command, and say what works and what is refused.

    python benchmarks/models.py [--json] [--own] [--only NAME ...] [--commands NAME ...] [--workers 2] [--seconds 120]

The networks are timm's, torchvision's and Hugging Face's own, at the smallest input that they take and few layers, with
weights of a short training; with `--own`, or where a package is missing, those of
this repository (tests/zoo.py) stand in. Every cell is a command as a user types it, in a process of its own, on a
factory, a file of weights and a small data set:

    works     exit code 0, and what it says holds (the export is smaller, the certificate covers an image, ...)
    vacuous   exit code 0, but certify covers no image at the stated eps
    refused   exit code 2 and one sentence
    trouble   any other end: a traceback, a signal, more than --seconds

The exit code is 1 if there is trouble.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import io
import json
import multiprocessing
import os
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from torch import nn

ROOT = Path(__file__).parents[1]
CLASSES, EPS = 10, "0.0004"
LIBRARY = '''
"""Networks of other libraries, small."""
import torch
from torch import nn
from sparring.models._hubs import HUBS, _parted

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
def mixer(): return tm("mixer_s32_224", img_size=32, patch_size=8, num_blocks=2, embed_dim=64)
def torchvision_vit():
    _parted("torchvision:vit_b_16")
    from torchvision.models import VisionTransformer
    return VisionTransformer(32, 8, 2, 2, 48, 96, num_classes=10)
def hugging_face_vit():
    _parted("torchvision:vit_b_16")
    from transformers import ViTConfig, ViTForImageClassification
    sizes = dict(hidden_size=48, num_hidden_layers=2, num_attention_heads=2, intermediate_size=96)
    return ViTForImageClassification(ViTConfig(**sizes, image_size=32, patch_size=8, num_labels=10))

class Rows(nn.Module):
    def __init__(self):
        super().__init__()
        self.lstm, self.head = nn.LSTM(96, 32, batch_first=True), nn.Linear(32, 10)
    def forward(self, x):
        return self.head(self.lstm(x.permute(0, 2, 1, 3).flatten(2))[0][:, -1])
def lstm(): return Rows()

class Branches(nn.Module):
    def __init__(self):
        super().__init__()
        def branch(kernel):
            layers = [nn.Conv2d(3, 8, kernel, 2, kernel // 2), nn.BatchNorm2d(8), nn.ReLU(), nn.AvgPool2d(2)]
            return nn.Sequential(*layers)
        self.left, self.right, self.head = branch(3), branch(5), nn.Linear(16 * 64, 10)
    def forward(self, x):
        return self.head(torch.cat([self.left(x), self.right(x)], 1).flatten(1))
def two_branches(): return Branches()
'''
SIZES = {"vgg16_bn": 32, "densenet121": 32, "squeezenet": 48, "swin": 32}
LIBRARY_NAMES = [line.split("(")[0][4:] for line in LIBRARY.splitlines() if line.startswith("def ")][2:]


@dataclass(frozen=True)
class Cell:
    """Hold how a command ended on a network: outcome, the sentence or number that says so, and seconds."""

    network: str
    command: str
    outcome: str
    detail: str
    seconds: float


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
    study = ("study", str(place / "plan.toml"), "--model", model, "--out", out("study", ""), "--workers", "0")
    return {
        "attack": ("attack", model, *data, "--images", "8", "--checks", "4", "--eps", "0.01"),
        "prune": ("prune", model, "--out", out("pruned"), "--sparsity", "0.9", *few),
        "dns": ("prune", model, "--out", out("dns"), "--sparsity", "0.8", "--set", "method=dns", *few),
        "2:4": ("prune", model, "--out", out("nm"), "--sparsity", "0.5", "--set", 'structure="2:4"', *few),
        "channels": ("prune", model, "--out", out("ch"), "--sparsity", "0.5", "--set", 'structure="channels"', *few),
        "certify": ("certify", model, *data, "--images", "2", "--eps", EPS, "--method", "interval", "--json"),
        "export": ("export", model, out("packed", ".sparring"), *data, "--images", "4", "--eps", "0.01"),
        "onnx": ("export", model, out("open", ".onnx"), *data, "--images", "4", "--eps", "0.01"),
        "bench": ("bench", model, *data, "--batches", "1", "--rounds", "2"),
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


def fit_(model: nn.Module, x: torch.Tensor, y: torch.Tensor, *, steps: int = 80) -> None:
    """Train until three quarters of the images are right, so that there is something to lose."""
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    for _ in range(steps):
        logits = model.train()(x)
        logits = getattr(logits, "logits", logits)
        if float((logits.argmax(1) == y).float().mean()) > 0.75:
            break
        optimizer.zero_grad()
        nn.functional.cross_entropy(logits, y).backward()
        optimizer.step()
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.reset_running_stats()
                module.momentum = None  # an average of all that it sees
        model(x)


def prepare(name: str, place: Path) -> None:
    """Write a network's data and weights: drawn under a seed, its statistics those of the images."""
    import nets  # type: ignore[import-not-found]

    side, channels = SIZES.get(name, 32), getattr(nets, "CHANNELS", 3)
    rng = np.random.default_rng(0)
    sets: dict[str, Any] = {}
    patterns = rng.integers(0, 180, (CLASSES, side, side, channels))
    for split, count in (("train", 64), ("test", 20)):
        y = np.arange(count) % CLASSES
        noise = rng.integers(0, 60, (count, side, side, channels))
        sets |= {f"x_{split}": (patterns[y] + noise).astype(np.uint8), f"y_{split}": y}
    np.savez(place / f"{name}.npz", **sets)
    torch.manual_seed(0)
    model: nn.Module = getattr(nets, name)()
    x = torch.from_numpy(sets["x_train"]).permute(0, 3, 1, 2).float() / 255
    fit_(model, x, torch.from_numpy(sets["y_train"]))
    state = {key: value.contiguous().clone() for key, value in model.state_dict().items()}
    save_file(state, place / f"{name}.safetensors")


def ended(words: Sequence[str]) -> tuple[str, str]:
    """Run a command in this process; return its outcome and what it said last."""
    from sparring.cli import main

    sys.argv = ["sparring", *words]
    out, err = io.StringIO(), io.StringIO()
    code: object = 0
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            main()
        except SystemExit as stop:
            code = stop.code or 0
        except BaseException:
            code = traceback.format_exc()
    said = [line for line in (err.getvalue() if code else out.getvalue()).splitlines() if line.strip()]
    last = (said or [""])[-1].strip()
    if code == 0:
        return judged(words[0], out.getvalue(), last)
    refused = code == 2 and "Traceback" not in err.getvalue()
    said = [line for line in (out.getvalue() + err.getvalue()).splitlines() if "fail" in line or "error" in line]
    return ("refused" if refused else "trouble"), f"{(said or [last])[-1]} ({code})"


def judged(command: str, said: str, last: str) -> tuple[str, str]:
    """Return whether what a command that went through says is of worth."""
    if command == "certify":
        shares = json.loads(said)["certified_accuracy"]
        return ("works" if any(shares.values()) else "vacuous"), f"certified: {shares}"
    return "works", last


def cell(name: str, command: str, place: Path, seconds: float) -> Cell:
    """Run one command on one network in a process of its own."""
    queue, began = multiprocessing.get_context("fork").SimpleQueue(), time.monotonic()

    def work() -> None:
        torch.set_num_threads(1)
        os.chdir(place)
        queue.put(ended(commands(name, place)[command]))

    process = multiprocessing.get_context("fork").Process(target=work)
    process.start()
    process.join(seconds)
    if process.is_alive():
        process.kill()
        process.join()
        return Cell(name, command, "trouble", f"more than {seconds:g} s", seconds)
    outcome, detail = ("trouble", f"exit code {process.exitcode}") if queue.empty() else queue.get()
    return Cell(name, command, outcome, detail, time.monotonic() - began)


@contextlib.contextmanager
def workplace(own: bool) -> Iterator[tuple[Path, list[str]]]:
    """Make a folder with the module of factories, and yield it with the networks' names."""
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        if own:
            sys.path.insert(0, str(ROOT))
            from tests.zoo import ZOO

            names = [name.replace("-", "_") for name in ZOO]
            lines = [f"def {n.replace('-', '_')}(): return ZOO[{n!r}]()" for n in ZOO]
            text = "from tests.zoo import ZOO\nCHANNELS = 1\n" + "\n".join(lines)
        else:
            names, text = LIBRARY_NAMES, LIBRARY
        (place / "nets.py").write_text(text)
        sys.path.insert(0, str(place))
        yield place, names


def run(
    own: bool, only: Sequence[str], wanted: Sequence[str], seconds: float, show: Callable[[Cell], None]
) -> list[Cell]:
    """Return a cell for every network and command."""
    cells = []
    with workplace(own) as (place, names):
        for name in [n for n in names if not only or n in only]:
            try:
                prepare(name, place)
            except Exception as error:
                cells.append(Cell(name, "build", "trouble", f"{type(error).__name__}: {error}", 0.0))
                show(cells[-1])
                continue
            (place / "plan.toml").write_text(PLAN.format(data=place / f"{name}.npz"))
            for command in commands(name, place):
                if not wanted or command in wanted:
                    cells.append(cell(name, command, place, seconds))
                    show(cells[-1])
    return cells


def main() -> int:
    """Print a row for every cell, then the counts."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--own", action="store_true", help="the networks of this repository")
    parser.add_argument("--only", nargs="*", default=[])
    parser.add_argument("--commands", nargs="*", default=[])
    parser.add_argument("--seconds", type=float, default=120)
    options = parser.parse_args()
    own = options.own or importlib.util.find_spec("timm") is None or importlib.util.find_spec("torchvision") is None

    def show(one: Cell) -> None:
        if not options.json:
            print(
                f"{one.network:<20}{one.command:<10}{one.outcome:<9}{one.seconds:6.1f} s  {one.detail[:150]}",
                flush=True,
            )

    cells = run(own, options.only, options.commands, options.seconds, show)
    if options.json:
        print(json.dumps([asdict(one) for one in cells], indent=1))
    else:
        print(dict(Counter(one.outcome for one in cells)))
    return int(any(one.outcome == "trouble" for one in cells))


if __name__ == "__main__":
    sys.exit(main())
