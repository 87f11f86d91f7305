"""Records in a command's place of options: each field is an option, and the command is given the record."""

from __future__ import annotations

import inspect
import math
import re
import runpy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from sparring import __version__, bounds, cli
from sparring.cli import _app, _attack, _compare, _study
from sparring.cli._app import CertifyOptions, DataSource, ModelSource, Where
from sparring.errors import TERMINATED
from sparring.waiting import Stopwatch


def test_the_fields_of_records_are_options(monkeypatch: pytest.MonkeyPatch) -> None:
    parameters = inspect.signature(_app.certify).parameters
    sources = ["model", "weights", "mean", "std", "data", "data_dir", "download"]
    sources += ["resize", "crop", "interpolation", "classes", "limit", "no_cache", "verbose"]
    assert list(parameters) == [
        *sources,
        "norm",
        "method",
        "seconds",
        "eps",
        "images",
        "threads",
        "device",
        "dtype",
        "json",
    ]
    assert parameters["model"].default is inspect.Parameter.empty and parameters["data"].default == "mnist-5k"
    asked: list[Any] = []
    monkeypatch.setattr(_attack, "run_certify", lambda *records, as_json: asked.append((*records, as_json)))
    given = {name: p.default for name, p in parameters.items()} | {"model": "mlp", "data": "digits", "images": 7}
    _app.certify(**given)
    assert asked == [(ModelSource("mlp"), DataSource("digits"), CertifyOptions(images=7), Where(), False)]


def test_every_command_on_a_model_takes_the_options_of_its_sources(sparring) -> None:  # type: ignore[no-untyped-def]
    for name in ("attack", "certify", "bench", "export", "prune"):
        shown = " ".join(sparring(name, "--help").out.split())
        assert all(option in shown for option in ("--weights", "--data-dir", "--download", "[default: mnist-5k]"))


def test_every_command_that_runs_a_model_says_where_and_in_which_numbers() -> None:
    without = {"status", "merge", "report", "convert", "list", "doctor"} | {"pick"}  # which packs a network and no more
    for command in _app.app.registered_commands:
        assert command.callback is not None and command.name is not None
        asked = {"device", "dtype"} & set(inspect.signature(command.callback).parameters)
        assert asked == (set() if command.name in without else {"device", "dtype"}), command.name


def test_the_overview_cuts_no_description_short(sparring, monkeypatch: pytest.MonkeyPatch) -> None:  # type: ignore[no-untyped-def]
    monkeypatch.setenv("COLUMNS", "80")
    told = sparring("--help").out
    assert "doctor" in told and "..." not in told.partition("Commands:")[2]


@pytest.mark.parametrize("name", [command.name for command in _app.app.registered_commands])
def test_help_shows_what_people_type_and_no_name_of_a_type(sparring, name: str) -> None:  # type: ignore[no-untyped-def]
    told = sparring(name, "--help").out
    usage = told.partition("\n\n")[0]
    assert re.fullmatch(rf"Usage: .* {name} \[OPTIONS\]( \[?[A-Z]+\]?(\.\.\.)?)*", " ".join(usage.split()))
    assert not re.findall(r"<[a-z].*>|\w+\[\w+\]|\{\w+\}|\b(?:str|int|float|Path|range)\b", told)


def test_the_site_lists_the_options_that_help_shows(sparring) -> None:  # type: ignore[no-untyped-def]
    pytest.importorskip("mkdocs")
    parts = runpy.run_path(str(Path(__file__).parents[2] / ".ci" / "site.py"))["commands"]().split("### sparring ")[1:]
    assert len(parts) == len(_app.app.registered_commands)
    for part in parts:
        options = {*re.findall(r"^ +(?:-o, )?(--[a-z-]+)", sparring(part.split()[0], "--help").out, re.M)} - {"--help"}
        assert {*re.findall(r"`(--[a-z-]+)", part)} == options


def test_it_prints_its_version(sparring) -> None:  # type: ignore[no-untyped-def]
    told = sparring("--version")
    assert (told.code, told.out) == (0, f"sparring {__version__}\n")


def test_every_command_takes_json_and_is_on_its_page() -> None:
    page = (Path(__file__).parents[2] / "docs" / "cli.md").read_text(encoding="utf-8")
    for command in _app.app.registered_commands:
        assert command.callback is not None
        assert "json" in inspect.signature(command.callback).parameters, command.name
        assert f"\n| `{command.name}` | " in page
    codes = {_compare.DROPPED, cli.USER_ERROR, _study.FAILED, cli.INTERRUPTED, TERMINATED, 0}
    assert {int(code) for code in re.findall(r"^\| (\d+) \|", page, re.M)} == codes


# What one name means in several commands; all other options that commands share are the same in all of them.
OWN_HELP = {"model", "weights", "out", "eps", "images", "norm", "seed", "seconds", "options"}


def test_options_that_commands_share_are_the_same() -> None:
    found: dict[str, set[str]] = {}
    for command in _app.app.registered_commands:
        assert command.callback is not None
        for one in inspect.signature(command.callback).parameters.values():
            (about,) = one.annotation.__metadata__
            kind = "" if one.name in ("model", "out", "weights") else f"{one.annotation.__origin__} {one.default}"
            kind = re.sub(r" .*", "", kind) if one.name in ("data", "images", "eps", "seconds", "device") else kind
            found.setdefault(one.name, set()).add(f"{kind} {'' if one.name in OWN_HELP else about.help}")
    assert {name: kinds for name, kinds in found.items() if len(kinds) > 1} == {}


def test_no_color_is_respected(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    assert not _study.LiveView().console.no_color
    monkeypatch.setenv("NO_COLOR", "1")
    assert _study.LiveView().console.no_color


@pytest.mark.parametrize(
    ("pass_", "method", "steps"),
    [(0.01, "crown", 60), (0.2, "crown-interval", 60), (0.72, "interval", 49), (2.0, "interval", 10)],
)
def test_what_is_left_of_seconds_chooses_the_bound_and_the_steps_of_the_attack(
    monkeypatch: pytest.MonkeyPatch, pass_: float, method: str, steps: int
) -> None:
    each = {"alpha-crown": 50.0, "crown": 20.0, "crown-interval": 5.0, "interval": 0.5}
    monkeypatch.setattr(bounds, "estimate", lambda *_, progress: each)
    monkeypatch.setattr(_attack, "_pass_seconds", lambda *_: pass_)
    found = _attack._chosen(CertifyOptions(seconds=50), nn.Identity(), torch.zeros(2, 1), math.inf, Stopwatch())
    asked = inspect.signature(found.attack).parameters  # type: ignore[arg-type]
    assert (found.method, found.seconds, asked["steps"].default) == (method, 2 * each[method], steps)
    assert (found.rest > 0) == (pass_ < 0.1) and asked["starts"].default == (5 if pass_ < 0.1 else 0)
