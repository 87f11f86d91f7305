"""Kill a study and its workers at random moments, make its disk fail at each write, and compare what is left.

    python benchmarks/torture.py [--kills N] [--faults N] [--seed N] [--json]

A small study of digits runs again and again in one folder while `kills` SIGKILLs strike the driver or one of its
workers at random moments. Then one seed of it runs in fresh folders, once for each write (records, objects, plan, and
the workers' checkpoints) and each way in which that write and all after it fail: no file can be opened, the disk is
full after half the bytes, a sync fails, a rename finds the disk read-only, the system's limit of a file's size
(RLIMIT_FSIZE) is reached; then it is run again. `--faults` ends that early. Where Ray is installed, a cluster of a head
and two workers on loopback runs it too, and a worker is killed in the middle of a task, which counts as one kill more;
a cluster that will not start is said.
After every blow all that was reported done must be there, whole; at the end all records and objects must equal those of
an undisturbed run, byte for byte (times excepted).

The last line is one JSON object, {"kills", "faults", "lost", "different"}; exit code 1 unless the last two are 0.
"""

from __future__ import annotations

import argparse
import contextlib
import errno
import functools
import importlib.util
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
import threading
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from sparring import data
from sparring.data import Dataset, Split
from sparring.errors import UserError
from sparring.files import lock
from sparring.records import Store
from sparring.study import Event, Plan, run

FAULTS = ("open", "write", "fsync", "replace", "limit")
ENDED_BY_FAULT = 2
NO_CLUSTER = 4
PATIENCE = 30
RAY_SECONDS = 900
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
                if event.record is not None and not event.record.error:
                    os.write(descriptor, f"{event.record.key}\n".encode())

            with lock(self.out / ".lock", wait=PATIENCE):
                pass  # on a loaded machine the workers of a driver that was killed need a while to die with it
            try:
                # Three blows to one task fail its cell, as they should: it is tried again.
                run(self.plan, self.out, dataset=self.dataset, workers=2, retry=True, watch=report)
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
        """Strike drivers and workers at random moments; a finished study starts again. Count the kills."""
        began = time.perf_counter()
        self.finish()
        seconds = time.perf_counter() - began
        self.again()
        struck: Counter[str] = Counter()
        driver = self.start()
        while struck.total() < kills:
            time.sleep(self.dice.uniform(0, seconds / 2))
            if driver.exitcode is not None:
                assert driver.exitcode == 0, f"a driver ended with {driver.exitcode}"
                self.again()
                driver = self.start()
                continue
            workers = _children(driver.pid)
            if workers and self.dice.random() < 0.5:
                os.kill(self.dice.choice(workers), signal.SIGKILL)
                struck["workers"] += 1
                continue
            os.kill(driver.pid, signal.SIGKILL)
            struck["drivers at work" if workers else "drivers that begin or end"] += 1
            driver.join()
            self.check()
            print(f"{dict(struck)}, {len(self.lost)} lost", file=sys.stderr)
            driver = self.start()
        driver.kill()
        driver.join()
        self.finish()
        return struck.total()

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
            print(f"write {place}: {faults} faults, {len(self.lost)} lost, {self.different} different", file=sys.stderr)
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
    """Make the write after `passes` others, and all that follow, fail in this process and its workers."""
    writes = mp.get_context("fork").Value("i", 0)  # the workers, forked from here, count on
    real_open, real_fsync, real_replace = io.open, os.fsync, os.replace
    failing = False

    class HalfFull(io.FileIO):
        def write(self, content: Any) -> int:
            super().write(bytes(content)[: len(content) // 2])
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def passed() -> bool:
        with writes.get_lock():
            writes.value += 1
            return writes.value > passes

    def open_(file: Any, mode: str = "r", *rest: Any, **named: Any) -> Any:
        nonlocal failing
        if mode == "xb" and passed():
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


# -- Ray --------------------------------------------------------------------------------------------------------------


def kill_on_ray(plan: Plan, dataset: Dataset, out: Path, expected: dict[str, Any]) -> dict[str, int] | None:
    """Kill one worker of a cluster on loopback in the middle of a task; return a tally, or None if none would start.

    The driver is a process of its own, since Ray ends one that loses its cluster; one that takes too long is ended.
    """
    log, struck = out.with_suffix(".log"), mp.get_context("fork").Value("i", 0)
    driver = mp.get_context("fork").Process(target=_drive_on_ray, args=(plan, dataset, out, log, struck))
    driver.start()
    driver.join(RAY_SECONDS)
    if driver.is_alive() and driver.pid is not None:
        for pid in [*_descendants(driver.pid), driver.pid]:  # what Ray started would outlive it
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        driver.join()
    if driver.exitcode == NO_CLUSTER:
        return None
    print(f"on Ray: the driver ended with {driver.exitcode}, {struck.value} workers killed", file=sys.stderr)
    found = contents(out)
    lost = sum(f"{key}.json" not in found for key in log.read_text().split()) if log.exists() else 0
    different = sum(expected.get(key) != found.get(key) for key in {*expected, *found})
    return {"kills": struck.value, "lost": lost, "different": different}


def _drive_on_ray(plan: Plan, dataset: Dataset, out: Path, log: Path, struck: Any) -> None:
    """Run a plan on a cluster and kill one of its workers, once something was reported (to the log)."""
    # Ray makes workers nice by 15: where other jobs want the processor, theirs may hardly run.
    os.environ.update(RAY_USAGE_STATS_ENABLED="0", RAY_worker_niceness="0")
    cluster = _cluster()
    if cluster is None:
        sys.exit(NO_CLUSTER)
    ended, reported = threading.Event(), threading.Event()

    def strike() -> None:
        while not ended.wait(0.005):
            working = [pid for pid in _descendants(os.getpid()) if _title(pid).startswith("ray::_perform")]
            if working and reported.is_set():
                os.kill(working[0], signal.SIGKILL)
                struck.value += 1
                return

    def report(event: Event) -> None:
        if event.record is not None and not event.record.error:
            with log.open("a") as file:
                file.write(f"{event.record.key}\n")
            reported.set()

    killer = threading.Thread(target=strike)
    killer.start()
    try:
        run(plan, out, dataset=dataset, ray=cluster.address, watch=report)
    finally:
        ended.set()
        killer.join()
        cluster.shutdown()


def _cluster(attempts: int = 3) -> Any:
    """Start a head that runs nothing and two workers of one core; return None if they do not come up in time."""
    from ray.cluster_utils import Cluster

    small = {"object_store_memory": 80 << 20, "include_dashboard": False}
    for attempt in range(attempts):
        cluster = None
        try:
            cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, **small})
            for _ in range(2):
                cluster.add_node(num_cpus=1, object_store_memory=80 << 20)
            cluster.wait_for_nodes()
            return cluster
        except Exception as problem:  # Ray's limits of 30 s are too short where others use the processor
            print(f"Ray did not start ({attempt + 1} of {attempts}): {problem}", file=sys.stderr)
            if cluster is not None:
                cluster.shutdown()
    return None


def _descendants(pid: int) -> list[int]:
    """Return the processes below one (Linux)."""
    found = _children(pid)
    return [*found, *(below for child in found for below in _descendants(child))]


def _title(pid: int) -> str:
    """Return what a process calls itself; "" if it is gone."""
    try:
        return Path(f"/proc/{pid}/cmdline").read_text(errors="replace")
    except (FileNotFoundError, ProcessLookupError):
        return ""


# -- all of it --------------------------------------------------------------------------------------------------------


def torture(folder: Path, *, kills: int, faults: int, seed: int = 0, ray: bool = False) -> dict[str, int]:
    """Do it all under a folder, with `ray` on a cluster as well, and return the tally."""
    torch.set_num_threads(1)
    dice = random.Random(seed)
    dataset = _few(data.load("digits"))
    tally = {"kills": 0, "faults": 0, "lost": 0, "different": 0}
    for name, changes in (("kills", {}), ("faults", {"seeds": 1, "sparsities": [0.9], "shard": 40})):
        plan = Plan.from_table({**PLAN, **changes})
        # In this process, so that the drivers and workers forked from it need not import what stages import.
        run(plan, folder / f"{name}-undisturbed", dataset=dataset, workers=0)
        expected = contents(folder / f"{name}-undisturbed")
        study = Torture(plan, dataset, folder / name, dice)
        if name == "kills":
            tally[name] = study.kill(kills)
            study.compare(expected)
        else:
            tally[name] = study.fail(faults, expected)
        tally["lost"] += len(study.lost)
        tally["different"] += study.different
        print(f"so far: {tally}", file=sys.stderr)
    if ray:
        found = kill_on_ray(plan, dataset, folder / "ray", expected)
        if found is None:
            print("the part on Ray was skipped: no cluster would start on this machine", file=sys.stderr)
        for name, count in (found or {}).items():
            tally[name] += count
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
        ray = importlib.util.find_spec("ray") is not None
        tally = torture(Path(folder), kills=options.kills, faults=options.faults, seed=options.seed, ray=ray)
    if not options.json:
        print(f"{tally['kills']} kills and {tally['faults']} faults in {time.perf_counter() - began:.0f} s")
    print(json.dumps(tally))
    sys.exit(1 if tally["lost"] or tally["different"] else 0)


if __name__ == "__main__":
    main()
