"""A model is given back in the modes it came in: a frozen BatchNorm survives every public call."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from sparring import attacks, bounds, deploy, metrics, sparsity, train
from sparring.modes import eval_mode, train_
from sparring.threat import LINF, Threat

SHAPE = (2, 4, 4)
WITHIN = Threat(LINF, 0.1)


def _frozen() -> nn.Sequential:
    """Return a model in training mode whose first BatchNorm and last block are in evaluation mode."""
    torch.manual_seed(0)
    last = nn.Sequential(nn.Flatten(), nn.Dropout(0.2), nn.Linear(96, 3))
    model = nn.Sequential(
        nn.Conv2d(2, 6, 3, padding=1), nn.BatchNorm2d(6), nn.ReLU(), nn.Conv2d(6, 6, 3, padding=1), nn.BatchNorm2d(6),
        nn.ReLU(), last,
    )  # fmt: skip
    model[1].eval()
    last.eval()
    return model


def _state(model: nn.Module) -> tuple[list[bool], dict[str, Tensor]]:
    kept = {name: value.clone() for name, value in model.named_buffers()}
    return [module.training for module in model.modules()], kept


X = torch.rand(6, *SHAPE, generator=torch.Generator().manual_seed(1))
Y = torch.arange(6) % 3
IMAGES = (X * 255).to(torch.uint8)


def _masks(model: nn.Module) -> sparsity.Masks:
    return sparsity.select(sparsity.magnitude(model), 0.5)


def _shipped(model: nn.Module) -> object:
    packed = deploy.pack(model, shape=SHAPE)
    return deploy.ship_report(model, packed, X, Y, attacks.fgsm, Threat(LINF, 0.1), decisions=0)


CALLS: dict[str, Callable[[nn.Module, Path], object]] = {
    "macs": lambda m, _: metrics.macs(m, SHAPE),
    "size": lambda m, _: metrics.size(m),
    "predict": lambda m, _: train.predict(m, IMAGES),
    "adversarial": lambda m, _: train.adversarial(eps=0.1)(_still(m), X, Y, None),
    "trades": lambda m, _: train.trades(eps=0.1)(_still(m), X, Y, None),
    "activity": lambda m, _: sparsity.activity(m, X),
    "insert": lambda m, _: sparsity.insert(m, lambda: sparsity.ACTIVATIONS["percentile"](0.5)),
    "calibrate_": lambda m, _: sparsity.calibrate_(m, X),
    "tied_channels": lambda m, _: sparsity.tied_channels(m, SHAPE),
    "silent": lambda m, _: sparsity.silent(m, _masks(m), SHAPE),
    "remove_channels": lambda m, _: sparsity.remove_channels(m, _masks(m), SHAPE),
    "margin": lambda m, _: bounds.margin(m, X, Y, WITHIN),
    "radius": lambda m, _: bounds.radius(m, X, Y, LINF),
    "lipschitz": lambda m, _: bounds.lipschitz(m, X, 0.1, norm=LINF),
    "exact": lambda m, _: bounds.exact(m, X[:1], Y[:1], LINF, seconds=1.0),
    "export": lambda m, folder: deploy.export(m, folder / "net.sparring", shape=SHAPE),
    "to_onnx": lambda m, folder: deploy.onnx_error(deploy.to_onnx(m, folder / "net.onnx", shape=SHAPE), m, X),
    "bench": lambda m, _: deploy.bench(m, shape=SHAPE, batches=(1,), rounds=1, engines=["packed"]),
    "ship_report": lambda m, _: _shipped(m),
} | {
    f"run {name}": (lambda m, _, name=name: attacks.run(m, X, Y, attacks.ATTACKS[name], WITHIN))
    for name in ("fgsm", "pgd", "square")
} | {
    f"score {name}": (lambda m, _, name=name: sparsity.SCORES[name](m, (X, Y), generator=torch.Generator()))
    for name in sparsity.SCORES
}  # fmt: skip


def _still(model: nn.Module) -> nn.Module:
    """Keep running statistics out of it: a training loss is evaluated in the modes of training, and moves them."""
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = 0.0
            module.num_batches_tracked = None
    return model


@pytest.mark.parametrize("name", CALLS)
def test_every_call_gives_the_modes_and_the_buffers_back(name: str, tmp_path: Path) -> None:
    model: nn.Module = _frozen()
    if name == "calibrate_":
        model = sparsity.insert(model, lambda: sparsity.ACTIVATIONS["percentile"](0.5))
    modes, buffers = _state(model)
    CALLS[name](model, tmp_path)
    after = _state(model)
    assert after[0] == modes
    for key, value in after[1].items():
        assert name == "calibrate_" or torch.equal(value, buffers[key]), key


def test_modes_come_back_after_an_exception() -> None:
    model = _frozen()
    modes, _ = _state(model)
    with pytest.raises(RuntimeError), eval_mode(model):
        assert not any(module.training for module in model.modules())
        model(torch.rand(1, 5, 4, 4))
    assert _state(model)[0] == modes


def test_insertion_keeps_modes_of_modules_and_of_functions() -> None:
    class Functions(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm, self.linear = nn.BatchNorm2d(2), nn.Linear(32, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.linear(torch.relu(self.norm(x)).flatten(1))

    for model, path in ((_frozen(), "1"), (Functions(), "norm")):
        model.get_submodule(path).eval()
        made = sparsity.insert(model, lambda: sparsity.ACTIVATIONS["percentile"](0.5))
        assert made.training and not made.get_submodule(path).training
        with eval_mode(model):
            assert not any(m.training for m in sparsity.insert(model, nn.Tanh).modules())


def test_training_keeps_what_came_frozen_and_trains_a_whole_model_in_evaluation_mode() -> None:
    recipe = train.Recipe(epochs=2, batch_size=3)
    for whole in (False, True):
        model = _frozen().eval() if whole else _frozen()
        first, second = (model.get_buffer(f"{i}.running_mean").clone() for i in (1, 4))
        seen = []
        handle = model[1].register_forward_hook(lambda module, *_: seen.append(module.training))  # noqa: B023
        train.fit(model, IMAGES, Y, recipe, score=lambda m: metrics.accuracy(train.predict(m, IMAGES), Y))
        handle.remove()
        assert (True in seen) is whole and False in seen
        assert torch.equal(model.get_buffer("1.running_mean"), first) is not whole
        assert not torch.equal(model.get_buffer("4.running_mean"), second)
        assert not any(module.training for module in model.modules()), "it is left in evaluation mode"


def test_training_respects_a_model_that_freezes_by_its_own_train() -> None:
    class Own(nn.Sequential):
        def train(self, mode: bool = True) -> Own:
            super().train(mode)
            self[0].training = False
            return self

    model = Own(nn.BatchNorm2d(2), nn.Dropout())
    train_(model)
    assert [m.training for m in model.modules()] == [True, False, True]
