"""The command line: the only place that prints. Heavy imports happen inside the commands that need them."""

from __future__ import annotations

import sys
from collections.abc import Callable

__all__ = ["main"]

USER_ERROR = 2
INTERRUPTED, TERMINATED = 130, 143  # 128 and the signal's number, as shells have it


def main() -> None:
    """Run the command line; user errors end it with one message and exit code 2, SIGINT with 130, SIGTERM with 143."""
    import signal

    from .app import app

    def stop(*_: object) -> None:
        sys.exit(TERMINATED)  # unlike the default, this ends workers and frees what is held

    signal.signal(signal.SIGTERM, stop)
    sys.exit(_guarded(app))


def _guarded(app: Callable[..., object]) -> int:
    import errno

    from ..errors import UserError

    try:
        code = app(joined(sys.argv[1:]), standalone_mode=False)
        if code == INTERRUPTED:  # how typer reports Ctrl-C
            raise KeyboardInterrupt
        return code if isinstance(code, int) else 0
    except UserError as error:
        return _say(f"error: {error}", USER_ERROR)
    except KeyboardInterrupt:
        return _say("interrupted; run the same command again and it goes on from here", INTERRUPTED)
    except SystemExit as stop:
        if stop.code == TERMINATED:
            return _say("ended by SIGTERM; run the same command again and it goes on from here", TERMINATED)
        raise
    except BrokenPipeError:
        sys.stderr.close()
        return 0
    except OSError as error:
        if error.errno == errno.ENOSPC:
            return _say(
                "error: the disk is full; free some space and run the same command again: it goes on", USER_ERROR
            )
        if error.filename is None:
            raise
        return _say(f"error: {error.filename}: {error.strerror}", USER_ERROR)
    except Exception as error:
        show = getattr(error, "show", None)  # a mistake in the command line: typer knows how to say it
        if show is None:
            raise
        show()
        return USER_ERROR


def joined(words: list[str]) -> list[str]:
    """Write `--max-drop METRIC AMOUNT` as one value: typer knows no repeatable option of two words."""
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
