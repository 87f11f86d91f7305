from __future__ import annotations

import contextlib
import time
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from sparring.data import Dataset
from sparring.errors import UserError
from sparring.metrics import accuracy
from sparring.models import build
from sparring.sparsity import Masks, Pruner, Step
from sparring.train import (
    EpochProgress,
    Loss,
    Ramped,
    Recipe,
    adversarial,
    cross_entropy,
    fit,
    learning_rate,
    predict,
    trades,
)


def network(data: Dataset, seed: int = 0) -> nn.Module:
    shape = tuple(data.train.x.shape[1:])
    return build("mlp", shape=shape, classes=10, mean=data.mean, std=data.std, widths=(32,), seed=seed)


def convolutional(data: Dataset, seed: int = 0) -> nn.Module:
    shape = tuple(data.train.x.shape[1:])
    return build("vgg-like", shape=shape, classes=10, mean=data.mean, std=data.std, width=0.05, seed=seed)


def half(model: nn.Module) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(5)
    return {n: torch.rand(p.shape, generator=generator) < 0.5 for n, p in model.named_parameters() if p.dim() > 1}


def state(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def test_it_learns_and_is_bit_identical(digits: Dataset) -> None:
    states = []
    for _ in range(2):
        model = network(digits)
        fit(model, *digits.train, Recipe(epochs=6, lr=0.05), seed=4)
        states.append(state(model))
    assert same(*states)
    assert accuracy(predict(model, digits.test.x), digits.test.y) > 0.9
    assert not model.training


def test_a_slow_model_predicts_in_batches_of_the_seconds_asked(few_digits: Dataset) -> None:
    class Slow(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            time.sleep(0.002 * len(x))
            return super().forward(x.flatten(1))

    model, x, told = Slow(64, 10), few_digits.test.x, list[int]()
    logits = predict(model, x, seconds=0.05, progress=lambda done, total: told.append(done))
    assert len(told) >= len(x) / 25 and told == sorted(set(told)), "2 ms an image"
    assert torch.allclose(logits, predict(model, x), atol=1e-5)


@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
def test_masked_weights_stay_zero_through_momentum_and_decay(few_digits: Dataset, optimizer: str) -> None:
    model = network(few_digits)
    masks = half(model)
    recipe = Recipe(optimizer=optimizer, lr=0.01, weight_decay=1e-2, epochs=3)  # type: ignore[arg-type]
    seen: list[int] = []

    def watching(m: nn.Module, x: Tensor, y: Tensor, generator: torch.Generator | None) -> Tensor:
        named = dict(m.named_parameters())
        seen.append(sum(int(named[n].detach()[~mask].count_nonzero()) for n, mask in masks.items()))
        return cross_entropy(m, x, y)

    fit(model, *few_digits.train, recipe, masks=masks, loss=watching)
    assert set(seen) == {0}
    named = dict(model.named_parameters())
    assert all(not named[n].detach()[~mask].any() for n, mask in masks.items())


class Behind(Pruner):
    """Keep dense weights behind fixed masks, as Dynamic Network Surgery does."""

    dense_weights = True

    def __init__(self) -> None:
        self.moved = 0
        self.start: Tensor | None = None

    def __call__(self, step: Step) -> Masks:
        name, mask = next(iter(step.masks.items()))
        weight = step.model.get_parameter(name).detach()
        if self.start is not None:
            self.moved += int((weight[~mask] != self.start).any())
        self.start = weight[~mask].clone()
        return step.masks


def test_dense_weights_keep_learning_behind_the_mask_and_never_show(few_digits: Dataset) -> None:
    model, pruner = network(few_digits), Behind()
    masks = half(model)
    visible: list[int] = []

    def watching(m: nn.Module, x: Tensor, y: Tensor, generator: torch.Generator | None) -> Tensor:
        named = dict(m.named_parameters())
        visible.append(sum(int(named[n].detach()[~mask].count_nonzero()) for n, mask in masks.items()))
        return cross_entropy(m, x, y)

    fit(model, *few_digits.train, Recipe(epochs=2, lr=0.05), masks=masks, pruner=pruner, loss=watching)
    assert set(visible) == {0}
    assert pruner.moved > 5
    named = dict(model.named_parameters())
    assert all(not named[n].detach()[~mask].any() for n, mask in masks.items())


class Stop(Exception):
    pass


@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
@pytest.mark.parametrize("network", [network, convolutional])
def test_a_run_cut_short_goes_on_to_the_same_bits(
    few_digits: Dataset, tmp_path: Path, optimizer: str, network: Callable[..., nn.Module]
) -> None:
    recipe = Recipe(optimizer=optimizer, lr=0.01, epochs=4)  # type: ignore[arg-type]
    whole = network(few_digits)
    score = lambda m: accuracy(predict(m, few_digits.valid.x), few_digits.valid.y)  # noqa: E731
    result = fit(whole, *few_digits.train, recipe, seed=2, masks=half(whole), score=score)

    def cut(progress: EpochProgress) -> None:
        if progress.epoch == 2:
            raise Stop

    path = tmp_path / "checkpoint.safetensors"
    broken = network(few_digits)
    with pytest.raises(Stop):
        fit(broken, *few_digits.train, recipe, seed=2, masks=half(broken), score=score, checkpoint=path, progress=cut)
    resumed = network(few_digits, seed=99)
    again = fit(resumed, *few_digits.train, recipe, seed=2, score=score, checkpoint=path)
    assert same(state(whole), state(resumed))
    assert result.losses == again.losses and result.scores == again.scores
    assert same(result.best_state, again.best_state) and result.best_epoch == again.best_epoch


def test_filters_lie_as_they_did_after_training_and_after_a_failure(few_digits: Dataset) -> None:
    model = convolutional(few_digits)  # its first filters have one channel, which is contiguous in every layout
    before = {name: p.stride() for name, p in model.named_parameters()}
    inside: list[tuple[int, ...]] = []

    def watching(m: nn.Module, x: Tensor, y: Tensor, generator: torch.Generator | None) -> Tensor:
        inside.extend(p.stride() for p in m.parameters() if p.dim() == 4)
        return cross_entropy(m, x, y)

    def stop(progress: EpochProgress) -> None:
        raise Stop

    for progress in (None, stop):
        with nullcontext() if progress is None else pytest.raises(Stop):
            fit(model, *few_digits.train, Recipe(epochs=1), loss=watching, progress=progress)
        assert {name: p.stride() for name, p in model.named_parameters()} == before
    assert inside and all(strides[1] == 1 for strides in inside)  # channels lie side by side


@pytest.mark.parametrize("width", [0.25, 0.5, 1.0])
def test_networks_with_1_by_1_filters_over_few_inputs_train_in_the_plain_layout(
    few_digits: Dataset, width: float
) -> None:
    shape = tuple(few_digits.train.x.shape[1:])
    model = build("resnet-32", shape=shape, classes=10, mean=few_digits.mean, std=few_digits.std, width=width, depth=8)
    inside: list[bool] = []

    def watching(m: nn.Module, x: Tensor, y: Tensor, generator: torch.Generator | None) -> Tensor:
        inside.append(all(p.is_contiguous() for p in m.parameters()))
        return cross_entropy(m, x, y)

    fit(model, *few_digits.train, Recipe(epochs=1), loss=watching)
    assert inside and set(inside) == {width < 1}


def test_the_layout_of_filters_changes_no_result_but_by_rounding(few_digits: Dataset) -> None:
    recipe = Recipe(epochs=1, lr=0.01)
    model, same_net = convolutional(few_digits), convolutional(few_digits)
    fit(model, *few_digits.train, recipe, seed=1)
    # An unused 1 × 1 filter keeps the layout plain.
    same_net.register_parameter("unused", nn.Parameter(torch.zeros(1, 1, 1, 1)))
    fit(same_net, *few_digits.train, recipe, seed=1)
    for name, value in model.state_dict().items():
        assert torch.allclose(value.float(), same_net.state_dict()[name].float(), rtol=1e-3, atol=1e-4), name


class Late(Pruner):
    """Prune half of the weights at the end of the second epoch."""

    def __call__(self, step: Step) -> Masks:
        return half(step.model) if step.number + 1 == step.steps // 2 else step.masks


def test_the_best_epoch_is_as_sparse_as_the_last(few_digits: Dataset) -> None:
    model, values = network(few_digits), iter([0.9, 0.8, 0.7, 0.6])
    whole = {name: torch.ones_like(mask) for name, mask in half(model).items()}
    recipe = Recipe(epochs=4, lr=0.05)
    result = fit(model, *few_digits.train, recipe, masks=whole, pruner=Late(), score=lambda m: next(values))
    assert result.best_epoch == 2, "the first was better, and dense"
    assert all(not result.best_state[name][~mask].any() for name, mask in result.masks.items())


def test_a_strange_checkpoint_is_refused(few_digits: Dataset, tmp_path: Path) -> None:
    path = tmp_path / "checkpoint.safetensors"
    fit(network(few_digits), *few_digits.train, Recipe(epochs=1), checkpoint=path)
    other = build("linear", shape=(1, 8, 8), classes=10, mean=few_digits.mean, std=few_digits.std)
    with pytest.raises(UserError, match="not a checkpoint of this"):
        fit(other, *few_digits.train, Recipe(epochs=1), checkpoint=path)


def test_divergence_is_said(few_digits: Dataset) -> None:
    with pytest.raises(UserError, match="diverged"):
        fit(network(few_digits), *few_digits.train, Recipe(epochs=3, lr=1e3, weight_decay=1.0))


@pytest.mark.parametrize("loss", [adversarial(eps=0.1, steps=3), trades(eps=0.1, steps=3)])
def test_adversarial_losses_train_and_keep_the_mode(few_digits: Dataset, loss: object) -> None:
    model = network(few_digits)
    result = fit(model, *few_digits.train, Recipe(epochs=2, lr=0.05), loss=loss)  # type: ignore[arg-type]
    assert result.losses[-1] < result.losses[0]
    model.train()
    loss(model, few_digits.test.x[:4].float() / 255, few_digits.test.y[:4], None)  # type: ignore[operator]
    assert model.training


def test_a_ramped_loss_knows_the_share_of_training_and_goes_on_from_a_checkpoint(
    few_digits: Dataset, tmp_path: Path
) -> None:
    images, labels = (part[:40] for part in few_digits.train)

    def run(stop: bool, path: Path | None = None) -> list[float]:
        def at(share: float) -> Loss:
            seen.append(share)
            if stop and share > 0.5:
                raise KeyboardInterrupt
            return cross_entropy

        seen: list[float] = []
        with contextlib.suppress(KeyboardInterrupt):
            fit(network(few_digits), images, labels, Recipe(epochs=4, batch_size=20), loss=Ramped(at), checkpoint=path)
        return seen

    whole = run(False)
    assert whole == [k / 8 for k in range(1, 9)]
    assert run(True, tmp_path / "c") + run(False, tmp_path / "c") == [*whole[:5], *whole[4:]]


def test_adversarial_loss_refuses_units_of_255() -> None:
    with pytest.raises(UserError, match="255"):
        adversarial(eps=8)


def test_augmentation_crops_and_flips() -> None:
    from sparring.train._fit import _augment

    image = torch.arange(64.0).view(1, 1, 8, 8).expand(200, 1, 8, 8)
    out = _augment(image, torch.Generator().manual_seed(0))
    assert out.shape == image.shape
    # The centre of an image stays inside every crop: each output holds it, some mirrored, some not.
    ordered = [int((o.diff(dim=-1) == 1).sum()) > int((o.diff(dim=-1) == -1).sum()) for o in out[:, 0]]
    assert 60 < sum(ordered) < 140


def test_learning_rates() -> None:
    recipe = Recipe(lr=1.0, schedule="linear", warmup=0.1)
    rates = [learning_rate(recipe, step, 100) for step in range(100)]
    assert max(rates) <= 1.0 and rates[0] < 0.1 and rates[-1] < 0.02
    assert rates.index(max(rates)) in (9, 10)
    constant = Recipe(lr=0.5, schedule="constant")
    assert {learning_rate(constant, step, 10) for step in range(10)} == {0.5}


@pytest.mark.parametrize("field", [{"lr": -1.0}, {"epochs": -1}, {"batch_size": 0}, {"optimizer": "sdg"}])
def test_bad_recipes_are_refused(field: dict[str, object]) -> None:
    with pytest.raises(UserError, match="recipe"):
        Recipe(**field)  # type: ignore[arg-type]
