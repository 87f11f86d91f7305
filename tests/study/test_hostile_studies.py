"""Plans, records and model files that lie: a sound result or a UserError; no hang, no traceback, memory bounded."""

from __future__ import annotations

import json
import math
import random
import signal
from collections.abc import Callable, Iterator
from functools import partial
from importlib import resources
from pathlib import Path
from typing import Any

import pytest
import torch

from sparring.errors import UserError
from sparring.files import pack_tensors
from sparring.models import Blueprint, build, load_model, save_model
from sparring.records import Record, Store
from sparring.study import DataFacts, Plan, lay_out, progress

FACTS = DataFacts("h", 100, 50, (1, 8, 8), 10)
HANG = 30  # seconds
FUZZED = 100  # of each kind
HUGE = ("-1", "0", "1e308", "-1e308", "inf", "-inf", "nan", "9223372036854775807", "9" * 400, "true", '"x"', "[]", "{}")
KEYS = (
    "seeds",
    "sparsities",
    "sparsities.0",
    "shard",
    "batch_size",
    "gallery",
    "model.width",
    "model.depth",
    "recipe.epochs",
    "recipe.lr",
    "recipe.batch_size",
    "finetune.epochs",
    "training.eps",
    "training.steps",
    "attacks.0.eps",
    "attacks.0.images",
    "attacks.1.steps",
    "pruning.0.sparsities",
    "pruning.0.seeds",
    "controls.small_dense",
    "controls.wide_sparse",
    "margins.accuracy",
)
TEXTS = {
    "climbing-name": 'name = "../../up"',
    "absolute-name": 'name = "/etc/cron.d/x"',
    "hidden-name": 'name = ".bashrc"',
    "long-name": f'name = "{"n" * 10_000}"',
    "nul-name": 'name = "a\\u0000b"',
    "newline-name": 'name = "a\\nb"',
    "no-name": 'name = ""',
    "name-of-number": "name = 5",
    "climbing-model": 'model = "../../../etc/passwd"',
    "unknown-model": 'model = "no.such.module:thing"',
    "many-cells": f"seeds = 1000\nsparsities = [{', '.join(f'0.{i:06}' for i in range(1, 60_000))}]",
    "many-shards": 'seeds = 1000\nshard = 1\n[[attacks]]\nname = "fgsm"\neps = [0.1]\nimages = 1000000',
    "many-budgets": f'seeds = 1000\n[[attacks]]\nname = "fgsm"\neps = [{", ".join(["0.1"] * 100_000)}]',
    "wide": 'model = { name = "mlp", widths = [4000000000, 4000000000] }',
    "deep": 'model = { name = "mlp", widths = [' + "9, " * 50_000 + "] }",
    "nested": "sparsities = " + "[" * 5_000 + "]" * 5_000,
    "dotted": ".".join("a" * 5_000) + " = 1",
    "no-toml": "\x00\x01",
    "large": "#" * 2_000_000,
    "binary": "\ud800",
    "duplicate": "seeds = 1\nseeds = 2",
    "table-as-list": "[[recipe]]\nepochs = 1",
    "list-as-table": "[attacks]\nname = 1",
    "date": "seeds = 1979-05-27T07:32:00Z",
}


@pytest.fixture(autouse=True)
def _alarm() -> Iterator[None]:
    def cry(*_: object) -> None:
        raise TimeoutError("a reader hangs")

    before = signal.signal(signal.SIGALRM, cry)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


def _said(read: Callable[[], object], name: str) -> str:
    """Return "" for a sound result or the message of a UserError; fail with the name of whatever else comes."""
    signal.alarm(HANG)
    try:
        read()
    except UserError as error:
        return str(error) or "?"
    except Exception as error:
        raise AssertionError(f"{name}: {type(error).__name__}: {error}"[:500]) from error
    finally:
        signal.alarm(0)
    return ""


def _laid_out(path: Path, overrides: tuple[str, ...] = ()) -> None:
    lay_out(Plan.load(path, overrides), FACTS)


QUICK = (resources.files("sparring.study") / "presets" / "quick.toml").read_text()


@pytest.mark.parametrize("name", TEXTS)
def test_plans_made_by_hand(name: str, tmp_path: Path) -> None:
    path = tmp_path / "plan.toml"
    path.write_bytes(TEXTS[name].encode(errors="surrogatepass"))
    message = _said(lambda: _laid_out(path), name)
    assert message or name == "unknown-model"  # a user's factory is looked for when a cell needs it
    assert [p.name for p in tmp_path.iterdir()] == ["plan.toml"]


@pytest.mark.parametrize("key", KEYS)
def test_numbers_out_of_range(key: str, tmp_path: Path) -> None:
    path = tmp_path / "plan.toml"
    path.write_text(QUICK)
    for value in HUGE:
        _said(partial(_laid_out, path, (f"{key}={value}",)), f"{key}={value:.20}")


def _mutated(text: str, dice: random.Random) -> str:
    """Change a text in a few places: cut, repeat, swap numbers for huge ones, swap characters."""
    for _ in range(dice.choice((1, 1, 2, 5))):
        at = dice.randrange(len(text) + 1)
        act = dice.randrange(4)
        if act == 0:
            text = text[:at] + text[at + dice.randrange(1, 20) :]
        elif act == 1:
            text = text[:at] + text[at : at + dice.randrange(1, 40)] + text[at:]
        elif act == 2:
            text = text[:at] + dice.choice((*HUGE, "null", '"', "\\", "[", "{", "../")) + text[at + 1 :]
        else:
            text = text[:at] + chr(dice.randrange(1, 0x2FF)) + text[at + 1 :]
    return text


def test_fuzzed_plans(tmp_path: Path) -> None:
    dice, path = random.Random(0), tmp_path / "plan.toml"
    said = []
    for number in range(FUZZED):
        path.write_text(_mutated(QUICK, dice))
        said.append(_said(lambda: _laid_out(path), f"plan {number}: {path.read_text()[:200]}"))
    assert sum(map(bool, said)) > FUZZED // 4


# -- records ----------------------------------------------------------------------------------------------------------

KEY = "0123456789abcdef" * 2


@pytest.fixture
def store(tmp_path: Path) -> Store:
    found = Store(tmp_path)
    found.prepare()
    flags = [{"name": "n", "detail": "d"}]
    record = Record(KEY, "measure", {"data": "x", "parents": []}, {"accuracy": 0.5}, {}, flags, times={"seconds": 1.0})
    found.write(record, pack_tensors({"t": torch.zeros(3)}))
    return found


def _append_read_(found: list[Record | None], store: Store) -> None:
    found.append(store.read(KEY))


def test_fuzzed_records_are_set_aside(store: Store) -> None:
    path, dice = store.records / f"{KEY}.json", random.Random(0)
    whole = path.read_text()
    sound = store.read(KEY)
    assert sound is not None
    for number in range(FUZZED):
        path.write_text(_mutated(whole, dice))
        found: list[Record | None] = []
        assert not _said(partial(_append_read_, found, store), f"record {number}")
        # What is read has the right checksum; only times and white space are not under it.
        assert found[0] is None or found[0].checksum() == sound.checksum()
        assert (found[0] is None) == (not path.exists())


@pytest.mark.parametrize(
    "changes",
    [
        {"metrics": []},
        {"metrics": {"accuracy": "high"}},
        {"metrics": {"accuracy": [1]}},
        {"flags": {"a": 1}},
        {"flags": [1]},
        {"flags": [{}]},
        {"error": 5},
        {"object": {"file": "../../../etc/passwd", "sha256": "x"}},
        {"object": {"file": f"{KEY}.safetensors"}},
        {"object": []},
        {"inputs": None},
        {"stage": 1},
        {"key": "../../x"},
        {"schema": "1"},
        {"times": [1]},
        {"unknown": 1},
    ],
)
def test_records_of_the_right_checksum_and_the_wrong_form(store: Store, changes: dict[str, Any]) -> None:
    path = store.records / f"{KEY}.json"
    content = {**json.loads(path.read_text()), **changes}
    content.pop("sha256")
    known = {name: value for name, value in content.items() if name != "unknown"}
    content["sha256"] = Record(**known).checksum()
    path.write_text(json.dumps(content))
    assert store.read(KEY) is None and (store.damaged / path.name).exists()


@pytest.mark.parametrize(
    "content", ["", "[]", "{}", '{"schema": 1}', "[" * 100_000, '{"schema": 1, "plan": {}, "cells": 5}']
)
def test_plan_json_that_is_none(tmp_path: Path, content: str) -> None:
    (tmp_path / "plan.json").write_text(content)
    assert _said(lambda: progress(tmp_path), content[:20])


# -- model files ------------------------------------------------------------------------------------------------------

BLUEPRINT = Blueprint("mlp", (1, 8, 8), 10, (0.5,), (0.5,), widths=(4,))
BLUEPRINTS: dict[str, Any] = {
    "list": [],
    "number": 5,
    "nothing": {},
    "unknown": {"surprise": 1},
    "factory": {"name": "os:system"},
    "model": {"name": "../../x"},
    "wide": {"widths": [2**40]},
    "many": {"widths": [9] * 100_000},
    "negative": {"widths": [-4]},
    "fraction": {"widths": [4.5]},
    "text": {"widths": "four"},
    "shape": {"shape": [1, 2**31, 2**31]},
    "flat": {"shape": []},
    "shape-text": {"shape": "8x8"},
    "classes": {"classes": 2**62},
    "no-classes": {"classes": 0},
    "nan": {"mean": [math.nan]},
    "no-std": {"std": []},
    "zero-std": {"std": [0.0]},
    "mean-text": {"mean": ["a"]},
    "wrong-size": {"widths": [5]},
    "depth": {"depth": 10**9},
    "width": {"width": 1e300},
}


@pytest.mark.parametrize("name", BLUEPRINTS)
def test_model_files_that_lie(name: str, tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    model = build("mlp", shape=(1, 8, 8), classes=10, mean=(0.5,), std=(0.5,), widths=(4,))
    save_model(path, model, BLUEPRINT)
    load_model(path)
    about = BLUEPRINTS[name]
    if isinstance(about, dict) and about:
        about = {**json.loads(json.dumps(BLUEPRINT.__dict__)), **about}
    described = torch.tensor(list(json.dumps(about).encode()), dtype=torch.uint8)
    path.write_bytes(pack_tensors({**model.state_dict(), "sparring/blueprint": described}))
    assert _said(lambda: load_model(path), name)
