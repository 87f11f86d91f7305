"""Weights as other tools write them: loaded as they are, or refused in a sentence with the way out."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from sparring.errors import UserError
from sparring.models import load_weights_


def net() -> nn.Sequential:
    return nn.Sequential(nn.Flatten(), nn.Linear(12, 8), nn.BatchNorm1d(8), nn.Linear(8, 4))


def renamed(prefix: str) -> dict[str, Tensor]:
    return {prefix + name: value for name, value in net().state_dict().items()}


def with_first(value: Tensor, name: str = "1.weight") -> dict[str, Tensor]:
    return {**net().state_dict(), name: value}


WEIGHT = torch.randn(8, 12, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        (renamed("a") | {"b": WEIGHT}, "belong together"),
        ({}, "belong together"),
        (with_first((WEIGHT * 100).to(torch.int8)), "quantised"),
        (with_first(WEIGHT.to(torch.float8_e4m3fn)), "quantised"),
        (with_first(WEIGHT > 0), "quantised"),
        (with_first(torch.complex(WEIGHT, WEIGHT)), "quantised"),
        (with_first(torch.tensor(3.5), "2.num_batches_tracked"), "2.num_batches_tracked"),
        (with_first(WEIGHT.double() / 3), "would round"),
        (with_first(WEIGHT.double() * 1e300), "would round"),
    ],
)
def test_other_numbers_than_the_models_are_refused(tensors: dict[str, Tensor], message: str) -> None:
    model = net()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(UserError, match=message):
        load_weights_(model, tensors)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_numbers_that_fit_are_loaded_exactly(dtype: torch.dtype) -> None:
    weight = WEIGHT.to(torch.bfloat16 if dtype == torch.bfloat16 else torch.float16)
    model = net()
    load_weights_(model, with_first(weight.to(dtype)))
    assert torch.equal(model.get_parameter("1.weight").data, weight.float())
