"""Compile LLVM IR to functions of the host processor, and cache the machine code in a private, hashed folder."""

from __future__ import annotations

import contextlib
import hashlib
import os
import stat
import sys
from collections.abc import Callable, Iterable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

from ...errors import UserError
from ...files import write_atomic


@cache
def _llvm() -> Any:
    """Return llvmlite's binding, ready for this host, or None if llvmlite is missing or does not support the host."""
    try:
        import llvmlite.binding as llvm

        llvm.initialize_native_target()
        llvm.initialize_native_asmprinter()
        llvm.Target.from_default_triple()
    except (ImportError, OSError, RuntimeError):
        return None
    return llvm


def native_available() -> bool:
    """Return whether kernels can be generated here; they need a little-endian host, for several numbers in one load."""
    return sys.byteorder == "little" and _llvm() is not None


# Values of $SPARRING_CPU: the best instructions that kernels may use, if the host has better ones.
CAPS = {"avx2": ("+avx512f", "x86-64-v3", "+avx,+avx2,+f16c,+fma"), "sse": ("+avx", "x86-64-v2", "+sse4.2")}


@cache
def _processor() -> tuple[str, str]:
    """Return the name and the features of the processor that code is made for: the host, or the requested cap.

    Raise UserError if $SPARRING_CPU names no cap.
    """
    host = str(_llvm().get_host_cpu_name()), str(_llvm().get_host_cpu_features().flatten())
    cap = os.environ.get("SPARRING_CPU", "")
    if cap and cap not in CAPS:
        raise UserError(f"SPARRING_CPU must be {' or '.join(CAPS)}, not '{cap}'; unset it to use all instructions")
    better, *capped = CAPS.get(cap, ("", *host))
    return (capped[0], capped[1]) if better in host[1].split(",") else host


@cache
def host_lanes() -> int:
    """Return how many float32 a vector register of this host holds: 16 (AVX-512), 8 (AVX), else 4."""
    features = set(_processor()[1].split(","))
    return 16 if "+avx512f" in features else 8 if "+avx" in features else 4


@cache
def host_registers() -> int:
    """Return how many vector registers this host has: x86 had 16 before AVX-512, most others have 32."""
    return 16 if _llvm().get_default_triple().startswith("x86_64") and host_lanes() < 16 else 32


@cache
def host_identity() -> str:
    """Return everything that machine code depends on besides its source: processor, features, system and compiler."""
    llvm = _llvm()
    parts = (llvm.get_default_triple(), *_processor(), str(llvm.llvm_version_info))
    return "\0".join(parts)


@cache
def permutes() -> bool:
    """Return whether the host looks up 32 floats in two registers by one instruction."""
    return host_lanes() == 16


@cache
def way_of_products() -> str:
    """Return how this host sums four products of bytes: "vnni", "maddubs" (other x86), else "plain"."""
    features = set(_processor()[1].split(","))
    if {"+avx512vnni", "+avx512vl"} <= features or ("+avxvnni" in features and host_lanes() < 16):
        return "vnni"
    x86 = _llvm().get_default_triple().startswith("x86_64")
    return "maddubs" if x86 and (host_lanes() < 16 or "+avx512bw" in features) else "plain"


def cache_folder() -> Path | None:
    """Return the folder for generated code, created if necessary, or None if other users could access it.

    Others could replace the machine code in a folder that they can write to.
    """
    base = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    try:
        folder = Path(base).expanduser() / "sparring" / "kernels"
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        state = folder.lstat()
    except (OSError, RuntimeError):
        return None
    private = stat.S_ISDIR(state.st_mode) and state.st_uid == os.getuid() and not state.st_mode & 0o077
    return folder if private else None


class Code:
    """Functions compiled from modules of LLVM IR; they live as long as this object."""

    def __init__(self) -> None:
        self._engines: list[Any] = []
        self._addresses: dict[str, int] = {}

    def add(
        self,
        identity: str,
        write: Callable[[], str],
        names: Sequence[str],
        *,
        symbols: Iterable[tuple[str, int]] = (),
    ) -> None:
        """Compile the module of LLVM IR that `write` returns, and record the addresses of `names`.

        If the cache has machine code for `identity`, which must be unique for the IR, nothing is compiled. `symbols`
        are the addresses of external functions that the module calls.
        """
        for name, address in symbols:
            _llvm().add_symbol(name, address)
        machine = _machine()
        self._link(machine, _cached(identity) or _compiled(machine, identity, write), names)

    def add_cached(self, identity: str, names: Sequence[str]) -> None:
        """Record the addresses of `names` if the cache has machine code for `identity`; else do nothing."""
        found = _cached(identity)
        if found is not None:
            self._link(_machine(), found, names)

    def _link(self, machine: Any, code: bytes, names: Sequence[str]) -> None:
        llvm = _llvm()
        engine = llvm.create_mcjit_compiler(llvm.parse_assembly(""), machine)
        engine.add_object_file(llvm.ObjectFileRef.from_data(code))
        engine.finalize_object()
        self._engines.append(engine)
        found = {name: engine.get_function_address(name) for name in names}
        self._addresses.update({name: address for name, address in found.items() if address})

    def __contains__(self, name: str) -> bool:
        return name in self._addresses

    def __getitem__(self, name: str) -> int:
        return self._addresses[name]


def _machine() -> Any:
    cpu, features = _processor()
    return _llvm().Target.from_default_triple().create_target_machine(cpu=cpu, features=features, opt=3, jit=True)


def _path(identity: str) -> Path | None:
    folder = cache_folder()
    digest = hashlib.sha256(f"{identity}\0{host_identity()}".encode()).hexdigest()
    return None if folder is None else folder / f"{digest}.o"


def _compiled(machine: Any, identity: str, write: Callable[[], str]) -> bytes:
    code = bytes(machine.emit_object(_llvm().parse_assembly(write())))
    path = _path(identity)
    if path is not None:
        with contextlib.suppress(UserError):  # a full disk only costs time at the next start
            write_atomic(path, hashlib.sha256(code).digest() + code)
    return code


def _cached(identity: str) -> bytes | None:
    path = _path(identity)
    try:
        content = b"" if path is None else path.read_bytes()
    except OSError:
        return None
    return content[32:] if hashlib.sha256(content[32:]).digest() == content[:32] else None
