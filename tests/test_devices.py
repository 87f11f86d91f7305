"""Where models run and in which numbers."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from sparring.devices import Place, place_of, usable_device
from sparring.errors import UserError

from .study.pretend_gpu import PretendGPU


def test_what_is_asked_for_is_where_a_model_runs() -> None:
    place, x = place_of("cpu", "float64"), torch.rand(2, 3)
    model = place.model(nn.Linear(3, 2))
    assert model.weight.dtype == place.images(x).dtype == torch.float64
    assert place.facts(model) == {"device": "cpu", "dtype": "float64"}
    half = place_of("cpu", "bfloat16")
    assert half.model(nn.Linear(3, 2)).weight.dtype == torch.bfloat16
    assert half.images(x).dtype == torch.float32, "attacks work in single precision; the model's door casts"
    untouched = nn.Linear(3, 2)
    assert place_of("cpu").model(untouched) is untouched and untouched.weight.dtype == torch.float32


def test_mps_has_no_double_precision(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match="'weight' is in double precision, which MPS does not support"):
        Place("mps").model(nn.Linear(3, 2).double())
    monkeypatch.setattr("sparring.devices.usable_device", lambda name, **_: name)
    with pytest.raises(UserError, match="MPS does not support double precision"):
        place_of("mps", "float64")
    assert place_of("mps", "float16").dtype == torch.float16


def test_auto_takes_a_gpu_if_there_is_one(monkeypatch: pytest.MonkeyPatch) -> None:
    for there, name in ((True, "cuda"), (False, "cpu")):
        monkeypatch.setattr(torch.cuda, "is_available", lambda there=there: there)
        assert usable_device("auto") == name
    assert usable_device("cuda:7", here=False) == "cuda:7"
    with pytest.raises(UserError, match="do not run on devices of type 'meta'"):
        usable_device("meta")
    with pytest.raises(UserError, match="type of --dtype"):
        place_of("cpu", "int8")
    with pytest.raises(UserError, match="training in bfloat16 rounds small steps away"):
        place_of("cpu", "bfloat16", training=True)


def test_a_model_elsewhere_answers_images_here() -> None:
    model, x = nn.Linear(3, 2), torch.rand(4, 3)
    assert torch.equal(place_of("cpu").answers(model, x)(x), model(x))
    wide = place_of("cpu", "float64").answers(model, x)(x)
    assert wide.dtype == torch.float32 and torch.allclose(wide, model(x)) and model.weight.dtype == torch.float32
    torch.__future__.set_overwrite_module_params_on_conversion(True)
    try:
        with PretendGPU() as gpu:
            there = place_of("cuda:0").answers(model, x)(x)
    finally:
        torch.__future__.set_overwrite_module_params_on_conversion(False)
    assert gpu.moved and torch.allclose(there, model(x))
