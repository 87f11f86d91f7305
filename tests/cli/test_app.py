"""Records in a command's place of options: each field is an option, and the command is given the record."""

from __future__ import annotations

import inspect

from sparring.cli._app import DataSource, Json, ModelSource, flat


def command(model: ModelSource, data: DataSource, json: Json = False) -> int:
    """Say what was given."""
    assert model == ModelSource("mlp") and data == DataSource("digits", download=True)
    return 7 if json else 0


def test_the_fields_of_records_are_options() -> None:
    made = flat(command)
    parameters = inspect.signature(made).parameters
    assert list(parameters) == ["model", "weights", "mean", "std", "data", "data_dir", "download", "json"]
    assert parameters["model"].default is inspect.Parameter.empty and parameters["data"].default == "mnist-5k"
    given = {name: p.default for name, p in parameters.items()} | {"model": "mlp", "data": "digits", "download": True}
    assert (
        made(
            **given,
        )
        == 0
        and made(**given | {"json": True}) == 7
    )
    assert made.__doc__ == "Say what was given."


def test_every_command_on_a_model_takes_the_options_of_its_sources(sparring) -> None:  # type: ignore[no-untyped-def]
    for name in ("attack", "certify", "bench", "export", "prune"):
        shown = sparring(name, "--help").out
        assert all(option in shown for option in ("--weights", "--data-dir", "--download", "[default: mnist-5k]"))
