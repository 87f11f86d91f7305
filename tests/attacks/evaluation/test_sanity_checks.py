from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from sparring.attacks import fgsm, nearest, pgd, run
from sparring.errors import UserError
from sparring.threat import L2, LINF, Threat

SMALL = Threat(LINF, 0.05)


def seeded() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def flag_names(model: nn.Module, x: Tensor, y: Tensor) -> set[str]:
    return {flag.name for flag in run(model, x, y, fgsm, SMALL).flags}


def test_probabilities_are_refused(net: nn.Module, images: Tensor) -> None:
    with pytest.raises(UserError, match="softmax"):
        run(nn.Sequential(net, nn.Softmax(1)), images, net(images).argmax(1), fgsm, SMALL)


@pytest.mark.parametrize("spoil", [lambda x: x * 255, lambda x: (x - 0.13) / 0.3, lambda x: x * torch.nan])
def test_images_outside_the_box_are_refused(spoil, net: nn.Module, images: Tensor) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(UserError, match=r"\[0, 1\]"):
        run(net, spoil(images), net(images).argmax(1), fgsm, SMALL)


def test_bytes_are_refused(net: nn.Module, images: Tensor) -> None:
    with pytest.raises(UserError, match="255"):
        run(net, (images * 255).byte(), net(images).argmax(1), fgsm, SMALL)


def test_labels_beyond_the_classes_are_refused(net: nn.Module, images: Tensor) -> None:
    with pytest.raises(UserError, match="4 classes"):
        run(net, images, torch.full((12,), 7), fgsm, SMALL)


def test_labels_of_another_type_are_refused(net: nn.Module, images: Tensor) -> None:
    with pytest.raises(UserError, match="int64"):
        run(net, images, net(images).argmax(1).float(), fgsm, SMALL)


@pytest.mark.parametrize(("norm", "eps"), [(LINF, 8.0), (L2, 128.0)])
def test_eps_in_other_units_is_refused(norm: float, eps: float, net: nn.Module, images: Tensor) -> None:
    with pytest.raises(UserError, match="255"):
        run(net, images, net(images).argmax(1), fgsm, Threat(norm, eps))


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda y: y, "12 images have their own class"),
        (lambda y: y + 4, "4 classes"),
        (lambda y: y - 4, "4 classes"),
        (lambda y: (y + 1).float() % 4, "int64"),
        (lambda y: (y[:3] + 1) % 4, r"\(12,\)"),
    ],
)
def test_targets_that_mean_nothing_are_refused(spoil, message: str, net: nn.Module, images: Tensor) -> None:  # type: ignore[no-untyped-def]
    y = net(images).argmax(1)
    with pytest.raises(UserError, match=message):
        run(net, images, y, pgd, SMALL, targets=spoil(y))


@pytest.mark.parametrize("kind", [torch.float64, torch.float16, torch.bfloat16])
def test_images_of_another_precision_are_attacked_alike(kind: torch.dtype, net: nn.Module, images: Tensor) -> None:
    rounded = images.to(kind)
    y = net(rounded.float()).argmax(1)
    found, expected = (run(net, x, y, fgsm, SMALL) for x in (rounded, rounded.float()))
    assert torch.equal(found.success, expected.success) and torch.allclose(found.x_adv.float(), expected.x_adv)


def test_labels_beyond_the_sample_are_refused_too(net: nn.Module, images: Tensor) -> None:
    x = images.repeat(6, 1, 1, 1)
    y = net(x).argmax(1)
    y[-1] = 4
    with pytest.raises(UserError, match=r"labels span . to 4 but the model has 4 classes"):
        run(net, x, y, fgsm, SMALL)


@pytest.mark.parametrize("off", [-1e-8, 1.2e-7, 1e-6])
def test_what_rounding_leaves_outside_is_clipped(off: float, net: nn.Module, images: Tensor) -> None:
    x = images.clone()
    x[0, 0, 0, 0] = off if off < 0 else 1 + off
    before = x.clone()
    y = net(x).argmax(1)
    found, expected = (run(net, part, y, pgd, SMALL, generator=seeded()) for part in (x, x.clamp(0, 1)))
    assert torch.equal(found.x_adv, expected.x_adv) and torch.equal(x, before)


def test_images_a_little_outside_are_named_as_they_are(net: nn.Module, images: Tensor) -> None:
    x = images.clone()
    x[0, 0, 0, 0], x[0, 0, 0, 1] = 1 + 2e-5, 0
    with pytest.raises(UserError, match=r"span \[0, 1.00002.*; clip values .*clamp\(0, 1\)"):
        run(net, x, net(x).argmax(1), fgsm, SMALL)


def test_images_with_a_gradient_or_of_inference_mode_are_attacked(net: nn.Module, images: Tensor) -> None:
    y = net(images).argmax(1)
    plain = run(net, images, y, pgd, SMALL, generator=seeded())
    with torch.inference_mode():
        x, labels = images.clone(), y.clone()
        inner = run(net, x, labels, pgd, SMALL, generator=seeded())
    outer = run(net, x, labels, pgd, SMALL, generator=seeded())
    wanting = run(net, images.clone().requires_grad_(), y, pgd, SMALL, generator=seeded())
    for result in (inner, outer, wanting):
        assert torch.equal(result.x_adv, plain.x_adv) and not result.x_adv.requires_grad


class Jitter(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x + torch.rand_like(x)


class BatchMean(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x - x.mean(0)


class Overflow(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.where(x > x.mean(), torch.inf, x)


class Counter(nn.Module):
    calls: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("calls", torch.zeros(1))

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return x


class Cut(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.detach()


@pytest.mark.parametrize(
    ("layer", "name"),
    [
        (Jitter(), "random-model"),
        (BatchMean(), "batch-dependent"),
        (Overflow(), "nonfinite-logits"),
        (Counter(), "state-changed"),
        (Cut(), "zero-gradients"),
    ],
)
def test_a_doubtful_model_is_flagged(layer: nn.Module, name: str, net: nn.Module, images: Tensor) -> None:
    assert name in flag_names(nn.Sequential(net, layer), images, net(images).argmax(1))


@pytest.mark.parametrize("traced", [True, False])
def test_what_a_users_attack_writes_is_undone(traced: bool, net: nn.Module, images: Tensor) -> None:
    def writes(model: nn.Module, x: Tensor, y: Tensor, **_: object) -> Tensor:
        for value in net.parameters():
            with torch.no_grad():
                (value if traced else value.data).zero_()
        return x

    before, y = {name: value.clone() for name, value in net.state_dict().items()}, net(images).argmax(1)
    assert "state-changed" in {flag.name for flag in run(net, images, y, writes, SMALL).flags}
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())


def test_saturated_logits_are_flagged(net: nn.Module, images: Tensor) -> None:
    class Large(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return 1e5 * x

    assert flag_names(nn.Sequential(net, Large()), images, net(images).argmax(1)) == {"logit-scale"}


def test_dropout_in_train_mode_is_switched_off(net: nn.Module, images: Tensor) -> None:
    model = nn.Sequential(net, nn.Dropout(0.5)).train()
    result = run(model, images, net(images).argmax(1), fgsm, SMALL)
    assert model.training
    assert result.success.equal(run(net, images, net(images).argmax(1), fgsm, SMALL).success)
    assert [flag.name for flag in result.flags] == ["training-mode"]
    assert "model.eval()" in result.flags[0].detail
    assert flag_names(net.train(), images, net(images).argmax(1)) == set(), "no layer of it cares"


def test_dropout_that_ignores_eval_mode_is_flagged(net: nn.Module, images: Tensor) -> None:
    class Always(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return functional.dropout(x, 0.5, training=True)

    assert "random-model" in flag_names(nn.Sequential(net, Always()), images, net(images).argmax(1))


def test_a_search_that_finds_nothing_is_flagged(images: Tensor) -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 3))
    nn.init.zeros_(model.get_parameter("1.weight"))
    with torch.no_grad():
        model.get_parameter("1.bias").copy_(torch.tensor([2.0, 0.0, 0.0]))
    result = run(model, images, torch.zeros(12, dtype=torch.int64), nearest, Threat(L2))
    assert "unfinished-search" in {flag.name for flag in result.flags}
    assert torch.isinf(result.distance).all()


def test_a_gradient_that_says_little_about_the_next_step_is_flagged(net: nn.Module, images: Tensor) -> None:
    class Ripple(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x + (3000 * x).sin() / 100

    assert "shattered-gradients" in flag_names(nn.Sequential(Ripple(), net), images, net(images).argmax(1))


@pytest.mark.parametrize("seed", range(10))
def test_honest_models_raise_no_flag(seed: int, images: Tensor) -> None:
    torch.manual_seed(seed)
    model = nn.Sequential(
        nn.Conv2d(1, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(54, 5)
    ).eval()
    y = model(images).argmax(1)
    for attack, threat in ((fgsm, SMALL), (pgd, SMALL), (nearest, Threat(L2))):
        assert run(model, images, y, attack, threat).flags == ()


def test_a_layer_called_dense_is_nobody_to_replace(net: nn.Module, images: Tensor) -> None:
    class Head(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.dense = net

        def forward(self, x: Tensor) -> Tensor:
            return self.dense(x)

    assert flag_names(Head(), images, net(images).argmax(1)) == set()


class Asked(nn.Module):
    """A convolutional network that no matrices stand for, and how many images it was shown."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        layers = [nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten()]
        self.net, self.images = nn.Sequential(*layers, nn.Linear(16, 4)), 0

    def forward(self, x: Tensor) -> Tensor:
        self.images += len(x)
        return self.net(x)


@pytest.mark.parametrize(("images", "most"), [(100, 4.5), (1000, 3.2)])
def test_the_contract_costs_less_than_the_cheapest_attack(images: int, most: float) -> None:
    model = Asked().eval()
    x = torch.rand(images, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    y = model(x).argmax(1)
    model.images = 0
    result = run(model, x, y, fgsm, Threat(LINF, 0.001))
    assert result.flags == () and result.forwards == 1.0
    assert model.images <= most * images  # clean, attack and verdict are three passes


def test_checks_send_few_images_besides_those_of_the_attack() -> None:
    asked: list[int] = []

    class Counted(nn.Conv2d):
        def forward(self, x: Tensor) -> Tensor:
            asked.append(len(x))
            return super().forward(x).relu().mean((2, 3))

    torch.manual_seed(0)
    net, x = Counted(1, 4, 3, padding=1), torch.rand(100, 1, 8, 8)
    y = net(x).argmax(1)
    asked.clear()
    run(net, x, y, fgsm, SMALL, batch_size=100)
    opened, alone, sample, moved, blind = 2 + 1, 1, 32, 32 + 2 * 8, 8 + 4 * 8
    assert sum(asked) <= opened + alone + sample + 8 + moved + (100 - sample) + blind + 2 * 100, asked
