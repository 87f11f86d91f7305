"""A user's own models, pruners and attacks, named "package.module:name", and the options of functions."""

from __future__ import annotations

import functools
import hashlib
import importlib
import inspect
import json
import sys
import typing
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any

from pydantic import PydanticUserError, TypeAdapter, ValidationError

from .errors import UnknownNameError, UserError, told

__all__ = ["check_call", "check_options", "code_hash", "import_object", "look_up", "takes"]


def import_object(path: str) -> Any:
    """Import the object "package.module:name", also from the current folder; this runs the user's code.

    Raise UserError if the module cannot be imported, lacks the name, or if the object cannot be called.
    """
    module_name, _, attribute = path.partition(":")
    if "/" in module_name or module_name.endswith(".py"):
        raise UserError(f"'{path}' names a file; name the module, such as {Path(module_name).stem}:{attribute}")
    here = str(Path.cwd())
    if here not in sys.path:
        sys.path.insert(0, here)
    try:
        module = importlib.import_module(module_name)
    except Exception as error:  # the user's module can raise anything while it is imported
        raise UserError(f"cannot import '{module_name}' for '{path}': {told(error)}") from error
    try:
        found = getattr(module, attribute)
    except AttributeError as error:
        raise UserError(f"module '{module_name}' has no '{attribute}'") from error
    if not callable(found):
        raise UserError(f"'{path}' is not a function")
    return found


def look_up(kind: str, name: str, table: Mapping[str, Any]) -> Any:
    """Return the entry of a table, or else the object "package.module:name"; raise UserError if there is neither."""
    if name in table:
        return table[name]
    if ":" not in name:
        raise UnknownNameError(kind, name, table)
    return import_object(name)


def code_hash(path: str) -> str:
    """Return the SHA-256 of the file that defines "package.module:name", so that changes are detected.

    Objects without a source file (typed into an interpreter) have the hash of empty content. Raise the errors of
    `import_object`.
    """
    found = inspect.unwrap(import_object(path))
    try:
        file = inspect.getsourcefile(found)
    except TypeError:
        file = None
    source = Path(file).read_bytes() if file is not None and Path(file).is_file() else b""
    return hashlib.sha256(source).hexdigest()


def takes(function: Callable[..., Any], name: str) -> bool:
    """Return whether a function can be called with this keyword."""
    return any(p.name == name or p.kind is p.VAR_KEYWORD for p in inspect.signature(function).parameters.values())


def check_options(
    who: str, function: Callable[..., Any], options: Mapping[str, Any], *, reserved: Collection[str]
) -> None:
    """Raise UserError for a TOML option that a function does not take, or whose type is wrong.

    The expected type is that of the annotation or of the default. `reserved` names parameters that are not options.
    """
    known = {name: p for name, p in inspect.signature(function).parameters.items() if name not in reserved}
    for name, value in options.items():
        if name not in known:
            raise UserError(f"{who} has no option '{name}'; it has: {', '.join(known) or 'none'}")
        try:
            _type_of(function, known[name]).validate_json(json.dumps(value, allow_nan=False), strict=True)
        except PydanticUserError as error:
            raise UserError(
                f"{who}: option '{name}' takes a value that only Python code can give; remove it"
            ) from error
        except (TypeError, ValueError) as error:
            why = "Input should be a finite number or text"
            if isinstance(error, ValidationError):
                why = error.errors(include_url=False)[0]["msg"]
            raise UserError(f"{who}: option '{name}': {why.splitlines()[0]}, not {value!r}") from error


def check_call(who: str, function: Callable[..., Any], *args: object, **options: object) -> None:
    """Raise UserError, before any work, if a user's function cannot be called with these arguments."""
    try:
        inspect.signature(function).bind(*args, **options)
    except TypeError as error:
        given = ["model", "batch"][: len(args)] + list(options)
        raise UserError(f"{who} cannot be called with {', '.join(given)}: {error}; see docs/extending.md") from error


def _type_of(function: Callable[..., Any], parameter: inspect.Parameter) -> TypeAdapter[Any]:
    while isinstance(function, functools.partial):
        function = function.func
    try:
        hints = typing.get_type_hints(inspect.unwrap(function))
    except Exception:  # a user's annotations can be anything
        hints = {}
    default = type(parameter.default)
    bare = float if default is int else default if default in (bool, float, str) else Any
    return TypeAdapter(hints.get(parameter.name, bare))
