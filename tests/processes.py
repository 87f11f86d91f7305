"""Start commands and blocks of Python in processes that need not import torch again.

Each is forked from a server that has done the imports, which takes seconds: a process of its own for hundredths of one.
"""

from __future__ import annotations

import multiprocessing as mp
import os
import runpy
import shlex
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

_SERVER = mp.get_context("forkserver")
_SERVER.set_forkserver_preload(["sparring.cli._app", "sparring.study", "sparring.report", "sparring.bounds"])
_SHELL = set("|&;<>$`*()")  # what needs a shell


def run_line(line: str, folder: Path, environment: Mapping[str, str]) -> subprocess.CompletedProcess[str]:
    """Run a line of a shell: `sparring` and `python` in a process with torch imported, others by bash."""
    words = shlex.split(line, comments=True)
    if words[0] not in ("sparring", "python") or any(_SHELL & set(word) for word in words):
        return subprocess.run(
            ["bash", "-c", line], cwd=folder, env=environment, capture_output=True, text=True, check=False
        )
    return run_words([word.replace("~/", f"{environment['HOME']}/") for word in words], folder, environment)


def run_words(words: Sequence[str], folder: Path, environment: Mapping[str, str]) -> subprocess.CompletedProcess[str]:
    """Run `sparring WORDS...` or `python FILE`; return exit code and outputs."""
    with tempfile.TemporaryDirectory() as place:
        out, err = Path(place, "out"), Path(place, "err")
        process = _SERVER.Process(target=_begin, args=(list(words), folder, dict(environment), out, err))
        process.start()
        process.join()
        code = process.exitcode
        return subprocess.CompletedProcess(words, -1 if code is None else code, out.read_text(), err.read_text())


def _begin(words: list[str], folder: Path, environment: dict[str, str], out: Path, err: Path) -> None:
    for number, path in ((1, out), (2, err)):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(folder)
    sys.path.insert(0, str(folder))
    if words[0] == "sparring":
        sys.argv = words
        runpy.run_module("sparring", run_name="__main__")
    else:
        sys.argv = words[1:]
        runpy.run_path(words[1], run_name="__main__")
