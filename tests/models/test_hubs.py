"""Networks of other libraries: their own normalisation, their own weights, nothing downloaded."""

from __future__ import annotations

import importlib.util
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from sparring.data import Geometry
from sparring.errors import UnknownNameError, UserError
from sparring.files import save_tensors
from sparring.models import (
    Blueprint,
    HubModel,
    build_from_hub,
    describe,
    is_hub_name,
    load_hub_weights_,
    load_model,
    save_model,
)
from sparring.models._hubs import HUBS, _Hub

PACKAGES = {"timm": "timm:resnet18", "torchvision": "torchvision:resnet18", "transformers": "hf:folder"}


def _skip_without(package: str) -> None:
    if importlib.util.find_spec(package) is None:
        pytest.skip(f"{package} is not installed")


def test_which_names_are_a_librarys() -> None:
    assert all(is_hub_name(name) for name in PACKAGES.values())
    assert not any(is_hub_name(name) for name in ("timm", "mine:net", "lenet-5", "timmy:resnet18"))


@pytest.mark.parametrize("package", PACKAGES)
def test_a_missing_package_says_what_to_install(package: str) -> None:
    if importlib.util.find_spec(package) is not None:
        pytest.skip(f"{package} is installed")
    with pytest.raises(UserError, match=rf"needs the package {package}, .* pip install 'sparring\[\w+\]'"):
        describe(PACKAGES[package])


@pytest.mark.parametrize("name", ["timm:resnet18", "torchvision:resnet18"])
def test_it_is_normalised_by_its_own_configuration(name: str, tmp_path: Path) -> None:
    _skip_without(name.partition(":")[0])
    facts = describe(name)
    assert facts.classes == 1000 and facts.size == (224, 224)
    model = build_from_hub(name, shape=(3, 64, 64), classes=10).eval()
    x = torch.rand(2, 3, 64, 64)
    mean, std = (torch.tensor(moments).view(3, 1, 1) for moments in (facts.mean, facts.std))
    torch.testing.assert_close(model(x), model.get_submodule("1")((x - mean) / std))
    with pytest.raises(UserError, match="trained for 1000 classes"):
        load_hub_weights_(model, name, classes=10)
    file = save_model(tmp_path / "m.safetensors", model, Blueprint(name, (3, 64, 64), 10, (0.0,) * 3, (1.0,) * 3))
    torch.testing.assert_close(load_model(file)[0](x), model(x))


@pytest.mark.parametrize("own", ["resnet18", "vit_tiny_patch16_224", "efficientnet_b3"])
def test_images_are_prepared_as_timm_does(own: str) -> None:
    _skip_without("timm")
    facts = describe(f"timm:{own}")
    timm = importlib.import_module("timm")
    settings = timm.data.resolve_data_config({}, pretrained_cfg=timm.get_pretrained_cfg(own).to_dict())
    theirs = timm.data.create_transform(**settings, normalize=False)
    draw = np.random.default_rng(0)
    for height, width in ((300, 401), (401, 300), (200, 190)):
        original = Image.fromarray(draw.integers(0, 255, (height, width, 3), dtype=np.uint8))
        mine = np.asarray(Geometry(facts.resize, facts.size, facts.interpolation)(original))
        assert np.array_equal(mine.transpose(2, 0, 1), np.asarray(theirs(original)))
    assert len(facts.labels) == len(facts.ids) == facts.classes


def test_a_name_that_timm_lacks_is_answered_with_near_ones() -> None:
    _skip_without("timm")
    with pytest.raises(UnknownNameError, match="resnet18"):
        describe("timm:resnet1888")


def test_a_folder_of_hugging_face(tmp_path: Path) -> None:
    _skip_without("transformers")
    with pytest.raises(UserError, match="holds no config"):
        describe(f"hf:{tmp_path}")  # imports what it can
    transformers = importlib.import_module("transformers")
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    config = transformers.ViTConfig(**sizes, image_size=16, patch_size=8, num_labels=4)
    original = transformers.ViTForImageClassification(config).eval()
    original.save_pretrained(tmp_path / "vit")
    name = f"hf:{tmp_path / 'vit'}"
    model = build_from_hub(name, shape=(3, 16, 16), classes=4).eval()
    load_hub_weights_(model, name, classes=4)
    x, facts = torch.rand(2, 3, 16, 16), describe(name)
    mean, std = (torch.tensor(moments).view(3, 1, 1) for moments in (facts.mean, facts.std))
    torch.testing.assert_close(model(x).logits, original(pixel_values=(x - mean) / std).logits)
    file = tmp_path / "vit" / "model.safetensors"
    save_tensors(file, {key: value for key, value in original.state_dict().items() if "classifier" not in key})
    with pytest.raises(UserError, match=r"lack 'classifier\.bias'"):  # else it is drawn at random
        load_hub_weights_(model, name, classes=4)


def _in_the_hubs_cache(home: Path, name: str) -> Path:
    """Make a snapshot as huggingface_hub lays it out, and return its folder."""
    base = home / "hub" / f"models--{name.replace('/', '--')}"
    (snapshot := base / "snapshots" / "abc").mkdir(parents=True)
    (base / "refs").mkdir()
    (base / "refs" / "main").write_text("abc")
    return snapshot


def _same(name: str, original: nn.Module, side: int) -> None:
    """Assert that a library's network is given the weights of `original`, behind its normalisation."""
    facts = describe(name)
    model = build_from_hub(name, shape=(3, side, side), classes=facts.classes).eval()
    load_hub_weights_(model, name, classes=facts.classes)
    mean, std = (torch.tensor(moments).view(3, 1, 1) for moments in (facts.mean, facts.std))
    x = torch.rand(2, 3, side, side)
    torch.testing.assert_close(model(x), original.eval()((x - mean) / std))


@pytest.mark.parametrize("kind", ["model.safetensors", "pytorch_model.bin", "torch"])
def test_timms_weights_are_found_in_its_caches(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _skip_without("timm")
    name = "timm:mobilenetv3_small_050"
    describe(name)  # imports what it can
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr("torch.hub.get_dir", lambda: str(tmp_path))
    with pytest.raises(UserError, match="use --download"):
        _same(name, nn.Identity(), 64)
    timm = importlib.import_module("timm")
    original, cfg = timm.create_model("mobilenetv3_small_050"), timm.get_pretrained_cfg("mobilenetv3_small_050")
    place = _in_the_hubs_cache(tmp_path, cfg.hf_hub_id) / kind
    if kind == "torch":
        place = tmp_path / "checkpoints" / cfg.url.rpartition("/")[2]
        place.parent.mkdir()
    save = save_tensors if kind == "model.safetensors" else lambda file, state: torch.save(state, file)
    save(place, original.state_dict())
    _same(name, original, 64)


@pytest.mark.parametrize("own", ["shufflenet_v2_x0_5", "densenet121", "googlenet"])
def test_torchvisions_weights_are_found_in_torchs_cache(
    own: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _skip_without("torchvision")
    describe(f"torchvision:{own}")  # imports what it can
    monkeypatch.setattr("torch.hub.get_dir", lambda: str(tmp_path))
    models = importlib.import_module("torchvision.models")
    heads = {"aux_logits": True, "init_weights": False, "transform_input": True} if own == "googlenet" else {}
    original = models.get_model(own, weights=None, **heads)
    (tmp_path / "checkpoints").mkdir()
    url = models.get_model_weights(own).DEFAULT.url
    state = original.state_dict()
    if own == "densenet121":  # as its file has it
        state = {re.sub(r"\.(norm|conv)(\d)\.", r".\1.\2.", key) if "layer" in key else key: value
                 for key, value in state.items() if "num_batches" not in key}  # fmt: skip
    torch.save(state, tmp_path / "checkpoints" / url.rpartition("/")[2])
    _same(f"torchvision:{own}", original, 64)


def test_a_model_of_hugging_face_by_its_name_in_the_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _skip_without("transformers")
    with pytest.raises(UserError, match="nor a model in Hugging Face's cache"):
        describe("hf:nobody/none")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    transformers = importlib.import_module("transformers")
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    config = transformers.ViTConfig(**sizes, image_size=16, patch_size=8, num_labels=4)
    original = transformers.ViTForImageClassification(config).eval()
    original.save_pretrained(_in_the_hubs_cache(tmp_path, "some/vit"))
    model = build_from_hub("hf:some/vit", shape=(3, 16, 16), classes=4)
    load_hub_weights_(model, "hf:some/vit", classes=4)
    found = model.get_submodule("1").state_dict()
    assert all(torch.equal(value, found[key]) for key, value in original.state_dict().items())


def test_what_a_package_raises_and_moments_that_are_none_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    facts = HubModel((0.5,) * 3, (0.2,) * 3, (8, 8), 8, "bilinear", (), 10)

    def fail(*_: object) -> nn.Module:
        raise AssertionError("Input shape indivisible by patch size!")

    def hub(described: HubModel) -> None:
        monkeypatch.setitem(HUBS, "timm", _Hub("json", lambda _: described, fail, fail))  # type: ignore[arg-type]

    hub(facts)
    with pytest.raises(UserError, match=r"timm:vit for images .* indivisible by patch size"):
        build_from_hub("timm:vit", shape=(3, 30, 20), classes=10)
    with pytest.raises(UserError, match="weights of timm:vit cannot be loaded"):
        load_hub_weights_(nn.Identity(), "timm:vit", classes=10)
    hub(replace(facts, std=(0.0,) * 3))
    with pytest.raises(UserError, match=r"std \(0\.0, 0\.0, 0\.0\); fix its configuration"):
        describe("timm:vit")
