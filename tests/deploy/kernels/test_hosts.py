from __future__ import annotations

import llvmlite.binding as llvm
import numpy as np
import pytest

from sparring.deploy._compile import compile_model
from sparring.deploy.kernels._abi import Layout, module_of
from sparring.deploy.kernels._backward import GradientPlanner
from sparring.deploy.kernels._fusion import tasks_of
from sparring.deploy.kernels._matmul import Lookup, Rows
from sparring.deploy.kernels._plan import Planner, usual

HOSTS = [
    ("aarch64-unknown-linux-gnu", "neoverse-n1", 4, "fmla"),
    ("arm64-apple-darwin", "apple-m1", 4, "fmla"),
    ("x86_64-unknown-linux-gnu", "haswell", 8, "vfmadd"),
    ("x86_64-unknown-linux-gnu", "znver4", 16, "zmm"),
    ("x86_64-unknown-linux-gnu", "x86-64", 4, "mulps"),
]


@pytest.mark.parametrize(("triple", "processor", "lanes", "instruction"), HOSTS)
def test_kernels_compile_for_every_kind_of_host(sparse_model, triple, processor, lanes, instruction):
    llvm.initialize_all_targets()
    llvm.initialize_all_asmprinters()
    program = compile_model(sparse_model("lenet-5", 0.1), (1, 28, 28))
    planners = [
        Planner(program, tasks_of(program), Layout(False, lanes)),
        Planner(program, tasks_of(program), Layout(True, lanes, 4)),
        GradientPlanner(program, Layout(True, lanes, 4)),
    ]
    calls = [call for planner in planners for call in planner.calls(lambda key: usual(lanes))]
    specs = {call.spec.name: call.spec for call in calls}
    assert any(isinstance(spec, Rows) for spec in specs.values())
    assert not any(isinstance(spec, Lookup) for spec in specs.values())  # which only AVX-512 has
    machine = llvm.Target.from_triple(triple).create_target_machine(cpu=processor, opt=3)
    code = machine.emit_assembly(llvm.parse_assembly(module_of(list(specs.values()))))
    assert code.count(instruction) > 100
    assert all(name in code for name in specs)


def test_rows_are_grouped_by_length(sparse_model):
    """Few slots are empty: the kernel's work is what is kept."""
    program = compile_model(sparse_model("lenet-300-100", 0.1), (1, 28, 28))
    planner = Planner(program, tasks_of(program), Layout(False, 8))
    calls = [c for c in planner.calls(lambda key: usual(8)) if isinstance(c.spec, Rows)]
    slots = sum(call.tables[2].size for call in calls)
    weights = np.concatenate([call.tables[2].ravel() for call in calls])
    assert program.nonzeros == np.count_nonzero(weights)
    assert slots < 1.2 * program.nonzeros
