"""A trained network meets a folder of photographs: a test split, many sizes, some of its classes."""

from __future__ import annotations

import io
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from sparring import deploy
from sparring.cli import _sources
from sparring.cli._app import DataSource, ModelSource
from sparring.data import Geometry
from sparring.errors import UserError
from sparring.models import HubModel

CODE = """
import torch
from torch import nn
from sparring.models import Normalise

def net():
    torch.manual_seed(0)
    return nn.Sequential(Normalise((0.5,) * 3, (0.5,) * 3), nn.AdaptiveAvgPool2d(4), nn.Flatten(), nn.Linear(48, 7))

def needy(mean, std):
    return nn.Sequential(Normalise(mean, std), nn.AdaptiveAvgPool2d(4), nn.Flatten(), nn.Linear(48, 7))
"""
PREPARED = ("--resize", 20, "--crop", 16)


@pytest.fixture
def photos(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "photographed.py").write_text(CODE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    draw = np.random.default_rng(0)
    for label in ("n00000003", "n00000005"):
        for n in range(3):
            height, width = draw.integers(24, 60, 2)
            file = io.BytesIO()
            Image.fromarray(draw.integers(0, 255, (height, width, 3), dtype=np.uint8)).save(file, "JPEG")
            path = tmp_path / "photos" / "test" / label / f"{n}.jpg"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(file.getvalue())
    index = {str(at): [f"n{at:08}", f"name {at}"] for at in range(7)}
    (tmp_path / "index.json").write_text(json.dumps(index))
    return tmp_path / "photos"


def test_every_command_on_a_trained_network_takes_a_test_split(photos: Path, sparring) -> None:  # type: ignore[no-untyped-def]
    given = ("--data", photos, "--classes", photos.parent / "index.json", *PREPARED)
    net = "photographed:net"
    attacked = sparring("attack", net, *given, "--images", 4, "--attacks", "fgsm", "--checks", 0, "--json")
    assert attacked.code == 0 and json.loads(attacked.out)["images"] == 4
    assert "of the 7 classes of" in attacked.err and "2 by WordNet id" in attacked.err
    assert "the shorter side is resized to 20 (bilinear), cropped to the central 16×16" in attacked.err
    assert sparring("certify", net, *given, "--images", 2, "--method", "interval").code == 0
    words = ("prune", net, "--sparsity", 0.5, "--out", "pruned.safetensors", *given)
    assert sparring(*words).code == 2  # which trains
    pruned = sparring(*words, "--set", "epochs=0")
    assert pruned.code == 0 and "test accuracy" in pruned.out and "validation" not in pruned.out
    assert "no training images: scores that depend on images are computed on test images" in pruned.err
    assert sparring("compare", net, f"{net}@pruned.safetensors", *given, "--images", 4, "--eps", 0.01).code == 0
    assert sparring("export", net, "net.sparring", *given, "--images", 4).code == 0
    assert len(deploy.load("net.sparring").program.provenance["files_hash"]) == 64
    assert sparring("bench", net, *given, "--rounds", 1, "--batches", 1).code == 0


def test_a_study_that_trains_nothing_needs_no_training_images(photos: Path, sparring) -> None:  # type: ignore[no-untyped-def]
    given = ("--classes", photos.parent / "index.json", *PREPARED)
    begun = ("prune", "photographed:net", "--data", photos, *given, "--set", "epochs=0")
    assert sparring(*begun, "--sparsity", 0.1, "--out", "trained.safetensors").code == 0
    fgsm = '[[attacks]]\nname = "fgsm"\neps = [0.01]\n'
    plan = f'data = "{photos}"\nsparsities = [0.5]\nseeds = 1\n[[pruning]]\nmethod = "one-shot"\nscore = "snip"\n{fgsm}'
    Path("plan.toml").write_text(plan)
    words = ("study", "plan.toml", "--model", "photographed:net", *given, "--out", "out", "--workers", 0, "--quiet")
    refused = sparring(*words, "--weights", "trained.safetensors")
    assert refused.code == 2 and "finetune.epochs = 0" in refused.err
    done = sparring(*words, "--weights", "trained.safetensors", "--set", "finetune.epochs=0")
    assert done.code == 0 and Path("out/report.html").exists()
    about = json.loads(Path("out/plan.json").read_text())["dataset"]
    assert (about["train"], about["valid"], about["test"]) == (0, 2, 4)
    assert sparring("report", "out").code == 0


@pytest.mark.filterwarnings("ignore::sparring.errors.DataWarning")  # which names three
def test_every_file_that_is_not_read_is_named(photos: Path, sparring) -> None:  # type: ignore[no-untyped-def]
    odd = [f"odd{number}.txt" for number in range(5)]
    for name in odd:
        (next(photos.glob("test/*")) / name).write_text("x")
    given = ("--data", photos, "--classes", photos.parent / "index.json", *PREPARED, "--attacks", "fgsm", "--images", 2)
    said = [sparring("attack", "photographed:net", *given, *more).err for more in ((), ("--verbose",))]
    assert [sum(name in one for name in odd) for one in said] == [0, 5]


def test_what_cannot_be_said_of_a_test_split_is_refused(photos: Path, sparring) -> None:  # type: ignore[no-untyped-def]
    given = ("--data", photos, "--classes", photos.parent / "index.json", *PREPARED)
    for words in (
        ("train", "photographed:net", "--out", "w.safetensors"),
        ("study", "quick", "--set", f'data="{photos}"'),
    ):
        refused = sparring(*words, *(given if words[0] == "train" else ()))
        assert refused.code == 2 and "no images in train/<class>/" in refused.err
    refused = sparring("attack", "photographed:needy", *given)
    assert refused.code == 2 and "give --mean and --std" in refused.err
    moments = ("--mean", "0.5,0.5,0.5", "--std", "0.5,0.5,0.5")
    assert sparring("attack", "photographed:needy", *given, *moments, "--attacks", "fgsm", "--images", 2).code == 0
    refused = sparring("attack", "photographed:net", "--data", photos, *PREPARED)
    assert refused.code == 2 and "--classes FILE names them all" in refused.err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--resize", "0"), "--resize takes pixels from 1 to 4096"),
        (("--crop", "4x4x4"), "--crop takes pixels"),
        (("--interpolation", "cubic"), "bicubic"),
        (("--interpolation", "box"), "needs --resize"),
        (("--classes", "nowhere.txt"), "nowhere.txt"),
        (("--data", "digits", "--crop", "4"), "images can be resized"),
    ],
)
def test_options_that_cannot_be_are_refused(photos: Path, words: tuple[str, ...], message: str, sparring) -> None:  # type: ignore[no-untyped-def]
    refused = sparring("attack", "photographed:net", "--data", photos, *words)
    assert refused.code == 2 and message in refused.err


TINY = HubModel((0.5,) * 3, (0.5,) * 3, (16, 16), 20, "bicubic", ("a", "b"), 2, ("n00000003", "n00000005"))
DESCRIBED = {
    "timm:tiny": TINY,
    "timm:other": HubModel((0.5,) * 3, (0.5,) * 3, (24, 24), (24, 24), "bilinear", (), 2),
    "timm:strange": HubModel((0.5,) * 3, (0.5,) * 3, (24, 24), None, "bilinear", (), 2),
}


def test_a_librarys_network_brings_its_configuration(
    photos: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(_sources, "describe", DESCRIBED.__getitem__)
    source, tiny, other = DataSource(str(photos)), ModelSource("timm:tiny"), ModelSource("timm:other")
    asked = _sources.request_for([tiny], source, images=4)
    assert (asked.parts, asked.images, asked.channels) == ("test", 4, 3)
    assert asked.geometry == Geometry(20, (16, 16), "bicubic") and asked.geometry.source == "'timm:tiny'"
    found = _sources.open_data(source, asked)
    assert (found.test.x.shape[1:], found.classes, sorted(set(found.test.y.tolist()))) == ((3, 16, 16), 2, [0, 1])
    assert "20 (bicubic), cropped to the central 16×16, as 'timm:tiny' has it" in capsys.readouterr().err
    assert _sources.request_for([ModelSource("timm:tiny", Path("own.safetensors"))], source).geometry is None
    assert _sources.request_for([tiny], DataSource("digits")).geometry is None
    with pytest.raises(UserError, match="'timm:tiny' and 'timm:other' prepare images differently"):
        _sources.request_for([tiny, other], source)
    said = DataSource(str(photos), resize="18x20", crop="12", interpolation="box")
    assert _sources.request_for([tiny, other], said).geometry == Geometry((18, 20), (12, 12), "box")
    assert _sources.request_for([other], source).classes is None
    assert "'timm:other' does not name its classes" in capsys.readouterr().err
    with pytest.raises(UserError, match="does not say how it prepares images; give --resize and --crop"):
        _sources.request_for([ModelSource("timm:strange")], source)
