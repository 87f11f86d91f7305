"""OpenMP's threads sleep while others need the cores, and no result knows of it."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from sparring import waiting
from sparring.train import Recipe, fit

pytestmark = pytest.mark.skipif(waiting._openmp() is None, reason="torch's OpenMP here is not GNU's, or not on Linux")

SPINNING = """
import time, torch
from contextlib import nullcontext
from sparring import waiting
torch.set_num_threads(2)
x = torch.zeros(1 << 18)
def burnt() -> float:
    before = time.process_time()
    for _ in range(60):
        x.add_(1)  # shared by two threads, of which one then waits for more
        time.sleep(0.004)
    return time.process_time() - before
spun = burnt()
with waiting.crowd(waiting._openmp(), max(1, len(__import__("os").sched_getaffinity(0)) - 1)):
    slept = burnt()
print(spun, slept, burnt())
"""


@pytest.fixture
def two_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def _watchers() -> int:
    return sum(isinstance(thread, waiting._Watcher) for thread in threading.enumerate())


def _hosts() -> bool:
    return any("gather" in thread.name for thread in threading.enumerate())


def _gone() -> None:
    until = time.monotonic() + 10
    while time.monotonic() < until and _watchers():
        time.sleep(0.01)
    assert _watchers() == 0


def test_a_crowd_makes_waiting_threads_sleep_and_leaves_no_trace() -> None:
    environment = {key: value for key, value in os.environ.items() if not key.startswith(("OMP_", "GOMP_"))}
    run = subprocess.run([sys.executable, "-c", SPINNING], capture_output=True, text=True, env=environment, check=True)
    spun, slept, again = map(float, run.stdout.split())
    assert slept < 0.5 * spun
    assert slept < 0.5 * again


def test_threads_that_wait_for_cores_gather_a_crowd_until_the_cores_are_free(
    two_threads: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    shared, began = threading.Event(), time.monotonic()
    monkeypatch.setattr(waiting, "LINGER", 0.05)
    monkeypatch.setattr(waiting, "_others", lambda: 0)
    monkeypatch.setattr(waiting, "_waited", lambda _: time.monotonic() - began if shared.is_set() else 0.0)

    def settles(count: int) -> bool:
        until = time.monotonic() + 10
        while time.monotonic() < until and threading.active_count() != count:
            time.sleep(0.01)
        return threading.active_count() == count

    alone = threading.active_count()
    with waiting.courteous():
        assert settles(alone + 1), "the watcher"
        shared.set()
        assert settles(alone + 2), "and the host of the crowd"
        shared.clear()
        assert settles(alone + 1)
        shared.set()
        assert settles(alone + 2)
    assert settles(alone)


def test_a_crowd_waits_for_the_next_call_which_looks_itself_who_has_the_cores(
    two_threads: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    gathered: list[tuple[Any, ...]] = []
    monkeypatch.setattr(waiting, "_waited", lambda _: None)
    monkeypatch.setattr(waiting, "LINGER", 5.0)
    real = waiting.crowd

    def noted(*words: Any) -> Any:
        gathered.append(words)
        return real(*words)

    monkeypatch.setattr(waiting, "crowd", noted)

    def call(others: int) -> None:
        monkeypatch.setattr(waiting, "_others", lambda: others)
        with waiting.courteous():
            until = time.monotonic() + 10
            while time.monotonic() < until and _hosts() != (others > 0):
                time.sleep(0.01)
            assert _hosts() == (others > 0)

    call(1000)
    call(1000)
    assert len(gathered) == 1
    call(0)
    monkeypatch.setattr(waiting, "_others", lambda: len(os.sched_getaffinity(0)) - 1)  # such as who asked for the call
    with waiting.courteous():
        assert not any(t.shared for t in threading.enumerate() if isinstance(t, waiting._Watcher))
    call(1000)
    assert len(gathered) == 2
    monkeypatch.setattr(waiting, "LINGER", 0.0)
    call(0)
    _gone()


def test_threads_take_turns_on_one_core_and_are_let_go_as_they_were() -> None:
    begun, leave = threading.Event(), threading.Event()
    found: list[set[int]] = []
    own = os.sched_getaffinity(0)

    def later() -> None:
        begun.set()
        leave.wait()
        found.append(os.sched_getaffinity(0))

    with waiting.together():
        assert len(os.sched_getaffinity(0)) == 1
        thread = threading.Thread(target=later)
        thread.start()
        begun.wait()
    leave.set()
    thread.join()
    assert os.sched_getaffinity(0) == own == found[0]


def test_threads_that_get_less_than_one_alone_would_are_put_together(
    two_threads: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    turns: list[float] = []
    began = time.monotonic()
    ran, slept, gain = [0.0], [0], [0]

    @contextmanager
    def noted() -> Iterator[None]:
        turns.append(time.monotonic())
        yield

    def sleeps() -> int:
        slept[0] += gain[0]  # as often in a short turn as in a long look
        return slept[0]

    monkeypatch.setattr(waiting, "together", noted)
    monkeypatch.setattr(waiting, "TURNS", 0.001)
    monkeypatch.setattr(waiting, "LONG_TURNS", 0.001)
    monkeypatch.setattr(waiting, "_sleeps", sleeps)
    monkeypatch.setattr(waiting, "LINGER", 0.05)
    monkeypatch.setattr(waiting, "_others", lambda: 1000)
    monkeypatch.setattr(waiting, "_waited", lambda _: time.monotonic() - began)
    monkeypatch.setattr(time, "process_time", lambda: ran[0] * (time.monotonic() - began))

    def grows() -> bool:
        time.sleep(0.3)
        before = len(turns)
        time.sleep(0.3)
        return len(turns) > before

    with waiting.courteous():
        assert grows()
        gain[0] = 1
        assert grows()
        ran[0] = 1.5
        assert grows(), "they spin beside each other, and pass fewer barriers"
        gain[0] = 0
        assert not grows(), "they get on beside each other"
    _gone()


def test_own_threads_are_no_others(tmp_path: Path) -> None:
    (tmp_path / "loadavg").write_text("0.52 0.40 0.31 7/123 4567")
    for number, state in enumerate("RSRD"):
        (tmp_path / f"self/task/{number}").mkdir(parents=True)
        (tmp_path / f"self/task/{number}/stat").write_text(f"{number} (odd) R name) {state} 1 2 3")
    assert waiting._others(tmp_path) == 5
    assert waiting._others(tmp_path / "nowhere") == 0


def test_one_watcher_is_enough_and_one_thread_needs_none(two_threads: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(waiting, "LINGER", 0.05)
    with waiting.courteous(), waiting.courteous():
        assert _watchers() == 1
    _gone()
    torch.set_num_threads(1)
    with waiting.courteous():
        assert _watchers() == 0


def test_work_on_few_numbers_is_done_alone_where_cores_are_shared(
    two_threads: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    def threads(count: int) -> int:
        with waiting.alone(count):
            return torch.get_num_threads()

    monkeypatch.setattr(waiting, "_waited", lambda _: None)
    monkeypatch.setattr(waiting, "LINGER", 0.0)
    for others, few in ((0, 2), (1000, 1)):
        monkeypatch.setattr(waiting, "_others", lambda others=others: others)
        with waiting.courteous():
            assert (threads(10), threads(waiting.SMALL), torch.get_num_threads()) == (few, 2, 2)
        _gone()


def test_training_is_the_same_to_the_last_bit_in_a_crowd(two_threads: None, monkeypatch: pytest.MonkeyPatch) -> None:
    x, y = torch.randint(0, 256, (400, 1, 16, 16), dtype=torch.uint8), torch.arange(400) % 3

    def trained(others: int) -> torch.Tensor:
        monkeypatch.setattr(waiting, "_others", lambda: others)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            model = nn.Sequential(nn.Conv2d(1, 16, 5), nn.Flatten(), nn.Linear(16 * 144, 3))
        fit(model, x, y, Recipe(epochs=1, lr=0.01))
        return torch.cat([p.detach().flatten() for p in model.parameters()])

    assert torch.equal(trained(0), trained(1000))


def test_work_that_fails_fails_as_before(two_threads: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(waiting, "LINGER", 0.05)
    with pytest.raises(ValueError, match="mine"), waiting.courteous():
        raise ValueError("mine")
    _gone()
