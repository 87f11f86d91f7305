"""Read a file of torch.save's and pass on tensors alone; run as a process of its own: python _unpickle.py IN OUT BYTES.

torch's restricted unpickler runs nothing that the file names: classes that it does not know are replaced by inert ones,
and a file that names functions of Python's own library (os.system, eval, ...) is refused. The process may take BYTES
of memory beyond what it has after its imports, write as much, and compute for a minute.
"""

from __future__ import annotations

import json
import pickle
import re
import resource
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor
from torch.serialization import get_unsafe_globals_in_checkpoint, safe_globals

SECONDS = 60
DEPTH = 6  # of dictionaries within dictionaries
HARMLESS = {
    "argparse",
    "collections",
    "datetime",
    "enum",
    "pathlib",
    "types",
}  # of Python's own; the rest may do things


class Refused(Exception):
    """Say why a file is not read."""


class Inert:
    """Stand for an object of a class that is not imported: keep what it held, do nothing."""

    def __new__(cls, *_args: Any, **_options: Any) -> Inert:
        return object.__new__(cls)

    def __init__(self, *_args: Any, **_options: Any) -> None:
        self.held: Any = {}

    def __setstate__(self, state: Any) -> None:
        self.held = state


def limit(more: int) -> None:
    """Bound this process's memory, files and time from here on."""
    status = Path("/proc/self/statm")
    have = int(status.read_text().split()[0]) * resource.getpagesize() if status.exists() else 4 << 30
    for what, most in ((resource.RLIMIT_AS, have + more), (resource.RLIMIT_FSIZE, more)):
        resource.setrlimit(what, (most, most))
    spent = int(resource.getrusage(resource.RUSAGE_SELF).ru_utime)
    resource.setrlimit(resource.RLIMIT_CPU, (spent + SECONDS, spent + SECONDS))


def unpickled(path: Path) -> Any:
    """Return what a file holds, with inert objects for those of unknown classes."""
    try:
        names = get_unsafe_globals_in_checkpoint(path)
    except (ValueError, RuntimeError):  # the format before torch 1.6, or no such file at all
        names = []
    for name in names:
        root = name.partition(".")[0]
        if root in sys.stdlib_module_names and root not in HARMLESS:
            raise Refused(f"it would run {name}: do not trust it")
    inert: list[Any] = [(type("Inert", (Inert,), {}), name) for name in names]
    with safe_globals(inert):
        return torch.load(path, map_location="cpu", weights_only=True)


def branches(found: Any, path: str = "", depth: int = DEPTH) -> Iterator[tuple[str, dict[str, Tensor]]]:
    """Yield each group of named tensors in what was unpickled, and where it stands: "state_dict", "ema.module", ..."""
    if isinstance(found, Inert):
        module = module_state(found)
        if module:
            yield path, module
            return
        found = found.held if isinstance(found.held, Mapping) else {}
    if not isinstance(found, Mapping) or depth == 0:
        return
    own = {str(name): value.detach() for name, value in found.items() if isinstance(value, Tensor)}
    if own:
        yield path, own
    for name, value in found.items():
        yield from branches(value, f"{path}.{name}" if path else str(name), depth - 1)


def module_state(found: Inert, prefix: str = "") -> dict[str, Tensor]:
    """Return the state dict of a module that was pickled whole."""
    held = found.held if isinstance(found.held, Mapping) else {}
    silent = held.get("_non_persistent_buffers_set") or ()
    own = {**(held.get("_parameters") or {}), **(held.get("_buffers") or {})}
    state = {prefix + k: v.detach() for k, v in own.items() if isinstance(v, Tensor) and k not in silent}
    for name, child in (held.get("_modules") or {}).items():
        if isinstance(child, Inert):
            state |= module_state(child, f"{prefix}{name}.")
    return state


def reason(error: Exception) -> str:
    """Say in a line why torch did not read a file."""
    text = str(error)
    text = (text.partition("WeightsUnpickler error: ")[2] or text).strip()
    if isinstance(error, MemoryError) or "alloc" in text:
        return "it unpacks to more memory than a checkpoint of its size needs"
    if "TorchScript" in text:
        return "it is a TorchScript archive, which is code; save torch.jit.load(FILE).state_dict()"
    name = re.search(r"GLOBAL (\S+)|(?:function|global|class|instantiate)\w* `?([\w.]+\.\w+)", text)
    if name is not None:
        return f"it names {name[1] or name[2]}, which would run or be imported; save model.state_dict()"
    return f"it is no checkpoint that torch.save wrote ({text.splitlines()[0][:200] if text else type(error).__name__})"


def main(source: str, target: str, more: str) -> None:
    """Write each group's tensors to a safetensors file, a JSON list of the groups' paths and names beside it."""
    limit(int(more))
    try:
        groups = list(branches(unpickled(Path(source))))
        tensors = {f"{at}/{name}": value for at, (_, group) in enumerate(groups) for name, value in group.items()}
        save_file({name: value.clone(memory_format=torch.contiguous_format) for name, value in tensors.items()}, target)
    except Refused as error:
        sys.exit(str(error))
    except (pickle.UnpicklingError, MemoryError, RuntimeError, ValueError, LookupError, TypeError, OSError) as error:
        sys.exit(reason(error))
    print(json.dumps([path for path, _ in groups]))


if __name__ == "__main__":
    main(*sys.argv[1:])
