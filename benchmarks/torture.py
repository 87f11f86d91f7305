"""Kill a study and its workers at random moments, make its disk fail at each write, and compare what is left.

    python benchmarks/torture.py [--kills N] [--faults N] [--seed N] [--json]

A small study of digits runs again and again in one folder while `kills` SIGKILLs strike the driver or one of its
workers at random moments. Then one seed of it runs in fresh folders, once for each write of the driver (records,
objects, plan) and each way in which that write fails: no file can be opened, the disk is full after half the bytes, a
sync fails, a rename finds the disk read-only, the system's limit of a file's size (RLIMIT_FSIZE) is reached; then it is
run again. `--faults` ends that early. After every blow all that was reported done must be there, whole; at the end all
records and objects must equal those of an undisturbed run, byte for byte (times excepted).

The last line is one JSON object, {"kills", "faults", "lost", "different"}; exit code 1 unless the last two are 0.
"""

from __future__ import annotations

import argparse
import errno
import functools
import io
import itertools
import json
import multiprocessing as mp
import os
import random
import resource
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from sparring import data
from sparring.data import Dataset, Split
from sparring.errors import UserError
from sparring.study import Event, Plan, Store, run

FAULTS = ("open", "write", "fsync", "replace", "limit")
ENDED_BY_FAULT = 2
PLAN = {
    "name": "torture",
    "data": "digits",
    "model": {"name": "mlp", "widths": [16]},
    "seeds": 2,
    "sparsities": [0.5, 0.9],
    "recipe": {"epochs": 2, "lr": 0.05},
    "finetune": {"epochs": 2},
    "attacks": [{"name": "fgsm", "eps": [0.1], "images": 40}, {"name": "deepfool", "norm": "l2", "images": 40}],
    "shard": 25,
}


def contents(out: Path) -> dict[str, Any]:
    """Return every record without its times, and the bytes of every object."""
    found: dict[str, Any] = {}
    for path in sorted((out / "records").glob("*.json")):
        record = json.loads(path.read_text())
        record.pop("times")
        found[path.name] = record
    return found | {path.name: path.read_bytes() for path in sorted((out / "objects").iterdir())}


class Torture:
    """Run a study in child processes and hurt them; count what was lost of all that had been reported done."""

    def __init__(self, plan: Plan, dataset: Dataset, out: Path, dice: random.Random) -> None:
        self.plan, self.dataset, self.out, self.dice = plan, dataset, out, dice
        self.log = out.with_suffix(".log")
        self.lost: set[str] = set()
        self.different = 0

    def start(self, prepare: Callable[[], None] = lambda: None) -> Any:
        """Start a driver with two workers; it writes the key of each record that it reports to the log."""

        def drive() -> None:
            prepare()
            descriptor = os.open(self.log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)

            def report(event: Event) -> None:
                if event.record is not None:
                    os.write(descriptor, f"{event.record.key}\n".encode())

            try:
                run(self.plan, self.out, dataset=self.dataset, workers=2, watch=report)
            except UserError:
                sys.exit(ENDED_BY_FAULT)

        driver = mp.get_context("fork").Process(target=drive)
        driver.start()
        return driver

    def check(self) -> None:
        """Look for everything that was ever reported."""
        store = Store(self.out)
        reported = set(self.log.read_text().split()) if self.log.exists() else set()
        self.lost |= {key for key in reported if (found := store.peek(key)) is None or found.error}

    def finish(self) -> None:
        """Run to the end, undisturbed."""
        driver = self.start()
        driver.join()
        assert driver.exitcode == 0, f"an undisturbed run ended with {driver.exitcode}"
        self.check()

    def kill(self, kills: int) -> int:
        """Strike at random moments, half of the time the driver; a study that is done begins anew. Count the kills."""
        struck = 0
        driver = self.start()
        while struck < kills:
            time.sleep(self.dice.uniform(0.01, 0.3))
            victim = driver.pid if self.dice.random() < 0.5 else self.dice.choice([*_children(driver.pid), driver.pid])
            if driver.exitcode is not None:
                assert driver.exitcode in (0, -signal.SIGKILL), f"a driver ended with {driver.exitcode}"
                if driver.exitcode == 0:
                    self.again()
                driver = self.start()
                continue
            os.kill(victim, signal.SIGKILL)
            struck += 1
            if victim == driver.pid:
                driver.join()
                self.check()
                driver = self.start()
        driver.kill()
        driver.join()
        self.finish()
        return struck

    def again(self) -> None:
        """Forget half of the records, so that there is something to do."""
        self.check()
        self.log.unlink(missing_ok=True)
        for path in sorted((self.out / "records").iterdir()):
            if self.dice.random() < 0.5:
                path.unlink()

    def fail(self, most: int, expected: dict[str, Any]) -> int:
        """Make each write of a fresh study fail in each way, run it again to its end, and compare. Count the faults."""
        faults = 0
        for place in itertools.count():
            for kind in FAULTS[: most - faults]:
                shutil.rmtree(self.out, ignore_errors=True)
                self.log.unlink(missing_ok=True)
                driver = self.start(functools.partial(_break, kind, place))
                driver.join()
                if driver.exitcode == 0:
                    return faults  # there are no more writes
                assert driver.exitcode == ENDED_BY_FAULT, f"a fault of kind '{kind}' ended with {driver.exitcode}"
                self.check()
                self.finish()
                self.compare(expected)
                faults += 1
            if faults == most:
                return faults
        raise AssertionError("a count has no end")

    def compare(self, expected: dict[str, Any]) -> None:
        """Count the records and objects that are not what they should be."""
        found = contents(self.out)
        self.different += sum(expected.get(key) != found.get(key) for key in {*expected, *found})


def _children(pid: int) -> list[int]:
    """Return the driver's workers (Linux)."""
    try:
        tasks = [path.read_text() for path in Path(f"/proc/{pid}/task").glob("*/children")]
    except (FileNotFoundError, ProcessLookupError):
        return []
    return [int(child) for text in tasks for child in text.split()]


def _break(kind: str, passes: int) -> None:
    """Make the write after `passes` others fail, in this process; its workers, which write checkpoints, are spared."""
    driver = os.getpid()
    writes = iter(range(1_000_000))
    real_open, real_fsync, real_replace = io.open, os.fsync, os.replace
    failing = False

    class HalfFull(io.FileIO):
        def write(self, content: Any) -> int:
            super().write(bytes(content)[: len(content) // 2])
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def open_(file: Any, mode: str = "r", *rest: Any, **named: Any) -> Any:
        nonlocal failing
        if mode == "xb" and os.getpid() == driver and next(writes) >= passes:
            failing = True
            if kind == "open":
                raise OSError(errno.EROFS, os.strerror(errno.EROFS), file)
            if kind == "write":
                return HalfFull(file, "x")
            if kind == "limit":
                signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
                resource.setrlimit(resource.RLIMIT_FSIZE, (100, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))
        return real_open(file, mode, *rest, **named)

    def fsync(descriptor: int) -> None:
        if failing and kind == "fsync":
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        real_fsync(descriptor)

    def replace(*names: Any) -> None:
        if failing and kind == "replace":
            raise OSError(errno.EROFS, os.strerror(errno.EROFS))
        real_replace(*names)

    io.open, os.fsync, os.replace = open_, fsync, replace  # type: ignore[assignment]


def torture(folder: Path, *, kills: int, faults: int, seed: int = 0) -> dict[str, int]:
    """Do it all under a folder and return the tally."""
    torch.set_num_threads(1)
    dice = random.Random(seed)
    dataset = _few(data.load("digits"))
    tally = {"kills": 0, "faults": 0, "lost": 0, "different": 0}
    for name, changes in (("kills", {}), ("faults", {"seeds": 1, "sparsities": [0.9], "shard": 40})):
        plan = Plan.from_table({**PLAN, **changes})
        run(plan, folder / f"{name}-undisturbed", dataset=dataset, workers=2)
        expected = contents(folder / f"{name}-undisturbed")
        study = Torture(plan, dataset, folder / name, dice)
        if name == "kills":
            tally[name] = study.kill(kills)
            study.compare(expected)
        else:
            tally[name] = study.fail(faults, expected)
        tally["lost"] += len(study.lost)
        tally["different"] += study.different
    return tally


def _few(dataset: Dataset) -> Dataset:
    def first(split: Split, count: int) -> Split:
        return Split(split.x[:count], split.y[:count])

    train, valid, test = first(dataset.train, 300), first(dataset.valid, 60), first(dataset.test, 100)
    return Dataset("few-digits", train, valid, test, dataset.classes, dataset.mean, dataset.std)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--faults", type=int, default=1_000_000, help="stop after so many [default: all writes]")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    began = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        tally = torture(Path(folder), kills=options.kills, faults=options.faults, seed=options.seed)
    if not options.json:
        print(f"{tally['kills']} kills and {tally['faults']} faults in {time.perf_counter() - began:.0f} s")
    print(json.dumps(tally))
    sys.exit(1 if tally["lost"] or tally["different"] else 0)


if __name__ == "__main__":
    main()
