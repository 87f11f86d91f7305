"""A user's own models, pruners and attacks, named "package.module:name"."""

from __future__ import annotations

import hashlib
import importlib
import inspect
import sys
from pathlib import Path
from typing import Any

from .errors import UserError, told

__all__ = ["code_hash", "import_object"]


def import_object(path: str) -> Any:
    """Import what "package.module:name" names, looking in the current folder too; it runs the user's code.

    Raise UserError if the module cannot be imported, does not have the name, or the object cannot be called.
    """
    module_name, _, attribute = path.partition(":")
    here = str(Path.cwd())
    if here not in sys.path:
        sys.path.insert(0, here)
    try:
        module = importlib.import_module(module_name)
    except Exception as error:  # the user's module may raise anything while it is imported
        raise UserError(f"cannot import '{module_name}' for '{path}': {told(error)}") from error
    try:
        found = getattr(module, attribute)
    except AttributeError as error:
        raise UserError(f"module '{module_name}' has no '{attribute}'") from error
    if not callable(found):
        raise UserError(f"'{path}' is not a function")
    return found


def code_hash(path: str) -> str:
    """Return the SHA-256 of the file that defines what "package.module:name" names, so that a change is noticed.

    Objects without a source file (typed into an interpreter) have the hash of nothing. Raise as `import_object` does.
    """
    found = inspect.unwrap(import_object(path))
    try:
        file = inspect.getsourcefile(found)
    except TypeError:
        file = None
    source = Path(file).read_bytes() if file is not None and Path(file).is_file() else b""
    return hashlib.sha256(source).hexdigest()
