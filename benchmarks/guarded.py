"""Put a page that nothing may touch behind every array that NumPy allocates, and one before it.

The kernels read and write NumPy's memory only: images, logits, weights, tables and the arena. With these pages, a read
or a write past the end of any of them ends the process at once (SIGSEGV) instead of going unnoticed. Arrays end 0 to 7
bytes before their page. Needs a C compiler named `cc`.
"""

from __future__ import annotations

import ctypes
import subprocess
import tempfile
from pathlib import Path

import numpy as np

_SOURCE = r"""
#include <stddef.h>
#include <stdint.h>
#include <string.h>
#include <sys/mman.h>

enum { PAGE = 4096, SLOTS = 1 << 17 };
static struct { void *at; size_t size; } known[SLOTS];  /* which sizes were asked for; the caller holds Python's lock */

static size_t padded(size_t size) { return (size + 7) & ~(size_t)7; }
static size_t pages(size_t size) { return (padded(size) + PAGE - 1) / PAGE * PAGE; }
static size_t slot(void *at, void *wanted) {
    size_t i = ((uintptr_t)at >> 3) * 2654435761u % SLOTS;
    while (known[i].at && known[i].at != wanted && known[i].at != at) i = (i + 1) % SLOTS;
    return i;
}
static void *gone = (void *)-1;

static void *take(void *context, size_t size) {
    size_t length = pages(size ? size : 1);
    char *base = mmap(NULL, length + 2 * PAGE, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (base == MAP_FAILED) return NULL;
    if (mprotect(base + PAGE, length, PROT_READ | PROT_WRITE)) { munmap(base, length + 2 * PAGE); return NULL; }
    char *at = base + PAGE + length - padded(size ? size : 1);
    size_t i = slot(at, gone);
    known[i].at = at; known[i].size = size;
    return at;
}
static void *take_zeroed(void *context, size_t count, size_t size) { return take(context, count * size); }
static void give(void *context, void *at, size_t told) {
    if (!at) return;
    size_t i = slot(at, at), size = known[i].size ? known[i].size : 1, length = pages(size);
    known[i].at = gone;
    munmap((char *)at + padded(size) - length - PAGE, length + 2 * PAGE);
}
static void *take_again(void *context, void *at, size_t size) {
    void *other = take(context, size);
    if (other && at) {
        size_t old = known[slot(at, at)].size;
        memcpy(other, at, old < size ? old : size);
        give(context, at, old);
    }
    return other;
}

struct { char name[127]; uint8_t version; struct { void *context, *malloc, *calloc, *realloc, *free; } use; }
    handler = {"guarded", 1, {0, take, take_zeroed, take_again, give}};
"""
_SET_HANDLER = 304  # its place in NumPy's table of functions (numpy/_core/code_generators/numpy_api.py)


def compiled() -> ctypes.CDLL:
    """Return the allocator, compiled."""
    with tempfile.TemporaryDirectory() as folder:
        source, library = Path(folder) / "guarded.c", Path(folder) / "guarded.so"
        source.write_text(_SOURCE)
        subprocess.run(["cc", "-O1", "-shared", "-fPIC", "-w", "-o", str(library), str(source)], check=True)
        return ctypes.CDLL(str(library))


def guard_(allocator: ctypes.CDLL) -> None:
    """Let NumPy take the memory of this process's further arrays from the allocator."""
    python = ctypes.pythonapi
    python.PyCapsule_GetPointer.restype = ctypes.c_void_p
    python.PyCapsule_GetPointer.argtypes = [ctypes.py_object, ctypes.c_char_p]
    python.PyCapsule_New.restype = ctypes.py_object
    python.PyCapsule_New.argtypes = [ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p]
    table = python.PyCapsule_GetPointer(np._core._multiarray_umath._ARRAY_API, None)  # type: ignore[attr-defined]
    address = ctypes.cast(table, ctypes.POINTER(ctypes.c_void_p))[_SET_HANDLER]
    handler = python.PyCapsule_New(ctypes.addressof(ctypes.c_char.in_dll(allocator, "handler")), b"mem_handler", None)
    ctypes.PYFUNCTYPE(ctypes.py_object, ctypes.py_object)(address or 0)(handler)
