"""Read plans: TOML files and presets, overrides from the command line, and keys that no table has."""

from __future__ import annotations

import dataclasses
import difflib
import tomllib
import types
import typing
from importlib import resources
from pathlib import Path
from typing import Any

from ...errors import PlanError, UnknownNameError
from ...files import read_bounded

MAX_PLAN_BYTES = 1_000_000


def presets() -> dict[str, str]:
    """Return the names of the presets that ship with the package, each with its title."""
    folder = resources.files("sparring.study") / "presets"
    files = sorted((f for f in folder.iterdir() if f.name.endswith(".toml")), key=lambda f: f.name)
    tables = {f.name.removesuffix(".toml"): tomllib.loads(f.read_text()) for f in files}
    return {name: ". ".join(t[k] for k in ("title", "mark") if k in t) for name, t in tables.items()}


def read_text(path_or_preset: str | Path) -> tuple[str, str]:
    """Return name and text of a TOML file or of a preset; raise UserError if there is neither.

    A folder of a preset's name, such as the output of its study, does not stand in the preset's way.
    """
    path, known = Path(path_or_preset), presets()
    if path.suffix == ".toml" or (path.exists() and not (path.is_dir() and str(path_or_preset) in known)):
        try:
            return str(path), read_bounded(path, limit=MAX_PLAN_BYTES).decode()
        except UnicodeDecodeError as error:
            raise PlanError(f"{path} is not a text file in UTF-8: {error}") from error
    if str(path_or_preset) not in known:
        raise UnknownNameError("preset", str(path_or_preset), known)
    file = resources.files("sparring.study") / "presets" / f"{path_or_preset}.toml"
    return f"{path_or_preset}.toml", file.read_text()


def override_(table: dict[str, Any], override: str) -> None:
    """Write one KEY=VALUE (VALUE in TOML, or a bare word) into a nested table, in place."""
    key, equals, text = override.partition("=")
    if not equals or not key:
        raise PlanError(f"--set takes KEY=VALUE, as in --set seeds=5; '{override}' has no '='")
    try:
        value = tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        if any(mark in text for mark in "[]{}\"'\n="):
            raise PlanError(f"--set {key}: '{text}' is not a value in TOML") from None
        value = text  # a bare word is a string, so that --set data=mnist works
    place: Any = table
    *parents, last = key.split(".")
    for part in parents:
        place = _step(place, part, key)
    if isinstance(place, list):
        place[_index(place, last, key)] = value
    else:
        place[last] = value


def _step(place: Any, part: str, key: str) -> Any:
    if isinstance(place, list):
        return place[_index(place, part, key)]
    if isinstance(place.get(part), str) and part == "model":
        place[part] = {"name": place[part]}
    found = place.setdefault(part, {})
    if not isinstance(found, dict | list):
        raise PlanError(f"--set {key}: '{part}' is a value, not a table")
    return found


def _index(place: list[Any], part: str, key: str) -> int:
    if not part.isdigit() or int(part) >= len(place):
        raise PlanError(f"--set {key}: '{part}' is not a place in a list of {len(place)}, counted from 0")
    return int(part)


def as_table(value: Any, key: str) -> dict[str, Any]:
    """Return a value that must be a table; raise PlanError if it is not."""
    if not isinstance(value, dict):
        raise PlanError(f"key '{key}' must be a table, not {value!r}")
    return value


def refuse_unknown(kind: Any, value: Any, source: str, path: tuple[str, ...]) -> None:
    """Refuse keys that no field bears, with the nearest match: a misspelt option must not be ignored."""
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin in (types.UnionType, typing.Union):
        for option in arguments:
            refuse_unknown(option, value, source, path)
    elif origin is tuple and isinstance(value, list):
        for index, item in enumerate(value):
            refuse_unknown(arguments[0], item, source, (*path, str(index)))
    elif dataclasses.is_dataclass(kind) and isinstance(value, dict):
        hints = typing.get_type_hints(kind)
        known = [f.name for f in dataclasses.fields(kind)]
        for key, item in value.items():
            if key not in known:
                near = difflib.get_close_matches(key, known, n=1) or _nested(kind, key)
                hint = f"; did you mean '{near[0]}'?" if near else f"; known: {', '.join(known)}"
                raise PlanError(f"{source}: unknown key '{'.'.join((*path, key))}'{hint}")
            refuse_unknown(hints[key], item, source, (*path, key))


def _nested(kind: Any, key: str) -> list[str]:
    """Return where a key nearest to this one stands in a table below, as "recipe.epochs" or "pruning.0.score"."""
    places: dict[str, str] = {}
    for name, hint in typing.get_type_hints(kind).items():
        many = typing.get_origin(hint) is tuple
        table = typing.get_args(hint)[0] if many else hint
        if dataclasses.is_dataclass(table):
            for field in dataclasses.fields(table):
                places.setdefault(field.name, f"{name}.0.{field.name}" if many else f"{name}.{field.name}")
    return [places[found] for found in difflib.get_close_matches(key, places, n=1)]
