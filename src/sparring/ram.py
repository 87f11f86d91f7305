"""Memory of this machine: how much is free and used, and a limit that keeps the system from killing processes.

Nothing here imports torch.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

if sys.platform != "win32":
    import resource

__all__ = ["available", "bounded", "size_text", "used_memory"]

UNLIMITED = 1 << 62
LEAST = 256 << 20  # bytes that a worker may take although others use the memory now


def size_text(count: int) -> str:
    """Return a number of bytes in readable units."""
    return f"{count / 2**30:.1f} GiB" if count >= 2**30 else f"{max(1, count >> 20)} MiB"


def available() -> int:
    """Return how many bytes this process may take: of the machine, its control groups and its own limits the least."""
    return min(_of_machine(), _left_to_group(), _left_to_process())


@contextmanager
def bounded(workers: int = 1) -> Iterator[None]:
    """Let an allocation beyond a worker's share of the free memory fail, here and in processes that are begun inside.

    Without a limit Linux hands out more memory than there is, and ends whichever process it likes once that is used.
    Where there is an NVIDIA driver nothing is limited: how it reserves memory was not tried. Elsewhere nothing is done.
    """
    if not sys.platform.startswith("linux") or Path("/dev/nvidiactl").exists():
        yield
        return
    before = resource.getrlimit(resource.RLIMIT_DATA)
    most = _sizes().get("VmData", 0) + max(LEAST, available() // workers)
    with suppress(OSError, ValueError):  # where the system allows none
        resource.setrlimit(resource.RLIMIT_DATA, (most, before[1]))
    try:
        yield
    finally:
        with suppress(OSError, ValueError):
            resource.setrlimit(resource.RLIMIT_DATA, before)


def _left_to_process() -> int:
    """Return what `ulimit -v` and `ulimit -d` leave this process."""
    left, sizes = [UNLIMITED], _sizes()
    for limit, size in (("RLIMIT_AS", "VmSize"), ("RLIMIT_DATA", "VmData")):
        if size in sizes:
            most, _ = resource.getrlimit(getattr(resource, limit))
            left += [] if most == resource.RLIM_INFINITY else [max(0, most - sizes[size])]
    return min(left)


def _sizes(status: Path = Path("/proc/self/status")) -> dict[str, int]:
    """Return the sizes in bytes that Linux counts of this process, none elsewhere."""
    with suppress(OSError, ValueError):
        rows = (line.split() for line in status.read_text().splitlines() if line.endswith(" kB"))
        return {name.rstrip(":"): 1024 * int(count) for name, count, _ in rows}
    return {}


def used_memory(process: str | int = "self", *, children: bool = False) -> int:
    """Return the resident bytes of this process, or the peak if the system reports only that.

    `children`: including those of its child processes, recursively.
    """
    with suppress(OSError, ValueError, IndexError):
        own = int(Path(f"/proc/{process}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
        return own + (sum(used_memory(child, children=True) for child in _children(process)) if children else 0)
    if process != "self":
        return 0  # it has ended
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # bytes on macOS


def _children(process: str | int) -> list[int]:
    files = Path(f"/proc/{process}/task").glob("*/children")
    return [int(child) for file in files for child in file.read_text().split()]


def _of_machine(file: Path = Path("/proc/meminfo")) -> int:
    """Return the available memory of the system; half of all memory if unknown."""
    with suppress(OSError, ValueError, IndexError):
        lines = dict(line.split(":") for line in file.read_text().splitlines())
        return 1024 * int(lines["MemAvailable"].split()[0])
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2


def _left_to_group(system: Path = Path("/sys/fs/cgroup"), process: Path = Path("/proc/self/cgroup")) -> int:
    """Return the memory that the process's control groups (version 2 or 1) leave; cached file pages count as free."""
    left = [UNLIMITED]
    with suppress(OSError):
        for line in process.read_text().splitlines():
            _, kinds, place = line.split(":", 2)
            if kinds in ("", "memory"):
                here = system / kinds
                for folder in (here / place.strip("/"), *(here / place.strip("/")).parents):
                    if folder.is_relative_to(here):
                        left += _left_in(folder, kinds)
    return min(left)


def _left_in(folder: Path, kinds: str) -> list[int]:
    limit, used = ("memory.limit_in_bytes", "memory.usage_in_bytes") if kinds else ("memory.max", "memory.current")
    with suppress(OSError, ValueError):  # "max" means no limit
        most, now = (int((folder / name).read_text()) for name in (limit, used))
        stat = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
        return [max(0, most - now + int(stat.get("inactive_file", 0)))]
    return []
