"""The optimiser moves parameters as torch's own classes do, to the last bit, without importing torch's compiler."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from torch import nn

from sparring.train import Recipe
from sparring.train._recipe import Optimizer

RECIPES = {
    "sgd": Recipe(momentum=0.9, weight_decay=1e-3),
    "plain": Recipe(momentum=0.0, weight_decay=0.0),
    "adam": Recipe(optimizer="adam", weight_decay=1e-3),
    "adamw": Recipe(optimizer="adamw", weight_decay=0.05),
}


def parameters(generator: torch.Generator) -> list[nn.Parameter]:
    return [nn.Parameter(torch.randn(shape, generator=generator)) for shape in ((17, 5), (17,), (1, 17))]


@pytest.mark.parametrize("name", RECIPES)
def test_parameters_are_those_of_torch_to_the_bit(name: str) -> None:
    recipe = RECIPES[name]
    ours, theirs = (parameters(torch.Generator().manual_seed(0)) for _ in range(2))
    still = ours[2].clone()
    optimizer = Optimizer(recipe, ours)
    reference: torch.optim.Optimizer
    if recipe.optimizer == "adam":
        reference = torch.optim.Adam(theirs, weight_decay=recipe.weight_decay, fused=True)
    elif recipe.optimizer == "adamw":
        reference = torch.optim.AdamW(theirs, weight_decay=recipe.weight_decay, fused=True)
    else:
        reference = torch.optim.SGD(theirs, momentum=recipe.momentum, weight_decay=recipe.weight_decay, fused=True)
    generator = torch.Generator().manual_seed(1)
    for lr in (0.1, 0.05, 0.2, 0.01):
        for a, b in zip(ours[:2], theirs[:2], strict=True):  # the third has no gradient
            a.grad = torch.randn(a.shape, generator=generator)
            b.grad = a.grad.clone()
        reference.param_groups[0]["lr"] = lr
        optimizer.step(lr)
        reference.step()
        assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))
    assert torch.equal(ours[2], still)
    for a, b in zip(ours, theirs, strict=True):
        state = {k: v for k, v in reference.state[b].items() if isinstance(v, torch.Tensor)}
        assert optimizer.state.get(a, {}).keys() == state.keys()
        assert all(torch.equal(optimizer.state[a][k], v) for k, v in state.items())


def test_training_does_not_import_the_compiler() -> None:
    program = """
import sys, torch
from sparring.train import Recipe, fit
model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(4, 2))
x, y = torch.zeros(8, 1, 2, 2, dtype=torch.uint8), torch.zeros(8, dtype=torch.int64)
for name in ("sgd", "adam", "adamw"):
    fit(model, x, y, Recipe(optimizer=name, epochs=1))
sys.exit("torch._dynamo" in sys.modules)
"""
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0
