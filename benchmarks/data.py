"""Measure data at the size of ImageNet's: forecast, index, first attacked batch, cache, study, on JPEGs made here.

A few hundred distinct pictures are linked under many names, so that the folder is made in seconds; every one of them is
read, hashed and decoded as often as it is named. Processor time is compared, not time on the clock of a busy machine.
"""

from __future__ import annotations

import argparse
import functools
import io
import json
import os
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from sparring.data._cache import decoded, rows_like_first
from sparring.data._decode import decode, read
from sparring.data._images import load_images
from sparring.data._pixels import MEASURED, Job, Rows, available_workers, jobs, work
from sparring.data.formats._listing import Entry, Listing, list_folder
from sparring.errors import DataError

SIDE, CLASSES, DISTINCT = 224, 1_000, 300
NETWORK = """
import os, time
import torch
from torch import nn

def block(inside, outside, stride):
    main = nn.Sequential(
        nn.Conv2d(inside, outside, 3, stride, 1, bias=False), nn.BatchNorm2d(outside), nn.ReLU(),
        nn.Conv2d(outside, outside, 3, 1, 1, bias=False), nn.BatchNorm2d(outside),
    )
    short = nn.Sequential(nn.Conv2d(inside, outside, 1, stride, bias=False), nn.BatchNorm2d(outside))
    return Residual(main, nn.Identity() if (inside, stride) == (outside, 1) else short)

class Residual(nn.Module):
    def __init__(self, main, short):
        super().__init__()
        self.main, self.short = main, short

    def forward(self, x):
        return torch.relu(self.main(x) + self.short(x))

class Told(nn.Sequential):
    def forward(self, x):
        # Of one and of two images the memory is measured.
        if x.requires_grad and len(x) > 2 and "FIRST" in os.environ and not os.path.exists(os.environ["FIRST"]):
            with open(os.environ["FIRST"], "w") as file:
                file.write(f"{time.time()} {time.process_time()}")
        return super().forward(x)

def resnet18(width, classes):
    sizes = [int(width * n) for n in (64, 64, 128, 256, 512)]
    stem = [nn.Conv2d(3, sizes[0], 7, 2, 3, bias=False), nn.BatchNorm2d(sizes[0]), nn.ReLU(), nn.MaxPool2d(3, 2, 1)]
    blocks = [block(a if n == 0 else b, b, 2 if n == 0 and at else 1)
              for at, (a, b) in enumerate(zip(sizes, sizes[1:])) for n in range(2)]
    return Told(*stem, *blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(sizes[-1], classes))

def whole():
    return resnet18(1.0, 1000)

def quarter():
    return resnet18(0.25, 10)
"""
PLAN = """
title = "2,000 photographs, a ResNet-18 at a quarter of its width"
data = "{folder}"
model = "bench_net:quarter"
seeds = 1
sparsities = [0.5, 0.9]
{batch}

[recipe]
epochs = {epochs}
lr = 0.05
batch_size = 64

[finetune]
epochs = 1

[[pruning]]

[[attacks]]
name = "fgsm"
eps = [0.01]
images = 64

[[attacks]]
name = "pgd"
eps = [0.01]
images = 64
"""


def make_folder(folder: Path, *, train: int, test: int, classes: int) -> None:
    """Make train/ and test/ of JPEGs, as many as are asked for, of a few hundred distinct pictures."""
    pictures, draw = folder / "pictures", np.random.default_rng(0)
    pictures.mkdir(parents=True)
    for number in range(DISTINCT):
        scales = (Image.fromarray(draw.integers(0, 255, (n, n, 3), dtype=np.uint8)) for n in (7, 28, 112))
        mixed = np.mean([np.asarray(one.resize((SIDE, SIDE)), np.float32) for one in scales], 0)
        tint = np.array([number % 10, 9 - number % 10, 4], np.float32) / 9  # by which ten classes can be told
        Image.fromarray((mixed / 2 + 127 * tint).astype(np.uint8)).save(pictures / f"{number}.jpg", quality=90)
    for part, count in (("train", train), ("test", test)):
        for label in range(classes):
            place = folder / "set" / part / f"class{label:04}"
            place.mkdir(parents=True)
            for number in range(count // classes):
                os.link(pictures / f"{10 * draw.integers(DISTINCT // 10) + label % 10}.jpg", place / f"{number:05}.jpg")


class MadeUp:
    """Say of every image that it lies there, and that it is one and the same picture."""

    def __init__(self) -> None:
        file = io.BytesIO()
        Image.fromarray(np.random.default_rng(0).integers(0, 255, (SIDE, SIDE, 3), np.uint8)).save(file, "JPEG")
        self.picture = file.getvalue()

    def contents(self, entries: Sequence[Entry]) -> Iterator[tuple[Entry, bytes | str]]:
        yield from ((entry, self.picture) for entry in entries)

    def stamps(self, entries: Sequence[Entry]) -> Iterator[tuple[int, int]]:
        yield from ((len(self.picture), 0) for _ in entries)


def forecast(images: int, work_folder: Path) -> dict[str, object]:
    """Index so many paths that are made up, and ask to train on them where one byte of the disk is free."""
    began, listing = time.process_time(), Listing(MadeUp())
    for number in range(images):
        listing.wants(f"{'train' if number % 27 else 'test'}/n{number % CLASSES:08}/{number:08}.JPEG")
    indexed = time.process_time() - began
    os.environ["XDG_CACHE_HOME"] = str(work_folder)
    whole = shutil.disk_usage
    shutil.disk_usage = lambda _: whole(work_folder)._replace(free=1)  # type: ignore[assignment]
    try:
        load_images(work_folder, "imagenet", listing=listing)
        raise AssertionError("it was not refused")
    except DataError as error:
        said = str(error)
    finally:
        shutil.disk_usage = whole
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9
    whole_seconds = time.process_time() - began
    return {"images": images, "index_seconds": indexed, "seconds": whole_seconds, "peak_gb": peak, "said": said}


def index_seconds(folder: Path) -> float:
    """Return the processor seconds in which a folder is listed."""
    began = time.process_time()
    listing = list_folder(folder)
    took = time.process_time() - began
    assert len(listing.entries) == sum(len(files) for _, _, files in os.walk(folder))
    return took


def first_batch(folder: Path, work_folder: Path) -> dict[str, float]:
    """Attack 200 images of a folder by the command; return seconds to the first attacked batch, and peak memory."""
    told = work_folder / "first"
    options = ["bench_net:whole", "--data", str(folder), "--images", "200", "--attacks", "fgsm,pgd", "--eps", "0.01"]
    options += ["--set", "steps=1", "--checks", "0"]
    began, peak = time.time(), peak_of(["attack", *options], work_folder, FIRST=str(told))
    at, spent = map(float, told.read_text().split())
    whole = time.time() - began
    return {"seconds": at - began, "processor_seconds": spent, "whole_seconds": whole, "peak_gb": peak}


def peak_of(command: list[str], folder: Path, **variables: str) -> float:
    """Run a command of sparring; return the largest memory of any of its processes, in GB."""
    path = os.pathsep.join([str(folder), *sys.path])
    environment = {**os.environ, "PYTHONPATH": path, "XDG_CACHE_HOME": str(folder / "cache"), **variables}
    script = (
        "import resource, subprocess, sys; code = subprocess.call(sys.argv[1:], stdout=sys.stderr); "
        "print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss); sys.exit(code)"
    )
    words = [sys.executable, "-c", script, sys.executable, "-m", "sparring", *command]
    done = subprocess.run(words, env=environment, capture_output=True, text=True, check=False)
    if done.returncode not in (0, 1):
        raise SystemExit(f"{' '.join(command)} fails: {done.stderr[-2000:]}")
    return int(done.stdout.split()[-1]) * 1024 / 1e9


def decode_alone(job: Job, how: Rows) -> int:
    """Decode images and nothing else."""
    return sum(np.asarray(decode(read(content), how.name(entry), None).image).nbytes for _, entry, content in job)


def processor(what: Callable[[], object]) -> float:
    """Return the processor seconds of this process and its children."""

    def spent() -> float:
        kinds = (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)
        return sum(usage.ru_utime + usage.ru_stime for usage in map(resource.getrusage, kinds))

    before = spent()
    what()
    return spent() - before


def cache_share(folder: Path, images: int, rounds: int) -> dict[str, float]:
    """Return the throughput of making the cache, as a share of that of decoding alone with the same workers."""
    listing, workers = list_folder(folder), available_workers()
    entries = listing.entries[:images]
    measured = min(images, MEASURED * images // (SIDE * SIDE * len(listing.entries)))  # as of the whole set
    how = rows_like_first(listing.source, entries, Rows(folder, (1, 0, 0), None, measured))
    shares, rate = [], 0.0
    for _ in range(rounds):
        todo = list(jobs(listing.source, list(enumerate(entries))))
        task = functools.partial(decode_alone, how=how)
        alone = processor(lambda task=task, todo=todo: list(work(task, todo, workers, threads=False)))  # type: ignore[misc]
        with tempfile.TemporaryDirectory(dir=folder.parent) as cache:
            os.environ["XDG_CACHE_HOME"] = cache
            made = processor(lambda: decoded(listing.source, entries, how, kept=True, progress=None))
        shares.append(alone / made)
        rate = images / made
    return {"share": statistics.median(shares), "images_a_processor_second": rate, "workers": workers}


def small_study(folder: Path, work_folder: Path, epochs: int, batch: str) -> dict[str, float]:
    """Run a study of 2,000 training images to its report; return seconds and the largest worker's peak memory."""
    (work_folder / "plan.toml").write_text(PLAN.format(folder=folder, epochs=epochs, batch=batch))
    began = time.time()
    command = ["study", str(work_folder / "plan.toml"), "--out", str(work_folder / "out"), "--quiet"]
    peak = peak_of(command, work_folder)
    assert (work_folder / "out" / "report.html").exists()
    return {"seconds": time.time() - began, "peak_gb": peak}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--images", type=int, default=50_000, help="images of the large folder")
    parser.add_argument("--forecast", type=int, default=1_281_167, help="paths that are made up")
    parser.add_argument("--cached", type=int, default=4_000, help="images to decode into the cache in each round")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--epochs", type=int, default=1, help="of the study")
    parser.add_argument("--batch", default="", help="a line of the study's plan")
    parser.add_argument("--only", nargs="*", choices=("forecast", "index", "attack", "cache", "study"))
    parser.add_argument("--folder", type=Path, help="where to work [default: a temporary folder]")
    parser.add_argument("--json", action="store_true")
    asked = parser.parse_args()
    root = Path(tempfile.mkdtemp(dir=asked.folder))
    try:
        (root / "bench_net.py").write_text(NETWORK)
        make_folder(root / "large", train=asked.images * 9 // 10, test=asked.images // 10, classes=CLASSES)
        make_folder(root / "small", train=2_220, test=500, classes=10)
        large = root / "large" / "set"
        parts: dict[str, Callable[[], object]] = {
            "forecast": lambda: forecast(asked.forecast, root),  # first: its peak is that of this process
            "index": lambda: {"processor_seconds": index_seconds(large), "limit": 5.0},
            "attack": lambda: first_batch(large, root) | {"limit_seconds": 10.0, "limit_gb": 1.5},
            "cache": lambda: cache_share(large, asked.cached, asked.rounds) | {"limit": 0.8},
            "study": lambda: small_study(root / "small" / "set", root, asked.epochs, asked.batch) | {"limit_gb": 2.5},
        }
        found = {name: part() for name, part in parts.items() if asked.only is None or name in asked.only}
    finally:
        shutil.rmtree(root)
    print(json.dumps(found, indent=1) if asked.json else "\n".join(f"{name}: {value}" for name, value in found.items()))


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
