"""What activations are rounded to, what that costs, and what is refused."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from sparring import deploy
from sparring.deploy._artefact import round_program
from sparring.deploy._compile import compile_model
from sparring.deploy._program import Program
from sparring.deploy.rounding._calibrate import calibrate
from sparring.deploy.rounding._reference import run_rounded
from sparring.errors import UserError


def program_of(model: nn.Module, shape: tuple[int, ...]) -> Program:
    return round_program(compile_model(model.eval(), shape), "int8")


def uniform(count: int, *shape: int, seed: int = 0) -> Tensor:
    return torch.rand(count, *shape, generator=torch.Generator().manual_seed(seed))


class Summed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.one, self.other = nn.Linear(4, 3), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.one(x).relu() + self.other(x)  # type: ignore[no-any-return]


def test_a_layer_of_whole_weights_on_whole_bytes_is_exact():
    layer = nn.Linear(20, 6, bias=False)
    generator = torch.Generator().manual_seed(0)
    whole = torch.randint(-127, 128, (6, 20), generator=generator).float()
    whole[:, 0] = 127  # so that the scale is 1
    layer.weight.data.copy_(whole)
    x = torch.randint(0, 256, (50, 20), generator=generator)
    found = run_rounded(calibrate(program_of(layer, (20,)), uniform(3, 20)), (x / 255).numpy())
    expected = (x.double() @ whole.double().T) / 255
    np.testing.assert_allclose(found, expected.numpy(), rtol=1e-6)


def test_the_reference_is_integer_arithmetic_spelled_out():
    torch.manual_seed(0)
    first, second = nn.Conv2d(3, 5, 3, stride=2, padding=1), nn.Conv2d(5, 4, 3, padding=1)
    model = nn.Sequential(first, nn.ReLU(), second, nn.MaxPool2d(2), nn.Flatten(), nn.Linear(16, 3))
    program, x = calibrate(program_of(model, (3, 8, 8)), uniform(20, 3, 8, 8)), uniform(7, 3, 8, 8, seed=1)
    layers = [step.op for step in program.steps if hasattr(step.op, "indptr")]
    scales = [program.rounding[value] for value in sorted(program.rounding)]
    values = torch.round(x / scales[0].scale).clamp(0, 255).double()
    assert len(layers) == len(scales) == 3 and scales[0].zero == scales[1].zero == 0
    for number, layer in enumerate(layers):
        weight = torch.from_numpy(layer.dense()).double()
        unit = weight.abs().amax((1, 2, 3)) / 127
        whole = torch.round(weight / unit.view(-1, 1, 1, 1))
        assert whole.abs().max() == 127
        bias = torch.round(torch.from_numpy(layer.bias).double() / (unit * scales[number].scale))
        centred = values - scales[number].zero
        if number == 2:
            logits = (functional.linear(centred.flatten(1), whole.flatten(1), bias)) * unit * scales[number].scale
            break
        sums = functional.conv2d(centred, whole, bias, layer.stride, layer.padding)
        sums = functional.max_pool2d(sums, 2) if number == 1 else sums.clamp(min=0)
        factor = (unit * scales[number].scale / scales[number + 1].scale).float().view(-1, 1, 1)
        values = (torch.round(sums.float() * factor) + scales[number + 1].zero).clamp(0, 255).double()
    np.testing.assert_allclose(run_rounded(program, x.numpy()), logits.numpy(), rtol=1e-6)


def test_scales_cover_what_was_seen(sparse_model):
    model, x = sparse_model("resnet-32", 0.2, width=0.125), uniform(30, 3, 32, 32)
    program = program_of(model, (3, 32, 32))
    rounded = calibrate(program, x)
    values = deploy.Equivalent(program).values(x)
    for value, told in rounded.rounding.items():
        low, high = (float(v) for v in torch.aminmax(values[value]))
        if value > 1:  # what the image becomes covers all of [0, 1]
            assert told.scale * 255 == pytest.approx(max(high, 0) - min(low, 0), rel=1e-5)
        assert told.scale * (0.501 + 255 - told.zero) >= high and -told.scale * (0.501 + told.zero) <= low
    assert any(told.zero == 0 for told in rounded.rounding.values())  # after a ReLU


@pytest.mark.parametrize(("name", "width"), [("lenet-5", None), ("vgg-like", 0.125)])
def test_rounded_logits_are_near_those_of_floats(sparse_model, name, width):
    model, shape = sparse_model(name, 0.2, width=width), (1, 28, 28) if name == "lenet-5" else (3, 32, 32)
    rounded = deploy.pack(model, shape=shape, values="int8", calibrate=uniform(64, *shape, seed=1))
    x = uniform(40, *shape)
    error = (rounded(x) - model(x).detach()).abs().max() / model(x).abs().max()
    assert 0 < error < 0.05


def test_what_cannot_be_rounded_is_refused_in_one_sentence():
    whole = nn.Sequential(nn.Flatten(), nn.Linear(16, 3))
    for images in (uniform(2, 1, 4, 5), uniform(0, 1, 4, 4)):
        with pytest.raises(UserError, match="calibration takes images"):
            calibrate(program_of(whole, (1, 4, 4)), images)
    two = nn.Sequential(*whole, nn.ReLU(), nn.Linear(3, 3))
    with pytest.raises(UserError, match="NaN or infinite"):
        calibrate(program_of(two, (1, 4, 4)), torch.full((2, 1, 4, 4), torch.nan))
    gelu = nn.Sequential(nn.GELU(), nn.Flatten())
    with pytest.raises(UserError, match="no layer with int8 kernels"):
        calibrate(program_of(gelu, (1, 4, 4)), uniform(2, 1, 4, 4))
    with pytest.raises(UserError, match="logits are a sum"):
        calibrate(program_of(Summed(), (4,)), uniform(2, 4))
    biased = nn.Linear(4, 2)
    biased.weight.data.mul_(1e-12)
    with pytest.raises(UserError, match="too large for its weights"):
        calibrate(program_of(biased, (4,)), uniform(2, 4))
