from __future__ import annotations

import math
from functools import partial

import pytest
import torch
from torch import Tensor, nn

from sparring.attacks import (
    ATTACKS,
    apgd_targeted,
    cw,
    fab_targeted,
    fgsm,
    hopskipjump,
    nearest,
    pgd,
    robust_accuracy,
    run,
    sigma_zero,
    square,
    worst_case,
)
from sparring.attacks._gradients import Probe, logits_and_pull
from sparring.attacks.evaluation import _scoring
from sparring.attacks.evaluation._scoring import batch_size_for
from sparring.errors import UserError
from sparring.threat import L0, L2, LINF, Threat, distance

# The same attack, short: these tests ask for its contract, not its strength.
SHORT = ATTACKS | {
    "apgd-targeted": partial(apgd_targeted, steps=10),
    "cw": partial(cw, steps=30, searches=3),
    "hopskipjump": partial(hopskipjump, steps=3, draws=10),
    "fab-targeted": partial(fab_targeted, steps=10),
    "sigma-zero": partial(sigma_zero, steps=30),
    "square": partial(square, queries=50),
    "standard": partial(worst_case, attacks=[nearest, partial(square, queries=50)]),
}


@pytest.mark.parametrize("name", sorted(ATTACKS))
def test_every_attack_stays_inside_box_and_budget(name: str, net: nn.Module, images: Tensor) -> None:
    y = net(images).argmax(1)
    generator = torch.Generator().manual_seed(0)
    norm = L0 if name == "sigma-zero" else L2
    eps = {L0: 10, L2: 0.3}[norm]
    x_adv = SHORT[name](net, images, y, norm=norm, eps=eps, generator=generator)
    assert x_adv.shape == images.shape
    assert float(x_adv.min()) >= 0
    assert float(x_adv.max()) <= 1
    assert float(distance(x_adv - images, norm).max()) <= eps + 1e-6


def test_misclassified_images_cost_nothing_and_keep_their_pixels(net: nn.Module, images: Tensor) -> None:
    y = (net(images).argmax(1) + 1) % 4
    result = run(net, images, y, pgd, Threat(LINF, 0.1))
    assert not result.clean_correct.any()
    assert not result.success.any()
    assert torch.equal(result.x_adv, images)
    assert torch.equal(result.distance, torch.zeros(12))
    assert (result.forwards, result.backwards) == (0, 0)
    assert robust_accuracy(result) == 0
    assert "accuracy: 0.0%; robust accuracy: 0.0%" in repr(result) and "tensor" not in repr(result)
    assert "<tr><th>images</th><td>12</td></tr>" in result._repr_html_()


def test_a_failed_attack_has_infinite_distance(net: nn.Module, images: Tensor) -> None:
    y = net(images).argmax(1)
    result = run(net, images, y, pgd, Threat(LINF, 0.0))
    assert robust_accuracy(result) == 1
    assert torch.equal(result.distance, torch.full((12,), math.inf))


def test_cost_is_counted_per_image(net: nn.Module, images: Tensor) -> None:
    y = net(images).argmax(1)
    result = run(net, images, y, fgsm, Threat(LINF, 0.1), batch_size=5)
    assert (result.forwards, result.backwards) == (1, 1)


def test_mode_and_parameters_are_restored(net: nn.Sequential, images: Tensor) -> None:
    net.train()
    net[1].eval()
    net.get_parameter("3.weight").requires_grad_(False)
    run(net, images, torch.zeros(12, dtype=torch.int64), fgsm, Threat(LINF, 0.1))
    assert [module.training for module in net] == [True, False, True, True]
    assert [p.requires_grad for p in net.parameters()] == [True, True, False, True]
    assert all(p.grad is None for p in net.parameters())


def test_violations_are_flagged_and_never_repaired(net: nn.Module, images: Tensor) -> None:
    def cheat(model, x, y, *, norm, eps=None, targets=None, generator=None):  # type: ignore[no-untyped-def]
        return x + 2

    result = run(net, images, net(images).argmax(1), cheat, Threat(LINF, 0.1))
    assert {flag.name for flag in result.flags} == {"box-violation", "budget-violation"}
    assert torch.equal(result.x_adv, images + 2)


def test_an_image_that_is_no_number_is_no_success(net: nn.Module, images: Tensor) -> None:
    def overflow(model, x, y, *, norm, eps=None, targets=None, generator=None):  # type: ignore[no-untyped-def]
        return torch.where(torch.arange(len(x)).view(-1, 1, 1, 1) == 3, torch.nan, x)

    for threat in (Threat(LINF, 0.1), Threat(L2)):
        result = run(net, images, net(images).argmax(1), overflow, threat)
        assert not result.success.any()
        assert torch.isinf(result.distance).all()
        assert "box-violation" in {flag.name for flag in result.flags}


def test_a_budget_attack_without_budget_is_refused(net: nn.Module, images: Tensor) -> None:
    with pytest.raises(UserError, match="eps"):
        run(net, images, net(images).argmax(1), pgd, Threat(LINF))


@pytest.mark.parametrize("name", sorted(ATTACKS))
def test_same_seed_same_bits(name: str, net: nn.Module, images: Tensor) -> None:
    y = net(images).argmax(1)
    norm, eps = (L0, 10) if name == "sigma-zero" else (L2, 0.5)
    first, second = (
        SHORT[name](net, images, y, norm=norm, eps=eps, generator=torch.Generator().manual_seed(3)) for _ in range(2)
    )
    assert torch.equal(first, second)


def test_the_batch_size_it_finds_counts_draws_and_rows(images: Tensor) -> None:
    def network(classes: int) -> nn.Module:
        return nn.Sequential(nn.Conv2d(1, 64, 3), nn.AdaptiveMaxPool2d(1), nn.Flatten(), nn.Linear(64, classes))

    x = torch.zeros(1, 1, 64, 64)
    few, many, more = (batch_size_for(network(classes), x, rows=16) for classes in (2, 10, 40))
    assert 1 < more < many < few < 1024
    assert batch_size_for(network(40), x) == batch_size_for(network(2), x) >= few
    assert abs(batch_size_for(network(10), x, rows=16, draws=5) - many / 5) <= 1
    assert batch_size_for(network(10), images, rows=16) == 1024


def test_what_does_not_fit_is_refused_with_its_number(
    net: nn.Module, images: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_scoring, "free_memory", lambda _: 2**20)
    with pytest.raises(UserError, match=r"takes \d+ MiB for one image and 1 MiB are free"):
        run(net, images, net(images).argmax(1), pgd, Threat(LINF, 0.1))


def test_rows_of_many_classes_go_back_in_parts(images: Tensor) -> None:
    net = nn.Sequential(nn.Flatten(), nn.Linear(64, 40))
    _, rows = logits_and_pull(net, images, lambda logits: torch.eye(40).unsqueeze(1).expand(40, len(logits), 40))
    assert torch.allclose(rows.flatten(2), net.get_parameter("1.weight").unsqueeze(1).expand(40, 12, 64))


def test_rows_come_from_a_network_that_computes_its_own_gradients(net: nn.Module, images: Tensor) -> None:
    asked: list[torch.Size] = []

    class Kernels(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return net(x).detach()

        def input_gradient(self, x: Tensor, upstream: Tensor) -> Tensor:
            asked.append(upstream.shape)
            point = x.clone().requires_grad_()
            with torch.enable_grad():
                logits = net(point)
            return torch.autograd.grad(logits, point, upstream, is_grads_batched=upstream.dim() == 3)[0]

    def rows(logits: Tensor) -> Tensor:
        return torch.eye(logits.shape[1]).unsqueeze(1).expand(-1, len(logits), -1)

    own, torchs = Probe(Kernels()), Probe(net)
    found, expected = (logits_and_pull(probe, images, rows) for probe in (own, torchs))
    classes = found[0].shape[1]
    assert asked == [(classes, len(images), classes)]
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other)
    assert (own.forwards, own.backwards) == (torchs.forwards, torchs.backwards)


def test_another_form_of_the_network_is_asked_and_the_model_judges(net: nn.Module, images: Tensor) -> None:
    y = net(images).argmax(1)
    asked: list[int] = []

    class Twin(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            asked.append(len(x))
            return net(x)

    class Blind(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return net(torch.zeros_like(x)) + 0 * net(x)

    attack = partial(pgd, steps=5)
    plain, twin, blind = (
        run(net, images, y, attack, Threat(LINF, 0.1), through=through, generator=torch.Generator().manual_seed(0))
        for through in (None, Twin(), Blind())
    )
    assert sum(asked) > len(images) and twin.forwards == plain.forwards
    assert torch.equal(twin.success, plain.success)
    assert torch.equal(blind.success, net(blind.x_adv).argmax(1) != y), "the verdict is the model's"


def test_hopskipjump_looks_for_a_start_only_where_it_has_none() -> None:
    asked: list[int] = []

    class Bright(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            asked.append(len(x))
            light = x.flatten(1).mean(1) - 0.8
            return torch.stack([-light, light], 1)

    x = torch.stack([torch.full((1, 8, 8), 0.9), torch.full((1, 8, 8), 0.1)])
    x_adv = hopskipjump(Bright(), x, torch.tensor([1, 0]), norm=LINF, steps=1, draws=1, starts=20)
    assert asked[2:4] == [2, 2] and asked[4:23] == [1] * 19, "noise is dark, so it fools only the bright image"
    assert not torch.equal(x_adv[0], x[0]) and torch.equal(x_adv[1], x[1])


@pytest.mark.parametrize("draws", [False, True])
def test_a_network_is_never_called_without_images(draws: bool, net: nn.Module, images: Tensor) -> None:
    class Picky(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            logits = net(x.reshape(len(x), -1, x.shape[-1]).reshape(x.shape))  # ambiguous for an empty batch
            return logits + 1e-2 * torch.rand_like(logits) if draws else logits

    result = run(Picky(), images, (net(images).argmax(1) + 1) % 4, pgd, Threat(LINF, 0.1), draws=2)
    assert not result.clean_correct.any() and not result.success.any()
