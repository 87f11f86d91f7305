from __future__ import annotations

from unittest.mock import patch

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from sparring.attacks import ATTACKS, run, run_batches
from sparring.attacks.evaluation import _run
from sparring.attacks.evaluation._sanity_checks import check_model
from sparring.errors import UserError
from sparring.threat import L2, LINF, Threat


def loader(x: Tensor, y: Tensor, size: int = 5) -> DataLoader[tuple[Tensor, ...]]:
    return DataLoader(TensorDataset(x, y), batch_size=size)


@pytest.mark.parametrize(
    "name, threat",
    [("fgsm", Threat(LINF, 0.1)), ("deepfool", Threat(L2)), ("ddn", Threat(L2))],
)
def test_batches_joined_are_one_call_on_all(name: str, threat: Threat, net: nn.Module, images: Tensor) -> None:
    y = net(images).argmax(1)
    y[1] = (y[1] + 1) % 4  # one is wrong from the start
    whole = run(net, images, y, ATTACKS[name], threat)
    joined = run_batches(net, loader(images, y), ATTACKS[name], threat)
    assert torch.equal(joined.clean_correct, whole.clean_correct)
    assert torch.equal(joined.success, whole.success)
    assert torch.allclose(joined.x_adv, whole.x_adv, atol=1e-5)
    assert torch.allclose(joined.distance, whole.distance, atol=1e-5)
    assert (joined.forwards, joined.backwards) == pytest.approx((whole.forwards, whole.backwards))
    assert {flag.name for flag in joined.flags} == {flag.name for flag in whole.flags}


def test_the_contract_is_checked_once_on_the_first_batch_with_a_correct_image(net: nn.Module, images: Tensor) -> None:
    y = net(images).argmax(1)
    y[:5] = (y[:5] + 1) % 4
    with patch.object(_run, "check_model", wraps=check_model) as check:
        run_batches(net, loader(images, y, 4), ATTACKS["fgsm"], Threat(LINF, 0.1))
    assert check.call_count == 2  # the first batch has none, the second has some, the third is spared


class Cut(nn.Module):
    """A branch that autograd does not see: attacks must find that out, and go by differences, in every batch."""

    def __init__(self) -> None:
        super().__init__()
        self.seen, self.cut = nn.Linear(16, 3), nn.Linear(16, 3)

    def forward(self, x: Tensor) -> Tensor:
        flat = x.flatten(1)
        return 0.1 * self.seen(flat) + 5 * self.cut(flat.detach())


def test_what_the_first_batch_showed_guides_the_attack_on_the_others() -> None:
    torch.manual_seed(0)
    model, x = Cut(), torch.rand(12, 1, 4, 4)
    y = model(x).argmax(1)
    whole, joined = (
        run(model, x, y, ATTACKS["pgd"], Threat(LINF, 0.2)),
        run_batches(model, loader(x, y), ATTACKS["pgd"], Threat(LINF, 0.2)),
    )
    assert "partial-gradients" in {flag.name for flag in joined.flags}
    assert torch.equal(joined.success, whole.success)
    assert bool(joined.success[5:].any())


def test_the_model_is_given_back_as_it_was(net: nn.Module, images: Tensor) -> None:
    net.train()
    result = run_batches(net, loader(images, torch.zeros(12, dtype=torch.int64)), ATTACKS["fgsm"], Threat(LINF, 0.1))
    assert net.training and all(p.requires_grad for p in net.parameters())
    assert [flag.name for flag in result.flags].count("training-mode") <= 1


@pytest.mark.parametrize(
    "batches, says", [([], "no batches"), ([{"x": torch.rand(1, 1, 4, 4)}], "pair of images and labels")]
)
def test_what_is_no_loader_of_pairs_is_refused(batches: list[object], says: str, net: nn.Module) -> None:
    with pytest.raises(UserError, match=says):
        run_batches(net, batches, ATTACKS["fgsm"], Threat(LINF, 0.1))  # type: ignore[arg-type]
