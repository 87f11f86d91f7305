"""What work on all cores takes while something else uses them: python benchmarks/busy.py [--json].

Commands and calls from Python, with torch imported first, are timed in turns: on the machine as it is found, watched
(`sparring.waiting`) and not, and beside one process a core that never pauses, on one thread and on all. Two ratios
are promised: busy ÷ one thread busy at most 1.3, and idle ÷ unwatched idle at most 1.05. What else runs on the machine
disturbs the idle times: `others` says how many threads ran besides. `--before` adds what busy cores cost unwatched.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing as mp
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from multiprocessing.connection import Connection
from pathlib import Path

import numpy as np
import torch

from sparring import attacks, models, train, waiting
from sparring.threat import LINF, Threat

IMAGES = 3000
MODELS = ("lenet-5", "lenet-300-100")
UNWATCHED = "import sparring.waiting as w; w._openmp = lambda: None; from sparring.cli import main; main()"
WATCHED = "from sparring.cli import main; main()"
BUSY, IDLE = 1.3, 1.05
SETTLED = 0.5  # seconds after which the threads of the process before have stopped spinning


def images(count: int) -> tuple[np.ndarray, np.ndarray]:
    """Return images like MNIST's that a network can tell apart: a pattern for each class, in noise."""
    source = np.random.default_rng(0)
    y = np.arange(count) % 10
    patterns = source.integers(0, 128, (10, 1, 28, 28))
    return (patterns[y] + source.integers(0, 128, (count, 1, 28, 28))).astype(np.uint8), y


def calls() -> dict[str, Callable[[], object]]:
    """Return the calls from Python that are timed."""
    x, y = (torch.from_numpy(array) for array in images(IMAGES))

    def model(name: str) -> torch.nn.Module:
        return models.build(name, shape=(1, 28, 28), classes=10, mean=(0.5,), std=(0.3,))

    def fitted(name: str) -> Callable[[], object]:
        return lambda: train.fit(model(name), x, y, train.Recipe(lr=0.01, epochs=1 if name == "lenet-5" else 10))

    def attacked(name: str) -> Callable[[], object]:
        count = 1000 if name == "lenet-5" else IMAGES
        network, pgd = model(name).eval(), attacks.ATTACKS["pgd"]
        generator = torch.Generator().manual_seed(0)
        floats, labels = x[:count].float() / 255, network(x[:count].float() / 255).argmax(1)
        return lambda: attacks.run(network, floats, labels, pgd, Threat(LINF, 0.02), generator=generator)

    return {
        **{f"train.fit {name}": fitted(name) for name in MODELS},
        **{f"attacks.run {name}": attacked(name) for name in MODELS},
    }


def serve(pipe: Connection, threads: int, watched: bool) -> None:
    """Run the calls that the pipe names, and answer with their seconds."""
    torch.set_num_threads(threads)
    if not watched:
        waiting._openmp = lambda: None  # type: ignore[assignment]
    known = calls()
    for call in known.values():
        call()  # what the first call of a process costs is not the question
    pipe.send(list(known))
    while (name := pipe.recv()) is not None:
        began = time.perf_counter()
        known[name]()
        pipe.send(time.perf_counter() - began)


class Served:
    """A process that runs calls on so many threads."""

    def __init__(self, threads: int, watched: bool) -> None:
        context = mp.get_context("spawn")
        self.pipe, there = context.Pipe()
        self.process = context.Process(target=serve, args=(there, threads, watched), daemon=True)
        self.process.start()
        self.names: list[str] = self.pipe.recv()

    def seconds(self, name: str) -> float:
        self.pipe.send(name)
        return float(self.pipe.recv())


class Commands:
    """Run commands on so many threads, each in a process of its own."""

    def __init__(self, threads: int, watched: bool, folder: Path) -> None:
        self.start = [sys.executable, "-c", WATCHED if watched else UNWATCHED]
        self.last = ["--data", str(folder / "images.npz"), "--threads", str(threads)]
        train_it = ["train", "lenet-5", "--out", str(folder / "lenet.safetensors"), "--quiet"]
        attack_it = ["attack", str(folder / "lenet.safetensors"), "--attacks", "pgd", "--eps", "0.02"]
        settings = ["--set", "epochs=3"]
        export_it = ["export", str(folder / "lenet.safetensors"), str(folder / "lenet.sparring"), "--images", "100"]
        self.words = {
            "sparring train lenet-5": [*train_it, *settings],
            "sparring attack lenet-5": attack_it,
            "sparring export lenet-5": export_it,
        }
        self.names = list(self.words)

    def seconds(self, name: str) -> float:
        began = time.perf_counter()
        command = [*self.start, *self.words[name], *self.last]
        run = subprocess.run(command, capture_output=True, text=True, check=False)
        assert run.returncode == 0, run.stderr
        return time.perf_counter() - began


@contextmanager
def spinning() -> Iterator[None]:
    """Let one process on each core never pause."""
    cores = sorted(os.sched_getaffinity(0))
    context = mp.get_context("spawn")
    pipes = [context.Pipe(duplex=False) for _ in cores]
    spinners = [
        context.Process(target=spin, args=(core, there), daemon=True)
        for core, (_, there) in zip(cores, pipes, strict=True)
    ]
    for spinner in spinners:
        spinner.start()
    for here, _ in pipes:
        here.recv()  # under way: it imports this module first, and that takes long where others work
    try:
        yield
    finally:
        for spinner in spinners:
            spinner.kill()
            spinner.join()


def spin(core: int, pipe: Connection) -> None:
    """Never pause, on one core, and say when that begins; end with the one who began it, however that ends."""
    os.sched_setaffinity(0, {core})
    pipe.send(None)
    parent = os.getppid()
    while os.getppid() == parent:
        pass


def medians(name: str, ways: Mapping[str, Served | Commands], rounds: int) -> dict[str, float]:
    """Return the median seconds of some work done in several ways, taken in turns."""
    taken: dict[str, list[float]] = {way: [] for way in ways}
    for _ in range(rounds):
        for way, worker in ways.items():
            time.sleep(SETTLED)
            taken[way].append(worker.seconds(name))
    return {way: round(statistics.median(times), 3) for way, times in taken.items()}


def measure(
    kind: Callable[[int, bool], Served | Commands], threads: int, rounds: int, before: bool
) -> list[dict[str, object]]:
    """Time one kind of work, idle and busy; return a row for each piece of it."""
    one, all_, unwatched = kind(1, True), kind(threads, True), kind(threads, False)
    rows = []
    others = waiting._others()
    idle = {name: medians(name, {"idle": all_, "idle_unwatched": unwatched}, rounds) for name in all_.names}
    with spinning():
        for name, times in idle.items():
            busy = medians(name, {"busy": all_, "busy_one_thread": one}, rounds)
            if before:
                busy["busy_unwatched"] = round(unwatched.seconds(name), 3)  # once: it takes long
            rows.append({"work": name, "others": others, **times, **busy, **ratios({**times, **busy})})
            print(rows[-1], file=sys.stderr, flush=True)
    return rows


def ratios(times: dict[str, float]) -> dict[str, object]:
    """Return the two ratios that are promised, and whether they hold."""
    busy = times["busy"] / times["busy_one_thread"]
    idle = times["idle"] / times["idle_unwatched"]
    return {"busy_ratio": round(busy, 3), "idle_ratio": round(idle, 3), "holds": busy <= BUSY and idle <= IDLE}


def main() -> None:
    """Measure calls and commands, print a row for each; exit code 1 if a ratio is larger than promised."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--before", action="store_true", help="also once unwatched on busy cores, which takes minutes")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (x, y), (x_test, y_test) = images(IMAGES), images(1000)
        np.savez(folder / "images.npz", x_train=x, y_train=y, x_test=x_test, y_test=y_test)
        rows = measure(Served, options.threads, options.rounds, options.before)
        rounds = max(3, options.rounds // 2)
        rows += measure(
            lambda threads, watched: Commands(threads, watched, folder), options.threads, rounds, options.before
        )
    if options.json:
        print(json.dumps({"threads": options.threads, "busy_limit": BUSY, "idle_limit": IDLE, "rows": rows}, indent=1))
    else:
        for row in rows:
            print("  ".join(f"{key} {value}" for key, value in row.items()))
    sys.exit(not all(row["holds"] for row in rows))


if __name__ == "__main__":
    main()
