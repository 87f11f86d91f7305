"""Read a file of torch.save in a separate process and return only tensors: python _unpickle.py IN OUT BYTES.

torch's restricted unpickler runs nothing that the file names: classes that it does not know are replaced by inert ones,
and a file that names functions of Python's standard library (os.system, eval, ...) is refused. The process may use
BYTES of memory beyond those after its imports, write as much, and compute for a minute.
"""

from __future__ import annotations

import builtins
import json
import re
import resource
import sys
import zipfile
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save, save_file
from torch import Tensor
from torch.serialization import get_unsafe_globals_in_checkpoint, safe_globals

SECONDS = 60
DEPTH = 6  # levels of nested dictionaries
LONGEST = 1000  # letters in a name
# Types of Python's standard library that settings use, besides the built-in ones; others may have side effects.
HARMLESS = {
    *("argparse", "collections", "copyreg", "datetime", "decimal", "enum"),
    *("fractions", "functools", "pathlib", "random", "types", "uuid"),
}


class Refused(Exception):
    """The reason why a file is not read."""


class TakenForDict(type):
    """Compare equal to `dict`, as torch's unpickler requires before it sets items: classes may inherit from it."""

    def __eq__(cls, other: object) -> bool:
        return other is dict or type.__eq__(cls, other)

    __hash__ = type.__hash__


class Inert(metaclass=TakenForDict):
    """A stand-in for an object of a class that is not imported: it keeps the content and does nothing."""

    items: dict[Any, Any]
    state: Any

    def __new__(cls, *_args: Any, **_options: Any) -> Inert:
        made = object.__new__(cls)
        made.items, made.state = {}, {}
        return made

    def __init__(self, *_args: Any, **_options: Any) -> None: ...

    def __setitem__(self, name: Any, value: Any) -> None:
        self.items[name] = value

    def __setstate__(self, state: Any) -> None:
        self.state = state

    @property
    def held(self) -> dict[Any, Any]:
        """Return attributes and items by name."""
        return {**(self.state if isinstance(self.state, Mapping) else {}), **self.items}


# torch's unpickler appends only to lists; getattr names a method, or a class within a class.
STAND_INS: dict[str, Any] = {"collections.deque": lambda *_: [], "builtins.getattr": lambda *_: Inert}


def limit(more: int) -> None:
    """Limit this process's memory, files and time from now on."""
    status = Path("/proc/self/statm")
    have = int(status.read_text().split()[0]) * resource.getpagesize() if status.exists() else 4 << 30
    for what, most in ((resource.RLIMIT_AS, have + more), (resource.RLIMIT_FSIZE, more)):
        resource.setrlimit(what, (most, most))
    spent = int(resource.getrusage(resource.RUSAGE_SELF).ru_utime)
    resource.setrlimit(resource.RLIMIT_CPU, (spent + SECONDS, spent + SECONDS))


def check_sums(path: Path) -> None:
    """Raise Refused if a part of a zip file does not have its checksum, which torch does not look at."""
    if not zipfile.is_zipfile(path):  # the format before torch 1.6
        return
    with zipfile.ZipFile(path) as whole:
        for part in whole.infolist():
            if part.CRC == 0:  # torch can leave them out
                continue
            with whole.open(part) as file:
                try:
                    while file.read(1 << 20):
                        pass
                except zipfile.BadZipFile:
                    raise Refused(
                        f"it is damaged: '{part.filename}' does not have its checksum; copy it again"
                    ) from None


def unpickled(path: Path) -> Any:
    """Return a file's content, with inert objects for those of unknown classes."""
    try:
        names = get_unsafe_globals_in_checkpoint(path)
    except (ValueError, RuntimeError):  # the format before torch 1.6, or another kind of file
        names = []
    for name in names:
        if not is_harmless(name):
            own = "if you trust the file, load it with torch.load(FILE, weights_only=False) and save model.state_dict()"
            raise Refused(f"it would run {name}, so do not load an untrusted file; {own}")
    inert: list[Any] = [(STAND_INS.get(name) or type("Inert", (Inert,), {}), name) for name in names]
    with safe_globals([*inert, Inert]):
        return torch.load(path, map_location="cpu", weights_only=True)


def is_harmless(name: str) -> bool:
    """Return whether a name in a file is of another package, which is not imported, or a plain type of Python."""
    *modules, own = name.split(".")
    if modules == ["builtins"]:
        return name in STAND_INS or isinstance(getattr(builtins, own, None), type)
    python = [module.lstrip("_") for module in modules]
    if not {modules[0], python[0]} & sys.stdlib_module_names:
        return True
    return python[0] in HARMLESS and not set(python[1:]) & (sys.stdlib_module_names - HARMLESS)


def branches(
    found: Any, path: str = "", depth: int = DEPTH, seen: set[int] | None = None
) -> Iterator[tuple[str, dict[str, Tensor]]]:
    """Yield each group of named tensors in unpickled content, once, with its place: "state_dict", "ema.module", ..."""
    if not isinstance(found, Inert | Mapping | list | tuple) or id(found) in (seen := seen or set()):
        return
    seen.add(id(found))
    if isinstance(found, Inert):
        module = module_state(found)
        if module:
            yield path, module
            return
        found = found.held
    if isinstance(found, list | tuple):
        found = {at: value for at, value in enumerate(found) if not isinstance(value, Tensor)}
    if depth == 0 or "param_groups" in found:  # of an optimiser
        return
    own = {name: value.detach() for name, value in found.items() if isinstance(value, Tensor)}
    if own:
        yield path, by_name((str(name), value) for name, value in own.items())
    for name, value in found.items():
        yield from branches(value, f"{path}.{name}" if path else str(name), depth - 1, seen)


def module_state(found: Inert, prefix: str = "") -> dict[str, Tensor]:
    """Return the state dict of a module that was pickled whole."""
    held = found.held
    silent = held.get("_non_persistent_buffers_set") or ()
    own = {**(held.get("_parameters") or {}), **(held.get("_buffers") or {})}
    state = {prefix + k: v.detach() for k, v in own.items() if isinstance(v, Tensor) and k not in silent}
    for name, child in (held.get("_modules") or {}).items():
        if isinstance(child, Inert):
            state |= module_state(child, f"{prefix}{name}.")
    return state


def by_name(pairs: Iterable[tuple[str, Any]]) -> dict[str, Any]:
    """Return named values, each with a unique printable name; raise Refused for other names."""
    found: dict[str, Any] = {}
    for name, value in pairs:
        if name in found or len(name) > LONGEST or not name.isprintable():
            raise Refused(f"it has the name {name[:80]!r}, which {'occurs twice' if name in found else 'is not valid'}")
        found[name] = value
    return found


def can_be_written(value: Tensor) -> bool:
    """Return whether safetensors can store a tensor: not quantised, sparse or complex ones, nor those without data."""
    try:
        save({"": value[(slice(1),) * value.dim()].clone(memory_format=torch.contiguous_format)})
    except Exception:
        return False
    return value.dim() <= 8


def reason(error: Exception) -> str:
    """Return in one line why torch did not read a file."""
    text = str(error)
    text = (text.partition("WeightsUnpickler error: ")[2] or text).strip()
    if isinstance(error, MemoryError) or "alloc" in text:
        return "it needs more memory than a checkpoint of its size should"
    if "TorchScript" in text:
        return "it is a TorchScript archive, which is code; save torch.jit.load(FILE).state_dict()"
    name = re.search(r"GLOBAL (\S+)|(?:function|global|class|instantiate)\w* `?([\w.]+\.\w+)", text)
    if name is not None:
        return f"it names {name[1] or name[2]}, which would run or be imported; save model.state_dict()"
    what = ascii(text.splitlines()[0][:200]) if text else type(error).__name__
    return f"it cannot be read as a checkpoint ({what}); load it where it was created and save model.state_dict()"


def main(source: str, target: str, more: str) -> None:
    """Write the groups' tensors to a safetensors file; print paths, and names that it cannot hold, as JSON."""
    limit(int(more))
    try:
        content = unpickled(Path(source))
        check_sums(Path(source))
        groups = by_name(branches(content))
        tensors = {f"{at}/{name}": value for at, group in enumerate(groups.values()) for name, value in group.items()}
        lost = [name for name, value in tensors.items() if not can_be_written(value)]
        whole = {name: value for name, value in tensors.items() if name not in set(lost)}
        save_file({name: value.clone(memory_format=torch.contiguous_format) for name, value in whole.items()}, target)
    except Refused as error:
        sys.exit(str(error))
    except Exception as error:  # torch can raise anything for an untrusted file
        sys.exit(reason(error))
    print(json.dumps([list(groups), lost]))


if __name__ == "__main__":
    main(*sys.argv[1:])
