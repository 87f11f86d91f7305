"""Kernel calls: a kernel, its arguments and its memory layout; how kernels are compiled and called."""

from __future__ import annotations

import ctypes
import hashlib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from enum import IntEnum
from functools import cache, partial
from pathlib import Path

import llvmlite
import numpy as np
from llvmlite import ir
from numpy.typing import NDArray

from ._llvm_ir import INT32, INT64, POINTER, WHOLE, Kernel, Spec, Unit, Value
from ._native import Code

Table = NDArray[np.generic]
_SPINS = 10_000  # turns of a waiting loop, some ten microseconds


@dataclass(frozen=True)
class Layout:
    """Layout of images in memory: one by one with pixels as vectors, or `units` tiles of `lanes` images each (`tiles`).

    A pixel of a tile is `vectors` vectors long: several if there are only linear layers, whose weights are then used
    for more images at once.
    """

    tiles: bool
    lanes: int
    units: int = 1
    vectors: int = 1

    @property
    def together(self) -> int:
        """Return the images of one run."""
        return self.lanes * self.units if self.tiles else 1

    @property
    def side(self) -> int:
        """Return how many images are transposed at once: a vector of 16, else 4."""
        return 16 if self.lanes // self.vectors == 16 else 4


@dataclass(frozen=True)
class Tiling:
    """Tuning of a layer: maximum of accumulators of a row, lanes of a vector, bytes of input that a block may touch.

    `height` rows share what they read, in a layer with few zeros; `across`: a lane is a row, and not a pixel.
    """

    accumulators: int = 16
    lanes: int = 16
    block_bytes: int = 0  # 0: all input channels at once
    height: int = 1
    across: bool = False


@dataclass(frozen=True, eq=False)
class Call:
    """One kernel call: its kernel, its arguments, the tables that they point to, and whether it runs once per unit.

    Neighbouring calls of one chain (0: none) run in turns, each on the same one of `turns` shares of its rows.
    """

    spec: Spec
    arguments: NDArray[np.int64]
    tables: tuple[Table, ...]
    per_unit: bool
    chain: int = 0
    turns: int = 1


def kernel_call(spec: Spec, arguments: list[int], tables: tuple[Table, ...] = (), *, per_unit: bool = True) -> Call:
    """Make a call with the addresses of tables behind the other arguments."""
    addresses = [table.ctypes.data for table in tables]
    return Call(spec, np.array([*arguments, *addresses], np.int64), tables, per_unit)


class Run(IntEnum):
    """Arguments of a run: int64s about its images, then those that it fills for the kernels, unit by unit.

    In a backward pass, the gradient of the images replaces the logits.
    """

    IMAGES = 0  # their address
    LOGITS = 1  # where the logits go
    COUNT = 2  # images
    IMAGE_BYTES = 3
    LOGITS_BYTES = 4
    LANES = 5  # images of a unit
    OWN = 6  # offset in the arena of the first unit's own memory
    UNIT_BYTES = 7  # from one unit's own memory to the next
    UPSTREAM = 8  # address of the gradients of the logits
    UPSTREAM_BYTES = 9  # of one image
    PARTS = 10  # shares of each kernel: as many as threads, each of which has its own call
    THREAD = 11  # the number of this thread, which takes the share of this number if it can
    COUNTERS = 12  # address of int64s for each kernel's call: how many shares are done, and which ones are taken
    PASSED = 13  # calls that this thread has passed
    UNIT = 14  # where the fields of `Unit` begin


def fields_of(told: Mapping[int, int]) -> NDArray[np.int64]:
    """Return the fields of a run by their numbers, zero if not given; one thread does all the work."""
    fields = np.zeros(Run.UNIT + len(Unit), np.int64)
    fields[Run.UNIT + Unit.LAST] = WHOLE
    fields[list(told)] = list(told.values())
    return fields


def add_kernels(code: Code, specs: Iterable[Spec]) -> list[str]:
    """Compile those of the kernels that the code lacks, and return their names."""
    missing = {spec.name: spec for spec in specs if spec.name not in code}
    if missing:
        code.add(_identity(list(missing)), lambda: module_of(list(missing.values())), list(missing))
    return list(missing)


def add_cached_kernels(code: Code, names: list[str]) -> None:
    """Load kernels that `add_kernels` has compiled together, if they are still cached."""
    code.add_cached(_identity(names), names)


def _identity(names: list[str]) -> str:
    return "\0".join((*sorted(names), sources()))


def add_runner(code: Code) -> None:
    """Compile the function "run", which executes a plan."""
    code.add(f"run\0{sources()}", runner, ["run"], symbols=[("sched_yield", _address_of("sched_yield"))])


def _address_of(name: str) -> int:
    """Return the address of a function of the C library."""
    return ctypes.cast(getattr(ctypes.CDLL(None), name), ctypes.c_void_p).value or 0


@cache
def sources() -> str:
    """Return a hash of the code that writes kernels, so that a cache never outlives it."""
    content = b"".join(path.read_bytes() for path in sorted(Path(__file__).parent.rglob("*.py")))
    return hashlib.sha256(content + llvmlite.__version__.encode()).hexdigest()


def module_of(specs: list[Spec]) -> str:
    """Return the LLVM IR of a module with these kernels."""
    module = ir.Module("sparring")
    for spec in specs:
        kernel = Kernel(module, spec.name)
        if not spec.shares:
            kernel.alone()
        spec.emit(kernel)
        kernel.finish()
    return str(module)


def runner() -> str:
    """Return the LLVM IR of `void run(arena, segments, call)`, which executes a plan in one call, see `Run`.

    segments: a count, then for each (1 to run it once for every unit of images that is in use, else 0; operations;
    address of their table; turns), a table holding a kernel's address and its arguments' address each. Threads may run
    it together, see `_divide`.
    """
    module = ir.Module("runner")
    pause = ir.Function(module, ir.FunctionType(INT32, []), "sched_yield")
    k = Kernel(module, "run")
    b = k.b
    image_bytes, logits_bytes, upstream_bytes = (
        k.field(f) for f in (Run.IMAGE_BYTES, Run.LOGITS_BYTES, Run.UPSTREAM_BYTES)
    )
    images, lanes, unit_bytes = k.field(Run.COUNT), k.field(Run.LANES), k.field(Run.UNIT_BYTES)
    inner = k.at(k.call, 8 * Run.UNIT)
    parts = k.field(Run.PARTS)
    used = b.sdiv(b.add(images, b.sub(lanes, k.number(1))), lanes)
    kind = ir.FunctionType(ir.VoidType(), [POINTER, POINTER, POINTER])
    with k.loop(k.load(k.arguments, INT64)) as number:
        segment = k.at(k.arguments, b.add(b.mul(number, k.number(32)), k.number(8)))
        each, count = k.load(segment, INT64), k.load(k.at(segment, 8), INT64)
        table = b.inttoptr(k.load(k.at(segment, 16), INT64), POINTER)
        with k.loop(b.select(b.icmp_signed("!=", each, k.number(0)), used, k.number(1))) as unit:
            before = b.mul(unit, lanes)
            left = b.sub(images, before)
            told = {
                Unit.IMAGES: b.add(k.field(Run.IMAGES), b.mul(before, image_bytes)),
                Unit.LOGITS: b.add(k.field(Run.LOGITS), b.mul(before, logits_bytes)),
                Unit.COUNT: b.select(b.icmp_signed("<", left, lanes), left, lanes),
                Unit.UPSTREAM: b.add(k.field(Run.UPSTREAM), b.mul(before, upstream_bytes)),
                Unit.OWN: b.add(k.field(Run.OWN), b.mul(unit, unit_bytes)),
            }
            for field, value in told.items():
                k.store(value, k.at(inner, 8 * field))
            together = b.icmp_signed(">", parts, k.number(1))
            turns = b.select(together, k.number(1), k.load(k.at(segment, 24), INT64))
            with k.loop(turns) as turn, k.loop(count) as entry:
                pair = k.at(table, b.mul(entry, k.number(16)))
                function = b.inttoptr(k.load(pair, INT64), kind.as_pointer())
                arguments = b.inttoptr(k.load(k.at(pair, 8), INT64), POINTER)
                run = partial(b.call, function, [k.arena, arguments, inner])
                with b.if_else(together) as (shared, alone):
                    with shared:
                        _divide(k, run, inner, parts, pause)
                    with alone:
                        _set_share(k, inner, turn, turns)
                        run()
    k.finish()
    return str(module)


def _set_share(k: Kernel, inner: Value, number: Value, parts: Value) -> None:
    """Tell kernels to compute one of some shares of their rows."""
    b = k.b
    following, size = b.add(number, k.number(1)), b.sdiv(k.number(WHOLE), parts)
    last = b.select(b.icmp_signed("==", following, parts), k.number(WHOLE), b.mul(following, size))
    k.store(b.mul(number, size), k.at(inner, 8 * Unit.FIRST))
    k.store(last, k.at(inner, 8 * Unit.LAST))


def _divide(k: Kernel, run: Callable[[], None], inner: Value, parts: Value, pause: Value) -> None:
    """Run a kernel together with other threads: each takes its own share, then those that nobody has taken.

    Its own, since a thread has most of what it needs in its cache. Then wait until all shares are done. Threads that
    the system has not started yet are not waited for.
    """
    b = k.b
    number = k.field(Run.PASSED)
    k.store(b.add(number, k.number(1)), k.at(k.call, 8 * Run.PASSED))
    size = b.mul(b.add(parts, k.number(1)), k.number(8))
    done = k.at(k.address(Run.COUNTERS), b.mul(number, size))
    with k.loop(parts) as turn:
        share = b.srem(b.add(k.field(Run.THREAD), turn), parts)
        taken = k.at(done, b.mul(b.add(share, k.number(1)), k.number(8)))
        with b.if_then(b.icmp_signed("==", b.atomic_rmw("xchg", taken, k.number(1), "acq_rel"), k.number(0))):
            _set_share(k, inner, share, parts)
            run()
            b.atomic_rmw("add", done, k.number(1), "acq_rel")
    took = b.block
    wait, rest, end = (k.function.append_basic_block(n) for n in ("wait", "rest", "end"))
    b.branch(wait)
    b.position_at_end(wait)
    turns = b.phi(INT64)
    more = b.add(turns, k.number(1))
    finished = b.icmp_signed(">=", b.load_atomic(done, "acquire", 8, typ=INT64), parts)
    b.cbranch(finished, end, rest)
    b.position_at_end(rest)  # kernels take equally long; later, let other programs run
    with b.if_then(b.icmp_signed(">", more, k.number(_SPINS))):
        b.call(pause, [])
    turns.add_incoming(k.number(0), took)
    turns.add_incoming(more, b.block)
    b.branch(wait)
    b.position_at_end(end)
