"""Records in a command's place of options: each field is an option, and the command is given the record."""

from __future__ import annotations

import inspect
from typing import Any

import pytest

from sparring.cli import _app, _attack
from sparring.cli._app import CertifyOptions, DataSource, ModelSource


def test_the_fields_of_records_are_options(monkeypatch: pytest.MonkeyPatch) -> None:
    parameters = inspect.signature(_app.certify).parameters
    sources = ["model", "weights", "mean", "std", "data", "data_dir", "download"]
    sources += ["resize", "crop", "interpolation", "classes", "limit", "no_cache"]
    assert list(parameters) == [*sources, "norm", "method", "seconds", "eps", "images", "threads", "json"]
    assert parameters["model"].default is inspect.Parameter.empty and parameters["data"].default == "mnist-5k"
    asked: list[Any] = []
    monkeypatch.setattr(_attack, "run_certify", lambda *records, as_json: asked.append((*records, as_json)))
    given = {name: p.default for name, p in parameters.items()} | {"model": "mlp", "data": "digits", "images": 7}
    _app.certify(**given)
    assert asked == [(ModelSource("mlp"), DataSource("digits"), CertifyOptions(images=7), False)]


def test_every_command_on_a_model_takes_the_options_of_its_sources(sparring) -> None:  # type: ignore[no-untyped-def]
    for name in ("attack", "certify", "bench", "export", "prune"):
        shown = sparring(name, "--help").out
        assert all(option in shown for option in ("--weights", "--data-dir", "--download", "[default: mnist-5k]"))
