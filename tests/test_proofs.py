"""An adversarial example inside a certified ball ends whatever knows of both."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from sparring import bounds
from sparring.errors import UserError
from sparring.proofs import refuse_refuted
from sparring.threat import LINF


def test_both_numbers_are_told() -> None:
    with pytest.raises(UserError, match=r"mine: image 7 is certified up to linf 0\.0268, .* at 0\.0183 \(1 of 3 "):
        refuse_refuted([0.1, 0.0268, 0.0], [0.2, 0.0183, 0.1], norm="linf", who="mine", images=[3, 7, 9])


@pytest.mark.parametrize("reached", [math.inf, math.nan, 0.1, 0.099995, 0.5])
def test_what_does_not_refute_passes(reached: float) -> None:
    refuse_refuted(torch.tensor([0.1]), torch.tensor([reached]), norm="l2")


class Hidden(nn.Module):
    """A network that answers otherwise on images that no comparison meets, decided where torch cannot see it."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Sequential(nn.Flatten(), nn.Linear(2, 2))
        with torch.no_grad():
            self.inner.get_parameter("1.weight").copy_(torch.tensor([[1.0, 1.0], [-1.0, -1.0]]))
            self.inner.get_parameter("1.bias").zero_()

    def forward(self, x: Tensor) -> Tensor:
        flip = 0 if torch.compiler.is_exporting() else (x == 0.4375).flatten(1).all(1, keepdim=True)
        return self.inner(x) * (1 - 2.0 * flip)


def test_an_exact_search_ends_at_a_point_that_refutes_its_certificate() -> None:
    x = torch.full((1, 1, 1, 2), 0.5)
    with pytest.raises(UserError, match="certified up to linf"):
        bounds.exact(Hidden(), x, torch.tensor([0]), LINF, x_adv=torch.full_like(x, 0.4375))
