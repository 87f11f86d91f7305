"""Generated functions as Python built-ins, which cost less per call than ctypes.

One image through LeNet-300-100 at 98% sparsity takes 0.95 µs with these functions and 6.5 µs with ctypes and the checks
in Python that they replace: without them, the call would cost several times what the network costs (medians, AMD EPYC
of 2024 with AVX-512, processor time: `python benchmarks/packed.py`). Nothing else justifies this module, so only
`_engine` imports it. It uses only CPython's public functions; if they are missing, `builtin` and `reader` return None
and ctypes is used.
"""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Callable
from enum import IntEnum
from functools import cache
from typing import Any

import numpy as np
from llvmlite import ir
from numpy.typing import NDArray

from .._program import Floats, Shape
from ._llvm_ir import BYTE, INT32, INT64, POINTER
from ._native import Code

_ANSWER, _ADDRESS = "answer", "address"
_ONE_OBJECT = 8  # METH_O: the function takes one argument
_C_ORDER, _TYPED = 0x38, 0x04  # PyBUF_C_CONTIGUOUS, PyBUF_FORMAT
# What the function calls: result and arguments.
_USED = {
    "PyCapsule_GetPointer": (POINTER, (POINTER, POINTER)),
    "PyObject_GetBuffer": (INT32, (POINTER, POINTER, INT32)),
    "PyBuffer_Release": (ir.VoidType(), (POINTER,)),
    "PyErr_Clear": (ir.VoidType(), ()),
    "PyObject_CallObject": (POINTER, (POINTER, POINTER)),
    "Py_IncRef": (ir.VoidType(), (POINTER,)),
    "PyEval_SaveThread": (POINTER, ()),
    "PyEval_RestoreThread": (ir.VoidType(), (POINTER,)),
    "PyLong_FromVoidPtr": (POINTER, (POINTER,)),
}


class _View(IntEnum):
    """Bytes at which the fields of CPython's Py_buffer begin; it has 80."""

    ADDRESS = 0
    DIMENSIONS = 36  # int
    FORMAT = 40  # address of characters
    SHAPE = 48  # address of int64s


class Answer(IntEnum):
    """What `builtin` reads: int64s."""

    RUN = 0  # the function "run", and its arguments
    ARENA = 1
    SEGMENTS = 2
    CALL = 3
    BUSY = 4  # 1 while a call uses the memory
    COPY = 5  # a Python function without arguments, which returns the result
    NONE = 6  # Python's None
    SHORT = 7  # 1 if other threads may as well wait for a call
    SIDES = 8  # dimensions of an image, then their sizes


class _Definition(ctypes.Structure):
    """CPython's PyMethodDef."""

    _fields_ = (
        ("name", ctypes.c_char_p),
        ("function", ctypes.c_void_p),
        ("flags", ctypes.c_int),
        ("doc", ctypes.c_char_p),
    )


def add_answer(code: Code) -> None:
    """Compile the functions behind `builtin` and `reader`, if this is CPython."""
    addresses = _addresses()
    if addresses is not None:
        code.add("answer\0" + _answer(), _answer, [_ANSWER, _ADDRESS], symbols=addresses.items())


def builtin(code: Code, arguments: NDArray[np.int64]) -> Callable[[object], Floats | None] | None:
    """Return a function that runs a plan on the memory of an array, or None if unsupported.

    arguments: see `Answer` and `answer_fields`; they, what they point to, and the code must outlive the result, which
    returns None for anything but a float32 array of the right shape in C order, and while another thread calls it.
    """
    if _ANSWER not in code:
        return None
    make = _function("PyCapsule_New", ctypes.c_void_p, ctypes.c_void_p, ctypes.c_void_p)
    return _made(_definition(code[_ANSWER], _ANSWER), make(arguments.ctypes.data, None, None))


def answer_fields(
    run: tuple[int, int, int, int], copy: Callable[[], Floats], shape: Shape, *, short: bool
) -> NDArray[np.int64]:
    """Return the fields of `Answer`: run, arena, segments and call; what gives the result; the shape of images.

    short: a call takes less time than it takes to let another thread run.
    """
    return np.array([*run, 0, id(copy), id(None), short, len(shape), *shape], np.int64)


def reader(code: Code) -> Callable[[Any], int] | None:
    """Return a function of one array that returns its address, or None if unsupported.

    The code must outlive it. It raises ValueError or BufferError for an array that is not contiguous.
    """
    return _made(_definition(code[_ADDRESS], _ADDRESS), None) if _ADDRESS in code else None


def _made(definition: _Definition, owner: object) -> Callable[[Any], Any]:
    make = _function("PyCFunction_NewEx", ctypes.c_void_p, ctypes.py_object, ctypes.c_void_p)
    function: Callable[[Any], Any] = make(ctypes.addressof(definition), owner, None)
    return function


@cache
def _definition(address: int, name: str) -> _Definition:
    """Return the definition of the function at an address; it is kept alive, since CPython's functions point to it."""
    return _Definition(name.encode(), address, _ONE_OBJECT, None)


def _function(name: str, *arguments: Any) -> Any:
    return ctypes.PYFUNCTYPE(ctypes.py_object, *arguments)((name, ctypes.pythonapi))


@cache
def _addresses() -> dict[str, int] | None:
    """Return the addresses of the functions that the generated one calls; None if this is not CPython."""
    if sys.implementation.name != "cpython":
        return None
    try:
        return {name: ctypes.cast(getattr(ctypes.pythonapi, name), ctypes.c_void_p).value or 0 for name in _USED}
    except AttributeError:
        return None


@cache
def _answer() -> str:
    """Return the LLVM IR of `PyObject *answer(PyObject *capsule, PyObject *array)` and of `address` for any owner."""
    module = ir.Module(_ANSWER)
    used = {
        name: ir.Function(module, ir.FunctionType(result, arguments), name)
        for name, (result, arguments) in _USED.items()
    }
    _write_answer(module, used)
    _write_address(module, used)
    return str(module)


def _begun(module: ir.Module, name: str) -> tuple[ir.IRBuilder, Any, Any, Any]:
    """Begin a built-in function of one array; return also its owner, the array, and space for a Py_buffer."""
    function = ir.Function(module, ir.FunctionType(POINTER, [POINTER, POINTER]), name)
    b = ir.IRBuilder(function.append_basic_block("entry"))
    return b, *function.args, b.alloca(ir.ArrayType(INT64, 16))


def _int(value: int, kind: Any = INT64) -> Any:
    return ir.Constant(kind, value)


def _write_address(module: ir.Module, used: dict[str, Any]) -> None:
    b, _, array, view = _begun(module, _ADDRESS)
    failed = b.call(used["PyObject_GetBuffer"], [array, view, _int(0, INT32)])
    with b.if_then(b.icmp_signed("!=", failed, _int(0, INT32))):
        b.ret(ir.Constant(POINTER, None))  # CPython has set the error
    address = b.load(view, typ=POINTER)
    b.call(used["PyBuffer_Release"], [view])
    b.ret(b.call(used["PyLong_FromVoidPtr"], [address]))


def _write_answer(module: ir.Module, used: dict[str, Any]) -> None:
    b, capsule, array, view = _begun(module, _ANSWER)
    fields = b.call(used["PyCapsule_GetPointer"], [capsule, ir.Constant(POINTER, None)])

    def at(pointer: Any, offset: Any, kind: Any) -> Any:
        place = _int(offset) if isinstance(offset, int) else offset
        return b.load(b.gep(pointer, [place], source_etype=BYTE), typ=kind)

    def field(number: int, kind: Any = POINTER) -> Any:
        return at(fields, 8 * number, kind)

    def unless(good: Any, *, held: bool) -> None:
        """Return None, after the release of an array that is held, unless a condition is good."""
        with b.if_then(b.not_(good)):
            b.call(used["PyBuffer_Release" if held else "PyErr_Clear"], [view] if held else [])
            b.call(used["Py_IncRef"], [field(Answer.NONE)])
            b.ret(field(Answer.NONE))

    failed = b.call(used["PyObject_GetBuffer"], [array, view, _int(_C_ORDER | _TYPED, INT32)])
    unless(b.icmp_signed("==", failed, _int(0, INT32)), held=False)
    name = at(view, _View.FORMAT, POINTER)
    same = b.icmp_signed("==", at(name, 0, ir.IntType(16)), _int(ord("f"), ir.IntType(16)))
    many = b.sext(at(view, _View.DIMENSIONS, INT32), INT64)
    unless(b.and_(same, b.icmp_signed("==", many, field(Answer.SIDES, INT64))), held=True)
    sides, before = at(view, _View.SHAPE, POINTER), b.block
    check, done = b.append_basic_block("check"), b.append_basic_block("done")
    b.branch(check)
    b.position_at_end(check)
    number, agree = b.phi(INT64), b.phi(ir.IntType(1))
    place = b.mul(number, _int(8))
    asked = at(fields, b.add(place, _int(8 * (Answer.SIDES + 1))), INT64)
    both, following = b.and_(agree, b.icmp_signed("==", asked, at(sides, place, INT64))), b.add(number, _int(1))
    for phi, first, then in ((number, _int(0), following), (agree, _int(1, ir.IntType(1)), both)):
        phi.add_incoming(first, before)
        phi.add_incoming(then, check)
    b.cbranch(b.icmp_signed("<", following, many), check, done)
    b.position_at_end(done)
    unless(both, held=True)
    busy = b.gep(fields, [_int(8 * Answer.BUSY)], source_etype=BYTE)
    unless(b.icmp_signed("==", b.atomic_rmw("xchg", busy, _int(1), "acquire"), _int(0)), held=True)
    kind = ir.FunctionType(ir.VoidType(), [POINTER, POINTER, POINTER])
    run, call = field(Answer.RUN, kind.as_pointer()), field(Answer.CALL)
    b.store(at(view, _View.ADDRESS, INT64), call)  # the call's first field is the images' address
    with b.if_else(b.icmp_signed("!=", field(Answer.SHORT, INT64), _int(0))) as (short, long):
        with short:
            b.call(run, [field(Answer.ARENA), field(Answer.SEGMENTS), call])
        with long:
            thread = b.call(used["PyEval_SaveThread"], [])
            b.call(run, [field(Answer.ARENA), field(Answer.SEGMENTS), call])
            b.call(used["PyEval_RestoreThread"], [thread])
    b.call(used["PyBuffer_Release"], [view])
    result = b.call(used["PyObject_CallObject"], [field(Answer.COPY), ir.Constant(POINTER, None)])
    b.atomic_rmw("xchg", busy, _int(0), "release")
    b.ret(result)
