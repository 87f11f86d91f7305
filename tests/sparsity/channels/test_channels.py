"""Removing channels shrinks a network and leaves the masked network's logits, through residual connections too."""

from __future__ import annotations

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from sparring.errors import Unsupported, UserError
from sparring.metrics import size
from sparring.models import build
from sparring.sparsity import (
    STRUCTURES,
    Channels,
    Masks,
    Rule,
    all_ones,
    apply_,
    magnitude,
    prunable,
    remove_channels,
    select,
    silent,
    tied_channels,
)

from ...deploy.test_mixed import Mixer
from ...zoo import ZOO

SHAPE = (3, 16, 16)


def network(name: str, seed: int = 0) -> nn.Module:
    options: dict[str, dict[str, object]] = {
        "resnet-32": {"depth": 14, "width": 0.5},
        "vgg-like": {"width": 0.05},
        "lenet-5": {"width": 0.4},
        "lenet-300-100": {"width": 0.1},
    }
    model = build(name, shape=SHAPE, classes=5, mean=(0.5,) * 3, std=(0.25,) * 3, seed=seed, **options[name])  # type: ignore[arg-type]
    torch.manual_seed(seed)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):  # as after training
            for value in (module.weight, module.bias, module.running_mean, module.running_var):
                assert isinstance(value, Tensor)
                nn.init.uniform_(value, 0.2, 1.5)
    return model.eval()


@pytest.mark.parametrize("name", ["resnet-32", "vgg-like", "lenet-5", "lenet-300-100"])
@settings(max_examples=4, deadline=None)
@given(sparsity=st.floats(0.1, 0.9), scope=st.sampled_from(["global", "layer"]), seed=st.integers(0, 99))
@pytest.mark.filterwarnings("ignore::sparring.sparsity.CollapsedLayerWarning")
def test_logits_are_those_of_the_masked_network(name: str, sparsity: float, scope: str, seed: int) -> None:
    model = network(name, seed)
    x = torch.rand(4, *SHAPE)
    rule = Rule(scope=scope, structure=STRUCTURES["channels"])
    masks = rule.masks(model, magnitude(model), sparsity, masks=all_ones(model), batch=(x, torch.zeros(4)))
    smaller = remove_channels(model, masks, SHAPE)
    apply_(model, masks)
    with torch.no_grad():
        assert torch.allclose(smaller(x), model(x), atol=1e-5, rtol=1e-5)
    assert sum(p.numel() for p in smaller.parameters()) < sum(p.numel() for p in model.parameters())
    assert size(smaller).nonzero_weights <= size(model).nonzero_weights


def test_residual_channels_are_tied_and_classes_fixed() -> None:
    model = network("resnet-32")
    structure, fixed = tied_channels(model, SHAPE)
    assert fixed == (list(prunable(model))[-1],)
    assert len(structure.tied) == 3  # one residual stream per stage
    masks = all_ones(model)
    (stream, *_) = structure.tied
    masks[stream[0]][0] = False
    # One layer alone is silent in a channel that others still write: nothing can go.
    assert all(bool(mask.all()) for name, mask in silent(model, masks, SHAPE).items() if name not in masks)
    for name in stream:
        masks[name][0] = False
    smaller = remove_channels(model, masks, SHAPE)
    assert all(len(smaller.get_parameter(name)) == len(model.get_parameter(name)) - 1 for name in stream)


def test_a_smaller_network_can_be_trained_on() -> None:
    model = network("lenet-5")
    masks = all_ones(model)
    masks["1.weight"][:3] = False
    smaller = remove_channels(model, masks, SHAPE)
    smaller(torch.rand(2, *SHAPE)).sum().backward()
    convolution = smaller.get_submodule("1")
    assert isinstance(convolution, nn.Conv2d)
    assert convolution.out_channels == 5
    assert all(p.grad is not None for p in smaller.parameters())
    assert len(model.get_parameter("1.weight")) == 8, "the original is left alone"


class Rigid(nn.Module):
    """A model whose forward pass has a size written into it."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Conv2d(3, 4, 3), nn.Linear(4 * 14 * 14, 5)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.last(self.first(x).relu().view(-1, 784))
        return result


def test_written_out_sizes_are_refused_with_the_reason() -> None:
    model = Rigid()
    masks = all_ones(model)
    masks["first.weight"][0] = False
    with pytest.raises(Unsupported, match="write no sizes"):
        remove_channels(model, masks, SHAPE)


def test_what_cannot_lose_channels_is_found() -> None:
    shared = nn.Conv2d(3, 3, 1)
    rigid = [shared, nn.ReLU(), shared, nn.Conv2d(3, 6, 3, groups=3)]
    free = [nn.Conv2d(6, 4, 1), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 196, 2)]
    _, fixed = tied_channels(nn.Sequential(*rigid, *free), SHAPE)
    assert set(fixed) == {"0.weight", "3.weight", "7.weight"}
    with pytest.raises(UserError, match="'0' and '2' share a weight, the last layer's"):
        tied_channels(nn.Sequential(*rigid, nn.Flatten(), nn.Linear(6 * 196, 2)), SHAPE)


@pytest.mark.parametrize("name", [*(n for n in ZOO if n not in ("attention", "recurrent", "swin")), "mixer"])
def test_every_habit_of_the_zoo_gets_smaller(name: str) -> None:
    torch.manual_seed(1)
    model, x = {**ZOO, "mixer": Mixer}[name](), torch.rand(16, 1, 8, 8)
    for _ in range(20):
        model(x)  # running statistics that let the image through
    for module in model.eval().modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.uniform_(module.bias, 0, 0.5)
    rule = Rule(scope="layer", structure=STRUCTURES["channels"])
    masks = rule.masks(model, magnitude(model), 0.5, masks=all_ones(model), batch=(x, torch.zeros(4)))
    smaller = remove_channels(model, masks, (1, 8, 8))
    assert same_logits(model, masks, smaller, x)
    assert count(smaller) < 0.8 * count(model)


def count(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


def same_logits(model: nn.Module, masks: Masks, smaller: nn.Module, x: Tensor) -> bool:
    masked = copy.deepcopy(model)
    apply_(masked, masks)
    with torch.no_grad():
        expected, found = masked(x), smaller(x)
    assert float(expected.std(0).mean()) > 1e-4 * float(expected.abs().max())  # they see the image
    return bool((expected - found).abs().max() <= 1e-5 * expected.abs().max())


def constant(activation: nn.Module, padding: int) -> nn.Module:
    """Return a network in which a silent channel is a constant, not zero, where the second convolution reads it."""
    first = [nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6, affine=False), activation]
    model = nn.Sequential(*first, nn.Conv2d(6, 4, 3, padding=padding, bias=False), nn.ReLU(), nn.Flatten())
    model.append(nn.Linear(4 * (12 + 2 * padding) ** 2, 5))
    nn.init.uniform_(model[1].running_mean, 0.2, 0.5)  # type: ignore[arg-type]
    return model.eval()


@pytest.mark.parametrize("activation", [nn.Hardsigmoid(), nn.LeakyReLU()])
def test_a_constant_that_is_left_goes_into_a_bias_or_stays(activation: nn.Module) -> None:
    torch.manual_seed(0)
    x, model = torch.rand(8, *SHAPE), constant(activation, 0)
    masks = all_ones(model)
    masks["0.weight"][::2] = False
    masks = silent(model, masks, SHAPE)
    smaller = remove_channels(model, masks, SHAPE)
    assert smaller.get_submodule("0").out_channels == 3 and smaller.get_parameter("3.bias").any()
    assert same_logits(model, masks, smaller, x)
    padded = constant(activation, 1)
    structure, fixed = tied_channels(padded, SHAPE)
    assert set(structure.coupled) == {"3.weight"} and "0.weight" in fixed
    with pytest.raises(Unsupported, match=r"'0' cannot be removed: .* '3' cannot absorb, because"):
        remove_channels(padded, masks, SHAPE)


class Parted(nn.Module):
    """Halves of channels that go their own ways, one through groups, and a gate for all of them at once."""

    def __init__(self, cut: int | None = None) -> None:
        super().__init__()
        self.cut = cut
        self.first, self.gate, self.last = nn.Conv2d(3, 16, 3), nn.Conv2d(8, 1, 1), nn.Linear(8, 5)
        self.grouped, self.project = nn.Conv2d(8, 16, 1, groups=4), nn.Conv2d(16, 8, 1)

    def forward(self, x: Tensor) -> Tensor:
        parts = self.first(x).relu()
        left, right = parts.chunk(2, 1) if self.cut is None else (parts[:, : self.cut], parts[:, self.cut :])
        right = self.project(self.grouped(right).relu()) * self.gate(left).sigmoid()
        result: Tensor = self.last((left + right).mean((2, 3)))
        return result


def test_groups_and_equal_parts_go_whole() -> None:
    torch.manual_seed(0)
    model, x = Parted().eval(), torch.rand(8, *SHAPE)
    structure, fixed = tied_channels(model, SHAPE)
    assert set(fixed) == {"gate.weight", "last.weight"}
    assert [len(units.unique()) for units in structure.coupled.values()] == [4, 4, 4]
    rule = Rule(structure=STRUCTURES["channels"], spare=["gate.weight", "last.weight"])
    masks = rule.masks(model, magnitude(model), 0.5, masks=all_ones(model), batch=(x, torch.zeros(8)))
    smaller = remove_channels(model, masks, SHAPE)
    grouped = smaller.get_submodule("grouped")
    assert (grouped.groups, grouped.in_channels, grouped.out_channels) == (2, 4, 8)
    assert same_logits(model, masks, smaller, x)
    spared = Rule(structure=STRUCTURES["channels"], spare=["first.weight", "gate.weight", "last.weight"])
    with pytest.raises(UserError, match="no layer can lose whole channels"):
        spared.masks(model, magnitude(model), 0.5, masks=all_ones(model), batch=(x, torch.zeros(8)))


def test_what_forward_cannot_do_without_stays() -> None:
    torch.manual_seed(0)
    with pytest.raises(UserError, match=r"'first': .*; write no sizes into"):
        tied_channels(Parted(cut=8), SHAPE)


def test_dead_weights_are_enough() -> None:
    torch.manual_seed(0)
    model = network("lenet-5")
    with torch.no_grad():
        model.get_parameter("3.weight")[:, ::2] = 0  # nobody reads every second channel of the first convolution
        model.get_parameter("6.weight")[5:] = 0  # and nobody writes some features, but for their bias
    smaller = remove_channels(model, {}, SHAPE)
    assert len(smaller.get_parameter("1.weight")) == 4 and len(smaller.get_parameter("6.weight")) == 5
    assert same_logits(model, {}, smaller, torch.rand(8, *SHAPE))


class Tied(nn.Module):
    """Two layers that share a weight."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.left, self.right, self.last = (
            nn.Linear(768, 8),
            nn.Linear(8, 8),
            nn.Linear(8, 8),
            nn.Linear(8, 3),
        )
        self.right.weight = self.left.weight

    def forward(self, x: Tensor) -> Tensor:
        x = self.left(self.first(x.flatten(1)).relu()).relu()
        return self.last(self.right(x).relu())


def test_nothing_to_lose_is_a_sentence() -> None:
    normed = nn.Sequential(
        nn.Flatten(), nn.utils.parametrizations.weight_norm(nn.Linear(768, 8)), nn.ReLU(), nn.Linear(8, 3)
    )
    for model in (Tied(), normed):
        with pytest.raises(UserError, match="no layer can lose whole channels: "):
            tied_channels(model, SHAPE)
        whole = all_ones(model)
        assert silent(model, whole, SHAPE) == whole
        remove_channels(model, whole, SHAPE)
        with pytest.raises(UserError, match="nothing to prune"):
            select({}, 0.5, structure=Channels())
        batch = (torch.rand(2, *SHAPE), torch.zeros(2, dtype=torch.int64))
        with pytest.raises(UserError, match="no layer can lose whole channels"):
            Rule(structure=Channels()).masks(model, magnitude(model), 0.5, masks=whole, batch=batch)


def test_a_shared_pair_leaves_other_layers_free() -> None:
    class Ahead(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.before, self.tied = nn.Linear(768, 6), Tied()
            self.tied.first = nn.Linear(6, 8)

        def forward(self, x: Tensor) -> Tensor:
            result: Tensor = self.tied(self.before(x.flatten(1)).relu())
            return result

    model = Ahead()
    _, fixed = tied_channels(model, SHAPE)
    assert "before.weight" not in fixed and "tied.first.weight" in fixed
    masks = all_ones(model)
    masks["before.weight"][2:4] = False
    smaller = remove_channels(model, masks, SHAPE)
    assert len(smaller.get_parameter("before.weight")) == 4
