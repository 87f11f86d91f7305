"""Every command and every block of Python in README.md and docs/*.md runs as written, in the order of its page.

A block is marked behind its language where it does not: `by hand`, for what installs packages or takes a day. Training
and presets, and what is marked `nightly`, are left to `make nightly`; the rest then uses networks that were trained for
a moment.
"""

from __future__ import annotations

import os
import re
import shlex
import shutil
import sys
from pathlib import Path
from typing import NamedTuple

import pytest

from ..processes import run_line, run_words
from .prepared import prepare_data, prepare_files

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
BLOCK = re.compile(r"^```(\w+)([^\n]*)\n(.*?)^```", re.DOTALL | re.MULTILINE)
OUTPUT = re.compile(r"^```sh\n([^`]*?)^```\n\n```text\n(.*?)^```", re.DOTALL | re.MULTILINE)
MARKS = {"", "by hand", "nightly"}
# The blocks that do not run, each by its first words: what installs packages of others, needs them, or takes a day.
HAND = {
    ("quickstart.md", "pip install -c constraints.txt ."),
    ("checkpoints.md", "sparring convert model.pth model.safetensors"),
    ("recipes.md", "sparring train vgg-like --width 0.125 --data cifar10-jpeg.zip --out vgg.safetensors"),
    ("extending.md", "# theirs.py"),
}
LONG = re.compile(r"sparring (study quick|train|prune)|study\.run\(")

_MODEL = """
import torch
from sparring import models
model = models.build("mlp", shape=(1, 4, 4), classes=3, mean=(0.5,), std=(0.3,), widths=(6,)).eval()
x, y = torch.rand(4, 1, 4, 4), torch.tensor([0, 1, 2, 0])
"""
# What a page's Python takes for granted.
BEFORE = {
    "deploy.md": """
import torch
from sparring import models
model = models.build("mlp", shape=(1, 28, 28), classes=3, mean=(0.5,), std=(0.3,), widths=(6,)).eval()
images, y = torch.rand(4, 1, 28, 28), torch.tensor([0, 1, 2, 0])
""",
    "flags.md": _MODEL,
    "library.md": """
import contextlib
from sparring.models._hubs import _without_torchvision_kernels
with contextlib.suppress(ImportError), _without_torchvision_kernels():  # transformers imports it where it is installed
    import torchvision
""",
    "verification.md": _MODEL,
    "theory.md": f"""{_MODEL}
from sparring import attacks
from sparring.threat import LINF, Threat
best = attacks.run(model, x, y, attacks.ATTACKS["nearest"], Threat(LINF, None)).x_adv
""",
}


class Step(NamedTuple):
    """A command or a block of Python of a page."""

    kind: str
    text: str
    nightly: bool = False
    shown: str = ""  # what the page says that it prints

    @property
    def long(self) -> bool:
        return self.nightly or LONG.search(self.text) is not None


def steps(page: Path) -> list[Step]:
    """Return what a page lets its reader run: each command, with the lines that go on, and each block of Python."""
    found: list[Step] = []
    content = page.read_text(encoding="utf-8")
    outputs = dict(OUTPUT.findall(content))
    for language, mark, text in BLOCK.findall(content):
        assert mark.strip() in MARKS, f"{page.name}: a block is marked '{mark.strip()}'"
        if mark.strip() == "by hand" or language not in ("sh", "python"):
            continue
        parts = [text] if language == "python" else text.replace("\\\n", " ").strip().splitlines()
        found += [Step(language, part, mark.strip() == "nightly") for part in parts if not part.startswith("make ")]
        if text in outputs:
            found[-1] = found[-1]._replace(shown=outputs[text])
    return found


def test_what_make_runs_is_run_by_ci() -> None:
    wanted = {line.split()[1] for page in PAGES for line in re.findall(r"^make .*", page.read_text(), re.M)}
    run = set(re.findall(r"^part (\w+)", (ROOT / ".ci" / "run").read_text(), re.M))
    parts = re.findall(r"^test: (.*)$", (ROOT / "Makefile").read_text(), re.M)[0].split()  # `make test` is all of them
    assert wanted and set(parts) <= run
    assert wanted <= run | {"test"}


def test_commands_stand_in_blocks_that_are_run() -> None:
    for page in PAGES:
        for language, _, text in BLOCK.findall("\n" + re.sub(r"^```\n", "```text\n", page.read_text(), flags=re.M)):
            assert language == "sh" or not re.search(r"^(sparring|pip|python) ", text, re.M), f"{page.name}: {text}"


def test_no_block_escapes() -> None:
    skipped = set()
    for page in [*PAGES, *sorted((ROOT / "docs" / "results").glob("*.md"))]:
        text = page.read_text(encoding="utf-8")
        fences = re.findall(r"^([ >]*)(```+|~~~+)(.*)$", text, re.M)
        assert {(indent, fence) for indent, fence, _ in fences} <= {("", "```")}, page.name
        assert {words.split(" ")[0] for *_, words in fences} <= {"", "sh", "python", "toml", "text"}, page.name
        plain = BLOCK.findall("\n" + re.sub(r"^```\n", "```text\n", text, flags=re.M))
        assert not any(kind == "text" and re.search(r"^(import|from) ", body, re.M) for kind, _, body in plain), (
            page.name
        )
        assert not re.search(r"^\s*(\$|>>>|%) ", text, re.M), page.name
        skipped |= {
            (page.name, body.split("  ")[0].split("\n")[0])
            for _, mark, body in BLOCK.findall(text)
            if "by hand" in mark
        }
        assert page in PAGES or not re.search(r"^```(sh|python)", text, re.M), page.name
    assert skipped == HAND


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a home with data, and in "files" what the commands take."""
    folder = tmp_path_factory.mktemp("home")
    prepare_data(folder / "data")
    (folder / "files").mkdir()
    prepare_files(folder / "files")
    return folder


@pytest.mark.parametrize(
    "page", [page for page in PAGES if any(not s.long for s in steps(page))], ids=lambda page: page.name
)
def test_a_page_runs_as_written(page: Path, home: Path, tmp_path: Path) -> None:
    _run(page, home, tmp_path, nightly=False)


@pytest.mark.nightly
@pytest.mark.parametrize(
    "page", [page for page in PAGES if any(s.long for s in steps(page))], ids=lambda page: page.name
)
def test_a_page_runs_as_written_with_its_training(page: Path, home: Path, tmp_path: Path) -> None:
    _run(page, home, tmp_path, nightly=True)


def _run(page: Path, home: Path, folder: Path, *, nightly: bool) -> None:
    shutil.copytree(home / "files", folder, dirs_exist_ok=True)
    every = steps(page)
    for step in every:
        if step.kind == "python" and (name := re.match(r"# (\w+\.py)", step.text)):
            with (folder / name[1]).open("a") as file:
                file.write(step.text)
    (folder / "mine.toml").write_text(
        "".join(re.findall(r"```toml\n(# mine\.toml.*?)```", page.read_text(), re.DOTALL))
    )
    if page.name == "deploy.md":
        _do(Step("sh", "sparring study my-plan.toml --out out/mine"), page, home, folder)
    named: dict[str, str] = {}
    for step in every:
        if step.kind == "python" and (name := re.match(r"# (\w+\.py)", step.text)):  # it goes on with the file
            named[name[1]] = named.get(name[1], "") + step.text
            step = step._replace(text=named[name[1]])
        if nightly or not step.long:
            printed = _do(step, page, home, folder)
            if nightly and step.shown:  # with the training that the page names; digits depend on the processor
                missing = {*map(_words, step.shown.splitlines())} - {*map(_words, printed.splitlines())}
                assert not missing, f"{step.text}: {missing}\n{printed}"


def _words(line: str) -> str:
    return " ".join(re.sub(r"[\d.,+−-]+", "#", line).split())


def _do(step: Step, page: Path, home: Path, folder: Path) -> str:
    """Run a step and return what it printed."""
    environment = {**os.environ, "HOME": str(home), "SPARRING_DATA": str(home / "data"), "MPLBACKEND": "agg"}
    environment["XDG_CACHE_HOME"] = os.environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")
    environment["PATH"] = f"{_commands(home)}:{environment['PATH']}"
    if step.kind == "sh":
        run = run_line(step.text, folder, environment)
    else:
        text = "\n".join([BEFORE.get(page.name, ""), step.text])
        (folder / "block.py").write_text(text, encoding="utf-8")
        run = run_words(["python", "block.py"], folder, environment)
    allowed = {0, 1} if "sparring compare" in step.text else {0}  # 1: a larger drop is not excluded
    allowed |= {1, 3} if "sparring verify" in step.text else set()  # falsified, unknown
    assert run.returncode in allowed, f"{step.text}\n{run.stdout[-2000:]}\n{run.stderr[-3000:]}"
    assert "Traceback" not in run.stderr, run.stderr
    return f"{run.stdout}\n{run.stderr}"


def _commands(home: Path) -> Path:
    """Return a folder with the `sparring` and the `python` of this very interpreter."""
    folder = home / "bin"
    folder.mkdir(exist_ok=True)
    for name, words in (("sparring", "-m sparring"), ("python", "")):
        path = folder / name
        if not path.exists():
            path.write_text(f'#!/bin/sh\nexec {shlex.quote(sys.executable)} {words} "$@"\n')
            path.chmod(0o755)
    return folder
