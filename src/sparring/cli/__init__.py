"""The command line. Only this package prints; commands import heavy modules when they need them."""

from __future__ import annotations

import atexit
import contextlib
import errno
import gc
import os
import signal
import sys
import traceback
import warnings
from collections.abc import Callable

from ..errors import TERMINATED, UserError, place, short_of_memory, told
from ..ram import bounded
from ._printing import Aside

__all__ = ["main"]

USER_ERROR = 2
TRACEBACK = "--traceback"
INTERRUPTED = 130  # 128 plus the signal's number, as in shells
AGAIN = "rerun the same command to resume"


def main() -> None:
    """Run the command line; user errors end it with one message and exit code 2, SIGINT with 130, SIGTERM with 143."""
    from ._app import app

    def stop(*_: object) -> None:
        sys.exit(TERMINATED)  # unlike the default action, this ends workers and releases locks

    signal.signal(signal.SIGTERM, stop)
    atexit.register(gc.freeze)  # or Python looks for cycles among all of torch's objects, for most of a second
    sys.exit(_guarded(app))


def _guarded(app: Callable[..., object]) -> int:
    warnings.showwarning = lambda message, *_, **__: print(f"warning: {message}", file=sys.stderr)
    words = joined(sys.argv[1:])
    if TRACEBACK in words:  # wherever the option is; study's workers read the environment
        words = [TRACEBACK, *(word for word in words if word != TRACEBACK)]
        os.environ["SPARRING_TRACEBACK"] = "1"
    try:
        with (
            bounded(),
            contextlib.redirect_stdout(Aside(sys.stdout)) if "--json" in words else contextlib.nullcontext(),
        ):
            code = app(words, standalone_mode=False)
        if code == INTERRUPTED:  # typer's exception for Ctrl-C
            raise KeyboardInterrupt
        sys.stdout.flush()
        return code if isinstance(code, int) else 0
    except BaseException as error:  # a user's own code may raise anything
        return _ended(error, TRACEBACK in words)


def _ended(error: BaseException, show_traceback: bool) -> int:
    """Print one message with the cause of the program's end, and return the exit code."""
    where = place(error)
    if isinstance(error, KeyboardInterrupt):
        return _say(f"interrupted; {AGAIN}", INTERRUPTED)
    if isinstance(error, SystemExit):
        if error.code == TERMINATED:
            return _say(f"terminated by SIGTERM; {AGAIN}", TERMINATED)
        if where is None:
            raise error
        return _say(f"error: your own code exited the program ({where})", USER_ERROR)
    if isinstance(error, BrokenPipeError) and where is None:  # the reader, such as `head`, has closed the pipe
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    show = getattr(error, "show", None)  # a mistake in the command line, which typer prints
    if show is not None and where is None:
        show()
        return USER_ERROR
    if show_traceback:
        traceback.print_exception(error)
    return _say(f"error: {_sentence(error)}", USER_ERROR)


def _sentence(error: BaseException) -> str:
    """Return what went wrong, and the line if it was in the user's own code."""
    where, text = place(error), told(error)
    if isinstance(error, UserError):
        return f"{error} ({where})" if where and where not in str(error) else str(error)
    if short_of_memory(error):
        return text
    if where is None and isinstance(error, OSError) and error.errno == errno.ENOSPC:
        return "the disk is full; free some space and rerun the same command to resume"
    if where is None and isinstance(error, OSError) and error.filename is not None:
        return f"{error.filename}: {error.strerror}"
    return f"{text}{'' if where else '; --traceback shows where'}"


def joined(words: list[str]) -> list[str]:
    """Write `--max-drop METRIC AMOUNT` as one value: typer has no repeatable option with two values."""
    found: list[str] = []
    rest = iter(words)
    for word in rest:
        found.append(word)
        if word == "--max-drop":
            found.append("=".join(value for _, value in zip(range(2), rest, strict=False)))
    return found


def _say(text: str, code: int) -> int:
    print(text, file=sys.stderr)
    return code
