"""Interrupted or terminated, the command line says so, ends its workers, and goes on when it is run again."""

from __future__ import annotations

import multiprocessing as mp
import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from sparring.cli import main
from sparring.records import Store
from sparring.study import progress

PLAN = """
data = "digits"
model = { name = "mlp", widths = [16] }
seeds = 20
sparsities = [0.5, 0.9]
[recipe]
epochs = 3
"""


def _command(plan: Path, out: Path, workers: int) -> Any:
    def go() -> None:
        signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs begin deaf to it
        os.dup2(os.open(out.with_suffix(".said"), os.O_CREAT | os.O_WRONLY), 2)
        sys.argv = ["sparring", "study", str(plan), "--out", str(out), "--quiet", "--workers", str(workers)]
        sys.stdout = Path(os.devnull).open("w")  # noqa: SIM115
        sys.stderr = open(2, "w", closefd=False)  # noqa: SIM115
        main()

    process = mp.get_context("fork").Process(target=go)
    process.start()
    return process


@pytest.mark.parametrize(
    ("blow", "code", "workers"), [(signal.SIGINT, 130, 2), (signal.SIGTERM, 143, 2), (signal.SIGTERM, 143, 0)]
)
def test_stopped_by_a_signal(tmp_path: Path, blow: signal.Signals, code: int, workers: int) -> None:
    plan, out = tmp_path / "plan.toml", tmp_path / "out"
    plan.write_text(PLAN)
    process = _command(plan, out, workers)
    deadline = time.monotonic() + 60
    while not list(out.glob("records/*.json")) and time.monotonic() < deadline:
        time.sleep(0.02)
    os.kill(process.pid, blow)
    process.join(60)
    assert process.exitcode == code
    said = out.with_suffix(".said").read_text()
    assert "rerun the same command" in said and "Traceback" not in said
    with Store(out).lock(wait=0):  # nobody holds the folder any more: the workers have ended too
        found = progress(out)
    assert 0 < found.done < found.tasks and not found.failures
