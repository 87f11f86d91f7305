"""Gradients that miss part of what the pixels do: seen, flagged and attacked all the same; never on honest models."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import pytest
import torch
from torch import Tensor, nn

from sparring.attacks import ATTACKS, robust_accuracy, run
from sparring.attacks._gradients import logits_and_gradient, logits_and_pull
from sparring.attacks.algorithms._losses import margin_loss
from sparring.attacks.evaluation._bpda import Differences, blind_pixels
from sparring.outputs import opened
from sparring.sparsity import TopK
from sparring.threat import L2, LINF, Threat

EPS = 0.06
PLACES = torch.arange(64).view(1, 8, 8)
PIXELS: dict[str, Tensor] = {
    "every other pixel": (PLACES + PLACES // 8) % 2 == 0,
    "the left half": PLACES % 8 < 4,
    "a block": (PLACES % 8 > 4) & (PLACES // 8 > 4),
    "a row": PLACES // 8 == 3,
    "a pixel": PLACES == 27,
    "nearly all": PLACES != 27,
}
Given = tuple[Tensor, ...]
BRANCHES: dict[str, Callable[[Tensor], Tensor]] = {
    "detached": lambda x: x.detach(),
    "numpy": lambda x: torch.from_numpy(x.detach().numpy().copy()),
    "a staircase": lambda x: (8 * x).round() / 8,
}


def network(kind: torch.dtype = torch.float32, seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 4)).to(kind).eval()


class Cut(nn.Module):
    """A network some pixels of which go through a branch without gradients."""

    pixels: Tensor

    def __init__(self, pixels: Tensor, branch: Callable[[Tensor], Tensor], kind: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.net, self.branch = network(kind), branch
        self.register_buffer("pixels", pixels)

    def forward(self, x: Tensor) -> Tensor:
        return self.net(torch.where(self.pixels, self.branch(x), x))


class Block(nn.Module):
    """A network one of whose two branches is cut within: every pixel's gradient is half of what it should be."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = network(), network(seed=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.first(x) + self.second(x).detach()


@pytest.fixture
def many() -> Tensor:
    return torch.rand(40, 1, 8, 8, generator=torch.Generator().manual_seed(1))


def seeded() -> torch.Generator:
    return torch.Generator().manual_seed(0)


@pytest.mark.parametrize(
    ("where", "branch"),
    # A staircase under few pixels is not told from inputs that hardly matter.
    [(w, b) for w in PIXELS for b in BRANCHES if b != "a staircase" or w not in ("a block", "a row", "a pixel")],
)
def test_the_pixels_that_gradients_miss_are_found(where: str, branch: str, many: Tensor) -> None:
    model = Cut(PIXELS[where], BRANCHES[branch])
    found = blind_pixels(model, many, model(many).argmax(1))
    assert found is not None and torch.equal(found, PIXELS[where])


def test_a_cut_is_found_where_it_does_little(many: Tensor) -> None:
    model = Cut(PIXELS["a block"], lambda x: 0.1 * x + 0.9 * x.detach())
    with torch.no_grad():
        cast(nn.Linear, model.net[1]).weight[:, PIXELS["a block"].flatten()] *= (
            0.3  # then 0.3% of the squared changes is missing
        )
    blind = blind_pixels(model, many, model(many).argmax(1))
    assert blind is not None and not bool(blind[~PIXELS["a block"]].any())


@pytest.mark.parametrize("kind", [torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("where", ["every other pixel", "the left half", "a block"])
def test_they_are_found_in_other_types(where: str, kind: torch.dtype, many: Tensor) -> None:
    model = opened(Cut(PIXELS[where], BRANCHES["detached"], kind), many)
    found = blind_pixels(model, many, model(many).argmax(1))
    assert found is not None and torch.equal(found, PIXELS[where])


def test_a_block_of_the_network_concerns_all_pixels(many: Tensor) -> None:
    model = Block()
    found = blind_pixels(model, many, model(many).argmax(1))
    assert found is not None and float(found.float().mean()) > 0.9


@pytest.mark.parametrize("kind", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("seed", range(8))
def test_honest_networks_have_no_such_pixels(kind: torch.dtype, seed: int, many: Tensor) -> None:
    torch.manual_seed(seed)
    flat = torch.where(many < 0.6, 0.0, many)  # maxima of flat parts are ties
    layers = [nn.Conv2d(1, 6, 3, padding=1), nn.BatchNorm2d(6), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten()]
    model = nn.Sequential(*layers, head := nn.Linear(96, 5))
    with torch.no_grad():
        head.weight.mul_(torch.rand(5, 96) < (0.05 if seed % 2 else 1))
        model.get_parameter("0.weight").mul_(3)
    model = model.to(kind).eval()
    for x in (many, flat):
        door = opened(model, x)
        assert blind_pixels(door, x, door(x).argmax(1)) is None


class Waves(nn.Module):
    def __init__(self, frequency: float) -> None:
        super().__init__()
        self.frequency = frequency

    def forward(self, x: Tensor) -> Tensor:
        return torch.sin(self.frequency * x)


@pytest.mark.parametrize("frequency", [300.0, 1000.0, 2000.0])
def test_a_rough_function_has_all_of_its_gradient(frequency: float, many: Tensor) -> None:
    torch.manual_seed(0)
    layers = [nn.Linear(64, 256), Waves(frequency), nn.Linear(256, 256), Waves(frequency / 50), nn.Linear(256, 10)]
    model = nn.Sequential(nn.Flatten(), *layers).eval().requires_grad_(False)
    assert blind_pixels(model, many, model(many).argmax(1)) is None


def test_passes_are_few(many: Tensor) -> None:
    class Counting(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net: nn.Module = Cut(PIXELS["a row"], BRANCHES["detached"])
            self.sizes = list[int]()

        def forward(self, x: Tensor) -> Tensor:
            self.sizes.append(len(x))
            return self.net(x)

    model = Counting()
    blind_pixels(model, many, model(many).argmax(1))
    assert sum(model.sizes[1:]) <= 64 * 8 and max(model.sizes[1:]) <= 64
    model.net, model.sizes = network(), []
    blind_pixels(model, many, model(many).argmax(1))
    assert sum(model.sizes[1:]) <= 10 * 8  # nothing is in doubt


@pytest.mark.parametrize(
    ("attack", "where"),
    [
        ("pgd", "nearly all"),
        ("apgd", "the left half"),
        ("fast", "every other pixel"),
        ("standard", "every other pixel"),
    ],
)
def test_attacks_end_where_they_end_without_the_cut(where: str, attack: str, many: Tensor) -> None:
    cut, whole = Cut(PIXELS[where], BRANCHES["detached"]), network()
    many = many[: 10 if attack == "standard" else 20]
    y = whole(many).argmax(1)
    found = run(cut, many, y, ATTACKS[attack], Threat(LINF, EPS), generator=seeded())
    truth = run(whole, many, y, ATTACKS[attack], Threat(LINF, EPS), generator=seeded())
    assert robust_accuracy(found) <= robust_accuracy(truth) + 0.05 < 0.8
    assert "partial-gradients" in {flag.name for flag in found.flags}
    # Square, which is in it, needs no gradient.
    assert attack == "standard" or "masked-gradients" in {flag.name for flag in found.flags}
    assert "partial-gradients" not in {flag.name for flag in truth.flags}
    # What the differences cost is counted.
    assert found.forwards > 2 * truth.forwards


@pytest.mark.parametrize(
    "branch",
    [
        BRANCHES["detached"],
        lambda x: (255 * x).to(torch.uint8) / 255,
        lambda x: x.detach() * torch.ones(1, requires_grad=True),
    ],
    ids=["cut", "bytes", "gradients of others alone"],
)
@pytest.mark.parametrize("attack", ["pgd", "fast"])
def test_no_gradient_at_all_hides_nothing(attack: str, branch: Callable[[Tensor], Tensor], many: Tensor) -> None:
    cut, whole = Cut(PLACES >= 0, branch), network()
    many = (255 * many[:8]).round() / 255
    y = cut(many).argmax(1)
    found, truth = (run(model, many, y, ATTACKS[attack], Threat(LINF, EPS)) for model in (cut, whole))
    assert robust_accuracy(found) <= robust_accuracy(truth) + 0.1 < 0.9
    assert {"zero-gradients", "partial-gradients"} <= {flag.name for flag in found.flags}


class Lie(torch.autograd.Function):
    """The identity, with a backward pass of one's own."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, backward: Callable[[Tensor], Tensor]) -> Tensor:
        ctx.lie = backward
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return ctx.lie(gradient), None


LIES: dict[str, Callable[[Tensor], Tensor]] = {
    "signs flipped": torch.neg,
    "a thousandth": lambda gradient: gradient / 1000,
    "at random": lambda gradient: torch.randn(gradient.shape, generator=seeded()) * gradient.abs().mean(),
    "none": torch.zeros_like,
    "another image's": lambda gradient: gradient.roll(1, 0),
    "half of the signs flipped": lambda gradient: torch.where(PIXELS["every other pixel"], gradient, -gradient),
}


class Lying(nn.Module):
    """A network whose backward pass at the images, or at its hidden units, is another function's."""

    def __init__(self, lie: Callable[[Tensor], Tensor], *, hook: bool = False) -> None:
        super().__init__()
        self.net, self.lie = network(), lie
        if hook:
            self.net[2].register_full_backward_hook(lambda _module, given, _: tuple(map(lie, cast(Given, given))))
            self.lie = lambda gradient: gradient

    def forward(self, x: Tensor) -> Tensor:
        return self.net(Lie.apply(x, self.lie))


@pytest.mark.parametrize(
    ("lie", "hook"), [*((name, False) for name in LIES), ("signs flipped", True), ("none", True)], ids=str
)
def test_fast_goes_on_where_gradients_lie(lie: str, hook: bool, many: Tensor) -> None:
    model, whole, few = Lying(LIES[lie], hook=hook), network(), many[:6]
    y = whole(few).argmax(1)
    found, truth = (
        run(each, few, y, ATTACKS["fast"], Threat(LINF, EPS), generator=seeded()) for each in (model, whole)
    )
    assert robust_accuracy(found) <= robust_accuracy(truth) + 0.1 < 0.9
    assert {"partial-gradients", "zero-gradients", "shattered-gradients"} & {flag.name for flag in found.flags}
    assert not any("use fast" in flag.detail for flag in found.flags)  # it was used


def test_jumps_and_ripples_are_attacked_without_the_gradient(many: Tensor) -> None:
    class Rippling(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = network()

        def forward(self, x: Tensor) -> Tensor:
            return self.net(x + 0.02 * (500 * x).sin())  # its gradient is true, and leads nowhere

    model, whole, few = Rippling(), network(), many[:6]
    y = model(few).argmax(1)
    found, truth = (
        run(each, few, y, ATTACKS["fast"], Threat(LINF, EPS), generator=seeded()) for each in (model, whole)
    )
    assert robust_accuracy(found) <= robust_accuracy(truth) + 0.1 < 0.9
    assert "shattered-gradients" in {flag.name for flag in found.flags}


def test_a_declared_layer_hides_no_cut(many: Tensor) -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Flatten(), nn.Linear(64, 32), TopK(0.5), nn.Linear(32, 4)).eval()
    cut = Cut(PIXELS["the left half"], BRANCHES["detached"])
    cut.net = net
    y = net(many).argmax(1)
    found, honest = (run(each, many, y, ATTACKS["pgd"], Threat(LINF, EPS), generator=seeded()) for each in (cut, net))
    assert "partial-gradients" in {flag.name for flag in found.flags}
    assert "partial-gradients" not in {flag.name for flag in honest.flags}
    assert robust_accuracy(found) <= robust_accuracy(honest) + 0.1


def test_a_constant_has_no_differences(many: Tensor) -> None:
    dead = network()
    nn.init.zeros_(dead.get_parameter("1.weight"))
    found = run(dead, many, dead(many).argmax(1), ATTACKS["pgd"], Threat(LINF, EPS))
    assert "partial-gradients" not in {flag.name for flag in found.flags} and not found.success.any()


def test_distances_end_where_they_end_without_the_cut(many: Tensor) -> None:
    cut, whole = Cut(PIXELS["the left half"], BRANCHES["detached"]), network()
    y = whole(many).argmax(1)
    found, truth = (run(model, many, y, ATTACKS["nearest"], Threat(L2)) for model in (cut, whole))
    assert float(found.distance.median()) <= 1.05 * float(truth.distance.median())


def test_differences_are_the_gradient_where_the_network_is_linear(many: Tensor) -> None:
    torch.manual_seed(0)
    linear = nn.Sequential(nn.Flatten(), nn.Linear(64, 4)).double().eval()
    x, y = many.double(), torch.zeros(40, dtype=torch.int64)
    model = Differences(linear, PIXELS["every other pixel"])
    for ask in (
        lambda network: logits_and_gradient(network, x, margin_loss, y)[1],
        lambda network: logits_and_pull(network, x, lambda logits: torch.eye(4).double()[:3, None].expand(3, 40, 4))[1],
    ):
        assert torch.allclose(ask(model), ask(linear), atol=1e-9)
    assert model.passes == 2 * 32 * 40


def test_differences_that_would_take_too_long_are_left_out(many: Tensor) -> None:
    model = Cut(PIXELS["the left half"], BRANCHES["detached"])
    y = model(many).argmax(1)
    long, short = (run(model, many, y, ATTACKS["pgd"], Threat(LINF, EPS), seconds=s) for s in (1e6, 0.0))
    assert short.forwards < long.forwards / 4 and robust_accuracy(long) < robust_accuracy(short)
    told = ["left out" in " ".join(flag.detail for flag in result.flags) for result in (long, short)]
    assert told == [False, True], "the share of robust images is then too high"
