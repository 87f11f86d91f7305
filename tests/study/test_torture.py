"""A short torture: benchmarks/torture.py does it at length."""

from __future__ import annotations

import importlib.util
import random
import signal
import time
from pathlib import Path

import pytest

from sparring.data import Dataset

pytestmark = pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="finds workers through /proc")

SOURCE = Path(__file__).parent.parent.parent / "benchmarks" / "torture.py"
SPEC = importlib.util.spec_from_file_location("torture_benchmark", SOURCE)
assert SPEC is not None and SPEC.loader is not None
benchmark = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(benchmark)


@pytest.mark.slow
def test_nothing_is_lost_and_nothing_differs(tmp_path: Path) -> None:
    tally = benchmark.torture(tmp_path, kills=4, faults=len(benchmark.FAULTS))
    assert tally == {"kills": 4, "faults": len(benchmark.FAULTS), "lost": 0, "different": 0}


def _alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")")[1].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def test_workers_end_with_their_driver(few_digits: Dataset, tmp_path: Path) -> None:
    study = benchmark.Torture(benchmark.Plan.from_table(benchmark.PLAN), few_digits, tmp_path / "out", random.Random(0))
    driver = study.start()
    workers: list[int] = []
    while len(workers) < 2 and driver.is_alive():
        workers = benchmark._children(driver.pid)
        time.sleep(0.02)
    driver.kill()
    driver.join()
    assert driver.exitcode == -signal.SIGKILL
    deadline = time.monotonic() + 20
    while any(map(_alive, workers)) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert len(workers) == 2 and not any(map(_alive, workers))
