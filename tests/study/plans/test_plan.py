from __future__ import annotations

from pathlib import Path

import pytest

from sparring.bounds import BOUNDS
from sparring.errors import UserError
from sparring.study import Plan, presets


@pytest.mark.parametrize("name", sorted(presets()))
def test_presets_load_and_go_through_json(name: str) -> None:
    plan = Plan.load(name)
    assert plan.name == name and presets()[name]
    assert Plan.from_table(plan.table()).table() == plan.table()


def test_overrides_are_toml_values() -> None:
    plan = Plan.load("quick", ["seeds=5", "data=mnist", "recipe.epochs=2", "attacks.0.eps=[0.3]", "model.width=0.5"])
    assert (plan.seeds, plan.data, plan.recipe.epochs) == (5, "mnist", 2)
    assert plan.attacks[0].eps == (0.3,)
    assert plan.model.name == "lenet-300-100" and plan.model.width == 0.5


def test_a_plan_certifies_by_every_bound() -> None:
    table = Plan.load("quick").table()
    plan = Plan.from_table(table | {"certify": [{"method": name} for name in BOUNDS]})
    assert [one.method for one in plan.certify] == list(BOUNDS)
    with pytest.raises(UserError, match=r"unknown certify\.method 'crow'\. Did you mean 'crown'"):
        Plan.from_table(table | {"certify": [{"method": "crow"}]})


def test_finetune_inherits_from_recipe() -> None:
    plan = Plan.load("quick", ["recipe.weight_decay=0.25"])
    assert plan.finetune.weight_decay == 0.25 and plan.finetune.epochs == 10


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("seeds = 3\nsparsities = [0.5 0.6]", r"plan.toml is not valid TOML.*line 2"),
        ("sedes = 3", r"unknown key 'sedes'; did you mean 'seeds'"),
        ("[recipe]\nepoch = 3", r"unknown key 'recipe.epoch'; did you mean 'epochs'"),
        ("[[attacks]]\nname = 'fgsm'\neps = [0.1]\nstep = 3", r"unknown key 'attacks.0.step'"),
        ("seeds = 'three'", r"key 'seeds'"),
        ("[model]\nname = 'mlp'\nwidths = [true]", r"key 'model.widths.0' does not take true"),
        ("[controls]\ndecays = [false]", r"key 'controls.decays.0' does not take false"),
        ("seeds = 0", r"seeds must lie between 1 and 1000"),
        ("seeds = 99999999999999999999999", r"seeds"),
        ("[margins]\naccurcy = 0.01", r"unknown margin 'accurcy'. Did you mean 'accuracy'"),
        ("[margins]\nrobust = 2", r"margins.robust is the fraction"),
        ("[recipe]\nlr = -1.0", r"lr must lie between"),
        ("[recipe]\nlr = nan", r"lr must lie between"),
        ("[recipe]\nepochs = 1.5", r"key 'recipe.epochs'"),
        ("sparsities = [1.0]", r"a sparsity is the fraction removed"),
        ("sparsities = [-0.5]", r"a sparsity is the fraction removed"),
        ("model = 'lenet-301'", r"Did you mean 'lenet-300-100'"),
        ("[[attacks]]\nname = 'fgms'", r"Did you mean 'fgsm'"),
        ("[[attacks]]\nname = 'fgsm'\neps = [8]", r"255"),
        ("[[attacks]]\nname = 'fgsm'\neps = [0.1]\nsteps = 3", r"no option 'steps'"),
        ("[[pruning]]\nlabel = 'a'\n[[pruning]]\nlabel = 'a'", r"two methods have the label 'a'"),
        ("[[pruning]]\nlabel = 'control'", r"label 'control'"),
        ("[[pruning]]\nscore = 'magnitud'", r"Did you mean 'magnitude'"),
        ("pruning = []", r"prunes nothing"),
        (
            "[training]\nloss = 'pgd-at'\nramp = 1.5",
            r"ramp is a fraction of the training, above 0 and at most 1, not 1.5",
        ),
        ("[training]\nloss = 'pgd-at'\nramp = nan", r"ramp is a fraction"),
        ("[training]\nramp = 0.5", r"the standard loss has no eps"),
        ("recipe = 3", r"recipe"),
        ("[[pruning]]\nmethod = 'dns'\nc_rate = 1.0\nsparsities = [0.5]", r"give either c_rate or sparsities"),
        ("[[pruning]]\nc_rate = 1.0", r"'gradual' has no option 'c_rate'"),
        ("[[pruning]]\nmethod='dns'\nc_rate=1.0\n[controls]\nwide_sparse=[0.5]", r"table with a sparsity"),
    ],
)
def test_mistakes_are_named(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "plan.toml"
    path.write_text(text)
    with pytest.raises(UserError, match=message):
        Plan.load(path)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("seeds", "KEY=VALUE"),
        ("attacks.9.eps=[0.1]", "not an index of a list"),
        ("seeds.deep=3", "is a value, not a table"),
        ("seeds=[", "not a value in TOML"),
        ("seeds=5\ndata='mnist'", "not a value in TOML"),
        ("=5", "takes KEY=VALUE, such as --set seeds=5, not '=5'"),
        ("attacks.².eps=[0.1]", "'²' is not an index of a list"),
    ],
)
def test_bad_overrides_are_named(override: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        Plan.load("quick", [override])


def test_a_folder_of_a_presets_name_does_not_hide_the_preset(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "quick").mkdir()
    monkeypatch.chdir(tmp_path)
    assert Plan.load("quick").name == "quick"
    with pytest.raises(UserError, match="folder"):
        Plan.load(str(tmp_path))


def test_unknown_presets_and_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="Did you mean 'quick'"):
        Plan.load("quik")
    with pytest.raises(UserError, match=r"nowhere\.toml"):
        Plan.load(tmp_path / "nowhere.toml")
    (tmp_path / "binary.toml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UserError, match="UTF-8"):
        Plan.load(tmp_path / "binary.toml")
