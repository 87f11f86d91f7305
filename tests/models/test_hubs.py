"""Networks of other libraries: their own normalisation, their own weights, nothing downloaded."""

from __future__ import annotations

import importlib.util
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


def test_what_a_package_raises_and_moments_that_are_none_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    facts = HubModel((0.5,) * 3, (0.2,) * 3, (8, 8), 8, "bilinear", (), 10)

    def fail(*_: object) -> nn.Module:
        raise AssertionError("Input shape indivisible by patch size!")

    def hub(described: HubModel) -> None:
        monkeypatch.setitem(HUBS, "timm", _Hub("json", lambda _: described, fail, fail))  # type: ignore[arg-type]

    hub(facts)
    with pytest.raises(UserError, match=r"timm:vit for images .* indivisible by patch size"):
        build_from_hub("timm:vit", shape=(3, 30, 20), classes=10)
    with pytest.raises(UserError, match="weights of timm:vit cannot be had"):
        load_hub_weights_(nn.Identity(), "timm:vit", classes=10)
    hub(replace(facts, std=(0.0,) * 3))
    with pytest.raises(UserError, match=r"std \(0\.0, 0\.0, 0\.0\); mend its files"):
        describe("timm:vit")
