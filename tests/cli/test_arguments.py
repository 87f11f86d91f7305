"""Arguments that make no sense are refused before data are read or anything is trained."""

from __future__ import annotations

from pathlib import Path

import pytest

from sparring import data
from sparring.models import Blueprint, save_model


@pytest.fixture
def work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Work in an empty folder with a model, and cry if data are read."""
    made = Blueprint("mlp", (1, 8, 8), 10, (0.0,), (1.0,), widths=(8,))
    save_model(tmp_path / "m.safetensors", made.build(), made)
    (tmp_path / "file").write_text("in the way")
    monkeypatch.chdir(tmp_path)

    def cry(*_: object, **__: object) -> None:
        raise AssertionError("data were read")

    monkeypatch.setattr(data, "load", cry)
    return tmp_path


M = "m.safetensors"
MISTAKES = {
    "images": ("attack", M, "--images=-5"),
    "images of none": ("certify", M, "--images", "0"),
    "batch size": ("attack", M, "--batch-size=-1"),
    "batch size of none": ("attack", M, "--batch-size", "0"),
    "batch size of 10^20": ("attack", M, "--batch-size", "1" + 20 * "0"),
    "threads of 10^20": ("attack", M, "--threads", "1" + 20 * "0"),
    "norm below 0": ("attack", M, "--norm=-1"),
    "checks": ("attack", M, "--checks=-1"),
    "no attacks": ("attack", M, "--attacks", ""),
    "no eps": ("attack", M, "--eps", ""),
    "NaN": ("attack", M, "--eps", "nan"),
    "negative": ("certify", M, "--eps=-1"),
    "units": ("certify", M, "--eps", "8"),
    "l1": ("certify", M, "--norm", "l1"),
    "l0": ("certify", M, "--norm", "l0"),
    "l0 of fgsm": ("attack", M, "--norm", "l0"),
    "method": ("certify", M, "--method", "crwon"),
    "compare": ("compare", M, M, "--eps", "x"),
    "drop": ("compare", M, M, "--max-drop", "accuracy", "nan"),
    "any drop": ("compare", M, M, "--max-drop", "accuracy", "inf"),
    "drop of what": ("compare", M, M, "--max-drop", "acuracy", "1"),
    "methods of models": ("compare", M, M, "--methods", "control", "gradual"),
    "sparsities of models": ("compare", M, M, "--sparsities", "0.5", "0.9"),
    "weights thrice": ("compare", M, M, "--weights", M),
    "seed": ("train", "mlp", "--out", "o.safetensors", "--seed=-1"),
    "huge seed": ("train", "mlp", "--out", "o.safetensors", "--seed", str(2**70)),
    "no ending": ("train", "mlp", "--out", "o"),
    "into a file": ("train", "mlp", "--out", "file/o.safetensors"),
    "too long": ("train", "mlp", "--out", "o" * 300 + ".safetensors"),
    "nowhere": ("train", "mlp", "--out", "/proc/none/o.safetensors"),
    "width": ("train", "mlp", "--out", "o.safetensors", "--width", "nan"),
    "loss": ("train", "mlp", "--out", "o.safetensors", "--loss", "pgd"),
    "train eps": ("train", "mlp", "--out", "o.safetensors", "--loss", "pgd-at", "--eps", "8"),
    "train eps of none": ("train", "mlp", "--out", "o.safetensors", "--loss", "trades", "--eps", "0"),
    "model": ("train", "lenet-6", "--out", "o.safetensors"),
    "sparsity": ("prune", M, "--out", "o.safetensors", "--sparsity", "nan"),
    "sparsity of 2": ("prune", M, "--out", "o.safetensors", "--sparsity", "2"),
    "threshold of NaN": ("prune", M, "--out", "o.safetensors", "--set", "method=dns", "--set", "c_rate=nan"),
    "shrinking at once": (
        *("prune", M, "--out", "o.safetensors", "--sparsity", "0.5"),
        *("--set", "method=proximal", "--set", "strength=inf"),
    ),
    "no sparsity": ("prune", M, "--out", "o.safetensors"),
    "values": ("export", M, "o.sparring", "--values", "int4"),
    "ending": ("export", M, "o.sparring", "--format", "onnx"),
    "export seconds": ("export", M, "o.sparring", "--seconds", "nan"),
    "attack of steps backwards": ("attack", M, "--attacks", "pgd", "--set", "step_size=-1"),
    "attack of no square": ("attack", M, "--attacks", "square", "--set", "share=0"),
    "attack on no class": ("attack", M, "--attacks", "apgd-targeted", "--set", "classes=-1"),
    "a file's name": ("attack", "file.py:net"),
    "trained": ("train", M, "--out", "o.safetensors"),
    "export eps": ("export", M, "o.sparring", "--eps", "2"),
    "batches": ("bench", M, "--batches", ""),
    "batches of none": ("bench", M, "--batches", "0"),
    "rounds": ("bench", M, "--rounds", "0"),
    "plot": ("bench", M, "--plot", "o.pdf"),
    "latency": ("pick", "out", "--max-latency=-1"),
    "workers": ("study", "quick", "--workers=-1"),
    "workers of 10^20": ("study", "quick", "--workers", "1" + 20 * "0"),
    "device": ("study", "quick", "--device", "gpu"),
    "device of an attack": ("attack", M, "--device", "gpu"),
    "device of no other": ("certify", M, "--device", "meta"),
    "device of a training": ("train", "mlp", "--out", "o.safetensors", "--device", "cuda:99"),
    "type": ("attack", M, "--dtype", "int8"),
    "out is a file": ("study", "quick", "--out", "file"),
    "pickle": ("attack", "file"),
    "file that is not there": ("attack", "m.safetensor"),
    "folder": ("attack", "../"),
    "no weights": ("attack", "mlp", "--weights", "none.safetensors"),
}


NEAR = {
    "Did you mean 'steps'?": ("--attacks", "pgd,fgsm", "--set", "stpes=3"),
    "Did you mean 'fgsm'?": ("--attacks", "FGSM"),
    "only Python code can give": ("--attacks", "apgd", "--set", "aims=0"),
}


@pytest.mark.parametrize("message", NEAR)
def test_what_was_meant_is_named(sparring, work: Path, message: str) -> None:  # type: ignore[no-untyped-def]
    assert message in sparring("attack", M, *NEAR[message]).err


@pytest.mark.parametrize("words", MISTAKES.values(), ids=MISTAKES)
def test_refused_before_work(sparring, work: Path, words: tuple[str, ...]) -> None:  # type: ignore[no-untyped-def]
    told = sparring(*words)
    assert told.code == 2 and told.err and not told.out and "data were read" not in told.err
    assert sorted(path.name for path in work.iterdir()) == ["file", "m.safetensors"]


ATTACK = "[[attacks]]\nname = 'pgd'\n"
PLANS = {
    "needs a budget": ATTACK,
    "eps = [0.03]": ATTACK + "eps = []",
    "images must lie": ATTACK + "eps = [0.1]\nimages = 0",
    "steps must lie": ATTACK + "eps = [0.1]\nsteps = 0",
    "share must lie": "[[attacks]]\nname = 'square'\neps = [0.1]\noptions = {share = 7}",
    "should be a valid list": "sparsities = 0.5",
    "plans nothing; set a key beside name, title, mark": "# nothing yet\nname = 'mine'",
    "stepps": ATTACK + "eps = [0.1]\nstepps = 10",
    "'queries'": ATTACK + "eps = [0.1]\nqueries = 10",
    "a finite number": ATTACK + "eps = [nan]",
    "divide eps by 255": ATTACK + "eps = [8]",
    "attacks.methods is empty": ATTACK + "eps = [0.1]\nmethods = []",
    "Did you mean 'control'": ATTACK + "eps = [0.1]\nmethods = ['contrl']",
    "attacks.sparsities is empty": ATTACK + "eps = [0.1]\nsparsities = []",
    "attacks.seeds": ATTACK + "eps = [0.1]\nseeds = 0",
    "sparsities is empty": "sparsities = []",
    "norm 'l3'": ATTACK + "eps = [0.1]\nnorm = 'l3'",
    "plain accuracy": "[[certify]]\neps = [0]",
    "certify.images": "[[certify]]\nimages = -1",
    "lipschitz.radius": "[[lipschitz]]\nradius = 0",
    "exact.seconds": "[[exact]]\nseconds = 0",
    "activation.levels is empty": "[[activation]]\nkind = 'l1-penalty'\nlevels = []",
    "training.steps": "[training]\nloss = 'pgd-at'\nsteps = 0",
    "pgd-at needs an eps above 0": "[training]\nloss = 'pgd-at'\neps = 0",
    "eps must be": "[training]\nloss = 'pgd-at'\neps = -0.1",
    "controls.decays": "[controls]\ndecays = [-1]",
    "did you mean 'recipe.epochs'": "epochs = 3",
    "key 'seeds' does not take true": "seeds = true",
    "key 'recipe.epochs' does not take true": "[recipe]\nepochs = true",
}


@pytest.mark.parametrize("message", PLANS)
def test_plans_are_refused_before_work(sparring, work: Path, message: str) -> None:  # type: ignore[no-untyped-def]
    (work / "plan.toml").write_text(PLANS[message])
    told = sparring("study", "plan.toml", "--out", "out")
    assert told.code == 2 and not told.out and not (work / "out").exists()
    assert message in told.err
