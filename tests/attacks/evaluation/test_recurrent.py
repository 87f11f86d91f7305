"""Recurrent and scripted networks: layers that return tuples, and modules that take no hooks."""

from __future__ import annotations

import warnings

import pytest
import torch
from torch import Tensor, nn

from sparring.attacks import ATTACKS, run
from sparring.attacks.evaluation._scoring import batch_size_for
from sparring.threat import LINF, Threat


class Rows(nn.Module):
    """Read an image row by row."""

    def __init__(self, kind: type[nn.LSTM | nn.GRU | nn.RNN]) -> None:
        super().__init__()
        self.rows, self.head = kind(8, 16, batch_first=True), nn.Linear(16, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.rows(8 * x[:, 0] - 4)[0][:, -1])


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU, nn.RNN])
@pytest.mark.parametrize("attack", ["fgsm", "fast"])
def test_recurrent_networks_are_attacked(kind: type[nn.LSTM | nn.GRU | nn.RNN], attack: str, images: Tensor) -> None:
    torch.manual_seed(0)
    model = Rows(kind).eval()
    y = model(images).argmax(1)
    result = run(model, images, y, ATTACKS[attack], Threat(LINF, 0.3), generator=torch.Generator().manual_seed(0))
    assert bool(result.success.any()) and result.flags == ()


def test_scripted_networks_are_attacked_like_others(images: Tensor, net: nn.Module) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # scripting is deprecated, files of scripted networks are still about
        scripted = torch.jit.script(net)
    y = net(images).argmax(1)
    results = [
        run(model, images, y, ATTACKS["pgd"], Threat(LINF, 0.1), generator=torch.Generator().manual_seed(0))
        for model in (net, scripted)
    ]
    assert torch.equal(results[0].success, results[1].success)
    assert torch.allclose(results[0].x_adv, results[1].x_adv, atol=1e-5)


def test_memory_counts_what_layers_return_in_tuples(images: Tensor) -> None:
    assert batch_size_for(Rows(nn.LSTM).eval(), images) == 1024
