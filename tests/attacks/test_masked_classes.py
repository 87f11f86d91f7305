"""A masked class is no failure of the others, and bends no loss: attacks end where they end without it."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import Tensor, nn

from sparring.attacks import ATTACKS, cw, facts_of, fgsm, run, sigma_zero
from sparring.outputs import Door, opened
from sparring.threat import L0, L2, LINF, Threat

MASKED = torch.tensor([False, True, False, False, True, False])
FILLS: dict[str, Callable[[Tensor], Tensor]] = {
    "-inf": lambda z: z.masked_fill(MASKED, -torch.inf),
    "-1e9": lambda z: z.masked_fill(MASKED, -1e9),
    "-1e4 added": lambda z: z - 1e4 * MASKED,
    "the lowest": lambda z: z.masked_fill(MASKED, torch.finfo(z.dtype).min),
}
QUICK = {"sigma-zero": partial(sigma_zero, steps=60), "cw": partial(cw, steps=200)}
SLOW = ("cw", "fab", "fab-targeted", "hopskipjump", "square", "standard")


class Masking(nn.Module):
    """A network of six classes, two of which are masked; without a fill it has but the other four."""

    def __init__(self, fill: Callable[[Tensor], Tensor] | None, kind: torch.dtype = torch.float32) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net, self.fill = nn.Sequential(nn.Flatten(), nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 6)).to(kind), fill

    def forward(self, x: Tensor) -> Tensor:
        logits = self.net(x)
        return logits[:, ~MASKED] if self.fill is None else self.fill(logits)


@pytest.fixture(scope="module")
def images() -> Tensor:
    return torch.rand(6, 1, 8, 8, generator=torch.Generator().manual_seed(1))


def reached(model: nn.Module, x: Tensor, attack: str) -> Tensor:
    """Return which images an attack fooled, or how far it had to go."""
    least = facts_of(ATTACKS[attack]).kind == "minimum-norm"
    threat = Threat(L0 if attack == "sigma-zero" else L2) if least else Threat(LINF, 0.03)
    y = model(x).argmax(1)
    result = run(model, x, y, QUICK.get(attack, ATTACKS[attack]), threat, generator=torch.Generator().manual_seed(0))
    assert not {flag.name for flag in result.flags} - {"unfinished-search"}
    return result.distance if least else result.success.double()


@pytest.mark.parametrize("attack", sorted(ATTACKS))
def test_attacks_end_where_they_end_without_the_class(attack: str, images: Tensor) -> None:
    images = images[:2] if attack in SLOW else images
    fills = {name: FILLS[name] for name in ("-inf", "-1e4 added")} if attack in SLOW else FILLS
    alone = reached(Masking(None).eval(), images, attack)
    for name, fill in fills.items():
        found = reached(Masking(fill).eval(), images, attack)
        if facts_of(ATTACKS[attack]).kind == "minimum-norm":
            assert float(found.median()) == pytest.approx(float(alone.median()), rel=0.1), name
        else:
            assert int((found != alone).sum()) <= 1, name


@pytest.mark.parametrize(
    ("fill", "kind"),
    [
        (fill, kind)
        for fill in FILLS
        for kind in (torch.float16, torch.float64)
        if (fill, kind) != ("-1e9", torch.float16)
    ],
)
def test_the_other_classes_keep_their_logits_in_every_type(fill: str, kind: torch.dtype, images: Tensor) -> None:
    model = Masking(FILLS[fill], kind).eval()
    logits = opened(model, images)(images)
    plain = model.net(images.to(kind)).to(images.dtype)
    assert torch.equal(logits[:, ~MASKED], plain[:, ~MASKED])
    assert bool((logits[:, MASKED] < logits[:, ~MASKED].amin(1, keepdim=True)).all())
    assert float(logits.detach().abs().max()) < 100
    result = run(model, images, model(images.to(kind)).argmax(1), fgsm, Threat(LINF, 0.1))
    assert bool(result.clean_correct.all()) and bool(result.success.any())


@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e4])
def test_honest_logits_of_any_size_are_no_masks(scale: float, images: Tensor) -> None:
    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = Masking(lambda z: (scale * z).log_softmax(1))

        def forward(self, x: Tensor) -> Tensor:
            return self.net(x)

    assert not isinstance(opened(Scaled().eval(), images), Door)


def test_a_target_that_is_masked_is_not_reached(images: Tensor) -> None:
    model = Masking(FILLS["-1e9"]).eval()
    y = model(images).argmax(1)
    for name in ("pgd", "apgd-targeted", "fast"):
        result = run(model, images, y, ATTACKS[name], Threat(LINF, 0.2), targets=torch.full_like(y, 1))
        assert not result.success.any() and torch.isfinite(result.x_adv).all()
