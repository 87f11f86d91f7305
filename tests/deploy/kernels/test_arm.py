"""Arm code (NEON), run under qemu: the kernels' own machine code, linked into a program that holds all its tables."""

from __future__ import annotations

import math
import shutil
import subprocess
from collections.abc import Sequence
from itertools import groupby
from pathlib import Path

import llvmlite.binding as llvm
import numpy as np
import pytest
import torch

from sparring.deploy._artefact import round_program
from sparring.deploy._compile import compile_model
from sparring.deploy._program import Floats, Program
from sparring.deploy._reference import run_reference
from sparring.deploy.kernels._abi import Call, Layout, Run, Tiling, fields_of, module_of, runner
from sparring.deploy.kernels._fusion import tasks_of
from sparring.deploy.kernels._plan import Planner, candidates, usual
from sparring.deploy.kernels.int8._plan import BytePlanner
from sparring.deploy.rounding._calibrate import calibrate
from sparring.deploy.rounding._reference import run_rounded

COMPILER, EMULATOR = "aarch64-linux-gnu-gcc", "qemu-aarch64"
pytestmark = pytest.mark.skipif(
    shutil.which(COMPILER) is None or shutil.which(EMULATOR) is None,
    reason="needs Debian's qemu-user, gcc-aarch64-linux-gnu and libc6-dev-arm64-cross",
)
LANES = 4

MAIN = """
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
{declared}
extern void run(char *, long *, long *);
static float images[] __attribute__((aligned(64))) = {{{images}}};
static float logits[{logits}];
static long fields[] = {{{fields}}};
int main(void) {{
  char *arena = aligned_alloc(64, {arena});
  memset(arena, 0, {arena});
{fills}
  fields[{at_images}] = (long)images; fields[{at_logits}] = (long)logits; fields[{at_count}] = {count};
  run(arena, segments, fields);
  fwrite(logits, sizeof(float), {logits}, stdout);
  return 0;
}}
"""


@pytest.mark.parametrize("layout", [Layout(False, LANES), Layout(True, LANES, 2)], ids=["one image", "tiles"])
@pytest.mark.parametrize(("name", "shape"), [("lenet-5", (1, 28, 28)), ("resnet-32", (3, 8, 8))])
def test_arm_code_computes_the_network(tmp_path: Path, sparse_model, name: str, shape, layout: Layout) -> None:  # type: ignore[no-untyped-def]
    program = compile_model(sparse_model(name, 0.2, width=0.25), shape)
    count = 1 if not layout.tiles else layout.together - 1
    x = np.random.default_rng(0).random((count, *program.shape), np.float32)
    found, expected = _emulated(program, layout, x, tmp_path), run_reference(program, x)
    assert np.abs(found - expected).max() <= 5e-6 * np.abs(expected).max()


@pytest.mark.parametrize("layout", [Layout(False, LANES), Layout(True, LANES, 2)], ids=["one image", "tiles"])
def test_arm_code_computes_in_integers(tmp_path: Path, sparse_model, layout: Layout) -> None:  # type: ignore[no-untyped-def]
    program = round_program(compile_model(sparse_model("resnet-32", 0.2, width=0.25), (3, 8, 8)), "int8")
    source = np.random.default_rng(0)
    rounded = calibrate(program, torch.from_numpy(source.random((8, 3, 8, 8), np.float32)))
    x = source.random((1 if not layout.tiles else layout.together - 1, 3, 8, 8), np.float32)
    assert (_emulated(rounded, layout, x, tmp_path) == run_rounded(rounded, x)).all()


@pytest.mark.parametrize("layout", [Layout(False, LANES), Layout(True, LANES, 2)], ids=["one image", "tiles"])
def test_arm_code_computes_dense_layers(tmp_path: Path, sparse_model, layout: Layout) -> None:  # type: ignore[no-untyped-def]
    program = compile_model(sparse_model("resnet-32", 1.0, width=0.25), (3, 8, 8))
    count = 1 if not layout.tiles else layout.together - 1
    x, expected = np.random.default_rng(0).random((count, *program.shape), np.float32), None
    for choice in [c for c in candidates(LANES, layout.tiles) if c.height > 1 or c.across]:
        found = _emulated(program, layout, x, tmp_path, choice)
        expected = run_reference(program, x) if expected is None else expected
        assert np.abs(found - expected).max() <= 5e-6 * np.abs(expected).max()


def _emulated(program: Program, layout: Layout, x: Floats, folder: Path, choice: Tiling | None = None) -> Floats:
    """Return the logits of images that a program for Arm computes."""
    planner = Planner(program, tasks_of(program), layout)
    if program.rounding:
        planner = BytePlanner(program, layout, way="plain", lookup=False)
    calls = planner.calls(lambda key: choice or usual(LANES))
    specs = {call.spec.name: call.spec for call in calls}
    objects = [
        _object(folder / f"{number}.o", text) for number, text in enumerate((module_of([*specs.values()]), runner()))
    ]
    fields = fields_of(
        {
            Run.IMAGE_BYTES: 4 * math.prod(program.shape),
            Run.LOGITS_BYTES: 4 * program.classes,
            Run.LANES: layout.lanes if layout.tiles else 1,
            Run.OWN: planner.common_bytes,
            Run.UNIT_BYTES: planner.unit_bytes,
            Run.UPSTREAM_BYTES: 4 * program.classes,
        }
    )
    source = MAIN.format(
        declared=_declared(calls), images=_numbers(x.ravel()), logits=len(x) * program.classes, fields=_numbers(fields),
        arena=-(-(planner.arena_bytes + 64) // 64) * 64, at_images=int(Run.IMAGES), at_logits=int(Run.LOGITS),
        at_count=int(Run.COUNT), count=len(x),
        fills="".join(f"  memset(arena + {at}, {byte}, {size});\n" for at, size, byte in planner.fills()),
    )  # fmt: skip
    (folder / "main.c").write_text(source)
    binary = folder / "network"
    subprocess.run([COMPILER, "-static", "-o", binary, folder / "main.c", *objects, "-lm"], check=True, timeout=120)
    done = subprocess.run([EMULATOR, binary], check=True, capture_output=True, timeout=120)
    return np.frombuffer(done.stdout, np.float32).reshape(len(x), program.classes)


def _object(path: Path, text: str) -> Path:
    llvm.initialize_all_targets()
    llvm.initialize_all_asmprinters()
    target = llvm.Target.from_triple("aarch64-unknown-linux-gnu")
    machine = target.create_target_machine(cpu="neoverse-n1", opt=3, reloc="pic")
    path.write_bytes(machine.emit_object(llvm.parse_assembly(text)))
    return path


def _declared(calls: Sequence[Call]) -> str:
    """Return C that declares kernels, tables and arguments, and the segments that the runner executes."""
    lines: list[str] = []
    for number, call in enumerate(calls):
        for place, table in enumerate(call.tables):
            content = ",".join(map(str, np.ascontiguousarray(table).view(np.uint8).ravel().tolist()))
            lines.append(f"static unsigned char t{number}_{place}[] __attribute__((aligned(64))) = {{{content}}};")
        plain = call.arguments[: len(call.arguments) - len(call.tables)].tolist()
        given = [*map(str, plain), *(f"(long)t{number}_{place}" for place in range(len(call.tables)))]
        lines.append(f"static long a{number}[] = {{{','.join(given) or '0'}}};")
        lines.append(f'extern void k{number}(char *, long *, long *) __asm__("{call.spec.name}");')
    heads: list[str] = []
    for _, group in groupby(range(len(calls)), key=lambda number: (calls[number].per_unit, calls[number].chain)):
        members, at = list(group), len(heads)
        pairs = ",".join(f"(long)k{number},(long)a{number}" for number in members)
        lines.append(f"static long g{at}[] = {{{pairs}}};")
        first = calls[members[0]]
        heads.append(f"{int(first.per_unit)},{len(members)},(long)g{at},{first.turns}")
    return "\n".join([*lines, f"static long segments[] = {{{len(heads)},{','.join(heads)}}};"])


def _numbers(values: np.ndarray) -> str:
    return ",".join(repr(float(v)) if values.dtype.kind == "f" else str(int(v)) for v in values)
