"""Worker processes do not outlive a process that is killed."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time

import pytest

CODE = """
import os, sys, time
from sparring.data._pixels import processes
pool = processes(2)
print(*{pool.submit(os.getpid).result() for _ in range(8)})
sys.stdout.flush()
time.sleep(60)
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="workers are forked")
def test_decoding_processes_end_with_a_parent_that_is_killed() -> None:
    with subprocess.Popen([sys.executable, "-c", CODE], stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None
        workers = [int(word) for word in parent.stdout.readline().split()]
        parent.send_signal(signal.SIGKILL)
        parent.wait()
    assert workers
    until = time.monotonic() + 10
    while any(map(runs, workers)) and time.monotonic() < until:
        time.sleep(0.1)
    assert not any(map(runs, workers))


def runs(process: int) -> bool:
    try:
        os.kill(process, 0)
        return True
    except ProcessLookupError:
        return False
