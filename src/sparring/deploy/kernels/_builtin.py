"""Generated functions as Python built-ins, which cost less per call than ctypes.

Only `_engine` imports this module. It uses only CPython's public functions; if they are missing, `builtin` and `reader`
return None and ctypes is used. The gain: LeNet-300-100 with 2% of its weights takes 0.96 µs for one image, and 2.5
through ctypes; with 5%, 1.8 and 3.4 (one AVX-512 core).
"""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Callable
from functools import cache
from typing import Any

from llvmlite import ir

from ._llvm_ir import INT32, INT64, POINTER
from ._native import Code

_ANSWER, _ADDRESS = "answer", "address"
_ONE_OBJECT = 8  # METH_O: the function takes one argument
# What the function calls: result and arguments.
_USED = {
    "PyCapsule_GetPointer": (POINTER, (POINTER, POINTER)),
    "PyObject_GetBuffer": (INT32, (POINTER, POINTER, INT32)),
    "PyBuffer_Release": (ir.VoidType(), (POINTER,)),
    "PyEval_SaveThread": (POINTER, ()),
    "PyEval_RestoreThread": (ir.VoidType(), (POINTER,)),
    "PyLong_FromVoidPtr": (POINTER, (POINTER,)),
    "PyLong_FromLong": (POINTER, (INT64 if ctypes.sizeof(ctypes.c_long) == 8 else INT32,)),
}


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


def builtin(code: Code, arguments: int) -> Callable[[Any], int] | None:
    """Return a function of one contiguous array which runs a plan on its memory, or None if unsupported.

    `arguments` is the address of four int64: the function "run" and its arguments arena, segments and call. They, and
    the code, must outlive the result. It raises ValueError for an array that is not contiguous; the array's
    size is the caller's to check.
    """
    if _ANSWER not in code:
        return None
    capsule = _function("PyCapsule_New", ctypes.c_void_p, ctypes.c_void_p, ctypes.c_void_p)(arguments, None, None)
    return _made(_definition(code[_ANSWER], _ANSWER), capsule)


def reader(code: Code) -> Callable[[Any], int] | None:
    """Return a function of one array that returns its address, or None if unsupported.

    The code must outlive it. It raises ValueError or BufferError for an array that is not contiguous.
    """
    return _made(_definition(code[_ADDRESS], _ADDRESS), None) if _ADDRESS in code else None


def _made(definition: _Definition, owner: object) -> Callable[[Any], int]:
    make = _function("PyCFunction_NewEx", ctypes.c_void_p, ctypes.py_object, ctypes.c_void_p)
    function: Callable[[Any], int] = make(ctypes.addressof(definition), owner, None)
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
    null = ir.Constant(POINTER, None)

    def begin(name: str) -> tuple[ir.IRBuilder, Any, Any]:
        """Begin a function that holds its array's memory; return also its owner, and where the address is stored."""
        function = ir.Function(module, ir.FunctionType(POINTER, [POINTER, POINTER]), name)
        owner, array = function.args
        b = ir.IRBuilder(function.append_basic_block("entry"))
        buffer = b.alloca(ir.ArrayType(INT64, 16))  # CPython's Py_buffer, which takes 10 and begins with the address
        failed = b.call(used["PyObject_GetBuffer"], [array, buffer, ir.Constant(INT32, 0)])
        with b.if_then(b.icmp_signed("!=", failed, ir.Constant(INT32, 0))):
            b.ret(null)  # CPython has set the error
        return b, owner, buffer

    b, capsule, buffer = begin(_ANSWER)
    arguments = b.call(used["PyCapsule_GetPointer"], [capsule, null])
    kind = ir.FunctionType(ir.VoidType(), [POINTER, POINTER, POINTER])
    run, arena, segments, call = (
        b.inttoptr(b.load(b.gep(arguments, [ir.Constant(INT64, i)], source_etype=INT64), typ=INT64), pointer)
        for i, pointer in enumerate((kind.as_pointer(), POINTER, POINTER, POINTER))
    )
    b.store(b.load(buffer, typ=INT64), call)  # the call's first field is the images' address
    thread = b.call(used["PyEval_SaveThread"], [])
    b.call(run, [arena, segments, call])
    b.call(used["PyEval_RestoreThread"], [thread])
    b.call(used["PyBuffer_Release"], [buffer])
    (size,) = _USED["PyLong_FromLong"][1]
    b.ret(b.call(used["PyLong_FromLong"], [ir.Constant(size, 0)]))

    b, _, buffer = begin(_ADDRESS)
    address = b.load(buffer, typ=POINTER)
    b.call(used["PyBuffer_Release"], [buffer])
    b.ret(b.call(used["PyLong_FromVoidPtr"], [address]))
    return str(module)
