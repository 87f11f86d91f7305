"""Options of attacks and pruners, sparring's own and a user's, are held against signatures before anything runs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from sparring import bounds
from sparring.attacks import facts_of, nearest
from sparring.errors import UserError
from sparring.study import DataFacts, Plan, configured, lay_out

OWN = """
from functools import partial
from sparring.attacks import nearest
from sparring.sparsity import magnitude, one_shot

def drift(model, x, y, *, norm, eps=None, targets=None, generator=None, rate: float = 0.5, turns=3, loss=len):
    return x

def smallest(model, x, y, *, norm, targets=None, generator=None, turns: int = 3):
    return x

closer = partial(nearest, steps=5)

def late(sparsity: float, *, share: float = 0.5):
    return one_shot(magnitude, sparsity, at=share)
"""
FACTS = DataFacts("0" * 64, 100, 100, (1, 8, 8), 10)


@pytest.fixture(autouse=True)
def own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "own_options.py").write_text(OWN)
    monkeypatch.syspath_prepend(tmp_path)


def plan(**tables: Any) -> Plan:
    return Plan.from_table(
        {"name": "options", "data": "digits", "model": "mlp", "seeds": 1, "sparsities": [0.5]} | tables
    )


@pytest.mark.parametrize(
    ("attack", "message"),
    [
        ({"name": "pgd", "options": {"step": 3}}, "has no option 'step'; it has: .*steps, step_size, restarts"),
        ({"name": "pgd", "options": {"steps": 3.5}}, "option 'steps': .*not 3.5"),
        ({"name": "pgd", "options": {"steps": 0}}, "steps must lie between 1"),
        ({"name": "pgd", "options": {"steps": 3}, "steps": 3}, "steps is given twice"),
        ({"name": "pgd", "options": {"norm": "l2"}}, "has no option 'norm'"),
        ({"name": "pgd", "options": {"objective": "dlr"}}, "option 'objective'"),
        ({"name": "own_options:drift", "options": {"rate": "fast"}}, "option 'rate': .*not 'fast'"),
        ({"name": "own_options:drift", "options": {"rate": float("nan")}}, "option 'rate'"),
        ({"name": "own_options:drift", "options": {"turns": True}}, "option 'turns'"),
        ({"name": "own_options:drift", "options": {"speed": 1}}, "it has: rate, turns, loss"),
        ({"name": "own_options:smallest"}, "takes no eps"),
        ({"name": "ddn"}, "supports only l2, not linf"),
        ({"name": "pgd", "norm": "L0"}, "supports only linf, l2, l1, not l0"),
    ],
)
def test_what_an_attack_does_not_take_is_refused(attack: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        plan(attacks=[{"eps": [0.1]} | attack])


def test_options_are_part_of_a_key_and_as_good_as_the_keys_beside_them() -> None:
    def keys(**options: Any) -> set[str]:
        return set(lay_out(plan(attacks=[{"name": "pgd", "eps": [0.1]} | options]), FACTS).tasks)

    assert keys(steps=7) == keys(options={"steps": 7}) != keys()
    assert keys(options={"step_size": 0.01}) != keys()
    assert "options" not in plan(attacks=[{"name": "pgd", "eps": [0.1]}]).table()["attacks"][0]


def test_a_pruner_of_ones_own_has_options_of_its_own() -> None:
    table = {"label": "late", "method": "own_options:late", "options": {"share": 0.25}}
    tasks = lay_out(plan(pruning=[table]), FACTS).tasks.values()
    assert [t.table()["pruning"]["options"] for t in tasks if t.table().get("pruning")] == [{"share": 0.25}]
    for options, message in ({"part": 1}, "has no option 'part'; it has: share"), ({"share": "half"}, "option 'share'"):
        with pytest.raises(UserError, match=message):
            plan(pruning=[table | {"options": options}])


def test_options_of_the_command_line_go_to_the_attacks_that_have_them() -> None:
    chosen = configured(["fgsm", "pgd", "own_options:smallest"], ["steps=7", "turns=2"])
    kinds = [facts_of(attack).kind for attack in chosen.values()]
    assert kinds == ["budget", "budget", "minimum-norm"]
    assert [getattr(attack, "keywords", None) for attack in chosen.values()] == [{}, {"steps": 7}, {"turns": 2}]
    with pytest.raises(UserError, match=r"unknown option of fgsm, pgd .step.. Did you mean .steps.?"):
        configured(["fgsm", "pgd"], ["step=7"])


def test_a_configured_attack_is_what_it_configures() -> None:
    (attack,) = configured(["own_options:closer"], []).values()
    assert facts_of(attack) == facts_of(nearest) and facts_of(attack).kind == "minimum-norm"


def test_a_bound_in_its_table_has_a_name_in_plans(monkeypatch: pytest.MonkeyPatch) -> None:
    for key, table, other in ("certify", bounds.BOUNDS, "crown"), ("lipschitz", bounds.LIPSCHITZ, "jacobian"):
        rows = [{"method": "mine"} | ({"radius": 0.1} if key == "lipschitz" else {})]
        with pytest.raises(UserError, match=f"Known: .*{other}"):
            plan(**{key: rows})
        monkeypatch.setitem(table, "mine", table[other])
        assert {t.stage for t in lay_out(plan(**{key: rows}), FACTS).tasks.values()} >= {key}
