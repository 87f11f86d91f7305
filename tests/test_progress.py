"""One bar that is drawn over itself, where a terminal reads it and where a notebook does."""

from __future__ import annotations

import contextlib
import io
import re

import torch
from torch import nn

from sparring import attacks, progress, train
from sparring.threat import LINF, Threat


class Notebook(io.StringIO):
    """What an IPython kernel's stderr is: no terminal; the front end draws over a line at a carriage return only."""

    def shown(self) -> list[str]:
        """Return the lines that a reader sees; letters of an earlier, longer line stay."""
        assert "\033" not in self.getvalue(), "a notebook shows a terminal's commands as text"
        lines = []
        for line in self.getvalue().split("\n"):
            seen = ""
            for part in line.split("\r"):
                seen = part + seen[len(part) :]
            lines.append(seen.rstrip())
        return [line for line in lines if line]


def test_an_attack_shows_one_line() -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(4, 3)).eval()
    x = torch.rand(64, 1, 2, 2)
    y = model(x).argmax(1)
    with contextlib.redirect_stderr(notebook := Notebook()):
        attacks.run(model, x, y, attacks.fgsm, Threat(LINF, 0.1), batch_size=1, progress=progress.show)
    assert notebook.getvalue().count("\r") > 60
    assert notebook.shown() == ["attacking [####################] 64 of 64"]


def test_several_attacks_show_a_line_each() -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(4, 3)).eval()
    x = torch.rand(20, 1, 2, 2)
    both = {"fgsm": attacks.fgsm, "pgd": attacks.pgd}
    y = model(x).argmax(1)
    with contextlib.redirect_stderr(notebook := Notebook()):
        attacks.audit(model, x, y, both, eps=[0.1], checks=0, batch_size=2, progress=progress.show)
    assert len(notebook.shown()) <= 4 and all(re.search(r"\d+ of \d+$", line) for line in notebook.shown())


def test_a_training_shows_one_line() -> None:
    x, y = torch.zeros(8, 1, 2, 2, dtype=torch.uint8), torch.arange(8) % 2
    model, recipe = nn.Sequential(nn.Flatten(), nn.Linear(4, 2)), train.Recipe(epochs=30, lr=0.01)
    with contextlib.redirect_stderr(notebook := Notebook()):
        train.fit(model, x, y, recipe, progress=lambda now: progress.show("epochs", now.epoch, now.epochs))
    assert notebook.shown() == ["epochs [####################] 30 of 30"]


def test_a_shorter_line_leaves_nothing_of_a_longer_one() -> None:
    with contextlib.redirect_stderr(notebook := Notebook()):
        progress.show("a long name", 99, 100)
        progress.show(1, 2)
    assert notebook.shown() == ["[##########..........] 1 of 2"]
    assert progress.bar(0, 0) == "[....................] 0 of 0"


def test_pace_counts_what_was_done_meanwhile() -> None:
    assert progress.pace(0, 10, 3.0, memory="1 GiB") == "0 of 10 images, 1 GiB"
    assert (
        progress.pace(30, 50, 10.0, memory="1 GiB", first=10) == "30 of 50 images, 2 images/s, 1 GiB, about 10 s left"
    )
    assert progress.pace(50, 50, 0.01, memory="1 GiB", what="rounds") == "50 of 50 rounds, 5,000 rounds/s, 1 GiB"
