"""Memory that is free, and a limit at which allocations fail instead of processes ending."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from sparring import ram
from sparring.ram import size_text


def test_sizes_are_read_by_people() -> None:
    assert [size_text(count) for count in (1, 3 * 2**20, 3 * 2**29)] == ["1 MiB", "3 MiB", "1.5 GiB"]


def test_a_group_s_limit_counts(tmp_path: Path) -> None:
    group = tmp_path / "cgroup" / "a" / "b"
    group.mkdir(parents=True)
    (tmp_path / "self").write_text("0::/a/b\n")
    for folder, most, now, cached in ((group, "max", 10, 0), (group.parent, "1000", 700, 50)):
        (folder / "memory.max").write_text(most)
        (folder / "memory.current").write_text(str(now))
        (folder / "memory.stat").write_text(f"anon 5\ninactive_file {cached}\n")
    assert ram._left_to_group(tmp_path / "cgroup", tmp_path / "self") == 350
    assert ram._left_to_group(tmp_path / "cgroup", tmp_path / "none") > 2**60
    old = tmp_path / "cgroup" / "memory" / "c"
    old.mkdir(parents=True)
    (old / "memory.limit_in_bytes").write_text("500")
    (old / "memory.usage_in_bytes").write_text("100")
    (old / "memory.stat").write_text("")
    (tmp_path / "self").write_text("4:memory:/c\n3:cpu:/c\n")
    assert ram._left_to_group(tmp_path / "cgroup", tmp_path / "self") == 400


def test_free_memory_is_what_the_system_says(tmp_path: Path) -> None:
    (tmp_path / "meminfo").write_text("MemTotal: 9 kB\nMemAvailable:       7 kB\n")
    assert ram._of_machine(tmp_path / "meminfo") == 7 * 1024
    assert ram._of_machine(tmp_path / "none") > 2**20
    assert 2**20 < ram.available() < 2**50


LIMITED = """
import resource, sys
from sparring import ram
kind, size, before = getattr(resource, sys.argv[1]), sys.argv[2], ram.available()
resource.setrlimit(kind, (ram._sizes()[size] + (300 << 20), resource.RLIM_INFINITY))
print(before > 400 << 20, 200 << 20 < ram.available() <= 300 << 20)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="limits of a process are counted on Linux")
@pytest.mark.parametrize(("limit", "size"), [("RLIMIT_AS", "VmSize"), ("RLIMIT_DATA", "VmData")])
def test_limits_of_the_process_count(limit: str, size: str) -> None:
    words = [sys.executable, "-c", LIMITED, limit, size]
    assert subprocess.run(words, capture_output=True, text=True, check=True).stdout == "True True\n"


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="limits of a process are counted on Linux")
def test_what_does_not_fit_fails_instead_of_being_killed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ram, "available", lambda: 2 * ram.LEAST)
    with ram.bounded(), pytest.raises(MemoryError):
        bytearray(3 * ram.LEAST)
    with ram.bounded():
        bytearray(ram.LEAST)
    with ram.bounded(workers=100), pytest.raises(MemoryError):
        bytearray(2 * ram.LEAST)
    bytearray(3 * ram.LEAST)  # the limit ends with the block
